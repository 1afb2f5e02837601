// tokens.h: where the tokens come from: a text in memory, or llm.c's token shards on disk.
//
// Which tokens a training sequence holds is a function of the seed and the sequence's number alone. So
// there is no loader state to save, and a run that is resumed, or spread over other ranks, sees the same
// data.
//
// A shard: 256 int32 (magic, version, number of tokens), then the tokens: uint16 of GPT-2's vocabulary
// (magic 20240520, version 1) or uint32 of Llama 3's (20240801, version 7).

#ifndef DATA_TOKENS_H
#define DATA_TOKENS_H

#include "bpe.h"

#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <unistd.h>

enum { SHARD_HEADER = 256 * 4, SHARD_PAGE = 4096 };

typedef struct {
    char* path;
    uint64_t count;             // tokens
} Shard;

typedef struct {
    char* name;                 // the file or pattern it was opened as, for messages
    int width;                  // bytes of one token: 1, 2 or 4
    int vocab;
    uint64_t count, fingerprint;
    const uint8_t* text;        // (count * width) NULL for shards
    uint64_t first;             // where in the whole text this part starts, for messages
    void* owned;                // the memory of text, if it is ours to free
    Shard* shards;              // (shard_count) sorted by path
    int shard_count;
} Tokens;

static inline char* tokens_copy_name(const char* name) {
    char* copy = (char*)allocate(strlen(name) + 1, 1);
    return strcpy(copy, name);
}

// The hash of a run of bytes, chained from hash.
static inline uint64_t tokens_hash(uint64_t hash, const void* data, size_t bytes) {
    const uint8_t* at = (const uint8_t*)data;
    hash = hash64(hash, bytes);
    while (bytes > 0) {
        uint64_t word = 0;
        size_t step = bytes < sizeof word ? bytes : sizeof word;
        memcpy(&word, at, step);
        hash = hash64(hash, word);
        at += step;
        bytes -= step;
    }
    return hash;
}

// ------------------------------------------------------------------------------------------------
// A text. The training part owns the memory of both parts: it is closed last.

// Replaces the text's bytes by its tokens: piece by piece, since all tokens at once as int32 would need
// four times the memory of the text.
static inline void tokens_encode(Tokens* t, const Bpe* bpe) {
    const uint8_t* text = t->text;
    size_t bytes = (size_t)t->count, width = bpe_vocab(bpe) <= 65536 ? 2 : 4, room = 0, count = 0;
    uint8_t* packed = (uint8_t*)allocate(bytes, width);
    int32_t* tokens = NULL;
    BpeWork work;
    memset(&work, 0, sizeof work);
    for (size_t at = 0, piece; at < bytes; at += piece) {
        piece = bpe_piece(text + at, bytes - at);
        if (piece > room) {
            free(tokens);
            room = piece > 256 ? piece : 256;
            tokens = (int32_t*)allocate(room, sizeof *tokens);
        }
        size_t found = bpe_encode_piece(bpe, &work, text + at, piece, tokens);
        for (size_t k = 0; k < found * width; k++)
            packed[count * width + k] = (uint8_t)((uint32_t)tokens[k / width] >> 8 * (k % width));
        count += found;
    }
    bpe_work_free(&work);
    free(tokens);
    free(t->owned);
    t->width = (int)width;
    t->vocab = bpe_vocab(bpe);
    t->count = count;
    void* shrunk = realloc(packed, count * width);
    t->owned = shrunk ? shrunk : packed;
    t->text = (const uint8_t*)t->owned;
}

// Cuts the last tenth off train, which holds the whole text.
static inline void tokens_split(Tokens* train, Tokens* val) {
    *val = *train;
    val->name = tokens_copy_name(train->name);
    val->owned = NULL;
    val->count = train->count / 10;
    train->count -= val->count;
    val->first = train->count;
    val->text += val->first * (uint64_t)val->width;
}

// A text of which the last tenth of the tokens is for validation; with val NULL, train gets all of it.
// Without a tokenizer the bytes are the tokens; bpe is not needed afterwards. owned is text, or NULL if it
// is borrowed: then it must outlive both parts.
static inline void tokens_from_text(Tokens* train, Tokens* val, const char* name, const uint8_t* text,
                                    size_t bytes, void* owned, const Bpe* bpe) {
    memset(train, 0, sizeof *train);
    train->name = tokens_copy_name(name);
    train->width = 1;
    train->vocab = 256;
    train->count = bytes;
    train->text = text;
    train->owned = owned;
    if (bpe) tokens_encode(train, bpe);
    train->fingerprint = tokens_hash((uint64_t)train->vocab, train->text,
                                     (size_t)train->count * (size_t)train->width);
    if (val) tokens_split(train, val);
}

