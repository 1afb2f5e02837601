"""GPT-2 whose residual stream is n streams mixed by (manifold-constrained) hyper-connections, in PyTorch.

    model = GPT.from_safetensors("out/step_00001000.safetensors")
    logits = model(tokens)                      # tokens (B, T) integers, logits (B, T, V)

It is an independent oracle for train_gpt_mhc.c: written from the papers (mHC, arXiv 2512.24880; HC, arXiv
2409.19606), gradients by autograd through every Sinkhorn iteration. It favours being read over speed.

B sequences, T positions, C width, V vocabulary, L blocks, n streams, k sublayer (attention and MLP counted
separately). A token's state x is (n, C); R[out][in] mixes: y_i = post_i f + sum_j R_ij x_j.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

import safetensors_io

KNOWN = {"residual": ("none", "plain", "hc", "mhc", "ihc"), "sinkhorn_order": ("cr", "rc", "c", "r", "none")}
LAYERNORM_EPS, RMS_EPS, SINKHORN_EPS = 1e-5, 1e-6, 1e-12


@dataclass
class Config:
    """The model options of the command line, with underscores."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    seq: int = 64
    vocab: int = 256
    residual: str = "mhc"
    streams: int = 4
    sinkhorn_iters: int = 20
    sinkhorn_order: str = "cr"
    hc_maps: str = "pre,post,res"  # those that are on, or none
    hc_static: bool = False
    hc_gap: float = 4.0

    def __post_init__(self):
        for option, known in KNOWN.items():
            if getattr(self, option) not in known:
                raise ValueError(f"{option} {getattr(self, option)}: expected one of {', '.join(known)}")
        unknown = set(self.hc_maps.split(",")) - {"pre", "post", "res", "none"}
        if unknown:
            raise ValueError(f"hc_maps {self.hc_maps}: expected none or some of pre,post,res")

    @property
    def n(self):
        """Streams the model really has: plain and none are one stream, whatever the option says."""
        return self.streams if self.residual in ("hc", "mhc", "ihc") else 1

    def on(self, a_map):
        return a_map in self.hc_maps.split(",")

    @staticmethod
    def from_strings(strings, **overrides):
        """From name = text pairs (a file's metadata, a run's options); others are skipped, `-` is `_`."""
        values = {name.replace("-", "_"): value for name, value in {**strings, **overrides}.items()}
        return Config(**{f.name: _parse(f.type, values[f.name]) for f in fields(Config) if f.name in values})

    def to_strings(self):
        return {name.replace("_", "-"): str(value).lower() for name, value in asdict(self).items()}


def _parse(kind, value):
    if kind is bool:
        return str(value).lower() in ("1", "true", "yes", "on")
    return kind(value)


# --------------------------------------------------------------------------------------------------
# Connections: the coefficients pre (n), post (n) and R (n, n) of one sublayer, for every token.


def sinkhorn(a, iters, order):
    """mHC Eq. 9: alternate divisions by column and row sums. a (.., n, n) logits, R[out][in].

    order, one letter for each division of an iteration: c divides each column by its sum, r each row; `cr` is
    the paper's. The largest logit of each line that is normalised first is subtracted (columns for cr and c,
    rows for rc and r): that division cancels it exactly. `none` is exp(a): positive, otherwise unconstrained.
    """
    if order == "none":
        return a.exp()
    axis = {"c": -2, "r": -1}  # a column's sum runs over the row index
    R = (a - a.amax(axis[order[0]], keepdim=True).detach()).exp()
    for _ in range(iters):
        for letter in order:
            R = R / (R.sum(axis[letter], keepdim=True) + SINKHORN_EPS)
    return R


