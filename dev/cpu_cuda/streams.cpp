// streams.cpp: streams, events, launching, errors, devices.
//
// Without `lazy`, work runs when it is enqueued, so all before it has run. Under `lazy` it waits in its
// stream until something forces it, and brings what must come first in other streams (an event, the default
// stream). As little as allowed runs, as late as allowed: a program that forgot to synchronise sees old data.

#include "runtime.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>

namespace cpu_cuda {
namespace {

typedef std::lock_guard<std::recursive_mutex> Lock;

struct Dependency {
    CUstream_st* stream;
    unsigned long long count;           // this many operations of it have run
};

struct Operation {
    std::function<void()> work;
    std::vector<Dependency> after;
    unsigned long long issued;          // number among all operations of the program
};

struct Record {                         // what one cudaEventRecord recorded
    Dependency point;
    bool done = false;
    timespec time;
};

}  // namespace
}  // namespace cpu_cuda

struct CUstream_st {
    unsigned flags = cudaStreamDefault;
    int priority = 0;
    std::deque<cpu_cuda::Operation> waiting;
    unsigned long long issued = 0, done = 0;
    bool running = false;               // an operation that lets other host threads call, as NCCL's do
};

struct CUevent_st {
    unsigned flags;
    std::shared_ptr<cpu_cuda::Record> record;
};

