// test_tensor.cu: mma.sync, ldmatrix, cp.async and named barriers, alone and together in a matrix product.
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>

#include <vector>

#include "test.h"

#define EPS 0x1p-23                             // of float

// ------------------------------------------------------------------------------------------------
// Instructions

static __device__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool transposed>
static __device__ void load_x4(uint32_t* r, const void* row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

// `present` of the 16 or 4 bytes come from the source, the rest is zero.
template <int bytes>
static __device__ void copy(void* to, const void* from, int present) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    if (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(present));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(present));
}

static __device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int groups>
static __device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups));
}

// ------------------------------------------------------------------------------------------------
// Kernels

enum { TILE = 64, DEPTH = 32, PAD = 8, MATRICES = 12 };

// What each lane gets of four matrices whose elements are numbered, rows 48 bytes apart.
__global__ void load_matrices(uint32_t* out) {
    __shared__ __align__(16) uint16_t rows[32][24];
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) rows[lane][i] = (uint16_t)(lane * 8 + i);
    __syncwarp();
    unsigned at = (unsigned)__cvta_generic_to_shared(rows[lane]);
    uint32_t r[MATRICES];
    load_x4<false>(r, rows[lane]);
    load_x4<true>(r + 4, rows[lane]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[8]), "=r"(r[9]) : "r"(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[10]), "=r"(r[11]) : "r"(at));
    for (int i = 0; i < MATRICES; i++) out[lane * MATRICES + i] = r[i];
}

// to (rows, columns), rows `stride` apart, from a matrix (height, width) at (row, column); zero beyond it
template <int bytes>
static __device__ void load_tile(__nv_bfloat16* to, int rows, int columns, int stride,
                                 const __nv_bfloat16* from, int row, int column, int height, int width) {
    enum { COUNT = bytes / 2 };
    for (int i = threadIdx.x; i < rows * columns / COUNT; i += blockDim.x) {
        int r = i / (columns / COUNT), c = i % (columns / COUNT) * COUNT;
        bool inside = row + r < height && column + c < width;
        const __nv_bfloat16* at = inside ? from + (row + r) * width + column + c : from;
        copy<bytes>(to + r * stride + c, at, inside ? bytes : 0);
    }
}

// c (M, N) = a (M, K) times b (N, K)^T, or b (K, N) if transposed: two buffers, four warps of 16 rows each
template <bool transposed, int bytes>
__global__ void matmul(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b, int M, int N, int K) {
    enum { A_STRIDE = DEPTH + PAD, B_STRIDE = (transposed ? TILE : DEPTH) + PAD };
    __shared__ __align__(16) __nv_bfloat16 as[2][TILE * A_STRIDE], bs[2][TILE * (DEPTH + PAD)];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = blockIdx.y * TILE, n = blockIdx.x * TILE;
    float sums[8][4] = {};
    auto load = [&](int buffer, int k) {
        load_tile<bytes>(as[buffer], TILE, DEPTH, A_STRIDE, a, m, k, M, K);
        if (transposed) load_tile<bytes>(bs[buffer], DEPTH, TILE, B_STRIDE, b, k, n, K, N);
        else load_tile<bytes>(bs[buffer], TILE, DEPTH, B_STRIDE, b, n, k, N, K);
        commit();
    };
    load(0, 0);
    for (int k = 0, buffer = 0; k < K; k += DEPTH, buffer ^= 1) {
        load(buffer ^ 1, k + DEPTH);            // past the end: zeros
        wait<1>();
        __syncthreads();
        for (int kk = 0; kk < DEPTH; kk += 16) {
            uint32_t fa[4], fb[4];
            load_x4<false>(fa, &as[buffer][(warp * 16 + lane % 16) * A_STRIDE + kk + lane / 16 * 8]);
            for (int j = 0; j < 4; j++) {
                int along = j * 16 + lane / 16 * 8, deep = kk + lane / 8 % 2 * 8, r = lane % 8;
                load_x4<transposed>(fb, transposed ? &bs[buffer][(deep + r) * B_STRIDE + along]
                                                   : &bs[buffer][(along + r) * B_STRIDE + deep]);
                mma(sums[2 * j], fa, fb);
                mma(sums[2 * j + 1], fa, fb + 2);
            }
        }
        __syncthreads();
    }
    wait<0>();
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) {
            int row = m + warp * 16 + lane / 4 + i / 2 * 8, column = n + j * 8 + lane % 4 * 2 + i % 2;
            if (row < M && column < N) c[row * N + column] = sums[j][i];
        }
}

// Warp 0 hands eight values in turn to warp 1 through one slot; warp 2 takes no part.
__global__ void hand_over(int* out) {
    __shared__ int slot[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < 8 && warp < 2; i++) {
        if (warp == 0) slot[lane] = i * 32 + lane;
        asm volatile("bar.sync %0, %1;" ::"r"(1), "n"(64));
        if (warp == 1) out[i * 32 + lane] = slot[31 - lane];
        asm volatile("bar.sync 2, 64;");
    }
}

