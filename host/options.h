// options.h: the command line, configuration files and a checkpoint's configuration, from one table.
//
// A row of option_rows is one option: adding one is a row there and a field in Options. The same text form
// of a value is read from the command line, a --config file and a checkpoint, and written to the run log.

#ifndef HOST_OPTIONS_H
#define HOST_OPTIONS_H

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>

#include "common.h"

enum { OPTION_SIZE = 4096 };    // bytes of the longest value as text, with its end
enum { RECOMPUTE_AUTO = -1, BATCH_AUTO = -1 };      // `auto` of a KIND_AUTO

// Their order is the order of the words in the table.
enum Residual { RESIDUAL_NONE, RESIDUAL_PLAIN, RESIDUAL_HC, RESIDUAL_MHC, RESIDUAL_IHC };
enum SinkhornOrder { ORDER_CR, ORDER_RC, ORDER_C, ORDER_R, ORDER_NONE };
enum LrSchedule { SCHEDULE_COSINE, SCHEDULE_WSD, SCHEDULE_LINEAR, SCHEDULE_STEP, SCHEDULE_CONSTANT };
enum OnSpike { SPIKE_STOP, SPIKE_SKIP, SPIKE_IGNORE };
enum Kernels { KERNELS_PLAIN, KERNELS_FUSED };
enum Pipeline { PIPELINE_NONE, PIPELINE_1F1B, PIPELINE_DUALPIPEV, PIPELINE_DUALPIPE };
enum Priority { PRIORITY_NONE, PRIORITY_POST, PRIORITY_RECOMPUTE, PRIORITY_ALL };      // bits
enum HcMaps { MAP_PRE = 1, MAP_POST = 2, MAP_RES = 4 };    // bits

typedef struct {
    // model
    char model[64];
    long layers, width, heads, seq, vocab;      // vocab 0: whoever opens the data decides
    int residual, sinkhorn_order, hc_maps;      // enum Residual, enum SinkhornOrder, bits of enum HcMaps
    long streams, sinkhorn_iters;
    bool hc_static;
    double hc_gap;
    // data; an empty path is none
    char data[OPTION_SIZE], val_data[OPTION_SIZE], tokenizer[OPTION_SIZE];
    // batch
    long batch, micro_batches;
    // optimiser
    long steps, warmup, seed;
    int schedule;                               // enum LrSchedule
    double lr, min_lr_frac, weight_decay, beta1, beta2, eps, grad_clip;
    // numerics and memory
    int on_spike, kernels;                      // enum OnSpike, enum Kernels
    long recompute;                             // sublayers, or RECOMPUTE_AUTO
    bool plan;
    // parallel
    int pipeline, priority;                     // enum Pipeline, enum Priority
    long ranks;                                 // of a pipeline; 0: all there are, 1 without a pipeline
    char pp_layers[OPTION_SIZE], trace[OPTION_SIZE];
    double timeout, link_gbs, tflops;           // seconds; GB/s, TFLOP/s for plans
    bool print_schedule;
    // output
    char out[OPTION_SIZE], init_from[OPTION_SIZE];
    bool overwrite, resume;
    long log_every, val_every, val_batches, sample_every, gain_every, save_every, keep;
    // modes
    char config[OPTION_SIZE], generate[OPTION_SIZE], dump[OPTION_SIZE];
    long tokens, top_k;
    double temperature;
    bool eval, version, help;
} Options;

// ------------------------------------------------------------------------------------------------
// The table

typedef enum { GROUP_MODEL, GROUP_DATA, GROUP_BATCH, GROUP_OPTIMISER,   // up to here checkpoints keep them
               GROUP_NUMERICS, GROUP_MEMORY, GROUP_PARALLEL, GROUP_OUTPUT, GROUP_MODES, GROUP_COUNT } OptionGroup;

typedef enum {
    KIND_COUNT,         // long, within limits
    KIND_AUTO,          // long, or `auto`, which is -1
    KIND_NUMBER,        // double, within limits
    KIND_SWITCH,        // bool; alone on the command line it is true
    KIND_CHOICE,        // int, the place of the word in limits
    KIND_MAPS,          // int, bits in the order of the words in limits
    KIND_MODEL,         // char[], a name that model_find knows
    KIND_PATH,          // char[]
    KIND_TEXT           // char[], which may hold line ends
} OptionKind;

typedef struct {
    const char* name;
    OptionGroup group;
    OptionKind kind;
    size_t offset, size;        // of the field in Options
    const char* standard;       // the default as text; empty: the field starts as zero
    const char* limits;         // "> 0", ">= 0", "1 to 8", or the words to choose from
    const char* help;           // what it is, in which unit
} OptionRow;

