"""Whether a quantized model is still what was written. Memory: one tensor or small file at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError, ConfigError
from localmoe.files import open_regular, read_json, shown
from localmoe.quantize.job import Progress
from localmoe.quantize.output import MOST_JSON, SIDECAR, spec_text
from localmoe.safetensors_io import TensorRef


@dataclass(frozen=True)
class Verified:
    """How many were compared. files: None for a folder of an earlier version, which noted tensors only."""

    tensors: int
    files: int | None


def verify(folder: Path, progress: Progress | None = None) -> Verified:
    """Compare every tensor and file with what was noted when it was written.

    Raises ConfigError if the folder was not made by convert(), CheckpointError naming the first that differs."""
    sidecar = read_json(folder / SIDECAR, MOST_JSON, ConfigError)
    digests, specs, files = sidecar.get("tensors"), sidecar.get("specs", {}), sidecar.get("files")
    if not (_texts(specs) and isinstance(digests, dict) and all(map(_texts, digests.values()))):
        raise ConfigError(f"{shown(folder / SIDECAR)}: has no digests; quantize the model again")
    if files is not None:
        _verify_files(folder, files)
    expected = {name: digest for tensors in digests.values() for name, digest in tensors.items()}
    return Verified(_verify_tensors(folder, expected, specs, progress), None if files is None else len(files))


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _verify_files(folder: Path, files: Any) -> None:
    """Before the tensors: it takes no time, and without the right index there is no right tensor."""
    if not isinstance(files, dict):
        raise ConfigError(f"{shown(folder / SIDECAR)}: has no list of files; quantize the model again")
    for name, expected in files.items():
        # A name in a file becomes no path.
        if name != Path(name).name:
            raise ConfigError(f"{shown(folder / SIDECAR)}: names the file {shown(name)}; quantize the model again")
        if _noted(folder / name) != expected:
            raise CheckpointError(f"{shown(folder / name)}: is not what was written; copy or quantize it again")


def _noted(path: Path) -> dict[str, Any]:
    """As output.noted(), of a file of any size."""
    fd, size = open_regular(path, CheckpointError)
    with os.fdopen(fd, "rb") as file:
        return {"nbytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify_tensors(
    folder: Path, expected: Mapping[str, str], specs: Mapping[str, str], progress: Progress | None
) -> int:
    with Checkpoint.open(folder) as checkpoint:
        total, done = sum(ref.nbytes for ref in checkpoint.refs.values()), 0
        names = sorted({*checkpoint.refs, *expected})
        for name in names:
            ref = checkpoint.refs.get(name)
            if ref is None or name not in expected:
                problem = "is missing" if ref is None else "is not one of it"
                raise CheckpointError(f"{shown(folder)}: {shown(name)} {problem}; copy or quantize it again")
            if not _is(checkpoint, ref, expected[name], specs.get(name)):
                raise CheckpointError(
                    f"{shown(ref.file)}: {shown(name)} is not what was written; copy or quantize it again"
                )
            done += ref.nbytes
            if progress:
                progress(done, total)
    return len(names)


def _is(checkpoint: Checkpoint, ref: TensorRef, digest: str, spec: str | None) -> bool:
    if spec not in (None, spec_text(ref.dtype, ref.shape)):
        return False
    buffer = memoryview(bytearray(ref.nbytes))
    checkpoint.read_into(ref, buffer)
    return hashlib.sha256(buffer).hexdigest() == digest
