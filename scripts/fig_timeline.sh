#!/bin/sh
# What each rank of a pipeline did and when, drawn from what the trainer wrote with --trace FILE: F forward,
# B backward, I and W its parts for the input and the weights. The bubble is the share of the time shown in
# which a rank computes nothing.
#     sh scripts/fig_timeline.sh --trace FILE [--from MS] [--to MS] [--out DIR]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

KINDS = {"F": ("F forward", PALETTE[0]), "B": ("B backward", PALETTE[1]),
         "I": ("I gradient of the input", PALETTE[4]), "W": ("W gradient of the weights", PALETTE[2]),
         "": ("other", LINE)}
fig = Figure("timeline", "A pipeline's timeline", trace="")
if not fig.trace:
    stop("--trace: found none, expected what train_gpt_mhc --pipeline ... --trace FILE has written")
try:
    with open(fig.trace) as file:
        trace = json.load(file)
    listed = trace["traceEvents"] if isinstance(trace, dict) else trace
    events = [(event.get("pid", 0), event["tid"], event["name"], event["ts"] / 1000, event["dur"] / 1000)
              for event in listed if event.get("ph") == "X"]
except (OSError, ValueError, KeyError, TypeError) as problem:
    stop(f"{fig.trace}: found {problem!r}, expected a Chrome trace with complete events")
start = min((event[3] for event in events), default=0)
low, high = float(fig.settings.get("from", 0)), float(fig.settings.get("to", math.inf))
events = [(pid, tid, name, ts - start, dur) for pid, tid, name, ts, dur in events
          if ts - start + dur > low and ts - start < high]
if not events:
    stop(f"{fig.trace}: found no complete event between --from and --to, expected some")


def kind(name):
    """F, B, I or W of names like `F s3 m5`; anything else is none of them"""
    word = name.split()[0].rstrip("'") if name.split() else ""
    return word if word in KINDS else ""


lines = {rank: place for place, rank in enumerate(sorted({event[:2] for event in events}))}
replicas = len({pid for pid, _ in lines})
first, last = max(low, min(e[3] for e in events)), min(high, max(e[3] + e[4] for e in events))
about = f"{Path(fig.trace).name}; numbers are micro-batches, lighter is a later stage"
axis = fig.panels(1, height=1.5 + 0.42 * len(lines), about=about)
parts = {name: {part[0]: part[1:].rstrip("'") for part in name.split()[1:]} for _, _, name, _, _ in events}
last_stage = max((int(part["s"]) for part in parts.values() if "s" in part), default=0)
rows = []
for pid, tid, name, ts, dur in events:
    place, part = lines[pid, tid], parts[name]
    shade = 1 - 0.45 * int(part.get("s", 0)) / max(1, last_stage)
    axis.broken_barh([(ts, dur)], (-place - 0.4, 0.8), facecolor=KINDS[kind(name)][1], alpha=shade,
                     edgecolor="white", linewidth=0.4)
    if dur > 0.016 * (last - first) and "m" in part and low <= ts and ts + dur <= high:
        axis.text(ts + dur / 2, -place, part["m"], ha="center", va="center", fontsize=7, color="white")
for rank, place in lines.items():
    edges = sorted((max(ts, first), min(ts + dur, last)) for *of, name, ts, dur in events
                   if tuple(of) == rank and kind(name))
    busy, reached = 0, first
    for begin, end in edges:                    # pairs overlap: each moment counts once
        busy += max(0, end - max(begin, reached))
        reached = max(reached, end)
    bubble = 100 * (1 - busy / (last - first))
    rows.append([*rank, busy, bubble])
    axis.text(last + 0.005 * (last - first), -place, f"{bubble:.0f} %", va="center", fontsize=8, color=SOFT)
for words, colour in KINDS.values():
    axis.broken_barh([(first, 0)], (0, 0), facecolor=colour, label=words)
axis.set_yticks([-place for place in lines.values()],
                [f"rank {tid}" if replicas == 1 else f"replica {pid}, rank {tid}" for pid, tid in lines])
axis.set(xlabel="ms; at the right: bubble", xlim=(first, last + 0.05 * (last - first)))
axis.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
bubbles = [row[3] for row in rows]
fig.say(f"{len(lines)} ranks, {last - first:.3f} ms: bubble {np.mean(bubbles):.1f} % on average, "
        + ", ".join(f"{bubble:.1f}" for bubble in bubbles))
fig.table(["replica", "rank", "busy_ms", "bubble_percent"], rows)
fig.save()
FIGURE
