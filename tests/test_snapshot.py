"""Sessions as bytes: what was packed comes back to the bit, and no damaged byte goes unnoticed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import CheckpointError
from localmoe.files import partial_of
from localmoe.snapshot import (
    MAGIC,
    Snapshot,
    pack,
    prefix_digests,
    read_head,
    stored_nbytes,
    unpack,
    write_file,
)

FACTS = {"model": "abc", "ids": [1, 2, 3]}
TENSORS = {
    "a": torch.tensor([[1.5, -0.0, float("inf")]]),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
    "empty": torch.zeros(0, 7),
}
SNAPSHOT = Snapshot(FACTS, TENSORS)
PACKED = pack(SNAPSHOT)


def test_what_was_packed_comes_back() -> None:
    """Fails for another byte order, a lost stride, or an empty tensor dropped."""
    found = unpack(PACKED)
    tensors = found.tensors
    assert found.facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    assert stored_nbytes(SNAPSHOT) == len(PACKED)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_unpacked_tensors_can_be_written_to() -> None:
    """Fails if they are views of the immutable bytes."""
    unpack(PACKED).tensors["a"].zero_()
    assert torch.equal(unpack(PACKED).tensors["a"], TENSORS["a"])


@settings(deadline=None)
@given(at=st.integers(0, len(PACKED) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(at: int, bit: int) -> None:
    """Fails if any byte is outside of the digest."""
    damaged = bytearray(PACKED)
    damaged[at] ^= 1 << bit
    with pytest.raises(CheckpointError, match="saved session"):
        unpack(bytes(damaged))


@pytest.mark.parametrize("size", [0, 1, 18, 31, 40, len(PACKED) - 1])
def test_a_truncated_snapshot_is_noticed(size: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(PACKED[:size])


def test_bytes_of_something_else_are_noticed() -> None:
    """Fails with a traceback from the JSON or tensor code."""
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(b"PK\x03\x04" + bytes(200))


def headed(head: object, rest: bytes = b"") -> bytes:
    """A file with this head and a digest that is right."""
    text = json.dumps(head).encode()
    body = MAGIC + len(text).to_bytes(8, "little") + text + rest
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "tensors",
    [
        [["a", "torch.float32", [1 << 38]]],
        [["a", "torch.float32", [1 << 39, 1 << 39, 1 << 39, 1 << 39]]],
        [["a", "torch.float32", [-1]]],
        [["a", "torch.float32", [True]]],
        [["a", "torch.float32", [0] * 9]],
        [["a", "torch.float16", [0]]],
        [["a", "torch.float32", [0]], ["a", "torch.float32", [0]]],
        [["a", "torch.float32"]],
        [[1, "torch.float32", [0]]],
        {"a": 1},
        None,
    ],
)
def test_a_head_that_asks_for_what_is_not_there_is_refused(tensors: object) -> None:
    """Fails with a traceback, or with 1 TB of memory asked for by 100 bytes whose digest is right."""
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(headed({"facts": {}, "tensors": tensors}))


@pytest.mark.parametrize("facts", [None, [], 3])
def test_facts_are_an_object(facts: object) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(headed({"facts": facts, "tensors": []}))


def test_a_head_is_read_without_the_tensors() -> None:
    """Fails if looking through many saved sessions means reading them."""
    damaged = bytearray(PACKED)
    damaged[-40] ^= 1
    head = read_head(io.BytesIO(damaged))
    assert head.facts == FACTS
    assert head.tensors["b"] == (torch.bfloat16, (3, 2))


def test_a_file_is_for_its_owner_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """Fails if others on the machine could read a conversation, whatever the umask."""
    before = os.umask(0)
    try:
        write_file(tmp_path / "a.state", SNAPSHOT)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]
    assert stat.S_IMODE((tmp_path / "a.state").stat().st_mode) == 0o600
    assert (tmp_path / "a.state").read_bytes() == PACKED


def test_what_an_interrupted_writer_left_is_written_over(tmp_path: Path) -> None:
    partial_of(tmp_path / "a.state").write_bytes(bytes(9999))
    write_file(tmp_path / "a.state", SNAPSHOT)
    assert (tmp_path / "a.state").read_bytes() == PACKED
    assert len(list(tmp_path.iterdir())) == 1


def test_digests_of_beginnings_are_those_of_the_beginnings() -> None:
    """Fails if an end inside of another is digested with what came before left out."""
    ids = [5, 1 << 20, 0, 7, 7]
    found = prefix_digests(ids, [0, 2, 5, 2, 6])
    assert found.keys() == {0, 2, 5}
    assert found[2] == prefix_digests(ids[:2], [2])[2] != prefix_digests([5, 1], [2])[2]
