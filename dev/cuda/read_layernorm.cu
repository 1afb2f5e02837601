// read_layernorm.cu: the input of a sublayer, LayerNorm(u) of u = pre y (mHC Eq. 3). Floor: y read,
// LayerNorm's output written: 5 C numbers a token.

#include "lab.cuh"

// 1. Two kernels: u goes through memory, in fp32, and LayerNorm reads it three times; a warp has a token.
static __global__ void naive_read_kernel(float* u, const floatX* y, const float* coef, int C, size_t count) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    size_t row = at / C, ch = at % C;
    float sum = 0;
    for (int i = 0; i < N; i++) sum = fmaf(coef[row * COEFS + i], to_float(y[(row * N + i) * C + ch]), sum);
    u[at] = sum;
}
static __global__ void naive_layernorm_kernel(floatX* ln, float* stats, const float* u, const floatX* weight,
                                              const floatX* bias, int C, int rows) {
    size_t row = (blockIdx.x * 256 + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)rows) return;
    float mean = 0, variance = 0;
    u += row * C;
    for (int ch = lane; ch < C; ch += WARP) mean += u[ch];
    mean = warp_sum(mean) / C;
    for (int ch = lane; ch < C; ch += WARP) variance += (u[ch] - mean) * (u[ch] - mean);
    float rstd = 1 / sqrtf(warp_sum(variance) / C + 1e-5f);
    for (int ch = lane; ch < C; ch += WARP)
        ln[row * C + ch] =
            from_float<floatX>((u[ch] - mean) * rstd * to_float(weight[ch]) + to_float(bias[ch]));
    if (lane == 0) stats[2 * row] = mean, stats[2 * row + 1] = rstd;
}

// 2. read_layernorm_fused_kernel of mhc_fused.cuh: u stays in a warp's registers, 16 bytes a lane at a time.

// ------------------------------------------------------------------------------------------------

struct Tensors {
    Device<floatX> y, ln, weight, bias;
    Device<float> coef, stats, u;
    explicit Tensors(Point& p)
        : y(p.x), ln(p.ln.size()), weight(numbers_at(p.weight(), p.C)), bias(numbers_at(p.bias(), p.C)),
          coef(p.coef), stats(p.stats.size()), u(p.u.size()) {}
};

static void naive(Tensors& t, const Point& p) {
    naive_read_kernel<<<ceil_div(t.u.count, 256), 256>>>(t.u.at, t.y.at, t.coef.at, p.C, t.u.count);
    naive_layernorm_kernel<<<ceil_div((size_t)p.rows * WARP, 256), 256>>>(
        t.ln.at, t.stats.at, t.u.at, t.weight.at, t.bias.at, p.C, p.rows);
    LAUNCHED();
}
static void fused(Tensors& t, const Point& p) {
    fused_read_layernorm_gpu(t.ln.at, t.stats.at, t.y.at, t.coef.at, t.weight.at, t.bias.at, p.C, p.rows, 0);
}

static void test() {
    for (const Case& c :
         {Case{RESIDUAL_MHC, 64, 37, 20}, Case{RESIDUAL_MHC, 8, 1, 20}, Case{RESIDUAL_IHC, 264, 9, 20},
          Case{RESIDUAL_IHC, 768, 8, 20}, Case{RESIDUAL_IHC, 1024, 3, 20}, Case{RESIDUAL_IHC, 1280, 3, 20},
          Case{RESIDUAL_IHC, 1600, 3, 20}, Case{RESIDUAL_IHC, 2560, 2, 20}}) {
        Point p(c);
        for (bool fast : {false, true}) {
            Tensors t(p);
            fast ? fused(t, p) : naive(t, p);
            char label[128];
            snprintf(label, sizeof label, "%s, %s", fast ? "fused" : "naive", p.name);
            compare(label, "LayerNorm", t.ln.get(), p.ln, BF16_TOLERANCE);
            compare(label, "statistics", t.stats.get(), p.stats, FP32_TOLERANCE);
        }
    }
}

static double floor_bytes(const Point& p) { return 2.0 * 5 * p.C * p.rows; }

static void profile() {
    Point p({RESIDUAL_MHC, 768, 64, 20});
    Tensors t(p);
    naive(t, p);
    fused(t, p);
    print_floor("naive_read_kernel", 2.0 * 4 * p.C * p.rows, 0);
    print_floor("naive_layernorm_kernel", 2.0 * p.C * p.rows, 4.0 * p.C);
    print_floor("read_layernorm_fused_kernel", floor_bytes(p), 4.0 * p.C);
}

static void time_all() {
    for (int C : {768, 1600}) {
        Point p({RESIDUAL_MHC, C, 16384, 20});
        Tensors t(p);
        print_time("naive", p.name, floor_bytes(p), [&] { naive(t, p); });
        print_time("u in registers", p.name, floor_bytes(p), [&] { fused(t, p); });
    }
}

int main(int argc, char** argv) { return lab(argc, argv, test, profile, time_all); }
