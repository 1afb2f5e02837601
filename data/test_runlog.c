// test_runlog.c: lines are JSON whatever they say, and a resumed run keeps what it should.
//     cc -D_GNU_SOURCE -std=c11 test_runlog.c

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "../host/check.h"
#include "runlog.h"

static char folder[64], file_path[96], tmp_path[104];

static void save_text(const char* text, size_t length) {
    FILE* file = fopen(file_path, "wb");
    if (!file || fwrite(text, 1, length, file) != length || fclose(file) != 0)
        die("%s: cannot be written", file_path);
}

static char loaded[1 << 20];

static const char* load_text(void) {
    FILE* file = fopen(file_path, "rb");
    if (!file) return "(no file)";
    loaded[fread(loaded, 1, sizeof loaded - 1, file)] = 0;
    fclose(file);
    return loaded;
}

// Strictly one object a line, each line ended.
static bool is_json_lines(const char* text) {
    const char* newline = text;
    for (; *text; text = newline + 1) {
        JsonReader json;
        newline = strchr(text, '\n');
        if (!newline || *text != '{') return false;
        json.at = text;
        json.end = newline;
        json.problem = NULL;
        if (!json_skip(&json, 0) || json.at != json.end) return false;
    }
    return true;
}

static bool write_step(RunLog* log, long step) {
    runlog_begin(log, "step");
    runlog_int(log, "step", step);
    return runlog_end(log);
}

// ------------------------------------------------------------------------------------------------
// Lines

static void test_values(void) {
    static const double gains[] = {1, 0.5, (double)INFINITY, -1e-300};
    RunLog log;
    Error e;
    if (!check(runlog_open(&log, file_path, -1, &e), "a new file")) return;
    runlog_begin(&log, "step");
    runlog_int(&log, "step", -9223372036854775807LL - 1);
    runlog_real(&log, "loss", 1.0 / 3);
    runlog_real(&log, "nan", (double)NAN);
    runlog_real(&log, "inf", -(double)INFINITY);
    runlog_real(&log, "large", 1e300);
    runlog_real(&log, "zero", -0.0);
    runlog_bool(&log, "yes", true);
    runlog_bool(&log, "no", false);
    runlog_null(&log, "gain");
    runlog_array(&log, "gains", gains, 4);
    runlog_array(&log, "none", NULL, 0);
    check(runlog_end(&log), "a line is written");
    static const char* expected =
        "{\"type\":\"step\",\"step\":-9223372036854775808,\"loss\":0.333333333,\"nan\":null,\"inf\":null,"
        "\"large\":1e+300,\"zero\":-0,\"yes\":true,\"no\":false,\"gain\":null,"
        "\"gains\":[1,0.5,null,-1e-300],\"none\":[]}\n";
    check(strcmp(load_text(), expected) == 0, "it says what was put in: %s", loaded);
    check(is_json_lines(loaded), "it is JSON");
    runlog_close(&log);
    check(runlog_open(&log, file_path, -1, &e) && strcmp(load_text(), "") == 0, "a new file is empty");
    runlog_close(&log);
}

static float random_float(int i) {
    uint32_t bits = (uint32_t)hash64(3, (uint64_t)i);
    float value;
    memcpy(&value, &bits, 4);
    return isfinite(value) ? value : 0;
}

static void test_floats(void) {
    enum { LINES = 1000 };
    RunLog log;
    Error e;
    int wrong = 0;
    if (!runlog_open(&log, file_path, -1, &e)) die("%s", e.text);
    for (int i = 0; i < LINES; i++) {
        runlog_begin(&log, "x");
        runlog_real(&log, "v", (double)random_float(i));
        wrong += !runlog_end(&log);
    }
    runlog_close(&log);
    const char* at = load_text();
    wrong += !is_json_lines(at);
    for (int i = 0; i < LINES && (at = strstr(at, "\"v\":")); i++, at++)
        wrong += strtof(at + 4, NULL) != random_float(i);
    check(at && wrong == 0, "floats come back exactly (%d do not)", wrong);
}

