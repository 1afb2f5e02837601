// cooperative_groups.h: a block, its tiles of at most a warp, and the grid of a cooperative launch.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
    static void sync(CPU_CUDA_HERE) { cpu_cuda::block_barrier(0, "thread_block.sync", here); }
    static unsigned thread_rank() {
        return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    }
    static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
    static constexpr unsigned largest_tile = 32;

private:
    thread_block() = default;
    friend thread_block this_thread_block();
};

inline thread_block this_thread_block() { return {}; }

// `Size` neighbouring lanes of a warp. Every lane of the tile takes part in each of its operations.
template <unsigned Size>
struct thread_block_tile {
    static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0, "a power of two, at most 32");

    static constexpr unsigned size() { return Size; }
    static constexpr unsigned largest_tile = Size;
    static unsigned thread_rank() { return thread_block::thread_rank() % Size; }
    unsigned meta_group_rank() const { return thread_block::thread_rank() % parent_size / Size; }
    unsigned meta_group_size() const { return (parent_size + Size - 1) / Size; }

    static void sync(CPU_CUDA_HERE) { cpu_cuda::warp_barrier(mask(), here); }

#define CPU_CUDA_TILE_SHUFFLE(NAME, KIND, OPERAND)                                                          \
    template <class T>                                                                                      \
    T NAME(T value, OPERAND operand, CPU_CUDA_HERE) const {                                                 \
        return cpu_cuda::shuffled(value, cpu_cuda::KIND, (int)operand, Size, mask(), "tile." #NAME, here);  \
    }
    CPU_CUDA_TILE_SHUFFLE(shfl, SHUFFLE_INDEX, int)
    CPU_CUDA_TILE_SHUFFLE(shfl_up, SHUFFLE_UP, unsigned)
    CPU_CUDA_TILE_SHUFFLE(shfl_down, SHUFFLE_DOWN, unsigned)
    CPU_CUDA_TILE_SHUFFLE(shfl_xor, SHUFFLE_XOR, unsigned)

    unsigned ballot(int predicate, CPU_CUDA_HERE) const {
        return cpu_cuda::ballot(mask(), predicate, "tile.ballot", here) >> first_lane();
    }
    int any(int predicate, CPU_CUDA_HERE) const { return ballot(predicate, here) != 0; }
    int all(int predicate, CPU_CUDA_HERE) const { return ballot(!predicate, here) == 0; }

    static unsigned first_lane() { return thread_block::thread_rank() % 32 / Size * Size; }
    static unsigned mask() { return (unsigned)((1ull << Size) - 1) << first_lane(); }

private:
    unsigned parent_size;
    explicit thread_block_tile(unsigned parent) : parent_size(parent) {}
    template <unsigned N, class Parent>
    friend thread_block_tile<N> tiled_partition(const Parent&);
};

template <unsigned N, class Parent>
thread_block_tile<N> tiled_partition(const Parent& parent) {
    static_assert(N <= Parent::largest_tile, "not larger than the group that it divides");
    return thread_block_tile<N>(parent.size());
}

struct grid_group {
    static void sync(CPU_CUDA_HERE) { cpu_cuda::grid_barrier(here); }
    static unsigned long long num_blocks() { return (unsigned long long)gridDim.x * gridDim.y * gridDim.z; }
    static unsigned long long block_rank() {
        return blockIdx.x + gridDim.x * (blockIdx.y + (unsigned long long)gridDim.y * blockIdx.z);
    }
    static unsigned long long size() { return num_blocks() * thread_block::size(); }
    static unsigned long long thread_rank() {
        return block_rank() * thread_block::size() + thread_block::thread_rank();
    }

private:
    grid_group() = default;
    friend grid_group this_grid();
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
