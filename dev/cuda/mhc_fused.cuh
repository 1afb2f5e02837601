// mhc_fused.cuh: the connections of mhc and ihc with four streams in bf16, at what memory allows: a boundary
// between two sublayers moves n-wide states and computes little, so each number is read and written as few
// times as can be. The plain kernels of train_gpt_mhc.cu say what is computed; these agree with them to
// rounding, and where they do not fit (fused_fits) those serve.
//
//                                                                                    numbers a token
//     forward   write_project       y = res x + post f, fn y, 1 / rms(y), pre and post            9 C
//               sinkhorn_forward    the mixing of the next write, beside the sublayer
//               read_layernorm      LayerNorm(pre y)                                              5 C
//     back      sinkhorn_backward   dres, dpost to their logits, beside the sublayer
//               read_backward       dpre, z = d(fn y), LayerNorm's sums                           5 C
//               state_backward      dy, df, dres, dpost, gradients of fn and LayerNorm           15 C
//               add_parts           the parameters' gradients from their parts
//
// Rounded to bf16, once each: y and LayerNorm(u) on the way forward, dy and df on the way back; u = pre y and
// du never are. Products: fn in two parts of bf16, as z in the gradient of fn; of dy's fn^T z the first parts
// alone.
// Assumes C % 8 == 0 and tensors that begin at multiples of 16 bytes. No float atomics; any number of rows.

enum { FUSED_N = 4, FUSED_COEFS = FUSED_N * FUSED_N + 2 * FUSED_N, FUSED_TOKENS = 128,
       FUSED_CHANNELS = 2560 };    // at most: read_layernorm keeps them in registers

// Whether these kernels serve a connection: mhc or ihc of train_gpt_mhc.c, with learned maps, columns first.
static bool fused_fits(const Config* c) {
    bool maps = c->residual == RESIDUAL_MHC ? c->maps == 7 && c->order == ORDER_CR
                                            : c->residual == RESIDUAL_IHC && (c->maps & 3) == 3;
    return maps && c->n == FUSED_N && c->C % 8 == 0 && c->C <= FUSED_CHANNELS && !c->is_static;
}

// Eight channels in bf16, as memory moves them
struct alignas(16) Piece { uint32_t pair[4]; };

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float half_of(uint32_t pair, int half) {
    return half ? high_half(pair) : low_half(pair);
}
__device__ __forceinline__ Piece load_once(const floatX* from) {   // not to be kept in a cache
    float4 raw = __ldcs((const float4*)from);
    Piece p = {
        {__float_as_uint(raw.x), __float_as_uint(raw.y), __float_as_uint(raw.z), __float_as_uint(raw.w)}};
    return p;
}

// Four numbers at a time
__device__ __forceinline__ void load_4(float* to, const float* from) {
    float4 raw = *(const float4*)from;
    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}
__device__ __forceinline__ void store_4(float* to, const float* from) {
    *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
}

// Stream i of y = res x + post f in one channel (mHC Eq. 3): in this order wherever it is computed, so that a
// state that is computed again has the bits of the one that was stored.
template <bool IDENTITY>
__device__ __forceinline__ float mixed(int i, const float (&x)[FUSED_N], float f,
                                       const float (&res)[FUSED_N][FUSED_N], const float (&post)[FUSED_N]) {
    if (IDENTITY) return fmaf(post[i], f, x[i]);
    float sum = post[i] * f;
#pragma unroll
    for (int j = 0; j < FUSED_N; j++) sum = fmaf(res[i][j], x[j], sum);
    return sum;
}

// Tiles in shared memory have rows of 32 channels, 64 bytes: where a piece of 16 bytes lies. Pieces change
// places by the row, so that one piece of each of 8 rows is all 32 banks; tiles begin at multiples of 128.
__device__ __forceinline__ int piece_of_32(int row, int piece) {
    return row * 64 + ((piece ^ (row >> 1 & 3)) * 16);
}

// --- fn in two parts: rounded to bf16, and what that lost. A product with both is exact to 2^-16.

static __global__ void split_fn_kernel(floatX* split, const float* fn, size_t count) {
    size_t at = (size_t)blockIdx.x * FUSED_TOKENS + threadIdx.x;
    if (at >= count) return;
    floatX high = from_float<floatX>(fn[at]);
    split[at] = high;
    split[count + at] = from_float<floatX>(fn[at] - to_float(high));
}
// split (2, count) of fn (count), once a step
static void fused_split_fn_gpu(floatX* split, const float* fn, size_t count, cudaStream_t stream) {
    split_fn_kernel<<<ceil_div(count, FUSED_TOKENS), FUSED_TOKENS, 0, stream>>>(split, fn, count);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// Write and project. A block has 64 tokens and walks their channels, 32 of every stream at a time, in stages
// that arrive while others are worked on. A thread has a token and a piece of each stream: what it copies to
// shared memory it mixes itself, in place, and stores; then warps multiply with fn, each one stream of 32
// tokens. The tile of fn is read again for every 64 tokens, from the L2 cache: 6 C bytes a token.

typedef struct {                // from the output of a sublayer to the coefficients of the next
    const floatX *x, *f;        // (rows, 4, C), (rows, C) state before it, its output; f NULL: y is there
    const float* coef;          // (rows, 24) its coefficients
    floatX* y;                  // (rows, 4, C) state after it
    const floatX* fn;           // (2, M, 4C) from here on of the next: both parts
    const float *base, *scale;
    float *mix, *rnorm;         // (rows, M), (rows)
    float* next_coef;           // (rows, 24): pre and post, and in ihc res; in mhc that is sinkhorn_forward's
    int rows, C;
} FusedWrite;

enum { WRITE_TOKENS = 64, WRITE_WIDTH = 32, WRITE_PIECES = WRITE_WIDTH / 8, WRITE_THREADS = 256 };
static_assert(WRITE_TOKENS * WRITE_PIECES == WRITE_THREADS, "a thread has a piece of each stream");

template <bool IDENTITY> struct WriteTile {                     // bytes, of a stage
    static constexpr int OUTS = IDENTITY ? 2 * FUSED_N : FUSED_COEFS, LINE = WRITE_WIDTH * 2;
    static constexpr int F = FUSED_N * WRITE_TOKENS * LINE, FN = F + WRITE_TOKENS * LINE;
    static constexpr int STAGE = FN + 2 * FUSED_N * OUTS * LINE;
    static constexpr int shared(int stages) { return stages * STAGE + WRITE_TOKENS * (int)sizeof(float); }
};

// Begins to copy channels ch .. of this thread's token and of fn.
template <bool IDENTITY>
__device__ __forceinline__ void write_load(const FusedWrite& w, uint32_t stage, size_t row, int first) {
    typedef WriteTile<IDENTITY> Tile;
    int token = threadIdx.x / WRITE_PIECES, piece = threadIdx.x % WRITE_PIECES, ch = first + piece * 8;
    bool present = row < (size_t)w.rows && ch < w.C;
    const floatX* x = w.f ? w.x : w.y;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++)
        cp_async_16(stage + piece_of_32(i * WRITE_TOKENS + token, piece), x + (row * FUSED_N + i) * w.C + ch,
                    present);
    if (w.f) cp_async_16(stage + Tile::F + piece_of_32(token, piece), w.f + row * w.C + ch, present);
#pragma unroll
    for (int e = 0; e < Tile::OUTS / 8; e++) {
        int line = (e * WRITE_THREADS + threadIdx.x) / WRITE_PIECES, out = line % Tile::OUTS;
        int stream = line / Tile::OUTS % FUSED_N, part = line / (Tile::OUTS * FUSED_N);
        const floatX* from = w.fn + ((size_t)(part * Tile::OUTS + out) * FUSED_N + stream) * w.C + ch;
        cp_async_16(stage + Tile::FN + piece_of_32(line, piece), from, ch < w.C);
    }
}