// Samples are bytes of any kind.
static void test_text(void) {
    RunLog log;
    Error e;
    int wrong = 0, lines = 0;
    const char* at;
    char text[64], back[256];
    if (!runlog_open(&log, file_path, -1, &e)) die("%s", e.text);
    runlog_begin(&log, "sample");
    runlog_text(&log, "text", "a\"b\\c\n\r\t\x01\x7f/\xc3\xa9\xff\xe2\x82<\xf0\x9f\x98\x80");
    static const char* expected =
        "{\"type\":\"sample\",\"text\":\"a\\\"b\\\\c\\n\\u000d\\u0009\\u0001\\u007f/\xc3\xa9"
        "\\ufffd\\ufffd\\ufffd<\xf0\x9f\x98\x80\"}\n";
    check(runlog_end(&log) && strcmp(load_text(), expected) == 0, "escapes: %s", loaded);
    for (int i = 0; i < 1000; i++) {
        for (int k = 0; k < 63; k++) text[k] = (char)(1 + hash64((uint64_t)i, (uint64_t)k) % 255);
        text[63] = 0;
        runlog_begin(&log, "sample");
        runlog_text(&log, "text", text);
        wrong += !runlog_end(&log);
    }
    runlog_close(&log);
    check(wrong == 0 && is_json_lines(load_text()), "random bytes become JSON");
    for (at = strchr(loaded, '\n') + 1; *at; at = strchr(at, '\n') + 1, lines++) {
        JsonReader json;
        json.at = strstr(at, "\"text\":") + 7;
        json.end = loaded + strlen(loaded);
        json.problem = NULL;
        wrong += json_string(&json, back, sizeof back) < 63;
    }
    check(wrong == 0 && lines == 1000, "and none is lost (%d of %d are)", wrong, lines);
}

// ------------------------------------------------------------------------------------------------
// Going on

// The log `before`, opened to go on from step keep, is `after`.
static void cut(const char* what, const char* before, long keep, const char* after) {
    RunLog log;
    Error e;
    save_text(before, strlen(before));
    bool good = runlog_open(&log, file_path, keep, &e);
    if (good) e.text[0] = 0;
    check(good && strcmp(load_text(), after) == 0 && access(tmp_path, F_OK) != 0, "%s %s", what, e.text);
    check(good && write_step(&log, keep + 1) && is_json_lines(load_text()), "%s, and it goes on", what);
    if (good) runlog_close(&log);
}

#define RUN "{\"type\":\"run\",\"lr\":0.1}\n"
#define STEP(n) "{\"type\":\"step\",\"step\":" #n ",\"deep\":[{\"step\":99}]}\n"
#define STOP "{\"type\":\"stop\",\"why\":\"signal\"}\n"
#define VAL(n) "{\"type\":\"val\",\"step\":" #n "}\n"

static void test_cutting(void) {
    cut("the end goes", RUN STEP(1) STEP(2) STEP(3), 2, RUN STEP(1) STEP(2));
    cut("to the start", RUN STEP(1) STEP(2), 0, RUN);
    cut("nothing goes", RUN STEP(1) STEP(2) STOP, 2, RUN STEP(1) STEP(2) STOP);
    cut("the step is a number", RUN STEP(9) STEP(10) STEP(11), 10, RUN STEP(9) STEP(10));
    cut("validation of the step stays", RUN STEP(1) VAL(1) STEP(2) VAL(2), 1, RUN STEP(1) VAL(1));
    cut("a late line of a kept step stays", RUN STEP(1) STEP(2) VAL(1), 1, RUN STEP(1) VAL(1));
    cut("the stop behind it goes", RUN STEP(1) STEP(2) STOP, 1, RUN STEP(1));
    cut("runs in between stay", RUN STEP(1) STEP(2) RUN STEP(3), 1, RUN STEP(1) RUN);
    cut("half a line goes", RUN STEP(1) "{\"type\":\"st", 5, RUN STEP(1));
    cut("a whole line without newline goes", RUN STEP(1) "{\"type\":\"step\",\"step\":2}", 5, RUN STEP(1));
    cut("with a space behind it too", RUN STEP(1) "{\"type\":\"step\",\"step\":2} ", 5, RUN STEP(1));
    cut("half a line in between goes", RUN "{\"type\":\"st" STEP(2) STEP(3), 5, RUN STEP(3));
    cut("lines that are not objects go", RUN "\n[]\n12\nhello\n{}x\n" STEP(1), 5, RUN STEP(1));
    cut("lines with bad numbers go",
        RUN "{\"a\":01}\n{\"a\":-}\n{\"a\":1.}\n{\"a\":1e}\n{\"a\":+1}\n" STEP(1), 5, RUN STEP(1));
    cut("an empty file", "", 5, "");
    char deep[1024] = RUN;
    for (int i = 0; i < 70; i++) strcat(deep, "{\"a\":");
    strcat(deep, "1");
    for (int i = 0; i < 70; i++) strcat(deep, "}");
    strcat(deep, "\n");
    cut("70 brackets go", deep, 5, RUN);
}

