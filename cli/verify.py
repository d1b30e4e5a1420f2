"""`localmoe verify`: whether a quantized model is still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli import render
from localmoe.cli.places import model_folder


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that localmoe quantize made, or its name in localmoe list.")
    ],
) -> None:
    """Compare every tensor and file with its digest. Raises ModelError for the first that differs."""
    folder = model_folder(folder)
    from localmoe.quantize.verify import verify as compare

    with render.Waiting(render.open_console(), f"reading {folder}") as waiting:
        found = compare(folder, lambda done, total: waiting.update(f"verifying: {100 * done // max(total, 1)} %"))
    if found.files is None:
        typer.echo(f"{found.tensors} tensors are what was written; an earlier version made this and noted nothing else")
    else:
        typer.echo(f"{found.tensors} tensors and {found.files} other files are what was written")
