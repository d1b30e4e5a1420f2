"""tokenizer.json, checked and split: control tokens on one side, what plain text can become on the other.

Knows the file's fields and the tokenizers library; does not know prompts. The library is handed the vocabulary without
the control tokens, so no spelling in a text can reach one. Memory: the library's tables."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from localmoe.errors import ModelError
from localmoe.files import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

T = TypeVar("T")

# The largest published vocabulary we know of has 262,144 tokens.
MAX_TOKEN_ID = 1 << 24
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Vocabulary:
    """control: spelling to id of each added token. plain: the library, knowing none of them. size: largest id + 1."""

    control: dict[str, int]
    plain: Library
    size: int


def read_vocabulary(description: dict[str, Any], source: str) -> Vocabulary:
    """description: a parsed tokenizer.json; source: its name for messages.

    Raises ModelError if it is no BPE vocabulary, or if a control token's id could come out of plain text."""
    control = _control_tokens(description, source)
    tokens = _plain_tokens(description, control, source)
    size = 1 + max([*tokens.values(), *control.values()])
    return Vocabulary(control, _build(description, tokens, source), size)


def _control_tokens(description: dict[str, Any], source: str) -> dict[str, int]:
    # Every added token, whether or not it is flagged special: DeepSeek's role tokens are not.
    control: dict[str, int] = {}
    entries = description.get("added_tokens") or []
    for entry in entries if isinstance(entries, list) else [None]:
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        text, number = fields.get("content"), fields.get("id")
        if not isinstance(text, str) or not text or LONE_SURROGATE.search(text) or not _is_id(number):
            raise ModelError(f"{source}: added token {shown(text)} has id {shown(number)}, expected text and an id")
        control[text] = number
    if len(set(control.values())) != len(entries):
        raise ModelError(f"{source}: an added token or its id appears twice; expected one id for each")
    return control


def _plain_tokens(description: dict[str, Any], control: dict[str, int], source: str) -> dict[str, int]:
    model = description.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) and model.get("type", "BPE") == "BPE" else None
    if not isinstance(vocab, dict) or not vocab:
        raise ModelError(f"{source}: holds no BPE vocabulary; localmoe runs lossless byte-level BPE only")
    plain = {token: number for token, number in vocab.items() if token not in control}
    bad = [number for number in plain.values() if not _is_id(number)]
    if bad:
        raise ModelError(f"{source}: the vocabulary holds the id {shown(bad[0])}, expected 0 to {MAX_TOKEN_ID - 1}")
    shared = set(control.values()).intersection(plain.values())
    if shared:
        raise ModelError(f"{source}: id {min(shared)} is both a control token and plain text, expected one id for each")
    return plain


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_TOKEN_ID


def _build(description: dict[str, Any], tokens: dict[str, int], source: str) -> Library:
    from tokenizers import Tokenizer as Library

    # Only what turns plain text into tokens is kept; BPE dropout would make encoding random.
    kept = {key: description.get(key) for key in ("version", "normalizer", "pre_tokenizer", "decoder")}
    model = {**description["model"], "vocab": tokens, "dropout": None}
    unused: dict[str, Any] = {"truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    text = json.dumps({**kept, **unused, "model": model})
    try:
        return leavable(lambda: Library.from_str(text))
    # The library raises bare Exception for anything it does not like.
    except Exception as cause:
        raise ModelError(f"{source}: the tokenizer cannot be built ({shown(cause)}); download it again") from None


def leavable(work: Callable[[], T]) -> T:
    """Run library code in a thread: Ctrl-C cannot interrupt it, but can leave the wait for it.

    Raises ModelError if the library panics, for example on a pattern that backtracks too much."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as cause:
            errors.append(cause)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if not errors:
        return results[0]
    if type(errors[0]).__name__ == "PanicException":
        raise ModelError(f"the tokenizers library gave up ({shown(errors[0])}); tokenizer.json may be damaged")
    raise errors[0]
