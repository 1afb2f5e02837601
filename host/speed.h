// speed.h: floating-point operations of a step, and the most this machine can do.
// Included by train_gpt_mhc.c where Model is known.

#ifndef HOST_SPEED_H
#define HOST_SPEED_H

// Per token, forward and backward: 6 for each weight a token meets, attention,
// and what connections read, write and mix.
static double flops_per_token(const Model* m, int T) {
    const Config* c = &m->c;
    double n = c->n, connections = has_connections(c) ? 6 * (n * n + 2 * n) * c->C * 2 * c->L : 0;
    return 6 * ((double)m->total - (double)c->T * c->C) + 12.0 * c->L * c->C * T + connections;
}

static const char* cpu_name(void) {
    static char name[128] = "unknown CPU";
    char line[512];
    FILE* file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(name, sizeof name, "%.*s", (int)strcspn(strchr(line, ':') + 2, "\n"),
                     strchr(line, ':') + 2);
            break;
        }
    if (file) fclose(file);
    return name;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#ifdef __GNUC__
// FLOP/s of multiply-adds on registers, all threads: the dense peak that MFU refers to. 0.1 s.
static double measure_peak(void) {
    enum { CHAINS = 16, ROUNDS = 500000 };
    volatile real unknown = (real)1e-3;         // to the compiler, which would else compute all of it itself
    double best = 0, sink = 0;
    for (int attempt = 0; attempt < 25; attempt++) {
        double start = seconds();
#pragma omp parallel reduction(+ : sink)
        {
            Vector sum[CHAINS], factor;
            for (int l = 0; l < VECTOR_LEN; l++) factor[l] = unknown;
            for (int i = 0; i < CHAINS; i++) sum[i] = factor * (real)i;
            for (int r = 0; r < ROUNDS; r++)
                UNROLL
                for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * factor + factor;
            for (int i = 0; i < CHAINS; i++) sink += (double)sum[i][0];
        }
        double rate = 2.0 * VECTOR_LEN * CHAINS * ROUNDS * thread_count() / (seconds() - start);
        if (sink > 0 && rate > best) best = rate;
    }
    return best;
}
#else
static double measure_peak(void) { return 0; }
#endif

#endif
