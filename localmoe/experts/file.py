"""A file that experts are read from, past the page cache where the system allows it.

Knows bytes and memory; does not know what they are. Never maps a file, so that one that shrinks is an error and not the
end of the process."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from localmoe.errors import CheckpointError, ReadError
from localmoe.experts.layout import BLOCK
from localmoe.files import open_regular, shown


class File:
    """A file opened for reading, checked to be the one that was opened before."""

    def __init__(self, path: Path, size: int, identity: tuple[int, int] | None = None) -> None:
        """size, identity: what fstat said of it when its header was read; (device, inode). Raises CheckpointError."""
        self.path = path
        self.fd, found = open_regular(path, CheckpointError)
        info = os.fstat(self.fd)
        if found != size or identity not in (None, (info.st_dev, info.st_ino)):
            os.close(self.fd)
            raise CheckpointError(
                f"{shown(path)}: has been replaced or cut short since it was opened; get it again, or start again"
            )
        self.direct = self._go_direct()

    def _go_direct(self) -> bool:
        """Read past the page cache; False where the file system cannot."""
        if not hasattr(os, "O_DIRECT"):
            return False
        direct = -1
        try:
            direct = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            # Memory of its own page, because direct reads need aligned memory.
            os.preadv(direct, [mmap.mmap(-1, BLOCK)], 0)
        except OSError:
            if direct >= 0:
                os.close(direct)
            return False
        os.close(self.fd)
        self.fd = direct
        return True

    def read(self, target: memoryview, offset: int, needed: int) -> None:
        """Fill target from offset, at least `needed` bytes of it. Raises ReadError or CheckpointError."""
        done, failed = 0, False
        while done < needed:
            try:
                count = os.preadv(self.fd, [target[done:]], offset + done)
            except OSError as cause:
                if failed:
                    where = f"{shown(self.path)}: reading at byte {offset + done} failed"
                    raise ReadError(f"{where} twice ({cause.strerror}); check the disk") from None
                failed = True
                continue
            if count == 0:
                raise CheckpointError(
                    f"{shown(self.path)}: ends at byte {offset + done}, expected {needed - done} more "
                    "(truncated while in use?); get the file again"
                )
            done += count
            # Where a direct read was cut within a block, that block is read again.
            done = done if done >= needed or not self.direct else done // BLOCK * BLOCK
        if not self.direct and hasattr(os, "posix_fadvise"):
            # What is in a slot need not be in the page cache too.
            os.posix_fadvise(self.fd, offset, len(target), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self.fd)
