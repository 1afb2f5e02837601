// test_bf16.cu: conversions and arithmetic of bfloat16 against bits that are written down.
#include <cuda_bf16.h>

#include "test.h"

struct Conversion {
    unsigned value;                                     // the float's bits
    unsigned short nearest, zero, down, up;
};

static const Conversion conversions[] = {
    {0x00000000, 0x0000, 0x0000, 0x0000, 0x0000},
    {0x80000000, 0x8000, 0x8000, 0x8000, 0x8000},
    {0x3f800000, 0x3f80, 0x3f80, 0x3f80, 0x3f80},
    {0x3f800001, 0x3f80, 0x3f80, 0x3f80, 0x3f81},       // just above a value
    {0xbf800001, 0xbf80, 0xbf80, 0xbf81, 0xbf80},
    {0x3f807fff, 0x3f80, 0x3f80, 0x3f80, 0x3f81},       // just below half way
    {0x3f808000, 0x3f80, 0x3f80, 0x3f80, 0x3f81},       // half way, to even: down
    {0x3f818000, 0x3f82, 0x3f81, 0x3f81, 0x3f82},       // half way, to even: up
    {0x3f808001, 0x3f81, 0x3f80, 0x3f80, 0x3f81},
    {0xbf818000, 0xbf82, 0xbf81, 0xbf82, 0xbf81},
    {0x3fffffff, 0x4000, 0x3fff, 0x3fff, 0x4000},       // into the next power of two
    {0x00000001, 0x0000, 0x0000, 0x0000, 0x0001},       // the least denormal
    {0x80000001, 0x8000, 0x8000, 0x8001, 0x8000},
    {0x00008000, 0x0000, 0x0000, 0x0000, 0x0001},
    {0x00018000, 0x0002, 0x0001, 0x0001, 0x0002},
    {0x007fffff, 0x0080, 0x007f, 0x007f, 0x0080},       // denormal to normal
    {0x7f7fffff, 0x7f80, 0x7f7f, 0x7f7f, 0x7f80},       // the largest float: infinity
    {0xff7fffff, 0xff80, 0xff7f, 0xff80, 0xff7f},
    {0x7f800000, 0x7f80, 0x7f80, 0x7f80, 0x7f80},
    {0xff800000, 0xff80, 0xff80, 0xff80, 0xff80},
    {0x7f800001, 0x7fff, 0x7fff, 0x7fff, 0x7fff},       // every NaN
    {0xffc12345, 0x7fff, 0x7fff, 0x7fff, 0x7fff},
};
enum { CONVERSIONS = sizeof conversions / sizeof *conversions };

struct Arithmetic {
    unsigned short a, b, c;
    unsigned short sum, product, fused, largest;        // a + b, a b, a b + c, max(a, b)
};

static const Arithmetic arithmetic[] = {
    {0x3f80, 0x3f80, 0x0000, 0x4000, 0x3f80, 0x3f80, 0x3f80},
    {0x3f80, 0x3b80, 0x8000, 0x3f80, 0x3b80, 0x3b80, 0x3f80},   // 1 + 2^-8: a tie
    {0x3f81, 0x3f82, 0x0000, 0x4002, 0x3f83, 0x3f83, 0x3f82},
    {0x3f88, 0x3f88, 0x2e00, 0x4008, 0x3f90, 0x3f91, 0x3f88},   // 1.12890625, a tie, and a little
    {0x3f88, 0x3f88, 0x1e00, 0x4008, 0x3f90, 0x3f91, 0x3f88},   // .. so little that float loses it
    {0x3f88, 0x3f88, 0x9e00, 0x4008, 0x3f90, 0x3f90, 0x3f88},
    {0x7f7f, 0x7f7f, 0xff80, 0x7f80, 0x7f80, 0xff80, 0x7f7f},   // the product is finite inside
    {0x7f80, 0xff80, 0x3f80, 0x7fff, 0xff80, 0xff80, 0x7f80},
    {0x7fc0, 0x3f80, 0x3f80, 0x7fff, 0x7fff, 0x7fff, 0x3f80},   // a NaN loses
    {0x0000, 0x8000, 0x0000, 0x0000, 0x8000, 0x0000, 0x0000},
    {0x0001, 0x0001, 0x0001, 0x0002, 0x0000, 0x0001, 0x0001},   // denormals stay
    {0x007f, 0x3f00, 0x0000, 0x3f00, 0x0040, 0x0040, 0x3f00},
};
enum { ARITHMETIC = sizeof arithmetic / sizeof *arithmetic };