static void test_zeros(void) {
    RunLog log;
    Error e;
    static const char before[] = RUN STEP(1) "\0\0\0\0\0\0\n\0\0";
    save_text(before, sizeof before - 1);
    bool good = runlog_open(&log, file_path, 7, &e);
    check(good && strcmp(load_text(), RUN STEP(1)) == 0, "zeros after a crash go");
    if (good) runlog_close(&log);
}

static void test_missing(void) {
    RunLog log;
    Error e;
    unlink(file_path);
    bool good = runlog_open(&log, file_path, 7, &e) && write_step(&log, 8);
    check(good && is_json_lines(load_text()), "a missing log starts anew");
    if (good) runlog_close(&log);
    for (long keep = -1; keep < 1; keep++) {
        good = runlog_open(&log, folder, keep, &e);
        check(!good && strncmp(e.text, folder, strlen(folder)) == 0, "%s", e.text);
        runlog_close(&log);
    }
}

// A process killed while it writes: at most the last line is lost.
static void test_killed(void) {
    int wrong = 0, lines = 0;
    save_text("", 0);
    for (int n = 0; n < 20; n++) {
        RunLog log;
        Error e;
        long step = 0;
        pid_t child = fork();
        if (child == 0) {
            if (!runlog_open(&log, file_path, -1, &e)) _exit(1);
            while (write_step(&log, ++step)) continue;
            _exit(1);
        }
        usleep(2000 + 300 * (useconds_t)n);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        if (!runlog_open(&log, file_path, 1000000, &e)) die("%s", e.text);
        FILE* file = fopen(file_path, "rb");
        char line[128];
        for (step = 0; file && fgets(line, sizeof line, file); step++, lines++) {
            char expected[128];
            snprintf(expected, sizeof expected, "{\"type\":\"step\",\"step\":%ld}\n", step + 1);
            wrong += strcmp(line, expected) != 0;
        }
        if (file) fclose(file);
        runlog_close(&log);
    }
    check(wrong == 0 && lines > 0, "killed 20 times, every line is whole (%d of %d are not)", wrong, lines);
}

// In a child, since the limit stays: 0 when all is as it should be.
static int fill_up(void) {
    RunLog log;
    Error e;
    struct rlimit limit;
    int written = 0;
    limit.rlim_cur = 90;          // three lines and a half
    limit.rlim_max = RLIM_INFINITY;
    signal(SIGXFSZ, SIG_IGN);
    if (!runlog_open(&log, file_path, -1, &e) || setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    while (written < 10 && write_step(&log, written + 1)) written++;
    if (written == 10 || errno != EFBIG || !is_json_lines(load_text())) return 2;
    limit.rlim_cur = RLIM_INFINITY;
    bool good = setrlimit(RLIMIT_FSIZE, &limit) == 0 && write_step(&log, 77);
    if (!good || !is_json_lines(load_text())) return 3;
    return strstr(loaded, ":77}") && strstr(loaded, ":3}") && !strstr(loaded, ":4}") ? 0 : 4;
}

static void test_full(void) {
    int status = -1;
    pid_t child = fork();
    if (child == 0) _exit(fill_up());
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "no room for a line: none of it stays, later ones do (%d)", WEXITSTATUS(status));
}

static void test_no_room_to_cut(void) {
    static const char before[] = RUN STEP(1) STEP(2) STEP(3) STEP(4);
    int status = -1;
    save_text(before, sizeof before - 1);
    pid_t child = fork();
    if (child == 0) {
        RunLog log;
        Error e;
        struct rlimit limit;
        limit.rlim_cur = limit.rlim_max = 50;
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        _exit(runlog_open(&log, file_path, 3, &e) ? 1 : 0);
    }
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0 && strcmp(load_text(), before) == 0
          && access(tmp_path, F_OK) != 0, "no room to cut: refused, the log is as it was");
}

int main(void) {
    snprintf(folder, sizeof folder, "/tmp/test_runlog.XXXXXX");
    if (!mkdtemp(folder)) die("/tmp: no place for a temporary directory");
    snprintf(file_path, sizeof file_path, "%s/run.jsonl", folder);
    snprintf(tmp_path, sizeof tmp_path, "%s.tmp", file_path);
    test_values();
    test_floats();
    test_text();
    test_cutting();
    test_zeros();
    test_missing();
    test_killed();
    test_full();
    test_no_room_to_cut();
    unlink(file_path);
    check(rmdir(folder) == 0, "nothing is left behind");
    return check_summary();
}
