// transport.h: moves bytes between the ranks of a run: processes under MPI, or threads of one process (loopback).
//
// Nothing here blocks but opening and closing: requests are posted, asked after, and a rank that has nothing to do calls
// transport_idle, which ends the run when no request of this rank is done for timeout_s. Messages of one
// (sender, receiver, tag) arrive in the order of their posting; what has different tags may overtake.
//
// Start ranks with `mpirun --bind-to none`: bound to a core, as Open MPI does with one or two ranks, a rank has one OpenMP
// thread. Waiting ranks sleep, so more ranks than cores do no harm (Open MPI: --oversubscribe). In containers where Open
// MPI says `Read -1, expected ..`, processes may not read each other's memory: OMPI_MCA_btl_vader_single_copy_mechanism=none.

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
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

enum {
    TAG_LAST = 1 << 30,                         // of callers; the tags above are of this file
    TAG_REDUCE,
    TAG_BROADCAST,
    TAG_AGREE,
};

typedef struct Loopback Loopback;
typedef struct Parcel Parcel;

typedef struct {                // what was posted and not yet found done
    bool open, sending;
    int peer, tag;
    size_t count;
    Parcel* parcel;             // loopback
#ifdef HAVE_MPI
    MPI_Request mpi;
#endif
} Request;

typedef struct {
    int rank, size;
    char name[128];             // "one process", "4 threads", "MPI 3.1 (Open MPI v4.1.4)"
    double timeout_s;           // of idling without a request done, then the run ends with STATUS_STALLED
    double idle_s;              // so far
    int spins;
    Loopback* loopback;         // NULL: MPI
    Request* requests;
    int capacity;
} Transport;

// ------------------------------------------------------------------------------------------------
// Loopback: every rank is a thread. A receive and the first message of its sender and tag meet under a mutex,
// when the later of the two is posted; a send is done when it has met its receive, as MPI's large messages are.
// Under a seed, messages wait until their receiver has looked some times, so that others overtake them, and
// half of them are copied at once and done, as MPI's small messages are.

enum { LOOPBACK_DELAY = 32 };   // looks, at most

struct Parcel {                 // a send or a receive that has been posted
    Parcel* next;
    int from, tag, delay;
    unsigned char* bytes;       // (count)
    size_t count;
    bool copied, done;          // copied: the bytes are ours, nobody asks whether it is done
};

typedef struct { Parcel *sends, *receives; } Mailbox;       // of one receiver, in the order of posting

struct Loopback {
    int size;
    uint64_t seed, posted;
    pthread_mutex_t mutex;
    Mailbox* mailboxes;         // (size)
    Transport* ranks;           // (size)
};

static inline Parcel** parcel_first(Parcel** list, const Parcel* like) {
    while (*list && ((*list)->from != like->from || (*list)->tag != like->tag)) list = &(*list)->next;
    return list;
}

static inline void parcel_append(Parcel** list, Parcel* parcel) {
    while (*list) list = &(*list)->next;
    *list = parcel;
}

// Hands over what has met. A receive behind another of its sender and tag waits for its turn.
static inline void loopback_deliver(Mailbox* box) {
    for (Parcel **at = &box->receives, *receive; (receive = *at);) {
        Parcel **found = parcel_first(&box->sends, receive), *send = *found;
        bool first = parcel_first(&box->receives, receive) == at;
        if (!first || !send || send->delay-- > 0) {
            at = &receive->next;
            continue;
        }
        if (send->count != receive->count)
            die("a message from rank %d, tag %d: found %zu bytes, expected %zu", send->from, send->tag,
                send->count, receive->count);
        if (send->count) memcpy(receive->bytes, send->bytes, send->count);
        *at = receive->next, *found = send->next;
        receive->done = send->done = true;
        if (send->copied) free(send->bytes), free(send);
    }
}

static inline void loopback_post(Transport* t, Request* r, void* bytes) {
    Loopback* l = t->loopback;
    Mailbox* box = &l->mailboxes[r->sending ? r->peer : t->rank];
    Parcel* parcel = (Parcel*)allocate(1, sizeof *parcel);
    parcel->from = r->sending ? t->rank : r->peer;
    parcel->tag = r->tag;
    parcel->bytes = (unsigned char*)bytes;
    parcel->count = r->count;
    pthread_mutex_lock(&l->mutex);
    if (r->sending && l->seed) {
        uint64_t chance = hash64(l->seed, l->posted++);
        parcel->delay = (int)(chance % LOOPBACK_DELAY);
        parcel->copied = chance >> 63;
    }
    if (parcel->copied) {
        parcel->bytes = (unsigned char*)allocate(r->count, 1);
        if (r->count) memcpy(parcel->bytes, bytes, r->count);
    }
    r->parcel = parcel->copied ? NULL : parcel;
    parcel_append(r->sending ? &box->sends : &box->receives, parcel);
    loopback_deliver(box);
    pthread_mutex_unlock(&l->mutex);
}

