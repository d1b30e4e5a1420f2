"""What each weight format does to a model's own experts: error per bit, however scales are chosen.

The usual rounding, whose scale reaches the largest number of a group, against scales that are searched for, and against
those that are searched for with the importance of inputs. Uniform integers of 3 and 2 bits are there to be compared
with; localmoe does not write them. Reads a checkpoint; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localmoe.bench.report import Column, Record, number, text
from localmoe.checkpoint import Checkpoint
from localmoe.formats import FORMATS, WeightFormat
from localmoe.loader import read_config
from localmoe.matching import match
from localmoe.models.family import expert_names, tensor_inventory
from localmoe.quantize.imatrix import Importance
from localmoe.quantize.rounding import SHARES, searched
from localmoe.quantize.samples import Sample, error, of_experts

_WRITTEN = ("int8_g32", "int4_g32", "int4_g64", "int4_g128", "nf4", "fp4", "book3", "book2")
_UNIFORM = ((3, 32), (3, 64), (2, 32), (2, 64))
# Experts of each layer, evenly spaced, and rows of each of their matrices.
_EXPERTS, _ROWS = 4, 256
_PERCENT = ("absmax", "searched", "absmax_weighted", "searched_weighted", "calibrated_weighted")
COLUMNS = (
    Column("format", text("format"), 16, "left"),
    Column("bits", number("bits", ".2f")),
    Column("absmax %", number("absmax", ".2f")),
    Column("searched %", number("searched", ".2f")),
    Column("weighted: absmax %", number("absmax_weighted", ".2f")),
    Column("searched %", number("searched_weighted", ".2f")),
    Column("calibrated %", number("calibrated_weighted", ".2f")),
)
Round = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Way:
    """A format and two ways to round to it: [rows, cols] and importance [cols] -> [rows, cols], all float32.

    group: inputs of a row must be a multiple of it."""

    name: str
    bits: float
    group: int
    absmax: Round | None
    searched: Round


def run(model: Path, importance: Importance | None, report: Callable[[str], None]) -> Iterator[Record]:
    """A record for each format. Raises UsageError for an importance of another model, ModelError for a bad one."""
    if importance is not None:
        importance.check(model)
    found = samples(model, importance)
    for way in ways():
        report(f"rounding to {way.name}")
        if all(sample.values.shape[1] % way.group == 0 for sample in found):
            yield measured(way, found)


def samples(model: Path, importance: Importance | None) -> list[Sample]:
    """Of experts of all layers. Raises ModelError for a bad model."""
    config = read_config(model)
    inventory = tensor_inventory(config)
    with Checkpoint.open(model) as checkpoint:
        sources = match(config, inventory, checkpoint)
        found = []
        for layer in range(config.num_moe_layers):
            experts = [expert_names(config, layer, expert) for expert in range(config.num_experts)]
            shapes = {name: inventory[name].matrix for names in experts for name in names}
            found += of_experts(checkpoint, sources, shapes, experts, _EXPERTS, _ROWS, importance)
    return found


def measured(way: Way, found: Sequence[Sample]) -> Record:
    """The errors of one format in percent; those with importance are None without any."""
    known = any(sample.importance is not None for sample in found)
    record: Record = {"format": way.name, "bits": way.bits, **dict.fromkeys(_PERCENT)}

    def note(key: str, rounded: Sequence[Tensor]) -> None:
        pairs = list(zip(found, rounded, strict=True))
        for suffix in ("", "_weighted") if known else ("",):
            if key + suffix in record:
                record[key + suffix] = 100 * error(pairs, weighted=bool(suffix)) ** 0.5

    if way.absmax is not None:
        note("absmax", [way.absmax(sample.values, None) for sample in found])
    note("searched", [way.searched(sample.values, None) for sample in found])
    if known:
        note("calibrated", [way.searched(sample.values, sample.importance) for sample in found])
    return record


def ways() -> Iterator[Way]:
    """All formats that are compared."""
    yield from map(_written, _WRITTEN)
    yield from (_uniform(bits, group) for bits, group in _UNIFORM)


def _written(name: str) -> Way:
    fmt = FORMATS[name]
    # A codebook has no scale that simply reaches the largest number.
    absmax = None if name.startswith("book") else lambda values, _: fmt.quantize(values).dequantize()
    return Way(name, _bits(fmt), fmt.group, absmax, lambda values, weights: searched(values, fmt, weights).dequantize())


def _bits(fmt: WeightFormat) -> float:
    """Of a weight with its share of scales, in long rows."""
    cols = 1 << 14
    return 8 * fmt.nbytes(1, cols) / cols


def _uniform(bits: int, group: int) -> Way:
    def rounded(values: Tensor, weights: Tensor | None, shares: Sequence[float]) -> Tensor:
        return round_uniform(values, weights, bits, group, shares)

    return Way(
        f"uniform {bits}-bit g{group}", bits + 16 / group, group,
        lambda values, _: rounded(values, None, (1.0,)),
        lambda values, weights: rounded(values, weights, (*SHARES[4], 0.6, 0.55, 0.5)),
    )  # fmt: skip


def round_uniform(values: Tensor, importance: Tensor | None, bits: int, group: int, shares: Sequence[float]) -> Tensor:
    """What integers of so many bits around 0, with a bf16 scale per group, make of a matrix."""
    groups, most = values.unflatten(-1, (-1, group)), 1 << (bits - 1)
    weights = torch.ones(1) if importance is None else importance.unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    best, least = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for share in shares:
        scale = (largest * share / max(most - 1, 1)).bfloat16().float().clamp(min=1e-38)
        rounded = (groups / scale).round().clamp(-most, most - 1) * scale
        off = ((rounded - groups).square() * weights).sum(-1, keepdim=True)
        best, least = torch.where(off < least, rounded, best), torch.minimum(off, least)
    return best.flatten(-2)
