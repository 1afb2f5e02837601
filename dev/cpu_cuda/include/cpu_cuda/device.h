// device.h: what CUDA adds to C++ for kernels. Overloads and implicit conversions are CUDA's, and no more.
//
// To add an intrinsic, write a function of CUDA's name and parameters. If lanes work together, CPU_CUDA_HERE
// is its last parameter, and it calls shuffle() or warp_together(), whose work sees what all lanes passed.

#pragma once

#include "engine.h"

// ------------------------------------------------------------------------------------------------
// Keywords (<<<>>>, __shared__ and asm are rewritten after preprocessing), variables, vector types

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))

// Set at every switch between threads, which a kernel does not notice: constant, as in CUDA. (thread_local
// would cost a call at each use, in case there is something to construct.)
extern __thread const uint3 threadIdx __asm__("cpu_cuda_threadIdx");
extern __thread const uint3 blockIdx __asm__("cpu_cuda_blockIdx");
extern __thread const dim3 blockDim __asm__("cpu_cuda_blockDim");
extern __thread const dim3 gridDim __asm__("cpu_cuda_gridDim");
extern const int warpSize;

#define CPU_CUDA_VECTORS(T, NAME)                                                               \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                          \
    struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };                                    \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                  \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CPU_CUDA_VECTORS(signed char, char)
CPU_CUDA_VECTORS(int, int)
CPU_CUDA_VECTORS(unsigned, uint)
CPU_CUDA_VECTORS(float, float)
struct float3 { float x, y, z; };

// ------------------------------------------------------------------------------------------------
// Launching, and what the intrinsics below are made of

namespace cpu_cuda {

template <class Kernel, class... Values>
struct BoundKernel {
    static_assert((std::is_trivially_copyable<Values>::value && ...), "a kernel's arguments are plain bytes");
    Kernel kernel;
    std::tuple<Values...> values;

