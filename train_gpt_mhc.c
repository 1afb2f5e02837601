// train_gpt_mhc.c: trains GPT models whose residual stream is n streams mixed by manifold-constrained
// hyper-connections (mHC, arXiv 2512.24880), on a CPU. It is also the specification of the GPU trainer:
// plain loops in fp32, each backward beside its forward. MODEL.md derives what is computed here.
//
// Letters, used everywhere for dimensions:  B sequences, T positions, C channels, V tokens in the vocabulary,
// L blocks, n residual streams, M outputs of a connection's projection. A row is one token: rows = B * T.
// A pointer's comment is its shape. The state x of a token is (n, C): stream i is x + i * C.
// Sublayers (attention and MLP counted separately) are numbered k = 0 .. 2L-1.
//
// Read from top to bottom: matrix product, parameters, the layers of GPT-2, the connections, the model,
// gains, the optimiser, checkpoints, the run.

#include <assert.h>
#include <math.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "host/common.h"
#include "host/options.h"
#include "host/plan.h"
#include "host/planner.h"
#include "host/rundir.h"
#include "host/schedule.h"
#include "host/spikes.h"
#include "host/transport.h"
#include "data/bpe.h"
#include "data/corpus.h"
#include "data/runlog.h"
#include "data/safetensors.h"
#include "data/tokens.h"
#include "data/trace.h"

#ifndef REAL
#define REAL float
#endif
typedef REAL real;              // float; double only for finite differences. Files stay fp32

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))     // specialised for each constant argument
#define RESTRICT __restrict__
#else
#define INLINE static inline
#define RESTRICT
#endif

INLINE int min_int(int a, int b) { return a < b ? a : b; }

#ifdef _OPENMP
static int thread_count(void) { return omp_get_max_threads(); }
static int thread_index(void) { return omp_get_thread_num(); }

// Starts the program again with threads that spin briefly at a barrier and then sleep. Spinning for long
// takes the cores from those that work as soon as anything else runs there (measured: 5 to 10 times slower),
// sleeping at once costs a third of a small model's speed; and libgomp decides before main.
static void wait_briefly(char** argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    setenv("GOMP_SPINCOUNT", "5000", 1);        // less than 0.1 ms
    execv("/proc/self/exe", argv);              // where there is no such file: they spin
}
#else
static int thread_count(void) { return 1; }
static int thread_index(void) { return 0; }
static void wait_briefly(char** argv) { (void)argv; }
#endif
#ifdef TESTING
static void set_threads(int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#endif
    (void)count;
}
#endif

// ------------------------------------------------------------------------------------------------
// Matrix product: out[i][j] = (accumulate ? out[i][j] : bias[j] or 0) + sum_k a(i, k) b(k, j). Both factors
// have strides for rows and columns, so that one routine serves every transposition a linear layer needs.

typedef struct { const real* at; size_t row, col; } Matrix;     // element (i, j) is at[i * row + j * col]

static Matrix matrix(const real* at, size_t row, size_t col) {
    Matrix m = {at, row, col};
    return m;
}

#if !defined(__GNUC__) || defined(TESTING)
// The specification, and what compilers without vector types run. bias (N) or NULL.
static void matmul_naive(real* out, size_t stride, Matrix a, Matrix b, int M, int N, int K,
                         const real* bias, bool accumulate) {
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            real sum = accumulate ? out[i * stride + j] : bias ? bias[j] : 0;
            for (int k = 0; k < K; k++) sum += a.at[i * a.row + k * a.col] * b.at[k * b.row + j * b.col];
            out[i * stride + j] = sum;
        }
}
#endif

#ifdef __GNUC__
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, TILE_ROWS = 12 };     // 24 of 32 registers hold the tile
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, TILE_ROWS = 6 };      // 12 of 16
#else
enum { VECTOR_BYTES = 16, TILE_ROWS = 6 };
#endif
#if defined(__CUDACC__)
#define UNROLL                                  // nvcc's front end knows neither
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)))); // + and * are SIMD

enum {
    VECTOR_LEN = VECTOR_BYTES / sizeof(real),
    TILE_VECTORS = 2, TILE_COLS = TILE_VECTORS * VECTOR_LEN,    // a tile of out stays in registers
    PANEL_DEPTH = 2048 / sizeof(real), PANEL_COLS = 384,        // a panel of b stays in the L2 cache
    PANEL_ROWS = 6 * TILE_ROWS,                                 // of a, where it must be copied
};
static_assert(PANEL_COLS % TILE_COLS == 0, "a panel must consist of whole tiles");

// Copies count rows of m into strips dst[count / width][depth][width], zero padded:
// the product reads in order.
INLINE void pack(real* RESTRICT dst, Matrix m, int count, int depth, const int width) {
    if (m.row == 1 && count % width == 0) {             // rows lie side by side: copy width at a time
        for (int k = 0; k < depth; k++)
            for (int p = 0; p < count; p += width)
                memcpy(dst + (size_t)p * depth + (size_t)k * width, m.at + k * m.col + p,
                       width * sizeof(real));
        return;
    }
    for (int p = 0; p < count; p += width, dst += width * depth, m.at += width * m.row) {
        int rows = min_int(width, count - p);
        if (rows < width) memset(dst, 0, sizeof(real) * (size_t)(width * depth));
        for (int k0 = 0; k0 < depth; k0 += 16)          // a transpose, 16 deep at a time to stay in L1
            for (int r = 0; r < rows; r++)
                for (int k = k0; k < min_int(k0 + 16, depth); k++)
                    dst[k * width + r] = m.at[r * m.row + k * m.col];
    }
}

// One row of a tile: out[cols] = start (bias or what is there; NULL: zeros) + sum
INLINE void store_row(real* out, const Vector* sum, const real* start, int cols) {
    if (cols == TILE_COLS)
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            *(Vector*)(out + v * VECTOR_LEN) =
                start ? *(const Vector*)(start + v * VECTOR_LEN) + sum[v] : sum[v];
    else
        for (int j = 0; j < cols; j++) out[j] = (start ? start[j] : 0) + sum[j / VECTOR_LEN][j % VECTOR_LEN];
}

// One tile: out[rows][cols] (+)= a[rows][depth] * b[depth][TILE_COLS]. The sums stay in registers:
// every index into them must be a constant.
INLINE void tile(real* out, size_t stride, Matrix a, const real* b, int depth, int rows, int cols,
                 const real* bias, bool accumulate) {
    Vector sum[TILE_ROWS][TILE_VECTORS], zero = {0};
    UNROLL
    for (int i = 0; i < TILE_ROWS; i++)
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = zero;
    for (int k = 0; k < depth; k++, b += TILE_COLS)
        UNROLL
        for (int i = 0; i < TILE_ROWS; i++)
            UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[i][v] +=
                    a.at[min_int(i, rows - 1) * a.row + k * a.col] * *(const Vector*)(b + v * VECTOR_LEN);
    UNROLL
    for (int i = 0; i < TILE_ROWS; i++)
        if (i < rows) store_row(out + i * stride, sum[i], accumulate ? out + i * stride : bias, cols);
}

// What one task does: out rows i0 .. i1, columns j0 .. j0 + cols. It alone writes them, so that there are no
// locks and the sums are the same for any number of threads.
static void matmul_block(real* out, size_t stride, Matrix a, Matrix b, int i0, int i1, int j0, int cols,
                         int K, const real* bias, bool accumulate) {
    static __thread real a_panel[PANEL_ROWS * PANEL_DEPTH] __attribute__((aligned(64)));
    static __thread real b_panel[PANEL_COLS * PANEL_DEPTH] __attribute__((aligned(64)));
    for (int k0 = 0; k0 < K; k0 += PANEL_DEPTH) {
        int depth = min_int(PANEL_DEPTH, K - k0);
        pack(b_panel, matrix(b.at + k0 * b.row + j0 * b.col, b.col, b.row), cols, depth, TILE_COLS);
        for (int p = i0; p < i1; p += PANEL_ROWS) {
            Matrix panel = matrix(a.at + p * a.row + k0 * a.col, a.row, a.col);
            if (a.col != 1) pack(a_panel, panel, min_int(PANEL_ROWS, i1 - p), depth, TILE_ROWS);
            for (int i = p; i < min_int(p + PANEL_ROWS, i1); i += TILE_ROWS)
                for (int j = 0; j < cols; j += TILE_COLS) {
                    real* o = out + i * stride + j0 + j;
                    const real* strip = b_panel + (size_t)j * depth;
                    const real* start = bias ? bias + j0 + j : NULL;
                    int rows = min_int(TILE_ROWS, i1 - i), width = min_int(TILE_COLS, cols - j);
                    bool add = accumulate || k0 > 0;
                    if (a.col == 1)             // read in place
                        tile(o, stride, matrix(panel.at + (i - p) * a.row, a.row, 1), strip, depth, rows,
                             width, start, add);
                    else
                        tile(o, stride, matrix(a_panel + (i - p) * depth, 1, TILE_ROWS), strip, depth, rows,
                             width, start, add);
                }
        }
    }
}

static int chunks(int count, int size) { return (count + size - 1) / size; }

// out (M, N) with the given row stride. Inside a parallel region it runs on the calling thread.
static void matmul(real* out, size_t stride, Matrix a, Matrix b, int M, int N, int K, const real* bias,
                   bool accumulate) {
    int panels = chunks(N, PANEL_COLS),
        cols = chunks(chunks(N, panels), TILE_COLS) * TILE_COLS; // of one width
    int rows = M;                               // of a task: as many as still give every thread a few tasks
    while (rows > 8 * TILE_ROWS && chunks(M, rows) * panels < 3 * thread_count())
        rows = chunks(rows / 2, TILE_ROWS) * TILE_ROWS;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int j0 = 0; j0 < N; j0 += cols)
        for (int i0 = 0; i0 < M; i0 += rows)
            matmul_block(out, stride, a, b, i0, min_int(i0 + rows, M), j0, min_int(cols, N - j0), K, bias,
                         accumulate);
}
#else
#define matmul matmul_naive
#endif

// ------------------------------------------------------------------------------------------------
// Elementary functions. exp is ours because a loop over libm's does not vectorise.

// exp(x) to 3 ulp; NaN stays NaN. Beyond +-87 it saturates.
INLINE real exp_real(real x) {
    if (sizeof(real) == 8) return (real)exp((double)x);
    float z = (float)x;
    z = z > 87.0f ? 87.0f : z;
    z = z < -87.0f ? -87.0f : z;
    float halves = z * 1.44269504f + (z < 0 ? -0.5f : 0.5f); // exp(x) = 2^power exp(r), |r| <= ln(2) / 2
    int power = halves == halves ? (int)halves : 0;
    float r = z - (float)power * 0.693359375f + (float)power * 2.12194440e-4f;
    float tail = 1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f)));
    float p = 1 + r * (1 + r * (1 / 2.0f + r * tail));
    uint32_t bits = (uint32_t)(power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return (real)(p * scale);
}
INLINE real sigmoid(real a) { return 1 / (1 + exp_real(-a)); }
INLINE real tanh_real(real a) { return 1 - 2 / (1 + exp_real(2 * a)); }     // absolute error 2e-7

// sum_c a_c b_c
INLINE real dot(const real* a, const real* b, int count) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

// sums (cols) += sum over rows of a (rows, cols), times b (rows, cols) where b is given. Each column is
// summed by one thread in the order of the rows: the result does not depend on the number of threads.
static void add_column_sums(real* sums, const real* a, const real* b, int rows, int cols) {
    enum { WIDTH = 64 };
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < cols; c0 += WIDTH) {
        real sum[WIDTH] = {0};
        int width = min_int(WIDTH, cols - c0);
        for (int r = 0; r < rows; r++) {
            const real *ar = a + (size_t)r * cols + c0, *br = b ? b + (size_t)r * cols + c0 : NULL;
            if (br)
#pragma omp simd
                for (int c = 0; c < width; c++) sum[c] += ar[c] * br[c];
            else
#pragma omp simd
                for (int c = 0; c < width; c++) sum[c] += ar[c];
        }
        for (int c = 0; c < width; c++) sums[c0 + c] += sum[c];
    }
}

// ------------------------------------------------------------------------------------------------
// Configuration and parameters. One table drives allocation, initialisation, weight decay,
// files and messages.

enum { MAX_N = 8, MAX_M = MAX_N * MAX_N + 2 * MAX_N, MAX_ITERS = 100, MAX_NAME = 64 };

typedef struct {
    int L, C, NH, T, V;         // blocks, channels, heads, longest context, vocabulary
    int residual;               // RESIDUAL_NONE ..
    int n;                      // streams (1 in none and plain)
    int iters, order, maps;     // Sinkhorn-Knopp; which of the maps pre, post, res are on
    bool is_static;
    double gap;
} Config;

static bool has_streams(int residual) { return residual >= RESIDUAL_HC; }
static bool has_connections(const Config* c) { return has_streams(c->residual); }
static bool per_stream(const Config* c) { return c->residual == RESIDUAL_HC; }

// A token's projection: `groups` vectors of `width` values of its state, each through fn (outs, width);
// M values in all.
static int projection_groups(const Config* c) { return per_stream(c) ? c->n : 1; }
static int projection_width(const Config* c) { return per_stream(c) ? c->C : c->n * c->C; }
static int projection_outs(const Config* c) {
    return per_stream(c) ? c->n + 2 : c->residual == RESIDUAL_MHC ? c->n * c->n + 2 * c->n : 2 * c->n;
}
static int projection_M(const Config* c) {
    return has_connections(c) ? projection_groups(c) * projection_outs(c) : 0;
}
static int coefficient_count(const Config* c) { return has_connections(c) ? c->n * c->n + 2 * c->n : 0; }

typedef enum { DIM_1, DIM_C, DIM_3C, DIM_4C, DIM_V, DIM_T, DIM_OUTS, DIM_WIDTH, DIM_M, DIM_SCALES } Dim;
typedef enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_NORMAL_SCALED, INIT_HC_BASE, INIT_HC_SCALE } Init;

