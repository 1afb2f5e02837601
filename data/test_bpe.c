// test_bpe.c: learns a tokenizer, writes it as llm.c does, reads it and compares it with a plain encoder.

#include "bpe.h"
#include "../host/check.h"

#include <time.h>
#include <unistd.h>

enum { MERGES = 300, MAX_TOKENS = 60000, MAX_BYTES = 1 << 20 };

// A tokenizer file being written. Token k is bytes start[k] .. start[k] + length[k] of it.
typedef struct {
    uint8_t bytes[MAX_BYTES];
    size_t size, start[MAX_TOKENS], length[MAX_TOKENS];
    int count;
} Vocabulary;

static uint64_t random_state = 1;
static uint32_t random_below(uint32_t limit) { return (uint32_t)(mix64(random_state++) % limit); }

static void put32(uint8_t* at, uint32_t value) {
    for (int k = 0; k < 4; k++) at[k] = (uint8_t)(value >> 8 * k);
}

static void add_token(Vocabulary* v, const void* bytes, size_t length) {
    v->bytes[v->size++] = (uint8_t)length;
    v->start[v->count] = v->size;
    v->length[v->count++] = length;
    memcpy(v->bytes + v->size, bytes, length);
    v->size += length;
}

// The single bytes in GPT-2's order: first those that print in Latin-1, then the others.
static void add_bytes(Vocabulary* v) {
    v->size = BPE_HEADER;
    v->count = 0;
    for (int others = 0; others < 2; others++)
        for (int value = 0; value < 256; value++) {
            bool prints = (value > 32 && value < 127) || (value > 160 && value != 173);
            uint8_t byte = (uint8_t)value;
            if (prints == !others) add_token(v, &byte, 1);
        }
}

// Ends the vocabulary with the end of text and fills in the header.
static void finish(Vocabulary* v, uint32_t version) {
    add_token(v, "<|endoftext|>", 13);
    memset(v->bytes, 0, BPE_HEADER);
    put32(v->bytes, BPE_MAGIC);
    put32(v->bytes + 4, version);
    put32(v->bytes + 8, (uint32_t)v->count);
    if (version == 2) put32(v->bytes + 12, (uint32_t)v->count - 1);
}

// ------------------------------------------------------------------------------------------------
// Plain versions, straight from the definitions: slow, and nothing in them is clever.

// A random text of words, numbers, punctuation, spaces and other scripts; damage is in percent.
static size_t random_text(uint8_t* text, size_t limit, uint32_t damage) {
    static const char* const parts[] = {
        "the", "and", "then", "other", "there", "ing", "in", "on", "a", "b", "e", "s", "t", "I",
        "'s", "'ll", "'re", "'", " ", " ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "1",
        "42", "2024", ".", ",", "!", "...", "-", "(", "\"", "\xc3\xa9", "\xe4\xb8\xad",
        "\xe6\x96\x87", "\xc2\xb2", "\xc2\xbd", "\xc2\xa0", "\xe2\x80\xa8", "\xf0\x9f\x98\x80",
        "\xd0\x96", "\xe0\xa4\x95", "\xe0\xa5\x8d", "\xe3\x80\x80", "\xe2\x80\x99", "\xcc\x81",
        "\xf0\x9d\x9f\x98",
    };
    size_t size = 0;
    while (size + 8 < limit) {
        const char* part = parts[random_below(sizeof parts / sizeof *parts)];
        memcpy(text + size, part, strlen(part));
        size += strlen(part);
        if (random_below(100) < damage) text[size++] = (uint8_t)random_below(256);
        if (random_below(100) < damage) size--;
    }
    return size;
}

static int plain_find(const Vocabulary* v, const uint8_t* bytes, size_t length) {
    for (int k = 0; k < v->count - 1; k++)      // the end of text is not for text
        if (v->length[k] == length && memcmp(v->bytes + v->start[k], bytes, length) == 0) return k;
    return -1;
}

