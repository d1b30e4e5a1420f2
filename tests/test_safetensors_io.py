"""safetensors: the reader against hostile headers, the writer against full disks and the format's own library."""

from __future__ import annotations

import json
import os
import resource
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe import safetensors_io
from localmoe.errors import CheckpointError, ResourceError
from localmoe.safetensors_io import DTYPES, byte_view, open_shard, write_safetensors


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HOSTILE = {
    "empty file": (b"", "truncated"),
    "half a length": (b"\x01\x00\x00", "truncated"),
    "header of 2^63 bytes": (file_of({}, length=1 << 63), "expected at most 100000000"),
    "header of 100 MB and 1": (file_of({}, length=100_000_001), "expected at most 100000000"),
    "header beyond the file": (file_of({}, length=1000), "its header needs 1008"),
    "deep header": (file_of(b'{"a":' * 50_000), "nested too deeply"),
    "duplicate tensor": (file_of(b'{"a":{"dtype":"U8"},"a":{}}'), "key a appears twice"),
    "header is a list": (file_of([1]), "expected a JSON object"),
    "data missing": (file_of({"a": entry([9], 0, 9)}, b"1234"), "truncated"),
    "data left over": (file_of({"a": entry([2], 0, 2)}, b"1234"), "accounts for"),
    "no tensors but data": (file_of({}, b"1234"), "accounts for"),
    "hole": (file_of({"a": entry([1], 0, 1), "b": entry([2], 2, 4)}, b"1234"), "hole of 1 bytes"),
    "overlap": (file_of({"a": entry([3], 0, 3), "b": entry([2], 2, 4)}, b"1234"), "overlaps"),
    "same bytes twice": (file_of({"a": entry([4], 0, 4), "b": entry([4], 0, 4)}, b"1234"), "overlaps"),
    "unknown dtype": (file_of({"a": entry([4], 0, 4, "F4")}, b"1234"), "dtype F4, expected one of BOOL"),
    "dtype a list": (file_of({"a": entry([4], 0, 4, ["U8"])}, b"1234"), "dtype a list"),
    "size and shape differ": (file_of({"a": entry([5], 0, 4)}, b"1234"), "4 bytes of data, expected 5 for 5 of U8"),
    "shape overflows": (file_of({"a": entry([1 << 40] * 8, 0, 4)}, b"1234"), "4 bytes of data"),
    "shape huge": (file_of({"a": entry([1 << 60], 0, 4)}, b"1234"), "malformed shape"),
    "shape too long": (file_of({"a": entry([1] * 100_000, 0, 1)}, b"1"), "malformed shape"),
    "shape negative": (file_of({"a": entry([-1, -4], 0, 4)}, b"1234"), "malformed shape"),
    "shape a float": (file_of({"a": entry([4.0], 0, 4)}, b"1234"), "malformed shape"),
    "shape a truth value": (file_of({"a": entry([True, 4], 0, 4)}, b"1234"), "malformed shape"),
    "offsets backwards": (file_of({"a": entry([4], 4, 0)}, b"1234"), "data"),
    "offsets negative": (file_of({"a": entry([4], -4, 0)}, b"1234"), "malformed data_offsets"),
    "offsets beyond 64 bits": (file_of({"a": entry([4], 1 << 70, (1 << 70) + 4)}, b"1234"), "malformed data_offsets"),
    "field missing": (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "malformed entry"),
    "field too many": (file_of({"a": entry([4], 0, 4) | {"x": 1}}, b"1234"), "malformed entry"),
    "entry a number": (file_of({"a": 4}, b"1234"), "malformed entry"),
    "escape sequence in a name": (file_of({"a\x1b]0;pwn": entry([5], 0, 4)}, b"1234"), r"a\x1b]0;pwn has 4"),
    "name of a megabyte": (file_of({"n" * 1_000_000: entry([5], 0, 4)}, b"1234"), "nnn... has 4"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    """Fails if a declared size is trusted, a check is missing, or something other than our error escapes."""
    raw, expected = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_shard(path)
    assert time.monotonic() - started < 1
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert message.isprintable()
    assert len(message) < 500


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"t.{name}": (torch.randn(3, 5, generator=generator) * 10).to(dtype)
        for name, dtype in DTYPES.items()
        if name != "F8_E8M0"
    }
    tensors["t.F8_E8M0"] = torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.ones(3, 4).t()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Fails for any dtype the two tables do not agree on, and for scalars, empty and non-contiguous tensors."""
    path, tensors = tmp_path / "model.safetensors", sample()
    write_safetensors(path, tensors, {"format": "pt"})
    fd, refs = open_shard(path)
    assert set(refs) == set(tensors)
    for name, tensor in tensors.items():
        ref = refs[name]
        assert (ref.shape, DTYPES[ref.dtype]) == (tensor.shape, tensor.dtype)
        assert os.pread(fd, ref.nbytes, ref.offset) == byte_view(tensor.contiguous()).tobytes()
    os.close(fd)


def test_the_formats_own_library_reads_what_is_written(tmp_path: Path) -> None:
    """Fails if our reader and writer share a misunderstanding."""
    safetensors = pytest.importorskip("safetensors.torch")
    path, tensors = tmp_path / "model.safetensors", sample()
    write_safetensors(path, tensors, {"format": "pt"})
    loaded = safetensors.load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert byte_view(loaded[name]).tobytes() == byte_view(tensor.contiguous()).tobytes()


def test_every_truncation_is_found_at_open(tmp_path: Path) -> None:
    """Fails if some cut length looks like a whole file. The message has the size found and the size needed."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.arange(10), "b": torch.zeros(3)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: is {size} bytes, .*truncated"):
            open_shard(path)
    assert f"needs {len(whole)} (truncated)" in _error_at(path, whole[:-1])


