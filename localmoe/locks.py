"""One process at a time: locks that end with the process that holds them. POSIX only."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from localmoe.errors import UsageError
from localmoe.files import full_disk, shown


def lock(path: Path) -> int:
    """Descriptor of a lock that ends with the process.

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
            raise UsageError(
                f"{shown(path.parent)}: is being written by {shown(holder)}; wait for it, or choose another folder"
            ) from None
        except OSError:
            os.close(fd)
            raise
    return fd
