// memory.cpp: device and pinned memory, copies, faults.
//
// One large range of addresses is reserved and none of them is given out twice, so a freed one always faults:
//
//     | slack | base .. base + size | slack < 256 | gap, at least 2 MB, never open | next allocation
//     ^ page                                      ^ huge page
//
// Pages of device memory are closed until device code touches them (DeviceCode in runtime.h); pinned ones are
// open. Every byte starts as 0xFF, a NaN, and slack still is after each launch. In a build with
// AddressSanitizer memory is malloc'ed instead, and that reports.
//
// Opening and closing costs by the page table entry. So an allocation of more than a huge page has only such
// pages, and what lies before its base in the first of them is not protected.

#include "runtime.h"

#include <dlfcn.h>
#include <elf.h>
#include <execinfo.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <string>

namespace cpu_cuda {

namespace {

typedef std::lock_guard<std::recursive_mutex> Lock;

constexpr size_t PAGE = 4096, HUGE_PAGE = 2 << 20, ALIGNMENT = 256, GAP = HUGE_PAGE;
constexpr size_t RESERVED = (size_t)1 << 45, SIGNAL_STACK = 256 << 10;
constexpr int FRESH = 0xFF;

struct Region : Allocation {
    char* pages;                        // what page protection covers
    size_t pages_size;
    bool live;
    std::atomic<bool> open;
    Region* next_open;

