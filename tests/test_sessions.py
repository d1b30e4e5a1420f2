"""Sessions on disk: what comes back goes on to the bit, what does not fit is left out and said, a kill costs a turn.

Every test that damages something asks the same of what loads: that its next tokens are the right ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import LLM, SamplingParams
from localmoe.conversation import Conversation
from localmoe.errors import CheckpointError, GenerationError, LocalMoeError, ResourceError, UsageError
from localmoe.events import Completion, Finished
from localmoe.prompt import render_chat
from localmoe.safetensors_io import open_shard
from localmoe.session import Session
from localmoe.sessions import SessionStore, file_stem
from localmoe.snapshot import Snapshot, pack, unpack
from tests.tiny_engine import write_tiny_model

GREEDY = asdict(SamplingParams(temperature=0.0, max_tokens=12))
SYSTEM = {"role": "system", "content": "You tell stories."}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> LLM:
    return LLM(tiny_path, kernels="reference")


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions")


def ask(llm: LLM, conversation: Conversation, text: str, **changes: Any) -> Completion:
    """One turn, as the chat makes it."""
    conversation.messages.append({"role": "user", "content": text})
    params = SamplingParams(**conversation.params | changes)
    *_, last = llm.stream_chat(
        conversation.messages, params, thinking=conversation.thinking, session=conversation.session
    )
    assert isinstance(last, Finished)
    conversation.messages.append(last.completion.message)
    return last.completion


def talk(llm: LLM, *texts: str, **settings: Any) -> Conversation:
    conversation = Conversation([SYSTEM], params=dict(GREEDY), session=llm.session(), **settings)
    for text in texts:
        ask(llm, conversation, text)
    return conversation


def session_of(conversation: Conversation) -> Session:
    assert conversation.session is not None
    return conversation.session


def assert_same_state(one: Conversation, two: Conversation) -> None:
    a, b = session_of(one).snapshot(), session_of(two).snapshot()
    assert session_of(one).ids == session_of(two).ids
    states = ({n: t for n, t in s.tensors.items() if not n.startswith("mark.")} for s in (a, b))
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def files(store: SessionStore, name: str) -> tuple[Path, Path]:
    stem = file_stem(name)
    return store.folder / f"{stem}.jsonl", store.folder / f"{stem}.state"


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_a_loaded_session_goes_on_as_if_it_had_never_ended(llm: LLM, store: SessionStore, thinking: str) -> None:
    """Fails if anything that decides the next tokens is not saved, or the text is read again needlessly."""
    conversation = talk(llm, "Tell me a story.", "What then?", thinking=thinking)
    store.save_state("story", conversation, llm)
    other = LLM()
    loaded = store.load("story", other)
    assert loaded.notices == ()
    assert (loaded.messages, loaded.sampling()) == (conversation.messages, conversation.sampling())
    assert (loaded.thinking, loaded.system, loaded.title) == (thinking, SYSTEM["content"], "Tell me a story.")
    assert_same_state(loaded, conversation)
    straight = ask(llm, conversation, "And the end?", max_tokens=50)
    resumed = ask(other, loaded, "And the end?", max_tokens=50)
    assert resumed.token_ids == straight.token_ids
    assert resumed.stats.reused_tokens == straight.stats.reused_tokens > 20


def test_saving_a_turn_appends_a_line(tiny: LLM, store: SessionStore) -> None:
    """Fails if a long conversation is written again at every turn, or if nothing new makes a line."""
    conversation = talk(tiny, "one")
    store.save("a", conversation)
    path, state = files(store, "a")
    first = path.read_bytes()
    store.save("a", conversation)
    assert path.read_bytes() == first
    ask(tiny, conversation, "two")
    store.save("a", conversation)
    assert path.read_bytes().startswith(first)
    assert [len(json.loads(line)["messages"]) for line in path.read_text().splitlines()] == [3, 2]
    assert not state.exists()


def test_a_state_of_an_earlier_turn_is_still_of_use(tiny: LLM, store: SessionStore) -> None:
    conversation = talk(tiny, "one")
    store.save_state("a", conversation, tiny)
    length = session_of(conversation).length
    ask(tiny, conversation, "two")
    store.save("a", conversation)
    loaded = store.load("a", tiny)
    assert (loaded.notices, session_of(loaded).length) == ((), length)
    assert loaded.messages == conversation.messages
    assert ask(tiny, loaded, "three").token_ids == ask(tiny, conversation, "three").token_ids


def test_turns_can_be_taken_back(tiny: LLM, store: SessionStore) -> None:
    """Fails if what was taken back returns, or its state is taken for that of what came instead."""
    conversation = talk(tiny, "one", "two")
    store.save_state("a", conversation, tiny)
    del conversation.messages[3:]
    store.save("a", conversation)
    assert store.load("a").messages == conversation.messages
    ask(tiny, conversation, "another")
    conversation.thinking = "on"
    store.save("a", conversation)
    loaded = store.load("a", tiny)
    assert (loaded.messages, loaded.thinking) == (conversation.messages, "on")
    assert ask(tiny, loaded, "three").token_ids == ask(tiny, conversation, "three").token_ids


def test_a_question_that_was_not_read_does_not_cost_the_state(tiny: LLM, store: SessionStore) -> None:
    """Fails if leaving right after a failed reply means reading the whole conversation again."""
    conversation = talk(tiny, "one")
    conversation.messages.append({"role": "user", "content": "two"})
    store.save_state("a", conversation, tiny)
    loaded = store.load("a", tiny)
    assert loaded.notices == ()
    assert session_of(loaded).ids == session_of(conversation).ids


def test_another_system_text_costs_the_state(tiny: LLM, store: SessionStore) -> None:
    """Fails if a state is taken for that of a text that it has not read."""
    conversation = talk(tiny, "one")
    conversation.messages[0] = {"role": "system", "content": "You are terse."}
    store.save_state("a", conversation, tiny)
    loaded = store.load("a", tiny)
    assert "its tokens are not those of this conversation" in loaded.notices[0]
    assert (loaded.system, session_of(loaded).length) == ("You are terse.", 0)


def test_a_session_without_a_state_is_read_again(tiny: LLM, store: SessionStore) -> None:
    conversation = talk(tiny, "one")
    store.save("a", conversation)
    loaded = store.load("a", tiny)
    assert (loaded.notices, session_of(loaded).length) == ((), 0)
    assert ask(tiny, loaded, "two").token_ids == ask(tiny, conversation, "two").token_ids


def changed_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_new_field": 1}))


def changed_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def changed_weights(folder: Path) -> None:
    """The same values behind another header."""
    (shard,) = folder.glob("*.safetensors")
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(end.to_bytes(8, "little") + data[8:end] + b" " * 8 + data[end:])


def changed_values(folder: Path) -> None:
    """The same header before other values."""
    (shard,) = folder.glob("*.safetensors")
    fd, refs = open_shard(shard)
    os.close(fd)
    data = bytearray(shard.read_bytes())
    data[refs["embed.weight"].offset] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_config, "another config.json"),
        (changed_tokenizer, "another tokenizer.json"),
        (changed_weights, "other weights"),
        (changed_values, "another model"),
    ],
)
def test_the_state_of_another_model_is_refused(
    tiny: LLM, tiny_path: Path, store: SessionStore, tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    """Fails if tokens are continued by a model that has not read them."""
    conversation = talk(tiny, "one")
    store.save_state("a", conversation, tiny)
    folder = tmp_path / "other"
    shutil.copytree(tiny_path, folder)
    change(folder)
    loaded = store.load("a", LLM(folder, kernels="reference"))
    assert len(loaded.notices) == 1
    assert reason in loaded.notices[0]
    assert (session_of(loaded).length, loaded.messages) == (0, conversation.messages)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bfloat16"}, "it was computed in float32, this model runs in bfloat16"),
        ({"kv_format": "fp8"}, "its KV cache is full, this model's is fp8"),
    ],
)
def test_a_state_computed_otherwise_is_refused(
    tiny: LLM, tiny_path: Path, store: SessionStore, options: dict[str, Any], reason: str
) -> None:
    store.save_state("a", talk(tiny, "one"), tiny)
    loaded = store.load("a", LLM(tiny_path, kernels="reference", **options))
    assert reason in loaded.notices[0]
    assert session_of(loaded).length == 0


def test_the_state_of_another_conversation_is_refused(tiny: LLM, store: SessionStore) -> None:
    """Fails if files that were exchanged give answers to what was not asked."""
    for name, text in (("a", "one"), ("b", "two")):
        store.save_state(name, talk(tiny, text), tiny)
    shutil.copy(files(store, "b")[1], files(store, "a")[1])
    loaded = store.load("a", tiny)
    assert "its tokens are not those of this conversation" in loaded.notices[0]
    assert session_of(loaded).length == 0


def damage(raw: bytes, foreign: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a piece missing, other or more bytes, a piece of another conversation's file, or all of it."""
    data = bytearray(raw)
    match rng.randrange(6):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
        case 3:
            data += rng.randbytes(rng.randrange(1, 40))
        case 4:
            at, length = rng.randrange(len(data)), rng.randrange(1, len(data))
            data[at : at + length] = foreign[at : at + length]
        case _:
            return foreign
    return bytes(data)


