"""Recorded routing: which experts each layer of each step chose, as JSON lines that can be replayed.

The first line says what was recorded; then one line per step, and one wherever the number of slots changed; the last
line holds what the pager counted. Knows keys and counts; does not know tensors once they are counted. Not a word of
what was written is in a trace. Memory: one step."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from torch import Tensor

from localmoe.errors import UsageError
from localmoe.experts.resident import ExpertSource
from localmoe.files import shown

VERSION = 1
# Bounds that keep a damaged file from filling memory or lasting for ever.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_TOKENS, _MOST_BYTES, _MOST_USES = 1024, 4096, 1 << 24, 1 << 40, 1 << 62


@dataclass(frozen=True)
class Header:
    """The model and the cache a trace was recorded with. capacity: slots, 0 where all experts were in memory.

    warm: it did not begin with empty slots."""

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    num_hash_layers: int
    expert_bytes: int
    capacity: int = 0
    policy: str = ""
    warm: bool = False


@dataclass(frozen=True)
class Use:
    """One layer's part of a step: experts ascending, and how many of the step's tokens chose each."""

    experts: list[int]
    counts: list[int]


def use_of(ids: Tensor) -> Use:
    """ids: [T, K] int64."""
    if ids.shape[0] == 1:
        experts = sorted(set(ids[0].tolist()))
        return Use(experts, [1] * len(experts))
    found, counts = ids.unique(return_counts=True)
    return Use(found.tolist(), counts.tolist())


@dataclass(frozen=True)
class TracedStep:
    """tokens of the step, and its use of every layer."""

    tokens: int
    uses: list[Use]


@dataclass(frozen=True)
class Resized:
    """From here on there were so many slots."""

    capacity: int


@dataclass(frozen=True)
class Counted:
    """What the pager itself counted until the end."""

    hits: int
    misses: int


Entry = TracedStep | Resized | Counted


class Recorder:
    """Writes a trace while a model runs. A file whose name ends in .gz is compressed."""

    def __init__(self, path: Path, header: Header) -> None:
        """Raises UsageError if the file cannot be written; an existing one is replaced."""
        try:
            file = gzip.open(path, "wt", compresslevel=5) if path.suffix == ".gz" else path.open("w")  # noqa: SIM115
        except OSError as cause:
            raise UsageError(f"{shown(path)}: cannot be written ({cause.strerror}); choose another file") from None
        self._file = cast(TextIO, file)
        self._header, self._uses = header, list[Use]()
        self._write({"localmoe_trace": VERSION} | asdict(header))

    def layer(self, layer: int, tokens: int, use: Use) -> None:
        """Called for every layer in turn; the last one completes the step."""
        if layer == 0:
            self._uses = []
        if layer != len(self._uses):
            # One asked again, to find the expert that broke it.
            return
        self._uses.append(use)
        if len(self._uses) == self._header.num_layers:
            plain = [use.experts if tokens == 1 else [use.experts, use.counts] for use in self._uses]
            self._write({"tokens": tokens, "layers": plain})
            self._uses = []

    def resized(self, capacity: int) -> None:
        self._write({"capacity": capacity})

    def close(self, counted: Counted | None = None) -> None:
        if not self._file.closed:
            if counted is not None:
                self._write(asdict(counted))
            self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")


class TracedExperts(ExpertSource):
    """Records what is asked of another source."""

    def __init__(self, source: ExpertSource, recorder: Recorder) -> None:
        self._source, self._recorder = source, recorder

    def prepare(self, tokens: int) -> None:
        """See ExpertSource.prepare."""
        self._source.prepare(tokens)

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        """See ExpertSource.announce."""
        self._source.announce(layer, ids, early=early)

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply."""
        self._recorder.layer(layer, ids.shape[0], use_of(ids))
        return self._source.apply(layer, hidden, ids, weights)

    def close(self) -> None:
        """Completes the trace."""
        self._recorder.close()


def read_trace(path: Path) -> tuple[Header, Iterator[Entry]]:
    """A trace's header, and its entries as they are read. Raises UsageError for a file that is no trace."""
    lines = _lines(path)
    first = next(lines, {})
    if first.pop("localmoe_trace", None) != VERSION:
        raise UsageError(f"{shown(path)}: is no routing trace of this version; record one with --trace-routing")
    try:
        header = _header(first)
    except (TypeError, ValueError) as problem:
        raise UsageError(f"{shown(path)}: has a malformed first line ({shown(problem)}); record it again") from None
    return header, _entries(path, header, lines)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    raise UsageError(
                        f"{shown(path)}: line {number} is not JSON; the recording was cut short, remove the line"
                    ) from None
                if not isinstance(entry, dict):
                    raise UsageError(f"{shown(path)}: line {number} is no entry of a routing trace")
                yield entry
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as cause:
        problem = cause.strerror if isinstance(cause, OSError) and cause.strerror else shown(cause)
        raise UsageError(f"{shown(path)}: cannot be read ({problem})") from None


def _entries(path: Path, header: Header, lines: Iterator[dict[str, Any]]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 2):
        try:
            yield _entry(header, line)
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{shown(path)}: line {number} is no entry of this trace; record it again") from None


def _header(line: dict[str, Any]) -> Header:
    header = Header(**line)
    _whole(header.num_layers, 1, _MOST_LAYERS)
    _whole(header.num_experts, 1, _MOST_EXPERTS)
    _whole(header.top_k, 1, header.num_experts)
    _whole(header.num_hash_layers, 0, header.num_layers)
    _whole(header.expert_bytes, 0, _MOST_BYTES)
    _whole(header.capacity, 0, header.num_layers * header.num_experts)
    if type(header.model) is not str or type(header.policy) is not str or type(header.warm) is not bool:
        raise ValueError("a name is no text")
    return header


def _entry(header: Header, line: dict[str, Any]) -> Entry:
    if "capacity" in line:
        return Resized(_whole(line["capacity"], 1, header.num_layers * header.num_experts))
    if "hits" in line:
        return Counted(_whole(line["hits"], 0, _MOST_USES), _whole(line["misses"], 0, _MOST_USES))
    tokens = _whole(line["tokens"], 1, _MOST_TOKENS)
    uses = [_use(part, tokens, header.num_experts) for part in line["layers"]]
    if len(uses) != header.num_layers:
        raise ValueError("a layer is missing")
    return TracedStep(tokens, uses)


def _use(part: Any, tokens: int, num_experts: int) -> Use:
    experts, counts = (part, [1] * len(part)) if tokens == 1 else part
    if type(experts) is not list or type(counts) is not list:
        raise ValueError("no list of experts")
    least = 0
    for expert, count in zip(experts, counts, strict=True):
        least = _whole(expert, least, num_experts - 1) + 1
        _whole(count, 1, _MOST_USES)
    return Use(experts, counts)


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is no whole number from {least} to {most}")
    return value
