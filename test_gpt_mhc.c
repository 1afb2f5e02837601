// test_gpt_mhc.c: checks the CPU reference. Built twice, as each number is only as sharp as its rounding:
// with REAL=double every gradient of every residual mode against finite differences, formulas and files of an
// oracle to 1e-7; with float, what training relies on: equal bits, files, resume. Run from the repository's
// root.
//     ./test_gpt_mhc [part of a section's name]

#define TESTING
#include <fcntl.h>
#include <ftw.h>

#include "train_gpt_mhc.c"
#include "host/check.h"

// Half the distance from 1 to the next number: the largest relative error of one rounding, the unit of all
// tolerances.
static const double EPS = sizeof(real) == sizeof(float) ? 1.0 / (1 << 24) : 1.0 / 9007199254740992.0;

static const char* const residual_names[] = {"none", "plain", "hc", "mhc", "ihc"};

// ------------------------------------------------------------------------------------------------
// Numbers

// In [-1, 1), a function of its place.
static double uniform(uint64_t seed, uint64_t index) {
    return (double)(hash64(seed, index) >> 11) / 4503599627370496.0 - 1;
}

static void fill(real* numbers, size_t count, double size, uint64_t seed) {
    for (size_t i = 0; i < count; i++) numbers[i] = (real)(size * uniform(seed, i));
}

static real* numbers_of(size_t count) { return (real*)allocate(count, sizeof(real)); }

// Whether bytes are equal, and a hash of them: what "bit for bit" means here.
static bool same_bits(const real* a, const real* b, size_t count) {
    return !memcmp(a, b, count * sizeof(real));
}
static uint64_t hash_bits(uint64_t hash, const real* numbers, size_t count) {
    return tokens_hash(hash, numbers, count * sizeof(real));
}

// Keeps the largest error; NaN, once there, stays.
static bool keep_worst(double* worst, double error) {
    if (error <= *worst || *worst != *worst) return false;
    *worst = error;
    return true;
}

// |a - b| / |b|; 0 when both are zero
static double relative_l2(const real* a, const real* b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

// The same against doubles; error_against counts a difference as it is where b is below 1.
static double relative_l2_to(const real* a, const double* b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

static double error_against(const real* a, const double* b, size_t count) {
    double worst = 0;
    for (size_t i = 0; i < count; i++) keep_worst(&worst, fabs((double)a[i] - b[i]) / fmax(1, fabs(b[i])));
    return worst;
}

// ------------------------------------------------------------------------------------------------
// Small models to test on

typedef struct {                // a model with everything a step needs, in one allocation
    Model model;
    Activations acts;
    Arena arena;
    int32_t *tokens, *targets;  // (B, T)
} Rig;

static Config small_config(int residual, int n) {
    Config c = {2, 8, 2, 6, 11, residual, has_streams(residual) ? n : 1, 20, ORDER_CR, 7, false, 4};
    return c;
}

static void rig_open(Rig* r, const Config* c, int B, int block) {
    memset(r, 0, sizeof *r);
    model_layout(&r->model, c);
    activations_open(&r->acts, c);
    model_memory(&r->model, &r->arena, true);
    activations_layout(&r->acts, &r->arena, c, B, c->T, block, true);
    plan_open(&r->arena);
    model_memory(&r->model, &r->arena, true);
    activations_layout(&r->acts, &r->arena, c, B, c->T, block, true);
    r->tokens = (int32_t*)allocate((size_t)(B * c->T), sizeof(int32_t));
    r->targets = (int32_t*)allocate((size_t)(B * c->T), sizeof(int32_t));
    for (int i = 0; i < B * c->T; i++) {
        r->tokens[i] = (int32_t)(hash64(7, (uint64_t)i) % (uint64_t)c->V);
        r->targets[i] = (int32_t)(hash64(8, (uint64_t)i) % (uint64_t)c->V);
    }
    model_initialise(&r->model, 1);
}

static void rig_close(Rig* r) {
    free(r->arena.memory);
    activations_close(&r->acts);
    model_close(&r->model);
    free(r->tokens);
    free(r->targets);
}

static double rig_loss(Rig* r) {
    int T = r->model.c.T, B = r->acts.B;
    model_forward(&r->model, &r->acts, r->tokens, B, T, 0);
    head(&r->model, &r->acts, r->targets, B * T, 0);
    return mean_loss(&r->acts, B * T);
}

static double rig_step(Rig* r) {
    zero_gradients(&r->model);
    double loss = forward_backward(&r->model, &r->acts, r->tokens, r->targets, r->acts.B, r->model.c.T, 1);
    add_head_gradient(&r->model);
    return loss;
}

// Far from the start: every parameter random, so that no term hides behind a zero. sharpness scales base
// (logits of Sinkhorn); connections' scales are near 1. Tensors of one name are equal in all residual modes.
static void randomise(Model* m, double sharpness, uint64_t seed) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        double sd = t->spec->init == INIT_HC_BASE               ? sharpness
                    : t->spec->init == INIT_ZERO && t->cols > 1 ? 0.3
                                                                : 0.2;
        for (size_t e = 0; e < tensor_size(t); e++) {
            double mean = t->spec->init == INIT_ONE || t->spec->init == INIT_HC_SCALE;
            m->params[t->first + e] = (real)(mean + sd * normal(tensor_seed(t, seed), e));
        }
    }
}

// Gains of the last forward pass's first sequence
static void rig_gains(const Rig* r, Gain* single, Gain* composite) {
    const Config* c = &r->model.c;
    size_t size = (size_t)(c->T * c->n * c->n);
    double* mappings = (double*)allocate(2 * (size_t)c->L * size, sizeof(double));
    for (int k = 0; k < 2 * c->L; k++)
        residual_mappings(mappings + (size_t)k * size, c, r->acts.sub[k].coef, c->T);
    model_gains(single, composite, c, mappings, c->T);
    free(mappings);
}

// logits (rows, V) after model_forward
static real* rig_logits(const Rig* r, int rows) {
    real* logits = numbers_of((size_t)rows * (size_t)r->model.c.V);
    head_logits(&r->model, &r->acts, logits, 0, rows);
    return logits;
}

static bool is_connection(const Tensor* t) { return strstr(t->name, "_hc.") != NULL; }

static real* grad_of(const Model* m, const char* name) {
    for (int i = 0; i < m->tensor_count; i++)
        if (!strcmp(m->tensors[i].name, name)) return m->grads + m->tensors[i].first;
    return NULL;
}

static double norm_of(const real* numbers, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += (double)numbers[i] * (double)numbers[i];
    return sqrt(sum);
}

// Options as without a command line, for the optimiser of a Rig
static Options rig_options(double lr) {
    Options o;
    options_defaults(&o);
    o.lr = lr;
    return o;
}

static void rig_train(Rig* r, const Options* o, long steps) {
    for (long s = 0; s < steps; s++) {
        rig_step(r);
        adamw(&r->model, o, o->lr, gradient_norm(&r->model), s + 1);
    }
}

// ------------------------------------------------------------------------------------------------
// Finite differences

static double loss_with(Rig* r, size_t index, real value) {
    real keep = r->model.params[index];
    r->model.params[index] = value;
    double loss = rig_loss(r);
    r->model.params[index] = keep;
    return loss;
}

// Central differences of fourth order, of at most `limit` numbers of tensor t, spread over it, against the
// gradient. h = 1e-4: the truncation is h^4 / 30 = 3e-18 of the fifth derivative, which a LayerNorm of small
// numbers makes large. A loss near 2.4, a sum of hundreds of terms, is uncertain by some 10 ulp = 4e-15, over
// h 4e-11: that is no error.
static double difference_error(Rig* r, const Tensor* t, size_t limit) {
    const double h = 1e-4, rounding = 4e-11;
    size_t count = tensor_size(t), step = count > limit ? count / limit : 1;
    double error = 0, norm = 0;
    for (size_t e = t->first; e < t->first + count; e += step) {
        double value = (double)r->model.params[e], gradient = (double)r->model.grads[e];
        double near = loss_with(r, e, (real)(value + h)) - loss_with(r, e, (real)(value - h));
        double far = loss_with(r, e, (real)(value + 2 * h)) - loss_with(r, e, (real)(value - 2 * h));
        double numeric = (8 * near - far) / (12 * h);
        error += (numeric - gradient) * (numeric - gradient);
        norm += numeric * numeric;
    }
    double floor = rounding * sqrt((double)(count / step + 1));
    return sqrt(error) <= floor ? 0 : (sqrt(error) - floor) / sqrt(norm);
}

static void check_differences(const char* what, const Config* c, double sharpness, bool random) {
    Rig r;
    char worst[MAX_NAME] = "-";
    double largest = 0;
    rig_open(&r, c, 2, 1);
    if (random) randomise(&r.model, sharpness, 3);
    rig_step(&r);
    for (int i = 0; i < r.model.tensor_count; i++) {
        double error = difference_error(&r, &r.model.tensors[i], 12);
        if (keep_worst(&largest, error)) snprintf(worst, sizeof worst, "%s", r.model.tensors[i].name);
    }
    check(largest <= 2e-7, "differences, %s: largest relative error %.1e (%s)", what, largest, worst);
    rig_close(&r);
}

static void test_differences(void) {
    char what[128];
    set_threads(1);             // models of this size only lose by more
    for (int residual = RESIDUAL_NONE; residual <= RESIDUAL_IHC; residual++) {
        Config c = small_config(residual, 4);
        snprintf(what, sizeof what, "%s at the start", residual_names[residual]);
        check_differences(what, &c, 0, false);
        snprintf(what, sizeof what, "%s at a random point", residual_names[residual]);
        check_differences(what, &c, 1, true);
        for (int n = 1; n <= MAX_N && has_streams(residual); n += n < 4 ? 1 : 2) {
            c = small_config(residual, n);
            snprintf(what, sizeof what, "%s with %d streams", residual_names[residual], n);
            check_differences(what, &c, 1, true);
        }
    }
    for (int order = ORDER_CR; order <= ORDER_NONE; order++) {
        Config c = small_config(RESIDUAL_MHC, 3);
        c.order = order;
        snprintf(what, sizeof what, "mhc, Sinkhorn order %d", order);
        check_differences(what, &c, 1, true);
    }
    for (int residual = RESIDUAL_HC; residual <= RESIDUAL_IHC; residual++)
        for (int maps = 0; maps < 8; maps++) {
            Config c = small_config(residual, 2);
            c.maps = maps;
            c.is_static = maps % 2;
            snprintf(what, sizeof what, "%s, maps %d%s", residual_names[residual], maps,
                     c.is_static ? ", static" : "");
            check_differences(what, &c, 1, true);
        }
    Config c = small_config(RESIDUAL_MHC, 4);
    check_differences("mhc with sharp Sinkhorn logits", &c, 5, true);
    c.iters = 1;
    check_differences("mhc with one Sinkhorn iteration", &c, 2, true);
}

// ------------------------------------------------------------------------------------------------
// Matrix product. The operands are small whole numbers, so that every sum is exact and any order gives the
// same bits.

typedef struct { int M, N, K; bool a_turned, b_turned, with_bias, accumulate; } Product;
enum { STRIDE_GAP = 3 };

static void fill_whole(real* numbers, size_t count, uint64_t seed) {
    for (size_t i = 0; i < count; i++) numbers[i] = (real)((int)(hash64(seed, i) % 7) - 3);
}

// (rows, cols) in memory wider than it need be, or its transpose
static Matrix operand(const real* numbers, int rows, int cols, bool turned) {
    return turned ? matrix(numbers, 1, (size_t)(rows + STRIDE_GAP))
                  : matrix(numbers, (size_t)(cols + STRIDE_GAP), 1);
}

