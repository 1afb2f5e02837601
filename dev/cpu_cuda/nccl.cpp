// nccl.cpp: NCCL between processes (or threads) of one machine, over a piece of shared memory a communicator:
//
//     Region (who is here, what went wrong) | Mailbox[from][to], 64 KB each
//
// An ncclUniqueId is its name, which vanishes as soon as all ranks have joined. A call becomes transfers
// into and out of mailboxes, one's own too, that go side by side. Each message carries its sender's call, so
// a rank sees when another called something else. Each rank holds a file lock on its byte of the region: the
// kernel drops it when the process ends, however it ends.

#include "include/nccl.h"
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/random.h>
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

constexpr int MAX_RANKS = 32;
constexpr size_t CHUNK = 64 << 10;
const std::string NAME = "/cpu_cuda_nccl.";

// ------------------------------------------------------------------------------------------------
// Reductions: in the order of the ranks; bf16 in fp32, rounded once. An average of floating-point numbers
// scales before it sums, as NCCL does; of integers it divides last.

template <class T>
void reduce(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op) {
    constexpr bool whole = std::is_integral_v<T>;
    typedef std::conditional_t<whole || sizeof(T) == sizeof(double), double, float> W;
    W scale = op == ncclAvg && !whole ? (W)1 / (W)ranks : (W)1;
    for (size_t i = 0; i < size / sizeof(T); i++) {
        W result = (W)((const T*)parts[0])[i] * scale;
        for (int r = 1; r < ranks; r++) {
            W value = (W)((const T*)parts[r])[i] * scale;
            bool extreme = op == ncclMax || op == ncclMin;
            if (!extreme) result += value;
            else result = op == ncclMax ? std::fmax(result, value) : std::fmin(result, value);
        }
        if constexpr (whole) ((T*)out)[i] = (T)(int64_t)(op == ncclAvg ? result / ranks : result);
        else ((T*)out)[i] = (T)result;
    }
}

const struct {
    const char* name;
    size_t size;
    void (*reduce)(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op);
} types[ncclNumTypes] = {
    {},
    {"ncclUint8", 1, reduce<uint8_t>},
    {"ncclInt32", 4, reduce<int32_t>},
    {}, {}, {}, {},
    {"ncclFloat32", 4, reduce<float>},
    {"ncclFloat64", 8, reduce<double>},
    {"ncclBfloat16", 2, reduce<__nv_bfloat16>},
};

const char* const operations[ncclNumOps] = {"ncclSum", nullptr, "ncclMax", "ncclMin", "ncclAvg"};

// ------------------------------------------------------------------------------------------------
// Calls

enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };

const struct {
    const char* name;
    bool reduces, gathers;
    const char* role;                   // of the rank that it names
} kinds[] = {
    {"ncclAllReduce", true, true, nullptr},
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

    // Where rank r's block begins in what so many ranks scatter or gather. The root's is all of it.
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
        std::string s = std::string(kinds[kind].name) + "(count " + std::to_string(count);
        s = s + ", " + types[type].name;
        if (kinds[kind].reduces) s = s + ", " + operations[op];
        if (kinds[kind].role) s = s + ", " + kinds[kind].role + " " + std::to_string(root);
        return s + ") at " + file + ":" + std::to_string(line);
    }
};

// ------------------------------------------------------------------------------------------------
// Communicators

struct alignas(64) Mailbox {
    std::atomic<bool> full;
    Signature call;                     // the sender's
    alignas(64) char data[CHUNK];
};

constexpr int FAILED = 2;

struct alignas(64) Region {
    std::atomic<int> ranks, joined;
    std::atomic<int> failed;            // 1 while the message is written, then FAILED + code
    char message[1024];
    std::atomic<bool> here[MAX_RANKS];
};

thread_local std::string last_error;

ncclResult_t refuse(ncclResult_t code, const std::string& text) {
    last_error = text;
    return code;
}

}  // namespace

struct ncclComm {
    int rank, ranks, file = -1;
    Region* region = nullptr;
    std::atomic<ncclResult_t> error{ncclSuccess};
    std::shared_ptr<ncclComm> self;     // until ncclCommDestroy; a call under way keeps it too

