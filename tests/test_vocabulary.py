"""localmoe.vocabulary: library calls that can be left, and whose failures have a name."""

from __future__ import annotations

import signal
import threading

import pytest

from localmoe.errors import ModelError
from localmoe.tokenizer import Tokenizer
from localmoe.vocabulary import leavable
from tests.tiny_tokenizer import tiny_description


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals aimed at a thread")
def test_ctrl_c_leaves_the_library() -> None:
    """Fails if the call is made in the main thread, where Python cannot act on a signal until it returns."""
    release = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def work() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        release.wait(60)

    # A process that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            leavable(work)
    finally:
        signal.signal(signal.SIGINT, before)
        release.set()


def test_results_and_errors_come_back() -> None:
    """Fails if an exception dies with its thread."""
    assert leavable(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        leavable(lambda: 1 // 0)


def test_a_pattern_that_backtracks_without_end_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics on it, which is not an Exception: fails if that goes through."""
    description = tiny_description()
    splits = description["pre_tokenizer"]["pretokenizers"]
    splits[0]["pattern"]["Regex"] = "(a+)+$"
    tokenizer = Tokenizer(description)
    with pytest.raises(ModelError, match=r"gave up .*retry-limit"):
        tokenizer.encode("a" * 40 + "b")
    capfd.readouterr()
