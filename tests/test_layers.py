"""The small parts that the blocks are built from."""

from __future__ import annotations

import pytest
import torch

from localmoe.formats import FORMATS
from localmoe.layers.compressor import Compressor, Indexer, hide, quantize_latent, visible
from localmoe.layers.linear import tensor
from localmoe.layers.rotary import rotation
from localmoe.weights import grouped_linear, linear
from tests.loops import noise


@pytest.mark.parametrize(("groups", "out", "width"), [(1, 7, 5), (2, 1, 3), (4, 16, 64)])
def test_grouped_linear_is_a_block_diagonal_matrix(groups: int, out: int, width: int) -> None:
    """Fails if a group takes another group's rows, or the outputs come back interleaved."""
    x, w = noise(3, groups, width), noise(groups * out, width, seed=1)
    whole = torch.block_diag(*w.split(out))
    assert torch.allclose(grouped_linear(x, w), x.flatten(1) @ whole.t(), atol=1e-5)


def test_packed_matrices_multiply_as_their_values() -> None:
    x, packed = noise(3, 2, 64), FORMATS["fp8_block"].quantize(noise(10, 64, seed=1))
    assert torch.equal(linear(x, packed), linear(x, packed.dequantize()))
    assert torch.equal(grouped_linear(x, packed), grouped_linear(x, packed.dequantize()))
    assert linear(x.bfloat16(), packed).dtype == torch.bfloat16


def test_plain_matrices_decide_the_dtype() -> None:
    """Fails if float32 mixing weights would be used in bf16."""
    assert linear(noise(2, 4).bfloat16(), noise(3, 4)).dtype == torch.float32
    assert linear(noise(2, 4), noise(3, 4).bfloat16()).dtype == torch.bfloat16


def test_a_norm_weight_cannot_be_packed() -> None:
    packed = FORMATS["fp8_block"].quantize(noise(4, 64))
    with pytest.raises(AssertionError, match=r"norm\.weight must be a plain tensor"):
        tensor(lambda name: packed, "norm.weight")


def test_an_entry_is_seen_from_its_windows_last_token_on() -> None:
    """Fails by one in either direction: too early shows the future, too late forgets."""
    seen = visible(3, torch.arange(9), 4)
    assert seen.sum(1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert seen[3].tolist() == [True, False, False]
    assert hide(seen)[3].tolist() == [0, -torch.inf, -torch.inf]
    assert visible(0, torch.arange(2), 4).shape == (2, 0)


def test_a_rotation_is_undone_exactly_where_it_was_made() -> None:
    """Fails if the angle is not position times frequency."""
    turn = rotation(torch.tensor([0, 1, 1000]), torch.tensor([1.0, 0.25]))
    assert torch.equal(turn.cos[2], torch.tensor([1000.0, 250.0]).cos())
    x = noise(3, 2, 6)
    assert torch.equal(turn.apply(x)[0], x[0])
    assert torch.allclose(turn.undo(turn.apply(x)), x, atol=1e-6)


def test_only_the_unrotated_part_of_a_latent_is_rounded() -> None:
    x = noise(2, 80)
    rounded = quantize_latent(x, 16)
    assert torch.equal(rounded[:, 64:], x[:, 64:])
    assert (rounded[:, :64] != x[:, :64]).any()


def test_the_indexer_learns_without_teaching_the_layers_below() -> None:
    """Fails if its gradient reaches its inputs, where it drowns the gradient of the loss."""
    turn = rotation(torch.arange(3), torch.ones(1))
    wkv = noise(8, 6, seed=1).requires_grad_()
    keys = Compressor(wkv, noise(8, 6, seed=2), noise(4, 8, seed=3), torch.ones(4), torch.ones(1), 1e-6)
    wq_b, weights = noise(8, 5, seed=4).requires_grad_(), noise(2, 6, seed=5).requires_grad_()
    x, q_latent = noise(3, 6).requires_grad_(), noise(3, 5).requires_grad_()
    rows = Indexer(wq_b, weights, keys, num_heads=2, head_dim=4, top_k=1).project(x, q_latent, turn, torch.arange(3))
    (rows.q.square().sum() + rows.weights.square().sum() + rows.kv.square().sum()).backward()
    assert all(w.grad is not None and w.grad.any() for w in (wq_b, weights, wkv))
    assert x.grad is None
    assert q_latent.grad is None
