// test_tokens.c: windows of texts and shards, the order of epochs, and what is refused.

#include "tokens.h"
#include "../host/check.h"

enum { T = 8 };

static char folder[] = "/tmp/test_tokens_XXXXXX";

// The path of a file in the test's folder; valid for three more calls.
static const char* in_folder(const char* name) {
    static char paths[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

static void write_file(const char* path, const void* bytes, size_t size) {
    FILE* file = fopen(path, "wb");
    bool good = file && fwrite(bytes, 1, size, file) == size;
    if (!good || fclose(file) != 0) die("%s: cannot be written", path);
}

static void put32(uint8_t* at, uint32_t value) {
    for (int k = 0; k < 4; k++) at[k] = (uint8_t)(value >> 8 * k);
}

// A shard whose token k is (first + k) mod vocab. Returns the path.
static const char* write_shard(const char* name, uint32_t magic, uint32_t version, uint32_t count,
                               uint32_t first, uint32_t vocab) {
    size_t width = magic == 20240520 ? 2 : 4, size = SHARD_HEADER + count * width;
    uint8_t* bytes = (uint8_t*)allocate(size, 1);
    put32(bytes, magic);
    put32(bytes + 4, version);
    put32(bytes + 8, count);
    for (uint32_t k = 0; k < count; k++)
        for (size_t b = 0; b < width; b++)
            bytes[SHARD_HEADER + k * width + b] = (uint8_t)((first + k) % vocab >> 8 * b);
    const char* path = in_folder(name);
    write_file(path, bytes, size);
    free(bytes);
    return path;
}

// A tokenizer: the 256 bytes, "ab", an end-of-text token; if wide, more than 16 bits can number.
static void make_bpe(Bpe* bpe, bool wide) {
    uint32_t vocab = wide ? 70000 : 258;
    uint8_t* file = (uint8_t*)allocate(BPE_HEADER + 8 * (size_t)vocab, 1);
    size_t size = BPE_HEADER;
    put32(file, BPE_MAGIC);
    put32(file + 4, 2);
    put32(file + 8, vocab);
    put32(file + 12, 257);
    for (uint32_t k = 0; k < 256; k++, size += 2) {
        file[size] = 1;
        file[size + 1] = (uint8_t)k;
    }
    memcpy(file + size, "\2ab\3eot", 7);
    size += 7;
    for (uint32_t k = 258; k < vocab; k++, size += 5) {         // no parts of these are tokens: never used
        file[size] = 4;
        put32(file + size + 1, k);
    }
    Error e;
    if (!bpe_parse(bpe, file, size, &e)) die("test tokenizer: %s", e.text);
    free(file);
}

// ------------------------------------------------------------------------------------------------
// Texts.

static bool is_window(const uint8_t* text, uint64_t start, const int32_t* inputs, const int32_t* targets) {
    for (uint64_t k = 0; k < T; k++)
        if (inputs[k] != text[start + k] || targets[k] != text[start + k + 1]) return false;
    return true;
}

static void test_text(void) {
    enum { SIZE = 1003 };
    uint8_t text[SIZE];
    int32_t inputs[T], targets[T];
    Tokens train, val;
    Error e;
    for (int k = 0; k < SIZE; k++) text[k] = (uint8_t)(mix64((uint64_t)k) % 200);
    text[903 + 5] = 255;
    write_file(in_folder("text.txt"), text, SIZE);
    bool opened = tokens_open_text(&train, &val, in_folder("text.txt"), NULL, &e);
    if (!check(opened, "a text is opened")) return;
    check(tokens_count(&train) == 903 && tokens_count(&val) == 100, "the last tenth is for validation");
    check(tokens_default_vocab(&train) == 256 && tokens_default_vocab(&val) == 256, "bytes: vocabulary 256");
    check(tokens_resident_bytes(&train) + tokens_resident_bytes(&val) == SIZE, "both share one buffer");

    bool good = true, reached_end = false;
    for (uint64_t g = 0; g < 5000; g++) {
        uint64_t start = hash64(7, g) % (903 - T);
        reached_end = reached_end || start == 903 - T - 1;
        good = good && tokens_train_window(&train, 7, g, T, 256, inputs, targets, &e)
               && is_window(text, start, inputs, targets);
    }
    check(good && reached_end, "training windows start at hash(seed, g) mod (N-T), up to the last possible");
    good = tokens_val_windows(&val, T) == 12;           // floor(99 / 8)
    for (uint64_t w = 0; w < 12; w++)
        good = good && tokens_val_window(&val, w, T, 256, inputs, targets, &e)
               && is_window(text, 903 + w * T, inputs, targets);
    check(good, "validation windows follow one another");

    Tokens memory_train, memory_val, whole;
    tokens_from_memory(&memory_train, &memory_val, text, SIZE);
    check(memory_train.text == text && memory_val.text == text + 903
          && tokens_fingerprint(&memory_train) == tokens_fingerprint(&train), "memory is borrowed");
    tokens_close(&memory_val);
    tokens_close(&memory_train);
    check(tokens_open_text(&whole, NULL, in_folder("text.txt"), NULL, &e) && tokens_count(&whole) == SIZE,
          "without a validation part the whole text is one");
    tokens_close(&whole);

    text[500] ^= 1;
    write_file(in_folder("text.txt"), text, SIZE);
    uint64_t before = tokens_fingerprint(&train);
    tokens_close(&val);
    tokens_close(&train);
    opened = tokens_open_text(&train, &val, in_folder("text.txt"), NULL, &e);
    check(opened && tokens_fingerprint(&train) != before, "another byte, another fingerprint");
    check(tokens_val_window(&val, 1, T, 200, inputs, targets, &e)
          && !tokens_val_window(&val, 0, T, 200, inputs, targets, &e)
          && strstr(e.text, "text.txt: token 255 at position 908,"), "a token beyond --vocab: %s", e.text);
    tokens_close(&val);
    tokens_close(&train);
}

static void test_text_bpe(bool wide) {
    const char* text = "abab abcab xab ba";
    Bpe bpe;
    Tokens train, val;
    Error e;
    make_bpe(&bpe, wide);
    write_file(in_folder("bpe.txt"), text, strlen(text));
    bool good = tokens_open_text(&train, &val, in_folder("bpe.txt"), &bpe, &e);
    int32_t expected[32], inputs[T], targets[T];
    size_t count = bpe_encode(&bpe, (const uint8_t*)text, strlen(text), expected);
    good = good && count == 12 && tokens_count(&train) == 11 && tokens_count(&val) == 1;
    good = good && tokens_default_vocab(&train) == (wide ? 70000 : 258) && train.width == (wide ? 4 : 2);
    uint64_t start = hash64(3, 4) % (11 - T);
    good = good && tokens_train_window(&train, 3, 4, T, 70000, inputs, targets, &e);
    good = good && memcmp(inputs, expected + start, sizeof inputs) == 0
           && memcmp(targets, expected + start + 1, sizeof targets) == 0;
    check(good, "a text through a tokenizer of %d tokens, %d bytes each", bpe_vocab(&bpe), train.width);
    tokens_close(&val);
    tokens_close(&train);
    bpe_close(&bpe);
}

// ------------------------------------------------------------------------------------------------
// Shards.

// Three shards with windows of T tokens: 4, 0 and 7. Token k of all is k, over the shards' borders.
static void test_shards(uint32_t magic, uint32_t version, int vocab) {
    const uint32_t counts[] = {33 + 7, 8, 57}, firsts[] = {0, 40, 48}, windows[] = {4, 0, 7};
    Tokens t;
    Error e;
    int32_t inputs[T], targets[T];
    for (uint32_t k = 0; k < 3; k++) {
        char name[32];
        snprintf(name, sizeof name, "s%u_%u.bin", magic, k);
        write_shard(name, magic, version, counts[k], firsts[k] + 300, (uint32_t)vocab);
    }
    char pattern[32];
    snprintf(pattern, sizeof pattern, "s%u_*.bin", magic);
    if (!check(tokens_open_shards(&t, in_folder(pattern), &e), "shards %u are opened", magic)) return;
    check(t.shard_count == 3 && tokens_count(&t) == 105 && tokens_default_vocab(&t) == vocab,
          "three of them, 105 tokens, vocabulary %d", tokens_default_vocab(&t));
    bool good = tokens_val_windows(&t, T) == 11;
    uint64_t w = 0;
    for (uint32_t k = 0; k < 3; k++)
        for (uint32_t j = 0; j < windows[k]; j++, w++) {
            good = good && tokens_val_window(&t, w, T, vocab, inputs, targets, &e);
            for (int i = 0; i < T && good; i++) {
                int32_t token = (int32_t)(firsts[k] + 300 + j * T) + i;
                good = inputs[i] == token && targets[i] == token + 1;
            }
        }
    check(good, "validation goes through all windows in order, none crosses a border");

    bool same_order = true, all_good = true;
    int first_epoch[11] = {0};
    for (uint64_t epoch = 0; epoch < 20; epoch++) {
        int seen[200] = {0};
        for (uint64_t k = 0; k < 11; k++) {
            all_good = all_good && tokens_train_window(&t, 1, epoch * 11 + k, T, vocab, inputs, targets, &e);
            seen[inputs[0] - 300]++;
            if (epoch == 0) first_epoch[k] = inputs[0];
            else same_order = same_order && first_epoch[k] == inputs[0];
        }
        for (int k = 0; k < 4; k++) all_good = all_good && seen[k * T] == 1;
        for (int k = 0; k < 7; k++) all_good = all_good && seen[48 + k * T] == 1;
    }
    check(all_good, "every epoch visits every window once");
    check(!same_order, "in an order of its own");
    uint64_t fingerprint = tokens_fingerprint(&t);
    check(!tokens_val_window(&t, 0, T, 305, inputs, targets, &e)
          && strstr(e.text, "token 305 at position 5,"), "a token beyond --vocab: %s", e.text);
    tokens_close(&t);
    snprintf(pattern, sizeof pattern, "s%u_1.bin", magic);
    write_shard(pattern, magic, version, 8, 1, (uint32_t)vocab);
    snprintf(pattern, sizeof pattern, "s%u_*.bin", magic);
    check(tokens_open_shards(&t, in_folder(pattern), &e) && tokens_fingerprint(&t) != fingerprint,
          "other tokens, another fingerprint");
    tokens_close(&t);
}

static uint64_t fingerprint_of(const char* pattern) {
    Tokens t;
    Error e;
    if (!tokens_open_shards(&t, pattern, &e)) die("%s", e.text);
    uint64_t fingerprint = tokens_fingerprint(&t);
    tokens_close(&t);
    return fingerprint;
}

// Shards whose first and last page do not meet.
static void test_fingerprint(void) {
    enum { COUNT = 6000 };
    const char* path = write_shard("print_0.bin", 20240520, 1, COUNT, 0, 50257);
    uint64_t before = fingerprint_of(path);
    const long changed[] = {SHARD_HEADER, SHARD_HEADER + 2 * COUNT - 2};
    for (int k = 0; k < 2; k++) {
        write_shard("print_0.bin", 20240520, 1, COUNT, 0, 50257);
        FILE* file = fopen(path, "r+b");
        if (!file || fseek(file, changed[k], SEEK_SET) != 0) die("%s: cannot be changed", path);
        fputc(99, file);
        fclose(file);
        check(fingerprint_of(path) != before, "another %s token, another fingerprint", k ? "last" : "first");
    }
    write_shard("print_0.bin", 20240520, 1, COUNT, 0, 50257);
    check(fingerprint_of(path) == before, "the same file, the same fingerprint");
    check(fingerprint_of(write_shard("print_1.bin", 20240520, 1, COUNT, 0, 50257)) != before,
          "another name, another fingerprint");
    check(fingerprint_of(in_folder("print_*.bin")) != before, "another file, another fingerprint");
}

static void test_permutation(void) {
    bool good = true;
    int fixed = 0, falls = 0, items = 0;
    static unsigned char seen[5000];
    for (uint64_t count = 1; count < 5000; count += 1 + count / 7)
        for (uint64_t key = 0; key < 3; key++) {
            memset(seen, 0, sizeof seen);
            for (uint64_t k = 0; k < count; k++) {
                uint64_t to = tokens_permute(key, k, count);
                good = good && to < count && !seen[to < count ? to : 0];
                if (to < count) seen[to] = 1;
                if (count < 1000) continue;
                items++;
                fixed += to == k;
                falls += to < tokens_permute(key, (k + 1) % count, count);
            }
        }
    check(good, "permutations of 1 to 5000 items reach each once");
    check(items > 10000 && fixed < 60, "few items stay in place: %d of %d", fixed, items);
    check(abs(2 * falls - items) < items / 50, "half of the neighbours are swapped: %d of %d", falls, items);
    uint64_t huge = (uint64_t)1 << 40;
    good = true;
    for (uint64_t k = 0; k < 1000; k++) good = good && tokens_permute(9, huge - k, huge + 1) <= huge;
    check(good, "permutation of 2^40 + 1 items");
}

// A sparse file of 6 GB: only the last window is written.
static void test_huge(void) {
    const uint32_t count = 1500000000;
    const char* path = in_folder("huge.bin");
    uint8_t header[SHARD_HEADER] = {0}, last[4 * (T + 1)];
    put32(header, 20240801);
    put32(header + 4, 7);
    put32(header + 8, count);
    for (uint32_t k = 0; k <= T; k++) put32(last + 4 * k, 100 + k);
    uint64_t windows = (count - 1) / T, offset = SHARD_HEADER + (windows - 1) * T * 4;
    int file = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    bool good = file >= 0 && ftruncate(file, (off_t)(SHARD_HEADER + (uint64_t)count * 4)) == 0
                && pwrite(file, header, sizeof header, 0) == (ssize_t)sizeof header
                && pwrite(file, last, sizeof last, (off_t)offset) == (ssize_t)sizeof last;
    close(file);
    Tokens t;
    Error e;
    int32_t inputs[T], targets[T];
    if (!check(good && tokens_open_shards(&t, path, &e), "a shard of 6 GB (sparse) is opened")) return;
    good = tokens_val_windows(&t, T) == windows
           && tokens_val_window(&t, windows - 1, T, 128256, inputs, targets, &e);
    for (int k = 0; k < T; k++) good = good && inputs[k] == 100 + k && targets[k] == 101 + k;
    check(good && offset > UINT32_MAX, "its last window lies beyond 32 bits");
    check(tokens_resident_bytes(&t) < 1000, "and takes %zu bytes of memory", tokens_resident_bytes(&t));
    tokens_close(&t);
    unlink(path);
}

// ------------------------------------------------------------------------------------------------
// What is refused.

static void refused(const char* pattern, const char* reason) {
    Tokens t;
    Error e;
    bool opened = tokens_open_shards(&t, pattern, &e);
    bool clear = !opened && strstr(e.text, reason) && strstr(e.text, folder) && !strchr(e.text, '\n');
    check(clear, "refused: %s", opened ? pattern : e.text);
    if (opened) tokens_close(&t);
}

static void test_refusals(void) {
    refused(in_folder("missing_*.bin"), "No such file");
    refused(in_folder("missing.bin"), "No such file");
    mkdir(in_folder("dir.bin"), 0700);
    refused(in_folder("dir.bin"), "is a directory");
    write_file(in_folder("empty.bin"), "", 0);
    refused(in_folder("empty.bin"), "is empty");
    write_file(in_folder("short.bin"), "\x88\xd8\x34\x01", 4);
    refused(in_folder("short.bin"), "4 bytes");
    mkfifo(in_folder("pipe.bin"), 0600);
    refused(in_folder("pipe.bin"), "not a regular file");
    refused(write_shard("magic.bin", 20240326, 1, 50, 0, 100), "magic number 20240326");
    refused(write_shard("version.bin", 20240520, 2, 50, 0, 100), "version 2, expected 1");
    refused(write_shard("version7.bin", 20240801, 1, 50, 0, 100), "version 1, expected 7");
    refused(write_shard("none.bin", 20240520, 1, 0, 0, 100), "no tokens");
    const uint32_t value = 20240520;
    const uint32_t swapped = value >> 24 | (value >> 8 & 0xff00) | (value << 8 & 0xff0000) | value << 24;
    refused(write_shard("swapped.bin", swapped, 1, 50, 0, 100), "big-endian");
    const char* path = write_shard("cut.bin", 20240520, 1, 50, 0, 100);
    if (truncate(path, SHARD_HEADER + 99) != 0) die("truncate: %s", strerror(errno));
    refused(path, "cut short");
    if (truncate(path, SHARD_HEADER + 101) != 0) die("truncate: %s", strerror(errno));
    refused(path, "damaged");
    write_shard("mixed_0.bin", 20240520, 1, 50, 0, 100);
    write_shard("mixed_1.bin", 20240801, 7, 50, 0, 100);
    refused(in_folder("mixed_*.bin"), "4-byte tokens, expected 2-byte ones");
}

static void test_too_short(void) {
    Tokens train, val;
    Error e;
    int32_t inputs[T], targets[T];
    tokens_from_memory(&train, &val, (const uint8_t*)"012345678", 9);
    check(tokens_check(&train, T, &e) && tokens_train_window(&train, 1, 2, T, 256, inputs, targets, &e)
          && inputs[0] == '0' && targets[T - 1] == '8', "T + 1 tokens are enough");
    check(!tokens_check(&train, T + 1, &e) && strstr(e.text, "9 tokens") && strstr(e.text, "at least 10"),
          "%s", e.text);
    check(!tokens_check(&val, T, &e) && !tokens_val_window(&val, 0, T, 256, inputs, targets, &e),
          "%s", e.text);
    tokens_close(&val);
    tokens_close(&train);
    write_shard("little_0.bin", 20240520, 1, 5, 0, 100);
    write_shard("little_1.bin", 20240520, 1, 8, 0, 100);
    bool good = tokens_open_shards(&train, in_folder("little_*.bin"), &e);
    check(good && !tokens_train_window(&train, 1, 0, T, 256, inputs, targets, &e)
          && strstr(e.text, "8 tokens") && strstr(e.text, "at least 9"), "%s", e.text);
    tokens_close(&train);
}

static void test_missing(void) {
    Tokens train, val;
    Error e;
    int32_t inputs[T], targets[T];
    bool opened = tokens_open_text(&train, &val, in_folder("missing.txt"), NULL, &e);
    check(!opened && strstr(e.text, "No such file"), "refused: %s", e.text);
    opened = tokens_open_shards(&train, write_shard("vanish.bin", 20240520, 1, 50, 0, 100), &e);
    unlink(in_folder("vanish.bin"));
    check(opened && !tokens_train_window(&train, 1, 0, T, 100, inputs, targets, &e)
          && strstr(e.text, "No such file"), "a shard that vanishes meanwhile: %s", e.text);
    tokens_close(&train);
    check(tokens_are_shards("a/b_*.bin") && !tokens_are_shards("a.txt") && !tokens_are_shards("bin"),
          "text or shards");
}

static void remove_folder(void) {
    glob_t found;
    if (glob(in_folder("*"), 0, NULL, &found) == 0)
        for (size_t k = 0; k < found.gl_pathc; k++) remove(found.gl_pathv[k]);
    globfree(&found);
    rmdir(folder);
}

int main(void) {
    if (!mkdtemp(folder)) die("%s: %s", folder, strerror(errno));
    test_text();
    test_text_bpe(false);
    test_text_bpe(true);
    test_shards(20240520, 1, 50257);
    test_shards(20240801, 7, 128256);
    test_fingerprint();
    test_permutation();
    test_huge();
    test_refusals();
    test_too_short();
    test_missing();
    remove_folder();
    return check_summary();
}
