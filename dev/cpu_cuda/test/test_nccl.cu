// NCCL between processes: up to four ranks, each with its device. For a GPU: nvcc test_nccl.cu -lnccl

#include "test.h"

#include <cuda_bf16.h>
#include <math.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#define NCCL(call) CHECK((call) == ncclSuccess)

static const size_t sizes[] = {0, 3, 1001, 40003};          // the last is longer than a message

struct Shared {                         // between the ranks
    ncclUniqueId ids[3];
    volatile bool ready;
    volatile int passed[4], failed[4];
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

// Whole numbers of 0 to 30: their sums are exact in every type.
static int number(int r, size_t i) { return (int)((i * 7 + (size_t)r * 13 + i / 31) % 31); }

template <class T>
static std::vector<T> numbers(int r, size_t count) {
    std::vector<T> values(count);
    for (size_t i = 0; i < count; i++) values[i] = (T)(float)number(r, i);
    return values;
}

static double expected(ncclRedOp_t op, size_t i) {
    double sum = 0, least = INFINITY, most = -INFINITY;
    for (int r = 0; r < ranks; r++) {
        sum += number(r, i);
        least = fmin(least, number(r, i));
        most = fmax(most, number(r, i));
    }
    return op == ncclMin ? least : op == ncclMax ? most : op == ncclAvg ? sum / ranks : sum;
}

// values[i] is the reduction of number(.., first + i): exactly, but for averages of floating-point numbers.
template <class T>
static bool is_reduced(const std::vector<T>& values, ncclRedOp_t op, size_t first, bool whole) {
    for (size_t i = 0; i < values.size(); i++) {
        double right = whole ? floor(expected(op, first + i)) : expected(op, first + i);
        double error = fabs((double)(float)values[i] - right);
        double tolerance = op == ncclAvg && !whole ? right * (sizeof(T) == 2 ? 0.02 : 1e-6) : 0;
        if (!(error <= tolerance)) return false;
    }
    return true;
}

template <class T>
static void test_reductions(ncclDataType_t type, bool whole) {
    for (size_t count : sizes) {
        for (ncclRedOp_t op : {ncclSum, ncclAvg, ncclMax, ncclMin}) {
            T *a = to_device(numbers<T>(rank, count)), *b = to_device(std::vector<T>(count));
            T* in_place = to_device(numbers<T>(rank, count * (size_t)ranks));
            T* mine = in_place + count * (size_t)rank;
            NCCL(ncclAllReduce(a, b, count, type, op, world, stream));
            CHECK(is_reduced(to_host(b, count), op, 0, whole));
            NCCL(ncclAllReduce(a, a, count, type, op, world, stream));
            CHECK(is_reduced(to_host(a, count), op, 0, whole));
            NCCL(ncclReduceScatter(in_place, mine, count, type, op, world, stream));
            CHECK(is_reduced(to_host(mine, count), op, count * (size_t)rank, whole));
            OK(cudaFree(a));
            OK(cudaFree(b));
            OK(cudaFree(in_place));
        }
    }
}

template <class T>
static void test_copies(ncclDataType_t type) {
    for (size_t count : sizes) {
        T *a = to_device(numbers<T>(rank, count)), *all = to_device(std::vector<T>(count * (size_t)ranks));
        T* mine = all + count * (size_t)rank;
        bool right = true;
        for (bool in_place : {false, true}) {
            if (in_place) OK(cudaMemcpyAsync(mine, a, count * sizeof(T), cudaMemcpyDeviceToDevice, stream));
            NCCL(ncclAllGather(in_place ? mine : a, all, count, type, world, stream));
            std::vector<T> gathered = to_host(all, count * (size_t)ranks);
            for (size_t i = 0; i < gathered.size(); i++) {
                right &= (float)gathered[i] == (float)number((int)(i / count), i % count);
            }
            OK(cudaMemsetAsync(all, 0, count * (size_t)ranks * sizeof(T), stream));
        }
        NCCL(ncclBroadcast(a, all, count, type, ranks - 1, world, stream));
        right &= to_host(all, count) == numbers<T>(ranks - 1, count);
        NCCL(ncclBroadcast(a, a, count, type, 0, world, stream));
        right &= to_host(a, count) == numbers<T>(0, count);
        CHECK(right);
        OK(cudaFree(a));
        OK(cudaFree(all));
    }
}

// Fractions: all ranks get the same bits; bf16 is within a rounding of each sum of two, here of one.
static void test_rounding() {
    size_t count = 4099;
    bool same = true, close = true, once = true;
    std::vector<float> f(count);
    std::vector<__nv_bfloat16> h(count);
    for (size_t i = 0; i < count; i++) f[i] = sinf((float)(i + (size_t)rank * count));
    for (size_t i = 0; i < count; i++) h[i] = __float2bfloat16(f[i]);
    float *df = to_device(f), *all = to_device(std::vector<float>(count * (size_t)ranks));
    __nv_bfloat16* dh = to_device(h);
    NCCL(ncclAllReduce(df, df, count, ncclFloat, ncclSum, world, stream));
    NCCL(ncclAllReduce(dh, dh, count, ncclBfloat16, ncclSum, world, stream));
    NCCL(ncclAllGather(df, all, count, ncclFloat, world, stream));
    f = to_host(df, count);
    std::vector<float> gathered = to_host(all, count * (size_t)ranks);
    for (size_t i = 0; i < gathered.size(); i++) same &= gathered[i] == f[i % count];
    CHECK(same);
    h = to_host(dh, count);
    for (size_t i = 0; i < count; i++) {
        float sum = 0;
        for (int r = 0; r < ranks; r++) {
            sum += __bfloat162float(__float2bfloat16(sinf((float)(i + (size_t)r * count))));
        }
        close &= fabsf(__bfloat162float(h[i]) - sum) <= (float)ranks / 128;
        once &= __bfloat162float(h[i]) == __bfloat162float(__float2bfloat16(sum));
    }
    CHECK(close);
#ifdef __CPU_CUDA__
    CHECK(once);
#endif
    OK(cudaFree(df));
    OK(cudaFree(dh));
    OK(cudaFree(all));
}

// To the right and to the left at once, twice each, one of them empty; then everything to everyone.
static void test_messages() {
    size_t count = 100003, n = (size_t)ranks;
    int right = (rank + 1) % ranks, left = (rank + ranks - 1) % ranks;
    int* from = to_device(numbers<int>(rank, count * n));
    int* to = to_device(std::vector<int>(count * n));
    NCCL(ncclGroupStart());
    for (int peer : {right, left}) {
        NCCL(ncclSend(from, 0, ncclInt, peer, world, stream));
        NCCL(ncclSend(from, count, ncclInt, peer, world, stream));
    }
    for (int peer : {left, right}) {
        NCCL(ncclRecv(to, 0, ncclInt, peer, world, stream));
        NCCL(ncclRecv(to, count, ncclInt, peer, world, stream));
        if (ranks > 1) to += count;
    }
    NCCL(ncclGroupEnd());
    if (ranks > 1) to -= 2 * count;
    CHECK(ranks == 1 || to_host(to, count) == numbers<int>(left, count));
    CHECK(ranks == 1 || to_host(to + count, count) == numbers<int>(right, count));
    NCCL(ncclGroupStart());
    for (int r = 0; r < ranks; r++) {
        NCCL(ncclSend(from + count * (size_t)r, count, ncclInt, r, world, stream));
        NCCL(ncclRecv(to + count * (size_t)r, count, ncclInt, r, world, stream));
    }
    NCCL(ncclGroupEnd());
    std::vector<int> got = to_host(to, count * n);
    bool good = true;
    for (size_t i = 0; i < got.size(); i++) {
        good &= got[i] == number((int)(i / count), count * (size_t)rank + i % count);
    }
    CHECK(good);
    if (rank == 0 && ranks > 1) NCCL(ncclSend(from, count, ncclInt, 1, world, stream));
    if (rank == 1) NCCL(ncclRecv(to, count, ncclInt, 0, world, stream));
    if (rank == 1) CHECK(to_host(to, count) == numbers<int>(0, count));
    OK(cudaStreamSynchronize(stream));
    OK(cudaFree(from));
    OK(cudaFree(to));
}

static __global__ void add_one(float* x, size_t count) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) x[i] += 1;
}

