// test_gpt_mhc.cu: every kernel of train_gpt_mhc.cu, and the whole step, against the CPU reference.
//     ./test_gpt_mhc_cuda [part of a test's name]...
//
// Inputs are rounded to floatX before both sides see them, so that what differs is arithmetic. Relative L2
// error per tensor, |a - b| / |b|; NaN fails every comparison.

#define TESTING
#include "train_gpt_mhc.cu"

#include <vector>

static int passed, failed;
static uint64_t bits = 0x9e3779b97f4a7c15u; // of every result that must not depend on the order of threads

#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (condition) {                                                        \
            passed++;                                                           \
        } else {                                                                \
            failed++;                                                           \
            printf("FAIL %s:%d: ", __func__, __LINE__);                         \
            printf(__VA_ARGS__);                                                \
            printf("\n");                                                       \
        }                                                                       \
    } while (0)

// Half a unit in the last place, relative: what one rounding to floatX can lose.
static const double ROUNDING = sizeof(floatX) == 2 ? 1.0 / 256 : 1.0 / (1 << 24);

[[maybe_unused]] static float host_float(float x) { return x; }
[[maybe_unused]] static float host_float(__nv_bfloat16 x) { return __bfloat162float(x); }
static float rounded(float x) {                 // to floatX and back
    return sizeof(floatX) == 2 ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

// N(mean, deviation) numbers, already floatX's, a function of the seed
static std::vector<float> random_numbers(uint64_t seed, size_t count, float deviation = 1, float mean = 0) {
    std::vector<float> x(count);
    for (size_t i = 0; i < count; i++) x[i] = rounded(mean + deviation * (float)normal(seed, i));
    return x;
}

// Device memory of one tensor, freed at the end of its scope. T is floatX, float or int32_t.
template <class T> struct Device {
    T* at = nullptr;
    size_t count;
    explicit Device(size_t n) : count(n) { CUDA(cudaMalloc(&at, (n ? n : 1) * sizeof(T))); }
    template <class From> explicit Device(const std::vector<From>& from) : Device(from.size()) { put(from); }
    Device(const Device&) = delete;
    ~Device() { cudaFree(at); }
    template <class From> void put(const std::vector<From>& from) {
        std::vector<T> copy(from.begin(), from.end());
        if (count) CUDA(cudaMemcpy(at, copy.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    void zero() { CUDA(cudaMemset(at, 0, count * sizeof(T))); }
    std::vector<float> get() const {            // for T int32_t use get_as<int32_t>
        std::vector<T> raw = get_as<T>();
        std::vector<float> x(count);
        for (size_t i = 0; i < count; i++) x[i] = host_float(raw[i]);
        return x;
    }
    template <class U> std::vector<U> get_as() const {
        std::vector<U> raw(count);
        if (count) CUDA(cudaMemcpy(raw.data(), at, count * sizeof(U), cudaMemcpyDeviceToHost));
        return raw;
    }
};

static double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < b.size(); i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    if (a.size() != b.size()) return INFINITY;
    return difference == 0 ? 0 : size == 0 ? INFINITY : sqrt(difference / size);
}

static void remember_bits(const void* at, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) bits = mix64(bits ^ ((const unsigned char*)at)[i]);
}

// The device's tensor against the reference's: name says which, tolerance is relative L2.
static void compare(const char* name, const std::vector<float>& device, const std::vector<float>& reference,
                    double tolerance) {
    double error = relative_error(device, reference);
    remember_bits(device.data(), device.size() * sizeof(float));
    CHECK(error <= tolerance, "%s: relative error %.3g, expected at most %.3g", name, error, tolerance);
}

// sums (2, threads), largest (2, threads): of two calls at once, as every thread got them
static __global__ void over_a_block_kernel(float* sums, float* largest, const float* x) {
    int t = threadIdx.x, threads = blockDim.x;
    for (int call = 0; call < 2; call++) sums[call * threads + t] = block_sum(x[call * threads + t]);
    for (int call = 0; call < 2; call++) largest[call * threads + t] = block_max(x[call * threads + t]);
}

static void test_over_a_block(void) {
    for (int threads : {32, 96, 1024}) {
        std::vector<float> x(2 * threads), sum(2 * threads), largest(2 * threads, -INFINITY);
        for (int i = 0; i < 2 * threads; i++) x[i] = (float)(i * 7 % 13 - 20);      // its sums are exact
        for (int i = 0; i < 2 * threads; i++)
            for (int k = i / threads * threads; k < (i / threads + 1) * threads; k++)
                sum[i] += x[k], largest[i] = fmaxf(largest[i], x[k]);
        Device<float> x_(x), sums(2 * threads), largest_(2 * threads);
        over_a_block_kernel<<<1, threads>>>(sums.at, largest_.at, x_.at);
        compare("sums over a block", sums.get(), sum, 0);
        compare("largest of a block", largest_.get(), largest, 0);
    }
}

// ------------------------------------------------------------------------------------------------
// Products and linear layers. A product of floatX's is summed in fp32: 1e-5 for sums of at most a few hundred
// terms in another order. A floatX result is rounded once more: each number by at most half a unit in the
// last place, which is 2^-8 of it in bf16 (8 bits with the hidden one), hence the whole too. A kernel of ours
// behind the product makes that two roundings.

static const double HALF_UNIT = sizeof(floatX) == 2 ? 1.0 / 256 : 1.0 / (1 << 24);
static const double LAYER_FP32 = 1e-5, LAYER_FLOATX = HALF_UNIT + LAYER_FP32;

struct LinearCase { int rows, IC, OC; };

// The last is a head: OC is a vocabulary padded to 128 rows
static const LinearCase linear_cases[] = {{1, 5, 3},      {7, 24, 33},   {37, 33, 100}, {37, 64, 24},
                                          {7, 100, 11},   {150, 24, 96}, {130, 64, 7},  {257, 5, 8},
                                          {37, 100, 256}, {1, 64, 256}};

struct LinearReference {
    std::vector<float> in, weight, bias, dout, out, gelu, before, din, dgelu, dweight, dbias;
};

static LinearReference linear_reference(const LinearCase& c, uint64_t seed) {
    LinearReference r;
    size_t rows = c.rows, IC = c.IC, OC = c.OC;
    r.in = random_numbers(seed, rows * IC);
    r.weight = random_numbers(seed + 1, OC * IC, 1 / sqrtf((float)IC));
    r.bias = random_numbers(seed + 2, OC);
    r.dout = random_numbers(seed + 3, rows * OC);
    r.before = random_numbers(seed + 4, rows * IC); // of the GELU that made `in`, where there is one
    r.out.resize(rows * OC), r.gelu.resize(rows * OC), r.din.resize(rows * IC);
    r.dweight = random_numbers(seed + 5, OC * IC);              // gradients of earlier micro-batches
    r.dbias = random_numbers(seed + 6, OC);
    linear_forward(r.out.data(), r.in.data(), r.weight.data(), r.bias.data(), c.rows, c.IC, c.OC);
    gelu_forward(r.gelu.data(), r.out.data(), r.out.size());
    linear_backward_input(r.din.data(), r.dout.data(), r.weight.data(), c.rows, c.IC, c.OC);
    linear_backward_weight(r.dweight.data(), r.dbias.data(), r.dout.data(), r.in.data(), c.rows, c.IC, c.OC);
    r.dgelu = r.din;
    gelu_backward(r.dgelu.data(), r.before.data(), r.dgelu.size());
    return r;
}

// A tensor that begins `offset` numbers after an aligned address, with NaN before it and behind it. What a
// result holds at first is NaN too: every number is written, none is added to.
template <class T> struct Placed {
    Device<T> memory;
    size_t offset, count;
    explicit Placed(const std::vector<float>& x, int after = 0)
        : memory(x.size() + 2 * after), offset(after), count(x.size()) {
        std::vector<float> all(x.size() + 2 * offset, NAN);
        std::copy(x.begin(), x.end(), all.begin() + offset);
        memory.put(all);
    }
    explicit Placed(size_t size, int after = 0) : Placed(std::vector<float>(size, NAN), after) {}
    T* at() const { return memory.at + offset; }
    std::vector<float> get() const {
        std::vector<float> all = memory.get();
        bool kept = true;
        for (size_t i = 0; i < all.size(); i++) kept = kept && (i - offset < count || std::isnan(all[i]));
        CHECK(kept, "numbers beside a tensor of %zu were written", count);
        return std::vector<float>(all.begin() + offset, all.begin() + offset + count);
    }
};

struct Products {               // the library, opened
    Lt lt;
    Device<char> workspace;
    Products() : workspace(32 << 20) { lt_open(&lt, workspace.at, workspace.count); }
    ~Products() { lt_close(&lt); }
};

static void check_linear(Products& p, const LinearCase& c, const LinearReference& r, int offset) {
    char name[100];
    auto named = [&](const char* what) {
        snprintf(name, sizeof name, "%s, rows %d IC %d OC %d offset %d fused %d", what, c.rows, c.IC, c.OC,
                 offset, p.lt.fuses_gelu);
        return name;
    };
    // no epilogue where addresses are not aligned, none with GELU where rows are not whole vectors either
    bool fuses = p.lt.fuses_gelu && !offset;
    double one = LAYER_FLOATX, two = HALF_UNIT + LAYER_FLOATX, bias = offset ? two : one;
    Placed<floatX> in(r.in, offset), weight(r.weight, offset), bias_(r.bias, offset), dout(r.dout, offset);
    Placed<floatX> out(r.out.size(), offset), gelu(r.gelu.size(), offset), din(r.din.size(), offset);
    Placed<floatX> before(r.before, offset);
    linear_forward_gpu(&p.lt, out.at(), NULL, in.at(), weight.at(), bias_.at(), c.rows, c.IC, c.OC, 0);
    compare(named("linear"), out.get(), r.out, bias);
    linear_forward_gpu(&p.lt, out.at(), gelu.at(), in.at(), weight.at(), bias_.at(), c.rows, c.IC, c.OC, 0);
    compare(named("linear before GELU"), out.get(), r.out, bias);
    compare(named("GELU of linear"), gelu.get(), r.gelu,
            fuses && c.OC % 8 == 0 ? one : bias + one);
    linear_backward_input_gpu(&p.lt, din.at(), dout.at(), weight.at(), NULL, c.rows, c.IC, c.OC, 0);
    compare(named("linear din"), din.get(), r.din, one);
    linear_backward_input_gpu(&p.lt, din.at(), dout.at(), weight.at(), before.at(), c.rows, c.IC, c.OC, 0);
    compare(named("linear din through GELU"), din.get(), r.dgelu,
            fuses && c.IC % 8 == 0 ? one : two);
}

static void check_linear_weights(Products& p, const LinearCase& c, const LinearReference& r, uint64_t seed,
                                 int offset) {
    Placed<floatX> in(r.in, offset), dout(r.dout, offset);
    Placed<float> dweight(random_numbers(seed + 5, r.dweight.size()), offset);
    Placed<float> dbias(random_numbers(seed + 6, r.dbias.size()), offset);
    Placed<float> slabs(sum_scratch(c.rows, c.OC), offset);
    char name[100];
    linear_backward_weight_gpu(&p.lt, dweight.at(), dbias.at(), dout.at(), in.at(), c.rows, c.IC, c.OC,
                               slabs.at(), 0);
    snprintf(name, sizeof name, "linear dweight, rows %d IC %d OC %d offset %d", c.rows, c.IC, c.OC, offset);
    compare(name, dweight.get(), r.dweight, LAYER_FP32);
    snprintf(name, sizeof name, "linear dbias, rows %d IC %d OC %d offset %d", c.rows, c.IC, c.OC, offset);
    compare(name, dbias.get(), r.dbias, LAYER_FP32);
}

static void test_linear(void) {
    Products p;
    bool fuses = p.lt.fuses_gelu;
    uint64_t seed = 100;
    for (const LinearCase& c : linear_cases) {
        LinearReference r = linear_reference(c, seed += 10);
        for (int offset = 0; offset < 2; offset++) {
            p.lt.fuses_gelu = fuses;
            check_linear(p, c, r, offset);
            check_linear_weights(p, c, r, seed, offset);
        }
        p.lt.fuses_gelu = false;
        check_linear(p, c, r, 0);
    }
}

// Without a bias, as in the head: logits (rows, Vp), and dwte += twice
static void test_head_products(void) {
    Products p;
    LinearCase c = {37, 24, 256};
    LinearReference r = linear_reference(c, 700);
    std::vector<float> logits(r.out.size()), dwte = r.dweight, dbias(c.OC);
    linear_forward(logits.data(), r.in.data(), r.weight.data(), NULL, c.rows, c.IC, c.OC);
    linear_backward_input(r.din.data(), r.dout.data(), r.weight.data(), c.rows, c.IC, c.OC);
    linear_backward_weight(dwte.data(), dbias.data(), r.dout.data(), r.in.data(), c.rows, c.IC, c.OC);
    Device<floatX> in(r.in), weight(r.weight), dout(r.dout), out(r.out.size());
    Device<float> dweight(random_numbers(705, r.dweight.size()));
    linear_forward_gpu(&p.lt, out.at, NULL, in.at, weight.at, NULL, c.rows, c.IC, c.OC, 0);
    compare("logits", out.get(), logits, LAYER_FLOATX);
    for (int i = 0; i < 2; i++) weight_gradient_gpu(&p.lt, dweight.at, dout.at, in.at, c.rows, c.IC, c.OC, 0);
    compare("dwte of two chunks", dweight.get(), dwte, LAYER_FP32);
}

// What is known of a product is made once: another step asks for nothing new.
static void test_products_are_kept(void) {
    Products p;
    LinearReference r = linear_reference(linear_cases[5], 800);
    check_linear(p, linear_cases[5], r, 0);
    check_linear(p, linear_cases[5], r, 1);
    int known = p.lt.count;
    check_linear(p, linear_cases[5], r, 0);
    check_linear(p, linear_cases[5], r, 1);
    CHECK(known > 0 && p.lt.count == known, "found %d products, expected still %d", p.lt.count, known);
}

// Sums over rows that fill several slabs, into two places
static void test_sum_columns(void) {
    static const int sizes[][3] = {{1, 5, 0}, {700, 33, 0}, {129, 24, 3}, {1000, 96, 32}, {257, 1, 100}};
    for (const int* s : sizes) {
        int rows = s[0], cols = s[1] + s[2];
        std::vector<float> a = random_numbers(rows, (size_t)rows * cols),
                           sums = random_numbers(rows + 1, cols);
        Device<float> got(sums), slabs(sum_scratch(rows, cols)), floats(a);
        Device<floatX> terms(a);
        add_column_sums(sums.data(), a.data(), NULL, rows, cols);
        sum_columns_gpu(got.at, s[1], got.at + s[1], s[2], slabs.at, terms.at, rows, 0);
        compare("sums of columns", got.get(), sums, LAYER_FP32);
        add_column_sums(sums.data(), a.data(), NULL, rows, cols);
        sum_columns_gpu(got.at, s[1], got.at + s[1], s[2], slabs.at, floats.at, rows, 0);
        compare("sums of columns of floats", got.get(), sums, LAYER_FP32);
    }
}

// A sum is the same whichever of the holders makes it: to the bit that of the reference's exchange.
static void test_sum_parts(void) {
    const int count = 300, holders = 5;
    std::vector<float> all = random_numbers(9, count * holders), sum(count);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < holders; j++) sum[i] = j ? sum[i] + all[j * count + i] : all[i];
    for (int mine = 0; mine < holders; mine++) {
        std::vector<float> own(all.begin() + mine * count, all.begin() + (mine + 1) * count), parts = all;
        parts.erase(parts.begin() + mine * count, parts.begin() + (mine + 1) * count);
        Device<float> own_(own), parts_(parts);
        sum_parts_gpu(own_.at, parts_.at, count, holders, mine, 0);
        compare("sum of parts", own_.get(), sum, 0);
    }
}

// What lies behind the sum is a number, which one more sum would change
static void test_linear_bias(void) {
    for (int cols : {1, 11, 100}) {
        std::vector<float> x = random_numbers(cols, 7 * cols + 1), bias = random_numbers(cols + 1, cols),
                           sum = x;
        for (int i = 0; i < 7 * cols; i++) sum[i] = rounded(x[i] + bias[i % cols]);
        Device<floatX> out(x), bias_(bias);
        add_bias_gpu(out.at, bias_.at, 7, cols, 0);
        compare("bias", out.get(), sum, 0);
    }
}

// Beyond where tanh is 1 to the last bit, around zero, and at every alignment
static void test_gelu(void) {
    for (size_t count : {1, 7, 64, 1000, 4096}) {
        std::vector<float> x = random_numbers(count, count, 3), out(count),
                           d = random_numbers(count + 1, count);
        for (size_t i = 0; i < count; i += 17) x[i] = rounded((i % 2 ? 30.0f : -30.0f));
        for (int offset = 0; offset < 2; offset++) {
            Placed<floatX> in(x, offset), got(count, offset), gradient(d, offset);
            std::vector<float> dx = d;
            gelu_forward(out.data(), x.data(), count);
            gelu_backward(dx.data(), x.data(), count);
            gelu_forward_gpu(got.at(), in.at(), count, 0);
            gelu_backward_gpu(gradient.at(), in.at(), count, 0);
            compare("GELU", got.get(), out, LAYER_FLOATX);
            compare("GELU's gradient", gradient.get(), dx, LAYER_FLOATX);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Embedding, LayerNorm, readout, residual, classifier. fp32 sums of at most some thousand terms in another
// order, and floatX results that are rounded once: the tolerances of the products.

// A model of one block with random tensors, for the reference's functions
struct EndsModel {
    Model m;
    std::vector<float> params, grads;
    EndsModel(int V, int T, int n, int C, uint64_t seed) {
        Config c;
        memset(&c, 0, sizeof c);
        c.L = c.NH = 1, c.C = C, c.T = T, c.V = V, c.n = n;
        c.residual = n > 1 ? RESIDUAL_IHC : RESIDUAL_PLAIN;
        model_layout(&m, &c);
        params = random_numbers(seed, m.size);
        grads = random_numbers(seed + 1, m.size);               // of earlier micro-batches
        m.params = params.data(), m.grads = grads.data();
    }
    ~EndsModel() { model_close(&m); }
    std::vector<float> of(const std::vector<float>& numbers, TensorId id) const {
        const float* first = numbers.data() + m.first[id];
        const TensorSpec* s = &tensor_specs[id];
        return std::vector<float>(first, first + dim_size(&m.c, s->rows) * dim_size(&m.c, s->cols));
    }
    std::vector<float> param_of(TensorId id) const { return of(params, id); }
    std::vector<float> grad_of(TensorId id) const { return of(grads, id); }
};

struct EndsCase { int B, T, n, C, V; };
static const EndsCase ends_cases[] = {{1, 1, 1, 5, 11},    {1, 7, 4, 24, 11},  {3, 37, 2, 33, 131},
                                      {2, 16, 8, 64, 11},  {5, 7, 3, 100, 11}, {4, 50, 5, 64, 2},
                                      {1, 37, 7, 24, 131}, {2, 9, 6, 320, 20}};

static std::vector<int32_t> random_tokens(uint64_t seed, int rows, int V) {
    std::vector<int32_t> tokens(rows);
    for (int r = 0; r < rows; r++) tokens[r] = (int32_t)(hash64(seed, r) % (uint64_t)V);
    return tokens;
}

struct HostGroups {             // on the host
    std::vector<int32_t> order, first, token;
    int count;
    HostGroups(const std::vector<int32_t>& tokens, int V)
        : order(tokens.size()), first(tokens.size() + 1), token(tokens.size()) {
        count = token_groups(order.data(), first.data(), token.data(), tokens.data(), (int)tokens.size(), V);
    }
};

// Every row once, in the group of its token; tokens ascend, and within a group rows do.
static void check_groups(const std::vector<int32_t>& tokens, int V) {
    HostGroups g(tokens, V);
    int rows = (int)tokens.size(), seen = 0;
    bool right = g.count >= 1 && g.first[0] == 0 && g.first[g.count] == rows;
    for (int k = 0; right && k < g.count; k++) {
        right = g.first[k] < g.first[k + 1] && (k == 0 || g.token[k - 1] < g.token[k]);
        for (int i = g.first[k]; right && i < g.first[k + 1]; i++, seen++)
            right = tokens[g.order[i]] == g.token[k] && (i == g.first[k] || g.order[i - 1] < g.order[i]);
    }
    CHECK(right && seen == rows, "groups of %d tokens below %d are wrong", rows, V);
    remember_bits(g.order.data(), g.order.size() * sizeof(int32_t));
}

static void test_token_groups(void) {
    for (int V : {1, 2, 11, 256, 4096, 4097, 50257, 10000000})
        for (int rows : {1, 7, 64, 1000}) check_groups(random_tokens(V + rows, rows, V), V);
    std::vector<int32_t> last(5, 9999999);
    check_groups(last, 10000000);
}

static void check_embedding(const EndsCase& c, uint64_t seed, const std::vector<int32_t>& tokens) {
    EndsModel m(c.V, c.T, c.n, c.C, seed);
    int rows = c.B * c.T;
    size_t size = (size_t)rows * c.n * c.C;
    std::vector<float> x(size), dx = random_numbers(seed + 2, size);
    std::vector<float> dwte = m.grad_of(WTE), dwpe = m.grad_of(WPE);
    HostGroups g(tokens, c.V);
    Device<int32_t> device_tokens(tokens), order(g.order), first(g.first), token(g.token);
    Device<floatX> wte(m.param_of(WTE)), wpe(m.param_of(WPE)), got(size), gradient(dx);
    Device<float> got_wte(dwte), got_wpe(dwpe);
    TokenGroups groups = {order.at, first.at, token.at, g.count};
    got.put(std::vector<float>(size, NAN));
    embedding_forward(&m.m, x.data(), tokens.data(), {c.B, c.T, 0, rows});
    embedding_backward(&m.m, dx.data(), tokens.data(), c.B, c.T);
    embedding_forward_gpu(got.at, device_tokens.at, wte.at, wpe.at, rows, c.T, c.n, c.C, 0);
    embedding_backward_gpu(got_wte.at, got_wpe.at, gradient.at, &groups, rows, c.T, c.n, c.C, 0);
    compare("embedding", got.get(), x, LAYER_FLOATX);
    compare("embedding dwte", got_wte.get(), m.grad_of(WTE), LAYER_FP32);
    compare("embedding dwpe", got_wpe.get(), m.grad_of(WPE), LAYER_FP32);
}

static void test_embedding(void) {
    uint64_t seed = 1000;
    for (const EndsCase& c : ends_cases) {
        seed += 10;
        check_embedding(c, seed, random_tokens(seed, c.B * c.T, c.V));
    }
    EndsCase frequent = {4, 100, 4, 24, 131};                   // one token has nine rows of ten
    std::vector<int32_t> tokens = random_tokens(1, 400, 131);
    for (int r = 0; r < 400; r++)
        if (r % 10) tokens[r] = 130;
    check_embedding(frequent, 1500, tokens);
}

static void check_readout(const EndsCase& c, uint64_t seed) {
    EndsModel m(c.V, c.T, c.n, c.C, seed);
    int rows = c.B * c.T;
    size_t size = (size_t)rows * c.C;
    std::vector<float> x = random_numbers(seed + 2, size * c.n), dln = random_numbers(seed + 3, size);
    std::vector<float> mean(size), stats(rows * 2), ln(size), dx(size * c.n), du(size), xhat(size);
    Device<floatX> state(x), weight(m.param_of(LN_F_W)), bias(m.param_of(LN_F_B)), dln_(dln);
    Device<floatX> got_mean(size), got_ln(size), got_dx(size * c.n);
    Device<float> got_stats(rows * 2), dweight(m.grad_of(LN_F_W)), dbias(m.grad_of(LN_F_B));
    Device<float> slabs(sum_scratch(rows, 2 * c.C));
    Activations a;
    memset(&a, 0, sizeof a);
    a.mean = mean.data(), a.stats = stats.data(), a.ln = ln.data(), a.dstate = dx.data(), a.dln = dln.data();
    a.du = du.data(), a.xhat = xhat.data();
    got_dx.put(std::vector<float>(size * c.n, NAN));
    readout_forward(&m.m, &a, x.data(), {c.B, c.T, 0, rows});
    readout_forward_gpu(got_mean.at, got_ln.at, got_stats.at, state.at, weight.at, bias.at, rows, c.n, c.C,
                        0);
    compare("mean over streams", got_mean.get(), mean, LAYER_FLOATX);
    std::vector<float> seen = got_mean.get();                   // LayerNorm sees the rounded mean
    a.mean = seen.data();
    for (int r = 0; r < rows; r++)
        layernorm_forward(&ln[(size_t)r * c.C], &stats[r * 2], &seen[(size_t)r * c.C],
                          m.m.params + m.m.first[LN_F_W], m.m.params + m.m.first[LN_F_B], c.C);
    compare("readout", got_ln.get(), ln, LAYER_FLOATX);
    compare("readout stats", got_stats.get(), stats, LAYER_FP32);
    got_stats.put(stats);
    readout_backward(&m.m, &a, rows);
    readout_backward_gpu(got_dx.at, dweight.at, dbias.at, dln_.at, got_stats.at, got_mean.at, weight.at,
                         slabs.at, rows, c.n, c.C, 0);
    compare("readout dx", got_dx.get(), dx, LAYER_FLOATX);
    compare("readout dweight", dweight.get(), m.grad_of(LN_F_W), LAYER_FP32);
    compare("readout dbias", dbias.get(), m.grad_of(LN_F_B), LAYER_FP32);
}

static void test_readout(void) {
    uint64_t seed = 2000;
    for (const EndsCase& c : ends_cases) check_readout(c, seed += 10);
}

struct NormCase { int rows, C; };
static const NormCase norm_cases[] = {{1, 5},   {7, 24},  {37, 33}, {37, 64}, {300, 24},
                                      {7, 100}, {130, 7}, {1, 320}, {9, 1000}};

static void check_layernorm(const NormCase& c, uint64_t seed, int offset) {
    size_t size = (size_t)c.rows * c.C, C = c.C;
    std::vector<float> u = random_numbers(seed, size, 2, 1), weight = random_numbers(seed + 1, C, 1, 1);
    std::vector<float> bias = random_numbers(seed + 2, C), dout = random_numbers(seed + 3, size);
    std::vector<float> du = random_numbers(seed + 4, size), dweight = random_numbers(seed + 5, C);
    std::vector<float> dbias = random_numbers(seed + 6, C), out(size), stats(c.rows * 2), xhat(size),
                       part(size);
    Placed<floatX> u_(u, offset), weight_(weight, offset), bias_(bias, offset), dout_(dout, offset),
        du_(du, offset);
    Placed<floatX> out_(size, offset);
    Placed<float> stats_((size_t)c.rows * 2, offset), dweight_(dweight, offset), dbias_(dbias, offset);
    Placed<float> slabs(sum_scratch(c.rows, 2 * c.C), offset);
    for (int r = 0; r < c.rows; r++) {
        size_t at = r * C;
        layernorm_forward(&out[at], &stats[r * 2], &u[at], weight.data(), bias.data(), c.C);
        layernorm_backward(&part[at], &xhat[at], &dout[at], &stats[r * 2], &u[at], weight.data(), c.C);
    }
    for (size_t i = 0; i < size; i++) du[i] += part[i];
    add_column_sums(dweight.data(), dout.data(), xhat.data(), c.rows, c.C);
    add_column_sums(dbias.data(), dout.data(), NULL, c.rows, c.C);
    layernorm_forward_gpu(out_.at(), stats_.at(), u_.at(), weight_.at(), bias_.at(), c.rows, c.C, 0);
    layernorm_backward_gpu(du_.at(), du_.at(), dweight_.at(), dbias_.at(), dout_.at(), stats_.at(), u_.at(),
                           weight_.at(), slabs.at(), c.rows, c.C, 0);
    compare("LayerNorm", out_.get(), out, LAYER_FLOATX);
    compare("LayerNorm stats", stats_.get(), stats, LAYER_FP32);
    compare("LayerNorm du", du_.get(), du, LAYER_FLOATX);
    compare("LayerNorm dweight", dweight_.get(), dweight, LAYER_FP32);
    compare("LayerNorm dbias", dbias_.get(), dbias, LAYER_FP32);
}

static void test_layernorm(void) {
    uint64_t seed = 3000;
    for (const NormCase& c : norm_cases)
        for (int offset = 0; offset < 2; offset++) check_layernorm(c, seed += 10, offset);
}

// y = x + f or f, at every alignment; y may be x
static void test_add(void) {
    for (size_t count : {1, 7, 640, 4099}) {
        std::vector<float> x = random_numbers(count, count), f = random_numbers(count + 1, count), sum(count);
        for (size_t i = 0; i < count; i++) sum[i] = rounded(x[i] + f[i]);
        for (int offset = 0; offset < 2; offset++) {
            Placed<floatX> x_(x, offset), f_(f, offset), y(count, offset);
            add_gpu(y.at(), x_.at(), f_.at(), count, 0);
            compare("x + f", y.get(), sum, 0);
            add_gpu(y.at(), NULL, f_.at(), count, 0);
            compare("none: f", y.get(), f, 0);
            add_gpu(x_.at(), x_.at(), f_.at(), count, 0);
            compare("x += f", x_.get(), sum, 0);
        }
    }
}

struct ClassifierCase { int rows, V, Vp; float deviation; };
static const ClassifierCase classifier_cases[] = {{7, 11, 128, 1},    {37, 131, 256, 3}, {1, 1, 128, 1},
                                                  {7, 128, 128, 1},   {3, 131, 131, 1},  {5, 11, 13, 30},
                                                  {4, 5000, 5120, 2}, {2, 3001, 3001, 8}};

static void check_classifier(const ClassifierCase& c, uint64_t seed) {
    size_t Vp = c.Vp;
    std::vector<float> logits = random_numbers(seed, c.rows * Vp, c.deviation), d, losses(c.rows);
    std::vector<int32_t> targets = random_tokens(seed + 1, c.rows, c.V);
    float scale = 1 / 37.0f;
    targets[0] = c.V - 1;
    for (int r = 0; r < c.rows; r++)                            // padding: larger than all that is there
        for (size_t v = c.V; v < Vp; v++) logits[r * Vp + v] = 1000;
    Device<floatX> got(logits);
    Device<float> got_losses(losses);
    Device<int32_t> targets_(targets);
    d = logits;
    for (int r = 0; r < c.rows; r++) {
        losses[r] = cross_entropy(&d[r * Vp], targets[r], scale, c.V);
        for (size_t v = c.V; v < Vp; v++) d[r * Vp + v] = 0;
    }
    classifier_gpu(got_losses.at, got.at, targets_.at, 0, c.rows, c.V, c.Vp, 0);
    compare("losses alone", got_losses.get(), losses, LAYER_FP32);
    compare("logits where only losses are asked for", got.get(), logits, 0);
    got_losses.zero();
    classifier_gpu(got_losses.at, got.at, targets_.at, scale, c.rows, c.V, c.Vp, 0);
    compare("losses", got_losses.get(), losses, LAYER_FP32);
    std::vector<float> gradient = got.get();
    compare("dlogits", gradient, d, LAYER_FLOATX);
    bool zero = true;
    for (int r = 0; r < c.rows; r++)
        for (size_t v = c.V; v < Vp; v++) zero = zero && gradient[r * Vp + v] == 0;
    CHECK(zero, "padding columns from %d on have a gradient", c.V);
}

static void test_classifier(void) {
    uint64_t seed = 4000;
    for (const ClassifierCase& c : classifier_cases) check_classifier(c, seed += 10);
}

// What is not finite shows in the loss; the other rows stay right.
static void test_classifier_nonfinite(void) {
    std::vector<float> logits(3 * 128, 0);
    logits[5] = NAN;
    logits[128 + 100] = INFINITY;
    Device<floatX> got(logits);
    Device<float> losses(3);
    Device<int32_t> targets(std::vector<int32_t>{0, 1, 2});
    classifier_gpu(losses.at, got.at, targets.at, 1, 3, 120, 128, 0);
    std::vector<float> l = losses.get();
    CHECK(!std::isfinite(l[0]) && !std::isfinite(l[1]), "losses %g and %g, expected none", (double)l[0],
          (double)l[1]);
    CHECK(fabs((double)l[2] - log(120.0)) < 1e-5, "loss %g, expected %g", (double)l[2], log(120.0));
}

static void test_add_gradients(void) {
    std::vector<float> a = random_numbers(1, 1001), b = random_numbers(2, 1001), sum(1001);
    Device<float> a_(a), b_(b);
    for (size_t i = 0; i < a.size(); i++) sum[i] = a[i] + b[i];
    add_gradients_gpu(a_.at, b_.at, a.size(), 0);
    compare("wte's two gradients", a_.get(), sum, 0);
}

// ------------------------------------------------------------------------------------------------
// Hyper-connections against the reference's, far from the initial values: random fn, base, scale and weights,
// logits of Sinkhorn that are several units apart.
//
// Both sides get the same numbers, and between a kernel's inputs and its results nothing is rounded to floatX
// (what is lies in memory; the tests fetch it from there and hand it to the reference). So what is fp32 may
// differ by fp32's own rounding alone, in both builds: sums of at most 1200 terms, relative errors near 1e-7
// sqrt(terms), and the way back through Sinkhorn-Knopp, whose differences cancel a digit. A floatX result
// differs by one rounding more: each element by at most half a unit in the last place, 2^-8 of itself in bf16
// (8 bits with the hidden one), hence the whole too.

//
// With one stream LayerNorm does not see what pre multiplies, but for its epsilon: dpre is what a sum of C
// terms leaves when it cancels, three digits below them, and what follows from it is as much less exact.

static const double FP32_TOLERANCE = 1e-5;
static const double FLOATX_TOLERANCE = FP32_TOLERANCE + (sizeof(floatX) == 2 ? 1.0 / 256 : 0);

struct ConnectionCase { int residual, n, C, rows, order, iters, maps; bool is_static; };

enum { ALL_MAPS = 7 };
static const ConnectionCase connection_cases[] = {
    // mode        n  C    rows order       iters maps static
    {RESIDUAL_MHC, 4, 64,  37,  ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_MHC, 1, 24,  7,   ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_MHC, 2, 200, 7,   ORDER_RC,   20, ALL_MAPS, false},
    {RESIDUAL_MHC, 3, 33,  37,  ORDER_C,    5,  ALL_MAPS, false},
    {RESIDUAL_MHC, 5, 5,   37,  ORDER_R,    3,  ALL_MAPS, false},
    {RESIDUAL_MHC, 6, 24,  9,   ORDER_RC,   1,  ALL_MAPS, false},
    {RESIDUAL_MHC, 7, 33,  1,   ORDER_NONE, 20, ALL_MAPS, false},
    {RESIDUAL_MHC, 8, 100, 7,   ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_MHC, 4, 5,   150, ORDER_CR,   100, ALL_MAPS, false},
    {RESIDUAL_MHC, 4, 24,  7,   ORDER_CR,   20, 0,        false},
    {RESIDUAL_MHC, 4, 24,  7,   ORDER_CR,   20, 1 | 2,    false},
    {RESIDUAL_MHC, 2, 24,  7,   ORDER_CR,   20, 2 | 4,    false},
    {RESIDUAL_MHC, 4, 24,  7,   ORDER_CR,   20, ALL_MAPS, true},
    {RESIDUAL_HC,  4, 64,  37,  ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_HC,  1, 33,  7,   ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_HC,  2, 100, 7,   ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_HC,  8, 5,   150, ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_HC,  3, 24,  7,   ORDER_CR,   20, 1 | 4,    false},
    {RESIDUAL_HC,  4, 24,  1,   ORDER_CR,   20, 2,        false},
    {RESIDUAL_HC,  4, 24,  7,   ORDER_CR,   20, ALL_MAPS, true},
    {RESIDUAL_IHC, 4, 64,  37,  ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_IHC, 1, 5,   7,   ORDER_CR,   20, ALL_MAPS, false},
    {RESIDUAL_IHC, 8, 33,  7,   ORDER_CR,   20, 1,        false},
    {RESIDUAL_IHC, 2, 24,  7,   ORDER_CR,   20, 2 | 4,    false},
    {RESIDUAL_IHC, 4, 24,  7,   ORDER_CR,   20, ALL_MAPS, true},
};

static Config connection_config(const ConnectionCase& t) {
    Config c;
    memset(&c, 0, sizeof c);
    c.L = c.NH = c.T = 1;
    c.V = 2;
    c.C = t.C;
    c.residual = t.residual;
    c.n = t.n;
    c.iters = t.iters;
    c.order = t.order;
    c.maps = t.maps;
    c.is_static = t.is_static;
    c.gap = 4;
    return c;
}

typedef std::vector<float> Numbers;

static Numbers numbers_at(const real* at, size_t count) { return Numbers(at, at + count); }

static Numbers rounded_numbers(Numbers x) {
    for (float& value : x) value = rounded(value);
    return x;
}

// A connection at a random point, and what the reference computes forward from it. Sublayer 1 of a model of
// one block.
struct ConnectionPoint {
    Config c;
    Connections k;
    Model m;
    Sublayer s;
    int rows;
    char name[96];
    Numbers x, f, params, grads, coef, mix, rnorm, u, stats, ln;

    explicit ConnectionPoint(const ConnectionCase& t)
        : c(connection_config(t)), k(connections_of(&c)), rows(t.rows) {
        size_t r = (size_t)rows, C = (size_t)c.C;
        snprintf(name, sizeof name, "mode %d, n %d, C %d, rows %d, order %d, maps %d%s", c.residual, c.n, c.C,
                 rows, c.order, c.maps, c.is_static ? ", static" : "");
        model_layout(&m, &c);
        params.resize(m.size);
        grads = random_numbers(11, m.size);                     // what is added to
        m.params = params.data();
        m.grads = grads.data();
        fill_params();
        x = random_numbers(1, r * k.n * C, 1, 0.3f);
        f = random_numbers(2, r * C);
        coef.resize(r * k.count), mix.resize(r * k.M), rnorm.resize(r * k.groups);
        u.resize(r * C), stats.resize(r * 2), ln.resize(r * C);
        forward(x);
    }
    ~ConnectionPoint() { model_close(&m); }

    void fill_params() {
        size_t fn_size = (size_t)k.outs * k.width;
        for (size_t i = 0; i < fn_size; i++) fn()[i] = (float)(normal(3, i) / sqrt((double)k.width));
        for (int i = 0; i < k.M; i++) base()[i] = (float)(normal(4, i) * (i < 2 * k.n ? 1 : 2.5));
        for (int i = 0; i < k.scales; i++) scale()[i] = 0.5f + 0.3f * (float)i;
        Numbers weight = random_numbers(5, c.C, 0.3f, 1), bias = random_numbers(6, c.C, 0.3f);
        std::copy(weight.begin(), weight.end(), param(&m, LN_2_W, 0));
        std::copy(bias.begin(), bias.end(), param(&m, LN_2_B, 0));
    }
    // The reference's forward pass from a state; u is rounded, and LayerNorm sees that, as on the device.
    void forward(const Numbers& state) {
        Span span = {rows, 1, 0, rows};
        memset(&s, 0, sizeof s);
        s.coef = coef.data(), s.mix = mix.data(), s.rnorm = rnorm.data();
        s.u = u.data(), s.stats = stats.data(), s.ln = ln.data(), s.f = f.data();
        connection_forward(&m, &s, state.data(), 1, span);
        u = rounded_numbers(u);
        s.u = u.data();
        for (int r = 0; r < rows; r++)
            layernorm_forward(s.ln + (size_t)r * c.C, s.stats + (size_t)r * 2, row_of(s.u, r, c.C), weight(),
                              bias(), c.C);
    }
    float* fn() { return param(&m, MLP_FN, 0); }
    float* base() { return param(&m, MLP_BASE, 0); }
    float* scale() { return param(&m, MLP_SCALE, 0); }
    float* weight() { return param(&m, LN_2_W, 0); }
    float* bias() { return param(&m, LN_2_B, 0); }
    double pre_tolerance() const { return k.n == 1 ? 10 * FP32_TOLERANCE : FP32_TOLERANCE; }
    size_t fn_size() const { return (size_t)k.outs * k.width; }
    void check(const char* what, const Numbers& device, const Numbers& reference, double tolerance) const {
        char label[160];
        snprintf(label, sizeof label, "%s: %s", name, what);
        compare(label, device, reference, tolerance);
    }
};

// The parameters of a connection, or their gradients, on the device: from those of a model
struct ConnectionOnDevice {
    Device<float> fn, base, scale;
    Device<floatX> weight, bias;
    explicit ConnectionOnDevice(ConnectionPoint& p)
        : fn(numbers_at(p.fn(), p.fn_size())), base(numbers_at(p.base(), p.k.M)),
          scale(numbers_at(p.scale(), p.k.scales)), weight(numbers_at(p.weight(), p.c.C)),
          bias(numbers_at(p.bias(), p.c.C)) {}
};

// --- forward

static void check_boundary(ConnectionPoint& p, bool first) {
    size_t rows = p.rows, C = p.c.C, count = p.k.count, state = rows * p.k.n * C;
    ConnectionOnDevice d(p);
    Device<floatX> x(p.x), f(p.f), y(state), u(rows * C), ln(rows * C);
    Device<float> coef(p.coef), next(rows * count), mix(p.mix.size()), rnorm(p.rnorm.size()), stats(rows * 2);
    if (first) y.put(p.x);
    const floatX* output = first ? NULL : f.at;
    Boundary b = {x.at, output, coef.at, y.at, d.fn.at, d.base.at, d.scale.at, d.weight.at, d.bias.at, mix.at,
                  rnorm.at, next.at, stats.at, u.at, ln.at};
    boundary_forward_gpu(&b, p.k, p.rows, 0);
    if (!first) {
        Numbers expected(state);
        Span span = {p.rows, 1, 0, p.rows};
        connection_write(&p.c, expected.data(), p.x.data(), &p.s, span);
        p.check("write", y.get(), expected, FLOATX_TOLERANCE);
    }
    p.forward(y.get());                                         // from here on both see the device's state
    if (!p.c.is_static) p.check("mix", mix.get(), p.mix, FP32_TOLERANCE);
    if (!p.c.is_static) p.check("rnorm", rnorm.get(), p.rnorm, FP32_TOLERANCE);
    p.check("coefficients", next.get(), p.coef, FP32_TOLERANCE);
    p.check("read", u.get(), p.u, FLOATX_TOLERANCE);
    p.u = u.get();              // an element may have been rounded the other way
    for (size_t r = 0; r < rows; r++)
        layernorm_forward(&p.ln[r * C], &p.stats[r * 2], &p.u[r * C], p.weight(), p.bias(), p.c.C);
    p.check("statistics", stats.get(), p.stats, FP32_TOLERANCE);
    p.check("LayerNorm", ln.get(), p.ln, FLOATX_TOLERANCE);
    p.forward(p.x);
}

static void test_connections_forward(void) {
    for (const ConnectionCase& t : connection_cases) {
        ConnectionPoint p(t);
        check_boundary(p, false);
        check_boundary(p, true);
    }
}

// What holds whatever the numbers: rows of R sum to 1 where they are divided last, and R >= 0; logits beyond
// +-87 saturate; what is not a number stays so, in its own token alone.
static void test_coefficients_extremes(void) {
    ConnectionCase t = {RESIDUAL_MHC, 4, 24, 37, ORDER_CR, 20, ALL_MAPS, false};
    for (float size : {1.0f, 4.0f, 400.0f}) {
        ConnectionPoint p(t);
        for (float& value : p.mix) value *= size;
        ConnectionOnDevice d(p);
        Device<float> mix(p.mix), coef(p.coef.size());
        coefficients_gpu(coef.at, mix.at, d.base.at, d.scale.at, p.k, p.rows, 0);
        Numbers found = coef.get();
        double worst = 0;
        bool positive = true;
        for (size_t e = 8; e < found.size(); e += e % 24 == 20 ? 12 : 4) {
            double sum = 0;
            for (size_t j = 0; j < 4; j++) sum += found[e + j], positive = positive && found[e + j] >= 0;
            worst = fmax(worst, fabs(sum - 1));
        }
        CHECK(positive && (size > 4 || worst <= 1e-6), "rows of R, logits times %g: %.3g from 1", size,
              worst);
    }
    t.order = ORDER_NONE;
    ConnectionPoint p(t);
    for (float& value : p.mix) value *= 400;
    p.mix[24 * 5 + 13] = NAN;
    ConnectionOnDevice d(p);
    Device<float> mix(p.mix), coef(p.coef.size());
    coefficients_gpu(coef.at, mix.at, d.base.at, d.scale.at, p.k, p.rows, 0);
    for (int r = 0; r < p.rows; r += LANES)
        coefficients_forward(&p.coef[24 * (size_t)r], &p.c, &p.mix[24 * (size_t)r], connection_of(&p.m, 1),
                             min_int(LANES, p.rows - r));
    Numbers found = coef.get();
    CHECK(std::isnan(found[24 * 5 + 13]), "a logit that is not a number: R is %g there", found[24 * 5 + 13]);
    found[24 * 5 + 13] = p.coef[24 * 5 + 13] = 0;
    compare("coefficients of logits beyond +-87", found, p.coef, FP32_TOLERANCE);
}

// At the initial values and with equal streams each mode is the plain residual: y = x + f, to rounding.
static void test_connections_start(void) {
    for (int residual : {RESIDUAL_HC, RESIDUAL_MHC, RESIDUAL_IHC})
        for (int n : {1, 2, 4, 8}) {
            ConnectionCase t = {residual, n, 24, 7, ORDER_CR, 20, ALL_MAPS, false};
            ConnectionPoint p(t);
            std::fill(p.fn(), p.fn() + p.fn_size(), 0.0f);
            for (int m = 0; m < p.k.M; m++) p.base()[m] = (float)initial_base(&p.c, 1, m);
            for (size_t e = 0; e < p.x.size(); e++) p.x[e] = p.x[e / (n * 24) * (n * 24) + e % 24];
            p.forward(p.x);
            ConnectionOnDevice d(p);
            Device<floatX> x(p.x), f(p.f), y(p.x.size()), u(p.u.size()), ln(p.ln.size());
            Device<float> coef(p.coef.size()), mix(p.mix.size()), rnorm(p.rnorm.size()),
                stats(p.stats.size());
            Boundary b = {NULL, NULL, NULL, x.at, d.fn.at, d.base.at, d.scale.at, d.weight.at, d.bias.at,
                          mix.at, rnorm.at, coef.at, stats.at, u.at, ln.at};
            boundary_forward_gpu(&b, p.k, p.rows, 0);
            write_gpu(y.at, x.at, f.at, coef.at, p.k, p.rows, 0);
            Numbers plain = p.x, first(p.u.size());
            for (size_t e = 0; e < plain.size(); e++) plain[e] += p.f[e / (n * 24) * 24 + e % 24];
            for (size_t e = 0; e < first.size(); e++) first[e] = p.x[e / 24 * (n * 24) + e % 24];
            p.check("the state is x + f at the start", y.get(), plain, FLOATX_TOLERANCE);
            p.check("what is read is x at the start", u.get(), first, FLOATX_TOLERANCE);
        }
}

// --- backward

static void check_write_backward(ConnectionPoint& p) {
    size_t rows = p.rows, C = p.c.C, count = p.k.count;
    Numbers dy = random_numbers(21, p.x.size()), df_expected(rows * C), dcoef_expected(rows * count, 7.0f),
            d_expected = dy;
    Activations a;
    memset(&a, 0, sizeof a);
    a.dstate = d_expected.data();
    a.g.coef = dcoef_expected.data();
    connection_write_backward(&p.c, &a, df_expected.data(), p.x.data(), &p.s, p.rows);
    Device<floatX> dstate(dy), apart(dy.size()), x(p.x), f(p.f), df(rows * C);
    Device<float> coef(p.coef), dcoef(Numbers(rows * count, 7.0f));     // pre's part stays
    write_backward_gpu(apart.at, df.at, dcoef.at, dstate.at, x.at, f.at, coef.at, p.k, p.rows, 0);
    write_backward_gpu(dstate.at, df.at, dcoef.at, dstate.at, x.at, f.at, coef.at, p.k, p.rows, 0);
    p.check("write's dx", dstate.get(), d_expected, FLOATX_TOLERANCE);
    p.check("write's df", df.get(), df_expected, FLOATX_TOLERANCE);
    p.check("write's dcoef", dcoef.get(), dcoef_expected, FP32_TOLERANCE);
    CHECK(apart.get() == dstate.get(), "%s: dx in dy's memory differs from dx apart from it", p.name);
}

// What the reference's connection_backward works in
struct ReferenceBackward {
    Activations a;
    Numbers dstate, dln, du, xhat, coef, base, scale, z, shrink;
    explicit ReferenceBackward(const ConnectionPoint& p) {
        size_t rows = p.rows, C = p.c.C;
        dstate = random_numbers(31, p.x.size());
        dln = random_numbers(32, rows * C);
        coef.resize(rows * p.k.count);
        for (size_t e = 0; e < coef.size(); e++) coef[e] = (float)normal(33, e);
        du.resize(rows * C), xhat.resize(rows * C), shrink.resize(rows * p.k.groups);
        base.resize(rows * p.k.M), scale.resize(rows * p.k.M), z.resize(rows * p.k.M);
        memset(&a, 0, sizeof a);
        a.dstate = dstate.data(), a.dln = dln.data(), a.du = du.data(), a.xhat = xhat.data();
        CoefficientGrads g = {coef.data(), base.data(), scale.data(), z.data(), shrink.data()};
        a.g = g;
    }
};

// The coefficients' part alone: per token, before sums over rows hide anything. r has run.
static void check_coefficients_backward(ConnectionPoint& p, const ReferenceBackward& r,
                                        const Device<float>& dcoef) {
    size_t rows = p.rows, M = p.k.M, cols = M + p.k.scales;
    size_t divisors = (size_t)p.k.divisions * p.k.n * rows;
    ConnectionOnDevice d(p);
    Device<float> coef(p.coef), mix(p.mix), rnorm(p.rnorm), terms(rows * cols), z(rows * M),
        shrink(rows * p.k.groups), scratch(divisors);
    coefficients_backward_gpu(terms.at, z.at, shrink.at, scratch.at, dcoef.at, coef.at, mix.at, rnorm.at,
                              d.base.at, d.scale.at, p.k, p.rows, 0);
    Numbers expected(rows * cols);
    for (size_t row = 0; row < rows; row++)
        for (size_t m = 0; m < M; m++) {
            expected[row * cols + m] = r.base[row * M + m];
            expected[row * cols + M + (size_t)map_of((int)m, p.k.n)] += r.scale[row * M + m];
        }
    p.check("terms of dbase and dscale", terms.get(), expected, p.pre_tolerance());
    if (p.c.is_static) return;
    p.check("gradient of fn x", z.get(), r.z, p.pre_tolerance());
    p.check("shrink", shrink.get(), r.shrink, p.pre_tolerance());
}

static void check_connection_backward(ConnectionPoint& p) {
    ReferenceBackward r(p);
    size_t C = p.c.C, scratch_size = connection_backward_scratch(p.k, p.rows);
    ConnectionOnDevice d(p);
    Device<floatX> dx(r.dstate), dln(r.dln), x(p.x), u(p.u);
    Device<float> dcoef(r.coef), stats(p.stats), coef(p.coef), mix(p.mix), rnorm(p.rnorm),
        scratch(scratch_size);
    Device<float> dfn(numbers_at(grad(&p.m, MLP_FN, 0), p.fn_size())),
        dbase(numbers_at(grad(&p.m, MLP_BASE, 0), p.k.M)),
        dscale(numbers_at(grad(&p.m, MLP_SCALE, 0), p.k.scales)),
        dweight(numbers_at(grad(&p.m, LN_2_W, 0), C)), dbias(numbers_at(grad(&p.m, LN_2_B, 0), C));
    CUDA(cudaMemset(scratch.at, 0xff, scratch_size * sizeof(float)));   // NaN: may not be read before written
    ConnectionBackward b = {dx.at, dcoef.at, dln.at, x.at, u.at, d.weight.at, stats.at, coef.at, mix.at,
                            rnorm.at, d.fn.at, d.base.at, d.scale.at, dfn.at, dbase.at, dscale.at, dweight.at,
                            dbias.at};
    connection_backward_gpu(&b, scratch.at, p.k, p.rows, 0);
    connection_backward(&p.m, &r.a, p.x.data(), &p.s, 1, p.rows);
    p.check("dcoef", dcoef.get(), r.coef, p.pre_tolerance());
    check_coefficients_backward(p, r, dcoef);
    p.check("dx", dx.get(), r.dstate, FLOATX_TOLERANCE);
    p.check("dfn", dfn.get(), numbers_at(grad(&p.m, MLP_FN, 0), p.fn_size()), p.pre_tolerance());
    p.check("dbase", dbase.get(), numbers_at(grad(&p.m, MLP_BASE, 0), p.k.M), p.pre_tolerance());
    p.check("dscale", dscale.get(), numbers_at(grad(&p.m, MLP_SCALE, 0), p.k.scales), p.pre_tolerance());
    p.check("LayerNorm's dweight", dweight.get(), numbers_at(grad(&p.m, LN_2_W, 0), C), FP32_TOLERANCE);
    p.check("LayerNorm's dbias", dbias.get(), numbers_at(grad(&p.m, LN_2_B, 0), C), FP32_TOLERANCE);
}

static void test_connections_backward(void) {
    for (const ConnectionCase& t : connection_cases) {
        ConnectionPoint p(t);
        check_write_backward(p);
        check_connection_backward(p);
    }
}
// ------------------------------------------------------------------------------------------------
// Attention. The reference works in fp32 on inputs rounded to floatX, so that the kernels' own error is seen:
//     plain   each result is rounded to floatX once: at most ROUNDING; its mean square is ROUNDING^2 / 3
//     flash   the factors p and ds are rounded too. In a sum over keys or queries of products of random sign,
//             as here, independent relative errors of the products are such an error of the sum: 2 ROUNDING
//     both    fp32 sums of T or D terms, and in flash powers of 2 that are wrong by at most 2^-22: 1e-5; and
//             exp(s - lse) makes of an absolute error of s a relative one of p. s and lse have some units in
//             the last place of the largest score L: 4 L / 2^24

enum { ATTENTION_TENSORS = 3 };         // q, k, v

struct AttentionCase { int B, T, NH, D; float deviation; };     // of q and k: scores have its square

struct AttentionReference {
    std::vector<float> qkv, dout, out, lse, dqkv;
    double largest_score;
};

static int attention_width(const AttentionCase& c) { return c.NH * c.D; }
static size_t attention_tokens(const AttentionCase& c) { return (size_t)c.B * c.T; }

static AttentionReference attention_reference(const AttentionCase& c, uint64_t seed) {
    AttentionReference r;
    int C = attention_width(c);
    size_t rows = attention_tokens(c);
    r.qkv = random_numbers(seed, rows * 3 * C);
    for (size_t i = 0; i < r.qkv.size(); i++)
        if (i % (3 * C) < 2 * (size_t)C) r.qkv[i] = rounded(c.deviation * r.qkv[i]);
    r.dout = random_numbers(seed + 1, rows * C);
    r.out.resize(rows * C);
    r.lse.resize((size_t)c.B * c.NH * c.T);
    r.dqkv.resize(rows * 3 * C);
    std::vector<float> scratch(attention_scratch_size(c.T) * thread_count());
    attention_forward(r.out.data(), r.lse.data(), r.qkv.data(), scratch.data(), c.B, c.T, 0, C, c.NH);
    r.largest_score = 0;
    for (float l : r.lse) r.largest_score = fmax(r.largest_score, fabs((double)l));
    // what the GPU keeps of out is rounded: the reference's backward pass reads the same
    std::vector<float> kept = r.out;
    for (float& x : kept) x = rounded(x);
    attention_backward(r.dqkv.data(), r.dout.data(), kept.data(), r.lse.data(), r.qkv.data(), scratch.data(),
                       c.B, c.T, C, c.NH);
    return r;
}

// Numbers first, first + 1, .. of each group of `group`, `count` of them
static std::vector<float> attention_part(const std::vector<float>& x, size_t group, size_t first,
                                         size_t count) {
    std::vector<float> result;
    for (size_t i = 0; i < x.size(); i += group)
        result.insert(result.end(), x.begin() + i + first, x.begin() + i + first + count);
    return result;
}

static void compare_qkv_gradients(const AttentionCase& c, const char* kind, const std::vector<float>& dqkv,
                                  const std::vector<float>& expected, double tolerance) {
    static const char* const names[ATTENTION_TENSORS] = {"dq", "dk", "dv"};
    size_t C = (size_t)attention_width(c);
    char name[100];
    snprintf(name, sizeof name, "%s dqkv, B %d T %d NH %d D %d", kind, c.B, c.T, c.NH, c.D);
    compare(name, dqkv, expected, tolerance);
    for (int i = c.T > 1 ? 0 : 2; i < ATTENTION_TENSORS; i++) { // a single key's dq and dk are 0 and rounding
        snprintf(name, sizeof name, "%s %s, B %d T %d NH %d D %d", kind, names[i], c.B, c.T, c.NH, c.D);
        compare(name, attention_part(dqkv, 3 * C, i * C, C), attention_part(expected, 3 * C, i * C, C),
                tolerance);
    }
}

struct AttentionResult { std::vector<float> out, lse, dqkv; };

// Tensors in device memory, `offset` elements after an aligned address
struct AttentionTensor {
    Device<floatX> memory;
    int offset;
    AttentionTensor(const std::vector<float>& x, int after) : memory(x.size() + after), offset(after) {
        std::vector<float> moved(after, NAN);
        moved.insert(moved.end(), x.begin(), x.end());
        memory.put(moved);
    }
    floatX* at() { return memory.at + offset; }
    std::vector<float> get() const {
        std::vector<float> x = memory.get();
        return std::vector<float>(x.begin() + offset, x.end());
    }
};

enum { MOVES_QKV = 1, MOVES_DOUT = 2, MOVES_OUT = 4, MOVES_DQKV = 8, MOVES_ALL = 15 };

// Both passes, each from the reference's numbers, as each is compared with it. What moved names is unaligned.
static AttentionResult attention_on_gpu(const AttentionCase& c, const AttentionReference& r, bool plain,
                                        int moved) {
    // every number of results is written, none is added to
    std::vector<float> no_out(r.out.size(), NAN), no_dqkv(r.dqkv.size(), NAN);
    AttentionTensor qkv(r.qkv, moved & MOVES_QKV ? 1 : 0), dout(r.dout, moved & MOVES_DOUT ? 1 : 0);
    AttentionTensor kept(r.out, moved & MOVES_OUT ? 1 : 0), out(no_out, moved & MOVES_OUT ? 1 : 0);
    AttentionTensor dqkv(no_dqkv, moved & MOVES_DQKV ? 1 : 0);
    Device<float> lse(r.lse.size()), lse_kept(r.lse), scratch(attention_backward_scratch(c.B, c.T, c.NH));
    attention_plain_only = plain;
    attention_forward_gpu(out.at(), lse.at, qkv.at(), c.B, c.T, 0, attention_width(c), c.NH, 0);
    attention_backward_gpu(dqkv.at(), dout.at(), kept.at(), lse_kept.at, qkv.at(), scratch.at, c.B, c.T,
                           attention_width(c), c.NH, 0);
    attention_plain_only = false;
    return {out.get(), lse.get(), dqkv.get()};
}

static bool attention_has_flash(const AttentionCase& c) {
    return sizeof(floatX) == 2 && (c.D == 64 || c.D == 128);
}

static void check_attention(const AttentionCase& c, uint64_t seed) {
    AttentionReference r = attention_reference(c, seed);
    double fp32 = 1e-5 + 4 * r.largest_score / (1 << 24);
    char name[100];
    AttentionResult results[2];
    for (int flash = 0; flash <= attention_has_flash(c); flash++) {
        const char* kind = flash ? "flash" : "plain";
        double tolerance = (flash ? 2 : 1) * ROUNDING + fp32;
        AttentionResult& got = results[flash] = attention_on_gpu(c, r, !flash, 0);
        snprintf(name, sizeof name, "%s out, B %d T %d NH %d D %d", kind, c.B, c.T, c.NH, c.D);
        compare(name, got.out, r.out, tolerance);
        snprintf(name, sizeof name, "%s lse, B %d T %d NH %d D %d", kind, c.B, c.T, c.NH, c.D);
        compare(name, got.lse, r.lse, 1e-5);
        compare_qkv_gradients(c, kind, got.dqkv, r.dqkv, tolerance);
    }
    if (!attention_has_flash(c)) return;
    compare("out, flash against plain", results[1].out, results[0].out, 3 * ROUNDING + fp32);
    compare("lse, flash against plain", results[1].lse, results[0].lse, 1e-5);
    compare_qkv_gradients(c, "flash against plain", results[1].dqkv, results[0].dqkv, 3 * ROUNDING + fp32);
}

// Lengths around the tiles of 32, 64 and 128 rows; B and NH go through their values meanwhile.
static void test_attention(void) {
    static const int sizes[] = {5, 16, 40, 64, 128}, lengths[] = {1, 7, 33, 64, 65, 130, 200};
    int i = 0;
    for (int D : sizes)
        for (int T : lengths) {
            AttentionCase c = {1 + i % 2, T, 1 + i % 3, D, 1};
            if (T >= 130 && c.B * c.NH > 3) c.NH = 1;           // to save time
            check_attention(c, 400 + i++);
        }
}

// A head wider than a block's channels, and one number
static void test_attention_head_sizes(void) {
    check_attention({1, 40, 1, 200, 1}, 451);
    check_attention({2, 40, 3, 1, 1}, 452);
}

// Scores of some hundreds: their exp is no number of fp32 unless the largest is taken off first.
static void test_attention_large_scores(void) {
    for (int D : {40, 64, 128}) {
        AttentionCase c = {1, 70, 2, D, 12};
        AttentionReference r = attention_reference(c, 460 + D);
        CHECK(r.largest_score > 300, "scores up to %g, expected more than 300", r.largest_score);
        check_attention(c, 460 + D);
    }
}

// A tensor whose rows are not aligned leaves the work to the plain kernels.
static void test_attention_unaligned(void) {
    AttentionCase c = {1, 40, 1, 64, 1};
    AttentionReference r = attention_reference(c, 470);
    AttentionResult plain = attention_on_gpu(c, r, true, 0);
    for (int moved : {(int)MOVES_QKV, (int)MOVES_DOUT, (int)MOVES_OUT, (int)MOVES_DQKV, (int)MOVES_ALL}) {
        AttentionResult got = attention_on_gpu(c, r, false, moved);
        CHECK(got.dqkv == plain.dqkv, "moved %d: other gradients than the plain kernels'", moved);
        bool forward = moved & (MOVES_QKV | MOVES_OUT);
        CHECK(!forward || (got.out == plain.out && got.lse == plain.lse), "moved %d: another output", moved);
    }
}

// Nothing of a sequence reaches another one: beside one of NaN each has the numbers that it has alone.
static void check_sequences_apart(const AttentionCase& alone, const AttentionReference& r, bool plain) {
    AttentionResult expected = attention_on_gpu(alone, r, plain, 0);
    for (bool after : {false, true}) {
        AttentionCase both = alone;
        AttentionReference two = r;
        both.B = 2;
        for (std::vector<float>* x : {&two.qkv, &two.dout, &two.out, &two.lse, &two.dqkv})
            x->insert(after ? x->end() : x->begin(), x->size(), NAN);
        AttentionResult got = attention_on_gpu(both, two, plain, 0);
        auto same = [&](const std::vector<float>& x, const std::vector<float>& y) {
            return std::equal(y.begin(), y.end(), x.begin() + (after ? 0 : y.size()));
        };
        CHECK(same(got.out, expected.out) && same(got.lse, expected.lse) && same(got.dqkv, expected.dqkv),
              "D %d, %s: a sequence depends on the one %s it", alone.D, plain ? "plain" : "flash",
              after ? "after" : "before");
    }
}

static void test_attention_sequences_apart(void) {
    for (int D : {16, 64, 128}) {
        AttentionCase c = {1, 70, 1, D, 1};
        AttentionReference r = attention_reference(c, 480 + D);
        check_sequences_apart(c, r, true);
        if (attention_has_flash(c)) check_sequences_apart(c, r, false);
    }
}

#ifdef USE_CUDNN
// cuDNN's kernels round what the flash kernels round, and are held to the same bounds; another call has the
// same bits. A shape without a plan is not theirs.
static void test_attention_cudnn(void) {
    uint64_t seed = 2000;
    for (const AttentionCase& c : {AttentionCase{2, 64, 3, 64, 1}, AttentionCase{1, 200, 2, 128, 1},
                                   AttentionCase{3, 130, 2, 40, 1}, AttentionCase{1, 70, 2, 64, 12}}) {
        AttentionReference r = attention_reference(c, seed += 10);
        int C = attention_width(c);
        double tolerance = 2 * ROUNDING + 1e-5 + 4 * r.largest_score / (1 << 24);
        size_t bytes = cudnn_attention_plan(c.B, c.T, C, c.NH, true);
        Device<char> workspace(bytes);
        Device<floatX> qkv(r.qkv), out(r.out.size());
        Device<float> lse(r.lse.size());
        cudnn_attention_workspace(workspace.at, bytes);
        bool other = cudnn_attention_forward(out.at, lse.at, qkv.at, c.B + 1, c.T, C, c.NH, 0);
        bool served = cudnn_attention_forward(out.at, lse.at, qkv.at, c.B, c.T, C, c.NH, 0);
        CHECK(served && !other, "D %d: served %d, expected 1; without a plan %d, expected 0", c.D, served,
              other);
        AttentionResult got = attention_on_gpu(c, r, false, 0), again = attention_on_gpu(c, r, false, 0);
        CHECK(got.out == out.get() && got.lse == lse.get(), "D %d: the trainer takes other kernels", c.D);
        CHECK(got.out == again.out && got.lse == again.lse && got.dqkv == again.dqkv, "D %d: other bits",
              c.D);
        compare("cuDNN out", got.out, r.out, tolerance);
        compare("cuDNN lse", got.lse, r.lse, 1e-5);
        compare_qkv_gradients(c, "cuDNN", got.dqkv, r.dqkv, tolerance);
        cudnn_attention_workspace(NULL, 0);
    }
}
#endif

// Positions from row0 on, as generation computes them: the same numbers, and nothing before is written.
static void test_attention_from_row(void) {
    for (int D : {40, 64, 128})
        for (int row0 : {1, 63, 69}) {
            AttentionCase c = {1, 70, 2, D, 1};
            AttentionReference r = attention_reference(c, 490 + D);
            size_t C = (size_t)attention_width(c);
            Device<floatX> qkv(r.qkv), out(std::vector<float>(r.out.size(), 7));
            Device<float> lse(std::vector<float>(r.lse.size(), 7));
            attention_forward_gpu(out.at, lse.at, qkv.at, 1, c.T, row0, (int)C, c.NH, 0);
            std::vector<float> expected = r.out, expected_lse = r.lse;
            std::fill_n(expected.begin(), row0 * C, 7.0f);
            for (int h = 0; h < c.NH; h++) std::fill_n(expected_lse.begin() + h * c.T, row0, 7.0f);
            std::vector<float> got = out.get(), got_lse = lse.get();
            bool kept = std::equal(got.begin(), got.begin() + row0 * C, expected.begin());
            CHECK(kept, "row0 %d: wrote before it", row0);
            auto computed = [&](const std::vector<float>& x) {
                return std::vector<float>(x.begin() + row0 * C, x.end());
            };
            compare("out from a row on", computed(got), computed(expected), 2 * ROUNDING + 1e-5);
            compare("lse from a row on", got_lse, expected_lse, 1e-5);
        }
}
// ------------------------------------------------------------------------------------------------
// Optimiser: masters, moments and norm are fp32 and double on both sides; copies are exact or one of two
// neighbours.

// A model in the device's layout and in the reference's, same random numbers
struct OptimiserModel {
    Model host;
    DeviceModel d;
    DeviceArena arena;
    Optimiser o;
    std::vector<float> params, grads, m, v;                     // the reference's
    OptimiserModel(int residual, int V, int C, uint64_t seed) {
        Config c;
        memset(&c, 0, sizeof c);
        memset(&d, 0, sizeof d), memset(&arena, 0, sizeof arena), memset(&o, 0, sizeof o);
        c.L = 2, c.NH = 1, c.C = C, c.T = 7, c.V = V, c.residual = residual;
        c.n = has_streams(residual) ? 3 : 1, c.maps = 7, c.iters = 20;
        model_layout(&host, &c);
        device_layout(&d, &host);
        arena.taking = true;
        device_model_memory(&d, &arena, true);
        optimiser_memory(&o, &arena, &d.m);
        optimiser_open(&o, &d.m);
        params = numbers(seed, 0.02f), grads = numbers(seed + 1, 1e-3f), m = numbers(seed + 2, 1e-3f);
        v = numbers(seed + 3, 1e-3f);
        for (float& x : v) x *= x;                              // not negative
        host.params = params.data(), host.grads = grads.data();
        host.adam_m = m.data(), host.adam_v = v.data();
        put(d.m.params, params), put(d.m.grads, grads), put(d.m.adam_m, m), put(d.m.adam_v, v);
    }
    ~OptimiserModel() {
        optimiser_close(&o);
        for (int i = 0; i < arena.block_count; i++) cudaFree(arena.blocks[i]);
        free(d.m.tensors);
        model_close(&host);
    }
    std::vector<float> numbers(uint64_t seed, float deviation) const {      // fp32, not rounded
        std::vector<float> x(host.size);
        for (size_t i = 0; i < x.size(); i++) x[i] = deviation * (float)normal(seed, i);
        return x;
    }
    template <class T> bool is_moment(const T* device) const {
        return (const void*)device == d.m.adam_m || (const void*)device == d.m.adam_v;
    }
    // Tensor by tensor: the device's layout has gaps, and moments have other ones
    template <class T> size_t place(const T* device, int t) const {
        return is_moment(device) ? d.m.tensors[t].moments : d.m.tensors[t].first;
    }
    void put(float* device, const std::vector<float>& x) const {
        for (int t = 0; t < host.tensor_count; t++)
            CUDA(cudaMemcpy(device + place(device, t), &x[host.tensors[t].first],
                            tensor_size(&host.tensors[t]) * sizeof(float), cudaMemcpyHostToDevice));
    }
    template <class T> std::vector<float> all(const T* device) const {      // with the gaps
        std::vector<T> raw(is_moment(device) ? d.m.moment_size : d.m.size);
        std::vector<float> x(raw.size());
        CUDA(cudaMemcpy(raw.data(), device, raw.size() * sizeof(T), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < x.size(); i++) x[i] = host_float(raw[i]);
        return x;
    }
    template <class T> std::vector<float> get(const T* device) const {
        std::vector<float> x(host.size), gaps = all(device);
        for (int t = 0; t < host.tensor_count; t++)
            memcpy(&x[host.tensors[t].first], &gaps[place(device, t)],
                   tensor_size(&host.tensors[t]) * sizeof(float));
        return x;
    }
    double norm() const {
        Device<double> sums(host.tensor_count);
        square_sums_gpu(&o, sums.at, d.m.grads, 0);
        return norm_of_sums(sums.get_as<double>().data(), host.tensor_count);
    }
    void round(uint64_t seed, long step) const {                // all copies anew
        for (int t = 0; t < d.m.tensor_count; t++)
            round_piece_gpu(d.weights, d.m.params, &d.m.tensors[t], 0, tensor_size(&d.m.tensors[t]), seed,
                            step, 0);
    }
};

// 131 * 1000 numbers of wte: several chunks, the last one not full
struct OptimiserCase { int residual, V, C; };
static const OptimiserCase optimiser_cases[] = {{RESIDUAL_MHC, 1000, 131}, {RESIDUAL_PLAIN, 11, 5},
                                                {RESIDUAL_HC, 131, 24},    {RESIDUAL_IHC, 11, 33},
                                                {RESIDUAL_NONE, 2, 1}};

static void test_gradient_norm(void) {
    for (const OptimiserCase& c : optimiser_cases) {
        OptimiserModel t(c.residual, c.V, c.C, 10);
        double norm = t.norm(), expected = gradient_norm(&t.host);
        CHECK(fabs(norm - expected) <= 1e-13 * expected, "norm %.17g, expected %.17g", norm, expected);
        remember_bits(&norm, sizeof norm);
    }
    OptimiserModel t(RESIDUAL_MHC, 131, 24, 10);                // large ones: a float's square would overflow
    for (float& x : t.grads) x = 1e30f;
    t.put(t.d.m.grads, t.grads);
    double norm = t.norm(), expected = 1e30f * sqrt((double)t.host.size);
    CHECK(fabs(norm - expected) <= 1e-13 * expected, "norm %g, expected %g", norm, expected);
}

template <class T> static bool in_gap(const OptimiserModel& t, const T* device, size_t i) {
    for (int k = 0; k < t.host.tensor_count; k++)
        if (i - t.place(device, k) < tensor_size(&t.d.m.tensors[k])) return false;
    return true;
}

// Whether nothing was written where there is no tensor (padded rows of wte among it)
template <class T> static bool gaps_are_zero(const OptimiserModel& t, const T* device) {
    std::vector<float> x = t.all(device);
    for (size_t i = 0; i < x.size(); i++)
        if (x[i] != 0 && in_gap(t, device, i)) return false;
    return true;
}

// bf16's neighbour towards zero, and the next away from it
static void neighbours(float x, float* inner, float* outer) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    b &= 0xffff0000u;
    memcpy(inner, &b, sizeof b);
    b += 0x10000u;
    memcpy(outer, &b, sizeof b);
}

// The copy of a number of a matrix: a function of seed, step, tensor and index
static float drawn(const Tensor* tensor, size_t index, float x, uint64_t seed, long step) {
    uint64_t draws = hash64(hash64(seed, (uint64_t)step), tensor_seed(tensor, 0));
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    b = (b + (uint32_t)(hash64(draws, index) & 0xffff)) & 0xffff0000u;
    memcpy(&x, &b, sizeof b);
    return x;
}

// Copies of matrices are as drawn, those of vectors the nearest. Connections have none.
static void check_copies(const OptimiserModel& t, const char* when, uint64_t seed, long step) {
    std::vector<float> masters = t.get(t.d.m.params), copies = t.get(t.d.weights);
    size_t wrong = 0;
    for (int k = 0; k < t.host.tensor_count; k++) {
        const Tensor* tensor = &t.host.tensors[k];
        for (size_t i = tensor->first; i < tensor->first + tensor_size(tensor); i++) {
            bool chance = sizeof(floatX) == 2 && tensor->spec->decayed;
            float x = chance ? drawn(tensor, i - tensor->first, masters[i], seed, step) : rounded(masters[i]);
            wrong += copies[i] != (strstr(tensor->name, "_hc.") ? 0 : x);
        }
    }
    CHECK(wrong == 0, "%s: %zu copies are not their masters rounded", when, wrong);
    remember_bits(copies.data(), copies.size() * sizeof(float));
}

static void test_adamw(void) {
    for (const OptimiserCase& c : optimiser_cases) {
        OptimiserModel t(c.residual, c.V, c.C, 20);
        for (long step = 1; step <= 3; step++) {
            Update u = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0.7, step};
            for (int i = 0; i < t.host.tensor_count; i++) adamw_tensor(&t.host, &t.host.tensors[i], &u);
            adamw_gpu(&t.o, &t.d, &u, 1337, 0);
        }
        // a few roundings in fp32 a step, each at most 2^-24
        compare("masters", t.get(t.d.m.params), t.params, 1e-6);
        compare("first moments", t.get(t.d.m.adam_m), t.m, 1e-6);
        compare("second moments", t.get(t.d.m.adam_v), t.v, 1e-6);
        check_copies(t, "AdamW", 1337, 3);
        bool zero = gaps_are_zero(t, t.d.m.params) && gaps_are_zero(t, t.d.weights) &&
                    gaps_are_zero(t, t.d.m.adam_m) && gaps_are_zero(t, t.d.m.adam_v);
        CHECK(zero, "AdamW wrote between tensors");
    }
}

// A resumed run rounds the masters that it loads: the copies that the update had made.
static void test_copies_after_resume(void) {
    OptimiserModel t(RESIDUAL_MHC, 131, 24, 30);
    Update u = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 5};
    adamw_gpu(&t.o, &t.d, &u, 1337, 0);
    std::vector<float> before = t.get(t.d.weights);
    CUDA(cudaMemset(t.d.weights, 0, t.d.m.size * sizeof(floatX)));
    t.round(1337, 5);
    compare("copies after resume", t.get(t.d.weights), before, 0);
    check_copies(t, "resume", 1337, 5);
    if (sizeof(floatX) == 4) return;
    t.round(1337, 6);
    CHECK(relative_error(t.get(t.d.weights), before) > 0, "another step has the same draws");
    t.round(1338, 5);
    CHECK(relative_error(t.get(t.d.weights), before) > 0, "another seed has the same draws");
}

// Copies of wte (1000, 131), each number of which is x[i % count] before
static std::vector<float> draw(OptimiserModel& t, const std::vector<float>& x, long step) {
    for (size_t i = 0; i < 131000; i++) t.params[i] = x[i % x.size()];
    t.put(t.d.m.params, t.params);
    t.round(7, step);
    std::vector<float> copies = t.get(t.d.weights);
    copies.resize(131000);
    return copies;
}

// The mean of many draws is the number itself, to 5 standard deviations, wherever it lies between its
// neighbours.
static void test_rounding_is_unbiased(void) {
    if (sizeof(floatX) == 4) return;
    OptimiserModel t(RESIDUAL_PLAIN, 1000, 131, 40);
    std::vector<float> x = {1.001f, -1.003f, 0.0200001f, -3.9999f, 1e-30f, 1.00390625f, 12345.678f, 1e-39f};
    std::vector<double> sum(x.size()), count(x.size());
    for (long step = 0; step < 3; step++) {
        std::vector<float> copies = draw(t, x, step);
        for (size_t i = 0; i < copies.size(); i++)
            sum[i % x.size()] += (double)copies[i], count[i % x.size()]++;
    }
    for (size_t k = 0; k < x.size(); k++) {
        float inner, outer;
        neighbours(x[k], &inner, &outer);
        double gap = (double)outer - (double)inner, chance = ((double)x[k] - (double)inner) / gap;
        double deviation = fabs(gap) * sqrt(chance * (1 - chance) / count[k]);
        double error = fabs(sum[k] / count[k] - (double)x[k]);
        CHECK(error <= 5 * deviation, "the mean of %g is off by %g, expected at most %g", (double)x[k], error,
              5 * deviation);
    }
}

// Neighbouring numbers, and the same number in the next step, are drawn independently: of pairs that could go
// either way a quarter both go up. 131000 pairs, deviation of their share 0.0012.
static void test_rounding_is_independent(void) {
    if (sizeof(floatX) == 4) return;
    OptimiserModel t(RESIDUAL_PLAIN, 1000, 131, 50);
    float inner, outer, x = 1.00390625f;                        // in the middle
    neighbours(x, &inner, &outer);
    std::vector<float> now = draw(t, {x}, 1), next = draw(t, {x}, 2);
    double beside = 0, later = 0;
    for (size_t i = 0; i < now.size(); i++) {
        beside += now[i] == outer && now[(i + 1) % now.size()] == outer;
        later += now[i] == outer && next[i] == outer;
    }
    beside /= (double)now.size(), later /= (double)now.size();
    CHECK(fabs(beside - 0.25) < 0.006, "%g of neighbours go up together, expected 0.25", beside);
    CHECK(fabs(later - 0.25) < 0.006, "%g of numbers go up twice, expected 0.25", later);
}

static void test_rounding_extremes(void) {
    if (sizeof(floatX) == 4) return;
    OptimiserModel t(RESIDUAL_PLAIN, 1000, 131, 60);
    float largest = 3.3895314e38f;                              // of bf16
    std::vector<float> exact = {0.0f, -0.0f, 1, -2.5f, 0x1p-133f, INFINITY, -INFINITY, largest};
    std::vector<float> copies = draw(t, exact, 9);
    size_t wrong = 0;
    for (size_t i = 0; i < copies.size(); i++)
        wrong += memcmp(&copies[i], &exact[i % exact.size()], sizeof(float)) != 0;
    CHECK(wrong == 0, "%zu numbers that bf16 has were changed", wrong);
    std::vector<float> nan(1, NAN);
    uint32_t low = 0x7f800001u;                                 // a NaN that truncation would make infinite
    nan.push_back(0);
    memcpy(&nan[1], &low, sizeof low);
    copies = draw(t, nan, 9);
    for (float copy : copies) wrong += !std::isnan(copy);
    CHECK(wrong == 0, "%zu NaN were lost", wrong);
}

static void test_first_nonfinite(void) {
    OptimiserModel t(RESIDUAL_MHC, 1000, 131, 70);
    const int last = t.host.tensor_count - 1;
    std::vector<float> gap(1, NAN);
    CHECK(first_nonfinite_gpu(&t.o, t.d.m.grads, 0) == -1, "found one, expected none");
    for (size_t i = 0; i < t.d.m.size; i++)                     // between tensors nothing counts
        if (in_gap(t, t.d.m.grads, i))
            CUDA(cudaMemcpy(t.d.m.grads + i, gap.data(), sizeof(float), cudaMemcpyHostToDevice)), i += 1000;
    CHECK(first_nonfinite_gpu(&t.o, t.d.m.grads, 0) == -1, "found one between tensors");
    double norm = t.norm();
    CHECK(fabs(norm - gradient_norm(&t.host)) <= 1e-13 * norm, "the norm sees what lies between tensors");
    for (int k : {last, 7, 3, 0}) { // in its last number; earlier ones hide later ones
        const Tensor* tensor = &t.host.tensors[k];
        t.grads[tensor->first + tensor_size(tensor) - 1] = k % 2 ? -INFINITY : NAN;
        t.put(t.d.m.grads, t.grads);
        int found = first_nonfinite_gpu(&t.o, t.d.m.grads, 0);
        CHECK(found == k, "found tensor %d, expected %d", found, k);
        CHECK(!std::isfinite(t.norm()), "the norm is finite");
    }
}

// ------------------------------------------------------------------------------------------------
// The whole step against the reference's: forward, backward, optimiser, at a random point far from the start

static const char SMALL[] = "--layers 2 --steps 30 --warmup 4 --lr 3e-3 --save-every 0 ";
static const char SHAPE[] = "--width 24 --heads 3 --seq 19 --batch 3 ";

// Relative L2 per tensor. fp32: both sides sum in fp32, in other orders. bf16: a rounding is wrong by at most
// 2^-8, by 2^-8 / sqrt(3) in the mean; a gradient of two blocks comes through about ten roundings in each of
// four sublayers, there and back: sqrt(80) / sqrt(3) of them add up to 2 %, and four times that is the bound.
// The loss is a mean over all rows, whose errors average.
static const bool BF16 = sizeof(floatX) == 2;
static const double STEP_TOLERANCE = BF16 ? 0.08 : 1e-5;
static const double LOSS_TOLERANCE = BF16 ? 1e-3 : 1e-5;

typedef struct { Model model; Activations acts; Arena arena; } Reference;

static void reference_layout(Reference* r, const Config* c, int B) {
    model_memory(&r->model, &r->arena, true);
    activations_layout(&r->acts, &r->arena, c, B, c->T, 1, true);
}

static void reference_open(Reference* r, const Run* run) {
    memset(r, 0, sizeof *r);
    model_layout(&r->model, &run->c);
    activations_open(&r->acts, &run->c);
    reference_layout(r, &run->c, (int)run->o.batch);
    plan_open(&r->arena);
    reference_layout(r, &run->c, (int)run->o.batch);
    memcpy(r->model.params, run->model.params, r->model.size * sizeof(float));
}

static void reference_close(Reference* r) {
    free(r->arena.memory);
    activations_close(&r->acts);
    model_close(&r->model);
}

static char directory[] = "/tmp/test_gpt_mhc_XXXXXX";

// A run in a directory of its own: at its first step, or resumed
static void start(Run* run, const char* options) {
    char text[2048], *words[128] = {(char*)"train_gpt_mhc"};
    int count = 1;
    Error e;
    static Loopback* alone;
    if (!alone) alone = loopback_open(1, 0);
    memset(run, 0, sizeof *run);
    run->pipe.transport = loopback_rank(alone, 0);
    snprintf(text, sizeof text, "%s/lock", directory);
    unlink(text);               // an earlier run of this process, which is over, holds it
    snprintf(text, sizeof text, "%s%s--out %s %s %s", SMALL, strstr(options, "--width") ? "" : SHAPE,
             directory, options, strstr(options, "--resume") ? "" : "--overwrite");
    for (char* word = strtok(text, " "); word; word = strtok(NULL, " ")) words[count++] = word;
    if (!options_parse(&run->o, &run->given, count, words, &e) || !open_run(run, &e)) die("%s", e.text);
    char path[256];
    snprintf(path, sizeof path, "%s/run.jsonl", directory);
    if (!runlog_open(&run->log, path, -1, &e)) die("%s", e.text);
}

// Every parameter random, so that no term hides behind a zero; connections' scales near 1. Weights that the
// device rounds are set to what it rounded them to, in the reference too.
static void randomise(Run* run, uint64_t seed) {
    Model* m = &run->model;
    bool near_start = run->c.residual == RESIDUAL_HC;       // whose mixing nothing bounds
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        double deviation = t->spec->init != INIT_HC_BASE ? 0.1 : near_start ? 0.3 : 1;
        double mean = t->spec->init == INIT_ONE || t->spec->init == INIT_HC_SCALE;
        bool connection = strstr(t->name, "_hc.") != NULL;
        for (size_t e = 0; e < tensor_size(t); e++) {
            double start = near_start && t->spec->init == INIT_HC_BASE ? initial_value(&m->c, t, 0, e) : mean;
            float value = (float)(start + deviation * normal(tensor_seed(t, seed), e));
            m->params[t->first + e] = connection ? value : rounded(value);
        }
    }
    machine_load(run);
}

static std::vector<float> tensor_of(const Model* m, const float* numbers, int i) {
    const Tensor* t = &m->tensors[i];
    return std::vector<float>(numbers + t->first, numbers + t->first + tensor_size(t));
}

// The device's numbers, in the host's layout
static void fetch(Run* run, NumberKind what, float* numbers) {
    for (int i = 0; i < run->model.tensor_count; i++) {
        const Tensor* t = &run->model.tensors[i];
        machine_read(run, what, t, 0, tensor_size(t), numbers + t->first);
    }
}

static std::vector<float> device_gradients(Run* run) {
    std::vector<float> grads(run->model.size);
    fetch(run, NUMBERS_GRADS, grads.data());
    return grads;
}

static double cosine_of(const std::vector<float>& a, const std::vector<float>& b) {
    double dot = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); i++) {
        dot += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return aa == 0 && bb == 0 ? 1 : dot / sqrt(aa * bb);
}

