"""Where a checkpoint has the tensors of a model: every one is found and checked by its header, nothing is read.

Knows names, shapes and formats; does not know what becomes of the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError
from localmoe.files import shown
from localmoe.models.family import is_ignored, places
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import Place, TensorSpec
from localmoe.safetensors_io import DTYPES, TensorRef
from localmoe.spelling import PLAIN, Mismatch, Source, check, find_packed, find_quantized, text

_NAMED_PROBLEMS = 3


def match(config: ModelConfig, inventory: Mapping[str, TensorSpec], checkpoint: Checkpoint) -> dict[str, Source]:
    """Find every tensor of the inventory. Raises CheckpointError naming the first missing, misshapen or extra ones."""
    sources: dict[str, Source] = {}
    used: set[str] = set()
    problems: list[str] = []
    for name, spec in inventory.items():
        try:
            sources[name] = _locate(name, spec, places(config, name), checkpoint.refs, used)
        except Mismatch as problem:
            problems.append(f"{name} {problem}")
    extra = [name for name in checkpoint.refs if name not in used and not is_ignored(config, name)]
    problems += [f"{shown(name)} is not a tensor of this model" for name in extra]
    if problems:
        more = len(problems) - _NAMED_PROBLEMS
        raise CheckpointError(
            f"{shown(checkpoint.path)}: tensors do not fit config.json: {'; '.join(problems[:_NAMED_PROBLEMS])}"
            + (f"; and {more} more" if more > 0 else "")
            + "; get config.json and the shards from the same source again"
        )
    return sources


def _locate(
    name: str, spec: TensorSpec, candidates: tuple[Place, ...], refs: Mapping[str, TensorRef], used: set[str]
) -> Source:
    """The one candidate that is there, checked against the spec; what it uses of the checkpoint is added to `used`."""
    found = list({place.name: place for place in candidates if place.name in refs}.values())
    if not found and spec.kind == "linear":
        packed = (find_packed(place.name, spec.matrix, refs, used) for place in candidates)
        source = next((source for source in packed if source is not None), None)
        if source is not None:
            return source
    if not found:
        raise Mismatch(f"is missing, expected {text(spec.shape)}")
    used.update(place.name for place in found)
    if len(found) > 1:
        raise Mismatch(f"is there twice, also as {found[1].name}")
    place = found[0]
    ref = refs[place.name]
    if place.stack is not None:
        return Source(_unstack(ref, place, spec), (place.name,))
    if spec.kind == "linear" and ref.dtype not in PLAIN:
        return find_quantized(place.name, spec.matrix, refs, used)
    check(ref, spec.shape, ("I64",) if spec.kind == "int" else PLAIN)
    return Source(ref, (place.name,))


def _unstack(ref: TensorRef, place: Place, spec: TensorSpec) -> TensorRef:
    """The bytes of one expert's matrix inside a stack of all experts."""
    assert place.stack is not None, "only stacked places are cut"
    check(ref, place.stack, PLAIN)
    _, stack_rows, cols = place.stack
    size = DTYPES[ref.dtype].itemsize
    begin = (place.expert * stack_rows + place.start) * cols * size
    return replace(ref, offset=ref.offset + begin, nbytes=spec.shape[0] * cols * size, shape=spec.shape)
