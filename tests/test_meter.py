"""The limit meter by hand: a model and a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localmoe.events import Stats
from localmoe.experts.paging import PagerStats
from localmoe.meter import Machine, Reading, read, verdict
from localmoe.plan import Rates
from tests import round_model
from tests.round_model import GB, MB

# Without what reading the context takes.
MODEL = replace(round_model.MODEL, kv_bytes_per_token=0.0, kv_read_per_token=0.0)
RATES = Rates(dram=10e9, disk=1e9, flops=1e12, seconds_per_layer=0.001)
MACHINE = Machine(MODEL, RATES, 0.5, 512)
# 10 tokens of prompt in one step, 11 of reply in 10 more, 10 seconds.
STATS = Stats(10, 0, 11, 2.0, 8.0, 2.0)
COUNTS = PagerStats(
    hits=300, misses=100, first=20, bytes_read=8 * GB, bytes_computed=21 * GB, wait_seconds=6.0, busy_seconds=7.0,
    true_guesses=40,
)  # fmt: skip


def test_every_number_by_hand() -> None:
    """Fails if a share is of something else, or the dense weights are read for every token of a prompt."""
    found = read(STATS, COUNTS, MACHINE)
    assert (found.hit_percent, found.cold_percent, found.guessed_percent, found.wait_percent) == (75, 5, 40, 60)
    assert found.disk_bytes == 8 * GB / 21
    assert found.memory_bytes == (21 * GB + 11 * 900 * MB) / 21
    assert found.disk_bytes_per_s == 8 * GB / 7
    # The disk needs 8 s, memory (21 + 9.9) / 10 = 3.1 s, Python 0.1 s.
    assert (found.bound, found.limit_percent) == ("the disk", 80)


@pytest.mark.parametrize(
    ("rates", "bound", "percent"),
    [
        (replace(RATES, dram=1e9, disk=1e12), "memory", 309),
        (replace(RATES, flops=20e6, disk=1e12), "arithmetic", 100),
        (replace(RATES, seconds_per_layer=0.05, disk=1e12), "Python", 55),
    ],
)
def test_the_busiest_part_is_the_bound(rates: Rates, bound: str, percent: float) -> None:
    """Fails if a part is left out, or is given another's time."""
    found = read(STATS, COUNTS, Machine(MODEL, rates, 0.5, 512))
    assert (found.bound, found.limit_percent) == (bound, pytest.approx(percent))


def test_the_plan_beside_it_knows_only_how_many_experts_are_held() -> None:
    """Fails if the prediction is made from what was measured, or is of another share of experts."""
    planned = [read(STATS, COUNTS, Machine(MODEL, RATES, held, 512)).planned_tokens_per_s for held in (0.1, 0.5, 1.0)]
    assert planned == sorted(planned)  # type: ignore[type-var]
    # 900 MB of weights and 20 experts from memory at 10 GB/s, and 10 layers of 1 ms.
    assert planned[-1] == pytest.approx(1 / (0.09 + 0.02 + 0.01))
    assert read(STATS, replace(COUNTS, hits=0), Machine(MODEL, RATES, 1.0, 512)).planned_tokens_per_s == planned[-1]


def test_without_rates_there_is_still_a_verdict() -> None:
    """Fails if a machine that was never measured gets numbers of another, or none at all."""
    found = read(STATS, COUNTS)
    assert (found.bound, found.limit_percent, found.planned_tokens_per_s) == ("the disk", None, None)
    assert verdict(found) == (
        "hits 75 % (cold 5 %) | disk 0.38 GB/tok at 1.1 GB/s | bound by the disk (waited 60 % of the time)"
    )
    assert read(STATS, replace(COUNTS, wait_seconds=1.0)).bound == "memory and computing"


def test_a_reply_of_nothing_has_a_reading() -> None:
    """Fails if an interrupted reply ends in a division by zero."""
    nothing = read(Stats(5, 5, 0, 0.0, 0.0, 0.0), PagerStats(), MACHINE)
    assert (nothing.hit_percent, nothing.limit_percent) == (0, None)


def test_the_phrase() -> None:
    reading = Reading(71.2, 3.9, 50.0, 0.53e9, 9e9, 3.1e9, 59.0, "the disk", 93.4, 5.21)
    assert verdict(reading) == (
        "hits 71 % (cold 4 %) | disk 0.53 GB/tok at 3.1 GB/s | bound by the disk, 93 % of the limit"
        " | planned 5.21 tok/s"
    )
    assert "disk 0.40 MB/tok" in verdict(replace(reading, disk_bytes=4e5))
    assert "disk" not in verdict(replace(reading, disk_bytes=0.0, bound="memory"))


def test_a_prompt_takes_as_many_steps_as_the_engine_says() -> None:
    """Longer ones where experts cross to a GPU. Fails if the dense weights are counted for steps there were not."""
    stats, counts = replace(STATS, prompt_tokens=1000, generated_tokens=0), replace(COUNTS, bytes_computed=0)
    found = [read(stats, counts, replace(MACHINE, prefill_tokens=n)).memory_bytes for n in (100, 300, 1000, 2000)]
    assert found == [steps * 900 * MB / 1000 for steps in (10, 4, 1, 1)]
