// blas.cpp: cuBLASLt's matmul in float on the CPU.
//
// Each element is summed in the order of k; a GPU sums in another, with fused multiply-adds. Refused here,
// though cuBLASLt may take it: pointers less aligned than 16 bytes and than promised, and D over A or B.

#include "include/cublasLt.h"

#include <algorithm>

#include "include/cuda_bf16.h"
#include "runtime.h"

using namespace cpu_cuda;

enum { A, B, C, D, BIAS, AUX, OPERANDS };   // inside here A is op(A) (m, k), B the transpose of op(B): (n, k)
enum { ADDS_BIAS = 4, GELU = 32, GELU_GRADIENT = 64, HAS_AUX = 128, SUMS_B = 512 };     // bits of an epilogue

struct cublasLtContext {};

struct cublasLtMatmulDescOpaque_t {
    uint32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N, epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_leading = 0;
};

struct cublasLtMatrixLayoutOpaque_t {
    uint32_t type;
    size_t rows, columns, down, across;     // steps from an element to the next of its column, of its row
    char* at;                               // of an operand of a call; null: it has none
};

struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t workspace;
    uint32_t alignment[OPERANDS];           // that the pointers will have
};

namespace {

typedef cublasLtMatmulDescOpaque_t Operation;
typedef cublasLtMatrixLayoutOpaque_t Matrix;
typedef cublasLtMatmulPreferenceOpaque_t Preference;

struct Job {
    uint32_t epilogue;
    Matrix operands[OPERANDS];
    float alpha, beta;
};

constexpr uint64_t WORKSPACE = 1 << 16;     // asked for where the preference allows it
constexpr cublasStatus_t DONE = CUBLAS_STATUS_SUCCESS, INVALID = CUBLAS_STATUS_INVALID_VALUE;

// ------------------------------------------------------------------------------------------------
// Matrices

size_t size_of(const Matrix& x) { return x.type == CUDA_R_32F ? 4 : 2; }

Matrix transposed(const Matrix& x) { return {x.type, x.columns, x.rows, x.across, x.down, x.at}; }

float get(const Matrix& x, size_t row, size_t column) {
    size_t i = row * x.down + column * x.across;
    return x.type == CUDA_R_32F ? ((float*)x.at)[i] : float_of(((uint16_t*)x.at)[i]);
}

void put(const Matrix& x, size_t row, size_t column, float value) {
    size_t i = row * x.down + column * x.across;
    if (x.type == CUDA_R_32F) ((float*)x.at)[i] = value;
    else ((uint16_t*)x.at)[i] = bf16_bits(value);
}

// Tells the checks, column by column.
void use(const Matrix& x, bool write, const char* what) {
    if (x.down != 1) return use(transposed(x), write, what);
    for (size_t column = 0; column < x.columns; column++)
        use_memory(x.at + column * x.across * size_of(x), x.rows * size_of(x), write, what);
}

char* end(const Matrix& x) {
    return x.at + ((x.rows - 1) * x.down + (x.columns - 1) * x.across + 1) * size_of(x);
}

// ------------------------------------------------------------------------------------------------
// The product

constexpr size_t HIGH = 8, WIDE = 4;        // of a tile, whose sums stay in registers
typedef float Column __attribute__((vector_size(HIGH * sizeof(float))));

// Panels of `width` rows (k, width), the last filled up with zeros.
std::vector<float> pack(const Matrix& x, size_t width) {
    std::vector<float> panels((x.rows + width - 1) / width * width * x.columns);
    for (size_t row = 0; row < x.rows; row++) {
        float* to = &panels[row / width * width * x.columns + row % width];
        for (size_t k = 0; k < x.columns; k++) to[k * width] = get(x, row, k);
    }
    return panels;
}

// A tile of WIDE columns from a panel of each.
void multiply_panels(Column* sums, const float* a, const float* b, size_t depth) {
    for (size_t k = 0; k < depth; k++, a += HIGH, b += WIDE) {
        Column left;
        memcpy(&left, a, sizeof left);
        for (size_t w = 0; w < WIDE; w++) sums[w] += left * b[w];
    }
}

// ------------------------------------------------------------------------------------------------
// What follows the product

constexpr float GELU_SCALE = 0.7978845608028654f, GELU_CUBE = 0.044715f;

float gelu_tanh(float x) { return tanhf(GELU_SCALE * (x + GELU_CUBE * x * x * x)); }
float gelu(float x) { return 0.5f * x * (1 + gelu_tanh(x)); }
float gelu_gradient(float x) {
    float t = gelu_tanh(x);
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * x * x);
}

