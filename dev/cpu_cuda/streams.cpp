// streams.cpp: streams, events, launching, errors, devices.
//
// Without `lazy`, work runs when it is enqueued, so all before it has run. Under `lazy` it waits until
// something forces it, and brings what must come first: by its stream, an event or the default stream. As
// little as allowed runs, as late as allowed: a program that forgot to synchronise sees old data.

#include "runtime.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>

typedef std::shared_ptr<struct Operation> Work;

struct CUstream_st { bool blocking; };  // waits for the default stream, and that for it
struct CUevent_st { bool timed; Work recorded; };       // the end of this one

struct Operation {
    std::function<void()> work;
    CUstream_st* stream;
    Work also;                          // comes before this one, as what is before it in the stream does
    bool needed = false, done = false;  // needed by what is being forced
    std::chrono::steady_clock::time_point end = {};
};

using namespace cpu_cuda;

namespace {

typedef std::lock_guard<std::recursive_mutex> Lock;

constexpr int MAX_THREADS = 1024;
constexpr uint3 MAX_BLOCK = {1024, 1024, 64}, MAX_GRID = {2147483647, 65535, 65535};
constexpr size_t SHARED_DEFAULT = 48 << 10;

struct Streams {
    CUstream_st legacy = {true};        // the default stream
    std::map<const void*, bool> exist;  // streams and events. Destroyed ones stay: their work may wait, and
                                        // no later one may have their handle.
    std::vector<Work> pending;          // in the order of enqueue()
    unsigned random = options().seed * 2654435761u + 1;
    std::map<std::string, size_t> shared_allowed;       // by kernel: its cudaFuncSetAttribute
    int device = -1;
};

Streams& streams() {
    static Streams& only = *new Streams;
    return only;
}

thread_local cudaError_t last_error = cudaSuccess;

bool exists(const void* handle) {
    Lock lock(runtime_lock());
    return streams().exist[handle];
}

CUstream_st* find(cudaStream_t stream) {
    return !stream ? &streams().legacy : exists(stream) ? stream : nullptr;
}

template <class T>
cudaError_t create(T** handle, const T& value, unsigned flags, unsigned known_flags) {
    Lock lock(runtime_lock());
    if (!handle || flags & ~known_flags) return remember(cudaErrorInvalidValue);
    streams().exist[*handle = new T(value)] = true;
    return cudaSuccess;
}

cudaError_t destroy(const void* handle) {
    Lock lock(runtime_lock());
    bool existed = std::exchange(streams().exist[handle], false);
    return existed ? cudaSuccess : remember(cudaErrorInvalidResourceHandle);
}

// ------------------------------------------------------------------------------------------------
// Work

void run(Operation& operation) {
    operation.work();
    operation.end = std::chrono::steady_clock::now();
    operation.done = true;
    operation.work = nullptr;
    operation.also = nullptr;
}

bool must_follow(const Operation& operation, const Operation& earlier) {
    CUstream_st *stream = operation.stream, *other = earlier.stream, *legacy = &streams().legacy;
    bool implicit = stream->blocking && other->blocking && (stream == legacy || other == legacy);
    return stream == other || implicit || operation.also.get() == &earlier;
}

// Runs pending work and all that must come before it, in the order of enqueue().
void force(const Work& wanted) {
    std::vector<Work>& pending = streams().pending;
    wanted->needed = true;
    for (size_t i = pending.size(); i-- > 0;)
        for (size_t j = 0; j < i && pending[i]->needed; j++)
            pending[j]->needed |= must_follow(*pending[i], *pending[j]);
    auto needed = [](const Work& operation) { return operation->needed; };
    auto rest = std::stable_partition(pending.begin(), pending.end(), needed);
    std::vector<Work> now(pending.begin(), rest);
    pending.erase(pending.begin(), rest);
    for (const Work& operation : now) run(*operation);
}

// Under order=random other work, which is independent, may get ahead.
void wait_for(Work wanted) {
    Lock lock(runtime_lock());
    Streams& s = streams();
    while (!wanted->done && !s.pending.empty()) {
        s.random = s.random * 1664525u + 1013904223u;
        force(options().order == RANDOM ? s.pending[(s.random >> 8) % s.pending.size()] : wanted);
    }
}

// Enqueues work that comes after `also` too.
Work add(CUstream_st* stream, std::function<void()> work, const Work& also = nullptr) {
    Lock lock(runtime_lock());
    Work operation = std::make_shared<Operation>(Operation{std::move(work), stream, also});
    if (options().lazy) streams().pending.push_back(operation);
    else run(*operation);
    return operation;
}

}  // namespace

