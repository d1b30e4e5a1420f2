"""One line of a batch: what it asks, checked field by field. Nothing in it is ignored.

Knows OpenAI's batch format and the fields localmoe implements; does not know files or models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from localmoe.batch import response_format, shape, tools
from localmoe.batch.shape import Shape
from localmoe.chat_format import Render
from localmoe.constraint import Constraint
from localmoe.errors import ModelError, UsageError
from localmoe.files import parse_json, shown
from localmoe.prompt import RenderedPrompt
from localmoe.sampler import SamplingParams
from localmoe.tokenizer import refuse_surrogates

URLS = ("/v1/chat/completions", "/v1/completions")
_LINE = {"custom_id", "method", "url", "body"}
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens", "stop"}
_SAMPLING |= {"stop_token_ids"}
_BODY = (
    _SAMPLING
    | response_format.FIELDS
    | shape.FIELDS
    | tools.FIELDS
    | {"messages", "prompt", "model", "thinking", "reasoning_effort", "max_completion_tokens"}
)
# Fields that would need something localmoe does not do, with the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {"stream": False, "frequency_penalty": 0, "presence_penalty": 0}
_MOST_STOPS = 4
# Levels of lists and objects: far from where Python could write no more.
_MOST_NESTED = 200


@dataclass(frozen=True)
class Request:
    """prompts: texts or token ids to continue; none for messages.

    sampling: fields of SamplingParams that the line sets. model: the one that the line names, which chooses nothing.
    tools: those that the model is told of."""

    custom_id: str
    prompts: list[str | list[int]]
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    thinking: Any
    effort: Any
    model: str | None
    shape: Shape
    tools: list[dict[str, Any]]

    @property
    def replies(self) -> int:
        """How many there are to be."""
        return max(len(self.prompts), 1) * self.shape.choices

    def params(self, defaults: SamplingParams, seed: int) -> SamplingParams:
        """Without a seed of its own, one that depends on the id only: neither on the place nor on what ran before."""
        return replace(defaults, **{"seed": derived_seed(seed, self.custom_id)} | self.sampling)

    def rendered(self, render: Render, constraint: Constraint | None) -> RenderedPrompt:
        """The prompt of the messages, with what the model is told of the constraint. Raises as `render` does."""
        told = None if constraint is None else constraint.response_format()
        return render(self.messages, thinking=self.thinking, effort=self.effort, tools=self.tools, response_format=told)

    def digest(self, params: SamplingParams, facts: dict[str, str]) -> str:
        """Of all that decides the reply."""
        wanted = [asdict(params), asdict(self.shape)]
        prompt = self.prompts if len(self.prompts) > 1 else next(iter(self.prompts), None)
        whole = [prompt, self.messages, wanted, self.thinking, self.effort, facts]
        # Without tools, what it was before there were any: rows of then are known again.
        whole += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Refused:
    """A line that is no request: what it goes by, the digest of the line, and what is wrong with it."""

    custom_id: str
    digest: str
    problem: str


@dataclass(frozen=True)
class Reading:
    """How lines are understood. text: a line is a prompt. raw: prompts are continued, not answered.

    ignore_unknown: fields that are not known are passed over."""

    text: bool = False
    raw: bool = False
    ignore_unknown: bool = False


def derived_seed(seed: int, of: object) -> int:
    """Another one that depends on these two only."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{of}".encode()).digest()[:8], "big") >> 1


def parse(line: bytes, number: int, how: Reading, renderer: Callable[[], Render] | None = None) -> Request:
    """The request of line `number`. renderer: gives what has to find the messages good; None if it has already.

    Raises UsageError saying what is wrong, and what the renderer itself raises."""
    found = {"prompt": _decoded(line)} if how.text else parse_json(line, "the line", UsageError, "correct the line")
    found = {name: value for name, value in found.items() if value is not None}
    custom_id = found.pop("custom_id", str(number))
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError(f"custom_id is {shown(custom_id)}, expected a text")
    url = found.get("url")
    body = found if "body" not in found else _body(found, how)
    if found.get("method", "POST") != "POST" or url not in (None, *URLS):
        raise UsageError(f"method and url are {shown(found.get('method'))} {shown(url)}, expected POST {URLS[0]}")
    body = {name: value for name, value in body.items() if value is not None and name not in ("method", "url")}
    _refuse_unknown(body, how)
    request = _request(custom_id, body, url == URLS[1] or (url is None and how.raw))
    if renderer is not None and not request.prompts:
        _try_rendering(request, renderer())
    return request


def id_of(line: bytes, number: int, how: Reading) -> str:
    """What a line goes by, whatever else is wrong with it: its custom_id, or its number if it has none that is good."""
    try:
        own = None if how.text else parse_json(line, "the line", UsageError).get("custom_id")
        if isinstance(own, str) and own:
            refuse_surrogates(own)
            return own
    except UsageError:
        pass
    return str(number)


