// test_profile.cu: kernels of known answers. Here they only run; profile.py reads the table that is printed.
//
//     // PROFILE kernel: column value, ...     what its row must hold, asked/distinct or asked/fewest

#include "test.h"

static constexpr int N = 1024;

// PROFILE copy: launches 2, read 8192/8192, written 8192/8192, sectors 512/512, passes 0/0, barriers 0
__global__ void copy(float* out, const float* in) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    out[i] = in[i];
}

// PROFILE copy_tail: read 4000/4000, written 4000/4000, sectors 250/250
__global__ void copy_tail(float* out, const float* in, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[i];
}

// A warp's 32 floats begin in the middle of a sector and touch five.
// PROFILE copy_shifted: read 3968/3968, written 3968/3968, sectors 279/248
__global__ void copy_shifted(float* out, const float* in) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < N - 32) out[i] = in[i + 1];
}

// PROFILE copy_strided: read 512/512, written 512/512, sectors 144/32
__global__ void copy_strided(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x * 8]; }

// PROFILE copy_vector: read 4096/4096, written 4096/4096, sectors 256/256
__global__ void copy_vector(float4* out, const float4* in) { out[threadIdx.x] = in[threadIdx.x]; }

// PROFILE broadcast: read 512/4, written 512/512, sectors 20/20
__global__ void broadcast(float* out, const float* in) { out[threadIdx.x] = *in; }

// Lanes leave the loop at different times; a request is what they do in the same round.
// PROFILE loop: read 160/160, written 160/160, sectors 10/10
__global__ void loop(float* out, const float* in) {
    for (int i = (int)threadIdx.x; i < 40; i += 32) out[i] = in[i];
}

template <int COLUMNS>
__device__ void transpose_tile(float* out, const float* in) {
    __shared__ float tile[32][COLUMNS];
    for (int y = (int)threadIdx.y; y < 32; y += 8) tile[y][threadIdx.x] = in[y * 32 + (int)threadIdx.x];
    __syncthreads();
    for (int y = (int)threadIdx.y; y < 32; y += 8) out[y * 32 + (int)threadIdx.x] = tile[threadIdx.x][y];
}

// PROFILE transpose: read 4096/4096, written 4096/4096, sectors 256/256, passes 1056/64, barriers 1
__global__ void transpose(float* out, const float* in) { transpose_tile<32>(out, in); }
// PROFILE transpose_padded: read 4096/4096, sectors 256/256, passes 64/64, barriers 1
__global__ void transpose_padded(float* out, const float* in) { transpose_tile<33>(out, in); }

// Vectors of 8 and 16 bytes take two and four passes without conflicts, twice that at a stride of two.
// PROFILE shared_vectors: passes 16/12
__global__ void shared_vectors(float* out) {
    __shared__ float2 pairs[32];
    __shared__ float4 quads[64];
    pairs[threadIdx.x] = make_float2(1, 2);
    quads[2 * threadIdx.x] = make_float4(1, 2, 3, 4);
    __syncwarp();
    float2 pair = pairs[threadIdx.x ^ 1];
    float4 quad = quads[32 + (threadIdx.x & 30)];
    *(float4*)(out + 4 * threadIdx.x) = make_float4(pair.x, pair.y, quad.x, quad.y);
}

// A tile of 32 rows of 64 bfloat16: cp.async fills it, ldmatrix reads the first 8 columns of all rows.
// Rows are 128 bytes apart, the same 4 banks; with columns exchanged by row they are not.
template <bool swizzled>
__device__ void matrix_tile(unsigned* out, const unsigned* in) {
    __shared__ __align__(16) unsigned tile[32][32];
    int lane = (int)threadIdx.x;
    for (int i = 0; i < 8; i++) {
        int row = i * 4 + lane / 8, column = lane % 8;
        int place = swizzled ? column ^ row % 8 : column;
        unsigned to = (unsigned)__cvta_generic_to_shared(&tile[row][4 * place]);
        const unsigned* from = in + row * 32 + column * 4;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    unsigned r[4], from = (unsigned)__cvta_generic_to_shared(&tile[lane][4 * (swizzled ? lane % 8 : 0)]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
    for (int i = 0; i < 4; i++) out[i * 32 + lane] = r[i];
}

// PROFILE ldmatrix: read 4096/4096, written 512/512, sectors 144/144, passes 64/36, barriers 1, cp.async 4096
__global__ void ldmatrix(unsigned* out, const unsigned* in) { matrix_tile<false>(out, in); }
// PROFILE ldmatrix_swizzled: read 4096/4096, passes 36/36, cp.async 4096
__global__ void ldmatrix_swizzled(unsigned* out, const unsigned* in) { matrix_tile<true>(out, in); }

// PROFILE multiply: mma 8, atomics 1024, barriers 8
__global__ void multiply(float* sum) {
    float d[4] = {1, 2, 3, 4};
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(0u));
    for (int i = 0; i < 4; i++) atomicAdd(sum + i, d[i]);
    __syncthreads();
    __syncthreads();
}

int main() {
    float *in, *out, host[N];
    OK(cudaMalloc(&in, N * sizeof *in));
    OK(cudaMalloc(&out, N * sizeof *out));
    for (int i = 0; i < N; i++) host[i] = (float)i;
    OK(cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice));
    OK(cudaMemset(out, 0, sizeof host));
    copy<<<8, 128>>>(out, in);
    copy<<<4, 256>>>(out, in);
    copy_tail<<<8, 128>>>(out, in, 1000);
    copy_shifted<<<8, 128>>>(out, in);
    copy_strided<<<1, 128>>>(out, in);
    copy_vector<<<1, 256>>>((float4*)out, (const float4*)in);
    broadcast<<<1, 128>>>(out, in);
    loop<<<1, 32>>>(out, in);
    shared_vectors<<<1, 32>>>(out);
    ldmatrix<<<1, 32>>>((unsigned*)out, (const unsigned*)in);
    ldmatrix_swizzled<<<1, 32>>>((unsigned*)out, (const unsigned*)in);
    OK(cudaMemcpy(host, out, 512, cudaMemcpyDeviceToHost));
    CHECK(host[1] == 1 && host[4] == 32 && host[127] == 995);
    OK(cudaMemset(out, 0, sizeof host));
    multiply<<<4, 64>>>(out);
    OK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
    CHECK(host[0] == 256 && host[3] == 1024);
    transpose<<<1, dim3(32, 8)>>>(out, in);
    transpose_padded<<<1, dim3(32, 8)>>>(out, in);
    OK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
    CHECK(host[1] == 32 && host[32] == 1 && host[N - 2] == N - 33);
    return finish();
}
