// bench.c: how fast the CPU reference is: matrix products against the machine's peak, and whole training
// steps of each residual mode against plain, all in one run, side by side. Medians; the rounds go through all
// modes in turn, so that a noisy machine disturbs each alike.
//     ./bench [rounds] [layers width heads seq batch]

#define TESTING
#include "../train_gpt_mhc.c"

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

static double median(double* values, int count) {
    qsort(values, (size_t)count, sizeof(double), compare_doubles);
    return values[count / 2];
}

// ------------------------------------------------------------------------------------------------
// Matrix products

// GFLOP/s of one product, median of rounds
static double time_matmul(real* out, Matrix a, Matrix b, int M, int N, int K, int rounds) {
    double* rates = (double*)allocate((size_t)rounds, sizeof(double));
    for (int r = 0; r < rounds; r++) {
        double start = seconds();
        matmul(out, (size_t)N, a, b, M, N, K, NULL, false);
        rates[r] = 2e-9 * M * N * K / (seconds() - start);
    }
    double rate = median(rates, rounds);
    free(rates);
    return rate;
}

// The products of a linear layer (rows, C) x (C, 3C): forward, input gradient, weight gradient
static void bench_matmul(int rows, int C, int rounds, double peak) {
    int N = 3 * C;
    size_t S = (size_t)C, L = (size_t)N;
    real *in = (real*)allocate((size_t)rows * S, sizeof(real)),
         *weight = (real*)allocate(L * S, sizeof(real));
    real* out = (real*)allocate((size_t)rows * L, sizeof(real));
    for (size_t i = 0; i < (size_t)rows * S; i++) in[i] = (real)normal(1, i);
    for (size_t i = 0; i < L * S; i++) weight[i] = (real)normal(2, i);
    double nt = time_matmul(out, matrix(in, S, 1), matrix(weight, 1, S), rows, N, C, rounds);
    double nn = time_matmul(in, matrix(out, L, 1), matrix(weight, S, 1), rows, C, N, rounds);
    double tn = time_matmul(weight, matrix(out, 1, L), matrix(in, S, 1), N, C, rows, rounds);
    printf("  %4d x %4d x %4d   %6.1f %6.1f %6.1f   %3.0f %3.0f %3.0f %%\n", rows, C, N, nt, nn, tn,
           100e9 * nt / peak, 100e9 * nn / peak, 100e9 * tn / peak);
    free(in);
    free(weight);
    free(out);
}

// ------------------------------------------------------------------------------------------------
// Training steps

typedef struct { Run run; const char* name; double* times; } Arm;

static void arm_open(Arm* arm, int residual, const char* name, const Options* shape, int rounds) {
    Error e;
    arm->name = name;
    arm->times = (double*)allocate((size_t)rounds, sizeof(double));
    arm->run.o = *shape;
    arm->run.o.residual = residual;
    arm->run.training = true;
    if (!open_data(&arm->run, &e)) die("%s", e.text);
    arm->run.c = config_of(&arm->run.o);
    if (!allocate_run(&arm->run, &e)) die("%s", e.text);
}

static void bench_steps(const Options* shape, int rounds, double peak) {
    static Arm arms[5];
    const int modes[] = {RESIDUAL_PLAIN, RESIDUAL_HC, RESIDUAL_MHC, RESIDUAL_IHC, RESIDUAL_NONE};
    const char* const names[] = {"plain", "hc", "mhc", "ihc", "none"};
    StepReport report;
    Error e;
    double tokens = (double)shape->batch * (double)shape->seq, plain = 0;
    for (int m = 0; m < 5; m++) arm_open(&arms[m], modes[m], names[m], shape, rounds);
    for (int r = -1; r < rounds; r++)           // the first round warms up
        for (int m = 0; m < 5; m++) {
            if (!train_step(&arms[m].run, &report, &e)) die("%s", e.text);
            if (r >= 0) arms[m].times[r] = report.seconds;
        }
    printf("%ld blocks, width %ld, context %ld, batch %ld:\n", shape->layers, shape->width, shape->seq,
           shape->batch);
    for (int m = 0; m < 5; m++) {
        double time = median(arms[m].times, rounds),
               rate = flops_per_token(&arms[m].run.model, (int)shape->seq) * tokens / time;
        if (m == 0) plain = time;
        printf("  %-6s %8.1f ms %9.0f tok/s %7.1f GFLOP/s %4.0f %% of peak   %.2f x plain\n", arms[m].name,
               1e3 * time, tokens / time, 1e-9 * rate, 100 * rate / peak, time / plain);
    }
    for (int m = 0; m < 5; m++) {
        close_run(&arms[m].run);
        memset(&arms[m].run, 0, sizeof arms[m].run);
        free(arms[m].times);
    }
}

int main(int argc, char** argv) {
    static Options o;
    wait_briefly(argv);
    int rounds = argc > 1 ? atoi(argv[1]) : 15;
    const long shapes[][5] = {
        {4, 128, 4, 64, 12}, {4, 384, 6, 128, 4}, {2, 768, 12, 64, 4}}; // layers width heads seq batch
    if (rounds < 1 || (argc > 2 && argc != 7))
        die("bench: found %d arguments, expected [rounds [layers width heads seq batch]]", argc - 1);
    double peak = measure_peak();
    printf("%s, %d threads, measured peak %.0f GFLOP/s\nmatrix products, GFLOP/s: forward, input gradient, "
           "weight gradient\n",
           cpu_name(), thread_count(), 1e-9 * peak);
    for (int C = 128; argc < 3 && C <= 1024; C *= 2)
        bench_matmul(1024, C == 1024 ? 768 : C, 2 * rounds, peak);
    for (int s = 0; s < (argc > 2 ? 1 : 3); s++) {
        long shape[5];
        for (int i = 0; i < 5; i++) shape[i] = argc > 2 ? atol(argv[2 + i]) : shapes[s][i];
        options_defaults(&o);
        o.layers = shape[0], o.width = shape[1], o.heads = shape[2], o.seq = shape[3], o.batch = shape[4];
        bench_steps(&o, rounds, peak);
    }
    return 0;
}
