"""python3 test_reference.py: is the oracle itself right? Prints ok or FAIL; exit status 1 on any failure."""

import contextlib
import io
import json
import os
import sys
import tempfile

import numpy as np
import torch

import check_dump
import check_training
import make_golden
import make_gpt2
import safetensors_io
from gpt_mhc import GPT, AdamW, Config, gradients, learning_rate, sinkhorn

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
SMALL = dict(layers=3, width=16, heads=2, seq=12, vocab=32)
counts = {True: 0, False: 0}


def check(good, what):
    good = bool(good)
    counts[good] += 1
    print("ok  " if good else "FAIL", what, flush=True)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(Config(**{**SMALL, **options})).double()
    text = torch.randint(0, model.config.vocab, (2, model.config.seq + 1))
    return model, text[:, :-1], text[:, 1:]


def random_model(**options):
    model, tokens, targets = small_model(**options)
    make_golden.randomise(model, np.random.default_rng(5))
    return model, tokens, targets


# --------------------------------------------------------------------------------------------------
# The model


def naive_coefficients(module, x):
    """pre, post, R of one token's state x (n, C) by loops over the papers' sums."""
    config, n, C = module.config, *x.shape
    fn, base, scale = (p.detach().numpy() for p in (module.fn, module.base, module.scale))
    pre, post, R = np.zeros(n), np.zeros(n), np.zeros((n, n))
    if config.residual == "hc":
        for j in range(n):
            xt = x[j] / np.sqrt(sum(v * v for v in x[j]) / C + 1e-6)
            pre[j] = scale[0] * np.tanh(fn[0] @ xt) + base[j]
            post[j] = scale[1] * np.tanh(fn[1] @ xt) + base[n + j]
            for p in range(n):
                R[p, j] = scale[2] * np.tanh(fn[2 + p] @ xt) + base[2 * n + p * n + j]
        return pre, post, R
    flat = np.concatenate(list(x))
    mix = fn @ flat / np.sqrt(flat @ flat / (n * C) + 1e-6)
    for i in range(n):
        pre[i] = 1 / (1 + np.exp(-(scale[0] * mix[i] + base[i])))
        post[i] = 2 / (1 + np.exp(-(scale[1] * mix[n + i] + base[n + i])))
        for j in range(n):
            R[i, j] = np.exp(scale[2] * mix[2 * n + i * n + j] + base[2 * n + i * n + j])
    for _ in range(config.sinkhorn_iters):
        for j in range(n):
            R[:, j] /= sum(R[i, j] for i in range(n))
        for i in range(n):
            R[i, :] /= sum(R[i, j] for j in range(n))
    return pre, post, R


def test_against_loops():
    for residual in ("hc", "mhc"):
        model, tokens, _ = random_model(residual=residual, sinkhorn_iters=3)
        trace = []
        model(tokens, trace)
        worst = 0.0
        for entry in trace:
            entry = {name: v.detach().numpy() if torch.is_tensor(v) else v for name, v in entry.items()}
            for t in range(3):
                x, f = entry["x"][1, t], entry["f"][1, t]
                pre, post, R = naive_coefficients(entry["connection"], x)
                y = [post[i] * f + sum(R[i, j] * x[j] for j in range(len(x))) for i in range(len(x))]
                pairs = (
                    (pre, entry["pre"][1, t]),
                    (post, entry["post"][1, t]),
                    (R, entry["res"][1, t]),
                    (sum(pre[i] * x[i] for i in range(len(x))), entry["u"][1, t]),
                    (np.array(y), entry["y"][1, t]),
                )
                worst = max(worst, *(np.abs(a - b).max() for a, b in pairs))
        check(worst <= 1e-10, f"{residual}: coefficients, read and write as the papers' sums, {worst:.1e}")


