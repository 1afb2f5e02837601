// test_safetensors.c: what safetensors.h, json.h and replace.h promise.
//     cc -D_GNU_SOURCE -std=c11 test_safetensors.c -lm

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../host/check.h"

// ------------------------------------------------------------------------------------------------
// The header under test is compiled with our pwrite, fsync, rename and calloc in place of the system's.

static char calls[256];             // what happened: w write, f fsync of a file, d of a directory, r rename
static int call_count, stop_at;     // the call (from 1) that fails, 0: none
static bool stop_is_crash;          // it ends the process instead, a write after half of its bytes
static size_t largest_write, largest_block, all_blocks;

static bool call_fails(char what) {
    if (call_count < (int)sizeof calls - 1) calls[call_count] = what, calls[call_count + 1] = 0;
    if (++call_count != stop_at) return false;
    if (stop_is_crash && what != 'w') _exit(9);
    errno = ENOSPC;
    return true;
}

static ssize_t test_pwrite(int file, const void* data, size_t bytes, off_t offset) {
    if (largest_write && bytes > largest_write) bytes = largest_write;
    if (!call_fails('w')) return pwrite(file, data, bytes, offset);
    if (!stop_is_crash) return -1;
    if (pwrite(file, data, bytes / 2, offset) < 0) _exit(8);
    _exit(9);
}

static int test_fsync(int file) {
    struct stat info;
    fstat(file, &info);
    return call_fails(S_ISDIR(info.st_mode) ? 'd' : 'f') ? -1 : 0;      // the disk itself is not under test
}

static int test_rename(const char* from, const char* to) { return call_fails('r') ? -1 : rename(from, to); }

static void* test_calloc(size_t count, size_t size) {
    if (count * size > largest_block) largest_block = count * size;
    all_blocks += count * size;
    return calloc(count, size);
}

static void expect_calls(int failing, bool crash) {
    call_count = 0;
    stop_at = failing;
    stop_is_crash = crash;
}

#define pwrite test_pwrite
#define fsync test_fsync
#define rename test_rename
#define calloc test_calloc
#include "safetensors.h"
#undef pwrite
#undef fsync
#undef rename
#undef calloc

// ------------------------------------------------------------------------------------------------
// Helpers

static char folder[64], file_path[96], tmp_path[104], other_path[96];
static uint64_t draws;

static uint64_t draw(uint64_t below) { return hash64(7, draws++) % below; }

static void save_bytes(const char* path, const void* data, size_t bytes) {
    FILE* file = fopen(path, "wb");
    if (!file || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0)
        die("%s: cannot be written", path);
}

static char* load_bytes(const char* path, size_t* bytes) {
    struct stat info;
    FILE* file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &info) != 0) die("%s: cannot be read", path);
    char* data = (char*)allocate((size_t)info.st_size, 1);
    *bytes = fread(data, 1, (size_t)info.st_size, file);
    fclose(file);
    return data;
}

static bool exists(const char* path) { return access(path, F_OK) == 0; }

static SafeOut out_of(const char* name, SafeType type, const void* data, int rank, uint64_t a, uint64_t b) {
    SafeOut t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.type = type;
    t.rank = rank;
    t.shape[0] = a;
    t.shape[1] = b;
    t.data = data;
    return t;
}

static SafePair pair_of(const char* key, const char* value) {
    SafePair p;
    p.key = (char*)key;
    p.value = (char*)value;
    return p;
}

// A line starts with its file, and is one line.
static bool is_line(const char* text, const char* start) {
    return strncmp(text, start, strlen(start)) == 0 && !strpbrk(text, "\n\r\t\x1b") && strlen(text) < 400;
}

// Opens and reads everything.
static bool whole(const char* path, Error* e) {
    SafeFile f;
    if (!safetensors_open(&f, path, e)) return false;
    bool good = safetensors_verify(&f, e);
    safetensors_close(&f);
    return good;
}

static const float small_w[6] = {1, -2.5f, 3, 1e-40f, 5, 6};
static const int32_t small_ids[3] = {-1, 0, 2147483647};
static const float small_scalar = 42;

// The file that most tests damage: 4 tensors, 2 pairs.
static bool write_small(const char* path, const char* step, Error* e) {
    SafeOut tensors[4];
    SafePair pairs[2];
    tensors[0] = out_of("wte.weight", SAFE_F32, small_w, 2, 2, 3);
    tensors[1] = out_of("scale", SAFE_F32, &small_scalar, 0, 0, 0);
    tensors[2] = out_of("empty", SAFE_F32, NULL, 2, 0, 5);
    tensors[3] = out_of("ids", SAFE_I32, small_ids, 1, 3, 0);
    pairs[0] = pair_of("step", step);
    pairs[1] = pair_of("format", "1");
    return safetensors_write(path, tensors, 4, pairs, 2, e);
}