    const char* end() const { return base + size; }
    bool holds(const void* p) const { return (const char*)p >= base && (const char*)p < end(); }
};

struct Memory {
    std::map<const char*, Region*> regions;     // by base; freed ones stay, to be recognised
    char* next = nullptr;                       // where the next allocation's pages start
    char* end = nullptr;                        // of the reserved addresses
    size_t used = 0;                            // bytes of device memory
    std::atomic<Region*> open_regions{nullptr};
    std::atomic<int> device_code{0};            // DeviceCode objects of all threads
};

// Never destroyed: a fault may come after the last destructor.
Memory& memory() {
    static Memory& only = *new Memory;
    return only;
}

thread_local int device_code_here;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// The allocation, live or freed, that holds p or is nearest to it; null when none is near.
Region* nearest_region(const void* p) {
    auto& regions = memory().regions;
    auto after = regions.upper_bound((const char*)p);
    Region* above = after == regions.end() ? nullptr : after->second;
    Region* below = after == regions.begin() ? nullptr : std::prev(after)->second;
    if (below && below->holds(p)) return below;
    size_t over = below ? (size_t)((const char*)p - below->end()) : SIZE_MAX;
    size_t under = above ? (size_t)(above->base - (const char*)p) : SIZE_MAX;
    if (over > GAP && under > GAP) return nullptr;
    return over < under ? below : above;
}

Region* live_region(const void* p) {
    Region* region = nearest_region(p);
    return region && region->live && region->holds(p) ? region : nullptr;
}

// Does [p, p + size) stay inside?
bool fits(const Region* region, const void* p, size_t size) {
    return region && size <= (size_t)(region->end() - (const char*)p);
}

// Lets code touch the pages. Several workers may call it at once, each in its signal handler.
void open_region(Region* region) {
    if (address_sanitizer || region->kind == PINNED) return;
    mprotect(region->pages, region->pages_size, PROT_READ | PROT_WRITE);
    if (region->open.exchange(true)) return;
    region->next_open = memory().open_regions;
    while (!memory().open_regions.compare_exchange_weak(region->next_open, region)) {}
}

void close_regions() {
    for (Region* region = memory().open_regions.exchange(nullptr); region; region = region->next_open) {
        mprotect(region->pages, region->pages_size, PROT_NONE);
        region->open = false;
    }
}

// ------------------------------------------------------------------------------------------------
// Reports: where in the user's source, and what

bool is_runtime(const std::string& file) {
    static const std::string here = std::string(__FILE__).substr(0, std::string(__FILE__).rfind('/') + 1);
    if (file[0] == '?' || file.compare(0, 5, "/usr/") == 0) return true;
    if (file.compare(0, here.size(), here) != 0) return false;
    return file.compare(here.size(), 8, "include/") == 0 || file.find('/', here.size()) == std::string::npos;
}

}  // namespace

Place user_line(void* const* code, int count) {
    char file[1024];
    Dl_info self, info;
    dladdr((void*)&user_line, &self);
    bool moved = ((const Elf64_Ehdr*)self.dli_fbase)->e_type == ET_DYN;
    std::string command = "addr2line -i -e /proc/" + std::to_string(getpid()) + "/exe";
    for (int i = 0; i < count; i++) {
        if (!dladdr(code[i], &info) || info.dli_fbase != self.dli_fbase) continue;
        char text[32];
        snprintf(text, sizeof text, " %zx", (size_t)code[i] - (moved ? (size_t)self.dli_fbase : 0));
        command += text;
    }
    Place found = {nullptr, 0};
    FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
    while (pipe && !found.file && fgets(file, sizeof file, pipe)) {
        char* colon = strrchr(file, ':');
        int line = colon ? atoi(colon + 1) : 0;         // of code without line numbers: file:?
        if (!line || is_runtime(file)) continue;
        *colon = 0;
        found = {strdup(file), line};                   // never freed: the program ends with this report
    }
    if (pipe) pclose(pipe);
    return found;
}

std::string describe(const void* p) {
    const Region* region = nearest_region(p);
    char text[160];
    snprintf(text, sizeof text, "address %p, in no allocation", p);
    if (!region) return text;
    ptrdiff_t offset = (const char*)p - region->base, over = (const char*)p - region->end();
    ptrdiff_t distance = offset < 0 ? -offset : over < 0 ? offset : over;
    snprintf(text, sizeof text, "%td bytes %s a %s allocation of %zu bytes%s", distance,
             offset < 0 ? "before" : over < 0 ? "into" : "past the end of",
             region->kind == DEVICE ? "device" : "pinned", region->size,
             region->live ? "" : " that was freed");
    return text;
}

namespace {

// The user's line at the instruction `pc`, or null for the caller's; else of what called it.
Place line_from(const void* pc) {
    void* frames[64];
    int count = backtrace(frames, 64), first = 0;
    while (pc && first < count - 1 && frames[first] != pc) first++;
    for (int i = first; i < count; i++)
        if (frames[i] != pc) frames[i] = (char*)frames[i] - 1;          // a call ends before where it returns
    return user_line(frames + first, count - first);
}

// Opens what device code may touch; everything else ends the program.
void on_fault(int, siginfo_t* info, void* context) {
    const void* p = info->si_addr;
    const auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    Region* region = nearest_region(p);
    bool device = current || device_code_here, inside = region && region->holds(p);
    if (device && inside && region->live && region->kind == DEVICE) return open_region(region);
    Place place = line_from((void*)registers[REG_RIP]);
    if (on_guard_page(p)) stop(place, "stack overflow: the local variables need more than a thread's stack");
    const char* what = !region         ? "invalid address"
                       : !region->live ? "use after free"
                       : !inside       ? "out of bounds"
                                       : "host code touches device memory";
    bool write = registers[REG_ERR] & 2;                // the processor's page fault code
    stop(place, "%s: %s %s %s", what, device ? "kernel" : "host code", write ? "writes" : "reads",
         describe(p).c_str());
}

// The handler runs on a stack of its own: a thread's may be what overflowed.
void catch_faults() {
    static thread_local bool done = false;
    if (address_sanitizer || done) return;
    done = true;
    stack_t stack = {};
    stack.ss_size = SIGNAL_STACK;
    stack.ss_sp = mmap(nullptr, SIGNAL_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

bool is_fresh(const char* from, const char* to) {
    return from == to || ((uint8_t)*from == FRESH && memcmp(from, from + 1, (size_t)(to - from) - 1) == 0);
}

}  // namespace

Place calling_line() { return line_from(nullptr); }

DeviceCode::DeviceCode() {
    catch_faults();
    device_code_here++;
    memory().device_code++;
}

DeviceCode::~DeviceCode() {
    device_code_here--;
    if (--memory().device_code == 0) close_regions();
}

const Allocation* find_allocation(const void* p) { return live_region(p); }

bool may_be_device_pointer(const void* p) {
    const Region* region = nearest_region(p);
    if (address_sanitizer) return region && (region->holds(p) || p == region->end());
    return p < memory().end && p >= memory().end - RESERVED;
}

// Opens [p, p + size), or stops.
static void open_range(const void* p, size_t size, bool write, const char* what) {
    Region* region = live_region(p);
    if (!fits(region, p, size))
        stop(calling_line(), "out of bounds: %s %s %zu bytes from %s", what, write ? "writes" : "reads", size,
             describe(p).c_str());
    open_region(region);
}

void use_memory(const void* p, size_t size, bool write, const char* what) {
    if (size == 0) return;
    open_range(p, size, write, what);
    if (checking && write) check::initialised(p, size);
    if (checking && !write) check::host_reads(p, size, what);
}

void check_slack(const Launch& launch) {
    for (Region* r = memory().open_regions; r; r = r->next_open) {
        const char* front = std::max(r->pages, r->base - PAGE);
        if (is_fresh(front, r->base) && is_fresh(r->end(), r->pages + r->pages_size)) continue;
        stop(launch.place, "out of bounds: kernel %s wrote just outside a device allocation of %zu bytes",
             launch.kernel, r->size);
    }
}

// ------------------------------------------------------------------------------------------------
// Allocation

namespace {

bool reserve() {
    Memory& m = memory();
    void* all = mmap(nullptr, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return false;
    m.next = (char*)round_up((size_t)all + GAP, HUGE_PAGE);
    m.end = (char*)all + RESERVED;
    return true;
}

// Gives the region its addresses. False when there are none, or no memory behind them.
bool find_place(Region* region) {
    if (address_sanitizer) {
        void* p = nullptr;
        if (region->size > PTRDIFF_MAX || posix_memalign(&p, ALIGNMENT, region->size) != 0) return false;
        region->base = (char*)memset(p, FRESH, region->size);
        return true;
    }
    Memory& m = memory();
    size_t body = round_up(region->size, ALIGNMENT), distance = round_up(body, HUGE_PAGE);
    size_t pages = body > HUGE_PAGE ? distance : round_up(body, PAGE);
    if (region->size > RESERVED || (!m.end && !reserve())) return false;
    if (2 * distance + GAP > (size_t)(m.end - m.next)) return false;
    char* at = m.next + distance - pages;
    if (mprotect(at, pages, PROT_READ | PROT_WRITE) != 0) return false;
    madvise(at, pages, MADV_HUGEPAGE);
    region->pages = (char*)memset(at, FRESH, pages);
    region->pages_size = pages;
    region->base = at + pages - body;
    if (region->kind == DEVICE) mprotect(at, pages, PROT_NONE);
    m.next += 2 * distance + GAP;
    return true;
}

cudaError_t new_allocation(void** pointer, size_t size, MemoryKind kind) {
    Lock lock(runtime_lock());
    Memory& m = memory();
    if (!pointer) return remember(cudaErrorInvalidValue);
    *pointer = nullptr;
    if (size == 0) return cudaSuccess;
    catch_faults();
    auto region = std::make_unique<Region>();
    region->size = size;
    region->kind = kind;
    region->live = true;
    if (kind == DEVICE && size > options().memory - m.used) return remember(cudaErrorMemoryAllocation);
    if (!find_place(region.get())) return remember(cudaErrorMemoryAllocation);
    if (kind == DEVICE) m.used += size;
    if (checking) check::allocated(region->base, size, kind);
    *pointer = region->base;
    Region*& at = m.regions[region->base];
    delete at;                          // malloc gives an address out again
    at = region.release();
    return cudaSuccess;
}

// Waits for all work: what is pending may use the memory.
cudaError_t free_allocation(void* pointer, MemoryKind kind) {
    Lock lock(runtime_lock());
    if (!pointer) return cudaSuccess;
    cudaDeviceSynchronize();
    Region* region = live_region(pointer);
    if (!region || region->base != pointer || region->kind != kind) return remember(cudaErrorInvalidValue);
    if (checking) check::freed(region->base, region->size);
    if (kind == DEVICE) memory().used -= region->size;
    region->live = false;
    if (address_sanitizer) {
        free(region->base);
    } else {
        constexpr int anew = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(region->pages, region->pages_size, PROT_NONE, anew, -1, 0);        // gives the pages back
    }
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Copies

struct Rows {                           // one side of a copy
    char* start;
    size_t pitch;
    Region* region = nullptr;           // null: pageable

    Rows(const void* p, size_t pitch) : start((char*)p), pitch(pitch) {}
    bool device() const { return region && region->kind == DEVICE; }
};

struct Copy {
    Rows to, from;
    size_t width, height;

    void run() const {
        DeviceCode device;
        for (size_t i = 0; i < height; i++) run_row(to.start + i * to.pitch, from.start + i * from.pitch);
    }

    void run_row(char* t, const char* f) const {
        if (to.region) open_range(t, width, true, "cudaMemcpy");
        if (from.region) open_range(f, width, false, "cudaMemcpy");
        memcpy(t, f, width);
        if (checking && to.device() && from.region) check::copied(t, f, width);
        else if (checking && from.region) check::host_reads(f, width, "cudaMemcpy");
        else if (checking && to.region) check::initialised(t, width);
    }
};

// May these rows be this side of a copy? Memory that was freed is neither device nor host.
bool right_side(const Rows& rows, const Copy& copy, bool device, bool any) {
    if (!rows.start || (!any && rows.device() != device)) return false;
    if (!rows.region) return address_sanitizer || !may_be_device_pointer(rows.start);
    size_t room = (size_t)(rows.region->end() - rows.start);
    return copy.width <= room && copy.height - 1 <= (room - copy.width) / rows.pitch;
}

cudaError_t error_of(const Copy& copy, cudaMemcpyKind kind, cudaStream_t stream) {
    if (!stream_exists(stream)) return cudaErrorInvalidResourceHandle;
    if ((unsigned)kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    if (copy.to.pitch < copy.width || copy.from.pitch < copy.width) return cudaErrorInvalidPitchValue;
    if (copy.width == 0 || copy.height == 0) return cudaSuccess;
    bool any = kind == cudaMemcpyDefault, both = kind == cudaMemcpyDeviceToDevice;
    bool right = right_side(copy.to, copy, both || kind == cudaMemcpyHostToDevice, any) &&
                 right_side(copy.from, copy, both || kind == cudaMemcpyDeviceToHost, any);
    return right ? cudaSuccess : cudaErrorInvalidValue;
}

// Pageable memory is read before the call returns; what the device gets later is a staged copy of it.
void enqueue_staged(cudaStream_t stream, const Copy& copy) {
    auto staged = std::make_shared<std::vector<char>>(copy.width * copy.height);
    Rows middle(staged->data(), copy.width);
    Copy{middle, copy.from, copy.width, copy.height}.run();
    Copy rest = {copy.to, middle, copy.width, copy.height};
    enqueue(stream, [rest, staged] { rest.run(); });
}

// What a copy waits for, and what waits for it, is as in "API synchronization behavior" of CUDA's manual.
cudaError_t copy_rows(Copy copy, cudaMemcpyKind kind, cudaStream_t stream, bool async) {
    Lock lock(runtime_lock());
    copy.to.region = live_region(copy.to.start);
    copy.from.region = live_region(copy.from.start);
    cudaError_t error = error_of(copy, kind, stream);
    if (error != cudaSuccess || copy.width == 0 || copy.height == 0) return remember(error);
    bool to_device = copy.to.device(), from_device = copy.from.device();
    if (to_device && !copy.from.region && options().lazy) {
        if (!async) cudaStreamSynchronize(stream);
        enqueue_staged(stream, copy);
        return cudaSuccess;
    }
    enqueue(stream, [copy] { copy.run(); });
    bool waits = !copy.to.region || (!to_device && !from_device) || (!async && !(to_device && from_device));
    if (waits) cudaStreamSynchronize(stream);
    return cudaSuccess;
}

}  // namespace
}  // namespace cpu_cuda

using namespace cpu_cuda;

cudaError_t cudaMalloc(void** pointer, size_t size) { return new_allocation(pointer, size, DEVICE); }
cudaError_t cudaMallocHost(void** pointer, size_t size) { return new_allocation(pointer, size, PINNED); }
cudaError_t cudaFree(void* pointer) { return free_allocation(pointer, DEVICE); }
cudaError_t cudaFreeHost(void* pointer) { return free_allocation(pointer, PINNED); }

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) {
    constexpr unsigned all = cudaHostAllocPortable | cudaHostAllocMapped | cudaHostAllocWriteCombined;
    return flags & ~all ? remember(cudaErrorInvalidValue) : new_allocation(pointer, size, PINNED);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Lock lock(runtime_lock());
    if (!free || !total) return remember(cudaErrorInvalidValue);
    *total = options().memory;
    *free = options().memory - memory().used;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    return copy_rows({{to, size}, {from, size}, size, 1}, kind, 0, false);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy_rows({{to, size}, {from, size}, size, 1}, kind, stream, true);
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                         size_t height, cudaMemcpyKind kind) {
    return copy_rows({{to, to_pitch}, {from, from_pitch}, width, height}, kind, 0, false);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_rows({{to, to_pitch}, {from, from_pitch}, width, height}, kind, stream, true);
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
    Lock lock(runtime_lock());
    if (!stream_exists(stream)) return remember(cudaErrorInvalidResourceHandle);
    if (size == 0) return cudaSuccess;
    if (!fits(live_region(pointer), pointer, size)) return remember(cudaErrorInvalidValue);
    enqueue(stream, [=] {
        DeviceCode device;
        use_memory(pointer, size, true, "cudaMemset");
        memset(pointer, value, size);
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t size) {
    Lock lock(runtime_lock());
    cudaError_t error = cudaMemsetAsync(pointer, value, size, 0);
    const Region* region = live_region(pointer);
    if (region && region->kind == PINNED) cudaStreamSynchronize(0);
    return error;
}
