#!/bin/sh
# Pipelines in the GPU trainer, on a GPU with nvcc, else on the CPU through dev/cpu_cuda, there with streams that put
# work off as long as they may: ranks compute what one alone does, as threads of a process and under mpirun, where
# messages pass through the host and where NCCL has them.
set -u
cd "$(dirname "$0")/.." || exit 1
nvcc=${NVCC:-nvcc} optimise=-O3
if ! command -v "$nvcc" > /dev/null || ! nvidia-smi > /dev/null 2>&1; then
    nvcc=dev/cpu_cuda/nvcc optimise=-O1
    echo "no GPU: the tests run on the CPU"
fi
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT && trap 'exit 1' INT TERM
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none
passed=0 failed=0
verdict() {     # NAME STATUS
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else echo "FAIL $1"; tail -n 5 "$out/log"; failed=$((failed + 1)); fi
}
compile() {     # PROGRAM PRECISION [COMPILER]
    make GPU_TRAINER="$out/$1" "$out/$1" NVCC="${3:-$nvcc}" NVCC_OPT=$optimise PRECISION="$2" > "$out/log" 2>&1
    verdict "$1 compiles" $?
}

i=0
while [ $i -lt 500 ]; do
    echo "in year $i the river took $((i * i % 997)) leaves, $((i * 7 % 13)) boats and a song to the sea"
    i=$((i + 1))
done > "$out/text.txt"
small="--layers 3 --width 24 --heads 3 --seq 19 --batch 2 --streams 2"
shape="--data $out/text.txt --steps 2 --warmup 0 --lr 3e-3"
quiet="--val-batches 2 --val-every 1 --sample-every 0 --gain-every 2 --tokens 1 --overwrite"

# train FOLDER PROGRAM OPTION...
train() {
    folder=$out/$1 program=$out/$2
    shift 2
    timeout 120 ${ranks:+mpirun $oversubscribe -np $ranks} "$program" $small $shape $quiet --out "$folder" "$@" > "$out/log" 2>&1
}
# What a run has computed: its checkpoint, the losses of its validations, gains
results() { cat "$out/$1"/step_*2.safetensors; grep -E '"(val|gain)"' "$out/$1/run.jsonl"; }
# same REFERENCE PROGRAM OPTION...: to the bit what the run in that folder computed
same() {
    reference=$1
    shift
    train ours "$@" && results ours > "$out/a" && results "$reference" > "$out/b" && cmp "$out/a" "$out/b" >> "$out/log"
    verdict "${CPU_CUDA:+CPU_CUDA=$CPU_CUDA }${ranks:+mpirun -np $ranks }$*: the bits of $reference" $?
}
# first_moments A B: after the first step, of each tensor: the largest difference over the largest number
cat > "$out/first_moments.py" << 'END'
import array, json, sys

def moments(path):
    data = open(path, 'rb').read()
    size = int.from_bytes(data[:8], 'little')
    for name, tensor in json.loads(data[8:8 + size]).items():
        if name.startswith('adam_m.'):
            first, last = tensor['data_offsets']
            yield name, array.array('f', data[8 + size + first:8 + size + last])

a, b = (dict(moments(path)) for path in sys.argv[1:])
assert a.keys() == b.keys() and a
for name in a:
    error = max(abs(x - y) for x, y in zip(a[name], b[name]))
    assert error <= 1e-6 * max(map(abs, b[name])), (name, error)
END
# near REFERENCE PROGRAM OPTION...: the gradients of its first step, but for the order of sums: as in host/test_pipeline.c
near() {
    reference=$1
    shift
    train ours "$@" --save-every 1 &&
        ${PYTHON:-/usr/bin/python3} "$out/first_moments.py" "$out/ours/step_00000001.safetensors" \
            "$out/$reference/step_00000001.safetensors" >> "$out/log" 2>&1
    verdict "${ranks:+mpirun -np $ranks }$*: the gradients of $reference" $?
}
says() { grep -q "^ranks: exchange $1" "$out/log"; verdict "${ranks:+mpirun -np $ranks }ranks exchange $1" $?; }

