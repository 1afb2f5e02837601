#!/bin/sh
# Compares cuda_bf16.h, cublasLt.h and nccl.h with NVIDIA's, where the toolkit is installed: one program is
# compiled with either, and what it prints must agree: hashes of results over all bfloat16 values, many pairs,
# floats, doubles and integers; the types of functions, the values of enumerators.
here=$(cd "$(dirname "$0")/.." && pwd)
toolkit=${CUDA_HOME:-/usr/local/cuda}
if [ ! -f "$toolkit/include/cuda_bf16.h" ]; then
    echo "0 passed, 0 failed: skipped, found no CUDA toolkit in $toolkit"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/values.cpp" <<'END'
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cublasLt.h>
#if __has_include(<nccl.h>)
#include <nccl.h>
#endif
#include <stdio.h>
#include <string.h>
#include <typeinfo>

typedef unsigned long long u64;
static u64 sum;

static void add(u64 value) { sum = (sum ^ value) * 0x100000001b3ull + (sum >> 29); }
static void add(__nv_bfloat16 value) { add((u64)__bfloat16_as_ushort(value)); }
static void add(__nv_bfloat162 value) { add(value.x), add(value.y); }
static void add(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    add((u64)bits);
}
static void show(const char* what) {
    printf("%s %016llx\n", what, sum);
    sum = 0;
}

static __nv_bfloat16 value_of(unsigned bits) { return __ushort_as_bfloat16((unsigned short)bits); }
template <class To, class From> static To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static void one(__nv_bfloat16 a) { add(__bfloat162float(a)), add(-a), add((u64)(bool)a); }

static void two(__nv_bfloat16 a, __nv_bfloat16 b) {
    __nv_bfloat162 p = make_bfloat162(a, b), q = __halves2bfloat162(b, a);
    add(a + b), add(a - b), add(a * b), add(a / b);
    add((u64)(a == b)), add((u64)(a != b)), add((u64)(a < b)), add((u64)(a > b));
    add((u64)(a <= b)), add((u64)(a >= b));
    add(__float22bfloat162_rn(__bfloat1622float2(p))), add(__low2float(q)), add(__high2float(q));
}

static void from_float(unsigned bits) {
    float f = same_bits<float>(bits);
    add(__float2bfloat16(f)), add(__floats2bfloat162_rn(f, -f)), add(__nv_bfloat16((int)bits));
    add(__double2bfloat16(same_bits<double>(same_bits<u64>((double)f) + 1)));
    add(__double2bfloat16(same_bits<double>(same_bits<u64>((double)f) - 1)));
}

#define TYPE(function) printf(#function " %s\n", typeid(&function).name())
#define VALUE(name) printf(#name " %d\n", (int)name)
#define SIZE(name) printf(#name " %d %d\n", (int)sizeof(name), (int)alignof(name))

int main() {
    for (unsigned a = 0; a < 65536; a++) one(value_of(a));
    show("one value");
    for (unsigned a = 0; a < 65536; a++)
        for (unsigned b = a % 509; b < 65536; b += 509) two(value_of(a), value_of(b));
    static const unsigned special[] = {0, 1, 0x7f, 0x80, 0x3f80, 0x7f7f, 0x7f80, 0x7f81, 0x7fff};
    for (unsigned a = 0; a < 65536; a++)
        for (unsigned b : special) two(value_of(a), value_of(b)), two(value_of(b | 0x8000), value_of(a));
    show("two values");
    for (u64 bits = 0; bits < 1ull << 32; bits += 317) from_float((unsigned)bits);
    static const unsigned tails[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    for (unsigned a = 0; a < 65536; a++)
        for (unsigned tail : tails) from_float(a << 16 | tail);
    show("from float, double and integer");
    SIZE(__nv_bfloat16), SIZE(__nv_bfloat162), SIZE(cublasLtMatmulAlgo_t), SIZE(cublasLtMatmulHeuristicResult_t);
    TYPE(cublasLtCreate), TYPE(cublasLtDestroy), TYPE(cublasLtMatmul);
    TYPE(cublasLtMatmulDescCreate), TYPE(cublasLtMatmulDescDestroy), TYPE(cublasLtMatmulDescSetAttribute);
    TYPE(cublasLtMatrixLayoutCreate), TYPE(cublasLtMatrixLayoutDestroy);
    TYPE(cublasLtMatmulPreferenceCreate), TYPE(cublasLtMatmulPreferenceDestroy);
    TYPE(cublasLtMatmulPreferenceSetAttribute), TYPE(cublasLtMatmulAlgoGetHeuristic);
#include "names.h"
}
END
# every enumerator of our headers, so that none is forgotten
for header in cublasLt.h nccl.h; do
    [ -f "$toolkit/include/$header" ] || continue
    grep -oE '[A-Za-z0-9_]+ = [0-9]' "$here/include/$header" | sed 's/ = .*/);/; s/^/    VALUE(/'
done > "$folder/names.h"
# the functions' types are compared, none is called: they may stay undefined
build() {
    g++ -std=c++17 -O1 -w -isystem "$1" "$folder/values.cpp" -no-pie -Wl,--unresolved-symbols=ignore-all \
        -o "$2" && "$2" > "$2.txt"
}
build "$toolkit/include" "$folder/nvidia" && build "$here/include" "$folder/here" || exit 1
if diff "$folder/nvidia.txt" "$folder/here.txt"; then
    echo "$(wc -l < "$folder/here.txt") passed, 0 failed"
else
    echo "0 passed, 1 failed: cuda_bf16.h, cublasLt.h or nccl.h differs from NVIDIA's (<)"
    exit 1
fi
