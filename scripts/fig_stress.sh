#!/bin/sh
# Where HC's instability shows itself: high learning rates, with and without clipping. A run counts as
# unstable if after the warm-up its gradient's norm passes 10, its smoothed loss rises 0.3 above its least,
# or it diverges.
#     sh scripts/fig_stress.sh [--scale tiny|gpu|a100] [--rates 6e-3,1.5e-2,3e-2] [--clips 1,0] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

NORM, RISE = 10, 0.3
fig = Figure("stress", "High learning rates: norm and loss of plain, HC and mHC", lr=None,
             arms=("plain", "hc", "mhc"), seeds=(1, 2), clips=(1.0, 0.0), rates=(4e-3, 8e-3, 1.6e-2),
             gpu=dict(layers=24),
             tiny=dict(layers=24, width=48, batch=6, steps=200, rates=(1.5e-2, 3e-2), clips=(1.0,)))
runs = {(arm, rate, clip, seed): fig.run(arm, seed, lr=rate, grad_clip=clip)
        for rate in fig.rates for clip in fig.clips for seed in fig.seeds for arm in fig.arms}
fig.train()
window, warmup = max(2, int(fig.steps) // 40), int(fig.warmup)


def events(run):
    """(largest norm after the warm-up, largest rise of the smoothed loss above its least so far)"""
    norms, losses = run.column("grad_norm")[warmup:], smooth(run.column("loss"), window)[warmup:]
    if not np.isfinite(run.val) or len(losses) == 0:
        return math.inf, math.inf
    return norms.max(), (losses - np.minimum.accumulate(losses)).max()


about = f"curves: rate {fig.rates[-1]:g}, clip {fig.clips[-1]:g}, a line a seed"
norm_axis, loss_axis, end_axis = fig.panels(3, about=about)
rows, places = [], [(rate, clip) for rate in fig.rates for clip in fig.clips]
for arm in fig.arms:
    for seed in fig.seeds:
        run = runs[arm, fig.rates[-1], fig.clips[-1], seed]
        look = style(arm) | {"linewidth": 0.9, "label": name_of(arm) if seed == fig.seeds[0] else None}
        norm_axis.plot(run.column("grad_norm"), **look)
        loss_axis.plot(smooth(run.column("loss"), window), **look)
    for place, (rate, clip) in enumerate(places):
        mine = [runs[arm, rate, clip, seed] for seed in fig.seeds]
        found = np.array([events(run) for run in mine])
        unstable = ((found[:, 0] > NORM) | (found[:, 1] > RISE)).sum()
        gain = max(run.largest("gain_fwd") for run in mine)
        shift = 0.2 * (fig.arms.index(arm) - 1)
        end_axis.plot(np.full(len(mine), place + shift), [run.val for run in mine], linestyle="none",
                      marker=STYLE[arm][3], color=STYLE[arm][1], alpha=0.8)
        norms, rises = (", ".join(f"{x:.3g}" for x in values) for values in found.T)
        fig.say(f"rate {rate:g}, clip {clip:g}, {name_of(arm)}: {unstable} of {len(mine)} unstable; "
                f"largest norm {norms}; rise of the loss {rises}; gain {gain:.3g}; validation loss "
                f"{', '.join(f'{run.val:.3f}' for run in mine)}")
        rows += [[arm, rate, clip, run.seed, float(norm), float(rise), run.largest("gain_fwd"), run.val]
                 for run, (norm, rise) in zip(mine, found)]
norm_axis.axhline(NORM, color=SOFT, linewidth=0.8)
norm_axis.set(yscale="log", xlabel="step", ylabel="norm of the gradient before clipping", title="gradient")
loss_axis.set(xlabel="step", ylabel=f"training loss, {fig.unit}", title=f"loss, mean of {window} steps")
end_axis.set_xticks(range(len(places)), [f"{rate:g}\nclip {clip:g}" for rate, clip in places])
end_axis.set(xlabel="learning rate", ylabel=f"validation loss, {fig.unit}", title="the end, a mark a seed")
norm_axis.legend()
fig.table(["arm", "lr", "clip", "seed", "largest_norm", "rise_of_loss", "gain_forward", "val_loss"], rows)
fig.save()
FIGURE
