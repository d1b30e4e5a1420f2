"""Chats that are killed: what was finished is there again in another process, and goes on to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from localmoe import LLM
from localmoe.conversation import Conversation
from localmoe.events import Completion, Finished
from localmoe.session import Session
from localmoe.sessions import SessionStore
from tests.tiny_engine import write_tiny_model

ROOT = Path(__file__).parents[1]
QUESTIONS = ("Tell me a story about a frog.", "And then?", "Why?")


def answer(llm: LLM, conversation: Conversation, question: str, tokens: int) -> Completion:
    conversation.messages.append({"role": "user", "content": question})
    params = replace(llm.default_params(), temperature=0.0, max_tokens=tokens)
    *_, last = llm.stream_chat(conversation.messages, params, session=conversation.session)
    assert isinstance(last, Finished)
    conversation.messages.append(last.completion.message)
    return last.completion


def assert_same(one: Session | None, two: Session | None) -> None:
    """Tokens, marks and every byte of the state."""
    assert one is not None and two is not None
    # Where a session was saved is marked when it is loaded.
    assert (one.ids, one.marks[:-1]) == (two.ids, two.marks)
    a, b = one.snapshot().tensors, two.snapshot().tensors
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_chat_goes_on_in_another_process_as_if_nothing_had_been(tmp_path: Path) -> None:
    """A real chat, saved and then killed. Fails if one bit of the state or one of the next 50 tokens is another."""
    command = [sys.executable, "-m", "localmoe.cli.main", "chat", "--temp", "0", "-n", "12", "--no-keep-prefixes"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("\n".join((*QUESTIONS, "/save frog", "")))
        process.stdin.flush()
        for line in process.stderr:
            if "saved as frog" in line:
                break
        process.kill()
    llm = LLM()
    straight = Conversation(session=llm.session())
    for question in QUESTIONS:
        answer(llm, straight, question, 12)
    resumed = SessionStore(tmp_path / "localmoe" / "sessions").load("frog", llm)
    assert (resumed.messages, resumed.notices) == (straight.messages, ())
    assert_same(resumed.session, straight.session)
    one, two = (answer(llm, each, "Tell me all of it.", 50) for each in (straight, resumed))
    assert one.token_ids == two.token_ids
    assert one.stats.reused_tokens == two.stats.reused_tokens > 0


# Turns with a save after each and a state after the second, killed at its n-th step, write or read; a line of output
# says how many turns were finished and saved.
KILLED_CHATS = """
import json, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from localmoe import LLM
from localmoe.conversation import Conversation
from localmoe.engine import Engine
from localmoe.sessions import SessionStore
from tests.test_sessions_killed import QUESTIONS, answer

folder = Path(sys.argv[2])
llm = LLM(sys.argv[1], kernels="reference")

def chat(store, conversation, finished):
    for number, question in enumerate(QUESTIONS):
        answer(llm, conversation, question, 6)
        (store.save_state if number else store.save)("a", conversation, *([llm] if number else []))
        finished()

def die_at(calls):
    def counted(real):
        def call(*args, **kwargs):
            calls[0] -= 1
            if calls[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    Engine.advance = counted(Engine.advance)
    for name in ("open", "pwrite", "ftruncate", "fsync", "replace", "pread"):
        setattr(os, name, counted(getattr(os, name)))

def run_child(work, calls):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        die_at(calls)
        chat(SessionStore(work), Conversation(session=llm.session()), lambda: os.write(write, b"."))
        os.write(write, b"!%d" % -calls[0])
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as pipe:
        return pipe.read()

whole = Conversation(session=llm.session())
chat(SessionStore(folder / "whole"), whole, lambda: None)
turns, _, most = run_child(folder / "counted", [0]).partition(b"!")
assert turns == b"..." and int(most) > 30, (turns, most)
rng, outcomes = random.Random(3), []
for number, point in enumerate(rng.sample(range(1, int(most)), 30)):
    finished = run_child(folder / str(number), [point]).count(b".")
    store = SessionStore(folder / str(number))
    found = store.find("a", llm) or Conversation(session=llm.session())
    turns = len(found.messages) // 2
    assert found.messages == whole.messages[: 2 * turns] and turns >= finished, (point, found.messages)
    for question in QUESTIONS[turns:]:
        answer(llm, found, question, 6)
    assert found.messages == whole.messages, point
    outcomes.append([finished, turns - finished, found.notices])
print(json.dumps(outcomes))
"""


def test_a_kill_at_any_moment_costs_the_unfinished_turn_at_most(tmp_path: Path) -> None:
    """Within replies and within saves. Fails if a finished turn is lost, or what follows is not what would have."""
    model = write_tiny_model(tmp_path / "model")
    command = [sys.executable, "-c", KILLED_CHATS, str(model), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {finished for finished, _more, _notices in outcomes} == {0, 1, 2}
    assert {more for _finished, more, _notices in outcomes} <= {0, 1}
    assert not any("state is not used" in notice for *_, notices in outcomes for notice in notices)
