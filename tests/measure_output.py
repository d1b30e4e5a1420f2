"""What showing an answer costs: python -m tests.measure_output, from the root of a checkout.

Runs the writer of a reply in a pseudo-terminal, once per size, as fast as it goes. Prints CPU time of its thread per
token (of 4 characters), what that is of the 20 ms that a token takes at 50 tok/s, and bytes sent per byte of text."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
import time

from localmoe.cli.render import ReplyWriter, open_console
from tests.markdown_reply import REPLY, pieces

SIZES = ((80, 24), (120, 50), (20, 24))
TOKENS_PER_S = 50
ROUNDS = 10


def measure(columns: int, lines: int, *, markdown: bool) -> tuple[float, float]:
    """CPU seconds per token, and bytes to the terminal per byte of text."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    received = [0]
    reader = threading.Thread(target=_drain, args=(controller, received))
    reader.start()
    before = sys.stdout
    with os.fdopen(terminal, "w", encoding="utf-8") as sys.stdout:
        started = time.thread_time()
        for _ in range(ROUNDS):
            with ReplyWriter(open_console(), markdown=markdown) as writer:
                for piece in pieces(REPLY):
                    writer.write("answer", piece)
        seconds = time.thread_time() - started
    sys.stdout = before
    reader.join()
    os.close(controller)
    return seconds / len(pieces(REPLY)) / ROUNDS, received[0] / len(REPLY.encode()) / ROUNDS


def _drain(controller: int, received: list[int]) -> None:
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:  # the terminal was closed
            return
        # The terminal makes two bytes of a newline.
        received[0] += len(data) - data.count(b"\r\n")


def main() -> None:
    os.environ |= {"TERM": "xterm-256color"}
    os.environ.pop("NO_COLOR", None)
    print(f"{len(REPLY.encode()):,} bytes, {len(pieces(REPLY)):,} tokens")
    for markdown in (False, True):
        for columns, lines in SIZES:
            seconds, share = measure(columns, lines, markdown=markdown)
            print(
                f"{'markdown' if markdown else 'plain':8} {columns:3}x{lines}: {1e6 * seconds:4.0f} us per token, "
                f"{100 * seconds * TOKENS_PER_S:.2f} % of {TOKENS_PER_S} tok/s, {share:.2f} bytes per byte"
            )


if __name__ == "__main__":
    main()
