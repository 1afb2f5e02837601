// train_gpt_mhc.cu: the trainer of train_gpt_mhc.c on a GPU: same command line, same files, same mathematics.
// What is not GPU work is that file's own: it is included whole, and each kernel here is held against its
// function there by test_gpt_mhc.cu.
//
// Letters as there: B sequences, T positions, C channels, V vocabulary, L blocks, n streams, M outputs of a
// projection, rows = B * T. A pointer's comment is its shape. Activations and their gradients are floatX
// (bf16, or fp32 with PRECISION=FP32); parameters have fp32 masters, which the optimiser updates, and floatX
// copies, which the products read. Coefficients of the connections, statistics, losses and gradients of
// parameters are fp32. No float atomics: a sum has one order, so the same seed gives the same bits.

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef HAVE_NCCL
#include <nccl.h>
#endif

#pragma nv_diag_suppress 177    // not all of the reference is used here
#define GPU_TRAINER             // leaves out what the CPU computes a run with, and main
#include "train_gpt_mhc.c"

// ------------------------------------------------------------------------------------------------
// Types, errors, and what every kernel uses

#ifdef PRECISION_FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif

enum { WARP = 32 };
constexpr unsigned ALL_LANES = 0xffffffffu;

static void cuda_check(cudaError_t error, const char* call, int line) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "train_gpt_mhc.cu:%d: %s: %s\n", line, call, cudaGetErrorString(error));
    exit(EXIT_FAILURE);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)
// After each launch: what is wrong with its shape shows there, not at the next call.
#define LAUNCHED() CUDA(cudaGetLastError())

static bool has_happened(cudaEvent_t event) {
    cudaError_t state = cudaEventQuery(event);
    if (state == cudaErrorNotReady) (void)cudaGetLastError();   // no error, but kept as the last one
    else CUDA(state);
    return state == cudaSuccess;
}

static int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// The sum over a warp, the same in every lane: always added in the same order.
__device__ __forceinline__ float warp_sum(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Over a block of whole warps (at most 32), the same in every thread. May be called again at once.
template <class Combine>
__device__ __forceinline__ float block_combine(float x, float neutral, Combine combine_warp) {
    __shared__ float partial[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = combine_warp(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = combine_warp(lane < warps ? partial[lane] : neutral);
    __syncthreads();            // partial may be written again
    return x;
}
__device__ __forceinline__ float block_sum(float x) {
    return block_combine(x, 0.0f, [](float v) { return warp_sum(v); });
}
__device__ __forceinline__ float block_max(float x) {
    return block_combine(x, -INFINITY, [](float v) { return warp_max(v); });
}
// ------------------------------------------------------------------------------------------------
// Memory 16 bytes at a time. Kernels that walk along rows of floatX have a template argument N: SEVERAL where
// all rows begin at a multiple of 16 bytes, else 1, which is right for every size.

enum { SEVERAL = 16 / sizeof(floatX), ELEMENT_THREADS = 256 };

template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Several { T x[N]; };

template <int N, class T> __device__ __forceinline__ void load_several(float (&x)[N], const T* from) {
    Several<T, N> raw = *(const Several<T, N>*)from;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(raw.x[i]);
}
template <int N, class T> __device__ __forceinline__ void store_several(T* to, const float (&x)[N]) {
    Several<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; i++) raw.x[i] = from_float<T>(x[i]);
    *(Several<T, N>*)to = raw;
}

// How many numbers a kernel may take at a time: rows of `width`, the first of which begin at these addresses.
static int several_of(size_t width, std::initializer_list<const void*> starts) {
    for (const void* start : starts)
        if ((uintptr_t)start % 16) return 1;
    return width % SEVERAL ? 1 : SEVERAL;
}

// kernel<N><<<blocks, threads, 0, stream>>>(..)
#define LAUNCH_SEVERAL(N, kernel, blocks, threads, stream, ...)                                              \
    do {                                                                                                     \
        if (N == SEVERAL) kernel<SEVERAL><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                      \
        else kernel<1><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                                         \
        LAUNCHED();                                                                                          \
    } while (0)

// ------------------------------------------------------------------------------------------------
// Sums over rows, in two phases: blocks sum slabs of SUM_ROWS rows, then add_slabs adds the slabs' sums. Both
// in an order that depends on the sizes alone.

enum { SUM_LINES = 8, SUM_ROWS = 128 };         // blocks of (WARP, SUM_LINES) threads, lanes along columns

// The sums over the lines of a block, in line 0
template <int N> __device__ __forceinline__ void sum_lines(float (&x)[N]) {
    __shared__ float lines[SUM_LINES][N][WARP];
#pragma unroll
    for (int i = 0; i < N; i++) lines[threadIdx.y][i][threadIdx.x] = x[i];
    __syncthreads();
    for (int l = 1; l < SUM_LINES && threadIdx.y == 0; l++)
#pragma unroll
        for (int i = 0; i < N; i++) x[i] += lines[l][i][threadIdx.x];
    __syncthreads();                                            // lines may be written again
}

static __global__ void add_slabs_kernel(float* first, int first_cols, float* second, int cols,
                                        const float* slabs, int count) {
    int col = blockIdx.x * WARP + threadIdx.x;
    float sum[1] = {0};
    for (int s = threadIdx.y; s < count && col < cols; s += SUM_LINES)
        sum[0] += slabs[(size_t)s * cols + col];
    sum_lines(sum);
    if (threadIdx.y || col >= cols) return;
    if (col < first_cols) first[col] += sum[0];
    else second[col - first_cols] += sum[0];
}
// first (first_cols), then second (second_cols) += the sum over slabs (count, first_cols + second_cols)
static void add_slabs_gpu(float* first, int first_cols, float* second, int second_cols, const float* slabs,
                          int count, cudaStream_t stream) {
    int cols = first_cols + second_cols;
    dim3 threads(WARP, SUM_LINES);
    add_slabs_kernel<<<ceil_div(cols, WARP), threads, 0, stream>>>(first, first_cols, second, cols, slabs,
                                                                   count);
    LAUNCHED();
}

template <int N, class T>
static __global__ void sum_columns_kernel(float* slabs, const T* terms, int rows, int cols) {
    int col = (blockIdx.y * WARP + threadIdx.x) * N, first = blockIdx.x * SUM_ROWS;
    int last = min(first + SUM_ROWS, rows);
    float sums[N] = {}, x[N];
    for (int row = first + threadIdx.y; row < last && col < cols; row += SUM_LINES) {
        load_several(x, terms + (size_t)row * cols + col);
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] += x[i];
    }
    sum_lines(sums);
    if (threadIdx.y == 0 && col < cols) store_several(slabs + (size_t)blockIdx.x * cols + col, sums);
}
// first (first_cols), then second (second_cols) += the column sums of terms (rows, first_cols + second_cols).
// slabs: sum_scratch(rows, columns)
template <class T>
static void sum_columns_gpu(float* first, int first_cols, float* second, int second_cols, float* slabs,
                            const T* terms, int rows, cudaStream_t stream) {
    int cols = first_cols + second_cols, N = several_of(cols, {terms, slabs});
    dim3 blocks(ceil_div(rows, SUM_ROWS), ceil_div(cols, WARP * N)), threads(WARP, SUM_LINES);
    LAUNCH_SEVERAL(N, sum_columns_kernel, blocks, threads, stream, slabs, terms, rows, cols);
    add_slabs_gpu(first, first_cols, second, second_cols, slabs, blocks.x, stream);
}
// Floats of scratch for the sums of so many columns
static size_t sum_scratch(int rows, int cols) { return (size_t)ceil_div(rows, SUM_ROWS) * (size_t)cols; }

// ------------------------------------------------------------------------------------------------
// tanh approximation of GELU: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

__device__ __forceinline__ float gelu_tanh(float x) {
    return tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1 + gelu_tanh(x)); }
__device__ __forceinline__ float gelu_slope(float x) {
    float t = gelu_tanh(x), ds = 0.7978845608028654f * (1 + 0.134145f * x * x);
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * ds;
}

template <int N> static __global__ void gelu_forward_kernel(floatX* out, const floatX* in, size_t count) {
    size_t at = ((size_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * N;
    float x[N];
    if (at >= count) return;
    load_several(x, in + at);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = gelu(x[i]);
    store_several(out + at, x);
}
// out (count) = gelu(in)
static void gelu_forward_gpu(floatX* out, const floatX* in, size_t count, cudaStream_t stream) {
    int N = several_of(count, {out, in}), blocks = ceil_div(count, (size_t)N * ELEMENT_THREADS);
    LAUNCH_SEVERAL(N, gelu_forward_kernel, blocks, ELEMENT_THREADS, stream, out, in, count);
}

template <int N> static __global__ void gelu_backward_kernel(floatX* d, const floatX* in, size_t count) {
    size_t at = ((size_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * N;
    float x[N], dx[N];
    if (at >= count) return;
    load_several(x, in + at);
    load_several(dx, d + at);
#pragma unroll
    for (int i = 0; i < N; i++) dx[i] *= gelu_slope(x[i]);
    store_several(d + at, dx);
}
// d (count) holds the gradient of the output and gets that of the input
static void gelu_backward_gpu(floatX* d, const floatX* in, size_t count, cudaStream_t stream) {
    int N = several_of(count, {d, in}), blocks = ceil_div(count, (size_t)N * ELEMENT_THREADS);
    LAUNCH_SEVERAL(N, gelu_backward_kernel, blocks, ELEMENT_THREADS, stream, d, in, count);
}

static __global__ void add_bias_kernel(floatX* out, const floatX* bias, size_t count, int cols) {
    size_t at = (size_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (at < count) out[at] = from_float<floatX>(to_float(out[at]) + to_float(bias[at % cols]));
}
// out (rows, cols) += bias (cols)
static void add_bias_gpu(floatX* out, const floatX* bias, int rows, int cols, cudaStream_t stream) {
    size_t count = (size_t)rows * (size_t)cols;
    add_bias_kernel<<<ceil_div(count, ELEMENT_THREADS), ELEMENT_THREADS, 0, stream>>>(out, bias, count, cols);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// Matrix products, by cuBLASLt. What it must be told of one, and the algorithm that it proposes, are kept in
// a table: a step asks for the same few dozen products again and again. cuBLAS has matrices by columns, so
// what is (rows, cols) here is (cols, rows) there.

typedef struct {                // D (m, n) = op(A) op(B), by columns. Only ints: compared as bytes
    int m, n, k, transpose_a, transpose_b;
    int adds;                   // D is fp32 and gets +=; else it is floatX and gets =
    int epilogue;               // cublasLtEpilogue_t
    int alignment[5];           // bytes, at most 16: of A, B, D, bias, aux
} ProductKey;

typedef struct {
    ProductKey key;
    bool exists;                // not every epilogue does for every shape
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
} Product;

typedef struct Lt {
    cublasLtHandle_t handle;
    void* workspace;            // of every product: they follow each other in one stream
    size_t workspace_bytes;
    bool fuses_gelu;        // GELU and its gradient in the product, where cuBLASLt can
    Product* products;
    int count, room;
} Lt;

static void cublas_check(cublasStatus_t status, const char* call, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "train_gpt_mhc.cu:%d: %s: cuBLASLt status %d\n", line, call, (int)status);
    exit(EXIT_FAILURE);
}
#define CUBLAS(call) cublas_check(call, #call, __LINE__)

#ifdef HAVE_NCCL
static void nccl_check(ncclResult_t result, const char* call, int line) {
    if (result == ncclSuccess) return;
    fprintf(stderr, "train_gpt_mhc.cu:%d: %s: %s\n", line, call, ncclGetErrorString(result));
    exit(EXIT_FAILURE);
}
#define NCCL(call) nccl_check(call, #call, __LINE__)
#endif

// In fp32 GELU is ours: how exact the library's tanh is it does not say. In bf16 it goes into the product
// from Hopper on, whose products leave time for it.
static void lt_open(Lt* lt, void* workspace, size_t bytes) {
    int major = 0, device = 0;
    memset(lt, 0, sizeof *lt);
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    lt->workspace = workspace;
    lt->workspace_bytes = bytes;
    lt->fuses_gelu = sizeof(floatX) == 2 && major >= 9;
    CUBLAS(cublasLtCreate(&lt->handle));
}

static void product_close(Product* p) {
    CUBLAS(cublasLtMatmulDescDestroy(p->operation));
    for (cublasLtMatrixLayout_t layout : {p->a, p->b, p->d}) CUBLAS(cublasLtMatrixLayoutDestroy(layout));
}

static void lt_close(Lt* lt) {
    for (int i = 0; i < lt->count; i++) product_close(&lt->products[i]);
    free(lt->products);
    CUBLAS(cublasLtDestroy(lt->handle));
}

// What a product works on; bias and aux only for the epilogues that have them. aux is as large as D: with
// GELU it gets what GELU is applied to, with its gradient it holds that.
typedef struct { const void *A, *B; void* D; const void* bias; const void* aux; } Operands;

static int alignment_of(const void* p) {
    int bytes = 16;             // the widest access that there is; NULL has it too
    while ((uintptr_t)p % bytes) bytes /= 2;
    return bytes;
}

static void set_operation(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute,
                          const void* value, size_t size) {
    CUBLAS(cublasLtMatmulDescSetAttribute(operation, attribute, value, size));
}

static void set_pointers(const Product* p, const Operands* o) {
    if (o->bias) set_operation(p->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o->bias, sizeof o->bias);
    if (o->aux)
        set_operation(p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &o->aux, sizeof o->aux);
}

static void describe_product(Product* p, const Operands* o) {
    const ProductKey* k = &p->key;
    cublasOperation_t a = k->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                      b = k->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)k->epilogue;
    cudaDataType_t type = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    int64_t aux_stride = k->m;
    CUBLAS(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));    // never TF32
    set_operation(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a);
    set_operation(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b);
    set_operation(p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (o->aux)
        set_operation(p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_stride, sizeof aux_stride);
    set_pointers(p, o);
    int a_rows = k->transpose_a ? k->k : k->m, a_cols = k->transpose_a ? k->m : k->k;
    int b_rows = k->transpose_b ? k->n : k->k, b_cols = k->transpose_b ? k->k : k->n;
    CUBLAS(cublasLtMatrixLayoutCreate(&p->a, type, a_rows, a_cols, a_rows));
    CUBLAS(cublasLtMatrixLayoutCreate(&p->b, type, b_rows, b_cols, b_rows));
    CUBLAS(cublasLtMatrixLayoutCreate(&p->d, k->adds ? CUDA_R_32F : type, k->m, k->n, k->m));
}

// The algorithm that cuBLASLt thinks fastest, if it has one
static void choose_algorithm(const Lt* lt, Product* p) {
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                &lt->workspace_bytes, sizeof lt->workspace_bytes));
    for (int i = 0; i < 4; i++) {
        uint32_t bytes = (uint32_t)p->key.alignment[i < 2 ? i : 2];    // C is D
        CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &bytes, sizeof bytes));
    }
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt->handle, p->operation, p->a, p->b, p->d, p->d,
                                                           preference, 1, &best, &found);
    CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
    p->exists = status == CUBLAS_STATUS_SUCCESS && found > 0;
    if (p->exists) p->algorithm = best.algo;
    else if (p->key.epilogue == CUBLASLT_EPILOGUE_DEFAULT)
        die("cuBLASLt: found no algorithm (status %d) for a product (%d, %d)%s with (%d, %d)%s at addresses "
            "aligned to %d, %d and %d bytes, expected one, try another --width or --batch",
            (int)status, p->key.m, p->key.k, p->key.transpose_a ? " transposed" : "", p->key.k, p->key.n,
            p->key.transpose_b ? " transposed" : "", p->key.alignment[0], p->key.alignment[1],
            p->key.alignment[2]);
}

static Product* find_product(Lt* lt, const ProductKey* key, const Operands* o) {
    for (int i = 0; i < lt->count; i++)
        if (!memcmp(&lt->products[i].key, key, sizeof *key)) return &lt->products[i];
    if (lt->count == lt->room) {
        lt->room = lt->room ? 2 * lt->room : 64;
        lt->products = (Product*)realloc(lt->products, (size_t)lt->room * sizeof(Product));
        if (!lt->products) die("out of memory: %d products asked for, reduce the model", lt->room);
    }
    Product* p = &lt->products[lt->count++];
    memset(p, 0, sizeof *p);
    p->key = *key;
    describe_product(p, o);
    choose_algorithm(lt, p);
    return p;
}

// cuBLASLt's rules for what an epilogue reads and writes: bias and aux aligned, rows of aux (m numbers) too
static bool epilogue_can_be(const ProductKey* key, const Operands* o) {
    return key->epilogue == CUBLASLT_EPILOGUE_DEFAULT ||
           (key->alignment[3] == 16 && key->alignment[4] == 16 && (!o->aux || key->m % 8 == 0));
}

// False if there is no such epilogue; then nothing is done.
static bool product_gpu(Lt* lt, ProductKey key, Operands o, cudaStream_t stream) {
    const void* addresses[] = {o.A, o.B, o.D, o.bias, o.aux};
    assert(key.m > 0 && key.n > 0 && key.k > 0);
    for (int i = 0; i < 5; i++) key.alignment[i] = alignment_of(addresses[i]);
    if (!epilogue_can_be(&key, &o)) return false;
    const Product* p = find_product(lt, &key, &o);
    const float one = 1, beta = key.adds ? 1 : 0;
    if (!p->exists) return false;
    set_pointers(p, &o);
    CUBLAS(cublasLtMatmul(lt->handle, p->operation, &one, o.A, p->a, o.B, p->b, &beta, o.D, p->d, o.D, p->d,
                          &p->algorithm, lt->workspace, lt->workspace_bytes, stream));
    return true;
}

// ------------------------------------------------------------------------------------------------
// Linear layers. Gradients of inputs are written (=), gradients of parameters added (+=).
// Where the library has no epilogue, a kernel of ours follows the product, which is rounded in between.

// out (rows, OC) = in (rows, IC) weight^T + bias, weight (OC, IC), bias (OC) or NULL. With gelu (rows, OC)
// also gelu = gelu(out)
static void linear_forward_gpu(Lt* lt, floatX* out, floatX* gelu, const floatX* in, const floatX* weight,
                               const floatX* bias, int rows, int IC, int OC, cudaStream_t stream) {
    ProductKey key = {OC, rows, IC, true, false, false, CUBLASLT_EPILOGUE_DEFAULT, {}};
    if (gelu) {
        key.epilogue = bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
        if (lt->fuses_gelu && product_gpu(lt, key, {weight, in, gelu, bias, out}, stream)) return;
        linear_forward_gpu(lt, out, NULL, in, weight, bias, rows, IC, OC, stream);
        gelu_forward_gpu(gelu, out, (size_t)rows * (size_t)OC, stream);
        return;
    }
    key.epilogue = CUBLASLT_EPILOGUE_BIAS;
    if (bias && product_gpu(lt, key, {weight, in, out, bias, NULL}, stream)) return;
    key.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    product_gpu(lt, key, {weight, in, out, NULL, NULL}, stream);
    if (bias) add_bias_gpu(out, bias, rows, OC, stream);
}

// din (rows, IC) = dout (rows, OC) weight; with before_gelu (rows, IC), the input is gelu(before_gelu), and
// din the gradient of before_gelu
static void linear_backward_input_gpu(Lt* lt, floatX* din, const floatX* dout, const floatX* weight,
                                      const floatX* before_gelu, int rows, int IC, int OC,
                                      cudaStream_t stream) {
    ProductKey key = {IC, rows, OC, false, false, false, CUBLASLT_EPILOGUE_DGELU, {}};
    if (before_gelu && lt->fuses_gelu &&
        product_gpu(lt, key, {weight, dout, din, NULL, before_gelu}, stream))
        return;
    key.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    product_gpu(lt, key, {weight, dout, din, NULL, NULL}, stream);
    if (before_gelu) gelu_backward_gpu(din, before_gelu, (size_t)rows * (size_t)IC, stream);
}

// dweight (OC, IC) += dout^T in, in fp32
static void weight_gradient_gpu(Lt* lt, float* dweight, const floatX* dout, const floatX* in, int rows,
                                int IC, int OC, cudaStream_t stream) {
    ProductKey key = {IC, OC, rows, false, true, true, CUBLASLT_EPILOGUE_DEFAULT, {}};
    product_gpu(lt, key, {in, dout, dweight, NULL, NULL}, stream);
}

// dweight (OC, IC), dbias (OC) += from dout (rows, OC), in (rows, IC). slabs: sum_scratch(rows, OC)
static void linear_backward_weight_gpu(Lt* lt, float* dweight, float* dbias, const floatX* dout,
                                       const floatX* in, int rows, int IC, int OC, float* slabs,
                                       cudaStream_t stream) {
    weight_gradient_gpu(lt, dweight, dout, in, rows, IC, OC, stream);
    sum_columns_gpu(dbias, OC, (float*)NULL, 0, slabs, dout, rows, stream);
}

// ------------------------------------------------------------------------------------------------
// Both ends and the norm: embedding, LayerNorm, the mean over the streams, cross-entropy. Where channels are
// walked a warp has a row, each lane N channels at a time.

enum {
    ROW_THREADS = 128,          // of a block whose warps have a row each
    ROWS_A_BLOCK = ROW_THREADS / WARP,
    CHANNEL_THREADS = 128,      // a block has a row, its threads N channels each
    CLASSIFIER_THREADS = 256,   // a block has a row of logits
};
static_assert(ROW_THREADS % WARP == 0 && CHANNEL_THREADS % WARP == 0 && CLASSIFIER_THREADS % WARP == 0,
              "blocks have whole warps");

// --- embedding

template <int N>
static __global__ void embedding_forward_kernel(floatX* x, const int32_t* tokens, const floatX* wte,
                                                const floatX* wpe, int T, int n, int C) {
    size_t row = blockIdx.x;
    float token[N], position[N];
    wte += (size_t)tokens[row] * C, wpe += row % T * C, x += row * n * C;
    for (int ch = threadIdx.x * N; ch < C; ch += CHANNEL_THREADS * N) {
        load_several(token, wte + ch);
        load_several(position, wpe + ch);
#pragma unroll
        for (int i = 0; i < N; i++) token[i] += position[i];
        for (int stream = 0; stream < n; stream++) store_several(x + stream * C + ch, token);
    }
}
// x (rows, n, C): n copies of wte[token] + wpe[position], positions 0 .. T again and again
static void embedding_forward_gpu(floatX* x, const int32_t* tokens, const floatX* wte, const floatX* wpe,
                                  int rows, int T, int n, int C, cudaStream_t stream) {
    int N = several_of(C, {x, wte, wpe});
    LAUNCH_SEVERAL(N, embedding_forward_kernel, rows, CHANNEL_THREADS, stream, x, tokens, wte, wpe, T, n, C);
}

// Rows by their token, each token's in their order: those of token[g] are order[r] with
// first[g] <= r < first[g + 1].
typedef struct {
    int32_t *order, *first, *token;     // (rows), (rows + 1), (rows): at most as many groups as rows
    int count;
} TokenGroups;

// A pass of a stable counting sort, by 12 bits of the token. from: rows in their order so far, or NULL.
enum { DIGIT_BITS = 12, DIGITS = 1 << DIGIT_BITS };
static void sort_by_digit(int32_t* to, const int32_t* from, const int32_t* tokens, int rows, int shift) {
    int place[DIGITS + 1] = {0};
    for (int r = 0; r < rows; r++) place[(tokens[r] >> shift & (DIGITS - 1)) + 1]++;
    for (int d = 0; d < DIGITS; d++) place[d + 1] += place[d];
    for (int r = 0; r < rows; r++) {
        int32_t row = from ? from[r] : r;
        to[place[tokens[row] >> shift & (DIGITS - 1)]++] = row;
    }
}

// Fills order, first, token on the host from tokens (rows); returns the number of groups.
static int token_groups(int32_t* order, int32_t* first, int32_t* token, const int32_t* tokens, int rows,
                        int V) {
    int count = 0;
    assert(V <= 1 << 2 * DIGIT_BITS);
    sort_by_digit(token, NULL, tokens, rows, 0);
    sort_by_digit(order, token, tokens, rows, DIGIT_BITS);
    for (int r = 0; r < rows; r++) {
        if (r > 0 && tokens[order[r]] == token[count - 1]) continue;
        first[count] = r;
        token[count++] = tokens[order[r]];
    }
    first[count] = rows;
    return count;
}

// A block has a group and some channels; its lines take the group's rows in turns.
template <int N>
static __global__ void token_gradients_kernel(float* dwte, const floatX* dx, const int32_t* order,
                                              const int32_t* first, const int32_t* token, int n, int C) {
    int ch = (blockIdx.y * WARP + threadIdx.x) * N, last = first[blockIdx.x + 1];
    float sums[N] = {}, x[N];
    for (int r = first[blockIdx.x] + threadIdx.y; r < last && ch < C; r += SUM_LINES) {
        const floatX* d = dx + (size_t)order[r] * n * C + ch;
        for (int stream = 0; stream < n; stream++) {
            load_several(x, d + stream * C);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += x[i];
        }
    }
    sum_lines(sums);
    if (threadIdx.y || ch >= C) return;
    dwte += (size_t)token[blockIdx.x] * C + ch;
#pragma unroll
    for (int i = 0; i < N; i++) dwte[i] += sums[i];
}

