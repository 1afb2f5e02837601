#!/bin/sh
# The GPU trainer's checks, on a GPU with nvcc, else on the CPU through dev/cpu_cuda: every kernel and the whole step in both precisions,
# in several orders of threads, under the checks; checkpoints from GPU to CPU and back. LONG=1: every order, and the checks over all.
set -u
cd "$(dirname "$0")/.." || exit 1
nvcc=${NVCC:-nvcc} optimise=-O3
if ! command -v "$nvcc" > /dev/null || ! nvidia-smi > /dev/null 2>&1; then
    nvcc=dev/cpu_cuda/nvcc optimise=-O1
    echo "no GPU: the tests run on the CPU"
fi
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT && trap 'exit 1' INT TERM
passed=0 failed=0
verdict() {     # NAME STATUS
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else echo "FAIL $1"; tail -n 15 "$out/log"; failed=$((failed + 1)); fi
}
compile() {     # SOURCE PROGRAM PRECISION [FLAGS]
    source=$1 program=$2 precision=$3
    shift 3
    "$nvcc" -std=c++17 $optimise -DPRECISION_"$precision" -D_GNU_SOURCE -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unused-function \
        -Xcompiler -ffp-contract=fast "$@" "$source" -o "$program" -lcublasLt > "$out/log" 2>&1
    verdict "$source $precision $* compiles" $?
}
# tests NAME PROGRAM [PART]: adds its counts; its bits go to $out/bits
tests() {
    start=$(date +%s)
    "$2" ${3:+"$3"} > "$out/log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$out/log" | tail -n 1)
    p=${line%% *} f=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
    [ -z "$line" ] && p=0 f=1
    [ $status != 0 ] && [ "$f" = 0 ] && f=1
    [ "$f" != 0 ] && { echo "FAIL $1"; tail -n 20 "$out/log"; }
    grep '^bits' "$out/log" > "$out/bits"
    echo "$p passed, $f failed in $(($(date +%s) - start)) s: $1"
    passed=$((passed + p)) failed=$((failed + f))
}
in_order() {    # ORDER PROGRAM NAME: same bits as in $out/first
    CPU_CUDA=$1 tests "$3, $1" "$2"
    cmp -s "$out/first" "$out/bits"
    verdict "$3: $1 gives the same bits" $?
}

for precision in FP32 BF16; do
    compile test_gpt_mhc.cu "$out/test" $precision
    tests "$precision" "$out/test"
    cp "$out/bits" "$out/first"
    [ $precision = BF16 ] || [ -n "${LONG:-}" ] || continue
    in_order order=reverse,lazy "$out/test" $precision
    [ -z "${LONG:-}" ] && continue
    for order in order=random:1 order=random:2,threads=1 order=random:3,lazy; do in_order $order "$out/test" $precision; done
done

if [ "${USE_CUDNN:-}" = 1 ] && [ $nvcc != dev/cpu_cuda/nvcc ]; then
    make -B test_gpt_mhc_cuda NVCC="$nvcc" USE_CUDNN=1 > "$out/log" 2>&1
    verdict "test_gpt_mhc.cu with cuDNN compiles" $?
    tests "attention by cuDNN" ./test_gpt_mhc_cuda attention
    tests "the step with attention by cuDNN" ./test_gpt_mhc_cuda step
fi

if [ $nvcc = dev/cpu_cuda/nvcc ]; then
    for mode in --check --address; do
        compile test_gpt_mhc.cu "$out/test" BF16 $mode
        parts="linear embedding readout layernorm classifier sum_columns connections attention adamw norm rounding nonfinite"
        [ -n "${LONG:-}" ] && parts="$parts step training equal_bits resume generation"
        for part in $parts; do ASAN_OPTIONS=detect_leaks=0 tests "BF16 $mode $part" "$out/test" $part; done
    done
fi

# --- files: what either trainer saves the other goes on with
make train_gpt_mhc > "$out/log" 2>&1
compile train_gpt_mhc.cu "$out/gpu" FP32
shape="--layers 2 --width 24 --heads 3 --seq 19 --batch 3 --val-batches 1 --gain-every 2 --tokens 20 --recompute 3"
last_loss() { grep '"step"' "$1/run.jsonl" | tail -n 1 | sed 's/.*"loss":\([0-9.]*\).*/\1/'; }
close() { awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(a > 0 && d <= 1e-5 * b && -d <= 1e-5 * b) }'; }
for residual in none plain hc mhc ihc; do
    ./train_gpt_mhc $shape --residual $residual --steps 4 --out "$out/cpu" --overwrite > "$out/log" 2>&1
    "$out/gpu" $shape --residual $residual --steps 4 --out "$out/both" --overwrite > "$out/log" 2>&1
    verdict "$residual: four steps" $?
    close "$(last_loss "$out/both")" "$(last_loss "$out/cpu")"
    verdict "$residual: the loss of the CPU" $?
    ./train_gpt_mhc --resume --out "$out/both" --steps 6 > "$out/log" 2>&1 &&
        "$out/gpu" --resume --out "$out/both" --steps 8 > "$out/log" 2>&1 && ./train_gpt_mhc --resume --out "$out/cpu" --steps 8 > "$out/log" 2>&1
    verdict "$residual: resumed on the CPU, and on the GPU again" $?
    close "$(last_loss "$out/both")" "$(last_loss "$out/cpu")"
    verdict "$residual: to the loss of a run on the CPU alone" $?
done
"$out/gpu" --out "$out/both" --eval > "$out/a" 2> "$out/log" && ./train_gpt_mhc --out "$out/both" --eval > "$out/b" 2> "$out/log" &&
    close "$(cut -d' ' -f3 "$out/a")" "$(cut -d' ' -f3 "$out/b")"
verdict "--eval says the same" $?
"$out/gpu" --out "$out/both" --generate "Once" --tokens 20 --temperature 0 > "$out/a" 2> "$out/log" &&
    ./train_gpt_mhc --out "$out/both" --generate "Once" --tokens 20 --temperature 0 > "$out/b" 2> "$out/log" && cmp "$out/a" "$out/b" > "$out/log"
verdict "--generate says the same" $?

# --- real use: 100 steps in bf16, on the built-in corpus
compile train_gpt_mhc.cu "$out/gpu16" BF16
tiny="--layers 2 --width 32 --heads 2 --seq 32 --batch 4 --steps 100 --lr 3e-3 --warmup 10 --gain-every 0 --val-every 0 --val-batches 4 --tokens 20"
for trainer in ./train_gpt_mhc "$out/gpu16"; do
    "$trainer" $tiny --out "$out/run" --overwrite > "$out/log" 2>&1
    verdict "$trainer: 100 steps" $?
    grep '"val"' "$out/run/run.jsonl" | sed 's/.*"loss":\([0-9.]*\).*/\1/' >> "$out/hundred"
done
awk 'NR == 1 { a = $1 } NR == 2 { b = $1 } END { exit !(a > 0 && b < 1.02 * a && b > 0.98 * a) }' "$out/hundred"
verdict "bf16: $(tr '\n' ' ' < "$out/hundred")after 100 steps, within 2 %" $?

python=${PYTHON:-/usr/bin/python3}
if "$python" -c 'import torch' 2> /dev/null; then
    "$out/gpu" $shape --dump "$out/dump" > "$out/log" 2>&1 && "$python" dev/reference/check_dump.py "$out/dump" > "$out/log" 2>&1
    verdict "--dump agrees with PyTorch" $?
else
    echo "skip --dump against PyTorch: found no torch, run make deps"
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
