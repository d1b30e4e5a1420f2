"""A model directory's tensors: one model.safetensors, or an index and its shards, read with pread into given memory.

Knows names, bytes and offsets; does not know models. Opens only files of the directory it was given, keeps them open
(a file replaced meanwhile stays the one that was checked), maps nothing, and reads a tensor only when asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.files import MIB, forget_cached, pread_into, read_json, shown
from localmoe.safetensors_io import DTYPES, TensorRef, byte_view, open_shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")

# Bytes of a checkpoint read in passing that may be in the system's memory for nothing.
_CACHED = 64 * MIB


class Checkpoint:
    """Open shards and where every tensor lies in them. Close it, or use it in a with statement."""

    def __init__(self, path: Path, files: dict[Path, int], refs: dict[str, TensorRef], passing: bool = False) -> None:
        self.path = path
        self.refs = refs
        self._files = files
        self._passing, self._cached = passing, 0

    @classmethod
    def open(cls, path: Path, *, passing: bool = False) -> Checkpoint:
        """Open a model directory and check every header. A single model.safetensors wins over an index, as elsewhere.

        passing: what is read will not be read again soon, and need not stay in the system's memory.

        Raises CheckpointError for a missing, truncated or malformed file, and for a tensor that is there twice."""
        if os.path.exists(path / SINGLE):
            return cls._open_shards(path, [SINGLE], {}, passing)
        if not os.path.exists(path / INDEX):
            raise _no_weights(path)
        weight_map = _read_index(path / INDEX)
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not os.path.exists(path / shard)]
        if missing:
            raise CheckpointError(
                f"{shown(path)}: has not all {len(shards)} shards {INDEX} names, missing: {some(missing)}; "
                "download them"
            )
        return cls._open_shards(path, shards, weight_map, passing)

    @classmethod
    def _open_shards(cls, path: Path, shards: list[str], weight_map: dict[str, str], passing: bool) -> Checkpoint:
        checkpoint = cls(path, {}, {}, passing)
        try:
            for shard in shards:
                checkpoint._add(path / shard)
            checkpoint._compare_with(weight_map)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def _add(self, file: Path) -> None:
        fd, refs = open_shard(file)
        self._files[file] = fd
        twice = next((name for name in refs if name in self.refs), None)
        if twice is not None:
            other = shown(self.refs[twice].file.name)
            raise CheckpointError(
                f"{shown(file)}: has tensor {shown(twice)}, which {other} has too, expected it once; download again"
            )
        self.refs.update(refs)

    def _compare_with(self, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            ref = self.refs.get(name)
            if ref is None or ref.file.name != shard:
                where = "no shard has it" if ref is None else f"it is in {shown(ref.file.name)}"
                raise CheckpointError(
                    f"{shown(self.path / INDEX)}: says tensor {shown(name)} is in {shown(shard)}, but {where}; "
                    "download index and shards again"
                )

    def read(self, ref: TensorRef, allocate: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's bytes in a new CPU tensor of its stored dtype and shape, read once.

        allocate(shape, dtype=...): gives the memory."""
        tensor = allocate(ref.shape, dtype=DTYPES[ref.dtype])
        self.read_into(ref, byte_view(tensor))
        return tensor

    def read_into(self, ref: TensorRef, buffer: memoryview) -> None:
        """Fill `buffer`, ref.nbytes long. Raises CheckpointError if the file has become shorter since it was opened."""
        assert len(buffer) == ref.nbytes, f"buffer of {len(buffer)} bytes for a tensor of {ref.nbytes}"
        pread_into(self._files[ref.file], buffer, ref.offset, shown(ref.file), CheckpointError)
        self._cached += ref.nbytes
        if self._passing and self._cached >= _CACHED:
            for fd in self._files.values():
                forget_cached(fd)
            self._cached = 0

    def identities(self) -> dict[Path, tuple[int, tuple[int, int]]]:
        """Size and (device, inode) of each open file: opened again by name, it must be the same one."""
        infos = {file: os.fstat(fd) for file, fd in self._files.items()}
        return {file: (info.st_size, (info.st_dev, info.st_ino)) for file, info in infos.items()}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def some(names: list[str], limit: int = 3) -> str:
    """The first few of many names, made safe to print."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + rest


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard file name. Shard names are plain names of safetensors files, never paths."""
    weight_map = read_json(path, 100 * MIB, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shown(path)}: has no weight_map, expected the shard of each tensor; download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{shown(path)}: names the shard {shown(shard)}, expected the plain name of a .safetensors file "
                "in the same directory; get the model from another source"
            )
    return weight_map


def _no_weights(path: Path) -> CheckpointError:
    if not path.is_dir():
        return CheckpointError(f"{shown(path)}: is not a directory, expected a model directory")
    other = next((file.name for suffix in _OTHER_WEIGHTS for file in path.glob(f"*{suffix}")), None)
    found = f"only {shown(other)}" if other else "nothing else"
    return CheckpointError(
        f"{shown(path)}: no safetensors found ({found}), expected {SINGLE} or {INDEX}; localmoe does not read pickle, "
        "so get the model in safetensors format"
    )
