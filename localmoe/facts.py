"""What a model directory holds, from config.json and the headers of its shards: parts, formats, sizes, origin.

Reads no weights. Time: about a second for the largest published model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localmoe.chat_format import described
from localmoe.checkpoint import Checkpoint
from localmoe.config import load_config
from localmoe.errors import ModelError
from localmoe.files import MIB, read_bytes, read_json, shown
from localmoe.library import ORIGIN, disk_bytes
from localmoe.loader import WORKING_BYTES
from localmoe.matching import match
from localmoe.models.family import config_of, part_of, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.sizes import sizes_of_config
from localmoe.models.tensors import ROUTED
from localmoe.quantize.output import MOST_JSON, SIDECAR
from localmoe.spelling import Source

_LICENCES = ("license", "licence", "copying")
Fit = Literal["in RAM", "paged", "too large"]


@dataclass(frozen=True)
class Part:
    """All tensors of one purpose and format. nbytes: as stored, with scales."""

    name: str
    format: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Facts:
    """A model directory. chat_format: what writes its prompts, in words. unused_bytes: of tensors that localmoe leaves
    out, such as MTP stages. made_by_us: what localmoe quantize noted, origin: what localmoe pull noted; licence: name
    and first line of its file."""

    config: ModelConfig
    chat_format: str
    parts: list[Part]
    active_parameters: int
    unused_bytes: int
    disk_bytes: int
    quantized_by: str | None
    made_by_us: dict[str, Any] | None
    origin: dict[str, Any] | None
    licence: tuple[str, str] | None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of the tensors that are used."""
        return sum(part.nbytes for part in self.parts)

    @property
    def experts_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part.name == ROUTED)

    @property
    def experts_format(self) -> str:
        """Of the routed experts; several where layers differ."""
        return ", ".join(part.format for part in self.parts if part.name == ROUTED)

    def fits(self, room: int | None) -> Fit:
        """How so many bytes of memory could hold it, about as the loader decides; None: it is not known how many."""
        if room is None or self.nbytes + WORKING_BYTES <= room:
            return "in RAM"
        return "paged" if self.nbytes - self.experts_bytes + WORKING_BYTES <= room else "too large"


def facts_of(folder: Path) -> Facts:
    """Raises ConfigError or CheckpointError for what could not be loaded either."""
    raw = load_config(folder)
    config = config_of(raw, shown(folder / "config.json"))
    inventory = tensor_inventory(config)
    with Checkpoint.open(folder) as checkpoint:
        sources = match(config, inventory, checkpoint)
        used = {part for source in sources.values() for part in source.parts}
        unused = sum(ref.nbytes for name, ref in checkpoint.refs.items() if name not in used)
    parts = _parts(config, {name: spec.shape for name, spec in inventory.items()}, sources)
    method = raw.get("quantization_config")
    return Facts(
        config=config,
        chat_format=described(folder, config),
        parts=parts,
        active_parameters=sizes_of_config(config, "config.json").flops_per_token // 2,
        unused_bytes=unused,
        disk_bytes=disk_bytes(folder),
        quantized_by=method.get("quant_method") if isinstance(method, dict) else None,
        made_by_us=_noted(folder / SIDECAR),
        origin=_noted(folder / ORIGIN),
        licence=_licence(folder),
    )


def _parts(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source]) -> list[Part]:
    """In the order in which they come up in the model, those of a name together."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    for name, source in sources.items():
        key = part_of(config, name), source.ref.dtype.lower() if source.format is None else source.format.name
        tensors, parameters, nbytes = found.get(key, (0, 0, 0))
        found[key] = tensors + 1, parameters + math.prod(shapes[name]), nbytes + source.nbytes
    order = list(dict.fromkeys(name for name, _ in found))
    return sorted((Part(*key, *sums) for key, sums in found.items()), key=lambda part: order.index(part.name))


def _noted(path: Path) -> dict[str, Any] | None:
    """A file that localmoe wrote; None where there is none."""
    return read_json(path, MOST_JSON, ModelError) if path.exists() else None


def _licence(folder: Path) -> tuple[str, str] | None:
    names = sorted(path.name for path in folder.iterdir() if path.name.lower().startswith(_LICENCES))
    if not names:
        return None
    try:
        text = read_bytes(folder / names[0], MIB, ModelError).decode("utf-8", "replace")
    except ModelError:
        return names[0], ""
    return names[0], next((line.strip() for line in text.splitlines() if line.strip()), "")
