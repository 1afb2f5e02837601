#!/bin/sh
# nanoGPT's example for a CPU: 0.8 M parameters, tiny Shakespeare, 2000 steps to a validation loss of 1.88.
# Its characters and our bytes are the same symbols; validation here is all of the last tenth of the text.
#     sh data/shakespeare.sh
#     sh scripts/run_shakespeare_cpu.sh data/tinyshakespeare.txt
#     sh scripts/run_shakespeare_cpu.sh data/tinyshakespeare.txt --residual plain --out out/shakespeare_plain
# Options after the text win over the recipe; --resume goes on with a run that was stopped.
set -eu

if [ $# -eq 0 ] || [ ! -f "$1" ]; then
    echo "${1:-no text}: found no file, expected tiny Shakespeare, fetch it with: sh data/shakespeare.sh" >&2
    exit 2
fi
text=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
make -s train_gpt_mhc
mkdir -p out
cat > out/shakespeare_cpu.cfg <<'RECIPE'
layers = 4
heads = 4
width = 128
seq = 64
batch = 12
steps = 2000
lr = 1e-3
min-lr-frac = 0.1
warmup = 100
beta2 = 0.99
weight-decay = 0.1
grad-clip = 1
val-every = 500
val-batches = 146   # 12 x 64 bytes each: all of the last tenth
log-every = 10
out = out/shakespeare
RECIPE
exec ./train_gpt_mhc --config out/shakespeare_cpu.cfg --data "$text" "$@"
