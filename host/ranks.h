// ranks.h: what the ranks of a run agree on, and what those that hold the same parameters exchange.
// Included by train_gpt_mhc.c where Run is known.
//
// World rank = replica * P + pipeline rank. A tensor may be held by several ranks: its replicas, in dualpipe
// the mirror ranks, in 1f1b both ends for wte. Those that hold the same stage update a piece of it each
// (ZeRO-1), wte's first end alone for both: gradients are summed there in the order of the ranks, updated
// parameters go back to all. Only the exchange of messages is left to the transport, so a sum is the same
// whatever that is.

#ifndef HOST_RANKS_H
#define HOST_RANKS_H

static bool is_leader(const Run* run) { return run->pipe.transport->rank == 0; }
static bool is_alone(const Run* run) { return run->pipe.transport->size == 1; }

// ------------------------------------------------------------------------------------------------
// Agreements

// The largest of the ranks' values
static double ranks_max(const Run* run, double value) {
    transport_max(run->pipe.transport, &value, 1);
    return value;
}

// Whether all ranks are well. If not, e says on every rank what the lowest that is not well says.
static bool all_well(const Run* run, bool well, Error* e) {
    Transport* t = run->pipe.transport;
    int lowest = t->size - (int)ranks_max(run, well ? 0 : t->size - t->rank);
    if (lowest == t->size) return true;
    if (lowest == t->rank && lowest) {
        Error own = *e;
        fail(e, "rank %d: %.900s", lowest, own.text);
    }
    transport_broadcast(t, lowest, e, sizeof *e);
    return false;
}

// Where no rank can begin the leader says why, and all end alike.
static int refuse(const Run* run, const Error* e) {
    if (is_leader(run)) fprintf(stderr, "%s\n", e->text);
    return STATUS_USAGE;
}

// How long a rank waits for others. Between steps one alone may read, write or generate for long.
static void set_patience(Run* run, bool steps) {
    enum { BETWEEN_STEPS = 10 };
    run->pipe.transport->timeout_s = run->o.timeout * (steps ? 1 : BETWEEN_STEPS);
}

// Options and builds that differ would train something that nobody asked for.
static bool ranks_agree(Run* run, Error* e) {
    char value[OPTION_SIZE], *fields = NULL;
    size_t size;
    FILE* out = open_memstream(&fields, &size);
    if (!out) die("out of memory for the options");
    fprintf(out, "version = %s (%s)\nbytes of a number = %zu, %zu\n", PROGRAM_VERSION, GIT_HASH, sizeof(real),
            machine_value_bytes());
    for (int row = 0; row < options_count(); row++) {
        options_value(&run->o, row, value, sizeof value);
        for (char* c = value; *c; c++)
            if (*c == '\n') *c = ' ';
        fprintf(out, "--%s = %s\n", options_name(row), value);
    }
    if (fclose(out)) die("out of memory for the options");
    bool same = transport_agree(run->pipe.transport, fields, e);
    free(fields);
    return same;
}

// ------------------------------------------------------------------------------------------------
// Who holds what

static Stage pipe_stage(const Pipe* p, int s) {
    Stage stage = {2 * p->first_block[s], 2 * p->first_block[s + 1], s == 0, s == p->stage_count - 1};
    return stage;
}

static bool rank_holds(const Pipe* p, int rank, const Tensor* t) {
    int directions = p->schedule.kind == PIPELINE_DUALPIPE ? 2 : 1;
    for (int s = 0; s < p->stage_count; s++) {
        Stage stage = pipe_stage(p, s);
        if (!stage_holds(&stage, (int)(t->spec - tensor_specs), t->block)) continue;
        for (int d = 0; d < directions; d++)
            if (schedule_rank_of(&p->schedule, s, d) == rank) return true;
    }
    return false;
}

typedef struct {
    int count, mine, *ranks;    // mine: -1, not held here
    int stride;                 // holders 0, stride, .. update a piece each
    size_t piece;
} Holders;

// World ranks that hold a tensor, ascending; the caller frees ranks.
static Holders holders_of(const Pipe* p, const Tensor* t) {
    Holders h = {0, -1, (int*)allocate((size_t)(p->P * p->D), sizeof(int)), 1, 0};
    for (int rank = 0; rank < p->P * p->D; rank++) {
        if (!rank_holds(p, rank % p->P, t)) continue;
        if (rank == p->transport->rank) h.mine = h.count;
        h.ranks[h.count++] = rank;
    }
    if (p->schedule.kind == PIPELINE_1F1B) h.stride = h.count / p->D;
    size_t pieces = (size_t)(h.count / h.stride);
    h.piece = (tensor_size(t) + pieces - 1) / pieces;
    return h;
}

static size_t piece_first(const Holders* h, const Tensor* t, int holder) {
    size_t first = (size_t)(holder / h->stride) * h->piece;
    return first < tensor_size(t) ? first : tensor_size(t);
}

static size_t piece_size(const Holders* h, const Tensor* t, int holder) {
    return holder % h->stride ? 0 : piece_first(h, t, holder + h->stride) - piece_first(h, t, holder);
}

