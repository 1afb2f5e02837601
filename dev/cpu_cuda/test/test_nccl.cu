// NCCL between processes: up to four ranks, each with its device. For a GPU: nvcc test_nccl.cu -lnccl

#include "test.h"

#include <cuda_bf16.h>
#include <math.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#define NCCL(call) CHECK((call) == ncclSuccess)

#ifdef __CPU_CUDA__
static const bool on_cpu = true;
#else
static const bool on_cpu = false;
#endif

struct Shared {                         // between the ranks
    ncclUniqueId ids[3];
    volatile bool ready;
    int devices;
};
static Shared* shared;
static int rank, ranks;
static ncclComm_t world;
static cudaStream_t stream;

template <class T>
static T* to_device(const std::vector<T>& values) {
    T* p;
    OK(cudaMalloc(&p, values.size() * sizeof(T) + 16));
    OK(cudaMemcpyAsync(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
    return p;
}

template <class T>
static std::vector<T> to_host(const T* p, size_t count) {
    std::vector<T> values(count);
    OK(cudaMemcpyAsync(values.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
    OK(cudaStreamSynchronize(stream));
    return values;
}

// Sums and averages of these are exact in every type, for up to four ranks.
static float number(int r, size_t i) { return (float)(12 * ((i * 5 + (size_t)r + i / 6) % 6)); }

template <class T>
static std::vector<T> numbers(int r, size_t count) {
    std::vector<T> values(count);
    for (size_t i = 0; i < count; i++) values[i] = (T)number(r, i);
    return values;
}

// Of the ranks' numbers first, first + 1, ...
template <class T>
static std::vector<T> reduced(ncclRedOp_t op, size_t first, size_t count) {
    std::vector<T> values(count);
    for (size_t i = 0; i < count; i++) {
        float result = 0;
        for (int r = 0; r < ranks; r++) {
            float value = number(r, first + i);
            result = op == ncclMax ? fmaxf(result, value) : result + value;
        }
        values[i] = (T)(op == ncclAvg ? result / (float)ranks : result);
    }
    return values;
}

template <class T>
static void test_type(ncclDataType_t type, size_t count) {
    size_t n = (size_t)ranks, first = count * (size_t)rank;
    T *a = to_device(numbers<T>(rank, count)), *b = to_device(std::vector<T>(count));
    for (ncclRedOp_t op : {ncclSum, ncclAvg, ncclMax}) {
        T *whole = to_device(numbers<T>(rank, count * n)), *both = to_device(numbers<T>(rank, count));
        NCCL(ncclAllReduce(a, b, count, type, op, world, stream));
        CHECK(to_host(b, count) == reduced<T>(op, 0, count));
        NCCL(ncclAllReduce(both, both, count, type, op, world, stream));
        CHECK(to_host(both, count) == reduced<T>(op, 0, count));
        NCCL(ncclReduceScatter(whole, whole + first, count, type, op, world, stream));
        CHECK(to_host(whole + first, count) == reduced<T>(op, first, count));
    }
    T *whole = to_device(numbers<T>(rank, count * n)), *all = to_device(std::vector<T>(count * n));
    std::vector<T> gathered(count * n);
    for (size_t i = 0; i < count * n; i++) gathered[i] = (T)number((int)(i / count), i);
    for (T* to : {all, whole}) {
        NCCL(ncclAllGather(whole + first, to, count, type, world, stream));
        CHECK(to_host(to, count * n) == gathered);
    }
    NCCL(ncclBroadcast(a, b, count, type, ranks - 1, world, stream));
    CHECK(to_host(b, count) == numbers<T>(ranks - 1, count));
    NCCL(ncclBroadcast(a, a, count, type, 0, world, stream));
    CHECK(to_host(a, count) == numbers<T>(0, count));
}

// In the order of the ranks, of bf16 too rounded once. A GPU has an order of its own, and rounds each sum.
static void test_rounding() {
    const float tolerance = on_cpu ? 0 : (float)ranks / 128;
    const size_t count = 4099;
    auto fraction = [](int r, size_t i) { return sinf((float)i + 5e3f * (float)r); };
    std::vector<float> f(count);
    std::vector<__nv_bfloat16> h(count);
    for (size_t i = 0; i < count; i++) f[i] = fraction(rank, i);
    for (size_t i = 0; i < count; i++) h[i] = __float2bfloat16(f[i]);
    float* df = to_device(f);
    __nv_bfloat16* dh = to_device(h);
    NCCL(ncclAllReduce(df, df, count, ncclFloat, ncclSum, world, stream));
    NCCL(ncclAllReduce(dh, dh, count, ncclBfloat16, ncclSum, world, stream));
    f = to_host(df, count);
    h = to_host(dh, count);
    bool right = true;
    for (size_t i = 0; i < count; i++) {
        float sum = 0, bf16_sum = 0;
        for (int r = 0; r < ranks; r++) sum += fraction(r, i);
        for (int r = 0; r < ranks; r++) bf16_sum += __bfloat162float(__float2bfloat16(fraction(r, i)));
        right &= fabsf(f[i] - sum) <= tolerance;
        right &= fabsf(__bfloat162float(h[i]) - __bfloat162float(__float2bfloat16(bf16_sum))) <= tolerance;
    }
    CHECK(right);
}

// Everything to everyone, each time after an empty message; one message alone; a group of two, which go side
// by side, against two calls, which do not.
static void test_messages() {
    size_t count = 40003, n = (size_t)ranks;
    int *from = to_device(numbers<int>(rank, count * n)), *to = to_device(std::vector<int>(count * n));
    NCCL(ncclGroupStart());
    for (int r = 0; r < ranks; r++) {
        NCCL(ncclSend(from, 0, ncclInt, r, world, stream));
        NCCL(ncclSend(from + count * (size_t)r, count, ncclInt, r, world, stream));
        NCCL(ncclRecv(to, 0, ncclInt, r, world, stream));
        NCCL(ncclRecv(to + count * (size_t)r, count, ncclInt, r, world, stream));
    }
    NCCL(ncclGroupEnd());
    std::vector<int> got = to_host(to, count * n);
    bool right = true;
    for (size_t i = 0; i < got.size(); i++)
        right &= (float)got[i] == number((int)(i / count), count * (size_t)rank + i % count);
    CHECK(right);
    if (rank == 0 && ranks > 1) NCCL(ncclSend(from, count, ncclInt, 1, world, stream));
    if (rank == 1) NCCL(ncclRecv(to, count, ncclInt, 0, world, stream));
    if (rank == 1) CHECK(to_host(to, count) == numbers<int>(0, count));
    if (rank == 0 && ranks > 1) {
        NCCL(ncclGroupStart());
        NCCL(ncclSend(from, count, ncclInt, 1, world, stream));
        NCCL(ncclRecv(to, count, ncclInt, 1, world, stream));
        NCCL(ncclGroupEnd());
        CHECK(to_host(to, count) == numbers<int>(1, count));
    } else if (rank == 1) {
        NCCL(ncclRecv(to, count, ncclInt, 0, world, stream));
        NCCL(ncclSend(from, count, ncclInt, 0, world, stream));
        CHECK(to_host(to, count) == numbers<int>(0, count));
    }
}

static __global__ void add_one(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] += 1; }

// Ranks of the same parity have a communicator and a stream of their own. Then two calls in a group.
static void test_two_communicators() {
    int parity = rank % 2;
    size_t count = 20480;
    ncclComm_t half;
    cudaStream_t other;
    OK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    NCCL(ncclCommInitRank(&half, (ranks + 1 - parity) / 2, shared->ids[1 + parity], rank / 2));
    float *a = to_device(std::vector<float>(count, 1)), *b = to_device(std::vector<float>(count, 2));
    OK(cudaStreamSynchronize(stream));
    for (int round = 0; round < 3; round++) {
        add_one<<<80, 256, 0, stream>>>(a);
        NCCL(ncclAllReduce(a, a, count, ncclFloat, ncclMax, world, stream));
        add_one<<<80, 256, 0, other>>>(b);
        NCCL(ncclAllReduce(b, b, count, ncclFloat, ncclMax, half, other));
    }
    OK(cudaStreamSynchronize(rank == 0 ? stream : other));
    OK(cudaStreamSynchronize(rank == 0 ? other : stream));
    NCCL(ncclGroupStart());
    NCCL(ncclAllReduce(a, a, count, ncclFloat, ncclSum, world, stream));
    NCCL(ncclAllReduce(b, b, count, ncclFloat, ncclSum, world, stream));
    NCCL(ncclGroupEnd());
    CHECK(to_host(a, count) == std::vector<float>(count, 4.f * (float)ranks));
    CHECK(to_host(b, count) == std::vector<float>(count, 5.f * (float)ranks));
    NCCL(ncclCommDestroy(half));
}

static void test_arguments() {
    float* a = to_device(std::vector<float>(8));
    CHECK(ncclBroadcast(a, a, 8, ncclFloat, ranks, world, stream) == ncclInvalidArgument);
    CHECK(ncclAllReduce(a, a, 8, (ncclDataType_t)15, ncclSum, world, stream) == ncclInvalidArgument);
    CHECK(ncclAllReduce(a, a, 8, ncclFloat, ncclSum, NULL, stream) == ncclInvalidArgument);
    CHECK(ncclGroupEnd() == ncclInvalidUsage);
    CHECK(strlen(ncclGetErrorString(ncclInvalidUsage)) > 0);
}

static void begin() {
    OK(cudaSetDevice(rank));
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int i = 0; rank == 0 && i < 3; i++) NCCL(ncclGetUniqueId(&shared->ids[i]));
    if (rank == 0) shared->ready = true;
    while (!shared->ready) usleep(1000);
    NCCL(ncclCommInitRank(&world, ranks, shared->ids[0], rank));
}

static void all_tests() {
    begin();
    for (size_t count : {0, 3, 1001, 40003}) {              // the last is longer than a message
        test_type<float>(ncclFloat, count);
        test_type<__nv_bfloat16>(ncclBfloat16, count);
        test_type<int>(ncclInt, count);
        test_type<unsigned char>(ncclUint8, count);
    }
    test_rounding();
    test_messages();
    test_two_communicators();
    test_arguments();
    NCCL(ncclCommDestroy(world));
}

// Runs `work` in so many ranks. A letter for each: passed, failed, stopped with a report, crashed.
template <class Work>
static std::string run_ranks(int count, const Work& work) {
    std::string statuses;
    pid_t children[4];
    memset((void*)shared, 0, sizeof *shared);
    ranks = count;
    fflush(stdout);
    for (rank = 0; rank < count; rank++) {
        children[rank] = fork();
        if (children[rank]) continue;
        failed = 0;
        work();
        exit(failed != 0);
    }
    for (int r = 0; r < count; r++) {
        int status;
        waitpid(children[r], &status, 0);
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        statuses += code == 0 ? 'p' : code == 1 ? 'f' : code == 66 ? 'r' : 'c';
    }
    return statuses;
}

// What would hang a GPU, or give nonsense: two ranks do it with a buffer of 20 floats.
static void test_mistake(const char* statuses, const char* part, void (*work)(float* a)) {
    FILE* messages = tmpfile();
    auto run = [=] {
        dup2(fileno(messages), STDERR_FILENO);
        begin();
        work(to_device(std::vector<float>(16)));
        cudaStreamSynchronize(stream);
    };
    CHECK(run_ranks(2, run) == statuses);
    char text[4096];
    rewind(messages);
    text[fread(text, 1, sizeof text - 1, messages)] = 0;
    fclose(messages);
    CHECK(strstr(text, part));
    if (!strstr(text, part)) printf("found: %s\nexpected: %s\n", text, part);
}

static void test_mistakes() {
    std::string options = getenv("CPU_CUDA") ? getenv("CPU_CUDA") : "";
    setenv("CPU_CUDA", (options + ",timeout=1").c_str(), 1);
    test_mistake("rr", "rank 1 in ncclBroadcast(count 7, ncclFloat32, op 0, rank 0)", [](float* a) {
        if (rank == 0) ncclAllReduce(a, a, 8, ncclFloat, ncclSum, world, stream);
        else ncclBroadcast(a, a, 7, ncclFloat, 0, world, stream);
    });
    test_mistake("rr", "rank 1 in ncclSend/Recv(count 7", [](float* a) {
        if (rank == 0) ncclSend(a, 8, ncclFloat, 1, world, stream);
        else ncclRecv(a, 7, ncclFloat, 0, world, stream);
    });
    test_mistake("rr", "overlap, not as in place", [](float* a) {
        ncclAllGather(a, a, 8, ncclFloat, world, stream);
    });
    test_mistake("rr", "out of bounds: ncclAllReduce", [](float* a) {
        ncclAllReduce(a, a, 21, ncclFloat, ncclSum, world, stream);
    });
    test_mistake("rp", "rank 0 waits for rank 1 in ncclAllReduce", [](float* a) {
        if (rank == 0) ncclAllReduce(a, a, 8, ncclFloat, ncclSum, world, stream);
    });
    test_mistake("rp", "rank 0 waits for 1 ranks in ncclCommInitRank", [](float*) {
        if (rank == 0) ncclCommInitRank(&world, ranks, shared->ids[1], rank);
    });
    CHECK(access((std::string("/dev/shm") + shared->ids[1].internal).c_str(), F_OK) != 0);
}

int main() {
    shared = (Shared*)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    // In a process of its own: CUDA does not survive a fork.
    CHECK(run_ranks(1, [] { OK(cudaGetDeviceCount(&shared->devices)); }) == "p");
    int devices = shared->devices;
    for (int n : {1, 2, 3, 4})
        if (n <= devices && (n != 2 || devices == 2))
            CHECK(run_ranks(n, all_tests) == std::string((size_t)n, 'p'));
    if (on_cpu) test_mistakes();
    return finish();
}
