"""How long a batch will take: as the last run of its output went or, before there is one, as `localmoe plan` says.

Knows counts, and the arithmetic of plans; measures nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from localmoe.batch.estimate import Estimate
from localmoe.errors import ResourceError
from localmoe.models.sizes import ModelSizes
from localmoe.placement import Budget
from localmoe.plan import Rates, plan


@dataclass(frozen=True)
class Pace:
    """So many requests in so many seconds. planned: predicted, if every reply is as long as it may be."""

    requests: int
    seconds: float
    planned: bool = False

    def seconds_of(self, requests: int) -> float:
        return requests * self.seconds / self.requests

    def fact(self) -> list[float]:
        """As JSON, for measured()."""
        return [self.requests, self.seconds]


def measured(fact: Any) -> Pace | None:
    """The pace that an earlier run noted; None for nothing, or for anything else."""
    match fact:
        case [int(requests), float(seconds)] if requests > 0 and 0 < seconds < math.inf:
            return Pace(requests, seconds)
    return None


def planned(found: Estimate, sizes: ModelSizes, rates: Rates, ram: int, most: int) -> Pace | None:
    """What these rates allow in so many bytes of RAM, with the number of replies at once, at most `most`, that is best.

    Prompts are counted whole, whatever they have in common. None if nothing says how long replies are, or if the model
    does not fit."""
    if found.open_ended or not found.replies:
        return None
    # Of a reply and its prompt, in the mean.
    context = min(max((found.prompt_tokens + found.reply_tokens) // found.replies, 2), sizes.context)
    seconds = math.inf
    for replies in (2**power for power in range(most.bit_length())):
        try:
            plan_ = plan(sizes, Budget(ram, context=context, batch=replies), rates)
        except ResourceError:
            break
        prefill, decode = plan_.prefill.tokens_per_s, plan_.decode.tokens_per_s
        seconds = min(seconds, found.prompt_tokens / prefill + found.reply_tokens / decode)
    return None if seconds == math.inf else Pace(found.requests, seconds, planned=True)
