#!/bin/sh
# Compiles every .cu for each architecture with warnings as errors, and links what the trainer may link. Needs nvcc, no GPU.
# The last line is `N passed, N failed`.
set -u
nvcc=${NVCC:-nvcc}
if ! command -v "$nvcc" > /dev/null; then
    echo "skip gpu-compile: found no nvcc, expected the CUDA toolkit on PATH"
    echo "0 passed, 0 failed"
    exit 0
fi
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && trap 'exit 1' INT TERM
passed=0 failed=0
compiles() {
    name=$1
    shift
    if "$nvcc" "$@" > "$folder/log" 2>&1; then
        echo "ok   $name"
        passed=$((passed + 1))
    else
        echo "FAIL $name"
        tail -n 20 "$folder/log"
        failed=$((failed + 1))
    fi
}

architectures=
for architecture in sm_80 sm_90 sm_100; do
    "$nvcc" --list-gpu-code | grep -qx $architecture && architectures="$architectures -gencode arch=compute_${architecture#sm_},code=$architecture"
done
for source in *.cu dev/cuda/*.cu dev/cpu_cuda/test/*.cu; do
    [ -f "$source" ] || continue
    for precision in BF16 FP32; do
        case $source$precision in dev/*FP32) continue ;; esac
        targets=$architectures
        [ "$source" = test_gpt_mhc.cu ] && targets="-gencode arch=compute_80,code=sm_80"      # the trainer's kernels again
        compiles "$source $precision$(echo "$targets" | sed 's/-gencode arch=[a-z0-9_]*,code=/ /g')" -std=c++17 -O2 -t 2 $targets \
            -DPRECISION_$precision -D_GNU_SOURCE -Werror all-warnings \
            -Xcompiler -Wall,-Wextra,-Wno-unused-function,-fopenmp -c "$source" -o "$folder/out.o"
    done
done
# link NAME HEADER CALL LIBRARY
link() {
    printf '#include <%s>\nint main() { return (int)(size_t)%s == 0; }\n' "$2" "$3" > "$folder/link.cu"
    compiles "links $1" "$folder/link.cu" -o "$folder/link" "$4"
}
frontend=${CUDNN_FRONTEND:-build/cudnn_frontend/include}
present() {
    printf '#include <%s>\n' "$1" > "$folder/present.cu"
    "$nvcc" -isystem "$frontend" -c "$folder/present.cu" -o "$folder/present.o" > /dev/null 2>&1
}
link cuBLASLt cublasLt.h cublasLtGetVersion -lcublasLt
if present nccl.h; then link NCCL nccl.h ncclGetVersion -lnccl; else echo "skip NCCL: found no nccl.h"; fi
if present cudnn.h && present cudnn_frontend_version.h; then
    compiles "attention by cuDNN" -x c++ -std=c++17 -Xcompiler -Wall,-Wextra,-Werror -DCUDNN_IMPLEMENTATION -isystem "$frontend" \
        -c dev/cuda/attention_cudnn.h -o "$folder/attention.o"
    compiles "links cuDNN" -std=c++17 -arch=sm_80 -DPRECISION_BF16 -DUSE_CUDNN -D_GNU_SOURCE -Werror all-warnings \
        -Xcompiler -Wall,-Wextra,-Wno-unused-function,-fopenmp test_gpt_mhc.cu -o "$folder/link" "$folder/attention.o" \
        -lcublasLt -lcudnn -lnvrtc
else
    echo "skip cuDNN: found no cudnn.h and cudnn_frontend_version.h, run make deps"
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
