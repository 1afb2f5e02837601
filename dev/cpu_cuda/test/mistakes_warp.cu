// mistakes_warp.cu: lanes, threads and blocks that do not meet as they must, or whose order decides a result.

#include <cooperative_groups.h>

#include "test.h"

namespace cg = cooperative_groups;

#define ALL 0xffffffffu

static int* zeros(void) {
    int* p;
    OK(cudaMalloc(&p, 4096));
    OK(cudaMemset(p, 0, 4096));
    return p;
}

static void cooperative(void (*kernel)(int*)) {
    int* p = zeros();
    void* arguments[] = {&p};
    OK(cudaLaunchCooperativeKernel(kernel, dim3(4), dim3(64), arguments));
}

// Whether the kernel leaves `result` in the first of its numbers.
static void expect_first(void (*kernel)(int*), int blocks, int threads, int result) {
    int *p = zeros(), first;
    kernel<<<blocks, threads, 64>>>(p);
    OK(cudaMemcpy(&first, p, sizeof first, cudaMemcpyDeviceToHost));
    expect(first == result);
}

// ------------------------------------------------------------------------------------------------
// A shuffle that reads a lane which is not there

// CASE exited_lane plain,check: has exited
__global__ void exited_lane(int* p) {
    if (threadIdx.x >= 16) return;
    p[threadIdx.x] = __shfl_xor_sync(ALL, (int)threadIdx.x, 1);         // HERE exited_lane
}

// CASE tail_of_loop plain: has exited
__device__ int warp_sum(int value) {
    for (int distance = 16; distance; distance /= 2)
        value += __shfl_down_sync(ALL, value, distance);                // HERE tail_of_loop
    return value;
}
__global__ void tail_of_loop(int* p) {
    for (int i = threadIdx.x; i < 200; i += blockDim.x) p[i] = warp_sum(i);
}

// CASE partial_warp plain: names lane 16, which does not exist
__global__ void partial_warp(int* p) {
    p[threadIdx.x] = __any_sync(ALL, p[threadIdx.x]);   // HERE partial_warp
}

// CASE inactive_lane plain,check: lane 8 reads lane 16, which takes no part (mask 0x0000ffff)
__global__ void inactive_lane(int* p) {
    int lane = threadIdx.x;
    if (lane < 16) p[lane] = __shfl_down_sync(0x0000ffff, lane, 8);     // HERE inactive_lane
}

// CASE inactive_leader plain: lane 4 reads lane 0, which takes no part
__global__ void inactive_leader(int* p) {
    unsigned odd_blocks = blockIdx.x % 2 ? 0xfffffff0 : ALL;
    if (threadIdx.x >= 4 || odd_blocks == ALL)
        p[threadIdx.x] = __shfl_sync(odd_blocks, (int)threadIdx.x, 0);  // HERE inactive_leader
}

// CASE width_not_power plain: found width 24, expected a power of two up to 32
__global__ void width_not_power(int* p) {
    p[threadIdx.x] = __shfl_up_sync(ALL, 1, 1, 24 + p[0]);              // HERE width_not_power
}

// ------------------------------------------------------------------------------------------------
// A wrong mask

// CASE mask_without_caller plain,check: the mask 0x0000ffff does not name the calling lane 16
__global__ void mask_without_caller(int* p) {
    p[threadIdx.x] = __ballot_sync(threadIdx.x < 48 ? 0xffffu : ALL, 1);        // HERE mask_without_caller
}

// CASE masks_differ plain,check: mask 0x0001ffff
__global__ void masks_differ(int* p) {
    p[threadIdx.x] = __reduce_add_sync(threadIdx.x < 16 ? 0x1ffff : ALL, 1u);   // HERE masks_differ
}

// CASE mask_by_lane plain: takes no part (mask 0xffffff00)
__global__ void mask_by_lane(int* p) {
    for (int i = threadIdx.x; i < 64; i += 32) {
        unsigned mask = i < 40 ? ALL : ALL << 8;
        p[i] = __shfl_xor_sync(mask, i, 16);            // HERE mask_by_lane
    }
}

// CASE other_operation plain: in __all_sync
__global__ void other_operation(int* p) {
    if (threadIdx.x % 2) p[0] = __any_sync(ALL, 1);     // HERE other_operation
    else p[1] = __all_sync(ALL, 1);                     // HERE other_operation
}

// ------------------------------------------------------------------------------------------------
// Divergent barriers

