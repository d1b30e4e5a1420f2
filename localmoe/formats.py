"""Weight formats: what a quantized matrix consists of, and how it becomes numbers again.

The only place above the kernels that knows how weights are packed. A new format is one object in FORMATS.
Holds what a checkpoint holds, plus nothing: dequantizing allocates its result each time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.errors import FormatError
from localmoe.kernels import codebooks, codecs, rounding
from localmoe.safetensors_io import DTYPES


class WeightFormat(ABC):
    """A stateless description of one packing. Dtypes are spelled as in safetensors headers."""

    name: str
    data_dtype: str
    scale_dtypes: tuple[str, ...]
    # Inputs of a row per scale; 0 where scales are not counted so.
    group: int = 0
    has_zero_points: bool = False
    # Rows that share a scale.
    row_block: int = 1

    @property
    def packing(self) -> str:
        """What the kernels call it."""
        return self.name

    @abstractmethod
    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the packed weight of a [rows, cols] matrix. Raises FormatError if it cannot be packed so."""

    @abstractmethod
    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of its scales."""

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of both as a checkpoint of ours stores them. Raises FormatError as data_shape does."""
        scale = DTYPES[self.scale_dtypes[0]].itemsize
        return math.prod(self.data_shape(rows, cols)) + scale * math.prod(self.scale_shape(rows, cols))

    @abstractmethod
    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        """Put tensors as a checkpoint stores them together, without copying the packed weight.

        zero: uint8 zero points, shaped like scale, for formats that have them.
        Raises FormatError for scales that no quantizer writes: NaN, infinite, negative, or a row of zeros."""

    def quantize(self, weight: Tensor, *, symmetric: bool = True) -> QuantizedTensor:
        """Round a finite [rows, cols] matrix to this format. symmetric: without zero points, if there is a choice.

        Raises FormatError for a matrix or zero points that the format has no room for."""
        if not symmetric and not self.has_zero_points:
            raise FormatError(f"is to be asymmetric, {self.name} has no zero points")
        rows, cols = weight.shape
        self.data_shape(rows, cols)
        data, scale, zero = self._rounded(weight, symmetric)
        return QuantizedTensor(self, (rows, cols), data, scale, zero)

    @abstractmethod
    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Data, scales and, if there are any, zero points."""

    @abstractmethod
    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """The [rows, cols] matrix in dtype."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A [rows, cols] matrix held packed: data, scale and perhaps zero points as its format lays them out."""

    format: WeightFormat
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same on a device; itself if it is there."""
        if self.data.device == self.scale.device == device:
            return self
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedTensor(self.format, self.shape, self.data.to(device), self.scale.to(device), zero)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols] in dtype; exact in float32."""
        return self.format.dequantize(self, dtype)

    def part(self, parts: int, rows: slice) -> QuantizedTensor | None:
        """Of a matrix of `parts` equal parts, these rows of each, one part after the other, still packed.

        None if a scale belongs to rows inside and outside of them."""
        of_part, block = self.shape[0] // parts, self.format.row_block
        start, stop, _ = rows.indices(of_part)
        if of_part % block or start % block or stop % block or self.zero is not None:
            return None

        def taken(tensor: Tensor, block: int) -> Tensor:
            each: Tensor = tensor.unflatten(0, (parts, -1))[:, start // block : stop // block]
            return each.flatten(0, 1).contiguous()

        shape = parts * (stop - start), self.shape[1]
        return QuantizedTensor(self.format, shape, taken(self.data, 1), taken(self.scale, block))


class Fp8Block(WeightFormat):
    """e4m3 with one scale per 128 x 128 block; scales are kept as float32, whatever the checkpoint stores."""

    name = "fp8_block"
    data_dtype = "F8_E4M3"
    scale_dtypes = ("F8_E8M0", "F32")
    row_block = codecs.BLOCK

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // codecs.BLOCK), -(-cols // codecs.BLOCK)

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        _refuse_zero_points(zero, self.name)
        _refuse_zero_rows(scale)
        scale = codecs.decode_e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale
        _refuse_odd_scales(scale)
        return QuantizedTensor(self, shape, data, scale)

    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return *codecs.quantize_fp8_block(weight), None

    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_fp8_block(packed.data, packed.scale, dtype)


class Fp4(WeightFormat):
    """e2m1, two to a byte, with one e8m0 scale byte per 32 inputs of a row; kept as uint8 codes and uint8 scales."""

    name = "fp4"
    data_dtype = "I8"
    scale_dtypes = ("F8_E8M0",)
    group = codecs.GROUP

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        if cols % codecs.GROUP:
            raise FormatError(f"has {cols} columns, FP4 needs a multiple of {codecs.GROUP}")
        return rows, cols // 2

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols // codecs.GROUP

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        _refuse_zero_points(zero, self.name)
        _refuse_zero_rows(scale)
        scale = scale.view(torch.uint8)
        if (scale == 255).any():
            raise FormatError("its scales contain NaN (byte 255), expected powers of two")
        return QuantizedTensor(self, shape, data.view(torch.uint8), scale)

    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return *codecs.quantize_fp4(weight), None

    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_fp4(packed.data, packed.scale, dtype)


class _InGroups(WeightFormat):
    """Codes of `bits` bits, bytes of them in a row, and a scale per `group` inputs."""

    bits: int
    data_dtype = "U8"

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        if cols % self.group:
            raise FormatError(f"has {cols} columns, {self.name} needs a multiple of {self.group}")
        return rows, cols * self.bits // 8

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols // self.group


@dataclass(frozen=True)
class Int(_InGroups):
    """Unsigned integers of 8 or 4 bits around a zero point, one bf16, f16 or f32 scale per `group` inputs of a row.

    The bytes are those of compressed-tensors' pack-quantized (value + 128 or + 8, low nibble first)."""

    bits: int
    group: int
    scale_dtypes = ("BF16", "F16", "F32")
    has_zero_points = True

    @property
    def packing(self) -> str:
        return f"int{self.bits}"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.packing}_g{self.group}"

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        _refuse_zero_rows(scale)
        _refuse_odd_scales(scale)
        return QuantizedTensor(self, shape, data.view(torch.uint8), scale, zero)

    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return codecs.quantize_int(weight, self.bits, self.group, symmetric=symmetric)

    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_int(packed.data, packed.scale, packed.zero, self.bits, dtype)


