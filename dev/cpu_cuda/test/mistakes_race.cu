// mistakes_race.cu: races, uninitialised reads, bounds, alignment; and correct kernels that look like it.

#include "test.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <nccl.h>

static constexpr int BLOCKS = 4, N = 64;        // N threads a block

// `count` floats of device memory; nobody writes them.
static float* fresh(int count) {
    float* p;
    OK(cudaMalloc(&p, (size_t)count * sizeof *p));
    return p;
}

static float* zeros(int count) {
    float* p = fresh(count);
    OK(cudaMemset(p, 0, (size_t)count * sizeof *p));
    return p;
}

template <class... Parameters, class... Arguments>
static void launch_cooperative(void (*kernel)(Parameters...), Arguments... arguments) {
    void* pointers[] = {&arguments...};
    OK(cudaLaunchCooperativeKernel(kernel, dim3(BLOCKS), dim3(N), pointers, 0, 0));
}

// ------------------------------------------------------------------------------------------------
// Shared memory, within a block

// CASE no_barrier check: race between
// CASE no_barrier_at_end check: write-after-read
// CASE reuse plain,check: clean
__global__ void exchange(float* out, bool when_written, bool when_read) {
    extern __shared__ float dynamic[];
    for (int i = 0; i < 3; i++) {
        dynamic[threadIdx.x] = (float)i;                        // HERE no_barrier no_barrier_at_end
        if (when_written) __syncthreads();
        out[threadIdx.x] += dynamic[(threadIdx.x + 33) % N];    // HERE no_barrier no_barrier_at_end
        if (when_read) __syncthreads();
    }
}

// Leaves its result in every thread, but not the buffer free.
__device__ float block_max(float value) {
    __shared__ float warps[2];
    for (int i = 16; i; i /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, i));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;         // HERE reused_buffer
    __syncthreads();
    return fmaxf(warps[0], warps[1]);                                   // HERE reused_buffer
}

// CASE reused_buffer check: write-after-read race between
__global__ void reused_buffer(float* out) {
    float most = block_max(out[threadIdx.x]);
    out[threadIdx.x] = block_max(most - (float)threadIdx.x);
}

// CASE same_value check: write-after-write
__global__ void same_value(int* out) {
    __shared__ int found;
    if (threadIdx.x >= 40) found = 1;           // HERE same_value
    __syncthreads();
    out[threadIdx.x] = found;
}

// CASE half_word check: read-after-write race between lanes of a warp in shared memory
__global__ void half_word(float* out) {
    __shared__ __align__(4) __nv_bfloat16 s[N];
    s[threadIdx.x] = __float2bfloat16(1);                               // HERE half_word
    if (threadIdx.x == N - 1) out[0] = (float)*(const unsigned*)&s[threadIdx.x - 1];     // HERE half_word
}

// CASE third_warp check: read-after-write race between warps of a block in shared memory
__global__ void third_warp(float* out) {
    __shared__ float s[96];
    s[threadIdx.x] = 1;                         // HERE third_warp
    if (threadIdx.x < 64) asm volatile("bar.sync 1, 64;" ::: "memory");
    if (threadIdx.x >= 32) asm volatile("bar.sync 2, 64;" ::: "memory");
    if (threadIdx.x < 32) out[threadIdx.x] = s[threadIdx.x + 32];       // these two met
    if (threadIdx.x < 32) out[threadIdx.x] += s[threadIdx.x + 64];      // HERE third_warp
}

// Warp 0 fills one of two buffers while warp 1 empties the other; they meet when the one is full.
// CASE specialised plain,check: clean
__global__ void specialised(float* out) {
    __shared__ float s[2][32];
    int lane = (int)threadIdx.x % 32;
    float sum = 0;
    for (int i = 0; i < 6; i++) {
        if (threadIdx.x < 32) s[i % 2][lane] = (float)i;
        asm volatile("bar.sync %0, 64;" ::"r"(1 + i % 2) : "memory");
        if (threadIdx.x >= 32) sum += s[i % 2][31 - lane];
    }
    if (threadIdx.x >= 32) out[blockIdx.x * 32 + lane] = sum;
}

// CASE specialised_block plain,check: clean
__global__ void specialised_block(float* out) {
    __shared__ float s[2][32];
    float sum = 0;
    for (int i = 0; i <= 6; i++) {
        if (threadIdx.x < 32) s[i % 2][threadIdx.x] = (float)i;
        else if (i > 0) sum += s[(i - 1) % 2][63 - threadIdx.x];
        __syncthreads();
    }
    if (threadIdx.x >= 32) out[threadIdx.x - 32] = sum;
}

