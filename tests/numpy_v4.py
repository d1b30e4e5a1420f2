"""A DeepSeek-V4 decoder in numpy float64: one sequence, one token at a time, nothing shared with localmoe.

Written from the equations of the V4 report as a second opinion for users without transformers. It reads weights by
their published names and holds exactly what decoding must remember: latent rows of the window, compressed entries, and
the compressor rows that are still needed. Meant to be read: no batching, no blocks, no masks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Config = Mapping[str, Any]

SLIDING, CSA = "sliding_attention", "compressed_sparse_attention"


def rms(x: Array, weight: Array | float, eps: float) -> Array:
    """x over its root mean square in the last dimension, times weight."""
    y: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return y


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def softmax(x: Array) -> Array:
    """Along axis 0; -inf gives 0."""
    p: Array = np.exp(x - x.max(0))
    p /= p.sum(0)
    return p


def yarn(dim: int, base: float, scaling: Mapping[str, Any] | None) -> Array:
    """Angle per position of each pair of dimensions. scaling: config.json's rope_scaling, None for plain RoPE."""
    frequencies = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
    if scaling is None:
        return frequencies

    def border(turns: float) -> float:
        """The pair (as a fraction) that turns so often within the original context."""
        wavelength = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(border(scaling["beta_fast"])), 0)
    high = min(math.ceil(border(scaling["beta_slow"])), dim - 1)
    for i in range(dim // 2):
        slowed = min(max((i - low) / max(high - low, 0.001), 0), 1)
        frequencies[i] *= slowed / scaling["factor"] + 1 - slowed
    return frequencies


def rotate(x: Array, angles: Array) -> Array:
    """Turn the interleaved pairs at the end of the last dimension, each as one complex number."""
    first = x.shape[-1] - 2 * len(angles)
    turned = (x[..., first::2] + 1j * x[..., first + 1 :: 2]) * np.exp(1j * angles)
    y = x.copy()
    y[..., first::2], y[..., first + 1 :: 2] = turned.real, turned.imag
    return y


class Compressor:
    """Makes one entry of every `ratio` tokens, out of these and (CSA) the same number before them."""

    def __init__(self, model: NumpyV4, prefix: str, ratio: int, overlap: bool) -> None:
        self.model, self.prefix, self.ratio, self.overlap = model, prefix, ratio, overlap
        self.entries: list[Array] = []
        self.open: list[tuple[Array, Array]] = []
        self.previous: list[tuple[Array, Array]] = []

    def feed(self, x: Array, t: int) -> None:
        w = self.model.weights
        score = w[f"{self.prefix}.wgate.weight"] @ x + w[f"{self.prefix}.ape"][t % self.ratio]
        self.open.append((w[f"{self.prefix}.wkv.weight"] @ x, score))
        if len(self.open) < self.ratio:
            return
        norm = w[f"{self.prefix}.norm.weight"]
        rows = self.open
        if self.overlap:
            d = len(norm)
            rows = [(kv[:d], s[:d]) for kv, s in self.previous] + [(kv[d:], s[d:]) for kv, s in self.open]
        share = softmax(np.stack([s for _, s in rows]))
        pooled = sum(p * kv for p, (kv, _) in zip(share, rows, strict=True))
        first = t + 1 - self.ratio
        self.entries.append(rotate(rms(pooled, norm, self.model.eps), first * self.model.compressed_angles))
        self.previous, self.open = self.open, []


class Attention:
    """One layer's attention and what it remembers."""

    def __init__(self, model: NumpyV4, layer: int) -> None:
        self.model, self.prefix = model, f"layers.{layer}.attn"
        config = model.config
        kind = config["layer_types"][layer]
        self.angles = model.plain_angles if kind == SLIDING else model.compressed_angles
        self.window: deque[Array] = deque(maxlen=config["sliding_window"])
        self.entries = self.keys = None
        if kind != SLIDING:
            ratio = config["compress_rates"][kind]
            self.entries = Compressor(model, f"{self.prefix}.compressor", ratio, kind == CSA)
        if kind == CSA:
            self.keys = Compressor(model, f"{self.prefix}.indexer.compressor", ratio, True)

    def weight(self, name: str) -> Array:
        return self.model.weights[f"{self.prefix}.{name}"]

    def __call__(self, x: Array, t: int) -> Array:
        config, eps = self.model.config, self.model.eps
        latent = rms(self.weight("wq_a.weight") @ x, self.weight("q_norm.weight"), eps)
        q = (self.weight("wq_b.weight") @ latent).reshape(config["num_attention_heads"], config["head_dim"])
        q = rotate(rms(q, 1.0, eps), t * self.angles)
        kv = rms(self.weight("wkv.weight") @ x, self.weight("kv_norm.weight"), eps)
        self.window.append(rotate(kv, t * self.angles))
        rows = np.stack([*self.window, *self.chosen(x, latent, t)])
        outputs = [self.attend(head, rows, sink) for head, sink in zip(q, self.weight("attn_sink"), strict=True)]
        return self.project(rotate(np.stack(outputs), -t * self.angles))

    def chosen(self, x: Array, latent: Array, t: int) -> list[Array]:
        """The compressed entries this token attends to; those that close with it included."""
        if self.entries is None:
            return []
        self.entries.feed(x, t)
        if self.keys is None:
            return self.entries.entries
        self.keys.feed(x, t)
        config = self.model.config
        heads, dim, top_k = config["index_n_heads"], config["index_head_dim"], config["index_topk"]
        q = rotate((self.weight("indexer.wq_b.weight") @ latent).reshape(heads, dim), t * self.angles)
        weights = self.weight("indexer.weights_proj.weight") @ x / math.sqrt(dim * heads)
        scores = [float(weights @ np.maximum(q @ key, 0)) for key in self.keys.entries]
        best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
        return [self.entries.entries[e] for e in best]

    @staticmethod
    def attend(q: Array, rows: Array, sink: float) -> Array:
        """The sink takes part in the softmax and brings nothing."""
        share = softmax(np.append(rows @ q / math.sqrt(len(q)), sink))
        return share[:-1] @ rows

    def project(self, outputs: Array) -> Array:
        """Heads in groups, each group through its own rows of wo_a, all of them through wo_b."""
        groups = self.model.config["o_groups"]
        matrices = np.split(self.weight("wo_a.weight"), groups)
        parts = [m @ o.ravel() for m, o in zip(matrices, np.split(outputs, groups), strict=True)]
        return self.weight("wo_b.weight") @ np.concatenate(parts)


class NumpyV4:
    """config: config.json in the form with layer_types and compress_rates. weights: by published name."""

    def __init__(self, config: Config, weights: Mapping[str, Any]) -> None:
        self.config = config
        self.weights = {n: np.asarray(w, None if "tid2eid" in n else np.float64) for n, w in weights.items()}
        self.eps = config["rms_norm_eps"]
        dim = config["qk_rope_head_dim"]
        self.plain_angles = yarn(dim, config["rope_theta"], None)
        self.compressed_angles = yarn(dim, config["compress_rope_theta"], config["rope_scaling"])
        self.attentions = [Attention(self, i) for i in range(len(config["layer_types"]))]
        self.length = 0

    def next(self, token: int) -> Array:
        """Take one token; returns the logits of the one after it."""
        w = self.weights
        streams = np.stack([w["embed.weight"][token]] * self.config["hc_mult"])
        for i, attention in enumerate(self.attentions):
            x, finish = self.hyper(streams, f"layers.{i}", "attn")
            streams = finish(attention(x, self.length))
            x, finish = self.hyper(streams, f"layers.{i}", "ffn")
            streams = finish(self.experts(x, f"layers.{i}.ffn", token, i))
        self.length += 1
        mix = w["hc_head_scale"] * self.mixed(streams, w["hc_head_fn"]) + w["hc_head_base"]
        hidden = (sigmoid(mix) + self.config["hc_eps"]) @ streams
        return w["head.weight"] @ rms(hidden, w["norm.weight"], self.eps)

    def mixed(self, streams: Array, fn: Array) -> Array:
        return fn @ rms(streams.ravel(), 1.0, self.eps)

    def hyper(self, streams: Array, prefix: str, site: str) -> tuple[Array, Any]:
        """The sublayer's normed input, and a function from its output to the new streams."""
        fn, base, scale = (self.weights[f"{prefix}.hc_{site}_{part}"] for part in ("fn", "base", "scale"))
        s, eps, mix = len(streams), self.config["hc_eps"], self.mixed(streams, fn)
        pre = sigmoid(scale[0] * mix[:s] + base[:s]) + eps
        post = 2 * sigmoid(scale[1] * mix[s : 2 * s] + base[s : 2 * s])
        comb = softmax((scale[2] * mix[2 * s :] + base[2 * s :]).reshape(s, s).T).T + eps
        comb = comb / (comb.sum(0) + eps)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(1)[:, None] + eps)
            comb = comb / (comb.sum(0) + eps)
        x = rms(pre @ streams, self.weights[f"{prefix}.{site}_norm.weight"], self.eps)
        return x, lambda y: np.stack([post[k] * y + comb[:, k] @ streams for k in range(s)])

    def experts(self, x: Array, prefix: str, token: int, layer: int) -> Array:
        """Routed experts by token id in the first layers and by score in the others, and the shared expert."""
        config, w = self.config, self.weights
        scores = np.sqrt(np.logaddexp(0, w[f"{prefix}.gate.weight"] @ x))
        if layer < config["num_hash_layers"]:
            ids = [int(e) for e in w[f"{prefix}.gate.tid2eid"][token]]
        else:
            biased = scores + w[f"{prefix}.gate.bias"]
            ids = sorted(range(len(scores)), key=lambda e: (-biased[e], e))[: config["num_experts_per_tok"]]
        total = sum(scores[e] for e in ids)
        y = self.expert(x, f"{prefix}.shared_experts")
        for e in ids:
            y = y + config["routed_scaling_factor"] * scores[e] / total * self.expert(x, f"{prefix}.experts.{e}")
        return y

    def expert(self, x: Array, prefix: str) -> Array:
        w, limit = self.weights, self.config["swiglu_limit"]
        gate = np.minimum(w[f"{prefix}.w1.weight"] @ x, limit)
        up = np.clip(w[f"{prefix}.w3.weight"] @ x, -limit, limit)
        return w[f"{prefix}.w2.weight"] @ (gate * sigmoid(gate) * up)
