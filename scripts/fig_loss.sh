#!/bin/sh
# What HC, mHC and iHC gain over a plain residual, with paired seeds: the same seed is the same start and
# the same data in all arms (paper, Fig. 5a). Learning rates: each arm's best of scripts/fig_lr.sh, where
# that ran.
#     sh scripts/fig_loss.sh [--scale tiny|gpu|a100] [--seeds 1,2,3,4,5] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("loss", "Loss of streams minus loss of a plain residual", arms=("hc", "mhc", "ihc"))
rates = fig.best_rates()
runs = {(arm, seed): fig.run(arm, seed, lr=rates.get(arm, fig.lr))
        for seed in fig.seeds for arm in ("plain", *fig.arms)}
fig.train()

left, right = fig.panels(2, about="bars and bands: 95 % of the mean")
window, rows, limit = max(1, int(fig.steps) // 20), [], 0
for arm in fig.arms:
    pairs = [(runs[arm, seed], runs["plain", seed]) for seed in fig.seeds]
    length = min(len(run.column("loss")) for pair in pairs for run in pair)
    gaps = [run.column("loss")[:length] - plain.column("loss")[:length] for run, plain in pairs]
    steps = np.arange(length - window + 1) + (window + 1) / 2
    mean, half = interval([smooth(gap, window) for gap in gaps])
    band(left, steps, mean, mean - half, mean + half, arm)
    limit = max(limit, (np.abs(mean) + np.nan_to_num(half))[length // 3 :].max())    # not the start's
    rows.append((name_of(arm), [run.val - plain.val for run, plain in pairs], STYLE[arm][1]))
left.axhline(0, color=SOFT, linewidth=1)
left.set(ylim=(-1.1 * limit, 1.1 * limit), xlabel="step", ylabel=f"training loss minus plain's, {fig.unit}",
         title=f"training, mean of {window} steps")
left.legend()
fig.forest(right, rows, fig.unit)
right.set(xlabel=f"validation loss minus plain's, {fig.unit}", title="at the end; small dots are seeds")
plain = [runs["plain", seed].val for seed in fig.seeds]
spread = np.std(plain, ddof=len(plain) > 1)
fig.say(f"plain: {np.mean(plain):.4f} {fig.unit}, standard deviation over seeds {spread:.4f}")
fig.table(["arm", "seed", "lr", "val_loss", "minus_plain"],
          [[arm, seed, run.options["lr"], run.val, run.val - runs["plain", seed].val]
           for (arm, seed), run in runs.items()])
fig.save()
FIGURE
