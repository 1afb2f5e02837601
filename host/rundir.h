// rundir.h: the directory of a run: its lock, its checkpoints step_%08d.safetensors, and which of them stay.

#ifndef HOST_RUNDIR_H
#define HOST_RUNDIR_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"

enum { RUNDIR_PATH = 4096 + 64, RUNDIR_MAX_STEP = 99999999 };

typedef struct { long* steps; int count; } Checkpoints;     // ascending; the caller frees steps

static inline void rundir_path(char* path, const char* dir, long step) {
    snprintf(path, RUNDIR_PATH, "%s/step_%08ld.safetensors", dir, step);
}

// The step of a checkpoint's file name, or -1.
static inline long rundir_step(const char* name) {
    char again[64];
    char* end;
    if (strncmp(name, "step_", 5) || strlen(name) != strlen("step_00000000.safetensors")) return -1;
    long step = strtol(name + 5, &end, 10);
    if (step < 0 || step > RUNDIR_MAX_STEP) return -1;
    snprintf(again, sizeof again, "step_%08ld.safetensors", step);
    return strcmp(name, again) ? -1 : step;
}

static inline int rundir_compare(const void* a, const void* b) {
    long x = *(const long*)a, y = *(const long*)b;
    return (x > y) - (x < y);
}

// The checkpoints of dir; none if it cannot be read.
static inline Checkpoints rundir_list(const char* dir) {
    Checkpoints found = {NULL, 0};
    DIR* handle = opendir(dir);
    for (struct dirent* entry; handle && (entry = readdir(handle));) {
        long step = rundir_step(entry->d_name);
        if (step < 0) continue;
        if ((found.count & (found.count - 1)) == 0) {       // grows at powers of two
            size_t room = found.count ? 2 * (size_t)found.count : 1;
            found.steps = (long*)realloc(found.steps, room * sizeof(long));
            if (!found.steps) die("out of memory: listing %s", dir);
        }
        found.steps[found.count++] = step;
    }
    if (handle) closedir(handle);
    if (found.count) qsort(found.steps, (size_t)found.count, sizeof(long), rundir_compare);
    return found;
}

// Makes dir and its parents where they are missing.
static inline bool rundir_make(const char* dir, Error* e) {
    char path[RUNDIR_PATH];
    snprintf(path, sizeof path, "%s", dir);
    for (char* c = path + 1;; c++) {
        if (*c && *c != '/') continue;
        char keep = *c;
        *c = 0;
        if (mkdir(path, 0777) && errno != EEXIST)
            return fail(
                e, "%s: cannot be made (%s), expected a directory that can be written, choose another --out",
                path, strerror(errno));
        *c = keep;
        if (!keep) return true;
    }
}

// Makes dir if need be, and holds it until the process ends:
// two runs in one directory would spoil each other's files.
static inline bool rundir_open(const char* dir, Error* e) {
    char path[RUNDIR_PATH];
    if (!rundir_make(dir, e)) return false;
    snprintf(path, sizeof path, "%s/lock", dir);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0)
        return fail(e, "%s: cannot be written (%s), expected a directory for the run, choose another --out",
                    dir, strerror(errno));
    if (flock(file, LOCK_EX | LOCK_NB) == 0) return true;   // never closed: the lock ends with the process
    close(file);
    return fail(e, "%s: found another run at work there, expected none, wait for it or choose another --out",
                dir);
}

// Removes all checkpoints but the newest `newest`: 0 leaves none.
static inline void rundir_keep(const char* dir, long newest) {
    Checkpoints found = rundir_list(dir);
    for (int i = 0; i < found.count - newest; i++) {
        char path[RUNDIR_PATH];
        rundir_path(path, dir, found.steps[i]);
        unlink(path);
    }
    free(found.steps);
}

#endif
