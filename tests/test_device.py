"""What the machine has, read from files that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmoe import device


def cgroup(tmp_path: Path, limit: str, used: str) -> tuple[str, str]:
    """The two files of a memory cgroup."""
    (tmp_path / "limit").write_text(limit)
    (tmp_path / "used").write_text(used)
    return str(tmp_path / "limit"), str(tmp_path / "used")


def test_memory_is_known_and_plausible_here() -> None:
    found = device.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


@pytest.mark.parametrize(("limit", "used", "left"), [("1000\n", "400\n", 600), ("1000", "1400", 0)])
def test_a_container_has_what_its_cgroup_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, left: int
) -> None:
    """Fails if a container believes in the memory of its host."""
    monkeypatch.setattr(device, "_CGROUP_LIMITS", (cgroup(tmp_path, limit, used),))
    assert device.available_memory() == left


@pytest.mark.parametrize("limit", ["max\n", "", "nonsense"])
def test_a_cgroup_without_a_limit_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Fails if "max" is an error, or a limit of zero."""
    monkeypatch.setattr(device, "_CGROUP_LIMITS", ())
    host = device.available_memory()
    monkeypatch.setattr(device, "_CGROUP_LIMITS", (cgroup(tmp_path, limit, "5"), ("/nowhere/a", "/nowhere/b")))
    found = device.available_memory()
    assert (found is None) == (host is None)
    assert found is None or found > 5
