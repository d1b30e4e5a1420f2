"""Tables, CSV and JSON lines: one row at a time, nothing lost."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from localmoe.bench.report import Column, Output, number, open_writer, significant, text

COLUMNS = (Column("test", text("test"), 6, "left"), Column("t/s", number("rate", ",.2f"), 8))
RECORDS: list[dict[str, Any]] = [
    {"test": "pp512", "rate": 1234.5, "samples": [1.0, 2.0]},
    {"test": "a|b", "rate": None, "samples": []},
]


def written(output: Output) -> str:
    out = io.StringIO()
    writer = open_writer(output, out, COLUMNS)
    for record in RECORDS:
        writer.row(record)
    return out.getvalue()


def test_the_table_is_markdown_with_aligned_columns() -> None:
    """Fails if a pasted table would not be one, or a name with a bar would add a column."""
    assert written("md").splitlines() == [
        "| test   |      t/s |",
        "| ------ | -------: |",
        "| pp512  | 1,234.50 |",
        "| a\\|b   |        - |",
    ]


def test_csv_has_a_header_and_single_values() -> None:
    rows = list(csv.DictReader(io.StringIO(written("csv"))))
    assert rows == [{"test": "pp512", "rate": "1234.5"}, {"test": "a|b", "rate": ""}]


def test_json_lines_keep_every_repetition() -> None:
    assert [json.loads(line) for line in written("jsonl").splitlines()] == RECORDS


@pytest.mark.parametrize("output", ["md", "csv", "jsonl"])
def test_a_row_is_there_as_soon_as_it_is_measured(output: Output) -> None:
    """Fails if a run that is interrupted after an hour would have printed nothing."""

    class Out(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    out = Out()
    open_writer(output, out, COLUMNS).row(RECORDS[0])
    assert "pp512" in out.flushed and out.flushed == out.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"), [(12345.6, "12,346"), (123.456, "123.5"), (12.345, "12.35"), (0.12345, "0.1235"), (0, "0.0000")]
)
def test_rates_keep_about_four_digits(value: float, shown: str) -> None:
    """Fails if 0.05 tokens per second would print as 0.1, or a fast rate with digits that are noise."""
    assert significant(value) == shown
