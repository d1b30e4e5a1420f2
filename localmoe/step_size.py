"""How many tokens are computed at once, and what memory that takes beside weights and caches.

Depends on the model alone and never on the memory there is, or results could; but see streamed_tokens()."""

from __future__ import annotations

from dataclasses import dataclass

# Enough to fill the matrix units, few enough for Ctrl-C to be felt.
_FEW = 512
# A chunk of a prompt needs nearly every expert, so a model whose experts are on disk is read once for each chunk.
_MANY, _LARGE_MODEL = 2048, 16e9
# Where experts are copied to a GPU for each chunk: fewer copies, for a part of the memory that would hold experts.
_CROSSING, _OF_ROOM = 16_384, 1 / 4
# Tokens that attention takes at once: its queries are the largest thing there is of a token.
ATTENTION_TOKENS = 512
# Rows of a latent cache that many queries attend to at once.
KEY_BLOCK = 512
# Queries attended to at once: few enough that a block of window scores stays small...
QUERY_BLOCK = 128
# ...and fewer where the context is long: most scores of queries x heads x entries held at once (128 MiB in float32).
SCORE_ELEMENTS = 1 << 25
# Most numbers in the entries chosen for each of these queries (64 MiB in float32).
CHOSEN_ELEMENTS = 1 << 24
# Choosing among entries takes as much as this many heads' scores, however few heads there are.
LEAST_HEADS = 16
# How often the scores of all entries are there, until they are joined with those of the window and summed.
_COPIES = 3
# Of any step, roughly: torch's own buffers.
BASE_BYTES = 48 << 20


def prefill_tokens(expert_weights: int) -> int:
    """Most tokens of prompts in one step. expert_weights: numbers in all routed experts of the model."""
    return _MANY if expert_weights > _LARGE_MODEL else _FEW


def streamed_tokens(work: WorkBytes, ordinary: int, most: int, room: int) -> int:
    """Most tokens of prompts in one step where experts cross to a GPU that cannot hold them all, once for each step.

    ordinary: as of prefill_tokens(), of a context of `most`. room: bytes that experts could take. Twice as many, and
    again, up to _CROSSING, while what the step takes more is at most a part of the room. The only number of tokens that
    depends on the memory there is: what a GPU multiplies is not the CPU's to the last bit anyway."""
    tokens = ordinary
    while tokens < min(_CROSSING, most):
        more = min(2 * tokens, _CROSSING, most)
        if work.of(more) - work.of(ordinary) > room * _OF_ROOM:
            break
        tokens = more
    return tokens


@dataclass(frozen=True)
class WorkBytes:
    """per_token: of streams and of results of experts. per_query: of each token that attention takes at once, the most
    at its end. block: of scores and entries of a block of queries, while half of per_query is there."""

    per_token: int
    per_query: int
    block: int

    def of(self, tokens: int) -> int:
        """Bytes of a step of so many tokens."""
        queries = min(tokens, ATTENTION_TOKENS) * self.per_query
        return BASE_BYTES + tokens * self.per_token + max(queries, queries // 2 + self.block)


@dataclass(frozen=True)
class CacheSize:
    """Numbers of a sequence's decode state. per_token: kept for each token of context; read_per_token: of those, what
    a step reads again. fixed: whatever the length, in the cache's dtype; fixed_float32: in float32 always."""

    per_token: float
    read_per_token: float
    fixed: int
    fixed_float32: int


def scored_heads(num_heads: int, index_heads: int | None) -> int:
    """Rows of scores over all entries that a query needs at once; index_heads: of an indexer, None without one."""
    return _COPIES * num_heads if index_heads is None else max(num_heads, index_heads)


def query_block(heads: int, entries: int, chosen: int = 0) -> int:
    """How many queries are attended to at once. heads: rows of scores that each needs; chosen: numbers in the entries
    that are chosen for it."""
    by_scores = SCORE_ELEMENTS // (max(heads, LEAST_HEADS) * max(entries, 1))
    return max(min(QUERY_BLOCK, by_scores, CHOSEN_ELEMENTS // max(chosen, 1)), 1)
