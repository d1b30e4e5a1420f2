"""How long a batch will take: what is said of it beforehand, and where that comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe.batch.duration import Pace, measured, planned
from localmoe.batch.estimate import Estimate
from localmoe.batch.output import Output, pace_of
from localmoe.bench import rates
from localmoe.bench.shapes import CONFIGS
from localmoe.cli.batch_time import time_text
from localmoe.cli.main import main
from localmoe.models.sizes import sizes_of
from localmoe.placement import Budget
from localmoe.plan import Rates, plan
from tests.batch_files import write

FOUND = Estimate(requests=10, replies=20, prompt_tokens=4000, reply_tokens=16000)
RATES = Rates(dram=40e9, disk=3e9, flops=5e11, seconds_per_layer=1e-4)
FLASH = sizes_of(CONFIGS["v4-flash"], "v4-flash")
LINES = [{"prompt": f"Tell me about {i}.", "max_tokens": 3} for i in range(4)]


@pytest.mark.parametrize("fact", [None, 5, [], [3], [0, 1.0], [3, 0.0], [3, "x"], ["3", 1.0], [3, -1.0], {"3": 1.0}])
def test_what_is_no_pace_is_none(fact: Any) -> None:
    assert measured(fact) is None


def test_a_pace_is_known_again() -> None:
    pace = Pace(4, 2.0)
    assert measured(json.loads(json.dumps(pace.fact()))) == pace and pace.seconds_of(10) == 5.0


def test_what_is_planned_is_what_plan_says() -> None:
    """One reply at a time by hand, and more of them with experts on disk. Fails if it were slower to have a choice."""
    one = planned(FOUND, FLASH, RATES, 64 << 30, 1)
    by_hand = plan(FLASH, Budget(64 << 30, context=1000), RATES)
    seconds = 4000 / by_hand.prefill.tokens_per_s + 16000 / by_hand.decode.tokens_per_s
    assert one == Pace(10, pytest.approx(seconds), planned=True)
    many = planned(FOUND, FLASH, RATES, 64 << 30, 16)
    assert many is not None and one is not None and many.seconds < one.seconds


def test_nothing_is_planned_that_is_not_known() -> None:
    """Replies that may go on, and a model that does not fit."""
    assert planned(Estimate(2, 2, 10, 10, open_ended=1), FLASH, RATES, 64 << 30, 4) is None
    assert planned(Estimate(), FLASH, RATES, 64 << 30, 4) is None
    assert planned(FOUND, FLASH, RATES, 1 << 30, 4) is None


def test_words() -> None:
    assert time_text(7200, Pace(2, 2.0)) == "about 2h00m, as the last run of this output went"
    assert time_text(90, Pace(1, 1.0, planned=True)) == "planned: 1m30s, if every reply is as long as it may be"
    assert "not known" in time_text(3, None)


@pytest.mark.usefixtures("one_load")
def test_how_long_it_takes_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not known, then planned, then as it went. Fails if what is said is of other requests than those that are left."""
    source, out = write(tmp_path / "in", LINES), tmp_path / "out"
    command = ["batch", str(source), "-o", str(out)]
    known: list[Rates | None] = [None]
    monkeypatch.setattr(rates, "known_rates", lambda *_: known[0])
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "how long that takes is not known before some are done"
    known[0] = RATES
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("planned: ")
    assert main([*command, "--dry-run", "--deterministic"]) == 0
    assert "not known" in capsys.readouterr().out
    assert main([*command, "--limit", "3"]) == 0
    assert "3 of 3 to do; planned: " in capsys.readouterr().err
    pace = pace_of(out)
    assert pace is not None and pace.requests == 3
    # Four requests, each as long as a quarter of an hour.
    state = tmp_path / "out.state.json"
    state.write_text(state.read_text().replace(json.dumps(pace.fact()), "[2, 1800.0]"))
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "about 1h00m, as the last run of this output went"
    assert main(command) == 0
    assert "1 of 4 to do; about 15m00s, as" in capsys.readouterr().err
    assert main(command) == 0
    assert "to do" not in capsys.readouterr().err
    after = pace_of(out)
    assert after is not None and after.requests == 1 and after.seconds < 900


def test_the_pace_of_another_model_says_nothing(tmp_path: Path) -> None:
    """Fails if the week of a large model is expected of a small one, or forgotten by a run that does nothing."""
    out = tmp_path / "out"
    for model, expected in (("a", None), ("a", Pace(3, 9.0)), ("b", None)):
        output = Output(out, {"model": model}, restart=True)
        assert output.pace == expected
        if expected is None:
            output.remember(Pace(3, 9.0))
        output.close()