template <int N>
static __global__ void position_gradients_kernel(float* dwpe, const floatX* dx, int rows, int T, int n,
                                                 int C) {
    int ch = (blockIdx.y * CHANNEL_THREADS + threadIdx.x) * N;
    float sums[N] = {}, x[N];
    if (ch >= C) return;
    for (int row = blockIdx.x; row < rows; row += T)
        for (int stream = 0; stream < n; stream++) {
            load_several(x, dx + ((size_t)row * n + stream) * C + ch);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += x[i];
        }
    dwpe += (size_t)blockIdx.x * C + ch;
#pragma unroll
    for (int i = 0; i < N; i++) dwpe[i] += sums[i];
}
// dwte (V, C) +=, dwpe (T, C) += from dx (rows, n, C), rows a multiple of T
static void embedding_backward_gpu(float* dwte, float* dwpe, const floatX* dx, const TokenGroups* groups,
                                   int rows, int T, int n, int C, cudaStream_t stream) {
    int N = several_of(C, {dx});
    dim3 blocks(groups->count, ceil_div(C, WARP * N)), threads(WARP, SUM_LINES);
    dim3 position_blocks(T, ceil_div(C, CHANNEL_THREADS * N));
    assert(rows % T == 0);
    LAUNCH_SEVERAL(N, token_gradients_kernel, blocks, threads, stream, dwte, dx, groups->order, groups->first,
                   groups->token, n, C);
    LAUNCH_SEVERAL(N, position_gradients_kernel, position_blocks, CHANNEL_THREADS, stream, dwpe, dx, rows, T,
                   n, C);
}

// --- LayerNorm

// The row of this warp, and the first channel of this lane
__device__ __forceinline__ int row_of_warp() { return blockIdx.x * ROWS_A_BLOCK + threadIdx.x / WARP; }
template <int N> __device__ __forceinline__ int first_channel() { return threadIdx.x % WARP * N; }

// One row, by a warp: out (C) = (u - mean) rstd weight + bias; stats = {mean, rstd}
template <int N>
__device__ __forceinline__ void layernorm_row(floatX* out, float* stats, const floatX* u,
                                              const floatX* weight, const floatX* bias, int C) {
    float mean = 0, variance = 0, x[N], w[N], b[N];
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load_several(x, u + ch);
#pragma unroll
        for (int i = 0; i < N; i++) mean += x[i];
    }
    mean = warp_sum(mean) / C;
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load_several(x, u + ch);
#pragma unroll
        for (int i = 0; i < N; i++) variance += (x[i] - mean) * (x[i] - mean);
    }
    float rstd = 1 / sqrtf(warp_sum(variance) / C + 1e-5f);
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load_several(x, u + ch);
        load_several(w, weight + ch);
        load_several(b, bias + ch);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = (x[i] - mean) * rstd * w[i] + b[i];
        store_several(out + ch, x);
    }
    if (threadIdx.x % WARP == 0) stats[0] = mean, stats[1] = rstd;
}

template <int N>
static __global__ void layernorm_forward_kernel(floatX* out, float* stats, const floatX* u,
                                                const floatX* weight, const floatX* bias, int rows, int C) {
    size_t row = row_of_warp();
    if (row < (size_t)rows) layernorm_row<N>(out + row * C, stats + row * 2, u + row * C, weight, bias, C);
}
// out (rows, C) = LayerNorm(u); stats (rows, 2) = {mean, rstd}
static void layernorm_forward_gpu(floatX* out, float* stats, const floatX* u, const floatX* weight,
                                  const floatX* bias, int rows, int C, cudaStream_t stream) {
    int N = several_of(C, {out, u, weight, bias});
    LAUNCH_SEVERAL(N, layernorm_forward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, out, stats,
                   u, weight, bias, rows, C);
}

// One row, by a warp: write(ch, du) is called with the gradient of u at channels ch .. ch + N
template <int N, class Write>
__device__ __forceinline__ void layernorm_row_backward(const floatX* dout, const float* stats,
                                                       const floatX* u, const floatX* weight, int C,
                                                       Write write) {
    float mean = stats[0], rstd = stats[1], sum = 0, along = 0, d[N], x[N], w[N];
    auto load = [&](int ch) {                   // d = weight dout, x = the normalised input
        load_several(d, dout + ch);
        load_several(x, u + ch);
        load_several(w, weight + ch);
#pragma unroll
        for (int i = 0; i < N; i++) d[i] *= w[i], x[i] = (x[i] - mean) * rstd;
    };
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load(ch);
#pragma unroll
        for (int i = 0; i < N; i++) sum += d[i], along += d[i] * x[i];
    }
    sum = warp_sum(sum) / C;
    along = warp_sum(along) / C;
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load(ch);
#pragma unroll
        for (int i = 0; i < N; i++) d[i] = (d[i] - sum - x[i] * along) * rstd;
        write(ch, d);
    }
}

template <int N>
static __global__ void layernorm_backward_kernel(floatX* du, const floatX* past, const floatX* dout,
                                                 const float* stats, const floatX* u, const floatX* weight,
                                                 int rows, int C) {
    size_t row = row_of_warp();
    if (row >= (size_t)rows) return;
    du += row * C;
    auto write = [=](int ch, float (&d)[N]) {
        float before[N] = {};
        if (past) load_several(before, past + row * C + ch);
#pragma unroll
        for (int i = 0; i < N; i++) d[i] += before[i];
        store_several(du + ch, d);
    };
    layernorm_row_backward<N>(dout + row * C, stats + row * 2, u + row * C, weight, C, write);
}

template <int N>
static __global__ void sum_layernorm_kernel(float* slabs, const floatX* dout, const floatX* u,
                                            const float* stats, int rows, int C) {
    int ch = (blockIdx.y * WARP + threadIdx.x) * N, first = blockIdx.x * SUM_ROWS;
    int last = min(first + SUM_ROWS, rows);
    float dweight[N] = {}, dbias[N] = {}, d[N], x[N];
    for (int r = first + threadIdx.y; r < last && ch < C; r += SUM_LINES) {
        size_t row = r;
        float mean = stats[row * 2], rstd = stats[row * 2 + 1];
        load_several(d, dout + row * C + ch);
        load_several(x, u + row * C + ch);
#pragma unroll
        for (int i = 0; i < N; i++) dweight[i] += d[i] * ((x[i] - mean) * rstd), dbias[i] += d[i];
    }
    sum_lines(dweight);
    sum_lines(dbias);
    if (threadIdx.y || ch >= C) return;
    slabs += (size_t)blockIdx.x * 2 * C + ch;
    store_several(slabs, dweight);
    store_several(slabs + C, dbias);
}
// dweight, dbias (C) += from dout (rows, C). slabs: sum_scratch(rows, 2C)
static void sum_layernorm_gpu(float* dweight, float* dbias, float* slabs, const floatX* dout, const floatX* u,
                              const float* stats, int rows, int C, cudaStream_t stream) {
    int N = several_of(C, {dout, u, slabs});
    dim3 blocks(ceil_div(rows, SUM_ROWS), ceil_div(C, WARP * N)), threads(WARP, SUM_LINES);
    LAUNCH_SEVERAL(N, sum_layernorm_kernel, blocks, threads, stream, slabs, dout, u, stats, rows, C);
    add_slabs_gpu(dweight, C, dbias, C, slabs, blocks.x, stream);
}

// du (rows, C) = the gradient of u, past + what comes through the norm; past (rows, C) may be du, or NULL for
// nothing. dweight, dbias (C) +=. slabs: sum_scratch(rows, 2C)
static void layernorm_backward_gpu(floatX* du, const floatX* past, float* dweight, float* dbias,
                                   const floatX* dout, const float* stats, const floatX* u,
                                   const floatX* weight, float* slabs, int rows, int C, cudaStream_t stream) {
    int N = several_of(C, {du, past, dout, u, weight});
    LAUNCH_SEVERAL(N, layernorm_backward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, du, past,
                   dout, stats, u, weight, rows, C);
    sum_layernorm_gpu(dweight, dbias, slabs, dout, u, stats, rows, C, stream);
}

// --- readout: the final LayerNorm of the mean over the streams

template <int N>
static __global__ void readout_forward_kernel(floatX* mean, floatX* ln, float* stats, const floatX* x,
                                              const floatX* weight, const floatX* bias, int rows, int n,
                                              int C) {
    size_t row = row_of_warp();
    float sum[N], other[N];
    if (row >= (size_t)rows) return;
    mean += row * C, x += row * n * C;
    for (int ch = first_channel<N>(); ch < C; ch += WARP * N) {
        load_several(sum, x + ch);
        for (int stream = 1; stream < n; stream++) {
            load_several(other, x + stream * C + ch);
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += other[i];
        }
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] /= n;
        store_several(mean + ch, sum);
    }
    layernorm_row<N>(ln + row * C, stats + row * 2, mean, weight, bias, C);     // a lane reads what it wrote
}
// mean (rows, C) over the streams of x (rows, n, C), rounded; ln (rows, C) its LayerNorm, stats (rows, 2)
static void readout_forward_gpu(floatX* mean, floatX* ln, float* stats, const floatX* x, const floatX* weight,
                                const floatX* bias, int rows, int n, int C, cudaStream_t stream) {
    int N = several_of(C, {mean, ln, x, weight, bias});
    LAUNCH_SEVERAL(N, readout_forward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, mean, ln,
                   stats, x, weight, bias, rows, n, C);
}

template <int N>
static __global__ void readout_backward_kernel(floatX* dx, const floatX* dln, const float* stats,
                                               const floatX* mean, const floatX* weight, int rows, int n,
                                               int C) {
    size_t row = row_of_warp();
    if (row >= (size_t)rows) return;
    dx += row * n * C;
    auto write = [=](int ch, float (&d)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) d[i] /= n;
        for (int stream = 0; stream < n; stream++) store_several(dx + stream * C + ch, d);
    };
    layernorm_row_backward<N>(dln + row * C, stats + row * 2, mean + row * C, weight, C, write);
}
// dx (rows, n, C) = from dln (rows, C); dweight, dbias (C) +=. slabs: sum_scratch(rows, 2C)
static void readout_backward_gpu(floatX* dx, float* dweight, float* dbias, const floatX* dln,
                                 const float* stats, const floatX* mean, const floatX* weight, float* slabs,
                                 int rows, int n, int C, cudaStream_t stream) {
    int N = several_of(C, {dx, dln, mean, weight});
    LAUNCH_SEVERAL(N, readout_backward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, dx, dln,
                   stats, mean, weight, rows, n, C);
    sum_layernorm_gpu(dweight, dbias, slabs, dln, mean, stats, rows, C, stream);
}

// --- residual without streams

template <int N>
static __global__ void add_kernel(floatX* y, const floatX* x, const floatX* f, size_t count) {
    size_t at = ((size_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x) * N;
    float sum[N], other[N] = {};
    if (at >= count) return;
    load_several(sum, f + at);
    if (x) load_several(other, x + at);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += other[i];
    store_several(y + at, sum);
}
// y (count) = x + f, or f where x is NULL
static void add_gpu(floatX* y, const floatX* x, const floatX* f, size_t count, cudaStream_t stream) {
    int N = several_of(count, {y, x, f}), blocks = ceil_div(count, (size_t)N * ELEMENT_THREADS);
    LAUNCH_SEVERAL(N, add_kernel, blocks, ELEMENT_THREADS, stream, y, x, f, count);
}

static __global__ void add_gradients_kernel(float* sum, const float* other, size_t count) {
    size_t at = (size_t)blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (at < count) sum[at] += other[at];
}
// sum (count) += other: wte's gradient as the head to that as the embedding
static void add_gradients_gpu(float* sum, const float* other, size_t count, cudaStream_t stream) {
    add_gradients_kernel<<<ceil_div(count, ELEMENT_THREADS), ELEMENT_THREADS, 0, stream>>>(sum, other, count);
    LAUNCHED();
}

// --- classifier

typedef struct { float max, sum; } SoftmaxSum;  // sum over exp(logit - max)

// Over the logits (V) of a row, by a block. Each thread reads its logits once, and scales its sum whenever it
// meets a larger one.
template <int N> __device__ __forceinline__ SoftmaxSum softmax_sum(const floatX* logits, int V) {
    float max = -INFINITY, sum = 0, x[N];
    for (int v = threadIdx.x * N; v < V; v += CLASSIFIER_THREADS * N) {
        float before = max;
        load_several(x, logits + v);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (v + i < V) max = fmaxf(max, x[i]);
        if (max > before) sum *= expf(before - max);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (v + i < V) sum += expf(x[i] - max);
    }
    float of_row = block_max(max);
    sum = max > -INFINITY ? sum * expf(max - of_row) : sum; // a thread without logits has nothing to scale
    return {of_row, block_sum(sum)};
}

template <int N>
static __global__ void classifier_kernel(float* losses, floatX* logits, const int32_t* targets, float scale,
                                         int V, int Vp) {
    int target = targets[blockIdx.x];
    float x[N];
    logits += (size_t)blockIdx.x * Vp;
    float logit_of_target = to_float(logits[target]);           // before it is written over
    SoftmaxSum s = softmax_sum<N>(logits, V);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(s.sum) + s.max - logit_of_target;
    if (scale == 0) return;
    float factor = scale / s.sum;
    for (int v = threadIdx.x * N; v < Vp; v += CLASSIFIER_THREADS * N) {
        load_several(x, logits + v);
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = v + i < V ? expf(x[i] - s.max) * factor - (v + i == target ? scale : 0) : 0;
        store_several(logits + v, x);
    }
}
// losses (rows) = -ln p of the targets, from logits (rows, Vp), of which V columns are there. With scale > 0
// logits become dlogits = (softmax - one-hot) scale, 0 in the columns from V on
static void classifier_gpu(float* losses, floatX* logits, const int32_t* targets, float scale, int rows,
                           int V, int Vp, cudaStream_t stream) {
    assert(V <= Vp);
    int N = several_of(Vp, {logits});
    LAUNCH_SEVERAL(N, classifier_kernel, rows, CLASSIFIER_THREADS, stream, losses, logits, targets, scale, V,
                   Vp);
}
// ------------------------------------------------------------------------------------------------
// Hyper-connections (mHC Eq. 3, 7-9; HC Eq. 5), every residual mode with streams: plain kernels, which say
// what faster ones must compute. Where channels are walked a warp has a token, its lanes side by side; where
// coefficients are computed a thread has one. Kernels have a template argument N and know the largest n when
// they are compiled, so that whatever has n or n*n entries stays in registers: those for 1, 2 and 4 streams
// know n itself, the one for MAX_N serves all other n. Where a thread has a token that is too much for MAX_N:
// there the entries lie in shared memory, and loops over them are loops.
//
// Rounded to floatX, once each: y and u on the way forward; on the way back df, and the state's gradient
// after the write's part and again after the read's (in between it is in memory). The norm, the projection
// and the read see the rounded y, LayerNorm the rounded u: the way back finds in memory what was computed
// with.

typedef struct {                // what kernels must know of the configuration, by value
    int n, C;                   // streams, channels
    int M, count;               // numbers in a token's mix, and in its coef
    int groups, width, outs;    // of a token: groups vectors of width numbers, each through fn (outs, width)
    int scales;                 // numbers in scale
    int residual, order, maps;
    int divisions, row_turns;   // of Sinkhorn-Knopp; division t is by row sums where bit t % 2 is set
    bool is_static;
} Connections;

static Connections connections_of(const Config* c) {
    assert(has_connections(c) && c->n >= 1 && c->n <= MAX_N && c->C >= 1);
    int turns = divides_rows(c->order, 0) | divides_rows(c->order, 1) << 1;
    int groups = projection_groups(c), width = projection_width(c), outs = projection_outs(c);
    Connections k = {c->n, c->C, projection_M(c), coefficient_count(c), groups, width, outs,
                     (int)dim_size(c, DIM_SCALES), c->residual, c->order, c->maps, division_count(c), turns,
                     c->is_static};
    return k;
}

enum {
    TOKEN_THREADS = 64,         // where a thread has a token
    TILE_TOKENS = 8,            // tokens (or vectors) that share each number of fn once it is read
    PROJECT_THREADS = TILE_TOKENS * WARP,
    STATE_THREADS = 128,        // a thread has a channel
    FN_THREADS = 128,           // a thread has a column of fn
    FN_TILE = 32,               // vectors whose z lies in shared memory at a time
    FN_SLABS = 32               // for its gradient the vectors are cut into at most so many slabs
};
static_assert(STATE_THREADS % WARP == 0 && FN_THREADS % WARP == 0, "blocks have whole warps");

// kernel<N><<<blocks, threads, 0, stream>>>(..)
#define LAUNCH_N(n, kernel, blocks, threads, stream, ...)                                                    \
    do {                                                                                                     \
        switch (n) {                                                                                         \
            case 1: kernel<1><<<blocks, threads, 0, stream>>>(__VA_ARGS__); break;                           \
            case 2: kernel<2><<<blocks, threads, 0, stream>>>(__VA_ARGS__); break;                           \
            case 4: kernel<4><<<blocks, threads, 0, stream>>>(__VA_ARGS__); break;                           \
            default: kernel<MAX_N><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                             \
        }                                                                                                    \
        LAUNCHED();                                                                                          \
    } while (0)

// n in a kernel<N>
template <int N> __host__ __device__ constexpr int streams_of(int n) { return N == MAX_N ? n : N; }
// Loops over what has an entry a stream; and where a thread has a token, also over its coefficients
#define STREAMS(i) _Pragma("unroll") for (int i = 0; i < N; i++) if (i < n)
#define TOKEN_STREAMS(i) _Pragma("unroll (N < MAX_N ? N : 1)") for (int i = 0; i < N; i++) if (i < n)
#define TOKEN_COEFS(m)                                                                                       \
    _Pragma("unroll (N < MAX_N ? coefs(N) : 1)") for (int m = 0; m < coefs(N); m++)                          \
        if (coef_is_there<N>(m, n))

// Coefficients of a token, pre (n) | post (n) | res (n, n)[out][in]; fn has no more outputs than that.
__host__ __device__ constexpr int coefs(int n) { return n * n + 2 * n; }

// While a kernel has them they are pre (N) | post (N) | res (N, N), with room for absent streams. m is an
// index there, slot_of(m) its place in a thread's array.
template <int N> __device__ __forceinline__ constexpr int slot_of(int m) {
    return N < MAX_N ? m : m * TOKEN_THREADS;
}
// Declares a thread's array of coefs(N) numbers.
#define TOKEN_ARRAY(name)                                                                                    \
    __shared__ float name##_shared[N < MAX_N ? 1 : coefs(N) * TOKEN_THREADS];                                \
    float name##_registers[N < MAX_N ? coefs(N) : 1];                                                        \
    float* const name = N < MAX_N ? name##_registers : name##_shared + threadIdx.x

template <int N> __device__ __forceinline__ constexpr bool coef_is_there(int m, int n) {
    return m % N < n && (m < 2 * N || (m - 2 * N) / N < n);
}
// Its place in memory, in coef and base
template <int N> __device__ __forceinline__ constexpr int coef_at(int m, int n) {
    return m < 2 * N ? m / N * n + m % N : 2 * n + (m - 2 * N) / N * n + m % N;
}
// What map_of, source_of and place_of of the reference say.
template <int N> __device__ __forceinline__ constexpr int coef_map(int m) {
    return m < N ? 0 : m < 2 * N ? 1 : 2;
}
template <int N> __device__ __forceinline__ int coef_source(int m, const Connections& c) {
    return c.residual == RESIDUAL_HC ? m % N : 0;
}
template <int N> __device__ __forceinline__ int coef_place(int m, int n, const Connections& c) {
    return c.residual == RESIDUAL_HC ? m % N * (n + 2) + m / N : coef_at<N>(m, n);
}
template <int N> __device__ __forceinline__ bool coef_is_on(int m, const Connections& c) {
    return c.maps >> coef_map<N>(m) & 1;
}
// What a map is when it is off: read 1/n, write 1, mix I.
template <int N> __device__ __forceinline__ float coef_neutral(int m, int n) {
    return m < N ? 1.0f / n : m < 2 * N || (m - 2 * N) / N == m % N ? 1 : 0;
}
__device__ __forceinline__ bool mixes_by_sinkhorn(const Connections& c) {
    return c.residual == RESIDUAL_MHC && c.maps >> 2 & 1;
}

// Beyond +-87 it saturates, as the reference's does; NaN stays NaN.
__device__ __forceinline__ float exp_saturated(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    return expf(x);
}

// coef (n*n + 2n), from coefficient FIRST on: the sums over the warp of values
template <int N, int FIRST, int COUNT>
__device__ __forceinline__ void store_coef_sums(float* coef, const float (&values)[COUNT], int n) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int e = 0; e < COUNT; e++) {
        if (!coef_is_there<N>(FIRST + e, n)) continue;
        float sum = warp_sum(values[e]);
        if (lane == e % WARP) coef[coef_at<N>(FIRST + e, n)] = sum;
    }
}

// --- Sinkhorn-Knopp (mHC Eq. 9), one matrix (n, n) a thread

// Where entry e of line k of res lies, where lines are rows or columns
template <int N, bool ROWS> __device__ __forceinline__ constexpr int entry_of(int k, int e) {
    return slot_of<N>(2 * N + (ROWS ? k * N + e : e * N + k));
}

// R = exp(R - max of its line). Without shift, exp(R).
template <int N, bool ROWS> __device__ __forceinline__ void exp_lines(float* R, bool shift, int n) {
    TOKEN_STREAMS(k) {
        float max = R[entry_of<N, ROWS>(k, 0)];
        TOKEN_STREAMS(e) max = R[entry_of<N, ROWS>(k, e)] > max ? R[entry_of<N, ROWS>(k, e)] : max;
        max = shift ? max : 0;
        TOKEN_STREAMS(e) {
            float& entry = R[entry_of<N, ROWS>(k, e)];
            entry = exp_saturated(entry - max);
        }
    }
}

// Divides by the sums of lines. That of line k goes to sums[k * stride], unless sums is NULL.
template <int N, bool ROWS>
__device__ __forceinline__ void divide_lines(float* R, float* sums, size_t stride, int n) {
    TOKEN_STREAMS(k) {
        float sum = 1e-12f;
        TOKEN_STREAMS(e) sum += R[entry_of<N, ROWS>(k, e)];
        float inverse = 1 / sum;
        TOKEN_STREAMS(e) R[entry_of<N, ROWS>(k, e)] *= inverse;
        if (sums) sums[k * stride] = sum;
    }
}

// Back through that division: R and its gradient d become what they were before it.
template <int N, bool ROWS>
__device__ __forceinline__ void divide_lines_backward(float* d, float* R, const float* sums, size_t stride,
                                                      int n) {
    TOKEN_STREAMS(k) {
        float along = 0, sum = sums[k * stride], inverse = 1 / sum;
        TOKEN_STREAMS(e) along += d[entry_of<N, ROWS>(k, e)] * R[entry_of<N, ROWS>(k, e)];
        TOKEN_STREAMS(e) {
            float& entry = d[entry_of<N, ROWS>(k, e)];
            entry = (entry - along) * inverse;
            R[entry_of<N, ROWS>(k, e)] *= sum;
        }
    }
}

// In: logits. Out: R; and sums (divisions, n), what was divided by, stride numbers apart (or NULL).
template <int N>
__device__ __forceinline__ void token_sinkhorn(float* R, float* sums, size_t stride, const Connections& c) {
    int n = streams_of<N>(c.n);
    if (c.row_turns & 1) exp_lines<N, true>(R, true, n);
    else exp_lines<N, false>(R, c.order != ORDER_NONE, n);
    for (int t = 0; t < c.divisions; t++) {
        float* divisors = sums ? sums + (size_t)t * n * stride : NULL;
        if (c.row_turns >> t % 2 & 1) divide_lines<N, true>(R, divisors, stride, n);
        else divide_lines<N, false>(R, divisors, stride, n);
    }
}

// In: d, the gradient of R. Out: that of the logits. R becomes exp(logits).
template <int N>
__device__ __forceinline__ void token_sinkhorn_backward(float* d, float* R, const float* sums, size_t stride,
                                                        const Connections& c) {
    int n = streams_of<N>(c.n);
    for (int t = c.divisions - 1; t >= 0; t--) {
        const float* divisors = sums + (size_t)t * n * stride;
        if (c.row_turns >> t % 2 & 1) divide_lines_backward<N, true>(d, R, divisors, stride, n);
        else divide_lines_backward<N, false>(d, R, divisors, stride, n);
    }
    TOKEN_STREAMS(k)
        TOKEN_STREAMS(e) d[entry_of<N, true>(k, e)] *= R[entry_of<N, true>(k, e)];     // through exp
}

// ------------------------------------------------------------------------------------------------
// The way forward: write, project, coefficients, read.

// post (n) and res (n, n) of a token, from its coef
template <int N>
__device__ __forceinline__ void load_write(float (&post)[N], float (&res)[N * N], const float* coef, int n) {
    STREAMS(i) post[i] = coef[n + i];
    STREAMS(i) STREAMS(j) res[i * N + j] = coef[2 * n + i * n + j];
}

template <int N>
static __global__ void write_kernel(floatX* y, const floatX* x, const floatX* f, const float* coef,
                                    int streams, int C, int rows) {
    int row = row_of_warp(), n = streams_of<N>(streams);
    if (row >= rows) return;                                    // the whole warp
    float post[N], res[N * N];
    size_t r = row;
    y += r * n * C, x += r * n * C, f += r * C;
    load_write(post, res, coef + r * coefs(n), n);
    for (int ch = threadIdx.x % WARP; ch < C; ch += WARP) {
        float xs[N], value = to_float(f[ch]);
        STREAMS(j) xs[j] = to_float(x[j * C + ch]);
        STREAMS(i) {
            float sum = post[i] * value;
            STREAMS(j) sum += res[i * N + j] * xs[j];
            y[i * C + ch] = from_float<floatX>(sum);
        }
    }
}
// y (rows, n, C) = res x + post f (mHC Eq. 3), from x (rows, n, C), f (rows, C), coef (rows, n*n + 2n)
static void write_gpu(floatX* y, const floatX* x, const floatX* f, const float* coef, Connections c, int rows,
                      cudaStream_t stream) {
    LAUNCH_N(c.n, write_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, y, x, f, coef, c.n, c.C,
             rows);
}

