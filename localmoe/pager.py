"""From a checkpoint's tensors to experts that are read from it on demand: where they lie, and how many are held."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from localmoe.backend import Backend
from localmoe.device import resident_memory
from localmoe.errors import UsageError
from localmoe.experts.carried import CarriedExperts
from localmoe.experts.file import File
from localmoe.experts.governor import Governor, Room
from localmoe.experts.layout import Layout
from localmoe.experts.pack import fingerprint, open_pack
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.experts.policies import POLICIES
from localmoe.experts.ram import RamTier
from localmoe.experts.residency import Residency, guess_slots
from localmoe.experts.resident import ExpertSource
from localmoe.experts.slots import NativeSlots, ObservedSlots, SlotExperts, TorchSlots
from localmoe.experts.trace import Header, Recorder, TracedExperts
from localmoe.experts.vram import VramTier
from localmoe.experts.warm import check_profile, warm
from localmoe.files import shown
from localmoe.gpu_experts import Accelerate, caches, staging, whole_layers
from localmoe.loader import Loaded, Progress, load_model
from localmoe.memory import SlotMemory
from localmoe.models.family import build, expert_names
from localmoe.models.model import Model, ModelConfig
from localmoe.ops import DeviceOps
from localmoe.site import Site
from localmoe.spread import CPU, Gpu, devices_of
from localmoe.step_size import prefill_tokens, streamed_tokens
from localmoe.weights import Observer

# Experts held at least: one that is computed and one that is read.
LEAST_SLOTS = 2


def open_model(
    path: Path,
    name: str,
    paging: Paging,
    *,
    dtype: torch.dtype,
    quantize_kv: bool = False,
    backend: Backend | None = None,
    gpus: Sequence[Gpu] = (),
    gpu_ops: DeviceOps | None = None,
    accelerate: Accelerate | None = None,
    context: int | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Model:
    """A model directory, bound; its experts in memory if they fit, else paged. name: for the trace.

    backend: computes what is on the CPU. gpus: what to put layers on, computed by gpu_ops (None: torch); accelerate
    makes what caches experts there where only some fit. observer: shown what goes into matrices, see
    models.family.build.
    Raises ModelError for a bad directory, ResourceError if not even the rest of it fits."""
    check_paging(paging)
    loaded = load_model(
        path,
        dtype,
        compact=backend is not None,
        experts="auto" if paging.slots is None else "paged",
        ram=paging.ram,
        gpus=gpus,
        context=context,
        progress=progress,
    )
    config = loaded.config
    _check_options(paging, loaded)
    devices = devices_of(loaded.shares, config.num_layers)
    sites = [Site(backend=backend) if device == CPU else Site(device, ops=gpu_ops) for device in devices]
    if paging.warm is not None:
        check_profile(paging.warm, config.num_moe_layers, config.num_experts)
    experts: ExpertSource | None = None
    staged = 0
    wrap: Callable[[ExpertSource], ExpertSource] | None = None
    if loaded.layout is not None:
        layout, files = loaded.layout, loaded.files
        if paging.pack is not None:
            pack = open_pack(paging.pack)
            layout, files = pack.layout(layout, fingerprint(files)), pack.files
        opening = functools.partial(_open, layout, files)
        vram = None if accelerate is None else functools.partial(caches, loaded, layout, accelerate, paging.policy)
        staged = 0 if accelerate is None else staging(loaded, layout)
        experts = open_paged(
            name, config, layout, opening, paging,
            dtype=dtype, backend=backend, context=context, observer=observer, vram=vram,
            staged=staged, elsewhere=len(loaded.on_gpus) // 3,
        )  # fmt: skip
    elif paging.trace is not None:
        expert_bytes = sum(loaded.weights.get(weight).nbytes for weight in expert_names(config, 0, 0))
        recorder = Recorder(paging.trace, _header(name, config, expert_bytes))
        wrap = functools.partial(TracedExperts, recorder=recorder)
    if gpus:
        prompt_tokens = loaded.prompt_tokens if accelerate is not None else None
        if prompt_tokens is not None and experts is not None:
            prompt_tokens = _prompt_tokens(config, prompt_tokens, paging, staged)
        experts = CarriedExperts(experts, whole_layers(path, loaded, gpu_ops, progress), prompt_tokens)
    return build(
        config,
        loaded.weights.get,
        dtype=dtype,
        experts=experts,
        wrap=wrap,
        quantize_kv=quantize_kv,
        backend=backend,
        sites=sites,
        observer=observer,
    )


def _prompt_tokens(config: ModelConfig, on_gpus: int, paging: Paging, staged: int) -> int:
    """Tokens of a prompt in one step: as many as GPUs have room for, if RAM has too. staged: as of open_paged()."""
    ordinary = prefill_tokens(config.expert_weights)
    room = Room.of(paging.ram, config.work.of(ordinary) + staged)
    if room is None:
        return on_gpus
    return streamed_tokens(config.work, ordinary, on_gpus, room.budget - room.working - resident_memory())


def _check_options(paging: Paging, loaded: Loaded) -> None:
    """Raises UsageError for what has no effect, or half of one, where layers have all experts on GPUs."""
    options = "--trace-routing", "--warm-start", "--pack", "--expert-slots"
    for option, value in zip(options, (paging.trace, paging.warm, paging.pack, paging.slots), strict=True):
        if value is not None and loaded.on_gpus:
            raise UsageError(
                f"{option} is about experts in RAM and on disk, but some layers have all of theirs on GPUs; leave it "
                "out, or lower --vram"
            )


def check_paging(paging: Paging) -> None:
    """Raises UsageError for values out of range."""
    if paging.policy not in POLICIES:
        raise UsageError(f"policy is {shown(paging.policy)}, expected one of {', '.join(POLICIES)}")
    if paging.slots is not None and (paging.slots < LEAST_SLOTS or paging.ram is not None):
        problem = "and ram is given too" if paging.ram is not None else f"expected at least {LEAST_SLOTS}"
        raise UsageError(f"slots is {paging.slots}, {problem}")


def open_paged(
    name: str,
    config: ModelConfig,
    layout: Layout,
    open_file: Callable[[int], File],
    paging: Paging,
    *,
    dtype: torch.dtype,
    backend: Backend | None,
    context: int | None = None,
    observer: Observer | None = None,
    vram: Callable[[SlotMemory], Mapping[int, VramTier]] | None = None,
    staged: int = 0,
    elsewhere: int = 0,
) -> PagedExperts:
    """Make room for experts and begin to serve them. Call it when everything else of the model is in memory.

    open_file(number): a file of the layout. vram: makes the caches of GPUs over the slots in RAM; staged: bytes of RAM
    that they will take besides. elsewhere: experts that nobody will ask for here.
    Raises ResourceError if too few experts fit."""
    everywhere = config.num_moe_layers * config.num_experts
    total = everywhere - elsewhere
    working = config.work.of
    room = Room.of(paging.ram, working(1) + staged)
    slots = paging.slots
    if slots is None:
        slots = total
        if room is not None:
            # A prompt must fit as well, with what is left of the slots then.
            chunk = min(prefill_tokens(config.expert_weights), context or config.max_position_embeddings)
            replace(room, working=working(chunk) + staged).slots(layout.slot_bytes, LEAST_SLOTS)
            slots = room.slots(layout.slot_bytes, LEAST_SLOTS)
    # So many would fit, whether there are so many experts or not.
    fit, slots = slots, min(slots, total)
    guesses = guess_slots(slots) if paging.guess and slots < total else 0
    if paging.slots is None and slots < total:
        slots -= guesses
    table = Residency(slots, config.num_moe_layers, config.num_experts, POLICIES[paging.policy](everywhere))
    # Before a recorder may replace the same file.
    recorded = [] if paging.warm is None else warm(table, paging.warm)
    memory = SlotMemory(slots + guesses, layout.slot_bytes)
    recorder = None
    if paging.trace is not None:
        header = _header(name, config, layout.expert_bytes, paging.prefetch)
        warm_start = paging.warm is not None
        recorder = Recorder(paging.trace, replace(header, capacity=slots, policy=paging.policy, warm=warm_start))
    experts = _computing(layout, memory, config, dtype, backend, observer)
    ram = RamTier(layout, memory, table, experts, open_file)
    ram.fill(recorded)
    most = max(fit - guesses, slots)
    return PagedExperts(
        ram,
        experts,
        vram=None if vram is None else vram(memory),
        governor=None if paging.slots is not None else Governor(room, layout.slot_bytes, most, working),
        recorder=recorder,
        prefetch=paging.prefetch,
    )


def _computing(
    layout: Layout, memory: SlotMemory, config: ModelConfig, dtype: torch.dtype, backend: Backend | None,
    observer: Observer | None,
) -> SlotExperts:  # fmt: skip
    if observer is not None:
        names = functools.partial(expert_names, config)
        return ObservedSlots(
            memory, layout.kinds, config.swiglu_limit, dtype, backend=backend, observer=observer, names=names
        )
    if backend is None:
        return TorchSlots(memory, layout.kinds, config.swiglu_limit, dtype)
    return NativeSlots(memory, layout.kinds, config.num_experts, config.swiglu_limit, backend)


def _open(layout: Layout, files: Mapping[Path, tuple[int, tuple[int, int]]], number: int) -> File:
    path = layout.files[number]
    return File(path, *files[path])


def _header(name: str, config: ModelConfig, expert_bytes: int, prefetch: bool = True) -> Header:
    """The first line of a trace."""
    c = config
    hash_layers = c.num_hash_layers if prefetch else 0
    return Header(name, c.num_moe_layers, c.num_experts, c.experts_per_token, hash_layers, expert_bytes)