// Whether matmul and matmul_naive give the same bits, in out and beside it.
static bool product_equals_naive(const Product* p) {
    size_t stride = (size_t)(p->N + STRIDE_GAP), out_size = (size_t)p->M * stride;
    size_t a_size = (size_t)(p->M + STRIDE_GAP) * (size_t)(p->K + STRIDE_GAP),
           b_size = (size_t)(p->K + STRIDE_GAP) * (size_t)(p->N + STRIDE_GAP);
    real *a = numbers_of(a_size), *b = numbers_of(b_size), *bias = numbers_of((size_t)p->N),
         *out = numbers_of(out_size), *naive = numbers_of(out_size);
    fill_whole(a, a_size, 1);
    fill_whole(b, b_size, 2);
    fill_whole(bias, (size_t)p->N, 3);
    fill_whole(out, out_size, 4);
    memcpy(naive, out, out_size * sizeof(real));
    Matrix am = operand(a, p->M, p->K, p->a_turned), bm = operand(b, p->K, p->N, p->b_turned);
    const real* start = p->with_bias ? bias : NULL;
    matmul(out, stride, am, bm, p->M, p->N, p->K, start, p->accumulate);
    matmul_naive(naive, stride, am, bm, p->M, p->N, p->K, start, p->accumulate);
    bool same = same_bits(out, naive, out_size);
    free(a);
    free(b);
    free(bias);
    free(out);
    free(naive);
    return same;
}

// Sizes on both sides of tiles, panels of columns and of depth (512 floats); each plays each part.
static void test_matmul_shapes(void) {
    static const int sizes[] = {1, 2, 3, 7, 12, 13, 31, 32, 33, 73, 385, 513};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    for (int way = 0; way < 12; way++) {
        char wrong[64] = "";
        for (int i = 0; i < 3 * COUNT; i++) {
            int size[3] = {sizes[i % COUNT], sizes[(5 * i + 1) % COUNT], sizes[(7 * i + 3) % COUNT]};
            Product p = {size[i / COUNT], size[(i / COUNT + 1) % 3], size[(i / COUNT + 2) % 3],
                         way % 2 != 0,    way / 2 % 2 != 0,          way / 4 == 1,
                         way / 4 == 2};
            if (!product_equals_naive(&p))
                snprintf(wrong, sizeof wrong, ", not so M %d, N %d, K %d", p.M, p.N, p.K);
        }
        check(!wrong[0], "matmul %s%s%s: %d shapes as the naive product%s", way % 2 ? "a turned, " : "",
              way / 2 % 2 ? "b turned, " : "",
              way / 4 == 0   ? "from zero"
              : way / 4 == 1 ? "from a bias"
                             : "accumulated",
              3 * COUNT, wrong);
    }
}

// Numbers with fractions: a sum of K terms is uncertain by at most K EPS of the sum of their sizes, here K
// / 4.
static void test_matmul_rounding(void) {
    enum { M = 29, N = 401, K = 700 };
    real *a = numbers_of(M * K), *b = numbers_of(K * N), *out = numbers_of(M * N), *again = numbers_of(M * N);
    double worst = 0;
    fill(a, M * K, 1, 1);
    fill(b, K * N, 1, 2);
    set_threads(1);
    matmul(out, N, matrix(a, K, 1), matrix(b, N, 1), M, N, K, NULL, false);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < K; k++) sum += (double)a[i * K + k] * (double)b[k * N + j];
            keep_worst(&worst, fabs(sum - (double)out[i * N + j]));
        }
    check(worst <= K * EPS * K / 4, "matmul rounds as a sum of %d terms may: error %.1e", K, worst);
    for (int threads = 2; threads <= 3; threads++) {
        set_threads(threads);
        matmul(again, N, matrix(a, K, 1), matrix(b, N, 1), M, N, K, NULL, false);
        check(same_bits(out, again, M * N), "matmul on %d threads gives the bits of one", threads);
    }
    set_threads(1);
    a[3 * K + 600] = (real)NAN;
    b[5 * N + 390] = (real)INFINITY;
    matmul(again, N, matrix(a, K, 1), matrix(b, N, 1), M, N, K, NULL, false);
    bool good = true;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            bool spoiled = i == 3 || j == 390;
            good = good &&
                   (spoiled ? !isfinite((double)again[i * N + j]) : again[i * N + j] == out[i * N + j]);
        }
    check(good, "matmul passes NaN and infinity on to their row and column, and to no other");
    free(a);
    free(b);
    free(out);
    free(again);
}

static void test_matmul(void) {
    check(chunks(1, 3) == 1 && chunks(6, 3) == 2 && chunks(7, 3) == 3, "chunks are rounded up");
    test_matmul_shapes();
    test_matmul_rounding();
}

// ------------------------------------------------------------------------------------------------
// Elementary functions

// Error in units of the last place of `exact`
static double ulps(real got, double exact) {
    int exponent;
    frexp(exact, &exponent);
    return fabs((double)got - exact) / ldexp(EPS, exponent);
}

static real exp_of(real x) { return exp_real(x); }      // calls that cannot be optimised away
static real tanh_of(real x) { return tanh_real(x); }

// exp: the series ends at r^6, which costs 1.5 ulp at r = ln(2) / 2, and is summed in few roundings. tanh, 1
// - 2 / (1 + e): 3 ulp = 6 EPS of e are at most 3 EPS of the quotient; its roundings are the fourth.
static void test_exp(void) {
    enum { COUNT = 100000 };
    double worst_exp = 0, worst_tanh = 0;
    for (int i = 0; i < COUNT; i++) {
        real x = (real)(87 * uniform(1, (uint64_t)i)), y = (real)(10 * uniform(2, (uint64_t)i));
        keep_worst(&worst_exp, ulps(exp_of(x), exp((double)x)));
        keep_worst(&worst_tanh, fabs((double)tanh_of(y) - tanh((double)y)));
    }
    check(worst_exp <= 3, "exp is right to 3 ulp: %.2f", worst_exp);
    check(worst_tanh <= 4 * EPS, "tanh is right to %.1e: %.1e", 4 * EPS, worst_tanh);
    check(exp_of(0) == 1 && tanh_of(0) == 0, "exp(0) and tanh(0) are exact");
    check(isnan((double)exp_of((real)NAN)) && isnan((double)tanh_of((real)NAN)), "NaN stays NaN");
    check(exp_of((real)INFINITY) > (real)6e37 && exp_of(1000) > (real)6e37 && exp_of(-1000) < (real)2e-38 &&
              exp_of((real)-INFINITY) >= 0 && exp_of((real)-INFINITY) < (real)2e-38,
          "exp saturates on both sides");
    check(tanh_of((real)INFINITY) == 1 && tanh_of((real)-INFINITY) == -1 && tanh_of(1000) == 1 &&
              tanh_of(-1000) == -1,
          "tanh saturates");
}

