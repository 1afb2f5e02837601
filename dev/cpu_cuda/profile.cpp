// profile.cpp: what kernels ask of memory. Only in a check build, under CPU_CUDA=profile.
//
// A GPU serves a warp's access as one request. Here lanes run one after the other, so the k-th time that each
// lane comes to an instruction since the warp last met belongs together; a request is counted when all live
// lanes are in it, when the warp meets at a barrier, or at the block's end. A thread's own memory (registers,
// stack) takes no part, and volatile accesses and atomics are outside the requests.

#include "runtime.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>

namespace cpu_cuda {
namespace profile {
namespace {

struct Row {                            // of the table: one kernel
    std::string kernel;
    uint64_t launches, asked[2], distinct[2];           // bytes of global memory, read and written
    uint64_t sectors, fewest_sectors, passes, fewest_passes, barriers, atomics, matrix, copied;
};

struct Request {
    unsigned lanes;
    uint32_t size;                      // bytes a lane
    uintptr_t address[WARP];
};

struct Instruction {                    // of a warp
    uint64_t served;                    // requests that are counted
    uint64_t executed[WARP];
    std::deque<Request> open;           // the later ones
};

typedef std::map<uint64_t, Instruction>
    Instructions; // by where, and the lowest bits: is it a write, and shared

constexpr uintptr_t PAGE = 4096, SECTOR = 32, BANKS = 32;

struct Touched {                        // bytes of a page, read and written in this launch
    uint64_t bytes[2][PAGE / 64];
};

std::vector<Row>& rows() {
    static std::vector<Row>& all = *new std::vector<Row>;
    return all;
}

Row* row;                               // of the kernel that runs
std::unordered_map<const Warp*, Instructions> warps;
std::unordered_map<uintptr_t, Touched> touched;

// ------------------------------------------------------------------------------------------------
// Requests

// Sorted, each once.
std::vector<uintptr_t> units_of(const Request& r, unsigned lanes, uintptr_t unit) {
    std::vector<uintptr_t> units;
    for (; lanes; lanes &= lanes - 1) {
        uintptr_t first = r.address[__builtin_ctz(lanes)];
        for (uintptr_t u = first / unit; u <= (first + r.size - 1) / unit; u++) units.push_back(u);
    }
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    return units;
}

void count_global(const Request& r, bool write) {
    row->asked[write] += (uint64_t)__builtin_popcount(r.lanes) * r.size;
    row->sectors += units_of(r, r.lanes, SECTOR).size();
    row->fewest_sectors += (units_of(r, r.lanes, 1).size() + SECTOR - 1) / SECTOR;
}

// A bank gives one word of 4 bytes a pass. 8 bytes a lane go in two halves of the warp, 16 in four quarters.
void count_shared(const Request& r) {
    unsigned lanes_a_phase = r.size <= 4 ? 32 : r.size <= 8 ? 16 : 8;
    for (unsigned first = 0; first < WARP; first += lanes_a_phase) {
        unsigned lanes = (unsigned)(r.lanes & (((1ull << lanes_a_phase) - 1) << first));
        if (!lanes) continue;
        unsigned words[BANKS] = {}, most = 0;
        for (uintptr_t word : units_of(r, lanes, 4)) most = std::max(most, ++words[word % BANKS]);
        row->passes += most;
        row->fewest_passes++;
    }
}

void serve_first(uint64_t key, Instruction* instruction) {
    const Request& r = instruction->open.front();
    bool shared = key & 1, write = key >> 1 & 1;
    if (r.lanes && shared) count_shared(r);
    if (r.lanes && !shared) count_global(r, write);
    instruction->open.pop_front();
    instruction->served++;
}

void serve_all(const Warp* warp) {
    auto found = warps.find(warp);
    if (found == warps.end()) return;
    for (auto& [key, instruction] : found->second)
        while (!instruction.open.empty()) serve_first(key, &instruction);
    warps.erase(found);
}

// At most 16 bytes, as one lane's instruction.
void join_request(uintptr_t address, uint32_t size, uint64_t key) {
    const Warp* warp = current->warp;
    unsigned lane = current->number % WARP;
    Instruction& instruction = warps[warp][key];
    uint64_t k = std::max(instruction.executed[lane]++, instruction.served);
    while (instruction.open.size() <= k - instruction.served) instruction.open.push_back({});
    Request& r = instruction.open[k - instruction.served];
    r.lanes |= 1u << lane;
    r.size = std::max(r.size, size);
    r.address[lane] = address;
    while (!instruction.open.empty() && !(warp->live & ~instruction.open.front().lanes))
        serve_first(key, &instruction);
}

void touch(uintptr_t address, size_t size, bool write) {
    for (uintptr_t a = address; a < address + size; a++)
        touched[a / PAGE].bytes[write][a % PAGE / 64] |= 1ull << a % 64;
}

// ------------------------------------------------------------------------------------------------
// The table

std::string pair_text(uint64_t a, uint64_t b) { return std::to_string(a) + "/" + std::to_string(b); }

void print_table() {
    const char* format = "%-24s %8s %17s %17s %15s %15s %8s %8s %8s %9s\n";
    fflush(stdout);
    fprintf(stderr, "Bytes of global memory asked/distinct, sectors of 32 bytes and passes of shared memory "
                    "asked/fewest:\n");
    fprintf(stderr, format, "kernel", "launches", "read", "written", "sectors", "passes", "barriers",
            "atomics", "mma", "cp.async");
    for (const Row& r : rows())
        fprintf(stderr, format, r.kernel.c_str(), std::to_string(r.launches).c_str(),
                pair_text(r.asked[0], r.distinct[0]).c_str(), pair_text(r.asked[1], r.distinct[1]).c_str(),
                pair_text(r.sectors, r.fewest_sectors).c_str(), pair_text(r.passes, r.fewest_passes).c_str(),
                std::to_string(r.barriers).c_str(), std::to_string(r.atomics).c_str(),
                std::to_string(r.matrix).c_str(), std::to_string(r.copied).c_str());
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// Hooks

void launch_begins(const Launch& launch) {
    if (rows().empty()) atexit(print_table);
    auto same = [&](const Row& r) { return r.kernel == launch.kernel; };
    auto found = std::find_if(rows().begin(), rows().end(), same);
    if (found == rows().end())
        found = rows().insert(found, Row{launch.kernel, 0, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0});
    row = &*found;
    row->launches++;
}

void launch_ends() {
    for (auto& [page, t] : touched)
        for (int write = 0; write < 2; write++)
            for (uint64_t bits : t.bytes[write]) row->distinct[write] += (uint64_t)__builtin_popcountll(bits);
    touched.clear();
}

void block_ends(Block* block) {
    for (unsigned i = 0; i * WARP < block->threads; i++) serve_all(block->warps + i);
}

void barrier(Thread* const* threads, size_t count) {
    row->barriers++;
    for (size_t i = 0; i < count; i++)
        if (i == 0 || threads[i]->warp != threads[i - 1]->warp) serve_all(threads[i]->warp);
}

void warp_meets(Warp* warp) { serve_all(warp); }

void access(const void* p, size_t size, bool write, bool shared, uint32_t where) {
    uintptr_t address = (uintptr_t)p;
    if (!shared) touch(address, size, write);
    uint64_t key = (uint64_t)where << 2 | (uint64_t)write << 1 | (uint64_t)shared;
    for (size_t done = 0; done < size; done += 16)
        join_request(address + done, (uint32_t)std::min(size - done, (size_t)16), key);
}

void copy(const void* to, size_t size, uint32_t where) {
    row->copied += size;
    access(to, size, true, true, where);
}

void count_atomic() { row->atomics++; }
void count_matrix_instruction() { row->matrix++; }

}  // namespace profile
}  // namespace cpu_cuda
