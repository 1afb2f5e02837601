// nccl.cpp: NCCL between processes (or threads) of one machine, through one piece of shared memory a communicator:
//
//     Region (who is here, what went wrong) | Mailbox[from][to], 64 KB each
//
// An ncclUniqueId is its name, which vanishes as soon as all ranks have joined. A call becomes steps; the transfers of a step
// go side by side. Each message carries its sender's call, so a rank sees at once when another called something else. Each
// rank holds a file lock on its byte of the region: the kernel drops it when the process ends, however it ends.

#include "include/nccl.h"
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <string>

using namespace cpu_cuda;

// ------------------------------------------------------------------------------------------------
// Calls

namespace {

constexpr int MAX_RANKS = 32, TICK_MS = 5;
constexpr size_t CHUNK = 64 << 10;
const char NAME[] = "/cpu_cuda_nccl.";

enum Kind { ALL_REDUCE, REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };

const struct {
    const char* name;
    bool reduces, gathers;
    const char* role;                   // of the rank that it names
} kinds[] = {
    {"ncclAllReduce", true, true, nullptr},
    {"ncclReduce", true, false, "root"},
    {"ncclReduceScatter", true, false, nullptr},
    {"ncclAllGather", false, true, nullptr},
    {"ncclBroadcast", false, true, "root"},
    {"ncclSend", false, false, "peer"},
    {"ncclRecv", false, false, "peer"},
};

const struct {
    const char* name;
    size_t size;
} types[ncclNumTypes] = {
    {"ncclInt8", 1},    {"ncclUint8", 1},    {"ncclInt32", 4},   {"ncclUint32", 4},   {"ncclInt64", 8},      {"ncclUint64", 8},
    {"ncclFloat16", 2}, {"ncclFloat32", 4},  {"ncclFloat64", 8}, {"ncclBfloat16", 2}, {"ncclFloat8e4m3", 1}, {"ncclFloat8e5m2", 1},
};

const char* const operations[ncclNumOps] = {"ncclSum", "ncclProd", "ncclMax", "ncclMin", "ncclAvg"};

struct Call {                           // what a rank asked for
    Kind kind;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root;                           // or the peer
    int line;
    char file[100];

    Call(Kind kind, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, Place here)
        : kind(kind), count(count), type(type), op(op), root(root), line(here.line) {
        size_t length = strlen(here.file), skip = length < sizeof file ? 0 : length - sizeof file + 1;
        memcpy(file, here.file + skip, length - skip + 1);
    }
    size_t size() const { return count * types[type].size; }

    // Where rank r's block begins in what is scattered or gathered by so many ranks. The root's is all of it.
    size_t block(int r, int ranks) const {
        if (kind == ALL_REDUCE) return count * (size_t)r / (size_t)ranks * types[type].size;
        return kinds[kind].role ? (r > root ? size() : 0) : size() * (size_t)r;
    }
    size_t sends(int rank, int ranks) const {
        if (kind == SEND || kind == RECV) return kind == SEND ? size() : 0;
        return kinds[kind].reduces ? block(ranks, ranks) : block(rank + 1, ranks) - block(rank, ranks);
    }
    size_t receives(int rank, int ranks) const {
        if (kind == SEND || kind == RECV) return kind == RECV ? size() : 0;
        return kinds[kind].gathers ? block(ranks, ranks) : block(rank + 1, ranks) - block(rank, ranks);
    }
    bool belongs_to(const Call& mine) const {
        if (count != mine.count || type != mine.type) return false;
        return mine.kind == RECV ? kind == SEND : kind == mine.kind && op == mine.op && root == mine.root;
    }
    // "ncclBroadcast(count 5, ncclInt32, root 0) at file.cu:7"
    std::string text() const {
        std::string s = kinds[kind].name;
        s += "(count " + std::to_string(count) + ", " + types[type].name;
        if (kinds[kind].reduces) s = s + ", " + operations[op];
        if (kinds[kind].role) s = s + ", " + kinds[kind].role + " " + std::to_string(root);
        return s + ") at " + file + ":" + std::to_string(line);
    }
};

thread_local char last_error[1024];

ncclResult_t refuse(ncclResult_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));
ncclResult_t refuse(ncclResult_t code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

// ------------------------------------------------------------------------------------------------
// The shared region

struct alignas(64) Mailbox {
    std::atomic<unsigned> full;
    char call[sizeof(Call)];            // the sender's
    alignas(64) char data[CHUNK];
};

constexpr unsigned FAILED = 2;

struct alignas(64) Region {
    std::atomic<unsigned> ranks, joined, failed;    // failed: 1 while the message is written, then FAILED + code
    char message[1024];
    struct {
        std::atomic<unsigned> here, bell;
    } rank[MAX_RANKS];
};

}  // namespace