#define ROW(group, kind, name, field, standard, limits, help) \
    {name, GROUP_##group, KIND_##kind, offsetof(Options, field), sizeof(((Options*)0)->field), \
     standard, limits, help}

static const OptionRow option_rows[] = {
    ROW(MODEL, MODEL, "model", model, "tiny", "tiny|dL|gpt2|gpt2-medium|gpt2-large|gpt2-xl, to plan paper-3b|-9b|-27b",
        "shape of the model; dL, as in d12: L layers, width 64 L, L heads, seq 1024"),
    ROW(MODEL, COUNT, "layers", layers, "", "1 to 10000", "transformer blocks, two sublayers each"),
    ROW(MODEL, COUNT, "width", width, "", "1 to 1000000", "channels of one stream"),
    ROW(MODEL, COUNT, "heads", heads, "", "1 to 1000000", "attention heads, a divisor of --width"),
    ROW(MODEL, COUNT, "seq", seq, "", "1 to 10000000", "tokens in a sequence"),
    ROW(MODEL, COUNT, "vocab", vocab, "0", "0 to 10000000", "tokens in the vocabulary; 0: as the data has"),
    ROW(MODEL, CHOICE, "residual", residual, "mhc", "none|plain|hc|mhc|ihc", "connection around a sublayer"),
    ROW(MODEL, COUNT, "streams", streams, "4", "1 to 8", "parallel residual streams"),
    ROW(MODEL, COUNT, "sinkhorn-iters", sinkhorn_iters, "20", "1 to 100", "Sinkhorn-Knopp iterations"),
    ROW(MODEL, CHOICE, "sinkhorn-order", sinkhorn_order, "cr", "cr|rc|c|r|none",
        "what an iteration normalises: columns, rows"),
    ROW(MODEL, MAPS, "hc-maps", hc_maps, "pre,post,res", "pre|post|res",
        "learned maps, with commas between, or none; the others stay 1/n, 1, identity"),
    ROW(MODEL, SWITCH, "hc-static", hc_static, "", "", "maps that do not depend on the input"),
    ROW(MODEL, NUMBER, "hc-gap", hc_gap, "4", "0 to 100",
        "bias of the mixing to the identity at the start, in logits"),

    ROW(DATA, PATH, "data", data, "", "", "a .txt, or a glob of .bin shards; none: the built-in corpus"),
    ROW(DATA, PATH, "val-data", val_data, "", "", "the same for validation; none: the last 10 % of a text"),
    ROW(DATA, PATH, "tokenizer", tokenizer, "", "", "gpt2_tokenizer.bin; none: bytes are tokens"),

    ROW(BATCH, AUTO, "batch", batch, "8", "1 to 1000000",
        "sequences in a micro-batch; auto, on a GPU: as many as its memory holds"),
    ROW(BATCH, COUNT, "micro-batches", micro_batches, "1", "1 to 1000000", "in a step, per replica"),

    ROW(OPTIMISER, COUNT, "steps", steps, "1800", "0 to 99999999", "updates in the whole run"),
    ROW(OPTIMISER, NUMBER, "lr", lr, "1e-3", "> 0", "peak learning rate"),
    ROW(OPTIMISER, COUNT, "warmup", warmup, "100", "0 to 99999999", "steps of linear warm-up"),
    ROW(OPTIMISER, CHOICE, "schedule", schedule, "cosine", "cosine|wsd|linear|step|constant",
        "form of the learning rate after the warm-up"),
    ROW(OPTIMISER, NUMBER, "min-lr-frac", min_lr_frac, "0.1", "0 to 1", "the last learning rate over --lr"),
    ROW(OPTIMISER, NUMBER, "weight-decay", weight_decay, "0.1", ">= 0", "AdamW's, on matrices alone"),
    ROW(OPTIMISER, NUMBER, "beta1", beta1, "0.9", "0 to 0.999999", "decay of the first moment per step"),
    ROW(OPTIMISER, NUMBER, "beta2", beta2, "0.95", "0 to 0.999999", "decay of the second moment per step"),
    ROW(OPTIMISER, NUMBER, "eps", eps, "1e-8", "1e-30 to 1", "added to the root of the second moment"),
    ROW(OPTIMISER, NUMBER, "grad-clip", grad_clip, "1", ">= 0", "largest norm of the gradient; 0: off"),
    ROW(OPTIMISER, COUNT, "seed", seed, "1337", ">= 0", "of initialisation, data order and sampling"),

    ROW(NUMERICS, CHOICE, "on-spike", on_spike, "ignore", "stop|skip|ignore",
        "when a loss is 6 deviations high"),
    ROW(NUMERICS, CHOICE, "kernels", kernels, "plain", "plain|fused",
        "of the connections, on a GPU: one for each step of them, or few that do all of it"),

    ROW(MEMORY, AUTO, "recompute", recompute, "0", "0 to 20000",
        "sublayers whose activations are computed anew in the backward pass, per block; 0: off"),
    ROW(MEMORY, SWITCH, "plan", plan, "", "", "print the memory plan and train nothing"),

    ROW(PARALLEL, CHOICE, "pipeline", pipeline, "none", "none|1f1b|dualpipev|dualpipe",
        "schedule of the stages of a model over the ranks"),
    ROW(PARALLEL, COUNT, "ranks", ranks, "0", "0 to 100000",
        "pipeline ranks of a replica; 0: all there are, of which 1 without --pipeline"),
    ROW(PARALLEL, TEXT, "pp-layers", pp_layers, "", "",
        "blocks of each stage in model order, as in 3,5,4,0; none: the split that simulates fastest"),
    ROW(PARALLEL, CHOICE, "priority", priority, "none", "none|post|recompute|all",
        "what goes ahead, of a pipeline on a GPU: the kernels that make a message, recomputation, both"),
    ROW(PARALLEL, NUMBER, "timeout", timeout, "120", "> 0", "seconds without progress before a rank gives up"),
    ROW(PARALLEL, PATH, "trace", trace, "", "", "write a timeline of all ranks, for Perfetto"),
    ROW(PARALLEL, SWITCH, "print-schedule", print_schedule, "", "",
        "print the actions of every rank and train nothing"),
    ROW(PARALLEL, NUMBER, "link-gbs", link_gbs, "0", ">= 0",
        "for --plan: GB/s of a link between ranks, one way; 0: not said"),
    ROW(PARALLEL, NUMBER, "tflops", tflops, "0", ">= 0",
        "for --plan: TFLOP/s that a rank reaches; 0: this machine's"),

    ROW(OUTPUT, PATH, "out", out, "out", "", "directory of the run log and the checkpoints"),
    ROW(OUTPUT, SWITCH, "overwrite", overwrite, "", "", "start anew in a directory that has checkpoints"),
    ROW(OUTPUT, SWITCH, "resume", resume, "", "", "go on from the newest whole checkpoint in --out"),
    ROW(OUTPUT, PATH, "init-from", init_from, "", "", "first weights: ours or GPT-2's model.safetensors"),
    ROW(OUTPUT, COUNT, "log-every", log_every, "1", "1 to 99999999", "steps between lines of the log"),
    ROW(OUTPUT, COUNT, "val-every", val_every, "150", "0 to 99999999", "steps; 0: only at the end"),
    ROW(OUTPUT, COUNT, "val-batches", val_batches, "10", "1 to 1000000", "micro-batches in a validation"),
    ROW(OUTPUT, COUNT, "sample-every", sample_every, "150", "0 to 99999999", "steps; 0: only at the end"),
    ROW(OUTPUT, COUNT, "gain-every", gain_every, "10", "0 to 99999999", "steps between gains; 0: never"),
    ROW(OUTPUT, COUNT, "save-every", save_every, "500", "0 to 99999999", "steps; 0: only at the end"),
    ROW(OUTPUT, COUNT, "keep", keep, "3", "0 to 99999999", "newest checkpoints that stay; 0: all"),

    ROW(MODES, TEXT, "generate", generate, "", "", "continue this text and train nothing"),
    ROW(MODES, COUNT, "tokens", tokens, "400", "1 to 99999999", "tokens to generate"),
    ROW(MODES, NUMBER, "temperature", temperature, "0.7", ">= 0", "of sampling; 0: the likeliest token"),
    ROW(MODES, COUNT, "top-k", top_k, "0", "0 to 10000000", "tokens to sample from, the likeliest; 0: all"),
    ROW(MODES, SWITCH, "eval", eval, "", "", "print the validation loss and train nothing"),
    ROW(MODES, PATH, "dump", dump, "", "", "write one forward and backward pass, train nothing"),
    ROW(MODES, PATH, "config", config, "", "", "file of name = value lines; the command line wins"),
    ROW(MODES, SWITCH, "version", version, "", "", "print the version"),
    ROW(MODES, SWITCH, "help", help, "", "", "print this"),
};

