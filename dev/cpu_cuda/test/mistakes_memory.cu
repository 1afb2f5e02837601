// mistakes_memory.cu: memory that a kernel or the host may not touch, and synchronisation that is missing.

#include "test.h"

enum { COUNT = 1024, BYTES = COUNT * (int)sizeof(float) };      // whole pages: it faults right at the end

static float* on_device(int count) {
    float* p;
    OK(cudaMalloc(&p, (size_t)count * sizeof(float)));
    OK(cudaMemset(p, 0, (size_t)count * sizeof(float)));
    return p;
}

static float* pinned(float value) {
    float* p;
    OK(cudaMallocHost(&p, BYTES));
    for (int i = 0; i < COUNT; i++) p[i] = value;
    return p;
}

static cudaStream_t new_stream(void) {
    cudaStream_t stream;
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

static cudaEvent_t new_event(void) {
    cudaEvent_t event;
    OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
}

__global__ void add(float* y, const float* x, float amount, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) y[i] = x[i] + amount;                // HERE argument_malloc argument_stack argument_global
}

static void add_to(float* y, const float* x, float amount, cudaStream_t stream) {
    add<<<COUNT / 256, 256, 0, stream>>>(y, x, amount, COUNT);
}

// ------------------------------------------------------------------------------------------------
// Out of bounds

// CASE off_by_one plain,check,address: 0 bytes past the end of a device allocation of 4096 bytes
__global__ void off_by_one_kernel(float* y, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i <= count) y[i] = 1;                           // HERE off_by_one
}
static void off_by_one(void) { off_by_one_kernel<<<5, 256>>>(on_device(COUNT), COUNT); }

// CASE window_before plain,check,address: 4 bytes before a device allocation of 4096 bytes
__device__ float window_sum(const float* x, int i) {
    float sum = 0;
    for (int k = 1; k >= -1; k--) sum += x[i + k];      // HERE window_before
    return sum;
}
__global__ void window_kernel(float* y, const float* x) {
    int i = (int)threadIdx.x;
    y[i] = window_sum(x, i);
}
static void window_before(void) { window_kernel<<<1, 64>>>(on_device(COUNT), on_device(COUNT)); }

// CASE small_overrun plain,check: out of bounds
__global__ void small_overrun_kernel(float* y) { y[threadIdx.x] = 1; }
static void small_overrun(void) { small_overrun_kernel<<<1, 11>>>(on_device(10)); }     // HERE small_overrun

// CASE small_overread check: 0 bytes past the end of a device allocation of 40 bytes
// CASE small_overread address: use-after-poison
__global__ void small_overread_kernel(float* y, const float* x) {
    y[threadIdx.x] = x[threadIdx.x];                    // HERE small_overread
}
static void small_overread(void) { small_overread_kernel<<<1, 11>>>(on_device(11), on_device(10)); }

// ------------------------------------------------------------------------------------------------
// Use after free

// CASE freed_read plain,check,address: use after free: kernel reads 0 bytes into a device allocation of 4096 bytes
__global__ void freed_read_kernel(float* y, const float* x) { *y = *x; }                // HERE freed_read
static void freed_read(void) {
    float *x = on_device(COUNT), *y = on_device(COUNT);
    OK(cudaFree(x));
    freed_read_kernel<<<1, 1>>>(y, x);
}

// CASE freed_in_struct plain,check,address: use after free: kernel writes 4092 bytes into
typedef struct {
    float *kept, *freed;
} Buffers;
__global__ void freed_in_struct_kernel(Buffers buffers) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    buffers.kept[i] = 1;
    if (i == COUNT - 1) buffers.freed[i] = 1;           // HERE freed_in_struct
}
static void freed_in_struct(void) {
    Buffers buffers = {on_device(COUNT), on_device(COUNT)};
    freed_in_struct_kernel<<<8, 128>>>(buffers);
    OK(cudaFree(buffers.freed));
    on_device(COUNT);                                   // nor does it get those addresses
    freed_in_struct_kernel<<<8, 128>>>(buffers);
}

// CASE freed_pinned plain,check,address: bytes into a pinned allocation of 4096 bytes that was freed
static void freed_pinned(void) {
    float* p = pinned(1);
    OK(cudaFreeHost(p));
    p[3] += 1;                                          // HERE freed_pinned
}

// CASE deep_recursion plain,check: stack overflow
__device__ int deep(const volatile float* x, int level) {
    volatile char local[1024];
    local[level & 1023] = (char)level;                  // HERE deep_recursion
    return level > 100000 ? (int)x[0] : deep(x, level + 1) + local[level & 1023];
}
__global__ void deep_recursion_kernel(float* y) { y[0] = (float)deep(y, 0); }
static void deep_recursion(void) { deep_recursion_kernel<<<1, 1>>>(on_device(COUNT)); }

// ------------------------------------------------------------------------------------------------
// Host and device memory mixed up

