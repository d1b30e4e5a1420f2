"""Quantizing a model: what comes out is read by the engine and by others; an interruption costs only time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from localmoe.api import LLM
from localmoe.checkpoint import INDEX, Checkpoint
from localmoe.cli.main import main
from localmoe.cli.quantize import FROM_FP4_PERCENT, warnings
from localmoe.errors import CheckpointError, ConfigError, FormatError, LocalMoeError, ResourceError, UsageError
from localmoe.experts.paging import Paging
from localmoe.files import partial_of
from localmoe.formats import FORMATS, Int, QuantizedTensor
from localmoe.kernels import codecs
from localmoe.library import EMBEDDED
from localmoe.loader import load_weights, read_config
from localmoe.locks import lock
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import expert_names, places, tensor_inventory
from localmoe.quantize import convert, job, output, recipe, report, rounding, target
from localmoe.quantize.imatrix import Collected, Importance, fingerprint
from localmoe.quantize.job import prepare
from localmoe.quantize.recipe import KEEP, Recipe, Rule, simple
from localmoe.quantize.verify import verify
from localmoe.safetensors_io import ShardWriter
from tests.loops import noise
from tests.tiny_v4 import PUBLISHED_DIMS, published_tensors, random_state, tiny_config, write_model, write_published

CONFIG = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 3, "num_experts_per_tok": 2})
PLAIN_CONFIG = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
INT4 = simple("int4", KEEP, 32)
IDS = list(range(3, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_published(tmp_path_factory.mktemp("model"), CONFIG, random_state(CONFIG), shards=3)
    (made / "tokenizer.json").write_text('{"some": "tokenizer"}')
    (made / "LICENSE").write_text("MIT")
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    found = {}
    with Checkpoint.open(folder) as checkpoint:
        for name, ref in checkpoint.refs.items():
            buffer = bytearray(ref.nbytes)
            checkpoint.read_into(ref, memoryview(buffer))
            found[name] = (ref.dtype, ref.shape, bytes(buffer))
    return found


def logits(path: Path | None) -> Tensor:
    llm = LLM(path, kernels="reference")
    return llm.logits(IDS)


def test_int8_in_groups_of_32_is_the_published_fp4_exactly(tmp_path: Path) -> None:
    """Fails if one of the sixteen values, or a scale, is not what it was: the report and the logits would show it."""
    found = convert.convert(EMBEDDED, tmp_path / "out", simple("int8", KEEP, 32))
    assert {row["largest_error"] for row in found["classes"]} == {0}
    assert torch.equal(logits(tmp_path / "out"), logits(None))


@pytest.mark.parametrize("name", [name for name in recipe.WRITTEN if name not in ("fp4", "int8_g32")])
def test_every_format_is_read_by_the_engine(name: str, tmp_path: Path) -> None:
    """Fails if the engine reads other numbers than the report was made of, in memory or paged."""
    rules = Recipe((Rule(r"experts\.\d+\.w[13]", name), Rule(r"attn\.wq_b", name)))
    convert.convert(EMBEDDED, tmp_path / "out", rules)
    llm, plain = LLM(tmp_path / "out", kernels="strict"), logits(None)
    assert llm.generate(["Once upon a time"])[0].text
    found = llm.logits(IDS)
    assert 0 < (found - plain).abs().max() < plain.abs().max()
    assert (found - logits(tmp_path / "out")).abs().max() < 1e-3
    paged = LLM(tmp_path / "out", kernels="strict", paging=Paging(slots=30))
    assert torch.equal(paged.logits(IDS), found)


@pytest.mark.parametrize("shards", [1, 3])
def test_int8_in_groups_of_32_becomes_the_published_bytes_again(shards: int, tmp_path: Path) -> None:
    """Negative zeros and the smallest scales too. Fails for one byte of a tensor, or a config that says another."""
    tensors = published_tensors(CONFIG, random_state(CONFIG))
    w1, scale = (f"layers.0.ffn.experts.1.w1.{part}" for part in ("weight", "scale"))
    tensors[w1] = torch.arange(tensors[w1].numel()).to(torch.uint8).view(torch.int8).view_as(tensors[w1])
    tensors[scale].view(torch.uint8)[0, 0] = 0
    made = write_model(tmp_path / "model", CONFIG | {"quantization_config": {"quant_method": "fp8"}}, tensors, shards)
    convert.convert(made, tmp_path / "int8", simple("int8", KEEP, 32))
    verify(tmp_path / "int8")
    found = convert.convert(tmp_path / "int8", tmp_path / "back", simple("fp4", KEEP, 32))
    assert {row["largest_error"] for row in found["classes"]} == {0}
    assert stored_in(tmp_path / "back") == stored_in(made)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((made / "config.json").read_text())


def test_what_was_not_fp4_does_not_become_it(model: Path, tmp_path: Path) -> None:
    """Fails if int8 of something else is rounded once more, or signs are those of another model."""
    convert.convert(model, tmp_path / "int8", Recipe((Rule(r"attn\.wq_b", "int8_g32"),)))
    with pytest.raises(CheckpointError, match="not made of FP4"):
        convert.convert(tmp_path / "int8", tmp_path / "back", Recipe((Rule(r"attn\.wq_b", "fp4"),)))
    with pytest.raises(UsageError, match="quantized already"):
        convert.convert(tmp_path / "int8", tmp_path / "other", simple("int4", KEEP, 32))
    convert.convert(EMBEDDED, tmp_path / "mini", simple("int8", KEEP, 32))
    signs = next((tmp_path / "mini").glob("localmoe-signs.*"))
    with safe_open(signs, "pt") as file:
        save_file({name: file.get_tensor(name)[1:] for name in file.keys()}, signs)  # noqa: SIM118
    with pytest.raises(CheckpointError, match="signs of its zeros"):
        convert.convert(tmp_path / "mini", tmp_path / "third", simple("fp4", KEEP, 32))
    with pytest.raises(CheckpointError, match="localmoe-signs"):
        verify(tmp_path / "mini")
    save_file({"layers.0.ffn.experts.0.w1.weight": torch.ones(3)}, signs)
    with pytest.raises(CheckpointError, match="is F32, expected"):
        convert.convert(tmp_path / "mini", tmp_path / "fourth", simple("fp4", KEEP, 32))
    signs.unlink()
    with pytest.raises(CheckpointError, match="is missing, and with it the signs"):
        convert.convert(tmp_path / "mini", tmp_path / "fifth", simple("fp4", KEEP, 32))


def test_nf4_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    """Fails if their decoder finds other numbers, or their config class another scheme."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    convert.convert(EMBEDDED, tmp_path / "out", simple("nf4", KEEP, 64))
    name = "layers.1.ffn.experts.3.w2.weight"
    ours = load_weights(tmp_path / "out", torch.float32)[1].get(name)
    assert isinstance(ours, QuantizedTensor)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        stored = {part: checkpoint.read(ref) for part, ref in checkpoint.refs.items() if part.startswith(name)}
    parts = {part.removeprefix(f"{name}."): value for part, value in stored.items() if part != name}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(stored[name], state), ours.dequantize(torch.bfloat16))
    state.dtype = torch.float32
    assert torch.equal(functional.dequantize_4bit(stored[name], state), ours.dequantize())
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert "layers.1.ffn.experts.3.w2" not in config["llm_int8_skip_modules"]
    assert "layers.1.attn.wq_a" in config["llm_int8_skip_modules"]


