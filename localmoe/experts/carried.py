"""Routed experts of a model whose layers are on devices: those that lie there, and the way to those that do not.

Knows layers and where hidden states are; does not know what computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from localmoe.experts.resident import ExpertSource


class CarriedExperts(ExpertSource):
    """here: of each layer whose experts are all on its device, what computes them; the others are computed by `source`,
    to which hidden states are carried and from which results are brought back."""

    def __init__(
        self, source: ExpertSource | None, here: Mapping[int, ExpertSource], prompt_tokens: int | None = None
    ) -> None:
        """source: None if no layer needs it. prompt_tokens: most of a prompt in one step, if not as usual."""
        self.source, self._here, self.prompt_tokens = source, here, prompt_tokens
        # The layer whose ids have been carried, and the ids, there and here.
        self._ids: tuple[int, Tensor, Tensor] | None = None

    @property
    def layers_here(self) -> int:
        """How many layers have all experts on their device."""
        return len(self._here)

    def prepare(self, tokens: int) -> None:
        """See ExpertSource.prepare."""
        self._ids = None
        if self.source is not None:
            self.source.prepare(tokens)

    def give_back(self) -> bool:
        """See ExpertSource.give_back: caches do, whole layers do not."""
        return self.source is not None and self.source.give_back()

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        """See ExpertSource.announce."""
        if layer in self._here:
            return
        here = ids.cpu()
        if not early:
            self._ids = (layer, ids, here)
        self._carrier(layer).announce(layer, here, early=early)

    def leaves_device(self, layer: int) -> bool:
        """See ExpertSource.leaves_device."""
        return layer not in self._here or self._here[layer].leaves_device(layer)

    def wants_guess(self, layer: int) -> bool:
        """See ExpertSource.wants_guess."""
        return layer not in self._here and self._carrier(layer).wants_guess(layer)

    def guess(self, layer: int, ids: Tensor) -> None:
        """See ExpertSource.guess."""
        self._carrier(layer).guess(layer, ids.cpu())

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. All are on the layer's device, as is what is returned."""
        if layer in self._here:
            return self._here[layer].apply(layer, hidden, ids, weights)
        return self._carrier(layer).apply(layer, hidden.cpu(), self._carry(layer, ids), weights.cpu()).to(hidden.device)

    def _carry(self, layer: int, ids: Tensor) -> Tensor:
        """The ids on the CPU: those that were announced, or copied now. Used once, as the next step's ids may be
        written to the same tensor."""
        carried, self._ids = self._ids, None
        if carried is not None and carried[0] == layer and carried[1] is ids:
            return carried[2]
        return ids.cpu()

    def _carrier(self, layer: int) -> ExpertSource:
        assert self.source is not None, f"nothing computes the experts of layer {layer}"
        return self.source


def carried(experts: ExpertSource) -> ExpertSource | None:
    """What computes the experts that are on no device; None if all are."""
    return experts.source if isinstance(experts, CarriedExperts) else experts
