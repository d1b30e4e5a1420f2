"""A recipe for a number of bytes: which routed experts get which format, so that they fit and lose least.

For each layer, and apart for what goes into an expert (w1, w3) and what comes out (w2), the error of every format is
measured on a few experts. Then bytes are saved where a byte costs the least error, until it fits. Attention, shared
experts and tables keep their format. Reads tensors through the checkpoint; writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from localmoe.checkpoint import Checkpoint
from localmoe.errors import ResourceError, UsageError
from localmoe.files import shown, sized
from localmoe.formats import FORMATS
from localmoe.kernels import native
from localmoe.loader import read_config
from localmoe.matching import match
from localmoe.models.family import expert_names, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import TensorSpec, is_routed
from localmoe.quantize.imatrix import Importance
from localmoe.quantize.recipe import KEEP, Recipe, Rule
from localmoe.quantize.rounding import searched
from localmoe.quantize.samples import Sample, error, of_experts
from localmoe.spelling import Source

# By falling size. FP4 is published, and int8 says no more than it.
_FORMATS = ("int8_g64", "int4_g64", "book3", "book2")
# Of a machine's memory, what is left to the system, to the program and to a context of some thousand tokens.
_RESERVED_SHARE, _RESERVED_BYTES = 0.06, 1 << 30
# Per layer and part: experts, evenly spaced, and rows of each.
_EXPERTS, _ROWS = 3, 192

# Of the names of an expert's matrices, those that get the same format.
_INDICES = {"w[13]": (0, 2), "w2": (1,)}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A format for a part of the model. error: squared, weighted with importance, relative to the numbers' own."""

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Part:
    """w1 and w3, or w2, of all experts of a layer, and what they can become; the first choice is to keep them."""

    layer: int
    matrices: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Fit:
    """What was decided. nbytes: of the whole model then; budget: what it was to fit into; error: mean over all parts,
    not squared."""

    recipe: Recipe
    nbytes: int
    budget: int
    error: float
    chosen: tuple[tuple[Part, Choice], ...]


def fit(checkpoint: Checkpoint, memory: int, importance: Importance | None, report: Report) -> Fit:
    """For a machine with so many bytes of memory. The least that there is, if even that does not fit.

    Raises UsageError for a model that cannot be made smaller or an importance of another, ResourceError without the
    compiled kernels, ModelError for a bad model."""
    if isinstance(native.load(), str):
        raise ResourceError("measuring formats would take days without the compiled kernels; choose --experts yourself")
    config = read_config(checkpoint.path)
    if importance is not None:
        importance.check(checkpoint.path)
    inventory = tensor_inventory(config)
    sources = match(config, inventory, checkpoint)
    held = sum(source.nbytes for source in sources.values())
    routed = sum(source.nbytes for name, source in sources.items() if is_routed(name))
    budget = int(memory - memory * _RESERVED_SHARE - _RESERVED_BYTES)
    if budget < held - routed:
        raise UsageError(
            f"{shown(checkpoint.path)}: {sized(held - routed)} are no routed experts, and of that memory "
            f"{sized(max(budget, 0))} are left for weights; --fit a larger machine"
        )
    parts = []
    for layer in range(config.num_moe_layers):
        report(f"measuring formats: layer {layer + 1} of {config.num_moe_layers}")
        for matrices, indices in _INDICES.items():
            experts = [[expert_names(config, layer, e)[i] for i in indices] for e in range(config.num_experts)]
            parts.append(_part(checkpoint, sources, inventory, (layer, matrices, experts), importance))
    chosen = solve(parts, budget - (held - routed))
    if held > budget and all(choice.format == KEEP for choice in chosen):
        raise UsageError(f"{shown(checkpoint.path)}: is in the smallest formats already; nothing can be saved")
    found = tuple(zip(parts, chosen, strict=True))
    mean = (sum(choice.error for choice in chosen) / len(chosen)) ** 0.5
    return Fit(_recipe(config, found), held - routed + sum(c.nbytes for c in chosen), budget, mean, found)


