#!/bin/sh
# Whole runs: what they write, and that they go on bit for bit whatever ended them.
. dev/testlib.sh

write_text > "$work/text.txt"
cd "$work" || exit 1
model="--layers 1 --width 16 --heads 2 --seq 16 --batch 2"
short="$model --data text.txt --val-batches 2"
tiny="$short --tokens 8 --warmup 5"
last=step_00000030.safetensors
random=1

# draw N: the next number below N in $drawn
draw() { random=$(((random * 1103515245 + 12345) & 2147483647)) drawn=$((random / 65536 % $1)); }

# must STATUS COMMAND...: runs it, its output in stdout and stderr; says why where that fails
must() {
    expected=$1
    shift
    "$@" > stdout 2> stderr
    status=$?
    [ $status = "$expected" ] && return
    echo "status $status, expected $expected: $*; $(head -c 300 stderr)"
    return 1
}

# What a log says, without what differs from run to run: times, names of directories, one run line a start
story() { grep -v '"type":"\(run\|save\|stop\)"' "$1" | sed 's/,"step_ms".*"mfu":[^,]*//'; }
same_story() { story "$1" > story.a && story "$2" > story.b && cmp story.a story.b; }
no_leftovers() { ! ls "$1" | grep -v '^\(lock\|run.jsonl\|step_[0-9]*\.safetensors\)$'; }

# --- a run and what it writes

whole() {
    must 0 "$trainer" $tiny --steps 30 --save-every 1 --keep 0 --gain-every 5 --val-every 10 \
        --sample-every 10 "$@"
}
check "a run of 30 steps" whole --out whole
check "the same run again" whole --out again
check "its checkpoint is the same, byte for byte" cmp whole/$last again/$last
check "its log is the same but for times" same_story whole/run.jsonl again/run.jsonl
check "nothing else is in its directory" no_leftovers whole
check "a run with another seed" whole --out seed --seed 7
check "its checkpoint is another" sh -c "! cmp -s whole/$last seed/$last"
rm -r again seed

logs_are_json() {
    "$python" - "$@" << 'PYTHON'
import json, sys
fields = {
    "run": "format_version git compiler device seed threads model layers lr steps data residual".split(),
    "step": "step tokens loss lr grad_norm step_ms tok_s mfu gain_fwd gain_bwd".split(),
    "val": ["step", "loss"], "sample": ["step", "text"], "save": ["step", "file"],
    "stop": ["step", "reason", "status"],
    "gain": ["step"] + [f"{a}_{b}_{c}" for a in ("sublayer", "composite") for b in ("forward", "backward")
                        for c in ("max", "min")] + ["cosine", "effective_rank", "norm_share"],
}
def no_constant(name):
    raise ValueError(name + " is no JSON")
for path in sys.argv[1:]:
    kinds, steps = set(), []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            entry = json.loads(line, parse_constant=no_constant)
            missing = [name for name in fields[entry["type"]] if name not in entry]
            assert not missing, f"{path}:{number}: {missing} missing"
            assert number > 1 or entry["type"] == "run", f"{path}: does not begin with the run"
            assert line.endswith("}\n"), f"{path}:{number}: half a line"
            kinds.add(entry["type"])
            if entry["type"] == "step":
                steps.append(entry["step"])
                assert (entry["gain_fwd"] is None) == (entry["gain_bwd"] is None)
    assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True, f"{path}: steps {steps}"
    if "whole" in path:
        assert kinds == set(fields) and len(steps) == 30, f"{path}: {kinds}, {len(steps)} steps"
PYTHON
}

# --- going on

# go_on STEP: the whole run's first STEP checkpoints and its log as they are afterwards, resumed
go_on() {
    rm -rf part && mkdir part
    for step in $(seq "$1"); do cp whole/step_"$(printf %08d "$step")".safetensors part; done
    cp whole/run.jsonl part
    whole --out part --resume && cmp whole/$last part/$last && same_story whole/run.jsonl part/run.jsonl &&
        no_leftovers part
}
for step in 1 2 9 10 17 29; do check "resumed after step $step: same checkpoint, same log" go_on $step; done
check "resumed when done: nothing changes" go_on 30
steps_of_part() { [ "$(grep -c '"type":"run"' part/run.jsonl)" = 2 ]; }
check "a resumed log has a run line for each start" steps_of_part

