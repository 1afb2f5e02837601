// schedule.h: what each rank of a pipeline does, in which order, and what it takes in time.
//
// The model is cut into stages, a step into micro-batches. A rank holds one or two stages and runs a list of
// actions; the executor knows nothing of schedules. F forward, I gradient of the input, W gradient of the
// weights, B both. The steps of DualPipe and DualPipeV are DeepSeek's (MIT), folded: H ranks, 2H stages,
// h = 0 the near end, h = H-1 the turning rank; phase 0 comes from the near side. N micro-batches each.

#ifndef HOST_SCHEDULE_H
#define HOST_SCHEDULE_H

#include "options.h"

// Sends that may be under way, of a stage and kind, and receives posted beyond what is in use. With 2 sends
// a link no schedule deadlocks, although long messages end only when they are received; with 1 some do.
enum { SENDS_LEAVING = 2, RECEIVES_AHEAD = 1 };

typedef enum {
    ACTION_F, ACTION_B, ACTION_I, ACTION_W,
    // only in schedule_program: x into a stage and out of it, dx into it and out of it
    MESSAGE_RECEIVE_X, MESSAGE_SEND_X, MESSAGE_RECEIVE_DX, MESSAGE_SEND_DX
} ActionKind;

typedef struct {
    uint8_t kind, direction;    // an ActionKind; 1: the second direction of dualpipe
    bool paired;                // with the next action: interleaved, before or after it
    uint16_t stage;             // in model order
    uint32_t micro;             // micro-batch, counted from 0 in each direction
} Action;

typedef struct { Action* at; int count; } ActionList;
typedef struct { int kind, P, M; } Schedule;    // enum Pipeline, ranks, micro-batches

// ------------------------------------------------------------------------------------------------
// Who holds what

enum { MAX_RANKS = 32767 };     // 2P stages are numbered in 16 bits

static inline bool schedule_fits(const Schedule* s, Error* e) {
    if (s->P < 1 || s->P > MAX_RANKS)
        return fail(e, "--ranks: found %d, expected 1 to %d, change --ranks", s->P, MAX_RANKS);
    if (s->M < 1) return fail(e, "--micro-batches: found %d, expected at least 1, change it", s->M);
    if (s->kind == PIPELINE_NONE && s->P != 1)
        return fail(e, "--ranks: found %d, expected 1 without a pipeline, add --pipeline dualpipev", s->P);
    if (s->kind == PIPELINE_DUALPIPE && s->P % 2)
        return fail(e, "--ranks: found %d, expected an even number, change it or take dualpipev", s->P);
    return true;
}

static inline int schedule_stages(const Schedule* s) {
    return s->kind == PIPELINE_DUALPIPEV ? 2 * s->P : s->P;
}

static inline int schedule_rank_of(const Schedule* s, int stage, int direction) {
    if (s->kind == PIPELINE_DUALPIPEV) return stage < s->P ? stage : 2 * s->P - 1 - stage;
    return direction ? s->P - 1 - stage : stage;
}

// Micro-batches of a direction: with two, the first has the odd one.
static inline int schedule_micros(const Schedule* s, int direction) {
    if (s->kind == PIPELINE_DUALPIPE) return (s->M + !direction) / 2;
    return direction ? 0 : s->M;
}

// Its number among all M of the step.
static inline int schedule_global_micro(const Schedule* s, int direction, int micro) {
    return direction ? schedule_micros(s, 0) + micro : micro;
}

// ------------------------------------------------------------------------------------------------
// Action lists, generated for 2H micro-batches or more; what is of others than the M there are is dropped

typedef struct {
    const Schedule* s;
    int rank, direction[2], stage[2];   // of each phase
    bool forward_only, messages;
    int next[2][8];                     // per phase and kind: whose turn it is; I counts as B
    Action* deferred;                   // I's whose W is still to come: a queue
    int first_deferred, deferred_count;
    ActionList list;
} Generator;

static inline bool schedule_is_message(int kind) { return kind >= MESSAGE_RECEIVE_X; }

// No such micro-batch, not asked for, or a message that concerns no other rank.
static inline bool schedule_drops(const Generator* g, const Action* a) {
    int kind = a->kind, there = a->stage, S = schedule_stages(g->s);
    bool forward = kind == ACTION_F || kind == MESSAGE_RECEIVE_X || kind == MESSAGE_SEND_X;
    if ((int)a->micro >= schedule_micros(g->s, a->direction) || (g->forward_only && !forward)) return true;
    if (!schedule_is_message(kind)) return false;
    there += kind == MESSAGE_SEND_X || kind == MESSAGE_RECEIVE_DX ? 1 : -1;
    return !g->messages || there < 0 || there >= S || schedule_rank_of(g->s, there, a->direction) == g->rank;
}