static inline bool loopback_done(Transport* t, Request* r) {
    pthread_mutex_lock(&t->loopback->mutex);
    loopback_deliver(&t->loopback->mailboxes[t->rank]);
    bool done = !r->parcel || r->parcel->done;
    pthread_mutex_unlock(&t->loopback->mutex);
    if (done) free(r->parcel);
    return done;
}

static inline Loopback* loopback_open(int size, uint64_t seed) {
    Loopback* l = (Loopback*)allocate(1, sizeof *l);
    l->size = size;
    l->seed = seed;
    pthread_mutex_init(&l->mutex, NULL);
    l->mailboxes = (Mailbox*)allocate((size_t)size, sizeof *l->mailboxes);
    l->ranks = (Transport*)allocate((size_t)size, sizeof *l->ranks);
    for (int rank = 0; rank < size; rank++) {
        Transport* t = &l->ranks[rank];
        t->rank = rank;
        t->size = size;
        t->timeout_s = 120;
        t->loopback = l;
        snprintf(t->name, sizeof t->name, size == 1 ? "one process" : "%d threads", size);
    }
    return l;
}

static inline Transport* loopback_rank(Loopback* l, int rank) { return &l->ranks[rank]; }

static inline void loopback_close(Loopback* l) {
    for (int rank = 0; rank < l->size; rank++) {
        assert(!l->mailboxes[rank].sends && !l->mailboxes[rank].receives);
        free(l->ranks[rank].requests);
    }
    pthread_mutex_destroy(&l->mutex);
    free(l->mailboxes);
    free(l->ranks);
    free(l);
}

// ------------------------------------------------------------------------------------------------
// MPI. Every message is one of its own, also above the 2^31 - 1 bytes that its counts can say.

#ifdef HAVE_MPI

#ifndef MPI_LARGE
#define MPI_LARGE INT_MAX       // bytes; above, a type of blocks
#endif
enum { MPI_BLOCK = 64 };        // bytes

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

static inline void mpi_post(Request* r, void* bytes) {
    bool large = r->count > MPI_LARGE;
    MPI_Datatype type = large ? mpi_large_type(r->count) : MPI_BYTE;
    int count = large ? 1 : (int)r->count;
    if (r->sending) MPI_Isend(bytes, count, type, r->peer, r->tag, MPI_COMM_WORLD, &r->mpi);
    else MPI_Irecv(bytes, count, type, r->peer, r->tag, MPI_COMM_WORLD, &r->mpi);
    if (large) MPI_Type_free(&type);            // lives on until the message is done
}

static inline bool mpi_done(Request* r) {
    MPI_Status status;
    MPI_Count count;
    int done;
    MPI_Test(&r->mpi, &done, &status);
    if (!done || r->sending) return done;
    MPI_Get_elements_x(&status, MPI_BYTE, &count);
    if ((size_t)count != r->count)
        die("a message from rank %d, tag %d: found %lld bytes, expected %zu", r->peer, r->tag,
            (long long)count, r->count);
    return true;
}

static inline Transport* mpi_open(int* argc, char*** argv) {
    static Transport t;
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int level, length, version, minor;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    if (level < MPI_THREAD_FUNNELED) die("MPI: found no support for threads, expected MPI_THREAD_FUNNELED");
    MPI_Comm_rank(MPI_COMM_WORLD, &t.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &t.size);
    MPI_Get_version(&version, &minor);
    MPI_Get_library_version(library, &length);
    library[strcspn(library, ",\n")] = 0;
    snprintf(t.name, sizeof t.name, "MPI %d.%d (%.80s)", version, minor, library);
    t.timeout_s = 120;
    return &t;
}

#endif

// ------------------------------------------------------------------------------------------------
// Messages. A request is an index into the rank's table; buffers are untouched by the caller until it is done.

