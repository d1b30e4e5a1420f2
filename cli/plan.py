"""`localmoe plan`: where a model's bytes would go on this machine, or on another, and how fast it would be.

Owns the options; does not know how anything is placed, predicted or shown. Reads config.json only; the machine's rates
are measured the first time, which takes about ten seconds and half a GiB of disk."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import options, render
from localmoe.cli.places import model_folder
from localmoe.cli.plan_report import Question, lines, print_table, record
from localmoe.cli.sizes import parse_bytes
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.models.sizes import ModelSizes
    from localmoe.plan import Hits, Rates

_CONTEXT = 4096


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name of localmoe list, a model directory, a config.json, or v4-flash, v4-pro, v3 or v2-lite.",
        ),
    ],
    *,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Without it, what is available now.")] = None,
    vram: Annotated[str, typer.Option(metavar="SIZE", help="Memory of the GPU to use.")] = "0",
    context: Annotated[
        int | None,
        typer.Option("--ctx", "-c", min=1, metavar="TOKENS", help=f"Of each sequence. [default: {_CONTEXT}]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Sequences at the same time.")] = 1,
    hits: Annotated[
        str, typer.Option(metavar="uniform|typical|X", help="How often an expert is in memory; X is 0 to 1, measured.")
    ] = "typical",
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Decode speed for several sizes of RAM and VRAM.")] = False,
    threads: options.ThreadsOption = None,
) -> None:
    """Print the plan. Raises ResourceError with the shortage if the model does not fit, UsageError for bad options."""
    if table and (ram is not None or vram != "0"):
        raise UsageError("--table tries sizes of its own; leave --ram and --vram out")
    kind, in_vram = parse_hits(hits), parse_bytes(vram)
    in_ram = parse_bytes(ram) if ram is not None else 0 if table else _available()
    sizes, folder = find(model)
    from localmoe.placement import Budget, check_budget, place, refuse
    from localmoe.plan import plan as predict

    budget = Budget(in_ram, in_vram, min(_CONTEXT, sizes.context) if context is None else context, batch)
    check_budget(sizes, budget)
    if not table:
        # What cannot run needs no measuring.
        refuse(sizes, budget, place(sizes, budget))
    asked = Question(sizes, machine_rates(folder, threads, again=measure), kind)
    if table:
        print_table(asked, budget, as_json=as_json)
        return
    found = predict(sizes, budget, asked.rates, kind)
    if as_json:
        sys.stdout.write(json.dumps(record(found, asked), allow_nan=False) + "\n")
    else:
        sys.stdout.write("".join(f"{name:<9} {value}".rstrip() + "\n" for name, value in lines(found, asked)))


def parse_hits(given: str) -> Hits:
    """Raises UsageError for anything but uniform, typical and numbers from 0 to 1."""
    if given == "uniform":
        return "uniform"
    if given == "typical":
        return "typical"
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    # Written so that NaN is refused too.
    if not 0 <= value <= 1:
        raise UsageError(f"--hits is {given!r}, expected uniform, typical, or a number from 0 to 1")
    return value


def _available() -> int:
    from localmoe.device import available_memory

    nbytes = available_memory()
    if nbytes is None:
        raise UsageError("this system does not tell how much RAM is available; pass --ram")
    return nbytes


def find(model: str) -> tuple[ModelSizes, Path]:
    """The sizes of a model by its name or path, and the folder it is in or would be in.

    Raises UsageError for what is neither, ConfigError for a config that cannot be used."""
    from localmoe.bench.shapes import CONFIGS
    from localmoe.config import load_config
    from localmoe.device import hub_cache
    from localmoe.errors import ConfigError, ModelError
    from localmoe.files import MIB, read_json, shown
    from localmoe.models.sizes import sizes_of

    if model in CONFIGS:
        return sizes_of(CONFIGS[model], model), hub_cache()
    path = Path(model)
    if path.is_file():
        return sizes_of(read_json(path, 4 * MIB, ConfigError), shown(path)), path.absolute().parent
    try:
        folder = model_folder(path)
    except ModelError:
        raise UsageError(
            f"{shown(path)} is no model directory, no config.json, none of {', '.join(CONFIGS)} and no name of "
            "localmoe list"
        ) from None
    return sizes_of(load_config(folder), shown(path)), folder


def machine_rates(folder: Path, threads: int | None, *, again: bool) -> Rates:
    """What this machine does, with the disk of that folder or, where nothing can be written, of another."""
    from localmoe import backend

    chosen = backend.choose("auto", threads)
    from localmoe.bench import rates

    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    where = existing if os.access(existing, os.W_OK) else Path(tempfile.gettempdir())
    console = render.open_console()
    if os.stat(where).st_dev != os.stat(existing).st_dev:
        render.say(console, f"{existing} cannot be written to, so the disk of {where} is measured", kind="warning")
    with render.Waiting(console, "measuring this machine") as waiting:
        return rates.rates_of(where, chosen.library if chosen else None, waiting.update, again=again)
