"""What every measurement shares: statistics, interleaved timing, the pace of memory, threads, and who was measured.

Knows seconds and bytes; does not know models. Nothing here prints."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localmoe import backend, device
from localmoe.kernels import native

# Smaller pieces would time the start of a job rather than memory.
_SMALL = 64 << 10


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number. sd: sample standard deviation, 0 for a single one."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def seconds_of(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], object]], *, repetitions: int, budget_s: float, least: int = 3
) -> dict[str, Spread]:
    """Time several calls in turn, so that whatever else the machine does meets all of them alike.

    The first round is for warming up, unless it took longer than budget_s, so that warming up was the least part of it.
    At most `repetitions` rounds, fewer when budget_s seconds are over, but `least`."""
    samples = {name: [seconds_of(work)] for name, work in works.items()}
    if sum(map(sum, samples.values())) <= budget_s:
        samples = {name: [] for name in works}
    started, done = time.perf_counter(), max(map(len, samples.values()))
    while done < least or (done < repetitions and time.perf_counter() - started < budget_s):
        for name, work in works.items():
            samples[name].append(seconds_of(work))
        done += 1
    return {name: Spread(tuple(times)) for name, times in samples.items()}


class MemoryReader:
    """Reads tensors with all threads: by the compiled kernels or, without them, by torch's sum."""

    def __init__(self, library: native.Library | None) -> None:
        self._library = library

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Read every byte once; contiguous tensors in RAM."""
        for tensor in tensors:
            if self._library is not None:
                self._library.read(tensor)
            else:
                raw = tensor.view(torch.uint8).flatten()
                raw[: len(raw) // 8 * 8].view(torch.int64).sum()

    def bytes_per_s(self, tensors: Sequence[Tensor]) -> float:
        """The pace of one pass over the larger ones of these tensors, 0 if none is large."""
        large = [tensor for tensor in tensors if tensor.nbytes >= _SMALL]
        if not large:
            return 0.0
        return sum(tensor.nbytes for tensor in large) / seconds_of(lambda: self.read(large))


def use_threads(count: int, library: native.Library | None) -> None:
    """Let torch, and the kernels if there are any, compute with that many threads."""
    torch.set_num_threads(count)
    if library is not None:
        backend.choose("native", count)


def circumstances(library: native.Library | None) -> dict[str, Any]:
    """The fields that say when, with what and on what something was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "isa": "reference" if library is None else library.isa,
        "threads": torch.get_num_threads() if library is None else library.threads,
        "cpu": device.cpu_model(),
    }
