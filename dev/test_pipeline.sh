#!/bin/sh
# Whole runs by ranks under each MPI that is installed: that they write what one process writes, and how they
# end when one of them cannot go on. LONG=1: many more schedules, ranks and micro-batches.
. dev/testlib.sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
flags="-std=c11 -O1 -ffp-contract=fast -fno-math-errno -fno-trapping-math -D_GNU_SOURCE -pthread"

# --- how ranks are started: each leaves its process number, its output and its errors in files of its own

write_text > "$work/text.txt"
export SAID="$work/said" LIMITED=none ELSEWHERE=none
mkdir "$work/elsewhere" "$SAID"
cat > "$work/rank" << 'RANK'
#!/bin/sh
number=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}
echo $$ > "$SAID/pid.$number"
[ "$LIMITED" != "$number" ] || ulimit -f 40960  # blocks of 512 bytes, of any file, MPI's own too: as a full disk
[ "$ELSEWHERE" != "$number" ] || cd elsewhere || exit
exec "$@" > "$SAID/out.$number" 2> "$SAID/err.$number"
RANK
cat > "$work/launch" << 'LAUNCH'
#!/bin/sh
echo $$ > "$SAID/launcher"
exec "$@" > "$SAID/mpirun" 2>&1
LAUNCH
chmod +x "$work/rank" "$work/launch"

