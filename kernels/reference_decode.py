"""What a decode step does to caches in place on a device, where the position is known to the device alone: in torch."""

from __future__ import annotations

from torch import Tensor

from localmoe.kernels import reference
from localmoe.kernels.triton.depth import Depth


def append_entry(
    kv: Tensor, score: Tensor, opened: tuple[Tensor, Tensor], depth: Depth, norm: Tensor, eps: float,
    turn: tuple[Tensor, Tensor], pool: Tensor,
) -> None:  # fmt: skip
    """One token's row into a compressor's open rows and, when it closes their window, the window's entry into its pool.

    kv, score: [1, o * d] float32, o = 2 where windows overlap. opened: kv and score [o * m, o * d] float32 not pooled
    yet, those of the window before first. depth: ratio m. norm: [d]; turn: cos, sin [1, P] float32 of the first
    position of the token's window. pool: [E, d]. Writes to opened and pool.
    Source: DeepSeek-V4 report (arXiv 2606.19348), section 2.3."""
    m, width, position = depth.ratio, pool.shape[1], int(depth.position)
    overlap = kv.shape[-1] == 2 * width
    # 1. Rows of the window before lie first, if there is one and it is needed.
    window, nth = divmod(position, m)
    first = m if overlap and window else 0
    for rows, row in zip(opened, (kv, score), strict=True):
        rows[first + nth] = row[0]
    if nth < m - 1:
        return
    # 2. Pool.
    before = (opened[0][:m], opened[1][:m]) if first else None
    now_kv, now_score = (rows[None, first : first + m] for rows in opened)
    if overlap:
        pooled = reference.pool_overlapping(now_kv, now_score, before)
    else:
        pooled = reference.pool_windows(now_kv, now_score)
    # 3. Norm and rotation.
    pool[window] = reference.rope(reference.rms_norm(pooled.to(pool.dtype), norm, eps), *turn)[0]
    # 4. The next window overlaps with this one.
    if first:
        for rows in opened:
            rows[:m] = rows[m:].clone()
