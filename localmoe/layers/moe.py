"""Mixture of experts: choose experts for each token, run them through the expert seam, add the shared expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.experts.resident import Expert, ExpertSource, SharedExpert
from localmoe.layers.router import Router
from localmoe.step import Fault, Step


@dataclass(frozen=True)
class MoE:
    """One layer's router, its routed experts behind the seam, and its shared expert.

    layer: counted among the layers that have experts."""

    layer: int
    router: Router
    experts: ExpertSource
    shared: Expert | SharedExpert
    # Layers without experts before it.
    skipped: int = 0

    def __call__(self, x: Tensor, step: Step, chosen: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, D]; routed experts accumulate in fp32. chosen [T, K]: what chosen_early() gave,
        where x is."""
        ids, weights = self.router(x, step, self.layer + self.skipped, chosen)
        aside = step.tape if self.experts.leaves_device(self.layer) else None
        if aside is None:
            self.experts.announce(self.layer, ids)
        else:
            aside.aside(lambda: self.experts.announce(self.layer, ids))
        # While experts that are not in memory are on their way.
        shared = self.shared(x)
        if aside is None:
            routed = self.experts.apply(self.layer, x, ids, weights)
        else:
            routed = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            aside.aside(lambda: routed.copy_(self.experts.apply(self.layer, x, ids, weights)))
        # A device is not waited for; note_faults() sees it later, without the expert's number.
        if routed.device.type == "cpu" and not torch.is_grad_enabled() and not math.isfinite(routed.sum()):
            self._blame(x, ids, routed, step)
        # In float32, whatever shared is.
        return (routed + shared).to(x.dtype)

    def chosen_early(self, token_ids: Tensor) -> Tensor | None:
        """Where token ids alone decide, the experts [T, K] of a step, announced before it has come to this layer."""
        if self.router.tid2eid is None:
            return None
        chosen = self.router.tid2eid[token_ids]
        self.experts.announce(self.layer, chosen, early=True)
        return chosen

    def guess(self, given: Callable[[], Tensor], step: Step) -> None:
        """Say, if it is of use, which experts this layer would choose for what it would be given [T, D] if its
        attention did nothing. Of the picks of the embedded model, 65 to 80 % are foreseen like this."""
        if self.router.tid2eid is not None:
            return
        if step.tape is None:
            self._guess(given)
        elif self.experts.leaves_device(self.layer):
            step.tape.aside(lambda: self._guess(given))

    def _guess(self, given: Callable[[], Tensor]) -> None:
        if self.experts.wants_guess(self.layer):
            self.experts.guess(self.layer, self.router.choose(self.router.scores(given())))

    def _blame(self, x: Tensor, ids: Tensor, routed: Tensor, step: Step) -> None:
        """Name the expert that broke each sequence, by running the experts of its first broken token one by one."""
        broken = ~routed.isfinite().all(1) & x.isfinite().all(1)
        one = torch.ones(1, 1)
        for i, span in enumerate(step.spans):
            rows = broken[span.rows].nonzero()
            if i in step.faults or not len(rows):
                continue
            t = span.start + int(rows[0])
            for expert in ids[t].unique():
                if not self.experts.apply(self.layer, x[t : t + 1], expert.view(1, 1), one).isfinite().all():
                    step.faults[i] = Fault(self.layer + self.skipped, f"expert {int(expert)}")
                    break