namespace cpu_cuda {
namespace {

constexpr int DEVICES = 8, LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5;
constexpr int MAX_THREADS = 1024, MAX_BLOCK_Z = 64, MAX_GRID_X = 2147483647, MAX_GRID_YZ = 65535;
constexpr size_t KB = 1024, SHARED_DEFAULT = 48 * KB, SHARED_RESERVED = KB;

// Destroyed handles leave the sets, but the objects stay: no later handle equals one; work may wait in them.
struct Streams {
    CUstream_st legacy;                 // the default stream
    std::set<CUstream_st*> handles;
    std::set<CUevent_st*> events;
    std::vector<std::unique_ptr<CUstream_st>> all;
    std::vector<std::unique_ptr<CUevent_st>> all_events;
    std::map<std::string, int> dynamic_shared;          // by kernel: what cudaFuncSetAttribute allowed
    std::set<std::string> names;
    unsigned long long issued = 0;
    unsigned random = options().seed * 2654435761u + 1;
    int device = 0;
};

Streams& streams() {
    static Streams& only = *new Streams;
    return only;
}

thread_local cudaError_t last_error = cudaSuccess;

CUstream_st* find(cudaStream_t stream) {
    if (!stream) return &streams().legacy;
    return streams().handles.count(stream) ? stream : nullptr;
}

CUevent_st* find(cudaEvent_t event) { return streams().events.count(event) ? event : nullptr; }

// ------------------------------------------------------------------------------------------------
// Deferred work

void run_until(Dependency point);

// Runs the first operation that waits in the stream, after what must come before it.
void run_next(CUstream_st* stream) {
    std::vector<Dependency> after = stream->waiting.front().after;
    unsigned long long turn = stream->done;
    for (const Dependency& point : after) run_until(point);
    if (stream->running || stream->done != turn) return;        // meanwhile another host thread took it
    Operation operation = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    stream->running = true;
    operation.work();
    stream->running = false;
    stream->done++;
}

void run_until(Dependency point) {
    while (point.stream->done < point.count) {
        if (point.stream->running) let_others_call();
        else run_next(point.stream);
    }
}

std::vector<CUstream_st*> busy_streams() {
    std::vector<CUstream_st*> busy;
    Streams& s = streams();
    auto add = [&](CUstream_st& stream) {
        if (!stream.running && !stream.waiting.empty()) busy.push_back(&stream);
    };
    add(s.legacy);
    for (auto& stream : s.all) add(*stream);
    return busy;
}

unsigned next_random(unsigned count) {
    unsigned& x = streams().random;
    x = x * 1664525u + 1013904223u;
    return (x >> 8) % count;
}

// Runs what the host waits for. Streams are independent, so under order=random others may get ahead of it.
void force(Dependency point) {
    while (point.stream->done < point.count) {
        auto busy = busy_streams();
        if (point.stream->running) let_others_call();
        else run_next(options().order == RANDOM ? busy[next_random((unsigned)busy.size())] : point.stream);
    }
}

void force_all() {
    for (auto busy = busy_streams(); !busy.empty(); busy = busy_streams()) {
        // Most unlike the order of issue: the stream whose turn came last goes first.
        auto later = [](const CUstream_st* a, const CUstream_st* b) {
            return a->waiting.front().issued < b->waiting.front().issued;
        };
        run_next(options().order == RANDOM ? busy[next_random((unsigned)busy.size())]
                                           : *std::max_element(busy.begin(), busy.end(), later));
    }
}

// Everything in the stream so far.
Dependency all_of(CUstream_st* stream) { return {stream, stream->issued}; }

// The default stream waits for the other streams and they for it, unless they are cudaStreamNonBlocking.
std::vector<Dependency> implied(CUstream_st* stream) {
    Streams& s = streams();
    if (stream->flags & cudaStreamNonBlocking) return {};
    if (stream != &s.legacy) return {all_of(&s.legacy)};
    std::vector<Dependency> after;
    for (auto& other : s.all) {
        bool pending = other->done < other->issued;
        if (pending && !(other->flags & cudaStreamNonBlocking)) after.push_back(all_of(other.get()));
    }
    return after;
}

// Returns the point at which `work` has run.
Dependency add(CUstream_st* stream, std::function<void()> work, const Dependency* also = nullptr) {
    stream->issued++;
    if (!options().lazy) {
        work();
        stream->done++;
        return all_of(stream);
    }
    Operation operation = {std::move(work), implied(stream), ++streams().issued};
    if (also) operation.after.push_back(*also);
    stream->waiting.push_back(std::move(operation));
    return all_of(stream);
}

}  // namespace

void let_others_call() {
    int depth = 0;
    while (pthread_mutex_unlock(runtime_lock().native_handle()) == 0) depth++;
    sched_yield();
    while (depth-- > 0) runtime_lock().lock();
}

bool stream_exists(cudaStream_t stream) {
    Lock lock(runtime_lock());
    return find(stream) != nullptr;
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
    Lock lock(runtime_lock());
    CUstream_st* found = find(stream);
    if (!found) stop(calling_line(), "the stream was destroyed or never created");
    add(found, std::move(work));
}

cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// ------------------------------------------------------------------------------------------------
// Launching

namespace {

size_t shared_optin() { return (options().capability == 80 ? 163 : 227) * KB; }

bool shared_is_allowed(const Launch& launch) {
    if (launch.shared <= SHARED_DEFAULT) return true;
    auto allowed = streams().dynamic_shared.find(kernel_name(launch.kernel));
    return allowed != streams().dynamic_shared.end() && launch.shared <= (size_t)allowed->second;
}

bool shape_is_valid(Size3 grid, Size3 block) {
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return false;
    if (block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > MAX_BLOCK_Z) return false;
    if (block.x * block.y * block.z > MAX_THREADS) return false;
    return grid.x <= MAX_GRID_X && grid.y <= MAX_GRID_YZ && grid.z <= MAX_GRID_YZ;
}

cudaError_t error_of(const Launch& launch) {
    if (!find(launch.stream)) return cudaErrorInvalidResourceHandle;
    if (!shape_is_valid(launch.grid, launch.block)) return cudaErrorInvalidConfiguration;
    if (!shared_is_allowed(launch)) return cudaErrorInvalidValue;
    if (!launch.cooperative) return cudaSuccess;
    int threads = (int)(launch.block.x * launch.block.y * launch.block.z);
    int resident = blocks_per_multiprocessor(threads, launch.shared) * options().sms;
    unsigned long long blocks = (unsigned long long)launch.grid.x * launch.grid.y * launch.grid.z;
    return blocks > (unsigned)resident ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

void check_pointer(const Launch& launch, int position, const void* value) {
    if (!value || may_be_device_pointer(value)) return;
    stop(launch.place, "host pointer %p passed to kernel %s as argument %d", value, launch.kernel,
         position + 1);
}

}  // namespace

cudaError_t try_submit(Launch* launch) {
    Lock lock(runtime_lock());
    auto release = [](Launch* l) {
        l->release(l->arguments);
        delete l;
    };
    std::shared_ptr<Launch> owned(launch, release);
    cudaError_t error = error_of(*launch);
    if (error != cudaSuccess) return remember(error);
    launch->each_pointer(launch->arguments, check_pointer, *launch);
    enqueue(launch->stream, [owned] {
        DeviceCode device;
        run_grid(*owned);
        check_slack(*owned);
    });
    return cudaSuccess;
}

void submit(Launch* launch) { try_submit(launch); }

// The text may be a macro's arguments, with a cast and namespaces before the name.
const char* kernel_name(const char* text) {
    Lock lock(runtime_lock());
    int depth = 0;
    std::string name;
    for (; *text && (depth > 0 || (*text != '<' && *text != ',')); text++) {
        bool part_of_name = depth == 0 && (isalnum((unsigned char)*text) || *text == '_');
        if (part_of_name) name += *text;
        if (*text == ':' || *text == '(') name.clear();
        depth += (*text == '(') - (*text == ')');
    }
    return streams().names.insert(name).first->c_str();
}

cudaError_t set_attribute(const char* text, cudaFuncAttribute attribute, int value) {
    Lock lock(runtime_lock());
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
        return remember(value < -1 || value > 100 ? cudaErrorInvalidValue : cudaSuccess);
    bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!known || value < 0 || (size_t)value > shared_optin()) return remember(cudaErrorInvalidValue);
    streams().dynamic_shared[kernel_name(text)] = value;
    return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared) {
    if (!blocks || threads <= 0) return remember(cudaErrorInvalidValue);
    bool fits = threads <= MAX_THREADS && shared <= shared_optin();
    *blocks = fits ? blocks_per_multiprocessor(threads, shared) : 0;
    return cudaSuccess;
}

}  // namespace cpu_cuda