// Ranks of the same parity have a communicator and a stream of their own. Then two calls in a group.
static void test_two_communicators() {
    int parity = rank % 2, peers = (ranks + 1 - parity) / 2, n;
    size_t count = 20001;
    ncclComm_t half;
    cudaStream_t other;
    cudaEvent_t done;
    OK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    OK(cudaEventCreate(&done));
    NCCL(ncclCommInitRank(&half, peers, shared->ids[1 + parity], rank / 2));
    NCCL(ncclCommCount(half, &n));
    CHECK(n == peers);
    float* a = to_device(std::vector<float>(count, 1));
    float* b = to_device(std::vector<float>(count, 2));
    OK(cudaStreamSynchronize(stream));
    for (int round = 0; round < 3; round++) {
        add_one<<<(unsigned)(count + 255) / 256, 256, 0, stream>>>(a, count);
        NCCL(ncclAllReduce(a, a, count, ncclFloat, ncclMax, world, stream));
        add_one<<<(unsigned)(count + 255) / 256, 256, 0, other>>>(b, count);
        NCCL(ncclAllReduce(b, b, count, ncclFloat, ncclMax, half, other));
    }
    OK(cudaStreamSynchronize(rank == 0 ? stream : other));
    OK(cudaEventRecord(done, other));
    OK(cudaStreamWaitEvent(stream, done, 0));
    CHECK(to_host(b, count) == std::vector<float>(count, 5));
    CHECK(to_host(a, count) == std::vector<float>(count, 4));
    NCCL(ncclGroupStart());
    NCCL(ncclAllReduce(a, a, count, ncclFloat, ncclSum, world, stream));
    NCCL(ncclAllReduce(b, b, 7, ncclFloat, ncclSum, world, stream));
    NCCL(ncclGroupEnd());
    CHECK(to_host(a, count) == std::vector<float>(count, 4.f * (float)ranks));
    CHECK(to_host(b, 7) == std::vector<float>(7, 5.f * (float)ranks));
    NCCL(ncclCommDestroy(half));
    OK(cudaFree(a));
    OK(cudaFree(b));
}

