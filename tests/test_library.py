"""localmoe/library.py: names and folders of the models there are, and nothing outside of their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmoe.errors import UsageError
from localmoe.library import Entry, Library, disk_bytes
from localmoe.locks import lock


def make(folder: Path, *names: str) -> Library:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    return Library(folder)


def test_a_library_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    library = Library(tmp_path / "none")
    assert library.entries() == [] and library.find("a") is None


def test_models_come_before_unfinished_downloads(tmp_path: Path) -> None:
    """Fails if half a model could be taken for one, or what a removal left for anything."""
    library = make(tmp_path, "b", "a", ".c.partial", ".d.12345678.removed")
    (tmp_path / "file").write_text("")
    found = library.entries()
    assert [(entry.name, entry.unfinished) for entry in found] == [("a", False), ("b", False), ("c", True)]
    assert library.find("a") == tmp_path / "a" and library.find("c") is None


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "a/../../outside", "/etc", ".c.partial", "a/b", "a/"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    """Fails if a name could reach a folder that is not in the library."""
    library = make(tmp_path / "models", "a", ".c.partial")
    make(tmp_path, "outside")
    assert library.find(name) is None


@pytest.mark.parametrize(
    "name", ["", "..", ".a", "-a", "a/b", "a b", "ä", "a" * 200, "a.partial", "localmoe-mini", "a"]
)
def test_names_that_cannot_be_given(tmp_path: Path, name: str) -> None:
    library = make(tmp_path, "a")
    with pytest.raises(UsageError):
        library.new(name)
    assert library.new("a2") == tmp_path / "a2"


def test_the_nearest_names(tmp_path: Path) -> None:
    library = make(tmp_path, "DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "other")
    assert library.nearest("deepseek-v4-flsh")[0] == "DeepSeek-V4-Flash"
    assert library.nearest("localmoe-mni") == ["localmoe-mini"]
    assert library.nearest("zzz") == []


def test_removing_takes_the_folder_and_what_an_interrupted_removal_left(tmp_path: Path) -> None:
    library = make(tmp_path, "a", "b", ".c.12345678.removed")
    library.remove(library.entries()[0])
    assert os.listdir(tmp_path) == ["b"]


def test_removing_follows_no_links(tmp_path: Path) -> None:
    """Fails if a model somewhere else, or a shared file, would be deleted through the library."""
    outside = tmp_path / "outside"
    library = make(tmp_path / "models", "a")
    make(tmp_path, "outside")
    (library.folder / "linked").symlink_to(outside)
    (library.folder / "a" / "shard").symlink_to(outside / "config.json")
    (library.folder / "a" / "folder").symlink_to(outside)
    for entry in library.entries():
        library.remove(entry)
    assert os.listdir(library.folder) == []
    assert os.listdir(outside) == ["config.json"]


def test_a_model_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    library = make(tmp_path, "a")
    held = lock(tmp_path / "a" / "localmoe-quantize.lock")
    try:
        with pytest.raises(UsageError, match="is being written by process"):
            library.remove(Entry("a", tmp_path / "a"))
    finally:
        os.close(held)
    assert library.find("a")
    library.remove(Entry("a", tmp_path / "a"))
    assert library.find("a") is None


def test_the_size_counts_linked_files_but_no_linked_folders(tmp_path: Path) -> None:
    """As a snapshot of huggingface_hub is made of links."""
    (tmp_path / "blob").write_bytes(b"1234567")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "shard").symlink_to(tmp_path / "blob")
    (folder / "lost").symlink_to(tmp_path / "nothing")
    (folder / "loop").symlink_to(folder)
    (folder / "sub" / "x").write_bytes(b"123")
    assert disk_bytes(folder) == 10
