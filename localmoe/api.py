"""The Python API: LLM and what it returns.

    from localmoe import LLM, SamplingParams
    llm = LLM()                                   # the embedded localmoe-mini; or LLM("path/to/model")
    print(llm.chat([{"role": "user", "content": "Tell me a story."}]).text)

One LLM is one loaded model; it is not thread-safe. Memory: all weights are resident, as packed as in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from localmoe.config import Reader
from localmoe.device import available_memory
from localmoe.engine import Engine, Session
from localmoe.errors import ConfigError, ModelError, ResourceError, UsageError
from localmoe.events import Completion, Event, Finished
from localmoe.files import read_json, shown
from localmoe.loader import Progress as LoadProgress
from localmoe.loader import load_weights
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.prompt import Effort, Thinking, render_chat, turn_end_ids
from localmoe.reply import ReplyParser
from localmoe.reply_request import ReplyRequest, check_room
from localmoe.sampler import SamplingParams
from localmoe.scheduler import run
from localmoe.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "mini" / "weights"
_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_KERNELS = ("auto", "reference")
_KV_FORMATS = ("full", "fp8")
_MIB = 1 << 20

Prompt = str | Sequence[int]


class LLM:
    """A model directory, loaded."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        kernels: Literal["auto", "reference"] = "auto",
        kv_format: Literal["full", "fp8"] = "full",
        context: int | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        """model: a directory in the published layout; None is the embedded localmoe-mini.

        dtype: of activations, plain weights and the KV cache ("auto" is float32). kernels: "reference" computes in
        torch, the only implementation so far, and so what "auto" picks. kv_format "fp8" rounds the latent cache as the
        official code does. context: most tokens of prompt and reply together; None is the model's own limit.
        Raises ModelError (and its children) for a bad directory, ResourceError if it cannot fit in memory."""
        _check_choice("dtype", dtype, tuple(_DTYPES))
        _check_choice("kernels", kernels, _KERNELS)
        _check_choice("kv_format", kv_format, _KV_FORMATS)
        path = EMBEDDED if model is None else Path(model)
        if not path.is_dir():
            raise ModelError(f"{shown(path)} is not a directory; expected one with config.json and safetensors files")
        _check_fits(path)
        self.path = path
        self.name = "localmoe-mini" if model is None else path.resolve().name
        self.config, weights = load_weights(path, _DTYPES[dtype], progress=progress)
        self.tokenizer = Tokenizer.load(path)
        _check_vocabulary(path, self.tokenizer, self.config.vocab_size)
        self.context = _context(context, self.config.max_position_embeddings)
        self.engine = Engine(DeepseekV4(self.config, weights.get, quantize_kv=kv_format == "fp8"))

    def default_params(self) -> SamplingParams:
        """The temperature and top_p of generation_config.json; SamplingParams() when it has none."""
        path = self.path / "generation_config.json"
        if not path.exists():
            return SamplingParams()
        reader = Reader(read_json(path, _MIB, ConfigError), shown(path))
        temperature = reader.optional("temperature", float, 1.0, low=0)
        return SamplingParams(temperature=temperature, top_p=reader.optional("top_p", float, 1.0, low=0, high=1))

    def session(self) -> Session:
        """An empty conversation state. Pass it to successive stream calls to reuse what they have in common."""
        return self.engine.new_session()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Continue a text (BOS is put before it) or token ids (taken as they are), without a chat template.

        Yields Progress, then Text, then one Finished. cancelled is asked before every step."""
        return self._stream(self._raw_request(prompt, params, session), cancelled)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: Thinking = "off",
        effort: Effort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        session: Session | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Reply to OpenAI-style messages. Yields as stream() does; reasoning, answer and tool calls are told apart."""
        request = self._chat_request(messages, params, thinking, effort, tools, session)
        return self._stream(request, cancelled)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue several prompts together, in shared steps; results in the order of the prompts.

        prompts: one text, or a list of texts and token-id lists. With a seed, prompt i draws with seed + i."""
        many: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts  # type: ignore[assignment]
        if any(isinstance(p, int) for p in many):
            raise UsageError("generate() got one list of token ids, expected a list of prompts; wrap it in a list")
        params = params or self.default_params()
        seeds = [None if params.seed is None else params.seed + i for i in range(len(many))]
        starts = [self._raw_request(p, _seeded(params, seed), None) for p, seed in zip(many, seeds, strict=True)]
        done: dict[int, Completion] = {}
        for index, event in run(self.engine, starts):
            if isinstance(event, Finished):
                done[index] = event.completion
        return [done[i] for i in range(len(many))]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: Thinking = "off",
        effort: Effort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """One reply to OpenAI-style messages."""
        *_, last = self.stream_chat(messages, params, thinking=thinking, effort=effort, tools=tools)
        assert isinstance(last, Finished), "a stream ends with Finished"
        return last.completion

    def logits(self, ids: Sequence[int], chunk_size: int | None = None) -> torch.Tensor:
        """Logits [T, vocab] float32 after each of ids, computed from scratch in chunks (one, if chunk_size is None)."""
        if not ids or not all(0 <= i < self.config.vocab_size for i in ids):
            raise UsageError(f"logits() needs one or more token ids from 0 to {self.config.vocab_size - 1}")
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"chunk_size is {chunk_size}, expected at least 1")
        session, size = self.session(), chunk_size or len(ids)
        chunks = [ids[at : at + size] for at in range(0, len(ids), size)]
        return torch.cat([self.engine.advance([(session, chunk)], all_logits=True).logits for chunk in chunks])

    def _stream(self, start: Callable[[], ReplyRequest], cancelled: Callable[[], bool] | None) -> Iterator[Event]:
        for _index, event in run(self.engine, [start], cancelled=cancelled):
            yield event

    def _raw_request(
        self, prompt: Prompt, params: SamplingParams | None, session: Session | None
    ) -> Callable[[], ReplyRequest]:
        if isinstance(prompt, str):
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            ids = [*bos, *self.tokenizer.encode(prompt)]
        else:
            ids = list(prompt)
            if not all(0 <= i < self.config.vocab_size for i in ids):
                raise UsageError(f"a prompt holds a token id outside 0 to {self.config.vocab_size - 1}")
        return self._request(ids, params, session, end_ids=frozenset(self.config.eos_token_ids), parser=None)

    def _chat_request(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        thinking: Thinking,
        effort: Effort | None,
        tools: Sequence[Mapping[str, Any]] | None,
        session: Session | None,
    ) -> Callable[[], ReplyRequest]:
        prompt = render_chat(messages, thinking=thinking, effort=effort, tools=tools)
        ids = prompt.ids(self.tokenizer)
        end_ids = turn_end_ids(self.tokenizer) | frozenset(self.config.eos_token_ids)
        return self._request(ids, params, session, end_ids=end_ids, parser=prompt.parser())

    def _request(
        self,
        ids: list[int],
        params: SamplingParams | None,
        session: Session | None,
        *,
        end_ids: frozenset[int],
        parser: ReplyParser | None,
    ) -> Callable[[], ReplyRequest]:
        """How to start the reply once there is room for it; what cannot fit is refused now, not after others ran."""
        params = params or self.default_params()
        check_room(len(ids), params.max_tokens, self.context)
        return lambda: ReplyRequest(
            session or self.session(),
            ids,
            params,
            self.tokenizer,
            context=self.context,
            end_ids=end_ids,
            parser=parser,
        )


def _seeded(params: SamplingParams, seed: int | None) -> SamplingParams:
    return replace(params, seed=seed)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {shown(value)}, expected one of {', '.join(allowed)}")


def _check_fits(path: Path) -> None:
    """Refuse before reading what cannot be held: all weights stay in memory, about as large as their files."""
    need = sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())
    have = available_memory()
    if have is not None and need > have:
        raise ResourceError(
            f"{shown(path)}: the weights need {need / 2**30:.1f} GiB of RAM and {have / 2**30:.1f} GiB are available; "
            "this version keeps all weights in RAM, so use a smaller model or a larger machine"
        )


def _check_vocabulary(path: Path, tokenizer: Tokenizer, embeddings: int) -> None:
    if tokenizer.vocab_size > embeddings:
        raise ModelError(
            f"{shown(path / 'tokenizer.json')}: has ids up to {tokenizer.vocab_size - 1}, the model has {embeddings} "
            "embeddings; get tokenizer.json and the weights from the same source"
        )


def _context(asked: int | None, limit: int) -> int:
    if asked is None:
        return limit
    if not 1 < asked <= limit:
        raise UsageError(f"context is {asked}, expected 2 to {limit}, the model's own limit")
    return asked