// Merges the lowest pair, the leftmost of equals, until there is none.
static size_t plain_merge(const Vocabulary* v, const uint8_t* piece, size_t bytes, int32_t* out) {
    size_t* ends = (size_t*)allocate(bytes + 1, sizeof *ends);      // part k is ends[k] .. ends[k + 1]
    size_t count = bytes;
    for (size_t k = 0; k <= bytes; k++) ends[k] = k;
    for (;;) {
        int best = -1;
        size_t where = 0;
        for (size_t k = 0; k + 2 <= count; k++) {
            int token = plain_find(v, piece + ends[k], ends[k + 2] - ends[k]);
            if (token >= 0 && (best < 0 || token < best)) best = token, where = k;
        }
        if (best < 0) break;
        memmove(ends + where + 1, ends + where + 2, (count - where - 1) * sizeof *ends);
        count--;
    }
    for (size_t k = 0; k < count; k++) out[k] = plain_find(v, piece + ends[k], ends[k + 1] - ends[k]);
    free(ends);
    return count;
}

static bool is_kind(const uint8_t* text, size_t bytes, size_t at, CharClass kind, size_t* length) {
    return at < bytes && char_class(text + at, bytes - at, length) == kind;
}

// GPT-2's alternatives one after the other, with the backtracking of \s+(?!\S) spelled out.
static size_t plain_piece(const uint8_t* text, size_t bytes) {
    static const char* const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    static const CharClass kinds[] = {CHAR_LETTER, CHAR_NUMBER, CHAR_OTHER};
    size_t length;
    for (int k = 0; k < 7; k++)
        if (bytes >= strlen(contractions[k]) && memcmp(text, contractions[k], strlen(contractions[k])) == 0)
            return strlen(contractions[k]);
    for (int k = 0; k < 3; k++)
        for (size_t space = text[0] == ' ' ? 1 : 0;; space--) {
            size_t at = space;
            while (is_kind(text, bytes, at, kinds[k], &length)) at += length;
            if (at > space) return at;
            if (space == 0) break;
        }
    size_t ends[4096], count = 0, at = 0;
    while (is_kind(text, bytes, at, CHAR_SPACE, &length)) ends[count++] = at += length;
    for (size_t k = count; k-- > 0;) {          // the longest that no non-space follows
        if (ends[k] == bytes || is_kind(text, bytes, ends[k], CHAR_SPACE, &length)) return ends[k];
    }
    return ends[count - 1];
}

// ------------------------------------------------------------------------------------------------
// Learning: the most frequent pair of neighbours becomes a token, MERGES times.

static void learn(Vocabulary* v) {
    enum { SIZE = 12000, LIMIT = 256 + MERGES };
    static uint8_t text[SIZE];
    static int tokens[SIZE], counts[LIMIT][LIMIT];
    static bool starts[SIZE];                   // of a piece
    size_t size = random_text(text, SIZE, 0), count = size;
    for (size_t at = 0; at < size; at += plain_piece(text + at, size - at)) starts[at] = true;
    add_bytes(v);
    v->count++;                                 // plain_find leaves out the last token
    for (size_t k = 0; k < size; k++) tokens[k] = plain_find(v, text + k, 1);
    v->count--;
    while (v->count < LIMIT) {
        int left = 0, right = 0;
        memset(counts, 0, sizeof counts);
        for (size_t k = 0; k + 1 < count; k++) {
            if (starts[k + 1]) continue;
            int* here = &counts[tokens[k]][tokens[k + 1]];
            if (++*here > counts[left][right]) left = tokens[k], right = tokens[k + 1];
        }
        uint8_t joined[256];
        memcpy(joined, v->bytes + v->start[left], v->length[left]);
        memcpy(joined + v->length[left], v->bytes + v->start[right], v->length[right]);
        size_t kept = 0;
        for (size_t k = 0; k < count; k++, kept++) {
            bool merge = k + 1 < count && !starts[k + 1] && tokens[k] == left && tokens[k + 1] == right;
            tokens[kept] = merge ? v->count : tokens[k];
            starts[kept] = starts[k];
            k += merge;
        }
        count = kept;
        add_token(v, joined, v->length[left] + v->length[right]);
    }
    finish(v, 2);
}

// ------------------------------------------------------------------------------------------------
// Checks.

static bool round_trip(const Bpe* bpe, const uint8_t* text, size_t bytes, const int32_t* tokens,
                       size_t count) {
    size_t at = 0;
    for (size_t k = 0; k < count; k++) {
        int length;
        const uint8_t* token = bpe_bytes(bpe, tokens[k], &length);
        if ((size_t)length > bytes - at || memcmp(token, text + at, (size_t)length) != 0) return false;
        at += (size_t)length;
    }
    return at == bytes;
}

