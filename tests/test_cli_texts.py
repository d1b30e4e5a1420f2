"""Texts that commands read for a model: files and pipes, up to a size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmoe.cli import texts
from localmoe.errors import UsageError


def test_files_and_pipes_are_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é\n")
    assert texts.words_of(tmp_path / "text") == "é\n"
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    assert texts.words_of(Path(f"/dev/fd/{reading}")) == "from a pipe"
    os.close(reading)


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a device fills the memory, or a cause is not said."""
    monkeypatch.setattr(texts, "_MOST_MIB", 1)
    with pytest.raises(UsageError, match="is larger than 1 MiB"):
        texts.words_of(Path("/dev/zero"))
    (tmp_path / "latin").write_bytes(b"a\xe9")
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(byte 1\)"):
        texts.words_of(tmp_path / "latin")
    with pytest.raises(UsageError, match="Is a directory"):
        texts.words_of(tmp_path)