// Not among them: mhc with n = 1 (LayerNorm undoes pre, and R is 1: their gradients are rounding), and mixing
// without pre or post, which streams that are alike do not feel.
static const char* const modes[] = {
    "--residual none",
    "--residual plain",
    "--residual hc --streams 4",
    "--residual hc --streams 2 --hc-static",
    "--residual mhc --streams 4",
    "--residual hc --streams 1",
    "--residual mhc --streams 8 --sinkhorn-order rc --sinkhorn-iters 3",
    "--residual mhc --streams 3 --hc-maps pre,post",
    "--residual mhc --streams 2 --hc-static",
    "--residual ihc --streams 4",
    "--residual mhc --streams 5 --seq 33 --width 40 --heads 5 --batch 1",
};

// How many of a connection tensor's first numbers say nothing in bf16. LayerNorm takes from the gradient of u
// what lies along u, so that pre's is a small difference of large terms, most of it rounding; and scale's is
// a sum over all tokens of terms of both signs. The fp32 build compares them, and the kernels' own tests in
// both.
static size_t numbers_of_rounding(const Config* c, const Tensor* t) {
    if (t->spec->init == INIT_HC_SCALE) return tensor_size(t);
    if (t->spec->init == INIT_HC_BASE) return (size_t)c->n;
    return strstr(t->name, "_hc.fn") ? (size_t)(per_stream(c) ? 1 : c->n) * t->cols : 0;
}

