"""Which kernel multiplies a matrix on a GPU: ours or bitsandbytes', whichever was the faster for its shape.

Each shape is timed once, when it is first multiplied with about so many rows, and the winner is kept in the user's
cache directory, so that later runs compute with the same kernels. Knows kernels and one JSON file; knows no model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import ConfigError
from localmoe.files import MIB, cache_folder, read_json, write_atomically
from localmoe.kernels.bits_and_bytes import BitsAndBytes, takes
from localmoe.kernels.triton.matrix import Matrix

Seconds = Callable[[Callable[[], object], torch.device], float]
OURS, OTHER = "ours", "bitsandbytes"
# Numbers of rows up to which one choice holds; more are alike.
_ROWS = (1, 4, 16, 64, 512)
# Whoever is so far from us, beside our largest number, computes something else: rounding to bfloat16 is a fifth of it.
_APART = 0.03
_CALLS, _TRIES = 10, 3


def cache_file() -> Path:
    """Where choices are kept."""
    return cache_folder() / "linear_kernels.json"


def installed() -> FasterLinear | None:
    """A choice where bitsandbytes is installed, which is not imported before there is a matrix for it; else None."""
    return FasterLinear(BitsAndBytes, cache_file()) if importlib.util.find_spec("bitsandbytes") else None


class FasterLinear:
    """Computes a product by the faster kernel. For one thread."""

    def __init__(self, library: Callable[[], BitsAndBytes], path: Path, seconds: Seconds | None = None) -> None:
        """library: makes the other's kernels. seconds: times a call, on a device."""
        self._make, self._path, self._seconds = library, path, seconds or seconds_of
        self._other: BitsAndBytes | None = None
        self._absent = False
        self._kept: dict[str, Any] | None = None

    def __call__(self, x: Tensor, matrix: Matrix, ours: Callable[[], Tensor]) -> Tensor:
        """x [T, cols] times a matrix -> [T, rows] float32. ours: computes it by our kernels."""
        other = self._library() if x.dim() == 2 and len(x) and takes(matrix) else None
        if other is None:
            return ours()
        key = self._key(x, matrix, other)
        kept = self._table()
        if key not in kept:
            # What is captured now would be timed when it is replayed, or never.
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return ours()
            kept[key] = self._choose(x, matrix, ours, other)
            self._store(kept)
        return other.linear(x, matrix) if kept[key] == OTHER else ours()

    def _library(self) -> BitsAndBytes | None:
        if self._other is None and not self._absent:
            try:
                self._other = self._make()
            except ImportError:
                self._absent = True
        return self._other

    def _choose(self, x: Tensor, matrix: Matrix, ours: Callable[[], Tensor], other: BitsAndBytes) -> str:
        expected, found = ours(), other.linear(x, matrix)
        if float((found - expected).abs().max()) > _APART * float(expected.abs().max()):
            return OURS
        mine = self._seconds(ours, x.device)
        return OTHER if self._seconds(lambda: other.linear(x, matrix), x.device) < mine else OURS

    def _table(self) -> dict[str, Any]:
        if self._kept is None:
            try:
                self._kept = read_json(self._path, MIB, ConfigError)
            except ConfigError:
                self._kept = {}
        return self._kept

    def _store(self, kept: dict[str, Any]) -> None:
        # A cache that cannot be written costs the next run a moment, and nothing else.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(kept, indent=1).encode())

    def _key(self, x: Tensor, matrix: Matrix, other: BitsAndBytes) -> str:
        device = torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device)
        rows = next((f"up to {limit}" for limit in _ROWS if len(x) <= limit), f"above {_ROWS[-1]}")
        versions = f"torch {torch.__version__}, bitsandbytes {other.version}"
        return f"{device}, {versions}: nf4 {matrix.rows} x {matrix.cols}, {x.dtype}, {rows} rows"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The least time of a call among a few, without waiting for the device in between."""

    def done() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best = float("inf")
    for _ in range(_TRIES):
        started = done()
        for _ in range(_CALLS):
            work()
        best = min(best, (done() - started) / _CALLS)
    return best
