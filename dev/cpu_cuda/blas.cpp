// blas.cpp: cuBLASLt's matmul in float on the CPU.
//
// Each element of the product is summed in the order of k by one thread: the result does not depend on the
// number of threads. A GPU sums in another order, with fused multiply-adds. Refused here, though cuBLASLt may
// take it: operands less aligned than 16 bytes and than the preference says, and D over A or B.

#include "include/cublasLt.h"

#include <stddef.h>

#include <algorithm>
#include <thread>

#include "runtime.h"

using namespace cpu_cuda;

struct cublasLtContext {
    int devices;
};

namespace {

// ------------------------------------------------------------------------------------------------
// Descriptors, behind NVIDIA's opaque ones

struct Operation {
    int32_t compute, scale, transpose_a, transpose_b;
    uint32_t epilogue;
    void *bias, *aux;
    int64_t aux_leading;
    int32_t aux_type, bias_type;            // -1: that of D
};

struct Layout {
    uint32_t type;
    uint64_t rows, columns;
    int64_t leading, stride;                // stride: from one matrix of a batch to the next
    int32_t batches;
};

struct Preference {
    uint64_t workspace;
    uint32_t alignment[4];                  // that the pointers of A, B, C and D will have
};

struct Algorithm {                          // what a heuristic result promises
    uint64_t mark, workspace;
    uint32_t alignment[4];
};

constexpr uint64_t ALGORITHM = 0x637075637564614cull;
constexpr uint64_t WORKSPACE = 1 << 16;     // asked for where the preference allows it

struct Attribute {
    int name;
    size_t offset, size;
};
#define FIELD(name, structure, member) {name, offsetof(structure, member), sizeof(structure::member)}

const Attribute operation_attributes[] = {
    FIELD(CUBLASLT_MATMUL_DESC_TRANSA, Operation, transpose_a),
    FIELD(CUBLASLT_MATMUL_DESC_TRANSB, Operation, transpose_b),
    FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE, Operation, epilogue),
    FIELD(CUBLASLT_MATMUL_DESC_BIAS_POINTER, Operation, bias),
    FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, Operation, aux),
    FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, Operation, aux_leading),
    FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, Operation, aux_type),
    FIELD(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, Operation, bias_type),
};

const Attribute layout_attributes[] = {
    FIELD(CUBLASLT_MATRIX_LAYOUT_TYPE, Layout, type),
    FIELD(CUBLASLT_MATRIX_LAYOUT_ROWS, Layout, rows),
    FIELD(CUBLASLT_MATRIX_LAYOUT_COLS, Layout, columns),
    FIELD(CUBLASLT_MATRIX_LAYOUT_LD, Layout, leading),
    FIELD(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, Layout, batches),
    FIELD(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, Layout, stride),
};

const Attribute preference_attributes[] = {
    FIELD(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, Preference, workspace),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, Preference, alignment[0]),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, Preference, alignment[1]),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, Preference, alignment[2]),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, Preference, alignment[3]),
};

template <class Inner, class Opaque>
cublasStatus_t create(Opaque** opaque, const Inner& value) {
    static_assert(sizeof(Inner) <= sizeof(Opaque), "the descriptor does not fit");
    if (!opaque) return CUBLAS_STATUS_INVALID_VALUE;
    *opaque = new Opaque();
    memcpy((*opaque)->data, &value, sizeof value);
    return CUBLAS_STATUS_SUCCESS;
}

template <class Inner, class Opaque>
Inner inner(const Opaque* opaque) {
    Inner value;
    memcpy(&value, opaque->data, sizeof value);
    return value;
}

template <class Opaque>
cublasStatus_t destroy(Opaque* opaque) {
    delete opaque;
    return CUBLAS_STATUS_SUCCESS;
}

