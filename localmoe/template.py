"""A model's own chat template: where it is, what it is given, and which parts of what it writes are control tokens.

Templates are strangers' programs: localmoe.template_sandbox bounds them. Texts of a conversation are strangers' too:
before a template sees them they are made such that no control token can begin or end inside one, whatever the template
puts around it, and in what it writes that is undone. Control tokens are then the spellings that are left.
A template sees other texts than they are in one way: `<` and its like have a mark after them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import ModelError, UsageError
from localmoe.files import MIB, read_bytes, read_json, shown
from localmoe.prompt import Effort, RenderedPrompt, Thinking
from localmoe.reply import THINK_END, THINK_START, Stage
from localmoe.tokenizer import Tokenizer, refuse_surrogates

_CONFIG, _FILE = "tokenizer_config.json", "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_ROLES = ("system", "user", "assistant")
_FIELDS = ("role", "content", "reasoning_content")
# Code points that Unicode promises never to make characters: the mark, and what a text's own are written with.
_MARK, _OWN = "\U0010ffff", "\U0010fffe"
_OWN_MARK, _OWN_OWN, _LEADING_MARK = f"{_OWN}1", f"{_OWN}0", f"{_OWN}2"
_MEANS = {_OWN_OWN: _OWN, _OWN_MARK: _MARK, _LEADING_MARK: "", _MARK: ""}


@dataclass(frozen=True)
class TemplateSource:
    """text: the template; file: where it is from; special: bos_token and its like, as they are written."""

    text: str
    file: Path
    special: dict[str, str]


def find_template(model_dir: Path) -> TemplateSource | None:
    """The chat template of a model directory; None if it has none. Raises ModelError for files that are broken."""
    config_file, file = model_dir / _CONFIG, model_dir / _FILE
    config = read_json(config_file, 16 * MIB, ModelError) if config_file.exists() else {}
    special = {name: text for name in _SPECIAL if (text := _spelling(config.get(name))) is not None}
    # As in transformers, the file goes before the field.
    if file.exists():
        try:
            return TemplateSource(read_bytes(file, MIB, ModelError).decode(), file, special)
        except UnicodeDecodeError:
            raise ModelError(f"{shown(file)}: is not UTF-8 text; download it again") from None
    text = config.get("chat_template")
    if isinstance(text, list):
        named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
        text = named[0].get("template") if named else None
    if text is None:
        return None
    if not isinstance(text, str):
        raise ModelError(f"{shown(config_file)}: chat_template is {shown(text)}, expected a text; download it again")
    return TemplateSource(text, config_file, special)


class Template:
    """A compiled chat template, for one tokenizer's control tokens."""

    def __init__(self, source: TemplateSource, tokenizer: Tokenizer) -> None:
        """Raises ModelError if it is not a template, or too long."""
        # Jinja takes a tenth of a second to import.
        from localmoe.template_sandbox import MAX_SOURCE, Sandbox

        self._source, self._file = source, shown(source.file)
        if len(source.text) > MAX_SOURCE:
            raise ModelError(
                f"{self._file}: its chat template has {len(source.text):,} characters, expected at most {MAX_SOURCE:,}"
            )
        self._texts = _Texts(tokenizer.decode([number]) for number in tokenizer.control_ids)
        self._sandbox = Sandbox()
        # Whatever a compiler can fail with on a stranger's program.
        try:
            self._compiled = self._sandbox.from_string(source.text)
        except Exception as cause:
            raise ModelError(f"{self._file}: its chat template is not valid ({_cause(cause)})") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: Thinking = "off",
        effort: Effort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """The prompt for an assistant turn after these messages: system, user and assistant, with texts.

        response_format: held to by what may be drawn; templates have no words for it, so the prompt is the same.

        Raises UsageError for what the template refuses or has no place for, ModelError if it fails."""
        if thinking not in ("off", "on"):
            raise UsageError(f"thinking is {shown(thinking)}, expected off or on")
        if effort is not None:
            raise UsageError("this model's chat template knows no effort; leave it out")
        if tools:
            raise UsageError("tools are given, but localmoe parses the calls of DeepSeek-V4 only; leave them out")
        plain = [_plain(index, message) for index, message in enumerate(messages)]
        if not plain:
            raise UsageError("there are no messages, expected at least one")
        marked = self._run(plain, thinking)
        begins_in = self._begins_in(marked)
        if thinking == "on" and begins_in == "answer" and marked == self._run(plain, "off"):
            raise UsageError("this model's chat template has no thinking mode; leave --think out")
        text, ranges = self._texts.taken_apart(marked)
        return RenderedPrompt(text, ranges, begins_in, tools=False, continued=False, model_version=None)

    def _run(self, messages: list[dict[str, str]], thinking: Thinking) -> str:
        from localmoe.template_sandbox import Refused

        wanted = thinking == "on"
        safe = [
            {key: text if key == "role" else self._texts.marked(text) for key, text in message.items()}
            for message in messages
        ]
        # The families have different names for it.
        values = {"messages": safe, "add_generation_prompt": True, "thinking": wanted, "enable_thinking": wanted}
        characters = sum(len(text) for message in safe for text in message.values())
        try:
            return self._sandbox.run(self._compiled, {**self._source.special, **values}, characters)
        except Refused as refusal:
            raise UsageError(f"this model's chat template refuses the messages: {shown(refusal, 400)}") from None
        # Whatever a program can fail with.
        except Exception as cause:
            raise ModelError(f"{self._file}: its chat template fails ({_cause(cause)})") from None

    def _begins_in(self, marked: str) -> Stage:
        """Of a text in which only the template can have written where thinking begins and ends."""
        if marked.rfind(THINK_START) > marked.rfind(THINK_END):
            return "reasoning"
        if THINK_START in self._source.text and not marked.rstrip().endswith(THINK_END):
            return "undecided"
        return "answer"