static double gelu_exact(double x) {
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

// The error of tanh, times x / 2, and a few roundings of x. The slope has a term x / 2 (1 - t^2) ds: until t
// is 1 the factor of 1 - t^2 is at most 9, and 1 - t^2 is uncertain by 8 EPS. It is compared with a
// difference in double, good to 1e-9.
static void test_gelu(void) {
    enum { COUNT = 4099, FRACTION = 400 };
    const double h = 1e-5;
    real *x = numbers_of(COUNT), *y = numbers_of(COUNT), *d = numbers_of(COUNT);
    double worst = 0, worst_slope = 0;
    for (int i = 0; i < COUNT; i++) {
        x[i] = (real)((i - COUNT / 2) / (double)FRACTION);
        d[i] = 2;
    }
    gelu_forward(y, x, COUNT);
    gelu_backward(d, x, COUNT);
    for (int i = 0; i < COUNT; i++) {
        double slope = (gelu_exact((double)x[i] + h) - gelu_exact((double)x[i] - h)) / (2 * h);
        keep_worst(&worst, fabs((double)y[i] - gelu_exact((double)x[i])) / fmax(1, fabs((double)x[i])));
        keep_worst(&worst_slope, fabs((double)d[i] - 2 * slope));
    }
    check(worst <= 4 * EPS, "gelu as libm's tanh gives it: error %.1e", worst);
    check(worst_slope <= 1e-8 + 2 * 72 * EPS, "gelu's slope: error %.1e", worst_slope);
    real special[4] = {(real)NAN, (real)1e6, (real)-1e6, 0}, out[4], slopes[4] = {1, 1, 1, 1};
    gelu_forward(out, special, 4);
    gelu_backward(slopes, special, 4);
    check(isnan((double)out[0]) && out[1] == (real)1e6 && out[2] == 0 && out[3] == 0,
          "gelu of NaN, of huge numbers and of 0");
    check(isnan((double)slopes[0]) && slopes[1] == 1 && slopes[2] == 0 && slopes[3] == (real)0.5,
          "gelu's slope there");
    free(x);
    free(y);
    free(d);
}

static void test_sums(void) {
    enum { ROWS = 37, COLS = 131, MANY = (1 << 22) + 77 };    // more than one round of pieces
    real *a = numbers_of(ROWS * COLS), *b = numbers_of(ROWS * COLS), *sums = numbers_of(COLS),
         *first = numbers_of(COLS), *many = numbers_of(MANY);
    double exact[COLS], worst = 0, square = 0;
    fill(a, ROWS * COLS, 1, 1);
    fill(b, ROWS * COLS, 1, 2);
    for (int with_b = 0; with_b < 2; with_b++)
        for (int threads = 1; threads <= 3; threads++) {
            set_threads(threads);
            for (int c = 0; c < COLS; c++) {
                sums[c] = 1;
                exact[c] = 1;
                for (int r = 0; r < ROWS; r++)
                    exact[c] += (double)a[r * COLS + c] * (with_b ? (double)b[r * COLS + c] : 1);
            }
            add_column_sums(sums, a, with_b ? b : NULL, ROWS, COLS);
            keep_worst(&worst, error_against(sums, exact, COLS));
            if (threads == 1) memcpy(first, sums, sizeof(real) * COLS);
            else if (!same_bits(first, sums, COLS)) worst = (double)NAN;
        }
    check(worst <= ROWS * EPS,
          "column sums, added to what was there, the same bits on 1, 2, 3 threads: error %.1e", worst);
    fill(many, MANY, 1, 3);
    for (int i = 0; i < MANY; i++) square += (double)many[i] * (double)many[i];
    set_threads(1);
    double one = square_sum(many, MANY);
    set_threads(3);
    check(fabs(one / square - 1) <= 1e-12 && one == square_sum(many, MANY),
          "sum of squares of %d numbers, the same on 1 and 3 threads", MANY);
    set_threads(1);
    free(a);
    free(b);
    free(sums);
    free(first);
    free(many);
}

static void test_functions(void) {
    test_exp();
    test_gelu();
    test_sums();
}

// ------------------------------------------------------------------------------------------------
// Layers, each against its formula in double

// Sums of C terms of size 1 (or with means of 1): some EPS each, which mostly cancel. A factor of 32 is
// beyond all of them.
static void test_layernorm(void) {
    enum { C = 37 };
    const double h = 1e-6;
    real u[C], weight[C], bias[C], out[C], stats[2], dout[C], du[C], xhat[C];
    double exact[C], slope[C], normal_form[C];
    fill(u, C, 2, 1);
    fill(weight, C, 1, 2);
    fill(bias, C, 1, 3);
    fill(dout, C, 1, 4);
    layernorm_forward(out, stats, u, weight, bias, C);
    layernorm_backward(du, xhat, dout, stats, u, weight, C);
    for (int e = -1; e < C;
         e++) {    // -1: the function; else the slope along u[e], from a central difference
        double loss[2] = {0, 0};
        for (int side = 0; side < 2; side++) {
            double x[C], mean = 0, variance = 0;
            for (int c = 0; c < C; c++) x[c] = (double)u[c] + (c == e ? (side ? h : -h) : 0);
            for (int c = 0; c < C; c++) mean += x[c] / C;
            for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
            for (int c = 0; c < C; c++) {
                double unit = (x[c] - mean) / sqrt(variance + 1e-5),
                       y = unit * (double)weight[c] + (double)bias[c];
                loss[side] += (double)dout[c] * y;
                if (e < 0) {
                    normal_form[c] = unit;
                    exact[c] = y;
                }
            }
        }
        if (e >= 0) slope[e] = (loss[1] - loss[0]) / (2 * h);
    }
    check(error_against(out, exact, C) <= 32 * EPS, "layernorm: error %.1e", error_against(out, exact, C));
    check(error_against(xhat, normal_form, C) <= 32 * EPS, "layernorm's normalised input: error %.1e",
          error_against(xhat, normal_form, C));
    check(error_against(du, slope, C) <= 1e-8 + 32 * EPS, "layernorm's gradient: error %.1e",
          error_against(du, slope, C));
    real flat[C] = {0};
    layernorm_forward(out, stats, flat, weight, bias, C);
    check(same_bits(out, bias, C), "layernorm of zeros is the bias: its epsilon keeps it finite");
}

// Every query over every key it may see, and the way back
static void attention_naive(double* out, double* dqkv, const real* qkv, const real* dout, int B, int T, int C,
                            int NH) {
    int size = C / NH;
    double *p = (double*)allocate((size_t)T, sizeof(double)),
           *dp = (double*)allocate((size_t)T, sizeof(double));
    for (int i = 0; i < B * NH * T; i++) {
        int b = i / (NH * T), h = i / T % NH, t = i % T;
        size_t first = (size_t)b * T * 3 * C + (size_t)h * size, at_q = first + (size_t)t * 3 * C,
               at_out = ((size_t)b * T + t) * C + (size_t)h * size;
        double sum = 0, mean = 0, scale = 1 / sqrt((double)size);
        for (int j = 0; j <= t; j++) {
            double score = 0;
            for (int c = 0; c < size; c++)
                score += (double)qkv[at_q + c] * (double)qkv[first + (size_t)j * 3 * C + C + c];
            sum += p[j] = exp(scale * score);
        }
        for (int j = 0; j <= t; j++) {
            p[j] /= sum;
            dp[j] = 0;
            for (int c = 0; c < size; c++) {
                size_t v = first + (size_t)j * 3 * C + 2 * C + c;
                out[at_out + c] += p[j] * (double)qkv[v];
                dp[j] += (double)dout[at_out + c] * (double)qkv[v];
                dqkv[v] += p[j] * (double)dout[at_out + c];
            }
            mean += p[j] * dp[j];
        }
        for (int j = 0; j <= t; j++)
            for (int c = 0; c < size; c++) {
                size_t k = first + (size_t)j * 3 * C + C + c;
                dqkv[at_q + c] += p[j] * (dp[j] - mean) * scale * (double)qkv[k];
                dqkv[k] += p[j] * (dp[j] - mean) * scale * (double)qkv[at_q + c];
            }
    }
    free(p);
    free(dp);
}

// Scores of size s are uncertain by some EPS s, and so are probabilities, relatively: s is below 4 here.
static void check_attention(int B, int T, int C, int NH) {
    size_t wide = (size_t)B * T * 3 * C, narrow = (size_t)B * T * C;
    real *qkv = numbers_of(wide), *dqkv = numbers_of(wide), *out = numbers_of(narrow),
         *dout = numbers_of(narrow), *lse = numbers_of((size_t)B * NH * T),
         *scratch = numbers_of(attention_scratch_size(T) * (size_t)thread_count());
    double *exact = (double*)allocate(narrow, sizeof(double)),
           *dexact = (double*)allocate(wide, sizeof(double));
    fill(qkv, wide, 2, 1);
    fill(dout, narrow, 1, 2);
    fill(dqkv, wide, 1, 3);             // rubbish, which must be overwritten
    attention_forward(out, lse, qkv, scratch, B, T, 0, C, NH);
    attention_backward(dqkv, dout, out, lse, qkv, scratch, B, T, C, NH);
    attention_naive(exact, dexact, qkv, dout, B, T, C, NH);
    double error = relative_l2_to(out, exact, narrow), derror = relative_l2_to(dqkv, dexact, wide);
    check(error <= 16 * EPS && derror <= 32 * EPS, "attention, B %d, T %d, C %d, %d heads: errors %.1e, %.1e",
          B, T, C, NH, error, derror);
    free(qkv);
    free(dqkv);
    free(out);
    free(dout);
    free(lse);
    free(scratch);
    free(exact);
    free(dexact);
}

static void test_attention(void) {
    static const int cases[][4] = {{2, 1, 6, 2},  {3, 2, 6, 3},    {1, 63, 8, 2}, {1, 64, 8, 1},
                                   {2, 65, 6, 2}, {1, 130, 20, 1}, {1, 200, 5, 5}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_attention(cases[i][0], cases[i][1], cases[i][2], cases[i][3]);
}

static void test_cross_entropy(void) {
    static const int sizes[] = {1, 2, 11, 67};
    double worst = 0, dworst = 0, scale = 1 / 7.0;
    for (int i = 0; i < 4; i++)
        for (int target = 0; target < sizes[i]; target++) {
            real row[67];
            double logits[67], sum = 0, dexact[67];
            fill(row, 67, target % 2 ? 5 : 1e4, (uint64_t)target);     // also logits that overflow exp
            for (int v = 0; v < sizes[i]; v++) logits[v] = (double)row[v];
            double max = logits[0];
            for (int v = 0; v < sizes[i]; v++) max = fmax(max, logits[v]);
            for (int v = 0; v < sizes[i]; v++) sum += exp(logits[v] - max);
            for (int v = 0; v < sizes[i]; v++)
                dexact[v] = scale * (exp(logits[v] - max) / sum - (v == target));
            double loss = log(sum) + max - logits[target],
                   got = (double)cross_entropy(row, target, (real)scale, sizes[i]);
            keep_worst(&worst, fabs(got - loss) / fmax(1, fabs(max) + loss));
            keep_worst(&dworst, error_against(row, dexact, (size_t)sizes[i]));
        }
    check(worst <= 8 * EPS && dworst <= 8 * EPS, "cross-entropy, logits up to 1e4: errors %.1e, %.1e", worst,
          dworst);
}

static void test_embedding(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 3);
    Span span = {2, c.T, 0, 2 * c.T};
    bool good = true;
    rig_open(&r, &c, 2, 1);
    embedding_forward(&r.model, r.acts.state[0], r.tokens, span);
    for (int e = 0; e < 2 * c.T * c.n * c.C; e++) {
        int ch = e % c.C, row = e / (c.n * c.C);
        good = good && r.acts.state[0][e] == param(&r.model, WTE, 0)[r.tokens[row] * c.C + ch] +
                                                 param(&r.model, WPE, 0)[row % c.T * c.C + ch];
    }
    check(good, "the state starts as n copies of token and position embedding");
    rig_close(&r);
}

// No position sees a later one, no sequence another: whatever stands there, the same bits.
static void test_causality(void) {
    for (int residual = RESIDUAL_NONE; residual <= RESIDUAL_IHC; residual++) {
        Rig r, alone;
        Config c = small_config(residual, 3);
        c.T = 70;
        size_t V = (size_t)c.V, T = (size_t)c.T;
        rig_open(&r, &c, 3, 1);
        rig_open(&alone, &c, 1, 1);
        randomise(&r.model, 1, 3);
        randomise(&alone.model, 1, 3);
        rig_loss(&r);
        real* whole = rig_logits(&r, 3 * c.T);
        bool same = true;
        for (int b = 0; b < 3; b++) {
            memcpy(alone.tokens, r.tokens + b * c.T, sizeof(int32_t) * T);
            rig_loss(&alone);
            real* own = rig_logits(&alone, c.T);
            same = same && same_bits(own, whole + (size_t)b * T * V, T * V);
            free(own);
        }
        check(same, "%s: a sequence in a batch is computed as if it were alone", residual_names[residual]);
        r.tokens[c.T + 66] = (r.tokens[c.T + 66] + 1) % c.V;
        rig_loss(&r);
        real* changed = rig_logits(&r, 3 * c.T);
        check(same_bits(whole, changed, (T + 66) * V) &&
                  same_bits(whole + 2 * T * V, changed + 2 * T * V, T * V) &&
                  !same_bits(whole + (T + 66) * V, changed + (T + 66) * V, V),
              "%s: a token changes its own and later positions of its sequence alone",
              residual_names[residual]);
        free(whole);
        free(changed);
        rig_close(&r);
        rig_close(&alone);
    }
}

static void test_layers(void) {
    test_layernorm();
    test_attention();
    test_cross_entropy();
    test_embedding();
    test_causality();
}

// ------------------------------------------------------------------------------------------------
// Sinkhorn-Knopp against divisions written down one after another

static const char* const order_names[] = {"cr", "rc", "c", "r", "none"};

// R (n, n) from logits, R[out][in]: exp, less the largest of what is divided first, then columns and rows in
// the given order
static void sinkhorn_naive(double* R, const double* logits, int n, int order, int iters) {
    bool rows_first = order == ORDER_RC || order == ORDER_R;
    for (int e = 0; e < n * n; e++) {
        double max = order == ORDER_NONE ? 0 : -INFINITY;
        for (int k = 0; k < n && order != ORDER_NONE; k++)
            max = fmax(max, logits[rows_first ? e / n * n + k : k * n + e % n]);
        R[e] = exp(logits[e] - max);
    }
    for (int half = 0; half < 2 * iters && order != ORDER_NONE; half++) {
        bool rows = order == ORDER_RC ? half % 2 == 0
                                      : order == ORDER_R || (order == ORDER_CR && half % 2 == 1);
        if ((order == ORDER_C || order == ORDER_R) && half % 2) continue;
        for (int k = 0; k < n; k++) {
            double sum = 1e-12;
            for (int e = 0; e < n; e++) sum += rows ? R[k * n + e] : R[e * n + k];
            for (int e = 0; e < n; e++) R[rows ? k * n + e : e * n + k] /= sum;
        }
    }
}

static void to_lanes(Lane* lanes, const double* numbers, int count) {       // every lane the same
    for (int e = 0; e < count; e++)
        for (int l = 0; l < LANES; l++) lanes[e][l] = (real)numbers[e];
}

// Logits of size s: exp makes a relative error of s EPS of their rounding; divisions do not let it grow. The
// gradient's reference is a central difference, good to 1e-9; multiplying divisors back costs some ten
// roundings.
static void check_sinkhorn(int n, int order) {
    Lane R[MAX_N * MAX_N], d[MAX_N * MAX_N];
    static Lane sums[2 * MAX_ITERS * MAX_N];
    double worst = 0, dworst = 0, sizes[] = {0.5, 2, 8}, h = 1e-5;
    Config c = small_config(RESIDUAL_MHC, n);
    c.order = order;
    for (int i = 0; i < 9; i++) {
        double logits[MAX_N * MAX_N], weight[MAX_N * MAX_N], exact[MAX_N * MAX_N], dexact[MAX_N * MAX_N],
            side[MAX_N * MAX_N], largest = 0;
        c.iters = i / 3 == 0 ? 1 : i / 3 == 1 ? 3 : 20;
        for (int e = 0; e < n * n; e++) {
            logits[e] = (double)(real)(sizes[i % 3] * (order == ORDER_NONE ? 0.3 : 1) *
                                       uniform((uint64_t)i, (uint64_t)e));
            weight[e] = uniform((uint64_t)i + 100, (uint64_t)e);
        }
        to_lanes(R, logits, n * n);
        to_lanes(d, weight, n * n);
        sinkhorn_lanes(R, sums, &c);
        sinkhorn_naive(exact, logits, n, order, c.iters);
        for (int e = 0; e < n * n; e++)
            keep_worst(&worst, fabs((double)R[e][LANES - 1] - exact[e]) / fmax(1, exact[e]));
        sinkhorn_backward_lanes(d, R, sums, &c);
        for (int e = 0; e < n * n; e++) {
            dexact[e] = 0;
            for (int s = -1; s <= 1; s += 2) {
                double keep = logits[e];
                logits[e] += s * h;
                sinkhorn_naive(side, logits, n, order, c.iters);
                logits[e] = keep;
                for (int k = 0; k < n * n; k++) dexact[e] += s * weight[k] * side[k] / (2 * h);
            }
            largest = fmax(largest, fabs(dexact[e]));
        }
        for (int e = 0; e < n * n; e++)
            keep_worst(&dworst, fabs((double)d[e][LANES - 1] - dexact[e]) / fmax(1, largest));
    }
    check(worst <= 32 * EPS && dworst <= 1e-8 + 64 * EPS,
          "Sinkhorn %s, n = %d, 1 to 20 iterations: errors %.1e, gradient %.1e", order_names[order], n, worst,
          dworst);
}

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Over 4096 matrices of n = 4 with logits N(0, sd): rows sum to 1; columns as far from it as 20 iterations
// leave them: the quantile, of which 41 matrices lie beyond, is that of 20 000 in double within a factor of
// 2, and the largest not beyond theirs. No error is seen below some EPS, or the 1e-12 that is added to sums.
static void test_sinkhorn_convergence(void) {
    static const struct {
        double sd, p99, largest;
    } expected[] = {{0.5, 8e-15, 2e-11}, {1, 1.4e-6, 1.0e-3}, {2, 1.1e-2, 3.3e-2}, {3, 3.2e-2, 5.5e-2},
                    {4, 4.4e-2, 7.1e-2}, {6, 6.4e-2, 1.3e-1}, {8, 8.2e-2, 3.2e-1}};
    enum { MATRICES = 4096, N = 4 };
    double* errors = (double*)allocate(MATRICES, sizeof(double));
    Config c = small_config(RESIDUAL_MHC, N);
    for (int s = 0; s < 7; s++) {
        double row_error = 0, least = 0;
        for (int first = 0; first < MATRICES; first += LANES) {
            Lane R[N * N];
            for (int e = 0; e < N * N; e++)
                for (int l = 0; l < LANES; l++)
                    R[e][l] = (real)(expected[s].sd *
                                     normal((uint64_t)s, (uint64_t)((first + l) * N * N + e)));
            sinkhorn_lanes(R, NULL, &c);
            for (int l = 0; l < LANES; l++) {
                double* error = &errors[first + l];
                *error = 0;
                for (int i = 0; i < N; i++) {
                    double row = 0, column = 0;
                    for (int j = 0; j < N; j++) {
                        row += (double)R[i * N + j][l];
                        column += (double)R[j * N + i][l];
                        least = fmin(least, (double)R[i * N + j][l]);
                    }
                    keep_worst(&row_error, fabs(row - 1));
                    keep_worst(error, fabs(column - 1));
                }
            }
        }
        qsort(errors, MATRICES, sizeof *errors, compare_doubles);
        double p99 = errors[MATRICES * 99 / 100], largest = errors[MATRICES - 1], floor = 10 * EPS + 2e-11;
        check(row_error <= 1e-6 && row_error <= floor && least >= 0,
              "R with logits of deviation %.1f: rows sum to 1 (error %.1e), nothing is negative",
              expected[s].sd, row_error);
        check(p99 <= 2 * expected[s].p99 + floor && p99 >= expected[s].p99 / 2 - 1e-6 &&
                  largest <= expected[s].largest + floor,
              "its columns after 20 iterations: 99 %% within %.1e (known: %.1e), all within %.1e (%.1e)", p99,
              expected[s].p99, largest, expected[s].largest);
    }
    free(errors);
}

// What is divided first cancels a constant: exactly, because the largest is subtracted first. Logits are
// quarters, so that adding a whole number is exact.
static void test_sinkhorn_shift(void) {
    static const double shifts[] = {5, -3, 1000, -4000};
    for (int order = ORDER_CR; order <= ORDER_RC; order++) {
        Lane R[16], shifted[16];
        Config c = small_config(RESIDUAL_MHC, 4);
        c.order = order;
        for (int e = 0; e < 16; e++)
            for (int l = 0; l < LANES; l++) {
                R[e][l] = (real)((int)(hash64(1, (uint64_t)(e * LANES + l)) % 32) - 16) / 4;
                shifted[e][l] = R[e][l] + (real)shifts[order == ORDER_CR ? e % 4 : e / 4];
            }
        sinkhorn_lanes(R, NULL, &c);
        sinkhorn_lanes(shifted, NULL, &c);
        check(same_bits(R[0], shifted[0], 16 * LANES),
              "Sinkhorn %s: a constant added to a %s of logits changes no bit", order_names[order],
              order == ORDER_CR ? "column" : "row");
    }
}

static void test_sinkhorn(void) {
    for (int order = ORDER_CR; order <= ORDER_NONE; order++)
        for (int n = 1; n <= MAX_N; n++) check_sinkhorn(n, order);
    test_sinkhorn_convergence();
    test_sinkhorn_shift();
}

// ------------------------------------------------------------------------------------------------
// One sublayer written down from the papers (mHC Eq. 3, 5, 7, 8, 9), token by token in double. It can also
// make each mistake that is known from other implementations: the program must agree with it as it is, and be
// far from every mistaken one.

typedef enum {
    NO_MISTAKE,
    MIX_TRANSPOSED,
    NO_FACTOR_2,
    STATIC_MAPS,
    ROWS_FIRST,
    TANH_LEFT_IN,
    TANH_FORGOTTEN,
    NORM_FORGOTTEN,
    NORM_PER_STREAM,
    NORM_BEFORE_READ,
    STREAMS_COLLAPSED,
    OWN_STREAM_SWAPPED,
    MISTAKES
} Mistake;

static const struct {
    const char* what;
    int modes;
} mistakes[MISTAKES] = {
    // modes: bits of those that can make it
    {"", 0},
    {"the mixing is not transposed", 1 << RESIDUAL_HC | 1 << RESIDUAL_MHC},
    {"writes have their factor 2", 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"maps depend on the input", 1 << RESIDUAL_HC | 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"columns are normalised first, rows last", 1 << RESIDUAL_MHC},
    {"no tanh is left in from hc", 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"hc has its tanh", 1 << RESIDUAL_HC},
    {"the projection is divided by the root mean square",
     1 << RESIDUAL_HC | 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"the root mean square is that of all streams together", 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"LayerNorm comes after the read", 1 << RESIDUAL_HC | 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"streams are not collapsed and expanded between sublayers",
     1 << RESIDUAL_HC | 1 << RESIDUAL_MHC | 1 << RESIDUAL_IHC},
    {"column j of R comes from stream j in hc", 1 << RESIDUAL_HC},
};

enum { PAPER_C = 8, PAPER_N = 3, PAPER_K = PAPER_N * PAPER_C, PAPER_M = PAPER_N * PAPER_N + 2 * PAPER_N };

typedef struct {                // of one token
    double coef[PAPER_M];       // pre | post | res
    double ln[PAPER_C];         // what goes into F
    double y[PAPER_K];
} Paper;

static double paper_rms(const double* x, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return sqrt(sum / count + 1e-6);
}

static void paper_layernorm(double* out, const double* u, const real* weight, const real* bias) {
    double mean = 0, variance = 0;
    for (int c = 0; c < PAPER_C; c++) mean += u[c] / PAPER_C;
    for (int c = 0; c < PAPER_C; c++) variance += (u[c] - mean) * (u[c] - mean) / PAPER_C;
    for (int c = 0; c < PAPER_C; c++)
        out[c] = (u[c] - mean) / sqrt(variance + 1e-5) * (double)weight[c] + (double)bias[c];
}

// Logit m: scale (fn row . x / rms) + base. rms: of the streams, and last of all together
static double paper_logit(const Config* c, Connection p, const double* x, const double* rms, int m,
                          Mistake wrong) {
    int n = PAPER_N, e = m - 2 * n, map = m < n ? 0 : m < 2 * n ? 1 : 2;
    bool hc = c->residual == RESIDUAL_HC;
    int in = map < 2                       ? m % n
             : wrong == OWN_STREAM_SWAPPED ? e / n
                                           : e % n;    // hc: the stream that is weighed
    int row = !hc       ? m
              : map < 2 ? map
                        : 2 + e / n,
        first = hc ? in * PAPER_C : 0, width = hc ? PAPER_C : PAPER_K;
    double sum = 0;
    for (int i = 0; i < width; i++) {
        int stream = (first + i) / PAPER_C;
        double norm = wrong == NORM_FORGOTTEN ? 1 : hc || wrong == NORM_PER_STREAM ? rms[stream] : rms[n];
        sum += (double)p.fn[row * width + i] * x[first + i] / norm;
    }
    if (hc ? wrong != TANH_FORGOTTEN : wrong == TANH_LEFT_IN) sum = tanh(sum);
    return (wrong == STATIC_MAPS ? 0 : (double)p.scale[map]) * sum + (double)p.base[m];
}

static void paper_coefficients(double* coef, const Config* c, Connection p, const double* x,
                               const double* rms, Mistake wrong) {
    int n = PAPER_N;
    double a[PAPER_M], turned[PAPER_N * PAPER_N];
    for (int m = 0; m < PAPER_M; m++) {
        if (m < 2 * n || c->residual != RESIDUAL_IHC) a[m] = paper_logit(c, p, x, rms, m, wrong);
        else a[m] = (m - 2 * n) / n == (m - 2 * n) % n;
    }
    memcpy(coef, a, sizeof a);
    if (c->residual != RESIDUAL_HC)
        for (int m = 0; m < 2 * n; m++) coef[m] = (m < n || wrong == NO_FACTOR_2 ? 1 : 2) / (1 + exp(-a[m]));
    if (c->residual == RESIDUAL_MHC)
        sinkhorn_naive(coef + 2 * n, a + 2 * n, n, wrong == ROWS_FIRST ? ORDER_RC : ORDER_CR, c->iters);
    for (int e = 0; e < n * n; e++) turned[e] = coef[2 * n + e % n * n + e / n];
    if (wrong == MIX_TRANSPOSED) memcpy(coef + 2 * n, turned, sizeof turned);
}

// A token of sublayer k of the model: from its state x (n, C) and F's output. fixed_rms: norms to use instead
// of x's, or NULL
static void paper_token(Paper* t, const Model* m, int k, const double* state, const real* f,
                        const double* fixed_rms, Mistake wrong) {
    int n = PAPER_N, C = PAPER_C;
    const real *weight = param(m, k % 2 ? LN_2_W : LN_1_W, k / 2),
               *bias = param(m, k % 2 ? LN_2_B : LN_1_B, k / 2);
    double x[PAPER_K], rms[PAPER_N + 1], u[PAPER_C] = {0}, read[PAPER_C] = {0}, normed[PAPER_C];
    for (int i = 0; i < PAPER_K; i++) {
        x[i] = state[i];
        if (wrong == STREAMS_COLLAPSED) x[i] = (state[i % C] + state[C + i % C] + state[2 * C + i % C]) / n;
    }
    for (int i = 0; i <= n; i++)
        rms[i] = fixed_rms ? fixed_rms[i] : i < n ? paper_rms(x + i * C, C) : paper_rms(x, PAPER_K);
    paper_coefficients(t->coef, &m->c, connection_of(m, k), x, rms, wrong);
    for (int i = 0; i < n; i++) {
        paper_layernorm(normed, x + i * C, weight, bias);
        for (int c = 0; c < C; c++) {
            u[c] += t->coef[i] * x[i * C + c];
            read[c] += t->coef[i] * normed[c];
            t->y[i * C + c] = t->coef[n + i] * (double)f[c];
            for (int j = 0; j < n; j++) t->y[i * C + c] += t->coef[2 * n + i * n + j] * x[j * C + c];
        }
    }
    if (wrong == NORM_BEFORE_READ) memcpy(t->ln, read, sizeof read);
    else paper_layernorm(t->ln, u, weight, bias);
}

// The program's sublayer k against the formula, over all tokens
static double paper_error(const Rig* r, int k, Mistake wrong) {
    const Activations* a = &r->acts;
    double worst = 0;
    for (int row = 0; row < a->B * a->T; row++) {
        Paper t;
        double x[PAPER_K];
        for (int i = 0; i < PAPER_K; i++) x[i] = (double)a->state[k][row * PAPER_K + i];
        paper_token(&t, &r->model, k, x, a->sub[k].f + row * PAPER_C, NULL, wrong);
        keep_worst(&worst, error_against(a->sub[k].coef + row * PAPER_M, t.coef, PAPER_M));
        for (int c = 0; c < PAPER_C; c++) {     // what is read shows by itself: LayerNorm hides its mean
            double u = -(double)a->sub[k].u[row * PAPER_C + c];
            for (int i = 0; i < PAPER_N; i++) u += t.coef[i] * x[i * PAPER_C + c];
            keep_worst(&worst, fabs(u));
        }
        keep_worst(&worst, error_against(a->sub[k].ln + row * PAPER_C, t.ln, PAPER_C));
        keep_worst(&worst, error_against(a->state[k + 1] + row * PAPER_K, t.y, PAPER_K));
    }
    return worst;
}

// sum of weights times y and ln: a loss whose slope along x is what the program's backward pass must give
static double paper_loss(const Rig* r, int k, int row, const double* x, const real* dy, const real* dln,
                         const double* fixed_rms) {
    Paper t;
    double loss = 0;
    paper_token(&t, &r->model, k, x, r->acts.sub[k].f + row * PAPER_C, fixed_rms, NO_MISTAKE);
    for (int i = 0; i < PAPER_K; i++) loss += (double)dy[row * PAPER_K + i] * t.y[i];
    for (int c = 0; c < PAPER_C; c++) loss += (double)dln[row * PAPER_C + c] * t.ln[c];
    return loss;
}

// The gradient of a sublayer's input (F's output given) against central differences of the formula; with
// norms held fixed the formula lacks the term that is easily forgotten.
static double paper_gradient_error(Rig* r, int k, bool rms_fixed) {
    Activations* a = &r->acts;
    int rows = a->B * a->T, width = rows * PAPER_K;
    const double h = 1e-5;
    real *dy = numbers_of((size_t)width), *dln = numbers_of((size_t)width);
    double *slope = (double*)allocate((size_t)width, sizeof(double)), x[PAPER_K], rms[PAPER_N + 1];
    fill(dy, (size_t)width, 1, 1);
    fill(dln, (size_t)width, 1, 2);
    memcpy(a->dstate, dy, sizeof(real) * (size_t)width);
    memcpy(a->dln, dln, sizeof(real) * (size_t)(rows * PAPER_C));
    connection_write_backward(&r->model.c, a, a->du, a->state[k], &a->sub[k], rows);
    connection_backward(&r->model, a, a->state[k], &a->sub[k], k, rows);
    for (int e = 0; e < width; e++) {
        int row = e / PAPER_K, i = e % PAPER_K;
        for (int j = 0; j < PAPER_K; j++) x[j] = (double)a->state[k][row * PAPER_K + j];
        for (int j = 0; j <= PAPER_N; j++)
            rms[j] = j < PAPER_N ? paper_rms(x + j * PAPER_C, PAPER_C) : paper_rms(x, PAPER_K);
        x[i] += h;
        slope[e] = paper_loss(r, k, row, x, dy, dln, rms_fixed ? rms : NULL) / (2 * h);
        x[i] -= 2 * h;
        slope[e] -= paper_loss(r, k, row, x, dy, dln, rms_fixed ? rms : NULL) / (2 * h);
    }
    double error = relative_l2_to(a->dstate, slope, (size_t)width);
    free(dy);
    free(dln);
    free(slope);
    return error;
}

// Tolerances: a logit is a sum of 24 products of size 1, times 1 over the smallest rms, through exp and few
// divisions: below 200 EPS; the slope has a difference's 1e-8 besides. A mistake must show a hundred times
// that.
static void test_formulas(void) {
    double tolerance = 200 * EPS, slope_tolerance = 2e-8 + 200 * EPS;
    for (int residual = RESIDUAL_HC; residual <= RESIDUAL_IHC; residual++) {
        Rig r;
        Config c = small_config(residual, PAPER_N);
        c.iters = 3;            // so that R is not converged, and shows its order and its iterations
        rig_open(&r, &c, 2, 1);
        randomise(&r.model, 1.5, 5);
        rig_loss(&r);
        for (int k = 0; k < 2 * c.L; k++)
            check(paper_error(&r, k, NO_MISTAKE) <= tolerance,
                  "%s: sublayer %d is the paper's formula: error %.1e", residual_names[residual], k,
                  paper_error(&r, k, NO_MISTAKE));
        for (int wrong = 1; wrong < MISTAKES; wrong++)
            if (mistakes[wrong].modes >> residual & 1)
                check(paper_error(&r, 1, (Mistake)wrong) > 100 * tolerance,
                      "%s: %s (else it would differ by %.1e)", residual_names[residual], mistakes[wrong].what,
                      paper_error(&r, 1, (Mistake)wrong));
        zero_gradients(&r.model);
        double error = paper_gradient_error(&r, 1, false), without = paper_gradient_error(&r, 1, true);
        check(error <= slope_tolerance, "%s: the gradient of a sublayer's input: error %.1e",
              residual_names[residual], error);
        check(without > 100 * slope_tolerance, "%s: it has the term through the root mean square (else %.1e)",
              residual_names[residual], without);
        rig_close(&r);
    }
}

// ------------------------------------------------------------------------------------------------
// The start: every mode is the plain model, and yet not a trap

// The largest difference of two models' logits, over their size
static double logits_distance(Rig* a, Rig* b) {
    int rows = a->acts.B * a->model.c.T;
    rig_loss(a);
    rig_loss(b);
    real *x = rig_logits(a, rows), *y = rig_logits(b, rows);
    double worst = 0, size = 0;
    for (int i = 0; i < rows * a->model.c.V; i++) {
        keep_worst(&worst, fabs((double)x[i] - (double)y[i]));
        size = fmax(size, fabs((double)y[i]));
    }
    free(x);
    free(y);
    return worst / size;
}

// Random common weights, connections at their start
static void randomise_common(Model* m, uint64_t seed) {
    randomise(m, 1, seed);
    for (int i = 0; i < m->tensor_count; i++)
        if (is_connection(&m->tensors[i])) model_initialise_tensor(m, &m->tensors[i], seed);
}

// Each of 2L sublayers makes the streams differ by a few roundings of sums of n + 1 terms; LayerNorm's
// divisor does the rest.
static void check_start(const char* what, const Config* c) {
    double worst = 0;
    Config plain_c = small_config(RESIDUAL_PLAIN, 1);
    for (int random = 0; random < 2; random++) {
        Rig r, plain;
        rig_open(&r, c, 3, 1);
        rig_open(&plain, &plain_c, 3, 1);
        if (random) {
            randomise_common(&r.model, 9);
            randomise_common(&plain.model, 9);
        }
        keep_worst(&worst, logits_distance(&r, &plain));
        rig_close(&r);
        rig_close(&plain);
    }
    check(worst <= 100 * EPS, "%s starts as the plain model: logits differ by %.1e", what, worst);
}

static void test_start_is_plain(void) {
    char what[128];
    for (int residual = RESIDUAL_HC; residual <= RESIDUAL_IHC; residual++) {
        for (int n = 1; n <= MAX_N; n++) {
            Config c = small_config(residual, n);
            snprintf(what, sizeof what, "%s with %d streams", residual_names[residual], n);
            check_start(what, &c);
        }
        for (int maps = 0; maps < 8; maps++) {
            Config c = small_config(residual, 4);
            c.maps = maps;
            c.is_static = maps % 2;
            snprintf(what, sizeof what, "%s, maps %d%s", residual_names[residual], maps,
                     c.is_static ? ", static" : "");
            check_start(what, &c);
        }
    }
    for (int order = ORDER_RC; order <= ORDER_NONE; order++) {
        Config c = small_config(RESIDUAL_MHC, 4);
        c.order = order;
        snprintf(what, sizeof what, "mhc, Sinkhorn order %s", order_names[order]);
        check_start(what, &c);
    }
}

// How far apart the streams of the last state are, over their size
static double stream_spread(const Rig* r) {
    const Config* c = &r->model.c;
    const real* x = r->acts.state[2 * c->L];
    size_t rows = (size_t)(r->acts.B * c->T), C = (size_t)c->C, n = (size_t)c->n;
    double difference = 0, size = 0;
    for (size_t e = 0; e < rows * n * C; e++) {
        double first = (double)x[e / (n * C) * n * C + e % C];
        difference += ((double)x[e] - first) * ((double)x[e] - first);
        size += first * first;
    }
    return sqrt(difference / size);
}

// With equal streams the gradient of every logit of R is 0 (mHC's rows sum to 1): the mixing learns from the
// second step on.
static void test_symmetry(void) {
    for (int residual = RESIDUAL_HC; residual <= RESIDUAL_IHC; residual++) {
        Rig r;
        Config c = small_config(residual, 4);
        Options o = rig_options(1e-2);
        rig_open(&r, &c, 2, 1);
        randomise_common(&r.model, 9);
        rig_step(&r);
        const real* res = grad_of(&r.model, "h.1.mlp_hc.base") + 2 * c.n;
        size_t count = residual == RESIDUAL_IHC ? 0 : 16;
        double at_start = stream_spread(&r), first = norm_of(res, count), posts = norm_of(res - c.n, 4);
        adamw(&r.model, &o, o.lr, 1, 1);
        rig_step(&r);
        double later = stream_spread(&r), second = norm_of(res, count);
        check(at_start <= 100 * EPS && later > 1e-4,
              "%s: streams are equal at first and differ after one step (by %.1e)", residual_names[residual],
              later);
        if (residual == RESIDUAL_MHC)
            check(
                first <= 100 * EPS * posts && second > 1000 * first,
                "mhc: R has no gradient at the first step and one at the second (%.1e, %.1e of the writes')",
                first / posts, second / posts);
        rig_close(&r);
    }
}

// Why the read rotates: from a read that is the same for all streams, they would stay copies for ever.
static void test_symmetric_trap(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 4);
    Options o = rig_options(1e-2);
    rig_open(&r, &c, 2, 1);
    for (int k = 0; k < 2 * c.L; k++)
        for (int i = 0; i < c.n; i++)
            param(&r.model, k % 2 ? MLP_BASE : ATTN_BASE, k / 2)[i] = (real)logit(1.0 / c.n);
    rig_train(&r, &o, 5);
    rig_loss(&r);
    check(stream_spread(&r) <= 1000 * EPS,
          "a symmetric start would be a trap: streams still equal after 5 steps (%.1e)", stream_spread(&r));
    rig_close(&r);
    rig_open(&r, &c, 2, 1);
    for (int k = 0; k < 2 * c.L; k++) {
        const real* base = param(&r.model, k % 2 ? MLP_BASE : ATTN_BASE, k / 2);
        double sum = 0;
        for (int i = 0; i < c.n; i++) sum += 1 / (1 + exp(-(double)base[i]));
        check(base[k % c.n] > 0 && base[(k + 1) % c.n] < 0 && fabs(sum - 1) <= 1e-6,
              "sublayer %d reads mostly stream %d at the start, in all 1", k, k % c.n);
    }
    rig_close(&r);
}

