// cooperative_groups.h: a block, its tiles of at most a warp, and the grid of a cooperative launch.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
public:
    static void sync(CPU_CUDA_HERE) {
        cpu_cuda::block_barrier(cpu_cuda::VOTE_NONE, 0, "thread_block.sync", here);
    }
    static unsigned thread_rank() {
        return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    }
    static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned num_threads() { return size(); }
    static dim3 group_index() { return blockIdx; }
    static dim3 thread_index() { return threadIdx; }
    static dim3 group_dim() { return blockDim; }
    static dim3 dim_threads() { return blockDim; }

private:
    thread_block() = default;
    friend thread_block this_thread_block();
};

inline thread_block this_thread_block() { return thread_block(); }

// `Size` neighbouring lanes of a warp. Every lane of the tile takes part in each of its operations.
template <unsigned Size, class Parent = void>
class thread_block_tile {
    static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0, "a power of two, at most 32");

public:
    static constexpr unsigned size() { return Size; }
    static constexpr unsigned num_threads() { return Size; }
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
#undef CPU_CUDA_TILE_SHUFFLE

    int any(int predicate, CPU_CUDA_HERE) const {
        return cpu_cuda::ballot(mask(), predicate, "tile.any", here) != 0;
    }
    int all(int predicate, CPU_CUDA_HERE) const {
        return cpu_cuda::ballot(mask(), predicate, "tile.all", here) == mask();
    }
    unsigned ballot(int predicate, CPU_CUDA_HERE) const {
        return cpu_cuda::ballot(mask(), predicate, "tile.ballot", here) >> first_lane();
    }

    // The tile's lanes in its warp.
    static unsigned first_lane() { return thread_block::thread_rank() % 32 / Size * Size; }
    static unsigned mask() { return (Size == 32 ? ~0u : (1u << Size) - 1) << first_lane(); }

private:
    unsigned parent_size;

    explicit thread_block_tile(unsigned parent) : parent_size(parent) {}
    template <unsigned N>
    friend thread_block_tile<N, thread_block> tiled_partition(const thread_block&);
    template <unsigned N, unsigned M, class P>
    friend thread_block_tile<N, thread_block_tile<M, P>> tiled_partition(const thread_block_tile<M, P>&);
};

template <unsigned N>
thread_block_tile<N, thread_block> tiled_partition(const thread_block&) {
    return thread_block_tile<N, thread_block>(thread_block::size());
}

template <unsigned N, unsigned M, class P>
thread_block_tile<N, thread_block_tile<M, P>> tiled_partition(const thread_block_tile<M, P>&) {
    static_assert(N <= M, "a tile is not larger than the group that it divides");
    return thread_block_tile<N, thread_block_tile<M, P>>(M);
}

class grid_group {
public:
    static void sync(CPU_CUDA_HERE) { cpu_cuda::grid_barrier(here); }
    static unsigned long long num_blocks() { return (unsigned long long)gridDim.x * gridDim.y * gridDim.z; }
    static unsigned long long block_rank() {
        return blockIdx.x + gridDim.x * (blockIdx.y + (unsigned long long)gridDim.y * blockIdx.z);
    }
    static unsigned long long thread_rank() {
        return block_rank() * thread_block::size() + thread_block::thread_rank();
    }
    static unsigned long long size() { return num_blocks() * thread_block::size(); }
    static unsigned long long num_threads() { return size(); }
    static dim3 dim_blocks() { return gridDim; }
    static dim3 group_dim() { return gridDim; }
    static dim3 block_index() { return blockIdx; }

private:
    grid_group() = default;
    friend grid_group this_grid();
};

inline grid_group this_grid() { return grid_group(); }

template <class Group>
void sync(const Group&, CPU_CUDA_HERE) {
    Group::sync(here);
}

}  // namespace cooperative_groups
