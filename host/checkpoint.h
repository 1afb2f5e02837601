// checkpoint.h: a run on disk: checkpoints, weights from other files, dumps.
// Included by train_gpt_mhc.c where Model and Run are known.

#ifndef HOST_CHECKPOINT_H
#define HOST_CHECKPOINT_H

// ------------------------------------------------------------------------------------------------
// Writing

// The tensors of a file that is being written, and copies of those that are not fp32 in memory
typedef struct { SafeOut* out; int count; char** names; void** copies; int copy_count; } Export;

static Export export_open(int room) {
    Export x = {(SafeOut*)allocate((size_t)room, sizeof(SafeOut)), 0,
                (char**)allocate((size_t)room, sizeof(char*)), (void**)allocate((size_t)room, sizeof(void*)),
                0};
    return x;
}

static SafeOut* export_tensor(Export* x, const char* prefix, const char* name, SafeType type,
                              const void* data) {
    size_t room = strlen(prefix) + strlen(name) + 1;
    SafeOut* out = &x->out[x->count];
    x->names[x->count] = (char*)allocate(room, 1);
    snprintf(x->names[x->count++], room, "%s%s", prefix, name);
    out->name = x->names[x->count - 1];
    out->type = type;
    out->data = data;
    return out;
}

static void export_shape(SafeOut* out, int rank, size_t a, size_t b, size_t c, size_t d) {
    size_t shape[4] = {a, b, c, d};
    out->rank = rank;
    for (int i = 0; i < rank; i++) out->shape[i] = shape[i];
}

// NumberKind as fp32: themselves, or a copy in the double build
static SafeOut* export_real(Export* x, const char* prefix, const char* name, const real* numbers,
                            size_t count) {
    const void* data = numbers;
    if (sizeof(real) != sizeof(float)) {
        float* copy = (float*)allocate(count, sizeof(float));
        for (size_t i = 0; i < count; i++) copy[i] = (float)numbers[i];
        x->copies[x->copy_count++] = copy;
        data = copy;
    }
    return export_tensor(x, prefix, name, SAFE_F32, data);
}

// numbers as params or grads; NULL: they come from elsewhere
static void export_parameters(Export* x, const Model* m, const char* prefix, const real* numbers) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        SafeOut* out = numbers ? export_real(x, prefix, t->name, numbers + t->first, tensor_size(t))
                               : export_tensor(x, prefix, t->name, SAFE_F32, NULL);
        export_shape(out, t->spec->cols == DIM_1 ? 1 : 2, t->rows, t->cols, 0, 0);
    }
}

static void export_close(Export* x) {
    for (int i = 0; i < x->count; i++) free(x->names[i]);
    for (int i = 0; i < x->copy_count; i++) free(x->copies[i]);
    free(x->out);
    free((void*)x->names);
    free((void*)x->copies);
}

// __metadata__ of a file: every option that makes the model and the run what they are, and where it stands
typedef struct { SafePair pairs[OPTION_COUNT + 8]; int count; } Metadata;

