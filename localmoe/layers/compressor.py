"""Compressors (one latent entry per m tokens) and the lightning indexer that chooses among entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe import ops
from localmoe.cache import Compressed
from localmoe.kernels.native import Library
from localmoe.kernels.triton.depth import Depth
from localmoe.layers.linear import Binds
from localmoe.layers.rotary import Rotation, rotation
from localmoe.step import Span
from localmoe.weights import Weight, linear, linear_float32


@dataclass(frozen=True)
class Compressor:
    """wkv, wgate [o * d, D]; ape [m, o * d] float32; norm [d]; o = 2 when windows overlap (CSA), else 1 (HCA)."""

    wkv: Weight
    wgate: Weight
    ape: Tensor
    norm: Tensor
    inv_freq: Tensor
    eps: float
    library: Library | ops.DeviceOps | None = None

    @classmethod
    def bind(
        cls, binder: Binds, prefix: str, inv_freq: Tensor, eps: float, library: Library | ops.DeviceOps | None
    ) -> Compressor:
        wkv, wgate = binder.matrix(f"{prefix}.wkv.weight"), binder.matrix(f"{prefix}.wgate.weight")
        ape, norm = binder.tensor(f"{prefix}.ape"), binder.tensor(f"{prefix}.norm.weight")
        return cls(wkv, wgate, ape, norm, inv_freq, eps, library)

    def rows(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Raw kv and score rows [T, o * d] float32 of every token of a step; the score carries its position's bias."""
        score = linear_float32(x, self.wgate) + self.ape[positions % len(self.ape)]
        return linear_float32(x, self.wkv), score

    def entries(self, kv: Tensor, score: Tensor, state: Compressed, position: int, *, quantize: bool) -> Tensor:
        """Feed one sequence's rows and return all of its entries [E, d], those closed by these rows included.

        An entry takes the rotation of its window's first token. quantize rounds the unrotated part to FP8."""
        closed = state.open.extend(kv, score, position)
        if closed is None:
            return state.pool.extend(None)
        dtype = state.pool.buffer.dtype
        overlap = state.open.overlap
        pooled = (
            ops.pool_overlapping(closed.kv, closed.score, closed.previous, library=self.library)
            if overlap
            else ops.pool_windows(closed.kv, closed.score, library=self.library)
        )
        new = ops.rms_norm(pooled.to(dtype), self.norm, self.eps)
        first = torch.arange(closed.first, closed.first + len(new), device=new.device) * state.open.ratio
        new = rotation(first, self.inv_freq).apply(new)
        return state.pool.extend(quantize_latent(new, 2 * len(self.inv_freq)) if quantize else new)

    def append(self, kv: Tensor, score: Tensor, state: Compressed, depth: Depth, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Feed one token's rows [1, o * d] on a device that knows its position; returns the buffer of entries.

        turn: cos, sin [1, P] of the first position of the token's window."""
        assert self.library is not None and not isinstance(self.library, Library), "on a device"
        state.pool.reserve(1)
        opened, pool = (state.open.kv, state.open.score), state.pool.buffer
        self.library.append_entry(kv, score, opened, depth, self.norm, self.eps, turn, pool)
        return pool


def quantize_latent(x: Tensor, rope_dim: int) -> Tensor:
    """FP8-round what the official cache stores in FP8: all but the rotated dimensions, in blocks of 64."""
    return torch.cat((ops.fake_quant_fp8(x[..., :-rope_dim], 64), x[..., -rope_dim:]), dim=-1)


@dataclass(frozen=True)
class Selection:
    """Which entries each of n queries attends to. bias [n, E] float32 hides the rest; None = all visible.

    entries is [E, c] shared by the queries, or [n, K, c] gathered for each."""

    entries: Tensor
    bias: Tensor | None


def visible(entries: int, positions: Tensor, ratio: int) -> Tensor:
    """[n, entries] bool: an entry is seen by the queries at or after its window's last token."""
    return torch.arange(entries, device=positions.device)[None] < ((positions + 1) // ratio)[:, None]


def hide(seen: Tensor) -> Tensor:
    """Additive mask: 0 where seen, -inf elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))


@dataclass(frozen=True)
class Indexer:
    """wq_b [H * d, q_lora], weights_proj [H, D] and the compressor of its keys."""

    wq_b: Weight
    weights_proj: Weight
    compressor: Compressor
    num_heads: int
    head_dim: int
    top_k: int

    def project(self, x: Tensor, q_latent: Tensor, turn: Rotation, positions: Tensor) -> IndexerRows:
        """Everything that does not depend on a sequence, for all rows at once.

        Gradients stop here: in training the indexer learns to choose, the layers below do not learn to be chosen."""
        x, q_latent = x.detach(), q_latent.detach()
        q = turn.apply(linear(q_latent, self.wq_b).unflatten(-1, (self.num_heads, self.head_dim)))
        weights = linear(x, self.weights_proj).float() * (self.head_dim * self.num_heads) ** -0.5
        return IndexerRows(q, weights, *self.compressor.rows(x, positions))

    def keys(self, rows: IndexerRows, span: Span, state: Compressed) -> Tensor:
        """Extend one sequence's index keys; all of them, [E, d]."""
        return self.compressor.entries(rows.kv[span.rows], rows.score[span.rows], state, span.position, quantize=False)

    def select(self, rows: IndexerRows, block: slice, keys: Tensor, entries: Tensor, seen: Tensor | None) -> Selection:
        """The top_k visible entries of each query in `block`; seen [n, E] bool, None for all."""
        if len(entries) <= self.top_k:
            return Selection(entries, None if seen is None else hide(seen))
        scores = ops.index_scores(rows.q[block], keys, rows.weights[block], library=self.compressor.library)
        if seen is None:
            return Selection(entries[ops.select_top(scores, self.top_k)], None)
        chosen = ops.select_top(scores.detach().masked_fill(~seen, float("-inf")), self.top_k)
        if torch.is_grad_enabled():
            # Training: the indexer learns from the attention's own gradient with respect to each chosen score
            # (a value of zero, so the forward is the same).
            kept = torch.zeros_like(seen).scatter(1, chosen, True) & seen
            return Selection(entries, hide(kept) + (scores - scores.detach()))
        return Selection(entries[chosen], hide(seen.gather(1, chosen)))


@dataclass(frozen=True)
class IndexerRows:
    """q [T, H, d] rotated, weights [T, H] scaled, and raw key rows kv, score [T, 2d], for all rows of a step."""

    q: Tensor
    weights: Tensor
    kv: Tensor
    score: Tensor
