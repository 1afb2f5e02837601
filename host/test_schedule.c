// test_schedule.c: every schedule executed without any buffering, its figures against the published ones, and
// the planner against sums by hand.

#include "check.h"
#include "schedule.h"

static const char* const names[] = {"none", "1f1b", "dualpipev", "dualpipe"};

// ------------------------------------------------------------------------------------------------
// The checker: runs programs on ranks whose messages pass only when both ends stand in the batch that has them,
// matched by their order on the link. Says what is wrong, or NULL.

typedef struct { uint64_t* at; int count; } Log;        // messages posted at one end of a link

typedef struct {
    const Schedule* s;
    ActionList* program;        // (P)
    bool forward_only;
    int* at;                    // (P)
    Log *sent, *received;       // (P, down and up): of the sender's link, of the receiver's
    uint8_t* done;              // (stages, M): bits F, I, W, x is here, dx is here
} Checker;
enum { DONE_F = 1, DONE_I = 2, DONE_W = 4, HAS_X = 8, HAS_DX = 16 };

static uint8_t* done_at(Checker* c, const Action* a, int stage) {
    int micro = schedule_global_micro(c->s, a->direction, (int)a->micro);
    return &c->done[stage * c->s->M + micro];
}

static bool owned(const Checker* c, const Action* a, int rank) {
    return a->stage < schedule_stages(c->s) && a->micro < (unsigned)schedule_micros(c->s, a->direction)
        && a->direction < 2 && schedule_rank_of(c->s, a->stage, a->direction) == rank;
}

// Exactly once, in order, with its input; hands over what stays on the rank.
static const char* run_action(Checker* c, int rank, const Action* a) {
    int S = schedule_stages(c->s);
    bool backward = a->kind == ACTION_B || a->kind == ACTION_I;
    int bits = a->kind == ACTION_F ? DONE_F : a->kind == ACTION_I ? DONE_I : a->kind == ACTION_W ? DONE_W : DONE_I | DONE_W;
    uint8_t* done = done_at(c, a, a->stage);
    if (*done & bits) return "done twice";
    if (a->kind == ACTION_F && a->stage > 0 && !(*done & HAS_X)) return "F without input";
    if (backward && !(*done & DONE_F)) return "B before F";
    if (backward && a->stage < S - 1 && !(*done & HAS_DX)) return "B without gradient";
    if (a->kind == ACTION_W && !(*done & DONE_I)) return "W before I";
    if ((bits & DONE_W) && a->micro > 0 && !(done[-1] & DONE_W)) return "W out of order";
    *done |= (uint8_t)bits;
    int there = a->stage + (a->kind == ACTION_F ? 1 : -1);
    if (a->kind != ACTION_W && there >= 0 && there < S && schedule_rank_of(c->s, there, a->direction) == rank)
        *done_at(c, a, there) |= a->kind == ACTION_F ? HAS_X : HAS_DX;
    return NULL;
}

static const char* check_pair(const Checker* c, int rank, int i) {
    const Action *a = &c->program[rank].at[i], *b = a + 1;
    if (i + 1 >= c->program[rank].count || b->paired || a->stage == b->stage) return "half a pair";
    return (a->kind == ACTION_F && b->kind == ACTION_B) || (a->kind == ACTION_B && b->kind == ACTION_F)
        ? NULL : "a pair of others than F and B";
}

// Where the other end of a message is.
static int peer_of(const Checker* c, const Action* a) {
    int up = a->kind == MESSAGE_SEND_X || a->kind == MESSAGE_RECEIVE_DX;
    return schedule_rank_of(c->s, a->stage + (up ? 1 : -1), a->direction);
}

