"""Logits to one token: what may be chosen, how it is drawn, and with what probability the model meant it.

Knows numbers and token ids; does not know text or models. One Sampler belongs to one sequence and draws one uniform
number per token from its own generator, so neither batch mates nor filters shift what a seed gives.
Time: a few passes over the vocabulary, and one sort if top_k or top_p is set."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from localmoe.constraint import Constraint
from localmoe.errors import GenerationError, UsageError
from localmoe.files import shown


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to end. The order is fixed: repetition penalty, temperature, top-k, top-p, min-p.

    temperature: 0 takes the likeliest token. top_k: keep that many of the likeliest, 0 is all.
    top_p: of those, the fewest whose probabilities reach it. min_p: of those, drop what is below min_p times the best.
    repetition_penalty: divides positive and multiplies negative logits of tokens already in prompt or reply.
    seed: None draws a fresh one. max_tokens: None is up to the context. stop: texts that end the reply, not shown.
    stop_token_ids: tokens that end it. logprobs: None, or how many of the likeliest tokens to report with each.
    constraint: what the answer must look like; only tokens that keep to it are drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        """Raises UsageError naming the parameter, its value and what was expected."""
        # A single string or a list is accepted, as elsewhere in the field.
        given: Any = self.stop
        stop = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_number("temperature", self.temperature, lambda t: t >= 0, "a number of at least 0")
        _check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
        _check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number from 0 to 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "a number above 0")
        _check_count("top_k", self.top_k, 0)
        for name, low in (("seed", 0), ("max_tokens", 1), ("logprobs", 0)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), low)
        for token in self.stop_token_ids:
            _check_count("stop_token_ids", token, 0)
        if not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop is {shown(list(map(str, stop)))}, expected texts of at least one character")


@dataclass(frozen=True)
class Sample:
    """A chosen token. logprob and top are of the model's own distribution, before constraint, penalty and the rest.

    top: (id, logprob) of the likeliest tokens, best first; empty unless SamplingParams.logprobs asks for it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The random state of one sequence. seed: the one in use, to repeat a run that was not given one."""

    def __init__(self, params: SamplingParams) -> None:
        self.seed = params.seed if params.seed is not None else random.SystemRandom().getrandbits(63)
        self._params = params
        self._random = random.Random(self.seed)
        self._seen: torch.Tensor | None = None
        self._num_seen = 0

    def pick(self, logits: torch.Tensor, history: Sequence[int], allowed: torch.Tensor | None = None) -> Sample:
        """Choose the next token.

        logits: [V] float32; -inf bars a token. history: prompt and reply so far, which only grows between calls; it is
        read only if there is a repetition penalty. allowed: [V] bool, the tokens to choose from; None is all.
        Ties at temperature 0 and at the top-k border go to the smaller id.
        Raises GenerationError if the logits hold NaN or +inf, or bar every token."""
        logits = logits.float()
        _refuse_unusable(logits)
        logprobs = torch.log_softmax(logits, 0)
        scores = self._penalised(logits, history)
        if allowed is not None:
            scores = scores.where(allowed.to(scores.device), -math.inf)
        best = scores.max()
        if not math.isfinite(best):
            raise GenerationError(
                f"the best logit is {best} after repetition penalty and constraint; use a penalty closer to 1"
            )
        token = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores - best)
        return Sample(token, float(logprobs[token]), likeliest(logprobs, self._params.logprobs or 0))

    def _penalised(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        penalty = self._params.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        # Only what is new since the last call: a long prompt is not read again for each token.
        new = torch.tensor(history[self._num_seen :], dtype=torch.int64, device=logits.device)
        self._seen[new] = True
        self._num_seen = len(history)
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _draw(self, scores: torch.Tensor) -> int:
        """scores: [V], the largest is 0. Inverse transform over the kept tokens in the order of their ids."""
        # In double precision the rounding of a running sum over 129,280 tokens does not reach any probability.
        probabilities = torch.softmax(scores.double() / self._params.temperature, 0)
        cumulative = probabilities.where(_kept(probabilities, self._params), 0.0).cumsum(0)
        threshold = self._random.random() * cumulative[-1]
        return int(torch.searchsorted(cumulative, threshold, right=True))


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(id, logprob) of so many tokens, best first. logprobs: [V]."""
    values, ids = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _kept(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens survive top-k, top-p and min-p. probabilities: [V] float64, their sum is 1. Returns [V] bool."""
    above_min = probabilities >= params.min_p * probabilities.max()
    size = len(probabilities)
    top_k = params.top_k if 0 < params.top_k < size else size
    if top_k == size and params.top_p == 1:
        return above_min
    # Sorting is the dear part, so leave out what cannot be kept: the tokens below 1/size of what top_p leaves out do
    # not add up to it. Half of that, to be clear of rounding.
    border = probabilities.topk(top_k).values[-1] if top_k < size else (1 - params.top_p) / (2 * size)
    ids = (probabilities >= border).nonzero().squeeze(1)
    # Stable, so that ties keep the smaller id.
    ordered, order = probabilities[ids].sort(descending=True, stable=True)
    ordered = ordered[:top_k]
    reached = ordered.cumsum(0) - ordered
    # A token is kept if those before it do not reach top_p: the first always, the one that reaches it too.
    chosen = reached < params.top_p * (ordered.sum() if top_k < size else 1.0)
    kept = torch.zeros_like(above_min)
    kept[ids[order[:top_k][chosen]]] = True
    return kept & above_min


def _refuse_unusable(logits: torch.Tensor) -> None:
    # The largest is NaN if any of them is.
    if math.isfinite(logits.max()):
        return
    nan, inf = int(logits.isnan().sum()), int(logits.isposinf().sum())
    what = f"{nan} NaN and {inf} +inf" if nan or inf else "only -inf"
    raise GenerationError(f"the logits of {len(logits)} tokens hold {what}; expected at least one finite, none above")


def _check_number(name: str, value: float, allowed: Callable[[float], bool], expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not allowed(value):
        raise UsageError(f"{name} is {shown(value)}, expected {expected}")


def _check_count(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name} is {shown(value)}, expected an integer of at least {low}")
