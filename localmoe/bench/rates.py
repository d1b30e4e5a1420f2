"""The rates a plan needs, measured once for a processor and a disk, and kept in the user's cache directory.

Knows rates and one JSON file; of models only a few made-up layers, to time Python. Memory: 1 GiB while measuring.
Disk: a file of half a GiB without a name, so that nothing is left behind however the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from localmoe import device
from localmoe.backend import Backend
from localmoe.bench import hardware
from localmoe.bench.measure import MemoryReader, circumstances
from localmoe.config import Reader
from localmoe.errors import ConfigError
from localmoe.files import MIB, cache_folder, read_json, write_atomically
from localmoe.kernels import codecs, native
from localmoe.memory import Arena
from localmoe.plan import Rates

Report = Callable[[str], None]
DISK_BYTES = 512 << 20
# As many reads at once as keep the queue of an SSD full: below 8 the rate falls, above it hardly rises.
READERS = 8
# What an expert of V4-Flash sees of a chunk: 512 tokens with 6 of 256 each are 12.
_TOKENS = 16
_ROWS, _COLS = 2048, 4096
_REPETITIONS = 5
# Part of the key of what is kept: another number where something is measured in another way.
_METHOD = "method 4"
# Layers of every kind, and what is left out of them to need little memory.
_SHAPE = "v4-flash"
_LAYERS, _EXPERTS, _VOCABULARY = 4, 8, 1024
_STEPS = 16
# Timing is not exact enough to tell less from nothing.
_LEAST_SECONDS = 1e-4


def cache_file() -> Path:
    """Where rates are kept."""
    return cache_folder() / "rates.json"


def rates_of(folder: Path, library: native.Library | None, report: Report, *, again: bool = False) -> Rates:
    """The rates of this machine with the disk that `folder` is on: as kept, or measured now, or `again`.

    Raises ResourceError or UsageError if there is no room to measure in."""
    known = None if again else known_rates(folder, library)
    if known is not None:
        return known
    found = measure(folder, library, report)
    store(cache_file(), _key(folder, library), found)
    return found


def known_rates(folder: Path, library: native.Library | None) -> Rates | None:
    """The rates of this machine with the disk that `folder` is on, if they have been measured."""
    return load(cache_file(), _key(folder, library))


def _key(folder: Path, library: native.Library | None) -> str:
    kernels = f"{'reference' if library is None else library.isa} {circumstances(library)['threads']}"
    return f"{device.cpu_model()}, {kernels}, disk {os.stat(folder).st_dev}, {_METHOD}"


def load(path: Path, key: str) -> Rates | None:
    """What was kept under a key; None for nothing, or for anything that does not look like rates."""
    try:
        reader = Reader(read_json(path, MIB, ConfigError)).section(key)
        given = {}
        for field in fields(Rates):
            # Those of a GPU are null without one.
            if field.default is None and not reader.has(field.name):
                continue
            given[field.name] = reader.required(field.name, float, low=1e-9)
        return Rates(**given)
    except ConfigError:
        return None


def store(path: Path, key: str, rates: Rates) -> None:
    """Keep rates beside those of other keys. A crash leaves the old file or the new one; no room leaves the old one."""
    try:
        kept: dict[str, Any] = read_json(path, MIB, ConfigError)
    except ConfigError:
        kept = {}
    kept[key] = asdict(rates)
    # A cache that cannot be written costs the next run a few seconds, and nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(kept, indent=1, allow_nan=False).encode())


def measure(folder: Path, library: native.Library | None, report: Report) -> Rates:
    """Measure everything: about ten seconds. Raises ResourceError or UsageError if there is no room."""
    hardware.check_room(hardware.Place(folder, DISK_BYTES))
    report("reading memory")
    dram = memory_rate(library)
    report("multiplying")
    flops = product_rate(library)
    report("timing Python")
    per_layer = layer_seconds(library, _SHAPE)
    report(f"reading {folder}")
    disk = disk_rate(folder)
    gpu = gpu_rates(report) if torch.cuda.is_available() else {}
    return Rates(dram=dram, disk=disk, flops=flops, seconds_per_layer=per_layer, **gpu)


def memory_rate(library: native.Library | None) -> float:
    """Bytes per second that all threads read together."""
    buffer = Arena().empty((hardware.BUFFER_BYTES,), torch.uint8).fill_(1)
    reader = MemoryReader(library)
    return hardware.rates(lambda: reader.read([buffer]), buffer.nbytes, _REPETITIONS).median


def product_rate(library: native.Library | None) -> float:
    """Operations per second of a chunk's products: FP4 by the compiled kernels or, without them, float32 by torch."""
    x = torch.randn(_TOKENS, _COLS)
    weights = torch.randn(_ROWS, _COLS)
    work: Callable[[], object] = partial(torch.mm, x, weights.T)
    if library is not None:
        codes, scale = codecs.quantize_fp4(weights)
        work = partial(library.linear, x, native.matrix("fp4", (_ROWS, _COLS), codes, scale, group=codecs.GROUP))
    times = 50

    def many() -> None:
        for _ in range(times):
            work()

    return hardware.rates(many, 2.0 * _TOKENS * _ROWS * _COLS * times, _REPETITIONS).median


