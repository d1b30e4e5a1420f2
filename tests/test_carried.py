"""What is carried between a layer's device and the experts of the CPU, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe.experts.carried import CarriedExperts
from localmoe.experts.resident import ExpertSource
from tests.simulated_devices import SIMULATED, simulated

A = SIMULATED[0]


class Asked(ExpertSource):
    """What it is asked for."""

    def __init__(self) -> None:
        self.announced: list[list[int]] = []
        self.applied: list[list[int]] = []

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        assert ids.device.type == "cpu"
        self.announced.append(ids.flatten().tolist())

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert {t.device.type for t in (hidden, ids, weights)} == {"cpu"}
        self.applied.append(ids.flatten().tolist())
        return hidden


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were carried to the CPU, each time."""
    found, cpu = [], Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        found.append(tensor.numel())
        return cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", counted)
    return found


def test_ids_are_carried_once_for_a_layer(carried: list[int]) -> None:
    """Fails if they are copied again for apply(), which waits for the device each time."""
    with simulated():
        source = Asked()
        experts = CarriedExperts(source, {})
        hidden, ids, weights = torch.zeros(1, 4).to(A), torch.tensor([[3, 7]]).to(A), torch.ones(1, 2).to(A)
        experts.announce(2, ids)
        assert experts.apply(2, hidden, ids, weights).device == A
        assert carried == [2, 4, 2]
    assert source.announced == source.applied == [[3, 7]]


def test_ids_that_were_written_over_are_carried_again() -> None:
    """The same tensor with other numbers. Fails if those of the layer or the step before are taken for them."""
    with simulated():
        source = Asked()
        experts = CarriedExperts(source, {})
        hidden, ids, weights = torch.zeros(1, 4).to(A), torch.tensor([[3, 7]]).to(A), torch.ones(1, 2).to(A)

        def apply(layer: int) -> None:
            experts.apply(layer, hidden, ids, weights)

        experts.announce(2, ids)
        apply(2)
        ids.fill_(5)
        apply(2)
        # Another layer, other ids, an interrupted step, and ids of a step that is not there yet.
        experts.announce(3, ids)
        ids.fill_(6)
        apply(4)
        experts.announce(5, ids.clone().fill_(9))
        apply(5)
        experts.announce(5, ids)
        experts.prepare(1)
        ids.fill_(8)
        apply(5)
        experts.announce(6, ids, early=True)
        ids.fill_(1)
        apply(6)
    assert source.applied == [[3, 7], [5, 5], [6, 6], [6, 6], [8, 8], [1, 1]]
