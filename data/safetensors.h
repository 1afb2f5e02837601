// safetensors.h: tensors in and out, in the format of Hugging Face's safetensors.
//
//     8 bytes: length of the header, little endian | header: JSON, padded with spaces | data, no gaps
//
// A reader trusts nothing: shape, type and offsets of every tensor must agree with each other and with the
// length of the file. Parsing allocates nothing for data, and no array larger than about twice the header.
//
// Digests are ours, in `__metadata__`, where other readers ignore them: "digest.<tensor>" of a tensor's bytes
// and "digest" of the header with its own 16 digits zeroed. A file with "digest" must have all the others,
// and every read verifies. Files without (Hugging Face's) are read on trust.

#ifndef DATA_SAFETENSORS_H
#define DATA_SAFETENSORS_H

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../host/common.h"
#include "json.h"
#include "replace.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files are little endian and are read as they are"
#endif

typedef enum { SAFE_F32, SAFE_BF16, SAFE_F16, SAFE_I32, SAFE_OTHER } SafeType;  // OTHER: legal, not read here
enum { SAFE_MAX_RANK = 8, SAFE_MAX_HEADER = 100000000, SAFE_DIGITS = 16 };

typedef struct {
    char* name;
    SafeType type;
    short rank, dtype;                  // dtype: line of safe_dtypes
    uint64_t shape[SAFE_MAX_RANK];      // the product of those that are not 0 fits 64 bits
    uint64_t offset, bytes;             // offset from the start of the file
    uint64_t digest;
} SafeTensor;

typedef struct { char *key, *value; } SafePair;

typedef struct {
    SafeTensor* tensors;                // as they lie in the file
    SafeTensor** by_name;               // the same, sorted
    SafePair* metadata;                 // sorted by key
    int tensor_count, metadata_count;
    bool digested;
    const char* path;                   // before safetensors_parse the caller's, then a copy
    char* strings;                      // all that is pointed to above; NULL: nothing is open
    int file;                           // -1: header only
} SafeFile;

typedef struct { const char* name; SafeType type; int bits; } SafeDtype;

static const SafeDtype safe_dtypes[] = {
    {"F32", SAFE_F32, 32},          {"BF16", SAFE_BF16, 16},        {"F16", SAFE_F16, 16},
    {"I32", SAFE_I32, 32},          {"U32", SAFE_OTHER, 32},        {"F64", SAFE_OTHER, 64},
    {"I64", SAFE_OTHER, 64},        {"U64", SAFE_OTHER, 64},        {"C64", SAFE_OTHER, 64},
    {"I16", SAFE_OTHER, 16},        {"U16", SAFE_OTHER, 16},        {"I8", SAFE_OTHER, 8},
    {"U8", SAFE_OTHER, 8},          {"BOOL", SAFE_OTHER, 8},        {"F8_E4M3", SAFE_OTHER, 8},
    {"F8_E5M2", SAFE_OTHER, 8},     {"F8_E8M0", SAFE_OTHER, 8},     {"F8_E4M3FNUZ", SAFE_OTHER, 8},
    {"F8_E5M2FNUZ", SAFE_OTHER, 8}, {"F6_E2M3", SAFE_OTHER, 6},     {"F6_E3M2", SAFE_OTHER, 6},
    {"F4", SAFE_OTHER, 4},
};

// ------------------------------------------------------------------------------------------------
// Digest. Every step is a bijection of the state for given data and of the data for a given state: inputs of
// one length that differ within one 8-byte word never agree, others do with probability 2^-64.

enum { DIGEST_LANES = 4, DIGEST_BLOCK = 8 * DIGEST_LANES };

typedef struct {
    uint64_t lanes[DIGEST_LANES];       // independent chains, so that multiplications overlap
    uint64_t bytes;
    unsigned char rest[DIGEST_BLOCK];   // what does not fill a block yet
} Digest;

// The lanes start apart, or two of them could be exchanged unseen.
static inline Digest digest_begin(void) {
    Digest d;
    memset(&d, 0, sizeof d);
    for (int i = 0; i < DIGEST_LANES; i++) d.lanes[i] = mix64((uint64_t)i);
    return d;
}

