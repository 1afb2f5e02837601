// trace.h: a timeline of what the ranks of a pipeline did, as Chrome trace JSON, which Perfetto shows.

#ifndef DATA_TRACE_H
#define DATA_TRACE_H

#include "../host/schedule.h"

enum { TRACE_EVENTS = 1 << 20 };        // of a rank at most: the first steps of a long run

typedef struct { double start, end; long step; Action action; } TraceEvent;    // seconds

typedef struct {
    TraceEvent* events;         // NULL: nothing is kept
    int count;
    double start;               // the moment that all ranks call zero
} Trace;

static inline void trace_open(Trace* t, double now) {
    t->events = (TraceEvent*)allocate(TRACE_EVENTS, sizeof(TraceEvent));
    t->start = now;
}

static inline void trace_add(Trace* t, const Action* a, long step, double start, double end) {
    TraceEvent event = {start - t->start, end - t->start, step, *a};
    if (t->events && t->count < TRACE_EVENTS) t->events[t->count++] = event;
}

// One rank's events, in an array of JSON objects that has been opened. pid: replica, tid: rank of its
// pipeline
static inline void trace_write(FILE* out, const TraceEvent* events, int count, int pid, int tid,
                               bool* first) {
    for (int i = 0; i < count; i++) {
        const TraceEvent* e = &events[i];
        fprintf(out,
                "%s\n{\"name\":\"%c s%d m%u%s\",\"cat\":\"compute\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,"
                "\"pid\":%d,\"tid\":%d,\"args\":{\"step\":%ld}}",
                *first ? "" : ",", "FBIW"[e->action.kind], e->action.stage, (unsigned)e->action.micro,
                e->action.direction ? "'" : "", 1e6 * e->start, 1e6 * (e->end - e->start), pid, tid, e->step);
        *first = false;
    }
}

#endif
