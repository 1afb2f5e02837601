// test_pipeline.c: ranks that share a model compute what one alone does, to the bit; ranks as threads of this
// process. make build/test_pipeline && build/test_pipeline

#define TESTING
#include "../train_gpt_mhc.c"
#include "check.h"

enum { STEPS = 3 };

static char text_path[] = "/tmp/test_pipeline_XXXXXX";

static void write_text(void) {
    int file = mkstemp(text_path);
    FILE* out = file < 0 ? NULL : fdopen(file, "w");
    if (!out) die("%s: cannot be written", text_path);
    for (uint64_t i = 0; i < 5000; i++) fputc("etaoin shrdlu\n"[hash64(5, i / 3) % 14], out);
    fclose(out);
}

#define SHAPE                                                                                                \
    "--layers 3 --width 8 --heads 2 --seq 8 --batch 2 --streams 2 --sinkhorn-iters 3 --lr 1e-2 --warmup 0 "

// A run before its first step, from options with spaces between, as open_run makes it, but with no directory
static void open_rank(Run* run, Transport* transport, const char* options) {
    char text[1024], *words[64] = {(char*)"test"}, *rest = text;
    int count = 1;
    Error e;
    memset(run, 0, sizeof *run);
    run->pipe.transport = transport;
    snprintf(text, sizeof text, SHAPE "--data %s %s", text_path, options);
    for (char* word; (word = strtok_r(rest, " ", &rest));) words[count++] = word;
    if (!options_parse(&run->o, &run->given, count, words, &e)) die("%s", e.text);
    run->training = true;
    if (!open_data(run, &e)) die("%s", e.text);
    run->c = config_of(&run->o);
    if (!place_stages(run, &e) || !allocate_run(run, &e)) die("%s", e.text);
    for (size_t i = 0; i < run->model.size; i++) assert(isfinite((double)run->model.params[i]));
    machine_load(run);
}

// --- the plain loop, which knows nothing of stages

typedef struct { Run run; double loss[STEPS], norm[STEPS]; real* first_grads; } Plain;

static void plain_open(Plain* p, const char* options) {
    static Loopback* alone;
    Run* run = &p->run;
    Model* m = &run->model;
    Error e;
    if (!alone) alone = loopback_open(1, 0);
    open_rank(run, loopback_rank(alone, 0), options);
    p->first_grads = (real*)allocate(m->size, sizeof(real));
    for (int s = 0; s < STEPS; s++) {
        int M = (int)run->o.micro_batches;
        zero_gradients(m);
        p->loss[s] = 0;
        for (int micro = 0; micro < M; micro++) {
            if (!training_batch(run, micro, &e)) die("%s", e.text);
            p->loss[s] +=
                forward_backward(m, &run->acts, run->tokens, run->targets, (int)run->o.batch, run->c.T, M);
        }
        p->loss[s] /= M;
        add_head_gradient(m);
        if (s == 0) memcpy(p->first_grads, m->grads, sizeof(real) * m->size);
        p->norm[s] = gradient_norm(m);
        adamw(m, &run->o, learning_rate(&run->o, run->step), p->norm[s], run->step + 1);
        run->step++;
    }
}

static void plain_close(Plain* p) {
    free(p->first_grads);
    close_run(&p->run);
}

// --- the same by ranks

typedef struct {
    Run run;
    Transport* transport;
    const char* options;
    const Plain* plain;
    bool exact;                 // else only the first step's gradients are compared
    double error; // 0 or 1; or of gradients, relative to the largest of their tensor, and of the loss
} Rank;

static bool differs(const real* a, const real* b, size_t count) {
    return memcmp(a, b, sizeof(real) * count) != 0;
}

// What this rank updates of a tensor: against the plain loop's numbers after STEPS
static bool piece_differs(const Rank* r, int tensor) {
    const Model *m = &r->run.model, *plain = &r->plain->run.model;
    const Tensor *t = &m->tensors[tensor], *p = &plain->tensors[tensor];
    return differs(m->params + t->first, plain->params + p->first, tensor_size(t)) ||
           differs(m->grads + t->first + t->piece, plain->grads + p->first + t->piece, t->piece_size) ||
           differs(m->adam_m + t->moments, plain->adam_m + p->moments + t->piece, t->piece_size) ||
           differs(m->adam_v + t->moments, plain->adam_v + p->moments + t->piece, t->piece_size);
}

