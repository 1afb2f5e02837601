// state_backward.cu: the gradient of the state between two sublayers, from that of the next state; of the
// output and the coefficients of the sublayer before; of fn and LayerNorm. Floor: dnext, x, f and dln read,
// dy and df written: 15 C numbers a token.

#include "lab.cuh"

// 1. As the formulas say, a kernel for each: dy, a thread a number, reading all of fn and z again; the
//    write's way back, a warp a token, which rereads dy and x; the gradient of fn, a thread a number, through
//    all tokens. y is read where the fused kernel makes it again.
static __global__ void naive_state_kernel(FusedStateBackward b, const floatX* y, const float* stats, int M) {
    size_t at = (size_t)blockIdx.x * 128 + threadIdx.x, C = b.C, row = at / C, ch = at % C;
    if (row >= (size_t)b.rows) return;
    const float *coef = b.coef + row * COEFS, *token = b.token + row * TOKEN_TERMS;
    float u = 0, mean = stats[row * 2], rstd = stats[row * 2 + 1];
    for (int i = 0; i < N; i++) u = fmaf(coef[i], to_float(y[(row * N + i) * C + ch]), u);
    float du = rstd * to_float(b.weight[ch]) * to_float(b.dln[row * C + ch]) - token[TOKEN_SUM] -
               token[TOKEN_ALONG] * (u - mean) * rstd;
    for (int i = 0; i < N; i++) {
        size_t state = (row * N + i) * C + ch;
        float sum = coef[i] * du - token[TOKEN_SHRINK] * to_float(y[state]);
        for (int o = 0; o < N; o++)
            sum += coef[2 * N + o * N + i] * to_float(b.dnext[(row * N + o) * C + ch]);
        for (int m = 0; m < M; m++)
            sum += to_float(b.z[row * 2 * M + m]) * to_float(b.fn[((size_t)m * N + i) * C + ch]);
        b.dy[state] = from_float<floatX>(sum);
    }
}
static __global__ void naive_write_backward_kernel(FusedStateBackward b) {
    size_t row = (blockIdx.x * 256 + threadIdx.x) / WARP, C = b.C;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)b.rows) return;
    float sums[1 + N][N] = {};
    for (size_t ch = lane; ch < C; ch += WARP) {
        float df = 0;
        for (int o = 0; o < N; o++) {
            float d = to_float(b.dy[(row * N + o) * C + ch]);
            df += b.before[row * COEFS + N + o] * d;
            sums[0][o] += d * to_float(b.f[row * C + ch]);
            for (int i = 0; i < N; i++) sums[1 + o][i] += d * to_float(b.x[(row * N + i) * C + ch]);
        }
        b.df[row * C + ch] = from_float<floatX>(df);
    }
    for (int l = 0; l <= N; l++)
        for (int e = 0; e < N; e++) {
            float sum = warp_sum(sums[l][e]);
            if (lane == 0) b.dcoef[((size_t)l * b.rows + row) * N + e] = sum;
        }
}
static __global__ void naive_sums_kernel(FusedStateBackward b, const floatX* y, const float* stats, int M) {
    size_t at = (size_t)blockIdx.x * 128 + threadIdx.x, C = b.C, K = N * C;
    if (at >= M * K + 2 * C) return;
    float sum = 0;
    for (size_t row = 0; row < (size_t)b.rows; row++) {
        if (at < M * K) {
            float z = to_float(b.z[row * 2 * M + at / K]) + to_float(b.z[(row * 2 + 1) * M + at / K]);
            sum += z * to_float(y[row * K + at % K]);
            continue;
        }
        size_t ch = (at - M * K) % C;
        float d = to_float(b.dln[row * C + ch]), u = 0;
        for (int i = 0; i < N; i++) u = fmaf(b.coef[row * COEFS + i], to_float(y[(row * N + i) * C + ch]), u);
        sum += at < M * K + C ? d * (u - stats[row * 2]) * stats[row * 2 + 1] : d;
    }
    b.parts[at] = sum;
}

// 2. state_backward_fused_kernel of mhc_fused.cuh.

// ------------------------------------------------------------------------------------------------
// A whole boundary's way back: the kernels before this one are checked in their own files, here what comes
// out at the end.

enum { SETS = 3 };

