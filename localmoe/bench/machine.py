"""Facts about this machine that a report names: processor, cores, huge pages, disks.

Asks the operating system; measures nothing, imports no torch. What cannot be known is None or said in words."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path


def cpu_model() -> str:
    """The processor's own name; on systems that do not tell it, the architecture's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
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
