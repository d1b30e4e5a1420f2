"""The lines of a batch file, one at a time: a path, a .gz, or standard input kept in a temporary file.

Memory: one line and two hundred bytes or so per request, whatever the size of the file."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from localmoe.batch.request import Reading, Refused, Request, id_of, parse
from localmoe.chat_format import Render
from localmoe.errors import UsageError
from localmoe.files import MIB, full_disk, shown

MAX_LINE = 16 * MIB
MOST_SHOWN = 20


@dataclass(frozen=True)
class Survey:
    """order: digest of each id -> its place. bad: the places of lines that are no requests. sha256: of all lines.

    models: the first few that lines name."""

    order: dict[bytes, int]
    bad: frozenset[int]
    sha256: str
    models: frozenset[str]


class Source:
    """A batch that can be read more than once."""

    def __init__(self, path: Path, stdin: BinaryIO, how: Reading) -> None:
        """Raises UsageError if it cannot be opened, ResourceError if stdin does not fit on the disk."""
        self.name, self._how = shown(path), how
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

    def _read(
        self, place: int, number: int, line: bytes, order: dict[bytes, int], renderer: Callable[[], Render] | None
    ) -> Request | Refused:
        """The line at this place, whose id is entered into the order."""
        try:
            if len(line) > MAX_LINE:
                raise UsageError(f"the line is longer than {MAX_LINE / MIB:g} MiB")
            request = parse(line, number, self._how, renderer)
            if order.setdefault(key(request.custom_id), place) != place:
                raise UsageError(f"custom_id {shown(request.custom_id)} is there already; ids must differ")
        except UsageError as problem:
            # No two lines go by one id, or a row would be lost. Whoever reads them again finds the same.
            names = itertools.chain(
                [id_of(line, number, self._how)], (f"line {number}{'+' * i}" for i in itertools.count())
            )
            own = next(name for name in names if order.setdefault(key(name), place) == place)
            return Refused(own, hashlib.sha256(b"refused\0" + line).hexdigest(), str(problem))
        return request

    def requests(self, survey: Survey, chosen: range, renderer: Callable[[], Render]) -> Iterator[Request | Refused]:
        """Those whose places are chosen, after check(); what is bad there is so here, too.

        Raises UsageError if the file cannot be read any more."""
        for place, (number, line) in enumerate(self._lines()):
            if place in chosen:
                yield self._read(place, number, line, survey.order, renderer if place in survey.bad else None)

    def check(
        self, renderer: Callable[[], Render], say: Callable[[str], None], *, skip_invalid: bool = False
    ) -> Survey:
        """Read all once. renderer: gives what has to find the messages good; it is asked once there are messages.

        Tells `say` what is wrong with the first 20 bad lines; raises UsageError if there are any, unless they are to be
        skipped, or no line at all."""
        order: dict[bytes, int] = {}
        total = hashlib.sha256()
        bad: set[int] = set()
        models: set[str] = set()
        for place, (number, line) in enumerate(self._lines()):
            total.update(line + b"\n")
            request = self._read(place, number, line, order, renderer)
            if isinstance(request, Refused):
                bad.add(place)
                if len(bad) <= MOST_SHOWN:
                    say(f"{self.name}: line {number}: {request.problem}")
            elif request.model is not None and len(models) < MOST_SHOWN:
                models.add(shown(request.model))
        if bad and not skip_invalid:
            raise UsageError(f"{self.name}: {len(bad)} bad lines; correct them, or --skip-invalid answers the others")
        if not order:
            raise UsageError(f"{self.name}: holds no request")
        return Survey(order, frozenset(bad), total.hexdigest(), frozenset(models))


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
