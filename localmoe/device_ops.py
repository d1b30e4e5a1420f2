"""What a device's kernels promise to compute, whichever they are. Knows shapes; does not know how or on what."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from localmoe.kernels.triton.depth import Depth
from localmoe.kernels.triton.matrix import Matrix
from localmoe.kernels.triton.slab import Experts

# How a router's logits become scores.
Scoring = Literal["sqrtsoftplus", "sigmoid", "softmax"]


class DeviceOps(Protocol):
    """What layers on a device are computed with: ops as in localmoe.ops, products with weights, and hyper-connections
    in two calls. All take and return tensors on one device, and none waits for it. exact: products are of float32
    numbers."""

    @property
    def exact(self) -> bool: ...

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See reference.rms_norm."""
        ...

    def norm_rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """See localmoe.ops.norm_rope."""
        ...

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
        """See reference.sparse_attention. depth: how much of a window and of entries that are buffers is there, for
        one query."""
        ...

    def latent_attention(
        self, q: Tensor, cache: Tensor, seen: Tensor | None, *, width: int, scale: float, depth: Depth | None = None
    ) -> Tensor:
        """See reference.latent_attention. depth: as in sparse_attention."""
        ...

    def index_scores(self, q: Tensor, keys: Tensor, weights: Tensor, *, depth: Depth | None = None) -> Tensor:
        """See reference.index_scores. depth: as in sparse_attention; keys that are not there score -inf."""
        ...

    def append_entry(
        self, kv: Tensor, score: Tensor, opened: tuple[Tensor, Tensor], depth: Depth, norm: Tensor, eps: float,
        turn: tuple[Tensor, Tensor], pool: Tensor,
    ) -> None:  # fmt: skip
        """See reference_decode.append_entry."""
        ...

    def pool_windows(self, kv: Tensor, score: Tensor) -> Tensor:
        """See reference.pool_windows."""
        ...

    def pool_overlapping(self, kv: Tensor, score: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
        """See reference.pool_overlapping."""
        ...

    def hyper_enter(
        self, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, streams: Tensor, *,
        iterations: int, norm_eps: float, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """hyper_mix, hyper_collapse and rms_norm: streams [T, S, D] -> the sublayer's input [T, D], and post [T, S]
        and comb [T, S, S] float32 for hyper_leave."""
        ...

    def hyper_leave(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """See reference.hyper_expand."""
        ...

    def linear(
        self, x: Tensor, matrix: Matrix, groups: int = 1, *, exact: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """x [T, cols], or [T, groups, cols] for a block-diagonal matrix -> [T, rows] of a dtype, summed in float32.

        exact: multiply in float32."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See reference.swiglu."""
        ...

    def route(
        self, logits: Tensor, bias: Tensor | None, top_k: int, scale: float, *,
        normalize: bool, scoring: Scoring, groups: tuple[int, int, int] = (1, 1, 1), given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Expert ids [T, K] and weights [T, K] float32 of logits [T, E] float32, as layers.router has them.

        groups: how many, how many of them are kept, and of how many experts' scores the sum is taken to choose them.
        given [T, K]: the choice, if it is made already."""
        ...

    def experts(self, table: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert ids[t, k] (x[t]): [T, D], [T, K], [T, K] -> [T, D] float32."""
        ...
