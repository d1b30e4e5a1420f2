"""`localmoe eval`: how far a quantized model's predictions are from its source's, on a text.

Owns the options and the table; does not know how anything is compared."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import options, render
from localmoe.cli.places import model_folder
from localmoe.cli.texts import words_of
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.quantize.evaluate import Compared

_TOKENS = 1024


def eval(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model to judge: its directory or its name in localmoe list.")
    ],
    *,
    against: Annotated[Path, typer.Option("--against", metavar="SRC", help="The model it was made of.")],
    text: Annotated[Path, typer.Option("--text", "-f", metavar="FILE", help="Text to predict, UTF-8.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=2, metavar="N", help="Of the text, so many.")] = _TOKENS,
    tmp: Annotated[
        Path | None, typer.Option("--tmp", metavar="DIR", help="Where the source's distributions may wait.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ram: options.RamOption = None,
) -> None:
    """Print perplexities and divergences. Raises UsageError, ModelError or ResourceError."""
    words = words_of(text)
    folder = tmp or Path(tempfile.gettempdir())
    if not folder.is_dir():
        raise UsageError(f"--tmp is {folder}, which is not a folder; make it, or name another")
    model, against = model_folder(model), model_folder(against)
    paging = options.PagingFlags(ram=ram)
    console = render.open_console()
    with render.Waiting(console, f"loading {against}") as waiting:
        from localmoe.api import LLM
        from localmoe.quantize.evaluate import evaluate
        from localmoe.tokenizer import Tokenizer

        def opener(path: Path) -> LLM:
            return LLM(path, kernels=kernels, threads=threads, paging=paging.paging())

        ids = Tokenizer.load(against).text_ids(words)[:tokens]
        found = evaluate(lambda: opener(against), lambda: opener(model), ids, folder, waiting.update)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), allow_nan=False) + "\n")
        return
    from localmoe.files import shown
    from localmoe.library import name_of

    typer.echo(f"{len(ids) - 1} tokens; KL in nats\n")
    typer.echo("| model | perplexity | mean KL | 99.9 % KL | same likeliest token |\n|---|---|---|---|---|")
    name = name_of(against)
    typer.echo(f"| {shown(name)} | {found.perplexity:.4f} | | | |")
    typer.echo(_row(f"{name} again, in other chunks (noise)", found.noise))
    typer.echo(_row(name_of(model), found.found))


def _row(name: str, one: Compared) -> str:
    from localmoe.files import shown

    return (
        f"| {shown(name)} | {one.perplexity:.4f} | {one.mean_kl:.2e} | {one.high_kl:.2e} "
        f"| {100 * one.agreement:.2f} % |"
    )
