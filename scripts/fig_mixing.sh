#!/bin/sh
# The mixing matrices that HC and mHC have learnt (paper, Fig. 8): three sublayers and three products, mean
# over the tokens of a batch. A row of R makes one stream out of the old ones. Row sums stand right, column
# sums above.
#     sh scripts/fig_mixing.sh [--scale tiny|gpu|a100] [--help]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

sys.path.insert(0, str(ROOT / "dev/reference"))
import safetensors_io

fig = Figure("mixing", "What the streams are mixed with: single matrices and products", arms=("hc", "mhc"),
             seeds=(1,))
rates = fig.best_rates()
runs = {arm: fig.run(arm, fig.seeds[0], weights=True, lr=rates.get(arm, fig.lr)) for arm in fig.arms}
fig.train()


def mixing(run):
    """(sublayers, tokens, n, n): R of every token of one batch"""
    path = run.folder / "dump.safetensors"
    if not path.exists():
        command = [fig.program, "--init-from", run.checkpoint, "--dump", f"{path}.part", *run.command]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            stop(f"{path}: could not be written, see above")
        os.replace(f"{path}.part", path)
    tensors, _ = safetensors_io.read(path)
    count = sum(name.startswith("hc.") and name.endswith(".res") for name in tensors)
    R = np.array([tensors[f"hc.{k}.res"] for k in range(count)], float)
    return R.reshape(count, -1, *R.shape[-2:])


def product(R):
    """R_last .. R_first of (sublayers, tokens, n, n), token by token"""
    G = R[0]
    for step in R[1:]:
        G = step @ G
    return G


def short(value):
    if abs(value) >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def draw(axis, G, title):
    n, largest = len(G), np.abs(G).max()
    axis.imshow(G, cmap="PuOr_r", vmin=-largest, vmax=largest)
    for i in range(n):
        for j in range(n):
            axis.text(j, i, short(G[i, j]), ha="center", va="center", fontsize=6.5,
                      color="white" if abs(G[i, j]) > 0.6 * largest else INK)
        axis.text(n - 0.35, i, short(G[i].sum()), va="center", fontsize=6.5, color=SOFT)
        axis.text(i, -0.65, short(G[:, i].sum()), ha="center", va="bottom", fontsize=6.5, color=SOFT)
    axis.set_title(title, fontsize=8, pad=16)
    axis.set(xticks=range(n), yticks=range(n))
    axis.tick_params(length=0, labelsize=7)
    axis.grid(False)
    axis.spines[:].set_visible(False)


axes = fig.panels(6, rows=len(fig.arms), height=1.85 * len(fig.arms) + 0.8,
                  about="each matrix has its own colour scale; sums at the right and above")
rows = []
for line, arm in zip(np.atleast_2d(axes), fig.arms):
    R = mixing(runs[arm])
    last = len(R) - 1
    half = len(R) // 2
    shown = {f"sublayer {k}": R[k] for k in (0, half, last)} | {
        "first half": product(R[:half]), "second half": product(R[half:]), "all": product(R)}
    for axis, (title, G) in zip(line, shown.items()):
        mean, spread = G.mean(0), G.std(0)
        draw(axis, mean, f"{name_of(arm)}, {title}")
        rows += [[arm, title, *at, float(mean[at]), float(spread[at])] for at in np.ndindex(mean.shape)]
    row_sums, column_sums = G.sum(2), G.sum(1)      # of the product of all
    second = np.linalg.svd(G, compute_uv=False)[:, 1].mean()
    fig.say(f"{name_of(arm)}, product of all {len(R)}, over tokens: row sums {row_sums.min():.4g} to "
            f"{row_sums.max():.4g}, column sums {column_sums.min():.4g} to {column_sums.max():.4g}, "
            f"second singular value {second:.3g} on average")
    line[0].set_ylabel("to stream", fontsize=8)
    line[0].set_xlabel("from stream", fontsize=8)
fig.table(["arm", "matrix", "to", "from", "mean_over_tokens", "deviation_over_tokens"], rows)
fig.save()
FIGURE
