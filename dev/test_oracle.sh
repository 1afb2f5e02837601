#!/bin/sh
# The trainer against the PyTorch model, which shares no line with it: for each residual mode dumps at the
# start and after 20 steps, those 20 steps, and the checkpoint read in Python. Then every kind of connection,
# after 20 steps at a learning rate that takes it far, where fp32 rounding may exceed any tolerance that finds
# mistakes: so with a build in double.
. dev/testlib.sh

if ! "$python" -c 'import torch' 2> /dev/null; then
    skip "the PyTorch oracle" "$python cannot import torch (make deps installs it)"
    finish
fi
write_text > "$work/text.txt"
double=$work/train_double
for cc in ${CC:-} gcc clang cc; do
    $cc -std=c11 -O1 -w -DREAL=double -D_GNU_SOURCE train_gpt_mhc.c -o "$double" -lm 2> "$work/log" && break
done
[ -x "$double" ] || fail "a build in double" "$(tail -n 1 "$work/log")"
cd "$work" || exit 1
train="--data text.txt --steps 20 --warmup 2 --val-batches 1 --tokens 1 --gain-every 0 --save-every 0"

# run PROGRAM NAME OPTION...: a run's log, its checkpoint, and dumps before and after it
run() {
    program=$1 name=$2
    shift 2
    "$program" $train --out "$name" "$@" > log 2>&1 \
        && "$program" $train "$@" --dump "$name/start.safetensors" > log 2>&1 \
        && "$program" $train "$@" --init-from "$name/step_00000020.safetensors" \
            --dump "$name/trained.safetensors" > log 2>&1 \
        || fail "$name" "$(tail -n 1 log)"
}
far() { run "$double" "$@" --lr 2e-2; }

small="--layers 2 --width 16 --heads 2 --seq 16 --batch 2"
for mode in none plain hc mhc ihc; do
    run "$trainer" $mode $small --micro-batches 2 --residual $mode --lr 1e-3
done
for mode in none plain hc mhc ihc; do far far_$mode $small --residual $mode; done
for order in rc c r none; do far order_$order $small --sinkhorn-order $order --sinkhorn-iters 3; done
for maps in none pre post res pre,res; do far maps_$maps $small --hc-maps $maps; done
for n in 1 2 3 8; do far mhc_n$n $small --streams $n; done
for n in 1 3; do far hc_n$n $small --residual hc --streams $n; done
for mode in hc mhc ihc; do far ${mode}_static $small --residual $mode --hc-static; done
far ihc_n8 $small --residual ihc --streams 8
odd="--layers 3 --width 35 --heads 5 --seq 13 --batch 3 --vocab 131"
for mode in plain hc mhc ihc; do far odd_$mode $odd --residual $mode; done
far short --layers 1 --width 3 --heads 1 --seq 2 --batch 1 --streams 2

PYTHONDONTWRITEBYTECODE=1 "$python" - "$root/dev/reference" * > python.out 2> python.err << 'PYTHON'
import contextlib, io, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import check_dump, check_training
from gpt_mhc import GPT

torch.set_num_threads(1)

def dump(path):
    results = check_dump.check_file(path)
    bad = [f"{name} {relative or 0:.1e} {remark}" for name, passed, relative, remark in results if not passed]
    floors = sum(1 for result in results if result[1] and result[3])
    worst = max((result[2] or 0 for result in results if result[1] and not result[3]), default=0)
    return not bad, f"{len(results)} tensors, worst {worst:.1e}, {floors} zero to rounding", bad

def training(folder):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        counts = check_training.check(folder + "/start.safetensors", folder + "/run.jsonl", "text.txt")
    return counts == (20, 0), "20 steps", [line for line in out.getvalue().splitlines() if "FAIL" in line]

def checkpoint(folder):
    model = GPT.from_safetensors(folder + "/step_00000020.safetensors")
    dumped = GPT.from_safetensors(folder + "/trained.safetensors")
    pairs = list(zip(model.state_dict().items(), dumped.state_dict().items()))
    same = all(a == c and torch.equal(b, d) for (a, b), (c, d) in pairs)
    return same, f"{len(pairs)} tensors", []

def check(what, function, *arguments):
    try:
        good, detail, bad = function(*arguments)
    except Exception as error:
        good, detail, bad = False, "", [repr(error)]
    print(f"ok   {what}: {detail}" if good else f"FAIL {what}: {'; '.join(bad[:3]) or detail}", flush=True)

for folder in sorted(name for name in sys.argv[2:] if os.path.isdir(name)):
    check(folder + ": gradients at the start", dump, folder + "/start.safetensors")
    check(folder + ": gradients after 20 steps", dump, folder + "/trained.safetensors")
    if folder in ("none", "plain", "hc", "mhc", "ihc"):
        check(folder + ": losses and gradient norms", training, folder)
        check(folder + ": our checkpoint in Python", checkpoint, folder)
print("end")
PYTHON
if [ "$(tail -n 1 python.out)" = end ]; then
    pass "the oracle ran to its end"
else
    fail "the oracle ran to its end" "$(tail -n 1 python.err)"
fi
grep '^ok\|^FAIL' python.out
passed=$((passed + $(grep -c '^ok' python.out))) failed=$((failed + $(grep -c '^FAIL' python.out)))

if (cd "$root/dev/reference" && PYTHONDONTWRITEBYTECODE=1 "$python" test_reference.py) > reference 2>&1; then
    pass "the oracle itself: $(tail -n 1 reference)"
else
    fail "the oracle itself" "$(grep FAIL reference; tail -n 1 reference)"
fi

finish
