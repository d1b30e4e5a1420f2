"""Downloads into the library: what is taken of a repository, and how it becomes a model.

Takes data only, by an allow-list of names, and never a folder. A download lies in a hidden folder until every file has
its size and digest and the headers agree; interrupted, it goes on with the first file that is not complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.checkpoint import INDEX, SINGLE, Checkpoint, some
from localmoe.device import free_disk
from localmoe.errors import CheckpointError, ModelError, ResourceError, UsageError
from localmoe.files import MIB, full_disk, read_json, shown, sized, sync_folder, write_atomically
from localmoe.hub import Hub, Listing, RemoteFile
from localmoe.library import ORIGIN, Library
from localmoe.loader import read_config
from localmoe.locks import lock

LOCK = "pull.lock"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Plain names only: a name from the hub never becomes a path. Case matters to nobody who writes a licence.
_WANTED = re.compile(r"\w[\w.-]*\.(safetensors|json)|tokenizer\.model|chat_template\.jinja|"
                     r"(licen[cs]e|copying|readme)(\.(md|txt))?|(licen[cs]e|notice)[\w-]*(\.(md|txt))?",
                     re.ASCII | re.IGNORECASE)  # fmt: skip
_WEIGHTS = ".safetensors"
# What is being done, and bytes that are done of all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a pull will bring. files: in the order in which they are fetched; left_out: how many others there are.

    here_bytes: of files that an earlier try has brought."""

    repo: str
    revision: str | None
    commit: str
    name: str
    files: list[RemoteFile]
    left_out: int
    total_bytes: int
    here_bytes: int