// A block has TILE_TOKENS vectors and walks them once, a thread to a number; a number of fn is read once for
// all of them. Warp w sums outputs w, w + TILE_TOKENS, .., and the squares of vector w.
template <int N>
static __global__ void project_kernel(float* mix, float* rnorm, const floatX* x, const float* fn,
                                      Connections c, size_t vectors) {
    constexpr int SUMS = (coefs(N) + TILE_TOKENS - 1) / TILE_TOKENS;
    __shared__ float tile[TILE_TOKENS][PROJECT_THREADS], norms[TILE_TOKENS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    size_t first = (size_t)blockIdx.x * TILE_TOKENS;
    float sums[SUMS][TILE_TOKENS] = {}, squares = 0;
    for (int k0 = 0; k0 < c.width; k0 += PROJECT_THREADS) {
        int k = k0 + threadIdx.x, count = min(PROJECT_THREADS, c.width - k0);
#pragma unroll
        for (int v = 0; v < TILE_TOKENS; v++) {
            bool there = first + v < vectors && k < c.width;
            tile[v][threadIdx.x] = there ? to_float(x[(first + v) * c.width + k]) : 0;
        }
        __syncthreads();
        for (int e = lane; e < count; e += WARP) {
            squares += tile[warp][e] * tile[warp][e];
#pragma unroll
            for (int s = 0; s < SUMS; s++) {
                int out = warp + s * TILE_TOKENS;
                if (out >= c.outs) break;
                float weight = fn[(size_t)out * c.width + k0 + e];
#pragma unroll
                for (int v = 0; v < TILE_TOKENS; v++) sums[s][v] += weight * tile[v][e];
            }
        }
        __syncthreads();                                        // the tile is written again
    }
    float norm = 1 / sqrtf(warp_sum(squares) / c.width + 1e-6f);
    if (lane == 0) norms[warp] = norm;
    if (lane == 0 && first + warp < vectors) rnorm[first + warp] = norm;
    __syncthreads();
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
        int out = warp + s * TILE_TOKENS;
        if (out >= c.outs) break;                               // the whole warp
#pragma unroll
        for (int v = 0; v < TILE_TOKENS; v++) {
            float sum = warp_sum(sums[s][v]);
            if (lane == v && first + v < vectors) mix[(first + v) * c.outs + out] = sum * norms[v];
        }
    }
}
// mix (rows, M) = fn x / rms(x) and rnorm (rows, groups) = 1 / rms(x), from x (rows, n, C), fn (outs, width)
static void project_gpu(float* mix, float* rnorm, const floatX* x, const float* fn, Connections c, int rows,
                        cudaStream_t stream) {
    size_t vectors = (size_t)rows * c.groups;
    LAUNCH_N(c.n, project_kernel, ceil_div(vectors, TILE_TOKENS), PROJECT_THREADS, stream, mix, rnorm, x, fn,
             c, vectors);
}

// What scale multiplies (tanh in hc). mix of a static connection is not there.
template <int N> __device__ __forceinline__ float coef_gate(int m, const float* mix, const Connections& c) {
    if (c.is_static) return 0;
    float value = mix[coef_place<N>(m, streams_of<N>(c.n), c)];
    return c.residual == RESIDUAL_HC ? tanhf(value) : value;
}

// a (coefs(N)) of a token, before sigmoid and Sinkhorn (mHC Eq. 7); 0 from M on
template <int N>
__device__ __forceinline__ void token_logits(float* a, const float* mix, const float* base,
                                             const float* scale, const Connections& c) {
    int n = streams_of<N>(c.n);
    TOKEN_COEFS(m) {
        bool in_M = coef_at<N>(m, n) < c.M;
        float factor = c.is_static ? 0 : scale[in_M ? coef_map<N>(m) : 0];
        a[slot_of<N>(m)] = in_M ? factor * coef_gate<N>(m, mix, c) + base[coef_at<N>(m, n)] : 0;
    }
}

template <int N>
static __global__ void coefficients_kernel(float* coef, const float* mix, const float* base,
                                           const float* scale, Connections c, int rows) {
    TOKEN_ARRAY(a);
    int row = blockIdx.x * TOKEN_THREADS + threadIdx.x, n = streams_of<N>(c.n);
    if (row >= rows) return;
    token_logits<N>(a, mix + (size_t)row * c.M, base, scale, c);
    if (c.residual != RESIDUAL_HC) {                            // mHC Eq. 8
        TOKEN_STREAMS(i) a[slot_of<N>(i)] = 1 / (1 + exp_saturated(-a[slot_of<N>(i)]));
        TOKEN_STREAMS(i) a[slot_of<N>(N + i)] = 2 / (1 + exp_saturated(-a[slot_of<N>(N + i)]));
    }
    if (mixes_by_sinkhorn(c)) token_sinkhorn<N>(a, NULL, 0, c);
    TOKEN_COEFS(m) {
        int at = coef_at<N>(m, n);
        bool on = at < c.M && coef_is_on<N>(m, c);
        coef[(size_t)row * coefs(n) + at] = on ? a[slot_of<N>(m)] : coef_neutral<N>(m, n);
    }
}
// coef (rows, n*n + 2n) from mix (rows, M), which is not read where the connection is static
static void coefficients_gpu(float* coef, const float* mix, const float* base, const float* scale,
                             Connections c, int rows, cudaStream_t stream) {
    LAUNCH_N(c.n, coefficients_kernel, ceil_div(rows, TOKEN_THREADS), TOKEN_THREADS, stream, coef, mix, base,
             scale, c, rows);
}

template <int N>
static __global__ void read_layernorm_kernel(floatX* u, floatX* ln, float* stats, const floatX* x,
                                             const float* coef, const floatX* weight, const floatX* bias,
                                             int streams, int C, int rows) {
    int row = row_of_warp(), n = streams_of<N>(streams);
    if (row >= rows) return;
    float pre[N];
    size_t r = row;
    u += r * C, ln += r * C, x += r * n * C;
    STREAMS(i) pre[i] = coef[r * coefs(n) + i];
    for (int ch = threadIdx.x % WARP; ch < C; ch += WARP) {
        float sum = 0;
        STREAMS(i) sum += pre[i] * to_float(x[i * C + ch]);
        u[ch] = from_float<floatX>(sum);
    }
    layernorm_row<1>(ln, stats + r * 2, u, weight, bias, C);    // a lane reads what it wrote
}
// u (rows, C) = pre x, rounded; ln (rows, C) its LayerNorm, stats (rows, 2) {mean, rstd}; from x (rows, n, C)
static void read_layernorm_gpu(floatX* u, floatX* ln, float* stats, const floatX* x, const float* coef,
                               const floatX* weight, const floatX* bias, Connections c, int rows,
                               cudaStream_t stream) {
    LAUNCH_N(c.n, read_layernorm_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, u, ln, stats, x,
             coef, weight, bias, c.n, c.C, rows);
}

typedef struct {                // between sublayer k and sublayer k + 1
    const floatX *x, *f;        // (rows, n, C), (rows, C) state before sublayer k, its output; or NULL, NULL
    const float* coef;          // (rows, n*n + 2n) of sublayer k
    floatX* y;                  // (rows, n, C) state after it: written; where f is NULL, read
    const float *fn, *base, *scale;         // from here on all of sublayer k + 1
    const floatX *weight, *bias;            // (C) of LayerNorm
    float *mix, *rnorm, *next_coef, *stats; // (rows, M), (rows, groups), (rows, n*n + 2n), (rows, 2)
    floatX *u, *ln;             // (rows, C) what is read, the sublayer's input
} Boundary;

// All that lies between the output of one sublayer and the input of the next.
static void boundary_forward_gpu(const Boundary* b, Connections c, int rows, cudaStream_t stream) {
    if (b->f) write_gpu(b->y, b->x, b->f, b->coef, c, rows, stream);
    if (!c.is_static) project_gpu(b->mix, b->rnorm, b->y, b->fn, c, rows, stream);
    coefficients_gpu(b->next_coef, b->mix, b->base, b->scale, c, rows, stream);
    read_layernorm_gpu(b->u, b->ln, b->stats, b->y, b->next_coef, b->weight, b->bias, c, rows, stream);
}

// ------------------------------------------------------------------------------------------------
// The way back: the write; LayerNorm and the read; the coefficients; the state. The gradient du of what is
// read is stored nowhere: two sums beside a token's stats are enough to compute it again, never rounded.

template <int N>
static __global__ void write_backward_kernel(floatX* dx, floatX* df, float* dcoef, const floatX* dy,
                                             const floatX* x, const floatX* f, const float* coef,
                                             int streams, int C, int rows) {
    int row = row_of_warp(), n = streams_of<N>(streams);
    if (row >= rows) return;
    float post[N], res[N * N], sums[N + N * N] = {};            // sums: of dpost | dres
    size_t r = row;
    dx += r * n * C, dy += r * n * C, x += r * n * C, df += r * C, f += r * C;
    load_write(post, res, coef + r * coefs(n), n);
    for (int ch = threadIdx.x % WARP; ch < C; ch += WARP) {
        float dys[N], value = to_float(f[ch]), sum = 0;
        STREAMS(i) {
            dys[i] = to_float(dy[i * C + ch]);
            sum += post[i] * dys[i];
            sums[i] += dys[i] * value;
        }
        df[ch] = from_float<floatX>(sum);
        STREAMS(j) {
            float xj = to_float(x[j * C + ch]), dxj = 0;
            STREAMS(i) {
                dxj += res[i * N + j] * dys[i];
                sums[N + i * N + j] += dys[i] * xj;
            }
            dx[j * C + ch] = from_float<floatX>(dxj);
        }
    }
    store_coef_sums<N, N>(dcoef + r * coefs(n), sums, n);
}
// dx (rows, n, C) but for the read's part, df (rows, C), dcoef (rows, n*n + 2n) but for pre; from dy (rows,
// n, C), which may be dx
static void write_backward_gpu(floatX* dx, floatX* df, float* dcoef, const floatX* dy, const floatX* x,
                               const floatX* f, const float* coef, Connections c, int rows,
                               cudaStream_t stream) {
    LAUNCH_N(c.n, write_backward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, dx, df, dcoef, dy,
             x, f, coef, c.n, c.C, rows);
}

typedef struct { float mean, rstd, sum, along; } ReadSums;     // last two: means of weight dln (1, xhat)

// du of one channel
__device__ __forceinline__ float read_gradient(float dln, float weight, float u, ReadSums s) {
    return (weight * dln - s.sum - (u - s.mean) * s.rstd * s.along) * s.rstd;
}

template <int N>
static __global__ void read_backward_kernel(float* dcoef, float* sums, const floatX* dln, const floatX* x,
                                            const floatX* u, const float* stats, const floatX* weight,
                                            int streams, int C, int rows) {
    int row = row_of_warp(), lane = threadIdx.x % WARP, n = streams_of<N>(streams);
    if (row >= rows) return;
    size_t r = row;
    ReadSums s = {stats[r * 2], stats[r * 2 + 1], 0, 0};
    float dpre[N] = {}, sum = 0, along = 0;
    dln += r * C, u += r * C, x += r * n * C;
    for (int ch = lane; ch < C; ch += WARP) {
        float g = to_float(weight[ch]) * to_float(dln[ch]);
        sum += g;
        along += g * (to_float(u[ch]) - s.mean) * s.rstd;
    }
    s.sum = warp_sum(sum) / C;
    s.along = warp_sum(along) / C;
    for (int ch = lane; ch < C; ch += WARP) {
        float du = read_gradient(to_float(dln[ch]), to_float(weight[ch]), to_float(u[ch]), s);
        STREAMS(i) dpre[i] += du * to_float(x[i * C + ch]);
    }
    store_coef_sums<N, 0>(dcoef + r * coefs(n), dpre, n);
    if (lane < 2) sums[r * 2 + lane] = lane == 0 ? s.sum : s.along;
}
// pre of dcoef (rows, n*n + 2n), and the last two of ReadSums in sums (rows, 2); from dln (rows, C)
static void read_backward_gpu(float* dcoef, float* sums, const floatX* dln, const floatX* x, const floatX* u,
                              const float* stats, const floatX* weight, Connections c, int rows,
                              cudaStream_t stream) {
    LAUNCH_N(c.n, read_backward_kernel, ceil_div(rows, ROWS_A_BLOCK), ROW_THREADS, stream, dcoef, sums, dln,
             x, u, stats, weight, c.n, c.C, rows);
}

// In: d (coefs(N)), gradients of a token's coef. Out: those of its logits; zero for a map that is off.
// a (coefs(N)) is scratch.
template <int N>
__device__ __forceinline__ void token_logits_backward(float* d, float* a, const float* coef, const float* mix,
                                                      const float* base, const float* scale, float* divisors,
                                                      size_t stride, const Connections& c) {
    int n = streams_of<N>(c.n);
    TOKEN_COEFS(m) {
        if (m >= 2 * N) continue;
        float top = m < N ? 1 : 2, y = coef[coef_at<N>(m, n)];  // y = top sigmoid(a): dy/da = y (1 - y / top)
        if (c.residual != RESIDUAL_HC) d[slot_of<N>(m)] *= y * (1 - y / top);
    }
    TOKEN_COEFS(m) d[slot_of<N>(m)] = coef_is_on<N>(m, c) ? d[slot_of<N>(m)] : 0;
    if (!mixes_by_sinkhorn(c)) return;
    token_logits<N>(a, mix, base, scale, c);
    token_sinkhorn<N>(a, divisors, stride, c);
    token_sinkhorn_backward<N>(d, a, divisors, stride, c);
}

// From d, the gradients of a token's logits: its terms of dbase and dscale, z and shrink
template <int N>
__device__ __forceinline__ void token_terms(float* terms, float* z, float* shrink, const float* d,
                                            const float* mix, const float* rnorm, const float* scale,
                                            const Connections& c) {
    int n = streams_of<N>(c.n);
    float dscale[3] = {}, through[N] = {};
    TOKEN_COEFS(m) {
        int at = coef_at<N>(m, n), place = coef_place<N>(m, n, c);
        if (at >= c.M) continue;                                // res of ihc
        terms[at] = d[slot_of<N>(m)];
        if (c.is_static) continue;
        float y = coef_gate<N>(m, mix, c), slope = c.residual == RESIDUAL_HC ? 1 - y * y : 1;
        float dmix = scale[coef_map<N>(m)] * d[slot_of<N>(m)] * slope, shrinks = dmix * mix[place];
#pragma unroll
        for (int i = 0; i < 3; i++)                             // no index that only the run knows
            if (i == coef_map<N>(m)) dscale[i] += d[slot_of<N>(m)] * y;
        z[place] = dmix * rnorm[coef_source<N>(m, c)];
        STREAMS(i) if (i == coef_source<N>(m, c)) through[i] += shrinks;
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        if (i < c.scales) terms[c.M + i] = dscale[i];
    STREAMS(i)                                                  // d rms(x): the term that is easily forgotten
        if (!c.is_static && i < c.groups) shrink[i] = through[i] * (rnorm[i] * rnorm[i] / c.width);
}

template <int N>
static __global__ void coefficients_backward_kernel(float* terms, float* z, float* shrink, float* divisors,
                                                    const float* dcoef, const float* coef, const float* mix,
                                                    const float* rnorm, const float* base, const float* scale,
                                                    Connections c, int rows) {
    TOKEN_ARRAY(d);
    TOKEN_ARRAY(a);
    int row = blockIdx.x * TOKEN_THREADS + threadIdx.x, n = streams_of<N>(c.n);
    if (row >= rows) return;
    size_t r = row;
    coef += r * coefs(n), dcoef += r * coefs(n), mix += r * c.M, rnorm += r * c.groups;
    TOKEN_COEFS(m) d[slot_of<N>(m)] = dcoef[coef_at<N>(m, n)];
    token_logits_backward<N>(d, a, coef, mix, base, scale, divisors + r, rows, c);
    token_terms<N>(terms + r * (c.M + c.scales), z + r * c.M, shrink + r * c.groups, d, mix, rnorm, scale, c);
}
// From dcoef (rows, n*n + 2n): terms (rows, M + scales) of dbase and dscale; unless the connection is static
// z (rows, M), the gradient of fn x, and shrink (rows, groups), what the way through rms(x) takes from dx for
// each unit of x. divisors (divisions * n, rows) is scratch: local memory would be there for every thread
// that the device can hold at once, whatever the number of rows.
static void coefficients_backward_gpu(float* terms, float* z, float* shrink, float* divisors,
                                      const float* dcoef, const float* coef, const float* mix,
                                      const float* rnorm, const float* base, const float* scale,
                                      Connections c, int rows, cudaStream_t stream) {
    LAUNCH_N(c.n, coefficients_backward_kernel, ceil_div(rows, TOKEN_THREADS), TOKEN_THREADS, stream, terms,
             z, shrink, divisors, dcoef, coef, mix, rnorm, base, scale, c, rows);
}

// sum[i][v] = fn^T z at one channel, which fn begins at: stream i of token v
template <int N>
__device__ __forceinline__ void project_backward(float (&sum)[N][TILE_TOKENS], const float* fn,
                                                 const float (&z)[TILE_TOKENS][coefs(N)],
                                                 const Connections& c) {
    int n = streams_of<N>(c.n);
    bool together = c.groups == 1;                              // all streams have one z; else each its own
    for (int o = 0; o < c.outs; o++)
        STREAMS(i) {
            float weight = fn[(size_t)o * c.width + (together ? i * c.C : 0)];
#pragma unroll
            for (int v = 0; v < TILE_TOKENS; v++) sum[i][v] += weight * z[v][together ? o : i * c.outs + o];
        }
}

typedef struct {                // what the gradient of the state is made of
    const floatX *dln, *x, *u, *weight;         // (rows, C), (rows, n, C), (rows, C), LayerNorm's (C)
    const float *stats, *sums, *coef;           // (rows, 2), (rows, 2), (rows, n*n + 2n)
    const float *z, *shrink, *fn;               // (rows, M), (rows, groups), (outs, width)
} StateTerms;

template <int N>
static __global__ void state_backward_kernel(floatX* dx, StateTerms t, Connections c, int rows) {
    __shared__ float z[TILE_TOKENS][coefs(N)];
    int first = blockIdx.x * TILE_TOKENS, tokens = min((int)TILE_TOKENS, rows - first);
    int ch = blockIdx.y * STATE_THREADS + threadIdx.x, n = streams_of<N>(c.n);
    float through[N][TILE_TOKENS] = {};
    for (int e = threadIdx.x; e < TILE_TOKENS * c.M && !c.is_static; e += STATE_THREADS)
        z[e / c.M][e % c.M] = e / c.M < tokens ? t.z[(size_t)first * c.M + e] : 0;
    __syncthreads();
    if (ch >= c.C) return;
    if (!c.is_static) project_backward<N>(through, t.fn + ch, z, c);
#pragma unroll
    for (int v = 0; v < TILE_TOKENS; v++) {
        if (v >= tokens) break;
        size_t row = first + v, at = row * c.C + ch;
        ReadSums s = {t.stats[row * 2], t.stats[row * 2 + 1], t.sums[row * 2], t.sums[row * 2 + 1]};
        float du = read_gradient(to_float(t.dln[at]), to_float(t.weight[ch]), to_float(t.u[at]), s);
        STREAMS(i) {
            size_t state = (row * n + i) * c.C + ch;
            float shrink = c.is_static ? 0 : t.shrink[row * c.groups + (c.groups == 1 ? 0 : i)];
            float sum = t.coef[row * coefs(n) + i] * du - shrink * to_float(t.x[state]) + through[i][v];
            dx[state] = from_float<floatX>(to_float(dx[state]) + sum);
        }
    }
}
// dx (rows, n, C) += pre du - shrink x + fn^T z, in fp32 and rounded once
static void state_backward_gpu(floatX* dx, StateTerms terms, Connections c, int rows, cudaStream_t stream) {
    dim3 blocks(ceil_div(rows, TILE_TOKENS), ceil_div(c.C, STATE_THREADS));
    LAUNCH_N(c.n, state_backward_kernel, blocks, STATE_THREADS, stream, dx, terms, c, rows);
}

// ------------------------------------------------------------------------------------------------
// fn's gradient, a sum over all rows in two phases as others: blocks sum slabs of vectors, which the
// sizes alone determine, then add_slabs adds them in order.

// Vectors in a slab, whole tiles; and at most how many slabs so many vectors or less are
static int fn_slab_vectors(size_t vectors) {
    return ceil_div(ceil_div(vectors, FN_SLABS), FN_TILE) * FN_TILE;
}
static int most_fn_slabs(size_t vectors) { return min_int(FN_SLABS, ceil_div(vectors, FN_TILE)); }

// A thread has a column of fn and all its outputs, and walks the vectors of a slab in order.
template <int N>
static __global__ void sum_fn_kernel(float* slabs, const float* z, const floatX* x, Connections c,
                                     size_t vectors, int slab_vectors) {
    __shared__ float tile[FN_TILE][coefs(N)];                   // zeros from outs on
    int k = blockIdx.x * FN_THREADS + threadIdx.x;
    size_t first = (size_t)blockIdx.y * slab_vectors, last = min(first + slab_vectors, vectors);
    float sums[coefs(N)] = {};
    for (; first < last; first += FN_TILE) {
        int count = min((size_t)FN_TILE, last - first);
        for (int e = threadIdx.x; e < FN_TILE * coefs(N); e += FN_THREADS) {
            int v = e / coefs(N), o = e % coefs(N);
            tile[v][o] = v < count && o < c.outs ? z[(first + v) * c.outs + o] : 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int v = 0; v < count && k < c.width; v++) {
            float value = to_float(x[(first + v) * c.width + k]);
#pragma unroll
            for (int o = 0; o < coefs(N); o++) sums[o] += tile[v][o] * value;
        }
        __syncthreads();                                        // the tile is written again
    }
#pragma unroll
    for (int o = 0; o < coefs(N); o++)
        if (o < c.outs && k < c.width) slabs[((size_t)blockIdx.y * c.outs + o) * c.width + k] = sums[o];
}
// dfn (outs, width) += z^T x, from z (rows, M), x (rows, n, C)
static void sum_fn_gpu(float* dfn, float* slabs, const float* z, const floatX* x, Connections c, int rows,
                       cudaStream_t stream) {
    size_t vectors = (size_t)rows * c.groups;
    int slab_vectors = fn_slab_vectors(vectors), count = ceil_div(vectors, slab_vectors);
    dim3 blocks(ceil_div(c.width, FN_THREADS), count);
    LAUNCH_N(c.n, sum_fn_kernel, blocks, FN_THREADS, stream, slabs, z, x, c, vectors, slab_vectors);
    add_slabs_gpu(dfn, c.outs * c.width, NULL, 0, slabs, count, stream);
}

// ------------------------------------------------------------------------------------------------
// A connection's way back, but for the write: from the input of a sublayer to the state before it.

typedef struct {                // what lives inside connection_backward_gpu
    float *sums, *terms, *z, *shrink;           // (rows, 2), (rows, M + scales), (rows, M), (rows, groups)
    float *divisors, *slabs;                    // (divisions * n, rows); of one sum over rows after the other
    size_t size;                // floats in all
} ConnectionScratch;

// Laid out from memory on; NULL only counts.
static ConnectionScratch connection_scratch(float* memory, Connections c, int rows) {
    ConnectionScratch s = {};
    size_t r = rows, fn = c.is_static ? 0 : (size_t)c.outs * c.width * most_fn_slabs(r * c.groups);
    size_t slabs = sum_scratch(rows, c.M + c.scales > 2 * c.C ? c.M + c.scales : 2 * c.C);
    bool sinkhorn = c.residual == RESIDUAL_MHC && c.maps >> 2 & 1;
    auto take = [&s, memory](size_t count) {
        s.size += count;
        return memory ? memory + (s.size - count) : NULL;
    };
    s.slabs = take(fn > slabs ? fn : slabs);                    // first, so that it is aligned as memory is
    s.sums = take(r * 2);
    s.terms = take(r * (c.M + c.scales));
    s.z = take(c.is_static ? 0 : r * c.M);
    s.shrink = take(c.is_static ? 0 : r * c.groups);
    s.divisors = take(sinkhorn ? r * c.divisions * c.n : 0);
    return s;
}
// Floats of scratch that connection_backward_gpu wants
static size_t connection_backward_scratch(Connections c, int rows) {
    return connection_scratch(NULL, c, rows).size;
}

typedef struct {
    floatX* dx;                 // (rows, n, C) in: but for the read's part; out: whole
    float* dcoef;               // (rows, n*n + 2n) in: post and res; out: pre too
    const floatX *dln, *x, *u, *weight;         // (rows, C), (rows, n, C), (rows, C), LayerNorm's (C)
    const float *stats, *coef, *mix, *rnorm;    // (rows, 2), (rows, n*n + 2n), (rows, M), (rows, groups)
    const float *fn, *base, *scale;
    float *dfn, *dbase, *dscale;                // +=
    float *dweight, *dbias;     // (C) of LayerNorm, +=
} ConnectionBackward;

static void connection_backward_gpu(const ConnectionBackward* b, float* scratch, Connections c, int rows,
                                    cudaStream_t stream) {
    ConnectionScratch s = connection_scratch(scratch, c, rows);
    read_backward_gpu(b->dcoef, s.sums, b->dln, b->x, b->u, b->stats, b->weight, c, rows, stream);
    coefficients_backward_gpu(s.terms, s.z, s.shrink, s.divisors, b->dcoef, b->coef, b->mix, b->rnorm,
                              b->base, b->scale, c, rows, stream);
    StateTerms terms = {b->dln, b->x, b->u, b->weight, b->stats, s.sums, b->coef, s.z, s.shrink, b->fn};
    state_backward_gpu(b->dx, terms, c, rows, stream);
    sum_layernorm_gpu(b->dweight, b->dbias, s.slabs, b->dln, b->u, b->stats, rows, c.C, stream);
    sum_columns_gpu(b->dbase, c.M, b->dscale, c.scales, s.slabs, s.terms, rows, stream);
    if (!c.is_static) sum_fn_gpu(b->dfn, s.slabs, s.z, b->x, c, rows, stream);
}

// ------------------------------------------------------------------------------------------------
// The boundary between two sublayers there and back: all that --kernels chooses. `forward` goes from the
// output of a sublayer to the input of the next, `backward` from the gradient of that input to the gradient
// of that output. The states are write_gpu's, bit for bit, which recomputes them. Between two boundaries
// dstate is what their kernels leave there: into the last it goes as the gradient of the last state, out of
// the first it comes as that of the first state. The plain ones' has gone through the next write already.

typedef struct {                // between sublayer k and sublayer k + 1
    ConnectionBackward next;    // of sublayer k + 1: its dx is dstate, its dcoef gets post and res of k after
                                // that; where there is no such sublayer dln is NULL
    const floatX *x, *f;        // (rows, n, C), (rows, C) state before sublayer k, its output; or NULL, NULL
    const float* coef;          // (rows, n*n + 2n) of sublayer k
    floatX* df;                 // (rows, C) written
} BoundaryBackward;

static void boundary_backward_gpu(const BoundaryBackward* b, float* scratch, Connections c, int rows,
                                  cudaStream_t stream) {
    const ConnectionBackward* next = &b->next;
    if (next->dln) connection_backward_gpu(next, scratch, c, rows, stream);
    if (b->f)
        write_backward_gpu(next->dx, b->df, next->dcoef, next->dx, b->x, b->f, b->coef, c, rows, stream);
}

typedef struct {
    void (*forward)(const Boundary* b, Connections c, int rows, cudaStream_t stream);
    void (*backward)(const BoundaryBackward* b, float* scratch, Connections c, int rows, cudaStream_t stream);
    size_t (*backward_scratch)(Connections c, int rows);        // floats
} BoundaryKernels;

// In the order of enum Kernels, as far as they exist
static const BoundaryKernels boundary_kernels[] = {
    {boundary_forward_gpu, boundary_backward_gpu, connection_backward_scratch},
};
enum { BOUNDARY_KERNELS = sizeof boundary_kernels / sizeof boundary_kernels[0] };
// ------------------------------------------------------------------------------------------------
// Causal attention. qkv (B, T, 3C) holds q | k | v of a token, each of NH heads of D = C / NH numbers. With
// s = q k^T over the keys up to a query's own position:
//
//     forward   p = softmax(scale s), out = p v, lse = log sum exp(scale s), scale = 1 / sqrt(D)
//     backward  delta = dout . out of a query, dp = dout v^T, ds = p (dp - delta),
//               dq = scale ds k, dk = scale ds^T q, dv = p^T dout
//
// The T x T scores never exist: a block of threads owns some rows of a head and walks over tiles of them. In
// the backward pass p comes from s and lse again, once for dq by blocks that own queries, once for dk and dv
// by blocks that own keys: each sum has one owner and one order. Two kinds of kernels do this: plain ones,
// for every head size and precision, and flash ones, for bf16 and heads of 64 and 128, on tensor cores.

static bool attention_plain_only;       // the plain kernels serve every case

struct HeadRows { const floatX* first; int stride; };           // a head's rows, each (D)
__device__ __forceinline__ const floatX* row_at(HeadRows rows, int t) {
    return rows.first + (ptrdiff_t)t * rows.stride;
}

// Where a head begins in qkv and dqkv, in out and dout, and in lse and delta. head = b * NH + h
struct HeadPlace { size_t qkv, out, row; };
__device__ __forceinline__ HeadPlace head_place(int head, int T, int C, int NH) {
    size_t tokens = (size_t)(head / NH) * T, channel = (size_t)(head % NH) * (C / NH);
    return {tokens * 3 * C + channel, tokens * C + channel, (size_t)head * T};
}

// The backward pass as an owner of rows sees it: s = row_s . column_s, dp = row_dp . column_dp. Rows are keys
// and columns queries, or the other way round.
struct BackwardSides { HeadRows row_s, row_dp, column_s, column_dp; };
template <bool OF_KEYS>
__device__ __forceinline__ BackwardSides backward_sides(const floatX* qkv, const floatX* dout, int C) {
    HeadRows q = {qkv, 3 * C}, k = {qkv + C, 3 * C}, v = {qkv + 2 * C, 3 * C}, d = {dout, C};
    if (OF_KEYS) return {k, v, q, d};
    return {q, d, k, v};
}

// --- delta (B, NH, T) = sum over a head of dout * out

template <int COUNT>
__device__ __forceinline__ float dot_of(const floatX* a, const floatX* b) {
    struct alignas(COUNT * sizeof(floatX)) Several { floatX x[COUNT]; };
    Several from_a = *(const Several*)a, from_b = *(const Several*)b;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += to_float(from_a.x[i]) * to_float(from_b.x[i]);
    return sum;
}

enum { DELTA_THREADS = 256 };

// LANES threads a row of a head, COUNT numbers at a time
template <int LANES, int COUNT>
static __global__ void __launch_bounds__(DELTA_THREADS)
attention_delta_kernel(float* delta, const floatX* dout, const floatX* out, int B, int T, int C, int NH) {
    static_assert(WARP % LANES == 0, "a row must not be split between warps");
    size_t row = ((size_t)blockIdx.x * DELTA_THREADS + threadIdx.x) / LANES;        // (b, t, h)
    bool present = row < (size_t)B * T * NH;
    int D = C / NH;
    size_t first = row / NH * C + row % NH * D;
    float sum = 0;
    if (present)
        for (int c = threadIdx.x % LANES * COUNT; c < D; c += LANES * COUNT)
            sum += dot_of<COUNT>(dout + first + c, out + first + c);
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (present && threadIdx.x % LANES == 0)
        delta[(row / NH / T * NH + row % NH) * T + row / NH % T] = sum;
}

template <int LANES, int COUNT>
static void attention_delta(float* delta, const floatX* dout, const floatX* out, int B, int T, int C, int NH,
                            cudaStream_t stream) {
    int blocks = ceil_div((size_t)B * T * NH * LANES, DELTA_THREADS);
    attention_delta_kernel<LANES, COUNT><<<blocks, DELTA_THREADS, 0, stream>>>(delta, dout, out, B, T, C, NH);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// Plain attention: a warp owns a few rows; a lane is a column of s in products, and a channel in sums.

enum {
    PLAIN_WARPS = 4,
    PLAIN_THREADS = PLAIN_WARPS * WARP,
    PLAIN_EACH = 8,                             // rows of a warp
    PLAIN_ROWS = PLAIN_WARPS * PLAIN_EACH,      // and of a block
    PLAIN_CHANNELS = 4,                         // that a lane sums. A wider head is several blocks' work,
    PLAIN_WIDTH = PLAIN_CHANNELS * WARP,        // each with so many channels and all the scores
};

struct PlainTiles {                             // one more than a warp: a column of it lies in 32 banks
    float rows[PLAIN_ROWS][WARP + 1], columns[WARP][WARP + 1];
    float weights[PLAIN_ROWS][WARP];
};

__device__ __forceinline__ float element(HeadRows rows, int t, int c, int T, int D) {
    return t < T && c < D ? to_float(row_at(rows, t)[c]) : 0;
}

// s[r] = x[x0 + PLAIN_EACH * warp + r] . y[y0 + lane]
__device__ __forceinline__ void plain_products(float (&s)[PLAIN_EACH], HeadRows x, int x0, HeadRows y, int y0,
                                               int T, int D, PlainTiles& tiles) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < PLAIN_EACH; r++) s[r] = 0;
    for (int c0 = 0; c0 < D; c0 += WARP) {
        __syncthreads();                        // what was there is read
        for (int i = warp; i < PLAIN_ROWS; i += PLAIN_WARPS)
            tiles.rows[i][lane] = element(x, x0 + i, c0 + lane, T, D);
        for (int i = warp; i < WARP; i += PLAIN_WARPS)
            tiles.columns[i][lane] = element(y, y0 + i, c0 + lane, T, D);
        __syncthreads();
        for (int c = 0; c < min(WARP, D - c0); c++)
#pragma unroll
            for (int r = 0; r < PLAIN_EACH; r++)
                s[r] += tiles.rows[warp * PLAIN_EACH + r][c] * tiles.columns[lane][c];
    }
}

