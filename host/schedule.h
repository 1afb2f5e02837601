// schedule.h: what each rank of a pipeline does, in which order: action lists, and what they cost in time.
//
// The model is cut into stages, a step into micro-batches. A rank holds one or two stages and runs its list
// from first to last; the executor knows nothing of schedules. F forward, I gradient of the input, W gradient
// of the weights, B both. The steps of DualPipe and DualPipeV are DeepSeek's (MIT), folded: H ranks from the
// near end (h = 0, where phase 0 begins) to the turning rank (h = H-1), 2H stages, N micro-batches a direction.

#ifndef HOST_SCHEDULE_H
#define HOST_SCHEDULE_H

#include <assert.h>
#include <math.h>

#include "options.h"

// Sends a rank may have under way on one link, and receives it posts beyond those of its current action. With
// one send a link it deadlocks, since long messages end only when they are received; with two never.
enum { SENDS_PER_LINK = 3, RECEIVES_AHEAD = 4 };

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

typedef struct {
    int kind;                   // enum Pipeline
    int P, M;                   // ranks, micro-batches
} Schedule;

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
        return fail(e, "--ranks: found %d, expected an even number for dualpipe, change it or take dualpipev",
                    s->P);
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
// Action lists, generated for 2H micro-batches or more; what belongs to others than the M there are is dropped

typedef struct {
    const Schedule* s;
    int rank, flip;             // phase p is direction p ^ flip
    int stage[2];               // of each phase
    int next[2][8];             // per phase and kind: the micro-batch whose turn it is; I counts as B
    bool forward_only, messages;
    Action* deferred;           // I's whose W is still to come: a queue
    int first_deferred, deferred_count;
    ActionList list;
    int capacity;
} Generator;

static inline int schedule_direction(const Generator* g, int phase) {
    return g->s->kind == PIPELINE_DUALPIPE ? phase ^ g->flip : 0;
}

static inline bool schedule_is_message(int kind) { return kind >= MESSAGE_RECEIVE_X; }

// Whether the list goes without it: no such micro-batch, not asked for, or no other rank is concerned.
static inline bool schedule_drops(const Generator* g, const Action* a) {
    int kind = a->kind, there = a->stage, S = schedule_stages(g->s);
    bool backward = kind != ACTION_F && kind != MESSAGE_RECEIVE_X && kind != MESSAGE_SEND_X;
    if ((int)a->micro >= schedule_micros(g->s, a->direction) || (backward && g->forward_only)) return true;
    if (!schedule_is_message(kind)) return false;
    there += kind == MESSAGE_SEND_X || kind == MESSAGE_RECEIVE_DX ? 1 : -1;
    return !g->messages || there < 0 || there >= S || schedule_rank_of(g->s, there, a->direction) == g->rank;
}

static inline Action* schedule_append(Generator* g, Action a) {
    if (schedule_drops(g, &a)) return NULL;
    if (g->list.count == g->capacity) {
        g->capacity = 2 * g->capacity + 64;
        g->list.at = (Action*)realloc(g->list.at, (size_t)g->capacity * sizeof(Action));
        if (!g->list.at) die("schedule: out of memory, reduce --ranks or --micro-batches");
    }
    g->list.at[g->list.count] = a;
    return &g->list.at[g->list.count++];
}

// The next micro-batch of the phase; NULL if it is dropped.
static inline Action* schedule_next(Generator* g, int kind, int phase) {
    int counter = kind == ACTION_I ? ACTION_B : kind;
    Action a = {(uint8_t)kind, (uint8_t)schedule_direction(g, phase), false, (uint16_t)g->stage[phase],
                (uint32_t)g->next[phase][counter]++};
    if (kind == ACTION_I) g->deferred[g->deferred_count++] = a;
    return schedule_append(g, a);
}

static inline void schedule_f(Generator* g, int phase) {
    schedule_next(g, MESSAGE_RECEIVE_X, phase);
    schedule_next(g, ACTION_F, phase);
    schedule_next(g, MESSAGE_SEND_X, phase);
}

static inline void schedule_backward(Generator* g, int kind, int phase) {
    schedule_next(g, MESSAGE_RECEIVE_DX, phase);
    schedule_next(g, kind, phase);
    schedule_next(g, MESSAGE_SEND_DX, phase);
}

static inline void schedule_w(Generator* g) {
    Action a = g->deferred[g->first_deferred++];
    a.kind = ACTION_W;
    schedule_append(g, a);
}

// F of phase p and B of the other, their inputs received before and their outputs sent after both.
static inline void schedule_pair(Generator* g, int p, bool x_received) {
    if (!x_received) schedule_next(g, MESSAGE_RECEIVE_X, p);
    schedule_next(g, MESSAGE_RECEIVE_DX, !p);
    bool has_f = schedule_next(g, ACTION_F, p) != NULL;
    if (schedule_next(g, ACTION_B, !p) && has_f) g->list.at[g->list.count - 2].paired = true;
    schedule_next(g, MESSAGE_SEND_X, p);
    schedule_next(g, MESSAGE_SEND_DX, !p);
}

