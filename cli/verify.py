"""`localmoe verify`: whether a quantized model is still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli import render


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that localmoe quantize made.")],
) -> None:
    """Compare every tensor with its digest. Raises ModelError for the first that differs."""
    from localmoe.quantize.verify import verify as compare

    with render.Waiting(render.open_console(), f"reading {folder}") as waiting:
        count = compare(folder, lambda done, total: waiting.update(f"verifying: {100 * done // max(total, 1)} %"))
    typer.echo(f"{count} tensors are what was written")
