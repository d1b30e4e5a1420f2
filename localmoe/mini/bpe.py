"""The tokenizer of localmoe-mini: a small byte-level BPE that splits text exactly as DeepSeek-V4's does.

Owns training and the two files beside a checkpoint (tokenizer.json, tokenizer_config.json), and encoding of plain text
that can never become a control token. Knows nothing of stories, chats or models.
Training holds the word counts of the text in memory; encoding is batched by the tokenizers library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
# Ids 0-8, spelled and flagged as in DeepSeek-V4's tokenizer.json: only the first three are `special` there.
SPECIAL = (BOS, EOS, PAD)
CONTROL = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>")

NUMBERS = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V4's three splits, then bytes. Source: pre_tokenizer of its tokenizer.json."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (NUMBERS, CJK, WORDS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn a vocabulary of exactly vocab_size tokens: control tokens, the 256 bytes, then merges.

    Raises ValueError if the text is too small to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    return _with_deepseek_flags(tokenizer)


def _with_deepseek_flags(tokenizer: Tokenizer) -> Tokenizer:
    # The trainer flags everything it adds as special; DeepSeek's role tokens are `special: false, normalized: true`.
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
        token["normalized"] = not token["special"]
    return Tokenizer.from_str(json.dumps(description))


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, context: int = 4096) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers reads. context: tokens."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (out_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


class TextEncoder:
    """Encodes rendered prompts: control tokens only where the renderer put them, never from plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        description = json.loads(tokenizer.to_str())
        self._control: dict[str, int] = {token["content"]: token["id"] for token in description["added_tokens"]}
        # Without added tokens the library cannot match a control spelling inside a text.
        self._plain = Tokenizer.from_str(json.dumps({**description, "added_tokens": []}))

    def control_id(self, spelling: str) -> int:
        """The id of a control token. Raises KeyError for any other spelling."""
        return self._control[spelling]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, none of them a control token."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
