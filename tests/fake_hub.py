"""A hub without a network: the files of a folder, with whatever is to go wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from localmoe.hub import Listing, RemoteFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """As localmoe.hub.Hub. more: files that are listed and cannot be fetched; lies: bytes that come instead.

    before: called with each name before it comes, to raise what breaks off; fetched: what came, in order."""

    source: Path
    more: list[RemoteFile] = field(default_factory=list)
    lies: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[str], None] = lambda name: None
    commit: str = COMMIT
    fetched: list[str] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)

    def listing(self, repo: str, revision: str | None) -> Listing:
        self.asked.append(revision)
        files = [
            RemoteFile(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(self.source.iterdir())
        ]
        return Listing(self.commit, [*files, *self.more])

    def fetch(self, repo: str, commit: str, name: str, folder: Path) -> None:
        assert commit == self.commit, "a file of another commit was asked for"
        self.before(name)
        self.fetched.append(name)
        (folder / ".cache").mkdir(exist_ok=True)
        (folder / name).write_bytes(self.lies.get(name) or (self.source / name).read_bytes())