static double piece_error(const Rank* r, int tensor) {
    const Model *m = &r->run.model, *plain = &r->plain->run.model;
    const Tensor *t = &m->tensors[tensor], *p = &plain->tensors[tensor];
    double worst = 0, largest = 0;
    for (size_t i = 0; i < tensor_size(t); i++)
        largest = fmax(largest, fabs((double)r->plain->first_grads[p->first + i]));
    for (size_t i = t->piece; i < t->piece + t->piece_size; i++) {
        double difference =
            fabs((double)m->grads[t->first + i] - (double)r->plain->first_grads[p->first + i]);
        worst = !(difference <= worst) ? difference : worst;
    }
    return worst == 0 ? 0 : worst / largest;
}

static void* work_as_rank(void* context) {
    Rank* r = (Rank*)context;
    Run* run = &r->run;
    StepReport report;
    Error e;
    set_threads(1);
    open_rank(run, r->transport, r->options);
    for (int s = 0; s < (r->exact ? STEPS : 1); s++) {
        if (!accumulate_gradients(run, &report, &e)) die("%s", e.text);
        if (r->exact && (report.loss != r->plain->loss[s] || report.norm != r->plain->norm[s])) r->error = 1;
        if (!r->exact) r->error = fabs(report.loss / r->plain->loss[s] - 1);
        if (r->exact) finish_step(run, &report);
    }
    for (int i = 0; i < run->model.tensor_count; i++) {
        if (!run->model.tensors[i].here) continue;
        double error = r->exact ? piece_differs(r, i) : piece_error(r, i);
        r->error = !(error <= r->error) ? error : r->error;
    }
    close_run(run);
    return NULL;
}

// The largest error of `size` ranks that train with these options beside the plain loop's run
static double ranks_error(const Plain* plain, int size, uint64_t seed, bool exact, const char* options) {
    enum { MOST = 16 };
    Loopback* loopback = loopback_open(size, seed);
    Rank* ranks = (Rank*)allocate((size_t)size, sizeof(Rank));
    pthread_t ids[MOST];
    double worst = 0;
    assert(size <= MOST);
    for (int r = 0; r < size; r++) {
        ranks[r].transport = loopback_rank(loopback, r);
        ranks[r].options = options;
        ranks[r].plain = plain;
        ranks[r].exact = exact;
        if (pthread_create(&ids[r], NULL, work_as_rank, &ranks[r])) die("found no room for threads");
    }
    for (int r = 0; r < size; r++) {
        pthread_join(ids[r], NULL);
        worst = !(ranks[r].error <= worst) ? ranks[r].error : worst;
    }
    free(ranks);
    loopback_close(loopback);
    return worst;
}

// ------------------------------------------------------------------------------------------------

static const char* const modes[] = {"--residual none", "--residual plain", "--residual hc", "--residual mhc",
                                    "--residual ihc"};

// Losses, norms, gradients, parameters and moments, after every step, to the bit: P ranks and a mode at a
// time
static void test_grid(int P, const char* mode) {
    const int micros[] = {1, 2, 3, 5, 2 * P, 2 * P + 3};
    int same = 0, runs = 0;
    for (int i = 0; i < 6; i++) {
        static Plain plain;
        char options[256];
        snprintf(options, sizeof options, "%s --micro-batches %d", mode, micros[i]);
        plain_open(&plain, options);
        for (int kind = 0; kind < 2; kind++)
            for (int recompute = 0; recompute < 2; recompute++) {
                snprintf(options, sizeof options,
                         "%s --micro-batches %d --pipeline %s --ranks %d --recompute %d", mode, micros[i],
                         kind ? "1f1b" : "dualpipev", P, recompute);
                runs++;
                if (ranks_error(&plain, P, 0, true, options) == 0) same++;
                else printf("     differs: %s\n", options);
            }
        plain_close(&plain);
    }
    check(same == runs, "%s, %d ranks: %d runs, each its bits", mode, P, runs);
}