// A piece of each stream of x becomes that of y.
template <bool IDENTITY>
__device__ __forceinline__ void write_piece(Piece (&x)[FUSED_N], const Piece& f,
                                            const float (&res)[FUSED_N][FUSED_N],
                                            const float (&post)[FUSED_N]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float low[FUSED_N], high[FUSED_N];
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) low[i] = low_half(x[i].pair[e]), high[i] = high_half(x[i].pair[e]);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++)
            x[i].pair[e] = pack_bf16(mixed<IDENTITY>(i, low, low_half(f.pair[e]), res, post),
                                     mixed<IDENTITY>(i, high, high_half(f.pair[e]), res, post));
    }
}

// Mixes this thread's piece of each stream, in place and in memory; returns the sum of the squares of y.
template <bool IDENTITY, bool WRITES>
__device__ __forceinline__ float write_mix(const FusedWrite& w, unsigned char* stage, size_t row, int first,
                                           const float (&res)[FUSED_N][FUSED_N],
                                           const float (&post)[FUSED_N]) {
    int token = threadIdx.x / WRITE_PIECES, piece = threadIdx.x % WRITE_PIECES, ch = first + piece * 8;
    bool present = row < (size_t)w.rows && ch < w.C;
    Piece x[FUSED_N];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++)
        x[i] = *(const Piece*)(stage + piece_of_32(i * WRITE_TOKENS + token, piece));
    if (WRITES) {
        Piece f = *(const Piece*)(stage + WriteTile<IDENTITY>::F + piece_of_32(token, piece));
        write_piece<IDENTITY>(x, f, res, post);
    }
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float y = half_of(x[i].pair[e / 2], e % 2);
            squares = fmaf(y, y, squares);
        }
        if (WRITES) *(Piece*)(stage + piece_of_32(i * WRITE_TOKENS + token, piece)) = x[i];
        if (WRITES && present) *(Piece*)(w.y + (row * FUSED_N + i) * w.C + ch) = x[i];
    }
    return squares;
}

// sums (32 tokens, OUTS) of a warp += one stream of y times fn
template <bool IDENTITY>
__device__ __forceinline__ void write_products(float (&sums)[2][WriteTile<IDENTITY>::OUTS / 8][4],
                                               uint32_t stage, int tokens, int stream) {
    typedef WriteTile<IDENTITY> Tile;
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < WRITE_WIDTH / 16; k++) {
        uint32_t a[2][4], b[4];                 // b: the rounded part of fn, and the other
#pragma unroll
        for (int t = 0; t < 2; t++) {
            int line = stream * WRITE_TOKENS + tokens + 16 * t + lane % 16;
            ldmatrix_x4(a[t], stage + piece_of_32(line, 2 * k + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < Tile::OUTS / 8; j++) {
            int line = (lane / 16 * FUSED_N + stream) * Tile::OUTS + 8 * j + lane % 8;
            ldmatrix_x4(b, stage + Tile::FN + piece_of_32(line, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int t = 0; t < 2; t++) {
                mma_bf16(sums[t][j], a[t], b[0], b[1]);
                mma_bf16(sums[t][j], a[t], b[2], b[3]);
            }
        }
    }
}

// mix of the block's tokens, and of the next coefficients what needs no more than that. partial (4 streams,
// 64 tokens, OUTS) is added in the order of the streams.
template <bool IDENTITY>
__device__ __forceinline__ void write_coefficients(const FusedWrite& w, const float* partial,
                                                   const float* norms, size_t first) {
    constexpr int OUTS = WriteTile<IDENTITY>::OUTS, SIZE = WRITE_TOKENS * OUTS;
    for (int e = threadIdx.x; e < SIZE; e += WRITE_THREADS) {
        int token = e / OUTS, m = e % OUTS;
        if (first + token >= (size_t)w.rows) break;
        float sum = partial[e];
        for (int i = 1; i < FUSED_N; i++) sum += partial[i * SIZE + e];
        sum *= norms[token];
        w.mix[first * OUTS + e] = sum;
        if (m >= 2 * FUSED_N) continue;         // mHC Eq. 7, 8
        float top = m < FUSED_N ? 1 : 2, a = w.scale[m / FUSED_N] * sum + w.base[m];
        w.next_coef[(first + token) * FUSED_COEFS + m] = top / (1 + exp_saturated(-a));
    }
    for (int e = threadIdx.x; IDENTITY && e < WRITE_TOKENS * FUSED_N * FUSED_N; e += WRITE_THREADS) {
        size_t row = first + e / (FUSED_N * FUSED_N), entry = e % (FUSED_N * FUSED_N);
        if (row < (size_t)w.rows)
            w.next_coef[row * FUSED_COEFS + 2 * FUSED_N + entry] = entry / FUSED_N == entry % FUSED_N;
    }
}

template <bool IDENTITY, bool WRITES, int STAGES>
static __global__ void __launch_bounds__(WRITE_THREADS, 2) write_project_kernel(FusedWrite w) {
    typedef WriteTile<IDENTITY> Tile;
    extern __shared__ __align__(128) unsigned char fused_shared[];
    float* norms = (float*)(fused_shared + STAGES * Tile::STAGE);
    uint32_t stages = (uint32_t)__cvta_generic_to_shared(fused_shared);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stream = warp % FUSED_N;
    int token = threadIdx.x / WRITE_PIECES, tokens = warp / FUSED_N * 32;       // tokens: the warp's first
    size_t first = (size_t)blockIdx.x * WRITE_TOKENS, row = first + token;
    float res[FUSED_N][FUSED_N] = {}, post[FUSED_N] = {}, squares = 0, sums[2][Tile::OUTS / 8][4] = {};
    int chunks = (w.C + WRITE_WIDTH - 1) / WRITE_WIDTH;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < chunks) write_load<IDENTITY>(w, stages + s * Tile::STAGE, row, s * WRITE_WIDTH);
        cp_async_commit();
    }
    if (WRITES && row < (size_t)w.rows) {
        const float* coef = w.coef + row * FUSED_COEFS;
        load_4(post, coef + FUSED_N);
#pragma unroll
        for (int i = 0; i < FUSED_N && !IDENTITY; i++) load_4(res[i], coef + (2 + i) * FUSED_N);
    }
    for (int c = 0, stage = 0, next = STAGES - 1; c < chunks; c++) {
        cp_async_wait<STAGES - 2>();
        squares += write_mix<IDENTITY, WRITES>(w, fused_shared + stage * Tile::STAGE, row, c * WRITE_WIDTH,
                                               res, post);
        __syncthreads();                        // y and fn are there; the stage before this one is free
        if (c + STAGES - 1 < chunks)
            write_load<IDENTITY>(w, stages + next * Tile::STAGE, row, (c + STAGES - 1) * WRITE_WIDTH);
        cp_async_commit();
        write_products<IDENTITY>(sums, stages + stage * Tile::STAGE, tokens, stream);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    cp_async_wait<0>();
    __syncthreads();                            // the stages become partial
    float* partial = (float*)fused_shared;
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int j = 0; j < Tile::OUTS / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int line = stream * WRITE_TOKENS + tokens + 16 * t + 8 * half + lane / 4;
                *(float2*)(partial + line * Tile::OUTS + 8 * j + lane % 4 * 2) =
                    make_float2(sums[t][j][2 * half], sums[t][j][2 * half + 1]);
            }
    squares += __shfl_xor_sync(ALL_LANES, squares, 1);
    squares += __shfl_xor_sync(ALL_LANES, squares, 2);
    float norm = 1 / sqrtf(squares / (FUSED_N * w.C) + 1e-6f);
    if (threadIdx.x % WRITE_PIECES == 0) norms[token] = norm;
    if (threadIdx.x % WRITE_PIECES == 0 && row < (size_t)w.rows) w.rnorm[row] = norm;
    __syncthreads();
    write_coefficients<IDENTITY>(w, partial, norms, first);
}

