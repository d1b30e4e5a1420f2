"""safetensors files: a bounds-checked header reader and a crash-safe writer.

Trusts nothing in a file: every length is compared with the file's real size before memory is allocated for it.
Reading a header takes memory in proportion to the header, at most 100 MB of text. Writing holds one tensor at a time.
Source: github.com/huggingface/safetensors, README, section Format."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.files import (
    forget_cached,
    full_disk,
    open_regular,
    parse_json,
    partial_of,
    pread_into,
    pwrite_all,
    replacing,
    shown,
    sync_folder,
)

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
# Bytes that a shard's writer leaves to the system before it waits for the disk.
_SETTLED_AT_ONCE = 64 << 20
_MAX_DIMS, _MAX_DIM = 8, 1 << 48


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's bytes lie: `nbytes` at `offset` from the start of `file`; dtype as safetensors spells it."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def open_shard(path: Path) -> tuple[int, dict[str, TensorRef]]:
    """Open a safetensors file and check its header against the file; returns (descriptor, tensors by name).

    Raises CheckpointError if the header is not exactly a description of this file."""
    fd, refs, _metadata = open_with_metadata(path)
    return fd, refs


def open_with_metadata(path: Path) -> tuple[int, dict[str, TensorRef], dict[str, str]]:
    """As open_shard, with the header's own texts; what is no text there is left out."""
    fd, size = open_regular(path, CheckpointError)
    try:
        return fd, *_read_header(path, fd, size)
    except CheckpointError:
        os.close(fd)
        raise


def _read_header(path: Path, fd: int, size: int) -> tuple[dict[str, TensorRef], dict[str, str]]:
    name = shown(path)
    if size < 8:
        raise CheckpointError(f"{name}: is {size} bytes, expected a safetensors header (truncated?); download it again")
    prefix = bytearray(8)
    pread_into(fd, memoryview(prefix), 0, name, CheckpointError)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{name}: header of {length} bytes, expected at most {MAX_HEADER}; download it again")
    if 8 + length > size:
        raise CheckpointError(f"{name}: is {size} bytes, its header needs {8 + length} (truncated); download it again")
    text = bytearray(length)
    pread_into(fd, memoryview(text), 8, name, CheckpointError)
    entries = parse_json(text, f"{name}: header", CheckpointError)
    metadata = entries.pop("__metadata__", None)
    refs = {key: _parse_entry(path, key, entry, 8 + length) for key, entry in entries.items()}
    _check_coverage(name, refs, 8 + length, size)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return refs, {key: text for key, text in texts if isinstance(text, str)}


def _parse_entry(path: Path, key: str, entry: Any, start: int) -> TensorRef:
    """One tensor's entry, checked by itself. Its offsets count from `start`, the end of the header."""
    where = f"{shown(path)}: tensor {shown(key)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has a malformed entry, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _naturals(shape, _MAX_DIM) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where} has a malformed shape, expected at most {_MAX_DIMS} sizes up to 2^48")
    if not _naturals(offsets, 1 << 62) or len(offsets) != 2:
        raise CheckpointError(f"{where} has malformed data_offsets, expected a begin and an end")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        sizes = "x".join(map(str, shape)) or "a scalar"
        raise CheckpointError(f"{where} has {end - begin} bytes of data, expected {nbytes} for {sizes} of {dtype}")
    return TensorRef(path, start + begin, nbytes, dtype, tuple(shape))


def _naturals(values: Any, high: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= high for v in values)


def _check_coverage(name: str, refs: dict[str, TensorRef], start: int, size: int) -> None:
    """The tensors must cover the rest of the file exactly once: no overlap, no hole, nothing after them."""
    needed = max((ref.offset + ref.nbytes for ref in refs.values()), default=start)
    if size < needed:
        raise CheckpointError(f"{name}: is {size} bytes, its header needs {needed} (truncated); download it again")
    end = start
    for key, ref in sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:
            problem = "overlaps the one before it" if ref.offset < end else f"leaves a hole of {ref.offset - end} bytes"
            raise CheckpointError(f"{name}: tensor {shown(key)} {problem}, expected none; download it again")
        end += ref.nbytes
    if size > needed:
        raise CheckpointError(f"{name}: is {size} bytes, its header accounts for {needed}; download it again")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """A small safetensors file, of tensors of one dtype."""
    return _encode_header(tensors, None) + b"".join(bytes(byte_view(tensor)) for tensor in tensors.values())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears under its name only when it is complete and on the disk.

    tensors: by name, any dtype of DTYPES. Tensors are laid out by falling element size, then in the order given.
    Raises ResourceError if the disk is full; then nothing is left behind, and a file of that name stays as it was."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header = _encode_header({name: tensors[name] for name in order}, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with full_disk(path, f"no room for its {total} bytes; free some disk space"), replacing(path) as fd:
        pwrite_all(fd, memoryview(header), 0)
        at = len(header)
        for name in order:
            pwrite_all(fd, byte_view(tensors[name].detach().cpu().contiguous()), at)
            at += tensors[name].nbytes


class ShardWriter:
    """A safetensors file that is written tensor by tensor, in any order, and gets its name when it is complete.

    Use it in a with statement: what is not finished is taken away. One writer at a time may work on a path."""

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """specs: dtype, as safetensors spells it, and shape of each tensor. Raises ResourceError for a full disk."""
        self._path, self._temporary = path, partial_of(path)
        order = sorted(specs, key=lambda name: -DTYPES[specs[name][0]].itemsize)
        self._places: dict[str, tuple[int, int]] = {}
        self._unsettled = 0
        at = 0
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in order:
            dtype, shape = specs[name]
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            self._places[name] = (at, nbytes)
            at += nbytes
        header = _framed(entries)
        self._base, self.nbytes = len(header), len(header) + at
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._fd = os.open(self._temporary, flags, 0o666)
        try:
            with self._room():
                os.ftruncate(self._fd, self.nbytes)
                if hasattr(os, "posix_fallocate") and self.nbytes:
                    os.posix_fallocate(self._fd, 0, self.nbytes)
                pwrite_all(self._fd, memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def put(self, name: str, data: memoryview) -> None:
        """One tensor's bytes. Raises ResourceError for a full disk."""
        at, nbytes = self._places.pop(name)
        assert len(data) == nbytes, f"{len(data)} bytes for {name} of {nbytes}"
        with self._room():
            pwrite_all(self._fd, data, self._base + at)
            self._unsettled += nbytes
            if self._unsettled >= _SETTLED_AT_ONCE:
                os.fsync(self._fd)
                forget_cached(self._fd)
                self._unsettled = 0

    def finish(self) -> None:
        """All tensors are there: bring them to the disk, and give the file its name."""
        assert not self._places, f"{next(iter(self._places))} was never written"
        with self._room():
            os.fsync(self._fd)
            forget_cached(self._fd)
            os.replace(self._temporary, self._path)
            sync_folder(self._path.parent)

    def close(self) -> None:
        """Take away what is not finished."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _room(self) -> contextlib.AbstractContextManager[None]:
        return full_disk(self._path, f"no room for its {self.nbytes} bytes; free some disk space and start again")


def _encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    return _framed(entries)


def _framed(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padding keeps the data aligned to 8 bytes, as the format's own writer does.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