// Element (i, j) of D, and of aux, from that of the product.
void finish(const Job& job, size_t i, size_t j, float x) {
    const Matrix* o = job.operands;
    x *= job.alpha;
    if (job.beta != 0) x += job.beta * get(o[C], i, j);
    if (job.epilogue & ADDS_BIAS) x += get(o[BIAS], i, 0);
    if (job.epilogue & GELU) {
        put(o[AUX], i, j, x);
        x = gelu(x);
    }
    if (job.epilogue & GELU_GRADIENT) x *= gelu_gradient(get(o[AUX], i, j));
    put(o[D], i, j, x);
}

void run(const Job& job) {
    static const std::string names[] = {"A", "B", "C", "D", "bias", "aux"};
    const Matrix* o = job.operands;
    bool written[] = {false, false, false, true, (job.epilogue & SUMS_B) != 0, (job.epilogue & GELU) != 0};
    for (int i = 0; i < OPERANDS; i++)
        if (o[i].at) use(o[i], written[i], ("cublasLtMatmul: " + names[i]).c_str());
    size_t m = o[D].rows, n = o[D].columns, depth = o[A].columns;
    std::vector<float> a = pack(o[A], HIGH), b = pack(o[B], WIDE);
    for (size_t j = 0; j < n; j += WIDE)
        for (size_t i = 0; i < m; i += HIGH) {
            Column sums[WIDE] = {};
            multiply_panels(sums, &a[i * depth], &b[j * depth], depth);
            for (size_t w = j; w < std::min(j + WIDE, n); w++)
                for (size_t h = i; h < std::min(i + HIGH, m); h++) finish(job, h, w, sums[w - j][h - i]);
        }
    for (size_t row = 0; row < n && job.epilogue & SUMS_B; row++) {
        float sum = 0;
        for (size_t k = 0; k < depth; k++) sum += get(o[B], row, k);
        put(o[BIAS], row, 0, sum);
    }
}

// ------------------------------------------------------------------------------------------------
// What is asked, and whether it can be done

// All but the addresses and factors of a job.
cublasStatus_t describe(Job* job, cublasLtHandle_t handle, const Operation* o, const Matrix* a,
                        const Matrix* b, const Matrix* c, const Matrix* d) {
    static const uint32_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT,       CUBLASLT_EPILOGUE_BIAS,
                                         CUBLASLT_EPILOGUE_GELU_AUX,      CUBLASLT_EPILOGUE_DGELU,
                                         CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_BGRADB};
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!o || !a || !b || !c || !d) return INVALID;
    size_t m = d->rows, n = d->columns;
    Matrix bias = {d->type, o->epilogue & SUMS_B ? n : m, 1, 1, m + n, nullptr};
    bool has_aux = o->epilogue & HAS_AUX;
    Matrix aux = {d->type, m, n, 1, has_aux ? (size_t)o->aux_leading : m, nullptr};
    *job = {o->epilogue, {*a, *b, *c, *d, bias, aux}, 0, 0};
    Matrix* x = job->operands;
    for (int i = 0; i < OPERANDS; i++)
        if (!x[i].rows || !x[i].columns || x[i].across < x[i].rows) return INVALID;
    if (o->transpose_a) x[A] = transposed(*a);
    if (!o->transpose_b) x[B] = transposed(*b);
    bool fit = x[A].rows == m && x[B].rows == n && x[A].columns == x[B].columns;
    if (!fit || c->rows != m || c->columns != n || (has_aux && o->aux_leading % 8)) return INVALID;
    bool known = std::count(std::begin(epilogues), std::end(epilogues), o->epilogue);
    bool types = a->type == b->type && c->type == d->type && (a->type != CUDA_R_32F || d->type == CUDA_R_32F);
    bool no_conjugates = o->transpose_a <= CUBLAS_OP_T && o->transpose_b <= CUBLAS_OP_T;
    return known && types && no_conjugates ? DONE : CUBLAS_STATUS_NOT_SUPPORTED;
}

