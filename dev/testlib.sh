# What the test scripts share; `. dev/testlib.sh` from the repository root. TRAINER: another build to test.

passed=0 failed=0
trainer=${TRAINER:-./train_gpt_mhc}
python=${PYTHON:-/usr/bin/python3}
root=$PWD
case $trainer in /*) ;; *) trainer=$root/$trainer ;; esac
if [ ! -x "$trainer" ]; then
    echo "FAIL $trainer: found no program, expected one, run make train_gpt_mhc"
    exit 1
fi
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && trap 'exit 1' INT TERM
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive LC_ALL=C

pass() { echo "ok   $1"; passed=$((passed + 1)); }
fail() { echo "FAIL $1: $2"; failed=$((failed + 1)); }
skip() { echo "skip $1: $2"; }

# check WHAT COMMAND...: passes if the command succeeds; what it prints is shown if it does not.
check() {
    what=$1
    shift
    if "$@" > "$work/check.out" 2>&1; then pass "$what"
    else fail "$what" "$* said: $(head -c 400 "$work/check.out")"
    fi
}

finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
    exit
}

# byte N..., in decimal; le32 N...: numbers as files have them, little-endian
byte() { for value; do printf "\\$(printf %03o "$value")"; done; }
le32() { for n; do byte $((n & 255)) $((n >> 8 & 255)) $((n >> 16 & 255)) $((n >> 24 & 255)); done; }
zeros() { head -c "$1" /dev/zero; }
repeat() { head -c "$1" /dev/zero | tr '\0' "$2"; }

# About 30 kB of text, the same on every machine
write_text() {
    i=0
    while [ $i -lt 500 ]; do
        echo "in year $i the river took $((i * i % 997)) leaves, $((i * 7 % 13)) boats and a song to the sea"
        i=$((i + 1))
    done
}

# write_shard MAGIC VERSION COUNT < tokens: llm.c's token shard
write_shard() {
    le32 "$1" "$2" "$3"
    zeros 1012
    cat
}

# write_tokens DOUBLINGS: 16-bit tokens, 8 * 2^DOUBLINGS of them
write_tokens() {
    printf 'a\000b\000\001\001c\000d\000\002\000\003\000e\000' > "$work/pairs"
    i=0
    while [ $i -lt "$1" ]; do
        cat "$work/pairs" "$work/pairs" > "$work/twice" && mv "$work/twice" "$work/pairs"
        i=$((i + 1))
    done
    cat "$work/pairs"
}

# 256 bytes, the end of text and two merges, in llm.c's tokenizer format
write_tokenizer() {
    le32 20240328 2 259 256
    zeros 1008
    i=0
    while [ $i -lt 256 ]; do byte 1 $i; i=$((i + 1)); done
    printf '\005<end>\002th\003the'
}

# Seconds that a background program has at most to make a file that is not empty
wait_for_file() {
    tries=0
    while [ ! -s "$1" ] && [ $tries -lt 200 ]; do sleep 0.05; tries=$((tries + 1)); done
    [ -s "$1" ]
}
