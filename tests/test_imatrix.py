"""The importance matrix: sums of squares as a direct computation has them, however experts are held and computed.

Going on ends with the same bits; files of other models, and of nobody, are refused."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.api import LLM
from localmoe.backend import KernelChoice
from localmoe.cli.main import main
from localmoe.errors import CheckpointError, GenerationError, ResourceError, UsageError
from localmoe.experts.paging import Paging
from localmoe.experts.resident import NativeExperts, SharedExpert
from localmoe.kernels import native
from localmoe.layers import sparse
from localmoe.layers.moe import MoE
from localmoe.layers.sparse import SparseAttention
from localmoe.quantize import calibrate, imatrix
from localmoe.quantize.calibrate import Text, Watcher, collect
from localmoe.quantize.imatrix import Collected, Importance, kept_under, merge, read, write
from localmoe.safetensors_io import write_safetensors
from localmoe.step import RouterRecord, Step
from tests.tiny_engine import bind, token_ids
from tests.tiny_tokenizer import tiny_description
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, rounded_state, tiny_config, write_published

CONFIG = tiny_config(**PUBLISHED_DIMS | {"vocab_size": 400, "n_routed_experts": 9, "num_experts_per_tok": 3})
STATE = random_state(CONFIG)
LAYERS, TOP_K, GROUPS = 6, 3, 2
NATIVE = [] if isinstance(native.load(), str) else ["strict", "native"]
CHOICES: list[KernelChoice] = [*NATIVE, "reference"]  # type: ignore[list-item]
CHUNK = 20
IDS = token_ids(110, vocab=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_published(tmp_path_factory.mktemp("model"), CONFIG, STATE, shards=2)
    (path / "tokenizer.json").write_text(json.dumps(tiny_description()))
    return path


def text(count: int = len(IDS), start: int = 0) -> Text:
    """Tokens of one text, or of another where it starts elsewhere."""
    return Text(IDS[start : start + count], f"digest {start}", 0)


def collected(
    model: Path, out: Path, source: Text, kernels: KernelChoice = "reference", slots: int | None = None,
    stop: Callable[[int], bool] = lambda _: False, chunk: int = CHUNK,
) -> Collected:  # fmt: skip
    """A run that Ctrl-C ends where `stop` says so of the tokens that have been read."""

    def progress(done: int, total: int, rate: float) -> None:
        if stop(done):
            raise KeyboardInterrupt

    def opener(observer: Any) -> LLM:
        llm = LLM(model, kernels=kernels, paging=Paging(slots=slots), observer=observer)
        # Several chunks to a step, and several steps to the text.
        llm.engine.prefill_tokens = 2 * CHUNK
        return llm

    return collect(model, source, out, chunk, opener, progress)


@pytest.fixture(scope="module")
def direct() -> dict[str, tuple[Tensor, int]]:
    """Inputs of all matrices, recorded around the layers of a model in torch, or computed from such."""
    state = rounded_state(CONFIG, STATE)
    bound = bind(CONFIG, state)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    log: list[RouterRecord] = []
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def recording(owner: Any, name: str, key: str, patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def spy(*args: Any) -> Any:
            result = original(*args)
            # A method is given its object first.
            seen[key].append(args[0] if isinstance(args[0], Tensor) else args[1])
            seen[f"{key} result"].append(result)
            return result

        patch.setattr(owner, name, spy)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        recording(SparseAttention, "__call__", "attention", patch)
        recording(sparse, "grouped_linear", "grouped", patch)
        recording(MoE, "__call__", "moe", patch)
        # One chunk after the other: BOS, and the rest of it.
        for at in range(0, len(IDS), CHUNK - 1):
            ids = [0, *IDS[at : at + CHUNK - 1]]
            bound.forward(Step.of([(bound.new_state(), ids)], router_log=log))
    for i, record in enumerate(log):
        layer = f"layers.{i % LAYERS}"
        _of_attention(layer, state, inputs, *(seen[key][i] for key in ("attention", "grouped", "grouped result")))
        _of_experts(layer, state, inputs, seen["moe"][i], record.ids)
    squares = {name: torch.cat(parts).double() for name, parts in inputs.items()}
    return {name: (rows.square().sum(0), len(rows)) for name, rows in squares.items()}


def _of_attention(
    layer: str, state: dict[str, Tensor], inputs: dict[str, list[Tensor]], x: Tensor, o: Tensor, y: Tensor
) -> None:
    attn = f"{layer}.attn"
    latent = F.rms_norm(x @ state[f"{attn}.wq_a.weight"].T, (128,), state[f"{attn}.q_norm.weight"], 1e-6)
    for name in ("wq_a", "wkv", "indexer.weights_proj"):
        inputs[f"{attn}.{name}.weight"].append(x)
    for name in ("wq_b", "indexer.wq_b"):
        inputs[f"{attn}.{name}.weight"].append(latent)
    inputs[f"{attn}.wo_a.weight"].append(o.flatten(0, 1))
    inputs[f"{attn}.wo_b.weight"].append(y)


def _of_experts(layer: str, state: dict[str, Tensor], inputs: dict[str, list[Tensor]], x: Tensor, ids: Tensor) -> None:
    each = {f"{layer}.ffn.experts.{e}": x[(ids == e).any(1)] for e in range(9)} | {f"{layer}.ffn.shared_experts": x}
    for expert, rows in each.items():
        if len(rows):
            w1, w3 = (state[f"{expert}.{w}.weight"] for w in ("w1", "w3"))
            hidden = F.silu((rows @ w1.T).clamp(max=10)) * (rows @ w3.T).clamp(-10, 10)
            for w, its in (("w1", rows), ("w2", hidden), ("w3", rows)):
                inputs[f"{expert}.{w}.weight"].append(its)


@pytest.mark.parametrize("slots", [None, 4, 30])
@pytest.mark.parametrize("kernels", CHOICES)
def test_sums_are_those_of_a_direct_computation(
    model: Path, direct: dict[str, tuple[Tensor, int]], tmp_path: Path, kernels: KernelChoice, slots: int | None
) -> None:
    """Fails if inputs are seen after rounding, twice, of other rows, or kept under another matrix's name."""
    found = collected(model, tmp_path / "out", text(), kernels, slots)
    # Every matrix that quantize may round, and no other.
    stored = {name for name in STATE if imatrix.kept_under(name) in imatrix.columns(_config())}
    assert {name for name in stored if kept_under(name) in found.sums} == set(direct) & stored
    # Rounded to bf16 or int8, a few tokens choose another expert or entry; of a few rows that is much.
    tolerance, others, least = (0.3, 4, 20) if kernels == "native" else (1e-5, 0, 1)
    for name in set(direct) & stored:
        total, count = direct[name]
        assert abs(found.counts[kept_under(name)] - count) <= others, name
        error = found.sums[kept_under(name)] - total
        assert count < least or float(error.norm() / total.norm()) < tolerance, name