static void compare_gradients(const char* mode, const Run* run, const std::vector<float>& grads,
                              const Reference* r) {
    for (int i = 0; i < r->model.tensor_count; i++) {
        std::vector<float> device = tensor_of(&run->model, grads.data(), i),
                           reference = tensor_of(&r->model, r->model.grads, i);
        const char* name = r->model.tensors[i].name;
        size_t skipped = BF16 ? numbers_of_rounding(&run->c, &run->model.tensors[i]) : 0;
        device.erase(device.begin(), device.begin() + skipped);
        reference.erase(reference.begin(), reference.begin() + skipped);
        double error = relative_error(device, reference), cosine = cosine_of(device, reference);
        if (getenv("SHOW_ERRORS")) printf("%-60s %-22s error %.2e cosine %.6f\n", mode, name, error, cosine);
        CHECK(error <= STEP_TOLERANCE, "%s: gradient of %s: relative error %.3g, expected at most %.3g", mode,
              name, error, STEP_TOLERANCE);
        CHECK(cosine >= 0.999, "%s: gradient of %s: cosine %.6f", mode, name, cosine);
    }
}

static void test_step(void) {
    for (const char* mode : modes) {
        static Run run;
        Reference r;
        Error e;
        StepReport report;
        start(&run, mode);
        randomise(&run, 9);
        reference_open(&r, &run);
        if (!accumulate_gradients(&run, &report, &e)) die("%s", e.text);
        double loss = report.loss, norm = report.norm;
        double expected =
            forward_backward(&r.model, &r.acts, run.tokens, run.targets, (int)run.o.batch, run.c.T, 1);
        add_head_gradient(&r.model);
        std::vector<float> grads = device_gradients(&run);
        remember_bits(grads.data(), grads.size() * sizeof(float));
        remember_bits(&loss, sizeof loss);
        CHECK(fabs(loss / expected - 1) <= LOSS_TOLERANCE, "%s: loss %.7f, expected %.7f", mode, loss,
              expected);
        CHECK(fabs(norm / gradient_norm(&r.model) - 1) <= STEP_TOLERANCE, "%s: norm %.7f, expected %.7f",
              mode, norm, gradient_norm(&r.model));
        compare_gradients(mode, &run, grads, &r);
        reference_close(&r);
        close_run(&run);
    }
}

