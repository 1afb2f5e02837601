// ptx.cpp: the tensor core, matrix loads and asynchronous copies.

#include "include/cpu_cuda/ptx.h"

#include "include/cuda_bf16.h"
#include "runtime.h"

namespace cpu_cuda {
namespace ptx {

constexpr unsigned ALL_LANES = ~0u;

// ------------------------------------------------------------------------------------------------
// mma.sync m16n8k16

namespace {

struct Product {                // a lane's part
    float* d[4];
    uint32_t a[4], b[2];
    float c[4];
};

float low(uint32_t pair) { return float_of(pair << 16); }
float high(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// row += (8 values of a row of A) (8, 8), rounded once
void add_eight(float* row, const float* a, const float (*b)[8]) {
    double sum[8];
    for (int j = 0; j < 8; j++) sum[j] = row[j];
    for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) sum[j] += (double)a[k] * b[k][j];
    for (int j = 0; j < 8; j++) row[j] = (float)sum[j];
}

// Lane 4 g + t holds of A, C and D the rows g and g + 8, of B the column g; register by register the columns
// (of B: rows) 2 t and 2 t + 1, then those 8 further on.
void multiply(void** arguments, unsigned) {
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Product& part = *(const Product*)arguments[lane];
        int g = lane / 4, t = lane % 4 * 2;
        for (int r = 0; r < 4; r++) {
            A[g + r % 2 * 8][t + r / 2 * 8] = low(part.a[r]);
            A[g + r % 2 * 8][t + r / 2 * 8 + 1] = high(part.a[r]);
            C[g + r / 2 * 8][t + r % 2] = part.c[r];
        }
        for (int r = 0; r < 2; r++) {
            B[t + r * 8][g] = low(part.b[r]);
            B[t + r * 8 + 1][g] = high(part.b[r]);
        }
    }
    for (int i = 0; i < 16; i++) {
        add_eight(C[i], A[i], B);
        add_eight(C[i], A[i] + 8, B + 8);
    }
    for (int lane = 0; lane < WARP; lane++)
        for (int r = 0; r < 4; r++)
            *((Product*)arguments[lane])->d[r] = C[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    if (checking) check::count_matrix_instruction();
}

}  // namespace

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(Place here, float& d0, float& d1, float& d2,
                                                         float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                                                         uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                                                         float c1, float c2, float c3) {
    Product part = {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    warp_together(multiply, &part, ALL_LANES, "mma.sync", here);
}

// ------------------------------------------------------------------------------------------------
// ldmatrix

namespace {

struct Load {                   // a lane's part
    uint32_t* const* registers;
    int count;
    bool transposed;
    const uint16_t* row;
};

// Lane 4 g + t receives of each matrix the elements (g, 2 t) and (g, 2 t + 1); transposed, mirrored.
void distribute(void** arguments, unsigned) {
    for (int lane = 0; lane < WARP; lane++) {
        const Load& mine = *(const Load*)arguments[lane];
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < mine.count; i++) {
            uint32_t pair[2];
            for (int half = 0; half < 2; half++) {
                int row = mine.transposed ? t + half : g, column = mine.transposed ? g : t + half;
                pair[half] = ((const Load*)arguments[i * 8 + row])->row[column];
            }
            *mine.registers[i] = pair[0] | pair[1] << 16;
        }
    }
}

}  // namespace

void load_matrices(Place here, uint32_t* const* registers, int count, bool transposed, uint32_t address) {
    static const char* const names[] = {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"};
    Load part = {registers, count, transposed, nullptr};
    if ((int)current->number % WARP < count * 8) {      // the other lanes' addresses have no meaning
        if (address % 16) stop(here, "ldmatrix: the row's address %#x is not a multiple of 16", address);
        part.row = (const uint16_t*)shared_pointer(address, 16, here);
        if (checking) check::access(part.row, 16, check::READ, here);
    }
    warp_together(distribute, &part, ALL_LANES, names[count], here);
}

// ------------------------------------------------------------------------------------------------
// cp.async

void copy_async(Place here, uint32_t to, const void* from, int size, unsigned bytes, bool bypasses_l1) {
    if (size != 16 && (bypasses_l1 || (size != 8 && size != 4)))
        stop(here, "cp.async: found %d bytes, expected %s", size, bypasses_l1 ? "16" : "4, 8 or 16");
    if (bytes > (unsigned)size) stop(here, "cp.async: found %u bytes of source for %d", bytes, size);
    if (to % size || (uintptr_t)from % size)
        stop(here, "cp.async: the %s is not a multiple of %d", to % size ? "destination" : "source", size);
    void* destination = shared_pointer(to, size, here);
    const Allocation* source = find_allocation(from);
    if (bytes && checking) check::access(from, bytes, check::READ, here);
    bool inside = source && (const char*)from + bytes <= source->base + source->size;
    if (bytes && !inside && may_be_device_pointer(from))
        stop(here, "out of bounds: cp.async reads %u bytes from %s", bytes, describe(from).c_str());
    if (bytes) (void)*(const volatile char*)from;       // a fault is reported here, not at the wait
    if (checking) check::copy_begins(destination, size, here);
    memset(destination, 0xff, size);
    if (current->block->copies.empty()) current->block->copies.resize(current->block->threads);
    ThreadCopies& mine = current->block->copies[current->number];
    mine.under_way.push_back({destination, from, size, bytes, mine.groups, here});
}

// Does what this thread issued before its group `end`, in the order of issue.
static void complete_before(unsigned end) {
    ThreadCopies& mine = current->block->copies[current->number];
    size_t done = 0;
    for (; done < mine.under_way.size() && mine.under_way[done].group < end; done++) {
        const AsyncCopy& copy = mine.under_way[done];
        memset(copy.to, 0, copy.size);
        memcpy(copy.to, copy.from, copy.bytes);
        if (checking) check::copy_ends(copy.to, copy.size, copy.place);
    }
    mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + (ptrdiff_t)done);
}

void cp_async_commit_group(Place) {
    if (current->block->copies.empty()) current->block->copies.resize(current->block->threads);
    current->block->copies[current->number].groups++;
}

void cp_async_wait_group(Place here, int groups) {
    if (groups < 0) stop(here, "cp.async.wait_group: found %d groups, expected 0 or more", groups);
    if (current->block->copies.empty()) return;
    unsigned committed = current->block->copies[current->number].groups;
    if (committed > (unsigned)groups) complete_before(committed - groups);
}

void cp_async_wait_all(Place here) {
    cp_async_commit_group(here);
    cp_async_wait_group(here, 0);
}

// ------------------------------------------------------------------------------------------------
// Barriers

void bar_sync(Place here, int id) {
    if (id == 0) block_barrier(VOTE_NONE, 0, "__syncthreads", here);
    else named_barrier(id, (int)current->block->threads, here);
}

}  // namespace ptx
}  // namespace cpu_cuda
