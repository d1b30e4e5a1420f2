"""The arithmetic of a reply's statistics."""

from __future__ import annotations

from localmoe.events import Stats, rate


def test_speeds_leave_out_what_another_phase_paid_for() -> None:
    """Fails if reused tokens count as computed, or the first token, which the prefill gave, as decoded."""
    stats = Stats(
        prompt_tokens=100,
        reused_tokens=80,
        generated_tokens=11,
        prefill_seconds=4.0,
        decode_seconds=2.0,
        first_token_seconds=4.0,
    )
    assert stats.prefill_tokens_per_s == 5
    assert stats.decode_tokens_per_s == 5


def test_speeds_of_nothing_are_zero() -> None:
    """Fails with a division by zero, or a negative speed for an empty reply."""
    assert rate(5, 0.0) == 0
    nothing = Stats(3, 3, 0, 0.0, 0.5, 0.0)
    assert (nothing.prefill_tokens_per_s, nothing.decode_tokens_per_s) == (0, 0)
