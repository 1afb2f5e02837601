// nccl.cpp: NCCL between processes (or threads) of one machine, over a piece of shared memory a communicator:
//
//     Region (who is here, what went wrong) | Mailbox[from][to], 64 KB each
//
// An ncclUniqueId is its name, which vanishes as soon as all ranks have joined. A call becomes steps, and the
// transfers of a step go side by side. Each message carries its sender's call, so a rank sees when another
// called something else. Each rank holds a file lock on its byte of the region: the kernel drops it when the
// process ends, however it ends.

#include "include/nccl.h"
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <set>
#include <string>

using namespace cpu_cuda;

namespace {

constexpr int MAX_RANKS = 32, TICK_MS = 5;
constexpr size_t CHUNK = 64 << 10;
const char NAME[] = "/cpu_cuda_nccl.";

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

// ------------------------------------------------------------------------------------------------
// Calls

const struct {
    const char* name;
    size_t size;
    void (*reduce)(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op);
} types[ncclNumTypes] = {
    {"ncclInt8", 1, reduce<int8_t>},
    {"ncclUint8", 1, reduce<uint8_t>},
    {"ncclInt32", 4, reduce<int32_t>},
    {"ncclUint32", 4, reduce<uint32_t>},
    {"ncclInt64", 8, reduce<int64_t>},
    {"ncclUint64", 8, reduce<uint64_t>},
    {"ncclFloat16", 2, nullptr},
    {"ncclFloat32", 4, reduce<float>},
    {"ncclFloat64", 8, reduce<double>},
    {"ncclBfloat16", 2, reduce<__nv_bfloat16>},
    {"ncclFloat8e4m3", 1, nullptr},
    {"ncclFloat8e5m2", 1, nullptr},
};

const char* const operations[ncclNumOps] = {"ncclSum", "ncclProd", "ncclMax", "ncclMin", "ncclAvg"};

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

struct Signature {                      // what a rank asked for
    Kind kind;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root;                           // or the peer
    int line;
    char file[100];                     // its end, if longer

    size_t size() const { return count * types[type].size; }

