"""The model to measure: loaded from a directory, or made up in a published shape, and what of it a token reads.

Knows how weights become an engine; does not know what is measured. Memory: the weights, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localmoe.backend import Backend
from localmoe.bench import synthetic
from localmoe.bench.on_gpus import OnGpus, bytes_per_token
from localmoe.bench.synthetic import Held, Source
from localmoe.engine import Engine
from localmoe.errors import ModelError
from localmoe.files import shown
from localmoe.kernels.native import Library
from localmoe.library import EMBEDDED, EMBEDDED_NAME
from localmoe.loader import load_weights, read_config
from localmoe.models.family import build, tensor_inventory
from localmoe.models.model import ModelConfig

Report = Callable[[str], None]
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Computing:
    """How to compute: dtype of activations, and the kernels, None for torch."""

    dtype: torch.dtype
    backend: Backend | None
    # The format of synthetic matrices, instead of the published ones.
    matrices: str | None = None

    @property
    def library(self) -> Library | None:
        """The compiled kernels; None computes in torch."""
        return self.backend.library if self.backend else None

    @property
    def held(self) -> Held:
        return Held(self.dtype, compact=self.backend is not None, matrices=self.matrices)


@dataclass(frozen=True)
class Subject:
    """A model to measure. pieces: the memory of its weights, of those in RAM; bytes_per_token: what of it decoding one
    token reads; gpus: what is on GPUs, None for nothing."""

    name: str
    engine: Engine
    backend: Backend | None
    pieces: tuple[Tensor, ...]
    bytes_per_token: int
    gpus: OnGpus | None = None

    @classmethod
    def of(cls, name: str, config: ModelConfig, get: Callable[[str], Source], computing: Computing) -> Subject:
        """Bind a model from its weights by published name."""
        weights = {tensor: get(tensor) for tensor in tensor_inventory(config)}
        pieces = tuple(piece for weight in weights.values() for piece in _memory_of(weight))
        engine = Engine(build(config, get, dtype=computing.dtype, backend=computing.backend))
        held = {tensor: weight.nbytes for tensor, weight in weights.items()}
        return cls(name, engine, computing.backend, pieces, bytes_per_token(config, held))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces) if self.gpus is None else self.gpus.nbytes


def directory_config(model: Path | None) -> ModelConfig:
    """The config of a model directory; None is the embedded model. Raises ModelError."""
    path = model or EMBEDDED
    if not path.is_dir():
        raise ModelError(f"{shown(path)} is not a directory; expected one with config.json and safetensors files")
    return read_config(path)


def open_directory(model: Path | None, computing: Computing, report: Report) -> Subject:
    """Load a model directory. Raises ModelError or ResourceError."""
    name = EMBEDDED_NAME if model is None else shown(model.resolve().name)
    compact = computing.held.compact
    progress = _percent(f"loading {name}", report)
    config, weights = load_weights(model or EMBEDDED, computing.dtype, compact=compact, progress=progress)
    return Subject.of(name, config, weights.get, computing)


def open_synthetic(name: str, config: ModelConfig, computing: Computing, report: Report) -> Subject:
    """Make up a model of a published shape; config: what synthetic.plan decided."""
    weights = synthetic.synthetic_weights(config, computing.held, progress=_percent(f"filling {name}", report))
    label = f"{name} synthetic, {config.num_layers} layers, {config.num_experts} experts"
    return Subject.of(label, config, weights.__getitem__, computing)


def _percent(doing: str, report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(f"{doing}: {100 * done // total} %")


def _memory_of(weight: Source) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scale)