def _config() -> Any:
    from localmoe.models.deepseek_v4_config import DeepseekV4Config

    return DeepseekV4Config.from_dict(CONFIG)


def test_counts_add_up(model: Path, tmp_path: Path) -> None:
    found = collected(model, tmp_path / "out", text())
    assert (found.tokens, found.rows) == (110, 110 + 6)
    for layer in range(LAYERS):
        pattern = re.compile(rf"layers\.{layer}\.ffn\.experts\.\d+\.(w[12])\.weight")
        counts = [(match[1], found.counts[name]) for name in found.sums if (match := pattern.fullmatch(name))]
        assert sum(count for w, count in counts if w == "w1") == sum(n for w, n in counts if w == "w2") == 116 * TOP_K
        assert found.counts[f"layers.{layer}.ffn.shared_experts.w2.weight"] == 116
        assert found.counts[f"layers.{layer}.attn.wo_a.weight"] == 116 * GROUPS


def same(a: Collected, b: Collected) -> bool:
    """To the last bit."""
    equal = a.sums.keys() == b.sums.keys() and all(torch.equal(a.sums[name], b.sums[name]) for name in a.sums)
    return equal and a.counts == b.counts and (a.tokens, a.rows, a.missed) == (b.tokens, b.rows, b.missed)


@pytest.mark.parametrize("kernels", CHOICES)
def test_going_on_ends_with_the_same_bits(model: Path, tmp_path: Path, kernels: KernelChoice) -> None:
    """Fails if a stop loses a chunk, counts one twice, or a sum is rounded in the file."""
    whole = collected(model, tmp_path / "whole", text(), kernels)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collected(model, tmp_path / "parts", text(), kernels, 20, stop=lambda done: True)
    assert read(tmp_path / "parts").tokens == 2 * 2 * (CHUNK - 1)
    going_on = collected(model, tmp_path / "parts", text(), kernels)
    assert same(whole, going_on)
    assert same(whole, read(tmp_path / "parts"))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


