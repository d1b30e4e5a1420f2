"""Weights as layers use them: a plain tensor, a packed matrix for the torch path, or one bound to the C++ kernels or to
a device's; and any of these with somebody who is shown its inputs.

Which of them a model gets is decided once, when it is bound; from then on all answer linear(). Knows no names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.formats import QuantizedTensor
from localmoe.kernels import native
from localmoe.kernels.native import Library, Matrix, Mode
from localmoe.kernels.triton.matrix import FORMATS as DEVICE_FORMATS
from localmoe.kernels.triton.matrix import Matrix as DeviceMatrix
from localmoe.ops import DeviceOps

# Rows expanded to float32 at a time: a head of 129,280 bf16 rows would be 2 GB at once.
_EXPANDED_ROWS = 16_384


class _Bound:
    """What is the same of a [rows, cols] matrix whoever multiplies it."""

    matrix: Matrix | DeviceMatrix
    source: Tensor | QuantizedTensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.rows, self.matrix.cols

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


@dataclass(frozen=True)
class NativeWeight(_Bound):
    """A matrix in RAM, multiplied where it lies by the C++ kernels."""

    library: Library
    mode: Mode
    matrix: Matrix
    source: Tensor | QuantizedTensor

    def matmul(self, x: Tensor, groups: int = 1) -> Tensor:
        """x [T, cols], or [T, groups, cols] for a block-diagonal matrix -> [T, rows] in x's dtype."""
        return self.library.linear(x.float(), self.matrix, groups=groups, mode=self.mode).to(x.dtype)


@dataclass(frozen=True)
class DeviceWeight(_Bound):
    """A matrix on a device, multiplied where it lies by the device's kernels."""

    ops: DeviceOps
    matrix: DeviceMatrix
    source: Tensor | QuantizedTensor

    def matmul(self, x: Tensor, groups: int = 1) -> Tensor:
        """x [T, cols], or [T, groups, cols] for a block-diagonal matrix -> [T, rows] in x's dtype."""
        return self.ops.linear(x, self.matrix, groups, dtype=x.dtype)


# Is shown what a matrix is about to be multiplied with, [..., cols].
See = Callable[[Tensor], None]
# Who is shown the inputs of the matrix of a published name; None for nobody.
Observer = Callable[[str], See | None]


@dataclass(frozen=True)
class Observed:
    """A weight whose inputs are shown before each product. Kernels that compute whole experts do not take it."""

    weight: Tensor | QuantizedTensor | NativeWeight | DeviceWeight
    see: See


Weight = Tensor | QuantizedTensor | NativeWeight | DeviceWeight | Observed


def observed(weight: Weight, name: str, observer: Observer | None) -> Weight:
    """The weight as the observer wants it: as it is, or showing its inputs."""
    see = None if observer is None else observer(name)
    return weight if see is None or isinstance(weight, Observed) else Observed(weight, see)


def stored(weight: Weight) -> Tensor | QuantizedTensor:
    """What a weight is underneath."""
    weight = weight.weight if isinstance(weight, Observed) else weight
    return weight.source if isinstance(weight, (NativeWeight, DeviceWeight)) else weight


def bind_native(weight: Tensor | QuantizedTensor, library: Library, mode: Mode) -> NativeWeight:
    """Give a matrix to the kernels. Plain ones must be float32 or bfloat16; float32 is computed as such, always."""
    if isinstance(weight, Tensor):
        weight = weight.contiguous()
        exact: Mode = "strict" if weight.dtype == torch.float32 else mode
        return NativeWeight(library, exact, native.plain_matrix(weight), weight)
    fmt = weight.format
    matrix = native.matrix(fmt.packing, weight.shape, weight.data, weight.scale, zero=weight.zero, group=fmt.group)
    return NativeWeight(library, mode, matrix, weight)


def bind_device(weight: Tensor | QuantizedTensor, ops: DeviceOps) -> DeviceWeight | Tensor | QuantizedTensor:
    """Give a matrix to the kernels of the device that it is on; itself if they cannot read it, for torch to compute."""
    matrix = device_matrix(weight)
    if matrix is None:
        return weight
    return DeviceWeight(ops, matrix, matrix.data if isinstance(weight, Tensor) else weight)


def device_matrix(weight: Tensor | QuantizedTensor) -> DeviceMatrix | None:
    """A matrix as a device's kernels read it, there or not; None if it is stored as none of them knows."""
    if isinstance(weight, Tensor):
        known = weight.dim() == 2 and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return DeviceMatrix.of("plain", (weight.shape[0], weight.shape[1]), weight.contiguous()) if known else None
    fmt, zero = weight.format, weight.zero
    if fmt.packing not in DEVICE_FORMATS:
        return None
    parts = weight.data.contiguous(), weight.scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    return DeviceMatrix.of(fmt.packing, weight.shape, *parts, zero=zero, group=fmt.group)


def linear(x: Tensor, w: Weight) -> Tensor:
    """x [..., in] times w [out, in] transposed -> [..., out], in w's dtype if w is plain, in x's otherwise.

    For a NativeWeight and a DeviceWeight, x is [T, in]."""
    if isinstance(w, Tensor):
        return F.linear(x.to(w.dtype), w)
    if isinstance(w, QuantizedTensor):
        return F.linear(x, w.dequantize(x.dtype))
    if isinstance(w, (NativeWeight, DeviceWeight)):
        return w.matmul(x)
    w.see(x)
    return linear(x, w.weight)


def linear_float32(x: Tensor, w: Weight) -> Tensor:
    """x [T, in] times w [out, in] transposed -> [T, out] float32, computed in float32 whatever the dtypes are."""
    if isinstance(w, DeviceWeight):
        return w.ops.linear(x, w.matrix, exact=True)
    x = x.float()
    if isinstance(w, NativeWeight):
        return w.library.linear(x, w.matrix, mode=float32_mode(w))
    if isinstance(w, QuantizedTensor):
        return F.linear(x, w.dequantize())
    if isinstance(w, Observed):
        w.see(x)
        return linear_float32(x, w.weight)
    if w.dtype == torch.float32:
        return F.linear(x, w)
    return torch.cat([F.linear(x, rows.float()) for rows in w.split(_EXPANDED_ROWS)], dim=-1)


def float32_mode(w: NativeWeight) -> Mode:
    """How linear_float32 multiplies: only a matrix in int4 as any other, for rounding x is nothing beside its own."""
    coarse = isinstance(w.source, QuantizedTensor) and w.source.format.packing == "int4"
    return w.mode if coarse else "strict"


def grouped_linear(x: Tensor, w: Weight) -> Tensor:
    """Block-diagonal map: x [T, G, in], w [G * out, in] -> [T, G * out]; group g uses rows [g * out, (g + 1) * out)."""
    if isinstance(w, (NativeWeight, DeviceWeight)):
        return w.matmul(x, groups=x.shape[1])
    if isinstance(w, Observed):
        w.see(x)
        return grouped_linear(x, w.weight)
    w = w if isinstance(w, Tensor) else w.dequantize(x.dtype)
    blocks = w.unflatten(0, (x.shape[1], -1))
    return torch.bmm(x.to(w.dtype).transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