// One word to each lane of a block: xor, a product with an odd number and a rotation can all be undone.
static inline void digest_blocks(Digest* d, const unsigned char* data, uint64_t blocks) {
    uint64_t h[DIGEST_LANES], word;
    memcpy(h, d->lanes, sizeof h);      // a copy: bytes may alias anything, registers may not
    for (; blocks > 0; blocks--)
        for (int i = 0; i < DIGEST_LANES; i++, data += 8) {
            memcpy(&word, data, 8);
            h[i] = (h[i] ^ word) * 0x9e3779b97f4a7c15u;
            h[i] = h[i] << 29 | h[i] >> 35;
        }
    memcpy(d->lanes, h, sizeof h);
}

// More data, in pieces of any size: the digest is that of them all in a row.
static inline void digest_add(Digest* d, const void* data, uint64_t bytes) {
    const unsigned char* at = (const unsigned char*)data;
    size_t held = d->bytes % DIGEST_BLOCK;
    d->bytes += bytes;
    if (held > 0) {
        size_t taken = bytes < DIGEST_BLOCK - held ? (size_t)bytes : DIGEST_BLOCK - held;
        memcpy(d->rest + held, at, taken);
        if (held + taken < DIGEST_BLOCK) return;
        digest_blocks(d, d->rest, 1);
        at += taken;
        bytes -= taken;
    }
    digest_blocks(d, at, bytes / DIGEST_BLOCK);
    if (bytes % DIGEST_BLOCK) memcpy(d->rest, at + bytes / DIGEST_BLOCK * DIGEST_BLOCK, bytes % DIGEST_BLOCK);
}

// The digest of what was added. d is used up.
static inline uint64_t digest_end(Digest* d) {
    size_t held = d->bytes % DIGEST_BLOCK;
    memset(d->rest + held, 0, DIGEST_BLOCK - held);     // the length tells this padding from data
    if (held > 0) digest_blocks(d, d->rest, 1);
    uint64_t h = d->bytes;
    for (int i = 0; i < DIGEST_LANES; i++) h = mix64(h ^ d->lanes[i]);
    return h;
}

// Of a header whose own digits stand at `digits`. The length in front of it counts as the digest's.
static inline uint64_t digest_header(const char* header, uint64_t bytes, const char* digits) {
    Digest d = digest_begin();
    const char* behind = digits + SAFE_DIGITS;
    digest_add(&d, header, (uint64_t)(digits - header));
    digest_add(&d, "0000000000000000", SAFE_DIGITS);
    digest_add(&d, behind, bytes - (uint64_t)(behind - header));
    return digest_end(&d);
}

// 16 lower-case digits: strictly one spelling, or a flipped bit could hide in another.
static inline bool digest_read(const char* text, uint64_t* digest) {
    size_t length = strspn(text, "0123456789abcdef");
    *digest = 0;
    if (length != SAFE_DIGITS || text[length]) return false;
    for (; *text; text++) *digest = *digest << 4 | (uint64_t)(*text <= '9' ? *text - '0' : *text - 'a' + 10);
    return true;
}

// ------------------------------------------------------------------------------------------------
// Parsing. The header is walked twice by the same code: once to count, once to fill what was allocated.

typedef struct {
    SafeFile* file;
    const char* path;
    JsonReader json;
    uint64_t data_bytes;
    char scratch[JSON_LABEL];           // the counting walk keeps no strings
    size_t string_bytes, room;
    bool metadata_seen;
    const char* digits;                 // of "digest" in the header, NULL: none
} SafeParser;

// The next string, NULL after a fault. While counting, its beginning, until the next call.
static inline char* safe_string(SafeParser* p) {
    bool counting = !p->file->strings;
    char* out = counting ? p->scratch : p->file->strings + p->string_bytes;
    long length = json_string(&p->json, out, counting ? sizeof p->scratch : p->room - p->string_bytes);
    if (length < 0) return NULL;
    p->string_bytes += (size_t)length + 1;
    return out;
}

// The value of __metadata__: strings only. Notes where the header's own digest stands: plain digits,
// since the digest is over this very text with zeros in their place.
static inline bool safe_metadata(SafeParser* p) {
    if (p->metadata_seen) return json_fail(&p->json, "__metadata__ twice");
    p->metadata_seen = true;
    json_expect(&p->json, '{', "expected an object of strings in __metadata__");
    for (bool first = true; json_item(&p->json, &first, '}'); p->file->metadata_count++) {
        char* key = safe_string(p);
        if (!key || !json_expect(&p->json, ':', "expected :")) return false;
        bool digest = strcmp(key, "digest") == 0;
        json_space(&p->json);
        const char* raw = p->json.at;
        char* value = safe_string(p);
        if (!value) return false;
        bool digits = p->json.at - raw == SAFE_DIGITS + 2;
        if (digest && !digits) return json_fail(&p->json, "expected 16 digits in digest");
        if (digest) p->digits = raw + 1;
        if (!p->file->strings) continue;
        p->file->metadata[p->file->metadata_count].key = key;
        p->file->metadata[p->file->metadata_count].value = value;
    }
    return !p->json.problem;
}