static const char* post(Checker* c, int rank, const Action* a) {
    bool send = a->kind == MESSAGE_SEND_X || a->kind == MESSAGE_SEND_DX;
    bool x = a->kind == MESSAGE_SEND_X || a->kind == MESSAGE_RECEIVE_X;
    int S = schedule_stages(c->s), there = a->stage + (x == send ? 1 : -1);
    if (there < 0 || there >= S) return "a message beyond the model";
    int peer = peer_of(c, a), consumer = send ? there : a->stage;
    if (peer != rank - 1 && peer != rank + 1) return "a message to no neighbour";
    if (send && !(*done_at(c, a, a->stage) & (x ? DONE_F : DONE_I))) return "sent before it was made";
    Log* log = send ? &c->sent[2 * rank + (peer > rank)] : &c->received[2 * peer + (rank > peer)];
    log->at[log->count++] = ((uint64_t)consumer << 40) | ((uint64_t)a->micro << 2) | (uint64_t)(2 * x + a->direction);
    return NULL;
}

// Whether all that the rank has posted has its partner.
static bool batch_complete(const Checker* c, int rank) {
    for (int up = 0; up < 2; up++) {
        int peer = rank + (up ? 1 : -1);
        if (peer < 0 || peer >= c->s->P) continue;
        const Log *out = &c->sent[2 * rank + up], *far = &c->received[2 * rank + up];
        const Log *in = &c->received[2 * peer + !up], *from = &c->sent[2 * peer + !up];
        if (out->count > far->count || in->count > from->count) return false;
    }
    return true;
}

// As far as the rank gets: posts a batch once, waits for all of it, acts.
static const char* advance(Checker* c, int rank, bool* posted, bool* moved) {
    ActionList* p = &c->program[rank];
    const char* wrong = NULL;
    while (!wrong && c->at[rank] < p->count) {
        int i = c->at[rank], end = i;
        while (end < p->count && schedule_is_message(p->at[end].kind)) end++;
        if (end > i) {
            for (int k = i; k < end && !posted[rank]; k++)
                if ((wrong = post(c, rank, &p->at[k]))) return wrong;
            *moved |= !posted[rank];
            posted[rank] = true;
            if (!batch_complete(c, rank)) return NULL;
            for (int k = i; k < end; k++) {
                if (p->at[k].kind == MESSAGE_RECEIVE_X) *done_at(c, &p->at[k], p->at[k].stage) |= HAS_X;
                if (p->at[k].kind == MESSAGE_RECEIVE_DX) *done_at(c, &p->at[k], p->at[k].stage) |= HAS_DX;
            }
            posted[rank] = false;
        } else {
            wrong = p->at[i].paired ? check_pair(c, rank, i) : NULL;
            if (!wrong) wrong = run_action(c, rank, &p->at[i]);
            end = i + 1;
        }
        c->at[rank] = end;
        *moved = true;
    }
    return wrong;
}

static const char* execute(Checker* c) {
    bool moved = true, *posted = (bool*)allocate((size_t)c->s->P, sizeof(bool));
    const char* wrong = NULL;
    for (int rank = 0; rank < c->s->P && !wrong; rank++)
        for (int i = 0; i < c->program[rank].count && !wrong; i++)
            if (!owned(c, &c->program[rank].at[i], rank)) wrong = "not the rank's";
    while (moved && !wrong) {
        moved = false;
        for (int rank = 0; rank < c->s->P && !wrong; rank++) wrong = advance(c, rank, posted, &moved);
    }
    for (int rank = 0; rank < c->s->P && !wrong; rank++)
        if (c->at[rank] < c->program[rank].count) wrong = "deadlock";
    for (int cell = 0; cell < schedule_stages(c->s) * c->s->M && !wrong; cell++)
        if ((c->done[cell] & 7) != (c->forward_only ? DONE_F : 7)) wrong = "not done";
    free(posted);
    return wrong;
}

static const char* match(const Checker* c) {
    for (int link = 0; link < 2 * c->s->P; link++) {
        const Log *a = &c->sent[link], *b = &c->received[link];
        if (a->count != b->count) return "a message without a partner";
        if (memcmp(a->at, b->at, (size_t)a->count * sizeof *a->at)) return "messages in another order";
    }
    return NULL;
}

