// start.h: the start of a run: its data, its place among the ranks, its memory, and where its weights come
// from. Included by train_gpt_mhc.c where Run is known.

#ifndef HOST_START_H
#define HOST_START_H

// The built-in corpus; its last tenth is validation, like any text's.
static void open_corpus(Run* run) {
    run->corpus = (char*)allocate(CORPUS_BYTES, 1);
    run->nats = (float*)allocate(CORPUS_BYTES, sizeof(float));
    corpus_generate(run->corpus, run->nats, CORPUS_BYTES, (uint64_t)run->o.seed);
    tokens_from_memory(&run->train, &run->val, (const uint8_t*)run->corpus, CORPUS_BYTES);
    run->has_val = true;
}

static bool open_shards_or_text(Run* run, Error* e) {
    const Options* o = &run->o;
    const Bpe* bpe = run->has_bpe ? &run->bpe : NULL;
    if (tokens_are_shards(o->data)) {
        if (!tokens_open_shards(&run->train, o->data, e)) return false;
    } else {
        if (!tokens_open_text(&run->train, &run->val, o->data, bpe, e)) return false;
        run->has_val = true;
    }
    if (!o->val_data[0]) return true;
    if (run->has_val) tokens_close(&run->val);
    run->has_val = true;
    if (tokens_are_shards(o->val_data)) return tokens_open_shards(&run->val, o->val_data, e);
    return tokens_open_text(&run->val, NULL, o->val_data, bpe, e);
}

static bool open_data(Run* run, Error* e) {
    Options* o = &run->o;
    if (o->tokenizer[0] && !bpe_open(&run->bpe, o->tokenizer, e)) return false;
    run->has_bpe = o->tokenizer[0] != 0;
    if (o->generate[0]) return true;            // its text is the prompt
    if (!o->data[0] && o->val_data[0])
        return fail(e, "--val-data: found without --data, expected both, name the training data too");
    if (!o->data[0]) open_corpus(run);
    else if (!open_shards_or_text(run, e)) return false;
    if (!o->vocab) o->vocab = tokens_default_vocab(&run->train);
    if (!tokens_check(&run->train, (int)o->seq, e)) return false;
    return !run->has_val || tokens_check(&run->val, (int)o->seq, e);
}

// Sublayers in a block of recomputation. Blocks end with their stage; under a pipeline a stage is one by
// default.
static int recompute_block(const Run* run) {
    const Pipe* p = &run->pipe;
    int longest = 1;
    for (int s = 0; s < p->stage_count; s++) {
        int sublayers = 2 * (p->first_block[s + 1] - p->first_block[s]);
        longest = sublayers > longest ? sublayers : longest;
    }
    long block = run->o.recompute == RECOMPUTE_AUTO ? automatic_block(&run->c) : run->o.recompute;
    if (block == 0) block = p->stage_count > 1 ? longest : 1;
    return block < longest ? (int)block : longest;
}

static void layout_run(Run* run, Arena* arena) {
    int B = (int)run->o.batch, T = run->c.T;
    run->pipe.B = B;
    machine_layout(run, arena, recompute_block(run));
    run->sums = (double*)plan_carve(arena, "gradients", (size_t)run->model.tensor_count + 2, sizeof(double));
    if (!is_alone(run)) run->exchange = carve(arena, "messages", 2 * EXCHANGE);
    run->tokens = (int32_t*)plan_carve(arena, "data", (size_t)B * (size_t)T, sizeof(int32_t));
    run->targets = (int32_t*)plan_carve(arena, "data", (size_t)B * (size_t)T, sizeof(int32_t));
    plan_add(arena, "data", tokens_resident_bytes(&run->train));
    if (run->has_val) plan_add(arena, "data", tokens_resident_bytes(&run->val));
    if (run->corpus) plan_add(arena, "data", CORPUS_BYTES * sizeof(float));
}

