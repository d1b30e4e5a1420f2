"""RMS norm and rotation of the last dimensions in one pass. Twin: reference.rms_norm, then reference.rope."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_rope(
    x, weight, cos, sin, out, per_token, width, pairs, eps,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_ROPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of [T * per_token, width]; the rotation of its token. BLOCK: half of the width, rounded up."""
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK)
    at = 2 * half
    # Neighbours, which a rotation turns together.
    even = tl.load(x + row * width + at, mask=at < width, other=0).to(tl.float32)
    odd = tl.load(x + row * width + at + 1, mask=at + 1 < width, other=0).to(tl.float32)
    if HAS_NORM:
        mean = (tl.sum(even * even, axis=0) + tl.sum(odd * odd, axis=0)) / width
        factor = tl.rsqrt(mean + eps)
        even, odd = even * factor, odd * factor
        if HAS_WEIGHT:
            even *= tl.load(weight + at, mask=at < width, other=0).to(tl.float32)
            odd *= tl.load(weight + at + 1, mask=at + 1 < width, other=0).to(tl.float32)
        # The twin rounds here.
        even, odd = even.to(out.dtype.element_ty).to(tl.float32), odd.to(out.dtype.element_ty).to(tl.float32)
    if HAS_ROPE:
        pair = half - (width // 2 - pairs)
        turned = (pair >= 0) & (pair < pairs)
        angle = row // per_token * pairs + pair
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        even, odd = even * c - odd * s, odd * c + even * s
    tl.store(out + row * width + at, even, mask=at < width)
    tl.store(out + row * width + at + 1, odd, mask=at + 1 < width)


def norm_rope(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, *, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x [T, ..., D]; cos, sin [T, P] float32, None for no rotation; eps None for no norm. Returns like x."""
    width = x.shape[-1]
    if cos is not None and width % 2:
        raise ValueError(f"{width} dimensions, expected an even number to rotate")
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    if rows:
        pairs = 0 if cos is None else cos.shape[-1]
        _norm_rope[(rows,)](
            x, x if weight is None else weight, x if cos is None else cos.contiguous(),
            x if sin is None else sin.contiguous(), out, rows // len(x), width, pairs, 0.0 if eps is None else eps,
            HAS_NORM=eps is not None, HAS_WEIGHT=weight is not None, HAS_ROPE=cos is not None,
            BLOCK=triton.next_power_of_2((width + 1) // 2),
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return norm_rope(x, None, None, weight=weight, eps=eps)