struct Tensors {
    Numbers y, dnext, dln;      // y as the device wrote it
    Device<floatX> x, f, state, d, ln, weight, split, z, dy, df;
    Device<float> before, coef, stats, mix, rnorm, base, scale, dlogit, token, small, parts, dcoef;
    Device<float> dfn, dweight, dbias, dbase, dscale;
    FusedReadBackward r;
    FusedStateBackward b;
    int slabs = 0;
    explicit Tensors(Point& p)
        : y(written(p)), dnext(random_numbers(31, p.x.size())), dln(random_numbers(32, p.u.size())), x(p.x),
          f(p.f), state(y), d(dnext), ln(dln), weight(numbers_at(p.weight(), p.C)), split(p.fn_split),
          z(2 * p.mix.size()), dy(p.x.size()), df(p.u.size()), before(p.before), coef(p.coef), stats(p.stats),
          mix(p.mix), rnorm(p.rnorm), base(numbers_at(p.base(), p.M)),
          scale(numbers_at(p.scale(), p.identity() ? 2 : 3)), dlogit((size_t)p.rows * 5 * N),
          token((size_t)p.rows * TOKEN_TERMS), small((size_t)read_backward_blocks(p.rows) * (p.M + 3)),
          parts((size_t)SETS * (p.M * N + 2) * p.C), dcoef((size_t)ceil_div(p.C, 64) * 5 * p.rows * N),
          dfn(numbers_at(grad(&p.m, MLP_FN, 0), (size_t)p.M * N * p.C)),
          dweight(numbers_at(grad(&p.m, LN_2_W, 0), p.C)), dbias(numbers_at(grad(&p.m, LN_2_B, 0), p.C)),
          dbase(numbers_at(grad(&p.m, MLP_BASE, 0), p.M)),
          dscale(numbers_at(grad(&p.m, MLP_SCALE, 0), p.identity() ? 2 : 3)) {
        r = {state.at, ln.at,    weight.at, coef.at,  stats.at, mix.at, rnorm.at,
             scale.at, dlogit.at, z.at,     token.at, small.at, p.rows, p.C};
        b = {d.at,     x.at, f.at,  before.at, ln.at,    weight.at, split.at, coef.at, token.at,
             z.at,     dy.at, df.at, dcoef.at, parts.at, p.rows,    p.C,      SETS};
    }

    // The state that the device makes of x and f; the reference goes on from it.
    static Numbers written(Point& p) {
        Device<floatX> x(p.x), f(p.f), y(p.x.size()), split(p.fn_split);
        Device<float> before(p.before), base(numbers_at(p.base(), p.M)),
            scale(numbers_at(p.scale(), p.identity() ? 2 : 3)), mix(p.mix.size()), rnorm(p.rows),
            coef(p.coef.size());
        FusedWrite w = {x.at,     f.at,   before.at, y.at,    split.at, base.at,
                        scale.at, mix.at, rnorm.at,  coef.at, p.rows,   p.C};
        fused_write_project_gpu(&w, p.identity(), shared_limit(), 0);
        Numbers state = y.get();
        p.forward(state);
        return state;
    }

    // To z and the terms of a token. dpost and dres of this sublayer, as a boundary before would leave them
    void before_state(Point& p, const Numbers& dcoef_next) {
        size_t rows = p.rows, lines = p.identity() ? 1 : 5;
        Numbers all(lines * rows * N);
        for (size_t e = 0; e < all.size(); e++)
            all[e] = dcoef_next[e / N % rows * COEFS + N + e / N / rows * N + e % N];
        Device<float> one(all);
        fused_sinkhorn_backward_gpu(dlogit.at, one.at, 1, coef.at, mix.at, base.at, scale.at, p.c.iters,
                                    p.identity(), p.rows, 0);
        fused_read_backward_gpu(&r, p.identity(), 0);
        CUDA(cudaDeviceSynchronize());
    }
    void clear() {
        for (Device<float>* t : {&parts, &dcoef}) CUDA(cudaMemset(t->at, 0xff, t->count * sizeof(float)));
        for (Device<floatX>* t : {&dy, &df}) CUDA(cudaMemset(t->at, 0xff, t->count * sizeof(floatX)));
    }
};

static void naive(Tensors& t, const Point& p) {
    naive_state_kernel<<<ceil_div((size_t)p.rows * p.C, 128), 128>>>(t.b, t.state.at, t.stats.at, p.M);
    naive_write_backward_kernel<<<ceil_div((size_t)p.rows * WARP, 256), 256>>>(t.b);
    naive_sums_kernel<<<ceil_div(t.parts.count / SETS, 128), 128>>>(t.b, t.state.at, t.stats.at, p.M);
    LAUNCHED();
    t.slabs = 1;
}
static void fused(Tensors& t, const Point& p, int slab, int shared) {
    if (slab == 64) fused_state_backward_gpu<64>(&t.b, p.identity(), shared, 0);
    else fused_state_backward_gpu<128>(&t.b, p.identity(), shared, 0);
    t.slabs = ceil_div(p.C, slab);
}
static void add_parts(Tensors& t, const Point& p, int sets) {
    int K = N * p.C, stride = (p.M * N + 2) * p.C, maps = p.identity() ? 2 : 3,
        blocks = read_backward_blocks(p.rows);
    PartSums sums = {{{t.dfn.at, t.parts.at, sets, p.M * K, stride},
                      {t.dweight.at, t.parts.at + (size_t)p.M * K, sets, p.C, stride},
                      {t.dbias.at, t.parts.at + (size_t)p.M * K + p.C, sets, p.C, stride},
                      {t.dbase.at, t.small.at, blocks, p.M, p.M + maps},
                      {t.dscale.at, t.small.at + p.M, blocks, maps, p.M + maps}}};
    fused_add_parts_gpu(&sums, 0);
}

