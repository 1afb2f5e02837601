// engine.h: what the CUDA headers here ask of the runtime. A kernel's own source never names it.
//
// Kept light, since it is compiled into every file: the work is done in the runtime, which is compiled once.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

typedef struct CUstream_st* cudaStream_t;

struct uint3 { unsigned x, y, z; };
struct dim3 : uint3 {
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
    constexpr dim3(uint3 v) : uint3(v) {}
};

namespace cpu_cuda {

// A line of the user's source. As a default argument it is the line of the call.
struct Place {
    const char* file;
    int line;
};
#define CPU_CUDA_HERE ::cpu_cuda::Place here = {__builtin_FILE(), __builtin_LINE()}

// One message (what, kernel, block, thread, file and line) on stderr, then exit status 66.
[[noreturn]] void stop(Place here, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ------------------------------------------------------------------------------------------------
// A warp. Every lane of `mask` calls; the last to arrive runs `work` once for all of them.

// arguments[lane] is what that lane passed, for the lanes in the set `lanes`.
typedef void (*WarpWork)(void** arguments, unsigned lanes);

// Lanes meet when mask and `what` (compared by its text) agree; else they wait, which may end as a deadlock.
// A mask without the calling lane, or with one that has exited or never existed, is reported.
void warp_together(WarpWork work, void* argument, unsigned mask, const char* what, Place here);

template <class F>
void each_lane(unsigned lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

enum ShuffleKind { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };

// *result becomes the source lane's value, of `size` bytes; a source lane that takes no part is reported.
void shuffle(const void* value, void* result, size_t size, ShuffleKind kind, int operand, int width,
             unsigned mask, const char* what, Place here);

void warp_barrier(unsigned mask, Place here);       // __syncwarp: the only warp operation that orders memory

// ------------------------------------------------------------------------------------------------
// A block and a grid

int block_barrier(int predicate, const char* what, Place here);     // returns how many predicates hold
void named_barrier(int id, int threads, Place here);                // bar.sync id, threads
void grid_barrier(Place here);                                      // of a cooperative launch
void spin_wait(Place here);                                         // __nanosleep: lets other threads run
void fence();                                                       // __threadfence
void atomic_access(const void* pointer, size_t size, Place here);   // an atomic operation comes next

// The one copy a block has of a __shared__ variable: `tag` names the declaration.
void* shared_variable(const void* tag, size_t size, size_t alignment);
void* shared_dynamic();                                             // extern __shared__
// A shared address as PTX has it (32 bits), and back. Both report what is not shared memory of this block.
uint32_t shared_address(const void* pointer, Place here);
void* shared_pointer(uint32_t address, size_t size, Place here);

// ------------------------------------------------------------------------------------------------
// Launching: `kernel<<<grid, block, shared, stream>>>(a, b)` is rewritten to
//     cpu_cuda::launch("kernel", {file, line}, cpu_cuda::Shape(grid, block, shared, stream),
//                      [=](auto&... x) { kernel(x...); }, a, b)

struct Shape {
    dim3 grid, block;
    size_t shared;                      // bytes of dynamic shared memory
    cudaStream_t stream;
    Shape(dim3 g, dim3 b, size_t bytes = 0, cudaStream_t s = nullptr)
        : grid(g), block(b), shared(bytes), stream(s) {}
};

struct Launch : Shape {
    const char* kernel;                 // as written
    Place place;
    bool cooperative;
    void (*call)(void* arguments);      // one thread's run
    void* arguments;                    // plain bytes, in which pointers to host memory become closed ones
    size_t arguments_size;
};

// Checks the limits, then runs it in its stream, with a copy of the arguments. Returns the CUDA error.
int submit(Launch launch);

}  // namespace cpu_cuda
