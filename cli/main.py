"""The command line: finds the command, runs it, and turns every way of ending into an exit code.

A command's module is imported only when that command is asked for. The only place that prints errors."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Never

import typer
from typer.core import TyperGroup

from localmoe import __version__
from localmoe.cli import endings
from localmoe.cli.terminal_state import given_back, lasting
from localmoe.errors import LocalMoeError, ResourceError

# A command is a function in the module of its name in localmoe.cli, or as in PLACES; here is the line that --help says
# about it.
COMMANDS = {
    "run": "Answer one prompt (also: generate). Files and text piped in come before PROMPT.",
    "batch": "Answer a file of requests, one JSON line each; can be interrupted and goes on.",
    "chat": "Talk with a model; /help inside lists what can be typed.",
    "bench": "Measure a model, the kernels or this machine.",
    "list": "Show the models there are, and which of them fit in RAM.",
    "show": "Say what is in a model, without reading its weights.",
    "pull": "Download a model into the library: what is to come is said first.",
    "rm": "Remove a model from the library.",
    "config": "Set defaults of options, and show where each comes from.",
    "quantize": "Make a smaller model of a model, with a report of what that did to it.",
    "eval": "Compare a quantized model's predictions with its source's.",
    "imatrix": "Measure how large the inputs of a model's matrices are on a text.",
    "verify": "Check that a quantized model is still what was written.",
    "pack": "Lay out a model's experts for fast reading, one record each.",
    "simulate": "Replay a routing trace through every cache policy, at any size.",
    "plan": "Where a model's bytes would go on this machine, and how fast it would be.",
    "doctor": "Show what localmoe finds on this machine, and whether it works.",
}
# Module and function of commands whose name is not that of a module.
PLACES = {"list": ("models", "list_models"), "show": ("models", "show"), "rm": ("models", "remove")}
ALIASES = {"generate": "run", "ls": "list"}
# LOCALMOE_TEST_DATA tells the tests where their data lies.
KNOWN_VARIABLES = frozenset({"LOCALMOE_CONFIG", "LOCALMOE_MODELS", "LOCALMOE_TEST_DATA"})
INTERRUPTED, BROKEN_PIPE = 130, 141


@dataclass
class Settings:
    """What the options before the command decide. typed: all that stands after `localmoe`."""

    typed: tuple[str, ...] = ()
    debug: bool = False


class LazyCommands(TyperGroup):
    """The group of all commands; names and help lines are known without importing any."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module, function = PLACES.get(name, (name, name))
        command = getattr(importlib.import_module(f"localmoe.cli.{module}"), function)
        # One with commands of its own is complete.
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, help=COMMANDS[name])(command)
        return typer.main.get_command(app)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # typer would make it exit code 1. 141 is what a program killed by SIGPIPE gives.
            raise typer.Exit(BROKEN_PIPE) from None


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"localmoe {__version__}")
        raise typer.Exit


def root(
    ctx: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run DeepSeek-V4 models from their published checkpoints.

    Without --model, the small embedded localmoe-mini answers."""
    ctx.obj.debug = debug
    for name in sorted(os.environ):
        if name.startswith("LOCALMOE_") and name not in KNOWN_VARIABLES:
            _say(f"environment variable {name} is not known to localmoe and has no effect", "warning")
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own; returns the exit code. Raises nothing but SystemExit."""
    app = typer.Typer(cls=LazyCommands, rich_markup_mode=None)
    app.callback(invoke_without_command=True)(root)
    settings = Settings(tuple(sys.argv[1:] if arguments is None else arguments))
    try:
        code = typer.main.get_command(app).main(
            args=arguments, prog_name="localmoe", standalone_mode=False, obj=settings
        )
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Print the one line that an error deserves; returns its exit code."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        _say(f"{error.format_message().rstrip('.')}{hint}", "error")
        return error.exit_code
    if isinstance(error, LocalMoeError):
        _say(str(error), "error")
        return error.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        _say("a device is out of memory; lower --vram or --ctx", "error")
        return ResourceError.exit_code
    if isinstance(error, MemoryError):
        _say("out of memory; lower --ctx or choose a smaller model", "error")
        return ResourceError.exit_code
    if isinstance(error, OSError):
        # Most often stdout on a full disk, and Python would fail once more when it flushes it at exit.
        _abandon_stdout()
        _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", "error")
        return LocalMoeError.exit_code
    _say(f"internal error, {type(error).__name__}: {error}; localmoe --debug ... shows where", "error")
    return LocalMoeError.exit_code


def _say(message: str, kind: Any) -> None:
    from localmoe.cli import render

    render.say(render.open_console(), message, kind=kind)


def _abandon_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, so that Python's own flush at exit stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> Never:
    """Entry point of the process: sets what belongs to a process, then exits with main's code."""
    # A shell can start a process with these closed; a file opened later must not take their place.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    endings.install()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark; it does not end the reply.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    with given_back():
        try:
            code = main()
        finally:
            # A key held down must not turn an orderly end into a kill, nor a shell that says twice that it ends.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            endings.ignore()
    # Whatever else went wrong on the way out.
    sys.exit(endings.asked() or code)


if __name__ == "__main__":
    run()
