// nccl.cpp: NCCL between processes of one machine, over a piece of shared memory a communicator, which holds
// a mailbox from each rank to each, itself too.
//
// A call becomes transfers: what its rank puts into mailboxes, chunk by chunk, and takes from mailboxes. All
// of a group's go side by side, but those of one direction and rank one after the other. Each chunk carries
// its sender's call as a text, so a rank sees when another called something else.

#include "include/nccl.h"
#include "runtime.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <random>

using namespace cpu_cuda;

constexpr int MAX_RANKS = 16, BRIEF_NAPS = 100;
constexpr size_t CHUNK = 32 << 10, MAX_CALL = 128;

// ------------------------------------------------------------------------------------------------
// Shared memory. It begins as zeros.

struct Mailbox {
    std::atomic<bool> full;
    char call[MAX_CALL];                // the sender's
    alignas(64) char data[CHUNK];
};

struct Region {
    std::atomic<int> joined;
    std::atomic<bool> here[MAX_RANKS];
    Mailbox mail[MAX_RANKS][MAX_RANKS]; // from, to
};

struct ncclComm {
    int rank, ranks;
    Region* region;
};

namespace {

// Gives way to other ranks, first briefly, then longer. False: it was the last time.
bool nap(int& naps) {
    if (naps < BRIEF_NAPS) sched_yield();
    else usleep(1000);
    return ++naps < BRIEF_NAPS + options().timeout * 1000;
}

// ------------------------------------------------------------------------------------------------
// Types and their reductions, in the order of the ranks

template <class T>
void reduce(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op) {
    typedef std::conditional_t<std::is_integral_v<T>, int64_t, float> Wide;
    for (size_t i = 0; i < size / sizeof(T); i++) {
        Wide result = (Wide)((const T*)parts[0])[i];
        for (int r = 1; r < ranks; r++) {
            Wide value = (Wide)((const T*)parts[r])[i];
            result = op == ncclMax ? (Wide)std::fmax(result, value) : result + value;
        }
        ((T*)out)[i] = (T)(op == ncclAvg ? result / (Wide)ranks : result);
    }
}

struct Type {
    const char* name;
    size_t size;
    void (*reduce)(char* out, const char* const* parts, int ranks, size_t size, ncclRedOp_t op);
};

const std::map<ncclDataType_t, Type> types = {
    {ncclUint8, {"ncclUint8", 1, reduce<uint8_t>}},
    {ncclInt32, {"ncclInt32", 4, reduce<int32_t>}},
    {ncclFloat32, {"ncclFloat32", 4, reduce<float>}},
    {ncclBfloat16, {"ncclBfloat16", 2, reduce<__nv_bfloat16>}},
};

// ------------------------------------------------------------------------------------------------
// Transfers

struct Transfer {
    ncclComm_t comm;
    Type type;
    ncclRedOp_t op;
    std::string call;
    Place here;
    bool put = false;                   // into mailboxes, or taken from mailboxes
    int first = 0, last = 0;            // the other ends; what comes from several ranks is reduced
    char* data = nullptr;               // sent from here, or received to here
    size_t left = 0;                    // bytes to go; even none of them takes one chunk
    bool begun = false, done = false;

