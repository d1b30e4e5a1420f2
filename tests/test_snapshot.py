"""Sessions as bytes: what was packed comes back to the bit, and no damaged byte goes unnoticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import CheckpointError
from localmoe.snapshot import pack, unpack

FACTS = {"model": "abc", "ids": [1, 2, 3]}
TENSORS = {
    "a": torch.tensor([[1.5, -0.0, float("inf")]]),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
    "empty": torch.zeros(0, 7),
}
PACKED = pack(FACTS, TENSORS)


def test_what_was_packed_comes_back() -> None:
    """Fails for another byte order, a lost stride, or an empty tensor dropped."""
    facts, tensors = unpack(PACKED)
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_unpacked_tensors_can_be_written_to() -> None:
    """Fails if they are views of the immutable bytes."""
    _, tensors = unpack(PACKED)
    tensors["a"].zero_()
    assert torch.equal(unpack(PACKED)[1]["a"], TENSORS["a"])


@settings(deadline=None)
@given(at=st.integers(0, len(PACKED) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(at: int, bit: int) -> None:
    """Fails if any byte is outside of the digest."""
    damaged = bytearray(PACKED)
    damaged[at] ^= 1 << bit
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(bytes(damaged))


@pytest.mark.parametrize("size", [0, 1, 18, 31, 40, len(PACKED) - 1])
def test_a_truncated_snapshot_is_noticed(size: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(PACKED[:size])


def test_bytes_of_something_else_are_noticed() -> None:
    """Fails with a traceback from the JSON or tensor code."""
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(b"PK\x03\x04" + bytes(200))
