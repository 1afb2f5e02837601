// write_project.cu: from the output of a sublayer to the next one's mix (mHC Eq. 3, 7): y = res x + post f,
// z = fn y / rms(y), and pre and post from z. Floor: x and f read, y written: 9 C numbers a token.

#include "lab.cuh"

// 1. As the formulas say: y in a kernel, a thread a number; then a warp for each number of mix, which reads
//    all of y: 24 times in all, from the L2 cache if it fits.
static __global__ void naive_write_kernel(floatX* y, const floatX* x, const floatX* f, const float* coef,
                                          int C, size_t count) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    size_t row = at / (N * C), i = at / C % N, ch = at % C;
    float sum = coef[row * COEFS + N + i] * to_float(f[row * C + ch]);
    for (int j = 0; j < N; j++)
        sum = fmaf(coef[row * COEFS + 2 * N + i * N + j], to_float(x[(row * N + j) * C + ch]), sum);
    y[at] = from_float<floatX>(sum);
}
static __global__ void naive_project_kernel(float* mix, float* rnorm, const floatX* y, const floatX* fn,
                                            int M, int C, int rows) {
    int warp = (blockIdx.x * 256 + threadIdx.x) / WARP, lane = threadIdx.x % WARP, K = N * C;
    size_t row = warp / M, m = warp % M, part = (size_t)M * K;
    if (row >= (size_t)rows) return;
    float sum = 0, squares = 0;
    for (int k = lane; k < K; k += WARP) {
        float value = to_float(y[row * K + k]);
        sum += value * (to_float(fn[m * K + k]) + to_float(fn[part + m * K + k]));
        squares += value * value;
    }
    float norm = 1 / sqrtf(warp_sum(squares) / K + 1e-6f);
    sum = warp_sum(sum) * norm;
    if (lane == 0) mix[row * M + m] = sum;
    if (lane == 0 && m == 0) rnorm[row] = norm;
}

// 2. One pass: a warp has a token, mixes and multiplies what it has just mixed. Nothing is read twice from
//    memory, but all of fn comes from the L2 cache for every token: 384 C bytes beside 18 C.
static __global__ void warp_write_project_kernel(FusedWrite w, int M) {
    size_t row = (blockIdx.x * 256 + threadIdx.x) / WARP, C = w.C, part = (size_t)M * N * C;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)w.rows) return;
    float res[N][N], post[N], sums[COEFS] = {}, squares = 0;
    load_4(post, w.coef + row * COEFS + N);
    for (int i = 0; i < N; i++) load_4(res[i], w.coef + row * COEFS + (2 + i) * N);
    for (size_t ch = lane; ch < C; ch += WARP) {
        float x[N], f = to_float(w.f[row * C + ch]);
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = to_float(w.x[(row * N + j) * C + ch]);
#pragma unroll
        for (int i = 0; i < N; i++) {
            floatX y = from_float<floatX>(mixed<false>(i, x, f, res, post));
            w.y[(row * N + i) * C + ch] = y;
            squares += to_float(y) * to_float(y);
#pragma unroll
            for (int m = 0; m < COEFS; m++) {
                if (m >= M) break;
                const floatX* weight = w.fn + (m * N + i) * C + ch;
                sums[m] += to_float(y) * (to_float(weight[0]) + to_float(weight[part]));
            }
        }
    }
    float norm = 1 / sqrtf(warp_sum(squares) / (N * C) + 1e-6f);
    if (lane == 0) w.rnorm[row] = norm;
#pragma unroll
    for (int m = 0; m < COEFS; m++) {
        float sum = warp_sum(sums[m]) * norm;
        if (lane == m && m < M) w.mix[row * M + m] = sum;
    }
}

// 3. write_project_kernel of mhc_fused.cuh: 64 tokens share a tile of fn, products on tensor cores.

// ------------------------------------------------------------------------------------------------

struct Tensors {
    Device<floatX> x, f, y, split;
    Device<float> before, fn, base, scale, mix, rnorm, coef;
    FusedWrite w;
    explicit Tensors(Point& p)
        : x(p.x), f(p.f), y(p.x.size()), split(p.fn_split), before(p.before),
          fn(numbers_at(p.fn(), p.fn_split.size() / 2)), base(numbers_at(p.base(), p.M)),
          scale(numbers_at(p.scale(), p.identity() ? 2 : 3)), mix(p.mix.size()), rnorm(p.rnorm.size()),
          coef(p.coef.size()), w{x.at,     f.at,   before.at, y.at,    split.at, base.at,
                                 scale.at, mix.at, rnorm.at,  coef.at, p.rows,   p.C} {}
    void clear() {
        for (Device<float>* d : {&mix, &rnorm, &coef})
            CUDA(cudaMemset(d->at, 0xff, d->count * sizeof(float)));
        CUDA(cudaMemset(y.at, 0xff, y.count * sizeof(floatX)));
    }
};

static void naive(Tensors& t, const Point& p) {
    naive_write_kernel<<<ceil_div(t.y.count, 256), 256>>>(t.y.at, t.x.at, t.f.at, t.before.at, p.C,
                                                          t.y.count);
    naive_project_kernel<<<ceil_div((size_t)p.rows * p.M * WARP, 256), 256>>>(t.mix.at, t.rnorm.at, t.y.at,
                                                                             t.split.at, p.M, p.C, p.rows);
    LAUNCHED();
}
static void warp_a_token(Tensors& t, const Point& p) {
    warp_write_project_kernel<<<ceil_div((size_t)p.rows * WARP, 256), 256>>>(t.w, p.M);
    LAUNCHED();
}
static void fused(Tensors& t, const Point& p, int shared) {
    fused_write_project_gpu(&t.w, p.identity(), shared, 0);
}

