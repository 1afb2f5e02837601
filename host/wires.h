// wires.h: the buffers in which states and gradients travel between stages, and their messages.
// Included by train_gpt_mhc.c where Run and the machine are known.

#ifndef HOST_WIRES_H
#define HOST_WIRES_H

static Wire* wire_free(const Pipe* p) {
    Wire* w = p->wires;
    while (w < p->wires + p->wire_count && w->state != WIRE_FREE) w++;
    assert(w < p->wires + p->wire_count);       // the books keep count
    return w;
}

static Wire* wire_take(Pipe* p, WireState state, int* books) {
    Wire* w = wire_free(p);
    w->state = state;
    w->books = books;
    ++*books;
    return w;
}

// From now on it counts as another thing; NULL: it is free.
static void wire_rebook(Wire* w, int* books) {
    --*w->books;
    w->books = books;
    if (books) ++*books;
    else w->state = WIRE_FREE;
}

// What goes into `stage`: its input state, or the gradient of its output
static Header message_header(const Run* run, bool gradient, int stage, int direction, uint32_t micro) {
    Header h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, "mhc pipe", sizeof h.magic);
    h.gradient = gradient;
    h.stage = (uint32_t)stage;
    h.direction = (uint32_t)direction;
    h.micro = micro;
    h.step = (uint64_t)run->step;
    h.bytes = wire_bytes(run);
    return h;
}

// Messages of one tag arrive in order, so that numbers may come again after 1024 micro-batches.
static int message_tag(const Header* h) {
    return (int)(((h->stage * 2 + h->gradient) * 2 + h->direction) << 10 | (h->micro & 1023));
}

static int world_rank(const Pipe* p, int rank) { return p->replica * p->P + rank; }

static void wire_receive(Run* run, const Part* c, const Action* a) {
    Pipe* p = &run->pipe;
    Part* part = (Part*)c;
    bool gradient = a->kind != ACTION_F;
    Wire* w = wire_take(p, WIRE_RECEIVING, gradient ? &part->dy_used : &part->x_used);
    w->expected = message_header(run, gradient, c->index, c->direction, a->micro);
    w->peer = world_rank(p, gradient ? c->after : c->before);
    (gradient ? c->dy : c->x)[a->micro] = w;
    if (p->batches) w->state = WIRE_HELD;       // the device waits for it
    else
        w->request = transport_receive(p->transport, w->peer, message_tag(&w->expected), w->message,
                                       sizeof(Header) + wire_bytes(run));
}

static void wire_send(Run* run, Wire* w, int peer, int stage, const Action* a) {
    w->expected = message_header(run, a->kind != ACTION_F, stage, a->direction, a->micro);
    w->peer = world_rank(&run->pipe, peer);
    w->state = run->pipe.batches ? WIRE_IN_BATCH : WIRE_LEAVING;
    if (run->pipe.batches) return;
    *w->message = w->expected;
    machine_wire_leaves(run, w);
}

// What a message of a batch is about: a wire for what comes, or the one that holds what leaves
static Wire* wire_of_message(Run* run, Part* c, const Action* message) {
    Pipe* p = &run->pipe;
    bool forward = message->kind == MESSAGE_RECEIVE_X || message->kind == MESSAGE_SEND_X;
    Action a = *message;
    a.kind = forward ? ACTION_F : ACTION_B;
    if (message->kind == MESSAGE_RECEIVE_X || message->kind == MESSAGE_RECEIVE_DX) {
        wire_receive(run, c, &a);
        return (forward ? c->x : c->dy)[a.micro];
    }
    Header leaves = message_header(run, !forward, c->index + (forward ? 1 : -1), a.direction, a.micro);
    Wire* w = p->wires;
    while (w->state != WIRE_IN_BATCH || memcmp(&w->expected, &leaves, sizeof leaves)) w++;
    assert(w < p->wires + p->wire_count);
    return w;
}

static void check_header(const Run* run, const Wire* w) {
    if (!memcmp(w->message, &w->expected, sizeof(Header))) return;
    const Header *found = w->message, *expected = &w->expected;
    fprintf(stderr,
            "rank %d: found a message for step %llu, stage %u, micro-batch %u, %llu bytes, expected step "
            "%llu, stage "
            "%u, micro-batch %u, %llu bytes: the ranks do not run the same program\n",
            run->pipe.transport->rank, (unsigned long long)found->step, found->stage, found->micro,
            (unsigned long long)found->bytes, (unsigned long long)expected->step, expected->stage,
            expected->micro, (unsigned long long)expected->bytes);
    transport_abort(run->pipe.transport, STATUS_USAGE);
}

#endif
