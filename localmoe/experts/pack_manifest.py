"""The manifest of a pack: whose experts its records are, and in which files they lie.

Record number layer * experts + expert lies in file number modulo files. pack.json is written last, so that a pack that
has one is whole. Knows names and numbers; does not read records."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError
from localmoe.experts.layout import BLOCK, Range
from localmoe.files import MIB, read_json, shown

MANIFEST = "pack.json"
VERSION = 1
MAX_STRIPES = 64
MAX_JSON = 16 * MIB
AGAIN = "delete it and run localmoe pack again"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def stripe_name(number: int, count: int) -> str:
    """Of the file number `number` of a pack of so many."""
    return f"experts-{number}-of-{count}.lmpack"


@dataclass(frozen=True)
class Manifest:
    """A pack.json that has been checked by itself."""

    fingerprint: str
    num_layers: int
    num_experts: int
    kinds: list[Any]
    record_bytes: int
    files: tuple[Path, ...]
    crc32: list[int]

    def stripe_bytes(self, number: int) -> int:
        """Bytes of a file that is whole."""
        return stripe_records(len(self.crc32), number, len(self.files)) * self.record_bytes

    def range(self, number: int) -> Range:
        """Where a record lies, by the number of its file among `files`."""
        offset = number // len(self.files) * self.record_bytes
        return Range(number % len(self.files), offset, self.record_bytes, 0, self.record_bytes)


def stripe_records(total: int, number: int, count: int) -> int:
    """Records that lie in one of `count` files."""
    return (total - number + count - 1) // count


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError for a pack.json that localmoe did not write."""
    path = folder / MANIFEST
    found = read_json(path, MAX_JSON, CheckpointError)
    values = {"version", "fingerprint", "num_layers", "num_experts", "kinds", "record_bytes", "files", "crc32"}
    if found.get("version") != VERSION or set(found) != values:
        raise CheckpointError(
            f"{shown(path)}: is of version {shown(found.get('version'))}, expected {VERSION}; {AGAIN}"
        )
    layers, experts, record_bytes, crc32 = (found[k] for k in ("num_layers", "num_experts", "record_bytes", "crc32"))
    sound = (
        all(type(value) is int and 0 < value < 1 << 40 for value in (layers, experts, record_bytes))
        and record_bytes % BLOCK == 0
        and isinstance(found["kinds"], list)
        and is_digest(found["fingerprint"])
        and is_crc32(crc32)
        and len(crc32) == layers * experts
    )
    if not sound:
        raise CheckpointError(f"{shown(path)}: contradicts itself; {AGAIN}")
    files = _files(folder, found["files"])
    manifest = Manifest(found["fingerprint"], layers, experts, found["kinds"], record_bytes, files, crc32)
    if [entry["nbytes"] for entry in found["files"]] != [manifest.stripe_bytes(i) for i in range(len(files))]:
        raise CheckpointError(f"{shown(path)}: its files have not the sizes of its records; {AGAIN}")
    return manifest


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_crc32(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 32 for value in values)


def _files(folder: Path, entries: Any) -> tuple[Path, ...]:
    """The files' paths. The first lies beside the manifest; of the others only whole paths to such names are taken."""
    count = len(entries) if isinstance(entries, list) else 0
    files = []
    for i, entry in enumerate(entries if 0 < count <= MAX_STRIPES else [None]):
        path = entry.get("path") if isinstance(entry, dict) and set(entry) == {"path", "nbytes"} else None
        whole = isinstance(path, str) and os.path.isabs(path) and os.path.normpath(path) == path and "\0" not in path
        if not isinstance(path, str) or os.path.basename(path) != stripe_name(i, count) or whole != (i > 0):
            raise CheckpointError(
                f"{shown(folder / MANIFEST)}: names the file {shown(path)}, expected {stripe_name(i, count)}; {AGAIN}"
            )
        if i == 0 and path != stripe_name(0, count):
            raise CheckpointError(f"{shown(folder / MANIFEST)}: names {shown(path)}, expected a plain name; {AGAIN}")
        files.append(folder / path)
    return tuple(files)
