"""The ops of a layer on a device: by the Triton kernels, and by torch what no kernel takes.

Names, arguments and results are those of localmoe.ops and its twins in reference.py. A launch goes to the device that
the tensors are on, whichever is the current one. Nothing here waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.kernels import reference
from localmoe.kernels.triton import attention, compress, hyper, indexer, norm_rope, router
from localmoe.kernels.triton import experts as moe
from localmoe.kernels.triton import linear as products
from localmoe.kernels.triton.depth import Depth
from localmoe.kernels.triton.matrix import Matrix
from localmoe.kernels.triton.router import Scoring
from localmoe.kernels.triton.slab import Experts

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Choice(Protocol):
    """Computes x times a matrix by another library's kernels, or by `ours`."""

    def __call__(self, x: Tensor, matrix: Matrix, ours: Callable[[], Tensor], /) -> Tensor: ...


@dataclass(frozen=True)
class TritonOps:
    """exact: multiply in float32, else in bfloat16 with float32 sums. One is enough for all devices. choice: who
    computes products with single matrices that need not be exact; None: our kernels."""

    exact: bool = False
    choice: Choice | None = None

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See reference.rms_norm."""
        if not _floats(x, weight):
            return reference.rms_norm(x, weight, eps)
        with _on(x):
            return norm_rope.rms_norm(x, weight, eps)

    def norm_rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """reference.rms_norm(x, weight, eps), left out where eps is None, then reference.rope(..., cos, sin)."""
        angles = cos.dtype == sin.dtype == torch.float32 and len(cos) == len(x)
        if x.shape[-1] % 2 or not angles or not _floats(x, weight):
            return reference.rope(x if eps is None else reference.rms_norm(x, weight, eps), cos, sin)
        with _on(x):
            return norm_rope.norm_rope(x, cos, sin, weight=weight, eps=eps)

    def sparse_attention(
        self,
        q: Tensor,
        window: Tensor,
        window_mask: Tensor | None,
        entries: Tensor,
        entry_bias: Tensor | None,
        sink: Tensor,
        *,
        depth: Depth | None = None,
    ) -> Tensor:
        """See reference.sparse_attention. depth: what one query sees of window and entries, which are buffers then."""
        parts = q, window, window_mask, entries, entry_bias, sink
        if depth is None and (window.dtype != entries.dtype or not _floats(q, window, entry_bias, sink)):
            return reference.sparse_attention(*parts)
        with _on(q):
            return attention.sparse_attention(*parts, exact=self.exact, depth=depth)

    def latent_attention(
        self, q: Tensor, cache: Tensor, seen: Tensor | None, *, width: int, scale: float, depth: Depth | None = None
    ) -> Tensor:
        """See reference.latent_attention. depth: as in sparse_attention."""
        if depth is None and not _floats(q, cache):
            return reference.latent_attention(q, cache, seen, width=width, scale=scale)
        with _on(q):
            return attention.latent_attention(q, cache, seen, width=width, scale=scale, exact=self.exact, depth=depth)

    def hyper_enter(
        self, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, streams: Tensor, *,
        iterations: int, norm_eps: float, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """reference.hyper_mix, hyper_collapse and rms_norm: streams [T, S, D] -> the sublayer's input [T, D], and post
        [T, S] and comb [T, S, S] float32 for hyper_leave."""
        weights = fn, base, scale
        exact = all(weight.dtype == torch.float32 for weight in weights)
        if exact and _power_of_two(streams.shape[1]) and _floats(streams, norm):
            with _on(streams):
                return hyper.hyper_enter(streams, *weights, norm, iterations=iterations, norm_eps=norm_eps, eps=eps)
        pre, post, comb = reference.hyper_mix(streams, *weights, iterations=iterations, norm_eps=norm_eps, eps=eps)
        return reference.rms_norm(reference.hyper_collapse(streams, pre), norm, norm_eps), post, comb

    def hyper_leave(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """See reference.hyper_expand."""
        if not _power_of_two(streams.shape[1]) or not _floats(streams, y, post, comb):
            return reference.hyper_expand(streams, y, post, comb)
        with _on(streams):
            return hyper.hyper_expand(streams, y, post, comb)

    def index_scores(self, q: Tensor, keys: Tensor, weights: Tensor, *, depth: Depth | None = None) -> Tensor:
        """See reference.index_scores. depth: of one query, how many of the keys are there; others score -inf."""
        if depth is None and not _floats(q, keys, weights):
            return reference.index_scores(q, keys, weights)
        with _on(q):
            return indexer.index_scores(q, keys, weights, exact=self.exact, depth=depth)

    def append_entry(
        self, kv: Tensor, score: Tensor, opened: tuple[Tensor, Tensor], depth: Depth, norm: Tensor, eps: float,
        turn: tuple[Tensor, Tensor], pool: Tensor,
    ) -> None:  # fmt: skip
        """See reference_decode.append_entry."""
        with _on(pool):
            compress.append_entry(kv, score, opened, depth, norm, eps, turn, pool)

    def pool_windows(self, kv: Tensor, score: Tensor) -> Tensor:
        """See reference.pool_windows."""
        if kv.dtype != torch.float32 or score.dtype != torch.float32:
            return reference.pool_windows(kv, score)
        with _on(kv):
            return indexer.pool_windows(kv, score)

    def pool_overlapping(self, kv: Tensor, score: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
        """See reference.pool_overlapping."""
        return self.pool_windows(*reference.overlapping(kv, score, previous))

    def linear(
        self, x: Tensor, matrix: Matrix, groups: int = 1, *, exact: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """x [T, cols], or [T, groups, cols] for a block-diagonal matrix -> [T, rows] of a dtype, summed in float32.

        exact: in float32 whatever is the rule here."""
        exact = exact or self.exact
        with _on(x):
            if self.choice is None or exact or groups > 1:
                return products.linear(x, matrix, groups, exact=exact, dtype=dtype)
            return self.choice(x, matrix, lambda: products.linear(x, matrix, dtype=dtype)).to(dtype)

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See reference.swiglu."""
        if not _floats(gate, up):
            return reference.swiglu(gate, up, limit)
        with _on(gate):
            return products.swiglu(gate, up, limit)

    def route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        top_k: int,
        scale: float,
        *,
        normalize: bool,
        scoring: Scoring,
        groups: tuple[int, int, int] = (1, 1, 1),
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K] and weights [T, K] float32 of logits [T, E] float32: see DeviceOps.route."""
        with _on(logits):
            return router.route(
                logits, bias, top_k, scale, normalize=normalize, scoring=scoring, groups=groups, given=given
            )

    def experts(self, table: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert ids[t, k] (x[t]): [T, D], [T, K], [T, K] -> [T, D] float32."""
        with _on(x):
            return moe.experts(table, x, ids, weights, exact=self.exact)


def _floats(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read them."""
    return all(tensor is None or tensor.dtype in _FLOATS for tensor in tensors)


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
