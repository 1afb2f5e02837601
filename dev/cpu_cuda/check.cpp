// check.cpp: races, uninitialised reads and bounds. Only in a check build.
//
// The compiler's -fsanitize=thread calls __tsan_read4(address) and its like before each access of the user's
// code. Its library is not linked; those functions are here, with CUDA's rules of what orders two accesses:
//
//     within a block    the same thread; a barrier, the threads that met; __syncwarp, its lanes
//     between blocks    launches, a grid's barrier; and an atomic or volatile write passes on what its thread
//                       had made visible by its last __threadfence, to an atomic or volatile read
//
// and what a thread learned so, barriers pass on. One worker thread runs everything, so a counter of ordering
// events is a clock for all: what a thread knows of another is a time, before which everything that one did
// comes before what this one does now.
//
// Shadow memory holds, for each byte of device, pinned, shared and static memory, whether it is valid and was
// written, and for each 4 bytes two writes and two reads that nothing orders: of three, one is forgotten, and
// another order of threads (order=random:1) may show what this one hid.

#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <unordered_map>

namespace cpu_cuda {
namespace {

using namespace check;
typedef uint64_t Time;

// STRONG: atomic or volatile; these do not race with one another. PENDING: a cp.async without its wait.
enum Kind { PLAIN, STRONG, PENDING };

struct Event {                          // an access that is being checked
    uintptr_t address;
    size_t size;
    bool reads, writes;
    Kind kind;
    uint32_t where;                     // in the program, or among `places`
};

struct Record {                         // of an earlier one
    uint64_t time : 48, thread : 10, mask : 4, kind : 2;        // mask: which of the 4 bytes
    uint32_t where, block;
};

struct Cell {
    Record writes[2], reads[2];
};

constexpr uintptr_t PAGE = 4096;
constexpr int ANEW = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;       // untouched, it takes no memory

struct Page {
    State state[PAGE];
    Cell cells[PAGE / 4];
};

// By the address's page; null: no shadow.
Page** const pages = (Page**)mmap(nullptr, sizeof(Page*) << 35, PROT_READ | PROT_WRITE, ANEW, -1, 0);

Page* page_of(uintptr_t address) { return pages[address / PAGE]; }

bool is_shared(uintptr_t address) { return address - (uintptr_t)current->block->shared < SHARED_ARENA; }

// ------------------------------------------------------------------------------------------------
// Who knows what

// By block, then thread: what it did before that time is known.
typedef std::map<uint64_t, std::shared_ptr<const std::vector<Time>>> Times;

struct Clock {
    Times known;                        // comes before what is done now
    Times visible;                      // and other blocks may see it: a __threadfence came in between
};

struct ThreadState {
    std::shared_ptr<const Clock> clock; // those who met have the same
    bool fenced;                        // has touched nothing since its last fence
};
typedef std::vector<ThreadState> ThreadStates;          // of a block

Time now = 1;
Time ordered_until;                     // launches and grid barriers order all that came before
std::unordered_map<uintptr_t, Times> released;          // by the atomic variable's address

ThreadState& state_of(const Thread* t) { return (*(ThreadStates*)t->block->checks.get())[t->number]; }

void join(Times& into, const Times& from) {
    for (auto& [block, theirs] : from) {
        auto& ours = into[block];
        if (!ours) ours = theirs;
        if (ours == theirs) continue;
        auto most = std::make_shared<std::vector<Time>>(*theirs);
        for (size_t i = 0; i < most->size(); i++) (*most)[i] = std::max((*most)[i], (*ours)[i]);
        ours = most;
    }
}

// What these threads of a block did until now.
void add(Times& times, const std::vector<Thread*>& threads) {
    const Block* b = threads[0]->block;
    auto& known = times[b->number];
    std::vector<Time> more = known ? *known : std::vector<Time>(b->threads);
    for (const Thread* t : threads) more[t->number] = now;
    known = std::make_shared<std::vector<Time>>(std::move(more));
}

// Does `r` come before what the current thread does now?
bool is_before(const Record& r) {
    if (r.thread == current->number && r.block == current->block->number) return true;
    const Times& known = state_of(current).clock->known;
    auto found = known.find(r.block);
    return found != known.end() && r.time < (*found->second)[r.thread];
}

// These threads of a block have met: each knows what any of them knew, and did. Exited ones count as arrived
// when all that live are here.
void meet(std::vector<Thread*> threads) {
    const Block* b = threads[0]->block;
    if (threads.size() == b->live) {
        threads.resize(b->threads);
        for (size_t i = 0; i < b->threads; i++) threads[i] = b->warps->lane0 + i;
    }
    auto together = std::make_shared<Clock>();
    const Clock* joined = nullptr;
    bool fenced = true;
    for (const Thread* t : threads) {
        const ThreadState& state = state_of(t);
        if (state.clock.get() != joined) {
            join(together->known, state.clock->known);
            join(together->visible, state.clock->visible);
        }
        joined = state.clock.get();
        fenced &= state.fenced;
    }
    now++;
    add(together->known, threads);
    if (fenced) add(together->visible, threads);
    for (const Thread* t : threads) state_of(t).clock = together;
}

// What the thread has made visible passes to the atomic variable (a store forgets what others released there,
// a read-modify-write does not), and what was released there to the thread.
void pass_on(const Event& e) {
    ThreadState& t = state_of(current);
    if (released.empty() && t.clock->visible.empty()) return;
    Times& there = released[e.address];
    if (e.writes && !e.reads) there.clear();
    if (e.writes) join(there, t.clock->visible);
    if (!e.reads || there.empty()) return;
    auto clock = std::make_shared<Clock>(*t.clock);
    join(clock->known, there);
    t.clock = clock;
}

// ------------------------------------------------------------------------------------------------
// Reports

extern "C" char __executable_start, _end;
constexpr uint32_t PLACE = 1u << 31;    // with it an index into `places`, else a return address's offset
std::vector<Place> places;

uint32_t where_of(const void* return_address) {
    return (uint32_t)((uintptr_t)return_address - (uintptr_t)&__executable_start);
}

uint32_t where_of(Place place) {
    static std::map<std::pair<const char*, int>, uint32_t> known;
    auto [at, is_new] = known.insert({{place.file, place.line}, PLACE | (uint32_t)places.size()});
    if (is_new) places.push_back(place);
    return at->second;
}

Place place_of(uint32_t where) {
    if (where & PLACE) return places[where & ~PLACE];
    void* call = &__executable_start + where - 1;
    return user_line(&call, 1);
}

const char* verb_of(const Event& e) { return !e.writes ? "reads" : e.reads ? "updates" : "writes"; }

std::string other_side(const Record& r, const char* did) {
    const Launch& launch = *current_launch();
    return std::string("\n    ") + did + " by block " + text_of(index_of(r.block, launch.grid)) +
           ", thread " + text_of(index_of(r.thread, launch.block)) + " at " + text_of(place_of(r.where));
}

[[noreturn]] void report(const Event& e, const std::string& what, uintptr_t byte,
                         const std::string& other = "") {
    const void* p = (const void*)byte;
    std::string at = is_shared(byte) ? "byte " + std::to_string(byte - (uintptr_t)current->block->shared)
                     : may_be_device_pointer(p) ? describe(p)
                                                : "a variable at global scope";
    stop(place_of(e.where), "%s in %s memory: this thread %s %zu bytes, %s%s", what.c_str(),
         is_shared(byte) ? "shared" : "global", verb_of(e), e.size, at.c_str(), other.c_str());
}

[[noreturn]] void report_race(const Event& e, const Record& r, bool wrote, uintptr_t word) {
    std::string what = !e.writes ? "read-after-write" : wrote ? "write-after-write" : "write-after-read";
    const char* among = r.block != current->block->number           ? "blocks"
                        : r.thread / WARP != current->number / WARP ? "warps of a block"
                                                                    : "lanes of a warp";
    report(e, what + " race between " + among, word, other_side(r, wrote ? "written" : "read"));
}

// A read of what nobody wrote yet. If that is only because the writer comes later, unordered, then its write
// is about to be reported as a race, which says more; so this waits for the block's next barrier or end.
struct {
    Thread* thread;                     // null: there is none
    Event event;
    uintptr_t byte;
} unwritten;

void report_unwritten(const Block* b) {
    if (!unwritten.thread || unwritten.thread->block != b) return;
    current = unwritten.thread;
    report(unwritten.event, "uninitialised read", unwritten.byte);
}

// ------------------------------------------------------------------------------------------------
// One access

// An address without shadow: the thread's own, or nobody's that a kernel may touch. Device memory that is not
// mapped, and a null pointer, are left to the fault.
void check_unwatched(const Event& e) {
    const Launch* launch = current_launch();
    const void* p = (const void*)e.address;
    if (e.address - (uintptr_t)launch->arguments < launch->arguments_size) return;
    if (e.address - (uintptr_t)current->warp < sizeof(Warp)) return;
    if (on_fiber_stack(p) || may_be_device_pointer(p) || e.address < PAGE) return;
    stop(place_of(e.where), "kernel %s host memory", verb_of(e));
}

// What is after the new access, is after all that was before it; so it takes the place of such records.
void check_cell(Cell& cell, const Event& e, uintptr_t word, unsigned mask, bool shared) {
    uint32_t block = (uint32_t)current->block->number;
    for (int i = 0; i < 4; i++) {
        bool wrote = i < 2;
        Record& r = wrote ? cell.writes[i] : cell.reads[i - 2];
        if (r.time < ordered_until || (shared && r.block != block)) r.mask = 0;
        if (!(r.mask & mask)) continue;
        if (r.kind == PENDING) report(e, "cp.async not waited for", word, other_side(r, "issued"));
        bool conflict = (wrote || e.writes) && !(r.kind == STRONG && e.kind == STRONG), before = is_before(r);
        if (conflict && !before) report_race(e, r, wrote, word);
        if (before && (e.writes || !wrote)) r.mask &= ~mask;
    }
    Record* two = e.writes ? cell.writes : cell.reads;
    two[two[0].mask != 0] = {now, current->number, mask, (unsigned)e.kind, e.where, block};
}

void check_access(const Event& e) {
    if (e.address - (uintptr_t)&current + PAGE < 2 * PAGE) return;      // thread-local, as threadIdx is
    if (e.address >> 47) return;                                        // faults by itself
    uintptr_t end = e.address + e.size;
    bool shared = is_shared(e.address);
    for (uintptr_t p = e.address, next; p < end; p = next) {
        Page* page = page_of(p);
        if (!page) return check_unwatched(e);
        unsigned mask = 0;
        for (next = p; next < end && next / 4 == p / 4; next++) {
            State& state = page->state[next % PAGE];
            if (state == OUTSIDE) report(e, "out of bounds", next);
            if (e.reads && state == UNWRITTEN && !unwritten.thread) unwritten = {current, e, next};
            if (e.writes) state = WRITTEN;
            mask |= 1u << next % 4;
        }
        check_cell(page->cells[p % PAGE / 4], e, p, mask, shared);
    }
    state_of(current).fenced = false;
    if (e.kind == STRONG) pass_on(e);
    static const bool profiled = options().profile;
    if (profiled && e.kind == PLAIN)
        profile::access((const void*)e.address, e.size, e.writes, shared, e.where);
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// Hooks

namespace check {

void launch_begins(const Launch& launch) {
    const char* image = &__executable_start;            // with its __device__ variables
    if (!page_of((uintptr_t)image)) watch(image, (size_t)(&_end - image), WRITTEN);
    grid_barrier();
    if (options().profile) profile::launch_begins(launch);
}

void block_begins(Block* b) {
    if (!page_of((uintptr_t)b->shared)) watch(b->shared, SHARED_ARENA, OUTSIDE);
    b->checks = std::make_shared<ThreadStates>(b->threads, ThreadState{std::make_shared<Clock>(), true});
}

void block_ends(Block* b) {
    report_unwritten(b);
    for (unsigned i = 0; i * WARP < b->threads; i++) profile::warp_meets(b->warps + i);
    mark(b->shared, b->shared_used, OUTSIDE);
}

void barrier(Thread* const* threads, size_t count) {
    report_unwritten(threads[0]->block);
    meet({threads, threads + count});
    for (size_t i = 0; i < count; i++) profile::warp_meets(threads[i]->warp);
    profile::count(profile::BARRIERS, 1);
}

void warp_barrier(Warp* w, unsigned lanes) {
    std::vector<Thread*> threads;
    each_lane(lanes, [&](int lane) { threads.push_back(w->lane0 + lane); });
    meet(threads);
    profile::warp_meets(w);
}

void grid_barrier() {
    ordered_until = ++now;
    released.clear();
}

// Visible from now on: what this thread did, and what came before that.
void fence() {
    ThreadState& t = state_of(current);
    auto clock = std::make_shared<Clock>(*t.clock);
    clock->visible = clock->known;
    now++;
    add(clock->visible, {current});
    t = {clock, true};
}

void watch(const void* p, size_t size, State state) {
    uintptr_t first = (uintptr_t)p / PAGE, count = ((uintptr_t)p + size - 1) / PAGE - first + 1;
    void* memory = mmap(nullptr, count * sizeof(Page), PROT_READ | PROT_WRITE, ANEW, -1, 0);
    if (memory == MAP_FAILED) stop({}, "no memory to watch %zu bytes", size);
    for (uintptr_t i = 0; i < count; i++) pages[first + i] = (Page*)memory + i;
    mark(p, size, state);
}

void freed(const void* p, size_t size) {
    uintptr_t first = (uintptr_t)p / PAGE, count = ((uintptr_t)p + size - 1) / PAGE - first + 1;
    munmap(pages[first], count * sizeof(Page));
    std::fill_n(pages + first, count, nullptr);
}

void mark(const void* begin, size_t size, State state) {
    uintptr_t p = (uintptr_t)begin, end = p + size;
    for (uintptr_t next; p < end; p = next) {
        next = std::min(end, (p / PAGE + 1) * PAGE);
        if (Page* page = page_of(p)) memset(page->state + p % PAGE, state, next - p);
    }
}

void host_reads(const void* p, size_t size, const char* what) {
    for (uintptr_t byte = (uintptr_t)p; byte < (uintptr_t)p + size; byte++)
        if (page_of(byte) && page_of(byte)->state[byte % PAGE] != WRITTEN)
            stop(calling_line(), "uninitialised read by %s of %zu bytes: nobody wrote %s", what, size,
                 describe((const void*)byte).c_str());
}

void copied(const void* to, const void* from, size_t size) {
    std::vector<State> states;
    for (uintptr_t p = (uintptr_t)from; p < (uintptr_t)from + size; p++)
        states.push_back(page_of(p)->state[p % PAGE]);
    for (uintptr_t i = 0, p = (uintptr_t)to; i < size; i++, p++) page_of(p)->state[p % PAGE] = states[i];
}

void access(const void* p, size_t size, Access kind, Place here) {
    bool atomic = kind == ATOMIC;
    check_access({(uintptr_t)p, size, kind != WRITE, kind != READ, atomic ? STRONG : PLAIN, where_of(here)});
    profile::count(profile::ATOMICS, atomic);
}

void copy_begins(const void* to, size_t size, Place here) {
    check_access({(uintptr_t)to, size, false, true, PENDING, where_of(here)});
    if (options().profile) profile::access(to, size, true, true, where_of(here));
    profile::count(profile::COPIED, size);
}

// The records of the copy under way become those of a write.
void copy_ends(const void* to, size_t size, Place here) {
    for (uintptr_t word = (uintptr_t)to; word < (uintptr_t)to + size; word += 4)
        for (Record& r : page_of(word)->cells[word % PAGE / 4].writes)
            if (r.kind == PENDING) r = {now, r.thread, r.mask, PLAIN, where_of(here), r.block};
    state_of(current).fenced = false;
}

}  // namespace check
}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// What instrumented code calls

using namespace cpu_cuda;

#define CALLER __builtin_return_address(0)

static void saw(const volatile void* p, size_t size, bool writes, const void* caller, Kind kind = PLAIN) {
    if (current) check_access({(uintptr_t)p, size, !writes, writes, kind, where_of(caller)});
}

// Of an access that the compiler takes to be aligned (clang: of 16 bytes, to 8 at least).
static void saw_aligned(const void* p, size_t size, bool writes, const void* caller) {
    if (current && (uintptr_t)p % std::min(size, (size_t)8))
        stop(place_of(where_of(caller)), "misaligned address: %zu bytes at %p", size, p);
    saw(p, size, writes, caller);
}

#define ACCESSES(size)                                                                           \
    void __tsan_read##size(void* p) { saw_aligned(p, size, false, CALLER); }                     \
    void __tsan_write##size(void* p) { saw_aligned(p, size, true, CALLER); }                     \
    void __tsan_unaligned_read##size(void* p) { saw(p, size, false, CALLER); }                   \
    void __tsan_unaligned_write##size(void* p) { saw(p, size, true, CALLER); }                   \
    void __tsan_volatile_read##size(void* p) { saw(p, size, false, CALLER, STRONG); }            \
    void __tsan_volatile_write##size(void* p) { saw(p, size, true, CALLER, STRONG); }

// Atomic operations reach the checks through atomic_access; here they are only done.
#define ATOMICS(bits, Type)                                                                                \
    Type __tsan_atomic##bits##_load(const volatile Type* p, int) { return *p; }                            \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile Type* p, Type* old, Type value, int, int) { \
        return __atomic_compare_exchange_n(p, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);      \
    }                                                                                                      \
    Type __tsan_atomic##bits##_compare_exchange_val(volatile Type* p, Type old, Type value, int, int) {    \
        __atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
        return old;                                                                                        \
    }

extern "C" {

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(8, uint8_t)                     // the guard of a static variable in host code
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

void __tsan_init() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t size) { saw(p, size, false, CALLER); }
void __tsan_write_range(void* p, size_t size) { saw(p, size, true, CALLER); }

void* __tsan_memcpy(void* to, const void* from, size_t size) {
    saw(from, size, false, CALLER);
    saw(to, size, true, CALLER);
    return memmove(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) __attribute__((alias("__tsan_memcpy")));

void* __tsan_memset(void* to, int value, size_t size) {
    saw(to, size, true, CALLER);
    return memset(to, value, size);
}

}  // extern "C"