def test_what_is_kept_keeps_its_bytes(model: Path, tmp_path: Path) -> None:
    """Fails if a tensor that no rule matches is changed, renamed, moved or lost."""
    convert.convert(model, tmp_path / "out", INT4)
    with Checkpoint.open(model) as before, Checkpoint.open(tmp_path / "out") as after:
        for name, ref in before.refs.items():
            if ".ffn.experts." in name:
                assert name not in after.refs
            else:
                assert after.refs[name].file.name == ref.file.name
                assert torch.equal(after.read(after.refs[name]).view(torch.uint8), before.read(ref).view(torch.uint8))


@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "int3"])
def test_experts_in_fp8_are_a_source(name: str, tmp_path: Path) -> None:
    """As V4-Base has them. Fails if they are rounded without their scales, or said to be FP4."""
    state = random_state(CONFIG)
    tensors = published_tensors(CONFIG, state)
    for matrix in [tensor for tensor in tensors if re.search(r"\.experts\..*\.weight$", tensor)]:
        packed = FORMATS["fp8_block"].quantize(state[matrix])
        scale = codecs.encode_e8m0(packed.scale).view(torch.float8_e8m0fnu)
        tensors[matrix], tensors[matrix.replace(".weight", ".scale")] = packed.data, scale
    found = convert.convert(write_model(tmp_path / "model", CONFIG, tensors), tmp_path / "out", simple(name, KEEP, 32))
    assert {row["source"] for row in found["classes"]} == {"fp8_block"}
    one = "layers.1.ffn.experts.2.w2.weight"
    before, after = (load_weights(tmp_path / folder, torch.float32)[1].get(one) for folder in ("model", "out"))
    assert isinstance(before, QuantizedTensor)
    assert isinstance(after, QuantizedTensor)
    values = before.dequantize()
    assert 0 < (after.dequantize() - values).norm() / values.norm() < (0.01 if name == "int8" else 0.2)


