"""From a model directory to weights in memory: every tensor is matched and checked first, then read exactly once.

Quantized matrices stay quantized. Memory: the weights in their final form, plus one tensor while its dtype changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.config import load_config
from localmoe.device import available_memory, resident_memory
from localmoe.errors import CheckpointError, FormatError, ResourceError
from localmoe.expert_layout import layout_of
from localmoe.experts.layout import Layout
from localmoe.files import shown
from localmoe.formats import QuantizedTensor
from localmoe.matching import match
from localmoe.memory import Arena
from localmoe.models.family import config_of, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.shares import device_of, shares_of
from localmoe.models.tensors import TensorSpec, is_routed
from localmoe.safetensors_io import DTYPES
from localmoe.spelling import Source
from localmoe.spread import CPU, Gpu, Share

Progress = Callable[[int, int], None]
Empty = Callable[..., Tensor]
# What a model needs beside its weights, at least, before it is worth keeping all of them in memory.
WORKING_BYTES = 256 << 20


class Weights:
    """A model's tensors by their published names."""

    def __init__(self, tensors: Mapping[str, Tensor | QuantizedTensor]) -> None:
        self._tensors = tensors

    def get(self, name: str) -> Tensor | QuantizedTensor:
        """The tensor of that published name. Raises KeyError for a name outside the model's inventory."""
        return self._tensors[name]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


def read_config(path: Path) -> ModelConfig:
    """The config of a model directory. Raises ConfigError."""
    return config_of(load_config(path), shown(path / "config.json"))


@dataclass(frozen=True)
class Later:
    """How a tensor is read: where it is, and what it is held in."""

    spec: TensorSpec
    source: Source
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Loaded:
    """A model directory in memory; layout: where its routed experts lie, if they stay in the files.

    files: size and (device, inode) of each file when its header was read. shares: what of it is on GPUs.
    on_gpus: matrices of routed experts that have room there, to be read by read_later(). done: bytes read so far, of
    those that progress counts. prompt_tokens: most of a prompt in one step."""

    config: ModelConfig
    weights: Weights
    layout: Layout | None
    files: dict[Path, tuple[int, tuple[int, int]]]
    shares: list[Share]
    on_gpus: dict[str, Later]
    done: int
    prompt_tokens: int

    @property
    def total(self) -> int:
        """Bytes that are read before the first step."""
        return self.done + sum(later.source.nbytes for later in self.on_gpus.values())


def load_weights(
    path: Path, dtype: torch.dtype, *, compact: bool = False, progress: Progress | None = None
) -> tuple[ModelConfig, Weights]:
    """Read all of a model directory; see load_model. Raises ResourceError if it does not fit."""
    loaded = load_model(path, dtype, compact=compact, experts="resident", progress=progress)
    return loaded.config, loaded.weights


