// planner.h: what a pipeline would do on a machine that need not be here, in time, memory and messages;
// and which stage gets how many blocks. Work is counted in FLOP, the schedule is simulated.

#ifndef HOST_PLANNER_H
#define HOST_PLANNER_H

#include "schedule.h"

typedef struct {
    int kind, P, M, D;          // enum Pipeline, ranks of a pipeline, micro-batches, replicas
    int L, C, n, heads, T, V, B;                // n = 1: the plain residual
    int bytes;                  // of a value that is kept or sent: 4; or 2, with fp32 masters of weights
    int experts, routed, shared, ffn, dense;    // 0 experts: GPT-2's MLP; width of one; leading dense blocks
    double link_gbs;            // GB/s of a link, each way; 0: messages take no time
    double tflops, efficiency;  // of a rank, and the part of it that is reached
    double pair;                // as in ScheduleCosts
    const int* layers;          // (stages) blocks of each; NULL: the planner chooses
} PlannerInput;

enum { PLANNER_ACTIONS = 1 << 16, PLANNER_RANKS = 64 };     // of longer steps, a smaller one is simulated
enum { PLANNER_SEARCH = 1 << 20 };      // simulated in search of the blocks of each stage
enum { MLA_LATENT = 512, MLA_ROPE = 64, MLA_HEAD = 128 };

// ------------------------------------------------------------------------------------------------
// Models

typedef struct {                // a block
    double parameters, met;     // in all; of matrices that a token meets, the connections' apart
    double projection;          // the connections'
    double attention, mix;      // FLOP a token forward: scores and sums; the streams' read, mix and write
    double kept;                // values a token leaves for the backward pass, beside the streams
} PlannerBlock;

// The paper's (mHC, Table 5): multi-head latent attention; experts, after one dense block as wide as those a
// token meets; embedding and head apart. False for another name.
static inline bool planner_preset(const char* name, PlannerInput* in) {
    static const struct { const char* name; int L, C, heads, experts, ffn; } presets[] = {
        {"paper-3b", 12, 1280, 16, 64, 896}, {"paper-9b", 18, 1920, 24, 64, 1280},
        {"paper-27b", 30, 2560, 32, 72, 1536}};
    for (int k = 0; k < 3; k++) {
        if (strcmp(presets[k].name, name)) continue;
        in->L = presets[k].L, in->C = presets[k].C, in->heads = presets[k].heads;
        in->n = 4, in->T = 4096, in->V = 129280;
        in->experts = presets[k].experts, in->ffn = presets[k].ffn;
        in->routed = 6, in->shared = 2, in->dense = 1;
        return true;
    }
    return false;
}

static inline PlannerBlock planner_block(const PlannerInput* in, bool dense) {
    double C = in->C, n = in->n, maps = n > 1 ? n * n + 2 * n : 0, heads = in->heads;
    PlannerBlock b = {0, 0, 0, 0, 0, 0};
    b.projection = 2 * maps * n * C;
    b.mix = 4 * maps * C;
    b.parameters = b.projection + (maps > 0 ? 2 * (maps + 3) : 0);
    b.kept = 6 * C + 4 * maps;              // read, normalised and given by both sublayers; coefficients
    if (!in->experts) {
        b.met = 12 * C * C;
        b.parameters += b.met + 13 * C;
        b.attention = 4.0 * in->T * C;
        b.kept += 12 * C + heads;           // qkv, sum, both sides of GELU; log-sums
        return b;
    }
    double query = heads * (MLA_HEAD + MLA_ROPE), value = heads * MLA_HEAD, latent = MLA_LATENT + MLA_ROPE;
    double met = in->routed + in->shared, expert = 3 * C * in->ffn, router = dense ? 0 : C * in->experts;
    double attention = C * (query + latent + value) + MLA_LATENT * 2 * value;
    b.met = attention + router + expert * met;
    b.parameters += attention + router + 2 * C + MLA_LATENT;        // and the norms
    b.parameters += expert * (dense ? met : in->experts + in->shared);
    b.attention = 2.0 * in->T * (query + value);
    b.kept += 2 * query + latent + 2 * value + heads + 3 * in->ffn * met;
    return b;
}

