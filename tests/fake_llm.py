"""A model that says what it was told to say: the engine's events without an engine, for tests of the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from localmoe import api
from localmoe.events import Completion, Event, Finished, Progress, Stats, Text, TextKind
from localmoe.prompt import render_chat
from localmoe.sampler import SamplingParams


class FakeTokenizer:
    """A token a word."""

    def encode(self, text: str) -> list[int]:
        return [7] * len(text.split())

    def encode_special(self, text: str, ranges: object) -> list[int]:
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{id}>" for id in ids)


class FakePrepared(NamedTuple):
    """ids: of the prompt; asked: what it was made of."""

    ids: list[int]
    asked: dict[str, Any]


class FakeSession(int):
    """A session that has read nothing. A number, so that tests can tell which one was used."""

    marks = ()

    def kept(self, ids: list[int]) -> int:
        return 0


class FakeLLM:
    """Replies with `replies` in turn, a list of (kind, text) pieces each, and records what it was asked.

    Class attributes, because the command constructs it: set them on a subclass."""

    replies: ClassVar[list[list[tuple[TextKind, str]]]] = [[("answer", "Once upon"), ("answer", " a time.")]]
    finish_reason: ClassVar[Any] = "stop"
    error: ClassVar[str | None] = None
    logprobs: ClassVar[tuple[Any, ...] | None] = None
    seconds_per_piece: ClassVar[float] = 0.0
    # How long the prompt of each reply takes, in turn, and the load of the model.
    prefill_seconds: ClassVar[list[float]] = [0.0]
    load_seconds: ClassVar[float] = 0.0
    kernels_notice: ClassVar[str | None] = None
    graphs_notice: ClassVar[str | None] = None
    made: ClassVar[list[FakeLLM]]

    pager: ClassVar[Any] = None

    def __init_subclass__(cls) -> None:
        cls.made = []

    def __init__(self, model: Any = None, **options: Any) -> None:
        time.sleep(self.load_seconds)
        self.made.append(self)
        self.model, self.options = model, options
        self.name, self.context, self.tokenizer = "fake", 2048, FakeTokenizer()
        self.asked: list[dict[str, Any]] = []
        self.sessions = 0

    def close(self) -> None:
        """Nothing is open."""

    def default_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6)

    def session(self) -> FakeSession:
        self.sessions += 1
        return FakeSession(self.sessions)

    def identity(self) -> dict[str, str]:
        return {}

    def chat_ids(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return render_chat(messages, **options).ids(self.tokenizer)  # type: ignore[arg-type]

    def stream(self, prompt: str, params: SamplingParams, **options: Any) -> Iterator[Event]:
        self.asked.append({"prompt": prompt, "params": params, **options})
        return self._reply(options.get("cancelled"))

    def prepare_chat(self, messages: list[dict[str, Any]], **options: Any) -> FakePrepared:
        return FakePrepared(self.chat_ids(messages, **options), {"messages": [dict(m) for m in messages], **options})

    def stream_prepared(self, prepared: FakePrepared, params: SamplingParams, **options: Any) -> Iterator[Event]:
        self.asked.append({**prepared.asked, "params": params, **options})
        return self._reply(options.get("cancelled"))

    def stream_chat(self, messages: list[dict[str, Any]], params: SamplingParams, **options: Any) -> Iterator[Event]:
        self.asked.append({"messages": [dict(m) for m in messages], "params": params, **options})
        return self._reply(options.get("cancelled"))

    def _reply(self, cancelled: Callable[[], bool] | None) -> Iterator[Event]:
        said: list[tuple[TextKind, str]] = []
        reason = self.finish_reason
        turn = len(self.asked) - 1
        yield Progress(0, 3)
        until = time.monotonic() + self.prefill_seconds[turn % len(self.prefill_seconds)]
        while time.monotonic() < until and not (cancelled is not None and cancelled()):
            time.sleep(0.02)
        yield Progress(3, 3)
        for kind, text in self.replies[turn % len(self.replies)]:
            time.sleep(self.seconds_per_piece)
            if cancelled is not None and cancelled():
                reason = "cancelled"
                break
            said.append((kind, text))
            yield Text(kind, text)
        yield Finished(self._completion(said, reason))

    def _completion(self, said: list[tuple[TextKind, str]], reason: Any) -> Completion:
        answer = "".join(text for kind, text in said if kind == "answer")
        return Completion(
            prompt_tokens=3,
            token_ids=(7,) * len(said),
            text=answer,
            reasoning="".join(text for kind, text in said if kind == "reasoning"),
            tool_calls=(),
            finish_reason=reason,
            error=self.error,
            logprobs=self.logprobs,
            stats=Stats(
                prompt_tokens=3,
                reused_tokens=1,
                generated_tokens=len(said),
                prefill_seconds=0.5,
                decode_seconds=0.25,
                first_token_seconds=0.5,
            ),
            message={"role": "assistant", "content": answer},
        )


def run_with(replies: list[list[tuple[TextKind, str]]], seconds_per_piece: float = 0.0, **attributes: Any) -> None:
    """Run the process's own command line against a fake model; for tests that need a real terminal or real signals.

    attributes: others of FakeLLM."""
    from localmoe.cli.main import run

    class Model(FakeLLM):
        pass

    Model.replies, Model.seconds_per_piece = replies, seconds_per_piece
    for name, value in attributes.items():
        setattr(Model, name, value)
    api.LLM = Model  # type: ignore[misc, assignment]
    run()
