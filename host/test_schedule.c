// test_schedule.c: every schedule executed without any buffering, its figures against published ones.

#include "check.h"
#include "schedule.h"

static const char* const names[] = {"none", "1f1b", "dualpipev", "dualpipe"};

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

// ------------------------------------------------------------------------------------------------
// The checker runs programs. Messages between two actions are a batch, passing when each has its partner, of
// the same number on the link: nothing is buffered, nothing has a tag. It says what is wrong, or NULL.

typedef struct {
    const Schedule* s;
    ActionList* program;        // (P)
    int *at, *posted;           // (P): place in the program; whether the batch there is posted
    int *sent, *received;       // (P, down and up) messages posted at the ends of the sender's link
    uint32_t* name;             // (P, down and up, most): of each message, from whoever posted it first
    int most;
    uint8_t* done;              // (stages, M): bits
} Checker;
enum { DONE_F = 1, DONE_I = 2, DONE_W = 4, HAS_X = 8, HAS_DX = 16 };

static uint8_t* done_at(Checker* c, const Action* a, int stage) {
    return &c->done[stage * c->s->M + schedule_global_micro(c->s, a->direction, (int)a->micro)];
}

// Exactly once, in order, with its input; hands over what stays on the rank.
static const char* act(Checker* c, int rank, const Action* a) {
    static const int bits_of[] = {DONE_F, DONE_I | DONE_W, DONE_I, DONE_W};
    int S = schedule_stages(c->s), bits = bits_of[a->kind];
    int there = a->stage + (a->kind == ACTION_F ? 1 : -1);
    uint8_t* done = done_at(c, a, a->stage);
    if (*done & bits) return "done twice";
    if ((bits & DONE_F) && a->stage > 0 && !(*done & HAS_X)) return "F without x";
    if ((bits & DONE_I) && !(*done & DONE_F)) return "B before F";
    if ((bits & DONE_I) && a->stage < S - 1 && !(*done & HAS_DX)) return "B without dx";
    if (bits == DONE_W && !(*done & DONE_I)) return "W before I";
    if ((bits & DONE_W) && a->micro > 0 && !(done[-1] & DONE_W)) return "W out of order";
    *done |= (uint8_t)bits;
    if (bits != DONE_W && there >= 0 && there < S && schedule_rank_of(c->s, there, a->direction) == rank)
        *done_at(c, a, there) |= a->kind == ACTION_F ? HAS_X : HAS_DX;
    return NULL;
}

static const char* check_pair(const ActionList* list, int i) {
    const Action *a = &list->at[i], *b = a + 1;
    if (!a->paired) return NULL;
    if (i + 1 >= list->count || b->paired || a->stage == b->stage) return "half a pair";
    return a->kind + b->kind == ACTION_F + ACTION_B && a->kind != b->kind ? NULL : "a pair not of F and B";
}

static const char* post(Checker* c, int rank, const Action* a) {
    bool send = a->kind == MESSAGE_SEND_X || a->kind == MESSAGE_SEND_DX;
    bool x = a->kind == MESSAGE_SEND_X || a->kind == MESSAGE_RECEIVE_X;
    int there = a->stage + (x == send ? 1 : -1), consumer = send ? there : a->stage;
    if (there < 0 || there >= schedule_stages(c->s)) return "a message beyond the model";
    int peer = schedule_rank_of(c->s, there, a->direction);
    if (abs(peer - rank) != 1) return "a message to no neighbour";
    if (send && !(*done_at(c, a, a->stage) & (x ? DONE_F : DONE_I))) return "sent before it was made";
    int link = send ? 2 * rank + (peer > rank) : 2 * peer + (rank > peer);
    int number = (send ? c->sent : c->received)[link]++, other = (send ? c->received : c->sent)[link];
    uint32_t name = ((uint32_t)consumer << 16) | (a->micro << 2) | (uint32_t)(2 * x + a->direction);
    uint32_t* first = &c->name[link * c->most + number];
    if (number < other && *first != name) return "messages in another order";
    *first = name;
    return NULL;
}