static inline bool schedule_append(Generator* g, Action a) {
    bool keep = !schedule_drops(g, &a);
    if (keep) g->list.at[g->list.count++] = a;
    return keep;
}

// The next micro-batch of the phase; false if it is dropped.
static inline bool schedule_next(Generator* g, int kind, int phase) {
    int* micro = &g->next[phase][kind == ACTION_I ? (int)ACTION_B : kind];
    Action a = {(uint8_t)kind, (uint8_t)g->direction[phase], false, (uint16_t)g->stage[phase],
                (uint32_t)(*micro)++};
    if (kind == ACTION_I) g->deferred[g->deferred_count++] = a;
    return schedule_append(g, a);
}

// F, B or I, its input received before, its output sent after.
static inline void schedule_one(Generator* g, int kind, int phase) {
    schedule_next(g, kind == ACTION_F ? MESSAGE_RECEIVE_X : MESSAGE_RECEIVE_DX, phase);
    schedule_next(g, kind, phase);
    schedule_next(g, kind == ACTION_F ? MESSAGE_SEND_X : MESSAGE_SEND_DX, phase);
}

static inline void schedule_w(Generator* g) {
    Action a = g->deferred[g->first_deferred++];
    a.kind = ACTION_W;
    schedule_append(g, a);
}

// F of a phase and B of the other.
static inline void schedule_pair(Generator* g, int phase, bool x_received) {
    if (!x_received) schedule_next(g, MESSAGE_RECEIVE_X, phase);
    schedule_next(g, MESSAGE_RECEIVE_DX, !phase);
    bool has_f = schedule_next(g, ACTION_F, phase);
    if (schedule_next(g, ACTION_B, !phase) && has_f) g->list.at[g->list.count - 2].paired = true;
    schedule_next(g, MESSAGE_SEND_X, phase);
    schedule_next(g, MESSAGE_SEND_DX, !phase);
}

// Step 2. Phase 0 receives one F ahead and sends one F late: so the order on a link is one at both ends.
static inline void schedule_both(Generator* g, int h, bool mid) {
    bool v = g->s->kind == PIPELINE_DUALPIPEV;
    schedule_next(g, MESSAGE_RECEIVE_X, 0);
    for (int i = 0; i <= h; i++) {
        schedule_next(g, ACTION_F, 0);
        if (!v && mid) schedule_next(g, MESSAGE_SEND_X, 0);
        schedule_next(g, MESSAGE_RECEIVE_X, 0);
        schedule_next(g, MESSAGE_RECEIVE_X, 1);
        schedule_next(g, ACTION_F, 1);
        if (!mid || i < h) schedule_next(g, MESSAGE_SEND_X, 1);
        if (v || !mid) schedule_next(g, MESSAGE_SEND_X, 0);
    }
}

// The eight steps.
static inline void schedule_fold(Generator* g, int H, int h, int N) {
    int far = H - h - 1;
    for (int i = 0; i < 2 * far; i++) schedule_one(g, ACTION_F, 0);
    schedule_both(g, h, !far);
    for (int i = 0; i < far; i++) {
        schedule_one(g, ACTION_I, 1);
        schedule_next(g, MESSAGE_RECEIVE_X, 1);
        schedule_w(g);
        schedule_next(g, ACTION_F, 1);
        schedule_next(g, MESSAGE_SEND_X, 1);
    }
    for (int i = 0; i < N - 2 * H + h + 1; i++) {
        if (i > 0 || far) schedule_pair(g, 0, i == 0);
        else {                                  // on the turning rank the first two are no pair
            schedule_next(g, ACTION_F, 0);
            schedule_next(g, MESSAGE_SEND_X, 1);
            schedule_next(g, MESSAGE_RECEIVE_DX, 1);
            schedule_next(g, ACTION_B, 1);
            schedule_next(g, MESSAGE_SEND_X, 0);
            schedule_next(g, MESSAGE_SEND_DX, 1);
        }
        schedule_pair(g, 1, false);
    }
    for (int i = 0; i < far; i++) {
        schedule_one(g, ACTION_B, 1);
        schedule_pair(g, 1, false);
    }
    for (int i = 0; i < 2 * (h + 1); i++)       // phases 1, 0, 1, 0, ..; the later half without W
        schedule_one(g, i > h ? ACTION_I : ACTION_B, !(i % 2));
    for (int i = 0; i < far; i++) {
        schedule_w(g);
        schedule_one(g, ACTION_I, 0);
    }
    for (int i = 0; i <= h; i++) schedule_w(g);
}

