"""How many tokens are computed at once, and what memory that takes beside weights and caches.

Depends on the model alone and never on the memory there is, or results could."""

from __future__ import annotations

from dataclasses import dataclass

# Enough to fill the matrix units, few enough for Ctrl-C to be felt.
_FEW = 512
# A chunk of a prompt needs nearly every expert, so a model whose experts are on disk is read once for each chunk.
_MANY, _LARGE_MODEL = 2048, 16e9
# Tokens that attention takes at once: its queries are the largest thing there is of a token.
ATTENTION_TOKENS = 512
# Of any step, roughly: torch's own buffers and blocks of attention scores.
BASE_BYTES = 192 << 20


def prefill_tokens(expert_weights: int) -> int:
    """Most tokens of prompts in one step. expert_weights: numbers in all routed experts of the model."""
    return _MANY if expert_weights > _LARGE_MODEL else _FEW


@dataclass(frozen=True)
class WorkBytes:
    """per_token: of streams and of results of experts. per_query: of each token that attention takes at once."""

    per_token: int
    per_query: int

    def of(self, tokens: int) -> int:
        """Bytes of a step of so many tokens."""
        return BASE_BYTES + tokens * self.per_token + min(tokens, ATTENTION_TOKENS) * self.per_query


@dataclass(frozen=True)
class CacheSize:
    """Numbers of a sequence's decode state. per_token: kept for each token of context; read_per_token: of those, what
    a step reads again. fixed: whatever the length, in the cache's dtype; fixed_float32: in float32 always."""

    per_token: float
    read_per_token: float
    fixed: int
    fixed_float32: int