static const char* check_programs(const Schedule* s, ActionList* program, bool forward_only) {
    size_t links = 2 * (size_t)s->P, most = 8;
    for (int rank = 0; rank < s->P; rank++) most += (size_t)program[rank].count;
    Checker c = {s, program, forward_only, (int*)allocate((size_t)s->P, sizeof(int)),
                 (Log*)allocate(links, sizeof(Log)), (Log*)allocate(links, sizeof(Log)),
                 (uint8_t*)allocate((size_t)schedule_stages(s) * (size_t)s->M, 1)};
    uint64_t* memory = (uint64_t*)allocate(2 * links * most, sizeof(uint64_t));
    for (size_t l = 0; l < links; l++) {
        c.sent[l].at = memory + l * most;
        c.received[l].at = memory + (links + l) * most;
    }
    const char *wrong = execute(&c), *mismatch = match(&c);
    if (!wrong || !strcmp(wrong, "deadlock")) wrong = mismatch ? mismatch : wrong;
    free(memory);
    free(c.at);
    free(c.sent);
    free(c.received);
    free(c.done);
    return wrong;
}

// ------------------------------------------------------------------------------------------------
// Ring check: tagged messages that end only when received, `sends` under way on a link, receives posted `ahead` of
// the action at hand. Whether every rank comes to its end.

typedef struct { int at, ahead; } Place;   // ahead: of a pair, what is left: 1 its second, 2 its first

typedef struct {
    const Schedule* s;
    const ActionList* lists;
    Place* place;               // (P)
    uint8_t *x, *dx;            // (stages, M): bits posted, sent
    int* waiting;               // (P, down and up): sends that nobody has posted a receive for
    int sends, window;
} Ring;
enum { RING_POSTED = 1, RING_SENT = 2 };

// The other rank and the cell of the message that an action needs (out = false) or makes; -1 if there is none.
static int message_of(const Ring* r, int rank, const Action* a, bool out, uint8_t** cell) {
    bool f = a->kind == ACTION_F;
    int there = a->stage + (f == out ? 1 : -1);
    if (a->kind == ACTION_W || there < 0 || there >= schedule_stages(r->s)) return -1;
    int peer = schedule_rank_of(r->s, there, a->direction), stage = out ? there : a->stage;
    *cell = &(f ? r->x : r->dx)[stage * r->s->M + schedule_global_micro(r->s, a->direction, (int)a->micro)];
    return peer == rank ? -1 : peer;
}

static void post_receives(Ring* r, int rank) {
    Place* p = &r->place[rank];
    const ActionList* list = &r->lists[rank];
    uint8_t* cell;
    int pair = p->at < list->count && list->at[p->at].paired, ahead = 0;
    for (int i = p->at; i < list->count && ahead <= r->window; i++) {
        int peer = message_of(r, rank, &list->at[i], false, &cell);
        ahead += peer >= 0 && i > p->at + pair;
        if (peer < 0 || ahead > r->window) continue;
        r->waiting[2 * peer + (rank > peer)] -= *cell == RING_SENT;
        *cell |= RING_POSTED;
    }
}

static bool may_run(const Ring* r, int rank, const Action* a) {
    uint8_t* cell;
    if (message_of(r, rank, a, false, &cell) >= 0 && *cell != (RING_POSTED | RING_SENT)) return false;
    int peer = message_of(r, rank, a, true, &cell);
    return peer < 0 || r->waiting[2 * rank + (peer > rank)] < r->sends;
}

static void send_result(Ring* r, int rank, const Action* a) {
    uint8_t* cell;
    int peer = message_of(r, rank, a, true, &cell);
    if (peer < 0) return;
    r->waiting[2 * rank + (peer > rank)] += *cell == 0;
    *cell |= RING_SENT;
}

