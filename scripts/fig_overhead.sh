#!/bin/sh
# What each mode's step takes over plain's, in turn on one machine. The paper's 6.7 % is another quantity:
# what mHC adds to a stage of its pipeline, with fused kernels and communication overlapped, at 27 B
# parameters.
#     sh scripts/fig_overhead.sh [--scale tiny|gpu|a100] [--widths 128,384] [--also FILE.csv] [--help]
# --also adds what was measured elsewhere: tables, with commas between, that this script wrote there. Times
# are kept like any run: without out/figures/runs they are measured anew.
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

PIPELINE = dict(pipeline="dualpipev", ranks=2, micro_batches=6)
RUNGS = {       # name: options, what it is compared with
    "plain": (dict(arm="plain"), "plain"),
    "HC": (dict(arm="hc"), "plain"),
    "iHC": (dict(arm="ihc"), "plain"),
    "mHC": (dict(arm="mhc"), "plain"),
    "mHC + recompute": (dict(arm="mhc", recompute="auto"), "plain"),
    "mHC + fused": (dict(arm="mhc", kernels="fused"), "plain"),
    "mHC + fused + recompute": (dict(arm="mhc", kernels="fused", recompute="auto"), "plain"),
    "plain + pipeline": (dict(arm="plain", **PIPELINE), "plain + pipeline"),
    "mHC + pipeline": (dict(arm="mhc", **PIPELINE), "plain + pipeline"),
}
PAPER = 6.7
on_gpu = ("plain", "HC", "iHC", "mHC", "mHC + recompute", "mHC + fused", "mHC + fused + recompute")
fig = Figure("overhead", "What a step takes more than a plain residual's", width=None, val_batches=1,
             gain_every=0, also="", rungs=on_gpu,
             tiny=dict(layers=4, heads=4, seq=128, batch=4, steps=40, widths=(256,), seeds=(1, 2), rungs=(
                 "plain", "HC", "mHC", "mHC + recompute", "plain + pipeline", "mHC + pipeline")),
             gpu=dict(layers=8, heads=4, seq=1024, batch=8, steps=60, widths=(256, 512)),
             a100=dict(layers=8, heads=8, micro_batches=1, steps=100, widths=(512, 1024)))
others = [path for path in fig.settings.pop("also").split(",") if path]
for rung in fig.rungs:
    if rung not in RUNGS or RUNGS[rung][1] not in fig.rungs:
        stop(f"--rungs: found {rung}, expected of {text_of(tuple(RUNGS))}, with what each is compared with")
runs = {(width, rung, seed): fig.run(**RUNGS[rung][0], seed=seed, width=width)
        for seed in fig.seeds for width in fig.widths for rung in fig.rungs}
fig.settings["shape"] = f"{fig.layers} blocks of width {text_of(fig.widths)}"
fig.jobs = 1                    # nothing beside what is timed
fig.train()


def fast(width, rung):
    """(seeds): ms that a tenth of the steps stay below. What else runs makes steps slower, never faster"""
    steps = [runs[width, rung, seed].column("step_ms")[2:] for seed in fig.seeds]
    return np.percentile(steps, 10, axis=1)


rows = []
for width in fig.widths:
    for rung in fig.rungs:
        times, base = fast(width, rung), RUNGS[rung][1]
        mean, half = interval(100 * (times / fast(width, base) - 1))
        device = runs[width, rung, fig.seeds[0]].lines("run")[-1]["device"]
        rows.append([device, width, rung, float(np.median(times)), float(mean), float(half)])
        over = f", {mean:+.1f} +- {half:.1f} % over {base} (95 %, {len(fig.seeds)} repetitions)"
        fig.say(f"width {width}, {rung}: {np.median(times):.1f} ms a step{over if rung != base else ''}")
header = ["device", "width", "rung", "step_ms", "percent_over_plain", "half_width"]
for path in others:
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                numbers = [float(row[name]) for name in header[3:]]
                rows.append([row["device"], int(row["width"]), row["rung"], *numbers])
    except (OSError, KeyError, ValueError) as problem:
        stop(f"{path}: found {problem!r}, expected overhead.csv of another machine")
bars = [row for row in rows if RUNGS.get(row[2], [None])[-1] != row[2]]
axis = fig.panels(1, height=1.5 + 0.26 * len(bars), about="bars: 95 % of the mean")
places = {group: k for k, group in enumerate(dict.fromkeys((row[0], row[1]) for row in rows))}
for k, (device, width, rung, _, mean, half) in enumerate(bars):
    axis.barh(-k, mean, 0.7, color=PALETTE[places[device, width] % len(PALETTE)], alpha=0.8,
              label=f"{device}, width {width}")
    axis.errorbar(mean, -k, xerr=np.nan_to_num(half), color=INK, capsize=2, linewidth=1)
axis.axvline(PAPER, color=SOFT, linewidth=1, linestyle=(0, (4, 2)),
             label=f"paper: {PAPER} % of an overlapped pipeline stage")
axis.set_yticks([-k for k in range(len(bars))], [row[2] for row in bars])
axis.set_xlabel("time of a step over plain's (with a pipeline: over plain's in the same pipeline), %")
handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
axis.legend(handles.values(), handles.keys(), fontsize=8)
fig.table(header, rows)
fig.save()
FIGURE