enum { OPTION_COUNT = (int)(sizeof option_rows / sizeof *option_rows) };
typedef enum { GIVEN_NOT, GIVEN_CONFIG, GIVEN_COMMAND_LINE } GivenBy;
typedef struct { unsigned char by[OPTION_COUNT]; } OptionsGiven;    // a GivenBy per row

static inline int options_count(void) { return OPTION_COUNT; }
static inline const char* options_name(int row) { return option_rows[row].name; }
static inline bool options_stored(int row) { return option_rows[row].group <= GROUP_OPTIMISER; }

// The row of that name, or -1.
static inline int options_find(const char* name) {
    for (int row = 0; row < OPTION_COUNT; row++)
        if (!strcmp(option_rows[row].name, name)) return row;
    return -1;
}

static inline bool options_given(const OptionsGiven* given, const char* name) {
    int row = options_find(name);
    assert(row >= 0);
    return given->by[row] != GIVEN_NOT;
}

// ------------------------------------------------------------------------------------------------
// Models by name

typedef struct { const char* name; long layers, width, heads, seq; } ModelShape;

static const ModelShape model_shapes[] = {
    {"tiny",         4,  128,  4,  256},      // trains in minutes on 2 cores
    {"gpt2",        12,  768, 12, 1024},
    {"gpt2-medium", 24, 1024, 16, 1024},
    {"gpt2-large",  36, 1280, 20, 1024},
    {"gpt2-xl",     48, 1600, 25, 1024},
    {"paper-3b",    12, 1280, 16, 4096},      // with experts: these are for plans
    {"paper-9b",    18, 1920, 24, 4096},
    {"paper-27b",   30, 2560, 32, 4096},
};

