#!/bin/sh
# Do the streams collapse? Cosine between them, effective rank (exp of the entropy of their singular values,
# 1 to n) and the largest one's share of the squared norm (1/n to 1). The runs are those of
# scripts/fig_loss.sh.
#     sh scripts/fig_streams.sh [--scale tiny|gpu|a100] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("streams", "Do the streams collapse?", arms=("hc", "mhc", "ihc"))
rates = fig.best_rates()
runs = {(arm, seed): fig.run(arm, seed, lr=rates.get(arm, fig.lr)) for seed in fig.seeds for arm in fig.arms}
fig.train()

about = "mean over tokens and seeds; bands: smallest and largest of the seeds"
(cosine, rank), (share, over_steps) = fig.panels(2, rows=2, height=6.4, about=about)
rows = []
for arm in fig.arms:
    mine = [runs[arm, seed] for seed in fig.seeds]
    cosines = np.array([run.gain("cosine")[-1] for run in mine])
    ranks = np.array([run.gain("effective_rank") for run in mine])          # (seeds, times, sublayers + 1)
    streams = len(mine[0].gain("norm_share")[-1]) // cosines.shape[1]
    shares = np.array([run.gain("norm_share")[-1].reshape(-1, streams).max(1) for run in mine])
    for axis, values in ((cosine, cosines), (rank, ranks[:, -1]), (share, 100 * shares)):
        band(axis, range(values.shape[1]), values.mean(0), values.min(0), values.max(0), arm)
    over_steps.plot(mine[0].gain_steps, ranks.mean(2).mean(0), **style(arm))
    means = [values.mean(0) for values in (cosines, ranks[:, -1], shares)]
    rows += [[arm, k, *map(float, values)] for k, values in enumerate(zip(*means))]
    fig.say(f"{name_of(arm)}, last step: mean cosine {means[0].mean():.3f}, the least {means[0].min():.3f}; "
            f"effective rank {means[1].mean():.2f} of {streams}; the largest stream has up to "
            f"{100 * shares.max():.0f} % of the squared norm")
cosine.set(xlabel="before sublayer", ylabel="mean cosine between two streams", title="cosine, last step")
rank.set(xlabel="before sublayer", ylabel="directions", title="effective rank, last step")
share.set(xlabel="before sublayer", ylabel="% of the squared norm", title="largest share, last step")
over_steps.set(xlabel="step", ylabel="directions", title="effective rank, mean over the sublayers")
cosine.legend()
fig.table(["arm", "before_sublayer", "cosine", "effective_rank", "largest_norm_share"], rows)
fig.save()
FIGURE
