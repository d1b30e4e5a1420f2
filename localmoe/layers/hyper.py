"""Manifold-constrained hyper-connections: the residual as S streams, mixed around every sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from localmoe import ops
from localmoe.kernels.native import HyperSite, Library


@dataclass(frozen=True)
class HyperConnection:
    """One site: collapse the streams, run the sublayer on its norm, spread the result."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor
    iterations: int
    norm_eps: float
    eps: float
    library: Library | ops.DeviceOps | None = None

    @cached_property
    def _native(self) -> HyperSite | None:
        """This site for the C++ kernels, if they are to be used and can."""
        if not isinstance(self.library, Library):
            return None
        return HyperSite.of(
            self.fn, self.base, self.scale, self.norm, iterations=self.iterations, norm_eps=self.norm_eps, eps=self.eps
        )

    def __call__(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """streams [T, S, D] -> [T, S, D]; sublayer maps [T, D] to [T, D]."""
        x, post, comb = self._enter(streams)
        y, library = sublayer(x), self._library_for(streams)
        leave = ops.hyper_expand if library is None else library.hyper_leave
        return leave(streams, y, post, comb)

    def enter(self, streams: Tensor) -> Tensor:
        """What the sublayer would be given: streams [T, S, D] -> [T, D]."""
        return self._enter(streams)[0]

    def _library_for(self, streams: Tensor) -> Library | ops.DeviceOps | None:
        """What computes this: the C++ kernels, if they can, or those of a device."""
        if isinstance(self.library, Library) and (self._native is None or streams.dtype != torch.float32):
            return None
        return self.library

    def _enter(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        library = self._library_for(streams)
        if isinstance(library, Library) and self._native is not None:
            return library.hyper_enter(self._native, streams)
        weights, n, norm_eps, eps = (self.fn, self.base, self.scale), self.iterations, self.norm_eps, self.eps
        if library is not None and not isinstance(library, Library):
            return library.hyper_enter(*weights, self.norm, streams, iterations=n, norm_eps=norm_eps, eps=eps)
        pre, post, comb = ops.hyper_mix(streams, *weights, iterations=n, norm_eps=norm_eps, eps=eps)
        return ops.rms_norm(ops.hyper_collapse(streams, pre), self.norm, self.norm_eps), post, comb


@dataclass(frozen=True)
class HyperHead:
    """The last collapse, before the final norm."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm_eps: float
    eps: float
    strict: bool

    @classmethod
    def bind(cls, get: Callable[[str], Tensor], norm_eps: float, eps: float, *, strict: bool) -> HyperHead:
        """strict: the same bits for a token whatever others there are."""
        fn, base, scale = (get(f"hc_head_{part}") for part in ("fn", "base", "scale"))
        return cls(fn, base, scale, norm_eps, eps, strict)

    def __call__(self, streams: Tensor) -> Tensor:
        # torch's products add up in another order for other numbers of rows.
        parts = streams.split(1) if self.strict else (streams,)
        heads = [
            ops.hyper_head(part, self.fn, self.base, self.scale, norm_eps=self.norm_eps, eps=self.eps) for part in parts
        ]
        return torch.cat(heads)