    static void run(void* p) { std::apply(((BoundKernel*)p)->kernel, ((BoundKernel*)p)->values); }
};

template <class Kernel, class... Arguments>
void launch(const char* name, Place place, Shape shape, Kernel kernel, Arguments&&... arguments) {
    typedef BoundKernel<Kernel, std::decay_t<Arguments>...> Bound;
    Bound bound = {kernel, {std::forward<Arguments>(arguments)...}};
    submit({shape, name, place, false, Bound::run, &bound, sizeof bound});
}

template <class T>
T shuffled(T value, ShuffleKind kind, int operand, int width, unsigned mask, const char* what, Place here) {
    static_assert(std::is_trivially_copyable<T>::value, "plain bytes");
    T result;
    shuffle(&value, &result, sizeof value, kind, operand, width, mask, what, here);
    return result;
}

// The lanes whose predicate holds.
inline unsigned ballot(unsigned mask, int predicate, const char* what, Place here) {
    unsigned mine = predicate != 0;
    auto work = [](void** arguments, unsigned lanes) {
        unsigned result = 0;
        each_lane(lanes, [&](int lane) { result |= *(unsigned*)arguments[lane] << lane; });
        each_lane(lanes, [&](int lane) { *(unsigned*)arguments[lane] = result; });
    };
    warp_together(work, &mine, mask, what, here);
    return mine;
}

// In the order of a reduction by __shfl_xor_sync over 16, 8, 4, 2, 1: sums of floats have the bits of CUDA's.
template <class T, class Operation>
T reduced(unsigned mask, T value, Operation operation, const char* what, Place here) {
    typedef std::pair<T, Operation> Argument;
    Argument mine = {value, operation};
    auto work = [](void** arguments, unsigned lanes) {
        Operation& combine = ((Argument*)arguments[__builtin_ctz(lanes)])->second;
        T values[32];
        unsigned left = lanes;
        each_lane(lanes, [&](int lane) { values[lane] = ((Argument*)arguments[lane])->first; });
        for (int distance = 16; distance; distance /= 2)
            each_lane(left, [&](int lane) {
                int other = lane ^ distance;
                if (other > lane && left >> other & 1) values[lane] = combine(values[lane], values[other]);
                if (other < lane && !(left >> other & 1)) values[other] = values[lane];
                if (other < lane) left = (left | 1u << other) & ~(1u << lane);
            });
        each_lane(lanes, [&](int lane) { ((Argument*)arguments[lane])->first = values[0]; });
    };
    warp_together(work, &mine, mask, what, here);
    return mine.first;
}

// *p = update(*p) at once; returns what was there.
template <class T, class Update>
T atomic_update(T* p, Update update, Place here) {
    atomic_access(p, sizeof *p, here);
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do {
        after = update(before);
    } while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return before;
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// Synchronisation, votes

inline void __syncthreads(CPU_CUDA_HERE) { cpu_cuda::block_barrier(0, "__syncthreads", here); }
inline void __syncwarp(unsigned mask = 0xffffffff, CPU_CUDA_HERE) { cpu_cuda::warp_barrier(mask, here); }
inline void __nanosleep(unsigned, CPU_CUDA_HERE) { cpu_cuda::spin_wait(here); }
inline void __threadfence() { cpu_cuda::fence(); }

#define CPU_CUDA_BLOCK_VOTE(NAME, COUNTED, RESULT)                              \
    inline int NAME(int predicate, CPU_CUDA_HERE) {                             \
        int count = cpu_cuda::block_barrier(COUNTED, #NAME, here);              \
        return RESULT;                                                          \
    }
CPU_CUDA_BLOCK_VOTE(__syncthreads_or, predicate, count != 0)
CPU_CUDA_BLOCK_VOTE(__syncthreads_and, !predicate, count == 0)
CPU_CUDA_BLOCK_VOTE(__syncthreads_count, predicate, count)

#define CPU_CUDA_VOTE(NAME, T, RESULT)                                          \
    inline T NAME(unsigned mask, int predicate, CPU_CUDA_HERE) {                \
        unsigned lanes = cpu_cuda::ballot(mask, predicate, #NAME, here);        \
        return RESULT;                                                          \
    }
CPU_CUDA_VOTE(__ballot_sync, unsigned, lanes)
CPU_CUDA_VOTE(__any_sync, int, lanes != 0)
CPU_CUDA_VOTE(__all_sync, int, lanes == mask)

// ------------------------------------------------------------------------------------------------
// Shuffles, reductions, atomics

#define CPU_CUDA_SHUFFLE(NAME, KIND, OPERAND, T)                                                        \
    inline T NAME(unsigned mask, T value, OPERAND operand, int width = 32, CPU_CUDA_HERE) {             \
        return cpu_cuda::shuffled(value, cpu_cuda::KIND, (int)operand, width, mask, #NAME, here);       \
    }
#define CPU_CUDA_SHUFFLES(T)                                        \
    CPU_CUDA_SHUFFLE(__shfl_sync, SHUFFLE_INDEX, int, T)            \
    CPU_CUDA_SHUFFLE(__shfl_up_sync, SHUFFLE_UP, unsigned, T)       \
    CPU_CUDA_SHUFFLE(__shfl_down_sync, SHUFFLE_DOWN, unsigned, T)   \
    CPU_CUDA_SHUFFLE(__shfl_xor_sync, SHUFFLE_XOR, int, T)
CPU_CUDA_SHUFFLES(int)
CPU_CUDA_SHUFFLES(unsigned)
CPU_CUDA_SHUFFLES(long long)
CPU_CUDA_SHUFFLES(unsigned long long)
CPU_CUDA_SHUFFLES(float)
CPU_CUDA_SHUFFLES(double)

#define CPU_CUDA_REDUCE(NAME, T, RESULT)                                                                \
    inline T NAME(unsigned mask, T value, CPU_CUDA_HERE) {                                              \
        return cpu_cuda::reduced(mask, value, [](T a, T b) { return (T)(RESULT); }, #NAME, here);       \
    }
CPU_CUDA_REDUCE(__reduce_add_sync, unsigned, a + b)
CPU_CUDA_REDUCE(__reduce_add_sync, int, (unsigned)a + (unsigned)b)
CPU_CUDA_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CPU_CUDA_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CPU_CUDA_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CPU_CUDA_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CPU_CUDA_REDUCE(__reduce_and_sync, unsigned, a & b)
CPU_CUDA_REDUCE(__reduce_or_sync, unsigned, a | b)
CPU_CUDA_REDUCE(__reduce_xor_sync, unsigned, a ^ b)

#define CPU_CUDA_ATOMIC(NAME, T, RESULT)                                                                    \
    inline T NAME(T* p, T value, CPU_CUDA_HERE) {                                                           \
        return cpu_cuda::atomic_update(p, [=]([[maybe_unused]] T old) { return (T)(RESULT); }, here);       \
    }
#define CPU_CUDA_ATOMICS(T)                                                                                 \
    CPU_CUDA_ATOMIC(atomicExch, T, value)                                                                   \
    CPU_CUDA_ATOMIC(atomicMin, T, old < value ? old : value)                                                \
    CPU_CUDA_ATOMIC(atomicMax, T, old > value ? old : value)                                                \
    CPU_CUDA_ATOMIC(atomicAnd, T, old & value)                                                              \
    CPU_CUDA_ATOMIC(atomicOr, T, old | value)                                                               \
    CPU_CUDA_ATOMIC(atomicXor, T, old ^ value)                                                              \
    inline T atomicCAS(T* p, T compare, T value, CPU_CUDA_HERE) {                                           \
        return cpu_cuda::atomic_update(p, [=](T old) { return old == compare ? value : old; }, here);       \
    }
CPU_CUDA_ATOMICS(int)
CPU_CUDA_ATOMICS(unsigned)
CPU_CUDA_ATOMICS(unsigned long long)
CPU_CUDA_ATOMIC(atomicAdd, int, (unsigned)old + (unsigned)value)
CPU_CUDA_ATOMIC(atomicAdd, unsigned, old + value)
CPU_CUDA_ATOMIC(atomicAdd, unsigned long long, old + value)
CPU_CUDA_ATOMIC(atomicAdd, float, old + value)
CPU_CUDA_ATOMIC(atomicAdd, double, old + value)
CPU_CUDA_ATOMIC(atomicSub, unsigned, old - value)
CPU_CUDA_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)

// ------------------------------------------------------------------------------------------------
// Memory, bits and numbers. What <math.h> has is its; the approximations of CUDA are as exact here.

#define CPU_CUDA_STREAMED(T)                            \
    inline T __ldcs(const T* p) { return *p; }          \
    inline void __stcs(T* p, T value) { *p = value; }
CPU_CUDA_STREAMED(float)
CPU_CUDA_STREAMED(float2)
CPU_CUDA_STREAMED(float4)

inline size_t __cvta_generic_to_shared(const void* pointer, CPU_CUDA_HERE) {
    return cpu_cuda::shared_address(pointer, here);
}

#define CPU_CUDA_SAME_BITS(NAME, TO, FROM)              \
    inline TO NAME(FROM from) {                         \
        TO to;                                          \
        memcpy(&to, &from, sizeof to);                  \
        return to;                                      \
    }
CPU_CUDA_SAME_BITS(__float_as_int, int, float)
CPU_CUDA_SAME_BITS(__float_as_uint, unsigned, float)
CPU_CUDA_SAME_BITS(__int_as_float, float, int)
CPU_CUDA_SAME_BITS(__uint_as_float, float, unsigned)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define CPU_CUDA_MIN_MAX(A, B, T)                                                   \
    inline T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }                    \
    inline T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
#define CPU_CUDA_INTEGERS(T)                                                        \
    CPU_CUDA_MIN_MAX(T, T, T)                                                       \
    CPU_CUDA_MIN_MAX(unsigned T, unsigned T, unsigned T)                            \
    CPU_CUDA_MIN_MAX(T, unsigned T, unsigned T)                                     \
    CPU_CUDA_MIN_MAX(unsigned T, T, unsigned T)
CPU_CUDA_INTEGERS(int)
CPU_CUDA_INTEGERS(long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline float __expf(float x) { return expf(x); }
