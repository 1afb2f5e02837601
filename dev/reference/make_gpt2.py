"""python3 make_gpt2.py [DIR]: a tiny GPT-2 in Hugging Face's exact file layout, and the logits it must give.

gpt2_hf.safetensors          as OpenAI's gpt2: no prefix, float mask buffers
gpt2_hf_prefix.safetensors   the same weights with `transformer.`, boolean masks and a head of its own
gpt2_hf_logits.safetensors   tokens and logits, the number of heads as metadata

The logits come from the plain numpy below in float64, which shares nothing with gpt_mhc.py. DIR: golden/.
"""

import math
import os
import sys

import numpy as np

import safetensors_io

L, C, HEADS, T, V = 2, 8, 2, 6, 13


def weights(random):
    """By Hugging Face's names. Conv1D weights are (in, out): the transpose of ours."""

    def normal(*shape, centre=0.0, spread=0.3):
        return (centre + spread * random.standard_normal(shape)).astype(np.float32)

    w = {"wte.weight": normal(V, C), "wpe.weight": normal(T, C)}
    for l in range(L):
        h = f"h.{l}."
        for ln in ("ln_1", "ln_2"):
            w[h + ln + ".weight"], w[h + ln + ".bias"] = normal(C, centre=1.0), normal(C)
        for name, rows, cols in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            w[h + name + ".weight"], w[h + name + ".bias"] = normal(rows, cols), normal(cols)
    w["ln_f.weight"], w["ln_f.bias"] = normal(C, centre=1.0), normal(C)
    return w


def gpt2(w, tokens):
    """Logits (T, V) of one sequence, position by position and head by head."""
    w = {name: values.astype(np.float64) for name, values in w.items()}

    def layernorm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"]
            + w[name + ".bias"]
        )

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu_new(x):
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * np.power(x, 3.0))))

    def attention(x, name):
        size, qkv = C // HEADS, conv1d(x, name + ".c_attn")
        out = np.zeros_like(x)
        for t in range(len(x)):
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                q, k, v = qkv[t, :C][part], qkv[: t + 1, C : 2 * C][:, part], qkv[: t + 1, 2 * C :][:, part]
                scores = np.exp(k @ q / math.sqrt(size))
                out[t, part] = scores / scores.sum() @ v
        return conv1d(out, name + ".c_proj")

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for l in range(L):
        x = x + attention(layernorm(x, f"h.{l}.ln_1"), f"h.{l}.attn")
        x = x + conv1d(gelu_new(conv1d(layernorm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc")), f"h.{l}.mlp.c_proj")
    return layernorm(x, "ln_f") @ w["wte.weight"].T


def with_buffers(w, prefix, mask_kind):
    """The file's tensors: attn.bias is the (1, 1, T, T) causal mask, masked_bias the masked scores."""
    out = {prefix + name: values for name, values in w.items()}
    for l in range(L):
        out[f"{prefix}h.{l}.attn.masked_bias"] = np.float32(-1e4)
    if prefix:
        out["lm_head.weight"] = w["wte.weight"]
    for l in range(L):  # last: one byte an element would misalign what follows
        out[f"{prefix}h.{l}.attn.bias"] = np.tril(np.ones((1, 1, T, T))).astype(mask_kind)
    return out


def make(folder):
    random = np.random.default_rng(2)
    w = weights(random)
    tokens = random.integers(0, V, (2, T))
    logits = np.stack([gpt2(w, row) for row in tokens])
    path = os.path.join(folder, "gpt2_hf")
    safetensors_io.write(path + ".safetensors", with_buffers(w, "", np.float32), {"format": "pt"})
    safetensors_io.write(
        path + "_prefix.safetensors", with_buffers(w, "transformer.", bool), {"format": "pt"}
    )
    safetensors_io.write(
        path + "_logits.safetensors",
        {"tokens": tokens, "logits": logits},
        {"layers": L, "width": C, "heads": HEADS, "seq": T, "vocab": V},
    )


def main():
    folder = (
        sys.argv[1]
        if len(sys.argv) > 1
        else os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
    )
    os.makedirs(folder, exist_ok=True)
    make(folder)


if __name__ == "__main__":
    main()