// Twenty updates from the usual start, side by side
static void test_training(void) {
    for (const char* mode :
         {"--residual plain", "--residual hc", "--residual mhc --micro-batches 2 --recompute 3"}) {
        static Run run;
        Reference r;
        Error e;
        StepReport report;
        start(&run, mode);
        reference_open(&r, &run);
        for (int s = 0; s < 20; s++) {
            int M = (int)run.o.micro_batches;
            double loss = 0;
            zero_gradients(&r.model);
            for (int micro = 0; micro < M; micro++) {
                if (!training_batch(&run, micro, &e)) die("%s", e.text);
                loss += forward_backward(&r.model, &r.acts, run.tokens, run.targets, (int)run.o.batch,
                                         run.c.T, M) /
                        M;
            }
            add_head_gradient(&r.model);
            adamw(&r.model, &run.o, learning_rate(&run.o, s), gradient_norm(&r.model), s + 1);
            if (!train_step(&run, &report, &e)) die("%s", e.text);
            remember_bits(&report.loss, sizeof report.loss);
            CHECK(fabs(report.loss / loss - 1) <= LOSS_TOLERANCE, "%s: loss of step %d: %.7f, expected %.7f",
                  mode, s + 1, report.loss, loss);
        }
        reference_close(&r);
        close_run(&run);
    }
}