static inline double planner_head(const PlannerInput* in) { return (double)in->V * in->C; }
static inline double planner_embedding(const PlannerInput* in) {
    return planner_head(in) + (in->experts ? 0 : (double)in->T * in->C);
}

// In all; or those that a token meets: no embedding apart from the head, no expert it is not sent to.
static inline double planner_parameters(const PlannerInput* in, bool met) {
    double sum = planner_embedding(in) + 2.0 * in->C + (in->experts && !met ? planner_head(in) : 0);
    for (int l = 0; l < in->L; l++) {
        PlannerBlock b = planner_block(in, l < in->dense);
        sum += in->experts && met ? b.met + b.projection : b.parameters;
    }
    return sum;
}

// ------------------------------------------------------------------------------------------------
// Time of a step

typedef struct {
    PlannerInput in;
    Schedule s, simulated;      // the second is smaller, of even stages, where the first is too long
    int stages, *layers;        // (stages)
    ActionList* lists;          // (P) of `simulated`
    StageCost* stage;           // (stages) seconds
    double *work, *busy;        // (P) seconds of a step: added up, simulated
    double most_work;           // of a rank
} Planner;

// Costs and work of the split in p->layers. The head's W goes with its I, for there is one buffer of logits;
// connections have no W; under a pipeline a stage makes its streams anew, from the first and outputs of F.
static inline void planner_costs(Planner* p) {
    const PlannerInput* in = &p->in;
    double seconds = (double)in->B * in->T / (in->tflops * 1e12 * in->efficiency);     // of 1 FLOP a token
    double write = in->n > 1 && in->kind != PIPELINE_NONE ? 2.0 * (in->n + 1) * in->n * in->C : 0;
    PlannerBlock b = planner_block(in, false);
    memset(p->work, 0, (size_t)in->P * sizeof(double));
    p->most_work = 0;
    for (int k = 0; k < p->stages; k++) {
        double l = seconds * p->layers[k], head = k == p->stages - 1 ? seconds * planner_head(in) : 0;
        StageCost* c = &p->stage[k];
        c->F = l * (2 * (b.met + b.projection) + b.attention + b.mix) + 2 * head;
        c->I = l * (2 * (b.met + 2 * b.projection) + 2 * (b.attention + b.mix)) + 4 * head;
        c->W = l * 2 * b.met;
        c->R = l > 0 ? (2 * l - seconds) * write : 0;
        for (int direction = 0; direction < 2; direction++) {
            double* work = &p->work[schedule_rank_of(&p->s, k, direction)];
            *work += schedule_micros(&p->s, direction) * (c->F + c->R + c->I + c->W);
            p->most_work = fmax(p->most_work, *work);
        }
    }
}

// Seconds that a message `width` streams wide takes.
static inline double planner_message(const PlannerInput* in, int width, double link_gbs) {
    return link_gbs > 0 ? (double)width * in->B * in->T * in->C * in->bytes / (link_gbs * 1e9) : 0;
}

static inline bool planner_exact(const Planner* p) {
    return p->simulated.P == p->s.P && p->simulated.M == p->s.M;
}

// The smaller step of even stages, made larger, and what the slowest rank has to do beyond the mean.
static inline double planner_estimate(const Planner* p, double message) {
    StageCost even[2 * PLANNER_RANKS];
    double busy[PLANNER_RANKS], work = 0, part = 1.0 / p->stages;
    int stages = schedule_stages(&p->simulated);
    memset(even, 0, sizeof even);
    for (int k = 0; k < p->stages; k++) {
        even[0].F += part * p->stage[k].F, even[0].R += part * p->stage[k].R;
        even[0].I += part * p->stage[k].I, even[0].W += part * p->stage[k].W;
    }
    for (int k = 1; k < stages; k++) even[k] = even[0];
    for (int rank = 0; rank < p->s.P; rank++) work += p->work[rank] / p->s.P;
    ScheduleCosts costs = {even, p->in.pair, message};
    double span = schedule_simulate(&p->simulated, p->lists, &costs, busy);
    return span * p->s.M / p->simulated.M + p->most_work - work;
}

