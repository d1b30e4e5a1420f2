"""Batches in files, for tests: lines in, rows out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localmoe.cli.main import main


def write(path: Path, lines: list[Any]) -> Path:
    """Objects become lines; what is a text already stays as it is."""
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(source: Path, out: Path, *more: str) -> int:
    return main(["batch", str(source), "-o", str(out), "--deterministic", "-q", *more])