// CASE barrier_in_branches plain,check: divergent barrier
__global__ void barrier_in_branches(int* p) {
    if (threadIdx.x < 32) __syncthreads();              // HERE barrier_in_branches
    p[threadIdx.x] = 1;
    if (threadIdx.x >= 32) __syncthreads();             // HERE barrier_in_branches
}

// CASE barrier_in_loop plain: divergent barrier
__global__ void barrier_in_loop(int* p) {
    for (int i = threadIdx.x; i < 100; i += 64) __syncthreads();        // HERE barrier_in_loop
    p[threadIdx.x] = 1;
    __syncthreads();                                    // HERE barrier_in_loop
}

// CASE barrier_in_helper plain: divergent barrier
__device__ int block_any(int value) { return __syncthreads_or(value); }         // HERE barrier_in_helper
__global__ void barrier_in_helper(int* p) {
    if (threadIdx.x == 77) cg::this_thread_block().sync();      // HERE barrier_in_helper
    else p[threadIdx.x] = block_any(1);
}

// CASE named_barrier plain: divergent barrier
__global__ void named_barrier(int* p) {
    if (threadIdx.x < 32) asm volatile("bar.sync 2, 96;" ::: "memory");         // HERE named_barrier
    else asm volatile("bar.sync 2, 64;" ::: "memory");                          // HERE named_barrier
    p[threadIdx.x] = 1;
}

// ------------------------------------------------------------------------------------------------
// Deadlocks: who waits where

// CASE warp_against_block plain,check: deadlock
__global__ void warp_against_block(int*) {
    if (threadIdx.x < 40) __syncthreads();              // HERE warp_against_block
    else __syncwarp();                                  // HERE warp_against_block
}

// CASE circle plain: deadlock
__global__ void circle(int*) {
    if (threadIdx.x < 8) __syncwarp(0x0000ffff);        // HERE circle
    if (threadIdx.x / 8 == 1) __syncwarp(0x00ffff00);   // HERE circle
    if (threadIdx.x / 8 == 2) __syncwarp(0x00ff00ff);   // HERE circle
}

// CASE missing_block plain: deadlock
__global__ void missing_block(int*) {
    if (blockIdx.x == 2 && threadIdx.x >= 32) return;
    cg::this_grid().sync();                             // HERE missing_block
}

// CASE grid_not_cooperative plain: grid.sync in a launch that is not cooperative
__global__ void grid_not_cooperative(int*) { cg::this_grid().sync(); }          // HERE grid_not_cooperative

// ------------------------------------------------------------------------------------------------
// A spin that nobody can end

__device__ void wait_for(volatile int* flag) {
    while (!*flag) __nanosleep(100);                    // HERE not_resident lane_of_warp never_set
}

// CASE not_resident plain: a spin without end
__global__ void not_resident(int* flag) {
    if (threadIdx.x == 0 && blockIdx.x + 1 < gridDim.x) wait_for(flag);
    if (threadIdx.x == 0) *flag = 1;
}

// CASE lane_of_warp plain: a spin without end
__global__ void lane_of_warp(int* flag) {
    if (threadIdx.x % 32 == 0) wait_for(flag);
    __syncwarp();                                       // HERE lane_of_warp
    if (threadIdx.x == 1) *flag = 1;
}

// CASE never_set plain: a spin without end
__global__ void never_set(int* flag) {
    if (blockIdx.x == 3) wait_for(flag + 1);
    cg::this_grid().sync();                             // HERE never_set
    flag[1] = 1;
}

// ------------------------------------------------------------------------------------------------
// Atomics and a thread's stack

// CASE misaligned_atomic plain: misaligned atomic operation: 8 bytes
__global__ void misaligned_atomic(int* p) {
    atomicAdd((unsigned long long*)(p + threadIdx.x), 1ull);            // HERE misaligned_atomic
}

// CASE large_array plain,check,address: stack overflow
__global__ void large_array(int* p) {
    int local[100000];
    for (int i = 0; i < 100000; i++) local[i] = p[i % 8];
    p[0] = local[p[5]];
}

// CASE deep_calls plain: stack overflow
template <int Depth>
__device__ __attribute__((noinline)) int deep(int* p) {
    int local[2500];
    for (int i = 0; i < 2500; i++) local[i] = p[i % 8] + Depth;
    if (Depth) p[1] = deep<Depth ? Depth - 1 : 0>(p);
    return local[p[0]];
}
__global__ void deep_calls(int* p) {
    if (blockIdx.x == 2) p[2] = deep<40>(p);
}

// CASE in_the_second_half plain: stack overflow
__global__ void in_the_second_half(int* p) {
    __syncthreads();
    if (threadIdx.x >= 64) p[2] = deep<40>(p);
    __syncthreads();
}

