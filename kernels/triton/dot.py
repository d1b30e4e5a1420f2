"""Products on the matrix units. Called from within the other kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# The interpreter multiplies the bits of bfloat16 as integers (triton 3.9), so there it multiplies what they stand for.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def stages(*weights: Tensor, exact: bool) -> int:
    """Blocks of operands that are on their way at a time: fewer of those that take twice as much shared memory, because
    they are multiplied in float32 or stored so. The smallest GPUs have 99 KiB."""
    if exact:
        return 1
    return 2 if any(weight.element_size() > 2 for weight in weights) else 3


@triton.jit
def dot(a, b, sums, EXACT: tl.constexpr):
    """sums + a times b. EXACT: of float32 numbers; else rounded to bfloat16 and added up in float32."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    if _INTERPRETED:
        a, b = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
        return tl.dot(a, b, sums, input_precision="ieee")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