// False for a name that is neither in the table nor d1 .. d999.
static inline bool model_find(const char* name, ModelShape* shape) {
    for (size_t k = 0; k < sizeof model_shapes / sizeof *model_shapes; k++)
        if (!strcmp(model_shapes[k].name, name)) {
            *shape = model_shapes[k];
            return true;
        }
    size_t digits = name[0] == 'd' ? strspn(name + 1, "0123456789") : 0;
    if (digits < 1 || digits > 3 || name[1 + digits] || name[1] == '0') return false;
    long layers = strtol(name + 1, NULL, 10);
    shape->name = name;
    shape->layers = shape->heads = layers;
    shape->width = 64 * layers;
    shape->seq = 1024;
    return true;
}

// Fills what of the shape nobody has set. The vocabulary is the data's, whatever the model is called.
static inline void options_fill_shape(Options* o) {
    ModelShape shape = {"", 0, 0, 0, 0};
    bool known = model_find(o->model, &shape);
    assert(known);
    (void)known;
    if (!o->layers) o->layers = shape.layers;
    if (!o->width) o->width = shape.width;
    if (!o->heads) o->heads = shape.heads;
    if (!o->seq) o->seq = shape.seq;
}

// ------------------------------------------------------------------------------------------------
// From text to a value

static inline bool option_in_limits(const char* limits, double value) {
    if (limits[0] == '>' && limits[1] == '=') return value >= strtod(limits + 2, NULL);
    if (limits[0] == '>') return value > strtod(limits + 1, NULL);
    char* end;
    double low = strtod(limits, &end);
    return value >= low && value <= strtod(end + strlen(" to "), NULL);
}

// strtod would also take spaces, hexadecimal, nan and inf. Beyond 1e30 a float's square overflows.
static inline bool option_read_number(const char* text, const char* limits, double* value) {
    char* end;
    if (!text[0] || text[strspn(text, "+-.0123456789eE")]) return false;
    errno = 0;
    *value = strtod(text, &end);
    return end != text && !*end && !errno && fabs(*value) <= 1e30 && option_in_limits(limits, *value);
}

static inline bool option_read_count(const char* text, const char* limits, long* value) {
    char* end;
    if (!text[0] || text[strspn(text, "-0123456789")]) return false;
    errno = 0;
    *value = strtol(text, &end, 10);
    return end != text && !*end && !errno && option_in_limits(limits, (double)*value);
}

// The place of a word of `length` bytes among those that stand between bars, or -1.
static inline int option_word(const char* words, const char* text, size_t length) {
    for (int place = 0;; place++) {
        size_t size = strcspn(words, "|");
        if (size == length && !memcmp(words, text, size)) return place;
        if (!words[size]) return -1;
        words += size + 1;
    }
}

static inline bool option_read_maps(const char* text, const char* words, int* maps) {
    *maps = 0;
    if (!strcmp(text, "none")) return true;
    for (;;) {
        size_t length = strcspn(text, ",");
        int place = option_word(words, text, length);
        if (place < 0 || (*maps & (1 << place))) return false;
        *maps |= 1 << place;
        if (!text[length]) return true;
        text += length + 1;
    }
}

// An empty path is none: it comes from a checkpoint, option_take refuses it where a person wrote it.
static inline bool option_read_text(const char* text, OptionKind kind, char* field, size_t size) {
    if (strlen(text) >= size) return false;
    for (const char* c = text; *c; c++)
        if (kind == KIND_PATH && ((unsigned char)*c < 32 || *c == 127)) return false;
    strcpy(field, text);
    return true;
}

