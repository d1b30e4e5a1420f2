"""Templates of strangers, rendered within bounds: what they can reach, how much text they make, how long they take.

Knows Jinja, no chat format. A template gets at no attribute and no function but those listed here, at no file and no
Python object. Bounded: 64 KiB of source; characters made, containers counted by what they hold (so memory, and the
result); 5 seconds of processor time. Every iteration, call, comparison and operation counts and looks at the clock, and
none of them alone takes long: what could make much out of little is measured before it is carried out.
Needs Jinja 3.1.6: older sandboxes have known ways out."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from localmoe.template_tree import Counted

# The longest published chat template we know of has 17 KB.
MAX_SOURCE = 64 << 10
# A template adds up and cuts the texts it is given, a few times each; what it makes of nothing is small.
_FREE_CHARACTERS, _TIMES_INPUT = 16 << 20, 64
_SECONDS = 5.0
# What an element of a list costs, in characters.
_ELEMENT = 16
_MAX_BITS = 4096
_MAX_SEPARATOR = 16


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT = _words(
    "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper"
)
_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _TEXT,
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: _words(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
}
_FILTERS = _words(
    "abs capitalize count d default dictsort first float int items last length list lower map max min reject "
    "rejectattr reverse select selectattr sort string title trim unique upper"
)


class Refused(TemplateError):
    """The template itself refuses what it was given."""


class _Spaces(Namespace):
    """Jinja's namespace, without names that hide Python's own."""

    def __init__(self, *pairs: Any, **attributes: Any) -> None:
        for name in (found := dict(*pairs, **attributes)):
            _Spaces._check(name)
        super().__init__(found)

    def __setitem__(self, name: str, value: Any) -> None:
        _Spaces._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} of a namespace begins with an underscore")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Not thread-safe: it counts one rendering at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Unoptimized: nothing is computed while it is compiled, when nothing is counted yet.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols])
        self.finalize = _output
        self._left = 0
        self._until = 0.0
        self.filters = {name: self._counting(FILTERS[name]) for name in _FILTERS}
        self.filters |= {"join": self._join, "replace": self._replace, "tojson": self._tojson}
        # Nothing is escaped here.
        self.filters["safe"] = self.filters["string"]
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": _Spaces}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def run(self, template: Any, values: Mapping[str, Any], characters: int) -> str:
        """Render a template of this environment. characters: in the values. Raises whatever a template can raise."""
        self._left = _FREE_CHARACTERS + _TIMES_INPUT * characters
        self._until = time.thread_time() + _SECONDS
        text: str = template.render(values)
        return text

    def spend(self, characters: int = 1) -> None:
        """Count what is made. Raises SecurityError once it is too much, or takes too long."""
        self._left -= characters + 1
        if self._left < 0:
            raise SecurityError("it makes too much text")
        if time.thread_time() > self._until:
            raise SecurityError(f"it has not ended after {_SECONDS:.0f} seconds")

    def made(self, value: Any) -> Any:
        """Count a value by all that it holds, however often it holds the same, and return it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(_ELEMENT * len(value))
            for part in value:
                self.made(part)
            if isinstance(value, dict):
                for part in value.values():
                    self.made(part)
        else:
            self.spend()
        return value

    def joined(self, *parts: Any) -> str:
        """What `~` does."""
        return str(self.made("".join([str(self.made(part)) for part in parts])))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return self.made(value[start:stop:step])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return attr in _ATTRIBUTES.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """Neither format nor format_map, which can pad without end, is an attribute that is safe."""
        return

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace"):
            # Jinja's own, not the method's.
            given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
            if name == "replace":
                return __self._replace(owner, *args, **given)
            (parts,) = args
            return __self._join(parts, owner, **given)
        result = super().call(__context, __obj, *args, **kwargs)
        # What lists and dicts return they had already.
        return result if isinstance(owner, (list, tuple, dict, Sandbox)) else __self.made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend()
        if operator == "+":
            for side in (left, right):
                self.made(side)
        elif operator == "*" and isinstance(left, str) and isinstance(right, int):
            self.spend(len(left) * max(right, 0))
        else:
            _only_numbers(operator, left, right)
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > _MAX_BITS:
                    raise SecurityError(f"the result of {operator} is a number of more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        Counted().visit(template)
        template.set_environment(self)
        return template

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of Jinja's that counts what it makes; lazy ones make it at once."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, (str, list, tuple, dict)):
                    self.spend(_ELEMENT * len(value))
            result = function(*args, **kwargs)
            return self.made([self.made(part) for part in result] if isinstance(result, Iterator) else result)

        return counted

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        found = value if attribute is None else (self.getitem(part, attribute) for part in value)
        # Counted as they come: the same long text may be meant many times.
        parts = [str(self.made(part)) for part in found]
        self.spend(len(str(d)) * len(parts))
        return str(d).join(parts)

    def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(self.made(value))
        self.spend(len(new) * (text.count(old) if count is None or count < 0 else min(text.count(old), count)))
        return text.replace(old, new, -1 if count is None else count)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: not for HTML, and with all characters as they are."""
        if ensure_ascii:
            raise SecurityError("tojson(ensure_ascii=true) is not implemented")
        if (indent or 0) > _MAX_SEPARATOR or any(len(text) > _MAX_SEPARATOR for text in separators or ()):
            raise SecurityError("tojson has long separators")
        self.made(value)
        return str(self.made(json.dumps(value, ensure_ascii=False, indent=indent, separators=separators,
                                        sort_keys=sort_keys)))  # fmt: skip


# With the context as its argument, it is never applied to constants while a template is compiled.
@pass_context
def _output(context: Context, value: Any) -> Any:
    sandbox = context.environment
    assert isinstance(sandbox, Sandbox), "a template belongs to its sandbox"
    return sandbox.made(value)


def _only_numbers(operator: str, *values: Any) -> None:
    for value in values:
        if not isinstance(value, (int, float)):
            raise SecurityError(f"{operator} is for numbers, not for a value of type {type(value).__name__}")


def _refuse(message: Any) -> None:
    raise Refused(str(message))


def _now(pattern: str) -> str:
    if len(pattern) > 100:
        raise SecurityError("strftime_now has a long format")
    return datetime.now().strftime(pattern)