// The built-in corpus, borrowed.
static inline void tokens_from_memory(Tokens* train, Tokens* val, const uint8_t* text, size_t bytes) {
    tokens_from_text(train, val, "built-in corpus", text, bytes, NULL, NULL);
}

// A text file. After false there is nothing to close.
static inline bool tokens_open_text(Tokens* train, Tokens* val, const char* path, const Bpe* bpe, Error* e) {
    size_t bytes;
    uint8_t* text = file_read(path, &bytes, "a text, or llm.c token shards, whose names end in .bin", e);
    memset(train, 0, sizeof *train);
    if (val) memset(val, 0, sizeof *val);
    if (!text) return false;
    tokens_from_text(train, val, path, text, bytes, text, bpe);
    return true;
}

// ------------------------------------------------------------------------------------------------
// Shards. A file is opened anew for every read: a data set has more shards than a process may hold open. It
// is not mapped, because pages of a mapped file would count as our memory.

// Whether --data names shards rather than a text.
static inline bool tokens_are_shards(const char* data) {
    size_t length = strlen(data);
    return length >= 4 && strcmp(data + length - 4, ".bin") == 0;
}

// Checks the first bytes (at most SHARD_HEADER of them are looked at) of a file of file_bytes.
static inline bool shard_parse(const uint8_t* header, size_t bytes, uint64_t file_bytes, const char* path,
                               int* width, uint64_t* count, Error* e) {
    static const struct { uint32_t magic, version; int width; } kinds[] = {
        {20240520, 1, 2}, {20240801, 7, 4}};
    if (bytes < SHARD_HEADER)
        return fail(e, "%s: %zu bytes, expected a token shard, whose header alone has %d", path, bytes,
                    SHARD_HEADER);
    uint32_t magic = little32(header), version = little32(header + 4);
    uint32_t swapped = magic >> 24 | (magic >> 8 & 0xff00) | (magic << 8 & 0xff0000) | magic << 24;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        if (swapped == kinds[k].magic)
            return fail(e, "%s: a big-endian token shard, expected little-endian: write it again", path);
        if (magic != kinds[k].magic) continue;
        if (version != kinds[k].version)
            return fail(e, "%s: version %u, expected %u for a shard with magic number %u", path, version,
                        kinds[k].version, magic);
        *width = kinds[k].width;
        *count = little32(header + 8);
        uint64_t expected = SHARD_HEADER + *count * (uint64_t)*width;
        if (*count == 0) return fail(e, "%s: holds no tokens, expected at least one", path);
        if (file_bytes == expected) return true;
        return fail(e, "%s: %" PRIu64 " bytes, expected %" PRIu64 " for the %" PRIu64
                    " tokens that its header announces: %s", path, file_bytes, expected, *count,
                    file_bytes < expected ? "cut short, fetch it again" : "damaged");
    }
    return fail(e, "%s: magic number %u, expected %u or %u (llm.c token shards)", path, magic,
                kinds[0].magic, kinds[1].magic);
}

// Reads up to bytes bytes at offset; less only at the end of the file. -1 and an error line if that fails.
static inline ptrdiff_t shard_read(const char* path, uint64_t offset, void* out, size_t bytes, Error* e) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    size_t done = 0;
    while (file >= 0 && done < bytes) {
        ssize_t step = pread(file, (uint8_t*)out + done, bytes - done, (off_t)(offset + done));
        if (step < 0 && errno == EINTR) continue;
        if (step < 0) {
            int reason = errno;
            close(file);
            file = -1;
            errno = reason;
        } else if (step == 0) break;
        else done += (size_t)step;
    }
    if (file < 0) {
        fail(e, "%s: %s", path, strerror(errno));
        return -1;
    }
    close(file);
    return (ptrdiff_t)done;
}