static std::vector<float> gradients_at(const char* options) {
    static Run run;
    Error e;
    StepReport report;
    start(&run, options);
    randomise(&run, 6);
    if (!accumulate_gradients(&run, &report, &e)) die("%s", e.text);
    std::vector<float> grads = device_gradients(&run);
    grads.push_back((float)report.loss);
    grads.push_back((float)report.norm);
    close_run(&run);
    return grads;
}

static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

static void test_equal_bits(void) {
    std::vector<float> first = gradients_at("--residual mhc");
    CHECK(same_bits(first, gradients_at("--residual mhc")), "a second run has other bits");
    for (const char* recompute :
         {"--residual mhc --recompute 1", "--residual mhc --recompute 3", "--residual mhc --recompute auto"})
        CHECK(same_bits(first, gradients_at(recompute)), "%s: other bits than without", recompute);
}

// Parameters and moments after `steps` updates
static std::vector<float> trained(Run* run, int steps) {
    Error e;
    StepReport report;
    while (run->step < steps)
        if (!train_step(run, &report, &e)) die("%s", e.text);
    std::vector<float> all(3 * run->model.size);
    fetch(run, NUMBERS_PARAMS, all.data());
    fetch(run, NUMBERS_ADAM_M, all.data() + run->model.size);
    fetch(run, NUMBERS_ADAM_V, all.data() + 2 * run->model.size);
    return all;
}