#define TENSOR_TABLE(X)                                                                                 \
    /* id          name                   rows        cols       block  decay  starts as */             \
    X(WTE,         "wte.weight",          DIM_V,      DIM_C,     false, true,  INIT_NORMAL)             \
    X(WPE,         "wpe.weight",          DIM_T,      DIM_C,     false, true,  INIT_NORMAL)             \
    X(ATTN_FN,     "attn_hc.fn",          DIM_OUTS,   DIM_WIDTH, true,  true,  INIT_ZERO)               \
    X(ATTN_BASE,   "attn_hc.base",        DIM_M,      DIM_1,     true,  false, INIT_HC_BASE)            \
    X(ATTN_SCALE,  "attn_hc.scale",       DIM_SCALES, DIM_1,     true,  false, INIT_HC_SCALE)           \
    X(LN_1_W,      "ln_1.weight",         DIM_C,      DIM_1,     true,  false, INIT_ONE)                \
    X(LN_1_B,      "ln_1.bias",           DIM_C,      DIM_1,     true,  false, INIT_ZERO)               \
    X(C_ATTN_W,    "attn.c_attn.weight",  DIM_3C,     DIM_C,     true,  true,  INIT_NORMAL)             \
    X(C_ATTN_B,    "attn.c_attn.bias",    DIM_3C,     DIM_1,     true,  false, INIT_ZERO)               \
    X(ATTN_PROJ_W, "attn.c_proj.weight",  DIM_C,      DIM_C,     true,  true,  INIT_NORMAL_SCALED)      \
    X(ATTN_PROJ_B, "attn.c_proj.bias",    DIM_C,      DIM_1,     true,  false, INIT_ZERO)               \
    X(MLP_FN,      "mlp_hc.fn",           DIM_OUTS,   DIM_WIDTH, true,  true,  INIT_ZERO)               \
    X(MLP_BASE,    "mlp_hc.base",         DIM_M,      DIM_1,     true,  false, INIT_HC_BASE)            \
    X(MLP_SCALE,   "mlp_hc.scale",        DIM_SCALES, DIM_1,     true,  false, INIT_HC_SCALE)           \
    X(LN_2_W,      "ln_2.weight",         DIM_C,      DIM_1,     true,  false, INIT_ONE)                \
    X(LN_2_B,      "ln_2.bias",           DIM_C,      DIM_1,     true,  false, INIT_ZERO)               \
    X(C_FC_W,      "mlp.c_fc.weight",     DIM_4C,     DIM_C,     true,  true,  INIT_NORMAL)             \
    X(C_FC_B,      "mlp.c_fc.bias",       DIM_4C,     DIM_1,     true,  false, INIT_ZERO)               \
    X(MLP_PROJ_W,  "mlp.c_proj.weight",   DIM_C,      DIM_4C,    true,  true,  INIT_NORMAL_SCALED)      \
    X(MLP_PROJ_B,  "mlp.c_proj.bias",     DIM_C,      DIM_1,     true,  false, INIT_ZERO)               \
    X(LN_F_W,      "ln_f.weight",         DIM_C,      DIM_1,     false, false, INIT_ONE)                \
    X(LN_F_B,      "ln_f.bias",           DIM_C,      DIM_1,     false, false, INIT_ZERO)

typedef struct { const char* name; Dim rows, cols; bool per_block, decayed; Init init; } TensorSpec;

#define TENSOR_ID(id, name, rows, cols, block, decay, init) id,
#define TENSOR_ROW(id, name, rows, cols, block, decay, init) {name, rows, cols, block, decay, init},
typedef enum { TENSOR_TABLE(TENSOR_ID) TENSOR_KINDS } TensorId;
static const TensorSpec tensor_specs[TENSOR_KINDS] = {TENSOR_TABLE(TENSOR_ROW)};

static size_t dim_size(const Config* c, Dim dim) {
    size_t C = (size_t)c->C;
    switch (dim) {
        case DIM_1: return 1;
        case DIM_C: return C;
        case DIM_3C: return 3 * C;
        case DIM_4C: return 4 * C;
        case DIM_V: return (size_t)c->V;
        case DIM_T: return (size_t)c->T;
        case DIM_OUTS: return has_connections(c) ? (size_t)projection_outs(c) : 0;
        case DIM_WIDTH: return (size_t)projection_width(c);
        case DIM_M: return (size_t)projection_M(c);
        case DIM_SCALES: return !has_connections(c) ? 0 : c->residual == RESIDUAL_IHC ? 2 : 3;
    }
    return 0;
}

// A part of a model that is computed in one go: sublayers first .. last - 1, and the ends.
typedef struct { int first, last; bool embeds, heads; } Stage;

// One tensor of a model: a row of the table, in one block. In the order of the file.
typedef struct {
    char name[MAX_NAME];
    const TensorSpec* spec;
    int block;                  // -1: not in a block
    size_t rows, cols;
    bool here;                  // held by this rank; without a pipeline all are
    size_t first;               // index of its first number in params and grads
    size_t piece, piece_size;   // its numbers piece .. piece + piece_size are updated by this rank,
    size_t moments;             // and their moments start there
} Tensor;

typedef struct {
    Config c;
    Tensor* tensors;
    int tensor_count;
    int* place;                 // [L] of a block among those held here, -1: it is not
    size_t first[TENSOR_KINDS]; // of the first block here
    size_t block_size, size, moment_size;       // numbers in a block, and of all that is here
    size_t total;                               // parameters of the whole model
    real *params, *grads;       // (size)
    real *adam_m, *adam_v;      // (moment_size)
    real* head_grads; // (V, C): wte's gradient as the head; kept apart from the embedding's until the sum
} Model;

static size_t tensor_size(const Tensor* t) { return t->rows * t->cols; }

static Stage whole_model(const Config* c) {
    Stage whole = {0, 2 * c->L, true, true};
    return whole;
}

static bool stage_holds(const Stage* s, int id, int block) {
    if (block >= 0) return 2 * block >= s->first && 2 * block < s->last;
    return id == WTE ? s->embeds || s->heads : id == WPE ? s->embeds : s->heads;
}

// stages, count: those that are held here
static void model_add_tensor(Model* m, int id, int block, const Stage* stages, int count) {
    const TensorSpec* spec = &tensor_specs[id];
    Tensor t;
    memset(&t, 0, sizeof t);
    t.spec = spec;
    t.block = block;
    t.rows = dim_size(&m->c, spec->rows);
    t.cols = dim_size(&m->c, spec->cols);
    t.piece_size = tensor_size(&t);
    if (!tensor_size(&t)) return;                       // plain models have no connections
    if (block >= 0) snprintf(t.name, sizeof t.name, "h.%d.%s", block, spec->name);
    else snprintf(t.name, sizeof t.name, "%s", spec->name);
    for (int s = 0; s < count; s++) t.here = t.here || stage_holds(&stages[s], id, block);
    t.first = t.moments = m->size;
    if (t.here && (block < 0 || !m->place[block])) m->first[id] = t.first;
    if (t.here) m->size += tensor_size(&t);
    m->total += tensor_size(&t);
    m->tensors[m->tensor_count++] = t;
}

// Lists the tensors of the configuration in the order of the file; those of the stages are here. Allocates no
// numbers. Every number that is here is updated here, until pieces are dealt out.
static void model_layout_stages(Model* m, const Config* c, const Stage* stages, int count) {
    int held = 0;
    memset(m, 0, sizeof *m);
    m->c = *c;
    m->tensors = (Tensor*)allocate((size_t)(TENSOR_KINDS * c->L), sizeof(Tensor));
    m->place = (int*)allocate((size_t)c->L, sizeof(int));
    model_add_tensor(m, WTE, -1, stages, count);
    model_add_tensor(m, WPE, -1, stages, count);
    for (int l = 0; l < c->L; l++) {
        size_t before = m->size;
        bool here = false;
        for (int s = 0; s < count; s++) here = here || stage_holds(&stages[s], LN_1_W, l);
        m->place[l] = here ? held++ : -1;
        for (int id = 0; id < TENSOR_KINDS; id++)
            if (tensor_specs[id].per_block) model_add_tensor(m, id, l, stages, count);
        if (here) m->block_size = m->size - before;
    }
    model_add_tensor(m, LN_F_W, -1, stages, count);
    model_add_tensor(m, LN_F_B, -1, stages, count);
    m->moment_size = m->size;
}

#ifdef TESTING
static void model_layout(Model* m, const Config* c) {
    Stage whole = whole_model(c);
    model_layout_stages(m, c, &whole, 1);
}
#endif

static void model_close(Model* m) {
    free(m->tensors);
    free(m->place);
}

static bool holds_head(const Model* m) { return m->tensors[m->tensor_count - 1].here; }     // beside ln_f

// Where a parameter of block l, which is held here, lies in params or grads.
static real* at(const Model* m, real* numbers, TensorId id, int l) {
    return numbers + m->first[id] + (tensor_specs[id].per_block ? (size_t)m->place[l] * m->block_size : 0);
}
static real* param(const Model* m, TensorId id, int l) { return at(m, m->params, id, l); }
static real* grad(const Model* m, TensorId id, int l) { return at(m, m->grads, id, l); }

// N(0, 1), a function of (seed, index): no state, so that any part of a model can be initialised alone.
static double normal(uint64_t seed, uint64_t index) {
    double u = ((double)(hash64(seed, 2 * index) >> 11) + 0.5) / 9007199254740992.0;
    double v = (double)(hash64(seed, 2 * index + 1) >> 11) / 9007199254740992.0;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static double logit(double p) { return log(p / (1 - p)); }

// The static part of a connection (pre | post | res) at the start: read mostly stream k mod n, so that the
// streams are not alike (alike they would stay so for ever), write 1 to all, mix almost nothing.
static double initial_base(const Config* c, int k, int m) {
    int n = c->n, favourite = k % n, e = m - 2 * n;
    if (per_stream(c)) return m < n ? m == favourite : m < 2 * n ? 1 : e / n == e % n;
    if (m < n) return n == 1 ? 16 : m == favourite ? logit(0.7) : logit(0.3 / (n - 1));  // weights sum to 1
    if (m < 2 * n) return 0;                            // 2 sigmoid(0) = 1
    double rows =
        c->order == ORDER_NONE ? log(exp(c->gap) + n - 1) : 0; // nothing else makes its rows sum to 1
    return (e / n == e % n ? c->gap : 0) - rows;
}

static real initial_value(const Config* c, const Tensor* t, uint64_t seed, size_t index) {
    int k = 2 * t->block + (t->spec == &tensor_specs[MLP_BASE]);
    switch (t->spec->init) {
        case INIT_ZERO: return 0;
        case INIT_ONE: return 1;
        case INIT_NORMAL: return (real)(0.02 * normal(seed, index));
        case INIT_NORMAL_SCALED: return (real)(0.02 / sqrt(2.0 * c->L) * normal(seed, index));
        case INIT_HC_BASE: return (real)initial_base(c, k, (int)index);
        case INIT_HC_SCALE: return (real)0.01;
    }
    return 0;
}

// The seed of a tensor's numbers: its name's, so that models of different
// residual modes share their common weights.
static uint64_t tensor_seed(const Tensor* t, uint64_t seed) {
    for (const char* s = t->name; *s; s++) seed = hash64(seed, (uint64_t)(unsigned char)*s);
    return seed;
}

static void model_initialise_tensor(Model* m, const Tensor* t, uint64_t seed) {
    uint64_t own = tensor_seed(t, seed);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < tensor_size(t); i++) m->params[t->first + i] = initial_value(&m->c, t, own, i);
}

static void model_initialise(Model* m, uint64_t seed) {
    for (int i = 0; i < m->tensor_count; i++)
        if (m->tensors[i].here) model_initialise_tensor(m, &m->tensors[i], seed);
}

// ------------------------------------------------------------------------------------------------
// The layers of GPT-2. Gradients of inputs are written (=), gradients of parameters added (+=).

// out (rows, OC) = in (rows, IC) weight^T + bias, weight (OC, IC), bias (OC)
static void linear_forward(real* out, const real* in, const real* weight, const real* bias, int rows, int IC,
                           int OC) {
    matmul(out, (size_t)OC, matrix(in, (size_t)IC, 1), matrix(weight, 1, (size_t)IC), rows, OC, IC, bias,
           false);
}

// din (rows, IC) = from dout (rows, OC)
static void linear_backward_input(real* din, const real* dout, const real* weight, int rows, int IC, int OC) {
    matmul(din, (size_t)IC, matrix(dout, (size_t)OC, 1), matrix(weight, (size_t)IC, 1), rows, IC, OC, NULL,
           false);
}

// dweight (OC, IC) +=, dbias (OC) += from dout (rows, OC)
static void linear_backward_weight(real* dweight, real* dbias, const real* dout, const real* in, int rows,
                                   int IC, int OC) {
    matmul(dweight, (size_t)IC, matrix(dout, 1, (size_t)OC), matrix(in, (size_t)IC, 1), OC, IC, rows, NULL,
           true);
    add_column_sums(dbias, dout, NULL, rows, OC);
}

// One token: out (C) = (u - mean) rstd weight + bias; stats = {mean, rstd}
static void layernorm_forward(real* RESTRICT out, real* stats, const real* RESTRICT u,
                              const real* RESTRICT weight, const real* RESTRICT bias, int C) {
    real mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int c = 0; c < C; c++) mean += u[c];
    mean /= (real)C;
#pragma omp simd reduction(+ : variance)
    for (int c = 0; c < C; c++) variance += (u[c] - mean) * (u[c] - mean);
    real rstd = 1 / (real)sqrt((double)(variance / (real)C + (real)1e-5));
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = (u[c] - mean) * rstd * weight[c] + bias[c];
    stats[0] = mean;
    stats[1] = rstd;
}

// One token: du (C) = from dout (C); and xhat (C), the normalised input, which dweight needs
static void layernorm_backward(real* RESTRICT du, real* RESTRICT xhat, const real* RESTRICT dout,
                               const real* stats, const real* RESTRICT u, const real* RESTRICT weight,
                               int C) {
    real mean = stats[0], rstd = stats[1], sum = 0, dot_xhat = 0;
#pragma omp simd reduction(+ : sum, dot_xhat)
    for (int c = 0; c < C; c++) {
        xhat[c] = (u[c] - mean) * rstd;
        sum += weight[c] * dout[c];
        dot_xhat += weight[c] * dout[c] * xhat[c];
    }
    sum /= (real)C;
    dot_xhat /= (real)C;
#pragma omp simd
    for (int c = 0; c < C; c++) du[c] = (weight[c] * dout[c] - sum - xhat[c] * dot_xhat) * rstd;
}

// tanh approximation of GELU: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
static void gelu_forward(real* RESTRICT out, const real* RESTRICT in, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        real x = in[i], s = (real)0.7978845608028654 * (x + (real)0.044715 * x * x * x);
        out[i] = (real)0.5 * x * (1 + tanh_real(s));
    }
}

// d (count) holds the gradient of the output and gets that of the input
static void gelu_backward(real* RESTRICT d, const real* RESTRICT in, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
        real x = in[i], s = (real)0.7978845608028654 * (x + (real)0.044715 * x * x * x), t = tanh_real(s);
        real ds = (real)0.7978845608028654 * (1 + (real)0.134145 * x * x);
        d[i] *= (real)0.5 * (1 + t) + (real)0.5 * x * (1 - t * t) * ds;
    }
}

// --- causal attention, a block of queries at a time: the T x T scores never exist at once

enum { QUERY_ROWS = 64 };

// Scratch of one thread: scores of a block of queries, and their gradients.
static size_t attention_scratch_size(int T) { return (size_t)2 * QUERY_ROWS * (size_t)T; }

// The queries t0 .. t0 + count of one head; a key may be seen by its own and later queries.
typedef struct { const real *q, *k, *v; size_t stride; int T, t0, count, head_size; } Head;

// p (count, keys) = q k^T, rows T apart, not yet scaled; the future is in it too
static void attention_scores(real* p, const Head* h, int keys) {
    matmul(p, (size_t)h->T, matrix(h->q + (size_t)h->t0 * h->stride, h->stride, 1),
           matrix(h->k, 1, h->stride), h->count, keys, h->head_size, NULL, false);
}

// Turns scores (T of them reserved) of the query at position t into probabilities; returns their log sum exp.
static real softmax_causal(real* RESTRICT row, int t, int keys, real scale) {
    real max = row[0], sum = 0;
#pragma omp simd reduction(max : max)
    for (int j = 1; j <= t; j++) max = row[j] > max ? row[j] : max;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j <= t; j++) sum += row[j] = exp_real(scale * (row[j] - max));
    real inverse = 1 / sum;
#pragma omp simd
    for (int j = 0; j <= t; j++) row[j] *= inverse;
    for (int j = t + 1; j < keys; j++) row[j] = 0;      // the future
    return scale * max + (real)log((double)sum);
}

