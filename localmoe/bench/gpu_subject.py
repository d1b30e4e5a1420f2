"""The model to measure, on GPUs: a directory as localmoe chat would load it, or one made up in a published shape.

Made-up experts that are not whole layers on GPUs go the way of a model directory: read into slots in RAM, cached in
slots of a GPU. Only the file is not there: what is read are the bytes of one made-up expert again and again. Memory:
every expert once, in RAM or on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from localmoe.bench import synthetic
from localmoe.bench.on_gpus import Slots, Using, bytes_per_token, on_gpus
from localmoe.bench.subject import Computing, Subject
from localmoe.bench.synthetic import Source
from localmoe.device import available_memory
from localmoe.engine import Engine
from localmoe.errors import ResourceError
from localmoe.experts.carried import CarriedExperts, carried
from localmoe.experts.file import File
from localmoe.experts.layout import BLOCK, Layout, Matrix
from localmoe.experts.on_device import DeviceExperts
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.experts.resident import Expert, ExpertSource, ResidentExperts
from localmoe.files import shown
from localmoe.formats import QuantizedTensor
from localmoe.gpu_experts import caches, moe_layers, staging
from localmoe.gpus import recorder
from localmoe.library import EMBEDDED, EMBEDDED_NAME
from localmoe.loader import Loaded, Weights, bytes_held
from localmoe.models.family import build, expert_names
from localmoe.models.model import Model, ModelConfig
from localmoe.models.shares import device_of, shares_of
from localmoe.pager import LEAST_SLOTS, open_model, open_paged
from localmoe.safetensors_io import DTYPES, TensorRef
from localmoe.site import Site
from localmoe.spread import CPU, Share, devices_of
from localmoe.weights import stored

Report = Callable[[str], None]
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


def open_directory(model: Path | None, computing: Computing, using: Using, context: int, report: Report) -> Subject:
    """Load a model directory. context: most tokens of a sequence. Raises ModelError or ResourceError."""
    path, name = model or EMBEDDED, EMBEDDED_NAME if model is None else shown(model.resolve().name)
    config, held = bytes_held(path, computing.dtype, compact=computing.held.compact)
    shares, _tokens = shares_of(config, held, computing.dtype, using.gpus, context)
    slots = None if using.accelerate is None else Slots(using.accelerate)
    opened = open_model(
        path, name, Paging(), dtype=computing.dtype, backend=computing.backend, gpus=using.gpus, gpu_ops=using.ops,
        accelerate=slots, context=context,
        progress=lambda done, total: report(f"loading {name}: {100 * done // total} %"),
    )  # fmt: skip
    return _subject(name, opened, held, shares, computing, using, slots)


def open_synthetic(
    name: str, config: ModelConfig, computing: Computing, using: Using, context: int, report: Report
) -> Subject:
    """Make up a model of a published shape. Raises ResourceError if it has no room."""
    held = synthetic.bytes_held(config, computing.held)
    shares, prompt_tokens = shares_of(config, held, computing.dtype, using.gpus, context)
    report(f"filling {name}")
    weights = synthetic.synthetic_weights(config, computing.held, dense_only=True)
    # One after the other, so that RAM is given back.
    for tensor in list(weights):
        weights[tensor] = weights[tensor].to(device_of(config, shares, tensor))
    slots = None if using.accelerate is None else Slots(using.accelerate)
    devices = devices_of(shares, config.num_layers)
    opened = build(
        config,
        weights.__getitem__,
        dtype=computing.dtype,
        experts=_experts(name, config, (shares, prompt_tokens), computing, using, slots),
        backend=computing.backend,
        sites=[Site(backend=computing.backend) if on == CPU else Site(on, ops=using.ops) for on in devices],
    )
    label = f"{name} synthetic, {config.num_layers} layers, {config.num_experts} experts"
    return _subject(label, opened, held, shares, computing, using, slots)


def _subject(
    name: str, model: Model, held: Mapping[str, int], shares: Sequence[Share], computing: Computing, using: Using,
    slots: Slots | None,
) -> Subject:  # fmt: skip
    cache = carried(model.experts)
    paged = cache if isinstance(cache, PagedExperts) else None
    there = on_gpus(model.config, held, shares, using, slots, paged)
    # What is always read from RAM shows how fast it is.
    pieces = (part for weight in (model.embed, model.head) for part in _parts(stored(weight)))
    here = tuple(piece for piece in pieces if piece.device == CPU)
    engine = Engine(model, recorder(using.gpus, using.graphs))
    return Subject(name, engine, computing.backend, here, bytes_per_token(model.config, held), there)


def _experts(
    name: str, config: ModelConfig, spread: tuple[list[Share], int], computing: Computing, using: Using,
    slots: Slots | None,
) -> ExpertSource:  # fmt: skip
    """Of all layers: on a GPU where it has room for all of a layer's, else in RAM and cached.

    spread: as of shares_of()."""
    shares, prompt_tokens = spread
    sources = synthetic.made_up(config, computing.held, expert_names(config, 0, 0))
    here = {layer: share.gpu.device for share in shares if share.whole for layer in moe_layers(config, share)}
    whole: ExpertSource
    if using.ops is not None:
        whole = DeviceExperts({layer: [sources] * config.num_experts for layer in here}, here, using.ops,
                              config.swiglu_limit)  # fmt: skip
    else:
        whole = ResidentExperts({layer: _moved(sources, on, config) for layer, on in here.items()})
    if len(here) == config.num_moe_layers:
        return CarriedExperts(None, dict.fromkeys(here, whole))
    layout = _layout(config, sources)
    apart = (config.num_moe_layers - len(here)) * config.num_experts
    loaded = Loaded(config, Weights({}), layout, {}, shares, {}, 0, prompt_tokens)
    need = apart * layout.slot_bytes + (0 if slots is None else staging(loaded, layout))
    have = available_memory()
    if have is not None and need > have:
        raise ResourceError(
            f"{apart} experts that are not whole layers on GPUs need {need / 2**30:.1f} GiB of RAM and "
            f"{have / 2**30:.1f} GiB are available; lower --layers or --experts"
        )
    paged = open_paged(
        # A slot for each: a made-up disk would give in no time what has no room.
        name, config, layout, functools.partial(_MadeUp, _bytes_of(sources)), Paging(slots=max(apart, LEAST_SLOTS)),
        dtype=computing.dtype, backend=computing.backend, elsewhere=len(here) * config.num_experts,
        vram=None if slots is None else functools.partial(caches, loaded, layout, slots, "best"),
    )  # fmt: skip
    return CarriedExperts(paged, dict.fromkeys(here, whole), prompt_tokens)


def _moved(sources: Sequence[Source], device: torch.device, config: ModelConfig) -> list[Expert]:
    """For torch."""
    moved = [[weight.to(device) for weight in sources] for _ in range(config.num_experts)]
    return [Expert(w1, w2, w3, config.swiglu_limit) for w1, w2, w3 in moved]


def _parts(source: Source) -> tuple[Tensor, ...]:
    return (source.data, source.scale) if isinstance(source, QuantizedTensor) else (source,)


def _bytes_of(sources: Sequence[Source]) -> bytes:
    """An expert as a file would have it, up to a whole block."""
    raw = b"".join(bytes(part.contiguous().view(torch.uint8).numpy()) for s in sources for part in _parts(s))
    return raw + bytes(-len(raw) % BLOCK)


def _layout(config: ModelConfig, sources: Sequence[Source]) -> Layout:
    """Of experts that follow one another, each from a whole block on."""
    parts = [part for source in sources for part in _parts(source)]
    size = len(_bytes_of(sources))

    def locate(layer: int, expert: int) -> list[TensorRef]:
        at, refs = (layer * config.num_experts + expert) * size, []
        for part in parts:
            refs.append(TensorRef(Path("made up"), at, part.nbytes, _SPELLED[part.dtype], tuple(part.shape)))
            at += part.nbytes
        return refs

    w1, w2, w3 = (_matrix(source) for source in sources)
    return Layout([(w1, w2, w3)] * config.num_moe_layers, config.num_experts, locate)


def _matrix(source: Source) -> Matrix:
    if isinstance(source, Tensor):
        return Matrix((source.shape[0], source.shape[1]), source.dtype)
    return Matrix(source.shape, source.data.dtype, source.format, source.scale.dtype)


class _MadeUp(File):
    """A file of experts that are all alike, in memory. Its reads take the time of a copy."""

    def __init__(self, expert: bytes, number: int) -> None:
        self._expert = memoryview(expert)

    def read(self, target: memoryview, offset: int, needed: int) -> None:
        """See File.read: within one expert."""
        at = offset % len(self._expert)
        target[:needed] = self._expert[at : at + needed]

    def close(self) -> None:
        """There is nothing to close."""


@torch.inference_mode()
def touch(subject: Subject, report: Report) -> None:
    """Have every expert that is not a whole layer on a GPU read into RAM, so that no token waits for a disk."""
    there, model = subject.gpus, subject.engine.model
    if there is None or there.cache is None:
        return
    count = model.config.num_experts
    hidden = torch.zeros(count, model.config.hidden_size)
    for layer in there.apart:
        report(f"reading the experts of layer {layer}")
        there.cache.prepare(count)
        there.cache.apply(layer, hidden, torch.arange(count)[:, None], torch.ones(count, 1))
