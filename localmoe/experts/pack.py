"""The pack: every routed expert as one record of whole blocks, so that one read fetches one expert.

A cache, made again from the model at any time. Knows its files and how to check them; pack_writer makes them. A record
holds an expert's tensors in the order of layout.kind_bytes, each at a multiple of 64 bytes. Memory: a few records."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError
from localmoe.experts.file import File
from localmoe.experts.layout import BLOCK, Kind, Layout, Range, kind_bytes
from localmoe.experts.pack_manifest import Manifest, read_manifest
from localmoe.experts.reader import Job, Reader
from localmoe.files import open_regular, pread_into, shown
from localmoe.memory import SlotMemory
from localmoe.safetensors_io import DTYPES, MAX_HEADER, TensorRef

# Size and (device, inode) of files, as Checkpoint.identities gives them.
Identities = Mapping[Path, tuple[int, tuple[int, int]]]
Progress = Callable[[int, int], None]
_ALIGN = 64
# Experts on their way while one is worked on.
_AHEAD = 4
# Blocks of each file's numbers that tell one fine-tune from another.
_SAMPLES = 8
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


def fingerprint(files: Identities) -> str:
    """Tells the weights of a model: names, sizes, headers and a few blocks of its files; a copy has the same.

    Raises CheckpointError if a file is no longer the one that was opened."""
    digest = hashlib.sha256(b"localmoe pack")
    for path in sorted(files, key=lambda path: path.name):
        size, identity = files[path]
        digest.update(f"\0{path.name}\0{size}\0".encode())
        fd, found = open_regular(path, CheckpointError)
        try:
            info = os.fstat(fd)
            if found != size or identity != (info.st_dev, info.st_ino):
                raise CheckpointError(f"{shown(path)}: has been replaced since it was opened; start again")
            digest.update(_read(fd, path, 0, 8 + _header_bytes(fd, path, size)))
            for i in range(_SAMPLES):
                nbytes = min(BLOCK, size)
                digest.update(_read(fd, path, (size - nbytes) * (i + 1) // _SAMPLES, nbytes))
        finally:
            os.close(fd)
    return digest.hexdigest()


def _header_bytes(fd: int, path: Path, size: int) -> int:
    length = int.from_bytes(_read(fd, path, 0, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"{shown(path)}: header of {length} bytes in {size}, expected less; download it again")
    return length


def _read(fd: int, path: Path, offset: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    pread_into(fd, memoryview(data), offset, shown(path), CheckpointError)
    return data


def begins_of(kind: Kind) -> list[int]:
    """Where each tensor of an expert begins in its record, and where the last one ends."""
    begins = [0]
    for nbytes in kind_bytes(kind):
        begins[-1] = -(-begins[-1] // _ALIGN) * _ALIGN
        begins.append(begins[-1] + nbytes)
    return begins


def record_bytes_of(layout: Layout) -> int:
    """Bytes of every record: those of the largest expert, in whole blocks."""
    return max(-(-begins_of(kind)[-1] // BLOCK) * BLOCK for kind in layout.kinds)


def kinds_of(layout: Layout) -> list[Any]:
    """What the manifest says of the layers' experts: format, shape and dtypes of w1, w2 and w3."""
    return [
        [
            {
                "format": None if matrix.format is None else matrix.format.name,
                "shape": list(matrix.shape),
                "dtypes": [_SPELLED[dtype] for _, dtype in matrix.parts()],
            }
            for matrix in kind
        ]
        for kind in layout.kinds
    ]


@dataclass(frozen=True)
class Pack:
    """A whole pack, its files checked for their sizes."""

    path: Path
    manifest: Manifest
    files: dict[Path, tuple[int, tuple[int, int]]]

    def layout(self, model: Layout, weights: str) -> Layout:
        """A layout of the model that reads the pack. weights: the model's fingerprint.

        Raises CheckpointError if the pack was made from others."""
        manifest = self.manifest
        shapes = (manifest.num_layers, manifest.num_experts, manifest.kinds, manifest.record_bytes)
        if manifest.fingerprint != weights or shapes != (
            model.num_layers,
            model.num_experts,
            kinds_of(model),
            record_bytes_of(model),
        ):
            raise CheckpointError(
                f"{shown(self.path)}: was made from other weights than the model's; make a pack of this model, or "
                "leave the pack out"
            )

        def locate(layer: int, expert: int) -> list[TensorRef]:
            kind = model.kinds[layer]
            record = manifest.range(layer * manifest.num_experts + expert)
            file, begins = manifest.files[record.file], begins_of(kind)
            parts = [part for matrix in kind for part in matrix.parts()]
            return [
                TensorRef(file, record.offset + begin, nbytes, _SPELLED[dtype], shape)
                for (shape, dtype), begin, nbytes in zip(parts, begins, kind_bytes(kind), strict=False)
            ]

        return Layout(model.kinds, model.num_experts, locate)

    def open_file(self, number: int) -> File:
        """A file by its number in the manifest."""
        path = self.manifest.files[number]
        return File(path, *self.files[path])


def open_pack(folder: Path) -> Pack:
    """Raises CheckpointError if the folder holds no pack, or one that is not whole."""
    manifest = read_manifest(folder)
    identities = {}
    for i, path in enumerate(manifest.files):
        fd, size = open_regular(path, CheckpointError)
        info = os.fstat(fd)
        os.close(fd)
        if size != manifest.stripe_bytes(i):
            raise CheckpointError(
                f"{shown(path)}: is {size} bytes, expected {manifest.stripe_bytes(i)}; run localmoe pack again"
            )
        identities[path] = (size, (info.st_dev, info.st_ino))
    return Pack(folder, manifest, identities)


def verify(pack: Pack, progress: Progress | None = None) -> None:
    """Read all of it. Raises CheckpointError naming the first expert that is not what was written."""
    manifest = pack.manifest
    total = len(manifest.crc32) * manifest.record_bytes
    wanted = ([manifest.range(number)] for number in range(len(manifest.crc32)))
    for number, record in enumerate(stream(pack.open_file, wanted, manifest.record_bytes)):
        if zlib.crc32(record) != manifest.crc32[number]:
            layer, expert = divmod(number, manifest.num_experts)
            raise CheckpointError(
                f"{shown(manifest.files[number % len(manifest.files)])}: expert {expert} of layer {layer} is not what "
                f"was written; check the disk, delete the pack's files and run localmoe pack again"
            )
        if progress:
            progress((number + 1) * manifest.record_bytes, total)


def stream(
    open_file: Callable[[int], File], wanted: Iterable[Sequence[Range]], slot_bytes: int
) -> Generator[memoryview, None, None]:
    """Read experts in order, a few ahead, each into a slot; its bytes are valid until the next one is asked for."""
    memory = SlotMemory(_AHEAD, slot_bytes)
    reader = Reader(open_file)
    jobs = deque[tuple[Job, memoryview]]()
    try:
        for number, ranges in enumerate(wanted):
            if len(jobs) == _AHEAD:
                yield _first(reader, jobs)
            view = memory.view(number % _AHEAD)
            jobs.append((reader.submit(ranges, view, lambda: None), view))
        while jobs:
            yield _first(reader, jobs)
    finally:
        reader.close()


def _first(reader: Reader, jobs: deque[tuple[Job, memoryview]]) -> memoryview:
    job, view = jobs.popleft()
    reader.wait(job)
    return view
