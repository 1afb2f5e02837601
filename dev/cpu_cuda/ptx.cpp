// ptx.cpp: the tensor core, matrix loads and asynchronous copies.

#include "include/cpu_cuda/ptx.h"

#include "include/cuda_bf16.h"
#include "runtime.h"

namespace cpu_cuda::ptx {

// ------------------------------------------------------------------------------------------------
// mma.sync m16n8k16

// Lane 4 g + t holds of A, C and D the rows g and g + 8, of B the column g; register by register the columns
// (of B: rows) 2 t and 2 t + 1, then those 8 further on.
static void multiply_fragments(void** arguments, unsigned) {
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Product& part = *(const Product*)arguments[lane];
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 8; i++)             // i / 2: the register, i % 2: which half of it
            A[g + i / 2 % 2 * 8][t + i / 4 * 8 + i % 2] = float_of(part.a[i / 2] >> i % 2 * 16);
        for (int i = 0; i < 4; i++) {
            B[t + i / 2 * 8 + i % 2][g] = float_of(part.b[i / 2] >> i % 2 * 16);
            C[g + i / 2 * 8][t + i % 2] = part.c[i];
        }
    }
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            for (int first = 0; first < 16; first += 8) {
                double sum = C[i][j];
                for (int k = first; k < first + 8; k++) sum += (double)A[i][k] * B[k][j];
                C[i][j] = (float)sum;
            }
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < 4; i++)
            *((Product*)arguments[lane])->d[i] = C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    if (checking) profile::count(profile::MATRIX, 1);
}

void multiply(Place here, Product part) { warp_together(multiply_fragments, &part, ~0u, "mma.sync", here); }

// ------------------------------------------------------------------------------------------------
// ldmatrix

struct Load {                   // a lane's part
    std::initializer_list<uint32_t*> registers;
    bool transposed;
    const uint16_t* row;
};

// Lane 4 g + t receives of each matrix the elements (g, 2 t) and (g, 2 t + 1); transposed, mirrored.
static void distribute(void** arguments, unsigned) {
    for (int lane = 0; lane < WARP; lane++) {
        const Load& mine = *(const Load*)arguments[lane];
        int g = lane / 4, t = lane % 4 * 2, matrix = 0;
        for (uint32_t* to : mine.registers) {
            *to = 0;
            for (int half = 0; half < 2; half++) {
                int row = mine.transposed ? t + half : g, column = mine.transposed ? g : t + half;
                *to |= (uint32_t)((const Load*)arguments[matrix * 8 + row])->row[column] << 16 * half;
            }
            matrix++;
        }
    }
}

void load_matrices(Place here, std::initializer_list<uint32_t*> registers, bool transposed,
                   uint32_t address) {
    Load part = {registers, transposed, nullptr};
    if (current->number % WARP < registers.size() * 8) {       // the other lanes' addresses have no meaning
        if (address % 16) stop(here, "ldmatrix: the row's address %#x is not a multiple of 16", address);
        part.row = (const uint16_t*)shared_pointer(address, 16, here);
        if (checking) check::access(part.row, 16, check::READ, here);
    }
    warp_together(distribute, &part, ~0u, registers.size() == 2 ? "ldmatrix.x2" : "ldmatrix.x4", here);
}

// ------------------------------------------------------------------------------------------------
// cp.async

static ThreadCopies& copies() {
    current->block->copies.resize(current->block->threads);
    return current->block->copies[current->number];
}

void cp_async_ca_shared_global(Place here, uint32_t to, const void* from, int size, unsigned bytes) {
    if ((size != 4 && size != 8 && size != 16) || bytes > (unsigned)size)
        stop(here, "cp.async: found %u of %d bytes, expected at most 4, 8 (.ca) or 16", bytes, size);
    if (to % size || (uintptr_t)from % size)
        stop(here, "cp.async: the %s is not a multiple of %d", to % size ? "destination" : "source", size);
    void* destination = shared_pointer(to, size, here);
    if (bytes && !is_allocated(from, bytes) && may_be_device_pointer(from))
        stop(here, "out of bounds: cp.async reads %u bytes from %s", bytes, describe(from).c_str());
    if (bytes && checking) check::access(from, bytes, check::READ, here);
    if (bytes) (void)*(const volatile char*)from;       // a fault is reported here, not at the wait
    if (checking) check::copy_begins(destination, size, here);
    memset(destination, 0xff, size);
    copies().under_way.push_back({destination, from, size, bytes, copies().groups, here});
}

void cp_async_cg_shared_global(Place here, uint32_t to, const void* from, int size, unsigned bytes) {
    if (size != 16) stop(here, "cp.async.cg: found %d bytes, expected 16", size);
    cp_async_ca_shared_global(here, to, from, size, bytes);
}

void cp_async_commit_group(Place) { copies().groups++; }

// What is done is done in the order of issue.
void cp_async_wait_group(Place here, int groups) {
    ThreadCopies& mine = copies();
    if (groups < 0) stop(here, "cp.async.wait_group: found %d groups, expected 0 or more", groups);
    size_t done = 0;
    for (; done < mine.under_way.size() && mine.under_way[done].group + groups < mine.groups; done++) {
        const AsyncCopy& copy = mine.under_way[done];
        memset(copy.to, 0, copy.size);
        memcpy(copy.to, copy.from, copy.bytes);
        if (checking) check::copy_ends(copy.to, copy.size, copy.place);
    }
    mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + (ptrdiff_t)done);
}

void cp_async_wait_all(Place here) {
    cp_async_commit_group(here);
    cp_async_wait_group(here, 0);
}

}  // namespace cpu_cuda::ptx
