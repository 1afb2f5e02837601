// check.cpp: races, uninitialised reads and bounds. Only in a check build.
//
// The compiler's -fsanitize=thread calls __tsan_read4(address) and its like before each access of the user's
// code. Its library is not linked; those functions are here, with CUDA's rules of what orders two accesses:
//
//     within a block    the same thread; a barrier, the threads that met; __syncwarp, its lanes
//     between blocks    launches, and a grid's barrier; and an atomic or volatile write passes on what its
//                       thread had made visible by its last __threadfence, to an atomic or volatile read
//
// and what a thread learned so, barriers pass on. One worker thread runs everything, so a counter of ordering
// events is a clock for all: an access is known by its time and thread, and what a thread knows of another is
// a time, before which everything that one did comes before what this one does now. Mostly the times when a
// block and a warp last met say it; a Clock says it for the rest (a named barrier, part of a warp, a fence).
//
// Shadow memory holds, for every 4 bytes of device, pinned, shared and static memory, which of them are valid
// and initialised, and the last two writes and reads by different threads: of three readers that nothing
// orders, one is forgotten, and another order of threads (order=random:1) may show what this one hid.

#include "runtime.h"

#include <link.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

namespace cpu_cuda {
namespace {

typedef uint32_t Time;

// STRONG: atomic or volatile; these do not race with one another. PENDING: a cp.async without its wait.
enum Kind { PLAIN, STRONG, PENDING };

struct Record {
    Time time;                          // 0: none
    uint32_t where;                     // in the program, or among `places`
    uint32_t slot : 16, thread : 10, mask : 4, kind : 2;        // block, thread in it, which of the 4 bytes
};

struct Cell {
    Record writes[2], reads[2];
};

constexpr uintptr_t PAGE = 4096, WORDS = PAGE / 4;

struct Page {
    bool shared;
    uint8_t state[WORDS];               // a bit for each byte: valid (low half), initialised (high half)
    Cell cells[WORDS];
};

constexpr uint8_t VALID = 0x0F, INITIALISED = 0xF0;

// Pages by address: 47 bits are 11 of a table, 24 of a page's number, 12 within it. Null: no shadow.
Page** tables[1 << 11];
Page* const OPEN = (Page*)1;            // memory that kernels may touch and nobody shares: stacks, constants

Page*& page_entry(uintptr_t address) {
    Page**& table = tables[address >> 36 & 0x7FF];
    if (!table)
        table = (Page**)mmap(nullptr, sizeof(Page*) << 24, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return table[address >> 12 & 0xFFFFFF];
}

// Which of the 4 bytes at `word` are in [begin, end).
unsigned bytes_inside(uintptr_t word, uintptr_t begin, uintptr_t end) {
    unsigned mask = 0xF;
    if (word < begin) mask &= 0xFu << (begin - word);
    if (end - word < 4) mask &= 0xFu >> (4 - (end - word));
    return mask;
}

Page* page_of(uintptr_t address) {
    Page** table = tables[address >> 36 & 0x7FF];
    return table ? table[address >> 12 & 0xFFFFFF] : nullptr;
}

// ------------------------------------------------------------------------------------------------
// Who knows what

// Of a block, a warp or a thread: what it did before this time.
typedef std::map<uint32_t, Time> Times;
typedef std::shared_ptr<Times> Clock;   // shared until changed

uint32_t block_unit(uint32_t slot) { return slot << 16; }
uint32_t warp_unit(uint32_t slot, uint32_t thread) { return slot << 16 | (1 + thread / WARP); }
uint32_t thread_unit(uint32_t slot, uint32_t thread) { return slot << 16 | (1 + WARP + thread); }

Times& changeable(Clock& clock) {
    if (!clock) clock = std::make_shared<Times>();
    else if (clock.use_count() > 1) clock = std::make_shared<Times>(*clock);
    return *clock;
}

void add(Clock& clock, uint32_t unit, Time time) {
    Time& known = changeable(clock)[unit];
    known = std::max(known, time);
}

void join(Clock& into, const Clock& from) {
    if (!from || into == from) return;
    if (!into) {
        into = from;
        return;
    }
    for (auto& [unit, time] : *from) add(into, unit, time);
}

bool covers(const Clock& clock, const Record& r) {
    if (!clock) return false;
    for (uint32_t unit : {block_unit(r.slot), warp_unit(r.slot, r.thread), thread_unit(r.slot, r.thread)}) {
        auto found = clock->find(unit);
        if (found != clock->end() && found->second > r.time) return true;
    }
    return false;
}

struct Knowledge {
    Clock known;                        // comes before what is done now
    Clock visible;                      // and other blocks may see it: a __threadfence came in between
};

void join(Knowledge& into, const Knowledge& from) {
    join(into.known, from.known);
    join(into.visible, from.visible);
}

struct ThreadState {
    Knowledge own;                      // beyond its warp's and block's
    bool fenced = true;                 // has touched nothing since its last fence
};

struct WarpState {
    Time met;                           // its live lanes, at a __syncwarp
    Knowledge passed;                   // what they learned from one another by then
    bool learned;                       // a lane knows more
};

struct BlockState {
    uint32_t slot;
    size_t history;
    Time begins, met;
    Knowledge passed;
    bool learned;
    std::vector<WarpState> warps;
    std::vector<ThreadState> threads;
};

struct History {                        // a block of this launch, for reports
    Time begins, atomic, fence;         // the last of each
    uint3 index;
};

Time now = 1;
Time ordered_until;                     // launches and grid barriers order all that came before
const Launch* launched;
std::vector<History> history;
std::unordered_map<uintptr_t, Clock> released;          // by the atomic variable's address
bool fenced;                            // this launch had a fence: else nothing is ever released

// The thread that makes an access, looked up when it changes.
const Thread* acting;
BlockState* block;
WarpState* warp;
ThreadState* thread;

void find_actor() {
    if (acting == current) return;
    acting = current;
    block = (BlockState*)current->block->checks;
    warp = &block->warps[current->number / WARP];
    thread = &block->threads[current->number];
}

// Does `r` come before what the acting thread does now? Records older than `floor` have no meaning any more.
bool is_before(const Record& r, Time floor) {
    if (r.time < floor) return true;
    if (r.slot == block->slot && r.time >= block->begins) {
        if (r.thread == acting->number || r.time < block->met) return true;
        if (r.thread / WARP == acting->number / WARP && r.time < warp->met) return true;
    }
    return covers(thread->own.known, r) || covers(warp->passed.known, r) || covers(block->passed.known, r);
}

void all_of_block_met(BlockState* b) {
    b->met = ++now;
    if (!b->learned) return;
    bool all_visible = true;
    for (WarpState& w : b->warps) {
        join(b->passed, w.passed);
        w.passed = {};
        w.learned = false;
    }
    for (ThreadState& t : b->threads) {
        join(b->passed, t.own);
        t.own = {};
        all_visible &= t.fenced;
    }
    if (all_visible) add(b->passed.visible, block_unit(b->slot), now);
    b->learned = false;
}

void some_of_block_met(BlockState* b, Thread* const* threads, size_t count) {
    Time time = ++now;
    Knowledge together;
    unsigned lanes[WARP] = {};
    for (size_t i = 0; i < count; i++) {
        lanes[threads[i]->number / WARP] |= 1u << threads[i]->number % WARP;
        join(together, b->threads[threads[i]->number].own);
    }
    for (size_t i = 0; i < b->warps.size(); i++) {
        if (!lanes[i]) continue;
        uint32_t first = (uint32_t)i * WARP;
        bool whole = lanes[i] == threads[0]->block->warps[i].live;
        join(together, b->warps[i].passed);
        add(together.known, warp_unit(b->slot, first), whole ? time : b->warps[i].met);
        for (unsigned left = whole ? 0 : lanes[i]; left; left &= left - 1)
            add(together.known, thread_unit(b->slot, first + (uint32_t)__builtin_ctz(left)), time);
        b->warps[i].learned = true;
    }
    for (size_t i = 0; i < count; i++) b->threads[threads[i]->number].own = together;
    b->learned = true;
}

// What the thread has made visible passes to `address` (a store forgets what others released there, a
// read-modify-write does not), and what was released there to the thread.
void pass_on(uintptr_t address, bool reads, bool writes) {
    history[block->history].atomic = now;
    if (!fenced) return;
    Clock visible = thread->own.visible;
    join(visible, warp->passed.visible);
    join(visible, block->passed.visible);
    if (writes && !reads) released[address] = visible;
    if (writes && reads) join(released[address], visible);
    auto found = released.find(address);
    if (!reads || found == released.end()) return;
    join(thread->own.known, found->second);
    warp->learned = block->learned = true;
}

// ------------------------------------------------------------------------------------------------
// Where in the program: a return address's offset, or with the top bit an index into `places`

extern "C" char __executable_start;
constexpr uint32_t PLACE = 1u << 31;
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
    Place found = user_line(&call, 1);
    return found.file ? found : Place{"unknown", 0};
}

// ------------------------------------------------------------------------------------------------
// Reports

struct Event {                          // an access that is being checked
    uintptr_t address;
    size_t size;
    bool reads, writes;
    Kind kind;
    uint32_t where;
};

const char* verb_of(const Event& e) {
    return e.reads && e.writes ? "updates" : e.writes ? "writes" : "reads";
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
    char result[512];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(result, sizeof result, text, arguments);
    va_end(arguments);
    return result;
}

// "offset 12 of a __shared__ variable of 64 bytes"
std::string describe_shared(const char* p) {
    const Block* b = current->block;
    const char* base = b->shared;
    size_t size = launched->shared;
    const char* kind = "dynamic shared memory";
    for (const Block::Variable& v : b->variables) {
        if (v.at > p || v.at < base) continue;
        base = v.at;
        size = v.size;
        kind = "a __shared__ variable";
    }
    size_t offset = (size_t)(p - base);
    if (offset < size) return format("offset %zu of %s of %zu bytes", offset, kind, size);
    return format("%zu bytes past the end of %s of %zu bytes", offset - size, kind, size);
}

bool is_shared(uintptr_t address) {
    Page* page = page_of(address);
    return page && page != OPEN && page->shared;
}

std::string describe_any(uintptr_t address) {
    const void* p = (const void*)address;
    if (is_shared(address)) return describe_shared((const char*)p);
    return may_be_device_pointer(p) || !page_of(address) ? describe(p) : "a variable at global scope";
}

const char* memory_of(uintptr_t address) { return is_shared(address) ? "shared" : "global"; }

const History& history_of(const Record& r) {
    size_t i = r.slot;                  // blocks 65536 apart have the same slot
    while (i + 65536 < history.size() && history[i + 65536].begins <= r.time) i += 65536;
    return history[i];
}

std::string other_side(const Record& r, const char* verb) {
    Place place = place_of(r.where);
    Size3 size = launched->block;
    uint3 block_index = history_of(r).index;
    return format("\n    block (%u,%u,%u), thread (%u,%u,%u) %s there at %s:%d", block_index.x, block_index.y,
                  block_index.z, r.thread % size.x, r.thread / size.x % size.y, r.thread / (size.x * size.y),
                  verb, place.file, place.line);
}

// What the two sides lack.
std::string advice(const Record& r) {
    const History& theirs = history_of(r);
    if (&theirs == &history[block->history])
        return r.thread / WARP == acting->number / WARP ? "no __syncwarp or __syncthreads orders the two"
                                                        : "no barrier orders the two";
    if (theirs.atomic < r.time || history[block->history].atomic < theirs.atomic)
        return "nothing orders blocks here";
    if (theirs.fence < r.time)
        return "an atomic follows, but without a __threadfence before it nothing is passed on";
    return "a __threadfence and an atomic follow, but no barrier orders this access before that fence";
}

[[noreturn]] void report_race(const Event& e, const Record& r, bool other_writes) {
    bool same_block = &history_of(r) == &history[block->history];
    bool same_warp = same_block && r.thread / WARP == acting->number / WARP;
    const char* among = same_warp ? "lanes of a warp" : same_block ? "warps of a block" : "blocks";
    const char* order = !e.writes      ? "read after write"
                        : other_writes ? "write after write"
                                       : "write after read";
    std::string other =
        other_side(r, other_writes ? r.kind == STRONG ? "atomic or volatile, wrote" : "wrote" : "read");
    stop(place_of(e.where), "race between %s in %s memory, %s: this thread %s %zu bytes at %s%s\n    %s",
         among, memory_of(e.address), order, verb_of(e), e.size, describe_any(e.address).c_str(),
         other.c_str(), advice(r).c_str());
}

[[noreturn]] void report_pending(const Event& e, const Record& r) {
    std::string other = other_side(r, "issued it");
    stop(place_of(e.where), "cp.async not waited for: this thread %s %zu bytes at %s, under way to it%s",
         verb_of(e), e.size, describe_any(e.address).c_str(), other.c_str());
}

// A read of what nobody wrote yet. If that is only because the writer comes later, unordered, then its write
// is about to be reported as a race, which says more; so this waits for the block's next barrier or end.
struct {
    Thread* thread;                     // null: there is none
    Event event;
    uintptr_t byte;
} unwritten;

void report_unwritten() {
    if (!unwritten.thread) return;
    const Event& e = unwritten.event;
    current = unwritten.thread;
    stop(place_of(e.where), "uninitialised read of %zu bytes of %s memory: nobody wrote %s", e.size,
         memory_of(e.address), describe_any(unwritten.byte).c_str());
}

[[noreturn]] void report_bounds(const Event& e, uintptr_t byte) {
    report_unwritten();
    stop(place_of(e.where), "out of bounds: kernel %s %zu bytes of %s memory, %s", verb_of(e), e.size,
         memory_of(byte), describe_any(byte).c_str());
}

// ------------------------------------------------------------------------------------------------
// One access

uintptr_t thread_local_begin, thread_local_size;        // of the thread that launches

bool is_private(uintptr_t address) {
    uintptr_t arguments = (uintptr_t)launched->arguments, operation = (uintptr_t)current->warp;
    return address - arguments < launched->arguments_size || address - operation < sizeof(Warp);
}

// An address without shadow: the thread's own, or nobody's that a kernel may touch.
void check_unknown(const Event& e) {
    if (is_private(e.address)) return;
    if (on_fiber_stack((const void*)e.address)) {
        page_entry(e.address) = OPEN;
        return;
    }
    const void* p = (const void*)e.address;
    if (e.address < PAGE) return;       // a null pointer: a fault says as much
    report_unwritten();
    if (!may_be_device_pointer(p))
        stop(place_of(e.where), "kernel %s host memory: %zu bytes at %p", verb_of(e), e.size, p);
    std::string at = describe(p);
    const char* what = at.find("freed") != std::string::npos ? "use after free" : "out of bounds";
    stop(place_of(e.where), "%s: kernel %s %s", what, verb_of(e), at.c_str());
}

// `fresh` takes the place of what it makes needless: an access that comes before it, and so before all that
// it comes before.
void remember(Record* two, const Record& fresh, Time floor) {
    for (int i = 0; i < 2; i++) {
        if (two[i].time < floor) two[i].mask = 0;
        if (two[i].mask & fresh.mask && is_before(two[i], floor)) two[i].mask &= ~fresh.mask;
    }
    int i = !two[0].mask                               ? 0
            : !two[1].mask || two[1].mask & fresh.mask ? 1
            : two[0].mask & fresh.mask                 ? 0
                                                       : 1;
    two[i] = fresh;
}

void check_cell(Cell& cell, const Event& e, unsigned mask, Time floor) {
    for (const Record& r : cell.writes) {
        if (!(r.mask & mask) || r.time < floor) continue;
        if (r.kind == PENDING) report_pending(e, r);
        if (!(r.kind == STRONG && e.kind == STRONG) && !is_before(r, floor)) report_race(e, r, true);
    }
    for (const Record& r : cell.reads)
        if (e.writes && r.mask & mask && !(r.kind == STRONG && e.kind == STRONG) && !is_before(r, floor))
            report_race(e, r, false);
    Record fresh = {
        now, e.where, block->slot & 0xFFFF, acting->number & 0x3FFu, mask & 0xF, (unsigned)e.kind & 3};
    remember(e.writes ? cell.writes : cell.reads, fresh, floor);
    for (Record& r : cell.reads)
        if (e.writes && r.mask & mask && is_before(r, floor)) r.mask &= ~mask;
}

void check_access(const Event& e) {
    if (e.address - thread_local_begin < thread_local_size) return;     // threadIdx and its like
    find_actor();
    uintptr_t end = e.address + e.size;
    for (uintptr_t word = e.address & ~(uintptr_t)3; word < end; word += 4) {
        Page* page = page_of(word);
        if (!page) check_unknown(e);
        if (!page || page == OPEN) return;
        uintptr_t i = word % PAGE / 4;
        unsigned mask = bytes_inside(word, e.address, end), state = page->state[i];
        if (mask & ~state) report_bounds(e, word + (unsigned)__builtin_ctz(mask & ~state));
        unsigned fresh = mask & ~(state >> 4);
        if (e.reads && fresh && !unwritten.thread)
            unwritten = {current, e, word + (unsigned)__builtin_ctz(fresh)};
        if (e.writes) page->state[i] |= (uint8_t)(mask << 4);
        check_cell(page->cells[i], e, mask, page->shared ? block->begins : ordered_until);
    }
    thread->fenced = false;
    static const bool profiled = options().profile;
    if (profiled && e.kind == PLAIN)
        profile::access((const void*)e.address, e.size, e.writes, is_shared(e.address), e.where);
}

// ------------------------------------------------------------------------------------------------
// Shadow memory

// Makes shadow for [p, p + size), where there is none. Untouched, it takes no memory.
void make_shadow(uintptr_t p, size_t size, bool shared) {
    uintptr_t first = p & ~(PAGE - 1), pages = (p + size - first + PAGE - 1) / PAGE;
    void* memory = mmap(nullptr, pages * sizeof(Page), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) stop({}, "no memory to watch %zu bytes", size);
    for (uintptr_t i = 0; i < pages; i++) {
        Page*& entry = page_entry(first + i * PAGE);
        entry = (Page*)memory + i;
        if (shared) entry->shared = true;
    }
}

void drop_shadow(uintptr_t p, size_t size) {
    uintptr_t first = p & ~(PAGE - 1), pages = (p + size - first + PAGE - 1) / PAGE;
    munmap(page_of(first), pages * sizeof(Page));
    for (uintptr_t i = 0; i < pages; i++) page_entry(first + i * PAGE) = nullptr;
}

// Calls change(state, bits) for each word of [p, p + size), bits for those of its bytes that are inside, in
// both halves.
template <class Change>
void each_state(uintptr_t p, size_t size, Change change) {
    uintptr_t end = p + size;
    for (uintptr_t word = p & ~(uintptr_t)3; word < end; word += 4) {
        Page* page = page_of(word);
        if (!page || page == OPEN) continue;
        unsigned mask = bytes_inside(word, p, end);
        change(page->state[word % PAGE / 4], (uint8_t)(mask | mask << 4));
    }
}

// The program's own memory: constants may be read by all; __device__ and __constant__ variables are watched.
void watch_segment(uintptr_t begin, size_t size, bool writable) {
    uintptr_t first = begin & ~(PAGE - 1);
    for (uintptr_t p = first; !writable && p < begin + size; p += PAGE) page_entry(p) = OPEN;
    if (!writable) return;
    make_shadow(begin, size, false);
    each_state(first, begin + size - first, [](uint8_t& state, uint8_t) { state = VALID | INITIALISED; });
}

// The program is the first of the images; libraries are not instrumented.
int watch_program(dl_phdr_info* info, size_t, void*) {
    static bool watched = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr)& part = info->dlpi_phdr[i];
        if (part.p_type == PT_LOAD && !watched)
            watch_segment(info->dlpi_addr + part.p_vaddr, part.p_memsz, part.p_flags & PF_W);
        if (part.p_type != PT_TLS) continue;
        thread_local_begin = (uintptr_t)info->dlpi_tls_data;
        thread_local_size = part.p_memsz;
    }
    watched = true;
    return 1;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// Hooks

namespace check {

void launch_begins(const Launch& launch) {
    dl_iterate_phdr(watch_program, nullptr);
    if (now > ~(Time)0 / 4 * 3)
        stop(launch.place, "too long a run: the clock of the checks is about to overflow");
    launched = &launch;
    ordered_until = ++now;
    history.clear();
    released.clear();
    fenced = false;
    if (options().profile) profile::launch_begins(launch);
}

void launch_ends() {
    if (options().profile) profile::launch_ends();
    acting = nullptr;
}

void block_begins(Block* b) {
    uintptr_t shared = (uintptr_t)b->shared;
    if (!page_of(shared)) make_shadow(shared, b->shared_size, true);
    BlockState* state = new BlockState();
    state->slot = history.size() & 0xFFFF;
    state->history = history.size();
    state->begins = state->met = ++now;
    state->warps.resize((b->threads + WARP - 1) / WARP);
    state->threads.resize(b->threads);
    history.push_back({now, 0, 0, b->index});
    b->checks = state;
    acting = nullptr;
}

void block_ends(Block* b) {
    report_unwritten();
    if (options().profile) profile::block_ends(b);
    delete (BlockState*)b->checks;
    b->checks = nullptr;
    each_state((uintptr_t)b->shared, b->shared_used, [](uint8_t& state, uint8_t) { state = 0; });
    acting = nullptr;
}

void barrier(Thread* const* threads, size_t count) {
    Block* b = threads[0]->block;
    if (unwritten.thread && unwritten.thread->block == b) report_unwritten();
    if (count == b->live) all_of_block_met((BlockState*)b->checks);
    else some_of_block_met((BlockState*)b->checks, threads, count);
    if (options().profile) profile::barrier(threads, count);
}

void warp_barrier(Warp* w, unsigned lanes) {
    BlockState* b = (BlockState*)w->lane0->block->checks;
    WarpState& state = b->warps[w->number];
    if (options().profile) profile::warp_meets(w);
    if (lanes != w->live) {
        Thread* threads[WARP];
        size_t count = 0;
        for (; lanes; lanes &= lanes - 1) threads[count++] = w->lane0 + __builtin_ctz(lanes);
        some_of_block_met(b, threads, count);
        return;
    }
    state.met = ++now;
    if (!state.learned) return;
    for (size_t i = w->number * WARP; i < b->threads.size() && i < (w->number + 1) * WARP; i++) {
        join(state.passed, b->threads[i].own);
        b->threads[i].own = {};
    }
    state.learned = false;
}

void grid_barrier() {
    ordered_until = ++now;
    released.clear();
}

// Visible from now on: what this thread did, and what came before that.
void fence() {
    find_actor();
    Clock visible = thread->own.known;
    join(visible, warp->passed.known);
    join(visible, block->passed.known);
    add(visible, block_unit(block->slot), block->met);
    add(visible, warp_unit(block->slot, acting->number), warp->met);
    add(visible, thread_unit(block->slot, acting->number), ++now);
    thread->own.visible = visible;
    thread->fenced = warp->learned = block->learned = fenced = true;
    history[block->history].fence = now;
}

void allocated(const void* p, size_t size, MemoryKind kind) {
    make_shadow((uintptr_t)p, size, false);
    uint8_t half = kind == DEVICE ? VALID : VALID | INITIALISED; // the host may have written pinned memory
    each_state((uintptr_t)p, size, [half](uint8_t& state, uint8_t bits) { state |= bits & half; });
}

void freed(const void* p, size_t size) { drop_shadow((uintptr_t)p, size); }

void shared_begins(const void* p, size_t size) {
    each_state((uintptr_t)p, size,
               [](uint8_t& state, uint8_t bits) { state = (state & ~bits) | (bits & VALID); });
}

void initialised(const void* p, size_t size) {
    each_state((uintptr_t)p, size, [](uint8_t& state, uint8_t bits) { state |= bits & INITIALISED; });
}

void host_reads(const void* p, size_t size, const char* what) {
    uintptr_t at = (uintptr_t)p & ~(uintptr_t)3;
    each_state((uintptr_t)p, size, [&](uint8_t& state, uint8_t bits) {
        unsigned wrong = bits & INITIALISED & ~state;
        if (wrong)
            stop(calling_line(), "uninitialised read by %s of %zu bytes: nobody wrote %s", what, size,
                 describe_any(at + (unsigned)__builtin_ctz(wrong >> 4)).c_str());
        at += 4;
    });
}

void copied(const void* to, const void* from, size_t size) {
    std::vector<uint8_t> known(size);
    for (size_t i = 0; i < size; i++) {
        uintptr_t address = (uintptr_t)from + i;
        known[i] = page_of(address)->state[address % PAGE / 4] >> (4 + address % 4) & 1;
    }
    for (size_t i = 0; i < size; i++) {
        uintptr_t address = (uintptr_t)to + i;
        uint8_t &state = page_of(address)->state[address % PAGE / 4], bit = (uint8_t)(0x10 << address % 4);
        state = known[i] ? state | bit : state & ~bit;
    }
}

void access(const void* p, size_t size, Access kind, Place here) {
    bool atomic = kind == ATOMIC;
    check_access({(uintptr_t)p, size, kind != WRITE, kind != READ, atomic ? STRONG : PLAIN, where_of(here)});
    if (!atomic) return;
    pass_on((uintptr_t)p, true, true);
    if (options().profile) profile::count_atomic();
}

void copy_begins(const void* to, size_t size, Place here) {
    check_access({(uintptr_t)to, size, false, true, PENDING, where_of(here)});
    if (options().profile) profile::copy(to, size, where_of(here));
}

// The records of the copy under way become those of a write.
void copy_ends(const void* to, size_t size, Place here) {
    find_actor();
    for (uintptr_t word = (uintptr_t)to; word < (uintptr_t)to + size; word += 4)
        for (Record& r : page_of(word)->cells[word % PAGE / 4].writes)
            if (r.kind == PENDING) r = {now, where_of(here), r.slot, r.thread, r.mask, PLAIN};
    thread->fenced = false;
}

void count_matrix_instruction() {
    if (options().profile) profile::count_matrix_instruction();
}

}  // namespace check
}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// What instrumented code calls

