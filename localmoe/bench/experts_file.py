"""Made-up experts of a published shape in one safetensors file, in the published layout.

Knows shapes and the file; does not know what reads it. Memory: one matrix."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from localmoe.device import free_disk
from localmoe.errors import ResourceError, UsageError
from localmoe.experts.layout import Layout, Matrix
from localmoe.files import shown
from localmoe.formats import FORMATS
from localmoe.models.family import expert_names, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import TensorSpec, is_routed
from localmoe.safetensors_io import DTYPES, TensorRef

Report = Callable[[str], None]


def experts_file(folder: Path, name: str, config: ModelConfig, report: Report) -> Path:
    """The file of a shape's experts, written if it is not there yet. Raises ResourceError if the disk is too small."""
    path = folder / f"localmoe-{name}-{config.num_layers}-layers-{config.num_experts}-experts.safetensors"
    if not folder.is_dir():
        raise UsageError(f"{shown(folder)} is not a directory; --dir names one on the disk to measure")
    specs = {n: spec for n, spec in tensor_inventory(config).items() if is_routed(n)}
    header, nbytes = _header(specs)
    if path.exists() and path.stat().st_size == len(header) + nbytes:
        return path
    free = free_disk(folder)
    if free is not None and free < nbytes + (1 << 30):
        raise ResourceError(
            f"{shown(folder)}: the experts take {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "lower --layers or choose another --dir"
        )
    part = path.with_suffix(".part")
    try:
        with part.open("wb", buffering=0) as file:
            _write(file.fileno(), header, specs, lambda done: report(f"writing experts: {100 * done // nbytes} %"))
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, int]:
    """The safetensors header, padded to whole blocks, and the bytes of data that follow it."""
    entries: dict[str, object] = {}
    at = 0
    for name, spec in specs.items():
        fmt, (rows, cols) = FORMATS[spec.published], spec.matrix
        for part, shape, dtype in (
            (name, fmt.data_shape(rows, cols), fmt.data_dtype),
            (f"{name.removesuffix('.weight')}.scale", fmt.scale_shape(rows, cols), fmt.scale_dtypes[0]),
        ):
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            entries[part] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
    text_ = json.dumps(entries, separators=(",", ":")).encode()
    padded = text_ + b" " * (-(len(text_) + 8) % 4096)
    return len(padded).to_bytes(8, "little") + padded, at


def _write(fd: int, header: bytes, specs: Mapping[str, TensorSpec], progress: Callable[[int], None]) -> None:
    """Random codes, one block of them again and again from another place on, and one scale for all."""
    os.write(fd, header)
    most = max(math.prod(spec.shape) for spec in specs.values()) // 2
    codes = memoryview(random.Random(1).randbytes(1 << 20) * (most // (1 << 20) + 2))
    done = 0
    for i, spec in enumerate(specs.values()):
        fmt, (rows, cols) = FORMATS[spec.published], spec.matrix
        assert fmt.name == "fp4", "what the published models have"
        # e2m1 codes drawn evenly have a root mean square of 2.6.
        scale = bytes([127 + round(math.log2(cols**-0.5 / 2.6))]) * math.prod(fmt.scale_shape(rows, cols))
        begin = i * 4099 % (1 << 20)
        done += os.write(fd, codes[begin : begin + math.prod(fmt.data_shape(rows, cols))])
        done += os.write(fd, scale)
        if i % 64 == 0:
            progress(done)


def layout_of(config: ModelConfig, refs: Mapping[str, TensorRef]) -> Layout:
    """Where the file has the experts."""
    inventory = tensor_inventory(config)

    def locate(layer: int, expert: int) -> list[TensorRef]:
        names = expert_names(config, layer, expert)
        return [refs[part] for name in names for part in (name, f"{name.removesuffix('.weight')}.scale")]

    def matrix(name: str) -> Matrix:
        fmt = FORMATS[inventory[name].published]
        return Matrix(inventory[name].matrix, DTYPES[fmt.data_dtype], fmt, DTYPES[fmt.scale_dtypes[0]])

    kinds = []
    for layer in range(config.num_moe_layers):
        w1, w2, w3 = (matrix(name) for name in expert_names(config, layer, 0))
        kinds.append((w1, w2, w3))
    return Layout(kinds, config.num_experts, locate)
