"""Whether a quantized model is still what was written. Memory: one tensor at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError, ConfigError
from localmoe.files import read_json, shown
from localmoe.quantize.job import Progress
from localmoe.quantize.output import MOST_JSON, SIDECAR


def verify(folder: Path, progress: Progress | None = None) -> int:
    """Compare every tensor with the digest it was written with; returns how many there are.

    Raises ConfigError if the folder was not made by convert(), CheckpointError naming the first that differs."""
    digests = read_json(folder / SIDECAR, MOST_JSON, ConfigError).get("tensors")
    if not isinstance(digests, dict):
        raise ConfigError(f"{shown(folder / SIDECAR)}: has no digests; quantize the model again")
    count = 0
    with Checkpoint.open(folder) as checkpoint:
        total, done = sum(ref.nbytes for ref in checkpoint.refs.values()), 0
        expected = {name: digest for tensors in digests.values() for name, digest in tensors.items()}
        for name in sorted({*checkpoint.refs, *expected}):
            ref = checkpoint.refs.get(name)
            if ref is None or name not in expected:
                raise CheckpointError(f"{shown(folder)}: {name} is {'missing' if ref is None else 'not one of it'}")
            buffer = memoryview(bytearray(ref.nbytes))
            checkpoint.read_into(ref, buffer)
            if hashlib.sha256(buffer).hexdigest() != expected[name]:
                raise CheckpointError(f"{shown(ref.file)}: {name} is not what was written; copy or quantize it again")
            count, done = count + 1, done + ref.nbytes
            if progress:
                progress(done, total)
    return count