@pytest.mark.parametrize("at", [3, 200, 401])
def test_ctrl_c_in_the_middle_of_a_step_loses_that_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Fails if what has been seen of the step is saved, and then seen again."""
    whole = collected(model, tmp_path / "whole", text())
    calls, see = [0], Watcher._see

    def interrupted(self: Watcher, name: str, x: Tensor) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        see(self, name, x)

    monkeypatch.setattr(Watcher, "_see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(model, tmp_path / "parts", text())
    assert same(whole, collected(model, tmp_path / "parts", text()))


def test_ctrl_c_while_a_step_is_added_leaves_the_last_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SAVE_SECONDS", 0)
    whole = collected(model, tmp_path / "whole", text())
    calls, of = [0], imatrix.expert_of

    def interrupted(name: str) -> str:
        calls[0] += 1
        if calls[0] == 300:
            raise KeyboardInterrupt
        return of(name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imatrix, "expert_of", interrupted)
        collected(model, tmp_path / "parts", text())
    assert 0 < read(tmp_path / "parts").tokens < 110
    assert same(whole, collected(model, tmp_path / "parts", text()))


def test_more_tokens_of_the_same_text_go_on(model: Path, tmp_path: Path) -> None:
    first = collected(model, tmp_path / "out", text(50))
    assert first.tokens == 50
    assert collected(model, tmp_path / "out", text()).tokens == 110
    before = (tmp_path / "out").read_bytes()
    assert collected(model, tmp_path / "out", text(60)).tokens == 110
    assert (tmp_path / "out").read_bytes() == before


def test_saves_now_and_then(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    monkeypatch.setattr(calibrate, "write", lambda path, total: saves.append(total.tokens))
    collected(model, tmp_path / "out", text())
    assert saves == [110]
    saves.clear()
    monkeypatch.setattr(calibrate, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(calibrate, "_SAVE_SHARE", 1e9)
    collected(model, tmp_path / "out", text())
    assert saves == [38, 76, 110]


def test_a_chunk_is_a_context_of_its_own(model: Path, tmp_path: Path) -> None:
    """Fails if a chunk sees the one before it, or a long one is not computed in several steps."""
    one = 5 * CHUNK // 2 - 1
    together = collected(model, tmp_path / "both", text(2 * one), chunk=one + 1)
    collected(model, tmp_path / "a", text(one), chunk=one + 1)
    collected(model, tmp_path / "b", text(one, one), chunk=one + 1)
    both = merge([tmp_path / "a", tmp_path / "b"])
    assert (both.tokens, both.rows, both.texts) == (2 * one, 2 * one + 2, ["digest 0", f"digest {one}"])
    assert (both.counts, both.missed) == (together.counts, together.missed)
    for name, total in together.sums.items():
        torch.testing.assert_close(both.sums[name], total, rtol=1e-12, atol=0)
    write(tmp_path / "merged", both)
    assert same(read(tmp_path / "merged"), both)
    with pytest.raises(UsageError, match="another text"):
        collected(model, tmp_path / "merged", text(one), chunk=one + 1)


def test_files_of_something_else_are_refused_and_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    collected(model, out, text(30))
    before = out.read_bytes()
    with pytest.raises(UsageError, match="another text; choose another --output"):
        collected(model, out, text(30, 1))
    with pytest.raises(UsageError, match=r"another chunk \(20\)"):
        collected(model, out, text(40), chunk=30)
    other = write_published(tmp_path / "other", CONFIG | {"rms_norm_eps": 1e-5}, STATE)
    (other / "tokenizer.json").write_text(json.dumps(tiny_description()))
    with pytest.raises(UsageError, match="another model"):
        collected(other, out, text(40))
    assert out.read_bytes() == before
    collected(other, tmp_path / "theirs", text(30))
    with pytest.raises(UsageError, match="different models"):
        merge([out, tmp_path / "theirs"])
    with pytest.raises(UsageError, match="no tokens"):
        collected(model, out, text(0))
    with pytest.raises(UsageError, match="2 to 1024"):
        collected(model, out, text(), chunk=1025)
    with pytest.raises(UsageError, match="no folder"):
        collected(model, tmp_path / "none" / "out", text())


def test_a_disk_without_room_is_refused_before_the_model_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "free_disk", lambda _: 1000)
    with pytest.raises(ResourceError, match="free some disk space"):
        collect(model, text(), tmp_path / "out", CHUNK, lambda _: pytest.fail("opened"), lambda *_: None)


def test_numbers_that_are_not_finite_are_refused(model: Path, tmp_path: Path) -> None:
    """Fails if the sums of a broken model are written: NaN for every weight."""
    broken = dict(STATE) | {"layers.2.attn_norm.weight": STATE["layers.2.attn_norm.weight"] * 1e30}
    path = write_published(tmp_path / "broken", CONFIG, broken)
    (path / "tokenizer.json").write_text(json.dumps(tiny_description()))
    with pytest.raises(GenerationError, match=r"token 0 of the text|too large"):
        collected(path, tmp_path / "out", text())
    assert not (tmp_path / "out").exists()


def small(tmp_path: Path, **changes: Any) -> Path:
    """A file made by hand, with some of its parts as they should not be."""
    facts = {
        "localmoe_imatrix": "1",
        "model": "m",
        "texts": "[]",
        "chunk": "4",
        "tokens": "4",
        "rows": "4",
        "missed": "[]",
    }
    facts |= changes.pop("facts", {})
    tensors = {"b": torch.tensor([1.0, 4.0]).double(), "a": torch.tensor([9.0, 0.0, 0.0]).double()}
    tensors |= {"counts": torch.tensor([3, 2])} | changes
    path = tmp_path / "file"
    write_safetensors(path, {name: t for name, t in tensors.items() if t is not None}, facts)
    return path


BAD: dict[str, dict[str, Any]] = {
    "sums of a that are negative or not finite": {"a": torch.tensor([1.0, float("nan"), 0]).double()},
    "sums of b that are negative or not finite": {"b": torch.tensor([1.0, float("inf")]).double()},
    "sums of b that are negative": {"b": torch.tensor([1.0, -1]).double()},
    "has a as F32": {"a": torch.ones(3)},
    "with 2 dimensions": {"a": torch.ones(3, 1).double()},
    "with 1 dimensions": {"a": torch.ones(0).double()},
    "has no counts": {"counts": None},
    "no counts of its matrices": {"counts": torch.tensor([1])},
    "has 0 rows of a": {"counts": torch.tensor([0, 1])},
    "is no importance matrix of this version": {"facts": {"localmoe_imatrix": "2"}},
    "does not say what it was made of": {"facts": {"tokens": "many"}},
    "not say what it was made of": {"facts": {"missed": "[" * 20_000}},
    "not say what": {"facts": {"texts": "[1]"}},
    "impossible number": {"facts": {"rows": "9" * 100}},
}


@pytest.mark.parametrize("problem", BAD)
def test_a_damaged_file_gives_one_clear_sentence(tmp_path: Path, problem: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)) as raised:
        Importance.load(small(tmp_path, **BAD[problem]))
    assert str(tmp_path / "file") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """Whatever is changed: it is read, or refused with what to do."""
    data = small(tmp_path).read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for _ in range(rng.randrange(3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "file").write_bytes(damaged)
        try:
            found = Importance.load(tmp_path / "file")
        except CheckpointError as problem:
            assert "download" not in str(problem)
        else:
            assert all(mean is None or bool((mean > 0).all()) for mean in found._means.values())


def test_what_rounding_is_told_by_hand(tmp_path: Path) -> None:
    """Fails if a weight whose input was 0 counts nothing, or rows are not divided by."""
    importance = Importance.load(small(tmp_path))
    assert importance.fingerprint == "m"
    assert importance.counts("a") == 3 and importance.counts("c") == 0
    a, b = importance.of("a"), importance.of("b")
    assert a is not None and b is not None and a.dtype == torch.float32
    assert torch.equal(a, torch.tensor([3.0, 1e-4, 1e-4]))
    assert torch.equal(b, torch.tensor([0.5, 2.0]))
    assert importance.of("c") is None
    zero = Importance.load(small(tmp_path, a=torch.zeros(3).double()))
    assert zero.of("a") is None
    huge = Importance.load(small(tmp_path, a=torch.tensor([1e300, 1e-300, 0], dtype=torch.float64))).of("a")
    assert huge is not None and bool(huge.isfinite().all()) and bool((huge > 0).all())


def test_experts_that_no_token_chose_are_known(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    collected(model, out, text(2))
    importance = Importance.load(out)
    every = [f"layers.{layer}.ffn.experts.{e}" for layer in range(LAYERS) for e in range(9)]
    missed = [expert for expert in every if importance.counts(f"{expert}.w2.weight") == 0]
    assert importance.missed == sorted(missed) and 0 < len(missed) < len(every)
    assert all(importance.of(f"{missed[0]}.{w}.weight") is None for w in ("w1", "w2", "w3"))
    hit = next(expert for expert in every if expert not in missed)
    w1, w3 = (importance.of(f"{hit}.{w}.weight") for w in ("w1", "w3"))
    assert w1 is not None and w3 is not None and torch.equal(w1, w3)


@pytest.mark.skipif(not NATIVE, reason="needs the compiled kernels")
def test_a_model_without_an_observer_computes_whole_experts(model: Path) -> None:
    """Fails if watching one model slows down others of the process."""
    LLM(model, kernels="native", observer=Watcher(imatrix.columns(_config())))
    plain = LLM(model, kernels="native").engine.model
    assert isinstance(plain.experts, NativeExperts)
    assert isinstance(plain.blocks[0].moe.shared, SharedExpert)


def test_watching_changes_no_prediction(model: Path) -> None:
    """In torch, where nothing is computed otherwise."""
    plain, watched = (LLM(model, kernels="reference", observer=o) for o in (None, Watcher(imatrix.columns(_config()))))
    assert torch.equal(plain.logits(IDS), watched.logits(IDS))
    assert plain.engine.fingerprint == watched.engine.fingerprint


def test_the_command(
    model: Path,
    library_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a story about a brave frog, 12345 times; " * 20)
    (tmp_path / "short").write_text("a frog")
    (library_folder / "m").symlink_to(model)
    arguments = ["imatrix", "m", "-f", "text", "-o", "out", "--chunk", "64"]
    assert main([*arguments, "-n", "100"]) == 0
    assert capsys.readouterr().out.startswith("out: 100 tokens, ")
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == read(Path("out")).tokens > 100
    assert facts["missed_experts"] == sorted(read(Path("out")).missed)
    assert main(["imatrix", str(model), "-f", "short", "-o", "few"]) == 0
    printed = capsys.readouterr().out
    assert "were chosen by no token" in printed and "layers.0.ffn.experts." in printed and "more" in printed
    assert main(["imatrix", "--merge", "out", "few", "-o", "both"]) == 0
    assert read(Path("both")).tokens == facts["tokens"] + read(Path("few")).tokens
    capsys.readouterr()
    for wrong in (
        ["imatrix", "--merge", "out", "few", "-o", "both"],
        ["imatrix", "--merge", "out", "-o", "one"],
        ["imatrix", "--merge", "out", "few", "-f", "text", "-o", "one"],
        ["imatrix", str(model), "-o", "one"],
        ["imatrix", str(model), "-f", "short", "-o", "out"],
        ["imatrix", "localmoe-mini", "-f", "text", "-o", "out"],
        ["imatrix", str(model), "-f", "missing", "-o", "one"],
    ):
        assert main(wrong) == 2, wrong
        assert capsys.readouterr().err.count("\n") <= 4
    (tmp_path / "out").write_bytes(b"not")
    assert main(arguments) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "few", "out", "short", "text"]


def test_ctrl_c_says_how_to_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a story about a brave frog, 12345 times; " * 40)
    arguments = ["imatrix", str(model), "-f", "text", "-o", "out", "--chunk", "64"]

    def maybe(self: calibrate.Saver) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate.Saver, "maybe", maybe)
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(arguments) == 0
