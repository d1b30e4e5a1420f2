"""Retrieval over long contexts, by a model whose every weight is set for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import backend, scheduler
from localmoe.bench import needle
from localmoe.bench.needle import DEPTHS, Needle, ask, haystack, is_right, open_needle
from localmoe.bench.needle_model import CONFIG, FILLER, NOTHING, VALUES, needle_config, needle_state
from localmoe.bench.subject import Computing
from localmoe.cli.main import main
from localmoe.engine import Engine
from localmoe.errors import UsageError
from localmoe.events import Completion, Finished, Progress
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.pager import open_model
from localmoe.reply_request import ReplyRequest
from localmoe.sampler import SamplingParams
from tests.tiny_tokenizer import tiny_tokenizer
from tests.tiny_v4 import write_published


def silent(_doing: str) -> None:
    pass


def engine(kernels: Any = "auto", dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    return open_needle(Computing(dtype, backend.choose(kernels)), **options)


@pytest.mark.parametrize("length", [4096, 32_768])
def test_every_needle_is_found_at_every_depth(length: int) -> None:
    """Fails if an entry is lost, misplaced or hidden, or the indexer does not pick it. Chance of one code: 1 in 128^4;
    32K tokens are 8192 entries of which 64 are picked."""
    for record in needle.run(engine(), [length], 1, silent):
        assert {depth: record[f"found_at_{depth}"] for depth in DEPTHS} == dict.fromkeys(DEPTHS, 1)
        assert record["nothing_found"] == 1


@pytest.mark.parametrize(
    ("kernels", "dtype", "quantize_kv"),
    [("reference", torch.float32, True), ("reference", torch.bfloat16, False), ("strict", torch.float32, False)],
)
def test_needles_are_found_with_other_kernels_and_formats(kernels: str, dtype: torch.dtype, quantize_kv: bool) -> None:
    for record in needle.run(engine(kernels, dtype, quantize_kv=quantize_kv), [2048], 1, silent):
        assert all(record[f"found_at_{depth}"] == 1 for depth in DEPTHS) and record["nothing_found"] == 1


def test_needles_are_found_with_experts_on_disk(tmp_path: Path) -> None:
    """From files in published formats, with room for 3 of the 12 experts."""
    write_published(tmp_path, CONFIG, needle_state())
    paging = Paging(slots=3)
    model = open_model(tmp_path, "needle", paging, dtype=torch.float32, backend=backend.choose("auto"))
    assert isinstance(model.experts, PagedExperts)
    try:
        for record in needle.run(Engine(model), [2048], 1, silent):
            assert all(record[f"found_at_{depth}"] == 1 for depth in DEPTHS) and record["nothing_found"] == 1
    finally:
        model.experts.close()


def test_a_haystack_without_its_needle_gives_nothing() -> None:
    """Fails if answers would come from anywhere but the needle."""
    hay, model = haystack(2048, 5), engine()
    for gone in (n for n in hay.needles if n.depth in (10, 75)):
        at = hay.ids.index(gone.key)
        ids = hay.ids[:at] + [hay.ids[1]] * 5 + hay.ids[at + 5 :]
        session = model.new_session()
        model.advance([(session, ids)])
        assert ask(model, session, gone.key)[0][0] == NOTHING


def test_lost_entries_are_noticed() -> None:
    """Fails if the test could not fail: without one layer's entries, one route and no other must be lost."""
    hay, model = haystack(2048, 6), engine()
    for layer, lost in ((1, {"csa"}), (2, {"hca"})):
        session = model.new_session()
        model.advance([(session, hay.ids)])
        entries = session.state.layers[layer].entries
        assert entries is not None
        entries.pool.buffer = torch.zeros_like(entries.pool.buffer)
        session.mark()
        wrong = set()
        for item in hay.needles:
            session.rewind(len(hay.ids))
            first = ask(model, session, item.key)[0][0]
            if first != (item.code[0] if item.code else NOTHING):
                wrong.add(item.route)
        assert wrong == lost


