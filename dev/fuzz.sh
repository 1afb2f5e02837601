#!/bin/sh
# dev/fuzz.sh [SECONDS]: damaged files for every parser, 20 seconds each: clang's libFuzzer with the address
# and undefined-behaviour sanitizers. A parser has its target in its own header, behind FUZZING.
seconds=${1:-20}
. dev/testlib.sh

cat > "$work/probe.c" << 'C'
int LLVMFuzzerTestOneInput(const unsigned char* data, unsigned long size);
int LLVMFuzzerTestOneInput(const unsigned char* data, unsigned long size) { return data && size > 1u << 30; }
C
sanitizers="-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
flags="-x c -std=c11 -O1 -g $sanitizers -DFUZZING -D_GNU_SOURCE"
if ! clang $flags "$work/probe.c" -o "$work/probe" 2> "$work/log"; then
    skip "fuzzing" "clang cannot link -fsanitize=fuzzer,address,undefined (make deps installs clang)"
    finish
fi

# Valid files to start from, by the name of the header that reads them; others start from nothing.
seed() {
    case $1 in
    bpe) write_tokenizer > "$2/tokenizer" ;;
    tokens)
        write_tokens 2 | write_shard 20240520 1 32 > "$2/shard16"
        write_tokens 2 | write_shard 20240801 7 16 > "$2/shard32"
        ;;
    safetensors)            # two bytes for the length of the data, then the header
        for file in dev/reference/golden/mhc.safetensors dev/reference/golden/gpt2_hf.safetensors \
            "$work"/run/step_*; do
            header=$(($(od -An -tu1 -N 1 "$file") + 256 * $(od -An -tu1 -j 1 -N 1 "$file")))
            data=$(($(wc -c < "$file") - header - 8))
            byte $((data & 255)) $((data >> 8 & 255)) > "$2/$(basename "$file")"
            tail -c +9 "$file" | head -c $header >> "$2/$(basename "$file")"
        done
        printf '\004\000{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"\\u00e9":""}}' \
            > "$2/small"
        ;;
    runlog) { byte 3; cat "$work/run/run.jsonl"; } > "$2/log" ;;
    options)
        "$trainer" --help | sed -n 's/^  --\([a-z0-9-]*\) .*(default \([^ ]*\))$/\1 = \2/p' > "$2/every"
        printf '# a run\nmodel = d12\nlr=1e-3 # peak\nhc-maps = pre,res\nrecompute = auto\n' \
            > "$2/some"
        ;;
    esac
}

# fuzz HEADER: no input may crash it, leak, ask for 64 MiB at once, or take 5 seconds
fuzz() {
    name=$(basename "$1" .h)
    seeds=$work/seeds.$name crashes=$work/crashes.$name
    mkdir "$seeds" "$crashes"
    if ! clang $flags "$1" -o "$work/fuzz_$name" -lm 2> "$work/log"; then
        fail "$1" "does not build: $(grep -m 1 error "$work/log")"
        return
    fi
    seed "$name" "$seeds"
    "$work/fuzz_$name" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=512 -malloc_limit_mb=64 \
        -max_len=16384 -seed=1 \
        -artifact_prefix="$crashes/" -print_final_stats=1 "$seeds" > "$work/log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$work/log" | tail -n 1)
    if [ $status = 0 ]; then pass "$1: $runs inputs, $edges edges"; return; fi
    fail "$1" "$(grep -m 1 'ERROR: \|runtime error' "$work/log")"
    for input in "$crashes"/*; do    # short enough to type in again
        [ -f "$input" ] && echo "    $(basename "$input"): $(head -c 2000 "$input" | base64 | tr -d '\n')"
    done
}

write_text > "$work/text.txt"
"$trainer" --layers 1 --width 4 --heads 1 --seq 8 --batch 1 --steps 6 --gain-every 2 \
    --data "$work/text.txt" --tokens 8 --out "$work/run" > "$work/log" 2>&1 ||
    fail "a run for its files" "$(tail -n 1 "$work/log")"
for header in $(grep -l LLVMFuzzerTestOneInput data/*.h host/*.h); do fuzz "$header"; done
finish
