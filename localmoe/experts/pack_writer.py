"""Makes a pack: streams a model's experts into records, and goes on where it was interrupted.

Nothing has its final name before it is whole and on the disk: data, then names, then the manifest. Until then a journal
says how many records are on the disk. Memory: a few experts. Knows layouts and files; does not know models."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError, ResourceError, UsageError
from localmoe.experts.file import File
from localmoe.experts.layout import Layout, kind_bytes
from localmoe.experts.pack import Progress, begins_of, kinds_of, open_pack, record_bytes_of, stream
from localmoe.experts.pack_manifest import (
    MANIFEST,
    MAX_JSON,
    MAX_STRIPES,
    VERSION,
    is_crc32,
    read_manifest,
    stripe_name,
    stripe_records,
)
from localmoe.files import forget_cached, full_disk, pwrite_all, read_json, shown, sync_folder, write_atomically
from localmoe.locks import lock

JOURNAL = "pack.partial.json"
LOCK = "pack.lock"
# Records between two entries of the journal: what an interruption costs at most.
STEP = 64
_PARTIAL = ".partial"
_SPARE = 1 << 20


def write_pack(
    layout: Layout,
    open_file: Callable[[int], File],
    fingerprint: str,
    folders: Sequence[Path],
    progress: Progress | None = None,
) -> int:
    """Make a pack in these folders, or complete it; returns the bytes that were still to be written.

    open_file(number): a file of the layout. progress(done, total): bytes. Raises UsageError for a folder that is of
    something else or locked, ResourceError for a disk without room."""
    folders = _checked(folders, layout)
    with contextlib.ExitStack() as locks:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            locks.callback(os.close, lock(folder / LOCK))
        writer = _Writer(layout, fingerprint, folders)
        return 0 if writer.is_complete() else writer.run(open_file, progress)


def _checked(folders: Sequence[Path], layout: Layout) -> list[Path]:
    """Whole paths. Raises UsageError for a folder that is a model's, or given twice."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    real = [path.resolve() for path in paths]
    if not 0 < len(paths) <= MAX_STRIPES or len(set(real)) < len(real):
        raise UsageError(f"{len(paths)} folders for a pack, expected 1 to {MAX_STRIPES} different ones")
    # Links of a model directory lead to files that other models may share.
    layout.place(0, 0)
    models = {path for file in layout.files for path in (file.parent.resolve(), file.resolve().parent)}
    for path in real:
        if path in models or (path / "config.json").exists() or any(path.glob("*.safetensors")):
            raise UsageError(f"{shown(path)}: is a model directory; choose a folder of its own for the pack")
    return paths


