"""V4 attention: one shared latent per token, a sliding window, compressed entries, sinks, grouped output projection.

The same code serves sliding (no compressor), HCA (all entries) and CSA (entries chosen by the indexer) layers.
Rows of all sequences are projected together; only the attention itself goes sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe import ops
from localmoe.cache import LayerState
from localmoe.kernels.native import Library
from localmoe.kernels.triton.depth import Depth
from localmoe.layers.compressor import Compressor, Indexer, IndexerRows, Selection, hide, quantize_latent, visible
from localmoe.layers.rotary import Rotation
from localmoe.step import Places, Span, Step, joined
from localmoe.step_size import ATTENTION_TOKENS, query_block, scored_heads
from localmoe.weights import Weight, grouped_linear, linear


@dataclass(frozen=True)
class SparseAttention:
    """Weights of one layer's attention; see deepseek_v4.py for the checkpoint names and shapes."""

    wq_a: Weight
    q_norm: Tensor
    wq_b: Weight
    wkv: Weight
    kv_norm: Tensor
    wo_a: Weight
    wo_b: Weight
    sink: Tensor
    compressor: Compressor | None
    indexer: Indexer | None
    num_heads: int
    head_dim: int
    rope_dim: int
    o_groups: int
    window: int
    eps: float
    quantize_kv: bool
    library: Library | ops.DeviceOps | None = None
    # Of the norm of the queries' latent: only in fast mode, for its bits are not those of torch.
    norm_library: Library | ops.DeviceOps | None = None

    def __call__(self, x: Tensor, step: Step, states: list[LayerState], turn: Rotation) -> Tensor:
        """x [T, D] normed hidden -> [T, D]. states: this layer's state of each span; they are advanced."""
        # What carries over from one part to the next has no gradient.
        size = len(x) if torch.is_grad_enabled() else ATTENTION_TOKENS
        done = []
        for rows, pieces in step.parts(size):
            spans = [(piece, states[i]) for i, piece in pieces]
            places = None if step.places is None else step.places.rows(rows)
            done.append(self._part(x[rows], step.positions[rows], spans, turn.rows(rows), places))
        return joined(done)

    def _part(
        self, x: Tensor, positions: Tensor, spans: list[tuple[Span, LayerState]], turn: Rotation, places: Places | None
    ) -> Tensor:  # fmt: skip
        """So many rows that their queries do not take too much memory."""
        q_latent = ops.rms_norm(linear(x, self.wq_a), self.q_norm, self.eps, library=self.norm_library)
        q = linear(q_latent, self.wq_b).unflatten(-1, (self.num_heads, self.head_dim))
        q = turn.norm_apply(q, None, self.eps)
        kv = turn.norm_apply(linear(x, self.wkv), self.kv_norm, self.eps)
        if self.quantize_kv:
            kv = quantize_latent(kv, self.rope_dim)
        rows = self.compressor.rows(x, positions) if self.compressor else None
        index = self.indexer.project(x, q_latent, turn, positions) if self.indexer else None
        if places is None:
            out = [self._attend(q, kv, rows, index, span, state) for span, state in spans]
        else:
            out = [self._attend_one(q, kv, rows, index, span, state, places) for span, state in spans]
        o = turn.undo(joined(out)).flatten(1).unflatten(1, (self.o_groups, -1))
        return linear(grouped_linear(o, self.wo_a), self.wo_b)

    def _attend(
        self,
        q: Tensor,
        kv: Tensor,
        rows: tuple[Tensor, Tensor] | None,
        index: IndexerRows | None,
        span: Span,
        state: LayerState,
    ) -> Tensor:
        """One sequence: extend its state, then its queries in blocks. Returns [n, H, c]."""
        start = span.position
        keys, first = state.window.extend(kv[span.rows], start)
        entries, index_keys = self._extend_entries(kv, rows, index, span, state)
        if span.stop - span.start == 1 and not torch.is_grad_enabled():
            # The last token sees its whole window and every entry.
            chosen = self._choose(index, span.rows, None, entries, index_keys)
            return ops.sparse_attention(
                q[span.rows], keys, None, chosen.entries, chosen.bias, self.sink, library=self.library
            )
        out = []
        size = self._block_size(len(entries))
        for at in range(span.start, span.stop, size):
            block = slice(at, min(at + size, span.stop))
            begin, end = block.start - span.start + start, block.stop - span.start + start
            positions = torch.arange(begin, end, device=q.device)
            chosen = self._choose(index, block, positions, entries, index_keys)
            lowest = max(begin - self.window + 1, 0)
            near = keys[lowest - first : end - first]
            distance = positions[:, None] - torch.arange(lowest, end, device=q.device)
            # A single query sees every row of its window.
            mask = (distance >= 0) & (distance < self.window) if end > begin + 1 else None
            entries_of = (chosen.entries, chosen.bias)
            out.append(ops.sparse_attention(q[block], near, mask, *entries_of, self.sink, library=self.library))
        return torch.cat(out)

    def _attend_one(
        self,
        q: Tensor,
        kv: Tensor,
        rows: tuple[Tensor, Tensor] | None,
        index: IndexerRows | None,
        span: Span,
        state: LayerState,
        places: Places,
    ) -> Tensor:
        """The same for one token whose position the device reads: see Step.places. Of the position itself, only
        whether there are more entries than are chosen changes what is launched."""
        one, at, library = span.rows, places.rows(span.rows), self.library
        assert at.slots is not None and library is not None and not isinstance(library, Library), "on a device"
        ring = state.window.put(kv[one], at.slots)
        depth, entries = Depth(at.positions, 0), kv.new_empty(0, self.head_dim)
        if self.compressor is not None and rows is not None and state.entries is not None:
            m = len(self.compressor.ape)
            depth, turn = Depth(at.positions, m), at.turns[m]
            entries = self.compressor.append(rows[0][one], rows[1][one], state.entries, depth, turn)
            if self.indexer is not None and index is not None and state.index is not None:
                keys = self.indexer.compressor.append(index.kv[one], index.score[one], state.index, depth, turn)
                if (span.position + 1) // m > self.indexer.top_k:
                    scores = library.index_scores(index.q[one], keys, index.weights[one], depth=depth)
                    entries, depth = entries[ops.select_top(scores, self.indexer.top_k)], Depth(at.positions, 0)
        return library.sparse_attention(q[one], ring, None, entries, None, self.sink, depth=depth)

    def _block_size(self, entries: int) -> int:
        if self.indexer is None:
            return query_block(scored_heads(self.num_heads, None), entries)
        heads = scored_heads(self.num_heads, self.indexer.num_heads)
        return query_block(heads, entries, min(self.indexer.top_k, entries) * self.head_dim)

    def _extend_entries(
        self, kv: Tensor, rows: tuple[Tensor, Tensor] | None, index: IndexerRows | None, span: Span, state: LayerState
    ) -> tuple[Tensor, Tensor | None]:
        """All compressed entries [E, c] of a sequence and, in a CSA layer, their index keys [E, d]."""
        if self.compressor is None or rows is None or state.entries is None:
            return kv.new_empty(0, self.head_dim), None
        entries = self.compressor.entries(
            rows[0][span.rows], rows[1][span.rows], state.entries, span.position, quantize=self.quantize_kv
        )
        if self.indexer is None or index is None or state.index is None:
            return entries, None
        return entries, self.indexer.keys(index, span, state.index)

    def _choose(
        self,
        index: IndexerRows | None,
        block: slice,
        positions: Tensor | None,
        entries: Tensor,
        index_keys: Tensor | None,
    ) -> Selection:
        """positions: of the queries of the block; None for one that sees all entries."""
        if self.compressor is None:
            return Selection(entries, None)
        seen = None if positions is None else visible(len(entries), positions, len(self.compressor.ape))
        if self.indexer is None or index is None or index_keys is None:
            return Selection(entries, None if seen is None else hide(seen))
        return self.indexer.select(index, block, index_keys, entries, seen)
