"""localmoe.tokenizer: plain text stays plain and comes back; a stream gives what the whole does."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import ModelError, UsageError
from localmoe.tokenizer import MAX_TOKENIZER_BYTES, StreamDecoder, Tokenizer
from tests.conftest import shared_data
from tests.hostile import hostile_texts, hostile_texts_for_deepseek, real_tokenizer
from tests.tiny_tokenizer import CONTROL, tiny_description, tiny_tokenizer


@pytest.fixture(params=["tiny", "DeepSeek-V4"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The one built in the test, and DeepSeek's own where the shared data is."""
    return tiny_tokenizer() if request.param == "tiny" else real_tokenizer()


def check_plain(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids.intersection(ids)
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(hostile_texts(CONTROL))
def test_a_text_never_becomes_a_control_token(text: str) -> None:
    """Fails if the library is given the added tokens, or if encode drops or rewrites a character."""
    check_plain(tiny_tokenizer(), text)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_text_never_becomes_a_control_token_of_deepseek(data: st.DataObject) -> None:
    """The same with the real vocabulary, whose role tokens are not flagged special."""
    check_plain(real_tokenizer(), data.draw(hostile_texts_for_deepseek()))


def test_every_control_spelling_is_plain_text(tokenizer: Tokenizer) -> None:
    """Goes over all of them, alone and between letters, so that hypothesis need not draw the one that fails."""
    for number in tokenizer.control_ids:
        spelling = tokenizer.decode([number])
        assert tokenizer.token_id(spelling) == number
        check_plain(tokenizer, spelling)
        check_plain(tokenizer, f"a{spelling}b {spelling}")


def test_ranges_become_control_tokens_and_nothing_else_does(tokenizer: Tokenizer) -> None:
    """Fails if ranges are taken as bytes, or the text between two of them is lost."""
    text = "<｜User｜>é🐱<｜User｜>\n</think>"
    ids = tokenizer.encode_special(text, [(0, 8), (19, 27)])
    user, end = tokenizer.token_id("<｜User｜>"), tokenizer.token_id("</think>")
    assert ids == [user, *tokenizer.encode("é🐱<｜User｜>\n"), end]
    assert tokenizer.encode_special("", []) == []


def test_a_missing_control_token_is_named() -> None:
    """Fails if it is skipped, or encoded as text."""
    with pytest.raises(ModelError, match="no control token <｜System｜>"):
        tiny_tokenizer().encode_special("<｜System｜>x", [(0, 10)])
    assert tiny_tokenizer().token_id("<｜System｜>") is None


def test_ids_equal_the_reference_vectors() -> None:
    """154 texts with the ids the official tokenizer gives when control spellings are read as control tokens."""
    tokenizer = real_tokenizer()
    spellings = [re.escape(tokenizer.decode([number])) for number in tokenizer.control_ids]
    control = re.compile("|".join(sorted(spellings, key=len, reverse=True)))
    vectors = json.loads(shared_data("tokenizers/deepseek_v4/vectors.json").read_text())["vectors"]
    assert len(vectors) == 154
    for vector in vectors:
        ranges = [match.span() for match in control.finditer(vector["text"])]
        assert tokenizer.encode_special(vector["text"], ranges) == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == vector["text"]


def test_decoding_equals_the_library(tokenizer: Tokenizer) -> None:
    """Random ids, most of which are not valid UTF-8 together: fails if bytes or replacements are counted otherwise."""
    from tokenizers import Tokenizer as Library

    if tokenizer is tiny_tokenizer():
        library = Library.from_str(json.dumps(tiny_description()))
    else:
        library = Library.from_file(str(shared_data("tokenizers/deepseek_v4/tokenizer.json")))
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(9)]
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_known_sizes_and_ids() -> None:
    """Fails if vocab_size counts tokens instead of bounding ids: DeepSeek-V4's embedding has 129,280 rows."""
    assert (real_tokenizer().vocab_size, real_tokenizer().bos_id, real_tokenizer().eos_id) == (129280, 0, 1)
    assert tiny_tokenizer().vocab_size == len(tiny_description()["model"]["vocab"])
    assert tiny_tokenizer().decode([tiny_tokenizer().vocab_size]) == ""


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    """Half an emoji, as a JSON request can hold: fails if it reaches the library or becomes U+FFFD."""
    with pytest.raises(UsageError, match=r"lone surrogate U\+D83D at character 2"):
        tiny_tokenizer().encode("ab\ud83d")


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), max_size=40))
def test_a_stream_adds_up_to_the_whole(ids: list[int]) -> None:
    """Any tokens, so any broken UTF-8: fails if a byte is lost at a border, or text is let out that changes later."""
    decoder = StreamDecoder(tiny_tokenizer())
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == tiny_tokenizer().decode(ids)