template <class Opaque, size_t count>
cublasStatus_t set(Opaque* opaque, const Attribute (&attributes)[count], int name, const void* value,
                   size_t size) {
    if (!opaque || !value) return CUBLAS_STATUS_INVALID_VALUE;
    for (const Attribute& attribute : attributes) {
        if (attribute.name != name) continue;
        if (attribute.size != size) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy((char*)opaque->data + attribute.offset, value, size);
        return CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

// ------------------------------------------------------------------------------------------------
// What is asked, and whether it can be done

enum { BIAS = 4, BIAS_GRADIENT = 16, GELU = 32, GELU_GRADIENT = 64, AUX = 128, SUM_A = 256, SUM_B = 512 };

struct Matmul {
    Operation operation;
    Layout a, b, c, d;
    size_t m, n, k;
    float alpha, beta;
    const char *A, *B, *C;
    char* D;
};

size_t size_of(uint32_t type) { return type == CUDA_R_32F ? 4 : 2; }

bool is_possible(const Layout& layout) {
    return layout.rows > 0 && layout.columns > 0 && layout.leading >= (int64_t)layout.rows &&
           layout.batches > 0 && layout.stride >= 0;
}

bool types_are_supported(const Matmul& job) {
    const Operation& o = job.operation;
    bool floats = job.a.type == CUDA_R_32F && job.d.type == CUDA_R_32F;
    bool halves = job.a.type == CUDA_R_16BF && (job.d.type == CUDA_R_16BF || job.d.type == CUDA_R_32F);
    return o.scale == CUDA_R_32F && o.compute == CUBLAS_COMPUTE_32F && job.a.type == job.b.type &&
           job.c.type == job.d.type && (floats || halves) &&
           (o.bias_type == -1 || o.bias_type == (int)job.d.type) &&
           (o.aux_type == -1 || o.aux_type == (int)job.d.type);
}

bool epilogue_is_supported(const Matmul& job) {
    static const uint32_t known[] = {CUBLASLT_EPILOGUE_DEFAULT,  CUBLASLT_EPILOGUE_BIAS,
                                     CUBLASLT_EPILOGUE_GELU,     CUBLASLT_EPILOGUE_GELU_BIAS,
                                     CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                                     CUBLASLT_EPILOGUE_DGELU,    CUBLASLT_EPILOGUE_DGELU_BGRAD,
                                     CUBLASLT_EPILOGUE_BGRADA,   CUBLASLT_EPILOGUE_BGRADB};
    uint32_t epilogue = job.operation.epilogue;
    return std::find(std::begin(known), std::end(known), epilogue) != std::end(known) &&
           (job.d.batches == 1 || epilogue == CUBLASLT_EPILOGUE_DEFAULT);
}

bool uses_bias(const Operation& o) { return o.epilogue & (BIAS | BIAS_GRADIENT | SUM_A | SUM_B); }

// Fills in the operation and the sizes.
cublasStatus_t describe(Matmul* job, cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                        cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                        cublasLtMatrixLayout_t d) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!operation || !a || !b || !c || !d) return CUBLAS_STATUS_INVALID_VALUE;
    job->operation = inner<Operation>(operation);
    const Operation& o = job->operation;
    job->a = inner<Layout>(a);
    job->b = inner<Layout>(b);
    job->c = inner<Layout>(c);
    job->d = inner<Layout>(d);
    for (const Layout* layout : {&job->a, &job->b, &job->c, &job->d})
        if (!is_possible(*layout) || layout->batches != job->d.batches) return CUBLAS_STATUS_INVALID_VALUE;
    job->m = o.transpose_a ? job->a.columns : job->a.rows;
    job->k = o.transpose_a ? job->a.rows : job->a.columns;
    job->n = o.transpose_b ? job->b.rows : job->b.columns;
    bool meet = job->k == (o.transpose_b ? job->b.columns : job->b.rows) && job->m == job->d.rows &&
                job->n == job->d.columns && job->c.rows == job->d.rows && job->c.columns == job->d.columns;
    bool apart = job->d.batches == 1 || job->d.stride >= job->d.leading * (int64_t)job->d.columns;
    if (!meet || !apart) return CUBLAS_STATUS_INVALID_VALUE;
    if (o.transpose_a > CUBLAS_OP_T || o.transpose_b > CUBLAS_OP_T || !types_are_supported(*job) ||
        !epilogue_is_supported(*job))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (uses_bias(o) && !o.bias) return CUBLAS_STATUS_INVALID_VALUE;
    if (o.epilogue & AUX && (!o.aux || o.aux_leading < (int64_t)job->m || o.aux_leading % 8))
        return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}