// After false the field holds anything.
static inline bool option_read(const OptionRow* row, const char* text, char* field) {
    ModelShape shape;
    switch (row->kind) {
    case KIND_AUTO:
        if (!strcmp(text, "auto")) {
            *(long*)field = -1;
            return true;
        }
        return option_read_count(text, row->limits, (long*)field);
    case KIND_COUNT: return option_read_count(text, row->limits, (long*)field);
    case KIND_NUMBER: return option_read_number(text, row->limits, (double*)field);
    case KIND_CHOICE: return (*(int*)field = option_word(row->limits, text, strlen(text))) >= 0;
    case KIND_MAPS: return option_read_maps(text, row->limits, (int*)field);
    case KIND_SWITCH:
        *(bool*)field = !strcmp(text, "true");
        return *(bool*)field || !strcmp(text, "false");
    case KIND_MODEL: return model_find(text, &shape) && option_read_text(text, KIND_PATH, field, row->size);
    case KIND_PATH:
    case KIND_TEXT: break;
    }
    return option_read_text(text, row->kind, field, row->size);
}

// ------------------------------------------------------------------------------------------------
// From a value to text

// The text from which options_set makes the same value again. No value needs more than OPTION_SIZE bytes.
static inline void options_value(const Options* o, int row, char* text, size_t size) {
    const OptionRow* r = &option_rows[row];
    const char *field = (const char*)o + r->offset, *word = r->limits;
    text[0] = 0;
    switch (r->kind) {
    case KIND_AUTO:
    case KIND_COUNT:
        if (r->kind == KIND_AUTO && *(const long*)field == -1) snprintf(text, size, "auto");
        else snprintf(text, size, "%ld", *(const long*)field);
        break;
    case KIND_NUMBER:           // as few digits as give the value back
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(text, size, "%.*g", digits, *(const double*)field);
            if (strtod(text, NULL) == *(const double*)field) break;
        }
        break;
    case KIND_SWITCH: snprintf(text, size, "%s", *(const bool*)field ? "true" : "false"); break;
    case KIND_CHOICE:
        for (int place = 0; place < *(const int*)field; place++) word += strcspn(word, "|") + 1;
        snprintf(text, size, "%.*s", (int)strcspn(word, "|"), word);
        break;
    case KIND_MAPS:
        for (int bit = 1; *word; bit *= 2) {
            int length = (int)strcspn(word, "|");
            size_t used = strlen(text);
            if (*(const int*)field & bit)
                snprintf(text + used, size - used, "%s%.*s", used ? "," : "", length, word);
            word += length + (word[length] == '|');
        }
        if (!text[0]) snprintf(text, size, "none");
        break;
    case KIND_MODEL:
    case KIND_PATH:
    case KIND_TEXT: snprintf(text, size, "%s", field); break;
    }
}

// ------------------------------------------------------------------------------------------------
// Messages

// What somebody wrote, in quotes, short and printable.
static inline const char* option_quote(char quoted[64], const char* text) {
    size_t k = 0;
    quoted[k++] = '"';
    for (; *text && k < 58; text++) {
        unsigned char c = (unsigned char)*text;
        quoted[k++] = c < 32 || c == 127 ? '?' : *text;
    }
    strcpy(quoted + k, *text ? "...\"" : "\"");
    return quoted;
}

static inline void option_expected(const OptionRow* row, char* text, size_t size) {
    switch (row->kind) {
    case KIND_COUNT: snprintf(text, size, "a whole number %s", row->limits); break;
    case KIND_AUTO: snprintf(text, size, "auto or a whole number %s", row->limits); break;
    case KIND_NUMBER: snprintf(text, size, "a number %s", row->limits); break;
    case KIND_SWITCH: snprintf(text, size, "true or false"); break;
    case KIND_CHOICE:
    case KIND_MODEL: snprintf(text, size, "one of %s", row->limits); break;
    case KIND_MAPS: snprintf(text, size, "some of %s with commas between, or none", row->limits); break;
    case KIND_PATH: snprintf(text, size, "a path of 1 to %zu printable bytes", row->size - 1); break;
    case KIND_TEXT: snprintf(text, size, "1 to %zu bytes of text", row->size - 1); break;
    }
}

// `where` is the file and line, or the checkpoint; empty on the command line.
static inline bool option_refuse(const OptionRow* row, const char* found, const char* where, Error* e) {
    char expected[256], example[128] = "";
    option_expected(row, expected, sizeof expected);
    if (row->standard[0]) snprintf(example, sizeof example, ", as in --%s %s", row->name, row->standard);
    return fail(e, "%s%s--%s: found %s, expected %s%s", where, *where ? ": " : "", row->name, found,
                expected, example);
}

