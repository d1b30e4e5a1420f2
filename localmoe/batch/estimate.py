"""How many tokens a batch is, before any model is loaded. Knows requests and a tokenizer. Memory: one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from localmoe.batch.request import Refused, Request
from localmoe.chat_format import Render
from localmoe.sampler import SamplingParams
from localmoe.tokenizer import Tokenizer


@dataclass
class Estimate:
    """prompt_tokens: as the model would read them, each prompt once. reply_tokens: at most, of those that say how many;
    open_ended: replies that do not, which only the context ends."""

    requests: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    open_ended: int = 0


def estimate(
    requests: Iterable[Request | Refused],
    renderer: Callable[[], Render],
    tokenizer: Tokenizer,
    defaults: SamplingParams,
) -> Estimate:
    """Of the requests that are none of the refused. renderer: asked once there are messages. defaults: what is taken
    where a request says nothing."""
    found = Estimate()
    for request in requests:
        if isinstance(request, Refused):
            continue
        params = request.params(defaults, 0)
        found.requests += 1
        found.prompt_tokens += _prompt_tokens(request, renderer, tokenizer, params)
        found.replies += request.replies
        if params.max_tokens is None:
            found.open_ended += request.replies
        else:
            found.reply_tokens += request.replies * params.max_tokens
    return found


def _prompt_tokens(
    request: Request, renderer: Callable[[], Render], tokenizer: Tokenizer, params: SamplingParams
) -> int:
    if request.prompts:
        return sum(len(tokenizer.text_ids(one) if isinstance(one, str) else one) for one in request.prompts)
    return len(request.rendered(renderer(), params.constraint).ids(tokenizer))
