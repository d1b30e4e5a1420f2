"""Comparing a model with its source: exact formats differ by nothing but noise, others by what they cost."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

from localmoe.api import LLM
from localmoe.cli.main import main
from localmoe.errors import ResourceError, UsageError
from localmoe.library import EMBEDDED
from localmoe.quantize import convert, evaluate
from localmoe.quantize.evaluate import Evaluation
from localmoe.quantize.recipe import KEEP, simple

STORY = "Once upon a time, there was a little girl named Lily. She had a red ball and a big dog. " * 12


def opened(path: Path | None) -> LLM:
    return LLM(path, kernels="reference")


def compared(path: Path, folder: Path, count: int = 200) -> Evaluation:
    llm = opened(None)
    ids = [0, *llm.tokenizer.encode(STORY)][:count]
    return evaluate.evaluate(lambda: llm, lambda: opened(path), ids, folder, lambda _: None)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "model"
    convert.convert(EMBEDDED, out, simple("int4", KEEP, 32))
    return out


def test_an_exact_format_differs_by_nothing(tmp_path: Path) -> None:
    """Fails if chunks are compared with others', or the noise is not computed in another order."""
    convert.convert(EMBEDDED, tmp_path / "int8", simple("int8", KEEP, 32))
    found = compared(tmp_path / "int8", tmp_path)
    assert (found.found.mean_kl, found.found.high_kl, found.found.agreement) == (0, 0, 1)
    assert found.found.perplexity == found.perplexity
    assert 0 < found.noise.mean_kl < 1e-6


def test_a_lossy_format_differs_by_more_than_noise(int4: Path, tmp_path: Path) -> None:
    found = compared(int4, tmp_path)
    assert found.found.mean_kl > 1000 * found.noise.mean_kl
    assert found.found.high_kl > found.found.mean_kl
    assert 0.8 < found.found.agreement < 1
    assert found.found.tokens == 199


def test_perplexity_and_divergence_by_hand(int4: Path, tmp_path: Path) -> None:
    """Fails if a token is judged by the prediction before or after it, or the divergence is the other way round."""
    found = compared(int4, tmp_path, 40)
    llm, other = opened(None), opened(int4)
    ids = [0, *llm.tokenizer.encode(STORY)][:40]
    p, q = (model.logits(ids[:-1]).double().log_softmax(-1) for model in (llm, other))
    following = torch.tensor(ids[1:])[:, None]
    assert found.perplexity == pytest.approx(math.exp(-float(p.gather(1, following).mean())), rel=1e-4)
    assert found.found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)


def test_what_cannot_be_compared_is_refused(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        compared(int4, tmp_path, 1)
    monkeypatch.setattr(evaluate, "free_disk", lambda _: 0)
    with pytest.raises(ResourceError, match="take fewer --tokens"):
        compared(int4, tmp_path)


def test_the_command(
    int4: Path,
    library_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(STORY)
    (library_folder / "four").symlink_to(int4)
    arguments = ["eval", "four", "--against", "localmoe-mini", "-f", "text", "-n", "60"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("59 tokens")
    assert "localmoe-mini again, in other chunks (noise)" in out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"]["tokens"] == 59
    assert main(["eval", str(int4), "--against", str(EMBEDDED), "-f", "missing"]) == 2
    assert main([*arguments, "--tmp", "missing"]) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]


def test_what_waits_is_not_in_the_current_folder(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if gigabytes are written wherever one happens to be, or --tmp has no effect, or "." has no name."""
    (tmp_path / "text").write_text(STORY)
    used: list[Path] = []

    def kept(_source: object, _model: object, _ids: object, folder: Path, _report: object) -> Evaluation:
        used.append(folder)
        one = evaluate.Compared(1, 1.0, 0.0, 0.0, 1.0)
        return Evaluation(1.0, one, one)

    monkeypatch.setattr(evaluate, "evaluate", kept)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    monkeypatch.chdir(int4)
    arguments = ["eval", ".", "--against", str(EMBEDDED), "-f", str(tmp_path / "text")]
    assert main(arguments) == 0
    assert main([*arguments, "--tmp", str(tmp_path)]) == 0
    assert used == [tmp_path / "system", tmp_path]
    assert f"| {int4.name} | 1.0000" in capsys.readouterr().out
