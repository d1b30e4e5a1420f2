"""What the compiled library does for quantize: matrices to other formats, and what is found in their codes.

Knows tensors and their memory; does not know names or files."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from localmoe.kernels.codebooks import GROUP, ROW_BYTES
from localmoe.kernels.codecs import NF4_BLOCK
from localmoe.kernels.native_types import check_memory, check_status, float32

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class RoundingCalls:
    """The part of Library that rounds matrices."""

    _lib: ctypes.CDLL

    def _declare_rounding(self) -> None:
        matrix, fp4 = (_POINTER, _POINTER, _INT64, _INT64), (_POINTER, _POINTER, _POINTER, _INT64, _INT64)
        nf4, book = (_POINTER, _INT32, _POINTER, _POINTER), (_INT32, _POINTER, _POINTER)
        self._lib.lm_round.argtypes = (*matrix, _INT32, _INT64, *nf4)
        self._lib.lm_round_levels.argtypes = (*matrix, _INT64, _POINTER, _INT32, *nf4)
        self._lib.lm_round_nf4.argtypes = (*matrix, *nf4)
        self._lib.lm_round_nf4_fp4.argtypes = (*fp4, *nf4)
        self._lib.lm_round_books.argtypes = (*matrix, *book)
        self._lib.lm_round_books_fp4.argtypes = (*fp4, *book)
        self._lib.lm_look_up.argtypes = (_POINTER, _INT64, _POINTER, _POINTER)
        self._lib.lm_zero_signs.argtypes = (_POINTER, _INT64, _POINTER)
        self._lib.lm_zero_signs.restype = _INT64

    def round_groups(
        self, weight: Tensor, importance: Tensor, bits: int, group: int, shares: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """A matrix to integers with the best of some scales for each group; see rounding.round_groups.

        weight: [rows, cols] float32, finite; importance: [cols] float32. Returns codes uint8
        [rows, cols * bits / 8] and scales bfloat16 [rows, cols / group]."""
        rows, cols = weight.shape
        weight, importance = float32(weight, rows, cols), float32(importance, cols)
        codes = torch.empty((rows, cols * bits // 8), dtype=torch.uint8)
        scales = torch.empty((rows, cols // group), dtype=torch.bfloat16)
        tried = (ctypes.c_float * len(shares))(*shares)
        pointers = weight.data_ptr(), importance.data_ptr()
        check_status(
            self._lib.lm_round(
                *pointers, rows, cols, bits, group, tried, len(shares), codes.data_ptr(), scales.data_ptr()
            )
        )
        return codes, scales

    def round_levels(
        self, weight: Tensor, importance: Tensor, levels: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A matrix to levels times the best of some scales for each group; see rounding.round_levels."""
        rows, cols = weight.shape
        count, _, per_row = candidates.shape
        weight, importance = float32(weight, rows, cols), float32(importance, cols)
        candidates, levels = float32(candidates, count, rows, per_row), float32(levels, levels.numel())
        chosen = torch.empty((rows, per_row), dtype=torch.uint8)
        nearest = torch.empty((rows, cols), dtype=torch.uint8)
        found = levels.data_ptr(), levels.numel(), candidates.data_ptr(), count, chosen.data_ptr(), nearest.data_ptr()
        check_status(
            self._lib.lm_round_levels(
                weight.data_ptr(), importance.data_ptr(), rows, cols, cols // per_row if per_row else 0, *found
            )
        )
        return chosen, nearest

    def round_nf4(self, weight: Tensor, importance: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """A matrix to nf4; see rounding.round_nf4."""
        rows, cols = weight.shape
        weight, importance = float32(weight, rows, cols), float32(importance, cols)
        codes, scales, *last = _nf4(rows, cols, shares)
        check_status(self._lib.lm_round_nf4(weight.data_ptr(), importance.data_ptr(), rows, cols, *last))
        return codes, scales

    def round_nf4_fp4(
        self, data: Tensor, exponents: Tensor, importance: Tensor, shares: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The same of an FP4 matrix, as it is packed, with the same bits."""
        rows, cols, importance = _fp4(data, exponents, importance)
        codes, scales, *last = _nf4(rows, cols, shares)
        pointers = data.data_ptr(), exponents.data_ptr(), importance.data_ptr()
        check_status(self._lib.lm_round_nf4_fp4(*pointers, rows, cols, *last))
        return codes, scales

    def round_books(self, weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """A matrix to codebooks of 3 or 2 bits; see rounding.round_books.

        weight: [rows, cols] float32, finite; importance: [cols] float32. Returns codes uint8
        [rows, cols * bits / 8] and marks uint8 [rows, 4 + cols / 32]."""
        rows, cols = weight.shape
        weight, importance = float32(weight, rows, cols), float32(importance, cols)
        codes, marks = _book(rows, cols, bits)
        pointers = weight.data_ptr(), importance.data_ptr()
        check_status(self._lib.lm_round_books(*pointers, rows, cols, bits, codes.data_ptr(), marks.data_ptr()))
        return codes, marks

    def round_books_fp4(self, data: Tensor, exponents: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The same of an FP4 matrix, as it is packed; see rounding.round_books_fp4."""
        rows, cols, importance = _fp4(data, exponents, importance)
        codes, marks = _book(rows, cols, bits)
        pointers = data.data_ptr(), exponents.data_ptr(), importance.data_ptr()
        check_status(self._lib.lm_round_books_fp4(*pointers, rows, cols, bits, codes.data_ptr(), marks.data_ptr()))
        return codes, marks

    def look_up(self, pairs: Tensor, table: Tensor) -> Tensor:
        """What a table says of codes of four bits; see rounding.look_up."""
        check_memory(pairs, pairs.numel(), itemsize=1)
        check_memory(table, 16, itemsize=1)
        out = torch.empty((*pairs.shape[:-1], 2 * pairs.shape[-1]), dtype=torch.uint8)
        check_status(self._lib.lm_look_up(pairs.data_ptr(), pairs.numel(), table.data_ptr(), out.data_ptr()))
        return out

    def zero_signs(self, codes: Tensor) -> Tensor:
        """The signs of all zeros of an FP4 matrix, uint8 codes as they are packed; see rounding.zero_signs."""
        check_memory(codes, codes.numel(), itemsize=1)
        bits = torch.empty(codes.numel() // 4 + 1, dtype=torch.uint8)
        count = self._lib.lm_zero_signs(codes.data_ptr(), codes.numel(), bits.data_ptr())
        return bits[: -(-count // 8)]


def _fp4(data: Tensor, exponents: Tensor, importance: Tensor) -> tuple[int, int, Tensor]:
    """Rows and columns of a packed FP4 matrix, and the importance of its inputs, all checked."""
    rows, cols = data.shape[0], 2 * data.shape[1]
    check_memory(data, rows * cols // 2, itemsize=1)
    check_memory(exponents, rows * cols // GROUP, itemsize=1)
    return rows, cols, float32(importance, cols)


def _nf4(rows: int, cols: int, shares: Sequence[float]) -> tuple[Tensor, Tensor, Any, int, int, int]:
    """Room for codes and scales, and the arguments that follow the columns."""
    codes = torch.empty((rows, cols // 2), dtype=torch.uint8)
    scales = torch.empty((rows, cols // NF4_BLOCK))
    tried = (ctypes.c_float * len(shares))(*shares)
    return codes, scales, tried, len(shares), codes.data_ptr(), scales.data_ptr()


def _book(rows: int, cols: int, bits: int) -> tuple[Tensor, Tensor]:
    """Room for codes and marks."""
    codes = torch.empty((rows, cols * bits // 8), dtype=torch.uint8)
    return codes, torch.empty((rows, ROW_BYTES + cols // GROUP), dtype=torch.uint8)
