"""cli/main.py: every way of ending becomes an exit code and at most one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe import __version__
from localmoe.cli import main as main_module
from localmoe.cli.endings import HUNG_UP, TERMINATED
from localmoe.cli.main import BROKEN_PIPE, INTERRUPTED, main
from localmoe.errors import CheckpointError, GenerationError, LocalMoeError, ResourceError, UsageError
from tests.fake_llm import FakeLLM

ROOT = Path(__file__).parents[1]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    class Model(FakeLLM):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise error

    monkeypatch.setattr("localmoe.api.LLM", Model)
    monkeypatch.setattr(sys, "stdin", None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LocalMoeError("what"), 1),
        (GenerationError("what"), 1),
        (UsageError("what"), 2),
        (CheckpointError("what"), 4),
        (ResourceError("what"), 5),
        (MemoryError("what"), 5),
        (ZeroDivisionError("what"), 1),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, code: int
) -> None:
    fail_with(monkeypatch, error)
    assert main(["run", "hi"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("localmoe: error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fail_with(monkeypatch, CheckpointError("what"))
    assert main(["--debug", "run", "hi"]) == 4
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("localmoe: error: what\n")


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["run", "hi"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_version(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"localmoe {__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: Any) -> None:
    assert main([]) == 2
    assert "run" in capsys.readouterr().err


def test_a_wrong_command_points_to_the_help(capsys: Any) -> None:
    assert main(["chatt"]) == 2
    assert capsys.readouterr().err == "localmoe: error: No such command 'chatt'; see localmoe --help\n"


def test_an_unknown_variable_of_ours_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fails if a misspelt setting would be ignored in silence."""
    monkeypatch.setenv("LOCALMOE_CONTEX", "9")
    main([])
    assert "LOCALMOE_CONTEX" in capsys.readouterr().err


def program(*arguments: str, piece: str = "word ", count: int = 3, seconds: float = 0.0) -> list[str]:
    """A command line that runs the whole program with a fake model."""
    replies = f"[[('answer', {piece!r})] * {count}]"
    code = f"from tests.fake_llm import run_with; run_with({replies}, {seconds})"
    return [sys.executable, "-c", code, "run", "hi", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def test_a_closed_pipe_ends_the_program_quietly() -> None:
    """As in `localmoe run ... | head`."""
    process = subprocess.Popen(
        program(count=100_000),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == BROKEN_PIPE


def test_ctrl_c_keeps_what_was_said() -> None:
    """Fails if the shell would take the part of a reply for the whole, or if a traceback is shown."""
    process = subprocess.Popen(
        program(seconds=0.05, count=2000),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"w"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert b"ord " in out and out.endswith(b"\n")
    assert err.count(b"\n") == 1 and err.endswith(b"| cancelled\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported() -> None:
    """Fails if the reply would be lost with exit code 0, or if Python adds its own complaint at exit."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            program(), stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert done.returncode == 1
    assert done.stderr == b"localmoe: error: No space left on device\n"


def signalled(number: int, *, before: str = "", **options: Any) -> tuple[bytes, int]:
    """What a reply came to that a signal met, and the exit code. before: what ran the program."""
    process = subprocess.Popen(
        [*before.split(), *program(**options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(number)
    return first + process.stdout.read(), process.wait(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGHUP, HUNG_UP)])
def test_an_end_from_outside_cleans_up_and_has_its_code(number: int, code: int) -> None:
    said, found = signalled(number, seconds=0.2, count=600)
    # The line that was open is ended on the way out.
    assert said.endswith(b"\n") and found == code


def test_with_nohup_a_closed_terminal_ends_nothing() -> None:
    said, code = signalled(signal.SIGHUP, before="nohup", seconds=0.2, count=5)
    assert said.count(b"ord ") == 5 and code == 0


def test_a_stream_that_cannot_show_a_character_shows_a_question_mark() -> None:
    done = subprocess.run(
        program(piece="naïve ", count=1, seconds=0),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
        check=True,
    )
    assert done.stdout == b"na?ve \n"


def test_every_command_has_a_module_with_its_function() -> None:
    """The table is what --help shows, so a line in it must lead somewhere."""
    for name in main_module.COMMANDS:
        assert main([name, "--help"]) == 0
