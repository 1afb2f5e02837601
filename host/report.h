// report.h: what a run tells the terminal and the run log.
// Included by train_gpt_mhc.c where Run and StepReport are known.

#ifndef HOST_REPORT_H
#define HOST_REPORT_H

static void print_bar(const Run* run) {
    enum { WIDTH = 40 };
    int done = run->o.steps ? (int)(WIDTH * run->step / run->o.steps) : WIDTH;
    if (!isatty(STDOUT_FILENO)) return;
    printf("[%.*s%*s] %3ld %%\r", done, "########################################", WIDTH - done, "",
           run->o.steps ? 100 * run->step / run->o.steps : 100);
    fflush(stdout);
}

static void report_step(Run* run, const StepReport* r, const Gain* gain, double mean_seconds) {
    const Options* o = &run->o;
    long step = run->step + (r->verdict == VERDICT_STOP);       // one that stops the run is not finished
    double tokens = step_tokens(run);
    double mfu = run->peak > 0 ? flops_per_token(&run->model, run->c.T) * tokens / r->seconds /
                                    (run->peak * run->pipe.transport->size) : 0;
    long left = (long)(mean_seconds * (double)(o->steps - run->step));
    if (step % o->log_every == 0 || step == o->steps || r->verdict != VERDICT_APPLY) {
        printf("%sstep %5ld/%ld | loss %.4f (z %+.1f) | norm %.3f | lr %.2e | %.1f ms | %.0f tok/s | MFU "
               "%.0f %% | ETA %ld:%02ld",
               isatty(STDOUT_FILENO) ? "\r\033[K" : "", step, o->steps, r->loss, r->z, r->norm, r->lr,
               1e3 * r->seconds, tokens / r->seconds, 100 * mfu, left / 60, left % 60);
        if (gain) printf(" | gain %.3f / %.3f", gain->forward_max, gain->backward_max);
        printf("%s%s\n", r->verdict == VERDICT_APPLY ? "" : " | not applied: ", r->culprit);
        print_bar(run);
    }
    runlog_begin(&run->log, "step");
    runlog_int(&run->log, "step", step);
    runlog_int(&run->log, "tokens", (long long)run->tokens_seen);
    runlog_real(&run->log, "loss", r->loss);
    runlog_real(&run->log, "z", r->z);
    runlog_real(&run->log, "lr", r->lr);
    runlog_real(&run->log, "grad_norm", r->norm);
    runlog_real(&run->log, "step_ms", 1e3 * r->seconds);
    runlog_real(&run->log, "tok_s", tokens / r->seconds);
    runlog_real(&run->log, "mfu", mfu);
    runlog_real(&run->log, "gain_fwd", gain ? gain->forward_max : NAN);    // null in the file
    runlog_real(&run->log, "gain_bwd", gain ? gain->backward_max : NAN);
    if (r->verdict != VERDICT_APPLY) runlog_text(&run->log, "not_applied", r->culprit);
    log_end(run);
}

static bool report_validation(Run* run, Error* e) {
    double loss;
    if (!run->has_val) return true;
    if (!validation_loss(run, &loss, e)) return false;
    if (!is_leader(run)) return true;
    printf("%sval loss %.4f", isatty(STDOUT_FILENO) ? "\r\033[K" : "", loss);
    runlog_begin(&run->log, "val");
    runlog_int(&run->log, "step", run->step);
    runlog_real(&run->log, "loss", loss);
    if (run->nats) {
        double entropy = validation_entropy(run);
        printf("   (the text's own entropy, which no model can beat: %.4f nats per byte)", entropy);
        runlog_real(&run->log, "entropy", entropy);
    }
    printf("\n");
    print_bar(run);
    log_end(run);
    return true;
}

// A sample is kept while it is generated, for the log
static struct { char text[4096]; size_t length; } sample;
static void emit_sample(Run* run, int token) {
    sample.length = append_token(run, sample.text, sample.length, sizeof sample.text, token);
}

static void report_sample(Run* run) {
    int32_t start = run->has_bpe ? (int32_t)run->bpe.eot : '\n';
    if (!can_print(run)) return;                // shards without --tokenizer: numbers would say nothing
    if (start >= run->c.V) start = 0;
    const int32_t prompt[] = {start, start};    // an empty line is where a text begins
    sample.length = 0;
    generate(run, prompt, 2, run->o.tokens, emit_sample);
    printf("%s--- a sample after step %ld\n%s\n---\n", isatty(STDOUT_FILENO) ? "\r\033[K" : "", run->step,
           sample.text);
    print_bar(run);
    runlog_begin(&run->log, "sample");
    runlog_int(&run->log, "step", run->step);
    runlog_text(&run->log, "text", sample.text);
    log_end(run);
}

static void log_run(Run* run) {
    char text[OPTION_SIZE];
    runlog_begin(&run->log, "run");
    runlog_int(&run->log, "format_version", FORMAT_VERSION);
    runlog_text(&run->log, "version", PROGRAM_VERSION);
    runlog_text(&run->log, "git", GIT_HASH);
    runlog_text(&run->log, "compiler", __VERSION__);
    machine_describe(run, text, sizeof text);
    runlog_text(&run->log, "device", text);
    runlog_int(&run->log, "threads", thread_count());
    runlog_int(&run->log, "step", run->step);
    runlog_int(&run->log, "parameters", (long long)run->model.total);
    for (int row = 0; row < options_count(); row++) {
        options_value(&run->o, row, text, sizeof text);
        runlog_text(&run->log, options_name(row), text);
    }
    if (!runlog_end(&run->log))
        die("%s/run.jsonl: cannot be written (%s), expected room for a run, choose another --out", run->o.out,
            strerror(errno));
}

