"""One request on its way: its replies as they are finished, and the body of the response once all are.

Knows OpenAI's responses; does not know the output file. Memory: the replies of one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from localmoe.api import LLM
from localmoe.batch import logprobs
from localmoe.batch.request import Request, derived_seed
from localmoe.batch.scored import read_scored
from localmoe.batch.tools import calls_of
from localmoe.events import Completion, Stats
from localmoe.prepared import Prepared
from localmoe.reply_request import ReplyRequest
from localmoe.sampler import Sample, SamplingParams
from localmoe.scheduler import Start
from localmoe.shared_prefixes import SharedPrefixes


@dataclass
class Answer:
    """params: of the first reply; digest: of all that decides the response. shared: where what other prompts begin with
    can be had. scores: of each prompt, if asked for. As OpenAI numbers replies, those to a prompt stand together."""

    llm: LLM
    request: Request
    params: SamplingParams
    digest: str
    shared: SharedPrefixes | None = None
    scores: dict[int, list[Sample | int]] = field(default_factory=dict)
    completions: dict[int, Completion] = field(default_factory=dict)

    def starts(self) -> Iterator[Start]:
        """How each reply begins. Raises UsageError before the first if the request cannot be answered."""
        for number, prepared in enumerate(self._prepared()):
            for index in range(number * self.request.shape.choices, (number + 1) * self.request.shape.choices):
                yield self._start(prepared, index)

    @property
    def complete(self) -> bool:
        return len(self.completions) == self.request.replies

    @property
    def ordered(self) -> list[Completion]:
        return [self.completions[index] for index in sorted(self.completions)]

    @property
    def error(self) -> str | None:
        """Of the first reply that failed."""
        return next((str(c.error) for c in self.ordered if c.finish_reason == "error"), None)

    @property
    def generated_tokens(self) -> int:
        return 0 if self.request.shape.silent else sum(len(c.token_ids) for c in self.completions.values())

    @property
    def prompts(self) -> list[Stats]:
        """The first reply to each prompt, whose counts of prompt tokens are the prompt's."""
        return [self.completions[at].stats for at in range(0, self.request.replies, self.request.shape.choices)]

    def body(self, created: int) -> dict[str, Any]:
        """The response, of replies that did not fail."""
        chat, prompt = not self.request.prompts, sum(stats.prompt_tokens for stats in self.prompts)
        choice = self._chat_choice if chat else self._text_choice
        return {
            "id": f"chatcmpl-{self.digest[:24]}" if chat else f"cmpl-{self.digest[:24]}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": self.llm.name,
            "choices": [{"index": index, **choice(index, reply)} for index, reply in enumerate(self.ordered)],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": self.generated_tokens,
                "total_tokens": prompt + self.generated_tokens,
            },
        }

    def _prepared(self) -> list[Prepared]:
        request, llm = self.request, self.llm
        if request.prompts:
            return [llm.prepare(prompt) for prompt in request.prompts]
        return [
            llm.prepare_chat(
                request.messages,
                thinking=request.thinking,
                effort=request.effort,
                tools=request.tools,
                constraint=self.params.constraint,
            )
        ]

    def _start(self, prepared: Prepared, index: int) -> Start:
        request, llm = self.request, self.llm
        params = replace(self.params, seed=choice_seed(self.params.seed, index))
        number, again = divmod(index, request.shape.choices)
        start, count = llm.request(prepared, params, shared=self.shared), params.logprobs
        if not request.shape.echo or count is None or again:
            return start

        def scored() -> ReplyRequest | None:
            session, samples = read_scored(llm, prepared.ids, count)
            # The token that is put before a text is not a part of it.
            begun = isinstance(request.prompts[number], str) and prepared.ids[0] == llm.tokenizer.bos_id
            self.scores[number] = [*samples] if begun else [prepared.ids[0], *samples]
            return llm.request(prepared, params, session)()

        return scored

    def _chat_choice(self, index: int, completion: Completion) -> dict[str, Any]:
        found, message, reason = None, completion.message, str(completion.finish_reason)
        if completion.logprobs is not None:
            thinking = "reasoning_content" in message
            found = logprobs.of_chat(self.llm.tokenizer, self._shown(completion), thinking=thinking)
        if completion.tool_calls:
            reply = f"{self.digest}\0{self.request.custom_id}\0{index}"
            message = message | {"tool_calls": list(calls_of(completion.tool_calls, reply))}
            reason = "tool_calls" if reason == "stop" else reason
        return {"message": message, "logprobs": found, "finish_reason": reason}

    def _text_choice(self, index: int, completion: Completion) -> dict[str, Any]:
        shape, found = self.request.shape, None
        text = "" if shape.silent else completion.text
        number = index // shape.choices
        if shape.echo:
            prompt = self.request.prompts[number]
            text = (prompt if isinstance(prompt, str) else self.llm.tokenizer.decode(prompt)) + text
        if completion.logprobs is not None:
            drawn = [] if shape.silent else self._shown(completion)
            found = logprobs.of_text(self.llm.tokenizer, [*self.scores.get(number, ()), *drawn])
        reason = "length" if shape.silent else completion.finish_reason
        return {"text": text, "logprobs": found, "finish_reason": reason}

    def _shown(self, completion: Completion) -> Sequence[Sample]:
        """Without the token that ended the reply, which is no part of its text."""
        samples, llm = completion.logprobs or (), self.llm
        ends = {*self.params.stop_token_ids, *llm.config.eos_token_ids}
        if not self.request.prompts:
            ends |= llm.chat_format.turn_end_ids
        ended = completion.finish_reason == "stop" and samples and samples[-1].id in ends
        return samples[:-1] if ended else samples


def choice_seed(seed: int | None, index: int) -> int:
    """What reply `index` to a request draws with: the first with the request's own seed, so n changes nothing of it."""
    assert seed is not None, "a request of a batch has a seed"
    return derived_seed(seed, index) if index else seed
