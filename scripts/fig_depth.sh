#!/bin/sh
# Depth at fixed width: loss, largest gain and largest gradient norm of no residual, plain, HC and mHC.
# Without any residual is there for the history's sake: it is what residuals were invented against.
#     sh scripts/fig_depth.sh [--scale tiny|gpu|a100] [--depths 6,12,24,48] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

fig = Figure("depth", "Depth at fixed width: what residuals are for, and what their streams do",
             arms=("none", "plain", "hc", "mhc"), seeds=(1,), layers=None, depths=(6, 12, 24),
             tiny=dict(width=48, batch=6, steps=250), gpu=dict(depths=(12, 24, 48, 96), steps=1000),
             a100=dict(depths=(12, 24, 48, 96), width=256, heads=4, steps=3000))
runs = {(arm, depth, seed): fig.run(arm, seed, layers=depth)
        for depth in fig.depths for seed in fig.seeds for arm in fig.arms}
fig.settings["shape"] = f"width {fig.width}"
fig.train()

losses, gains, norms = fig.panels(3, about="solid: forward, dashed: backward")
rows, warmup = [], int(fig.warmup)
for arm in fig.arms:
    table = []
    for depth in fig.depths:
        mine = [runs[arm, depth, seed] for seed in fig.seeds]
        found = [[run.val, run.largest("gain_fwd"), run.largest("gain_bwd"),
                  float(run.column("grad_norm")[warmup:].max())] for run in mine]
        table.append([np.mean(found, 0)[0], *np.max(found, 0)[1:]])
        rows += [[arm, depth, run.seed, *values] for run, values in zip(mine, found)]
    loss, forward, backward, norm = np.array(table).T
    losses.plot(fig.depths, loss, **style(arm, marker=True))
    norms.plot(fig.depths, norm, **style(arm, marker=True))
    if arm != "none":
        look = style(arm, marker=True)
        gains.plot(fig.depths, forward, **look | {"linestyle": DASH["forward"]})
        gains.plot(fig.depths, backward, **look | {"linestyle": DASH["backward"], "fillstyle": "none"})
    fig.say(f"{name_of(arm)}: " + "; ".join(
        f"{depth} blocks: loss {l:.3f}, norm {n:.3g}" + (f", gain {f:.5g} / {b:.5g}" if "hc" in arm else "")
        for depth, l, f, b, n in zip(fig.depths, loss, forward, backward, norm)))
losses.set(ylabel=f"validation loss, {fig.unit}", title="loss")
gains.set(yscale="log", ylabel="times", title="largest composite gain of the run")
norms.set(yscale="log", ylabel="norm of the gradient", title="largest norm after the warm-up")
for axis in (losses, gains, norms):
    axis.set(xlabel="blocks (two sublayers each)")
    fixed_ticks(axis, fig.depths)
losses.legend()
if len(fig.seeds) == 1:
    fig.say("one seed: small differences of loss mean nothing here; the gains' orders of magnitude do")
fig.table(["arm", "blocks", "seed", "val_loss", "gain_forward", "gain_backward", "largest_norm"], rows)
fig.save()
FIGURE
