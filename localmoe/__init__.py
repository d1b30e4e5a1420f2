"""localmoe: run DeepSeek-V4 mixture-of-experts models from their published checkpoints.

The names below load torch on first use, not on import."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout, kernels/ and cli/ lie beside this folder; installed, they lie inside it and nothing is added.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

# torch's OpenMP threads spin after each of its operations, on the cores the kernels want next: prefill loses a third.
# Read by OpenMP when torch is loaded; whoever has set it knows better.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.constraint import Constraint
    from localmoe.events import Completion
    from localmoe.experts.paging import Paging
    from localmoe.sampler import SamplingParams

__version__ = "0.1.0"
_HOMES = {
    "LLM": "localmoe.api",
    "Completion": "localmoe.events",
    "Constraint": "localmoe.constraint",
    "Paging": "localmoe.experts.paging",
    "SamplingParams": "localmoe.sampler",
}
__all__ = ["LLM", "Completion", "Constraint", "Paging", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'localmoe' has no attribute {name!r}")