// A name from safe_dtypes. Another one has no known size, so the whole file cannot be checked.
static inline bool safe_dtype(SafeParser* p, SafeTensor* t, Error* e) {
    char name[16], label[JSON_LABEL], found[JSON_LABEL];
    if (json_string(&p->json, name, sizeof name) < 0) return false;
    for (size_t i = 0; i < sizeof safe_dtypes / sizeof *safe_dtypes; i++) {
        if (strcmp(safe_dtypes[i].name, name) != 0) continue;
        t->dtype = (short)i;
        t->type = safe_dtypes[i].type;
        return true;
    }
    return fail(e, "%s: tensor %s has the unknown dtype %s, expected F32, BF16 or F16; convert the file",
                p->path, json_label(label, t->name), json_label(found, name));
}

// The sizes, any number up to 2^64 - 1 each: safe_check_size looks at their product.
static inline bool safe_shape(SafeParser* p, SafeTensor* t, Error* e) {
    char label[JSON_LABEL];
    json_expect(&p->json, '[', "expected [ and a shape");
    for (bool first = true; json_item(&p->json, &first, ']'); t->rank++) {
        if (t->rank == SAFE_MAX_RANK)
            return fail(e, "%s: tensor %s has more than %d dimensions", p->path, json_label(label, t->name),
                        SAFE_MAX_RANK);
        if (!json_uint(&p->json, &t->shape[t->rank])) return false;
    }
    return !p->json.problem;
}

// Leaves the first byte, counted from the start of the data, in offset, and the end in bytes.
static inline bool safe_offsets(SafeParser* p, SafeTensor* t) {
    return json_expect(&p->json, '[', "expected [begin, end]") && json_uint(&p->json, &t->offset)
        && json_expect(&p->json, ',', "expected [begin, end]") && json_uint(&p->json, &t->bytes)
        && json_expect(&p->json, ']', "expected [begin, end]");
}

// Ties shape, dtype and offsets to each other and to the file, where readers of such formats get broken.
static inline bool safe_check_size(const SafeParser* p, SafeTensor* t, Error* e) {
    char label[JSON_LABEL];
    uint64_t bits = (uint64_t)safe_dtypes[t->dtype].bits, begin = t->offset, end = t->bytes;
    bool empty = false;
    for (int i = 0; i < t->rank; i++) {
        if (t->shape[i] == 0) empty = true;
        else if (bits > UINT64_MAX / t->shape[i])
            return fail(e, "%s: tensor %s has a shape beyond 2^64 bits", p->path, json_label(label, t->name));
        else bits *= t->shape[i];
    }
    if (empty) bits = 0;
    if (begin > end || end > p->data_bytes)
        return fail(e, "%s: tensor %s lies at %llu to %llu of %llu bytes of data: truncated or damaged, "
                    "fetch the file again", p->path, json_label(label, t->name), (unsigned long long)begin,
                    (unsigned long long)end, (unsigned long long)p->data_bytes);
    if (bits % 8 || bits / 8 != end - begin)
        return fail(e, "%s: tensor %s has %llu bytes of data, its shape and dtype %s need %llu: damaged",
                    p->path, json_label(label, t->name), (unsigned long long)(end - begin),
                    safe_dtypes[t->dtype].name, (unsigned long long)(bits / 8 + (bits % 8 != 0)));
    t->bytes = end - begin;
    return true;
}

// One description. Each of the three keys once and no other: what we do not know we cannot vouch for.
static inline bool safe_tensor(SafeParser* p, SafeTensor* t, Error* e) {
    int seen = 0;
    json_expect(&p->json, '{', "expected { and a tensor's dtype, shape and data_offsets");
    for (bool first = true; json_item(&p->json, &first, '}');) {
        char key[16];
        if (json_string(&p->json, key, sizeof key) < 0) return false;
        int field = strcmp(key, "dtype") == 0 ? 1 : strcmp(key, "shape") == 0 ? 2
                  : strcmp(key, "data_offsets") == 0 ? 4 : 0;
        if (!field) return json_fail(&p->json, "a tensor with a key besides dtype, shape and data_offsets");
        if (seen & field) return json_fail(&p->json, "a tensor with a key twice");
        seen |= field;
        if (!json_expect(&p->json, ':', "expected :")) return false;
        bool good = field == 1 ? safe_dtype(p, t, e) : field == 2 ? safe_shape(p, t, e) : safe_offsets(p, t);
        if (!good) return false;
    }
    if (seen != 7) return json_fail(&p->json, "a tensor without dtype, shape or data_offsets");
    return !p->json.problem && safe_check_size(p, t, e);
}