    bool with(int r) const { return first <= r && r <= last; }
    Mailbox& box(int r) const { return comm->region->mail[put ? comm->rank : r][put ? r : comm->rank]; }
    bool ready(int r) const { return box(r).full != put; }
};

void put(const Transfer& t, size_t size) {
    for (int r = t.first; r <= t.last; r++) {
        snprintf(t.box(r).call, MAX_CALL, "%s", t.call.c_str());
        std::copy_n(t.data, size, t.box(r).data);
    }
}

void take(const Transfer& t, size_t size) {
    const char* parts[MAX_RANKS];
    for (int r = t.first; r <= t.last; r++) {
        if (t.call != t.box(r).call)
            stop(t.here, "calls that do not belong together: rank %d in %s, rank %d in %s", t.comm->rank,
                 t.call.c_str(), r, t.box(r).call);
        parts[r - t.first] = t.box(r).data;
    }
    if (t.first == t.last) std::copy_n(parts[0], size, t.data);
    else t.type.reduce(t.data, parts, t.comm->ranks, size, t.op);
}

// Moves a chunk between the data and all the mailboxes at once: in place, it is sent before it is received.
// False: it has to wait.
bool move(Transfer& t) {
    for (int r = t.first; r <= t.last; r++)
        if (!t.ready(r)) return false;
    if (t.put && t.begun && !t.left) return t.done = true;      // the receivers have all of it
    size_t size = std::min(CHUNK, t.left);
    if (t.put) put(t, size);
    else take(t, size);
    for (int r = t.first; r <= t.last; r++) t.box(r).full = t.put;
    t.data += size;
    t.left -= size;
    t.begun = true;
    t.done = !t.put && !t.left;
    return true;
}

bool move_any(std::vector<Transfer>& transfers) {
    bool busy[2][MAX_RANKS] = {}, moved = false;
    for (Transfer& t : transfers) {
        bool blocked = t.done;
        for (int r = t.first; r <= t.last && !t.done; r++) blocked |= std::exchange(busy[t.put][r], true);
        moved |= !blocked && move(t);
    }
    return moved;
}

// Names a rank that has not sent, else one that has not received.
[[noreturn]] void give_up(const std::vector<Transfer>& transfers) {
    auto t = std::find_if(transfers.begin(), transfers.end(), [](auto& t) { return !t.done && !t.put; });
    if (t == transfers.end())
        t = std::find_if(transfers.begin(), transfers.end(), [](auto& t) { return !t.done; });
    int me = t->comm->rank, r = t->first;
    while (r < t->last && (r == me || t->ready(r))) r++;
    stop(t->here, "rank %d waits for rank %d in %s (CPU_CUDA=timeout=%d)", me, r, t->call.c_str(),
         options().timeout);
}

// Collectives may be in place: what a rank keeps of what it sends is already where it belongs.
bool clash(const Transfer& a, const Transfer& b) {
    bool apart = a.data + a.left <= b.data || b.data + b.left <= a.data || !a.left || !b.left;
    bool in_place = a.data == b.data && a.with(a.comm->rank) && b.with(a.comm->rank);
    return a.put && !b.put && !apart && !in_place;
}

void run(std::vector<Transfer>& transfers) {
    DeviceCode open;
    for (const Transfer& t : transfers) {
        use_memory(t.data, t.left, !t.put, t.call.c_str());
        for (const Transfer& other : transfers)
            if (clash(t, other)) stop(t.here, "the buffers of %s overlap, not as in place", t.call.c_str());
    }
    auto done = [](const Transfer& t) { return t.done; };
    for (int naps = 0; !std::all_of(transfers.begin(), transfers.end(), done);) {
        if (move_any(transfers)) naps = 0;
        else if (!nap(naps)) give_up(transfers);
    }
}

// ------------------------------------------------------------------------------------------------
// Calls. Each is a group, or a part of one, which runs at its end.

thread_local std::vector<Transfer> group;
thread_local cudaStream_t group_stream;
thread_local int group_depth;

enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };

const char* const names[] = {
    "ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast", "ncclSend/Recv", "ncclSend/Recv",
};

void add(const Transfer& t, bool put, int first, int last, const char* data, size_t size) {
    group.push_back({t.comm, t.type, t.op, t.call, t.here, put, first, last, (char*)data, size});
}

