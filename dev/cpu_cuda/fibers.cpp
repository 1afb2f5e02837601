// fibers.cpp: runs a grid. Workers share its blocks; the CUDA threads of a block are fibers of one worker.
//
// A fiber is started only when a thread blocks. Until then one stack runs thread after thread, so that a
// kernel without barriers is a plain loop. A warp goes on as long as one of its lanes may run: its stacks are
// in the cache.

#include "runtime.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <numeric>
#include <string>
#include <thread>

#if CPU_CUDA_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void** bottom, size_t* size) {
    if (bottom) *bottom = nullptr, *size = 0;
}
static void __asan_poison_memory_region(const void*, size_t) {}
static void __asan_unpoison_memory_region(const void*, size_t) {}
#endif
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
constexpr size_t ARENA = 512 << 10;             // shared memory of a block, with room for gaps
constexpr size_t STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10;
constexpr unsigned PATIENCE = 8000000;          // spins after which a worker no longer counts as busy
constexpr size_t SHARED_BASE = 1024;            // the 32-bit address of its first byte, so that 0 is none

struct Grid {                                   // one launch, shared by the workers
    const Launch& launch;
    unsigned long long blocks;
    unsigned threads;                           // of a block
    std::atomic<unsigned long long> next;       // block that nobody has taken
    std::atomic<int> busy;                      // workers that do more than spin
};

struct Worker {
    Grid* grid = nullptr;
    uint3 shape = {};                           // what the arrays are laid out for
    std::vector<Thread> threads;                // of the resident blocks: one, or all of a cooperative launch
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    std::vector<unsigned> ready;                // of each warp: lanes that may run
    unsigned turn = 0, live = 0;                // the warp that ran last; threads that have not exited
    Block* block = nullptr;                     // the one that blockIdx shows
    std::vector<Thread*> at_grid;               // at the grid's barrier

    char* stacks = nullptr;
    std::vector<int> free_stacks;
    int stack_count = 0;
    Thread* starting = nullptr;                 // what a new fiber runs first
    void* home = nullptr;                       // the worker's own stack: its pointer, its extent
    const void* home_bottom = nullptr;
    size_t home_size = 0;
    std::vector<char*> arenas;

    Order order = FORWARD;                      // the option's, close at hand
    unsigned random = 1, leave = 0;             // of 256 picks, this many leave the warp
    unsigned spins = 0;                         // since anything else happened
};

static __thread Worker* worker;

// ------------------------------------------------------------------------------------------------
// Options

static void read_option(Options* o, const char* word) {
    auto number = [word](const char* format, auto* value) {
        char rest;
        return sscanf(word, format, value, &rest) == 1;
    };
    if (number("threads=%d%c", &o->threads) || number("sms=%d%c", &o->sms)) return;
    if (number("cc=%d%c", &o->capability) || number("timeout=%d%c", &o->timeout)) return;
    if (number("memory=%zu%c", &o->memory)) {
        o->memory <<= 20;
    } else if (number("order=random:%u%c", &o->seed)) {
        o->order = RANDOM;
    } else if (!strcmp(word, "order=reverse")) {
        o->order = REVERSE;
    } else if (!strcmp(word, "lazy")) {
        o->lazy = true;
    } else if (!strcmp(word, "profile")) {
        o->profile = true;
    } else if (strcmp(word, "order=forward")) {
        fprintf(stderr, "cpu_cuda: found %s in CPU_CUDA, expected an option of runtime.h\n", word);
        exit(2);
    }
}