// ------------------------------------------------------------------------------------------------
// Shared memory, within a warp

// The second warp is half a warp. With `width` 16, so that its lanes alone meet, the first is two halves.
// CASE no_syncwarp check: race between lanes of a warp in shared memory
// CASE no_syncwarp_in_loop check: race between lanes of a warp in shared memory
// CASE half_syncwarp check: race between lanes of a warp in shared memory
// CASE warp_sum plain,check: clean
__global__ void warp_sum(float* out, int width, bool when_written, bool when_read) {
    __shared__ float s[48];
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned mask = width == 32 && warp == 0 ? ~0u : 0xffffu << lane / 16 * 16;
    s[threadIdx.x] = 1;                                         // HERE no_syncwarp half_syncwarp
    for (unsigned i = warp ? 8 : 16; i; i /= 2) {
        if (when_written) __syncwarp(mask);
        else __shfl_xor_sync(mask, lane, 1);                    // which orders registers, not memory
        float other = 0;
        if (lane < i) other = s[threadIdx.x + i];       // HERE no_syncwarp no_syncwarp_in_loop half_syncwarp
        if (when_read) __syncwarp(mask);
        s[threadIdx.x] += other;                                // HERE no_syncwarp_in_loop
    }
    out[threadIdx.x] = s[threadIdx.x];
}

// CASE halves plain,check: clean
__global__ void halves(__nv_bfloat16* out) {
    __shared__ __nv_bfloat16 s[N];
    s[threadIdx.x] = __float2bfloat16((float)threadIdx.x);
    out[threadIdx.x] = s[threadIdx.x];
}

// ------------------------------------------------------------------------------------------------
// Global memory

// CASE global_no_barrier check: race between warps of a block in global memory
__global__ void global_no_barrier(float* out) {
    if (threadIdx.x < 32) out[threadIdx.x] = 1;                         // HERE global_no_barrier
    if (threadIdx.x >= 40) out[0] += out[threadIdx.x - 32];             // HERE global_no_barrier
}

__device__ int counter;

// CASE device_variable check: race between blocks in global memory
__global__ void device_variable() {
    if (threadIdx.x == 0) counter += 1;         // HERE device_variable
}

// CASE neighbour check: race between blocks in global memory
__global__ void neighbour(float* out) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    out[i] = (float)i;                          // HERE neighbour
    __syncthreads();                            // orders this block alone
    if (threadIdx.x == 0 && i > 0) out[i] = out[i - 1];         // HERE neighbour
}

// CASE plain_and_atomic check: race between blocks in global memory
__global__ void plain_and_atomic(float* sum) {
    if (threadIdx.x) return;
    atomicAdd(sum, 1);                          // HERE plain_and_atomic
    if (blockIdx.x == gridDim.x - 1) sum[1] = sum[0];   // HERE plain_and_atomic
}

// The fence is that of each thread (`all_fence`), or of the one that tells the other blocks (`fences`).
// CASE no_fence check: race between blocks in global memory
// CASE no_barrier_before_atomic check: race between blocks in global memory
// CASE last_block plain,check,order: clean
// CASE all_fence plain,check: clean
__global__ void last_block(float* parts, float* sum, unsigned* done, bool meets, bool fences,
                           bool all_fence) {
    __shared__ bool last;
    parts[blockIdx.x * N + threadIdx.x] = 1;    // HERE no_fence no_barrier_before_atomic
    if (all_fence) __threadfence();
    if (meets) __syncthreads();
    if (fences && threadIdx.x == 0) __threadfence();
    if (threadIdx.x == 0) last = atomicInc(done, gridDim.x) == gridDim.x - 1;
    __syncthreads();
    float total = 0;
    for (int b = 0; last && b < (int)gridDim.x; b++)
        total += parts[b * N + threadIdx.x];    // HERE no_fence no_barrier_before_atomic
    if (last) sum[threadIdx.x] = total;
}
static void last_block_sum(bool meets, bool fences, bool all_fence) {
    last_block<<<BLOCKS, N>>>(fresh(BLOCKS * N), fresh(N), (unsigned*)zeros(1), meets, fences, all_fence);
}