// One action, half or pair; the half at `first` is tried before the other.
static bool ring_step(Ring* r, int rank, bool joint, int first) {
    Place* p = &r->place[rank];
    const Action* a = r->lists[rank].at + p->at;
    if (p->at == r->lists[rank].count) return false;
    post_receives(r, rank);
    if (!a->paired || p->ahead) {
        if (!may_run(r, rank, a + (p->ahead == 1))) return false;
        send_result(r, rank, a + (p->ahead == 1));
        p->at += 1 + (p->ahead > 0);
        p->ahead = 0;
        return true;
    }
    if (joint && !(may_run(r, rank, a) && may_run(r, rank, a + 1))) return false;
    if (!may_run(r, rank, a + first)) first = !first;
    if (!may_run(r, rank, a + first)) return false;
    send_result(r, rank, a + first);
    p->ahead = first ? 2 : 1;
    return true;
}

static bool ring_ends(const Schedule* s, const ActionList* lists, int sends, int window, bool joint, int first) {
    size_t cells = (size_t)schedule_stages(s) * (size_t)s->M;
    uint8_t* cell = (uint8_t*)allocate(2 * cells, 1);
    Ring r = {s, lists, (Place*)allocate((size_t)s->P, sizeof(Place)), cell, cell + cells,
              (int*)allocate(2 * (size_t)s->P, sizeof(int)), sends, window};
    bool moved = true, ended = true;
    while (moved) {
        moved = false;
        for (int rank = 0; rank < s->P; rank++)
            while (ring_step(&r, rank, joint, first)) moved = true;
    }
    for (int rank = 0; rank < s->P; rank++) ended = ended && r.place[rank].at == lists[rank].count;
    free(cell);
    free(r.place);
    free(r.waiting);
    return ended;
}

// ------------------------------------------------------------------------------------------------
// Sets of lists

typedef ActionList (*Generate)(const Schedule* s, int rank, bool forward_only);

static ActionList* lists_of(const Schedule* s, bool forward_only, Generate generate) {
    ActionList* lists = (ActionList*)allocate((size_t)s->P, sizeof(ActionList));
    for (int rank = 0; rank < s->P; rank++) lists[rank] = generate(s, rank, forward_only);
    return lists;
}

static void lists_free(ActionList* lists, int P) {
    for (int rank = 0; rank < P; rank++) free(lists[rank].at);
    free(lists);
}

// The smallest M whose bubble follows the formula: 2P stages, or P with two directions, are full.
static int full_M(int kind, int P) { return kind == PIPELINE_1F1B ? P : 2 * P; }

// Slots of both stages of a rank, and I's that wait for their W, against 2H-h, h+1 and h+1 (1f1b: P-rank and 0).
static bool live_counts_hold(const Schedule* s, const ActionList* list, int rank) {
    int S = schedule_stages(s), deferred = 0, most = 0, far = S - 1 - rank, h = rank < far ? rank : far;
    int near = S - h, N = schedule_micros(s, 0);
    bool full = s->M >= full_M(s->kind, s->P) && s->M % 2 == 0;
    for (int i = 0; i < list->count; i++) {
        deferred += (list->at[i].kind == ACTION_I) - (list->at[i].kind == ACTION_W);
        most = deferred > most ? deferred : most;
    }
    if (s->kind == PIPELINE_NONE) return schedule_slots(list, 0) == 1;
    if (s->kind == PIPELINE_1F1B)
        return schedule_slots(list, rank) == (N < S - rank ? N : S - rank) && !most;
    int first = schedule_slots(list, h), second = schedule_slots(list, S - 1 - h);
    if (full && (first != near || second != h + 1 || most != h + 1)) return false;
    return first <= near && second <= h + 1 && most <= h + 1 && !deferred;
}

// Bubble of F = I = W = 1 and pairs of `pair`, the worst rank's.
static double bubble_of(const Schedule* s, const ActionList* lists, double pair, double* span) {
    double busy[64], bubble = 0;
    StageCost stage[64];
    for (int k = 0; k < schedule_stages(s); k++) stage[k] = (StageCost){1, 0, 1, 1};
    ScheduleCosts costs = {stage, pair / 3, 0};
    *span = schedule_simulate(s, lists, &costs, busy);
    for (int rank = 0; rank < s->P; rank++) bubble = fmax(bubble, *span - busy[rank]);
    return bubble;
}

