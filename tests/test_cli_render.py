"""cli/render.py: the waiting line, the timings line and the order of what is written."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from localmoe.cli import render
from localmoe.events import Completion, Progress, Stats

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