# start P OPTION...: in the background. start_each COMMAND COMMAND: a rank each
start() {
    P=$1
    shift
    rm -rf "$SAID"/* ranks
    timeout -k 1 60 "$work/launch" $mpirun -np "$P" "$work/rank" "$program" "$@" &
    launched=$!
}
start_each() {
    rm -rf "$SAID"/* ranks
    timeout -k 1 60 "$work/launch" $mpirun -np 1 "$work/rank" $1 : -np 1 "$work/rank" $2 &
    launched=$!
}
# ended: waits for it. $status, and the files of $SAID
ended() { wait $launched; status=$?; }
pid_of() { cat "$SAID/pid.$1"; }
alive() { for pid in $(cat "$SAID"/pid.*); do kill -0 "$pid" 2> /dev/null && return 0; done; return 1; }
all_end() {
    while alive && [ $(($(date +%s) - since)) -lt 5 ]; do sleep 0.05; done
    ! alive
}
# Whoever is not rank 0 prints nothing.
others_silent() {
    for file in "$SAID"/out.*; do case $file in *.0) ;; *) [ ! -s "$file" ] || return 1 ;; esac; done
}
what_was_said() {
    echo "status $status: $1"
    tail -n 3 "$SAID"/err.* "$SAID"/out.* "$SAID/mpirun" 2> /dev/null
    false
}

# must STATUS P OPTION...: says why where that is not how it ends
must() {
    expected=$1
    shift
    start "$@"
    ended
    [ $status = "$expected" ] && others_silent || what_was_said "-np $*"
}

# --- what ranks compute, against one process

tiny="--data text.txt --layers 3 --width 16 --heads 2 --seq 16 --batch 2 --steps 3 --warmup 0 --lr 1e-2"
tiny="$tiny --tokens 8 --val-batches 3 --gain-every 2"
last=step_00000003.safetensors
below="--width 8 --seq 8 --batch 1" above="--width 48 --seq 32 --batch 4"      # messages of 1 KB, of 96 KB

# The options of tiny and these; of one that comes twice, the last
options() {
    echo "$tiny $*" | awk '{
        for (i = 1; i <= NF; i++)
            if ($i ~ /^--/) { if (!($i in value)) names[++count] = $i; value[name = $i] = "" }
            else value[name] = $i
        for (i = 1; i <= count; i++) printf "%s %s ", names[i], value[names[i]]
    }'
}

# alone OPTION...: the same by one process, once; in $reference
alone() {
    reference=alone.$(options "$@" | cksum | tr -d ' ')
    [ -d "$reference" ] || "$program" $(options "$@") --out "$reference" > stdout
}

# What a log says, without what differs from run to run; samples are of one process alone
story() { grep -v '"type":"\(run\|save\|stop\|sample\)"' "$1/run.jsonl" | sed 's/,"step_ms".*"mfu":[^,]*//'; }
same_story() { story "$1" > story.a && story "$2" > story.b && cmp story.a story.b; }
same_run() { cmp "$1/$last" "$2/$last" && same_story "$1" "$2"; }

# equal P SCHEDULE OPTION...: checkpoint and log are those of one process
equal() {
    P=$1 schedule=$2
    shift 2
    alone "$@" && must 0 "$P" $(options "$@" --pipeline "$schedule") --out ranks && same_run ranks "$reference"
}
equals() { check "$mpi: $2 on $1 ranks, ${3:-as it is}: bits of one process" equal "$1" "$2" $3; }

# near P SCHEDULE STEPS WITH OPTION...: losses and norms of the first STEPS are those of one process with WITH, to
# 1e-6 of each: numbers of 24 bits are added in another order, which costs fewer than 4 of them
near() {
    P=$1 schedule=$2 steps=$3 with=$4
    shift 4
    alone "$@" $with && must 0 "$P" $(options "$@" --pipeline "$schedule") --out ranks || return
    for run in "$reference" ranks; do
        sed -n 's/.*"step":\([0-9]*\),.*"loss":\([^,]*\).*"grad_norm":\([^,]*\).*/\1 \2 \3/p' $run/run.jsonl
    done | awk -v steps="$steps" '
        function near(a, b) { return a <= b * (1 + 1e-6) && b <= a * (1 + 1e-6) }
        $1 > steps { next }
        !($1 in loss) { loss[$1] = $2; norm[$1] = $3; next }
        { print $0, loss[$1], norm[$1]; good += near($2, loss[$1]) && near($3, norm[$1]) }
        END { exit good != steps }'
}
nears() { check "$mpi: $2 on $1 ranks, $5: one process, to 1e-6" near "$1" "$2" "$3" "$4" $5; }

computed() {
    equals 2 1f1b "--micro-batches 3"
    equals 3 1f1b "--micro-batches 5 --residual hc $below"
    equals 4 1f1b "--micro-batches 2 --residual plain --recompute 1 --layers 4"
    equals 4 1f1b "--micro-batches 9 $above"
    equals 2 1f1b "--residual none"
    equals 3 "1f1b --pp-layers 0,3,0" "--micro-batches 3"
    equals 1 dualpipev "--micro-batches 3"
    equals 2 dualpipev "--micro-batches 3"
    equals 2 dualpipev "--micro-batches 5 $above"
    equals 3 dualpipev "--micro-batches 4 --residual hc --recompute auto"
    equals 4 dualpipev "--micro-batches 9 $below"
    equals 4 dualpipev "--micro-batches 2 --residual ihc --recompute 2 --layers 8"
    equals 2 "dualpipev --pp-layers 2,0,1,0" "--micro-batches 3"
    nears 2 dualpipe 1 '' "--micro-batches 2"
    nears 2 dualpipe 1 '' "--micro-batches 1 --recompute 1"
    nears 4 dualpipe 1 '' "--micro-batches 7 --residual hc $above"
    nears 4 dualpipe 1 '' "--micro-batches 8 --residual plain $below"
    nears 2 none 3 "--micro-batches 4" "--micro-batches 2"
    nears 4 "1f1b --ranks 2" 3 "--micro-batches 6" "--micro-batches 3"
    nears 4 "dualpipev --ranks 2" 3 "--micro-batches 4" "--micro-batches 2"
    nears 4 "dualpipe --ranks 2" 1 "--micro-batches 4" "--micro-batches 2"
}

computed_long() {
    for P in 1 2 3 4 5 6 8; do
        for M in 1 2 3 5 $((2 * P)) $((2 * P + 3)); do
            for mode in none plain hc mhc ihc; do
                for schedule in 1f1b dualpipev; do
                    equals $P $schedule "--micro-batches $M --residual $mode --recompute $((M % 3))"
                done
                [ $((P % 2)) = 1 ] || nears $P dualpipe 1 '' "--micro-batches $M --residual $mode"
            done
        done
    done
}

# Saved after 2 steps of 3 at P = 4; others go on, as if nothing had been.
saves="--micro-batches 3 --save-every 2 --keep 0"
saved() {
    alone $saves && must 0 4 $(options $saves --pipeline dualpipev) --out ranks || return
    rm -rf part && mv ranks part && rm part/$last
}
went_on() {
    P=$1 schedule=$2
    rm -rf next && cp -r part next
    must 0 "$P" $(options $saves --pipeline "$schedule") --out next --resume && same_run next "$reference"
}
evaluated() {
    must 0 "$1" --pipeline "$2" --eval --out part && "$program" --eval --out part > stdout &&
        cmp stdout "$SAID/out.0"
}

# --- ranks that cannot begin: one line, of rank 0, and status 2

one_line() {
    ended
    [ $status = 2 ] && others_silent && [ ! -s "$SAID/out.0" ] && [ "$(cat "$SAID"/err.* | wc -l)" = 1 ] &&
        grep -q -e "$1" "$SAID/err.0" || what_was_said "expected $1"
}
refuse() {
    words=$1
    shift
    start "$@"
    one_line "$words"
}
refuse_each() {
    start_each "$2" "$3"
    one_line "$1"
}
refuses() { check "$mpi: refused in one line: $1" refuse "$@"; }
refuses_each() { check "$mpi: refused in one line: $1" refuse_each "$@"; }

refused() {
    run="$tiny --out ranks" pipe="$program $tiny --out ranks --pipeline 1f1b"
    refuses "--ranks: found 3 processes, expected a multiple of the pipeline's 2 ranks" 3 \
        $run --pipeline 1f1b --ranks 2
    refuses "--ranks: found 3, expected an even number" 3 $run --pipeline dualpipe
    refuses "--ranks: found 2.*expected 1" 2 $run --ranks 2
    refuses "--pp-layers: found 1,1, expected 2 numbers .* sum to the 3 blocks" 2 $run --pipeline 1f1b \
        --pp-layers 1,1
    refuses "--generate: found 2 ranks, expected 1" 2 --generate x --init-from part/step_00000002.safetensors
    refuses "--dump: found 2 ranks, expected 1" 2 $tiny --dump dumped --pipeline 1f1b
    refuses '--layers: found "x"' 2 --layers x
    refuses "--eval: found no validation data" 2 \
        $(options --eval --init-from part/step_00000002.safetensors --data shard.bin)
    refuses_each "rank 1: found --lr = 0.02, expected --lr = 0.01 as on rank 0" "$pipe" \
        "$program $(options --lr 2e-2) --out ranks --pipeline 1f1b"
    refuses_each 'rank 1: --layers: found "x"' "$pipe" "$program --layers x"
    refuses_each "rank 1: found version = .*that build.*expected version = .*this build" "$pipe" \
        "$work/other $tiny --out ranks --pipeline 1f1b"
    export ELSEWHERE=1
    refuses "rank 1: text.txt: " 2 $tiny --pipeline 1f1b --out "$work/ranks"
    refuses "rank 1: ranks: " 2 $(options --data "$work/text.txt" --pipeline 1f1b) --out ranks
    export ELSEWHERE=none
}

# --- ranks that cannot go on

endless="--steps 1000000 --val-every 0 --gain-every 0 --sample-every 0 --save-every 0 --log-every 1000000"
begun() {
    tries=0
    while ! grep -q '"type":"step"' ranks/run.jsonl 2> /dev/null && [ $tries -lt 400 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    [ $tries -lt 400 ] || what_was_said "no step in 20 s"
}
endlessly() { start "$@" --out ranks && begun; }

dead() {
    endlessly 4 $(options $endless --pipeline dualpipev) || return
    kill -KILL "$(pid_of 2)"
    since=$(date +%s)
    ended
    [ $status != 0 ] && all_end || what_was_said "expected an end within 5 s"
}

# Of 200 micro-batches it hits one, but for the instant between two steps.
waits="no progress for 1 s: waits for rank 1 to \(send\|take\) the \(input\|gradient\) of"
waits="$waits stage [0-9], micro-batch [0-9]*, direction 0"
stalled() {
    endlessly 3 $(options $endless --pipeline 1f1b --micro-batches 200 --timeout 1) || return
    kill -STOP "$(pid_of 1)"
    ended
    since=$(date +%s)
    [ $status = 75 ] && grep -q "$waits" "$SAID"/err.* && all_end || what_was_said "expected 75 and $waits"
}

# In a weight of the last block, which rank 0 has not
poison() {
    "$python" - part/step_00000002.safetensors poison.safetensors << 'PYTHON'
import json, struct, sys
file = open(sys.argv[1], "rb").read()
length = struct.unpack("<Q", file[:8])[0]
header, data = json.loads(file[8:8 + length]), bytearray(file[8 + length:])
header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if not k.startswith("digest")}
at = header["h.2.mlp.c_proj.weight"]["data_offsets"][0]
data[at:at + 4] = struct.pack("<f", float("nan"))
text = json.dumps(header).encode()
open(sys.argv[2], "wb").write(struct.pack("<Q", len(text)) + text + data)
PYTHON
}
not_finite() {
    words=$1
    shift
    must 3 "$@" --out ranks || return
    [ "$(grep -c "$words" "$SAID/err.0")" = 1 ] && [ "$(cat "$SAID"/err.* | wc -l)" = 1 ] &&
        [ "$(grep -c '"type":"stop".*"status":3' ranks/run.jsonl)" = 1 ] && ! ls ranks/step_* 2> /dev/null ||
        what_was_said "$words"
}

one_checkpoint() {
    stopped=$(sed -n 's/.*stopped after step \([0-9]*\); this goes on:$/\1/p' "$SAID/out.0")
    [ "$(ls ranks | grep -v '^\(lock\|run.jsonl\)$')" = "$(printf 'step_%08d.safetensors' "$stopped")" ] &&
        "$program" --eval --out ranks > stdout || what_was_said "in the directory: $(ls ranks | tr '\n' ' ')"
}
# stopped SIGNAL WHOM: a rank, or the launcher
stopped() {
    endlessly 4 $(options $endless --pipeline dualpipev --micro-batches 2) || return
    if [ "$2" = launcher ]; then kill -s "$1" "$(cat "$SAID/launcher")"; else kill -s "$1" "$(pid_of "$2")"; fi
    ended
    since=$(date +%s)
    [ $status = 0 ] || [ "$1 $2" = "TERM launcher" ] && all_end && others_silent && one_checkpoint ||
        what_was_said "expected one checkpoint and 0"
}
long="--steps 500 --lr 1e-3"
completed() {
    alone $long && endlessly 3 $(options $long --pipeline 1f1b) || return
    kill -TERM "$(pid_of 1)"
    ended
    [ $status = 0 ] && one_checkpoint && [ "$stopped" -lt 500 ] || return
    must 0 2 $(options $long --pipeline dualpipev) --out ranks --resume &&
        cmp ranks/step_00000500.safetensors "$reference/step_00000500.safetensors" &&
        same_story ranks "$reference"
}

full() {
    export LIMITED=$1
    must 4 2 $(options --pipeline 1f1b --save-every 2 --width 256) --out ranks      # of 29 MB
    good=$?
    export LIMITED=none
    [ $good = 0 ] && [ "$(ls ranks | tr '\n' ' ')" = "lock run.jsonl " ] &&
        [ "$(grep -c "warning: .*; the next save tries again" "$SAID/err.0")" = 1 ] &&
        [ "$(cat "$SAID"/err.* | wc -l)" = 2 ] || what_was_said "$(ls ranks)"
}

broken() {
    check "$mpi: a rank is killed: all end within 5 s" dead
    check "$mpi: a rank stands still: it is named, status 75" stalled
    if poison 2> /dev/null; then
        check "$mpi: a rank has a NaN: all stop, status 3" not_finite \
            "stopped at step 1: weight h.2.mlp.c_proj.weight is not finite" 3 \
            $(options --pipeline 1f1b --init-from poison.safetensors)
    else skip "$mpi: a rank has a NaN" "no $python"
    fi
    check "$mpi: a learning rate that is too large: all stop, status 3" not_finite \
        "stopped at step 2: .* is not finite" 2 $(options --pipeline dualpipev --lr 1e30 --grad-clip 0)
    check "$mpi: SIGTERM to a rank: one checkpoint, status 0" stopped TERM 1
    check "$mpi: SIGUSR1 to a rank: one checkpoint, status 0" stopped USR1 3
    check "$mpi: SIGUSR1 to mpirun: one checkpoint, status 0" stopped USR1 launcher
    hasty=$mpirun mpirun="$mpirun $patient"     # with it Open MPI takes twice that long to end after any failure
    check "$mpi: SIGTERM to mpirun: one checkpoint" stopped TERM launcher
    mpirun=$hasty
    check "$mpi: 500 steps, stopped, by others to the end: as if it had not been" completed
    check "$mpi: a full disk on rank 0: status 4, nothing left" full 0
    check "$mpi: a full disk on rank 1: status 4, nothing left" full 1
}

under_mpi() {
    program=$work/$mpi/train_gpt_mhc
    mkdir "$work/$mpi"
    check "$mpi: compiles" $mpicc $flags -DHAVE_MPI -DGIT_HASH='"this build"' "$root/train_gpt_mhc.c" -o "$program" -lm
    sed 's/this build/that build/' "$program" > "$work/other" && chmod +x "$work/other"
    computed
    [ -z "$LONG" ] || computed_long
    check "$mpi: saves on 4 ranks" saved
    check "$mpi: goes on on 1 rank" went_on 1 none
    check "$mpi: goes on on 2 ranks with 1f1b" went_on 2 1f1b
    for schedule in 1f1b dualpipev; do check "$mpi: --eval with $schedule: one process's line" evaluated 3 $schedule; done
    refused
    broken
}

write_tokens 7 | write_shard 20240520 1 1024 > "$work/shard.bin"
cd "$work" || exit 1
found=
for mpi in openmpi mpich mpi; do
    mpicc=mpicc.$mpi mpirun=mpirun.$mpi
    [ $mpi = mpi ] && mpicc=mpicc mpirun=mpirun
    [ $mpi = mpi ] && [ "$found" ] && continue      # one of those before
    command -v $mpicc > /dev/null && command -v $mpirun > /dev/null || continue
    found=yes
    patient=
    $mpirun --version | grep -qE 'Open ?(MPI|RTE)' &&
        patient="--mca odls_base_sigkill_timeout 30" mpirun="$mpirun --oversubscribe --bind-to none"
    under_mpi
done
[ "$found" ] || skip "ranks of MPI" "no mpicc and mpirun here; make deps installs them"
finish
