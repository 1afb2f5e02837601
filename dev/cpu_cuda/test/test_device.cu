// test_device.cu: what threads of a block and a grid do together, and what CUDA adds to the language.

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include "test.h"

namespace cg = cooperative_groups;

struct Results {
    int wrong_line;             // the first that was not as expected
    int finished;               // threads that came to the end of their kernel
    int numbers[62];
};

__device__ static void expect_at(Results* r, bool holds, int line) {
    if (!holds) atomicCAS(&r->wrong_line, 0, line);
}
#define EXPECT(condition) expect_at(r, condition, __LINE__)
#define FINISHED() atomicAdd(&r->finished, 1)

static Results* results;        // on the device

static Results clear(void) {
    OK(cudaMemset(results, 0, sizeof(Results)));
    return Results();
}

// Whether a launch of `threads` threads went to its end, every EXPECT holding. Numbers go to `out`.
static bool as_expected(int threads, Results* out = NULL) {
    Results r;
    OK(cudaGetLastError());
    OK(cudaMemcpy(&r, results, sizeof r, cudaMemcpyDeviceToHost));
    if (r.wrong_line) printf("not as expected: line %d\n", r.wrong_line);
    if (r.finished != threads) printf("%d of %d threads finished\n", r.finished, threads);
    if (out) *out = r;
    clear();
    return !r.wrong_line && r.finished == threads;
}

// ------------------------------------------------------------------------------------------------
// Warps

#define ALL 0xffffffffu

__global__ void shuffles(Results* r) {
    int lane = threadIdx.x % 32, value = 100 + lane;
    EXPECT(__shfl_sync(ALL, value, 35) == 103);                         // modulo the width
    EXPECT(__shfl_sync(ALL, value, 31 - lane) == 131 - lane);
    EXPECT(__shfl_sync(ALL, value, 11, 8) == 100 + lane / 8 * 8 + 3);
    EXPECT(__shfl_up_sync(ALL, value, 2) == (lane < 2 ? value : value - 2));
    EXPECT(__shfl_up_sync(ALL, value, 3, 16) == (lane % 16 < 3 ? value : value - 3));
    EXPECT(__shfl_down_sync(ALL, value, 2) == (lane > 29 ? value : value + 2));
    EXPECT(__shfl_down_sync(ALL, value, 1, 4) == (lane % 4 == 3 ? value : value + 1));
    EXPECT(__shfl_xor_sync(ALL, value, 9) == 100 + (lane ^ 9));
    EXPECT(__shfl_xor_sync(ALL, value, 4, 4) == (lane & 4 ? value - 4 : value));    // crosses downwards only
    EXPECT(__shfl_xor_sync(ALL, lane + 0.25, 1) == (lane ^ 1) + 0.25);
    EXPECT(__shfl_xor_sync(ALL, lane + 0.5f, 16) == (lane ^ 16) + 0.5f);
    EXPECT(__shfl_down_sync(ALL, 1ull << 40 | lane, 1, 2) == (1ull << 40 | (lane | 1)));
    EXPECT(__shfl_sync(lane < 16 ? 0xffffu : 0xffff0000u, value, lane & 16) == 100 + (lane & 16));
    FINISHED();
}

// Parts of a warp go their own way and meet again.
__global__ void parts(Results* r) {
    int lane = threadIdx.x % 32, sum = 0, part = lane / 8;
    unsigned mask = 0xffu << part * 8;
    for (int i = 0; i <= part; i++) sum += __shfl_xor_sync(mask, lane, 1 << i % 3);
    int expected = 0;
    for (int i = 0; i <= part; i++) expected += lane ^ 1 << i % 3;
    EXPECT(sum == expected);
    if (lane % 2) {
        EXPECT(__ballot_sync(0xaaaaaaaa, lane > 15) == 0xaaaa0000);
        if (lane == 5) return FINISHED(), (void)0;
        __syncwarp(0xaaaaaaaa & ~(1u << 5));
    }
    EXPECT(__reduce_add_sync(ALL & ~(1u << 5), 1) == 31);
    FINISHED();
}

