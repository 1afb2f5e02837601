// test_planner.c: the planner against sums by hand, published sizes of models, and all ways to split one.

#include <time.h>

#include "check.h"
#include "planner.h"

static bool near(double a, double b) { return fabs(a - b) <= 1e-12 * fabs(b); }

// Two blocks whose F is 13 MFLOP a micro-batch, I 14, W 12; the head's F 10, I 20. A second is 13 MFLOP.
static PlannerInput small(int kind, int P, int M) {
    PlannerInput in = {kind, P, M, 1, 2, 100, 1, 2, 50, 1000, 1, 4, 0, 0, 0, 0, 0, 0, 13e-6, 1, 0, NULL};
    return in;
}

static void test_sizes(void) {
    static const struct { const char* name; double all, all_digit, met, met_digit; } published[] = {
        {"paper-3b", 2.97e9, 1e7, 612e6, 1e6}, {"paper-9b", 9.18e9, 1e7, 1.66e9, 1e7},
        {"paper-27b", 27.0e9, 1e8, 4.14e9, 1e7}};
    PlannerInput in = small(PIPELINE_NONE, 1, 1);
    in.L = 12, in.C = 768, in.T = 1024, in.V = 50257;
    check(planner_parameters(&in, false) == 124439808, "GPT-2 has 124439808 parameters");
    for (int k = 0; k < 3; k++) {
        PlannerInput paper = in;
        bool known = planner_preset(published[k].name, &paper);
        double all = planner_parameters(&paper, false), met = planner_parameters(&paper, true);
        check(known && fabs(all - published[k].all) <= published[k].all_digit / 2
              && fabs(met - published[k].met) <= published[k].met_digit / 2,
              "%s: %.4g parameters, a token meets %.4g, to the last digit published", published[k].name, all,
              met);
    }
    check(!planner_preset("paper-4b", &in), "no other model is known");
    planner_preset("paper-3b", &in);
    PlannerBlock b = planner_block(&in, false);
    check(b.attention == 2 * 4096 * 16 * (192 + 128)
          && b.kept == 6 * 1280 + 4 * 24 + 2 * 16 * 192 + 576 + 2 * 16 * 128 + 16 + 3 * 896 * 8,
          "a block of paper-3b: scores over 192, sums over 128 channels, %g values kept", b.kept);
}

static void test_time(void) {
    static const int layers[] = {1, 1};
    PlannerInput in = small(PIPELINE_1F1B, 2, 1);
    in.layers = layers;
    in.link_gbs = 4e-5;                                 // 50 * 100 * 4 bytes in half a second
    Planner p = planner_open(&in);
    double message = planner_message(&in, 1, in.link_gbs), span = planner_span(&p, message);
    check(near(message, 0.5) && near(span, (13 + 13 + 10 + 20 + 26 + 26) / 13.0 + 2 * 0.5),
          "two ranks, one micro-batch: every stage in turn and two messages, %.4f s", span);
    check(near(p.busy[0], 3) && near(p.busy[1], 69 / 13.0)
          && near(planner_part(&p, span), 108 / 13.0 / (2 * span)), "ranks work 3 and 69/13 s of it");
    planner_close(&p);
    in.n = 4, in.B = 4, in.T = 1024, in.C = 768, in.bytes = 2;
    check(near(planner_message(&in, 4, 1) * 1e9, 25165824), "4 x 4 x 1024 x 768 x 2 bytes are 25165824");
    in.link_gbs = 1, in.tflops = 312;
    p = planner_open(&in);
    double needed = planner_link_needed(&p), free_span = planner_span(&p, 0);
    check(planner_span(&p, planner_message(&in, 4, needed)) <= 1.01 * free_span
          && planner_span(&p, planner_message(&in, 4, needed / 1.01)) > 1.01 * free_span,
          "messages are hidden from %.4g GB/s on", needed);
    planner_close(&p);
}

// FLOP a token: 6 for a weight of a matrix, 12 C T a block for attention, and the connections' own.
static void test_flop(void) {
    PlannerInput in = small(PIPELINE_NONE, 1, 3);
    in.n = 4;
    Planner p = planner_open(&in);
    double block = 6 * (12e4 + 2 * 24 * 400) + 12 * 100 * 50 + 2 * 6 * 24 * 100;
    check(near(p.work[0] * 13e6, 3 * 50 * (2 * block + 6e5)), "3 micro-batches with connections: %.0f FLOP",
          p.work[0] * 13e6);
    double work = p.work[0];
    planner_close(&p);
    in.kind = PIPELINE_DUALPIPEV;
    static const int layers[] = {2, 0};
    in.layers = layers;
    p = planner_open(&in);
    check(fabs((p.work[0] - work) * 13e6 - 3 * 50 * 3 * 2 * 5 * 400) < 1e-3,
          "a stage of 4 sublayers writes the streams of 3 again");
    planner_close(&p);
}

