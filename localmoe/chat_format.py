"""The prompt format of a model: DeepSeek-V4's encoder, the model's own chat template, or none.

Chooses; what each writes is known to localmoe.prompt and localmoe.template. Which control tokens end a reply is decided
here too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localmoe import prompt
from localmoe.config import Reader
from localmoe.errors import ConfigError, ModelError
from localmoe.files import MIB, read_json, shown
from localmoe.models.model import ModelConfig
from localmoe.models.shared_fields import eos_token_ids
from localmoe.prompt import Effort, RenderedPrompt, Thinking
from localmoe.template import Template, find_template
from localmoe.tokenizer import Tokenizer

# Beside those of DeepSeek's tokenizers: what begins or ends a turn in GLM's and Kimi's.
_TURN_ENDS = (
    "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>",
    "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "[EOS]",
)  # fmt: skip


class Render(Protocol):
    """The prompt for an assistant turn after these messages. Raises UsageError for what the format has no place for.

    response_format: told to the model by DeepSeek's encoder; a template has no words for it."""

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: Thinking = "off",
        effort: Effort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt: ...


@dataclass(frozen=True)
class ChatFormat:
    """turn_end_ids: the tokens that end a reply."""

    render: Render
    turn_end_ids: frozenset[int]


def chat_format(model_dir: Path, config: ModelConfig, tokenizer: Tokenizer) -> ChatFormat:
    """The format of a model directory.

    Raises ModelError if its chat template is broken, or if there is none and the model is no DeepSeek-V4."""
    ends = prompt.turn_end_ids(tokenizer) | frozenset(config.eos_token_ids)
    if config.model_type == "deepseek_v4":
        return ChatFormat(prompt.render_chat, ends)
    source = find_template(model_dir)
    if source is None:
        raise ModelError(
            f"{shown(model_dir)}: has no chat template, expected one in tokenizer_config.json or chat_template.jinja; "
            "localmoe run --raw continues a text without one"
        )
    ends |= _other_ends(model_dir, config, tokenizer)
    return ChatFormat(Template(source, tokenizer).render, ends)


def render_of(model_dir: Path, config: ModelConfig) -> Render:
    """What writes the prompts of a model that is not loaded. Raises ModelError as chat_format() does."""
    if config.model_type == "deepseek_v4":
        return prompt.render_chat
    return chat_format(model_dir, config, Tokenizer.load(model_dir)).render


def template_text(model_dir: Path, config: ModelConfig) -> str | None:
    """The model's own chat template, if it is what would render; it need not be a good one."""
    source = None if config.model_type == "deepseek_v4" else find_template(model_dir)
    return None if source is None else source.text


def described(model_dir: Path, config: ModelConfig) -> str:
    """The format in words. Raises ModelError for a broken tokenizer_config.json."""
    if config.model_type == "deepseek_v4":
        return "DeepSeek-V4 encoder"
    source = find_template(model_dir)
    return "none: run --raw continues texts" if source is None else f"template of {source.file.name}"


def _other_ends(model_dir: Path, config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Those of generation_config.json, and control tokens that begin another turn."""
    known = {number for spelling in _TURN_ENDS if (number := tokenizer.token_id(spelling)) is not None}
    file = model_dir / "generation_config.json"
    if file.exists():
        reader = Reader(read_json(file, MIB, ConfigError), shown(file))
        if reader.has("eos_token_id"):
            known.update(eos_token_ids(reader, config.vocab_size))
    return frozenset(known)
