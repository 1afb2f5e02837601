#!/bin/sh
# The paper's central figure, on two cores in minutes: plain residual, HC and mHC train on the same data from
# the same start. Loss over the steps, and what 60 sublayers (as in the paper's largest model) multiply
# a signal and a gradient by.
#     sh scripts/fig_gain.sh [TEXT.txt] [--steps 200, or other options of train_gpt_mhc]
# Without a text the built-in corpus is trained on. Writes out/fig_gain/{plain,hc,mhc}/run.jsonl and gain.csv
# beside them, and gain.svg where there is a Python 3.
set -eu

case "${1:---}" in
--*) ;;
*)  [ -f "$1" ] || { echo "$1: found no file, expected a .txt to train on" >&2; exit 2; }
    text=$(realpath "$1")
    shift
    set -- --data "$text" "$@" ;;
esac
cd "$(dirname "$0")/.."
make -s train_gpt_mhc
dir=out/fig_gain
mkdir -p $dir
cat > $dir/recipe.cfg <<'RECIPE'
layers = 30
width = 64
heads = 4
seq = 64
batch = 6
steps = 600
lr = 3e-3
warmup = 50
gain-every = 10
val-every = 0       # at the end
tokens = 1          # almost no sample
overwrite = true
RECIPE

# Results do not depend on the number of threads, and models this narrow gain nothing from many.
threads=$(($(getconf _NPROCESSORS_ONLN) / 2))
[ $threads -ge 1 ] || threads=1
[ $threads -le 4 ] || threads=4

# A run that was interrupted ends well too, but is not done.
run() {
    residual=$1
    shift
    OMP_NUM_THREADS=$threads ./train_gpt_mhc --config $dir/recipe.cfg --residual "$residual" \
        --out "$dir/$residual" "$@" > "$dir/$residual.log" && grep -q '^done' "$dir/$residual.log" && return
    echo "$residual: did not finish, see above and $dir/$residual.log" >&2
    return 1
}

# One row a step; a cell is empty where nothing was measured.
rows() {
    awk -v residual="$1" '
        function value(key,    found) {
            if (!match($0, "\"" key "\":[^,}]*")) return ""
            found = substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
            return found == "null" ? "" : found
        }
        index($0, "{\"type\":\"step\"") == 1 {
            if (row) print row ","
            row = residual "," value("step") "," value("loss") "," value("grad_norm")
            row = row "," value("gain_fwd") "," value("gain_bwd")
        }
        index($0, "{\"type\":\"val\"") == 1 { print row "," value("loss"); row = "" }
        END { if (row) print row "," }' "$dir/$1/run.jsonl"
}

echo "training plain, then hc, and beside them mhc: some minutes, progress in $dir/*.log"
{ run plain "$@" && run hc "$@"; } &
run mhc "$@" || failed=yes
wait $! || failed=yes
[ -z "${failed-}" ] || exit 1
echo residual,step,loss,grad_norm,gain_fwd,gain_bwd,val_loss > $dir/gain.csv
for residual in plain hc mhc; do
    rows $residual >> $dir/gain.csv
    echo "$residual: $(grep '^step' $dir/$residual.log | tail -n 1)"
done
if command -v python3 > /dev/null; then
    python3 scripts/fig_gain.py $dir
    echo "$dir/gain.csv, $dir/gain.svg"
else
    echo "$dir/gain.csv; without python3 no figure was drawn, scripts/fig_gain.py $dir draws it"
fi
