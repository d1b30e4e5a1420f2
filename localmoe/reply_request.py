"""One reply in the making: prompt chunks in, logits in, text out. Pure bookkeeping around a session.

Knows tokens, text and limits; does not run the model and does not know other requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from localmoe.errors import GenerationError, UsageError
from localmoe.events import Completion, Event, FinishReason, Progress, Stats, Text
from localmoe.guide import Guide
from localmoe.reply import Piece, ReplyParser
from localmoe.sampler import Sample, Sampler, SamplingParams
from localmoe.session import Session
from localmoe.step import Fault
from localmoe.tokenizer import StopMatcher, StreamDecoder, Tokenizer

# A mark within a prompt costs a step of its own; reading so few tokens again would hardly cost more.
WORTH_A_STEP = 32


class ReplyRequest:
    """Feed it with next_chunk() / accept() in turn until finish_reason is set, then ask for completion().

    parser None means a raw continuation: all text is answer. marks_at: ascending lengths of the prompt's beginning that
    other prompts will share, where the session is marked; all of them if there are none. guide: given the tokens that
    end the reply, says which may come next; None is all."""

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        context: int,
        end_ids: frozenset[int],
        parser: ReplyParser | None,
        marks_at: Sequence[int] = (),
        guide: Callable[[Iterable[int]], Guide] | None = None,
    ) -> None:
        check_room(len(prompt), params.max_tokens, context)
        self.session, self.params = session, params
        self._prompt = list(prompt)
        self._limit = min(params.max_tokens or context, context - len(prompt))
        self._ends = end_ids | frozenset(params.stop_token_ids)
        self._sampler = Sampler(params)
        self._guide = guide(self._ends) if guide else None
        self._decoder, self._matcher, self._parser = StreamDecoder(tokenizer), StopMatcher(params.stop), parser
        self._started = time.monotonic()
        self._prefilled = self._first = self._last = 0.0
        self._reused = session.begin(prompt)
        *before, last = marks_at or (len(prompt),)
        self._marks_at = [*(at for at in before if at >= self._reused + WORTH_A_STEP), last]
        self._turn = session.turn
        self._samples: list[Sample] = []
        # Prompt and reply so far, for the repetition penalty.
        self._history = list(prompt)
        self._shown = 0
        self._raw: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    @property
    def prompt(self) -> Sequence[int]:
        return self._prompt

    @property
    def prefilling(self) -> bool:
        return self.unread > 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return max(len(self._prompt) - self.session.length, 0)

    def mark_at(self, length: int) -> bool:
        """Mark the session at this length of the prompt, too, when it gets there; False if it will not any more."""
        if self.finish_reason is not None or self.session.length >= length:
            return False
        self._marks_at = sorted({*self._marks_at, length})
        return True

    def next_chunk(self, budget: int) -> list[int]:
        """The tokens to append next: at most `budget` of the prompt, or the last drawn token.

        Raises UsageError if another reply has begun on this session."""
        if self.session.turn != self._turn:
            raise UsageError("another reply has begun on this session; finish one stream before starting the next")
        if not self.prefilling:
            return [self._samples[-1].id]
        at = self.session.length
        stop = next((mark for mark in self._marks_at if mark > at), len(self._prompt))
        return self._prompt[at : min(at + budget, stop)]

    def accept(self, logits: Tensor, fault: Fault | None) -> list[Event]:
        """Take the logits [vocab] that follow the chunk; returns what can be shown now."""
        if fault is not None:
            return self._fail(f"the model's values stopped being finite in {fault}; the weights may be damaged")
        if not self._samples and self.session.length in self._marks_at:
            self.session.mark()
        if self.prefilling:
            return [Progress(self.session.length, len(self._prompt))]
        events: list[Event] = []
        if not self._samples:
            self._prefilled = time.monotonic()
            events.append(Progress(len(self._prompt), len(self._prompt)))
        try:
            allowed = self._guide.allowed() if self._guide else None
            sample = self._sampler.pick(logits, self._history, allowed)
        except GenerationError as problem:
            return events + self._fail(str(problem))
        return events + self._take(sample)

    def cancel(self) -> list[Event]:
        """Stop here and keep what there is."""
        return self._finish("cancelled")

    def completion(self) -> Completion:
        """The finished reply."""
        assert self.finish_reason is not None, "the reply is not finished"
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._raw)}
        if self._parser:
            message = self._parser.message()
        return Completion(
            prompt_tokens=len(self._prompt),
            token_ids=tuple(s.id for s in self._samples),
            text=message["content"],
            reasoning=message.get("reasoning_content", ""),
            tool_calls=tuple(message.get("tool_calls", ())),
            finish_reason=self.finish_reason,
            error=self.error,
            logprobs=tuple(self._samples) if self.params.logprobs is not None else None,
            stats=self._stats(),
            message=message,
            seed=self._sampler.seed,
        )

    def _take(self, sample: Sample) -> list[Event]:
        now = time.monotonic()
        self._first, self._last = self._first or now, now
        self._samples.append(sample)
        self._history.append(sample.id)
        if sample.id in self._ends:
            return self._finish("stop")
        if self._guide:
            self._guide.take(sample.id)
        text, stopped = self._matcher.push(self._decoder.push(sample.id))
        events = self._show(text)
        if stopped is not None or (self._guide and self._guide.complete):
            return events + self._finish("stop")
        if len(self._samples) >= self._limit:
            return events + self._finish("length")
        return events

    def _show(self, text: str) -> list[Event]:
        pieces = self._parser.push(text) if self._parser else self._raw_pieces(text)
        return self._events(pieces)

    def _raw_pieces(self, text: str) -> list[Piece]:
        self._raw.append(text)
        return [Piece("answer", text)] if text else []

    def _events(self, pieces: list[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            fresh, self._shown = tuple(self._samples[self._shown :]), len(self._samples)
            events.append(Text(piece.kind, piece.text, fresh))
        return events

    def _finish(self, reason: FinishReason) -> list[Event]:
        """Let out what was held back (unless a stop string or end token cut it) and close."""
        text, _ = self._matcher.push(self._decoder.flush())
        events = self._show(text + self._matcher.flush())
        if self._parser:
            events += self._events(self._parser.finish())
        self.finish_reason = reason
        return events

    def _fail(self, error: str) -> list[Event]:
        self.error = error
        # Nothing computed from here on could be trusted.
        self.session.torn()
        return self._finish("error")

    def _stats(self) -> Stats:
        prefilled = self._prefilled or time.monotonic()
        return Stats(
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            generated_tokens=len(self._samples),
            prefill_seconds=prefilled - self._started,
            decode_seconds=max(self._last - self._first, 0.0),
            first_token_seconds=self._first - self._started if self._first else 0.0,
        )


def check_room(prompt: int, max_tokens: int | None, context: int) -> None:
    """Raises UsageError with the numbers if a prompt of so many tokens and its reply cannot fit in the context."""
    if prompt == 0:
        raise UsageError("the prompt is empty, expected at least one token")
    need = prompt + (max_tokens or 1)
    if need > context:
        asked = f" and {max_tokens} were asked for" if max_tokens else ""
        raise UsageError(
            f"the prompt has {prompt} tokens{asked}, together {need}; the context holds {context}; "
            "shorten the prompt, lower -n or raise --ctx"
        )
