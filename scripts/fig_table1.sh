#!/bin/sh
# Which of the three maps does what (paper, Table 1, there for HC: mixing -0.022 nats, with reading -0.025,
# with writing -0.027). A map that is off is 1/n, 1, I. Without a learnt read or write the streams of mHC
# never part (MODEL.md, The symmetry trap): such a row is a plain model with at most a gate on F, and the
# text says so.
#     sh scripts/fig_table1.sh [--scale tiny|gpu|a100] [--modes mhc,hc] [--seeds 1,2,3] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

ROWS = {"res": "mixing", "pre,res": "read, mixing", "pre,post": "read, write; identity",
        "pre,post,res": "read, write, mixing"}
fig = Figure("table1", "Which of the three maps does what", modes=("mhc", "hc"),
             tiny=dict(seeds=(1, 2), modes=("mhc",)))
plain = {seed: fig.run("plain", seed) for seed in fig.seeds}
arms = {}
for mode in fig.modes:
    arms |= {(mode, maps, False): f"{name_of(mode)}: {words}" for maps, words in ROWS.items()}
    arms[mode, "pre,post,res", True] = f"{name_of(mode)}: all, static"
runs = {(mode, maps, static, seed): fig.run(mode, seed, hc_maps=maps, hc_static=static)
        for seed in fig.seeds for mode, maps, static in arms}
fig.train()

axis = fig.panels(1, height=1.4 + 0.42 * len(arms), about="bars: 95 % of the mean; small dots are seeds")
gaps = {arm: [runs[(*arm, seed)].val - plain[seed].val for seed in fig.seeds] for arm in arms}
fig.forest(axis, [(words, gaps[arm], STYLE[arm[0]][1]) for arm, words in arms.items()], fig.unit)
axis.set_xlabel(f"validation loss minus plain's, {fig.unit}")
for arm, words in arms.items():
    cosine = np.mean([runs[(*arm, seed)].gain("cosine")[-1].min() for seed in fig.seeds])
    if cosine > 0.99999:
        fig.say(f"{words}: streams still equal at the end (cosine {cosine:.6f}): plain with at most gates")
fig.table(["mode", "maps", "static", "seed", "val_loss", "minus_plain"],
          [["plain", "", "", seed, run.val, 0.0] for seed, run in plain.items()] +
          [[*arm, seed, runs[(*arm, seed)].val, gap]
           for arm in arms for seed, gap in zip(fig.seeds, gaps[arm])])
fig.save()
FIGURE
