"""The importance matrix: how large the inputs of every matrix are on a text, so that rounding knows what matters.

For each matrix, by its published name, the sum over rows of the square of each input, and how many rows there were.
w3 of an expert has the inputs of w1, under whose name they are kept; a block-diagonal matrix has a row for each block.
Sums are float64, in memory and in the file, so that files of several texts add up. Knows names and files; does not know
how a model is run. Memory: 8 bytes for each input that was met, 0.54 GB for V4-Flash; half of that for rounding."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UsageError
from localmoe.files import pread_into, shown
from localmoe.loader import read_config
from localmoe.models.family import tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.safetensors_io import TensorRef, byte_view, open_with_metadata, write_safetensors

_VERSION = "1"
_COUNTS = "counts"
_MOST = 1 << 62
# Of the mean: what an input that was always 0 counts, or its weights could be rounded to anything.
_LEAST = 1e-4
_FLOAT32 = torch.finfo(torch.float32)
# w3 in the words of both families, and what its w1 is called.
_W3 = re.compile(r"(\.(?:ffn|mlp)(?:\.experts\.\d+|\.shared_experts)?)\.(w3|up_proj)\.weight$")
_W1_OF = {"w3": "w1", "up_proj": "gate_proj"}


def kept_under(name: str) -> str:
    """The name under which the inputs of a matrix are kept."""
    return _W3.sub(lambda found: f"{found[1]}.{_W1_OF[found[2]]}.weight", name)


def expert_of(name: str) -> str:
    """The routed expert that a w1 belongs to; other names stay."""
    return name.removesuffix(".w1.weight").removesuffix(".gate_proj.weight")


def columns(config: ModelConfig) -> dict[str, int]:
    """Inputs of each matrix that may be quantized, by the names they are kept under."""
    linear = {name: spec.shape[1] for name, spec in tensor_inventory(config).items() if spec.kind == "linear"}
    return {name: cols for name, cols in linear.items() if kept_under(name) == name}


def fingerprint(model: Path) -> str:
    """Tells models apart: of config.json and the shapes it implies. Raises ConfigError."""
    shapes = sorted(columns(read_config(model)).items())
    return hashlib.sha256((model / "config.json").read_bytes() + repr(shapes).encode()).hexdigest()


@dataclass
class Collected:
    """What a file holds. model: its fingerprint; texts: their digests.

    tokens: of the texts, read so far; rows: those and the BOS before each chunk; missed: experts no token has chosen.
    whole: False while a step is being added."""

    model: str
    texts: list[str]
    chunk: int
    missed: set[str]
    tokens: int = 0
    rows: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    whole: bool = True

    def add(self, found: Mapping[str, tuple[Tensor, int]], tokens: int, rows: int) -> None:
        """Add sums and counts of other rows."""
        self.whole = False
        for name, (total, count) in found.items():
            known = self.sums.get(name)
            self.sums[name] = total.double() if known is None else known.add_(total)
            self.counts[name] = self.counts.get(name, 0) + count
            self.missed.discard(expert_of(name))
        self.tokens, self.rows = self.tokens + tokens, self.rows + rows
        self.whole = True


def merge(paths: Sequence[Path]) -> Collected:
    """All of these added up. Raises UsageError for files of different models."""
    total = read(paths[0])
    for path in paths[1:]:
        one = read(path)
        if one.model != total.model:
            raise UsageError(f"{shown(path)} and {shown(paths[0])} are of different models; merge files of one model")
        odd = next((name for name, t in one.sums.items() if len(total.sums.get(name, t)) != len(t)), None)
        if odd is not None:
            raise _bad(path, f"has other inputs of {shown(odd)} than {shown(paths[0])}")
        if set(one.texts) & set(total.texts):
            raise UsageError(f"{shown(path)}: is of a text that another file has read too; leave one out")
        missed = total.missed & one.missed
        total.add({name: (one.sums[name], one.counts[name]) for name in one.sums}, one.tokens, one.rows)
        total.missed = missed
        total.texts += one.texts
        total.chunk = total.chunk if total.chunk == one.chunk else 0
    return total


def write(path: Path, found: Collected) -> None:
    """A safetensors file: sums [cols] F64 by name, and counts [n] I64 in the order of the sorted names.

    Appears under its name only when it is whole. Raises ResourceError for a full disk."""
    names = sorted(found.sums)
    tensors = {name: found.sums[name] for name in names}
    tensors[_COUNTS] = torch.tensor([found.counts[name] for name in names], dtype=torch.int64)
    facts = {
        "localmoe_imatrix": _VERSION,
        "model": found.model,
        "texts": json.dumps(found.texts),
        "chunk": str(found.chunk),
        "tokens": str(found.tokens),
        "rows": str(found.rows),
        "missed": json.dumps(sorted(found.missed)),
    }
    write_safetensors(path, tensors, facts)


def read(path: Path) -> Collected:
    """A file that write() made. Raises CheckpointError for anything else."""
    try:
        fd, refs, facts = open_with_metadata(path)
    except CheckpointError as problem:
        # They are written for files that were downloaded.
        text = str(problem).partition("; download")[0]
        raise CheckpointError(f"{text}; make it again with localmoe imatrix") from None
    try:
        found = _head(path, facts)
        counts = refs.pop(_COUNTS, None)
        names = sorted(refs)
        if counts is None or (counts.dtype, counts.shape) != ("I64", (len(names),)):
            raise _bad(path, "has no counts of its matrices")
        for name, count in zip(names, _tensor(fd, counts, torch.int64).tolist(), strict=True):
            found.sums[name] = _sums(path, fd, name, refs[name])
            if count <= 0:
                raise _bad(path, f"has {count} rows of {shown(name)}")
            found.counts[name] = count
    finally:
        os.close(fd)
    return found


def _head(path: Path, facts: Mapping[str, str]) -> Collected:
    if facts.get("localmoe_imatrix") != _VERSION:
        raise CheckpointError(f"{shown(path)}: is no importance matrix of this version; make it with localmoe imatrix")
    try:
        texts, missed = _texts(json.loads(facts["texts"])), _texts(json.loads(facts["missed"]))
        chunk, tokens, rows = (int(facts[name]) for name in ("chunk", "tokens", "rows"))
        model = facts["model"]
    except (KeyError, ValueError, RecursionError):
        raise _bad(path, "does not say what it was made of") from None
    if not all(0 <= number <= _MOST for number in (chunk, tokens, rows)):
        raise _bad(path, "has an impossible number of tokens")
    return Collected(model, texts, chunk, set(missed), tokens, rows)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("no list of texts")
    return value


def _sums(path: Path, fd: int, name: str, ref: TensorRef) -> Tensor:
    if ref.dtype != "F64" or len(ref.shape) != 1 or not ref.shape[0]:
        raise _bad(path, f"has {shown(name)} as {ref.dtype} with {len(ref.shape)} dimensions, expected a row of F64")
    total = _tensor(fd, ref, torch.float64)
    # NaN is not at least 0.
    if not bool((total >= 0).all()) or not bool(total.isfinite().all()):
        raise _bad(path, f"has sums of {shown(name)} that are negative or not finite")
    return total


def _tensor(fd: int, ref: TensorRef, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(ref.shape, dtype=dtype)
    pread_into(fd, byte_view(tensor), ref.offset, shown(ref.file), CheckpointError)
    return tensor


def _bad(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{shown(path)}: {problem}; make it again with localmoe imatrix")


class Importance:
    """What rounding asks. fingerprint: of the model; missed: its experts that no token has chosen, sorted."""

    def __init__(self, found: Collected) -> None:
        """Takes the sums out of `found`."""
        self.fingerprint, self.missed = found.model, sorted(found.missed)
        self._counts = found.counts
        self._means = {name: _mean(found.sums.pop(name), found.counts[name]) for name in list(found.sums)}

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Raises CheckpointError unless it is a file that localmoe imatrix made."""
        return cls(read(path))

    def check(self, model: Path) -> None:
        """Raises UsageError if it is of another model, or has other inputs than its matrices."""
        wanted = columns(read_config(model))
        odd = any(mean is not None and wanted.get(name) != len(mean) for name, mean in self._means.items())
        if odd or self.fingerprint != fingerprint(model):
            raise UsageError(f"the importance matrix is not of {shown(model)}; make one with localmoe imatrix")

    def of(self, name: str) -> Tensor | None:
        """Mean square of each input of a matrix, [cols] float32, positive and finite.

        None for a matrix that is not known, has seen no row, or nothing but zeros."""
        return self._means.get(kept_under(name))

    def digest(self) -> str:
        """Tells what it says apart."""
        found = hashlib.sha256()
        for name in sorted(self._means):
            mean = self._means[name]
            found.update(f"{name}\n".encode("utf-8", "backslashreplace"))
            found.update(b"" if mean is None else byte_view(mean))
        return found.hexdigest()

    def counts(self, name: str) -> int:
        """Rows that a matrix has seen."""
        return self._counts.get(kept_under(name), 0)


def _mean(total: Tensor, count: int) -> Tensor | None:
    mean = total / count
    if not mean.any():
        return None
    return mean.where(mean > 0, mean.mean() * _LEAST).clamp(_FLOAT32.tiny, _FLOAT32.max).float()