static Head attention_head(const real* qkv, int T, int t0, int count, int C, int NH, int b, int h) {
    const real* q = qkv + (size_t)b * T * 3 * C + (size_t)h * (C / NH);
    Head head = {q, q + C, q + 2 * C, (size_t)3 * C, T, t0, count, C / NH};
    return head;
}

// out (B, T, C), lse (B, NH, T) from qkv (B, T, 3C),
// for positions from t0 on (earlier ones are there already)
static void attention_forward(real* out, real* lse, const real* qkv, real* scratch, int B, int T, int t0,
                              int C, int NH) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++) {
            real* p = scratch + attention_scratch_size(T) * (size_t)thread_index();
            real scale = 1 / (real)sqrt((double)(C / NH));
            for (int t = t0; t < T; t += QUERY_ROWS) {
                Head head = attention_head(qkv, T, t, min_int(QUERY_ROWS, T - t), C, NH, b, h);
                int keys = t + head.count;
                attention_scores(p, &head, keys);
                for (int i = 0; i < head.count; i++)
                    lse[(size_t)(b * NH + h) * T + t + i] =
                        softmax_causal(p + (size_t)i * T, t + i, keys, scale);
                matmul(out + ((size_t)b * T + t) * C + (size_t)h * head.head_size, (size_t)C,
                       matrix(p, (size_t)T, 1), matrix(head.v, head.stride, 1), head.count, head.head_size,
                       keys, NULL, false);
            }
        }
}

// One query's row: p from scores and lse, and ds = p (dp - sum_j p_j dp_j) scale, where the sum is dout . out
static void attention_row_backward(real* RESTRICT p, real* RESTRICT ds, int t, int keys, real lse, real delta,
                                   real scale) {
#pragma omp simd
    for (int j = 0; j <= t; j++) {
        p[j] = exp_real(scale * p[j] - lse);
        ds[j] = p[j] * (ds[j] - delta) * scale;
    }
    for (int j = t + 1; j < keys; j++) p[j] = ds[j] = 0;
}

// dqkv (B, T, 3C) = from dout (B, T, C). Query blocks go from last to first: the last sees every key,
// so it writes dk and dv, and the others add.
static void attention_backward(real* dqkv, const real* dout, const real* out, const real* lse,
                               const real* qkv, real* scratch, int B, int T, int C, int NH) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++) {
            real *p = scratch + attention_scratch_size(T) * (size_t)thread_index(),
                 *ds = p + (size_t)QUERY_ROWS * T;
            real scale = 1 / (real)sqrt((double)(C / NH));
            for (int t = (T - 1) / QUERY_ROWS * QUERY_ROWS; t >= 0; t -= QUERY_ROWS) {
                Head head = attention_head(qkv, T, t, min_int(QUERY_ROWS, T - t), C, NH, b, h);
                int keys = t + head.count, size = head.head_size;
                size_t at_t = ((size_t)b * T + t) * C + (size_t)h * size, stride = head.stride,
                       T_ = (size_t)T;
                real* dq = dqkv + (head.q - qkv);
                attention_scores(p, &head, keys);
                matmul(ds, T_, matrix(dout + at_t, (size_t)C, 1), matrix(head.v, 1, stride), head.count, keys,
                       size, NULL, false);
                for (int i = 0; i < head.count; i++) {
                    real delta = dot(dout + at_t + (size_t)i * C, out + at_t + (size_t)i * C, size);
                    attention_row_backward(p + i * T_, ds + i * T_, t + i, keys,
                                           lse[(size_t)(b * NH + h) * T + t + i], delta, scale);
                }
                matmul(dq + (size_t)t * stride, stride, matrix(ds, T_, 1), matrix(head.k, stride, 1),
                       head.count, size, keys, NULL, false);
                matmul(dq + C, stride, matrix(ds, 1, T_), matrix(head.q + (size_t)t * stride, stride, 1),
                       keys, size, head.count, NULL, keys < T);
                matmul(dq + 2 * C, stride, matrix(p, 1, T_), matrix(dout + at_t, (size_t)C, 1), keys, size,
                       head.count, NULL, keys < T);
            }
        }
}

// ------------------------------------------------------------------------------------------------
// Sinkhorn-Knopp (mHC Eq. 9): alternate divisions by column and row sums make exp(a) doubly stochastic. Rows
// come last, so that a row of R sums to 1 to rounding: the forward gain of any depth is 1.
// LANES tokens at a time, one a lane.

enum { LANES = 64 / sizeof(real) };
typedef real Lane[LANES];

// Whether division t of the run is by row sums; and how many there are.
static bool divides_rows(int order, int t) {
    return order == ORDER_R || (order == ORDER_CR && t % 2) || (order == ORDER_RC && t % 2 == 0);
}
static int division_count(const Config* c) {
    return c->order == ORDER_NONE                         ? 0
           : c->order == ORDER_CR || c->order == ORDER_RC ? 2 * c->iters
                                                          : c->iters;
}

// R (n, n) = exp(R - max): the largest of what is divided first cancels there. R[out][in].
INLINE void sinkhorn_exp(Lane* R, const Config* c, const int n) {
    bool rows = divides_rows(c->order, 0);
    int line = rows ? n : 1, step = rows ? 1 : n;
    for (int k = 0; k < n; k++) {
        Lane max;
        memcpy(max, R[k * line], sizeof max);
        for (int e = 1; e < n; e++)
#pragma omp simd
            for (int l = 0; l < LANES; l++)
                max[l] = R[k * line + e * step][l] > max[l] ? R[k * line + e * step][l] : max[l];
        if (c->order == ORDER_NONE) memset(max, 0, sizeof max);
        for (int e = 0; e < n; e++)
#pragma omp simd
            for (int l = 0; l < LANES; l++)
                R[k * line + e * step][l] = exp_real(R[k * line + e * step][l] - max[l]);
    }
}

// In: logits. Out: R; and sums (divisions, n), what was divided by, for the way back (or NULL).
INLINE void sinkhorn_forward(Lane* R, Lane* sums, const Config* c, const int n) {
    int divisions = division_count(c);
    sinkhorn_exp(R, c, n);
    for (int t = 0; t < divisions; t++) {
        bool rows = divides_rows(c->order, t);
        int line = rows ? n : 1, step = rows ? 1 : n;
        for (int k = 0; k < n; k++) {
            Lane sum, inverse;
#pragma omp simd
            for (int l = 0; l < LANES; l++) sum[l] = (real)1e-12;
            for (int e = 0; e < n; e++)
#pragma omp simd
                for (int l = 0; l < LANES; l++) sum[l] += R[k * line + e * step][l];
#pragma omp simd
            for (int l = 0; l < LANES; l++) inverse[l] = 1 / sum[l];
            for (int e = 0; e < n; e++)
#pragma omp simd
                for (int l = 0; l < LANES; l++) R[k * line + e * step][l] *= inverse[l];
            if (sums) memcpy(sums[t * n + k], sum, sizeof sum);
        }
    }
}

// In: d (n, n), the gradient of R. Out: that of the logits. y = x / sum(x) gives dx = (dy - sum(dy * y)) /
// sum(x), and x = y * sum(x): so the iterates are rebuilt on the way back. R becomes exp(logits). Not the
// implicit gradient: that is wrong before convergence.
INLINE void sinkhorn_backward(Lane* d, Lane* R, Lane* sums, const Config* c, const int n) {
    for (int t = division_count(c) - 1; t >= 0; t--) {
        bool rows = divides_rows(c->order, t);
        int line = rows ? n : 1, step = rows ? 1 : n;
        for (int k = 0; k < n; k++) {
            const real* sum = sums[t * n + k];
            Lane along, inverse;
#pragma omp simd
            for (int l = 0; l < LANES; l++) along[l] = 0;
            for (int e = 0; e < n; e++)
#pragma omp simd
                for (int l = 0; l < LANES; l++)
                    along[l] += d[k * line + e * step][l] * R[k * line + e * step][l];
#pragma omp simd
            for (int l = 0; l < LANES; l++) inverse[l] = 1 / sum[l];
            for (int e = 0; e < n; e++)
#pragma omp simd
                for (int l = 0; l < LANES; l++) {
                    d[k * line + e * step][l] = (d[k * line + e * step][l] - along[l]) * inverse[l];
                    R[k * line + e * step][l] *= sum[l];
                }
        }
    }
    for (int e = 0; e < n * n; e++)
#pragma omp simd
        for (int l = 0; l < LANES; l++) d[e][l] *= R[e][l];     // through exp
}

// Calls f(n) with n constant, so that its loops over streams are unrolled.
#define WITH_CONSTANT_N(n, f)                                                                                \
    switch (n) {                                                                                             \
        case 1: f(1); break;                                                                                 \
        case 2: f(2); break;                                                                                 \
        case 3: f(3); break;                                                                                 \
        case 4: f(4); break;                                                                                 \
        case 5: f(5); break;                                                                                 \
        case 6: f(6); break;                                                                                 \
        case 7: f(7); break;                                                                                 \
        case 8: f(8); break;                                                                                 \
        default: assert(!"n must be 1 .. 8");                                                                \
    }

// ------------------------------------------------------------------------------------------------
// Coefficients (mHC Eq. 7, 8; HC Eq. 5): how a sublayer reads the streams, writes them and mixes them, from
// the token's state. A token has coef = pre (n) | post (n) | res (n, n)[out][in],
// and mix (M) = fn x / rms(x).

typedef struct { const real *fn, *base, *scale; } Connection;
typedef struct { real *fn, *base, *scale; } ConnectionGrads;

static int map_of(int m, int n) { return m < n ? 0 : m < 2 * n ? 1 : 2; } // pre, post, res: index into scale
static bool map_on(const Config* c, int map) { return c->maps >> map & 1; }

// The stream whose own state gives coefficient m in hc: column j of R comes from stream j.
// Elsewhere all give all.
static int source_of(const Config* c, int m) {
    return !per_stream(c) ? 0 : m < 2 * c->n ? m % c->n : (m - 2 * c->n) % c->n;
}

// Where coefficient m lies in a token's mix.
static int place_of(const Config* c, int m) {
    if (!per_stream(c)) return m;
    return source_of(c, m) * (c->n + 2) + (m < 2 * c->n ? m / c->n : 2 + (m - 2 * c->n) / c->n);
}

// What scale multiplies (tanh in hc), and its derivative by mix.
static real gate(const Config* c, real mix) { return per_stream(c) ? (real)tanh((double)mix) : mix; }
static real gate_slope(const Config* c, real value) { return per_stream(c) ? 1 - value * value : 1; }

// a (M) of tokens <= LANES, from mix (tokens, M). Idle lanes repeat the last token.
static void coefficient_logits(Lane* a, const Config* c, const real* mix, Connection p, int tokens) {
    int M = projection_M(c);
    for (int m = 0; m < M; m++) {
        int place = place_of(c, m);
        real scale = c->is_static ? 0 : p.scale[map_of(m, c->n)];
        for (int l = 0; l < LANES; l++)
            a[m][l] = scale * gate(c, mix[min_int(l, tokens - 1) * M + place]) + p.base[m];
    }
}

static void sinkhorn_lanes(Lane* R, Lane* sums, const Config* c) {
#define SINKHORN(n) sinkhorn_forward(R, sums, c, n)
    WITH_CONSTANT_N(c->n, SINKHORN)
#undef SINKHORN
}

static void sinkhorn_backward_lanes(Lane* d, Lane* R, Lane* sums, const Config* c) {
#define SINKHORN(n) sinkhorn_backward(d, R, sums, c, n)
    WITH_CONSTANT_N(c->n, SINKHORN)
#undef SINKHORN
}

// The value that a map has when it is off: read 1/n, write 1, mix I.
static real neutral(int m, int n) {
    return m < n ? 1 / (real)n : m < 2 * n ? 1 : (m - 2 * n) / n == (m - 2 * n) % n;
}

// coef (tokens, n*n + 2n) from mix (tokens, M), tokens <= LANES
static void coefficients_forward(real* coef, const Config* c, const real* mix, Connection p, int tokens) {
    Lane a[MAX_M];
    int n = c->n, count = coefficient_count(c), M = projection_M(c);
    coefficient_logits(a, c, mix, p, tokens);
    if (!per_stream(c)) {
        for (int m = 0; m < 2 * n; m++)
#pragma omp simd
            for (int l = 0; l < LANES; l++)
                a[m][l] = (real)(m < n ? 1 : 2) * sigmoid(a[m][l]); // write 1 at the start
        if (c->residual == RESIDUAL_MHC && map_on(c, 2)) sinkhorn_lanes(a + 2 * n, NULL, c);
    }
    for (int m = 0; m < count; m++) {
        bool on = m < M && map_on(c, map_of(m, n));
        for (int l = 0; l < tokens; l++) coef[l * count + m] = on ? a[m][l] : neutral(m, n);
    }
}

// In: d (n*n + 2n), the gradients of coef. Out: those of a, before sigmoid and Sinkhorn.
// Zero for a map that is off.
static void coefficient_logits_backward(Lane* d, const Config* c, const real* coef, const real* mix,
                                        Connection p, int tokens) {
    static __thread Lane a[MAX_M], sums[2 * MAX_ITERS * MAX_N];
    int n = c->n, count = coefficient_count(c);
    for (int m = 0; m < 2 * n; m++) {
        real top = m < n ? 1 : 2;                               // y = top sigmoid(a): dy/da = y (1 - y / top)
        for (int l = 0; l < tokens; l++) {
            real y = coef[l * count + m];
            d[m][l] *= !map_on(c, map_of(m, n)) ? 0 : per_stream(c) ? 1 : y * (1 - y / top);
        }
    }
    if (c->residual == RESIDUAL_MHC && map_on(c, 2)) {
        coefficient_logits(a, c, mix, p, tokens);
        sinkhorn_lanes(a + 2 * n, sums, c);
        sinkhorn_backward_lanes(d + 2 * n, a + 2 * n, sums, c);
    } else if (!map_on(c, 2))
        memset(d + 2 * n, 0, sizeof(Lane) * (size_t)(n * n));
}

// Buffers of a connection's backward pass, all (rows, ..)
typedef struct {
    real* coef;                 // (n*n + 2n) gradients of coef
    real* base;                 // (M) of base
    real* scale;                // (M) of scale, one term per coefficient
    real* z;                    // (M) of the projection fn x
    real* shrink;               // (groups) what the way through rms(x) takes from dx, per unit of x
} CoefficientGrads;

// base, scale, z and shrink of g from g.coef, tokens <= LANES; all pointers at the first of these tokens
static void coefficients_backward(CoefficientGrads g, const Config* c, const real* coef, const real* mix,
                                  const real* rnorm, Connection p, int tokens) {
    Lane d[MAX_M];
    int n = c->n, count = coefficient_count(c), M = projection_M(c), groups = projection_groups(c);
    memset(d, 0, sizeof d);
    for (int m = 0; m < count; m++)
        for (int l = 0; l < tokens; l++) d[m][l] = g.coef[l * count + m];
    coefficient_logits_backward(d, c, coef, mix, p, tokens);
    memset(g.shrink, 0, sizeof(real) * (size_t)(tokens * groups));
    for (int m = 0; m < M; m++) {
        int place = place_of(c, m), group = source_of(c, m);
        real scale = p.scale[map_of(m, n)];
        for (int l = 0; l < tokens; l++) {
            real x = c->is_static ? 0 : mix[l * M + place], y = gate(c, x);
            real dmix = c->is_static ? 0 : scale * d[m][l] * gate_slope(c, y);
            g.base[l * M + m] = d[m][l];
            g.scale[l * M + m] = d[m][l] * y;
            g.z[l * M + place] = dmix * rnorm[l * groups + group];
            g.shrink[l * groups + group] += dmix * x;
        }
    }
    for (int e = 0; e < tokens * groups; e++)                   // d rms(x): the term that is easily forgotten
        g.shrink[e] *= rnorm[e] * rnorm[e] / (real)projection_width(c);
}

