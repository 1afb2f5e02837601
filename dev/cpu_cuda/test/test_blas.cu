// test_blas.cu: cuBLASLt's products against a plain loop in double: epilogues, transpositions, types, beta,
// batches, padded columns; and what it must refuse.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>

#include "test.h"

#define BLAS(call) CHECK((call) == CUBLAS_STATUS_SUCCESS)

struct Problem {
    int m, n, k;
    bool transpose_a, transpose_b;
    cudaDataType in, out;
    int epilogue;
    float alpha, beta;
    int batches, padding;                       // padding: what each column has more than its rows
};

// ------------------------------------------------------------------------------------------------
// Matrices on both sides: the host's values are those that the device holds, rounded to its type

struct Matrix {
    cudaDataType type;
    int rows, columns, leading, count;          // count: of elements, all batches
    float* host;
    void* device;
};

static unsigned seed = 1;
static float uniform(void) {                    // in [-1, 1)
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (1 << 23) - 1;
}

static size_t size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

static Matrix matrix(cudaDataType type, int rows, int columns, int padding, int batches) {
    Matrix x = {type, rows, columns, rows + padding, (rows + padding) * columns * batches, NULL, NULL};
    x.host = (float*)malloc(x.count * sizeof(float));
    __nv_bfloat16* halves = (__nv_bfloat16*)malloc(x.count * sizeof *halves);
    for (int i = 0; i < x.count; i++) {
        halves[i] = uniform();
        x.host[i] = type == CUDA_R_32F ? uniform() : (float)halves[i];
    }
    OK(cudaMalloc(&x.device, x.count * size_of(type)));
    OK(cudaMemcpy(x.device, type == CUDA_R_32F ? (void*)x.host : halves, x.count * size_of(type),
                  cudaMemcpyHostToDevice));
    free(halves);
    return x;
}

// What the device holds now; to be freed.
static float* download(const Matrix& x) {
    float* values = (float*)malloc(x.count * sizeof(float));
    __nv_bfloat16* halves = (__nv_bfloat16*)malloc(x.count * sizeof *halves);
    OK(cudaMemcpy(x.type == CUDA_R_32F ? (void*)values : halves, x.device, x.count * size_of(x.type),
                  cudaMemcpyDeviceToHost));
    for (int i = 0; i < x.count && x.type != CUDA_R_32F; i++) values[i] = halves[i];
    free(halves);
    return values;
}

static void release(Matrix* x) {
    OK(cudaFree(x->device));
    free(x->host);
}

// ------------------------------------------------------------------------------------------------
// One call

static cublasLtHandle_t handle;
enum { WORKSPACE = 1 << 20 };
static void* workspace;

struct Call {                                   // everything that a call takes, so that tests can spoil it
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c, d;
    cublasLtMatmulPreference_t preference;
    size_t workspace_size;
    cudaStream_t stream;
};

static cublasLtMatrixLayout_t layout_of(const Matrix& x, int batches) {
    cublasLtMatrixLayout_t layout;
    int32_t count = batches;
    int64_t stride = (int64_t)x.leading * x.columns;
    BLAS(cublasLtMatrixLayoutCreate(&layout, x.type, x.rows, x.columns, x.leading));
    BLAS(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    BLAS(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                          sizeof stride));
    return layout;
}

template <class T>
static void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, T value) {
    BLAS(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value));
}

static Call prepare(const Problem& p, const Matrix& a, const Matrix& b, const Matrix& d, const Matrix& aux,
                    const Matrix& bias) {
    Call call;
    uint64_t size = WORKSPACE;
    BLAS(cublasLtMatmulDescCreate(&call.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(call.operation, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(call.operation, CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(call.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)p.epilogue);
    set(call.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.device);
    set(call.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)p.out);
    set(call.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.device);
    set(call.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)aux.leading);
    call.a = layout_of(a, p.batches);
    call.b = layout_of(b, p.batches);
    call.c = layout_of(d, p.batches);
    call.d = layout_of(d, p.batches);
    BLAS(cublasLtMatmulPreferenceCreate(&call.preference));
    BLAS(cublasLtMatmulPreferenceSetAttribute(call.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &size, sizeof size));
    call.workspace_size = WORKSPACE;
    call.stream = 0;
    return call;
}

// The first status that is not success, from the heuristic and the product. D = C.
static cublasStatus_t perform(const Call& call, const Problem& p, const void* A, const void* B, void* D) {
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, call.operation, call.a, call.b, call.c,
                                                           call.d, call.preference, 1, &result, &found);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    float alpha = p.alpha, beta = p.beta;
    status = cublasLtMatmul(handle, call.operation, &alpha, A, call.a, B, call.b, &beta, D, call.c, D, call.d,
                            &result.algo, workspace, call.workspace_size, call.stream);
    alpha = beta = NAN;                         // they are read during the call
    return status;
}

static void destroy(Call* call) {
    BLAS(cublasLtMatmulDescDestroy(call->operation));
    BLAS(cublasLtMatmulPreferenceDestroy(call->preference));
    for (cublasLtMatrixLayout_t layout : {call->a, call->b, call->c, call->d})
        BLAS(cublasLtMatrixLayoutDestroy(layout));
}

