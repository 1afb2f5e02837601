// ptx.h: the PTX instructions that inline asm may use. rewrite.py makes
//     asm volatile("cp.async.wait_group %0;" ::"n"(1))
// a call of cpu_cuda::ptx::cp_async_wait_group({file, line}, 1): the instruction's name with . and :: as _,
// then its operands in the order in which it names them. To add an instruction: a function of that name here,
// its work in ptx.cpp. One that is not here does not compile.

#pragma once

#include "engine.h"

namespace cpu_cuda {
namespace ptx {

// D = A B + C of one warp: A (16, 16), B (16, 8) bfloat16, C and D (16, 8) float; fragments as PTX has them.
//
// Order: c and the products of k = 0..7, summed in double and rounded to float; then k = 8..15 likewise. A
// GPU also adds several products at a time, but aligns them to the largest and cuts the digits below: its
// result may differ from this one by a few units in the last place of the largest partial sum.
void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(Place here, float& d0, float& d1, float& d2,
                                                         float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                                                         uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                                                         float c1, float c2, float c3);

// `count` 8x8 matrices of 16 bits; lane 8 * i + r gives the address of row r of matrix i.
void load_matrices(Place here, uint32_t* const* registers, int count, bool transposed, uint32_t address);

template <bool transposed>
void ldmatrix_x1(Place here, uint32_t& r0, uint32_t address) {
    uint32_t* registers[] = {&r0};
    load_matrices(here, registers, 1, transposed, address);
}

template <bool transposed>
void ldmatrix_x2(Place here, uint32_t& r0, uint32_t& r1, uint32_t address) {
    uint32_t* registers[] = {&r0, &r1};
    load_matrices(here, registers, 2, transposed, address);
}

template <bool transposed>
void ldmatrix_x4(Place here, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
    uint32_t* registers[] = {&r0, &r1, &r2, &r3};
    load_matrices(here, registers, 4, transposed, address);
}

#define CPU_CUDA_LDMATRIX(kind, transposed)                                                \
    inline constexpr auto& ldmatrix_sync_aligned_m8n8_x1_##kind = ldmatrix_x1<transposed>; \
    inline constexpr auto& ldmatrix_sync_aligned_m8n8_x2_##kind = ldmatrix_x2<transposed>; \
    inline constexpr auto& ldmatrix_sync_aligned_m8n8_x4_##kind = ldmatrix_x4<transposed>;
CPU_CUDA_LDMATRIX(shared_b16, false)
CPU_CUDA_LDMATRIX(shared_cta_b16, false)
CPU_CUDA_LDMATRIX(trans_shared_b16, true)
CPU_CUDA_LDMATRIX(trans_shared_cta_b16, true)
#undef CPU_CUDA_LDMATRIX

// From its issue to its wait the destination holds 0xff bytes: read too early, it is NaN. The source is read
// at the wait: `bytes` <= size of it, the rest becomes zero.
void copy_async(Place here, uint32_t to, const void* from, int size, unsigned bytes, bool bypasses_l1);

#define CPU_CUDA_CP_ASYNC(kind, bypasses_l1)                                                            \
    inline void cp_async_##kind(Place here, uint32_t to, const void* from, int size) {                  \
        copy_async(here, to, from, size, size, bypasses_l1);                                            \
    }                                                                                                   \
    inline void cp_async_##kind(Place here, uint32_t to, const void* from, int size, unsigned bytes) {  \
        copy_async(here, to, from, size, bytes, bypasses_l1);                                           \
    }
CPU_CUDA_CP_ASYNC(ca_shared_global, false)
CPU_CUDA_CP_ASYNC(ca_shared_cta_global, false)
CPU_CUDA_CP_ASYNC(cg_shared_global, true)
CPU_CUDA_CP_ASYNC(cg_shared_cta_global, true)
CPU_CUDA_CP_ASYNC(cg_shared_global_L2_128B, true)
#undef CPU_CUDA_CP_ASYNC

void cp_async_commit_group(Place here);
void cp_async_wait_group(Place here, int groups);       // all but the newest `groups` of this thread are done
void cp_async_wait_all(Place here);

// Barrier `id` of the block; without a number of threads all of them.
void bar_sync(Place here, int id);
inline void bar_sync(Place here, int id, int threads) { named_barrier(id, threads, here); }
inline void barrier_sync(Place here, int id) { bar_sync(here, id); }
inline void barrier_sync(Place here, int id, int threads) { named_barrier(id, threads, here); }

}  // namespace ptx
}  // namespace cpu_cuda
