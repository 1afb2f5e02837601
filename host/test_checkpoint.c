// test_checkpoint.c: a run as a whole: its files, going on from them, what it refuses, what it does with bad
// numbers, and the text it writes. Run from the repository's root.
//     cc -D_GNU_SOURCE -std=c11 host/test_checkpoint.c -lm

#define TESTING
#include <ftw.h>

#include "../train_gpt_mhc.c"
#include "check.h"

static char folder[64];         // everything is written below it

static const char* below(char path[RUNDIR_PATH], const char* name) {
    snprintf(path, RUNDIR_PATH, "%s/%s", folder, name);
    return path;
}

static int remove_one(const char* path, const struct stat* status, int type, struct FTW* walk) {
    (void)status;
    (void)type;
    (void)walk;
    return remove(path);
}

static bool same_bits(const real* a, const real* b, size_t count) {
    return !memcmp(a, b, count * sizeof(real));
}

// ------------------------------------------------------------------------------------------------
// Runs

typedef struct { int out, err; } Voice;

static Voice silence(void) {    // of stdout and stderr, until speak()
    fflush(stdout);
    Voice keep = {dup(STDOUT_FILENO), dup(STDERR_FILENO)};
    int nothing = open("/dev/null", O_WRONLY);
    dup2(nothing, STDOUT_FILENO);
    dup2(nothing, STDERR_FILENO);
    close(nothing);
    return keep;
}

static void speak(Voice keep) {
    fflush(stdout);
    dup2(keep.out, STDOUT_FILENO);
    dup2(keep.err, STDERR_FILENO);
    close(keep.out);
    close(keep.err);
}

#define SMALL "--layers 2 --width 12 --heads 2 --seq 12 "

