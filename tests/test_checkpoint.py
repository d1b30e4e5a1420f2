"""Checkpoints: index and shards that do not fit together, and files that change while they are open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import checkpoint as checkpoints
from localmoe.checkpoint import INDEX, SINGLE, Checkpoint
from localmoe.errors import CheckpointError
from localmoe.safetensors_io import write_safetensors

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / A, {"a": torch.arange(6).view(2, 3), "b": torch.ones(4)})
    write_safetensors(tmp_path / B, {"c": torch.zeros(5, dtype=torch.bfloat16)})
    write_index(tmp_path, {"a": A, "b": A, "c": B})
    return tmp_path


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert message.isprintable()
    return message


def test_tensors_of_all_shards_are_read(sharded: Path) -> None:
    """Fails if offsets, dtypes or shapes are mixed up between shards."""
    with Checkpoint.open(sharded) as checkpoint:
        assert torch.equal(checkpoint.read(checkpoint.refs["a"]), torch.arange(6).view(2, 3))
        assert torch.equal(checkpoint.read(checkpoint.refs["b"]), torch.ones(4))
        assert checkpoint.read(checkpoint.refs["c"]).dtype == torch.bfloat16


@pytest.mark.parametrize("passing", [False, True])
def test_what_is_read_in_passing_need_not_stay_in_memory(
    sharded: Path, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a model that is read once drives out everything else, or a loaded one is read from the disk anew."""
    forgotten: list[int] = []
    monkeypatch.setattr(checkpoints, "_CACHED", 1)
    monkeypatch.setattr(checkpoints, "forget_cached", forgotten.append)
    with Checkpoint.open(sharded, passing=passing) as checkpoint:
        for ref in checkpoint.refs.values():
            checkpoint.read(ref)
        files = {ref.file for ref in checkpoint.refs.values()}
        assert len(set(forgotten)) == (len(files) if passing else 0)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    """Fails if only indexed checkpoints open."""
    write_safetensors(tmp_path / SINGLE, {"a": torch.arange(3)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read(checkpoint.refs["a"]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "shard",
    [
        "../" + A,
        "/etc/passwd",
        "sub/" + A,
        "..",
        "x.bin",
        A + "\n",
        ".safetensors",
        "a\x1b]0;pwn.safetensors",
        "ä.safetensors",
        7,
        None,
        [A],
    ],
)
def test_an_index_cannot_name_a_path(sharded: Path, shard: Any) -> None:
    """Fails if a file outside the model directory could be opened."""
    write_index(sharded, {"a": A, "b": shard})
    assert "expected the plain name of a .safetensors file" in refusal(sharded)


def test_missing_shards_are_listed(sharded: Path) -> None:
    """Fails if the first missing shard hides the others, or a long list floods the terminal."""
    (sharded / B).unlink()
    assert f"missing: {B};" in refusal(sharded)
    write_index(sharded, {f"t{i}": f"s{i}.safetensors" for i in range(50)})
    assert "50 shards" in refusal(sharded)
    assert "s0.safetensors, s1.safetensors, s10.safetensors and 47 more" in refusal(sharded)


def test_a_truncated_shard_is_found_at_open(sharded: Path) -> None:
    """Fails if only reading the tensor would notice. The message has file, size found and size needed."""
    size = (sharded / B).stat().st_size
    os.truncate(sharded / B, size - 4)
    assert f"{B}: is {size - 4} bytes, its header needs {size} (truncated)" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    """Fails if the last shard silently wins."""
    write_safetensors(sharded / B, {"c": torch.zeros(5), "a": torch.zeros(1)})
    assert f"has tensor a, which {A} has too" in refusal(sharded)


def test_an_index_that_contradicts_the_shards_is_refused(sharded: Path) -> None:
    """Fails if the index is believed, or ignored."""
    write_index(sharded, {"a": A, "b": A, "c": A})
    assert f"says tensor c is in {A}, but no shard has it" in refusal(sharded)
    write_index(sharded, {"a": A, "b": B, "c": B})
    assert f"says tensor b is in {B}, but it is in {A}" in refusal(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, index: str) -> None:
    """Fails if an empty index opens as an empty model."""
    (sharded / INDEX).write_text(index)
    assert "has no weight_map" in refusal(sharded)


def test_pickle_weights_are_never_read(tmp_path: Path) -> None:
    """Fails if a .bin is opened, or its absence from the message leaves the reader guessing."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refusal(tmp_path)
    assert "no safetensors found (only pytorch_model.bin)" in message
    assert "localmoe does not read pickle" in message


def test_an_empty_or_absent_directory_is_named(tmp_path: Path) -> None:
    """Fails if OSError escapes."""
    assert "no safetensors found (nothing else)" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "none")


def test_a_file_cut_after_opening_gives_file_and_offset(sharded: Path) -> None:
    """Fails if a short read returns half a tensor, or a mapped page kills the process."""
    with Checkpoint.open(sharded) as checkpoint:
        ref = checkpoint.refs["c"]
        os.truncate(sharded / B, ref.offset + 6)
        with pytest.raises(CheckpointError, match=rf"{B}: ends at byte {ref.offset + 6}, expected 4 more"):
            checkpoint.read(ref)


def test_a_file_replaced_after_opening_stays_the_one_checked(sharded: Path) -> None:
    """Fails if files are opened again for reading: offsets of the old header would meet bytes of the new file."""
    with Checkpoint.open(sharded) as checkpoint:
        write_safetensors(sharded / B, {"c": torch.ones(50, dtype=torch.bfloat16)})
        assert torch.equal(checkpoint.read(checkpoint.refs["c"]), torch.zeros(5, dtype=torch.bfloat16))


def test_a_refused_checkpoint_leaves_no_file_open(sharded: Path) -> None:
    """Fails if descriptors leak when the second shard is bad."""
    os.truncate(sharded / B, 5)
    before = len(os.listdir("/dev/fd"))
    refusal(sharded)
    assert len(os.listdir("/dev/fd")) == before
