"""What the machine has. The only place that asks the operating system about hardware."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

# Version 2, then 1: folder, limit, use, and the lines of memory.stat that count cache it would give back.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, by RAM and cgroup limit; None where neither is known.

    Outside Linux it is all of the machine's RAM."""
    found = [_meminfo_available(), *(_cgroup_left(*group) for group in _CGROUPS)]
    known = [nbytes for nbytes in found if nbytes is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup_left(folder: Path, limit: str, used: str, cache: tuple[str, str]) -> int | None:
    """What the group may still allocate. The page cache is charged to it too, but makes room when needed."""
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(left, 0) + sum(int(value) for name, value in lines if name in cache)
    # No such cgroup version here, or no limit set ("max").
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Cores:
    """cpus: a processor number for each physical core this process may run on. count: how many of them its CPU quota
    pays for, at least one."""

    cpus: list[int]
    count: int


def usable_cores() -> Cores:
    """Where the system does not tell cores from hardware threads, every processor counts."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cpus = sorted({_siblings(cpu): cpu for cpu in reversed(usable)}.values())
    quota = _cpu_quota()
    return Cores(cpus, len(cpus) if quota is None else max(min(quota, len(cpus)), 1))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cpu_quota() -> int | None:
    """Whole processors a control group (version 2, then 1) grants, rounded up; None where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    for files in ((folder / "cpu.max",), (folder / "cpu/cpu.cfs_quota_us", folder / "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
            if int(quota) > 0:
                return -(-int(quota) // int(period))
        # No such version here, or no limit ("max", -1).
        except (OSError, ValueError):
            continue
    return None


def cpu_model() -> str:
    """The processor's own name; on systems that do not tell it, the architecture's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def huge_pages() -> str | None:
    """How the system gives out transparent huge pages: always, madvise or never; None where it has none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads, by the variables it reads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def free_disk(path: Path) -> int | None:
    """Bytes that can be written where `path` is or would be; None if nothing of it exists."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.exists():
            return shutil.disk_usage(folder).free
    return None


def unseen(budget: int) -> int:
    """Of a budget of bytes, what a control group counts and a process does not see of itself: page tables, buffers."""
    return min(budget // 64, 256 << 20)


def budget_for(nbytes: int) -> int:
    """The least budget of which so many bytes are seen."""
    return nbytes + min(max(nbytes - 1, 0) // 63, 256 << 20)


def resident_memory() -> int:
    """Bytes of RAM this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_memory() -> int | None:
    """Most bytes of RAM this process has held; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def forget_peak_memory() -> bool:
    """Let peak_memory count from now on; returns whether the system can do that."""
    try:
        # 5: the peak only, see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def total_memory() -> int | None:
    """Bytes of RAM of the machine, None where it is not known."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
