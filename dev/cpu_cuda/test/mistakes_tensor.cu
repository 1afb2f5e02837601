// mistakes_tensor.cu: ldmatrix, cp.async, mma and cuBLASLt used wrongly.
#include "test.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <stdint.h>

static constexpr int LANES = 32;

static __device__ unsigned shared_at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// `count` floats of device memory, counted up from 1.
static float* counted(int count) {
    float *host = (float*)malloc(count * sizeof *host), *p;
    for (int i = 0; i < count; i++) host[i] = (float)(i + 1);
    OK(cudaMalloc(&p, count * sizeof *p));
    OK(cudaMemcpy(p, host, count * sizeof *p, cudaMemcpyHostToDevice));
    free(host);
    return p;
}

// ------------------------------------------------------------------------------------------------
// ldmatrix

static __device__ uint32_t load_x4(unsigned at) {
    uint32_t r[4];
    asm volatile(                                   // HERE row_stride odd_row past_end
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
    return r[0] ^ r[1] ^ r[2] ^ r[3];
}

// CASE row_stride plain,check: is not a multiple of 16
__global__ void row_stride(uint32_t* out) {     // rows of 20 bytes
    __shared__ __align__(16) uint16_t rows[LANES][10];
    for (int i = 0; i < 10; i++) rows[threadIdx.x][i] = (uint16_t)i;
    __syncwarp();
    out[threadIdx.x] = load_x4(shared_at(rows[threadIdx.x]));
}

// CASE odd_row plain,check: is not a multiple of 16
__global__ void odd_row(uint32_t* out) {        // only the last matrix is wrong
    __shared__ __align__(16) uint16_t rows[LANES + 1][8];
    int lane = threadIdx.x;
    out[lane] = load_x4(shared_at(&rows[lane][lane >= 24 ? 4 : 0]));
}

// CASE global_row plain,check: is not shared memory of this block
__global__ void global_row(uint32_t* out) {
    unsigned at = (unsigned)__cvta_generic_to_shared(out);          // HERE global_row
    out[threadIdx.x] = load_x4(at);
}

// CASE past_end plain,check: not within shared memory of this block
__global__ void past_end(uint32_t* out) {       // 16 rows where four matrices need 32
    __shared__ __align__(16) uint16_t rows[16][8];
    for (int i = 0; i < 8 && threadIdx.x < 16; i++) rows[threadIdx.x][i] = 0;
    __syncwarp();
    out[threadIdx.x] = load_x4(shared_at(rows[0]) + threadIdx.x * 16);
}

// ------------------------------------------------------------------------------------------------
// cp.async

static __device__ void copy16(void* to, const void* from) {
    asm volatile(                                   // HERE shifted_to shifted_from source_past_end
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_at(to)), "l"(from));
}
static __device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int groups>
static __device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups));
}

// CASE shifted_to plain,check: cp.async: the destination
__global__ void shifted_to(const float* in, float* out) {       // rows of 5 floats
    __shared__ __align__(16) float s[LANES * 5];
    copy16(s + threadIdx.x * 5, in + threadIdx.x * 4);
    commit();
    wait<0>();
    out[threadIdx.x] = s[threadIdx.x * 5];
}

// CASE shifted_from plain,check: cp.async: the source
__global__ void shifted_from(const float* in, float* out) {     // the second row starts at 17 floats
    __shared__ __align__(16) float s[2][16];
    int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
    if (row < 2) copy16(&s[row][column], in + row * 17 + column);
    out[threadIdx.x] = 0;
}

// CASE source_past_end plain,check: out of bounds
__global__ void source_past_end(const float* in, float* out) {
    __shared__ __align__(16) float s[LANES * 4];
    copy16(s + threadIdx.x * 4, in + threadIdx.x * 4);
    commit();
    wait<0>();
    out[threadIdx.x] = 0;
}

// CASE early plain: wrong result
// CASE early_checked check: cp.async not waited for
__global__ void early(const float* in, float* out) {            // nobody waits
    __shared__ __align__(16) float s[LANES * 4];
    copy16(s + threadIdx.x * 4, in + threadIdx.x * 4);
    commit();
    out[threadIdx.x] = s[threadIdx.x * 4];                      // HERE early_checked
}

// CASE too_many_left check: cp.async not waited for
__global__ void too_many_left(const float* in, float* out) {    // the last tile needs a wait for all
    __shared__ __align__(16) float s[2][LANES * 4];
    int i = threadIdx.x * 4;
    float sum = 0;
    copy16(s[0] + i, in + i);
    commit();
    for (int tile = 0; tile < 2; tile++) {
        if (tile == 0) copy16(s[1] + i, in + LANES * 4 + i), commit();
        wait<1>();
        sum += s[tile][i];                                      // HERE too_many_left
    }
    out[threadIdx.x] = sum - in[i] - in[LANES * 4 + i] + in[i];
}

