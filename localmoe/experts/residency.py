"""Which experts are in which slots of a tier, and in what order a layer's experts come and go.

Integers only; nothing here reads, copies or computes. What happens depends on what is asked for and never on when a
read completes, so a replayed trace takes the same decisions as the run it was recorded from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from localmoe.experts.policy import Policy

# Experts of a layer that may be on their way or waiting to be computed at once: enough reads in flight for any disk,
# few enough that a long prompt, which needs every expert of a layer once, does not push everything else out.
WINDOW = 16
# Slots for guesses: what a token of the largest models asks of a layer, but never more than a share of all slots.
MOST_GUESSES, _GUESS_SHARE = 8, 1 / 16


def guess_slots(slots: int) -> int:
    """Of a budget of so many slots, those to set apart for guesses."""
    return min(MOST_GUESSES, int(slots * _GUESS_SHARE))


@dataclass
class Counts:
    """Uses of experts by where they were found. first: misses of experts that had never been used before."""

    hits: int = 0
    misses: int = 0
    first: int = 0


@dataclass(frozen=True)
class Acquired:
    """An expert's slot; hit: it was resident, or on its way, already. Otherwise its bytes are to be put there."""

    key: int
    slot: int
    hit: bool
    evicted: int | None = None


class Asked(NamedTuple):
    """What a layer asked for: experts, ascending, each for so many of the step's tokens."""

    layer: int
    experts: Sequence[int]
    counts: Sequence[int]
    tokens: int


