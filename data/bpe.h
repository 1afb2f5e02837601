// bpe.h: GPT-2's byte pair encoding, from llm.c's gpt2_tokenizer.bin.
//
// The file lists the bytes of every token. That is enough to encode as well: ids were given in the order in
// which the merges were learned, so the pair to merge next is the one whose concatenation is the token with
// the lowest id.
//
// File: 256 int32 (magic 20240328, version 1 or 2, number of tokens, in version 2 the end-of-text token,
// which is 50256 in version 1), then one length byte and that many bytes for each token.

#ifndef DATA_BPE_H
#define DATA_BPE_H

#include "file.h"
#include "unicode.h"

#include <assert.h>

enum { BPE_MAGIC = 20240328, BPE_HEADER = 256 * 4, BPE_GPT2_EOT = 50256 };

typedef struct {
    int vocab;
    int eot;                    // end of text: separates documents; no text encodes to it
    int longest;                // token, in bytes
    uint8_t* file;              // the tokenizer file, which holds the tokens' bytes
    uint32_t* offset;           // (vocab) of each token's length byte in it
    int32_t* table;             // (mask + 1) open hash table from bytes to token, -1 is free
    size_t mask;
} Bpe;

// ------------------------------------------------------------------------------------------------
// From bytes to token and back.

static inline int bpe_vocab(const Bpe* bpe) { return bpe->vocab; }

// The bytes of a token, which are not a string: no zero ends them.
static inline const uint8_t* bpe_bytes(const Bpe* bpe, int32_t token, int* length) {
    assert(token >= 0 && token < bpe->vocab);
    const uint8_t* entry = bpe->file + bpe->offset[token];
    *length = entry[0];
    return entry + 1;
}

// The place in the table that holds these bytes, or the free one where they belong.
static inline size_t bpe_place(const Bpe* bpe, const uint8_t* bytes, size_t length) {
    uint64_t hash = 0xcbf29ce484222325u;        // FNV-1a
    for (size_t k = 0; k < length; k++) hash = (hash ^ bytes[k]) * 0x100000001b3u;
    size_t place = (size_t)(hash ^ hash >> 32) & bpe->mask;
    for (; bpe->table[place] >= 0; place = (place + 1) & bpe->mask) {
        int size;
        const uint8_t* token = bpe_bytes(bpe, bpe->table[place], &size);
        if ((size_t)size == length && memcmp(token, bytes, length) == 0) break;
    }
    return place;
}

// The token with exactly these bytes, or -1.
static inline int32_t bpe_find(const Bpe* bpe, const uint8_t* bytes, size_t length) {
    return length > (size_t)bpe->longest ? -1 : bpe->table[bpe_place(bpe, bytes, length)];
}

// ------------------------------------------------------------------------------------------------
// The file.

static inline bool bpe_check_header(Bpe* bpe, const uint8_t* bytes, size_t size, Error* e) {
    if (size < BPE_HEADER)
        return fail(e, "%zu bytes, expected a tokenizer, whose header alone has %d", size, BPE_HEADER);
    uint32_t magic = little32(bytes), version = little32(bytes + 4), vocab = little32(bytes + 8);
    if (magic != BPE_MAGIC)
        return fail(e, "magic number %u, expected %d (llm.c's gpt2_tokenizer.bin)", magic, BPE_MAGIC);
    if (version != 1 && version != 2) return fail(e, "tokenizer version %u, expected 1 or 2", version);
    if (size > UINT32_MAX || vocab > (size - BPE_HEADER) / 2)   // a token takes at least two bytes
        return fail(e, "%u tokens do not fit in %zu bytes: the file is cut short or damaged", vocab, size);
    uint32_t eot = version == 1 ? (uint32_t)BPE_GPT2_EOT : little32(bytes + 12);
    if (eot >= vocab) return fail(e, "end-of-text token %u, expected less than the %u tokens", eot, vocab);
    bpe->vocab = (int)vocab;
    bpe->eot = (int)eot;
    return true;
}

static inline bool bpe_find_offsets(Bpe* bpe, size_t size, Error* e) {
    size_t at = BPE_HEADER;
    for (int token = 0; token < bpe->vocab; token++) {
        int length = at < size ? bpe->file[at] : 0;
        if (at >= size || size - at - 1 < (size_t)length)
            return fail(e, "ends in token %d of %d: the file is cut short", token, bpe->vocab);
        if (length == 0) return fail(e, "token %d is empty, expected at least one byte", token);
        bpe->offset[token] = (uint32_t)at;
        bpe->longest = length > bpe->longest ? length : bpe->longest;
        at += 1 + (size_t)length;
    }
    if (at != size) return fail(e, "%zu bytes after the last token, expected none: damaged", size - at);
    return true;
}

