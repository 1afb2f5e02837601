// memory.cpp: device and pinned memory, copies, faults.
//
// One large range of addresses is reserved and none of them is given out twice, so a freed one always faults.
// Each allocation has a zone in it:
//
//     | 2 MB, never open | slack | base .. base + size | slack < 256 | at least 2 MB, never open |
//                        ^ page or huge page                         ^ huge page
//
// Pages of device memory are closed until device code touches them (DeviceCode in runtime.h); pinned ones are
// open. Every byte starts as 0xFF, a NaN, and slack still is after each launch; AddressSanitizer watches it.

#include "runtime.h"

#include <elf.h>
#include <execinfo.h>
#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>

extern "C" const Elf64_Ehdr __executable_start;         // the linker's
extern "C" const char etext, _end;                      // also: where its data begins and ends

using namespace cpu_cuda;

namespace {

typedef std::lock_guard<std::recursive_mutex> Lock;

constexpr size_t PAGE = 4096, HUGE_PAGE = 2 << 20, ALIGNMENT = 256, RESERVED = (size_t)1 << 45;
constexpr int ANEW = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr char FRESH = -1;                      // every byte of new memory: a NaN
constexpr uintptr_t END = (uintptr_t)1 << 47;   // of the addresses
constexpr uintptr_t CLOSED = END >> 1;          // changes one of used memory to one that is not used

enum Kind { DEVICE, PINNED };

struct Region {
    size_t size;
    Kind kind;
    bool live = true;
    char *base = nullptr, *zone = nullptr, *zone_end = nullptr;
    char* pages = nullptr;                      // what page protection covers
    size_t pages_size = 0;

    char* end() const { return base + size; }
    bool holds(const void* p, size_t bytes) const {
        return p >= base && p < end() && bytes <= (size_t)(end() - (const char*)p);
    }
    void protect(int rights) const { mprotect(pages, pages_size, rights); }
};

struct Memory {
    std::map<const char*, Region> regions;      // by zone_end; freed ones stay, to be known
    char* reserved = (char*)mmap(nullptr, RESERVED, PROT_NONE, ANEW, -1, 0);
    char* next = reserved;                      // where the next zone starts
    size_t used = 0;                            // bytes of device memory
    std::mutex lock;                            // of these two: workers open what they touch
    std::set<Region*> open;
    std::atomic<int> device_code{0};            // DeviceCode objects of all threads
};

// Never destroyed: a fault may come after the last destructor.
Memory& memory() {
    static Memory& only = *new Memory;
    return only;
}

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// The allocation, live or freed, in whose zone p is, or null.
Region* region_near(const void* p) {
    auto found = memory().regions.upper_bound((const char*)p);
    return found != memory().regions.end() && p >= found->second.zone ? &found->second : nullptr;
}

// The live one that holds [p, p + size), or null.
Region* live_region(const void* p, size_t size = 1) {
    Region* region = region_near(p);
    return region && region->live && region->holds(p, size) ? region : nullptr;
}

bool is_device(const void* p) { return live_region(p) && live_region(p)->kind == DEVICE; }

// Is it data, heap, a stack or the like of the host? A check build watches all but the program's data itself.
bool is_host_memory(uintptr_t p) {
    if (p < (uintptr_t)&etext || p >= (checking ? (uintptr_t)&_end : END)) return false;
    if (p - (uintptr_t)memory().reserved < RESERVED || region_near((void*)p)) return false;
    // Linux reads the signal set before it refuses -1: so this asks whether p can be read.
    return syscall(SYS_rt_sigprocmask, -1, p & -sizeof(long), nullptr, sizeof(long)) && errno != EFAULT;
}

// ------------------------------------------------------------------------------------------------
// Faults, and where in the user's source they are

bool is_runtime(const std::string& file) {
    static const std::string here = std::string(__FILE__).substr(0, std::string(__FILE__).rfind('/') + 1);
    bool is_here = file.compare(0, here.size(), here) == 0 && file.compare(here.size(), 5, "test/") != 0;
    return is_here || file[0] == '?' || file.compare(0, 5, "/usr/") == 0;
}

// The user's line at the instruction `pc`, or null for the caller's; else of what called it.
Place line_from(const void* pc) {
    void* frames[64];
    int count = backtrace(frames, 64);
    for (int i = 0; i < count; i++)
        if (frames[i] != pc) frames[i] = (char*)frames[i] - 1;          // a call ends before where it returns
    return user_line(frames, count);
}

// Opens what device code may touch; everything else ends the program.
void on_fault(int, siginfo_t* info, void* context) {
    const void* p = info->si_addr;
    const auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    Region* region = region_near(p);
    bool device = memory().device_code > 0, inside = region && region->holds(p, 1);
    if (device && inside && region->live) {
        std::lock_guard<std::mutex> hold(memory().lock);
        memory().open.insert(region);
        return region->protect(PROT_READ | PROT_WRITE);
    }
    Place place = line_from((void*)registers[REG_RIP]);
    if (on_guard_page(p)) stop(place, "stack overflow: the local variables need more than a thread's stack");
    const char* verb = registers[REG_ERR] & 2 ? "writes" : "reads";     // the processor's page fault code
    uintptr_t host = (uintptr_t)p ^ CLOSED;
    if (is_host_memory(host)) stop(place, "kernel %s host memory, at 0x%zx", verb, host);
    const char* what = !region         ? "invalid address"
                       : !region->live ? "use after free"
                       : !inside       ? "out of bounds"
                                       : "host code touches device memory";
    stop(place, "%s: %s %s %s", what, device ? "kernel" : "host code", verb, describe(p).c_str());
}

// The handler runs on a stack of its own: a thread's may be what overflowed.
void catch_faults() {
    static thread_local char* stack;
    if (stack) return;
    const size_t size = 256 << 10;
    stack = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, ANEW, -1, 0);
    stack_t other = {stack, 0, size};
    sigaltstack(&other, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
}

bool is_fresh(const char* from, const char* to) {
    return from == to || (*from == FRESH && memcmp(from, from + 1, (size_t)(to - from) - 1) == 0);
}

}  // namespace

