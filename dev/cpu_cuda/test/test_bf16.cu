// test_bf16.cu: conversions and arithmetic of bfloat16 against bits that are written down.
#include <cuda_bf16.h>

#include "test.h"

struct Conversion {
    unsigned value;                     // the float's bits
    unsigned short rounded;
};

static const Conversion conversions[] = {
    {0x00000000, 0x0000}, {0x80000000, 0x8000}, {0x3f800000, 0x3f80},
    {0x3f800001, 0x3f80}, {0xbf800001, 0xbf80},                         // just above a value
    {0x3f807fff, 0x3f80}, {0x3f808001, 0x3f81},                         // beside half way
    {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0xbf818000, 0xbf82},   // half way: to even
    {0x3fffffff, 0x4000},                                               // into the next power of two
    {0x00000001, 0x0000}, {0x80000001, 0x8000}, {0x00008000, 0x0000},   // denormals
    {0x00018000, 0x0002}, {0x007fffff, 0x0080},
    {0x7f7fffff, 0x7f80}, {0xff7fffff, 0xff80},                         // the largest float: infinity
    {0x7f800000, 0x7f80}, {0xff800000, 0xff80},
    {0x7f800001, 0x7fff}, {0xffc12345, 0x7fff},                         // every NaN
};
enum { CONVERSIONS = sizeof conversions / sizeof *conversions };

struct Arithmetic {
    unsigned short a, b, sum, product;
};

static const Arithmetic arithmetic[] = {
    {0x3f80, 0x3f80, 0x4000, 0x3f80},
    {0x3f80, 0x3b80, 0x3f80, 0x3b80},   // 1 + 2^-8: a tie
    {0x3f81, 0x3f82, 0x4002, 0x3f83},
    {0x3f88, 0x3f88, 0x4008, 0x3f90},
    {0x7f7f, 0x7f7f, 0x7f80, 0x7f80},
    {0x7f80, 0xff80, 0x7fff, 0xff80},
    {0x7fc0, 0x3f80, 0x7fff, 0x7fff},
    {0x0000, 0x8000, 0x0000, 0x8000},
    {0x0001, 0x0001, 0x0002, 0x0000},   // denormals stay
    {0x007f, 0x3f00, 0x3f00, 0x0040},
};
enum { ARITHMETIC = sizeof arithmetic / sizeof *arithmetic };

__global__ void convert(unsigned short* out, const Conversion* in) {
    float value = __uint_as_float(in[threadIdx.x].value);
    out[threadIdx.x * 2] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    out[threadIdx.x * 2 + 1] = __bfloat16_as_ushort(__floats2bfloat162_rn(0, value).y);
}

// The product goes through a pair and streaming loads and stores too.
__global__ void calculate(unsigned short* out, const Arithmetic* in) {
    __nv_bfloat16* o = (__nv_bfloat16*)out + threadIdx.x * 2;
    __nv_bfloat16 a = __ldcs((const __nv_bfloat16*)in + threadIdx.x * 4);
    __nv_bfloat16 b = __ushort_as_bfloat16(in[threadIdx.x].b);
    __nv_bfloat162 pair = __float22bfloat162_rn(__bfloat1622float2(make_bfloat162(a + b, a * b)));
    o[0] = pair.x;
    __stcs(o + 1, __float2bfloat16(__high2float(pair)));
}

// Two results of each of `count` values.
template <class In, void (*kernel)(unsigned short*, const In*)>
static const unsigned short* run(const In* values, int count) {
    static unsigned short results[2 * 32];
    unsigned short* out;
    In* in;
    OK(cudaMalloc(&out, sizeof results));
    OK(cudaMalloc(&in, count * sizeof *in));
    OK(cudaMemcpy(in, values, count * sizeof *in, cudaMemcpyHostToDevice));
    kernel<<<1, count>>>(out, in);
    OK(cudaMemcpy(results, out, count * 2 * sizeof *out, cudaMemcpyDeviceToHost));
    OK(cudaFree(in));
    OK(cudaFree(out));
    return results;
}

int main(void) {
    const unsigned short* r = run<Conversion, convert>(conversions, CONVERSIONS);
    for (int i = 0; i < CONVERSIONS; i++)
        CHECK(r[2 * i] == conversions[i].rounded && r[2 * i + 1] == conversions[i].rounded);
    r = run<Arithmetic, calculate>(arithmetic, ARITHMETIC);
    for (int i = 0; i < ARITHMETIC; i++)
        CHECK(r[2 * i] == arithmetic[i].sum && r[2 * i + 1] == arithmetic[i].product);
    CHECK(__bfloat16_as_ushort(__double2bfloat16(1 + 0x1p-8 + 0x1p-40)) == 0x3f81);     // rounded once
    CHECK(__bfloat16_as_ushort(__nv_bfloat16(257)) == 0x4380);      // a tie
    CHECK(__bfloat16_as_ushort(__nv_bfloat16(16842753)) == 0x4b81); // 2^24 + 2^16 + 1: above a tie
    return finish();
}