// Insertions, deletions and replacements that turn a into b; b at most 31 bytes, a is cut there.
static inline int option_distance(const char* a, const char* b) {
    int above[32], rows = (int)strnlen(a, 31), columns = (int)strlen(b);
    assert(columns < 32);
    for (int j = 0; j <= columns; j++) above[j] = j;
    for (int i = 1; i <= rows; i++) {
        int diagonal = above[0];
        above[0] = i;
        for (int j = 1; j <= columns; j++) {
            int replaced = diagonal + (a[i - 1] != b[j - 1]);
            int added = (above[j] < above[j - 1] ? above[j] : above[j - 1]) + 1;
            diagonal = above[j];
            above[j] = replaced < added ? replaced : added;
        }
    }
    return above[columns];
}

static inline bool option_unknown(const char* name, const char* where, Error* e) {
    char quoted[64];
    int nearest = 0, shortest = 64;
    for (int row = 0; row < OPTION_COUNT; row++) {
        int distance = option_distance(name, option_rows[row].name);
        if (distance < shortest) {
            shortest = distance;
            nearest = row;
        }
    }
    return fail(e, "%s%sfound the unknown option %s, expected one of --help, the nearest is --%s", where,
                *where ? ": " : "", option_quote(quoted, name), option_rows[nearest].name);
}

// ------------------------------------------------------------------------------------------------
// Setting

// Sets one option from its text, or leaves it as it was. `where` begins the message: "run.cfg:12",
// "out/step_00000001.safetensors", or "" for the command line.
static inline bool options_set(Options* o, const char* name, const char* text, const char* where, Error* e) {
    char before[OPTION_SIZE], quoted[64];
    int row = options_find(name);
    if (row < 0) return option_unknown(name, where, e);
    const OptionRow* r = &option_rows[row];
    char* field = (char*)o + r->offset;
    memcpy(before, field, r->size);
    if (option_read(r, text, field)) return true;
    memcpy(field, before, r->size);
    return option_refuse(r, option_quote(quoted, text), where, e);
}

static inline void options_defaults(Options* o) {
    memset(o, 0, sizeof *o);
    for (int row = 0; row < OPTION_COUNT; row++) {
        const OptionRow* r = &option_rows[row];
        bool good = !r->standard[0] || option_read(r, r->standard, (char*)o + r->offset);
        assert(good);
        (void)good;
    }
}

// An option that a person wrote: once in a place, not empty. The command line wins, and is read first.
static inline bool option_take(Options* o, OptionsGiven* given, int row, const char* text, GivenBy by,
                               const char* where, Error* e) {
    const OptionRow* r = &option_rows[row];
    if (given->by[row] == by)
        return fail(e, "%s%s--%s: found twice, expected once, remove one", where, *where ? ": " : "",
                    r->name);
    if (!text[0]) return option_refuse(r, "nothing", where, e);
    if (given->by[row] > by) {
        Options unused = *o;
        return options_set(&unused, r->name, text, where, e);
    }
    given->by[row] = (unsigned char)by;
    return options_set(o, r->name, text, where, e);
}

// For resuming: an option from a checkpoint, which a person may not contradict, except for --steps; `auto` is
// what it was then. Options that checkpoints do not keep are left as they are.
static inline bool options_restore(Options* o, const OptionsGiven* given, const char* name, const char* text,
                                   const char* where, Error* e) {
    char ours[OPTION_SIZE], theirs[OPTION_SIZE], quoted[2][64];
    Options stored = *o;
    if (!options_set(&stored, name, text, where, e)) return false;
    int row = options_find(name);
    if (!options_stored(row)) return true;
    options_value(o, row, ours, sizeof ours);
    if (!given->by[row] || (option_rows[row].kind == KIND_AUTO && !strcmp(ours, "auto")))
        return options_set(o, name, text, where, e);
    options_value(&stored, row, theirs, sizeof theirs);
    if (!strcmp(name, "steps") || !strcmp(ours, theirs)) return true;
    return fail(e, "--%s: found %s, expected %s as in %s, leave it out or choose another --out", name,
                option_quote(quoted[0], ours), option_quote(quoted[1], theirs), where);
}

// ------------------------------------------------------------------------------------------------
// Configuration files: `name = value` lines. A # at the start of a line or after a blank begins a comment.

static inline char* config_trim(char* text) {
    text += strspn(text, " \t\r");
    size_t length = strlen(text);
    while (length && strchr(" \t\r", text[length - 1])) text[--length] = 0;
    return text;
}

