"""Routers: which experts a token takes, and with what weights. One way through, three ways to score and choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from localmoe import ops
from localmoe.kernels.native import Matrix, Mode, Routing, Scoring
from localmoe.step import RouterRecord, Step
from localmoe.weights import Weight, linear_float32


@dataclass(frozen=True, kw_only=True)
class Router(ABC):
    """gate [E, D]. The chosen experts' scores, normalised to a sum of 1 if asked, times scale, are the weights."""

    gate: Weight
    top_k: int
    scale: float
    normalize: bool
    # [V, K]: the experts of each token id, where it alone decides.
    tid2eid: Tensor | None = None

    def __call__(self, x: Tensor, step: Step, layer: int) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] and weights [T, K] float32. Logits are fp32: both operands are upcast."""
        scores = self.scores(x)
        ids = self.choose(scores) if self.tid2eid is None else self.tid2eid[step.token_ids].to(x.device)
        if step.router_log is not None:
            step.router_log.append(RouterRecord(layer, scores if self.tid2eid is None else None, ids))
        return ids, ops.routing_weights(scores, ids, self.scale, normalize=self.normalize)

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E] float32."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> expert ids [T, K]; not of a router by token id."""


@dataclass(frozen=True, kw_only=True)
class BiasRouter(Router):
    """DeepSeek-V4: score + bias [E] chooses. bias is None where tid2eid does."""

    bias: Tensor | None

    def scores(self, x: Tensor) -> Tensor:
        return ops.router_scores(linear_float32(x, self.gate))

    def choose(self, scores: Tensor) -> Tensor:
        assert self.bias is not None, "a score router has a bias"
        return ops.route(scores.detach(), self.bias, self.top_k)


@dataclass(frozen=True, kw_only=True)
class GroupRouter(Router):
    """DeepSeek-V2 and -V3: an expert is chosen from the `keep` best of `groups` groups.

    bias [E]: V3's, which helps to choose and does not weigh; None: softmax scores, as in V2. A group is as good as its
    best expert in V2, and as its two best in V3."""

    bias: Tensor | None
    groups: int
    keep: int

    def scores(self, x: Tensor) -> Tensor:
        logits = linear_float32(x, self.gate)
        return logits.softmax(dim=-1) if self.bias is None else logits.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        scores = scores.detach()
        best = 1
        if self.bias is not None:
            scores, best = scores + self.bias, 2
        if self.groups > 1:
            scores = ops.choose_groups(scores, self.groups, self.keep, best)
        return ops.select_top(scores, self.top_k)

    def routing(self, gate: Matrix, mode: Mode) -> Routing:
        """This router for the C++ kernels."""
        scoring: Scoring = "softmax" if self.bias is None else "sigmoid"
        groups = self.groups, self.keep, 1 if self.bias is None else 2
        return Routing(gate, mode, self.bias, self.top_k, scoring, self.scale, self.normalize, *groups)
