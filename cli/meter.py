"""Reads the limit meter for a loaded model: with what this machine was measured to do, measuring nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.events import Completion
    from localmoe.experts.paging import PagerStats
    from localmoe.meter import Reading


def reading(llm: LLM, completion: Completion, before: PagerStats | None = None) -> Reading | None:
    """What a reply cost since `before`; None where all experts are in memory.

    How near it came to the limit is known after `localmoe plan` has measured the machine."""
    after = llm.pager
    if after is None:
        return None
    from localmoe.bench.rates import known_rates
    from localmoe.meter import Machine, read
    from localmoe.models.sizes import sizes_of_config

    rates = known_rates(llm.experts_folder, llm.backend.library if llm.backend else None)
    sizes = sizes_of_config(llm.config, llm.name)
    machine = (
        None if rates is None else Machine(sizes, rates, llm.experts_held / sizes.experts, llm.engine.prefill_tokens)
    )
    return read(completion.stats, after if before is None else after - before, machine)