// Published, with F = I = W = 1 and B = 2: (H-1)(pair + B - 3W), for pairs that take B or more.
static double bubble_formula(int kind, int P, double pair) {
    int H = kind == PIPELINE_DUALPIPE ? P / 2 : P;
    return kind == PIPELINE_NONE ? 0 : kind == PIPELINE_1F1B ? 3 * (P - 1) : (H - 1) * (pair - 1);
}

// ------------------------------------------------------------------------------------------------
// Properties of every schedule, P and M

static bool bubbles_hold(const Schedule* s, const ActionList* lists) {
    static const double pairs[] = {3, 2.7, 2.3, 2};
    double span;
    if (s->M < full_M(s->kind, s->P) || (s->kind == PIPELINE_DUALPIPE && s->M % 2)) return true;
    for (int k = 0; k < 4; k++)
        if (!(fabs(bubble_of(s, lists, pairs[k], &span) - bubble_formula(s->kind, s->P, pairs[k])) < 1e-9))
            return false;
    return true;
}

static bool rings_end(const Schedule* s, const ActionList* lists, int sends, int window) {
    for (int way = 0; way < 4; way++)
        if (!ring_ends(s, lists, sends, window, way & 1, way >> 1)) return false;
    return true;
}

typedef struct { int cases, wrong_programs, wrong_counts, wrong_bubbles, stuck, stuck_two, stuck_one; } Tally;

static void try_schedule(const Schedule* s, Tally* tally) {
    for (int forward_only = 0; forward_only < 2; forward_only++) {
        ActionList* programs = lists_of(s, forward_only, schedule_program);
        ActionList* lists = lists_of(s, forward_only, schedule_actions);
        const char* wrong = check_programs(s, programs, forward_only);
        if (wrong && !tally->wrong_programs++) printf("     %s P %d M %d: %s\n", names[s->kind], s->P, s->M, wrong);
        for (int rank = 0; rank < s->P && !forward_only; rank++)
            tally->wrong_counts += !live_counts_hold(s, &lists[rank], rank);
        tally->wrong_bubbles += !forward_only && !bubbles_hold(s, lists);
        tally->stuck += !rings_end(s, lists, SENDS_PER_LINK, RECEIVES_AHEAD);
        tally->stuck_two += !rings_end(s, lists, 2, 0);
        tally->stuck_one += !rings_end(s, lists, 1, 0);
        tally->cases++;
        lists_free(lists, s->P);
        lists_free(programs, s->P);
    }
}

static void test_properties(void) {
    for (int kind = PIPELINE_NONE; kind <= PIPELINE_DUALPIPE; kind++) {
        Tally tally = {0};
        for (int P = 1; P <= 8; P++)
            for (int M = 1; M <= 4 * P; M += M < 2 * P + 3 || M == 4 * P ? 1 : 4 * P - M) {
                Schedule s = {kind, P, M};
                Error e;
                if (schedule_fits(&s, &e)) try_schedule(&s, &tally);
            }
        check(tally.cases && !tally.wrong_programs, "%s: %d sets of lists run without buffering, each action once",
              names[kind], tally.cases);
        check(!tally.wrong_counts, "%s: as many alive as there are slots", names[kind]);
        check(!tally.wrong_bubbles, "%s: the bubble is the formula's", names[kind]);
        check(!tally.stuck, "%s: %d sends a link and %d receives ahead never deadlock", names[kind], SENDS_PER_LINK,
              RECEIVES_AHEAD);
        check(!tally.stuck_two, "%s: nor do 2 sends and none ahead", names[kind]);
        printf("     %s: one send a link deadlocks in %d cases\n", names[kind], tally.stuck_one);
    }
}

// ------------------------------------------------------------------------------------------------
// The checker sees mistakes