static void test_memory(void) {
    PlannerInput in = small(PIPELINE_NONE, 1, 4);
    Planner p = planner_open(&in);
    PlannerMemory m = planner_memory(&p, 0);
    check(m.parameters == 347800 && m.state == 16 * 347800 + 400000,
          "2 x (12 C C + 13 C) + (V + T + 2) C parameters, 16 bytes each, two gradients of the head");
    check(m.kept == 200 * (4 * 100 + 2 * 1802) && m.buffers == 200 * (1000 + 5 * 100),
          "a token keeps 4 streams and twice 18 C + 2, logits and 5 streams are shared");
    planner_close(&p);
    in = small(PIPELINE_1F1B, 2, 8);
    p = planner_open(&in);
    check(planner_memory(&p, 1).parameters == 121300 * p.layers[1] + 200 + 100000, "1f1b has two heads");
    planner_close(&p);
    in = small(PIPELINE_DUALPIPEV, 2, 8);
    in.bytes = 2, in.D = 4;
    static const int layers[] = {1, 0, 1, 0};
    in.layers = layers;
    p = planner_open(&in);
    m = planner_memory(&p, 0);
    check(m.parameters == 121300 + 105200 && m.state == m.parameters * (2 + 4 + 4 + 2) + 400000,
          "bf16: weights, masters, gradients, moments by four replicas");
    check(m.kept == 100 * (4 * (100 + 1802) + 100) && m.buffers == 100 * (1000 + (7 + 3) * 100),
          "4 slots of stage 0, 1 of stage 3; 4 messages of one, 3 of the other, 3 streams at work");
    planner_close(&p);
}

// ------------------------------------------------------------------------------------------------

static void every_split(Planner* p, int k, int left, double* best) {
    if (k < p->stages - 1) {
        for (p->layers[k] = 0; p->layers[k] <= left; p->layers[k]++)
            every_split(p, k + 1, left - p->layers[k], best);
        return;
    }
    p->layers[k] = left;
    planner_costs(p);
    double message = planner_message(&p->in, p->in.n, p->in.link_gbs);
    if (p->most_work < *best) *best = fmin(*best, planner_span(p, message));
}

static void test_splits(void) {
    static const struct { int kind, P, M, L, C, V; } cases[] = {
        {PIPELINE_DUALPIPEV, 2, 16, 12, 768, 50257}, {PIPELINE_DUALPIPEV, 3, 12, 12, 768, 50257},
        {PIPELINE_1F1B, 4, 16, 12, 768, 50257},      {PIPELINE_DUALPIPE, 4, 16, 12, 768, 50257},
        {PIPELINE_DUALPIPEV, 4, 8, 6, 768, 256},     {PIPELINE_DUALPIPEV, 2, 3, 7, 128, 256}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        for (int link = 0; link <= 25; link += 25) {
            PlannerInput in = small(cases[k].kind, cases[k].P, cases[k].M);
            in.L = cases[k].L, in.C = cases[k].C, in.V = cases[k].V, in.T = 1024;
            in.n = 4, in.tflops = 100, in.link_gbs = link;
            Planner p = planner_open(&in);
            double best = INFINITY, found = planner_span(&p, planner_message(&in, 4, link));
            every_split(&p, 0, in.L, &best);
            check(found <= best * (1 + 1e-9), "%d stages, %d blocks, V %d, %d GB/s: %.4g ms is the least",
                  p.stages, in.L, in.V, link, 1e3 * found);
            planner_close(&p);
        }
}

// 128 micro-batches on 128 ranks are just simulated, 129 estimated; messages take up to 8 times a stage's F.
static void test_estimate(void) {
    static const double messages[] = {0, 0.25, 8};
    for (int kind = PIPELINE_1F1B; kind <= PIPELINE_DUALPIPE; kind++) {
        PlannerInput in = small(kind, 128, 128), more = small(kind, 128, 129);
        in.L = more.L = kind == PIPELINE_DUALPIPEV ? 256 : 128, in.V = more.V = 1;
        Planner p = planner_open(&in), q = planner_open(&more);
        for (int i = 0; i < 3; i++) {
            double simulated = planner_span(&p, messages[i]), estimated = planner_span(&q, messages[i]);
            check(planner_exact(&p) && !planner_exact(&q) && fabs(estimated / simulated - 1) < 0.01,
                  "128 ranks, messages of %g s: simulated %.1f s, a little more estimated %.1f s",
                  messages[i], simulated, estimated);
        }
        planner_close(&p);
        planner_close(&q);
    }
}

static void test_page(void) {
    static char text[65536];
    PlannerInput in = small(PIPELINE_DUALPIPEV, 8, 32);
    planner_preset("paper-27b", &in);
    in.bytes = 2, in.link_gbs = 50, in.tflops = 312, in.efficiency = 0.4;
    FILE* file = fmemopen(text, sizeof text, "w");
    planner_print(file, &in);
    fclose(file);
    check(strstr(text, "boundary: 83.89 MB, 1.678 ms a message") && strstr(text, "dualpipe  4 streams")
          && strstr(text, "\n     7 "), "a page for 8 ranks: 4 x 4096 x 2560 values of 2 bytes, 50 GB/s");
    clock_t start = clock();
    in.P = 4096, in.M = 16384;
    file = fmemopen(text, sizeof text, "w");
    planner_print(file, &in);
    fclose(file);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    check(strstr(text, "estimated") && strstr(text, "\n  4095 ") && seconds < 2,
          "a page for 4096 ranks takes %.2f s", seconds);
}

int main(void) {
    test_sizes();
    test_time();
    test_flop();
    test_memory();
    test_splits();
    test_estimate();
    test_page();
    return check_summary();
}
