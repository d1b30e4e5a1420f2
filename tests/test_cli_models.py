"""`localmoe list`, `show` and `rm`, and what --model means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from localmoe import api, device
from localmoe.cli.main import main
from localmoe.cli.places import find_model
from localmoe.errors import ModelError
from localmoe.quantize.convert import convert
from localmoe.quantize.recipe import simple
from tests.fake_llm import FakeLLM
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published

HOSTILE = "x\x1b]52;c;AAAA\x07\u202e"


def tiny(folder: Path) -> Path:
    config = tiny_config(**PUBLISHED_DIMS, num_hash_layers=1)
    return write_published(folder, config, random_state(config))


def test_the_embedded_model_is_always_there(capsys: Any) -> None:
    assert main(["list"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "EXPERTS", "PARAMETERS", "SIZE", "FITS"]
    assert row.split()[:4] == ["localmoe-mini", "fp4", "9.8", "M"] and row.endswith("in RAM")


def test_list_names_what_cannot_be_opened_and_why(library_folder: Path, capsys: Any) -> None:
    """Fails if one broken folder would hide the others, or if a name could steer the terminal."""
    tiny(library_folder / "tiny")
    (library_folder / HOSTILE).mkdir()
    (library_folder / ".half.partial").mkdir()
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert "has no config.json" in out and "an unfinished download" in out
    assert main(["list", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == ["localmoe-mini", "tiny", HOSTILE, "half"]
    assert found["tiny"]["experts"] == "fp4" and found["tiny"]["problem"] is None
    assert found["half"]["unfinished"] and found[HOSTILE]["problem"]


@pytest.mark.parametrize(("room", "fit"), [(1 << 40, "in RAM"), (273_000_000, "paged"), (1000, "too large")])
def test_whether_it_fits(
    library_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, room: int, fit: str
) -> None:
    config = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 64})
    write_published(library_folder / "tiny", config, random_state(config))
    monkeypatch.setattr(device, "available_memory", lambda: room)
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["fits"] == fit


def test_show_says_what_is_in_a_model(library_folder: Path, capsys: Any) -> None:
    folder = tiny(library_folder / "tiny")
    (folder / "LICENSE").write_text(f"\n  Licence {HOSTILE} of its own\n")
    for given in ("tiny", str(folder)):
        assert main(["show", given]) == 0
        out = capsys.readouterr().out
        assert "6 layers (2 sliding, 2 csa, 2 hca)" in out and "4 a layer, 2 of them and 1 shared" in out
        assert "context     1,024 tokens" in out and "LICENSE: Licence" in out and "\x1b" not in out
        assert any(line.split()[:4] == ["routed", "experts", "fp4", "72"] for line in out.splitlines())


def test_show_says_how_localmoe_quantized_it(library_folder: Path, tmp_path: Path, capsys: Any) -> None:
    convert(tiny(tmp_path / "source"), library_folder / "small", simple("int8", "keep", 32))
    assert main(["show", "small"]) == 0
    out = capsys.readouterr().out
    assert "by localmoe, from source, with this recipe:" in out and "int8_g32" in out
    assert main(["show", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["made_by_us"]["source"] == "source"
    parts = [part for part in found["parts"] if part["name"] == "routed experts"]
    assert [part["format"] for part in parts] == ["int8_g32"]
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]


def test_a_name_that_is_nothing_is_one_sentence_with_the_nearest(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    tiny(library_folder / "tiny-model")
    assert main(["run", "hi", "--model", "tinymodel"]) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("did you mean tiny-model?\n")


def test_a_directory_goes_before_a_name(library_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library_folder / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("m")) == library_folder / "m"
    (tmp_path / "m").mkdir()
    assert find_model(Path("m")) == Path("m")
    assert find_model(None) is None and find_model(Path("localmoe-mini")) is None
    with pytest.raises(ModelError):
        find_model(Path("../m/none"))


def test_run_opens_a_model_by_its_name(library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(FakeLLM):
        pass

    monkeypatch.setattr(api, "LLM", Model)
    monkeypatch.setattr("sys.stdin", None)
    (library_folder / "m").mkdir()
    assert main(["run", "hi", "--model", "m"]) == 0
    assert Model.made[0].model == library_folder / "m"


def test_rm_asks_and_without_a_terminal_needs_yes(library_folder: Path, capsys: Any) -> None:
    """Fails if a script could delete a model that nobody confirmed."""
    (library_folder / "m").mkdir()
    assert main(["rm", "m"]) == 2
    assert "add --yes" in capsys.readouterr().err and (library_folder / "m").is_dir()
    assert main(["rm", "m", "--yes"]) == 0
    assert os.listdir(library_folder) == []


@pytest.mark.parametrize(("answer", "left"), [(False, ["m"]), (True, [])])
def test_rm_does_what_was_answered(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch, answer: bool, left: list[str]
) -> None:
    (library_folder / "m").mkdir()
    monkeypatch.setattr("localmoe.cli.models.can_ask", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answer)
    assert main(["rm", "m"]) == 0
    assert os.listdir(library_folder) == left


@pytest.mark.parametrize("name", ["localmoe-mini", "none", "..", "../m", "/"])
def test_rm_removes_only_what_is_in_the_library(library_folder: Path, name: str, capsys: Any) -> None:
    (library_folder / "m").mkdir()
    assert main(["rm", name, "--yes"]) == 2
    assert (library_folder / "m").is_dir() and library_folder.is_dir()


def test_rm_discards_an_unfinished_download(library_folder: Path) -> None:
    (library_folder / ".m.partial").mkdir()
    assert main(["rm", "m", "-y"]) == 0
    assert os.listdir(library_folder) == []
