"""`localmoe config`: defaults of options, and where each comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli import settings
from localmoe.cli.places import find_model, models_folder
from localmoe.cli.tables import print_table
from localmoe.files import shown

config = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Set defaults of options, and show where each comes from.",
    epilog=f"Keys: {', '.join(settings.KEYS)}. An option goes before the environment, that before the file.",
)
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help=f"One of {', '.join(settings.KEYS)}.")]


@config.callback(invoke_without_command=True)
def show(
    ctx: typer.Context,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Without a command: every key, its value and its origin. Raises UsageError for a file that cannot be used."""
    if ctx.invoked_subcommand is not None:
        return
    found = {name: settings.find(name) for name in settings.KEYS}
    if as_json:
        values = {name: {"value": one.value, "from": one.origin} for name, one in found.items()}
        sys.stdout.write(json.dumps({"file": str(settings.config_file()), "keys": values}) + "\n")
        return
    rows = [
        (name, shown(_or_default(name, found[name].value)), shown(found[name].origin), key.about)
        for name, key in settings.KEYS.items()
    ]
    print_table([("KEY", "VALUE", "FROM", "WHAT IT SETS"), *rows])
    sys.stdout.write(f"\nfile: {shown(settings.config_file(), 4096)}\n")


def _or_default(name: str, value: settings.Value | None) -> str:
    """What holds, in words where it is worked out later."""
    if value is not None:
        return str(value)
    return str(models_folder()) if name == "models" else settings.KEYS[name].default


@config.command("get")
def get(name: KeyArgument) -> None:
    """Print the value of a key; nothing where it is the default."""
    settings.known(name)
    value = settings.find(name).value
    if value is not None:
        sys.stdout.write(f"{shown(value, 4096)}\n")


@config.command("set")
def set_key(
    name: KeyArgument,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="As the option takes it.")],
) -> None:
    """Write a value to the file; refused if the option would refuse it."""
    settings.known(name)
    # Relative paths would mean another folder tomorrow.
    if name == "models":
        settings.from_text(name, value)
        value = str(Path(value).expanduser().absolute())
    elif name == "model":
        settings.from_text(name, value)
        given = Path(value).expanduser()
        find_model(given)
        value = str(given.absolute()) if given.is_dir() else value
    settings.write(settings.config_file(), name, settings.from_text(name, value))


@config.command("unset")
def unset(name: Annotated[str, typer.Argument(metavar="KEY", help="Also one that localmoe does not know.")]) -> None:
    """Take a key out of the file."""
    settings.write(settings.config_file(), name, None)