class _Writer:
    """One pack in the making. `crc32` holds a sum for each record that is written."""

    def __init__(self, layout: Layout, fingerprint: str, folders: list[Path]) -> None:
        self._layout, self._fingerprint, self._folders = layout, fingerprint, folders
        self._total = layout.num_layers * layout.num_experts
        self._record_bytes = record_bytes_of(layout)
        count = len(folders)
        self._finals = [folder / stripe_name(i, count) for i, folder in enumerate(folders)]
        self._partials = [path.with_name(path.name + _PARTIAL) for path in self._finals]
        self._crc32: list[int] = []

    def is_complete(self) -> bool:
        """Whether the pack is there. A torn one of ours is taken away. Raises UsageError for another's."""
        path = self._folders[0] / MANIFEST
        if not os.path.lexists(path):
            return False
        found = read_manifest(self._folders[0])
        if found.fingerprint != self._fingerprint:
            raise UsageError(f"{shown(path)}: was made from another model; delete it or choose another folder")
        if list(found.files) != self._finals:
            raise UsageError(f"{shown(path)}: was made with other folders; give the same ones, or delete it")
        with contextlib.suppress(CheckpointError):
            open_pack(self._folders[0])
            self._remove(self._folders[0] / JOURNAL)
            return True
        self._remove(path, self._folders[0] / JOURNAL, *self._finals, *self._partials)
        return False

    def run(self, open_file: Callable[[int], File], progress: Progress | None) -> int:
        """Write what is missing, then give everything its final name."""
        self._resume()
        left = (self._total - len(self._crc32)) * self._record_bytes
        problem = (
            f"no room for all of the pack's {left / 2**30:.1f} GiB; free some disk space and run localmoe pack again, "
            "it goes on from here"
        )
        with contextlib.ExitStack() as files, full_disk(self._folders[0], problem):
            self._write_journal()
            fds = [] if self._is_named() else [self._open_partial(i, files) for i in range(len(self._folders))]
            self._write_records(open_file, fds, progress)
            for fd in fds:
                os.fsync(fd)
            self._finish()
        return left

    def _resume(self) -> None:
        """Find how far an interrupted run has come, and whether there is room for the rest."""
        path = self._folders[0] / JOURNAL
        if os.path.lexists(path):
            self._crc32 = self._read_journal(path)
            if not self._is_named() and not all(map(self._is_long_enough, range(len(self._folders)))):
                self._crc32 = []
        else:
            for file in (*self._finals, *self._partials):
                if os.path.lexists(file):
                    raise UsageError(f"{shown(file)}: is of another pack; delete it or choose another folder")
        self._check_room()

    def _read_journal(self, path: Path) -> list[int]:
        found = read_json(path, MAX_JSON, CheckpointError)
        crc32 = found.get("crc32")
        if found.get("version") != VERSION or not is_crc32(crc32) or len(crc32) > self._total:  # type: ignore[arg-type]
            raise CheckpointError(f"{shown(path)}: is not the journal of this pack; delete it and the .partial files")
        if found.get("fingerprint") != self._fingerprint:
            raise UsageError(f"{shown(path)}: was begun from another model; delete it or choose another folder")
        if found.get("folders") != [str(folder) for folder in self._folders]:
            raise UsageError(f"{shown(path)}: was begun with other folders; give the same ones, or delete it")
        return list(crc32)  # type: ignore[arg-type]

    def _is_named(self) -> bool:
        """Whether a run came as far as to give files their final names."""
        return len(self._crc32) == self._total and any(map(os.path.lexists, self._finals))

    def _partial_bytes(self, stripe: int) -> int:
        return stripe_records(len(self._crc32), stripe, len(self._folders)) * self._record_bytes

    def _is_long_enough(self, stripe: int) -> bool:
        try:
            return os.lstat(self._partials[stripe]).st_size >= self._partial_bytes(stripe)
        except FileNotFoundError:
            return self._partial_bytes(stripe) == 0

    def _check_room(self) -> None:
        need: dict[int, int] = {}
        for i, folder in enumerate(self._folders):
            whole = stripe_records(self._total, i, len(self._folders)) * self._record_bytes
            device = folder.stat().st_dev
            need[device] = need.get(device, _SPARE) + whole - self._partial_bytes(i)
        for folder in self._folders:
            found = os.statvfs(folder)
            free, wanted = found.f_bavail * found.f_frsize, need[folder.stat().st_dev]
            if free < wanted:
                raise ResourceError(
                    f"{shown(folder)}: {free / 2**30:.1f} GiB are free and the pack needs {wanted / 2**30:.1f} GiB "
                    "more; free some disk space or choose another folder"
                )

    def _open_partial(self, stripe: int, files: contextlib.ExitStack) -> int:
        """Open a file to go on with it; what the journal does not know of is cut off."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._partials[stripe], flags, 0o666)
        files.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{shown(self._partials[stripe])}: is not a regular file; delete it")
        os.ftruncate(fd, self._partial_bytes(stripe))
        return fd

    def _write_records(self, open_file: Callable[[int], File], fds: list[int], progress: Progress | None) -> None:
        experts = self._layout.num_experts
        first, total = len(self._crc32), self._total * self._record_bytes
        numbers = range(first, self._total)
        record = bytearray(self._record_bytes)
        source = stream(
            open_file,
            (self._layout.place(*divmod(number, experts)).ranges for number in numbers),
            self._layout.slot_bytes,
        )
        if progress:
            progress(first * self._record_bytes, total)
        with contextlib.closing(source):
            for number, read in zip(numbers, source, strict=True):
                self._arrange(number, read, record)
                offset = number // len(fds) * self._record_bytes
                pwrite_all(fds[number % len(fds)], memoryview(record), offset)
                self._crc32.append(zlib.crc32(record))
                if (number + 1) % STEP == 0 or number + 1 == self._total:
                    self._settle(fds)
                if progress:
                    progress((number + 1) * self._record_bytes, total)

    def _arrange(self, number: int, read: memoryview, record: bytearray) -> None:
        """Put an expert's tensors, as they were read, to their places in the record; zeros between them."""
        layer, expert = divmod(number, self._layout.num_experts)
        kind = self._layout.kinds[layer]
        end = 0
        sources = self._layout.place(layer, expert).begins
        for begin, source, nbytes in zip(begins_of(kind), sources, kind_bytes(kind), strict=False):
            record[end:begin] = bytes(begin - end)
            end = begin + nbytes
            record[begin:end] = read[source : source + nbytes]
        record[end:] = bytes(len(record) - end)

    def _settle(self, fds: list[int]) -> None:
        """What is written is on the disk before the journal says so."""
        for fd in fds:
            os.fsync(fd)
            forget_cached(fd)
        self._write_journal()

    def _write_journal(self) -> None:
        folders = [str(folder) for folder in self._folders]
        entry = {"version": VERSION, "fingerprint": self._fingerprint, "folders": folders, "crc32": self._crc32}
        _write_json(self._folders[0] / JOURNAL, entry)

    def _finish(self) -> None:
        for partial, final in zip(self._partials, self._finals, strict=True):
            if os.path.lexists(partial):
                os.replace(partial, final)
            sync_folder(final.parent)
        paths = [self._finals[0].name, *map(str, self._finals[1:])]
        sizes = [self._partial_bytes(i) for i in range(len(paths))]
        manifest = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "num_layers": self._layout.num_layers,
            "num_experts": self._layout.num_experts,
            "kinds": kinds_of(self._layout),
            "record_bytes": self._record_bytes,
            "files": [{"path": path, "nbytes": nbytes} for path, nbytes in zip(paths, sizes, strict=True)],
            "crc32": self._crc32,
        }
        _write_json(self._folders[0] / MANIFEST, manifest)
        self._remove(self._folders[0] / JOURNAL)

    def _remove(self, *files: Path) -> None:
        """The manifest first, so that no manifest is left of files that are gone."""
        for file in files:
            if os.path.lexists(file):
                file.unlink()
                sync_folder(file.parent)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, separators=(",", ":")).encode())
