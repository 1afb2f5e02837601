// generate.h: text from a model, token by token.
// Included by train_gpt_mhc.c where Run is known.

#ifndef HOST_GENERATE_H
#define HOST_GENERATE_H

// One token from logits (V) at a temperature, among the k likeliest (0: all). draw is uniform in [0, 1).
static int sample_token(const real* logits, int V, double temperature, long k, double draw) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return best;
    double least = -INFINITY, sum = 0;
    if (k > 0 && k < V) {                       // the k-th largest, by counting down from the largest
        double bound = INFINITY;
        for (long taken = 0; taken < k;) {
            least = -INFINITY;
            for (int v = 0; v < V; v++)
                if ((double)logits[v] < bound && (double)logits[v] > least) least = (double)logits[v];
            for (int v = 0; v < V; v++) taken += (double)logits[v] == least;
            bound = least;
        }
    }
    for (int v = 0; v < V; v++)
        if ((double)logits[v] >= least) sum += exp(((double)logits[v] - (double)logits[best]) / temperature);
    draw *= sum;
    for (int v = 0; v < V; v++) {
        if ((double)logits[v] < least) continue;
        draw -= exp(((double)logits[v] - (double)logits[best]) / temperature);
        if (draw < 0) return v;
    }
    return best;
}

// The bytes of a token; none for one that the tokenizer lacks, as a larger --vocab allows.
static const uint8_t* token_bytes(const Run* run, int token, int* count) {
    static uint8_t byte;
    byte = (uint8_t)token;
    *count = !run->has_bpe || token < bpe_vocab(&run->bpe);
    return run->has_bpe && *count ? bpe_bytes(&run->bpe, token, count) : &byte;
}

// Appends the bytes of a token to text; returns the new length
static size_t append_token(const Run* run, char* text, size_t length, size_t size, int token) {
    int count;
    const uint8_t* bytes = token_bytes(run, token, &count);
    for (int i = 0; i < count && length + 1 < size; i++) text[length++] = (char)bytes[i];
    text[length] = 0;
    return length;
}

// Continues the prompt by `count` tokens. Only new positions are computed, the others' keys and values are
// there; when the context is full, its later half becomes the new beginning (positions are learned,
// so it must be computed anew).
static void generate(Run* run, const int32_t* prompt, int prompt_count, long count,
                     void (*emit)(Run*, int token)) {
    int T = run->c.T, known = 0, length = prompt_count < T ? prompt_count : T;
    int32_t* context = (int32_t*)allocate((size_t)T, sizeof(int32_t));
    real* logits = (real*)allocate((size_t)run->c.V, sizeof(real));
    memcpy(context, prompt + prompt_count - length, sizeof(int32_t) * (size_t)length);
    for (long i = 0; i < count; i++) {
        double draw = (double)(hash64((uint64_t)run->o.seed ^ 0x73616d706c65u,
                                      (uint64_t)run->step * 1000003u + (uint64_t)i) >>
                               11) /
                      9007199254740992.0;
        machine_logits(run, context, length, known, logits);
        known = length;
        if (length == T) {
            memmove(context, context + T / 2, sizeof(int32_t) * (size_t)(T - T / 2));
            length = T - T / 2;
            known = 0;
        }
        int token = sample_token(logits, run->c.V, run->o.temperature, run->o.top_k, draw);
        emit(run, token);
        if (T == 1) length = 0;
        context[length++] = token;
    }
    free(context);
    free(logits);
}

// Whether the vocabulary is text
static bool can_print(const Run* run) { return run->has_bpe || run->c.V <= 256; }

static void emit_text(Run* run, int token) {
    int count;
    const uint8_t* bytes = token_bytes(run, token, &count);
    fwrite(bytes, 1, (size_t)count, stdout);
    fflush(stdout);
}

// The status of a mode whose result goes to stdout
static int output_written(void) {
    if (!fflush(stdout) && !ferror(stdout)) return STATUS_DONE;
    fprintf(stderr, "stdout: cannot be written (%s), expected room for the result\n", strerror(errno));
    return STATUS_SAVE_FAILED;
}

static int run_generation(Run* run) {
    size_t bytes = strlen(run->o.generate);
    int32_t* prompt = (int32_t*)allocate(bytes, sizeof(int32_t));
    if (!can_print(run))
        die("--generate: found a model of token numbers, expected text, name its vocabulary with "
            "--tokenizer");
    int count = (int)bytes;
    if (run->has_bpe) count = (int)bpe_encode(&run->bpe, (const uint8_t*)run->o.generate, bytes, prompt);
    else
        for (size_t i = 0; i < bytes; i++) prompt[i] = (unsigned char)run->o.generate[i];
    for (int i = 0; i < count; i++)
        if (prompt[i] >= run->c.V)
            die("--generate: found token %d, expected less than the vocabulary, %d", prompt[i], run->c.V);
    fputs(run->o.generate, stdout);
    generate(run, prompt, count, run->o.tokens, emit_text);
    putchar('\n');
    free(prompt);
    return output_written();
}

#endif