namespace cpu_cuda {

Place user_line(void* const* code, int count) {
    char text[1024];
    size_t moved = __executable_start.e_type == ET_DYN ? (size_t)&__executable_start : 0;
    std::string command = "addr2line -i -e /proc/" + std::to_string(getpid()) + "/exe 2>/dev/null";
    for (int i = 0; i < count; i++) {
        snprintf(text, sizeof text, " %zx", (size_t)code[i] - moved);
        command += text;
    }
    Place found = {nullptr, 0};                         // unknown
    FILE* pipe = popen(command.c_str(), "r");
    while (pipe && !found.file && fgets(text, sizeof text, pipe)) {
        char* colon = strrchr(text, ':');
        int line = colon ? atoi(colon + 1) : 0;         // of code without line numbers: file:?
        if (!line || is_runtime(text)) continue;
        *colon = 0;
        found = {strdup(text), line};                   // never freed: the program ends with this report
    }
    if (pipe) pclose(pipe);
    return found;
}

Place calling_line() { return line_from(nullptr); }

std::string describe(const void* p) {
    const Region* region = region_near(p);
    char text[160];
    snprintf(text, sizeof text, "address %p, in no allocation", p);
    if (!region) return text;
    ptrdiff_t offset = (const char*)p - region->base, over = (const char*)p - region->end();
    const char* where = offset < 0 ? "before" : over < 0 ? "into" : "past the end of";
    snprintf(text, sizeof text, "%td bytes %s a %s allocation of %zu bytes%s",
             std::abs(over < 0 ? offset : over), where, region->kind == DEVICE ? "device" : "pinned",
             region->size, region->live ? "" : " that was freed");
    return text;
}

DeviceCode::DeviceCode() {
    catch_faults();
    std::lock_guard<std::mutex> hold(memory().lock);
    memory().device_code++;
}

DeviceCode::~DeviceCode() {
    Memory& m = memory();
    std::lock_guard<std::mutex> hold(m.lock);
    if (--m.device_code > 0) return;
    for (Region* region : m.open) region->protect(PROT_NONE);
    m.open.clear();
}

bool is_allocated(const void* p, size_t size) { return live_region(p, size); }
bool may_be_device_pointer(const void* p) { return region_near(p); }

void use_memory(const void* p, size_t size, bool write, const char* what) {
    if (size == 0) return;
    if (!live_region(p, size))
        stop(calling_line(), "out of bounds: %s %s %zu bytes from %s", what, write ? "writes" : "reads", size,
             describe(p).c_str());
    if (checking && write) check::mark(p, size, check::WRITTEN);
    if (checking && !write) check::host_reads(p, size, what);
}

void close_host_pointers(void* words, size_t size) {
    for (uintptr_t* word = (uintptr_t*)words; word < (uintptr_t*)words + size / sizeof *word; word++)
        if (is_host_memory(*word)) *word ^= CLOSED;
}

void check_slack(const Launch& launch) {
    for (const Region* r : address_sanitizer ? std::set<Region*>() : memory().open) {
        const char* front = std::max(r->pages, r->base - PAGE);
        if (is_fresh(front, r->base) && is_fresh(r->end(), r->pages + r->pages_size)) continue;
        stop(launch.place, "out of bounds: kernel %s wrote just outside a device allocation of %zu bytes",
             launch.kernel, r->size);
    }
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// Allocation

namespace {

// Gives the region its addresses. False when there are none, or no memory behind them.
bool find_place(Region* r) {
    Memory& m = memory();
    // Opening and closing costs by the page: large memory has only huge ones, at the price of slack in front.
    size_t body = round_up(r->size, ALIGNMENT), gap = round_up(body, HUGE_PAGE);
    char* end = (char*)round_up((size_t)m.next + HUGE_PAGE + body, HUGE_PAGE);
    r->pages_size = round_up(body, body > HUGE_PAGE ? HUGE_PAGE : PAGE);
    r->pages = end - r->pages_size;
    if (end + gap > m.reserved + RESERVED) return false;
    if (mprotect(r->pages, r->pages_size, PROT_READ | PROT_WRITE) != 0) return false;
    madvise(r->pages, r->pages_size, MADV_HUGEPAGE);
    memset(r->pages, FRESH, r->pages_size);
    r->base = end - body;
    if (address_sanitizer) {
        __asan_poison_memory_region(r->pages, r->pages_size);
        __asan_unpoison_memory_region(r->base, r->size);
    }
    r->zone = m.next;
    r->zone_end = m.next = end + gap;
    if (r->kind == DEVICE) r->protect(PROT_NONE);
    return true;
}

cudaError_t new_allocation(void** pointer, size_t size, Kind kind) {
    Lock lock(runtime_lock());
    Memory& m = memory();
    *pointer = nullptr;
    if (size == 0) return cudaSuccess;
    catch_faults();
    Region region = {size, kind};
    size_t most = kind == DEVICE ? options().memory - m.used : RESERVED / 4;
    if (size > most || !find_place(&region)) return remember(cudaErrorMemoryAllocation);
    if (kind == DEVICE) m.used += size;
    if (checking)                               // the host may have written pinned memory
        check::watch(region.base, size, kind == DEVICE ? check::UNWRITTEN : check::WRITTEN);
    m.regions[region.zone_end] = region;
    *pointer = region.base;
    return cudaSuccess;
}

// Waits for all work: what is pending may use the memory.
cudaError_t free_allocation(void* pointer, Kind kind) {
    Lock lock(runtime_lock());
    if (!pointer) return cudaSuccess;
    cudaDeviceSynchronize();
    Region* region = live_region(pointer);
    if (!region || region->base != pointer || region->kind != kind) return remember(cudaErrorInvalidValue);
    if (checking) check::freed(region->base, region->size);
    if (kind == DEVICE) memory().used -= region->size;
    region->live = false;
    mmap(region->pages, region->pages_size, PROT_NONE, ANEW | MAP_FIXED, -1, 0);
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Copies

// Is [p, p + size) all of it device memory, or none? Memory that was freed is neither device nor host.
bool is_side(const void* p, size_t size, bool device) {
    if (!p || is_device(p) != device) return false;
    return live_region(p) ? is_allocated(p, size) : !region_near(p);
}

void run_copy(void* to, const void* from, size_t size) {
    DeviceCode device;
    memcpy(to, from, size);
    if (checking && is_device(to) && live_region(from)) check::copied(to, from, size);
    else if (checking && live_region(from)) check::host_reads(from, size, "cudaMemcpy");
    else if (checking && live_region(to)) check::mark(to, size, check::WRITTEN);
}

// What a copy waits for, and what waits for it, is as in "API synchronization behavior" of CUDA's manual.
cudaError_t copy(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream,
                 bool async) {
    Lock lock(runtime_lock());
    bool to_device = kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyHostToDevice;
    bool from_device = kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyDeviceToHost;
    if (!stream_exists(stream)) return remember(cudaErrorInvalidResourceHandle);
    if (kind > cudaMemcpyDeviceToDevice) return remember(cudaErrorInvalidMemcpyDirection);
    if (size == 0) return cudaSuccess;
    bool right = is_side(to, size, to_device) && is_side(from, size, from_device);
    if (!right) return remember(cudaErrorInvalidValue);
    if (to_device && !live_region(from) && options().lazy) {
        // Pageable memory is read before the call returns; what the device gets later is a staged copy of it.
        if (!async) cudaStreamSynchronize(stream);
        auto staged = std::make_shared<std::string>((const char*)from, size);
        enqueue(stream, [=] { run_copy(to, staged->data(), size); });
        return cudaSuccess;
    }
    enqueue(stream, [=] { run_copy(to, from, size); });
    bool on_host = !to_device && !from_device, waits = !async && to_device != from_device;
    if (on_host || waits || !live_region(to)) cudaStreamSynchronize(stream);
    return cudaSuccess;
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t size) { return new_allocation(pointer, size, DEVICE); }
cudaError_t cudaMallocHost(void** pointer, size_t size) { return new_allocation(pointer, size, PINNED); }
cudaError_t cudaFree(void* pointer) { return free_allocation(pointer, DEVICE); }
cudaError_t cudaFreeHost(void* pointer) { return free_allocation(pointer, PINNED); }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = options().memory;
    *free = options().memory - memory().used;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    return copy(to, from, size, kind, 0, false);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy(to, from, size, kind, stream, true);
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
    Lock lock(runtime_lock());
    if (!stream_exists(stream)) return remember(cudaErrorInvalidResourceHandle);
    if (size && !live_region(pointer, size)) return remember(cudaErrorInvalidValue);
    enqueue(stream, [=] {
        DeviceCode device;
        use_memory(pointer, size, true, "cudaMemset");
        memset(pointer, value, size);
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t size) {
    cudaError_t error = cudaMemsetAsync(pointer, value, size, 0);
    if (!is_device(pointer)) cudaStreamSynchronize(0);
    return error;
}