static inline int transport_post(Transport* t, bool sending, int peer, int tag, void* bytes, size_t count) {
    int request = 0;
    assert(peer >= 0 && peer < t->size && tag >= 0);
    while (request < t->capacity && t->requests[request].open) request++;
    if (request == t->capacity) {
        t->capacity = 2 * t->capacity + 16;
        t->requests = (Request*)realloc(t->requests, (size_t)t->capacity * sizeof *t->requests);
        if (!t->requests) die("out of memory: %d requests", t->capacity);
        memset(t->requests + request, 0, (size_t)(t->capacity - request) * sizeof *t->requests);
    }
    Request* r = &t->requests[request];
    r->open = true;
    r->sending = sending;
    r->peer = peer;
    r->tag = tag;
    r->count = count;
#ifdef HAVE_MPI
    if (!t->loopback) return mpi_post(r, bytes), request;
#endif
    loopback_post(t, r, bytes);
    return request;
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
static inline void transport_progressed(Transport* t) {
    t->idle_s = 0;
    t->spins = 0;
}

// True: the request is done, and gone. Makes progress for all requests, never blocks.
static inline bool transport_done(Transport* t, int request) {
    Request* r = &t->requests[request];
    assert(request >= 0 && request < t->capacity && r->open);
#ifdef HAVE_MPI
    r->open = t->loopback ? !loopback_done(t, r) : !mpi_done(r);
#else
    r->open = !loopback_done(t, r);
#endif
    if (!r->open) transport_progressed(t);
    return !r->open;
}

static inline double transport_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// For a rank that can do nothing else; `waiting` says why. The clock counts time in here alone, so computing is no
// stall; and little for each call, so that a run that was stopped as a whole goes on.
static inline void transport_idle(Transport* t, const char* waiting) {
    struct timespec pause = {0, 30000};
    double start = transport_clock(), most = 0.1, passed;
    if (t->spins++ < 50) sched_yield();
    else nanosleep(&pause, NULL);
    passed = transport_clock() - start;
    t->idle_s += passed < most ? passed : most;
    if (t->idle_s < t->timeout_s) return;
    fprintf(stderr, "rank %d: no progress for %.3g s: %s\n", t->rank, t->timeout_s, waiting);
    usleep(200000);             // other ranks that wait say so too
    transport_abort(t, STATUS_STALLED);
}

static inline void transport_wait(Transport* t, int request, const char* waiting) {
    while (!transport_done(t, request)) transport_idle(t, waiting);
}

// ------------------------------------------------------------------------------------------------
// What all ranks do together: along a binomial tree, in which a rank's parent is its number without its lowest bit.

static inline void transport_broadcast(Transport* t, int from, void* bytes, size_t count) {
    int me = (t->rank - from + t->size) % t->size, lowest = me & -me, sends[32], sent = 0;
    char waiting[64];
    if (me) {
        int parent = ((me - lowest) + from) % t->size;
        snprintf(waiting, sizeof waiting, "waiting for a broadcast by way of rank %d", parent);
        transport_wait(t, transport_receive(t, parent, TAG_BROADCAST, bytes, count), waiting);
    }
    for (int bit = 1; me + bit < t->size && (!me || bit < lowest); bit *= 2)
        sends[sent++] = transport_send(t, (me + bit + from) % t->size, TAG_BROADCAST, bytes, count);
    while (sent--) transport_wait(t, sends[sent], "waiting for a broadcast to be received");
}

// The larger, or the one that is not a number
static inline double transport_larger(double a, double b) { return a != a || a >= b ? a : b; }

static inline void transport_reduce(Transport* t, double* values, int count, bool largest) {
    size_t size = (size_t)count * sizeof *values;
    double* other = (double*)allocate((size_t)count, sizeof *values);
    int bit = 1;
    char waiting[64];
    for (; !(t->rank & bit) && bit < t->size; bit *= 2) {
        int child = t->rank + bit;
        if (child >= t->size) continue;
        snprintf(waiting, sizeof waiting, "waiting for rank %d's part of a sum", child);
        transport_wait(t, transport_receive(t, child, TAG_REDUCE, other, size), waiting);
        for (int i = 0; i < count; i++)
            values[i] = largest ? transport_larger(values[i], other[i]) : values[i] + other[i];
    }
    if (t->rank)
        transport_wait(t, transport_send(t, t->rank - bit, TAG_REDUCE, values, size), "waiting for a sum");
    free(other);
    transport_broadcast(t, 0, values, size);
}

// values (count), over all ranks, always in the same order.
// What is zero on all ranks but one comes out as that one has it.
static inline void transport_sum(Transport* t, double* values, int count) {
    transport_reduce(t, values, count, false);
}

// A value that is not a number wins.
static inline void transport_max(Transport* t, double* values, int count) {
    transport_reduce(t, values, count, true);
}

// The value of a field in lines `name = value`, length of it; NULL: there is no such field.
static inline const char* field_value(const char* fields, const char* name, int name_length, int* length) {
    for (const char* line = fields; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        if (strncmp(line, name, (size_t)name_length) || strncmp(line + name_length, " = ", 3)) continue;
        *length = (int)strcspn(line + name_length + 3, "\n");
        return line + name_length + 3;
    }
    *length = 7;
    return NULL;
}

// The first field of `from` that `ours` and `theirs` (rank 0's) do not share.
static inline bool fields_differ(const char* from, const char* ours, const char* theirs, int rank, Error* e) {
    for (const char* line = from; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        const char* end = strstr(line, " = ");
        assert(end && end < line + strcspn(line, "\n"));
        int name = (int)(end - line), a_length, b_length;
        const char *a = field_value(ours, line, name, &a_length), *b = field_value(theirs, line, name, &b_length);
        if (a && b && a_length == b_length && !memcmp(a, b, (size_t)a_length)) continue;
        fail(e, "%.*s: found %.*s on rank %d, expected %.*s as on rank 0, start every rank alike", name, line,
             a_length, a ? a : "nothing", rank, b_length, b ? b : "nothing");
        return true;
    }
    return false;
}

// fields: lines `name = value`. False on every rank where any rank's differ from rank 0's, and e says which.
static inline bool transport_agree(Transport* t, const char* fields, Error* e) {
    size_t size = strlen(fields) + 1;
    transport_broadcast(t, 0, &size, sizeof size);
    char* theirs = (char*)allocate(size, 1);
    if (!t->rank) memcpy(theirs, fields, size);
    transport_broadcast(t, 0, theirs, size);
    Error mine, other;
    memset(&mine, 0, sizeof mine);
    if (!fields_differ(theirs, fields, theirs, t->rank, &mine)) fields_differ(fields, fields, theirs, t->rank, &mine);
    free(theirs);
    if (t->rank)
        transport_wait(t, transport_send(t, 0, TAG_AGREE, &mine, sizeof mine), "waiting for rank 0 to compare options");
    for (int rank = 1; !t->rank && rank < t->size; rank++) {
        char waiting[64];
        snprintf(waiting, sizeof waiting, "waiting for the options of rank %d", rank);
        transport_wait(t, transport_receive(t, rank, TAG_AGREE, &other, sizeof other), waiting);
        if (!mine.text[0]) mine = other;
    }
    transport_broadcast(t, 0, &mine, sizeof mine);
    if (mine.text[0]) *e = mine;
    return !mine.text[0];
}

// ------------------------------------------------------------------------------------------------
// Start and end

// What started us says, by the first of these, how many ranks there are; 0: nothing did.
static inline int launched_ranks(const char** name) {
    static const char* const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        *name = names[i];
        if (getenv(names[i])) return atoi(getenv(names[i]));
    }
    return 0;
}