// With one stream R is 1, and the sublayer is the plain one with a gate before and after F.
static void test_one_stream(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 1);
    rig_open(&r, &c, 2, 1);
    randomise(&r.model, 3, 4);
    rig_loss(&r);
    double worst = 0;
    bool one = true;
    for (int k = 0; k < 2 * c.L; k++)
        for (int row = 0; row < 2 * c.T; row++) {
            const real *coef = r.acts.sub[k].coef + 3 * row, *x = r.acts.state[k] + row * c.C,
                       *y = r.acts.state[k + 1] + row * c.C;
            one = one && coef[2] == 1;
            for (int ch = 0; ch < c.C; ch++)
                keep_worst(&worst, fabs((double)y[ch] - (double)x[ch] -
                                        (double)coef[1] * (double)r.acts.sub[k].f[row * c.C + ch]) /
                                       fmax(1, fabs((double)y[ch])));
        }
    check(one, "n = 1: R is 1");
    check(worst <= 4 * EPS, "n = 1: y = x + post F(pre x): error %.1e", worst);
    rig_close(&r);
}

// The composite R_{2L-1} .. R_k has rows that sum to 1, at any depth and after training: 2L products of rows
// that sum to 1 within some EPS.
static void test_gain_after_training(void) {
    Rig r;
    Gain single[16], composite[16];
    Config c = small_config(RESIDUAL_MHC, 4);
    Options o = rig_options(2e-2);
    double worst = 0, backward = 0;
    c.L = 8;
    rig_open(&r, &c, 2, 1);
    rig_train(&r, &o, 30);
    rig_loss(&r);
    rig_gains(&r, single, composite);
    for (int k = 0; k < 2 * c.L; k++) {
        keep_worst(&worst, fabs(composite[k].forward_max - 1));
        keep_worst(&worst, fabs(composite[k].forward_min - 1));
        backward = fmax(backward, composite[k].backward_max - 1);
    }
    check(worst <= 1e-5 && worst <= 2 * c.L * 8 * EPS,
          "mhc after 30 steps: the composite forward gain is 1: error %.1e", worst);
    check(backward > worst, "and the mixing has learnt: the backward gain is off by %.1e", backward);
    rig_close(&r);
}

