"""A model directory into another, shard by shard, with some of its matrices in other formats.

Streams: in memory is one tensor at a time, never the model. A shard gets its name when it is whole and on the disk, and
config.json comes last, so a folder that was interrupted is no model, and the same command goes on with it. The same
source and recipe give the same bytes. Knows names through the model's inventory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.checkpoint import INDEX, Checkpoint
from localmoe.config import load_config
from localmoe.device import free_disk
from localmoe.errors import CheckpointError, ConfigError, ResourceError, UsageError
from localmoe.files import MIB, read_json, shown
from localmoe.formats import FORMATS, Int, QuantizedTensor
from localmoe.loader import Source, match, read_config
from localmoe.locks import lock
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.quantize import report
from localmoe.quantize.recipe import KEEP, Recipe
from localmoe.quantize.report import Measured
from localmoe.quantize.rounding import quantize
from localmoe.safetensors_io import DTYPES, ShardWriter, TensorRef, byte_view

SIDECAR, REPORT, LOCK = "localmoe-quantize.json", "localmoe-report", "localmoe-quantize.lock"
_PARTIAL = "localmoe-quantize.partial.json"
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE",
           "chat_template.jinja")  # fmt: skip
_SPARE = 64 << 20
# Another number where the same source and recipe give other bytes than before.
_VERSION = 1
_MOST_JSON = 256 * MIB

# Bytes that are done, and all of them.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a conversion is to do. shards: for each output file, what keeps its bytes and what does not.

    bytes_in: of everything that is read; bytes_out: of all shards."""

    source: Path
    out: Path
    recipe: Recipe
    shards: dict[str, Shard]
    fingerprint: str
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Shard:
    """kept: raw tensors by name. packed: (source, format) of each matrix by published name. specs: of the output."""

    kept: dict[str, TensorRef]
    packed: dict[str, tuple[Source, str]]
    specs: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(spec) for spec in self.specs.values())


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype].itemsize


def prepare(checkpoint: Checkpoint, out: Path, recipe: Recipe) -> Job:
    """Decide everything from config and headers. Raises ModelError for a bad source, UsageError for a bad target."""
    config = read_config(checkpoint.path)
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
        shard.specs.update(specs_of(name, inventory[name].shape, fmt))  # type: ignore[arg-type]
    bytes_in = sum(ref.nbytes for ref in checkpoint.refs.values())
    return Job(
        checkpoint.path, out, recipe, shards, _fingerprint(checkpoint, recipe), bytes_in,
        sum(shard.nbytes for shard in shards.values()),
    )  # fmt: skip


