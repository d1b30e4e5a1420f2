"""What a reply yields while it is made, and what it was when it is done. Plain data, shared by API, chat and CLI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from localmoe.sampler import Sample

FinishReason = Literal["stop", "length", "cancelled", "error"]
TextKind = Literal["reasoning", "answer", "tool_call"]


@dataclass(frozen=True)
class Progress:
    """Prompt tokens computed so far; `done` counts those reused from the session."""

    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """Text that can be shown. samples: the tokens drawn since the last Text; their text may come later or in part."""

    kind: TextKind
    text: str
    samples: tuple[Sample, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(sample.id for sample in self.samples)


@dataclass(frozen=True)
class Stats:
    """Counts in tokens, times in seconds. reused_tokens of the prompt were already in the session."""

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_s(self) -> float:
        """Without the first token, which the prefill gave."""
        return rate(max(self.generated_tokens - 1, 0), self.decode_seconds)


def rate(count: int, seconds: float) -> float:
    """count / seconds, 0 when nothing was timed."""
    return count / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished reply. text is the answer alone; token_ids and logprobs (when asked for) cover the whole reply.

    message: the reply as an assistant message to append to a conversation. seed: the one drawn with, given or not."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    tool_calls: tuple[dict[str, Any], ...]
    finish_reason: FinishReason
    error: str | None
    logprobs: tuple[Sample, ...] | None
    stats: Stats
    message: dict[str, Any]
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a reply."""

    completion: Completion


Event = Progress | Text | Finished
