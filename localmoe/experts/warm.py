"""A warm start: the table of slots as a recorded run left it, so that its experts can be read at once."""

from __future__ import annotations

from pathlib import Path

from localmoe.errors import UsageError
from localmoe.experts.residency import Counts, Residency
from localmoe.experts.simulate import replay_step
from localmoe.experts.trace import TracedStep, read_trace
from localmoe.files import shown


def check_profile(path: Path, num_layers: int, num_experts: int) -> None:
    """Raises UsageError for a file that is no trace, or one of another model."""
    header, _entries = read_trace(path)
    if (header.num_layers, header.num_experts) != (num_layers, num_experts):
        raise UsageError(
            f"{shown(path)}: was recorded with {header.num_layers} layers of {header.num_experts} experts, the model "
            f"has {num_layers} of {num_experts}; record one with --trace-routing"
        )


def warm(table: Residency, path: Path) -> list[int]:
    """Let the table take what the trace recorded; returns its residents, the latest first.

    Raises UsageError for a file that is no trace, or one of another model."""
    check_profile(path, table.num_layers, table.num_experts)
    header, entries = read_trace(path)
    for entry in entries:
        if isinstance(entry, TracedStep):
            replay_step(table, entry, header.num_hash_layers)
    table.counts = Counts()
    return table.keys()[::-1]
