// profile.cpp: what kernels ask of memory. Only in a check build, under CPU_CUDA=profile.
//
// A GPU serves a warp's access as one request. Here lanes run one after the other, so the k-th time that each
// lane comes to an instruction since the warp last met belongs together; requests are counted when the warp
// meets at a barrier, or at the block's end. A thread's own memory (registers, stack) takes no part, and
// volatile accesses and atomics are outside the requests.

#include "runtime.h"

#include <algorithm>
#include <bitset>
#include <map>
#include <unordered_map>

namespace cpu_cuda::profile {
namespace {

constexpr uintptr_t PAGE = 4096, SECTOR = 32, BANKS = 32;
const char* const names[COLUMNS] = {"launches", "read",    "written", "sectors", "passes",
                                    "barriers", "atomics", "mma",     "cp.async"};

struct Row {                            // of the table: a kernel
    uint64_t count[COLUMNS];
    uint64_t least[COLUMNS];            // that would do; READ, WRITTEN, SECTORS and PASSES have it
};

struct Request {
    unsigned lanes;
    uint32_t size;                      // bytes a lane
    uintptr_t address[WARP];
};

struct Instruction {                    // of a warp, since it met
    size_t executed[WARP];
    std::vector<Request> requests;
};

typedef std::tuple<uint32_t, bool, bool> Key;           // where, is it a write, and shared

std::map<std::string, Row> rows;
Row* row;                               // of the kernel that runs
std::unordered_map<const Warp*, std::map<Key, Instruction>> warps;
std::unordered_map<uintptr_t, std::bitset<PAGE>> touched[2];            // by page: bytes read, and written

// Sorted, each once.
std::vector<uintptr_t> units_of(const Request& r, unsigned lanes, uintptr_t unit) {
    std::vector<uintptr_t> units;
    each_lane(lanes, [&](int lane) {
        uintptr_t first = r.address[lane] / unit, last = (r.address[lane] + r.size - 1) / unit;
        for (uintptr_t u = first; u <= last; u++) units.push_back(u);
    });
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    return units;
}

void count_global(const Request& r, bool write) {
    row->count[READ + write] += (uint64_t)__builtin_popcount(r.lanes) * r.size;
    row->count[SECTORS] += units_of(r, r.lanes, SECTOR).size();
    row->least[SECTORS] += (units_of(r, r.lanes, 1).size() + SECTOR - 1) / SECTOR;
}

// A bank gives one word of 4 bytes a pass. 8 bytes a lane go in two halves of the warp, 16 in four quarters.
void count_shared(const Request& r) {
    unsigned lanes_a_phase = r.size <= 4 ? 32 : r.size <= 8 ? 16 : 8;
    for (unsigned first = 0; first < WARP; first += lanes_a_phase) {
        unsigned lanes = (unsigned)(r.lanes & (((1ull << lanes_a_phase) - 1) << first));
        unsigned words[BANKS] = {}, most = 0;
        for (uintptr_t word : units_of(r, lanes, 4)) most = std::max(most, ++words[word % BANKS]);
        row->count[PASSES] += most;
        row->least[PASSES] += lanes != 0;
    }
}

void print_table() {
    fflush(stdout);
    fprintf(stderr, "Bytes of global memory asked/distinct, sectors of 32 bytes and passes of shared memory "
                    "asked/fewest:\n%-24s", "kernel");
    for (const char* name : names) fprintf(stderr, " %16s", name);
    for (const auto& [kernel, r] : rows) {
        fprintf(stderr, "\n%-24s", kernel.c_str());
        for (int i = 0; i < COLUMNS; i++) {
            std::string text = std::to_string(r.count[i]);
            if (i >= READ && i <= PASSES) text += "/" + std::to_string(r.least[i]);
            fprintf(stderr, " %16s", text.c_str());
        }
    }
    fprintf(stderr, "\n");
}

}  // namespace

void launch_begins(const Launch& launch) {
    if (rows.empty()) atexit(print_table);
    row = &rows[launch.kernel];
    for (auto& pages : touched) pages.clear();
    count(LAUNCHES, 1);
}

void count(Column column, uint64_t n) {
    if (row) row->count[column] += n;
}

void warp_meets(const Warp* warp) {
    auto found = warps.find(warp);
    if (found == warps.end()) return;
    for (auto& [key, instruction] : found->second) {
        auto [where, write, shared] = key;
        for (const Request& r : instruction.requests) shared ? count_shared(r) : count_global(r, write);
    }
    warps.erase(found);
}

// At most 16 bytes are one lane's instruction.
void access(const void* p, size_t size, bool write, bool shared, uint32_t where) {
    Instruction& instruction = warps[current->warp][{where, write, shared}];
    unsigned lane = current->number % WARP;
    for (uintptr_t address = (uintptr_t)p, end = address + size; address < end; address += 16) {
        size_t k = instruction.executed[lane]++;
        if (k == instruction.requests.size()) instruction.requests.push_back({});
        Request& r = instruction.requests[k];
        r.lanes |= 1u << lane;
        r.size = std::max(r.size, (uint32_t)std::min(end - address, (uintptr_t)16));
        r.address[lane] = address;
    }
    for (uintptr_t byte = (uintptr_t)p; !shared && byte < (uintptr_t)p + size; byte++) {
        auto bit = touched[write][byte / PAGE][byte % PAGE];
        row->least[READ + write] += !bit;
        bit = true;
    }
}

}  // namespace cpu_cuda::profile
