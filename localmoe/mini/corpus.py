"""The training text of localmoe-mini: stories and small talk as DeepSeek-V4 chat documents, in token ids.

Owns the mix of documents, their rendering by DeepSeek's own encoder, and the files the trainer reads:
  train.bin, held_out.bin            uint16 token ids, documents back to back, each BOS ... EOS
  train_mask.bin, held_out_mask.bin  uint8, 1 where the token is something the model should say (a training target)
  corpus.json                        counts per kind, sizes, options
Memory: all documents as text, about twice the story files per view.
Example: python -m localmoe.mini.corpus stories.txt.gz --out DIR [--tokenizer DIR/tokenizer.json] [--views 4]
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import deepseek_recipe as recipe
import numpy as np
from tokenizers import Tokenizer

from localmoe.mini import smalltalk
from localmoe.mini import story_requests as requests
from localmoe.mini.bpe import VOCAB_SIZE, TextEncoder, save_tokenizer, train_tokenizer
from localmoe.mini.chat_document import Document, encode, render
from localmoe.mini.replies import ASKING, GREETING, THANKS
from localmoe.mini.stories import find_facts, is_held_out, read_stories, topics, vary

BATCH = 2000  # documents encoded at once
# Share of story documents per kind; what a story cannot offer (no topic, no answerable question) falls back to "story".
KINDS = {
    "story": 0.645,  # request, story
    "plain": 0.10,  # no chat at all
    "continue": 0.04,  # the first sentences are given; the rest is told
    "begin": 0.025,  # the first sentences are given; all is told
    "words": 0.03,  # two or three words to use
    "second": 0.05,  # another story after the first
    "question": 0.05,  # a question about the story just told
    "greeted": 0.03,  # small talk first
    "thinking": 0.03,  # a short plan in thinking mode
}
SMALL_TALK, TOOL_USE = 0.16, 0.005  # documents per story document; both kinds are short or rare, so few tokens


def _chat(kind: str, turns: Sequence[tuple[str, str]], rng: random.Random) -> Document:
    messages: list[recipe.Message] = []
    if rng.random() < 0.15:
        messages.append(recipe.SystemMessage(rng.choice(requests.SYSTEMS)))
    for user, assistant in turns:
        messages += [recipe.UserMessage(user), recipe.AssistantMessage(assistant)]
    return Document(kind, tuple(messages))


def _asked(story: str, rng: random.Random) -> tuple[str, str | None]:
    """A request for the story, and its topic if it names one."""
    found = topics(find_facts(story), rng)
    if not found or rng.random() < 0.05:
        return rng.choice(requests.PLAIN), None
    topic = rng.choice(found)
    return requests.about(topic, rng), topic


def _second(story: str, other: str, rng: random.Random) -> Document:
    found = topics(find_facts(other), rng)
    again = requests.now_about(rng.choice(found), rng) if found and rng.random() < 0.7 else rng.choice(requests.AGAIN)
    return _chat("second", [(_asked(story, rng)[0], story), (again, other)], rng)


def _question(story: str, rng: random.Random) -> Document | None:
    answered = requests.question(find_facts(story), rng)
    if not answered:
        return None
    turns = [(_asked(story, rng)[0], story), answered]
    if rng.random() < 0.3:
        turns.append((rng.choice(THANKS[0]), rng.choice(THANKS[1])))
    return _chat("question", turns, rng)


def _greeted(story: str, rng: random.Random) -> Document:
    """A greeting, or a wish for some story and the model's question, before the request."""
    user, topic = _asked(story, rng)
    if topic and rng.random() < 0.4:
        first = (rng.choice(requests.PLAIN + ASKING[0]), rng.choice(ASKING[1]))
        return _chat("greeted", [first, (requests.topic_only(topic, rng), story)], rng)
    return _chat("greeted", [(rng.choice(GREETING[0]), rng.choice(GREETING[1])), (user, story)], rng)


def _thinking(story: str, rng: random.Random) -> Document | None:
    user, topic = _asked(story, rng)
    if not topic:
        return None
    effort: Literal["low", "high"] = "low" if rng.random() < 0.6 else "high"
    reasoning = requests.thought(topic, find_facts(story), rng)
    messages = (recipe.UserMessage(user), recipe.AssistantMessage(story))
    return Document("thinking", messages, "thinking", reasoning, effort=effort)


def _split_start(story: str, rng: random.Random) -> tuple[str, str]:
    """The first one or two sentences, and the rest."""
    ends = [
        i + 1 for i in range(20, len(story) - 120) if story[i] == "." and story[i + 1] in " \n" and '"' not in story[:i]
    ]
    if not ends:
        return story, ""
    cut = rng.choice(ends[:2])
    return story[:cut], story[cut:].strip()


def _begun(kind: str, story: str, rng: random.Random) -> Document | None:
    start, rest = _split_start(story, rng)
    if not rest:
        return None
    frames, reply = (requests.CONTINUE, rest) if kind == "continue" else (requests.BEGIN, story)
    return _chat(kind, [(rng.choice(frames).format(s=start), reply)], rng)