// Ranks of MPI where mpirun or srun started us, else one. More ranks than MPI knows of would each train alone.
static inline Transport* transport_open(int* argc, char*** argv) {
    const char *name, *advice = "build it where an MPI is found (make says), or start one rank";
    int ranks = launched_ranks(&name);
#ifdef HAVE_MPI
    if (ranks || getenv("PMIX_RANK") || getenv("PMI_RANK")) {
        Transport* t = mpi_open(argc, argv);
        advice = "start it by the mpirun of the MPI it was built with, or by srun --mpi=pmix or pmi2";
        if (ranks <= 1 || t->size == ranks) return t;
        die("%s: found %d, expected %d, what %s knows of, %s", name, ranks, t->size, t->name, advice);
    }
#endif
    (void)argc, (void)argv;
    if (ranks > 1) die("%s: found %d, expected 1 of a program without MPI, %s", name, ranks, advice);
    return loopback_rank(loopback_open(1, 0), 0);
}

// Of what transport_open gave. Waits for all ranks, with the clock that MPI_Finalize does not have.
static inline void transport_close(Transport* t) {
    transport_sum(t, NULL, 0);
    if (t->loopback) {
        loopback_close(t->loopback);
        return;
    }
    for (int request = 0; request < t->capacity; request++) assert(!t->requests[request].open);
    free(t->requests);
#ifdef HAVE_MPI
    MPI_Finalize();
#endif
}

#endif
