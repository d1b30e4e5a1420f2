"""Muon for matrices, AdamW for the rest: the optimizer pair that V4 itself was trained with.

Source: DeepSeek-V4 report, section 2.4 (Muon, hybrid Newton-Schulz) and K. Jordan et al., Muon, 2024."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each of g [n, rows, cols], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x if wide else x.transpose(1, 2)


class Muon:
    """Momentum, orthogonalised; matrices of one shape are stepped together. Update RMS is matched to AdamW's (0.2)."""

    def __init__(self, parameters: list[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in parameters:
            groups[p.shape].append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            buffer.mul_(self.momentum).add_(grad)
            update = orthogonalize(grad.add_(buffer, alpha=self.momentum))
            update *= 0.2 * max(group[0].shape) ** 0.5
            for p, u in zip(group, update.unbind(), strict=True):
                p.mul_(1 - lr * self.weight_decay).add_(u, alpha=-lr)