    ncclComm(int rank, int ranks) : rank(rank), ranks(ranks) {}
    ~ncclComm() {
        if (region) munmap(region, size());
        close(file);
    }
    size_t size() const { return sizeof(Region) + (size_t)(ranks * ranks) * sizeof(Mailbox); }
    Mailbox& mail(int from, int to) const { return ((Mailbox*)(region + 1))[from * ranks + to]; }

    // A rank holds its lock while it lives. True: it is taken now (F_OFD_SETLK), or free (F_OFD_GETLK).
    bool lock(int command, int r) const {
        struct flock lock = {};
        lock.l_type = F_WRLCK;
        lock.l_start = r;
        lock.l_len = 1;
        return fcntl(file, command, &lock) == 0 && (command == F_OFD_SETLK || lock.l_type == F_UNLCK);
    }
    // The first message ends the communicator for all its ranks.
    void publish(ncclResult_t code, const std::string& text) {
        int none = 0;
        if (!region->failed.compare_exchange_strong(none, 1)) return;
        snprintf(region->message, sizeof region->message, "%s", text.c_str());
        region->failed = FAILED + code;
    }
    // What somebody published becomes this rank's error; calls that do not belong together stop it.
    bool has_failed(Place here) {
        int failed = region->failed;
        ncclResult_t none = ncclSuccess, code = failed < FAILED ? none : (ncclResult_t)(failed - FAILED);
        if (code != none && error.compare_exchange_strong(none, code)) {
            if (code == ncclInvalidUsage) stop(here, "%s", region->message);
            fprintf(stderr, "cpu_cuda: rank %d: %s\n", rank, region->message);
            refuse(code, region->message);
        }
        return error != ncclSuccess;
    }
    bool is_gone(int r) const { return r != rank && region->here[r] && lock(F_OFD_GETLK, r); }

    // Publishes that rank r is gone, or else late; `waiting` is the call that waits for it.
    void miss(int r, const std::string& waiting, bool gone) {
        const Mailbox& box = mail(r, rank);
        std::string text = "rank " + std::to_string(rank) + " waits in " + waiting;
        text += " for rank " + std::to_string(r);
        if (!gone) text += " (CPU_CUDA=timeout=" + std::to_string(options().timeout) + ")";
        text += gone ? ", which has ended or left" : box.full ? ", which is in " + box.call.text() : "";
        publish(ncclRemoteError, text);
    }
};

namespace {

// Waiting for other ranks, first briefly, then longer. They may be threads, who call the runtime meanwhile.
struct Patience {
    std::chrono::steady_clock::time_point end = std::chrono::steady_clock::now();
    int naps = 0;

    Patience() { end += std::chrono::seconds(options().timeout); }
    bool ended() const { return std::chrono::steady_clock::now() > end; }

