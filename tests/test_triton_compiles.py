"""The interpreter takes what a GPU's compiler may not: every kernel is compiled for one, there or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_kernels import HAS_GPU

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(HAS_GPU, reason="where there is a GPU, the other tests compile them")
@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its compiler for NVIDIA on Linux only")
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """For capability 8.9, with the least shared memory. Fails if one does not compile, or needs more than there is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = set[str]()
    halves = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.compile_triton", "89", half],
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path / half), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in ("experts", "others")
    ]
    try:
        for process in halves:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
            names.update(said.rpartition(": ")[2].split())
    finally:
        for process in halves:
            process.kill()
    assert len(names) == 17
