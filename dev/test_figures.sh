#!/bin/sh
# The frame of scripts/fig_*.sh: statistics, runs that are interrupted, tables, pictures, what it refuses.
. dev/testlib.sh

figure() {
    name=$1
    shift
    PYTHON=$python sh scripts/fig_"$name".sh --trainer "$trainer" --out "$work/$out" "$@"
}
small="--layers 2 --width 16 --heads 2 --seq 16 --batch 2 --steps 300 --warmup 10 --val-batches 2"
small="$small --seeds 1,2"

if ! "$python" -c 'import matplotlib' 2> /dev/null; then
    skip "every figure" "no matplotlib for $python, make deps installs it"
    finish
fi

statistics() {
    PYTHONPATH=scripts "$python" << 'PYTHON'
from figures import *
for freedom, known in ((1, 12.7062), (2, 4.3027), (10, 2.2281), (1000, 1.9623)):     # of any table of t
    assert abs(t_quantile(freedom) / known - 1) < 1e-3, (freedom, t_quantile(freedom))
mean, half = interval([1, 2, 3])
assert mean == 2 and abs(half - 4.3027 / 3**0.5) < 1e-3
for gaps, words in (([-0.11, -0.10, -0.09], "below 0"), ([1, 1.1, 1.2], "above 0"), ([-1, 0, 2], "not told"),
                    ([-1], "no uncertainty"), ([-1, 1, math.inf], "1 of 3 pairs"), ([math.nan], "no pair")):
    assert words in verdict(gaps, "nats"), (gaps, verdict(gaps, "nats"))
random = np.random.default_rng(7)                       # 95 of 100 intervals hold the mean, +- 3 deviations
hits = sum(abs(mean) <= half for mean, half in (interval(random.normal(size=3)) for _ in range(2000)))
assert abs(hits / 2000 - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5, hits
low, high = bootstrap(lambda seeds: np.array([0.0, 1, 2, 3])[seeds].mean(), 4)
assert 0 <= low < 1.5 < high <= 3
assert np.allclose(smooth(np.arange(5.0), 3), [1, 2, 3])
PYTHON
}
check "t, intervals, bootstrap" statistics

out=whole
check "a figure, its table and its pictures" figure loss $small
drawn() {
    [ -s "$work/whole/tiny/loss.png" ] && [ -s "$work/whole/tiny/loss.txt" ] &&
        grep -q '^<svg' "$work/whole/tiny/loss.svg" && [ "$(wc -l < "$work/whole/tiny/loss.csv")" = 9 ]
}
check "all of them are there" drawn
again() {
    cp "$work/whole/tiny/loss.svg" "$work/first.svg" && figure loss $small > "$work/said" &&
        ! grep '^\[' "$work/said" && cmp "$work/whole/tiny/loss.svg" "$work/first.svg"
}
check "the same command trains nothing and draws the same picture" again
shared() { figure streams $small > "$work/said" && ! grep '^\[' "$work/said"; }
check "another figure of the same runs trains nothing" shared

out=parts
stopped() {
    figure loss $small "$@"
    [ $? = 1 ] && [ ! -e "$work/parts/tiny" ]
}
interrupted() {
    PYTHON=$python sh scripts/fig_loss.sh --trainer "$trainer" --out "$work/parts" $small \
        > "$work/said" 2>&1 &
    run=$!
    tries=0
    while ! grep -q '"type":"step"' "$work"/parts/runs/*/run.jsonl 2> /dev/null && [ $tries -lt 400 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    kill -s "$1" $run
    wait $run
    [ $? = 1 ] && grep "the same command goes on" "$work/said"
}
completed() { figure loss $small && cmp "$work/parts/tiny/loss.csv" "$work/whole/tiny/loss.csv"; }
check "a slice of no time stops, status 1" stopped --slice 0
check "SIGTERM: status 1, and the same command goes on" interrupted TERM
check "afterwards the same table" completed

trace='{"traceEvents":[{"name":"F s0 m0","ph":"X","ts":10,"dur":1000,"pid":0,"tid":0},'
trace=$trace'{"name":"mark","ph":"i","ts":0},{"name":"B s1 m0","ph":"X","ts":1010,"dur":3000,"tid":1}]}'
timeline() {
    echo "$trace" > "$work/trace.json" && figure timeline --trace "$work/trace.json" &&
        tail -n 2 "$work/$out/tiny/timeline.csv" > "$work/rows" &&
        printf 'trace.json,0,0,0,1,75\ntrace.json,0,0,1,3,25\n' | cmp - "$work/rows"
}
check "a timeline's bubbles" timeline
refused() {
    wanted=$1
    shift
    figure "$@" > "$work/said" 2>&1
    [ $? = 2 ] && [ "$(wc -l < "$work/said")" = 1 ] && grep -q -e "$wanted" "$work/said"
}
echo '{"traceEvents":[{"ph":"X"}]}' > "$work/bad.json"
check "a scale that is none is refused" refused "^--scale: found huge" loss --scale huge
check "a word that is no setting is refused" refused "^command line: found huge" loss huge
check "seeds that are no numbers are refused" refused "^--seeds: found x" loss --seeds x
check "a trace that is none is refused" refused "bad.json: found .*expected a Chrome trace" \
    timeline --trace "$work/bad.json"
check "an option that the trainer refuses is said" refused "the nearest is --lr" loss $small --lrr 1
finish
