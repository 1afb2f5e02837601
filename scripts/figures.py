"""The frame of scripts/fig_*.sh: runs that go on where they were interrupted, paired seeds, one style.

A script names its settings at each scale, asks for runs, and draws what they logged:

    fig = Figure("loss", "What streams gain", arms=("plain", "mhc"), gpu=dict(steps=4000))
    runs = {(arm, seed): fig.run(arm, seed) for arm in fig.arms for seed in fig.seeds}
    fig.train()                     # ends the program when its time is up; the same command goes on
    .. fig.panels, fig.table, fig.say ..
    fig.save()

A setting that is a tuple is the figure's own: what its arms and axes run over. Any other is an option of
train_gpt_mhc, for all runs. The command line sets both: --seeds 1,2,3,4,5 --steps 1000.
Runs are shared between figures: a run's folder is named after its options.
"""

import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import cached_property
from pathlib import Path


def stop(message, status=2):
    print(message, file=sys.stderr)
    sys.exit(status)


try:
    import matplotlib
    import numpy as np
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError as problem:
    stop(f"{sys.executable}: found {problem}, expected matplotlib, which make deps installs")

ROOT = Path(__file__).resolve().parent.parent
STOPPED, NOT_FINITE = 1, 3      # exit status: ours where runs remain; the trainer's on a non-finite value

# ------------------------------------------------------------------------------------------------
# Scales. tiny: minutes on two CPU cores. gpu: one GPU in slices. a100: a night of one A100.

SCALES = {
    "tiny": dict(seeds=(1, 2, 3), layers=8, width=64, heads=4, seq=64, batch=8, steps=300, warmup=50,
                 lr=3e-3, val_batches=40, save_every=0),
    "gpu": dict(seeds=(1, 2, 3), layers=12, width=256, heads=4, seq=256, batch=32, steps=1500, warmup=150,
                lr=2e-3, val_batches=20, save_every=500, gain_every=50),
    "a100": dict(seeds=(1, 2, 3), layers=12, width=512, heads=8, seq=1024, batch=32, micro_batches=4,
                 steps=6000, warmup=300, lr=2e-3, schedule="wsd", val_batches=40, save_every=500,
                 gain_every=100, data=f"{ROOT}/data/fineweb/*_train_*.bin",
                 val_data=f"{ROOT}/data/fineweb/*_val_*.bin"),
}
# What some figures vary, as it is in the others: said in every run, so that a run has one name.
STANDARD = dict(grad_clip=1.0, streams=4, sinkhorn_iters=20, sinkhorn_order="cr", hc_maps="pre,post,res",
                hc_static=False, hc_gap=4.0)
SLICE_MINUTES = {"gpu": 7.5}        # a run that is stopped needs some seconds to save

# ------------------------------------------------------------------------------------------------
# Runs


class Run:
    """One run of the trainer, and what it logged. An option None is not said."""

    def __init__(self, folder, program, arm, seed, options):
        self.arm, self.seed, self.weights = arm, seed, False
        self.options = {name: value for name, value in options.items() if value is not None}
        self.command = [f"--{key.replace('_', '-')}={text_of(value)}" for key, value in self.options.items()]
        key = hashlib.sha1(" ".join([program.name, *sorted(self.command)]).encode()).hexdigest()[:8]
        self.folder = folder / f"{arm}-seed{seed}-{key}"

    @property
    def done(self):
        """Ended by itself, with its weights where a figure wants them; a run that diverged is done too."""
        stops = self.lines("stop")
        if not stops:
            return False
        good = stops[-1]["reason"] == "done" and (self.checkpoint or not self.weights)
        return good or stops[-1]["status"] == NOT_FINITE

    @property
    def checkpoint(self):
        return max(self.folder.glob("step_*.safetensors"), default=None)

    def lines(self, kind):
        return [entry for entry in self.log if entry["type"] == kind]

    @cached_property
    def log(self):
        entries = []
        path = self.folder / "run.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entries.append(json.loads(line))
            except ValueError:      # half a line, where a run was killed
                pass
        return entries

    def column(self, name):
        """(steps): a value of each step, NaN where it was not measured"""
        return np.array([entry.get(name) for entry in self.lines("step")], float)

    def largest(self, name):
        return float(np.nanmax(self.column(name)))

    def gain(self, name):
        """(times, sublayers): a value of the log's gain lines; run.gain_steps has their steps"""
        return np.array([entry[name] for entry in self.lines("gain")], float)

    @property
    def gain_steps(self):
        return np.array([entry["step"] for entry in self.lines("gain")])

    @property
    def val(self):
        """The last validation loss; infinite if the run diverged."""
        return self.lines("val")[-1]["loss"] if self.lines("stop")[-1]["reason"] == "done" else math.inf

    @property
    def seconds(self):
        return np.nansum(self.column("step_ms")) / 1000

    def start(self, program, threads):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.__dict__.pop("log", None)
        command = [program, "--resume", "--out", self.folder, *self.command]
        with open(f"{self.folder}.log", "a") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                    env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                                    start_new_session=True)     # Ctrl-C is ours to pass on, once

    def ended(self, status):
        self.__dict__.pop("log", None)
        if status not in (0, NOT_FINITE):
            words = Path(f"{self.folder}.log").read_text().strip().splitlines()[-1:]
            stop(f"{self.folder}: found exit status {status}, expected 0: {' '.join(words)}", max(status, 1))
        if self.done and not self.weights:
            for path in self.folder.glob("step_*.safetensors"):
                path.unlink()
        return self.done