template <bool IDENTITY, bool WRITES, int STAGES>
static void write_project_stages(const FusedWrite* w, cudaStream_t stream) {
    constexpr int SHARED = WriteTile<IDENTITY>::shared(STAGES);
    auto write_project = write_project_kernel<IDENTITY, WRITES, STAGES>;
    CUDA(cudaFuncSetAttribute(write_project, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    write_project<<<ceil_div(w->rows, WRITE_TOKENS), WRITE_THREADS, SHARED, stream>>>(*w);
    LAUNCHED();
}
template <bool IDENTITY>
static void write_project_mode(const FusedWrite* w, bool three, cudaStream_t stream) {
    if (three) w->f ? write_project_stages<IDENTITY, true, 3>(w, stream)
                    : write_project_stages<IDENTITY, false, 3>(w, stream);
    else w->f ? write_project_stages<IDENTITY, true, 2>(w, stream)
              : write_project_stages<IDENTITY, false, 2>(w, stream);
}
// shared: bytes that a block may have at most on this device. Three stages where two such blocks fit, as on
// an H100 (227 KB), else two, as on an A100 (163 KB).
static void fused_write_project_gpu(const FusedWrite* w, bool identity, int shared, cudaStream_t stream) {
    bool three = 2 * WriteTile<false>::shared(3) <= shared;
    if (identity) write_project_mode<true>(w, three, stream);
    else write_project_mode<false>(w, three, stream);
}

// --- the write alone, for the last state and for states that are computed again: the same bits

template <bool IDENTITY> static __global__ void write_fused_kernel(FusedWrite w) {
    int pieces = w.C / 8, row = blockIdx.x * WRITE_PIECES + threadIdx.y;
    if (row >= w.rows) return;
    float res[FUSED_N][FUSED_N] = {}, post[FUSED_N];
    const float* coef = w.coef + (size_t)row * FUSED_COEFS;
    load_4(post, coef + FUSED_N);
#pragma unroll
    for (int i = 0; i < FUSED_N && !IDENTITY; i++) load_4(res[i], coef + (2 + i) * FUSED_N);
    for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
        Piece x[FUSED_N], f = load_once(w.f + ((size_t)row * pieces + piece) * 8);
        size_t at = ((size_t)row * FUSED_N * pieces + piece) * 8;
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) x[i] = load_once(w.x + at + i * w.C);
        write_piece<IDENTITY>(x, f, res, post);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) *(Piece*)(w.y + at + i * w.C) = x[i];
    }
}
// y of w from its x, f and coef; nothing else is touched
static void fused_write_gpu(const FusedWrite* w, bool identity, cudaStream_t stream) {
    dim3 threads(WRITE_THREADS / WRITE_PIECES, WRITE_PIECES);   // a row a line
    int blocks = ceil_div(w->rows, WRITE_PIECES);
    if (identity) write_fused_kernel<true><<<blocks, threads, 0, stream>>>(*w);
    else write_fused_kernel<false><<<blocks, threads, 0, stream>>>(*w);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// Sinkhorn-Knopp: a token a thread, its matrix in registers. Nothing waits for it but the next boundary: it
// runs beside the sublayer.

// Line i of a token's matrix in shared memory: so placed that 8 tokens' lines i are all 32 banks
__device__ __forceinline__ float* matrix_line(float* tile, int token, int i) {
    return tile + (token * FUSED_N + (i ^ (token >> 1 & 3))) * FUSED_N;
}
// move(at, token, i) for the lines of the block's tokens, side by side
template <class Move> __device__ __forceinline__ void each_matrix_line(float* tile, int tokens, Move move) {
    for (int e = threadIdx.x; e < tokens * FUSED_N; e += blockDim.x)
        move(matrix_line(tile, e / FUSED_N, e % FUSED_N), e / FUSED_N, e % FUSED_N);
}

static __global__ void sinkhorn_forward_kernel(float* coef, const float* mix, const float* base,
                                               const float* scale, int iters, int rows) {
    __shared__ __align__(16) float tile[FUSED_TOKENS * FUSED_N * FUSED_N];
    size_t first = (size_t)blockIdx.x * FUSED_TOKENS, res = first * FUSED_COEFS + 2 * FUSED_N;
    int tokens = min((int)FUSED_TOKENS, rows - (int)first);
    auto place = [](int token, int i) { return token * FUSED_COEFS + i * FUSED_N; };
    mix += res, coef += res;
    each_matrix_line(tile, tokens,
                     [=](float* at, int t, int i) { *(float4*)at = *(float4*)(mix + place(t, i)); });
    __syncthreads();
    if (threadIdx.x < (unsigned)tokens) {
        float R[FUSED_N * FUSED_N];
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) load_4(R + FUSED_N * i, matrix_line(tile, threadIdx.x, i));
#pragma unroll
        for (int e = 0; e < FUSED_N * FUSED_N; e++) R[e] = scale[2] * R[e] + base[2 * FUSED_N + e];
        exp_lines<FUSED_N, false>(R, true);
        for (int t = 0; t < iters; t++) {
            divide_lines<FUSED_N, false>(R, NULL, 0);
            divide_lines<FUSED_N, true>(R, NULL, 0);
        }
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) store_4(matrix_line(tile, threadIdx.x, i), R + FUSED_N * i);
    }
    __syncthreads();
    each_matrix_line(tile, tokens,
                     [=](float* at, int t, int i) { *(float4*)(coef + place(t, i)) = *(float4*)at; });
}
// res of coef (rows, 24) from mix (rows, 24)
static void fused_sinkhorn_forward_gpu(float* coef, const float* mix, const float* base, const float* scale,
                                       int iters, int rows, cudaStream_t stream) {
    sinkhorn_forward_kernel<<<ceil_div(rows, FUSED_TOKENS), FUSED_TOKENS, 0, stream>>>(coef, mix, base, scale,
                                                                                       iters, rows);
    LAUNCHED();
}

// From parts (slabs, 5, rows, 4) of a token's dpost and the rows of dres (in ihc (slabs, 1, rows, 4), dpost
// alone): the gradients of their logits, post | res. The divisors are kept in shared memory.
template <bool IDENTITY>
static __global__ void sinkhorn_backward_kernel(float* dlogit, const float* parts, int slabs,
                                                const float* coef, const float* mix, const float* base,
                                                const float* scale, int iters, int rows) {
    constexpr int LINES = IDENTITY ? 1 : 1 + FUSED_N, ENTRIES = FUSED_N * FUSED_N;
    extern __shared__ __align__(16) float fused_tokens[];       // (threads, LINES, 4), then divisors
    int stride = blockDim.x, thread = threadIdx.x;
    float* divisors = fused_tokens + stride * LINES * FUSED_N + thread;
    size_t first = (size_t)blockIdx.x * stride, row = first + thread;
    int tokens = min(stride, rows - (int)first);
    float R[ENTRIES], d[LINES * FUSED_N] = {}, post[FUSED_N];
    if (!IDENTITY) {
        each_matrix_line(fused_tokens, tokens, [=](float* at, int t, int i) {
            *(float4*)at = *(float4*)(mix + (first + t) * FUSED_COEFS + (2 + i) * FUSED_N);
        });
        __syncthreads();
    }
    if (thread < tokens) {
        for (int s = 0; s < slabs; s++)
#pragma unroll
            for (int l = 0; l < LINES; l++) {
                float part[FUSED_N];
                load_4(part, parts + (((size_t)s * LINES + l) * rows + row) * FUSED_N);
#pragma unroll
                for (int e = 0; e < FUSED_N; e++) d[l * FUSED_N + e] += part[e];
            }
        load_4(post, coef + row * FUSED_COEFS + FUSED_N);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) d[i] *= post[i] * (1 - post[i] / 2);
    }
    if (!IDENTITY && thread < tokens) {
        float* dres = d + (IDENTITY ? 0 : FUSED_N);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) load_4(R + FUSED_N * i, matrix_line(fused_tokens, thread, i));
#pragma unroll
        for (int e = 0; e < ENTRIES; e++) R[e] = scale[2] * R[e] + base[2 * FUSED_N + e];
        exp_lines<FUSED_N, false>(R, true);
        float* at = divisors;
        for (int t = 0; t < iters; t++, at += 2 * FUSED_N * stride) {
            divide_lines<FUSED_N, false>(R, at, stride);
            divide_lines<FUSED_N, true>(R, at + FUSED_N * stride, stride);
        }
        for (int t = 0; t < iters; t++) {
            at -= 2 * FUSED_N * stride;
            divide_lines_backward<FUSED_N, true>(dres, R, at + FUSED_N * stride, stride);
            divide_lines_backward<FUSED_N, false>(dres, R, at, stride);
        }