static void test_start(void) {
    test_start_is_plain();
    test_symmetry();
    test_symmetric_trap();
    test_one_stream();
    test_gain_after_training();
}

// ------------------------------------------------------------------------------------------------
// Files of the oracle: the whole model at random points, in float64 rounded to F32

static const char golden_dir[] = "dev/reference/golden";

// The options that a file's metadata names; others are left alone.
static Options options_of_file(const SafeFile* f) {
    Options o;
    Error e;
    options_defaults(&o);
    for (int i = 0; i < f->metadata_count; i++) {
        int row = options_find(f->metadata[i].key);
        if (row >= 0 && options_stored(row) &&
            !options_set(&o, f->metadata[i].key, f->metadata[i].value, f->path, &e))
            die("%s", e.text);
    }
    return o;
}

// A tensor of the file as `real`s, which the caller frees; NULL if it is not there
static real* file_numbers(const SafeFile* f, const char* name, size_t count) {
    Error e;
    const SafeTensor* t = safetensors_find(f, name);
    if (!t || safetensors_count(t) != count) return NULL;
    float* values = (float*)allocate(count, sizeof(float));
    real* numbers = numbers_of(count);
    if (!safetensors_read_f32(f, t, values, &e)) die("%s", e.text);
    for (size_t i = 0; i < count; i++) numbers[i] = (real)values[i];
    free(values);
    return numbers;
}

