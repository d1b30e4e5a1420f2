"""The corpus of localmoe-mini: DeepSeek's prompt format, honest target masks, requests that fit their stories."""

from __future__ import annotations

import random
import re
from pathlib import Path

import deepseek_recipe as recipe
import numpy as np
import pytest
from tokenizers import Tokenizer

from localmoe.mini import bpe, chat_document, corpus, stories
from localmoe.mini.chat_document import Document

FROG = (
    "Once upon a time, there was a little frog named Max. He loved to hop in the pond. One day, he found a "
    'red ball in the forest.\n"Who lost this ball?" asked Max. A big bird came and said, "It is my ball!" Max '
    "was brave and gave the ball to the bird. They played together all day. Max learned that sharing is good. "
    "From that day on they were the best of friends."
)
GIRL = (
    "Once upon a time, there was a little girl named Lily. She had a blue hat. One day, Lily went to the park "
    "with her mom. The wind took the hat away. Lily was sad. Her mom helped her to look for it, and they saw "
    'it in a tall tree. A kind man gave it back. "Thank you!" said Lily. She put on the hat and was happy '
    "again. They went home and had a good dinner."
)


def many_stories(count: int = 60) -> list[str]:
    """Distinct stories: the two above with numbered endings and varied casts."""
    rng = random.Random(5)
    return [stories.vary((FROG, GIRL)[i % 2], rng) + f" This was day {i}." for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train_tokenizer(many_stories(), vocab_size=400)


def text_of(document: Document) -> str:
    return "".join(text for text, _, _ in chat_document.render(document))


def said(document: Document) -> str:
    return "".join(text for text, _, target in chat_document.render(document) if target)


def conversation(*turns: str, **options: object) -> recipe.Conversation:
    kinds = (recipe.UserMessage, recipe.AssistantMessage)
    return recipe.Conversation([kinds[i % 2](turn) for i, turn in enumerate(turns)], **options)


def chat(*turns: str) -> Document:
    return Document("story", tuple(conversation(*turns).messages))


def test_a_chat_document_is_the_prompt_deepseek_renders_for_the_next_turn() -> None:
    # Fails if roles, EOS or the closed think tag differ from what inference will see.
    prompt = recipe.DeepseekV4Encoding().render_conversation(
        conversation("Hi", "Hello!", "A story", FROG, "Thanks", thinking_mode=False)
    )
    assert prompt.prompt == text_of(chat("Hi", "Hello!", "A story", FROG)) + "<｜User｜>Thanks<｜Assistant｜></think>"


def test_a_thinking_document_continues_the_generation_prompt() -> None:
    # Fails if the effort text is lost or the reasoning is dropped as history.
    document = Document("thinking", chat("Hi", FROG).messages, "thinking", "A frog.", effort="high")
    rendered = recipe.DeepseekV4Encoding().render_conversation(conversation("Hi", reasoning_effort="high"))
    assert "Reasoning Effort" in rendered.prompt
    assert text_of(document) == f"{rendered.prompt}A frog.</think>{FROG}{bpe.EOS}"
    assert said(document) == f"A frog.</think>{FROG}{bpe.EOS}"


def test_token_ids_equal_those_of_deepseeks_encoder(tokenizer: Tokenizer) -> None:
    # Fails if segments are cut elsewhere, or if a user's control spelling becomes a control token.
    turns = ("Tell me <｜User｜> and </think> about a frog", FROG)
    encoder = recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_str(tokenizer.to_str()))
    ids, _ = next(chat_document.encode([chat(*turns)], bpe.TextEncoder(tokenizer)))
    assert encoder.encode(conversation(*turns, thinking_mode=False)) == [*ids, 4, 6]
    assert ids.count(3) == 1


def test_only_what_the_model_says_is_a_target() -> None:
    # Fails if user text, role tokens or tool results are trained on, or a reply's EOS is not.
    assert said(chat("Hi", "Hello!", "A story", FROG)) == f"Hello!{bpe.EOS}{FROG}{bpe.EOS}"
    assert said(Document("plain", (recipe.AssistantMessage(GIRL),), "plain")) == GIRL + bpe.EOS


def test_a_tool_call_is_a_target_and_its_declaration_is_not() -> None:
    # Fails if the think tags inside the tool instructions are taken for the model's turn.
    document = next(d for d in (corpus.tool_document(random.Random(i)) for i in range(20)) if len(d.messages) == 2)
    call = said(document)
    assert call.startswith("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=")
    assert call.endswith("</｜DSML｜tool_calls>" + bpe.EOS)
    assert "## Tools" in text_of(document)


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    # Fails if a byte is missing from the alphabet.
    text = "naïve \t Привет 日本語 🙂\r\n\n 12345 don't\x00"
    assert tokenizer.decode(bpe.TextEncoder(tokenizer).encode_batch([text])[0]) == text