static void test_against_plain(const Bpe* bpe, const Vocabulary* v, uint32_t damage, const char* what) {
    enum { SIZE = 160 };
    uint8_t text[SIZE];
    int32_t tokens[SIZE], expected[SIZE];
    bool same = true, back = true;
    size_t bytes_in = 0, tokens_out = 0;
    for (int round = 0; round < 400; round++) {
        size_t bytes = random_text(text, 9 + random_below(SIZE - 9), damage), plain = 0;
        if (damage == 100) for (size_t k = 0; k < bytes; k++) text[k] = (uint8_t)random_below(256);
        for (size_t at = 0, piece; at < bytes; at += piece) {
            piece = plain_piece(text + at, bytes - at);
            plain += plain_merge(v, text + at, piece, expected + plain);
        }
        size_t count = bpe_encode(bpe, text, bytes, tokens);
        same = same && count == plain && memcmp(tokens, expected, count * sizeof *tokens) == 0;
        back = back && round_trip(bpe, text, bytes, tokens, count);
        bytes_in += bytes;
        tokens_out += count;
    }
    check(same, "%s: as the plain encoder (%zu bytes, %zu tokens)", what, bytes_in, tokens_out);
    check(back, "%s: decoding gives the text again", what);
}

// pieces are separated by '|'.
static void pieces_are(const char* text, const char* expected) {
    char found[256];
    size_t bytes = strlen(text), size = 0;
    for (size_t at = 0, piece; at < bytes; at += piece) {
        piece = bpe_piece((const uint8_t*)text + at, bytes - at);
        if (at) found[size++] = '|';
        memcpy(found + size, text + at, piece);
        size += piece;
    }
    found[size] = 0;
    for (size_t k = 0; k < size; k++) if (found[k] == '\n') found[k] = '$';
    check(strcmp(found, expected) == 0, "pieces: %s", found);
}

static void test_pieces(void) {
    pieces_are("Hello world", "Hello| world");
    pieces_are("I'll don't he's we've", "I|'ll| don|'t| he|'s| we|'ve");
    pieces_are("they're I'm he'd", "they|'re| I|'m| he|'d");
    pieces_are("I'LL 'x 's", "I|'|LL| '|x| '|s");
    pieces_are("a  b   c", "a| | b|  | c");
    pieces_are("a\n\nb\n c", "a|$|$|b|$| c");
    pieces_are("end  \n", "end|  $");
    pieces_are("x=42.5e3!!!", "x|=|42|.|5|e|3|!!!");
    pieces_are("caf\xc3\xa9 \xe4\xb8\xad\xe6\x96\x87", "caf\xc3\xa9| \xe4\xb8\xad\xe6\x96\x87");
    pieces_are("m\xc2\xb2 \xc2\xbd", "m|\xc2\xb2| \xc2\xbd");
    pieces_are("a\xc2\xa0" "b\xe2\x80\xa8" "c", "a|\xc2\xa0|b|\xe2\x80\xa8|c");
    pieces_are("ok\xf0\x9f\x98\x80\xf0\x9f\x98\x80 go", "ok|\xf0\x9f\x98\x80\xf0\x9f\x98\x80| go");
    pieces_are("a\xff\xfe\xc3 b", "a|\xff\xfe\xc3| b");
}