class Nf4(_InGroups):
    """Sixteen quantiles of a normal distribution, two to a byte, high nibble first, a float32 scale per 64 inputs.

    The bytes are those of bitsandbytes without double quantization, whose blocks do not cross rows if these have a
    multiple of 64 columns. Source: QLoRA (Dettmers et al., 2023), section 3."""

    name = "nf4"
    bits = 4
    scale_dtypes = ("F32",)
    group = 64

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        _refuse_zero_points(zero, self.name)
        # A block of zeros has the scale 0 in bitsandbytes, but not a whole row of a trained matrix.
        _refuse_zero_rows(scale)
        _refuse_odd_scales(scale)
        return QuantizedTensor(self, shape, data, scale)

    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return *codecs.quantize_nf4(weight), None

    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return codecs.dequantize_nf4(packed.data, packed.scale, dtype)


@dataclass(frozen=True)
class Book(_InGroups):
    """Codes of 3 or 2 bits for a table that is chosen per 32 inputs; see kernels/codebooks.py.

    Its scales are marks: for each row a float32, then a byte for each group."""

    bits: int
    group = codebooks.GROUP
    scale_dtypes = ("U8",)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"book{self.bits}"

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, codebooks.ROW_BYTES + cols // self.group

    def bind(self, data: Tensor, scale: Tensor, shape: tuple[int, int], zero: Tensor | None = None) -> QuantizedTensor:
        _refuse_zero_points(zero, self.name)
        _refuse_zero_rows(scale)
        _refuse_odd_scales(codebooks.split_marks(scale)[0])
        return QuantizedTensor(self, shape, data, scale)

    def _rounded(self, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return *rounding.round_books(weight.float(), torch.ones(weight.shape[1]), self.bits), None

    def dequantize(self, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return codebooks.dequantize_book(packed.data, packed.scale, self.bits, dtype)


# What DeepSeek publishes. There, formats are told apart by the dtype of the packed weights alone.
_PUBLISHED: tuple[WeightFormat, ...] = (Fp8Block(), Fp4())
_INTEGERS: tuple[WeightFormat, ...] = tuple(Int(bits, group) for bits in (8, 4) for group in (32, 64, 128))
FORMATS: dict[str, WeightFormat] = {fmt.name: fmt for fmt in (*_PUBLISHED, *_INTEGERS, Nf4(), Book(3), Book(2))}


def format_of(data_dtype: str) -> WeightFormat | None:
    """The published format whose packed weights have this safetensors dtype, or None."""
    return next((fmt for fmt in _PUBLISHED if fmt.data_dtype == data_dtype), None)


def _refuse_zero_rows(scale: Tensor) -> None:
    """No quantizer writes a row of zero scale bytes; a file whose tail was lost in a crash is full of them."""
    if scale.numel() and (scale.view(torch.uint8) == 0).all(-1).any():
        raise FormatError("a row of its scales is all zero, expected none (was the file zero-filled by a crash?)")


def _refuse_odd_scales(scale: Tensor) -> None:
    if not (scale.isfinite() & (scale >= 0)).all():
        raise FormatError("its scales contain NaN, infinity or a negative number, expected positive numbers")


def _refuse_zero_points(zero: Tensor | None, name: str) -> None:
    if zero is not None:
        raise FormatError(f"has zero points, {name} has none")