    // Where rank r's block begins in what so many ranks scatter or gather. A root's is all of it.
    size_t block(int r, int ranks) const {
        if (kind == ALL_REDUCE) return count * (size_t)r / (size_t)ranks * types[type].size;
        return kinds[kind].role ? (r > root ? size() : 0) : size() * (size_t)r;
    }
    // Of this rank's buffer.
    size_t bytes(bool received, int rank, int ranks) const {
        if (kind == SEND || kind == RECV) return received == (kind == RECV) ? size() : 0;
        bool all = received ? kinds[kind].gathers : kinds[kind].reduces;
        return all ? block(ranks, ranks) : block(rank + 1, ranks) - block(rank, ranks);
    }
    bool answers(const Signature& mine) const {
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

// ------------------------------------------------------------------------------------------------
// The shared region

struct alignas(64) Mailbox {
    std::atomic<unsigned> full;
    Signature call;                     // the sender's
    alignas(64) char data[CHUNK];
};

constexpr unsigned FAILED = 2;

struct alignas(64) Region {
    std::atomic<unsigned> ranks, joined;
    std::atomic<unsigned> failed;       // 1 while the message is written, then FAILED + code
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
    // A rank's lock, which it holds while it lives: takes or drops it (F_OFD_SETLK), or asks (F_OFD_GETLK).
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
    // What somebody published becomes this rank's error; calls that do not belong together stop it.
    bool has_failed(const Signature* call) {
        unsigned failed = region->failed;
        ncclResult_t none = ncclSuccess;
        if (failed >= FAILED && error.compare_exchange_strong(none, (ncclResult_t)(failed - FAILED))) {
            refuse(error, "%s", region->message);
            Place here = call ? Place{call->file, call->line} : Place{};
            if (call && error == ncclInvalidUsage) stop(here, "rank %d: %s", rank, last_error);
            fprintf(stderr, "cpu_cuda: rank %d of %d: %s\n", rank, ranks, last_error);
        }
        return error != ncclSuccess;
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
    long rung = syscall(SYS_futex, &comm.bell(comm.rank), FUTEX_WAIT, seen, &tick, nullptr, 0);
    return rung == 0 || errno == EAGAIN;
}

struct Deadline {
    typedef std::chrono::steady_clock Clock;
    Clock::time_point at = Clock::now() + std::chrono::seconds(options().timeout);
    bool passed() const { return Clock::now() > at; }
};

// ------------------------------------------------------------------------------------------------
// Joining

ncclResult_t open_region(ncclComm& comm, const char* name) {
    comm.file = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (comm.file < 0) return refuse(ncclSystemError, "shm_open %s: %s", name, strerror(errno));
    // It never shrinks the file, and a full /dev/shm shows here.
    int error = posix_fallocate(comm.file, 0, (off_t)comm.size());
    if (error) return refuse(ncclSystemError, "%zu bytes in /dev/shm: %s", comm.size(), strerror(error));
    void* at = mmap(nullptr, comm.size(), PROT_READ | PROT_WRITE, MAP_SHARED, comm.file, 0);
    if (at == MAP_FAILED) return refuse(ncclSystemError, "mmap: %s", strerror(errno));
    comm.region = (Region*)at;
    return ncclSuccess;
}

void take_place(ncclComm& comm, const char* name) {
    unsigned ranks = 0;
    short exclusive = F_WRLCK;
    comm.region->ranks.compare_exchange_strong(ranks, (unsigned)comm.ranks);
    if (ranks != 0 && ranks != (unsigned)comm.ranks) {
        comm.publish(ncclInvalidArgument, "rank %d says nranks %d, another %u", comm.rank, comm.ranks, ranks);
    } else if (!comm.lock(F_OFD_SETLK, &exclusive, comm.rank)) {
        comm.publish(ncclInvalidArgument, "rank %d is there twice", comm.rank);
    } else {
        comm.region->rank[comm.rank].here = 1;
        if (++comm.region->joined == (unsigned)comm.ranks) shm_unlink(name);
        for (int r = 0; r < comm.ranks; r++) comm.ring(r);
    }
}

// Returns when all ranks are there, or when it is clear that they will not be.
ncclResult_t join(ncclComm& comm, const char* name) {
    ncclResult_t result = open_region(comm, name);
    if (result == ncclSuccess) take_place(comm, name);
    Deadline deadline;
    while (result == ncclSuccess) {
        unsigned seen = comm.bell(comm.rank);
        if (comm.region->joined == (unsigned)comm.ranks) return ncclSuccess;
        if (comm.has_failed(nullptr)) result = comm.error;
        else if (sleep_until_rung(comm, seen)) continue;
        for (int r = 0; r < comm.ranks; r++) {
            bool came = comm.region->rank[r].here;
            if (came && comm.is_gone(r)) {
                comm.publish(ncclRemoteError, "rank %d ended before all had joined", r);
            } else if (!came && deadline.passed()) {
                int limit = options().timeout;
                comm.publish(ncclRemoteError, "rank %d did not join (CPU_CUDA=timeout=%d)", r, limit);
            }
        }
    }
    shm_unlink(name);
    return result;
}

// ------------------------------------------------------------------------------------------------
// Transfers

constexpr int ALL = -1;

struct Transfer {
    bool put;                           // into mailboxes, or taken from them
    int peer;                           // ALL: reduces what all others sent, and `own`
    char* data;                         // sent from here, or received to here
    size_t left;                        // bytes to go; even none of them takes one message
    const Signature* call;
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
    box.call = *t.call;
    copy(box.data, t.data, size);
    t.advance(size);
    box.full = 1;
    comm.ring(t.peer);
    return true;
}

// A message from that rank is there and answers our call. Another one ends the communicator.
bool is_there(ncclComm& comm, const Transfer& t, int from) {
    Mailbox& box = comm.mail(from, comm.rank);
    if (!box.full) return false;
    if (box.call.answers(*t.call)) return true;
    std::string mine = t.call->text(), theirs = box.call.text();
    comm.publish(ncclInvalidUsage, "calls that do not belong together: rank %d in %s, rank %d in %s",
                 comm.rank, mine.c_str(), from, theirs.c_str());
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
    if (all) types[t.call->type].reduce(t.data, parts, comm.ranks, size, t.call->op);
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
    Signature call;
    const char* send;
    char* receive;
    std::shared_ptr<ncclComm> comm;
    cudaStream_t stream;

    size_t sends() const { return call.bytes(false, comm->rank, comm->ranks); }
    size_t receives() const { return call.bytes(true, comm->rank, comm->ranks); }
};

struct Program {                        // of one communicator
    ncclComm* comm;
    std::vector<const Request*> requests;
    std::vector<Step> steps;            // follow one another
    Step messages;                      // ncclSend and ncclRecv of a group: the last step
    size_t at = 0;

    bool finished() const { return at == steps.size(); }
};

// With blocks (see Signature): all send each rank its block, which it reduces; then all send all their block.
// So each pair of ranks exchanges messages in each collective, and sees what the other called.
void plan_collective(const Request& q, Program& p) {
    const Signature* call = &q.call;
    int me = p.comm->rank, ranks = p.comm->ranks;
    auto begin = [&](int r) { return call->block(r, ranks); };
    auto size = [&](int r) { return begin(r + 1) - begin(r); };
    char* from = (char*)q.send;
    char* mine = q.receive + (kinds[call->kind].gathers ? begin(me) : 0);
    Step scatter, gather;
    for (int r = 0; r < ranks; r++) {
        if (r == me) continue;
        scatter.push_back({true, r, from + begin(r), size(r), call});
        gather.push_back({true, r, mine, size(me), call});
        gather.push_back({false, r, q.receive + begin(r), size(r), call});
    }
    scatter.push_back({false, ALL, mine, size(me), call, from + begin(me)});
    if (kinds[call->kind].reduces) p.steps.push_back(scatter);
    else copy(mine, from, size(me));
    if (kinds[call->kind].gathers) p.steps.push_back(gather);
}

void plan(const Request& q, Program& p) {
    const Signature& call = q.call;
    use_memory(q.send, q.sends(), false, kinds[call.kind].name);
    use_memory(q.receive, q.receives(), true, kinds[call.kind].name);
    p.requests.push_back(&q);
    if (call.kind == SEND) p.messages.push_back({true, call.root, (char*)q.send, call.size(), &call});
    else if (call.kind == RECV) p.messages.push_back({false, call.root, q.receive, call.size(), &call});
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

// Nothing moved for a tick. Publishes that a rank it waits for is gone, or, when it is late, has not come.
void look_for_missing(Program& p, bool late) {
    ncclComm& comm = *p.comm;
    for (size_t i = 0; !p.finished() && i < p.steps[p.at].size(); i++) {
        const Transfer& t = p.steps[p.at][i];
        for (int r = 0; r < comm.ranks && !t.done; r++) {
            const Mailbox& box = comm.mail(r, comm.rank);
            if (t.peer == ALL ? r == comm.rank || box.full : r != t.peer) continue;
            std::string mine = "rank " + std::to_string(comm.rank) + " waits in " + t.call->text();
            if (comm.is_gone(r)) {
                if (advance(p)) return;         // what it did before it left
                comm.publish(ncclRemoteError, "%s, but rank %d has ended or left", mine.c_str(), r);
            } else if (late) {
                std::string theirs = box.full ? "is in " + box.call.text() : "has not come";
                comm.publish(ncclRemoteError, "%s, but rank %d %s (CPU_CUDA=timeout=%d)", mine.c_str(), r,
                             theirs.c_str(), options().timeout);
            }
        }
    }
}

// Nothing that was not received may be taken for a result.
void give_up(const Program& p) {
    for (const Request* q : p.requests) {
        if (q->receives()) memset(q->receive, 0xff, q->receives());
    }
}

void run_to_end(Program& p) {
    Deadline deadline;
    while (!p.finished()) {
        unsigned seen = p.comm->bell(p.comm->rank);
        bool moved = advance(p);
        if (!p.finished() && p.comm->has_failed(&p.requests[0]->call)) return give_up(p);
        if (moved) deadline = Deadline();
        else if (!sleep_until_rung(*p.comm, seen)) look_for_missing(p, deadline.passed());
    }
}

// One communicator after the other.
void run(const std::vector<Request>& requests) {
    DeviceCode open;
    std::set<ncclComm*> begun;
    for (const Request& first : requests) {
        Program p = {first.comm.get(), {}, {}, {}};
        if (p.comm->error != ncclSuccess || !begun.insert(p.comm).second) continue;
        for (const Request& q : requests) {
            if (q.comm == first.comm) plan(q, p);
        }
        p.steps.push_back(p.messages);
        run_to_end(p);
    }
}

// ------------------------------------------------------------------------------------------------
// Requests

struct Group {
    int depth = 0;
    ncclResult_t error = ncclSuccess;
    std::vector<Request> requests;
};
thread_local Group group;
thread_local std::shared_ptr<CUevent_st> last_call;

// One operation in all its streams, after the thread's operation before it: with several communicators, ranks
// that force their streams (under `lazy`) in different orders would wait for one another.
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

// In place is only where NCCL documents it: this rank's block in the whole.
bool overlaps_wrongly(const Request& q) {
    size_t sends = q.sends(), receives = q.receives();
    bool apart = q.send + sends <= q.receive || q.receive + receives <= q.send;
    ptrdiff_t block = (ptrdiff_t)q.call.size() * q.comm->rank;
    ptrdiff_t in_place = q.call.kind == REDUCE_SCATTER ? block : q.call.kind == ALL_GATHER ? -block : 0;
    return sends && receives && !apart && q.receive - q.send != in_place;
}

ncclResult_t error_of(const Request& q) {
    const Signature& call = q.call;
    const char* name = kinds[call.kind].name;
    if ((unsigned)call.type >= ncclNumTypes) return refuse(ncclInvalidArgument, "%s: no such datatype", name);
    if ((unsigned)call.op >= ncclNumOps || (kinds[call.kind].reduces && !types[call.type].reduce)) {
        return refuse(ncclInvalidArgument, "%s: %s is not reduced so here", name, types[call.type].name);
    }
    if (call.root < 0 || call.root >= q.comm->ranks) {
        return refuse(ncclInvalidArgument, "%s: there is no rank %d", name, call.root);
    }
    if (!stream_exists(q.stream)) return refuse(ncclUnhandledCudaError, "%s: no such stream", name);
    for (bool received : {false, true}) {
        const char* p = received ? q.receive : q.send;
        if (!call.bytes(received, q.comm->rank, q.comm->ranks)) continue;
        if (!find_allocation(p)) return refuse(ncclInvalidArgument, "%s: %p is no device memory", name, p);
        bool aligned = (uintptr_t)p % types[call.type].size == 0;
        if (!aligned) return refuse(ncclInvalidArgument, "%s: %p is misaligned", name, p);
    }
    return ncclSuccess;
}

// Also of a group's later calls: its error is the first one's, and nothing of it runs.
ncclResult_t submit(Kind kind, const void* send, void* receive, size_t count, ncclDataType_t type,
                    ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream, Place here) {
    ncclResult_t error = comm ? comm->error.load() : refuse(ncclInvalidArgument, "the communicator is null");
    if (error == ncclSuccess) {
        Signature call = {kind, count, type, op, root, here.line, ""};
        size_t length = strlen(here.file), kept = std::min(length, sizeof call.file - 1);
        memcpy(call.file, here.file + length - kept, kept + 1);
        Request q = {call, (const char*)send, (char*)receive, comm->self, stream};
        error = error_of(q);
        if (error == ncclSuccess && overlaps_wrongly(q)) {
            stop(here, "%s: recvbuff overlaps sendbuff, but not in place", kinds[kind].name);
        }
        if (error == ncclSuccess && !group.depth) return launch({q});
        if (error == ncclSuccess) group.requests.push_back(q);
    }
    if (group.depth && group.error == ncclSuccess) group.error = error;
    return error;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// Communicators and groups

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
    unsigned long long n[2];
    if (!id) return refuse(ncclInvalidArgument, "ncclGetUniqueId: null pointer");
    if (getrandom(n, sizeof n, 0) != sizeof n) return refuse(ncclSystemError, "getrandom failed");
    *id = {};
    snprintf(id->internal, sizeof id->internal, "%s%016llx%016llx", NAME, n[0], n[1]);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* out, int ranks, ncclUniqueId id, int rank) {
    static thread_local std::set<std::string> used;
    if (!out || ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks) {
        return refuse(ncclInvalidArgument, "rank %d of %d, where %d are possible", rank, ranks, MAX_RANKS);
    }
    *out = nullptr;
    if (strncmp(id.internal, NAME, strlen(NAME)) || !memchr(id.internal, 0, sizeof id.internal)) {
        return refuse(ncclInvalidArgument, "found an ncclUniqueId that ncclGetUniqueId did not make");
    }
    if (group.depth) return refuse(ncclInvalidUsage, "ncclCommInitRank in a group: a thread is one rank");
    if (!used.insert(id.internal).second) return refuse(ncclInvalidUsage, "the ncclUniqueId was used before");
    auto comm = std::make_shared<ncclComm>(rank, ranks);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
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
    short none = F_UNLCK;
    comm->lock(F_OFD_SETLK, &none, comm->rank);
    std::shared_ptr<ncclComm> last = std::move(comm->self);
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

// ------------------------------------------------------------------------------------------------
// Collectives and messages

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(ALL_REDUCE, send, receive, count, type, op, 0, comm, stream, here);
}

ncclResult_t ncclReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(REDUCE, send, receive, count, type, op, root, comm, stream, here);
}

ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(REDUCE_SCATTER, send, receive, count, type, op, 0, comm, stream, here);
}

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(ALL_GATHER, send, receive, count, type, ncclSum, 0, comm, stream, here);
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(BROADCAST, send, receive, count, type, ncclSum, root, comm, stream, here);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream, Place here) {
    return submit(SEND, send, nullptr, count, type, ncclSum, peer, comm, stream, here);
}

ncclResult_t ncclRecv(void* receive, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream, Place here) {
    return submit(RECV, nullptr, receive, count, type, ncclSum, peer, comm, stream, here);
}
