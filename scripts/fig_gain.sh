#!/bin/sh
# The paper's central figure (Fig. 3 and 7): what the mixing matrices, one by one and multiplied up to the
# end, multiply a signal (forward, row sums) and a gradient (backward, column sums) by, over steps and
# sublayers.
#     sh scripts/fig_gain.sh [--scale tiny|gpu|a100] [--layers 30 --steps 600] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("gain", "What the residual connections multiply a signal and a gradient by", arms=("hc", "mhc"),
             tiny=dict(layers=24, batch=6, gain_every=10), gpu=dict(layers=24, gain_every=20))
runs = {(arm, seed): fig.run(arm, seed) for seed in fig.seeds for arm in fig.arms}
fig.train()

about = "solid: forward, dashed: backward; thick: largest, thin: smallest; mean over tokens and seeds"
(over_steps, composite), (single, nearness) = fig.panels(2, rows=2, height=6.8, about=about)
rows = []
for arm in fig.arms:
    colour, mine = STYLE[arm][1], [runs[arm, seed] for seed in fig.seeds]
    steps = mine[0].gain_steps
    for side in DASH:
        look = dict(color=colour, linestyle=DASH[side], label=name_of(arm) if side == "forward" else None)
        largest = np.array([run.gain(f"composite_{side}_max").max(1) for run in mine])
        band(over_steps, steps, largest.mean(0), largest.min(0), largest.max(0), arm, **look)
        low = np.array([run.gain(f"composite_{side}_min").min() for run in mine])
        fig.say(f"{name_of(arm)}, {side}: composite gain at most {largest.max():.6g} (seeds: "
                f"{', '.join(f'{x:.5g}' for x in largest.max(1))}), at least {low.min():.4g}")
        for axis, what in ((composite, "composite"), (single, "sublayer")):
            high = np.mean([run.gain(f"{what}_{side}_max")[-1] for run in mine], 0)
            low = np.mean([run.gain(f"{what}_{side}_min")[-1] for run in mine], 0)
            axis.plot(high, **look)
            axis.plot(low, **look | {"linewidth": 0.8, "label": None})
            rows += [[what, arm, side, k, float(h), float(l)] for k, (h, l) in enumerate(zip(high, low))]
            if arm == "mhc":
                off = np.maximum(np.maximum(high - 1, 1 - low), 1e-9)
                nearness.plot(off, color=PALETTE[0 if what == "composite" else 4], linestyle=DASH[side],
                              label=f"{'to the end' if what == 'composite' else 'one sublayer'}, {side}")
        rows += [["over steps", arm, side, step, float(x), ""] for step, x in zip(steps, largest.mean(0))]
for axis in (over_steps, composite, single):
    axis.set(yscale="log", ylabel="gain, times")
over_steps.set(xlabel="step", title="composite, largest over the sublayers")
composite.set(xlabel="from sublayer ... to the end", title="composite, after the last step")
single.set(xlabel="sublayer", title="one sublayer, after the last step")
nearness.set(yscale="log", xlabel="sublayer", ylabel="|gain - 1|, the larger side",
             title=f"how near mHC is to 1 ({fig.sinkhorn_iters} iterations)")
losses = {arm: np.array([runs[arm, seed].val for seed in fig.seeds]) for arm in fig.arms}
fig.say("validation loss: " + ", ".join(f"{name_of(arm)} {x.mean():.4f}" for arm, x in losses.items()))
if {"hc", "mhc"} <= losses.keys():
    fig.say(f"HC minus mHC: {verdict(losses['hc'] - losses['mhc'], fig.unit)}")
over_steps.legend()
nearness.legend(fontsize=8)
fig.table(["what", "arm", "side", "step_or_sublayer", "largest", "smallest"], rows)
fig.save()
FIGURE
