// read_backward.cu: from the input of a sublayer back to the logits of its connection: LayerNorm, the read
// u = pre y, sigmoids, the product with fn. Floor: y and dln read: 5 C numbers a token.

#include "lab.cuh"

// 1. A warp a token, one number a lane: a first pass over dln and y for the sums that LayerNorm's gradient
//    needs, a second for dpre = y du, which needs them. Then a thread a token for the logits.
static __global__ void naive_read_kernel(float* dpre, float* sums, FusedReadBackward b) {
    size_t row = (blockIdx.x * 256 + threadIdx.x) / WARP, C = b.C;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)b.rows) return;
    const floatX *y = b.y + row * N * C, *dln = b.dln + row * C;
    float mean = b.stats[row * 2], rstd = b.stats[row * 2 + 1], sum = 0, along = 0, found[N] = {};
    auto xhat = [&](size_t ch) {
        float u = 0;
        for (int i = 0; i < N; i++) u = fmaf(b.coef[row * COEFS + i], to_float(y[i * C + ch]), u);
        return (u - mean) * rstd;
    };
    for (size_t ch = lane; ch < C; ch += WARP) {
        float g = to_float(b.weight[ch]) * to_float(dln[ch]);
        sum += g;
        along += g * xhat(ch);
    }
    sum = warp_sum(sum) / C;
    along = warp_sum(along) / C;
    for (size_t ch = lane; ch < C; ch += WARP) {
        float du = rstd * (to_float(b.weight[ch]) * to_float(dln[ch]) - sum - xhat(ch) * along);
        for (int i = 0; i < N; i++) found[i] += du * to_float(y[i * C + ch]);
    }
    for (int i = 0; i < N; i++) {
        float value = warp_sum(found[i]);
        if (lane == 0) dpre[row * N + i] = value;
    }
    if (lane == 0) sums[row * 2] = sum, sums[row * 2 + 1] = along;
}
static __global__ void naive_logits_kernel(const float* dpre, const float* sums, FusedReadBackward b, int M) {
    size_t row = (size_t)blockIdx.x * 128 + threadIdx.x;
    if (row >= (size_t)b.rows) return;
    float norm = b.rnorm[row], through = 0, rstd = b.stats[row * 2 + 1];
    for (int m = 0; m < M; m++) {
        float pre = b.coef[row * COEFS + m], mix = b.mix[row * M + m];
        float d = m < N ? dpre[row * N + m] * pre * (1 - pre) : b.dlogit[row * (M - N) + m - N];
        float dmix = b.scale[m < 2 * N ? m / N : 2] * d;
        through += dmix * mix;
        floatX high = from_float<floatX>(dmix * norm);
        b.z[row * 2 * M + m] = high;
        b.z[(row * 2 + 1) * M + m] = from_float<floatX>(dmix * norm - to_float(high));
    }
    float terms[TOKEN_TERMS] = {rstd, -b.stats[row * 2] * rstd, rstd * sums[row * 2],
                                rstd * sums[row * 2 + 1], through * norm * norm / (N * b.C)};
    for (int e = 0; e < TOKEN_TERMS; e++) b.token[row * TOKEN_TERMS + e] = terms[e];
}

// 2. read_backward_fused_kernel of mhc_fused.cuh: one pass, 16 bytes a lane; dpre from three sums a stream.

// ------------------------------------------------------------------------------------------------

struct Tensors {
    Numbers dln, base, scale_terms, z, shrink, sums;            // what the reference finds
    Device<floatX> y, d, weight, split;
    Device<float> coef, stats, mix, rnorm, scale, dlogit, token, parts, dpre, pair;
    FusedReadBackward b;
    explicit Tensors(Point& p)
        : dln(random_numbers(32, p.u.size())), base(p.mix.size()), scale_terms(p.mix.size()), z(p.mix.size()),
          shrink(p.rows), sums((size_t)p.rows * 2), y(p.x), d(dln), weight(numbers_at(p.weight(), p.C)),
          split(2 * p.mix.size()), coef(p.coef), stats(p.stats), mix(p.mix), rnorm(p.rnorm),
          scale(numbers_at(p.scale(), p.identity() ? 2 : 3)), dlogit(reference(p)),
          token((size_t)p.rows * TOKEN_TERMS), parts((size_t)read_backward_blocks(p.rows) * (p.M + 3)),
          dpre((size_t)p.rows * N), pair((size_t)p.rows * 2) {
        b = {y.at,     d.at,      weight.at, coef.at,  stats.at, mix.at, rnorm.at,
             scale.at, dlogit.at, split.at,  token.at, parts.at, p.rows, p.C};
    }