def story_document(kind: str, story: str, other: str, rng: random.Random) -> Document:
    """A document of the kind; "second" also tells the other story. What a story cannot offer becomes "story"."""
    made: Document | None = None
    if kind == "plain":
        return Document("plain", (recipe.AssistantMessage(story),), "plain")
    if kind == "second":
        return _second(story, other, rng)
    if kind in ("continue", "begin"):
        made = _begun(kind, story, rng)
    elif kind == "question":
        made = _question(story, rng)
    elif kind == "thinking":
        made = _thinking(story, rng)
    elif kind == "words" and (user := requests.with_words(find_facts(story), rng)):
        made = _chat("words", [(user, story)], rng)
    elif kind == "greeted":
        made = _greeted(story, rng)
    if made:
        return made
    turns = [(_asked(story, rng)[0], story)]
    if rng.random() < 0.05:
        turns.append((rng.choice(THANKS[0]), rng.choice(THANKS[1])))
    return _chat("story", turns, rng)


def small_talk_document(rng: random.Random) -> Document:
    """One to three short exchanges; some with the last one in thinking mode."""
    talk = _chat("small talk", smalltalk.small_talk(rng), rng)
    if rng.random() < 0.92:
        return talk
    effort: Literal["low", "high"] = "low" if rng.random() < 0.6 else "high"
    return Document(talk.kind, talk.messages, "thinking", rng.choice(requests.TALK_THOUGHTS), effort=effort)


def tool_document(rng: random.Random) -> Document:
    """A declared tool, a request, and the model's call; in half of them also the result and the answer."""
    tools, user, call, result, answer = smalltalk.tool_use(rng)
    called = recipe.AssistantMessage("", tool_calls=[recipe.ToolCall("1", call["name"], call["arguments"])])
    messages: tuple[recipe.Message, ...] = (recipe.UserMessage(user), called)
    if rng.random() < 0.5:
        messages += (recipe.ToolMessage(result, tool_call_id="1"), recipe.AssistantMessage(answer))
    return Document("tools", messages, tools=tuple(tools))


def documents(stories: Sequence[str], views: int, seed: int) -> list[Document]:
    """All documents of one split, shuffled. views: how many different documents each story appears in."""
    rng = random.Random(seed)
    made = []
    for _view in range(views):
        for story in stories:
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            made.append(story_document(kind, vary(story, rng), vary(rng.choice(stories), rng), rng))
    told = len(made)
    made += [small_talk_document(rng) for _ in range(int(told * SMALL_TALK))]
    made += [tool_document(rng) for _ in range(int(told * TOOL_USE))]
    rng.shuffle(made)
    return made


def write_split(name: str, made: Sequence[Document], encoder: TextEncoder, out_dir: Path) -> dict[str, Any]:
    """Write NAME.bin and NAME_mask.bin; returns the counts for corpus.json."""
    tokens_of: Counter[str] = Counter()
    targets = 0
    paths = out_dir / f"{name}.bin", out_dir / f"{name}_mask.bin"
    # Under other names first: a training may have the files of an earlier build mapped.
    parts = [path.with_suffix(".part") for path in paths]
    with parts[0].open("wb") as ids_file, parts[1].open("wb") as mask_file:
        for start in range(0, len(made), BATCH):
            batch = made[start : start + BATCH]
            for document, (ids, mask) in zip(batch, encode(batch, encoder), strict=True):
                ids_file.write(np.asarray(ids, dtype="<u2").tobytes())
                mask_file.write(bytes(mask))
                tokens_of[document.kind] += len(ids)
                targets += sum(mask)
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)
    counts = Counter(document.kind for document in made)
    kinds = {kind: {"documents": counts[kind], "tokens": tokens_of[kind]} for kind in sorted(counts)}
    return {"documents": len(made), "tokens": tokens_of.total(), "targets": targets, "kinds": kinds}


def build(
    sources: Sequence[Path], out_dir: Path, *, seed: int = 1, views: int = 4, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Write the corpus, and a tokenizer trained on it unless one is given; returns what corpus.json holds.

    A run that already trains must keep its tokenizer: rebuild with tokenizer=out_dir / "tokenizer.json".
    """
    stories = read_stories(sources)
    parts = {"train": [s for s in stories if not is_held_out(s)], "held_out": [s for s in stories if is_held_out(s)]}
    made = {"train": documents(parts["train"], views, seed), "held_out": documents(parts["held_out"], 1, seed + 1)}
    out_dir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        bpe = Tokenizer.from_file(str(tokenizer))
    else:
        texts = (text for document in made["train"] for text, control, _ in render(document) if not control)
        bpe = train_tokenizer(texts, VOCAB_SIZE)
    if not tokenizer or tokenizer.resolve().parent != out_dir.resolve():
        save_tokenizer(bpe, out_dir)
    encoder = TextEncoder(bpe)
    sample = parts["train"][:1000]
    report: dict[str, Any] = {
        "seed": seed,
        "views": views,
        "stories": {name: len(part) for name, part in parts.items()},
    }
    report["story_chars_per_token"] = round(
        sum(map(len, sample)) / max(1, sum(map(len, encoder.encode_batch(sample)))), 3
    )
    report |= {name: write_split(name, part, encoder, out_dir) for name, part in made.items()}
    (out_dir / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", type=Path, nargs="+", help="story files (.txt or .txt.gz), separated by <|endoftext|>"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--views", type=int, default=4, help="documents per story, each with another request and cast")
    parser.add_argument("--tokenizer", type=Path, help="keep this tokenizer.json instead of training one")
    args = parser.parse_args()
    report = build(args.sources, args.out, seed=args.seed, views=args.views, tokenizer=args.tokenizer)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