static bool small_is(const char* path, const char* step) {
    SafeFile f;
    Error e;
    float w[6];
    int32_t ids[3];
    if (!safetensors_open(&f, path, &e)) return false;
    bool good = strcmp(safetensors_meta(&f, "step"), step) == 0
             && safetensors_read_f32(&f, safetensors_find(&f, "wte.weight"), w, &e)
             && memcmp(w, small_w, sizeof w) == 0
             && safetensors_read_i32(&f, safetensors_find(&f, "ids"), ids, &e)
             && memcmp(ids, small_ids, sizeof ids) == 0;
    safetensors_close(&f);
    return good;
}

// ------------------------------------------------------------------------------------------------
// Round trips

static void test_small(void) {
    Error e;
    SafeFile f;
    float value;
    check(write_small(file_path, "12", &e) && small_is(file_path, "12"), "a small file comes back");
    check(safetensors_open(&f, file_path, &e) && f.digested && f.tensor_count == 4, "4 tensors, digests");
    check(safetensors_find(&f, "scale")->rank == 0 && safetensors_count(safetensors_find(&f, "scale")) == 1
          && safetensors_read_f32(&f, safetensors_find(&f, "scale"), &value, &e) && value == 42, "a scalar");
    check(safetensors_count(safetensors_find(&f, "empty")) == 0
          && safetensors_read_f32(&f, safetensors_find(&f, "empty"), NULL, &e), "an empty tensor");
    check(!safetensors_find(&f, "wte") && !safetensors_meta(&f, "ste"), "what is not there is not found");
    bool good = safetensors_read_f32(&f, safetensors_find(&f, "ids"), &value, &e);
    check(!good && strstr(e.text, "\"ids\" is I32"), "I32 is not read as floats: %s", e.text);
    check(f.tensors[0].offset % 8 == 0, "data start at a multiple of 8");
    safetensors_close(&f);
    safetensors_close(&f);
    check(true, "closing twice is harmless");
}

enum { RANDOM_FILES = 100, RANDOM_TENSORS = 10 };

static void random_tensor(SafeOut* t, char* name, int k) {
    uint64_t count = 1;
    snprintf(name, 32, "t%d.%llu", k, (unsigned long long)draw(1000));
    memset(t, 0, sizeof *t);
    t->name = name;
    t->type = draw(2) ? SAFE_F32 : SAFE_I32;
    t->rank = (int)draw(SAFE_MAX_RANK + 1);
    for (int d = 0; d < t->rank; d++) count *= t->shape[d] = draw(20) ? 1 + draw(4) : 0;
    if (draw(50) == 0) t->rank = 1, count = t->shape[0] = 50000;        // more than one piece
    uint32_t* data = (uint32_t*)allocate(count, 4);
    for (uint64_t i = 0; i < count; i++) data[i] = (uint32_t)draw(UINT64_MAX);
    t->data = data;
}

static bool same_tensor(const SafeFile* f, const SafeOut* t, int k) {
    Error e;
    const SafeTensor* found = safetensors_find(f, t->name);
    if (found != &f->tensors[k] || found->type != t->type || found->rank != t->rank) return false;
    if (memcmp(found->shape, t->shape, sizeof t->shape[0] * (size_t)t->rank) != 0) return false;
    uint64_t bytes = safe_out_bytes(t);
    void* data = allocate(bytes, 1);
    bool good = found->type == SAFE_F32 ? safetensors_read_f32(f, found, (float*)data, &e)
                                        : safetensors_read_i32(f, found, (int32_t*)data, &e);
    good = good && found->bytes == bytes && (bytes == 0 || memcmp(data, t->data, bytes) == 0);
    free(data);
    return good;
}

static void test_random_shapes(void) {
    int same = 0, empty = 0, scalar = 0;
    Error e;
    snprintf(e.text, sizeof e.text, "no error");
    for (int n = 0; n < RANDOM_FILES; n++) {
        SafeOut tensors[RANDOM_TENSORS];
        SafeFile f;
        char names[RANDOM_TENSORS][32];
        for (int k = 0; k < RANDOM_TENSORS; k++) {
            random_tensor(&tensors[k], names[k], k);
            empty += safe_out_bytes(&tensors[k]) == 0;
            scalar += tensors[k].rank == 0;
        }
        largest_write = n % 2 ? 100 : 0;            // short writes are legal
        expect_calls(0, false);
        bool good = safetensors_write(file_path, tensors, RANDOM_TENSORS, NULL, 0, &e)
                 && safetensors_open(&f, file_path, &e);
        for (int k = 0; k < RANDOM_TENSORS; k++) {
            same += good && same_tensor(&f, &tensors[k], k);
            free((void*)tensors[k].data);
        }
        if (good) safetensors_close(&f);
    }
    largest_write = 0;
    check(same == RANDOM_FILES * RANDOM_TENSORS, "%d of 1000 random tensors come back, in order (%s)", same,
          e.text);
    check(empty > 50 && scalar > 50, "among them %d empty and %d scalar", empty, scalar);
}

