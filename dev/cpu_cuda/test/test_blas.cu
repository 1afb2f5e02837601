// test_blas.cu: cuBLASLt's products against a plain loop in double: epilogues, transpositions, types, beta,
// padded columns; and what it must refuse.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>

#include <vector>

#include "test.h"

#define BLAS(call) CHECK((call) == CUBLAS_STATUS_SUCCESS)

static const cudaDataType F = CUDA_R_32F, H = CUDA_R_16BF;
enum { WORKSPACE = 1 << 20 };
static cublasLtHandle_t handle;
static void* workspace;

struct Matrix {                                 // by columns, on both sides: host holds the device's values
    cudaDataType type;
    int rows, columns, leading;
    std::vector<float> host;
    char* device;
};

struct Call {                                   // D = C
    int m, n, k;
    bool transpose_a, transpose_b;
    cudaDataType in, out;
    int epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    float alpha = 1, beta = 0;
    int padding = 0;                            // what each column has more than its rows
    Matrix a = {}, b = {}, d = {}, aux = {}, bias = {};
    uint32_t alignment = 256;                   // promised of A
    size_t workspace_size = WORKSPACE;
    cudaStream_t stream = 0;
};

// ------------------------------------------------------------------------------------------------
// Matrices

static float uniform(void) {                    // in [-1, 1)
    static unsigned seed = 1;
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (1 << 23) - 1;
}

// Copies all values to the device, rounded to the type, or from it.
static void transfer(Matrix* x, cudaMemcpyKind direction) {
    std::vector<__nv_bfloat16> halves(x->host.begin(), x->host.end());
    void* values = x->type == F ? (void*)x->host.data() : halves.data();
    bool to_device = direction == cudaMemcpyHostToDevice;
    size_t size = halves.size() * (x->type == F ? sizeof(float) : sizeof(__nv_bfloat16));
    OK(cudaMemcpy(to_device ? x->device : values, to_device ? values : x->device, size, direction));
    if (x->type != F) x->host.assign(halves.begin(), halves.end());
}

static Matrix matrix(cudaDataType type, int rows, int columns, int leading) {
    Matrix x = {type, rows, columns, leading, std::vector<float>(leading * columns), NULL};
    for (float& value : x.host) value = uniform();
    OK(cudaMalloc(&x.device, x.host.size() * (type == F ? sizeof(float) : sizeof(__nv_bfloat16))));
    transfer(&x, cudaMemcpyHostToDevice);
    return x;
}

static void make_matrices(Call* c) {
    int a_rows = c->transpose_a ? c->k : c->m, b_rows = c->transpose_b ? c->n : c->k;
    c->a = matrix(c->in, a_rows, c->m + c->k - a_rows, a_rows + c->padding);
    c->b = matrix(c->in, b_rows, c->n + c->k - b_rows, b_rows + c->padding);
    c->d = matrix(c->out, c->m, c->n, c->m + c->padding);
    c->aux = matrix(c->out, c->m, c->n, (c->m + 7) / 8 * 8 + c->padding * 8);
    c->bias = matrix(c->out, c->m + c->n, 1, c->m + c->n);
}

static void free_matrices(const Call& c) {
    for (const Matrix* x : {&c.a, &c.b, &c.d, &c.aux, &c.bias}) OK(cudaFree(x->device));
}

// ------------------------------------------------------------------------------------------------
// One call

template <class T>
static void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, T value) {
    BLAS(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value));
}

template <class T>
static void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    BLAS(cublasLtMatmulPreferenceSetAttribute(p, attribute, &value, sizeof value));
}

// The first status that is not success, from the heuristic and the product.
static cublasStatus_t perform(const Call& c) {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    float alpha = c.alpha, beta = c.beta;
    BLAS(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(operation, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(c.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(operation, CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(c.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)c.epilogue);
    set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, c.bias.device);
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, c.aux.device);
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)c.aux.leading);
    BLAS(cublasLtMatrixLayoutCreate(&a, c.a.type, c.a.rows, c.a.columns, c.a.leading));
    BLAS(cublasLtMatrixLayoutCreate(&b, c.b.type, c.b.rows, c.b.columns, c.b.leading));
    BLAS(cublasLtMatrixLayoutCreate(&d, c.d.type, c.d.rows, c.d.columns, c.d.leading));
    BLAS(cublasLtMatmulPreferenceCreate(&preference));
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)WORKSPACE);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, c.alignment);
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, operation, a, b, d, d, preference, 1, &result, &found);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmul(handle, operation, &alpha, c.a.device, a, c.b.device, b, &beta, c.d.device, d,
                                c.d.device, d, &result.algo, workspace, c.workspace_size, c.stream);
    alpha = beta = NAN;                         // they are read during the call
    for (cublasLtMatrixLayout_t layout : {a, b, d}) BLAS(cublasLtMatrixLayoutDestroy(layout));
    BLAS(cublasLtMatmulPreferenceDestroy(preference));
    BLAS(cublasLtMatmulDescDestroy(operation));
    return status;
}

