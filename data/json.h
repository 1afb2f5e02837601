// json.h: the JSON that this project reads and writes, without building a tree.
//
// Reading is strict (RFC 8259) and on top of it refuses NUL in strings, so that a string is a C string. The
// caller walks the text in the order it expects:
//     for (; json_item(&json, &first, '}');) { json_string(..); json_expect(..); json_uint(..); }
// The first fault stays in `problem` and ends every loop; `at` points to where it was found.

#ifndef DATA_JSON_H
#define DATA_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { JSON_MAX_DEPTH = 64, JSON_LABEL = 72 };

typedef struct {
    const char *at, *end;       // what is left of the text
    const char* problem;        // NULL as long as all is well
} JsonReader;

// ------------------------------------------------------------------------------------------------
// UTF-8

// Bytes of the well-formed character at `at` (at < end), 0 if there is none.
static inline int utf8_bytes(const char* at, const char* end) {
    const unsigned char* s = (const unsigned char*)at;
    int count = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    if (count > end - at) return 0;
    for (int i = 1; i < count; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    bool too_long = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    bool no_character = (s[0] == 0xed && s[1] >= 0xa0) || (s[0] == 0xf4 && s[1] >= 0x90);
    return too_long || no_character ? 0 : count;
}

// Writes a code point below 0x110000, returns its bytes.
static inline int utf8_write(char out[4], uint32_t code) {
    int count = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char marks[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (int i = count - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(marks[count] | code);
    return count;
}

// ------------------------------------------------------------------------------------------------
// Reading

// Keeps the first problem only: what follows it means nothing.
static inline bool json_fail(JsonReader* json, const char* problem) {
    if (!json->problem) json->problem = problem;
    return false;
}

// Skips white space. strchr would find the NUL that ends its list, hence the test for it.
static inline void json_space(JsonReader* json) {
    while (json->at < json->end && *json->at && strchr(" \t\n\r", *json->at)) json->at++;
}

// Takes the character if it comes next.
static inline bool json_next(JsonReader* json, char c) {
    json_space(json);
    if (json->problem || json->at == json->end || *json->at != c) return false;
    json->at++;
    return true;
}

// Takes the character or fails.
static inline bool json_expect(JsonReader* json, char c, const char* problem) {
    return json_next(json, c) || json_fail(json, problem);
}

// After the opening bracket: is there another item before the closing one, which is taken otherwise?
static inline bool json_item(JsonReader* json, bool* first, char close) {
    if (json->problem) return false;
    bool was_first = *first;
    *first = false;
    if (was_first) return !json_next(json, close);
    if (json_next(json, ',')) return true;
    json_expect(json, close, close == '}' ? "expected , or }" : "expected , or ]");
    return false;
}

// Four digits of either case.
static inline bool json_hex4(JsonReader* json, uint32_t* code) {
    *code = 0;
    for (int i = 0; i < 4; i++, json->at++) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char* digit = json->at < json->end && *json->at ? strchr(digits, *json->at) : NULL;
        if (!digit) digit = json->at < json->end && *json->at ? strchr(digits + 16, *json->at) : NULL;
        if (!digit) return json_fail(json, "expected four hexadecimal digits after \\u");
        *code = *code << 4 | (uint32_t)((digit - digits) % 16);
    }
    return true;
}

// The code point of a \u escape, the u already taken; two of them where the first is half of a pair.
static inline bool json_code_point(JsonReader* json, uint32_t* code) {
    uint32_t low;
    if (!json_hex4(json, code)) return false;
    if (*code == 0) return json_fail(json, "\\u0000 in a string");
    if (*code < 0xd800 || *code > 0xdfff) return true;
    bool pair = *code < 0xdc00 && json->end - json->at >= 2 && json->at[0] == '\\' && json->at[1] == 'u';
    if (!pair) return json_fail(json, "half of a surrogate pair");
    json->at += 2;
    if (!json_hex4(json, &low)) return false;
    if (low < 0xdc00 || low > 0xdfff) return json_fail(json, "half of a surrogate pair");
    *code = 0x10000 + ((*code - 0xd800) << 10) + (low - 0xdc00);
    return true;
}

// The next character of a string into out, its escape resolved. Returns its bytes, 0 after a fault.
static inline int json_character(JsonReader* json, char out[4]) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    if (*json->at != '\\') {
        int count = (unsigned char)*json->at < 0x20 ? 0 : utf8_bytes(json->at, json->end);
        if (!count) json_fail(json, "a control character or malformed UTF-8 in a string");
        memcpy(out, json->at, (size_t)count);
        json->at += count;
        return count;
    }
    char c = ++json->at < json->end ? *json->at : 0;
    const char* letter = c ? strchr(letters, c) : NULL;
    uint32_t code = letter ? (uint32_t)meanings[letter - letters] : 0;
    if (!letter && c != 'u') json_fail(json, "an unknown escape in a string");
    else json->at++;
    if (c == 'u') json_code_point(json, &code);
    return json->problem ? 0 : utf8_write(out, code);
}

// A string, cut to room - 1 bytes. Returns its whole length in bytes, -1 after a fault.
static inline long json_string(JsonReader* json, char* out, size_t room) {
    size_t length = 0;
    if (!json_expect(json, '"', "expected a string")) return -1;
    while (json->at < json->end && *json->at != '"') {
        char bytes[4];
        int count = json_character(json, bytes);
        if (!count) return -1;
        for (int i = 0; i < count; i++, length++)
            if (length + 1 < room) out[length] = bytes[i];
    }
    if (json->at == json->end) return json_fail(json, "the text ends inside a string"), -1;
    json->at++;
    if (room) out[length < room ? length : room - 1] = 0;
    return (long)length;
}

static inline bool json_is_digit(const JsonReader* json) {
    return json->at < json->end && *json->at >= '0' && *json->at <= '9';
}

// A whole number from 0 to 2^64 - 1; a fraction after it is left for the caller to stumble over.
static inline bool json_uint(JsonReader* json, uint64_t* value) {
    json_space(json);
    *value = 0;
    if (!json_is_digit(json)) return json_fail(json, "expected a whole number that is not negative");
    if (*json->at == '0') {
        json->at++;
        return !json_is_digit(json) || json_fail(json, "a number with a leading zero");
    }
    for (; json_is_digit(json); json->at++) {
        uint64_t digit = (uint64_t)(*json->at - '0');
        if (*value > (UINT64_MAX - digit) / 10) return json_fail(json, "a number beyond 2^64 - 1");
        *value = *value * 10 + digit;
    }
    return true;
}

// At least one.
static inline bool json_digits(JsonReader* json) {
    if (!json_is_digit(json)) return json_fail(json, "expected a value");
    while (json_is_digit(json)) json->at++;
    return true;
}

// Only its form is looked at; the numbers we use are read by json_uint.
static inline bool json_skip_number(JsonReader* json) {
    if (json->at < json->end && *json->at == '-') json->at++;
    const char* first = json->at;
    if (!json_digits(json)) return false;
    if (*first == '0' && json->at - first > 1) return json_fail(json, "a number with a leading zero");
    if (json->at < json->end && *json->at == '.' && (json->at++, !json_digits(json))) return false;
    if (json->at == json->end || (*json->at != 'e' && *json->at != 'E')) return true;
    json->at++;
    if (json->at < json->end && (*json->at == '+' || *json->at == '-')) json->at++;
    return json_digits(json);
}

// The three words, or else a number.
static inline bool json_skip_word(JsonReader* json) {
    static const char* const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(json->end - json->at) < length || memcmp(json->at, words[i], length) != 0) continue;
        json->at += length;
        return true;
    }
    return json_skip_number(json);
}

