// cuda_runtime.h: the CUDA runtime, with the names, values and signatures of CUDA 13's headers. The nvcc here
// includes it into every file, as the real one does.
//
// What no file here calls is missing on purpose and fails to compile. To add a function, declare it here and
// write it in memory.cpp or streams.cpp: check the arguments, enqueue() the work, return remember(error).

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_cuda/device.h"
#include "cpu_cuda/ptx.h"

// ------------------------------------------------------------------------------------------------
// Types

#define CPU_CUDA_ERRORS(X)                                                              \
    X(cudaSuccess, 0, "no error")                                                       \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                     \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                    \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")               \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")         \
    X(cudaErrorDevicesUnavailable, 46, "CUDA-capable device(s) is/are busy or unavailable") \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                            \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                   \
    X(cudaErrorNotReady, 600, "device not ready")                                       \
    X(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch")

// The number, and the member of cudaDeviceProp that it asks for.
#define CPU_CUDA_ATTRIBUTES(X)                                                          \
    X(cudaDevAttrMultiProcessorCount, 16, multiProcessorCount)                          \
    X(cudaDevAttrComputeCapabilityMajor, 75, major)                                     \
    X(cudaDevAttrMaxSharedMemoryPerBlockOptin, 97, sharedMemPerBlockOptin)

#define CPU_CUDA_ENUMERATOR(name, value, meaning) name = value,
typedef enum cudaError { CPU_CUDA_ERRORS(CPU_CUDA_ENUMERATOR) } cudaError_t;
enum cudaDeviceAttr { CPU_CUDA_ATTRIBUTES(CPU_CUDA_ENUMERATOR) };
#undef CPU_CUDA_ENUMERATOR

enum cudaMemcpyKind : unsigned {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaDeviceProp {                 // the members that say something here, in CUDA's order
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock;
    int warpSize, maxThreadsPerBlock, major, minor, multiProcessorCount, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
};

typedef struct CUevent_st* cudaEvent_t;
#define cudaStreamNonBlocking 0x01
#define cudaEventDisableTiming 0x02

// ------------------------------------------------------------------------------------------------
// Errors and devices

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDeviceSynchronize();

// ------------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** pointer, size_t size);
cudaError_t cudaMallocHost(void** pointer, size_t size);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream = 0);
cudaError_t cudaMemset(void* pointer, int value, size_t size);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream = 0);

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t size) {
    return cudaMalloc((void**)pointer, size);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t size) {
    return cudaMallocHost((void**)pointer, size);
}

// ------------------------------------------------------------------------------------------------
// Streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

// ------------------------------------------------------------------------------------------------
// Kernels as values, known by their names: two of these are macros, which take the text too. Pass the kernel
// itself: a (void*) of it has lost its parameters' types.

namespace cpu_cuda {

cudaError_t allow_shared(const char* kernel, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, int threads, size_t shared);

template <class... P>
cudaError_t launch_cooperative(const char* name, Place here, void (*kernel)(P...), dim3 g, dim3 b,
                               void** arguments, size_t shared = 0, cudaStream_t stream = 0) {
    typedef BoundKernel<void (*)(P...), std::decay_t<P>...> Bound;
    int i = 0;
    Bound bound = {kernel, {*(std::decay_t<P>*)arguments[i++]...}};
    return (cudaError_t)submit({{g, b, shared, stream}, name, here, true, Bound::run, &bound, sizeof bound});
}

}  // namespace cpu_cuda

#define cudaLaunchCooperativeKernel(kernel, ...) \
    cpu_cuda::launch_cooperative(#kernel, {__FILE__, __LINE__}, kernel, __VA_ARGS__)
#define cudaFuncSetAttribute(kernel, ...) ((void)(kernel), cpu_cuda::allow_shared(#kernel, __VA_ARGS__))

// Only threads and dynamic shared memory limit the number here, not registers.
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t shared) {
    return cpu_cuda::occupancy(blocks, threads, shared);
}