__global__ void convert(unsigned short* out, const Conversion* in) {
    float value = __uint_as_float(in[threadIdx.x].value);
    unsigned short* o = out + threadIdx.x * 4;
    o[0] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    o[1] = __bfloat16_as_ushort(__float2bfloat16_rz(value));
    o[2] = __bfloat16_as_ushort(__float2bfloat16_rd(value));
    o[3] = __bfloat16_as_ushort(__float2bfloat16_ru(value));
}

__global__ void calculate(unsigned short* out, const Arithmetic* in) {
    const Arithmetic& values = in[threadIdx.x];
    __nv_bfloat16 a = __ushort_as_bfloat16(values.a), b = __ushort_as_bfloat16(values.b);
    __nv_bfloat162 both = __hfma2(__bfloat162bfloat162(a), __bfloat162bfloat162(b),
                                  __bfloat162bfloat162(__ushort_as_bfloat16(values.c)));
    unsigned short* o = out + threadIdx.x * 4;
    o[0] = __bfloat16_as_ushort(a + b);
    o[1] = __bfloat16_as_ushort(a * b);
    o[2] = __bfloat16_as_ushort(__low2bfloat16(both));
    o[3] = __bfloat16_as_ushort(__hmax(a, b));
}

// Through streaming loads and stores, shuffles and packed conversions a value stays what it is.
__global__ void carry(__nv_bfloat16* out, const __nv_bfloat16* in) {
    __nv_bfloat16 next = __shfl_down_sync(~0u, __ldcs(in + threadIdx.x), 1);
    __nv_bfloat162 pair = __float22bfloat162_rn(__bfloat1622float2(make_bfloat162(next, -next)));
    __stcs(out + threadIdx.x, __high2bfloat16(pair) * __nv_bfloat16(-1));
}

template <class In, void (*kernel)(unsigned short*, const In*)>
static const unsigned short* run(const In* values, int count) {
    static unsigned short results[4 * 32];
    unsigned short* out;
    In* in;
    OK(cudaMalloc(&out, sizeof results));
    OK(cudaMalloc(&in, count * sizeof *in));
    OK(cudaMemcpy(in, values, count * sizeof *in, cudaMemcpyHostToDevice));
    kernel<<<1, count>>>(out, in);
    OK(cudaMemcpy(results, out, count * 4 * sizeof *out, cudaMemcpyDeviceToHost));
    OK(cudaFree(in));
    OK(cudaFree(out));
    return results;
}

static void test_carry(void) {
    __nv_bfloat16 values[32], results[32], *device;
    for (int i = 0; i < 32; i++) values[i] = __float2bfloat16(i - 7.5f);
    OK(cudaMalloc(&device, 2 * sizeof values));
    OK(cudaMemcpy(device, values, sizeof values, cudaMemcpyHostToDevice));
    carry<<<1, 32>>>(device + 32, device);
    OK(cudaMemcpy(results, device + 32, sizeof values, cudaMemcpyDeviceToHost));
    OK(cudaFree(device));
    for (int i = 0; i < 31; i++) CHECK((float)results[i] == i - 6.5f);
}

// A double is rounded once; an integer out of range becomes the nearest.
static void test_host(void) {
    double above = 1 + 0x1p-8 + 0x1p-40, below = 1 + 0x1p-7 + 0x1p-8 - 0x1p-40;
    CHECK(__bfloat16_as_ushort(__double2bfloat16(above)) == 0x3f81);
    CHECK(__bfloat16_as_ushort(__double2bfloat16(below)) == 0x3f81);
    CHECK(__bfloat16_as_ushort(__nv_bfloat16(257)) == 0x4380);      // a tie
    CHECK(__bfloat16_as_ushort(__nv_bfloat16(16842753)) == 0x4b81); // 2^24 + 2^16 + 1: above a tie
    CHECK((int)__nv_bfloat16(3e9f) == 2147483647 && (unsigned short)__nv_bfloat16(-1.0f) == 0);
    CHECK((int)__ushort_as_bfloat16(0x7fff) == 0 && __hisnan(__ushort_as_bfloat16(0xff81)));
}

int main(void) {
    const unsigned short* r = run<Conversion, convert>(conversions, CONVERSIONS);
    for (int i = 0; i < CONVERSIONS; i++, r += 4) {
        const Conversion& c = conversions[i];
        CHECK(r[0] == c.nearest && r[1] == c.zero && r[2] == c.down && r[3] == c.up);
    }
    r = run<Arithmetic, calculate>(arithmetic, ARITHMETIC);
    for (int i = 0; i < ARITHMETIC; i++, r += 4) {
        const Arithmetic& a = arithmetic[i];
        CHECK(r[0] == a.sum && r[1] == a.product && r[2] == a.fused && r[3] == a.largest);
    }
    test_carry();
    test_host();
    return finish();
}