def test_start_is_plain():
    torch.set_default_dtype(torch.float64)  # base exact beyond float32
    plain, tokens, _ = small_model(residual="plain")
    truth = plain(tokens)
    cases = [
        dict(residual=r, hc_maps=m, hc_static=s)
        for r in ("hc", "mhc", "ihc")
        for m in ("pre,post,res", "pre", "post", "res", "none")
        for s in (False, True)
    ]
    cases += [dict(residual="mhc", sinkhorn_order=o) for o in ("rc", "c", "r")]
    cases += [dict(residual=r, streams=n) for r in ("hc", "mhc", "ihc") for n in (2, 3, 8)]
    for options in cases:
        model, _, _ = small_model(**options)
        model.load_state_dict(plain.state_dict(), strict=False)
        error = relative(model(tokens), truth)
        check(error <= 1e-9, f"starts as plain, {error:.1e}: {options}")
    model, _, _ = small_model(residual="mhc", streams=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    error = relative(model(tokens), truth)
    check(error <= 1e-7, f"starts as plain with one stream, sigmoid(16) from 1: {error:.1e}")
    torch.set_default_dtype(torch.float32)


def test_symmetry_is_broken():
    model, tokens, targets = small_model(residual="mhc")
    optimiser, n = AdamW(model), model.config.n
    norms, spread = [], []
    for _ in range(3):
        trace = []
        model.losses(tokens, targets, trace)[1].mean().backward()
        norms.append(float(model.h[0].mlp_hc.base.grad[2 * n :].norm()))
        spread.append(float(trace[-1]["y"].std(2).norm()))
        optimiser.step(1e-2)
    check(
        norms[0] < 1e-15 and spread[0] < 1e-12, f"first step: equal streams, no gradient for R {norms[0]:.1e}"
    )
    check(
        norms[1] > 1e-10 and spread[1] > 1e-5,
        f"second step: streams differ {spread[1]:.1e}, R learns {norms[1]:.1e}",
    )


def test_differences():
    """Central differences of the loss along a random direction of each tensor, in float64."""
    cases = [dict(residual=r) for r in ("none", "plain", "hc", "mhc", "ihc")]
    cases += [dict(residual="mhc", sinkhorn_order=o, sinkhorn_iters=4) for o in ("rc", "c", "r", "none")]
    for options in cases:
        model, tokens, targets = random_model(**{"layers": 1, **options})
        loss = lambda: model.losses(tokens, targets)[1].mean()
        loss().backward()
        worst, random = 0.0, torch.Generator().manual_seed(1)
        for p in model.parameters():
            direction = torch.randn(p.shape, generator=random, dtype=torch.float64)
            direction /= direction.norm()
            with torch.no_grad():
                p += 1e-5 * direction
                up = loss()
                p -= 2e-5 * direction
                down = loss()
                p += 1e-5 * direction
            slope = float((p.grad * direction).sum())
            worst = max(worst, abs(float(up - down) / 2e-5 - slope) / max(float(p.grad.norm()), 1e-3))
        check(worst <= 1e-6, f"gradients by differences {worst:.1e}: {options}")


def test_off_means_constant():
    model, tokens, targets = random_model(residual="mhc", hc_maps="post")
    trace = []
    model.losses(tokens, targets, trace)[1].mean().backward()
    n, grads = model.config.n, gradients(model)
    check(
        (trace[0]["pre"] == 1 / n).all() and (trace[0]["res"] == torch.eye(n)).all(), "maps off are 1/n and I"
    )
    fn, base = grads["h.0.attn_hc.fn"], grads["h.0.attn_hc.base"]
    check(
        fn[:n].norm() == 0 and fn[2 * n :].norm() == 0 and fn[n : 2 * n].norm() > 0,
        "rows of maps off get zero gradient",
    )
    check(base[:n].norm() == 0 and base[2 * n :].norm() == 0 and base[n : 2 * n].norm() > 0, "their base too")
    model, tokens, targets = random_model(residual="mhc", hc_static=True)
    model.losses(tokens, targets)[1].mean().backward()
    grads = gradients(model)
    check(
        grads["h.0.attn_hc.fn"].norm() == 0 and grads["h.0.attn_hc.scale"].norm() == 0,
        "static: fn and scale get zero",
    )


# --------------------------------------------------------------------------------------------------
# Sinkhorn and gains


def test_sinkhorn():
    a = 2 * torch.randn(500, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    R = sinkhorn(a, 20, "cr")
    check((R >= 0).all() and float((R.sum(-1) - 1).abs().max()) <= 1e-11, "rows sum to 1 after 20 iterations")
    check(float((R.sum(-2) - 1).abs().median()) < 1e-5, "columns nearly")
    shifted = sinkhorn(a + torch.randn(500, 1, 4, dtype=torch.float64), 3, "cr")
    check(
        float((shifted - sinkhorn(a, 3, "cr")).abs().max()) <= 1e-11, "a constant added to a column cancels"
    )
    flipped = sinkhorn(a.transpose(-1, -2), 5, "rc").transpose(-1, -2)
    check(float((flipped - sinkhorn(a, 5, "cr")).abs().max()) <= 1e-15, "rc is cr of the transpose")
    limit = sinkhorn(a[:50] / 2, 3000, "rc") - sinkhorn(a[:50] / 2, 3000, "cr")
    check(float(limit.abs().max()) <= 1e-9, "both orders have the same limit")
    check(float((sinkhorn(a, 7, "r") - a.softmax(-1)).abs().max()) <= 1e-10, "r is a softmax over the row")
    check(float((sinkhorn(a, 7, "c") - a.softmax(-2)).abs().max()) <= 1e-10, "c is a softmax over the column")
    check(torch.equal(sinkhorn(a, 7, "none"), a.exp()), "none is exp")
    huge = sinkhorn(torch.tensor([[1e3, -1e3], [-1e3, 1e3]]), 20, "cr")
    check(torch.equal(huge, torch.eye(2)), "logits of 1000 do not overflow")


def test_gains():
    for residual, exact in (("mhc", True), ("ihc", True), ("hc", False)):
        model, tokens, _ = random_model(residual=residual)
        trace = []
        model(tokens, trace)
        G = torch.eye(model.config.n, dtype=torch.float64).expand_as(trace[0]["res"])
        for entry in trace:
            G = entry["res"] @ G
        forward, backward = G.sum(-1).abs().amax(-1).mean(), G.sum(-2).abs().amax(-1).mean()
        good = abs(forward - 1) <= 1e-10 and backward < 2 if exact else forward > 2
        check(
            good, f"{residual}: composite gain forward {float(forward):.6g}, backward {float(backward):.6g}"
        )


# --------------------------------------------------------------------------------------------------
# Training


def test_adamw():
    """The plain update against torch.optim and torch's clipping."""
    ours, tokens, targets = small_model(residual="mhc")
    theirs, _, _ = small_model(residual="mhc")
    named = list(theirs.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() != 2], "weight_decay": 0.0},
    ]
    torch_adamw, our_adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8), AdamW(ours)
    for _ in range(10):
        for model in (ours, theirs):
            (3 * model.losses(tokens, targets)[1].mean()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
        torch_adamw.step()
        torch_adamw.zero_grad(set_to_none=True)
        our_norm = our_adamw.step(1e-2)
    check(abs(norm - our_norm) <= 1e-9 * norm and norm > 1, f"gradient norm as torch's, {norm:.4f}")
    error = max(relative(p, q) for (_, p), (_, q) in zip(ours.named_parameters(), named))
    check(error <= 1e-9, f"10 AdamW updates as torch.optim's, {error:.1e}")


def test_learning_rate():
    rates = lambda schedule: [learning_rate(s, 20, 1.0, 4, schedule, 0.1) for s in range(20)]
    close = lambda value, expected: abs(value - expected) <= 1e-12
    for schedule in ("cosine", "linear", "wsd", "step", "constant"):
        check(rates(schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0], f"{schedule}: warm-up, then the full rate")
    check(
        close(rates("cosine")[12], 0.55) and close(rates("linear")[12], 0.55),
        "cosine and linear are half way down in the middle",
    )
    check(close(rates("linear")[19], 1 - 0.9 * 15 / 16), "linear's last update is one short of the end")
    check(
        rates("wsd")[:17][-1] == 1.0 and close(rates("wsd")[18], 0.55), "wsd falls linearly in the last fifth"
    )
    check(rates("step")[15:20] == [1.0, 0.316, 0.316, 0.1, 0.1], "step falls at 80 % and 90 %")


def simulated_run(folder, **changes):
    """The arguments of check_training for a run by the float32 model; changes spoil it."""
    dump, run_jsonl, text = (
        os.path.join(folder, name) for name in ("dump.safetensors", "run.jsonl", "text.txt")
    )
    with open(text, "wb") as file:
        file.write(bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
    torch.manual_seed(0)
    model = GPT(Config(**{**SMALL, "vocab": 256}))
    run = {
        "type": "run",
        "batch": 2,
        "micro-batches": 2,
        "seed": 7,
        "steps": 6,
        "lr": 3e-3,
        "warmup": 2,
        "schedule": "cosine",
        "min-lr-frac": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight-decay": 0.1,
        "grad-clip": 1.0,
    }
    data = open(text, "rb").read()
    safetensors_io.write(
        dump, make_golden.dump(model, *check_training.batch(data, 7, 0, 2, 12))[0], model.config.to_strings()
    )
    model.zero_grad(set_to_none=True)
    truth = list(
        check_training.train(model, {k.replace("-", "_"): v for k, v in {**run, **changes}.items()}, data, 6)
    )
    lines = [run] + [
        dict(type="step", step=s, loss=loss, grad_norm=norm, lr=lr)
        for s, (loss, norm, lr) in enumerate(truth, 1)
    ]
    with open(run_jsonl, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return dump, run_jsonl, text


def test_training(folder):
    check(check_training.mix64(0) == 0xE220A8397B1DCDAF, "mix64 is splitmix64's finaliser")
    tokens, targets = check_training.batch(bytes(range(100)), 1, 0, 50, 8)
    check(
        tokens.min() >= 0 and targets.max() < 90 and (targets == tokens + 1).all(),
        "windows stay before the last tenth",
    )
    tokens, _ = check_training.batch(bytes(range(19)), 1, 0, 200, 8)
    check(tokens.max() == 16, "of 19 bytes 18 are for training")

    def outcome(**changes):
        with contextlib.redirect_stdout(io.StringIO()):
            return check_training.check(*simulated_run(folder, **changes))

    check(outcome() == (6, 0), "a float32 run passes")
    for change in (
        dict(lr=3.001e-3),
        dict(beta2=0.951),
        dict(weight_decay=0.0),
        dict(seed=8),
        dict(grad_clip=0.5),
    ):
        check(outcome(**change)[1] > 0, f"a run that did otherwise is caught: {change}")


# --------------------------------------------------------------------------------------------------
# Files


def test_safetensors(folder):
    path = os.path.join(folder, "x.safetensors")
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, dtype=np.int32),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
    }
    safetensors_io.write(path, tensors, {"step": 3})
    found, metadata = safetensors_io.read(path)
    same = all(
        np.array_equal(found[k], v) and found[k].dtype == v.dtype and found[k].shape == v.shape
        for k, v in tensors.items()
    )
    check(
        same and list(found) == list(tensors) and metadata == {"step": "3"},
        "safetensors: what was written is read",
    )
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + bytes((0x80, 0x3F, 0x20, 0xC0)))
    check(safetensors_io.read(path)[0]["w"].tolist() == [1.0, -2.5], "safetensors: BF16 as float32")
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + 3)
    try:
        safetensors_io.read(path)
        check(False, "safetensors: a file cut short is refused")
    except ValueError as error:
        check("bytes" in str(error), "safetensors: a file cut short is refused")