def rms_norm(x):
    """Root mean square normalisation over the last dimension, without a weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS)


class Connection(nn.Module):
    """x (B, T, n, C) -> pre (B, T, n), post (B, T, n), R (B, T, n, n). A map that is off is 1/n, 1, I."""

    def __init__(self, config, k):
        super().__init__()
        self.config, n, C = config, config.n, config.width
        rows = 2 * n if config.residual == "ihc" else n * n + 2 * n  # pre | post | res, res row-major
        shape = (n + 2, C) if config.residual == "hc" else (rows, n * C)
        self.fn = nn.Parameter(torch.zeros(shape))
        self.base = nn.Parameter(initial_base(config, k))
        self.scale = nn.Parameter(torch.full((2 if config.residual == "ihc" else 3,), 0.01))

    def project(self, x):
        """The input-dependent part before its scale: mhc, ihc (B, T, M); hc (B, T, n, n+2), by stream."""
        if self.config.residual == "hc":
            return torch.tanh(rms_norm(x) @ self.fn.t())  # mHC Eq. 5
        return rms_norm(x.flatten(2)) @ self.fn.t()  # mHC Eq. 7, 14-15

    def forward(self, x):
        maps = self.hyper_connection(x) if self.config.residual == "hc" else self.manifold(x)
        B, T, n, _ = x.shape
        off = (x.new_full((n,), 1 / n), x.new_ones(n), torch.eye(n, dtype=x.dtype, device=x.device))
        kept = [m if self.config.on(name) else o for name, m, o in zip(("pre", "post", "res"), maps, off)]
        return kept[0].expand(B, T, n), kept[1].expand(B, T, n), kept[2].expand(B, T, n, n)

    def hyper_connection(self, x):
        """HC Eq. 10-13, mHC Eq. 5: base + alpha tanh(theta . rmsnorm(x_j)); stream j makes column j of R."""
        n = self.config.n
        pre, post, res = self.base[:n], self.base[n : 2 * n], self.base[2 * n :].view(n, n)
        if self.config.hc_static:
            return pre, post, res
        t = self.project(x)
        return (
            pre + self.scale[0] * t[..., 0],
            post + self.scale[1] * t[..., 1],
            res + self.scale[2] * t[..., 2:].transpose(-1, -2),
        )

    def manifold(self, x):
        """mHC Eq. 7-8, 16-19; ihc is the same with R = I."""
        n = self.config.n
        a = self.base
        if not self.config.hc_static:
            lengths = torch.tensor([n, n, n * n][: len(self.scale)], device=x.device)
            a = a + self.scale.repeat_interleave(lengths) * self.project(x)
        pre, post = torch.sigmoid(a[..., :n]), 2 * torch.sigmoid(a[..., n : 2 * n])
        if self.config.residual == "ihc":
            return pre, post, torch.eye(n, dtype=x.dtype, device=x.device)
        logits = a[..., 2 * n :].unflatten(-1, (n, n))
        return pre, post, sinkhorn(logits, self.config.sinkhorn_iters, self.config.sinkhorn_order)


def initial_base(config, k):
    """Base such that every mode starts as the plain residual; sublayer k reads mostly stream k mod n."""
    n, logit = config.n, lambda p: math.log(p / (1 - p))
    read = torch.zeros(n)
    if config.residual == "hc":
        read[k % n] = 1.0
        return torch.cat((read, torch.ones(n), torch.eye(n).flatten()))
    read[:] = logit(0.3 / (n - 1)) if n > 1 else 0.0
    read[k % n] = logit(0.7) if n > 1 else 16.0  # the read weights sum to 1
    parts = (read, torch.zeros(n), config.hc_gap * torch.eye(n).flatten())
    return torch.cat(parts[:2] if config.residual == "ihc" else parts)


# --------------------------------------------------------------------------------------------------
# GPT-2. Submodule names are the parameter names of the files.


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(C, -1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)  # (B, heads, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        h = self.c_fc(x)
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return self.c_proj(gelu)


class Block(nn.Module):
    def __init__(self, config, l):
        super().__init__()
        self.residual, connected = config.residual, config.residual in ("hc", "mhc", "ihc")
        self.attn_hc = Connection(config, 2 * l) if connected else None
        self.ln_1 = nn.LayerNorm(config.width, LAYERNORM_EPS)
        self.attn = Attention(config)
        self.mlp_hc = Connection(config, 2 * l + 1) if connected else None
        self.ln_2 = nn.LayerNorm(config.width, LAYERNORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x, trace):
        x = self.sublayer(x, self.attn_hc, lambda u: self.attn(self.ln_1(u)), trace)
        return self.sublayer(x, self.mlp_hc, lambda u: self.mlp(self.ln_2(u)), trace)

    def sublayer(self, x, connection, f, trace):
        """x (B, T, n, C) -> y, mHC Eq. 3. trace collects what a check wants to look at."""
        if connection is None:  # one stream
            y = f(x[:, :, 0])[:, :, None]
            return x + y if self.residual == "plain" else y
        pre, post, R = connection(x)
        u = (pre[..., None] * x).sum(2)  # read    (B, T, C)
        out = f(u)
        y = post[..., None] * out[:, :, None] + R @ x  # write and mix
        if trace is not None:
            trace.append(
                {
                    "connection": connection,
                    "pre": pre,
                    "post": post,
                    "res": R,
                    "x": x,
                    "u": u,
                    "f": out,
                    "y": y,
                }
            )
        return y


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.seq, config.width)
        self.h = nn.ModuleList(Block(config, l) for l in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width, LAYERNORM_EPS)
        self.initialise()

    def initialise(self):
        """N(0, 0.02), smaller by sqrt(2L) for the projections into the stream; biases 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("weight") and p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * self.config.layers) if "c_proj" in name else 0.02)

    def forward(self, tokens, trace=None):
        """tokens (B, T) -> logits (B, T, V). A list as trace gets a dictionary per connected sublayer."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = x[:, :, None].expand(-1, -1, self.config.n, -1)  # n copies
        for block in self.h:
            x = block(x, trace)
        return self.ln_f(x.mean(2)) @ self.wte.weight.t()  # the streams' mean; the head is the embedding

    def losses(self, tokens, targets, trace=None):
        """(logits (B, T, V), losses (B, T) in nats)."""
        logits = self(tokens, trace)
        return logits, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    @staticmethod
    def from_safetensors(path, dtype=torch.float32, **overrides):
        """A model from one of our checkpoints or dumps. overrides: options that the file's metadata lacks."""
        tensors, metadata = safetensors_io.read(path)
        model = GPT(Config.from_strings(metadata, **overrides)).to(dtype)
        model.load(tensors, path)
        return model

    def load(self, tensors, path="tensors"):
        with torch.no_grad():
            for name, p in self.named_parameters():
                found = tensors[name].shape if name in tensors else None
                if found != tuple(p.shape):
                    raise ValueError(
                        f"{path}: {name} is {found}, expected {tuple(p.shape)}; do the options fit the file?"
                    )
                p.copy_(torch.from_numpy(tensors[name]))