#pragma unroll
        for (int e = 0; e < ENTRIES; e++) dres[e] *= R[e];      // through exp
    }
    __syncthreads();
    if (thread < tokens)
#pragma unroll
        for (int l = 0; l < LINES; l++)
            store_4(fused_tokens + (thread * LINES + l) * FUSED_N, d + l * FUSED_N);
    __syncthreads();
    for (int e = thread; e < tokens * LINES; e += stride)
        *(float4*)(dlogit + (first * LINES + e) * FUSED_N) = *(float4*)(fused_tokens + e * FUSED_N);
}
// dlogit (rows, 20), in ihc (rows, 4); coef, mix (rows, M), base and scale are the writing sublayer's
static void fused_sinkhorn_backward_gpu(float* dlogit, const float* parts, int slabs, const float* coef,
                                        const float* mix, const float* base, const float* scale, int iters,
                                        bool identity, int rows, cudaStream_t stream) {
    int threads = iters <= 32 ? 64 : 32, blocks = ceil_div(rows, threads);      // shared: at most 105 KB
    int line = threads * FUSED_N * (int)sizeof(float), shared = (1 + FUSED_N + 2 * iters) * line;
    CUDA(cudaFuncSetAttribute(sinkhorn_backward_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared));
    if (identity)
        sinkhorn_backward_kernel<true>
            <<<blocks, threads, line, stream>>>(dlogit, parts, slabs, coef, mix, base, scale, iters, rows);
    else
        sinkhorn_backward_kernel<false><<<blocks, threads, shared, stream>>>(dlogit, parts, slabs, coef, mix,
                                                                             base, scale, iters, rows);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// Read and LayerNorm: a warp has a token and keeps u in registers, V pieces a lane. The last rows come first:
// they were written last, and what of them is still in the L2 cache need not be read from memory.

enum { READ_WARPS = 8 };

template <int V>
static __global__ void __launch_bounds__(READ_WARPS* WARP)
    read_layernorm_fused_kernel(floatX* ln, float* stats, const floatX* y, const float* coef,
                                const floatX* weight, const floatX* bias, int C, int rows) {
    int lane = threadIdx.x % WARP;
    long long row = rows - 1 - ((long long)blockIdx.x * READ_WARPS + threadIdx.x / WARP);
    if (row < 0) return;                        // the whole warp
    float pre[FUSED_N], u[V][8], each = 1.0f / C, mean = 0, variance = 0;
    load_4(pre, coef + row * FUSED_COEFS);
    y += row * FUSED_N * C, ln += row * C;
#pragma unroll
    for (int v = 0; v < V; v++) {
        int ch = (v * WARP + lane) * 8;
        Piece x[FUSED_N] = {};
#pragma unroll
        for (int i = 0; i < FUSED_N; i++)
            if (ch < C) x[i] = load_once(y + i * C + ch);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            u[v][e] = 0;
#pragma unroll
            for (int i = 0; i < FUSED_N; i++)
                u[v][e] = fmaf(pre[i], half_of(x[i].pair[e / 2], e % 2), u[v][e]);
            mean += u[v][e];
        }
    }
    mean = warp_sum(mean) * each;
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            u[v][e] -= mean;
            if ((v * WARP + lane) * 8 < C) variance = fmaf(u[v][e], u[v][e], variance);
        }
    float rstd = 1 / sqrtf(warp_sum(variance) * each + 1e-5f);
#pragma unroll
    for (int v = 0; v < V; v++) {
        int ch = (v * WARP + lane) * 8;
        if (ch >= C) break;
        Piece w = *(const Piece*)(weight + ch), b = *(const Piece*)(bias + ch), out;
#pragma unroll
        for (int e = 0; e < 4; e++)
            out.pair[e] = pack_bf16(
                fmaf(u[v][2 * e] * rstd, low_half(w.pair[e]), low_half(b.pair[e])),
                fmaf(u[v][2 * e + 1] * rstd, high_half(w.pair[e]), high_half(b.pair[e])));
        *(Piece*)(ln + ch) = out;
    }
    if (lane == 0) *(float2*)(stats + row * 2) = make_float2(mean, rstd);
}

// ln (rows, C) = LayerNorm(pre y), stats (rows, 2) {mean, rstd}; from y (rows, 4, C), coef (rows, 24)
static void fused_read_layernorm_gpu(floatX* ln, float* stats, const floatX* y, const float* coef,
                                     const floatX* weight, const floatX* bias, int C, int rows,
                                     cudaStream_t stream) {
    assert(C <= FUSED_CHANNELS);
    int blocks = ceil_div(rows, READ_WARPS), threads = READ_WARPS * WARP;
#define READ(V) \
    read_layernorm_fused_kernel<V><<<blocks, threads, 0, stream>>>(ln, stats, y, coef, weight, bias, C, rows)
    switch (ceil_div(C, 8 * WARP)) {
        case 1: READ(1); break;
        case 2: READ(2); break;
        case 3: READ(3); break;
        case 4: READ(4); break;
        case 5: READ(5); break;
        case 6: case 7: READ(7); break;
        default: READ(10);
    }
#undef READ
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// The way back, from the input of a sublayer to the logits of its connection: LayerNorm, the read, sigmoids,
// and the product with fn. A warp has a token and goes over it once: with g = weight dln, what a token needs
// are sums over channels of g, g xhat, and for each stream of y g, y and y xhat; xhat = (u - mean) rstd.

typedef struct {
    const floatX *y, *dln;      // (rows, 4, C) state before the sublayer, (rows, C)
    const floatX* weight;       // (C) LayerNorm's
    const float *coef, *stats, *mix, *rnorm, *scale;
    const float* dlogit;        // (rows, 20), in ihc (rows, 4): of post | res
    floatX* z;                  // (rows, 2, M) the gradient of fn y: rounded, and what that lost
    float* token;               // (rows, 8) what state_backward wants of a token: TOKEN_RSTD ..
    float* parts;               // (blocks of 128 rows, M + scales) of dbase and dscale
    int rows, C;
} FusedReadBackward;

enum { TOKEN_RSTD, TOKEN_SHIFT, TOKEN_SUM, TOKEN_ALONG, TOKEN_SHRINK, TOKEN_TERMS = 8 };

// Sums over a warp of 16 numbers; lane l gets that of number l / 2.
__device__ __forceinline__ float warp_sums_16(float (&x)[16]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
        bool upper = lane & 2 * half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            float mine = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
            x[i] = mine + __shfl_xor_sync(ALL_LANES, other, 2 * half);
        }
    }
    return x[0] + __shfl_xor_sync(ALL_LANES, x[0], 1);
}

enum { SUM_YG, SUM_Y = FUSED_N, SUM_YX = 2 * FUSED_N, SUM_G = 3 * FUSED_N, SUM_GX };

// A warp's sums of one token; lane l gets sum l / 2.
__device__ __forceinline__ float read_sums(const FusedReadBackward& b, size_t row,
                                           const float (&pre)[FUSED_N], float rstd, float shift) {
    float sums[16] = {};
    const floatX *y = b.y + row * FUSED_N * b.C, *dln = b.dln + row * b.C;
    for (int ch = threadIdx.x % WARP * 8; ch < b.C; ch += WARP * 8) {
        Piece x[FUSED_N], d = *(const Piece*)(dln + ch), w = *(const Piece*)(b.weight + ch);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) x[i] = *(const Piece*)(y + i * b.C + ch);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float g = half_of(w.pair[e / 2], e % 2) * half_of(d.pair[e / 2], e % 2), u = 0, xs[FUSED_N];
#pragma unroll
            for (int i = 0; i < FUSED_N; i++) xs[i] = half_of(x[i].pair[e / 2], e % 2);
#pragma unroll
            for (int i = 0; i < FUSED_N; i++) u = fmaf(pre[i], xs[i], u);
            float xhat = fmaf(u, rstd, shift);
            sums[SUM_G] += g;
            sums[SUM_GX] = fmaf(g, xhat, sums[SUM_GX]);
#pragma unroll
            for (int i = 0; i < FUSED_N; i++) {
                sums[SUM_YG + i] = fmaf(xs[i], g, sums[SUM_YG + i]);
                sums[SUM_Y + i] += xs[i];
                sums[SUM_YX + i] = fmaf(xs[i], xhat, sums[SUM_YX + i]);
            }
        }
    }
    return warp_sums_16(sums);
}

