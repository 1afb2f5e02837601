// sinkhorn.cu: the mixing of a token from its logits (mHC Eq. 9), and back. Floor: 64 bytes read and 64
// written a token; on the way back 80 for each slab of channels, 64 of logits, 16 of post, and 80 written.

#include "lab.cuh"

// 1. A token a thread, straight from memory and back: lanes are 96 bytes apart, so that a sector of 32 bytes
//    is asked for again for every number. On the way back the divisors are in local memory, which is memory.
enum { NAIVE_ITERS = 20 };
static __global__ void naive_forward_kernel(float* coef, const float* mix, const float* base,
                                            const float* scale, int rows) {
    size_t row = (size_t)blockIdx.x * 128 + threadIdx.x;
    if (row >= (size_t)rows) return;
    float R[N * N];
    for (int e = 0; e < N * N; e++) R[e] = scale[2] * mix[row * COEFS + 2 * N + e] + base[2 * N + e];
    exp_lines<N, false>(R, true);
    for (int t = 0; t < NAIVE_ITERS; t++) {
        divide_lines<N, false>(R, NULL, 0);
        divide_lines<N, true>(R, NULL, 0);
    }
    for (int e = 0; e < N * N; e++) coef[row * COEFS + 2 * N + e] = R[e];
}
static __global__ void naive_backward_kernel(float* dlogit, const float* dcoef, const float* coef,
                                             const float* mix, const float* base, const float* scale,
                                             int rows) {
    size_t row = (size_t)blockIdx.x * 128 + threadIdx.x;
    if (row >= (size_t)rows) return;
    float R[N * N], d[N * N], divisors[2 * NAIVE_ITERS * N];
    for (int e = 0; e < N * N; e++) {
        R[e] = scale[2] * mix[row * COEFS + 2 * N + e] + base[2 * N + e];
        d[e] = dcoef[row * COEFS + 2 * N + e];
    }
    exp_lines<N, false>(R, true);
    for (int t = 0; t < NAIVE_ITERS; t++) {
        divide_lines<N, false>(R, divisors + 2 * t * N, 1);
        divide_lines<N, true>(R, divisors + (2 * t + 1) * N, 1);
    }
    for (int t = NAIVE_ITERS - 1; t >= 0; t--) {
        divide_lines_backward<N, true>(d, R, divisors + (2 * t + 1) * N, 1);
        divide_lines_backward<N, false>(d, R, divisors + 2 * t * N, 1);
    }
    for (int i = 0; i < N; i++) {
        float post = coef[row * COEFS + N + i];
        dlogit[row * 5 * N + i] = dcoef[row * COEFS + N + i] * post * (1 - post / 2);
    }
    for (int e = 0; e < N * N; e++) dlogit[row * 5 * N + N + e] = d[e] * R[e];
}

// 2. sinkhorn_forward_kernel and sinkhorn_backward_kernel of mhc_fused.cuh: the same arithmetic; memory is
//    moved in whole sectors through shared memory, which also has the divisors.

// ------------------------------------------------------------------------------------------------

enum { SLABS = 3 };             // that a token's dpost and dres come from

struct Tensors {
    Numbers dcoef;              // (rows, 24) sums of parts
    Device<float> mix, base, scale, coef, dsum, parts, dlogit;
    int lines;
    explicit Tensors(Point& p)
        : dcoef(p.coef.size()), mix(p.mix), base(numbers_at(p.base(), p.M)),
          scale(numbers_at(p.scale(), p.identity() ? 2 : 3)), coef(p.coef), dsum(p.coef.size()),
          parts((size_t)SLABS * 5 * p.rows * N), dlogit((size_t)p.rows * 5 * N), lines(p.identity() ? 1 : 5) {
        size_t rows = p.rows;
        Numbers all(SLABS * lines * rows * N);
        for (size_t e = 0; e < all.size(); e++) {
            all[e] = (float)normal(41, e);
            dcoef[e / N % rows * COEFS + N + e / N / rows % lines * N + e % N] += all[e];   // slab by slab
        }
        dsum.put(dcoef);
        parts.put(all);
    }
};