// What the reference makes of the same
struct Reference {
    Activations a;
    Numbers dnext, dln, du, xhat, coef, base, scale, z, shrink, dy, df, before;
    double through;             // |fn^T z| over |dy|: what the products in bf16 are a part of
    Reference(Point& p, const Tensors& t)
        : dnext(t.dnext),
          dln(t.dln),
          du(p.u.size()),
          xhat(p.u.size()),
          coef(p.coef.size()),
          base(p.mix.size()),
          scale(p.mix.size()),
          z(p.mix.size()),
          shrink(p.rows),
          df(p.u.size()),
          before(p.coef.size()) {
        memset(&a, 0, sizeof a);
        a.dstate = dnext.data(), a.dln = dln.data(), a.du = du.data(), a.xhat = xhat.data();
        CoefficientGrads g = {coef.data(), base.data(), scale.data(), z.data(), shrink.data()};
        a.g = g;
        Numbers ignored(p.u.size());
        connection_write_backward(&p.c, &a, ignored.data(), t.y.data(), &p.s, p.rows);
        for (size_t e = 0; e < coef.size(); e++) coef[e] = (float)normal(33, e); // not what f gives: anything
    }
    void run(Point& p, const Tensors& t) {
        connection_backward(&p.m, &a, t.y.data(), &p.s, 1, p.rows);
        dy = dnext;
        double size = 0, part = 0;
        for (size_t e = 0; e < dy.size(); e++) {
            double sum = 0;
            size_t K = (size_t)N * p.C;
            for (size_t m = 0; m < (size_t)p.M; m++)
                sum += (double)z[e / K * p.M + m] * (double)p.fn()[m * K + e % K];
            part += sum * sum, size += (double)dy[e] * (double)dy[e];
        }
        through = sqrt(part / size);
    }
    // df and the gradients of the coefficients before, from a gradient of y
    void write(Point& p, const Numbers& from, Numbers& df_of, Numbers& before_of) {
        Numbers d = from;
        Activations w = a;
        Sublayer sub = p.s;
        sub.coef = p.before.data();
        w.dstate = d.data(), w.g.coef = before_of.data();
        connection_write_backward(&p.c, &w, df_of.data(), p.x.data(), &sub, p.rows);
    }
};

// dy of fn^T z takes fn and z in bf16: independent relative errors of products of random sign, at most 2 half
// units, are such an error of their sum.
static void check(const char* version, Tensors& t, Point& p, Reference& r, bool writes) {
    char label[128];
    snprintf(label, sizeof label, "%s, %s%s", version, p.name, writes ? "" : ", first");
    double tolerance = BF16_TOLERANCE + 2 * HALF_UNIT * r.through;
    Numbers dy = t.dy.get(), ignored(r.df.size()), found((size_t)p.rows * COEFS), parts = t.dcoef.get();
    compare(label, "dy", dy, r.dy, tolerance);
    if (!writes) return;
    r.write(p, r.dy, r.df, r.before);
    compare(label, "df", t.df.get(), r.df, tolerance);
    r.write(p, dy, ignored, r.before);          // from the rounded dy, as on the device
    size_t rows = p.rows, lines = p.identity() ? 1 : 5, size = lines * rows * N;
    for (size_t e = 0; e < t.slabs * size; e++)
        found[e / N % rows * COEFS + N + e % size / N / rows * N + e % N] += parts[e];
    for (size_t e = 0; e < found.size(); e++)
        if (e % COEFS < N || e % COEFS >= N + lines * N) found[e] = r.before[e] = 0;
    compare(label, "gradients of post and res", found, r.before, FP32_TOLERANCE);
}

