"""`localmoe config`, and that what it sets has an effect where no option is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe import api
from localmoe.cli.main import main
from localmoe.cli.places import find_model, models_folder
from localmoe.cli.settings import KEYS, config_file
from tests.fake_llm import FakeLLM

VALUES = {"threads": "2", "ram": "24GB", "kernels": "strict", "temp": "0.25"}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    class Model(FakeLLM):
        pass

    monkeypatch.setattr(api, "LLM", Model)
    monkeypatch.setattr("sys.stdin", None)
    return Model


def put(**values: str) -> None:
    for name, value in values.items():
        assert main(["config", "set", name, value]) == 0


def test_set_get_unset(capsys: Any) -> None:
    put(**VALUES)
    assert main(["config", "get", "ram"]) == 0
    assert capsys.readouterr().out == "24GB\n"
    assert main(["config", "unset", "ram"]) == 0 and main(["config", "get", "ram"]) == 0
    assert capsys.readouterr().out == ""


def test_every_key_is_shown_with_its_origin(capsys: Any, library_folder: Path) -> None:
    put(threads="2")
    assert main(["config"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:] if line}
    assert set(KEYS) <= set(rows)
    assert "config.toml" in rows["threads"] and "LOCALMOE_MODELS" in rows["models"] and "default" in rows["ram"]
    assert main(["config", "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert keys["threads"] == {"value": 2, "from": str(config_file())}
    assert keys["models"] == {"value": str(library_folder), "from": "LOCALMOE_MODELS"}


def test_the_values_reach_the_model(model: type[FakeLLM]) -> None:
    """Fails if a key would be accepted and have no effect."""
    put(**VALUES)
    assert main(["run", "hi"]) == 0
    made = model.made[0]
    assert made.options["threads"] == 2 and made.options["kernels"] == "strict"
    assert made.options["paging"].ram == 24_000_000_000
    assert made.asked[0]["params"].temperature == 0.25


def test_an_option_goes_before_the_file(model: type[FakeLLM]) -> None:
    put(**VALUES)
    assert main(["run", "hi", "-t", "1", "--ram", "1GB", "--kernels", "auto", "--temp", "1"]) == 0
    made = model.made[0]
    assert made.options["threads"] == 1 and made.options["kernels"] == "auto"
    assert made.options["paging"].ram == 1_000_000_000
    assert made.asked[0]["params"].temperature == 1


def test_a_default_gives_way_to_an_option_it_cannot_go_with(model: type[FakeLLM]) -> None:
    """Fails if --expert-slots would be refused because of a ram that nobody typed."""
    put(**VALUES)
    assert main(["run", "hi", "--expert-slots", "4", "--kernels", "reference"]) == 0
    made = model.made[0]
    assert made.options["paging"].ram is None and made.options["paging"].slots == 4
    assert made.options["threads"] is None


def test_the_default_model_is_opened_and_a_lost_one_is_named(
    model: type[FakeLLM], library_folder: Path, capsys: Any
) -> None:
    (library_folder / "mine").mkdir()
    put(model="mine")
    assert main(["run", "hi"]) == 0
    assert main(["run", "hi", "--model", "localmoe-mini"]) == 0
    assert [made.model for made in model.made] == [library_folder / "mine", None]
    (library_folder / "mine").rmdir()
    assert main(["run", "hi"]) == 4
    assert "config.toml: model: mine is neither" in capsys.readouterr().err


def test_a_default_model_does_not_forbid_made_up_weights(capsys: Any) -> None:
    """Fails if `bench --synthetic` would be told to leave a --model out that nobody typed."""
    put(model="localmoe-mini")
    assert main(["bench", "--synthetic", "none"]) == 2
    assert "--model" not in capsys.readouterr().err


def test_relative_folders_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a setting would mean another folder in another directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCALMOE_MODELS")
    (tmp_path / "m").mkdir()
    put(model="m", models="shelf")
    monkeypatch.chdir("/")
    assert find_model(None) == tmp_path / "m" and models_folder() == tmp_path / "shelf"


@pytest.mark.parametrize(
    "arguments",
    [["set", "threads", "none"], ["set", "threads", "257"], ["set", "ram", "x"], ["set", "kernels", "x"],
     ["set", "temp", "nan"], ["set", "model", ""], ["set", "models", " "], ["set", "x", "1"], ["get", "x"]],
)  # fmt: skip
def test_what_the_option_would_refuse_is_refused(arguments: list[str], capsys: Any) -> None:
    assert main(["config", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not config_file().exists()


def test_a_model_that_there_is_not_cannot_be_set() -> None:
    assert main(["config", "set", "model", "none"]) == 4
    assert not config_file().exists()


def test_a_broken_file_can_be_mended(capsys: Any) -> None:
    config_file().write_text("threds = 2\n")
    assert main(["config"]) == 2
    assert "localmoe config unset threds" in capsys.readouterr().err
    assert main(["run", "--help"]) == 0
    assert main(["config", "unset", "threds"]) == 0 and main(["config"]) == 0