// ------------------------------------------------------------------------------------------------
// Against the plain loop

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// A central difference: independent of the formula, good to 1e-9.
static double gelu_gradient(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

#ifdef __CPU_CUDA__
#define GELU_ERROR 1e-6
#else
#define GELU_ERROR 2e-3                         // the GPU's own tanh has 2^-11
#endif

// x is right if it differs by no more than: rounding of k sums (2^-23 of the magnitudes each, on a GPU they
// are cut), of the epilogue, and of the stored type (half of 2^-7, or 2^-23).
static bool close(float x, double expected, double magnitude, int k, cudaDataType type, double extra) {
    double stored = (type == F ? 0x1p-23 : 0x1p-8) * fabs(expected);
    return fabs(x - expected) <= (k + 4) * 0x1p-23 * magnitude + stored + extra;
}

static float at(const Matrix& x, bool transposed, int row, int column) {
    return transposed ? x.host[row * x.leading + column] : x.host[column * x.leading + row];
}

// Are element (i, j) of D and of aux, as they came back, what those of the operands give?
static bool element_is_right(const Call& c, const Matrix& d, const Matrix& aux, int i, int j) {
    double x = c.beta * at(c.d, false, i, j), magnitude = fabs(c.beta) + 1, extra = 0;
    bool forward = c.epilogue & 32, right = true;
    for (int k = 0; k < c.k; k++) {
        double term = (double)c.alpha * at(c.a, c.transpose_a, i, k) * at(c.b, c.transpose_b, k, j);
        x += term;
        magnitude += fabs(term);
    }
    if (c.epilogue & 4) x += c.bias.host[i];
    if (forward) {
        right = close(at(aux, false, i, j), x, magnitude, c.k, c.out, 0);
        extra = GELU_ERROR * (1 + fabs(x));
        x = gelu(x);
    }
    if (c.epilogue & 64) {
        extra = GELU_ERROR * fabs(x);
        x *= gelu_gradient(at(c.aux, false, i, j));
    }
    magnitude *= 1.2;                           // GELU's steepest slope
    return right && close(at(d, false, i, j), x, magnitude, c.k, c.out, extra);
}

static void test_product(Call c) {
    make_matrices(&c);
    BLAS(perform(c));
    Matrix d = c.d, aux = c.aux, bias = c.bias;
    int right = 0;
    for (Matrix* x : {&d, &aux, &bias}) transfer(x, cudaMemcpyDeviceToHost);
    for (int j = 0; j < c.n; j++) {
        for (int i = 0; i < c.m; i++) right += element_is_right(c, d, aux, i, j);
        for (int i = c.m; i < d.leading; i++) CHECK(at(d, false, i, j) == at(c.d, false, i, j));    // padding
    }
    CHECK(right == c.m * c.n);
    for (int j = 0; j < c.n && c.epilogue == CUBLASLT_EPILOGUE_BGRADB; j++) {
        double sum = 0;
        for (int k = 0; k < c.k; k++) sum += at(c.b, c.transpose_b, k, j);
        CHECK(close(bias.host[j], sum, c.k, c.k, c.out, 0));
    }
    free_matrices(c);
}

// ------------------------------------------------------------------------------------------------
// Refusals: each spoils one thing of a call that works

template <class Spoil>
static cublasStatus_t spoiled(Spoil spoil) {
    Call call = {16, 8, 24, false, false, H, H};
    make_matrices(&call);
    Call changed = call;
    spoil(changed);
    cublasStatus_t status = perform(changed);
    OK(cudaDeviceSynchronize());
    free_matrices(call);
    return status;
}
#define SPOILED(change) spoiled([](Call& c) { change; })

static void test_refusals(void) {
    const cublasStatus_t invalid = CUBLAS_STATUS_INVALID_VALUE, unsupported = CUBLAS_STATUS_NOT_SUPPORTED;
    CHECK(spoiled([](Call&) {}) == CUBLAS_STATUS_SUCCESS);
    CHECK(SPOILED(c.b.rows = 23) == invalid);
    CHECK(SPOILED(c.d.columns = 7) == invalid);
    CHECK(SPOILED(c.a.leading = 15) == invalid);
    CHECK(SPOILED(c.b.type = F) == unsupported);
#ifdef __CPU_CUDA__     // a GPU may be more lenient, or decide when the algorithm is chosen
    CHECK(SPOILED(c.epilogue = CUBLASLT_EPILOGUE_BIAS; c.bias.device += 8) == unsupported);
    CHECK(SPOILED(c.epilogue = CUBLASLT_EPILOGUE_GELU_AUX; c.aux.leading = 20) == invalid);
    CHECK(SPOILED(c.epilogue = 2) == unsupported);
    CHECK(SPOILED(c.workspace_size = 16) == invalid);
    CHECK(SPOILED(c.d.device = c.a.device) == invalid);
    CHECK(SPOILED(OK(cudaStreamCreate(&c.stream)); OK(cudaStreamDestroy(c.stream))) ==
          CUBLAS_STATUS_EXECUTION_FAILED);
    CHECK(SPOILED(c.a.device += 2) == unsupported);             // although 256 bytes are promised
    CHECK(SPOILED(c.a.device += 2; c.alignment = 2; c.a.columns = c.b.rows = 23) == CUBLAS_STATUS_SUCCESS);
#endif
}

int main(void) {
    OK(cudaMalloc(&workspace, WORKSPACE));
    BLAS(cublasLtCreate(&handle));
    for (int which = 0; which < 12; which++) {
        bool ta = which & 1, tb = which & 2;
        cudaDataType in = which < 4 ? F : H, out = which < 8 ? F : H;
        test_product({40, 24, 56, ta, tb, in, out});
        test_product({17, 5, 33, ta, tb, in, out, CUBLASLT_EPILOGUE_DEFAULT, -0.5f, 1, 3});
    }
    for (int epilogue : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                         CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_BGRADB}) {
        test_product({64, 32, 48, true, false, H, H, epilogue});
        test_product({32, 40, 16, false, true, H, H, epilogue, 2, 0.5f, 8});
    }
    test_refusals();
    BLAS(cublasLtDestroy(handle));
    OK(cudaFree(workspace));
    return finish();
}
