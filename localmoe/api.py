"""The Python API: LLM and what it returns.

    from localmoe import LLM, SamplingParams
    llm = LLM()                                   # the embedded localmoe-mini; or LLM("path/to/model")
    print(llm.chat([{"role": "user", "content": "Tell me a story."}]).text)

One LLM is one loaded model; it is not thread-safe. Memory: weights as packed as in the checkpoint; routed experts that
do not fit stay on disk and are read when they are needed."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from localmoe import gpus
from localmoe.backend import KernelChoice, choose, shortfall
from localmoe.chat_format import ChatFormat, chat_format, template_text
from localmoe.config import Reader
from localmoe.constraint import Constraint
from localmoe.engine import Engine
from localmoe.errors import ConfigError, ModelError, UsageError
from localmoe.events import Completion, Event, Finished
from localmoe.experts.carried import CarriedExperts, carried
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import PagerStats, Paging
from localmoe.experts.trace import TracedExperts
from localmoe.files import read_json, shown
from localmoe.guide import Guides
from localmoe.identity import identity
from localmoe.library import EMBEDDED, EMBEDDED_NAME
from localmoe.loader import Progress as LoadProgress
from localmoe.loader import read_config
from localmoe.models.family import check_kv_format
from localmoe.models.model import ModelConfig
from localmoe.pager import open_model
from localmoe.prepared import Prepared
from localmoe.prompt import Effort, Thinking
from localmoe.reply_request import ReplyRequest, check_room
from localmoe.sampler import SamplingParams
from localmoe.scheduler import Start, run
from localmoe.session import Session, common_prefix
from localmoe.shared_prefixes import SharedPrefixes
from localmoe.tokenizer import Tokenizer
from localmoe.weights import Observer

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
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
        kernels: KernelChoice = "auto",
        threads: int | None = None,
        kv_format: Literal["full", "fp8"] = "full",
        context: int | None = None,
        device: str = "cpu",
        vram: Sequence[int] | None = None,
        graphs: bool | None = None,
        paging: Paging | None = None,
        progress: LoadProgress | None = None,
        observer: Observer | None = None,
    ) -> None:
        """model: a directory in the published layout; None is the embedded localmoe-mini.

        dtype: of activations and the KV cache ("auto" is float32). kernels: "native" is the compiled library, "strict"
        the same in float32, decoding on the CPU to the same bits whatever runs beside, "reference" is PyTorch; "auto"
        takes native, or the reference where nothing could be compiled (kernels_notice says so). threads: of the
        compiled library, shared by all models of the process; None is one per core. kv_format: "fp8" rounds the latent
        cache as the official code does (not the index keys); it saves no memory. context: most tokens of prompt, reply
        together; None is the model's own limit. device: "cpu", "cuda" for all GPUs, or some, "cuda:0,cuda:1"; vram:
        bytes of each to use, or one number for all, None for what is free; graphs: play decode steps that are all on
        GPUs as CUDA graphs; None: where that can be (graphs_notice says why not). Not proven on a GPU yet. paging: how
        much RAM to take, and how experts are held that do not fit in it; the same tokens come out with any of it
        ("native" may differ in last bits, "strict" never).
        progress(done, total): told the bytes read while loading. observer: shown what goes into matrices, by their
        names; prompts are then slower (see localmoe imatrix).
        Raises ModelError (and its children) for a bad directory, ResourceError if it cannot fit in memory or kernels
        are asked for that there are not."""
        _check_choice("dtype", dtype, tuple(_DTYPES))
        self.backend = choose(kernels, threads)
        self.kernels_notice = shortfall(kernels)
        gpus.check_graphs(graphs, device, kernels, quantize_kv=kv_format == "fp8")
        self.gpus = gpus.find(device, vram)
        if self.gpus and observer is not None:
            raise UsageError("what goes into matrices is observed on the CPU only; leave device out")
        gpu_ops, accelerate = gpus.kernels_for(self.gpus, kernels)
        recorder = gpus.recorder(self.gpus, graphs)
        _check_choice("kv_format", kv_format, _KV_FORMATS)
        path = EMBEDDED if model is None else Path(model)
        if not path.is_dir():
            raise ModelError(f"{shown(path)} is not a directory; expected one with config.json and safetensors files")
        self.path = path
        # Where experts are read from, if they are: on another disk, perhaps.
        self.experts_folder = paging.pack if paging is not None and paging.pack is not None else path
        self.name = EMBEDDED_NAME if model is None else path.resolve().name
        # Everything cheap is checked before the weights are read.
        self.config = read_config(path)
        check_kv_format(self.config, kv_format)
        self.context = _context(context, self.config.max_position_embeddings)
        self.tokenizer = Tokenizer.load(path)
        _check_vocabulary(path, self.tokenizer, self.config)
        self._default_params = _default_params(path)
        model_ = open_model(
            path,
            self.name,
            paging or Paging(),
            dtype=_DTYPES[dtype],
            quantize_kv=kv_format == "fp8",
            backend=self.backend,
            gpus=self.gpus,
            gpu_ops=gpu_ops,
            accelerate=accelerate,
            context=self.context,
            progress=progress,
            observer=observer,
        )
        self.engine = Engine(model_, recorder)
        self.guides = Guides(self.tokenizer, self.config.vocab_size)
        self._identity: dict[str, str] | None = None

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How messages become a prompt. Raises ModelError for a model that has no such format, or a broken one."""
        return chat_format(self.path, self.config, self.tokenizer)

    @property
    def graphs_notice(self) -> str | None:
        """See Engine.graphs_notice."""
        return self.engine.graphs_notice

    @property
    def pager(self) -> PagerStats | None:
        """What paging has done so far; None where all experts are in memory."""
        experts = carried(self.engine.model.experts)
        return experts.stats if isinstance(experts, PagedExperts) else None

    @property
    def experts_held(self) -> int:
        """Routed experts that memory has room for now."""
        source = self.engine.model.experts
        experts = carried(source)
        if isinstance(experts, PagedExperts):
            on_gpus = source.layers_here if isinstance(source, CarriedExperts) else 0
            return experts.capacity + on_gpus * self.config.num_experts
        return self.config.num_moe_layers * self.config.num_experts

    def close(self) -> None:
        """Stop reading experts from disk and complete the routing trace, if one is recorded. The model ends here."""
        experts = carried(self.engine.model.experts)
        if isinstance(experts, (PagedExperts, TracedExperts)):
            experts.close()

    def default_params(self) -> SamplingParams:
        """What generation_config.json says about sampling; SamplingParams() when there is none."""
        return self._default_params

    def session(self) -> Session:
        """An empty conversation state. Pass it to successive stream calls to reuse what they have in common."""
        return self.engine.new_session()

    def identity(self) -> dict[str, str]:
        """What a saved session must have been made with to go on here: files, dtype, KV format."""
        if self._identity is None:
            model = self.engine.model
            template = template_text(self.path, self.config)
            self._identity = identity(self.path, model.dtype, quantize_kv=model.quantize_kv, template=template)
        return dict(self._identity)

    def prefill(self, ids: Sequence[int]) -> Session:
        """A session that has read these tokens, marked at their end; for what many conversations begin with."""
        ids, session = _token_ids(ids, self.config.vocab_size), self.session()
        check_room(len(ids), None, self.context)
        for at in range(0, len(ids), self.engine.prefill_tokens):
            self.engine.advance([(session, ids[at : at + self.engine.prefill_tokens])])
        session.mark()
        return session

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: Thinking = "off", effort: Effort | None = None
    ) -> list[int]:
        """The token ids of the prompt that stream_chat() makes of these messages."""
        return self.chat_format.render(messages, thinking=thinking, effort=effort).ids(self.tokenizer)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of the prompt that stream() makes of a text: BOS is put before it. Ids are checked only."""
        if not isinstance(prompt, str):
            return _token_ids(prompt, self.config.vocab_size)
        return self.tokenizer.text_ids(prompt)

    def shared_prefix(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: Thinking = "off", effort: Effort | None = None
    ) -> list[int]:
        """The token ids that every conversation begins with that goes on with a question after these messages."""
        questions = ([*messages, {"role": "user", "content": text}] for text in ("a", "b"))
        one, two = (self.chat_ids(m, thinking=thinking, effort=effort) for m in questions)
        return one[: common_prefix(one, two)]

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
        return self.stream_prepared(self.prepare(prompt), params, session=session, cancelled=cancelled)

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
        constraint = (params or self.default_params()).constraint
        prepared = self.prepare_chat(messages, thinking=thinking, effort=effort, tools=tools, constraint=constraint)
        return self.stream_prepared(prepared, params, session=session, cancelled=cancelled)

    def stream_prepared(
        self,
        prepared: Prepared,
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """What stream() or stream_chat() gives, of a prompt that was prepared before."""
        start = self.request(prepared, params, session)
        return (event for _index, event in run(self.engine, [start], cancelled=cancelled))

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue several prompts together, in shared steps; results in the order of the prompts.

        prompts: one text, or a list of texts and token-id lists. With a seed, prompt i draws with seed + i."""
        many: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts  # type: ignore[assignment]
        if any(isinstance(p, int) for p in many):
            raise UsageError("generate() got one list of token ids, expected a list of prompts; wrap it in a list")
        params = params or self.default_params()
        seeds = [None if params.seed is None else params.seed + i for i in range(len(many))]
        each = [replace(params, seed=seed) for seed in seeds]
        shared = SharedPrefixes(self.engine)
        starts = [
            self.request(self.prepare(prompt), own, shared=shared) for prompt, own in zip(many, each, strict=True)
        ]
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
        ids = _token_ids(ids, self.config.vocab_size)
        if not ids:
            raise UsageError("logits() got no token ids, expected at least one")
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"chunk_size is {chunk_size}, expected at least 1")
        session, size = self.session(), chunk_size or len(ids)
        chunks = [ids[at : at + size] for at in range(0, len(ids), size)]
        return torch.cat([self.engine.advance([(session, chunk)], all_logits=True).logits for chunk in chunks])

    def prepare(self, prompt: Prompt) -> Prepared:
        """What stream() continues. Raises UsageError for what is no prompt."""
        return Prepared(self.prompt_ids(prompt), frozenset(self.config.eos_token_ids))

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: Thinking = "off",
        effort: Effort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        constraint: Constraint | None = None,
    ) -> Prepared:
        """What stream_chat() replies to. constraint: the one that replies will be held to.

        Raises UsageError for messages that make no prompt."""
        if constraint is not None:
            self._check_constraint(constraint, messages, tools)
        told = None if constraint is None else constraint.response_format()
        render, ends = self.chat_format.render, self.chat_format.turn_end_ids
        rendered = render(messages, thinking=thinking, effort=effort, tools=tools, response_format=told)
        return Prepared(rendered.ids(self.tokenizer), ends, rendered, messages, constraint)

    def request(
        self,
        prepared: Prepared,
        params: SamplingParams | None,
        session: Session | None = None,
        shared: SharedPrefixes | None = None,
    ) -> Start:
        """How scheduler.run() starts a reply, in this session or in one of `shared`, if any; to be made once there is
        room for it.

        Raises UsageError now, not after others ran, for what cannot fit in the context."""
        params = params or self.default_params()
        assert prepared.rendered is None or prepared.constraint == params.constraint, "the prompt tells of another"
        guide = None if params.constraint is None else self.guides.start(params.constraint, prepared.begins_in)
        check_room(len(prepared.ids), params.max_tokens, self.context)

        def make(session: Session, marks_at: Sequence[int]) -> ReplyRequest:
            return ReplyRequest(
                session,
                prepared.ids,
                params,
                self.tokenizer,
                context=self.context,
                end_ids=prepared.end_ids,
                parser=prepared.parser(),
                marks_at=marks_at,
                guide=guide,
            )

        if shared is not None:
            return lambda: shared.start(prepared.ids, make)
        if session is None:
            return lambda: make(self.session(), ())
        marks_at = prepared.marks_at(self.tokenizer)
        return lambda: make(session, marks_at)

    def _check_constraint(
        self, constraint: Constraint, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> None:
        begun = bool(messages) and messages[-1].get("role") == "assistant"
        if tools or begun:
            what = "tools" if tools else "a reply that the messages begin"
            raise UsageError(f"a constraint cannot be held to with {what}; leave one of them out")
        self.guides.compiled(constraint)


def _token_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Raises UsageError unless ids are whole numbers of the vocabulary."""
    try:
        checked = [operator.index(i) for i in ids]
    except TypeError:
        raise UsageError("token ids must be whole numbers") from None
    if not all(0 <= i < vocab_size for i in checked):
        raise UsageError(f"a token id is outside 0 to {vocab_size - 1}, the model's vocabulary")
    return checked


def _default_params(path: Path) -> SamplingParams:
    file = path / "generation_config.json"
    if not file.exists():
        return SamplingParams()
    reader = Reader(read_json(file, _MIB, ConfigError), shown(file))
    try:
        return SamplingParams(
            temperature=reader.optional("temperature", float, 1.0) if reader.optional("do_sample", bool, True) else 0.0,
            top_k=reader.optional("top_k", int, 0),
            top_p=reader.optional("top_p", float, 1.0),
            min_p=reader.optional("min_p", float, 0.0),
            repetition_penalty=reader.optional("repetition_penalty", float, 1.0),
        )
    except UsageError as problem:
        raise ConfigError(f"{shown(file)}: {problem}") from None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {shown(value)}, expected one of {', '.join(allowed)}")


def _check_vocabulary(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    file = shown(path / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{file}: has ids up to {tokenizer.vocab_size - 1}, the model has {config.vocab_size} embeddings; "
            "get tokenizer.json and the weights from the same source"
        )
    if tokenizer.bos_id is not None and tokenizer.bos_id != config.bos_token_id:
        raise ModelError(f"{file}: begins texts with id {tokenizer.bos_id}, config.json with {config.bos_token_id}")


def _context(asked: int | None, limit: int) -> int:
    if asked is None:
        return limit
    if not 1 < asked <= limit:
        raise UsageError(f"context is {asked}, expected 2 to {limit}, the model's own limit")
    return asked
