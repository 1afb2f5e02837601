// device.h: what CUDA adds to C++ for kernels. Overloads and implicit conversions are CUDA's, and no more.
//
// To add an intrinsic, write a function of CUDA's name and parameters. If lanes work together, CPU_CUDA_HERE
// is its last parameter, and it calls shuffle() or warp_together(), whose work sees what all lanes passed.

#pragma once

#include "engine.h"

// ------------------------------------------------------------------------------------------------
// Keywords. <<<>>>, __shared__ and asm are rewritten after preprocessing.

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))

// ------------------------------------------------------------------------------------------------
// Vector types

namespace cpu_cuda {

// The types that __ldg and its like read in one instruction.
template <class T>
struct Loadable : std::bool_constant<std::is_arithmetic<T>::value && !std::is_same<T, bool>::value> {};

}  // namespace cpu_cuda

#define CPU_CUDA_VECTOR2(T, NAME, ALIGNMENT)                                            \
    struct alignas(ALIGNMENT) NAME##2 {                                                 \
        T x, y;                                                                         \
    };                                                                                  \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                          \
    template <>                                                                         \
    struct cpu_cuda::Loadable<NAME##2> : std::true_type {};

#define CPU_CUDA_VECTORS(T, NAME, SIZE)                                                 \
    CPU_CUDA_VECTOR2(T, NAME, 2 * SIZE)                                                 \
    struct NAME##3 {                                                                    \
        T x, y, z;                                                                      \
    };                                                                                  \
    struct alignas(4 * SIZE) NAME##4 {                                                  \
        T x, y, z, w;                                                                   \
    };                                                                                  \
    inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                  \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }          \
    template <>                                                                         \
    struct cpu_cuda::Loadable<NAME##4> : std::true_type {};

CPU_CUDA_VECTORS(signed char, char, 1)
CPU_CUDA_VECTORS(unsigned char, uchar, 1)
CPU_CUDA_VECTORS(short, short, 2)
CPU_CUDA_VECTORS(unsigned short, ushort, 2)
CPU_CUDA_VECTORS(int, int, 4)
CPU_CUDA_VECTORS(unsigned, uint, 4)
CPU_CUDA_VECTORS(float, float, 4)
CPU_CUDA_VECTOR2(long long, longlong, 16)
CPU_CUDA_VECTOR2(unsigned long long, ulonglong, 16)
CPU_CUDA_VECTOR2(double, double, 16)

#undef CPU_CUDA_VECTOR2
#undef CPU_CUDA_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

// Set at every switch between threads, which a kernel does not notice: constant, as in CUDA. (thread_local
// would cost a call at each use, in case there is something to construct.)
extern __thread const uint3 threadIdx __asm__("cpu_cuda_threadIdx");
extern __thread const uint3 blockIdx __asm__("cpu_cuda_blockIdx");
extern __thread const dim3 blockDim __asm__("cpu_cuda_blockDim");
extern __thread const dim3 gridDim __asm__("cpu_cuda_gridDim");
extern const int warpSize;

// ------------------------------------------------------------------------------------------------
// Launching

namespace cpu_cuda {

struct Shape {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    Shape(dim3 g, dim3 b, size_t bytes = 0, cudaStream_t s = nullptr)
        : grid(g), block(b), shared(bytes), stream(s) {}
};

typedef void (*PointerVisit)(const Launch&, int position, const void* value);

template <class T>
void visit_argument(PointerVisit visit, const Launch& launch, int position, const T& value) {
    if constexpr (std::is_pointer<T>::value && !std::is_function<std::remove_pointer_t<T>>::value)
        visit(launch, position, (const void*)value);
}

// A kernel with a copy of its arguments, which outlives the launching statement.
template <class Kernel, class... Values>
struct BoundKernel {
    Kernel kernel;
    std::tuple<Values...> values;

