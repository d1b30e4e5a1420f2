"""cli/settings.py: a file of known keys, checked as options are, and changed without touching the rest of it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from localmoe.cli import options, settings
from localmoe.errors import UsageError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "deep" / "config.toml"
    monkeypatch.setenv("LOCALMOE_CONFIG", str(file))
    return file


def put(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def test_no_file_is_no_settings(file: Path) -> None:
    assert all(settings.find(name).value is None for name in settings.KEYS if name != "models")
    assert settings.find("threads").origin == "default"


@pytest.mark.parametrize(
    "text",
    ["threads = 0", "threads = true", "threads = 1.5", 'threads = "2"', "ram = 24", 'ram = "much"', 'kernels = "fast"',
     "temp = -1", "temp = nan", "temp = inf", 'model = " "', "model = 3", "unknown = 1", "[table]\nthreads = 1",
     "threads", "threads = 1\nthreads = 2", 'model = "\\u0000"', "models = []", "x" * 70_000],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence_that_names_it(file: Path, text: str) -> None:
    """Fails if a mistyped key or value would be ignored, or accepted and refused later."""
    put(file, text)
    with pytest.raises(UsageError, match=r"config\.toml: "):
        settings.find("threads")


def test_a_file_that_is_not_text(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b'model = "\xff"')
    with pytest.raises(UsageError, match="UTF-8"):
        settings.find("model")


def test_the_environment_goes_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(file, 'models = "/from/file"')
    monkeypatch.setenv("LOCALMOE_MODELS", "/from/environment")
    assert settings.find("models") == settings.Found("/from/environment", "LOCALMOE_MODELS")
    monkeypatch.delenv("LOCALMOE_MODELS")
    assert settings.find("models") == settings.Found("/from/file", str(file))


def test_changing_a_key_keeps_the_rest(file: Path) -> None:
    put(file, '# mine\nthreads = 1 # few\n"ram" = "1GB"\n')
    settings.write(file, "ram", "2GB")
    settings.write(file, "temp", 0.5)
    assert file.read_text() == '# mine\nthreads = 1 # few\nram = "2GB"\ntemp = 0.5\n'
    settings.write(file, "threads", None)
    assert settings.read(file) == {"ram": "2GB", "temp": 0.5}


@pytest.mark.parametrize("value", ['a"b\\c', "ä\n\t", "😀", "a = 1\nthreads = 2"])
def test_any_text_comes_back_as_it_was(file: Path, value: str) -> None:
    settings.write(file, "model", value)
    assert tomllib.loads(file.read_text()) == {"model": value}


@pytest.mark.parametrize(("text", "value"), [('model = """\nthreads = 3\n"""', 5), ("[t]\nx = 1\n", 1), ("", "\ud800")])
def test_what_a_line_cannot_change_stays_as_it_was(file: Path, text: str, value: settings.Value) -> None:
    """Fails if the edit of a line could cut another value in two, or put a key into a table."""
    put(file, text)
    with pytest.raises(UsageError, match="edit the file"):
        settings.write(file, "threads", value)
    assert file.read_text() == text


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    """As people keep such files in a repository of their own."""
    real = tmp_path / "real.toml"
    real.write_text("threads = 1\n")
    file.parent.mkdir()
    file.symlink_to(real)
    settings.write(file, "threads", 2)
    assert file.is_symlink() and real.read_text() == "threads = 2\n"


def test_kernels_are_those_of_the_option() -> None:
    assert options.Kernels.__args__ == settings.KERNELS  # type: ignore[attr-defined]
