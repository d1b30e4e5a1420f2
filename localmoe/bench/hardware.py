"""How fast this machine moves bytes and multiplies: memory, disk and, where there is one, the GPU.

Knows nothing of models but the size of an expert. Memory: two buffers of 1 GiB. Disk: one file without a name, so that
nothing is left behind however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from localmoe.bench.measure import MemoryReader, Spread, circumstances, interleaved, use_threads
from localmoe.bench.report import Column, Record, significant, text
from localmoe.device import available_memory
from localmoe.errors import ResourceError, UsageError
from localmoe.files import forget_cached, shown
from localmoe.kernels.native import Library
from localmoe.memory import Arena, SlotMemory, give_back_device_memory

Report = Callable[[str], None]
Part = Callable[[int, Report], Iterator[Record]]
BUFFER_BYTES = 1 << 30
# One expert of V4-Flash in FP4; a whole number of 4 KiB blocks, as direct reads need.
EXPERT_BYTES = 13_369_344
_PIECE = 16 << 20
# Reads in flight: one shows what a miss waits for, several what the disk can give.
_READERS = (1, 4)
_RANDOM_READS = 16
# After so many seconds a rate is taken from the repetitions there are.
_BUDGET_S = 5.0
_GPU_SIDE = 8192
# Larger than what caches of GPUs hold.
_COPIED_BYTES = 256 << 20


@dataclass(frozen=True)
class Place:
    """Where to write a file to read from, and its size."""

    folder: Path
    nbytes: int


def run(library: Library | None, place: Place, repetitions: int, report: Report) -> Iterator[Record]:
    """Measure memory, disk and GPU; yields a record of each rate. place: one that check_room let pass."""
    common = circumstances(library)
    parts: list[Part] = [partial(memory_rows, library, common["threads"]), partial(disk_rows, place)]
    if torch.cuda.is_available():
        parts.append(gpu_rows)
    for part in parts:
        for row in part(repetitions, report):
            yield row | common


def check_room(place: Place) -> None:
    """Raises ResourceError or UsageError if the buffers or the file have no place."""
    have = available_memory()
    if have is not None and have < 3 * BUFFER_BYTES:
        raise ResourceError(
            f"the buffers need {3 * BUFFER_BYTES / 2**30:.1f} GiB of RAM and {have / 2**30:.1f} GiB are available"
        )
    folder, nbytes = place.folder, place.nbytes
    if not folder.is_dir():
        raise UsageError(f"{shown(folder)} is not a directory; --dir names one on the disk to measure")
    free = shutil.disk_usage(folder).free
    if nbytes > free // 2:
        raise ResourceError(
            f"a file of {nbytes / 2**30:.1f} GiB is more than half of the {free / 2**30:.1f} GiB free in "
            f"{shown(folder)}; lower --disk-gib or choose another --dir"
        )


def memory_rows(library: Library | None, threads: int, repetitions: int, report: Report) -> Iterator[Record]:
    """Reading with one thread and with all, copying with all."""
    arena, reader = Arena(), MemoryReader(library)
    source, target = (arena.empty((BUFFER_BYTES,), torch.uint8).fill_(1) for _ in range(2))
    for count in dict.fromkeys((1, threads)):
        report(f"reading memory, {count} threads")
        use_threads(count, library)
        try:
            spread = rates(lambda: reader.read([source]), BUFFER_BYTES, repetitions)
        finally:
            use_threads(threads, library)
        yield row(f"memory read, {count} thread{'s' * (count > 1)}", spread)
    report("copying memory")
    yield row(f"memory copy, {threads} threads", rates(lambda: target.copy_(source), 2 * BUFFER_BYTES, repetitions),
              note="read and written bytes")  # fmt: skip


def disk_rows(place: Place, repetitions: int, report: Report) -> Iterator[Record]:
    """Reading a file from end to end, and experts of it at random places."""
    report(f"writing {place.nbytes / 2**30:.1f} GiB to {shown(place.folder)}")
    with tempfile.TemporaryFile(dir=place.folder, buffering=0) as file:
        blocks = place.nbytes // _PIECE
        data = os.urandom(_PIECE)
        for _ in range(blocks):
            file.write(data)
        os.fsync(file.fileno())
        note = "" if bypass_cache(file.fileno()) else "through the page cache"
        pieces = [(i * _PIECE, _PIECE) for i in range(blocks)]
        report("reading the file")
        work = partial(read_pieces, file.fileno(), pieces, buffers_for(1, _PIECE))
        yield row("disk read, sequential", rates(work, blocks * _PIECE, repetitions), note=note)
        for readers in _READERS:
            report(f"reading experts at random, {readers} at a time")
            work = partial(_read_at_random, file.fileno(), blocks * _PIECE, buffers_for(readers))
            spread = rates(work, _RANDOM_READS * EXPERT_BYTES, repetitions)
            yield row(f"disk read, {EXPERT_BYTES / 1e6:.0f} MB at random, {readers} at a time", spread, note=note)


def bypass_cache(fd: int) -> bool:
    """Let reads go to the disk itself; False where the system or the file system cannot."""
    forget_cached(fd)
    if not hasattr(os, "O_DIRECT"):
        return False
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        return True
    return False


def _read_at_random(fd: int, nbytes: int, buffers: Sequence[memoryview]) -> None:
    last = (nbytes - EXPERT_BYTES) // mmap.PAGESIZE
    places = [random.randint(0, last) * mmap.PAGESIZE for _ in range(_RANDOM_READS)]
    read_pieces(fd, [(place, EXPERT_BYTES) for place in places], buffers)


def buffers_for(readers: int, nbytes: int = EXPERT_BYTES) -> list[memoryview]:
    """Memory to read pieces to, as slots have it: aligned, on huge pages, and taken from the system already.

    With new memory for every read, half of the time went to its pages."""
    memory = SlotMemory(readers, nbytes)
    views = [memory.view(i) for i in range(readers)]
    for view in views:
        view[:] = bytes(len(view))
    return views


def read_pieces(fd: int, pieces: Sequence[tuple[int, int]], buffers: Sequence[memoryview]) -> None:
    """Read (offset, nbytes) pieces with a thread for each buffer. Raises ResourceError if the file ends early."""
    readers = len(buffers)

    def read(reader: int) -> None:
        for offset, nbytes in pieces[reader::readers]:
            with buffers[reader][:nbytes] as view:
                found = os.preadv(fd, [view], offset)
            if found != nbytes:
                raise ResourceError(f"the disk gave {found} of {nbytes} bytes at {offset}; is it full or failing?")

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(readers)))


def gpu_rows(repetitions: int, report: Report) -> Iterator[Record]:
    """Copies within the GPU's memory and to and from it, and bf16 products."""
    report("measuring the GPU")
    name = torch.cuda.get_device_name()
    on_gpu = [torch.ones(BUFFER_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    pinned = torch.ones(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    a, b = (torch.randn(_GPU_SIDE, _GPU_SIDE, device="cuda").bfloat16() for _ in range(2))

    def spread(work: Callable[[], object], amount: float) -> Spread:
        return rates(partial(finished, work, a.device), amount, repetitions)

    yield row("GPU memory copy", spread(lambda: on_gpu[0].copy_(on_gpu[1]), 2 * BUFFER_BYTES), note=name)
    yield row("RAM to GPU, pinned", spread(lambda: on_gpu[0].copy_(pinned, non_blocking=True), BUFFER_BYTES))
    yield row("GPU to RAM, pinned", spread(lambda: pinned.copy_(on_gpu[0], non_blocking=True), BUFFER_BYTES))
    yield row("GPU bf16 product", spread(lambda: torch.mm(a, b), 2.0 * _GPU_SIDE**3), unit="TFLOP/s")


def copy_rate(device: torch.device, nbytes: int = _COPIED_BYTES) -> float:
    """Bytes per second, read and written, that a device copies within its memory. Memory: twice nbytes, given back."""
    return _rate_of(lambda: _copy(device, nbytes), 2.0 * nbytes, device)


def product_rate(device: torch.device, side: int = _GPU_SIDE) -> float:
    """Operations per second of torch's bf16 product of two square matrices. Memory: six times side², given back."""
    return _rate_of(lambda: _product(device, side), 2.0 * side**3, device)


def _copy(device: torch.device, nbytes: int) -> Callable[[], object]:
    one, other = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return partial(one.copy_, other)


def _product(device: torch.device, side: int) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return partial(torch.mm, a, b)


def _rate_of(make: Callable[[], Callable[[], object]], amount: float, device: torch.device) -> float:
    try:
        return rates(partial(finished, make(), device), amount, 5).median
    finally:
        give_back_device_memory()


def finished(work: Callable[[], object], device: torch.device) -> None:
    """Do it, and wait until the device has done it too."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(work: Callable[[], object], amount: float, repetitions: int) -> Spread:
    """Amount per second of each repetition; one more, before them, is for warming up."""
    seconds = interleaved({"work": work}, repetitions=repetitions, budget_s=_BUDGET_S, least=2)["work"]
    return Spread(tuple(amount / sample for sample in seconds.samples))


def row(what: str, spread: Spread, *, unit: str = "GB/s", note: str = "") -> Record:
    """spread: bytes or operations per second; the record holds them in `unit`."""
    by = 1e-12 if unit == "TFLOP/s" else 1e-9
    return {
        "what": what,
        "unit": unit,
        "median": spread.median * by,
        "best": max(spread.samples) * by,
        "note": note,
        "samples": [sample * by for sample in spread.samples],
    }


COLUMNS = (
    Column("what", text("what"), 42, "left"),
    Column("median", lambda record: significant(record["median"]), 9),
    Column("best", lambda record: significant(record["best"]), 9),
    Column("unit", text("unit"), 7, "left"),
    Column("note", text("note"), 22, "left"),
)
