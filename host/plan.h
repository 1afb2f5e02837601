// plan.h: memory that is planned before it is taken. Everything large is carved from one Arena, by code that
// runs twice: first without memory, which only counts and is the plan; then with it.

#ifndef HOST_PLAN_H
#define HOST_PLAN_H

#include <unistd.h>

#include "common.h"

enum { PLAN_ROWS = 32, CARVE_ALIGN = 64 };

typedef struct { const char* what; size_t bytes; } PlanRow;

typedef struct {
    char* memory;               // NULL: count only
    size_t used;
    PlanRow rows[PLAN_ROWS];
    int row_count;
} Arena;

// Books bytes under a heading; equal headings add up.
static inline void plan_add(Arena* arena, const char* what, size_t bytes) {
    int r = 0;
    if (!bytes) return;
    while (r < arena->row_count && strcmp(arena->rows[r].what, what)) r++;
    if (r == PLAN_ROWS) die("plan: found more than %d headings, expected fewer", PLAN_ROWS);
    arena->rows[r].what = what;
    arena->rows[r].bytes += bytes;
    if (r == arena->row_count) arena->row_count++;
}

// The next `count` values of `size` bytes; NULL while only counting.
static inline void* plan_carve(Arena* arena, const char* what, size_t count, size_t size) {
    size_t bytes = (count * size + CARVE_ALIGN - 1) / CARVE_ALIGN * CARVE_ALIGN;
    void* start = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += bytes;
    plan_add(arena, what, bytes);
    return start;
}

// Turns what has been counted into zeroed memory; the same calls of plan_carve again hand it out.
static inline void plan_open(Arena* arena) {
    char* memory = (char*)allocate(arena->used + CARVE_ALIGN, 1);
    memset(arena, 0, sizeof *arena);
    arena->memory = memory;
}

static inline size_t plan_total(const Arena* arena) {
    size_t total = 0;
    for (int r = 0; r < arena->row_count; r++) total += arena->rows[r].bytes;
    return total;
}

static inline void plan_print(FILE* out, const Arena* arena) {
    for (int r = 0; r < arena->row_count; r++)
        fprintf(out, "  %-32s %10.1f MiB\n", arena->rows[r].what, (double)arena->rows[r].bytes / 1048576);
    fprintf(out, "  %-32s %10.1f MiB\n", "memory in all", (double)plan_total(arena) / 1048576);
}

// Bytes this machine can still give, as the kernel estimates them; 0 if it does not say.
static inline size_t plan_available(void) {
    char line[256];
    unsigned long long kilobytes = 0;
    FILE* file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu", &kilobytes) == 1) break;
    if (file) fclose(file);
    return (size_t)kilobytes * 1024;
}

// Whether the plan fits in this machine's memory. `advice` names the option to change.
static inline bool plan_check(const Arena* arena, const char* advice, Error* e) {
    size_t available = plan_available(), total = plan_total(arena);
    if (!available || total <= available) return true;
    return fail(e, "memory: found a need of %.1f GiB, expected at most the %.1f GiB that are free, %s",
                (double)total / 1073741824, (double)available / 1073741824, advice);
}

#endif
