"""One training document: a conversation rendered by DeepSeek's own encoder, as token ids with a target mask.

Owns which text of a conversation the model should say. Knows nothing of stories, the mix of documents or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import deepseek_recipe as recipe

from localmoe.mini.bpe import BOS, EOS, TextEncoder

ASSISTANT, THINK, END_THINK = "<｜Assistant｜>", "<think>", "</think>"


@dataclass(frozen=True)
class Document:
    """One training document. reasoning: of the last assistant turn; only with mode "thinking"."""

    kind: str
    messages: tuple[recipe.Message, ...]
    mode: Literal["plain", "chat", "thinking"] = "chat"
    reasoning: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    effort: Literal["low", "high"] = "low"


Piece = tuple[str, bool, bool]  # text, is one control token, is a training target


def render(document: Document) -> list[Piece]:
    """The document as text pieces, exactly as DeepSeek's encoder renders the prompt, with the model's turns marked."""
    if document.mode == "plain":
        return [(BOS, True, False), (document.messages[0].content, False, True), (EOS, True, True)]
    thinking = document.mode == "thinking"
    tools = [recipe.ToolDefinition(t["name"], t["description"], t["parameters"]) for t in document.tools]
    conversation = recipe.Conversation(
        document.messages[:-1] if thinking else document.messages,
        thinking_mode=thinking,
        tools=tools,
        reasoning_effort=document.effort if thinking else None,
    )
    rendered = recipe.DeepseekV4Encoding().render_conversation(conversation)
    prompt, ranges = rendered.prompt, list(rendered.special_ranges)
    if not thinking:
        # After a complete conversation the encoder opens one more assistant turn; the document ends before it.
        return _mark_targets(prompt[: ranges[-2][0]], ranges[:-2])
    # The encoder drops the reasoning of turns it takes for history, so the last turn is appended to the prompt as the
    # model would write it.
    answer = document.messages[-1].content
    said: list[Piece] = [
        (document.reasoning, False, True),
        (END_THINK, True, True),
        (answer, False, True),
        (EOS, True, True),
    ]
    return _mark_targets(prompt, ranges) + said


def _mark_targets(prompt: str, ranges: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    at, speaking, previous = 0, False, ""
    for start, end in ranges:
        if start > at:
            pieces.append((prompt[at:start], False, speaking))
        token = prompt[start:end]
        opens = previous == ASSISTANT and token in (THINK, END_THINK)
        pieces.append((token, True, speaking))
        speaking = opens or (speaking and token != EOS)
        at, previous = end, token
    if at < len(prompt):
        pieces.append((prompt[at:], False, speaking))
    return pieces


def encode(batch: Sequence[Document], encoder: TextEncoder) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and target mask of every document."""
    rendered = [render(document) for document in batch]
    texts = list(dict.fromkeys(text for pieces in rendered for text, control, _ in pieces if not control))
    ids = dict(zip(texts, encoder.encode_batch(texts), strict=True))
    for pieces in rendered:
        tokens: list[int] = []
        mask: list[int] = []
        for text, control, target in pieces:
            piece = [encoder.control_id(text)] if control else ids[text]
            tokens += piece
            mask += [int(target)] * len(piece)
        yield tokens, mask