class Residency:
    """The table of one tier's slots. Keys as in policy.py."""

    def __init__(self, capacity: int, num_layers: int, num_experts: int, policy: Policy) -> None:
        assert capacity > 0, "a tier has at least one slot"
        self.num_layers, self.num_experts = num_layers, num_experts
        self.counts = Counts()
        self._policy = policy
        self._slots: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._pins: dict[int, int] = {}
        self._used: set[int] = set()
        self._finished: list[Asked] = []
        self._spread = 2
        self._clock = [0] * num_layers
        self._of_layer = [0] * num_layers

    @property
    def capacity(self) -> int:
        """Slots in use or free."""
        return len(self._slots) + len(self._free)

    def slot_of(self, key: int) -> int | None:
        return self._slots.get(key)

    def keys(self) -> list[int]:
        """Every resident."""
        return list(self._slots)

    def begin(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        tokens: int,
        *,
        elsewhere: Collection[int] = (),
    ) -> Pass:
        """A layer is to compute these experts, ascending, each for so many of the step's tokens.

        elsewhere: keys of those that another tier has; their use is noted, they need no slot."""
        # Prompts come back to a layer after all the others, by when anything that is not protected has been given up.
        self._spread = 1 if len(experts) > self.num_experts // 2 else 2
        now = self._clock[layer] + tokens / 2
        self._clock[layer] += tokens
        keys = [layer * self.num_experts + expert for expert in experts]
        for key, count in zip(keys, counts, strict=True):
            self._policy.touch(key, count, now)
        here = [key for key in keys if key not in elsewhere]
        return Pass(self, here, Asked(layer, experts, counts, tokens))

    def finished(self, use: Asked) -> None:
        """A pass is complete."""
        self._finished.append(use)

    def learn(self) -> None:
        """Tell the policy of what has been completed; to be called while the disk is waited for."""
        for use in self._finished:
            self._policy.learn(self, use)
        self._finished.clear()

    def acquire(self, key: int, wanted: Sequence[int]) -> Acquired | None:
        """Pin an expert to a slot, giving up another if need be; None while every slot is pinned.

        wanted: what the layer needs next; it is given up only if there is nothing else, the last of it first."""
        slot, evicted = self._slots.get(key), None
        hit = slot is not None
        if slot is None:
            if not self._free:
                evicted = self._give_up(wanted)
                if evicted is None:
                    return None
            slot = self._free.pop()
            self._slots[key] = slot
            self._of_layer[key // self.num_experts] += 1
            self._policy.admit(key)
        self._pins[key] = self._pins.get(key, 0) + 1
        self.counts.hits += hit
        self.counts.misses += not hit
        self.counts.first += not hit and key not in self._used
        self._used.add(key)
        return Acquired(key, slot, hit, evicted)

    def release(self, key: int) -> None:
        """Undo one acquire's pin."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def exchange(self, key: int, other: int | None) -> None:
        """The key goes elsewhere; `other`, which is not resident, takes its slot, or nothing does."""
        self._policy.drop(key)
        slot = self._slots.pop(key)
        self._of_layer[key // self.num_experts] -= 1
        if other is None:
            self._free.append(slot)
            return
        self._slots[other] = slot
        self._of_layer[other // self.num_experts] += 1
        self._policy.admit(other)

    def prefers(self, key: int) -> bool:
        """Whether this key, which is not resident, would be kept rather than what would be given up for it."""
        if self._free:
            return True
        self._policy.admit(key)
        victim = self._policy.victim(lambda other: other in self._pins)
        self._policy.drop(key)
        return victim not in (None, key)

    def forget(self, key: int) -> None:
        """Take an expert out whose bytes could not be read. It must not be pinned."""
        assert key not in self._pins, f"expert {key} is still in use"
        self._policy.drop(key)
        self._free.append(self._slots.pop(key))
        self._of_layer[key // self.num_experts] -= 1

    def shrink(self) -> int | None:
        """Take one slot away, with the expert in it if none is empty; None if all are pinned or only one is left."""
        if self.capacity == 1 or (not self._free and self._give_up(()) is None):
            return None
        return self._free.pop()

    def grow(self, slot: int) -> None:
        """Add a slot, empty."""
        self._free.append(slot)

    def mend(self, kept: Collection[int], slots: Iterable[int]) -> None:
        """After an interruption, wherever it came: these residents stay, nothing is in use, and these are the slots."""
        self._slots = {key: slot for key, slot in self._slots.items() if key in kept}
        taken = set(self._slots.values())
        self._free = [slot for slot in slots if slot not in taken]
        self._pins.clear()
        self._finished.clear()
        self._of_layer = [0] * self.num_layers
        for key in self._slots:
            self._of_layer[key // self.num_experts] += 1
        self._policy.keep(self._slots)

    def _give_up(self, wanted: Sequence[int]) -> int | None:
        """Free the slot of one resident."""
        pins, some = self._pins, set(wanted)
        # What a layer keeps however rarely its experts are used, so that no layer starves.
        floor = self.capacity // (self._spread * self.num_layers)
        victim = self._policy.victim(
            lambda key: key in pins or key in some or self._of_layer[key // self.num_experts] <= floor
        )
        if victim is None:
            victim = self._policy.victim(lambda key: key in pins or key in some)
        if victim is None:
            victim = next((key for key in reversed(wanted) if key in self._slots and key not in pins), None)
        if victim is not None:
            self.forget(victim)
        return victim


class Pass:
    """A layer's experts of one step, in ascending order: acquired up to a window ahead, released when computed."""

    def __init__(self, residency: Residency, keys: list[int], use: Asked) -> None:
        self.keys, self._use = keys, use
        self._residency = residency
        self._acquired = 0
        self._released = 0

    @property
    def done(self) -> bool:
        return self._released == len(self.keys)

    @property
    def waiting(self) -> list[int]:
        """Keys that are acquired and not computed yet."""
        return self.keys[self._released : self._acquired]

    def advance(self) -> list[Acquired]:
        """Acquire what the window and the free slots allow."""
        found: list[Acquired] = []
        while self._acquired < len(self.keys) and self._acquired - self._released < WINDOW:
            one = self._residency.acquire(self.keys[self._acquired], self.keys[self._acquired + 1 :])
            if one is None:
                break
            found.append(one)
            self._acquired += 1
        return found

    def release(self) -> list[Acquired]:
        """The first waiting expert is computed; acquires what that makes room for."""
        self._residency.release(self.keys[self._released])
        self._released += 1
        if self.done:
            self._residency.finished(self._use)
        return self.advance()

    def abandon(self) -> None:
        """Let go of everything, computed or not."""
        for key in self.waiting:
            self._residency.release(key)
        self._released = self._acquired = len(self.keys)
