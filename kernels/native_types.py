"""What the compiled library is given: weights, hyper-connection sites and tables of experts, checked once.

Every object keeps the tensors it points into alive. The library believes every pointer, so sizes are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from localmoe.kernels.codebooks import ROW_BYTES

MAX_STREAMS = 16
MAX_COLS = 1 << 18
_FORMATS = {"f32": 0, "bf16": 1, "fp8_block": 2, "fp4": 3, "int8": 4, "int4": 5, "nf4": 6, "book3": 7, "book2": 8}
_SCALES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4, torch.float8_e8m0fnu: 4}
_MARKS = 5
# Bits of a weight, where they are not 4.
_BITS = {"fp8_block": 8, "int8": 8, "book3": 3, "book2": 2}
_BOOKS = ("book3", "book2")
_PLAIN = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Matrix(ctypes.Structure):
    """A weight as the library sees it; keeps the tensors it points into alive."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )
    tensors: tuple[Tensor | None, ...]


class Fields(NamedTuple):
    """What a Matrix says beside its pointers."""

    rows: int
    cols: int
    format: int
    scale_type: int
    group: int


def packed_fields(format: str, shape: tuple[int, int], scale: torch.dtype, group: int) -> Fields:
    """Of a packed matrix; see matrix()."""
    return Fields(*shape, _FORMATS[format], _MARKS if format in _BOOKS else _SCALES[scale], group)


def plain_fields(shape: tuple[int, int], dtype: torch.dtype) -> Fields:
    """Of a float32 or bfloat16 matrix."""
    return Fields(*shape, _FORMATS[_PLAIN[dtype]], 0, 0)


def matrix(
    format: str, shape: tuple[int, int], data: Tensor, scale: Tensor, *, zero: Tensor | None = None, group: int = 0
) -> Matrix:
    """A packed [rows, cols] weight for linear() and Experts; see localmoe_cpu.h for the formats.

    data, scale, zero: contiguous CPU tensors in the layout of the format. group: inputs per scale, if they can vary.
    Raises ValueError for tensors of another size."""
    if zero is not None and format not in ("int8", "int4"):
        raise ValueError(f"no zero points expected, {format} has none")
    rows, cols = shape
    if format != "fp8_block" and (group < 1 or group % 32 or cols % group):
        raise ValueError(f"{cols} columns in groups of {group}")
    scales = (-(-rows // 128), -(-cols // 128)) if format == "fp8_block" else (rows, cols // group)
    check_memory(data, rows * cols * _BITS.get(format, 4) // 8, itemsize=1)
    if format in _BOOKS:
        check_memory(scale, rows * (scales[1] + ROW_BYTES), itemsize=1)
    else:
        check_memory(scale, scales[0] * scales[1])
    if zero is not None:
        check_memory(zero, scales[0] * scales[1], itemsize=1)
    pointers = data.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    found = Matrix(*pointers, *packed_fields(format, shape, scale.dtype, group))
    found.tensors = (data, scale, zero)
    return found


def plain_matrix(weight: Tensor) -> Matrix:
    """A [rows, cols] float32 or bfloat16 weight, contiguous."""
    rows, cols = weight.shape
    check_memory(weight, rows * cols)
    found = Matrix(weight.data_ptr(), None, None, *plain_fields((rows, cols), weight.dtype))
    found.tensors = (weight,)
    return found


class HyperSite(ctypes.Structure):
    """A site of a hyper-connection as the library sees it; keeps the tensors it points into alive."""

    _fields_ = (
        ("fn", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("streams", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("iterations", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *, iterations: int, norm_eps: float, eps: float
    ) -> HyperSite | None:
        """fn [(2 + S) * S, S * D], base [(2 + S) * S], scale [3], norm [D]; see reference.hyper_mix.

        None if the library cannot compute it: not all float32, or more than MAX_STREAMS."""
        width = norm.numel()
        streams = fn.shape[1] // width
        parts = tuple(part.contiguous() for part in (fn, base, scale, norm))
        rows = (2 + streams) * streams
        sizes = (rows * streams * width, rows, 3, width)
        if any(part.dtype != torch.float32 or part.numel() != n for part, n in zip(parts, sizes, strict=True)):
            return None
        if streams > MAX_STREAMS or streams * width > MAX_COLS or iterations < 1:
            return None
        site = cls(*(part.data_ptr() for part in parts), streams, width, iterations, norm_eps, eps)
        site.tensors = parts
        return site


def check_status(status: int) -> None:
    """What a call of the library returned."""
    if status == 2:
        raise MemoryError
    if status:
        raise ValueError("weights or expert ids that do not fit together")


def check_memory(tensor: Tensor, count: int, itemsize: int | None = None) -> None:
    """Raises ValueError unless these are `count` elements in one piece of RAM: the library believes every pointer."""
    fits = tensor.numel() == count and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not fits or itemsize not in (None, tensor.dtype.itemsize):
        raise ValueError(f"{count} elements in one piece expected, found {tuple(tensor.shape)} of {tensor.dtype}")


def float32(tensor: Tensor, *shape: int) -> Tensor:
    """The tensor in one piece. Raises ValueError unless it is float32, in RAM and of this shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(f"float32 {shape} expected, found {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.contiguous()


class Experts:
    """One layer's experts as a table the library reads: w1, w2, w3 of each; w1 and w3 [F, D], w2 [D, F]."""

    def __init__(self, experts: Sequence[tuple[Matrix, Matrix, Matrix]], limit: float) -> None:
        self.limit = limit
        # The library refuses chosen experts of another width.
        self.width: int = experts[0][0].cols
        self._table = (Matrix * (3 * len(experts)))(*(m for expert in experts for m in expert))
        self._keep = experts
        self.address = ctypes.addressof(self._table)

    def __len__(self) -> int:
        return len(self._keep)


class SlotTable:
    """One layer's experts of which some are in memory: like Experts, but they come and go."""

    def __init__(self, num_experts: int, width: int, limit: float) -> None:
        """width: of the layer's inputs."""
        self.width, self.limit = width, limit
        self._count = num_experts
        self._table = (Matrix * (3 * num_experts))()
        self.address = ctypes.addressof(self._table)

    def __len__(self) -> int:
        return self._count

    def put(self, expert: int, matrices: tuple[Matrix, Matrix, Matrix]) -> None:
        """An expert is there; the caller keeps its memory as it is until clear()."""
        for i, matrix in enumerate(matrices):
            self._table[3 * expert + i] = matrix

    def clear(self, expert: int) -> None:
        """An expert is gone; the library refuses to compute it."""
        self._table[3 * expert].data = None
