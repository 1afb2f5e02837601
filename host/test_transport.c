// test_transport.c: the transport between threads of this program; or, started by mpirun with an argument, between ranks
// of MPI (dev/test_transport.sh). The same exercise for both: known bytes, counted mistakes.

#include <sys/stat.h>
#include <sys/wait.h>
#include <math.h>

#include "check.h"
#include "transport.h"

enum { STALL_S = 1 };           // --timeout of the tests

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
    int P = t->size, wrong = 0, sends[64], receives[64];
    unsigned char *out[64], *in[64];
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
    for (int peer = 0; peer < P; peer++) transport_wait(t, sends[peer], "waiting for an exchange to be received");
    for (int peer = 0; peer < P; peer++) free(out[peer]);
    return wrong;
}

// To the next rank in a ring: many messages of few tags, sizes on both sides of 4 KB, received tag by tag from the last.
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

static int together(Transport* t) {
    int P = t->size, wrong = 0;
    double values[4] = {t->rank + 1, t->rank == P - 1 ? 0.1 : 0, ldexp(1, t->rank), t->rank == P / 2 ? NAN : 1};
    double most[3] = {-t->rank, t->rank, t->rank == P / 2 ? NAN : t->rank};
    transport_sum(t, values, 4);
    wrong += values[0] != P * (P + 1) / 2 || values[1] != 0.1 || values[2] != ldexp(1, P) - 1 || !isnan(values[3]);
    transport_max(t, most, 3);
    wrong += most[0] != 0 || most[1] != P - 1 || !isnan(most[2]);
    for (int from = 0; from < P; from++) {
        size_t count = from % 2 ? 100000 : 10;
        unsigned char* bytes = known_bytes(t->rank, from, 0, count);
        transport_broadcast(t, from, bytes, count);
        wrong += wrong_bytes(bytes, from, from, 0, count);
        free(bytes);
    }
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
    pthread_t ids[64];
    Thread threads[64];
    Loopback* loopback = loopback_open(P, seed);
    int wrong = 0;
    for (int rank = 0; rank < P; rank++) {
        threads[rank].t = loopback_rank(loopback, rank);
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

int main(void) {
    for (int P = 1; P <= 9; P += P < 5 ? 1 : 2) check(!run_threads(P, 0, exercise), "%d threads", P);
    int wrong = 0;
    for (uint64_t seed = 1; seed <= 100; seed++) wrong += run_threads(2 + (int)seed % 4, seed, exercise);
    check(!wrong, "100 seeds of delays: the same bytes");
    return check_summary();
}