def test_damaged_files_never_give_other_tokens(tiny: LLM, store: SessionStore) -> None:
    """Fails with anything but a LocalMoeError, or if a conversation or a state comes back that there never was."""
    stranger = talk(tiny, "eno", "two")
    store.save_state("b", stranger, tiny)
    foreign = [path.read_bytes() for path in files(store, "b")]
    conversation = talk(tiny, "one")
    store.save_state("a", conversation, tiny)
    known = [list(conversation.messages)]
    ask(tiny, conversation, "two")
    store.save_state("a", conversation, tiny)
    known += [list(conversation.messages), list(stranger.messages)]
    right = [ask(tiny, Conversation(list(m), params=GREEDY), "three").token_ids for m in known]
    paths = files(store, "a")
    before = [path.read_bytes() for path in paths]
    rng, seen = random.Random(7), dict[tuple[int, int], int]()
    for number in range(200):
        which = number % 2
        paths[which].write_bytes(damage(before[which], foreign[which], rng))
        paths[1 - which].write_bytes(before[1 - which])
        try:
            loaded = store.load("a", tiny)
        except LocalMoeError as problem:
            assert which == 0, problem
            continue
        turns, length = known.index(loaded.messages), session_of(loaded).length
        if length:
            assert_same_state(loaded, conversation)
            assert turns < 2
        # What comes next is decided by the text and the state, which is the one that was saved or none.
        seen[turns, length] = seen.get((turns, length), 0) + 1
        if seen[turns, length] == 1:
            assert ask(tiny, loaded, "three").token_ids == right[turns]
    assert sum(seen.values()) > 100


