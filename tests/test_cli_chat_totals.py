"""cli/chat_totals.py: the line under the input."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from localmoe.cli.chat_totals import Totals, tier_bar
from localmoe.experts.paging import PagerStats
from tests.fake_llm import FakeLLM


class Paged(FakeLLM):
    pager = PagerStats(hits=310, misses=170, vram_hits=520)


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> Totals:
    monkeypatch.setattr("localmoe.device.resident_memory", lambda: 3 * 2**29)
    llm: Any = Paged()
    llm.context = 131_072
    return Totals(llm)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (99, "fake | context 12,345 of 131,072 | experts █████▒▒▒░░ VRAM 52 RAM 31 disk 17 % | 1.50 GiB"),
        (85, "context 12,345 of 131,072 | experts █████▒▒▒░░ VRAM 52 RAM 31 disk 17 % | 1.50 GiB"),
        (80, "context 12,345 of 131,072 | █████▒▒▒░░ VRAM 52 RAM 31 disk 17 % | 1.50 GiB"),
        (70, "context 12,345 of 131,072 | █████▒▒▒░░ VRAM 52 RAM 31 disk 17 %"),
        (40, "12,345 of 131,072 | █████▒▒▒░░"),
        (20, "12,345 of 131,072"),
        (9, "12,345"),
    ],
)
def test_what_is_least_needed_goes_first(totals: Totals, columns: int, line: str) -> None:
    """Fails if the line would be wrapped over what is typed."""
    assert totals.toolbar(12_345, columns) == line
    assert cell_len(line) <= columns


@pytest.mark.parametrize(
    ("stats", "bar"),
    [
        (PagerStats(), ""),
        (PagerStats(hits=83, misses=17), "▒▒▒▒▒▒▒▒░░ RAM 83 disk 17 %"),
        (PagerStats(hits=7), "▒▒▒▒▒▒▒▒▒▒ RAM 100 disk 0 %"),
        (PagerStats(hits=1, misses=1, vram_hits=1), "███▒▒▒▒░░░ VRAM 33 RAM 33 disk 33 %"),
    ],
)
def test_the_bar_is_full_and_names_only_the_tiers_there_are(stats: PagerStats, bar: str) -> None:
    assert tier_bar(stats) == bar
