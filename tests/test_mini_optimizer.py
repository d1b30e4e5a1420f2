"""Muon: the update is a nearly orthogonal matrix, whatever else has the same shape."""

from __future__ import annotations

import pytest
import torch

from localmoe.mini.optimizer import Muon, orthogonalize
from tests.loops import noise


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (8, 40), (40, 8)])
def test_orthogonalizing_brings_all_singular_values_near_one(rows: int, cols: int) -> None:
    """Fails for tall matrices if they are not transposed first. The iteration is coarse by design."""
    g = noise(3, rows, cols) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    values = torch.linalg.svdvals(orthogonalize(g, steps=10))
    assert ((values > 0.6) & (values < 1.3)).all()


def test_orthogonalizing_keeps_the_directions() -> None:
    """Fails if the result is orthogonal but unrelated to the gradient."""
    g = noise(1, 8, 8)
    u, _, vt = torch.linalg.svd(g[0])
    assert torch.trace(orthogonalize(g, steps=10)[0] @ (u @ vt).T) / 8 > 0.8


def test_a_step_goes_against_the_gradient_by_the_learning_rate() -> None:
    """Fails if the size of the step depends on the size of the gradient."""
    sizes = []
    for size in (1e-3, 1e3):
        p = torch.zeros(16, 32, requires_grad=True)
        p.grad = size * noise(16, 32)
        Muon([p], weight_decay=0.0).step(0.1)
        assert (p.detach() * p.grad).sum() < 0
        sizes.append(float(p.detach().square().mean().sqrt()))
    assert sizes == pytest.approx([0.1 * 0.2 * (32 / 32) ** 0.5] * 2, rel=0.3)


def test_matrices_of_one_shape_do_not_mix() -> None:
    """Fails if stepping them together is not stepping them apart, momentum included."""
    together = [noise(8, 8, seed=i).requires_grad_() for i in range(3)]
    apart = [p.detach().clone().requires_grad_() for p in together]
    one, many = Muon(together), [Muon([p]) for p in apart]
    for step in range(2):
        for i, p in enumerate((*together, *apart)):
            p.grad = noise(8, 8, seed=10 * step + i % 3)
        one.step(0.1)
        for optimizer in many:
            optimizer.step(0.1)
    for p, q in zip(together, apart, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_momentum_forgets_older_gradients() -> None:
    """Fails if the momentum is a plain sum, which never turns round."""
    p, old, new = torch.zeros(8, 8, requires_grad=True), noise(8, 8), noise(8, 8, seed=1)
    optimizer = Muon([p], momentum=0.5)
    for grad in (old, new):
        p.grad = grad.clone()
        optimizer.step(0.1)
    assert torch.allclose(optimizer.buffers[0][0], 0.5 * old + new)


def test_a_matrix_without_a_gradient_only_decays() -> None:
    """Fails for an expert that no token chose."""
    p = torch.ones(4, 4, requires_grad=True)
    Muon([p], weight_decay=0.5).step(0.1)
    assert torch.allclose(p, torch.full((4, 4), 0.95))
