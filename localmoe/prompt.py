"""Messages to a prompt: DeepSeek's own encoder writes it, and says which parts of it are control tokens.

Knows the chat format only through deepseek-recipe, which is imported when the first prompt is rendered. The encoder's
special ranges alone become control tokens; whatever a user, a tool or an earlier reply wrote is plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from localmoe.errors import UsageError
from localmoe.files import shown
from localmoe.reply import ReplyParser, Stage
from localmoe.tokenizer import BOS, EOS, Tokenizer

if TYPE_CHECKING:
    from deepseek_recipe import ConversationRequest, ParsingOptions

Thinking = Literal["off", "on"]
Effort = Literal["low", "high", "max"]
ModelVersion = Literal["v4", "v4.1"]

# The names deepseek-recipe knows the formats by; V4-Flash and V4-Pro share one.
_MODEL_NAMES = {"v4": "DeepSeek-V4-Pro", "v4.1": "DeepSeek-V4.1-Flash"}
_TURN_ENDS = (EOS, BOS, "<｜System｜>", "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>", "<|EOT|>")

# The encoder takes these for control tokens in what an earlier reply is said to be, where anyone may have written them;
# they say where something is in a picture, which these models do not see.
_GROUNDING = {f"<｜{slash}{what}｜>" for slash in ("", "/") for what in ("ref", "box", "point", "polygon")}


@dataclass(frozen=True)
class RenderedPrompt:
    """text: the whole prompt. special_ranges: ascending [start, end) in code points, each one control token.

    begins_in: where the model goes on; tools: whether its calls are to be parsed; continued: whether the prompt ends
    with the first words of the reply; model_version: None if a chat template wrote it."""

    text: str
    special_ranges: tuple[tuple[int, int], ...]
    begins_in: Stage
    tools: bool
    continued: bool
    model_version: ModelVersion | None

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids. Raises ModelError if the tokenizer lacks a control token of this prompt."""
        return tokenizer.encode_special(self.text, self.special_ranges)

    def question_at(self, messages: Sequence[Mapping[str, Any]], length: int, tokenizer: Tokenizer) -> int:
        """Which of the prompt's `length` tokens the last question begins with, or one a little before; 0 without one.

        Another question after the same messages has what is before it in common with this one."""
        question = messages[-1].get("content") if messages else None
        if not isinstance(question, str) or not question:
            return 0
        start = self.text.rfind(question, 0, self._reply_mark())
        if start < 0:
            return 0
        after = [(begin - start, end - start) for begin, end in self.special_ranges if begin >= start]
        first = length - len(tokenizer.encode_special(self.text[start:], after))
        # Where no control token is between it and a text before it, tokens may reach from one into the other.
        return max(first - (0 if any(stop == start for _, stop in self.special_ranges) else 2), 0)

    def _reply_mark(self) -> int:
        """Where the control tokens begin that the prompt ends with, line breaks between them; its end without any."""
        at = len(self.text)
        for start, end in reversed(self.special_ranges):
            if self.text[end:at].strip("\n"):
                break
            at = start
        return at

    def parser(self) -> ReplyParser:
        """A parser for the reply to this prompt. Raises UsageError for V4.1, whose replies localmoe does not parse."""
        if self.model_version == "v4.1":
            raise UsageError("replies in the V4.1 format are not parsed, expected a V4 prompt")
        return ReplyParser(self.begins_in, tools=self.tools, continued=self.continued)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: Thinking = "off",
    effort: Effort | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    response_format: Mapping[str, Any] | None = None,
    model_version: ModelVersion = "v4",
) -> RenderedPrompt:
    """The prompt for an assistant turn after these messages.

    messages, tools, tool_choice, response_format: as in OpenAI's chat API; roles system, user, assistant, tool,
    latest_reminder. An assistant message with "prefix": true comes last and is continued.
    effort: how long to think; None is the encoder's default, which is "high".
    Raises UsageError if the encoder refuses them, or would leave out a part of them."""
    if thinking not in ("off", "on") or model_version not in _MODEL_NAMES:
        raise UsageError(f"thinking is {shown(thinking)} for {shown(model_version)}, expected off or on, v4 or v4.1")
    if effort is not None and (effort not in ("low", "high", "max") or thinking == "off"):
        raise UsageError(f"effort is {shown(effort)}, thinking {thinking}; expected low, high or max, and thinking on")
    body: dict[str, Any] = {"model": _MODEL_NAMES[model_version]}
    body["messages"] = [_checked(index, message) for index, message in enumerate(messages)]
    body["thinking"] = {"type": "enabled" if thinking == "on" else "disabled"}
    optional = {"tools": tools and list(tools), "tool_choice": tool_choice, "response_format": response_format}
    optional["reasoning_effort"] = effort
    return _render(body | {key: value for key, value in optional.items() if value is not None}, model_version)


def turn_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens that end a reply: end of sentence, and any token that would begin another turn."""
    ids = (tokenizer.token_id(spelling) for spelling in _TURN_ENDS)
    return frozenset(token for token in ids if token is not None)


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"messages[{index}] is {shown(message)}, expected an object with role and content")
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        # The encoder would write "[Unsupported Image]" in its place, without a word to the caller.
        if kind != "text":
            raise UsageError(f"messages[{index}] has a content part of type {shown(kind)}; localmoe reads only text")
    return dict(message)


def _render(body: dict[str, Any], model_version: ModelVersion) -> RenderedPrompt:
    from deepseek_recipe import DeepseekV4Encoding, DeepseekV41Encoding

    request = _converted(body)
    encoding = DeepseekV4Encoding() if model_version == "v4" else DeepseekV41Encoding()
    prompt = encoding.render_conversation(request.conversation)
    options = request.parsing_options
    begins_in, continued = _place(options)
    ranges = tuple((start, end) for start, end in prompt.special_ranges if prompt.prompt[start:end] not in _GROUNDING)
    return RenderedPrompt(prompt.prompt, ranges, begins_in, options.parse_tool_calls, continued, model_version)


def _converted(body: dict[str, Any]) -> ConversationRequest:
    from deepseek_recipe import ChatCompletionRequest, ConversionError, ConversionOptions

    try:
        return ChatCompletionRequest(body).convert(ConversionOptions())
    except UnicodeEncodeError as cause:
        raise UsageError(f"the messages hold a lone surrogate ({shown(cause)}); expected valid Unicode") from None
    except (ConversionError, ValueError, TypeError) as cause:
        raise UsageError(f"the messages cannot be rendered: {shown(cause, 400)}") from None


def _place(options: ParsingOptions) -> tuple[Stage, bool]:
    """Where the reply begins, and whether the prompt already holds its first words."""
    from deepseek_recipe import ThinkingInitialStage

    if options.starts_in_tool_calls:
        return "tool_calls", False
    stage = options.thinking_initial_stage
    if stage is None:
        return "answer", False
    return ("reasoning" if stage.starts_in_reasoning() else "answer"), stage != ThinkingInitialStage.ReasoningStart
