"""`localmoe chat`: turns, /commands, and what Ctrl-C means. The terminal itself: test_cli_chat_terminal.py."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from localmoe.cli.chat import Interrupts
from localmoe.cli.main import main
from localmoe.errors import GenerationError
from tests.fake_llm import FakeLLM


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    class Model(FakeLLM):
        pass

    Model.replies = [[("answer", "one")], [("answer", "two")], [("answer", "three")]]
    monkeypatch.setattr("localmoe.api.LLM", Model)
    return Model


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a chat whose input is the given lines."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", *options])

    return run


def said(model: type[FakeLLM]) -> list[list[str]]:
    """What the model was sent in each turn, as texts."""
    return [[message["content"] for message in asked["messages"]] for asked in model.made[0].asked]


def test_each_turn_sees_the_turns_before_in_the_same_session(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    """Fails if history is lost, or if the prefix would be read again because the session changed."""
    assert talk("a", "b", options=("-s", "sys")) == 0
    assert said(model) == [["sys", "a"], ["sys", "a", "one", "b"]]
    assert [asked["session"] for asked in model.made[0].asked] == [1, 1]


def test_stdout_holds_the_answers_only(model: type[FakeLLM], talk: Callable[..., int], capsys: Any) -> None:
    assert talk("a", "/help", "b") == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "/clear" in err and "tok/s" in err


def test_clear_forgets_the_turns_and_keeps_the_system_text(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    talk("a", "/clear", "b", options=("-s", "sys"))
    assert said(model) == [["sys", "a"], ["sys", "b"]]
    assert [asked["session"] for asked in model.made[0].asked] == [1, 2]


@pytest.mark.parametrize("command", ["/exit", "/bye", " /exit "])
def test_exit_leaves_before_the_next_line(model: type[FakeLLM], talk: Callable[..., int], command: str) -> None:
    assert talk(command, "never sent") == 0
    assert said(model) == []


def test_an_unknown_command_is_named_and_not_sent(model: type[FakeLLM], talk: Callable[..., int], capsys: Any) -> None:
    talk("/frobnicate now")
    assert said(model) == []
    assert "/frobnicate is not a command" in capsys.readouterr().err


def test_two_slashes_send_one(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    """But in several lines, such as pasted code, nothing is taken away."""
    talk("//help me", "/clear", '"""// a', 'b"""')
    assert said(model) == [["/help me"], ["// a\nb"]]


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
    model: type[FakeLLM], talk: Callable[..., int], lines: list[str], message: str | None
) -> None:
    """Also: such a message is never a command, and one that is not ended is not sent."""
    talk(*lines)
    assert said(model) == ([[message]] if message else [])


def test_an_empty_line_is_not_a_message(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    talk("", "   ", "a")
    assert said(model) == [["a"]]


def test_a_turn_that_fails_is_dropped_and_the_chat_goes_on(
    model: type[FakeLLM], talk: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a NaN in one reply ends the chat, or if its message stays in the history."""
    honest = model.stream_chat

    def sometimes(self: FakeLLM, messages: Any, params: Any, **options: Any) -> Iterator[Any]:
        if messages[-1]["content"] == "bad":
            raise GenerationError("layer 3: NaN")
        return honest(self, messages, params, **options)

    monkeypatch.setattr(model, "stream_chat", sometimes)
    assert talk("bad", "good") == 0
    assert said(model) == [["good"]]
    assert "not answered: layer 3: NaN" in capsys.readouterr().err


def test_a_reply_that_ends_in_an_error_is_dropped_too(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    model.finish_reason, model.error = "error", "NaN"
    talk("a", "b")
    assert said(model) == [["a"], ["b"]]


def test_input_that_is_not_text_is_dropped(
    model: type[FakeLLM], talk: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal in the C locale hands over bytes that are not UTF-8 as lone surrogates."""
    talk("\udc80", "a")
    assert said(model) == [["a"]]
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


def test_the_handler_of_ctrl_c_is_given_back(model: type[FakeLLM], talk: Callable[..., int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    talk("a")
    assert signal.getsignal(signal.SIGINT) is before