// Step 2. The x of phase 0 is received one F ahead and sent one F late: so the order of messages on a link is
// the same at both ends, which matters to transports without tags. `mid`: the turning rank.
static inline void schedule_fill_both(Generator* g, int h, bool mid) {
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

// Step 4 begins on the turning rank with two that are no pair.
static inline void schedule_turn(Generator* g) {
    schedule_next(g, ACTION_F, 0);
    schedule_next(g, MESSAGE_SEND_X, 1);
    schedule_next(g, MESSAGE_RECEIVE_DX, 1);
    schedule_next(g, ACTION_B, 1);
    schedule_next(g, MESSAGE_SEND_X, 0);
    schedule_next(g, MESSAGE_SEND_DX, 1);
}

// The eight steps.
static inline void schedule_fold(Generator* g, int H, int h, int N) {
    int far = H - h - 1;
    bool mid = !far;
    for (int i = 0; i < 2 * far; i++) schedule_f(g, 0);
    schedule_fill_both(g, h, mid);
    for (int i = 0; i < far; i++) {
        schedule_backward(g, ACTION_I, 1);
        schedule_next(g, MESSAGE_RECEIVE_X, 1);
        schedule_w(g);
        schedule_next(g, ACTION_F, 1);
        schedule_next(g, MESSAGE_SEND_X, 1);
    }
    for (int i = 0; i < N - 2 * H + h + 1; i++) {
        if (i == 0 && mid) schedule_turn(g);
        else schedule_pair(g, 0, i == 0);
        schedule_pair(g, 1, false);
    }
    for (int i = 0; i < far; i++) {
        schedule_backward(g, ACTION_B, 1);
        schedule_pair(g, 1, false);
    }
    for (int i = 0; i < 2 * (h + 1); i++)       // 1, 0, 1, 0, ..; the later half leaves its W to the end
        schedule_backward(g, i > h ? ACTION_I : ACTION_B, !(i % 2));
    for (int i = 0; i < far; i++) {
        schedule_w(g);
        schedule_backward(g, ACTION_I, 0);
    }
    for (int i = 0; i <= h; i++) schedule_w(g);
}

// One F ahead for every rank behind this one, then backward and forward in turn.
static inline void schedule_1f1b(Generator* g) {
    int behind = g->s->P - 1 - g->rank, M = g->s->M;
    for (int m = 0; m < M + behind; m++) {
        if (m < M) schedule_f(g, 0);
        if (m >= behind) schedule_backward(g, ACTION_B, 0);
    }
}

static inline ActionList schedule_generate(const Schedule* s, int rank, bool forward_only, bool messages) {
    bool two = s->kind == PIPELINE_DUALPIPE, fold = two || s->kind == PIPELINE_DUALPIPEV;
    int H = two ? s->P / 2 : s->P, flip = two && rank >= H, h = flip ? s->P - 1 - rank : rank;
    Generator g = {s, rank, flip, {h, 2 * H - 1 - h}, {{0}}, forward_only, messages, NULL, 0, 0, {NULL, 0}, 0};
    int N = schedule_micros(s, 0);
    g.deferred = (Action*)allocate(2 * (size_t)H, sizeof(Action));
    if (fold) schedule_fold(&g, H, h, N > 2 * H ? N : 2 * H);
    else schedule_1f1b(&g);
    free(g.deferred);
    return g.list;
}

// The caller frees .at.
static inline ActionList schedule_actions(const Schedule* s, int rank, bool forward_only) {
    return schedule_generate(s, rank, forward_only, false);
}

// The same with its messages, for transports without tags: those between two actions go as one batch, and their
// order on a link is the same at both ends.
static inline ActionList schedule_program(const Schedule* s, int rank, bool forward_only) {
    return schedule_generate(s, rank, forward_only, true);
}

// Most micro-batches of the stage that are alive at once, both directions together: from F to W or B.
static inline int schedule_slots(const ActionList* list, int stage) {
    int alive = 0, most = 0;
    for (int i = 0; i < list->count; i++) {
        const Action* a = &list->at[i];
        if (a->stage != stage) continue;
        if (a->kind == ACTION_F) alive++;
        if (a->kind == ACTION_B || a->kind == ACTION_W) alive--;
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
// Simulation: what the lists take in time, in any unit

typedef struct { double F, R, I, W; } StageCost;    // R: recompute, before I; needs no gradient, so runs while waiting

typedef struct {
    const StageCost* stage;     // (stages)
    double pair;                // of a pair, over the sum of its halves; 0: they take turns, each sends when done
    double message;             // time that a message occupies its link
} ScheduleCosts;

typedef struct {
    const Schedule* s;
    const ActionList* lists;    // (P)
    const ScheduleCosts* costs;
    double *x, *dx;             // (stages, M): when a stage's input, its output's gradient is there
    double *clock, *busy;       // (P)
    double* link;               // (P, down and up): when it is free again
    double* start;              // (2 * leaves): the earliest start of each rank, and minima over it: a tree
    int *at, *ahead, leaves;    // (P): place in the list; whether the second of the pair there is done
} Simulation;

static inline size_t schedule_cell(const Simulation* sim, const Action* a, int stage) {
    int micro = schedule_global_micro(sim->s, a->direction, (int)a->micro);
    return (size_t)stage * (size_t)sim->s->M + (size_t)micro;
}

static inline double schedule_cost(const Simulation* sim, const Action* a) {
    const StageCost* c = &sim->costs->stage[a->stage];
    return a->kind == ACTION_F ? c->F : a->kind == ACTION_W ? c->W : c->R + c->I + (a->kind == ACTION_B) * c->W;
}

// When it may start, as far as its input is concerned.
static inline double schedule_ready(const Simulation* sim, const Action* a) {
    if (a->kind == ACTION_W) return 0;
    if (a->kind == ACTION_F) return sim->x[schedule_cell(sim, a, a->stage)];
    return sim->dx[schedule_cell(sim, a, a->stage)] - sim->costs->stage[a->stage].R;
}

// The rank's next start. *which: 0 the action at hand, 1 the one after it (its pair's other half is not ready), 2 both.
static inline double schedule_start(const Simulation* sim, int rank, int* which) {
    const Action* a = sim->lists[rank].at + sim->at[rank];
    *which = 0;
    if (sim->at[rank] >= sim->lists[rank].count) return INFINITY;
    double clock = sim->clock[rank], first = fmax(schedule_ready(sim, a), clock);
    if (!a->paired || sim->ahead[rank]) return first;
    double second = fmax(schedule_ready(sim, a + 1), clock);
    if (sim->costs->pair > 0) {                 // together, and the recompute while either input is waited for
        const Action* b = a->kind == ACTION_F ? a + 1 : a;
        double x = schedule_ready(sim, a->kind == ACTION_F ? a : a + 1) - sim->costs->stage[b->stage].R;
        *which = 2;
        return fmax(clock, fmax(x, schedule_ready(sim, b)));
    }
    *which = second < first || (second == first && a->kind == ACTION_F);        // B first
    return fmin(first, second);
}

static inline void schedule_update(Simulation* sim, int rank) {
    int which, i = rank + sim->leaves;
    sim->start[i] = schedule_start(sim, rank, &which);
    for (i /= 2; i; i /= 2) sim->start[i] = fmin(sim->start[2 * i], sim->start[2 * i + 1]);
}

// At time t: hands the result over, by a link to another rank.
static inline void schedule_deliver(Simulation* sim, int rank, const Action* a, double t) {
    int there = a->stage + (a->kind == ACTION_F ? 1 : -1), S = schedule_stages(sim->s);
    if (a->kind == ACTION_W || there < 0) return;
    if (there == S) {
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
    double start = schedule_start(sim, rank, &which), took;
    const Action* a = sim->lists[rank].at + sim->at[rank];
    if (which == 2) took = sim->costs->pair * (schedule_cost(sim, a) + schedule_cost(sim, a + 1));
    else took = schedule_cost(sim, a + which);
    sim->clock[rank] = start + took;
    sim->busy[rank] += took;
    if (which != 1) sim->at[rank] += 1 + (which == 2 || sim->ahead[rank]);
    sim->ahead[rank] = which == 1;
    schedule_deliver(sim, rank, a + (which == 1), start + took);
    if (which == 2) schedule_deliver(sim, rank, a + 1, start + took);
    schedule_update(sim, rank);
}

// The span of a step; busy (P): the time each rank works. Infinity if the lists wait for one another for ever.
static inline double schedule_simulate(const Schedule* s, const ActionList* lists, const ScheduleCosts* costs,
                                       double* busy) {
    size_t P = (size_t)s->P, cells = (size_t)schedule_stages(s) * (size_t)s->M, leaves = 1;
    while (leaves < P) leaves *= 2;
    double* memory = (double*)allocate(2 * cells + 3 * P + 2 * leaves, sizeof(double));
    int* places = (int*)allocate(2 * P, sizeof(int));
    Simulation sim = {s, lists, costs, memory, memory + cells, memory + 2 * cells, busy, memory + 2 * cells + P,
                      memory + 2 * cells + 3 * P, places, places + P, (int)leaves};
    double span = 0;
    memset(busy, 0, P * sizeof(double));
    for (size_t c = 0; c < cells; c++) {
        sim.x[c] = c < (size_t)s->M ? 0 : INFINITY;
        sim.dx[c] = INFINITY;
    }
    for (size_t i = 0; i < 2 * leaves; i++) sim.start[i] = INFINITY;
    for (int rank = 0; rank < s->P; rank++) schedule_update(&sim, rank);
    while (isfinite(sim.start[1])) {
        size_t i = 1;
        while (i < leaves) i = 2 * i + (sim.start[2 * i] > sim.start[i]);
        schedule_run(&sim, (int)(i - leaves));
    }
    for (int rank = 0; rank < s->P; rank++)
        span = sim.at[rank] < lists[rank].count ? INFINITY : fmax(span, sim.clock[rank]);
    free(memory);
    free(places);
    return span;
}

#endif
