// batches.h: which sequences a micro-batch has.
// Included by train_gpt_mhc.c where Run is known.

#ifndef HOST_BATCHES_H
#define HOST_BATCHES_H

// The micro-batch of an update: a function of the seed and of the sequence's number,
// so no loader needs a state
static bool training_batch(Run* run, long micro, Error* e) {
    const Options* o = &run->o;
    uint64_t number = (uint64_t)run->step * (uint64_t)o->micro_batches + (uint64_t)micro;
    number = (number * (uint64_t)run->pipe.D + (uint64_t)run->pipe.replica) * (uint64_t)o->batch;
    for (long row = 0; row < o->batch; row++)
        if (!tokens_train_window(&run->train, (uint64_t)o->seed, number + (uint64_t)row, run->c.T, run->c.V,
                                 run->tokens + row * o->seq, run->targets + row * o->seq, e))
            return false;
    run->loaded = (int)o->batch;
    return true;
}

// Windows a validation looks at
static uint64_t validation_windows(const Run* run) {
    uint64_t wanted = (uint64_t)run->o.val_batches * (uint64_t)run->o.batch,
             there = tokens_val_windows(&run->val, run->c.T);
    return wanted < there ? wanted : there;
}

// A micro-batch of validation; the last one's missing sequences are its first again, and do not count.
static bool validation_batch(Run* run, long micro, Error* e) {
    uint64_t first = (uint64_t)micro * (uint64_t)run->o.batch, left = validation_windows(run) - first;
    int T = run->c.T;
    run->loaded = left < (uint64_t)run->o.batch ? (int)left : (int)run->o.batch;
    for (int row = 0; row < run->o.batch; row++)
        if (!tokens_val_window(&run->val, first + (uint64_t)(row % run->loaded), T, run->c.V,
                               run->tokens + row * T, run->targets + row * T, e))
            return false;
    return true;
}

// The first validation sequence (of the training data where there is none)
static bool first_sequence(Run* run, long micro, Error* e) {
    (void)micro;
    run->loaded = 1;
    return run->has_val ? tokens_val_window(&run->val, 0, run->c.T, run->c.V, run->tokens, run->targets, e)
                        : tokens_train_window(&run->train, (uint64_t)run->o.seed, 0, run->c.T, run->c.V,
                                              run->tokens, run->targets, e);
}

#endif