// sum[r][i] += sum_j weight_j[r] y[y0 + j][c0 + WARP * i + lane], where weight_j is lane j's
__device__ __forceinline__ void plain_sums(float (&sum)[PLAIN_EACH][PLAIN_CHANNELS],
                                           const float (&weight)[PLAIN_EACH], HeadRows y, int y0, int c0,
                                           int T, int D, PlainTiles& tiles) {
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * PLAIN_EACH;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < PLAIN_EACH; r++) tiles.weights[first + r][lane] = weight[r];
    __syncwarp();
    for (int j = 0; j < min(WARP, T - y0); j++)
#pragma unroll
        for (int i = 0; i < PLAIN_CHANNELS; i++) {
            float value = element(y, y0 + j, c0 + WARP * i + lane, T, D);
#pragma unroll
            for (int r = 0; r < PLAIN_EACH; r++) sum[r][i] += tiles.weights[first + r][j] * value;
        }
}

// to[t][c] = factor[r] sum[r][i] for the rows and channels that exist
__device__ __forceinline__ void plain_store(floatX* to, size_t stride, int x0, int c0, int T, int D,
                                            const float (&sum)[PLAIN_EACH][PLAIN_CHANNELS],
                                            const float (&factor)[PLAIN_EACH]) {
    int lane = threadIdx.x % WARP, first = x0 + threadIdx.x / WARP * PLAIN_EACH;
#pragma unroll
    for (int r = 0; r < PLAIN_EACH; r++)
#pragma unroll
        for (int i = 0; i < PLAIN_CHANNELS; i++) {
            int c = c0 + WARP * i + lane;
            if (first + r < T && c < D)
                to[(first + r) * stride + c] = from_float<floatX>(factor[r] * sum[r][i]);
        }
}

// A tile of scores becomes exp(scale (s - top)), where top is the largest score so far, of a row: what was
// summed before shrinks when it moves. total is this lane's part.
__device__ __forceinline__ void plain_softmax(float (&s)[PLAIN_EACH], float (&top)[PLAIN_EACH],
                                              float (&total)[PLAIN_EACH],
                                              float (&sum)[PLAIN_EACH][PLAIN_CHANNELS], int first, int key,
                                              float scale) {
#pragma unroll
    for (int r = 0; r < PLAIN_EACH; r++) {
        float score = key <= first + r ? s[r] : -INFINITY;
        float before = top[r];
        top[r] = fmaxf(before, warp_max(score));                // finite: every row sees key 0
        float shrink = expf(scale * (before - top[r]));
        s[r] = expf(scale * (score - top[r]));
        total[r] = total[r] * shrink + s[r];
#pragma unroll
        for (int i = 0; i < PLAIN_CHANNELS; i++) sum[r][i] *= shrink;
    }
}

// Grid: heads, tiles of queries from row0 on, PLAIN_WIDTH channels
static __global__ void __launch_bounds__(PLAIN_THREADS)
attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int row0, int C, int NH) {
    __shared__ PlainTiles tiles;
    int D = C / NH, x0 = row0 + blockIdx.y * PLAIN_ROWS, c0 = blockIdx.z * PLAIN_WIDTH;
    int lane = threadIdx.x % WARP, first = x0 + threadIdx.x / WARP * PLAIN_EACH;
    HeadPlace place = head_place(blockIdx.x, T, C, NH);
    HeadRows q = {qkv + place.qkv, 3 * C}, k = {q.first + C, 3 * C}, v = {k.first + C, 3 * C};
    float scale = 1 / sqrtf((float)D);
    float s[PLAIN_EACH], top[PLAIN_EACH], total[PLAIN_EACH] = {}, sum[PLAIN_EACH][PLAIN_CHANNELS] = {};
    for (int r = 0; r < PLAIN_EACH; r++) top[r] = -INFINITY;
    for (int key0 = 0; key0 < min(x0 + PLAIN_ROWS, T); key0 += WARP) {
        plain_products(s, q, x0, k, key0, T, D, tiles);
        plain_softmax(s, top, total, sum, first, key0 + lane, scale);
        plain_sums(sum, s, v, key0, c0, T, D, tiles);
    }
    for (int r = 0; r < PLAIN_EACH; r++) {
        total[r] = warp_sum(total[r]);
        if (c0 == 0 && lane == 0 && first + r < T)
            lse[place.row + first + r] = scale * top[r] + logf(total[r]);
        total[r] = 1 / total[r];
    }
    plain_store(out + place.out, (size_t)C, x0, c0, T, D, sum, total);
}

static void attention_forward_plain(floatX* out, float* lse, const floatX* qkv, int B, int T, int row0, int C,
                                    int NH, cudaStream_t stream) {
    dim3 grid(B * NH, ceil_div(T - row0, PLAIN_ROWS), ceil_div(C / NH, PLAIN_WIDTH));
    attention_forward_kernel<<<grid, PLAIN_THREADS, 0, stream>>>(out, lse, qkv, T, row0, C, NH);
    LAUNCHED();
}

// s becomes p, dp becomes ds, for a tile of rows from `first` on and the lane's column
template <bool OF_KEYS>
__device__ __forceinline__ void plain_gradients(float (&s)[PLAIN_EACH], float (&dp)[PLAIN_EACH], int first,
                                                int column, int T, const float* lse, const float* delta,
                                                float scale) {
#pragma unroll
    for (int r = 0; r < PLAIN_EACH; r++) {
        int row = first + r, query = OF_KEYS ? column : row, key = OF_KEYS ? row : column;
        bool seen = key <= query && query < T;
        s[r] = seen ? expf(scale * s[r] - lse[query]) : 0;
        dp[r] = seen ? s[r] * (dp[r] - delta[query]) : 0;
    }
}

// Grid: heads, tiles of rows (keys or queries), PLAIN_WIDTH channels
template <bool OF_KEYS>
static __global__ void __launch_bounds__(PLAIN_THREADS, 3)
attention_backward_kernel(floatX* dqkv, const floatX* dout, const float* lse, const float* delta,
                          const floatX* qkv, int T, int C, int NH) {
    __shared__ PlainTiles tiles;
    int D = C / NH, x0 = blockIdx.y * PLAIN_ROWS, c0 = blockIdx.z * PLAIN_WIDTH;
    int lane = threadIdx.x % WARP, first = x0 + threadIdx.x / WARP * PLAIN_EACH;
    HeadPlace place = head_place(blockIdx.x, T, C, NH);
    BackwardSides side = backward_sides<OF_KEYS>(qkv + place.qkv, dout + place.out, C);
    float scale = 1 / sqrtf((float)D), s[PLAIN_EACH], dp[PLAIN_EACH], factor[PLAIN_EACH];
    float sum_s[PLAIN_EACH][PLAIN_CHANNELS] = {}, sum_dp[PLAIN_EACH][PLAIN_CHANNELS] = {};
    int begin = OF_KEYS ? x0 : 0, end = OF_KEYS ? T : min(x0 + PLAIN_ROWS, T);
    for (int y0 = begin; y0 < end; y0 += WARP) {
        plain_products(s, side.row_s, x0, side.column_s, y0, T, D, tiles);
        plain_products(dp, side.row_dp, x0, side.column_dp, y0, T, D, tiles);
        plain_gradients<OF_KEYS>(s, dp, first, y0 + lane, T, lse + place.row, delta + place.row, scale);
        plain_sums(sum_s, dp, side.column_s, y0, c0, T, D, tiles);
        if (OF_KEYS) plain_sums(sum_dp, s, side.column_dp, y0, c0, T, D, tiles);
    }
    floatX* to = dqkv + place.qkv;
    for (int r = 0; r < PLAIN_EACH; r++) factor[r] = scale;
    plain_store(OF_KEYS ? to + C : to, 3 * (size_t)C, x0, c0, T, D, sum_s, factor);
    for (int r = 0; r < PLAIN_EACH; r++) factor[r] = 1;
    if (OF_KEYS) plain_store(to + 2 * C, 3 * (size_t)C, x0, c0, T, D, sum_dp, factor);
}

static void attention_backward_plain(floatX* dqkv, const floatX* dout, const float* lse, const float* delta,
                                     const floatX* qkv, int B, int T, int C, int NH, cudaStream_t stream) {
    dim3 grid(B * NH, ceil_div(T, PLAIN_ROWS), ceil_div(C / NH, PLAIN_WIDTH)), block(PLAIN_THREADS);
    for (auto kernel : {attention_backward_kernel<false>, attention_backward_kernel<true>}) {
        kernel<<<grid, block, 0, stream>>>(dqkv, dout, lse, delta, qkv, T, C, NH);
        LAUNCHED();
    }
}

// ------------------------------------------------------------------------------------------------
// Flash attention (FlashAttention-2, arXiv 2307.08691) for bf16. A block is 4 warps; a warp owns 16 M rows
// and keeps their sums in registers. Columns come as tiles in shared memory, the next one on its way while
// one is worked on.
//
// A product of a warp is mma.sync.m16n8k16. Of its 16 x 8 result lane 4 g + t holds columns 2 t and 2 t + 1,
// as x[0], x[1] of row g and x[2], x[3] of row g + 8. Two results side by side, rounded to bf16, are the
// first factor of the next product as they are: scores never leave the registers.
#ifndef PRECISION_FP32

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// --- instructions

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
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 ::"r"(to), "l"(from), "r"(present ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the newest N groups of this thread are there.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// To a relative 2^-22, 0 below 2^-126; of -infinity 0, of NaN NaN
__device__ __forceinline__ float power_of_2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// --- tiles in shared memory

enum { FLASH_WARPS = 4, FLASH_THREADS = FLASH_WARPS * WARP, FLASH_STAGES = 2 };

// Where a piece of 16 bytes lies in a tile of rows of D numbers, in numbers. Pieces change places within a
// row by the row's lowest bits: one piece of each of 8 rows is all 32 banks. As tiles begin at multiples of
// 256 bytes, a step by an even number of pieces is an exclusive or with the address; one by 8 rows is a sum.
template <int D>
__device__ __forceinline__ int tile_offset(int row, int piece) { return row * D + (piece ^ (row & 7)) * 8; }
template <int D>
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int row, int piece) {
    return tile + tile_offset<D>(row, piece) * (int)sizeof(floatX);
}
__host__ __device__ constexpr int tile_bytes(int rows, int D) { return rows * D * (int)sizeof(floatX); }

// Begins to copy rows first .. first + ROWS - 1 of a head; those from T on become zero.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t tile, HeadRows from, int first, int T) {
    constexpr int PIECES = D / 8, EACH = ROWS * PIECES / FLASH_THREADS;
    static_assert(ROWS * PIECES % FLASH_THREADS == 0, "every thread copies as much");
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int i = e * FLASH_THREADS + threadIdx.x, row = i / PIECES, piece = i % PIECES, t = first + row;
        cp_async_16(tile_address<D>(tile, row, piece), row_at(from, t) + piece * 8, t < T);
    }
}

// The first factor of products: rows first .. first + 16 M - 1 of a tile. It is kept in registers where there
// is room for it, else read from shared memory every time.
template <int M, int D, bool KEPT>
struct RowFactor {
    uint32_t at, kept[KEPT ? D / 16 : 1][M][4];
    __device__ __forceinline__ RowFactor(uint32_t tile, int first) {
        int lane = threadIdx.x % WARP;
        at = tile_address<D>(tile, first + lane % 16, lane / 16);
    }
    __device__ __forceinline__ void read(uint32_t (&a)[M][4], int k) const {   // numbers 16 k .. 16 k + 15
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(a[m], (at ^ 32 * k) + tile_bytes(16 * m, D));
    }
    __device__ __forceinline__ void keep() {    // when the tile is there
#pragma unroll
        for (int k = 0; KEPT && k < D / 16; k++) read(kept[k], k);
    }
    __device__ __forceinline__ void get(uint32_t (&a)[M][4], int k) const {
        if (KEPT) memcpy(a, kept[KEPT ? k : 0], sizeof a);
        else read(a, k);
    }
};

// s (16 M, 8 N) += the factor's rows . the 8 N rows of a tile
template <int M, int N, int D, bool KEPT>
__device__ __forceinline__ void flash_products(float (&s)[M][N][4], const RowFactor<M, D, KEPT>& factor,
                                               uint32_t tile) {
    int lane = threadIdx.x % WARP;
    uint32_t at = tile_address<D>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4], b[4];
        factor.get(a, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix_x4(b, (at ^ 32 * k) + tile_bytes(8 * n, D));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(s[m][n], a[m], b[0], b[1]);
                mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum (16 M, D) += weight (16 M, 8 N), rounded to bf16, times the 8 N rows of a tile
template <int M, int N, int D>
__device__ __forceinline__ void flash_sums(float (&sum)[M][D / 8][4], const float (&weight)[M][N][4],
                                           uint32_t tile) {
    int lane = threadIdx.x % WARP;
    uint32_t at = tile_address<D>(tile, lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weight[m][2 * k + i / 2][i % 2 * 2];
                a[m][i] = pack_bf16(pair[0], pair[1]);
            }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            ldmatrix_x4_trans(b, (at ^ 16 * n) + tile_bytes(16 * k, D));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(sum[m][n], a[m], b[0], b[1]);
                mma_bf16(sum[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Multiplies each of a lane's rows by its factor.
template <int M, int N>
__device__ __forceinline__ void scale_rows(float (&x)[M][N][4], const float (&factor)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] *= factor[m][i / 2];
}

// Writes the warp's rows from `first` on, below T, in pieces of 16 bytes. They pass through `tile`, 16 M rows
// that are the warp's own.
template <int M, int D>
__device__ __forceinline__ void flash_store(floatX* to, size_t stride, int first, int T, floatX* tile,
                                            const float (&x)[M][D / 8][4]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = 16 * m + 8 * half + lane / 4;
                uint32_t pair = pack_bf16(x[m][n][2 * half], x[m][n][2 * half + 1]);
                *(uint32_t*)(tile + tile_offset<D>(row, n) + lane % 4 * 2) = pair;
            }
    __syncwarp();
    constexpr int PIECES = D / 8;
#pragma unroll
    for (int i = lane; i < 16 * M * PIECES; i += WARP) {
        int row = i / PIECES, piece = i % PIECES;
        const uint4* from = (const uint4*)(tile + tile_offset<D>(row, piece));
        if (first + row < T) *(uint4*)(to + (first + row) * stride + piece * 8) = *from;
    }
}

// --- forward

// Sizes are chosen for 2 blocks a multiprocessor in 255 registers a thread and an A100's 164 KB.
template <int D>
struct FlashForward {
    static constexpr int M = 2, ROWS = 16 * M * FLASH_WARPS, KEYS = D == 64 ? 64 : 32;
    static constexpr bool KEEPS_ROWS = D == 64;
    static constexpr size_t SHARED = tile_bytes(ROWS + FLASH_STAGES * 2 * KEYS, D);
    static_assert(tile_bytes(KEYS, D) % 256 == 0, "tiles begin at multiples of 256 bytes");
};

// Hides the keys after a query's position: `row` is the warp's first row, `column` the tile's first column.
template <bool ROWS_ARE_KEYS, int M, int N>
__device__ __forceinline__ void hide_future(float (&s)[M][N][4], int row, int column) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = row + 16 * m + i / 2 * 8 + lane / 4, c = column + 8 * n + lane % 4 * 2 + i % 2;
                if (ROWS_ARE_KEYS ? r > c : c > r) s[m][n][i] = -INFINITY;
            }
}

// A tile of scores becomes 2^(c (s - top)), c = scale log2 e. top is the largest score of a row when it last
// moved: it lags until a power would exceed 2^8. No sum minds that, and earlier ones seldom have to be
// multiplied. total is this lane's part.
template <int M, int N, int K>
__device__ __forceinline__ void flash_softmax(float (&s)[M][N][4], float (&sum)[M][K][4], float (&top)[M][2],
                                              float (&total)[M][2], float c) {
    float largest[M][2], shrink[M][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = top[m][half];
#pragma unroll
            for (int n = 0; n < N; n++) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
            x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
            largest[m][half] = x;               // finite: every row sees key 0
            moves = moves || c * (x - top[m][half]) > 8;
        }
    if (__any_sync(ALL_LANES, moves)) {
#pragma unroll
        for (int e = 0; e < 2 * M; e++) {
            float& row_top = top[e / 2][e % 2];
            shrink[e / 2][e % 2] = power_of_2(c * (row_top - largest[e / 2][e % 2]));
            total[e / 2][e % 2] *= shrink[e / 2][e % 2];
            row_top = largest[e / 2][e % 2];
        }
        scale_rows(sum, shrink);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[m][n][i] = power_of_2(fmaf(c, s[m][n][i], -c * top[m][i / 2]));
                total[m][i / 2] += s[m][n][i];
            }
}