@pytest.mark.parametrize("left", [b"{", b'{"keep": 1, "mess', b"\x00" * 100, b"\xff"])
def test_a_torn_last_line_costs_the_turn_that_it_was(tiny: LLM, store: SessionStore, left: bytes) -> None:
    """Fails if what was being written when the power went takes the conversation with it, or stays in the way."""
    conversation = talk(tiny, "one")
    store.save("a", conversation)
    path, _state = files(store, "a")
    with path.open("ab") as file:
        file.write(left)
    loaded = store.load("a", tiny)
    assert loaded.messages == conversation.messages
    assert "not completely saved" in loaded.notices[0]
    ask(tiny, loaded, "two")
    store.save("a", loaded)
    again = store.load("a")
    assert (again.messages, again.notices) == (loaded.messages, ())


@pytest.mark.parametrize(
    "line",
    [
        {"keep": 3},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [1]},
        {"thinking": "maybe"},
        {"params": {"temperature": -1}},
        {"params": {"no_such": 1}},
        {"params": {"stop": 3}},
        {"updated": 1e300},
        {"tokens": 3, "ids": None},
        {"effort": []},
    ],
)
def test_lines_with_a_right_digest_and_wrong_facts_are_refused(store: SessionStore, line: dict[str, Any]) -> None:
    """Fails with a traceback: whoever wrote the file can also make its digests."""
    from localmoe import transcript

    facts = {"keep": 0, "messages": [], "title": "", "thinking": "off", "effort": None, "params": {}}
    facts |= {"created": 0, "updated": 0, "tokens": None, "ids": None}
    path, _state = files(store, "a")
    transcript.append(path, transcript.Transcript(), facts | line)
    with pytest.raises(CheckpointError, match=r"a\.jsonl"):
        store.load("a")
    assert "a.jsonl" in (store.list()[0].problem or "")


