"""Multi-head latent attention (DeepSeek-V2 and -V3), and the index of V3.2 that picks tokens for it.

The cache holds one latent and one rotated key for each token, shared by all heads. Few queries use it as it is, with
the up-projections absorbed into them; many make keys and values from it again, which costs less for each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe import ops
from localmoe.cache import LatentState
from localmoe.kernels.native import Library
from localmoe.kernels.triton.depth import Depth
from localmoe.layers.rotary import Rotation
from localmoe.step import Places, Span, Step, joined
from localmoe.step_size import ATTENTION_TOKENS, KEY_BLOCK, query_block, scored_heads
from localmoe.weights import See, Weight, grouped_linear, linear

_INDEX_EPS = 1e-6


@dataclass(frozen=True)
class UpProjection:
    """both: kv_b_proj [H * (dn + dv), R], for the expanded form. For the absorbed one, block-diagonal over heads:
    keys [H * R, dn], transposed, and values [H * dv, R]. see: is shown the latent [T, R] of each token once, which one
    form multiplies with kv_b_proj again in each step, and the other never."""

    both: Weight
    keys: Weight
    values: Weight
    see: See | None


@dataclass(frozen=True)
class TokenIndex:
    """wq_b [H * d, q_lora], wk [d, D], weights_proj [H, D], a layer norm of the keys; rotates its first dimensions."""

    wq_b: Weight
    wk: Weight
    norm: Tensor
    bias: Tensor
    weights_proj: Weight
    num_heads: int
    head_dim: int
    top_k: int

    def project(self, x: Tensor, q_latent: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], weights [T, H] and keys [T, d] of all rows of a step."""
        q = linear(q_latent, self.wq_b).unflatten(-1, (self.num_heads, self.head_dim))
        weights = linear(x, self.weights_proj).float() * (self.head_dim * self.num_heads) ** -0.5
        key = F.layer_norm(linear(x, self.wk).float(), (self.head_dim,), self.norm, self.bias, _INDEX_EPS).to(x.dtype)
        return ops.half_rope(q, turn.cos, turn.sin), weights, ops.half_rope(key, turn.cos, turn.sin)


