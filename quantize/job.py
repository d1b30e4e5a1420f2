"""What a conversion is to do, decided from the config and the headers before anything is written.

Knows names through the model's inventory; reads no tensors."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from localmoe.checkpoint import Checkpoint
from localmoe.config import load_config
from localmoe.errors import CheckpointError, FormatError, UsageError
from localmoe.files import MIB, read_bytes, shown
from localmoe.formats import Book, Int, Nf4
from localmoe.library import name_of
from localmoe.matching import match
from localmoe.models.family import config_of, tensor_inventory
from localmoe.quantize.describe import describe
from localmoe.quantize.imatrix import Importance
from localmoe.quantize.recipe import KEEP, Recipe
from localmoe.quantize.rounding import is_exact, is_undone
from localmoe.safetensors_io import DTYPES, TensorRef
from localmoe.spelling import Source, Spec, specs_of

# Another number where the same source and recipe give other bytes than before.
VERSION = 5
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE",
          "chat_template.jinja")  # fmt: skip
_MOST_COPIED = 64 * MIB
_SIGNS = "localmoe-signs."
# Bytes that are done, and all of them.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a conversion is to do. shards: for each output file, what keeps its bytes and what does not.
    config: the text of the config.json to be written; copies: the source's other files, whole. limit: a sentence on
    those who cannot read all of it, if there are any.

    bytes_in: of everything that is read; bytes_out: of all shards."""

    source: Path
    out: Path
    recipe: Recipe
    importance: Importance | None
    shards: dict[str, Shard]
    config: bytes
    copies: dict[str, bytes]
    limit: str | None
    fingerprint: str
    bytes_in: int
    bytes_out: int

    @property
    def name(self) -> str:
        """What the source is called."""
        return name_of(self.source)


@dataclass(frozen=True)
class Matrix:
    """What is to be rounded: from source to a format; specs: of the tensors that it becomes."""

    source: Source
    format: str
    shape: tuple[int, int]
    specs: dict[str, Spec]

    @property
    def nbytes(self) -> int:
        """Of all that it is stored as."""
        return sum(map(_nbytes, self.specs.values()))

    @property
    def is_searched(self) -> bool:
        """Whether anything is lost, so that there is a choice of what."""
        return not self.is_exact and not self.is_undone

    @property
    def is_exact(self) -> bool:
        """Whether all of its numbers stay what they are."""
        return is_exact(self.source.format, self.format)

    @property
    def is_undone(self) -> bool:
        """Whether it becomes what it was before it was rounded, exactly."""
        return is_undone(self.source.format, self.format)

    @property
    def nbytes_beside(self) -> int:
        """At most, of the signs of its zeros: a bit each, of at most a quarter of the numbers."""
        return self.source.nbytes // 16 if self.is_exact else 0

    @property
    def source_format(self) -> str:
        """Its format, or the dtype of a plain matrix."""
        return self.source.format.name if self.source.format else self.source.ref.dtype.lower()


@dataclass(frozen=True)
class Shard:
    """kept: raw tensors by the name that they get. packed: matrices by published name."""

    kept: dict[str, TensorRef]
    packed: dict[str, Matrix]

    @property
    def specs(self) -> dict[str, Spec]:
        """Of every tensor of the output."""
        found: dict[str, Spec] = {name: (ref.dtype, ref.shape) for name, ref in self.kept.items()}
        for matrix in self.packed.values():
            found |= matrix.specs
        return found

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.specs.values()))

    @property
    def nbytes_beside(self) -> int:
        """At most, of the file of signs beside it."""
        return sum(matrix.nbytes_beside for matrix in self.packed.values())


def _nbytes(spec: Spec) -> int:
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype].itemsize


def signs_of(shard: Path) -> Path:
    """The file beside a shard that has the signs of its zeros; see signs.py."""
    return shard.with_name(f"{_SIGNS}{shard.name}")


def prepare(checkpoint: Checkpoint, out: Path, recipe: Recipe, importance: Importance | None = None) -> Job:
    """Decide everything from config and headers. Raises ModelError for a bad source, UsageError for a bad target, or
    an importance of another model."""
    # Read once: it may be edited meanwhile.
    given = load_config(checkpoint.path)
    config = config_of(given, shown(checkpoint.path / "config.json"))
    if importance is not None:
        importance.check(checkpoint.path)
    inventory = tensor_inventory(config)
    sources = match(config, inventory, checkpoint)
    linears = {name: sources[name] for name, spec in inventory.items() if spec.kind == "linear"}
    chosen = _chosen(checkpoint, recipe, linears)
    # What is turned back is described as it was before.
    packed = {name: fmt for name, fmt in chosen.items() if not is_undone(sources[name].format, fmt)}
    about = describe(checkpoint, given, config, sources, packed, undone=len(packed) < len(chosen))
    matrices = {name: (sources[name], fmt, inventory[name].matrix) for name, fmt in chosen.items()}
    shards = _shards(checkpoint, matrices, about.renamed)
    searched = (matrix.is_searched for shard in shards.values() for matrix in shard.packed.values())
    if importance is not None and not any(searched):
        raise UsageError("an importance matrix has no effect on this recipe, which rounds nothing; leave it out")
    copies = _copies(checkpoint.path)
    bytes_in = sum(ref.nbytes for ref in checkpoint.refs.values())
    return Job(
        checkpoint.path, out, recipe, importance, shards, about.config, copies, about.limit,
        _fingerprint(checkpoint, recipe, importance, about.config, copies), bytes_in,
        sum(shard.nbytes for shard in shards.values()),
    )  # fmt: skip