def _body(line: dict[str, Any], how: Reading) -> dict[str, Any]:
    unknown = [] if how.ignore_unknown else sorted(line.keys() - _LINE)
    if unknown or not isinstance(line["body"], dict):
        problem = f"{shown(unknown[0])} beside body is not known; leave it out, or --ignore-unknown" if unknown else ""
        raise UsageError(problem or "body is not an object")
    return dict(line["body"])


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as cause:
        raise UsageError(f"the line is not UTF-8 (byte {cause.start}); convert the file") from None


def _refuse_unknown(body: dict[str, Any], how: Reading) -> None:
    for name, value in body.items():
        if name in _NEUTRAL:
            if value != _NEUTRAL[name]:
                raise UsageError(f"{name} is not supported in a batch; leave it out")
        elif name not in _BODY and not how.ignore_unknown:
            raise UsageError(f"{shown(name)} is not a field that localmoe knows; leave it out, or --ignore-unknown")


def _request(custom_id: str, body: dict[str, Any], raw: bool) -> Request:
    if ("prompt" in body) == ("messages" in body):
        raise UsageError("expected either messages or prompt")
    prompts, messages = _prompts(body["prompt"], raw) if "prompt" in body else [], body.get("messages")
    if prompts and not raw:
        messages, prompts = [{"role": "user", "content": prompts[0]}], []
    if not prompts and (raw or not isinstance(messages, list) or not messages):
        raise UsageError("messages are not a list of at least one message, for /v1/chat/completions")
    thinking, effort = _thinking(body.get("thinking", "off")), body.get("reasoning_effort")
    if raw and (thinking != "off" or effort is not None):
        raise UsageError("thinking has no effect on a continued text; leave it out")
    model = body.get("model")
    if not isinstance(model, str | None):
        raise UsageError(f"model is {shown(model)}, expected a name")
    offered = tools.tools_of(body, raw)
    _check_texts([custom_id, prompts, messages, offered])
    wanted, own = shape.shape_of(body, raw)
    sampling = _sampling(body, own)
    if offered and sampling.get("constraint") is not None:
        raise UsageError("a reply cannot be held to a form and call tools; leave one of them out")
    found = Request(custom_id, prompts, messages or [], sampling, thinking, effort, model, wanted, offered)
    if found.replies > shape.MOST_CHOICES:
        # They are held in memory until the last is done, and lost together.
        raise UsageError(
            f"{len(prompts)} prompts ask for {found.replies} replies, expected at most {shape.MOST_CHOICES} to a line; "
            "divide it"
        )
    return found


def _prompts(given: Any, raw: bool) -> list[str | list[int]]:
    """A prompt, or each of a list of them. raw: token ids can be prompts, and there can be several.

    Raises UsageError for anything else."""
    # Clients write a list also when there is one.
    many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(many) > 1 and not raw:
        raise UsageError(f"prompt is a list of {len(many)} prompts, expected one; several are for /v1/completions")
    texts = all(isinstance(one, str) for one in many)
    if not all(many) or not (texts or (raw and all(map(_are_ids, many)))):
        raise UsageError("prompt is no text of at least one character, nor token ids for /v1/completions")
    return many


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _try_rendering(request: Request, render: Render) -> None:
    try:
        request.rendered(render, request.sampling.get("constraint"))
    except ModelError as failure:
        # A template that fails on these messages may do well with others.
        raise UsageError(str(failure)) from None


def _thinking(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"type"}:
        value = {"enabled": "on", "disabled": "off"}.get(str(value["type"]), value)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _sampling(body: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """own: what the shape of the request says about sampling."""
    given = {name: body[name] for name in _SAMPLING & body.keys()} | response_format.constraint_of(body)
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise UsageError("max_tokens and max_completion_tokens are both given; leave one of them out")
        given["max_tokens"] = body["max_completion_tokens"]
    given |= own
    try:
        checked = SamplingParams(**given)
    except (TypeError, OverflowError) as cause:
        raise UsageError(f"the sampling parameters are wrong: {shown(cause)}") from None
    if len(checked.stop) > _MOST_STOPS:
        raise UsageError(f"stop has {len(checked.stop)} texts, expected at most {_MOST_STOPS}")
    _check_texts(checked.stop)
    return given


def _check_texts(value: Any) -> None:
    """Raises UsageError for a text that UTF-8 cannot write, or for what is nested too deeply to be written again."""
    rest = [(value, 0)]
    while rest:
        one, depth = rest.pop()
        if isinstance(one, str):
            refuse_surrogates(one)
        elif isinstance(one, (list, tuple, dict)):
            if depth > _MOST_NESTED:
                raise UsageError("the line is nested too deeply; expected a few levels")
            parts = [*one, *one.values()] if isinstance(one, dict) else one
            rest += [(part, depth + 1) for part in parts if isinstance(part, (str, list, dict))]
