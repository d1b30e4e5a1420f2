"""The text that a model is to read: from a file, or from a pipe such as <(zcat FILE)."""

from __future__ import annotations

from pathlib import Path

from localmoe.errors import UsageError
from localmoe.files import shown

# More than can be read in a week; a device may have no end.
_MOST_MIB = 256


def words_of(path: Path) -> str:
    """Raises UsageError unless it is UTF-8 text and not too large."""
    try:
        with path.open("rb") as file:
            data = file.read((_MOST_MIB << 20) + 1)
    except OSError as cause:
        raise UsageError(f"{shown(path)}: cannot be read ({cause.strerror}); check the path") from None
    if len(data) > _MOST_MIB << 20:
        raise UsageError(f"{shown(path)}: is larger than {_MOST_MIB} MiB; give a part of it")
    try:
        return data.decode()
    except UnicodeDecodeError as cause:
        raise UsageError(f"{shown(path)}: is not UTF-8 text (byte {cause.start}); convert it") from None