    static void run(void* p) { std::apply(((BoundKernel*)p)->kernel, ((BoundKernel*)p)->values); }
    static void release(void* p) { delete (BoundKernel*)p; }
    static void each_pointer(void* p, PointerVisit visit, const Launch& launch) {
        int position = 0;
        auto visit_all = [&](auto&... value) { (visit_argument(visit, launch, position++, value), ...); };
        std::apply(visit_all, ((BoundKernel*)p)->values);
    }
};

template <class Kernel, class... Arguments>
void launch(const char* name, Place place, Shape shape, Kernel kernel, Arguments&&... arguments) {
    typedef BoundKernel<Kernel, std::decay_t<Arguments>...> Bound;
    Bound* bound = new Bound{kernel, {std::forward<Arguments>(arguments)...}};
    const dim3 &g = shape.grid, &b = shape.block;
    submit(new Launch{{g.x, g.y, g.z}, {b.x, b.y, b.z}, shape.shared, shape.stream, name, place, false,
                      Bound::run, Bound::release, bound, sizeof *bound, Bound::each_pointer});
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// Synchronisation

inline void __syncthreads(CPU_CUDA_HERE) {
    cpu_cuda::block_barrier(cpu_cuda::VOTE_NONE, 0, "__syncthreads", here);
}
inline int __syncthreads_or(int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::block_barrier(cpu_cuda::VOTE_OR, predicate, "__syncthreads_or", here);
}
inline int __syncthreads_and(int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::block_barrier(cpu_cuda::VOTE_AND, predicate, "__syncthreads_and", here);
}
inline int __syncthreads_count(int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::block_barrier(cpu_cuda::VOTE_COUNT, predicate, "__syncthreads_count", here);
}
inline void __syncwarp(unsigned mask = 0xffffffff, CPU_CUDA_HERE) { cpu_cuda::warp_barrier(mask, here); }
inline void __nanosleep(unsigned, CPU_CUDA_HERE) { cpu_cuda::spin_wait(here); }
inline void __threadfence() { cpu_cuda::fence(); }
inline void __threadfence_system() { cpu_cuda::fence(); }
inline void __threadfence_block() { cpu_cuda::fence(); }
[[noreturn]] inline void __trap(CPU_CUDA_HERE) { cpu_cuda::stop(here, "__trap"); }

// ------------------------------------------------------------------------------------------------
// Shuffles

namespace cpu_cuda {

template <class T>
T shuffled(T value, ShuffleKind kind, int operand, int width, unsigned mask, const char* what, Place here) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "at most 16 plain bytes");
    shuffle(&value, sizeof value, kind, operand, width, mask, what, here);
    return value;
}

}  // namespace cpu_cuda

