"""A run that begins where another ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe import backend
from localmoe.cli.main import main
from localmoe.engine import Engine
from localmoe.errors import UsageError
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import PagerStats, Paging
from localmoe.pager import open_model
from tests.tiny_engine import run, token_ids
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published

CONFIG = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 9, "num_experts_per_tok": 3})
IDS = token_ids(30)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, random_state(CONFIG), shards=2)


def reply(path: Path, paging: Paging) -> tuple[Tensor, PagerStats]:
    engine = Engine(open_model(path, "tiny", paging, dtype=torch.float32, backend=backend.choose("auto")))
    found, paged = run(engine, IDS, chunk=5), engine.model.experts
    assert isinstance(paged, PagedExperts)
    paged.check()
    stats = paged.stats
    paged.close()
    return found, stats


def test_it_begins_with_what_was_there(published: Path, tmp_path: Path) -> None:
    """Fails if nothing is read in advance, the wrong experts are, or a result depends on it."""
    trace = tmp_path / "trace"
    cold, cold_stats = reply(published, Paging(slots=40, trace=trace))
    warm, stats = reply(published, Paging(slots=40, warm=trace))
    assert torch.equal(warm, cold)
    assert stats.hits - cold_stats.hits > 25
    # Fewer slots than the trace was recorded with are filled too.
    few, few_stats = reply(published, Paging(slots=11, warm=trace))
    assert torch.equal(few, cold)
    assert few_stats.hits + few_stats.misses == stats.hits + stats.misses


def test_a_trace_of_another_model_is_refused(published: Path, tmp_path: Path) -> None:
    """Fails if experts of another model would be taken for this one's."""
    other = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 12, "num_experts_per_tok": 3})
    path = write_published(tmp_path / "other", other, random_state(other), shards=1)
    trace = tmp_path / "trace"
    reply(published, Paging(slots=5, trace=trace))
    with pytest.raises(UsageError, match="6 layers of 9 experts, the model has 6 of 12"):
        reply(path, Paging(slots=5, warm=trace))
    (tmp_path / "none").write_text("{}")
    with pytest.raises(UsageError, match="no routing trace"):
        reply(published, Paging(slots=5, warm=tmp_path / "none"))


def test_simulate_does_not_compare_what_began_warm(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the user is told that the pager counted wrongly."""
    first, second = tmp_path / "first", tmp_path / "second"
    reply(published, Paging(slots=11, trace=first))
    reply(published, Paging(slots=11, trace=second, warm=first))
    assert main(["simulate", str(second)]) == 0
    assert "began warm" in capsys.readouterr().err
