"""python3 check_training.py DUMP RUN_JSONL TEXT: a run's first steps against the PyTorch model in float64.

    train_gpt_mhc --data TEXT.txt ... --steps 20 --out DIR
    train_gpt_mhc --data TEXT.txt ... --dump DUMP.safetensors      # same options: the initial weights
    python3 check_training.py DUMP.safetensors DIR/run.jsonl TEXT.txt

The model comes from the dump (its first micro-batch must be the run's first), the optimiser from the run's
first line, each step's data from the text by the trainer's rule. loss, grad_norm and lr of every step, at
most 20, must agree to 1e-5. One replica, a token a byte.
"""

import json
import math
import sys

import numpy as np
import torch

import safetensors_io
from gpt_mhc import AdamW, GPT, learning_rate

TOLERANCE, STEPS = 1e-5, 20
MASK = 2**64 - 1


def mix64(z):
    """splitmix64's finaliser, as in host/common.h."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def hash64(seed, index):
    return mix64(mix64(seed) ^ index)


def batch(text, seed, first, B, T):
    """tokens, targets (B, T) of sequences first, first + 1, ..: windows before the text's last tenth."""
    train = text[: len(text) - len(text) // 10]
    starts = [hash64(seed, first + row) % (len(train) - T) for row in range(B)]
    windows = torch.tensor([list(train[start : start + T + 1]) for start in starts])
    return windows[:, :-1], windows[:, 1:]


def read_run(path):
    """(options of the last run line, steps by number: a resumed run's file has several run lines)."""
    run, steps = {}, {}
    with open(path) as file:
        for line in file:
            entry = json.loads(line)
            if entry["type"] == "run":
                run = {name.replace("-", "_"): value for name, value in entry.items()}
            elif entry["type"] == "step":
                steps[entry["step"]] = entry
    return run, steps


def train(model, run, text, steps):
    """Yields (loss, gradient norm, lr) of updates 0, 1, .. as the contract defines them."""
    number = lambda name: float(run[name])
    B, M, T, seed = int(run["batch"]), int(run["micro_batches"]), model.config.seq, int(run["seed"])
    optimiser = AdamW(
        model, *(number(name) for name in ("beta1", "beta2", "eps", "weight_decay", "grad_clip"))
    )
    for s in range(steps):
        total = 0.0
        for micro_batch in range(M):  # one replica: D = 1
            tokens, targets = batch(text, seed, (s * M + micro_batch) * B, B, T)
            loss = model.losses(tokens, targets)[1].mean() / M
            loss.backward()
            total += loss.item()
        lr = learning_rate(
            s, int(run["steps"]), number("lr"), int(run["warmup"]), run["schedule"], number("min_lr_frac")
        )
        yield total, optimiser.step(lr), lr


def check(dump, run_jsonl, text_path):
    """(passed, failed), a line for each step."""
    run, logged = read_run(run_jsonl)
    with open(text_path, "rb") as file:
        text = file.read()
    model = GPT.from_safetensors(dump, torch.float64)
    tokens = safetensors_io.read(dump)[0]["tokens"]
    expected = batch(text, int(run["seed"]), 0, int(run["batch"]), model.config.seq)[0]
    if not np.array_equal(tokens, expected):
        raise ValueError(
            f"{dump}: its tokens are not the first micro-batch of {text_path} with seed {run['seed']}"
        )
    steps = min(STEPS, max(logged, default=0))
    if steps == 0:
        raise ValueError(f"{run_jsonl}: no step lines, expected a run with at least one step")
    passed = failed = 0
    for step, truth in enumerate(train(model, run, text, steps), 1):
        found = [logged.get(step, {}).get(name) for name in ("loss", "grad_norm", "lr")]
        found = [math.nan if value is None else value for value in found]
        errors = [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(found, truth)]
        good = all(error <= TOLERANCE for error in errors)
        passed, failed = passed + good, failed + (not good)
        print(
            f"{'ok  ' if good else 'FAIL'} step {step}: loss {found[0]:.7g} ({errors[0]:.1e}), "
            f"norm {found[1]:.7g} ({errors[1]:.1e}), lr {found[2]:.7g} ({errors[2]:.1e})"
        )
    return passed, failed


def main():
    if len(sys.argv) != 4:
        sys.exit("usage: check_training.py DUMP RUN_JSONL TEXT")
    try:
        passed, failed = check(*sys.argv[1:])
    except (ValueError, KeyError, OSError) as error:
        print(f"FAIL {error!r}" if isinstance(error, KeyError) else f"FAIL {error}")
        passed, failed = 0, 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
