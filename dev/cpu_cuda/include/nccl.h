// nccl.h: collectives between the processes of one machine. Names, values and signatures are NCCL 2.28's,
// but for `here`, the line of the call.
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
    ncclSuccess = 0, ncclSystemError = 2, ncclInvalidArgument = 4, ncclInvalidUsage = 5,
} ncclResult_t;

typedef enum { ncclSum = 0, ncclMax = 2, ncclAvg = 4 } ncclRedOp_t;

typedef enum {
    ncclUint8 = 1, ncclInt = 2, ncclInt32 = 2, ncclFloat = 7, ncclFloat32 = 7, ncclBfloat16 = 9,
} ncclDataType_t;

const char* ncclGetErrorString(ncclResult_t result);
ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId);
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank, CPU_CUDA_HERE);
ncclResult_t ncclCommDestroy(ncclComm_t comm);          // runs what waits in its streams
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();

}  // extern "C"

namespace cpu_cuda {

enum NcclKind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };

struct NcclCall {
    NcclKind kind;
    const void* send;
    void* receive;
    size_t count;
    ncclDataType_t datatype;
    ncclRedOp_t op;
    int root;                           // or the other end of a message
    ncclComm_t comm;
    cudaStream_t stream;
    Place here;
};
ncclResult_t nccl(const NcclCall& call);

}  // namespace cpu_cuda

inline ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::ALL_REDUCE, send, recv, count, type, op, 0, comm, stream, here});
}
inline ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::REDUCE_SCATTER, send, recv, count, type, op, 0, comm, stream, here});
}
inline ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::ALL_GATHER, send, recv, count, type, ncclSum, 0, comm, stream, here});
}
inline ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type,
                                  int root, ncclComm_t comm, cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::BROADCAST, send, recv, count, type, ncclSum, root, comm, stream, here});
}
inline ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::SEND, send, nullptr, count, type, ncclSum, peer, comm, stream, here});
}
inline ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream, CPU_CUDA_HERE) {
    return cpu_cuda::nccl({cpu_cuda::RECV, nullptr, recv, count, type, ncclSum, peer, comm, stream, here});
}