enum { DELETE, DUPLICATE, SWAP };

// Changes entry i of a list in place (swap: with the next).
static void mutate(ActionList* list, int how, int i) {
    Action keep = list->at[i];
    list->at = (Action*)realloc(list->at, (size_t)(list->count + 1) * sizeof(Action));
    size_t rest = (size_t)(list->count - i) * sizeof(Action);
    if (how == DELETE) memmove(&list->at[i], &list->at[i + 1], rest - sizeof(Action));
    if (how == DUPLICATE) memmove(&list->at[i + 1], &list->at[i], rest);
    if (how == SWAP) {
        list->at[i] = list->at[i + 1];
        list->at[i + 1] = keep;
    }
    list->count += how == DUPLICATE ? 1 : how == DELETE ? -1 : 0;
}

static void test_mutations(void) {
    int tried[3] = {0}, caught[3] = {0};
    for (uint64_t seed = 0; seed < 200; seed++) {
        Schedule s = {PIPELINE_1F1B + (int)(hash64(seed, 0) % 3), 2 * (1 + (int)(hash64(seed, 1) % 3)),
                      1 + (int)(hash64(seed, 2) % 14)};
        ActionList* programs = lists_of(&s, false, schedule_program);
        ActionList* list = &programs[hash64(seed, 3) % (uint64_t)s.P];
        int how = (int)(hash64(seed, 4) % 3);
        mutate(list, how, (int)(hash64(seed, 5) % (uint64_t)(list->count - (how == SWAP))));
        tried[how]++;
        caught[how] += check_programs(&s, programs, false) != NULL;
        lists_free(programs, s.P);
    }
    check(tried[DELETE] > 50 && caught[DELETE] == tried[DELETE], "%d deletions are caught", tried[DELETE]);
    check(tried[DUPLICATE] > 50 && caught[DUPLICATE] == tried[DUPLICATE], "%d duplications are caught",
          tried[DUPLICATE]);
    check(caught[SWAP] > 20, "%d of %d swaps of neighbours are caught; the others are independent", caught[SWAP],
          tried[SWAP]);
}

// ------------------------------------------------------------------------------------------------
// Published figures

typedef struct { int kind, P, M; double span, bubble, bubble27, bubble20; int alive, deferred; } Published;

// Span and bubble for F = I = W = 1 and pairs of 3, bubbles for pairs of 2.7 and 2, alive on the worst rank.
static const Published published[] = {
    {PIPELINE_DUALPIPE, 2, 8, 24, 0, 0, 0, 3, 1},         {PIPELINE_DUALPIPE, 4, 8, 26, 2, 1.7, 1, 5, 2},
    {PIPELINE_DUALPIPE, 4, 16, 50, 2, 1.7, 1, 5, 2},      {PIPELINE_DUALPIPE, 6, 24, 76, 4, 3.4, 2, 7, 3},
    {PIPELINE_DUALPIPE, 8, 16, 54, 6, 5.1, 3, 9, 4},      {PIPELINE_DUALPIPE, 8, 20, 66, 6, 5.1, 3, 9, 4},
    {PIPELINE_DUALPIPE, 8, 32, 102, 6, 5.1, 3, 9, 4},     {PIPELINE_DUALPIPEV, 1, 4, 24, 0, 0, 0, 3, 1},
    {PIPELINE_DUALPIPEV, 2, 4, 26, 2, 1.7, 1, 5, 2},      {PIPELINE_DUALPIPEV, 2, 8, 50, 2, 1.7, 1, 5, 2},
    {PIPELINE_DUALPIPEV, 3, 12, 76, 4, 3.4, 2, 7, 3},     {PIPELINE_DUALPIPEV, 4, 8, 54, 6, 5.1, 3, 9, 4},
    {PIPELINE_DUALPIPEV, 4, 10, 66, 6, 5.1, 3, 9, 4},     {PIPELINE_DUALPIPEV, 4, 16, 102, 6, 5.1, 3, 9, 4},
    {PIPELINE_DUALPIPEV, 8, 32, 206, 14, 11.9, 7, 17, 8}, {PIPELINE_1F1B, 4, 16, 57, 9, 9, 9, 4, 0},
    {PIPELINE_1F1B, 8, 32, 117, 21, 21, 21, 8, 0},
};