// ------------------------------------------------------------------------------------------------
// Read and write (mHC Eq. 3):  u = pre x,  y = res x + post f.  One token each.

// u (C) from x (n, C)
INLINE void read_forward(real* RESTRICT u, const real* RESTRICT x, const real* RESTRICT pre, int C,
                         const int n) {
#pragma omp simd
    for (int ch = 0; ch < C; ch++) {
        real sum = 0;
        for (int i = 0; i < n; i++) sum += pre[i] * x[i * C + ch];
        u[ch] = sum;
    }
}

// y (n, C) from x (n, C), f (C)
INLINE void write_forward(real* RESTRICT y, const real* RESTRICT x, const real* RESTRICT f,
                          const real* RESTRICT coef, int C, const int n) {
    const real *post = coef + n, *res = coef + 2 * n;
#pragma omp simd
    for (int ch = 0; ch < C; ch++)
        for (int i = 0; i < n; i++) {
            real sum = post[i] * f[ch];
            for (int j = 0; j < n; j++) sum += res[i * n + j] * x[j * C + ch];
            y[i * C + ch] = sum;
        }
}

// In: dy (n, C) in d. Out: dx (n, C) in d, without the read's part; df (C), which may be f itself;
// dpost and dres in dcoef
INLINE void write_backward(real* RESTRICT d, real* df, real* RESTRICT dcoef, const real* RESTRICT x,
                           const real* f, const real* RESTRICT coef, int C, const int n) {
    const real *post = coef + n, *res = coef + 2 * n;
    for (int i = 0; i < n; i++) {
        dcoef[n + i] = dot(d + i * C, f, C);
        for (int j = 0; j < n; j++) dcoef[2 * n + i * n + j] = dot(d + i * C, x + j * C, C);
    }
#pragma omp simd
    for (int ch = 0; ch < C; ch++) {
        real sum = 0, dx[MAX_N];
        for (int i = 0; i < n; i++) sum += post[i] * d[i * C + ch];
        for (int j = 0; j < n; j++) {
            dx[j] = 0;
            for (int i = 0; i < n; i++) dx[j] += res[i * n + j] * d[i * C + ch];
        }
        df[ch] = sum;
        for (int j = 0; j < n; j++) d[j * C + ch] = dx[j];
    }
}

// dx (n, C) += pre du - shrink x: the read, and the projection's division by rms(x).
// shrink (n), one for each stream
INLINE void read_backward(real* RESTRICT dx, const real* RESTRICT du, const real* RESTRICT x,
                          const real* RESTRICT pre, const real* RESTRICT shrink, int C, const int n) {
#pragma omp simd
    for (int ch = 0; ch < C; ch++)
        for (int i = 0; i < n; i++) dx[i * C + ch] += pre[i] * du[ch] - shrink[i] * x[i * C + ch];
}

// ------------------------------------------------------------------------------------------------
// Activations. One function lays them out; called without memory it only counts, which is the memory plan.

static real* carve(Arena* arena, const char* what, size_t count) {
    return (real*)plan_carve(arena, what, count, sizeof(real));
}

typedef struct {                // of one sublayer, rows = B * T
    real *coef, *mix, *rnorm;   // (rows, n*n + 2n), (rows, M), (rows, groups)
    real *u, *stats, *ln, *f; // (rows, C) what is read, (rows, 2), (rows, C) F's input, (rows, C) F's output
    real *qkv, *lse, *attn;     // attention: (rows, 3C), (B, NH, T), (rows, C)
    real *fc, *gelu;            // MLP: (rows, 4C) before and after GELU
} Sublayer;

typedef struct {                // of streams, means over tokens
    double cosine, rank, share[MAX_N];  // between streams; effective rank; of the squared norm
} StreamStats;

// Of one micro-batch in one stage. Several micro-batches may be under way: the second half is the scratch of
// one computation, which they share.
typedef struct Activations {
    int B, T, block;            // at most; sublayers per block of recomputation
    Stage stage;
    Sublayer* sub;              // [2L], those of the stage
    real** state;               // [2L + 1] (rows, n, C): of the stage; kept at the start of a block
    real *mean, *stats, *ln;    // (rows, C) mean of the last state's streams, (rows, 2), (rows, C)
    real *losses;               // (rows)
    int32_t *tokens, *targets;  // (rows), where the stage has an end of the model and training needs them
    struct Activations* shared; // whose scratch this is; it knows whose states lie between blocks' starts:
    const struct Activations* resident;
    real** between;             // [block] (rows, n, C): states inside a block of recomputation
    real *logits, *scratch;     // (head_rows, V); attention's
    int head_rows;
    real *dstate, *dln, *dwide, *du, *xhat;     // (rows, n, C), (rows, C), (rows, 4C), 2 x (rows, C)
    CoefficientGrads g;
    StreamStats* streams;       // [2L + 1], filled by the forward pass if not NULL
    void (*progress)(void*);    // called between sublayers, if not NULL
    void* progress_of;
} Activations;

static void activations_open(Activations* a, const Config* c) {
    memset(a, 0, sizeof *a);
    a->shared = a;
    a->stage = whole_model(c);
    a->sub = (Sublayer*)allocate((size_t)(2 * c->L), sizeof(Sublayer));
    a->state = (real**)allocate((size_t)(2 * c->L + 1), sizeof(real*));
    a->between = (real**)allocate((size_t)(2 * c->L + 1), sizeof(real*));
}

static void activations_close(Activations* a) {
    free(a->sub);
    free((void*)a->state);
    if (a->shared == a) free((void*)a->between);
}

// Blocks of recomputation that store least (mHC Eq. 20), L in sublayers
static int automatic_block(const Config* c) {
    int block = (int)lrint(sqrt((double)c->n * (2.0 * c->L) / (c->n + 2)));
    return block < 1 ? 1 : block;
}

static void layout_sublayer(const Activations* a, Arena* arena, const Config* c, int k, bool training) {
    size_t C = (size_t)c->C, T = (size_t)a->T, rows = (size_t)a->B * T;
    Sublayer* s = a->sub + k;
    s->coef = carve(arena, "coefficients", rows * (size_t)coefficient_count(c));
    if (k % 2 == 0) s->qkv = carve(arena, "activations", rows * 3 * C);
    if (k >= a->stage.first + 2 &&
        !training) { // without a backward pass only keys and values are wanted again
        Sublayer shared = s[-2];
        shared.coef = s->coef;
        shared.qkv = s->qkv;
        *s = shared;
        return;
    }
    s->mix = carve(arena, "coefficients", rows * (size_t)projection_M(c));
    s->rnorm = carve(arena, "coefficients", has_connections(c) ? rows * (size_t)projection_groups(c) : 0);
    s->u = has_connections(c) ? carve(arena, "activations", rows * C) : NULL;    // elsewhere the state itself
    s->stats = carve(arena, "activations", rows * 2);
    s->ln = carve(arena, "activations", rows * C);
    s->f = carve(arena, "activations", rows * C);
    if (k % 2 == 0) {
        s->lse = carve(arena, "activations", rows / T * T * (size_t)c->NH);
        s->attn = carve(arena, "activations", rows * C);
    } else {
        s->fc = carve(arena, "activations", rows * 4 * C);
        s->gelu = carve(arena, "activations", rows * 4 * C);
    }
}

// Those at an end of the stage that is not an end of the model come and go with messages. Without a backward
// pass two states take turns.
static void layout_states(Activations* a, Arena* arena, const Config* c, bool training) {
    size_t size = (size_t)a->B * (size_t)a->T * (size_t)(c->n * c->C);
    const Stage* stage = &a->stage;
    for (int k = stage->first; k <= stage->last; k++) {
        int j = k - stage->first;
        bool wired = (k == stage->first && !stage->embeds) || (k == stage->last && !stage->heads);
        if (wired) continue;
        if (training && j % a->block) a->state[k] = a->between[j % a->block];
        else if (!training && j > 2) a->state[k] = a->state[k - 2];
        else a->state[k] = carve(arena, "streams", size);
    }
}

// What a micro-batch keeps, after the scratch has been laid out.
static void activations_layout_slot(Activations* a, Arena* arena, const Config* c, bool training) {
    size_t rows = (size_t)a->B * (size_t)a->T, C = (size_t)c->C;
    bool ends = a->stage.embeds || a->stage.heads;
    layout_states(a, arena, c, training);
    for (int k = a->stage.first; k < a->stage.last; k++) layout_sublayer(a, arena, c, k, training);
    if (ends && training) {
        a->tokens = (int32_t*)plan_carve(arena, "data", rows, sizeof(int32_t));
        a->targets = (int32_t*)plan_carve(arena, "data", rows, sizeof(int32_t));
    }
    if (!a->stage.heads) return;
    a->mean = carve(arena, "activations", rows * C);
    a->stats = carve(arena, "activations", rows * 2);
    a->ln = carve(arena, "activations", rows * C);
    a->losses = carve(arena, "activations", rows);
}

static void layout_backward_scratch(Activations* a, Arena* arena, const Config* c) {
    size_t rows = (size_t)a->B * (size_t)a->T, C = (size_t)c->C, M = (size_t)projection_M(c);
    for (int j = 1; j < a->block; j++) a->between[j] = carve(arena, "streams", rows * (size_t)c->n * C);
    if (a->stage.embeds && a->stage.heads) a->dstate = carve(arena, "backward", rows * (size_t)c->n * C);
    a->dwide = carve(arena, "backward", rows * 4 * C);
    a->dln = carve(arena, "backward", rows * C);
    a->du = carve(arena, "backward", rows * C);
    a->xhat = carve(arena, "backward", rows * C);
    if (!has_connections(c)) return;
    a->g.coef = carve(arena, "backward", rows * (size_t)coefficient_count(c));
    a->g.base = carve(arena, "backward", rows * M);
    a->g.scale = carve(arena, "backward", rows * M);
    a->g.z = carve(arena, "backward", rows * M);
    a->g.shrink = carve(arena, "backward", rows * (size_t)projection_groups(c));
}

// The scratch of computations on B sequences of T tokens, in blocks of recomputation of `block` sublayers.
static void activations_layout_scratch(Activations* a, Arena* arena, const Config* c, int B, int T, int block,
                                       bool training) {
    size_t rows = (size_t)B * (size_t)T;
    enum { LOGITS_BYTES = 32 << 20 }; // rows of logits that exist at once: enough to fill the product
    size_t chunk = LOGITS_BYTES / sizeof(real) / (size_t)c->V;
    a->B = B;
    a->T = T;
    a->block = block;
    a->head_rows = (int)(chunk < 64 ? 64 : chunk);
    if ((size_t)a->head_rows > rows) a->head_rows = (int)rows;
    a->logits = carve(arena, "logits", a->stage.heads ? (size_t)a->head_rows * (size_t)c->V : 0);
    a->scratch = carve(arena, "attention scores", attention_scratch_size(T) * (size_t)thread_count());
    if (training) layout_backward_scratch(a, arena, c);
}

// Everything that a step needs where one micro-batch is under way at a time, after activations_open.
static void activations_layout(Activations* a, Arena* arena, const Config* c, int B, int T, int block,
                               bool training) {
    activations_layout_scratch(a, arena, c, B, T, block, training);
    activations_layout_slot(a, arena, c, training);
}

// Parameters and what the optimiser keeps beside them. Only params without training.
static void model_memory(Model* m, Arena* arena, bool training) {
    m->params = carve(arena, "parameters", m->size);
    if (!training) return;
    m->grads = carve(arena, "gradients", m->size);
    m->head_grads = carve(arena, "gradients", holds_head(m) ? (size_t)m->c.V * (size_t)m->c.C : 0);
    m->adam_m = carve(arena, "AdamW moments", m->moment_size);
    m->adam_v = carve(arena, "AdamW moments", m->moment_size);
}

// ------------------------------------------------------------------------------------------------
// Sublayers: connection, F, connection. row0 is the first row that is computed: rows before it are there
// already (only when text is generated, one sequence).

typedef struct { int B, T, row0, rows; } Span;      // rows = B * T - row0

static const real* row_of(const real* base, int row, int width) { return base + (size_t)row * width; }

static Connection connection_of(const Model* m, int k) {
    Connection p = {param(m, k % 2 ? MLP_FN : ATTN_FN, k / 2), param(m, k % 2 ? MLP_BASE : ATTN_BASE, k / 2),
                    param(m, k % 2 ? MLP_SCALE : ATTN_SCALE, k / 2)};
    return p;
}

static ConnectionGrads connection_grads(const Model* m, int k) {
    ConnectionGrads g = {grad(m, k % 2 ? MLP_FN : ATTN_FN, k / 2),
                         grad(m, k % 2 ? MLP_BASE : ATTN_BASE, k / 2),
                         grad(m, k % 2 ? MLP_SCALE : ATTN_SCALE, k / 2)};
    return g;
}

// mix (rows, M) = fn x, not yet divided by rms(x): that is the same afterwards, and cheaper
static void project(const Config* c, real* mix, const real* x, const real* fn, int rows) {
    int groups = projection_groups(c), width = projection_width(c), outs = projection_outs(c);
    matmul(mix, (size_t)outs, matrix(x, (size_t)width, 1), matrix(fn, 1, (size_t)width), rows * groups, outs,
           width, NULL, false);
}

// mix /= rms(x) for tokens <= LANES, and rnorm = 1 / rms(x)
static void divide_by_norm(const Config* c, real* mix, real* rnorm, const real* x, int tokens) {
    int groups = projection_groups(c), width = projection_width(c), outs = projection_outs(c);
    for (int e = 0; e < tokens * groups; e++) {
        const real* xe = row_of(x, e, width);
        rnorm[e] = 1 / (real)sqrt((double)(dot(xe, xe, width) / (real)width + (real)1e-6));
        for (int o = 0; o < outs; o++) mix[e * outs + o] *= rnorm[e];
    }
}

static void read_tokens(real* u, const Config* c, const real* x, const real* coef, int tokens) {
    int n = c->n, C = c->C, count = coefficient_count(c);
    for (int t = 0; t < tokens; t++) {
#define READ(n) read_forward(u + (size_t)t * C, row_of(x, t, n * C), row_of(coef, t, count), C, n)
        WITH_CONSTANT_N(n, READ)
#undef READ
    }
}