// Opens a run in a directory below folder as main does, from options with spaces between.
static bool start(Run* run, const char* dir, const char* options, Error* e) {
    static char text[8192];
    char *argv[64], path[RUNDIR_PATH];
    int argc = 0;
    snprintf(text, sizeof text, "test --data %s/text.txt --out %s/%s %s", folder, folder, dir, options);
    for (char* word = strtok(text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    snprintf(path, sizeof path, "%s/%s/lock", folder, dir);
    unlink(path);               // an earlier run of this process, which is over, holds it
    memset(run, 0, sizeof *run);
    if (!options_parse(&run->o, &run->given, argc, argv, e)) return false;
    Voice keep = silence();
    static Loopback* alone;
    if (!alone) alone = loopback_open(1, 0);
    run->pipe.transport = loopback_rank(alone, 0);
    bool good = open_run(run, e);
    speak(keep);
    return good;
}

static void start_or_die(Run* run, const char* dir, const char* options) {
    Error e;
    if (!start(run, dir, options, &e)) die("%s", e.text);
}

// Trains as main does; the exit status.
static int work(Run* run) {
    static char name[] = "test";
    char* argv[] = {name, NULL};
    Voice keep = silence();
    int status = run_mode(run, 1, argv);
    speak(keep);
    return status;
}

static Run run, other;          // large

// Far from the start, so that every tensor matters
static void randomise(Model* m, uint64_t seed) {
    for (size_t i = 0; i < m->size; i++) m->params[i] += (real)(0.3 * normal(seed, i));
}

// ------------------------------------------------------------------------------------------------
// Going on: wherever a run is cut, its last checkpoint has the same bytes

static void checkpoint_path(char path[RUNDIR_PATH], const char* dir, long step) {
    char whole[RUNDIR_PATH - 64];
    snprintf(whole, sizeof whole, "%s/%s", folder, dir);
    rundir_path(path, whole, step);
}

static bool same_files(const char* a, const char* b) {
    Error e;
    size_t a_size = 0, b_size = 0;
    uint8_t *x = file_read(a, &a_size, "a checkpoint", &e), *y = file_read(b, &b_size, "a checkpoint", &e);
    bool same = x && y && a_size == b_size && !memcmp(x, y, a_size);
    free(x);
    free(y);
    return same;
}

// A directory of its own with one checkpoint of another run
static void take_checkpoint(const char* dir, const char* from, long step) {
    char source[RUNDIR_PATH], target[RUNDIR_PATH], path[RUNDIR_PATH];
    Error e;
    if (!rundir_make(below(path, dir), &e)) die("%s", e.text);
    checkpoint_path(source, from, step);
    checkpoint_path(target, dir, step);
    if (link(source, target)) die("%s: cannot be linked", target);
}

// Whether a run that goes on in dir ends with the checkpoint of the run that was never cut
static bool ends_the_same(const char* dir) {
    char path[RUNDIR_PATH], expected[RUNDIR_PATH];
    Error e;
    checkpoint_path(path, dir, 30);
    checkpoint_path(expected, "whole", 30);
    if (!start(&other, dir, "--resume --save-every 0 --gain-every 0 --tokens 4 --on-spike skip", &e)) {
        printf("%s\n", e.text);
        return false;
    }
    bool good = work(&other) == STATUS_DONE && same_files(path, expected);
    close_run(&other);
    return good;
}

static void test_what_is_kept(void) {
    start_or_die(&other, "whole", "--resume");
    size_t size = run.model.size;
    check(same_bits(run.model.params, other.model.params, size),
          "a checkpoint brings back the weights bit for bit");
    check(same_bits(run.model.adam_m, other.model.adam_m, size) &&
              same_bits(run.model.adam_v, other.model.adam_v, size),
          "and both moments");
    check(!memcmp(&run.spikes, &other.spikes, sizeof run.spikes) && other.spikes.count == 230,
          "and the losses that spikes are measured by");
    check(other.step == 30 && other.tokens_seen == run.tokens_seen && run.tokens_seen == 30 * 2 * 2 * 12 &&
              other.skipped == run.skipped,
          "and where the run stands");
    close_run(&other);
}

static void test_every_step(void) {
    char wrong[64] = "";
    for (long step = 1; step < 30; step++) {
        char dir[32];
        snprintf(dir, sizeof dir, "from_%ld", step);
        take_checkpoint(dir, "whole", step);
        if (!ends_the_same(dir)) snprintf(wrong, sizeof wrong, "; not so from step %ld", step);
    }
    check(!wrong[0], "a run that goes on from any of its 29 steps ends with the same bytes%s", wrong);
}

// Damage of the newest checkpoint: whatever it is, the one before is used.
static void test_damage(void) {
    char path[RUNDIR_PATH], dir[RUNDIR_PATH];
    Error e;
    SafeFile f;
    int caught = 0, tried = 0;
    size_t size;
    take_checkpoint("rot", "whole", 27);
    checkpoint_path(path, "whole", 28);
    uint8_t* bytes = file_read(path, &size, "a checkpoint", &e);
    checkpoint_path(path, "rot", 28);
    below(dir, "rot");
    for (size_t place = 0; bytes && place < size; place += 1 + size / 97, tried++) {
        FILE* file = fopen(path, "wb");
        bytes[place] ^= 0x10;
        fwrite(bytes, 1, size, file);
        fclose(file);
        bytes[place] ^= 0x10;
        Voice keep = silence();
        bool good = open_newest(&f, dir, true, &e);
        speak(keep);
        if (!good) continue;
        caught += strstr(f.path, "step_00000027") != NULL;
        safetensors_close(&f);
    }
    check(tried > 90 && caught == tried,
          "one flipped bit in the newest checkpoint: the one before is used (%d of %d times)", caught, tried);
    check(ends_the_same("rot"), "and the run ends with the same bytes all the same");
    free(bytes);
}

static void test_resume(void) {
    start_or_die(&run, "whole",
                 SMALL
                 "--streams 3 --batch 2 --micro-batches 2 --steps 30 --warmup 5 --lr 1e-2 --save-every 1 "
                 "--keep 0 --gain-every 7 --tokens 4 --on-spike skip");
    for (int i = 0; i < 200; i++)
        spikes_accept(&run.spikes, 5 + normal(1, (uint64_t)i));    // as after a longer run
    check(work(&run) == STATUS_DONE && run.step == 30, "a run of 30 steps");
    test_what_is_kept();
    test_every_step();
    test_damage();
    close_run(&run);
    stop_requested = 1;
    take_checkpoint("stopped", "whole", 11);
    start_or_die(&run, "stopped", "--resume --gain-every 0 --on-spike skip");
    check(work(&run) == STATUS_DONE && run.step == 12,
          "after a signal the step is finished and saved, and the status is 0");
    close_run(&run);
    stop_requested = 0;
    check(ends_the_same("stopped"), "and the run goes on as if nothing had been");
}

// ------------------------------------------------------------------------------------------------
// Weights from files

typedef struct { Model model; Arena arena; } Weights;

static void weights_open(Weights* w, int residual, int n, int T, int V, uint64_t seed) {
    Config c = {2, 8, 2, T, V, residual, has_streams(residual) ? n : 1, 20, ORDER_CR, 7, false, 4};
    memset(w, 0, sizeof *w);
    model_layout(&w->model, &c);
    model_memory(&w->model, &w->arena, false);
    plan_open(&w->arena);
    model_memory(&w->model, &w->arena, false);
    model_initialise(&w->model, seed);
}

static void weights_close(Weights* w) {
    free(w->arena.memory);
    model_close(&w->model);
}

static const Tensor* tensor_named(const Model* m, const char* name) {
    for (int i = 0; i < m->tensor_count; i++)
        if (!strcmp(m->tensors[i].name, name)) return &m->tensors[i];
    return NULL;
}

// All tensors but `without`, and one more named `with` if it is not empty
static void weights_write(const Weights* w, const char* path, const char* without, const char* with) {
    Error e;
    Export x = export_open(w->model.tensor_count + 1);
    for (int i = 0; i < w->model.tensor_count; i++) {
        const Tensor* t = &w->model.tensors[i];
        if (!strcmp(t->name, without)) continue;
        export_shape(export_real(&x, "", t->name, w->model.params + t->first, tensor_size(t)),
                     t->spec->cols == DIM_1 ? 1 : 2, t->rows, t->cols, 0, 0);
    }
    if (with[0]) export_shape(export_real(&x, "", with, w->model.params, 4), 1, 4, 0, 0, 0);
    if (!safetensors_write(path, x.out, x.count, NULL, 0, &e)) die("%s", e.text);
    export_close(&x);
}

// What both models have is the file's (of wpe the first rows); connections that the file lacks are as they
// were.
static bool took_weights(const Weights* to, const Weights* from, uint64_t seed) {
    Weights fresh;
    bool good = true;
    weights_open(&fresh, to->model.c.residual, to->model.c.n, to->model.c.T, to->model.c.V, seed);
    for (int i = 0; i < to->model.tensor_count; i++) {
        const Tensor *t = &to->model.tensors[i], *source = tensor_named(&from->model, t->name);
        const real* expected = source ? from->model.params + source->first : fresh.model.params + t->first;
        good = good && same_bits(to->model.params + t->first, expected, tensor_size(t));
    }
    weights_close(&fresh);
    return good;
}

enum {
    NONE = RESIDUAL_NONE,
    PLAIN = RESIDUAL_PLAIN,
    HC = RESIDUAL_HC,
    MHC = RESIDUAL_MHC,
    IHC = RESIDUAL_IHC
};

static void test_weights(void) {
    static const struct {
        int from, n, T, V, to;
        const char *without, *with, *refusal;
    } cases[] = {
        // the model: n = 3, T = 6, V = 11
        {PLAIN, 1, 6, 11, PLAIN, "", "", NULL},
        {MHC, 3, 6, 11, MHC, "", "", NULL},
        {HC, 3, 6, 11, HC, "", "", NULL},
        {IHC, 3, 6, 11, IHC, "", "", NULL},
        {PLAIN, 1, 6, 11, MHC, "", "", NULL},
        {PLAIN, 1, 6, 11, HC, "", "", NULL},
        {NONE, 1, 6, 11, IHC, "", "", NULL},
        {PLAIN, 1, 9, 11, MHC, "", "", NULL},
        {PLAIN, 1, 6, 11, PLAIN, "", "lm_head.weight", NULL},
        {PLAIN, 1, 6, 11, PLAIN, "", "h.0.attn.bias", NULL},
        {PLAIN, 1, 6, 11, PLAIN, "", "transformer.h.1.attn.masked_bias", NULL},
        {PLAIN, 1, 6, 11, MHC, "", "adam_m.wte.weight", NULL},
        {MHC, 3, 6, 11, PLAIN, "", "", "found tensor h.0.attn_hc.fn"},
        {MHC, 3, 6, 11, HC, "", "", "h.0.attn_hc.fn: found shape (15, 24), expected (5, 8)"},
        {MHC, 2, 6, 11, MHC, "", "", "h.0.attn_hc.fn: found shape (8, 16), expected (15, 24)"},
        {MHC, 3, 6, 11, MHC, "h.1.mlp_hc.base", "", "no tensor h.1.mlp_hc.base"},
        {PLAIN, 1, 6, 11, PLAIN, "ln_f.bias", "", "no tensor ln_f.bias"},
        {PLAIN, 1, 6, 11, MHC, "h.1.attn.c_proj.weight", "", "no tensor h.1.attn.c_proj.weight"},
        {PLAIN, 1, 6, 11, PLAIN, "", "h.0.attn.rotary", "found tensor h.0.attn.rotary"},
        {PLAIN, 1, 6, 11, PLAIN, "", "h.2.ln_1.bias", "found tensor h.2.ln_1.bias"},
        {PLAIN, 1, 4, 11, PLAIN, "", "", "wpe.weight: found shape (4, 8), expected (6, 8)"},
        {PLAIN, 1, 6, 12, PLAIN, "", "", "wte.weight: found shape (12, 8), expected (11, 8)"},
        {PLAIN, 1, 6, 11, PLAIN, "ln_f.bias", "ln_f.bias", "ln_f.bias: found shape (4), expected (8),"},
    };
    static const char* const names[] = {"none", "plain", "hc", "mhc", "ihc"};
    char path[RUNDIR_PATH];
    below(path, "weights.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Weights from, to;
        SafeFile f;
        Error e;
        weights_open(&from, cases[i].from, cases[i].n, cases[i].T, cases[i].V, 1);
        weights_open(&to, cases[i].to, 3, 6, 11, 2);
        weights_write(&from, path, cases[i].without, cases[i].with);
        e.text[0] = 0;
        if (!safetensors_open(&f, path, &e)) die("%s", e.text);
        Voice keep = silence();             // of the remark that a longer wpe is cut
        bool good = load_weights(&to.model, &f, &e);
        speak(keep);
        check(cases[i].refusal ? !good && strstr(e.text, cases[i].refusal) && !strchr(e.text, '\n')
                               : good && took_weights(&to, &from, 2),
              "%s weights (T %d)%s%s%s%s into %s: %s", names[cases[i].from], cases[i].T,
              cases[i].without[0] ? " without " : "", cases[i].without, cases[i].with[0] ? " with " : "",
              cases[i].with, names[cases[i].to], good ? "taken" : e.text + strlen(path) + 2);
        safetensors_close(&f);
        weights_close(&from);
        weights_close(&to);
    }
}

static void test_ignorable(void) {
    static const struct {
        const char* name;
        bool ignored;
    } cases[] = {{"lm_head.weight", true},
                 {"transformer.lm_head.weight", true},
                 {"adam_m.wte.weight", true},
                 {"adam_v.h.0.ln_1.bias", true},
                 {"h.0.attn.bias", true},
                 {"h.11.attn.masked_bias", true},
                 {"transformer.h.0.attn.bias", true},
                 {"grad.wte.weight", true},
                 {"hc.3.res", true},
                 {"tokens", true},
                 {"targets", true},
                 {"logits", true},
                 {"losses", true},
                 {"h.0.attn.c_attn.bias", false},
                 {"wte.weight", false},
                 {"attn.bias", false},
                 {"h.0.attn.bias2", false},
                 {"lm_head.bias", false},
                 {"", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check(is_ignorable(cases[i].name) == cases[i].ignored, "tensor \"%s\" of a file is %s", cases[i].name,
              cases[i].ignored ? "ignored" : "not ignored");
}

// A file of BF16, written by hand: a number is the upper half of its fp32.
static void test_bf16(void) {
    Weights from, to;
    SafeFile f;
    Error e;
    char path[RUNDIR_PATH], *header = NULL;
    size_t length, end = 0;
    bool same = true;
    weights_open(&from, MHC, 3, 6, 11, 1);
    weights_open(&to, MHC, 3, 6, 11, 2);
    FILE* text = open_memstream(&header, &length);
    for (int i = 0; i < from.model.tensor_count; i++) {
        const Tensor* t = &from.model.tensors[i];
        fprintf(text, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%zu", i ? "," : "{", t->name, t->rows);
        if (t->spec->cols != DIM_1) fprintf(text, ",%zu", t->cols);
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", end, end + 2 * tensor_size(t));
        end += 2 * tensor_size(t);
    }
    fputc('}', text);
    fclose(text);
    uint64_t bytes = length;
    FILE* file = fopen(below(path, "bf16.safetensors"), "wb");
    fwrite(&bytes, 8, 1, file);
    fwrite(header, 1, length, file);
    for (size_t i = 0; i < from.model.size; i++) {
        float value = (float)from.model.params[i];
        fwrite((const char*)&value + 2, 2, 1, file);
    }
    fclose(file);
    check(safetensors_open(&f, path, &e) && load_weights(&to.model, &f, &e), "a file of BF16 is taken");
    for (size_t i = 0; i < from.model.size; i++) {
        uint32_t bits;
        float value = (float)from.model.params[i], upper;
        memcpy(&bits, &value, 4);
        bits &= 0xffff0000u;
        memcpy(&upper, &bits, 4);
        same = same && to.model.params[i] == upper;
    }
    check(same, "and its numbers are what it says");
    safetensors_close(&f);
    free(header);
    weights_close(&from);
    weights_close(&to);
}

// logits (rows, V) of tokens (B, T), against a file's; the worst relative error is below a few EPS times the
// depth
static double logits_error(const Model* m, const int32_t* tokens, int B, const float* expected) {
    Activations a;
    Arena arena;
    int T = m->c.T, V = m->c.V;
    double difference = 0, norm = 0;
    real* logits = (real*)allocate((size_t)(B * T * V), sizeof(real));
    memset(&arena, 0, sizeof arena);
    activations_open(&a, &m->c);
    activations_layout(&a, &arena, &m->c, B, T, 1, false);
    plan_open(&arena);
    activations_layout(&a, &arena, &m->c, B, T, 1, false);
    model_forward(m, &a, tokens, B, T, 0);
    head_logits(m, &a, logits, 0, B * T);
    for (int i = 0; i < B * T * V; i++) {
        difference += ((double)logits[i] - (double)expected[i]) * ((double)logits[i] - (double)expected[i]);
        norm += (double)expected[i] * (double)expected[i];
    }
    free(logits);
    free(arena.memory);
    activations_close(&a);
    return sqrt(difference / norm);
}

// A GPT-2 in Hugging Face's layout gives the logits of an independent program, in every mode that starts as
// the plain one.
static void test_hugging_face(void) {
    static const char* const files[] = {"dev/reference/golden/gpt2_hf.safetensors",
                                        "dev/reference/golden/gpt2_hf_prefix.safetensors"};
    static const char* const names[] = {"none", "plain", "hc", "mhc", "ihc"};
    int32_t tokens[12];
    float expected[12 * 13];
    SafeFile f;
    Error e;
    if (!check(safetensors_open(&f, "dev/reference/golden/gpt2_hf_logits.safetensors", &e),
               "the logits of a GPT-2 are there"))
        return;
    bool good = safetensors_read_i32(&f, safetensors_find(&f, "tokens"), tokens, &e) &&
                safetensors_read_f32(&f, safetensors_find(&f, "logits"), expected, &e);
    safetensors_close(&f);
    for (int i = 0; i < 2 && good; i++)
        for (int residual = PLAIN; residual <= IHC; residual++) {
            Weights w;
            weights_open(&w, residual, 4, 6, 13, 3);
            if (!check(safetensors_open(&f, files[i], &e) && load_weights(&w.model, &f, &e),
                       "%s is taken into %s", files[i], names[residual]))
                continue;
            double error = logits_error(&w.model, tokens, 2, expected);
            check(error <= 1e-5, "and gives its logits: error %.1e", error);
            safetensors_close(&f);
            weights_close(&w);
        }
}

static void test_files(void) {
    test_ignorable();
    test_weights();
    test_bf16();
    test_hugging_face();
}

// ------------------------------------------------------------------------------------------------
// A dump holds what is in memory

static bool dump_has(const SafeFile* f, const char* prefix, const char* name, const real* numbers,
                     size_t count) {
    char full[MAX_NAME + 8];
    Error e;
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const SafeTensor* t = safetensors_find(f, full);
    if (!t || safetensors_count(t) != count) return false;
    float* values = (float*)allocate(count, sizeof(float));
    bool same = safetensors_read_f32(f, t, values, &e);
    for (size_t i = 0; same && i < count; i++) same = values[i] == (float)numbers[i];
    free(values);
    return same;
}

static void test_dump(void) {
    char options[RUNDIR_PATH + 256], path[RUNDIR_PATH];
    SafeFile f;
    Error e;
    snprintf(options, sizeof options, SMALL "--streams 3 --hc-maps pre,res --batch 2 --dump %s",
             below(path, "dump.safetensors"));
    start_or_die(&run, "dump", options);
    randomise(&run.model, 1);
    const Model* m = &run.model;
    size_t rows = 24, V = 256;
    bool same = true;
    check(work(&run) == STATUS_DONE && safetensors_open(&f, path, &e) && safetensors_verify(&f, &e),
          "a dump is written");
    check(f.tensor_count == 4 + 2 * m->tensor_count + 3 * 2 * run.c.L, "it has %d tensors", f.tensor_count);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        same = same && dump_has(&f, "", t->name, m->params + t->first, tensor_size(t)) &&
               dump_has(&f, "grad.", t->name, m->grads + t->first, tensor_size(t));
    }
    check(same, "every parameter and gradient");
    real *logits = (real*)allocate(rows * V, sizeof(real)), ones[24 * 3];
    for (int i = 0; i < 24 * 3; i++) ones[i] = 1;
    head_logits(m, &run.acts, logits, 0, (int)rows);
    check(dump_has(&f, "", "logits", logits, rows * V) && dump_has(&f, "", "losses", run.acts.losses, rows),
          "logits and losses");
    check(dump_has(&f, "", "hc.3.post", ones, 24 * 3), "a map that is off as its constant");
    const SafeTensor* res = safetensors_find(&f, "hc.2.res");
    check(res && res->rank == 4 && res->shape[0] == 2 && res->shape[1] == 12 && res->shape[2] == 3 &&
              res->shape[3] == 3,
          "R by token: (B, T, n, n)");
    free(logits);
    safetensors_close(&f);
    close_run(&run);
}

// ------------------------------------------------------------------------------------------------
// Numbers that are not finite, and spikes

static real* saved_params;
static bool untouched(void) { return same_bits(saved_params, run.model.params, run.model.size); }

static Verdict finish(StepReport* r, double loss) {
    memset(r, 0, sizeof *r);
    memcpy(saved_params, run.model.params, sizeof(real) * run.model.size);
    r->loss = loss;
    r->norm = gradient_norm(&run.model);
    finish_step(&run, r);
    return r->verdict;
}

static void open_policy(const char* policy) {
    char options[256];
    static int count;
    snprintf(options, sizeof options, SMALL "--batch 2 --streams 2 --on-spike %s", policy);
    char dir[32];
    snprintf(dir, sizeof dir, "policy_%d", count++);
    start_or_die(&run, dir, options);
    saved_params = (real*)allocate(run.model.size, sizeof(real));
    for (size_t i = 0; i < run.model.size; i++) run.model.grads[i] = (real)(1e-3 * normal(1, i));
}

static void close_policy(void) {
    free(saved_params);
    close_run(&run);
}

// In each tensor's last gradient, NaN or infinity by turns
static void test_nonfinite_gradients(void) {
    StepReport r;
    char expected[MAX_NAME + 64], wrong[MAX_NAME + 64] = "";
    open_policy("ignore");
    for (int i = 0; i < run.model.tensor_count; i++) {
        const Tensor* t = &run.model.tensors[i];
        real* g = run.model.grads + t->first + tensor_size(t) - 1;
        real keep = *g;
        long step = run.step;
        *g = (real)(i % 2 ? NAN : -INFINITY);
        snprintf(expected, sizeof expected, "the gradient of %s is not finite", t->name);
        if (finish(&r, 5) != VERDICT_STOP || !untouched() || strcmp(r.culprit, expected) || run.step != step)
            snprintf(wrong, sizeof wrong, "; not so %s", t->name);
        *g = keep;
    }
    check(!wrong[0],
          "a gradient that is not finite stops the run, by its tensor's name, and is not applied%s", wrong);
    run.model.grads[0] = (real)NAN;
    run.model.grads[run.model.size - 1] = (real)NAN;
    finish(&r, 5);
    check(strstr(r.culprit, "wte.weight") != NULL, "of several, the first in table order is named: %s",
          r.culprit);
    close_policy();
}

static void test_nonfinite_policies(void) {
    static const char* const policies[] = {"stop", "skip", "ignore"};
    for (int i = 0; i < 3; i++) {
        StepReport r;
        open_policy(policies[i]);
        Verdict expected = i == 1 ? VERDICT_SKIP : VERDICT_STOP;
        check(finish(&r, (double)NAN) == expected && untouched() &&
                  !strcmp(r.culprit, "the loss is not finite"),
              "%s, loss NaN: %s", policies[i], r.culprit);
        check(finish(&r, (double)INFINITY) == expected && untouched(), "%s, loss infinite", policies[i]);
        check(run.step == (i == 1 ? 2 : 0) && run.tokens_seen == (i == 1 ? 48u : 0u),
              "%s: %ld steps are past", policies[i], run.step);
        check(finish(&r, 5) == VERDICT_APPLY && !untouched() && run.skipped == 0 && run.spikes.count == 1,
              "%s: the next finite step trains", policies[i]);
        run.model.params[run.model.tensors[3].first] = (real)NAN;
        bool stopped = finish(&r, (double)NAN) == VERDICT_STOP && untouched();
        check(stopped && !strncmp(r.culprit, "weight h.0.", 11), "%s, a weight NaN: stops, %s", policies[i],
              r.culprit);
        close_policy();
    }
}

static void test_skip_limit(void) {
    StepReport r;
    int skipped = 0;
    open_policy("skip");
    while (skipped < 100 && finish(&r, (double)NAN) == VERDICT_SKIP) skipped++;
    check(skipped == 9 && r.verdict == VERDICT_STOP && untouched(),
          "the tenth dropped update in a row stops the run (%d were skipped)", skipped);
    run.skipped = 5;
    finish(&r, 5);
    check(run.skipped == 0, "an applied update starts the count anew");
    close_policy();
}

static void accept_many(Spikes* s, int count, double mean) {
    for (int i = 0; i < count; i++) spikes_accept(s, mean + 0.01 * normal(3, (uint64_t)i));
}

static void test_spike_policies(void) {
    static const char* const policies[] = {"stop", "skip", "ignore"};
    static const Verdict verdicts[] = {VERDICT_STOP, VERDICT_SKIP, VERDICT_APPLY};
    for (int i = 0; i < 3; i++) {
        StepReport r;
        open_policy(policies[i]);
        accept_many(&run.spikes, 128, 2);
        finish(&r, 2.02);
        check(r.verdict == VERDICT_APPLY && fabs(r.z) < 6, "%s: z = %.1f is no spike", policies[i], r.z);
        finish(&r, 3);
        check(r.verdict == verdicts[i] && r.z > 6 && untouched() == (i != 2), "%s: z = %.1f is one",
              policies[i], r.z);
        finish(&r, 1);
        check(r.verdict == VERDICT_APPLY && r.z < -4, "%s: a low loss is none (z = %.1f)", policies[i], r.z);
        close_policy();
    }
    StepReport first, second, third;
    open_policy("skip");
    accept_many(&run.spikes, 128, 2);
    finish(&first, 3);
    finish(&second, 3);
    finish(&third, 3);
    check(first.z == second.z && second.z == third.z && third.verdict == VERDICT_SKIP,
          "three equal spikes in a row have one score, %.1f: none hides the next", first.z);
    int skipped = 3;
    while (skipped < 100 && finish(&third, 3) == VERDICT_SKIP) skipped++;
    check(skipped == 9 && untouched(), "the tenth in a row stops the run (%d were skipped)", skipped);
    close_policy();
}

// Scores against means taken anew; a window that a spike has left knows nothing of it.
static void test_spike_scores(void) {
    static Spikes s, clean;
    memset(&s, 0, sizeof s);
    memset(&clean, 0, sizeof clean);
    accept_many(&s, 63, 2);
    check(spikes_score(&s, 100) == 0, "63 losses say nothing yet");
    accept_many(&s, 1, 2);
    check(spikes_score(&s, 100) > 6, "64 do");
    spikes_accept(&s, 1e8);
    accept_many(&s, 128, 2);
    accept_many(&clean, 128, 2);
    double mean = 0, variance = 0;
    for (int i = 0; i < 128; i++) mean += clean.losses[i] / 128;
    for (int i = 0; i < 128; i++) variance += (clean.losses[i] - mean) * (clean.losses[i] - mean) / 128;
    double z = spikes_score(&s, 2.05), expected = (2.05 - mean) / sqrt(variance);
    check(fabs(z / expected - 1) <= 1e-12, "after a spike of 1e8 has left the window, scores are exact: %.6f",
          z);
}

// AdamW's first update, its bias corrected, is the learning rate in the direction of each gradient: to 1e-8
// over |g| = 1e-3.
static void test_first_update(void) {
    StepReport r;
    double worst = 0;
    open_policy("stop");
    const Tensor* t = tensor_named(&run.model, "ln_f.bias");
    for (size_t i = t->first; i < t->first + tensor_size(t); i++)
        run.model.grads[i] = (real)(i % 2 ? 1e-3 : -1e-3);
    finish(&r, 5);
    for (size_t i = t->first; i < t->first + tensor_size(t); i++)
        worst = fmax(worst, fabs((double)(run.model.params[i] - saved_params[i]) / r.lr + (i % 2 ? 1 : -1)));
    check(r.verdict == VERDICT_APPLY && run.step == 1 && r.lr == 1e-5 && worst <= 1e-3,
          "the first update is the first learning rate, %g, to %.1e", r.lr, worst);
    close_policy();
}

static void test_policy(void) {
    test_first_update();
    test_nonfinite_gradients();
    test_nonfinite_policies();
    test_skip_limit();
    test_spike_policies();
    test_spike_scores();
}

// ------------------------------------------------------------------------------------------------
// Data and batches

// The head's gradient is wte's too; and what cannot be read is no gradient.
static void test_accumulation(void) {
    Error e;
    StepReport r;
    start_or_die(&run, "accumulation", SMALL "--batch 4");
    randomise(&run.model, 1);
    Model* m = &run.model;
    real* grads = (real*)allocate(m->size, sizeof(real));
    if (!accumulate_gradients(&run, &r, &e)) die("%s", e.text);
    memcpy(grads, m->grads, sizeof(real) * m->size);
    zero_gradients(m);
    double again = forward_backward(m, &run.acts, run.tokens, run.targets, 4, 12, 1);
    for (int i = 0; i < 256 * 12; i++) m->grads[m->first[WTE] + (size_t)i] += m->head_grads[i];
    check(r.loss == again && same_bits(grads, m->grads, m->size),
          "an update's gradients have the head's part");
    run.c.V = 32;               // less than the letters of the text
    check(!accumulate_gradients(&run, &r, &e), "a token beyond the vocabulary is an error: %s", e.text);
    free(grads);
    close_run(&run);
}

// A gradient is a sum over 48 tokens in another order.
static void test_micro_batches(void) {
    static const char* const ways[] = {SMALL "--batch 4 --micro-batches 1",
                                       SMALL "--batch 2 --micro-batches 2",
                                       SMALL "--batch 1 --micro-batches 4"};
    Error e;
    StepReport first, r;
    start_or_die(&run, "micro_0", ways[0]);
    randomise(&run.model, 1);
    run.step = 3;
    if (!accumulate_gradients(&run, &first, &e)) die("%s", e.text);
    for (int i = 1; i < 3; i++) {
        start_or_die(&other, i == 1 ? "micro_1" : "micro_2", ways[i]);
        randomise(&other.model, 1);
        other.step = 3;
        if (!accumulate_gradients(&other, &r, &e)) die("%s", e.text);
        double difference = 0, norm = 0;
        for (size_t k = 0; k < run.model.size; k++) {
            difference += pow((double)(run.model.grads[k] - other.model.grads[k]), 2);
            norm += pow((double)run.model.grads[k], 2);
        }
        check(fabs(r.loss / first.loss - 1) <= 1e-6 && sqrt(difference / norm) <= 1e-6,
              "%s: loss and gradient are those of one batch: %.1e", ways[i] + strlen(SMALL),
              sqrt(difference / norm));
        close_run(&other);
    }
    uint64_t g = (3 * 1 + 0) * 4 + 2, at = hash64(1337, g) % (tokens_count(&run.train) - 12);
    bool same = true;
    for (int t = 0; t < 12; t++)
        same = same && run.tokens[2 * 12 + t] == run.train.text[at + (uint64_t)t] &&
               run.targets[2 * 12 + t] == run.train.text[at + (uint64_t)t + 1];
    check(same, "sequence 14 starts at hash(seed, 14) mod (N - T) of the text");
    close_run(&run);
}

static void test_validation(void) {
    static const char* const ways[] = {SMALL "--batch 2 --val-batches 1000",
                                       SMALL "--batch 5 --val-batches 1000"};
    double losses[2];
    Error e;
    for (int i = 0; i < 2; i++) {
        start_or_die(&run, i ? "val_1" : "val_0", ways[i]);
        randomise(&run.model, 1);
        if (!validation_loss(&run, &losses[i], &e)) die("%s", e.text);
        check(tokens_val_windows(&run.val, 12) % 5 != 0, "validation: %d windows are not whole batches",
              (int)tokens_val_windows(&run.val, 12));
        close_run(&run);
    }
    check(fabs(losses[0] / losses[1] - 1) <= 1e-6, "its loss is that of all windows whatever the batch: %.6f",
          losses[0]);
}

static void test_recompute_option(void) {
    static const int blocks[][2] = {{0, 1}, {1, 1}, {3, 3}, {4, 4}};     // asked for, and what it becomes
    for (int i = 0; i < 4; i++) {
        char options[256];
        snprintf(options, sizeof options, SMALL "--recompute %d", blocks[i][0]);
        start_or_die(&run, "recompute", options);
        check(run.acts.block == blocks[i][1], "--recompute %d: blocks of %d", blocks[i][0], run.acts.block);
        close_run(&run);
    }
}

// With the bytes themselves as their information: the mean of the targets that a validation sees
static void test_validation_entropy(void) {
    int32_t tokens[12], targets[12];
    double sum = 0, loss;
    Error e;
    start_or_die(&run, "entropy", SMALL "--batch 3 --val-batches 2");
    check(validation_windows(&run) == 6, "2 validation batches of 3 are 6 windows");
    size_t before = (size_t)tokens_count(&run.train), after = (size_t)tokens_count(&run.val);
    run.nats = (float*)allocate(before + after, sizeof(float));
    for (size_t i = 0; i < before + after; i++)
        run.nats[i] = i < before ? run.train.text[i] : run.val.text[i - before];
    for (uint64_t w = 0; w < 6; w++) {
        if (!tokens_val_window(&run.val, w, 12, 256, tokens, targets, &e)) die("%s", e.text);
        for (int t = 0; t < 12; t++) sum += targets[t];
    }
    check(fabs(validation_entropy(&run) - sum / 72) <= 1e-12,
          "the information of validation is its targets'");
    bool untouched = validation_loss(&run, &loss, &e);
    for (int i = 0; i < 256 * 12; i++) untouched = untouched && run.model.head_grads[i] == 0;
    check(untouched, "a validation leaves no gradient");
    close_run(&run);
}

static void test_batches(void) {
    test_validation_entropy();
    test_recompute_option();
    test_accumulation();
    test_micro_batches();
    test_validation();
}

// ------------------------------------------------------------------------------------------------
// Text

static int emitted[64], emitted_count;
static void emit(Run* unused, int token) {
    (void)unused;
    emitted[emitted_count++] = token;
}

// As generate() does, but each token from a whole forward pass
static void generate_naive(const int32_t* prompt, int prompt_count, int count) {
    int T = run.c.T, length = 0;
    int32_t context[64];
    real logits[256];
    for (int i = prompt_count > T ? prompt_count - T : 0; i < prompt_count; i++)
        context[length++] = prompt[i];
    for (int i = 0; i < count; i++) {
        double draw = (double)(hash64((uint64_t)run.o.seed ^ 0x73616d706c65u,
                                      (uint64_t)run.step * 1000003u + (uint64_t)i) >>
                               11) /
                      9007199254740992.0;
        model_forward(&run.model, &run.infer, context, 1, length, 0);
        head_logits(&run.model, &run.infer, logits, length - 1, 1);
        if (length == T) {              // its later half goes on; with one position nothing does
            length = T == 1 ? 0 : T - T / 2;
            memmove(context, context + T / 2, sizeof(int32_t) * (size_t)length);
        }
        emitted[i] = sample_token(logits, 256, run.o.temperature, run.o.top_k, draw);
        context[length++] = emitted[i];
    }
}

static void test_generation(void) {
    static const char* const modes[] = {"none", "plain", "hc", "mhc", "ihc"};
    static const int lengths[] = {1, 2, 7, 12};
    const int32_t prompt[] = {'O', 'n', 'c', 'e', ' ', 'u', 'p', 'o', 'n', ' ', 'a', ' ', 't', 'i', 'm', 'e'};
    enum { COUNT = 40 };
    for (int mode = 0; mode < 5; mode++)
        for (int i = 0; i < 4; i++) {
            char options[256], dir[32];
            int first[COUNT];
            snprintf(options, sizeof options, "--layers 2 --width 12 --heads 2 --seq %d --residual %s",
                     lengths[i], modes[mode]);
            snprintf(dir, sizeof dir, "text_%d_%d", mode, i);
            start_or_die(&run, dir, options);
            randomise(&run.model, 1);
            bool same = true;
            for (int prompts = 1; prompts <= 16; prompts += 5) {
                emitted_count = 0;
                generate(&run, prompt, prompts, COUNT, emit);
                memcpy(first, emitted, sizeof first);
                generate_naive(prompt, prompts, COUNT);
                same = same && emitted_count == COUNT && !memcmp(first, emitted, sizeof first);
            }
            check(same,
                  "%s, context %d: text beyond the context from kept keys and values is that of whole passes",
                  modes[mode], lengths[i]);
            close_run(&run);
        }
}

// Row by row with what is there, against all rows at once: the same bits.
static void test_incremental(void) {
    int32_t tokens[12];
    real whole[12 * 256], step[256];
    bool same = true;
    start_or_die(&run, "incremental", SMALL);
    randomise(&run.model, 1);
    for (int t = 0; t < 12; t++) tokens[t] = (int32_t)(hash64(1, (uint64_t)t) % 256);
    model_forward(&run.model, &run.infer, tokens, 1, 12, 0);
    head_logits(&run.model, &run.infer, whole, 0, 12);
    for (int t = 0; t < 12; t += t % 3 + 1) {           // one to three rows at a time
        int end = min_int(12, t + t % 3 + 1);
        model_forward(&run.model, &run.infer, tokens, 1, end, t);
        for (int row = t; row < end; row++) {
            head_logits(&run.model, &run.infer, step, row, 1);
            same = same && same_bits(step, whole + row * 256, 256);
        }
    }
    check(same, "logits of a sequence that grows are those of the whole, bit for bit");
    close_run(&run);
}

// Draws spread evenly hit a token as often as its probability says, to one draw.
static void test_sampling(void) {
    enum { V = 6, DRAWS = 10000 };
    const real logits[V] = {1, 3, (real)-2, 3, 0, (real)2.5};
    static const struct {
        double temperature;
        long k;
    } cases[] = {{1, 0}, {0.5, 0}, {2, 3}, {1, 1}, {1, 4}, {1, 6}, {1, 100}};
    check(sample_token(logits, V, 0, 0, 0.99) == 1,
          "temperature 0 takes the likeliest token, the first of equals");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int counts[V] = {0}, kept = 0;
        double sum = 0, worst = 0, p[V];
        for (int d = 0; d < DRAWS; d++)
            counts[sample_token(logits, V, cases[i].temperature, cases[i].k, (d + 0.5) / DRAWS)]++;
        for (int v = 0; v < V; v++) {
            int larger = 0;
            for (int w = 0; w < V; w++) larger += logits[w] > logits[v];
            bool in = cases[i].k == 0 || larger < cases[i].k;           // equals stay together
            p[v] = in ? exp((double)logits[v] / cases[i].temperature) : 0;
            kept += in;
            sum += p[v];
        }
        for (int v = 0; v < V; v++) worst = fmax(worst, fabs(counts[v] - DRAWS * p[v] / sum));
        check(worst <= 1, "temperature %g, the %ld likeliest: %d tokens, each as often as it should be",
              cases[i].temperature, cases[i].k, kept);
    }
}

static void test_text(void) {
    test_sampling();
    test_incremental();
    test_generation();
}

// ------------------------------------------------------------------------------------------------

typedef struct { const char* name; void (*run)(void); } Section;
static const Section sections[] = {{"files", test_files},     {"dump", test_dump}, {"policy", test_policy},
                                   {"batches", test_batches}, {"text", test_text}, {"resume", test_resume}};

int main(int argc, char** argv) {
    char path[RUNDIR_PATH];
    wait_briefly(argv);
    snprintf(folder, sizeof folder, "/tmp/test_checkpoint_XXXXXX");
    if (!mkdtemp(folder)) die("%s: cannot be made", folder);
    FILE* text = fopen(below(path, "text.txt"), "wb");
    for (uint64_t i = 0; i < 3000; i++) fputc(" etaoinshr,.\n"[hash64(1, i) % 13], text);
    fclose(text);
    set_threads(1);
    for (size_t s = 0; s < sizeof sections / sizeof *sections; s++)
        if (argc < 2 || strstr(sections[s].name, argv[1])) sections[s].run();
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return check_summary();
}
