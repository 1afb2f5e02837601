"""python3 check_dump.py FILE.safetensors ...: what `--dump` wrote against the PyTorch model in float64.

From the file's parameters and tokens all else is computed again; a tensor passes if |a - b| <= 1e-5 |b|.

The floor. Some gradients are zero in truth but sums that cancel in fp32, and have no relative error:
* the mixing's logits while all streams are equal, as in the first step: dR_ij = <dy_i, x_j> is the same for
  every j, and the rows of R sum to 1;
* the read weights there: the LayerNorm behind the read removes the scale of their sum;
* the last sublayer's mixing once its columns sum to 1: the mean over streams undoes it.
A dot product rounds by about u |a| |b| with u = 2^-24, and streams that should be equal differ by u |x|. So
the gradients of one token's coefficients are only defined to
    e = u (|du| |x| + |dy| |f| + |dy| |x|)      for pre, post, R; a map that is off drops its term
because sigmoid, tanh and Sinkhorn's divisions do not enlarge a gradient much (exp alone, order none, does:
times max R). The tokens' errors add: where fn is 0 all tokens have the same R, so they share their sign. So
|a - b| may also be as large as
    base: sum e      fn: max|alpha| sqrt(nC) sum e (|rho x| = sqrt(nC))      scale: sum e |projection|.
At the golden files' random points this is 1e-6 to 1e-4 of the gradient: a wrong formula does not hide
behind it. What passes by the floor alone is printed.
"""

import math
import sys

import numpy as np
import torch

import safetensors_io
from gpt_mhc import GPT, Config
from make_golden import dump

TOLERANCE, UNIT_ROUNDOFF = 1e-5, 2.0**-24
SHOWN = 5


def rounding_floors(model, trace):
    """Absolute error that fp32 rounding explains, by gradient name; see above."""
    floors, config = {}, model.config
    owners = {module: name for name, module in model.named_modules()}
    for entry in trace:
        x, u, f, y = entry["x"], entry["u"], entry["f"], entry["y"]
        norm = lambda values, dims: values.detach().pow(2).sum(dims).sqrt()  # (B, T)
        x_norm, dy_norm = norm(x, (2, 3)), norm(y.grad, (2, 3))
        largest = entry["res"].detach().abs().amax((2, 3)) if config.sinkhorn_order == "none" else 1
        terms = {
            "pre": norm(u.grad, 2) * x_norm,
            "post": dy_norm * norm(f, 2),
            "res": dy_norm * x_norm * largest,
        }
        e = UNIT_ROUNDOFF * sum(value for name, value in terms.items() if config.on(name))
        connection, name = entry["connection"], "grad." + owners[entry["connection"]]
        floors[name + ".base"] = float(torch.as_tensor(e).sum())
        if config.hc_static or not torch.is_tensor(e):
            continue
        mix = connection.project(x.detach()).detach().flatten(2).pow(2).sum(2).sqrt()
        floors[name + ".fn"] = float(e.sum() * connection.scale.abs().max()) * math.sqrt(
            config.n * config.width
        )
        floors[name + ".scale"] = float((e * mix).sum())
    return floors


def compare(found, truth, floor=0.0):
    """(passed, relative error). NaN and infinity fail; both zero passes."""
    error = np.linalg.norm(found.astype(np.float64) - truth)
    size = np.linalg.norm(truth)
    relative = error / size if size > 0 else (0.0 if error == 0 else math.inf)
    return bool(error <= TOLERANCE * size or error <= floor), relative


def check_tokens(tensors, config):
    """What the comparison itself rests on; a reason or None."""
    for name in ("tokens", "targets"):
        if name not in tensors or tensors[name].dtype != np.int32 or tensors[name].ndim != 2:
            return f"{name} (B, T) in I32 is missing"
        if tensors[name].size == 0 or not (0 <= tensors[name].min() and tensors[name].max() < config.vocab):
            return f"{name} is empty or has values outside the vocabulary of {config.vocab}"
    if tensors["tokens"].shape != tensors["targets"].shape or tensors["tokens"].shape[1] > config.seq:
        shapes = f"tokens {tensors['tokens'].shape} and targets {tensors['targets'].shape}"
        return f"{shapes} with a context of {config.seq}"
    if not np.array_equal(tensors["tokens"][:, 1:], tensors["targets"][:, :-1]):
        return "targets are not the tokens one position later"
    return None


def check_file(path):
    """[(name, passed, relative error or None, remark)] of one file."""
    tensors, metadata = safetensors_io.read(path)
    config = Config.from_strings(metadata)
    missing = [f for f in ("layers", "width", "heads", "seq", "vocab", "residual") if f not in metadata]
    if missing:
        return [("__metadata__", False, None, f"lacks {', '.join(missing)}")]
    reason = check_tokens(tensors, config)
    if reason:
        return [("tokens", False, None, reason)]
    model = GPT(config).double()
    model.load(tensors, path)
    tokens, targets = (torch.from_numpy(tensors[name].astype(np.int64)) for name in ("tokens", "targets"))
    truth, trace = dump(model, tokens, targets)
    floors = rounding_floors(model, trace)
    results = [(name, False, None, "not expected") for name in tensors if name not in truth]
    for name, value in truth.items():
        if name not in tensors or tensors[name].shape != value.shape:
            results.append(
                (
                    name,
                    False,
                    None,
                    f"{tensors[name].shape if name in tensors else 'missing'}, expected {value.shape}",
                )
            )
            continue
        passed, relative = compare(tensors[name], value, floors.get(name, 0.0))
        by_floor = passed and relative > TOLERANCE
        remark = (
            f"zero to rounding: |truth| {np.linalg.norm(value):.1e}, floor {floors[name]:.1e}"
            if by_floor
            else ""
        )
        results.append((name, passed, relative, remark))
    return results


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: check_dump.py FILE.safetensors ...")
    passed = failed = 0
    for path in sys.argv[1:]:
        try:
            results = check_file(path)
        except (ValueError, KeyError, OSError) as error:
            results = [(path, False, None, str(error))]
        bad = [r for r in results if not r[1]]
        good = sorted((r for r in results if r[1]), key=lambda r: -r[2])
        remarked = [r for r in good if r[3]]
        for name, ok, relative, remark in bad + remarked + [r for r in good if not r[3]][:SHOWN]:
            print(
                f"{'ok  ' if ok else 'FAIL'} {path}: {name}"
                + ("" if relative is None else f" {relative:.1e}")
                + (f" ({remark})" if remark else "")
            )
        passed, failed = passed + len(good), failed + len(bad)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