__global__ void votes(Results* r) {
    int lane = threadIdx.x % 32;
    EXPECT(__ballot_sync(ALL, lane < 5) == 31);
    EXPECT(__any_sync(ALL, lane == 7) && !__any_sync(ALL, lane == 32));
    EXPECT(__all_sync(ALL, 1 << lane) && !__all_sync(ALL, lane));
    EXPECT(__reduce_add_sync(ALL, lane - 16) == -16);
    EXPECT(__reduce_min_sync(ALL, lane - 3) == -3 && __reduce_max_sync(ALL, lane - 40) == -9);
    EXPECT(__reduce_min_sync(ALL, lane - 1u) == 0 && __reduce_max_sync(ALL, lane - 1u) == ALL);
    EXPECT(__reduce_and_sync(ALL, lane | 64u) == 64 && __reduce_or_sync(ALL, lane) == 31);
    EXPECT(__reduce_xor_sync(ALL, 1u << lane) == ALL);
    EXPECT(__syncthreads_count(threadIdx.x < 10) == 10);
    EXPECT(__syncthreads_and(threadIdx.x < 96) && !__syncthreads_and(threadIdx.x != 70));
    EXPECT(__syncthreads_or(threadIdx.x == 95) && !__syncthreads_or(threadIdx.x == 96));
    FINISHED();
}

__global__ void tiles(Results* r) {
    cg::thread_block block = cg::this_thread_block();
    auto warp = cg::tiled_partition<32>(block);
    auto four = cg::tiled_partition<4>(warp);
    auto eight = cg::tiled_partition<8>(block);
    int rank = block.thread_rank();
    EXPECT(block.size() == 96 && rank == int(threadIdx.x + 8 * threadIdx.y) && four.size() == 4);
    EXPECT(warp.meta_group_size() == 3 && four.meta_group_size() == 8 && eight.meta_group_size() == 12);
    EXPECT((int)four.meta_group_rank() == rank % 32 / 4 && (int)eight.meta_group_rank() == rank / 8);
    EXPECT((int)four.thread_rank() == rank % 4);
    EXPECT(cg::reduce(four, rank, cg::plus<int>()) == 4 * (rank / 4 * 4) + 6);
    EXPECT(cg::reduce(eight, (float)rank, cg::greater<float>()) == rank / 8 * 8 + 7);
    EXPECT(four.shfl(rank, 2) == rank / 4 * 4 + 2 && four.shfl_xor(rank, 3) == (rank ^ 3));
    EXPECT(eight.shfl_down(rank, 1) == (rank % 8 == 7 ? rank : rank + 1));
    EXPECT(eight.shfl_up(rank, 1) == (rank % 8 ? rank - 1 : rank) && eight.ballot(rank % 8 == 2) == 4);
    EXPECT(four.any(rank % 4 == 1) && !four.all(rank % 4 == 1));
    float value = 1.f / (rank + 3), sum = value;
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    EXPECT(cg::reduce(warp, value, cg::plus<float>()) == sum);          // the same order, so the same bits
    eight.sync();
    block.sync();
    FINISHED();
}

// ------------------------------------------------------------------------------------------------
// Blocks and grids

// A barrier of those that are left: threads that have exited count as arrived.
__global__ void early_exit(Results* r) {
    __shared__ int sum;
    FINISHED();
    if (threadIdx.x >= 70) return;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    if (threadIdx.x < 40) atomicAdd(&sum, 1);
    if (threadIdx.x >= 64) return;
    __syncthreads();
    EXPECT(sum == 40);
}

__device__ int* counter(int start) {                // one for the block, whoever calls
    __shared__ int value;
    if (threadIdx.x == 0) value = start;
    __syncthreads();
    return &value;
}

template <int N>
__global__ void shared(Results* r) {
    __shared__ alignas(128) float array[N][3];
    __shared__ double one;
    extern __shared__ float4 dynamic[];
    int i = threadIdx.x;
    for (int round = 0; round < 3; round++) {
        array[i][round] = i * (round + 1);
        if (i == 0) one = round;
        dynamic[i] = make_float4(i, round, 0, 1);
        __syncthreads();
        EXPECT(array[N - 1 - i][round] == (N - 1 - i) * (round + 1) && one == round);
        EXPECT(dynamic[(i + 1) % N].x == (i + 1) % N && dynamic[(i + 1) % N].y == round);
        __syncthreads();
    }
    EXPECT((size_t)array % 128 == 0 && (size_t)dynamic % 16 == 0);
    int* value = counter(N);
    atomicAdd(value, 1);
    __syncthreads();
    EXPECT(*value == 2 * N);
    FINISHED();
}

