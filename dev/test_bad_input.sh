#!/bin/sh
# Bad input of every kind: status 2, one line on stderr that says what is wrong, no stdout, nothing lost.
. dev/testlib.sh

small="--layers 1 --width 16 --heads 2 --seq 16 --batch 2"
write_text > "$work/text.txt"
cd "$work" || exit 1
"$trainer" $small --data text.txt --steps 2 --out kept > log 2>&1 || fail "a run to lose" "$(tail -n 1 log)"
cp -r kept before
good=kept/step_00000002.safetensors
model="--data text.txt --init-from bad.safetensors $small"

# bad WHAT PATTERN ARGUMENT...: a command line that must be refused with a line that matches PATTERN
bad() {
    what=$1 pattern=$2
    shift 2
    "$trainer" "$@" > stdout 2> stderr
    status=$?
    if [ $status != 2 ]; then fail "$what" "status $status, expected 2; $(head -c 300 stderr)"
    elif [ "$(wc -l < stderr)" != 1 ]; then
        fail "$what" "$(wc -l < stderr) lines on stderr: $(head -c 300 stderr)"
    elif ! grep -q -e "$pattern" stderr; then fail "$what" "expected $pattern in: $(head -c 300 stderr)"
    elif [ -s stdout ]; then fail "$what" "wrote to stdout: $(head -n 1 stdout)"
    elif ! diff -r before kept > difference; then
        fail "$what" "files of an earlier run changed: $(head -n 1 difference)"
    else pass "$what: $(head -c 160 stderr)"
    fi
}

# As bad, for a training that would overwrite an earlier run
train() {
    what=$1 pattern=$2
    shift 2
    bad "$what" "$pattern" --out kept --overwrite --steps 2 "$@"
}

# --- data

: > empty.txt
head -c 16 text.txt > short.txt
mkdir folder
train "data: missing" "nowhere.txt: No such file.*expected" $small --data nowhere.txt
train "data: a directory" "folder: is a directory, expected" $small --data folder
train "data: empty" "empty.txt: is empty, expected" $small --data empty.txt
train "data: shorter than a sequence" "short.txt: .*expected at least 17" $small --data short.txt
head -c 100 text.txt > tenth.txt
train "data: no validation sequence in its last tenth" \
    "tenth.txt: 10 tokens in the validation tenth, expected at least 17" $small --data tenth.txt
train "data: a device" "/dev/null: is not a regular file" $small --data /dev/null
train "data: a byte beyond --vocab" "text.txt: token 1[0-9]* at position.*vocabulary.*100" $small \
    --data text.txt --vocab 100
train "data: a glob with no match" "none_\*.bin: No such file" $small --data 'none_*.bin'
train "validation: missing" "nowhere.txt: No such" $small --data text.txt --val-data nowhere.txt
{ repeat 16 a; byte 250; repeat 16 a; } > high.txt
train "validation: a byte beyond --vocab" "high.txt: token 250 at position 16.*200" $small --data text.txt \
    --val-data high.txt --vocab 200
train "validation without data" "--val-data: found without --data" $small --val-data text.txt

write_tokens 8 | write_shard 20240520 1 2048 > good.bin
head -c 5119 good.bin > cut.bin
{ cat good.bin; printf x; } > long.bin
head -c 1023 good.bin > header.bin
write_tokens 8 | write_shard 20240520 1 2000000000 > promise.bin
write_tokens 8 | write_shard 20240521 1 2048 > magic.bin
write_tokens 8 | write_shard 20240520 3 2048 > version.bin
write_tokens 0 | write_shard 20240520 1 8 > few.bin
{ byte 1 52 216 136 0 0 0 1 0 0 8 0; zeros 1012; write_tokens 8; } > big.bin
write_shard 20240520 1 0 < /dev/null > none.bin
train "shard: truncated by one byte" "cut.bin: 5119 bytes, expected 5120" $small --data cut.bin
train "shard: a byte too many" "long.bin: 5121 bytes, expected 5120" $small --data long.bin
train "shard: half a header" "header.bin: 1023 bytes, expected" $small --data header.bin
train "shard: promises more than it holds" "promise.bin: 5120 bytes, expected 4000001024" $small \
    --data promise.bin
train "shard: wrong magic number" "magic.bin: magic number 20240521, expected" $small --data magic.bin
train "shard: unknown version" "version.bin: version 3, expected 1" $small --data version.bin
train "shard: big-endian" "big.bin: a big-endian" $small --data big.bin
train "shard: no tokens" "none.bin: holds no tokens" $small --data none.bin
train "shard: shorter than a sequence" \
    "few.bin: 8 tokens in the longest shard, expected at least 17" $small --data few.bin