// Puts the addresses into a job, where they are needed and may be.
cublasStatus_t place(Job* job, const Preference& promised, const std::vector<const void*>& addresses) {
    Matrix* x = job->operands;
    bool bias = job->epilogue & (ADDS_BIAS | SUMS_B), aux = job->epilogue & HAS_AUX;
    bool needed[] = {true, true, job->beta != 0, true, bias, aux};
    for (int i = 0; i < OPERANDS; i++) {
        if (!needed[i]) continue;
        x[i].at = (char*)addresses[i];
        if (!x[i].at) return INVALID;
        if ((uintptr_t)x[i].at % std::max(size_of(x[i]), (size_t)std::min(promised.alignment[i], 16u)))
            return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    for (int i : {A, B})
        if (x[i].at < end(x[D]) && x[D].at < end(x[i])) return INVALID;
    return DONE;
}

template <class T>
cublasStatus_t set(T* field, const void* value, size_t size) {
    if (!value || size != sizeof *field) return INVALID;
    memcpy(field, value, size);
    return DONE;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// The interface

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = new cublasLtContext, DONE; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete handle, DONE; }

cublasStatus_t cublasLtMatmulDescCreate(Operation** o, cublasComputeType_t compute, cudaDataType scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    return *o = new Operation, DONE;
}
cublasStatus_t cublasLtMatmulDescDestroy(Operation* o) { return delete o, DONE; }

cublasStatus_t cublasLtMatmulDescSetAttribute(Operation* o, cublasLtMatmulDescAttributes_t name,
                                              const void* value, size_t size) {
    switch (name) {
        case CUBLASLT_MATMUL_DESC_TRANSA: return set(&o->transpose_a, value, size);
        case CUBLASLT_MATMUL_DESC_TRANSB: return set(&o->transpose_b, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(&o->epilogue, value, size);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(&o->bias, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return set(&o->aux, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return set(&o->aux_leading, value, size);
    }
    return INVALID;
}

cublasStatus_t cublasLtMatrixLayoutCreate(Matrix** x, cudaDataType type, uint64_t rows, uint64_t columns,
                                          int64_t leading) {
    return *x = new Matrix{type, rows, columns, 1, (size_t)std::max(leading, (int64_t)0), nullptr}, DONE;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(Matrix* x) { return delete x, DONE; }

cublasStatus_t cublasLtMatmulPreferenceCreate(Preference** preference) {
    return *preference = new Preference{0, {256, 256, 256, 256, 16, 16}}, DONE;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(Preference* preference) { return delete preference, DONE; }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    Preference* preference, cublasLtMatmulPreferenceAttributes_t name, const void* value, size_t size) {
    if (name == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return set(&preference->workspace, value, size);
    unsigned operand = name - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    return operand <= D ? set(&preference->alignment[operand], value, size) : INVALID;
}

// The algorithm is what the preference promises.
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, Operation* o, Matrix* a, Matrix* b,
                                              Matrix* c, Matrix* d, Preference* preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
    Job job;
    if (!preference || wanted < 1 || !results || !found) return INVALID;
    *found = 0;
    cublasStatus_t status = describe(&job, handle, o, a, b, c, d);
    if (status != DONE) return status;
    Preference promised = *preference;
    promised.workspace = std::min(promised.workspace, WORKSPACE);
    *results = {{}, promised.workspace, DONE, 1, {}};
    memcpy(&results->algo, &promised, sizeof promised);
    return *found = 1, DONE;
}

// Without an algorithm any alignment to 16 bytes does. The workspace is written over, as on a GPU.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, Operation* o, const void* alpha, const void* at_a,
                              Matrix* a, const void* at_b, Matrix* b, const void* beta, const void* at_c,
                              Matrix* c, void* at_d, Matrix* d, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_size, cudaStream_t stream) {
    Job job;
    Preference promised = {0, {16, 16, 16, 16, 16, 16}};
    cublasStatus_t status = describe(&job, handle, o, a, b, c, d);
    if (status != DONE) return status;
    if (algo) memcpy(&promised, algo, sizeof promised);
    bool chosen = promised.alignment[AUX] == 16, room = workspace && workspace_size >= promised.workspace;
    if (!alpha || !beta || !chosen || (promised.workspace && !room)) return INVALID;
    job.alpha = *(const float*)alpha;
    job.beta = *(const float*)beta;
    status = place(&job, promised, {at_a, at_b, at_c, at_d, o->bias, o->aux});
    if (status != DONE) return status;
    std::lock_guard<std::recursive_mutex> lock(runtime_lock());
    if (!stream_exists(stream)) return CUBLAS_STATUS_EXECUTION_FAILED;
    enqueue(stream, [job, workspace, size = promised.workspace] {
        DeviceCode open;
        if (size) use_memory(workspace, size, true, "cublasLtMatmul: workspace");
        if (size) memset(workspace, 0xff, size);
        run(job);
    });
    return DONE;
}
