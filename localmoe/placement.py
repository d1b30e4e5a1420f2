"""Where a model's bytes would go: VRAM, RAM and disk, filled in the order that helps most.

Owns that order. Knows sizes and budgets only: no files, no torch, no hardware."""

from __future__ import annotations

from dataclasses import dataclass

from localmoe.device import budget_for, unseen
from localmoe.errors import ResourceError, UsageError
from localmoe.experts.residency import guess_slots
from localmoe.experts.vram import CACHED_LEAST, SPARE, staging_bytes
from localmoe.models.shares import PLANNED_TOKENS
from localmoe.models.sizes import ModelSizes
from localmoe.spread import GPU_BASE_BYTES
from localmoe.step_size import streamed_tokens

GIB = 1 << 30
# Python with torch loaded: 0.5 to 0.6 GiB resident.
BASE_BYTES = 6 * GIB // 10


@dataclass(frozen=True)
class Budget:
    """ram, vram: bytes localmoe may take. context: tokens of each of `batch` sequences, prompt and reply together."""

    ram: int
    vram: int = 0
    context: int = 4096
    batch: int = 1


@dataclass(frozen=True)
class Placement:
    """Bytes in each tier, and experts by their number. tables: embedding and hash tables, looked up by the CPU.

    prefill_tokens: of a prompt that are computed at once. prompt_work: what that takes besides; experts are given up
    for it, prompt_slots are left meanwhile. vram_spare: slots for experts on their way to the GPU; staging: RAM for it.
    short: bytes of RAM that are missing; with any, the rest is what would be needed."""

    base: int
    work: int
    prefill_tokens: int
    prompt_work: int
    prompt_slots: int
    staging: int
    tables: int
    dense_ram: int
    kv_ram: int
    ram_slots: int
    gpu_base: int
    dense_vram: int
    kv_vram: int
    vram_slots: int
    vram_spare: int
    disk_experts: int
    short: int


def place(sizes: ModelSizes, budget: Budget) -> Placement:
    """Fill VRAM, then RAM: what a step always needs first, then experts, the hottest in VRAM; the rest stays on disk.

    An expert in VRAM takes no RAM. Raises UsageError for a budget that makes no sense."""
    check_budget(sizes, budget)
    placed = _place(sizes, budget, min(sizes.prefill_tokens, budget.context))
    tokens = _long_steps(sizes, budget, placed)
    return placed if tokens == placed.prefill_tokens else _place(sizes, budget, tokens)


def _long_steps(sizes: ModelSizes, budget: Budget, placed: Placement) -> int:
    """Tokens of a prompt in one step: more where experts cross to a GPU for each, see models.shares and pager."""
    ordinary, length = sizes.prefill_tokens, min(budget.context, PLANNED_TOKENS)
    if placed.short or length <= ordinary or placed.vram_slots + SPARE <= CACHED_LEAST or not placed.vram_spare:
        return placed.prefill_tokens
    in_vram = (placed.vram_slots + SPARE - CACHED_LEAST) * sizes.expert_bytes
    tokens = streamed_tokens(sizes.work, ordinary, length, in_vram)
    taken = placed.base + placed.work + placed.prompt_work + placed.staging
    taken += placed.tables + placed.dense_ram + placed.kv_ram
    return streamed_tokens(sizes.work, ordinary, tokens, budget.ram - taken)


def _place(sizes: ModelSizes, budget: Budget, prefill_tokens: int) -> Placement:
    work = sizes.work.of(budget.batch)
    prompt_work = max(sizes.work.of(prefill_tokens) - work, 0)
    kv = budget.batch * sizes.kv_bytes(budget.context)
    dense, tables = sizes.dense_bytes_per_token, sizes.dense_bytes - sizes.dense_bytes_per_token
    gpu_base = GPU_BASE_BYTES + work + prompt_work
    room = max(budget.vram - gpu_base, 0)
    kv_vram = min(kv, room)
    dense_vram = min(dense, room - kv_vram)
    fit = (room - kv_vram - dense_vram) // sizes.expert_bytes
    # Where all are there, none is ever on its way.
    vram_spare = SPARE if SPARE < fit < sizes.experts else 0
    vram_slots = sizes.experts if fit >= sizes.experts else max(fit - SPARE, 0)
    staging = staging_bytes(sizes.expert_bytes) if vram_spare else 0
    left = sizes.experts - vram_slots
    base = BASE_BYTES + unseen(budget.ram)
    taken = base + work + staging + tables + dense - dense_vram + kv - kv_vram
    # What is read from disk passes through RAM, so one token's experts of a layer need room there.
    least = min(sizes.top_k, left)
    # Of more RAM, a part is unseen too.
    needed = budget_for(taken - unseen(budget.ram) + prompt_work + least * sizes.expert_bytes)
    short = max(needed - budget.ram, 0)

    def slots(nbytes: int) -> int:
        """Experts that fit, without those that are set apart for guesses."""
        count = nbytes // sizes.expert_bytes
        return left if count >= left else max(count - guess_slots(count), least)

    ram_slots = least if short else slots(budget.ram - taken)
    prompt_slots = least if short else min(slots(budget.ram - taken - prompt_work), ram_slots)
    return Placement(
        base=base,
        work=work,
        prefill_tokens=prefill_tokens,
        prompt_work=prompt_work,
        prompt_slots=prompt_slots,
        staging=staging,
        tables=tables,
        dense_ram=dense - dense_vram,
        kv_ram=kv - kv_vram,
        ram_slots=ram_slots,
        gpu_base=gpu_base if room else 0,
        dense_vram=dense_vram,
        kv_vram=kv_vram,
        vram_slots=vram_slots,
        vram_spare=vram_spare,
        disk_experts=left - ram_slots,
        short=short,
    )


def check_budget(sizes: ModelSizes, budget: Budget) -> None:
    """Raises UsageError for a budget that makes no sense."""
    for name in ("context", "batch"):
        if getattr(budget, name) < 1:
            raise UsageError(f"{name} is {getattr(budget, name)}, expected at least 1")
    if budget.context > sizes.context:
        raise UsageError(f"a context of {budget.context} tokens is more than the {sizes.context} of {sizes.name}")


def refuse(sizes: ModelSizes, budget: Budget, placed: Placement) -> None:
    """Raises ResourceError, saying what is missing and what would help, for a placement that is short of RAM."""
    if not placed.short:
        return
    needs = {
        "dense weights": placed.dense_ram + placed.tables,
        "KV cache": placed.kv_ram,
        "working memory": placed.work + placed.prompt_work,
        "buffers for the GPU": placed.staging,
        "Python and the system": placed.base,
        f"{placed.ram_slots} experts": placed.ram_slots * sizes.expert_bytes,
    }
    listed = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in needs.items() if nbytes)
    advice = f"raise --ram by {_up(placed.short)} GiB"
    # The window and the like stay, however short the context.
    if placed.kv_ram - budget.batch * sizes.kv_fixed_bytes > placed.short:
        advice += " or lower --ctx"
    raise ResourceError(
        f"{sizes.name} needs {sum(needs.values()) / GIB:.2f} GiB of RAM ({listed}), {budget.ram / GIB:.2f} are given: "
        f"short by {_up(placed.short)} GiB; {advice}, or choose a smaller model"
    )


def _up(nbytes: int) -> str:
    """GiB, rounded up so that it suffices."""
    return f"{-(-nbytes * 100 // GIB) / 100:.2f}"
