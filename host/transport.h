// transport.h: moves bytes between the ranks of a run: processes under MPI, or threads of one process.
// Nothing blocks but opening and closing: a request is posted, then asked after. Messages of one (sender,
// receiver, tag) arrive in the order of their posting; others may overtake. A rank with nothing to do calls
// transport_idle, which ends the run when no request of this rank is done for timeout_s.
//
// `mpirun --bind-to none`: Open MPI binds one or two ranks to a core each, where OpenMP has one thread.
// Waiting ranks sleep: there may be more than cores (--oversubscribe). Where it says `Read -1, expected ..`,
// a container hides memory from it, and OMPI_MCA_btl_vader_single_copy_mechanism=none helps.

#ifndef HOST_TRANSPORT_H
#define HOST_TRANSPORT_H

#include <assert.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

#ifdef HAVE_MPI
#define OMPI_SKIP_MPICXX 1      // C++ sees what C does
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

enum { TAG_LAST = 1 << 30, TAG_REDUCE = -1, TAG_BROADCAST = -2 };       // callers: 0 to TAG_LAST
enum { REQUESTS = 4096, LOOPBACK_DELAY = 32, TIMEOUT_S = 120 };         // open at once; looks; default

typedef struct Loopback Loopback;
typedef struct Request {        // a send or a receive
    bool open, sending, done;
    bool copied;                // a send's copy, of which nobody asks whether it is done
    int peer, from, tag, delay;
    unsigned char* bytes;       // (count)
    size_t count;
    struct Request* next;
#ifdef HAVE_MPI
    MPI_Request mpi;
#endif
} Request;

typedef struct {
    int rank, size;
    char name[128];             // "one process", "4 threads", "MPI 3.1 (Open MPI v4.1.4)"
    double timeout_s, idle_s;   // idling at most, and since a request was done
    int spins;
    Loopback* loopback;         // NULL: MPI
    Request *sends, *receives;  // loopback: those to this rank that have not met, in the order of posting
    Request requests[REQUESTS];
} Transport;

// ------------------------------------------------------------------------------------------------
// Loopback: every rank is a thread. A receive and the first send of its sender and tag meet when the later
// of them is posted; only then a send is done, as a large one of MPI is. Under a seed sends wait until the
// receiver has looked some times, so that others overtake; half are copied and done at once, as small ones.

struct Loopback {
    int size;
    uint64_t seed, posted;
    pthread_mutex_t mutex;      // of the requests of all ranks
    Transport* ranks;           // (size)
};

static inline Request** request_first(Request** list, const Request* like) {
    while (*list && ((*list)->from != like->from || (*list)->tag != like->tag)) list = &(*list)->next;
    return list;
}

// Hands over what has met. A receive behind another of its sender and tag waits for its turn.
static inline void loopback_deliver(Transport* to) {
    for (Request** at = &to->receives; *at;) {
        Request *receive = *at, **found = request_first(&to->sends, receive), *send = *found;
        if (request_first(&to->receives, receive) != at || !send || send->delay-- > 0) {
            at = &receive->next;
            continue;
        }
        assert(send->count == receive->count);
        if (send->count) memcpy(receive->bytes, send->bytes, send->count);
        *at = receive->next;
        *found = send->next;
        receive->done = send->done = true;
        if (send->copied) free(send->bytes), free(send);
    }
}

static inline void loopback_post(Transport* t, Request* r) {
    Loopback* l = t->loopback;
    Transport* to = r->sending ? &l->ranks[r->peer] : t;
    Request** end = r->sending ? &to->sends : &to->receives;
    pthread_mutex_lock(&l->mutex);
    uint64_t chance = r->sending && l->seed ? hash64(l->seed, l->posted++) : 0;
    if (chance >> 63) {
        Request* copy = (Request*)memcpy(allocate(1, sizeof *r), r, sizeof *r);
        copy->bytes = (unsigned char*)allocate(r->count, 1);
        if (r->count) memcpy(copy->bytes, r->bytes, r->count);
        copy->copied = r->done = true;
        r = copy;
    }
    r->delay = (int)(chance % LOOPBACK_DELAY);
    while (*end) end = &(*end)->next;
    *end = r;
    loopback_deliver(to);
    pthread_mutex_unlock(&l->mutex);
}