enum { READ_BACKWARD_ROWS = 128 };              // of a block
static int read_backward_blocks(int rows) { return ceil_div(rows, READ_BACKWARD_ROWS); }

template <bool IDENTITY>
static __global__ void __launch_bounds__(READ_WARPS* WARP) read_backward_fused_kernel(FusedReadBackward b) {
    constexpr int M = IDENTITY ? 2 * FUSED_N : FUSED_COEFS, MAPS = IDENTITY ? 2 : 3;
    __shared__ float terms[2][READ_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane < 2 * FUSED_N ? lane / FUSED_N : 2;
    size_t first = (size_t)blockIdx.x * READ_BACKWARD_ROWS,
           last = min(first + READ_BACKWARD_ROWS, (size_t)b.rows);
    float factor = lane < M ? b.scale[group] : 0, each = 1.0f / b.C, dbase = 0, dscale = 0;
    for (size_t row = first + warp; row < last; row += READ_WARPS) {
        float pre[FUSED_N], mean = b.stats[row * 2], rstd = b.stats[row * 2 + 1], shift = -mean * rstd;
        load_4(pre, b.coef + row * FUSED_COEFS);
        float total = read_sums(b, row, pre, rstd, shift), d = 0, mix = 0;
        float sum = __shfl_sync(ALL_LANES, total, 2 * SUM_G) * each;
        float along = __shfl_sync(ALL_LANES, total, 2 * SUM_GX) * each;
        int i = lane % FUSED_N;
        float yg = __shfl_sync(ALL_LANES, total, 2 * (SUM_YG + i)),
              y = __shfl_sync(ALL_LANES, total, 2 * (SUM_Y + i));
        float yx = __shfl_sync(ALL_LANES, total, 2 * (SUM_YX + i));
        if (lane < FUSED_N) {                   // dpre = y du
            float value = b.coef[row * FUSED_COEFS + lane];
            d = rstd * (yg - sum * y - along * yx) * value * (1 - value);
        } else if (lane < M) d = b.dlogit[row * (M - FUSED_N) + lane - FUSED_N];
        if (lane < M) mix = b.mix[row * M + lane];
        float norm = b.rnorm[row], dmix = factor * d, z = dmix * norm;
        float shrink = warp_sum(dmix * mix) * (norm * norm * each / FUSED_N);
        dbase += d;
        dscale = fmaf(d, mix, dscale);
        floatX high = from_float<floatX>(z);
        if (lane < M) {
            b.z[row * 2 * M + lane] = high;
            b.z[(row * 2 + 1) * M + lane] = from_float<floatX>(z - to_float(high));
        }
        float mine = lane == TOKEN_RSTD ? rstd : lane == TOKEN_SHIFT ? shift : lane == TOKEN_SUM ? rstd * sum
                   : lane == TOKEN_ALONG ? rstd * along : lane == TOKEN_SHRINK ? shrink : 0;
        if (lane < TOKEN_TERMS) b.token[row * TOKEN_TERMS + lane] = mine;
    }
    terms[0][warp][lane] = dbase, terms[1][warp][lane] = dscale;
    __syncthreads();
    if (warp > 0) return;
    float sums[2] = {};
    for (int w = 0; w < READ_WARPS; w++) sums[0] += terms[0][w][lane], sums[1] += terms[1][w][lane];
    float* parts = b.parts + (size_t)blockIdx.x * (M + MAPS);
    if (lane < M) parts[lane] = sums[0];
    for (int map = 0; map < MAPS; map++) {
        float all = warp_sum(group == map && lane < M ? sums[1] : 0);
        if (lane == 0) parts[M + map] = all;
    }
}
static void fused_read_backward_gpu(const FusedReadBackward* b, bool identity, cudaStream_t stream) {
    int blocks = read_backward_blocks(b->rows), threads = READ_WARPS * WARP;
    if (identity) read_backward_fused_kernel<true><<<blocks, threads, 0, stream>>>(*b);
    else read_backward_fused_kernel<false><<<blocks, threads, 0, stream>>>(*b);
    LAUNCHED();
}

// ------------------------------------------------------------------------------------------------
// The way back, through the state before sublayer k, y, and the write of sublayer k - 1 that made it:
//     dy = res_k^T dnext + pre_k du - shrink y + fn_k^T z        du = rstd weight dln - sum - along xhat
//     df = post^T dy, dpost = dy . f, dres = dy x^T              all of sublayer k - 1
//     dfn_k = z^T y, dweight = dln . xhat, dbias = dln           summed over tokens
// y is not read: it is mixed again from x and f. A block owns a slab of channels of every stream and goes
// through tiles of 16 tokens, `sets` tiles apart; a warp has 16 channels. So the gradient of fn stays in
// registers to the end, and fn in shared memory. Two barriers a tile: it is there; its results are.
//
// Of 16 tokens and 16 channels lane 4 g + t has tokens g and g + 8, channels 2 t, 2 t + 1 and those 8 further
// on, in 4 registers, as mma's first factor has them. Register q: tokens by q % 2, channels by q / 2.

typedef struct {
    const floatX* dnext;        // (rows, 4, C) gradient of the state after sublayer k
    const floatX* x;            // (rows, 4, C) state before sublayer k - 1
    const floatX* f;            // (rows, C) its output; NULL: x is y
    const float* before;        // (rows, 24) coefficients of sublayer k - 1
    const floatX *dln, *weight, *fn;            // (rows, C), (C), (2, M, 4C) from here on of sublayer k
    const float *coef, *token;  // (rows, 24), (rows, 8)
    const floatX* z;            // (rows, 2, M)
    floatX *dy, *df;            // (rows, 4, C), may be dnext; (rows, C)
    float* dcoef;               // (slabs, 5, rows, 4), in ihc (slabs, 1, rows, 4): parts of dpost | dres
    float* parts;               // (sets, 4 M C + 2 C): of dfn | dweight | dbias
    int rows, C, sets;
} FusedStateBackward;

enum { STATE_TOKENS = 16 };

template <bool IDENTITY, int SLAB> struct StateTile {           // bytes; a stage has ..
    static constexpr int OUTS = IDENTITY ? 2 * FUSED_N : FUSED_COEFS, LINES = IDENTITY ? 1 : 1 + FUSED_N;
    static constexpr int THREADS = 2 * SLAB, WARPS = THREADS / WARP, PIECES = SLAB / 8;
    static constexpr int X = 0, D = FUSED_N * STATE_TOKENS * SLAB * 2, F = 2 * D, DLN = F + D / FUSED_N;
    static constexpr int BEFORE = DLN + D / FUSED_N, COEF_LINE = FUSED_COEFS * 4,
                         TOKEN_LINE = TOKEN_TERMS * 4;
    static constexpr int COEF = BEFORE + STATE_TOKENS * COEF_LINE, TOKEN = COEF + STATE_TOKENS * COEF_LINE;
    static constexpr int Z = TOKEN + STATE_TOKENS * TOKEN_LINE, Z_LINE = OUTS * 4;
    static constexpr int STAGE = Z + STATE_TOKENS * Z_LINE;
    static constexpr int FN = FUSED_N * OUTS * SLAB * 2, DCOEF = WARPS * STATE_TOKENS * LINES * FUSED_N * 4;
    static constexpr int shared(int stages) { return stages * STAGE + FN + DCOEF; }
    static_assert(THREADS == STATE_TOKENS * PIECES, "a thread has a piece of each stream of a token");
    static_assert(THREADS >= STATE_TOKENS * (Z_LINE / 16 + 2),
                  "and at most one of each line of coefficients");
};

// Where a piece lies in rows of SLAB channels: one piece of each of 8 rows is all 32 banks.
template <int SLAB> __device__ __forceinline__ int piece_of(int row, int piece) {
    return row * SLAB * 2 + ((piece ^ (row & 7)) * 16);
}

// The shared address that this lane gives ldmatrix: tokens along a register's index, channels along its high
// bit; or with tokens_last channels along, tokens along the high bit, as the transposed load wants them.
template <int SLAB>
__device__ __forceinline__ uint32_t fragment_at(uint32_t tile, int row, int piece, bool tokens_last) {
    int lane = threadIdx.x % WARP, low = lane / 8 % 2, high = lane / 16;
    return tile + piece_of<SLAB>(row + (tokens_last ? high : low) * 8 + lane % 8,
                                 piece + (tokens_last ? low : high));
}

// Where piece p of a token lies in lines of 2 or 6 pieces: neighbours change places in 4 tokens of 8, so that
// one piece of each of 8 tokens is all 32 banks.
__device__ __forceinline__ int line_piece(int line, int token, int p) {
    return token * line + ((p ^ (token >> 2 & 1)) * 16);
}
__device__ __forceinline__ void copy_line_piece(uint32_t to, const void* from, int line, int token, int p,
                                                size_t first, int rows) {
    cp_async_16(to + line_piece(line, token, p), (const char*)from + (first + token) * line + p * 16,
                first + token < (size_t)rows);
}

template <bool IDENTITY, bool FIRST, int SLAB>
__device__ __forceinline__ void state_load(const FusedStateBackward& b, uint32_t stage, size_t first,
                                           int slab) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    int token = threadIdx.x / Tile::PIECES, piece = threadIdx.x % Tile::PIECES, ch = slab * SLAB + piece * 8;
    size_t row = first + token;
    bool present = row < (size_t)b.rows && ch < b.C;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) {
        int at = piece_of<SLAB>(i * STATE_TOKENS + token, piece);
        size_t from = (row * FUSED_N + i) * b.C + ch;
        cp_async_16(stage + Tile::X + at, b.x + from, present);
        cp_async_16(stage + Tile::D + at, b.dnext + from, present);
    }
    if (!FIRST) cp_async_16(stage + Tile::F + piece_of<SLAB>(token, piece), b.f + row * b.C + ch, present);
    cp_async_16(stage + Tile::DLN + piece_of<SLAB>(token, piece), b.dln + row * b.C + ch, present);
    constexpr int LINE = Tile::COEF_LINE, PIECES = Tile::Z_LINE / 16;           // in ihc res is not wanted
    int e = threadIdx.x, of = e / PIECES, p = e % PIECES, rest = e - STATE_TOKENS * PIECES;
    if (rest < 0) {
        if (!FIRST) copy_line_piece(stage + Tile::BEFORE, b.before, LINE, of, p, first, b.rows);
        copy_line_piece(stage + Tile::COEF, b.coef, LINE, of, p, first, b.rows);
        copy_line_piece(stage + Tile::Z, b.z, Tile::Z_LINE, of, p, first, b.rows);
    } else if (rest < STATE_TOKENS * 2)
        copy_line_piece(stage + Tile::TOKEN, b.token, Tile::TOKEN_LINE, rest / 2, rest % 2, first, b.rows);
}