// At the end: lse of the warp's rows; total becomes what they are to be multiplied by.
template <int M>
__device__ __forceinline__ void flash_finish(float* lse, int first, int T, const float (&top)[M][2],
                                             float (&total)[M][2], float c) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half] + __shfl_xor_sync(ALL_LANES, total[m][half], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            int query = first + 16 * m + 8 * half + lane / 4;
            if (lane % 4 == 0 && query < T) lse[query] = LN_2 * (c * top[m][half] + log2f(sum));
            total[m][half] = 1 / sum;
        }
}

// Grid: heads, and in each the tiles of queries from row0 on, the longest first
template <int D>
static __global__ void __launch_bounds__(FLASH_THREADS, 2)
flash_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int row0, int C, int NH) {
    typedef FlashForward<D> Size;
    constexpr int M = Size::M, ROWS = Size::ROWS, KEYS = Size::KEYS, N = KEYS / 8;
    extern __shared__ __align__(256) uint4 flash_shared[];
    int tiles = (T - row0 + ROWS - 1) / ROWS, tile = tiles - 1 - blockIdx.x % tiles;
    HeadPlace place = head_place(blockIdx.x / tiles, T, C, NH);
    HeadRows q = {qkv + place.qkv, 3 * C}, k = {q.first + C, 3 * C}, v = {k.first + C, 3 * C};
    int block_first = row0 + tile * ROWS, own = threadIdx.x / WARP * 16 * M, first = block_first + own;
    int end = min(block_first + ROWS, T);
    uint32_t q_tile = (uint32_t)__cvta_generic_to_shared(flash_shared);
    auto k_tile = [&](int stage) { return q_tile + tile_bytes(ROWS + stage * 2 * KEYS, D); };
    auto v_tile = [&](int stage) { return k_tile(stage) + tile_bytes(KEYS, D); };
    auto load_keys = [&](int stage, int key0) {
        load_tile<D, KEYS>(k_tile(stage), k, key0, T);
        load_tile<D, KEYS>(v_tile(stage), v, key0, T);
        cp_async_commit();
    };

    RowFactor<M, D, Size::KEEPS_ROWS> q_factor(q_tile, own);
    load_tile<D, ROWS>(q_tile, q, block_first, T);
    cp_async_commit();
    load_keys(0, 0);
    cp_async_wait<1>();
    __syncthreads();
    q_factor.keep();

    float sum[M][D / 8][4] = {}, top[M][2], total[M][2] = {};
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;
    float c = LOG2_E / sqrtf((float)D);
    for (int key0 = 0, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        if (key0 + KEYS < end) load_keys(stage ^ 1, key0 + KEYS);
        else cp_async_commit();                 // an empty group: the wait below counts groups
        cp_async_wait<1>();
        __syncthreads();
        if (key0 < first + 16 * M) {            // this warp sees some of these keys
            float s[M][N][4] = {};
            flash_products<M, N, D>(s, q_factor, k_tile(stage));
            if (key0 + KEYS - 1 > first) hide_future<false>(s, first, key0);
            flash_softmax(s, sum, top, total, c);
            flash_sums<M, N, D>(sum, s, v_tile(stage));
        }
        __syncthreads();                        // the next tile but one takes this one's place
    }
    flash_finish(lse + place.row, first, T, top, total, c);
    scale_rows(sum, total);
    flash_store<M, D>(out + place.out, (size_t)C, first, T, (floatX*)flash_shared + own * D, sum);
}

template <int D>
static void flash_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int row0, int C, int NH,
                          cudaStream_t stream) {
    typedef FlashForward<D> Size;
    int blocks = ceil_div(T - row0, Size::ROWS) * B * NH;
    CUDA(cudaFuncSetAttribute(flash_forward_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              (int)Size::SHARED));
    flash_forward_kernel<D><<<blocks, FLASH_THREADS, Size::SHARED, stream>>>(out, lse, qkv, T, row0, C, NH);
    LAUNCHED();
}

// --- backward

template <int D, bool OF_KEYS>
struct FlashBackward {
    static constexpr int M = D == 64 ? 2 : 1, ROWS = 16 * M * FLASH_WARPS;
    static constexpr int COLUMNS = D == 64 && !OF_KEYS ? 64 : 32;
    static constexpr bool KEEPS_ROWS = D == 128 && !OF_KEYS;
    // bytes: a tile of rows; one of columns; and a stage: two of those, and lse and delta of queries
    static constexpr int ROW_TILE = tile_bytes(ROWS, D), TILE = tile_bytes(COLUMNS, D);
    static constexpr int STATISTICS = OF_KEYS ? 2 * COLUMNS * (int)sizeof(float) : 0;
    static constexpr int STAGE = 2 * TILE + STATISTICS;
    static constexpr size_t SHARED = 2 * ROW_TILE + FLASH_STAGES * STAGE;
    static_assert(TILE % 256 == 0 && STAGE % 256 == 0, "tiles begin at multiples of 256 bytes");
};

// s becomes p = 2^(c s - lse log2 e), dp becomes ds. of(m, n, i): {lse log2 e, delta} of an element's query
template <int M, int N, class Statistics>
__device__ __forceinline__ void flash_gradients(float (&s)[M][N][4], float (&dp)[M][N][4], Statistics of,
                                                float c) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int m = 0; m < M; m++) {
                float2 query = of(m, n, i);
                s[m][n][i] = power_of_2(fmaf(c, s[m][n][i], -query.x));
                dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - query.y);
            }
}

// Grid: heads, and in each the tiles of rows (keys or queries), the longest first. Where rows are keys, s is
// (keys, queries): so p and ds are first factors there too, and nothing is transposed.
template <int D, bool OF_KEYS>
static __global__ void __launch_bounds__(FLASH_THREADS, 2)
flash_backward_kernel(floatX* dqkv, const floatX* dout, const float* lse, const float* delta,
                      const floatX* qkv, int T, int C, int NH) {
    typedef FlashBackward<D, OF_KEYS> Size;
    constexpr int M = Size::M, ROWS = Size::ROWS, COLUMNS = Size::COLUMNS, N = COLUMNS / 8;
    constexpr int ROW_TILE = Size::ROW_TILE, TILE = Size::TILE, STAGE = Size::STAGE;
    static_assert(ROWS % COLUMNS == 0, "the first tile of queries must begin at the first key of the block");
    static_assert(!OF_KEYS || 2 * COLUMNS <= FLASH_THREADS, "a thread copies at most one statistic");
    extern __shared__ __align__(256) uint4 flash_shared[];
    int lane = threadIdx.x % WARP, tiles = (T + ROWS - 1) / ROWS, tile = blockIdx.x % tiles;
    int block_first = (OF_KEYS ? tile : tiles - 1 - tile) * ROWS;
    int own = threadIdx.x / WARP * 16 * M, first = block_first + own;
    int begin = OF_KEYS ? block_first : 0, end = OF_KEYS ? T : min(block_first + ROWS, T);
    HeadPlace place = head_place(blockIdx.x / tiles, T, C, NH);
    BackwardSides side = backward_sides<OF_KEYS>(qkv + place.qkv, dout + place.out, C);
    lse += place.row;
    delta += place.row;

    uint32_t row_tile = (uint32_t)__cvta_generic_to_shared(flash_shared);
    auto column_tile = [&](int stage) { return row_tile + 2 * ROW_TILE + stage * STAGE; };
    auto load_columns = [&](int stage, int column) {
        load_tile<D, COLUMNS>(column_tile(stage), side.column_s, column, T);
        load_tile<D, COLUMNS>(column_tile(stage) + TILE, side.column_dp, column, T);
        int i = threadIdx.x, t = column + i % COLUMNS;
        if (OF_KEYS && i < 2 * COLUMNS)         // from T on both are 0: with q = dout = 0 that adds nothing
            cp_async_4(column_tile(stage) + 2 * TILE + 4 * i, (i < COLUMNS ? lse : delta) + t, t < T);
        cp_async_commit();
    };
    load_tile<D, ROWS>(row_tile, side.row_s, block_first, T);
    load_tile<D, ROWS>(row_tile + ROW_TILE, side.row_dp, block_first, T);
    cp_async_commit();
    load_columns(0, begin);
    cp_async_wait<1>();
    __syncthreads();
    RowFactor<M, D, Size::KEEPS_ROWS> s_factor(row_tile, own), dp_factor(row_tile + ROW_TILE, own);
    s_factor.keep();
    dp_factor.keep();

    float2 of_row[M][2];
    for (int e = 0; e < 2 * M; e++) {
        int t = first + 8 * e + lane / 4;
        of_row[e / 2][e % 2] = !OF_KEYS && t < T ? make_float2(LOG2_E * lse[t], delta[t]) : make_float2(0, 0);
    }
    float sum_s[M][D / 8][4] = {}, sum_dp[OF_KEYS ? M : 1][D / 8][4] = {};
    float scale = 1 / sqrtf((float)D), c = LOG2_E * scale;
    for (int column = begin, stage = 0; column < end; column += COLUMNS, stage ^= 1) {
        if (column + COLUMNS < end) load_columns(stage ^ 1, column + COLUMNS);
        else cp_async_commit();                 // an empty group: the wait below counts groups
        cp_async_wait<1>();
        __syncthreads();
        if (OF_KEYS ? column + COLUMNS > first : column < first + 16 * M) {    // something is not hidden
            float s[M][N][4] = {}, dp[M][N][4] = {};
            flash_products<M, N, D>(s, s_factor, column_tile(stage));
            flash_products<M, N, D>(dp, dp_factor, column_tile(stage) + TILE);
            if (OF_KEYS ? column < first + 16 * M - 1 : column + COLUMNS - 1 > first)
                hide_future<OF_KEYS>(s, first, column);
            const char* statistics = (const char*)flash_shared + 2 * ROW_TILE + stage * STAGE + 2 * TILE;
            auto of = [&](int m, int n, int i) {
                if (!OF_KEYS) return of_row[m][i / 2];
                const float* of_column = (const float*)statistics + 8 * n + lane % 4 * 2 + i % 2;
                return make_float2(LOG2_E * of_column[0], of_column[COLUMNS]);
            };
            flash_gradients(s, dp, of, c);
            if constexpr (OF_KEYS) flash_sums<M, N, D>(sum_dp, s, column_tile(stage) + TILE);
            flash_sums<M, N, D>(sum_s, dp, column_tile(stage));
        }
        __syncthreads();                        // the next tile but one takes this one's place
    }
    float factor[M][2];
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = scale;
    scale_rows(sum_s, factor);
    floatX *to = dqkv + place.qkv, *passage = (floatX*)flash_shared + own * D;
    size_t stride = 3 * (size_t)C;
    flash_store<M, D>(OF_KEYS ? to + C : to, stride, first, T, passage, sum_s);
    if constexpr (OF_KEYS) flash_store<M, D>(to + 2 * C, stride, first, T, passage + ROWS * D, sum_dp);
}

template <int D, bool OF_KEYS>
static void flash_backward_side(floatX* dqkv, const floatX* dout, const float* lse, const float* delta,
                                const floatX* qkv, int B, int T, int C, int NH, cudaStream_t stream) {
    typedef FlashBackward<D, OF_KEYS> Size;
    auto kernel = flash_backward_kernel<D, OF_KEYS>;
    int blocks = ceil_div(T, Size::ROWS) * B * NH;
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)Size::SHARED));
    kernel<<<blocks, FLASH_THREADS, Size::SHARED, stream>>>(dqkv, dout, lse, delta, qkv, T, C, NH);
    LAUNCHED();
}

template <int D>
static void flash_backward(floatX* dqkv, const floatX* dout, const float* lse, const float* delta,
                           const floatX* qkv, int B, int T, int C, int NH, cudaStream_t stream) {
    flash_backward_side<D, false>(dqkv, dout, lse, delta, qkv, B, T, C, NH, stream);
    flash_backward_side<D, true>(dqkv, dout, lse, delta, qkv, B, T, C, NH, stream);
}

#endif  // PRECISION_FP32

// ------------------------------------------------------------------------------------------------
// The choice

#ifdef USE_CUDNN
#include "dev/cuda/attention_cudnn.h"
static_assert(sizeof(floatX) == 2, "cuDNN's attention is for bf16");
#endif

// Whether flash kernels serve heads of D numbers. addresses: all tensors', or-ed. Rows are aligned where the
// first one is.
static bool flash_serves(int D, uintptr_t addresses) {
    return !attention_plain_only && sizeof(floatX) == 2 && (D == 64 || D == 128) && addresses % 16 == 0;
}

// out (B, T, C), lse (B, NH, T) from qkv (B, T, 3C), for positions from row0 on (earlier ones: there already)
static void attention_forward_gpu(floatX* out, float* lse, const floatX* qkv, int B, int T, int row0, int C,
                                  int NH, cudaStream_t stream) {
    assert(B > 0 && 0 <= row0 && row0 < T && NH > 0 && C > 0 && C % NH == 0);
    int D = C / NH;
#ifdef USE_CUDNN
    bool whole = row0 == 0 && !attention_plain_only;
    if (whole && cudnn_attention_forward(out, lse, qkv, B, T, C, NH, stream)) return;
#endif
    if (!flash_serves(D, (uintptr_t)out | (uintptr_t)qkv)) {
        attention_forward_plain(out, lse, qkv, B, T, row0, C, NH, stream);
        return;
    }
#ifndef PRECISION_FP32
    (D == 64 ? flash_forward<64> : flash_forward<128>)(out, lse, qkv, B, T, row0, C, NH, stream);
#endif
}

// Floats of scratch
static size_t attention_backward_scratch(int B, int T, int NH) { return (size_t)B * NH * T; }

// dqkv (B, T, 3C) = from dout (B, T, C) and what the forward pass read and wrote; scratch holds delta
static void attention_backward_gpu(floatX* dqkv, const floatX* dout, const floatX* out, const float* lse,
                                   const floatX* qkv, float* scratch, int B, int T, int C, int NH,
                                   cudaStream_t stream) {
    assert(B > 0 && T > 0 && NH > 0 && C > 0 && C % NH == 0);
    int D = C / NH;
    float* delta = scratch;
#ifdef USE_CUDNN
    if (!attention_plain_only && cudnn_attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH, stream))
        return;
#endif
    if (!flash_serves(D, (uintptr_t)dqkv | (uintptr_t)dout | (uintptr_t)out | (uintptr_t)qkv)) {
        attention_delta<WARP, 1>(delta, dout, out, B, T, C, NH, stream);
        attention_backward_plain(dqkv, dout, lse, delta, qkv, B, T, C, NH, stream);
        return;
    }
#ifndef PRECISION_FP32
    attention_delta<8, 8>(delta, dout, out, B, T, C, NH, stream);
    (D == 64 ? flash_backward<64> : flash_backward<128>)(dqkv, dout, lse, delta, qkv, B, T, C, NH, stream);
#endif
}
// ------------------------------------------------------------------------------------------------
// The model on the device: what it keeps, and where. As in the reference one function lays everything out;
// without memory it only counts, which is the plan. Each buffer is an allocation of its own, so that a kernel
// that leaves one is noticed. The device hands out large ones by whole pages, small ones from shared pages.

enum { DEVICE_PAGE = 2 << 20 };
typedef struct { Arena plan; bool taking; void* blocks[4096]; int block_count; } DeviceArena;

static void* device_carve(DeviceArena* arena, const char* what, size_t count, size_t size) {
    void* memory = NULL;
    size_t bytes = count * size, page = bytes > DEVICE_PAGE / 2 ? DEVICE_PAGE : DEVICE_PAGE / 4096;
    plan_carve(&arena->plan, what, (bytes + page - 1) / page, page);
    if (!arena->taking || !count) return NULL;
    assert(arena->block_count < (int)(sizeof arena->blocks / sizeof arena->blocks[0]));
    CUDA(cudaMalloc(&memory, count * size));
    CUDA(cudaMemset(memory, 0, count * size));
    return arena->blocks[arena->block_count++] = memory;
}
static floatX* carve_x(DeviceArena* arena, const char* what, size_t count) {
    return (floatX*)device_carve(arena, what, count, sizeof(floatX));
}
static float* carve_f(DeviceArena* arena, const char* what, size_t count) {
    return (float*)device_carve(arena, what, count, sizeof(float));
}

enum { TENSOR_ALIGN = 64, VOCABULARY_ALIGN = 128 };

static int padded_vocabulary(const Config* c) {
    return ceil_div((size_t)c->V, VOCABULARY_ALIGN) * VOCABULARY_ALIGN;
}

typedef struct {
    Model m; // the layout, and fp32: params (masters), grads, adam_m, adam_v, head_grads (Vp, C)
    floatX* weights;            // (m.size) copies of the masters, which the products read
} DeviceModel;

static size_t aligned_size(size_t size) { return (size + TENSOR_ALIGN - 1) / TENSOR_ALIGN * TENSOR_ALIGN; }

// As the host's model, but each tensor begins at a multiple of TENSOR_ALIGN numbers, so that vectors of 16
// bytes can be read, and wte has Vp rows: the last ones are zero for ever, and no softmax, norm or file sees
// them.
static void device_layout(DeviceModel* d, const Model* host) {
    size_t end = 0, block_end = 0;
    d->m = *host;
    d->m.tensors = (Tensor*)allocate((size_t)host->tensor_count, sizeof(Tensor));
    d->m.moment_size = 0;
    for (int i = 0; i < host->tensor_count; i++) {
        Tensor* t = &d->m.tensors[i];
        *t = host->tensors[i];
        if (!t->here) continue;
        size_t size = tensor_size(t), before = end;
        if (t->spec == &tensor_specs[WTE]) size = (size_t)padded_vocabulary(&host->c) * t->cols;
        t->first = end;
        end += aligned_size(size);
        t->moments = d->m.moment_size;
        d->m.moment_size += aligned_size(t->piece_size);
        if (t->block < 0 || host->place[t->block] == 0) d->m.first[t->spec - tensor_specs] = t->first;
        if (t->block >= 0 && host->place[t->block] == 0) block_end = end;
        else if (t->block >= 0 && host->place[t->block] == 1 && before == block_end)
            d->m.block_size = before - d->m.first[t->spec - tensor_specs];
    }
    d->m.size = end;
}

// NumberKind of the head's gradient, where the head is
static size_t head_size(const Model* m) {
    return holds_head(m) ? (size_t)padded_vocabulary(&m->c) * (size_t)m->c.C : 0;
}

static void device_model_memory(DeviceModel* d, DeviceArena* arena, bool training) {
    d->m.params = carve_f(arena, "parameters (fp32)", d->m.size);
    d->weights = carve_x(arena, "parameters (copies)", d->m.size);
    if (!training) return;
    d->m.grads = carve_f(arena, "gradients", d->m.size);
    d->m.head_grads = carve_f(arena, "gradients", head_size(&d->m));
    d->m.adam_m = carve_f(arena, "AdamW moments", d->m.moment_size);
    d->m.adam_v = carve_f(arena, "AdamW moments", d->m.moment_size);
}

static floatX* weight(const DeviceModel* d, TensorId id, int l) {
    return d->weights + (param(&d->m, id, l) - d->m.params);
}

typedef struct {                // of one sublayer, rows = B * T
    float *coef, *mix, *rnorm;  // (rows, n*n + 2n), (rows, M), (rows, groups)
    float *stats, *lse;         // (rows, 2), (B, NH, T)
    floatX *u, *ln, *f;         // (rows, C) what is read, F's input, F's output
    floatX *qkv, *attn;         // (rows, 3C), (rows, C)
    floatX *fc, *gelu;          // (rows, 4C) before and after GELU
} DeviceSublayer;

// Of one micro-batch in one stage; the second half is scratch, which all micro-batches share.
typedef struct DeviceActivations {
    int B, T, block, head_rows; // at most; sublayers per block of recomputation; rows of logits at once
    const BoundaryKernels* kernels;
    Stage stage;
    DeviceSublayer* sub;        // [2L]
    floatX** state;             // [2L + 1] (rows, n, C)
    floatX *mean, *ln;          // (rows, C)
    float *stats, *losses;      // (rows, 2), (rows)
    int32_t *tokens, *targets;  // (B, T)
    TokenGroups groups;         // the rows by token, for the embedding's gradient
    struct DeviceActivations*
        shared; // whose scratch this is, and who had the states between blocks' starts last
    const struct DeviceActivations* resident;
    floatX** between;           // [block] (rows, n, C)
    bool beside;                // forward passes run beside backward ones: theirs are in these two, in turns
    floatX* passing[2];         // (rows, n, C)
    cudaEvent_t done;           // what was done with a slot last, in whichever stream
    floatX* logits;             // (head_rows, Vp)
    floatX *dstate, *dln, *dwide, *df;          // (rows, n, C), (rows, C), (rows, 4C), (rows, C)
    float* dcoef;               // (rows, n*n + 2n)
    float* scratch;             // of whichever backward kernel runs: one stream, so one at a time
} DeviceActivations;

static void device_layout_sublayer(const DeviceActivations* a, DeviceArena* arena, const Config* c, int k,
                                   bool training) {
    size_t C = (size_t)c->C, rows = (size_t)a->B * (size_t)a->T;
    DeviceSublayer* s = a->sub + k;
    s->coef = carve_f(arena, "coefficients", rows * (size_t)coefficient_count(c));
    if (k % 2 == 0) s->qkv = carve_x(arena, "activations", rows * 3 * C);
    if (k >= a->stage.first + 2 &&
        !training) { // without a backward pass only keys and values are wanted again
        DeviceSublayer shared = s[-2];
        shared.coef = s->coef;
        shared.qkv = s->qkv;
        *s = shared;
        return;
    }
    s->mix = carve_f(arena, "coefficients", rows * (size_t)projection_M(c));
    s->rnorm = carve_f(arena, "coefficients", has_connections(c) ? rows * (size_t)projection_groups(c) : 0);
    s->u = has_connections(c) ? carve_x(arena, "activations", rows * C) : NULL; // elsewhere the state itself
    s->stats = carve_f(arena, "activations", rows * 2);
    s->ln = carve_x(arena, "activations", rows * C);
    s->f = carve_x(arena, "activations", rows * C);
    if (k % 2 == 0) {
        s->lse = carve_f(arena, "activations", rows * (size_t)c->NH);
        s->attn = carve_x(arena, "activations", rows * C);
    } else {
        s->fc = carve_x(arena, "activations", rows * 4 * C);
        s->gelu = carve_x(arena, "activations", rows * 4 * C);
    }
}

// As the reference's layout_states
static void device_layout_states(DeviceActivations* a, DeviceArena* arena, const Config* c, bool training) {
    size_t size = (size_t)a->B * (size_t)a->T * (size_t)c->n * (size_t)c->C;
    const Stage* stage = &a->stage;
    for (int k = stage->first; k <= stage->last; k++) {
        int j = k - stage->first;
        bool wired = (k == stage->first && !stage->embeds) || (k == stage->last && !stage->heads);
        if (wired) continue;
        if (training && j % a->block) a->state[k] = a->between[j % a->block];
        else if (!training && j > 2) a->state[k] = a->state[k - 2];
        else a->state[k] = carve_x(arena, "streams", size);
    }
}

// Floats that the hungriest backward kernel wants
static size_t backward_scratch(const Config* c, int B, int T, const BoundaryKernels* kernels) {
    int rows = B * T;
    size_t most = attention_backward_scratch(B, T, c->NH);
    size_t others[] = {sum_scratch(rows, 4 * c->C),
                       has_connections(c) ? kernels->backward_scratch(connections_of(c), rows) : 0};
    for (size_t other : others) most = other > most ? other : most;
    return most;
}

enum {
    LOGITS_BYTES = 1 << 30,     // of logits at once, at most: enough for every product to fill a GPU
    DUMP_ROWS = 64              // of logits, at least; and that a dump fetches at once
};

// What a micro-batch keeps, after the scratch has been laid out.
static void device_layout_slot(DeviceActivations* a, DeviceArena* arena, const Config* c, bool training) {
    size_t rows = (size_t)a->B * (size_t)a->T, C = (size_t)c->C;
    device_layout_states(a, arena, c, training);
    for (int k = a->stage.first; k < a->stage.last; k++) device_layout_sublayer(a, arena, c, k, training);
    if (!a->stage.embeds && !a->stage.heads) return;
    a->tokens = (int32_t*)device_carve(arena, "data", rows, sizeof(int32_t));
    a->targets = (int32_t*)device_carve(arena, "data", rows, sizeof(int32_t));
    if (training && a->stage.embeds) {
        a->groups.order = (int32_t*)device_carve(arena, "data", rows, sizeof(int32_t));
        a->groups.first = (int32_t*)device_carve(arena, "data", rows + 1, sizeof(int32_t));
        a->groups.token = (int32_t*)device_carve(arena, "data", rows, sizeof(int32_t));
    }
    if (!a->stage.heads) return;
    a->mean = carve_x(arena, "activations", rows * C);
    a->stats = carve_f(arena, "activations", rows * 2);
    a->ln = carve_x(arena, "activations", rows * C);
    a->losses = carve_f(arena, "activations", rows);
}

static void device_layout_scratch(DeviceActivations* a, DeviceArena* arena, const Config* c, int B, int T,
                                  int block, const BoundaryKernels* kernels, bool training) {
    size_t rows = (size_t)B * (size_t)T, C = (size_t)c->C, Vp = (size_t)padded_vocabulary(c);
    size_t chunk = LOGITS_BYTES / sizeof(floatX) / Vp, state = rows * (size_t)c->n * C;
    a->B = B;
    a->T = T;
    a->block = block;
    a->kernels = kernels;
    a->head_rows = (int)(chunk < DUMP_ROWS ? (size_t)DUMP_ROWS : chunk);
    if ((size_t)a->head_rows > rows) a->head_rows = (int)rows;
    a->logits = carve_x(arena, "logits", a->stage.heads ? (size_t)a->head_rows * Vp : 0);
    if (!training) return;
    for (int j = 1; j < block; j++) a->between[j] = carve_x(arena, "streams", state);
    for (int j = 1; j < block && j < 3; j++)
        if (a->beside) a->passing[j % 2] = carve_x(arena, "streams", state);
    if (a->stage.embeds && a->stage.heads) a->dstate = carve_x(arena, "backward", state);
    a->dwide = carve_x(arena, "backward", rows * 4 * C);
    a->dln = carve_x(arena, "backward", rows * C);
    if (has_connections(c)) a->df = carve_x(arena, "backward", rows * C);
    a->dcoef = carve_f(arena, "backward", rows * (size_t)coefficient_count(c));
    a->scratch = carve_f(arena, "backward", backward_scratch(c, B, T, kernels));
}