// ------------------------------------------------------------------------------------------------
// Against the plain loop

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// A central difference: independent of the formula, good to 1e-9.
static double gelu_gradient(double x) {
    double h = 1e-5;
    return (gelu(x + h) - gelu(x - h)) / (2 * h);
}

#ifdef __CPU_CUDA__
#define GELU_ERROR 1e-6
#else
#define GELU_ERROR 2e-3                         // the GPU's own tanh has 2^-11
#endif

// x is right if it differs by no more than: rounding of k sums (2^-23 of the magnitudes each, on a GPU they
// are cut), of the epilogue, and of the stored type (half of 2^-7, or 2^-23).
static bool close(float x, double expected, double magnitude, int k, cudaDataType type, double extra) {
    double stored = (type == CUDA_R_32F ? 0x1p-23 : 0x1p-8) * fabs(expected);
    return fabs(x - expected) <= (k + 4) * 0x1p-23 * magnitude + stored + extra;
}

static float at(const Matrix& x, bool transposed, int batch, int row, int column) {
    int first = transposed ? column : row, second = transposed ? row : column;
    return x.host[(batch * x.columns + second) * x.leading + first];
}

struct Outputs {
    const float *d, *aux, *bias;
};

// One element of D, of aux where that is written; returns what D is before it is rounded.
static double check_element(const Problem& p, const Matrix& a, const Matrix& b, const Matrix& d,
                            const Matrix& aux, const Matrix& bias, const Outputs& got, int batch, int i,
                            int j, int* right) {
    double x = 0, magnitude = 0, extra = 0;
    for (int k = 0; k < p.k; k++) {
        double term = (double)p.alpha * at(a, p.transpose_a, batch, i, k) * at(b, p.transpose_b, batch, k, j);
        x += term;
        magnitude += fabs(term);
    }
    x += p.beta * at(d, false, batch, i, j);
    magnitude += fabs(p.beta);
    if (p.epilogue & 4) x += bias.host[i], magnitude += 1;
    bool writes_aux = (p.epilogue & (32 | 128)) == (32 | 128);          // GELU_AUX, GELU_AUX_BIAS
    if (writes_aux) *right += close(got.aux[j * aux.leading + i], x, magnitude, p.k, p.out, 0);
    if (p.epilogue & 32) {
        extra = GELU_ERROR * (1 + fabs(x));
        x = gelu(x);
        magnitude *= 1.2;                       // the steepest slope of GELU
    }
    if (p.epilogue & 64) {
        extra = GELU_ERROR * fabs(x);
        x *= gelu_gradient(at(aux, false, 0, i, j));
        magnitude *= 1.2;
    }
    *right += close(got.d[(batch * p.n + j) * d.leading + i], x, magnitude, p.k, p.out, extra);
    return x;
}

static void test_product(const Problem& p) {
    Matrix a = matrix(p.in, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.padding, p.batches);
    Matrix b = matrix(p.in, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.padding, p.batches);
    Matrix d = matrix(p.out, p.m, p.n, p.padding, p.batches);
    Matrix aux = matrix(p.out, (p.m + 7) / 8 * 8, p.n, p.padding * 8, 1);
    Matrix bias = matrix(p.out, p.m > p.n ? p.m : p.n, 1, 0, 1);
    Call call = prepare(p, a, b, d, aux, bias);
    BLAS(perform(call, p, a.device, b.device, d.device));
    float *values = download(d), *aux_values = download(aux), *bias_values = download(bias);
    Outputs got = {values, aux_values, bias_values};
    int right = 0, wanted = p.batches * p.m * p.n * ((p.epilogue & (32 | 128)) == (32 | 128) ? 2 : 1);
    double* sums = (double*)calloc(p.m, sizeof *sums);
    for (int batch = 0; batch < p.batches; batch++)
        for (int j = 0; j < p.n; j++)
            for (int i = 0; i < p.m; i++)
                sums[i] += check_element(p, a, b, d, aux, bias, got, batch, i, j, &right);
    CHECK(right == wanted);
    bool of_a = p.epilogue == CUBLASLT_EPILOGUE_BGRADA, of_b = p.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    for (int i = 0; i < (of_b ? p.n : p.m) && p.epilogue & (16 | 256 | 512); i++) {
        double sum = of_a || of_b ? 0 : sums[i];
        for (int k = 0; k < p.k && of_a; k++) sum += at(a, p.transpose_a, 0, i, k);
        for (int k = 0; k < p.k && of_b; k++) sum += at(b, p.transpose_b, 0, k, i);
        double magnitude = of_a || of_b ? p.k : p.n * 1.2 * (p.k + 1);
        double extra = p.epilogue & 16 ? p.n * GELU_ERROR : 0;
        CHECK(close(bias_values[i], sum, magnitude, p.k + p.n, p.out, extra));
    }
    for (int i = 0; i < d.count; i++)           // the padding stays
        if (i % d.leading >= p.m && !(values[i] == d.host[i])) CHECK(!"padding of D is untouched");
    destroy(&call);
    for (Matrix* x : {&a, &b, &d, &aux, &bias}) release(x);
    free(values), free(aux_values), free(bias_values), free(sums);
}

