"""Log-probabilities as OpenAI writes them: a list of tokens in chats, four lists side by side in completions.

Knows samples and their bytes; a probability of 0 is null, for JSON has no infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from localmoe.reply import THINK_END, THINK_START
from localmoe.sampler import Sample
from localmoe.tokenizer import StreamDecoder, Tokenizer


def of_chat(tokenizer: Tokenizer, samples: Sequence[Sample], *, thinking: bool) -> dict[str, Any]:
    """samples: those of a reply without its end. thinking: whether it begins with reasoning, which is told apart.

    Calls of tools are in the content, as the model wrote them."""
    marks = {tokenizer.token_id(mark) for mark in (THINK_START, THINK_END)}
    closed = next((at for at, sample in enumerate(samples) if sample.id == tokenizer.token_id(THINK_END)), len(samples))
    parts = {"content": samples[closed:] if thinking else samples}
    if thinking:
        parts["reasoning_content"] = samples[:closed]
    return {
        name: [_entry(tokenizer, sample) for sample in part if sample.id not in marks] for name, part in parts.items()
    }


def of_text(tokenizer: Tokenizer, samples: Sequence[Sample | int]) -> dict[str, Any]:
    """samples: an id alone is the first token of all, before which there is nothing that could foresee it."""
    decoder, offset = StreamDecoder(tokenizer), 0
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for sample in samples:
        token = sample if isinstance(sample, int) else sample.id
        found["tokens"].append(_name(tokenizer, token))
        found["text_offset"].append(offset)
        offset += len(decoder.push(token))
        if isinstance(sample, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
        else:
            found["token_logprobs"].append(_finite(sample.logprob))
            found["top_logprobs"].append({_name(tokenizer, id): _finite(value) for id, value in sample.top})
    return found


def _entry(tokenizer: Tokenizer, sample: Sample) -> dict[str, Any]:
    top = [_token(tokenizer, id, logprob) for id, logprob in sample.top]
    return _token(tokenizer, sample.id, sample.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Its text; of a token that is a part of a character, its bytes as OpenAI spells them, so that names differ."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