// Seconds of a step; fills p->busy.
static inline double planner_span(Planner* p, double message) {
    ScheduleCosts costs = {p->stage, p->in.pair, message};
    if (planner_exact(p)) return schedule_simulate(&p->s, p->lists, &costs, p->busy);
    memcpy(p->busy, p->work, (size_t)p->s.P * sizeof(double));
    return planner_estimate(p, message);
}

// The part of that time in which ranks work.
static inline double planner_part(const Planner* p, double span) {
    double busy = 0;
    for (int rank = 0; rank < p->s.P; rank++) busy += p->busy[rank];
    return fmin(1, busy / (p->s.P * span));
}

// ------------------------------------------------------------------------------------------------
// Blocks of each stage

// From even stages on, moves a block between two of them as long as that makes the step shorter.
static inline void planner_choose(Planner* p) {
    int L = p->in.L, S = p->stages;
    for (int k = 0; k < S; k++) p->layers[k] = (int)((long)L * (k + 1) / S - (long)L * k / S);
    planner_costs(p);
    double message = planner_message(&p->in, p->in.n, p->in.link_gbs), cost = 4.0 * p->s.P * p->s.M;
    double best = planner_span(p, message), before = INFINITY;
    for (double left = PLANNER_SEARCH; best < before && planner_exact(p);) {
        int from = 0, to = 0;
        before = best;
        for (int move = 0; move < S * S && left > cost; move++) {
            int a = move / S, b = move % S;
            if (a == b || !p->layers[a]) continue;
            p->layers[a]--, p->layers[b]++;
            planner_costs(p);
            double span = p->most_work < best ? left -= cost, planner_span(p, message) : INFINITY;
            if (span < best * (1 - 1e-9)) best = span, from = a, to = b;
            p->layers[a]++, p->layers[b]--;
        }
        p->layers[from]--, p->layers[to]++;
    }
}

static inline Planner planner_open(const PlannerInput* in) {
    Schedule s = {in->kind, in->P, in->M};
    Planner p = {*in, s, s, 0, NULL, NULL, NULL, NULL, NULL, 0};
    size_t stages = (size_t)schedule_stages(&p.s);
    p.stages = (int)stages;
    p.layers = (int*)allocate(stages, sizeof(int));
    p.stage = (StageCost*)allocate(stages, sizeof(StageCost));
    p.work = (double*)allocate(2 * (size_t)in->P, sizeof(double));
    p.busy = p.work + in->P;
    if (4.0 * in->P * in->M > PLANNER_ACTIONS) {
        int P = in->P < PLANNER_RANKS ? in->P : PLANNER_RANKS, most = PLANNER_ACTIONS / (4 * P);
        double M = fmax(1, (double)in->M * P / in->P);
        p.simulated.P = P;
        p.simulated.M = M < most ? (int)M : most;
    }
    p.lists = (ActionList*)allocate((size_t)p.simulated.P, sizeof(ActionList));
    for (int rank = 0; rank < p.simulated.P; rank++)
        p.lists[rank] = schedule_actions(&p.simulated, rank, false);
    if (in->layers) memcpy(p.layers, in->layers, stages * sizeof(int));
    else planner_choose(&p);
    planner_costs(&p);
    return p;
}

static inline void planner_close(Planner* p) {
    for (int rank = 0; rank < p->simulated.P; rank++) free(p->lists[rank].at);
    free(p->lists);
    free(p->layers);
    free(p->stage);
    free(p->work);
}

