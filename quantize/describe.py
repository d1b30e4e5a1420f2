"""What the config.json of a conversion says of its formats, what that asks of names, and who cannot read it.

Knows names through the model's inventory, and headers; reads no tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.checkpoint import Checkpoint
from localmoe.errors import ConfigError
from localmoe.files import shown
from localmoe.formats import FORMATS, Int
from localmoe.models.family import is_ignored, places, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import is_routed
from localmoe.quantize.schemas import described, restored
from localmoe.safetensors_io import TensorRef
from localmoe.spelling import Source

_BLOCKS = "fp8_block"


@dataclass(frozen=True)
class Description:
    """config: the text of config.json. renamed: what kept tensors are called now, by what they were called before.

    limit: a sentence on those who cannot read all of it, if there are any."""

    config: bytes
    renamed: dict[str, str]
    limit: str | None


def describe(
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    config: ModelConfig,
    sources: Mapping[str, Source],
    packed: Mapping[str, str],
    *,
    undone: bool,
) -> Description:
    """given: the source's config.json, which `config` was read from; sources: of all tensors that the model binds.

    packed: the format of each matrix that gets one which it had not before; undone: whether some get back what they
    had. Raises ConfigError for a config that cannot be written."""
    inventory = tensor_inventory(config)
    refs = checkpoint.refs
    integers = bool(packed) and all(isinstance(FORMATS[fmt], Int) for fmt in packed.values())
    replaced = {part for name in packed for part in sources[name].parts}
    blocks = [name for name in refs if name not in replaced and _is_block(name, refs)] if integers else []
    # A matrix that is not to be packed may well be a linear to others.
    matrices = [name for name, spec in inventory.items() if name.endswith(".weight") and len(spec.shape) == 2]
    # Layers that are not used have names as the others, and keep their bytes.
    matrices += [
        name
        for name, ref in refs.items()
        if name.endswith(".weight") and len(ref.shape) == 2 and is_ignored(config, name)
    ]
    formats = {**packed, **dict.fromkeys(blocks, _BLOCKS)}
    text = _config_text(checkpoint.path, restored(given) if undone else given, formats, matrices)
    stored = {name: _stored(name, sources[name], packed) for name, spec in inventory.items() if spec.kind == "linear"}
    limit = _limit(config, stored, formats, integers=integers) if packed else None
    return Description(text, {f"{name}_scale_inv": f"{name}_scale" for name in blocks}, limit)


def _is_block(name: str, refs: Mapping[str, TensorRef]) -> bool:
    """Whether it is FP8 as V3 publishes it, which compressed-tensors has too, but for the name of the scales."""
    scale = refs.get(f"{name}_scale_inv")
    return scale is not None and scale.dtype == "F32" and refs[name].dtype == "F8_E4M3" and f"{name}_scale" not in refs


def _stored(name: str, source: Source, packed: Mapping[str, str]) -> str | None:
    """The format that it has then, None for a plain matrix."""
    return packed.get(name, source.format.name if source.format else None)


def _limit(
    config: ModelConfig, stored: Mapping[str, str | None], formats: Mapping[str, str], *, integers: bool
) -> str | None:
    """stored: of each linear of the model; formats: what config.json has words for, were it not for mixtures."""
    used = {fmt for fmt in stored.values() if fmt is not None}
    others = {fmt for name, fmt in stored.items() if fmt is not None and name not in formats}
    if not (integers or used - others == {"nf4"}):
        return f"Only localmoe reads it: no other program has a scheme for {_listed(used)} in one model."
    if others:
        return (
            f"Only localmoe reads it: config.json can describe {_listed(used - others)} to other programs, but not "
            f"{_listed(others)} beside it."
        )
    if any(place.name != name for name in formats if name in stored for place in _alone(config, name)):
        return "Only localmoe reads it: what others load does not have the names by which config.json describes it."
    routed = {fmt for name, fmt in stored.items() if is_routed(name)}
    if integers and (len(routed) > 1 or not isinstance(FORMATS.get(str(next(iter(routed)))), Int)):
        return (
            "transformers (5.23) does not read it: with compressed-tensors it takes routed experts for integers of one "
            "format, all of them."
        )
    if "nf4" in routed:
        return "transformers (5.23) does not read it: it has no routed experts in nf4."
    return None


def _alone(config: ModelConfig, name: str) -> Iterable[Any]:
    """Where a matrix may be found as a tensor of its own."""
    return (place for place in places(config, name) if place.stack is None)


def _listed(formats: Iterable[str]) -> str:
    *most, last = sorted(formats)
    return f"{', '.join(most)} and {last}" if most else last


def _config_text(source: Path, given: Mapping[str, Any], formats: Mapping[str, str], matrices: Iterable[str]) -> bytes:
    """Before the work: JSON that can be read may hold what cannot be written, such as 1e999, which is infinity."""
    try:
        return json.dumps(described(given, formats, matrices), indent=1, allow_nan=False).encode()
    except (ValueError, RecursionError) as cause:
        raise ConfigError(
            f"{shown(source / 'config.json')}: cannot be copied ({shown(cause)}); get the model's own config.json"
        ) from None
