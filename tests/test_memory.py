"""The arena: pieces that do not overlap, aligned, alive as long as they are used."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from localmoe.memory import Arena

LARGE = (100, 1000)


def test_pieces_do_not_overlap() -> None:
    """Fails if a piece begins inside another, also where one slab ends and the next begins."""
    arena = Arena(slab_bytes=1 << 20)
    pieces = [arena.empty(LARGE, torch.float32).fill_(i) for i in range(10)]
    assert all((piece == i).all() for i, piece in enumerate(pieces))


def test_large_pieces_are_aligned_to_pages() -> None:
    """Fails if a direct read from disk into one would not be possible."""
    arena = Arena()
    arena.empty((70_001,), torch.uint8)
    assert arena.empty(LARGE, torch.bfloat16).data_ptr() % 4096 == 0


def test_a_piece_larger_than_a_slab_gets_its_own() -> None:
    piece = Arena(slab_bytes=1 << 16).empty((1 << 20,), torch.uint8)
    assert piece.numel() == 1 << 20


def test_small_and_empty_pieces_are_ordinary_tensors() -> None:
    arena = Arena()
    assert arena.empty((3,), torch.int64).shape == (3,)
    assert arena.empty((0, 5), torch.float32).numel() == 0
    assert arena.empty((), torch.float32).dim() == 0


def test_pieces_outlive_their_arena() -> None:
    """Fails if the memory goes when the arena does."""
    piece = Arena().empty(LARGE, torch.float32).fill_(7)
    gc.collect()
    assert (piece == 7).all()


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        Arena().empty((1 << 60,), torch.uint8)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what its pages are")
def test_slabs_are_private_and_ask_for_huge_pages() -> None:
    """Fails if a slab is shared memory, which gets no huge pages: reading it is a fifth slower."""
    piece = Arena().empty((1 << 22,), torch.uint8)
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        first, last = (int(end, 16) for end in area.split()[0].split("-"))
        if first <= piece.data_ptr() < last:
            assert area.split()[1].endswith("p")
            assert " hg" in area or "VmFlags" not in area
            return
    pytest.fail("the slab is not among the process's memory areas")


_FREES_FIVE_OF_SIX = """
import torch
from localmoe.device import resident_memory
from localmoe.memory import give_back_large_blocks

give_back_large_blocks()
torch.zeros(7 << 20)  # What makes glibc keep blocks of this size, left to itself.
blocks = [torch.zeros(4 << 20) for _ in range(6)]
before = resident_memory()
del blocks[:5]
print(before - resident_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps them")
def test_a_freed_intermediate_result_is_given_back_though_a_later_one_lives() -> None:
    """Fails if a long prompt would take more memory than its results do: what lies below a living block stays then.

    In a process of its own: what other tests leave running takes and frees memory at the same time."""
    run = subprocess.run([sys.executable, "-c", _FREES_FIVE_OF_SIX], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 4 * (16 << 20)