static bool batch_passes(const Checker* c, int rank) {
    for (int up = 0; up < 2; up++) {
        int out = 2 * rank + up, peer = rank + (up ? 1 : -1), in = 2 * peer + !up;
        if (peer < 0 || peer >= c->s->P) continue;
        if (c->sent[out] > c->received[out] || c->received[in] > c->sent[in]) return false;
    }
    return true;
}

// The batch or action at hand, if it can pass.
static const char* step(Checker* c, int rank, bool* moved) {
    const ActionList* p = &c->program[rank];
    int i = c->at[rank], end = i;
    const char* wrong = NULL;
    while (end < p->count && schedule_is_message(p->at[end].kind)) end++;
    for (int k = i; k < end && !c->posted[rank] && !wrong; k++) wrong = post(c, rank, &p->at[k]);
    *moved = !c->posted[rank];
    c->posted[rank] = end > i;
    if (wrong || (end > i && !batch_passes(c, rank))) return wrong;
    for (int k = i; k < end; k++)
        if (p->at[k].kind == MESSAGE_RECEIVE_X || p->at[k].kind == MESSAGE_RECEIVE_DX)
            *done_at(c, &p->at[k], p->at[k].stage) |= p->at[k].kind == MESSAGE_RECEIVE_X ? HAS_X : HAS_DX;
    if (end == i) {
        wrong = check_pair(p, i);
        if (!wrong) wrong = act(c, rank, &p->at[end++]);
    }
    c->at[rank] = end;
    c->posted[rank] = false;
    *moved = true;
    return wrong;
}

static const char* execute(Checker* c, bool forward_only) {
    const char* wrong = NULL;
    for (int rank = 0; rank < c->s->P; rank++)
        for (int i = 0; i < c->program[rank].count; i++) {
            const Action* a = &c->program[rank].at[i];
            if (schedule_rank_of(c->s, a->stage, a->direction) != rank) return "of another rank";
        }
    for (bool any = true; any && !wrong;) {
        any = false;
        for (int rank = 0; rank < c->s->P; rank++)
            for (bool m = true; m && !wrong && c->at[rank] < c->program[rank].count; any = any || m)
                wrong = step(c, rank, &m);
    }
    for (int rank = 0; rank < c->s->P && !wrong; rank++)
        if (c->at[rank] < c->program[rank].count) wrong = "deadlock";
    for (int cell = 0; cell < schedule_stages(c->s) * c->s->M && !wrong; cell++)
        if ((c->done[cell] & 7) != (forward_only ? DONE_F : 7)) wrong = "not done";
    return wrong;
}

static const char* check_programs(const Schedule* s, ActionList* program, bool forward_only) {
    int P = s->P, most = 0;
    for (int rank = 0; rank < P; rank++) most = program[rank].count > most ? program[rank].count : most;
    int* counts = (int*)allocate(6 * (size_t)P, sizeof(int));
    Checker c = {s, program, counts, counts + P, counts + 2 * P, counts + 4 * P,
                 (uint32_t*)allocate(2 * (size_t)P * (size_t)most, sizeof(uint32_t)), most,
                 (uint8_t*)allocate((size_t)(schedule_stages(s) * s->M), 1)};
    const char* wrong = execute(&c, forward_only);
    free(counts);
    free(c.name);
    free(c.done);
    return wrong;
}

// ------------------------------------------------------------------------------------------------
// Ring check: messages have tags and end only when received. A rank has at most `sends` under way on a link
// and posts the receives of the action at hand and `window` more. Whether every rank comes to its end.

typedef struct { int at, left; } Place;     // left of the pair there: 1 its second, 2 its first, 0 all of it

typedef struct {
    const Schedule* s;
    const ActionList* lists;    // (P)
    Place* place;               // (P)
    int* waiting;               // (P, down and up) sends that no receive is posted for
    uint8_t *x, *dx;            // (stages, M): bits
    int sends, window;
} Ring;
enum { POSTED = 1, SENT = 2 };