static void print_model(const Run* run) {
    char text[OPTION_SIZE];
    options_value(&run->o, options_find("residual"), text, sizeof text);
    printf("model: %d blocks, width %d, %d heads, context %d, vocabulary %d, residual %s", run->c.L, run->c.C,
           run->c.NH, run->c.T, run->c.V, text);
    if (has_connections(&run->c)) printf(" with %d streams", run->c.n);
    printf(", %.3f M parameters\n", (double)run->model.total / 1e6);
    machine_describe(run, text, sizeof text);
    printf("step:  %ld x %ld sequences of %d tokens, %.2f GFLOP; %s", run->o.micro_batches, run->o.batch,
           run->c.T,
           flops_per_token(&run->model, run->c.T) * (double)(run->o.micro_batches * run->o.batch * run->c.T) /
               1e9,
           text);
    if (run->peak > 0) printf(", measured peak %.0f GFLOP/s", run->peak / 1e9);
    printf("\n");
}

// Everything that is large, once it is known to fit.
static bool allocate_run(Run* run, Error* e) {
    Stage stages[MAX_PARTS];
    pipe_open(run);
    for (int i = 0; i < run->pipe.part_count; i++) stages[i] = run->pipe.parts[i].stage;
    model_layout_stages(&run->model, &run->c, stages, run->pipe.part_count);
    if (run->training) deal_pieces(run);
    activations_open(&run->acts, &run->c);
    if (run->pipe.stage_count > 1) run->acts.progress = pipe_progress;
    run->acts.progress_of = run;
    activations_open(&run->infer, &run->c);
    if (!machine_open(run, e)) return false;
    layout_run(run, &run->arena);
    if (run->o.plan) return true;
    if (!plan_check(&run->arena, "reduce --batch, --seq or --layers, or try --recompute auto", e))
        return false;
    plan_open(&run->arena);
    layout_run(run, &run->arena);
    model_initialise(&run->model, (uint64_t)run->o.seed);
    return true;
}

// The file that weights come from: a checkpoint to go on from (*resume), else --init-from; for --eval
// and --generate --init-from, else the newest in --out. False: none is needed, or an error if e is not empty.
static bool open_source(Run* run, SafeFile* f, bool* resume, Error* e) {
    const Options* o = &run->o;
    bool needed = !run->training;
    e->text[0] = 0;
    *resume = false;
    if (needed ? !o->init_from[0] : o->resume) {
        *resume = open_newest(f, o->out, is_leader(run), e) && o->resume;
        if (f->strings || e->text[0]) return f->strings != NULL;
        if (needed)
            return fail(e,
                        "%s: found no checkpoint, expected one, train first or name a file with --init-from",
                        o->out);
        if (is_leader(run)) printf("no checkpoint in %s: starting at step 0\n", o->out);
    }
    return o->init_from[0] && safetensors_open(f, o->init_from, e);
}

// Vocabulary of a file of weights without our metadata: the rows of wte.
static void vocabulary_of(Run* run, const SafeFile* f) {
    const SafeTensor* wte = find_weight(f, "wte.weight");
    if (!run->o.vocab && wte && wte->rank == 2 && wte->shape[0] <= INT32_MAX)
        run->o.vocab = (long)wte->shape[0];
}

static bool check_options(const Run* run, Error* e) {
    if (!options_check(&run->o, e) || !machine_can(run, e)) return false;
    if (run->o.recompute > 2 * run->o.layers)
        return fail(e, "--recompute: found %ld, expected at most the number of sublayers, %ld",
                    run->o.recompute, 2 * run->o.layers);
    if (run->o.batch * run->o.seq > INT32_MAX)
        return fail(
            e, "--batch: found %ld tokens in a micro-batch, expected less than 2^31, reduce --batch or --seq",
            run->o.batch * run->o.seq);
    return true;
}

// A directory of its own for a run that trains. Without --resume one that has checkpoints is not touched.
static bool prepare_directory(Run* run, Error* e) {
    const Options* o = &run->o;
    if (!rundir_open(o->out, e)) return false;
    if (o->resume) return true;
    Checkpoints found = rundir_list(o->out);
    free(found.steps);
    return !found.count || o->overwrite ||
           fail(e,
                "%s: found %d checkpoints of an earlier run, expected none, go on with --resume, or start "
                "anew with --overwrite",
                o->out, found.count);
}