// One F ahead for every rank behind this one, then backward and forward in turn.
static inline void schedule_1f1b(Generator* g) {
    int behind = g->s->P - 1 - g->rank, M = g->s->M;
    for (int m = 0; m < M + behind; m++) {
        if (m < M) schedule_one(g, ACTION_F, 0);
        if (m >= behind) schedule_one(g, ACTION_B, 0);
    }
}

static inline ActionList schedule_generate(const Schedule* s, int rank, bool forward_only, bool messages) {
    bool two = s->kind == PIPELINE_DUALPIPE, fold = two || s->kind == PIPELINE_DUALPIPEV;
    int H = two ? s->P / 2 : s->P, flip = two && rank >= H, h = flip ? s->P - 1 - rank : rank;
    int N = schedule_micros(s, 0), most = messages ? 14 : 6;    // F, I, W and 4 messages, in each phase
    Generator g = {s, rank, {flip, two && !flip}, {h, 2 * H - 1 - h}, forward_only, messages, {{0}},
                   (Action*)allocate(2 * (size_t)H, sizeof(Action)), 0, 0,
                   {(Action*)allocate((size_t)most * (size_t)N, sizeof(Action)), 0}};
    if (fold) schedule_fold(&g, H, h, N > 2 * H ? N : 2 * H);
    else schedule_1f1b(&g);
    free(g.deferred);
    return g.list;
}

// The caller frees .at.
static inline ActionList schedule_actions(const Schedule* s, int rank, bool forward_only) {
    return schedule_generate(s, rank, forward_only, false);
}

// The same with its messages, for transports without tags: those between two actions go as one batch, and
// their order on a link is the same at both ends.
static inline ActionList schedule_program(const Schedule* s, int rank, bool forward_only) {
    return schedule_generate(s, rank, forward_only, true);
}

// Most micro-batches of the stage that are alive at once, both directions together: from F to W or B.
static inline int schedule_slots(const ActionList* list, int stage) {
    int alive = 0, most = 0;
    for (int i = 0; i < list->count; i++) {
        const Action* a = &list->at[i];
        if (a->stage == stage) alive += (a->kind == ACTION_F) - (a->kind == ACTION_B || a->kind == ACTION_W);
        most = alive > most ? alive : most;
    }
    return most;
}

// A line a rank: F0.3&B3.1 is a pair, ' an action of the second direction.
static inline void schedule_print(FILE* out, const Schedule* s) {
    for (int rank = 0; rank < s->P; rank++) {
        ActionList list = schedule_actions(s, rank, false);
        fprintf(out, "rank %d:", rank);
        for (int i = 0; i < list.count; i++) {
            const Action* a = &list.at[i];
            fprintf(out, "%c%c%d.%u%s", i && a[-1].paired ? '&' : ' ', "FBIW"[a->kind], a->stage,
                    (unsigned)a->micro, a->direction ? "'" : "");
        }
        fputc('\n', out);
        free(list.at);
    }
}

// ------------------------------------------------------------------------------------------------
// Simulation, in any unit of time

typedef struct { double F, R, I, W; } StageCost;    // R: recompute before I, while dx is waited for

typedef struct {
    const StageCost* stage;     // (stages)
    double pair;                // of a pair over the sum of its halves; 0: each half on its own
    double message;             // for which a message occupies its link
} ScheduleCosts;

typedef struct {
    const Schedule* s;
    const ActionList* lists;    // (P)
    const ScheduleCosts* costs;
    double *x, *dx;             // (stages, M): when a stage's input, its output's gradient is there
    double *busy, *clock;       // (P)
    double* link;               // (P, down and up): when it is free again
    double* start;              // (2 * leaves): each rank's next start, before them a tree of minima
    int *at, *ahead, leaves;    // (P): place in the list; whether the second of the pair there is done
} Simulation;

// Where x or dx has what the action takes from or makes for that stage.
static inline size_t schedule_cell(const Simulation* sim, const Action* a, int stage) {
    int micro = schedule_global_micro(sim->s, a->direction, (int)a->micro);
    return (size_t)stage * (size_t)sim->s->M + (size_t)micro;
}

static inline double schedule_cost(const Simulation* sim, const Action* a) {
    const StageCost* c = &sim->costs->stage[a->stage];
    if (a->kind == ACTION_F) return c->F;
    return a->kind == ACTION_W ? c->W : c->R + c->I + (a->kind == ACTION_B ? c->W : 0);
}

// When it may start, as far as its input is concerned.
static inline double schedule_ready(const Simulation* sim, const Action* a) {
    if (a->kind == ACTION_W) return 0;
    if (a->kind == ACTION_F) return sim->x[schedule_cell(sim, a, a->stage)];
    return sim->dx[schedule_cell(sim, a, a->stage)] - sim->costs->stage[a->stage].R;
}

