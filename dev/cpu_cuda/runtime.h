// runtime.h: what the parts of the runtime know of one another.
//
//     fibers.cpp    threads, warps and blocks: barriers, warp operations, running a grid
//     memory.cpp    device and pinned memory, copies, faults
//     streams.cpp   streams, events, launching, errors, devices
//     check.cpp     races, uninitialised reads, bounds (only in a `--check` build);   profile.cpp
//     ptx.cpp       mma, ldmatrix, cp.async;   blas.cpp   cuBLASLt;   nccl.cpp   NCCL over shared memory

#pragma once

#include "include/cuda_runtime.h"

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace cpu_cuda {

constexpr int WARP = 32;
constexpr size_t SHARED_ARENA = 512 << 10;              // of a block, with room for gaps
constexpr bool checking = CPU_CUDA_CHECK;               // user code, by -fsanitize=thread, reports accesses
constexpr bool address_sanitizer = CPU_CUDA_ADDRESS;    // it watches both, the user's code and this

// Options: CPU_CUDA=order=random:7,lazy,threads=1. A word it does not know ends the program with status 2.
enum Order { FORWARD, REVERSE, RANDOM };
struct Options {
    int threads;                // threads=N        worker threads; 1 in a check build (processors, to 16)
    Order order = FORWARD;      // order=forward | reverse | random:SEED: of blocks, warps and threads
    unsigned seed = 0;
    bool lazy = false;          // lazy             work waits in its stream until something forces it
    bool profile = false;       // profile          prints the table at the end (check build)
    int sms = 2;                // sms=N            multiprocessors that cudaGetDeviceProperties shows
    int capability = 90;        // cc=80            compute capability
    size_t memory = 16384;      // memory=MB        size of the device's memory; in bytes once it is read
    int timeout = 60;           // timeout=SECONDS  that a rank of a communicator waits for the others
    int devices = 8;            // devices=N        that a machine has: processes may take one each
};
const Options& options();

std::recursive_mutex& runtime_lock();   // any host thread may call, one at a time is served

// ------------------------------------------------------------------------------------------------
// Threads. Those of a block are fibers of one worker thread and never change it.

struct Thread;

struct Warp {
    Thread* lane0;                      // lane i is lane0 + i
    unsigned live;                      // lanes that have not exited
    unsigned ready;                     // that may run
    unsigned waiting;                   // inside an operation
    unsigned turn;                      // the lane that ran last
};

struct AsyncCopy {                      // a cp.async under way
    void* to;
    const void* from;
    int size;
    unsigned bytes, group;
    Place place;
};

struct ThreadCopies {                   // of one thread; ptx.cpp's own
    std::vector<AsyncCopy> under_way;   // in the order of issue
    unsigned groups;                    // committed so far
};

struct Barrier {
    std::vector<Thread*> arrived;
    unsigned expected;                  // of threads
    int votes, result;                  // predicates that hold: of these, and when threads met before
};

struct Block {
    uint3 index;
    size_t number;                      // index as one number, x fastest
    unsigned threads, live;
    char* shared;                       // its shared memory: dynamic first, then the variables
    size_t shared_used;
    Warp* warps;
    std::shared_ptr<void> checks;       // check.cpp's own
    struct Variable { const void* tag; char* at; size_t size; };
    std::vector<Variable> variables;    // the first is the dynamic array
    std::vector<ThreadCopies> copies;   // by thread; empty until one of them copies
    Barrier barriers[16];               // 0: __syncthreads
};

struct alignas(64) Thread {
    void* stack_pointer;                // null: has not run, or has exited
    char* stack;                        // its lowest byte
    Warp* warp;
    Block* block;
    uint3 index;
    unsigned number;                    // in the block
    const char* what;                   // the operation that it waits in, or did last
    Place place;                        // its line
    unsigned mask;
    void* argument;

    unsigned bit() const { return 1u << number % WARP; }
};

extern __thread Thread* current;        // null in host code

void run_grid(const Launch& launch);    // now, to its end
const Launch* current_launch();         // of this worker, or null
bool on_fiber_stack(const void* p);     // of any fiber of this worker
bool on_guard_page(const void* p);      // below such a stack: a fault there is a stack overflow
uint3 index_of(size_t number, uint3 size);
std::string text_of(uint3 index);
std::string text_of(Place place);
// How many such blocks a multiprocessor holds, by the limits of 9.0 or 8.0.
int blocks_per_multiprocessor(int threads, size_t shared);

// ------------------------------------------------------------------------------------------------
// Memory. Device memory is closed to host code by page protection: an access in a kernel opens it (a fault,
// once an allocation and launch), and it closes when the outermost DeviceCode ends.

struct DeviceCode {                     // while one lives, this code may touch device memory
    DeviceCode();
    ~DeviceCode();
};

// A copy or a library reads or writes [p, p + size): stops if that leaves its allocation; tells the checks.
void use_memory(const void* p, size_t size, bool write, const char* what);
bool is_allocated(const void* p, size_t size);  // all of it, in one live allocation
bool may_be_device_pointer(const void* p);      // where such memory lives or lived, or at its end
void check_slack(const Launch& launch);         // did it write between the allocations that it touched?
// Each of these words that points into host memory becomes an address at which every access faults, which is
// then reported with the pointer; so a kernel may receive it, unless it uses it.
void close_host_pointers(void* words, size_t size);
Place calling_line();                           // the user's line that led here; slow, for a report
// The innermost line of the user at the first of these instructions that has one, inlined functions included.
Place user_line(void* const* code, int count);
std::string describe(const void* p);            // "4 bytes past the end of a device allocation of 1024 bytes"

// ------------------------------------------------------------------------------------------------
// Streams

bool stream_exists(cudaStream_t stream);        // or is the default stream
// Runs `work` in the order of the stream, which exists: now, or under `lazy` when something forces it.
void enqueue(cudaStream_t stream, std::function<void()> work);
cudaError_t remember(cudaError_t error);        // as cudaGetLastError's, and returns it

// ------------------------------------------------------------------------------------------------
// Checks: hooks that only a check build calls, as `if (checking) check::...`. The thread is `current`.

namespace check {

enum Access { READ, WRITE, ATOMIC };
enum State : uint8_t { OUTSIDE, UNWRITTEN, WRITTEN };                   // of a byte

void launch_begins(const Launch& launch);
void block_begins(Block* block);
void block_ends(Block* block);
void barrier(Thread* const* threads, size_t count);                     // these have met, of one block
void warp_barrier(Warp* warp, unsigned lanes);
void grid_barrier();                                                    // all threads of all blocks have met
void fence();                                                           // __threadfence
void watch(const void* p, size_t size, State state);                    // from now on, until it is freed
void freed(const void* p, size_t size);
void mark(const void* p, size_t size, State state);
void host_reads(const void* p, size_t size, const char* what);          // must be written
void copied(const void* to, const void* from, size_t size);             // what nobody wrote stays so
void access(const void* p, size_t size, Access kind, Place here);       // through the runtime
void copy_begins(const void* to, size_t size, Place here);              // cp.async: `to` may not be touched
void copy_ends(const void* to, size_t size, Place here);                // its wait: written now

}  // namespace check

namespace profile {                     // check.cpp calls it when options().profile

enum Column { LAUNCHES, READ, WRITTEN, SECTORS, PASSES, BARRIERS, ATOMICS, MATRIX, COPIED, COLUMNS };

void launch_begins(const Launch& launch);
void warp_meets(const Warp* warp);
void access(const void* p, size_t size, bool write, bool shared, uint32_t where);       // a plain one
void count(Column column, uint64_t n);                                  // if it profiles

}  // namespace profile
}  // namespace cpu_cuda