// s->ln from the state x: coefficients, read, LayerNorm, LANES tokens at a time while they are in the cache
static void connection_forward(const Model* m, Sublayer* s, const real* x, int k, Span span) {
    const Config* c = &m->c;
    Connection p = {NULL, NULL, NULL};
    const real *weight = param(m, k % 2 ? LN_2_W : LN_1_W, k / 2),
               *bias = param(m, k % 2 ? LN_2_B : LN_1_B, k / 2);
    int C = c->C, M = projection_M(c), groups = projection_groups(c), last = span.row0 + span.rows;
    if (has_connections(c)) {
        p = connection_of(m, k);
        if (!c->is_static)
            project(c, s->mix + (size_t)span.row0 * M, row_of(x, span.row0, c->n * C), p.fn, span.rows);
    }
#pragma omp parallel for schedule(static)
    for (int r = span.row0; r < last; r += LANES) {
        int tokens = min_int(LANES, last - r);
        const real *xr = row_of(x, r, c->n * C), *u = xr;
        if (has_connections(c)) {
            real *mix = s->mix + (size_t)r * M, *coef = s->coef + (size_t)r * coefficient_count(c);
            if (!c->is_static) divide_by_norm(c, mix, s->rnorm + (size_t)r * groups, xr, tokens);
            coefficients_forward(coef, c, mix, p, tokens);
            read_tokens(s->u + (size_t)r * C, c, xr, coef, tokens);
            u = row_of(s->u, r, C);
        }
        for (int t = 0; t < tokens; t++)
            layernorm_forward(s->ln + (size_t)(r + t) * C, s->stats + (size_t)(r + t) * 2, row_of(u, t, C),
                              weight, bias, C);
    }
}

// y (rows, n, C), the next state, from x and the sublayer's output
static void connection_write(const Config* c, real* y, const real* x, const Sublayer* s, Span span) {
    int n = c->n, C = c->C, count = coefficient_count(c);
#pragma omp parallel for schedule(static)
    for (int r = span.row0; r < span.row0 + span.rows; r++) {
        real* yr = y + (size_t)r * n * C;
        const real *xr = row_of(x, r, n * C), *f = row_of(s->f, r, C);
        if (has_connections(c)) {
#define WRITE(n) write_forward(yr, xr, f, row_of(s->coef, r, count), C, n)
            WITH_CONSTANT_N(n, WRITE)
#undef WRITE
        } else
            for (int ch = 0; ch < C; ch++) yr[ch] = (c->residual == RESIDUAL_PLAIN ? xr[ch] : 0) + f[ch];
    }
}

// In: dstate of y. Out: dstate of x without the read's part, df (rows, C), gradients of post and res
static void connection_write_backward(const Config* c, Activations* a, real* df, const real* x,
                                      const Sublayer* s, int rows) {
    int n = c->n, C = c->C, count = coefficient_count(c);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        real *d = a->dstate + (size_t)r * n * C, *dfr = df + (size_t)r * C;
        if (has_connections(c)) {
#define WRITE(n)                                                                                             \
    write_backward(d, dfr, a->g.coef + (size_t)r * count, row_of(x, r, n * C), row_of(s->f, r, C),           \
                   row_of(s->coef, r, count), C, n)
            WITH_CONSTANT_N(n, WRITE)
#undef WRITE
        } else {
            memcpy(dfr, d, sizeof(real) * (size_t)C);
            if (c->residual == RESIDUAL_NONE) memset(d, 0, sizeof(real) * (size_t)C);
        }
    }
}

// dx += the read's part and that through rms(x), for tokens <= LANES from row r; du and g.shrink are there
static void read_tokens_backward(const Config* c, Activations* a, const real* x, const Sublayer* s, int r,
                                 int tokens) {
    int n = c->n, C = c->C, count = coefficient_count(c), groups = projection_groups(c);
    for (int t = r; t < r + tokens; t++) {
        real shrink[MAX_N];
        for (int i = 0; i < n; i++) shrink[i] = a->g.shrink[t * groups + (groups == 1 ? 0 : i)];
#define READ(n) read_backward(a->dstate + (size_t)t * n * C, row_of(a->du, t, C), row_of(x, t, n * C), \
                              row_of(s->coef, t, count), shrink, C, n)
        WITH_CONSTANT_N(n, READ)
#undef READ
    }
}

static CoefficientGrads coefficient_grads_at(CoefficientGrads g, const Config* c, int row) {
    size_t r = (size_t)row, M = (size_t)projection_M(c);
    CoefficientGrads moved = {g.coef + r * (size_t)coefficient_count(c), g.base + r * M, g.scale + r * M,
                              g.z + r * M, g.shrink + r * (size_t)projection_groups(c)};
    return moved;
}

// LayerNorm, read and coefficients back, for tokens <= LANES from row r. a->dln is there.
static void connection_tokens_backward(const Model* m, Activations* a, const real* x, const Sublayer* s,
                                       int k, int r, int tokens) {
    const Config* c = &m->c;
    int n = c->n, C = c->C, count = coefficient_count(c), M = projection_M(c), groups = projection_groups(c);
    const real *weight = param(m, k % 2 ? LN_2_W : LN_1_W, k / 2), *u = has_connections(c) ? s->u : x;
    for (int t = r; t < r + tokens; t++) {
        real* du = a->du + (size_t)t * C;
        layernorm_backward(du, a->xhat + (size_t)t * C, row_of(a->dln, t, C), row_of(s->stats, t, 2),
                           row_of(u, t, C), weight, C);
        if (has_connections(c))
            for (int i = 0; i < n; i++)
                a->g.coef[(size_t)t * count + i] = dot(du, row_of(x, t * n + i, C), C);
        else
            for (int ch = 0; ch < C; ch++) a->dstate[(size_t)t * C + ch] += du[ch];
    }
    if (!has_connections(c)) return;
    coefficients_backward(coefficient_grads_at(a->g, c, r), c, row_of(s->coef, r, count),
                          row_of(s->mix, r, M), row_of(s->rnorm, r, groups), connection_of(m, k), tokens);
    read_tokens_backward(c, a, x, s, r, tokens);
}

// dstate +=, gradients of the connection and of LayerNorm +=, from a->dln (rows, C)
static void connection_backward(Model* m, Activations* a, const real* x, const Sublayer* s, int k, int rows) {
    const Config* c = &m->c;
    int n = c->n, C = c->C, M = projection_M(c);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r += LANES)
        connection_tokens_backward(m, a, x, s, k, r, min_int(LANES, rows - r));
    add_column_sums(grad(m, k % 2 ? LN_2_W : LN_1_W, k / 2), a->dln, a->xhat, rows, C);
    add_column_sums(grad(m, k % 2 ? LN_2_B : LN_1_B, k / 2), a->dln, NULL, rows, C);
    if (!has_connections(c)) return;
    Connection p = connection_of(m, k);
    ConnectionGrads g = connection_grads(m, k);
    real scale_terms[MAX_M] = {0};
    add_column_sums(g.base, a->g.base, NULL, rows, M);
    add_column_sums(scale_terms, a->g.scale, NULL, rows, M);
    for (int i = 0; i < M; i++) g.scale[map_of(i, n)] += scale_terms[i];
    if (c->is_static) return;
    int groups = projection_groups(c), width = projection_width(c), outs = projection_outs(c);
    matmul(a->dstate, (size_t)width, matrix(a->g.z, (size_t)outs, 1), matrix(p.fn, (size_t)width, 1),
           rows * groups, width, outs, NULL, true);
    matmul(g.fn, (size_t)width, matrix(a->g.z, 1, (size_t)outs), matrix(x, (size_t)width, 1), outs, width,
           rows * groups, NULL, true);
}

// s->f = F(s->ln): attention in even sublayers, MLP in odd ones
static void sublayer_forward(const Model* m, const Activations* a, Sublayer* s, int k, Span span) {
    int C = m->c.C, l = k / 2, rows = span.rows, T = span.T;
    size_t r = (size_t)span.row0, C_ = (size_t)C;
    if (k % 2 == 0) {
        linear_forward(s->qkv + r * 3 * C_, s->ln + r * C_, param(m, C_ATTN_W, l), param(m, C_ATTN_B, l),
                       rows, C, 3 * C);
        attention_forward(s->attn, s->lse, s->qkv, a->scratch, span.B, T, span.row0, C, m->c.NH);
        linear_forward(s->f + r * C_, s->attn + r * C_, param(m, ATTN_PROJ_W, l), param(m, ATTN_PROJ_B, l),
                       rows, C, C);
    } else {
        linear_forward(s->fc + r * 4 * C_, s->ln + r * C_, param(m, C_FC_W, l), param(m, C_FC_B, l), rows, C,
                       4 * C);
        gelu_forward(s->gelu + r * 4 * C_, s->fc + r * 4 * C_, (size_t)rows * 4 * C_);
        linear_forward(s->f + r * C_, s->gelu + r * 4 * C_, param(m, MLP_PROJ_W, l), param(m, MLP_PROJ_B, l),
                       rows, 4 * C, C);
    }
}

// a->dln (rows, C) = from s->f, which holds its gradient. What the weights' gradients need beside activations
// stays in a->dwide: (rows, 3C) of qkv or (rows, 4C) of fc.
static void sublayer_backward_input(const Model* m, Activations* a, const Sublayer* s, int k, int B, int T) {
    int C = m->c.C, l = k / 2, rows = B * T;
    if (k % 2 == 0) {
        real* dattn = a->du;                // free until the connection's backward
        linear_backward_input(dattn, s->f, param(m, ATTN_PROJ_W, l), rows, C, C);
        attention_backward(a->dwide, dattn, s->attn, s->lse, s->qkv, a->scratch, B, T, C, m->c.NH);
        linear_backward_input(a->dln, a->dwide, param(m, C_ATTN_W, l), rows, C, 3 * C);
    } else {
        linear_backward_input(a->dwide, s->f, param(m, MLP_PROJ_W, l), rows, 4 * C, C);
        gelu_backward(a->dwide, s->fc, (size_t)rows * 4 * (size_t)C);
        linear_backward_input(a->dln, a->dwide, param(m, C_FC_W, l), rows, C, 4 * C);
    }
}

// The gradients of F's matrices and biases += from s->f, which holds its gradient, and dwide
static void sublayer_backward_weight(Model* m, const Sublayer* s, const real* dwide, int k, int rows) {
    int C = m->c.C, l = k / 2;
    if (k % 2 == 0) {
        linear_backward_weight(grad(m, ATTN_PROJ_W, l), grad(m, ATTN_PROJ_B, l), s->f, s->attn, rows, C, C);
        linear_backward_weight(grad(m, C_ATTN_W, l), grad(m, C_ATTN_B, l), dwide, s->ln, rows, C, 3 * C);
    } else {
        linear_backward_weight(grad(m, MLP_PROJ_W, l), grad(m, MLP_PROJ_B, l), s->f, s->gelu, rows, 4 * C, C);
        linear_backward_weight(grad(m, C_FC_W, l), grad(m, C_FC_B, l), dwide, s->ln, rows, C, 4 * C);
    }
}

// ------------------------------------------------------------------------------------------------
// Both ends: embedding, mean over the streams, tied head with cross-entropy.

// state (rows, n, C): n copies of wte[token] + wpe[position]
static void embedding_forward(const Model* m, real* state, const int32_t* tokens, Span span) {
    int n = m->c.n, C = m->c.C;
    const real *wte = param(m, WTE, 0), *wpe = param(m, WPE, 0);
#pragma omp parallel for schedule(static)
    for (int r = span.row0; r < span.row0 + span.rows; r++) {
        const real *token = row_of(wte, tokens[r], C), *position = row_of(wpe, r % span.T, C);
        real* x = state + (size_t)r * n * C;
        for (int i = 0; i < n; i++)
            for (int ch = 0; ch < C; ch++) x[i * C + ch] = token[ch] + position[ch];
    }
}

// The embedding's gradients += from dstate, in the order of the rows whatever the number of threads.
static void embedding_backward(Model* m, const real* dstate, const int32_t* tokens, int B, int T) {
    enum { WIDTH = 16 };
    int n = m->c.n, C = m->c.C;
    real *dwte = grad(m, WTE, 0), *dwpe = grad(m, WPE, 0);
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += WIDTH)
        for (int r = 0; r < B * T; r++) {
            const real* d = row_of(dstate, r, n * C);
            for (int ch = c0; ch < min_int(c0 + WIDTH, C); ch++) {
                real sum = 0;
                for (int i = 0; i < n; i++) sum += d[i * C + ch];
                dwte[(size_t)tokens[r] * C + ch] += sum;
                dwpe[(size_t)(r % T) * C + ch] += sum;
            }
        }
}

// a->ln (rows, C): the final LayerNorm of the mean over the streams
static void readout_forward(const Model* m, Activations* a, const real* state, Span span) {
    int n = m->c.n, C = m->c.C;
    const real *weight = param(m, LN_F_W, 0), *bias = param(m, LN_F_B, 0);
#pragma omp parallel for schedule(static)
    for (int r = span.row0; r < span.row0 + span.rows; r++) {
        const real* x = row_of(state, r, n * C);
        real* mean = a->mean + (size_t)r * C;
        for (int ch = 0; ch < C; ch++) {
            real sum = x[ch];
            for (int i = 1; i < n; i++) sum += x[i * C + ch];
            mean[ch] = sum / (real)n;
        }
        layernorm_forward(a->ln + (size_t)r * C, a->stats + (size_t)r * 2, mean, weight, bias, C);
    }
}

// a->dstate (rows, n, C) = from a->dln (rows, C)
static void readout_backward(Model* m, Activations* a, int rows) {
    int n = m->c.n, C = m->c.C;
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        real *d = a->dstate + (size_t)r * n * C, *du = a->du + (size_t)r * C;
        layernorm_backward(du, a->xhat + (size_t)r * C, row_of(a->dln, r, C), row_of(a->stats, r, 2),
                           row_of(a->mean, r, C), param(m, LN_F_W, 0), C);
        for (int i = 0; i < n; i++)
            for (int ch = 0; ch < C; ch++) d[i * C + ch] = du[ch] / (real)n;
    }
    add_column_sums(grad(m, LN_F_W, 0), a->dln, a->xhat, rows, C);
    add_column_sums(grad(m, LN_F_B, 0), a->dln, NULL, rows, C);
}

// -ln p of the target; row (V) of logits becomes dlogits = (softmax - one-hot) * scale
static real cross_entropy(real* RESTRICT row, int target, real scale, int V) {
    real max = row[0], sum = 0, logit_of_target = row[target];
#pragma omp simd reduction(max : max)
    for (int v = 1; v < V; v++) max = row[v] > max ? row[v] : max;
#pragma omp simd reduction(+ : sum)
    for (int v = 0; v < V; v++) sum += row[v] = exp_real(row[v] - max);
    real factor = scale / sum;
#pragma omp simd
    for (int v = 0; v < V; v++) row[v] *= factor;
    row[target] -= scale;
    return (real)log((double)sum) + max - logit_of_target;
}

// logits (count, V) of rows from a->ln
static void head_logits(const Model* m, const Activations* a, real* logits, int row, int count) {
    int C = m->c.C, V = m->c.V;
    matmul(logits, (size_t)V, matrix(row_of(a->ln, row, C), (size_t)C, 1),
           matrix(param(m, WTE, 0), 1, (size_t)C), count, V, C, NULL, false);
}

// a->losses (rows), nats. With scale > 0 also the head's way back: a->dln, m->head_grads, for the loss times
// scale. The logits exist for head_rows rows at a time, and turn into their gradient in place.
static void head(Model* m, Activations* a, const int32_t* targets, int rows, real scale) {
    int C = m->c.C, V = m->c.V;
    const real* wte = param(m, WTE, 0);
    for (int r = 0; r < rows; r += a->head_rows) {
        int count = min_int(a->head_rows, rows - r);
        size_t first = (size_t)r * C;
        head_logits(m, a, a->logits, r, count);
#pragma omp parallel for schedule(static)
        for (int i = 0; i < count; i++)
            a->losses[r + i] = cross_entropy(a->logits + (size_t)i * V, targets[r + i], scale, V);
        if (scale <= 0) continue;
        matmul(a->dln + first, (size_t)C, matrix(a->logits, (size_t)V, 1), matrix(wte, (size_t)C, 1), count,
               C, V, NULL, false);
        matmul(m->head_grads, (size_t)C, matrix(a->logits, 1, (size_t)V), matrix(a->ln + first, (size_t)C, 1),
               V, C, count, NULL, true);
    }
}