static inline bool config_line(Options* o, OptionsGiven* given, char* line, const char* where, Error* e) {
    char quoted[64];
    for (char* c = strchr(line, '#'); c; c = strchr(c + 1, '#'))
        if (c == line || strchr(" \t", c[-1])) *c = 0;
    line = config_trim(line);
    if (!line[0]) return true;
    char* equals = strchr(line, '=');
    if (!equals)
        return fail(e, "%s: found %s, expected name = value, as in lr = 1e-3", where,
                    option_quote(quoted, line));
    *equals = 0;
    char* name = config_trim(line);
    int row = options_find(name);
    if (row < 0) return option_unknown(name, where, e);
    if (!strcmp(name, "config"))
        return fail(e, "%s: --config: found in a file, expected on the command line alone", where);
    return option_take(o, given, row, config_trim(equals + 1), GIVEN_CONFIG, where, e);
}

// text need not end in a zero byte; path is for messages.
static inline bool options_parse_config_text(Options* o, OptionsGiven* given, const char* text, size_t size,
                                             const char* path, Error* e) {
    char line[OPTION_SIZE + 128], where[OPTION_SIZE + 32];
    for (long number = 1; size; number++) {
        const char* newline = (const char*)memchr(text, '\n', size);
        size_t length = newline ? (size_t)(newline - text) : size;
        snprintf(where, sizeof where, "%s:%ld", path, number);
        if (length >= sizeof line || memchr(text, 0, length))
            return fail(e, "%s: found a zero byte or more than %zu bytes, expected a line of text", where,
                        sizeof line - 1);
        memcpy(line, text, length);
        line[length] = 0;
        if (!config_line(o, given, line, where, e)) return false;
        length += newline != NULL;
        text += length;
        size -= length;
    }
    return true;
}

static inline bool options_parse_config_file(Options* o, OptionsGiven* given, const char* path, Error* e) {
    char text[65536];
    FILE* file = fopen(path, "rb");
    if (!file) return fail(e, "--config: found no readable %s (%s), expected a file", path, strerror(errno));
    size_t size = fread(text, 1, sizeof text, file);
    int error = ferror(file) ? errno : 0;
    fclose(file);
    if (error) return fail(e, "--config: found no readable %s (%s), expected a file", path, strerror(error));
    if (size == sizeof text)
        return fail(e, "%s: found %zu bytes or more, expected a configuration file", path, size);
    return options_parse_config_text(o, given, text, size, path, e);
}

// ------------------------------------------------------------------------------------------------
// The command line

// One option: argv[*i], and what follows it where the value stands there. Leaves *i on the last word used.
static inline bool option_take_word(Options* o, OptionsGiven* given, int argc, char** argv, int* i,
                                    Error* e) {
    char name[64], quoted[64];
    const char *word = argv[*i], *value = NULL;
    if (strncmp(word, "--", 2) || !word[2])
        return fail(e, "command line: found %s, expected --name value, --name=value or --switch",
                    option_quote(quoted, word));
    size_t length = strcspn(word + 2, "=");
    snprintf(name, sizeof name, "%.*s", (int)(length < sizeof name ? length : sizeof name), word + 2);
    int row = options_find(name);
    if (row < 0) return option_unknown(name, "", e);
    if (word[2 + length]) value = word + 2 + length + 1;
    else if (option_rows[row].kind == KIND_SWITCH) value = "true";
    else if (*i + 1 < argc && strncmp(argv[*i + 1], "--", 2)) value = argv[++*i];
    if (value) return option_take(o, given, row, value, GIVEN_COMMAND_LINE, "", e);
    return option_refuse(&option_rows[row], *i + 1 < argc ? option_quote(quoted, argv[*i + 1]) : "nothing",
                         "", e);
}

// Defaults, then the --config file, overridden by the command line, then what --model decides. `given` tells
// which options a person wrote. options_check looks at what no single option shows.
static inline bool options_parse(Options* o, OptionsGiven* given, int argc, char** argv, Error* e) {
    options_defaults(o);
    memset(given, 0, sizeof *given);
    for (int i = 1; i < argc; i++)
        if (!option_take_word(o, given, argc, argv, &i, e)) return false;
    if (o->config[0] && !options_parse_config_file(o, given, o->config, e)) return false;
    options_fill_shape(o);
    return true;
}

// ------------------------------------------------------------------------------------------------
// What options mean together

// In double, which cannot wrap. Parameters of the connections are those of `mhc`, the largest mode.
static inline double options_parameters(const Options* o) {
    double C = (double)o->width, n = (double)o->streams, M = n * n + 2 * n;
    double block = 12 * C * C + 13 * C + 2 * (M * n * C + M + 3);
    return C * (double)(o->vocab + o->seq + 2) + (double)o->layers * block;
}

// Numbers that one micro-batch could ever need at once: streams, what a block keeps, attention, logits.
static inline double options_activations(const Options* o) {
    double token = (double)o->layers * (2 * (double)o->streams + 16) * (double)o->width
                 + (double)o->layers * (double)o->heads * (double)o->seq + (double)o->vocab;
    return (double)o->batch * (double)o->seq * token;
}

