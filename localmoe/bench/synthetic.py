"""Models of published shape and format with made-up weights: as large, as slow and as finite as real ones.

Every tensor has memory of its own, on huge pages, filled from one random block per format: nothing a cache could keep
that it could not keep of a real model. The same seed gives the same weights. Memory: the weights and 10 MB."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from localmoe import device
from localmoe.bench import shapes
from localmoe.device import available_memory
from localmoe.errors import ResourceError
from localmoe.formats import FORMATS, Int, QuantizedTensor
from localmoe.memory import Arena
from localmoe.models.family import tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import TensorSpec, is_routed
from localmoe.safetensors_io import DTYPES

Progress = Callable[[int, int], None]
# A weight as the loader gives it, before a model binds it to kernels.
Source = Tensor | QuantizedTensor
# Published formats whose matrices are packed, each with the dtype its scales are given to bind() in.
_SCALES = {"fp8_block": torch.float32, "fp4": torch.float8_e8m0fnu}
# Weights of a block: it fits in the cache of one core, and its odd factor keeps the rows of a matrix from repeating.
_BLOCK, _BLOCK_COLUMNS = 64 * 15_625, 8000
_SCALES |= {
    name: torch.bfloat16 for name, fmt in FORMATS.items() if isinstance(fmt, Int) and _BLOCK_COLUMNS % fmt.group == 0
}
# What may be asked for instead of the published formats.
MATRICES = tuple(_SCALES)
# Bytes by which the beginnings of two successive tensors differ in their place in the block.
_STRIDE = 64 * 1009
# What a step of 512 tokens, the decode states and Python itself take beside the weights.
HEADROOM = 2 << 30
# A size that was not asked for is chosen so that the model takes at most this share of the free memory.
_SHARE = 0.75


@dataclass(frozen=True)
class Held:
    """What plain tensors are held in, as the loader decides it: `dtype`, or bf16 for matrices that kernels read so.

    matrices: the format of all that may be packed, instead of the published ones."""

    dtype: torch.dtype
    compact: bool
    matrices: str | None = None

    def format(self, spec: TensorSpec) -> str | None:
        """What a tensor is packed in; None for a plain one."""
        found = self.matrices if self.matrices is not None and spec.kind == "linear" else spec.published
        found = "fp8_block" if found == "fp8_f32" else found
        return found if found in _SCALES else None

    def of(self, spec: TensorSpec) -> torch.dtype:
        if spec.kind == "int":
            return torch.int64
        if self.compact and spec.compact and spec.published == "bf16":
            return torch.bfloat16
        return torch.float32 if spec.kind == "float32" else self.dtype


def plan(name: str, held: Held, num_layers: int | None = None, num_experts: int | None = None) -> ModelConfig:
    """The model to measure: what was asked for and, where nothing was, as much as fits well.

    Raises UsageError for sizes the model does not have, ResourceError with the numbers for what does not fit."""
    whole, have = shapes.published(name), available_memory()
    top_k = whole.experts_per_token
    share = math.inf if have is None else _SHARE * have
    if num_layers is None:
        num_layers = max(_most(whole.num_layers, lambda n: _need(name, n, num_experts or top_k, held) <= share), 1)
    if num_experts is None:
        fits = _most(whole.num_experts, lambda n: _need(name, num_layers, max(n, top_k), held) <= share)
        num_experts = max(fits, top_k)
    need = _need(name, num_layers, num_experts, held)
    if have is not None and need > have:
        raise ResourceError(
            f"{num_layers} layers of {name} with {num_experts} experts each need {need / 2**30:.1f} GiB of RAM, "
            f"{HEADROOM / 2**30:.0f} of them to work in, and {have / 2**30:.1f} GiB are available; "
            "lower --layers or --experts"
        )
    return shapes.cut(name, num_layers, num_experts)


def _need(name: str, num_layers: int, num_experts: int, held: Held) -> int:
    return weight_bytes(shapes.cut(name, num_layers, num_experts), held) + HEADROOM


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..limit that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def weight_bytes(config: ModelConfig, held: Held) -> int:
    """What synthetic_weights allocates."""
    return sum(bytes_held(config, held).values())


def bytes_held(config: ModelConfig, held: Held) -> dict[str, int]:
    """Of each weight, by published name."""
    return {
        name: sum(math.prod(shape) * kind.itemsize for shape, kind in _parts(spec, held))
        for name, spec in tensor_inventory(config).items()
    }


def made_up(config: ModelConfig, held: Held, names: Sequence[str], *, seed: int = 0) -> list[Source]:
    """Some of the model's tensors only."""
    maker, inventory = _Maker(config, held, seed), tensor_inventory(config)
    weights = [maker.make(name, inventory[name]) for name in names]
    run_all(maker.jobs)
    return weights


