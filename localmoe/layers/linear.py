"""How layers ask for the weights they are bound to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from localmoe.weights import Weight

Lookup = Callable[[str], Weight]


class Binds(Protocol):
    """What a layer is bound by: weights where it is computed, by their published names."""

    def tensor(self, name: str) -> Tensor:
        """One that is plain."""

    def matrix(self, name: str) -> Weight:
        """One that is only ever multiplied."""


def tensor(get: Lookup, name: str) -> Tensor:
    """A weight that must be plain (norms, biases, mixing parameters)."""
    w = get(name)
    assert isinstance(w, Tensor), f"{name} must be a plain tensor"
    return w
