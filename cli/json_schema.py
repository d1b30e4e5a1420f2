"""The file behind --json-schema: a JSON schema that every reply must keep to, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli.chat_files import read_text
from localmoe.errors import UsageError
from localmoe.files import parse_json, shown

if TYPE_CHECKING:
    from localmoe.constraint import Constraint

JsonSchemaOption = Annotated[
    Path | None,
    typer.Option("--json-schema", metavar="FILE", help="Replies are JSON that keeps to this schema."),
]


def read_schema(file: Path | None) -> Constraint | None:
    """Raises UsageError for a schema that cannot be enforced, or a file that is none."""
    if file is None:
        return None
    from localmoe.constraint import Constraint, check

    found = Constraint.of_schema(parse_json(read_text(file).encode(), shown(file), UsageError, "correct the file"))
    check(found)
    return found
