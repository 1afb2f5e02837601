// file.h: a whole file in memory, or one line that says why not; and the numbers in it.

#ifndef DATA_FILE_H
#define DATA_FILE_H

#include "../host/common.h"

#include <errno.h>
#include <sys/stat.h>

// Four bytes of a file, all of whose numbers are little-endian whatever the machine is.
static inline uint32_t little32(const uint8_t* bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

// Whether path is a file with at least one byte. Asked before opening: opening a pipe would wait for its
// writer.
static inline bool file_size(uint64_t* size, const char* path, const char* expected, Error* e) {
    struct stat info;
    if (stat(path, &info) != 0) return fail(e, "%s: %s, expected %s", path, strerror(errno), expected);
    if (S_ISDIR(info.st_mode)) return fail(e, "%s: is a directory, expected %s", path, expected);
    if (!S_ISREG(info.st_mode)) return fail(e, "%s: is not a regular file, expected %s", path, expected);
    if (info.st_size == 0) return fail(e, "%s: is empty, expected %s", path, expected);
    *size = (uint64_t)info.st_size;
    return true;
}

// Reads the file that path names; expected says what it should be ("a text file"). NULL and an error line
// if it cannot. The caller frees the bytes.
static inline uint8_t* file_read(const char* path, size_t* size, const char* expected, Error* e) {
    uint64_t length = 0;
    if (!file_size(&length, path, expected, e)) return NULL;
    FILE* file = fopen(path, "rb");
    if (!file) {
        fail(e, "%s: %s, expected %s", path, strerror(errno), expected);
        return NULL;
    }
    uint8_t* bytes = (uint8_t*)allocate((size_t)length, 1);
    *size = fread(bytes, 1, (size_t)length, file);
    if (*size != length) {
        fail(e, "%s: only %zu of its %llu bytes could be read (%s)", path, *size, (unsigned long long)length,
             ferror(file) ? strerror(errno) : "it became shorter meanwhile");
        free(bytes);
        bytes = NULL;
    }
    fclose(file);
    return bytes;
}

#endif