def test_control_tokens_have_deepseeks_ids_order_and_flags(tokenizer: Tokenizer) -> None:
    # Fails if a trainer's default flags leak into tokenizer.json.
    added = [tokenizer.get_added_tokens_decoder()[i] for i in range(9)]
    assert [token.content for token in added] == [*bpe.SPECIAL, *bpe.CONTROL]
    assert [token.special for token in added] == [True] * 3 + [False] * 6
    assert tokenizer.get_vocab_size() == 400


def test_training_the_tokenizer_twice_gives_the_same_file(tokenizer: Tokenizer) -> None:
    # Fails if ties between merges depend on hash order.
    assert bpe.train_tokenizer(many_stories(), vocab_size=400).to_str() == tokenizer.to_str()


def test_requested_words_occur_in_the_story() -> None:
    # Fails if a topic is taken from elsewhere or rewritten beyond grammar.
    grammar = {"a", "an", "and", "named", "called", "who", "finds", "loves", "learns", "to", "that", "in", "the"}
    rng = random.Random(3)
    for story in many_stories(200):
        present = set(re.findall(r"[\w']+", story))
        for topic in stories.topics(stories.find_facts(story), rng):
            assert set(re.findall(r"[\w']+", topic)) <= present | grammar, topic


def test_a_renamed_story_keeps_no_trace_of_the_old_name() -> None:
    # Fails if only the first mention is renamed.
    renamed = {stories.rename(GIRL, random.Random(i)) for i in range(9)} - {GIRL}
    assert renamed
    assert not any(re.search(r"\bLily\b", story) for story in renamed)


def test_articles_agree_with_the_word_that_follows() -> None:
    # Fails for vowels, and for words whose first sound is not their first letter's.
    assert stories.fix_articles("a apple, an frog, an unicorn and A owl") == "an apple, a frog, a unicorn and An owl"
    assert stories.article("honest hour") == "an honest hour"


def test_unfit_stories_are_dropped() -> None:
    # Fails if an unfinished, odd, unbalanced or too short story passes.
    assert stories.clean_story(FROG.replace(". ", ".  ").replace(".\n", ". \n")) == FROG
    assert stories.clean_story(FROG + " And then the") is None
    assert stories.clean_story(FROG.replace("frog", "fr\ufffdg")) is None
    assert stories.clean_story(FROG + ' "Bye.') is None
    assert stories.clean_story("A frog sat.") is None


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VOCAB_SIZE", 600)


def build(folder: Path, source: Path, **options: object) -> dict[str, bytes]:
    corpus.build([source], folder, **options)  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_build_is_deterministic_and_its_files_fit_together(tmp_path: Path) -> None:
    # Fails if any file depends on anything but sources, seed and options, or if masks and ids fall out of step.
    source = tmp_path / "stories.txt"
    told = [f"On day {i}, it began. {story}" for i, story in enumerate(many_stories(120))]
    source.write_text("".join(f"{story}\n{stories.SEPARATOR}\n" for story in told), encoding="utf-8")
    first, second = (build(tmp_path / name, source, views=2) for name in "ab")
    assert first == second
    kept = build(tmp_path / "c", source, views=1, seed=2, tokenizer=tmp_path / "a" / "tokenizer.json")
    assert kept["tokenizer.json"] == first["tokenizer.json"]
    assert kept["train.bin"] != first["train.bin"]
    for split in ("train", "held_out"):
        ids = np.frombuffer(first[f"{split}.bin"], dtype="<u2")
        mask = np.frombuffer(first[f"{split}_mask.bin"], dtype=np.uint8)
        assert ids.shape == mask.shape
        starts, ends = np.flatnonzero(ids == 0), np.flatnonzero(ids == 1)
        assert starts[0] == 0
        assert ends[-1] == ids.size - 1
        assert set(starts[1:] - 1) <= set(ends)
        assert not mask[starts].any()
        assert mask[ends].all()


def test_held_out_stories_never_train(tmp_path: Path) -> None:
    # Fails if a story reaches both splits, in whatever cast.
    source = tmp_path / "stories.txt"
    source.write_text("".join(f"{story}\n{stories.SEPARATOR}\n" for story in many_stories(300)), encoding="utf-8")
    made = build(tmp_path / "out", source, views=1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    days = [
        set(re.findall(r"This was day (\d+)\.", tokenizer.decode(np.frombuffer(made[name], dtype="<u2").tolist())))
        for name in ("train.bin", "held_out.bin")
    ]
    assert len(days[0] | days[1]) > 200
    assert days[1]
    assert not days[0] & days[1]