// Each block adds to what the one before it left, as soon as that is there.
// CASE flag_no_fence check: read-after-write race between blocks in global memory
// CASE look_back plain,check: clean
__global__ void look_back(float* sums, volatile int* ready, bool fences) {
    __shared__ float before;
    if (threadIdx.x == 0) {
        while (blockIdx.x > 0 && !ready[blockIdx.x - 1]) __nanosleep(100);
        __threadfence();
        before = 0;
        if (blockIdx.x) before = sums[(blockIdx.x - 1) * N + N - 1];    // HERE flag_no_fence
    }
    __syncthreads();
    sums[blockIdx.x * N + threadIdx.x] = before + 1;                    // HERE flag_no_fence
    __syncthreads();
    if (fences && threadIdx.x == 0) __threadfence();
    if (threadIdx.x == 0) ready[blockIdx.x] = 1;
}

// CASE ticket plain,check: clean
__global__ void ticket(float* sum, unsigned* tickets) {
    if (threadIdx.x) return;
    unsigned mine = atomicAdd(tickets, 1);
    while (atomicAdd(tickets + 1, 0) != mine) __nanosleep(100);
    __threadfence();
    sum[0] += 1;
    __threadfence();
    atomicExch(tickets + 1, mine + 1);
}

// CASE grid_sum plain,check: clean
__global__ void grid_sum(float* parts, float* out) {
    cooperative_groups::grid_group grid = cooperative_groups::this_grid();
    int i = (int)(blockIdx.x * N + threadIdx.x), count = (int)gridDim.x * N;
    parts[i] = (float)i;
    for (int step = count / 2; step; step /= 2) {
        grid.sync();
        if (i < step) parts[i] += parts[i + step];
    }
    grid.sync();
    out[i] = parts[0];
}

// ------------------------------------------------------------------------------------------------
// cp.async