typedef struct { const SafeFile* f; double error; char worst[MAX_NAME]; int count; } Comparison;

static void compare_tensor(Comparison* c, const char* prefix, const char* name, const real* numbers,
                           size_t count) {
    char full[MAX_NAME];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    real* expected = file_numbers(c->f, full, count);
    if (keep_worst(&c->error, expected ? relative_l2(numbers, expected, count) : (double)NAN))
        snprintf(c->worst, sizeof c->worst, "%s", full);
    c->count++;
    free(expected);
}

static void compare_coefficients(Comparison* c, const Rig* r, int k) {
    static const char* const maps[] = {"pre", "post", "res"};
    int n = r->model.c.n, rows = r->acts.B * r->model.c.T, count = coefficient_count(&r->model.c);
    for (int map = 0; map < 3 && count; map++) {
        int width = map < 2 ? n : n * n;
        char name[MAX_NAME];
        real* numbers = numbers_of((size_t)(rows * width));
        for (int i = 0; i < rows * width; i++)
            numbers[i] = r->acts.sub[k].coef[i / width * count + map * n + i % width];
        snprintf(name, sizeof name, "hc.%d.%s", k, maps[map]);
        compare_tensor(c, "", name, numbers, (size_t)(rows * width));
        free(numbers);
    }
}

// Loads the parameters, runs the micro-batch forward and backward, and compares all that the file says.
static Comparison compare_file(const SafeFile* f) {
    Rig r;
    Error e;
    Comparison c = {f, 0, "-", 0};
    Options o = options_of_file(f);
    Config config = config_of(&o);
    size_t rows = (size_t)(o.batch * o.seq), V = (size_t)o.vocab;
    rig_open(&r, &config, (int)o.batch, 1);
    for (int i = 0; i < r.model.tensor_count; i++) {
        const Tensor* t = &r.model.tensors[i];
        const SafeTensor* found = safetensors_find(f, t->name);
        if (!found || !load_tensor(f, found, t, false, r.model.params + t->first, &e))
            keep_worst(&c.error, (double)NAN);
    }
    if (!safetensors_read_i32(f, safetensors_find(f, "tokens"), r.tokens, &e) ||
        !safetensors_read_i32(f, safetensors_find(f, "targets"), r.targets, &e))
        keep_worst(&c.error, (double)NAN);
    rig_step(&r);
    real* logits = rig_logits(&r, (int)rows);
    compare_tensor(&c, "", "logits", logits, rows * V);
    compare_tensor(&c, "", "losses", r.acts.losses, rows);
    for (int i = 0; i < r.model.tensor_count; i++)
        compare_tensor(&c, "grad.", r.model.tensors[i].name, r.model.grads + r.model.tensors[i].first,
                       tensor_size(&r.model.tensors[i]));
    for (int k = 0; k < 2 * config.L; k++) compare_coefficients(&c, &r, k);
    free(logits);
    rig_close(&r);
    return c;
}

// In double, only the file's rounding is left: 2^-24 of each number.
static void test_golden(void) {
    static const char* const files[] = {"none", "plain",         "hc",           "mhc",
                                        "ihc",  "mhc_rc_static", "mhc_pre_post", "mhc_c"};
    double tolerance = sizeof(real) == sizeof(float) ? 1e-5 : 1e-7;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[256];
        SafeFile f;
        Error e;
        snprintf(path, sizeof path, "%s/%s.safetensors", golden_dir, files[i]);
        if (!check(safetensors_open(&f, path, &e), "the oracle's %s is there", path)) continue;
        Comparison c = compare_file(&f);
        check(c.error <= tolerance && c.count > 10,
              "%s: logits, losses, gradients, coefficients (%d) are the oracle's: largest error %.1e (%s)",
              files[i], c.count, c.error, c.worst);
        safetensors_close(&f);
    }
}

// ------------------------------------------------------------------------------------------------
// Equal bits: threads, recomputation, micro-batches, chunks of the head

// Losses, gradients and weights of three steps, as one number
static uint64_t training_bits(const Config* c, int threads, int block) {
    Rig r;
    Options o = rig_options(1e-2);
    uint64_t hash = 0;
    set_threads(threads);
    rig_open(&r, c, 3, block);
    for (long s = 1; s <= 3; s++) {
        rig_step(&r);
        hash = hash_bits(hash, r.acts.losses, (size_t)(3 * c->T));
        hash = hash_bits(hash, r.model.grads, r.model.size);
        adamw(&r.model, &o, o.lr, gradient_norm(&r.model), s);
        hash = hash_bits(hash, r.model.params, r.model.size);
    }
    rig_close(&r);
    set_threads(1);
    return hash;
}

// A shape of which nothing is a multiple of lanes, tiles, or blocks of queries
static Config odd_config(int residual) {
    Config c = {3, 18, 3, 67, 37, residual, has_streams(residual) ? 3 : 1, 20, ORDER_CR, 7, false, 4};
    return c;
}

static void test_bits(void) {
    for (int residual = RESIDUAL_NONE; residual <= RESIDUAL_IHC; residual++) {
        Config c = odd_config(residual);
        uint64_t one = training_bits(&c, 1, 1);
        for (int threads = 2; threads <= 3; threads++)
            check(training_bits(&c, threads, 1) == one,
                  "%s: %d threads give the losses, gradients and weights of one", residual_names[residual],
                  threads);
        int blocks[] = {2, 3, automatic_block(&c), 2 * c.L};
        for (int i = 0; i < 4; i++)
            check(training_bits(&c, 1, blocks[i]) == one,
                  "%s: recomputing %d sublayers a block gives the same bits", residual_names[residual],
                  blocks[i]);
        check(training_bits(&c, 2, 2) == one, "%s: and so on two threads", residual_names[residual]);
    }
    static const int expected[][3] = {{12, 4, 4}, {30, 4, 6}, {1, 8, 1}, {8, 1, 2}};      // blocks, streams
    for (int i = 0; i < 4; i++) {
        Config c = odd_config(RESIDUAL_MHC);
        c.L = expected[i][0];
        c.n = expected[i][1];
        check(automatic_block(&c) == expected[i][2],
              "automatic recomputation: sqrt(nL / (n + 2)) is %d of %d (found %d)", expected[i][2], 2 * c.L,
              automatic_block(&c));
    }
}

