"""A file of JSON lines that is only ever appended to: one line per finished turn, each with a digest of all so far.

Knows lines and their digests; does not know what they say. A process that dies while it writes loses at most that
line: a last line without its end is left out when read, and cut off by the next append. Memory: the file, which is
bounded, and what it parses to."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError, UsageError
from localmoe.files import MIB, parse_json, pwrite_all, read_bytes, shown, sync_folder

# A million tokens are 4 MB of text; the rest is for turns that were taken back.
MAX_BYTES = 64 * MIB
_START = hashlib.sha256(b"localmoe transcript 1\n").hexdigest()
# The last thing in every line, so that what it covers is simply what is before it.
_CHECK = re.compile(rb'(?P<body>\{.*), "check": "(?P<check>[0-9a-f]{64})"\}', re.DOTALL)


@dataclass(frozen=True)
class Transcript:
    """lines: as they were appended. nbytes: of the whole lines. tail: the last digest, which stands for all of it.

    torn: whether an incomplete line follows."""

    lines: tuple[dict[str, Any], ...] = ()
    nbytes: int = 0
    tail: str = _START
    torn: bool = False


def read(path: Path) -> Transcript:
    """All whole lines. Raises CheckpointError if a line is not as it was written, or lines are missing before it."""
    raw = read_bytes(path, MAX_BYTES, CheckpointError)
    *whole, rest = bytes(raw).split(b"\n")
    lines, tail = [], _START
    for number, text in enumerate(whole, 1):
        found = _CHECK.fullmatch(text)
        if found is None or _next(tail, found["body"]) != found["check"].decode():
            raise CheckpointError(
                f"{shown(path)}: line {number} is damaged or was changed by hand; start a new session"
            )
        lines.append(parse_json(text, f"{shown(path)}: line {number}", CheckpointError))
        tail = found["check"].decode()
    return Transcript(tuple(lines), len(raw) - len(rest), tail, bool(rest))


def append(path: Path, before: Transcript, line: Mapping[str, Any]) -> Transcript:
    """Add a line to the file that `before` was read from; it is on the disk when this returns. One writer at a time.

    Raises UsageError if the line cannot be written as JSON or the file would become too long, and OSError; then the
    file holds what it held."""
    try:
        body = json.dumps(line, ensure_ascii=False, allow_nan=False).removesuffix("}").encode()
    except (ValueError, TypeError, RecursionError) as cause:
        raise UsageError(f"the conversation cannot be saved: {shown(cause)}") from None
    tail = _next(before.tail, body)
    data = body + f', "check": "{tail}"}}\n'.encode()
    after = Transcript((*before.lines, json.loads(data)), before.nbytes + len(data), tail)
    if after.nbytes > MAX_BYTES:
        raise UsageError(
            f"{shown(path)}: would have {after.nbytes} bytes, expected at most {MAX_BYTES}; start a new one"
        )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, before.nbytes)
        pwrite_all(fd, memoryview(data), before.nbytes)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, before.nbytes)
        raise
    finally:
        os.close(fd)
    if not before.nbytes:
        sync_folder(path.parent)
    return after


def _next(tail: str, body: bytes) -> str:
    return hashlib.sha256(tail.encode() + body).hexdigest()
