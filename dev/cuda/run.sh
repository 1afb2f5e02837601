#!/bin/sh
# The kernel lab: every program is built and run, on a GPU by nvcc, with times, else on the CPU through dev/cpu_cuda, with what is moved
# against what must be. FILES: only these programs. LONG=1: on the CPU also without the checks, in every order, and by AddressSanitizer.
# The last line is `N passed, N failed`.
set -u
cd "$(dirname "$0")/../.." || exit 1
files=${FILES:-$(for source in dev/cuda/*.cu; do basename "$source" .cu; done)}
nvcc=${NVCC:-nvcc} gpu=yes
command -v "$nvcc" > /dev/null && nvidia-smi > /dev/null 2>&1 || gpu=
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT && trap 'exit 1' INT TERM
passed=0 failed=0
# count NAME COMMAND...: adds its `N passed, N failed`; without such a line it is one failure.
count() {
    name=$1
    shift
    "$@" > "$out/log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$out/log" | tail -n 1)
    p=${line%% *} f=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
    [ -z "$line" ] && p=0 f=1
    [ $status != 0 ] && [ "$f" = 0 ] && f=1
    [ "$f" != 0 ] && { echo "FAIL $name"; tail -n 20 "$out/log"; }
    passed=$((passed + p)) failed=$((failed + f))
}
# build FILE PROGRAM [FLAGS]
build() {
    source=$1 program=$2
    shift 2
    "$nvcc" -std=c++17 -D_GNU_SOURCE -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unused-function -Xcompiler -ffp-contract=fast "$@" \
        "dev/cuda/$source.cu" -o "$program" > "$out/log" 2>&1 && return
    echo "FAIL $source.cu does not compile"
    tail -n 20 "$out/log"
    failed=$((failed + 1))
    return 1
}

if [ -n "$gpu" ]; then
    arch=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -n | head -n 1 | tr -d .)
    for file in $files; do
        build "$file" "$out/$file" -O3 -arch="$arch" || continue
        count "$file" "$out/$file"
        "$out/$file" time
    done
else
    export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
    nvcc=dev/cpu_cuda/nvcc
    for file in $files; do
        build "$file" "$out/$file" -O1 --check || continue
        count "$file" "$out/$file"
        grep '^bits' "$out/log" > "$out/bits"
        programs="${programs:-} $out/$file"
        orders="order=random:7,lazy"
        if [ -n "${LONG:-}" ]; then
            build "$file" "$out/plain" -O1 && orders="$orders order=reverse order=random:1 order=random:2,threads=3 lazy,order=random:3"
            build "$file" "$out/address" -O1 --address && count "$file --address" "$out/address"
        fi
        for order in $orders; do
            [ -x "$out/plain" ] && run=$out/plain || run=$out/$file
            CPU_CUDA=$order count "$file, $order" "$run"
            grep '^bits' "$out/log" | cmp -s - "$out/bits" && passed=$((passed + 1)) && continue
            echo "FAIL $file: $order gives other bits"
            failed=$((failed + 1))
        done
        rm -f "$out/plain"
    done
    count profile dev/cuda/profile.py ${programs:-}
    cat "$out/log"
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
