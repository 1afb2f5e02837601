// runlog.h: the story of a run, one JSON object a line, for other programs to read.
//
//     runlog_begin(&log, "val"); runlog_int(&log, "step", 1); runlog_real(&log, "loss", x); runlog_end(&log);
//
// A line is built in memory and handed over in one write, so that a killed process leaves at most one half
// line, the last. A resumed run cuts the file back to what belongs to its checkpoint and goes on behind that.

#ifndef DATA_RUNLOG_H
#define DATA_RUNLOG_H

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <unistd.h>

#include "../host/common.h"
#include "json.h"
#include "replace.h"

typedef struct {
    int file;
    FILE* line;                 // what is being built, between begin and end
    char* text;                 // its bytes, once it is closed
    size_t length;
} RunLog;

// ------------------------------------------------------------------------------------------------
// Cutting back

// Does a line (without its newline) stay when the run goes on from step keep? Lines of type "run" do, and
// lines up to that step; those without a step as long as nothing was cut before them (*cut). What is not one
// JSON object, as after a crash of the machine, goes.
static inline bool runlog_stays(const char* line, size_t length, uint64_t keep, bool* cut) {
    JsonReader json;
    char key[8], type[8] = "";
    uint64_t step = 0;
    bool has_step = false;
    json.at = line;
    json.end = line + length;
    json.problem = NULL;
    json_expect(&json, '{', "expected an object");
    for (bool first = true; json_item(&json, &first, '}');) {
        json_string(&json, key, sizeof key);
        json_expect(&json, ':', "expected :");
        if (json.problem) return false;
        if (strcmp(key, "step") == 0) has_step = json_uint(&json, &step);
        else if (strcmp(key, "type") == 0) json_string(&json, type, sizeof type);
        else json_skip(&json, 1);
    }
    json_space(&json);
    if (json.problem || json.at != json.end) return false;
    if (strcmp(type, "run") == 0) return true;
    if (has_step && step > keep) *cut = true;
    return has_step ? step <= keep : !*cut;
}

// in is closed. A last line without a newline goes, whatever it says: the next one would be joined to it.
static inline bool runlog_copy(FILE* in, const char* path, uint64_t keep, Error* e) {
    ReplacedFile out;
    char* line = NULL;
    size_t room = 0;
    ssize_t length;
    bool cut = false, good = replace_begin(&out, path, e);
    while (good && (length = getline(&line, &room, in)) > 0 && line[length - 1] == '\n')
        if (runlog_stays(line, (size_t)length - 1, keep, &cut))
            good = replace_write(&out, line, (size_t)length, e);
    if (good && ferror(in)) {
        good = fail(e, "%s: cannot be read (%s), expected the log of the run", path, strerror(errno));
        replace_abandon(&out);
    }
    free(line);
    fclose(in);
    return good && replace_end(&out, e);
}

// ------------------------------------------------------------------------------------------------
// Opening and closing

// keep < 0: a new file. Otherwise the run goes on from that step: what the file says about later ones is
// removed, all or nothing; a log that is missing starts anew.
static inline bool runlog_open(RunLog* log, const char* path, long keep, Error* e) {
    memset(log, 0, sizeof *log);
    log->file = -1;
    FILE* old = keep < 0 ? NULL : fopen(path, "re");
    if (keep >= 0 && !old && errno != ENOENT)
        return fail(e, "%s: cannot be read (%s), expected the log of the run", path, strerror(errno));
    if (old && !runlog_copy(old, path, (uint64_t)keep, e)) return false;
    log->file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (keep < 0 ? O_TRUNC : 0), 0666);
    if (log->file >= 0) return true;
    return fail(e, "%s: cannot be opened (%s); choose another --out", path, strerror(errno));
}

// Does nothing to a closed log.
static inline void runlog_close(RunLog* log) {
    if (log->file >= 0) close(log->file);
    log->file = -1;
}

// ------------------------------------------------------------------------------------------------
// One line. Keys and types are the program's own: plain names.

// Starts a line; runlog_end must follow.
static inline void runlog_begin(RunLog* log, const char* type) {
    log->line = open_memstream(&log->text, &log->length);
    if (!log->line) die("out of memory for a line of the run's log");
    fprintf(log->line, "{\"type\":\"%s\"", type);
}

static inline void runlog_int(RunLog* log, const char* key, long long value) {
    fprintf(log->line, ",\"%s\":%lld", key, value);
}

// JSON has no infinity and no NaN: null. Nine digits bring every float back.
static inline void runlog_number(RunLog* log, double value) {
    if (isfinite(value)) fprintf(log->line, "%.9g", value);
    else fputs("null", log->line);
}

static inline void runlog_real(RunLog* log, const char* key, double value) {
    fprintf(log->line, ",\"%s\":", key);
    runlog_number(log, value);
}

// value: any bytes, ended by NUL.
static inline void runlog_text(RunLog* log, const char* key, const char* value) {
    fprintf(log->line, ",\"%s\":", key);
    json_write_string(log->line, value);
}

static inline void runlog_bool(RunLog* log, const char* key, bool value) {
    fprintf(log->line, ",\"%s\":%s", key, value ? "true" : "false");
}

static inline void runlog_null(RunLog* log, const char* key) { fprintf(log->line, ",\"%s\":null", key); }

// values (count)
static inline void runlog_array(RunLog* log, const char* key, const double* values, int count) {
    fprintf(log->line, ",\"%s\":[", key);
    for (int i = 0; i < count; i++) {
        if (i > 0) fputc(',', log->line);
        runlog_number(log, values[i]);
    }
    fputc(']', log->line);
}

// Hands the line over. False with errno when there was no room; then none of it stays in the file, so that
// later lines can be read.
static inline bool runlog_end(RunLog* log) {
    fputs("}\n", log->line);
    bool good = !ferror(log->line);
    if (fclose(log->line) != 0 || !good) die("out of memory for a line of the run's log");
    off_t start = lseek(log->file, 0, SEEK_END);
    for (size_t done = 0; good && done < log->length;) {
        ssize_t written = write(log->file, log->text + done, log->length - done);
        if (written > 0) done += (size_t)written;
        else good = written < 0 && errno == EINTR;
    }
    int reason = errno;
    if (!good && start >= 0 && ftruncate(log->file, start) != 0) good = false;
    free(log->text);
    log->line = NULL;
    errno = reason;
    return good;
}

#ifdef FUZZING
// Input: a byte for the step to keep, then lines.
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    bool cut = false;
    if (size == 0) return 0;
    const char *at = (const char*)data + 1, *end = (const char*)data + size, *newline;
    for (; at < end && (newline = (const char*)memchr(at, '\n', (size_t)(end - at))); at = newline + 1)
        runlog_stays(at, (size_t)(newline - at), data[0], &cut);
    return 0;
}
#endif

#endif
