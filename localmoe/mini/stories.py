"""Stories: reading, cleaning, recasting with other names and animals, and finding what one could have asked for.

Owns the text of stories and the phrases found in them. Knows nothing of chats, tokens or files other than story files.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from localmoe.mini import words

SEPARATOR = "<|endoftext|>"
SHORTEST, LONGEST = 250, 1300  # characters
HELD_OUT_PERCENT = 2

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-"})
_ODD = re.compile(r"[^ -~\n]|[<>{}\[\]_\\^|~@#]")
_UNKIND = re.compile(
    r"\b(gun|guns|kill|kills|killed|killing|blood|bloody|drunk|murder|suicide|corpse)\b", re.IGNORECASE
)
# "A funny lion and a brave chicken. They ..." or "... and a king was ...": an opening that is no sentence.
_FRAGMENT = re.compile(r"An? [a-z ]+ and an? [a-z]+ [a-z]+(?:\.| was )")
_HEROES = [*words.ANIMALS, *words.PEOPLE]
# Longest first, so that "a treasure chest" is not cut to "a treasure".
_THINGS = sorted({*words.COMPOUND_THINGS, *words.THINGS, *words.ANIMALS}, key=lambda w: (-len(w), w))
_ADJ = rf"(?:(?:very )?(?:{'|'.join(words.ADJECTIVES)}),? (?:and )?)"
_HERO = re.compile(rf"\b([Aa]n? )((?:{_ADJ}){{0,3}})({'|'.join(_HEROES)})\b(?:,? (?:named|called) ([A-Z][a-z]+)\b)?")
_OBJECT = re.compile(
    rf"\b(an? (?:{_ADJ}){{0,2}}(?:{'|'.join(_THINGS)}))\b(?! (?:named|called|[a-z]*house|room|friend))"
)
_FOUND = re.compile(rf"\b(?:found|saw|finds) (an? (?:{_ADJ}){{0,2}}(?:{'|'.join(_THINGS)}))\b")
_LOVED = re.compile(
    r"\b(?:[Ss]he|[Hh]e|[A-Z][a-z]+) (?:loved|liked) to ((?:play|eat|run|swim|sing|dance|draw|read|paint|climb"
    r"|jump|explore|ride|cook|help|hop|fly|sleep|hug|collect|build)(?: [a-z]+){0,4}?)(?: every day)?(?=[.,]| and )"
)
_DANGLING = re.compile(r" (?:with|in|on|at|to|for|it|the|all day|a)$")
_PLACE = re.compile(
    rf"\b(?:in|to|at) ((?:the|an?) (?:{_ADJ})?(?:{'|'.join(words.PLACES)}|house|tree))\b(?! [a-z]*house)"
)
_LESSON = re.compile(r"\blearned that ([a-z][^.!?\"]{12,90})[.!]")
_TELLTALE = re.compile(rf"\b(?:{'|'.join(words.TELLTALES)})\b", re.IGNORECASE)


def clean_story(text: str) -> str | None:
    """The story with tidy white space and plain quotes, or None if it is damaged, unfit, too short or too long."""
    text = re.sub(r"[ \t]+", " ", text.translate(_QUOTES))
    text = re.sub(r" ?\n ?", "\n", text).strip()
    text = re.sub(r"\n{2,}", "\n", text)
    text = re.sub(r" ([.,!?])", r"\1", text)
    ends_well = text.endswith((".", "!", "?", '"'))
    fits = SHORTEST <= len(text) <= LONGEST and text[:1].isupper()
    damaged = text.count('"') % 2 or _ODD.search(text) or _FRAGMENT.match(text)
    if not ends_well or not fits or damaged or _UNKIND.search(text):
        return None
    return text


def read_stories(sources: Iterable[Path]) -> list[str]:
    """Clean stories of all files (.gz or plain, separated by <|endoftext|>), in order, each only once.

    Two stories with the same first and last 100 characters count as the same.
    """
    kept: dict[str, str] = {}
    for path in sources:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            raw = file.read().split(SEPARATOR)
        # What follows the last separator of a plain file may still be being written.
        for piece in raw[:-1]:
            story = clean_story(piece)
            if story:
                kept.setdefault(story[:100] + story[-100:], story)
    return list(kept.values())


def is_held_out(story: str) -> bool:
    """Whether a story (as cleaned, before any recasting) belongs to the held-out part: 2 % by hash."""
    return int.from_bytes(hashlib.sha256(story.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front, by its first letter."""
    word = phrase.split()[0].lower()
    vowel = word.startswith(("a", "e", "i", "o", "u", "hour", "honest")) and not word.startswith(("uni", "use", "one"))
    return f"{'an' if vowel else 'a'} {phrase}"


def fix_articles(text: str) -> str:
    """The text with every "a"/"an" agreeing with the word after it."""
    return re.sub(r"\b([Aa])n? ([a-z]+)", lambda m: m[1] + article(m[2])[1:], text)


