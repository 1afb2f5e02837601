"""python3 make_golden.py [DIR]: small models at random points, all that a `--dump` file holds, in float64.

The C tests read them, so that they check the forward pass and every gradient without PyTorch. DIR: golden/.
"""

import os
import sys

import numpy as np
import torch

import safetensors_io
from gpt_mhc import GPT, Config, gradients

SMALL = dict(layers=2, width=6, heads=2, seq=5, vocab=11)
CASES = {
    "plain": dict(residual="plain", streams=1),
    "none": dict(residual="none", streams=1, layers=1),
    "hc": dict(residual="hc", streams=4),
    "mhc": dict(residual="mhc", streams=3, sinkhorn_iters=3),
    "ihc": dict(residual="ihc", streams=3, layers=1),
    "mhc_rc_static": dict(
        residual="mhc", streams=3, layers=1, sinkhorn_order="rc", sinkhorn_iters=2, hc_static=True
    ),
    "mhc_pre_post": dict(residual="mhc", streams=2, layers=1, hc_maps="pre,post"),
    "mhc_c": dict(residual="mhc", streams=2, layers=1, sinkhorn_order="c"),
}


def randomise(model, random):
    """A point far from the initial one, exact in float32: every parameter and every coefficient counts.

    base is spread wide and iterations are few, so that R is not converged: their number and order show.
    """
    for name, p in model.named_parameters():
        spread, centre = {
            "weight": (0.4, 0),
            "bias": (0.2, 0),
            "fn": (0.3, 0),
            "base": (1.5, 0),
            "scale": (0.2, 0.8),
        }[name.split(".")[-1]]
        if ".ln_" in "." + name and name.endswith("weight"):
            centre = 1
        values = (random.standard_normal(tuple(p.shape)) * spread + centre).astype(np.float32)
        p.data.copy_(torch.from_numpy(values))


def dump(model, tokens, targets):
    """What `--dump` writes, for one micro-batch (B, T): arrays by name, and the model's trace."""
    trace = []
    logits, losses = model.losses(tokens, targets, trace)
    for entry in trace:
        entry["u"].retain_grad()
        entry["y"].retain_grad()
    losses.mean().backward()
    out = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits, "losses": losses}
    out.update(model.named_parameters())
    out.update({"grad." + name: g for name, g in gradients(model).items()})
    for k, entry in enumerate(trace):
        out.update({f"hc.{k}.{name}": entry[name] for name in ("pre", "post", "res")})
    return {name: values.detach().numpy() for name, values in out.items()}, trace


def make(config, seed, batch=2):
    random = np.random.default_rng(seed)
    model = GPT(config).double()
    randomise(model, random)
    text = torch.from_numpy(random.integers(0, config.vocab, (batch, config.seq + 1)))
    return dump(model, text[:, :-1], text[:, 1:])[0]


def main():
    folder = (
        sys.argv[1]
        if len(sys.argv) > 1
        else os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
    )
    os.makedirs(folder, exist_ok=True)
    for seed, (name, options) in enumerate(CASES.items()):
        config = Config(**{**SMALL, **options})
        path = os.path.join(folder, name + ".safetensors")
        safetensors_io.write(path, make(config, seed), {**config.to_strings(), "batch": 2})
        print(path, os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main()