def prepare(library: Library, hub: Hub, repo: str, *, revision: str | None = None, name: str | None = None) -> Plan:
    """Ask the hub what there is; writes nothing.

    Raises UsageError for a name that is taken or no name, ModelError for a repository that holds no model for us."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UsageError(f"{shown(repo)} is no repository, expected OWNER/NAME")
    name = name or repo.partition("/")[2]
    library.new(name)
    partial = library.partial(name)
    begun = _begun(partial)
    if begun and (begun["repo"], begun["revision"]) != (repo, revision):
        raise UsageError(
            f"{shown(partial)} holds an unfinished download of {shown(begun['repo'])}"
            f"{' at ' + shown(begun['revision']) if begun['revision'] else ''}; "
            f"go on with that, remove it (localmoe rm {name}), or choose another name with --as"
        )
    # A branch may have moved since; files of two commits make no model.
    listing = hub.listing(repo, begun["commit"] if begun else revision)
    files = wanted(repo, listing)
    here = sum(_size(file) for file in files if _length(partial / file.name) == file.nbytes)
    total = sum(map(_size, files))
    return Plan(repo, revision, listing.commit, name, files, len(listing.files) - len(files), total, here)


def wanted(repo: str, listing: Listing) -> list[RemoteFile]:
    """The files to take, config.json first and weights last. Raises ModelError if they are no model."""
    files = {file.name: file for file in listing.files if _WANTED.fullmatch(file.name) and file.name != ORIGIN}
    if "config.json" not in files or not any(name.endswith(_WEIGHTS) for name in files):
        raise ModelError(
            f"{shown(repo)}: has no config.json with safetensors files beside it; localmoe takes no other weights"
        )
    unsized = [file.name for file in files.values() if type(file.nbytes) is not int or file.nbytes < 0]
    if unsized:
        raise ModelError(f"{shown(repo)}: the hub does not tell the size of {some(unsized)}; try again later")
    return sorted(files.values(), key=lambda f: (f.name.endswith(_WEIGHTS), f.name != "config.json", f.name))


def check_room(library: Library, plan: Plan) -> None:
    """Raises ResourceError if what is missing is more than the disk has room for."""
    need, free = plan.total_bytes - plan.here_bytes, free_disk(library.folder)
    if free is not None and need > free:
        raise ResourceError(
            f"{shown(plan.repo)}: needs {sized(need)} more and {sized(free)} are free for "
            f"{shown(library.folder)}; free some disk space, or choose another folder with LOCALMOE_MODELS"
        )


def download(library: Library, hub: Hub, plan: Plan, progress: Progress) -> Path:
    """Bring what is missing, check it, and give the model its name; returns its folder.

    Raises ResourceError for a full disk, UsageError if another process is at it, LocalMoeError from the hub, and
    ModelError if what came is no model. Whatever it raises, the same call goes on."""
    target, partial = library.new(plan.name), library.partial(plan.name)
    problem = "the disk is full; free some disk space, and the same command goes on"
    with contextlib.ExitStack() as held, full_disk(library.folder, problem):
        partial.mkdir(parents=True, exist_ok=True)
        held.callback(os.close, lock(partial / LOCK))
        note = {"repo": plan.repo, "revision": plan.revision, "commit": plan.commit}
        write_atomically(partial / ORIGIN, json.dumps(note, indent=1).encode())
        _forget_leftovers(partial)
        _bring(partial, hub, plan, progress)
        with Checkpoint.open(partial):
            progress("the headers agree", plan.total_bytes, plan.total_bytes)
        _forget_leftovers(partial)
        partial.rename(target)
        (target / LOCK).unlink()
        sync_folder(target)
        sync_folder(library.folder)
    return target


def _bring(partial: Path, hub: Hub, plan: Plan, progress: Progress) -> None:
    done, checked = 0, False
    for number, file in enumerate(plan.files, 1):
        if file.name.endswith(_WEIGHTS) and not checked:
            _check_texts(partial, plan)
            checked = True
        where = f"file {number} of {len(plan.files)}, {file.name}"
        path = partial / file.name
        if _length(path) is not None:
            progress(f"checking {where}", done, plan.total_bytes)
        if not _is_complete(path, file):
            path.unlink(missing_ok=True)
            progress(where, done, plan.total_bytes)
            hub.fetch(plan.repo, plan.commit, file.name, partial)
            if not _is_complete(path, file):
                path.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{shown(plan.repo)}: {file.name} did not come as the hub describes it; start again"
                )
        done += _size(file)


def _check_texts(partial: Path, plan: Plan) -> None:
    """What can be known before the weights: that localmoe has this architecture, and that no shard is missing."""
    names = {file.name for file in plan.files}
    try:
        read_config(partial)
        if SINGLE not in names:
            if INDEX not in names:
                raise CheckpointError(f"{shown(plan.repo)}: has neither {SINGLE} nor {INDEX}, expected one of them")
            shards = read_json(partial / INDEX, 100 * MIB, CheckpointError).get("weight_map")
            missing = sorted(set(map(str, shards.values())) - names) if isinstance(shards, dict) else []
            if missing:
                raise CheckpointError(f"{shown(plan.repo)}: lacks {some(missing)}, which its {INDEX} names")
    except ModelError:
        # It can never become a model, and nothing of it was expensive.
        shutil.rmtree(partial)
        raise


def _begun(partial: Path) -> dict[str, Any] | None:
    """What an earlier try noted."""
    if not (partial / ORIGIN).exists():
        return None
    note = read_json(partial / ORIGIN, MIB, ModelError)
    return {key: note.get(key) for key in ("repo", "revision", "commit")}


def _size(file: RemoteFile) -> int:
    return file.nbytes or 0


def _length(path: Path) -> int | None:
    return path.lstat().st_size if path.is_file() and not path.is_symlink() else None


def _is_complete(path: Path, file: RemoteFile) -> bool:
    """Of the size and digest that the hub tells; then it is brought to the disk too."""
    if _length(path) != file.nbytes:
        return False
    with open(path, "rb") as opened:
        same = file.sha256 is None or hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        os.fsync(opened.fileno())
    return same


def _forget_leftovers(partial: Path) -> None:
    """What huggingface_hub keeps beside files; what it has of an unfinished file it never uses again."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
