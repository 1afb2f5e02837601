// mhc_fused.cuh: the connections of mhc and ihc with four streams in bf16, at what memory allows: a boundary
// between two sublayers moves n-wide states and computes little, so each number is read and written as few
// times as can be. The plain kernels of train_gpt_mhc.cu say what is computed; these agree with them to
// rounding, and where they do not fit (fused_fits) those serve.
//
//     forward    write_project    y = res x + post f, fn y, 1 / rms(y), pre and post      9 C numbers a token
//                sinkhorn_forward the mixing of the next write, meanwhile
//                read_layernorm   LayerNorm(pre y)                                         5 C
//
// Rounded to bf16, once each: y and LayerNorm(u) on the way forward. u = pre y never is, nor du.
// Assumes C % 8 == 0 and tensors that begin at multiples of 16 bytes. No float atomics; any number of rows.

enum { FUSED_N = 4, FUSED_COEFS = FUSED_N * FUSED_N + 2 * FUSED_N, FUSED_TOKENS = 128,
       FUSED_CHANNELS = 2560 };    // at most: read_layernorm keeps them in registers

// Whether these kernels serve a connection: of the modes of train_gpt_mhc.c, with learned maps, columns first.
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
    uint4 raw = __ldcs((const uint4*)from);
    Piece p = {{raw.x, raw.y, raw.z, raw.w}};
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
// places by the row, so that one piece of each of 8 rows is all 32 banks; tiles begin at multiples of 128 bytes.
__device__ __forceinline__ int piece_of_32(int row, int piece) {
    return row * 64 + ((piece ^ (row >> 1 & 3)) * 16);
}

// --- fn in two parts: rounded to bf16, and what that lost. A product with both is exact to 2^-17.

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

// Mixes this thread's piece of each stream, in place and in memory; returns the sum of the squares of y.
template <bool IDENTITY, bool WRITES>
__device__ __forceinline__ float write_mix(const FusedWrite& w, unsigned char* stage, size_t row, int first,
                                           const float (&res)[FUSED_N][FUSED_N], const float (&post)[FUSED_N]) {
    int token = threadIdx.x / WRITE_PIECES, piece = threadIdx.x % WRITE_PIECES, ch = first + piece * 8;
    Piece x[FUSED_N], f = {};
    float squares = 0;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++)
        x[i] = *(const Piece*)(stage + piece_of_32(i * WRITE_TOKENS + token, piece));
    if (WRITES) f = *(const Piece*)(stage + WriteTile<IDENTITY>::F + piece_of_32(token, piece));
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float low[FUSED_N], high[FUSED_N];
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) low[i] = low_half(x[i].pair[e]), high[i] = high_half(x[i].pair[e]);
#pragma unroll
        for (int i = 0; i < FUSED_N; i++) {
            uint32_t& y = x[i].pair[e];
            if (WRITES)
                y = pack_bf16(mixed<IDENTITY>(i, low, low_half(f.pair[e]), res, post),
                              mixed<IDENTITY>(i, high, high_half(f.pair[e]), res, post));
            squares = fmaf(low_half(y), low_half(y), squares);
            squares = fmaf(high_half(y), high_half(y), squares);
        }
    }
    if (!WRITES) return squares;
    bool present = row < (size_t)w.rows && ch < w.C;
#pragma unroll
    for (int i = 0; i < FUSED_N; i++) {
        *(Piece*)(stage + piece_of_32(i * WRITE_TOKENS + token, piece)) = x[i];
        if (present) *(Piece*)(w.y + (row * FUSED_N + i) * w.C + ch) = x[i];
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
    CUDA(cudaFuncSetAttribute(write_project_kernel<IDENTITY, WRITES, STAGES>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    write_project_kernel<IDENTITY, WRITES, STAGES>
        <<<ceil_div(w->rows, WRITE_TOKENS), WRITE_THREADS, SHARED, stream>>>(*w);
    LAUNCHED();
}
template <bool IDENTITY>
static void write_project_mode(const FusedWrite* w, bool three, cudaStream_t stream) {
    if (three) w->f ? write_project_stages<IDENTITY, true, 3>(w, stream)
                    : write_project_stages<IDENTITY, false, 3>(w, stream);
    else w->f ? write_project_stages<IDENTITY, true, 2>(w, stream)
              : write_project_stages<IDENTITY, false, 2>(w, stream);
}
// shared: bytes that a block may have at most on this device. Three stages where two such blocks fit, as on an
// H100 (227 KB), else two, as on an A100 (163 KB).
static void fused_write_project_gpu(const FusedWrite* w, bool identity, int shared, cudaStream_t stream) {
    bool three = 2 * WriteTile<false>::shared(3) <= shared;
    if (identity) write_project_mode<true>(w, three, stream);
    else write_project_mode<false>(w, three, stream);
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
    each_matrix_line(tile, tokens, [=](float* at, int t, int i) { *(float4*)at = *(float4*)(mix + place(t, i)); });
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
    each_matrix_line(tile, tokens, [=](float* at, int t, int i) { *(float4*)(coef + place(t, i)) = *(float4*)at; });
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
static __global__ void sinkhorn_backward_kernel(float* dlogit, const float* parts, int slabs, const float* coef,
                                                const float* mix, const float* base, const float* scale,
                                                int iters, int rows) {
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
        for (int l = 0; l < LINES; l++) store_4(fused_tokens + (thread * LINES + l) * FUSED_N, d + l * FUSED_N);
    __syncthreads();
    for (int e = thread; e < tokens * LINES; e += stride)
        *(float4*)(dlogit + (first * LINES + e) * FUSED_N) = *(float4*)(fused_tokens + e * FUSED_N);
}
// dlogit (rows, 20), in ihc (rows, 4); coef, mix (rows, M), base and scale are those of the sublayer that wrote
static void fused_sinkhorn_backward_gpu(float* dlogit, const float* parts, int slabs, const float* coef,
                                        const float* mix, const float* base, const float* scale, int iters,
                                        bool identity, int rows, cudaStream_t stream) {
    int threads = iters <= 32 ? 64 : 32, blocks = ceil_div(rows, threads);      // shared: at most 105 KB
    int line = threads * FUSED_N * (int)sizeof(float), shared = (1 + FUSED_N + 2 * iters) * line;
    CUDA(cudaFuncSetAttribute(sinkhorn_backward_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared));
    if (identity)
        sinkhorn_backward_kernel<true><<<blocks, threads, line, stream>>>(dlogit, parts, slabs, coef, mix, base,
                                                                          scale, iters, rows);
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
    float pre[FUSED_N], u[V][8], mean = 0, variance = 0;
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
            for (int i = 0; i < FUSED_N; i++) u[v][e] = fmaf(pre[i], half_of(x[i].pair[e / 2], e % 2), u[v][e]);
            mean += u[v][e];
        }
    }
    mean = warp_sum(mean) / C;
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            u[v][e] -= mean;
            if ((v * WARP + lane) * 8 < C) variance = fmaf(u[v][e], u[v][e], variance);
        }
    float rstd = 1 / sqrtf(warp_sum(variance) / C + 1e-5f);
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
#define READ(V)                                                                                               \
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