static inline bool loopback_done(Transport* t, const Request* r) {
    pthread_mutex_lock(&t->loopback->mutex);
    loopback_deliver(t);
    bool done = r->done;
    pthread_mutex_unlock(&t->loopback->mutex);
    return done;
}

static inline Loopback* loopback_open(int size, uint64_t seed) {
    Loopback* l = (Loopback*)allocate(1, sizeof *l);
    l->size = size;
    l->seed = seed;
    pthread_mutex_init(&l->mutex, NULL);
    l->ranks = (Transport*)allocate((size_t)size, sizeof *l->ranks);
    for (int rank = 0; rank < size; rank++) {
        Transport* t = &l->ranks[rank];
        t->rank = rank;
        t->size = size;
        t->timeout_s = TIMEOUT_S;
        t->loopback = l;
        snprintf(t->name, sizeof t->name, size == 1 ? "one process" : "%d threads", size);
    }
    return l;
}

static inline Transport* loopback_rank(Loopback* l, int rank) { return &l->ranks[rank]; }

static inline void loopback_close(Loopback* l) {
    for (int rank = 0; rank < l->size; rank++) assert(!l->ranks[rank].sends && !l->ranks[rank].receives);
    pthread_mutex_destroy(&l->mutex);
    free(l->ranks);
    free(l);
}

// ------------------------------------------------------------------------------------------------
// MPI. Every message is one of its own, also above the 2^31 - 1 bytes that its counts can say. Each MPI has
// a largest tag: the upper part of others chooses a communicator. The world's is for this file's tags.

#ifdef HAVE_MPI
enum { MPI_BLOCK = 64, MPI_COMMS = 16 };        // bytes; communicators at most
static MPI_Comm mpi_comms[MPI_COMMS];
static long mpi_tags;                           // in each
static size_t mpi_large = INT_MAX;              // bytes; above, a type made of blocks

static inline MPI_Datatype mpi_large_type(size_t count) {
    MPI_Datatype types[2] = {MPI_BYTE, MPI_BYTE}, large;
    int lengths[2] = {(int)(count / MPI_BLOCK), (int)(count % MPI_BLOCK)};
    MPI_Aint places[2] = {0, (MPI_Aint)(count / MPI_BLOCK * MPI_BLOCK)};
    assert(count / MPI_BLOCK <= INT_MAX);
    MPI_Type_contiguous(MPI_BLOCK, MPI_BYTE, &types[0]);
    MPI_Type_create_struct(2, lengths, places, types, &large);
    MPI_Type_commit(&large);
    MPI_Type_free(&types[0]);
    return large;
}

static inline void mpi_post(Request* r) {
    bool large = r->count > mpi_large;
    MPI_Datatype type = large ? mpi_large_type(r->count) : MPI_BYTE;
    int count = large ? 1 : (int)r->count;
    int tag = (int)(r->tag < 0 ? -r->tag : r->tag % mpi_tags);
    if (r->tag / mpi_tags >= MPI_COMMS)
        die("MPI: found tag %d, expected at most %ld, use another MPI", r->tag, MPI_COMMS * mpi_tags - 1);
    MPI_Comm comm = r->tag < 0 ? MPI_COMM_WORLD : mpi_comms[r->tag / mpi_tags];
    if (r->sending) MPI_Isend(r->bytes, count, type, r->peer, tag, comm, &r->mpi);
    else MPI_Irecv(r->bytes, count, type, r->peer, tag, comm, &r->mpi);
    if (large) MPI_Type_free(&type);            // lives on until the message is done
}

static inline bool mpi_done(Request* r) {
    MPI_Status status;
    MPI_Count found;
    int done;
    MPI_Test(&r->mpi, &done, &status);
    if (!done || r->sending) return done;
    MPI_Get_elements_x(&status, MPI_BYTE, &found);
    assert((size_t)found == r->count);
    return true;
}

static inline Transport* mpi_open(int* argc, char*** argv) {
    Transport* t = (Transport*)allocate(1, sizeof *t);
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int level, length, version, minor, found, *last_tag;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &t->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &t->size);
    MPI_Get_version(&version, &minor);
    MPI_Get_library_version(library, &length);
    library[strcspn(library, ",\n")] = 0;       // "Open MPI v4.1.4", "MPICH Version:\t4.0.2"
    for (char* c = library; *c; c++) *c = *c == '\t' ? ' ' : *c;
    snprintf(t->name, sizeof t->name, "MPI %d.%d (%.80s)", version, minor, library);
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, (void*)&last_tag, &found);
    mpi_tags = (long)*last_tag + 1;
    for (int c = 0; c < MPI_COMMS && c <= TAG_LAST / mpi_tags; c++)
        MPI_Comm_dup(MPI_COMM_WORLD, &mpi_comms[c]);
    return t;
}
#endif

