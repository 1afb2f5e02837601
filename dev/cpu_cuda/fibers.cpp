// fibers.cpp: runs a grid. Workers share its blocks; the CUDA threads of a block are fibers of one worker.
//
// A fiber is started only when a thread blocks. Until then one stack runs thread after thread, so that a
// kernel without barriers is a plain loop. A warp goes on as long as one of its lanes may run: its stacks are
// in the cache.

#include "runtime.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <semaphore.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <numeric>
#include <random>
#include <thread>

// For frames that are left by a switch and never return.
#define NO_ADDRESS __attribute__((no_sanitize("address")))

// What kernels see as threadIdx, ...: the same symbols, which only this file may write.
__thread uint3 thread_index __asm__("cpu_cuda_threadIdx");
__thread uint3 block_index __asm__("cpu_cuda_blockIdx");
__thread uint3 block_size __asm__("cpu_cuda_blockDim");
__thread uint3 grid_size __asm__("cpu_cuda_gridDim");
const int warpSize = cpu_cuda::WARP;

namespace cpu_cuda {

__thread Thread* current;

constexpr size_t PAGE = 4096, STACK = address_sanitizer ? 256 << 10 : 64 << 10, STRIDE = STACK + PAGE;
constexpr size_t MOST_STACKS = 32000;           // each costs the kernel two of its 65530 mappings
constexpr size_t STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10;
constexpr size_t SHARED_BASE = 1024;            // the 32-bit address of its first byte, so that 0 is none
constexpr unsigned PATIENCE = 8000000;          // spins after which a worker no longer counts as busy

// The grid that runs: one at a time, shared by the workers.
static const Launch* launched;
static size_t blocks, block_threads, block_warps;
static std::atomic<size_t> next_block;          // that nobody has taken

struct Worker {
    uint3 shape = {};                           // what the arrays are laid out for
    std::vector<Thread> threads;                // of the resident blocks: one, or all of a cooperative launch
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    std::vector<char*> arenas;                  // shared memory of the blocks
    Barrier at_grid;
    size_t warp = 0;                            // that ran last
    size_t live = 0;                            // threads that have not exited

    char* stacks = nullptr;                     // thread i, if it starts a fiber, uses stack i for it
    size_t open_stacks = 0;
    const void* home = nullptr;                 // the worker's own stack
    size_t home_size = 0;
    void* home_pointer = nullptr;