# --- threads of a process

ranks=
compile fp32 FP32
train alone fp32 --micro-batches 4 --save-every 1
verdict "one rank" $?
train alone_hc fp32 --micro-batches 3 --residual hc
verdict "one rank, hc" $?
train alone_plain fp32 --micro-batches 3 --residual plain
verdict "one rank, plain" $?
export CPU_CUDA=threads=1,lazy
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 2
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 2 --recompute 1 --priority post
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 2 --pp-layers 0,2,1,0 --recompute 3 --priority all
same alone fp32 --micro-batches 4 --pipeline 1f1b --ranks 2
same alone fp32 --micro-batches 4 --pipeline 1f1b --ranks 3 --recompute 1 --priority recompute
CPU_CUDA=threads=1,lazy,order=random:3
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 2 --priority all
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 1 --priority all
same alone fp32 --micro-batches 4 --pipeline 1f1b --ranks 2
CPU_CUDA=threads=1
same alone fp32 --micro-batches 4 --pipeline dualpipev --ranks 2
same alone_hc fp32 --micro-batches 3 --residual hc --pipeline dualpipev --ranks 2 --priority all
same alone_plain fp32 --micro-batches 3 --residual plain --pipeline 1f1b --ranks 2 --priority all
near alone fp32 --micro-batches 4 --pipeline dualpipe --ranks 2
train dualpipe fp32 --micro-batches 4 --pipeline dualpipe --ranks 2
verdict "dualpipe" $?
CPU_CUDA=threads=1,lazy
same dualpipe fp32 --micro-batches 4 --pipeline dualpipe --ranks 2

compile bf16 BF16
train alone_bf16 bf16 --micro-batches 4
verdict "one rank, bf16" $?
same alone_bf16 bf16 --micro-batches 4 --pipeline dualpipev --ranks 2
same alone_bf16 bf16 --micro-batches 4 --pipeline 1f1b --ranks 2 --priority all

if [ $nvcc = dev/cpu_cuda/nvcc ]; then
    whole=$small
    compile checked FP32 "$nvcc --check"
    small="--layers 2 --width 8 --heads 2 --seq 7 --batch 1 --streams 2"
    train ours checked --micro-batches 3 --pipeline dualpipev --ranks 2 --priority all
    verdict "dualpipev under the checks" $?
    small=$whole
fi

# --- processes

CPU_CUDA=threads=1
oversubscribe=
mpirun --version 2> /dev/null | grep -qE 'Open ?(MPI|RTE)' && oversubscribe="--oversubscribe --bind-to none"
if ! ldd "$out/fp32" | grep -q libmpi; then echo "skip mpirun: found no MPI, make deps installs one"
else
    ranks=2
    for CPU_CUDA in threads=1,devices=1 threads=1 threads=1,lazy; do
        by="by NCCL"
        case $CPU_CUDA in *devices=1) by="through host memory" ;; esac
        same alone fp32 --micro-batches 4 --pipeline 1f1b
        [ $nvcc = dev/cpu_cuda/nvcc ] && says "$by"
        same dualpipe fp32 --micro-batches 4 --pipeline dualpipe --priority all
        near alone fp32 --micro-batches 2
        [ "$CPU_CUDA" = threads=1,devices=1 ] && train replicas fp32 --micro-batches 2 && results replicas > "$out/c"
        same replicas fp32 --micro-batches 2
    done
    same alone fp32 --micro-batches 4 --pipeline dualpipev --priority all
    ranks=3
    same alone fp32 --micro-batches 4 --pipeline dualpipev --pp-layers 1,0,0,2,0,0
    ranks=2
    same alone_bf16 bf16 --micro-batches 4 --pipeline 1f1b
    train ours bf16 --micro-batches 2
    mv "$out/ours" "$out/replicas_bf16"
    CPU_CUDA=threads=1,devices=1
    same replicas_bf16 bf16 --micro-batches 2
    CPU_CUDA=threads=1
    ranks=4
    near alone fp32 --micro-batches 2 --pipeline dualpipev --ranks 2
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