// What the data holds shows in its first windows;
// a run that cannot use it has not yet replaced another's files then.
static bool check_windows(Run* run, Error* e) {
    return training_batch(run, 0, e) && (!run->has_val || first_sequence(run, 0, e));
}

static bool parse_layers(Pipe* p, const char* text, int L, Error* e) {
    const char* at = text;
    for (int s = 0; s < p->stage_count; s++) {
        char* end;
        long blocks = strtol(at, &end, 10);
        bool number = *at >= '0' && *at <= '9' && *end == (s + 1 < p->stage_count ? ',' : 0);
        if (!number || blocks > L) break;
        p->first_block[s + 1] = p->first_block[s] + (int)blocks;
        at = end + 1;
        if (s + 1 == p->stage_count && p->first_block[s + 1] == L) return true;
    }
    return fail(e, "--pp-layers: found %s, expected %d numbers with commas between that sum to the %d blocks",
                text, p->stage_count, L);
}

// What the planner needs to know of a run whose schedule is known; layers of the stages are not yet
static PlannerInput planner_input(const Run* run) {
    const double assumed = 100;          // for relative times, where nobody said better
    const Options* o = &run->o;
    const Config* c = &run->c;
    PlannerInput in;
    memset(&in, 0, sizeof in);
    in.kind = o->pipeline, in.P = run->pipe.P, in.M = (int)o->micro_batches, in.D = run->pipe.D;
    in.L = c->L, in.C = c->C, in.heads = c->NH, in.T = c->T, in.V = c->V, in.B = (int)o->batch;
    in.n = has_connections(c) ? c->n : 1;
    in.bytes = (int)machine_value_bytes();
    in.link_gbs = o->link_gbs;
    in.tflops = o->tflops > 0 ? o->tflops : run->peak > 0 ? run->peak / 1e12 : assumed;
    in.efficiency = 0.4;
    return in;
}

// The pipeline as the planner sees it
static void print_pipeline(const Run* run) {
    const Pipe* p = &run->pipe;
    PlannerInput in = planner_input(run);
    int* layers = (int*)allocate((size_t)p->stage_count, sizeof(int));
    for (int s = 0; s < p->stage_count; s++) layers[s] = p->first_block[s + 1] - p->first_block[s];
    in.layers = layers;
    planner_print(stdout, &in);
    free(layers);
}

// A plan for a model that can only be planned; false if the option names another.
static bool print_paper_plan(const Run* run) {
    PlannerInput in;
    memset(&in, 0, sizeof in);
    const Options* o = &run->o;
    if (!planner_preset(o->model, &in)) return false;
    in.kind = o->pipeline, in.P = o->ranks ? (int)o->ranks : 1, in.M = (int)o->micro_batches, in.D = 1;
    in.B = (int)o->batch, in.bytes = 2, in.link_gbs = o->link_gbs, in.efficiency = 0.4;
    in.tflops = o->tflops > 0 ? o->tflops : 312;        // A100
    if (is_leader(run)) planner_print(stdout, &in);
    return true;
}

