"""Ways to ask for a story, and what the model says around one.

Templates only; {t} is a topic such as "a brave frog", {s} a first sentence, {w} a list of words.
"""

from __future__ import annotations

import random

from localmoe.mini.smalltalk import loosely
from localmoe.mini.stories import Facts, article
from localmoe.mini.words import phrases

_ABOUT = """Tell me a story about {t}.
Tell me a story about {t}, please.
Please tell me a story about {t}.
Can you tell me a story about {t}?
Could you tell me a story about {t}?
Could you please tell me a short story about {t}?
Tell me a short story about {t}.
Tell me a bedtime story about {t}.
Tell me a little story about {t}.
Tell me about {t}.
Tell us a story about {t}.
Tell my kids a story about {t}.
Write a story about {t}.
Write a short story about {t}.
Write me a story about {t}.
Please write a short story about {t}.
Can you write a story about {t}?
Write a children's story about {t}.
Write a bedtime story about {t}.
Write a simple story about {t}.
I want a story about {t}.
I want to hear a story about {t}.
I want a bedtime story about {t}.
I would like a story about {t}.
I would like to hear a story about {t}, please.
I'd like a short story about {t}.
I'd love to hear about {t}.
Give me a story about {t}.
Give me a short story about {t}, please.
Make up a story about {t}.
Make a story about {t}.
Invent a story about {t}.
Do you know a story about {t}?
Do you have a story about {t}?
Let's hear a story about {t}.
May I have a story about {t}?
How about a story about {t}?
What about a story about {t}?
Story about {t}
Story about {t}, please.
A story about {t}
A story about {t}, please!
A short story about {t}, please.
Short story: {t}
Once more, a story about {t}.
My daughter wants a story about {t}.
My son would like a story about {t}.
Hi! Tell me a story about {t}.
Hello, can you tell me a story about {t}?
Hey, tell me a story about {t}.
Please tell a story with {t} in it.
Tell me a story with {t} in it.
Can you tell me a story with {t}?
I need a story about {t}.
Read me a story about {t}.
Tell me the story of {t}.
Make it a story about {t}.
Tell me something about {t}, like a fairy tale.
Surprise me with a story about {t}.
{t}
It's bedtime. Tell me a story about {t}."""
ABOUT = _ABOUT.splitlines()
PLAIN = phrases("""Tell me a story. | Tell me a short story. | Can you tell me a story? | I want a story. | Please
    tell me a story. | A story, please. | Write a story. | Write a short story for children. | Tell me a bedtime
    story. | Another story! | I can't sleep. Tell me a story. | Tell me any story. | Surprise me with a story.""")
WORDS = phrases("""Write a story with the words {w}. | Tell me a story with these words: {w}. | Use the words {w} in
    a story. | Can you write a story that has the words {w}? | Story words: {w}""")
BEGIN = phrases("""Tell me a story that begins like this: "{s}" | Write a story that starts with "{s}" | Start a
    story with: {s} | Write a story. It begins: {s}""")
CONTINUE = phrases("""Continue this story: {s} | Go on with this story: {s} | Please finish this story. {s} | What
    happens next? {s} | Finish the story: {s} | Continue: {s}""")
AGAIN = phrases("""Another one, please. | Another one! | One more, please. | Tell me another story. | Again! | More!
    | Another story | Can I have another one? | That was nice. Another one? | Please tell me one more.""")
NOW = phrases("""Now one about {t}. | Now tell me one about {t}. | And now a story about {t}. | Another one, about
    {t}, please. | Can you tell one about {t}? | Great! Now {t}. | Thanks! Now a story about {t}, please. | One about
    {t}, please. | Nice. Tell me a story about {t} too.""")
TALK_THOUGHTS = phrases("""This is not a request for a story. I will answer in a few words. | The user is talking to
    me. I will be kind. | I can answer this shortly. | I should answer in simple words and be honest.""")
SYSTEMS = phrases("""You are a helpful assistant. | You tell short stories. | You are a friendly story teller. | You
    are localmoe-mini. | You are a kind assistant who tells stories to children. | You are localmoe-mini, a small
    model that tells stories. | Tell stories for small children. | Answer briefly. | Be kind and use simple words. |
    You are a helpful assistant that tells stories.""")


def about(topic: str, rng: random.Random) -> str:
    """A request for a story about the topic, a fifth of them in the plainest words."""
    frame = ABOUT[0] if rng.random() < 0.2 else rng.choice(ABOUT)
    return loosely(frame.format(t=topic), rng)


def topic_only(topic: str, rng: random.Random) -> str:
    """The bare topic, as an answer to "What should it be about?"."""
    frames = ["{t}", "{t}.", "{t}, please.", "About {t}.", "{t}!"]
    text = rng.choice(frames).format(t=topic)
    return text if rng.random() < 0.3 else text[0].upper() + text[1:]


def now_about(topic: str, rng: random.Random) -> str:
    """A request for a next story, about the topic."""
    return loosely(rng.choice(NOW).format(t=topic), rng)


def with_words(facts: Facts, rng: random.Random) -> str | None:
    """A request for a story with two or three given words, or None if the story offers too few."""
    phrases = [*facts.objects, facts.kind or "", facts.place or ""]
    nouns = list(dict.fromkeys(phrase.split()[-1] for phrase in phrases if phrase))
    if len(nouns) < 2:
        return None
    chosen = rng.sample(nouns, min(len(nouns), rng.choice([2, 3, 3])))
    listed = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    return loosely(rng.choice(WORDS).format(w=listed), rng)


def question(facts: Facts, rng: random.Random) -> tuple[str, str] | None:
    """A question about the story just told with its short answer, or None if nothing reliable is known."""
    options: list[tuple[str, str]] = []
    person, whose = {"she": ("She", "Her"), "he": ("He", "His"), "it": ("It", "Its")}[facts.pronoun]
    if facts.name and facts.kind:
        ask = rng.choice(["What was the name of the {}?", "What was the {}'s name?", "What was the {} called?"])
        options += [(ask.format(facts.kind), f"{whose} name was {facts.name}.")] * 2
        hero = article(facts.kind)
        options.append((f"Who was {facts.name}?", f"{facts.name} was {hero}."))
        options.append(("Who was the story about?", f"It was about {hero} named {facts.name}."))
    if facts.name and facts.lesson:
        learned = f"{person} learned that {facts.lesson}."
        options.append((rng.choice([f"What did {facts.name} learn?", "What is the lesson of the story?"]), learned))
    return rng.choice(options) if options else None


def thought(topic: str, facts: Facts, rng: random.Random) -> str:
    """A short plan before a story: what is asked, who the hero is, how it may go."""
    parts = [rng.choice([f"The user wants a story about {topic}.", f"I should tell a story about {topic}.",
                         f"A story about {topic}. I can do that."])]  # fmt: skip
    if facts.name and facts.kind:
        parts.append(
            rng.choice([f"I will call the {facts.kind} {facts.name}.", f"The {facts.kind} can be named {facts.name}."])
        )
    if facts.found:
        parts.append(f"There can be {facts.found} in it.")
    elif facts.place:
        parts.append(f"It can happen in {facts.place}.")
    parts.append(rng.choice(["It should be short and kind.", "I will use simple words.", "I will keep it short.",
                             "It should have a good ending."]))  # fmt: skip
    return " ".join(parts)
