// cooperative_groups/reduce.h: a reduction over a tile. Each lane gets the result.

#pragma once

#include "../cooperative_groups.h"

namespace cooperative_groups {

#define CPU_CUDA_OPERATION(NAME, RESULT)                \
    template <class T>                                  \
    struct NAME {                                       \
        T operator()(T a, T b) const { return RESULT; } \
    };
CPU_CUDA_OPERATION(plus, a + b)
CPU_CUDA_OPERATION(less, b < a ? b : a)
CPU_CUDA_OPERATION(greater, a < b ? b : a)

template <unsigned Size, class T, class Operation>
T reduce(const thread_block_tile<Size>& tile, T value, Operation operation, CPU_CUDA_HERE) {
    return cpu_cuda::reduced(tile.mask(), value, operation, "reduce", here);
}

}  // namespace cooperative_groups