static bool near(double a, double b) { return fabs(a - b) < 1e-9 * (1 + fabs(b)); }

static void test_published(void) {
    for (size_t k = 0; k < sizeof published / sizeof *published; k++) {
        const Published* p = &published[k];
        Schedule s = {p->kind, p->P, p->M};
        ActionList* lists = lists_of(&s, false, schedule_actions);
        double span, other, bubble = bubble_of(&s, lists, 3, &span);
        int most = 0, most_deferred = 0;
        for (int rank = 0; rank < s.P; rank++) {
            int alive = 0, deferred = 0;
            for (int stage = 0; stage < schedule_stages(&s); stage++) alive += schedule_slots(&lists[rank], stage);
            for (int i = 0; i < lists[rank].count; i++) {
                deferred += (lists[rank].at[i].kind == ACTION_I) - (lists[rank].at[i].kind == ACTION_W);
                most_deferred = deferred > most_deferred ? deferred : most_deferred;
            }
            most = alive > most ? alive : most;
        }
        check(near(span, p->span) && near(bubble, p->bubble) && near(bubble_of(&s, lists, 2.7, &other), p->bubble27)
              && near(bubble_of(&s, lists, 2, &other), p->bubble20) && most == p->alive
              && most_deferred == p->deferred, "%s P %d M %d: span %g, bubble %g, %d alive, %d W deferred",
              names[s.kind], s.P, s.M, span, bubble, most, most_deferred);
        lists_free(lists, s.P);
    }
}

static double span_of(Schedule s, const StageCost* stage, double pair, double message) {
    double busy[64];
    ActionList* lists = lists_of(&s, false, schedule_actions);
    ScheduleCosts costs = {stage, pair, message};
    double span = schedule_simulate(&s, lists, &costs, busy);
    lists_free(lists, s.P);
    return span;
}

static void fill(StageCost* stage, StageCost cost) {
    for (int k = 0; k < 64; k++) stage[k] = cost;
}

// D devices, the same model, 4D micro-batches: a stage of 1f1b and dualpipe is two of dualpipev.
static void test_equal_devices(void) {
    static const double spans[3][6] = {{54, 48, 50, 49, 46.4, 38}, {114, 100, 102, 99, 94.2, 76},
                                       {234, 204, 206, 199, 189.8, 152}};
    StageCost two[64], one[64];
    fill(two, (StageCost){2, 0, 2, 2});
    fill(one, (StageCost){1, 0, 1, 1});
    for (int k = 0, D = 2; k < 3; k++, D *= 2) {
        Schedule flat = {PIPELINE_1F1B, D, 4 * D}, dual = {PIPELINE_DUALPIPE, D, 4 * D}, v = {PIPELINE_DUALPIPEV, D, 4 * D};
        double s[6] = {span_of(flat, two, 1, 0), span_of(dual, two, 1, 0), span_of(v, one, 1, 0), span_of(v, one, 0, 0),
                       span_of(v, one, 2.7 / 3, 0), span_of(v, one, 2.0 / 3, 0)};
        bool good = true;
        for (int i = 0; i < 6; i++) good = good && near(s[i], spans[k][i]);
        check(good, "%d devices: 1f1b %g, dualpipe %g, dualpipev %g; pairs in turn %g, pairs of 2.7 %g, of 2 %g", D,
              s[0], s[1], s[2], s[3], s[4], s[5]);
    }
}