static Options read_options() {
    int processors = (int)std::thread::hardware_concurrency();
    Options o = {processors, FORWARD, 0, false, false, 2, 90, (size_t)16384 << 20, 60};
    const char* variable = getenv("CPU_CUDA");
    std::string words = variable ? variable : "";
    for (char* word = strtok(&words[0], ","); word; word = strtok(nullptr, ",")) read_option(&o, word);
    o.threads = std::max(o.threads, 1);
    if (checking) o.threads = 1;                // one block after the other: time tells whose an access was
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

static bool same_place(Place a, Place b) {
    return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

static std::string text_of_list(const char* format, va_list arguments) {
    char text[2048];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

__attribute__((format(printf, 1, 2))) static std::string text_of(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = text_of_list(format, arguments);
    va_end(arguments);
    return text;
}

static std::string index_text(uint3 i) { return text_of("(%u,%u,%u)", i.x, i.y, i.z); }

// The first report wins: the process ends, and what other workers find meanwhile may be its consequence.
[[noreturn]] static void report(const std::string& text) {
    static std::atomic<bool> reported;
    if (reported.exchange(true))
        for (;;) pause();
    fflush(stdout);
    fputs(text.c_str(), stderr);
    fflush(stderr);
    _exit(STATUS_REPORT);
}

// The kernel, where it was launched, and the thread that runs.
static std::string kernel_text() {
    const Launch* launch = current_launch();
    if (!launch) return "";
    Place place = launch->place;
    std::string text = text_of("    kernel %s, launched at %s:%d", launch->kernel, place.file, place.line);
    if (current) text += ", block " + index_text(current->block->index);
    if (current) text += ", thread " + index_text(current->index);
    return text + "\n";
}

void stop(Place here, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = "cpu_cuda: " + text_of_list(format, arguments) + "\n";
    va_end(arguments);
    if (here.file) text += text_of("    at %s:%d\n", here.file, here.line);
    report(text + kernel_text());
}

static unsigned lane_of(const Thread* t) { return t->number % WARP; }

static const char* what_of(const Thread* t) {
    if (t->wait == AT_WARP) return t->warp->arrivals[lane_of(t)].what;
    if (t->wait == AT_BARRIER) return "the block's barrier";
    return t->wait == AT_GRID ? "the grid's barrier" : "__nanosleep";
}

static bool waits(const Thread* t) { return t->wait != RUNNING && t->warp->live >> lane_of(t) & 1; }

// Whether b waits where a does: in the same block, at the same line, for the same.
static bool same_wait(const Thread* a, const Thread* b) {
    if (!waits(b) || a->block != b->block || a->wait != b->wait) return false;
    if (!same_place(a->place, b->place)) return false;
    if (a->wait != AT_WARP) return true;
    const Warp::Arrival &x = a->warp->arrivals[lane_of(a)], &y = b->warp->arrivals[lane_of(b)];
    return x.mask == y.mask && !strcmp(x.what, y.what);
}

// A line about the threads that wait where threads[first] does.
static std::string group_text(const std::vector<Thread>& threads, size_t first, std::vector<bool>* told) {
    const Thread* one = &threads[first];
    std::string numbers;
    for (size_t i = first; i < threads.size(); i++) {
        size_t begin = i;
        for (; i < threads.size() && same_wait(one, &threads[i]); i++) (*told)[i] = true;
        if (i == begin) continue;
        numbers += text_of(numbers.empty() ? " %d" : ", %d", threads[begin].number);
        if (i > begin + 1) numbers += text_of("-%d", threads[i - 1].number);
    }
    std::string text = "    block " + index_text(one->block->index) + ", threads" + numbers;
    text += text_of(": wait at %s:%d in %s", one->place.file, one->place.line, what_of(one));
    if (one->wait == AT_WARP) text += text_of(", mask 0x%08x", one->warp->arrivals[lane_of(one)].mask);
    return text + "\n";
}

// A mistake of several threads: who waits where.
[[noreturn]] static void report_waiting(const std::string& what) {
    const size_t most = 16;                     // lines
    const std::vector<Thread>& threads = worker->threads;
    std::vector<bool> told(threads.size());
    std::string text = "cpu_cuda: " + what + "\n";
    size_t lines = 0;
    for (size_t i = 0; i < threads.size() && lines < most; i++) {
        if (told[i] || !waits(&threads[i])) continue;
        text += group_text(threads, i, &told);
        lines++;
    }
    size_t exited = threads.size() - worker->live;
    if (exited) text += text_of("    exited: %zu threads\n", exited);
    current = nullptr;
    report(text + kernel_text());
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
    .type cpu_cuda_switch, @function
cpu_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cpu_cuda_switch, .-cpu_cuda_switch
)");

static char* stack_bottom(const Worker* w, int stack) { return w->stacks + (size_t)stack * STRIDE + PAGE; }

// Addresses; a page takes memory when it is touched.
static char* map_memory(size_t size, int protection) {
    void* memory = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) stop({}, "no room for %zu MB of stacks or shared memory", size >> 20);
    return (char*)memory;
}

// A stack with a closed page below it.
static int take_stack(Worker* w) {
    if (!w->free_stacks.empty()) {
        int stack = w->free_stacks.back();
        w->free_stacks.pop_back();
        return stack;
    }
    if (!w->stacks) w->stacks = map_memory(MOST_STACKS * STRIDE, PROT_NONE);
    int stack = w->stack_count++;
    if ((size_t)stack == MOST_STACKS || mprotect(stack_bottom(w, stack), STACK, PROT_READ | PROT_WRITE))
        stop({}, "%d threads wait at once, and there is no stack for another", stack);
    return stack;
}

static bool in_stacks(const Worker* w, const void* p) {
    return w && w->stacks && (char*)p >= w->stacks && (char*)p < w->stacks + (size_t)w->stack_count * STRIDE;
}

bool on_fiber_stack(const void* p) { return in_stacks(worker, p); }

bool on_guard_page(const void* p) {
    return in_stacks(worker, p) && (size_t)((char*)p - worker->stacks) % STRIDE < PAGE;
}

static void fiber_main();

// A stack pointer from which cpu_cuda_switch enters fiber_main.
NO_ADDRESS static void* new_fiber(Worker* w, Thread* t) {
    t->stack = take_stack(w);
    w->starting = t;
    // Stacks whose tops agree modulo a page would fight for the same sets of the cache.
    size_t colour = (size_t)t->stack * 832 % PAGE & ~(size_t)63;
    void** top = (void**)(stack_bottom(w, t->stack) + STACK - colour);
    *--top = nullptr;                           // where fiber_main would return to
    *--top = (void*)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}

// ------------------------------------------------------------------------------------------------
// Which thread runs next

static unsigned next_random(Worker* w) {
    w->random ^= w->random << 13;
    w->random ^= w->random >> 17;
    w->random ^= w->random << 5;
    return w->random;
}

static void make_ready(Worker* w, Thread* t) { w->ready[t->warp->slot] |= 1u << lane_of(t); }

// The first set bit after `turn`, around the end; before it in reverse.
static unsigned next_lane(unsigned ready, unsigned turn, bool reverse) {
    if (reverse) {
        unsigned before = ready & ((1u << turn) - 1);
        return 31 - (unsigned)__builtin_clz(before ? before : ready);
    }
    unsigned after = ready & ~((2u << turn) - 1);
    return (unsigned)__builtin_ctz(after ? after : ready);
}

// The warp after `turn` (before it, in reverse) with a lane that may run, or null. `turn` itself comes last.
static Warp* next_warp(Worker* w, unsigned turn) {
    unsigned count = (unsigned)w->warps.size(), step = w->order == REVERSE ? count - 1 : 1;
    for (unsigned i = 0; i < count; i++) {
        turn = turn + step < count ? turn + step : turn + step - count;
        if (w->ready[turn]) return &w->warps[turn];
    }
    return nullptr;
}

// Takes the thread to run next off the ready ones; null if there is none.
static Thread* pick(Worker* w, bool leave_warp) {
    Warp* warp = &w->warps[w->turn];
    bool random = w->order == RANDOM;
    if (random && next_random(w) % 256 < w->leave) leave_warp = true;
    if (leave_warp || !w->ready[w->turn]) {
        unsigned turn = random ? next_random(w) % (unsigned)w->warps.size() : w->turn;
        warp = next_warp(w, turn);
        if (!warp) return nullptr;
        w->turn = warp->slot;
    }
    unsigned turn = random ? next_random(w) % WARP : warp->turn;
    unsigned lane = next_lane(w->ready[warp->slot], turn, w->order == REVERSE);
    warp->turn = lane;
    w->ready[warp->slot] &= ~(1u << lane);
    return warp->lane0 + lane;
}

// Whether t never ran; from now on it has.
static bool take_fresh(Thread* t) {
    unsigned bit = 1u << lane_of(t);
    bool fresh = t->warp->fresh & bit;
    t->warp->fresh &= ~bit;
    return fresh;
}

// ------------------------------------------------------------------------------------------------
// Threads: running, waiting, exiting

static void enter(Worker* w, Thread* t) {
    current = t;
    thread_index = t->index;
    t->wait = RUNNING;
    if (w->block == t->block) return;
    w->block = t->block;
    block_index = t->block->index;
}

// Saves this stack's state in *save and goes on with t, on a new fiber if it never ran.
NO_ADDRESS static void switch_to(Worker* w, Thread* t, void** save, void** fake_stack) {
    void* stack_pointer;
    if (take_fresh(t)) {
        stack_pointer = new_fiber(w, t);
    } else {
        enter(w, t);
        stack_pointer = t->stack_pointer;
    }
    __sanitizer_start_switch_fiber(fake_stack, stack_bottom(w, t->stack), STACK);
    cpu_cuda_switch(save, stack_pointer);
}

// More than spinning happened.
static void progress(Worker* w) {
    if (w->spins >= PATIENCE) w->grid->busy++;
    w->spins = 0;
}

// Lets others run until somebody has made the current thread ready again.
__attribute__((noinline)) static void wait(Wait kind, Place here) {
    Worker* w = worker;
    Thread* me = current;
    me->wait = kind;
    me->place = here;
    if (kind != SPINNING && w->spins) progress(w);
    Thread* next = pick(w, kind == SPINNING);
    if (!next) report_waiting("deadlock: no thread can go on");
    if (next == me) {
        me->wait = RUNNING;
        return;
    }
    void* fake_stack = nullptr;                 // AddressSanitizer's
    switch_to(w, next, &me->stack_pointer, &fake_stack);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

static void release_block(Worker* w, std::vector<Thread*>& arrived);

// No lane may wait for one that has gone.
static void check_left_behind(const Thread* t) {
    for (unsigned waiting = t->warp->waiting; waiting; waiting &= waiting - 1) {
        const Warp::Arrival& arrival = t->warp->arrivals[__builtin_ctz(waiting)];
        if (arrival.mask >> lane_of(t) & 1)
            stop(arrival.place, "%s: lane %d waits with mask 0x%08x, but lane %u has exited", arrival.what,
                 __builtin_ctz(waiting), arrival.mask, lane_of(t));
    }
}

static void exit_thread(Worker* w, Thread* t) {
    if (w->spins) progress(w);
    if (t->warp->waiting) check_left_behind(t);
    t->warp->live &= ~(1u << lane_of(t));
    w->live--;
    Block* block = t->block;
    block->live--;
    std::vector<Thread*>& arrived = block->arrived[0];
    if (!arrived.empty() && arrived.size() == block->live) release_block(w, arrived);   // exited is arrived
    current = nullptr;
}

// A fiber: runs its first thread, then every next one that never ran; then it ends.
NO_ADDRESS static void fiber_main() {
    Worker* w = worker;
    Thread* t = w->starting;
    const void* left_bottom;                    // of the stack that was left: at first the worker's own
    size_t left_size;
    __sanitizer_finish_switch_fiber(nullptr, &left_bottom, &left_size);
    if (!w->home_bottom) {
        w->home_bottom = left_bottom;
        w->home_size = left_size;
    }
    const Launch& launch = w->grid->launch;
    int stack = t->stack;
    do {
        t->stack = stack;
        enter(w, t);
        launch.call(launch.arguments);
        exit_thread(w, t);
        t = pick(w, false);
    } while (t && t->warp->fresh >> lane_of(t) & 1 && take_fresh(t));
    w->free_stacks.push_back(stack);
    void* dead;
    if (t) switch_to(w, t, &dead, nullptr);
    if (w->live) report_waiting("deadlock: no thread can go on");
    __sanitizer_start_switch_fiber(nullptr, w->home_bottom, w->home_size);
    cpu_cuda_switch(&dead, w->home);
    __builtin_unreachable();
}

static Thread* in_kernel(const char* what, Place here) {
    if (!current) stop(here, "%s is called outside a kernel", what);
    return current;
}

// ------------------------------------------------------------------------------------------------
// Barriers of a block and of the grid

static void release(Worker* w, std::vector<Thread*>& arrived) {
    for (Thread* t : arrived)
        if (t != current) make_ready(w, t);
    arrived.clear();
}

static void release_block(Worker* w, std::vector<Thread*>& arrived) {
    size_t count = 0;
    for (Thread* t : arrived) count += (size_t)(t->result & 1);
    BlockVote vote = (BlockVote)(arrived[0]->result >> 1);
    int result = vote == VOTE_OR ? count > 0 : vote == VOTE_AND ? count == arrived.size() : (int)count;
    for (Thread* t : arrived) t->result = result;
    if (checking) check::barrier(arrived.data(), arrived.size());
    release(w, arrived);
}

// The current thread joins those that have arrived, which have to be at the same line.
static void join(std::vector<Thread*>& arrived, Wait kind, const char* what, Place here) {
    Thread* me = current;
    me->wait = kind;
    me->place = here;
    if (!arrived.empty() && !same_place(arrived[0]->place, here))
        report_waiting(std::string(what) + ": divergent barrier: threads wait for one another at two lines");
    arrived.push_back(me);
}

int block_barrier(BlockVote vote, int predicate, const char* what, Place here) {
    Thread* me = in_kernel(what, here);
    std::vector<Thread*>& arrived = me->block->arrived[0];
    me->result = vote << 1 | (predicate != 0);
    join(arrived, AT_BARRIER, what, here);
    if (arrived.size() == me->block->live) {
        release_block(worker, arrived);
    } else {
        wait(AT_BARRIER, here);
    }
    return me->result;
}

void named_barrier(int id, int threads, Place here) {
    Thread* me = in_kernel("bar.sync", here);
    std::vector<Thread*>& arrived = me->block->arrived[id & 15];
    if (id < 1 || id > 15) stop(here, "bar.sync: found barrier %d, expected 1 to 15 (0: __syncthreads)", id);
    if (threads <= 0 || threads % WARP || (unsigned)threads > (me->block->threads + WARP - 1) / WARP * WARP)
        stop(here, "bar.sync: found %d threads, expected a multiple of 32 that the block has", threads);
    if (!arrived.empty() && arrived[0]->result != threads)
        stop(here, "bar.sync: barrier %d waits for %d and for %d threads", id, arrived[0]->result, threads);
    me->result = threads;
    arrived.push_back(me);
    if (arrived.size() < (size_t)threads) return wait(AT_BARRIER, here);
    if (checking) check::barrier(arrived.data(), arrived.size());
    release(worker, arrived);
}

void grid_barrier(Place here) {
    in_kernel("grid.sync", here);
    Worker* w = worker;
    if (!w->grid->launch.cooperative) stop(here, "grid.sync in a launch that is not cooperative");
    join(w->at_grid, AT_GRID, "grid.sync", here);
    if (w->at_grid.size() < w->threads.size()) return wait(AT_GRID, here);
    if (checking) check::grid_barrier();
    release(w, w->at_grid);
}

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (checking && current) check::fence();
}

void atomic_access(const void* pointer, size_t size, Place here) {
    if ((uintptr_t)pointer % size) stop(here, "misaligned atomic operation: %zu bytes at %p", size, pointer);
    if (checking && current) check::access(pointer, size, check::ATOMIC, here);
}

// ------------------------------------------------------------------------------------------------
// A thread that spins. If all workers do nothing else, nobody is left to end it: that is reported when a
// worker has gone on as long again, so that it has seen what the others wrote last.

void spin_wait(Place here) {
    if (!current) return;
    Worker* w = worker;
    current->wait = SPINNING;
    current->place = here;
    if (++w->spins == PATIENCE) w->grid->busy--;
    if (w->spins == 2 * PATIENCE) {
        unsigned long long waiting = w->grid->blocks - std::min(w->grid->blocks, w->grid->next.load());
        if (w->grid->busy == 0)
            report_waiting(text_of("a spin without end (blocks that have not begun: %llu)", waiting));
        sched_yield();
        w->spins = PATIENCE;
    }
    make_ready(w, current);
    wait(SPINNING, here);
}

// ------------------------------------------------------------------------------------------------
// Warp operations: the last lane to arrive does the work for all

// Lanes a and b wait for one another, but not for the same: neither can ever go on.
static void check_agreement(Warp* warp, unsigned lane) {
    const Warp::Arrival& mine = warp->arrivals[lane];
    for (unsigned others = warp->waiting & mine.mask & ~(1u << lane); others; others &= others - 1) {
        int other = __builtin_ctz(others);
        const Warp::Arrival& theirs = warp->arrivals[other];
        if (!(theirs.mask >> lane & 1)) continue;
        if (theirs.mask != mine.mask)
            stop(mine.place, "%s: lane %u names the mask 0x%08x; lane %d, which waits at %s:%d, names 0x%08x",
                 mine.what, lane, mine.mask, other, theirs.place.file, theirs.place.line, theirs.mask);
        if (strcmp(theirs.what, mine.what))
            stop(mine.place, "%s: lane %u meets lane %d, which waits at %s:%d in %s", mine.what, lane, other,
                 theirs.place.file, theirs.place.line, theirs.what);
    }
}

static void check_mask(const Thread* me, unsigned mask, const char* what, Place here) {
    unsigned lane = lane_of(me), missing = mask & ~me->warp->live;
    if (!(mask >> lane & 1))
        stop(here, "%s: the mask 0x%08x does not name the calling lane %u", what, mask, lane);
    if (!missing) return;
    unsigned first = (unsigned)__builtin_ctz(missing);
    const char* why = me->warp->number * WARP + first < me->block->threads ? "has exited" : "does not exist";
    stop(here, "%s: the mask 0x%08x names lane %u, which %s", what, mask, first, why);
}

static bool same_operation(const Warp::Arrival& a, const Warp::Arrival& b) {
    return a.mask == b.mask && (a.what == b.what || !strcmp(a.what, b.what));
}

// Whether all lanes of the mask are here for the same. What differs is an error or waits for another group.
static bool all_arrived(Warp* warp, unsigned lane) {
    const Warp::Arrival& mine = warp->arrivals[lane];
    if (!same_operation(warp->arrivals[__builtin_ctz(warp->waiting)], mine)) warp->mixed = true;
    if (warp->mixed) check_agreement(warp, lane);
    if ((warp->waiting & mine.mask) != mine.mask) return false;
    if (!warp->mixed) return true;
    for (unsigned m = mine.mask; m; m &= m - 1)
        if (!same_operation(warp->arrivals[__builtin_ctz(m)], mine)) return false;
    return true;
}

// Waits for the lanes of the mask. True for the last one, which then has to call go_on.
static bool arrive(void* argument, unsigned mask, const char* what, Place here) {
    Thread* me = in_kernel(what, here);
    Warp* warp = me->warp;
    unsigned lane = lane_of(me);
    if (mask & ~warp->live || !(mask >> lane & 1)) check_mask(me, mask, what, here);
    warp->arguments[lane] = argument;
    warp->arrivals[lane] = {mask, what, here};
    if (!warp->waiting) warp->mixed = false;
    warp->waiting |= 1u << lane;
    if (all_arrived(warp, lane)) return true;
    wait(AT_WARP, here);
    return false;
}

static void go_on(unsigned lanes) {
    Worker* w = worker;
    Warp* warp = current->warp;
    warp->waiting &= ~lanes;
    w->ready[warp->slot] |= lanes & ~(1u << lane_of(current));
}

void warp_together(WarpWork work, void* argument, unsigned mask, const char* what, Place here) {
    if (!arrive(argument, mask, what, here)) return;
    void* arguments[WARP];                      // on this fiber's stack, where instrumented code may read it
    memcpy(arguments, current->warp->arguments, sizeof arguments);
    work(arguments, mask);
    go_on(mask);
}

void warp_barrier(unsigned mask, Place here) {
    if (!arrive(nullptr, mask, "__syncwarp", here)) return;
    if (checking) check::warp_barrier(current->warp, mask);
    go_on(mask);
}

struct Shuffle {
    void* value;
    size_t size;
    ShuffleKind kind;
    int operand, width;
    const char* what;
    Place place;
};

// As the instruction: the operand counts modulo 32; who would read across its segment's end reads itself.
static int source_lane(const Shuffle* s, int lane) {
    int operand = s->operand & (WARP - 1), first = lane & ~(s->width - 1), source;
    if (s->kind == SHUFFLE_INDEX) return first + (operand & (s->width - 1));
    if (s->kind == SHUFFLE_UP) {
        source = lane - operand;
        return source < first ? lane : source;
    }
    source = s->kind == SHUFFLE_DOWN ? lane + operand : lane ^ operand;
    return source >= first + s->width ? lane : source;
}

static void copy_value(void* to, const void* from, size_t size) {
    if (size == 4) {                            // most are, and this is no call
        memcpy(to, from, 4);
    } else {
        memcpy(to, from, size);
    }
}

static void shuffle_lanes(void** arguments, unsigned lanes) {
    char values[WARP][16];
    Shuffle** shuffles = (Shuffle**)arguments;
    for (unsigned m = lanes; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        copy_value(values[lane], shuffles[lane]->value, shuffles[lane]->size);
    }
    for (unsigned m = lanes; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        const Shuffle* s = shuffles[lane];
        int source = source_lane(s, lane);
        if (!(lanes >> source & 1))
            stop(s->place, "%s: lane %d reads lane %d, which takes no part (mask 0x%08x)", s->what, lane,
                 source, lanes);
        copy_value(s->value, values[source], s->size);
    }
}

void shuffle(void* value, size_t size, ShuffleKind kind, int operand, int width, unsigned mask,
             const char* what, Place here) {
    if (width < 1 || width > WARP || width & (width - 1))
        stop(here, "%s: found width %d, expected a power of two up to 32", what, width);
    Shuffle s = {value, size, kind, operand, width, what, here};
    warp_together(shuffle_lanes, &s, mask, what, here);
}

// ------------------------------------------------------------------------------------------------
// Shared memory. Every byte starts as 0xFF: a float read before it is written is NaN.

static void open_shared(char* p, size_t size) {
    __asan_unpoison_memory_region(p, size);
    memset(p, 0xFF, size);
    if (checking) check::shared_begins(p, size);
}

void* shared_variable(const void* tag, size_t size, size_t alignment) {
    constexpr size_t gap = address_sanitizer || checking ? 128 : 0;     // what follows a variable is no other
    Block* block = in_kernel("a __shared__ variable", {})->block;
    size_t total = size;
    for (const Block::Variable& v : block->variables) {
        if (v.tag == tag) return v.at;
        total += v.size;
    }
    size_t dynamic = worker->grid->launch.shared;
    if (total > STATIC_LIMIT || total + dynamic > SHARED_LIMIT)
        stop({}, "shared memory: %zu bytes of variables (limit %zu), %zu dynamic, in all at most %zu",
             total, STATIC_LIMIT, dynamic, SHARED_LIMIT);
    alignment = std::max(alignment, (size_t)16);
    char* at = block->shared + ((block->shared_used + gap + alignment - 1) & ~(alignment - 1));
    block->shared_used = (size_t)(at + size - block->shared);
    block->variables.push_back({tag, at, size});
    open_shared(at, size);
    return at;
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
    auto within = [&](char* at, size_t length) { return p >= at && p + size <= at + length; };
    if (within(block->shared, worker->grid->launch.shared)) return p;
    for (const Block::Variable& v : block->variables)
        if (within(v.at, v.size)) return p;
    stop(here, "%zu bytes at the shared address 0x%x: not within shared memory of this block", size, address);
}

// ------------------------------------------------------------------------------------------------
// Running a grid

static unsigned mix(unsigned a, unsigned long long b) {
    unsigned long long z = (a + 0x9e3779b97f4a7c15u) * (b + 0xbf58476d1ce4e5b9u);
    return (unsigned)(z >> 32 ^ z) | 1;         // never 0, from which next_random would not move
}

static uint3 index_of(unsigned long long number, Size3 size) {
    return {(unsigned)(number % size.x), (unsigned)(number / size.x % size.y),
            (unsigned)(number / ((unsigned long long)size.x * size.y))};
}

// The block that the order puts at position k.
static unsigned long long ordered_block(const Grid& grid, unsigned long long k) {
    if (options().order == FORWARD) return k;
    if (options().order == REVERSE) return grid.blocks - 1 - k;
    unsigned long long step = mix(options().seed, grid.blocks) % grid.blocks | 1;
    while (std::gcd(step, grid.blocks) != 1) step++;
    return (unsigned long long)(((unsigned __int128)k * step + options().seed) % grid.blocks);
}

// Lays out the records of `blocks` resident blocks.
static void prepare(Worker* w, const Grid& grid, size_t blocks) {
    Size3 size = grid.launch.block;
    block_size = {size.x, size.y, size.z};
    grid_size = {grid.launch.grid.x, grid.launch.grid.y, grid.launch.grid.z};
    if (!memcmp(&w->shape, &block_size, sizeof w->shape) && w->blocks.size() == blocks) return;
    w->shape = block_size;
    size_t warps = (grid.threads + WARP - 1) / WARP;
    w->threads.assign(grid.threads * blocks, Thread());
    w->warps.assign(warps * blocks, Warp());
    w->blocks.assign(blocks, Block());
    w->ready.assign(warps * blocks, 0);
    for (size_t i = 0; i < w->threads.size(); i++) {
        Thread* t = &w->threads[i];
        t->number = (unsigned short)(i % grid.threads);
        t->index = index_of(t->number, size);
        t->block = &w->blocks[i / grid.threads];
        t->warp = &w->warps[i / grid.threads * warps + t->number / WARP];
        if (lane_of(t) == 0) t->warp->lane0 = t;
    }
    for (size_t i = 0; i < w->warps.size(); i++) {
        w->warps[i].number = (unsigned)(i % warps);
        w->warps[i].slot = (unsigned)i;
    }
}

static char* arena(Worker* w, size_t i) {
    while (w->arenas.size() <= i) w->arenas.push_back(map_memory(ARENA, PROT_READ | PROT_WRITE));
    return w->arenas[i];
}

static void begin_block(Worker* w, size_t slot, unsigned long long number) {
    const Grid& grid = *w->grid;
    Block* block = &w->blocks[slot];
    block->number = number;
    block->index = index_of(number, grid.launch.grid);
    block->threads = block->live = grid.threads;
    block->shared = arena(w, slot);
    block->shared_size = ARENA;
    block->shared_used = grid.launch.shared;
    block->variables.clear();
    block->copies.clear();
    for (std::vector<Thread*>& arrived : block->arrived) arrived.clear();
    size_t warps = (grid.threads + WARP - 1) / WARP;
    block->warps = &w->warps[slot * warps];
    for (unsigned i = 0; i < warps; i++) {
        Warp* warp = block->warps + i;
        unsigned lanes = grid.threads - i * WARP;
        warp->live = warp->fresh = w->ready[warp->slot] = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        warp->waiting = 0;
        warp->turn = w->order == REVERSE ? 0 : WARP - 1;
    }
    __asan_poison_memory_region(block->shared, ARENA);
    if (checking) check::block_begins(block);
    if (grid.launch.shared) open_shared(block->shared, grid.launch.shared);
}

// Runs `count` blocks, resident together, to their end.
static void run_blocks(Worker* w, unsigned long long first, size_t count) {
    static const unsigned leaves[] = {0, 4, 64};        // a random order runs warps ahead, or mixes them
    const Grid& grid = *w->grid;
    for (size_t slot = 0; slot < count; slot++) begin_block(w, slot, ordered_block(grid, first + slot));
    w->random = mix(options().seed, first);
    w->leave = leaves[next_random(w) / 8 % 3];
    w->turn = w->order == REVERSE ? 0 : (unsigned)w->warps.size() - 1;
    w->live = grid.threads * (unsigned)count;
    w->block = nullptr;
    w->home_bottom = nullptr;
    void* fake_stack = nullptr;
    switch_to(w, pick(w, true), &w->home, &fake_stack);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    if (checking)
        for (Block& block : w->blocks) check::block_ends(&block);
}

static std::vector<Worker*>& workers() {
    static std::vector<Worker*>& all = *new std::vector<Worker*>;
    return all;
}

// Worker `number`'s share of the grid.
static void run_share(Grid* grid, int number) {
    DeviceCode open;
    Worker* w = worker = workers()[(size_t)number];
    w->grid = grid;
    w->order = options().order;
    size_t resident = grid->launch.cooperative ? grid->blocks : 1;
    prepare(w, *grid, resident);
    w->at_grid.clear();
    for (;;) {
        unsigned long long first = grid->next.fetch_add(resident);
        if (first >= grid->blocks) break;
        run_blocks(w, first, resident);
    }
    grid->busy--;
    w->grid = nullptr;
    worker = nullptr;
}

// Threads 1, 2, ... that wait for a grid; the caller of run_grid is number 0.
struct Pool {
    std::mutex lock;
    std::condition_variable begin, end;
    Grid* grid = nullptr;
    unsigned launches = 0;
    int running = 0;

    Pool() {
        for (int i = 1; i < options().threads; i++) std::thread(&Pool::serve, this, i).detach();
    }

    void serve(int number) {
        std::unique_lock<std::mutex> hold(lock);
        for (unsigned seen = 0;; seen++) {
            begin.wait(hold, [&] { return launches != seen; });
            hold.unlock();
            run_share(grid, number);
            hold.lock();
            if (--running == 0) end.notify_one();
        }
    }

    void run(Grid* next) {
        std::unique_lock<std::mutex> hold(lock);
        grid = next;
        launches++;
        running = options().threads - 1;
        hold.unlock();
        begin.notify_all();
        run_share(next, 0);
        hold.lock();
        end.wait(hold, [&] { return running == 0; });
    }
};

void run_grid(const Launch& launch) {
    const unsigned long long small = 2048;      // threads that are run before another worker wakes up
    const Size3 &g = launch.grid, &b = launch.block;
    unsigned long long blocks = (unsigned long long)g.x * g.y * g.z;
    unsigned threads = b.x * b.y * b.z;
    bool alone = launch.cooperative || options().threads == 1 || blocks == 1 || blocks * threads <= small;
    Grid grid = {launch, blocks, threads, {0}, {alone ? 1 : options().threads}};
    while (workers().size() < (size_t)options().threads) workers().push_back(new Worker);
    if (checking) check::launch_begins(launch);
    if (alone) {
        run_share(&grid, 0);
    } else {
        static Pool& pool = *new Pool;
        pool.run(&grid);
    }
    if (checking) check::launch_ends();
}

const Launch* current_launch() { return worker && worker->grid ? &worker->grid->launch : nullptr; }

int blocks_per_multiprocessor(int threads, size_t shared) {
    const size_t reserved = 1 << 10;            // of each block, by the system
    size_t memory = options().capability >= 90 ? 228 << 10 : 164 << 10;
    int by_threads = 2048 / ((threads + WARP - 1) / WARP * WARP);
    return std::min({32, by_threads, (int)(memory / (shared + reserved))});
}

}  // namespace cpu_cuda