static void test_text_round_trip(void) {
    Error e;
    SafeFile f;
    float one = 1;
    SafeOut tensors[2];
    SafePair pairs[3];
    const char* text = "\"quoted\" back\\slash \x01\x1f\x7f\n\t caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80";
    tensors[0] = out_of("a \"b\" \n \xf0\x9f\x98\x80", SAFE_F32, &one, 0, 0, 0);
    tensors[1] = out_of("", SAFE_F32, &one, 0, 0, 0);
    pairs[0] = pair_of("text", text);
    pairs[1] = pair_of("digest", "a copied one");
    pairs[2] = pair_of("broken", "\xff" "a\xc0\x80\xed\xa0\x80\xe2\x82");
    bool good = safetensors_write(file_path, tensors, 2, pairs, 3, &e) && safetensors_open(&f, file_path, &e);
    if (!check(good, "names and metadata with every kind of character")) return;
    check(safetensors_find(&f, tensors[0].name) && safetensors_find(&f, ""), "names come back");
    check(strcmp(safetensors_meta(&f, "text"), text) == 0, "metadata come back");
#define LOST "\xef\xbf\xbd"
    check(strcmp(safetensors_meta(&f, "broken"), LOST "a" LOST LOST LOST LOST LOST LOST LOST) == 0,
          "bytes that are not UTF-8 become U+FFFD");
    check(f.metadata_count == 5, "copied digests are left out");
    safetensors_close(&f);
}

static void test_many(void) {
    enum { MANY = 1000 };
    static SafeOut tensors[MANY];
    static char names[MANY][32];
    static float values[MANY];
    Error e;
    SafeFile f;
    int found = 0;
    for (int i = 0; i < MANY; i++) {
        snprintf(names[i], sizeof names[i], "h.%d.weight", (i * 7919) % MANY);
        values[i] = (float)i;
        tensors[i] = out_of(names[i], SAFE_F32, &values[i], 1, 1, 0);
    }
    bool good = safetensors_write(file_path, tensors, MANY, NULL, 0, &e);
    if (!check(good && safetensors_open(&f, file_path, &e), "1000 tensors")) return;
    for (int i = 0; i < MANY; i++) {
        float value;
        const SafeTensor* t = safetensors_find(&f, names[i]);
        found += t && safetensors_read_f32(&f, t, &value, &e) && value == values[i];
    }
    safetensors_close(&f);
    check(found == MANY, "%d of 1000 found by name", found);
    strcpy(names[5], names[900]);
    check(!safetensors_write(other_path, tensors, MANY, NULL, 0, &e) && is_line(e.text, other_path)
          && !exists(other_path), "the writer refuses a name twice: %s", e.text);
}

// ------------------------------------------------------------------------------------------------
// Damage

static void test_flipped_bits(void) {
    Error e;
    SafeFile f;
    size_t bytes;
    int missed = 0, misnamed = 0, unlined = 0;
    if (!write_small(file_path, "12", &e) || !safetensors_open(&f, file_path, &e)) die("%s", e.text);
    char* data = load_bytes(file_path, &bytes);
    int file = open(file_path, O_WRONLY);
    for (size_t i = 0; i < bytes; i++) {
        for (int bit = 0; bit < 8; bit++) {
            char flipped = (char)(data[i] ^ 1 << bit);
            if (pwrite(file, &flipped, 1, (off_t)i) != 1) die("%s: cannot be changed", file_path);
            e.text[0] = 0;
            if (whole(file_path, &e)) missed++;
            if (!is_line(e.text, file_path)) unlined++;
            for (int k = 0; k < f.tensor_count; k++) {
                const SafeTensor* t = &f.tensors[k];
                if (i >= t->offset && i < t->offset + t->bytes && !strstr(e.text, t->name)) misnamed++;
            }
        }
        if (pwrite(file, &data[i], 1, (off_t)i) != 1) die("%s: cannot be changed", file_path);
    }
    check(whole(file_path, &e), "and the file is whole when all are put back");
    close(file);
    check(missed == 0, "each of %zu bits flipped is found (%d missed)", bytes * 8, missed);
    check(misnamed == 0, "a flipped bit of data names its tensor (%d do not)", misnamed);
    check(unlined == 0, "each time with one line that starts with the file (%d not)", unlined);
    safetensors_close(&f);
    free(data);
}

static void test_lengths(void) {
    Error e;
    size_t bytes;
    int missed = 0;
    if (!write_small(file_path, "12", &e)) die("%s", e.text);
    char* data = load_bytes(file_path, &bytes);
    for (size_t length = bytes; length-- > 0;)
        missed += truncate(file_path, (off_t)length) || whole(file_path, &e) || !is_line(e.text, file_path);
    check(missed == 0, "truncated at each of %zu lengths: refused (%d missed); %s", bytes, missed, e.text);
    char* longer = (char*)allocate(bytes + 1, 1);
    memcpy(longer, data, bytes);
    save_bytes(other_path, longer, bytes + 1);
    check(!whole(other_path, &e) && is_line(e.text, other_path), "one byte appended: %s", e.text);
    free(longer);
    free(data);
}