@dataclass(frozen=True)
class LatentAttention:
    """Weights of one layer's attention. q_a, q_norm: None where queries come from the hidden state directly."""

    q_a: Weight | None
    q_norm: Tensor | None
    q_b: Weight
    kv_a: Weight
    kv_norm: Tensor
    up: UpProjection
    out: Weight
    index: TokenIndex | None
    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    eps: float
    scale: float
    # Queries of a sequence from which on the expanded form is used.
    expand_from: int
    # What computes that form with rounded numbers; None: torch.
    fast_library: Library | ops.DeviceOps | None

    def __call__(self, x: Tensor, step: Step, states: list[LatentState], turn: Rotation) -> Tensor:
        """x [T, D] normed hidden -> [T, D]. states: this layer's state of each span; they are advanced."""
        if x.shape[0] <= ATTENTION_TOKENS:
            return self._part(x, list(zip(step.spans, states, strict=True)), turn, step.places)
        done = []
        for rows, pieces in step.parts(ATTENTION_TOKENS):
            places = None if step.places is None else step.places.rows(rows)
            done.append(self._part(x[rows], [(piece, states[i]) for i, piece in pieces], turn.rows(rows), places))
        return torch.cat(done)

    def _part(
        self, x: Tensor, spans: list[tuple[Span, LatentState]], turn: Rotation, places: Places | None
    ) -> Tensor:  # fmt: skip
        """So many rows that their queries do not take too much memory."""
        latent = x
        if self.q_a is not None:
            latent = ops.rms_norm(linear(x, self.q_a), self.q_norm, self.eps, library=turn.library)
        q = turn.apply(linear(latent, self.q_b).unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim)))
        kv = linear(x, self.kv_a)
        row = ops.rms_norm(kv[:, : self.kv_rank], self.kv_norm, self.eps, library=turn.library)
        if self.up.see is not None:
            self.up.see(row)
        row = turn.apply(torch.cat((row, kv[:, self.kv_rank :]), dim=-1))
        index = self.index.project(x, latent, turn) if self.index else None
        if places is None:
            attended = [self._attend(q, row, index, span, state, turn.library) for span, state in spans]
        else:
            attended = [self._attend_one(q, row, index, span, state, places, turn.library) for span, state in spans]
        return linear(joined(attended), self.out)

    def _attend(
        self,
        q: Tensor,
        row: Tensor,
        index: tuple[Tensor, Tensor, Tensor] | None,
        span: Span,
        state: LatentState,
        library: Library | ops.DeviceOps | None,
    ) -> Tensor:
        """One sequence: extend its state, then its queries. Returns [n, H * dv]."""
        queries, cache = q[span.rows], state.latents.extend(row[span.rows])
        keys = None
        if index is not None and state.index is not None:
            keys = state.index.extend(index[2][span.rows])
        count, depth = queries.shape[0], cache.shape[0]  # not len(), which costs a microsecond
        picks = self.index is not None and depth > self.index.top_k
        if count >= self.expand_from and not picks:
            return ops.expanded_attention(
                queries, cache, self._expand,
                width=self.kv_rank, first=span.position, scale=self.scale, block=KEY_BLOCK, library=self.fast_library,
            ).flatten(1)  # fmt: skip
        absorbed = self._absorbed(queries)
        size = self._block_size(depth)
        found = []
        for at in range(0, count, size):
            block = slice(at, min(at + size, count))
            seen = None
            if count > 1:
                positions = torch.arange(block.start, block.stop, device=q.device) + span.position
                seen = torch.arange(depth, device=q.device) <= positions[:, None]
            rows = cache
            if picks and self.index is not None and index is not None and keys is not None:
                of_block = slice(span.start + block.start, span.start + block.stop)
                rows, seen = self._picked(self.index, index, of_block, keys, cache, seen, library)
            found.append(
                ops.latent_attention(absorbed[block], rows, seen, width=self.kv_rank, scale=self.scale, library=library)
            )
        return grouped_linear(joined(found), self.up.values)

    def _attend_one(
        self,
        q: Tensor,
        row: Tensor,
        index: tuple[Tensor, Tensor, Tensor] | None,
        span: Span,
        state: LatentState,
        places: Places,
        library: Library | ops.DeviceOps | None,
    ) -> Tensor:
        """The same for one token whose position the device reads: see Step.places. Of the position itself, only
        whether there are more tokens than are picked changes what is launched."""
        assert library is not None and not isinstance(library, Library), "on a device"
        one, at = span.rows, places.positions[span.rows]
        depth = Depth(at, 1)
        cache = state.latents.put(row[one], at)
        absorbed = self._absorbed(q[one])
        if self.index is not None and index is not None and state.index is not None:
            keys = state.index.put(index[2][one], at)
            if span.position + 1 > self.index.top_k:
                scores = library.index_scores(index[0][one], keys, index[1][one], depth=depth)
                cache = cache[ops.select_top(scores, self.index.top_k)]
        seen = depth if cache.dim() == 2 else None
        attended = library.latent_attention(absorbed, cache, None, width=self.kv_rank, scale=self.scale, depth=seen)
        return grouped_linear(attended, self.up.values)

    def _absorbed(self, queries: Tensor) -> Tensor:
        """[n, H, dn + dr] -> [n, H, R + dr], to be multiplied with the cache as it is."""
        rotated = queries[..., self.nope_dim :]
        absorbed = grouped_linear(queries[..., : self.nope_dim], self.up.keys).unflatten(-1, (self.num_heads, -1))
        return torch.cat((absorbed, rotated), dim=-1)

    def _expand(self, latents: Tensor) -> Tensor:
        """Keys and values of each head: [m, R] -> [m, H, dn + dv]."""
        expanded: Tensor = linear(latents.contiguous(), self.up.both).unflatten(-1, (self.num_heads, -1))
        return expanded

    def _block_size(self, rows: int) -> int:
        """Queries of the absorbed form that are attended to at once."""
        index = self.index
        if index is None or rows <= index.top_k:
            return query_block(scored_heads(self.num_heads, None), rows)
        chosen = index.top_k * (self.kv_rank + self.rope_dim)
        return query_block(scored_heads(self.num_heads, index.num_heads), rows, chosen)

    @staticmethod
    def _picked(
        chooser: TokenIndex,
        index: tuple[Tensor, Tensor, Tensor],
        block: slice,
        keys: Tensor,
        cache: Tensor,
        seen: Tensor | None,
        library: Library | ops.DeviceOps | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows [n, K, c] that each query of the block attends to, and which of them it may see."""
        scores = ops.index_scores(index[0][block], keys, index[1][block], library=library)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        chosen = ops.select_top(scores, chooser.top_k)
        return cache[chosen], None if seen is None else seen.gather(1, chosen)
