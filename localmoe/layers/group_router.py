"""The routers of DeepSeek-V2 and -V3: softmax or sigmoid scores, and experts from a few groups only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localmoe import ops
from localmoe.step import RouterRecord, Step
from localmoe.weights import Weight, linear_float32


@dataclass(frozen=True)
class GroupRouter:
    """gate [E, D]. bias [E]: V3's, which helps to choose and does not weigh; None: softmax scores, as in V2.

    An expert is chosen from the `keep` best of `groups` groups; a group is as good as its best expert in V2, and as its
    two best in V3."""

    gate: Weight
    bias: Tensor | None
    top_k: int
    scale: float
    normalize: bool
    groups: int
    keep: int

    # Nothing is chosen by token id.
    tid2eid = None

    def __call__(self, x: Tensor, step: Step, layer: int) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] and weights [T, K] float32."""
        scores = self.scores(x)
        ids = self.choose(scores)
        if step.router_log is not None:
            step.router_log.append(RouterRecord(layer, scores, ids))
        return ids, ops.routing_weights(scores, ids, self.scale, normalize=self.normalize)

    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E] float32."""
        logits = linear_float32(x, self.gate)
        return logits.softmax(dim=-1) if self.bias is None else logits.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> expert ids [T, K]."""
        scores = scores.detach()
        best = 1
        if self.bias is not None:
            scores, best = scores + self.bias, 2
        if self.groups > 1:
            scores = ops.choose_groups(scores, self.groups, self.keep, best)
        return ops.select_top(scores, self.top_k)
