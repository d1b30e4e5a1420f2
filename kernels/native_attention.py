"""Attention of many queries in the compiled library, a block of keys at a time.

Knows tensors and their memory; does not know how keys and values are made from a cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from localmoe.kernels.native_types import check_status, float32

_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Block(ctypes.Structure):
    """See lm_expanded in localmoe_cpu.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "expanded", "rotated", "top", "total", "sums", "out")),
        *((name, _INT64) for name in ("queries", "keys", "heads", "nope", "rope", "value_width")),
        *((name, _INT64) for name in ("rotated_stride", "first", "at")),
        ("scale", _FLOAT),
        ("reserved", _INT32),
    )


class ExpandedAttention:
    """Queries [n, H, dn + dr] float32 of consecutive positions, and what they have summed of the keys so far.

    See reference.expanded_attention. Products are of numbers rounded to bf16 where the CPU multiplies that. out
    [n, H, dv] float32 is complete once every position up to the last query's was added."""

    def __init__(self, lib: ctypes.CDLL, q: Tensor, *, value_width: int, first: int, scale: float) -> None:
        """first: position of the first query. Raises ValueError for queries that are not float32 in RAM, or none, and
        for a scale that is not positive."""
        if q.dim() != 3 or not scale > 0:
            raise ValueError(f"queries of heads expected, found {tuple(q.shape)}, and a positive scale, found {scale}")
        n, heads, _ = q.shape
        if not n or not heads or value_width < 1 or first < 0:
            raise ValueError(f"{n} queries of {heads} heads for values of {value_width} from position {first} on")
        self._lib, self._q, self._value_width = lib, float32(q, *q.shape), value_width
        self._first, self._scale, self._position = first, scale, 0
        self._top, self._total = q.new_empty((2, heads, n))
        # No memory is taken before something is kept here, which a single block does not.
        self._sums = q.new_empty((heads, value_width, n))
        self.out = q.new_empty((n, heads, value_width))

    def add(self, expanded: Tensor, rotated: Tensor) -> None:
        """The next keys and values: expanded [m, H, dn + dv]; rotated [m, dr], rows of any stride; both float32.

        Raises ValueError for other shapes, or keys that no query sees."""
        if rotated.dim() != 2 or rotated.dtype != torch.float32 or not rotated.is_cpu or rotated.stride(1) != 1:
            raise ValueError(f"float32 rows expected, found {rotated.dtype} {tuple(rotated.shape)}")
        (n, heads, width), (m, rope) = self._q.shape, rotated.shape
        if rope > width:
            raise ValueError(f"{rope} rotated dimensions of {width}")
        expanded = float32(expanded, m, heads, width - rope + self._value_width)
        if not 1 <= m <= self._first + n - self._position:
            raise ValueError(f"{m} keys from position {self._position} on for queries up to {self._first + n - 1}")
        state = self._top.data_ptr(), self._total.data_ptr(), self._sums.data_ptr(), self.out.data_ptr()
        block = _Block(
            *(self._q.data_ptr(), expanded.data_ptr(), rotated.data_ptr(), *state),
            *(n, m, heads, width - rope, rope, self._value_width, rotated.stride(0), self._first, self._position),
            self._scale,
        )
        check_status(self._lib.lm_expanded_attend(block))
        self._position += m


class AttentionCalls:
    """The part of Library that attends for many queries."""

    _lib: ctypes.CDLL

    def _declare_attention(self) -> None:
        self._lib.lm_expanded_attend.argtypes = (ctypes.POINTER(_Block),)

    def expanded_attention(self, q: Tensor, *, value_width: int, first: int, scale: float) -> ExpandedAttention:
        """See ExpandedAttention."""
        return ExpandedAttention(self._lib, q, value_width=value_width, first=first, scale=scale)