// Deals out, among the holders of each tensor, what they update; moments exist for that alone.
static void deal_pieces(Run* run) {
    Model* m = &run->model;
    m->moment_size = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        Tensor* t = &m->tensors[i];
        if (!t->here) continue;
        Holders h = holders_of(&run->pipe, t);
        t->piece = piece_first(&h, t, h.mine);
        t->piece_size = piece_size(&h, t, h.mine);
        t->moments = m->moment_size;
        m->moment_size += t->piece_size;
        free(h.ranks);
    }
}

// ------------------------------------------------------------------------------------------------
// Exchange, in slices that bound its memory

enum { EXCHANGE = 1 << 20, TAG_EXCHANGE = 1 << 29 }; // numbers in flight to all; above the pipeline's tags

// The slice at `offset` of holder's piece; empty behind its end
static Slice slice_of(const Holders* h, const Tensor* t, int holder, size_t offset) {
    size_t size = piece_size(h, t, holder), most = EXCHANGE / (size_t)h->count;
    Slice s = {piece_first(h, t, holder) + offset, offset < size ? size - offset : 0, h->ranks[holder]};
    s.count = s.count < most ? s.count : most;
    return s;
}

static int send_numbers(const Run* run, int peer, const real* numbers, size_t count) {
    return transport_send(run->pipe.transport, peer, TAG_EXCHANGE, numbers, sizeof(real) * count);
}

static void receive_numbers(const Run* run, int peer, real* numbers, size_t count, const char* why) {
    Transport* t = run->pipe.transport;
    transport_wait(t, transport_receive(t, peer, TAG_EXCHANGE, numbers, sizeof(real) * count), why);
}

// My slice of the gradients becomes the sum of the holders', in their order. slices, requests (holders)
static void reduce_slice(Run* run, const Tensor* t, const Holders* h, const Slice* slices, int* requests) {
    Slice mine = slices[h->mine];
    real* buffers = run->exchange;
    real *sum = buffers, *one = buffers + EXCHANGE / 2, *out = buffers + EXCHANGE;
    for (int j = 0; j < h->count; j++) {
        Slice s = slices[j];
        if (j == h->mine || !s.count) continue;
        machine_read(run, NUMBERS_GRADS, t, s.first, s.count, out);
        requests[j] = send_numbers(run, h->ranks[j], out, s.count);
        out += s.count;
    }
    for (int j = 0; j < h->count && mine.count; j++) {
        real* to = j ? one : sum;
        if (j == h->mine) machine_read(run, NUMBERS_GRADS, t, mine.first, mine.count, to);
        else receive_numbers(run, h->ranks[j], to, mine.count, "waits for gradients of its replicas");
        for (size_t i = 0; j && i < mine.count; i++) sum[i] += one[i];
    }
    if (mine.count) machine_write(run, NUMBERS_GRADS, t, mine.first, mine.count, sum);
    for (int j = 0; j < h->count; j++)
        if (j != h->mine && slices[j].count)
            transport_wait(run->pipe.transport, requests[j], "waits for its replicas to take gradients");
}

// My slice of the parameters goes to the other holders, and theirs come here.
static void gather_slice(Run* run, const Tensor* t, const Holders* h, const Slice* slices, int* requests) {
    Slice mine = slices[h->mine];
    real *buffers = run->exchange, *in = buffers + EXCHANGE;
    if (mine.count) machine_read(run, NUMBERS_PARAMS, t, mine.first, mine.count, buffers);
    for (int j = 0; j < h->count; j++)
        if (j != h->mine && mine.count) requests[j] = send_numbers(run, h->ranks[j], buffers, mine.count);
    for (int j = 0; j < h->count; j++) {
        Slice s = slices[j];
        if (j == h->mine || !s.count) continue;
        receive_numbers(run, h->ranks[j], in, s.count, "waits for parameters of its replicas");
        machine_write(run, NUMBERS_PARAMS, t, s.first, s.count, in);
    }
    for (int j = 0; j < h->count; j++)
        if (j != h->mine && mine.count)
            transport_wait(run->pipe.transport, requests[j], "waits for its replicas to take parameters");
}

// A slice of each holder's, from device to device if that can be
static void exchange_slices(Run* run, NumberKind what, const Tensor* t, const Holders* h, size_t offset) {
    Slice* slices = (Slice*)allocate((size_t)h->count, sizeof(Slice));
    int* requests = (int*)allocate((size_t)h->count, sizeof(int));
    for (int j = 0; j < h->count; j++) slices[j] = slice_of(h, t, j, offset);
    if (machine_exchange(run, what, t, slices, h->count, h->mine)) {}
    else if (what == NUMBERS_GRADS) reduce_slice(run, t, h, slices, requests);
    else gather_slice(run, t, h, slices, requests);
    free(requests);
    free(slices);
}

// Gradients or parameters of every tensor that has several holders
static void exchange(Run* run, NumberKind what) {
    Model* m = &run->model;
    for (int i = 0; i < m->tensor_count && !is_alone(run); i++) {
        const Tensor* t = &m->tensors[i];
        if (!t->here) continue;
        Holders h = holders_of(&run->pipe, t);
        size_t step = EXCHANGE / (size_t)h.count;
        for (size_t offset = 0; h.count > 1 && offset < h.piece; offset += step)
            exchange_slices(run, what, t, &h, offset);
        free(h.ranks);
    }
    machine_exchanged(run);
}

#endif