static void test_unicode(void) {
    static const struct { const char* text; CharClass kind; const char* name; } cases[] = {
        {"\xc3\xa9", CHAR_LETTER, "e with acute"}, {"\xe4\xb8\xad", CHAR_LETTER, "a Chinese character"},
        {"\xc2\xaa", CHAR_LETTER, "feminine ordinal"}, {"\xf0\xa0\x80\x80", CHAR_LETTER, "U+20000"},
        {"\xc2\xb2", CHAR_NUMBER, "superscript two"}, {"\xc2\xbd", CHAR_NUMBER, "one half"},
        {"\xd9\xa3", CHAR_NUMBER, "Arabic-Indic three"}, {"\xe2\x85\xa7", CHAR_NUMBER, "Roman eight"},
        {"\xc2\xa0", CHAR_SPACE, "no-break space"}, {"\xe2\x80\xa8", CHAR_SPACE, "U+2028"},
        {"\xc2\x85", CHAR_SPACE, "U+0085"}, {"\xe3\x80\x80", CHAR_SPACE, "ideographic space"},
        {"\x1c", CHAR_OTHER, "U+001C"}, {"\xe2\x80\x8b", CHAR_OTHER, "zero width space"},
        {"\xf0\x9f\x98\x80", CHAR_OTHER, "an emoji"}, {"\xcc\x81", CHAR_OTHER, "combining acute"},
        {"\xe2\x82\xac", CHAR_OTHER, "euro"}, {"\xf4\x8f\xbf\xbf", CHAR_OTHER, "U+10FFFF"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        size_t length, bytes = strlen(cases[k].text);
        CharClass kind = char_class((const uint8_t*)cases[k].text, bytes, &length);
        check(kind == cases[k].kind && length == bytes, "class of %s", cases[k].name);
    }
}

static void test_invalid_utf8(void) {
    static const char* const invalid[] = {"\x80", "\xc3", "\xc0\xaf", "\xe4\xb8", "\xed\xa0\x80", "\xff",
        "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xe4\xb8\x41", "\xe0\x80\xaf", "\xf0\x8f\xbf\xbf"};
    bool good = true;
    for (size_t k = 0; k < sizeof invalid / sizeof *invalid; k++) {
        size_t length, bytes = strlen(invalid[k]);
        good = good && utf8_decode((const uint8_t*)invalid[k], bytes, &length) == UINT32_MAX && length == 1;
    }
    check(good, "what is not UTF-8 is single bytes");
}

static void test_ascii(void) {
    bool good = true;
    for (uint32_t code = 0; code < 128; code++) {
        uint8_t byte = (uint8_t)code;
        size_t length;
        CharClass kind = char_class(&byte, 1, &length);
        good = good && (kind == CHAR_LETTER) == UNICODE_IN(unicode_letters, code)
               && (kind == CHAR_NUMBER) == UNICODE_IN(unicode_numbers, code)
               && (kind == CHAR_SPACE) == UNICODE_IN(unicode_spaces, code);
    }
    check(good, "ASCII has the classes of the tables");
}

// Tokens of 2, 4, .. 128 letters a, then a megabyte of them.
static void test_long_run(void) {
    static Vocabulary v;
    enum { SIZE = (1 << 20) + 3 };
    uint8_t* text = (uint8_t*)allocate(SIZE, 1);
    int32_t* tokens = (int32_t*)allocate(SIZE, sizeof *tokens);
    Bpe bpe;
    Error e;
    memset(text, 'a', SIZE);
    add_bytes(&v);
    for (size_t length = 2; length <= 128; length *= 2) add_token(&v, text, length);
    add_token(&v, "a", 1);                      // again: the first counts
    finish(&v, 2);
    if (!check(bpe_parse(&bpe, v.bytes, v.size, &e), "a tokenizer with long tokens")) return;
    clock_t start = clock();
    size_t count = bpe_encode(&bpe, text, SIZE, tokens);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    bool good = count == (1 << 13) + 2 && tokens[0] == 262 && tokens[count - 2] == 256
                && tokens[count - 1] == 'a' - 33;
    good = good && round_trip(&bpe, text, SIZE, tokens, count);
    check(good, "a megabyte of one letter is %zu tokens", count);
    check(seconds < 20, "in %.2f s", seconds);
    bpe_close(&bpe);
    free(tokens);
    free(text);
}

static void test_version_1(void) {
    static Vocabulary v;
    Bpe bpe;
    Error e;
    int32_t tokens[13];
    add_bytes(&v);
    while (v.count < BPE_GPT2_EOT) {
        uint8_t filler[5] = {'~'};
        put32(filler + 1, (uint32_t)v.count);
        add_token(&v, filler, sizeof filler);
    }
    finish(&v, 1);
    if (!check(bpe_parse(&bpe, v.bytes, v.size, &e), "version 1, with the end of text at 50256")) return;
    check(bpe_vocab(&bpe) == 50257 && bpe.eot == 50256, "50257 tokens");
    check(bpe_find(&bpe, (const uint8_t*)"<|endoftext|>", 13) == -1
          && bpe_encode(&bpe, (const uint8_t*)"<|endoftext|>", 13, tokens) == 13,
          "no text encodes to the end of text");
    bpe_close(&bpe);
}

// ------------------------------------------------------------------------------------------------
// What is refused: the learned file with one change each.

static void refused(const uint8_t* bytes, size_t size, const char* reason) {
    Bpe bpe;
    Error e;
    bool opened = bpe_parse(&bpe, bytes, size, &e);
    check(!opened && strstr(e.text, reason), "refused: %s", opened ? reason : e.text);
    if (opened) bpe_close(&bpe);
}

static void refused_with(const Vocabulary* v, size_t offset, uint32_t value, const char* reason) {
    static uint8_t bytes[MAX_BYTES];
    memcpy(bytes, v->bytes, v->size);
    put32(bytes + offset, value);
    refused(bytes, v->size, reason);
}

static void test_refusals(const Vocabulary* v) {
    static uint8_t bytes[MAX_BYTES];
    uint32_t count = (uint32_t)v->count;
    refused(v->bytes, 1000, "1000 bytes");
    refused_with(v, 0, 20240520, "magic number 20240520");
    refused_with(v, 4, 3, "version 3");
    refused_with(v, 4, 1, "end-of-text token 50256");
    refused_with(v, 12, count, "end-of-text token 557");
    refused_with(v, 8, 2000000000, "do not fit");
    refused_with(v, 8, 0x80000001u, "do not fit");
    refused_with(v, 8, count + 1, "ends in token 557");
    refused_with(v, 8, count - 1, "end-of-text");
    refused(v->bytes, v->size - 1, "ends in token 556");
    memcpy(bytes, v->bytes, v->size);
    bytes[v->size] = 1;
    refused(bytes, v->size + 1, "1 bytes after the last");
    bytes[v->start[5]] = bytes[v->start[6]];
    refused(bytes, v->size, "no token for byte 0x26");
    bytes[v->start[300] - 1] = 0;
    refused(bytes, v->size, "token 300 is empty");
}

static void test_files(const Vocabulary* v) {
    char path[] = "/tmp/test_bpe_XXXXXX";
    Bpe bpe;
    Error e;
    int file = mkstemp(path);
    if (file < 0 || write(file, v->bytes, v->size) != (ssize_t)v->size) die("%s: cannot be written", path);
    bool good = bpe_open(&bpe, path, &e);
    check(good && bpe_vocab(&bpe) == v->count && bpe.eot == v->count - 1, "opened from a file");
    if (good) bpe_close(&bpe);
    if (ftruncate(file, 2000) != 0) die("%s: cannot be cut", path);
    close(file);
    check(!bpe_open(&bpe, path, &e) && strstr(e.text, path) && !strchr(e.text, '\n'), "refused: %s", e.text);
    unlink(path);
    check(!bpe_open(&bpe, path, &e) && strstr(e.text, "No such file"), "refused: %s", e.text);
    check(!bpe_open(&bpe, "/tmp", &e) && strstr(e.text, "/tmp: is a directory"), "refused: %s", e.text);
}

int main(void) {
    static Vocabulary v;
    Bpe bpe;
    Error e;
    learn(&v);
    if (!check(bpe_parse(&bpe, v.bytes, v.size, &e), "a learned tokenizer is read")) return check_summary();
    bool good = true;
    for (int k = 0; k < v.count; k++) {
        int length;
        const uint8_t* bytes = bpe_bytes(&bpe, k, &length);
        good = good && (size_t)length == v.length[k];
        good = good && memcmp(bytes, v.bytes + v.start[k], v.length[k]) == 0;
        good = good && (k == bpe.eot || bpe_find(&bpe, bytes, (size_t)length) == k);
    }
    check(good, "its %d tokens have their bytes and are found by them", bpe_vocab(&bpe));
    test_against_plain(&bpe, &v, 0, "UTF-8 text");
    test_against_plain(&bpe, &v, 10, "damaged text");
    test_against_plain(&bpe, &v, 100, "random bytes");
    check(bpe_encode(&bpe, NULL, 0, NULL) == 0, "an empty text has no tokens");
    bpe_close(&bpe);
    test_pieces();
    test_unicode();
    test_invalid_utf8();
    test_ascii();
    test_long_run();
    test_version_1();
    test_refusals(&v);
    test_files(&v);
    return check_summary();
}
