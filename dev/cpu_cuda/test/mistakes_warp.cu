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

static int first_of(const int* p) {
    int value;
    OK(cudaMemcpy(&value, p, sizeof value, cudaMemcpyDeviceToHost));
    return value;
}

static void cooperative(void (*kernel)(int*)) {
    int* p = zeros();
    void* arguments[] = {&p};
    OK(cudaLaunchCooperativeKernel(kernel, dim3(4), dim3(64), arguments));
}

// ------------------------------------------------------------------------------------------------
// A shuffle that reads a lane which is not there

// CASE exited_lane plain,check: has exited
__global__ void exited_lane_kernel(int* p) {
    if (threadIdx.x >= 16) return;
    p[threadIdx.x] = __shfl_xor_sync(ALL, (int)threadIdx.x, 1);         // HERE exited_lane
}
static void exited_lane(void) { exited_lane_kernel<<<1, 32>>>(zeros()); }

// CASE tail_of_loop plain,check: has exited
__device__ int warp_sum(int value) {
    for (int distance = 16; distance; distance /= 2)
        value += __shfl_down_sync(ALL, value, distance);                // HERE tail_of_loop
    return value;
}
__global__ void tail_of_loop_kernel(int* p, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) p[i] = warp_sum(i);
}
static void tail_of_loop(void) { tail_of_loop_kernel<<<1, 64>>>(zeros(), 200); }

// CASE partial_warp plain: names lane 16, which does not exist
__global__ void partial_warp_kernel(int* p) {
    p[threadIdx.x] = __any_sync(ALL, p[threadIdx.x]);   // HERE partial_warp
}
static void partial_warp(void) { partial_warp_kernel<<<3, 48>>>(zeros()); }

// CASE inactive_lane plain,check: lane 8 reads lane 16, which takes no part (mask 0x0000ffff)
__global__ void inactive_lane_kernel(int* p) {
    int lane = threadIdx.x;
    if (lane < 16) p[lane] = __shfl_down_sync(0x0000ffff, lane, 8);     // HERE inactive_lane
}
static void inactive_lane(void) { inactive_lane_kernel<<<1, 32>>>(zeros()); }

// CASE inactive_leader plain: lane 4 reads lane 0, which takes no part
__global__ void inactive_leader_kernel(int* p) {
    unsigned odd_blocks = blockIdx.x % 2 ? 0xfffffff0 : ALL;
    if (threadIdx.x >= 4 || odd_blocks == ALL)
        p[threadIdx.x] = __shfl_sync(odd_blocks, (int)threadIdx.x, 0);  // HERE inactive_leader
}
static void inactive_leader(void) { inactive_leader_kernel<<<8, 32>>>(zeros()); }

// CASE width_not_power plain: found width 24, expected a power of two up to 32
__global__ void width_kernel(int* p, int width) {
    p[threadIdx.x] = __shfl_up_sync(ALL, 1, 1, width);  // HERE width_not_power
}
static void width_not_power(void) { width_kernel<<<1, 32>>>(zeros(), 24); }

// ------------------------------------------------------------------------------------------------
// A wrong mask

// CASE mask_without_caller plain,check: the mask 0x0000ffff does not name the calling lane 16
__global__ void mask_without_caller_kernel(int* p) {
    p[threadIdx.x] = __ballot_sync(threadIdx.x < 48 ? 0xffffu : ALL, 1);        // HERE mask_without_caller
}
static void mask_without_caller(void) { mask_without_caller_kernel<<<1, 32>>>(zeros()); }

// CASE masks_differ plain,check: names 0x
__global__ void masks_differ_kernel(int* p) {
    int lane = threadIdx.x % 32;
    if (lane < 16) {
        p[lane] = __reduce_add_sync(0x1ffff, lane);     // HERE masks_differ
    } else {
        p[lane] = __reduce_add_sync(ALL, lane);         // HERE masks_differ
    }
}
static void masks_differ(void) { masks_differ_kernel<<<1, 32>>>(zeros()); }

// CASE mask_by_lane plain: takes no part (mask 0xffffff00)
__global__ void mask_by_lane_kernel(int* p, int count) {
    for (int i = threadIdx.x; i < count; i += 32) {
        unsigned mask = i < 40 ? ALL : ALL << 8;
        p[i] = __shfl_xor_sync(mask, i, 16);            // HERE mask_by_lane
    }
}
static void mask_by_lane(void) { mask_by_lane_kernel<<<2, 32>>>(zeros(), 64); }

// CASE other_operation plain: which waits at
__global__ void other_operation_kernel(int* p) {
    if (threadIdx.x % 2) {
        p[0] = __any_sync(ALL, 1);                      // HERE other_operation
    } else {
        p[1] = __all_sync(ALL, 1);                      // HERE other_operation
    }
}
static void other_operation(void) { other_operation_kernel<<<1, 64>>>(zeros()); }

// ------------------------------------------------------------------------------------------------
// Divergent barriers

