"""How multi-head latent attention rotates: base and YaRN, as published (rope_theta, rope_scaling) or as transformers
writes it (rope_parameters). Either will do; when both are there they must agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localmoe.config import Reader
from localmoe.models.shared_fields import is_yarn, refuse_unknown_rope


@dataclass(frozen=True)
class Yarn:
    """original_max_position in tokens. turn_scale: of cos and sin; softmax_scale: of attention scores.

    Source: YaRN (arXiv 2309.00071); with mscale as in DeepSeek-V2's code."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    turn_scale: float
    softmax_scale: float


@dataclass(frozen=True)
class Rope:
    """Base of the frequencies, and their scaling at every length."""

    theta: float
    yarn: Yarn | None


def read_rope(reader: Reader) -> Rope:
    """Raises ConfigError, also for a scaling other than YaRN."""
    found = [name for name in ("rope_scaling", "rope_parameters") if name in reader.names()]
    if not found:
        # Without this check a converter that lost the field would give fluent text that decays with length.
        raise reader.error("rope_scaling", "is missing, expected it or rope_parameters (null if there is no scaling)")
    ropes = [_read(reader, name) for name in found]
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise reader.error("rope_scaling", "and rope_parameters describe different rotations; expected them to agree")
    return ropes[0]


def _read(reader: Reader, name: str) -> Rope:
    section = reader.section(name) if reader.has(name) else None
    inside = section is not None and section.has("rope_theta")
    holder = section if section is not None and inside else reader
    theta = holder.required("rope_theta", float, low=1.001)
    if inside and reader.has("rope_theta"):
        reader.agree("rope_theta", reader.required("rope_theta", float), f"{name}.rope_theta", theta)
    return Rope(theta, None if section is None else _yarn(section))


def _yarn(section: Reader) -> Yarn | None:
    refuse_unknown_rope(section, "mscale", "mscale_all_dim")
    section.must_be("partial_rotary_factor", 1, default=1)
    if not is_yarn(section):
        return None
    factor = section.required("factor", float, low=1)
    mscale = section.optional("mscale", float, 0.0, low=0, high=100)
    all_dim = section.optional("mscale_all_dim", float, 0.0, low=0, high=100)
    turn = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original_max_position=section.required("original_max_position_embeddings", int, low=1),
        beta_fast=section.optional("beta_fast", float, 32.0, low=1e-3, high=1e6),
        beta_slow=section.optional("beta_slow", float, 1.0, low=1e-3, high=1e6),
        turn_scale=section.optional("attention_factor", float, turn, low=0, high=100),
        softmax_scale=_mscale(factor, all_dim) ** 2 if all_dim else 1.0,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1
