"""Rates: measured once for a processor and a disk, kept safely, and measured again when what was kept is no good."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from localmoe.bench import hardware, rates
from localmoe.plan import Rates
from tests.tiny_bench import tiny

__all__ = ["tiny"]

FOUND = Rates(dram=30e9, disk=2e9, flops=4e11, seconds_per_layer=1e-4)
MIB = 1 << 20


def silent(_doing: str) -> None:
    pass


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A cache directory of its own and a measurement that takes no time; returns the folders measured so far."""
    folders: list[Path] = []

    def measure(folder: Path, _library: object, _report: object) -> Rates:
        folders.append(folder)
        return FOUND

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure", measure)
    return folders


def test_a_machine_is_measured_once(measured: list[Path], tmp_path: Path) -> None:
    """Fails if every plan would wait for the disk, or --measure not."""
    assert rates.cache_file() == tmp_path / "cache" / "localmoe" / "rates.json"
    for _ in range(2):
        assert rates.rates_of(tmp_path, None, silent) == FOUND
    assert len(measured) == 1
    rates.rates_of(tmp_path, None, silent, again=True)
    assert len(measured) == 2
    assert [path.name for path in rates.cache_file().parent.iterdir()] == ["rates.json"]


def test_another_processor_is_another_entry(
    measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a home directory shared by two machines would mix up their rates, or lose one."""
    rates.rates_of(tmp_path, None, silent)
    monkeypatch.setattr(rates.device, "cpu_model", lambda: "another")
    rates.rates_of(tmp_path, None, silent)
    monkeypatch.undo()
    kept = json.loads((tmp_path / "cache" / "localmoe" / "rates.json").read_text())
    assert len(measured) == len(kept) == 2
    assert all(f"disk {tmp_path.stat().st_dev}" in key for key in kept)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"k": 3}', '{"k": {"dram": 1}}', '{"k": {"dram": -1, "disk": 1, "flops": 1}}', "\xff", "null"],
)
def test_a_malformed_file_is_measured_again(text: str, tmp_path: Path) -> None:
    """Fails if a broken cache would end a plan, or be believed."""
    path = tmp_path / "rates.json"
    path.write_text(text, encoding="latin-1")
    assert rates.load(path, "k") is None
    rates.store(path, "k", FOUND)
    assert rates.load(path, "k") == FOUND


def test_rates_of_a_gpu_are_kept_too(tmp_path: Path) -> None:
    with_gpu = Rates(1.0, 2.0, 3.0, 4.0, pcie=5.0, hbm=6.0, gpu_flops=7.0)
    rates.store(tmp_path / "r", "gpu", with_gpu)
    rates.store(tmp_path / "r", "none", FOUND)
    assert rates.load(tmp_path / "r", "gpu") == with_gpu
    assert rates.load(tmp_path / "r", "none") == FOUND
    assert rates.load(tmp_path / "r", "other") is None


def test_a_crash_while_storing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the file would be written in place."""
    path = tmp_path / "rates.json"
    rates.store(path, "k", FOUND)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        rates.store(path, "other", FOUND)
    assert rates.load(path, "k") == FOUND
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: before}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Fails if a read-only home would forbid a plan."""
    (tmp_path / "file").write_text("")
    rates.store(tmp_path / "file" / "rates.json", "k", FOUND)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_everything_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    """Fails if a rate would be missing, or the file that is read stay."""
    monkeypatch.setattr(hardware, "BUFFER_BYTES", MIB)
    monkeypatch.setattr(rates, "DISK_BYTES", 2 * hardware.EXPERT_BYTES)
    monkeypatch.setattr(rates, "_ROWS", 64)
    monkeypatch.setattr(rates, "_COLS", 64)
    monkeypatch.setattr(rates, "_SHAPE", tiny)
    monkeypatch.setattr(rates, "_EXPERTS", 4)
    monkeypatch.setattr(rates, "_VOCABULARY", 64)
    found = rates.measure(tmp_path, None, silent)
    assert min(found.dram, found.disk, found.flops) > 0
    assert 1e-6 < found.seconds_per_layer < 1
    assert not list(tmp_path.iterdir())