def test_golden(folder):
    for seed, (name, options) in enumerate(make_golden.CASES.items()):
        path = os.path.join(GOLDEN, name + ".safetensors")
        tensors, metadata = safetensors_io.read(path)
        truth = make_golden.make(Config(**{**make_golden.SMALL, **options}), seed)
        fresh = set(truth) == set(tensors) and all(
            np.allclose(tensors[k], v, 1e-6, 1e-9) for k, v in truth.items()
        )
        check(fresh, f"golden {name}: is what make_golden.py makes")
        single = GPT.from_safetensors(path)
        tokens, targets = (torch.from_numpy(tensors[k]).long() for k in ("tokens", "targets"))
        copy = os.path.join(folder, "single.safetensors")
        safetensors_io.write(copy, make_golden.dump(single, tokens, targets)[0], metadata)
        bad = [result for result in check_dump.check_file(copy) if not result[1]]
        check(not bad, f"golden {name}: the model in float32 passes {bad[:2]}")


def test_check_dump_fails(folder):
    source, copy = os.path.join(GOLDEN, "mhc.safetensors"), os.path.join(folder, "spoilt.safetensors")

    def failures(spoil):
        tensors, metadata = safetensors_io.read(source)
        spoil(tensors, metadata)
        safetensors_io.write(copy, tensors, metadata)
        return [name for name, passed, _, _ in check_dump.check_file(copy) if not passed]

    def change(name, function):
        return failures(lambda tensors, _: tensors.__setitem__(name, function(tensors[name])))

    check(failures(lambda tensors, metadata: None) == [], "check_dump: an untouched file passes")
    check(
        change("hc.1.res", lambda v: v.swapaxes(-1, -2)) == ["hc.1.res"],
        "check_dump: a transposed R is caught",
    )
    check(
        change("grad.h.0.mlp_hc.base", lambda v: v * np.float32(1.001)) == ["grad.h.0.mlp_hc.base"],
        "check_dump: 0.1 % is caught",
    )
    check(change("losses", lambda v: v * np.float32(np.nan)) == ["losses"], "check_dump: NaN is caught")
    check(
        change("grad.wte.weight", lambda v: v * 0) == ["grad.wte.weight"],
        "check_dump: a gradient of zeros is caught",
    )
    check(
        len(change("h.1.mlp.c_fc.bias", lambda v: v + np.float32(0.01))) > 40,
        "check_dump: other weights are caught",
    )
    check(
        failures(lambda t, m: t.pop("logits") is None) == ["logits"], "check_dump: a missing tensor is caught"
    )
    check(failures(lambda t, m: t.update(x=np.zeros(1))) == ["x"], "check_dump: a tensor too many is caught")
    check(
        failures(lambda t, m: m.pop("heads") is None) == ["__metadata__"],
        "check_dump: missing options are caught",
    )
    check(
        failures(lambda t, m: m.update({"sinkhorn-order": "rc"})) != [], "check_dump: another order is caught"
    )
    check(
        failures(lambda t, m: m.update({"sinkhorn_iters": "4"})) != [],
        "check_dump: other iterations are caught, _ as well as -",
    )