// Adds one file: its header, its size and name and its first and last page in the fingerprint.
static inline bool tokens_add_shard(Tokens* t, const char* path, Error* e) {
    uint8_t page[SHARD_PAGE];
    uint64_t bytes = 0, count = 0;
    int width = 0;
    if (!file_size(&bytes, path, "llm.c token shards (data/fineweb.py fetches some)", e)) return false;
    ptrdiff_t got = shard_read(path, 0, page, sizeof page, e);
    if (got < 0 || !shard_parse(page, (size_t)got, bytes, path, &width, &count, e)) return false;
    if (t->shard_count && width != t->width)
        return fail(e, "%s: %d-byte tokens, expected %d-byte ones as in %s: one kind at a time", path,
                    width, t->width, t->shards[0].path);
    const char* slash = strrchr(path, '/');
    const char* base = slash ? slash + 1 : path;
    t->fingerprint = tokens_hash(hash64(t->fingerprint, bytes), base, strlen(base));
    t->fingerprint = tokens_hash(t->fingerprint, page, (size_t)got);
    got = shard_read(path, bytes > sizeof page ? bytes - sizeof page : 0, page, sizeof page, e);
    if (got < 0) return false;
    t->fingerprint = tokens_hash(t->fingerprint, page, (size_t)got);
    t->width = width;
    t->count += count;
    t->shards[t->shard_count].path = tokens_copy_name(path);
    t->shards[t->shard_count++].count = count;
    return true;
}

// Releases everything; of a text's two parts the training part goes last.
static inline void tokens_close(Tokens* t) {
    for (int k = 0; k < t->shard_count; k++) free(t->shards[k].path);
    free(t->shards);
    free(t->owned);
    free(t->name);
    memset(t, 0, sizeof *t);
}

// All shards that a shell pattern names, in the order of their names. After false there is nothing to close.
static inline bool tokens_open_shards(Tokens* t, const char* pattern, Error* e) {
    memset(t, 0, sizeof *t);
    glob_t found;
    if (glob(pattern, GLOB_NOCHECK, NULL, &found) != 0)     // no match gives the pattern, a missing file
        return fail(e, "%s: no memory to list the files it names", pattern);
    t->name = tokens_copy_name(pattern);
    t->shards = (Shard*)allocate(found.gl_pathc, sizeof *t->shards);
    bool good = true;
    for (size_t k = 0; k < found.gl_pathc && good; k++) good = tokens_add_shard(t, found.gl_pathv[k], e);
    globfree(&found);
    t->vocab = t->width == 2 ? 50257 : 128256;
    if (!good) tokens_close(t);
    return good;
}

// ------------------------------------------------------------------------------------------------
// What is there.

static inline uint64_t tokens_count(const Tokens* t) { return t->count; }

// The vocabulary that these tokens are of, when nothing else says which.
static inline int tokens_default_vocab(const Tokens* t) { return t->vocab; }

// A number that tells this data from other data, for resume: of a text all its tokens, of shards their
// names, sizes, first and last pages.
static inline uint64_t tokens_fingerprint(const Tokens* t) { return t->fingerprint; }

// What the tokens take of our memory; both parts of a text together have its size.
static inline size_t tokens_resident_bytes(const Tokens* t) {
    if (t->text) return (size_t)t->count * (size_t)t->width;
    size_t bytes = (size_t)t->shard_count * sizeof *t->shards;
    for (int k = 0; k < t->shard_count; k++) bytes += strlen(t->shards[k].path) + 1;
    return bytes;
}

// Windows of T tokens and the one after, which share no target: those that validation goes through in order.
static inline uint64_t tokens_val_windows(const Tokens* t, int T) {
    assert(T > 0);
    if (t->text) return t->count ? (t->count - 1) / (uint64_t)T : 0;
    uint64_t windows = 0;
    for (int k = 0; k < t->shard_count; k++) windows += (t->shards[k].count - 1) / (uint64_t)T;
    return windows;
}

// Whether there is one window at least.
static inline bool tokens_check(const Tokens* t, int T, Error* e) {
    if (tokens_val_windows(t, T) > 0) return true;
    uint64_t longest = t->text || !t->shards ? t->count : 0;
    for (int k = 0; k < t->shard_count; k++)
        if (t->shards[k].count > longest) longest = t->shards[k].count;
    const char* where = t->shards ? " in the longest shard" : t->first ? " in the validation tenth" : "";
    return fail(e, "%s: %" PRIu64 " tokens%s, expected at least %" PRId64
                " (a sequence and the target of its last token): use more data or a smaller --seq",
                t->name, longest, where, (int64_t)T + 1);
}

// ------------------------------------------------------------------------------------------------
// Windows.

