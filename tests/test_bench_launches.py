"""What a step launches: our kernels, interpreted or not, and what CUDA's profiler would say."""

from __future__ import annotations

import torch

from localmoe.bench.launches import Launches, launches, seen, triton_launches
from localmoe.kernels import reference
from tests.triton_kernels import DEVICE

# isort: split
from localmoe.kernels.triton import norm_rope


def test_our_launches_are_counted() -> None:
    """Fails if a launch is not counted, or is counted after the count has ended."""
    x = torch.ones(3, 64, device=DEVICE)

    def work() -> None:
        norm_rope.rms_norm(x, None, 1e-6)
        norm_rope.rms_norm(x, None, 1e-6)

    with triton_launches() as count:
        work()
    work()
    assert count == [2] and launches(work).triton == 2
    assert launches(lambda: reference.rms_norm(x, None, 1e-6)).triton == 0


def test_what_the_profiler_sees() -> None:
    """Fails if a copy counts as a kernel, a graph as none, or nothing seen as nothing launched."""
    events = [
        ("cudaLaunchKernel", False), ("cuLaunchKernelEx", False), ("cudaGraphLaunch", False), ("aten::mul", False),
        ("cudaMemcpyAsync", False), ("_few", True), ("void at::native::mul", True), ("Memcpy HtoD", True),
        ("Memset (Device)", True),
    ]  # fmt: skip
    assert seen(1, events) == Launches(1, 3, 2)
    assert seen(4, [("aten::mul", False)]) == Launches(4, None, None)
