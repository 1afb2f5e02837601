#!/bin/sh
# How many streams, and how near to the identity the mixing starts (--hc-gap, logits on the diagonal: 0
# uniform, 4 the default, 8 nearly the identity). Losses are against mHC with 4 streams and gap 4.
#     sh scripts/fig_n_gap.sh [--scale tiny|gpu|a100] [--streams 1,2,4,8] [--gaps 0,4,8] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("n_gap", "How many streams, and how near to the identity they start", streams=(1, 2, 4, 8),
             gaps=(0.0, 4.0, 8.0), tiny=dict(seeds=(1, 2)), gpu=dict(gaps=(0.0, 2.0, 4.0, 6.0, 8.0)))
arms = dict.fromkeys([(n, 4.0) for n in (4, *fig.streams)] + [(4, gap) for gap in fig.gaps])
arms = {(n, gap): f"{n} stream{'s' * (n > 1)}, gap {gap:g}" for n, gap in arms}
runs = {(n, gap, seed): fig.run("mhc", seed, streams=n, hc_gap=gap) for seed in fig.seeds for n, gap in arms}
fig.train()

losses, cosines = fig.panels(2, about="bars: 95 % of the mean; small dots are seeds")
rows, order = [], sorted(arms, key=lambda arm: (arm[1] != 4, arm))
gaps = {arm: [runs[(*arm, seed)].val - runs[4, 4.0, seed].val for seed in fig.seeds] for arm in order}
colours = {arm: PALETTE[k % len(PALETTE)] for k, arm in enumerate(order)}
fig.forest(losses, [(arms[arm], gaps[arm], colours[arm]) for arm in order if arm != (4, 4.0)], fig.unit)
for arm in order:
    cosine = np.mean([runs[(*arm, seed)].gain("cosine")[-1] for seed in fig.seeds], 0)
    if arm[0] > 1:
        cosines.plot(cosine, color=colours[arm], label=arms[arm])
        fig.say(f"{arms[arm]}: least mean cosine between streams {cosine.min():.4f}")
    rows += [[*arm, seed, runs[(*arm, seed)].val, gap] for seed, gap in zip(fig.seeds, gaps[arm])]
losses.set(xlabel=f"validation loss minus that of 4 streams, gap 4\n{fig.unit}", title="loss")
cosines.set(xlabel="before sublayer", ylabel="mean cosine between two streams",
            title="how alike the streams are, last step")
cosines.legend(fontsize=8)
fig.table(["streams", "gap", "seed", "val_loss", "minus_default"], rows)
fig.save()
FIGURE
