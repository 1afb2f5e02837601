// test_transport.c: the transport between threads of this program; or, started by mpirun with an argument,
// between ranks of MPI (dev/test_transport.sh). The same exercise for both: known bytes, counted mistakes.

#include <math.h>
#include <signal.h>
#include <sys/wait.h>

#include "check.h"
#include "transport.h"

enum { MOST_RANKS = 16 };
#define STALL_S 0.5             // time-out of those that shall run into it

// ------------------------------------------------------------------------------------------------
// The exercise. Each part runs on every rank and returns how many values were wrong there.

// What rank `from` sends as message k of a tag
static unsigned char* known_bytes(int from, int tag, int k, size_t count) {
    unsigned char* bytes = (unsigned char*)allocate(count, 1);
    uint64_t state = mix64((uint64_t)(from * 1000003 + tag * 1009 + k));
    for (size_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        bytes[i] = (unsigned char)(state >> 56);
    }
    return bytes;
}

static int wrong_bytes(const unsigned char* bytes, int from, int tag, int k, size_t count) {
    unsigned char* expected = known_bytes(from, tag, k, count);
    int wrong = count && memcmp(bytes, expected, count);
    free(expected);
    return wrong;
}

// Every rank sends one message to each rank, itself too, and all are under way at once, in both directions.
static int exchange(Transport* t, size_t count) {
    int P = t->size, wrong = 0, sends[MOST_RANKS], receives[MOST_RANKS];
    unsigned char *out[MOST_RANKS], *in[MOST_RANKS];
    for (int peer = 0; peer < P; peer++) {
        out[peer] = known_bytes(t->rank, peer, 0, count);
        in[peer] = (unsigned char*)allocate(count, 1);
        sends[peer] = transport_send(t, peer, 7, out[peer], count);
    }
    for (int peer = 0; peer < P; peer++) receives[peer] = transport_receive(t, peer, 7, in[peer], count);
    for (int peer = P - 1; peer >= 0; peer--) {
        transport_wait(t, receives[peer], "waiting for an exchange");
        wrong += wrong_bytes(in[peer], peer, t->rank, 0, count);
        free(in[peer]);
    }
    for (int peer = 0; peer < P; peer++) transport_wait(t, sends[peer], "waiting for an exchange");
    for (int peer = 0; peer < P; peer++) free(out[peer]);
    return wrong;
}

// To the next rank in a ring: many messages of few tags, sizes on both sides of 4 KB, received tag by tag.
// Those of one tag must come in order, however the tags overtake.
static int many(Transport* t) {
    enum { TAGS = 4, EACH = 25, MOST = 6000 };
    static const int tags[TAGS] = {0, 1, 65536, TAG_LAST};
    int next = (t->rank + 1) % t->size, last = (t->rank + t->size - 1) % t->size, wrong = 0;
    int sends[TAGS * EACH], receives[TAGS * EACH];
    unsigned char *out[TAGS * EACH], *in[TAGS * EACH];
    for (int m = 0; m < TAGS * EACH; m++) {
        size_t count = (size_t)(m * 977 % MOST);
        out[m] = known_bytes(t->rank, m % TAGS, m / TAGS, count);
        sends[m] = transport_send(t, next, tags[m % TAGS], out[m], count);
    }
    for (int tag = TAGS - 1; tag >= 0; tag--)
        for (int k = 0; k < EACH; k++) {
            int m = k * TAGS + tag;
            in[m] = (unsigned char*)allocate(MOST, 1);
            receives[m] = transport_receive(t, last, tags[tag], in[m], (size_t)(m * 977 % MOST));
        }
    for (int left = 2 * TAGS * EACH; left;) {
        int before = left;
        for (int m = 0; m < TAGS * EACH; m++) {
            if (receives[m] >= 0 && transport_done(t, receives[m])) receives[m] = -1, left--;
            if (sends[m] >= 0 && transport_done(t, sends[m])) sends[m] = -1, left--;
        }
        if (left == before) transport_idle(t, "waiting for many messages");
    }
    for (int m = 0; m < TAGS * EACH; m++) {
        wrong += wrong_bytes(in[m], last, m % TAGS, m / TAGS, (size_t)(m * 977 % MOST));
        free(in[m]), free(out[m]);
    }
    return wrong;
}

static int broadcast(Transport* t, int from, size_t count) {
    unsigned char* bytes = known_bytes(t->rank, from, 0, count);
    transport_broadcast(t, from, bytes, count);
    int wrong = wrong_bytes(bytes, from, from, 0, count);
    free(bytes);
    return wrong;
}