def specs_of(name: str, shape: tuple[int, int], fmt: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a packed matrix is stored as. Source: compressed-tensors, format pack-quantized."""
    packing = FORMATS[fmt]
    assert isinstance(packing, Int), "an integer format"
    rows, cols = shape
    return {
        f"{name}_packed": ("I32", (rows, packing.data_shape(rows, cols)[1] // 4)),
        f"{name}_scale": ("BF16", packing.scale_shape(rows, cols)),
        f"{name}_shape": ("I64", (2,)),
    }


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Of the source's config and headers, the recipe and this program."""
    digest = hashlib.sha256(f"{_VERSION}\n{recipe.text}\n".encode())
    digest.update((checkpoint.path / "config.json").read_bytes())
    for name, ref in sorted(checkpoint.refs.items()):
        digest.update(f"{name} {ref.file.name} {ref.offset} {ref.nbytes} {ref.dtype} {ref.shape}\n".encode())
    for file, (size, _identity) in sorted(checkpoint.identities().items()):
        digest.update(f"{file.name} {size} {os.stat(file).st_mtime_ns}\n".encode())
    return digest.hexdigest()


def convert(source: Path, out: Path, recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Make `out`, or go on making it; returns the report. Raises UsageError for a folder that is of something else or
    being written, ResourceError for a disk without room, ModelError for a bad source."""
    if out.resolve() == source.resolve():
        raise UsageError(f"{shown(out)}: is the source; choose another folder")
    with Checkpoint.open(source) as checkpoint:
        job = prepare(checkpoint, out, recipe)
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.callback(os.close, lock(out / LOCK))
            complete = _complete(job)
            if complete is not None:
                return complete
            done = _begun(job)
            _check_room(job, done)
            return _run(checkpoint, job, done, progress)


def _complete(job: Job) -> dict[str, Any] | None:
    """The report of this very conversion, if it has been made. Raises UsageError for anything else with a config."""
    if not (job.out / "config.json").exists():
        return None
    try:
        sidecar = read_json(job.out / SIDECAR, _MOST_JSON, CheckpointError)
    except CheckpointError:
        sidecar = {}
    if sidecar.get("fingerprint") != job.fingerprint:
        raise UsageError(f"{shown(job.out)}: holds another model; choose an empty folder")
    lost = next((name for name, shard in job.shards.items() if _size(job.out / name) < shard.nbytes), None)
    if lost is not None:
        raise CheckpointError(
            f"{shown(job.out)}: {shown(lost)} is missing or cut short; remove the folder, start again"
        )
    found: dict[str, Any] = sidecar["report"]
    return found


def _begun(job: Job) -> dict[str, Any]:
    """What an interrupted run has finished: {shard: digests and measures}."""
    path = job.out / _PARTIAL
    if not path.exists():
        # A file of the user's would be overwritten by one of the model's.
        if any(file.name != LOCK and not file.name.startswith(f".{_PARTIAL}") for file in job.out.iterdir()):
            raise UsageError(f"{shown(job.out)}: holds files of something else; choose an empty folder")
        return {}
    partial = read_json(path, _MOST_JSON, CheckpointError)
    if partial.get("fingerprint") != job.fingerprint:
        raise UsageError(
            f"{shown(job.out)}: was begun from another source, recipe or version; remove it, or choose another folder"
        )
    shards: dict[str, Any] = partial["shards"]
    # A shard has its name before it is noted: one that is not noted is written again.
    return {name: facts for name, facts in shards.items() if _size(job.out / name) == facts["nbytes"]}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _check_room(job: Job, done: Mapping[str, Any]) -> None:
    for name in job.shards:
        # What a killed process has left takes the room that it is to be written in.
        (job.out / f".{name}.partial").unlink(missing_ok=True)
    left = sum(shard.nbytes for name, shard in job.shards.items() if name not in done)
    free = free_disk(job.out)
    if free is not None and free < left + _SPARE:
        raise ResourceError(
            f"{shown(job.out)}: {left / 2**30:.2f} GiB are still to be written and {free / 2**30:.2f} GiB are free; "
            "free some disk space, or choose another disk"
        )


def _run(checkpoint: Checkpoint, job: Job, done: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    written = sum(job.shards[name].nbytes for name in done)
    # Before the first shard has its name, so that it is known whose it is.
    _write_json(job.out / _PARTIAL, {"fingerprint": job.fingerprint, "shards": done})
    for name, shard in job.shards.items():
        if name in done:
            continue
        tensors: dict[str, str] = {}
        measured: list[Measured] = []
        with ShardWriter(job.out / name, shard.specs) as writer:
            for part, data, facts in _parts(checkpoint, shard):
                writer.put(part, data)
                tensors[part] = hashlib.sha256(data).hexdigest()
                measured += [] if facts is None else [facts]
                written += len(data)
                if progress:
                    progress(written, job.bytes_out)
            writer.finish()
        noted = [asdict(one) for one in measured]
        done[name] = {"nbytes": writer.nbytes, "tensors": tensors, "measured": noted}
        _write_json(job.out / _PARTIAL, {"fingerprint": job.fingerprint, "shards": done})
    return _finish(job, done)


def _parts(checkpoint: Checkpoint, shard: Shard) -> Iterator[tuple[str, memoryview, Measured | None]]:
    """Every tensor of an output shard: its name, its bytes and, for the first of a packed matrix, what it cost."""
    for name, ref in shard.kept.items():
        buffer = memoryview(bytearray(ref.nbytes))
        checkpoint.read_into(ref, buffer)
        yield name, buffer, None
    for name, (source, fmt) in shard.packed.items():
        before = _read(checkpoint, source)
        values = before.dequantize() if isinstance(before, QuantizedTensor) else before.float()
        # The sum is a quicker look; it may overflow where no number is infinite.
        if not (values.sum().isfinite() or values.isfinite().all()):
            raise CheckpointError(
                f"{shown(source.ref.file)}: {name} has numbers that are not finite; download it again"
            )
        packed = quantize(before, values, fmt)
        formats = (source.format.name if source.format else source.ref.dtype.lower(), fmt)
        facts = report.measure(name, formats, (source.nbytes, packed.nbytes), values, packed.dequantize())
        rows, cols = packed.shape
        yield f"{name}_packed", byte_view(packed.data), facts
        yield f"{name}_scale", byte_view(packed.scale), None
        yield f"{name}_shape", byte_view(torch.tensor([rows, cols])), None


def _read(checkpoint: Checkpoint, source: Source) -> Tensor | QuantizedTensor:
    data = checkpoint.read(source.ref)
    if source.format is None or source.scale is None:
        return data
    rows, packed_cols = data.shape
    cols = packed_cols * (2 if source.format.name == "fp4" else 1)
    return source.format.bind(data, checkpoint.read(source.scale), (rows, cols))


def _finish(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """Everything beside the shards, config.json last. In the order of the source, whatever was done when."""
    done = {name: done[name] for name in job.shards}
    measured = [Measured(**one) for facts in done.values() for one in facts["measured"]]
    found = report.summary(measured, job.bytes_in, job.bytes_out)
    for name in _COPIED:
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.out / name)
    digests = {name: facts["tensors"] for name, facts in done.items()}
    sidecar = {
        "localmoe_quantize": _VERSION,
        "source": job.source.name,
        "recipe": job.recipe.text,
        "fingerprint": job.fingerprint,
        "tensors": digests,
        "report": found,
    }
    _write_json(job.out / SIDECAR, sidecar)
    _write_json(job.out / f"{REPORT}.json", found)
    text = f"# {job.source.name}, quantized by localmoe\n\n{report.markdown(found)}\n```toml\n"
    (job.out / f"{REPORT}.md").write_text(f"{text}{job.recipe.text}```\n", encoding="utf-8")
    if set(job.shards) != {"model.safetensors"}:
        weight_map = {name: shard for shard, tensors in digests.items() for name in tensors}
        _write_json(job.out / INDEX, {"metadata": {"total_size": job.bytes_out}, "weight_map": weight_map})
    _write_json(job.out / "config.json", _config(job))
    (job.out / _PARTIAL).unlink(missing_ok=True)
    (job.out / LOCK).unlink(missing_ok=True)
    return found


def _config(job: Job) -> dict[str, Any]:
    """The source's, with what was packed described in the words of compressed-tensors."""
    config = load_config(job.source)
    formats: dict[str, list[str]] = {}
    for shard in job.shards.values():
        for name, (_source, fmt) in shard.packed.items():
            formats.setdefault(fmt, []).append(name.removesuffix(".weight"))
    if not formats:
        return config
    groups = {}
    for number, (name, targets) in enumerate(sorted(formats.items())):
        packing = FORMATS[name]
        assert isinstance(packing, Int), "an integer format"
        groups[f"group_{number}"] = {
            "targets": sorted({_pattern(target) for target in targets}),
            "weights": {"num_bits": packing.bits, "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": packing.group, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "quantization_status": "compressed", "config_groups": groups, "ignore": []}  # fmt: skip
    kept = {"localmoe_source_quantization": config["quantization_config"]} if "quantization_config" in config else {}
    return config | {"quantization_config": quantization} | kept


def _pattern(name: str) -> str:
    """A module's name as a regular expression over layers and experts."""
    parts = [r"\d+" if part.isdigit() else part for part in name.split(".")]
    return "re:.*" + r"\.".join(parts) + "$"


def _write_json(path: Path, value: Any) -> None:
    """Under its name only when it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as cause:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{shown(path)}: cannot be written ({cause.strerror}); free some disk space") from None


def verify(folder: Path, progress: Progress | None = None) -> int:
    """Compare every tensor with the digest it was written with; returns how many there are.

    Raises ConfigError if the folder was not made by convert(), CheckpointError naming the first that differs."""
    digests = read_json(folder / SIDECAR, _MOST_JSON, ConfigError).get("tensors")
    if not isinstance(digests, dict):
        raise ConfigError(f"{shown(folder / SIDECAR)}: has no digests; quantize the model again")
    count = 0
    with Checkpoint.open(folder) as checkpoint:
        total, done = sum(ref.nbytes for ref in checkpoint.refs.values()), 0
        expected = {name: digest for tensors in digests.values() for name, digest in tensors.items()}
        for name in sorted({*checkpoint.refs, *expected}):
            ref = checkpoint.refs.get(name)
            if ref is None or name not in expected:
                raise CheckpointError(f"{shown(folder)}: {name} is {'missing' if ref is None else 'not one of it'}")
            buffer = memoryview(bytearray(ref.nbytes))
            checkpoint.read_into(ref, buffer)
            if hashlib.sha256(buffer).hexdigest() != expected[name]:
                raise CheckpointError(f"{shown(ref.file)}: {name} is not what was written; copy or quantize it again")
            count, done = count + 1, done + ref.nbytes
            if progress:
                progress(done, total)
    return count
