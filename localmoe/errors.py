"""Every error localmoe raises for a reader outside the code: one class per exit code, one sentence per error.

Only cli/main.py prints them. A message says what was found, where, what was expected and what to do next.
"""

from __future__ import annotations


class LocalMoeError(Exception):
    """Base of all localmoe errors."""

    exit_code = 1


class UsageError(LocalMoeError):
    """An option or argument that cannot be honoured; also for wrong arguments of the Python API."""

    exit_code = 2


class PartlyFailedError(LocalMoeError):
    """A batch that ran to its end, but some of its requests failed."""

    exit_code = 3


class ModelError(LocalMoeError):
    """A model directory that is invalid, incomplete or corrupt."""

    exit_code = 4


class ConfigError(ModelError):
    """config.json lacks a field, contradicts itself, or asks for something localmoe does not implement."""


class CheckpointError(ModelError):
    """A shard, index or tensor that is missing, misshapen, truncated or out of bounds."""


class FormatError(ModelError):
    """Packed weights or scales that do not fit their declared format."""


class ResourceError(LocalMoeError):
    """Not enough disk, RAM or VRAM; raised before work starts wherever that can be known."""

    exit_code = 5


class ReadError(LocalMoeError):
    """A disk that fails while experts are read from it."""


class GenerationError(LocalMoeError):
    """A sequence that cannot go on, for example NaN in its logits; other sequences are not affected."""
