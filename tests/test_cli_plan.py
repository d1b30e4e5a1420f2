"""`localmoe plan`: options, refusals, and what goes to stdout. Nothing here measures the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe import device
from localmoe.bench import rates
from localmoe.cli.main import main
from localmoe.cli.sizes import parse_bytes
from localmoe.errors import UsageError
from localmoe.plan import Rates
from tests.tiny_v4 import tiny_config


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A machine without a GPU, with 30 GB/s of DRAM and 2 GB/s of disk; returns the folders that were measured."""
    folders: list[Path] = []

    def measure(folder: Path, _library: object, _report: object) -> Rates:
        folders.append(folder)
        return Rates(dram=30e9, disk=2e9, flops=4e11, seconds_per_layer=1e-4)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure", measure)
    return folders


def answer(capsys: Any, *arguments: str) -> Any:
    assert main(["plan", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 << 30),
        ("12g", 12 * 10**9),
        ("800M", 800 * 10**6),
        ("1.5 KiB", 1536),
        ("2TB", 2 * 10**12),
        ("0", 0),
        ("4096", 4096),
        ("64 B", 64),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    """Fails if GB and GiB would be the same."""
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "12 XB", "12GBB", "1,5GB", "nan", "0x10", "٣GB", "12iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Fails if a slip of the finger would become a budget."""
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


def test_a_person_sees_where_every_byte_goes(capsys: Any) -> None:
    """Fails if a tier, the speed or what bounds it would be missing, or anything but the plan be on stdout."""
    assert main(["plan", "v4-flash", "--ram", "32GB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    titles = [line[:9].strip() for line in out.splitlines() if line[:9].strip()]
    assert titles == ["model", "RAM", "disk", "hits", "decode", "prefill", "rates"]
    assert "1635 experts, 14.9% of all" in out and "9373 experts, 85.1% of all" in out
    assert "meanwhile 63 experts make room for 0.78 GiB of work" in out
    assert "bound by disk" in out and "DRAM 30.0 GB/s, disk 2.00 GB/s" in out
    assert "PCIe" not in out


def test_rates_of_a_gpu_that_is_not_here_are_called_assumed(capsys: Any) -> None:
    """Fails if an assumption would look like a measurement."""
    assert main(["plan", "v4-flash", "--ram", "32GB", "--vram", "24GB"]) == 0
    out = capsys.readouterr().out
    assert "PCIe 52 GB/s, VRAM 1000 GB/s" in out and "assumed, not measured" in out
    assert answer(capsys, "v4-flash", "--ram", "32GB", "--vram", "24GB")["gpu_rates_assumed"] is True
    assert answer(capsys, "v4-flash", "--ram", "32GB")["gpu_rates_assumed"] is False


def test_json_holds_the_whole_plan(capsys: Any) -> None:
    found = answer(capsys, "v3", "--ram", "64GB", "--batch", "4", "--ctx", "1000", "--hits", "0.63")
    assert found["model"]["expert_bytes"] == 44_050_944
    assert found["budget"] == {"ram": 64 * 10**9, "vram": 0, "context": 1000, "batch": 4}
    assert found["hits"] == 0.63
    for step, tokens in (("decode", 4), ("prefill", 1000)):
        assert found[step]["tokens"] == tokens
        assert found[step]["tokens_per_s"] == pytest.approx(tokens / found[step]["seconds"])
        assert found[step]["bound"] in found[step]["parts"]


def test_a_directory_and_its_config_are_the_same_model(capsys: Any, tmp_path: Path, machine: list[Path]) -> None:
    """Fails if only one of them would be read, or another disk than the model's be measured."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    plans = [answer(capsys, str(path), "--ram", "4GB") for path in (folder, folder / "config.json")]
    assert [plan["placement"]["ram_slots"] for plan in plans] == [48, 48]
    assert plans[0]["decode"] == plans[1]["decode"]
    assert plans[0]["budget"]["context"] == 1024
    assert machine == [folder]


def test_a_name_of_the_library_is_a_model(capsys: Any, library_folder: Path, machine: list[Path]) -> None:
    """Fails if only paths would be found, or the name be lost."""
    (library_folder / "m").mkdir()
    (library_folder / "m" / "config.json").write_text(json.dumps(tiny_config()))
    found = [answer(capsys, name, "--ram", "4GB")["model"]["name"] for name in ("m", "localmoe-mini")]
    assert found == ["m", "localmoe-mini"]
    assert machine == [library_folder / "m"]


def test_without_ram_it_is_what_is_available(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 20 * 10**9)
    assert answer(capsys, "v4-flash")["budget"]["ram"] == 20 * 10**9
    monkeypatch.setattr(device, "available_memory", lambda: None)
    assert main(["plan", "v4-flash"]) == 2
    assert "pass --ram" in capsys.readouterr().err


def test_the_machine_is_measured_again_when_asked(capsys: Any, machine: list[Path]) -> None:
    for more in ([], [], ["--measure"]):
        answer(capsys, "v4-flash", "--ram", "32GB", *more)
    assert len(machine) == 2


def test_what_does_not_fit_is_refused_before_anything_is_measured(capsys: Any, machine: list[Path]) -> None:
    """Fails if a user would wait ten seconds to hear no."""
    assert main(["plan", "v4-pro", "--ram", "16GB"]) == 5
    out, err = capsys.readouterr()
    assert out == "" and "short by 14.61 GiB; raise --ram by 14.61 GiB" in err.replace("\n", " ")
    assert not machine


def test_the_table_tries_every_pair(capsys: Any) -> None:
    """Fails if a pair that cannot run would show a speed."""
    assert main(["plan", "v4-pro", "--table", "--ctx", "1000000"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "assumed, not measured" in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    assert rows[0] == ["RAM", "no GPU", "24 GB VRAM", "32 GB VRAM", "80 GB VRAM"]
    assert [row[0] for row in rows[2:]] == ["32 GB", "64 GB", "128 GB", "256 GB"]
    assert rows[2][1].startswith("no: short by ") and rows[2][1].endswith(" GiB")
    assert float(rows[5][4]) > float(rows[5][1]) > float(rows[4][1]) > 0


def test_the_table_is_json_lines_too(capsys: Any) -> None:
    assert main(["plan", "v4-flash", "--table", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ram"] for row in rows] == ["32 GB", "64 GB", "128 GB", "256 GB"]
    assert set(rows[0]) == {"model", "ram", "0", "24", "32", "80"}


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["v5"], 2, "v5 is no model directory, no config.json, none of v4-flash, v4-pro, v3"),
        (["v4-flash", "--ram", "lots"], 2, "'lots' is not a size"),
        (["v4-flash", "--hits", "1.5"], 2, "--hits is '1.5', expected uniform, typical, or a number"),
        (["v4-flash", "--hits", "nan"], 2, "--hits is 'nan'"),
        (["v4-flash", "--hits", "often"], 2, "--hits is 'often'"),
        (["v4-flash", "--ctx", "9999999"], 2, "9999999 tokens is more than the 1048576 of v4-flash"),
        (["v4-flash", "--batch", "0"], 2, "Invalid value for '--batch'"),
        (["v4-flash", "--table", "--ram", "1GB"], 2, "--table tries sizes of its own"),
        ([], 2, "Missing argument 'MODEL'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], code: int, problem: str, capsys: Any) -> None:
    """Fails if a plan would be made of something that was not asked."""
    assert main(["plan", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and problem in " ".join(err.split())


def test_a_model_of_another_family_is_refused(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["plan", str(tmp_path)]) == 4
    assert "model_type is llama" in capsys.readouterr().err