def _error_at(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        open_shard(path)
    return str(caught.value)


HEADER = json.dumps({"a": entry([2, 3], 0, 24, "F32"), "b": entry([4], 24, 28)}).encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_our_error_or_tensors_inside_the_file(tmp_path: Path, data: st.DataObject) -> None:
    """Fails if any bytes make the reader raise something else, or accept a tensor that reaches beyond the file."""
    raw = bytearray(file_of(HEADER, b"\0" * 28))
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    raw += data.draw(st.binary(max_size=3))
    _open_or_refuse(tmp_path / "x.safetensors", bytes(raw))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_give_our_error(tmp_path: Path, raw: bytes, framed: bool) -> None:
    """Fails if any bytes make the reader raise something else."""
    _open_or_refuse(tmp_path / "x.safetensors", file_of(raw) if framed else raw)


def _open_or_refuse(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        fd, refs = open_shard(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    os.close(fd)
    assert all(ref.offset >= 8 and ref.offset + ref.nbytes <= len(raw) for ref in refs.values())


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Fails if a partial file gets the final name, or the temporary one stays."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)})
    before = path.read_bytes()
    with file_size_limit(1000), pytest.raises(ResourceError, match=r"no room for its .* bytes"):
        write_safetensors(path, {"a": torch.zeros(1000)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_gets_its_name_only_after_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the rename may reach the disk before the bytes, or is never made durable itself."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(4)})
    assert calls == ["fsync file", "rename", "fsync directory"]


def test_a_large_shard_is_brought_to_the_disk_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if all of a shard waits in memory, or is asked to leave it before it is on the disk."""
    calls: list[str] = []
    monkeypatch.setattr(safetensors_io, "_SETTLED_AT_ONCE", 6)
    monkeypatch.setattr(safetensors_io, "forget_cached", lambda fd: calls.append("forget"))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    with safetensors_io.ShardWriter(tmp_path / "x.safetensors", dict.fromkeys("abcd", ("U8", (4,)))) as writer:
        for name in "abcd":
            writer.put(name, memoryview(bytes(4)))
            calls.append(name)
        assert calls == ["a", "fsync", "forget", "b", "c", "fsync", "forget", "d"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C in the middle leaves a temporary file."""

    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(4)})
    assert not list(tmp_path.iterdir())
