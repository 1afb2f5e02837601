// loop.h: a run from its first step to its exit status: what is due after a step, why it ends, the other
// modes. Included by train_gpt_mhc.c where a step is known.

#ifndef HOST_LOOP_H
#define HOST_LOOP_H

static bool every(long period, long step) { return period > 0 && step % period == 0; }

// What is due after a step. False only if the data cannot be read;
// a save that fails now is tried again later.
static bool after_step(Run* run, const StepReport* r, double mean_seconds, Error* e) {
    const Options* o = &run->o;
    Gain gain;
    bool last = run->step == o->steps, gains = every(o->gain_every, run->step) || (o->gain_every && last);
    if (gains && !measure_gains(run, &gain, e)) return false;
    if (is_leader(run)) report_step(run, r, gains ? &gain : NULL, mean_seconds);
    if ((every(o->val_every, run->step) || last) && !report_validation(run, e)) return false;
    if ((every(o->sample_every, run->step) || last) && run->pipe.P == 1 && is_leader(run)) report_sample(run);
    Error save;
    if (every(o->save_every, run->step) && !last && !save_checkpoint(run, &save) && is_leader(run))
        fprintf(stderr, "warning: %s; the next save tries again\n", save.text);
    return true;
}

static int stop_on_nonfinite(Run* run, const StepReport* r, double mean_seconds) {
    if (!is_leader(run)) return STATUS_NONFINITE;
    report_step(run, r, NULL, mean_seconds);
    fprintf(stderr, "stopped at step %ld: %s; the update was not applied and nothing was saved\n",
            run->step + 1, r->culprit);
    return stop_run(run, r->culprit, STATUS_NONFINITE);
}

static int train_steps(Run* run, int argc, char** argv) {
    Error e;
    StepReport r;
    double mean_seconds = 0;
    if (run->step >= run->o.steps && is_leader(run))
        printf("nothing to do: step %ld of %ld is done\n", run->step, run->o.steps);
    while (run->step < run->o.steps) {
        set_patience(run, true);
        bool good = train_step(run, &r, &e);
        set_patience(run, false);
        if (!good) break;
        mean_seconds = mean_seconds > 0 ? 0.95 * mean_seconds + 0.05 * r.seconds : r.seconds;
        if (r.verdict == VERDICT_STOP) return stop_on_nonfinite(run, &r, mean_seconds);
        if (!after_step(run, &r, mean_seconds, &e)) break;
        bool stops = ranks_max(run, stop_requested) > 0;        // a signal to any rank stops them all
        if (stops && run->step < run->o.steps) return stop_on_signal(run, argc, argv);
    }
    if (run->step < run->o.steps) { // the data cannot be read any further: keep what has been learnt
        if (is_leader(run)) fprintf(stderr, "%s\n", e.text);
        return save_and_stop(run, e.text, STATUS_USAGE);
    }
    int status = save_and_stop(run, "done", STATUS_DONE);
    if (status == STATUS_DONE && is_leader(run))
        printf("done: %s/run.jsonl, %s/step_%08ld.safetensors\n", run->o.out, run->o.out, run->step);
    return status;
}

static int train(Run* run, int argc, char** argv) {
    Error e;
    if (run->o.trace[0]) timeline_open(run);
    int status = train_steps(run, argc, argv);
    if (!run->o.trace[0] || timeline_close(run, &e)) return status;
    if (is_leader(run)) fprintf(stderr, "%s\n", e.text);
    return status == STATUS_DONE ? STATUS_SAVE_FAILED : status;
}

static int run_training(Run* run, int argc, char** argv) {
    Error e;
    char path[RUNDIR_PATH];
    snprintf(path, sizeof path, "%s/run.jsonl", run->o.out);
    catch_signals();
    if (!is_leader(run)) return train(run, argc, argv);
    if (!run->o.resume) rundir_keep(run->o.out, 0);
    if (!runlog_open(&run->log, path, run->o.resume ? run->step : -1, &e)) die("%s", e.text);
    run->peak = machine_peak(run);
    if (run->pipe.transport->loopback && !is_alone(run))
        printf("%d ranks in one process: a trial of the schedule, start them with mpirun to be faster\n",
               run->pipe.transport->size);
    print_model(run);
    machine_print_plan(run);
    if (run->pipe.P > 1) print_pipeline(run);
    if (!run->has_val)
        printf("no validation: the shards of --data are all trained on, name others with --val-data\n");
    log_run(run);
    return train(run, argc, argv);
}

static int run_mode(Run* run, int argc, char** argv) {
    Error e;
    double loss;
    if (run->o.plan && !is_leader(run)) return STATUS_DONE;
    if (run->o.plan) {
        print_model(run);
        machine_print_plan(run);
        if (run->pipe.schedule.kind != PIPELINE_NONE) print_pipeline(run);
        return STATUS_DONE;
    }
    if (run->o.generate[0]) return run_generation(run);
    if (run->o.dump[0]) {
        if (dump(run, &e)) return STATUS_DONE;
        fprintf(stderr, "%s\n", e.text);
        return STATUS_SAVE_FAILED;
    }
    if (!run->o.eval) return run_training(run, argc, argv);
    bool good = validation_loss(run, &loss, &e);
    if (!is_leader(run)) return good ? STATUS_DONE : STATUS_USAGE;
    if (!good) die("%s", e.text);
    printf("val loss %.6f\n", loss);
    return output_written();
}

static void close_run(Run* run) {
    machine_close(run);
    pipe_close(&run->pipe);
    activations_close(&run->acts);
    activations_close(&run->infer);
    model_close(&run->model);
    free(run->arena.memory);
    if (run->has_val) tokens_close(&run->val);
    tokens_close(&run->train);
    if (run->has_bpe) bpe_close(&run->bpe);
    free(run->corpus);
    free(run->nats);
    if (run->log.file) runlog_close(&run->log);
}

// One rank, from its transport to its exit status
static int run_rank(Run* run, Transport* transport, int argc, char** argv) {
    Error e;
    run->pipe.transport = transport;
    set_patience(run, false);
    if (run->o.plan && print_paper_plan(run)) return output_written();
    machine_choose(run);
    if (!open_run_everywhere(run, &e)) return refuse(run, &e);
    machine_join(run);
    int status = run_mode(run, argc, argv);
    close_run(run);
    return status;
}

typedef struct { Run run; Transport* transport; int argc, status; char** argv; } RankThread;

static void* run_rank_thread(void* context) {
    RankThread* t = (RankThread*)context;
    t->status = run_rank(&t->run, t->transport, t->argc, t->argv);
    return NULL;
}

// All ranks of a pipeline as threads of this process: to try a schedule where there is no MPI.
static int run_in_one_process(const Run* like, int argc, char** argv) {
    int P = (int)like->o.ranks;
    Loopback* loopback = loopback_open(P, 0);
    RankThread* threads = (RankThread*)allocate((size_t)P, sizeof(RankThread));
    pthread_t* ids = (pthread_t*)allocate((size_t)P, sizeof(pthread_t));
    for (int r = 0; r < P; r++) {
        RankThread one = {*like, loopback_rank(loopback, r), argc, 0, argv};
        threads[r] = one;
        if (pthread_create(&ids[r], NULL, run_rank_thread, &threads[r]))
            die("--ranks: found no room for %d threads", P);
    }
    for (int r = 0; r < P; r++) pthread_join(ids[r], NULL);
    int status = threads[0].status;
    free(ids);
    free(threads);
    loopback_close(loopback);
    return status;
}

#endif