PRINTF_LIKE(3, 4) static void metadata_add(Metadata* d, const char* key, const char* format, ...) {
    char value[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(value, sizeof value, format, arguments);
    va_end(arguments);
    d->pairs[d->count].key = strdup(key);
    d->pairs[d->count++].value = strdup(value);
}

static void metadata_close(Metadata* d) {
    for (int i = 0; i < d->count; i++) {
        free(d->pairs[i].key);
        free(d->pairs[i].value);
    }
}

static Metadata run_metadata(const Run* run) {
    Metadata d;
    char text[OPTION_SIZE], window[SPIKE_WINDOW * 26 + 1] = "";
    memset(&d, 0, sizeof d);
    metadata_add(&d, "format_version", "%d", FORMAT_VERSION);
    for (int row = 0; row < options_count(); row++) {
        if (!options_stored(row)) continue;
        options_value(&run->o, row, text, sizeof text);
        metadata_add(&d, options_name(row), "%s", text);
    }
    for (int i = 0, length = 0; i < SPIKE_WINDOW && i < run->spikes.count; i++)
        length += snprintf(window + length, sizeof window - (size_t)length, "%.17g ", run->spikes.losses[i]);
    metadata_add(&d, "step", "%ld", run->step);
    metadata_add(&d, "tokens_seen", "%llu", (unsigned long long)run->tokens_seen);
    metadata_add(&d, "spike_count", "%ld", run->spikes.count);
    metadata_add(&d, "spike_window", "%s", window);
    metadata_add(&d, "skipped_in_a_row", "%d", run->skipped);
    metadata_add(&d, "data_fingerprint", "%016llx", (unsigned long long)tokens_fingerprint(&run->train));
    return d;
}

// Hands a line of the log over. A disk that is full does not end a run, but it is said.
static void log_end(Run* run) {
    static bool said;
    if (runlog_end(&run->log) || said) return;
    fprintf(stderr, "warning: %s/run.jsonl: a line cannot be written (%s), make room; the run goes on\n",
            run->o.out, strerror(errno));
    said = true;
}

// One tensor's parameters or moments, at `offset` of the file, by the first of those that hold it; its
// digest. The others send the moments that are theirs. After a failed write, which leaves its reason in e,
// moments are received all the same.
static void write_numbers(Run* run, ReplacedFile* file, NumberKind what, const Tensor* t, uint64_t offset,
                          uint64_t* digest, Error* e) {
    enum { SLICE = 1 << 18 };
    Holders h = holders_of(&run->pipe, t);
    real* numbers = (real*)allocate(SLICE, sizeof(real));
    float* single = (float*)allocate(SLICE, sizeof(float));
    Digest d = digest_begin();
    bool good = file->temporary != NULL, moments = what == NUMBERS_ADAM_M || what == NUMBERS_ADAM_V;
    for (int j = 0; j < (moments ? h.count : 1); j++) {
        size_t size = moments ? piece_size(&h, t, j) : tensor_size(t), count;
        for (size_t at = 0; at < size && (h.mine == 0 || h.mine == j); at += count) {
            count = size - at < SLICE ? size - at : (size_t)SLICE;
            if (h.mine == j) machine_read(run, what, t, at, count, numbers);
            else receive_numbers(run, h.ranks[j], numbers, count, "waits for moments to save");
            if (h.mine) {
                int request = send_numbers(run, h.ranks[0], numbers, count);
                transport_wait(run->pipe.transport, request, "waits for its moments to be saved");
                continue;
            }
            for (size_t i = 0; i < count; i++) single[i] = (float)numbers[i];
            digest_add(&d, single, sizeof(float) * count);
            good = good && replace_write_at(file, single, sizeof(float) * count, offset, e);
            offset += sizeof(float) * count;
        }
    }
    *digest = h.mine ? 0 : digest_end(&d);
    free(h.ranks);
    free(numbers);
    free(single);
}

// Each rank has the digests of what it wrote, and 0 elsewhere; the leader needs all. A double holds 32 bits
// exactly.
static void gather_digests(const Run* run, uint64_t* digests, int count) {
    double* halves = (double*)allocate(2 * (size_t)count, sizeof(double));
    for (int i = 0; i < 2 * count; i++) halves[i] = (double)(uint32_t)(digests[i / 2] >> 32 * (i % 2));
    transport_sum(run->pipe.transport, halves, 2 * count);
    for (int i = 0; i < count; i++) digests[i] = (uint64_t)halves[2 * i] | (uint64_t)halves[2 * i + 1] << 32;
    free(halves);
}

// Writes a checkpoint, every rank what it holds. The leader creates the file, adds the header when the
// digests are known, and gives it its name. False on every rank if it failed on one.
static bool write_checkpoint(Run* run, const char* path, const Export* x, const Metadata* d, Error* e) {
    static const NumberKind kinds[] = {NUMBERS_PARAMS, NUMBERS_ADAM_M, NUMBERS_ADAM_V};
    ReplacedFile file = {path, NULL, -1};
    size_t bytes;
    int count = run->model.tensor_count;
    uint64_t* digests = (uint64_t*)allocate((size_t)x->count, sizeof(uint64_t));
    char* header = safe_header(x->out, digests, x->count, d->pairs, d->count, &bytes);
    bool good = safe_readable(path, header, bytes, x->out, x->count, e);
    good = all_well(run, good && (!is_leader(run) || replace_begin(&file, path, e)), e);
    good = good && all_well(run, is_leader(run) || replace_join(&file, path, e), e);
    uint64_t offset = bytes;
    for (int i = 0; i < x->count && good; i++) {    // a rank that fails goes on: others count on its messages
        write_numbers(run, &file, kinds[i / count], &run->model.tensors[i % count], offset, &digests[i], e);
        offset += safe_out_bytes(&x->out[i]);
    }
    if (good) gather_digests(run, digests, x->count);
    free(header);
    header = safe_header(x->out, digests, x->count, d->pairs, d->count, &bytes);
    good = good && all_well(run, file.temporary && (is_leader(run) || replace_leave(&file, e)), e);
    if (is_leader(run)) good = good && replace_write_at(&file, header, bytes, 0, e) && replace_end(&file, e);
    if (!good) replace_abandon(&file);
    free(header);
    free(digests);
    return all_well(run, good, e);
}

// Parameters, moments and the state of the run; afterwards only the newest checkpoints stay. What is not
// finite is not kept: it would push out the checkpoints from before.
static bool save_checkpoint(Run* run, Error* e) {
    char path[RUNDIR_PATH];
    const Tensor* t = first_nonfinite_anywhere(run, false);
    if (t)
        return fail(e, "weight %s is not finite after step %ld: no checkpoint was written", t->name,
                    run->step);
    Export x = export_open(3 * run->model.tensor_count);
    Metadata d = run_metadata(run);
    rundir_path(path, run->o.out, run->step);
    export_parameters(&x, &run->model, "", NULL);
    export_parameters(&x, &run->model, "adam_m.", NULL);
    export_parameters(&x, &run->model, "adam_v.", NULL);
    bool good = write_checkpoint(run, path, &x, &d, e);
    export_close(&x);
    metadata_close(&d);
    if (!good || !is_leader(run)) return good;
    if (run->o.keep) rundir_keep(run->o.out, run->o.keep);
    runlog_begin(&run->log, "save");
    runlog_int(&run->log, "step", run->step);
    runlog_text(&run->log, "file", path);
    log_end(run);
    return true;
}

// A number of the metadata, strictly read.
static bool metadata_number(const SafeFile* f, const char* key, unsigned long long* value, int base,
                            Error* e) {
    const char* text = safetensors_meta(f, key);
    char* end = NULL;
    if (text) *value = strtoull(text, &end, base);
    if (text && *text && !*end && *text != '-') return true;
    return fail(e, "%s: metadata %s: found %s, expected a number, is it one of our checkpoints?", f->path,
                key, text ? text : "nothing");
}

// Options from a file's metadata. For a resumed run all that are stored, and none may be contradicted; for
// weights alone those of the model, for --eval and --generate also of the data, where nobody gave another
// value (the shapes are compared later). A newer format is refused.
static bool restore_options(Run* run, const SafeFile* f, bool resume, Error* e) {
    unsigned long long version = 0;
    OptionGroup last = resume ? GROUP_OPTIMISER : run->training ? GROUP_MODEL : GROUP_BATCH;
    if (!safetensors_meta(f, "format_version"))
        return !resume || fail(e, "%s: found no format_version, expected one of our checkpoints", f->path);
    if (!metadata_number(f, "format_version", &version, 10, e)) return false;
    if (version != FORMAT_VERSION)
        return fail(e, "%s: found format_version %llu, expected %d, use the program that wrote it", f->path,
                    version, FORMAT_VERSION);
    for (int row = 0; row < options_count(); row++) {
        const char *name = options_name(row), *text = safetensors_meta(f, name);
        if (!text || option_rows[row].group > last) continue;
        if (resume ? !options_restore(&run->o, &run->given, name, text, f->path, e)
                   : !run->given.by[row] && !options_set(&run->o, name, text, f->path, e))
            return false;
    }
    return true;
}

static bool restore_spikes(Spikes* s, const SafeFile* f, Error* e) {
    unsigned long long count = 0;
    const char* text = safetensors_meta(f, "spike_window");
    if (!metadata_number(f, "spike_count", &count, 10, e)) return false;
    s->count = (long)count;
    for (int i = 0; i < SPIKE_WINDOW && i < s->count; i++) {
        char* end;
        s->losses[i] = strtod(text ? text : "", &end);
        if (!text || end == text)
            return fail(e, "%s: metadata spike_window: found fewer losses than spike_count says", f->path);
        text = end;
    }
    return true;
}

static bool restore_position(Run* run, const SafeFile* f, Error* e) {
    unsigned long long step = 0, tokens = 0, skipped = 0, data = 0;
    if (!metadata_number(f, "step", &step, 10, e) || !metadata_number(f, "tokens_seen", &tokens, 10, e) ||
        !metadata_number(f, "skipped_in_a_row", &skipped, 10, e) ||
        !metadata_number(f, "data_fingerprint", &data, 16, e))
        return false;
    if (data != tokens_fingerprint(&run->train))
        return fail(e, "%s: found other training data than in %s, expected the same, name it with --data",
                    run->train.name, f->path);
    run->step = (long)step;
    run->tokens_seen = tokens;
    run->skipped = (int)skipped;
    return restore_spikes(&run->spikes, f, e);
}

// Hugging Face's GPT-2 keeps a block's four matrices as (in, out).
static bool is_conv1d(const Tensor* t) {
    return t->block >= 0 && t->spec->cols != DIM_1 && t->spec->cols != DIM_WIDTH;
}

static const SafeTensor* find_weight(const SafeFile* f, const char* name) {
    char prefixed[MAX_NAME + 16];
    const SafeTensor* t = safetensors_find(f, name);
    snprintf(prefixed, sizeof prefixed, "transformer.%s", name);
    return t ? t : safetensors_find(f, prefixed);
}

static bool file_is_transposed(const SafeFile* f) {
    const SafeTensor* t = find_weight(f, "h.0.attn.c_attn.weight");
    return t && t->rank == 2 && t->shape[1] == 3 * t->shape[0];
}

// cols 0: a vector was expected
static bool wrong_shape(const SafeFile* f, const SafeTensor* found, size_t rows, size_t cols, Error* e) {
    char shape[SAFE_MAX_RANK * 24] = "", expected[64];
    for (int i = 0, length = 0; i < found->rank; i++)
        length += snprintf(shape + length, sizeof shape - (size_t)length, i ? ", %llu" : "%llu",
                           (unsigned long long)found->shape[i]);
    int start = snprintf(expected, sizeof expected, "%zu", rows);
    if (cols) snprintf(expected + start, sizeof expected - (size_t)start, ", %zu", cols);
    return fail(
        e, "%s: tensor %s: found shape (%s), expected (%s), choose the --model and options it was made with",
        f->path, found->name, shape, expected);
}

// numbers (rows, cols) of tensor t from the file; a longer wpe is cut
static bool load_tensor(const SafeFile* f, const SafeTensor* found, const Tensor* t, bool transposed,
                        real* numbers, Error* e) {
    bool vector = t->spec->cols == DIM_1, turned = transposed && is_conv1d(t),
         cut = t->spec == &tensor_specs[WPE];
    size_t rows = turned ? t->cols : t->rows, cols = turned ? t->rows : t->cols, count = tensor_size(t);
    if (found->rank != (vector ? 1 : 2) || (cut ? found->shape[0] < rows : found->shape[0] != rows) ||
        (!vector && found->shape[1] != cols))
        return wrong_shape(f, found, rows, vector ? 0 : cols, e);
    float* values = (float*)allocate(safetensors_count(found), sizeof(float));
    bool good = safetensors_read_f32(f, found, values, e);
    if (good && found->shape[0] > rows)
        fprintf(stderr, "%s: %s has %llu positions, the first %zu are used (--seq)\n", f->path, found->name,
                (unsigned long long)found->shape[0], rows);
    for (size_t i = 0; good && i < count; i++)
        numbers[i] = (real)(turned ? values[i % t->cols * t->rows + i / t->cols] : values[i]);
    free(values);
    return good;
}

// Whether a tensor of a file that we have no use for is known to be of no use.
static bool is_ignorable(const char* name) {
    size_t length = strlen(name);
    if (!strncmp(name, "transformer.", 12)) name += 12;
    if (!strncmp(name, "adam_m.", 7) || !strncmp(name, "adam_v.", 7) || !strcmp(name, "lm_head.weight"))
        return true;
    const char* dumped[] = {"tokens", "targets", "logits", "losses"};   // a dump has more than parameters
    for (int i = 0; i < 4; i++)
        if (!strcmp(name, dumped[i])) return true;
    if (!strncmp(name, "grad.", 5) || !strncmp(name, "hc.", 3)) return true;
    const char *mask = strrchr(name, '.'), *masks[] = {".attn.bias", ".attn.masked_bias"}; // GPT-2's buffers
    for (int i = 0; mask && i < 2; i++)
        if (length > strlen(masks[i]) && !strcmp(name + strlen(name) - strlen(masks[i]), masks[i]))
            return true;
    return false;
}

static bool check_no_extra(const Model* m, const SafeFile* f, Error* e) {
    for (int i = 0; i < f->tensor_count; i++) {
        const char *name = f->tensors[i].name, *plain = strncmp(name, "transformer.", 12) ? name : name + 12;
        bool known = is_ignorable(name);
        for (int k = 0; !known && k < m->tensor_count; k++) known = !strcmp(plain, m->tensors[k].name);
        if (!known)
            return fail(e,
                        "%s: found tensor %s, expected none of that name in this model, choose the --model "
                        "and options it was made with",
                        f->path, name);
    }
    return true;
}

// Parameters from any file with the right names and shapes.
// Connections that a plain model lacks keep their initial values.
static bool load_weights(Model* m, const SafeFile* f, Error* e) {
    bool transposed = file_is_transposed(f), plain = true;
    for (int i = 0; i < f->tensor_count; i++) plain = plain && !strstr(f->tensors[i].name, "_hc.");
    if (!check_no_extra(m, f, e)) return false;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        const SafeTensor* found = find_weight(f, t->name);
        if (!found && plain && strstr(t->name, "_hc.")) continue;
        if (!found)
            return fail(
                e, "%s: found no tensor %s, expected one, choose the --model and options it was made with",
                f->path, t->name);
        if (t->here && !load_tensor(f, found, t, transposed, m->params + t->first, e)) return false;
    }
    return true;
}