// Any value at all; depth is how deep the caller already is.
static inline bool json_skip(JsonReader* json, int depth) {
    if (depth > JSON_MAX_DEPTH) return json_fail(json, "brackets nested too deeply");
    bool object = json_next(json, '{'), first = true;
    if (object || json_next(json, '[')) {
        while (json_item(json, &first, object ? '}' : ']')) {
            if (object && json_string(json, NULL, 0) < 0) return false;
            if (object && !json_expect(json, ':', "expected :")) return false;
            if (!json_skip(json, depth + 1)) return false;
        }
        return !json->problem;
    }
    if (json->at < json->end && *json->at == '"') return json_string(json, NULL, 0) >= 0;
    return json_skip_word(json);
}

// ------------------------------------------------------------------------------------------------
// Writing

// The form in a JSON string of the character at `at` (at < end). Returns how many bytes of the text it stands
// for: a byte that is not UTF-8 becomes U+FFFD, since a generated text is any bytes and JSON is not.
static inline int json_escape(char out[8], const char* at, const char* end) {
    int count = utf8_bytes(at, end);
    unsigned char c = (unsigned char)*at;
    if (!count) snprintf(out, 8, "\\ufffd");
    else if (c == '"' || c == '\\') snprintf(out, 8, "\\%c", c);
    else if (c == '\n') snprintf(out, 8, "\\n");
    else if (c < 0x20 || c == 0x7f) snprintf(out, 8, "\\u%04x", (unsigned)c);
    else snprintf(out, 8, "%.*s", count, at);
    return count ? count : 1;
}

// text as a JSON string, quotes included.
static inline void json_write_string(FILE* file, const char* text) {
    const char* end = text + strlen(text);
    char piece[8];
    fputc('"', file);
    while (text < end) {
        text += json_escape(piece, text, end);
        fputs(piece, file);
    }
    fputc('"', file);
}

// A name from a file as it may stand in a message: quoted, on one line, not too long. Returns out.
static inline const char* json_label(char out[JSON_LABEL], const char* text) {
    const char* end = text + strlen(text);
    size_t used = 1;
    out[0] = '"';
    while (text < end && used + 12 < JSON_LABEL)
        text += json_escape(out + used, text, end), used += strlen(out + used);
    snprintf(out + used, JSON_LABEL - used, text < end ? "...\"" : "\"");
    return out;
}

#endif
