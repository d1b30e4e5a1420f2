"""A prompt that is ready to be asked: rendered and tokenized once, for any number of replies. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmoe.constraint import Constraint
from localmoe.prompt import RenderedPrompt
from localmoe.reply import ReplyParser, Stage
from localmoe.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """ids: the tokens. end_ids: those that end a reply. rendered, of messages: None if a text is continued without a
    chat format. constraint: what the model is told of in the prompt, if that says anything of one."""

    ids: Sequence[int]
    end_ids: frozenset[int]
    rendered: RenderedPrompt | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    constraint: Constraint | None = None

    @property
    def begins_in(self) -> Stage:
        return "answer" if self.rendered is None else self.rendered.begins_in

    def parser(self) -> ReplyParser | None:
        """Of one reply; None if all of it is text."""
        return None if self.rendered is None else self.rendered.parser()

    def marks_at(self, tokenizer: Tokenizer) -> list[int]:
        """Lengths at which a conversation's session is marked, ascending: where another question, or another reply, can
        begin."""
        if self.rendered is None:
            return []
        # The last token is computed again for another reply to the same prompt, which needs its logits; and after
        # reasoning, which the next turn leaves out, it will be another.
        marks = (self.rendered.question_at(self.messages, len(self.ids), tokenizer), len(self.ids) - 1)
        return [mark for mark in marks if mark]