// ------------------------------------------------------------------------------------------------
// Messages. Buffers are untouched by the caller from the post until transport_done says true.

static inline int transport_post(Transport* t, bool sending, int peer, int tag, void* bytes, size_t count) {
    int request = 0;
    assert(peer >= 0 && peer < t->size && tag >= TAG_BROADCAST && tag <= TAG_LAST);
    while (request < REQUESTS && t->requests[request].open) request++;
    if (request == REQUESTS) die("rank %d: found %d requests open, expected fewer", t->rank, request);
    Request* r = &t->requests[request];
    memset(r, 0, sizeof *r);
    r->open = true;
    r->sending = sending;
    r->peer = peer, r->from = sending ? t->rank : peer;
    r->tag = tag;
    r->bytes = (unsigned char*)bytes, r->count = count;
#ifdef HAVE_MPI
    if (!t->loopback) return mpi_post(r), request;
#endif
    return loopback_post(t, r), request;
}

static inline int transport_send(Transport* t, int peer, int tag, const void* bytes, size_t count) {
    return transport_post(t, true, peer, tag, (void*)(uintptr_t)bytes, count);
}

static inline int transport_receive(Transport* t, int peer, int tag, void* bytes, size_t count) {
    return transport_post(t, false, peer, tag, bytes, count);
}

// Ends every rank at once.
static inline void transport_abort(Transport* t, int status) {
    fflush(NULL);
#ifdef HAVE_MPI
    if (!t->loopback) MPI_Abort(MPI_COMM_WORLD, status);
#endif
    (void)t;
    _exit(status);
}

// Resets the clock of idling.
static inline void transport_progressed(Transport* t) { t->idle_s = t->spins = 0; }

// True: the request is done, and gone. Makes progress for all requests, never blocks.
static inline bool transport_done(Transport* t, int request) {
    Request* r = &t->requests[request];
    assert(r->open);
#ifdef HAVE_MPI
    bool done = t->loopback ? loopback_done(t, r) : mpi_done(r);
#else
    bool done = loopback_done(t, r);
#endif
    if (done) transport_progressed(t);
    return r->open = !done, done;
}

// For a rank that can do nothing else; `waiting` says why. The clock counts time in here alone: computing is
// no stall. And little of it each time, so that a run that was stopped as a whole goes on.
static inline void transport_idle(Transport* t, const char* waiting) {
    struct timespec pause = {0, 30000}, start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (t->spins++ < 50) sched_yield();
    else nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double passed = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    t->idle_s += passed < 0.1 ? passed : 0.1;
    if (t->idle_s < t->timeout_s) return;
    fprintf(stderr, "rank %d: no progress for %.3g s: %s\n", t->rank, t->timeout_s, waiting);
    usleep(200000);             // ranks that wait as long say so too
    transport_abort(t, STATUS_STALLED);
}

static inline void transport_wait(Transport* t, int request, const char* waiting) {
    while (!transport_done(t, request)) transport_idle(t, waiting);
}

// ------------------------------------------------------------------------------------------------
// What all ranks do together, along a binomial tree: a rank's parent is its number without its lowest bit.

static inline void tree_wait(Transport* t, int request, const char* what) {
    char waiting[64];
    snprintf(waiting, sizeof waiting, "waiting for rank %d in %s", t->requests[request].peer, what);
    transport_wait(t, request, waiting);
}

static inline void transport_broadcast(Transport* t, int from, void* bytes, size_t count) {
    int P = t->size, me = (t->rank - from + P) % P, lowest = me & -me, sends[32], sent = 0;
    int parent = (me - lowest + from) % P;
    if (me) tree_wait(t, transport_receive(t, parent, TAG_BROADCAST, bytes, count), "a broadcast");
    for (int bit = 1; me + bit < P && (!me || bit < lowest); bit *= 2)
        sends[sent++] = transport_send(t, (me + bit + from) % P, TAG_BROADCAST, bytes, count);
    while (sent--) tree_wait(t, sends[sent], "a broadcast");
}