// Sums in another order: some EPS of the terms' size, of which cancellation in a gradient leaves the
// contract's 1e-6.
static void test_head_rows(void) {
    Rig r, chunked;
    Config c = odd_config(RESIDUAL_MHC);
    double worst = 0;
    rig_open(&r, &c, 2, 1);
    rig_open(&chunked, &c, 2, 1);
    chunked.acts.head_rows = 3;
    rig_step(&r);
    rig_step(&chunked);
    check(r.acts.head_rows == 2 * c.T, "the head does all rows of a small model at once");
    check(same_bits(r.acts.losses, chunked.acts.losses, (size_t)(2 * c.T)),
          "the head in chunks of 3 rows: the same losses");
    for (int i = 0; i < r.model.tensor_count; i++) {
        const Tensor* t = &r.model.tensors[i];
        keep_worst(&worst,
                   relative_l2(chunked.model.grads + t->first, r.model.grads + t->first, tensor_size(t)));
    }
    check(worst <= 1e-6, "and the same gradients to rounding: %.1e", worst);
    rig_close(&r);
    rig_close(&chunked);
}

// ------------------------------------------------------------------------------------------------
// Gains and streams

static void test_gain_numbers(void) {
    Gain g;
    static const double G[] = {2, -1, 4, 0};        // rows 1 and 4, columns 6 and -1
    memset(&g, 0, sizeof g);
    gain_add(&g, G, 2, 0.5);
    gain_add(&g, G, 2, 0.5);
    check(g.forward_max == 4 && g.forward_min == 1 && g.backward_max == 6 && g.backward_min == 1,
          "forward gains are sums of rows, backward ones of columns, |of the sum|: %g %g, %g %g",
          g.forward_max, g.forward_min, g.backward_max, g.backward_min);
}

// R (n, n) of a token and sublayer, as it was made up
static void product_from(double* G, const Rig* r, int k, int row) {
    int n = r->model.c.n, count = coefficient_count(&r->model.c);
    double next[MAX_N * MAX_N];
    for (int e = 0; e < n * n; e++) G[e] = e / n == e % n;
    for (int s = k; s < 2 * r->model.c.L; s++) {            // what comes later acts from the left
        const real* R = r->acts.sub[s].coef + row * count + 2 * n;
        for (int e = 0; e < n * n; e++) {
            next[e] = 0;
            for (int h = 0; h < n; h++) next[e] += (double)R[e / n * n + h] * G[h * n + e % n];
        }
        memcpy(G, next, sizeof next);
    }
}

static void test_gain_products(void) {
    Rig r;
    Gain single[4], composite[4], expected;
    Config c = small_config(RESIDUAL_HC, 3);
    double worst = 0, G[MAX_N * MAX_N];
    rig_open(&r, &c, 1, 1);
    for (int k = 0; k < 2 * c.L; k++)
        fill(r.acts.sub[k].coef, (size_t)(c.T * coefficient_count(&c)), 2, (uint64_t)k);
    rig_gains(&r, single, composite);
    for (int k = 0; k < 2 * c.L; k++) {
        memset(&expected, 0, sizeof expected);
        for (int t = 0; t < c.T; t++) {
            product_from(G, &r, k, t);
            gain_add(&expected, G, c.n, 1.0 / c.T);
        }
        for (int i = 0; i < GAIN_FIELDS; i++)
            keep_worst(&worst, fabs(((double*)&composite[k])[i] / ((double*)&expected)[i] - 1));
    }
    check(worst <= 1e-12, "composite gains: products from the top down, means over tokens: error %.1e",
          worst);
    check(!memcmp(&single[3], &composite[3], sizeof(Gain)) && memcmp(&single[0], &composite[0], sizeof(Gain)),
          "the last composite is its sublayer's own");
    rig_close(&r);
    c = small_config(RESIDUAL_PLAIN, 1);
    rig_open(&r, &c, 1, 1);
    rig_gains(&r, single, composite);
    check(fabs(composite[0].forward_max - 1) <= 1e-15 && fabs(composite[0].backward_min - 1) <= 1e-15,
          "the plain residual has gain 1");
    rig_close(&r);
}

// S = Q diag Q^T, Q = I - 2 v v^T / |v|^2
static void test_eigenvalues(void) {
    static const double diagonal[] = {5, 3, 1, 0.25}, v[] = {1, 2, -1, 3};
    double Q[16], S[16], found[4], worst = 0;
    for (int e = 0; e < 16; e++) Q[e] = (e / 4 == e % 4) - 2 * v[e / 4] * v[e % 4] / 15;
    for (int e = 0; e < 16; e++) {
        S[e] = 0;
        for (int h = 0; h < 4; h++) S[e] += Q[e / 4 * 4 + h] * diagonal[h] * Q[e % 4 * 4 + h];
    }
    eigenvalues(S, 4);
    for (int i = 0; i < 4; i++) found[i] = S[5 * i];
    qsort(found, 4, sizeof *found, compare_doubles);
    for (int i = 0; i < 4; i++) keep_worst(&worst, fabs(found[i] - diagonal[3 - i]));
    check(worst <= 1e-14, "eigenvalues of a turned diagonal: error %.1e", worst);
    for (int n = 2; n <= MAX_N; n++) {
        double T[MAX_N * MAX_N], squares = 0, left = 0, off = 0;
        for (int e = 0; e < n * n; e++)
            T[e] = uniform((uint64_t)n, (uint64_t)(min_int(e / n, e % n) * n + e / n + e % n));
        for (int e = 0; e < n * n; e++) squares += T[e] * T[e];
        eigenvalues(T, n);
        for (int e = 0; e < n * n; e++) {
            left += T[e] * T[e];
            if (e / n != e % n) off = fmax(off, fabs(T[e]));
        }
        check(off <= 1e-14 && fabs(left / squares - 1) <= 1e-13,
              "eigenvalues, n = %d: nothing is left off the diagonal (%.1e), squares sum up to the same", n,
              off);
    }
}

static void test_streams(void) {
    static const struct {
        double gram[9];
        double rank;
    } cases[] = {{{1, 0, 0, 0, 1, 0, 0, 0, 1}, 3},
                 {{2, 2, 2, 2, 2, 2, 2, 2, 2}, 1},
                 {{1, 0, 1, 0, 4, 0, 1, 0, 1}, 1.970576654} /* sqrt 2 and 2 */};
    for (int i = 0; i < 3; i++) {
        double gram[9];
        memcpy(gram, cases[i].gram, sizeof gram);
        double rank = effective_rank(gram, 3), p = sqrt(2.0) / (sqrt(2.0) + 2),
               expected = i < 2 ? cases[i].rank : exp(-p * log(p) - (1 - p) * log(1 - p));
        check(fabs(rank - expected) <= 1e-6, "effective rank %.3f (found %.6f)", expected, rank);
    }
    StreamStats s;
    const real state[] = {3, 0, 0, 4, /* right angles */ 1,
                          1, 2, 2 /* one direction */};    // (2, n = 2, C = 2)
    stream_statistics(&s, state, 2, 2, 2);
    check(fabs(s.cosine - 0.5) <= 4 * EPS, "streams' cosine: the mean of 0 and 1 (%.6f)", s.cosine);
    check(fabs(s.share[0] - (9 / 25.0 + 2 / 10.0) / 2) <= 4 * EPS &&
              fabs(s.share[0] + s.share[1] - 1) <= 4 * EPS,
          "shares of the squared norm (%.6f)", s.share[0]);
    double p = 3 / 7.0, rank = exp(-p * log(p) - (1 - p) * log(1 - p));
    check(fabs(s.rank - (rank + 1) / 2) <= 1e-3, "their effective rank (%.6f)", s.rank);
}

static void test_streams_of_a_pass(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 3);
    StreamStats streams[5], own;
    bool same = true;
    rig_open(&r, &c, 2, 1);
    randomise(&r.model, 1, 3);
    memset(streams, 0, sizeof streams);
    r.acts.streams = streams;
    rig_loss(&r);
    for (int k = 0; k <= 2 * c.L; k++) {
        stream_statistics(&own, r.acts.state[k], 2 * c.T, c.n, c.C);
        same = same && !memcmp(&own, &streams[k], sizeof own);
    }
    check(same, "a forward pass looks at the streams of every state, the last too");
    rig_close(&r);
}

static void test_gains(void) {
    test_gain_numbers();
    test_gain_products();
    test_eigenvalues();
    test_streams();
    test_streams_of_a_pass();
}

// ------------------------------------------------------------------------------------------------
// Optimiser

static bool ends_with(const char* text, const char* end) {
    size_t length = strlen(text), size = strlen(end);
    return length >= size && !strcmp(text + length - size, end);
}

// By name, as the contract says it: 2-D weights and fn
static bool should_decay(const char* name) {
    return ends_with(name, ".fn") || (ends_with(name, ".weight") && !strstr(name, "ln_"));
}

// Four updates with random gradients in double beside the program's. A parameter of size 1 rounds once a
// step, and the update, at most lr, a few times.
static void test_adamw(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 2);
    Options o = rig_options(1e-2);
    double worst = 0;
    rig_open(&r, &c, 1, 1);
    size_t size = r.model.size;
    double *p = (double*)allocate(size, sizeof(double)), *m = (double*)allocate(size, sizeof(double)),
           *v = (double*)allocate(size, sizeof(double));
    for (size_t i = 0; i < size; i++) p[i] = (double)r.model.params[i];
    for (long step = 1; step <= 4; step++) {
        double norm = 0, lr = o.lr / (double)step;
        o.grad_clip = step == 3 ? 0 : step == 4 ? 1e9 : 1;          // clipped, clipped, off, not reached
        fill(r.model.grads, size, step == 2 ? 1e-3 : 1, (uint64_t)step);
        for (size_t i = 0; i < size; i++) norm += (double)r.model.grads[i] * (double)r.model.grads[i];
        norm = sqrt(norm);
        check(fabs(gradient_norm(&r.model) / norm - 1) <= 1e-12, "the norm of all gradients is %.3g", norm);
        adamw(&r.model, &o, lr, norm, step);
        double clip = step < 3 && norm > 1 ? 1 / (norm + 1e-6) : 1;
        for (int t = 0; t < r.model.tensor_count; t++)
            for (size_t i = r.model.tensors[t].first;
                 i < r.model.tensors[t].first + tensor_size(&r.model.tensors[t]); i++) {
                double d = (double)r.model.grads[i] * clip;
                m[i] = 0.9 * m[i] + 0.1 * d;
                v[i] = 0.95 * v[i] + 0.05 * d * d;
                double update = m[i] / (1 - pow(0.9, (double)step)) /
                                (sqrt(v[i] / (1 - pow(0.95, (double)step))) + 1e-8);
                p[i] -= lr * (update + (should_decay(r.model.tensors[t].name) ? 0.1 * p[i] : 0));
                keep_worst(&worst, fabs((double)r.model.params[i] - p[i]) / fmax(0.1, fabs(p[i])));
            }
    }
    check(worst <= 4 * 8 * EPS, "AdamW with clipping and decoupled decay: error %.1e", worst);
    free(p);
    free(m);
    free(v);
    rig_close(&r);
}

// Without gradients only decay moves a parameter.
static void test_decay(void) {
    Rig r;
    Config c = small_config(RESIDUAL_MHC, 2);
    Options o = rig_options(0.1);
    char wrong[MAX_NAME + 16] = "";
    int decayed = 0;
    rig_open(&r, &c, 1, 1);
    randomise(&r.model, 1, 1);
    real* before = numbers_of(r.model.size);
    memcpy(before, r.model.params, sizeof(real) * r.model.size);
    adamw(&r.model, &o, 0.1, 0, 1);
    for (int i = 0; i < r.model.tensor_count; i++) {
        const Tensor* t = &r.model.tensors[i];
        bool moved = !same_bits(before + t->first, r.model.params + t->first, tensor_size(t));
        if (moved != should_decay(t->name)) snprintf(wrong, sizeof wrong, "; not so %s", t->name);
        decayed += moved;
    }
    check(!wrong[0] && decayed == 2 + 6 * c.L,
          "weights, embeddings and fn decay; biases, LayerNorm, scale and base do not%s", wrong);
    free(before);
    rig_close(&r);
}