// ------------------------------------------------------------------------------------------------
// Results that depend on an order

// CASE last_thread_wins order: wrong result
__global__ void last_thread_wins(int* p) { p[0] = threadIdx.x; }

// CASE warp_reads_ahead order: wrong result
__global__ void warp_reads_ahead(int* p) {
    __shared__ int sums[4];
    int warp = threadIdx.x / 32, sum = __reduce_add_sync(ALL, (int)threadIdx.x), total = 0;
    if (threadIdx.x % 32 == 0) sums[warp] = sum;
    __syncwarp();
    for (int i = 0; i <= warp; i++) total += sums[i];
    if (threadIdx.x == 127) p[0] = total;
}

// CASE blocks_in_turn order: wrong result
__global__ void blocks_in_turn(int* p) {
    if (threadIdx.x == 0) p[0] = p[0] * 3 + (int)blockIdx.x;
}

// Right in every order that does not run a warp between two operations of another.
// CASE warp_in_between order: wrong result
__global__ void warp_in_between(int* p) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int i = 0; i < 4; i++) {
        int before = count;
        __syncwarp();
        if (threadIdx.x % 32 == 0) count = before + 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(p, count);
}

// A warp that is a round ahead overwrites what another has not read: an order that runs warps ahead shows it.
// CASE warp_a_round_ahead order: wrong result
__global__ void warp_a_round_ahead(int* p) {
    __shared__ int slot[4];
    int warp = threadIdx.x / 32, wrong = 0;
    for (int round = 0; round < 4; round++) {
        if (threadIdx.x % 32 == 0) slot[warp] = round;
        __syncthreads();
        wrong += slot[warp ^ 1] != round;
    }
    if (__reduce_add_sync(ALL, wrong) && threadIdx.x % 32 == 0) p[0] = 1;
}

// Shared memory that nobody wrote is NaN.
// CASE fresh_shared_sum plain: wrong result
__global__ void fresh_shared_sum(int* p) {
    __shared__ float sums[33];
    extern __shared__ float scale[];
    if (threadIdx.x < 32) sums[threadIdx.x] = 1;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < 33; i++) total += sums[i];
    if (threadIdx.x == 0) p[0] = total >= 32 || scale[3] == scale[3];
}

// ------------------------------------------------------------------------------------------------

#define LAUNCH(kernel, blocks, threads) {#kernel, [] { kernel<<<blocks, threads>>>(zeros()); }}
#define COOPERATIVE(kernel) {#kernel, [] { cooperative(kernel); }}
#define EXPECT(kernel, blocks, threads, n) {#kernel, [] { expect_first(kernel, blocks, threads, n); }}

static const Case cases[] = {
    LAUNCH(exited_lane, 1, 32), LAUNCH(tail_of_loop, 1, 64), LAUNCH(partial_warp, 3, 48),
    LAUNCH(inactive_lane, 1, 32), LAUNCH(inactive_leader, 8, 32), LAUNCH(width_not_power, 1, 32),
    LAUNCH(mask_without_caller, 1, 32), LAUNCH(masks_differ, 1, 32), LAUNCH(mask_by_lane, 2, 32),
    LAUNCH(other_operation, 1, 64), LAUNCH(barrier_in_branches, 1, 64), LAUNCH(barrier_in_loop, 1, 64),
    LAUNCH(barrier_in_helper, 2, 128), LAUNCH(named_barrier, 1, 96), LAUNCH(warp_against_block, 1, 64),
    LAUNCH(circle, 1, 32), COOPERATIVE(missing_block), LAUNCH(grid_not_cooperative, 2, 32),
    LAUNCH(not_resident, 3000, 32), LAUNCH(lane_of_warp, 1, 64), COOPERATIVE(never_set),
    LAUNCH(misaligned_atomic, 1, 2), LAUNCH(large_array, 1, 32), LAUNCH(deep_calls, 3, 1),
    LAUNCH(in_the_second_half, 1, 128), EXPECT(last_thread_wins, 1, 32, 31),
    EXPECT(warp_reads_ahead, 1, 128, 127 * 64), EXPECT(blocks_in_turn, 10, 32, 14757),
    EXPECT(warp_in_between, 8, 128, 8 * 16), EXPECT(warp_a_round_ahead, 8, 128, 0),
    EXPECT(fresh_shared_sum, 1, 64, 1),
};

int main(int argc, char** argv) { return RUN_CASE(cases, argc, argv); }
