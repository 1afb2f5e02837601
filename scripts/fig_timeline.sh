#!/bin/sh
# What each rank of a pipeline did and when, in one step, from what the trainer writes with --trace: F
# forward, B backward, I and W its parts for the input and the weights. The bubble is the share of the time
# shown in which a rank computes nothing. Without --trace, at scale tiny, a small model is trained for some
# steps with its ranks in one process, and the shortest step is drawn.
#     sh scripts/fig_timeline.sh [--pipelines 1f1b,dualpipev] [--ranks 2] [--help]
#     sh scripts/fig_timeline.sh --trace FILE.json [--step N]
PYTHONPATH=$(dirname "$0") exec "${PYTHON:-/usr/bin/python3}" - "$@" << 'FIGURE'
from figures import *

KINDS = {"F": ("F forward", PALETTE[0]), "B": ("B backward", PALETTE[1]),
         "I": ("I gradient of the input", PALETTE[4]), "W": ("W gradient of the weights", PALETTE[2])}
fig = Figure("timeline", "What the ranks of a pipeline do, and when", pipelines=("1f1b", "dualpipev"),
             ranks=2, micro_batches=6, steps=8, warmup=2, val_every=0, val_batches=1, gain_every=0,
             trace="", step="0")
given, wanted = fig.settings.pop("trace"), int(fig.settings.pop("step"))


def traced(pipeline):
    """The trace of a short run, in a file"""
    path = fig.folder / f"timeline.{pipeline}.json"
    options = {key: value for key, value in fig.settings.items() if not isinstance(value, tuple)}
    run = Run(fig.run_folder, fig.program, "mhc", 1, options | {"pipeline": pipeline, "trace": str(path)})
    fig.folder.mkdir(parents=True, exist_ok=True)
    command = [fig.program, "--overwrite", "--out", run.folder, *run.command]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                      env={"OMP_NUM_THREADS": "1"} | os.environ).returncode:
        stop(f"{path}: could not be written, see above")
    return path


def events_of(path):
    """[(replica, rank, name, begin, end)] of one step, in ms from its begin; and which step it is"""
    steps = {}
    try:
        trace = json.loads(Path(path).read_text())
        for event in trace["traceEvents"] if isinstance(trace, dict) else trace:
            if event.get("ph") == "X":
                begin, step = event["ts"] / 1000, event.get("args", {}).get("step", 0)
                steps.setdefault(step, []).append((event.get("pid", 0), event["tid"], event["name"], begin,
                                                   begin + event["dur"] / 1000))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        stop(f"{path}: found {problem!r}, expected a Chrome trace with complete events")
    first = {step: min(event[3] for event in events) for step, events in steps.items()}
    span = {step: max(event[4] for event in events) - first[step] for step, events in steps.items()}
    step = wanted or min(span, key=span.get, default=0)
    if step not in steps:
        stop(f"{path}: found no events of step {step}, expected one of {text_of(tuple(steps)) or 'some'}")
    return [(*head, begin - first[step], end - first[step]) for *head, begin, end in steps[step]], step


def draw(axis, events, last):
    """Bars of the events; {(replica, rank): busy ms}"""
    lines = {rank: -place for place, rank in enumerate(sorted({event[:2] for event in events}))}
    names = {event[2] for event in events}
    parts = {name: {part[0]: part[1:].rstrip("'") for part in name.split()[1:]} for name in names}
    last_stage = max((int(part["s"]) for part in parts.values() if "s" in part), default=0)
    for pid, tid, name, begin, end in events:
        part, y = parts[name], lines[pid, tid]
        shade = 1 - 0.45 * int(part.get("s", 0)) / max(1, last_stage)
        axis.broken_barh([(begin, end - begin)], (y - 0.4, 0.8), facecolor=KINDS[name[0]][1], alpha=shade,
                         edgecolor="white", linewidth=0.4)
        if end - begin > 0.016 * last and "m" in part:
            axis.text((begin + end) / 2, y, part["m"], ha="center", va="center", fontsize=7, color="white")
    axis.set_yticks(list(lines.values()), [f"replica {pid}, rank {tid}" for pid, tid in lines])
    busy = dict.fromkeys(lines, 0)
    for rank in lines:
        reached = 0
        for begin, end in sorted(event[3:] for event in events if event[:2] == rank):
            busy[rank] += max(0, end - max(begin, reached))         # each moment once, if events overlap
            reached = max(reached, end)
        bubble = 100 * (1 - busy[rank] / last)
        axis.text(1.005 * last, lines[rank], f"{bubble:.0f} %", va="center", fontsize=8, color=SOFT)
    return busy


if not given:
    if fig.scale != "tiny":
        stop("--trace: found none, expected what train_gpt_mhc_cuda --pipeline ... --trace FILE has written")
    fig.build()
paths = {Path(given).name: given} if given else {name: traced(name) for name in fig.pipelines}
traces = {name: events_of(path) for name, path in paths.items()}
for events, _ in traces.values():
    events[:] = [event for event in events if event[2][:1] in KINDS]
count = len({event[:2] for events, _ in traces.values() for event in events})
about = "numbers are micro-batches, lighter is a later stage; at the right: bubble"
axes = fig.panels(1, rows=len(traces), height=1.1 + len(traces) * (0.8 + 0.36 * count), squeeze=False,
                  about=about if given else f"{fig.setting()}; {about}")
rows = []
for axis, (name, (events, step)) in zip(axes[:, 0], traces.items()):
    last = max(event[4] for event in events)
    busy = draw(axis, events, last)
    bubbles = {rank: 100 * (1 - time / last) for rank, time in busy.items()}
    axis.set(xlabel="ms", xlim=(0, 1.05 * last), title=f"{name}, step {step}")
    mean = np.mean(list(bubbles.values()))
    fig.say(f"{name}, step {step}: {last:.3f} ms, bubble {mean:.1f} % on average, "
            + ", ".join(f"{bubble:.1f}" for bubble in bubbles.values()))
    rows += [[name, step, *rank, float(busy[rank]), float(bubbles[rank])] for rank in busy]
handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour in KINDS.values()]
axes[0, 0].legend(handles, [words for words, _ in KINDS.values()], ncols=4, loc="lower right",
                  bbox_to_anchor=(1, 1), fontsize=8)      # beside the title
fig.table(["trace", "step", "replica", "rank", "busy_ms", "bubble_percent"], rows)
fig.save()
FIGURE
