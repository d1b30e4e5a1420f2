"""Which kernels a model computes with: the C++ library where it could be built, or PyTorch.

Chosen once per model. Threads belong to the library and so to the process: the last choice holds for all models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from localmoe.device import usable_cores
from localmoe.errors import ResourceError, UsageError
from localmoe.kernels import native
from localmoe.kernels.native import Library, Mode

# native: the C++ kernels, or an error; strict: the same in float32 with one order of additions; reference: PyTorch.
KernelChoice = Literal["auto", "native", "strict", "reference"]
CHOICES: tuple[KernelChoice, ...] = ("auto", "native", "strict", "reference")


@dataclass(frozen=True)
class Backend:
    """The loaded library and how it adds up."""

    library: Library
    mode: Mode


# Up to this many tokens, a step's tensors are too small for torch's own threads, which would wake up for each of them
# and spin on the cores of ours (a fifth of the time of a token of V4-Flash on 2 cores).
FEW_TOKENS = 16


@contextmanager
def torch_threads(backend: Backend | None, tokens: int) -> Iterator[None]:
    """Keep torch to the calling thread during a step of few tokens, if the compiled kernels use the other cores."""
    before = torch.get_num_threads()
    if backend is None or tokens > FEW_TOKENS or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose(kernels: KernelChoice, threads: int | None = None) -> Backend | None:
    """The backend for a choice, None for PyTorch. threads: None is one per physical core this process may use.

    Raises UsageError for a number of threads the machine cannot run or the choice cannot use, ResourceError if
    compiled kernels are asked for and there are none."""
    if kernels not in CHOICES:
        raise UsageError(f"kernels is {kernels}, expected one of {', '.join(CHOICES)}")
    library = "they were not asked for" if kernels == "reference" else native.load()
    if isinstance(library, str):
        if kernels in ("native", "strict"):
            raise ResourceError(f"no compiled kernels: {library}; use kernels=auto to compute in PyTorch")
        if threads is not None:
            raise UsageError("threads belong to the compiled kernels, which are not used here; leave threads out")
        return None
    _start_threads(library, threads, "threads")
    return Backend(library, "strict" if kernels == "strict" else "fast")


def shortfall(kernels: KernelChoice) -> str | None:
    """What a user should know when "auto" had to fall back to PyTorch; one sentence, else None."""
    library = native.load() if kernels == "auto" else None
    if not isinstance(library, str):
        return None
    return f"no compiled kernels: {library}; computing in PyTorch, several times slower"


def use_cores(count: int | None, option: str = "threads") -> None:
    """Let what computes without a model, compiled or not, use so many cores; None: all.

    option: what the user calls the number. Raises UsageError for more than the machine can run."""
    library = native.load()
    if not isinstance(library, str):
        _start_threads(library, count, option)
    if count is not None:
        torch.set_num_threads(count)


def _start_threads(library: Library, threads: int | None, option: str) -> None:
    cores = usable_cores()
    count = min(cores.count, native.MAX_THREADS) if threads is None else threads
    if count == library.threads:
        return
    try:
        # One thread to a core. Not where a quota grants some of the time of any core: others would be pinned alike.
        library.set_threads(count, cores.cpus[1:] if count == len(cores.cpus) == cores.count else None)
    except ValueError:
        raise UsageError(f"{count} threads cannot be run, expected 1 to {native.MAX_THREADS}; lower {option}") from None
