// lab.cuh: what the programs of the kernel lab share. Each has one kernel, from naive to fast, and
//     ./program           checks every version against the functions of train_gpt_mhc.c
//     ./program profile   launches each once at one shape and says what it must move, for profile.py
//     ./program time      on a GPU: times each with the L2 cache flushed, against the bandwidth of a copy

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#pragma nv_diag_suppress 177, 114       // not all of the reference is used here, nor all that it calls
#define TESTING
#define GPU_TRAINER             // leaves out what the CPU computes a run with
#include "../../train_gpt_mhc.c"

#include <algorithm>
#include <functional>
#include <vector>

// ------------------------------------------------------------------------------------------------
// What train_gpt_mhc.cu has too

typedef __nv_bfloat16 floatX;

enum { WARP = 32 };
constexpr unsigned ALL_LANES = 0xffffffffu;

static void cuda_check(cudaError_t error, const char* call, int line) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "line %d: %s: %s\n", line, call, cudaGetErrorString(error));
    exit(EXIT_FAILURE);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)
#define LAUNCHED() CUDA(cudaGetLastError())

static int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ __forceinline__ float exp_saturated(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    return expf(x);
}

// Entry e of line k, where lines are rows or columns
template <int N, bool ROWS> __device__ __forceinline__ constexpr int entry_of(int k, int e) {
    return ROWS ? k * N + e : e * N + k;
}

// R = exp(R - max of its line)
template <int N, bool ROWS> __device__ __forceinline__ void exp_lines(float* R, bool shift) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        float max = R[entry_of<N, ROWS>(k, 0)];
#pragma unroll
        for (int e = 1; e < N; e++) max = R[entry_of<N, ROWS>(k, e)] > max ? R[entry_of<N, ROWS>(k, e)] : max;
        max = shift ? max : 0;
#pragma unroll
        for (int e = 0; e < N; e++) {
            float& entry = R[entry_of<N, ROWS>(k, e)];
            entry = exp_saturated(entry - max);
        }
    }
}

// Divides by the sums of lines. That of line k goes to sums[k * stride], unless sums is NULL.
template <int N, bool ROWS>
__device__ __forceinline__ void divide_lines(float* R, float* sums, size_t stride) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        float sum = 1e-12f;
#pragma unroll
        for (int e = 0; e < N; e++) sum += R[entry_of<N, ROWS>(k, e)];
        float inverse = 1 / sum;
#pragma unroll
        for (int e = 0; e < N; e++) R[entry_of<N, ROWS>(k, e)] *= inverse;
        if (sums) sums[k * stride] = sum;
    }
}

// Back through that division: R and its gradient d become what they were before it.
template <int N, bool ROWS>
__device__ __forceinline__ void divide_lines_backward(float* d, float* R, const float* sums, size_t stride) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        float along = 0, sum = sums[k * stride], inverse = 1 / sum;
#pragma unroll
        for (int e = 0; e < N; e++) along += d[entry_of<N, ROWS>(k, e)] * R[entry_of<N, ROWS>(k, e)];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float& entry = d[entry_of<N, ROWS>(k, e)];
            entry = (entry - along) * inverse;
            R[entry_of<N, ROWS>(k, e)] *= sum;
        }
    }
}

// d (16, 8) += a (16, 16) b (16, 8)
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane 8 i + r gives the shared address of row r of matrix i
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&a)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&a)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(row) : "memory");
}

// Copies to shared memory without registers; zeros where the source is not present, which is then not read
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

#include "mhc_fused.cuh"

// ------------------------------------------------------------------------------------------------
// Checks

static int passed, failed;
static uint64_t bits = 0x9e3779b97f4a7c15u; // of every result that must not depend on the order of threads

#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (condition) {                                                        \
            passed++;                                                           \
        } else {                                                                \
            failed++;                                                           \
            printf("FAIL %s:%d: ", __func__, __LINE__);                         \
            printf(__VA_ARGS__);                                                \
            printf("\n");                                                       \
        }                                                                       \
    } while (0)

// Relative L2 errors. Between a kernel's inputs and its results nothing is rounded to bf16, so results in
// fp32 differ by the rounding of their sums alone, 1e-7 sqrt(terms) and a digit that cancels on Sinkhorn's
// way back; those in bf16 by half a unit in the last place, 2^-8, more; what is kept as two parts in bf16 by
// 2^-8 of the second, which is at most 2^-8 of the first.
static const double FP32_TOLERANCE = 1e-5, HALF_UNIT = 1.0 / 256;
static const double BF16_TOLERANCE = FP32_TOLERANCE + HALF_UNIT;
static const double PARTS_TOLERANCE = FP32_TOLERANCE + HALF_UNIT * HALF_UNIT;

typedef std::vector<float> Numbers;

