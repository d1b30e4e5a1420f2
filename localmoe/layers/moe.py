"""Mixture of experts: choose experts for each token, run them through the expert seam, add the shared expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe import ops
from localmoe.experts.resident import Expert, ExpertSource, SharedExpert
from localmoe.layers.group_router import GroupRouter
from localmoe.step import Fault, RouterRecord, Step
from localmoe.weights import Weight, linear_float32


@dataclass(frozen=True)
class Router:
    """gate [E, D]; a score router selects by score + bias, a hash router looks the token id up in tid2eid [V, K]."""

    gate: Weight
    bias: Tensor | None
    tid2eid: Tensor | None
    top_k: int
    scale: float
    normalize: bool

    def __call__(self, x: Tensor, step: Step, layer: int) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] and weights [T, K] float32. Logits are fp32: both operands are upcast."""
        scores = self.scores(x)
        ids = self.choose(scores) if self.tid2eid is None else self.tid2eid[step.token_ids]
        if step.router_log is not None:
            step.router_log.append(RouterRecord(layer, None if self.bias is None else scores, ids))
        return ids, ops.routing_weights(scores, ids, self.scale, normalize=self.normalize)

    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E] float32."""
        return ops.router_scores(linear_float32(x, self.gate))

    def choose(self, scores: Tensor) -> Tensor:
        """Of a score router: scores [T, E] -> expert ids [T, K]."""
        assert self.bias is not None, "a score router has a bias"
        return ops.route(scores.detach(), self.bias, self.top_k)


@dataclass(frozen=True)
class MoE:
    """One layer's router, its routed experts behind the seam, and its shared expert.

    layer: counted among the layers that have experts."""

    layer: int
    router: Router | GroupRouter
    experts: ExpertSource
    shared: Expert | SharedExpert
    # Layers without experts before it.
    skipped: int = 0

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, D] -> [T, D]; routed experts accumulate in fp32."""
        ids, weights = self.router(x, step, self.layer + self.skipped)
        self.experts.announce(self.layer, ids)
        # While experts that are not in memory are on their way.
        shared = self.shared(x).float()
        routed = self.experts.apply(self.layer, x, ids, weights)
        if not torch.is_grad_enabled() and not math.isfinite(routed.sum()):
            self._blame(x, ids, routed, step)
        return (routed + shared).to(x.dtype)

    def announce_early(self, token_ids: Tensor) -> None:
        """Where the tokens alone decide, say which experts a step will need before it has come to this layer."""
        if self.router.tid2eid is not None:
            self.experts.announce(self.layer, self.router.tid2eid[token_ids], early=True)

    def wants_guess(self) -> bool:
        """Whether guess() has an effect."""
        return self.router.tid2eid is None and self.experts.wants_guess()

    def guess(self, x: Tensor) -> None:
        """Say which experts this layer would choose for x [T, D], what it would be given if its attention did nothing.

        Of the picks of the embedded model, 65 to 80 % are foreseen like this."""
        self.experts.guess(self.layer, self.router.choose(self.router.scores(x)))

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
