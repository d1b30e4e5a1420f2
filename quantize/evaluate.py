"""How far one model's predictions are from another's on a text, beside how far a model is from itself.

Knows token ids and logits. The first model's distributions wait in a file without a name, so that only one model is in
memory at a time: 4 bytes for each token of the text and of the vocabulary."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localmoe.api import LLM
from localmoe.device import free_disk
from localmoe.errors import ResourceError, UsageError
from localmoe.files import shown, sized

Open = Callable[[], LLM]
Report = Callable[[str], None]
# Tokens whose logits are in memory at once; and for the second run of the same model, so that it adds up in another
# order: what remains between the two is the noise of floating point.
_CHUNK, _OTHER_CHUNK = 128, 96


@dataclass(frozen=True)
class Compared:
    """Of a model against another on the same tokens. perplexity: of the model itself.

    mean_kl, high_kl: divergence of its distribution from the other's, in nats, the mean and the 99.9 percentile;
    agreement: share of tokens for which both think the same token likeliest."""

    tokens: int
    perplexity: float
    mean_kl: float
    high_kl: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """perplexity: of the source. noise: the source against itself, computed in another order."""

    perplexity: float
    noise: Compared
    found: Compared


def evaluate(source: Open, model: Open, ids: Sequence[int], folder: Path, report: Report) -> Evaluation:
    """Compare a model with its source on a text. folder: where the source's distributions may wait.

    Raises UsageError for a text of fewer than two tokens or vocabularies that differ, ResourceError without room."""
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, expected at least 2")
    llm = source()
    size = llm.config.vocab_size
    nbytes = 4 * size * (len(ids) - 1)
    free = free_disk(folder)
    if free is not None and free < nbytes + (64 << 20):
        raise ResourceError(
            f"{shown(folder)}: {sized(nbytes)} are needed and {sized(free)} are free; "
            "take fewer --tokens, or name another folder with --tmp"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        kept = np.memmap(file, np.float32, "w+", shape=(len(ids) - 1, size))
        loss = 0.0
        for at, log_p in _distributions(llm, ids, _CHUNK, "reading with the source", report):
            kept[at : at + len(log_p)] = log_p.numpy()
            loss -= float(_of_next(log_p, ids, at).sum())
        noise = _compare(llm, ids, kept, _OTHER_CHUNK, "reading with the source again", report)
        llm.close()
        del llm
        other = model()
        if other.config.vocab_size != size:
            raise UsageError(f"the models have {size} and {other.config.vocab_size} tokens; they cannot be compared")
        found = _compare(other, ids, kept, _CHUNK, "reading with the model", report)
        other.close()
    return Evaluation(math.exp(loss / (len(ids) - 1)), noise, found)


def _distributions(llm: LLM, ids: Sequence[int], size: int, doing: str, report: Report) -> Iterator[tuple[int, Tensor]]:
    """(position, log-probabilities [n, V] float32) of what follows each token but the last."""
    session = llm.session()
    for at in range(0, len(ids) - 1, size):
        report(f"{doing}: token {at:,} of {len(ids):,}")
        chunk = ids[at : min(at + size, len(ids) - 1)]
        yield at, llm.engine.advance([(session, chunk)], all_logits=True).logits.float().log_softmax(-1)


def _of_next(log_p: Tensor, ids: Sequence[int], at: int) -> Tensor:
    following = torch.tensor(ids[at + 1 : at + 1 + len(log_p)])
    return log_p.gather(1, following[:, None])[:, 0].double()


def _compare(
    llm: LLM, ids: Sequence[int], kept: np.memmap[tuple[int, int], np.dtype[np.float32]], size: int, doing: str,
    report: Report,
) -> Compared:  # fmt: skip
    divergences, same, loss = [], 0, 0.0
    for at, log_q in _distributions(llm, ids, size, doing, report):
        log_p = torch.from_numpy(np.array(kept[at : at + len(log_q)]))
        divergences.append((log_p.exp() * (log_p - log_q)).double().sum(-1).clamp(min=0))
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        loss -= float(_of_next(log_q, ids, at).sum())
    kl, count = torch.cat(divergences), len(ids) - 1
    return Compared(count, math.exp(loss / count), float(kl.mean()), float(kl.quantile(0.999)), same / count)