def test_reading_says_how_far_it_is_stops_within_a_chunk_and_goes_on_from_there() -> None:
    """Fails if Ctrl-C would wait for the whole prompt, lose what was read, or damage what is found afterwards."""
    hay, model = haystack(4096, 7), engine()
    session, hidden = model.new_session(), next(n for n in hay.needles if n.depth == 25 and n.route == "hca")

    def read(steps: int) -> tuple[list[int], Completion]:
        prompt, left = [*hay.ids, FILLER[0], hidden.key], iter([False] * steps + [True])
        params = SamplingParams(temperature=0, max_tokens=len(hidden.code))

        def start() -> ReplyRequest:
            return ReplyRequest(
                session, prompt, params, tiny_tokenizer(), context=5000, end_ids=frozenset(), parser=None
            )

        events = [event for _, event in scheduler.run(model, [start], cancelled=lambda: next(left))]
        assert isinstance(events[-1], Finished)
        return [event.done for event in events if isinstance(event, Progress)], events[-1].completion

    done, cut = read(3)
    assert (done, cut.finish_reason, session.length) == ([512, 1024, 1536], "cancelled", 1536)
    done, whole = read(99)
    assert done == [*range(2048, 4097, 512), 4098]
    assert whole.token_ids == hidden.code
    assert whole.stats.reused_tokens == 1536


def test_a_haystack_hides_each_needle_once_where_it_says() -> None:
    hay = haystack(4096, 3)
    assert len(hay.ids) == 4096
    assert Counter(n.depth for n in hay.needles) == dict.fromkeys((None, *DEPTHS), 2)
    counts = Counter(hay.ids)
    for item in hay.needles:
        assert counts[item.key] == (item.depth is not None)
        assert all(counts[value] == 1 and value in VALUES for value in item.code)
        if item.depth is not None:
            at = hay.ids.index(item.key)
            assert tuple(hay.ids[at + 1 : at + 5]) == item.code
            assert abs(at - item.depth * 40.96) < 24
    assert haystack(4096, 3) == hay and haystack(4096, 4) != hay


def test_only_the_whole_code_is_right() -> None:
    hidden, absent = Needle("csa", 0, 131, (3, 4, 5, 6)), Needle("csa", None, 132, ())
    assert is_right(hidden, (3, 4, 5, 6)) and not is_right(hidden, (3, 4, 5, 7))
    assert is_right(absent, (NOTHING, 9, 9, 9)) and not is_right(absent, (3, NOTHING, NOTHING, NOTHING))


@pytest.mark.parametrize("length", [1024, 4100, 1 << 20])
def test_haystacks_that_would_hide_a_needle_from_hca_are_refused(length: int) -> None:
    with pytest.raises(UsageError, match="expected a multiple of 128 from 2048"):
        needle.check_lengths([length])


def test_the_model_has_every_tensor_of_its_config() -> None:
    inventory, state = tensor_inventory(needle_config()), needle_state()
    assert {name: spec.shape for name, spec in inventory.items()} == {n: tuple(t.shape) for n, t in state.items()}


def test_the_table_says_how_many_were_found(capsys: Any) -> None:
    assert main(["bench", "needle", "--lengths", "2048", "-r", "2", "--kernels", "reference"]) == 0
    header, _rule, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, *rows)]
    assert cells[0][:3] == ["tokens", "route", "0 %"] and cells[0][-2:] == ["context MB", "planned"]
    for row, route in zip(cells[1:], ("csa", "hca"), strict=True):
        assert row[:-4] == ["2,048", route] + ["2/2"] * (len(DEPTHS) + 1)
        assert int(row[-1]) > 0


def test_a_length_that_cannot_be_tested_is_refused(capsys: Any) -> None:
    assert main(["bench", "needle", "--lengths", "4096,100"]) == 2
    assert "a haystack of 100 tokens, expected a multiple of 128" in capsys.readouterr().err
