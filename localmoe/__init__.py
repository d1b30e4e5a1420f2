"""localmoe: run DeepSeek-V4 mixture-of-experts models from their published checkpoints.

The names below load torch on first use, not on import."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout, kernels/ and cli/ lie beside this folder; installed, they lie inside it and nothing is added.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.events import Completion
    from localmoe.sampler import SamplingParams

__version__ = "0.1.0"
_HOMES = {"LLM": "localmoe.api", "Completion": "localmoe.events", "SamplingParams": "localmoe.sampler"}
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'localmoe' has no attribute {name!r}")
