"""How layers ask for the weights they are bound to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from localmoe.weights import Weight

Lookup = Callable[[str], Weight]


def tensor(get: Lookup, name: str) -> Tensor:
    """A weight that must be plain (norms, biases, mixing parameters)."""
    w = get(name)
    assert isinstance(w, Tensor), f"{name} must be a plain tensor"
    return w