// Sums over tokens, and whatever the kernels before and behind have made of them
static void check_parameters(const char* version, Tensors& t, Point& p) {
    char label[128];
    snprintf(label, sizeof label, "%s, %s", version, p.name);
    compare(label, "dfn", t.dfn.get(), numbers_at(grad(&p.m, MLP_FN, 0), t.dfn.count), PARTS_TOLERANCE);
    compare(label, "dweight", t.dweight.get(), numbers_at(grad(&p.m, LN_2_W, 0), p.C), FP32_TOLERANCE);
    compare(label, "dbias", t.dbias.get(), numbers_at(grad(&p.m, LN_2_B, 0), p.C), FP32_TOLERANCE);
    compare(label, "dbase", t.dbase.get(), numbers_at(grad(&p.m, MLP_BASE, 0), p.M), FP32_TOLERANCE);
    compare(label, "dscale", t.dscale.get(), numbers_at(grad(&p.m, MLP_SCALE, 0), t.dscale.count),
            FP32_TOLERANCE);
}

// What a run leaves, as bits
static Numbers results(const Tensors& t, const Point& p) {
    Numbers all = t.parts.get(), dy = t.dy.get();
    all.resize((size_t)SETS * (p.M * N + 2) * p.C);
    all.insert(all.end(), dy.begin(), dy.end());
    return all;
}

static void test() {
    struct { int slab, shared; const char* name; } shapes[] = {{128, 227 << 10, "128 channels, three stages"},
                                                             {128, 163 << 10, "128 channels, two stages"},
                                                             {64, 163 << 10, "64 channels"}};
    for (const Case& c : {Case{RESIDUAL_MHC, 64, 37, 20}, Case{RESIDUAL_MHC, 8, 1, 20},
                          Case{RESIDUAL_MHC, 136, 130, 3}, Case{RESIDUAL_IHC, 72, 70, 20}}) {
        Point p(c);
        Tensors t(p);
        Reference r(p, t);
        t.before_state(p, r.coef);
        r.run(p, t);
        Numbers first;
        if (!p.identity()) {
            naive(t, p);
            check("naive", t, p, r, true);
        }
        for (auto& shape : shapes) {
            if (shape.shared > shared_limit()) continue;
            t.clear();
            fused(t, p, shape.slab, shape.shared);
            check(shape.name, t, p, r, true);
            Numbers all = results(t, p);
            CHECK(first.empty() || all == first, "%s: %s gives other bits", p.name, shape.name);
            first = all;
            // From the stored y the same bits: so y as it was mixed again has those of the stored one.
            t.clear();
            t.b.x = t.state.at, t.b.f = NULL;
            fused(t, p, shape.slab, shape.shared);
            check(shape.name, t, p, r, false);
            CHECK(results(t, p) == first, "%s, %s: y mixed again is not the stored one", p.name, shape.name);
            t.b.x = t.x.at, t.b.f = t.f.at;
        }
        t.b.dy = t.d.at;                        // in place
        fused(t, p, 64, shared_limit());
        CHECK(t.d.get() == t.dy.get(), "%s: dy in dnext's memory differs from dy apart from it", p.name);
        t.b.dy = t.dy.at, t.d.put(t.dnext);
        add_parts(t, p, SETS);
        check_parameters("fused", t, p);
    }
}

static double floor_bytes(const Point& p) { return 2.0 * 15 * p.C * p.rows; }

static void profile() {
    Point p({RESIDUAL_MHC, 768, 48, 20});
    Tensors t(p);
    Reference r(p, t);
    t.before_state(p, r.coef);
    naive(t, p);
    fused(t, p, 128, shared_limit());
    add_parts(t, p, SETS);
    double fn = 2.0 * p.M * N * p.C, parts = 4.0 * SETS * (p.M * N + 2) * p.C;
    print_floor("naive_state_kernel", 2.0 * 13 * p.C * p.rows, fn);
    print_floor("naive_write_backward_kernel", 2.0 * 10 * p.C * p.rows, 0);
    print_floor("naive_sums_kernel", 2.0 * 5 * p.C * p.rows, parts / SETS);
    print_floor("state_backward", floor_bytes(p), fn + 2.0 * p.C + parts);
    print_floor("add_parts_kernel", parts, 8.0 * (p.M * N + 2) * p.C);
}

static void time_all() {
    for (int C : {768, 1600})
        for (int slab : {128, 64}) {
            Point p({RESIDUAL_MHC, C, 4096, 20});
            Tensors t(p);
            Reference r(p, t);
            t.before_state(p, r.coef);
            int multiprocessors = 0;
            CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
            t.b.sets = fused_sets(p.rows, C, slab, multiprocessors);
            Device<float> parts((size_t)t.b.sets * (p.M * N + 2) * C);
            t.b.parts = parts.at;
            if (slab == 128) print_time("naive", p.name, floor_bytes(p), [&] { naive(t, p); });
            print_time(slab == 64 ? "slabs of 64" : "slabs of 128", p.name, floor_bytes(p),
                       [&] { fused(t, p, slab, shared_limit()); });
        }
}

int main(int argc, char** argv) { return lab(argc, argv, test, profile, time_all); }