static void naive_forward(Tensors& t, const Point& p) {
    naive_forward_kernel<<<ceil_div(p.rows, 128), 128>>>(t.coef.at, t.mix.at, t.base.at, t.scale.at, p.rows);
    LAUNCHED();
}
static void naive_backward(Tensors& t, const Point& p) {
    naive_backward_kernel<<<ceil_div(p.rows, 128), 128>>>(t.dlogit.at, t.dsum.at, t.coef.at, t.mix.at,
                                                          t.base.at, t.scale.at, p.rows);
    LAUNCHED();
}
static void fused_forward(Tensors& t, const Point& p) {
    fused_sinkhorn_forward_gpu(t.coef.at, t.mix.at, t.base.at, t.scale.at, p.c.iters, p.rows, 0);
}
static void fused_backward(Tensors& t, const Point& p) {
    fused_sinkhorn_backward_gpu(t.dlogit.at, t.parts.at, SLABS, t.coef.at, t.mix.at, t.base.at, t.scale.at,
                                p.c.iters, p.identity(), p.rows, 0);
}

// The reference's gradients of the logits of post and res
static Numbers expected_backward(Point& p, const Tensors& t) {
    size_t rows = p.rows, M = p.M, width = (size_t)t.lines * N;
    Numbers d = t.dcoef, base(rows * M), scale(rows * M), z(rows * M), shrink(rows), out(rows * width);
    for (size_t r = 0; r < rows; r += LANES) {
        CoefficientGrads g = {&d[r * COEFS], &base[r * M], &scale[r * M], &z[r * M], &shrink[r]};
        coefficients_backward(g, &p.c, &p.coef[r * COEFS], &p.mix[r * M], &p.rnorm[r], connection_of(&p.m, 1),
                              min_int(LANES, (int)(rows - r)));
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t e = 0; e < width; e++) out[r * width + e] = base[r * M + N + e];
    return out;
}

static void check(Point& p, Tensors& t, bool fast) {
    char label[128];
    size_t width = (size_t)t.lines * N;
    snprintf(label, sizeof label, "%s, %s, iterations %d", fast ? "fused" : "naive", p.name, p.c.iters);
    if (!p.identity()) {
        Numbers cleared = p.coef;
        for (size_t e = 0; e < cleared.size(); e++) cleared[e] = e % COEFS < 2 * N ? p.coef[e] : NAN;
        t.coef.put(cleared);
        fast ? fused_forward(t, p) : naive_forward(t, p);
        compare(label, "coefficients", t.coef.get(), p.coef, FP32_TOLERANCE);
    }
    t.coef.put(p.coef);
    fast ? fused_backward(t, p) : naive_backward(t, p);
    Numbers found = t.dlogit.get();
    found.resize(p.rows * width);
    compare(label, "gradients of the logits", found, expected_backward(p, t), FP32_TOLERANCE);
}

static void test() {
    for (const Case& c :
         {Case{RESIDUAL_MHC, 8, 1, 20}, Case{RESIDUAL_MHC, 8, 150, 20}, Case{RESIDUAL_MHC, 8, 37, 1},
          Case{RESIDUAL_MHC, 8, 70, 100}, Case{RESIDUAL_IHC, 8, 70, 20}}) {
        Point p(c);
        Tensors t(p);
        check(p, t, true);
        if (!p.identity() && c.iters == NAIVE_ITERS) check(p, t, false);
    }
}

static void profile() {
    Point p({RESIDUAL_MHC, 8, 256, 20});
    Tensors t(p);
    double rows = p.rows, once = 24 * 4 + 12;
    naive_forward(t, p);
    fused_forward(t, p);
    naive_backward(t, p);
    fused_backward(t, p);
    print_floor("naive_forward_kernel", 128 * rows, once);
    print_floor("sinkhorn_forward_kernel", 128 * rows, once);
    print_floor("naive_backward_kernel", (80 + 64 + 16 + 80) * rows, once);
    print_floor("sinkhorn_backward_kernel", (80 * SLABS + 64 + 16 + 80) * rows, once);
}

static void time_all() {
    Point p({RESIDUAL_MHC, 8, 65536, 20});
    Tensors t(p);
    double rows = p.rows;
    print_time("naive, forward", p.name, 128 * rows, [&] { naive_forward(t, p); });
    print_time("forward", p.name, 128 * rows, [&] { fused_forward(t, p); });
    print_time("naive, backward", p.name, 240 * rows, [&] { naive_backward(t, p); });
    print_time("backward, 3 slabs", p.name, 400 * rows, [&] { fused_backward(t, p); });
}

int main(int argc, char** argv) { return lab(argc, argv, test, profile, time_all); }