// Of two tokens with the same bytes the first counts. The end of text is left out: text cannot ask for it.
static inline bool bpe_fill_table(Bpe* bpe, Error* e) {
    memset(bpe->table, -1, (bpe->mask + 1) * sizeof *bpe->table);
    for (int32_t token = 0; token < bpe->vocab; token++) {
        int length;
        const uint8_t* bytes = bpe_bytes(bpe, token, &length);
        size_t place = bpe_place(bpe, bytes, (size_t)length);
        if (bpe->table[place] < 0 && token != bpe->eot) bpe->table[place] = token;
    }
    for (int value = 0; value < 256; value++) {
        uint8_t byte = (uint8_t)value;
        if (bpe_find(bpe, &byte, 1) < 0)
            return fail(e, "no token for byte 0x%02x, expected all 256: some text has no encoding", byte);
    }
    return true;
}

static inline void bpe_close(Bpe* bpe) {
    free(bpe->file);
    free(bpe->offset);
    free(bpe->table);
    memset(bpe, 0, sizeof *bpe);
}

// Reads a tokenizer from a copy of its file; the error line names no file. After false there is nothing to
// close.
static inline bool bpe_parse(Bpe* bpe, const uint8_t* bytes, size_t size, Error* e) {
    memset(bpe, 0, sizeof *bpe);
    if (!bpe_check_header(bpe, bytes, size, e)) return false;
    bpe->file = (uint8_t*)allocate(size, 1);
    memcpy(bpe->file, bytes, size);
    bpe->offset = (uint32_t*)allocate((size_t)bpe->vocab, sizeof *bpe->offset);
    for (bpe->mask = 1; bpe->mask < 2 * (size_t)bpe->vocab; bpe->mask *= 2) {}
    bpe->table = (int32_t*)allocate(bpe->mask, sizeof *bpe->table);
    bpe->mask--;
    bool good = bpe_find_offsets(bpe, size, e) && bpe_fill_table(bpe, e);
    if (!good) bpe_close(bpe);
    return good;
}

static inline bool bpe_open(Bpe* bpe, const char* path, Error* e) {
    size_t size;
    uint8_t* bytes = file_read(path, &size, "a tokenizer (llm.c's gpt2_tokenizer.bin)", e);
    if (!bytes) return false;
    Error reason;
    bool good = bpe_parse(bpe, bytes, size, &reason);
    if (!good) fail(e, "%s: %s", path, reason.text);
    free(bytes);
    return good;
}

// ------------------------------------------------------------------------------------------------
// Pieces: merges never cross the borders that GPT-2's regular expression draws,
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

typedef enum { CHAR_SPACE, CHAR_LETTER, CHAR_NUMBER, CHAR_OTHER } CharClass;

// The first character of text and its length in bytes. A byte that is not UTF-8 is a character of its own,
// which belongs to no class.
static inline uint32_t utf8_decode(const uint8_t* text, size_t bytes, size_t* length) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};     // lower would be an overlong form
    const uint32_t invalid = UINT32_MAX;
    uint32_t lead = text[0];
    *length = 1;
    if (lead < 0x80) return lead;
    size_t count = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc0 || lead > 0xf7 || count > bytes) return invalid;
    uint32_t code = lead & (0x7fu >> count);
    for (size_t k = 1; k < count; k++) {
        if ((text[k] & 0xc0) != 0x80) return invalid;
        code = code << 6 | (text[k] & 0x3fu);
    }
    if (code < least[count] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return invalid;
    *length = count;
    return code;
}

static inline bool unicode_within(const UnicodeRange* ranges, size_t count, uint32_t code) {
    size_t low = 0, high = count;               // the first range that ends at or after code
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].last < code) low = middle + 1;
        else high = middle;
    }
    return low < count && ranges[low].first <= code;
}

#define UNICODE_IN(table, code) unicode_within(table, sizeof table / sizeof *table, code)