// CASE not_committed check: cp.async not waited for
__global__ void not_committed(const float* in, float* out) {    // so the wait knows of no group
    __shared__ __align__(16) float s[LANES * 4];
    copy16(s + threadIdx.x * 4, in + threadIdx.x * 4);
    wait<0>();
    out[threadIdx.x] = s[threadIdx.x * 4];                      // HERE not_committed
}

template <void (*kernel)(const float*, float*)>
static void run_copies(void) {
    float *in = counted(LANES * 8), *out = counted(LANES), results[LANES];
    kernel<<<1, LANES>>>(in, out);
    OK(cudaMemcpy(results, out, sizeof results, cudaMemcpyDeviceToHost));
    for (int i = 0; i < LANES; i++) expect(results[i] == (float)(i * 4 + 1));
}

// ------------------------------------------------------------------------------------------------
// mma

static __device__ float multiply(void) {
    float d[4] = {};
    uint32_t zero = 0;
    asm volatile(                                   // HERE half_warp exited
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(zero));
    return d[0];
}

// CASE half_warp plain,check: names lane 16, which does not exist
__global__ void half_warp(float* out) { out[threadIdx.x] = multiply(); }

// CASE exited plain,check: has exited
__global__ void exited(float* out) {
    if (threadIdx.x >= 20) return;              // rows beyond the matrix
    out[threadIdx.x] = multiply();
}

// CASE in_branch plain: mma.sync
__global__ void in_branch(float* out) {
    if (threadIdx.x % 2) out[threadIdx.x] = multiply();
    __syncwarp();                               // HERE in_branch
}

// ------------------------------------------------------------------------------------------------
// cuBLASLt

// d (m, n) = a (m, k) b (k, n), with so many floats behind each pointer
static void multiply_with(int room_a, int room_d, int room_bias) {
    enum { M = 64, N = 32, K = 48 };
    float *a = counted(room_a), *b = counted(52 * 31 + 48), *d = counted(room_d), *bias = counted(room_bias);
    float one = 1, zero = 0;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t la, lb, ld;
    uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatrixLayoutCreate(&la, CUDA_R_32F, M, K, M);
    cublasLtMatrixLayoutCreate(&lb, CUDA_R_32F, K, N, K + 4);
    cublasLtMatrixLayoutCreate(&ld, CUDA_R_32F, M, N, M);
    cublasStatus_t status = cublasLtMatmul(         // HERE short_a short_d short_bias
        handle, operation, &one, a, la, b, lb, &zero, d, ld, d, ld, NULL, NULL, 0, 0);
    expect(status == CUBLAS_STATUS_SUCCESS);
}

// CASE short_a plain,check,address: cublasLtMatmul: A reads
// CASE short_d plain: cublasLtMatmul: D writes
// CASE short_bias plain: cublasLtMatmul: bias reads
// CASE long_enough plain,check,address: clean

static uint32_t* words(void) { return (uint32_t*)counted(LANES); }

static const Case cases[] = {
    {"row_stride", [] { row_stride<<<1, LANES>>>(words()); }},
    {"odd_row", [] { odd_row<<<1, LANES>>>(words()); }},
    {"global_row", [] { global_row<<<1, LANES>>>(words()); }},
    {"past_end", [] { past_end<<<1, LANES>>>(words()); }},
    {"shifted_to", run_copies<shifted_to>},
    {"shifted_from", run_copies<shifted_from>},
    {"source_past_end", [] { source_past_end<<<1, LANES>>>(counted(LANES * 4 - 4), counted(LANES)); }},
    {"early", run_copies<early>},
    {"early_checked", run_copies<early>},
    {"too_many_left", run_copies<too_many_left>},
    {"not_committed", run_copies<not_committed>},
    {"half_warp", [] { half_warp<<<1, 16>>>(counted(LANES)); }},
    {"exited", [] { exited<<<1, LANES>>>(counted(LANES)); }},
    {"in_branch", [] { in_branch<<<1, LANES>>>(counted(LANES)); }},
    {"short_a", [] { multiply_with(64 * 48 - 1, 64 * 32, 64); }},
    {"short_d", [] { multiply_with(64 * 48, 32 * 48, 64); }},
    {"short_bias", [] { multiply_with(64 * 48, 64 * 32, 32); }},
    {"long_enough", [] { multiply_with(64 * 48, 64 * 32, 64); }},
};

int main(int argc, char** argv) { return RUN_CASE(cases, argc, argv); }