static bool load_moments(Model* m, const SafeFile* f, Error* e) {
    for (int i = 0; i < 2 * m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i / 2];
        char name[MAX_NAME + 8];
        snprintf(name, sizeof name, "adam_%c.%s", i % 2 ? 'v' : 'm', t->name);
        const SafeTensor* found = safetensors_find(f, name);
        if (!found)
            return fail(e, "%s: found no tensor %s, expected one, is it a checkpoint?", f->path, name);
        if (!t->here) continue;
        real* whole = (real*)allocate(tensor_size(t), sizeof(real));
        bool good = load_tensor(f, found, t, false, whole, e);
        memcpy((i % 2 ? m->adam_v : m->adam_m) + t->moments, whole + t->piece, sizeof(real) * t->piece_size);
        free(whole);
        if (!good) return false;
    }
    return true;
}

// Opens the newest checkpoint of the run's directory all of whose digests are right, and says, if that is
// asked for, which are damaged. False with an empty line: there is none.
static bool open_newest(SafeFile* f, const char* dir, bool say, Error* e) {
    Checkpoints found = rundir_list(dir);
    bool good = false;
    e->text[0] = 0;
    for (int i = found.count - 1; i >= 0 && !good; i--) {
        char path[RUNDIR_PATH];
        rundir_path(path, dir, found.steps[i]);
        good = safetensors_open(f, path, e);
        if (good && !safetensors_verify(f, e)) {
            safetensors_close(f);
            good = false;
        }
        if (!good && say) fprintf(stderr, "%s%s\n", e->text, i ? "; trying the one before" : "");
    }
    if (!good && found.count)
        fail(e, "%s: found %d checkpoints and none that is whole, expected one", dir, found.count);
    free(found.steps);
    return good;
}

