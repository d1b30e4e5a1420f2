"""What a user has chosen once for all: a small TOML file of known keys, checked as the options are.

Owns the file, the keys and their order of precedence: option, environment, file, default. Environment variables say
where things are, never what is computed. Reads the file when asked; keeps nothing."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.cli.sizes import parse_bytes
from localmoe.errors import UsageError

CONFIG_VARIABLE, MODELS_VARIABLE = "LOCALMOE_CONFIG", "LOCALMOE_MODELS"
KERNELS = ("auto", "native", "strict", "reference")
MOST_THREADS = 256
_MOST_BYTES = 1 << 16

Value = str | int | float


@dataclass(frozen=True)
class Key:
    """kind: of its value in TOML. check: raises UsageError for a value that the option would refuse too.

    variable: of the environment, which goes before the file. default: in words."""

    about: str
    kind: type[str] | type[int] | type[float]
    check: Callable[[Any], None]
    default: str
    variable: str | None = None


@dataclass(frozen=True)
class Found:
    """value: None where nobody has chosen. origin: the variable, the file, or "default"."""

    value: Value | None
    origin: str


def _some_text(value: str) -> None:
    if not value.strip() or "\0" in value:
        raise UsageError("is empty, expected a name or a path")


def _threads(value: int) -> None:
    if not 1 <= value <= MOST_THREADS:
        raise UsageError(f"is {value}, expected 1 to {MOST_THREADS}")


def _ram(value: str) -> None:
    parse_bytes(value)


def _kernels(value: str) -> None:
    if value not in KERNELS:
        raise UsageError(f"is {value!r}, expected one of {', '.join(KERNELS)}")


def _temperature(value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise UsageError(f"is {value}, expected a number of at least 0")


# Named like the options that they are the defaults of.
KEYS = {
    "models": Key("the folder of the model library", str, _some_text, "the system's place", MODELS_VARIABLE),
    "model": Key("--model: a name or a directory", str, _some_text, "localmoe-mini"),
    "threads": Key("--threads", int, _threads, "one per core"),
    "ram": Key("--ram of run, chat, eval and imatrix", str, _ram, "what is available"),
    "kernels": Key("--kernels", str, _kernels, "auto"),
    "temp": Key("--temp of run and chat", float, _temperature, "the model's own"),
}


def config_file() -> Path:
    """LOCALMOE_CONFIG, or config.toml in the system's place for a user's settings. It need not exist."""
    chosen = os.environ.get(CONFIG_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_config_path

    return user_config_path("localmoe", appauthor=False) / "config.toml"


def known(name: str) -> Key:
    """Raises UsageError for a key that there is not."""
    if name not in KEYS:
        raise UsageError(f"{name!r} is no key of localmoe config, only {', '.join(KEYS)}")
    return KEYS[name]


def find(name: str) -> Found:
    """What holds where no option is given. Raises UsageError for a file that cannot be used."""
    key = KEYS[name]
    chosen = os.environ.get(key.variable) if key.variable else None
    if chosen:
        return Found(chosen, str(key.variable))
    file = config_file()
    value = read(file).get(name)
    return Found(None, "default") if value is None else Found(value, str(file))


def read(file: Path) -> dict[str, Value]:
    """The checked values of a file; of one that is not there, none. Raises UsageError naming the key that is wrong."""
    found: dict[str, Value] = {}
    for name, value in parse(file, _text(file)).items():
        if name not in KEYS:
            raise UsageError(f"{file}: {name!r} is no key of localmoe config; localmoe config unset {name}")
        try:
            found[name] = checked(name, value)
        except UsageError as problem:
            raise UsageError(f"{file}: {problem}; localmoe config unset {name}") from None
    return found


def checked(name: str, value: Any) -> Value:
    """A value of the key's kind. Raises UsageError."""
    key = known(name)
    right = isinstance(value, key.kind) or (key.kind is float and isinstance(value, int))
    if not right or isinstance(value, bool):
        words = {str: "text in quotes", int: "a whole number", float: "a number"}[key.kind]
        raise UsageError(f"{name} is {json.dumps(value, default=str)[:80]}, expected {words}")
    try:
        key.check(value)
    except UsageError as problem:
        raise UsageError(f"{name}: {problem}") from None
    return key.kind(value)


def from_text(name: str, text: str) -> Value:
    """A value as it is typed at a shell. Raises UsageError."""
    kind = known(name).kind
    try:
        return checked(name, kind(text))
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} is {text!r}, expected {words}") from None


def write(file: Path, name: str, value: Value | None) -> None:
    """Put one key in the file, or take it out; comments and other lines stay. Raises UsageError if that cannot be."""
    from localmoe.files import write_atomically

    text = _text(file)
    expected = {other: kept for other, kept in parse(file, text).items() if other != name}
    own = re.compile(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=")
    lines = [line for line in text.splitlines() if not own.match(line)]
    if value is not None:
        expected[name] = value
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    changed = "".join(f"{line}\n" for line in lines)
    try:
        right = tomllib.loads(changed) == expected
        data = changed.encode()
    except ValueError:
        right = False
    if not right:
        raise UsageError(f"{file}: {name} cannot be changed by localmoe there; edit the file")
    # A link to the file stays one.
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, data)


def parse(file: Path, text: str) -> dict[str, Any]:
    """Raises UsageError for what is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise UsageError(f"{file}: is not TOML ({problem}); edit or remove it") from None


def _text(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UsageError(f"{file}: is larger than {_MOST_BYTES} bytes; it is no file of localmoe config")
        return data.decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not UTF-8 text; edit or remove it") from None