class _Texts:
    """Texts on their way through a template. spellings: of the tokenizer's control tokens."""

    def __init__(self, spellings: Iterable[str]) -> None:
        # Of the alternatives the first that fits is taken, so the longest come first.
        control = sorted(spellings, key=len, reverse=True)
        known = [*control, THINK_START, THINK_END]
        self._longest = max(map(len, known))
        self._known = "\n".join(known)
        self._ends = {spelling[at:] for spelling in known for at in range(1, len(spelling))}
        first = "".join(sorted({re.escape(spelling[0]) for spelling in known}))
        self._first = re.compile(f"[{first}]")
        alternatives = "|".join(map(re.escape, control)) or "(?!)"
        # What is looked for ahead keeps a text full of `<` quick.
        self._control = re.compile(f"(?=[{first}](?!{_MARK}))(?:{alternatives})")
        self._marks = re.compile("|".join(_MEANS))

    def marked(self, text: str) -> str:
        """Such that no control token begins in it, ends in it or goes through it."""
        refuse_surrogates(text)
        if not text:
            return text
        safe = text.replace(_OWN, _OWN_OWN).replace(_MARK, _OWN_MARK)
        safe = self._first.sub(lambda found: found[0] + _MARK, safe)
        return _LEADING_MARK + safe if self._goes_on(text) else safe

    def _goes_on(self, text: str) -> bool:
        """Whether its beginning, or all of it, could be a part of a control token that begins before it."""
        if len(text) < self._longest and text in self._known:
            return True
        return any(text[:size] in self._ends for size in range(1, self._longest))

    def taken_apart(self, marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text as it is without marks, and where in it control tokens are."""
        pieces: list[str] = []
        ranges: list[tuple[int, int]] = []
        at = length = 0
        for found in self._control.finditer(marked):
            plain = self._unmarked(marked[at : found.start()])
            pieces += plain, found[0]
            ranges.append((length + len(plain), length + len(plain) + len(found[0])))
            at, length = found.end(), ranges[-1][1]
        return "".join([*pieces, self._unmarked(marked[at:])]), tuple(ranges)

    def _unmarked(self, text: str) -> str:
        return self._marks.sub(lambda found: _MEANS[found[0]], text)


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    """A message of nothing but texts. Raises UsageError if it has more that would be left out."""
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise UsageError(
            f"messages[{index}] has the role {shown(role)}, expected one that this model's chat template is given: "
            f"{', '.join(_ROLES)}"
        )
    more = [key for key, value in message.items() if value and key not in _FIELDS]
    if more:
        raise UsageError(f"messages[{index}] has {shown(more[0])}, which this model's chat template is not given")
    plain = {"role": message["role"], "content": _text(index, message.get("content"))}
    reasoning = message.get("reasoning_content")
    return plain | {"reasoning_content": _text(index, reasoning)} if reasoning else plain


def _text(index: int, content: Any) -> str:
    """What is said in a message. Parts are put together as DeepSeek's encoder does it."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"messages[{index}] has content that is no text; localmoe reads only text")
    return "\n\n".join(map(str, texts))


def _spelling(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _cause(cause: Exception) -> str:
    return shown(str(cause) or type(cause).__name__, 200)
