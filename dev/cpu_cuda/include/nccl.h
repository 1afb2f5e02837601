// nccl.h: collectives between the processes of one machine. Names, values and signatures are NCCL 2.28's, but
// for `here`, the line of the call. To add a call, declare it here and name its transfers in nccl.cpp.
//
// Stricter than NCCL: what would hang or give nonsense stops the run: calls of different ranks that do not
// belong together, a rank that does not come in time (CPU_CUDA=timeout=S), buffers that overlap and are not
// in place. A process runs its calls in the order in which it makes them, without `lazy` before they return,
// and a send ends when its receiver has it. So ranks make the calls of all their communicators in the same
// order, two sends that wait for one another belong in a group (of one communicator and stream), and a
// process is one rank of a communicator.
// Different: sums go in the order of the ranks, of bf16 in fp32, rounded once; an average divides last.

#pragma once

#include "cuda_bf16.h"
#include "cuda_runtime.h"

#define NCCL_UNIQUE_ID_BYTES 128

extern "C" {

typedef struct ncclComm* ncclComm_t;
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;

typedef enum {
    ncclSuccess = 0,
    ncclSystemError = 2,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
} ncclResult_t;

typedef enum {
    ncclSum = 0,
    ncclMax = 2,
    ncclAvg = 4,
} ncclRedOp_t;

typedef enum {
    ncclUint8 = 1,
    ncclInt = 2,
    ncclInt32 = 2,
    ncclFloat = 7,
    ncclFloat32 = 7,
    ncclBfloat16 = 9,
} ncclDataType_t;

const char* ncclGetErrorString(ncclResult_t result);
ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId);
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank, CPU_CUDA_HERE);
ncclResult_t ncclCommDestroy(ncclComm_t comm);          // runs what waits in its streams
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();

ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE);
ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount,
                               ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream,
                               CPU_CUDA_HERE);
ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE);
ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
                           int root, ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE);
ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream, CPU_CUDA_HERE);
ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream, CPU_CUDA_HERE);

}  // extern "C"
