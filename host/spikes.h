// spikes.h: how unusual a loss is, in deviations from the last accepted ones.

#ifndef HOST_SPIKES_H
#define HOST_SPIKES_H

#include <math.h>

#include "common.h"

enum {
    SPIKE_WINDOW = 128,
    SPIKE_LEAST = 64
}; // losses that are kept, and from how many on they say something
#define SPIKE_LIMIT 6.0                         // deviations

typedef struct { double losses[SPIKE_WINDOW]; long count; } Spikes;     // a ring; count: of all that came in

// z-score of a loss; 0 while too few are known. Summed anew each time:
// running sums would remember a spike that has left.
static inline double spikes_score(const Spikes* s, double loss) {
    int known = s->count < SPIKE_WINDOW ? (int)s->count : (int)SPIKE_WINDOW;
    double mean = 0, variance = 0;
    if (known < SPIKE_LEAST) return 0;
    for (int i = 0; i < known; i++) mean += s->losses[i] / known;
    for (int i = 0; i < known; i++) variance += (s->losses[i] - mean) * (s->losses[i] - mean) / known;
    return (loss - mean) / sqrt(variance + 1e-20);
}

// Only what was applied comes in, so that a spike that is skipped does not hide the next one.
static inline void spikes_accept(Spikes* s, double loss) { s->losses[s->count++ % SPIKE_WINDOW] = loss; }

#endif