def text_of(value):
    """A setting as on a command line"""
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------
# Statistics


def t_quantile(freedom, level=0.95):
    """What |t| stays below with this probability: sqrt(freedom) tan(angle), of density cos^(freedom-1)"""
    angle = np.linspace(0, np.pi / 2, 100001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.cumsum(density[1:] + density[:-1])
    return math.sqrt(freedom) * math.tan(np.interp(level, mass / mass[-1], angle[1:]))


def interval(values, axis=0):
    """Mean and half the width of its 95 % t-interval: NaN for one value. The half width is also the smallest
    mean difference that so many values, scattering so much, would tell from 0."""
    values = np.asarray(values, float)
    count = values.shape[axis]
    if count < 2:
        return values.mean(axis), np.full_like(values.mean(axis), np.nan)
    return values.mean(axis), t_quantile(count - 1) * values.std(axis, ddof=1) / math.sqrt(count)


def verdict(gaps, unit):
    """Paired differences, one a seed, in words."""
    gaps = np.asarray(gaps)
    finite = gaps[np.isfinite(gaps)]
    lost = len(gaps) - len(finite)
    diverged = f"; {lost} of {len(gaps)} pairs have a run that diverged" if lost else ""
    if len(finite) == 0:
        return "no pair in which both runs stayed finite"
    mean, half = interval(finite)
    if len(finite) == 1:
        return f"{mean:+.4f} {unit}, one seed: no uncertainty can be given{diverged}"
    found = "below 0" if mean + half < 0 else "above 0" if mean - half > 0 else "not told from 0"
    return (f"{mean:+.4f} +- {half:.4f} {unit} (95 %, {len(finite)} paired seeds): {found}; "
            f"smallest gap that they resolve {half:.4f}{diverged}")


def bootstrap(statistic, count, draws=1000):
    """95 % interval of statistic(indices), an array, over draws of `count` seeds with replacement."""
    random = np.random.default_rng(1)
    values = [statistic(random.integers(0, count, count)) for _ in range(draws)]
    return np.nanpercentile(values, [2.5, 97.5], axis=0)


def smooth(values, width):
    """Running mean over `width` values: width - 1 fewer of them"""
    return np.convolve(values, np.ones(width) / width, "valid")


# ------------------------------------------------------------------------------------------------
# Style: Okabe and Ito's colours, told apart by dash and marker too.

STYLE = {       # name, colour, dash, marker
    "none": ("no residual", "#CC79A7", (0, (1, 1)), "v"),
    "plain": ("plain", "#555555", (0, (5, 1.5)), "s"),
    "hc": ("HC", "#D55E00", "-", "^"),
    "mhc": ("mHC", "#0072B2", "-", "o"),
    "ihc": ("iHC", "#009E73", (0, (4, 1, 1, 1)), "D"),
}
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
INK, SOFT, LINE = "#24292f", "#656d76", "#d0d7de"

matplotlib.rcParams.update({
    "font.family": ["DejaVu Sans", "sans-serif"], "font.size": 9, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "xtick.color": SOFT, "ytick.color": SOFT,
    "lines.linewidth": 1.6, "lines.markersize": 4.5, "legend.frameon": False,
    "svg.hashsalt": "mhc.c", "svg.fonttype": "none", "figure.dpi": 100, "savefig.dpi": 130,
})


def style(arm, marker=False):
    """Keywords of a line of this arm"""
    name, colour, dash, mark = STYLE[arm]
    return dict(label=name, color=colour, linestyle=dash, marker=mark if marker else None)


def name_of(arm):
    return STYLE[arm][0]


DASH = {"forward": "-", "backward": (0, (4, 2))}        # of gains


def band(axis, x, middle, low, high, arm, **more):
    """An arm's line in its band"""
    axis.plot(x, middle, **style(arm) | more)
    axis.fill_between(x, low, high, color=STYLE[arm][1], alpha=0.15, linewidth=0)


def fixed_ticks(axis, values):
    """Ticks of a logarithmic x axis at these values alone"""
    axis.set(xscale="log")
    axis.set_xticks(values, list(map(text_of, values)))
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def plain_ticks(axis):
    """On a logarithmic axis 0.5 and 3000 rather than powers; between decades too where these are few."""
    if axis.get_scale() != "log" or isinstance(axis.get_major_locator(), matplotlib.ticker.FixedLocator):
        return
    low, high = axis.get_view_interval()
    digits = "{:g}" if low >= 1e-4 and high <= 1e6 else "{:.0e}"

    def words(value, _):
        return digits.format(value).replace("e-0", "e-").replace("e+0", "e")

    def words_of_some(value, _):
        return words(value, _) if f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(words)
    between = words if high < 5 * low else words_of_some if high < 100 * low else lambda value, _: ""
    axis.set_minor_formatter(between)


# ------------------------------------------------------------------------------------------------
# A figure


class Figure:
    """Settings of the chosen scale (tuples as attributes), its runs, its picture, table and conclusion."""

    def __init__(self, name, title, tiny=None, gpu=None, a100=None, **common):
        self.name, self.title = name, title
        given = parse_command_line()
        self.scale = given.pop("scale", "tiny")
        if self.scale not in SCALES:
            stop(f"--scale: found {self.scale}, expected {', '.join(SCALES)}")
        own = {"tiny": tiny, "gpu": gpu, "a100": a100}[self.scale] or {}
        self.settings = STANDARD | SCALES[self.scale] | common | own
        standard = ROOT / ("train_gpt_mhc" if self.scale == "tiny" else "train_gpt_mhc_cuda")
        self.program = Path(given.pop("trainer", standard)).resolve()
        folder = Path(given.pop("out", ROOT / "out/figures"))
        self.folder, self.run_folder = folder / self.scale, folder / "runs"
        self.minutes = float(given.pop("slice", SLICE_MINUTES.get(self.scale, math.inf)))
        cores = os.cpu_count() or 1         # models as narrow as tiny's gain nothing from several
        self.jobs = int(given.pop("jobs", cores if self.scale == "tiny" else 1))
        self.threads = 1 if self.scale == "tiny" else cores
        if given.pop("help", False):
            stop(self.help(), 0)
        for key, text in given.items():
            self.settings[key] = parse_tuple(key, text, self.settings[key]) if key in self.tuples() else text
        self.runs, self.conclusion = {}, []

    def __getattr__(self, name):
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        raise AttributeError(name)

    def tuples(self):
        return {key: value for key, value in self.settings.items() if isinstance(value, tuple)}

    def help(self):
        own = "".join(f"\n  --{key} {text_of(value)}" for key, value in self.tuples().items())
        rest = " ".join(f"--{key.replace('_', '-')} {text_of(value)}" for key, value in self.settings.items()
                        if key not in self.tuples() and value not in (None, ""))
        return (f"{self.title}\n\nusage: sh scripts/fig_{self.name}.sh [--scale tiny|gpu|a100] [--out DIR]\n"
                "       [--slice MINUTES] [--jobs N] [--trainer FILE] [settings] [the trainer's options]\n"
                f"scale {self.scale}:{own}\n  {rest}")

    # --- runs

    def run(self, arm, seed, weights=False, **options):
        """The run of these options, which may be another figure's too. weights: keep its last checkpoint"""
        common = {key: value for key, value in self.settings.items() if not isinstance(value, tuple)}
        common.pop("shape", None)
        options = common | {"residual": arm, "seed": seed} | options
        run = Run(self.run_folder, self.program, arm, seed, options)
        run = self.runs.setdefault(run.folder, run)
        run.weights = run.weights or weights
        return run

    def build(self):
        command = ["make", "-s", "-C", ROOT, self.program.name]
        if self.program.parent == ROOT and subprocess.run(command).returncode:
            stop(f"{self.program}: could not be built, see above")
        if not self.program.exists():
            stop(f"--trainer: found no program {self.program}, expected one like train_gpt_mhc")

    def train(self):
        """All runs that are not done, --jobs at a time. With time up or on Ctrl-C they save, and we end."""
        waiting = [run for run in self.runs.values() if not run.done]
        if waiting:
            self.build()
        total, begun, active = len(waiting), time.monotonic(), {}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or active:
                while waiting and len(active) < self.jobs:
                    run = waiting.pop(0)
                    active[run] = run.start(self.program, self.threads)
                time.sleep(0.1)
                for run, process in list(active.items()):
                    if process.poll() is None:
                        continue
                    del active[run]
                    if not run.ended(process.returncode):
                        raise KeyboardInterrupt
                    left = len(waiting) + len(active)
                    print(f"[{total - left}/{total}] {run.folder.name}: validation loss {run.val:.4f}, "
                          f"{run.seconds:.0f} s", flush=True)
                if time.monotonic() - begun > 60 * self.minutes:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            left = len(waiting) + len(active)
            stop(f"stopped with {left} of {total} runs to do; the same command goes on", STOPPED)
        finally:
            for process in active.values():
                process.terminate()
            for process in active.values():
                process.wait()

    def best_rates(self):
        """{arm: learning rate} from this scale's lr.csv, where that is of the same model, data and steps"""
        rates, path = {}, self.folder / "lr.csv"
        rows = list(csv.DictReader(open(path))) if path.exists() else []
        mean = {}
        for row in rows:
            if row["setting"] == self.setting():
                mean.setdefault((row["arm"], float(row["lr"])), []).append(float(row["val_loss"]))
        for (arm, rate), losses in mean.items():
            if arm not in rates or np.mean(losses) < np.mean(mean[arm, rates[arm]]):
                rates[arm] = rate
        words = ", ".join(f"{name_of(arm)} {rate:g}" for arm, rate in rates.items())
        self.say(f"learning rates, the best of lr.csv: {words}" if rates else
                 f"one learning rate for all arms, {self.lr}, not tuned; scripts/fig_lr.sh first tunes it")
        return rates

    # --- what comes out

    def forest(self, axis, rows, unit):
        """Paired differences: a row each of (label, differences of the seeds, colour), and their words."""
        for place, (label, gaps, colour) in enumerate(rows):
            self.say(f"{label}: {verdict(gaps, unit)}")
            gaps = np.array(gaps)[np.isfinite(gaps)]
            if len(gaps) == 0:
                continue
            mean, half = interval(gaps)
            axis.plot(gaps, np.full(len(gaps), -place - 0.18), "o", markersize=3, color=colour, alpha=0.5)
            axis.errorbar(mean, -place, xerr=np.nan_to_num(half), color=colour, marker="o", capsize=3)
        axis.axvline(0, color=SOFT, linewidth=1)
        axis.set_yticks([-place for place in range(len(rows))], [label for label, _, _ in rows])
        axis.set_ylim(-len(rows) + 0.4, 0.6)

    @property
    def unit(self):
        tokens = str(self.settings.get("data")).endswith(".bin") or self.settings.get("tokenizer")
        return "nats per token" if tokens else "nats per byte"

    def setting(self):
        """Model and batch in words; what a figure or a run varies is not among them."""
        s = self.settings
        tokens = int(s["batch"]) * int(s["seq"]) * int(s.get("micro_batches") or 1)
        data = Path(s["data"]).name if s.get("data") else "built-in corpus"
        shape = s.get("shape") or f"{s['layers']} blocks of width {s['width']}"
        return f"{shape}, {s['steps']} steps of {tokens} tokens, {data}"

    def panels(self, columns, rows=1, height=3.9, about="", **more):
        """The picture and its axes. `about` is added to the line beneath."""
        size = (9.6, height)
        self.picture, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **more)
        self.picture.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        devices = {run.lines("run")[-1]["device"] for run in self.runs.values()}
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {text_of(self.seeds)}"
        words = [self.setting(), about, seeds, *sorted(devices)] if self.runs else [about]
        line = textwrap.fill("; ".join(word for word in words if word), 170)
        self.picture.supxlabel(line, x=0.01, ha="left", fontsize=8, color=SOFT)
        return axes

    def table(self, header, rows):
        """NAME.csv"""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{self.name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for row in rows:
                writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])

    def say(self, line):
        self.conclusion.append(line)

    def save(self):
        """NAME.svg, NAME.png, NAME.txt, and the conclusion on stdout"""
        self.folder.mkdir(parents=True, exist_ok=True)
        for axes in self.picture.axes:
            plain_ticks(axes.xaxis)
            plain_ticks(axes.yaxis)
        self.picture.savefig(self.folder / f"{self.name}.svg", metadata={"Date": None})
        self.picture.savefig(self.folder / f"{self.name}.png")
        seconds = sum(run.seconds for run in self.runs.values())
        if self.runs:
            self.say(f"{len(self.runs)} runs, {seconds:.0f} s of steps in all")
        if self.runs and self.scale == "tiny":
            self.say("scale tiny proves the script; it is too small to conclude anything about other sizes")
        picture = str(self.folder / f"{self.name}.svg")
        text = "\n".join([f"== {self.name}: {self.title}", *self.conclusion, picture])
        (self.folder / f"{self.name}.txt").write_text(text + "\n")
        print(text)


def parse_command_line():
    """{name: text} of --name value, --name=value and --name; a name has _ for -"""
    given, words = {}, sys.argv[1:]
    while words:
        word = words.pop(0)
        name, _, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            stop(f"command line: found {word}, expected --name value; --help lists the settings")
        if "=" not in word:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        given[name.replace("-", "_")] = value
    return given


def parse_tuple(key, text, like):
    try:
        return tuple(type(like[0])(part) for part in text.split(","))
    except ValueError:
        stop(f"--{key}: found {text}, expected values like {text_of(like)}")