// CASE host_sums_device plain,check,address: host code touches device memory: host code reads
static void host_sums_device(void) {
    float sum = 0, *x = on_device(COUNT);
    add_to(x, x, 1, 0);
    for (int i = 0; i < COUNT; i++) sum += x[i];        // HERE host_sums_device
    expect(sum == COUNT);
}

// CASE host_fills_device plain,check,address: host code touches device memory: host code writes
static void host_fills_device(void) {
    float* x = on_device(COUNT);
    memset(x, 0, BYTES);                                // HERE host_fills_device
}

// CASE host_updates_device plain,check,address: 20 bytes into a device allocation of 4096 bytes
static void bump(float* p) { *p += 1; }                 // HERE host_updates_device
static void host_updates_device(void) { bump(on_device(COUNT) + 5); }

// CASE argument_malloc plain,check,address: kernel reads host memory
static void argument_malloc(void) { add_to(on_device(COUNT), (float*)malloc(BYTES), 1, 0); }

// CASE argument_stack plain,check,address: kernel writes host memory
static void argument_stack(void) {
    float result[4];
    add<<<1, 4>>>(result, on_device(COUNT), 1, 4);
}

// CASE argument_global plain,check,address: kernel reads host memory
static float table[4];
static void argument_global(void) {
    add<<<1, 4>>>(on_device(COUNT), table, 1, 4);
}

// CASE host_in_struct plain,check,address: kernel writes host memory
__global__ void host_in_struct_kernel(Buffers buffers) {
    buffers.kept[threadIdx.x] = 1;
    if (threadIdx.x == 3) buffers.freed[threadIdx.x] = 1;       // HERE host_in_struct
}
static void host_in_struct(void) {
    Buffers buffers = {on_device(COUNT), (float*)malloc(BYTES)};
    host_in_struct_kernel<<<1, 32>>>(buffers);
}

// CASE host_unused plain,check,address: clean
typedef struct {
    float *on_device, on_host[4], *also_on_host;
    int pair[2];
} Mixed;
__global__ void host_unused_kernel(Mixed mixed, const char* name) {
    if (name && mixed.also_on_host) mixed.on_device[threadIdx.x] = (float)mixed.pair[1];
}
static void host_unused(void) {                         // nor are numbers taken for pointers
    Mixed mixed = {on_device(COUNT), {1, 2, 3, 4}, table, {0, 0}};
    float result = -1;
    for (int i = 0; i < 32768; i += 127) {
        mixed.pair[0] = i * 50;
        mixed.pair[1] = i;
        host_unused_kernel<<<1, 32>>>(mixed, "name");
        OK(cudaMemcpy(&result, mixed.on_device, sizeof result, cudaMemcpyDeviceToHost));
        expect(result == (float)i);
    }
}

// CASE host_in_table check: kernel reads host memory
__global__ void host_in_table_kernel(float* y, float* const* rows) {
    y[threadIdx.x] = rows[threadIdx.x][0];              // HERE host_in_table
}
static void host_in_table(void) {
    float *rows[2] = {on_device(COUNT), (float*)calloc(COUNT, sizeof(float))}, **device_rows;
    OK(cudaMalloc(&device_rows, sizeof rows));
    OK(cudaMemcpy(device_rows, rows, sizeof rows, cudaMemcpyHostToDevice));
    host_in_table_kernel<<<1, 2>>>(on_device(COUNT), device_rows);
}

// ------------------------------------------------------------------------------------------------
// Fresh memory is NaN

// CASE fresh_accumulator plain: wrong result
static void fresh_accumulator(void) {
    float *sum, result;
    OK(cudaMalloc(&sum, BYTES));
    add_to(sum, sum, 1, 0);
    OK(cudaMemcpy(&result, sum, sizeof result, cudaMemcpyDeviceToHost));
    expect(result == 1);
}

// CASE fresh_pinned plain: wrong result
static void fresh_pinned(void) {
    float *loss, *x = on_device(COUNT);
    OK(cudaMallocHost(&loss, BYTES));
    OK(cudaMemcpy(loss, x, BYTES / 2, cudaMemcpyDeviceToHost));
    expect(loss[COUNT - 1] == 0);
}

// ------------------------------------------------------------------------------------------------
// Results that are not there yet

static float *data, *result;
static cudaStream_t producer, consumer;
static cudaEvent_t ready;

static void prepare(void) {
    data = on_device(COUNT);
    result = pinned(-1);
    producer = new_stream();
    consumer = new_stream();
    ready = new_event();
    OK(cudaDeviceSynchronize());
}

// CASE read_before_sync lazy: wrong result
static void read_before_sync(void) {
    prepare();
    add_to(data, data, 1, producer);
    OK(cudaMemcpyAsync(result, data, BYTES, cudaMemcpyDeviceToHost, producer));
    expect(result[COUNT - 1] == 1);
}

// CASE mapped_read_early lazy: wrong result
static void mapped_read_early(void) {
    float *x = on_device(COUNT), *flag = pinned(0);
    add_to(flag, x, 1, 0);                              // the kernel writes host memory
    expect(flag[0] == 1);
}

