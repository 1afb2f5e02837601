// common.h: errors, memory and hashing, shared by everything that reads, writes or trains.
//
// Bad input never stops a function in this project: it returns false and leaves one line in an Error
// ("what was found, what was expected, what to do"); only main prints that line and ends with status 2.
// assert is for our own mistakes.

#ifndef HOST_COMMON_H
#define HOST_COMMON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STATUS_DONE = 0, STATUS_USAGE = 2, STATUS_NONFINITE = 3, STATUS_SAVE_FAILED = 4, STATUS_STALLED = 75 };

typedef struct { char text[1024]; } Error;

#if defined(__GNUC__)
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

// Writes the line into e and returns false, so that a caller can `return fail(e, ...)`.
PRINTF_LIKE(2, 3) static inline bool fail(Error* e, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(e->text, sizeof e->text, format, arguments);
    va_end(arguments);
    return false;
}

// One line on stderr, then the end. For main and for what cannot go on (no memory).
PRINTF_LIKE(1, 2) static inline void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(STATUS_USAGE);
}

// Zeroed memory that free() releases; ends the program when there is none.
static inline void* allocate(size_t count, size_t size) {
    void* memory = calloc(count ? count : 1, size);
    if (!memory) die("out of memory: %zu bytes asked for, reduce --batch, --seq or the model", count * size);
    return memory;
}

// A bijection on 64 bits in which every input bit moves every output bit (the finaliser of splitmix64).
static inline uint64_t mix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// The random function of everything that must not depend on order: same (seed, index), same number.
static inline uint64_t hash64(uint64_t seed, uint64_t index) { return mix64(mix64(seed) ^ index); }

#endif