static void device_activations_layout(DeviceActivations* a, DeviceArena* arena, const Config* c, int B,
                                      int T, int block, const BoundaryKernels* kernels, bool training) {
    device_layout_scratch(a, arena, c, B, T, block, kernels, training);
    device_layout_slot(a, arena, c, training);
}

// ------------------------------------------------------------------------------------------------
// The model, forward and backward: the reference's order of work. All of a pass is put into one queue and
// nothing waits.

typedef struct {                // work that goes in order, beside that of other queues
    cudaStream_t stream;
    cudaStream_t urgent;        // of the highest priority, for what --priority names: part of the same order
    int priority;               // enum Priority
    cudaEvent_t turn;           // one stream goes on where another is now
    cudaEvent_t ended[2];       // the last two halves of pairs
    int half;                   // which of them is the last
    Lt lt;                      // with a workspace of its own
} Queue;

typedef struct {
    const DeviceModel* d;
    DeviceActivations* a;
    Queue* queue;
    Lt* lt;                     // the queue's
    cudaStream_t stream;        // likewise, or its urgent one
    int B, T, row0; // rows before row0 are there already (only when text is generated, one sequence)
} Pass;

static int pass_rows(const Pass* p) { return p->B * p->T - p->row0; }

// What comes into `later` from now on is after all that is in `earlier`.
static void stream_follows(cudaStream_t later, cudaStream_t earlier, cudaEvent_t turn) {
    if (later == earlier) return;
    CUDA(cudaEventRecord(turn, earlier));
    CUDA(cudaStreamWaitEvent(later, turn, 0));
}

// The pass goes on in the urgent stream if --priority has this bit; until it comes back.
static Pass pass_hurries(const Pass* p, int what) {
    Pass urgent = *p;
    if (p->queue->priority & what) urgent.stream = p->queue->urgent;
    stream_follows(urgent.stream, p->stream, p->queue->turn);
    return urgent;
}
static void pass_rejoins(const Pass* p, const Pass* urgent) {
    stream_follows(p->stream, urgent->stream, p->queue->turn);
}

typedef struct { const float *fn, *base, *scale; } DeviceConnection;

static DeviceConnection device_connection(const DeviceModel* d, int k) {
    TensorId fn = k % 2 ? MLP_FN : ATTN_FN, base = k % 2 ? MLP_BASE : ATTN_BASE,
             scale = k % 2 ? MLP_SCALE : ATTN_SCALE;
    DeviceConnection c = {param(&d->m, fn, k / 2), param(&d->m, base, k / 2), param(&d->m, scale, k / 2)};
    return c;
}

// From the output of sublayer k - 1 to the input of sublayer k. The stage's last only writes its state, its
// first has no sublayer before it.
static void boundary_forward(const Pass* p, int k) {
    const Config* c = &p->d->m.c;
    DeviceActivations* a = p->a;
    int rows = pass_rows(p), last = a->stage.last;
    size_t r = (size_t)p->row0, C = (size_t)c->C, n = (size_t)c->n, count = (size_t)coefficient_count(c);
    const DeviceSublayer* before = k > a->stage.first ? &a->sub[k - 1] : NULL;
    floatX* y = a->state[k] + r * n * C;
    const floatX* x = before ? a->state[k - 1] + r * n * C : NULL;
    const floatX* f = before ? before->f + r * C : NULL;
    if (!has_connections(c)) {
        if (before) add_gpu(y, c->residual == RESIDUAL_PLAIN ? x : NULL, f, (size_t)rows * C, p->stream);
        if (k == last) return;
        layernorm_forward_gpu(a->sub[k].ln + r * C, a->sub[k].stats + r * 2, y,
                              weight(p->d, k % 2 ? LN_2_W : LN_1_W, k / 2),
                              weight(p->d, k % 2 ? LN_2_B : LN_1_B, k / 2), rows, c->C, p->stream);
        return;
    }
    Connections connections = connections_of(c);
    if (k == last && !before) return;
    if (k == last) return write_gpu(y, x, f, before->coef + r * count, connections, rows, p->stream);
    DeviceSublayer* s = &a->sub[k];
    DeviceConnection q = device_connection(p->d, k);
    Boundary b = {x,
                  f,
                  before ? before->coef + r * count : NULL,
                  y,
                  q.fn,
                  q.base,
                  q.scale,
                  weight(p->d, k % 2 ? LN_2_W : LN_1_W, k / 2),
                  weight(p->d, k % 2 ? LN_2_B : LN_1_B, k / 2),
                  s->mix + r * (size_t)projection_M(c),
                  s->rnorm + r * (size_t)projection_groups(c),
                  s->coef + r * count,
                  s->stats + r * 2,
                  s->u + r * C,
                  s->ln + r * C};
    a->kernels->forward(&b, connections, rows, p->stream);
}

// s->f = F(s->ln): attention in even sublayers, MLP in odd ones
static void device_sublayer_forward(const Pass* p, int k) {
    const DeviceModel* d = p->d;
    const DeviceSublayer* s = &p->a->sub[k];
    int C = d->m.c.C, l = k / 2, rows = pass_rows(p);
    size_t r = (size_t)p->row0, C_ = (size_t)C;
    if (k % 2 == 0) {
        linear_forward_gpu(p->lt, s->qkv + r * 3 * C_, NULL, s->ln + r * C_, weight(d, C_ATTN_W, l),
                           weight(d, C_ATTN_B, l), rows, C, 3 * C, p->stream);
        attention_forward_gpu(s->attn, s->lse, s->qkv, p->B, p->T, p->row0, C, d->m.c.NH, p->stream);
        linear_forward_gpu(p->lt, s->f + r * C_, NULL, s->attn + r * C_, weight(d, ATTN_PROJ_W, l),
                           weight(d, ATTN_PROJ_B, l), rows, C, C, p->stream);
    } else {
        linear_forward_gpu(p->lt, s->fc + r * 4 * C_, s->gelu + r * 4 * C_, s->ln + r * C_,
                           weight(d, C_FC_W, l), weight(d, C_FC_B, l), rows, C, 4 * C, p->stream);
        linear_forward_gpu(p->lt, s->f + r * C_, NULL, s->gelu + r * 4 * C_, weight(d, MLP_PROJ_W, l),
                           weight(d, MLP_PROJ_B, l), rows, 4 * C, C, p->stream);
    }
}

// Where passes beside others have the states between blocks' starts
static void place_states(DeviceActivations* a, bool forward) {
    for (int k = a->stage.first + 1; k <= a->stage.last && a->beside; k++) {
        int j = k - a->stage.first;
        bool wired = k == a->stage.last && !a->stage.heads;
        if (j % a->block && !wired) a->state[k] = forward ? a->passing[j % 2] : a->between[j % a->block];
    }
}

// A stage, from a->tokens or a->state[first] to a->ln (rows, C) or a->state[last]; `saw` is called with each
// state while it is there, if not NULL.
static void device_forward(const Pass* p, void (*saw)(const Pass*, int k, void* context), void* context) {
    const DeviceModel* d = p->d;
    DeviceActivations* a = p->a;
    const Config* c = &d->m.c;
    const Stage* stage = &a->stage;
    size_t r = (size_t)p->row0, C = (size_t)c->C, n = (size_t)c->n;
    int rows = pass_rows(p);
    assert(p->B * p->T <= a->B * a->T && p->T <= c->T && (p->row0 == 0 || p->B == 1));
    place_states(a, true);
    if (stage->embeds)
        embedding_forward_gpu(a->state[0] + r * n * C, a->tokens + r, weight(d, WTE, 0),
                              weight(d, WPE, 0) + r * C, rows, p->T, c->n, c->C, p->stream);
    for (int k = stage->first; k <= stage->last; k++) {
        Pass q = pass_hurries(p, k == stage->last && !stage->heads ? PRIORITY_POST : PRIORITY_NONE);
        boundary_forward(&q, k);
        pass_rejoins(p, &q);
        if (saw && (k < stage->last || stage->heads)) saw(p, k, context);
        if (k < stage->last) device_sublayer_forward(p, k);
    }
    if (!a->beside) a->shared->resident = a;
    if (!stage->heads) return;
    readout_forward_gpu(a->mean + r * C, a->ln + r * C, a->stats + r * 2, a->state[2 * c->L] + r * n * C,
                        weight(d, LN_F_W, 0), weight(d, LN_F_B, 0), rows, c->n, c->C, p->stream);
}

// logits (count, Vp) of rows from a->ln
static void device_head_logits(const Pass* p, int row, int count) {
    const Config* c = &p->d->m.c;
    linear_forward_gpu(p->lt, p->a->logits, NULL, p->a->ln + (size_t)row * (size_t)c->C, weight(p->d, WTE, 0),
                       NULL, count, c->C, padded_vocabulary(c), p->stream);
}

// a->losses (rows), nats. With scale > 0 also the head's way back, as in the reference.
static void device_head(const Pass* p, float scale) {
    DeviceActivations* a = p->a;
    const Config* c = &p->d->m.c;
    int rows = p->B * p->T, Vp = padded_vocabulary(c);
    for (int r = 0; r < rows; r += a->head_rows) {
        int count = min_int(a->head_rows, rows - r);
        size_t first = (size_t)r * (size_t)c->C;
        device_head_logits(p, r, count);
        classifier_gpu(a->losses + r, a->logits, a->targets + r, scale, count, c->V, Vp, p->stream);
        if (scale <= 0) continue;
        linear_backward_input_gpu(p->lt, a->dln + first, a->logits, weight(p->d, WTE, 0), NULL, count, c->C,
                                  Vp, p->stream);
        weight_gradient_gpu(p->lt, p->d->m.head_grads, a->logits, a->ln + first, count, c->C, Vp, p->stream);
    }
}

// The states of k's block before k, from its first and the stored f: by the same kernel, so the same bits
static void device_recompute_states(const Pass* p, int k) {
    const Config* c = &p->d->m.c;
    DeviceActivations* a = p->a;
    int rows = p->B * p->T, first = a->stage.first;
    Pass q = pass_hurries(p, PRIORITY_RECOMPUTE);
    for (int j = first + (k - first) / a->block * a->block; j < k; j++) {
        if (has_connections(c))
            write_gpu(a->state[j + 1], a->state[j], a->sub[j].f, a->sub[j].coef, connections_of(c), rows,
                      q.stream);
        else
            add_gpu(a->state[j + 1], c->residual == RESIDUAL_PLAIN ? a->state[j] : NULL, a->sub[j].f,
                    (size_t)rows * (size_t)c->C, q.stream);
    }
    pass_rejoins(p, &q);
}

// The states that the backward pass needs first, unless they are still there; it need not have begun.
static void device_recompute_last_block(const Pass* p) {
    DeviceActivations* a = p->a;
    place_states(a, false);
    if (a->shared->resident != a && a->stage.last > a->stage.first)
        device_recompute_states(p, a->stage.last - 1);
    a->shared->resident = a;
}

// a->dln (rows, C) = from df (rows, C). What the weights' gradients need beside activations stays in
// a->dwide: (rows, 3C) of qkv or (rows, 4C) of fc.
static void device_sublayer_backward_input(const Pass* p, const floatX* df, int k) {
    const DeviceModel* d = p->d;
    DeviceActivations* a = p->a;
    const DeviceSublayer* s = &a->sub[k];
    int C = d->m.c.C, l = k / 2, rows = p->B * p->T;
    if (k % 2 == 0) {
        floatX* dattn = a->dln;             // free until it is written
        linear_backward_input_gpu(p->lt, dattn, df, weight(d, ATTN_PROJ_W, l), NULL, rows, C, C, p->stream);
        attention_backward_gpu(a->dwide, dattn, s->attn, s->lse, s->qkv, a->scratch, p->B, p->T, C, d->m.c.NH,
                               p->stream);
        linear_backward_input_gpu(p->lt, a->dln, a->dwide, weight(d, C_ATTN_W, l), NULL, rows, C, 3 * C,
                                  p->stream);
    } else {
        linear_backward_input_gpu(p->lt, a->dwide, df, weight(d, MLP_PROJ_W, l), s->fc, rows, 4 * C, C,
                                  p->stream);
        linear_backward_input_gpu(p->lt, a->dln, a->dwide, weight(d, C_FC_W, l), NULL, rows, C, 4 * C,
                                  p->stream);
    }
}

// Gradients of F's matrices and biases += from df (rows, C) and dwide
static void device_sublayer_backward_weight(const Pass* p, const floatX* df, const floatX* dwide, int k) {
    const Model* m = &p->d->m;
    DeviceActivations* a = p->a;
    const DeviceSublayer* s = &a->sub[k];
    int C = m->c.C, l = k / 2, rows = p->B * p->T;
    if (k % 2 == 0) {
        linear_backward_weight_gpu(p->lt, grad(m, ATTN_PROJ_W, l), grad(m, ATTN_PROJ_B, l), df, s->attn, rows,
                                   C, C, a->scratch, p->stream);
        linear_backward_weight_gpu(p->lt, grad(m, C_ATTN_W, l), grad(m, C_ATTN_B, l), dwide, s->ln, rows, C,
                                   3 * C, a->scratch, p->stream);
    } else {
        linear_backward_weight_gpu(p->lt, grad(m, MLP_PROJ_W, l), grad(m, MLP_PROJ_B, l), df, s->gelu, rows,
                                   4 * C, C, a->scratch, p->stream);
        linear_backward_weight_gpu(p->lt, grad(m, C_FC_W, l), grad(m, C_FC_B, l), dwide, s->ln, rows, C,
                                   4 * C, a->scratch, p->stream);
    }
}

// What the weights' gradients will need takes the place of activations that nobody reads again.
static void device_defer(const Pass* p, const floatX* df, int k) {
    const DeviceSublayer* s = &p->a->sub[k];
    size_t width = sizeof(floatX) * (size_t)(p->B * p->T) * (size_t)p->d->m.c.C;
    floatX* wide = k % 2 ? s->fc : s->qkv;
    CUDA(cudaMemcpyAsync(s->f, df, width, cudaMemcpyDeviceToDevice, p->stream));
    CUDA(cudaMemcpyAsync(wide, p->a->dwide, (k % 2 ? 4 : 3) * width, cudaMemcpyDeviceToDevice, p->stream));
}

static ConnectionBackward connection_gradients(const Pass* p, int k) {
    const DeviceModel* d = p->d;
    const Model* m = &d->m;
    DeviceActivations* a = p->a;
    const DeviceSublayer* s = &a->sub[k];
    DeviceConnection q = device_connection(d, k);
    int l = k / 2;
    return {a->dstate,
            a->dcoef,
            a->dln,
            a->state[k],
            s->u,
            weight(d, k % 2 ? LN_2_W : LN_1_W, l),
            s->stats,
            s->coef,
            s->mix,
            s->rnorm,
            q.fn,
            q.base,
            q.scale,
            grad(m, k % 2 ? MLP_FN : ATTN_FN, l),
            grad(m, k % 2 ? MLP_BASE : ATTN_BASE, l),
            grad(m, k % 2 ? MLP_SCALE : ATTN_SCALE, l),
            grad(m, k % 2 ? LN_2_W : LN_1_W, l),
            grad(m, k % 2 ? LN_2_B : LN_1_B, l)};
}

// From the input of sublayer k to the output of sublayer k - 1: from a->dstate and a->dln to df (rows, C),
// which is returned, NULL for the stage's first; gradients of the connection and of LayerNorm +=. Behind the
// stage's last is no sublayer.
static const floatX* boundary_backward(const Pass* p, int k) {
    const DeviceModel* d = p->d;
    const Model* m = &d->m;
    DeviceActivations* a = p->a;
    int rows = p->B * p->T, first = a->stage.first, last = a->stage.last, l = k / 2;
    if (!has_connections(&m->c)) {              // LayerNorm reads the state, and df is the state's gradient
        TensorId ln_w = k % 2 ? LN_2_W : LN_1_W, ln_b = k % 2 ? LN_2_B : LN_1_B;
        const floatX* past = m->c.residual == RESIDUAL_PLAIN ? a->dstate : NULL;
        if (k < last)
            layernorm_backward_gpu(a->dstate, past, grad(m, ln_w, l), grad(m, ln_b, l), a->dln,
                                   a->sub[k].stats, a->state[k], weight(d, ln_w, l), a->scratch, rows,
                                   m->c.C, p->stream);
        return k > first ? a->dstate : NULL;
    }
    BoundaryBackward b = {};
    b.next.dx = a->dstate;
    b.next.dcoef = a->dcoef;
    if (k < last) b.next = connection_gradients(p, k);
    if (k > first) b.x = a->state[k - 1], b.f = a->sub[k - 1].f, b.coef = a->sub[k - 1].coef, b.df = a->df;
    a->kernels->backward(&b, a->scratch, connections_of(&m->c), rows, p->stream);
    return b.df;
}

// As the reference's model_backward: in place in a->dstate
static void device_backward(const Pass* p, bool defer) {
    const DeviceModel* d = p->d;
    const Model* m = &d->m;
    const Config* c = &m->c;
    DeviceActivations* a = p->a;
    const Stage* stage = &a->stage;
    int rows = p->B * p->T;
    if (stage->heads)
        readout_backward_gpu(a->dstate, grad(m, LN_F_W, 0), grad(m, LN_F_B, 0), a->dln, a->stats, a->mean,
                             weight(d, LN_F_W, 0), a->scratch, rows, c->n, c->C, p->stream);
    device_recompute_last_block(p);
    for (int k = stage->last; k >= stage->first && stage->last > stage->first; k--) {
        bool block_ends = k > stage->first && k < stage->last && (k - stage->first) % a->block == 0;
        if (block_ends) device_recompute_states(p, k - 1);
        Pass q = pass_hurries(p, k == stage->first && !stage->embeds ? PRIORITY_POST : PRIORITY_NONE);
        const floatX* df = boundary_backward(&q, k);
        pass_rejoins(p, &q);
        if (!df) break;
        device_sublayer_backward_input(p, df, k - 1);
        if (defer) device_defer(p, df, k - 1);
        else device_sublayer_backward_weight(p, df, a->dwide, k - 1);
    }
    a->shared->resident = NULL;
    if (stage->embeds)
        embedding_backward_gpu(grad(m, WTE, 0), grad(m, WPE, 0), a->dstate, &a->groups, rows, p->T, c->n,
                               c->C, p->stream);
}

static void device_backward_weights(const Pass* p) {
    DeviceActivations* a = p->a;
    for (int k = a->stage.last - 1; k >= a->stage.first; k--)
        device_sublayer_backward_weight(p, a->sub[k].f, k % 2 ? a->sub[k].fc : a->sub[k].qkv, k);
}

// ------------------------------------------------------------------------------------------------
// Optimiser: norm of the gradients, AdamW on the fp32 masters, and their rounded copies. A table cuts all
// tensors into chunks of a fixed size, a block each: sums have the same order on every device.

enum { CHUNK = 1 << 15, CHUNK_THREADS = 256 };          // numbers; a thread of a block has every 256th
static_assert(CHUNK_THREADS % WARP == 0, "blocks have whole warps");

typedef struct {
    size_t first, moments, offset; // index of its first number in params, in the moments, and in its tensor
    uint64_t name;              // of its tensor, hashed
    int count, tensor;          // numbers; index into the model's tensors
    bool decayed, copied;       // of connections only masters are read
} Chunk;

enum { NO_TENSOR = 0x7f7f7f7f };                        // four equal bytes, for cudaMemsetAsync

typedef struct {
    Chunk* chunks;              // on the device, in the order of the tensors
    int* first_chunks;          // on the device (tensor_count + 1): where each tensor's begin
    double* sums;               // on the device: squares of a chunk's gradients (chunk_count), of a tensor's
    int *nonfinite, *host_nonfinite;    // the first such tensor, on the device; and pinned
    int chunk_count, tensor_count;
} Optimiser;

static bool has_copies(const Tensor* t) { return !strstr(t->name, "_hc."); }

// Of what is updated here
static int chunks_of(const Tensor* t) { return t->here ? ceil_div(t->piece_size, CHUNK) : 0; }

static void optimiser_memory(Optimiser* o, DeviceArena* arena, const Model* m) {
    o->tensor_count = m->tensor_count;
    o->chunk_count = 0;
    for (int t = 0; t < m->tensor_count; t++) o->chunk_count += chunks_of(&m->tensors[t]);
    o->chunks = (Chunk*)device_carve(arena, "data", (size_t)o->chunk_count, sizeof(Chunk));
    o->first_chunks = (int*)device_carve(arena, "data", (size_t)o->tensor_count + 1, sizeof(int));
    o->sums =
        (double*)device_carve(arena, "data", (size_t)(o->chunk_count + o->tensor_count), sizeof(double));
    o->nonfinite = (int*)device_carve(arena, "data", 1, sizeof(int));
}

static Chunk chunk_of(const Tensor* t, int tensor, int k) {
    size_t done = (size_t)k * CHUNK, left = t->piece_size - done;
    Chunk c = {t->first + t->piece + done,
               t->moments + done,
               t->piece + done,
               tensor_seed(t, 0),
               (int)(left < (size_t)CHUNK ? left : (size_t)CHUNK),
               tensor,
               t->spec->decayed,
               has_copies(t)};
    return c;
}

static void optimiser_open(Optimiser* o, const Model* m) {
    Chunk* chunks = (Chunk*)allocate((size_t)o->chunk_count, sizeof(Chunk));
    int* first = (int*)allocate((size_t)o->tensor_count + 1, sizeof(int));
    for (int t = 0; t < o->tensor_count; t++) {
        first[t + 1] = first[t] + chunks_of(&m->tensors[t]);
        for (int k = first[t]; k < first[t + 1]; k++) chunks[k] = chunk_of(&m->tensors[t], t, k - first[t]);
    }
    CUDA(cudaMemcpy(o->chunks, chunks, (size_t)o->chunk_count * sizeof(Chunk), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(o->first_chunks, first, ((size_t)o->tensor_count + 1) * sizeof(int),
                    cudaMemcpyHostToDevice));
    CUDA(cudaMallocHost(&o->host_nonfinite, sizeof(int)));
    free(chunks);
    free(first);
}

static void optimiser_close(Optimiser* o) { CUDA(cudaFreeHost(o->host_nonfinite)); }

// --- norm

__device__ __forceinline__ double warp_sum(double x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

static __global__ void chunk_squares_kernel(double* sums, const float* numbers, const Chunk* chunks) {
    __shared__ double warps[CHUNK_THREADS / WARP];
    const Chunk c = chunks[blockIdx.x];
    double sum = 0;
    numbers += c.first;
#pragma unroll 4
    for (int i = threadIdx.x; i < c.count; i += CHUNK_THREADS) sum += (double)numbers[i] * (double)numbers[i];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < CHUNK_THREADS / WARP; w++) sum += warps[w];
    sums[blockIdx.x] = sum;
}

// A warp has a tensor.
static __global__ void tensor_squares_kernel(double* of_tensors, const double* of_chunks,
                                             const int* first_chunks, int tensors) {
    int t = blockIdx.x * (CHUNK_THREADS / WARP) + threadIdx.x / WARP;
    if (t >= tensors) return;
    double sum = 0;
    for (int k = first_chunks[t] + threadIdx.x % WARP; k < first_chunks[t + 1]; k += WARP)
        sum += of_chunks[k];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) of_tensors[t] = sum;
}
// sums, on the device (tensor_count): of the squared gradients that are updated here. Nothing between
// tensors, and no padding, is part of them.
static void square_sums_gpu(const Optimiser* o, double* sums, const float* grads, cudaStream_t stream) {
    if (o->chunk_count)
        chunk_squares_kernel<<<o->chunk_count, CHUNK_THREADS, 0, stream>>>(o->sums, grads, o->chunks);
    LAUNCHED();
    tensor_squares_kernel<<<ceil_div(o->tensor_count, CHUNK_THREADS / WARP), CHUNK_THREADS, 0, stream>>>(
        sums, o->sums, o->first_chunks, o->tensor_count);
    LAUNCHED();
}

// --- copies
//
// Matrices are rounded stochastically: an update that is smaller than half a unit in the last place of a
// weight would else be unseen by the forward pass for many steps, and a product averages over the errors of a
// row. Vectors (biases, LayerNorm) are rounded to nearest: a channel's error there hits every token alike,
// and nothing averages it. Connections have no copies.
//
// The draw is a function of (seed, step, tensor's name, index in the tensor): a run that is resumed, or
// divided otherwise, has the same copies.

// mix64 and hash64 of host/common.h, for kernels
__device__ __forceinline__ uint64_t mix64_gpu(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
__device__ __forceinline__ uint64_t hash64_gpu(uint64_t seed, uint64_t index) {
    return mix64_gpu(mix64_gpu(seed) ^ index);
}

// One of the two neighbours of x in bf16, or x itself if it is there: away from zero with a probability of
// the distance from the nearer to zero, in units of their distance. draw: 16 bits.
__device__ __forceinline__ __nv_bfloat16 round_stochastically(float x, unsigned draw) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return __float2bfloat16_rn(x);     // inf, NaN
    return __ushort_as_bfloat16((unsigned short)((bits + draw) >> 16));
}

