// check.h: the few lines that every test program needs.

#ifndef HOST_CHECK_H
#define HOST_CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

static int checks_passed, checks_failed;

// One check with a printed name. Prints failures always, passes too, so that a log shows what was looked at.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static inline bool check(bool good, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("%s ", good ? "ok  " : "FAIL");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    if (good) checks_passed++;
    else checks_failed++;
    return good;
}

// The last line of a test program, and its exit status.
static inline int check_summary(void) {
    printf("%d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed ? 1 : 0;
}

#endif