// ------------------------------------------------------------------------------------------------
// The product

constexpr size_t HIGH = 8, WIDE = 4;        // of a tile, whose sums stay in registers
typedef float Four __attribute__((vector_size(16)));

float load(const char* p, uint32_t type, size_t i) {
    if (type == CUDA_R_32F) return ((const float*)p)[i];
    return float_of((uint32_t)((const uint16_t*)p)[i] << 16);
}

void store(void* p, uint32_t type, size_t i, float value) {
    if (type == CUDA_R_32F) ((float*)p)[i] = value;
    else ((uint16_t*)p)[i] = bf16_bits(value);
}

// Panels of `width` rows (k, width), the last filled up with zeros. Rows are `along` apart, their k `deep`.
std::vector<float> pack(const char* from, uint32_t type, size_t rows, size_t k, size_t along, size_t deep,
                        size_t width) {
    std::vector<float> panels((rows + width - 1) / width * width * k);
    for (size_t row = 0; row < rows; row++) {
        float* to = panels.data() + row / width * width * k + row % width;
        for (size_t i = 0; i < k; i++) to[i * width] = load(from, type, row * along + i * deep);
    }
    return panels;
}

// tile (WIDE columns of HIGH) = panel of A (k, HIGH) times panel of B (k, WIDE)
void multiply_panels(float* tile, size_t leading, const float* a, const float* b, size_t k) {
    Four sums[WIDE][2] = {};
    for (size_t i = 0; i < k; i++, a += HIGH, b += WIDE) {
        Four upper, lower;
        memcpy(&upper, a, sizeof upper);
        memcpy(&lower, a + 4, sizeof lower);
        for (size_t j = 0; j < WIDE; j++) {
            sums[j][0] += upper * b[j];
            sums[j][1] += lower * b[j];
        }
    }
    for (size_t j = 0; j < WIDE; j++) memcpy(tile + j * leading, sums[j], sizeof sums[j]);
}

// product (columns of `leading` rows) from all panels, shared out among threads by columns
void multiply(float* product, size_t leading, const std::vector<float>& a, const std::vector<float>& b,
              size_t k) {
    size_t panels = b.size() / (WIDE * k);
    size_t workers = a.size() * panels < 1 << 20 ? 1 : std::min(panels, (size_t)options().threads);
    auto work = [&](size_t worker) {
        for (size_t j = worker; j < panels; j += workers)
            for (size_t i = 0; i < leading; i += HIGH)
                multiply_panels(product + j * WIDE * leading + i, leading, &a[i * k], &b[j * WIDE * k], k);
    };
    std::vector<std::thread> others;
    for (size_t worker = 1; worker < workers; worker++) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
}

// ------------------------------------------------------------------------------------------------
// What follows the product

constexpr float GELU_SCALE = 0.7978845608028654f, GELU_CUBE = 0.044715f;

float gelu(float x) { return 0.5f * x * (1 + tanhf(GELU_SCALE * (x + GELU_CUBE * x * x * x))); }

