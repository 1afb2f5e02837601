// fibers.cpp: runs a grid. Blocks are shared out to worker threads; the CUDA threads of a block are fibers of one worker.
//
// A fiber is started only when a thread blocks. Until then one stack runs thread after thread, so a kernel without barriers is
// a plain loop. A warp goes on as long as one of its lanes may run: its stacks are in the cache, and its lanes meet soon.

#include "runtime.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <numeric>
#include <string>
#include <thread>

#if CPU_CUDA_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What kernels see as threadIdx, ...: the same symbols, which only this file may write.
__thread uint3 thread_index __asm__("cpu_cuda_threadIdx");
__thread uint3 block_index __asm__("cpu_cuda_blockIdx");
__thread uint3 block_size __asm__("cpu_cuda_blockDim");
__thread uint3 grid_size __asm__("cpu_cuda_gridDim");
const int warpSize = cpu_cuda::WARP;

namespace cpu_cuda {

__thread Thread* current;

namespace {

constexpr size_t PAGE = 4096, STACK = address_sanitizer ? 256 << 10 : 64 << 10, STRIDE = STACK + PAGE;
constexpr size_t MOST_STACKS = 32000;           // each costs the kernel two of its 65530 mappings
constexpr size_t ARENA = 512 << 10;             // shared memory of a block, with room for gaps
constexpr size_t STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10;
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
    std::vector<uint64_t> ready;                // warps in which a lane may run, a bit each
    unsigned turn = 0, live = 0;                // the warp that ran last; threads that have not exited
    Block* block = nullptr;                     // the one that blockIdx shows
    std::vector<Thread*> at_grid;               // at the grid's barrier

    char* stacks = nullptr;
    std::vector<int> free_stacks;
    int stack_count = 0;
    Thread* starting = nullptr;                 // what a new fiber runs first
    void* home = nullptr;                       // the worker's own stack pointer
    std::vector<char*> arenas;

    Order order = FORWARD;                      // the option's, close at hand
    unsigned random = 1, leave = 0;             // of 256 picks, this many leave the warp
    unsigned long long spins = 0;               // spin_wait calls since anything else happened
    bool stuck = false;
    double spinning_since = 0;
#if CPU_CUDA_ADDRESS
    void* home_fake_stack = nullptr;
    const void* home_bottom = nullptr;
    size_t home_size = 0;
#endif
};

__thread Worker* worker;

}  // namespace

// ------------------------------------------------------------------------------------------------
// Options

static unsigned long number_option(const char* word, const char* value) {
    char* end;
    unsigned long number = strtoul(value, &end, 10);
    if (!*value || *end) {
        fprintf(stderr, "cpu_cuda: CPU_CUDA: found %s, expected a number in it\n", word);
        exit(2);
    }
    return number;
}

static void order_option(Options* o, const char* word, const char* value) {
    if (!strcmp(value, "forward")) {
        o->order = FORWARD;
    } else if (!strcmp(value, "reverse")) {
        o->order = REVERSE;
    } else if (!strncmp(value, "random:", 7)) {
        o->order = RANDOM;
        o->seed = (unsigned)number_option(word, value + 7);
    } else {
        fprintf(stderr, "cpu_cuda: CPU_CUDA: found %s, expected order=forward, reverse or random:SEED\n", word);
        exit(2);
    }
}

static void one_option(Options* o, const std::string& word) {
    const char* w = word.c_str();
    size_t equals = word.find('=');
    std::string name = word.substr(0, equals);
    const char* value = equals == std::string::npos ? "" : w + equals + 1;
    if (name == "order") {
        order_option(o, w, value);
    } else if (word == "lazy") {
        o->lazy = true;
    } else if (word == "profile") {
        o->profile = true;
    } else if (name == "threads") {
        o->threads = std::max(1, (int)number_option(w, value));
    } else if (name == "sms") {
        o->sms = (int)number_option(w, value);
    } else if (name == "cc") {
        o->capability = (int)number_option(w, value);
    } else if (name == "memory") {
        o->memory = number_option(w, value) << 20;
    } else if (name == "timeout") {
        o->timeout = (int)number_option(w, value);
    } else {
        fprintf(stderr, "cpu_cuda: CPU_CUDA: found %s, expected one of those in runtime.h\n", w);
        exit(2);
    }
}