static void test_arguments() {
    float* a = to_device(std::vector<float>(8));
    int version;
    NCCL(ncclGetVersion(&version));
    CHECK(version / 10000 == NCCL_MAJOR);
    CHECK(ncclBroadcast(a, a, 8, ncclFloat, ranks, world, stream) == ncclInvalidArgument);
    CHECK(ncclAllReduce(a, a, 8, ncclNumTypes, ncclSum, world, stream) == ncclInvalidArgument);
    CHECK(ncclAllReduce(a, a, 8, ncclFloat, ncclSum, NULL, stream) == ncclInvalidArgument);
    CHECK(strlen(ncclGetErrorString(ncclRemoteError)) > 0);
#ifdef __CPU_CUDA__
    float host[8] = {};
    CHECK(ncclAllReduce(host, a, 8, ncclFloat, ncclSum, world, stream) == ncclInvalidArgument);
    CHECK(ncclAllReduce(a, (char*)a + 1, 8, ncclFloat, ncclSum, world, stream) == ncclInvalidArgument);
    CHECK(ncclGroupEnd() == ncclInvalidUsage);
#endif
    OK(cudaStreamSynchronize(stream));
    OK(cudaFree(a));
}

static void all_tests() {
    int n, r;
    OK(cudaSetDevice(rank));
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int i = 0; rank == 0 && i < 3; i++) NCCL(ncclGetUniqueId(&shared->ids[i]));
    if (rank == 0) shared->ready = true;
    while (!shared->ready) usleep(1000);
    NCCL(ncclCommInitRank(&world, ranks, shared->ids[0], rank));
    NCCL(ncclCommCount(world, &n));
    NCCL(ncclCommUserRank(world, &r));
    CHECK(n == ranks && r == rank);
    test_reductions<float>(ncclFloat, false);
    test_reductions<double>(ncclDouble, false);
    test_reductions<__nv_bfloat16>(ncclBfloat16, false);
    test_reductions<int>(ncclInt, true);
    test_reductions<unsigned char>(ncclUint8, true);
    test_copies<float>(ncclFloat);
    test_copies<unsigned char>(ncclUint8);
    test_rounding();
    test_messages();
    test_two_communicators();
    test_arguments();
    ncclResult_t error;
    NCCL(ncclCommGetAsyncError(world, &error));
    CHECK(error == ncclSuccess);
    NCCL(ncclCommDestroy(world));
}