// The default of --pp-layers, layers (stages); the same on every rank that asks.
static inline void planner_layers(const PlannerInput* in, int* layers) {
    Planner p = planner_open(in);
    memcpy(layers, p.layers, (size_t)p.stages * sizeof(int));
    planner_close(&p);
}

// GB/s from which on a step is at most 1 % longer than with messages that take no time.
static inline double planner_link_needed(Planner* p) {
    double low = -20, high = 30, limit = 1.01 * planner_span(p, 0);     // powers of two
    for (int i = 0; i < 16; i++) {
        double middle = (low + high) / 2;
        if (planner_span(p, planner_message(&p->in, p->in.n, exp2(middle))) <= limit) high = middle;
        else low = middle;
    }
    return exp2(high);
}

// ------------------------------------------------------------------------------------------------
// Memory of a rank, in bytes

typedef struct { double parameters, state, kept, buffers; int blocks; } PlannerMemory;

// Adds one of the rank's stages.
static inline void planner_add_stage(PlannerMemory* m, const Planner* p, int rank, int k) {
    const PlannerInput* in = &p->in;
    int first = 0, blocks = p->layers[k], kind = p->s.kind, N = schedule_micros(&p->s, 0);
    int slots = p->stages - k < N ? p->stages - k : N, states = kind == PIPELINE_NONE ? 2 * blocks : 1;
    int direction = schedule_rank_of(&p->s, k, 0) != rank;
    bool below = k > 0 && schedule_rank_of(&p->s, k - 1, direction) != rank;    // messages come and go
    bool above = k < p->stages - 1 && schedule_rank_of(&p->s, k + 1, direction) != rank;
    double rows = (double)in->B * in->T * in->bytes, stream = rows * in->n * in->C;
    for (int j = 0; j < k; j++) first += p->layers[j];
    for (int l = first; l < first + blocks; l++)
        m->parameters += planner_block(in, l < in->dense).parameters;
    if (k == 0) m->parameters += planner_embedding(in);
    if (k == p->stages - 1) {
        m->parameters += 2.0 * in->C + (in->experts || kind == PIPELINE_1F1B ? planner_head(in) : 0);
        m->state += in->experts ? 0 : 4 * planner_head(in);     // the embedding's too: two sums of gradients
        m->buffers += rows * in->V;                             // logits
    }
    m->kept += slots * (states * stream + blocks * planner_block(in, false).kept * rows);
    m->buffers += ((below + above) * (SENDS_LEAVING + RECEIVES_AHEAD) + above + 2 * blocks) * stream;
    m->blocks += blocks;
}

// State: weights, gradients, moments, which replicas share out. Buffers: messages, logits, streams at work.
static inline PlannerMemory planner_memory(const Planner* p, int rank) {
    const PlannerInput* in = &p->in;
    PlannerMemory m = {0, 0, 0, 0, 0};
    bool two = p->s.kind == PIPELINE_DUALPIPE;
    planner_add_stage(&m, p, rank, rank);
    if (two || p->s.kind == PIPELINE_DUALPIPEV) planner_add_stage(&m, p, rank, p->stages - 1 - rank);
    m.state += m.parameters * (8 + (in->bytes == 2 ? 2 : 0) + 8.0 / (in->D * (two ? 2 : 1)));
    m.buffers += (double)in->n * in->C * in->B * in->T * in->bytes;
    return m;
}

// ------------------------------------------------------------------------------------------------
// The page

static inline void planner_print_ranks(FILE* out, const Planner* p, double span) {
    fprintf(out, "  rank  blocks  parameters    busy   state GiB    kept GiB  buffers GiB   all GiB\n");
    for (int rank = 0; rank < p->s.P; rank++) {
        if (rank == 16 && p->s.P > 20) {
            fprintf(out, "   ...\n");
            rank = p->s.P - 4;
        }
        PlannerMemory m = planner_memory(p, rank);
        fprintf(out, "  %4d %7d %9.1f M %6.1f%% %11.3f %11.3f %12.3f %9.3f\n", rank, m.blocks,
                m.parameters / 1e6, 100 * p->busy[rank] / span, m.state / 0x1p30, m.kept / 0x1p30,
                m.buffers / 0x1p30, (m.state + m.kept + m.buffers) / 0x1p30);
    }
}