static Options read_options() {
    Options o = {(int)std::max(1u, std::thread::hardware_concurrency()), FORWARD, 0, false, false, 2, 90,
                 (size_t)16384 << 20, 60};
    std::string text = getenv("CPU_CUDA") ? getenv("CPU_CUDA") : "";
    for (size_t begin = 0; begin < text.size();) {
        size_t end = std::min(text.find(',', begin), text.size());
        if (end > begin) one_option(&o, text.substr(begin, end - begin));
        begin = end + 1;
    }
    if (checking) o.threads = 1;                // one block after the other: time tells which block made an access
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

static std::string format_text(const char* format, va_list arguments) {
    char text[2048];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

__attribute__((format(printf, 1, 2))) static std::string text_of(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = format_text(format, arguments);
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

static std::string kernel_text() {
    const Launch* launch = current_launch();
    if (!launch) return "";
    return text_of("    kernel %s, launched at %s:%d", launch->kernel, launch->place.file, launch->place.line);
}

void stop(Place here, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string text = "cpu_cuda: " + format_text(format, arguments) + "\n";
    va_end(arguments);
    if (here.file) text += text_of("    at %s:%d\n", here.file, here.line);
    std::string kernel = kernel_text();
    if (!kernel.empty() && current)
        kernel += ", block " + index_text(current->block->index) + ", thread " + index_text(current->index);
    report(text + kernel + (kernel.empty() ? "" : "\n"));
}

static unsigned lane_of(const Thread* t) { return t->number % WARP; }

static const char* what_of(const Thread* t) {
    if (t->wait == AT_WARP) return t->warp->arrivals[lane_of(t)].what;
    return t->wait == AT_BARRIER ? "the block's barrier" : t->wait == AT_GRID ? "the grid's barrier" : "__nanosleep";
}

// Of the same group in a report: same block, same line, waiting for the same.
static bool same_wait(const Thread* a, const Thread* b) {
    if (a->block != b->block || a->wait != b->wait || !same_place(a->place, b->place)) return false;
    if (a->wait != AT_WARP) return true;
    const Warp::Arrival &x = a->warp->arrivals[lane_of(a)], &y = b->warp->arrivals[lane_of(b)];
    return x.mask == y.mask && !strcmp(x.what, y.what);
}

static bool exited(const Thread* t) { return !(t->warp->live >> lane_of(t) & 1); }

// "0-15, 32-47": the threads for which `belongs` holds.
template <class Belongs>
static std::string ranges_text(const std::vector<Thread>& threads, Belongs belongs) {
    std::string text;
    for (size_t i = 0; i < threads.size(); i++) {
        if (!belongs(&threads[i])) continue;
        size_t first = i;
        while (i + 1 < threads.size() && threads[i + 1].number && belongs(&threads[i + 1])) i++;
        text += text_of(text.empty() ? "%d" : ", %d", threads[first].number);
        if (i > first) text += text_of("-%d", threads[i].number);
    }
    return text;
}

// Who waits where: a line for each group of threads.
static std::string waiting_text(const Worker* w) {
    std::vector<bool> told(w->threads.size());
    std::string text;
    int lines = 0;
    for (size_t i = 0; i < w->threads.size() && lines < 16; i++) {
        const Thread* first = &w->threads[i];
        if (told[i] || exited(first) || first->wait == RUNNING) continue;
        std::string ranges = ranges_text(w->threads, [&](const Thread* t) {
            bool same = !exited(t) && same_wait(first, t);
            if (same) told[(size_t)(t - w->threads.data())] = true;
            return same;
        });
        text += "    block " + index_text(first->block->index) + ", threads " + ranges +
                text_of(": wait at %s:%d in %s", first->place.file, first->place.line, what_of(first));
        if (first->wait == AT_WARP) text += text_of(", mask 0x%08x", first->warp->arrivals[lane_of(first)].mask);
        text += "\n";
        lines++;
    }
    size_t gone = w->threads.size() - w->live;
    if (gone) text += text_of("    threads that have exited: %zu\n", gone);
    return text;
}

[[noreturn]] static void report_waiting(const std::string& what) {
    report("cpu_cuda: " + what + "\n" + waiting_text(worker) + kernel_text() + "\n");
}

// ------------------------------------------------------------------------------------------------
// Stacks, and the switch from one to another.
//
// A switch is an ordinary function call that returns elsewhere. The compiler expects a call to destroy all but the callee-saved
// registers, so those and the stack are all there is to save. (The control words of the floating-point units are callee-saved
// too, but kernels do not change them.)

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

#if CPU_CUDA_ADDRESS
#define NO_ADDRESS __attribute__((no_sanitize("address")))      // frames that are left by a switch and never return
#else
#define NO_ADDRESS
#endif

static char* stack_bottom(const Worker* w, int stack) { return w->stacks + (size_t)stack * STRIDE + PAGE; }

// A stack with a closed page below it.
static int take_stack(Worker* w) {
    if (!w->free_stacks.empty()) {
        int stack = w->free_stacks.back();
        w->free_stacks.pop_back();
        return stack;
    }
    if (!w->stacks) {
        void* memory = mmap(nullptr, MOST_STACKS * STRIDE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) stop({}, "no memory for the stacks of %zu threads", MOST_STACKS);
        w->stacks = (char*)memory;
    }
    int stack = w->stack_count++;
    if ((size_t)stack == MOST_STACKS || mprotect(stack_bottom(w, stack), STACK, PROT_READ | PROT_WRITE))
        stop({}, "more than %d threads wait at once: no memory for their stacks", stack);
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

static void make_ready(Worker* w, Thread* t) {
    Warp* warp = t->warp;
    if (!warp->ready) w->ready[warp->slot / 64] |= 1ull << warp->slot % 64;
    warp->ready |= 1u << lane_of(t);
}

// The first set bit after `turn`, around the end; before it in reverse.
static unsigned next_lane(unsigned ready, unsigned turn, bool reverse) {
    if (reverse) {
        unsigned before = ready & ((1u << turn) - 1);
        return 31 - (unsigned)__builtin_clz(before ? before : ready);
    }
    unsigned after = ready & ~((2u << turn) - 1);
    return (unsigned)__builtin_ctz(after ? after : ready);
}

// The next warp that may run, or null. `turn` itself comes last.
static Warp* next_warp(Worker* w, unsigned turn) {
    size_t words = w->ready.size(), at = turn / 64;
    bool reverse = w->order == REVERSE;
    uint64_t first = reverse ? (1ull << turn % 64) - 1 : ~((2ull << turn % 64) - 1);
    for (size_t i = 0; i <= words; i++) {
        uint64_t bits = w->ready[at] & (i == 0 ? first : ~0ull);
        if (bits) return &w->warps[at * 64 + (size_t)(reverse ? 63 - __builtin_clzll(bits) : __builtin_ctzll(bits))];
        at = reverse ? (at + words - 1) % words : (at + 1) % words;
    }
    return nullptr;
}

// Takes the thread to run next off the ready ones; null if there is none.
static Thread* pick(Worker* w, bool leave_warp) {
    Warp* warp = &w->warps[w->turn];
    bool random = w->order == RANDOM;
    if (random && next_random(w) % 256 < w->leave) leave_warp = true;
    if (leave_warp || !warp->ready) {
        unsigned turn = random ? next_random(w) % (unsigned)w->warps.size() : w->turn;
        warp = next_warp(w, turn);
        if (!warp) return nullptr;
        w->turn = warp->slot;
    }
    unsigned lane = next_lane(warp->ready, random ? next_random(w) % WARP : warp->turn, w->order == REVERSE);
    warp->turn = lane;
    warp->ready &= ~(1u << lane);
    if (!warp->ready) w->ready[warp->slot / 64] &= ~(1ull << warp->slot % 64);
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
#if CPU_CUDA_ADDRESS
    __sanitizer_start_switch_fiber(fake_stack, stack_bottom(w, t->stack), STACK);
#else
    (void)fake_stack;
#endif
    cpu_cuda_switch(save, stack_pointer);
}

// More than spinning happened.
static void progress(Worker* w) {
    w->spins = 0;
    if (w->stuck) w->grid->busy++;
    w->stuck = false;
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
#if CPU_CUDA_ADDRESS
    switch_to(w, next, &me->stack_pointer, &me->fake_stack);
    __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#else
    switch_to(w, next, &me->stack_pointer, nullptr);
#endif
}

static void release_barrier(Worker* w, std::vector<Thread*>& arrived);

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
    if (!arrived.empty() && arrived.size() == block->live) release_barrier(w, arrived);    // an exited thread counts as arrived
    current = nullptr;
}

// Back to the worker's own stack: all threads have exited.
NO_ADDRESS static void go_home(Worker* w) {
    void* dead;
#if CPU_CUDA_ADDRESS
    __sanitizer_start_switch_fiber(nullptr, w->home_bottom, w->home_size);
#endif
    cpu_cuda_switch(&dead, w->home);
}

// A fiber: runs its first thread, then every next one that never ran; then it ends.
NO_ADDRESS static void fiber_main() {
    Worker* w = worker;
    Thread* t = w->starting;
#if CPU_CUDA_ADDRESS
    bool first = !w->home_bottom;
    __sanitizer_finish_switch_fiber(nullptr, first ? &w->home_bottom : nullptr, first ? &w->home_size : nullptr);
#endif
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
    go_home(w);
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

static void release_barrier(Worker* w, std::vector<Thread*>& arrived) {
    size_t count = 0;
    for (Thread* t : arrived) count += (size_t)(t->result & 1);
    BlockVote vote = (BlockVote)(arrived[0]->result >> 1);
    int result = vote == VOTE_OR ? count > 0 : vote == VOTE_AND ? count == arrived.size() : (int)count;
    for (Thread* t : arrived) t->result = result;
    if (checking) check::barrier(arrived.data(), arrived.size());
    release(w, arrived);
}

// The thread has to meet those that have arrived: at the same line.
static void check_place(const std::vector<Thread*>& arrived, Thread* me, Wait kind, const char* what, Place here) {
    if (arrived.empty() || same_place(arrived[0]->place, here)) return;
    me->wait = kind;
    report_waiting(text_of("%s: divergent barrier: threads of a block wait for one another at different lines", what));
}

int block_barrier(BlockVote vote, int predicate, const char* what, Place here) {
    Thread* me = in_kernel(what, here);
    Block* block = me->block;
    std::vector<Thread*>& arrived = block->arrived[0];
    me->place = here;
    me->result = vote << 1 | (predicate != 0);
    check_place(arrived, me, AT_BARRIER, what, here);
    arrived.push_back(me);
    if (arrived.size() == block->live) {
        release_barrier(worker, arrived);
    } else {
        wait(AT_BARRIER, here);
    }
    return me->result;
}

void named_barrier(int id, int threads, Place here) {
    Thread* me = in_kernel("bar.sync", here);
    if (id < 1 || id > 15) stop(here, "bar.sync: found barrier %d, expected 1 to 15 (0 is __syncthreads)", id);
    if (threads <= 0 || threads % WARP || (unsigned)threads > (me->block->threads + WARP - 1) / WARP * WARP)
        stop(here, "bar.sync: found %d threads, expected a multiple of 32 that the block has", threads);
    std::vector<Thread*>& arrived = me->block->arrived[id];
    me->result = threads;
    if (!arrived.empty() && arrived[0]->result != threads)
        stop(here, "bar.sync: barrier %d is waited for by %d threads, and here by %d", id, arrived[0]->result, threads);
    arrived.push_back(me);
    if (arrived.size() < (size_t)threads) return wait(AT_BARRIER, here);
    if (checking) check::barrier(arrived.data(), arrived.size());
    release(worker, arrived);
}

void grid_barrier(Place here) {
    Thread* me = in_kernel("grid.sync", here);
    Worker* w = worker;
    if (!w->grid->launch.cooperative) stop(here, "grid.sync in a launch that is not cooperative");
    me->place = here;
    check_place(w->at_grid, me, AT_GRID, "grid.sync", here);
    w->at_grid.push_back(me);
    if (w->at_grid.size() < w->threads.size()) return wait(AT_GRID, here);
    if (checking) check::grid_barrier();
    release(w, w->at_grid);
}

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (checking && current) check::fence();
}

void atomic_access(const void* pointer, size_t size, Place here) {
    if ((uintptr_t)pointer % size) stop(here, "an atomic operation of %zu bytes at %p, which is not a multiple", size, pointer);
    if (checking && current) check::access(pointer, size, check::ATOMIC, here);
}

// ------------------------------------------------------------------------------------------------
// A thread that spins. If all workers only spin, nobody is left to end it.

static double processor_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Every few thousand turns. A while of nothing else makes a worker stuck; it is reported after another in which
// all workers were, so that each has seen what the others wrote last.
static void look_stuck(Worker* w) {
    const double patience = 0.3;
    double now = processor_seconds();
    if (!w->spinning_since) w->spinning_since = now;
    if (w->stuck && w->grid->busy > 0) {
        sched_yield();
        w->spinning_since = now;
    }
    if (now - w->spinning_since < patience) return;
    if (w->stuck) {
        unsigned long long waiting = w->grid->blocks - std::min(w->grid->blocks, w->grid->next.load());
        report_waiting(text_of("a spin without end: no other thread can run (blocks of the grid that are not resident: %llu)",
                               waiting));
    }
    w->stuck = true;
    w->grid->busy--;
    w->spinning_since = now;
}

void spin_wait(Place here) {
    if (!current) return;
    Worker* w = worker;
    current->wait = SPINNING;
    current->place = here;
    if (w->spins++ == 0) w->spinning_since = 0;
    if (w->spins % 4096 == 0) look_stuck(w);
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
            stop(mine.place, "%s: lane %u names the mask 0x%08x, lane %d, which waits at %s:%d in %s, names 0x%08x",
                 mine.what, lane, mine.mask, other, theirs.place.file, theirs.place.line, theirs.what, theirs.mask);
        if (strcmp(theirs.what, mine.what))
            stop(mine.place, "%s: lane %u meets lane %d, which waits at %s:%d in %s", mine.what, lane, other,
                 theirs.place.file, theirs.place.line, theirs.what);
    }
}

static void check_mask(const Thread* me, unsigned mask, const char* what, Place here) {
    unsigned lane = lane_of(me), missing = mask & ~me->warp->live;
    if (!(mask >> lane & 1)) stop(here, "%s: the mask 0x%08x does not name the calling lane %u", what, mask, lane);
    if (!missing) return;
    unsigned first = (unsigned)__builtin_ctz(missing);
    bool existed = me->warp->number * WARP + first < me->block->threads;
    stop(here, "%s: the mask 0x%08x names lane %u, which %s", what, mask, first, existed ? "has exited" : "does not exist");
}

static bool same_operation(const Warp::Arrival& a, const Warp::Arrival& b) {
    return a.mask == b.mask && (a.what == b.what || !strcmp(a.what, b.what));
}

// Whether all lanes of the mask are here for the same. What differs is either an error or waits for another group.
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
    unsigned others = lanes & ~(1u << lane_of(current));
    warp->waiting &= ~lanes;
    if (!others) return;
    if (!warp->ready) w->ready[warp->slot / 64] |= 1ull << warp->slot % 64;
    warp->ready |= others;
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

// As the instruction: the operand counts modulo 32; a lane that would read across its segment's end reads itself.
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

static void shuffle_lanes(void** arguments, unsigned lanes) {
    char values[WARP][16];
    Shuffle** shuffles = (Shuffle**)arguments;
    for (unsigned m = lanes; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        memcpy(values[lane], shuffles[lane]->value, shuffles[lane]->size);
    }
    for (unsigned m = lanes; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        const Shuffle* s = shuffles[lane];
        int source = source_lane(s, lane);
        if (!(lanes >> source & 1))
            stop(s->place, "%s: lane %d reads lane %d, which takes no part (mask 0x%08x)", s->what, lane, source, lanes);
        if (shuffles[source]->size != s->size)
            stop(s->place, "%s: lane %d passes %zu bytes, lane %d %zu", s->what, lane, s->size, source, shuffles[source]->size);
        memcpy(s->value, values[source], s->size);
    }
}

void shuffle(void* value, size_t size, ShuffleKind kind, int operand, int width, unsigned mask, const char* what, Place here) {
    if (width < 1 || width > WARP || width & (width - 1))
        stop(here, "%s: found width %d, expected a power of two up to 32", what, width);
    Shuffle s = {value, size, kind, operand, width, what, here};
    warp_together(shuffle_lanes, &s, mask, what, here);
}

// ------------------------------------------------------------------------------------------------
// Shared memory. Every byte starts as 0xFF: a float read before it is written is NaN.

static void open_shared(char* p, size_t size) {
#if CPU_CUDA_ADDRESS
    __asan_unpoison_memory_region(p, size);
#endif
    memset(p, 0xFF, size);
    if (checking) check::shared_begins(p, size);
}

void* shared_variable(const void* tag, size_t size, size_t alignment) {
    constexpr size_t gap = address_sanitizer || checking ? 128 : 0;     // so that the byte after a variable is no other's
    Block* block = in_kernel("a __shared__ variable", {})->block;
    size_t total = size;
    for (const Block::Variable& v : block->variables) {
        if (v.tag == tag) return v.at;
        total += v.size;
    }
    size_t dynamic = worker->grid->launch.shared;
    if (total > STATIC_LIMIT || total + dynamic > SHARED_LIMIT)
        stop({}, "shared memory: variables of %zu bytes (at most %zu) and %zu dynamic, at most %zu", total, STATIC_LIMIT,
             dynamic, SHARED_LIMIT);
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
    stop(here, "%zu bytes at the shared address 0x%x are not within the block's shared memory", size, address);
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
    w->ready.assign((warps * blocks + 63) / 64, 0);
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
    while (w->arenas.size() <= i) {
        void* memory = mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) stop({}, "no memory for the shared memory of %zu blocks", i + 1);
        w->arenas.push_back((char*)memory);
    }
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
        warp->live = warp->ready = warp->fresh = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        warp->waiting = 0;
        warp->turn = w->order == REVERSE ? 0 : WARP - 1;
        w->ready[warp->slot / 64] |= 1ull << warp->slot % 64;
    }
#if CPU_CUDA_ADDRESS
    __asan_poison_memory_region(block->shared, ARENA);
#endif
    if (checking) check::block_begins(block);
    if (grid.launch.shared) open_shared(block->shared, grid.launch.shared);
}

// Runs `count` blocks, resident together, to their end.
static void run_blocks(Worker* w, unsigned long long first, size_t count) {
    static const unsigned leaves[] = {0, 4, 64};        // a random order runs whole warps ahead, or mixes them
    const Grid& grid = *w->grid;
    for (size_t slot = 0; slot < count; slot++) begin_block(w, slot, ordered_block(grid, first + slot));
    w->random = mix(options().seed, first);
    w->leave = leaves[next_random(w) / 8 % 3];
    w->turn = w->order == REVERSE ? 0 : (unsigned)w->warps.size() - 1;
    w->live = grid.threads * (unsigned)count;
    w->block = nullptr;
#if CPU_CUDA_ADDRESS
    switch_to(w, pick(w, true), &w->home, &w->home_fake_stack);
    __sanitizer_finish_switch_fiber(w->home_fake_stack, nullptr, nullptr);
    w->home_bottom = nullptr;
#else
    switch_to(w, pick(w, true), &w->home, nullptr);
#endif
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