def _parts(spec: TensorSpec, held: Held) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of the one tensor a plain weight is, or of the data and scale of a packed one."""
    packed = held.format(spec)
    if packed is None:
        return ((spec.shape, held.of(spec)),)
    fmt = FORMATS[packed]
    data = (fmt.data_shape(*spec.matrix), DTYPES[fmt.data_dtype])
    return data, (fmt.scale_shape(*spec.matrix), _SCALES[packed])


def synthetic_weights(
    config: ModelConfig, held: Held, *, seed: int = 0, dense_only: bool = False, progress: Progress | None = None
) -> dict[str, Source]:
    """Every tensor of the model by its published name, in the form the loader would give it.

    dense_only: all but the routed experts.

    progress(done, total) is told the bytes filled."""
    maker = _Maker(config, held, seed)
    inventory = tensor_inventory(config).items()
    weights = {name: maker.make(name, spec) for name, spec in inventory if not (dense_only and is_routed(name))}
    run_all(maker.jobs, progress)
    return weights


def run_all(jobs: Sequence[tuple[int, Callable[[], None]]], progress: Progress | None = None) -> None:
    """Run (nbytes, work) jobs on all cores: most of filling memory is the system handing it out, page by page."""
    total, done = sum(nbytes for nbytes, _ in jobs), 0
    with ThreadPoolExecutor(device.processors()) as pool:
        futures = [pool.submit(work) for _, work in jobs]
        try:
            for (nbytes, _), future in zip(jobs, futures, strict=True):
                future.result()
                done += nbytes
                if progress:
                    progress(done, total)
        finally:
            # After Ctrl-C, what has not begun must not be waited for.
            pool.shutdown(cancel_futures=True)


class _Maker:
    """Allocates tensors one after the other; `jobs` will fill them. Holds the random blocks."""

    def __init__(self, config: ModelConfig, held: Held, seed: int) -> None:
        self._config, self._held = config, held
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(_BLOCK, generator=self._generator)
        self._blocks: dict[str, tuple[Tensor, float]] = {}
        self._arena = Arena()
        self.jobs: list[tuple[int, Callable[[], None]]] = []

    def make(self, name: str, spec: TensorSpec) -> Source:
        if spec.kind == "int":
            return self._hash_table(spec.shape)
        parts = [self._arena.empty(*part) for part in _parts(spec, self._held)]
        target, number = parts[0], len(self.jobs)
        packed = self._held.format(spec)
        if packed is not None:
            if packed not in self._blocks:
                self._blocks[packed] = _packed_block(packed, self._noise)
            block, unit = self._blocks[packed]
            self.jobs.append((target.nbytes, partial(fill, target, block, number)))
            return _bind(packed, spec.matrix, target, parts[1], unit)
        work = partial(_fill_plain, target, self._noise, _distribution(name, spec.shape), number)
        self.jobs.append((target.nbytes, work))
        return target

    def _hash_table(self, shape: tuple[int, ...]) -> Tensor:
        """Distinct experts for every token id, out of a few thousand choices: one sort per id would take seconds."""
        tokens, top_k = shape
        choices = torch.rand(4096, self._config.num_experts, generator=self._generator).argsort(1)[:, :top_k]
        return choices[torch.randint(len(choices), (tokens,), generator=self._generator)]


def _fill_plain(target: Tensor, noise: Tensor, distribution: tuple[float, float], number: int) -> None:
    mean, deviation = distribution
    fill(target, (noise[: target.numel()] * deviation + mean).to(target.dtype), number)


def _bind(packed: str, shape: tuple[int, int], data: Tensor, scale: Tensor, unit: float) -> QuantizedTensor:
    # A power of two, because only those have an e8m0 code.
    set_scale(scale, round(math.log2(shape[1] ** -0.5 / unit)))
    return FORMATS[packed].bind(data, scale, shape)


def _packed_block(name: str, noise: Tensor) -> tuple[Tensor, float]:
    """Codes of normally distributed weights as a format packs them, and their root mean square at a scale of one."""
    quantized = FORMATS[name].quantize(noise.view(-1, _BLOCK_COLUMNS))
    one = torch.empty_like(quantized.scale)
    set_scale(one, 0)
    values = replace(quantized, scale=one).dequantize()
    return quantized.data, float(values.square().mean().sqrt())


def set_scale(scale: Tensor, exponent: int) -> None:
    """Fill scales, float or e8m0 bytes, with 2 ** exponent."""
    if scale.dtype.itemsize == 1:
        scale.view(torch.uint8).fill_(127 + exponent)
    else:
        scale.fill_(2.0**exponent)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a plain tensor: sums over inputs have unit spread, and no expert is preferred."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("_scale"):
        return 0.75, 0.1
    if name.endswith(("gate.bias", "e_score_correction_bias")):
        return 0.0, 0.01
    if len(shape) == 1 or name.endswith("ape"):
        return 0.0, 0.5
    # Rows of the embedding are not summed over.
    return 0.0, 1.0 if name == "embed.weight" or name.endswith("embed_tokens.weight") else shape[1] ** -0.5


def fill(target: Tensor, block: Tensor, number: int) -> None:
    """Write copies of a contiguous block over a contiguous tensor; where in the block it begins depends on `number`."""
    source, flat = block.view(torch.uint8).flatten(), target.view(torch.uint8).flatten()
    begin, done = number * _STRIDE % len(source), 0
    while done < len(flat):
        piece = source[begin : begin + len(flat) - done]
        flat[done : done + len(piece)] = piece
        begin, done = 0, done + len(piece)
