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
jobs=0
# compiles NAME ARGUMENTS: two at a time; what became of it goes to $folder/result.NUMBER
compiles() {
    jobs=$((jobs + 1))
    compile_job "$folder/result.$jobs" "$@" &
    [ $((jobs % 2)) = 1 ] || wait
}
compile_job() {
    result=$1 name=$2
    shift 2
    if "$nvcc" "$@" > "$result.log" 2>&1; then echo "ok   $name" > "$result"; else { echo "FAIL $name"; tail -n 20 "$result.log"; } > "$result"; fi
}

architectures=
for architecture in sm_80 sm_90 sm_100; do
    "$nvcc" --list-gpu-code | grep -qx $architecture && architectures="$architectures -gencode arch=compute_${architecture#sm_},code=$architecture"
done
architectures=${architectures# -gencode }
for source in *.cu dev/cuda/*.cu dev/cpu_cuda/test/*.cu; do
    [ -f "$source" ] || continue
    for precision in BF16 FP32; do
        case $source$precision in dev/*FP32) continue ;; esac
        targets="-gencode $architectures"
        case $source in             # the tests have the trainer's kernels: they do for the first architecture
            test_gpt_mhc.cu) targets="-gencode ${architectures%% -gencode*}" ;;
            train_gpt_mhc.cu) targets="-gencode ${architectures#* -gencode }" ;;
        esac
        compiles "$source $precision$(echo "$targets" | sed 's/-gencode arch=[a-z0-9_]*,code=/ /g')" -std=c++17 -O1 $targets \
            -DPRECISION_$precision -D_GNU_SOURCE -Werror all-warnings \
            -Xcompiler -Wall,-Wextra,-Wno-unused-function,-fopenmp -c "$source" -o /dev/null     # -O is the host's alone
    done
done
# link NAME HEADER CALL LIBRARY
link() {
    printf '#include <%s>\nint main() { return (int)(size_t)%s == 0; }\n' "$2" "$3" > "$folder/$1.cu"
    compiles "links $1" "$folder/$1.cu" -o "$folder/$1" "$4"
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
    wait
    compiles "links cuDNN" -std=c++17 -O1 -arch=sm_80 -DPRECISION_BF16 -DUSE_CUDNN -D_GNU_SOURCE -Werror all-warnings \
        -Xcompiler -Wall,-Wextra,-Wno-unused-function,-fopenmp test_gpt_mhc.cu -o "$folder/link" "$folder/attention.o" \
        -lcublasLt -lcudnn -lnvrtc
else
    echo "skip cuDNN: found no cudnn.h and cudnn_frontend_version.h, run make deps"
fi
wait
for job in $(seq $jobs); do cat "$folder/result.$job"; done | tee "$folder/all"
failed=$((jobs - $(grep -c '^ok   ' "$folder/all")))
echo "$((jobs - failed)) passed, $failed failed"
[ $failed = 0 ]