// The link and cell of the message that the action makes or needs; -1 if there is none.
static int link_of(const Ring* r, int rank, const Action* a, bool makes, uint8_t** cell) {
    bool f = a->kind == ACTION_F;
    int there = a->stage + (f == makes ? 1 : -1), stage = makes ? there : a->stage;
    if (a->kind == ACTION_W || there < 0 || there >= schedule_stages(r->s)) return -1;
    int peer = schedule_rank_of(r->s, there, a->direction);
    *cell = &(f ? r->x : r->dx)[stage * r->s->M + schedule_global_micro(r->s, a->direction, (int)a->micro)];
    return peer == rank ? -1 : makes ? 2 * rank + (peer > rank) : 2 * peer + (rank > peer);
}

static void post_receives(Ring* r, int rank) {
    const ActionList* list = &r->lists[rank];
    int at = r->place[rank].at, ahead = 0;
    for (int i = at; i < list->count; i++) {
        uint8_t* cell;
        int link = link_of(r, rank, &list->at[i], false, &cell);
        ahead += link >= 0 && i > at + list->at[at].paired;
        if (ahead > r->window) return;
        if (link < 0) continue;
        r->waiting[link] -= *cell == SENT;
        *cell |= POSTED;
    }
}

// An action, or half of a pair, if its input is here and there is room for its output.
static bool try_half(Ring* r, int rank, const Action* a, bool act) {
    uint8_t* cell;
    if (link_of(r, rank, a, false, &cell) >= 0 && *cell != (POSTED | SENT)) return false;
    int link = link_of(r, rank, a, true, &cell);
    if (link < 0) return true;
    if (r->waiting[link] >= r->sends) return false;
    r->waiting[link] += act && *cell == 0;
    *cell |= act ? SENT : 0;
    return true;
}

// joint: a pair waits for both inputs; first: the half that is tried first.
static bool ring_step(Ring* r, int rank, bool joint, int first) {
    Place* p = &r->place[rank];
    const Action* a = r->lists[rank].at + p->at;
    if (p->at == r->lists[rank].count) return false;
    post_receives(r, rank);
    if (!a->paired || p->left) {
        if (!try_half(r, rank, a + (p->left == 1), true)) return false;
        p->at += p->left ? 2 : 1;
        p->left = 0;
        return true;
    }
    if (joint && !(try_half(r, rank, a, false) && try_half(r, rank, a + 1, false))) return false;
    if (try_half(r, rank, a + first, true)) p->left = first ? 2 : 1;
    else if (try_half(r, rank, a + !first, true)) p->left = first ? 1 : 2;
    return p->left > 0;
}

