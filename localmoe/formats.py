"""Weight formats: what a quantized matrix consists of, and how it becomes numbers again.

The only place above the kernels that knows how weights are packed. A new format is one object in FORMATS.
Holds what a checkpoint holds, plus nothing: dequantizing allocates its result each time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.errors import FormatError
from localmoe.kernels import codecs


class WeightFormat(ABC):
    """A stateless description of one packing. Dtypes are spelled as in safetensors headers."""

    name: str
    data_dtype: str
    scale_dtypes: tuple[str, ...]

    @abstractmethod
    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the packed weight of a [rows, cols] matrix. Raises FormatError if it cannot be packed so."""

    @abstractmethod
    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of its scales."""

    @abstractmethod
    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
        """Put tensors as a checkpoint stores them together, without copying the packed weight.

        Raises FormatError for scales that no quantizer writes: NaN, infinite, negative, or a row of zeros."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Round a finite [rows, cols] matrix to this format."""

    @abstractmethod
    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The [rows, cols] matrix in dtype."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A [rows, cols] matrix held packed: data and scale as its format lays them out."""

    format: WeightFormat
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols] in dtype; exact in float32."""
        return self.format.dequantize(self.data, self.scale, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., cols] -> [..., rows] in x's dtype. The whole matrix is expanded for the call."""
        return F.linear(x, self.dequantize(x.dtype))


Weight = Tensor | QuantizedTensor


def linear(x: Tensor, w: Weight) -> Tensor:
    """x [..., in] times w [out, in] transposed -> [..., out], computed in w's dtype if w is plain, in x's otherwise."""
    return F.linear(x.to(w.dtype), w) if isinstance(w, Tensor) else w.matmul(x)


class Fp8Block(WeightFormat):
    """e4m3 with one scale per 128 x 128 block; scales are kept as float32, whatever the checkpoint stores."""

    name = "fp8_block"
    data_dtype = "F8_E4M3"
    scale_dtypes = ("F8_E8M0", "F32")

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // codecs.BLOCK), -(-cols // codecs.BLOCK)

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
        _refuse_zero_rows(scale)
        scale = codecs.decode_e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale
        if not (scale.isfinite() & (scale >= 0)).all():
            raise FormatError("its scales contain NaN, infinity or a negative number, expected positive numbers")
        return QuantizedTensor(self, shape, data, scale)

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        data, scale = codecs.quantize_fp8_block(weight)
        return QuantizedTensor(self, _matrix_shape(weight), data, scale)

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_fp8_block(data, scale, dtype)


class Fp4(WeightFormat):
    """e2m1, two to a byte, with one e8m0 scale byte per 32 inputs of a row; kept as uint8 codes and uint8 scales."""

    name = "fp4"
    data_dtype = "I8"
    scale_dtypes = ("F8_E8M0",)

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        if cols % codecs.GROUP:
            raise FormatError(f"has {cols} columns, FP4 needs a multiple of {codecs.GROUP}")
        return rows, cols // 2

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols // codecs.GROUP

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
        _refuse_zero_rows(scale)
        scale = scale.view(torch.uint8)
        if (scale == 255).any():
            raise FormatError("its scales contain NaN (byte 255), expected powers of two")
        return QuantizedTensor(self, shape, data.view(torch.uint8), scale)

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        self.data_shape(*weight.shape)
        data, scale = codecs.quantize_fp4(weight)
        return QuantizedTensor(self, _matrix_shape(weight), data, scale)

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_fp4(data, scale, dtype)


FORMATS: dict[str, WeightFormat] = {fmt.name: fmt for fmt in (Fp8Block(), Fp4())}


def format_of(data_dtype: str) -> WeightFormat | None:
    """The format whose packed weights have this safetensors dtype, or None: formats are told apart by dtype alone."""
    return next((fmt for fmt in FORMATS.values() if fmt.data_dtype == data_dtype), None)


def _refuse_zero_rows(scale: Tensor) -> None:
    """No quantizer writes a row of zero scale bytes; a file whose tail was lost in a crash is full of them."""
    if scale.numel() and (scale.view(torch.uint8) == 0).all(-1).any():
        raise FormatError("a row of its scales is all zero, expected none (was the file zero-filled by a crash?)")


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    rows, cols = weight.shape
    return rows, cols
