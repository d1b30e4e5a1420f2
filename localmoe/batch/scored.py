"""A prompt read with the probability of each of its tokens: what `echo` with `logprobs` asks for.

Knows sessions and logits. It is read alone, in pieces of a fixed size, so nothing beside it changes a bit.
Memory: the logits of one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from localmoe.api import LLM
from localmoe.sampler import Sample, likeliest
from localmoe.session import Session

# Logits of so many tokens are 66 MB for a vocabulary of 129,280.
_PIECE = 128


def read_scored(llm: LLM, ids: Sequence[int], count: int) -> tuple[Session, list[Sample]]:
    """A session that has read all but the last of ids, and a sample of each but the first.

    count: how many of the likeliest tokens to report with each."""
    session, samples = llm.session(), list[Sample]()
    for at in range(0, len(ids) - 1, _PIECE):
        piece = ids[at : min(at + _PIECE, len(ids) - 1)]
        rows = torch.log_softmax(llm.engine.advance([(session, piece)], all_logits=True).logits.float(), 1)
        for row, token in zip(rows, ids[at + 1 :], strict=False):
            samples.append(Sample(token, float(row[token]), likeliest(row, count)))
    return session, samples