// ------------------------------------------------------------------------------------------------
// Streams that do not wait for one another

// What the consumer stream saw of what the producer wrote.
static void consume(float expected) {
    OK(cudaMemcpyAsync(result, data, BYTES, cudaMemcpyDeviceToHost, consumer));
    OK(cudaDeviceSynchronize());
    expect(result[COUNT - 1] == expected);
}

// CASE missing_event lazy: wrong result
static void missing_event(void) {
    prepare();
    add_to(data, data, 1, producer);
    consume(1);
}

// CASE event_recorded_after_wait lazy: wrong result
static void event_recorded_after_wait(void) {
    prepare();
    add_to(data, data, 1, producer);
    OK(cudaStreamWaitEvent(consumer, ready));
    OK(cudaEventRecord(ready, producer));
    consume(1);
}

// CASE event_recorded_before_work lazy: wrong result
static void event_recorded_before_work(void) {
    prepare();
    OK(cudaEventRecord(ready, producer));
    add_to(data, data, 1, producer);
    OK(cudaStreamWaitEvent(consumer, ready));
    consume(1);
}

// CASE upload_then_nonblocking lazy: wrong result
static void upload_then_nonblocking(void) {
    float* host = (float*)calloc(COUNT, sizeof(float));
    prepare();
    host[COUNT - 1] = 5;
    OK(cudaMemcpy(data, host, BYTES, cudaMemcpyHostToDevice));  // pageable: staged, not there yet
    consume(5);
}

// ------------------------------------------------------------------------------------------------
// Sources of copies that change too early

static void upload_and_expect(float* x, float expected) {
    float result = -1;
    OK(cudaDeviceSynchronize());
    OK(cudaMemcpy(&result, x + COUNT - 1, sizeof result, cudaMemcpyDeviceToHost));
    expect(result == expected);
}

// CASE source_overwritten lazy: wrong result
static void source_overwritten(void) {
    float *x = on_device(COUNT), *source = pinned(1);
    OK(cudaMemcpyAsync(x, source, BYTES, cudaMemcpyHostToDevice));
    source[COUNT - 1] = 2;
    upload_and_expect(x, 1);
}

// CASE source_in_loop lazy: wrong result
static void source_in_loop(void) {
    float *x = on_device(COUNT), *sum = on_device(COUNT), *source = pinned(0);
    cudaStream_t stream = new_stream();
    OK(cudaDeviceSynchronize());
    for (int batch = 1; batch <= 3; batch++) {
        source[COUNT - 1] = (float)batch;
        OK(cudaMemcpyAsync(x, source, BYTES, cudaMemcpyHostToDevice, stream));
        if (batch == 1) add_to(sum, x, 0, stream);
    }
    upload_and_expect(sum, 1);
}

// CASE double_buffer plain,check,address,lazy,order: clean
static void double_buffer(void) {
    float *sum = on_device(COUNT), *x[2] = {on_device(COUNT), on_device(COUNT)};
    float* source[2] = {pinned(1), pinned(1)};
    cudaStream_t copies = new_stream(), work = new_stream();
    cudaEvent_t arrived[2] = {new_event(), new_event()}, used[2] = {new_event(), new_event()};
    OK(cudaDeviceSynchronize());
    for (int batch = 0; batch < 6; batch++) {
        int slot = batch % 2;
        OK(cudaEventSynchronize(arrived[slot]));
        source[slot][COUNT - 1] = (float)batch;
        OK(cudaStreamWaitEvent(copies, used[slot]));
        OK(cudaMemcpyAsync(x[slot], source[slot], BYTES, cudaMemcpyHostToDevice, copies));
        OK(cudaEventRecord(arrived[slot], copies));
        OK(cudaStreamWaitEvent(work, arrived[slot]));
        add_to(sum, x[slot], (float)batch, work);
        OK(cudaEventRecord(used[slot], work));
    }
    upload_and_expect(sum, 10);
}

#define CASE(name) {#name, name}
static const Case cases[] = {
    CASE(off_by_one), CASE(window_before), CASE(small_overrun), CASE(small_overread), CASE(freed_read),
    CASE(freed_in_struct), CASE(freed_pinned), CASE(deep_recursion), CASE(host_sums_device),
    CASE(host_fills_device), CASE(host_updates_device), CASE(argument_malloc), CASE(argument_stack),
    CASE(argument_global), CASE(host_in_struct), CASE(host_unused), CASE(host_in_table),
    CASE(fresh_accumulator), CASE(fresh_pinned), CASE(read_before_sync), CASE(mapped_read_early), CASE(missing_event),
    CASE(event_recorded_after_wait), CASE(event_recorded_before_work), CASE(upload_then_nonblocking),
    CASE(source_overwritten), CASE(source_in_loop), CASE(double_buffer),
};

int main(int argc, char** argv) { return RUN_CASE(cases, argc, argv); }