// The rank's next start, of *which: 0 the action at hand, 1 the one after it, 2 both as a pair.
static inline double schedule_start(const Simulation* sim, int rank, int* which) {
    const Action* a = sim->lists[rank].at + sim->at[rank];
    *which = 0;
    if (sim->at[rank] >= sim->lists[rank].count) return INFINITY;
    double clock = sim->clock[rank], first = schedule_ready(sim, a);
    if (!a->paired || sim->ahead[rank]) return fmax(clock, first);
    double second = schedule_ready(sim, a + 1);
    if (sim->costs->pair > 0) {                 // recompute goes on while x is waited for, too
        *which = 2;
        if (a->kind == ACTION_F) first -= sim->costs->stage[a[1].stage].R;
        else second -= sim->costs->stage[a->stage].R;
        return fmax(clock, fmax(first, second));
    }
    first = fmax(clock, first), second = fmax(clock, second);
    *which = second < first || (second == first && a->kind == ACTION_F);        // B first
    return fmin(first, second);
}

static inline void schedule_update(Simulation* sim, int rank) {
    int which, i = rank + sim->leaves;
    sim->start[i] = schedule_start(sim, rank, &which);
    for (i /= 2; i; i /= 2) sim->start[i] = fmin(sim->start[2 * i], sim->start[2 * i + 1]);
}

// At time t: hands the result over, to another rank by a link.
static inline void schedule_deliver(Simulation* sim, int rank, const Action* a, double t) {
    int there = a->stage + (a->kind == ACTION_F ? 1 : -1);
    if (a->kind == ACTION_W || there < 0) return;
    if (there == schedule_stages(sim->s)) {     // the loss
        sim->dx[schedule_cell(sim, a, a->stage)] = t;
        return;
    }
    int peer = schedule_rank_of(sim->s, there, a->direction);
    double* link = &sim->link[2 * rank + (peer > rank)];
    if (peer != rank) t = *link = fmax(*link, t) + sim->costs->message;
    (a->kind == ACTION_F ? sim->x : sim->dx)[schedule_cell(sim, a, there)] = t;
    schedule_update(sim, peer);
}

static inline void schedule_run(Simulation* sim, int rank) {
    int which;
    double start = schedule_start(sim, rank, &which);
    const Action* a = sim->lists[rank].at + sim->at[rank];
    double took = which == 2 ? sim->costs->pair * (schedule_cost(sim, a) + schedule_cost(sim, a + 1))
                             : schedule_cost(sim, a + which);
    sim->clock[rank] = start + took;
    sim->busy[rank] += took;
    if (which != 1) sim->at[rank] += 1 + (which == 2 || sim->ahead[rank]);
    sim->ahead[rank] = which == 1;
    if (which != 1) schedule_deliver(sim, rank, a, start + took);
    if (which != 0) schedule_deliver(sim, rank, a + 1, start + took);
    schedule_update(sim, rank);
}

// The length of a step, infinite if the lists wait for each other; busy (P): how much of it each rank works.
static inline double schedule_simulate(const Schedule* s, const ActionList* lists,
                                       const ScheduleCosts* costs, double* busy) {
    size_t P = (size_t)s->P, cells = (size_t)schedule_stages(s) * (size_t)s->M, leaves = 1;
    while (leaves < P) leaves *= 2;
    double *x = (double*)allocate(2 * cells + 3 * P + 2 * leaves, sizeof(double)), *clock = x + 2 * cells;
    double span = 0;
    int* at = (int*)allocate(2 * P, sizeof(int));
    Simulation sim = {s, lists, costs, x, x + cells, busy, clock, clock + P, clock + 3 * P, at, at + P,
                      (int)leaves};
    memset(busy, 0, P * sizeof(double));
    for (size_t c = (size_t)s->M; c < 2 * cells; c++) x[c] = INFINITY;      // the first stage has its input
    for (size_t i = 0; i < 2 * leaves; i++) sim.start[i] = INFINITY;
    for (int rank = 0; rank < s->P; rank++) schedule_update(&sim, rank);
    while (isfinite(sim.start[1])) {
        size_t i = 1;
        while (i < leaves) i = 2 * i + (sim.start[2 * i] > sim.start[i]);
        schedule_run(&sim, (int)(i - leaves));
    }
    for (int rank = 0; rank < s->P; rank++)
        span = sim.at[rank] < lists[rank].count ? INFINITY : fmax(span, sim.clock[rank]);
    free(x);
    free(at);
    return span;
}

#endif