static void test_learning_rate(void) {
    static const struct {
        int schedule;
        long s;
        double factor;
    } cases[] = {// of 110 steps, 10 of them warm-up
                 {SCHEDULE_COSINE, 0, 0.1},
                 {SCHEDULE_COSINE, 9, 1},
                 {SCHEDULE_COSINE, 10, 1},
                 {SCHEDULE_COSINE, 60, 0.55},
                 {SCHEDULE_COSINE, 35, 0.1 + 0.9 * 0.853553390593274},
                 {SCHEDULE_COSINE, 110, 0.1},
                 {SCHEDULE_COSINE, 200, 0.1},
                 {SCHEDULE_LINEAR, 4, 0.5},
                 {SCHEDULE_LINEAR, 10, 1},
                 {SCHEDULE_LINEAR, 60, 0.55},
                 {SCHEDULE_LINEAR, 35, 0.775},
                 {SCHEDULE_LINEAR, 110, 0.1},
                 {SCHEDULE_WSD, 9, 1},
                 {SCHEDULE_WSD, 87, 1},
                 {SCHEDULE_WSD, 88, 1},
                 {SCHEDULE_WSD, 99, 0.55},
                 {SCHEDULE_WSD, 110, 0.1},
                 {SCHEDULE_STEP, 1, 0.2},
                 {SCHEDULE_STEP, 87, 1},
                 {SCHEDULE_STEP, 88, 0.316},
                 {SCHEDULE_STEP, 98, 0.316},
                 {SCHEDULE_STEP, 99, 0.1},
                 {SCHEDULE_STEP, 109, 0.1},
                 {SCHEDULE_CONSTANT, 0, 0.1},
                 {SCHEDULE_CONSTANT, 10, 1},
                 {SCHEDULE_CONSTANT, 109, 1}};
    static const char* const names[] = {"cosine", "wsd", "linear", "step", "constant"};
    Options o = rig_options(3e-3);
    o.steps = 110;
    o.warmup = 10;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        o.schedule = cases[i].schedule;
        double factor = learning_rate(&o, cases[i].s) / o.lr;
        check(fabs(factor - cases[i].factor) <= 1e-12,
              "%s: update %ld has %.6f of the learning rate (found %.6f)", names[o.schedule], cases[i].s,
              cases[i].factor, factor);
    }
    o.warmup = 0;
    o.schedule = SCHEDULE_COSINE;
    check(learning_rate(&o, 0) == o.lr, "without a warm-up the first update has all of it");
    o.warmup = 200;
    check(fabs(learning_rate(&o, 109) / o.lr - 0.55) <= 1e-12, "a warm-up longer than the run is cut off");
}

static void test_optimiser(void) {
    test_adamw();
    test_decay();
    test_learning_rate();
}

// ------------------------------------------------------------------------------------------------
// Layout: names, shapes and order of the contract's table

static void test_tensors(void) {
    enum {
        n = 3,
        C = 8,
        V = 11,
        T = 6,
        L = 2,
        ALL = 31,
        MHC = 1 << RESIDUAL_MHC,
        IHC = 1 << RESIDUAL_IHC,
        HC = 1 << RESIDUAL_HC
    };
    typedef struct {
        const char* name;
        int modes, rows, cols;
    } Row;    // cols 0: a vector
    static const Row ends[] = {{"wte.weight", ALL, V, C},
                               {"wpe.weight", ALL, T, C},
                               {"ln_f.weight", ALL, C, 0},
                               {"ln_f.bias", ALL, C, 0}};
    static const Row block[] = {{"attn_hc.fn", MHC, 15, n * C},
                                {"attn_hc.fn", HC, 5, C},
                                {"attn_hc.fn", IHC, 6, n * C},
                                {"attn_hc.base", MHC | HC, 15, 0},
                                {"attn_hc.base", IHC, 6, 0},
                                {"attn_hc.scale", MHC | HC, 3, 0},
                                {"attn_hc.scale", IHC, 2, 0},
                                {"ln_1.weight", ALL, C, 0},
                                {"ln_1.bias", ALL, C, 0},
                                {"attn.c_attn.weight", ALL, 3 * C, C},
                                {"attn.c_attn.bias", ALL, 3 * C, 0},
                                {"attn.c_proj.weight", ALL, C, C},
                                {"attn.c_proj.bias", ALL, C, 0},
                                {"mlp_hc.fn", MHC, 15, n * C},
                                {"mlp_hc.fn", HC, 5, C},
                                {"mlp_hc.fn", IHC, 6, n * C},
                                {"mlp_hc.base", MHC | HC, 15, 0},
                                {"mlp_hc.base", IHC, 6, 0},
                                {"mlp_hc.scale", MHC | HC, 3, 0},
                                {"mlp_hc.scale", IHC, 2, 0},
                                {"ln_2.weight", ALL, C, 0},
                                {"ln_2.bias", ALL, C, 0},
                                {"mlp.c_fc.weight", ALL, 4 * C, C},
                                {"mlp.c_fc.bias", ALL, 4 * C, 0},
                                {"mlp.c_proj.weight", ALL, C, 4 * C},
                                {"mlp.c_proj.bias", ALL, C, 0}};
    enum { BLOCK = sizeof block / sizeof *block };
    for (int residual = RESIDUAL_NONE; residual <= RESIDUAL_IHC; residual++) {
        Model m;
        Config c = small_config(residual, n);
        int next = 0;
        size_t size = 0;
        char wrong[2 * MAX_NAME + 64] = "";
        model_layout(&m, &c);
        for (int i = 0; i < 4 + L * BLOCK; i++) {
            int e = i - 2;                      // two tensors, the blocks, two tensors
            const Row* row = i < 2 ? &ends[i] : e < L * BLOCK ? &block[e % BLOCK] : &ends[i - L * BLOCK];
            char name[MAX_NAME];
            if (!(row->modes >> residual & 1)) continue;
            if (i < 2 || e >= L * BLOCK) snprintf(name, sizeof name, "%s", row->name);
            else snprintf(name, sizeof name, "h.%d.%s", e / BLOCK, row->name);
            const Tensor* t = &m.tensors[next++];
            bool right = next <= m.tensor_count && !strcmp(t->name, name) && t->rows == (size_t)row->rows &&
                         t->cols == (size_t)(row->cols ? row->cols : 1) &&
                         (t->spec->cols == DIM_1) == (row->cols == 0) && t->first == size;
            if (!right && !wrong[0])
                snprintf(wrong, sizeof wrong, "; not so %s, expected %s (%d, %d)", t->name, name, row->rows,
                         row->cols);
            size += (size_t)row->rows * (size_t)(row->cols ? row->cols : 1);
        }
        check(!wrong[0] && next == m.tensor_count && size == m.size,
              "%s: %d tensors have the contract's names, shapes and order%s", residual_names[residual], next,
              wrong);
        model_close(&m);
    }
}

// What number e of a tensor starts as; NaN where it is random. Sublayer k = 2 l + 1 in mlp_hc.
static double initial_number(const Config* c, const Tensor* t, int e) {
    int n = c->n, k = 2 * t->block + (strstr(t->name, "mlp_hc") != NULL), favourite = k % n, res = e - 2 * n;
    if (strstr(t->name, "ln_")) return ends_with(t->name, ".weight");
    if (ends_with(t->name, ".bias") || ends_with(t->name, ".fn")) return 0;
    if (ends_with(t->name, ".scale")) return 0.01;
    if (!ends_with(t->name, ".base")) return (double)NAN;
    if (c->residual == RESIDUAL_HC) return e < n ? e == favourite : e < 2 * n ? 1 : res / n == res % n;
    if (e < n) return e == favourite ? log(0.7 / 0.3) : log(0.3 / (n - 1) / (1 - 0.3 / (n - 1)));
    return e < 2 * n || res / n != res % n ? 0 : 4;
}

// Of N random numbers of deviation sd the root mean square is uncertain by sd / sqrt(2 N): 5 times that.
static void test_initial_values(void) {
    for (int residual = RESIDUAL_NONE; residual <= RESIDUAL_IHC; residual++) {
        Rig r;
        Config c = small_config(residual, 3);
        char wrong[MAX_NAME + 16] = "";
        rig_open(&r, &c, 1, 1);
        for (int i = 0; i < r.model.tensor_count; i++) {
            const Tensor* t = &r.model.tensors[i];
            const real* p = r.model.params + t->first;
            size_t count = tensor_size(t);
            double sd = ends_with(t->name, "c_proj.weight") ? 0.02 / sqrt(2.0 * c.L) : 0.02,
                   rms = norm_of(p, count) / sqrt((double)count);
            bool right = true;
            if (isnan(initial_number(&c, t, 0)))
                right = fabs(rms / sd - 1) <= 5 / sqrt(2.0 * (double)count) && p[0] != p[1];
            else
                for (size_t e = 0; e < count; e++)
                    right = right && fabs((double)p[e] - initial_number(&c, t, (int)e)) <= 4 * EPS;
            if (!right) snprintf(wrong, sizeof wrong, "; not so %s", t->name);
        }
        check(!wrong[0], "%s: every tensor starts as the contract says%s", residual_names[residual], wrong);
        rig_close(&r);
    }
}

static void test_layout(void) {
    test_tensors();
    test_initial_values();
}

// Counted by hand for L 2, C 8, V 11: 1848 weights but for positions, and 12 L C T for attention; with 4
// streams 4 connections of 795 weights, which read, write and mix 24 times C.
static void test_flops(void) {
    Model m;
    Config plain = small_config(RESIDUAL_PLAIN, 1), mhc = small_config(RESIDUAL_MHC, 4);
    model_layout(&m, &plain);
    check(flops_per_token(&m, 5) == 6 * 1848 + 12 * 2 * 8 * 5, "plain: %g FLOP a token",
          flops_per_token(&m, 5));
    model_close(&m);
    model_layout(&m, &mhc);
    check(flops_per_token(&m, 5) == 6 * (1848 + 4 * 795) + 12 * 2 * 8 * 5 + 6 * 4 * 24 * 8,
          "mhc: %g FLOP a token", flops_per_token(&m, 5));
    model_close(&m);
}

// ------------------------------------------------------------------------------------------------

enum { FLOAT = 1, DOUBLE = 2, BOTH = FLOAT | DOUBLE };
typedef struct { const char* name; void (*run)(void); int builds; } Section;
static const Section sections[] = {
    {"matmul", test_matmul, BOTH},
    {"functions", test_functions, BOTH},
    {"layers", test_layers, BOTH},
    {"sinkhorn", test_sinkhorn, BOTH},
    {"formulas", test_formulas, BOTH},
    {"start", test_start, FLOAT},
    {"golden", test_golden, BOTH},
    {"bits", test_bits, FLOAT},
    {"head rows", test_head_rows, BOTH},
    {"gains", test_gains, BOTH},
    {"optimiser", test_optimiser, BOTH},
    {"layout", test_layout, FLOAT},
    {"flops", test_flops, FLOAT},
    {"differences", test_differences, DOUBLE},
};

int main(int argc, char** argv) {
    int build = sizeof(real) == sizeof(float) ? FLOAT : DOUBLE;
    wait_briefly(argv);
    set_threads(1);             // models of this size only lose by more
    for (size_t s = 0; s < sizeof sections / sizeof *sections; s++)
        if (sections[s].builds & build && (argc < 2 || strstr(sections[s].name, argv[1]))) sections[s].run();
    return check_summary();
}