// Stages of any size, none among them; blocks of recomputation that do not divide a stage; deferred gradients
static void test_uneven_stages(void) {
    static const char* const cuts[] = {"--pipeline dualpipev --ranks 2 --pp-layers 0,3,0,0",
                                       "--pipeline dualpipev --ranks 2 --pp-layers 1,0,0,2",
                                       "--pipeline dualpipev --ranks 2 --pp-layers 0,0,0,3",
                                       "--pipeline 1f1b --ranks 3 --pp-layers 0,3,0",
                                       "--pipeline 1f1b --ranks 2 --pp-layers 3,0",
                                       "--pipeline dualpipev --ranks 1 --pp-layers 2,1",
                                       "--pipeline dualpipev --ranks 2 --recompute 3 --pp-layers 0,2,1,0",
                                       "--pipeline 1f1b --ranks 2 --recompute auto --pp-layers 1,2"};
    static Plain plain;
    plain_open(&plain, "--residual mhc --micro-batches 5");
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        char options[256];
        snprintf(options, sizeof options, "--residual mhc --micro-batches 5 %s", cuts[i]);
        check(ranks_error(&plain,
                          strstr(cuts[i], "ranks 3")   ? 3
                          : strstr(cuts[i], "ranks 1") ? 1
                                                       : 2,
                          0, true, options) == 0,
              "%s", cuts[i]);
    }
    plain_close(&plain);
}

// Messages that are late and overtake one another change nothing.
static void test_delays(int seeds) {
    static Plain plain;
    int same = 0;
    plain_open(&plain, "--micro-batches 5");
    for (int seed = 1; seed <= seeds; seed++)
        same += ranks_error(&plain, 3, (uint64_t)seed, true,
                            seed % 2 ? "--micro-batches 5 --pipeline dualpipev --ranks 3"
                                     : "--micro-batches 5 --pipeline 1f1b --ranks 3") == 0;
    check(same == seeds, "messages delayed and reordered under %d seeds: %d have the same bits", seeds, same);
    plain_close(&plain);
}

// Where several ranks hold a tensor its gradient is a sum of sums: the order of additions differs, nothing
// else. fp32 rounds each of about 2 M additions to 2^-24 of a partial sum, which is at most the largest
// number: 1e-6.
static void test_sums(void) {
    static const struct { int size; const char *options, *plain; } cases[] = {
        {2, "--pipeline dualpipe --ranks 2 --micro-batches 6", "--micro-batches 6"},
        {4, "--pipeline dualpipe --ranks 4 --micro-batches 7", "--micro-batches 7"},
        {4, "--pipeline dualpipe --ranks 4 --micro-batches 1", "--micro-batches 1"},
        {4, "--pipeline dualpipev --ranks 2 --micro-batches 3", "--micro-batches 6"},
        {4, "--pipeline 1f1b --ranks 2 --micro-batches 3", "--micro-batches 6"},
        {8, "--pipeline dualpipe --ranks 4 --micro-batches 3", "--micro-batches 6"},
        {3, "--micro-batches 2", "--micro-batches 6"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int mode = 0; mode < 5; mode++) {
            static Plain plain;
            char ours[256], whole[256];
            snprintf(ours, sizeof ours, "%s %s", modes[mode], cases[i].options);
            snprintf(whole, sizeof whole, "%s %s", modes[mode], cases[i].plain);
            plain_open(&plain, whole);
            double error = ranks_error(&plain, cases[i].size, 0, false, ours);
            check(error <= 1e-6, "%s on %d ranks: gradients and loss differ by %.1e", ours, cases[i].size,
                  error);
            plain_close(&plain);
        }
}

int main(void) {
    set_threads(1);
    write_text();
    for (int P = 1; P <= 8; P++)
        for (int mode = 0; mode < 5; mode++) test_grid(P, modes[mode]);
    test_uneven_stages();
    test_sums();
    test_delays(1000);
    unlink(text_path);
    return check_summary();
}