static inline void transport_reduce(Transport* t, double* values, int count, bool largest) {
    size_t size = (size_t)count * sizeof *values;
    double* other = (double*)allocate((size_t)count, sizeof *values);
    int bit = 1;
    for (; !(t->rank & bit) && bit < t->size; bit *= 2) {
        if (t->rank + bit >= t->size) continue;
        tree_wait(t, transport_receive(t, t->rank + bit, TAG_REDUCE, other, size), "a sum");
        for (double *a = values, *b = other; a < values + count; a++, b++)
            *a = !largest ? *a + *b : *a != *a || *a >= *b ? *a : *b;
    }
    if (t->rank) tree_wait(t, transport_send(t, t->rank - bit, TAG_REDUCE, values, size), "a sum");
    free(other);
    transport_broadcast(t, 0, values, size);
}

// v (n), over all ranks, in one order always: zero on all but one comes out as it is. NaN is largest.
static inline void transport_sum(Transport* t, double* v, int n) { transport_reduce(t, v, n, false); }
static inline void transport_max(Transport* t, double* v, int n) { transport_reduce(t, v, n, true); }

// e: the first line in which the fields of a rank differ from those expected, rank 0's
static inline bool fields_agree(const char* fields, const char* expected, int rank, Error* e) {
    for (int a, b; *fields || *expected;) {
        a = (int)strcspn(fields, "\n"), b = (int)strcspn(expected, "\n");
        if (a != b || memcmp(fields, expected, (size_t)a))
            return fail(e, "rank %d: found %.*s, expected %.*s as on rank 0, start all ranks alike", rank,
                        a ? a : 7, a ? fields : "nothing", b ? b : 7, b ? expected : "nothing");
        fields += a + (fields[a] == '\n');
        expected += b + (expected[b] == '\n');
    }
    return true;
}

// fields: lines `name = value`. False on every rank where any rank's differ from rank 0's; e says how.
static inline bool transport_agree(Transport* t, const char* fields, Error* e) {
    size_t size = strlen(fields) + 1;
    transport_broadcast(t, 0, &size, sizeof size);
    char* expected = (char*)allocate(size, 1);
    if (!t->rank) memcpy(expected, fields, size);
    transport_broadcast(t, 0, expected, size);
    double differs = fields_agree(fields, expected, t->rank, e) ? 0 : t->size - t->rank;
    free(expected);
    transport_max(t, &differs, 1);
    if (differs > 0) transport_broadcast(t, t->size - (int)differs, e, sizeof *e);
    return differs == 0;
}

// Ranks of MPI where mpirun or srun started us, else one. Where MPI knows of fewer, each would train alone.
static inline Transport* transport_open(int* argc, char*** argv) {
    static const char* const names[][2] = {{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
                                           {"PMI_SIZE", "PMI_RANK"},
                                           {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"}};
    const char *size = NULL, *rank = NULL;
    for (int n = 0; n < 3 && !size; n++) size = getenv(names[n][0]), rank = getenv(names[n][1]);
    int expected = size ? atoi(size) : 1;
    Transport* t = NULL;
#ifdef HAVE_MPI
    if (expected > 1 || getenv("PMIX_RANK") || getenv("PMI_RANK")) t = mpi_open(argc, argv);
#endif
    (void)argc, (void)argv;
    if (!t) t = loopback_rank(loopback_open(1, 0), 0);
    t->timeout_s = TIMEOUT_S;
    if (expected <= 1 || t->size == expected) return t;
    if (rank && strcmp(rank, "0")) exit(STATUS_USAGE);          // the first alone says it
    die("mpirun: found %d ranks, expected %d of %s: use the mpirun of its MPI, or srun --mpi=pmix", expected,
        t->size, t->name);
    return NULL;
}

// For what transport_open gave. All ranks wait here, by the clock that MPI_Finalize does not have.
static inline void transport_close(Transport* t) {
    transport_sum(t, NULL, 0);
    for (int request = 0; request < REQUESTS; request++) assert(!t->requests[request].open);
    if (t->loopback) loopback_close(t->loopback);
#ifdef HAVE_MPI
    else MPI_Finalize(), free(t);
#endif
}

#endif