float gelu_gradient(float x) {
    float t = tanhf(GELU_SCALE * (x + GELU_CUBE * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * x * x);
}

// D and what goes with it, from the product.
void finish(const Matmul& job, const char* C, char* D, const float* product, size_t leading) {
    const Operation& o = job.operation;
    uint32_t type = job.d.type;
    std::vector<float> sums(job.m);
    for (size_t j = 0; j < job.n; j++)
        for (size_t i = 0; i < job.m; i++) {
            size_t aux = j * (size_t)o.aux_leading + i;
            float x = job.alpha * product[j * leading + i];
            if (job.beta != 0) x += job.beta * load(C, type, j * (size_t)job.c.leading + i);
            if (o.epilogue & BIAS) x += load((char*)o.bias, type, i);
            if (o.epilogue & GELU && o.epilogue & AUX) store(o.aux, type, aux, x);
            if (o.epilogue & GELU) x = gelu(x);
            if (o.epilogue & GELU_GRADIENT) x *= gelu_gradient(load((char*)o.aux, type, aux));
            sums[i] += x;
            store(D, type, j * (size_t)job.d.leading + i, x);
        }
    for (size_t i = 0; o.epilogue & BIAS_GRADIENT && i < job.m; i++) store(o.bias, type, i, sums[i]);
}

// The bias gradients that are sums over k of an operand's rows.
void sum_panels(const Matmul& job, const std::vector<float>& panels, size_t rows, size_t width) {
    for (size_t row = 0; row < rows; row++) {
        float sum = 0;
        for (size_t i = 0; i < job.k; i++) sum += panels[(row / width * job.k + i) * width + row % width];
        store(job.operation.bias, job.d.type, row, sum);
    }
}

void use_matrix(const void* p, const Layout& layout, bool write, const char* what) {
    size_t size = size_of(layout.type), rows = layout.rows, leading = (size_t)layout.leading;
    size_t together = leading == rows ? layout.columns : 1;         // columns without a gap
    for (size_t column = 0; column < layout.columns; column += together)
        use_memory((const char*)p + column * leading * size, together * rows * size, write, what);
}

// One matrix of the batch.
void run(const Matmul& job, const char* A, const char* B, const char* C, char* D) {
    const Operation& o = job.operation;
    bool forward = o.epilogue & GELU, ta = o.transpose_a, tb = o.transpose_b;
    size_t lda = (size_t)job.a.leading, ldb = (size_t)job.b.leading;
    size_t bias = o.epilogue & SUM_B ? job.n : job.m;
    use_matrix(A, job.a, false, "cublasLtMatmul: A");
    use_matrix(B, job.b, false, "cublasLtMatmul: B");
    if (job.beta != 0) use_matrix(C, job.c, false, "cublasLtMatmul: C");
    if (uses_bias(o))
        use_memory(o.bias, bias * size_of(job.d.type), !(o.epilogue & BIAS), "cublasLtMatmul: bias");
    if (o.epilogue & AUX)
        use_matrix(o.aux, {job.d.type, job.m, job.n, o.aux_leading, 0, 1}, forward, "cublasLtMatmul: aux");
    use_matrix(D, job.d, true, "cublasLtMatmul: D");
    std::vector<float> a = pack(A, job.a.type, job.m, job.k, ta ? lda : 1, ta ? 1 : lda, HIGH);
    std::vector<float> b = pack(B, job.b.type, job.n, job.k, tb ? 1 : ldb, tb ? ldb : 1, WIDE);
    size_t leading = a.size() / job.k;
    std::vector<float> product(leading * (b.size() / job.k));
    multiply(product.data(), leading, a, b, job.k);
    finish(job, C, D, product.data(), leading);
    if (o.epilogue & SUM_A) sum_panels(job, a, job.m, HIGH);
    if (o.epilogue & SUM_B) sum_panels(job, b, job.n, WIDE);
}

void run_batch(const Matmul& job) {
    DeviceCode open;
    for (size_t i = 0; i < (size_t)job.d.batches; i++)
        run(job, job.A + i * job.a.stride * size_of(job.a.type),
            job.B + i * job.b.stride * size_of(job.b.type), job.C + i * job.c.stride * size_of(job.c.type),
            job.D + i * job.d.stride * size_of(job.d.type));
}

// ------------------------------------------------------------------------------------------------
// Pointers

bool aligned(const void* p, size_t to) { return (uintptr_t)p % to == 0; }

// [p, p + bytes) of a whole batch
size_t extent(const Layout& l) {
    return ((size_t)(l.batches - 1) * l.stride + (l.columns - 1) * l.leading + l.rows) * size_of(l.type);
}

bool overlap(const char* p, const Layout& a, const char* q, const Layout& b) {
    return p < q + extent(b) && q < p + extent(a);
}

cublasStatus_t check_pointers(const Matmul& job, const Algorithm& algorithm) {
    const Operation& o = job.operation;
    bool uses_c = job.beta != 0;
    if (!job.A || !job.B || !job.D || (uses_c && !job.C)) return CUBLAS_STATUS_INVALID_VALUE;
    if (overlap(job.D, job.d, job.A, job.a) || overlap(job.D, job.d, job.B, job.b))
        return CUBLAS_STATUS_INVALID_VALUE;
    bool in_place = job.C == job.D && job.c.leading == job.d.leading && job.c.stride == job.d.stride;
    if (uses_c && !in_place && overlap(job.D, job.d, job.C, job.c)) return CUBLAS_STATUS_INVALID_VALUE;
    const char* pointers[] = {job.A, job.B, uses_c ? job.C : nullptr, job.D};
    for (int i = 0; i < 4; i++) {
        size_t element = size_of(i < 2 ? job.a.type : job.d.type);
        size_t needed = std::max(element, (size_t)std::min(algorithm.alignment[i], 16u));
        if (!aligned(pointers[i], needed)) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    bool aux = o.epilogue & AUX;
    if ((uses_bias(o) && !aligned(o.bias, 16)) || (aux && !aligned(o.aux, 16)))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// The interface

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    *handle = new cublasLtContext{1};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    Operation o = {};
    o.compute = compute;
    o.scale = scale;
    o.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    o.aux_type = o.bias_type = -1;
    return create(operation, o);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) { return destroy(operation); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              size_t size) {
    return set(operation, operation_attributes, attribute, value, size);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
    return create(layout, Layout{(uint32_t)type, rows, columns, leading, 0, 1});
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                size_t size) {
    return set(layout, layout_attributes, attribute, value, size);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return create(preference, Preference{0, {256, 256, 256, 256}});
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy(preference);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t size) {
    return set(preference, preference_attributes, attribute, value, size);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
    Matmul job = {};
    if (found) *found = 0;
    cublasStatus_t status = describe(&job, handle, operation, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (!preference || wanted < 1 || !results || !found) return CUBLAS_STATUS_INVALID_VALUE;
    Preference p = inner<Preference>(preference);
    Algorithm algorithm = {ALGORITHM, std::min(p.workspace, WORKSPACE), {}};
    memcpy(algorithm.alignment, p.alignment, sizeof p.alignment);
    results[0] = {};
    memcpy(results[0].algo.data, &algorithm, sizeof algorithm);
    results[0].workspaceSize = algorithm.workspace;
    results[0].wavesCount = 1;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

// Without an algorithm the default preference holds. The workspace is written over, as on a GPU.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_size,
                              cudaStream_t stream) {
    Matmul job = {};
    Algorithm algorithm = {ALGORITHM, workspace ? std::min(workspace_size, WORKSPACE) : 0, {16, 16, 16, 16}};
    cublasStatus_t status = describe(&job, handle, operation, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (!alpha || !beta) return CUBLAS_STATUS_INVALID_VALUE;
    if (algo) algorithm = inner<Algorithm>(algo);
    if (algorithm.mark != ALGORITHM) return CUBLAS_STATUS_INVALID_VALUE;
    if (algorithm.workspace &&
        (!workspace || workspace_size < algorithm.workspace || !aligned(workspace, 16)))
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&job.alpha, alpha, sizeof job.alpha);
    memcpy(&job.beta, beta, sizeof job.beta);
    job.A = (const char*)A;
    job.B = (const char*)B;
    job.C = (const char*)C;
    job.D = (char*)D;
    status = check_pointers(job, algorithm);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    std::lock_guard<std::recursive_mutex> lock(runtime_lock());
    if (!stream_exists(stream)) return CUBLAS_STATUS_EXECUTION_FAILED;
    enqueue(stream, [job, workspace, size = algorithm.workspace] {
        DeviceCode open;
        if (size) use_memory(workspace, size, true, "cublasLtMatmul: workspace");
        if (size) memset(workspace, 0xff, size);
        run_batch(job);
    });
    return CUBLAS_STATUS_SUCCESS;
}
