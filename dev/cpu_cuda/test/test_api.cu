// test_api.cu: the host interface: memory, copies, streams, events, devices, launch limits and error codes.

#include <thread>

#include "test.h"

enum { COUNT = 1000, BYTES = COUNT * (int)sizeof(float) };

__global__ void add(float* y, const float* x, float amount, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) y[i] = x[i] + amount;
}

__global__ void count_block(unsigned* count) {
    extern __shared__ unsigned bytes[];
    if (threadIdx.x == 0) bytes[0] = 1;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(count, bytes[0]);
}

template <int N>
__global__ void add_constant(unsigned* count) {
    if (threadIdx.x == 0) atomicAdd(count, N);
}

static bool all_equal(const float* values, float expected) {
    for (int i = 0; i < COUNT; i++)
        if (!(values[i] == expected)) return false;
    return true;
}

static void add_to(float* y, const float* x, float amount, cudaStream_t stream) {
    add<<<(COUNT + 255) / 256, 256, 0, stream>>>(y, x, amount, COUNT);
}

// ------------------------------------------------------------------------------------------------

static void test_errors(void) {
    float* p = NULL;
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);      // the error stays, but nothing is broken
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument") == 0);
    CHECK(strcmp(cudaGetErrorString((cudaError_t)998), "unrecognized error code") == 0);
}

static void test_allocation(void) {
    size_t before, after, total;
    float *p, *pinned;
    OK(cudaMemGetInfo(&before, &total));
    OK(cudaMalloc(&p, (size_t)64 << 20));
    OK(cudaMemGetInfo(&after, &total));
    CHECK(after <= before - ((size_t)64 << 20) && before <= total);
    CHECK((size_t)p % 256 == 0);
    OK(cudaMallocHost(&pinned, BYTES));
    pinned[COUNT - 1] = 1;
    CHECK(cudaFree(p + 64) == cudaErrorInvalidValue);
    CHECK(cudaFreeHost(p) == cudaErrorInvalidValue);
    CHECK(cudaFree(pinned) == cudaErrorInvalidValue);
    CHECK(cudaFree(NULL) == cudaSuccess && cudaFreeHost(NULL) == cudaSuccess);
    OK(cudaFree(p));
    OK(cudaFreeHost(pinned));
    CHECK(cudaFree(p) == cudaErrorInvalidValue);
    CHECK(cudaFreeHost(pinned) == cudaErrorInvalidValue);
    cudaGetLastError();
}