// What decides the draws of a chunk
__device__ __forceinline__ uint64_t draws_of(const Chunk& c, uint64_t seed) {
    return hash64_gpu(seed, c.name);
}

// seed: of this step
__device__ __forceinline__ floatX copy_of(float master, const Chunk& c, uint64_t draws, int i) {
    if (sizeof(floatX) == 4 || !c.decayed) return from_float<floatX>(master);
    return (floatX)round_stochastically(master, hash64_gpu(draws, c.offset + i) & 0xffff);
}

static __global__ void round_piece_kernel(floatX* copies, const float* masters, Chunk c, uint64_t draws,
                                          size_t count) {
    size_t i = (size_t)blockIdx.x * CHUNK_THREADS + threadIdx.x;
    if (i < count) copies[c.first + i] = copy_of(masters[c.first + i], c, draws, i);
}
// copies of the masters first .. first + count of a tensor as they are after `step` updates: those that
// adamw_gpu made then, on whichever rank
static void round_piece_gpu(floatX* copies, const float* masters, const Tensor* t, size_t first, size_t count,
                            uint64_t seed, long step, cudaStream_t stream) {
    Chunk c = {t->first + first, 0, first, tensor_seed(t, 0), 0, 0, t->spec->decayed, has_copies(t)};
    if (!c.copied || !count) return;
    uint64_t draws = hash64(hash64(seed, (uint64_t)step), c.name);
    round_piece_kernel<<<ceil_div(count, CHUNK_THREADS), CHUNK_THREADS, 0, stream>>>(copies, masters, c,
                                                                                     draws, count);
    LAUNCHED();
}

// --- AdamW (decoupled decay, bias correction)

typedef struct { float b1, b2, eps, clip, rate, root, keep; } AdamW;    // keep: of a decayed weight

static __global__ void adamw_kernel(float* params, float* adam_m, float* adam_v, const float* grads,
                                    floatX* copies, const Chunk* chunks, AdamW u, uint64_t seed) {
    const Chunk c = chunks[blockIdx.x];
    uint64_t draws = draws_of(c, seed);
    float keep = c.decayed ? u.keep : 1;
    params += c.first, adam_m += c.moments, adam_v += c.moments, grads += c.first, copies += c.first;
    for (int i = threadIdx.x; i < c.count; i += CHUNK_THREADS) {
        float d = grads[i] * u.clip;
        float m = u.b1 * adam_m[i] + (1 - u.b1) * d;
        float v = u.b2 * adam_v[i] + (1 - u.b2) * d * d;
        float p = params[i] * keep - u.rate * m / (sqrtf(v) * u.root + u.eps);
        adam_m[i] = m;
        adam_v[i] = v;
        params[i] = p;
        if (c.copied) copies[i] = copy_of(p, c, draws, i);
    }
}
// Masters, moments and copies after update u->step
static void adamw_gpu(const Optimiser* o, const DeviceModel* d, const Update* u, uint64_t seed,
                      cudaStream_t stream) {
    const Model* m = &d->m;
    AdamW a = {(float)u->beta1, (float)u->beta2, (float)u->eps, (float)u->clip,
               (float)(u->lr / (1 - pow(u->beta1, (double)u->step))),
               (float)(1 / sqrt(1 - pow(u->beta2, (double)u->step))), (float)(1 - u->lr * u->decay)};
    if (!o->chunk_count) return;                // stages without blocks
    adamw_kernel<<<o->chunk_count, CHUNK_THREADS, 0, stream>>>(
        m->params, m->adam_m, m->adam_v, m->grads, d->weights, o->chunks, a, hash64(seed, (uint64_t)u->step));
    LAUNCHED();
}

// --- what is not finite

static __global__ void first_nonfinite_kernel(int* first, const float* numbers, const Chunk* chunks) {
    const Chunk c = chunks[blockIdx.x];
    bool found = false;
    for (int i = threadIdx.x; i < c.count; i += CHUNK_THREADS) found |= !isfinite(numbers[c.first + i]);
    if (__syncthreads_or(found) && threadIdx.x == 0) atomicMin(first, c.tensor);
}
// The index of the first tensor with a number that is not finite, or -1. Waits for the device: it is only
// asked when a run is about to stop.
static int first_nonfinite_gpu(const Optimiser* o, const float* numbers, cudaStream_t stream) {
    CUDA(cudaMemsetAsync(o->nonfinite, NO_TENSOR & 0xff, sizeof(int), stream));
    if (o->chunk_count)
        first_nonfinite_kernel<<<o->chunk_count, CHUNK_THREADS, 0, stream>>>(o->nonfinite, numbers,
                                                                             o->chunks);
    LAUNCHED();
    CUDA(cudaMemcpyAsync(o->host_nonfinite, o->nonfinite, sizeof(int), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    return *o->host_nonfinite == NO_TENSOR ? -1 : *o->host_nonfinite;
}

// ------------------------------------------------------------------------------------------------
// The machine of a run (its contract is in train_gpt_mhc.c): one GPU, a queue that computes, and under a
// pipeline a second one, so that the halves of a pair overlap, and streams that move messages. Halves go into
// their queues one after the other: the host is far faster than the device, which sees both.

typedef struct {                // pinned, so that a copy does not wait for the work before it
    int32_t *tokens, *targets, *order, *first, *token;
    int groups;
    cudaEvent_t done;           // the copy that reads this has ended
} Upload;

typedef struct {
    cudaEvent_t begins, ends;
    int event;
} Mark; // of what was asked for; which of the trace, or -1

typedef struct {                // of a Wire
    cudaEvent_t used, copied;   // what computes is done with its data; its message has come or gone
} WireEvents;

typedef struct {
    DeviceModel model;
    DeviceActivations acts, infer;      // infer: one sequence, forward only, for generated text
    DeviceActivations* slots[MAX_PARTS];        // of each part; with one stage acts is the only one
    WireEvents* wires;          // of each wire
    Header* messages;           // pinned, of all wires
    DeviceArena arena;
    Optimiser optimiser;
    Mark* marks; // (mark_room), mark_count of them in this pass, which began at pass_start seconds
    int mark_count, mark_room;
    cudaEvent_t pass_begins;
    double pass_start;
    Queue main, forward;         // forward passes have their own where they run beside backward ones
    void* workspaces[2];        // of the queues' products
    Upload uploads[2];          // taken in turns
    int next_upload;
    double *sums, *host_sums; // (tensor_count + 1) of squares and, last, of losses; on the device, and pinned
    cudaStream_t wire_streams[2][2];    // of states and of gradients, that come and that leave
    StreamStats* streams;       // to be filled by forward passes, if not NULL
    char name[256];
    double peak;                // FLOP/s
    char ways[160];             // on which ranks exchange what
#ifdef HAVE_NCCL
    ncclComm_t nccl;            // of all ranks, or NULL
    cudaStream_t carrier;       // of batches of messages
    float* parts;               // (EXCHANGE) gradients of other ranks
#endif
} Gpu;

enum { WORKSPACE_BYTES = 32 << 20, RUNTIME_BYTES = 64 << 20 };      // the latter nobody asks us for

static Gpu* gpu_of(const Run* run) { return (Gpu*)run->machine; }

static size_t machine_value_bytes(void) { return sizeof(floatX); }

// --- memory

// Whether tensors have several holders
static bool ranks_share(const Run* run) {
    const Pipe* p = &run->pipe;
    return run->training && (p->D > 1 || (p->P > 1 && p->schedule.kind != PIPELINE_DUALPIPEV));
}

// Of a wire on the host, at the run's batch: header and data, aligned
static size_t message_bytes(const Run* run) {
    size_t data = (size_t)run->o.batch * (size_t)run->c.T * (size_t)(run->c.n * run->c.C) * sizeof(floatX);
    return (sizeof(Header) + data + CARVE_ALIGN - 1) / CARVE_ALIGN * CARVE_ALIGN;
}

// The slots of each part, and the wires
static void layout_parts(Gpu* g, const Run* run, int B) {
    const Pipe* p = &run->pipe;
    for (int i = 0; i < p->part_count; i++)
        for (int slot = 0; slot < p->parts[i].slots; slot++) {
            DeviceActivations *a = &g->slots[i][slot], own = *a;
            *a = g->acts;                       // the scratch
            a->stage = p->parts[i].stage;
            a->sub = own.sub;
            a->state = own.state;
            device_layout_slot(a, &g->arena, &run->c, run->training);
        }
    for (int i = 0; i < p->wire_count; i++)
        p->wires[i].at =
            carve_x(&g->arena, "messages", (size_t)B * (size_t)run->c.T * (size_t)(run->c.n * run->c.C));
}

// Counts, or with arena.taking takes, everything on the device.
static void gpu_layout(Gpu* g, const Run* run, int B) {
    const Config* c = &run->c;
    const BoundaryKernels* kernels = &boundary_kernels[run->o.kernels];
    int T = run->c.T;
    memset(&g->arena.plan, 0, sizeof g->arena.plan);
    plan_add(&g->arena.plan, "kernels and library", RUNTIME_BYTES);
    device_model_memory(&g->model, &g->arena, run->training);
    g->acts.beside = run->training && run->pipe.stage_count > 1;
    device_layout_scratch(&g->acts, &g->arena, c, B, T, recompute_block(run), kernels, run->training);
    if (run->pipe.stage_count == 1) device_layout_slot(&g->acts, &g->arena, c, run->training);
    else layout_parts(g, run, B);
    if (run->pipe.P == 1) device_activations_layout(&g->infer, &g->arena, c, 1, T, 1, kernels, false);
    for (int queue = 0; queue <= g->acts.beside; queue++)
        g->workspaces[queue] = device_carve(&g->arena, "workspace of products", WORKSPACE_BYTES, 1);
#ifdef USE_CUDNN
    size_t bytes = cudnn_attention_plan(B, T, c->C, c->NH, run->training);
    cudnn_attention_workspace(device_carve(&g->arena, "workspace of cuDNN", bytes, 1), bytes);
#endif
    g->sums = (double*)device_carve(&g->arena, "data", (size_t)run->model.tensor_count + 1, sizeof(double));
    optimiser_memory(&g->optimiser, &g->arena, &g->model.m);
#ifdef HAVE_NCCL
    if (ranks_share(run)) g->parts = carve_f(&g->arena, "messages", EXCHANGE);
#endif
}

static void device_activations_open(DeviceActivations* a, const Config* c) {
    a->shared = a;
    a->stage = whole_model(c);
    a->sub = (DeviceSublayer*)allocate((size_t)(2 * c->L), sizeof(DeviceSublayer));
    a->state = (floatX**)allocate((size_t)(2 * c->L + 1), sizeof(floatX*));
    a->between = (floatX**)allocate((size_t)(2 * c->L + 1), sizeof(floatX*));
}

static void device_activations_close(DeviceActivations* a) {
    free(a->sub);
    free((void*)a->state);
    if (a->shared == a) free((void*)a->between);
}

static void open_parts(Gpu* g, const Run* run) {
    const Pipe* p = &run->pipe;
    if (p->stage_count == 1) return;
    g->acts.stage.embeds = false;
    g->acts.stage.heads = holds_head(&run->model);
    for (int i = 0; i < p->part_count; i++) {
        g->slots[i] = (DeviceActivations*)allocate((size_t)p->parts[i].slots, sizeof(DeviceActivations));
        for (int slot = 0; slot < p->parts[i].slots; slot++) {
            DeviceActivations* a = &g->slots[i][slot];
            a->sub = (DeviceSublayer*)allocate((size_t)(2 * run->c.L), sizeof(DeviceSublayer));
            a->state = (floatX**)allocate((size_t)(2 * run->c.L + 1), sizeof(floatX*));
        }
    }
}

// The host keeps parameters and moments for the start, and what is looked at: coefficients, and for a dump
// gradients and losses.
static void machine_layout(Run* run, Arena* arena, int block) {
    bool dumps = run->o.dump[0];
    size_t rows = dumps ? (size_t)(run->o.batch * run->c.T) : (size_t)run->c.T;
    Model* m = &run->model;
    m->params = carve(arena, "host: parameters and moments", m->size);
    if (run->training) m->adam_m = carve(arena, "host: parameters and moments", m->moment_size);
    if (run->training) m->adam_v = carve(arena, "host: parameters and moments", m->moment_size);
    if (dumps) m->grads = carve(arena, "host: gradients", m->size);
    for (int k = 0; k < 2 * run->c.L; k++)
        run->acts.sub[k].coef = carve(arena, "host: coefficients", rows * (size_t)coefficient_count(&run->c));
    run->acts.losses = carve(arena, "host: losses", rows);
    run->acts.block = block;
    plan_add(arena, "host: messages", (size_t)run->pipe.wire_count * message_bytes(run));
}

static const struct {
    const char* name;
    double bf16, fp32;
} gpu_peaks[] = {
    // dense, FLOP/s, as their maker states them
    {"H100 PCIe", 756e12, 51e12}, {"H100 NVL", 835e12, 60e12},   {"H100", 989e12, 67e12},
    {"H200", 989e12, 67e12},      {"GH200", 989e12, 67e12},      {"H800", 989e12, 67e12},
    {"A100", 312e12, 19.5e12},    {"A800", 312e12, 19.5e12},     {"B200", 2250e12, 75e12},
    {"L40S", 362e12, 91.6e12},    {"RTX 4090", 165e12, 82.6e12}, {"A10", 125e12, 31.2e12},
};

static double gpu_peak(const char* name) {
    for (size_t i = 0; i < sizeof gpu_peaks / sizeof gpu_peaks[0]; i++)
        if (strstr(name, gpu_peaks[i].name))
            return sizeof(floatX) == 2 ? gpu_peaks[i].bf16 : gpu_peaks[i].fp32;
    return 0;
}

static bool machine_can(const Run* run, Error* e) {
    return run->o.kernels < BOUNDARY_KERNELS ||
           fail(e, "--kernels: found fused, expected plain, leave it out: this version has no others");
}

// Its name, peak and free bytes; with --plan none need be here.
static bool find_gpu(Gpu* g, bool needed, size_t* available, Error* e) {
    int count = 0;
    size_t all = 0;
    cudaDeviceProp properties;
    *available = 0;
    snprintf(g->name, sizeof g->name, "no GPU");
    int device = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        return !needed || fail(e, "GPU: found none (%s), expected one; train_gpt_mhc trains on the CPU",
                               error != cudaSuccess ? cudaGetErrorString(error) : "no device");
    CUDA(cudaGetDevice(&device));
    CUDA(cudaGetDeviceProperties(&properties, device));
    snprintf(g->name, sizeof g->name, "%s", properties.name);
    g->peak = gpu_peak(g->name);
    CUDA(cudaMemGetInfo(available, &all));
    return true;
}

// Whether micro-batches of B sequences fit; g's plan is theirs then.
static bool batch_fits(Gpu* g, const Run* run, size_t B, size_t available) {
    const char* limits = option_rows[options_find("batch")].limits;
    if (B * (size_t)run->c.T > INT32_MAX || !option_in_limits(limits, (double)B)) return false;
    gpu_layout(g, run, (int)B);
    return plan_total(&g->arena.plan) <= available;
}

// The largest that fits, at least 1: the first bits of it by doubling, the others by trying each
static long largest_batch(Gpu* g, const Run* run, size_t available) {
    size_t step = 1, B = 1;
    while (batch_fits(g, run, 2 * step, available)) step *= 2;
    for (B = step; step; step /= 2)
        if (batch_fits(g, run, B + step, available)) B += step;
    return (long)B;
}

// The plan, and whether there is a GPU with room for it.
static bool machine_open(Run* run, Error* e) {
    size_t available;
    Gpu* g = (Gpu*)allocate(1, sizeof(Gpu));
    run->machine = g;
    device_layout(&g->model, &run->model);
    device_activations_open(&g->acts, &run->c);
    device_activations_open(&g->infer, &run->c);
    open_parts(g, run);
    if (!find_gpu(g, !run->o.plan || run->o.batch == BATCH_AUTO, &available, e)) return false;
    if (run->o.batch == BATCH_AUTO) run->o.batch = largest_batch(g, run, available);
    if (!options_check_sizes(&run->o, e)) return false;
    if (batch_fits(g, run, (size_t)run->o.batch, available) || run->o.plan) return true;
    return fail(e, "GPU memory: found a need of %zu MiB, expected at most the %zu MiB that are free, reduce "
                   "--batch, --seq or --layers, or try --recompute auto",
                (plan_total(&g->arena.plan) >> 20) + 1, available >> 20);
}

static void open_upload(Upload* u, size_t rows) {
    CUDA(cudaMallocHost(&u->tokens, (5 * rows + 1) * sizeof(int32_t)));
    u->targets = u->tokens + rows;
    u->order = u->targets + rows;
    u->token = u->order + rows;
    u->first = u->token + rows;
    CUDA(cudaEventCreateWithFlags(&u->done, cudaEventDisableTiming));
}

static void open_wires(Gpu* g, const Run* run) {
    const Pipe* p = &run->pipe;
    size_t bytes = message_bytes(run);
    if (!p->wire_count) return;
    for (int i = 0; i < 4; i++)
        CUDA(cudaStreamCreateWithFlags(&g->wire_streams[i / 2][i % 2], cudaStreamNonBlocking));
    CUDA(cudaMallocHost(&g->messages, (size_t)p->wire_count * bytes));
    g->wires = (WireEvents*)allocate((size_t)p->wire_count, sizeof(WireEvents));
    for (int i = 0; i < p->wire_count; i++) {
        p->wires[i].message = (Header*)((char*)g->messages + (size_t)i * bytes);
        CUDA(cudaEventCreateWithFlags(&g->wires[i].used, cudaEventDisableTiming));
        CUDA(cudaEventCreateWithFlags(&g->wires[i].copied, cudaEventDisableTiming));
    }
}

static void close_marks(Gpu* g) {
    for (int i = 0; i < g->mark_room; i++) {
        CUDA(cudaEventDestroy(g->marks[i].begins));
        CUDA(cudaEventDestroy(g->marks[i].ends));
    }
    if (g->pass_begins) CUDA(cudaEventDestroy(g->pass_begins));
    free(g->marks);
}

static void close_wires(Gpu* g, const Pipe* p) {
    if (!p->wire_count) return;
    for (int i = 0; i < p->wire_count; i++) {
        CUDA(cudaEventDestroy(g->wires[i].used));
        CUDA(cudaEventDestroy(g->wires[i].copied));
    }
    free(g->wires);
    CUDA(cudaFreeHost(g->messages));
    for (int i = 0; i < 4; i++) CUDA(cudaStreamDestroy(g->wire_streams[i / 2][i % 2]));
}

static void queue_open(Queue* queue, void* workspace, int priority) {
    int least, greatest;
    queue->priority = priority;
    CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA(cudaStreamCreateWithFlags(&queue->stream, cudaStreamNonBlocking));
    if (priority) CUDA(cudaStreamCreateWithPriority(&queue->urgent, cudaStreamNonBlocking, greatest));
    for (cudaEvent_t* e : {&queue->turn, &queue->ended[0], &queue->ended[1]})
        CUDA(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
    lt_open(&queue->lt, workspace, WORKSPACE_BYTES);
}

static void queue_close(Queue* queue) {
    CUDA(cudaStreamSynchronize(queue->stream));
    lt_close(&queue->lt);
    for (cudaEvent_t e : {queue->turn, queue->ended[0], queue->ended[1]}) CUDA(cudaEventDestroy(e));
    if (queue->priority) CUDA(cudaStreamDestroy(queue->urgent));
    CUDA(cudaStreamDestroy(queue->stream));
}

// Two queues, and of each slot what orders them
static void open_queues(Gpu* g, const Run* run) {
    const Pipe* p = &run->pipe;
    bool beside = g->acts.beside;
    queue_open(&g->main, g->workspaces[0], beside ? run->o.priority : PRIORITY_NONE);
    if (beside) queue_open(&g->forward, g->workspaces[1], run->o.priority);
    for (int i = 0; i < p->part_count && beside; i++)
        for (int slot = 0; slot < p->parts[i].slots; slot++)
            CUDA(cudaEventCreateWithFlags(&g->slots[i][slot].done, cudaEventDisableTiming));
}

static void close_queues(Gpu* g, const Pipe* p) {
    bool beside = g->acts.beside;
    queue_close(&g->main);
    if (beside) queue_close(&g->forward);
    for (int i = 0; i < p->part_count && beside; i++)
        for (int slot = 0; slot < p->parts[i].slots; slot++) CUDA(cudaEventDestroy(g->slots[i][slot].done));
}

static Queue* forward_queue(Gpu* g) { return g->acts.beside ? &g->forward : &g->main; }

static void gpu_open(Gpu* g, const Run* run) {
    g->arena.taking = true;
    gpu_layout(g, run, (int)run->o.batch);
    open_queues(g, run);
    CUDA(cudaMallocHost(&g->host_sums, ((size_t)run->model.tensor_count + 1) * sizeof(double)));
    open_wires(g, run);
    for (int i = 0; i < 2; i++) open_upload(&g->uploads[i], (size_t)(run->o.batch * run->c.T));
    optimiser_open(&g->optimiser, &g->model.m);
    CUDA(cudaDeviceSynchronize());          // what cudaMemset put into the default stream
}

static void machine_close(Run* run) {
    Gpu* g = gpu_of(run);
    if (!g) return;
    if (g->arena.taking) {
        close_queues(g, &run->pipe);
#ifdef HAVE_NCCL
        if (g->nccl) NCCL(ncclCommDestroy(g->nccl));
        if (g->nccl) CUDA(cudaStreamDestroy(g->carrier));
#endif
        for (int i = 0; i < g->arena.block_count; i++) CUDA(cudaFree(g->arena.blocks[i]));
        for (int i = 0; i < 2; i++) {
            CUDA(cudaFreeHost(g->uploads[i].tokens));
            CUDA(cudaEventDestroy(g->uploads[i].done));
        }
        CUDA(cudaFreeHost(g->host_sums));
        close_wires(g, &run->pipe);
        close_marks(g);
        optimiser_close(&g->optimiser);
    }
    for (int i = 0; i < run->pipe.part_count && g->slots[i]; i++) {
        for (int slot = 0; slot < run->pipe.parts[i].slots; slot++) {
            free(g->slots[i][slot].sub);
            free((void*)g->slots[i][slot].state);
        }
        free(g->slots[i]);
    }
    device_activations_close(&g->acts);
    device_activations_close(&g->infer);
    free(g->model.m.tensors);
    free(g);
    run->machine = NULL;
}

static void machine_describe(const Run* run, char* text, size_t size) {
    snprintf(text, size, "%s, %s", gpu_of(run)->name, sizeof(floatX) == 2 ? "bf16" : "fp32");
}
static double machine_peak(const Run* run) { return gpu_of(run)->peak; }
static void machine_print_plan(const Run* run) {
    plan_print(stdout, &gpu_of(run)->arena.plan);
    plan_print(stdout, &run->arena);
    if (gpu_of(run)->ways[0]) printf("ranks: %s\n", gpu_of(run)->ways);
}

// --- parameters and moments, tensor by tensor: the device's layout has gaps

static float* device_numbers(const Gpu* g, NumberKind what, const Tensor* t) {
    const Model* m = &g->model.m;
    switch (what) {
        case NUMBERS_PARAMS: return m->params + t->first;
        case NUMBERS_GRADS: return m->grads + t->first;
        case NUMBERS_ADAM_M: return m->adam_m + t->moments;
        case NUMBERS_ADAM_V: return m->adam_v + t->moments;
    }
    return NULL;
}

// The device's tensor that is the run's t
static const Tensor* device_tensor(const Gpu* g, const Run* run, const Tensor* t) {
    return &g->model.m.tensors[t - run->model.tensors];
}

static void machine_read(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                         real* numbers) {
    Gpu* g = gpu_of(run);
    CUDA(cudaMemcpyAsync(numbers, device_numbers(g, what, device_tensor(g, run, t)) + first,
                         count * sizeof(float), cudaMemcpyDeviceToHost, g->main.stream));
    CUDA(cudaStreamSynchronize(g->main.stream));
}

// The rounded copies of a piece of a tensor, as the rank that made its update `step` has them
static void refresh_copies(Gpu* g, const Run* run, const Tensor* d, size_t first, size_t count, long step) {
    round_piece_gpu(g->model.weights, g->model.m.params, d, first, count, (uint64_t)run->o.seed, step,
                    g->main.stream);
}

// Of parameters the copies too, as the rank that updated them has made its own
static void machine_write(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                          const real* numbers) {
    Gpu* g = gpu_of(run);
    const Tensor* d = device_tensor(g, run, t);
    float* to = device_numbers(g, what, d) + first;
    CUDA(cudaMemcpyAsync(to, numbers, count * sizeof(float), cudaMemcpyHostToDevice, g->main.stream));
    if (what == NUMBERS_PARAMS) refresh_copies(g, run, d, first, count, run->step + 1);
    CUDA(cudaStreamSynchronize(g->main.stream));
}

static void load_numbers(Gpu* g, const Run* run, NumberKind what, const real* host) {
    for (int i = 0; i < run->model.tensor_count; i++) {
        const Tensor *h = &run->model.tensors[i], *d = &g->model.m.tensors[i];
        bool moments = what == NUMBERS_ADAM_M || what == NUMBERS_ADAM_V;
        size_t count = moments ? h->piece_size : tensor_size(h);
        if (h->here)
            CUDA(cudaMemcpyAsync(device_numbers(g, what, d), host + (moments ? h->moments : h->first),
                                 count * sizeof(float), cudaMemcpyHostToDevice, g->main.stream));
    }
}

static void machine_load(Run* run) {
    Gpu* g = gpu_of(run);
    if (!g->arena.taking) gpu_open(g, run);
    load_numbers(g, run, NUMBERS_PARAMS, run->model.params);
    if (run->training) load_numbers(g, run, NUMBERS_ADAM_M, run->model.adam_m);
    if (run->training) load_numbers(g, run, NUMBERS_ADAM_V, run->model.adam_v);
    for (int i = 0; i < run->model.tensor_count; i++) {
        const Tensor* d = &g->model.m.tensors[i];
        if (d->here) refresh_copies(g, run, d, 0, tensor_size(d), run->step);
    }
    CUDA(cudaStreamSynchronize(g->main.stream));
}

// --- a step

// Tokens and targets (rows) of a pass, and for a backward pass the rows grouped by token, onto the device
static void upload(Gpu* g, const Pass* p, const int32_t* tokens, const int32_t* targets, int first,
                   int rows) {
    DeviceActivations* a = p->a;
    Upload* u = &g->uploads[g->next_upload];
    size_t bytes = sizeof(int32_t) * (size_t)rows;
    g->next_upload ^= 1;
    CUDA(cudaEventSynchronize(u->done));        // the copies of two passes ago: long done
    memcpy(u->tokens, tokens, bytes);
    CUDA(cudaMemcpyAsync(a->tokens + first, u->tokens, bytes, cudaMemcpyHostToDevice, p->stream));
    if (targets) {
        memcpy(u->targets, targets, bytes);
        CUDA(cudaMemcpyAsync(a->targets, u->targets, bytes, cudaMemcpyHostToDevice, p->stream));
    }
    if (targets && a->groups.order) {
        a->groups.count = token_groups(u->order, u->first, u->token, tokens, rows, p->d->m.c.V);
        CUDA(cudaMemcpyAsync(a->groups.order, u->order, bytes, cudaMemcpyHostToDevice, p->stream));
        CUDA(cudaMemcpyAsync(a->groups.token, u->token, bytes, cudaMemcpyHostToDevice, p->stream));
        CUDA(cudaMemcpyAsync(a->groups.first, u->first, bytes + sizeof(int32_t), cudaMemcpyHostToDevice,
                             p->stream));
    }
    CUDA(cudaEventRecord(u->done, p->stream));
}

static Pass gpu_pass(Gpu* g, Queue* queue, DeviceActivations* a, int B, int T, int row0) {
    Pass p = {&g->model, a, queue, &queue->lt, queue->stream, B, T, row0};
    return p;
}

// *loss += the mean of losses (rows) times weight, in double, in one order
static __global__ void add_mean_loss_kernel(double* loss, const float* losses, int rows, double weight) {
    __shared__ double partial[256];
    double sum = 0;
    for (int r = threadIdx.x; r < rows; r += blockDim.x) sum += (double)losses[r];
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < (int)blockDim.x; i++) sum += partial[i];
    *loss += sum / rows * weight;
}

static void add_mean_loss(Gpu* g, const Pass* p, int rows, double weight) {
    add_mean_loss_kernel<<<1, 256, 0, p->stream>>>(g->sums + p->d->m.tensor_count, p->a->losses, rows,
                                                   weight);
    LAUNCHED();
}

// numbers (count) on the host as floats
static void fetch_numbers(const Pass* p, float* numbers, const floatX* device, size_t count) {
    floatX* copy = (floatX*)allocate(count, sizeof(floatX));
    CUDA(cudaMemcpyAsync(copy, device, count * sizeof(floatX), cudaMemcpyDeviceToHost, p->stream));
    CUDA(cudaStreamSynchronize(p->stream));
    for (size_t i = 0; i < count; i++) numbers[i] = (float)copy[i];
    free(copy);
}

typedef struct { StreamStats* streams; float* state; } Observer;

static void observe_state(const Pass* p, int k, void* context) {
    Observer* o = (Observer*)context;
    const Config* c = &p->d->m.c;
    if (!o->state) o->state = (float*)allocate((size_t)p->T * (size_t)(c->n * c->C), sizeof(float));
    fetch_numbers(p, o->state, p->a->state[k], (size_t)p->T * (size_t)(c->n * c->C));
    stream_statistics(&o->streams[k], o->state, p->T, c->n, c->C);
}

static void machine_zero_gradients(Run* run) {
    Gpu* g = gpu_of(run);
    const Model* m = &g->model.m;
    CUDA(cudaMemsetAsync(m->grads, 0, m->size * sizeof(float), g->main.stream));
    if (head_size(m)) CUDA(cudaMemsetAsync(m->head_grads, 0, head_size(m) * sizeof(float), g->main.stream));
}

// The place of a part's micro-batch
static DeviceActivations* gpu_slot(Gpu* g, const Run* run, const Part* c, int micro) {
    if (run->pipe.stage_count == 1) return &g->acts;
    return &g->slots[c - run->pipe.parts][micro % c->slots];
}

static WireEvents* wire_events(Gpu* g, const Run* run, const Wire* w) {
    return &g->wires[w - run->pipe.wires];
}

// The host is at most two halves ahead of a queue, and messages move along while it waits for that. Where the
// device waits for messages a rank that never comes is noticed here.
static void keep_pace(Run* run, Queue* queue) {
    queue->half ^= 1;
    while (!has_happened(queue->ended[queue->half])) {
        pipe_progress(run);
        if (run->pipe.batches)
            transport_idle(run->pipe.transport, "waits for states and gradients of others");
        else usleep(20);
    }
}

// --- when the device does what it was asked for, for --trace

static Mark* next_mark(Gpu* g) {
    if (g->mark_count == g->mark_room) {
        g->mark_room = 2 * g->mark_room + 64;
        g->marks = (Mark*)realloc(g->marks, (size_t)g->mark_room * sizeof(Mark));
        if (!g->marks) die("out of memory for the trace");
        for (int i = g->mark_count; i < g->mark_room; i++) {
            CUDA(cudaEventCreate(&g->marks[i].begins));
            CUDA(cudaEventCreate(&g->marks[i].ends));
        }
    }
    g->marks[g->mark_count].event = -1;
    return &g->marks[g->mark_count++];
}

static void machine_traced(Run* run) {
    Gpu* g = gpu_of(run);
    g->marks[g->mark_count - 1].event = run->pipe.trace.count - 1;
}

// The moment that the marks of this pass are measured from: the device has nothing else to do.
static void begin_marks(Run* run) {
    Gpu* g = gpu_of(run);
    if (!g->pass_begins) CUDA(cudaEventCreate(&g->pass_begins));
    CUDA(cudaEventRecord(g->pass_begins, g->main.stream));
    CUDA(cudaEventSynchronize(g->pass_begins));
    g->pass_start = seconds() - run->pipe.trace.start;
    g->mark_count = 0;
}

// Times of the device replace those at which the host asked. All work has been waited for.
static void end_marks(Run* run) {
    Gpu* g = gpu_of(run);
    for (int i = 0; i < g->mark_count; i++) {
        float begins, ends;
        TraceEvent* event = &run->pipe.trace.events[g->marks[i].event];
        if (g->marks[i].event < 0) continue;            // a recomputation ahead of its gradient
        CUDA(cudaEventElapsedTime(&begins, g->pass_begins, g->marks[i].begins));
        CUDA(cudaEventElapsedTime(&ends, g->pass_begins, g->marks[i].ends));
        event->start = g->pass_start + 1e-3 * begins;
        event->end = g->pass_start + 1e-3 * ends;
    }
}

// --- halves of pairs

// What comes next in the queue, on a micro-batch's slot and two wires or NULL, is after all that was done
// with them.
static Pass begin_half(Run* run, Queue* queue, const Part* c, int micro, const Wire* one, const Wire* other) {
    Gpu* g = gpu_of(run);
    DeviceActivations* a = gpu_slot(g, run, c, micro);
    if (run->pipe.stage_count > 1) keep_pace(run, queue);
    if (a->beside) CUDA(cudaStreamWaitEvent(queue->stream, a->done, 0));
    for (const Wire* w : {one, other}) {
        if (!w) continue;
        CUDA(cudaStreamWaitEvent(queue->stream, wire_events(g, run, w)->used, 0));
        CUDA(cudaStreamWaitEvent(queue->stream, wire_events(g, run, w)->copied, 0));
    }
    if (is_traced(run)) CUDA(cudaEventRecord(next_mark(g)->begins, queue->stream));
    return gpu_pass(g, queue, a, run->pipe.B, run->c.T, 0);
}

static void end_half(Run* run, const Pass* p, const Wire* one, const Wire* other) {
    Gpu* g = gpu_of(run);
    if (is_traced(run)) CUDA(cudaEventRecord(g->marks[g->mark_count - 1].ends, p->stream));
    if (p->a->beside) CUDA(cudaEventRecord(p->a->done, p->stream));
    for (const Wire* w : {one, other})
        if (w) CUDA(cudaEventRecord(wire_events(g, run, w)->used, p->stream));
    CUDA(cudaEventRecord(p->queue->ended[p->queue->half], p->stream));
}

static void machine_forward(Run* run, Part* c, int micro, Wire* x, Wire* y) {
    Gpu* g = gpu_of(run);
    Pass p = begin_half(run, forward_queue(g), c, micro, x, y);
    DeviceActivations* a = p.a;
    if (x) a->state[c->stage.first] = (floatX*)x->at;
    if (x && y && c->stage.first == c->stage.last)      // an empty stage
        CUDA(cudaMemcpyAsync(y->at, x->at, wire_bytes(run), cudaMemcpyDeviceToDevice, p.stream));
    if (y) a->state[c->stage.last] = (floatX*)y->at;
    if (a->tokens) upload(g, &p, run->tokens, run->targets, 0, p.B * p.T);
    Observer o = {g->streams, NULL};
    device_forward(&p, g->streams ? observe_state : NULL, &o);
    free(o.state);
    if (run->pipe.forward_only && c->stage.heads && !g->streams) {
        device_head(&p, 0);
        add_mean_loss(g, &p, run->loaded * p.T, run->loaded);
    }
    end_half(run, &p, x, y);
}

static void machine_backward(Run* run, Part* c, int micro, Wire* dy, bool defer) {
    Gpu* g = gpu_of(run);
    const Wire* x = c->before >= 0 ? c->x[micro] : NULL;
    Pass p = begin_half(run, &g->main, c, micro, x, dy);
    double sequences = (double)p.B * (double)run->o.micro_batches * run->pipe.D;
    if (dy) p.a->dstate = (floatX*)dy->at;
    if (c->stage.heads) {
        device_head(&p, (float)(1 / (sequences * p.T)));
        add_mean_loss(g, &p, p.B * p.T, 1);
    }
    device_backward(&p, defer);
    end_half(run, &p, x, dy);
}

static void machine_backward_weights(Run* run, Part* c, int micro) {
    Pass p = begin_half(run, &gpu_of(run)->main, c, micro, NULL, NULL);
    device_backward_weights(&p);
    end_half(run, &p, NULL, NULL);
}

static bool machine_recompute(Run* run, Part* c, int micro) {
    Gpu* g = gpu_of(run);
    const DeviceActivations* a = gpu_slot(g, run, c, micro);
    if (a->shared->resident == a || a->block == 1) return false;
    const Wire* x = c->before >= 0 ? c->x[micro] : NULL;
    Pass p = begin_half(run, &g->main, c, micro, x, NULL);
    device_recompute_last_block(&p);
    end_half(run, &p, x, NULL);
    return true;
}

// --- messages: through pinned memory, in streams of their own

static bool machine_wire_free(Run* run, const Wire* w) {
    return has_happened(wire_events(gpu_of(run), run, w)->copied);
}

// The wire's data, after all that computes with it
static void copy_wire(Run* run, Wire* w, const Header* h, bool leaves) {
    Gpu* g = gpu_of(run);
    WireEvents* e = wire_events(g, run, w);
    cudaStream_t stream = g->wire_streams[h->gradient][leaves];
    void *there = w->message + 1, *from = leaves ? w->at : there, *to = leaves ? there : w->at;
    CUDA(cudaStreamWaitEvent(stream, e->used, 0));
    CUDA(cudaMemcpyAsync(to, from, wire_bytes(run), leaves ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice,
                         stream));
    CUDA(cudaEventRecord(e->copied, stream));
}
static void machine_wire_arrived(Run* run, Wire* w) { copy_wire(run, w, &w->expected, false); }
static void machine_wire_leaves(Run* run, Wire* w) { copy_wire(run, w, w->message, true); }
static bool machine_wire_left(Run* run, Wire* w) { return machine_wire_free(run, w); }

// --- ranks: which device is whose, and what goes from device to device

enum { PLACE_SIZE = 128 };

// place (PLACE_SIZE) of each rank; the caller frees them
static char* gather_places(Transport* t, const char* mine) {
    char* places = (char*)allocate((size_t)t->size, PLACE_SIZE);
    snprintf(places + t->rank * PLACE_SIZE, PLACE_SIZE, "%s", mine);
    for (int r = 0; r < t->size; r++) transport_broadcast(t, r, places + r * PLACE_SIZE, PLACE_SIZE);
    return places;
}
static const char* place_of(const char* places, int rank) { return places + rank * PLACE_SIZE; }

// Processes of a machine take its devices in turns; threads of a process share one.
static void machine_choose(const Run* run) {
    Transport* t = run->pipe.transport;
    char host[PLACE_SIZE] = "";
    int count = 0, before = 0;
    if (is_alone(run) || t->loopback) return;
    gethostname(host, sizeof host - 1);
    char* hosts = gather_places(t, host);
    for (int r = 0; r < t->rank; r++) before += !strcmp(place_of(hosts, r), host);
    if (cudaGetDeviceCount(&count) == cudaSuccess && count) CUDA(cudaSetDevice(before % count));
    free(hosts);
}

// Whether two ranks compute on the same device
static bool ranks_share_devices(Transport* t) {
    char host[64] = "", bus[32], place[PLACE_SIZE];
    int device, same = 0;
    gethostname(host, sizeof host - 1);
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
    snprintf(place, sizeof place, "%s %s", host, bus);
    char* places = gather_places(t, place);
    for (int r = 0; r < t->size; r++)
        for (int other = 0; other < r; other++) same += !strcmp(place_of(places, r), place_of(places, other));
    free(places);
    return same > 0;
}

#ifdef HAVE_NCCL
static void nccl_open(Gpu* g, const Run* run) {
    Transport* t = run->pipe.transport;
    ncclUniqueId id;
    int least, greatest;
    CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA(cudaStreamCreateWithPriority(&g->carrier, cudaStreamNonBlocking, greatest));
    // While they wait its kernels hold a multiprocessor each, which others want.
    if (run->pipe.batches) setenv("NCCL_MAX_CTAS", "4", 0);
    if (t->rank == 0) NCCL(ncclGetUniqueId(&id));
    transport_broadcast(t, 0, &id, sizeof id);
    NCCL(ncclCommInitRank(&g->nccl, t->size, id, t->rank));
}
#endif

static void machine_join(Run* run) {
    Gpu* g = gpu_of(run);
    if (is_alone(run) || !g->arena.taking) return;
    bool shared = ranks_share_devices(run->pipe.transport);
    const char* why = shared ? ", as some have the same GPU" : "";
    snprintf(g->ways, sizeof g->ways, "exchange through host memory%s", why);
#ifdef HAVE_NCCL
    run->pipe.batches = run->pipe.wire_count && !shared;
    if (shared || (!run->pipe.batches && !ranks_share(run))) return;
    nccl_open(g, run);
    snprintf(g->ways, sizeof g->ways, "exchange by NCCL");
#endif
}

// Sums of what several ranks hold, in their order
static __global__ void sum_parts_kernel(float* own, const float* parts, size_t count, int holders, int mine) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int j = 0; j < holders; j++) {
        float x = j == mine ? own[i] : parts[(size_t)(j - (j > mine)) * count + i];
        sum = j ? sum + x : x;
    }
    own[i] = sum;
}
// own (count) = the sum over `holders` ranks: parts (holders - 1, count) has what the others sent
[[maybe_unused]] static void sum_parts_gpu(float* own, const float* parts, size_t count, int holders, int mine,
                                           cudaStream_t stream) {
    sum_parts_kernel<<<ceil_div(count, 256), 256, 0, stream>>>(own, parts, count, holders, mine);
    LAUNCHED();
}

