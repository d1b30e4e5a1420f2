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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compile_triton", "89"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "13 kernels" in done.stdout