static void test_messages_and_recompute(void) {
    static const double bubbles[3][2] = {{2.3, 1.7}, {6.9, 5.1}, {17.2, 11.9}};
    Schedule v = {PIPELINE_DUALPIPEV, 4, 16}, flat = {PIPELINE_1F1B, 4, 16}, two = {PIPELINE_1F1B, 2, 1};
    StageCost c[64];
    fill(c, (StageCost){1, 0, 1, 1});
    check(near(span_of(v, c, 0, 0.2), 101.6), "messages of 0.2, pairs in turn: 101.6");
    check(near(span_of(two, c, 1, 0.2), 6.4), "two stages, one micro-batch: 6 of work and two messages");
    fill(c, (StageCost){1, 0, 1.3, 0.8});
    check(near(span_of(v, c, 0, 0.2), 107.2), "with F, I, W = 1, 1.3, 0.8: 107.2");
    fill(c, (StageCost){2, 0, 2, 2});
    check(near(span_of(flat, c, 1, 0.2), 119.6), "1f1b with messages of 0.2: 119.6");
    for (int k = 0, P = 2; k < 3; k++, P *= 2) {
        Schedule s = {PIPELINE_DUALPIPEV, P, 4 * P};
        fill(c, (StageCost){1, 0, 1.3, 1});
        double late = span_of(s, c, 1, 0) - 3.3 * 8 * P;
        fill(c, (StageCost){1, 0.3, 1, 1});
        double early = span_of(s, c, 1, 0) - 3.3 * 8 * P;
        check(near(late, bubbles[k][0]) && near(early, bubbles[k][1]),
              "P %d: recompute before the gradient comes: bubble %g, not %g", P, early, late);
    }
}

// ------------------------------------------------------------------------------------------------
// What people see

static bool prints(Schedule s, const char* expected) {
    char text[4096] = "";
    FILE* file = fmemopen(text, sizeof text, "w");
    schedule_print(file, &s);
    fclose(file);
    if (strcmp(text, expected)) printf("%s", text);
    return !strcmp(text, expected);
}

static void test_print(void) {
    check(prints((Schedule){PIPELINE_DUALPIPEV, 2, 6},
        "rank 0: F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 F0.4&B3.2 F3.3&B0.1 F0.5&B3.3 F3.4&B0.2"
        " B3.4 F3.5&B0.3 B3.5 I0.4 W0.4 I0.5 W0.5\n"
        "rank 1: F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 F1.4&B2.2 F2.4&B1.2 F1.5&B2.3"
        " F2.5&B1.3 B2.4 B1.4 I2.5 I1.5 W2.5 W1.5\n"), "dualpipev, P = 2, M = 6");
    check(prints((Schedule){PIPELINE_DUALPIPE, 2, 3},
        "rank 0: F0.0 F1.0' F0.1 B1.0' B0.0 I0.1 W0.1\nrank 1: F0.0' F1.0 B1.0 F1.1&B0.0' B1.1\n"),
        "dualpipe, P = 2, M = 3: the second direction has one micro-batch");
    check(prints((Schedule){PIPELINE_1F1B, 2, 2}, "rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1\n"),
          "1f1b, P = 2, M = 2");
    check(prints((Schedule){PIPELINE_NONE, 1, 2}, "rank 0: F0.0 B0.0 F0.1 B0.1\n"), "none, M = 2");
}

static void test_limits(void) {
    Error e;
    Schedule odd = {PIPELINE_DUALPIPE, 3, 4}, none = {PIPELINE_NONE, 2, 4}, good = {PIPELINE_DUALPIPE, 4, 5};
    check(!schedule_fits(&odd, &e), "refused: %s", e.text);
    check(!schedule_fits(&none, &e), "refused: %s", e.text);
    check(schedule_fits(&good, &e) && schedule_global_micro(&good, 0, 2) == 2 && schedule_global_micro(&good, 1, 1) == 4,
          "dualpipe, M = 5: micro-batch 1 of the second direction is the step's last");
}

int main(void) {
    test_properties();
    test_mutations();
    test_published();
    test_equal_devices();
    test_messages_and_recompute();
    test_print();
    test_limits();
    return check_summary();
}