// One walk. On failure either e is written or p->json.problem is set.
static inline bool safe_walk(SafeParser* p, const char* header, uint64_t header_bytes, Error* e) {
    SafeFile* f = p->file;
    p->json.at = header;
    p->json.end = header + header_bytes;
    p->metadata_seen = false;
    f->tensor_count = f->metadata_count = 0;
    json_expect(&p->json, '{', "expected {");
    for (bool first = true; json_item(&p->json, &first, '}');) {
        SafeTensor one, *t = f->strings ? &f->tensors[f->tensor_count] : &one;
        memset(t, 0, sizeof *t);
        t->name = safe_string(p);
        if (!t->name || !json_expect(&p->json, ':', "expected :")) return false;
        bool metadata = strcmp(t->name, "__metadata__") == 0;
        if (!(metadata ? safe_metadata(p) : safe_tensor(p, t, e))) return false;
        if (!metadata) f->tensor_count++;
    }
    json_space(&p->json);
    return !p->json.problem && (p->json.at == p->json.end || json_fail(&p->json, "text behind the last }"));
}

// ------------------------------------------------------------------------------------------------
// Order, duplicates and digests of a parsed header

// For qsort: by place in the file.
static inline int safe_compare_place(const void* a, const void* b) {
    const SafeTensor *s = (const SafeTensor*)a, *t = (const SafeTensor*)b;
    if (s->offset != t->offset) return s->offset < t->offset ? -1 : 1;
    if (s->bytes != t->bytes) return s->bytes < t->bytes ? -1 : 1;      // empty before what begins there
    return s->name < t->name ? -1 : s->name > t->name;                  // in one array: the header's order
}

// For qsort of pointers: by name.
static inline int safe_compare_name(const void* a, const void* b) {
    return strcmp((*(SafeTensor* const*)a)->name, (*(SafeTensor* const*)b)->name);
}

// For qsort of pairs: by key.
static inline int safe_compare_key(const void* a, const void* b) {
    return strcmp(((const SafePair*)a)->key, ((const SafePair*)b)->key);
}

// Sorts, refuses gaps and overlaps, and makes offsets count from the start of the file.
static inline bool safe_place(SafeFile* f, uint64_t data_start, uint64_t file_bytes, Error* e) {
    char label[JSON_LABEL];
    uint64_t expected = data_start;
    qsort(f->tensors, (size_t)f->tensor_count, sizeof *f->tensors, safe_compare_place);
    for (int i = 0; i < f->tensor_count; i++) {
        SafeTensor* t = &f->tensors[i];
        t->offset += data_start;
        if (t->offset != expected)
            return fail(e, "%s: tensor %s starts at byte %llu, expected %llu: a gap or an overlap, damaged",
                        f->path, json_label(label, t->name), (unsigned long long)t->offset,
                        (unsigned long long)expected);
        expected += t->bytes;
    }
    return expected == file_bytes
        || fail(e, "%s: %llu bytes long, its tensors end at %llu: damaged, fetch the file again", f->path,
                (unsigned long long)file_bytes, (unsigned long long)expected);
}

// Sorts for the searches, and so brings together what occurs twice.
static inline bool safe_sort_names(SafeFile* f, Error* e) {
    char label[JSON_LABEL];
    for (int i = 0; i < f->tensor_count; i++) f->by_name[i] = &f->tensors[i];
    qsort(f->by_name, (size_t)f->tensor_count, sizeof *f->by_name, safe_compare_name);
    qsort(f->metadata, (size_t)f->metadata_count, sizeof *f->metadata, safe_compare_key);
    for (int i = 1; i < f->tensor_count; i++)
        if (safe_compare_name(&f->by_name[i - 1], &f->by_name[i]) == 0)
            return fail(e, "%s: tensor %s twice", f->path, json_label(label, f->by_name[i]->name));
    for (int i = 1; i < f->metadata_count; i++)
        if (safe_compare_key(&f->metadata[i - 1], &f->metadata[i]) == 0)
            return fail(e, "%s: %s twice in __metadata__", f->path, json_label(label, f->metadata[i].key));
    return true;
}

