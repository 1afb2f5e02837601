// cuda_bf16.h: bfloat16 as NVIDIA's header of this name has it, the part that a trainer uses: the same bits,
// the same implicit conversions. test/test_nvidia.sh compares the two.

#pragma once

#include "cuda_runtime.h"
#include <math.h>

#include <limits>

struct alignas(2) __nv_bfloat16_raw {
    unsigned short x;
};
struct alignas(4) __nv_bfloat162_raw {
    unsigned short x, y;
};

// ------------------------------------------------------------------------------------------------
// Rounding

namespace cpu_cuda {

enum Rounding { TO_NEAREST, TO_ZERO, DOWN, UP };

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Ties go to even; every NaN becomes the canonical one.
inline unsigned short bf16_bits(float value, Rounding rounding = TO_NEAREST) {
    uint32_t bits = bits_of(value), rest = bits << 16, half = 0x80000000u;
    bool negative = bits >> 31, odd = bits & 0x10000;
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    bool away = rounding == TO_NEAREST ? rest > half || (rest == half && odd)
                                       : rest && rounding == (negative ? DOWN : UP);
    return (unsigned short)((bits >> 16) + away);
}

// A float for bf16_bits that stands for x: an inexact one ends in 1, so that the second rounding sees no tie.
inline float to_odd(long double x) {
    float value = (float)x;
    if (value != value || value == x) return value;
    uint32_t bits = bits_of(value);
    bool too_large = x > 0 ? value > x : value < x;
    return float_of((bits - too_large) | 1);
}

// Toward zero; out of range is the nearest integer, NaN 0 or in 64 bits the highest bit alone.
template <class Integer>
Integer integer_of(float value) {
    typedef std::numeric_limits<Integer> Limits;
    if (value != value) return sizeof(Integer) == 8 ? (Integer)(1ull << 63) : 0;
    if (value >= (float)Limits::max()) return Limits::max();
    if (value < (float)Limits::min()) return Limits::min();
    return (Integer)value;
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// One value

struct alignas(2) __nv_bfloat16 {
protected:
    unsigned short __x;

public:
    __nv_bfloat16() = default;
    constexpr __nv_bfloat16(const __nv_bfloat16_raw& raw) : __x(raw.x) {}
    __nv_bfloat16(float value) : __x(cpu_cuda::bf16_bits(value)) {}
    __nv_bfloat16(double value) : __x(cpu_cuda::bf16_bits(cpu_cuda::to_odd(value))) {}
    operator __nv_bfloat16_raw() const { return {__x}; }
    operator float() const { return cpu_cuda::float_of((uint32_t)__x << 16); }
    operator signed char() const { return cpu_cuda::integer_of<signed char>(*this); }
    operator unsigned char() const { return cpu_cuda::integer_of<unsigned char>(*this); }
    operator char() const { return cpu_cuda::integer_of<char>(*this); }
    operator bool() const { return (__x & 0x7fff) != 0; }
    __nv_bfloat16& operator=(const __nv_bfloat16_raw& raw) { return *this = __nv_bfloat16(raw); }

#define CPU_CUDA_INTEGER(type)                                                              \
    __nv_bfloat16(type value) : __x(cpu_cuda::bf16_bits(cpu_cuda::to_odd(value))) {}        \
    operator type() const { return cpu_cuda::integer_of<type>(*this); }
    CPU_CUDA_INTEGER(short)
    CPU_CUDA_INTEGER(unsigned short)
    CPU_CUDA_INTEGER(int)
    CPU_CUDA_INTEGER(unsigned)
    CPU_CUDA_INTEGER(long)
    CPU_CUDA_INTEGER(unsigned long)
    CPU_CUDA_INTEGER(long long)
    CPU_CUDA_INTEGER(unsigned long long)
#undef CPU_CUDA_INTEGER

    // as NVIDIA has them, so that an assignment from long is ambiguous here too
#define CPU_CUDA_ASSIGN(type) \
    __nv_bfloat16& operator=(type value) { return *this = __nv_bfloat16(value); }
    CPU_CUDA_ASSIGN(float)
    CPU_CUDA_ASSIGN(double)
    CPU_CUDA_ASSIGN(short)
    CPU_CUDA_ASSIGN(unsigned short)
    CPU_CUDA_ASSIGN(int)
    CPU_CUDA_ASSIGN(unsigned)
    CPU_CUDA_ASSIGN(long long)
    CPU_CUDA_ASSIGN(unsigned long long)
#undef CPU_CUDA_ASSIGN
};
typedef __nv_bfloat16 nv_bfloat16;

inline __nv_bfloat16 __float2bfloat16(const float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(const float a) { return a; }
inline __nv_bfloat16 __double2bfloat16(const double a) { return a; }
inline float __bfloat162float(const __nv_bfloat16 a) { return a; }
inline unsigned short __bfloat16_as_ushort(const __nv_bfloat16 a) { return __nv_bfloat16_raw(a).x; }
inline __nv_bfloat16 __ushort_as_bfloat16(const unsigned short bits) { return __nv_bfloat16_raw{bits}; }
inline __nv_bfloat16 __float2bfloat16_rz(const float a) {
    return __ushort_as_bfloat16(cpu_cuda::bf16_bits(a, cpu_cuda::TO_ZERO));
}
inline __nv_bfloat16 __float2bfloat16_rd(const float a) {
    return __ushort_as_bfloat16(cpu_cuda::bf16_bits(a, cpu_cuda::DOWN));
}
inline __nv_bfloat16 __float2bfloat16_ru(const float a) {
    return __ushort_as_bfloat16(cpu_cuda::bf16_bits(a, cpu_cuda::UP));
}

// float has more than twice the digits: a result rounded to it first is still rightly rounded.
#define CPU_CUDA_TWO const __nv_bfloat16 &a, const __nv_bfloat16 &b
#define CPU_CUDA_BINARY(name, sign)                                                             \
    inline __nv_bfloat16 name(const __nv_bfloat16 a, const __nv_bfloat16 b) {                   \
        return (float)a sign(float) b;                                                          \
    }                                                                                           \
    inline __nv_bfloat16 operator sign(CPU_CUDA_TWO) { return name(a, b); }                     \
    inline __nv_bfloat16& operator sign##=(__nv_bfloat16 & a, const __nv_bfloat16& b) {         \
        return a = name(a, b);                                                                  \
    }
CPU_CUDA_BINARY(__hadd, +)
CPU_CUDA_BINARY(__hsub, -)
CPU_CUDA_BINARY(__hmul, *)
CPU_CUDA_BINARY(__hdiv, /)
#undef CPU_CUDA_BINARY

#define CPU_CUDA_COMPARE(name, sign)                                            \
    inline bool name(const __nv_bfloat16 a, const __nv_bfloat16 b) {            \
        return (float)a sign(float) b;                                          \
    }                                                                           \
    inline bool operator sign(CPU_CUDA_TWO) { return name(a, b); }
CPU_CUDA_COMPARE(__heq, ==)
CPU_CUDA_COMPARE(__hneu, !=)
CPU_CUDA_COMPARE(__hlt, <)
CPU_CUDA_COMPARE(__hgt, >)
CPU_CUDA_COMPARE(__hle, <=)
CPU_CUDA_COMPARE(__hge, >=)
#undef CPU_CUDA_COMPARE
#undef CPU_CUDA_TWO

inline __nv_bfloat16 __hneg(const __nv_bfloat16 a) { return -(float)a; }
inline __nv_bfloat16 __habs(const __nv_bfloat16 a) { return fabsf(a); }
inline __nv_bfloat16 operator-(const __nv_bfloat16& a) { return __hneg(a); }
inline __nv_bfloat16 operator+(const __nv_bfloat16& a) { return a; }
inline bool __hisnan(const __nv_bfloat16 a) { return (__bfloat16_as_ushort(a) & 0x7fff) > 0x7f80; }

// a * b + c rounded once. The product is exact in double; a sum that is not is made odd, as in to_odd.
inline __nv_bfloat16 __hfma(const __nv_bfloat16 a, const __nv_bfloat16 b, const __nv_bfloat16 c) {
    double product = (double)(float)a * (float)b, addend = (float)c, sum = product + addend;
    double back = sum - product, error = (product - (sum - back)) + (addend - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (isfinite(sum) && error != 0 && bits % 2 == 0) sum = nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
    return sum;
}

// A NaN loses against a number; +0 is more than -0.
inline __nv_bfloat16 __hmax(const __nv_bfloat16 a, const __nv_bfloat16 b) {
    if (__hisnan(a) || __hisnan(b)) return __hisnan(a) ? __nv_bfloat16((float)b) : a;
    if (a == b) return __bfloat16_as_ushort(a) > __bfloat16_as_ushort(b) ? b : a;
    return a > b ? a : b;
}
inline __nv_bfloat16 __hmin(const __nv_bfloat16 a, const __nv_bfloat16 b) {
    if (__hisnan(a) || __hisnan(b)) return __hisnan(a) ? __nv_bfloat16((float)b) : a;
    if (a == b) return __bfloat16_as_ushort(a) > __bfloat16_as_ushort(b) ? a : b;
    return a < b ? a : b;
}

// ------------------------------------------------------------------------------------------------
// Two values in 32 bits

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;

    __nv_bfloat162() = default;
    constexpr __nv_bfloat162(const __nv_bfloat16& a, const __nv_bfloat16& b) : x(a), y(b) {}
    __nv_bfloat162(const __nv_bfloat162_raw& raw)
        : x(__nv_bfloat16_raw{raw.x}), y(__nv_bfloat16_raw{raw.y}) {}
    // not trivial in NVIDIA's either: a union that holds one cannot be copied
    __nv_bfloat162(const __nv_bfloat162& other) : x(other.x), y(other.y) {}
    __nv_bfloat162& operator=(const __nv_bfloat162& other) {
        x = other.x;
        y = other.y;
        return *this;
    }
    operator __nv_bfloat162_raw() const { return {__bfloat16_as_ushort(x), __bfloat16_as_ushort(y)}; }
};
typedef __nv_bfloat162 nv_bfloat162;

inline __nv_bfloat162 make_bfloat162(const __nv_bfloat16 x, const __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(const __nv_bfloat16 a, const __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(const __nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 __float2bfloat162_rn(const float a) { return {a, a}; }
inline __nv_bfloat162 __floats2bfloat162_rn(const float a, const float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(const float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(const __nv_bfloat162 a) { return make_float2(a.x, a.y); }
inline float __low2float(const __nv_bfloat162 a) { return a.x; }
inline float __high2float(const __nv_bfloat162 a) { return a.y; }
inline __nv_bfloat16 __low2bfloat16(const __nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(const __nv_bfloat162 a) { return a.y; }
inline __nv_bfloat162 __hneg2(const __nv_bfloat162 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __nv_bfloat162 operator-(const __nv_bfloat162& a) { return __hneg2(a); }
inline __nv_bfloat162 __hfma2(const __nv_bfloat162 a, const __nv_bfloat162 b, const __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

#define CPU_CUDA_BOTH(name)                                                             \
    inline __nv_bfloat162 name##2(const __nv_bfloat162 a, const __nv_bfloat162 b) {     \
        return {name(a.x, b.x), name(a.y, b.y)};                                        \
    }
#define CPU_CUDA_BOTH_SIGN(name, sign)                                                  \
    CPU_CUDA_BOTH(name)                                                                 \
    inline __nv_bfloat162 operator sign(const __nv_bfloat162& a, const __nv_bfloat162& b) { \
        return name##2(a, b);                                                           \
    }                                                                                   \
    inline __nv_bfloat162& operator sign##=(__nv_bfloat162 & a, const __nv_bfloat162& b) {  \
        return a = name##2(a, b);                                                       \
    }
CPU_CUDA_BOTH_SIGN(__hadd, +)
CPU_CUDA_BOTH_SIGN(__hsub, -)
CPU_CUDA_BOTH_SIGN(__hmul, *)
CPU_CUDA_BOTH(__hmax)
CPU_CUDA_BOTH(__hmin)
#undef CPU_CUDA_BOTH_SIGN
#undef CPU_CUDA_BOTH

// ------------------------------------------------------------------------------------------------
// Loads, stores and shuffles, as device.h has them for other types

template <>
struct cpu_cuda::Loadable<__nv_bfloat16> : std::true_type {};
template <>
struct cpu_cuda::Loadable<__nv_bfloat162> : std::true_type {};

namespace cpu_cuda {

inline __nv_bfloat162 shuffled(__nv_bfloat162 value, ShuffleKind kind, int operand, int width, unsigned mask,
                               const char* what, Place here) {
    return shuffled(__nv_bfloat162_raw(value), kind, operand, width, mask, what, here);
}

}  // namespace cpu_cuda

CPU_CUDA_SHUFFLES(__nv_bfloat16)
CPU_CUDA_SHUFFLES(__nv_bfloat162)
