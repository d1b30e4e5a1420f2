"""What a request wants to be told: how many replies, the prompt before them, the probabilities of tokens.

Knows OpenAI's fields of both endpoints, which differ; does not know how they are answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localmoe.errors import UsageError
from localmoe.files import shown

FIELDS = frozenset({"n", "echo", "logprobs", "top_logprobs"})

MOST_CHOICES = 128
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Shape:
    """choices: replies to the one prompt. echo: the prompt stands before each. silent: the prompt alone."""

    choices: int = 1
    echo: bool = False
    silent: bool = False


def shape_of(body: dict[str, Any], raw: bool) -> tuple[Shape, dict[str, Any]]:
    """The shape, and the fields of SamplingParams that go with it. raw: a text is continued.

    Raises UsageError for values that the endpoint does not have."""
    logprobs = _logprobs_of_text(body) if raw else _logprobs_of_chat(body)
    own: dict[str, Any] = {} if logprobs is None else {"logprobs": logprobs}
    echo = body.get("echo", False)
    if not isinstance(echo, bool) or (echo and not raw):
        raise UsageError(f"echo is {shown(echo)}, expected true or false, and true for /v1/completions only")
    silent = echo and body.get("max_tokens") == 0 and body.get("max_tokens") is not False
    if silent:
        # A reply has a token at least; this one is not shown.
        own["max_tokens"] = 1
    return Shape(_count("n", body.get("n", 1), 1, MOST_CHOICES), echo, silent), own


def _logprobs_of_chat(body: dict[str, Any]) -> int | None:
    wanted, top = body.get("logprobs", False), body.get("top_logprobs")
    if not isinstance(wanted, bool) or (top is not None and not wanted):
        raise UsageError(f"logprobs is {shown(wanted)}, expected true or false, and true beside top_logprobs")
    if not wanted:
        return None
    return 0 if top is None else _count("top_logprobs", top, 0, MOST_LOGPROBS)


def _logprobs_of_text(body: dict[str, Any]) -> int | None:
    wanted = body.get("logprobs")
    if "top_logprobs" in body:
        raise UsageError("top_logprobs is of /v1/chat/completions; logprobs is the number in /v1/completions")
    return None if wanted is None or wanted is False else _count("logprobs", wanted, 0, MOST_LOGPROBS)


def _count(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{name} is {shown(value)}, expected an integer from {low} to {high}")
    return value
