// nccl.cpp: NCCL between processes of one machine, over a piece of shared memory a communicator, which holds
// a mailbox from each rank to each, itself too.
//
// A call becomes chunks to ranks and from ranks, which wait in a queue for each mailbox. Those of a group go
// side by side. Each carries its sender's call as a text, so a rank sees when another called something else.

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
constexpr size_t CHUNK = 32 << 10, MAX_TEXT = 128;

struct Mailbox {                        // shared memory begins as zeros
    std::atomic<bool> full;
    char text[MAX_TEXT];                // the sender's call
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

struct Type {
    const char* name;
    size_t size;
    void (*reduce)(const struct Call&);
};

struct Side {                           // what goes out of a rank, or comes in
    char* at;
    size_t size, step;                  // bytes of each rank, and from one rank's to the next's
};

struct Call : NcclCall {
    const Type* type;
    Side out, in;
    char text[MAX_TEXT] = "";
    std::vector<char> parts = {};       // what is to be reduced, of each rank

    bool reduces() const { return kind == ALL_REDUCE || kind == REDUCE_SCATTER; }
    size_t ranks() const { return (size_t)comm->ranks; }
    size_t total(const Side& side) const { return side.size + side.step * (ranks() - 1); }
};

// ------------------------------------------------------------------------------------------------
// Reductions, in the order of the ranks

template <class T>
void reduce(const Call& c) {
    typedef std::conditional_t<std::is_integral_v<T>, int64_t, float> Wide;
    const T* part = (const T*)c.parts.data();
    for (size_t i = 0; i < c.count; i++, part++) {
        Wide result = (Wide)*part;
        for (size_t r = 1; r < c.ranks(); r++) {
            Wide value = (Wide)part[c.count * r];
            result = c.op == ncclMax ? (Wide)std::fmax(result, value) : result + value;
        }
        ((T*)c.in.at)[i] = (T)(c.op == ncclAvg ? result / (Wide)c.ranks() : result);
    }
}

const std::map<ncclDataType_t, Type> types = {
    {ncclUint8, {"ncclUint8", 1, reduce<uint8_t>}},
    {ncclInt32, {"ncclInt32", 4, reduce<int32_t>}},
    {ncclFloat32, {"ncclFloat32", 4, reduce<float>}},
    {ncclBfloat16, {"ncclBfloat16", 2, reduce<__nv_bfloat16>}},
};

// ------------------------------------------------------------------------------------------------
// Running a group

struct Chunk {
    const Call* call;
    char* at;
    size_t size;
};

struct Queue {                          // of one mailbox
    Mailbox& box;
    bool out;
    int rank;                           // the other end
    std::vector<Chunk> chunks = {};
    size_t next = 0;

