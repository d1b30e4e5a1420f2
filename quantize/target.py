"""What a conversion finds where it is to write: nothing, its own work up to some point, or something else.

Reads sizes and what was noted; writes nothing but an empty folder. A run holds the folder's lock."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmoe.device import free_disk
from localmoe.errors import CheckpointError, ResourceError, UsageError
from localmoe.files import partial_of, read_json, shown, sized
from localmoe.locks import lock
from localmoe.quantize import output
from localmoe.quantize.job import VERSION, Job
from localmoe.quantize.signs import check_source

LOCK, PARTIAL = "localmoe-quantize.lock", "localmoe-quantize.partial.json"
SPARE = 64 << 20


def check(job: Job) -> bool:
    """Raise what make() would raise before its work, and make nothing; returns whether there is work to do."""
    check_target(job)
    if not job.out.exists():
        check_room(job, {})
        return True
    if (job.out / LOCK).exists():
        os.close(lock(job.out / LOCK))
    if finished(job) is not None:
        return False
    check_room(job, begun(job))
    return True


def check_target(job: Job) -> None:
    """Raises UsageError for a folder that can be no target, CheckpointError for a source that has lost a file."""
    if job.out.resolve() == job.source.resolve():
        raise UsageError(f"{shown(job.out)}: is the source; choose another folder")
    nearest = next(place for place in (job.out.absolute(), *job.out.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UsageError(f"{shown(nearest)}: is not a folder; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{shown(nearest)}: cannot be written to; choose another place")
    undone = [name for name, shard in job.shards.items() if any(m.is_undone for m in shard.packed.values())]
    check_source(job.source, undone)


def make_folder(out: Path) -> None:
    """Raises UsageError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UsageError(f"{shown(out)}: cannot be made ({cause.strerror}); choose another folder") from None


def noted(job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
    """What an interrupted run leaves: whose work it is, and {shard: digests and measures}."""
    whose = {"localmoe_quantize": VERSION, "recipe": job.recipe.text, "fingerprint": job.fingerprint}
    return {**whose, "shards": done}


def _other(job: Job, found: Mapping[str, Any]) -> str:
    """What makes a folder's work another than this job's."""
    if "fingerprint" not in found:
        return "holds another model"
    if found.get("localmoe_quantize") != VERSION:
        return "was begun by another version of localmoe"
    if found.get("recipe") != job.recipe.text:
        return "was begun with another recipe, or other options for one"
    return "was begun from other files, or with another importance matrix"


def finished(job: Job) -> dict[str, Any] | None:
    """What was noted of this very conversion, if it has been made. Raises UsageError for anything else with a config,
    CheckpointError if a shard is lost."""
    if not (job.out / "config.json").exists():
        return None
    try:
        sidecar = read_json(job.out / output.SIDECAR, output.MOST_JSON, CheckpointError)
    except CheckpointError:
        sidecar = {}
    if sidecar.get("fingerprint") != job.fingerprint:
        raise UsageError(f"{shown(job.out)}: {_other(job, sidecar)}; choose an empty folder")
    lost = next((name for name, shard in job.shards.items() if size_of(job.out / name) < shard.nbytes), None)
    if lost is not None:
        raise CheckpointError(
            f"{shown(job.out)}: {shown(lost)} is missing or cut short; remove the folder, start again"
        )
    return sidecar


def begun(job: Job) -> dict[str, Any]:
    """What an interrupted run has finished: {shard: digests and measures}."""
    path = job.out / PARTIAL
    if not path.exists():
        # A file of the user's would be overwritten by one of the model's.
        if any(file.name != LOCK and not file.name.startswith(f".{PARTIAL}") for file in job.out.iterdir()):
            raise UsageError(f"{shown(job.out)}: holds files of something else; choose an empty folder")
        return {}
    partial = read_json(path, output.MOST_JSON, CheckpointError)
    if partial.get("fingerprint") != job.fingerprint:
        raise UsageError(f"{shown(job.out)}: {_other(job, partial)}; remove it, or choose another folder")
    shards: dict[str, Any] = partial["shards"]
    # A shard has its name before it is noted: one that is not noted is written again.
    return {name: facts for name, facts in shards.items() if _is_there(job, name, facts)}


def _is_there(job: Job, shard: str, facts: Mapping[str, Any]) -> bool:
    beside = facts["files"].items()
    return size_of(job.out / shard) == facts["nbytes"] and all(
        size_of(job.out / name) == file["nbytes"] for name, file in beside
    )


def size_of(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    return path.stat().st_size if path.exists() else -1


def _taken(path: Path) -> int:
    """Bytes of the disk; not those of the file, which may have holes."""
    return 512 * path.stat().st_blocks if path.exists() else 0


def check_room(job: Job, done: Mapping[str, Any]) -> None:
    """Raises ResourceError if what is not done yet has no room. done: by shard."""
    left = sum(shard.nbytes + shard.nbytes_beside for name, shard in job.shards.items() if name not in done)
    # What a killed process has left takes the room that it is written in again.
    reused = sum(_taken(partial_of(job.out / name)) for name in job.shards)
    free = free_disk(job.out)
    if free is not None and free + reused < left + SPARE:
        raise ResourceError(
            f"{shown(job.out)}: {sized(left)} are still to be written, {sized(SPARE)} to be left, and "
            f"{sized(free)} are free; make some room, or choose another disk"
        )