longer() {
    must 0 "$trainer" $tiny --schedule constant --steps 12 --out longer &&
        must 0 "$trainer" --steps 30 --resume --out longer &&
        must 0 "$trainer" $tiny --schedule constant --steps 30 --out direct &&
        cmp longer/$last direct/$last
}
check "--resume with more --steps, every other option from the checkpoint" longer
empty() {
    must 0 "$trainer" $tiny --steps 30 --out fresh --resume && grep -q "starting at step 0" stdout &&
        cmp fresh/$last whole/$last
}
check "--resume in an empty directory starts at 0 and says so" empty
from() {
    must 0 "$trainer" $tiny --steps 3 --out from.a --init-from whole/$last \
        && must 0 "$trainer" $tiny --steps 3 --out from.b --init-from whole/$last --resume \
        && cmp from.a/step_00000003.safetensors from.b/step_00000003.safetensors
}
check "--resume in an empty directory still starts --init-from a file" from

overwrite() {
    must 0 "$trainer" $tiny --steps 2 --out part --overwrite && no_leftovers part || return
    [ "$(ls part | grep -c step_)" = 1 ] && [ "$(grep -c '"type":"run"' part/run.jsonl)" = 1 ]
}
check "--overwrite leaves nothing of the earlier run" overwrite
keep() {
    must 0 "$trainer" $tiny --steps 10 --save-every 1 --out kept --keep 2 &&
        [ "$(ls kept | grep step_ | tr '\n' ' ')" = "step_00000009.safetensors step_00000010.safetensors " ]
}
check "--keep 2 keeps the newest two" keep

# --- signals

long="$tiny --steps 1500 --val-every 0"
must 0 "$trainer" $long --out long || fail "a run of 1500 steps" "$(cat stderr)"

# stop SIGNAL: a run in a directory with an awkward name is stopped; the command that it prints completes it
stop() {
    out="it's the $1 run"
    "$trainer" $long --out "$out" > stdout 2> stderr &
    run=$!
    tries=0
    while ! grep -q '"type":"step"' "$out/run.jsonl" 2> /dev/null && [ $tries -lt 400 ]; do
        sleep 0.02
        tries=$((tries + 1))
    done
    kill -s "$1" $run
    wait $run || return
    stopped=$(sed -n 's/^stopped after step \([0-9]*\); this goes on:$/\1/p' stdout)
    [ "$stopped" -lt 1500 ] && [ -s "$out/$(printf 'step_%08d.safetensors' "$stopped")" ] || return
    command=$(sed -n '/this goes on:$/{n;p;}' stdout)
    echo "$command"
    eval "$command" > stdout && cmp "$out/step_00001500.safetensors" long/step_00001500.safetensors &&
        same_story "$out/run.jsonl" long/run.jsonl
}
for signal in INT TERM USR1; do
    check "SIG$signal: saved, status 0, and the printed command completes the run" stop $signal
done

second_signal() {
    "$trainer" --layers 4 --width 512 --heads 8 --seq 256 --batch 32 --data text.txt \
        --out slow > stdout 2> stderr &
    run=$!
    wait_for_file slow/run.jsonl
    sleep 0.2
    kill -INT $run
    sleep 0.2
    kill -INT $run
    start=$(date +%s)
    wait $run
    status=$?
    [ $status = 130 ] && [ $(($(date +%s) - start)) -le 1 ] && ! ls slow/step_* 2> /dev/null
}
check "a second signal ends a long step at once" second_signal

killed() {
    must 0 "$trainer" $tiny --steps 300 --save-every 1 --val-every 50 --out calm || return
    kills=0
    while [ $kills -lt 30 ]; do
        "$trainer" $tiny --steps 300 --save-every 1 --val-every 50 --out killed --resume > stdout 2> stderr &
        run=$!
        draw 90
        sleep 0.0$((drawn + 10))
        kill -KILL $run 2> /dev/null
        wait $run 2> /dev/null
        [ -s stderr ] && { cat stderr; return 1; }
        kills=$((kills + 1))
    done
    must 0 "$trainer" $tiny --steps 300 --save-every 1 --val-every 50 --out killed --resume || return
    cmp calm/step_00000300.safetensors killed/step_00000300.safetensors &&
        same_story calm/run.jsonl killed/run.jsonl && no_leftovers killed
}
check "kill -9 at 30 random instants: same checkpoint, same log, no files left over" killed

# --- damage