def layer_seconds(library: native.Library | None, shape: str) -> float:
    """What a layer of a decode step costs beside reading its weights: Python, and torch's small operations.

    A few layers of a real shape with few experts are timed in turn with reading as many bytes. (localmoe-mini's layers
    cost half of that: its tensors are smaller.) Memory: 1 GiB."""
    # Only who measures needs a model: a plan with rates that are kept starts faster without.
    from localmoe.bench.shapes import cut
    from localmoe.bench.subject import Computing, open_synthetic

    config = cut(shape, _LAYERS, _EXPERTS, _VOCABULARY)
    computing = Computing(torch.float32, Backend(library, "fast") if library else None)
    subject = open_synthetic(shape, config, computing, lambda _: None)
    session, reader = subject.engine.new_session(), MemoryReader(library)
    beside = []
    for i in range(_STEPS):
        # 0 for a model so small that it lies in the cache.
        pace = reader.bytes_per_s(subject.pieces)
        reading = subject.bytes_per_token / pace if pace else 0.0
        started = time.perf_counter()
        subject.engine.advance([(session, [config.bos_token_id])])
        if i:
            beside.append(time.perf_counter() - started - reading)
    return max(statistics.median(beside) / config.num_layers, _LEAST_SECONDS)


def disk_rate(folder: Path) -> float:
    """Bytes per second when experts are read several at a time, past the page cache where the system lets us."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        pieces = [(at * hardware.EXPERT_BYTES, hardware.EXPERT_BYTES) for at in range(_pieces(DISK_BYTES))]
        # Random, because some disks do not write what compresses.
        data = os.urandom(hardware.EXPERT_BYTES)
        for _ in pieces:
            file.write(data)
        os.fsync(file.fileno())
        hardware.bypass_cache(file.fileno())
        buffers = hardware.buffers_for(min(READERS, len(pieces)))
        work = partial(hardware.read_pieces, file.fileno(), pieces, buffers)
        return hardware.rates(work, len(pieces) * hardware.EXPERT_BYTES, 3).median


def _pieces(nbytes: int) -> int:
    return max(nbytes // hardware.EXPERT_BYTES, 1)


def gpu_rates(report: Report) -> dict[str, float]:
    """The fields of Rates that a GPU has."""
    medians = {row["what"]: row["median"] for row in hardware.gpu_rows(_REPETITIONS, report)}
    return {
        "pcie": medians["RAM to GPU, pinned"] * 1e9,
        "hbm": medians["GPU memory copy"] * 1e9,
        "gpu_flops": medians["GPU bf16 product"] * 1e12,
    }