static int together(Transport* t) {
    int P = t->size, wrong = 0;
    double rank = t->rank, odd = t->rank == P / 2 ? NAN : rank, order[MOST_RANKS];
    double values[5] = {rank + 1, t->rank == P - 1 ? 0.1 : 0, ldexp(1, t->rank), odd, 1 / (rank + 3)};
    double most[3] = {-rank, rank, odd};
    for (int r = 0; r < P; r++) order[r] = 1 / (r + 3.0);
    for (int bit = 1; bit < P; bit *= 2)
        for (int r = 0; r + bit < P; r += 2 * bit) order[r] += order[r + bit];
    transport_sum(t, values, 5);
    wrong += values[0] != P * (P + 1) / 2 || values[1] != 0.1 || values[2] != ldexp(1, P) - 1;
    wrong += !isnan(values[3]) || values[4] != order[0];
    transport_max(t, most, 3);
    wrong += most[0] != 0 || most[1] != P - 1 || !isnan(most[2]);
    for (int from = 0; from < P; from++) wrong += broadcast(t, from, from % 2 ? 100000 : 10);
    return wrong;
}

static int exercise(Transport* t) {
    static const size_t sizes[] = {0, 1, 4000, 5000, 65536 + 1};
    int wrong = together(t) + many(t);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) wrong += exchange(t, sizes[i]);
    return wrong + together(t);
}

// ------------------------------------------------------------------------------------------------
// Threads

typedef struct { Transport* t; int (*work)(Transport*); int wrong; } Thread;

static void* thread_main(void* argument) {
    Thread* thread = (Thread*)argument;
    thread->wrong = thread->work(thread->t);
    return NULL;
}

// How many values were wrong, over all ranks
static int run_threads(int P, uint64_t seed, int (*work)(Transport*)) {
    pthread_t ids[MOST_RANKS];
    Thread threads[MOST_RANKS];
    Loopback* loopback = loopback_open(P, seed);
    int wrong = 0;
    for (int rank = 0; rank < P; rank++) {
        threads[rank].t = loopback_rank(loopback, rank);
        threads[rank].t->timeout_s = 20;
        threads[rank].work = work;
        pthread_create(&ids[rank], NULL, thread_main, &threads[rank]);
    }
    for (int rank = 0; rank < P; rank++) {
        pthread_join(ids[rank], NULL);
        wrong += threads[rank].wrong;
    }
    loopback_close(loopback);
    return wrong;
}

// A send is done when it is received, one that was copied before; each is received once.
static void check_meeting(void) {
    int copied = 0, early = 0;
    for (uint64_t seed = 0; seed < 64; seed++) {
        Loopback* l = loopback_open(2, seed);
        Transport *a = loopback_rank(l, 0), *b = loopback_rank(l, 1);
        int out = 5, in = 0, looks = 0, send = transport_send(a, 1, 3, &out, sizeof out);
        bool sent = transport_done(a, send);
        copied += sent;
        if (sent) out = 6;      // the buffer is ours again
        int receive = transport_receive(b, 0, 3, &in, sizeof in);
        while (!transport_done(b, receive)) looks++;
        early += looks == 0;
        check(in == 5 && looks <= LOOPBACK_DELAY && (sent || transport_done(a, send)),
              "seed %d: sent %s, after %d looks", (int)seed, sent ? "before" : "when received", looks);
        if (!seed) check(!sent && !looks, "without a seed: done when it is received, at once");
        loopback_close(l);
    }
    check(copied > 16 && copied < 48 && early < 16, "%d of 64 were copied, %d came at once", copied, early);
}

// ------------------------------------------------------------------------------------------------
// Ranks that disagree, stand still or should not be

// Options; from the middle one on, ranks have others.
static bool agree(Transport* t, const char* others, Error* e) {
    bool other = t->rank && t->rank >= t->size / 2;
    return transport_agree(t, other ? others : "build = 1a2b\nlr = 0.001\nseed = 1337\n", e);
}

static void expect(int* wrong, bool agreed, const Error* e, const char* line) {
    *wrong += agreed != !line || (line && strcmp(e->text, line));
}

static int agreements(Transport* t) {
    int wrong = 0;
    Error e;
    char line[256], *end = line + snprintf(line, sizeof line, "rank %d: ", t->size > 3 ? t->size / 2 : 1);
    size_t room = sizeof line - (size_t)(end - line);
    expect(&wrong, agree(t, "build = 1a2b\nlr = 0.001\nseed = 1337\n", &e), &e, NULL);
    snprintf(end, room, "found lr = 0.002, expected lr = 0.001 as on rank 0, start all ranks alike");
    expect(&wrong, agree(t, "build = 1a2b\nlr = 0.002\nseed = 1338\n", &e), &e, line);
    snprintf(end, room, "found nothing, expected seed = 1337 as on rank 0, start all ranks alike");
    expect(&wrong, agree(t, "build = 1a2b\nlr = 0.001\n", &e), &e, line);
    snprintf(end, room, "found new = 1, expected nothing as on rank 0, start all ranks alike");
    expect(&wrong, agree(t, "build = 1a2b\nlr = 0.001\nseed = 1337\nnew = 1\n", &e), &e, line);
    return wrong;
}

