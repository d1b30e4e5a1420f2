"""Results as a table people paste, as CSV, or as one JSON object a line; each row is written when it is measured.

Knows records (flat dicts) and columns; does not know what was measured. Numbers that are not known are null."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TextIO

Output = Literal["md", "csv", "jsonl"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table: what a record shows in it, padded to at least `width` characters."""

    title: str
    show: Callable[[Record], str]
    width: int = 8
    align: Literal["left", "right"] = "right"


class Writer(Protocol):
    """Takes records of one kind, all with the same keys."""

    def row(self, record: Record) -> None:
        """Write one record and flush it."""
        ...


class MarkdownWriter:
    """A GitHub table of some columns."""

    def __init__(self, out: TextIO, columns: Sequence[Column]) -> None:
        self._out, self._columns = out, columns
        self._begun = False

    def row(self, record: Record) -> None:
        if not self._begun:
            self._begun = True
            self._line([column.title for column in self._columns])
            rules = (("-" * max(c.width, len(c.title)), c.align) for c in self._columns)
            self._line([rule[:-1] + (":" if align == "right" else "-") for rule, align in rules])
        self._line([column.show(record) for column in self._columns])
        self._out.flush()

    def _line(self, cells: Sequence[str]) -> None:
        padded = []
        for column, cell in zip(self._columns, cells, strict=True):
            width = max(column.width, len(column.title))
            text = cell.replace("|", "\\|")
            padded.append(text.ljust(width) if column.align == "left" else text.rjust(width))
        self._out.write(f"| {' | '.join(padded)} |\n")


class CsvWriter:
    """Every field of a record that is a single value; lists of samples are left to JSON lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._fields: list[str] = []

    def row(self, record: Record) -> None:
        writer = csv.writer(self._out, lineterminator="\n")
        if not self._fields:
            self._fields = [name for name, value in record.items() if not isinstance(value, (list, tuple))]
            writer.writerow(self._fields)
        writer.writerow([record[name] for name in self._fields])
        self._out.flush()


class JsonLinesWriter:
    """Every field, samples included."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def row(self, record: Record) -> None:
        self._out.write(json.dumps(record, allow_nan=False) + "\n")
        self._out.flush()


def open_writer(output: Output, out: TextIO, columns: Sequence[Column]) -> Writer:
    """The writer of an output; columns are those of the table."""
    if output == "md":
        return MarkdownWriter(out, columns)
    return CsvWriter(out) if output == "csv" else JsonLinesWriter(out)


def number(key: str, spec: str = ",.1f") -> Callable[[Record], str]:
    """Shows a field as a number, or a dash where there is none."""

    def show(record: Record) -> str:
        value = record[key]
        return "-" if value is None else format(value, spec)

    return show


def text(key: str) -> Callable[[Record], str]:
    """Shows a field as it is."""
    return lambda record: str(record[key])


def significant(value: float) -> str:
    """A rate with about four digits, whatever its size."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 4
    return f"{value:,.{digits}f}"
