"""One process at a time: locks that end with the process that holds them. POSIX only."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from localmoe.errors import UsageError
from localmoe.files import full_disk, shown


def lock(path: Path, of: Path | None = None) -> int:
    """Descriptor of a lock that ends with the process. of: what it keeps for one process; by default its folder.

    Raises UsageError if another process has it, ResourceError if the disk is full."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with full_disk(path.parent):
        fd = os.open(path, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace")
            os.close(fd)
            what = shown(path.parent if of is None else of)
            other = "folder" if of is None else "file"
            raise UsageError(
                f"{what}: is being written by {shown(holder)}; wait for it, or choose another {other}"
            ) from None
        except OSError:
            os.close(fd)
            raise
    return fd