// The part of the time in which ranks work, and the fullest rank: every schedule, narrow and wide messages.
static inline void planner_print_links(FILE* out, const PlannerInput* in) {
    static const char* const names[] = {"none", "1f1b", "dualpipev", "dualpipe"};
    fprintf(out, "time at work by GB/s of a link and streams in a message, same model and ranks\n%20s", "");
    for (int i = 3; i >= -3; i--) fprintf(out, " %8.4g", in->link_gbs * exp2(i));
    fprintf(out, "  fullest rank\n");
    for (int kind = PIPELINE_1F1B; kind <= PIPELINE_DUALPIPE; kind++) {
        PlannerInput other = *in;
        Schedule s = {kind, in->P, in->M};
        Error e;
        double most = 0;
        if (!schedule_fits(&s, &e)) continue;
        other.kind = kind;
        other.layers = kind == in->kind ? in->layers : NULL;
        Planner p = planner_open(&other);
        for (int rank = 0; rank < in->P; rank++) {
            PlannerMemory m = planner_memory(&p, rank);
            most = fmax(most, m.state + m.kept + m.buffers);
        }
        for (int width = 1; width <= in->n; width += in->n > 1 ? in->n - 1 : 1) {
            fprintf(out, "  %-9s %d stream%s", names[kind], width, width > 1 ? "s" : " ");
            for (int i = 3; i >= -3; i--) {
                double span = planner_span(&p, planner_message(in, width, in->link_gbs * exp2(i)));
                fprintf(out, " %7.1f%%", 100 * planner_part(&p, span));
            }
            fprintf(out, width == in->n ? " %9.2f GiB\n" : "\n", most / 0x1p30);
        }
        planner_close(&p);
    }
}

static inline void planner_print(FILE* out, const PlannerInput* in) {
    Planner p = planner_open(in);
    double at_best = planner_part(&p, planner_span(&p, 0)), tokens = (double)in->D * in->M * in->B * in->T;
    double message = planner_message(in, in->n, in->link_gbs), span = planner_span(&p, message);
    fprintf(out, "model: %.4g parameters, a token meets %.4g; %d blocks, width %d, %d streams\n",
            planner_parameters(in, false), planner_parameters(in, true), in->L, in->C, in->n);
    fprintf(out, "machine: %d x %d ranks of %g TFLOP/s at %g %%, links of %g GB/s each way\n", in->P, in->D,
            in->tflops, 100 * in->efficiency, in->link_gbs);
    fprintf(out, "step: %d micro-batches of %d x %d tokens, %.4g s, %.4g tokens/s in all%s\n", in->M, in->B,
            in->T, span, tokens / span, planner_exact(&p) ? "" : " (estimated from a smaller one)");
    fprintf(out, "bubble: %.2f %%; %.2f %% if messages took no time\n", 100 - 100 * planner_part(&p, span),
            100 - 100 * at_best);
    fprintf(out, "blocks of the stages: ");
    for (int k = 0; k < p.stages && k < 64; k++) fprintf(out, "%s%d", k ? "," : "", p.layers[k]);
    fprintf(out, "%s\n", p.stages > 64 ? ",..." : "");
    planner_print_ranks(out, &p, span);
    if (in->P > 1) {
        fprintf(out, "boundary: %.4g MB, %.4g ms a message; costs at most 1 %% from %.3g GB/s on\n",
                1e3 * planner_message(in, in->n, 1), 1e3 * message, planner_link_needed(&p));
        if (in->link_gbs > 0) planner_print_links(out, in);
    }
    planner_close(&p);
}

#endif