    bool done() const { return next == chunks.size() && !(out && box.full); }      // and received
};

// Moves a chunk. False: it has to wait.
bool step(Queue& q) {
    if (q.next == q.chunks.size() || q.box.full == q.out) return false;
    const Chunk& chunk = q.chunks[q.next++];
    const Call& c = *chunk.call;
    if (q.out) strcpy(q.box.text, c.text);
    else if (strcmp(q.box.text, c.text) != 0)
        stop(c.here, "calls that do not belong together: rank %d in %s, rank %d in %s", c.comm->rank, c.text,
             q.rank, q.box.text);
    std::copy_n(q.out ? chunk.at : q.box.data, chunk.size, q.out ? q.box.data : chunk.at);
    q.box.full = q.out;
    return true;
}

// Collectives may be in place: what a rank keeps of what it sends is already where it belongs.
bool clash(const Call& a, const Call& b) {
    size_t out = a.total(a.out), in = b.total(b.in), me = (size_t)a.comm->rank;
    bool apart = a.out.at + out <= b.in.at || b.in.at + in <= a.out.at || !out || !in;
    return !apart && (&a != &b || a.out.at + a.out.step * me != a.in.at + a.in.step * me);
}

void check_buffers(const std::vector<Call>& calls) {
    for (const Call& c : calls) {
        use_memory(c.out.at, c.total(c.out), false, c.text);
        use_memory(c.in.at, c.total(c.in), true, c.text);
        for (const Call& other : calls)
            if (clash(c, other)) stop(c.here, "the buffers of %s overlap, not as in place", c.text);
    }
}

// In each collective each rank sends each a chunk or more, so each sees what the others called.
void add_chunks(Queue& q, Call& c) {
    if (c.kind == (q.out ? RECV : SEND) || (c.kind >= SEND && q.rank != c.root)) return;
    bool to_parts = !q.out && c.reduces(), nothing = c.kind == BROADCAST && !q.out && q.rank != c.root;
    if (to_parts) c.parts.resize(c.in.size * c.ranks());
    Side side = q.out ? c.out : to_parts ? Side{c.parts.data(), c.in.size, c.in.size} : c.in;
    size_t left = nothing ? 0 : side.size;
    char* at = side.at + side.step * (size_t)q.rank;
    for (; left > CHUNK; at += CHUNK, left -= CHUNK) q.chunks.push_back({&c, at, CHUNK});
    q.chunks.push_back({&c, at, left});
}

// Gives way to other ranks, first briefly, then longer. False: it was the last time.
bool nap(int& naps) {
    if (naps < BRIEF_NAPS) sched_yield();
    else usleep(1000);
    return ++naps < BRIEF_NAPS + options().timeout * 1000;
}

[[noreturn]] void give_up(const Queue& late) {
    const Call& c = *late.chunks[std::min(late.next, late.chunks.size() - 1)].call;
    stop(c.here, "rank %d waits for rank %d in %s (CPU_CUDA=timeout=%d)", c.comm->rank, late.rank, c.text,
         options().timeout);
}

void run(std::vector<Call>& calls) {
    DeviceCode open;
    check_buffers(calls);
    ncclComm_t comm = calls[0].comm;
    std::vector<Queue> queues;
    for (int r = 0; r < comm->ranks; r++) queues.push_back({comm->region->mail[comm->rank][r], true, r});
    for (int r = 0; r < comm->ranks; r++) queues.push_back({comm->region->mail[r][comm->rank], false, r});
    for (Queue& q : queues)
        for (Call& c : calls) add_chunks(q, c);
    for (int naps = 0;;) {
        const Queue* late = nullptr;            // one that waits to receive, if there is one
        bool moved = false;
        for (Queue& q : queues) moved |= step(q);
        for (const Queue& q : queues) late = q.done() ? late : &q;
        if (!late) break;
        if (moved) naps = 0;
        else if (!nap(naps)) give_up(*late);
    }
    for (const Call& c : calls)
        if (c.reduces()) c.type->reduce(c);
}

thread_local std::vector<Call> group;
thread_local int group_depth;

}  // namespace

// ------------------------------------------------------------------------------------------------
// NCCL's functions. A call is a group, or a part of one, which runs at its end.

ncclResult_t cpu_cuda::nccl(const NcclCall& c) {
    static const char* const names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather",
                                        "ncclBroadcast", "ncclSend/Recv",     "ncclSend/Recv"};
    auto found = types.find(c.datatype);
    bool known = found != types.end() && (c.op == ncclSum || c.op == ncclMax || c.op == ncclAvg);
    if (!known || !c.comm || c.root < 0 || c.root >= c.comm->ranks) return ncclInvalidArgument;
    const Type& type = found->second;
    bool aligned = ((uintptr_t)c.send | (uintptr_t)c.receive) % type.size == 0;
    if (!aligned || !stream_exists(c.stream)) return ncclInvalidArgument;
    if (!group.empty() && (c.comm != group[0].comm || c.stream != group[0].stream)) return ncclInvalidUsage;
    bool sends = c.kind != RECV && (c.kind != BROADCAST || c.root == c.comm->rank);
    size_t size = c.count * type.size;
    Side out = {(char*)c.send, sends ? size : 0, c.kind == REDUCE_SCATTER ? size : 0};
    Side in = {(char*)c.receive, c.kind == SEND ? 0 : size, c.kind == ALL_GATHER ? size : 0};
    Call call = {c, &type, out, in};
    int to = c.kind == RECV ? c.comm->rank : c.root;    // so both sides of a message say the same
    snprintf(call.text, MAX_TEXT, "%s(count %zu, %s, op %d, rank %d)", names[c.kind], c.count, type.name,
             c.op, to);
    ncclGroupStart();
    group.push_back(call);
    return ncclGroupEnd();
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
    cudaStream_t stream = group[0].stream;
    if (!last_call) cudaEventCreateWithFlags(&last_call, cudaEventDisableTiming);
    cudaStreamWaitEvent(stream, last_call);
    enqueue(stream, [calls = std::exchange(group, {})]() mutable { run(calls); });
    cudaEventRecord(last_call, stream);
    return ncclSuccess;
}

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