// CASE async_no_barrier check: race between
// CASE async_reused check: race between
// CASE pipeline plain,check: clean
__global__ void pipeline(const float* in, float* out, bool when_written, bool when_read) {
    __shared__ __align__(16) float s[2][4 * N];
    float sum = 0;
    for (int i = 0; i <= 5; i++) {
        unsigned to = (unsigned)__cvta_generic_to_shared(&s[i % 2][4 * threadIdx.x]);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"        // HERE async_no_barrier async_reused
                     ::"r"(to), "l"(in + 4 * threadIdx.x) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (i == 0) continue;
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        if (when_written) __syncthreads();
        sum += s[(i - 1) % 2][4 * N - 1 - threadIdx.x];                 // HERE async_no_barrier async_reused
        if (when_read) __syncthreads();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    out[threadIdx.x] = sum;
}

// ------------------------------------------------------------------------------------------------
// Uninitialised reads

// CASE fresh_shared check: uninitialised read in shared memory
__global__ void fresh_shared(float* out) {
    __shared__ float s[N];
    if (threadIdx.x != 5) s[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];          // HERE fresh_shared
}

// CASE fresh_global check: uninitialised read in global memory
// CASE fresh_copied check: uninitialised read in global memory
__global__ void fresh_global(float* out) {
    if (threadIdx.x > 40) out[threadIdx.x] += 1;        // HERE fresh_global fresh_copied
}
static void fresh_copied() {
    float* copy = zeros(N);
    OK(cudaMemcpy(copy, fresh(N), N * sizeof *copy, cudaMemcpyDeviceToDevice));
    fresh_global<<<1, N>>>(copy);
}

// CASE fresh_half check: uninitialised read in global memory
__global__ void fresh_half(__nv_bfloat16* out) {
    if (threadIdx.x < N - 1) out[threadIdx.x] = __float2bfloat16(1);
    __syncthreads();
    if (threadIdx.x < N / 2) ((unsigned*)out)[threadIdx.x] ^= 0x80008000u;      // HERE fresh_half
}

// CASE fresh_to_host check: uninitialised read by cudaMemcpy
static void fresh_to_host() {
    float host[N];
    OK(cudaMemcpy(host, fresh(N), sizeof host, cudaMemcpyDeviceToHost));        // HERE fresh_to_host
}

// CASE fresh_reduced check: uninitialised read by ncclAllReduce
static void fresh_reduced() {
    ncclComm_t communicator;
    ncclUniqueId id;
    expect(ncclGetUniqueId(&id) == ncclSuccess && ncclCommInitRank(&communicator, 1, id, 0) == ncclSuccess);
    ncclAllReduce(fresh(N), zeros(N), N, ncclFloat, ncclSum, communicator, 0);  // HERE fresh_reduced
}

// ------------------------------------------------------------------------------------------------
// Bounds, alignment, overflow

// CASE past_array check: out of bounds
// CASE past_array address: index 64 out of bounds
__global__ void past_array(float* out, int shift) {
    __shared__ float s[N], t[N];
    s[threadIdx.x] = t[N - 1 - threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = t[threadIdx.x] + s[threadIdx.x + shift];         // HERE past_array
}

// CASE before_array check: out of bounds
// CASE before_array address: AddressSanitizer: use-after-poison
__global__ void before_array(int shift) {
    __shared__ float s[N / 4][4];
    float(*row)[4] = s + threadIdx.x / 4 + shift;
    (*row)[threadIdx.x % 4] = 1;                        // HERE before_array
}

// CASE past_dynamic check: out of bounds
// CASE past_dynamic address: AddressSanitizer: use-after-poison
__global__ void past_dynamic(int count) {
    extern __shared__ float dynamic[];
    for (int i = (int)threadIdx.x; i <= count; i += N) dynamic[i] = 0;  // HERE past_dynamic
}

// CASE misaligned_global address: misaligned address
__global__ void misaligned_global(float* p) {
    float4* vectors = (float4*)(p + 1);
    vectors[threadIdx.x].w += 1;                        // HERE misaligned_global
}

// CASE misaligned_shared address: misaligned address
__global__ void misaligned_shared(float* out, int shift) {
    __shared__ float s[2 * N + 1];
    float2* pair = (float2*)(s + shift) + threadIdx.x;
    pair->x = 1;                                        // HERE misaligned_shared
    out[threadIdx.x] = s[2 * threadIdx.x + 1];
}

// CASE misaligned_bytes address,check: misaligned address
__global__ void misaligned_bytes(const char* p, int* out) {
    out[threadIdx.x] = *(const int*)(p + threadIdx.x);                  // HERE misaligned_bytes
}

// CASE overflow_product address: signed integer overflow
__global__ void overflow_product(float* out, int stride) {
    int i = (int)threadIdx.x * stride;                  // HERE overflow_product
    if (i == 1) out[0] = 1;
}

// CASE overflow_sum address: signed integer overflow
__global__ void overflow_sum(int* out, int step) {
    int sum = 0;
    for (int i = 0; i < N; i++) sum += step;            // HERE overflow_sum
    out[threadIdx.x] = sum;
}

// CASE overflow_difference address: signed integer overflow
__global__ void overflow_difference(int* out, int step) {
    if (threadIdx.x >= 40) out[threadIdx.x] = -step - (int)threadIdx.x - step;  // HERE overflow_difference
}

// CASE local_past_end address: index 8 out of bounds
__global__ void local_past_end(float* out, int shift) {
    float local[8];
    for (int i = 0; i < 8; i++) local[i] = (float)i;
    out[threadIdx.x] = local[(int)threadIdx.x % 8 + shift];             // HERE local_past_end
}

__device__ float last_of(const float* p, int count) {
    return p[count];                                    // HERE local_in_helper
}

// CASE local_in_helper address: stack-buffer-overflow
__global__ void local_in_helper(float* out, int count) {
    float local[8] = {(float)count};
    out[threadIdx.x] = last_of(local, count);
}

__device__ float sum_of(const float* p, int count) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += p[i];        // HERE local_vector
    return sum;
}

// CASE local_vector address: stack-buffer-overflow
__global__ void local_vector(float* out, int count) {
    float4 v = make_float4(1, 2, 3, 4);
    if (threadIdx.x >= 40) out[threadIdx.x] = sum_of(&v.x, count);
}

static void chain(bool fences) {
    launch_cooperative(look_back, fresh(BLOCKS * N), (volatile int*)zeros(BLOCKS), fences);
}

static const Case cases[] = {
    {"no_barrier", [] { exchange<<<1, N, N * sizeof(float)>>>(zeros(N), false, true); }},
    {"no_barrier_at_end", [] { exchange<<<1, N, N * sizeof(float)>>>(zeros(N), true, false); }},
    {"reuse", [] { exchange<<<1, N, N * sizeof(float)>>>(zeros(N), true, true); }},
    {"reused_buffer", [] { reused_buffer<<<2, N>>>(zeros(N)); }},
    {"same_value", [] { same_value<<<1, N>>>((int*)zeros(N)); }},
    {"half_word", [] { half_word<<<1, N>>>(zeros(N)); }},
    {"third_warp", [] { third_warp<<<1, 96>>>(zeros(N)); }},
    {"global_no_barrier", [] { global_no_barrier<<<1, N>>>(zeros(N)); }},
    {"device_variable", [] { device_variable<<<BLOCKS, N>>>(); }},
    {"neighbour", [] { neighbour<<<BLOCKS, N>>>(zeros(BLOCKS * N)); }},
    {"plain_and_atomic", [] { plain_and_atomic<<<BLOCKS, N>>>(zeros(2)); }},
    {"fresh_shared", [] { fresh_shared<<<1, N>>>(zeros(N)); }},
    {"fresh_global", [] { fresh_global<<<1, N>>>(fresh(N)); }},
    {"fresh_copied", fresh_copied},
    {"fresh_half", [] { fresh_half<<<1, N>>>((__nv_bfloat16*)fresh(N / 2)); }},
    {"fresh_to_host", fresh_to_host},
    {"fresh_reduced", fresh_reduced},
    {"past_array", [] { past_array<<<1, N>>>(zeros(N), 1); }},
    {"before_array", [] { before_array<<<1, N>>>(-1); }},
    {"past_dynamic", [] { past_dynamic<<<1, N, N * sizeof(float)>>>(N); }},
    {"misaligned_global", [] { misaligned_global<<<1, N>>>(zeros(5 * N)); }},
    {"misaligned_shared", [] { misaligned_shared<<<1, N>>>(zeros(N), 1); }},
    {"misaligned_bytes", [] { misaligned_bytes<<<1, N>>>((const char*)zeros(N), (int*)zeros(N)); }},
    {"overflow_product", [] { overflow_product<<<1, N>>>(zeros(N), 1 << 26); }},
    {"overflow_sum", [] { overflow_sum<<<1, N>>>((int*)zeros(N), 1 << 26); }},
    {"overflow_difference", [] { overflow_difference<<<1, N>>>((int*)zeros(N), 1 << 30); }},
    {"local_past_end", [] { local_past_end<<<1, N>>>(zeros(N), 1); }},
    {"local_in_helper", [] { local_in_helper<<<1, N>>>(zeros(N), 8); }},
    {"local_vector", [] { local_vector<<<1, N>>>(zeros(N), 5); }},
    {"specialised", [] { specialised<<<2, N>>>(zeros(N)); }},
    {"specialised_block", [] { specialised_block<<<1, N>>>(zeros(N)); }},
    {"no_syncwarp", [] { warp_sum<<<1, 48>>>(zeros(N), 32, false, true); }},
    {"no_syncwarp_in_loop", [] { warp_sum<<<1, 48>>>(zeros(N), 32, true, false); }},
    {"half_syncwarp", [] { warp_sum<<<1, 48>>>(zeros(N), 16, true, true); }},
    {"warp_sum", [] { warp_sum<<<1, 48>>>(zeros(N), 32, true, true); }},
    {"halves", [] { halves<<<1, N>>>((__nv_bfloat16*)fresh(N)); }},
    {"no_fence", [] { last_block_sum(true, false, false); }},
    {"no_barrier_before_atomic", [] { last_block_sum(false, true, false); }},
    {"last_block", [] { last_block_sum(true, true, false); }},
    {"all_fence", [] { last_block_sum(true, false, true); }},
    {"flag_no_fence", [] { chain(false); }},
    {"look_back", [] { chain(true); }},
    {"ticket", [] { launch_cooperative(ticket, zeros(1), (unsigned*)zeros(2)); }},
    {"grid_sum", [] { launch_cooperative(grid_sum, fresh(BLOCKS * N), fresh(BLOCKS * N)); }},
    {"async_no_barrier", [] { pipeline<<<1, N>>>(zeros(4 * N), zeros(N), false, true); }},
    {"async_reused", [] { pipeline<<<1, N>>>(zeros(4 * N), zeros(N), true, false); }},
    {"pipeline", [] { pipeline<<<1, N>>>(zeros(4 * N), zeros(N), true, true); }},
};

int main(int argc, char** argv) { return RUN_CASE(cases, argc, argv); }
