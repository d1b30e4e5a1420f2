"""The model library: one folder, and in it a folder for each model.

Knows names and folders; does not know what is in a model, or who chose the folder. Touches nothing outside of it: a
model that is a link is listed and opened, and only the link is removed."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import UsageError
from localmoe.files import shown
from localmoe.locks import lock

# The model that is part of the package.
EMBEDDED, EMBEDDED_NAME = Path(__file__).parent / "mini" / "weights", "localmoe-mini"
# What a download notes beside a model: where it is from.
ORIGIN = "localmoe-source.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PARTIAL, _REMOVED = ".partial", ".removed"


def name_of(folder: Path) -> str:
    """What the model in a folder is called, "." too."""
    found = folder.resolve()
    return EMBEDDED_NAME if found == EMBEDDED.resolve() else found.name


@dataclass(frozen=True)
class Entry:
    """A model of the library; unfinished: what a download has left that can go on."""

    name: str
    path: Path
    unfinished: bool = False


class Library:
    """A folder that need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[Entry]:
        """Every model by name, then the unfinished downloads."""
        try:
            folders = sorted(path for path in self.folder.iterdir() if path.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        models = [Entry(path.name, path) for path in folders if not path.name.startswith(".")]
        partial = [path for path in folders if path.name.startswith(".") and path.name.endswith(_PARTIAL)]
        return models + [Entry(path.name[1 : -len(_PARTIAL)], path, unfinished=True) for path in partial]

    def find(self, name: str) -> Path | None:
        """The folder of a model; None for what is no name, or the name of nothing."""
        if not name or name != Path(name).name or name.startswith("."):
            return None
        path = self.folder / name
        return path if path.is_dir() else None

    def nearest(self, name: str, count: int = 3) -> list[str]:
        """The names there are that look most like it."""
        names = {entry.name for entry in self.entries() if not entry.unfinished} | {EMBEDDED_NAME}
        by_case = {known.casefold(): known for known in sorted(names)}
        return [by_case[found] for found in difflib.get_close_matches(name.casefold(), by_case, count, 0.5)]

    def partial(self, name: str) -> Path:
        """Where a model of that name is until it is complete."""
        return self.folder / f".{name}{_PARTIAL}"

    def new(self, name: str) -> Path:
        """The folder a new model would have. Raises UsageError for a name that cannot be given or is taken."""
        if not _NAME.fullmatch(name) or name.endswith(_PARTIAL):
            raise UsageError(f"{shown(name)} cannot name a model; expected letters, digits, '.', '_' and '-'")
        if name == EMBEDDED_NAME:
            raise UsageError(f"{name} is the embedded model; choose another name with --as")
        path = self.folder / name
        if os.path.lexists(path):
            raise UsageError(f"{shown(path)} exists already; remove it (localmoe rm {name}) or give a name with --as")
        return path

    def remove(self, entry: Entry) -> None:
        """Take a model away. Raises UsageError if another process is writing it, OSError if it cannot be removed.

        It loses its name first, so what an interrupted removal leaves is no half model; the next one clears it up."""
        if entry.path.is_symlink():
            entry.path.unlink()
            return
        with contextlib.ExitStack() as held:
            for file in sorted(entry.path.glob("*.lock")):
                if file.is_file() and not file.is_symlink():
                    held.callback(os.close, lock(file))
            entry.path.rename(self.folder / f".{entry.name}.{secrets.token_hex(4)}{_REMOVED}")
            # Follows no links: neither rmtree nor the glob's folders do.
            for left in self.folder.glob(f".*{_REMOVED}"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)


def disk_bytes(folder: Path) -> int:
    """Of all files under a folder; linked files count, linked folders do not."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total