// CASE barrier_in_branches plain,check: divergent barrier
__global__ void barrier_in_branches_kernel(int* p) {
    if (threadIdx.x < 32) {
        p[threadIdx.x] = 1;
        __syncthreads();                                // HERE barrier_in_branches
    } else {
        __syncthreads();                                // HERE barrier_in_branches
        p[threadIdx.x] = 1;
    }
}
static void barrier_in_branches(void) { barrier_in_branches_kernel<<<1, 64>>>(zeros()); }

// CASE barrier_in_loop plain: divergent barrier
__global__ void barrier_in_loop_kernel(int* p, int count) {
    for (int i = threadIdx.x; i < count; i += 64) __syncthreads();      // HERE barrier_in_loop
    p[threadIdx.x] = 1;
    __syncthreads();                                    // HERE barrier_in_loop
}
static void barrier_in_loop(void) { barrier_in_loop_kernel<<<1, 64>>>(zeros(), 100); }

// CASE barrier_in_helper plain: divergent barrier
__device__ int block_any(int value) { return __syncthreads_or(value); }         // HERE barrier_in_helper
__global__ void barrier_in_helper_kernel(int* p) {
    if (threadIdx.x == 77) {
        cg::this_thread_block().sync();                 // HERE barrier_in_helper
    } else {
        p[threadIdx.x] = block_any(1);
    }
}
static void barrier_in_helper(void) { barrier_in_helper_kernel<<<2, 128>>>(zeros()); }

// ------------------------------------------------------------------------------------------------
// Deadlocks: who waits where

// CASE warp_against_block plain,check: deadlock
__global__ void warp_against_block_kernel(int*) {
    if (threadIdx.x < 40) {
        __syncthreads();                                // HERE warp_against_block
    } else {
        __syncwarp();                                   // HERE warp_against_block
    }
}
static void warp_against_block(void) { warp_against_block_kernel<<<1, 64>>>(zeros()); }

// CASE circle plain: deadlock
__global__ void circle_kernel(int*) {
    if (threadIdx.x < 8) __syncwarp(0x0000ffff);        // HERE circle
    if (threadIdx.x / 8 == 1) __syncwarp(0x00ffff00);   // HERE circle
    if (threadIdx.x / 8 == 2) __syncwarp(0x00ff00ff);   // HERE circle
}
static void circle(void) { circle_kernel<<<1, 32>>>(zeros()); }

// CASE missing_block plain: deadlock
__global__ void missing_block_kernel(int*) {
    if (blockIdx.x == 2 && threadIdx.x >= 32) return;
    cg::this_grid().sync();                             // HERE missing_block
}
static void missing_block(void) { cooperative(missing_block_kernel); }

// CASE grid_not_cooperative plain: grid.sync in a launch that is not cooperative
__global__ void grid_kernel(int*) { cg::this_grid().sync(); }       // HERE grid_not_cooperative
static void grid_not_cooperative(void) { grid_kernel<<<2, 32>>>(zeros()); }

// ------------------------------------------------------------------------------------------------
// A spin that nobody can end

__device__ void wait_for(volatile int* flag) {
    while (!*flag) __nanosleep(100);                    // HERE not_resident lane_of_warp never_set
}

// CASE not_resident plain: a spin without end
__global__ void not_resident_kernel(int* flag) {
    if (threadIdx.x == 0 && blockIdx.x + 1 < gridDim.x) wait_for(flag);
    if (threadIdx.x == 0) *flag = 1;
}
static void not_resident(void) { not_resident_kernel<<<3000, 32>>>(zeros()); }

// CASE lane_of_warp plain: a spin without end
__global__ void lane_of_warp_kernel(int* flag) {
    if (threadIdx.x % 32 == 0) wait_for(flag);
    __syncwarp();                                       // HERE lane_of_warp
    if (threadIdx.x == 1) *flag = 1;
}
static void lane_of_warp(void) { lane_of_warp_kernel<<<1, 64>>>(zeros()); }

// CASE never_set plain: a spin without end
__global__ void never_set_kernel(int* flag) {
    if (blockIdx.x == 3) wait_for(flag + 1);
    cg::this_grid().sync();                             // HERE never_set
    flag[1] = 1;
}
static void never_set(void) { cooperative(never_set_kernel); }

// ------------------------------------------------------------------------------------------------
// Atomics and a thread's stack

// CASE misaligned_atomic plain: misaligned atomic operation: 8 bytes
__global__ void misaligned_atomic_kernel(int* p) {
    atomicAdd((unsigned long long*)(p + threadIdx.x), 1ull);            // HERE misaligned_atomic
}
static void misaligned_atomic(void) { misaligned_atomic_kernel<<<1, 2>>>(zeros()); }

// CASE large_array plain,check: stack overflow
// CASE large_array address: stack-overflow
__global__ void large_array_kernel(int* p, int at) {
    int local[100000];
    for (int i = 0; i < 100000; i++) local[i] = p[i % 8];
    p[0] = local[at];
}
static void large_array(void) { large_array_kernel<<<1, 32>>>(zeros(), 5); }       // HERE large_array