// Runs `work` in so many ranks, adds what they counted. A letter for each: passed, failed, report, crashed.
static std::string run_ranks(int count, void (*work)(), FILE* messages) {
    std::string statuses;
    std::vector<pid_t> children;
    memset((void*)shared, 0, sizeof *shared);
    ranks = count;
    fflush(stdout);
    for (rank = 0; rank < count; rank++) {
        pid_t child = fork();
        if (child) {
            children.push_back(child);
            continue;
        }
        if (messages) dup2(fileno(messages), STDERR_FILENO);
        passed = failed = 0;
        work();
        shared->passed[rank] = passed;
        shared->failed[rank] = failed;
        exit(failed != 0);
    }
    for (int r = 0; r < count; r++) {
        int status;
        waitpid(children[(size_t)r], &status, 0);
        passed += shared->passed[r];
        failed += shared->failed[r];
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        statuses += code == 0 ? 'p' : code == 1 ? 'f' : code == 66 ? 'r' : 'c';
    }
    return statuses;
}

#ifdef __CPU_CUDA__
// ------------------------------------------------------------------------------------------------
// What would hang a GPU, or give nonsense

static void begin_two_ranks() {
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (rank == 0) NCCL(ncclGetUniqueId(&shared->ids[0]));
    if (rank == 0) shared->ready = true;
    while (!shared->ready) usleep(1000);
    NCCL(ncclCommInitRank(&world, ranks, shared->ids[0], rank));
}

static void call_different_things() {
    begin_two_ranks();
    float* a = to_device(std::vector<float>(8));
    if (rank == 0) ncclAllReduce(a, a, 8, ncclFloat, ncclSum, world, stream);
    else ncclBroadcast(a, a, 7, ncclFloat, 0, world, stream);
    cudaStreamSynchronize(stream);
}

static void leave_first() {
    begin_two_ranks();
    if (rank == 1) return;
    float* a = to_device(std::vector<float>(8));
    ncclAllReduce(a, a, 8, ncclFloat, ncclSum, world, stream);
    OK(cudaStreamSynchronize(stream));
    ncclResult_t error;
    NCCL(ncclCommGetAsyncError(world, &error));
    CHECK(error == ncclRemoteError);
    CHECK(isnan(to_host(a, 1)[0]));
    NCCL(ncclCommAbort(world));
}

static void never_come() {
    if (rank == 1) return;
    NCCL(ncclGetUniqueId(&shared->ids[0]));
    CHECK(ncclCommInitRank(&world, ranks, shared->ids[0], rank) == ncclRemoteError);
    CHECK(access((std::string("/dev/shm") + shared->ids[0].internal).c_str(), F_OK) != 0);
}