// Names and the keys "digest.<name>" are in the same order, so one walk along both pairs them.
static inline bool safe_tensor_digests(SafeFile* f, Error* e) {
    char label[JSON_LABEL];
    int k = 0;
    for (int i = 0; i < f->tensor_count; i++) {
        SafeTensor* t = f->by_name[i];
        const char* key = NULL;
        for (; k < f->metadata_count; k++) {
            key = f->metadata[k].key;
            if (strncmp(key, "digest.", 7) == 0 && strcmp(key + 7, t->name) >= 0) break;
        }
        bool found = k < f->metadata_count && strcmp(key + 7, t->name) == 0;
        if (!found || !digest_read(f->metadata[k].value, &t->digest))
            return fail(e, "%s: tensor %s has no digest of 16 hexadecimal digits, the header has: damaged",
                        f->path, json_label(label, t->name));
    }
    return true;
}

static inline const char* safetensors_meta(const SafeFile* f, const char* key);

// digits: where the header's own digest stands, NULL if it has none
static inline bool safe_digests(SafeFile* f, const char* header, uint64_t header_bytes, const char* digits,
                                Error* e) {
    uint64_t stored;
    for (int k = 0; k < f->metadata_count && !digits; k++)
        if (strncmp(f->metadata[k].key, "digest.", 7) == 0)
            return fail(e, "%s: has digests of its tensors and none of its header: damaged", f->path);
    if (!digits) return true;
    bool good = digest_read(safetensors_meta(f, "digest"), &stored);
    if (!good || stored != digest_header(header, header_bytes, digits))
        return fail(e, "%s: the header does not match its digest: damaged, use another copy", f->path);
    f->digested = true;
    return safe_tensor_digests(f, e);
}

// Does nothing to what is closed or was never opened (all zero).
static inline void safetensors_close(SafeFile* f) {
    if (!f->strings) return;
    if (f->file >= 0) close(f->file);
    free(f->tensors);
    free(f->by_name);
    free(f->metadata);
    free(f->strings);
    memset(f, 0, sizeof *f);
}

// Room for what the first walk has counted, exactly.
static inline void safe_allocate(SafeParser* p) {
    SafeFile* f = p->file;
    size_t path_room = strlen(p->path) + 1;
    p->room = path_room + p->string_bytes;
    p->string_bytes = path_room;
    f->tensors = (SafeTensor*)allocate((size_t)f->tensor_count + 1, sizeof *f->tensors);  // + 1: __metadata__
    f->by_name = (SafeTensor**)allocate((size_t)f->tensor_count, sizeof *f->by_name);     // begins as one
    f->metadata = (SafePair*)allocate((size_t)f->metadata_count, sizeof *f->metadata);
    f->strings = (char*)allocate(p->room, 1);
    memcpy(f->strings, p->path, path_room);
    f->path = f->strings;
}

// The first walk, and what must hold before it.
static inline bool safe_count(SafeParser* p, const char* header, uint64_t header_bytes, uint64_t file_bytes,
                              Error* e) {
    if (header_bytes > SAFE_MAX_HEADER || file_bytes < 8 || header_bytes > file_bytes - 8)
        return fail(e, "%s: not a safetensors file or truncated: %llu bytes long, a header of %llu promised",
                    p->path, (unsigned long long)file_bytes, (unsigned long long)header_bytes);
    if (header_bytes == 0 || header[0] != '{')
        return fail(e, "%s: not a safetensors file: the header does not start with {", p->path);
    p->data_bytes = file_bytes - 8 - header_bytes;
    if (safe_walk(p, header, header_bytes, e)) return true;
    if (!p->json.problem) return false;
    return fail(e, "%s: byte %llu of the header: %s; not a safetensors file or damaged", p->path,
                (unsigned long long)(p->json.at - header), p->json.problem);
}

// The header alone, of a file that is file_bytes long; f->path names it in messages. header is looked at only
// where it can fit into the file. After true, safetensors_close must follow; after false f is closed.
static inline bool safetensors_parse(SafeFile* f, const char* header, uint64_t header_bytes,
                                     uint64_t file_bytes, Error* e) {
    SafeParser p;
    memset(&p, 0, sizeof p);
    p.file = f;
    p.path = f->path;
    memset(f, 0, sizeof *f);
    f->file = -1;
    if (!safe_count(&p, header, header_bytes, file_bytes, e)) {
        memset(f, 0, sizeof *f);
        return false;
    }
    safe_allocate(&p);
    bool good = safe_walk(&p, header, header_bytes, e) && safe_place(f, 8 + header_bytes, file_bytes, e)
             && safe_sort_names(f, e) && safe_digests(f, header, header_bytes, p.digits, e);
    if (!good) safetensors_close(f);
    return good;
}

