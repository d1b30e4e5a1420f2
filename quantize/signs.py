"""The signs of zeros. FP4 has a negative one, integers have not: int8 needs them to become the published bytes again.

For each shard that has any, a file of its own beside it, which nothing else has to read: one bit for each zero of a
matrix, in order. Memory: the bits of one shard, about a fiftieth of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError
from localmoe.files import read_json, shown
from localmoe.formats import QuantizedTensor
from localmoe.kernels import native, rounding
from localmoe.quantize import output
from localmoe.quantize.job import signs_of
from localmoe.safetensors_io import encode, open_shard


class Signs:
    """Of the matrices of one shard. before: of the source, by published name."""

    def __init__(self, shard: Path) -> None:
        """shard: of the source. Raises CheckpointError for a file beside it that cannot be read."""
        self.before = _read(signs_of(shard))
        self._found: dict[str, Tensor] = {}

    def add(self, name: str, weight: QuantizedTensor) -> None:
        """Keep those of an FP4 matrix."""
        library = native.load()
        signs = (rounding if isinstance(library, str) else library).zero_signs(weight.data)
        if signs.any():
            self._found[name] = signs.clone()

    def write(self, shard: Path) -> dict[str, Any]:
        """Beside a shard of the output; returns {file name: what the sidecar notes of it}. Raises ResourceError."""
        if not self._found:
            return {}
        path, data = signs_of(shard), encode(self._found)
        output.write(path, data)
        return {path.name: output.noted(data)}


def _read(path: Path) -> dict[str, Tensor]:
    if not os.path.lexists(path):
        return {}
    fd, refs = open_shard(path)
    with contextlib.closing(Checkpoint(path.parent, {path: fd}, refs)) as file:
        odd = next((name for name, ref in refs.items() if ref.dtype != "U8" or len(ref.shape) != 1), None)
        if odd is not None:
            raise CheckpointError(
                f"{shown(path)}: {shown(odd)} is {refs[odd].dtype}, expected bits in U8; copy it again"
            )
        return {name: file.read(ref) for name, ref in refs.items()}


def check_source(source: Path, shards: Iterable[str]) -> None:
    """Raises CheckpointError if a file of signs that was written beside these shards is not there any more."""
    if not (source / output.SIDECAR).exists():
        return
    noted = read_json(source / output.SIDECAR, output.MOST_JSON, CheckpointError).get("files")
    for shard in shards:
        path = signs_of(source / shard)
        if isinstance(noted, dict) and path.name in noted and not path.exists():
            raise CheckpointError(
                f"{shown(path)}: is missing, and with it the signs of zeros that the published bytes have; copy it too"
            )