__global__ void grid_sync(Results* r, int rounds) {
    cg::grid_group grid = cg::this_grid();
    EXPECT(grid.size() == 256 && grid.num_blocks() == 4 && grid.block_rank() == blockIdx.x);
    EXPECT(grid.thread_rank() == blockIdx.x * 64 + threadIdx.x);
    for (int i = 0; i < rounds; i++) {
        if ((int)threadIdx.x == i) atomicAdd(&r->numbers[0], 1);
        grid.sync();
        EXPECT(((volatile int*)r->numbers)[0] == 4 * (i + 1));
        grid.sync();
    }
    FINISHED();
}

// One thread spins until another, of its own warp and of another block, has come.
__global__ void spin(Results* r) {
    volatile int* flags = r->numbers;
    if (threadIdx.x == 0)
        while (flags[1 - blockIdx.x] != 2) __nanosleep(20);
    if (threadIdx.x == 1)
        while (flags[blockIdx.x] != 1) __nanosleep(20);
    if (threadIdx.x == 33) flags[blockIdx.x] = 1;
    if (threadIdx.x == 1) flags[blockIdx.x] = 2;
    FINISHED();
}

__global__ void dims(Results* r) {
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    EXPECT(blockDim.x == 4 && blockDim.y == 2 && blockDim.z == 3);
    EXPECT(gridDim.x == 2 && gridDim.y == 3 && gridDim.z == 5);
    EXPECT(threadIdx.x < 4 && threadIdx.y < 2 && threadIdx.z < 3 && warpSize == 32);
    atomicAdd(&r->numbers[block], 1 << thread);
    FINISHED();
}

__global__ void atomics(Results* r) {
    unsigned* u = (unsigned*)r->numbers;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&r->numbers[0], -1);
    atomicSub(&u[1], 1u);
    atomicMin(&r->numbers[2], -i);
    atomicMax(&u[3], (unsigned)i);
    atomicInc(&u[4], 9u);
    atomicOr(&u[5], 1u << i % 32);
    atomicXor(&u[6], 1u << i % 8);
    atomicAnd(&u[7], ~(1u << i % 16));
    atomicAdd((float*)&u[8], 0.5f);
    atomicAdd((double*)&u[10], 0.25);
    atomicAdd((unsigned long long*)&u[12], 1ull << 31);
    if (atomicCAS(&u[14], 0u, 7u) == 0) atomicAdd(&u[15], 1u);          // one thread only
    if (atomicExch(&u[16], 1u) == 0) atomicAdd(&u[17], 1u);
    __threadfence();
    FINISHED();
}

// ------------------------------------------------------------------------------------------------
// Arguments of kernels, and functions

template <class T>
struct Scale {
    T factor;
    __device__ T operator()(T x) const { return factor * x; }
};

template <class T, class F>
__global__ void apply(Results* r, T* values, F f, const T* nothing) {
    EXPECT(nothing == NULL);
    values[threadIdx.x] = f(values[threadIdx.x]);
    FINISHED();
}

__global__ void functions(Results* r) {
    float nan = __int_as_float(0x7fc00000), four = 4;
    EXPECT(max(-1, 1u) == ALL && min(3, -2) == -2 && min(nan, 2.f) == 2 && max(2.f, nan) == 2);
    EXPECT(__popc(0xf0f0) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0);
    EXPECT(__float_as_int(1.f) == 0x3f800000 && __uint_as_float(0x40000000) == 2);
    EXPECT(fabsf(rsqrtf(four) - 0.5f) < 1e-6f && fabsf(__expf(four) / expf(four) - 1) < 1e-5f);
    float2* pair = (float2*)r->numbers;
    __stcs(&pair[threadIdx.x], make_float2(threadIdx.x, 1));
    EXPECT(__ldcs((float*)&pair[threadIdx.x]) == threadIdx.x);
    EXPECT(sizeof(float3) == 12 && alignof(float4) == 16 && alignof(uint2) == 8 && alignof(char4) == 4);
    FINISHED();
}