struct ncclComm {
    int rank, ranks, file = -1;
    Region* region = nullptr;
    std::atomic<ncclResult_t> error{ncclSuccess};
    std::shared_ptr<CUevent_st> done;   // after its last call
    std::shared_ptr<ncclComm> self;     // until ncclCommDestroy; a call under way keeps it too

    ncclComm(int rank, int ranks) : rank(rank), ranks(ranks) {}
    ~ncclComm() {
        if (region) munmap(region, size());
        if (file >= 0) close(file);
    }
    size_t size() const { return sizeof(Region) + (size_t)(ranks * ranks) * sizeof(Mailbox); }
    Mailbox& mail(int from, int to) const { return ((Mailbox*)(region + 1))[from * ranks + to]; }
    std::atomic<unsigned>& bell(int r) const { return region->rank[r].bell; }

    void ring(int r) {
        bell(r)++;
        syscall(SYS_futex, &bell(r), FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }
    // The first message ends the communicator for all its ranks.
    void publish(ncclResult_t code, const char* format, ...) __attribute__((format(printf, 3, 4))) {
        unsigned none = 0;
        if (!region->failed.compare_exchange_strong(none, 1)) return;
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(region->message, sizeof region->message, format, arguments);
        va_end(arguments);
        region->failed = FAILED + code;
        for (int r = 0; r < ranks; r++) ring(r);
    }
    // What somebody published becomes this rank's error.
    bool has_failed() {
        unsigned failed = region->failed;
        ncclResult_t none = ncclSuccess;
        if (failed >= FAILED && error.compare_exchange_strong(none, (ncclResult_t)(failed - FAILED))) {
            refuse(error, "%s", region->message);
            fprintf(stderr, "cpu_cuda: NCCL, rank %d of %d: %s\n", rank, ranks, region->message);
        }
        return error != ncclSuccess;
    }
    // The lock that a rank holds while it lives: takes or drops it (F_OFD_SETLK), or asks for its holder (F_OFD_GETLK).
    bool lock(int command, short* type, int r) const {
        struct flock lock = {};
        lock.l_type = *type;
        lock.l_whence = SEEK_SET;
        lock.l_start = r;
        lock.l_len = 1;
        bool done = fcntl(file, command, &lock) == 0;
        *type = lock.l_type;
        return done;
    }
    bool is_gone(int r) const {
        short type = F_WRLCK;
        return r != rank && lock(F_OFD_GETLK, &type, r) && type == F_UNLCK;
    }
};

namespace {

// While one lives, other threads may call the runtime: they may be the ranks that this one waits for.
struct Unlocked {
    int depth = 0;
    Unlocked() {
        while (pthread_mutex_unlock(runtime_lock().native_handle()) == 0) depth++;
    }
    ~Unlocked() {
        while (depth--) runtime_lock().lock();
    }
};

// Until the rank's bell rings, for a tick at most. False: it did not.
bool sleep_until_rung(const ncclComm& comm, unsigned seen) {
    Unlocked unlocked;
    timespec tick = {0, TICK_MS * 1000000};
    return syscall(SYS_futex, &comm.bell(comm.rank), FUTEX_WAIT, seen, &tick, nullptr, 0) == 0 || errno == EAGAIN;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ------------------------------------------------------------------------------------------------
// Joining

ncclResult_t open_region(ncclComm& comm, const char* name) {
    comm.file = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (comm.file < 0) return refuse(ncclSystemError, "shm_open %s: %s", name, strerror(errno));
    int error = posix_fallocate(comm.file, 0, (off_t)comm.size());      // never shrinks; a full /dev/shm shows here
    if (error) return refuse(ncclSystemError, "%zu bytes in /dev/shm: %s", comm.size(), strerror(error));
    void* at = mmap(nullptr, comm.size(), PROT_READ | PROT_WRITE, MAP_SHARED, comm.file, 0);
    if (at == MAP_FAILED) return refuse(ncclSystemError, "mmap: %s", strerror(errno));
    comm.region = (Region*)at;
    return ncclSuccess;
}

void take_place(ncclComm& comm, const char* name) {
    Region& region = *comm.region;
    short exclusive = F_WRLCK;
    unsigned ranks = 0;
    if (!region.ranks.compare_exchange_strong(ranks, (unsigned)comm.ranks) && ranks != (unsigned)comm.ranks) {
        return comm.publish(ncclInvalidArgument, "rank %d counts %d ranks, another %u", comm.rank, comm.ranks, ranks);
    }
    if (!comm.lock(F_OFD_SETLK, &exclusive, comm.rank)) {
        return comm.publish(ncclInvalidArgument, "rank %d is there twice", comm.rank);
    }
    region.rank[comm.rank].here = 1;
    if (++region.joined == (unsigned)comm.ranks) shm_unlink(name);
    for (int r = 0; r < comm.ranks; r++) comm.ring(r);
}

// Publishes that a rank ended, or, at the deadline, that it never came.
void look_for_missing(ncclComm& comm, bool late) {
    for (int r = 0; r < comm.ranks; r++) {
        bool came = comm.region->rank[r].here;
        if (came && comm.is_gone(r)) comm.publish(ncclRemoteError, "rank %d ended before all had joined", r);
        if (!came && late) {
            comm.publish(ncclRemoteError, "rank %d did not call ncclCommInitRank within %d s", r, options().timeout);
        }
    }
}

// Returns when all ranks are there.
ncclResult_t join(ncclComm& comm, const char* name) {
    ncclResult_t result = open_region(comm, name);
    if (result == ncclSuccess) take_place(comm, name);
    double deadline = now() + options().timeout;
    while (result == ncclSuccess) {
        unsigned seen = comm.bell(comm.rank);
        if (comm.region->joined == (unsigned)comm.ranks) return ncclSuccess;
        if (comm.has_failed()) result = comm.error;
        else if (!sleep_until_rung(comm, seen)) look_for_missing(comm, now() > deadline);
    }
    shm_unlink(name);
    return result;
}

// ------------------------------------------------------------------------------------------------
// Reductions: in the order of the ranks; bf16 in fp32, rounded once.

template <class W>
W combine(ncclRedOp_t op, W a, W b) {
    if constexpr (std::is_integral_v<W>) {
        if (op == ncclMax) return std::max(a, b);
        if (op == ncclMin) return std::min(a, b);
        return (W)(op == ncclProd ? (uint64_t)a * (uint64_t)b : (uint64_t)a + (uint64_t)b);     // wraps
    } else {
        if (op == ncclMax) return std::fmax(a, b);
        if (op == ncclMin) return std::fmin(a, b);
        return op == ncclProd ? a * b : a + b;
    }
}

// An average of floating-point numbers scales before it sums, as NCCL does; of integers it divides last.
template <class T>
void reduce(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op) {
    typedef std::conditional_t<std::is_same_v<T, __nv_bfloat16>, float, T> W;
    constexpr bool whole = std::is_integral_v<W>;
    W scale = op == ncclAvg && !whole ? (W)1 / (W)ranks : (W)1;
    for (size_t i = 0; i < size / sizeof(T); i++) {
        W sum = (W)((const T*)parts[0])[i] * scale;
        for (int r = 1; r < ranks; r++) sum = combine<W>(op, sum, (W)((const T*)parts[r])[i] * scale);
        if (op == ncclAvg && whole) sum = (W)(sum / (W)ranks);
        ((T*)out)[i] = (T)sum;
    }
}

typedef void (*Reduce)(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op);
const Reduce reduces[ncclNumTypes] = {
    reduce<int8_t>, reduce<uint8_t>, reduce<int32_t>, reduce<uint32_t>,      reduce<int64_t>, reduce<uint64_t>,
    nullptr,        reduce<float>,   reduce<double>,  reduce<__nv_bfloat16>, nullptr,         nullptr,
};

// ------------------------------------------------------------------------------------------------
// Transfers

constexpr int ALL = -1;

struct Transfer {
    bool put;                           // into mailboxes, or taken from them
    int peer;                           // ALL: reduces what all others sent, and `own`
    char* data;                         // sent from here, or received to here
    size_t left;                        // bytes to go; even none of them takes one message
    const Call* call;
    const char* own = nullptr;
    bool begun = false, done = false;

    void advance(size_t size) {
        data += size;
        if (own) own += size;
        left -= size;
        begun = true;
    }
};
typedef std::vector<Transfer> Step;

void copy(char* to, const char* from, size_t size) {
    if (size) memmove(to, from, size);
}

bool put(ncclComm& comm, Transfer& t) {
    Mailbox& box = comm.mail(comm.rank, t.peer);
    if (box.full) return false;
    if (t.begun && !t.left) return t.done = true;       // the receiver has all of it
    size_t size = std::min(CHUNK, t.left);
    memcpy(box.call, t.call, sizeof(Call));
    copy(box.data, t.data, size);
    t.advance(size);
    box.full = 1;
    comm.ring(t.peer);
    return true;
}

// A message from that rank is there and belongs to our call. Another one ends the communicator.
bool is_there(ncclComm& comm, const Transfer& t, int from) {
    Mailbox& box = comm.mail(from, comm.rank);
    if (!box.full) return false;
    const Call& theirs = *(const Call*)box.call;
    if (theirs.belongs_to(*t.call)) return true;
    comm.publish(ncclInvalidUsage, "calls that do not belong together: rank %d in %s, rank %d in %s", comm.rank,
                 t.call->text().c_str(), from, theirs.text().c_str());
    return false;
}

bool take(ncclComm& comm, Transfer& t) {
    bool all = t.peer == ALL;
    int first = all ? 0 : t.peer, last = all ? comm.ranks - 1 : t.peer;
    const char* parts[MAX_RANKS];
    for (int r = first; r <= last; r++) {
        bool own = all && r == comm.rank;
        if (!own && !is_there(comm, t, r)) return false;
        parts[r] = own ? t.own : comm.mail(r, comm.rank).data;
    }
    size_t size = std::min(CHUNK, t.left);
    if (all) reduces[t.call->type](t.data, parts, comm.ranks, size, t.call->op);
    else copy(t.data, parts[t.peer], size);
    t.advance(size);
    t.done = !t.left;
    for (int r = first; r <= last; r++) {
        if (all && r == comm.rank) continue;
        comm.mail(r, comm.rank).full = 0;
        comm.ring(r);
    }
    return true;
}

// An earlier transfer of the same direction and rank comes first.
bool is_behind(const Step& step, const Transfer& t) {
    for (const Transfer* e = step.data(); e != &t; e++) {
        if (!e->done && e->put == t.put && e->peer == t.peer) return true;
    }
    return false;
}

// ------------------------------------------------------------------------------------------------
// Programs

struct Request {
    Call call;
    const char* send;
    char* receive;
    std::shared_ptr<ncclComm> comm;
    cudaStream_t stream;

    size_t sends() const { return call.sends(comm->rank, comm->ranks); }
    size_t receives() const { return call.receives(comm->rank, comm->ranks); }
};

struct Program {                        // of one communicator
    ncclComm* comm;
    std::vector<const Request*> requests;
    std::vector<Step> steps;            // follow one another
    Step messages;                      // ncclSend and ncclRecv of a group: the last step
    size_t at = 0;

    bool finished() const { return at == steps.size(); }
};

// With blocks (see Call): all send each rank its block, who reduces it; then all send their block to all. So every
// pair of ranks exchanges messages in every collective, and sees what the other called.
void plan_collective(const Request& q, Program& p) {
    const Call* call = &q.call;
    int me = p.comm->rank, ranks = p.comm->ranks;
    auto begin = [&](int r) { return call->block(r, ranks); };
    auto size = [&](int r) { return begin(r + 1) - begin(r); };
    char* from = (char*)q.send;
    char* mine = q.receive + (kinds[call->kind].gathers ? begin(me) : 0);
    if (kinds[call->kind].reduces) {
        Step step;
        for (int r = 0; r < ranks; r++) {
            if (r != me) step.push_back({true, r, from + begin(r), size(r), call});
        }
        step.push_back({false, ALL, mine, size(me), call, from + begin(me)});
        p.steps.push_back(step);
    } else {
        copy(mine, from, size(me));
    }
    if (!kinds[call->kind].gathers) return;
    Step step;
    for (int r = 0; r < ranks; r++) {
        if (r == me) continue;
        step.push_back({true, r, mine, size(me), call});
        step.push_back({false, r, q.receive + begin(r), size(r), call});
    }
    p.steps.push_back(step);
}

void plan(const Request& q, Program& p) {
    const char* name = kinds[q.call.kind].name;
    if (q.sends()) use_memory(q.send, q.sends(), false, name);
    if (q.receives()) use_memory(q.receive, q.receives(), true, name);
    p.requests.push_back(&q);
    if (q.call.kind == SEND) p.messages.push_back({true, q.call.root, (char*)q.send, q.sends(), &q.call});
    else if (q.call.kind == RECV) p.messages.push_back({false, q.call.root, q.receive, q.receives(), &q.call});
    else plan_collective(q, p);
}

// True: something moved.
bool advance(Program& p) {
    if (p.finished()) return false;
    bool moved = false, done = true;
    Step& step = p.steps[p.at];
    for (Transfer& t : step) {
        if (!t.done && !is_behind(step, t)) moved |= t.put ? put(*p.comm, t) : take(*p.comm, t);
        done &= t.done;
    }
    if (done) p.at++;
    return moved || done;
}

// Nothing moved for a tick. Publishes that a rank we wait for is gone, or, at the deadline, that it did not come.
void look_for_missing(Program& p, bool late) {
    if (p.finished()) return;
    ncclComm& comm = *p.comm;
    for (const Transfer& t : p.steps[p.at]) {
        for (int r = 0; r < comm.ranks; r++) {
            bool waits = t.peer == r || (t.peer == ALL && r != comm.rank && !comm.mail(r, comm.rank).full);
            if (t.done || !waits) continue;
            std::string text = "rank " + std::to_string(comm.rank) + " waits in " + t.call->text();
            // What it did before it left is in the mailboxes now.
            if (comm.is_gone(r)) {
                if (advance(p)) return;
                comm.publish(ncclRemoteError, "rank %d has ended or left, and %s", r, text.c_str());
            } else if (late) {
                Mailbox& box = comm.mail(r, comm.rank);
                std::string theirs = box.full ? "is in " + ((const Call*)box.call)->text() : "did not come";
                comm.publish(ncclRemoteError, "%d s: %s, and rank %d %s", options().timeout, text.c_str(), r, theirs.c_str());
            }
        }
    }
}

// Nothing that was not received may be taken for a result.
void give_up(Program& p) {
    p.at = p.steps.size();
    for (const Request* q : p.requests) {
        if (q->receives()) memset(q->receive, 0xff, q->receives());
    }
}

void run_to_end(std::vector<Program>& programs) {
    double deadline = now() + options().timeout;
    for (;;) {
        bool moved = false;
        auto first = std::find_if(programs.begin(), programs.end(), [](Program& p) { return !p.finished(); });
        if (first == programs.end()) return;
        unsigned seen = first->comm->bell(first->comm->rank);
        for (Program& p : programs) {
            moved |= advance(p);
            if (p.finished() || !p.comm->has_failed()) continue;
            if (p.comm->error == ncclInvalidUsage) stop({p.requests[0]->call.file, p.requests[0]->call.line}, "%s", last_error);
            give_up(p);
        }
        if (moved) deadline = now() + options().timeout;
        else if (!sleep_until_rung(*first->comm, seen))
            for (Program& p : programs) look_for_missing(p, now() > deadline);
    }
}

void run(const std::vector<Request>& requests) {
    DeviceCode open;
    std::vector<Program> programs;
    for (const Request& q : requests) {
        if (q.comm->error != ncclSuccess) continue;
        auto is_its = [&](Program& p) { return p.comm == q.comm.get(); };
        auto p = std::find_if(programs.begin(), programs.end(), is_its);
        if (p == programs.end()) p = programs.insert(p, Program{q.comm.get(), {}, {}, {}});
        plan(q, *p);
    }
    for (Program& p : programs) p.steps.push_back(p.messages);
    run_to_end(programs);
}

// ------------------------------------------------------------------------------------------------
// Calls of one rank

struct Group {
    int depth = 0;
    ncclResult_t error = ncclSuccess;
    std::vector<Request> requests;
};
thread_local Group group;
thread_local std::shared_ptr<CUevent_st> last_call;

// One operation in all its streams, after the thread's operation before it: with several communicators a rank would
// wait for ever if another forced its streams, under `lazy`, in another order.
ncclResult_t launch(const std::vector<Request>& requests) {
    if (requests.empty()) return ncclSuccess;
    cudaStream_t stream = requests[0].stream;
    if (last_call) cudaStreamWaitEvent(stream, last_call.get());
    for (const Request& q : requests) {
        cudaStreamWaitEvent(stream, q.comm->done.get());
        cudaEventRecord(q.comm->done.get(), q.stream);
        cudaStreamWaitEvent(stream, q.comm->done.get());
    }
    enqueue(stream, [requests] { run(requests); });
    for (const Request& q : requests) {
        cudaEventRecord(q.comm->done.get(), stream);
        cudaStreamWaitEvent(q.stream, q.comm->done.get());
    }
    last_call = requests[0].comm->done;
    for (const Request& q : requests) {
        if (q.comm->error != ncclSuccess) return q.comm->error;
    }
    return ncclSuccess;
}

ncclResult_t error_of_buffer(const char* name, const char* which, const void* p, size_t bytes, size_t alignment) {
    if (bytes == 0) return ncclSuccess;
    if (!find_allocation(p)) return refuse(ncclInvalidArgument, "%s: %s %p is no device memory", name, which, p);
    if ((uintptr_t)p % alignment) return refuse(ncclInvalidArgument, "%s: %s %p is not aligned", name, which, p);
    return ncclSuccess;
}

// In place is only where NCCL documents it: this rank's block in the whole.
bool overlaps_wrongly(const Request& q) {
    size_t sends = q.sends(), receives = q.receives();
    bool apart = q.send + sends <= q.receive || q.receive + receives <= q.send;
    ptrdiff_t block = (ptrdiff_t)q.call.size() * q.comm->rank;
    ptrdiff_t in_place = q.call.kind == REDUCE_SCATTER ? block : q.call.kind == ALL_GATHER ? -block : 0;
    return sends && receives && !apart && q.receive - q.send != in_place;
}

ncclResult_t error_of(const Request& q) {
    const Call& call = q.call;
    const char* name = kinds[call.kind].name;
    if ((unsigned)call.type >= ncclNumTypes) return refuse(ncclInvalidArgument, "%s: no such datatype", name);
    if ((unsigned)call.op >= ncclNumOps) return refuse(ncclInvalidArgument, "%s: no such reduction", name);
    if (kinds[call.kind].reduces && !reduces[call.type]) {
        return refuse(ncclInvalidArgument, "%s: %s is not reduced here", name, types[call.type].name);
    }
    if (call.root < 0 || call.root >= q.comm->ranks) return refuse(ncclInvalidArgument, "%s: no rank %d", name, call.root);
    if (!stream_exists(q.stream)) return refuse(ncclUnhandledCudaError, "%s: no such stream", name);
    ncclResult_t error = error_of_buffer(name, "sendbuff", q.send, q.sends(), types[call.type].size);
    if (error == ncclSuccess) error = error_of_buffer(name, "recvbuff", q.receive, q.receives(), types[call.type].size);
    return error;
}

ncclResult_t submit(const Call& call, const void* send, void* receive, ncclComm_t comm, cudaStream_t stream) {
    ncclResult_t error = comm ? comm->error.load() : refuse(ncclInvalidArgument, "the communicator is null");
    if (error == ncclSuccess) {
        Request q = {call, (const char*)send, (char*)receive, comm->self, stream};
        error = error_of(q);
        if (error == ncclSuccess && overlaps_wrongly(q)) {
            stop({call.file, call.line}, "%s: recvbuff overlaps sendbuff, but not in place", kinds[call.kind].name);
        }
        if (error == ncclSuccess && !group.depth) return launch({q});
        if (error == ncclSuccess) group.requests.push_back(q);
    }
    if (group.depth && group.error == ncclSuccess) group.error = error;
    return error;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// NCCL's functions

ncclResult_t ncclGetVersion(int* version) {
    if (!version) return refuse(ncclInvalidArgument, "ncclGetVersion: null pointer");
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
    static const char* const texts[ncclNumResults] = {
        "no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
        "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress",
    };
    return (unsigned)result < ncclNumResults ? texts[result] : "unknown result code";
}

const char* ncclGetLastError(ncclComm_t) { return last_error; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    unsigned long long number[2];
    if (!id) return refuse(ncclInvalidArgument, "ncclGetUniqueId: null pointer");
    if (getrandom(number, sizeof number, 0) != sizeof number) return refuse(ncclSystemError, "getrandom: %s", strerror(errno));
    *id = {};
    snprintf(id->internal, sizeof id->internal, "%s%016llx%016llx", NAME, number[0], number[1]);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* out, int ranks, ncclUniqueId id, int rank) {
    static thread_local std::set<std::string> used;
    if (!out) return refuse(ncclInvalidArgument, "ncclCommInitRank: null pointer");
    *out = nullptr;
    if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks) {
        return refuse(ncclInvalidArgument, "ncclCommInitRank: rank %d of %d, and at most %d are possible", rank, ranks, MAX_RANKS);
    }
    if (strncmp(id.internal, NAME, strlen(NAME)) || !memchr(id.internal, 0, sizeof id.internal)) {
        return refuse(ncclInvalidArgument, "ncclCommInitRank: the ncclUniqueId is not one of ncclGetUniqueId's");
    }
    if (group.depth) return refuse(ncclInvalidUsage, "ncclCommInitRank: a thread is one rank here, so not in a group");
    if (!used.insert(id.internal).second) {
        return refuse(ncclInvalidUsage, "ncclCommInitRank: this ncclUniqueId has made a communicator already");
    }
    auto comm = std::make_shared<ncclComm>(rank, ranks);
    cudaEvent_t event;
    if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) return ncclUnhandledCudaError;
    comm->done.reset(event, cudaEventDestroy);
    ncclResult_t result = join(*comm, id.internal);
    if (result != ncclSuccess) return result;
    comm->self = comm;
    *out = comm.get();
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    cudaEventSynchronize(comm->done.get());
    std::shared_ptr<ncclComm> last = std::move(comm->self);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    comm->error = ncclInvalidUsage;
    std::shared_ptr<ncclComm> last = std::move(comm->self);
    short none = F_UNLCK;
    comm->lock(F_OFD_SETLK, &none, comm->rank);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    if (!comm || !error) return refuse(ncclInvalidArgument, "ncclCommGetAsyncError: null pointer");
    *error = comm->error;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    if (!comm || !count) return refuse(ncclInvalidArgument, "ncclCommCount: null pointer");
    *count = comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    if (!comm || !rank) return refuse(ncclInvalidArgument, "ncclCommUserRank: null pointer");
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    group.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (!group.depth) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group.depth) return ncclSuccess;
    Group all = std::move(group);
    group = Group();
    return all.error != ncclSuccess ? all.error : launch(all.requests);
}

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit({ALL_REDUCE, count, type, op, 0, here}, send, receive, comm, stream);
}

ncclResult_t ncclReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit({REDUCE, count, type, op, root, here}, send, receive, comm, stream);
}

ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit({REDUCE_SCATTER, count, type, op, 0, here}, send, receive, comm, stream);
}

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream, Place here) {
    return submit({ALL_GATHER, count, type, ncclSum, 0, here}, send, receive, comm, stream);
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream, Place here) {
    return submit({BROADCAST, count, type, ncclSum, root, here}, send, receive, comm, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream,
                      Place here) {
    return submit({SEND, count, type, ncclSum, peer, here}, send, nullptr, comm, stream);
}

ncclResult_t ncclRecv(void* receive, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream,
                      Place here) {
    return submit({RECV, count, type, ncclSum, peer, here}, nullptr, receive, comm, stream);
}
