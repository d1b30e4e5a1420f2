"""Which tensor gets which format: ordered rules, the first that matches a name decides.

Knows names and formats; reads no tensors. A recipe is TOML:

    [[rule]]
    match = "ffn\\\\.experts\\\\.\\\\d+\\\\.w2"
    format = "int8_g32"
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import UsageError
from localmoe.files import shown
from localmoe.formats import FORMATS

KEEP = "keep"
# What can be written: all but the blocks that DeepSeek publishes its dense matrices in.
WRITTEN = tuple(name for name in FORMATS if name != "fp8_block")
# What --experts and --dense call a format that is not simply integers in groups.
NAMES = {"fp4": "fp4", "nf4": "nf4", "int3": "book3", "int2": "book2"}
_EXPERT = r"\.(ffn\.experts\.\d+\.w[123]|mlp\.experts\.\d+\.\w+_proj)\.weight$"
# Not the index of attention, nor embedding and head, for which a rule of their own is needed.
_DENSE = r"\.((attn|ffn\.shared_experts)\.w[\w.]*|(self_attn|mlp|mlp\.shared_experts)\.\w+_proj(_with_mqa)?)\.weight$"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """match: a regular expression that is searched for in a tensor's published name."""

    match: str
    format: str


@dataclass(frozen=True)
class Recipe:
    """Tensors that no rule matches keep their bytes."""

    rules: tuple[Rule, ...]

    def rule_of(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if re.search(rule.match, name)), None)

    def format_of(self, name: str) -> str:
        rule = self.rule_of(name)
        return KEEP if rule is None else rule.format

    @property
    def text(self) -> str:
        """The recipe as TOML."""
        return "".join(f"[[rule]]\nmatch = {_quoted(rule.match)}\nformat = '{rule.format}'\n" for rule in self.rules)


def _quoted(text: str) -> str:
    """As TOML has it: literally where that is possible."""
    if text.isprintable() and "'" not in text:
        return f"'{text}'"
    # What JSON escapes, TOML escapes in the same way; and one character more.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def simple(experts: str, dense: str, group: int) -> Recipe:
    """One format for routed experts and one for attention, shared experts and dense layers: keep, int8 or int4 in
    groups of `group`, one of NAMES, or one of FORMATS.

    Raises UsageError for a format that is not written."""
    rules = []
    for pattern, name in ((_EXPERT, experts), (_DENSE, dense)):
        if name != KEEP:
            rules.append(Rule(pattern, _checked(NAMES.get(name, name if name in WRITTEN else f"{name}_g{group}"))))
    return Recipe(tuple(rules))


def read(path: Path) -> Recipe:
    """A recipe file. Raises UsageError for anything that is not one."""
    try:
        # A device may have no size and no end.
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as cause:
        raise UsageError(f"{shown(path)}: cannot be read ({shown(cause)}); expected a file of TOML") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{shown(path)}: is larger than {_MOST_BYTES} bytes; a recipe is a few lines of TOML")
    return read_text(text, shown(path))


def read_text(text: str, name: str = "recipe") -> Recipe:
    """A recipe's text; name: for messages. Raises UsageError as read() does."""
    try:
        given = tomllib.loads(text)
    except ValueError as cause:
        raise UsageError(f"{name}: is no recipe ({shown(cause)}); expected TOML") from None
    rules = given.pop("rule", None)
    if given or not isinstance(rules, list) or not rules:
        raise UsageError(f"{name}: has {shown(next(iter(given), 'no rule'))}, expected [[rule]] tables only")
    return Recipe(tuple(_rule(f"{name}: rule {number}", rule) for number, rule in enumerate(rules, 1)))


def _rule(where: str, rule: object) -> Rule:
    if not isinstance(rule, dict) or set(rule) != {"match", "format"}:
        raise UsageError(f"{where} has not exactly match and format")
    match, name = rule["match"], rule["format"]
    if not isinstance(match, str) or not isinstance(name, str):
        raise UsageError(f"{where}: match and format are to be texts")
    try:
        re.compile(match)
    except re.error as cause:
        raise UsageError(f"{where}: {shown(match)} is no regular expression ({shown(cause)})") from None
    return Rule(match, name if name == KEEP else _checked(name))


def _checked(name: str) -> str:
    if name not in WRITTEN:
        raise UsageError(f"{shown(name)} is not written, only {KEEP}, {', '.join(WRITTEN)}")
    return name