// Where item goes in a random order of 0 .. count - 1, without a table: a Feistel network permutes the
// numbers of an even number of bits, the fewest that hold count; whoever lands outside goes on until
// inside.
static inline uint64_t tokens_permute(uint64_t key, uint64_t item, uint64_t count) {
    int half = 1;
    while (half < 32 && count > (uint64_t)1 << 2 * half) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t left = item >> half, right = item & mask;
            item = right << half | (left ^ (hash64(key, round << 32 | right) & mask));
        }
    } while (item >= count);
    return item;
}

// Copies count tokens from a token of the text, or of one shard, on.
static inline bool tokens_copy(const Tokens* t, const Shard* shard, uint64_t start, int count, int vocab,
                               int32_t* out, Error* e) {
    size_t width = (size_t)t->width, bytes = (size_t)count * width;
    const uint8_t* from = (const uint8_t*)out;          // read narrow, then widened in place from the end
    if (shard) {
        ptrdiff_t got = shard_read(shard->path, SHARD_HEADER + start * width, out, bytes, e);
        if (got < 0) return false;
        if ((size_t)got < bytes) return fail(e, "%s: became shorter while it was read", shard->path);
    } else from = t->text + start * width;
    for (int k = count - 1; k >= 0; k--) {
        uint32_t token = 0;
        for (size_t b = 0; b < width; b++) token |= (uint32_t)from[(size_t)k * width + b] << 8 * b;
        out[k] = (int32_t)token;
    }
    for (int k = 0; k < count; k++)
        if ((uint32_t)out[k] >= (uint32_t)vocab)
            return fail(e, "%s: token %u at position %" PRIu64
                        ", expected less than the vocabulary size %d: give --vocab or other data",
                        shard ? shard->path : t->name, (uint32_t)out[k], t->first + start + (uint64_t)k,
                        vocab);
    return true;
}

// inputs (T) and targets (T), one token later, from a token of the text, or of one shard, on.
static inline bool tokens_copy_window(const Tokens* t, const Shard* shard, uint64_t start, int T, int vocab,
                                      int32_t* inputs, int32_t* targets, Error* e) {
    if (!tokens_copy(t, shard, start, T, vocab, inputs, e)) return false;
    if (!tokens_copy(t, shard, start + (uint64_t)T, 1, vocab, targets + T - 1, e)) return false;
    memcpy(targets, inputs + 1, (size_t)(T - 1) * sizeof *targets);
    return true;
}

// Validation: window w of tokens_val_windows, in order.
static inline bool tokens_val_window(const Tokens* t, uint64_t w, int T, int vocab, int32_t* inputs,
                                     int32_t* targets, Error* e) {
    if (!tokens_check(t, T, e)) return false;
    assert(w < tokens_val_windows(t, T));
    if (t->text) return tokens_copy_window(t, NULL, w * (uint64_t)T, T, vocab, inputs, targets, e);
    const Shard* shard = t->shards;
    for (uint64_t here; w >= (here = (shard->count - 1) / (uint64_t)T); shard++) w -= here;
    return tokens_copy_window(t, shard, w * (uint64_t)T, T, vocab, inputs, targets, e);
}

// Training: sequence g. A text is entered anywhere; of shards, each epoch visits every window once, in its
// own order.
static inline bool tokens_train_window(const Tokens* t, uint64_t seed, uint64_t g, int T, int vocab,
                                       int32_t* inputs, int32_t* targets, Error* e) {
    if (!tokens_check(t, T, e)) return false;
    if (t->text) {
        uint64_t start = hash64(seed, g) % (t->count - (uint64_t)T);
        return tokens_copy_window(t, NULL, start, T, vocab, inputs, targets, e);
    }
    uint64_t windows = tokens_val_windows(t, T), epoch = g / windows;
    uint64_t w = tokens_permute(hash64(seed, epoch), g % windows, windows);
    return tokens_val_window(t, w, T, vocab, inputs, targets, e);
}

// ------------------------------------------------------------------------------------------------
// Fuzzing: the input as the start of a shard, whose length is what the header announces or the input's own.

#if defined(FUZZING) && __INCLUDE_LEVEL__ == 0
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Error e;
    int width;
    uint64_t count, announced = size >= 12 ? SHARD_HEADER + 2 * (uint64_t)little32(data + 8) : 0;
    const uint64_t lengths[] = {size, announced, 2 * announced - SHARD_HEADER};
    for (int k = 0; k < 3; k++)
        if (shard_parse(data, size, lengths[k], "fuzz", &width, &count, &e)
            && (size < SHARD_HEADER || SHARD_HEADER + count * (uint64_t)width != lengths[k])) abort();
    return 0;
}
#endif

#endif
