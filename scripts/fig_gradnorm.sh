#!/bin/sh
# The gradient's norm before and after clipping, and how often it is clipped (paper, Fig. 5b, which shows
# one curve an arm). The runs are those of scripts/fig_loss.sh.
#     sh scripts/fig_gradnorm.sh [--scale tiny|gpu|a100] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("gradnorm", "Norm of the gradient, before and after clipping",
             arms=("plain", "hc", "mhc", "ihc"))
clip, warmup = float(fig.grad_clip), int(fig.warmup)
rates = fig.best_rates()
runs = {(arm, seed): fig.run(arm, seed, lr=rates.get(arm, fig.lr)) for seed in fig.seeds for arm in fig.arms}
fig.train()

before, after, share = fig.panels(3, about=f"clipped at {clip:g}; bands: smallest and largest of the seeds")
rows, window = [], max(1, int(fig.steps) // 20)
for arm in fig.arms:
    length = min(len(runs[arm, seed].column("grad_norm")) for seed in fig.seeds)
    norms = np.array([runs[arm, seed].column("grad_norm")[:length] for seed in fig.seeds])
    clipped = np.minimum(norms, clip) if clip > 0 else norms
    steps = np.arange(1, length + 1)
    band(before, steps, np.median(norms, 0), norms.min(0), norms.max(0), arm, linewidth=1)
    middles = np.arange(length - window + 1) + (window + 1) / 2
    after.plot(middles, smooth(clipped.mean(0), window), **style(arm))
    share.plot(middles, 100 * smooth((norms > clip).mean(0) if clip > 0 else 0 * steps, window), **style(arm))
    later = norms[:, warmup:]
    fig.say(f"{name_of(arm)}: after the warm-up the largest norm is {later.max():.3g}, the median "
            f"{np.median(later):.3g}; clipped {100 * np.mean(later > clip):.1f} % of the steps (seeds: "
            f"{', '.join(f'{100 * x:.1f}' for x in np.mean(later > clip, 1))})")
    rows += [[arm, s, *values] for s, *values in zip(steps, np.median(norms, 0), norms.min(0), norms.max(0),
                                                     np.median(clipped, 0), (norms > clip).mean(0))]
for axis in (before, after):
    axis.set(xlabel="step", ylabel="norm of the gradient")
before.set(yscale="log", title="before clipping, median of the seeds")
after.set(title=f"after it, mean of {window} steps")
share.set(xlabel="step", ylabel="% of the steps", title="how often it is clipped")
before.legend()
fig.table(["arm", "step", "norm_median", "norm_min", "norm_max", "clipped_norm_median", "share_clipped"],
          [[arm, s, *map(float, values)] for arm, s, *values in rows])
fig.save()
FIGURE