#include "host/gains.h"

// ------------------------------------------------------------------------------------------------
// The model, forward and backward

// A stage, for rows from row0 on: from tokens (B, T) or a->state[first], to a->ln (rows, C) or
// a->state[last].
static void model_forward(const Model* m, Activations* a, const int32_t* tokens, int B, int T, int row0) {
    const Config* c = &m->c;
    const Stage* stage = &a->stage;
    Span span = {B, T, row0, B * T - row0};
    assert(B * T <= a->B * a->T && T <= c->T && (row0 == 0 || B == 1));
    if (stage->embeds) embedding_forward(m, a->state[0], tokens, span);
    for (int k = stage->first; k < stage->last; k++) {
        if (a->progress) a->progress(a->progress_of);
        if (a->streams) stream_statistics(&a->streams[k], a->state[k], B * T, c->n, c->C);
        connection_forward(m, &a->sub[k], a->state[k], k, span);
        sublayer_forward(m, a, &a->sub[k], k, span);
        connection_write(c, a->state[k + 1], a->state[k], &a->sub[k], span);
    }
    a->shared->resident = a;
    if (!stage->heads) return;
    if (a->streams) stream_statistics(&a->streams[2 * c->L], a->state[2 * c->L], B * T, c->n, c->C);
    readout_forward(m, a, a->state[2 * c->L], span);
}

// The states of k's block before k, from the block's first and the stored f: the same sums, so the same bits.
static void recompute_states(const Model* m, Activations* a, int k, int B, int T) {
    Span span = {B, T, 0, B * T};
    int first = a->stage.first;
    for (int j = first + (k - first) / a->block * a->block; j < k; j++)
        connection_write(&m->c, a->state[j + 1], a->state[j], &a->sub[j], span);
}

// The states that the backward pass needs first, unless they are still there; it need not have begun.
static void recompute_last_block(const Model* m, Activations* a, int B, int T) {
    if (a->shared->resident != a && a->stage.last > a->stage.first)
        recompute_states(m, a, a->stage.last - 1, B, T);
    a->shared->resident = a;
}

// Backward through a stage, in place: a->dstate (rows, n, C) is the gradient of a->state[last], then of
// a->state[first]. A stage with the head begins at a->dln, after head(scale > 0). Gradients of parameters +=;
// with defer those of F's matrices wait for model_backward_weights, what they need replaces activations.
static void model_backward(Model* m, Activations* a, const int32_t* tokens, int B, int T, bool defer) {
    const Config* c = &m->c;
    const Stage* stage = &a->stage;
    if (stage->heads) readout_backward(m, a, B * T);
    recompute_last_block(m, a, B, T);
    for (int k = stage->last - 1; k >= stage->first; k--) {
        Sublayer* s = &a->sub[k];
        if (a->progress) a->progress(a->progress_of);
        if ((k - stage->first) % a->block == a->block - 1 && k < stage->last - 1)
            recompute_states(m, a, k, B, T);
        connection_write_backward(c, a, s->f, a->state[k], s, B * T);
        sublayer_backward_input(m, a, s, k, B, T);
        if (!defer) sublayer_backward_weight(m, s, a->dwide, k, B * T);
        else if (k % 2 == 0) memcpy(s->qkv, a->dwide, sizeof(real) * (size_t)(B * T) * 3 * (size_t)c->C);
        else memcpy(s->fc, a->dwide, sizeof(real) * (size_t)(B * T) * 4 * (size_t)c->C);
        connection_backward(m, a, a->state[k], s, k, B * T);
    }
    a->shared->resident = NULL;
    if (stage->embeds) embedding_backward(m, a->dstate, tokens, B, T);
}

static void model_backward_weights(Model* m, const Activations* a, int B, int T) {
    for (int k = a->stage.last - 1; k >= a->stage.first; k--)
        sublayer_backward_weight(m, &a->sub[k], k % 2 ? a->sub[k].fc : a->sub[k].qkv, k, B * T);
}

static void zero_gradients(Model* m) {
    memset(m->grads, 0, sizeof(real) * m->size);
    if (holds_head(m)) memset(m->head_grads, 0, sizeof(real) * (size_t)m->c.V * (size_t)m->c.C);
}

// wte has two gradients, as embedding and as head: one sum, after all micro-batches
static void add_head_gradient(Model* m) {
    real* dwte = grad(m, WTE, 0);
    size_t count = holds_head(m) ? (size_t)m->c.V * (size_t)m->c.C : 0;
    for (size_t i = 0; i < count; i++) dwte[i] += m->head_grads[i];
}

static double mean_loss(const Activations* a, int rows) {
    double sum = 0;
    for (int r = 0; r < rows; r++) sum += (double)a->losses[r];
    return sum / rows;
}

// One micro-batch of M: gradients += those of its share of the mean loss; returns its own mean loss
static double forward_backward(Model* m, Activations* a, const int32_t* tokens, const int32_t* targets, int B,
                               int T, int M) {
    model_forward(m, a, tokens, B, T, 0);
    head(m, a, targets, B * T, 1 / ((real)B * (real)T * (real)M));
    model_backward(m, a, tokens, B, T, false);
    return mean_loss(a, B * T);
}

// ------------------------------------------------------------------------------------------------
// Optimiser: AdamW, clipping, learning rate

// Learning rate of update s = 0, 1, ..
static double learning_rate(const Options* o, long s) {
    double p =
        s < o->warmup || o->steps <= o->warmup ? 0 : (double)(s - o->warmup) / (double)(o->steps - o->warmup);
    double least = o->min_lr_frac, done = (double)s / (double)o->steps;
    if (s < o->warmup) return o->lr * (double)(s + 1) / (double)o->warmup;
    switch (o->schedule) {
        case SCHEDULE_COSINE:
            return o->lr * (least + (1 - least) * 0.5 * (1 + cos(3.141592653589793 * fmin(p, 1))));
        case SCHEDULE_LINEAR: return o->lr * (1 - (1 - least) * fmin(p, 1));
        case SCHEDULE_WSD: return o->lr * (done < 0.8 ? 1 : 1 - (1 - least) * fmin((done - 0.8) / 0.2, 1));
        case SCHEDULE_STEP: return o->lr * (done < 0.8 ? 1 : done < 0.9 ? 0.316 : 0.1);
        default: return o->lr;
    }
}

// In double, in pieces of a fixed size that are added in order: the same sum for any number of threads.
static double square_sum(const real* numbers, size_t count) {
    enum { PIECE = 1 << 14, PIECES = 256 };
    double total = 0;
    for (size_t first = 0; first < count; first += (size_t)PIECE * PIECES) {
        double sums[PIECES] = {0};
#pragma omp parallel for schedule(static)
        for (int p = 0; p < PIECES; p++) {
            size_t start = first + (size_t)p * PIECE, end = start + PIECE < count ? start + PIECE : count;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t i = start; i < end; i++) sum += (double)numbers[i] * (double)numbers[i];
            sums[p] = sum;
        }
        for (int p = 0; p < PIECES; p++) total += sums[p];
    }
    return total;
}

// sums (tensor_count): of the squared gradients that are updated here, 0 for tensors that are elsewhere
static void gradient_square_sums(const Model* m, double* sums) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        sums[i] = t->here ? square_sum(m->grads + t->first + t->piece, t->piece_size) : 0;
    }
}

// Norm of all gradients: per tensor and in table order, so that it is the same however a model is divided
static double norm_of_sums(const double* sums, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += sums[i];
    return sqrt(sum);
}

#ifdef TESTING
static double gradient_norm(const Model* m) {
    double* sums = (double*)allocate((size_t)m->tensor_count, sizeof(double));
    gradient_square_sums(m, sums);
    double norm = norm_of_sums(sums, m->tensor_count);
    free(sums);
    return norm;
}
#endif

typedef struct {
    double lr, beta1, beta2, eps, decay, clip;
    long step;
} Update; // step: 1, 2, .. ; clip multiplies gradients

// AdamW on what is updated here of a tensor (decoupled decay, bias correction)
static void adamw_tensor(Model* m, const Tensor* t, const Update* u) {
    real *p = m->params + t->first + t->piece, *am = m->adam_m + t->moments, *av = m->adam_v + t->moments;
    const real* g = m->grads + t->first + t->piece;
    real b1 = (real)u->beta1, b2 = (real)u->beta2, eps = (real)u->eps, clip = (real)u->clip;
    real rate = (real)(u->lr / (1 - pow(u->beta1, (double)u->step)));
    real root = (real)(1 / sqrt(1 - pow(u->beta2, (double)u->step)));
    real keep = (real)(1 - (t->spec->decayed ? u->lr * u->decay : 0));
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < t->piece_size; i++) {
        real d = g[i] * clip;
        am[i] = b1 * am[i] + (1 - b1) * d;
        av[i] = b2 * av[i] + (1 - b2) * d * d;
        p[i] = p[i] * keep - rate * am[i] / ((real)sqrt((double)av[i]) * root + eps);
    }
}

static void adamw(Model* m, const Options* o, double lr, double norm, long step) {
    Update u = {lr, o->beta1, o->beta2, o->eps, o->weight_decay, 1, step};
    if (o->grad_clip > 0) u.clip = fmin(1, o->grad_clip / (norm + 1e-6));
    for (int i = 0; i < m->tensor_count; i++)
        if (m->tensors[i].here) adamw_tensor(m, &m->tensors[i], &u);
}

// The first tensor with a number that is not finite, or NULL
static const Tensor* first_nonfinite(const Model* m, const real* numbers) {
    for (int i = 0; i < m->tensor_count; i++)
        for (size_t e = 0; m->tensors[i].here && e < tensor_size(&m->tensors[i]); e++)
            if (!isfinite((double)numbers[m->tensors[i].first + e])) return &m->tensors[i];
    return NULL;
}

#include "host/speed.h"

// ------------------------------------------------------------------------------------------------
// Pipeline: what is here of a model that several ranks share. Stages are numbered in model order; a rank runs
// one or two of them, each for the micro-batches of one direction.

typedef struct { // goes before the data of every message; the receiver compares it with what it expects
    char magic[8];
    uint32_t gradient, stage, direction, micro;     // of the stage that it goes into
    uint64_t step, bytes;
    uint64_t unused[3];
} Header;
static_assert(sizeof(Header) == 64, "data behind the header must be aligned like memory of its own");

typedef enum { WIRE_FREE, WIRE_HELD, WIRE_RECEIVING, WIRE_LEAVING, WIRE_SENDING, WIRE_IN_BATCH } WireState;

typedef struct {                // a state (rows, n, C) or its gradient, on its way between stages
    WireState state;
    Header* message;            // header and data, on the host
    Header expected;            // of what is received, or leaves with the next batch
    void* at;                   // the data where the machine computes: on a CPU in the message
    int request, peer;
    int* books;                 // the count that falls when it is free again
} Wire;

typedef struct {                // a stage that is here
    Stage stage;
    int index, direction, slots;
    int before, after;          // pipeline rank of the stage before and after, -1: an end of the model
    Activations* slot;          // [slots]: micro-batch i has slot i % slots
    Wire **x, **dy; // by micro-batch: the state that came in, kept for the backward pass; the gradient
    int x_used, dy_used, y_leaving, dx_leaving;     // wires in use as what; x and dy at most:
    int x_most, dy_most;
} Part;

enum { MAX_PARTS = 2 };
static_assert(SENDS_LEAVING >= 2,
              "with one send under way a link deadlocks: long messages end when received");

typedef struct Run Run;

typedef struct {
    Transport* transport;
    int P, D, rank, replica;    // pipeline ranks, replicas, and which of them this is
    Schedule schedule;
    int stage_count, *first_block;              // [stage_count + 1]
    ActionList training;
    Part parts[MAX_PARTS];
    Wire* wires;
    int part_count, wire_count;
    // of the pass that runs
    Schedule pass;
    ActionList list;
    int next_receive;           // the action that the next receive is for
    int B;                      // sequences of a micro-batch
    bool forward_only, failed;
    bool batches;               // messages go from device to device, as schedule_program lists them
    bool (*load)(Run* run, long micro, Error* e);   // micro-batch -> the run's tokens and targets
    Error error;
    Trace trace;
} Pipe;

// ------------------------------------------------------------------------------------------------
// A run: options, model, data, and where it stands

enum { CORPUS_BYTES = 8 << 20, MAX_SKIPPED = 10, FORMAT_VERSION = 1 };

#ifndef GIT_HASH
#define GIT_HASH "unknown"
#endif
#define PROGRAM_VERSION "0.1.0"

struct Run {
    Options o;
    OptionsGiven given;
    Config c;
    Model model;
    Activations acts, infer;    // infer: one sequence, forward only, for generated text
    Pipe pipe;                  // the stages that are here, and who has the others
    Arena arena;
    void* machine;              // a GPU's own
    bool training;              // memory for gradients and moments is there
    Bpe bpe;
    bool has_bpe, has_val;
    Tokens train, val;
    char* corpus; // the built-in text and its information per byte, if that is what is trained on
    float* nats;
    int32_t *tokens, *targets;  // (B, T) of the current micro-batch
    int loaded;                 // its sequences that count
    long step;                  // finished updates
    uint64_t tokens_seen;
    double peak;                // FLOP/s
    double loss_sum;            // over the micro-batches whose loss is computed here
    double* sums;               // (tensors + 2), of squares and losses, where the ranks' meet
    real* exchange;             // (2 EXCHANGE), where several ranks hold the same tensors
    Spikes spikes;
    int skipped;                // updates in a row
    RunLog log;
};

static double step_tokens(const Run* run) {     // of all replicas
    return (double)run->o.micro_batches * run->pipe.D * (double)run->o.batch * (double)run->o.seq;
}

static Config config_of(const Options* o) {
    Config c = {(int)o->layers, (int)o->width, (int)o->heads, (int)o->seq, (int)o->vocab, o->residual,
                has_streams(o->residual) ? (int)o->streams : 1, (int)o->sinkhorn_iters, o->sinkhorn_order,
                o->hc_maps, o->hc_static, o->hc_gap};
    return c;
}

// ------------------------------------------------------------------------------------------------
// The machine that computes: all that a run asks of it. On a CPU it is the functions above; train_gpt_mhc.cu
// has them for a GPU. The run's own copies of parameters and moments (model) are what files are written from.