ODD = [
    None,
    True,
    0,
    -1,
    1 << 70,
    1.5,
    "x",
    [],
    {},
    [1],
    [[1]],
    [["1", "2"]],
    [[3, "x"]],
    [[1, []], [3, {}]],
    [[[], 1]],
    ["ab"],
]


@pytest.mark.parametrize("fact", ["model", "ends", "format", "config", "tokenizer", "weights", "dtype", "kv_format"])
def test_states_with_a_right_digest_and_wrong_facts_are_refused(tiny: LLM, store: SessionStore, fact: str) -> None:
    """Fails with a traceback, for the conversation or for whoever looks for a prefix."""
    conversation = Conversation([SYSTEM], session=tiny.prefill([5, 6, 7]))
    store.save_state("a", conversation, tiny)
    _text, state = files(store, "a")
    good = unpack(state.read_bytes())
    for value in ODD:
        state.write_bytes(pack(Snapshot(good.facts | {fact: value}, good.tensors)))
        assert session_of(store.load("a", tiny)).ids in ([], [5, 6, 7])
        assert store.find_prefix([5, 6, 7, 8], tiny) is None


def test_an_interrupted_session_is_saved_without_its_state(tiny: LLM, store: SessionStore) -> None:
    conversation = talk(tiny, "one")
    session_of(conversation).torn()
    with pytest.raises(GenerationError):
        store.save_state("a", conversation, tiny)
    assert store.load("a").messages == conversation.messages


KILLED_SAVES = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from localmoe import LLM
from localmoe import snapshot
from localmoe.sessions import SessionStore
from tests.test_sessions import ask, talk

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
llm = LLM(model, kernels="reference")
old = talk(llm, "one")
SessionStore(folder / "before").save_state("a", old, llm)
new = SessionStore(folder / "before").load("a", llm)
ask(llm, new, "two")