// Two updates of every mode, and what else a run asks of the machine: what checks and sanitizers go through.
// They learn from a few letters: the built-in corpus takes them long to make.
static void test_two_updates(void) {
    char path[256];
    snprintf(path, sizeof path, "%s/text.txt", directory);
    FILE* file = fopen(path, "wb");
    for (int i = 0; file && i < 400; i++) fputc('a' + (int)(hash64(1, (uint64_t)i) % 26), file);
    if (!file || fclose(file)) die("%s: cannot be written", path);
    for (const char* residual : {"none", "plain", "hc", "mhc", "ihc"}) {
        static Run run;
        Error e;
        Gain gain;
        double loss;
        char options[512];
        snprintf(options, sizeof options,
                 "--residual %s --width 24 --heads 3 --seq 9 --batch 2 --recompute 3 --data %s", residual,
                 path);
        start(&run, options);
        std::vector<float> numbers = trained(&run, 2);
        if (!validation_loss(&run, &loss, &e) || !measure_gains(&run, &gain, &e)) die("%s", e.text);
        CHECK(run.step == 2 && loss > 0 && loss < 10, "%s: validation loss %g", residual, loss);
        remember_bits(numbers.data(), numbers.size() * sizeof(float));
        remember_bits(&loss, sizeof loss);
        close_run(&run);
    }
}