static void machine_layout(Run* run, Arena* arena, int block);  // its memory on the host
static bool machine_can(const Run* run, Error* e);  // whether it has what the options ask for
static bool machine_open(Run* run, Error* e); // before memory is taken: does it fit? Decides --batch auto
static void machine_close(Run* run);
static void machine_describe(const Run* run, char* text, size_t size);
static void machine_print_plan(const Run* run);
static double machine_peak(const Run* run);         // FLOP/s
static size_t machine_value_bytes(void);            // of a state's number
static void machine_load(Run* run);                 // the run's parameters and moments become the machine's
// A piece of what belongs to a tensor that is here, to the host and back. Of moments, first counts from the
// piece.
typedef enum { NUMBERS_PARAMS, NUMBERS_GRADS, NUMBERS_ADAM_M, NUMBERS_ADAM_V } NumberKind;
static void machine_read(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                         real* numbers);
static void machine_write(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                          const real* numbers);
static void machine_zero_gradients(Run* run);
// Micro-batch `micro` through a part, from x (or run's tokens) to y (or, while validating, to
// run->loss_sum).
static void machine_forward(Run* run, Part* c, int micro, Wire* x, Wire* y);
// Back, in place in dy; NULL: the part is the whole model. With defer the gradients of F's matrices wait.
static void machine_backward(Run* run, Part* c, int micro, Wire* dy, bool defer);
static void machine_backward_weights(Run* run, Part* c, int micro);
static bool machine_recompute(Run* run, Part* c, int micro);   // ahead of its gradient; false: nothing to do
static bool machine_wire_free(Run* run, const Wire* w); // asked until a message can be received into it
static void machine_wire_arrived(Run* run, Wire* w);            // that is there
static void machine_wire_leaves(Run* run, Wire* w);             // before its message is sent:
static bool machine_wire_left(Run* run, Wire* w);               // asked until it can be
// Slices of a tensor, one of each rank that holds it: of gradients the own one, `mine`, becomes the sum of
// all ranks', of parameters the others' come here. False: nothing is done, the numbers move through the host.
typedef struct { size_t first, count; int rank; } Slice;
static bool machine_exchange(Run* run, NumberKind what, const Tensor* t, const Slice* slices, int count,
                             int mine);
static void machine_exchanged(Run* run);                        // waits for all of them
static void machine_choose(const Run* run);     // before it is opened, by all ranks: which device is whose
static void machine_join(Run* run);             // when it is open everywhere: how ranks exchange
static void machine_carry(Run* run, Wire* const* wires, int count); // a batch of pipe.batches, all at once
static bool is_traced(const Run* run) {
    const Trace* t = &run->pipe.trace;
    return t->events && t->count < TRACE_EVENTS && !run->pipe.forward_only;
}
static void machine_traced(Run* run); // the trace's last event is the last work asked for
static void machine_begin_pass(Run* run);
static void machine_end_pass(Run* run);                         // run->loss_sum is there
// The step's own gradients are complete; then the sums of squares of those that are updated here.
static void machine_end_gradients(Run* run);
static void machine_square_sums(Run* run, double* sums);
static void machine_update(Run* run, double lr, double norm);
static const Tensor* machine_nonfinite(Run* run, bool gradients);       // the first such tensor here, or NULL
// Coefficients (rows, n*n + 2n) of sublayer k on the host, after a forward pass of one micro-batch; streams
// (2L + 1)
static const real* machine_coefficients(Run* run, const Part* c, int k);
static void machine_watch_streams(Run* run, StreamStats* streams);      // from now on, if not NULL
// logits (V) on the host after `length` tokens, of which the first `known` were there at the last call
static void machine_logits(Run* run, const int32_t* tokens, int length, int known, real* logits);
// A pass of the run's micro-batch; gradients, coefficients, losses and logits (rows, V) on the host
static void machine_dump(Run* run, real* logits);

static size_t wire_bytes(const Run* run) {      // of the data, for the micro-batches of this pass
    return (size_t)run->pipe.B * (size_t)run->c.T * (size_t)(run->c.n * run->c.C) * machine_value_bytes();
}

#ifndef GPU_TRAINER
static void layout_part(Run* run, Arena* arena, Part* c) {
    if (!c->slot) c->slot = (Activations*)allocate((size_t)c->slots, sizeof(Activations));
    for (int i = 0; i < c->slots; i++) {
        Activations *a = &c->slot[i], own = *a;
        *a = run->acts;                         // the scratch
        a->stage = c->stage;
        a->sub = own.sub ? own.sub : (Sublayer*)allocate((size_t)(2 * run->c.L), sizeof(Sublayer));
        a->state = own.state ? own.state : (real**)allocate((size_t)(2 * run->c.L + 1), sizeof(real*));
        activations_layout_slot(a, arena, &run->c, run->training);
    }
}

static void layout_wires(Run* run, Arena* arena) {
    for (int i = 0; i < run->pipe.wire_count; i++) {
        Wire* w = &run->pipe.wires[i];
        w->message = (Header*)plan_carve(arena, "messages", sizeof(Header) + wire_bytes(run), 1);
        w->at = w->message ? w->message + 1 : NULL;
    }
}

// With one stage a single micro-batch is under way; acts is its slot.
static void machine_layout(Run* run, Arena* arena, int block) {
    Pipe* p = &run->pipe;
    int B = (int)run->o.batch, T = run->c.T;
    model_memory(&run->model, arena, run->training);
    if (p->stage_count == 1) {
        p->parts[0].slot = &run->acts;
        activations_layout(&run->acts, arena, &run->c, B, T, block, run->training);
    } else {
        run->acts.stage.embeds = false;
        run->acts.stage.heads = holds_head(&run->model);
        activations_layout_scratch(&run->acts, arena, &run->c, B, T, block, run->training);
        for (int i = 0; i < p->part_count; i++) layout_part(run, arena, &p->parts[i]);
        layout_wires(run, arena);
    }
    if (p->P == 1) activations_layout(&run->infer, arena, &run->c, 1, T, 1, false);
    plan_add(arena, "program and panels of matrices", ((size_t)3 + (size_t)thread_count()) << 20);
}

static bool machine_can(const Run* run, Error* e) {
    if (run->o.batch == BATCH_AUTO)
        return fail(e, "--batch: found auto, expected a number, as in --batch 8; auto is for a GPU");
    if (run->o.priority != PRIORITY_NONE)
        return fail(e, "--priority: found another than none, which is for a GPU, leave it out");
    return run->o.kernels == KERNELS_PLAIN ||
           fail(e, "--kernels: found fused, expected plain, leave it out: others are for a GPU");
}

static bool machine_open(Run* run, Error* e) { return run && e; }
static void machine_load(Run* run) { (void)run; }
static void machine_choose(const Run* run) { (void)run; }
static void machine_join(Run* run) { (void)run; }
static void machine_exchanged(Run* run) { (void)run; }
static void machine_carry(Run* run, Wire* const* wires, int count) { (void)run, (void)wires, (void)count; }
static bool machine_exchange(Run* run, NumberKind what, const Tensor* t, const Slice* slices, int count,
                             int mine) {
    (void)run, (void)what, (void)t, (void)slices, (void)count, (void)mine;
    return false;
}
static void machine_traced(Run* run) { (void)run; }
static void machine_begin_pass(Run* run) { (void)run; }
static void machine_end_pass(Run* run) { (void)run; }
static bool machine_wire_free(Run* run, const Wire* w) { return run && w; }
static void machine_wire_leaves(Run* run, Wire* w) { (void)run, (void)w; }
static void machine_wire_arrived(Run* run, Wire* w) { (void)run, (void)w; }
static bool machine_wire_left(Run* run, Wire* w) { return run && w; }
static size_t machine_value_bytes(void) { return sizeof(real); }
static double machine_peak(const Run* run) { return run ? measure_peak() : 0; }
static void machine_square_sums(Run* run, double* sums) { gradient_square_sums(&run->model, sums); }
static void machine_zero_gradients(Run* run) { zero_gradients(&run->model); }
static void machine_end_gradients(Run* run) { add_head_gradient(&run->model); }
static void machine_update(Run* run, double lr, double norm) {
    adamw(&run->model, &run->o, lr, norm, run->step + 1);
}

static void machine_close(Run* run) {
    for (int i = 0; i < run->pipe.part_count && run->pipe.stage_count > 1; i++) {
        Part* c = &run->pipe.parts[i];
        for (int slot = 0; c->slot && slot < c->slots; slot++) activations_close(&c->slot[slot]);
        free(c->slot);
    }
}

static void machine_describe(const Run* run, char* text, size_t size) {
    (void)run;
    snprintf(text, size, "%s, %d thread%s", cpu_name(), thread_count(), thread_count() > 1 ? "s" : "");
}

static void machine_print_plan(const Run* run) { plan_print(stdout, &run->arena); }

static real* numbers_at(Run* run, NumberKind what, const Tensor* t, size_t first) {
    Model* m = &run->model;
    switch (what) {
        case NUMBERS_PARAMS: return m->params + t->first + first;
        case NUMBERS_GRADS: return m->grads + t->first + first;
        case NUMBERS_ADAM_M: return m->adam_m + t->moments + first;
        case NUMBERS_ADAM_V: return m->adam_v + t->moments + first;
    }
    return NULL;
}

static void machine_read(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                         real* numbers) {
    memcpy(numbers, numbers_at(run, what, t, first), sizeof(real) * count);
}

static void machine_write(Run* run, NumberKind what, const Tensor* t, size_t first, size_t count,
                          const real* numbers) {
    memcpy(numbers_at(run, what, t, first), numbers, sizeof(real) * count);
}

static Activations* slot_of(const Part* c, int micro) { return &c->slot[micro % c->slots]; }

static void machine_forward(Run* run, Part* c, int micro, Wire* x, Wire* y) {
    Activations* a = slot_of(c, micro);
    int B = run->pipe.B, T = run->c.T, rows = B * T;
    const int32_t *tokens = run->tokens, *targets = run->targets;
    if (x) a->state[c->stage.first] = (real*)x->at;
    if (x && y && c->stage.first == c->stage.last) memcpy(y->at, x->at, wire_bytes(run)); // an empty stage
    if (y) a->state[c->stage.last] = (real*)y->at;
    if (a->tokens) {
        memcpy(a->tokens, tokens, sizeof(int32_t) * (size_t)rows);
        memcpy(a->targets, targets, sizeof(int32_t) * (size_t)rows);
    }
    a->streams = run->acts.streams;
    model_forward(&run->model, a, tokens, B, T, 0);
    if (!run->pipe.forward_only || !c->stage.heads || a->streams) return;
    head(&run->model, a, targets, rows, 0);
    run->loss_sum += mean_loss(a, run->loaded * T) * run->loaded;
}

static void machine_backward(Run* run, Part* c, int micro, Wire* dy, bool defer) {
    Activations* a = slot_of(c, micro);
    int B = run->pipe.B, T = run->c.T;
    double sequences = (double)B * (double)run->o.micro_batches * run->pipe.D;
    if (dy) a->dstate = (real*)dy->at;
    if (c->stage.heads) {
        head(&run->model, a, a->targets, B * T, (real)(1 / (sequences * T)));
        run->loss_sum += mean_loss(a, B * T);
    }
    model_backward(&run->model, a, a->tokens, B, T, defer);
}

static void machine_backward_weights(Run* run, Part* c, int micro) {
    model_backward_weights(&run->model, slot_of(c, micro), run->pipe.B, run->c.T);
}

static bool machine_recompute(Run* run, Part* c, int micro) {
    Activations* a = slot_of(c, micro);
    if (a->shared->resident == a || a->block == 1) return false;
    recompute_last_block(&run->model, a, run->pipe.B, run->c.T);
    return true;
}

static const Tensor* machine_nonfinite(Run* run, bool gradients) {
    return first_nonfinite(&run->model, gradients ? run->model.grads : run->model.params);
}

static const real* machine_coefficients(Run* run, const Part* c, int k) {
    (void)run;
    return c->slot[0].sub[k].coef;
}

static void machine_watch_streams(Run* run, StreamStats* streams) { run->acts.streams = streams; }

static void machine_logits(Run* run, const int32_t* tokens, int length, int known, real* logits) {
    model_forward(&run->model, &run->infer, tokens, 1, length, known);
    head_logits(&run->model, &run->infer, logits, length - 1, 1);
}

static void machine_dump(Run* run, real* logits) {
    int B = (int)run->o.batch, T = run->c.T;
    forward_backward(&run->model, &run->acts, run->tokens, run->targets, B, T, 1);
    add_head_gradient(&run->model);
    head_logits(&run->model, &run->acts, logits, 0, B * T);
}
#endif

#include "host/batches.h"
#include "host/wires.h"

// ------------------------------------------------------------------------------------------------
// The executor: runs a rank's action list, whatever schedule made it. Messages carry tags, so that receives
// are posted ahead and nothing depends on the order of arrival; every wait is a poll with a deadline.

// The most micro-batches between an action of stage `from` (forward, or backward) and the backward of stage
// `to`
static int most_between(const ActionList* list, bool forward, int from, int to) {
    int now = 0, most = 0;
    for (int i = 0; i < list->count; i++) {
        const Action* a = &list->at[i];
        if (a->kind == ACTION_W) continue;
        now += a->stage == from && (a->kind == ACTION_F) == forward;
        most = now > most ? now : most;
        now -= a->stage == to && a->kind != ACTION_F;
    }
    return most;
}

// How many wires a part needs at most, as what; in all
static int part_wires(Part* c, const ActionList* list, int rank) {
    bool local_before = c->before == rank, local_after = c->after == rank,
         whole = c->before < 0 && c->after < 0;
    c->x_most = c->before < 0 ? 0
                : local_before ? most_between(list, true, c->index - 1, c->index)
                               : c->slots + RECEIVES_AHEAD;
    c->dy_most = whole ? 0
                 : c->after < 0 ? 1
                 : local_after ? most_between(list, false, c->index + 1, c->index)
                               : 1 + RECEIVES_AHEAD;
    return c->x_most + c->dy_most + (c->after >= 0 && !local_after ? SENDS_LEAVING : 0) +
           (c->before >= 0 && !local_before ? SENDS_LEAVING : 0);
}

static void open_part(Run* run, int index, int direction) {
    Pipe* p = &run->pipe;
    Part* c = &p->parts[p->part_count++];
    Stage stage = {2 * p->first_block[index], 2 * p->first_block[index + 1], index == 0,
                   index == p->stage_count - 1};
    int micros = schedule_micros(&p->schedule, direction);
    size_t room = (size_t)(micros > run->o.val_batches ? micros : run->o.val_batches) + 1;
    memset(c, 0, sizeof *c);
    c->stage = stage;
    c->index = index;
    c->direction = direction;
    c->slots = run->training ? schedule_slots(&p->training, index) : 1;
    if (c->slots < 1) c->slots = 1; // fewer micro-batches than directions: validation still comes by
    c->before = stage.embeds ? -1 : schedule_rank_of(&p->schedule, index - 1, direction);
    c->after = stage.heads ? -1 : schedule_rank_of(&p->schedule, index + 1, direction);
    c->x = (Wire**)allocate(room, sizeof(Wire*));
    c->dy = (Wire**)allocate(room, sizeof(Wire*));
    p->wire_count += part_wires(c, &p->training, p->rank);
}

// The parts of this rank and its action list; first_block is known.
static void pipe_open(Run* run) {
    Pipe* p = &run->pipe;
    int directions = p->schedule.kind == PIPELINE_DUALPIPE ? 2 : 1;
    p->training = schedule_actions(&p->schedule, p->rank, false);
    for (int direction = 0; direction < directions; direction++)
        for (int s = 0; s < p->stage_count; s++)
            if (schedule_rank_of(&p->schedule, s, direction) == p->rank) open_part(run, s, direction);
    p->wires = (Wire*)allocate((size_t)p->wire_count, sizeof(Wire));
}

static void pipe_close(Pipe* p) {
    for (int i = 0; i < p->part_count; i++) {
        free((void*)p->parts[i].x);
        free((void*)p->parts[i].dy);
    }
    free(p->training.at);
    free(p->wires);
    free(p->first_block);
}

static Part* part_at(Pipe* p, int stage, int direction) {
    int i = 0;
    while (p->parts[i].index != stage || p->parts[i].direction != direction) i++;
    assert(i < p->part_count);
    return &p->parts[i];
}

