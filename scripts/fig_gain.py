#!/usr/bin/env python3
"""Draws DIR/gain.csv, which scripts/fig_gain.sh has written, as DIR/gain.svg. Needs nothing but Python.

    python3 scripts/fig_gain.py DIR
"""
import csv
import json
import math
import os
import sys

WIDTH, HEIGHT = 880, 436
TOP, BOTTOM = 116, 376                          # of both panels
PANELS = ((64, 412), (502, 850))                # left, right
NAMES = {"plain": "plain residual", "hc": "HC", "mhc": "mHC"}
COLOURS = {"plain": "#7d8590", "hc": "#d1442f", "mhc": "#1f6fd1"}
INK, SOFT, GRID = "#24292f", "#656d76", "#e6e9ed"


def read(path):
    """{residual: {column: [(step, value), ..]}}, without the cells that are empty."""
    runs = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = runs.setdefault(row.pop("residual"), {})
            step = int(row.pop("step"))
            for name, cell in row.items():
                columns.setdefault(name, [])
                if cell:
                    columns[name].append((step, float(cell)))
    return runs


def reach(last_step):
    """How many steps before and after its own a smoothed loss is the mean of."""
    return min(12, last_step // 16)


def smooth(points, reach):
    values = [value for _, value in points]
    return [(points[i][0], sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
            for i in range(reach, len(points) - reach)]


class Axes:
    """A panel: from (step, value) to places on the page."""

    def __init__(self, panel, last_step, low, high, log):
        self.left, self.right = panel
        self.last_step, self.log = last_step, log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def x(self, step):
        return self.left + (self.right - self.left) * step / self.last_step

    def y(self, value):
        value = math.log10(value) if self.log else value
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def line(self, points, colour, width=2.2, dash="none"):
        places = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        return (f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" '
                f'stroke-dasharray="{dash}" stroke-linejoin="round"/>')

    def frame(self, title, unit, ticks):
        out = [text(self.left, TOP - 20, title, size=14, weight=600),
               text(self.right, TOP - 20, unit, anchor="end", fill=SOFT)]
        for value, label in ticks:
            out.append(rule(self.left, self.right, self.y(value), GRID))
            out.append(text(self.left - 9, self.y(value) + 4, label, anchor="end", fill=SOFT))
        for step in nice_ticks(0, self.last_step, 4):
            label = f"{step:g}" if step else "step 0"
            out.append(text(self.x(step), BOTTOM + 20, label, anchor="middle", fill=SOFT))
        return out + [rule(self.left, self.right, BOTTOM, SOFT)]


def text(x, y, words, size=12, fill=INK, anchor="start", weight=400):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{words}</text>')


def rule(left, right, y, colour, width=1, dash="none"):
    """A horizontal line."""
    return (f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-width="{width}" stroke-dasharray="{dash}"/>')


def nice_ticks(low, high, count):
    """Round numbers within low .. high, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 2.5, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - count))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def loss_panel(runs, last_step, unit):
    lines = {name: smooth(run["loss"], reach(last_step)) for name, run in runs.items()}
    low = min(value for points in lines.values() for _, value in points)
    high = max(value for points in lines.values() for step, value in points if step >= last_step / 20)
    axes = Axes(PANELS[0], last_step, low - 0.08 * (high - low), high, log=False)
    out = axes.frame("training loss", unit, [(v, f"{v:g}") for v in nice_ticks(axes.low, high, 5)])
    for row, (name, points) in enumerate(lines.items()):
        out.append(axes.line([point for point in points if point[1] <= high], COLOURS[name]))
        out += legend_row(row, name, runs[name]["val_loss"])
    return out


def legend_row(row, name, val_loss):
    """In the upper right of the loss, where a loss never is; with the validation loss at the end."""
    x, y = PANELS[0][1] - 168, TOP + 40 + 19 * row
    out = [rule(x, x + 22, y - 4, COLOURS[name], width=3), text(x + 30, y, NAMES[name])]
    if row == 0 and val_loss:
        out.append(text(PANELS[0][1] - 8, y - 20, "validation", anchor="end", fill=SOFT))
    return out + [text(PANELS[0][1] - 8, y, f"{value:.3f}", anchor="end") for _, value in val_loss[-1:]]


def number(value):
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:#.4g}"


def gain_panel(runs, last_step):
    values = [value for run in runs.values() for side in ("gain_fwd", "gain_bwd") for _, value in run[side]]
    axes = Axes(PANELS[1], last_step, min(0.4, min(values) / 2), max(values) * 2.5, log=True)
    decades = [10.0 ** d for d in range(math.ceil(axes.low), math.floor(axes.high) + 1)]
    ticks = [(value, f"{value:,.15g}".replace(",", " ")) for value in decades]
    out = axes.frame("composite gain", "times, log scale", ticks)
    for name, run in runs.items():
        out.append(axes.line(run["gain_bwd"], COLOURS[name], width=1.8, dash="5 3"))
        out.append(axes.line(run["gain_fwd"], COLOURS[name]))
    return out + gain_labels(runs, axes) + dash_legend()


def gain_labels(runs, axes):
    out = []
    for name, run in runs.items():
        step, forward = max(run["gain_fwd"], key=lambda point: point[1])
        backward = max(value for _, value in run["gain_bwd"])
        above, colour = axes.y(max(forward, backward)) - 9, COLOURS[name]
        gains = f"up to {number(forward)} forward, {number(backward)} backward"
        if name == "hc":
            x = min(max(axes.x(step), axes.left + 110), axes.right - 110)
            out.append(text(x, above, f"HC: {gains}", fill=colour, anchor="middle"))
        elif name == "mhc":
            out.append(text(axes.right - 4, above, f"mHC: {gains}", fill=colour, anchor="end"))
        else:
            out.append(text(axes.right - 4, axes.y(1) + 18, "plain residual: 1", fill=colour, anchor="end"))
    return out


def dash_legend():
    out, x, y = [], PANELS[1][0], BOTTOM + 41
    for label, dash in (("forward: the signal", "none"), ("backward: the gradient", "5 3")):
        out.append(rule(x, x + 25, y - 4, INK, width=2, dash=dash))
        out.append(text(x + 31, y, label, fill=SOFT))
        x += 168
    return out


def draw(runs, setting):
    last_step = max(step for run in runs.values() for step, _ in run["loss"])
    unit = "nats per byte" if setting["vocab"] == "256" else "nats per token"
    source = "the built-in corpus" if not setting["data"] else os.path.basename(setting["data"])
    count = 2 * int(setting["layers"])
    title = f"{count} residual connections in a row: what they learn, what they multiply"
    about = (f"{setting['layers']} blocks of width {setting['width']}, {setting['streams']} streams, "
             f"learning rate {float(setting['lr']):g}, {source}, seed {setting['seed']}; "
             f"losses are means over {2 * reach(last_step) + 1} steps")
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
           f'height="{HEIGHT}" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
           f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="#ffffff" '
           f'stroke="{GRID}"/>',
           text(24, 36, title, size=17, weight=600), text(24, 58, about, fill=SOFT)]
    out += loss_panel(runs, last_step, unit) + gain_panel(runs, last_step)
    return "\n".join(out + ["</svg>", ""])


def fail(message):
    sys.exit(print(message, file=sys.stderr) or 2)


def main():
    if len(sys.argv) != 2:
        fail(__doc__)
    folder = sys.argv[1]
    try:
        runs = read(os.path.join(folder, "gain.csv"))
        with open(os.path.join(folder, "mhc", "run.jsonl")) as file:
            setting = json.loads(file.readline())
        if not all(runs.get(name, {}).get("gain_fwd") for name in NAMES):
            raise ValueError("found no gains of " + ", ".join(NAMES))
    except (OSError, ValueError, KeyError) as problem:
        fail(f"{folder}: {problem}, expected the files of scripts/fig_gain.sh, run it first")
    with open(os.path.join(folder, "gain.svg"), "w") as file:
        file.write(draw(runs, setting))


main()
