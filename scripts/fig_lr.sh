#!/bin/sh
# A grid of learning rates for each arm: one untuned rate can fake or hide the whole effect.
# scripts/fig_loss.sh and others take each arm's best rate from here. Usable are rates within 0.05 nats of
# the arm's best.
#     sh scripts/fig_lr.sh [--scale tiny|gpu|a100] [--rates 1e-3,3e-3] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

SLACK = 0.05
fig = Figure("lr", "Loss over the learning rate, each arm with its own grid",
             arms=("plain", "hc", "mhc", "ihc"), seeds=(1,), lr=None, rates=(1e-3, 3e-3, 1e-2),
             gpu=dict(rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)), a100=dict(rates=(1e-3, 2e-3, 4e-3), steps=6000))
runs = {(arm, rate, seed): fig.run(arm, seed, lr=rate)
        for rate in fig.rates for arm in fig.arms for seed in fig.seeds}
fig.train()


def crossing(rates, losses, limit):
    """Where losses, followed from the best outwards, pass the limit: straight in log rate, or None"""
    for (near, low), (far, high) in zip(zip(rates, losses), zip(rates[1:], losses[1:])):
        if high > limit:
            part = (limit - low) / (high - low)
            return near * (far / near) ** part
    return None


axis = fig.panels(1, about="rings: the best")
for arm in fig.arms:
    losses = [np.mean([runs[arm, rate, seed].val for seed in fig.seeds]) for rate in fig.rates]
    best = int(np.argmin(losses))
    limit = losses[best] + SLACK
    low = crossing(fig.rates[best::-1], losses[best::-1], limit)
    high = crossing(fig.rates[best:], losses[best:], limit)
    axis.plot(fig.rates, losses, **style(arm, marker=True))
    axis.plot(fig.rates[best], losses[best], "o", markersize=11, fillstyle="none", color=STYLE[arm][1])
    first, last = low or fig.rates[0], high or fig.rates[-1]
    end = "" if low and high else ", which the grid ends"
    fig.say(f"{name_of(arm)}: best {losses[best]:.4f} at {fig.rates[best]:g}; usable from {first:.2g} to "
            f"{last:.2g}, a factor of {'' if low and high else 'at least '}{last / first:.1f}{end}")
fixed_ticks(axis, fig.rates)
axis.set(xlabel="peak learning rate", ylabel=f"validation loss, {fig.unit}")
axis.legend()
fig.table(["setting", "arm", "lr", "seed", "val_loss"],
          [[fig.setting(), arm, rate, seed, run.val] for (arm, rate, seed), run in runs.items()])
if len(fig.seeds) == 1:
    fig.say("one seed: differences between arms have no uncertainty here; scripts/fig_loss.sh has several")
fig.save()
FIGURE