// The class of the first character of text, and its length in bytes.
static inline CharClass char_class(const uint8_t* text, size_t bytes, size_t* length) {
    uint32_t code = utf8_decode(text, bytes, length), lower = code | 0x20;
    if (code < 0x80) {                          // most text; the tables below say the same
        if (lower >= 'a' && lower <= 'z') return CHAR_LETTER;
        if (code >= '0' && code <= '9') return CHAR_NUMBER;
        return code == ' ' || (code >= 9 && code <= 13) ? CHAR_SPACE : CHAR_OTHER;
    }
    if (UNICODE_IN(unicode_letters, code)) return CHAR_LETTER;
    if (UNICODE_IN(unicode_numbers, code)) return CHAR_NUMBER;
    if (UNICODE_IN(unicode_spaces, code)) return CHAR_SPACE;
    return CHAR_OTHER;
}

// The length of the contraction that text starts with, or 0.
static inline size_t bpe_contraction(const uint8_t* text, size_t bytes) {
    static const char* const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    if (text[0] != '\'') return 0;
    for (size_t k = 0; k < sizeof endings / sizeof *endings; k++) {
        size_t length = strlen(endings[k]);
        if (length <= bytes && memcmp(text, endings[k], length) == 0) return length;
    }
    return 0;
}

// The length in bytes of the first piece of a text that is not empty.
static inline size_t bpe_piece(const uint8_t* text, size_t bytes) {
    size_t at = bpe_contraction(text, bytes), step, last = 0;
    if (at) return at;
    if (text[0] == ' ' && bytes > 1 && char_class(text + 1, bytes - 1, &step) != CHAR_SPACE) at = 1;
    CharClass kind = char_class(text + at, bytes - at, &step);
    while (at < bytes && char_class(text + at, bytes - at, &step) == kind) {
        last = at;
        at += step;
    }
    return kind == CHAR_SPACE && at < bytes && last > 0 ? last : at;   // a word takes the space before it
}

// ------------------------------------------------------------------------------------------------
// Merging a piece of m bytes: the parts form a linked list, the pairs that are tokens a heap with the lowest
// id on top. m - 1 pairs at first and a merge takes one and adds two at most: 2m pairs and O(m log m) steps.

// parts[k] is the part that starts at byte k of the piece; its end is 0 if none does.
typedef struct { size_t end, previous; int32_t token; } BpePart;
typedef struct { int32_t token; size_t start, end; } BpePair;    // two adjacent parts, and what they become

typedef struct {
    BpePart* parts;             // (capacity)
    BpePair* heap;              // (2 capacity)
    size_t pairs, capacity;
} BpeWork;

static inline bool bpe_before(const BpePair* a, const BpePair* b) {
    return a->token != b->token ? a->token < b->token : a->start < b->start;
}

static inline void bpe_push(BpeWork* work, BpePair pair) {
    size_t at = work->pairs++;
    assert(at < 2 * work->capacity);
    for (; at > 0 && bpe_before(&pair, &work->heap[(at - 1) / 2]); at = (at - 1) / 2)
        work->heap[at] = work->heap[(at - 1) / 2];
    work->heap[at] = pair;
}

static inline BpePair bpe_pop(BpeWork* work) {
    BpePair top = work->heap[0], moved = work->heap[--work->pairs];
    size_t at = 0;
    for (size_t child = 1; child < work->pairs; child = 2 * at + 1) {
        if (child + 1 < work->pairs && bpe_before(&work->heap[child + 1], &work->heap[child])) child++;
        if (!bpe_before(&work->heap[child], &moved)) break;
        work->heap[at] = work->heap[child];
        at = child;
    }
    work->heap[at] = moved;
    return top;
}

// Queues the part at start and the one after it, if there is one and together they are a token.
static inline void bpe_queue(const Bpe* bpe, BpeWork* work, const uint8_t* piece, size_t bytes,
                             size_t start) {
    size_t middle = work->parts[start].end;
    if (middle == bytes) return;
    BpePair pair;
    pair.start = start;
    pair.end = work->parts[middle].end;
    pair.token = bpe_find(bpe, piece + start, pair.end - start);
    if (pair.token >= 0) bpe_push(work, pair);
}

// Joins the pair on top, unless one of its parts has been merged with another in the meantime.
static inline void bpe_merge(const Bpe* bpe, BpeWork* work, const uint8_t* piece, size_t bytes) {
    BpePair pair = bpe_pop(work);
    BpePart* part = &work->parts[pair.start];
    size_t middle = part->end;
    if (middle <= pair.start || middle >= pair.end || work->parts[middle].end != pair.end) return;
    work->parts[middle].end = 0;
    part->end = pair.end;
    part->token = pair.token;
    if (pair.end < bytes) work->parts[pair.end].previous = pair.start;
    bpe_queue(bpe, work, piece, bytes, pair.start);
    if (pair.start > 0) bpe_queue(bpe, work, piece, bytes, part->previous);
}