// CASE deep_calls plain: stack overflow
template <int Depth>
__device__ __attribute__((noinline)) int deep(int* p) {
    int local[2500];
    for (int i = 0; i < 2500; i++) local[i] = p[i % 8] + Depth;
    if (Depth) p[1] = deep<Depth ? Depth - 1 : 0>(p);
    return local[p[0]];
}
__global__ void deep_calls_kernel(int* p) {
    if (blockIdx.x == 2) p[2] = deep<40>(p);
}
static void deep_calls(void) { deep_calls_kernel<<<3, 1>>>(zeros()); }

// CASE in_the_second_half plain: stack overflow
__global__ void in_the_second_half_kernel(int* p) {
    __syncthreads();
    if (threadIdx.x >= 64) p[2] = deep<40>(p);
    __syncthreads();
}
static void in_the_second_half(void) { in_the_second_half_kernel<<<1, 128>>>(zeros()); }

// ------------------------------------------------------------------------------------------------
// Results that depend on an order. Forward they are right.

// CASE last_thread_wins order: wrong result
__global__ void last_thread_wins_kernel(int* p) { p[0] = threadIdx.x; }
static void last_thread_wins(void) {
    int* p = zeros();
    last_thread_wins_kernel<<<1, 32>>>(p);
    expect(first_of(p) == 31);
}

// CASE warp_reads_ahead order: wrong result
__global__ void warp_reads_ahead_kernel(int* p) {
    __shared__ int sums[4];
    int warp = threadIdx.x / 32, sum = __reduce_add_sync(ALL, (int)threadIdx.x), total = 0;
    if (threadIdx.x % 32 == 0) sums[warp] = sum;
    __syncwarp();
    for (int i = 0; i <= warp; i++) total += sums[i];
    if (threadIdx.x == 127) p[0] = total;
}
static void warp_reads_ahead(void) {
    int* p = zeros();
    warp_reads_ahead_kernel<<<1, 128>>>(p);
    expect(first_of(p) == 127 * 64);
}

// CASE blocks_in_turn order: wrong result
__global__ void blocks_in_turn_kernel(int* p) {
    if (threadIdx.x == 0) p[0] = p[0] * 3 + (int)blockIdx.x;
}
static void blocks_in_turn(void) {
    int *p = zeros(), expected = 0;
    for (int i = 0; i < 10; i++) expected = expected * 3 + i;
    blocks_in_turn_kernel<<<10, 32>>>(p);
    expect(first_of(p) == expected);
}

// Right in every order that does not run a warp between two operations of another.
// CASE warp_in_between order: wrong result
__global__ void warp_in_between_kernel(int* p) {
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
static void warp_in_between(void) {
    int* p = zeros();
    warp_in_between_kernel<<<8, 128>>>(p);
    expect(first_of(p) == 8 * 16);
}

// A warp that is a round ahead overwrites what another has not read: an order that runs warps ahead shows it.
// CASE warp_a_round_ahead order: wrong result
__global__ void warp_a_round_ahead_kernel(int* p) {
    __shared__ int slot[4];
    int warp = threadIdx.x / 32, wrong = 0;
    for (int round = 0; round < 4; round++) {
        if (threadIdx.x % 32 == 0) slot[warp] = round;
        __syncthreads();
        wrong += slot[warp ^ 1] != round;
    }
    if (__reduce_add_sync(ALL, wrong) && threadIdx.x % 32 == 0) p[0] = 1;
}
static void warp_a_round_ahead(void) {
    int* p = zeros();
    warp_a_round_ahead_kernel<<<8, 128>>>(p);
    expect(first_of(p) == 0);
}

// Shared memory that nobody wrote is NaN.
// CASE fresh_shared_sum plain: wrong result
__global__ void fresh_shared_sum_kernel(int* p) {
    __shared__ float sums[33];
    extern __shared__ float scale[];
    if (threadIdx.x < 32) sums[threadIdx.x] = 1;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < 33; i++) total += sums[i];
    if (threadIdx.x == 0) p[0] = total >= 32 || scale[3] == scale[3];
}
static void fresh_shared_sum(void) {
    int* p = zeros();
    fresh_shared_sum_kernel<<<1, 64, 64>>>(p);
    expect(first_of(p) == 1);
}

#define NAMED(name) {#name, name}
static const Case cases[] = {
    NAMED(exited_lane), NAMED(tail_of_loop), NAMED(partial_warp), NAMED(inactive_lane),
    NAMED(inactive_leader), NAMED(width_not_power), NAMED(mask_without_caller), NAMED(masks_differ),
    NAMED(mask_by_lane),
    NAMED(other_operation), NAMED(barrier_in_branches), NAMED(barrier_in_loop), NAMED(barrier_in_helper),
    NAMED(warp_against_block), NAMED(circle), NAMED(missing_block), NAMED(grid_not_cooperative),
    NAMED(not_resident), NAMED(lane_of_warp), NAMED(never_set), NAMED(misaligned_atomic), NAMED(large_array),
    NAMED(deep_calls), NAMED(in_the_second_half), NAMED(last_thread_wins), NAMED(warp_reads_ahead),
    NAMED(blocks_in_turn), NAMED(warp_in_between), NAMED(warp_a_round_ahead), NAMED(fresh_shared_sum),
};

int main(int argc, char** argv) { return RUN_CASE(cases, argc, argv); }