// The block's slab of the rounded part of fn, rows (stream, output)
template <bool IDENTITY, int SLAB>
__device__ __forceinline__ void state_load_fn(const FusedStateBackward& b, uint32_t fn, int slab) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    int piece = threadIdx.x % Tile::PIECES, ch = slab * SLAB + piece * 8;
    for (int line = threadIdx.x / Tile::PIECES; line < FUSED_N * Tile::OUTS; line += STATE_TOKENS) {
        int stream = line / Tile::OUTS, out = line % Tile::OUTS;
        cp_async_16(fn + piece_of<SLAB>(line, piece), b.fn + ((size_t)out * FUSED_N + stream) * b.C + ch,
                    ch < b.C);
    }
}

// sums[i][h] = fn^T z of stream i, channels by h; z in its rounded part
template <bool IDENTITY, int SLAB>
__device__ __forceinline__ void state_project(float (&sums)[FUSED_N][2][4], uint32_t z, uint32_t fn,
                                              int piece) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    int lane = threadIdx.x % WARP;
    uint32_t a[4], w[4]; // piece j of a line of z: outputs 8 j ..
    if (!IDENTITY) {
        ldmatrix_x4(a, z + line_piece(Tile::Z_LINE, lane % 16, lane / 16));
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) {
            ldmatrix_x4_trans(w, fragment_at<SLAB>(fn, i * Tile::OUTS, piece, false));
            mma_bf16(sums[i][0], a, w[0], w[1]);
            mma_bf16(sums[i][1], a, w[2], w[3]);
        }
    }
    ldmatrix_x4(a, z + line_piece(Tile::Z_LINE, lane % 16, Tile::OUTS / 8 - 1));        // the last, and zeros
    a[2] = a[3] = 0;
#pragma unroll
    for (int i = 0; i < FUSED_N; i += 2) {                      // two streams at a time
        int line = (i + lane / 16) * Tile::OUTS + Tile::OUTS - 8 + lane % 8;
        ldmatrix_x4_trans(w, fn + piece_of<SLAB>(line, piece + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 4; e++) mma_bf16(sums[i + e / 2][e % 2], a, w[e], 0);
    }
}

// dfn[i][j] += y^T z of stream i and outputs 8 j ..; y is in the tile x
template <bool IDENTITY, int SLAB>
__device__ __forceinline__ void state_sum_fn(float (&dfn)[FUSED_N][StateTile<IDENTITY, SLAB>::OUTS / 8][4],
                                             uint32_t x, uint32_t z, int piece) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    constexpr int TILES = Tile::OUTS / 8;       // of each part of z
    int lane = threadIdx.x % WARP;
    uint32_t w[2 * TILES][2], pairs[4];
#pragma unroll
    for (int j = 0; j < 2 * TILES; j += 2) {
        ldmatrix_x4_trans(pairs, z + line_piece(Tile::Z_LINE, lane % 16, j + lane / 16));
        w[j][0] = pairs[0], w[j][1] = pairs[1], w[j + 1][0] = pairs[2], w[j + 1][1] = pairs[3];
    }
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, fragment_at<SLAB>(x, i * STATE_TOKENS, piece, true));
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) mma_bf16(dfn[i][j % TILES], a, w[j][0], w[j][1]);
    }
}

// dpost | dres of this warp's channels, 8 tokens by `half`: each two streams of dy are the rows of a product
// whose columns are a stream of x, or f, of the same tokens; its diagonal is wanted, which 8 lanes hold.
template <bool IDENTITY>
__device__ __forceinline__ void state_sum_coef(float* dcoef, const uint32_t (&dy)[FUSED_N][4],
                                               const uint32_t (&x)[FUSED_N][4], const uint32_t (&f)[4],
                                               int half) {
    constexpr int LINES = IDENTITY ? 1 : 1 + FUSED_N;
    int lane = threadIdx.x % WARP, g = lane / 4;
    float found[LINES][FUSED_N];
#pragma unroll
    for (int o = 0; o < FUSED_N; o += 2) {
        uint32_t a[4] = {dy[o][half], dy[o + 1][half], dy[o][2 + half], dy[o + 1][2 + half]};
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            const uint32_t(&column)[4] = i ? x[i ? i - 1 : 0] : f;
            float d[4] = {};
            mma_bf16(d, a, column[half], column[2 + half]);
            float first = g % 2 ? d[1] : d[0], second = g % 2 ? d[3] : d[2];
            if (i) found[LINES > 1 ? 1 + o : 0][i - 1] = first, found[LINES > 1 ? 2 + o : 0][i - 1] = second;
            else found[0][o] = first, found[0][o + 1] = second;
        }
    }
    if (lane % 4 != g / 2) return;