def test_compressed_tensors_reads_the_same_numbers(model: Path, tmp_path: Path) -> None:
    """Fails if their order of bits, sign or names is another: others could not use the model."""
    reason = "compressed-tensors is not installed: pip install compressed-tensors"
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason=reason)
    schema = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    for bits in (4, 8):
        out = tmp_path / f"int{bits}"
        convert.convert(model, out, simple(f"int{bits}", KEEP, 32))
        described = json.loads((out / "config.json").read_text())["quantization_config"]
        (scheme,) = schema.QuantizationConfig.model_validate(described).config_groups.values()
        assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric) == (bits, 32, True)
        with Checkpoint.open(model) as source, Checkpoint.open(out) as made:
            name = expert_names(read_config(model), 1, 2)[1]
            part = {key: made.read(made.refs[f"{name}_{key}"]) for key in ("packed", "scale", "shape")}
            integers = packing.unpack_from_int32(part["packed"], bits, torch.Size(part["shape"].tolist()))
            theirs = (integers.float().unflatten(1, (-1, 32)) * part["scale"].float()[..., None]).flatten(1)
            codes = source.read(source.refs[name]).view(torch.uint8)
            scale = source.read(source.refs[f"{name.removesuffix('.weight')}.scale"]).view(torch.uint8)
            published = codecs.dequantize_fp4(codes, scale)
        bound = FORMATS["fp4"].bind(codes, scale, (published.shape[0], published.shape[1]))
        ours = (
            rounding.exactly(bound) if bits == 8 else rounding.searched(published, FORMATS["int4_g32"])
        ).dequantize()
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("rules", "most"),
    [
        # Expressions over all layers and experts.
        ([(r"experts\.\d+\.w", "int4_g32"), (r"attn\.w", "int8_g32")], 8),
        # By layer: over its experts.
        ([(r"layers\.0\.", "keep"), (r"experts\.\d+\.w", "int4_g32")], 15),
        ([(r"layers\.1\..*\.w[13]", "int8_g64"), (r"experts\.\d+\.w", "int4_g32")], 15),
        # By expert: the names themselves.
        ([(r"layers\.[02].*experts\.1\.w2", "int4_g64"), (r"indexer\.wq_b", "int8_g32")], 3),
    ],
)
def test_others_find_described_what_is_packed_and_nothing_else(
    rules: list[tuple[str, str]], most: int, model: Path, tmp_path: Path
) -> None:
    """Asks compressed-tensors itself. Fails if a recipe by layer or expert describes a matrix that keeps its bytes, or
    one in another format, or if thousands of experts are listed one by one."""
    reason = "compressed-tensors is not installed: pip install compressed-tensors"
    matching = pytest.importorskip("compressed_tensors.utils.match", reason=reason)
    recipe = Recipe(tuple(Rule(*rule) for rule in rules))
    with Checkpoint.open(model) as checkpoint:
        job = prepare(checkpoint, tmp_path / "out", recipe)
        matrices = [name for name, ref in checkpoint.refs.items() if name.endswith(".weight") and len(ref.shape) == 2]
    groups = json.loads(job.config)["quantization_config"]["config_groups"].values()
    packed = {name: matrix.format for shard in job.shards.values() for name, matrix in shard.packed.items()}
    assert len(packed) > most or most == 3
    assert sum(len(group["targets"]) for group in groups) <= most
    linear = torch.nn.Linear(1, 1)
    for name in matrices:
        described = [
            f"int{group['weights']['num_bits']}_g{group['weights']['group_size']}"
            for group in groups
            if matching.is_match(name.removesuffix(".weight"), linear, group["targets"])
        ]
        assert described == ([packed[name]] if name in packed else []), name


@pytest.mark.parametrize("group", [32, 128])
def test_a_searched_scale_is_better_than_the_largest_number(group: int) -> None:
    """Normal weights, and some that are far larger. Fails if the search picks a worse scale for any group."""
    fmt = FORMATS[f"int4_g{group}"]
    assert isinstance(fmt, Int)
    weight = noise(64, 512)
    weight[::7, ::31] *= 6
    plain = fmt.quantize(weight).dequantize()
    found = rounding.searched(weight, fmt).dequantize()
    errors = [(x - weight).square().unflatten(1, (-1, group)).sum(-1) for x in (plain, found)]
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.85 * errors[0].sum()


def test_groups_of_zeros_and_tiny_numbers_stay_so() -> None:
    fmt = FORMATS["int4_g32"]
    assert isinstance(fmt, Int)
    weight = torch.zeros(2, 64)
    weight[1, 3] = 1e-30
    found = rounding.searched(weight, fmt)
    assert found.scale.isfinite().all()
    assert found.dequantize()[0].eq(0).all()
    assert float(found.dequantize()[1, 3]) == pytest.approx(1e-30, rel=0.01)


