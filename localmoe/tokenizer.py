"""Text to token ids and back: plain text never becomes a control token, and comes back unchanged.

Owns encoding, incremental detokenising and stop strings. Knows no prompt format and no model.
Streaming costs a dictionary look-up per token, whatever came before it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from localmoe.errors import ModelError, UsageError
from localmoe.files import MIB, read_json, shown
from localmoe.vocabulary import leavable, read_vocabulary

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# The largest published tokenizer.json we know of is 33 MB; DeepSeek-V4's is 6 MB.
MAX_TOKENIZER_BYTES = 64 * MIB
# Every byte that valid UTF-8 can hold occurs in one of these characters.
_PROBE_POINTS = [*range(0x800), *range(0x1000, 0xD000, 0x1000), 0xE000, 0xF000, *range(1 << 16, 17 << 16, 1 << 16)]
_PROBE = "".join(map(chr, _PROBE_POINTS))


def _byte_characters() -> dict[str, int]:
    # Source: GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class Tokenizer:
    """One model's vocabulary: vocab_size (largest id + 1), control_ids, bos_id and eos_id (None if it has none)."""

    def __init__(self, description: dict[str, Any], source: str = "tokenizer.json") -> None:
        """description: a parsed tokenizer.json.

        Raises ModelError if it is not a lossless byte-level BPE, or if plain text could become a control token."""
        vocabulary = read_vocabulary(description, source)
        self.vocab_size = vocabulary.size
        self._plain = vocabulary.plain
        self._control = vocabulary.control
        self._control_bytes = {number: text.encode() for text, number in self._control.items()}
        self.control_ids = frozenset(self._control_bytes)
        self.bos_id = self.token_id(BOS)
        self.eos_id = self.token_id(EOS)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ModelError(f"{source}: does not give text back unchanged; localmoe runs lossless byte-level BPE only")

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """The tokenizer of a model directory. Raises ModelError if tokenizer.json is absent, over 64 MiB or invalid."""
        path = Path(model_dir) / "tokenizer.json"
        return cls(read_json(path, MAX_TOKENIZER_BYTES, ModelError), shown(path))

    def token_id(self, spelling: str) -> int | None:
        """The id of the control token written so, None if this tokenizer has no such control token."""
        return self._control.get(spelling)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a control token's spelling inside it stays text. Adds no BOS.

        Raises UsageError if the text holds a lone surrogate."""
        return self._encode_all([text])[0]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is continued without a chat format: BOS, where there is one, and the plain text.

        Raises UsageError if the text holds a lone surrogate."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode_special(self, text: str, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Token ids of a text whose `ranges` are control tokens and whose rest is plain.

        ranges: ascending, disjoint [start, end) in code points, each the exact spelling of one control token.
        Raises ModelError if this tokenizer lacks one of them, UsageError for a lone surrogate."""
        control: list[int] = []
        plain: list[str] = []
        done = 0
        for start, end in ranges:
            assert done <= start < end <= len(text), f"range {start}:{end} overlaps the one before or leaves the text"
            plain.append(text[done:start])
            control.append(self._required_id(text[start:end]))
            done = end
        first, *rest = self._encode_all([*plain, text[done:]])
        return first + [token for special, ids in zip(control, rest, strict=True) for token in (special, *ids)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: a control token's spelling, nothing for an id the vocabulary leaves unused."""
        control = self._control_bytes.get(token)
        if control is not None:
            return control
        spelling = self._plain.id_to_token(token) or ""
        try:
            return bytes(map(_BYTE_OF.__getitem__, spelling))
        # A token not written in the byte alphabet stands for itself, as in the tokenizers library.
        except KeyError:
            return spelling.encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these tokens; U+FFFD where their bytes are not UTF-8."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def _required_id(self, spelling: str) -> int:
        number = self._control.get(spelling)
        if number is None:
            raise ModelError(f"this model's tokenizer has no control token {shown(spelling)}, which the prompt needs")
        return number

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            refuse_surrogates(text)
        encodings = leavable(lambda: self._plain.encode_batch_fast(texts, add_special_tokens=False))
        return [encoding.ids for encoding in encodings]


class StreamDecoder:
    """Tokens in, text out as soon as its bytes are complete; the pushes and the flush add up to decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text this token completes; U+FFFD only for bytes that no later token could complete."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """The end of the stream: U+FFFD if a character was left incomplete."""
        return self._decoder.decode(b"", True)


class StopMatcher:
    """Cuts a stream of text at the first stop string, never letting out any part of it.

    The match that completes first wins, so no text beyond it is needed; of several completing at the same character,
    the longest. How the text is split into pushes makes no difference."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UsageError if a stop string is empty."""
        if not all(stops):
            raise UsageError("a stop string is empty, expected at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that may be shown and the stop string that matched, if any; after a match, no text."""
        if self._hit is not None:
            return "", self._hit
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            _, cut, self._hit = min(found)
            self._held = ""
        else:
            cut = len(held) - begun(held, self._stops)
            self._held = held[cut:]
        return held[:cut], self._hit

    def flush(self) -> str:
        """The end of the stream: the text held back in case a stop string was beginning."""
        held, self._held = self._held, ""
        return held


def begun(text: str, marks: Sequence[str]) -> int:
    """Length in characters of the longest end of `text` that is the beginning, but not the whole, of a mark."""
    longest = max(map(len, marks), default=0) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(len(mark) > n and mark.startswith(text[-n:]) for mark in marks)), 0)


def refuse_surrogates(text: str) -> None:
    """Raises UsageError if the text holds half of a surrogate pair, which UTF-8 cannot."""
    # Encoding is a quicker test than searching, and most text passes it.
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        found = f"U+{ord(text[cause.start]):04X} at character {cause.start}"
        raise UsageError(f"the text holds the lone surrogate {found}; it was cut or decoded wrongly") from None
