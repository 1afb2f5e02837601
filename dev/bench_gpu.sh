#!/bin/sh
# Everything that a GPU must show, in one call of a few minutes: the tests on the device, then speed. Prints one Markdown report; keep it
# in dev/results/. It never stops at a failure: the rest is still measured. LLMC=folder names a built llm.c to be measured beside.
set -u
cd "$(dirname "$0")/.." || exit 1
nvcc=${NVCC:-nvcc}
if ! command -v "$nvcc" > /dev/null || ! nvidia-smi > /dev/null 2>&1; then
    echo "bench_gpu: found no nvcc or no GPU, expected both" >&2
    exit 2
fi
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT && trap 'exit 1' INT TERM
arch=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -n | head -n 1 | tr -d .)
echo "# $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
echo
nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv | sed 's/^/    /'
"$nvcc" --version | tail -n 2 | sed 's/^/    /'
echo "    $(git describe --always --dirty), $(date -u +%Y-%m-%d)"

echo; echo "## Tests on the device"; echo
echo "| test | result |"; echo "|---|---|"
# test NAME SOURCE [FLAGS]
device_test() {
    name=$1 source=$2
    shift 2
    if "$nvcc" -std=c++17 -O2 -arch="$arch" -D_GNU_SOURCE -Xcompiler -fopenmp "$@" "$source" -o "$out/test" -lcublasLt -lnccl > "$out/log" 2>&1; then
        timeout 120 "$out/test" > "$out/log" 2>&1
        echo "| $name | $(tail -n 1 "$out/log") |"
        grep '^FAIL' "$out/log" | head -n 10 | sed 's/^/| | /; s/$/ |/'
    else echo "| $name | does not compile: $(grep -m1 error "$out/log") |"
    fi
}
for source in dev/cpu_cuda/test/test_*.cu; do
    case $source in *test_profile.cu) continue ;; esac          # profiles are the CPU's
    device_test "$(basename "$source" .cu)" "$source"
done
for precision in FP32 BF16; do device_test "trainer, $precision" test_gpt_mhc.cu -DPRECISION_$precision; done

echo; echo "## Training, bf16"; echo
if ! make train_gpt_mhc_cuda NVCC="$nvcc" ARCH="$arch" > "$out/log" 2>&1; then
    tail -n 5 "$out/log"
    exit 1
fi
echo "| model | T | batch | residual | ms a step | tokens/s | MFU % | mHC over plain | tokens/J |"; echo "|---|---|---|---|---|---|---|---|---|"
field() { grep '"type":"step"' "$1/run.jsonl" | tail -n 8 | sed "s/.*\"$2\":\([0-9.e+-]*\).*/\1/" | sort -g | sed -n 5p; }
# shape MODEL SEQ BATCH
shape() {
    plain=
    for residual in plain mhc; do
        nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits -lms 200 > "$out/power" 2> /dev/null & meter=$!
        timeout 100 ./train_gpt_mhc_cuda --model "$1" --vocab 50257 --seq "$2" --batch "$3" --residual $residual --steps 12 --gain-every 0 \
            --val-batches 1 --sample-every 0 --tokens 1 --save-every 0 --out "$out/run" --overwrite > "$out/log" 2>&1
        status=$?
        kill $meter 2> /dev/null
        if [ $status != 0 ]; then
            echo "| $1 | $2 | $3 | $residual | $(tail -n 1 "$out/log") | | | | |"
            continue
        fi
        ms=$(field "$out/run" step_ms) rate=$(field "$out/run" tok_s) mfu=$(field "$out/run" mfu)
        [ $residual = plain ] && plain=$ms
        awk -v m="$1" -v T="$2" -v B="$3" -v r=$residual -v ms="$ms" -v rate="$rate" -v mfu="$mfu" -v plain="${plain:-0}" \
            -v watts="$(sort -g "$out/power" | awk '{ a[NR] = $1 } END { print a[int(NR * 0.75) + 1] + 0 }')" \
            'BEGIN { printf "| %s | %d | %d | %s | %.1f | %.0f | %.1f | %s | %s |\n", m, T, B, r, ms, rate, 100 * mfu,
                     r == "mhc" && plain > 0 ? sprintf("%+.1f %%", 100 * (ms / plain - 1)) : "", watts > 0 ? sprintf("%.0f", rate / watts) : "" }'
    done
}
shape gpt2 1024 32
shape gpt2-medium 1024 16
shape gpt2-xl 1024 4
shape gpt2 4096 8
shape gpt2 8192 4

echo; echo "## Pipelines whose ranks share the GPU, fp32, gpt2, 8 micro-batches of 2 sequences"; echo
losses() { grep '"type":"step"' "$1/run.jsonl" | sed 's/.*"loss":\([^,]*\).*/\1/'; }
# pipeline RANKS OPTION...: a row; the first run is what others are compared with
pipeline() {
    P=$1
    shift
    mpi=
    [ "$P" -gt 1 ] && mpi="mpirun --allow-run-as-root --bind-to none --oversubscribe -np $P"
    if timeout 300 $mpi "$out/fp32" --model gpt2 --vocab 50257 --batch 2 --micro-batches 8 --steps 8 --gain-every 0 --val-batches 1 \
        --sample-every 0 --tokens 1 --save-every 0 --out "$out/run" --overwrite "$@" > "$out/log" 2>&1; then
        losses "$out/run" > "$out/losses"
        [ -s "$out/first" ] || cp "$out/losses" "$out/first"
        cmp -s "$out/losses" "$out/first" && equal=equal || equal=DIFFER
        echo "| $P | $* | $(field "$out/run" step_ms) | $equal |"
    else echo "| $P | $* | $(tail -n 1 "$out/log") | |"
    fi
}
if make GPU_TRAINER="$out/fp32" "$out/fp32" NVCC="$nvcc" ARCH="$arch" PRECISION=FP32 > "$out/log" 2>&1; then
    echo "| ranks | options | ms a step | losses |"; echo "|---|---|---|---|"
    pipeline 1 --recompute 24
    for priority in none post recompute all; do pipeline 1 --pipeline dualpipev --priority $priority; done
    for P in 2 4; do
        pipeline $P --pipeline 1f1b
        pipeline $P --pipeline dualpipev
    done
else tail -n 5 "$out/log"
fi

echo; echo "## Where the time of a step goes (gpt2, mHC)"; echo
if command -v nsys > /dev/null; then
    nsys profile -o "$out/profile" ./train_gpt_mhc_cuda --model gpt2 --vocab 50257 --batch 16 --steps 4 --gain-every 0 --val-batches 1 --tokens 1 \
        --save-every 0 --out "$out/run" --overwrite > "$out/log" 2>&1
    nsys stats --report cuda_gpu_kern_sum --format table "$out/profile.nsys-rep" 2> /dev/null | head -n 30 | sed 's/^/    /'
else echo "found no nsys, expected NVIDIA's profiler"
fi
if [ -n "${LLMC:-}" ] && [ -x "$LLMC/train_gpt2cu" ]; then
    echo; echo "## llm.c on the same shapes"; echo
    (cd "$LLMC" && for b in 32; do timeout 100 ./train_gpt2cu -e d12 -b $b -t 1024 -d $((b * 1024)) -x 12 -v 0 -s 0; done) 2>&1 | grep '^step' | tail -n 3 |
        sed 's/^/    /'
fi
