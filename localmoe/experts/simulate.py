"""Replays a routing trace through the pager's own decisions at any number of slots, and through Belady's, which knows
the future: what a policy could gain at most. Integers only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from localmoe.experts.policy import Policy
from localmoe.experts.residency import Counts, Residency
from localmoe.experts.trace import Entry, Header, Resized, TracedStep


def replay(header: Header, entries: Sequence[Entry], capacity: int, policy: Policy, *, resize: bool = False) -> Counts:
    """Hits and misses of a policy with so many slots. resize: with the changes of capacity that were recorded."""
    residency = Residency(capacity, header.num_layers, header.num_experts, policy)
    taken: list[int] = []
    for entry in entries:
        if isinstance(entry, TracedStep):
            replay_step(residency, entry, header.num_hash_layers)
        elif isinstance(entry, Resized) and resize:
            while residency.capacity > entry.capacity and (slot := residency.shrink()) is not None:
                taken.append(slot)
            while residency.capacity < entry.capacity and taken:
                residency.grow(taken.pop())
    return residency.counts


def replay_step(residency: Residency, step: TracedStep, num_hash_layers: int) -> None:
    """What the pager does in a step: hash layers begin at once, because their experts are known from the tokens."""
    begun = []
    for layer, use in enumerate(step.uses[:num_hash_layers]):
        begun.append(residency.begin(layer, use.experts, use.counts, step.tokens))
        begun[-1].advance()
    for layer, use in enumerate(step.uses):
        now = begun[layer] if layer < num_hash_layers else residency.begin(layer, use.experts, use.counts, step.tokens)
        now.advance()
        residency.learn()
        while not now.done:
            now.release()


def belady(header: Header, entries: Sequence[Entry], capacity: int) -> Counts:
    """Hits and misses if the resident whose next use lies furthest ahead is always given up.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966."""
    keys = [
        layer * header.num_experts + expert
        for entry in entries
        if isinstance(entry, TracedStep)
        for layer, use in enumerate(entry.uses)
        for expert in use.experts
    ]
    never = len(keys)
    next_use = [never] * len(keys)
    last: dict[int, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        next_use[at] = last.get(keys[at], never)
        last[keys[at]] = at
    counts, resident, seen = Counts(), dict[int, int](), set[int]()
    furthest: list[tuple[int, int]] = []
    for key, following in zip(keys, next_use, strict=True):
        if key in resident:
            counts.hits += 1
        else:
            counts.misses += 1
            counts.first += key not in seen
            seen.add(key)
            while len(resident) >= capacity:
                ahead, victim = heapq.heappop(furthest)
                if resident.get(victim) == -ahead:
                    del resident[victim]
        resident[key] = following
        heapq.heappush(furthest, (-following, key))
    return counts
