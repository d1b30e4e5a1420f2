"""What the machine has, read from files that say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from localmoe import device


def cgroup(tmp_path: Path, limit: str, used: str, stat: str) -> tuple[Path, str, str, tuple[str, str]]:
    """The files of a memory cgroup, and how device is told of them."""
    for name, text in {"limit": limit, "used": used, "memory.stat": stat}.items():
        (tmp_path / name).write_text(text)
    return tmp_path, "limit", "used", ("active", "inactive")


def test_memory_is_known_and_plausible_here() -> None:
    found = device.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        ("1000\n", "400\n", "", 600),
        ("1000", "1400", "", 0),
        ("1000", "900", "anon 500\nactive 30\ninactive 7\nshmem 9\n", 137),
    ],
)
def test_a_container_has_what_its_cgroup_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, stat: str, left: int
) -> None:
    """Fails if a container believes in the memory of its host, or takes cached files for memory in use."""
    monkeypatch.setattr(device, "_CGROUPS", (cgroup(tmp_path, limit, used, stat),))
    assert device.available_memory() == left


@pytest.mark.parametrize("limit", ["max\n", "", "nonsense"])
def test_a_cgroup_without_a_limit_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Fails if "max" is an error, or a limit of zero."""
    monkeypatch.setattr(device, "_CGROUPS", ())
    host = device.available_memory()
    here, *names = cgroup(tmp_path, limit, "5", "")
    monkeypatch.setattr(device, "_CGROUPS", ((here, *names), (here / "nowhere", *names)))
    found = device.available_memory()
    assert (found is None) == (host is None)
    assert found is None or found > 5


def test_there_is_a_core_to_run_on() -> None:
    """Fails if no thread would be started, or one per hardware thread where cores are known."""
    cores = device.usable_cores()
    assert 1 <= cores.count <= len(cores.cpus) == len(set(cores.cpus))


@pytest.mark.parametrize(("quota", "count"), [(None, 4), (1, 1), (3, 3), (9, 4), (0, 1)])
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, quota: int | None, count: int) -> None:
    """Fails if a container granted two cores of 64 starts 64 threads."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6, 7}, raising=False)
    monkeypatch.setattr(device, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(device, "_cpu_quota", lambda: quota)
    assert device.usable_cores() == device.Cores([0, 1, 2, 3], count)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak of memory")
def test_a_forgotten_peak_is_not_counted() -> None:
    """In a process of its own, where nothing else takes memory."""
    code = """
from localmoe import device
before = device.peak_memory()
large = bytearray(b"x") * (128 << 20)
del large
high = device.peak_memory()
assert device.forget_peak_memory()
assert high - before > 100 << 20, (before, high)
assert high - device.peak_memory() > 100 << 20, (high, device.peak_memory())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