// What the device wrote, then what the reference makes of that state
static void check(const char* version, Tensors& t, Point& p, bool writes, bool coefficients) {
    char label[128];
    snprintf(label, sizeof label, "%s, %s%s", version, p.name, writes ? "" : ", no write");
    if (writes) compare(label, "y", t.y.get(), p.written(), BF16_TOLERANCE);
    p.forward(t.y.get());
    compare(label, "mix", t.mix.get(), p.mix, FP32_TOLERANCE);
    compare(label, "rnorm", t.rnorm.get(), p.rnorm, FP32_TOLERANCE);
    if (!coefficients) return;
    Numbers found = t.coef.get(), expected = p.coef;
    bool apart = true;          // res is sinkhorn_forward's
    for (size_t e = 0; e < found.size() && !p.identity(); e++)
        if (e % COEFS >= 2 * N) apart = apart && std::isnan(found[e]), found[e] = expected[e] = 0;
    CHECK(apart, "%s: res was written", label);
    compare(label, "coefficients", found, expected, FP32_TOLERANCE);
}

static void test_fits() {
    Point p({RESIDUAL_MHC, 8, 1, 20});
    Config c = p.c;
    CHECK(fused_fits(&c), "mhc with four streams and 8 channels");
    auto fits = [&](auto change) {
        Config other = p.c;
        change(other);
        return fused_fits(&other);
    };
    CHECK(fits([](Config& c) { c.residual = RESIDUAL_IHC, c.maps = 3; }), "ihc");
    CHECK(!fits([](Config& c) { c.residual = RESIDUAL_HC; }), "hc");
    CHECK(!fits([](Config& c) { c.n = 2; }), "two streams");
    CHECK(!fits([](Config& c) { c.C = 12; }), "12 channels");
    CHECK(!fits([](Config& c) { c.C = 2568; }), "2568 channels");
    CHECK(!fits([](Config& c) { c.maps = 6; }), "no read");
    CHECK(!fits([](Config& c) { c.order = ORDER_RC; }), "rows first");
    CHECK(!fits([](Config& c) { c.is_static = true; }), "static");
}

static void test() {
    test_fits();
    int h100 = 227 << 10, a100 = 163 << 10;
    for (const Case& c : {Case{RESIDUAL_MHC, 64, 37, 20}, Case{RESIDUAL_MHC, 8, 1, 20},
                          Case{RESIDUAL_MHC, 104, 130, 20}, Case{RESIDUAL_MHC, 200, 64, 20},
                          Case{RESIDUAL_IHC, 64, 65, 20}, Case{RESIDUAL_IHC, 40, 7, 20}}) {
        Point p(c);
        Tensors t(p);
        if (!p.identity()) {
            naive(t, p);
            check("naive", t, p, true, false);
            Numbers plain = t.y.get();
            t.clear();
            warp_a_token(t, p);
            check("warp a token", t, p, true, false);
            CHECK(t.y.get() == plain, "%s: another y than the naive kernel's", p.name);
        }
        Numbers first;
        for (int shared : {h100, a100}) {
            if (shared > shared_limit()) continue;
            t.clear();
            fused(t, p, shared);
            check(shared == h100 ? "three stages" : "two stages", t, p, true, true);
            Numbers all = t.y.get(), mix = t.mix.get();
            all.insert(all.end(), mix.begin(), mix.end());
            CHECK(first.empty() || all == first, "%s: the number of stages changes the bits", p.name);
            first = all;
        }
        t.clear();
        fused_write_gpu(&t.w, p.identity(), 0);
        first.resize(t.y.count);
        CHECK(t.y.get() == first, "%s: the write alone gives another y", p.name);
        t.y.put(p.x);
        t.w.f = NULL;
        fused(t, p, shared_limit());
        check("fused", t, p, false, true);
        CHECK(t.y.get() == p.x, "%s: a state that is only read has changed", p.name);
    }
}

static double floor_bytes(const Point& p) { return 2.0 * 9 * p.C * p.rows; }

static void profile() {
    Point p({RESIDUAL_MHC, 768, 64, 20}), few({RESIDUAL_MHC, 768, 8, 20});     // few: for what is slow
    Tensors t(p), t_few(few);
    double once = 2.0 * (double)p.fn_split.size();
    naive(t_few, few);
    warp_a_token(t_few, few);
    fused(t, p, shared_limit());
    fused_write_gpu(&t.w, false, 0);
    print_floor("naive_write_kernel", floor_bytes(few), 0);
    print_floor("naive_project_kernel", 2.0 * 4 * few.C * few.rows, once);
    print_floor("warp_write_project_kernel", floor_bytes(few), once);
    print_floor("write_project", floor_bytes(p), once);
    print_floor("write_fused_kernel", floor_bytes(p), 0);
}

static void time_all() {
    for (int C : {768, 1600}) {
        Point p({RESIDUAL_MHC, C, 4096, 20});
        Tensors t(p);
        print_time("naive", p.name, floor_bytes(p), [&] { naive(t, p); });
        print_time("a warp a token", p.name, floor_bytes(p), [&] { warp_a_token(t, p); });
        print_time("64 tokens a block", p.name, floor_bytes(p), [&] { fused(t, p, shared_limit()); });
    }
}

int main(int argc, char** argv) { return lab(argc, argv, test, profile, time_all); }
