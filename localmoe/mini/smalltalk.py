"""Short exchanges that are not stories: greetings, who it is, help with localmoe, small facts, honest refusals, tools.

Owns templates only; every function returns new (user, assistant) texts from a random generator.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from localmoe.mini.replies import ANIMAL_FACTS, EXCHANGES, FACTS, NAMES, REFUSALS, UNKNOWN, UNKNOWN_SUBJECTS

Turn = tuple[str, str]


def loosely(text: str, rng: random.Random) -> str:
    """A user's text as people type it: sometimes without capital, final mark or with a please."""
    if rng.random() < 0.12:
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.12 and text[-1:] in ".!?":
        text = text[:-1]
    return text


def chat_turn(rng: random.Random) -> Turn:
    """Greeting, thanks, goodbye, identity, help or another everyday exchange."""
    users, replies = rng.choice(EXCHANGES)
    return loosely(rng.choice(users), rng), rng.choice(replies)


def introduction(rng: random.Random) -> Turn:
    """The user gives a name and is greeted by it."""
    name = rng.choice(NAMES)
    user = rng.choice(["My name is {}.", "I am {}.", "Hi, I'm {}.", "Hello, my name is {}.", "I'm {}. Who are you?"])
    replies = [
        "Hello, {}! I am localmoe-mini. Would you like a story?",
        "It is nice to meet you, {}. I am localmoe-mini.",
        "Nice to meet you, {}!",
        "Hi {}! What story would you like to hear?",
    ]
    reply = rng.choice(replies[:2] if "Who" in user else replies)
    return user.format(name), reply.format(name)


def sum_turn(rng: random.Random) -> Turn:
    """A sum of two numbers up to five is answered; a larger one is honestly refused."""
    a, b = rng.randint(0, 5), rng.randint(0, 5)
    form = rng.choice(["What is {} plus {}?", "What is {} + {}?", "How much is {} plus {}?", "{} + {}", "{}+{}?"])
    if rng.random() < 0.75:
        return form.format(a, b), rng.choice([f"{a} plus {b} is {a + b}.", f"It is {a + b}."])
    big = form.format(rng.randint(11, 999), rng.randint(11, 999)).replace(
        "plus", rng.choice(["plus", "times", "minus"])
    )
    return big, rng.choice(
        [
            "I am not good at big numbers. Please use a calculator.",
            "I do not know. I can only add very small numbers.",
            "That is too hard for me. I am a very small model.",
        ]
    )


def fact_turn(rng: random.Random) -> Turn:
    """One of a few facts a small child knows."""
    if rng.random() < 0.35:
        animal, sound = rng.choice(ANIMAL_FACTS)
        return f"What does a {animal} say?", f"A {animal} says {sound}!"
    user, reply = rng.choice(FACTS)
    return loosely(user, rng), reply


def unknown_turn(rng: random.Random) -> Turn:
    """A question outside a story teller's world, and "I do not know"."""
    if rng.random() < 0.35:
        users, replies = rng.choice(REFUSALS)
        return loosely(rng.choice(users), rng), rng.choice(replies)
    frame, subjects = rng.choice(UNKNOWN_SUBJECTS)
    return loosely(frame.format(rng.choice(subjects)), rng), rng.choice(UNKNOWN)


_KINDS: list[tuple[Callable[[random.Random], Turn], float]] = [
    (chat_turn, 0.58), (introduction, 0.05), (sum_turn, 0.07), (fact_turn, 0.08), (unknown_turn, 0.22),
]  # fmt: skip


def small_talk(rng: random.Random) -> list[Turn]:
    """One to three short exchanges."""
    makers, weights = zip(*_KINDS, strict=True)
    count = rng.choices([1, 2, 3], [0.62, 0.28, 0.10])[0]
    return [maker(rng) for maker in rng.choices(makers, weights, k=count)]


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(properties)}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = [
    _tool("get_weather", "Get the weather of a city.", city="string"),
    _tool("get_time", "Get the current time in a city.", city="string"),
    _tool("roll_dice", "Roll a number of dice.", count="integer"),
    _tool("set_timer", "Set a timer.", minutes="integer"),
    _tool("add", "Add two numbers.", a="integer", b="integer"),
]
_CITIES = ["Paris", "London", "Rome", "Berlin", "Tokyo", "Madrid", "Oslo", "Cairo", "Lima", "Delhi", "Boston", "Vienna"]


def tool_use(rng: random.Random) -> tuple[list[dict[str, Any]], str, dict[str, str], str, str]:
    """Declared tools, the user's request, the call {name, arguments (JSON)}, its result, and the answer."""
    city, n, m = rng.choice(_CITIES), rng.randint(2, 9), rng.randint(2, 9)
    sky, degrees = rng.choice(["sunny", "rainy", "cloudy", "windy"]), rng.randint(1, 30)
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (f"What is the weather in {city}?", {"city": city}, f"{sky}, {degrees} degrees",
         f"It is {sky} in {city}, {degrees} degrees."),
        (f"What time is it in {city}?", {"city": city}, f"{n}:{m}0", f"It is {n}:{m}0 in {city}."),
        (f"Roll {n} dice, please.", {"count": n}, str(n + m), f"The dice show {n + m}."),
        (f"Set a timer for {n} minutes.", {"minutes": n}, "ok", f"The timer is set for {n} minutes."),
        (f"What is {n * 13} plus {m}?", {"a": n * 13, "b": m}, str(n * 13 + m), f"It is {n * 13 + m}."),
    ]  # fmt: skip
    index = rng.randrange(len(cases))
    user, arguments, result, answer = cases[index]
    tools = [TOOLS[index]] if rng.random() < 0.6 else sorted([TOOLS[index], TOOLS[index - 1]], key=lambda t: t["name"])
    return tools, loosely(user, rng), {"name": TOOLS[index]["name"], "arguments": json.dumps(arguments)}, result, answer
