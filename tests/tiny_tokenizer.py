"""A real byte-level BPE of 400 tokens, with DeepSeek-V4's splits and the control tokens of a small model."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

from localmoe.tokenizer import BOS, EOS, Tokenizer

CONTROL = [
    BOS,
    EOS,
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
]
WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
# The control spellings are in the text it learns from, so that its merges come as near to them as they can.
TEXT = ["a story about a brave frog, 12345 times; 你好 🐱 é ", "".join(CONTROL), "user Assistant think DSML sentence "]


@functools.cache
def _trained() -> dict[str, Any]:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"\p{N}{1,3}", "[一-龥]+", WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    # The trainer skips its special tokens in the text, so they are added afterwards, in front of the vocabulary.
    library.train_from_iterator(TEXT * 3, trainer)
    description: dict[str, Any] = json.loads(library.to_str())
    learnt = {token: number + len(CONTROL) for token, number in description["model"]["vocab"].items()}
    description["model"]["vocab"] = {text: number for number, text in enumerate(CONTROL)} | learnt
    description["added_tokens"] = [
        # DeepSeek flags only the first three special; the role tokens are not.
        {"id": number, "content": text, "special": number < 3, "normalized": number >= 3, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for number, text in enumerate(CONTROL)
    ]
    return description


def tiny_description() -> dict[str, Any]:
    """A fresh copy of its tokenizer.json, for a test to damage."""
    return copy.deepcopy(_trained())


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_description())