def _part(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    inventory: Mapping[str, TensorSpec],
    what: tuple[int, str, Sequence[Sequence[str]]],
    importance: Importance | None,
) -> Part:
    """what: the layer, which matrices, and their names by expert."""
    layer, matrices, experts = what
    shape = inventory[experts[0][0]].matrix
    first = [names[:1] for names in experts]
    shapes = {names[0]: shape for names in first}
    samples = of_experts(checkpoint, sources, shapes, first, _EXPERTS, _ROWS, importance)
    every = [name for names in experts for name in names]
    kept = Choice(KEEP, sum(sources[name].nbytes for name in every), 0.0)
    return Part(layer, matrices, (kept, *_choices(kept.nbytes, shape, len(every), samples)))


def _choices(most: int, shape: tuple[int, int], count: int, samples: Sequence[Sample]) -> Iterable[Choice]:
    """Formats of less than `most` bytes for `count` matrices, with their errors."""
    for name in _FORMATS:
        fmt = FORMATS[name]
        nbytes = 0 if shape[1] % fmt.group else count * fmt.nbytes(*shape)
        if 0 < nbytes < most:
            rounded = ((one, searched(one.values, fmt, one.importance).dequantize()) for one in samples)
            yield Choice(name, nbytes, error(rounded, weighted=True))


def solve(parts: Sequence[Part], budget: int) -> list[Choice]:
    """For each part a choice, so that all of them take at most `budget` bytes, if that is possible.

    Goes down where a saved byte costs the least error, along the lower hull of each part's choices."""
    hulls = [_hull(part.choices) for part in parts]
    at = [0] * len(parts)
    steps = sorted(
        ((after.error - before.error) / (before.nbytes - after.nbytes), number, step)
        for number, hull in enumerate(hulls)
        for step, (before, after) in enumerate(pairwise(hull))
    )
    left = sum(hull[0].nbytes for hull in hulls)
    for _price, number, step in steps:
        if left <= budget:
            break
        # Prices of a hull rise, so its steps come in order.
        left -= hulls[number][step].nbytes - hulls[number][step + 1].nbytes
        at[number] = step + 1
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def _hull(choices: Iterable[Choice]) -> list[Choice]:
    """By falling size, those for which no mixture of two others has less error in as many bytes."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (-one.nbytes, one.error)):
        while len(hull) > 1 and _price(hull[-2], choice) <= _price(hull[-2], hull[-1]):
            hull.pop()
        if not hull or choice.nbytes < hull[-1].nbytes:
            hull.append(choice)
    return hull


def _price(before: Choice, after: Choice) -> float:
    return (after.error - before.error) / (before.nbytes - after.nbytes)


def _recipe(config: ModelConfig, chosen: Iterable[tuple[Part, Choice]]) -> Recipe:
    """A rule for each format and kind of matrix."""
    layers: dict[tuple[str, str], list[int]] = {}
    for part, choice in chosen:
        if choice.format != KEEP:
            layers.setdefault((part.matrices, choice.format), []).append(part.layer)
    return Recipe(tuple(Rule(_pattern(config, key[0], of), key[1]) for key, of in sorted(layers.items())))


def _pattern(config: ModelConfig, matrices: str, layers: Sequence[int]) -> str:
    """Finds these matrices of all experts of some layers, by their published names."""
    names = [expert_names(config, layer, 0) for layer in layers]
    numbers = "|".join(number for first, _, _ in names for number in re.findall(r"layers\.(\d+)\.", first))
    wanted = [re.escape(names[0][i]) for i in _INDICES[matrices]]
    every = (re.sub(r"experts\\\.0", r"experts\\.\\d+", name) for name in wanted)
    return "^(" + "|".join(re.sub(r"layers\\\.\d+", rf"layers\\.({numbers})", name) for name in every) + ")$"