static void test_shrinking(void) {
    Error e;
    SafeFile f;
    if (!write_small(file_path, "12", &e) || !safetensors_open(&f, file_path, &e)) die("%s", e.text);
    check(truncate(file_path, 500) == 0 && !safetensors_verify(&f, &e) && is_line(e.text, file_path),
          "a file that shrinks while open: %s", e.text);
    safetensors_close(&f);
}

// A file made by hand: header and zeros for data.
static bool parse_text(const char* header, uint64_t data_bytes, SafeFile* f, Error* e) {
    memset(f, 0, sizeof *f);
    f->path = "file";
    return safetensors_parse(f, header, strlen(header), 8 + strlen(header) + data_bytes, e);
}

static void refused(const char* what, const char* header, uint64_t data_bytes, const char* expected) {
    SafeFile f;
    Error e;
    bool good = parse_text(header, data_bytes, &f, &e);
    if (good) snprintf(e.text, sizeof e.text, "accepted");
    check(!good && is_line(e.text, "file: ") && strstr(e.text, expected) && !f.strings && !f.tensor_count,
          "%s: %s", what, e.text);
    safetensors_close(&f);
}

static void accepted(const char* what, const char* header, uint64_t data_bytes, const char* name) {
    SafeFile f;
    Error e;
    bool good = parse_text(header, data_bytes, &f, &e);
    if (good) e.text[0] = 0;
    check(good && (!name || safetensors_find(&f, name)), "%s %s", what, e.text);
    safetensors_close(&f);
}

#define ENTRY(dtype, shape, offsets) \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define ONE(dtype, shape, offsets) "{\"a\":" ENTRY(dtype, shape, offsets) "}"
#define A(offsets) ENTRY("F32", "[1]", offsets)