# flip FILE POSITION: another byte there
flip() {
    old=$(od -An -tu1 -j "$2" -N 1 "$1")
    draw 255
    byte $((old ^ (drawn + 1))) | dd of="$1" bs=1 seek="$2" conv=notrunc 2> /dev/null
}

mkdir rot
cp whole/step_00000010.safetensors rot
must 0 "$trainer" --eval --out rot && cp stdout older || fail "--eval of step 10" "$(cat stderr)"
size=$(wc -c < whole/$last)
header=$((256 * $(od -An -tu1 -j 1 -N 1 whole/$last) + $(od -An -tu1 -N 1 whole/$last) + 8))

# found POSITION...: a byte flipped there is found and said, and the checkpoint before is used
found() {
    for position; do
        cp whole/$last rot
        flip rot/$last "$position"
        must 0 "$trainer" --eval --out rot || return
        grep -q "rot/$last: .*trying the one before" stderr && cmp stdout older && continue
        echo "byte $position: $(cat stderr stdout)"
        return 1
    done
}
places() {
    i=0
    while [ $i -lt "$1" ]; do
        draw 32768
        echo $((drawn * 5 % $2))
        i=$((i + 1))
    done
}
check "a flipped byte in the header's length is found" found 0 1 3 7
check "40 flipped bytes in the header are found" found 8 $((header - 1)) $(places 38 $header)
check "40 flipped bytes anywhere are found" found $((size - 1)) $header $(places 38 "$size")
resumed_before_damage() {
    must 0 "$trainer" --out rot --resume --keep 0 && grep -q "trying the one before" stderr &&
        cmp rot/$last whole/$last
}
check "--resume goes on from the checkpoint before the damaged one" resumed_before_damage
all_damaged() {
    for file in rot/step_*; do flip "$file" 5000; done
    must 2 "$trainer" --out rot --resume && grep -q "rot: found 2 checkpoints and none that is whole" stderr
}
check "all checkpoints damaged: status 2" all_damaged

# --- a disk without room

full() {
    mkdir full
    cp whole/step_00000010.safetensors full
    (ulimit -f 100; must 4 "$trainer" $tiny --steps 30 --save-every 5 --out full --resume) || return
    [ "$(grep -c '^warning: full/step_000000[12][05].*the next save tries again$' stderr)" = 3 ] &&
        no_leftovers full && [ "$(ls full | grep -c step_)" = 1 ] &&
        cmp full/step_00000010.safetensors whole/step_00000010.safetensors
}
check "no room for checkpoints: warnings, the old one is whole, status 4" full
full_once() {
    mkdir -p once/step_00000020.safetensors
    must 0 "$trainer" $tiny --steps 30 --save-every 10 --out once --overwrite
    rmdir once/step_00000020.safetensors
    grep -q "^warning: once/step_00000020.* the next save tries again" stderr && no_leftovers once &&
        cmp once/$last whole/$last
}
check "one save fails: a warning, and the run goes on" full_once
no_log() {
    said=$(ulimit -f 0; "$trainer" $tiny --steps 3 --out nolog 2>&1 > /dev/null)
    [ $? = 2 ] && echo "$said" && [ "${said#nolog/run.jsonl: cannot be written}" != "$said" ]
}
check "no room for the log at the start: status 2" no_log
short_log() {
    (ulimit -f 16; must 4 "$trainer" $tiny --steps 60 --out shortlog) || return
    [ "$(grep -c '^warning: shortlog/run.jsonl: a line cannot be written' stderr)" = 1 ] &&
        [ "$(tail -c 2 shortlog/run.jsonl)" = "}" ]
}
check "no room for the log later: one warning, whole lines, the run goes on" short_log
if mkdir tmpfs && mount -t tmpfs -o size=512k none tmpfs 2> /dev/null; then
    on_tmpfs() {
        must 4 "$trainer" $tiny --steps 30 --save-every 5 --out tmpfs --keep 0 &&
            grep -q "No space left" stderr || return
        no_leftovers tmpfs && cmp tmpfs/step_00000005.safetensors whole/step_00000005.safetensors
    }
    check "a full file system: warnings, the old checkpoint is whole, status 4" on_tmpfs
    umount tmpfs
else skip "a full file system" "no permission to mount one; a limit on file sizes was tried"
fi
dump_fails() {
    must 4 "$trainer" $tiny --dump nowhere/dump.safetensors &&
        grep -q "nowhere/dump.safetensors" stderr
}
check "a dump that cannot be written: status 4" dump_fails

