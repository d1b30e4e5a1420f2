"""`localmoe pack`: a model's experts laid out so that one read fetches one. Can be interrupted, and goes on.

Owns the options and the lines; does not know the files. Writes only into the folders it is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import render

if TYPE_CHECKING:
    from localmoe.experts.layout import Layout
    from localmoe.experts.pack import Identities, Pack

_GB = 10**9


def pack(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory.")],
    *,
    output: Annotated[
        list[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Where to; several, on several disks, share the experts."),
    ],
    check: Annotated[bool, typer.Option("--verify", help="Read all of the pack and compare its checksums.")] = False,
) -> None:
    """Make a pack, or complete it, and say what it is. Raises UsageError, ModelError or ResourceError."""
    from localmoe.experts.file import File
    from localmoe.experts.pack import fingerprint, open_pack, verify
    from localmoe.experts.pack_writer import write_pack

    with render.Waiting(render.open_console(), f"reading {model}") as waiting:
        layout, files = locate(model)
        meter = Meter(waiting, "packing")
        left = write_pack(
            layout,
            lambda number: File(layout.files[number], *files[layout.files[number]]),
            fingerprint(files),
            output,
            meter.show,
        )
        made = open_pack(output[0])
        lines = [summary(made, f"{meter.rate(left)}" if left else "already complete")]
        if check:
            meter = Meter(waiting, "verifying")
            verify(made, meter.show)
            lines.append(f"verified: every record is what was written, {meter.rate(meter.total)}")
    for line in lines:
        typer.echo(line)


def locate(model: Path) -> tuple[Layout, Identities]:
    """Where a model's experts lie, and its files. Raises ModelError."""
    from localmoe.checkpoint import Checkpoint
    from localmoe.expert_layout import layout_of
    from localmoe.loader import read_config
    from localmoe.matching import match
    from localmoe.models.family import tensor_inventory

    config = read_config(model)
    inventory = tensor_inventory(config)
    with Checkpoint.open(model) as checkpoint:
        sources = match(config, inventory, checkpoint)
        return layout_of(model, config, inventory, sources, compact=False), checkpoint.identities()


def summary(made: Pack, rate: str) -> str:
    """The line at the end."""
    manifest = made.manifest
    nbytes = len(manifest.crc32) * manifest.record_bytes
    return f"{len(manifest.crc32):,} records, {nbytes / _GB:,.2f} GB, {rate}"


class Meter:
    """Says on the waiting line how far it is and how long it takes still."""

    def __init__(self, waiting: render.Waiting, doing: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._waiting, self._doing, self._clock = waiting, doing, clock
        self._started, self._first = clock(), -1
        self.total = 0

    def show(self, done: int, total: int) -> None:
        """done, total: bytes; what was done at the first call was done before."""
        if self._first < 0:
            self._first = done if done < total else 0
        self.total = total
        seconds = self._clock() - self._started
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        text = f"{self._doing}: {done / _GB:,.1f} of {total / _GB:,.1f} GB"
        if rate > 0:
            minutes, rest = divmod(round((total - done) / rate), 60)
            text += f", {rate / _GB:.2f} GB/s, {minutes}:{rest:02} left"
        self._waiting.update(text)

    def rate(self, nbytes: int) -> str:
        """Of so many bytes in the time since the beginning."""
        return f"{nbytes / _GB / max(self._clock() - self._started, 1e-9):.2f} GB/s"