#define CPU_CUDA_SHUFFLE(NAME, KIND, OPERAND, T)                                                        \
    inline T NAME(unsigned mask, T value, OPERAND operand, int width = 32, CPU_CUDA_HERE) {             \
        return cpu_cuda::shuffled(value, cpu_cuda::KIND, (int)operand, width, mask, #NAME, here);       \
    }
#define CPU_CUDA_SHUFFLES(T)                                    \
    CPU_CUDA_SHUFFLE(__shfl_sync, SHUFFLE_INDEX, int, T)        \
    CPU_CUDA_SHUFFLE(__shfl_up_sync, SHUFFLE_UP, unsigned, T)   \
    CPU_CUDA_SHUFFLE(__shfl_down_sync, SHUFFLE_DOWN, unsigned, T) \
    CPU_CUDA_SHUFFLE(__shfl_xor_sync, SHUFFLE_XOR, int, T)

CPU_CUDA_SHUFFLES(int)
CPU_CUDA_SHUFFLES(unsigned)
CPU_CUDA_SHUFFLES(long)
CPU_CUDA_SHUFFLES(unsigned long)
CPU_CUDA_SHUFFLES(long long)
CPU_CUDA_SHUFFLES(unsigned long long)
CPU_CUDA_SHUFFLES(float)
CPU_CUDA_SHUFFLES(double)

// ------------------------------------------------------------------------------------------------
// Votes, matches and reductions

namespace cpu_cuda {

template <class F>
void each_lane(unsigned lanes, F f) {
    for (unsigned m = lanes; m; m &= m - 1) f(__builtin_ctz(m));
}

struct Ballot {
    bool predicate;
    unsigned result;            // lanes whose predicate holds
};

inline void ballot_lanes(void** arguments, unsigned lanes) {
    unsigned result = 0;
    each_lane(lanes, [&](int lane) { result |= (unsigned)((Ballot*)arguments[lane])->predicate << lane; });
    each_lane(lanes, [&](int lane) { ((Ballot*)arguments[lane])->result = result; });
}

inline unsigned ballot(unsigned mask, int predicate, const char* what, Place here) {
    Ballot b = {predicate != 0, 0};
    warp_together(ballot_lanes, &b, mask, what, here);
    return b.result;
}

struct Match {
    unsigned long long bits;
    unsigned result;            // lanes whose bits are the same
};

inline void match_lanes(void** arguments, unsigned lanes) {
    each_lane(lanes, [&](int lane) {
        Match* mine = (Match*)arguments[lane];
        mine->result = 0;
        each_lane(lanes, [&](int other) {
            if (((Match*)arguments[other])->bits == mine->bits) mine->result |= 1u << other;
        });
    });
}

template <class T>
unsigned match(unsigned mask, T value, const char* what, Place here) {
    Match m = {0, 0};
    memcpy(&m.bits, &value, sizeof value);
    warp_together(match_lanes, &m, mask, what, here);
    return m.result;
}

template <class T, class Operation>
struct Reduce {
    T value;
    Operation operation;
};

// In the order of a reduction by __shfl_xor_sync over 16, 8, 4, 2, 1: sums of floats have the bits of CUDA's.
template <class T, class Operation>
void reduce_lanes(void** arguments, unsigned lanes) {
    typedef Reduce<T, Operation> Argument;
    T values[32];
    unsigned present = lanes;
    Operation& operation = ((Argument*)arguments[__builtin_ctz(lanes)])->operation;
    each_lane(lanes, [&](int lane) { values[lane] = ((Argument*)arguments[lane])->value; });
    for (int distance = 16; distance; distance /= 2)
        for (int lane = 0; lane < 32; lane++) {
            int other = lane + distance;
            if (lane & distance || !(present >> other & 1)) continue;
            values[lane] = present >> lane & 1 ? operation(values[lane], values[other]) : values[other];
            present |= 1u << lane;
            present &= ~(1u << other);
        }
    each_lane(lanes, [&](int lane) { ((Argument*)arguments[lane])->value = values[0]; });
}

template <class T, class Operation>
T reduced(unsigned mask, T value, Operation operation, const char* what, Place here) {
    Reduce<T, Operation> r = {value, operation};
    warp_together(reduce_lanes<T, Operation>, &r, mask, what, here);
    return r.value;
}

}  // namespace cpu_cuda

inline unsigned __ballot_sync(unsigned mask, int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::ballot(mask, predicate, "__ballot_sync", here);
}
inline int __any_sync(unsigned mask, int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::ballot(mask, predicate, "__any_sync", here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CPU_CUDA_HERE) {
    return cpu_cuda::ballot(mask, predicate, "__all_sync", here) == mask;
}

#define CPU_CUDA_MATCH(T)                                                                           \
    inline unsigned __match_any_sync(unsigned mask, T value, CPU_CUDA_HERE) {                       \
        return cpu_cuda::match(mask, value, "__match_any_sync", here);                              \
    }                                                                                               \
    inline unsigned __match_all_sync(unsigned mask, T value, int* predicate, CPU_CUDA_HERE) {       \
        *predicate = cpu_cuda::match(mask, value, "__match_all_sync", here) == mask;                \
        return *predicate ? mask : 0;                                                               \
    }

CPU_CUDA_MATCH(int)
CPU_CUDA_MATCH(unsigned)
CPU_CUDA_MATCH(long)
CPU_CUDA_MATCH(unsigned long)
CPU_CUDA_MATCH(long long)
CPU_CUDA_MATCH(unsigned long long)
CPU_CUDA_MATCH(float)
CPU_CUDA_MATCH(double)

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

// ------------------------------------------------------------------------------------------------
// Atomics

namespace cpu_cuda {

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

#define CPU_CUDA_ATOMIC(NAME, T, RESULT)                                                            \
    inline T NAME(T* p, T value, CPU_CUDA_HERE) {                                                   \
        return cpu_cuda::atomic_update(p, [value]([[maybe_unused]] T old) { return (T)(RESULT); }, here); \
    }
#define CPU_CUDA_ATOMIC_CAS(T)                                                                      \
    inline T atomicCAS(T* p, T compare, T value, CPU_CUDA_HERE) {                                   \
        return cpu_cuda::atomic_update(p, [=](T old) { return old == compare ? value : old; }, here); \
    }
#define CPU_CUDA_ATOMICS(T)                                         \
    CPU_CUDA_ATOMIC(atomicExch, T, value)                           \
    CPU_CUDA_ATOMIC(atomicMin, T, old < value ? old : value)        \
    CPU_CUDA_ATOMIC(atomicMax, T, old > value ? old : value)        \
    CPU_CUDA_ATOMIC(atomicAnd, T, old & value)                      \
    CPU_CUDA_ATOMIC(atomicOr, T, old | value)                       \
    CPU_CUDA_ATOMIC(atomicXor, T, old ^ value)                      \
    CPU_CUDA_ATOMIC_CAS(T)

CPU_CUDA_ATOMICS(int)
CPU_CUDA_ATOMICS(unsigned)
CPU_CUDA_ATOMICS(unsigned long long)
CPU_CUDA_ATOMIC_CAS(unsigned short)
CPU_CUDA_ATOMIC(atomicMin, long long, old < value ? old : value)
CPU_CUDA_ATOMIC(atomicMax, long long, old > value ? old : value)
CPU_CUDA_ATOMIC(atomicExch, float, value)
CPU_CUDA_ATOMIC(atomicAdd, int, (unsigned)old + (unsigned)value)
CPU_CUDA_ATOMIC(atomicAdd, unsigned, old + value)
CPU_CUDA_ATOMIC(atomicAdd, unsigned long long, old + value)
CPU_CUDA_ATOMIC(atomicAdd, float, old + value)
CPU_CUDA_ATOMIC(atomicAdd, double, old + value)
CPU_CUDA_ATOMIC(atomicSub, int, (unsigned)old - (unsigned)value)
CPU_CUDA_ATOMIC(atomicSub, unsigned, old - value)
CPU_CUDA_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
CPU_CUDA_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)

// ------------------------------------------------------------------------------------------------
// Memory

#define CPU_CUDA_LOAD(NAME)                                                                 \
    template <class T>                                                                      \
    inline std::enable_if_t<cpu_cuda::Loadable<T>::value, T> NAME(const T* p) {             \
        return *p;                                                                          \
    }
#define CPU_CUDA_STORE(NAME)                                                                            \
    template <class T>                                                                                  \
    inline std::enable_if_t<cpu_cuda::Loadable<T>::value> NAME(T* p, std::common_type_t<T> value) {     \
        *p = value;                                                                                     \
    }

CPU_CUDA_LOAD(__ldg)
CPU_CUDA_LOAD(__ldcg)
CPU_CUDA_LOAD(__ldcs)
CPU_CUDA_STORE(__stcg)
CPU_CUDA_STORE(__stcs)

inline size_t __cvta_generic_to_shared(const void* pointer, CPU_CUDA_HERE) {
    return cpu_cuda::shared_address(pointer, here);
}

// ------------------------------------------------------------------------------------------------
// Bits

namespace cpu_cuda {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace cpu_cuda

inline int __float_as_int(float x) { return cpu_cuda::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cpu_cuda::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cpu_cuda::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cpu_cuda::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cpu_cuda::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cpu_cuda::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

// ------------------------------------------------------------------------------------------------
// Math. What <math.h> has is its; the approximations of CUDA are as exact here.

#define CPU_CUDA_MIN_MAX(A, B, T)                                                   \
    inline T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }                    \
    inline T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }

CPU_CUDA_MIN_MAX(int, int, int)
CPU_CUDA_MIN_MAX(unsigned, unsigned, unsigned)
CPU_CUDA_MIN_MAX(int, unsigned, unsigned)
CPU_CUDA_MIN_MAX(unsigned, int, unsigned)
CPU_CUDA_MIN_MAX(long, long, long)
CPU_CUDA_MIN_MAX(unsigned long, unsigned long, unsigned long)
CPU_CUDA_MIN_MAX(long, unsigned long, unsigned long)
CPU_CUDA_MIN_MAX(unsigned long, long, unsigned long)
CPU_CUDA_MIN_MAX(long long, long long, long long)
CPU_CUDA_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
CPU_CUDA_MIN_MAX(long long, unsigned long long, unsigned long long)
CPU_CUDA_MIN_MAX(unsigned long long, long long, unsigned long long)

inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin((double)a, b); }
inline double max(float a, double b) { return fmax((double)a, b); }
inline double min(double a, float b) { return fmin(a, (double)b); }
inline double max(double a, float b) { return fmax(a, (double)b); }

inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }        // NaN gives 0