static void never_call() {
    begin_two_ranks();
    if (rank == 1) sleep(2);
    else ncclSend(to_device(std::vector<float>(8)), 8, ncclFloat, 1, world, stream);
    OK(cudaStreamSynchronize(stream));
    ncclResult_t error;
    NCCL(ncclCommGetAsyncError(world, &error));
    CHECK(error == (rank == 0 ? ncclRemoteError : ncclSuccess));
}

static bool run_thread(int r, int n, ncclUniqueId id) {
    const size_t count = 50001;
    ncclComm_t comm;
    cudaStream_t own;
    float* p;
    std::vector<float> values(count, (float)r);
    bool right = ncclCommInitRank(&comm, n, id, r) == ncclSuccess;
    OK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    OK(cudaMalloc(&p, count * sizeof(float)));
    OK(cudaMemcpyAsync(p, values.data(), count * sizeof(float), cudaMemcpyHostToDevice, own));
    for (int round = 0; round < 20; round++) {
        add_one<<<(unsigned)(count + 255) / 256, 256, 0, own>>>(p, count);
        right &= ncclAllReduce(p, p, count, ncclFloat, ncclMax, comm, own) == ncclSuccess;
    }
    OK(cudaMemcpyAsync(values.data(), p, count * sizeof(float), cudaMemcpyDeviceToHost, own));
    OK(cudaStreamSynchronize(own));
    right &= values == std::vector<float>(count, (float)n + 19);
    return right && ncclCommDestroy(comm) == ncclSuccess;
}

// Several ranks in one process, which here may share a device. Under `lazy` one could run another's calls.
static void threads_as_ranks() {
    ncclUniqueId id;
    std::vector<std::thread> threads;
    bool right[3] = {};
    if (getenv("CPU_CUDA") && strstr(getenv("CPU_CUDA"), "lazy")) return;
    NCCL(ncclGetUniqueId(&id));
    for (int r = 0; r < 3; r++) threads.emplace_back([&, r] { right[r] = run_thread(r, 3, id); });
    for (std::thread& thread : threads) thread.join();
    for (bool good : right) CHECK(good);
}

static void test_mistake(void (*work)(), const char* statuses, std::vector<const char*> texts) {
    FILE* messages = tmpfile();
    CHECK(run_ranks(2, work, messages) == statuses);
    char text[4096];
    rewind(messages);
    text[fread(text, 1, sizeof text - 1, messages)] = 0;
    fclose(messages);
    for (const char* part : texts) {
        CHECK(strstr(text, part));
        if (!strstr(text, part)) printf("found: %s\nexpected: %s\n", text, part);
    }
}

static void test_mistakes() {
    std::string options = getenv("CPU_CUDA") ? getenv("CPU_CUDA") : "";
    setenv("CPU_CUDA", (options + ",timeout=1").c_str(), 1);
    CHECK(run_ranks(1, threads_as_ranks, NULL) == "p");
    test_mistake(call_different_things, "rr", {"ncclAllReduce(count 8, ncclFloat32, ncclSum) at ",
                                               "ncclBroadcast(count 7, ncclFloat32, root 0) at "});
    test_mistake(leave_first, "pp", {"rank 0 waits in ncclAllReduce", "for rank 1, which has ended or left"});
    test_mistake(never_come, "pp", {});
    test_mistake(never_call, "pp", {"for rank 1 (CPU_CUDA=timeout=1)"});
}
#else
static void test_mistakes() {}
#endif

static void count_devices() {
    int count = 0;
    OK(cudaGetDeviceCount(&count));
    shared->passed[0] = count;
    _exit(0);
}

int main() {
    void* memory = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared = (Shared*)memory;
    run_ranks(1, count_devices, NULL);          // in a process of its own: CUDA does not survive a fork
    int devices = passed;
    passed = 0;
    for (int n : {1, 2, 3, 4})
        if (n <= devices && (n != 2 || devices == 2))
            CHECK(run_ranks(n, all_tests, NULL) == std::string((size_t)n, 'p'));
    test_mistakes();
    return finish();
}
