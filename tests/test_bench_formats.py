"""Error per bit: searching is better than the usual rounding, and knowing what matters better than that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from localmoe.api import LLM
from localmoe.bench import formats
from localmoe.bench.report import Record
from localmoe.cli.main import main
from localmoe.library import EMBEDDED
from localmoe.quantize.calibrate import Text, collect
from localmoe.quantize.imatrix import Importance, write
from localmoe.quantize.samples import Sample
from tests.conftest import shared_data
from tests.loops import noise

STORY = "Once upon a time there was a little frog who lived by a pond. One day the frog saw a big red ball. " * 40


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded model on a story."""
    path = tmp_path_factory.mktemp("imatrix") / "file"
    ids = LLM(EMBEDDED).tokenizer.encode(STORY)
    text = Text(ids, "digest", None)
    write(path, collect(EMBEDDED, text, path, 128, lambda observer: LLM(EMBEDDED, observer=observer), lambda *_: None))
    return path


def is_better(record: Record) -> None:
    """Searched before absmax; with importance, calibrated before searched."""
    exact = record["searched"] == 0
    if record["absmax"] is not None:
        assert exact or record["searched"] < record["absmax"]
    if record["calibrated_weighted"] is not None:
        assert exact or record["calibrated_weighted"] < record["searched_weighted"]


def test_every_format_gains_from_searching_and_from_importance(importance: Path) -> None:
    """On the embedded model's experts. Fails if a search or an importance has no effect, or a bad one."""
    rows = list(formats.run(EMBEDDED, Importance.load(importance), lambda _: None))
    assert {row["format"] for row in rows} >= {"int8_g32", "int4_g128", "nf4", "book3", "book2", "uniform 2-bit g64"}
    for row in rows:
        # int8 in groups of 32 is exact from FP4, and as good as exact however it is searched.
        if row["format"] not in ("fp4", "int8_g32"):
            is_better(row)
    by_name = {row["format"]: row for row in rows}
    for bits in (3, 2):
        book, uniform = by_name[f"book{bits}"], by_name[f"uniform {bits}-bit g64"]
        assert book["bits"] == pytest.approx(uniform["bits"], abs=0.01)
        assert book["searched"] < 0.75 * uniform["searched"]


def test_the_weights_of_a_dense_model_too() -> None:
    """stories15M in float32, with importance made up. Fails if a format is only good for what it was tuned on."""
    data = np.fromfile(shared_data("weights/stories15M.bin"), dtype=np.float32)
    # After seven numbers and the embedding: norms [6, 288], wq, wk, wv, wo [6, 288, 288], norms, w1, w2.
    begin = 7 + 32000 * 288 + 6 * 288 + 4 * 6 * 288 * 288 + 6 * 288
    w1 = torch.from_numpy(data[begin : begin + 6 * 768 * 288].copy()).view(6 * 768, 288)
    w2 = torch.from_numpy(data[begin + w1.numel() : begin + 2 * w1.numel()].copy()).view(6 * 288, 768)
    assert 0.01 < w1.std() < 0.2 > w2.std() > 0.01
    found = [Sample(w[::8], noise(w.shape[1], seed=1).square() + 0.1) for w in (w1, w2)]
    for way in formats.ways():
        fitting = [sample for sample in found if sample.values.shape[1] % way.group == 0]
        is_better(formats.measured(way, fitting))


def test_the_command_prints_a_row_for_each_format(importance: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "formats", str(EMBEDDED), "--calib", str(importance), "-o", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("format,bits,absmax")
    assert any(line.startswith("book2,2.25") for line in lines)
    assert main(["bench", "formats", str(EMBEDDED), "-o", "csv"]) == 0
    assert ",,,," in capsys.readouterr().out.splitlines()[1]