__global__ void powers_of_two(float* y, const float* x) {
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[threadIdx.x]) : "f"(x[threadIdx.x]));
}

// ------------------------------------------------------------------------------------------------
// Tests

static unsigned seed = 1;
static float uniform(void) {                    // in [-1, 1)
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (1 << 23) - 1;
}

template <class T>
static T* to_device(const T* values, int count) {
    T* device;
    OK(cudaMalloc(&device, count * sizeof(T)));
    OK(cudaMemcpy(device, values, count * sizeof(T), cudaMemcpyHostToDevice));
    return device;
}

// Is x what a b (with these steps between their k) may give? Each of the K / 8 sums that mma rounds or cuts
// is at most the sum of magnitudes, and errs by less than 4 units in its last place.
static bool close(float x, const __nv_bfloat16* a, const __nv_bfloat16* b, int b_step, int K) {
    double sum = 0, magnitude = 0;
    for (int k = 0; k < K; k++) {
        double term = (double)(float)a[k] * (float)b[k * b_step];
        sum += term;
        magnitude += fabs(term);
    }
    return fabs(x - sum) <= (K / 8 + 1) * 4 * EPS * magnitude;
}

static void test_matrices(void) {
    static uint32_t result[32 * MATRICES];
    uint32_t* device = to_device(result, 32 * MATRICES);
    load_matrices<<<1, 32>>>(device);
    OK(cudaMemcpy(result, device, sizeof result, cudaMemcpyDeviceToHost));
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < MATRICES; i++) {
            int g = lane / 4, t = lane % 4 * 2, matrix = i < 8 ? i % 4 : i % 2;
            bool transposed = i / 4 == 1 || i / 2 == 5;
            unsigned first = matrix * 64 + (transposed ? t * 8 + g : g * 8 + t);
            CHECK(result[lane * MATRICES + i] == (first | (first + (transposed ? 8 : 1)) << 16));
        }
    OK(cudaFree(device));
}

template <bool transposed, int bytes>
static void test_matmul(int M, int N, int K) {
    std::vector<__nv_bfloat16> a(M * K), b(N * K);
    std::vector<float> c(M * N);
    for (int i = 0; i < M * K; i++) a[i] = uniform() * ldexpf(1, i % 24 - 12);
    for (int i = 0; i < N * K; i++) b[i] = uniform();
    __nv_bfloat16 *da = to_device(a.data(), M * K), *db = to_device(b.data(), N * K);
    float* device = to_device(c.data(), M * N);
    dim3 grid((N + TILE - 1) / TILE, (M + TILE - 1) / TILE);
    matmul<transposed, bytes><<<grid, 128>>>(device, da, db, M, N, K);
    OK(cudaMemcpy(c.data(), device, M * N * sizeof(float), cudaMemcpyDeviceToHost));
    int right = 0;
    for (int i = 0; i < M * N; i++)
        right += close(c[i], &a[i / N * K], &b[i % N * (transposed ? 1 : K)], transposed ? N : 1, K);
    CHECK(right == M * N);
    OK(cudaFree(device));
    OK(cudaFree(da));
    OK(cudaFree(db));
}

static void test_hand_over(void) {
    static int result[256];
    int* device = to_device(result, 256);
    hand_over<<<1, 96>>>(device);
    OK(cudaMemcpy(result, device, sizeof result, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 256; i++) CHECK(result[i] == i / 32 * 32 + 31 - i % 32);
    OK(cudaFree(device));
}

// PTX promises a relative error of 2^-22, and 0 for what is subnormal.
static void test_powers_of_two(void) {
    float x[] = {0, -126.5f, -149, -INFINITY, 128, INFINITY, 3, -126, 0.3f, -7.77f, 100.1f, NAN};
    float y[12], exact[] = {1, 0, 0, 0, INFINITY, INFINITY};
    float *device = to_device(x, 12), *result = to_device(x, 12);
    powers_of_two<<<1, 12>>>(result, device);
    OK(cudaMemcpy(y, result, sizeof y, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 6; i++) CHECK(y[i] == exact[i]);
    for (int i = 6; i < 11; i++) CHECK(fabs(y[i] / exp2((double)x[i]) - 1) <= 0x1p-22);
    CHECK(isnan(y[11]));
    OK(cudaFree(device));
    OK(cudaFree(result));
}

int main(void) {
    test_powers_of_two();
    test_matrices();
    test_matmul<false, 16>(80, 72, 104);
    test_matmul<true, 16>(65, 72, 40);
    test_matmul<false, 4>(33, 7, 100);
    test_matmul<true, 4>(1, 70, 34);
    test_hand_over();
    return finish();
}