def _chosen(checkpoint: Checkpoint, recipe: Recipe, matrices: Mapping[str, Source]) -> dict[str, str]:
    """The format of each matrix that is to get another. Raises UsageError for a recipe that does not fit."""
    formats = {name: recipe.format_of(name) for name in matrices}
    used = set(map(recipe.rule_of, matrices))
    unused = next((rule for rule in recipe.rules if rule not in used), None)
    if unused is not None:
        raise UsageError(f"no matrix is left for the rule {shown(unused.match)}; correct the recipe")
    again = [name for name, source in matrices.items() if isinstance(source.format, (Int, Nf4, Book))]
    if not all(is_undone(matrices[name].format, formats[name]) for name in again):
        raise UsageError(
            f"{shown(checkpoint.path)}: has been quantized already; start from what it was made of, or turn it back "
            "with fp4 if all of it is int8 in groups of 32 that was FP4"
        )
    now = {name: source.format.name if source.format else KEEP for name, source in matrices.items()}
    return {name: fmt for name, fmt in formats.items() if fmt not in (KEEP, now[name])}


def _shards(
    checkpoint: Checkpoint, chosen: Mapping[str, tuple[Source, str, tuple[int, int]]], renamed: Mapping[str, str]
) -> dict[str, Shard]:
    replaced = {part for source, _, _ in chosen.values() for part in source.parts}
    _check_stacks(checkpoint, chosen)
    shards: dict[str, Shard] = {}
    for name, ref in checkpoint.refs.items():
        shard = shards.setdefault(ref.file.name, Shard({}, {}))
        if name not in replaced:
            shard.kept[renamed.get(name, name)] = ref
    for name, (source, fmt, shape) in chosen.items():
        try:
            matrix = Matrix(source, fmt, shape, specs_of(name, shape, fmt))
        except FormatError as problem:
            raise FormatError(
                f"{shown(source.ref.file)}: {name} {problem}; choose another group size or a recipe that keeps it"
            ) from None
        shards[source.ref.file.name].packed[name] = matrix
    return shards


def _check_stacks(checkpoint: Checkpoint, chosen: Mapping[str, tuple[Source, str, tuple[int, int]]]) -> None:
    """Raises UsageError if of a stack of experts, as transformers saves them, only some are to be rounded."""
    taken: dict[str, int] = {}
    for source, _, _ in chosen.values():
        taken[source.parts[0]] = taken.get(source.parts[0], 0) + source.ref.nbytes
    for name, nbytes in taken.items():
        if nbytes < checkpoint.refs[name].nbytes:
            raise UsageError(
                f"{shown(name)} is a stack of experts, of which not all are to be quantized; choose all of it"
            )


def _copies(source: Path) -> dict[str, bytes]:
    """Read now, so that one that cannot be read is known before the work, and what is noted of them stays true."""
    found = [name for name in _COPIED if os.path.lexists(source / name)]
    return {name: bytes(read_bytes(source / name, _MOST_COPIED, CheckpointError)) for name in found}


def _fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, importance: Importance | None, config: bytes, copies: Mapping[str, bytes]
) -> str:
    """Of the source's config, headers and other files, the recipe, the importance and this program."""
    digest = hashlib.sha256(f"{VERSION}\n{recipe.text}\n".encode("utf-8", "backslashreplace"))
    if importance is not None:
        digest.update(importance.digest().encode())
    for name, data in {"config.json": config, **copies}.items():
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    for name, ref in sorted(checkpoint.refs.items()):
        line = f"{name} {ref.file.name} {ref.offset} {ref.nbytes} {ref.dtype} {ref.shape}\n"
        # JSON can spell half of a surrogate pair, which is no UTF-8.
        digest.update(line.encode("utf-8", "backslashreplace"))
    for file, (size, _identity) in sorted(checkpoint.identities().items()):
        digest.update(f"{file.name} {size} {os.stat(file).st_mtime_ns}\n".encode())
        beside = signs_of(file)
        if beside.exists():
            digest.update(f"{beside.name} {beside.stat().st_size} {beside.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()