// ------------------------------------------------------------------------------------------------
// Refusals: each spoils one thing of a call that works

static const Problem plain = {16, 8, 24, false, false, CUDA_R_16BF, CUDA_R_16BF, 1, 1, 0, 1, 0};

template <class Spoil>
static cublasStatus_t spoiled(Spoil spoil, int offset_of_a = 0) {
    Matrix a = matrix(CUDA_R_16BF, 16, 24, 0, 2), b = matrix(CUDA_R_16BF, 24, 8, 0, 1);
    Matrix d = matrix(CUDA_R_16BF, 16, 8, 0, 1);
    Call call = prepare(plain, a, b, d, d, d);
    spoil(call);
    cublasStatus_t status = perform(call, plain, (char*)a.device + offset_of_a, b.device, d.device);
    OK(cudaDeviceSynchronize());
    destroy(&call);
    for (Matrix* x : {&a, &b, &d}) release(x);
    return status;
}

template <class T>
static void set(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute, T value) {
    BLAS(cublasLtMatrixLayoutSetAttribute(layout, attribute, &value, sizeof value));
}

#define SPOILED(change) spoiled([](Call& c) { change; })
#define EPILOGUE(value) set(c.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)value)

static void test_refusals(void) {
    const cublasStatus_t invalid = CUBLAS_STATUS_INVALID_VALUE, unsupported = CUBLAS_STATUS_NOT_SUPPORTED;
    CHECK(spoiled([](Call&) {}) == CUBLAS_STATUS_SUCCESS);
    CHECK(SPOILED(set(c.b, CUBLASLT_MATRIX_LAYOUT_ROWS, (uint64_t)23)) == invalid);
    CHECK(SPOILED(set(c.d, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)7)) == invalid);
    CHECK(SPOILED(set(c.a, CUBLASLT_MATRIX_LAYOUT_LD, (int64_t)15)) == invalid);
    CHECK(SPOILED(set(c.a, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 2)) == invalid);
    CHECK(SPOILED(set(c.b, CUBLASLT_MATRIX_LAYOUT_TYPE, (uint32_t)CUDA_R_32F)) == unsupported);
    uint32_t half = 0;
    cublasLtMatmulDesc_t o;
    BLAS(cublasLtMatmulDescCreate(&o, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CHECK(cublasLtMatmulDescSetAttribute(o, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &half, 4) == invalid);
    BLAS(cublasLtMatmulDescDestroy(o));
#ifdef __CPU_CUDA__     // a GPU may be more lenient, or decide when the algorithm is chosen
    CHECK(SPOILED(EPILOGUE(CUBLASLT_EPILOGUE_BIAS);
                  set(c.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (void*)NULL)) == invalid);
    CHECK(SPOILED(EPILOGUE(CUBLASLT_EPILOGUE_GELU_AUX);
                  set(c.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)20)) == invalid);
    CHECK(SPOILED(EPILOGUE(2)) == unsupported);
    CHECK(SPOILED(c.workspace_size = 16) == invalid);
    CHECK(SPOILED(OK(cudaStreamCreate(&c.stream)); OK(cudaStreamDestroy(c.stream))) ==
          CUBLAS_STATUS_EXECUTION_FAILED);
    CHECK(spoiled([](Call&) {}, 2) == unsupported);             // although 256 bytes are promised
    auto promise_2 = [](Call& c) {
        uint32_t bytes = 2;
        BLAS(cublasLtMatmulPreferenceSetAttribute(c.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                                  &bytes, sizeof bytes));
    };
    CHECK(spoiled(promise_2, 2) == CUBLAS_STATUS_SUCCESS);
#endif
}

int main(void) {
    cudaDataType f = CUDA_R_32F, h = CUDA_R_16BF;
    OK(cudaMalloc(&workspace, WORKSPACE));
    BLAS(cublasLtCreate(&handle));
    for (int which = 0; which < 12; which++) {
        bool ta = which & 1, tb = which & 2;
        cudaDataType in = which < 4 ? f : h, out = which < 8 ? f : h;
        test_product({40, 24, 56, ta, tb, in, out, CUBLASLT_EPILOGUE_DEFAULT, 1, 0, 1, 0});
        test_product({17, 5, 33, ta, tb, in, out, CUBLASLT_EPILOGUE_DEFAULT, -0.5f, 1, 3, 3});
    }
    static const int epilogues[] = {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU,
                                    CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
                                    CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
                                    CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,
                                    CUBLASLT_EPILOGUE_BGRADB};
    for (int epilogue : epilogues) {
        test_product({64, 32, 48, true, false, h, h, epilogue, 1, 0, 1, 0});
        test_product({32, 40, 16, false, true, h, h, epilogue, 2, 0.5f, 1, 8});
    }
    test_product({256, 128, 192, true, false, h, h, CUBLASLT_EPILOGUE_BIAS, 1, 0, 1, 0});   // several threads
    test_refusals();
    BLAS(cublasLtDestroy(handle));
    OK(cudaFree(workspace));
    return finish();
}
