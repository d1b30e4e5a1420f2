"""Matrices of a checkpoint, and samples of their rows to measure formats on.

Reads tensors; knows no names. Memory: one matrix at a time, of which a sample keeps some rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError, FormatError
from localmoe.files import shown
from localmoe.formats import QuantizedTensor
from localmoe.quantize.imatrix import Importance
from localmoe.quantize.numbers import Decoder
from localmoe.spelling import Source


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix [rows, cols] in float32, and the importance of its inputs [cols], if that is known."""

    values: Tensor
    importance: Tensor | None


def read_matrix(checkpoint: Checkpoint, name: str, source: Source, shape: tuple[int, int]) -> Tensor | QuantizedTensor:
    """A [rows, cols] matrix as it is stored. Raises CheckpointError for scales that no quantizer writes."""
    data = checkpoint.read(source.ref)
    if source.format is None or source.scale is None:
        return data
    try:
        return source.format.bind(data, checkpoint.read(source.scale), shape)
    except FormatError as problem:
        raise CheckpointError(f"{shown(source.ref.file)}: {name}: {problem}; download it again") from None


def take(weight: Tensor | QuantizedTensor, rows: int, importance: Tensor | None) -> Sample:
    """About so many rows of a matrix, evenly spaced."""
    values = Decoder()(weight)
    return Sample(values[:: max(len(values) // rows, 1)].clone(), importance)


def of_experts(
    checkpoint: Checkpoint, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, int]],
    experts: Sequence[Sequence[str]], count: int, rows: int, importance: Importance | None,
) -> list[Sample]:  # fmt: skip
    """Some rows of each matrix of `count` experts, evenly spaced. experts: names of the matrices of each."""
    picked = [experts[i * len(experts) // min(count, len(experts))] for i in range(min(count, len(experts)))]
    return [
        take(read_matrix(checkpoint, name, sources[name], shapes[name]), rows,
             None if importance is None else importance.of(name))
        for names in picked
        for name in names
    ]  # fmt: skip


def error(pairs: Iterable[tuple[Sample, Tensor]], *, weighted: bool) -> float:
    """Of samples and what they were rounded to: the sum of squared differences over that of the squares.

    weighted: each square times the importance of its input, where that is known."""
    off, size = 0.0, 0.0
    for sample, rounded in pairs:
        known = weighted and sample.importance is not None
        weights = sample.importance.double() if known and sample.importance is not None else torch.ones(1).double()
        values = sample.values.double()
        off += float(((rounded.double() - values).square() * weights).sum())
        size += float((values.square() * weights).sum())
    return off / size if size else 0.0
