#!/bin/sh
# Runs the test programs and scripts given and adds up their `N passed, N failed`. Exit 1 on any failure.
# A program that ends without that line counts as one failure.
passed=0 failed=0
log=$(mktemp) && trap 'rm -f "$log"' EXIT

tally() {
    start=$(date +%s)
    "$@" > "$log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    p=${line%% *} f=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
    if [ -z "$line" ]; then p=0 f=1; tail -n 20 "$log"; fi
    [ "$status" != 0 ] && [ "$f" = 0 ] && { f=1; tail -n 20 "$log"; }
    grep -E '^(FAIL|skip)' "$log"
    echo "$p passed, $f failed in $(($(date +%s) - start)) s: $*"
    passed=$((passed + p)) failed=$((failed + f))
}

for program in "$@"; do
    case $program in *.sh) tally sh "$program" ;; *) tally "$program" ;; esac
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