def test_gpt2_layout(folder):
    """Hugging Face's file, by the rules of --init-from, in our plain model."""
    make_gpt2.make(folder)
    for name in ("gpt2_hf", "gpt2_hf_prefix", "gpt2_hf_logits"):
        fresh, stored = (
            safetensors_io.read(os.path.join(place, name + ".safetensors"))[0] for place in (folder, GOLDEN)
        )
        same = list(fresh) == list(stored) and all(
            np.allclose(fresh[k], v, 1e-6, 1e-6) for k, v in stored.items()
        )
        check(same, f"{name}: is what make_gpt2.py makes")
    logits, metadata = safetensors_io.read(os.path.join(GOLDEN, "gpt2_hf_logits.safetensors"))
    model = GPT(Config.from_strings(metadata, residual="plain")).double()
    for name, prefix in (("gpt2_hf", ""), ("gpt2_hf_prefix", "transformer.")):
        tensors, _ = safetensors_io.read(os.path.join(GOLDEN, name + ".safetensors"))
        check(
            f"{prefix}h.0.attn.bias" in tensors and f"{prefix}h.1.attn.masked_bias" in tensors,
            f"{name}: has the buffers",
        )
        check(("lm_head.weight" in tensors) == bool(prefix), f"{name}: a head where there is a prefix")
        ours = {}
        for p, values in tensors.items():
            conv1d = values.ndim == 2 and ".h." in "." + p
            ours[p[len(prefix) :] if p.startswith(prefix) else p] = values.T.copy() if conv1d else values
        model.load(ours)
        error = relative(
            model(torch.from_numpy(logits["tokens"]).long()), torch.from_numpy(logits["logits"]).double()
        )
        check(error <= 1e-6, f"{name}: logits of the plain numpy GPT-2, {error:.1e}")


def main():
    test_against_loops()
    test_start_is_plain()
    test_symmetry_is_broken()
    test_differences()
    test_off_means_constant()
    test_sinkhorn()
    test_gains()
    test_adamw()
    test_learning_rate()
    with tempfile.TemporaryDirectory() as folder:
        test_gpt2_layout(folder)
        test_training(folder)
        test_safetensors(folder)
        test_golden(folder)
        test_check_dump_fails(folder)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()