    // True: time to look for who is missing.
    bool nap() {
        int depth = 0;
        while (pthread_mutex_unlock(runtime_lock().native_handle()) == 0) depth++;
        if (++naps < 100) sched_yield();
        else usleep((useconds_t)std::min(naps, 1000));
        while (depth--) runtime_lock().lock();
        return naps > 100 && naps % 8 == 0;
    }
};

ncclResult_t open_region(ncclComm& comm, const char* name) {
    comm.file = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    // It never shrinks the file, and a full /dev/shm shows here.
    int error = comm.file < 0 ? errno : posix_fallocate(comm.file, 0, (off_t)comm.size());
    if (error) return refuse(ncclSystemError, std::string("no room in /dev/shm: ") + strerror(error));
    void* at = mmap(nullptr, comm.size(), PROT_READ | PROT_WRITE, MAP_SHARED, comm.file, 0);
    if (at == MAP_FAILED) return refuse(ncclSystemError, "no address range for shared memory");
    comm.region = (Region*)at;
    return ncclSuccess;
}

// Returns when all ranks are there, or when it is clear that they will not be.
ncclResult_t join(ncclComm& comm, const char* name) {
    ncclResult_t result = open_region(comm, name);
    if (result != ncclSuccess) return result;
    int ranks = 0;
    bool same = comm.region->ranks.compare_exchange_strong(ranks, comm.ranks) || ranks == comm.ranks;
    if (!same || !comm.lock(F_OFD_SETLK, comm.rank)) {
        std::string who = std::to_string(comm.rank) + " of " + std::to_string(comm.ranks);
        comm.publish(ncclInvalidArgument, "rank " + who + " was there, or another counts other ranks");
    } else {
        comm.region->here[comm.rank] = true;
        if (++comm.region->joined == comm.ranks) shm_unlink(name);
    }
    Patience patience;
    while (comm.region->joined < comm.ranks && !comm.has_failed({})) {
        if (!patience.nap()) continue;
        for (int r = 0; r < comm.ranks; r++) {
            bool late = !comm.region->here[r] && patience.ended(), gone = comm.is_gone(r);
            if (gone || late) comm.miss(r, "ncclCommInitRank", gone);
        }
    }
    if (comm.error != ncclSuccess) shm_unlink(name);
    return comm.error;
}

// ------------------------------------------------------------------------------------------------
// Transfers

struct Transfer {
    bool put;                           // into a mailbox, or taken from mailboxes
    int first, last;                    // the ranks; several: their messages are reduced
    char* data;                         // sent from here, or received to here
    size_t left;                        // bytes to go; even none of them takes one message
    const Signature* call;
    bool begun = false, done = false;

    void advance(size_t size) {
        data += size;
        left -= size;
        begun = true;
    }
};

void copy(char* to, const char* from, size_t size) {
    if (size) memcpy(to, from, size);
}

bool put(ncclComm& comm, Transfer& t) {
    Mailbox& box = comm.mail(comm.rank, t.first);
    if (box.full) return false;
    if (t.begun && !t.left) return t.done = true;       // the receiver has all of it
    size_t size = std::min(CHUNK, t.left);
    box.call = *t.call;
    copy(box.data, t.data, size);
    t.advance(size);
    box.full = true;
    return true;
}

bool take(ncclComm& comm, Transfer& t) {
    const char* parts[MAX_RANKS];
    for (int r = t.first; r <= t.last; r++) {
        Mailbox& box = comm.mail(r, comm.rank);
        if (!box.full) return false;
        parts[r - t.first] = box.data;
        if (box.call.answers(*t.call)) continue;
        std::string text = "calls that do not belong together: ";
        text += "rank " + std::to_string(comm.rank) + " in " + t.call->text();
        text += ", rank " + std::to_string(r) + " in " + box.call.text();
        comm.publish(ncclInvalidUsage, text);
        return false;
    }
    size_t size = std::min(CHUNK, t.left);
    if (t.first < t.last) types[t.call->type].reduce(t.data, parts, comm.ranks, size, t.call->op);
    else copy(t.data, parts[0], size);
    t.advance(size);
    t.done = !t.left;
    for (int r = t.first; r <= t.last; r++) comm.mail(r, comm.rank).full = false;
    return true;
}

// Side by side, but those of one direction and rank one after the other. True: something moved.
bool advance(ncclComm& comm, std::vector<Transfer>& transfers) {
    std::set<std::pair<bool, int>> busy;
    bool moved = false;
    for (Transfer& t : transfers) {
        if (t.done || !busy.insert({t.put, t.first}).second) continue;
        moved |= t.put ? put(comm, t) : take(comm, t);
    }
    return moved;
}

// Another rank that a transfer waits for, or -1: any, or one that is gone.
int awaited(const ncclComm& comm, const Transfer& t, bool gone) {
    for (int r = t.first; r <= t.last && !t.done; r++) {
        bool waits = r != comm.rank && (t.put || !comm.mail(r, comm.rank).full);
        if (waits && (!gone || comm.is_gone(r))) return r;
    }
    return -1;
}

void run_to_end(ncclComm& comm, std::vector<Transfer> transfers) {
    Patience patience;
    auto ongoing = [](const Transfer& t) { return !t.done; };
    for (bool look = false;;) {
        auto waiting = std::find_if(transfers.begin(), transfers.end(), ongoing);
        if (waiting == transfers.end() || comm.has_failed({waiting->call->file, waiting->call->line})) return;
        // What a rank did before it left is seen after it is seen to have left.
        bool late = look && patience.ended();
        int lost = -1;
        for (auto t = waiting; look && lost < 0 && t != transfers.end(); t++) {
            lost = awaited(comm, *t, !late);
            if (lost >= 0) waiting = t;
        }
        if (advance(comm, transfers)) {
            patience = Patience();
            look = false;
            continue;
        }
        if (late && lost < 0) lost = comm.rank;
        if (lost >= 0) comm.miss(lost, waiting->call->text(), comm.is_gone(lost));
        look = patience.nap();
    }
}

// ------------------------------------------------------------------------------------------------
// Requests

struct Request {
    Signature call;
    char *send, *receive;
    std::shared_ptr<ncclComm> comm;
    cudaStream_t stream;