train "shard: a token beyond --vocab" "good.bin: token 257 at position.*200" $small --data good.bin \
    --vocab 200
mkdir dir.bin
train "shard: a directory" "dir.bin: is a directory" $small --data dir.bin
for name in cut big magic; do cp $name.bin shard_$name.bin; done
cp good.bin shard_a.bin
train "shard: one of several is bad" "shard_big.bin: a big-endian" $small --data 'shard_*.bin'

write_tokenizer > good.tok
bytes=$(wc -c < good.tok)
head -c $((bytes - 1)) good.tok > cut.tok
{ le32 20240328 2 2000000000 256; tail -c +17 good.tok; } > promise.tok
{ le32 20240329; tail -c +5 good.tok; } > magic.tok
{ cat good.tok; printf x; } > long.tok
train "tokenizer: missing" "none.tok: No such file" $small --data text.txt --tokenizer none.tok
train "tokenizer: truncated by one byte" "cut.tok: ends in token 258 of 259" $small --data text.txt \
    --tokenizer cut.tok
train "tokenizer: a byte too many" "long.tok: 1 bytes after the last token" $small --data text.txt \
    --tokenizer long.tok
train "tokenizer: promises more than it holds" "promise.tok: 2000000000 tokens do not fit" $small \
    --data text.txt --tokenizer promise.tok
train "tokenizer: wrong magic number" "magic.tok: magic number 20240329, expected" $small --data text.txt \
    --tokenizer magic.tok
train "tokenizer: empty" "empty.txt: is empty, expected a tokenizer" $small --data text.txt \
    --tokenizer empty.txt
train "tokenizer: a smaller --vocab" "token .*vocabulary size 100" $small --data text.txt \
    --tokenizer good.tok --vocab 100

# --- weights

# weights WHAT PATTERN: bad.safetensors must be refused by a training that starts from it
weights() { train "weights: $1" "$2" $model; }

