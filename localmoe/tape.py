"""What a decode step tells devices, recorded once as graphs that are replayed in one launch each, and what the CPU does
between them. Knows tensors and order; does not know models. Memory: what the step's intermediate results take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """What a device was told."""

    def replay(self) -> None:
        """Tell it again. What was read then is read anew; results are in the tensors where they were."""
        ...


class Recorder(Protocol):
    """Makes graphs. What a device is told between begin() and end() is not done, and must not be waited for."""

    def begin(self, device: torch.device) -> None: ...

    def end(self) -> Graph:
        """What `device` has been told since begin()."""
        ...

    def give_up(self) -> None:
        """After an error, of begin() and end() too: as if there had been no begin(). Does nothing if there was none."""
        ...

    def forget(self) -> None:
        """No graph made so far is used any more: give their memory back."""
        ...


class Tape:
    """Records a step, then plays it."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        """device: where the step begins."""
        self._recorder, self._device = recorder, device
        self._parts: list[Callable[[], object]] = []
        recorder.begin(device)

    def aside(self, work: Callable[[], object]) -> None:
        """Have the CPU do something at this point, from tensors and to tensors that stay where they are."""
        self.end()
        self._parts.append(work)
        self._recorder.begin(self._device)

    def bring(self, x: Tensor, device: torch.device) -> Tensor:
        """x on a device, where the step goes on."""
        if x.device == device:
            return x
        self.end()
        # Memory of another device must not be asked for while this one is recorded.
        there = torch.empty(x.shape, dtype=x.dtype, device=device)
        self._parts.append(lambda: there.copy_(x, non_blocking=True))
        self._device = device
        self._recorder.begin(device)
        return there

    def end(self) -> None:
        """Nothing more is to be recorded, for now or at all."""
        self._parts.append(self._recorder.end().replay)

    def play(self) -> None:
        """Do the step."""
        for part in self._parts:
            part()