// Rounded to nearest, and never fused with a neighbour.
#define CPU_CUDA_ROUNDED(NAME, OPERATION)       \
    inline float NAME(float a, float b) {       \
        volatile float result = a OPERATION b;  \
        return result;                          \
    }

CPU_CUDA_ROUNDED(__fadd_rn, +)
CPU_CUDA_ROUNDED(__fsub_rn, -)
CPU_CUDA_ROUNDED(__fmul_rn, *)
CPU_CUDA_ROUNDED(__fdiv_rn, /)
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }

namespace cpu_cuda {

// Out of range goes to the nearest end, NaN to 0, as the instruction has it.
inline int to_int(double x) {
    if (!(x >= -2147483648.0)) return x < 0 ? -2147483647 - 1 : 0;
    return x <= 2147483647.0 ? (int)x : 2147483647;
}

}  // namespace cpu_cuda

inline int __float2int_rn(float x) { return cpu_cuda::to_int(rint((double)x)); }
inline int __float2int_rz(float x) { return cpu_cuda::to_int((double)x); }
inline int __float2int_rd(float x) { return cpu_cuda::to_int(floor((double)x)); }
inline int __float2int_ru(float x) { return cpu_cuda::to_int(ceil((double)x)); }
inline float __int2float_rn(int x) { return (float)x; }
