#!/bin/sh
# The GPU trainer's checks, on a GPU with nvcc, else on the CPU through dev/cpu_cuda: every kernel and the whole step in both precisions,
# in several orders of threads, under the checks; checkpoints from GPU to CPU and back. LONG=1: every order, and the checks over all.
#     dev/gpu_test.sh [PART]...     functions below, one after the other; none: all, in two lanes side by side
set -u
cd "$(dirname "$0")/.." || exit 1
nvcc=${NVCC:-nvcc} optimise=-O3
if ! command -v "$nvcc" > /dev/null || ! nvidia-smi > /dev/null 2>&1; then
    nvcc=dev/cpu_cuda/nvcc optimise=-O1
    echo "no GPU: the tests run on the CPU"
fi
all=$(mktemp -d) && trap 'rm -rf "$all"' EXIT && trap 'exit 1' INT TERM
export ASAN_OPTIONS=detect_leaks=0
export OMP_NUM_THREADS=1        # sums of the reference do not depend on it, and the other lane wants the other core

# What a lane uses: files of its own in $out
passed=0 failed=0
verdict() {     # NAME STATUS
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else echo "FAIL $1"; tail -n 15 "$out/log"; failed=$((failed + 1)); fi
}
compile() {     # SOURCE PROGRAM PRECISION [FLAGS]
    source=$1 program=$2 precision=$3 start=$(date +%s)
    shift 3
    "$nvcc" -std=c++17 $optimise -DPRECISION_"$precision" -D_GNU_SOURCE -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unused-function \
        -Xcompiler -ffp-contract=fast "$@" "$source" -o "$program" -lcublasLt > "$out/log" 2>&1
    verdict "$source $precision $* compiles" $?
    echo "$passed passed, $failed failed in this lane after another $(($(date +%s) - start)) s: $source $precision $* compiled"
}
# tests NAME PROGRAM [PART]...: adds its counts; its bits go to $out/bits
tests() {
    name=$1 start=$(date +%s)
    shift
    "$@" > "$out/log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$out/log" | tail -n 1)
    p=${line%% *} f=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
    [ -z "$line" ] && p=0 f=1
    [ $status != 0 ] && [ "$f" = 0 ] && f=1
    [ "$f" != 0 ] && { echo "FAIL $name"; tail -n 20 "$out/log"; }
    grep '^bits' "$out/log" > "$out/bits"
    echo "$p passed, $f failed in $(($(date +%s) - start)) s: $name"
    passed=$((passed + p)) failed=$((failed + f))
}
in_order() {    # ORDER PROGRAM NAME: same bits as in $out/first
    CPU_CUDA=$1 tests "$3, $1" "$2"
    cmp -s "$out/first" "$out/bits"
    verdict "$3: $1 gives the same bits" $?
}
lane() {        # NAME PART...: the parts one after the other; what they print and count goes to $all/NAME
    out=$all/$1.files log=$all/$1
    mkdir "$out"
    shift
    { for part; do "$part"; done; echo "$passed $failed" > "$log.count"; } > "$log" 2>&1
}

# --- every kernel and the whole step

whole() {       # PRECISION
    compile test_gpt_mhc.cu "$out/test" "$1"
    tests "$1" "$out/test"
    cp "$out/bits" "$out/first"
    [ "$1" = BF16 ] || [ -n "${LONG:-}" ] || return
    in_order order=reverse,lazy "$out/test" "$1"
    [ -n "${LONG:-}" ] || return
    for order in order=random:1 order=random:2,threads=1 order=random:3,lazy; do in_order $order "$out/test" "$1"; done
}
whole_fp32() { whole FP32; }
whole_bf16() { whole BF16; }
cudnn() {
    [ "${USE_CUDNN:-}" = 1 ] && [ $nvcc != dev/cpu_cuda/nvcc ] || return
    make -B test_gpt_mhc_cuda NVCC="$nvcc" USE_CUDNN=1 > "$out/log" 2>&1
    verdict "test_gpt_mhc.cu with cuDNN compiles" $?
    tests "attention by cuDNN" ./test_gpt_mhc_cuda attention
    tests "the step with attention by cuDNN" ./test_gpt_mhc_cuda step
}
checks() {      # MODE [FLAGS]: every kernel, and two updates of every residual mode
    [ $nvcc = dev/cpu_cuda/nvcc ] || return
    compile test_gpt_mhc.cu "$out/test" BF16 "$@"
    parts="linear products sum_columns gelu embedding readout layernorm add classifier connections coefficients attention adamw copies norm \
        rounding nonfinite two_updates"
    [ -n "${LONG:-}" ] && parts="$parts step training equal_bits resume generation"
    tests "BF16 $1" "$out/test" $parts
}
check() { checks --check; }
address() { checks --address -O0; }     # whose compiler is slow

