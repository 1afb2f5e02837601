// test.h: what the tests here share. They are plain CUDA and run on a GPU too.

#pragma once

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int passed, failed;

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (condition) {                                                        \
            passed++;                                                           \
        } else {                                                                \
            failed++;                                                           \
            printf("FAIL %s:%d: %s\n", __FILE__, __LINE__, #condition);         \
        }                                                                       \
    } while (0)

// A call that must succeed for the test to mean anything.
#define OK(call)                                                                            \
    do {                                                                                    \
        cudaError_t ok_error = (call);                                                      \
        if (ok_error != cudaSuccess) {                                                      \
            printf("FAIL %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(ok_error)); \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

static inline int finish(void) {
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

// ------------------------------------------------------------------------------------------------
// Programs of planted mistakes: one case a run, by name.

typedef struct {
    const char* name;
    void (*run)(void);
} Case;

static inline int run_case(const Case* cases, int count, int argc, char** argv) {
    for (int i = 0; argc == 2 && i < count; i++) {
        if (strcmp(argv[1], cases[i].name) != 0) continue;
        cases[i].run();
        OK(cudaDeviceSynchronize());
        return 0;
    }
    fprintf(stderr, "found no case %s, expected one of:", argc == 2 ? argv[1] : "");
    for (int i = 0; i < count; i++) fprintf(stderr, " %s", cases[i].name);
    fprintf(stderr, "\n");
    return 2;
}
#define RUN_CASE(cases, argc, argv) run_case(cases, (int)(sizeof(cases) / sizeof(cases[0])), argc, argv)

// A result that tells that a mistake showed itself.
static inline void expect(bool right) {
    if (right) return;
    fprintf(stderr, "wrong result\n");
    exit(1);
}