// ------------------------------------------------------------------------------------------------
// Opening and finding

// False with errno, which is 0 when the file ends too early.
static inline bool safe_read_at(int file, void* out, uint64_t bytes, uint64_t offset) {
    for (char* at = (char*)out; bytes > 0;) {
        errno = 0;
        ssize_t got = pread(file, at, bytes < 1u << 30 ? (size_t)bytes : (size_t)1 << 30, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        at += got;
        bytes -= (uint64_t)got;
        offset += (uint64_t)got;
    }
    return true;
}

static inline bool safe_read_fail(const char* path, Error* e) {
    return fail(e, "%s: cannot be read (%s)", path, errno ? strerror(errno) : "it became shorter meanwhile");
}

// Reads the header of an open file, if it can be one, and parses it. file stays the caller's.
static inline bool safe_open_file(SafeFile* f, int file, const char* path, Error* e) {
    struct stat info;
    uint64_t header_bytes;
    if (fstat(file, &info) != 0) return safe_read_fail(path, e);
    if (!S_ISREG(info.st_mode))
        return fail(e, "%s: %s, expected a safetensors file", path,
                    S_ISDIR(info.st_mode) ? "a directory" : "not a file");
    if (info.st_size < 8)
        return fail(e, "%s: %lld bytes long, expected a safetensors file", path, (long long)info.st_size);
    if (!safe_read_at(file, &header_bytes, 8, 0)) return safe_read_fail(path, e);
    bool fits = header_bytes <= SAFE_MAX_HEADER && header_bytes <= (uint64_t)info.st_size - 8;
    char* header = (char*)allocate(fits ? header_bytes : 0, 1);
    bool good = !fits || safe_read_at(file, header, header_bytes, 8) || safe_read_fail(path, e);
    f->path = path;
    good = good && safetensors_parse(f, header, header_bytes, (uint64_t)info.st_size, e);   // or says why
    free(header);
    return good;
}

// After true, safetensors_close must follow; after false f is closed.
static inline bool safetensors_open(SafeFile* f, const char* path, Error* e) {
    memset(f, 0, sizeof *f);
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);   // NONBLOCK: a pipe is refused, not waited for
    if (file < 0)
        return fail(e, "%s: cannot be opened (%s), expected a safetensors file", path, strerror(errno));
    bool good = safe_open_file(f, file, path, e);
    if (good) f->file = file;
    else close(file);
    return good;
}

