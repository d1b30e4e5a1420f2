"""What tests of the Triton kernels share. Without a GPU they run in Triton's interpreter, in numpy, on small shapes.

Imported before anything else that could import triton: the interpreter is chosen at that moment."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (it exists for Linux and Windows): pip install triton")

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def to_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference beside the largest value."""
    assert found.shape == expected.shape
    difference = (found.cpu().double() - expected.cpu().double()).abs().max() if found.numel() else torch.zeros(())
    return float(difference) / max(float(expected.abs().max()) if expected.numel() else 1.0, 1e-30)