static void test_refused_tensors(void) {
    refused("shape and bytes differ", ONE("F32", "[2]", "[0,4]"), 4, "need 8");
    refused("dtype and bytes differ", ONE("BF16", "[1]", "[0,4]"), 4, "need 2");
    refused("product overflows", ONE("F32", "[4294967296,4294967296]", "[0,0]"), 0, "2^64");
    refused("product with bits overflows", ONE("F64", "[1152921504606846976]", "[0,0]"), 0, "2^64");
    refused("overflow beside a zero", ONE("F32", "[0,4294967296,4294967296]", "[0,0]"), 0, "2^64");
    refused("a number beyond 64 bits", ONE("F32", "[18446744073709551616]", "[0,0]"), 0, "beyond");
    refused("a negative size", ONE("F32", "[-1]", "[0,0]"), 0, "not negative");
    refused("a fraction", ONE("F32", "[1.0]", "[0,4]"), 4, "expected , or ]");
    refused("an exponent", ONE("F32", "[1e0]", "[0,4]"), 4, "expected , or ]");
    refused("a leading zero", ONE("F32", "[01]", "[0,4]"), 4, "leading zero");
    refused("nine dimensions", ONE("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "more than 8");
    refused("backwards", ONE("F32", "[1]", "[4,0]"), 4, "lies at");
    refused("end behind the file", ONE("F32", "[1]", "[0,4]"), 3, "truncated");
    refused("end at 2^64", ONE("F32", "[1]", "[18446744073709551612,18446744073709551615]"), 4, "lies at");
    refused("data behind the last tensor", ONE("F32", "[1]", "[0,4]"), 5, "tensors end at");
    refused("data without tensors", "{}", 1, "tensors end at");
    refused("starts with a hole", ONE("F32", "[1]", "[4,8]"), 8, "a gap");
    refused("a hole", "{\"a\":" A("[0,4]") ",\"b\":" A("[8,12]") "}", 12, "a gap");
    refused("an overlap", "{\"a\":" A("[0,4]") ",\"b\":" A("[2,6]") "}", 6, "overlap");
    refused("the same bytes twice", "{\"a\":" A("[0,4]") ",\"b\":" A("[0,4]") "}", 4, "overlap");
    refused("a name twice", "{\"a\":" A("[0,4]") ",\"a\":" A("[4,8]") "}", 8, "\"a\" twice");
    refused("a name twice, escaped", "{\"a\":" A("[0,4]") ",\"\\u0061\":" A("[4,8]") "}", 8, "\"a\" twice");
    refused("an unknown dtype \"F33\"", ONE("F33", "[1]", "[0,4]"), 4, "unknown dtype");
    refused("a long dtype", ONE("F32                    ", "[1]", "[0,4]"), 4, "unknown dtype");
    refused("half a byte", ONE("F4", "[3]", "[0,1]"), 1, "need 2");
    refused("no shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "without");
    refused("dtype twice", "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 4, "key twice");
    refused("another key", "{\"a\":{\"dtypes\":\"F32\"}}", 4, "besides");
    refused("a long key", "{\"a\":{\"dtypedtypedtypedtypedtype\":\"F32\"}}", 4, "besides");
    refused("three offsets", ONE("F32", "[1]", "[0,4,4]"), 4, "begin, end");
    refused("a name to break the line", "{\"\\n\\r\\u001b[31m\":{\"dtype\":\"X\"}}", 0, "unknown dtype");
}

static void test_refused_json(void) {
    refused("nothing", "", 0, "does not start with {");
    refused("space first", " {}", 0, "does not start with {");
    refused("an array", "[]", 0, "does not start with {");
    refused("not closed", "{", 0, "expected a string");
    refused("comma at the end", "{\"a\":" A("[0,4]") ",}", 4, "expected a string");
    refused("no colon", "{\"a\" " A("[0,4]") "}", 4, "expected :");
    refused("text behind", "{} x", 0, "behind the last }");
    refused("two objects", "{}{}", 0, "behind the last }");
    refused("a bad escape", "{\"\\x\":" A("[0,4]") "}", 4, "unknown escape");
    refused("an escape cut off", "{\"\\", 0, "escape");
    refused("bad hex", "{\"\\u12g4\":" A("[0,4]") "}", 4, "hexadecimal");
    refused("hex cut off", "{\"\\u12", 0, "hexadecimal");
    refused("NUL by escape", "{\"\\u0000\":" A("[0,4]") "}", 4, "u0000");
    refused("half a pair", "{\"\\ud83d\":" A("[0,4]") "}", 4, "surrogate");
    refused("a pair of first halves", "{\"\\ud83d\\ud83d\":" A("[0,4]") "}", 4, "surrogate");
    refused("second half alone", "{\"\\ude00\":" A("[0,4]") "}", 4, "surrogate");
    refused("a control character", "{\"a\nb\":" A("[0,4]") "}", 4, "control character");
    refused("not UTF-8", "{\"\xff\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 too long", "{\"\xc0\x80\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 too long, 3 bytes", "{\"\xe0\x9f\xbf\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 too long, 4 bytes", "{\"\xf0\x8f\xbf\xbf\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 of half a pair", "{\"\xed\xa0\x80\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 beyond Unicode", "{\"\xf4\x90\x80\x80\":" A("[0,4]") "}", 4, "UTF-8");
    refused("UTF-8 cut off", "{\"\xe2\x82", 0, "UTF-8");
    refused("an array for a tensor", "{\"a\":[]}", 0, "expected {");
    refused("metadata not strings", "{\"__metadata__\":{\"a\":1}}", 0, "expected a string");
    refused("metadata nested", "{\"__metadata__\":{\"a\":{}}}", 0, "expected a string");
    refused("metadata null", "{\"__metadata__\":null}", 0, "__metadata__");
    refused("metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ twice");
    refused("a key of the metadata twice", "{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0, "\"a\" twice");
    refused("__metadata__ as a tensor", "{\"__metadata__\":" A("[0,4]") "}", 4, "expected");
    char name[300];
    snprintf(name, sizeof name, "{\"%0100d\\n\\u0001%0100d\":{\"dtype\":\"X\"}}", 0, 0);
    for (int i = 60; i < 80; i++) {         // the name in the message ends in every place of an escape
        memcpy(name + i, "\\u0001\\u0002", 12);
        refused("a long name", name, 0, "...\" has the unknown dtype");
        memset(name + i, '0', 12);
    }
    static char deep[10016] = "{\"a\":";
    memset(deep + 5, '[', 10000);
    refused("10000 brackets", deep, 0, "expected {");
    SafeFile f;
    Error e;
    f.path = "file";
    bool nul = safetensors_parse(&f, "{\"a\0\":1}", 8, 16, &e);
    check(!nul && strstr(e.text, "control character"), "a NUL in a name: %s", e.text);
    f.path = "file";
    nul = safetensors_parse(&f, "{}\0\0", 4, 12, &e);
    check(!nul && strstr(e.text, "behind"), "NULs behind the header: %s", e.text);
}

static void test_accepted(void) {
    accepted("no tensors", "{}", 0, NULL);
    accepted("padding", "{}   \n", 0, NULL);
    accepted("space everywhere",
             "{ \"a\" : { \"dtype\" :\t\"F32\" , \"shape\" : [ 1 ] ,\r\n \"data_offsets\" : [ 0 , 4 ] } }", 4,
             "a");
    accepted("keys in any order", "{\"a\":{\"data_offsets\":[0,4],\"shape\":[],\"dtype\":\"F32\"}}", 4, "a");
    accepted("tensors in another order", "{\"b\":" A("[4,8]") ",\"a\":" A("[0,4]") "}", 8, "b");
    accepted("metadata last", "{\"a\":" A("[0,4]") ",\"__metadata__\":{\"k\":\"v\"}}", 4, "a");
    accepted("escapes", "{\"\\ud83d\\ude00\\u00e9\\/\\b\\u000A\":" A("[0,4]") "}", 4,
             "\xf0\x9f\x98\x80\xc3\xa9/\b\n");
    accepted("a dtype that is not read", ONE("F64", "[2]", "[0,16]"), 16, "a");
    accepted("two half bytes", ONE("F4", "[2]", "[0,1]"), 1, "a");
    accepted("eight dimensions", ONE("U8", "[1,1,1,1,1,1,1,2]", "[0,2]"), 2, "a");
    accepted("empty with a large size", ONE("F32", "[4294967296,0]", "[0,0]"), 0, "a");
    accepted("empty ones between",
             "{\"a\":" A("[0,4]") ",\"c\":" A("[4,8]") ",\"b\":" ENTRY("F32", "[0]", "[4,4]") "}", 8, "b");
}

static void test_header_length(void) {
    Error e;
    SafeFile f;
    static const uint64_t lengths[] = {9, 100000001, UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63};
    for (int i = 0; i < 5; i++) {
        char data[] = "12345678{}      ";
        memcpy(data, &lengths[i], 8);
        save_bytes(other_path, data, 16);
        check(!safetensors_open(&f, other_path, &e) && is_line(e.text, other_path), "%s", e.text);
    }
    f.path = "file";
    bool good = safetensors_parse(&f, NULL, 100000001, (uint64_t)1 << 40, &e);
    check(!good && is_line(e.text, "file: "), "a header beyond 100 MB is not looked at");
    f.path = "file";
    good = safetensors_parse(&f, "{}       ", 9, 16, &e);
    check(!good && strstr(e.text, "9 promised"), "one byte of header too many: %s", e.text);
}

static void test_not_files(void) {
    Error e;
    SafeFile f;
    char path[128];
    check(!safetensors_open(&f, folder, &e) && strstr(e.text, "a directory"), "%s", e.text);
    snprintf(path, sizeof path, "%s/none", folder);
    check(!safetensors_open(&f, path, &e) && strstr(e.text, "No such file"), "%s", e.text);
    save_bytes(other_path, "", 0);
    check(!safetensors_open(&f, other_path, &e) && strstr(e.text, "0 bytes"), "%s", e.text);
    save_bytes(other_path, "Hello, this is a text file.", 27);
    check(!safetensors_open(&f, other_path, &e) && strstr(e.text, "not a safetensors file"), "%s", e.text);
    snprintf(path, sizeof path, "%s/pipe", folder);
    if (mkfifo(path, 0600) != 0) die("%s: cannot be made", path);
    check(!safetensors_open(&f, path, &e) && strstr(e.text, "not a file"), "%s", e.text);
    unlink(path);
}

// A header of nothing but the smallest entries is where parsing takes the most memory.
static char* smallest_entries(bool metadata, size_t* bytes) {
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    char* header = NULL;
    FILE* out = open_memstream(&header, bytes);
    fputs(metadata ? "{\"__metadata__\":{" : "{", out);
    for (int i = 0; i < 20000; i++) {
        if (i > 0) fputc(',', out);
        fprintf(out, "\"%c%c%c\":", digits[i % 62], digits[i / 62 % 62], digits[i / 3844]);
        fputs(metadata ? "\"\"" : ENTRY("F4", "[0]", "[0,0]"), out);
    }
    fputs(metadata ? "}}" : "}", out);
    fclose(out);
    return header;
}

static void test_memory(void) {
    for (int metadata = 0; metadata < 2; metadata++) {
        Error e;
        SafeFile f;
        size_t bytes;
        char* header = smallest_entries(metadata, &bytes);
        f.path = "file";
        largest_block = all_blocks = 0;
        bool good = safetensors_parse(&f, header, bytes, 8 + bytes, &e);
        double largest = (double)largest_block / (double)bytes, all = (double)all_blocks / (double)bytes;
        check(good && largest <= 2 && all <= 2.5, "20000 small %s: %.2f headers in one block, %.2f in all",
              metadata ? "pairs" : "tensors", largest, all);
        safetensors_close(&f);
        free(header);
    }
}

// ------------------------------------------------------------------------------------------------
// Digests and numbers

static void test_digest(void) {
    unsigned char data[200];
    int missed = 0, split = 0;
    for (int i = 0; i < 200; i++) data[i] = (unsigned char)draw(256);
    for (size_t bytes = 0; bytes <= 200; bytes++) {
        Digest d = digest_begin();
        digest_add(&d, data, bytes);
        uint64_t whole_digest = digest_end(&d);
        d = digest_begin();
        for (size_t at = 0; at < bytes;) {
            size_t piece = 1 + (size_t)draw(bytes - at);
            digest_add(&d, data + at, piece);
            at += piece;
        }
        split += digest_end(&d) != whole_digest;
        for (size_t bit = 0; bit < bytes * 8; bit++) {
            data[bit / 8] ^= (unsigned char)(1 << bit % 8);
            d = digest_begin();
            digest_add(&d, data, bytes);
            missed += digest_end(&d) == whole_digest;
            data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        }
    }
    check(missed == 0, "the digest sees each bit of up to 200 bytes (%d missed)", missed);
    check(split == 0, "and does not depend on how data are cut (%d differ)", split);
    Digest d = digest_begin();
    digest_add(&d, "The same digest for ever: files depend on it.", 45);
    uint64_t digest = digest_end(&d);
    check(digest == 0x4eab1f773a546975u, "a known digest, %016llx", (unsigned long long)digest);
}

// A header whose digest of itself is right, so that only the other promises are looked at.
static void with_digest(const char* what, const char* format, const char* expected) {
    char header[512], digits[17];
    snprintf(header, sizeof header, format, "0000000000000000");
    snprintf(digits, sizeof digits, "%016llx",
             (unsigned long long)digest_header(header, strlen(header), strstr(header, "0000000000000000")));
    memcpy(strstr(header, "0000000000000000"), digits, 16);
    if (expected) refused(what, header, 4, expected);
    else accepted(what, header, 4, "a");
}

static void test_digest_promises(void) {
#define META "{\"__metadata__\":{\"digest\":\"%s\""
    with_digest("both digests", META ",\"digest.a\":\"0123456789abcdef\"},\"a\":" A("[0,4]") "}", NULL);
    with_digest("a tensor without", META "},\"a\":" A("[0,4]") "}", "\"a\" has no digest");
    with_digest("another's", META ",\"digest.b\":\"0123456789abcdef\"},\"a\":" A("[0,4]") "}", "no digest");
    with_digest("in capitals", META ",\"digest.a\":\"0123456789ABCDEF\"},\"a\":" A("[0,4]") "}", "no digest");
    with_digest("text after", META ",\"digest.a\":\"0123456789abcdefg\"},\"a\":" A("[0,4]") "}", "no digest");
    with_digest("too long", META ",\"digest.a\":\"0123456789abcdef0\"},\"a\":" A("[0,4]") "}", "no digest");
    refused("no header's", "{\"__metadata__\":{\"digest.a\":\"0123456789abcdef\"},\"a\":" A("[0,4]") "}", 4,
            "none of its header");
    refused("a wrong one", "{\"__metadata__\":{\"digest\":\"0123456789abcdef\"}}", 0, "does not match");
    refused("a short one", "{\"__metadata__\":{\"digest\":\"0123456789abcde\"}}", 0, "16 digits");
    refused("an escaped one", "{\"__metadata__\":{\"digest\":\"\\u003012345678abcdef\"}}", 0, "16 digits");
}

static double value_of(unsigned bits, int exponent_bits, int fraction_bits) {
    int exponent = (int)(bits >> fraction_bits & ((1u << exponent_bits) - 1));
    int bias = (1 << (exponent_bits - 1)) - 1;
    double fraction = (double)(bits & ((1u << fraction_bits) - 1)), sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp(fraction + (double)(1 << fraction_bits), exponent - bias - fraction_bits);
}

static void test_halves(const char* dtype, int exponent_bits, int fraction_bits) {
    enum { ALL = 65536 };
    static uint16_t halves[ALL];
    static float values[ALL];
    static char data[8 + 128 + 2 * ALL];
    char header[129];
    Error e;
    SafeFile f;
    int wrong = 0;
    for (int i = 0; i < ALL; i++) halves[i] = (uint16_t)i;
    snprintf(header, sizeof header, "%-128s", "");
    int used = snprintf(header, sizeof header,
                        "{\"a\":{\"dtype\":\"%s\",\"shape\":[65536],\"data_offsets\":[0,131072]}}", dtype);
    header[used] = ' ';
    uint64_t length = 128;
    memcpy(data, &length, 8);
    memcpy(data + 8, header, 128);
    memcpy(data + 136, halves, sizeof halves);
    save_bytes(other_path, data, sizeof data);
    bool good = safetensors_open(&f, other_path, &e) && !f.digested && safetensors_verify(&f, &e)
             && safetensors_read_f32(&f, safetensors_find(&f, "a"), values, &e);
    if (!check(good, "a file of %s without digests is read", dtype)) return;
    safetensors_close(&f);
    for (int i = 0; i < ALL; i++) {
        double expected = value_of((unsigned)i, exponent_bits, fraction_bits);
        bool same = expected != expected ? values[i] != values[i] : (double)values[i] == expected;
        wrong += !same || !signbit(values[i]) != !(i >> 15);
    }
    check(wrong == 0, "all 65536 values of %s (%d wrong)", dtype, wrong);
}

// ------------------------------------------------------------------------------------------------
// Writing when things go wrong

static int start_over(void) {
    Error e;
    unlink(file_path);
    unlink(tmp_path);
    expect_calls(0, false);
    if (!write_small(file_path, "old", &e)) die("%s", e.text);
    return call_count;
}

static void test_write_order(void) {
    int count = start_over();
    check(strspn(calls, "w") == (size_t)count - 3 && strcmp(calls + count - 3, "frd") == 0,
          "writes, fsync, rename, fsync of the directory: %s", calls);
}

static void test_left_over(void) {
    static char junk[5000];
    Error e;
    save_bytes(tmp_path, junk, sizeof junk);
    expect_calls(0, false);
    bool good = write_small(file_path, "new", &e) && small_is(file_path, "new");
    check(good, "a left-over temporary file is no harm");
}

static void test_write_failures(void) {
    Error e;
    int count = start_over(), wrong = 0;
    for (int k = 1; k <= count; k++) {
        start_over();
        expect_calls(k, false);
        bool good = write_small(file_path, "new", &e), renamed = k == count;    // only not flushed
        if (good || !is_line(e.text, file_path) || !strstr(e.text, "No space left")) wrong++;
        if (exists(tmp_path) || !small_is(file_path, renamed ? "new" : "old")) wrong++;
        if (k == 1) check(true, "a full disk says: %s", e.text);
    }
    check(wrong == 0, "any of %d calls fails: the old file is whole and alone (%d wrong)", count, wrong);
}

static void test_crashes(void) {
    int count = start_over(), wrong = 0, status;
    for (int k = 1; k <= count; k++) {
        Error e;
        start_over();
        expect_calls(k, true);
        pid_t child = fork();
        if (child == 0) _exit(write_small(file_path, "new", &e) ? 0 : 1);
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 9) wrong++;
        if (!small_is(file_path, k == count ? "new" : "old")) wrong++;
        expect_calls(0, false);
        if (!write_small(file_path, "next", &e) || !small_is(file_path, "next") || exists(tmp_path)) wrong++;
    }
    check(wrong == 0, "a crash in any of %d calls leaves the old or the new file (%d wrong)", count, wrong);
}

static void test_size_limit(void) {
    static const int limits[] = {0, 1, 300, 800};
    int wrong = 0, status;
    for (int i = 0; i < 4; i++) {
        start_over();
        pid_t child = fork();
        if (child == 0) {
            Error e;
            static float large[1000];
            SafeOut t = out_of("large", SAFE_F32, large, 1, 1000, 0);
            struct rlimit limit;
            limit.rlim_cur = limit.rlim_max = (rlim_t)limits[i];
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &limit);
            bool good = safetensors_write(file_path, &t, 1, NULL, 0, &e);
            _exit(!good && strstr(e.text, "File too large") ? 0 : 1);
        }
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) wrong++;
        if (!small_is(file_path, "old") || exists(tmp_path)) wrong++;
    }
    check(wrong == 0, "under a limit of the file size the old file stays and no other (%d wrong)", wrong);
}

static void test_bad_places(void) {
    Error e;
    char path[128], inside[160];
    snprintf(path, sizeof path, "%s/none/x", folder);
    check(!write_small(path, "1", &e) && is_line(e.text, path), "%s", e.text);
    snprintf(path, sizeof path, "%s/sub", folder);
    snprintf(inside, sizeof inside, "%s.tmp", path);
    mkdir(path, 0700);
    check(!write_small(path, "1", &e) && is_line(e.text, path) && !exists(inside), "%s", e.text);
    mkdir(inside, 0700);
    check(!write_small(path, "1", &e) && is_line(e.text, path) && exists(inside), "%s", e.text);
    rmdir(inside);
    rmdir(path);
    int here = open(".", O_RDONLY | O_DIRECTORY);
    bool good = here >= 0 && chdir(folder) == 0 && write_small("bare", "1", &e) && small_is("bare", "1");
    unlink("bare");
    check(good && fchdir(here) == 0, "a name without a directory");
    close(here);
}

int main(void) {
    snprintf(folder, sizeof folder, "/tmp/test_safetensors.XXXXXX");
    if (!mkdtemp(folder)) die("/tmp: no place for a temporary directory");
    snprintf(file_path, sizeof file_path, "%s/file", folder);
    snprintf(tmp_path, sizeof tmp_path, "%s.tmp", file_path);
    snprintf(other_path, sizeof other_path, "%s/other", folder);
    test_small();
    test_random_shapes();
    test_text_round_trip();
    test_many();
    test_flipped_bits();
    test_lengths();
    test_shrinking();
    test_refused_tensors();
    test_refused_json();
    test_accepted();
    test_header_length();
    test_not_files();
    test_memory();
    test_digest();
    test_digest_promises();
    test_halves("F16", 5, 10);
    test_halves("BF16", 8, 7);
    test_write_order();
    test_left_over();
    test_write_failures();
    test_crashes();
    test_size_limit();
    test_bad_places();
    unlink(file_path);
    unlink(other_path);
    check(rmdir(folder) == 0, "nothing is left behind");
    return check_summary();
}