static inline void bpe_reserve(BpeWork* work, size_t bytes) {
    if (bytes <= work->capacity) return;
    free(work->parts);
    free(work->heap);
    work->capacity = bytes > 256 ? bytes : 256;
    work->parts = (BpePart*)allocate(work->capacity, sizeof *work->parts);
    work->heap = (BpePair*)allocate(work->capacity, 2 * sizeof *work->heap);
}

// Encodes one piece; out has room for `bytes` tokens. work starts zeroed and is kept from piece to piece.
static inline size_t bpe_encode_piece(const Bpe* bpe, BpeWork* work, const uint8_t* piece, size_t bytes,
                                      int32_t* out) {
    bpe_reserve(work, bytes);
    for (size_t at = 0; at < bytes; at++) {
        BpePart* part = &work->parts[at];
        part->end = at + 1;
        part->previous = at ? at - 1 : 0;
        part->token = bpe_find(bpe, piece + at, 1);
    }
    work->pairs = 0;
    for (size_t at = 0; at < bytes; at++) bpe_queue(bpe, work, piece, bytes, at);
    while (work->pairs) bpe_merge(bpe, work, piece, bytes);
    size_t count = 0;
    for (size_t at = 0; at < bytes; at = work->parts[at].end) out[count++] = work->parts[at].token;
    return count;
}

static inline void bpe_work_free(BpeWork* work) {
    free(work->parts);
    free(work->heap);
    memset(work, 0, sizeof *work);
}

// Encodes a text, whatever its bytes are; out has room for `bytes` tokens. Returns their number. The
// tokens' bytes one after the other are the text again.
static inline size_t bpe_encode(const Bpe* bpe, const uint8_t* text, size_t bytes, int32_t* out) {
    BpeWork work;
    memset(&work, 0, sizeof work);
    size_t count = 0;
    for (size_t at = 0, piece; at < bytes; at += piece) {
        piece = bpe_piece(text + at, bytes - at);
        count += bpe_encode_piece(bpe, &work, text + at, piece, out + count);
    }
    bpe_work_free(&work);
    return count;
}

// ------------------------------------------------------------------------------------------------
// Fuzzing: the input as a tokenizer file; then as the extra tokens of a valid one and a text for it.

#if defined(FUZZING) && __INCLUDE_LEVEL__ == 0

static void fuzz_round_trip(const Bpe* bpe, const uint8_t* text, size_t bytes) {
    int32_t* tokens = (int32_t*)allocate(bytes, sizeof *tokens);
    size_t count = bpe_encode(bpe, text, bytes, tokens), at = 0;
    for (size_t k = 0; k < count; k++) {
        int length;
        const uint8_t* token = bpe_bytes(bpe, tokens[k], &length);
        if ((size_t)length > bytes - at || memcmp(token, text + at, (size_t)length) != 0) abort();
        at += (size_t)length;
    }
    if (at != bytes) abort();
    free(tokens);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bpe bpe;
    Error e;
    if (bpe_parse(&bpe, data, size, &e)) {
        fuzz_round_trip(&bpe, data, size);
        bpe_close(&bpe);
    }
    size_t extra = 0, end = 0;
    for (; extra < 64 && end < size && data[end] > 0 && data[end] < size - end; extra++)
        end += 1 + (size_t)data[end];
    size_t bytes = BPE_HEADER + 257 * 2 + end;
    uint8_t* file = (uint8_t*)allocate(bytes, 1);
    const uint32_t header[] = {BPE_MAGIC, 2, (uint32_t)(257 + extra), 256};
    for (int k = 0; k < 16; k++) file[k] = (uint8_t)(header[k / 4] >> 8 * (k % 4));
    for (int k = 0; k < 257; k++) {
        file[BPE_HEADER + 2 * k] = 1;
        file[BPE_HEADER + 2 * k + 1] = (uint8_t)k;
    }
    if (end) memcpy(file + BPE_HEADER + 257 * 2, data, end);
    if (!bpe_parse(&bpe, file, bytes, &e)) abort();
    fuzz_round_trip(&bpe, data + end, size - end);
    bpe_close(&bpe);
    free(file);
    return 0;
}

#endif

#endif