using namespace cpu_cuda;

// ------------------------------------------------------------------------------------------------
// Errors

namespace {

const struct ErrorText {
    int value;
    const char *name, *text;
} error_texts[] = {
#define ERROR_TEXT(name, value, text) {value, #name, text},
    CPU_CUDA_ERRORS(ERROR_TEXT)
#undef ERROR_TEXT
};

const ErrorText& text_of(cudaError_t error) {
    static const ErrorText unknown = {0, "unrecognized error code", "unrecognized error code"};
    for (const ErrorText& e : error_texts)
        if (e.value == error) return e;
    return unknown;
}

}  // namespace

cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

// ------------------------------------------------------------------------------------------------
// Devices. There are as many as a machine with GPUs has, so that each of several processes can take its own;
// one process uses one.

cudaError_t cudaGetDeviceCount(int* count) {
    if (!count) return remember(cudaErrorInvalidValue);
    *count = DEVICES;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    if (!device) return remember(cudaErrorInvalidValue);
    *device = streams().device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    Lock lock(runtime_lock());
    if (device < 0 || device >= DEVICES) return remember(cudaErrorInvalidDevice);
    size_t free, total;
    cudaMemGetInfo(&free, &total);
    bool in_use = free != total || !streams().handles.empty();
    if (device != streams().device && in_use) return remember(cudaErrorDevicesUnavailable);
    streams().device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (!p) return remember(cudaErrorInvalidValue);
    if (device < 0 || device >= DEVICES) return remember(cudaErrorInvalidDevice);
    bool ampere = options().capability == 80;
    *p = {};
    snprintf(p->name, sizeof p->name, "cpu_cuda");
    p->totalGlobalMem = options().memory;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = WARP;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = MAX_THREADS;
    p->maxThreadsDim[2] = MAX_BLOCK_Z;
    p->maxGridSize[0] = MAX_GRID_X;
    p->maxGridSize[1] = p->maxGridSize[2] = MAX_GRID_YZ;
    p->major = options().capability / 10;
    p->minor = options().capability % 10;
    p->multiProcessorCount = options().sms;
    p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = p->cooperativeLaunch = 1;
    p->l2CacheSize = (ampere ? 40 : 50) << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlockOptin = shared_optin();
    p->sharedMemPerMultiprocessor = shared_optin() + SHARED_RESERVED;
    p->reservedSharedMemPerBlock = SHARED_RESERVED;
    p->maxBlocksPerMultiProcessor = 32;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (!value) return remember(cudaErrorInvalidValue);
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error != cudaSuccess) return error;
    switch (attribute) {
#define ATTRIBUTE(name, number, member) case name: *value = (int)p.member; break;
        CPU_CUDA_ATTRIBUTES(ATTRIBUTE)
#undef ATTRIBUTE
        default: return remember(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = LEAST_PRIORITY;
    if (greatest) *greatest = GREATEST_PRIORITY;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    Lock lock(runtime_lock());
    force_all();
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    Lock lock(runtime_lock());
    if (!stream || flags & ~(unsigned)cudaStreamNonBlocking) return remember(cudaErrorInvalidValue);
    auto created = std::make_unique<CUstream_st>();
    created->flags = flags;
    created->priority = std::clamp(priority, GREATEST_PRIORITY, LEAST_PRIORITY);
    *stream = created.get();
    streams().handles.insert(*stream);
    streams().all.push_back(std::move(created));
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    Lock lock(runtime_lock());
    if (!find(stream)) return remember(cudaErrorInvalidResourceHandle);
    if (!priority) return remember(cudaErrorInvalidValue);
    *priority = find(stream)->priority;
    return cudaSuccess;
}

// As CUDA has it, work that waits in the stream still runs some time.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Lock lock(runtime_lock());
    return streams().handles.erase(stream) ? cudaSuccess : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Lock lock(runtime_lock());
    CUstream_st* found = find(stream);
    if (!found) return remember(cudaErrorInvalidResourceHandle);
    force(all_of(found));
    return cudaSuccess;
}