// NULL if there is none.
static inline const SafeTensor* safetensors_find(const SafeFile* f, const char* name) {
    for (int low = 0, high = f->tensor_count; low < high;) {
        int middle = low + (high - low) / 2, order = strcmp(name, f->by_name[middle]->name);
        if (order == 0) return f->by_name[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

// NULL if there is none.
static inline const char* safetensors_meta(const SafeFile* f, const char* key) {
    for (int low = 0, high = f->metadata_count; low < high;) {
        int middle = low + (high - low) / 2, order = strcmp(key, f->metadata[middle].key);
        if (order == 0) return f->metadata[middle].value;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

// ------------------------------------------------------------------------------------------------
// Reading data

// The float that has these bits.
static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

static inline float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) {                // zero and what lies below 2^-14: steps of 2^-24
        float value = (float)fraction / 16777216.0f;
        return sign ? -value : value;
    }
    return float_of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

// bytes of data, which are the tensor's from byte `done` on, as floats (or I32 as it is) into out
static inline void safe_convert(void* out, uint64_t done, const unsigned char* data, size_t bytes,
                                SafeType type) {
    if (type == SAFE_F32 || type == SAFE_I32) {
        memcpy((char*)out + done, data, bytes);
        return;
    }
    float* value = (float*)out + done / 2;
    for (size_t i = 0; i < bytes; i += 2, value++) {
        uint16_t half;
        memcpy(&half, data + i, 2);
        *value = type == SAFE_BF16 ? float_of_bf16(half) : float_of_f16(half);
    }
}

// Reads a tensor in pieces through its digest, into out where that is not NULL.
static inline bool safe_read(const SafeFile* f, const SafeTensor* t, void* out, Error* e) {
    unsigned char piece[1 << 16];
    char label[JSON_LABEL];
    Digest digest = digest_begin();
    for (uint64_t done = 0; done < t->bytes;) {
        size_t bytes = t->bytes - done < sizeof piece ? (size_t)(t->bytes - done) : sizeof piece;
        if (!safe_read_at(f->file, piece, bytes, t->offset + done)) return safe_read_fail(f->path, e);
        if (f->digested) digest_add(&digest, piece, bytes);
        if (out) safe_convert(out, done, piece, bytes, t->type);
        done += bytes;
    }
    if (!f->digested || digest_end(&digest) == t->digest) return true;
    return fail(e, "%s: tensor %s is damaged (its bytes do not match its digest); use another copy", f->path,
                json_label(label, t->name));
}

// Number of elements.
static inline uint64_t safetensors_count(const SafeTensor* t) {
    uint64_t count = 1;
    for (int i = 0; i < t->rank; i++) count *= t->shape[i];
    return count;
}

// False, with the line that says so.
static inline bool safe_wrong_type(const SafeFile* f, const SafeTensor* t, const char* expected, Error* e) {
    char label[JSON_LABEL];
    return fail(e, "%s: tensor %s is %s, expected %s; convert the file", f->path, json_label(label, t->name),
                safe_dtypes[t->dtype].name, expected);
}

// All of a tensor into out, safetensors_count numbers. False also when its digest does not match.
static inline bool safetensors_read_f32(const SafeFile* f, const SafeTensor* t, float* out, Error* e) {
    bool good = t->type == SAFE_F32 || t->type == SAFE_BF16 || t->type == SAFE_F16;
    return good ? safe_read(f, t, out, e) : safe_wrong_type(f, t, "F32, BF16 or F16", e);
}

// The same for whole numbers: the tokens of a dump.
static inline bool safetensors_read_i32(const SafeFile* f, const SafeTensor* t, int32_t* out, Error* e) {
    return t->type == SAFE_I32 ? safe_read(f, t, out, e) : safe_wrong_type(f, t, "I32", e);
}

// Every tensor against its digest, without keeping any. The header was checked at opening.
static inline bool safetensors_verify(const SafeFile* f, Error* e) {
    for (int i = 0; i < f->tensor_count; i++)
        if (!safe_read(f, &f->tensors[i], NULL, e)) return false;
    return true;
}

// ------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    const char* name;
    SafeType type;                      // F32 or I32: 4 bytes each
    int rank;
    uint64_t shape[SAFE_MAX_RANK];
    const void* data;
} SafeOut;

// The tensor is in memory, so its size cannot overflow.
static inline uint64_t safe_out_bytes(const SafeOut* t) {
    uint64_t bytes = 4;
    for (int i = 0; i < t->rank; i++) bytes *= t->shape[i];
    return bytes;
}

// The writer's own digests; pairs of these names that come with a copied file are left out.
static inline bool safe_is_digest(const char* key) {
    return strcmp(key, "digest") == 0 || strncmp(key, "digest.", 7) == 0;
}

// Our digests, then the caller's pairs. The header's own digest comes first, so that its zeros are the first.
static inline void safe_write_metadata(FILE* out, const SafeOut* tensors, const uint64_t* digests, int count,
                                       const SafePair* pairs, int pair_count) {
    fputs("\"__metadata__\":{\"digest\":\"0000000000000000\"", out);
    for (int i = 0; i < count; i++) {
        size_t room = strlen(tensors[i].name) + sizeof "digest.";
        char* key = (char*)allocate(room, 1);
        snprintf(key, room, "digest.%s", tensors[i].name);
        fputc(',', out);
        json_write_string(out, key);
        fprintf(out, ":\"%016llx\"", (unsigned long long)digests[i]);
        free(key);
    }
    for (int i = 0; i < pair_count; i++) {
        if (safe_is_digest(pairs[i].key)) continue;
        fputc(',', out);
        json_write_string(out, pairs[i].key);
        fputc(':', out);
        json_write_string(out, pairs[i].value);
    }
    fputc('}', out);
}

// A description of each tensor, one behind the other.
static inline void safe_write_entries(FILE* out, const SafeOut* tensors, int count) {
    uint64_t begin = 0;
    for (int i = 0; i < count; i++) {
        const SafeOut* t = &tensors[i];
        uint64_t end = begin + safe_out_bytes(t);
        fputc(',', out);
        json_write_string(out, t->name);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", t->type == SAFE_F32 ? "F32" : "I32");
        for (int d = 0; d < t->rank; d++) fprintf(out, d ? ",%llu" : "%llu", (unsigned long long)t->shape[d]);
        fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin, (unsigned long long)end);
        begin = end;
    }
}

// The length, then the header, as one block that free() releases; bytes: of both, the same whatever the
// digests are.
static inline char* safe_header(const SafeOut* tensors, const uint64_t* digests, int count,
                                const SafePair* pairs, int pair_count, size_t* bytes) {
    char *block = NULL, digits[SAFE_DIGITS + 1];
    FILE* out = open_memstream(&block, bytes);
    if (!out) die("out of memory for the header of a safetensors file");
    for (int i = 0; i < 8; i++) fputc(0, out);          // the place of the length
    fputc('{', out);
    safe_write_metadata(out, tensors, digests, count, pairs, pair_count);
    safe_write_entries(out, tensors, count);
    fputc('}', out);
    while (ftell(out) % 8 != 0) fputc(' ', out);        // so that data can be mapped as what it is
    bool good = !ferror(out);
    if (fclose(out) != 0 || !good) die("out of memory for the header of a safetensors file");
    uint64_t header_bytes = *bytes - 8;
    memcpy(block, &header_bytes, 8);
    char* place = strstr(block + 8, "0000000000000000");
    snprintf(digits, sizeof digits, "%016llx",
             (unsigned long long)digest_header(block + 8, header_bytes, place));
    memcpy(place, digits, SAFE_DIGITS);
    return block;
}

// Whether we would read a file with this header (`bytes` with its length): if not, it is not written.
static inline bool safe_readable(const char* path, const char* header, size_t bytes, const SafeOut* tensors,
                                 int count, Error* e) {
    SafeFile check;
    uint64_t file_bytes = bytes;
    for (int i = 0; i < count; i++) file_bytes += safe_out_bytes(&tensors[i]);
    check.path = path;
    bool good = safetensors_parse(&check, header + 8, bytes - 8, file_bytes, e);
    if (good) safetensors_close(&check);
    return good;
}

// Replaces path by a file with these tensors, in this order, and this metadata: all or nothing, from the
// caller's memory. Names and metadata are UTF-8; other bytes become U+FFFD.
static inline bool safetensors_write(const char* path, const SafeOut* tensors, int count,
                                     const SafePair* metadata, int metadata_count, Error* e) {
    ReplacedFile file;
    size_t bytes;
    uint64_t* digests = (uint64_t*)allocate((size_t)count, sizeof(uint64_t));
    for (int i = 0; i < count; i++) {
        Digest digest = digest_begin();
        digest_add(&digest, tensors[i].data, safe_out_bytes(&tensors[i]));
        digests[i] = digest_end(&digest);
    }
    char* header = safe_header(tensors, digests, count, metadata, metadata_count, &bytes);
    free(digests);
    bool good = safe_readable(path, header, bytes, tensors, count, e);
    good = good && replace_begin(&file, path, e) && replace_write(&file, header, bytes, e);
    for (int i = 0; i < count && good; i++)
        good = replace_write(&file, tensors[i].data, safe_out_bytes(&tensors[i]), e);
    good = good && replace_end(&file, e);
    free(header);
    return good;
}

#ifdef FUZZING
// Input: two bytes for the length of the data, then the header.
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    SafeFile f;
    Error e;
    if (size < 2) return 0;
    memset(&f, 0, sizeof f);
    f.path = "fuzz";
    if (!safetensors_parse(&f, (const char*)data + 2, size - 2, size + 6 + data[0] + 256u * data[1], &e)) {
        if (memchr(e.text, '\n', strlen(e.text)) || f.strings) abort();
        return 0;
    }
    uint64_t sum = 8 + (size - 2);
    for (int i = 0; i < f.tensor_count; i++) {
        const SafeTensor* t = &f.tensors[i];
        if (safetensors_find(&f, t->name) != t || t->offset != sum) abort();
        if (safetensors_count(t) * (uint64_t)safe_dtypes[t->dtype].bits != t->bytes * 8) abort();
        sum += t->bytes;
    }
    for (int i = 0; i < f.metadata_count; i++)
        if (safetensors_meta(&f, f.metadata[i].key) != f.metadata[i].value) abort();
    safetensors_close(&f);
    return 0;
}
#endif

#endif