class Killed(BaseException):
    """Stands for the end of the process."""


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, failure: Callable[[], BaseException]) -> list[int]:
    """The at-th write, sync or rename of the process fails."""
    count = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                raise failure()
            return real(*args, **options)

        return call

    for name in ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    return count


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of a run without interruption, and how many points there are at which it can be interrupted."""
    out = tmp_path_factory.mktemp("out") / "model"
    with pytest.MonkeyPatch.context() as patch:
        count = interrupted(patch, -1, Killed)
        convert.convert(model, out, INT4)
    return files_of(out), count[0]


def test_killed_anywhere_it_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, expected: tuple[dict[str, bytes], int]
) -> None:
    """Every other write, sync and rename, with the process gone, the disk full, and the disk broken. Fails if an
    interrupted run leaves something that the next one trusts, or that looks like a model."""
    files, points = expected
    assert points >= 50
    failures = [Killed, lambda: OSError(errno.ENOSPC, "full"), lambda: OSError(errno.EIO, "broken")]
    for at in range(1, points + 1, 2):
        out = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, at, failures[at % 3])
            with pytest.raises((Killed, OSError, LocalMoeError)):
                convert.convert(model, out, INT4)
        # config.json has its name when all the rest has: what may still fail is to make that name last.
        if (out / "config.json").exists():
            assert files_of(out).items() >= files.items()
        convert.convert(model, out, INT4)
        assert files_of(out) == files, at
        shutil.rmtree(out)


def test_no_name_reaches_the_disk_before_its_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a power cut can leave an empty tokenizer, report or shard beside a config.json that looks whole."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        calls.append("folder" if path.is_dir() else path.name)
        fsync(fd)

    def record_replace(source: Path, target: Path) -> None:
        assert calls[-1] == source.name
        calls.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    convert.convert(model, tmp_path / "out", INT4)
    named = [call.removeprefix("name ") for call in calls if call.startswith("name ")]
    assert set(named) - {target.PARTIAL} == {path.name for path in (tmp_path / "out").iterdir()}
    assert named[-1] == "config.json"
    assert calls[-4:] == ["folder", ".config.json.partial", "name config.json", "folder"]


def test_sigkill(tmp_path: Path) -> None:
    """The real thing, at a few moments. Fails if a lock outlives its process, or a torn file is taken for whole."""
    arguments = ["quantize", str(EMBEDDED), str(tmp_path / "out"), "--experts", "int4"]
    code = f"import sys; from localmoe.cli.main import main; sys.exit(main({arguments!r}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for delay in (0.05, 0.2, 0.5):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
        waited = time.monotonic()
        while not (tmp_path / "out").exists() and time.monotonic() - waited < 60 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(arguments) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    convert.convert(EMBEDDED, tmp_path / "other", INT4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")


def test_what_is_done_is_not_done_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a week's work starts anew after an interruption."""
    out, made = tmp_path / "out", list[str]()
    finish = ShardWriter.finish

    def counted(self: ShardWriter) -> None:
        if len(made) == 2:
            raise Killed
        finish(self)
        made.append(self._path.name)

    monkeypatch.setattr(ShardWriter, "finish", counted)
    with pytest.raises(Killed):
        convert.convert(model, out, INT4)
    first = list(made)
    made.clear()
    convert.convert(model, out, INT4)
    assert len(first) == 2
    assert len(made) == 1
    made.clear()
    assert convert.convert(model, out, INT4)["bytes_out"] > 0
    assert made == []