// Keeps every later size, index and token count far inside 64 bits.
static inline bool options_check_sizes(const Options* o, Error* e) {
    double tokens = (double)o->batch * (double)o->micro_batches * (double)o->seq;
    if (options_parameters(o) > 0x1p40)
        return fail(e, "--model: found %.3g parameters, expected at most 2^40, reduce --layers or --width",
                    options_parameters(o));
    if (options_activations(o) > 0x1p50)
        return fail(e, "--batch: found %.3g activations, expected at most 2^50, reduce --batch or --seq",
                    options_activations(o));
    if (tokens > 0x1p32)
        return fail(e, "--micro-batches: found %.3g tokens a step, expected at most 2^32, reduce it",
                    tokens);
    return true;
}

// To be asked again where a checkpoint or the data has changed the model.
static inline bool options_check(const Options* o, Error* e) {
    if (o->width % o->heads)
        return fail(e, "--heads: found %ld, expected a divisor of the width, %ld, change --heads or --width",
                    o->heads, o->width);
    if (!strncmp(o->model, "paper-", 6) && !o->plan)
        return fail(e, "--model: found %s, expected it with --plan: its experts can only be planned", o->model);
    if (o->resume && o->overwrite)
        return fail(e, "--resume: found --overwrite too, expected one of them, remove the other");
    if ((o->generate[0] != 0) + o->eval + (o->dump[0] != 0) > 1)
        return fail(e, "--%s: found --%s too, expected one mode a run, remove the other",
                    o->generate[0] ? "generate" : "eval", o->generate[0] && o->eval ? "eval" : "dump");
    return options_check_sizes(o, e);
}

// ------------------------------------------------------------------------------------------------
// Help

// Prints text from column `indent` on, in lines of less than 110 columns; the cursor is at that column.
static inline void option_wrap(FILE* file, const char* text, int indent) {
    int column = indent;
    while (*text) {
        int length = (int)strcspn(text, " ");
        if (column > indent && column + 1 + length >= 110) {
            fprintf(file, "\n%*s", indent, "");
            column = indent;
        }
        column += fprintf(file, "%s%.*s", column > indent ? " " : "", length, text);
        text += length;
        text += strspn(text, " ");
    }
    fputc('\n', file);
}

static inline void option_help(FILE* file, const OptionRow* row) {
    static const char* const values[] = {"N", "N|auto", "X", "", "WORD", "WORDS", "NAME", "PATH", "TEXT"};
    char left[64], text[512];
    bool words = row->kind == KIND_CHOICE || row->kind == KIND_MAPS || row->kind == KIND_MODEL;
    const char* standard = row->standard[0] ? row->standard : row->kind == KIND_SWITCH ? "false"
                         : row->kind == KIND_COUNT ? "of --model" : "none";
    snprintf(left, sizeof left, "--%s %s", row->name, values[row->kind]);
    snprintf(text, sizeof text, "%s%s%s (default %s)", words ? row->limits : "", words ? ": " : "",
             row->help, standard);
    fprintf(file, "  %-22s  ", left);
    option_wrap(file, text, 26);
}

// Every option with its default, in groups.
static inline void options_help(FILE* file, const char* program) {
    static const char* const groups[] =
        {"model", "data", "batch", "optimiser", "numerics", "memory", "parallel", "output", "modes"};
    fprintf(file, "usage: %s [--name value | --name=value | --switch]...\n", program);
    for (int group = 0; group < GROUP_COUNT; group++) {
        fprintf(file, "\n%s\n", groups[group]);
        for (int row = 0; row < OPTION_COUNT; row++)
            if (option_rows[row].group == (OptionGroup)group) option_help(file, &option_rows[row]);
    }
}

// ------------------------------------------------------------------------------------------------
// Fuzzing: any bytes as a configuration file. What was read comes back from its text; a refusal is one line.

#ifdef FUZZING
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Options o, again;
    static OptionsGiven given;
    static char text[OPTION_SIZE], back[OPTION_SIZE];
    Error e = {""};
    options_defaults(&o);
    memset(&given, 0, sizeof given);
    if (!options_parse_config_text(&o, &given, (const char*)data, size, "fuzz", &e)) {
        if (!e.text[0] || strpbrk(e.text, "\r\n")) abort();
        return 0;
    }
    options_fill_shape(&o);
    options_check(&o, &e);
    memset(&again, 0, sizeof again);
    for (int row = 0; row < OPTION_COUNT; row++) {
        options_value(&o, row, text, sizeof text);
        if (!options_set(&again, options_name(row), text, "fuzz", &e)) abort();
        options_value(&again, row, back, sizeof back);
        if (strcmp(text, back)) abort();
    }
    return 0;
}
#endif

#endif
