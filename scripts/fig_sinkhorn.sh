#!/bin/sh
# How many Sinkhorn-Knopp iterations, and rows or columns last: loss against the paper's (20, rows last),
# and what is left of the error. Rows last leaves it in the columns, the gradient's gain; columns last in
# the signal's.
#     sh scripts/fig_sinkhorn.sh [--scale tiny|gpu|a100] [--iterations 1,2,5,10,20,50,100] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

ORDERS = {"cr": ("rows last", PALETTE[0]), "rc": ("columns last", PALETTE[1])}
fig = Figure("sinkhorn", "Sinkhorn-Knopp iterations, and which side is exact", iterations=(1, 5, 20),
             seeds=(1, 2), gpu=dict(iterations=(1, 2, 5, 10, 20, 50, 100), seeds=(1, 2, 3)),
             a100=dict(iterations=(1, 5, 20, 100), seeds=(1, 2, 3)))
runs = {(order, count, seed): fig.run("mhc", seed, sinkhorn_order=order, sinkhorn_iters=count)
        for order in ORDERS for count in fig.iterations for seed in fig.seeds}
paper = {seed: fig.run("mhc", seed, sinkhorn_order="cr", sinkhorn_iters=20) for seed in fig.seeds}
fig.train()

losses, errors = fig.panels(2, about="bars: 95 % of the mean")
rows = []
for order, (words, colour) in ORDERS.items():
    means, halves, off = [], [], {"forward": [], "backward": []}
    for count in fig.iterations:
        mine = [runs[order, count, seed] for seed in fig.seeds]
        gaps = [run.val - paper[run.seed].val for run in mine]
        mean, half = interval(gaps)
        means, halves = [*means, mean], [*halves, np.nan_to_num(half)]
        for side in off:
            high = np.mean([run.gain(f"composite_{side}_max")[-1].max() for run in mine])
            low = np.mean([run.gain(f"composite_{side}_min")[-1].min() for run in mine])
            off[side].append(max(high - 1, 1 - low, 1e-9))
        forward, backward = off["forward"][-1], off["backward"][-1]
        gap = verdict(gaps, fig.unit) if (order, count) != ("cr", 20) else "the reference"
        fig.say(f"{words}, {count} iterations: {gap}; gains off 1 by {forward:.2g} forward, "
                f"{backward:.2g} backward")
        rows += [[order, count, run.seed, run.val, gap, forward, backward] for run, gap in zip(mine, gaps)]
    shift = 0.96 if order == "cr" else 1.04
    places = np.array(fig.iterations) * shift
    losses.errorbar(places, means, halves, color=colour, marker="o", capsize=3, label=words)
    for side, dash in DASH.items():
        errors.plot(fig.iterations, off[side], "o", color=colour, linestyle=dash, label=f"{words}, {side}")
losses.axhline(0, color=SOFT, linewidth=1)
losses.set(ylabel=f"validation loss minus the reference's, {fig.unit}", title="reference: 20, rows last")
errors.set(yscale="log", ylabel="largest |composite gain - 1|", title="what is left of the error, last step")
for axis in (losses, errors):
    axis.set(xlabel="iterations")
    fixed_ticks(axis, fig.iterations)
losses.legend()
errors.legend(fontsize=8)
fig.table(["order", "iterations", "seed", "val_loss", "minus_paper", "off_forward", "off_backward"], rows)
fig.save()
FIGURE
