"""`localmoe pull`: a model from the hub into the library. The only command that uses the network."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import render
from localmoe.cli.places import library
from localmoe.files import sized

if TYPE_CHECKING:
    from localmoe.hub import Hub
    from localmoe.pull import Plan


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of safetensors files.")],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="R", help="A branch, tag or commit; without it, the newest.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Its name in the library; without it, NAME.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be brought, and bring nothing.")] = False,
) -> None:
    """Print what is to come, then bring it; interrupted, the same command goes on.

    Raises ResourceError before anything is written if the disk has no room for it; others as localmoe.pull."""
    hub = open_hub()
    from localmoe.pull import check_room, download, prepare

    models, console = library(), render.open_console()
    plan = prepare(models, hub, repo, revision=revision, name=name)
    render.say(console, describe(plan))
    check_room(models, plan)
    if dry_run:
        return

    def show(doing: str, done: int, total: int) -> None:
        render.say(console, f"{100 * done // max(total, 1):3} %  {doing}")

    try:
        download(models, hub, plan, show)
    except KeyboardInterrupt:
        render.say(console, "stopped; the same command goes on with the first file that is not complete")
        raise
    sys.stdout.write(f"{plan.name} is complete: localmoe chat --model {plan.name}\n")


def open_hub() -> Hub:
    """Raises LocalMoeError if there is no huggingface_hub, UsageError if HF_HUB_OFFLINE forbids to use it."""
    from localmoe.hub import HuggingFace

    return HuggingFace()


def describe(plan: Plan) -> str:
    here = f", {sized(plan.here_bytes)} of it here already" if plan.here_bytes else ""
    others = f"; not taken (code, pickles, folders): {plan.left_out}" if plan.left_out else ""
    count = len(plan.files)
    return f"{plan.repo} at {plan.commit[:12]}: {count} files, {sized(plan.total_bytes)}{here}{others}"