#pragma unroll
    for (int l = 0; l < LINES; l++) store_4(dcoef + ((8 * half + g) * LINES + l) * FUSED_N, found[l]);
}

typedef struct {                // of one token
    float post[FUSED_N], mix[FUSED_N][FUSED_N];                 // post and res of the sublayer before
    float pre[FUSED_N], next[FUSED_N][FUSED_N];                 // pre and res of this one
    float terms[TOKEN_TERMS];
} StateCoefs;

template <bool IDENTITY, bool FIRST, int SLAB>
__device__ __forceinline__ void state_coefs(StateCoefs& c, const unsigned char* stage, int token) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    auto load = [=](float* to, int tile, int line, int p) {
        load_4(to, (const float*)(stage + tile + line_piece(line, token, p)));
    };
    load(c.pre, Tile::COEF, Tile::COEF_LINE, 0);
    if (!FIRST) load(c.post, Tile::BEFORE, Tile::COEF_LINE, 1);
#pragma unroll
    for (int i = 0; i < FUSED_N && !IDENTITY; i++) {
        if (!FIRST) load(c.mix[i], Tile::BEFORE, Tile::COEF_LINE, 2 + i);
        load(c.next[i], Tile::COEF, Tile::COEF_LINE, 2 + i);
    }
#pragma unroll
    for (int p = 0; p < TOKEN_TERMS / 4; p++) load(c.terms + 4 * p, Tile::TOKEN, Tile::TOKEN_LINE, p);
}

// One channel: y from x and f, rounded; then with its sums the gradient of y and of f
template <bool IDENTITY, bool FIRST>
__device__ __forceinline__ void state_mix(float (&y)[FUSED_N], const float (&x)[FUSED_N], float f,
                                          const StateCoefs& c) {
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) y[i] = FIRST ? x[i] : mixed<IDENTITY>(i, x, f, c.mix, c.post);
}
template <bool IDENTITY, bool FIRST>
__device__ __forceinline__ float state_gradient(float (&dy)[FUSED_N], const float (&y)[FUSED_N],
                                                const float (&dnext)[FUSED_N], float dln, float weight,
                                                float& dweight, const StateCoefs& c) {
    float u = 0, df = 0;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) u = fmaf(c.pre[i], y[i], u);
    float xhat = fmaf(u, c.terms[TOKEN_RSTD], c.terms[TOKEN_SHIFT]);
    float du = c.terms[TOKEN_RSTD] * (weight * dln) - c.terms[TOKEN_SUM] - c.terms[TOKEN_ALONG] * xhat;
    dweight = fmaf(dln, xhat, dweight);
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) {         // dy[i] holds fn^T z
        dy[i] = fmaf(c.pre[i], du, dy[i]);
        dy[i] = fmaf(-c.terms[TOKEN_SHRINK], y[i], dy[i]);
#pragma unroll
        for (int o = 0; o < FUSED_N; o++)
            if (!IDENTITY) dy[i] = fmaf(c.next[o][i], dnext[o], dy[i]);
        if (IDENTITY) dy[i] += dnext[i];
        if (!FIRST) df = fmaf(c.post[i], dy[i], df);
    }
    return df;
}

typedef struct {
    float weight[2][2], dweight[2][2], dbias[2][2];
} StateChannels;                // a lane's, [q / 2][e]

// All of a tile that a warp does elementwise. y, dy and df go into the tile, in place of x, dnext and f; dy
// also into d.
template <bool IDENTITY, bool FIRST, int SLAB>
__device__ __forceinline__ void state_elements(unsigned char* stage, int piece,
                                               const uint32_t (&x)[FUSED_N][4], uint32_t (&d)[FUSED_N][4],
                                               const uint32_t (&f)[4], const uint32_t (&dln)[4],
                                               const float (&through)[FUSED_N][2][4],
                                               StateChannels& channels) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        StateCoefs c;
        state_coefs<IDENTITY, FIRST, SLAB>(c, stage, g + 8 * half);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int q = 2 * h + half;
            float y[2][FUSED_N], dy[2][FUSED_N], df[2];
            uint32_t pair[FUSED_N];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float xs[FUSED_N];
#pragma unroll
                for (int i = 0; i < FUSED_N; i++) xs[i] = half_of(x[i][q], e);
                state_mix<IDENTITY, FIRST>(y[e], xs, half_of(f[q], e), c);
            }
#pragma unroll
            for (int i = 0; i < FUSED_N; i++) pair[i] = FIRST ? x[i][q] : pack_bf16(y[0][i], y[1][i]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float dnext[FUSED_N], dout = half_of(dln[q], e);
#pragma unroll
                for (int i = 0; i < FUSED_N; i++) {
                    y[e][i] = half_of(pair[i], e);
                    dnext[i] = half_of(d[i][q], e);
                    dy[e][i] = through[i][h][2 * half + e];
                }
                df[e] = state_gradient<IDENTITY, FIRST>(dy[e], y[e], dnext, dout, channels.weight[h][e],
                                                        channels.dweight[h][e], c);
                channels.dbias[h][e] += dout;
            }
#pragma unroll
            for (int i = 0; i < FUSED_N; i++) {
                int at = piece_of<SLAB>(i * STATE_TOKENS + 8 * half + g, piece + h) + 4 * t;
                d[i][q] = pack_bf16(dy[0][i], dy[1][i]);
                if (!FIRST) *(uint32_t*)(stage + Tile::X + at) = pair[i];
                *(uint32_t*)(stage + Tile::D + at) = d[i][q];
            }
            int at = piece_of<SLAB>(8 * half + g, piece + h) + 4 * t;
            if (!FIRST) *(uint32_t*)(stage + Tile::F + at) = pack_bf16(df[0], df[1]);
        }
    }
}

// dy and df of a tile to memory, and the warps' parts of dpost | dres, added in their order
template <bool IDENTITY, bool FIRST, int SLAB>
__device__ __forceinline__ void state_store(const FusedStateBackward& b, const unsigned char* stage,
                                            const float* dcoef, size_t first, int slab) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    int token = threadIdx.x / Tile::PIECES, piece = threadIdx.x % Tile::PIECES, ch = slab * SLAB + piece * 8;
    size_t row = first + token;
    if (row < (size_t)b.rows && ch < b.C) {
#pragma unroll
        for (int i = 0; i < FUSED_N; i++)
            *(Piece*)(b.dy + (row * FUSED_N + i) * b.C + ch) =
                *(const Piece*)(stage + Tile::D + piece_of<SLAB>(i * STATE_TOKENS + token, piece));
        if (!FIRST)
            *(Piece*)(b.df + row * b.C + ch) =
                *(const Piece*)(stage + Tile::F + piece_of<SLAB>(token, piece));
    }
    int of = threadIdx.x % STATE_TOKENS, line = threadIdx.x / STATE_TOKENS;
    if (FIRST || line >= Tile::LINES || first + of >= (size_t)b.rows) return;
    float sum[FUSED_N] = {};
#pragma unroll
    for (int w = 0; w < Tile::WARPS; w++) {
        float part[FUSED_N];
        load_4(part, dcoef + ((w * STATE_TOKENS + of) * Tile::LINES + line) * FUSED_N);
#pragma unroll
        for (int e = 0; e < FUSED_N; e++) sum[e] += part[e];
    }
    store_4(b.dcoef + (((size_t)slab * Tile::LINES + line) * b.rows + first + of) * FUSED_N, sum);
}

// What a block has summed over its tokens
template <bool IDENTITY, int SLAB>
__device__ __forceinline__ void state_store_parts(
    float* parts, StateChannels& channels,
    const float (&dfn)[FUSED_N][StateTile<IDENTITY, SLAB>::OUTS / 8][4], int ch, int C) {
    constexpr int TILES = StateTile<IDENTITY, SLAB>::OUTS / 8;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++)
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int out = 8 * j + 2 * t + e % 2, at = ch + g + e / 2 * 8;
                if (at < C) parts[((size_t)out * FUSED_N + i) * C + at] = dfn[i][j][e];
            }
    parts += (size_t)TILES * 8 * FUSED_N * C;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float dweight = channels.dweight[h][e], dbias = channels.dbias[h][e];
            for (int distance = 4; distance < WARP; distance *= 2) {
                dweight += __shfl_xor_sync(ALL_LANES, dweight, distance);
                dbias += __shfl_xor_sync(ALL_LANES, dbias, distance);
            }
            int at = ch + 8 * h + 2 * t + e;
            if (g == 0 && at < C) parts[at] = dweight, parts[C + at] = dbias;
        }
}