def load_model(
    path: Path,
    dtype: torch.dtype,
    *,
    compact: bool = False,
    experts: Literal["resident", "paged", "auto"] = "auto",
    ram: int | None = None,
    gpus: Sequence[Gpu] = (),
    context: int | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Read a model directory. Plain matrices, embeddings and norms become `dtype`; what the model needs in float32 is.

    compact: matrices stored in bf16 stay so whatever dtype is, for kernels that multiply them as they are.
    experts: "paged" leaves the routed experts in the files, "auto" does so if they do not fit. ram: bytes the process
    may take, if less than the machine can give. gpus: what to put layers on, for a context of so many tokens (None: the
    model's own limit); routed experts are then left in the files, whatever `experts` says. progress(done, total) is
    told the bytes read after each tensor; those of experts that read_later() is to read are among the total.
    Raises ConfigError or CheckpointError; nothing is allocated for weights before all of them have been checked."""
    config = read_config(path)
    inventory = tensor_inventory(config)
    with Checkpoint.open(path) as checkpoint:
        sources = match(config, inventory, checkpoint)
        kept = {name: _kept_dtype(spec, sources[name], dtype, compact) for name, spec in inventory.items()}
        held = {name: _bytes_held(spec, sources[name], kept[name]) for name, spec in inventory.items()}
        shares, prompt_tokens = shares_of(config, held, dtype, gpus, context)
        where = {name: device_of(config, shares, name) for name in inventory}
        experts = "paged" if gpus else experts
        paged = experts == "paged" or (experts == "auto" and not _fits(sum(held.values()), ram))
        apart = {name: spec for name, spec in inventory.items() if paged and is_routed(name)}
        whole = [name for name in apart if where[name] != CPU]
        layout = layout_of(path, config, inventory, sources, compact=compact) if len(whole) < len(apart) else None
        on_gpus = {name: Later(apart[name], sources[name], kept[name]) for name in whole}
        inventory = {name: spec for name, spec in inventory.items() if name not in apart}
        _check_fits(path, sum(held[name] for name in inventory if where[name] == CPU), ram)
        arena = Arena()
        total, done = sum(sources[name].nbytes for name in (*inventory, *on_gpus)), 0
        tensors: dict[str, Tensor | QuantizedTensor] = {}
        for name, spec in inventory.items():
            there = where[name]
            empty = arena.empty if there == CPU else torch.empty
            tensors[name] = _read(checkpoint, empty, name, spec, sources[name], kept[name]).to(there)
            done += sources[name].nbytes
            if progress:
                progress(done, total)
        files = checkpoint.identities()
    _check_hash_tables(path, config, tensors)
    return Loaded(config, Weights(tensors), layout, files, shares, on_gpus, done, prompt_tokens)


def bytes_held(path: Path, dtype: torch.dtype, *, compact: bool = False) -> tuple[ModelConfig, dict[str, int]]:
    """Of each weight, by published name, in the form that load_model() would keep it in. Reads headers only.

    Raises ConfigError or CheckpointError."""
    config = read_config(path)
    inventory = tensor_inventory(config)
    with Checkpoint.open(path) as checkpoint:
        sources = match(config, inventory, checkpoint)
    kept = {name: _kept_dtype(spec, sources[name], dtype, compact) for name, spec in inventory.items()}
    return config, {name: _bytes_held(spec, sources[name], kept[name]) for name, spec in inventory.items()}


def _kept_dtype(spec: TensorSpec, source: Source, dtype: torch.dtype, compact: bool) -> torch.dtype | None:
    """What a tensor is held in; None: as it is stored, because it is packed or an integer."""
    if source.format is not None or spec.kind == "int":
        return None
    if compact and spec.compact and source.ref.dtype == "BF16":
        return torch.bfloat16
    return torch.float32 if spec.kind == "float32" else dtype


def _bytes_held(spec: TensorSpec, source: Source, held: torch.dtype | None) -> int:
    """Of a weight in the form it is kept in."""
    return source.nbytes if held is None else math.prod(spec.shape) * held.itemsize


def _room(ram: int | None) -> int | None:
    """Bytes that weights may take."""
    have = available_memory()
    if ram is None:
        return have
    left = max(ram - resident_memory(), 0)
    return left if have is None else min(left, have)


def _fits(nbytes: int, ram: int | None) -> bool:
    room = _room(ram)
    return room is None or nbytes + WORKING_BYTES <= room


def _check_fits(path: Path, need: int, ram: int | None) -> None:
    """Raises ResourceError if the weights, in the form they are kept in, are more than the memory there is for them."""
    have = _room(ram)
    if have is not None and need > have:
        raise ResourceError(
            f"{shown(path)}: the weights that are always needed take {need / 2**30:.1f} GiB of RAM and "
            f"{have / 2**30:.1f} GiB are available; "
            + ("raise --ram, or " if ram is not None else "")
            + "use a smaller model or a larger machine"
        )


def _read(
    checkpoint: Checkpoint, empty: Empty, name: str, spec: TensorSpec, source: Source, dtype: torch.dtype | None
) -> Tensor | QuantizedTensor:
    """One tensor in the form it is kept in; dtype None: as it is stored. empty: gives memory for what stays."""
    stays = dtype is None or dtype == DTYPES[source.ref.dtype]
    data = checkpoint.read(source.ref, empty if stays else torch.empty)
    if source.format is not None and source.scale is not None:
        try:
            return source.format.bind(data, checkpoint.read(source.scale), spec.matrix)
        except FormatError as problem:
            raise CheckpointError(f"{shown(source.scale.file)}: {name}: {problem}; download it again") from None
    return data if dtype is None else data.to(dtype)


def read_later(checkpoint: Checkpoint, name: str, later: Later) -> Tensor | QuantizedTensor:
    """A tensor that load_model() has left for later, from the same directory."""
    return _read(checkpoint, torch.empty, name, later.spec, later.source, later.dtype)


def _check_hash_tables(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor | QuantizedTensor]) -> None:
    for name, table in _hash_tables(tensors):
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= config.num_experts:
            raise CheckpointError(
                f"{shown(path)}: {name} names experts {low} to {high}, expected 0 to {config.num_experts - 1}; "
                "download it again"
            )


def _hash_tables(tensors: Mapping[str, Tensor | QuantizedTensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.int64:
            yield name, tensor