static void test_resume(void) {
    static Run run;
    Error e;
    start(&run, "--residual mhc --streams 2");
    std::vector<float> whole = trained(&run, 6);
    close_run(&run);
    start(&run, "--residual mhc --streams 2");
    trained(&run, 3);
    CHECK(save_checkpoint(&run, &e), "%s", e.text);
    close_run(&run);
    start(&run, "--residual mhc --streams 2 --resume");
    CHECK(run.step == 3, "resumed at step %ld", run.step);
    CHECK(same_bits(whole, trained(&run, 6)), "a resumed run has other bits");
    close_run(&run);
}

// Tokens one at a time are those of one pass: what was known is neither computed again nor forgotten.
static void test_generation(void) {
    static Run run;
    int32_t tokens[19];
    std::vector<float> step(256), once(256);
    start(&run, "--residual mhc");
    randomise(&run, 7);
    for (int t = 0; t < 19; t++) tokens[t] = (int32_t)(hash64(3, (uint64_t)t) % 256);
    machine_logits(&run, tokens, 5, 0, step.data());
    for (int length = 6; length <= 19; length++)
        machine_logits(&run, tokens, length, length - 1, step.data());
    machine_logits(&run, tokens, 19, 0, once.data());
    compare("logits, token by token", step, once,
            32 * ROUNDING); // products of one row may sum in another order
    close_run(&run);
}

