// gains.h: gains and streams, what the paper's figures show. In double; a pass of its own, not part of
// training. Included by train_gpt_mhc.c where Config and StreamStats are known.

#ifndef HOST_GAINS_H
#define HOST_GAINS_H

typedef struct { double forward_max, forward_min, backward_max, backward_min; } Gain;
enum { GAIN_FIELDS = sizeof(Gain) / sizeof(double) };

// g += those of G (n, n): the largest and smallest |row sum| (what the signal is
// multiplied by) and |column sum| (the gradient)
static void gain_add(Gain* g, const double* G, int n, double weight) {
    Gain one = {0, INFINITY, 0, INFINITY};
    for (int i = 0; i < n; i++) {
        double row = 0, column = 0;
        for (int j = 0; j < n; j++) {
            row += G[i * n + j];
            column += G[j * n + i];
        }
        one.forward_max = fmax(one.forward_max, fabs(row));
        one.forward_min = fmin(one.forward_min, fabs(row));
        one.backward_max = fmax(one.backward_max, fabs(column));
        one.backward_min = fmin(one.backward_min, fabs(column));
    }
    g->forward_max += weight * one.forward_max;
    g->forward_min += weight * one.forward_min;
    g->backward_max += weight * one.backward_max;
    g->backward_min += weight * one.backward_min;
}

// R (T, n, n) of a sublayer: what of the residual connection goes past F. coef (T, n*n + 2n)
static void residual_mappings(double* R, const Config* c, const real* coef, int T) {
    int n = c->n, count = coefficient_count(c);
    for (int t = 0; t < T; t++)
        for (int e = 0; e < n * n; e++)
            R[t * n * n + e] = !has_connections(c)
                                   ? c->residual == RESIDUAL_PLAIN
                                   : (double)coef[(size_t)t * (size_t)count + (size_t)(2 * n + e)];
}

// single[k]: gains of sublayer k's R; composite[k]: of R_{2L-1} .. R_k. Means over T tokens; mappings (2L, T,
// n, n).
static void model_gains(Gain* single, Gain* composite, const Config* c, const double* mappings, int T) {
    int n = c->n, last = 2 * c->L - 1;
    memset(single, 0, sizeof(Gain) * (size_t)(last + 1));
    memset(composite, 0, sizeof(Gain) * (size_t)(last + 1));
    for (int t = 0; t < T; t++) {
        double product[MAX_N * MAX_N], next[MAX_N * MAX_N];
        for (int k = last; k >= 0; k--) {
            const double* R = mappings + ((size_t)k * (size_t)T + (size_t)t) * (size_t)(n * n);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < n; j++) {
                    next[i * n + j] = k == last ? R[i * n + j] : 0;
                    for (int h = 0; k < last && h < n; h++)
                        next[i * n + j] += product[i * n + h] * R[h * n + j];
                }
            memcpy(product, next, sizeof product);
            gain_add(&single[k], R, n, 1.0 / T);
            gain_add(&composite[k], product, n, 1.0 / T);
        }
    }
}

// Eigenvalues of the symmetric S (n, n), on its diagonal afterwards:
// Jacobi's rotations until nothing is off it.
static void eigenvalues(double* S, int n) {
    for (int sweep = 0; sweep < 30; sweep++)
        for (int p = 0; p < n; p++)
            for (int q = p + 1; q < n; q++) {
                if (fabs(S[p * n + q]) < 1e-300) continue;
                double theta = (S[q * n + q] - S[p * n + p]) / (2 * S[p * n + q]);
                double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                double cosine = 1 / sqrt(t * t + 1), sine = t * cosine;
                for (int i = 0; i < n; i++) {
                    double x = S[i * n + p], y = S[i * n + q];
                    S[i * n + p] = cosine * x - sine * y;
                    S[i * n + q] = sine * x + cosine * y;
                }
                for (int i = 0; i < n; i++) {
                    double x = S[p * n + i], y = S[q * n + i];
                    S[p * n + i] = cosine * x - sine * y;
                    S[q * n + i] = sine * x + cosine * y;
                }
            }
}

// exp of the entropy of the singular values: how many directions the n streams really span.
// gram (n, n) = x x^T
static double effective_rank(double* gram, int n) {
    double sum = 0, entropy = 0;
    eigenvalues(gram, n);
    for (int i = 0; i < n; i++) sum += sqrt(fmax(gram[i * n + i], 0));
    for (int i = 0; i < n; i++) {
        double p = sqrt(fmax(gram[i * n + i], 0)) / sum;
        if (p > 0) entropy -= p * log(p);
    }
    return exp(entropy);
}

// Means over the rows of state (rows, n, C)
static void stream_statistics(StreamStats* s, const real* state, int rows, int n, int C) {
    memset(s, 0, sizeof *s);
    for (int r = 0; r < rows; r++) {
        double gram[MAX_N * MAX_N], trace = 0, cosine = 0;
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++)
                gram[i * n + j] = (double)dot(row_of(state, r * n + i, C), row_of(state, r * n + j, C), C);
        for (int i = 0; i < n; i++) trace += gram[i * n + i];
        for (int i = 0; i < n; i++) {
            s->share[i] += gram[i * n + i] / trace / rows;
            for (int j = 0; j < i; j++) cosine += gram[i * n + j] / sqrt(gram[i * n + i] * gram[j * n + j]);
        }
        s->cosine += (n > 1 ? cosine / (n * (n - 1) / 2) : 1) / rows;
        s->rank += effective_rank(gram, n) / rows;
    }
}

#endif