# --- numbers that are not finite

not_finite() {
    must 3 "$trainer" $short --steps 30 --lr 1e30 --warmup 0 --grad-clip 0 --on-spike "$1" --save-every 0 \
        --out "inf.$1" || return
    grep -q "stopped at step [0-9]*: .*not finite" stderr && ! ls "inf.$1"/step_* 2> /dev/null &&
        grep -q '"type":"stop".*"status":3' "inf.$1/run.jsonl"
}
for policy in stop skip ignore; do
    check "--on-spike $policy: a weight that is not finite ends the run with status 3" not_finite $policy
done

# --- the same result for any number of threads, with and without recompute

medium="--layers 2 --width 48 --heads 4 --seq 48 --batch 3 --micro-batches 2"
medium="$medium --data text.txt --steps 4 --val-batches 1 --tokens 1"
threads() {
    for count in 1 2 3; do
        OMP_NUM_THREADS=$count must 0 "$trainer" $medium --residual "$1" --out "threads.$count" \
            --overwrite || return
    done
    cmp threads.1/step_00000004.safetensors threads.2/step_00000004.safetensors &&
        cmp threads.1/step_00000004.safetensors threads.3/step_00000004.safetensors
}
recompute() {
    for count in 1 3 4 auto; do
        must 0 "$trainer" $medium --residual "$1" --out recompute --overwrite --recompute $count || return
        cmp threads.1/step_00000004.safetensors recompute/step_00000004.safetensors || return
    done
}
for mode in none plain hc mhc ihc; do
    check "$mode: the same bits with 1, 2 and 3 threads" threads $mode
    check "$mode: the same bits with --recompute 1, 3, 4, auto" recompute $mode
done

# --- modes

evaluated() {
    must 0 "$trainer" --eval --out whole --val-batches 2 || return
    [ "$(wc -l < stdout)" = 1 ] && [ ! -s stderr ] && grep -q '^val loss [0-9.]*$' stdout || return
    logged=$(sed -n 's/.*"type":"val","step":30,"loss":\([0-9.]*\).*/\1/p' whole/run.jsonl)
    echo "$logged $(cut -d ' ' -f 3 stdout)" | awk '{ d = $1 - $2; print; exit !(d < 1e-6 && d > -1e-6) }'
}
check "--eval prints the loss that the run logged, and nothing else" evaluated
generated() {
    must 0 "$trainer" --generate "in year" --tokens 40 --out whole --seed 3 && mv stdout first &&
        must 0 "$trainer" --generate "in year" --tokens 40 --out whole --seed 3 || return
    cmp first stdout && [ "$(head -c 7 stdout)" = "in year" ] && [ "$(wc -c < stdout)" = 48 ] &&
        [ ! -s stderr ]
}
check "--generate prints the prompt and 40 bytes, the same twice" generated
greedy() {
    must 0 "$trainer" --generate "in" --tokens 20 --out whole --temperature 0 && mv stdout first &&
        must 0 "$trainer" --generate "in" --tokens 20 --out whole --top-k 1 --seed 9 && cmp first stdout
}
check "--temperature 0 is --top-k 1" greedy
if [ -w /dev/full ]; then
    to_full() {
        "$trainer" --eval --out whole > /dev/full 2> stderr
        [ $? = 4 ] && grep -q "stdout: cannot be written" stderr
    }
    check "--eval to a full disk: status 4" to_full
fi
dumped() {
    must 0 "$trainer" $tiny --init-from whole/$last --dump a.safetensors &&
        must 0 "$trainer" $tiny --init-from whole/$last --dump b.safetensors &&
            cmp a.safetensors b.safetensors || return
    must 0 "$trainer" $tiny --init-from a.safetensors --dump c.safetensors && cmp a.safetensors c.safetensors
}
check "--dump is the same twice, and --init-from opens it" dumped