bytes=$(wc -c < $good)
head -c $((bytes - 1)) $good > bad.safetensors
weights "truncated by one byte" "bad.safetensors: .*truncated\|damaged"
head -c 7 $good > bad.safetensors
weights "truncated to 7 bytes" "bad.safetensors: .*expected"
head -c 2000 $good > bad.safetensors
weights "truncated in the header" "bad.safetensors: .*header"
{ cat $good; printf x; } > bad.safetensors
weights "a byte too many" "bad.safetensors: .*damaged"
sed 's/"digest/"DIGEST/g; s/"data_offsets":\[0,16384\]/"data_offsets":[0,96384]/' $good > bad.safetensors
weights "promises more than it holds" "tensor .wte.weight. has 96384 bytes.*need 16384"
sed 's/"digest/"DIGEST/g; s/"shape":\[256,16\]/"shape":[256,17]/' $good > bad.safetensors
weights "a shape that does not fit its bytes" "tensor .wte.weight. has 16384 bytes.*need 17408"
sed 's/"digest/"DIGEST/g; s/"shape":\[256,16\]/"shape":[16,256]/' $good > bad.safetensors
weights "a tensor of the wrong shape" "wte.weight: found shape (16, 256), expected (256, 16)"
sed 's/"digest/"DIGEST/g; s/"ln_f.bias"/"ln_g.bias"/' $good > bad.safetensors
weights "an unknown tensor" "ln_g.bias, expected none"
sed 's/"wpe.weight"/"wpe.weighs"/' $good > bad.safetensors
weights "a flipped bit in the header" "bad.safetensors: .*digest\|damaged"
sed 's/"digest/"DIGEST/g; s/"format_version":"1"/"format_version":"9"/' $good > bad.safetensors
weights "a newer format_version" "found format_version 9, expected 1"
sed 's/"digest/"DIGEST/g; s/"format_version":"1"/"format_version":"x"/' $good > bad.safetensors
weights "format_version is no number" "format_version: found x, expected a number"
sed 's/"digest/"DIGEST/g; s/"width":"16"/"width":"1x"/' $good > bad.safetensors
train "weights: a damaged option" "width: found \"1x\", expected" --data text.txt --init-from bad.safetensors
{ byte 23 39 0 0 0 0 0 0; printf '{"a":'; repeat 10002 '['; } > bad.safetensors
weights "JSON nested 10 000 deep" "bad.safetensors: .*expected"
{ byte 255 255 255 255 255 255 255 127; printf '{}'; } > bad.safetensors
weights "a header of 2^63 bytes" "bad.safetensors: .*header"
{ byte 2 0 0 0 0 0 0 0; printf '{}'; } > bad.safetensors
weights "no tensors" "found no tensor wte.weight"
text='{"wte.weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'
{ byte ${#text} 0 0 0 0 0 0 0; printf %s "$text"; } > bad.safetensors
weights "a shape whose product overflows" "wte.weight. has a shape beyond 2^64"
: > bad.safetensors
weights "empty" "bad.safetensors: .*expected"
rm bad.safetensors
weights "missing" "bad.safetensors: .*No such file"
mkdir bad.safetensors
weights "a directory" "bad.safetensors: .*expected"
rmdir bad.safetensors
train "weights: another --width" "found shape (256, 16), expected (256, 32)" --data text.txt \
    --init-from $good --width 32
train "weights: another --residual" "attn_hc.*expected none" --data text.txt --init-from $good \
    --residual plain
train "weights: more --layers" "found no tensor h.1." --data text.txt --init-from $good --layers 2
train "weights: a longer --seq" "wpe.weight: found shape (16, 16), expected (32, 16)" --data text.txt \
    --init-from $good --seq 32

# --- the command line

# option PATTERN WORD...: the command line must be refused
option() {
    pattern=$1
    shift
    train "option: $*" "$pattern" $small --data text.txt "$@"
}

train "option: unknown" "unknown option.*nearest is --steps" --stepz 5
train "option: no dashes" "found \"steps\", expected --name" steps 5
train "option: twice" "--lr: found twice" --lr 1 --lr=1
train "option: its value is missing" "--lr: found nothing, expected a number" --lr
train "option: an option instead of a value" "--lr: found \"--seed\", expected a number" --lr --seed 1
train "option: empty" "--lr: found nothing" --lr=
for value in nan inf -inf 1e400 0 -1 1x 0x10 ' 1' 1e31 1,5; do
    option "--lr: found .*, expected a number > 0" --lr "$value"; done
for value in 0 -1 1.5 1e3 2k 999999999999 99999999999999999999 nan; do
    train "option: --batch $value" "--batch: found \"$value\", expected auto or a whole number 1 to" --batch $value
done
train "option: more tokens a step than 32 bits" \
    "--micro-batches: found .* tokens a step, expected at most 2^32" --data text.txt \
        --micro-batches 1000000 --batch 1000
option "--micro-batches: found \"0\"" --micro-batches 0
train "option: --batch auto" "--batch: found auto, expected a number, as in --batch 8" --data text.txt --batch auto
option "--kernels: found fused, expected plain" --kernels fused
train "option: --heads that do not divide" "--heads: found 3, expected a divisor of the width, 16" \
    --data text.txt --width 16 --heads 3
train "option: --heads 0" "--heads: found \"0\"" --heads 0
train "option: 10^17 parameters" "parameters, expected at most 2^40, reduce --layers or --width" \
    --width 1000000 --layers 10000 --heads 4
train "option: 10^16 activations" \
    "--batch: found .* activations, expected at most 2^50, reduce --batch or --seq" --data text.txt \
        --batch 1000000 --seq 10000000
train "option: more tokens a micro-batch than 31 bits" "--batch: found 2200000000 tokens" --data text.txt \
    --layers 1 --width 1 --heads 1 --batch 1000000 --seq 2200
train "option: a model beyond any memory" \
    "memory: found a need of .* GiB, expected at most .* reduce --batch" --data text.txt --model d150 \
        --batch 1
train "option: an unknown --model" "--model: found \"gpt5\", expected one of" --model gpt5
option "--recompute: found 3, expected at most the number of sublayers, 2" --recompute 3
option "--residual: found \"mhcc\", expected one of none|plain|hc|mhc|ihc" --residual mhcc
option "--hc-maps: found \"pre,pre\"" --hc-maps pre,pre
option "--streams: found \"9\", expected a whole number 1 to 8" --streams 9
option "--seed: found \"-1\"" --seed -1
option "--beta2: found \"1\", expected a number 0 to" --beta2 1
option "--on-spike: found \"panic\"" --on-spike panic
option "--hc-static: found \"maybe\", expected true or false" --hc-static=maybe
option "--out.*twice" --out elsewhere
option "--data.*twice" --data text.txt
train "option: a control byte in a path" "--data: found \"a?b.txt\", expected a path of" --data \
    "$(printf 'a\001b.txt')"
train "option: a line end in a path" "--data: found .*, expected a path of" --data "$(printf 'a\nb.txt')"
train "option: a path of 5000 bytes" "--data: found .*, expected a path of" --data "$(repeat 5000 a)"
train "option: two modes" "--generate: found --eval too" --generate x --eval
train "option: --resume and --overwrite" "--resume: found --overwrite too" --resume
bad "option: --generate empty" "--generate: found nothing" --generate ''

# config PATTERN TEXT: a configuration file must be refused
config() {
    printf "$2" > run.cfg
    train "config: $(printf "$2" | tr '\n\0' ' ?' | cut -c 1-40)" "$1" --config run.cfg
}
config "run.cfg:2: found the unknown option \"lrr\".*nearest is --lr" 'lr = 1\nlrr = 2\n'
config "run.cfg:1: --lr: found \"fast\", expected a number" 'lr = fast\n'
config "run.cfg:3: --lr: found twice" '# two\nlr = 1\nlr = 1\n'
config "run.cfg:1: found \"lr 1\", expected name = value" 'lr 1\n'
config "run.cfg:1: --lr: found nothing" 'lr =\n'
config "run.cfg:1: --config: found in a file" 'config = other.cfg\n'
config "run.cfg:1: found a zero byte" 'data = a\000b\n'
{ printf 'data = '; repeat 70000 a; } > run.cfg
train "config: 70 000 bytes" "run.cfg: found 65536 bytes or more" --config run.cfg
{ printf 'data = '; repeat 6000 a; } > run.cfg
train "config: a line of 6000 bytes" "run.cfg:1: found .*more than" --config run.cfg
train "config: missing" "--config: found no readable none.cfg" --config none.cfg
train "config: a directory" "--config: found no readable folder" --config folder

# --- the directory of the run

: > file
short="$small --data text.txt --steps 2"
bad "out: a file in its place" "file: .*expected a directory.*--out" $short --out file
bad "out: below a file" "file/run: .*expected a directory.*--out" $short --out file/run
bad "out: where nothing can be made" "/proc/x: cannot be made.*--out" $short --out /proc/x
bad "out: checkpoints of an earlier run" "kept: found 1 checkpoints.*--resume.*--overwrite" $short --out kept
if [ "$(id -u)" != 0 ]; then
    mkdir -m 555 closed
    bad "out: no permission" "closed: cannot be written" $short --out closed
else skip "out: no permission" "root may write everywhere"
fi

"$trainer" $small --data text.txt --steps 99999999 --out busy > log 2>&1 &
run=$!
wait_for_file busy/run.jsonl || fail "out: a run at work" "$(tail -n 1 log)"
bad "out: another run at work" "busy: found another run at work" $short --out busy --overwrite
kill -TERM $run
wait $run || fail "out: a run at work ends" "$(tail -n 1 log)"

# --- resuming and modes

bad "resume: another value of an option" "--lr: found \"0.5\", expected \"0.001\" as in kept/step_00000002" \
    --resume --out kept --lr 0.5
bad "resume: another model" "--width: found \"32\", expected \"16\"" --resume --out kept --width 32
bad "resume: another --data" "--data: found \"other.txt\", expected \"text.txt\"" --resume --out kept \
    --data other.txt
mv text.txt text.kept
tr e f < text.kept > text.txt
bad "resume: other text in the same file" "text.txt: found other training data" --resume --out kept --steps 4
rm text.txt
bad "resume: the text is gone" "text.txt: No such file" --resume --out kept --steps 4
mv text.kept text.txt
mkdir newer
sed 's/"digest/"DIGEST/g; s/"format_version":"1"/"format_version":"2"/' $good > \
    newer/step_00000002.safetensors
bad "resume: a newer format_version" "found format_version 2, expected 1" --resume --out newer
bad "generate: no checkpoint" "folder: found no checkpoint.*--init-from" --generate x --out folder
bad "eval: no directory" "nowhere_at_all: found no checkpoint" --eval --out nowhere_at_all
bad "eval: no validation data" "--eval: found no validation data" --eval --out kept --data good.bin
"$trainer" $small --data text.txt --vocab 123 --steps 1 --out low > log 2>&1 ||
    fail "a small vocabulary" "$(tail -n 1 log)"
bad "generate: a token beyond the vocabulary" \
    "--generate: found token 126, expected less than the vocabulary, 123" --generate '~' --out low
"$trainer" $small --data good.bin --steps 1 --out numbers > log 2>&1 ||
    fail "a model of token numbers" "$(tail -n 1 log)"
bad "generate: a model of token numbers" "--generate: found a model of token numbers.*--tokenizer" \
    --generate x --out numbers
bad "generate: missing --init-from" "none.safetensors: .*No such" --generate x --init-from none.safetensors

finish