static void test_copies(float* x, float* y, float* host, float* pinned) {
    for (int i = 0; i < COUNT; i++) host[i] = (float)i;
    OK(cudaMemcpy(x, host, BYTES, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(y, x, BYTES, cudaMemcpyDeviceToDevice));
    OK(cudaMemcpy(pinned, y, BYTES, cudaMemcpyDeviceToHost));
    CHECK(memcmp(pinned, host, BYTES) == 0);
    OK(cudaMemset(x, 0, BYTES));
    OK(cudaMemset(x + 1, 0x3f, 4));
    OK(cudaMemcpy(host, x, BYTES, cudaMemcpyDeviceToHost));
    unsigned bits;
    memcpy(&bits, host + 1, sizeof bits);
    CHECK(host[0] == 0 && bits == 0x3f3f3f3f && host[2] == 0);
}

static void test_copy_errors(float* x, float* host) {
    size_t large = (size_t)1 << 40;
    CHECK(cudaMemcpy(x, host, 0, cudaMemcpyHostToDevice) == cudaSuccess);
    CHECK(cudaMemcpy(x, host, large, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, x, large, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(NULL, host, BYTES, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, x, BYTES, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(x, host, BYTES, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(x, host, BYTES, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(x, host, BYTES, (cudaMemcpyKind)7) == cudaErrorInvalidMemcpyDirection);
    CHECK(cudaMemset(host, 0, BYTES) == cudaErrorInvalidValue);
    CHECK(cudaMemset(x, 0, large) == cudaErrorInvalidValue);
    cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------

// A correct pipeline: copy in on one stream, two kernels on another, copy out on the first.
static void test_streams(float* x, float* y, float* pinned) {
    cudaStream_t copies, work;
    cudaEvent_t arrived, ready;
    int least, greatest;
    OK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(greatest <= least);
    OK(cudaStreamCreateWithPriority(&work, cudaStreamNonBlocking, greatest - 100));
    OK(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
    OK(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming));
    OK(cudaEventCreate(&ready));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < COUNT; i++) pinned[i] = (float)round;
        OK(cudaMemcpyAsync(x, pinned, BYTES, cudaMemcpyHostToDevice, copies));
        OK(cudaEventRecord(arrived, copies));
        OK(cudaStreamWaitEvent(work, arrived));
        add_to(y, x, 1, work);
        add_to(x, y, 1, work);
        OK(cudaEventRecord(ready, work));
        OK(cudaStreamWaitEvent(copies, ready, 0));
        OK(cudaMemcpyAsync(pinned, x, BYTES, cudaMemcpyDeviceToHost, copies));
        OK(cudaStreamSynchronize(copies));
        CHECK(all_equal(pinned, (float)round + 2));
    }
    OK(cudaStreamDestroy(work));
    OK(cudaStreamDestroy(copies));
    OK(cudaEventDestroy(arrived));
    OK(cudaEventDestroy(ready));
    CHECK(cudaStreamCreateWithFlags(&work, 77) == cudaErrorInvalidValue);
    cudaGetLastError();
}

// Any host thread may call, and each has its own last error.
static void test_threads(void) {
    bool right[2] = {false, false};
    auto work = [&](int number) {
        float *x, host[COUNT];
        bool done = cudaMalloc(&x, BYTES) == cudaSuccess && cudaMemset(x, 0, BYTES) == cudaSuccess;
        for (int round = 0; round < 50; round++) add_to(x, x, (float)number, 0);
        done = done && cudaMemcpy(host, x, BYTES, cudaMemcpyDeviceToHost) == cudaSuccess;
        right[number] = done && all_equal(host, 50 * (float)number) && cudaFree(x) == cudaSuccess;
        if (number == 1) cudaFree(host);
    };
    std::thread first(work, 0), second(work, 1);
    first.join();
    second.join();
    CHECK(right[0] && right[1] && cudaGetLastError() == cudaSuccess);
}

// The default stream waits for a blocking stream, and that for it; pageable memory may be changed at once.
static void test_implicit_order(float* x, float* y, float* host) {
    cudaStream_t blocking;
    OK(cudaStreamCreate(&blocking));
    for (int i = 0; i < COUNT; i++) host[i] = 1;
    OK(cudaMemcpyAsync(x, host, BYTES, cudaMemcpyHostToDevice, blocking));
    for (int i = 0; i < COUNT; i++) host[i] = 100;
    add_to(y, x, 1, blocking);
    add_to(x, y, 1, 0);
    add_to(y, x, 1, blocking);
    OK(cudaMemcpyAsync(host, y, BYTES, cudaMemcpyDeviceToHost, blocking));
    CHECK(all_equal(host, 4));                          // pageable: it has arrived
    add_to(x, y, 1, blocking);
    OK(cudaStreamDestroy(blocking));                    // its work still runs
    OK(cudaDeviceSynchronize());
    OK(cudaMemcpy(host, x, BYTES, cudaMemcpyDeviceToHost));
    CHECK(all_equal(host, 5));
}

static void test_events(float* x, float* y) {
    cudaEvent_t event;
    OK(cudaEventCreate(&event));
    CHECK(cudaEventSynchronize(event) == cudaSuccess);         // never recorded: nothing to wait for
    add_to(y, x, 1, 0);
    OK(cudaEventRecord(event));
    while (cudaEventQuery(event) == cudaErrorNotReady) cudaGetLastError();      // which shows it too
    CHECK(cudaEventQuery(event) == cudaSuccess && cudaGetLastError() == cudaSuccess);
    OK(cudaEventSynchronize(event));
    cudaEvent_t later, untimed;
    float ms = -1;
    OK(cudaEventCreate(&later));
    OK(cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming));
    add_to(y, x, 1, 0);
    OK(cudaEventRecord(later));
    OK(cudaEventRecord(untimed));
    OK(cudaEventSynchronize(untimed));
    CHECK(cudaEventElapsedTime(&ms, event, later) == cudaSuccess && ms > 0);
    CHECK(cudaEventElapsedTime(&ms, event, untimed) == cudaErrorInvalidResourceHandle);
    OK(cudaEventDestroy(later));
    OK(cudaEventDestroy(untimed));
    cudaGetLastError();
    CHECK(cudaEventCreateWithFlags(&event, 77) == cudaErrorInvalidValue);
    CHECK(cudaEventRecord(NULL) == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventDestroy(NULL) == cudaErrorInvalidResourceHandle);
    CHECK(cudaStreamDestroy(NULL) == cudaErrorInvalidResourceHandle);
    OK(cudaEventDestroy(event));
    cudaGetLastError();
}

// A GPU's driver may crash on these, so they are for the CPU.
static void test_stale_handles(float* x, float* host) {
#ifdef __CPU_CUDA__
    cudaStream_t stream;
    cudaEvent_t event;
    OK(cudaStreamCreate(&stream));
    OK(cudaStreamDestroy(stream));
    OK(cudaEventCreate(&event));
    OK(cudaEventDestroy(event));
    cudaStream_t never_created = (cudaStream_t)host;
    CHECK(cudaStreamSynchronize(stream) == cudaErrorInvalidResourceHandle);
    CHECK(cudaStreamDestroy(stream) == cudaErrorInvalidResourceHandle);
    CHECK(cudaStreamSynchronize(never_created) == cudaErrorInvalidResourceHandle);
    CHECK(cudaMemcpyAsync(x, host, 4, cudaMemcpyHostToDevice, stream) == cudaErrorInvalidResourceHandle);
    CHECK(cudaMemsetAsync(x, 0, 4, never_created) == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventRecord(event, 0) == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventSynchronize(event) == cudaErrorInvalidResourceHandle);
    CHECK(cudaStreamWaitEvent(0, event, 0) == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventDestroy(event) == cudaErrorInvalidResourceHandle);
    cudaGetLastError();
    add_to(x, x, 0, stream);
    CHECK(cudaGetLastError() == cudaErrorInvalidResourceHandle);
#else
    (void)x, (void)host;
#endif
}

// ------------------------------------------------------------------------------------------------

static void test_device(cudaDeviceProp* p) {
    int count, value;
    OK(cudaGetDeviceCount(&count));
    CHECK(count >= 1 && cudaSetDevice(0) == cudaSuccess);
    CHECK(cudaSetDevice(count) == cudaErrorInvalidDevice);
    char id[16];
    CHECK(cudaGetDevice(&value) == cudaSuccess && value == 0);
    CHECK(cudaDeviceGetPCIBusId(id, sizeof id, 0) == cudaSuccess && strlen(id) == 12);
    CHECK(cudaDeviceGetPCIBusId(id, 4, 0) == cudaErrorInvalidValue);
    CHECK(cudaDeviceGetPCIBusId(id, sizeof id, count) == cudaErrorInvalidDevice);
    CHECK(cudaGetDeviceProperties(p, -1) == cudaErrorInvalidDevice);
    OK(cudaGetDeviceProperties(p, 0));
    CHECK(p->warpSize == 32 && p->maxThreadsPerBlock == 1024 && p->major >= 8 && p->multiProcessorCount > 0);
    OK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
    CHECK(value == p->multiProcessorCount);
    OK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK(value == (int)p->sharedMemPerBlockOptin && value >= 163 << 10);
    cudaGetLastError();
}

static cudaError_t launch(dim3 grid, dim3 block, size_t shared, unsigned* count) {
    count_block<<<grid, block, shared>>>(count);
    return cudaGetLastError();
}

static void test_launch_limits(unsigned* count, const cudaDeviceProp* p) {
    CHECK(launch(1, 1025, 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, dim3(32, 8, 8), 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, dim3(1, 1, 65), 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, 0, 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(0, 1, 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(dim3(1, 65536), 1, 16, count) == cudaErrorInvalidConfiguration);
    CHECK(launch(1, 32, (48 << 10) + 1, count) == cudaErrorInvalidValue);
    int optin = (int)p->sharedMemPerBlockOptin;
    CHECK(cudaFuncSetAttribute(count_block, cudaFuncAttributeMaxDynamicSharedMemorySize, optin + 1) ==
          cudaErrorInvalidValue);
    cudaGetLastError();
    OK(cudaFuncSetAttribute(count_block, cudaFuncAttributeMaxDynamicSharedMemorySize, optin));
    CHECK(launch(1, 32, (size_t)optin, count) == cudaSuccess);
    CHECK(launch(1, 32, (size_t)optin + 1, count) == cudaErrorInvalidValue);
    CHECK(launch(2, 1024, 16, count) == cudaSuccess);
    add_constant<4><<<1, 32>>>(count);
    unsigned blocks;
    OK(cudaMemcpy(&blocks, count, sizeof blocks, cudaMemcpyDeviceToHost));
    CHECK(blocks == 1 + 2 + 4);
}

static void test_cooperative(unsigned* count, const cudaDeviceProp* p) {
    int blocks;
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, count_block, 1024, 16));
    CHECK(blocks >= 1 && blocks <= 2);
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, count_block, 256, p->sharedMemPerBlockOptin));
    CHECK(blocks == 1);
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, count_block, 256, 16));
    unsigned most = (unsigned)(blocks * p->multiProcessorCount), done;
    void* arguments[] = {&count};
    OK(cudaMemset(count, 0, sizeof *count));
    OK(cudaLaunchCooperativeKernel(count_block, dim3(most), dim3(256), arguments, 16, 0));
    CHECK(cudaLaunchCooperativeKernel(count_block, dim3(most + 1), dim3(256), arguments, 16, 0) ==
          cudaErrorCooperativeLaunchTooLarge);
    CHECK(cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge);
    OK(cudaLaunchCooperativeKernel(add_constant<3>, 1, 32, arguments));
    OK(cudaMemcpy(&done, count, sizeof done, cudaMemcpyDeviceToHost));
    CHECK(done == most + 3);
}

int main(void) {
    float *x, *y, *host = (float*)malloc(BYTES), *pinned;
    unsigned* count;
    cudaDeviceProp properties;
    OK(cudaMalloc(&x, BYTES));
    OK(cudaMalloc((void**)&y, BYTES));
    OK(cudaMalloc(&count, sizeof *count));
    OK(cudaMallocHost(&pinned, BYTES));
    OK(cudaMemset(count, 0, sizeof *count));
    test_errors();
    test_allocation();
    test_copies(x, y, host, pinned);
    test_copy_errors(x, host);
    test_streams(x, y, pinned);
    test_implicit_order(x, y, host);
    test_threads();
    test_events(x, y);
    test_stale_handles(x, host);
    test_device(&properties);
    test_launch_limits(count, &properties);
    test_cooperative(count, &properties);
    OK(cudaFree(x));
    OK(cudaFree(y));
    OK(cudaFree(count));
    OK(cudaFreeHost(pinned));
    free(host);
    return finish();
}
