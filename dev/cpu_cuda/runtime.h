// runtime.h: what the parts of the runtime know of one another.
//
//     fibers.cpp    threads, warps and blocks: barriers, warp operations, running a grid
//     memory.cpp    device and pinned memory, copies, faults
//     streams.cpp   streams, events, launching, errors, devices
//     check.cpp     races, uninitialised reads, bounds (only in a `--check` build); profile.cpp on the same hooks
//     ptx.cpp       mma, ldmatrix, cp.async;   blas.cpp   cuBLASLt;   nccl.cpp   NCCL over shared memory

#pragma once

#include "include/cuda_runtime.h"

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#ifndef CPU_CUDA_CHECK
#define CPU_CUDA_CHECK 0                // 1: user code is compiled with -fsanitize=thread and reports each access
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CPU_CUDA_ADDRESS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CPU_CUDA_ADDRESS 1
#endif
#endif
#ifndef CPU_CUDA_ADDRESS
#define CPU_CUDA_ADDRESS 0
#endif

namespace cpu_cuda {

constexpr bool checking = CPU_CUDA_CHECK, address_sanitizer = CPU_CUDA_ADDRESS;
constexpr int WARP = 32, STATUS_REPORT = 66;

// ------------------------------------------------------------------------------------------------
// Options: CPU_CUDA=order=random:7,lazy,threads=1. A word it does not know ends the program with status 2.

enum Order { FORWARD, REVERSE, RANDOM };

struct Options {
    int threads;            // threads=N        worker threads; 1 in a check build        (the machine's)
    Order order;            // order=forward | reverse | random:SEED: of blocks, warps and threads  (forward)
    unsigned seed;
    bool lazy;              // lazy             work waits in its stream until something forces it
    bool profile;           // profile          prints the table at the end (check build)
    int sms;                // sms=N            multiprocessors that cudaGetDeviceProperties shows  (2)
    int capability;         // cc=80            compute capability                                  (90)
    size_t memory;          // memory=MB        size of the device's memory                         (16384)
    int timeout;            // timeout=SECONDS  that a rank of a communicator waits for the others  (60)
};
const Options& options();

// One for the whole runtime: any host thread may call, one at a time is served.
std::recursive_mutex& runtime_lock();

// ------------------------------------------------------------------------------------------------
// Threads. Those of a block are fibers of one worker thread and never change it.

struct Thread;

struct Warp {
    unsigned live;                      // lanes that have not exited
    unsigned waiting;                   // lanes inside an operation
    Thread* lane0;                      // lane i is lane0 + i
    unsigned fresh;                     // lanes that never ran
    unsigned turn;                      // the lane that ran last
    bool mixed;                         // the waiting lanes differ in mask or operation
    unsigned number, slot;              // in the block, among the worker's
    void* arguments[WARP];
    struct Arrival { unsigned mask; const char* what; Place place; } arrivals[WARP];
};

struct AsyncCopy {                          // a cp.async under way
    void* to;
    const void* from;
    int size;
    unsigned bytes, group;
    Place place;
};

struct ThreadCopies {                   // of one thread; ptx.cpp's own
    std::vector<AsyncCopy> under_way;       // in the order of issue
    unsigned groups;                    // committed so far
};

struct Block {
    uint3 index;
    unsigned long long number;          // index as one number, x fastest
    unsigned threads, live;
    char* shared;                       // its shared memory: dynamic first, then the variables
    size_t shared_size, shared_used;
    Warp* warps;
    void* checks;                       // check.cpp's own
    struct Variable { const void* tag; char* at; size_t size; };
    std::vector<Variable> variables;
    std::vector<ThreadCopies> copies;   // by thread; empty when the block begins, and until one of its threads copies
    std::vector<Thread*> arrived[16];   // at barrier 0 (__syncthreads) and the named ones
};

enum Wait : short { RUNNING, AT_BARRIER, AT_WARP, AT_GRID, SPINNING };

struct alignas(64) Thread {             // one cache line
    void* stack_pointer;
    Warp* warp;
    Block* block;
    Place place;                        // where it waits
    uint3 index;
    int stack, result;
    unsigned short number;              // in the block
    Wait wait;
};

extern __thread Thread* current;        // null in host code

void run_grid(const Launch& launch);    // fibers.cpp: now, to its end
const Launch* current_launch();         // of this worker, or null
bool on_fiber_stack(const void* p);     // of any fiber of this worker
bool on_guard_page(const void* p);      // below such a stack: a fault there is a stack overflow
// Number of blocks of `threads` threads and `shared` bytes that a multiprocessor holds, by the limits of 9.0 or 8.0.
int blocks_per_multiprocessor(int threads, size_t shared);

// ------------------------------------------------------------------------------------------------
// Memory. Device memory is closed to host code by page protection: an access in a kernel opens it (a fault, once an allocation and launch),
// and it closes when the outermost DeviceCode ends.

enum MemoryKind { DEVICE, PINNED };

struct Allocation {
    char* base;
    size_t size;
    MemoryKind kind;
};

const Allocation* find_allocation(const void* p);       // the live one that holds p, or null

struct DeviceCode {                     // while one lives, this code may touch device memory
    DeviceCode();
    ~DeviceCode();
};

// A copy or a library reads or writes [p, p + size): stops if that leaves its allocation; tells the checks.
void use_memory(const void* p, size_t size, bool write, const char* what);

bool may_be_device_pointer(const void* p);              // in the range where such memory lives or lived, or at its end
void check_slack(const Launch& launch);                 // did it write between the allocations that it touched?
Place calling_line();                                   // the user's line that led here; slow, for a report
// The innermost line of the user at the first of these instructions that has one, functions inlined there included.
Place user_line(void* const* code, int count);
std::string describe(const void* p);                    // "4 bytes past the end of a device allocation of 1024 bytes"

// ------------------------------------------------------------------------------------------------
// Streams.

bool stream_exists(cudaStream_t stream);                // or is the default stream; false: cudaErrorInvalidResourceHandle
// Runs `work` in the order of the stream, which exists: now, or under `lazy` when something forces it.
void enqueue(cudaStream_t stream, std::function<void()> work);
cudaError_t remember(cudaError_t error);                // as cudaGetLastError's, and returns it

// ------------------------------------------------------------------------------------------------
// Checks: hooks that only a check build calls, as `if (checking) check::...`. The thread is `current`.

namespace check {

enum Access { READ, WRITE, ATOMIC };

void launch_begins(const Launch& launch);               // allows its argument copy
void launch_ends();
void block_begins(Block* block);
void block_ends(Block* block);
void barrier(Thread* const* threads, size_t count);     // these have met: what they did before comes before what they do next
void warp_barrier(Warp* warp, unsigned lanes);
void grid_barrier();                                    // all threads of all blocks have met
void fence();                                           // __threadfence of the current thread

void allocated(const void* p, size_t size, MemoryKind kind);
void freed(const void* p, size_t size);
void shared_begins(const void* p, size_t size);         // fresh: bytes nobody wrote
void initialised(const void* p, size_t size);           // written by the host or a library
void host_reads(const void* p, size_t size, const char* what);         // by a copy or a library: must be initialised

void copied(const void* to, const void* from, size_t size);            // within the device: what nobody wrote stays so

void access(const void* p, size_t size, Access kind, Place here);      // by the current thread, through the runtime
void copy_begins(const void* to, size_t size, Place here);             // cp.async: `to` may not be touched
void copy_ends(const void* to, size_t size, Place here);               // its wait: written now, by the current thread
void count_matrix_instruction();

}  // namespace check

namespace profile {                     // profile.cpp, called by check.cpp when options().profile

void launch_begins(const Launch& launch);
void launch_ends();
void block_ends(Block* block);
void barrier(Thread* const* threads, size_t count);
void warp_meets(Warp* warp);
void access(const void* p, size_t size, bool write, bool shared, uint32_t where);      // not an atomic or volatile one
void copy(const void* to, size_t size, uint32_t where);                // cp.async
void count_atomic();
void count_matrix_instruction();

}  // namespace profile
}  // namespace cpu_cuda
