// replace.h: a file that is either the old one or the whole new one, whatever happens in between.
//
// What is written goes to PATH.tmp in the same directory. Only when its bytes are on the disk does it take
// the name (fsync, rename, fsync of the directory). After any failure the temporary file is gone, PATH is
// what it was, and the ReplacedFile is closed. With SIGXFSZ ignored, a size limit is such a failure.

#ifndef DATA_REPLACE_H
#define DATA_REPLACE_H

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "../host/common.h"

typedef struct {
    const char* path;           // the caller's string
    char* temporary;            // NULL: nothing is open
    int file;
} ReplacedFile;

// Removes the temporary file and closes. Does nothing after replace_end or a failure.
static inline void replace_abandon(ReplacedFile* r) {
    if (!r->temporary) return;
    if (r->file >= 0) close(r->file);
    unlink(r->temporary);
    free(r->temporary);
    r->temporary = NULL;
}

// The line with the reason in errno, and the end of the attempt.
static inline bool replace_fail(ReplacedFile* r, const char* what, Error* e) {
    fail(e, "%s: cannot be written (%s: %s), nothing was changed; make room or choose another place",
         r->path, what, strerror(errno));
    replace_abandon(r);
    return false;
}

static inline bool replace_open(ReplacedFile* r, const char* path, int flags, Error* e) {
    size_t room = strlen(path) + sizeof ".tmp";
    r->path = path;
    r->temporary = (char*)allocate(room, 1);
    snprintf(r->temporary, room, "%s.tmp", path);
    r->file = open(r->temporary, O_WRONLY | O_CLOEXEC | flags, 0666);
    if (r->file >= 0) return true;
    fail(e, "%s: cannot be created (%s); choose another place", r->temporary, strerror(errno));
    free(r->temporary);         // not ours to remove: it may be a directory of that name
    r->temporary = NULL;
    return false;
}

// path must outlive r. What a killed process left in the temporary file is overwritten.
static inline bool replace_begin(ReplacedFile* r, const char* path, Error* e) {
    return replace_open(r, path, O_CREAT | O_TRUNC, e);
}

// A process that helps to write what another one began, and replace_leave, when its part is on the disk.
static inline bool replace_join(ReplacedFile* r, const char* path, Error* e) {
    return replace_open(r, path, 0, e);
}

// At `offset`. In steps of at most 1 GB, since one write takes no more than 2.
static inline bool replace_write_at(ReplacedFile* r, const void* data, uint64_t bytes, uint64_t offset,
                                    Error* e) {
    const char* at = (const char*)data;
    while (bytes > 0) {
        ssize_t written =
            pwrite(r->file, at, bytes < 1u << 30 ? (size_t)bytes : (size_t)1 << 30, (off_t)offset);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return replace_fail(r, "write", e);
        at += written;
        offset += (uint64_t)written;
        bytes -= (uint64_t)written;
    }
    return true;
}

// Appends.
static inline bool replace_write(ReplacedFile* r, const void* data, uint64_t bytes, Error* e) {
    off_t end = lseek(r->file, 0, SEEK_END);
    return end < 0 ? replace_fail(r, "seek", e) : replace_write_at(r, data, bytes, (uint64_t)end, e);
}

// The rename itself is safe only when the directory is on the disk.
static inline bool replace_sync_directory(const char* path, Error* e) {
    const char* slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) + 1 : 1;
    char* directory = (char*)allocate(length + 1, 1);
    memcpy(directory, slash ? path : ".", length);
    int file = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = file >= 0 && (fsync(file) == 0 || errno == EINVAL);     // EINVAL: no such thing here
    if (!good) fail(e, "%s: written, but its directory cannot be flushed (%s)", path, strerror(errno));
    if (file >= 0) close(file);
    free(directory);
    return good;
}

static inline bool replace_leave(ReplacedFile* r, Error* e) {
    if (fsync(r->file) != 0) return replace_fail(r, "fsync", e);
    if (close(r->file) != 0) return replace_fail(r, "close", e);
    free(r->temporary);
    r->temporary = NULL;
    return true;
}

// Only now is path another file. False after the rename means: replaced, but perhaps not after a power loss.
static inline bool replace_end(ReplacedFile* r, Error* e) {
    if (fsync(r->file) != 0) return replace_fail(r, "fsync", e);
    int file = r->file;
    r->file = -1;
    if (close(file) != 0) return replace_fail(r, "close", e);
    if (rename(r->temporary, r->path) != 0) return replace_fail(r, "rename", e);
    free(r->temporary);
    r->temporary = NULL;
    return replace_sync_directory(r->path, e);
}

#endif
