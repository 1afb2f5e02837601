// test_gpt_mhc.c: checks the CPU reference. Built twice: with REAL=double it holds every gradient of every residual
// mode against finite differences; with float, what training relies on: invariants, equal bits, files, resume.
//     ./test_gpt_mhc [part of a check's section name]

#define TESTING
#include "train_gpt_mhc.c"
#include "host/check.h"

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

// Far from the start: every parameter random, so that no term hides behind a zero. sharpness scales base (logits of
// Sinkhorn); connections' scales are near 1.
static void randomise(Model* m, double sharpness, uint64_t seed) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        double sd = t->spec->init == INIT_HC_BASE ? sharpness : t->spec->init == INIT_ZERO && t->cols > 1 ? 0.3 : 0.2;
        for (size_t e = 0; e < tensor_size(t); e++) {
            double mean = t->spec->init == INIT_ONE || t->spec->init == INIT_HC_SCALE;
            m->params[t->first + e] = (real)(mean + sd * normal(hash64(seed, (uint64_t)i), e));
        }
    }
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

static const char* const residual_names[] = {"none", "plain", "hc", "mhc", "ihc"};

// ------------------------------------------------------------------------------------------------
// Finite differences

static double loss_with(Rig* r, size_t index, real value) {
    real keep = r->model.params[index];
    r->model.params[index] = value;
    double loss = rig_loss(r);
    r->model.params[index] = keep;
    return loss;
}

// Central differences of fourth order, of at most `limit` numbers of tensor t, spread over it, against the gradient.
// h = 3e-4: the truncation is h^4 / 30 = 3e-16 of the fifth derivative. A loss near 2.4, a sum of hundreds of terms, is
// uncertain by some 10 ulp = 4e-15, over h 1e-11: that much of a difference is no error.
static double difference_error(Rig* r, const Tensor* t, size_t limit) {
    const double h = 3e-4, rounding = 1e-11;
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
        if (!(error <= largest)) {
            largest = error;
            snprintf(worst, sizeof worst, "%s", r.model.tensors[i].name);
        }
    }
    check(largest <= 1e-6, "differences, %s: largest relative error %.1e (%s)", what, largest, worst);
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
            snprintf(what, sizeof what, "%s, maps %d%s", residual_names[residual], maps, c.is_static ? ", static" : "");
            check_differences(what, &c, 1, true);
        }
    Config c = small_config(RESIDUAL_MHC, 4);
    check_differences("mhc with sharp Sinkhorn logits", &c, 5, true);
    c.iters = 1;
    check_differences("mhc with one Sinkhorn iteration", &c, 2, true);
}

// ------------------------------------------------------------------------------------------------

// Which build a section belongs to: differences need double; what training relies on is checked as it trains, in float.
typedef struct { const char* name; void (*run)(void); size_t real_size; } Section;
static const Section sections[] = {
    {"differences", test_differences, sizeof(double)},
};

int main(int argc, char** argv) {
    for (size_t s = 0; s < sizeof sections / sizeof *sections; s++)
        if (sections[s].real_size == sizeof(real) && (argc < 2 || strstr(sections[s].name, argv[1]))) sections[s].run();
    return check_summary();
}