static int calls;
static int next_call(void) { return ++calls; }

__global__ void evaluated(Results* r, int first, long second, float third, bool fourth) {
    EXPECT(first == 1 && second == 2 && third == 2.5f && fourth);
    FINISHED();
}

static void test_arguments(void) {
    int *values, h[32] = {1};
    OK(cudaMalloc(&values, sizeof h));
    OK(cudaMemcpy(values, h, sizeof h, cudaMemcpyHostToDevice));
    apply<<<1, 32>>>(results, values, Scale<int>{7}, (const int*)NULL);
    CHECK(as_expected(32));
    apply<int, Scale<int>><<<dim3(1), dim3(32, 1), 0, 0>>>(results, values, Scale<int>{3}, nullptr);
    CHECK(as_expected(32));
    const int* none = NULL;
    for (int i = 1; i < 3; i++) apply<<<(1 > 0 ? 1 : 2), 1>>>(results, values, Scale<int>{1 << i}, none);
    CHECK(as_expected(2));
    void (*pointer)(Results*, int*, Scale<int>, const int*) = apply<int, Scale<int>>;
    pointer<<<1, 32>>>(results, values, Scale<int>{-1}, NULL);
    CHECK(as_expected(32));
    OK(cudaMemcpy(h, values, sizeof h, cudaMemcpyDeviceToHost));
    CHECK(h[0] == -7 * 3 * 2 * 4 && h[1] == 0);
    evaluated<<<1, 64>>>(results, next_call(), 2, 2.5, 4);
    CHECK(as_expected(64) && calls == 1);
    OK(cudaFree(values));
}

static void test_atomics(void) {
    Results r;
    OK(cudaMemset(&results->numbers[7], 0xff, 4));
    atomics<<<8, 64>>>(results);
    CHECK(as_expected(512, &r));
    const int* n = r.numbers;
    CHECK(n[0] == -512 && n[1] == -512 && n[2] == -511 && n[3] == 511 && n[4] == 512 % 10);
    CHECK(n[5] == -1 && n[6] == 0 && n[7] == (int)0xffff0000);
    float f;
    double d;
    long long sum;
    memcpy(&f, &n[8], sizeof f);
    memcpy(&d, &n[10], sizeof d);
    memcpy(&sum, &n[12], sizeof sum);
    CHECK(f == 256 && d == 128 && sum == 512ll << 31);
    CHECK(n[14] == 7 && n[15] == 1 && n[16] == 1 && n[17] == 1);
}

static void test_grid(void) {
    Results r;
    int rounds = 5;
    void* arguments[] = {&results, &rounds};
    OK(cudaLaunchCooperativeKernel(grid_sync, dim3(4), dim3(64), arguments));
    CHECK(as_expected(256));
    void* only[] = {&results};
    OK(cudaLaunchCooperativeKernel(spin, dim3(2), dim3(64), only));
    CHECK(as_expected(128));
    dims<<<dim3(2, 3, 5), dim3(4, 2, 3)>>>(results);
    CHECK(as_expected(30 * 24, &r));
    for (int i = 0; i < 30; i++) CHECK(r.numbers[i] == (1 << 24) - 1);
}

int main(void) {
    OK(cudaMalloc(&results, sizeof *results));
    clear();
    shuffles<<<3, 96>>>(results);
    CHECK(as_expected(288));
    parts<<<20, 128>>>(results);
    CHECK(as_expected(20 * 128));
    votes<<<2, 96>>>(results);
    CHECK(as_expected(192));
    tiles<<<2, dim3(8, 12)>>>(results);
    CHECK(as_expected(192));
    early_exit<<<9, 128>>>(results);
    CHECK(as_expected(9 * 128));
    shared<64><<<40, 64, 64 * sizeof(float4)>>>(results);
    CHECK(as_expected(40 * 64));
    shared<33><<<40, 33, 33 * sizeof(float4)>>>(results);
    CHECK(as_expected(40 * 33));
    functions<<<1, 16>>>(results);
    CHECK(as_expected(16));
    test_grid();
    test_atomics();
    test_arguments();
    return finish();
}
