"""A model directory into another, shard by shard, with some of its matrices in other formats.

Streams: in memory is one tensor at a time, never the model. A shard gets its name when it is whole and on the disk, and
config.json comes last, so a folder that was interrupted is no model, and the same command goes on with it. The same
source and recipe give the same bytes. Knows names through the model's inventory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError, FormatError
from localmoe.files import shown
from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.kernels import native
from localmoe.locks import lock
from localmoe.quantize import output, report, target
from localmoe.quantize.ahead import ahead
from localmoe.quantize.imatrix import Importance
from localmoe.quantize.job import Job, Matrix, Progress, Shard, prepare, signs_of
from localmoe.quantize.numbers import Decoder
from localmoe.quantize.recipe import Recipe
from localmoe.quantize.report import Measured
from localmoe.quantize.rounding import exactly, restored, searched
from localmoe.quantize.samples import read_matrix
from localmoe.quantize.signs import Signs
from localmoe.safetensors_io import ShardWriter, byte_view
from localmoe.spelling import tensors_of

# Tensors that may be ready before they are written: those of a matrix, and one of the next.
_AHEAD = 5
# A tensor of the output: its name, its bytes and, for the first of a matrix, what rounding it cost.
Part = tuple[str, memoryview, Measured | None]


def convert(
    source: Path, out: Path, recipe: Recipe, progress: Progress | None = None, importance: Importance | None = None
) -> dict[str, Any]:
    """prepare() and make(). importance: of the source's inputs."""
    with Checkpoint.open(source, passing=True) as checkpoint:
        return make(checkpoint, prepare(checkpoint, out, recipe, importance), progress)


def make(checkpoint: Checkpoint, job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Make the job's folder, or go on making it; returns the report.

    Raises UsageError for a folder that is of something else or being written, ResourceError for a disk without room,
    ModelError for a bad source."""
    target.check_target(job)
    target.make_folder(job.out)
    with contextlib.ExitStack() as held:
        held.callback(os.close, lock(job.out / target.LOCK))
        sidecar = target.finished(job)
        if sidecar is None:
            done = target.begun(job)
            target.check_room(job, done)
            found = _run(checkpoint, job, done, progress)
        else:
            found = _repair(job, sidecar)
        (job.out / target.PARTIAL).unlink(missing_ok=True)
        (job.out / target.LOCK).unlink(missing_ok=True)
        return found


def _repair(job: Job, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Write again what a finished folder lacks beside the shards; returns the report."""
    found: dict[str, Any] = sidecar["report"]
    beside = {signs_of(job.out / name).name for name in job.shards}
    signs = {name: facts for name, facts in sidecar["files"].items() if name in beside}
    lost = next((name for name, facts in signs.items() if target.size_of(job.out / name) != facts["nbytes"]), None)
    if lost is not None:
        raise CheckpointError(
            f"{shown(job.out)}: {shown(lost)} is missing or cut short; remove the folder, start again"
        )
    for name, data in output.beside(job, found, sidecar["tensors"], signs).items():
        size = target.size_of(job.out / name)
        # The card is for its owner to edit.
        if size != len(data) and not (name == output.CARD and size > 0):
            output.write(job.out / name, data)
    return found


def _run(checkpoint: Checkpoint, job: Job, done: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    written = sum(job.shards[name].nbytes for name in done)
    # Before the first shard has its name, so that it is known whose it is.
    output.write_json(job.out / target.PARTIAL, target.noted(job, done))
    for name, shard in job.shards.items():
        if name in done:
            continue
        tensors: dict[str, str] = {}
        measured: list[Measured] = []
        signs = Signs(job.source / name)
        parts = _parts(checkpoint, shard, Rounder(job, signs))
        if not isinstance(native.load(), str):
            # Without the compiled kernels a matrix takes minutes, for which an interruption would have to wait.
            parts = ahead(parts, _AHEAD)
        with ShardWriter(job.out / name, shard.specs) as writer, contextlib.closing(parts):
            for part, data, facts in parts:
                writer.put(part, data)
                tensors[part] = hashlib.sha256(data).hexdigest()
                measured += [] if facts is None else [facts]
                written += len(data)
                if progress:
                    progress(written, job.bytes_out)
            writer.finish()
        noted = [asdict(one) for one in measured]
        files = signs.write(job.out / name)
        done[name] = {"nbytes": writer.nbytes, "tensors": tensors, "measured": noted, "files": files}
        output.write_json(job.out / target.PARTIAL, target.noted(job, done))
    return output.finish(job, done)


def _parts(checkpoint: Checkpoint, shard: Shard, rounder: Rounder) -> Generator[Part]:
    """Every tensor of an output shard: its name, its bytes and, for the first of a packed matrix, what it cost."""
    for name, ref in shard.kept.items():
        buffer = memoryview(bytearray(ref.nbytes))
        checkpoint.read_into(ref, buffer)
        yield name, buffer, None
    for name, matrix in shard.packed.items():
        before = read_matrix(checkpoint, name, matrix.source, matrix.shape)
        try:
            packed, facts = rounder(name, matrix, before)
        except FormatError as problem:
            raise CheckpointError(f"{shown(matrix.source.ref.file)}: {name}: {problem}") from None
        for number, (part, tensor) in enumerate(tensors_of(name, packed).items()):
            yield part, byte_view(tensor), None if number else facts


class Rounder:
    """Rounds the matrices of a shard. signs: of their zeros, before and after."""

    def __init__(self, job: Job, signs: Signs) -> None:
        self._importance, self._signs = job.importance, signs
        self._before, self._after = Decoder(), Decoder()

    def __call__(self, name: str, matrix: Matrix, before: Tensor | QuantizedTensor) -> tuple[QuantizedTensor, Measured]:
        """A matrix in its new format, and what that cost. Raises CheckpointError for numbers that are not finite,
        FormatError for bytes that are no matrix of their format."""
        values = self._before(before)
        # The sum is a quicker look; it may overflow where no number is infinite.
        if not (values.sum().isfinite() or values.isfinite().all()):
            raise CheckpointError(
                f"{shown(matrix.source.ref.file)}: {name} has numbers that are not finite; download it again"
            )
        packed = self._rounded(name, matrix, before, values)
        formats = matrix.source_format, matrix.format
        return packed, report.measure(name, formats, (matrix.source.nbytes, matrix.nbytes), values, self._after(packed))

    def _rounded(self, name: str, matrix: Matrix, before: Tensor | QuantizedTensor, values: Tensor) -> QuantizedTensor:
        if isinstance(before, QuantizedTensor) and matrix.is_undone:
            return restored(before, self._signs.before.get(name))
        if isinstance(before, QuantizedTensor) and matrix.is_exact:
            self._signs.add(name, before)
            return exactly(before)
        importance = None if self._importance is None else self._importance.of(name)
        return searched(values, FORMATS[matrix.format], importance, before)
