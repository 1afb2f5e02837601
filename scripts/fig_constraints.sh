#!/bin/sh
# What the mixing has to satisfy: positive entries and nothing else; rows, columns or both that sum to 1; or
# the identity. Without exact rows a model does not start as the plain one: its streams grow or shrink at
# once.
#     sh scripts/fig_constraints.sh [--scale tiny|gpu|a100] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

ROWS = {"none": "positive entries", "r": "rows sum to 1", "c": "columns sum to 1", "cr": "both (mHC)",
        "identity": "identity (iHC)"}
fig = Figure("constraints", "What the mixing matrices have to satisfy", tiny=dict(seeds=(1, 2)))
plain = {seed: fig.run("plain", seed) for seed in fig.seeds}
arms = {order: dict(arm="mhc", sinkhorn_order=order) for order in ROWS} | {"identity": dict(arm="ihc")}
runs = {(order, seed): fig.run(seed=seed, **arms[order]) for seed in fig.seeds for order in ROWS}
fig.train()

losses, gains = fig.panels(2, about="bars: 95 % of the mean; small dots are seeds")
gaps = {order: [runs[order, seed].val - plain[seed].val for seed in fig.seeds] for order in ROWS}
fig.forest(losses, [(ROWS[order], gaps[order], colour) for order, colour in zip(ROWS, PALETTE)], fig.unit)
rows = []
for (order, words), colour in zip(ROWS.items(), PALETTE):
    for side, dash in DASH.items():
        high = np.mean([runs[order, seed].gain(f"composite_{side}_max")[-1] for seed in fig.seeds], 0)
        low = np.mean([runs[order, seed].gain(f"composite_{side}_min")[-1] for seed in fig.seeds], 0)
        gains.plot(high, color=colour, linestyle=dash, label=words if side == "forward" else None)
        fig.say(f"{words}: composite gain {side}, after the last step, {low.min():.4g} to {high.max():.4g}")
    rows += [[order, seed, runs[order, seed].val, gap] for seed, gap in zip(fig.seeds, gaps[order])]
losses.set(xlabel=f"validation loss minus plain's, {fig.unit}", title="loss")
gains.set(yscale="log", xlabel="from sublayer ... to the end", ylabel="largest gain, times",
          title="composite, last step; dashed: backward")
gains.legend(fontsize=8)
fig.table(["constraint", "seed", "val_loss", "minus_plain"], rows)
fig.save()
FIGURE