using namespace cpu_cuda;

static inline __attribute__((always_inline)) void saw(const volatile void* p, size_t size, bool writes,
                                                      const void* caller) {
    if (current) check_access({(uintptr_t)p, size, !writes, writes, PLAIN, where_of(caller)});
}

// Of an access that the compiler knows to be aligned (clang: of 16 bytes, to 8 at least).
static inline __attribute__((always_inline)) void saw_aligned(void* p, size_t size, bool writes,
                                                              const void* caller) {
#ifdef __clang__
    size_t alignment = size < 8 ? size : 8;
#else
    size_t alignment = size;
#endif
    if (current && (uintptr_t)p % alignment)
        stop(place_of(where_of(caller)), "misaligned address: kernel %s %zu bytes at %p",
             writes ? "writes" : "reads", size, p);
    saw(p, size, writes, caller);
}

static void saw_volatile(const volatile void* p, size_t size, bool writes, const void* caller) {
    if (!current) return;
    check_access({(uintptr_t)p, size, !writes, writes, STRONG, where_of(caller)});
    if (page_of((uintptr_t)p) > OPEN) pass_on((uintptr_t)p, !writes, writes);
}

#define CALLER __builtin_return_address(0)
#define ACCESSES(size)                                                                                  \
    void __tsan_read##size(void* p) { saw_aligned(p, size, false, CALLER); }                            \
    void __tsan_write##size(void* p) { saw_aligned(p, size, true, CALLER); }                            \
    void __tsan_unaligned_read##size(void* p) { saw(p, size, false, CALLER); }                          \
    void __tsan_unaligned_write##size(void* p) { saw(p, size, true, CALLER); }                          \
    void __tsan_volatile_read##size(void* p) { saw_volatile(p, size, false, CALLER); }                  \
    void __tsan_volatile_write##size(void* p) { saw_volatile(p, size, true, CALLER); }                  \
    void __tsan_unaligned_volatile_read##size(void* p) { saw_volatile(p, size, false, CALLER); }        \
    void __tsan_unaligned_volatile_write##size(void* p) { saw_volatile(p, size, true, CALLER); }