// Posts receives in the order of their use, as far as there are wires for them.
static void post_receives(Run* run) {
    Pipe* p = &run->pipe;
    for (; p->next_receive < p->list.count && !p->batches; p->next_receive++) {
        const Action* a = &p->list.at[p->next_receive];
        const Part* c = part_at(p, a->stage, a->direction);
        bool gradient = a->kind != ACTION_F;
        int peer = gradient ? c->after : c->before;
        if (a->kind == ACTION_W || peer < 0 || peer == p->rank) continue;
        if (gradient ? c->dy_used >= c->dy_most : c->x_used >= c->x_most) return;
        if (!machine_wire_free(run, wire_free(p))) return;
        wire_receive(run, c, a);
    }
}

// Moves messages along. Called also between sublayers: no one else does while this rank computes.
static void pipe_progress(void* context) {
    Run* run = (Run*)context;
    Pipe* p = &run->pipe;
    post_receives(run);
    for (Wire* w = p->wires; w < p->wires + p->wire_count; w++) {
        if (w->state == WIRE_LEAVING && machine_wire_left(run, w)) {
            w->state = WIRE_SENDING;
            w->request = transport_send(p->transport, w->peer, message_tag(w->message), w->message,
                                        sizeof(Header) + wire_bytes(run));
        }
        if (w->state == WIRE_SENDING && transport_done(p->transport, w->request)) wire_rebook(w, NULL);
        if (w->state == WIRE_RECEIVING && transport_done(p->transport, w->request)) {
            check_header(run, w);
            machine_wire_arrived(run, w);
            w->state = WIRE_HELD;
        }
    }
}

static bool is_here(const Wire* w) { return w && w->state == WIRE_HELD; }

// Whether an action's input is here and there is room for its output
static bool action_ready(Pipe* p, const Action* a) {
    const Part* c = part_at(p, a->stage, a->direction);
    if (a->kind == ACTION_W) return true;
    if (a->kind == ACTION_F)
        return (c->before < 0 || is_here(c->x[a->micro])) && c->y_leaving < SENDS_LEAVING;
    return (c->after < 0 || is_here(c->dy[a->micro])) && c->dx_leaving < SENDS_LEAVING;
}

// For whom a rank waits that cannot go on
static void describe_wait(Pipe* p, const Action* a, char* text, size_t size) {
    const Part* c = part_at(p, a->stage, a->direction);
    bool forward = a->kind == ACTION_F, input = !(forward ? c->before < 0 || is_here(c->x[a->micro])
                                                          : c->after < 0 || is_here(c->dy[a->micro]));
    int from = forward ? c->before : c->after, to = forward ? c->after : c->before;
    snprintf(text, size, "waits for rank %d to %s the %s stage %d, micro-batch %u, direction %d",
             input ? from : to, input ? "send" : "take", forward == input ? "input of" : "gradient of",
             a->stage, a->micro, a->direction);
}

static void load_batch(Run* run, const Action* a) {
    int micro = schedule_global_micro(&run->pipe.pass, a->direction, (int)a->micro);
    if (!run->pipe.load(run, micro, &run->pipe.error)) run->pipe.failed = true; // the step ends all the same
}

static void run_forward(Run* run, Part* c, const Action* a) {
    Pipe* p = &run->pipe;
    bool local = c->after == p->rank;
    Part* next = local ? part_at(p, c->index + 1, c->direction) : NULL;
    Wire *x = c->before < 0 ? NULL : c->x[a->micro], *y = NULL;
    if (c->after >= 0) y = wire_take(p, WIRE_HELD, local ? &next->x_used : &c->y_leaving);
    if (c->stage.embeds || c->stage.heads) load_batch(run, a);
    machine_forward(run, c, (int)a->micro, x, y);
    if (local) next->x[a->micro] = y;
    else if (y) wire_send(run, y, c->after, c->index + 1, a);
    if (x && p->forward_only) wire_rebook(x, NULL);
}

static void run_backward(Run* run, Part* c, const Action* a) {
    Pipe* p = &run->pipe;
    Wire* dy = c->dy[a->micro];
    if (c->after < 0 && c->before >= 0) dy = wire_take(p, WIRE_HELD, &c->dy_used);
    machine_backward(run, c, (int)a->micro, dy, a->kind == ACTION_I);
    c->dy[a->micro] = NULL;
    if (c->before < 0) {
        if (dy) wire_rebook(dy, NULL);
        return;
    }
    wire_rebook(c->x[a->micro], NULL);
    c->x[a->micro] = NULL;
    Part* previous = c->before == p->rank ? part_at(p, c->index - 1, c->direction) : NULL;
    wire_rebook(dy, previous ? &previous->dy_used : &c->dx_leaving);
    if (previous) previous->dy[a->micro] = dy;
    else wire_send(run, dy, c->before, c->index - 1, a);
}

static void run_action(Run* run, const Action* a) {
    Part* c = part_at(&run->pipe, a->stage, a->direction);
    double start = seconds();
    if (a->kind == ACTION_F) run_forward(run, c, a);
    else if (a->kind == ACTION_W) machine_backward_weights(run, c, (int)a->micro);
    else run_backward(run, c, a);
    if (is_traced(run)) {
        trace_add(&run->pipe.trace, a, run->step + 1, start, seconds());
        machine_traced(run);
    }
    transport_progressed(run->pipe.transport);
}

// While nothing can run: the states of a micro-batch whose gradient is still on its way need not wait for it.
static void wait_usefully(Run* run, const Action* waiting) {
    Pipe* p = &run->pipe;
    char text[160];
    const Part* c = part_at(p, waiting->stage, waiting->direction);
    bool backward = waiting->kind == ACTION_B || waiting->kind == ACTION_I;
    if (backward && machine_recompute(run, (Part*)c, (int)waiting->micro)) return;
    describe_wait(p, waiting, text, sizeof text);
    transport_idle(p->transport, text);
}

// The actions of a pair in the order in which they become ready, the backward one first if both are.
static void run_together(Run* run, const Action* a, int count) {
    bool done[2] = {false, false};
    for (int left = count; left > 0;) {
        int next = count;
        pipe_progress(run);
        while (--next >= 0 && (done[next] || !action_ready(&run->pipe, &a[next]))) {}
        if (next < 0) {
            wait_usefully(run, done[count - 1] ? &a[0] : &a[count - 1]);
            continue;
        }
        run_action(run, &a[next]);
        done[next] = true;
        left--;
    }
}

static bool wires_at_work(const Pipe* p) {
    for (int i = 0; i < p->wire_count; i++)
        if (p->wires[i].state == WIRE_LEAVING || p->wires[i].state == WIRE_SENDING) return true;
    return false;
}

// Messages between two actions, where transports have no tags. States are made anew while a gradient travels.
static void run_messages(Run* run, const Action* a, int count) {
    Wire** batch = (Wire**)allocate((size_t)count, sizeof(Wire*));
    for (int i = 0; i < count; i++) {
        Part* c = part_at(&run->pipe, a[i].stage, a[i].direction);
        batch[i] = wire_of_message(run, c, &a[i]);
        if (a[i].kind == MESSAGE_RECEIVE_DX) machine_recompute(run, c, (int)a[i].micro);
    }
    machine_carry(run, batch, count);
    for (int i = 0; i < count; i++)
        if (batch[i]->state == WIRE_IN_BATCH) wire_rebook(batch[i], NULL);
    free((void*)batch);
}

// How many actions, from the one at i on, run together
static int count_together(const ActionList* list, int i) {
    int count = 1 + list->at[i].paired;
    if (!schedule_is_message(list->at[i].kind)) return count;
    while (i + count < list->count && schedule_is_message(list->at[i + count].kind)) count++;
    return count;
}

// Runs this rank's share of M micro-batches of B sequences, which `load` finds. False if that failed
// somewhere here: the pass was finished all the same, with what was there.
static bool pipe_run(Run* run, int M, int B, bool forward_only, bool (*load)(Run*, long, Error*), Error* e) {
    Pipe* p = &run->pipe;
    bool generated = M != p->schedule.M || forward_only;
    p->pass = p->schedule;
    p->pass.M = M;
    p->list = p->batches  ? schedule_program(&p->pass, p->rank, forward_only)
              : generated ? schedule_actions(&p->pass, p->rank, forward_only)
                          : p->training;
    p->B = B;
    p->forward_only = forward_only;
    p->load = load;
    p->failed = false;
    p->next_receive = 0;
    machine_begin_pass(run);
    for (int i = 0, count; i < p->list.count; i += count) {
        count = count_together(&p->list, i);
        (schedule_is_message(p->list.at[i].kind) ? run_messages : run_together)(run, &p->list.at[i], count);
    }
    while (wires_at_work(p)) {
        pipe_progress(run);
        if (wires_at_work(p)) transport_idle(p->transport, "waits for its last messages to be taken");
    }
    machine_end_pass(run);
    if (generated || p->batches) free(p->list.at);
    if (p->failed) *e = p->error;
    return !p->failed;
}

typedef enum { VERDICT_APPLY, VERDICT_SKIP, VERDICT_STOP } Verdict;

typedef struct {                // what one update saw
    double loss, z, norm, lr, seconds;
    Verdict verdict;
    char culprit[MAX_NAME + 64];        // what is not finite or why the run stops
} StepReport;

// ------------------------------------------------------------------------------------------------
// What surrounds a run, in files of their own

#include "host/generate.h"
#include "host/ranks.h"
#include "host/timeline.h"

// The first tensor in table order with a number that is not finite, whichever rank holds it; or NULL
static const Tensor* first_nonfinite_anywhere(Run* run, bool gradients) {
    const Tensor* t = machine_nonfinite(run, gradients);
    int count = run->model.tensor_count, first = t ? (int)(t - run->model.tensors) : count;
    first = count - (int)ranks_max(run, count - first);
    return first < count ? &run->model.tensors[first] : NULL;
}

#include "host/checkpoint.h"

static bool validation_loss(Run* run, double* loss, Error* e) {
    uint64_t windows = validation_windows(run), B = (uint64_t)run->o.batch;
    double sum = 0;
    run->loss_sum = 0;
    bool good = pipe_run(run, (int)((windows + B - 1) / B), (int)B, true, validation_batch, e);
    if (run->pipe.replica == 0) sum = run->loss_sum;        // every replica validates the same
    transport_sum(run->pipe.transport, &sum, 1);
    *loss = sum / (double)windows;
    return all_well(run, good, e);
}

// Nats per byte that even a perfect model needs for the targets of the validation:
// known for the built-in corpus alone
static double validation_entropy(const Run* run) {
    uint64_t bytes = validation_windows(run) * (uint64_t)run->c.T;
    const float* nats = run->nats + tokens_count(&run->train) + 1;
    double sum = 0;
    for (uint64_t i = 0; i < bytes; i++) sum += (double)nats[i];
    return sum / (double)bytes;
}

#include "host/report.h"

// ------------------------------------------------------------------------------------------------
// Training

static volatile sig_atomic_t stop_requested;
static void request_stop(int signal_number) {
    if (stop_requested) _exit(128 + signal_number);     // the second one ends at once, and is not done
    stop_requested = 1;
}

static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = request_stop;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);                   // a file that grows too large is a failed write, not the end
    signal(SIGPIPE, SIG_IGN);
}

// What becomes of an update. What is not finite is never applied;
// the first such tensor in table order is named.
static Verdict judge(Run* run, StepReport* r) {
    const Tensor* t;
    bool may_skip = run->o.on_spike == SPIKE_SKIP && run->skipped + 1 < MAX_SKIPPED;
    if (!isfinite(r->loss) || !isfinite(r->norm)) {
        if ((t = first_nonfinite_anywhere(run, false)))
            snprintf(r->culprit, sizeof r->culprit, "weight %s is not finite", t->name);
        else if ((t = first_nonfinite_anywhere(run, true)))
            snprintf(r->culprit, sizeof r->culprit, "the gradient of %s is not finite", t->name);
        else snprintf(r->culprit, sizeof r->culprit, "the loss is not finite");
        bool weights = !strncmp(r->culprit, "weight", 6);
        return may_skip && !weights ? VERDICT_SKIP : VERDICT_STOP;
    }
    if (!(r->z > SPIKE_LIMIT) || run->o.on_spike == SPIKE_IGNORE) return VERDICT_APPLY;
    snprintf(r->culprit, sizeof r->culprit, "the loss is %.1f deviations above the last ones", r->z);
    return may_skip ? VERDICT_SKIP : VERDICT_STOP;
}

// Gradients, loss and norm of the next update; false if the data cannot be read.
static bool accumulate_gradients(Run* run, StepReport* r, Error* e) {
    int M = (int)run->o.micro_batches, count = run->model.tensor_count;
    machine_zero_gradients(run);
    run->loss_sum = 0;
    bool good = pipe_run(run, M, (int)run->o.batch, false, training_batch, e);
    machine_end_gradients(run);
    exchange(run, NUMBERS_GRADS);
    machine_square_sums(run, run->sums);
    run->sums[count] = run->loss_sum;
    transport_sum(run->pipe.transport, run->sums, count + 1);
    r->loss = run->sums[count] / ((double)M * run->pipe.D);
    r->norm = norm_of_sums(run->sums, count);
    return all_well(run, good, e);
}

// After the gradients: judge, apply or drop, remember. A dropped update still is a step: its data is past.
static void finish_step(Run* run, StepReport* r) {
    r->z = spikes_score(&run->spikes, r->loss);
    r->lr = learning_rate(&run->o, run->step);
    r->culprit[0] = 0;
    r->verdict = judge(run, r);
    if (r->verdict == VERDICT_STOP) return;
    if (r->verdict == VERDICT_APPLY) {
        machine_update(run, r->lr, r->norm);
        exchange(run, NUMBERS_PARAMS);
        spikes_accept(&run->spikes, r->loss);
    }
    run->skipped = r->verdict == VERDICT_SKIP ? run->skipped + 1 : 0;
    run->step++;
    run->tokens_seen += (uint64_t)step_tokens(run);
}

static bool train_step(Run* run, StepReport* r, Error* e) {
    double start = seconds();
    if (!accumulate_gradients(run, r, e)) return false;
    finish_step(run, r);
    r->seconds = seconds() - start;
    return true;
}

#include "host/start.h"
#include "host/loop.h"

#ifndef TESTING
int main(int argc, char** argv) {
    static Run run;
    Error e;
    wait_briefly(argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    Transport* transport = transport_open(&argc, &argv);
    bool leader = transport->rank == 0;
    int status = STATUS_DONE;
    run.pipe.transport = transport;
    bool parsed = options_parse(&run.o, &run.given, argc, argv, &e);
    if (!all_well(&run, parsed, &e) || !ranks_agree(&run, &e)) {
        status = refuse(&run, &e);
    } else if (run.o.help) {
        if (leader) options_help(stdout, "train_gpt_mhc");
    } else if (run.o.version) {
        if (leader) printf("train_gpt_mhc %s (%s)\n", PROGRAM_VERSION, GIT_HASH);
    } else if (run.o.print_schedule) {
        if (leader) print_schedule(&run);
    } else {
        bool trial = transport->size == 1 && run.o.ranks > 1 && !run.o.plan && transport->loopback;
        status = trial ? run_in_one_process(&run, argc, argv) : run_rank(&run, transport, argc, argv);
    }
    transport_close(transport);
    return status;
}
#endif