static int stop_run(Run* run, const char* why, int status) {
    if (!is_leader(run)) return status;
    runlog_begin(&run->log, "stop");
    runlog_int(&run->log, "step", run->step);
    runlog_text(&run->log, "reason", why);
    runlog_int(&run->log, "status", status);
    log_end(run);
    return status;
}

// The last save; a run that cannot be kept has failed.
static int save_and_stop(Run* run, const char* why, int status) {
    Error e;
    if (!save_checkpoint(run, &e)) {
        bool finite = !first_nonfinite_anywhere(run, false);
        if (is_leader(run)) fprintf(stderr, "%s\n", e.text);
        return stop_run(run, e.text, finite ? STATUS_SAVE_FAILED : STATUS_NONFINITE);
    }
    return stop_run(run, why, status);
}

// An argument as a shell takes it.
static void print_quoted(const char* text) {
    bool plain =
        *text &&
        !text[strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=,:+%@")];
    putchar(' ');
    if (!plain) putchar('\'');
    for (; *text; text++)
        if (*text == '\'') fputs("'\\''", stdout);
        else putchar(*text);
    if (!plain) putchar('\'');
}

static int stop_on_signal(Run* run, int argc, char** argv) {
    if (is_leader(run))
        printf("%sstopped after step %ld", isatty(STDOUT_FILENO) ? "\r\033[K" : "", run->step);
    int status = save_and_stop(run, "signal", STATUS_DONE);
    if (status != STATUS_DONE || !is_leader(run)) return status;
    printf("; this goes on:\n ");
    if (!run->pipe.transport->loopback) printf(" mpirun -np %d", run->pipe.transport->size);
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "--overwrite", 11)) print_quoted(argv[i]);
    if (run->given.by[options_find("overwrite")] == GIVEN_CONFIG) printf(" --overwrite=false");
    printf("%s\n", run->o.resume ? "" : " --resume");
    return status;
}

// ------------------------------------------------------------------------------------------------
// Gains and streams

static void log_gains(Run* run, const char* what, const Gain* gains) {
    static const char* const fields[GAIN_FIELDS] = {"forward_max", "forward_min", "backward_max",
                                                    "backward_min"};
    int count = 2 * run->c.L;
    double* values = (double*)allocate((size_t)count, sizeof(double));
    for (int f = 0; f < GAIN_FIELDS; f++) {
        char key[64];
        for (int k = 0; k < count; k++) values[k] = ((const double*)&gains[k])[f];
        snprintf(key, sizeof key, "%s_%s", what, fields[f]);
        runlog_array(&run->log, key, values, count);
    }
    free(values);
}

static void log_streams(Run* run, const StreamStats* s) {
    int count = 2 * run->c.L + 1, n = run->c.n;
    double* values = (double*)allocate((size_t)(count * n), sizeof(double));
    for (int k = 0; k < count; k++) values[k] = s[k].cosine;
    runlog_array(&run->log, "cosine", values, count);
    for (int k = 0; k < count; k++) values[k] = s[k].rank;
    runlog_array(&run->log, "effective_rank", values, count);
    for (int k = 0; k < count * n; k++) values[k] = s[k / n].share[k % n];
    runlog_array(&run->log, "norm_share", values, count * n);
    free(values);
}

// A pass of the first validation sequence: mappings (2L, T, n, n) and streams (2L + 1) of every rank's stages
static bool observe(Run* run, double* mappings, StreamStats* streams, Error* e) {
    int T = run->c.T, n = run->c.n, count = 2 * run->c.L;
    machine_watch_streams(run, streams);
    bool good = pipe_run(run, 1, 1, true, first_sequence, e);
    machine_watch_streams(run, NULL);
    for (int i = 0; i < run->pipe.part_count; i++) {
        const Part* c = &run->pipe.parts[i];
        if (c->direction || run->pipe.replica) continue;        // another rank has them too
        for (int k = c->stage.first; k < c->stage.last; k++)
            residual_mappings(mappings + (size_t)k * (size_t)(T * n * n), &run->c,
                              machine_coefficients(run, c, k), T);
    }
    if (run->pipe.replica) memset(streams, 0, sizeof(StreamStats) * (size_t)(count + 1));
    transport_sum(run->pipe.transport, mappings, count * T * n * n);
    transport_sum(run->pipe.transport, (double*)streams,
                  (count + 1) * (int)(sizeof(StreamStats) / sizeof(double)));
    return all_well(run, good, e);
}

// Gains and streams of the first validation sequence; *largest: of the composite ones
static bool measure_gains(Run* run, Gain* largest, Error* e) {
    int T = run->c.T, n = run->c.n, count = 2 * run->c.L;
    Gain* gains = (Gain*)allocate((size_t)(2 * count), sizeof(Gain));
    double* mappings = (double*)allocate((size_t)count * (size_t)(T * n * n), sizeof(double));
    StreamStats* streams = (StreamStats*)allocate((size_t)(count + 1), sizeof(StreamStats));
    bool good = observe(run, mappings, streams, e);
    if (good && is_leader(run)) {
        model_gains(gains, gains + count, &run->c, mappings, T);
        memset(largest, 0, sizeof *largest);
        for (int k = 0; k < count; k++) {
            largest->forward_max = fmax(largest->forward_max, gains[count + k].forward_max);
            largest->backward_max = fmax(largest->backward_max, gains[count + k].backward_max);
        }
        runlog_begin(&run->log, "gain");
        runlog_int(&run->log, "step", run->step);
        log_gains(run, "sublayer", gains);
        log_gains(run, "composite", gains + count);
        log_streams(run, streams);
        log_end(run);
    }
    free(streams);
    free(mappings);
    free(gains);
    return good;
}

#endif