def _replace_word(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def pronoun(story: str) -> str:
    """ "she", "he" or "it": the hero's likeliest pronoun, by count."""
    she, he = (len(re.findall(rf"\b(?:{p})\b", story, re.IGNORECASE)) for p in ("she|her", "he|him|his"))
    return "she" if she > he else "he" if he > she else "it"


def rename(story: str, rng: random.Random) -> str:
    """The story with its named hero renamed, where that is safe."""
    hero = _HERO.search(story[:300])
    if not hero or not hero[4] or story.count(hero[4]) < 2:
        return story
    old = hero[4]
    if old == "Timmy" and re.search(r"\bTim\b", story):
        return story
    children = {
        "girl": words.GIRL_NAMES,
        "princess": words.GIRL_NAMES,
        "boy": words.BOY_NAMES,
        "prince": words.BOY_NAMES,
    }
    new = rng.choice(children.get(hero[3], words.ANIMAL_NAMES if hero[3] in words.ANIMALS else [old]))
    return story if new in story else _replace_word(story, old, new)


def recast(story: str, rng: random.Random) -> str:
    """The story with an animal, or another one, as its hero, where nothing betrays the old one."""
    hero = _HERO.search(story[:300])
    if not hero or hero.start() > 60 or hero[3] not in {"girl", "boy", *words.ANIMALS} or _TELLTALE.search(story):
        return story
    old, new = hero[3], rng.choice(words.RECAST_ANIMALS)
    if re.search(rf"\b{new}", story) or len(re.findall(rf"\b{old}s?\b", story)) > 6 or f"{old}s" in story:
        return story
    return fix_articles(_replace_word(_replace_word(story, old, new), old.capitalize(), new.capitalize()))


def describe_hero(story: str, rng: random.Random) -> str:
    """The story with an adjective before its hero's first mention, if that had none but "little"."""
    hero = _HERO.search(story[:300])
    if not hero or hero.start() > 60 or hero[2].strip() not in ("", "little"):
        return story
    # A trait the story itself speaks of, if there is one, so that the adjective means something.
    spoken = [t for t in words.TRAITS if re.search(rf"\b{t}\b", story)]
    described = f"{hero[1]}{rng.choice(spoken or words.HERO_ADJECTIVES)} {hero[2]}{hero[3]}"
    return fix_articles(story[: hero.start()] + described + story[hero.end(3) :])


def vary(story: str, rng: random.Random) -> str:
    """A random variant of a story: other name, other animal, a described hero, or as it is."""
    # Children are far too common among the heroes.
    if rng.random() < (0.4 if re.search(r"\b(?:girl|boy) (?:named|called)\b", story[:150]) else 0.1):
        story = recast(story, rng)
    if rng.random() < 0.55:
        story = rename(story, rng)
    if rng.random() < 0.25:
        story = describe_hero(story, rng)
    return story


@dataclass(frozen=True)
class Facts:
    """What a story offers to ask for; every phrase is made of words of the story."""

    hero: str | None  # "brave little frog", without article
    kind: str | None  # "frog"
    name: str | None
    pronoun: str
    objects: tuple[str, ...]  # "a red ball"
    found: str | None
    loved: str | None  # "play in the park"
    place: str | None  # "the forest"
    lesson: str | None  # "it is important to share"
    traits: tuple[str, ...]  # hero adjectives used anywhere in the story


def _group(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match[1].strip() if match else None


def _tidy(phrase: str) -> str:
    return phrase.replace("very ", "").replace(", ", " ").replace(" and ", " ")


def find_facts(story: str) -> Facts:
    """Read the facts of a story with patterns over word lists; whatever is not found is None."""
    hero = _HERO.search(story[:300])
    described = _tidy(hero[2] + hero[3]) if hero else None
    name = hero[4] if hero else None
    if not name:
        named = re.search(r"\b(?:named|called) ([A-Z][a-z]+)\b", story[:300])
        name = named[1] if named else None
    loved = _group(_LOVED, story)
    objects = dict.fromkeys(o for o in _OBJECT.findall(story) if not hero or hero[3] not in o.split())
    return Facts(
        hero=described,
        kind=hero[3] if hero else None,
        name=None if name in ("Mr", "Mrs", "Miss") else name,
        pronoun=pronoun(story),
        objects=tuple(dict.fromkeys(_tidy(o) for o in objects)),
        found=_tidy(_group(_FOUND, story) or "") or None,
        loved=loved if loved and not _DANGLING.search(loved) else None,
        place=_group(_PLACE, story),
        lesson=_group(_LESSON, story),
        traits=tuple(t for t in words.TRAITS if re.search(rf"\b{t}\b", story)),
    )


def _shorter(hero: str, rng: random.Random) -> str:
    """The hero phrase, sometimes with fewer of its adjectives."""
    *adjectives, kind = hero.split()
    kept = [a for a in adjectives if rng.random() < (0.35 if a == "little" else 0.85)]
    return " ".join([*kept, kind])


def topics(facts: Facts, rng: random.Random) -> list[str]:
    """Noun phrases a request may name ("a brave frog", "a girl named Lily who loves to sing", "a red ball")."""
    found: list[str] = list(facts.objects[:4])
    if facts.hero and facts.kind:
        hero = article(_shorter(facts.hero, rng))
        # Most children in the stories are just "a little girl": asking only for that says nothing.
        plain = facts.hero in ("girl", "boy", "little girl", "little boy")
        found += [hero] if plain else [hero, hero, article(facts.kind)]
        found += [f"{hero} and {thing}" for thing in facts.objects[:2]]
        if facts.name:
            found += [
                f"{hero} {rng.choice(('named', 'called'))} {facts.name}",
                f"{hero} named {facts.name}",
                facts.name,
            ]
        found += [article(f"{trait} {facts.kind}") for trait in facts.traits if trait not in facts.hero][:2]
        named = f"{hero} named {facts.name}" if facts.name and rng.random() < 0.5 else hero
        found += [f"{named} who finds {facts.found}"] if facts.found else []
        found += [f"{named} who loves to {facts.loved}"] if facts.loved else []
        found += [f"{named} in {facts.place}"] if facts.place else []
        found += [f"{named} who learns that {facts.lesson}"] if facts.lesson and len(facts.lesson) < 50 else []
    elif facts.name:
        found.append(facts.name)
    if facts.name:
        found += [f"{facts.name} and {thing}" for thing in facts.objects[:2]]
    return found + ([facts.place] if facts.place and rng.random() < 0.5 else [])