// Atomic operations reach the checks through atomic_access; here they are only done.
#define ATOMICS(bits, Type)                                                                                  \
    Type __tsan_atomic##bits##_load(const volatile Type* p, int) {                                           \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                         \
    }                                                                                                        \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile Type* p, Type* old, Type value, int, int) {   \
        return __atomic_compare_exchange_n(p, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
    }                                                                                                        \
    Type __tsan_atomic##bits##_compare_exchange_val(volatile Type* p, Type old, Type value, int, int) {      \
        __atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
        return old;                                                                                          \
    }

extern "C" {

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(8, uint8_t)                     // the guard of a static variable in host code
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
void __tsan_read_range(void* p, size_t size) { saw(p, size, false, CALLER); }
void __tsan_write_range(void* p, size_t size) { saw(p, size, true, CALLER); }

void* __tsan_memcpy(void* to, const void* from, size_t size) {
    saw(from, size, false, CALLER);
    saw(to, size, true, CALLER);
    return memcpy(to, from, size);
}

void* __tsan_memmove(void* to, const void* from, size_t size) {
    saw(from, size, false, CALLER);
    saw(to, size, true, CALLER);
    return memmove(to, from, size);
}

void* __tsan_memset(void* to, int value, size_t size) {
    saw(to, size, true, CALLER);
    return memset(to, value, size);
}

}  // extern "C"
