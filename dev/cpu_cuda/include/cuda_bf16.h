// cuda_bf16.h: bfloat16 as NVIDIA's header of this name has it, the part that a trainer uses: the same bits,
// no conversion that is not there. test/test_nvidia.sh compares the two.

#pragma once

#include "cuda_runtime.h"

// ------------------------------------------------------------------------------------------------
// Rounding

namespace cpu_cuda {

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy((void*)&to, &from, sizeof to);
    return to;
}

// To nearest, ties to even; every NaN becomes the canonical one.
inline unsigned short bf16_bits(float value) {
    uint32_t bits = same_bits<uint32_t>(value), odd = bits >> 16 & 1;
    return value != value ? 0x7fff : (unsigned short)((bits + 0x7fff + odd) >> 16);
}

inline float float_of(uint32_t bf16) { return same_bits<float>(bf16 << 16); }

// A float for bf16_bits that stands for x: an inexact one ends in 1, so that the second rounding sees no tie.
inline float to_odd(double x) {
    float value = (float)x;
    if (value != value || value == x) return value;
    bool too_large = x > 0 ? value > x : value < x;
    return same_bits<float>((same_bits<uint32_t>(value) - too_large) | 1);
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// One value

struct alignas(2) __nv_bfloat16 {
protected:
    unsigned short __x;

public:
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : __x(cpu_cuda::bf16_bits(value)) {}
    __nv_bfloat16(double value) : __x(cpu_cuda::bf16_bits(cpu_cuda::to_odd(value))) {}
    __nv_bfloat16(int value) : __nv_bfloat16((double)value) {}
    operator float() const { return cpu_cuda::float_of(__x); }
    operator bool() const { return (__x & 0x7fff) != 0; }
    operator int() const = delete;      // NVIDIA's saturates: write (int)(float)x
};
typedef __nv_bfloat16 nv_bfloat16;

inline __nv_bfloat16 __float2bfloat16(const float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(const float a) { return a; }
inline __nv_bfloat16 __double2bfloat16(const double a) { return a; }
inline float __bfloat162float(const __nv_bfloat16 a) { return a; }
inline unsigned short __bfloat16_as_ushort(const __nv_bfloat16 a) {
    return cpu_cuda::same_bits<unsigned short>(a);
}
inline __nv_bfloat16 __ushort_as_bfloat16(const unsigned short bits) {
    return cpu_cuda::same_bits<__nv_bfloat16>(bits);
}

// float has more than twice the digits: a result rounded to it first is still rightly rounded.
#define CPU_CUDA_OPERATOR(T, sign)                                              \
    inline T operator sign(const __nv_bfloat16& a, const __nv_bfloat16& b) {    \
        return (float)a sign(float) b;                                          \
    }
#define CPU_CUDA_ARITHMETIC(sign)                                               \
    CPU_CUDA_OPERATOR(__nv_bfloat16, sign)                                      \
    inline __nv_bfloat16& operator sign##=(__nv_bfloat16 & a, const __nv_bfloat16& b) { return a = a sign b; }

CPU_CUDA_ARITHMETIC(+)
CPU_CUDA_ARITHMETIC(-)
CPU_CUDA_ARITHMETIC(*)
CPU_CUDA_ARITHMETIC(/)
CPU_CUDA_OPERATOR(bool, ==)
CPU_CUDA_OPERATOR(bool, !=)
CPU_CUDA_OPERATOR(bool, <)
CPU_CUDA_OPERATOR(bool, >)
CPU_CUDA_OPERATOR(bool, <=)
CPU_CUDA_OPERATOR(bool, >=)
inline __nv_bfloat16 operator-(const __nv_bfloat16& a) { return -(float)a; }

// ------------------------------------------------------------------------------------------------
// Two values in 32 bits

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;

    __nv_bfloat162() = default;
    constexpr __nv_bfloat162(const __nv_bfloat16& a, const __nv_bfloat16& b) : x(a), y(b) {}
    // not trivial in NVIDIA's either: a union that holds one cannot be copied
    constexpr __nv_bfloat162(const __nv_bfloat162& other) : x(other.x), y(other.y) {}
    __nv_bfloat162& operator=(const __nv_bfloat162& other) {
        x = other.x;
        y = other.y;
        return *this;
    }
};
typedef __nv_bfloat162 nv_bfloat162;

inline __nv_bfloat162 make_bfloat162(const __nv_bfloat16 x, const __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(const __nv_bfloat16 a, const __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __floats2bfloat162_rn(const float a, const float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(const float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(const __nv_bfloat162 a) { return make_float2(a.x, a.y); }
inline float __low2float(const __nv_bfloat162 a) { return a.x; }
inline float __high2float(const __nv_bfloat162 a) { return a.y; }

CPU_CUDA_STREAMED(__nv_bfloat16)
CPU_CUDA_STREAMED(__nv_bfloat162)