static bool ring_ends(const Schedule* s, const ActionList* lists, int sends, int window, bool joint,
                      int first) {
    size_t P = (size_t)s->P, cells = (size_t)(schedule_stages(s) * s->M);
    uint8_t* cell = (uint8_t*)allocate(2 * cells, 1);
    Ring r = {s, lists, (Place*)allocate(P, sizeof(Place)), (int*)allocate(2 * P, sizeof(int)), cell,
              cell + cells, sends, window};
    bool ended = true;
    for (bool moved = true; moved;) {
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

static bool rings_end(const Schedule* s, const ActionList* lists, int sends, int window) {
    for (int way = 0; way < 4; way++)
        if (!ring_ends(s, lists, sends, window, way & 1, way >> 1)) return false;
    return true;
}

// ------------------------------------------------------------------------------------------------
// Properties of every schedule, P and M

// From this M on all slots are used and the bubble is the formula's.
static bool full(const Schedule* s) {
    if (s->kind < PIPELINE_DUALPIPEV) return s->M >= s->P;
    return s->M >= 2 * s->P && (s->kind != PIPELINE_DUALPIPE || s->M % 2 == 0);
}

static int most_deferred(const ActionList* list) {
    int deferred = 0, most = 0;
    for (int i = 0; i < list->count; i++) {
        deferred += (list->at[i].kind == ACTION_I) - (list->at[i].kind == ACTION_W);
        most = deferred > most ? deferred : most;
    }
    return most;
}

// Stage k has at most S-k micro-batches alive (2H-h and h+1), and h+1 W's wait.
static bool live_counts_hold(const Schedule* s, const ActionList* list, int rank) {
    int S = schedule_stages(s), far = S - 1 - rank, h = rank < far ? rank : far;
    int fold = s->kind >= PIPELINE_DUALPIPEV, deferred = most_deferred(list);
    for (int k = 0; k < S; k++) {
        bool mine = schedule_rank_of(s, k, 0) == rank || (fold && schedule_rank_of(s, k, 1) == rank);
        int slots = schedule_slots(list, k), most = mine ? S - k : 0, N = schedule_micros(s, 0);
        if (slots > most || slots > N || (full(s) && slots != most)) return false;
    }
    return full(s) ? deferred == fold * (h + 1) : deferred <= fold * (h + 1);
}

// Of the worst rank, with F = I = W = 1 and pairs of `pair`.
static double bubble_of(const Schedule* s, const ActionList* lists, double pair, double* span) {
    double busy[64], bubble = 0;
    StageCost stage[64];
    for (int k = 0; k < schedule_stages(s); k++) stage[k] = (StageCost){1, 0, 1, 1};
    ScheduleCosts costs = {stage, pair / 3, 0};
    *span = schedule_simulate(s, lists, &costs, busy);
    for (int rank = 0; rank < s->P; rank++) bubble = fmax(bubble, *span - busy[rank]);
    return bubble;
}

static bool near(double a, double b) { return fabs(a - b) < 1e-9 * (1 + fabs(b)); }

// Published: (P-1)(F + B), and (H-1)(pair + B - 3W) for pairs that take B or more; F = I = W = 1, B = 2.
static bool bubbles_hold(const Schedule* s, const ActionList* lists) {
    static const double pairs[] = {3, 2.7, 2.3, 2};
    int H = s->kind == PIPELINE_DUALPIPE ? s->P / 2 : s->P;
    for (int k = 0; k < 4 && full(s); k++) {
        double span, formula = (H - 1) * (s->kind == PIPELINE_1F1B ? 3 : pairs[k] - 1);
        if (!near(bubble_of(s, lists, pairs[k], &span), formula)) return false;
    }
    return true;
}

typedef struct { int cases, wrong, wrong_counts, wrong_bubbles, stuck, stuck_one; } Tally;

static void try_schedule(const Schedule* s, bool forward_only, Tally* tally) {
    ActionList* programs = lists_of(s, forward_only, schedule_program);
    ActionList* lists = lists_of(s, forward_only, schedule_actions);
    const char* wrong = check_programs(s, programs, forward_only);
    if (wrong && !tally->wrong++) printf("     %s P %d M %d: %s\n", names[s->kind], s->P, s->M, wrong);
    for (int rank = 0; rank < s->P && !forward_only; rank++)
        tally->wrong_counts += !live_counts_hold(s, &lists[rank], rank);
    tally->wrong_bubbles += !forward_only && !bubbles_hold(s, lists);
    tally->stuck += !rings_end(s, lists, SENDS_LEAVING, RECEIVES_AHEAD) || !rings_end(s, lists, 3, 4);
    tally->stuck_one += !rings_end(s, lists, SENDS_LEAVING - 1, RECEIVES_AHEAD);
    tally->cases++;
    lists_free(lists, s->P);
    lists_free(programs, s->P);
}

static void test_properties(void) {
    for (int kind = PIPELINE_NONE; kind <= PIPELINE_DUALPIPE; kind++) {
        Tally t = {0};
        Error e;
        for (int P = 1; P <= 8; P++)
            for (int M = 1; M <= 4 * P; M++) {
                Schedule s = {kind, P, M};
                for (int forward_only = 0; forward_only < 2 && schedule_fits(&s, &e); forward_only++)
                    try_schedule(&s, forward_only, &t);
            }
        check(t.cases && !t.wrong, "%s: %d cases run without buffering, each action once", names[kind],
              t.cases);
        check(!t.wrong_counts, "%s: as many alive as there are slots", names[kind]);
        check(!t.wrong_bubbles, "%s: the bubble is the formula's", names[kind]);
        check(!t.stuck, "%s: never stuck with %d sends a link and %d receives ahead, nor with 3 and 4",
              names[kind], SENDS_LEAVING, RECEIVES_AHEAD);
        check(kind < PIPELINE_DUALPIPEV || t.stuck_one, "%s: with one send less stuck in %d cases",
              names[kind], t.stuck_one);
    }
}

// ------------------------------------------------------------------------------------------------
// The checker sees mistakes

enum { DELETE, DUPLICATE, SWAP };

// Changes entry i of a list (swap: with the next).
static void mutate(ActionList* list, int how, int i) {
    Action* at = list->at = (Action*)realloc(list->at, (size_t)(list->count + 1) * sizeof(Action));
    Action keep = at[i];
    size_t rest = (size_t)(list->count - i) * sizeof(Action);
    if (how == DELETE) memmove(&at[i], &at[i + 1], rest - sizeof(Action));
    if (how == DUPLICATE) memmove(&at[i + 1], &at[i], rest);
    if (how == SWAP) at[i] = at[i + 1], at[i + 1] = keep;
    list->count += (how == DUPLICATE) - (how == DELETE);
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
    check(tried[DELETE] > 50 && caught[DELETE] == tried[DELETE], "%d deletions caught", tried[DELETE]);
    check(tried[DUPLICATE] > 50 && caught[DUPLICATE] == tried[DUPLICATE], "%d duplications caught",
          tried[DUPLICATE]);
    check(caught[SWAP] > 20, "%d of %d swaps caught; the others are of what is independent", caught[SWAP],
          tried[SWAP]);
}

// ------------------------------------------------------------------------------------------------
// Published figures

// Span and bubble for F = I = W = 1 and pairs of 3, bubbles for pairs of 2.7 and 2, alive on the worst rank.
static const struct {
    int kind, P, M;
    double span, bubble, bubble27, bubble20;
    int alive, deferred;
} published[] = {
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

static void test_published(void) {
    for (size_t k = 0; k < sizeof published / sizeof *published; k++) {
        Schedule s = {published[k].kind, published[k].P, published[k].M};
        ActionList* lists = lists_of(&s, false, schedule_actions);
        double span, other, bubble = bubble_of(&s, lists, 3, &span);
        int most = 0, deferred = 0;
        for (int rank = 0; rank < s.P; rank++) {
            int alive = 0;
            for (int k = 0; k < schedule_stages(&s); k++) alive += schedule_slots(&lists[rank], k);
            most = alive > most ? alive : most;
            deferred = most_deferred(&lists[rank]) > deferred ? most_deferred(&lists[rank]) : deferred;
        }
        check(near(span, published[k].span) && near(bubble, published[k].bubble)
              && near(bubble_of(&s, lists, 2.7, &other), published[k].bubble27)
              && near(bubble_of(&s, lists, 2, &other), published[k].bubble20)
              && most == published[k].alive && deferred == published[k].deferred,
              "%s P %d M %d: span %g, bubble %g, %d alive, %d W deferred", names[s.kind], s.P, s.M, span,
              bubble, most, deferred);
        lists_free(lists, s.P);
    }
}

// The span when all stages cost the same.
static double span_of(int kind, int P, int M, StageCost cost, double pair, double message) {
    Schedule s = {kind, P, M};
    double busy[64];
    StageCost stage[64];
    for (int k = 0; k < schedule_stages(&s); k++) stage[k] = cost;
    ActionList* lists = lists_of(&s, false, schedule_actions);
    ScheduleCosts costs = {stage, pair, message};
    double span = schedule_simulate(&s, lists, &costs, busy);
    lists_free(lists, P);
    return span;
}

// D devices, the same model, 4D micro-batches: a stage of 1f1b and dualpipe is two of dualpipev.
static void test_equal_devices(void) {
    static const double spans[3][6] = {{54, 48, 50, 49, 46.4, 38}, {114, 100, 102, 99, 94.2, 76},
                                       {234, 204, 206, 199, 189.8, 152}};
    StageCost two = {2, 0, 2, 2}, one = {1, 0, 1, 1};
    for (int k = 0, D = 2; k < 3; k++, D *= 2) {
        static const double pairs[] = {1, 0, 2.7 / 3, 2.0 / 3};
        double s[6] = {span_of(PIPELINE_1F1B, D, 4 * D, two, 1, 0),
                       span_of(PIPELINE_DUALPIPE, D, 4 * D, two, 1, 0)};
        bool good = true;
        for (int i = 0; i < 4; i++) s[2 + i] = span_of(PIPELINE_DUALPIPEV, D, 4 * D, one, pairs[i], 0);
        for (int i = 0; i < 6; i++) good = good && near(s[i], spans[k][i]);
        check(good, "%d devices: 1f1b %g, dualpipe %g, dualpipev %g; halves alone %g, pairs of 2.7 %g, 2 %g",
              D, s[0], s[1], s[2], s[3], s[4], s[5]);
    }
}

static void test_messages_and_recompute(void) {
    static const double bubbles[3][2] = {{2.3, 1.7}, {6.9, 5.1}, {17.2, 11.9}};
    StageCost one = {1, 0, 1, 1}, uneven = {1, 0, 1.3, 0.8}, two = {2, 0, 2, 2};
    StageCost late = {1, 0, 1.3, 1}, early = {1, 0.3, 1, 1};
    check(near(span_of(PIPELINE_DUALPIPEV, 4, 16, one, 0, 0.2), 101.6)
          && near(span_of(PIPELINE_DUALPIPEV, 4, 16, uneven, 0, 0.2), 107.2)
          && near(span_of(PIPELINE_1F1B, 4, 16, two, 1, 0.2), 119.6), "messages: 101.6, 107.2 and 119.6");
    check(near(span_of(PIPELINE_1F1B, 2, 1, one, 1, 0.2), 6.4), "two stages, one micro-batch: two messages");
    for (int k = 0, P = 2; k < 3; k++, P *= 2) {
        double work = 3.3 * 8 * P, after = span_of(PIPELINE_DUALPIPEV, P, 4 * P, late, 1, 0) - work;
        double before = span_of(PIPELINE_DUALPIPEV, P, 4 * P, early, 1, 0) - work;
        check(near(after, bubbles[k][0]) && near(before, bubbles[k][1]),
              "P %d: recompute before dx comes: bubble %g, not %g", P, before, after);
    }
}

// ------------------------------------------------------------------------------------------------
// What people see

static bool prints(int kind, int P, int M, const char* expected) {
    char text[4096] = "";
    Schedule s = {kind, P, M};
    FILE* file = fmemopen(text, sizeof text, "w");
    schedule_print(file, &s);
    fclose(file);
    return !strcmp(text, expected);
}

static void test_print(void) {
    check(prints(PIPELINE_DUALPIPEV, 2, 6,
        "rank 0: F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 F0.4&B3.2 F3.3&B0.1 F0.5&B3.3"
        " F3.4&B0.2 B3.4 F3.5&B0.3 B3.5 I0.4 W0.4 I0.5 W0.5\n"
        "rank 1: F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 F1.4&B2.2 F2.4&B1.2"
        " F1.5&B2.3 F2.5&B1.3 B2.4 B1.4 I2.5 I1.5 W2.5 W1.5\n"), "dualpipev, P = 2, M = 6");
    check(prints(PIPELINE_DUALPIPE, 2, 3,
        "rank 0: F0.0 F1.0' F0.1 B1.0' B0.0 I0.1 W0.1\nrank 1: F0.0' F1.0 B1.0 F1.1&B0.0' B1.1\n"),
        "dualpipe, P = 2, M = 3: the second direction has one micro-batch");
    check(prints(PIPELINE_1F1B, 2, 2, "rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1\n")
          && prints(PIPELINE_NONE, 1, 2, "rank 0: F0.0 B0.0 F0.1 B0.1\n"), "1f1b, P = 2, M = 2; none");
}

static void test_limits(void) {
    Error e;
    Schedule odd = {PIPELINE_DUALPIPE, 3, 4}, none = {PIPELINE_NONE, 2, 4}, good = {PIPELINE_DUALPIPE, 4, 5};
    check(!schedule_fits(&odd, &e) && strstr(e.text, "found 3, expected an even"), "refused: %s", e.text);
    check(!schedule_fits(&none, &e) && strstr(e.text, "found 2, expected 1"), "refused: %s", e.text);
    check(schedule_fits(&good, &e) && schedule_global_micro(&good, 0, 2) == 2
          && schedule_global_micro(&good, 1, 1) == 4, "dualpipe, M = 5: the second direction's are last");
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