    Order order = options().order;
    std::minstd_rand random;
    unsigned leave = 0;                         // in a random order: of 256 picks, this many leave the warp
    std::atomic<unsigned> spins{~0u};           // since anything else happened
    sem_t begin, end;                           // of a share of a grid
};

static __thread Worker* worker;
static Worker* workers();                       // options().threads of them

static Options read_options() {
    Options o = {std::min(16, (int)std::thread::hardware_concurrency())};
    const char* variable = getenv("CPU_CUDA");
    std::string words = variable ? variable : "";
    for (char* word = strtok(&words[0], ","); word; word = strtok(nullptr, ",")) {
        char rest;
        auto is = [&](const char* name) { return !strcmp(word, name); };
        auto number = [&](const char* form, auto* value) { return sscanf(word, form, value, &rest) == 1; };
        if (is("lazy")) o.lazy = true;
        else if (is("profile")) o.profile = true;
        else if (is("order=reverse")) o.order = REVERSE;
        else if (number("order=random:%u%c", &o.seed)) o.order = RANDOM;
        else if (!is("order=forward") && !number("threads=%d%c", &o.threads) && !number("sms=%d%c", &o.sms) &&
                 !number("cc=%d%c", &o.capability) && !number("memory=%zu%c", &o.memory) &&
                 !number("timeout=%d%c", &o.timeout) && !number("devices=%d%c", &o.devices)) {
            fprintf(stderr, "cpu_cuda: found %s in CPU_CUDA, expected an option of runtime.h\n", word);
            exit(2);
        }
    }
    o.memory <<= 20;
    o.threads = checking ? 1 : std::max(o.threads, 1);  // the checks take one block after the other
    return o;
}

const Options& options() {
    static const Options o = read_options();
    return o;
}

std::recursive_mutex& runtime_lock() {
    static std::recursive_mutex& lock = *new std::recursive_mutex;      // outlives every destructor
    return lock;
}

// ------------------------------------------------------------------------------------------------
// Reports

std::string text_of(Place place) {
    return place.file ? std::string(place.file) + ":" + std::to_string(place.line) : "an unknown line";
}

std::string text_of(uint3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

// Ends the process with the kernel, where it was launched, and the thread that runs. The first report wins:
// what other workers find meanwhile may be its consequence.
[[noreturn]] static void report(std::string text) {
    static std::atomic<bool> reported;
    while (reported.exchange(true)) pause();
    if (worker) text += std::string("\n    kernel ") + launched->kernel;
    if (worker) text += ", launched at " + text_of(launched->place);
    if (current) text += ", block " + text_of(current->block->index) + ", thread " + text_of(current->index);
    fflush(stdout);
    fprintf(stderr, "cpu_cuda: %s\n", text.c_str());
    _exit(66);
}

void stop(Place here, const char* format, ...) {
    char what[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    report(what + (here.file ? "\n    at " + text_of(here) : ""));
}

// A mistake of several threads: who waits where.
[[noreturn]] static void report_waiting(std::string text) {
    const size_t most = 16;                     // lines
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Thread& t : worker->threads) {
        bool exited = !(t.warp->live & t.bit());
        if (t.warp->ready & t.bit() || groups.size() == most) continue;
        std::string state = exited ? " exited" : " wait at " + text_of(t.place) + " in " + t.what;
        char mask[32] = "";
        if (t.mask && !exited) snprintf(mask, sizeof mask, ", mask 0x%08x", t.mask);
        groups[" of block " + text_of(t.block->index) + state + mask].push_back(t.number);
    }
    for (auto& [state, threads] : groups)
        text += "\n    " + std::to_string(threads.size()) + " threads from " +
                std::to_string(threads.front()) + " to " + std::to_string(threads.back()) + state;
    current = nullptr;
    report(text);
}

// ------------------------------------------------------------------------------------------------
// Stacks, and the switch from one to another.
//
// A switch is an ordinary function call that returns elsewhere. The compiler expects calls to destroy all but
// the callee-saved registers, so those are all there is to save. (The control words for floating point are
// callee-saved too, but kernels do not change them.)

extern "C" void cpu_cuda_switch(void** save, void* load);
__asm__(R"(
    .text
    .globl cpu_cuda_switch
cpu_cuda_switch:
    .irp register, rbp, rbx, r12, r13, r14, r15
    pushq %\register
    .endr
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    .irp register, r15, r14, r13, r12, rbx, rbp
    popq %\register
    .endr
    ret
)");

// Goes on with another stack. Where this one is left is put into *save, or nowhere if it has ended.
NO_ADDRESS static void switch_stack(void** save, void* load, const void* bottom, size_t size) {
    void *fake_stack = nullptr, *dead;
    if (address_sanitizer) __sanitizer_start_switch_fiber(save ? &fake_stack : nullptr, bottom, size);
    cpu_cuda_switch(save ? save : &dead, load);
    if (address_sanitizer) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Makes stacks, each with a closed page below it, for all resident threads.
static void open_stacks(Worker* w) {
    constexpr int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (!w->stacks) w->stacks = (char*)mmap(nullptr, MOST_STACKS * STRIDE, PROT_NONE, kind, -1, 0);
    for (; w->open_stacks < w->threads.size(); w->open_stacks++) {
        char* bottom = w->stacks + w->open_stacks * STRIDE + PAGE;
        if (w->open_stacks == MOST_STACKS || mprotect(bottom, STACK, PROT_READ | PROT_WRITE))
            stop({}, "%zu threads at once, and stacks for %zu", w->threads.size(), w->open_stacks);
    }
}

bool on_fiber_stack(const void* p) {
    return worker && (char*)p >= worker->stacks && (char*)p < worker->stacks + worker->open_stacks * STRIDE;
}

bool on_guard_page(const void* p) {
    return on_fiber_stack(p) && (size_t)((char*)p - worker->stacks) % STRIDE < PAGE;
}

static void fiber_main();

// Gives t a stack from which cpu_cuda_switch enters fiber_main.
NO_ADDRESS static void new_fiber(Worker* w, Thread* t) {
    size_t i = (size_t)(t - w->threads.data());
    size_t colour = i * 832 % PAGE & ~(size_t)63;       // else tops would fight for the cache's sets
    t->stack = w->stacks + i * STRIDE + PAGE;
    void** top = (void**)(t->stack + STACK - colour) - 8;       // six registers, and where to go
    top[6] = (void*)fiber_main;
    t->stack_pointer = top;
}

// ------------------------------------------------------------------------------------------------
// Threads: which one runs next, waiting, exiting

// Takes the thread to run next off the ready ones: the warp's next lane, or one of the next warp that has
// any. Null when all threads have exited.
static Thread* pick(Worker* w, bool leave_warp) {
    size_t count = w->warps.size(), step = w->order == REVERSE ? count - 1 : 1, tried = 0;
    bool random = w->order == RANDOM;
    if (!w->warps[w->warp].ready || (random && w->random() % 256 < w->leave)) leave_warp = true;
    if (leave_warp && random) w->warp = w->random() % count;
    while (leave_warp && tried++ < count) {
        w->warp = (w->warp + step) % count;
        leave_warp = !w->warps[w->warp].ready;
    }
    Warp* warp = &w->warps[w->warp];
    if (!warp->ready && w->live) report_waiting("deadlock: no thread can go on");
    if (!warp->ready) return nullptr;
    if (random) warp->turn = w->random() % WARP;
    do {
        warp->turn = (w->order == REVERSE ? warp->turn - 1 : warp->turn + 1) % WARP;
    } while (!(warp->ready >> warp->turn & 1));
    warp->ready &= ~(1u << warp->turn);
    return warp->lane0 + warp->turn;
}

static void enter(Thread* t) {
    current = t;
    thread_index = t->index;
    block_index = t->block->index;
}

// Goes on with t, which has a stack or gets one.
static void switch_to(Worker* w, Thread* t, void** save) {
    if (!t->stack_pointer) new_fiber(w, t);
    enter(t);
    switch_stack(save, t->stack_pointer, t->stack, STACK);
}

static Thread* in_kernel(const char* what, Place here) {
    if (!current) stop(here, "%s is called outside a kernel", what);
    return current;
}

static bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

// The current thread is about to wait for others, in `what`.
static Thread* arrive(const char* what, Place here, unsigned mask = 0) {
    Thread* me = in_kernel(what, here);
    me->what = what;
    me->place = here;
    me->mask = mask;
    return me;
}

// Lets others run until somebody has made the current thread ready again.
__attribute__((noinline)) static void wait(bool spins = false) {
    Worker* w = worker;
    Thread* me = current;
    if (!spins) w->spins.store(0, std::memory_order_relaxed);
    Thread* next = pick(w, spins);
    if (next != me) switch_to(w, next, &me->stack_pointer);
}

// ------------------------------------------------------------------------------------------------
// Barriers of a block and of the grid

static void release(Barrier* barrier) {
    std::vector<Thread*>& arrived = barrier->arrived;
    barrier->result = barrier->votes;
    barrier->votes = 0;
    if (checking && barrier == &worker->at_grid) check::grid_barrier();
    else if (checking) check::barrier(arrived.data(), arrived.size());
    for (Thread* t : arrived) t->warp->ready |= t->bit();
    current->warp->ready &= ~current->bit();    // runs already
    arrived.clear();
}

// Waits for others at the same barrier, which agree in `expected` and, but for a named barrier, in the line.
static int meet(Barrier* barrier, bool named, unsigned expected, int vote) {
    const Thread* other = barrier->arrived.empty() ? current : barrier->arrived[0];
    Place here = current->place, there = other->place;
    bool same_line = here.line == there.line && same_text(here.file, there.file);
    if (other != current && (named ? barrier->expected != expected : !same_line))
        report_waiting("divergent barrier");
    barrier->expected = expected;
    barrier->arrived.push_back(current);
    barrier->votes += vote;
    if (barrier->arrived.size() == expected) release(barrier);
    else wait();
    return barrier->result;
}

int block_barrier(int predicate, const char* what, Place here) {
    Block* block = arrive(what, here)->block;
    return meet(&block->barriers[0], false, block->live, predicate != 0);
}

void named_barrier(int id, int threads, Place here) {
    Block* block = arrive("bar.sync", here)->block;
    bool fits = threads > 0 && threads <= (int)block->threads + WARP - 1 && threads % WARP == 0;
    if (id < 1 || id > 15 || !fits)
        stop(here, "bar.sync: found barrier %d, %d threads, expected 1 to 15, whole warps", id, threads);
    meet(&block->barriers[id], true, (unsigned)threads, 0);
}

void grid_barrier(Place here) {
    arrive("grid.sync", here);
    if (!launched->cooperative) stop(here, "grid.sync in a launch that is not cooperative");
    meet(&worker->at_grid, false, (unsigned)worker->threads.size(), 0);
}

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (checking && current) check::fence();
}

void atomic_access(const void* pointer, size_t size, Place here) {
    if ((uintptr_t)pointer % size) stop(here, "misaligned atomic operation: %zu bytes at %p", size, pointer);
    if (checking && current) check::access(pointer, size, check::ATOMIC, here);
}

// If all workers only spin, nobody is left to end it: that is reported when a worker has gone on as long
// again, so that it has seen what the others wrote last.
void spin_wait(Place here) {
    Thread* me = arrive("__nanosleep", here);
    Worker* w = worker;
    unsigned spins = w->spins + 1;
    if (spins == 2 * PATIENCE) {
        size_t left = blocks - std::min(blocks, next_block.load());
        auto hopeless = [](const Worker& other) { return other.spins >= PATIENCE; };
        std::this_thread::yield();
        if (std::all_of(workers(), workers() + options().threads, hopeless))
            report_waiting("a spin without end; blocks that have not begun: " + std::to_string(left));
        spins = PATIENCE;
    }
    w->spins.store(spins, std::memory_order_relaxed);
    me->warp->ready |= me->bit();
    wait(true);
}

// ------------------------------------------------------------------------------------------------
// Warp operations: the last lane to arrive does the work for all. Lanes that wait for one another in
// different operations, or with different masks, end as a deadlock.

static void check_mask(const Thread* t) {
    unsigned lane = t->number % WARP, gone = t->mask & ~t->warp->live;
    if (!(t->mask & t->bit()))
        stop(t->place, "%s: the mask 0x%08x does not name the calling lane %u", t->what, t->mask, lane);
    if (!gone) return;
    unsigned other = (unsigned)__builtin_ctz(gone);
    const char* why = t->number - lane + other < t->block->threads ? "has exited" : "does not exist";
    stop(t->place, "%s: the mask 0x%08x of lane %u names lane %u, which %s", t->what, t->mask, lane, other,
         why);
}

void warp_together(WarpWork work, void* argument, unsigned mask, const char* what, Place here) {
    Thread* me = arrive(what, here, mask);
    Warp* warp = me->warp;
    me->argument = argument;
    check_mask(me);
    warp->waiting |= me->bit();
    void* arguments[WARP];                      // on this fiber's stack, where instrumented code may read it
    bool all = (warp->waiting & mask) == mask;
    for (unsigned lanes = all ? mask : 0; lanes; lanes &= lanes - 1) {
        const Thread* t = warp->lane0 + __builtin_ctz(lanes);
        arguments[t->number % WARP] = t->argument;
        all &= t->mask == mask && same_text(t->what, what);
    }
    if (!all) return wait();
    work(arguments, mask);
    warp->waiting &= ~mask;
    warp->ready |= mask & ~me->bit();
}

void warp_barrier(unsigned mask, Place here) {
    auto work = [](void**, unsigned lanes) {
        if (checking) check::warp_barrier(current->warp, lanes);
    };
    warp_together(work, nullptr, mask, "__syncwarp", here);
}

struct Shuffle {
    const void* value;
    void* result;
    size_t size;
    int source;
};

// As the instruction: the operand counts modulo 32; who would read across its segment's end reads itself.
void shuffle(const void* value, void* result, size_t size, ShuffleKind kind, int operand, int width,
             unsigned mask, const char* what, Place here) {
    if (width < 1 || width > WARP || width & (width - 1))
        stop(here, "%s: found width %d, expected a power of two up to 32", what, width);
    int lane = (int)in_kernel(what, here)->number % WARP, first = lane & -width, source = lane;
    operand &= WARP - 1;
    if (kind == SHUFFLE_INDEX) source = first + (operand & (width - 1));
    if (kind == SHUFFLE_UP && lane - operand >= first) source = lane - operand;
    if (kind == SHUFFLE_DOWN && lane + operand < first + width) source = lane + operand;
    if (kind == SHUFFLE_XOR && (lane ^ operand) < first + width) source = lane ^ operand;
    Shuffle s = {value, result, size, source};
    auto work = [](void** arguments, unsigned lanes) {
        each_lane(lanes, [=](int lane) {
            const Shuffle* s = (Shuffle*)arguments[lane];
            const Thread* me = current->warp->lane0 + lane;
            if (!(lanes >> s->source & 1))
                stop(me->place, "%s: lane %d reads lane %d, which takes no part (mask 0x%08x)", me->what,
                     lane, s->source, lanes);
            memcpy(s->result, ((Shuffle*)arguments[s->source])->value, s->size);
        });
    };
    warp_together(work, &s, mask, what, here);
}

// ------------------------------------------------------------------------------------------------
// The end of a thread, and a fiber's life

static void exit_thread(Worker* w, Thread* t) {
    Warp* warp = t->warp;
    Block* block = t->block;
    w->spins.store(0, std::memory_order_relaxed);
    w->live--;
    block->live--;
    warp->live &= ~t->bit();
    each_lane(warp->waiting, [=](int lane) { check_mask(warp->lane0 + lane); });
    if (block->live && block->barriers[0].arrived.size() == block->live)
        release(&block->barriers[0]);           // exited is arrived
    t->stack_pointer = nullptr;
    current = nullptr;
}

// A fiber: runs its first thread, then every next one that never ran; then it ends.
NO_ADDRESS static void fiber_main() {
    Worker* w = worker;
    Thread* t = current;
    char* stack = t->stack;
    bool first = !w->home_size;                 // entered from the worker's own stack
    if (address_sanitizer)
        __sanitizer_finish_switch_fiber(nullptr, first ? &w->home : nullptr, first ? &w->home_size : nullptr);
    do {
        enter(t);
        t->stack = stack;
        launched->call(launched->arguments);
        exit_thread(w, t);
        t = pick(w, false);
    } while (t && !t->stack_pointer);
    if (t) switch_to(w, t, nullptr);
    switch_stack(nullptr, w->home_pointer, w->home, w->home_size);
}

// ------------------------------------------------------------------------------------------------
// Shared memory. Every byte starts as 0xFF: a float read before it is written is NaN.

static char* open_shared(Block* block, const void* tag, char* p, size_t size) {
    block->variables.push_back({tag, p, size});
    block->shared_used = (size_t)(p + size - block->shared);
    if (address_sanitizer) __asan_unpoison_memory_region(p, size);
    if (checking) check::mark(p, size, check::UNWRITTEN);
    return (char*)memset(p, 0xFF, size);
}

void* shared_variable(const void* tag, size_t size, size_t alignment) {
    constexpr size_t gap = address_sanitizer || checking ? 128 : 0;     // what follows a variable is no other
    Block* block = in_kernel("a __shared__ variable", {})->block;
    size_t total = size, dynamic = launched->shared;
    for (const Block::Variable& v : block->variables) {
        if (v.tag == tag) return v.at;
        total += v.size;
    }
    if (total - dynamic > STATIC_LIMIT || total > SHARED_LIMIT)
        stop({}, "shared memory: %zu bytes are too many, %zu of them dynamic", total, dynamic);
    alignment = std::max(alignment, (size_t)16);
    size_t offset = (block->shared_used + gap + alignment - 1) & ~(alignment - 1);
    return open_shared(block, tag, block->shared + offset, size);
}

void* shared_dynamic() { return in_kernel("an extern __shared__ array", {})->block->shared; }

uint32_t shared_address(const void* pointer, Place here) {
    Block* block = in_kernel("__cvta_generic_to_shared", here)->block;
    size_t offset = (size_t)((const char*)pointer - block->shared);
    if (offset > block->shared_used) stop(here, "%p is not shared memory of this block", pointer);
    return (uint32_t)(offset + SHARED_BASE);
}

void* shared_pointer(uint32_t address, size_t size, Place here) {
    Block* block = in_kernel("a shared address", here)->block;
    char* p = block->shared + address - SHARED_BASE;
    for (const Block::Variable& v : block->variables)
        if (p >= v.at && p + size <= v.at + v.size) return p;
    stop(here, "%zu bytes at the shared address 0x%x: not within shared memory of this block", size, address);
}

// ------------------------------------------------------------------------------------------------
// Running a grid

uint3 index_of(size_t number, uint3 size) {
    size_t rest = number / size.x;
    return {(unsigned)(number % size.x), (unsigned)(rest % size.y), (unsigned)(rest / size.y)};
}

// The block that the order puts at position k.
static size_t ordered_block(size_t k) {
    if (options().order == FORWARD) return k;
    if (options().order == REVERSE) return blocks - 1 - k;
    size_t step = std::minstd_rand(options().seed)() % blocks | 1;
    while (std::gcd(step, blocks) != 1) step++;
    return (size_t)(((unsigned __int128)k * step + options().seed) % blocks);
}

// Lays out the records of `resident` blocks.
static void prepare(Worker* w, size_t resident) {
    block_size = launched->block;
    grid_size = launched->grid;
    if (!memcmp(&w->shape, &block_size, sizeof w->shape) && w->blocks.size() == resident) return;
    w->shape = block_size;
    w->threads.assign(block_threads * resident, Thread());
    w->warps.assign(block_warps * resident, Warp());
    w->blocks.assign(resident, Block());
    while (w->arenas.size() < resident) w->arenas.push_back((char*)aligned_alloc(PAGE, SHARED_ARENA));
    for (size_t i = 0; i < w->threads.size(); i++) {
        Thread* t = &w->threads[i];
        t->number = (unsigned)(i % block_threads);
        t->index = index_of(t->number, block_size);
        t->block = &w->blocks[i / block_threads];
        t->warp = &w->warps[i / block_threads * block_warps + t->number / WARP];
        if (t->number % WARP == 0) t->warp->lane0 = t;
    }
    open_stacks(w);
}

static void begin_block(Worker* w, size_t slot, size_t number) {
    Block* block = &w->blocks[slot];
    block->index = index_of(number, launched->grid);
    block->number = number;
    block->threads = block->live = (unsigned)block_threads;
    block->warps = &w->warps[slot * block_warps];
    block->shared = w->arenas[slot];
    block->shared_used = 0;
    block->variables.clear();
    block->copies.clear();
    for (size_t i = 0; i < block_warps; i++) {
        size_t lanes = block_threads - i * WARP;
        Warp* warp = block->warps + i;
        warp->live = warp->ready = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        warp->turn = w->order == REVERSE ? 0 : WARP - 1;
    }
    if (address_sanitizer) __asan_poison_memory_region(block->shared, SHARED_ARENA);
    if (checking) check::block_begins(block);
    if (launched->shared) open_shared(block, nullptr, block->shared, launched->shared);
}

// Runs the blocks from `first` on that are resident together, to their end.
static void run_blocks(Worker* w, size_t first) {
    static const unsigned leaves[] = {0, 4, 64};        // a random order runs warps ahead, or mixes them
    for (size_t i = 0; i < w->blocks.size(); i++) begin_block(w, i, ordered_block(first + i));
    w->random.seed((options().seed * 7919 + (unsigned)first) * 2654435761u);
    w->random.discard(4);
    w->leave = leaves[w->random() % 3];
    w->warp = w->order == REVERSE ? 0 : w->warps.size() - 1;
    w->live = w->threads.size();
    switch_to(w, pick(w, true), &w->home_pointer);
    if (checking)
        for (Block& block : w->blocks) check::block_ends(&block);
}

// One worker's share of the grid.
static void run_share(Worker* w) {
    DeviceCode open;
    worker = w;
    w->home_size = 0;
    size_t resident = launched->cooperative ? blocks : 1, first;
    prepare(w, resident);
    while ((first = next_block.fetch_add(resident)) < blocks) run_blocks(w, first);
    w->spins = ~0u;
    worker = nullptr;
}

// The caller of run_grid is the first of them.
static Worker* workers() {
    static Worker* all = nullptr;
    if (all) return all;
    all = new Worker[(size_t)options().threads];
    for (Worker* w = all + 1; w < all + options().threads; w++) {
        sem_init(&w->begin, 0, 0);
        sem_init(&w->end, 0, 0);
        std::thread([w] {
            for (;;) {
                while (sem_wait(&w->begin)) {}  // interrupted
                run_share(w);
                sem_post(&w->end);
            }
        }).detach();
    }
    return all;
}

void run_grid(const Launch& launch) {
    const size_t small = 2048;                  // threads that are run before another worker wakes up
    launched = &launch;
    blocks = (size_t)launch.grid.x * launch.grid.y * launch.grid.z;
    block_threads = launch.block.x * launch.block.y * launch.block.z;
    block_warps = (block_threads + WARP - 1) / WARP;
    next_block = 0;
    bool alone = launch.cooperative || blocks == 1 || blocks * block_threads <= small;
    int count = alone ? 1 : options().threads;
    Worker* w = workers();
    if (checking) check::launch_begins(launch);
    for (int i = 0; i < count; i++) w[i].spins = 0;
    for (int i = 1; i < count; i++) sem_post(&w[i].begin);
    run_share(w);
    for (int i = 1; i < count; i++)
        while (sem_wait(&w[i].end)) {}
}

const Launch* current_launch() { return worker ? launched : nullptr; }

int blocks_per_multiprocessor(int threads, size_t shared) {
    const size_t reserved = 1 << 10;            // of each block, by the system
    size_t memory = options().capability >= 90 ? 228 << 10 : 164 << 10;
    int by_threads = 2048 / ((threads + WARP - 1) / WARP * WARP);
    return std::min({32, by_threads, (int)(memory / (shared + reserved))});
}

}  // namespace cpu_cuda
