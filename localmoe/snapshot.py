"""A session as a file: a JSON head, raw tensors and a digest over both. Nothing in it can run.

Knows tensors and plain facts; does not know what they mean. Written and read tensor by tensor, so that no second copy
of them is in memory. A file asks for no more memory than its own size, whatever its head says."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.files import MIB, full_disk, open_regular, parse_json, partial_of, replacing
from localmoe.safetensors_io import byte_view

VERSION = 2
MAGIC = b"localmoe session %d\n" % VERSION
# V4-Pro with eight marks has 2,800 tensors, 0.15 MiB of head.
MAX_HEAD = 4 * MIB
# Small enough to be digested from the processor's cache right after it was read.
_CHUNK = MIB
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int64)}
_DIGEST = 32

# dtype and shape of a tensor.
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """facts: JSON values. tensors: float32, bf16 or int64, any layout; not copied."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """What a file says it holds. Not to be believed before read_tensors() has seen the digest."""

    facts: dict[str, Any]
    tensors: dict[str, Spec]
    raw: bytes


def write(file: BinaryIO, snapshot: Snapshot) -> None:
    """Write it from the file's place on. Memory: a copy of one tensor, and only if that is not contiguous."""
    head = _encoded_head(snapshot)
    digest = hashlib.sha256()
    for part in (memoryview(head), *(byte_view(t.contiguous()) for t in snapshot.tensors.values())):
        for at in range(0, len(part), _CHUNK):
            piece = part[at : at + _CHUNK]
            digest.update(piece)
            file.write(piece)
    file.write(digest.digest())


def stored_nbytes(snapshot: Snapshot) -> int:
    """Size of the file in bytes."""
    return len(_encoded_head(snapshot)) + sum(t.nbytes for t in snapshot.tensors.values()) + _DIGEST


def write_file(path: Path, snapshot: Snapshot) -> None:
    """A file for its owner only, under its name only when it is complete and on the disk. One writer at a time.

    Raises ResourceError if there is no room for it, and OSError; then a file of that name stays as it was."""
    problem = f"no room for its {stored_nbytes(snapshot)} bytes; free some disk space"
    with (
        full_disk(path, problem),
        replacing(path, temporary=partial_of(path), mode=0o600) as fd,
        os.fdopen(fd, "wb", closefd=False) as file,
    ):
        write(file, snapshot)


def open_file(path: Path) -> BinaryIO:
    """Open a snapshot for reading. Raises CheckpointError if it is not a regular file or not there."""
    fd, _size = open_regular(path, CheckpointError)
    return os.fdopen(fd, "rb", buffering=0)


def read_head(file: BinaryIO) -> Head:
    """The first part of a file that is just a snapshot, without its tensors.

    Raises CheckpointError unless the sizes that the head gives add up to the file's."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = _take(file, len(MAGIC) + 8)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if not start.startswith(MAGIC) or length > min(MAX_HEAD, size):
        raise _damaged()
    text = _take(file, length)
    head = parse_json(text, "saved session", CheckpointError)
    facts, tensors = head.get("facts"), _specs(head.get("tensors"))
    nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
    if not isinstance(facts, dict) or len(start) + length + nbytes + _DIGEST != size:
        raise _damaged()
    return Head(facts, tensors, bytes(start + text))


def read_tensors(file: BinaryIO, head: Head) -> Snapshot:
    """The rest of a file whose head was just read. Raises CheckpointError unless every byte is as it was written."""
    digest = hashlib.sha256(head.raw)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in head.tensors.items()}
    for tensor in tensors.values():
        view = byte_view(tensor)
        for at in range(0, len(view), _CHUNK):
            piece = view[at : at + _CHUNK]
            _fill(file, piece)
            digest.update(piece)
    if bytes(_take(file, _DIGEST)) != digest.digest():
        raise _damaged()
    return Snapshot(head.facts, tensors)


def pack(snapshot: Snapshot) -> bytes:
    """The file's bytes."""
    file = io.BytesIO()
    write(file, snapshot)
    return file.getvalue()


def unpack(data: bytes) -> Snapshot:
    """What pack() was given. Raises CheckpointError unless every byte is as it was written."""
    file = io.BytesIO(data)
    return read_tensors(file, read_head(file))


def prefix_digests(ids: Sequence[int], lengths: Iterable[int]) -> dict[int, str]:
    """sha256 of the first n token ids, for each n of `lengths` that there are so many of. One pass over the ids."""
    digest, done, found = hashlib.sha256(), 0, {}
    for length in sorted(set(lengths)):
        if length > len(ids):
            break
        digest.update(array("q", ids[done:length]).tobytes())
        found[length], done = digest.hexdigest(), length
    return found


def _encoded_head(snapshot: Snapshot) -> bytes:
    index = [[name, str(t.dtype), list(t.shape)] for name, t in snapshot.tensors.items()]
    head = json.dumps({"facts": snapshot.facts, "tensors": index}).encode()
    assert len(head) <= MAX_HEAD, f"{len(head)} bytes of head could not be read again"
    return MAGIC + len(head).to_bytes(8, "little") + head


def _specs(index: Any) -> dict[str, Spec]:
    """Raises CheckpointError unless index is a list of [name, dtype, shape]."""
    specs: dict[str, Spec] = {}
    for entry in index if isinstance(index, list) else [None]:
        match entry:
            case [str(name), str(dtype), list(shape)] if dtype in _DTYPES and name not in specs and _naturals(shape):
                specs[name] = (_DTYPES[dtype], tuple(shape))
            case _:
                raise _damaged()
    return specs


def _naturals(shape: list[Any]) -> bool:
    return len(shape) <= 4 and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)


def _take(file: BinaryIO, count: int) -> bytearray:
    """Exactly so many bytes."""
    data = bytearray(count)
    _fill(file, memoryview(data))
    return data


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            # BinaryIO does not promise it, but files and BytesIO have it.
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        except OSError as cause:
            raise CheckpointError(f"reading the saved session failed ({cause.strerror}); check the disk") from None
        if not count:
            raise _damaged()
        done += count


def _damaged() -> CheckpointError:
    return CheckpointError("the saved session is damaged or not one of this version; start a new one")