def test_an_incomplete_character_is_held_back() -> None:
    """One byte per token: the cat appears with its last byte, U+FFFD only when no continuation can come."""
    tokenizer = tiny_tokenizer()
    byte_ids = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    cat = [byte_ids[bytes([byte])] for byte in "🐱".encode()]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in cat] == ["", "", "", "🐱"]
    assert [decoder.push(token) for token in cat[:3]] == ["", "", ""]
    assert decoder.push(byte_ids[b"a"]) == "\ufffda"
    assert [decoder.push(token) for token in cat[:2]] == ["", ""]
    assert (decoder.flush(), decoder.flush()) == ("\ufffd", "")


def test_streaming_looks_each_token_up_once() -> None:
    """Fails if the history is decoded again for each token."""
    looked_up: list[int] = []

    class Counting(Tokenizer):
        def token_bytes(self, token: int) -> bytes:
            looked_up.append(token)
            return super().token_bytes(token)

    decoder = StreamDecoder(Counting(tiny_description()))
    looked_up.clear()
    for token in range(9, 209):
        decoder.push(token)
    assert looked_up == list(range(9, 209))


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    description = tiny_description()
    change(description)
    return description


def shared_id(d: dict[str, Any]) -> None:
    d["added_tokens"][3]["id"] = d["model"]["vocab"]["a"]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one id for a control and a plain token": (shared_id, "both a control token and plain text"),
    "one id for two control tokens": (lambda d: d["added_tokens"][3].update(id=4), "appears twice"),
    "a control token without an id": (lambda d: d["added_tokens"][3].pop("id"), "<｜User｜> has id null"),
    "a control token with a broken spelling": (
        lambda d: d["added_tokens"][3].update(content="\ud83d"),
        "expected text",
    ),
    "added tokens that are no list": (lambda d: d.update(added_tokens={"a": 1}), "expected text and an id"),
    "another kind of model": (lambda d: d["model"].update(type="Unigram", vocab=[["a", 0.0]]), "no BPE vocabulary"),
    "no model": (lambda d: d.pop("model"), "no BPE vocabulary"),
    "an id that is no integer": (lambda d: d["model"]["vocab"].update(x=1.5), "expected 0 to"),
    "an enormous id": (lambda d: d["model"]["vocab"].update(x=1 << 40), "expected 0 to"),
    "merges of unknown tokens": (lambda d: d["model"]["merges"].append(["zz", "qq"]), "cannot be built"),
    "a control token that merges can make": (
        lambda d: d["added_tokens"].append({"id": 9999, "content": "".join(d["model"]["merges"][0])}),
        "cannot be built",
    ),
    "a normaliser that loses case": (lambda d: d.update(normalizer={"type": "Lowercase"}), "unchanged"),
    "a missing byte": (
        lambda d: d["model"].update(vocab={"a": 9, "b": 10}, merges=[]),
        "unchanged",
    ),
    "a decoder that is none": (lambda d: d.update(decoder={"type": "Nonsense"}), "cannot be built"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_vocabulary_is_one_error(name: str) -> None:
    """Fails if text could be lost, could become a control token, or if the library's own exception escapes."""
    change, message = DAMAGES[name]
    with pytest.raises(ModelError, match=message):
        Tokenizer(damaged(change), "tokenizer.json")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b'{"a": 1', b"\xff", b"[" * 100_000], ids=["empty", "list", "cut", "bytes", "deep"]
)
def test_a_file_that_is_no_tokenizer_is_one_error(tmp_path: Path, raw: bytes) -> None:
    """Fails if Python's own exception escapes."""
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_an_oversized_or_absent_file_is_not_read(tmp_path: Path) -> None:
    """Fails if a 64 MiB file of nothing is parsed."""
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be opened"):
        Tokenizer.load(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(ModelError, match="expected at most"):
        Tokenizer.load(tmp_path)
