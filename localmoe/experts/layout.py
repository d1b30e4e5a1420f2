"""Where the bytes of every routed expert lie in files, and where they come to lie in a slot.

Knows offsets, shapes and formats; reads nothing. Reads past the page cache must begin and end at whole blocks of the
disk, so a range of a file is read with the rest of its first and last block, to a place in the slot that has the same
distance from a block: nothing is copied afterwards, and a file is used as it was downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.files import shown
from localmoe.formats import QuantizedTensor, WeightFormat
from localmoe.safetensors_io import DTYPES, TensorRef

BLOCK = 4096


@dataclass(frozen=True)
class Matrix:
    """One of an expert's matrices as it is stored: plain (no format), or data and scale."""

    shape: tuple[int, int]
    dtype: torch.dtype
    format: WeightFormat | None = None
    scale_dtype: torch.dtype | None = None

    def parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor it consists of."""
        if self.format is None or self.scale_dtype is None:
            return [(self.shape, self.dtype)]
        data, scale = self.format.data_shape(*self.shape), self.format.scale_shape(*self.shape)
        return [(data, self.dtype), (scale, self.scale_dtype)]

    def bind(self, tensors: Sequence[Tensor]) -> Tensor | QuantizedTensor:
        """The weight those tensors are. Raises FormatError for scales that no quantizer writes."""
        return tensors[0] if self.format is None else self.format.bind(tensors[0], tensors[1], self.shape)


# w1, w2 and w3.
Kind = tuple[Matrix, Matrix, Matrix]


def kind_bytes(kind: Kind) -> list[int]:
    """Bytes of each tensor of an expert, in the order of w1, w2, w3, data before scale."""
    return [math.prod(shape) * dtype.itemsize for matrix in kind for shape, dtype in matrix.parts()]


@dataclass(frozen=True)
class Range:
    """Whole blocks of a file: nbytes at offset of files[file], to `at` bytes from the beginning of the slot.

    needed: how many of them there must be; the last block of a file may be cut short."""

    file: int
    offset: int
    nbytes: int
    at: int
    needed: int


@dataclass(frozen=True)
class Place:
    """How an expert is read, and where in the slot each of its tensors then begins."""

    ranges: tuple[Range, ...]
    begins: tuple[int, ...]


Locate = Callable[[int, int], Sequence[TensorRef]]


class Layout:
    """Every routed expert of a model. The experts of a layer are of one kind."""

    def __init__(self, kinds: Sequence[Kind], num_experts: int, locate: Locate) -> None:
        """kinds: of each layer. locate(layer, expert): its tensors in the order of kind_bytes."""
        self.kinds, self.num_experts = tuple(kinds), num_experts
        self._locate = locate
        self._files: dict[Path, int] = {}
        self._places: dict[tuple[int, int], Place] = {}
        # Each tensor may lie apart from the others, and begin and end within a block.
        self.slot_bytes = max(sum(_blocks(nbytes) + 2 * BLOCK for nbytes in kind_bytes(kind)) for kind in kinds)

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def files(self) -> list[Path]:
        """Files by their number in a Range; more may follow as places are asked for."""
        return list(self._files)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert."""
        return max(sum(kind_bytes(kind)) for kind in self.kinds)

    @property
    def total_bytes(self) -> int:
        return sum(sum(kind_bytes(kind)) for kind in self.kinds) * self.num_experts

    def place(self, layer: int, expert: int) -> Place:
        """How to read an expert."""
        found = self._places.get((layer, expert))
        if found is None:
            found = self._places[layer, expert] = self._arrange(self._locate(layer, expert))
        return found

    def _arrange(self, refs: Sequence[TensorRef]) -> Place:
        ranges: list[Range] = []
        begins = [0] * len(refs)
        at = 0
        order = sorted(range(len(refs)), key=lambda i: (str(refs[i].file), refs[i].offset))
        for group in _neighbours(refs, order):
            first, last = refs[group[0]], refs[group[-1]]
            start, end = first.offset // BLOCK * BLOCK, last.offset + last.nbytes
            file = self._files.setdefault(first.file, len(self._files))
            ranges.append(Range(file, start, _blocks(end - start), at, end - start))
            for i in group:
                begins[i] = at + refs[i].offset - start
            at += _blocks(end - start)
        assert at <= self.slot_bytes, f"an expert needs {at} bytes of a slot of {self.slot_bytes}"
        return Place(tuple(ranges), tuple(begins))


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def _neighbours(refs: Sequence[TensorRef], order: Sequence[int]) -> list[list[int]]:
    """Tensors, in order of file and offset, in groups with less than a block between them."""
    groups: list[list[int]] = []
    for i in order:
        previous = refs[groups[-1][-1]] if groups else None
        near = previous is not None and previous.file == refs[i].file
        if previous is not None and near and 0 <= refs[i].offset - previous.offset - previous.nbytes < BLOCK:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def check_aligned(ref: TensorRef) -> None:
    """Raises CheckpointError for a tensor whose numbers would not lie at whole addresses in a slot."""
    size = DTYPES[ref.dtype].itemsize
    if ref.offset % size:
        raise CheckpointError(
            f"{shown(ref.file)}: has {ref.dtype} numbers at byte {ref.offset}, no multiple of {size}, so its experts "
            "cannot be read from disk as they are; write the file again with safetensors"
        )
