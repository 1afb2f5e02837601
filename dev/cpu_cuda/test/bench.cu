// bench.cu: what the runtime's own work costs. CPU_CUDA=threads=1 ./bench
#include <time.h>

#include "test.h"

__global__ void barriers(int* out, int count) {
    for (int i = 0; i < count; i++) __syncthreads();
    if (threadIdx.x == 0) *out = count;
}
__global__ void shuffles(int* out, int count) {
    unsigned value = threadIdx.x;
    for (int i = 0; i < count; i++) value += __shfl_xor_sync(0xffffffffu, value, 1);
    if (threadIdx.x == 0) *out = value;
}
__global__ void nothing(int* out, int count) {
    if (count < 0) *out = threadIdx.x;
}

// Nanoseconds of processor time for each of `parts` parts of a launch; the best of five.
static double nanoseconds(void (*kernel)(int*, int), int grid, int block, int* out, int count, double parts) {
    double best = 1e30;
    for (int i = 0; i < 5; i++) {
        clock_t begin = clock();
        for (int launch = 0; launch < 20; launch++) kernel<<<grid, block>>>(out, count);
        OK(cudaDeviceSynchronize());
        double each = (double)(clock() - begin) / CLOCKS_PER_SEC * 1e9 / 20 / parts;
        if (each < best) best = each;
    }
    return best;
}

int main(void) {
    int *out, n = 200;
    OK(cudaMalloc(&out, sizeof *out));
    for (int b = 32; b <= 1024; b *= 2)
        printf("block of %4d: barrier %5.1f ns a thread, shuffle %5.1f ns a lane\n", b,
               nanoseconds(barriers, 1, b, out, n, n * b), nanoseconds(shuffles, 1, b, out, n, n * b));
    printf("thread %.1f ns, launch %.0f ns\n", nanoseconds(nothing, 1000, 256, out, 0, 256000),
           nanoseconds(nothing, 1, 1, out, 0, 1));
}
