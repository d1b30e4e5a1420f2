"""Which tokens a constrained reply may go on with.

`Guides` compiles a constraint once for a vocabulary; a `Guide` is one reply's way through it, which nothing beside that
reply changes. Knows token ids and bytes; does not know logits. Memory: the last few compiled constraints.
Time: some 10 microseconds to a few milliseconds per token, by the constraint and the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmoe.constraint import Constraint, compiled
from localmoe.errors import GenerationError, UsageError
from localmoe.files import shown
from localmoe.reply import THINK_END, THINK_START, Stage
from localmoe.tokenizer import Tokenizer

_MOST_COMPILED = 256


class Guides:
    """The constraints of one model. vocab_size: the length of its logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.compiled: Callable[[Constraint], Any] = functools.lru_cache(_MOST_COMPILED)(self._compile)

    def start(self, constraint: Constraint, begins_in: Stage = "answer") -> Callable[[Iterable[int]], Guide]:
        """How a reply begins, given the tokens that end it. begins_in: where its prompt ends; reasoning is free.

        Raises UsageError if the constraint cannot be compiled, or if no token says where the reasoning ends."""
        matcher = self.compiled(constraint)
        opens, closes = map(self._tokenizer.token_id, (THINK_START, THINK_END))
        if begins_in == "reasoning" and closes is None:
            raise UsageError(
                f"this model has no token {THINK_END}, after which the constraint would hold; do not think"
            )
        awaited = closes if begins_in == "reasoning" else None
        optional = opens if begins_in == "undecided" and closes is not None else None
        return lambda ends: Guide(matcher.deep_copy(), self._plain, ends, awaited, (optional, closes))

    @functools.cached_property
    def _plain(self) -> Tensor:
        """[vocab] bool: what is no control token; a grammar can name those, but not ask for them."""
        plain = torch.ones(self._vocab_size, dtype=torch.bool)
        plain[sorted(self._tokenizer.control_ids)] = False
        return plain

    @functools.cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Spelled(self._tokenizer, self._vocab_size)), n_vocab=self._vocab_size + 1)

    def _compile(self, constraint: Constraint) -> Any:
        return compiled(constraint, self._tokens)


class Guide:
    """One reply's way through a constraint: ask allowed(), then tell take() what was drawn."""

    def __init__(
        self, matcher: Any, plain: Tensor, ends: Iterable[int], awaited: int | None, optional: tuple[int | None, ...]
    ) -> None:
        """matcher: this reply's own. ends: tokens that end it. awaited: the constraint holds after this token; None is
        from the start. optional: a token that may come first instead, and the one that it makes awaited."""
        self._matcher, self._plain, self._ends = matcher, plain, sorted(ends)
        self._awaited, self._optional = awaited, optional

    @property
    def complete(self) -> bool:
        """Whether the constraint is met and allows nothing more."""
        return bool(self._awaited is None and self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self) -> Tensor:
        """[vocab] bool: the tokens that may come next; those that end the reply only where the constraint is met.

        Raises GenerationError if there is none, or if the constraint has become too complex to follow."""
        if self._awaited is not None:
            allowed = torch.ones_like(self._plain)
            allowed[self._ends] = False
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            problem = " ".join(self._matcher.get_error().split())
            raise GenerationError(f"the constraint can no longer be followed: {shown(problem, 300)}")
        found = np.unpackbits(bits, bitorder="little")[: len(self._plain)]
        allowed = torch.from_numpy(found).bool() & self._plain
        if self._matcher.is_accepting():
            allowed[self._ends] = True
        if self._optional[0] is not None:
            allowed[self._optional[0]] = True
        if not allowed.any():
            raise GenerationError("the constraint allows no token here, and is not met; it asks for control tokens")
        return allowed

    def take(self, token: int) -> None:
        """The reply goes on with this token, one of the allowed that does not end it."""
        first, awaited = self._optional
        self._optional = None, None
        if self._awaited is not None:
            self._awaited = None if token == self._awaited else self._awaited
        elif first is not None and token == first:
            self._awaited = awaited
        else:
            self._matcher.consume_token(token)


class _Spelled:
    """A vocabulary as llguidance wants it. Its end is one id beyond: which of ours end a reply is not its concern."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._encode = tokenizer.encode
        self.bos_token_id = None
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(tokenizer.control_ids), vocab_size]
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())