// In each collective each rank sends each a chunk or more, so each sees what the others called.
void add_all(const Transfer& t, Kind kind, const char* send, char* receive, size_t size, int root) {
    int ranks = t.comm->ranks, all = ranks - 1;
    bool scatter = kind == REDUCE_SCATTER, reduces = scatter || kind == ALL_REDUCE;
    if (kind == SEND) return add(t, true, root, root, send, size);
    if (kind == RECV) return add(t, false, root, root, receive, size);
    if (!scatter) add(t, true, 0, all, send, kind == BROADCAST && root != t.comm->rank ? 0 : size);
    for (int r = 0; r < ranks && scatter; r++) add(t, true, r, r, send + size * (size_t)r, size);
    if (reduces) return add(t, false, 0, all, receive, size);
    for (int r = 0; r < ranks; r++) {
        size_t block = kind == ALL_GATHER ? size * (size_t)r : 0;
        add(t, false, r, r, receive + block, kind == BROADCAST && root != r ? 0 : size);
    }
}

ncclResult_t submit(Kind kind, const void* send, void* receive, size_t count, ncclDataType_t datatype,
                    ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream, Place here) {
    auto found = types.find(datatype);
    bool known = found != types.end() && (op == ncclSum || op == ncclMax || op == ncclAvg);
    if (!known || !comm || root < 0 || root >= comm->ranks) return ncclInvalidArgument;
    const Type& type = found->second;
    bool aligned = ((uintptr_t)send | (uintptr_t)receive) % type.size == 0;
    if (!aligned || !stream_exists(stream)) return ncclInvalidArgument;
    if (!group.empty() && (comm != group[0].comm || stream != group_stream)) return ncclInvalidUsage;
    char call[MAX_CALL];
    int to = kind == RECV ? comm->rank : root;          // so both sides of a message say the same
    snprintf(call, sizeof call, "%s(count %zu, %s, op %d, rank %d)", names[kind], count, type.name, op, to);
    ncclGroupStart();
    group_stream = stream;
    add_all({comm, type, op, call, here}, kind, (const char*)send, (char*)receive, count * type.size, root);
    return ncclGroupEnd();
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// NCCL's functions

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    }
    return "unknown result code";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::random_device random;
    *id = {};
    snprintf(id->internal, sizeof id->internal, "/cpu_cuda_nccl.%08x%08x%08x", random(), random(), random());
    return ncclSuccess;
}

// Returns when all ranks are there. The id's name vanishes then.
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, Place here) {
    if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks) return ncclInvalidArgument;
    std::string name(id.internal, strnlen(id.internal, sizeof id.internal));
    int file = shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (posix_fallocate(file, 0, sizeof(Region)) != 0) return ncclSystemError;  // /dev/shm is full
    Region* region = (Region*)mmap(nullptr, sizeof(Region), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (region == MAP_FAILED) return ncclSystemError;
    if (region->here[rank].exchange(true)) return ncclInvalidArgument;
    region->joined++;
    for (int naps = 0; region->joined < ranks && nap(naps);) continue;
    shm_unlink(name.c_str());
    if (region->joined < ranks)
        stop(here, "rank %d waits for %d ranks in ncclCommInitRank (CPU_CUDA=timeout=%d)", rank,
             ranks - region->joined, options().timeout);
    *comm = new ncclComm{rank, ranks, region};
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return ncclInvalidArgument;
    cudaDeviceSynchronize();
    munmap(comm->region, sizeof *comm->region);
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}

// After the thread's call before it: with several communicators, ranks that force their streams (under
// `lazy`) in different orders would wait for one another.
ncclResult_t ncclGroupEnd() {
    static thread_local cudaEvent_t last_call;
    if (!group_depth) return ncclInvalidUsage;
    if (--group_depth || group.empty()) return ncclSuccess;
    if (!last_call) cudaEventCreateWithFlags(&last_call, cudaEventDisableTiming);
    cudaStreamWaitEvent(group_stream, last_call);
    enqueue(group_stream, [transfers = std::exchange(group, {})]() mutable { run(transfers); });
    cudaEventRecord(last_call, group_stream);
    return ncclSuccess;
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