// hc.k.pre, post (B, T, n) and res (B, T, n, n) of every sublayer
static void export_coefficients(Export* x, Run* run) {
    int n = run->c.n, count = coefficient_count(&run->c);
    size_t B = (size_t)run->o.batch, T = (size_t)run->c.T;
    for (int k = 0; k < 2 * run->c.L && count; k++)
        for (int map = 0; map < 3; map++) {
            static const char* const maps[] = {"pre", "post", "res"};
            int width = map < 2 ? n : n * n;
            float* copy = (float*)allocate(B * T * (size_t)width, sizeof(float));
            char name[MAX_NAME];
            for (size_t i = 0; i < B * T * (size_t)width; i++)
                copy[i] = (float)machine_coefficients(
                    run, &run->pipe.parts[0],
                    k)[i / (size_t)width * (size_t)count + (size_t)(map * n) + i % (size_t)width];
            x->copies[x->copy_count++] = copy;
            snprintf(name, sizeof name, "hc.%d.%s", k, maps[map]);
            export_shape(export_tensor(x, "", name, SAFE_F32, copy), map < 2 ? 3 : 4, B, T, (size_t)n,
                         (size_t)n);
        }
}

// One forward and backward pass of the first micro-batch, and everything in it that an oracle can compare.
static bool dump(Run* run, Error* e) {
    Model* m = &run->model;
    size_t B = (size_t)run->o.batch, T = (size_t)run->c.T, V = (size_t)run->c.V;
    run->step = 0;              // of a checkpoint too the data's first micro-batch
    if (!training_batch(run, 0, e)) return false;
    Export x = export_open(4 + 2 * m->tensor_count + 6 * run->c.L);
    Metadata d = run_metadata(run);
    real* logits = (real*)allocate(B * T * V, sizeof(real));
    machine_dump(run, logits);
    export_shape(export_tensor(&x, "", "tokens", SAFE_I32, run->tokens), 2, B, T, 0, 0);
    export_shape(export_tensor(&x, "", "targets", SAFE_I32, run->targets), 2, B, T, 0, 0);
    export_shape(export_real(&x, "", "logits", logits, B * T * V), 3, B, T, V, 0);
    export_shape(export_real(&x, "", "losses", run->acts.losses, B * T), 2, B, T, 0, 0);
    export_parameters(&x, m, "grad.", m->grads);
    export_parameters(&x, m, "", m->params);
    export_coefficients(&x, run);
    bool good = safetensors_write(run->o.dump, x.out, x.count, d.pairs, d.count, e);
    export_close(&x);
    metadata_close(&d);
    free(logits);
    return good;
}

#endif