template <bool IDENTITY, bool FIRST, int SLAB, int STAGES>
static __global__ void __launch_bounds__(2 * SLAB, SLAB == 64 ? 2 : 1)
    state_backward_fused_kernel(FusedStateBackward b) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    extern __shared__ __align__(128) unsigned char fused_shared[];
    uint32_t stages = (uint32_t)__cvta_generic_to_shared(fused_shared), fn = stages + STAGES * Tile::STAGE;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, piece = 2 * warp;
    float* dcoef = (float*)(fused_shared + STAGES * Tile::STAGE + Tile::FN);
    float* warp_dcoef = dcoef + warp * STATE_TOKENS * Tile::LINES * FUSED_N;
    int slabs = (b.C + SLAB - 1) / SLAB, slab = blockIdx.x % slabs, set = blockIdx.x / slabs;
    int tiles = (b.rows + STATE_TOKENS - 1) / STATE_TOKENS, first_channel = slab * SLAB + warp * 16;
    float dfn[FUSED_N][Tile::OUTS / 8][4] = {};
    StateChannels channels = {};
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int ch = first_channel + e / 2 * 8 + lane % 4 * 2 + e % 2;
        if (ch < b.C) channels.weight[e / 2][e % 2] = to_float(b.weight[ch]);
    }
    state_load_fn<IDENTITY, SLAB>(b, fn, slab);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        size_t next = (size_t)set + (size_t)s * b.sets;
        if (next < (size_t)tiles)
            state_load<IDENTITY, FIRST, SLAB>(b, stages + s * Tile::STAGE, next * STATE_TOKENS, slab);
        cp_async_commit();
    }
    for (int tile = set, at = 0, free = STAGES - 1; tile < tiles; tile += b.sets) {
        size_t next = (size_t)tile + (size_t)(STAGES - 1) * b.sets, first = (size_t)tile * STATE_TOKENS;
        unsigned char* stage = fused_shared + at * Tile::STAGE;
        uint32_t here = stages + at * Tile::STAGE;
        cp_async_wait<STAGES - 2>();
        __syncthreads();                        // the tile is there, the stage before it stored
        if (next < (size_t)tiles)
            state_load<IDENTITY, FIRST, SLAB>(b, stages + free * Tile::STAGE, next * STATE_TOKENS, slab);
        cp_async_commit();
        uint32_t x[FUSED_N][4], d[FUSED_N][4], f[4] = {}, dln[4];
        float through[FUSED_N][2][4] = {};
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) {
            ldmatrix_x4(x[i], fragment_at<SLAB>(here + Tile::X, i * STATE_TOKENS, piece, false));
            ldmatrix_x4(d[i], fragment_at<SLAB>(here + Tile::D, i * STATE_TOKENS, piece, false));
        }
        if (!FIRST) ldmatrix_x4(f, fragment_at<SLAB>(here + Tile::F, 0, piece, false));
        ldmatrix_x4(dln, fragment_at<SLAB>(here + Tile::DLN, 0, piece, false));
        state_project<IDENTITY, SLAB>(through, here + Tile::Z, fn, piece);
        __syncwarp();                           // what follows writes where others of the warp have read
        state_elements<IDENTITY, FIRST, SLAB>(stage, piece, x, d, f, dln, through, channels);
        __syncwarp();
        state_sum_fn<IDENTITY, SLAB>(dfn, here + Tile::X, here + Tile::Z, piece);
#pragma unroll
        for (int half = 0; half < 2 && !FIRST; half++) state_sum_coef<IDENTITY>(warp_dcoef, d, x, f, half);
        __syncthreads();                        // results are there
        state_store<IDENTITY, FIRST, SLAB>(b, stage, dcoef, first, slab);
        at = at + 1 == STAGES ? 0 : at + 1;
        free = free + 1 == STAGES ? 0 : free + 1;
    }
    cp_async_wait<0>();
    size_t stride = (size_t)(Tile::OUTS * FUSED_N + 2) * b.C;
    state_store_parts<IDENTITY, SLAB>(b.parts + set * stride, channels, dfn, first_channel, b.C);
}

// Sets of tiles: as many as fill so many multiprocessors at once
static int fused_sets(int rows, int C, int slab, int multiprocessors) {
    int blocks = multiprocessors * (slab == 64 ? 2 : 1), sets = blocks / ceil_div(C, slab);
    return max(1, min(sets, ceil_div(rows, STATE_TOKENS)));
}

template <bool IDENTITY, bool FIRST, int SLAB, int STAGES>
static void state_backward_stages(const FusedStateBackward* b, cudaStream_t stream) {
    typedef StateTile<IDENTITY, SLAB> Tile;
    constexpr int SHARED = Tile::shared(STAGES);
    auto state_backward = state_backward_fused_kernel<IDENTITY, FIRST, SLAB, STAGES>;
    CUDA(cudaFuncSetAttribute(state_backward, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    state_backward<<<ceil_div(b->C, SLAB) * b->sets, Tile::THREADS, SHARED, stream>>>(*b);
    LAUNCHED();
}
template <bool IDENTITY, bool FIRST, int SLAB>
static void state_backward_shape(const FusedStateBackward* b, int shared, cudaStream_t stream) {
    constexpr int STAGES = SLAB == 64 ? 2 : 3;  // with 64 channels two blocks a multiprocessor
    if (StateTile<false, SLAB>::shared(STAGES) <= shared)
        state_backward_stages<IDENTITY, FIRST, SLAB, STAGES>(b, stream);
    else state_backward_stages<IDENTITY, FIRST, SLAB, 2>(b, stream);
}
// SLAB: 64 or 128 channels a block; shared: bytes that a block may have at most on this device
template <int SLAB>
static void fused_state_backward_gpu(const FusedStateBackward* b, bool identity, int shared,
                                     cudaStream_t stream) {
    if (identity)
        b->f ? state_backward_shape<true, false, SLAB>(b, shared, stream)
             : state_backward_shape<true, true, SLAB>(b, shared, stream);
    else
        b->f ? state_backward_shape<false, false, SLAB>(b, shared, stream)
             : state_backward_shape<false, true, SLAB>(b, shared, stream);
}

// ------------------------------------------------------------------------------------------------
// Gradients of a connection's parameters += the sums of parts, in order: 8 lines of threads take them in
// turns, then are added.

typedef struct {
    float* to;                  // (cols)
    const float* parts;         // (count, stride), cols of it
    int count, cols, stride;
} PartSum;
typedef struct { PartSum of[5]; } PartSums;

enum { PART_LINES = 8 };

static __global__ void add_parts_kernel(PartSums sums) {
    __shared__ float lines[PART_LINES][WARP];
    int block = blockIdx.x, s = 0;
    while (block >= (sums.of[s].cols + WARP - 1) / WARP) block -= (sums.of[s++].cols + WARP - 1) / WARP;
    PartSum p = sums.of[s];
    int col = block * WARP + threadIdx.x;
    float sum = 0;
    for (int r = threadIdx.y; r < p.count && col < p.cols; r += PART_LINES)
        sum += p.parts[(size_t)r * p.stride + col];
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    for (int l = 1; l < PART_LINES && threadIdx.y == 0; l++) sum += lines[l][threadIdx.x];
    if (threadIdx.y == 0 && col < p.cols) p.to[col] += sum;
}
static void fused_add_parts_gpu(const PartSums* sums, cudaStream_t stream) {
    int blocks = 0;
    for (const PartSum& s : sums->of) blocks += ceil_div(s.cols, WARP);
    add_parts_kernel<<<blocks, dim3(WARP, PART_LINES), 0, stream>>>(*sums);
    LAUNCHED();
}
