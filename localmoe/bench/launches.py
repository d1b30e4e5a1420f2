"""How many kernels a step launches: our own, counted where Triton launches them, and on a GPU all of them, as CUDA's
profiler sees them. Knows neither models nor kernels. Nothing is counted while a step is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# CUDA's calls that start something on a GPU, of the runtime and of the driver. A graph is one, whatever is in it.
_CALLS = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
_NO_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Launches:
    """triton: kernels that Triton launched, those in a graph that is replayed not among them. calls: by anybody, torch
    included, a graph as one; kernels: that ran on GPUs. Both None without a GPU, or where CUDA's profiler is not
    allowed."""

    triton: int
    calls: int | None = None
    kernels: int | None = None


def launches(work: Callable[[], object]) -> Launches:
    """Count what one call of `work` launches. It is slower than otherwise."""
    with triton_launches() as counted:
        if not torch.cuda.is_available():
            work()
            return Launches(counted[0])
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            work()
            torch.cuda.synchronize()
    return seen(counted[0], ((event.name, event.device_type.name == "CUDA") for event in profile.events()))


def seen(triton: int, events: Iterable[tuple[str, bool]]) -> Launches:
    """events: names of what the profiler saw, and whether it was on a GPU."""
    calls = kernels = 0
    for name, on_gpu in events:
        if on_gpu:
            kernels += not name.startswith(_NO_KERNELS)
        else:
            calls += _CALLS.match(name) is not None
    # The profiler without the right to watch the GPU gives what the CPU did only.
    return Launches(triton, calls, kernels) if calls and kernels else Launches(triton)


@contextmanager
def triton_launches() -> Iterator[list[int]]:
    """A list of one number, which grows with every kernel that Triton launches meanwhile, interpreted or not."""
    count = [0]
    with ExitStack() as undo:
        for kind in _kinds_of_kernels():
            undo.callback(setattr, kind, "run", kind.run)
            kind.run = _counting(kind.run, count)
        yield count


def _counting(run: Any, count: list[int]) -> Any:
    def counted(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        count[0] += not warmup
        return run(kernel, *args, warmup=warmup, **options)

    return counted


def _kinds_of_kernels() -> list[Any]:
    """Triton's classes of functions that can be launched."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []
    return [JITFunction, InterpretedFunction]
