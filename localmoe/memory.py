"""Memory for weights: large slabs on huge pages where the system gives them, handed out piece by piece.

Reading through 4 KiB pages costs a fifth of the memory bandwidth, and weights are all a decode step reads. A slab is
committed page by page as it is filled, so its unused rest costs nothing. Nothing is given back before all of it is
unused."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch
from torch import Tensor

SLAB_BYTES = 1 << 30
# Smaller pieces would share a huge page with their neighbours anyway; torch's allocator is as good for them.
_SMALL = 64 << 10
_ALIGNMENT = 4096
# glibc's own limit grows with what is freed, up to 32 MiB.
_GIVEN_BACK = 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Arena:
    """Gives out uninitialized CPU tensors that live as long as any of their slab does."""

    def __init__(self, slab_bytes: int = SLAB_BYTES) -> None:
        self._slab_bytes = slab_bytes
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, 4 KiB-aligned unless it is small. Raises MemoryError if the system has no room."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _SMALL:
            return torch.empty(shape, dtype=dtype)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > len(self._slab):
            self._slab, start = _slab(max(nbytes, self._slab_bytes)), 0
        self._used = start + nbytes
        return self._slab[start : self._used].view(dtype).view(shape)


class SlotMemory:
    """Equal slots in one piece of address space; a slot takes memory once it is written to, until it is given back."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """slot_bytes: a multiple of 4 KiB. Raises MemoryError if the system has no room."""
        self.slots, self.slot_bytes = slots, slot_bytes
        self._memory = _map(slots * slot_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, to be written to."""
        return memoryview(self._memory)[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def tensor(self, slot: int, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor that lies at `begin` in a slot. It is the slot's memory: valid as long as the slot's content."""
        at = slot * self.slot_bytes + begin
        return self._bytes[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def give_back(self, slot: int) -> None:
        """Return a slot's memory to the system; the slot can be written to again later."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)


def give_back_large_blocks() -> None:
    """Let the process return large intermediate results to the system as soon as they are freed, where libc is glibc.

    It would keep those of up to 32 MiB for later, with holes between: 170 MiB more for a prompt of V4-Flash's sizes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
        mallopt(_M_TRIM_THRESHOLD, 2 * _GIVEN_BACK)


def give_back_device_memory() -> None:
    """Let torch return what it keeps of GPUs' memory for later, in pieces that may not fit a new need."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _slab(nbytes: int) -> Tensor:
    return torch.frombuffer(_map(nbytes), dtype=torch.uint8)


def _map(nbytes: int) -> mmap.mmap:
    # Private, because shared memory gets huge pages on hardly any system, and a forked child could write into it.
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    try:
        memory = mmap.mmap(-1, nbytes, **({"flags": flags} if flags else {}))
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot reserve {nbytes} bytes") from error
    # A wish: systems without huge pages, or told to give none, ignore or refuse it.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