mkdir shards
for name in a b; do write_tokens 7 | write_shard 20240520 1 1024 > shards/train_$name.bin; done
write_tokens 6 | write_shard 20240520 1 512 > shards/val.bin
sharded() {
    must 0 "$trainer" $model --vocab 300 --steps 20 --warmup 0 --lr 1e-2 --val-batches 2 --out sharded \
        --data 'shards/train_*.bin' "$@"
}
validated() {
    sharded --val-data shards/val.bin &&
        grep -q '"type":"val","step":20,"loss":[0-4]\.' sharded/run.jsonl
}
check "llm.c shards train and validate" validated
not_validated() {
    sharded --overwrite && [ "$(grep -c "^no validation" stdout)" = 1 ] &&
        ! grep '"type":"val"' sharded/run.jsonl
}
check "without --val-data, shards have no validation, and it is said once" not_validated
shards_resumed() {
    must 0 "$trainer" $model --vocab 300 --steps 20 --warmup 0 --lr 1e-2 --out half --save-every 7 --keep 0 \
        --data 'shards/train_*.bin' || return
    rm half/step_00000014.safetensors half/step_00000020.safetensors
    must 0 "$trainer" --resume --out half &&
        cmp half/step_00000020.safetensors sharded/step_00000020.safetensors
}
check "a run on shards goes on bit for bit" shards_resumed

write_tokenizer > tiny.tok
tokenized() {
    must 0 "$trainer" $tiny --tokenizer tiny.tok --steps 5 --out tokenized &&
        grep -q '"type":"sample"' tokenized/run.jsonl && grep -aq 'vocabulary 259' stdout &&
        must 0 "$trainer" --generate "the sea" --tokens 5 --out tokenized &&
        [ "$(head -c 7 stdout)" = "the sea" ] && must 0 "$trainer" --eval --out tokenized
}
check "--tokenizer: trains, samples, generates and evaluates" tokenized
padded() {
    must 0 "$trainer" $short --tokenizer tiny.tok --vocab 4000 --steps 1 --tokens 60 --out padded &&
        must 0 "$trainer" --generate "the" --tokens 60 --out padded
}
check "--tokenizer with a larger --vocab" padded
small_vocab() {
    repeat 500 '\002' > two.txt &&
        must 0 "$trainer" $model --data two.txt --vocab 3 --steps 2 --out two
}
check "a --vocab below the first byte of a sample" small_vocab
configured() {
    cat > run.cfg << 'CONFIG'
# a run
layers = 1
width = 16
heads=2
seq = 16 # short
batch = 7
data = text.txt
val-batches = 2
tokens = 8
warmup = 5
steps = 30
out = configured
overwrite = true
CONFIG
    must 0 "$trainer" --config run.cfg --batch 2 && cmp configured/$last whole/$last
}
check "--config, which the command line overrides" configured

# --- memory: the plan is what is taken

# peak COMMAND...: the most MiB that it holds, in $mib
peak() {
    "$@" > stdout 2> stderr &
    run=$!
    mib=0
    while line=$(grep VmHWM /proc/$run/status 2> /dev/null); do
        mib=$(echo "$line" | awk '{ print int($2 / 1024) }')
        sleep 0.02
    done
    wait $run
}
large="--layers 2 --width 160 --heads 2 --seq 256 --batch 4 --vocab 9000 --data text.txt"
large="$large --steps 2 --val-batches 1 --tokens 1 --gain-every 0 --out large --overwrite"
as_planned() {
    must 0 "$trainer" $large "$@" --plan || return
    plan=$(awk '/memory in all/ { print int($4) }' stdout)
    peak "$trainer" $large "$@" || return
    difference=$((plan > mib ? plan - mib : mib - plan))
    echo "planned $plan MiB, taken $mib MiB"
    [ "$plan" -gt 90 ] && { [ $difference -le 16 ] || [ $((difference * 10)) -le "$plan" ]; }
}
if grep -q __asan_init "$trainer"; then skip "memory as planned" "a sanitizer takes memory of its own"
elif [ -r /proc/self/status ]; then
    check "mhc takes the memory that --plan says" as_planned
    check "mhc with --recompute 4 takes the memory that --plan says" as_planned --recompute 4
    check "plain takes the memory that --plan says" as_planned --residual plain
    plan_is_small() {
        peak "$trainer" --model gpt2 --batch 64 --data text.txt --val-data text.txt --plan &&
            grep -q 'memory in all *[0-9]\{5\}' stdout && echo "$mib MiB" && [ "$mib" -lt 40 ] && [ ! -e out ]
    }
    check "--plan takes no memory and writes nothing" plan_is_small
else skip "memory as planned" "no /proc"
fi

if "$python" -c 'import json' 2> /dev/null; then
    check "every line of every log is JSON with its documented fields" logs_are_json */run.jsonl
else skip "every line of every log is JSON" "no $python"
fi

finish
