"""Graphs of devices that are not there: what was told to a simulated device is listed, and done again when it is
replayed.

As on a real one, nothing is done while it is recorded: whatever was written is put back, and what was made holds NaN
until it is replayed. Waiting for the device meanwhile, and copies to it, are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from localmoe.tape import Graph, Recorder
from tests.simulated_devices import RECORDING, Told


def _bytes(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class SimulatedGraph(Graph):
    def __init__(self, work: list[Callable[[], object]]) -> None:
        self._work = work

    def replay(self) -> None:
        with _disable_current_modes():
            for each in self._work:
                each()


class SimulatedRecorder(Recorder):
    """graphs: made so far. fail_at: the graph in which the device refuses to be recorded; error: or what happens there
    instead, once. forgotten: how often memory was to be given back."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.graphs, self.forgotten, self._fail_at, self._error = 0, 0, fail_at, error
        self._device: torch.device | None = None

    def begin(self, device: torch.device) -> None:
        assert self._device is None and not RECORDING, "one graph at a time"
        self._device, self._work = device, list[Callable[[], object]]()
        # By address: what it was before, and what was made.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        RECORDING.append(self)

    def end(self) -> Graph:
        self._close()
        for made in self._made.values():
            if made.is_floating_point():
                made.fill_(torch.nan)
        self.graphs += 1
        return SimulatedGraph(self._work)

    def give_up(self) -> None:
        if self._device is not None:
            self._close()

    def forget(self) -> None:
        assert self._device is None, "nothing is being recorded"
        self.forgotten += 1

    def _close(self) -> None:
        RECORDING.remove(self)
        self._device = None
        with _disable_current_modes():
            for tensor, before in self._before.values():
                _bytes(tensor).copy_(before)

    def told(self, what: Told) -> Any:
        """Called instead of doing it."""
        if what.device.type == "cpu" and not what.waits:
            return what.do()
        fails = self.graphs == self._fail_at
        if fails and self._error is not None:
            error, self._fail_at = self._error, None
            raise error
        if what.waits or what.arrives or what.device != self._device or fails:
            raise RuntimeError(f"{what.name}: operation not permitted when stream is capturing")
        given = [t for t in tree_flatten(what.given)[0] if isinstance(t, Tensor)]
        if what.writes:
            for tensor in given:
                at = tensor.untyped_storage().data_ptr()
                if at not in self._before and at not in self._made:
                    self._before[at] = tensor, _bytes(tensor).clone()
        result = what.do()
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        held = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in results if t.untyped_storage().data_ptr() not in held]
        self._made |= {t.untyped_storage().data_ptr(): t for t in new}
        if what.writes:
            self._work.append(what.do)
        elif new and not what.empty:
            self._work.append(lambda: _again(what, results))
        return result


def _again(what: Told, results: list[Tensor]) -> None:
    for there, now in zip(results, (t for t in tree_flatten(what.do())[0] if isinstance(t, Tensor)), strict=True):
        there.copy_(now)
