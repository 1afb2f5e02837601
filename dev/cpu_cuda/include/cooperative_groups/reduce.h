// cooperative_groups/reduce.h: a reduction over a tile. Each lane gets the result.

#pragma once

#include "../cooperative_groups.h"

namespace cooperative_groups {

template <class T>
struct plus { T operator()(T a, T b) const { return a + b; } };
template <class T>
struct less { T operator()(T a, T b) const { return b < a ? b : a; } };
template <class T>
struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };

template <unsigned Size, class T, class Operation>
T reduce(const thread_block_tile<Size>& tile, T value, Operation operation, CPU_CUDA_HERE) {
    return cpu_cuda::reduced(tile.mask(), value, operation, "reduce", here);
}

}  // namespace cooperative_groups
