// ptx.h: the PTX instructions that inline asm may use. rewrite.py makes
//     asm volatile("cp.async.wait_group %0;" ::"n"(1))
// a call of cpu_cuda::ptx::cp_async_wait_group({file, line}, 1): the instruction's name with . and :: as _,
// then its operands in the order in which it names them. To add an instruction: a function of that name here,
// its work in ptx.cpp. One that is not here does not compile.

#pragma once

#include <math.h>

#include "engine.h"

namespace cpu_cuda::ptx {

// D = A B + C of one warp: A (16, 16), B (16, 8) bfloat16, C and D (16, 8) float; fragments as PTX has them.
//
// Order: c and the products of k = 0..7, summed in double and rounded to float; then k = 8..15 likewise. A
// GPU also adds several products at a time, but aligns them to the largest and cuts the digits below: its
// result may differ from this one by a few units in the last place of the largest partial sum.
struct Product {                // a lane's part
    float* d[4];
    uint32_t a[4], b[2];
    float c[4];
};
void multiply(Place here, Product part);

inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    Place here, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
    uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    multiply(here, {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}});
}

// 8x8 matrices of 16 bits, one a register; lane 8 * i + r gives the address of row r of matrix i.
void load_matrices(Place here, std::initializer_list<uint32_t*> registers, bool transposed, uint32_t address);

typedef uint32_t& Register;
#define CPU_CUDA_LDMATRIX(KIND, TRANSPOSED)                                                                 \
    inline void ldmatrix_sync_aligned_m8n8_x2_##KIND(Place here, Register a, Register b, uint32_t address) {\
        load_matrices(here, {&a, &b}, TRANSPOSED, address);                                                 \
    }                                                                                                       \
    inline void ldmatrix_sync_aligned_m8n8_x4_##KIND(Place here, Register a, Register b, Register c,        \
                                                     Register d, uint32_t address) {                        \
        load_matrices(here, {&a, &b, &c, &d}, TRANSPOSED, address);                                         \
    }
CPU_CUDA_LDMATRIX(shared_b16, false)
CPU_CUDA_LDMATRIX(trans_shared_b16, true)
#undef CPU_CUDA_LDMATRIX

// From its issue to its wait the destination holds 0xff bytes: read too early, it is NaN. The source is read
// at the wait: `bytes` <= size of it, the rest becomes zero.
void cp_async_ca_shared_global(Place here, uint32_t to, const void* from, int size, unsigned bytes);
void cp_async_cg_shared_global(Place here, uint32_t to, const void* from, int size, unsigned bytes = 16);
inline void cp_async_ca_shared_global(Place here, uint32_t to, const void* from, int size) {
    cp_async_ca_shared_global(here, to, from, size, (unsigned)size);
}
void cp_async_commit_group(Place here);
void cp_async_wait_group(Place here, int groups);       // all but the newest `groups` of this thread are done
void cp_async_wait_all(Place here);

inline void bar_sync(Place here, int id, int threads) { named_barrier(id, threads, here); }

// 2^x exact but for its last bits; what would be subnormal becomes 0.
inline void ex2_approx_ftz_f32(Place, float& y, float x) { y = x < -126 ? 0 : exp2f(x); }

}  // namespace cpu_cuda::ptx
