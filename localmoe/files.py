"""Files we did not write: opened only if regular, read only up to a limit, their text made safe to print. And files
that we do write: whole under their name, or not there.

Owns the limits on JSON. Knows nothing of models. Everything read here is data: no name in it becomes a path."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

from localmoe.errors import LocalMoeError, ModelError, ResourceError

MIB = 1 << 20
# Bounds the memory of a parsed document; the V4-Pro index, the largest we know, has 0.15 million values.
MAX_JSON_VALUES = 2_000_000
# What a write without room fails with: no space, no quota, or a longer file than the system lets us have.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Where what was measured is kept for later runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localmoe"


def sized(nbytes: int) -> str:
    """A number of bytes for people: 9.8 MiB, 149.21 GiB."""
    return f"{nbytes / (1 << 30):.2f} GiB" if abs(nbytes) >= (1 << 30) / 10 else f"{nbytes / MIB:.1f} MiB"


def shown(text: object, limit: int = 120) -> str:
    """Text from a file, fit for a message: control and invisible characters escaped, long text cut.

    Lists and objects are only named, because their text could be as deep or long as the file."""
    if isinstance(text, (list, tuple, dict)):
        return "an object" if isinstance(text, dict) else f"a list of {len(text)}"
    if isinstance(text, (bool, type(None))):
        return json.dumps(text)
    raw = str(text)
    safe = repr(raw[:limit])[1:-1]
    return safe + ("..." if len(raw) > limit else "")


def open_regular(path: Path, error: type[ModelError]) -> tuple[int, int]:
    """Open a regular file for reading; returns (descriptor, size in bytes). Pipes and devices never block us.

    Raises `error` when the file cannot be opened or is not a regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as cause:
        raise error(f"{shown(path)}: cannot be opened ({cause.strerror}); check the path and its permissions") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise error(f"{shown(path)}: is not a regular file; expected a file of a model directory")
    return fd, info.st_size


def pread_into(fd: int, buffer: memoryview, offset: int, name: str, error: type[ModelError]) -> None:
    """Fill `buffer` from `offset`, however many reads it takes. Raises `error` naming the file if it ends early."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as cause:
            raise error(f"{name}: reading at byte {offset + done} failed ({cause.strerror}); check the disk") from None
        if count == 0:
            raise error(
                f"{name}: ends at byte {offset + done}, expected {len(buffer) - done} more (truncated while in use?); "
                "download the file again"
            )
        done += count


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however many writes it takes. Raises OSError."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def sync_folder(path: Path) -> None:
    """A rename survives a power cut only once its folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_cached(fd: int) -> None:
    """Let the system use the memory it keeps a file in, where it can be told: a model read or written once would drive
    out everything else. What is not on the disk yet stays."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def partial_of(path: Path) -> Path:
    """What a file is called until it is complete, for one writer at a time; the next on that path writes over it."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def full_disk(path: Path, problem: str = "the disk is full; free some disk space") -> Iterator[None]:
    """Where what is written finds no room, raises ResourceError: the path and the problem."""
    try:
        yield
    except OSError as cause:
        if cause.errno in FULL:
            raise ResourceError(f"{shown(path)}: {problem}") from None
        raise


@contextlib.contextmanager
def replacing(path: Path, *, temporary: Path | None = None, mode: int = 0o666) -> Iterator[int]:
    """Descriptor of an empty file that gets its name when the block ends: then it is complete, and there to stay.

    temporary: where it is until then, for one writer at a time; by default a name that nobody else uses.
    Raises OSError. Whatever is raised, a file of that name stays as it was, and nothing else is left."""
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        fd = os.open(temporary, flags, mode)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | bytearray, *, temporary: Path | None = None) -> None:
    """As replacing(), of bytes that are there already."""
    with replacing(path, temporary=temporary) as fd:
        pwrite_all(fd, memoryview(data), 0)


def read_bytes(path: Path, max_bytes: int, error: type[ModelError]) -> bytearray:
    """A regular file of at most max_bytes. Raises `error` on anything else."""
    fd, size = open_regular(path, error)
    try:
        if size > max_bytes:
            raise error(f"{shown(path)}: is {size} bytes, expected at most {max_bytes}; it is not a file of this kind")
        raw = bytearray(size)
        pread_into(fd, memoryview(raw), 0, shown(path), error)
    finally:
        os.close(fd)
    return raw


def read_json(path: Path, max_bytes: int, error: type[ModelError]) -> dict[str, Any]:
    """Parse a JSON object from a file of at most max_bytes. Raises `error` on anything else."""
    return parse_json(read_bytes(path, max_bytes, error), shown(path), error)


def parse_json(
    raw: bytes | bytearray, source: str, error: type[LocalMoeError], remedy: str = "download it again"
) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, bounded count and depth.

    Python's own parser accepts the first three silently. Raises `error` naming `source`."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_JSON_VALUES:
        raise error(f"{source}: holds more than {MAX_JSON_VALUES} JSON values; it is not a file of this kind")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise error(f"{source}: JSON is nested too deeply; expected a few levels; {remedy}") from None
    except ValueError as cause:
        raise error(f"{source}: is not valid JSON ({shown(cause)}); {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{source}: holds {shown(value)}, expected a JSON object; {remedy}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice, 60)} appears twice")
    return result


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number")
