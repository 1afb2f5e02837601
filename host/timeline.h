// timeline.h: what the ranks of a pipeline did and when: gathered, written, and laid beside what the
// simulation of the schedule says. Included by train_gpt_mhc.c where Run is known.

#ifndef HOST_TIMELINE_H
#define HOST_TIMELINE_H

enum { TAG_TRACE = (1 << 29) + 1 };

typedef struct { int* counts; TraceEvent** events; } Timeline;     // of each world rank; on the leader alone

static void timeline_open(Run* run) {
    double unused = 0;
    transport_sum(run->pipe.transport, &unused, 1);         // from here on the ranks' clocks agree
    trace_open(&run->pipe.trace, seconds());
}

// Every rank's events, on the leader
static Timeline timeline_gather(Run* run) {
    Transport* t = run->pipe.transport;
    Trace* own = &run->pipe.trace;
    Timeline all = {NULL, NULL};
    double* counts = (double*)allocate((size_t)t->size, sizeof(double));
    counts[t->rank] = own->count;
    transport_sum(t, counts, t->size);
    if (!is_leader(run)) {
        if (own->count)
            transport_wait(
                t, transport_send(t, 0, TAG_TRACE, own->events, (size_t)own->count * sizeof(TraceEvent)),
                "waits for its trace to be taken");
        free(counts);
        return all;
    }
    all.counts = (int*)allocate((size_t)t->size, sizeof(int));
    all.events = (TraceEvent**)allocate((size_t)t->size, sizeof(TraceEvent*));
    for (int rank = 0; rank < t->size; rank++) {
        size_t bytes = (size_t)counts[rank] * sizeof(TraceEvent);
        all.counts[rank] = (int)counts[rank];
        all.events[rank] = (TraceEvent*)allocate(bytes, 1);
        if (rank == 0) memcpy(all.events[0], own->events, bytes);
        else if (bytes)
            transport_wait(t, transport_receive(t, rank, TAG_TRACE, all.events[rank], bytes),
                           "waits for traces");
    }
    free(counts);
    return all;
}

static bool timeline_write(const Run* run, const Timeline* all, Error* e) {
    bool first = true;
    FILE* out = fopen(run->o.trace, "w");
    if (!out)
        return fail(e, "%s: cannot be written (%s), choose another place for --trace", run->o.trace,
                    strerror(errno));
    fputs("{\"traceEvents\":[", out);
    for (int rank = 0; rank < run->pipe.transport->size; rank++)
        trace_write(out, all->events[rank], all->counts[rank], rank / run->pipe.P, rank % run->pipe.P,
                    &first);
    fputs("]}\n", out);
    bool good = !ferror(out);
    if (fclose(out) || !good)
        return fail(e, "%s: cannot be written (%s), make room", run->o.trace, strerror(errno));
    return true;
}

// Mean seconds of a stage's actions. Where only whole backwards were seen, each half is taken as half of one.
static StageCost timeline_cost(const Run* run, const Timeline* all, int stage) {
    double sum[4] = {0}, count[4] = {0};
    for (int rank = 0; rank < run->pipe.transport->size; rank++)
        for (int i = 0; i < all->counts[rank]; i++) {
            const TraceEvent* event = &all->events[rank][i];
            if (event->action.stage != stage) continue;
            sum[event->action.kind] += event->end - event->start;
            count[event->action.kind]++;
        }
    for (int kind = 0; kind < 4; kind++) sum[kind] /= fmax(count[kind], 1);
    double W = count[ACTION_W] ? sum[ACTION_W] : sum[ACTION_B] / 2;
    StageCost cost = {sum[ACTION_F], 0, count[ACTION_I] ? sum[ACTION_I] : sum[ACTION_B] - W, W};
    return cost;
}

// The part of the steps' time, between the first and the last action of each, in which the first pipeline's
// ranks did nothing. The first step is left out where there are others: it meets cold caches.
static double timeline_bubble(const Run* run, const Timeline* all) {
    double busy = 0, room = 0;
    int at[1024] = {0}, P = run->pipe.P < 1024 ? run->pipe.P : 1024;
    long first = all->events[0][0].step, last = all->events[0][all->counts[0] - 1].step;
    for (long step = first; step <= last; step++) {
        double start = INFINITY, end = 0, worked = 0;
        for (int rank = 0; rank < P; rank++)
            for (; at[rank] < all->counts[rank] && all->events[rank][at[rank]].step == step; at[rank]++) {
                const TraceEvent* event = &all->events[rank][at[rank]];
                start = fmin(start, event->start);
                end = fmax(end, event->end);
                worked += event->end - event->start;
            }
        if (step == first && first < last) continue;
        busy += worked;
        room += P * (end - start);
    }
    return 1 - busy / room;
}

// What the schedule's simulation says of the same bubble, from the measured times of actions
static double timeline_predicted(const Run* run, const Timeline* all) {
    const Pipe* p = &run->pipe;
    StageCost* stages = (StageCost*)allocate((size_t)p->stage_count, sizeof(StageCost));
    ActionList* lists = (ActionList*)allocate((size_t)p->P, sizeof(ActionList));
    double *busy = (double*)allocate((size_t)p->P, sizeof(double)), worked = 0;
    ScheduleCosts costs = {stages, 0, 0};
    for (int s = 0; s < p->stage_count; s++) stages[s] = timeline_cost(run, all, s);
    for (int rank = 0; rank < p->P; rank++) lists[rank] = schedule_actions(&p->schedule, rank, false);
    double span = schedule_simulate(&p->schedule, lists, &costs, busy);
    for (int rank = 0; rank < p->P; rank++) {
        worked += busy[rank];
        free(lists[rank].at);
    }
    free(stages);
    free(lists);
    free(busy);
    return 1 - worked / (p->P * span);
}

// Ends a run's trace: the file, and one line. False on every rank if it could not be written.
static bool timeline_close(Run* run, Error* e) {
    bool good = true;
    Timeline all = timeline_gather(run);
    if (is_leader(run) && all.counts[0] > 0) {
        good = timeline_write(run, &all, e);
        printf("bubble: %.1f %% of the ranks' time; %.1f %% by simulation of the schedule with the mean "
               "times measured\n",
               100 * timeline_bubble(run, &all), 100 * timeline_predicted(run, &all));
    }
    for (int rank = 0; all.events && rank < run->pipe.transport->size; rank++) free(all.events[rank]);
    free((void*)all.events);
    free(all.counts);
    free(run->pipe.trace.events);
    run->pipe.trace.events = NULL;
    return all_well(run, good, e);
}

#endif