def die_at(left):
    def counted(real, half):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                half(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    pwrite = os.pwrite
    nothing = lambda *args, **kwargs: None
    os.pwrite = counted(pwrite, lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
    for name in ("open", "ftruncate", "fsync", "replace"):
        setattr(os, name, counted(getattr(os, name), nothing))
    snapshot.byte_view = counted(snapshot.byte_view, nothing)

outcomes = []
for point in range(1, 1000):
    work = folder / f"at{point}"
    shutil.copytree(folder / "before", work)
    child = os.fork()
    if child == 0:
        die_at([point])
        SessionStore(work).save_state("a", new, llm)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = SessionStore(work).load("a", llm)
    assert found.messages in (old.messages, new.messages), found.messages
    assert found.session.length in (old.session.length, new.session.length), found.notices
    turn, state = found.messages == new.messages, found.session.length == new.session.length
    ask(llm, found, "three")
    SessionStore(work).save_state("a", found, llm)
    assert SessionStore(work).load("a", llm).session.ids == found.session.ids
    assert not list(work.glob(".*")), list(work.iterdir())
    outcomes.append([turn, state])
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(json.dumps(outcomes))
"""


def test_a_kill_leaves_the_old_session_or_the_new_one(tiny_path: Path, tmp_path: Path) -> None:
    """At every call that changes the disk. Fails if any leaves a session that cannot be loaded and saved again."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED_SAVES, str(tiny_path), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = [tuple(outcome) for outcome in json.loads(done.stdout)]
    # First nothing is new, then the text, then the state as well.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {(False, False), (True, False), (True, True)}


def save_many(folder: Path, name: str, rounds: int, failed: Any) -> None:
    store = SessionStore(folder)
    conversation = Conversation([SYSTEM])
    for number in range(rounds):
        conversation.messages.append({"role": "user", "content": f"{os.getpid()} {number}"})
        try:
            store.save(name, conversation)
        except UsageError:
            failed.value += 1
            return


def test_two_processes_do_not_mix_their_turns(tmp_path: Path) -> None:
    """Fails if both save to one session, each believing that it is alone."""
    context = multiprocessing.get_context("spawn")
    failed = context.Value("i", 0)
    both = [context.Process(target=save_many, args=(tmp_path / "s", "a", 20, failed)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert failed.value == 1
    loaded = SessionStore(tmp_path / "s").load("a")
    assert len(loaded.messages) == 21
    assert len({m["content"].split()[0] for m in loaded.messages[1:]}) == 1


def test_a_session_that_is_being_saved_is_waited_for_and_then_given_up(store: SessionStore, tmp_path: Path) -> None:
    """Fails if a save hangs behind a process that was stopped, or goes ahead beside it."""
    from localmoe.sessions import locked

    impatient = SessionStore(store.folder, wait_seconds=0.05)
    held = locked(store.folder / "a.lock", 1, "a")
    with pytest.raises(UsageError, match="a is being saved by another process"):
        impatient.save("a", Conversation([SYSTEM]))
    os.close(held)
    impatient.save("a", Conversation([SYSTEM]))


def test_a_name_that_is_taken_is_not_written_over(store: SessionStore) -> None:
    conversation = Conversation([SYSTEM])
    store.save("a", conversation)
    with pytest.raises(UsageError, match="is another conversation; save under another name"):
        store.save("a", Conversation([SYSTEM]))
    one, two = store.load("a"), store.load("a")
    one.messages.append({"role": "user", "content": "x"})
    store.save("a", one)
    with pytest.raises(UsageError, match="was changed by another process"):
        store.save("a", two)
    store.save("b", two)


def test_files_are_for_their_owner_only(tiny: LLM, store: SessionStore) -> None:
    before = os.umask(0)
    try:
        fresh = SessionStore(store.folder / "inner")
        fresh.save_state("a", talk(tiny, "one"), tiny)
        fresh.save_prefix(tiny.prefill([1, 2, 3]), tiny)
    finally:
        os.umask(before)
    for path in [fresh.folder, *fresh.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", ".hidden", "..", "a/b", "a\nb", "ä ö", "a%2Fb", "\0", "~"])
def test_any_name_is_a_plain_file(store: SessionStore, name: str) -> None:
    """Fails if a name leads out of the folder, hides a file, or two names are one file."""
    store.save(name, Conversation([SYSTEM]))
    assert {path.parent for path in store.folder.rglob("*")} == {store.folder}
    assert not list(store.folder.glob(".*"))
    assert [saved.name for saved in store.list()] == [name]
    store.remove(name)
    assert list(store.folder.iterdir()) == []
    assert len({file_stem(n) for n in ("a/b", "a%2Fb", "a-b")}) == 3


@pytest.mark.parametrize("name", ["", "x" * 201, "ä" * 40, "\ud800"])
def test_a_name_that_cannot_be_a_file_is_refused(store: SessionStore, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        store.save(name, Conversation([SYSTEM]))


def test_the_list_names_what_is_there(tiny: LLM, store: SessionStore) -> None:
    """Fails if one damaged file, or one that is not ours, hides the others."""
    store.save("old", Conversation([SYSTEM]))
    store.save_state("new", talk(tiny, "Hello  there"), tiny)
    (store.folder / "bad.jsonl").write_bytes(b"nonsense\n")
    (store.folder / "a b.jsonl").write_bytes(b"not a name of ours\n")
    new, old, bad = store.list()
    assert (new.name, new.title, new.messages, new.state_nbytes > 0) == ("new", "Hello there", 3, True)
    assert (old.name, old.messages, old.state_nbytes) == ("old", 1, 0)
    assert (bad.name, "line 1 is damaged" in (bad.problem or "")) == ("bad", True)


def test_what_is_not_there_cannot_be_loaded_or_removed(store: SessionStore) -> None:
    for call in (store.load, store.remove):
        with pytest.raises(UsageError, match="no saved session a"):
            call("a")


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": "\ud800"}], [{"role": "x"}], [{"role": "user", "x": {1}}]]
)
def test_what_cannot_be_loaded_again_is_not_saved(store: SessionStore, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError):
        store.save("a", Conversation(messages))
    assert store.list() == []


def test_a_full_disk_is_told_and_leaves_what_was_there(
    tiny: LLM, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = talk(tiny, "one")
    store.save_state("a", conversation, tiny)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    old = list(conversation.messages)
    ask(tiny, conversation, "two")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="free some disk space"):
        store.save_state("a", conversation, tiny)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in store.folder.iterdir() if path.suffix != ".lock"} == {
        name: data for name, data in before.items() if not name.endswith(".lock")
    }
    assert store.load("a").messages == old
    store.save_state("a", conversation, tiny)


def test_a_prefix_is_found_again(tiny: LLM, tiny_path: Path, store: SessionStore) -> None:
    """Fails if a document is read twice, if a longer match is passed over, or another's state is taken."""
    document = [{"role": "system", "content": "A long document about frogs. " * 20}]
    ids = tiny.shared_prefix(document)
    store.save_prefix(tiny.prefill(ids[:30]), tiny)
    name = store.save_prefix(tiny.prefill(ids), tiny, "frogs")
    assert name == "frogs"
    store.save_prefix(tiny.prefill([*ids[:-1], ids[0]]), tiny)
    messages = [*document, {"role": "user", "content": "What is it about?"}]
    *_, fresh = tiny.stream_chat(messages, SamplingParams(**GREEDY))
    other = LLM(tiny_path, kernels="reference")
    found = store.find_prefix([*other.shared_prefix(document), 1], other)
    assert found is not None
    session, length = found
    assert (length, session.ids) == (len(ids), ids)
    *_, last = other.stream_chat(messages, SamplingParams(**GREEDY), session=session)
    assert isinstance(last, Finished) and isinstance(fresh, Finished)
    assert last.completion.stats.reused_tokens == len(ids)
    assert last.completion.token_ids == fresh.completion.token_ids
    assert store.find_prefix(ids, other) is not None, "one token is left to compute"
    assert store.find_prefix([9, 9, 9], other) is None
    assert store.find_prefix([], other) is None
    assert store.find_prefix(ids, LLM(tiny_path, kernels="reference", dtype="bfloat16")) is None


def test_what_follows_a_kept_beginning_is_the_same_to_the_bit(tiny: LLM, tiny_path: Path, store: SessionStore) -> None:
    """Fails if going on from a mark that another process has saved is not what reading the text gives."""
    document = {"role": "system", "content": "A long document about frogs. " * 20}
    first = [document, {"role": "user", "content": "What is it about?"}]
    session = tiny.session()
    list(tiny.stream_chat(first, SamplingParams(**GREEDY), session=session))
    at = len(tiny.shared_prefix([document]))
    assert at in session.marks
    store.save_prefix(session, tiny, at=at)
    second = [document, {"role": "user", "content": "Who is the frog?"}]
    other = LLM(tiny_path, kernels="reference")
    found = store.find_prefix(render_chat(second).ids(other.tokenizer), other, at_least=at)
    assert found is not None and found[1] == at
    read = other.session()
    one, two = (
        list(other.stream_chat(second, SamplingParams(**GREEDY | {"logprobs": 5}), session=each))
        for each in (found[0], read)
    )
    assert isinstance(one[-1], Finished) and isinstance(two[-1], Finished)
    assert one[-1].completion.stats.reused_tokens == at
    # Probabilities and all.
    assert one[-1].completion.logprobs == two[-1].completion.logprobs
    assert pack(found[0].snapshot()) == pack(read.snapshot())
    assert store.find_prefix([*read.ids, 1], other, at_least=at + 1) is None


def test_a_prefix_ends_at_a_turn_of_a_saved_conversation(tiny: LLM, store: SessionStore) -> None:
    """Fails if a conversation that went another way cannot be of use to one that begins like it."""
    conversation = talk(tiny, "one", "two")
    store.save_state("a", conversation, tiny)
    marks = [n for n, _digest in session_of(conversation).snapshot().facts["ends"]]
    ids = session_of(conversation).ids
    assert len(marks) > 2
    for length in marks:
        found = store.find_prefix([*ids[:length], 5], tiny)
        assert found is not None
        session, usable = found
        assert usable == length
        assert session.begin([*ids[:length], 5]) == length


def test_a_damaged_prefix_is_passed_over(tiny: LLM, store: SessionStore) -> None:
    """Fails if the best match, damaged behind its head, is an error or hides the next best."""
    ids = list(range(1, 50))
    store.save_prefix(tiny.prefill(ids[:20]), tiny, "short")
    store.save_prefix(tiny.prefill(ids), tiny, "long")
    path = store.folder / "prefixes" / "long.state"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    (store.folder / "prefixes" / "empty.state").write_bytes(b"")
    found = store.find_prefix([*ids, 1], tiny)
    assert found is not None
    assert found[1] == 20


def test_the_states_used_longest_ago_make_room(tiny: LLM, tmp_path: Path) -> None:
    """Fails if the folder grows without end, if what is in use goes first, or a conversation's state, which was asked
    for, goes for a prefix, which was not."""
    ids = list(range(1, 60))
    store = SessionStore(tmp_path / "s")
    store.save_state("talk", talk(tiny, "one"), tiny)
    for number, name in enumerate("abc"):
        path = store.folder / "prefixes" / f"{name}.state"
        store.save_prefix(tiny.prefill([number, *ids[1:]]), tiny, name)
        os.utime(path, (1000 + number, 1000 + number))
    size, of_talk = path.stat().st_size, files(store, "talk")[1].stat().st_size
    os.utime(files(store, "talk")[1], (500, 500))
    assert store.find_prefix([0, *ids[1:], 5], tiny) is not None
    store = SessionStore(tmp_path / "s", max_state_bytes=of_talk + 2 * size + size // 2)
    store.save_prefix(tiny.prefill([9, *ids[1:]]), tiny, "d")
    assert {path.name for path in store.states.paths()} == {"talk.state", "a.state", "d.state"}
    small = SessionStore(tmp_path / "s", max_state_bytes=of_talk + size // 2)
    with pytest.raises(ResourceError, match="saved states may have"):
        small.save_prefix(tiny.prefill(ids), tiny)
    assert len(store.states.paths()) == 3
    small.save_state("other", talk(tiny, "one"), tiny)
    assert {path.name for path in store.states.paths()} == {"other.state"}
    assert store.load("talk", tiny).notices == ()