// Rank 1 of 2 never comes.
static void wait_for_nobody(void) {
    Transport* t = loopback_rank(loopback_open(2, 0), 0);
    double value = 1;
    t->timeout_s = STALL_S;
    transport_sum(t, &value, 1);
}

static void idle(Transport* t) {
    double until = t->idle_s + 0.7 * STALL_S;
    while (t->idle_s < until) transport_idle(t, "idling");
}

// Idles shorter than the time-out, has a message, idles again, says that it did something, computes longer.
static void compute(void) {
    Transport* t = loopback_rank(loopback_open(2, 0), 0);
    char out = 1, in = 0;
    t->timeout_s = STALL_S;
    idle(t);
    int send = transport_send(t, 0, 0, &out, 1), receive = transport_receive(t, 0, 0, &in, 1);
    if (!transport_done(t, receive) || !transport_done(t, send) || in != out) _exit(1);
    idle(t);
    transport_progressed(t);
    for (int i = 0; i < 3; i++) {
        usleep((useconds_t)(1e6 * STALL_S));
        transport_idle(t, "computing");
    }
    _exit(0);
}

// Runs work in a child, stopped for twice the time-out if so: it must end with this status and these words.
static void check_end(void (*work)(void), bool stopped, int status, const char* what, const char* words) {
    int ends[2], ended;
    char said[512] = "";
    fflush(stdout);
    if (pipe(ends)) die("no pipe");
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], STDERR_FILENO);
        work();
        _exit(99);
    }
    close(ends[1]);
    if (stopped) {
        usleep(50000);
        kill(child, SIGSTOP);
        usleep((useconds_t)(2e6 * STALL_S));
        kill(child, SIGCONT);
    }
    for (size_t got = 0; got < sizeof said - 1;) {
        ssize_t more = read(ends[0], said + got, sizeof said - 1 - got);
        if (more <= 0) break;
        got += (size_t)more;
    }
    close(ends[0]);
    waitpid(child, &ended, 0);
    check(WIFEXITED(ended) && WEXITSTATUS(ended) == status && !strcmp(said, words), "%s: %s", what, said);
}

// ------------------------------------------------------------------------------------------------
// Under mpirun. Argument 1 is what all ranks do; or what the last one does while the others wait, after
// all have written their process into file 2.

static void part(Transport* t, const char* how, const char* file) {
    double all = 1;
    FILE* f = fopen(file, "a");
    fprintf(f, "%d\n", (int)getpid());
    fclose(f);
    t->timeout_s = STALL_S;
    transport_sum(t, &all, 1);
    if (t->rank < t->size - 1) return;
    if (!strcmp(how, "exit")) exit(3);
    if (!strcmp(how, "sleep")) sleep(60);
    raise(!strcmp(how, "stop") ? SIGSTOP : SIGKILL);
}

static int rank_main(int argc, char** argv) {
    Transport* t = transport_open(&argc, &argv);
    const char* mode = argv[1];
    double wrong = 0;
    t->timeout_s = 20;
#ifdef HAVE_MPI
    if (!strcmp(mode, "blocks")) mpi_large = 1000;
#endif
    if (!strcmp(mode, "broadcast")) wrong = broadcast(t, 0, (size_t)atoll(argv[2]));
    else if (argc > 2) part(t, mode, argv[2]);
    else wrong = exercise(t) + exchange(t, 1 << 20) + (t->size > 1 ? agreements(t) : 0);
    transport_sum(t, &wrong, 1);
    if (!t->rank) printf("%d wrong on %d ranks of %s\n", (int)wrong, t->size, t->name);
    transport_close(t);
    return wrong != 0;
}

int main(int argc, char** argv) {
    if (argc > 1) return rank_main(argc, argv);
    for (int P = 1; P <= 9; P += P < 5 ? 1 : 2) {
        check(!run_threads(P, 0, exercise), "%d threads exchange known bytes", P);
        if (P > 1) check(!run_threads(P, 0, agreements), "%d threads agree, or all say where not", P);
    }
    int wrong = 0;
    for (uint64_t seed = 1; seed <= 100; seed++) wrong += run_threads(2 + (int)seed % 4, seed, exercise);
    check(!wrong, "100 seeds of delays: the same bytes");
    check_meeting();
    check_end(wait_for_nobody, false, STATUS_STALLED, "a stall",
              "rank 0: no progress for 0.5 s: waiting for rank 1 in a sum\n");
    check_end(compute, true, 0, "computing, or being stopped, is no stall", "");
    return check_summary();
}