def test_a_shard_that_was_cut_short_is_made_again(
    model: Path, tmp_path: Path, expected: tuple[dict[str, bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if what was noted as done is trusted whatever has become of it since."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            convert.convert(model, out, INT4)
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    convert.convert(model, out, INT4)
    assert files_of(out) == expected[0]


def test_what_is_lost_beside_the_shards_is_written_again(
    model: Path, tmp_path: Path, expected: tuple[dict[str, bytes], int]
) -> None:
    """Fails if a folder without its tokenizer or index is called finished because its shards are there."""
    out = tmp_path / "out"
    convert.convert(model, out, INT4)
    for name in sorted(expected[0].keys() - {output.SIDECAR} - {path.name for path in out.glob("*.safetensors")}):
        if name != "config.json":
            (out / name).unlink()
            convert.convert(model, out, INT4)
            assert files_of(out) == expected[0], name
        (out / name).write_bytes(b"")
        convert.convert(model, out, INT4)
        assert files_of(out) == expected[0], name


def test_what_cannot_be_copied_is_refused_before_the_work(tmp_path: Path) -> None:
    """Fails if a tokenizer that is a pipe, or far too large, is met after a week, or stops the program for ever."""
    source = write_published(tmp_path / "source", CONFIG, random_state(CONFIG))
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a regular file"):
        convert.convert(source, tmp_path / "out", INT4)
    (source / "tokenizer.json").unlink()
    (source / "LICENSE").touch()
    os.truncate(source / "LICENSE", 1 << 40)
    with pytest.raises(CheckpointError, match="expected at most"):
        convert.convert(source, tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """Fails if one that can be read but not written (infinity, deep nesting) is met after a week."""
    source, out = write_published(tmp_path / "source", CONFIG, random_state(CONFIG)), tmp_path / "out"
    text = (source / "config.json").read_text().rstrip().removesuffix("}")
    odd = ["1e999", *("[" * depth + "]" * depth for depth in (300, *range(500, 1000, 20), 5000))]
    refused = 0
    for value in odd:
        (source / "config.json").write_text(f'{text}, "odd": {value}}}')
        try:
            with Checkpoint.open(source) as checkpoint:
                prepare(checkpoint, out, INT4)
        except ConfigError as error:
            assert "config.json" in str(error)
            refused += 1
    assert 2 <= refused < len(odd)


def test_what_is_written_is_the_config_that_was_read_first(tmp_path: Path) -> None:
    """Fails if a config.json that is edited while the work goes on describes other matrices than are there."""
    source, out = write_published(tmp_path / "source", CONFIG, random_state(CONFIG)), tmp_path / "out"
    convert.convert(source, out, INT4, lambda *_: (source / "config.json").write_text("{}") and None)
    assert json.loads((out / "config.json").read_text())["hidden_size"] == CONFIG["hidden_size"]


def test_a_name_with_half_a_surrogate_pair_is_copied(tmp_path: Path) -> None:
    """JSON can spell it. Fails if it ends in a UnicodeEncodeError."""
    tensors = published_tensors(CONFIG, random_state(CONFIG))
    odd = "mtp.0.\ud800.weight"
    source = write_model(tmp_path / "source", CONFIG, {**tensors, odd: torch.zeros(3)})
    convert.convert(source, tmp_path / "out", INT4)
    verify(tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as made:
        assert odd in made.refs


def test_another_conversion_is_not_gone_on_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two recipes, sources or models are mixed in a folder, or what is other is not said."""
    out = tmp_path / "out"
    convert.convert(model, out, INT4)
    (out / output.SIDECAR).rename(tmp_path / "kept")
    for folder, rules, problem in [
        (out, INT4, "holds another model"), (model, INT4, "is the source"), (out / "LICENSE", INT4, "is not a folder"),
        (out / "LICENSE/under", INT4, "LICENSE: is not a folder"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            convert.convert(model, folder, rules)
    (tmp_path / "kept").rename(out / output.SIDECAR)
    with pytest.raises(UsageError, match="was begun with another recipe"):
        convert.convert(model, out, simple("int8", KEEP, 32))
    with pytest.raises(UsageError, match="from other files, or with another importance"):
        convert.convert(model, out, INT4, importance=Importance(Collected(fingerprint(model), [], 0, set())))
    with monkeypatch.context() as patch:
        patch.setattr(target, "VERSION", 99)
        patch.setattr(job, "VERSION", 99)
        with pytest.raises(UsageError, match="by another version"):
            convert.convert(model, out, INT4)
    (out / "config.json").unlink()
    with pytest.raises(UsageError, match="files of something else"):
        convert.convert(model, out, INT4)


def test_links_to_nothing_and_places_without_rights_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a dry run too. Fails if the system's own error is all that one is told."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    arguments = ["quantize", str(model), str(tmp_path / "link"), "--experts", "int4"]
    for more in ([], ["--dry-run"]):
        assert main([*arguments, *more]) == 2
        assert "link: is not a folder; choose another name" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written to; choose another place"):
        convert.convert(model, tmp_path / "out", INT4)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", failing_mkdir)
    with pytest.raises(UsageError, match=r"out: cannot be made \(Read-only file system\)"):
        convert.convert(model, tmp_path / "out", INT4)


def failing_mkdir(*_args: object, **_options: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_nothing_of_the_users_is_overwritten(model: Path, tmp_path: Path) -> None:
    """Fails if a file that happens to have a name of the model's is replaced, or a model is quantized twice."""
    (tmp_path / "LICENSE").write_text("mine")
    with pytest.raises(UsageError, match="files of something else"):
        convert.convert(model, tmp_path, INT4)
    assert (tmp_path / "LICENSE").read_text() == "mine"
    convert.convert(model, tmp_path / "out", INT4)
    with pytest.raises(UsageError, match="quantized already"):
        convert.convert(tmp_path / "out", tmp_path / "again", simple(KEEP, "int8", 32))
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing or cut short"):
        convert.convert(model, tmp_path / "out", INT4)


def test_two_at_once_are_refused(model: Path, tmp_path: Path) -> None:
    held = lock(tmp_path / target.LOCK)
    with pytest.raises(UsageError, match="is being written by process"):
        convert.convert(model, tmp_path, INT4)
    os.close(held)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "free_disk", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"are still to be written, 64\.0 MiB to be left, and 0\.0 MiB are free"):
        convert.convert(model, tmp_path / "out", INT4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [target.LOCK]


def test_a_dry_run_refuses_what_the_run_would(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if it promises what then is refused, or makes anything. The table is printed before."""
    dry = ["quantize", str(model), "OUT", "--experts", "int4", "--dry-run"]
    out, other, file = tmp_path / "out", tmp_path / "other", tmp_path / "file"
    convert.convert(model, out, INT4)
    other.mkdir()
    file.write_text("")
    (other / "mine").write_text("")
    for folder, expected in [(out, 0), (other, 2), (model, 2), (file, 2), (tmp_path / "new" / "folder", 0)]:
        before = sorted(tmp_path.rglob("*"))
        dry[2] = str(folder)
        assert main(dry) == expected, folder
        assert sorted(tmp_path.rglob("*")) == before
        assert "matrices from fp4 to int4_g32" in capsys.readouterr().out
    held = lock(other / target.LOCK)
    dry[2] = str(other)
    assert main(dry) == 2
    assert "is being written by process" in capsys.readouterr().err
    os.close(held)
    monkeypatch.setattr(target, "free_disk", lambda _: 1000)
    dry[2] = str(tmp_path / "new")
    assert main(dry) == 5
    assert "matrices from fp4 to int4_g32" in capsys.readouterr().out


def test_what_a_killed_run_has_left_is_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a disk that is just large enough is refused the second time."""
    with Checkpoint.open(model) as checkpoint:
        job = prepare(checkpoint, tmp_path, INT4)
    monkeypatch.setattr(target, "free_disk", lambda _: job.bytes_out + target.SPARE - 1000)
    with pytest.raises(ResourceError):
        target.check(job)
    partial_of(tmp_path / next(iter(job.shards))).write_bytes(bytes(5000))
    monkeypatch.setattr(target, "begun", lambda _: {})
    target.check(job)


def test_a_matrix_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Of 96 columns, and with a scale that is NaN. Fails if the message has only the number."""
    narrow = CONFIG | {"moe_intermediate_size": 96}
    source = write_published(tmp_path / "narrow", narrow, random_state(narrow), shards=1)
    rules = Recipe((Rule(r"layers\.1\.ffn\.experts\.2\.w2", "int4_g64"),))
    with pytest.raises(FormatError, match=r"model\.safetensors: layers\.1\.\S*\.2\.w2\.weight has 96 columns"):
        convert.convert(source, tmp_path / "out", rules)
    tensors = published_tensors(CONFIG, random_state(CONFIG))
    tensors["layers.1.ffn.experts.2.w2.scale"].view(torch.uint8)[3, 0] = 255
    source = write_model(tmp_path / "source", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: layers\.1\.\S*\.2\.w2\.weight: its scales"):
        convert.convert(source, tmp_path / "out", INT4)


def test_verify_finds_a_changed_byte(model: Path, tmp_path: Path) -> None:
    """Fails if a copy that was damaged on the way is called whole."""
    out = tmp_path / "out"
    convert.convert(model, out, INT4)
    found = verify(out)
    assert found.tensors > 100
    # config.json, the index, the tokenizer and the license.
    assert found.files == 4
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was written"):
        verify(out)
    with pytest.raises(ConfigError):
        verify(model)


def test_verify_finds_what_changed_beside_the_tensors(model: Path, tmp_path: Path) -> None:
    """Fails if a cut tokenizer, an edited config or a matrix of another shape or type is called what was written."""
    out = tmp_path / "out"
    convert.convert(model, out, INT4)
    for name in ("tokenizer.json", "LICENSE", "config.json", INDEX):
        data = (out / name).read_bytes()
        for other in (data[:-1], data.replace(b"e", b"f", 1).replace(b"M", b"N", 1)):
            (out / name).write_bytes(other)
            with pytest.raises(CheckpointError, match="is not what was written"):
                verify(out)
        (out / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be opened"):
            verify(out)
        (out / name).write_bytes(data)
    verify(out)
    shard = sorted(out.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for before, after in [(rb'"I32"', rb'"F32"'), (rb'"I32","shape":\[(\d+),(\d+)\]', rb'"I32","shape":[\2,\1]')]:
        changed = re.sub(before, after, whole, count=1)
        assert changed != whole
        shard.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"_packed is not what was written"):
            verify(out)


def test_a_folder_of_an_earlier_version_is_verified_as_far_as_it_goes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if it is refused, or it is not said that its config and tokenizer were not compared."""
    out = tmp_path / "out"
    convert.convert(model, out, INT4)
    sidecar = json.loads((out / output.SIDECAR).read_text())
    del sidecar["files"], sidecar["specs"]
    (out / output.SIDECAR).write_text(json.dumps(sidecar))
    (out / "LICENSE").unlink()
    assert verify(out).files is None
    assert main(["verify", str(out)]) == 0
    assert "noted nothing else" in capsys.readouterr().out
    (out / output.SIDECAR).write_text(json.dumps(sidecar | {"files": {"../model/LICENSE": {}}}))
    with pytest.raises(ConfigError, match="names the file"):
        verify(out)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no rule"),
        ("x = 1", "has x"),
        ("[[rule]]\nmatch = 'a'", "exactly match and format"),
        ("[[rule]]\nmatch = '('\nformat = 'keep'", "no regular expression"),
        ("[[rule]]\nmatch = 'a'\nformat = 'int5_g32'", "is not written"),
        ("[[rule]]\nmatch = 1\nformat = 'keep'", "texts"),
        ("[[rule", "is no recipe"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=problem):
        recipe.read(path)


@pytest.mark.parametrize("text", ["it's", "a\nb", "q\"'\x7f", "\\d'\\", "\u00e9\t", "\u2028'", "[^'\"]", "\x00"])
def test_a_recipe_is_read_back_as_it_was(text: str) -> None:
    """Fails if the sidecar has a recipe that is none, or another one, because of a quotation mark or a control byte."""
    rules = Recipe((Rule(re.escape(text), "int4_g32"), Rule(f"'?{re.escape(text)}", KEEP)))
    assert recipe.read_text(rules.text) == rules


def test_a_recipe_without_an_end_is_refused(tmp_path: Path) -> None:
    """Fails if a device or a pipe, which have no size, fill the memory."""
    for path in (Path("/dev/zero"), tmp_path / "large"):
        (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
        with pytest.raises(UsageError, match="is larger than"):
            recipe.read(path)
    (tmp_path / "latin").write_bytes(b"# \xe9")
    with pytest.raises(UsageError, match="cannot be read"):
        recipe.read(tmp_path / "latin")


def test_the_first_rule_that_matches_decides(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[[rule]]\nmatch = 'layers\\.0\\.'\nformat = 'keep'\n[[rule]]\nmatch = 'w2'\nformat = 'int8_g32'\n")
    rules = recipe.read(path)
    assert [rules.format_of(name) for name in ("layers.0.w2", "layers.1.w2", "layers.1.w1")] == [KEEP, "int8_g32", KEEP]
    assert recipe.read_text(rules.text) == rules
    with pytest.raises(UsageError, match="no matrix is left for the rule nothing"):
        convert.convert(model, tmp_path / "out", Recipe((Rule("nothing", "int8_g32"),)))


@pytest.mark.parametrize("name", list(FROM_FP4_PERCENT))
def test_the_warning_says_what_was_measured(name: str, tmp_path: Path) -> None:
    """Fails if a format is said to cost another share of precision or bytes than the embedded model's report has."""
    rules = simple(name, KEEP, 32)
    with Checkpoint.open(EMBEDDED) as checkpoint:
        line, limit = warnings(prepare(checkpoint, tmp_path / "out", rules), rules)
    assert limit.startswith("only localmoe reads it: ")
    assert "fp8_block" in limit
    rows = convert.convert(EMBEDDED, tmp_path / "out", rules)["classes"]
    error = 100 * sum(row["mean_error"] * row["tensors"] for row in rows) / sum(row["tensors"] for row in rows)
    assert error == pytest.approx(FROM_FP4_PERCENT[name], abs=0.1)
    before, after = (sum(row[key] for row in rows) for key in ("bytes_in", "bytes_out"))
    number = float(re.search(r"(?:saves|takes) ([\d.]+) %", line)[1])  # type: ignore[index]
    assert (number if "takes" in line else -number) == pytest.approx(100 * (after - before) / before, abs=0.15)


def test_the_current_folder_has_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if "." is reported as a model without a name."""
    monkeypatch.chdir(model)
    convert.convert(Path("."), tmp_path / "out", INT4)
    assert json.loads((tmp_path / "out" / output.SIDECAR).read_text())["source"] == model.name
    assert (tmp_path / "out" / f"{output.REPORT}.md").read_text().startswith(f"# {model.name}, quantized")


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a dry run writes, a warning is missing, or an option has no effect."""
    out = tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--experts", "int4", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "54 matrices from fp4 to int4_g32" in shown.out
    assert "the source is FP4 already: int4_g32 changes its matrices by about 7.3 % and takes 6.1 % more" in shown.err
    assert not out.exists()
    assert main(["quantize", str(model), str(out), "--dense", "int8", "--group-size", "64"]) == 0
    assert "int8_g64" in capsys.readouterr().out.splitlines()[-1]
    assert main(["quantize", str(model), str(out), "--group-size", "48"]) == 2
    assert main(["quantize", str(model), str(out), "--group-size", "64"]) == 2
    assert main(["quantize", str(model), str(out), "--recipe", "x", "--experts", "int8"]) == 2
    assert main(["quantize", str(tmp_path), str(out)]) == 4
    capsys.readouterr()
    assert main(["quantize", str(model), str(out), "--jobs", "300"]) == 2
    assert "lower --jobs" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0
    assert "other files are what was written" in capsys.readouterr().out


def test_names_of_the_library_are_sources(
    library_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if quantize or verify would take paths only, or the embedded model be called after its folder."""
    out = library_folder / "small"
    assert main(["quantize", "localmoe-mini", str(out), "--dense", "int8"]) == 0
    assert "| localmoe-mini | int8_g32 |" in capsys.readouterr().out
    assert 'base_model: "localmoe-mini"' in (out / output.CARD).read_text()
    assert main(["verify", "small"]) == 0
    assert main(["verify", "smal"]) == 4
    assert "did you mean small" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1e25, 1.0, 1e-25])
def test_the_error_of_large_and_small_numbers_is_measured(scale: float) -> None:
    """Fails if squares overflow, or vanish and a rounded matrix counts as exact."""
    before = noise(8, 64)
    after = before + 0.01 * noise(8, 64, seed=1)
    one = report.measure("x", ("bf16", "int4_g32"), (1, 1), before * scale, after * scale)
    assert one.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert one.cosine == pytest.approx(1, abs=1e-3)
    assert report.measure("x", ("bf16", "int4_g32"), (1, 1), before * scale, before * scale).error == 0


def test_the_card_says_what_was_made(model: Path, tmp_path: Path) -> None:
    """Fails if hubs could not read its head, or a strange name ends the head early."""
    source = model.rename(model.with_name('odd" name'))
    try:
        convert.convert(source, tmp_path / "out", INT4)
    finally:
        source.rename(model)
    card = (tmp_path / "out/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == 'odd" name'
    assert "int4_g32" in body
    verify(tmp_path / "out")


def stacked_model(folder: Path, state: dict[str, Tensor]) -> Path:
    """A model as transformers names and stacks it, in bf16."""
    config, tensors = DeepseekV4Config.from_dict(PLAIN_CONFIG), dict[str, Tensor]()
    for name, value in state.items():
        place = places(config, name)[1]
        value = value.bfloat16() if value.is_floating_point() else value
        if place.stack is None:
            tensors[place.name] = value
        else:
            stack = tensors.setdefault(place.name, torch.zeros(place.stack).bfloat16())
            stack[place.expert, place.start : place.start + value.shape[0]] = value
    return write_model(folder, PLAIN_CONFIG, tensors)


def test_stacks_of_experts_are_quantized_like_experts(tmp_path: Path) -> None:
    """Fails if a matrix is cut from another place of its stack, or a stack is left beside what was made of it."""
    state = random_state(PLAIN_CONFIG)
    plain = write_model(tmp_path / "plain", PLAIN_CONFIG, {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()
    })  # fmt: skip
    stacked = stacked_model(tmp_path / "stacked", state)
    found = {}
    for source in (plain, stacked):
        convert.convert(source, tmp_path / f"{source.name}-out", INT4)
        found[source] = load_weights(tmp_path / f"{source.name}-out", torch.float32)[1]
    for name in tensor_inventory(DeepseekV4Config.from_dict(PLAIN_CONFIG)):
        one, other = (found[source].get(name) for source in (plain, stacked))
        if isinstance(one, QuantizedTensor):
            assert isinstance(other, QuantizedTensor)
            one, other = one.dequantize(), other.dequantize()
        assert torch.equal(one, other)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gate_up_proj is a stack of experts"):
        convert.convert(stacked, tmp_path / "third", Recipe((Rule(r"layers\.0\.ffn\.experts\.\d+\.w1", "int8_g32"),)))


def test_an_undone_model_is_another_with_other_signs(tmp_path: Path) -> None:
    """Fails if a run that was interrupted goes on with the signs of another, and its shards are of two kinds."""
    convert.convert(EMBEDDED, tmp_path / "int8", simple("int8", KEEP, 32))

    def fingerprint() -> str:
        with Checkpoint.open(tmp_path / "int8") as checkpoint:
            return prepare(checkpoint, tmp_path / "out", simple("fp4", KEEP, 32)).fingerprint

    before = fingerprint()
    os.utime(next((tmp_path / "int8").glob("localmoe-signs.*")), (1, 1))
    assert fingerprint() != before


def test_room_for_the_signs_is_asked_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the disk is full after hours because of what lies beside the shards."""
    with Checkpoint.open(EMBEDDED) as checkpoint:
        job = prepare(checkpoint, tmp_path / "out", simple("int8", KEEP, 32))
    monkeypatch.setattr(target, "free_disk", lambda _: sum(s.nbytes for s in job.shards.values()) + (64 << 20))
    with pytest.raises(ResourceError, match="still to be written"):
        convert.convert(EMBEDDED, tmp_path / "out", simple("int8", KEEP, 32))


def test_the_owners_card_stays(model: Path, tmp_path: Path) -> None:
    """Fails if a second run writes over what somebody has added to the card."""
    convert.convert(model, tmp_path / "out", INT4)
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text() + "mine")
    convert.convert(model, tmp_path / "out", INT4)
    assert card.read_text().endswith("mine")


def test_importance_without_effect_is_refused(tmp_path: Path) -> None:
    """Fails if an exact conversion is said to have been calibrated."""
    found = Collected(fingerprint(EMBEDDED), [], 0, set())
    with pytest.raises(UsageError, match="has no effect"):
        convert.convert(EMBEDDED, tmp_path / "out", simple("int8", KEEP, 32), importance=Importance(found))


def test_importance_of_other_columns_is_refused(tmp_path: Path) -> None:
    """Fails in the middle of the work if a file is of the model by its name only."""
    sums = {"layers.0.ffn.experts.0.w1.weight": torch.ones(288).double()}
    found = Collected(fingerprint(EMBEDDED), [], 0, set(), sums=sums, counts={name: 1 for name in sums})
    with pytest.raises(UsageError, match="is not of"):
        convert.convert(EMBEDDED, tmp_path / "out", simple("int4", KEEP, 32), importance=Importance(found))