static float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// N(mean, deviation) numbers, already bf16's, a function of the seed
static Numbers random_numbers(uint64_t seed, size_t count, float deviation = 1, float mean = 0) {
    Numbers x(count);
    for (size_t i = 0; i < count; i++) x[i] = rounded(mean + deviation * (float)normal(seed, i));
    return x;
}
static Numbers numbers_at(const real* at, size_t count) { return Numbers(at, at + count); }

// Device memory of one tensor, freed at the end of its scope. Fresh memory is NaN, also on a GPU.
template <class T> struct Device {
    T* at = nullptr;
    size_t count;
    explicit Device(size_t n) : count(n) {
        CUDA(cudaMalloc(&at, (n ? n : 1) * sizeof(T)));
        CUDA(cudaMemset(at, 0xff, (n ? n : 1) * sizeof(T)));
    }
    explicit Device(const Numbers& from) : Device(from.size()) { put(from); }
    Device(const Device&) = delete;
    ~Device() { cudaFree(at); }
    void put(const Numbers& from) {
        std::vector<T> copy(from.begin(), from.end());
        if (count) CUDA(cudaMemcpy(at, copy.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    Numbers get() const {
        std::vector<T> raw(count);
        if (count) CUDA(cudaMemcpy(raw.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost));
        Numbers x(count);
        for (size_t i = 0; i < count; i++) x[i] = (float)raw[i];
        return x;
    }
};

static double relative_error(const Numbers& a, const Numbers& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < b.size(); i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    if (a.size() != b.size()) return INFINITY;
    return difference == 0 ? 0 : size == 0 ? INFINITY : sqrt(difference / size);
}

// A version's result against the reference's
static void compare(const char* version, const char* what, const Numbers& device, const Numbers& reference,
                    double tolerance) {
    double error = relative_error(device, reference);
    for (float x : device) {
        uint32_t word;
        memcpy(&word, &x, sizeof word);
        bits = hash64(bits, word);
    }
    CHECK(error <= tolerance, "%s: %s: relative error %.3g, expected at most %.3g", version, what, error,
          tolerance);
}

// ------------------------------------------------------------------------------------------------
// A connection with four streams at a random point, far from the initial values: logits of Sinkhorn several
// units apart. What the reference computes from a state x on. fn is what bf16 and its remainder hold, so that
// both sides have the same.

enum { N = FUSED_N, COEFS = FUSED_COEFS };

struct Case { int residual, C, rows, iters; };

struct Point {
    Config c;
    Model m;
    Sublayer s;
    int rows, C, M;
    char name[64];
    Numbers x, f, before, coef, mix, rnorm, u, stats, ln, fn_split;

    explicit Point(const Case& t) : rows(t.rows), C(t.C) {
        memset(&c, 0, sizeof c);
        c.L = c.NH = c.T = 1, c.V = 2, c.C = t.C, c.residual = t.residual, c.n = N, c.iters = t.iters;
        c.order = ORDER_CR, c.maps = 7, c.gap = 4;
        M = projection_M(&c);
        snprintf(name, sizeof name, "%s, C %d, rows %d", identity() ? "ihc" : "mhc", C, rows);
        model_layout(&m, &c);
        m.params =
            (real*)allocate(m.size, sizeof(real)); // of the rest of the model too, which is not touched
        m.grads = (real*)allocate(m.size, sizeof(real));
        fill();
        size_t r = (size_t)rows, width = (size_t)C;
        x = random_numbers(1, r * N * width, 1, 0.3f);
        f = random_numbers(2, r * width);
        coef.resize(r * COEFS), mix.resize(r * M), rnorm.resize(r), u.resize(r * width);
        stats.resize(r * 2), ln.resize(r * width);
        before.resize(r * COEFS);                               // coefficients of the sublayer before
        Numbers other = random_numbers(7, r * M);
        for (int row = 0; row < rows; row += LANES)
            coefficients_forward(&before[(size_t)row * COEFS], &c, &other[(size_t)row * M],
                                 connection_of(&m, 1), min_int(LANES, rows - row));
        forward(x);
    }
    ~Point() {
        free(m.params);
        free(m.grads);
        model_close(&m);
    }
    Point(const Point&) = delete;
    bool identity() const { return c.residual == RESIDUAL_IHC; }

    void fill() {
        size_t count = (size_t)M * N * C;
        fn_split.resize(2 * count);
        for (size_t i = 0; i < count; i++) {
            float value = (float)(normal(3, i) / sqrt((double)N * C)), high = rounded(value);
            fn_split[i] = high;
            fn_split[count + i] = rounded(value - high);
            fn()[i] = high + fn_split[count + i];
        }
        for (int i = 0; i < M; i++) base()[i] = (float)(normal(4, i) * (i < 2 * N ? 1 : 2.5));
        for (int i = 0; i < (identity() ? 2 : 3); i++) scale()[i] = 0.5f + 0.3f * (float)i;
        Numbers w = random_numbers(5, C, 0.3f, 1), b = random_numbers(6, C, 0.3f);
        std::copy(w.begin(), w.end(), param(&m, LN_2_W, 0));
        std::copy(b.begin(), b.end(), param(&m, LN_2_B, 0));
        for (TensorId id : {MLP_FN, MLP_BASE, MLP_SCALE, LN_2_W, LN_2_B})       // what is added to
            for (int i = 0; i < m.tensor_count; i++)
                if (m.tensors[i].spec == &tensor_specs[id])
                    for (size_t e = 0; e < tensor_size(&m.tensors[i]); e++)
                        grad(&m, id, 0)[e] = (float)normal(11 + (uint64_t)id, e);
    }
    // The reference from a state on; s is what a way back starts from.
    void forward(const Numbers& state) {
        Span span = {rows, 1, 0, rows};
        memset(&s, 0, sizeof s);
        s.coef = coef.data(), s.mix = mix.data(), s.rnorm = rnorm.data(), s.u = u.data();
        s.stats = stats.data(), s.ln = ln.data(), s.f = f.data();
        connection_forward(&m, &s, state.data(), 1, span);
    }
    // The state after the write of the sublayer before
    Numbers written() {
        Numbers y(x.size());
        Sublayer sub = s;
        sub.coef = before.data();
        Span span = {rows, 1, 0, rows};
        connection_write(&c, y.data(), x.data(), &sub, span);
        return y;
    }
    real* fn() { return param(&m, MLP_FN, 0); }
    real* base() { return param(&m, MLP_BASE, 0); }
    real* scale() { return param(&m, MLP_SCALE, 0); }
    real* weight() { return param(&m, LN_2_W, 0); }
    real* bias() { return param(&m, LN_2_B, 0); }
};

// ------------------------------------------------------------------------------------------------
// Speed

// Bytes that a block may have at most on this device
static int shared_limit() {
    int bytes = 0;
    CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    return bytes;
}

// What a version must move at least, of data and of what is read once a launch; dev/cuda/profile.py compares.
static void print_floor(const char* kernel, double data, double once) {
    printf("floor %s %.0f %.0f\n", kernel, data, once);
}

#ifndef __CPU_CUDA__
static __global__ void copy_kernel(uint4* to, const uint4* from, size_t count) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = from[i];
}

// Microseconds of a launch with nothing in the L2 cache: the median of 11
static double microseconds(const std::function<void()>& launch) {
    enum { FLUSH = 1 << 28, RUNS = 11 };
    static void* other = nullptr;
    if (!other) CUDA(cudaMalloc(&other, FLUSH));
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    std::vector<float> ms(RUNS);
    for (float& t : ms) {
        CUDA(cudaMemsetAsync(other, 1, FLUSH));
        CUDA(cudaEventRecord(start));
        launch();
        CUDA(cudaEventRecord(stop));
        CUDA(cudaEventSynchronize(stop));
        CUDA(cudaEventElapsedTime(&t, start, stop));
    }
    std::sort(ms.begin(), ms.end());
    return 1e3 * ms[RUNS / 2];
}

// Bytes a microsecond, read and written, of a copy of 1 GB
static double copy_bandwidth() {
    static double found = 0;
    size_t count = (size_t)1 << 25;
    if (found > 0) return found;
    Device<char> from(count * sizeof(uint4)), to(count * sizeof(uint4));
    double us = microseconds([&] { copy_kernel<<<8192, 256>>>((uint4*)to.at, (uint4*)from.at, count); });
    found = 2.0 * (double)count * sizeof(uint4) / us;
    return found;
}

static void print_time(const char* version, const char* shape, double bytes,
                       const std::function<void()>& launch) {
    launch();
    double us = microseconds(launch);
    printf("%-28s %-26s %9.1f us %8.0f GB/s %6.1f %% of copy\n", version, shape, us, 1e-3 * bytes / us,
           100 * bytes / us / copy_bandwidth());
}
#else
[[maybe_unused]] static void print_time(const char*, const char*, double, const std::function<void()>&) {
    fprintf(stderr, "time: found no GPU, expected one, build with nvcc\n");
    exit(2);
}
#endif

typedef void LabPart();
static int lab(int argc, char** argv, LabPart* test, LabPart* profile, LabPart* time) {
    const char* what = argc > 1 ? argv[1] : "";
    if (argc > 2 || (*what && strcmp(what, "profile") != 0 && strcmp(what, "time") != 0)) {
        fprintf(stderr, "%s: found %s, expected profile, time or nothing\n", argv[0], what);
        return 2;
    }
    (*what == 'p' ? profile : *what == 't' ? time : test)();
    CUDA(cudaDeviceSynchronize());
    if (*what) return 0;
    printf("bits %016llx\n%d passed, %d failed\n", (unsigned long long)bits, passed, failed);
    return failed != 0;
}
