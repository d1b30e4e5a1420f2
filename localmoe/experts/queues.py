"""What a device is told and does while the caller goes on: it computes in one queue and copies in another.

All that is CUDA's about order: streams, events, page-locked memory. On the CPU, where it is only there to be tested,
everything is done at once. Knows tensors and order; does not know experts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# What is larger crosses in pieces of this size, through two buffers.
PIECE = 4 << 20
_PIECES = 2


def locked_bytes(buffers: int, nbytes: int) -> int:
    """Page-locked RAM that the queues of a device take with so many buffers of a size, at most: torch rounds each up to
    a power of two."""
    return _PIECES * PIECE + buffers * (1 << (nbytes - 1).bit_length())


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, and events are recorded there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Span:
    """How long the device was at something; known after it is done."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._times = [0.0, 0.0]

    def __enter__(self) -> Span:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times[which] = time.perf_counter()
        else:
            self._events[which].record()

    def wait(self) -> None:
        """Returns when it is done."""
        if self._events is not None:
            self._events[1].synchronize()

    def hold(self) -> None:
        """What the current stream is told from now on begins when this is done."""
        if self._events is not None:
            self._events[1].wait()

    @property
    def seconds(self) -> float:
        if self._events is None:
            return self._times[1] - self._times[0]
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


class Queues:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Each with the last copy from it.
        self._pieces = list[tuple[Tensor, Span | None]]()

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the CPU from which copies to the device need neither the CPU nor a wait."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def copy(self, target: Tensor, source: Tensor, after: Iterable[Span]) -> Span:
        """Copy a buffer to the device when `after` is done, and all that was to be copied before."""
        with nullcontext() if self._copying is None else torch.cuda.stream(self._copying):
            return self._tell(lambda: target.copy_(source, non_blocking=True), after)

    def bring(self, x: Tensor) -> Tensor:
        """x on the device, for what is computed there after this. Memory of x can be used again when this returns.

        From memory that is not page-locked, a copy would begin, and this return, after all that the device was told."""
        if x.nbytes <= PIECE:
            # Torch uses page-locked memory again when what was copied from it has arrived.
            x = x.pin_memory() if self._device.type == "cuda" else x
            return x.to(self._device, non_blocking=True)
        y = torch.empty(x.shape, dtype=x.dtype, device=self._device)
        pairs = zip(*(t.view(-1).view(torch.uint8).split(PIECE) for t in (x.contiguous(), y)), strict=True)
        for i, (part, target) in enumerate(pairs):
            if len(self._pieces) < _PIECES:
                self._pieces.append((self.buffer(PIECE), None))
            buffer, sent = self._pieces[i % _PIECES]
            if sent is not None:
                sent.wait()
            source = buffer[: len(part)].copy_(part)
            told = self.compute(functools.partial(target.copy_, source, non_blocking=True), ())
            self._pieces[i % _PIECES] = buffer, told
        return y

    def compute(self, work: Callable[[], object], after: Iterable[Span]) -> Span:
        """Do what `work` tells the device when `after` is done, and all that was to be computed before."""
        with on(self._device):
            return self._tell(work, after)

    def _tell(self, work: Callable[[], object], after: Iterable[Span]) -> Span:
        for before in after:
            before.hold()
        with Span(self._device) as span:
            work()
        return span
