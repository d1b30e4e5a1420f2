"""cli/render.py: the waiting line, the timings line and the order of what is written."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from localmoe.cli import render
from localmoe.events import Completion, Event, Finished, Progress, Stats, Text
from localmoe.sampler import Sample

SHOW_CURSOR = "\x1b[?25h"
ERASE_LINE = "\x1b[2K"


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, _environ={"TERM": "xterm"})


def written(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def completion(reason: Any = "stop", **counts: Any) -> Completion:
    figures = {"prompt_tokens": 1204, "reused_tokens": 0, "generated_tokens": 257, "prefill_seconds": 2.0}
    figures |= {"decode_seconds": 64.0, "first_token_seconds": 2.015} | counts
    return Completion(
        prompt_tokens=1204,
        token_ids=(),
        text="",
        reasoning="",
        tool_calls=(),
        finish_reason=reason,
        error=None,
        logprobs=None,
        stats=Stats(**figures),
        message={},
    )


def test_a_wait_is_shown_after_the_delay_and_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the line stays on the screen or the cursor stays hidden."""
    monkeypatch.setattr(render, "DELAY_SECONDS", 0)
    screen = console(terminal=True)
    with render.Waiting(screen, "loading x\x1b[2J") as waiting:
        waiting._timer.join()
    assert "loading x␛[2J" in written(screen)
    assert written(screen).rindex(ERASE_LINE) > written(screen).rindex("loading")
    assert written(screen).count(SHOW_CURSOR) == 1


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (False, False), (True, True)])
def test_a_short_wait_a_pipe_and_quiet_show_nothing(terminal: bool, quiet: bool) -> None:
    screen = console(terminal=terminal)
    with render.Waiting(screen, "loading", quiet=quiet):
        pass
    assert "loading" not in written(screen)


def test_a_wait_that_is_over_is_not_shown_late() -> None:
    """The timer may fire while end() runs. Fails if the line could then appear in the middle of a reply."""
    screen = console(terminal=True)
    waiting = render.Waiting(screen, "loading")
    waiting.end()
    waiting._begin()
    assert "loading" not in written(screen)


def test_timings_show_rates_with_three_digits() -> None:
    line = "prompt 1,204 tok 602 tok/s | gen 257 tok 4.00 tok/s | ttft 2.02 s"
    assert render.timings(completion(first_token_seconds=2.016)) == line


def test_timings_name_what_was_reused_and_why_it_ended() -> None:
    line = render.timings(completion("cancelled", reused_tokens=1200))
    assert "(1,200 reused) 2.00 tok/s" in line
    assert line.endswith("| cancelled")


def test_a_stream_without_an_end_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="Finished"):
        render.follow(iter([Progress(1, 2)]), render.Waiting(console(terminal=False), ""), None)


def test_a_change_from_reasoning_to_answer_starts_a_line(capsys: Any) -> None:
    screen = console(terminal=False)
    with render.ReplyWriter(screen) as writer:
        for kind, text in [("reasoning", "so"), ("answer", "yes"), ("answer", ""), ("answer", " sir")]:
            writer.write(kind, text)  # type: ignore[arg-type]
    assert written(screen) == "so\n"
    assert capsys.readouterr().out == "yes sir\n"


class Screen(io.StringIO):
    """A stdout that says it is a terminal, 30 columns wide."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 77


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    # Not sys.stdout: pytest sets that anew between a fixture and its test.
    monkeypatch.setattr(render, "sys", SimpleNamespace(stdout=screen))
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((30, 9)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


ANSWER = "# T\n\n\n`c` **b** and more than thirty columns"


def answered(*, markdown: bool = True) -> None:
    with render.ReplyWriter(console(terminal=False), markdown=markdown) as writer:
        for piece in ANSWER:
            writer.write("answer", piece)


def test_an_answer_is_laid_out_in_a_terminal(terminal: Screen) -> None:
    answered()
    assert terminal.getvalue() == (
        "\x1b[1;35mT\x1b[0m\n\n\x1b[36mc\x1b[0m \x1b[1mb\x1b[0m and more than thirty\ncolumns\n"
    )


def test_no_color_keeps_the_layout(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    answered()
    assert terminal.getvalue() == "\x1b[1mT\x1b[0m\n\n`c` \x1b[1mb\x1b[0m and more than thirty\ncolumns\n"


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_and_plain_get_the_exact_answer(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    answered(markdown=term == "dumb")
    assert terminal.getvalue() == ANSWER + "\n"


def test_a_pipe_gets_the_exact_answer(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where colours are forced: who reads a pipe wants the text."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    answered()
    assert capsys.readouterr().out == ANSWER + "\n"


def test_tool_calls_are_not_markdown(terminal: Screen) -> None:
    with render.ReplyWriter(console(terminal=False), markdown=True) as writer:
        writer.write("answer", "**so**")
        writer.write("tool_call", "**x**  {\n\n\n}")
    assert terminal.getvalue() == "\x1b[1mso\x1b[0m\n**x**  {\n\n\n}\n"


def thinking(answer: str) -> list[Event]:
    sample = Sample(7, 0.0, ())
    texts: list[Event] = [Text("reasoning", "hm ", (sample,) * 2) for _ in range(600)]
    return [*texts, Text("answer", answer, (sample,)), Finished(completion())]


@pytest.mark.parametrize(("quiet", "answer"), [(False, "yes"), (False, ""), (True, "yes")])
def test_folded_thinking_is_counted_on_one_line(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, quiet: bool, answer: str
) -> None:
    """Also: of a reply that was stopped before its answer; and quiet says nothing."""
    monkeypatch.setattr("time.monotonic", iter([10.0, 22.34]).__next__)
    screen, pieces = console(terminal=False), []
    with (
        render.Waiting(screen, "", quiet=quiet) as waiting,
        render.ReplyWriter(screen, quiet=quiet, fold=True) as writer,
    ):
        render.follow(iter(thinking(answer)), waiting, writer, lambda kind, text: pieces.append((kind, text)))
    assert written(screen) == ("" if quiet else "thought for 12.3 s, 1,200 tokens; /fold show shows it\n")
    assert capsys.readouterr().out == (f"{answer}\n" if answer else "")
    assert len(pieces) == 601


class Line(render.Waiting):
    """Keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(console(terminal=False), "")
        self.texts: list[str] = []

    def update(self, text: str) -> None:
        self.texts.append(text)


def test_a_long_prompt_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the speed since the first chunk: what was reused and the wait for a first chunk would give a false one."""
    monkeypatch.setattr("time.monotonic", iter([50.0, 60.0, 80.0, 99.0]).__next__)
    line = Line()
    events = [Progress(done, 100_000) for done in (90_000, 92_000, 96_000, 100_000)]
    render.follow(iter([*events, Finished(completion())]), line, None)
    assert line.texts == [
        "reading the prompt: 90,000 of 100,000 tokens",
        "reading the prompt: 92,000 of 100,000 tokens, 40s left",
        "reading the prompt: 96,000 of 100,000 tokens, 20s left",
        "reading the prompt: 100,000 of 100,000 tokens",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59.4, "59s"), (59.6, "1m00s"), (80, "1m20s"), (7500, "2h05m")]
)
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert render.time_text(seconds) == text