// ------------------------------------------------------------------------------------------------

int main(int argc, char** argv) {
    static const struct { const char* name; void (*run)(void); } tests[] = {
        {"over_a_block", test_over_a_block},
        {"linear", test_linear},
        {"linear_bias", test_linear_bias},
        {"sum_parts", test_sum_parts},
        {"head_products", test_head_products},
        {"products_are_kept", test_products_are_kept},
        {"sum_columns", test_sum_columns},
        {"gelu", test_gelu},
        {"token_groups", test_token_groups},
        {"embedding", test_embedding},
        {"readout", test_readout},
        {"layernorm", test_layernorm},
        {"add", test_add},
        {"classifier", test_classifier},
        {"classifier_nonfinite", test_classifier_nonfinite},
        {"add_gradients", test_add_gradients},
        {"connections_forward", test_connections_forward},
        {"coefficients_extremes", test_coefficients_extremes},
        {"connections_start", test_connections_start},
        {"connections_backward", test_connections_backward},
        {"attention", test_attention},
        {"attention_head_sizes", test_attention_head_sizes},
        {"attention_large_scores", test_attention_large_scores},
        {"attention_unaligned", test_attention_unaligned},
        {"attention_sequences_apart", test_attention_sequences_apart},
        {"attention_from_row", test_attention_from_row},
#ifdef USE_CUDNN
        {"attention_cudnn", test_attention_cudnn},
#endif
        {"gradient_norm", test_gradient_norm},
        {"adamw", test_adamw},
        {"copies_after_resume", test_copies_after_resume},
        {"rounding_is_unbiased", test_rounding_is_unbiased},
        {"rounding_is_independent", test_rounding_is_independent},
        {"rounding_extremes", test_rounding_extremes},
        {"first_nonfinite", test_first_nonfinite},
        {"step", test_step},
        {"two_updates", test_two_updates},
        {"training", test_training},
        {"equal_bits", test_equal_bits},
        {"resume", test_resume},
        {"generation", test_generation},
    };
    wait_briefly(argv);
    if (!mkdtemp(directory)) die("%s: cannot be made", directory);
    for (auto& test : tests) {
        bool asked = argc < 2;
        for (int i = 1; i < argc; i++) asked = asked || strstr(test.name, argv[i]);
        if (asked) test.run();
    }
    char command[256];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    if (system(command)) die("%s: cannot be removed", directory);
    printf("bits %016llx\n", (unsigned long long)bits);     // the same for every order of threads
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