# --------------------------------------------------------------------------------------------------
# Training: AdamW with decoupled decay, gradient clipping and the learning rate of update s = 0, 1, ..


def learning_rate(s, steps, lr, warmup, schedule, min_lr_frac):
    if s < warmup:
        return lr * (s + 1) / warmup
    p = (s - warmup) / (steps - warmup)
    if schedule == "cosine":
        return lr * (min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * p)))
    if schedule == "linear":
        return lr * (1 - (1 - min_lr_frac) * p)
    if schedule == "wsd":  # from 0.8 of the steps on, compared in integers
        return lr * (1 - (1 - min_lr_frac) * max(0, 5 * s - 4 * steps) / steps)
    if schedule == "step":
        return lr * (0.1 if 10 * s >= 9 * steps else 0.316 if 10 * s >= 8 * steps else 1)
    if schedule == "constant":
        return lr
    raise ValueError(f"schedule {schedule}: expected cosine, wsd, linear, step or constant")


def gradients(model):
    """Gradient by name. A parameter that the loss does not depend on has zeros."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def gradient_norm(grads):
    return math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))


def decayed(name, p):
    """2-D weights and fn; not biases, LayerNorm, scale and base."""
    return p.dim() == 2


class AdamW:
    def __init__(self, model, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        self.model, self.betas, self.eps, self.weight_decay, self.clip = (
            model,
            (beta1, beta2),
            eps,
            weight_decay,
            grad_clip,
        )
        self.m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def step(self, lr):
        """One update; the norm of the gradient before clipping."""
        grads, (beta1, beta2) = gradients(self.model), self.betas
        norm = gradient_norm(grads)
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        self.updates += 1
        for name, p in self.model.named_parameters():
            g, m, v = grads[name] * factor, self.m[name], self.v[name]
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            m_hat, v_hat = m / (1 - beta1**self.updates), v / (1 - beta2**self.updates)
            decay = self.weight_decay if decayed(name, p) else 0.0
            p -= lr * (m_hat / (v_hat.sqrt() + self.eps) + decay * p)
        self.model.zero_grad(set_to_none=True)
        return norm
