"""Reads experts from disk into slots with several threads.

Knows files, bytes and memory; does not know experts' meaning. Memory: none but the slots it is given."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from localmoe.errors import UsageError
from localmoe.experts.file import File
from localmoe.experts.layout import Range

# Requests in flight and their size: one 13 MB expert keeps all threads busy (bench 2026-11 on NVMe behind virtio:
# anything from 4 to 16 threads and 1 to 4 MiB gives the same rate, one thread half of it).
THREADS = 8
_PIECE = 2 << 20
# Of them, those that may read what is not urgent: as fast as all of them, with half as much before what is.
_PATIENT_THREADS = 4


class Job:
    """One expert on its way. Everything but `finish` is the reader's own."""

    def __init__(self, finish: Callable[[], None], *, urgent: bool) -> None:
        self.finish, self.urgent = finish, urgent
        self.pending = 0
        self.done = False
        self.error: BaseException | None = None


class Cancelled(Exception):
    """The error of a job that was given up, or left when the reader was closed."""


_Piece = tuple[Job, Range, int, memoryview]


class Reader:
    """Threads that read in the order of submission, what is urgent first. Close it, or they last as long as the
    process."""

    def __init__(self, open_file: Callable[[int], File], threads: int = THREADS) -> None:
        """open_file(number): the file of a Range, opened when it is first read."""
        self._open_file, self._files = open_file, dict[int, File]()
        self._changed = threading.Condition()
        self._queue: deque[_Piece] = deque()
        # By job, because one may be taken out of thousands.
        self._patient: dict[Job, deque[_Piece]] = {}
        # Threads at work; of them, those at what is not urgent. Only the threads count, so an interruption cannot.
        self._reading = self._reading_patiently = 0
        self._closed = False
        self._active, self._since = 0, 0.0
        self.bytes_read = 0
        self._busy_before = 0.0
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def busy_seconds(self) -> float:
        """Time with something to read."""
        with self._changed:
            return self._busy_before + (time.perf_counter() - self._since if self._active else 0.0)

    def submit(
        self, ranges: Sequence[Range], slot: memoryview, finish: Callable[[], None], *, urgent: bool = True
    ) -> Job:
        """Read ranges to their places in the slot; then finish() runs in a reader's thread, and may refuse.

        Raises UsageError if the reader has been closed."""
        job = Job(finish, urgent=urgent)
        pieces = [
            (job, part, at, slot[part.at + at : part.at + min(at + _PIECE, part.nbytes)])
            for part in ranges
            for at in range(0, part.nbytes, _PIECE)
        ]
        with self._changed:
            if self._closed:
                raise UsageError("the model has been closed, so no expert can be read; load it again")
            job.pending = len(pieces)
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1
            if urgent:
                self._queue.extend(pieces)
            elif pieces:
                self._patient[job] = deque(pieces)
            self._changed.notify_all()
        return job

    def hurry(self, job: Job) -> None:
        """The job is urgent from now on."""
        with self._changed:
            if not job.urgent:
                job.urgent = True
                self._queue.extend(self._take_patient(job))
                self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Read no more of a job that is not urgent; unless it is done, it ends with the error Cancelled."""
        with self._changed:
            if job.done or job.urgent:
                return
            job.error = job.error or Cancelled()
            self._drop(self._take_patient(job))

    def _drop(self, pieces: Sequence[_Piece]) -> None:
        """What nobody has begun to read will not be read."""
        for job, _part, _at, target in pieces:
            target.release()
            job.error = job.error or Cancelled()
            job.pending -= 1
            if not job.pending:
                self._end(job)

    def _take_patient(self, job: Job) -> Sequence[_Piece]:
        """The pieces of a job that nobody has begun to read, out of the queue."""
        return self._patient.pop(job, ())

    def _next(self, *, patient: bool) -> _Piece:
        if not patient:
            return self._queue.popleft()
        job = next(iter(self._patient))
        piece = self._patient[job].popleft()
        if not self._patient[job]:
            del self._patient[job]
        return piece

    def wait(self, job: Job) -> None:
        """Until the job is done. Raises what went wrong."""
        with self._changed:
            # A limit, because only a wait with one can be ended by Ctrl-C on every system.
            while not job.done:
                self._changed.wait(1.0)
        if job.error is not None:
            raise job.error

    def settle(self, job: Job) -> None:
        """Until nothing is written for the job any more, however it ended."""
        with self._changed:
            while not job.done:
                self._changed.wait(1.0)

    def quiet(self) -> None:
        """After an interruption, wherever it came: forget what is still to be read, and wait for what is being read.

        Nothing is written when this returns. Jobs that were not done never will be."""
        with self._changed:
            self._queue.clear()
            self._patient.clear()
            while self._reading:
                self._changed.wait(1.0)
            if self._active:
                self._busy_before += time.perf_counter() - self._since
                self._active = 0

    def close(self) -> None:
        """Let the threads end, whatever is still to be read: who waits for that is told."""
        with self._changed:
            self._closed = True
            left = [*self._queue, *itertools.chain(*self._patient.values())]
            self._queue.clear()
            self._patient.clear()
            self._drop(left)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._may_be_patient()) and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                patient = not self._queue
                self._reading += 1
                self._reading_patiently += patient
                job, part, at, target = self._next(patient=patient)
            error: BaseException | None = None
            nbytes = 0
            try:
                if job.error is None:
                    nbytes = len(target)
                    self._file(part.file).read(target, part.offset + at, min(nbytes, part.needed - at))
            # Of any kind, because it is not caught to carry on: who waits for the job raises it.
            except BaseException as problem:
                error = problem
            finally:
                target.release()
            self._complete(job, nbytes, error, patient=patient)
            with self._changed:
                self._reading -= 1
                if not self._reading:
                    self._changed.notify_all()

    def _may_be_patient(self) -> bool:
        return bool(self._patient) and self._reading_patiently < _PATIENT_THREADS

    def _complete(self, job: Job, nbytes: int, error: BaseException | None, *, patient: bool) -> None:
        """A piece is read; the last one of a job finishes it."""
        with self._changed:
            self._reading_patiently -= patient
            job.error = job.error or error
            job.pending -= 1
            self.bytes_read += nbytes
            last = job.pending == 0
        if not last:
            return
        try:
            if job.error is None:
                job.finish()
        except BaseException as problem:
            job.error = problem
        with self._changed:
            self._end(job)

    def _end(self, job: Job) -> None:
        """Nothing is done for the job any more."""
        job.done = True
        self._active -= 1
        if self._active == 0:
            self._busy_before += time.perf_counter() - self._since
        self._changed.notify_all()

    def _file(self, number: int) -> File:
        with self._changed:
            if number not in self._files:
                self._files[number] = self._open_file(number)
            return self._files[number]
