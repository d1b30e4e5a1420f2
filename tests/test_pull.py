"""localmoe/pull.py: a download is a model or it is hidden, takes data only, and goes on after whatever stopped it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from localmoe import pull
from localmoe.checkpoint import INDEX, Checkpoint
from localmoe.errors import CheckpointError, ConfigError, LocalMoeError, ModelError, ResourceError, UsageError
from localmoe.hub import Listing, RemoteFile
from localmoe.library import ORIGIN, Library
from localmoe.locks import lock
from tests.fake_hub import COMMIT, FakeHub
from tests.tiny_v4 import random_state, tiny_config, write_published

REPO = "owner/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    config = tiny_config()
    folder = write_published(tmp_path / "source", config, random_state(config), quantized=False, shards=3)
    (folder / "LICENSE").write_text("of its own")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "model.bin").write_bytes(b"pickle")
    return FakeHub(folder)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


def bring(library: Library, hub: FakeHub) -> Path:
    plan = pull.prepare(library, hub, REPO)
    pull.check_room(library, plan)
    return pull.download(library, hub, plan, lambda *_: None)


def test_data_comes_and_code_does_not(library: Library, hub: FakeHub) -> None:
    folder = bring(library, hub)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(folder)) == sorted(["LICENSE", "config.json", INDEX, *shards, ORIGIN])
    # What can refuse a repository comes before what takes hours.
    assert hub.fetched == ["config.json", "LICENSE", INDEX, *shards]
    assert os.listdir(library.folder) == ["tiny"]
    assert json.loads((folder / ORIGIN).read_text()) == {"repo": REPO, "revision": None, "commit": COMMIT}
    Checkpoint.open(folder).close()


HOSTILE = ["../x.json", "/etc/x.json", "a/b.json", "..\\x.json", ".x.json", "x.py", "x.json.py", "x.pt", "x.json\n",
           "..", "\x1b[2J.json", "pull.lock", ORIGIN, "chat.jinja", "licence.exe"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_not_taken(library: Library, hub: FakeHub, name: str) -> None:
    """Fails if a name in a listing could write outside of the folder, over our own note, or bring code."""
    hub.more = [RemoteFile(name, 3)]
    plan = pull.prepare(library, hub, REPO)
    assert plan.left_out == 3 and name not in [file.name for file in plan.files]
    bring(library, hub)
    assert name not in hub.fetched


def test_a_full_disk_is_known_before_anything_is_written(
    library: Library, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "free_disk", lambda _: 1000)
    with pytest.raises(ResourceError, match="free some disk space"):
        bring(library, hub)
    assert not hub.fetched and not library.folder.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LocalMoeError("broke off"), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("at", range(6))
def test_whatever_stops_it_the_same_call_goes_on(library: Library, hub: FakeHub, error: BaseException, at: int) -> None:
    """Fails if a part of a model could be opened as one, or if what has come would come again."""

    def stop(name: str) -> None:
        if len(hub.fetched) == at:
            raise error

    hub.before = stop
    with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)):
        bring(library, hub)
    (entry,) = library.entries()
    assert entry.unfinished and library.find("tiny") is None
    hub.before = lambda name: None
    bring(library, hub)
    assert len(hub.fetched) == 6 == len(set(hub.fetched))
    assert library.find("tiny") and os.listdir(library.folder) == ["tiny"]


def test_it_goes_on_at_its_commit_when_the_branch_has_moved(library: Library, hub: FakeHub) -> None:
    """Fails if a model could be put together from two versions."""
    hub.before = stop_at(hub, 4)
    with pytest.raises(KeyboardInterrupt):
        bring(library, hub)
    hub.before = lambda name: None
    bring(library, hub)
    assert hub.asked == [None, COMMIT]


def stop_at(hub: FakeHub, count: int) -> Callable[[str], None]:
    def stop(name: str) -> None:
        if len(hub.fetched) == count:
            raise KeyboardInterrupt

    return stop


def test_a_file_that_was_damaged_meanwhile_comes_again(library: Library, hub: FakeHub) -> None:
    hub.before = stop_at(hub, 5)
    with pytest.raises(KeyboardInterrupt):
        bring(library, hub)
    shard = library.partial("tiny") / "model-00001-of-00003.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    hub.before = lambda name: None
    bring(library, hub)
    assert hub.fetched.count(shard.name) == 2


def test_bytes_that_are_not_those_of_the_listing_are_no_model(library: Library, hub: FakeHub) -> None:
    name = "model-00002-of-00003.safetensors"
    hub.lies = {name: bytes((hub.source / name).stat().st_size)}
    with pytest.raises(CheckpointError, match="did not come as the hub describes it"):
        bring(library, hub)
    assert library.find("tiny") is None and not (library.partial("tiny") / name).exists()
    hub.lies = {}
    bring(library, hub)


def test_a_shard_the_repository_lacks_is_known_before_the_others_come(library: Library, hub: FakeHub) -> None:
    (hub.source / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00003"):
        bring(library, hub)
    assert not any("model-" in name for name in hub.fetched) and not library.entries()


def test_another_architecture_is_refused_before_its_weights_come(library: Library, hub: FakeHub) -> None:
    (hub.source / "config.json").write_text(json.dumps(tiny_config(model_type="llama")))
    with pytest.raises(ConfigError, match="llama"):
        bring(library, hub)
    assert not any("model-" in name for name in hub.fetched) and not library.entries()


def test_an_index_that_contradicts_its_shards_gets_no_name(library: Library, hub: FakeHub) -> None:
    index = json.loads((hub.source / INDEX).read_text())
    index["weight_map"]["norm.weight"] = "model-00001-of-00003.safetensors"
    (hub.source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="says tensor"):
        bring(library, hub)
    assert library.find("tiny") is None


@pytest.mark.parametrize(
    "files",
    [[], [RemoteFile("config.json", 2)], [RemoteFile("a.safetensors", 2)],
     [RemoteFile("config.json", 2), RemoteFile("a.safetensors", None)],
     [RemoteFile("config.json", 2), RemoteFile("a.bin", 2)]],
)  # fmt: skip
def test_what_is_no_model_for_us(files: list[RemoteFile]) -> None:
    with pytest.raises(ModelError):
        pull.wanted(REPO, Listing(COMMIT, files))


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "../tiny", "a/..", "/tiny", "a b/c", "a/-b", "https://x/y", ""])
def test_what_is_no_repository(library: Library, hub: FakeHub, repo: str) -> None:
    with pytest.raises(UsageError):
        pull.prepare(library, hub, repo)
    assert not hub.asked


def test_a_name_that_is_taken_is_refused_before_the_hub_is_asked(library: Library, hub: FakeHub) -> None:
    (library.folder / "tiny").mkdir(parents=True)
    with pytest.raises(UsageError, match="--as"):
        pull.prepare(library, hub, REPO)
    assert not hub.asked
    assert pull.prepare(library, hub, REPO, name="other").name == "other"


def test_a_download_of_something_else_is_not_mixed_in(library: Library, hub: FakeHub) -> None:
    hub.before = stop_at(hub, 2)
    with pytest.raises(KeyboardInterrupt):
        bring(library, hub)
    for repo, revision in (("other/tiny", None), (REPO, "v2")):
        with pytest.raises(UsageError, match="unfinished download of owner/tiny"):
            pull.prepare(library, hub, repo, revision=revision)


def test_two_pulls_of_one_name_do_not_meet(library: Library, hub: FakeHub) -> None:
    plan = pull.prepare(library, hub, REPO)
    library.partial("tiny").mkdir(parents=True)
    held = lock(library.partial("tiny") / pull.LOCK)
    try:
        with pytest.raises(UsageError, match="is being written by process"):
            pull.download(library, hub, plan, lambda *_: None)
    finally:
        os.close(held)
    assert not hub.fetched
