// cuda_runtime.h: CUDA C++ for the CPU. The nvcc here includes it into every file, as the real one does.

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_cuda/engine.h"
#include "cpu_cuda/device.h"
#include "cpu_cuda/api.h"
#include "cpu_cuda/ptx.h"