# --- files: what either trainer saves the other goes on with

shape="--layers 2 --width 24 --heads 3 --seq 19 --batch 3 --val-batches 1 --gain-every 2 --tokens 20 --recompute 3"
last_loss() { grep '"step"' "$1/run.jsonl" | tail -n 1 | sed 's/.*"loss":\([0-9.]*\).*/\1/'; }
close() { awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(a > 0 && d <= 1e-5 * b && -d <= 1e-5 * b) }'; }
files() {
    compile train_gpt_mhc.cu "$out/gpu" FP32
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
}

# The largest batch that fits: one more is refused, and a run that goes on has as many as it had.
auto_batch() {
    [ $nvcc = dev/cpu_cuda/nvcc ] || return
    few="--layers 1 --width 8 --heads 1 --seq 8 --residual plain --val-batches 1 --gain-every 0 --tokens 2"
    CPU_CUDA=memory=97 "$out/gpu" $few --batch auto --steps 1 --out "$out/auto" --overwrite > "$out/log" 2>&1
    verdict "--batch auto" $?
    batch=$(sed -n 's/.*"type":"run".*"batch":"\([0-9]*\)".*/\1/p' "$out/auto/run.jsonl")
    grep -q "1 x $batch sequences" "$out/log" && [ "$batch" -gt 1 ]
    verdict "--batch auto says what it took: $batch" $?
    CPU_CUDA=memory=97 "$out/gpu" $few --batch $((batch + 1)) --steps 1 --out "$out/more" --overwrite > "$out/log" 2>&1
    [ $? = 2 ] && grep -q "GPU memory: found a need of 98 MiB" "$out/log"
    verdict "a batch that does not fit is refused" $?
    CPU_CUDA=memory=999 "$out/gpu" --batch auto --resume --steps 2 --out "$out/auto" > "$out/log" 2>&1 && grep -q "1 x $batch sequences" "$out/log"
    verdict "--batch auto of a run that goes on" $?
    CPU_CUDA=memory=90 "$out/gpu" $few --batch auto --steps 1 --out "$out/none" > "$out/log" 2>&1
    [ $? = 2 ] && grep -q "GPU memory: found a need" "$out/log"
    verdict "--batch auto where nothing fits" $?
}

# --- real use: 100 steps in bf16, on the built-in corpus

hundred() {
    compile train_gpt_mhc.cu "$out/gpu16" BF16
    tiny="--layers 2 --width 32 --heads 2 --seq 32 --batch 4 --steps 100 --lr 3e-3 --warmup 10 --gain-every 0 --val-every 0 --val-batches 4 --tokens 20"
    for trainer in ./train_gpt_mhc "$out/gpu16"; do
        "$trainer" $tiny --out "$out/run" --overwrite > "$out/log" 2>&1
        verdict "$trainer: 100 steps" $?
        grep '"val"' "$out/run/run.jsonl" | sed 's/.*"loss":\([0-9.]*\).*/\1/' >> "$out/hundred"
    done
    awk 'NR == 1 { a = $1 } NR == 2 { b = $1 } END { exit !(a > 0 && b < 1.02 * a && b > 0.98 * a) }' "$out/hundred"
    verdict "bf16: $(tr '\n' ' ' < "$out/hundred")after 100 steps, within 2 %" $?
}

pytorch() {
    python=${PYTHON:-/usr/bin/python3}
    if "$python" -c 'import torch' 2> /dev/null; then
        "$out/gpu" $shape --dump "$out/dump" > "$out/log" 2>&1 && "$python" dev/reference/check_dump.py "$out/dump" > "$out/log" 2>&1
        verdict "--dump agrees with PyTorch" $?
    else
        echo "skip --dump against PyTorch: found no torch, run make deps"
    fi
}

make train_gpt_mhc > "$all/log" 2>&1 || { cat "$all/log"; exit 1; }
if [ $# -gt 0 ]; then
    lanes=one
    lane one "$@"
else
    lanes="one two"
    lane one whole_bf16 cudnn check hundred &
    lane two address whole_fp32 files auto_batch pytorch &
    wait
fi
for lane in $lanes; do
    p=0 f=1                     # of a lane that did not come to its end
    cat "$all/$lane"
    [ ! -f "$all/$lane.count" ] || read -r p f < "$all/$lane.count"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