    size_t sends() const { return call.bytes(false, comm->rank, comm->ranks); }
    size_t receives() const { return call.bytes(true, comm->rank, comm->ranks); }
};

// With blocks (see Signature): each rank sends all ranks their blocks and reduces its own; then it sends
// that to all. So each pair of ranks exchanges messages in each collective, and sees what the other called.
void run_collective(const Request& q) {
    const Signature* call = &q.call;
    int me = q.comm->rank, ranks = q.comm->ranks;
    auto begin = [&](int r) { return call->block(r, ranks); };
    auto size = [&](int r) { return begin(r + 1) - begin(r); };
    bool reduces = kinds[call->kind].reduces, gathers = kinds[call->kind].gathers;
    char* mine = gathers ? q.receive + begin(me) : q.receive;
    std::vector<Transfer> scatter, gather;
    for (int r = 0; r < ranks; r++) {
        scatter.push_back({true, r, r, q.send + begin(r), size(r), call});
        gather.push_back({true, r, r, reduces ? mine : q.send, size(me), call});
        gather.push_back({false, r, r, q.receive + begin(r), size(r), call});
    }
    scatter.push_back({false, 0, ranks - 1, mine, size(me), call});
    if (reduces) run_to_end(*q.comm, scatter);
    if (gathers) run_to_end(*q.comm, gather);
}

// Requests of one communicator and stream. All messages go at once, after the collectives.
void run(const std::vector<Request>& requests) {
    DeviceCode open;
    ncclComm& comm = *requests[0].comm;
    std::vector<Transfer> messages;
    if (comm.error != ncclSuccess) return;
    for (const Request& q : requests) {
        bool sends = q.call.kind == SEND, message = sends || q.call.kind == RECV;
        use_memory(q.send, q.sends(), false, kinds[q.call.kind].name);
        use_memory(q.receive, q.receives(), true, kinds[q.call.kind].name);
        char* data = sends ? q.send : q.receive;
        if (message) messages.push_back({sends, q.call.root, q.call.root, data, q.call.size(), &q.call});
        else run_collective(q);
    }
    run_to_end(comm, messages);
    if (comm.error == ncclSuccess) return;
    for (const Request& q : requests)           // what was not received may not be taken for a result
        if (q.receives()) memset(q.receive, 0xff, q.receives());
}

thread_local std::vector<Request> group;
thread_local int group_depth;
thread_local ncclResult_t group_error;
thread_local cudaEvent_t last_call;

// After the thread's call before it: with several communicators, ranks that force their streams (under
// `lazy`) in different orders would wait for one another.
ncclResult_t launch(const std::vector<Request>& requests) {
    if (!last_call) cudaEventCreateWithFlags(&last_call, cudaEventDisableTiming);
    cudaStreamWaitEvent(requests[0].stream, last_call);
    enqueue(requests[0].stream, [requests] { run(requests); });
    cudaEventRecord(last_call, requests[0].stream);
    return requests[0].comm->error;
}

bool is_valid(const Request& q) {
    const Signature& call = q.call;
    if ((unsigned)call.type >= ncclNumTypes || !types[call.type].size) return false;
    if ((unsigned)call.op >= ncclNumOps || !operations[call.op]) return false;
    if (call.root < 0 || call.root >= q.comm->ranks || !stream_exists(q.stream)) return false;
    size_t sends = q.sends(), receives = q.receives(), block = call.size() * (size_t)q.comm->rank;
    bool aligned = ((uintptr_t)q.send | (uintptr_t)q.receive) % types[call.type].size == 0;
    if (!aligned || (sends && !find_allocation(q.send))) return false;
    if (receives && !find_allocation(q.receive)) return false;
    bool apart = !sends || !receives || q.send + sends <= q.receive || q.receive + receives <= q.send;
    const char* in_place = call.kind == REDUCE_SCATTER ? q.send + block : q.send;
    return apart || in_place == (call.kind == ALL_GATHER ? q.receive + block : q.receive);
}

// In a group, the first error is the group's, and nothing of it runs.
ncclResult_t submit(Kind kind, const void* send, void* receive, size_t count, ncclDataType_t type,
                    ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream, Place here) {
    std::string where = std::string(kinds[kind].name) + " at " + here.file + ":" + std::to_string(here.line);
    if (!comm) return refuse(ncclInvalidArgument, where + ": the communicator is null");
    Signature call = {kind, count, type, op, root, here.line, ""};
    size_t length = strlen(here.file), kept = std::min(length, sizeof call.file - 1);
    memcpy(call.file, here.file + length - kept, kept + 1);
    Request q = {call, (char*)send, (char*)receive, comm->self, stream};
    ncclResult_t error = comm->error;
    if (error == ncclSuccess && !is_valid(q)) {
        where += ": found a number or stream that does not exist, or a buffer that is no device memory";
        error = refuse(ncclInvalidArgument, where + ", is misaligned, or overlaps the other, not in place");
    }
    if (!group_depth) return error == ncclSuccess ? launch({q}) : error;
    group.push_back(q);
    if (error == ncclSuccess && (comm != group[0].comm.get() || stream != group[0].stream)) {
        error = refuse(ncclInvalidUsage, where + ": here a group has one communicator and one stream");
    }
    if (group_error == ncclSuccess) group_error = error;
    return error;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// NCCL's functions

ncclResult_t ncclGetVersion(int* version) {
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

const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    unsigned long long n[2];
    if (getrandom(n, sizeof n, 0) != sizeof n) return refuse(ncclSystemError, "getrandom failed");
    *id = {};
    snprintf(id->internal, sizeof id->internal, "%s%016llx%016llx", NAME.c_str(), n[0], n[1]);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* out, int ranks, ncclUniqueId id, int rank) {
    static thread_local std::set<std::string> used;
    std::string name(id.internal, strnlen(id.internal, sizeof id.internal - 1));
    bool made_here = name.compare(0, NAME.size(), NAME) == 0;
    if (!made_here || ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks) {
        return refuse(ncclInvalidArgument, "ncclCommInitRank: not ncclGetUniqueId's id, or no such rank");
    }
    if (group_depth || !used.insert(name).second) {
        return refuse(ncclInvalidUsage, "ncclCommInitRank: in a group, or with an id that was used before");
    }
    auto comm = std::make_shared<ncclComm>(rank, ranks);
    ncclResult_t result = join(*comm, name.c_str());
    if (result != ncclSuccess) return result;
    comm->self = comm;
    *out = comm.get();
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (last_call) cudaEventSynchronize(last_call);
    if (comm) std::shared_ptr<ncclComm>().swap(comm->self);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    comm->error = ncclInvalidUsage;
    close(std::exchange(comm->file, -1));
    std::shared_ptr<ncclComm>().swap(comm->self);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    *error = comm->error;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    *count = comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (!group_depth) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth) return ncclSuccess;
    ncclResult_t error = std::exchange(group_error, ncclSuccess);
    std::vector<Request> requests = std::exchange(group, {});
    return error != ncclSuccess || requests.empty() ? error : launch(requests);
}

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream, Place here) {
    return submit(ALL_REDUCE, send, receive, count, type, op, 0, comm, stream, here);
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
