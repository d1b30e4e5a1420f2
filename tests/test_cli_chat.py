"""`localmoe chat`: turns, /commands, and what Ctrl-C means. The terminal itself: test_cli_chat_terminal.py."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from localmoe.cli.chat_interrupts import Interrupts
from localmoe.errors import GenerationError
from tests.chat_talk import said
from tests.fake_llm import FakeLLM, FakePrepared


def test_each_turn_sees_the_turns_before_in_the_same_session(
    fake_model: type[FakeLLM], talk: Callable[..., int]
) -> None:
    """Fails if history is lost, or if the prefix would be read again because the session changed."""
    assert talk("a", "b", options=("-s", "sys")) == 0
    assert said(fake_model) == [["sys", "a"], ["sys", "a", "one", "b"]]
    assert [asked["session"] for asked in fake_model.made[0].asked] == [1, 1]


def test_stdout_holds_the_answers_only(fake_model: type[FakeLLM], talk: Callable[..., int], capsys: Any) -> None:
    assert talk("a", "/help", "b") == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "/clear" in err and "tok/s" in err


def test_clear_forgets_the_turns_and_keeps_the_system_text(fake_model: type[FakeLLM], talk: Callable[..., int]) -> None:
    talk("a", "/clear", "b", options=("-s", "sys"))
    assert said(fake_model) == [["sys", "a"], ["sys", "b"]]
    assert [asked["session"] for asked in fake_model.made[0].asked] == [1, 2]


@pytest.mark.parametrize("command", ["/exit", "/bye", " /exit "])
def test_exit_leaves_before_the_next_line(fake_model: type[FakeLLM], talk: Callable[..., int], command: str) -> None:
    assert talk(command, "never sent") == 0
    assert said(fake_model) == []


def test_an_unknown_command_is_named_and_not_sent(
    fake_model: type[FakeLLM], talk: Callable[..., int], capsys: Any
) -> None:
    talk("/frobnicate now")
    assert said(fake_model) == []
    assert "/frobnicate is not a command" in capsys.readouterr().err


def test_two_slashes_send_one(fake_model: type[FakeLLM], talk: Callable[..., int]) -> None:
    """But in several lines, such as pasted code, nothing is taken away."""
    talk("//help me", "/clear", '"""// a', 'b"""')
    assert said(fake_model) == [["/help me"], ["// a\nb"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"""', "a", "", "b", '"""'], "a\n\nb"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        (['"""', "/exit", '"""x', '"""'], '/exit\n"""x'),
        (['"""', "a"], None),
    ],
)
def test_three_quotes_begin_and_end_a_message_of_several_lines(
    fake_model: type[FakeLLM], talk: Callable[..., int], lines: list[str], message: str | None
) -> None:
    """Also: such a message is never a command, and one that is not ended is not sent."""
    talk(*lines)
    assert said(fake_model) == ([[message]] if message else [])


def test_an_empty_line_is_not_a_message(fake_model: type[FakeLLM], talk: Callable[..., int]) -> None:
    talk("", "   ", "a")
    assert said(fake_model) == [["a"]]


def test_a_turn_that_fails_is_dropped_and_the_chat_goes_on(
    fake_model: type[FakeLLM], talk: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a NaN in one reply ends the chat, or if its message stays in the history."""
    honest = fake_model.stream_prepared

    def sometimes(self: FakeLLM, prepared: FakePrepared, params: Any, **options: Any) -> Iterator[Any]:
        if prepared.asked["messages"][-1]["content"] == "bad":
            raise GenerationError("layer 3: NaN")
        return honest(self, prepared, params, **options)

    monkeypatch.setattr(fake_model, "stream_prepared", sometimes)
    assert talk("bad", "good") == 0
    assert said(fake_model) == [["good"]]
    assert "not answered: layer 3: NaN" in capsys.readouterr().err


def test_a_prompt_is_made_once(
    fake_model: type[FakeLLM], talk: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if looking for what is already read, and replying, each write it."""
    made: list[Any] = []
    honest = fake_model.chat_ids
    monkeypatch.setattr(fake_model, "chat_ids", lambda *given, **options: made.append(1) or honest(*given, **options))
    assert talk("a", "b") == 0
    assert len(made) == len(said(fake_model)) == 2


def test_a_reply_that_ends_in_an_error_is_dropped_too(fake_model: type[FakeLLM], talk: Callable[..., int]) -> None:
    fake_model.finish_reason, fake_model.error = "error", "NaN"
    talk("a", "b")
    assert said(fake_model) == [["a"], ["b"]]


def test_input_that_is_not_text_is_dropped(
    fake_model: type[FakeLLM], talk: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal in the C locale hands over bytes that are not UTF-8 as lone surrogates."""
    talk("\udc80", "a")
    assert said(fake_model) == [["a"]]
    assert "not UTF-8" in capsys.readouterr().err


def test_two_interrupts_leave_only_within_a_second() -> None:
    now = 100.0
    interrupts = Interrupts(clock=lambda: now)
    interrupts.note()
    now += 1.0
    interrupts.note()
    now += 0.9
    with pytest.raises(KeyboardInterrupt):
        interrupts.note()


def test_the_signal_stops_the_reply_first_and_leaves_the_second_time() -> None:
    """Between two lines it must not raise, or a late Ctrl-C would end the chat; while a line is read it must."""
    with Interrupts(clock=lambda: 5.0) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.reading():
            signal.raise_signal(signal.SIGINT)


def test_the_handler_of_ctrl_c_is_given_back(fake_model: type[FakeLLM], talk: Callable[..., int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    talk("a")
    assert signal.getsignal(signal.SIGINT) is before
