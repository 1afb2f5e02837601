#!/bin/sh
# The float checks and two steps of every residual mode under AddressSanitizer and UBSan.
set -u
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
flags="-std=c11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=fast -D_GNU_SOURCE"
passed=0 failed=0
verdict() { if [ "$2" = 0 ]; then echo "ok   $1"; passed=$((passed + 1)); else echo "FAIL $1"; tail -n 30 "$out/log"; failed=$((failed + 1)); fi; }

gcc $flags -w test_gpt_mhc.c -o "$out/test" -lm > "$out/log" 2>&1 && "$out/test" > "$out/log" 2>&1
verdict "every float check" $?
gcc $flags -Wall -Wextra -Werror -Wno-unknown-pragmas train_gpt_mhc.c -o "$out/train" -lm > "$out/log" 2>&1
verdict "the trainer builds" $?
for residual in none plain hc mhc ihc; do
    "$out/train" --residual $residual --layers 2 --width 24 --heads 3 --seq 17 --batch 3 --steps 2 --gain-every 1 --recompute 3 \
        --val-batches 1 --tokens 40 --out "$out/$residual" > "$out/log" 2>&1
    verdict "$residual: two steps, gains, validation, a sample, a checkpoint" $?
done
"$out/train" --out "$out/mhc" --resume --steps 3 > "$out/log" 2>&1
verdict "a resumed run" $?
"$out/train" --out "$out/mhc" --generate "Once" --tokens 30 > "$out/log" 2>&1
verdict "generated text" $?
echo "$passed passed, $failed failed"
[ $failed = 0 ]