    // Fills what the reference finds; returns the part of its logits' gradients that the kernels are given.
    Numbers reference(Point& p) {
        size_t rows = p.rows, C = p.C, M = p.M;
        Numbers state(p.x.size()), du(rows * C), xhat(rows * C), dcoef = random_numbers(33, rows * COEFS);
        Activations a;
        memset(&a, 0, sizeof a);
        a.dstate = state.data(), a.dln = dln.data(), a.du = du.data(), a.xhat = xhat.data();
        CoefficientGrads g = {dcoef.data(), base.data(), scale_terms.data(), z.data(), shrink.data()};
        a.g = g;
        for (size_t r = 0; r < rows; r += LANES)
            connection_tokens_backward(&p.m, &a, p.x.data(), &p.s, 1, (int)r,
                                       min_int(LANES, (int)(rows - r)));
        Numbers given(rows * (M - N));
        for (size_t e = 0; e < given.size(); e++) given[e] = base[e / (M - N) * M + N + e % (M - N)];
        for (size_t e = 0; e < rows * C; e++) {
            double g = (double)p.weight()[e % C] * (double)dln[e];
            sums[e / C * 2] += (float)(g / (double)C);
            sums[e / C * 2 + 1] += (float)(g * (double)xhat[e] / (double)C);
        }
        return given;
    }
};

static void naive(Tensors& t, const Point& p) {
    naive_read_kernel<<<ceil_div((size_t)p.rows * WARP, 256), 256>>>(t.dpre.at, t.pair.at, t.b);
    naive_logits_kernel<<<ceil_div(p.rows, 128), 128>>>(t.dpre.at, t.pair.at, t.b, p.M);
    LAUNCHED();
}
static void fused(Tensors& t, const Point& p) { fused_read_backward_gpu(&t.b, p.identity(), 0); }

static void check(const char* version, Tensors& t, const Point& p) {
    char label[128];
    snprintf(label, sizeof label, "%s, %s", version, p.name);
    size_t rows = p.rows, M = p.M;
    Numbers split = t.split.get(), token = t.token.get(), z(rows * M), terms = token;
    for (size_t r = 0; r < rows; r++) {
        for (size_t m = 0; m < M; m++) z[r * M + m] = split[r * 2 * M + m] + split[(r * 2 + 1) * M + m];
        float mean = p.stats[r * 2], rstd = p.stats[r * 2 + 1];
        float expected[TOKEN_TERMS] = {rstd, -mean * rstd, rstd * t.sums[r * 2], rstd * t.sums[r * 2 + 1],
                                       t.shrink[r]};
        std::copy(expected, expected + TOKEN_TERMS, &terms[r * TOKEN_TERMS]);
    }
    compare(label, "z", z, t.z, PARTS_TOLERANCE);
    compare(label, "terms of a token", token, terms, FP32_TOLERANCE);
}

static void check_parts(Tensors& t, const Point& p) {
    size_t M = p.M, maps = p.identity() ? 2 : 3, cols = M + maps;
    Numbers parts = t.parts.get(), found(cols), expected(cols);
    for (int block = 0; block < read_backward_blocks(p.rows); block++)
        for (size_t m = 0; m < cols; m++) found[m] += parts[block * cols + m];
    for (size_t e = 0; e < t.base.size(); e++) {
        expected[e % M] += t.base[e];
        expected[M + (size_t)map_of((int)(e % M), N)] += t.scale_terms[e];
    }
    compare(p.name, "dbase and dscale", found, expected, FP32_TOLERANCE);
}

static void test() {
    for (const Case& c : {Case{RESIDUAL_MHC, 64, 37, 20}, Case{RESIDUAL_MHC, 8, 1, 20},
                          Case{RESIDUAL_MHC, 264, 130, 5}, Case{RESIDUAL_IHC, 40, 70, 20}}) {
        Point p(c);
        Tensors t(p);
        naive(t, p);
        check("naive", t, p);
        fused(t, p);
        check("fused", t, p);
        check_parts(t, p);
    }
}

static double floor_bytes(const Point& p) { return 2.0 * 5 * p.C * p.rows; }

static void profile() {
    Point p({RESIDUAL_MHC, 768, 64, 20});
    Tensors t(p);
    naive(t, p);
    fused(t, p);
    print_floor("naive_read_kernel", floor_bytes(p), 2.0 * p.C);
    print_floor("read_backward_fused_kernel", floor_bytes(p), 2.0 * p.C + 4 * 30);
}

static void time_all() {
    for (int C : {768, 1600}) {
        Point p({RESIDUAL_MHC, C, 16384, 20});
        Tensors t(p);
        print_time("naive", p.name, floor_bytes(p), [&] { naive(t, p); });
        print_time("one pass", p.name, floor_bytes(p), [&] { fused(t, p); });
    }
}

int main(int argc, char** argv) { return lab(argc, argv, test, profile, time_all); }