// Each query lets one operation run, so that a loop of queries ends.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Lock lock(runtime_lock());
    CUstream_st* found = find(stream);
    if (!found) return remember(cudaErrorInvalidResourceHandle);
    if (found->done == found->issued) return cudaSuccess;
    if (!found->running) run_next(found);
    return remember(cudaErrorNotReady);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Lock lock(runtime_lock());
    if (!find(stream) || !find(event)) return remember(cudaErrorInvalidResourceHandle);
    if (flags != 0) return remember(cudaErrorInvalidValue);
    if (event->record && !event->record->done) add(find(stream), [] {}, &event->record->point);
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    Lock lock(runtime_lock());
    constexpr unsigned all = cudaEventBlockingSync | cudaEventDisableTiming;
    if (!event || flags & ~all) return remember(cudaErrorInvalidValue);
    streams().all_events.push_back(std::make_unique<CUevent_st>());
    *event = streams().all_events.back().get();
    (*event)->flags = flags;
    streams().events.insert(*event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock(runtime_lock());
    return streams().events.erase(event) ? cudaSuccess : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Lock lock(runtime_lock());
    if (!find(stream) || !find(event)) return remember(cudaErrorInvalidResourceHandle);
    auto record = std::make_shared<Record>();
    event->record = record;
    record->point = add(find(stream), [record] {
        clock_gettime(CLOCK_MONOTONIC, &record->time);
        record->done = true;
    });
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Lock lock(runtime_lock());
    if (!find(event)) return remember(cudaErrorInvalidResourceHandle);
    if (event->record) force(event->record->point);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    Lock lock(runtime_lock());
    if (!find(event)) return remember(cudaErrorInvalidResourceHandle);
    if (!event->record || event->record->done) return cudaSuccess;
    if (!event->record->point.stream->running) run_next(event->record->point.stream);
    return remember(cudaErrorNotReady);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    Lock lock(runtime_lock());
    if (!milliseconds) return remember(cudaErrorInvalidValue);
    auto timed = [](cudaEvent_t e) { return find(e) && e->record && !(e->flags & cudaEventDisableTiming); };
    if (!timed(start) || !timed(end)) return remember(cudaErrorInvalidResourceHandle);
    if (!start->record->done || !end->record->done) return remember(cudaErrorNotReady);
    const timespec &a = start->record->time, &b = end->record->time;
    *milliseconds = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) * 1e-6);
    return cudaSuccess;
}
