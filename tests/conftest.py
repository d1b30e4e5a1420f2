"""What tests of several files need."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localmoe import LLM
    from tests.chat_talk import Talk
    from tests.fake_llm import FakeLLM
    from tests.terminal import ForkServer, Start, Terminal


# Two processes of pytest share the cores: where each has threads for all of them, they wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started by nohup, tests would hand on to the programs they start that a closed terminal is to be ignored.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def shared_data(relative: str) -> Path:
    """A file or folder of the shared test data; the test, or the whole module, is skipped where it is absent.

    The data lies beside the checkout in shared/data, or where LOCALMOE_TEST_DATA says."""
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    path = Path(os.environ.get("LOCALMOE_TEST_DATA", beside)) / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared test data (LOCALMOE_TEST_DATA)", allow_module_level=True)
    return path


@pytest.fixture(autouse=True)
def library_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty model library, no settings and no state, in every process of a test: never of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("library")
    monkeypatch.setenv("LOCALMOE_MODELS", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path_factory.mktemp("config") / "config.toml"))
    return folder


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """Stands in for LLM on the command line, and replies one, two, three."""
    from tests.fake_llm import FakeLLM

    class Model(FakeLLM):
        pass

    Model.replies = [[("answer", "one")], [("answer", "two")], [("answer", "three")]]
    monkeypatch.setattr("localmoe.api.LLM", Model)
    return Model


@pytest.fixture(scope="session")
def strict_mini() -> LLM:
    """The embedded model with strict kernels."""
    from localmoe import LLM

    return LLM(kernels="strict")


@pytest.fixture
def one_load(monkeypatch: pytest.MonkeyPatch, strict_mini: LLM) -> None:
    """Every run of a command in this process has the same model, which is loaded once."""
    monkeypatch.setattr("localmoe.api.LLM", lambda *_args, **_options: strict_mini)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs a chat whose input is the given lines."""
    from localmoe.cli.main import main

    def run(*lines: str, options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", *options])

    return run


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    pytest.importorskip("termios")
    from tests.terminal import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def terminals(fork_server: ForkServer, tmp_path: Path) -> Iterator[Start]:
    """Begins command lines in pseudo-terminals, with arguments as Terminal has them."""
    from tests.terminal import Terminal

    opened: list[Terminal] = []

    def begin(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(fork_server, tmp_path, *arguments, **options))
        return opened[-1]

    yield begin
    for each in opened:
        each.close()


@pytest.fixture
def start(terminals: Start) -> Start:
    """Begins chats in pseudo-terminals, with a fake model that says `pieces` slowly, then "done"."""

    def begin(pieces: int | list[str], *options: str, term: str = "xterm") -> Terminal:
        words = [f"w{i} " for i in range(pieces)] if isinstance(pieces, int) else pieces
        replies = [[("answer", word) for word in words], [("answer", "done")]]
        chat = terminals("chat", *options, term=term, fake={"replies": replies, "seconds_per_piece": 0.1})
        chat.expect(chat.prompt)
        return chat

    return begin
