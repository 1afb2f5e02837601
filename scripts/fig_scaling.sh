#!/bin/sh
# Does the gap hold as model and data grow? Loss = E + A N^-a + B D^-b, N parameters, D tokens, is fitted to
# plain and mHC together: E, a, b are the data's, A and B each arm's own. Bootstrap over the seeds, which
# stay paired.
#     sh scripts/fig_scaling.sh [--scale tiny|gpu|a100] [--sizes 2x32,4x48] [--budgets 200,400] [--help]
# A size is blocks x width; a budget is steps.
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

ARMS = ("plain", "mhc")
fig = Figure("scaling", "The gap over size and tokens, with a fitted power law", layers=None, width=None,
             heads=None, steps=None, tiny=dict(seeds=(1, 2), sizes=("2x32", "4x64", "6x96"), budgets=(300,)),
             gpu=dict(sizes=("4x128", "6x192", "8x256", "12x384"), budgets=(1000, 2000, 4000)),
             a100=dict(sizes=("4x256", "8x384", "12x512", "12x768"), budgets=(1500, 3000, 6000)))
head = 16 if fig.scale == "tiny" else 64
shapes = {}
for size in fig.sizes:
    layers, width = map(int, size.split("x"))
    shapes[size] = dict(layers=layers, width=width, heads=width // head)
runs = {(arm, size, budget, seed): fig.run(arm, seed, steps=budget, **shapes[size])
        for size in fig.sizes for budget in fig.budgets for seed in fig.seeds for arm in ARMS}
fig.settings |= {"shape": f"blocks x width {', '.join(fig.sizes)}", "steps": "/".join(map(str, fig.budgets))}
fig.train()

points = [(size, budget) for size in fig.sizes for budget in fig.budgets]
N = {(arm, size): run.lines("run")[0]["parameters"] for (arm, size, _, _), run in runs.items()}
D = {budget: run.lines("step")[-1]["tokens"] for (_, _, budget, _), run in runs.items()}
# (arms, points, seeds)
loss = np.array([[[runs[arm, *point, seed].val for seed in fig.seeds] for point in points] for arm in ARMS])
sizes = np.array([[N[arm, size] for size, _ in points] for arm in ARMS], float)
tokens = np.array([D[budget] for _, budget in points], float)
GRID = np.linspace(0.05, 1.2, 24)


def design(a, b, sizes, tokens):
    """Columns: E, A of each arm, B of each arm (not for one budget). Rows: points of plain, then of mHC"""
    size, rows = (sizes / 1e6) ** -a, sizes.shape[1]
    columns = [np.ones(2 * rows)] + [np.repeat(np.eye(2)[k], rows) * size.ravel() for k in (0, 1)]
    if len(fig.budgets) > 1:
        columns += [np.repeat(np.eye(2)[k], rows) * np.tile((tokens / 1e6) ** -b, 2) for k in (0, 1)]
    return np.stack(columns, 1)


B_GRID = GRID if len(fig.budgets) > 1 else GRID[:1]
DESIGNS = {(a, b): design(a, b, sizes, tokens) for a in GRID for b in B_GRID}
SOLVERS = {key: np.linalg.pinv(X) for key, X in DESIGNS.items()}


def fit(seeds):
    """(a, b, coefficients) of the least squares, among those with E >= 0 if there are such"""
    y = loss[:, :, seeds].mean(2).ravel()
    solutions = {key: solver @ y for key, solver in SOLVERS.items()}
    errors = {key: (x[0] < 0, np.sum((DESIGNS[key] @ x - y) ** 2)) for key, x in solutions.items()}
    a, b = min(errors, key=errors.get)
    return a, b, solutions[a, b]


def gap(fitted, factor):
    """mHC minus plain at every point with all sizes and tokens times the factor"""
    a, b, coefficients = fitted
    y = (design(a, b, sizes * factor, tokens * factor) @ coefficients).reshape(2, -1)
    return y[1] - y[0]


everyone = np.arange(len(fig.seeds))
best = fit(everyone)
largest = int(np.argmax(sizes[0] * tokens))
left, right = fig.panels(2, about="curves: fit; bars: 95 % of the mean")
for k, budget in enumerate(fig.budgets):
    here = [i for i, point in enumerate(points) if point[1] == budget]
    for arm_index, arm in enumerate(ARMS):
        x = sizes[arm_index, here] / 1e6
        left.plot(x, loss[arm_index, here].mean(1), STYLE[arm][3], color=STYLE[arm][1],
                  label=name_of(arm) if k == 0 else None)
        fine = np.geomspace(x[0], x[-1], 50)
        curve = design(best[0], best[1], np.array([fine, fine]) * 1e6, np.full(50, D[budget])) @ best[2]
        left.plot(fine, curve.reshape(2, -1)[arm_index], **style(arm) | {"linewidth": 0.9, "label": None})
    mean, half = interval(loss[1, here] - loss[0, here], 1)
    right.errorbar(sizes[0, here] / 1e6 * (1 + 0.03 * k), mean, yerr=np.nan_to_num(half), color=PALETTE[k],
                   fmt="o", capsize=3, label=f"{D[budget] / 1e6:.3g} M tokens")
    right.plot(sizes[0, here] / 1e6, gap(best, 1)[here], color=PALETTE[k], linewidth=0.9)
for axis in (left, right):
    axis.margins(x=0.08)
    axis.set(xscale="log", xlabel="parameters, millions")
    axis.legend()
right.axhline(0, color=SOFT, linewidth=1)
left.set(ylabel=f"validation loss, {fig.unit}", title="loss")
right.set(ylabel=f"mHC minus plain, {fig.unit}", title="gap")
for i, (size, budget) in enumerate(points):
    gaps = verdict(loss[1, i] - loss[0, i], fig.unit)
    fig.say(f"{size}, {D[budget] / 1e6:.3g} M tokens, mHC minus plain: {gaps}")
for factor, words in ((1, "at the largest"), (10, "at ten times its size and tokens")):
    value = gap(best, factor)[largest]
    low, high = bootstrap(lambda seeds: gap(fit(seeds), factor)[largest], len(fig.seeds), 300)
    fig.say(f"fitted gap {words}: {value:+.4f} {fig.unit}, bootstrap over {len(fig.seeds)} seeds "
            f"{low:+.4f} to {high:+.4f}")
exponents = f"of size {best[0]:.2f}" + (f", of tokens {best[1]:.2f}" if len(fig.budgets) > 1 else "")
fig.say(f"fit: E {best[2][0]:.3f}, exponents {exponents}")
if len(fig.seeds) < 3 or len(points) < 6:
    fig.say(f"{len(points)} points and {len(fig.seeds)} seeds are too few to trust the fit or its interval")
fig.table(["arm", "size", "parameters", "tokens", "seed", "val_loss"],
          [[arm, size, N[arm, size], D[budget], seed, run.val]
           for (arm, size, budget, seed), run in runs.items()])
fig.save()
FIGURE
