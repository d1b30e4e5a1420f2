"""What a conversion is to do, decided from the config and the headers before anything is written.

Knows names through the model's inventory; reads no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.checkpoint import Checkpoint
from localmoe.config import load_config
from localmoe.errors import CheckpointError, ConfigError, FormatError, UsageError
from localmoe.files import MIB, read_bytes, shown
from localmoe.formats import Int
from localmoe.loader import Source, match
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import TensorSpec, tensor_inventory
from localmoe.quantize.compressed import described, specs_of
from localmoe.quantize.recipe import KEEP, Recipe
from localmoe.safetensors_io import DTYPES, TensorRef

# Another number where the same source and recipe give other bytes than before.
VERSION = 2
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE",
          "chat_template.jinja")  # fmt: skip
_MOST_COPIED = 64 * MIB
# Bytes that are done, and all of them.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a conversion is to do. shards: for each output file, what keeps its bytes and what does not.
    config: the text of the config.json to be written; copies: the source's other files, whole.

    bytes_in: of everything that is read; bytes_out: of all shards."""

    source: Path
    out: Path
    recipe: Recipe
    shards: dict[str, Shard]
    config: bytes
    copies: dict[str, bytes]
    fingerprint: str
    bytes_in: int
    bytes_out: int

    @property
    def name(self) -> str:
        """What the source is called, "." too."""
        return self.source.resolve().name


@dataclass(frozen=True)
class Shard:
    """kept: raw tensors by name. packed: (source, format) of each matrix by published name. specs: of the output."""

    kept: dict[str, TensorRef]
    packed: dict[str, tuple[Source, str]]
    specs: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(spec) for spec in self.specs.values())

    def packed_bytes(self, name: str) -> int:
        """Of a packed matrix, all that it is stored as."""
        return sum(_nbytes(self.specs[f"{name}_{part}"]) for part in ("packed", "scale", "shape"))


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype].itemsize


def prepare(checkpoint: Checkpoint, out: Path, recipe: Recipe) -> Job:
    """Decide everything from config and headers. Raises ModelError for a bad source, UsageError for a bad target."""
    # Read once: it may be edited meanwhile.
    given = load_config(checkpoint.path)
    config = DeepseekV4Config.from_dict(given, shown(checkpoint.path / "config.json"))
    inventory = tensor_inventory(config)
    sources = match(config, inventory, checkpoint)
    if any(isinstance(source.format, Int) for source in sources.values()):
        raise UsageError(f"{shown(checkpoint.path)}: has been quantized already; start from what it was made of")
    formats = {name: recipe.format_of(name) for name, spec in inventory.items() if spec.kind == "linear"}
    chosen = {name: fmt for name, fmt in formats.items() if fmt != KEEP}
    used = {recipe.rule_of(name) for name in formats}
    unused = next((rule for rule in recipe.rules if rule not in used), None)
    if unused is not None:
        raise UsageError(f"no matrix is left for the rule {shown(unused.match)}; correct the recipe")
    whole = {(ref.file, ref.offset): ref.nbytes for ref in checkpoint.refs.values()}
    replaced = {ref for name in chosen for ref in (sources[name].ref, sources[name].scale) if ref is not None}
    by_place = {(ref.file, ref.offset) for ref in replaced}
    shards: dict[str, Shard] = {}
    for raw, ref in checkpoint.refs.items():
        shard = shards.setdefault(ref.file.name, Shard({}, {}, {}))
        if (ref.file, ref.offset) not in by_place:
            shard.kept[raw] = ref
            shard.specs[raw] = (ref.dtype, ref.shape)
    for name, fmt in chosen.items():
        ref = sources[name].ref
        if ref.nbytes != whole.get((ref.file, ref.offset)):
            raise UsageError(f"{name} is part of a stack of experts, which is not quantized yet; convert it first")
        shard = shards[ref.file.name]
        shard.packed[name] = (sources[name], fmt)
        try:
            shard.specs.update(specs_of(name, inventory[name].shape, fmt))  # type: ignore[arg-type]
        except FormatError as problem:
            raise FormatError(
                f"{shown(ref.file)}: {name} {problem}; choose another group size or a recipe that keeps it"
            ) from None
    text, copies = _config_text(checkpoint.path, given, chosen, inventory), _copies(checkpoint.path)
    bytes_in = sum(ref.nbytes for ref in checkpoint.refs.values())
    return Job(
        checkpoint.path, out, recipe, shards, text, copies, _fingerprint(checkpoint, recipe, text, copies), bytes_in,
        sum(shard.nbytes for shard in shards.values()),
    )  # fmt: skip


def _config_text(
    source: Path, given: Mapping[str, Any], chosen: Mapping[str, str], inventory: Mapping[str, TensorSpec]
) -> bytes:
    """Before the work: JSON that can be read may hold what cannot be written, such as 1e999, which is infinity."""
    # A matrix that is not to be packed may well be a linear to others.
    matrices = [name for name, spec in inventory.items() if name.endswith(".weight") and len(spec.shape) == 2]
    try:
        return json.dumps(described(given, chosen, matrices), indent=1, allow_nan=False).encode()
    except (ValueError, RecursionError) as cause:
        raise ConfigError(
            f"{shown(source / 'config.json')}: cannot be copied ({shown(cause)}); get the model's own config.json"
        ) from None


def _copies(source: Path) -> dict[str, bytes]:
    """Read now, so that one that cannot be read is known before the work, and what is noted of them stays true."""
    found = [name for name in _COPIED if os.path.lexists(source / name)]
    return {name: bytes(read_bytes(source / name, _MOST_COPIED, CheckpointError)) for name in found}


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe, config: bytes, copies: Mapping[str, bytes]) -> str:
    """Of the source's config, headers and other files, the recipe and this program."""
    digest = hashlib.sha256(f"{VERSION}\n{recipe.text}\n".encode("utf-8", "backslashreplace"))
    for name, data in {"config.json": config, **copies}.items():
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    for name, ref in sorted(checkpoint.refs.items()):
        line = f"{name} {ref.file.name} {ref.offset} {ref.nbytes} {ref.dtype} {ref.shape}\n"
        # JSON can spell half of a surrogate pair, which is no UTF-8.
        digest.update(line.encode("utf-8", "backslashreplace"))
    for file, (size, _identity) in sorted(checkpoint.identities().items()):
        digest.update(f"{file.name} {size} {os.stat(file).st_mtime_ns}\n".encode())
    return digest.hexdigest()