namespace cpu_cuda {

bool stream_exists(cudaStream_t stream) { return find(stream); }
void enqueue(cudaStream_t stream, std::function<void()> work) { add(find(stream), std::move(work)); }
cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// ------------------------------------------------------------------------------------------------
// Launching

static size_t shared_optin() { return (options().capability == 80 ? 163 : 227) << 10; }

// The kernel as written may have template arguments, and a namespace or more before it.
static std::string name_of(const char* kernel) {
    std::string name(kernel, strcspn(kernel, "<"));
    return name.substr(name.find_last_of(":(&* ") + 1);         // npos + 1 is 0
}

static bool within(uint3 size, uint3 most) {
    return size.x && size.y && size.z && size.x <= most.x && size.y <= most.y && size.z <= most.z;
}

static cudaError_t error_of(const Launch& launch) {
    const dim3 &grid = launch.grid, &block = launch.block;
    unsigned threads = block.x * block.y * block.z;
    size_t allowed = std::max(SHARED_DEFAULT, streams().shared_allowed[name_of(launch.kernel)]);
    bool valid = within(block, MAX_BLOCK) && threads <= (unsigned)MAX_THREADS && within(grid, MAX_GRID);
    if (!find(launch.stream)) return cudaErrorInvalidResourceHandle;
    if (!valid) return cudaErrorInvalidConfiguration;
    if (launch.shared > allowed) return cudaErrorInvalidValue;
    if (!launch.cooperative) return cudaSuccess;
    int resident = blocks_per_multiprocessor((int)threads, launch.shared) * options().sms;
    bool fits = (size_t)grid.x * grid.y * grid.z <= (size_t)resident;
    return fits ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

int submit(Launch launch) {
    Lock lock(runtime_lock());
    cudaError_t error = error_of(launch);
    if (error != cudaSuccess) return remember(error);
    std::vector<char> bytes((char*)launch.arguments, (char*)launch.arguments + launch.arguments_size);
    close_host_pointers(bytes.data(), bytes.size());
    enqueue(launch.stream, [launch, bytes = std::move(bytes)]() mutable {
        launch.arguments = bytes.data();
        DeviceCode device;
        run_grid(launch);
        check_slack(launch);
    });
    return cudaSuccess;
}

cudaError_t allow_shared(const char* kernel, cudaFuncAttribute attribute, int value) {
    Lock lock(runtime_lock());
    bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!known || value < 0 || (size_t)value > shared_optin()) return remember(cudaErrorInvalidValue);
    streams().shared_allowed[name_of(kernel)] = (size_t)value;
    return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared) {
    if (!blocks || threads <= 0) return remember(cudaErrorInvalidValue);
    bool fits = threads <= MAX_THREADS && shared <= shared_optin();
    *blocks = fits ? blocks_per_multiprocessor(threads, shared) : 0;
    return cudaSuccess;
}

}  // namespace cpu_cuda

// ------------------------------------------------------------------------------------------------
// Errors

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define ERROR_TEXT(name, value, meaning) case name: return meaning;
        CPU_CUDA_ERRORS(ERROR_TEXT)
    }
    return "unrecognized error code";
}

// ------------------------------------------------------------------------------------------------
// Devices. There are as many as a machine with GPUs has, so that each of several processes can take its own;
// one process uses one.

cudaError_t cudaGetDeviceCount(int* count) { return *count = options().devices, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
    int& used = streams().device;
    if (device < 0 || device >= options().devices) return remember(cudaErrorInvalidDevice);
    if (used >= 0 && used != device) return remember(cudaErrorDevicesUnavailable);
    used = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = std::max(streams().device, 0), cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
    if (device < 0 || device >= options().devices) return remember(cudaErrorInvalidDevice);
    int length = snprintf(id, (size_t)size, "0000:%02x:00.0", device + 1);
    return length < size ? cudaSuccess : remember(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device < 0 || device >= options().devices) return remember(cudaErrorInvalidDevice);
    int cc = options().capability;
    *p = {"cpu_cuda", options().memory, SHARED_DEFAULT, WARP, MAX_THREADS, cc / 10, cc % 10, options().sms,
          1, shared_optin()};
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, device) != cudaSuccess) return cudaErrorInvalidDevice;
    switch (attribute) {
#define ATTRIBUTE(name, number, member) case name: return *value = (int)p.member, cudaSuccess;
        CPU_CUDA_ATTRIBUTES(ATTRIBUTE)
    }
    return remember(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}

// Most unlike the order of enqueue(): the last comes first.
cudaError_t cudaDeviceSynchronize() {
    Lock lock(runtime_lock());
    while (!streams().pending.empty()) wait_for(streams().pending.back());
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Streams. A priority is accepted and changes nothing, as a GPU may do too.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return create(stream, {flags != cudaStreamNonBlocking}, flags, cudaStreamNonBlocking);
}

// As CUDA has it, work that waits in the stream still runs some time.
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return destroy(stream); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (!find(stream)) return remember(cudaErrorInvalidResourceHandle);
    wait_for(add(find(stream), [] {}));
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (!find(stream) || !exists(event)) return remember(cudaErrorInvalidResourceHandle);
    if (flags != 0) return remember(cudaErrorInvalidValue);
    if (event->recorded) add(find(stream), [] {}, event->recorded);
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return create(event, {flags != cudaEventDisableTiming, nullptr}, flags, cudaEventDisableTiming);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (!find(stream) || !exists(event)) return remember(cudaErrorInvalidResourceHandle);
    event->recorded = add(find(stream), [] {});
    return cudaSuccess;
}

// Whoever asks asks again: under `lazy` the work is done between the two questions.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!exists(event)) return remember(cudaErrorInvalidResourceHandle);
    if (!event->recorded || event->recorded->done) return cudaSuccess;
    wait_for(event->recorded);
    return remember(cudaErrorNotReady);         // as CUDA does: cudaGetLastError shows it
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    for (cudaEvent_t event : {start, end}) {
        if (!exists(event) || !event->timed || !event->recorded) return remember(cudaErrorInvalidResourceHandle);
        if (!event->recorded->done) return cudaErrorNotReady;
    }
    *ms = std::chrono::duration<float, std::milli>(end->recorded->end - start->recorded->end).count();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (!exists(event)) return remember(cudaErrorInvalidResourceHandle);
    if (event->recorded) wait_for(event->recorded);
    return cudaSuccess;
}
