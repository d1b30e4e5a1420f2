"""A conversation: what was said, how it is to go on, and the engine session that has read it.

Owns how a conversation becomes lines of a transcript and is put together from them. A line says how many messages of
those before it are kept, and what comes after them, so that turns can be taken back in a file that only grows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localmoe.errors import CheckpointError, UsageError
from localmoe.files import shown
from localmoe.prompt import Effort, Thinking
from localmoe.sampler import SamplingParams
from localmoe.session import Session, common_prefix
from localmoe.snapshot import prefix_digests

_ROLES = ("system", "user", "assistant", "tool", "latest_reminder")
_TITLE = 60


@dataclass
class Conversation:
    """messages: OpenAI-style, a system text first if there is one. params: the fields of SamplingParams that are set.

    title: the first question's beginning, unless it is given. created, updated: seconds since 1970.
    notices: sentences for the user about what loading it had to leave out."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    thinking: Thinking = "off"
    effort: Effort | None = None
    params: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    session: Session | None = None
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    notices: tuple[str, ...] = ()
    # Where it was loaded from or last saved to, and what was there: (name, tail of the transcript).
    saved_as: tuple[str, str] | None = None

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    def sampling(self) -> SamplingParams:
        """Raises UsageError if params are not those of SamplingParams."""
        try:
            return SamplingParams(**self.params)
        except (TypeError, ValueError, OverflowError) as cause:
            raise UsageError(f"the sampling parameters are wrong: {shown(cause)}") from None


@dataclass(frozen=True)
class Point:
    """Where the engine session was when a line was written: its tokens' number and digest, and how many messages."""

    tokens: int
    digest: str
    messages: int
    thinking: Thinking
    effort: Effort | None


def line_of(conversation: Conversation, before: Conversation | None) -> dict[str, Any]:
    """The line that makes what is saved (None: nothing) this conversation. Raises UsageError if it cannot be saved."""
    messages = plain(conversation.messages)
    keep = common_prefix(before.messages, messages) if before else 0  # type: ignore[arg-type]
    line = {"keep": keep, "messages": messages[keep:], "title": conversation.title or title_of(messages)}
    line |= {"thinking": conversation.thinking, "effort": conversation.effort, "params": plain(conversation.params)}
    line |= {"created": conversation.created, "updated": time.time(), "tokens": None, "ids": None}
    session = conversation.session
    if session is not None:
        line |= {"tokens": session.length, "ids": prefix_digests(session.ids, [session.length])[session.length]}
    try:
        from_lines([line | {"keep": 0, "messages": messages}], "the conversation")
    except CheckpointError as problem:
        raise UsageError(str(problem)) from None
    return line


def from_lines(lines: Sequence[dict[str, Any]], source: str) -> tuple[Conversation, list[Point]]:
    """The conversation after the last line, and the points of its session that are still a part of it.

    Raises CheckpointError naming `source` if they are not what line_of() gives."""
    messages: list[dict[str, Any]] = []
    points: list[Point] = []
    last: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        problem = _problem(line, len(messages))
        if problem is not None:
            raise CheckpointError(f"{source}: line {number} has {problem}; it is not a transcript of this version")
        keep, last = line["keep"], line
        messages = [*messages[:keep], *line["messages"]]
        points = [point for point in points if point.messages <= keep]
        if line["tokens"] is not None:
            points.append(Point(line["tokens"], line["ids"], len(messages), line["thinking"], line["effort"]))
    conversation = Conversation(messages)
    for name in ("thinking", "effort", "params", "title", "created", "updated") if last else ():
        setattr(conversation, name, last[name])
    try:
        conversation.sampling()
    except UsageError as problem:
        raise CheckpointError(f"{source}: {problem}") from None
    return conversation, points


def plain(value: Any) -> Any:
    """As JSON gives it back. Raises UsageError for what JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as cause:
        raise UsageError(f"the conversation cannot be saved: {shown(cause)}") from None
    return json.loads(text)


def title_of(messages: Sequence[dict[str, Any]]) -> str:
    """The beginning of the first question, on one line."""
    first = next((m.get("content") for m in messages if m.get("role") == "user"), None)
    return " ".join(first.split())[:_TITLE] if isinstance(first, str) else ""


def _problem(line: dict[str, Any], count: int) -> str | None:
    """What is wrong with a line that follows `count` messages."""
    digest, tokens = line.get("ids"), line.get("tokens")
    both = type(tokens) is int and tokens >= 0 and isinstance(digest, str)
    checks = {
        "keep": type(line.get("keep")) is int and 0 <= line["keep"] <= count,
        "messages": isinstance(line.get("messages"), list) and all(map(_is_message, line["messages"])),
        "title": isinstance(line.get("title"), str),
        "thinking": line.get("thinking") in ("off", "on"),
        "effort": line.get("effort", "") in (None, "low", "high", "max"),
        "params": isinstance(line.get("params"), dict),
        "created": _is_time(line.get("created")),
        "updated": _is_time(line.get("updated")),
        "tokens": both or (tokens is None and digest is None),
    }
    wrong = next((name for name, right in checks.items() if not right), None)
    return None if wrong is None else f"{wrong} {shown(line.get(wrong))}"


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        return False
    return all(message.get(name) is None or isinstance(message[name], str) for name in ("content", "reasoning_content"))


def _is_time(value: Any) -> bool:
    # Up to the year 9999, so that it can be shown.
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 253_370_764_800