// The ranks of a pipeline, and the blocks of each stage
static bool place_stages(Run* run, Error* e) {
    const Options* o = &run->o;
    Pipe* p = &run->pipe;
    int size = p->transport->size;
    p->P = o->pipeline == PIPELINE_NONE && !o->ranks ? 1 : o->ranks ? (int)o->ranks : size;
    Schedule schedule = {o->pipeline, p->P, (int)o->micro_batches};
    if (!schedule_fits(&schedule, e)) return false;
    if (o->batch == BATCH_AUTO && size > 1)
        return fail(e, "--batch: found auto on %d ranks, expected a number, as in --batch 8", size);
    if (size % p->P && !o->plan)
        return fail(e,
                    "--ranks: found %d processes, expected a multiple of the pipeline's %d ranks, change -np",
                    size, p->P);
    if (size > 1 && (o->generate[0] || o->dump[0]))
        return fail(e, "--%s: found %d ranks, expected 1, start it without mpirun and --ranks",
                    o->dump[0] ? "dump" : "generate", size);
    if (o->dump[0] && o->pipeline != PIPELINE_NONE)
        return fail(e, "--dump: found --pipeline too, expected a model in one piece, leave it out");
    p->schedule = schedule;
    p->D = o->plan ? 1 : size / p->P;
    p->rank = p->transport->rank % p->P;
    p->replica = p->transport->rank / p->P;
    p->stage_count = schedule_stages(&schedule);
    p->first_block = (int*)allocate((size_t)p->stage_count + 1, sizeof(int));
    if (o->pp_layers[0]) return parse_layers(p, o->pp_layers, run->c.L, e);
    PlannerInput in = planner_input(run);
    int* layers = (int*)allocate((size_t)p->stage_count, sizeof(int));
    planner_layers(&in, layers);
    for (int s = 0; s < p->stage_count; s++) p->first_block[s + 1] = p->first_block[s] + layers[s];
    free(layers);
    return true;
}

// Whether it trains, and has a directory of its own
static bool writes_directory(const Options* o) {
    return !o->eval && !o->generate[0] && !o->dump[0] && !o->plan;
}

static bool open_run(Run* run, Error* e) {
    SafeFile f;
    Options* o = &run->o;
    bool trains = writes_directory(o);
    memset(&f, 0, sizeof f);
    run->training = !o->eval && !o->generate[0];
    if (!check_options(run, e) || (trains && is_leader(run) && !prepare_directory(run, e))) return false;
    bool resume, from_file = open_source(run, &f, &resume, e);
    if (!from_file && e->text[0]) return false;
    if (from_file && !restore_options(run, &f, resume, e)) return false;
    if (from_file) vocabulary_of(run, &f);
    if (!check_options(run, e) || !open_data(run, e) || !check_options(run, e)) return false;
    if (o->eval && !run->has_val)
        return fail(e, "--eval: found no validation data, expected some, name it with --val-data");
    run->c = config_of(o);
    if (!place_stages(run, e) || !allocate_run(run, e)) return false;
    if (from_file && !o->plan) {
        if (!load_weights(&run->model, &f, e)) return false;
        if (resume && run->training && (!load_moments(&run->model, &f, e) || !restore_position(run, &f, e)))
            return false;
    }
    if (from_file) safetensors_close(&f);
    if (!o->plan) machine_load(run);
    return !trains || check_windows(run, e);
}

// The leader has made it; the others write their parts of checkpoints into it.
static bool directory_is_here(const Run* run, Error* e) {
    char path[RUNDIR_PATH];
    snprintf(path, sizeof path, "%s/lock", run->o.out);
    return !writes_directory(&run->o) || access(path, W_OK) == 0 ||
           fail(e, "%s: cannot be written (%s), expected rank 0's, choose an --out that all ranks share",
                run->o.out, strerror(errno));
}

// Files that differ from rank to rank would go unnoticed.
static bool ranks_begin_alike(const Run* run, Error* e) {
    char fields[160];
    snprintf(fields, sizeof fields, "step = %ld\nfingerprint of --data = %016llx\nof --val-data = %016llx\n",
             run->step, (unsigned long long)tokens_fingerprint(&run->train),
             (unsigned long long)(run->has_val ? tokens_fingerprint(&run->val) : 0));
    return transport_agree(run->pipe.transport, fields, e);
}

// A run begins only if it can on every rank.
static bool open_run_everywhere(Run* run, Error* e) {
    bool good = open_run(run, e);
    return all_well(run, good, e) && all_well(run, directory_is_here(run, e), e) && ranks_begin_alike(run, e);
}

static void print_schedule(const Run* run) {
    Error e;
    Schedule s = {run->o.pipeline, run->o.ranks ? (int)run->o.ranks : 1, (int)run->o.micro_batches};
    if (!schedule_fits(&s, &e)) die("%s", e.text);
    schedule_print(stdout, &s);
}

#endif
