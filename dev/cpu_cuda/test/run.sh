#!/bin/sh
# Everything that tests dev/cpu_cuda: semantics under every order and mode, planted mistakes, profiles.
# CXX: the compiler (g++). The last line is `N passed, N failed`.
set -u
cd "$(dirname "$0")" || exit 1
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && trap 'exit 1' INT TERM
compiler=${CXX:-g++}
passed=0 failed=0

# count NAME COMMAND...: adds its `N passed, N failed`; without such a line it is one failure.
count() {
    name=$1
    shift
    "$@" > "$folder/out" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$folder/out" | tail -n 1)
    p=${line%% *} f=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
    [ -z "$line" ] && p=0 f=1
    [ $status != 0 ] && [ "$f" = 0 ] && f=1
    if [ "$f" != 0 ]; then
        echo "FAIL $name ($compiler):"
        tail -n 20 "$folder/out"
    fi
    grep skipped "$folder/out"
    passed=$((passed + p)) failed=$((failed + f))
}

# The program of a test in a mode, built once.
build() {
    program=$folder/$(basename "$1" .cu)-$2
    flag=
    [ "$2" = plain ] || flag=--$2
    [ -x "$program" ] || ../nvcc -O1 -Xcompiler -Wall,-Wextra,-Werror $flag "$1" -o "$program" -lcublasLt -lnccl || exit 1
}

count test_rewrite python3 test_rewrite.py
count profile python3 profile.py
for source in test_*.cu; do
    name=$(basename "$source" .cu)
    build "$source" plain
    for setting in "" order=reverse order=random:1 order=random:2,threads=3 lazy lazy,order=random:3,threads=1; do
        CPU_CUDA=$setting count "$name, $setting" "$program"
    done
    for mode in check address; do
        build "$source" $mode
        count "$name, $mode" "$program"
    done
done
for script in test_*.sh; do count "$script" sh "$script"; done
for source in mistakes_*.cu; do count "$source" python3 mistakes.py "$source"; done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
