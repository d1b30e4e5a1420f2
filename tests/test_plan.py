"""Plans by hand: a model of round numbers, so that every byte and second can be checked by multiplying."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from localmoe.bench.shapes import CONFIGS
from localmoe.device import budget_for, unseen
from localmoe.errors import ResourceError, UsageError
from localmoe.experts.residency import guess_slots
from localmoe.experts.vram import CACHED_LEAST, SPARE, staging_bytes
from localmoe.models.sizes import sizes_of
from localmoe.placement import BASE_BYTES, GPU_BASE_BYTES, Budget, Placement, place
from localmoe.plan import TYPICAL_HITS, Hits, Rates, distinct, hit_rate, plan
from localmoe.step_size import WorkBytes
from tests.round_model import GB, MB, MODEL

WORK = MODEL.work.of(512)
# With a sixteenth in reserve.
KV = MB + 4096 * 1000 * 17 // 16
LEAST = BASE_BYTES + WORK + GB + KV
# Multiplying takes no time, so that bytes are all there is.
RATES = Rates(dram=10e9, disk=1e9, flops=1e30, seconds_per_layer=0.001)
ON_GPU = replace(RATES, pcie=5e9, hbm=100e9, gpu_flops=1e30)


def ram_for(experts: int) -> int:
    """With slots for guesses, and what the system takes."""
    slots = next(n for n in range(experts, 300) if n >= 200 or n - guess_slots(n) == experts)
    need = LEAST + slots * 10 * MB
    return need + need // 63 + 1


def test_every_byte_has_a_place() -> None:
    """Fails if an expert would be counted in two tiers or in none, or RAM be promised twice."""
    p = place(MODEL, Budget(ram_for(50) + 5 * MB))
    assert (p.ram_slots, p.vram_slots, p.disk_experts, p.short) == (50, 0, 150, 0)
    assert p.base + p.work + p.prompt_work + p.tables + p.dense_ram + p.kv_ram == LEAST + unseen(ram_for(50) + 5 * MB)
    assert p.prompt_slots == 50
    assert (p.gpu_base, p.dense_vram, p.kv_vram, p.vram_spare, p.staging) == (0, 0, 0, 0, 0)


def test_vram_takes_what_every_token_needs_first_then_experts() -> None:
    """Fails if hot experts would push the dense weights out, or an expert in VRAM take RAM too."""
    vram = GPU_BASE_BYTES + MODEL.work.of(4096) + KV + 900 * MB + (30 + SPARE) * 10 * MB
    p = place(MODEL, Budget(ram_for(200), vram))
    assert (p.dense_vram, p.kv_vram, p.vram_slots, p.vram_spare) == (900 * MB, KV, 30, SPARE)
    assert (p.dense_ram, p.kv_ram, p.ram_slots, p.disk_experts) == (0, 0, 170, 0)
    # The tables stay with the CPU, which looks tokens up.
    assert p.tables == 100 * MB


def test_what_is_on_its_way_to_a_gpu_has_a_place() -> None:
    """As the VRAM tier takes it. Fails if slots for it are promised to experts, or its buffers in RAM to others."""

    def placed(slots: int, ram: int) -> Placement:
        return place(MODEL, Budget(ram, GPU_BASE_BYTES + WORK + KV + 900 * MB + slots * 10 * MB, context=512))

    of_slots = {slots: placed(slots, 8 * GB) for slots in (0, 1, SPARE, SPARE + 1, 199, 200, 250)}
    assert {slots: (p.vram_slots, p.vram_spare) for slots, p in of_slots.items()} == {
        0: (0, 0), 1: (0, 0), SPARE: (0, 0), SPARE + 1: (1, SPARE), 199: (191, SPARE), 200: (200, 0), 250: (200, 0),
    }  # fmt: skip
    # Two pieces of 4 MiB, and 10 MB rounded up.
    assert staging_bytes(10 * MB) == (2 * 4 + SPARE * 16) << 20
    assert {slots for slots, p in of_slots.items() if p.staging == staging_bytes(10 * MB)} == {SPARE + 1, 199}
    assert {p.staging for slots, p in of_slots.items() if slots not in (SPARE + 1, 199)} == {0}
    # Of RAM, it takes the place of experts.
    p = placed(SPARE + 1, 2 * GB)
    used = p.base + p.work + p.staging + p.tables + p.dense_ram + p.kv_ram + p.ram_slots * 10 * MB
    free = 2 * GB - used - guess_slots(p.ram_slots + guess_slots(p.ram_slots)) * 10 * MB
    assert p.ram_slots < 190 and 0 <= free < 20 * MB


def test_steps_are_longer_where_experts_cross_to_a_gpu_for_each() -> None:
    """A token takes 20 kB. Fails if the plan is of other steps than the engine takes, or they take more than a quarter
    of what a GPU has beyond the slots that it needs, or than RAM has."""
    model = replace(MODEL, work=WorkBytes(20_000, 400, 128 << 20))

    def tokens(slots: int, ram: int = 8 * GB, context: int = 4096) -> int:
        vram = GPU_BASE_BYTES + model.work.of(512) + KV + 900 * MB + slots * 10 * MB
        return place(model, Budget(ram, vram, context)).prefill_tokens

    # 512 more take as much as 1.02 slots, which is a quarter of 4.1; and so on.
    of_slots = 1, CACHED_LEAST + 4, CACHED_LEAST + 5, CACHED_LEAST + 12, CACHED_LEAST + 13, CACHED_LEAST + 29
    assert [tokens(slots) for slots in of_slots] == [512, 512, 1024, 1024, 2048, 4096]
    assert place(model, Budget(8 * GB, GPU_BASE_BYTES + model.work.of(4096) + KV + 1900 * MB)).vram_slots == 92
    # Where all are there, nothing crosses.
    assert (tokens(199), tokens(200), tokens(0)) == (4096, 512, 512)
    assert (tokens(60, context=2000), tokens(60, context=300)) == (2000, 300)
    # In RAM are the tables, and a little room for experts.
    taken = BASE_BYTES + model.work.of(512) + staging_bytes(10 * MB) + 100 * MB
    assert [tokens(60, budget_for(taken + room * MB)) for room in (35, 45, 85, 125)] == [512, 1024, 1024, 2048]


def test_a_small_gpu_takes_a_part_of_the_weights() -> None:
    """Fails if a GPU that cannot hold all dense weights would hold none of them, or experts before them."""
    p = place(MODEL, Budget(ram_for(10), GPU_BASE_BYTES + WORK + KV + 400 * MB))
    assert (p.dense_vram, p.dense_ram, p.vram_slots) == (400 * MB, 500 * MB, 0)
    nothing = place(MODEL, Budget(ram_for(10), 100 * MB))
    assert (nothing.gpu_base, nothing.dense_vram, nothing.kv_vram, nothing.vram_slots) == (0, 0, 0, 0)


def test_more_memory_than_the_model_needs_stays_free() -> None:
    p = place(MODEL, Budget(100 * GB, 100 * GB))
    assert (p.vram_slots, p.ram_slots, p.disk_experts) == (200, 0, 0)
    assert place(MODEL, Budget(100 * GB)).ram_slots == 200


def test_the_shortage_is_exact() -> None:
    """Fails if the RAM that is asked for would not suffice, or a little less would."""
    budget = Budget(ram_for(2))
    assert place(MODEL, budget).short == 0
    less = replace(budget, ram=budget.ram - 10)
    short = place(MODEL, less).short
    assert 0 < short <= 10
    assert place(MODEL, replace(less, ram=less.ram + short)).short == 0
    assert place(MODEL, replace(less, ram=less.ram + short - 1)).short == 1


def test_the_refusal_says_what_is_missing_and_what_helps() -> None:
    """Fails if a user could not tell what to change."""
    with pytest.raises(ResourceError, match=r"round needs 1\.74 GiB .*2 experts 0\.02\), 1\.00 are given: short by "
                       r"0\.76 GiB; raise --ram by 0\.76 GiB, or choose"):  # fmt: skip
        plan(MODEL, Budget(1 << 30), RATES)
    long = Budget(ram_for(2), context=100_000)
    with pytest.raises(ResourceError, match="or lower --ctx, or choose"):
        plan(MODEL, long, RATES)


@pytest.mark.parametrize("change", [{"context": 0}, {"batch": 0}, {"context": 100_001}])
def test_a_budget_without_sense_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        plan(MODEL, replace(Budget(10 * GB), **change), RATES)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.06, 0.14, 0.2, 0.5, 0.999, 1.0])
def test_hit_rates_stay_between_none_and_all(share: float) -> None:
    """Fails if more memory could mean fewer hits, or all experts in memory not mean a hit each time."""
    assert hit_rate(share, "uniform") == share
    assert 0 <= hit_rate(share, "typical") <= 1
    assert hit_rate(share, 0.63) == (1.0 if share == 1 else 0.63)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(TYPICAL_HITS))


def test_typical_hits_pass_through_the_published_points() -> None:
    for share, hits in TYPICAL_HITS:
        assert hit_rate(share, "typical") == pytest.approx(hits)
    assert hit_rate(0.10, "typical") == pytest.approx(0.30)


def test_a_batch_needs_the_union_of_its_experts() -> None:
    """Fails if a batch would read an expert once for each token, or as many as one token does."""
    assert distinct(20, 2, 1) == pytest.approx(2)
    assert distinct(20, 2, 2) == pytest.approx(20 * (1 - 0.9**2))
    assert distinct(20, 2, 10_000) == pytest.approx(20)
    assert distinct(0, 0, 5) == 0
    # More uses than experts: every one, not more.
    assert distinct(1, 2, 3) == 1


def test_a_token_takes_what_its_bytes_take() -> None:
    """Half of the experts in RAM: 10 of 20 uses hit. A layer's dense part takes 9 ms and the cache; an expert
    10 ms from disk, of which 7 are foreseen, and 1 ms from memory. Missing none of two takes 2 ms more, missing one
    10 - 7 + 1, and missing both 20 less the dense part + 2; 10 ms of Python."""
    found = plan(MODEL, Budget(ram_for(100)), RATES, "uniform")
    step = found.decode
    kv = 4096 * 500 / 10e9
    assert found.hits == 0.5
    assert step.parts["disk"] == pytest.approx(0.1)
    assert step.parts["dram"] == pytest.approx(0.09 + kv + 0.02)
    assert step.parts["python"] == pytest.approx(0.01)
    assert (step.parts["pcie"], step.parts["hbm"]) == (0, 0)
    dense = 0.009 + kv / 10
    layer = dense + (0.002 + 2 * 0.004 + (0.020 - dense + 0.002)) / 4
    assert step.seconds == pytest.approx(0.01 + 10 * layer)
    assert step.tokens_per_s == pytest.approx(1 / step.seconds)
    assert step.bound == "dram"


def test_a_model_in_memory_does_not_wait_for_the_disk() -> None:
    found = plan(MODEL, Budget(100 * GB), RATES, 0.1)
    assert (found.hits, found.decode.parts["disk"], found.prefill.parts["disk"]) == (1, 0, 0)


def test_vram_reads_at_its_own_rate() -> None:
    """A quarter of the experts in VRAM, a quarter in RAM: 5 uses each of 20, and all dense weights in VRAM."""
    vram = GPU_BASE_BYTES + MODEL.work.of(4096) + KV + 900 * MB + (50 + SPARE) * 10 * MB
    need = BASE_BYTES + WORK + staging_bytes(10 * MB) + 100 * MB + 53 * 10 * MB
    ram = need + need // 63 + 1
    found = plan(MODEL, Budget(ram, vram), ON_GPU, "uniform")
    assert (found.hits, found.vram_hits) == (0.5, 0.25)
    assert found.decode.parts["hbm"] == pytest.approx((900 * MB + 4096 * 500 + 50 * MB) / 100e9)
    # RAM is read by the CPU, because PCIe is slower: 5 hits and 10 that came from disk.
    assert found.decode.parts["dram"] == pytest.approx(150 * MB / 10e9)
    assert found.decode.parts["pcie"] == 0


def test_a_chunk_goes_over_pcie_where_the_cpu_multiplies_slowly() -> None:
    """Fails if prefill with a GPU would be held to the arithmetic of the CPU."""
    budget = Budget(ram_for(200), GPU_BASE_BYTES + WORK + KV + 900 * MB)
    prefill = plan(MODEL, budget, replace(ON_GPU, flops=1e6), "uniform").prefill
    assert prefill.parts["pcie"] == pytest.approx(2 * GB / 5e9)
    assert prefill.parts["dram"] == 0


def test_a_gpu_that_is_not_to_be_used_has_no_part() -> None:
    found = plan(MODEL, Budget(ram_for(50)), replace(ON_GPU, flops=1e6), "uniform")
    assert (found.prefill.parts["pcie"], found.rates.hbm) == (0, None)


def test_a_chunk_reads_what_is_not_there_once() -> None:
    """Fails if a prompt would read its experts for every token, or only those of one."""
    found = plan(MODEL, Budget(ram_for(50)), RATES, "typical")
    assert found.prefill.tokens == 512
    assert found.prefill.parts["disk"] == pytest.approx(1.5, rel=1e-3)
    assert plan(MODEL, Budget(ram_for(50), context=100), RATES).prefill.tokens == 100


def test_arithmetic_can_be_the_bound() -> None:
    """Every weight is multiplied twice with each token, so a chunk costs 512 times what a token does."""
    found = plan(MODEL, Budget(100 * GB), replace(RATES, flops=1e9), "uniform")
    assert found.decode.parts["compute"] == pytest.approx(0.01)
    assert found.prefill.parts["compute"] == pytest.approx(5.12)
    assert found.prefill.bound == "compute"


@pytest.mark.parametrize("hits", ["uniform", "typical", 0.63])
@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_more_memory_is_never_slower(name: str, hits: Hits) -> None:
    """Fails if a plan would rise and fall with the budget."""
    sizes = sizes_of(CONFIGS[name], name)
    by_ram = [Budget(ram * GB) for ram in (32, 64, 128, 256, 1024)]
    by_vram = [Budget(64 * GB, vram * GB) for vram in (0, 8, 32, 80)]
    for budgets in (by_ram, by_vram):
        # Rounded, because the same sum in another order is another float.
        speeds = [round(plan(sizes, budget, ON_GPU, hits).decode.tokens_per_s, 9) for budget in budgets]
        assert speeds == sorted(speeds)
        # With a hit rate that is given, the disk alone may decide.
        assert speeds[0] < speeds[-1] or isinstance(hits, float)


def test_a_larger_batch_gives_more_tokens_in_longer_steps() -> None:
    steps = [plan(MODEL, Budget(ram_for(150), batch=batch), RATES).decode for batch in (1, 4, 16)]
    assert [step.tokens for step in steps] == [1, 4, 16]
    assert [s.seconds for s in steps] == sorted(s.seconds for s in steps)
    assert [s.tokens_per_s for s in steps] == sorted(s.tokens_per_s for s in steps)


def test_rates_that_are_known_are_not_assumed() -> None:
    assert replace(RATES, hbm=7.0).with_assumed_gpu() == replace(RATES, pcie=52e9, hbm=7.0, gpu_flops=100e12)
