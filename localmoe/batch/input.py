"""The lines of a batch file, one at a time: a path, a .gz, or standard input kept in a temporary file.

Memory: one line and two hundred bytes or so per request, whatever the size of the file."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from localmoe.batch.request import Request, parse
from localmoe.chat_format import Render
from localmoe.errors import UsageError
from localmoe.files import MIB, full_disk, shown

MAX_LINE = 16 * MIB
MOST_SHOWN = 20


@dataclass(frozen=True)
class Survey:
    """order: digest of each custom_id -> its place. sha256: of all lines. models: the first few that lines name."""

    order: dict[bytes, int]
    sha256: str
    models: frozenset[str]


class Source:
    """A batch that can be read more than once."""

    def __init__(self, path: Path, stdin: BinaryIO, *, text: bool = False, raw: bool = False) -> None:
        """Raises UsageError if it cannot be opened."""
        self.name, self._text, self._raw = shown(path), text, raw
        try:
            file = stdin if str(path) == "-" else open(path, "rb")  # noqa: SIM115
        except OSError as cause:
            raise UsageError(f"{self.name}: cannot be opened ({cause.strerror})") from None
        self._file = file if file is not stdin and file.seekable() else _kept(file)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbers and lines that are not blank; of a line that is too long, its beginning of MAX_LINE + 1 bytes."""
        self._file.seek(0)
        packed = self._file.read(2) == b"\x1f\x8b"
        self._file.seek(0)
        stream = gzip.GzipFile(fileobj=self._file) if packed else self._file
        number = 0
        try:
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_LINE + 1)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
        except (OSError, EOFError, zlib.error) as cause:
            raise UsageError(f"{self.name}: cannot be read after line {number} ({shown(cause)})") from None

    def _request(self, number: int, line: bytes, renderer: Callable[[], Render] | None) -> Request:
        if len(line) > MAX_LINE:
            raise UsageError(f"the line is longer than {MAX_LINE / MIB:g} MiB")
        return parse(line, number, text=self._text, raw_prompts=self._raw, renderer=renderer)

    def requests(self, chosen: range) -> Iterator[Request]:
        """Those whose places are chosen, after check(). Raises UsageError if the file was changed meanwhile."""
        for place, (number, line) in enumerate(self._lines()):
            if place in chosen:
                yield self._request(number, line, None)

    def check(self, renderer: Callable[[], Render], say: Callable[[str], None]) -> Survey:
        """Read all once. renderer: gives what has to find the messages good; it is asked once there are messages.

        Tells `say` what is wrong with the first 20 bad lines; raises UsageError if there are any."""
        order: dict[bytes, int] = {}
        models: set[str] = set()
        total, bad = hashlib.sha256(), 0
        for number, line in self._lines():
            total.update(line + b"\n")
            try:
                request = self._request(number, line, renderer)
                digest = key(request.custom_id)
                if digest in order:
                    raise UsageError(f"custom_id {shown(request.custom_id)} is there already; ids must differ")
                order[digest] = len(order)
                if request.model is not None and len(models) < MOST_SHOWN:
                    models.add(shown(request.model))
            except UsageError as problem:
                bad += 1
                if bad <= MOST_SHOWN:
                    say(f"{self.name}: line {number}: {problem}")
        if bad or not order:
            raise UsageError(f"{self.name}: {bad} bad lines" if bad else f"{self.name}: holds no request")
        return Survey(order, total.hexdigest(), frozenset(models))


def _kept(stream: BinaryIO) -> BinaryIO:
    """What can be read only once, in a temporary file. Raises ResourceError if the disk is full."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    with full_disk(Path(tempfile.gettempdir())):
        shutil.copyfileobj(stream, file)
        file.flush()
    return file


def key(custom_id: str) -> bytes:
    """Stands for an id in memory."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
