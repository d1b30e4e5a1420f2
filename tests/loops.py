"""What the tests of the ops share: noise, and the few functions their plain loops are written with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: object, tolerance: float = 2e-6) -> None:
    """Within tolerance, relative above one and absolute below."""
    assert found.dtype == torch.float32
    exact = expected.double() if isinstance(expected, Tensor) else torch.tensor(expected, dtype=torch.float64)
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= tolerance * exact.abs().clamp(min=1)).all()


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    terms = [math.exp(v - largest) for v in values]
    return [term / sum(terms) for term in terms]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