#ifdef HAVE_NCCL
static void exchange_gradients(Gpu* g, float* grads, const Slice* slices, int count, int mine) {
    Slice own = slices[mine];
    NCCL(ncclGroupStart());
    for (int j = 0; j < count; j++) {
        const Slice* s = &slices[j];
        float* part = g->parts + (size_t)(j - (j > mine)) * own.count;
        if (j == mine) continue;
        if (s->count)
            NCCL(ncclSend(grads + s->first, s->count, ncclFloat32, s->rank, g->nccl, g->main.stream));
        if (own.count) NCCL(ncclRecv(part, own.count, ncclFloat32, s->rank, g->nccl, g->main.stream));
    }
    NCCL(ncclGroupEnd());
    if (!own.count) return;
    sum_parts_gpu(grads + own.first, g->parts, own.count, count, mine, g->main.stream);
}

static void exchange_parameters(Gpu* g, float* params, const Slice* slices, int count, int mine) {
    Slice own = slices[mine];
    NCCL(ncclGroupStart());
    for (int j = 0; j < count; j++) {
        const Slice* s = &slices[j];
        if (j == mine) continue;
        if (own.count)
            NCCL(ncclSend(params + own.first, own.count, ncclFloat32, s->rank, g->nccl, g->main.stream));
        if (s->count)
            NCCL(ncclRecv(params + s->first, s->count, ncclFloat32, s->rank, g->nccl, g->main.stream));
    }
    NCCL(ncclGroupEnd());
}
#endif

static bool machine_exchange(Run* run, NumberKind what, const Tensor* t, const Slice* slices, int count,
                             int mine) {
#ifdef HAVE_NCCL
    Gpu* g = gpu_of(run);
    const Tensor* d = device_tensor(g, run, t);
    float* numbers = device_numbers(g, what, d);
    if (!g->nccl) return false;
    if (what == NUMBERS_GRADS) exchange_gradients(g, numbers, slices, count, mine);
    else exchange_parameters(g, numbers, slices, count, mine);
    for (int j = 0; j < count && what == NUMBERS_PARAMS; j++)
        if (j != mine) refresh_copies(g, run, d, slices[j].first, slices[j].count, run->step + 1);
    return true;
#else
    (void)run, (void)what, (void)t, (void)slices, (void)count, (void)mine;
    return false;
#endif
}

// Waits for the main queue and all messages. A rank that never comes is noticed as elsewhere.
static void machine_exchanged(Run* run) {
#ifdef HAVE_NCCL
    Gpu* g = gpu_of(run);
    if (!g->nccl) return;
    stream_follows(g->main.stream, g->carrier, g->main.turn);
    CUDA(cudaEventRecord(g->main.turn, g->main.stream));
    while (!has_happened(g->main.turn))
        transport_idle(run->pipe.transport, "waits for ranks that share its tensors");
    transport_progressed(run->pipe.transport);
#else
    (void)run;
#endif
}

// Their order on a link is the same at both ends: NCCL knows messages by nothing else.
static void machine_carry(Run* run, Wire* const* wires, int count) {
#ifdef HAVE_NCCL
    Gpu* g = gpu_of(run);
    size_t bytes = wire_bytes(run);
    for (int i = 0; i < count; i++) {
        const WireEvents* e = wire_events(g, run, wires[i]);
        for (cudaEvent_t event : {e->used, e->copied}) CUDA(cudaStreamWaitEvent(g->carrier, event, 0));
    }
    NCCL(ncclGroupStart());
    for (int i = 0; i < count; i++) {
        const Wire* w = wires[i];
        if (w->state == WIRE_IN_BATCH) NCCL(ncclSend(w->at, bytes, ncclUint8, w->peer, g->nccl, g->carrier));
        else NCCL(ncclRecv(w->at, bytes, ncclUint8, w->peer, g->nccl, g->carrier));
    }
    NCCL(ncclGroupEnd());
    for (int i = 0; i < count; i++) CUDA(cudaEventRecord(wire_events(g, run, wires[i])->copied, g->carrier));
#else
    (void)run, (void)wires, (void)count;
#endif
}

// --- a step's end

static void machine_begin_pass(Run* run) {
    Gpu* g = gpu_of(run);
    CUDA(cudaMemsetAsync(g->sums + run->model.tensor_count, 0, sizeof(double), g->main.stream));
    stream_follows(forward_queue(g)->stream, g->main.stream, g->main.turn);
    if (is_traced(run)) begin_marks(run);
}

// The pass's losses; this waits for it.
static void machine_end_pass(Run* run) {
    Gpu* g = gpu_of(run);
    double* loss = g->host_sums + run->model.tensor_count;
    stream_follows(g->main.stream, forward_queue(g)->stream, g->main.turn);
    CUDA(cudaMemcpyAsync(loss, g->sums + run->model.tensor_count, sizeof(double), cudaMemcpyDeviceToHost,
                         g->main.stream));
    machine_exchanged(run);
    CUDA(cudaStreamSynchronize(g->main.stream));
    if (is_traced(run)) end_marks(run);
    run->loss_sum += *loss;
}

static void machine_end_gradients(Run* run) {
    Gpu* g = gpu_of(run);
    const Model* m = &g->model.m;
    size_t size = (size_t)m->c.V * (size_t)m->c.C;
    if (holds_head(m)) add_gradients_gpu(grad(m, WTE, 0), m->head_grads, size, g->main.stream);
}

static void machine_square_sums(Run* run, double* sums) {
    Gpu* g = gpu_of(run);
    size_t bytes = sizeof(double) * (size_t)run->model.tensor_count;
    square_sums_gpu(&g->optimiser, g->sums, g->model.m.grads, g->main.stream);
    CUDA(cudaMemcpyAsync(g->host_sums, g->sums, bytes, cudaMemcpyDeviceToHost, g->main.stream));
    CUDA(cudaStreamSynchronize(g->main.stream));
    memcpy(sums, g->host_sums, bytes);
}

static void machine_update(Run* run, double lr, double norm) {
    Gpu* g = gpu_of(run);
    const Options* o = &run->o;
    Update u = {lr, o->beta1, o->beta2, o->eps, o->weight_decay, 1, run->step + 1};
    if (o->grad_clip > 0) u.clip = fmin(1, o->grad_clip / (norm + 1e-6));
    adamw_gpu(&g->optimiser, &g->model, &u, (uint64_t)o->seed, g->main.stream);
}

static const Tensor* machine_nonfinite(Run* run, bool gradients) {
    Gpu* g = gpu_of(run);
    int tensor =
        first_nonfinite_gpu(&g->optimiser, gradients ? g->model.m.grads : g->model.m.params, g->main.stream);
    return tensor < 0 ? NULL : &run->model.tensors[tensor];
}

// --- what is looked at

static const real* machine_coefficients(Run* run, const Part* c, int k) {
    Gpu* g = gpu_of(run);
    size_t bytes =
        sizeof(float) * (size_t)run->pipe.B * (size_t)run->c.T * (size_t)coefficient_count(&run->c);
    if (!bytes) return NULL;
    CUDA(cudaMemcpyAsync(run->acts.sub[k].coef, gpu_slot(g, run, c, 0)->sub[k].coef, bytes,
                         cudaMemcpyDeviceToHost, g->main.stream));
    CUDA(cudaStreamSynchronize(g->main.stream));
    return run->acts.sub[k].coef;
}

static void machine_watch_streams(Run* run, StreamStats* streams) { gpu_of(run)->streams = streams; }

static void machine_logits(Run* run, const int32_t* tokens, int length, int known, real* logits) {
    Gpu* g = gpu_of(run);
    Pass p = gpu_pass(g, &g->main, &g->infer, 1, length, known);
    upload(g, &p, tokens + known, NULL, known, length - known);
    device_forward(&p, NULL, NULL);
    device_head_logits(&p, length - 1, 1);
    fetch_numbers(&p, logits, g->infer.logits, (size_t)run->c.V);
}

static void machine_dump(Run* run, real* logits) {
    Gpu* g = gpu_of(run);
    Part* c = &run->pipe.parts[0];
    int rows = (int)run->o.batch * run->c.T, V = run->c.V;
    long micro_batches = run->o.micro_batches;
    run->o.micro_batches = 1;
    machine_zero_gradients(run);
    machine_forward(run, c, 0, NULL, NULL);
    machine_backward(run, c, 0, NULL, false);
    machine_end_gradients(run);
    run->o.micro_batches = micro_batches;
    for (int i = 0; i < run->model.tensor_count; i++) {
        const Tensor* h = &run->model.tensors[i];
        machine_read(run, NUMBERS_GRADS, h, 0, tensor_size(h), run->model.grads + h->first);
    }
    CUDA(cudaMemcpyAsync(run->acts.losses, g->acts.losses, sizeof(float) * (size_t)rows,
                         cudaMemcpyDeviceToHost, g->main.stream));
    Pass p = gpu_pass(g, &g->main, &g->acts, (int)run->o.batch, run->c.T, 0);
    int Vp = padded_vocabulary(&run->c), most = min_int(rows, DUMP_ROWS);
    float* padded = (float*)allocate((size_t)most * (size_t)Vp, sizeof(float));
    for (int r = 0; r < rows; r += most) {
        int count = min_int(most, rows - r);
        device_head_logits(&p, r, count);
        fetch_numbers(&p, padded, g->acts.logits, (size_t)count * (size_t)Vp);
        for (int i = 0; i < count; i++, logits += V)
            memcpy(logits, padded + (size_t)i * (size_t)Vp, sizeof(float) * (size_t)V);
    }
    free(padded);
}
