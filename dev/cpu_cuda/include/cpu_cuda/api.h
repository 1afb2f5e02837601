// api.h: the CUDA runtime's host interface, with the names, values and signatures of CUDA 13's headers.
//
// What no file here calls is missing on purpose and fails to compile. To add a function, declare it here and
// write it in memory.cpp or streams.cpp: check the arguments, enqueue() the work, return remember(error).

#pragma once

#include "device.h"
#include "engine.h"

// ------------------------------------------------------------------------------------------------
// Types

#define CPU_CUDA_ERRORS(X)                                                              \
    X(cudaSuccess, 0, "no error")                                                       \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                     \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                    \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")               \
    X(cudaErrorInvalidPitchValue, 12, "invalid pitch argument")                         \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")         \
    X(cudaErrorDevicesUnavailable, 46, "CUDA-capable device(s) is/are busy or unavailable") \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                            \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                   \
    X(cudaErrorNotReady, 600, "device not ready")                                       \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                        \
    X(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch") \
    X(cudaErrorNotSupported, 801, "operation not supported")                            \
    X(cudaErrorUnknown, 999, "unknown error")

// The number, and the member of cudaDeviceProp that it asks for.
#define CPU_CUDA_ATTRIBUTES(X)                                                          \
    X(cudaDevAttrMaxThreadsPerBlock, 1, maxThreadsPerBlock)                             \
    X(cudaDevAttrMaxSharedMemoryPerBlock, 8, sharedMemPerBlock)                         \
    X(cudaDevAttrMultiProcessorCount, 16, multiProcessorCount)                          \
    X(cudaDevAttrL2CacheSize, 38, l2CacheSize)                                          \
    X(cudaDevAttrMaxThreadsPerMultiProcessor, 39, maxThreadsPerMultiProcessor)          \
    X(cudaDevAttrComputeCapabilityMajor, 75, major)                                     \
    X(cudaDevAttrComputeCapabilityMinor, 76, minor)                                     \
    X(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 81, sharedMemPerMultiprocessor)      \
    X(cudaDevAttrCooperativeLaunch, 95, cooperativeLaunch)                              \
    X(cudaDevAttrMaxSharedMemoryPerBlockOptin, 97, sharedMemPerBlockOptin)

#define CPU_CUDA_ENUMERATOR(name, value, text) name = value,
typedef enum cudaError { CPU_CUDA_ERRORS(CPU_CUDA_ENUMERATOR) } cudaError_t;
enum cudaDeviceAttr { CPU_CUDA_ATTRIBUTES(CPU_CUDA_ENUMERATOR) };
#undef CPU_CUDA_ENUMERATOR

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaDeviceProp {                 // the members that say something here, in CUDA's order
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    int major, minor, multiProcessorCount, concurrentKernels, unifiedAddressing, l2CacheSize;
    int maxThreadsPerMultiProcessor, streamPrioritiesSupported;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int maxBlocksPerMultiProcessor;
    size_t reservedSharedMemPerBlock;
};

typedef struct CUevent_st* cudaEvent_t;

#define cudaHostAllocDefault 0x00
#define cudaHostAllocPortable 0x01
#define cudaHostAllocMapped 0x02
#define cudaHostAllocWriteCombined 0x04
#define cudaStreamDefault 0x00
#define cudaStreamNonBlocking 0x01
#define cudaEventDefault 0x00
#define cudaEventBlockingSync 0x01
#define cudaEventDisableTiming 0x02

// ------------------------------------------------------------------------------------------------
// Errors and devices

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDeviceSynchronize();

// ------------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** pointer, size_t size);
cudaError_t cudaMallocHost(void** pointer, size_t size);
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream = 0);
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                         size_t height, cudaMemcpyKind kind);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaMemset(void* pointer, int value, size_t size);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream = 0);

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t size) {
    return cudaMalloc((void**)pointer, size);
}
template <class T>
cudaError_t cudaHostAlloc(T** pointer, size_t size, unsigned flags) {
    return cudaHostAlloc((void**)pointer, size, flags);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t size, unsigned flags = 0) {
    return cudaHostAlloc((void**)pointer, size, flags);
}

// ------------------------------------------------------------------------------------------------
// Streams and events

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);

cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

// ------------------------------------------------------------------------------------------------
// Kernels as values. A kernel is known by its name, so these are macros that take their arguments' text too.
// Pass the kernel itself: a (void*) of it has lost its parameters' types.

namespace cpu_cuda {

cudaError_t try_submit(Launch* launch);                 // submit(), with its error
const char* kernel_name(const char* text);              // "(void*)space::kernel<4>, x": "kernel"
cudaError_t set_attribute(const char* text, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, int threads, size_t shared);

template <class... P>
cudaError_t launch_cooperative(const char* text, Place here, void (*kernel)(P...), dim3 g, dim3 b,
                               void** arguments, size_t shared = 0, cudaStream_t stream = 0) {
    typedef BoundKernel<void (*)(P...), std::decay_t<P>...> Bound;
    int i = 0;
    Bound* bound = new Bound{kernel, {*(std::decay_t<P>*)arguments[i++]...}};
    const char* name = kernel_name(text);
    return try_submit(new Launch{{g.x, g.y, g.z}, {b.x, b.y, b.z}, shared, stream, name, here, true,
                                 Bound::run, Bound::release, bound, sizeof *bound, Bound::each_pointer});
}

template <class T>
cudaError_t set_attribute(const char* text, T*, cudaFuncAttribute attribute, int value) {
    return set_attribute(text, attribute, value);
}

}  // namespace cpu_cuda

#define cudaLaunchCooperativeKernel(...) \
    cpu_cuda::launch_cooperative(#__VA_ARGS__, {__FILE__, __LINE__}, __VA_ARGS__)
#define cudaFuncSetAttribute(...) cpu_cuda::set_attribute(#__VA_ARGS__, __VA_ARGS__)

// Only threads and dynamic shared memory limit the number here, not registers.
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t shared) {
    return cpu_cuda::occupancy(blocks, threads, shared);
}
