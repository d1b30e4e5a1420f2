"""Which GPUs a model is to use, and what computes on them.

The only place that asks torch what GPUs there are for a model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from localmoe import kernel_choice
from localmoe.backend import KernelChoice
from localmoe.cuda_graphs import CudaRecorder
from localmoe.errors import ResourceError, UsageError
from localmoe.files import shown
from localmoe.gpu_experts import Accelerate
from localmoe.ops import DeviceOps
from localmoe.spread import Gpu
from localmoe.tape import Recorder

# The least that Triton's bfloat16 products are compiled for.
_CAPABILITY = (8, 0)
# Of a GPU's free memory, for what others and torch's own allocator take: a share of it.
_KEPT_FREE = 1 / 16


def find(device: str, vram: Sequence[int] | None) -> list[Gpu]:
    """device: cpu, cuda (all GPUs), cuda:N, or several of these with commas. vram: bytes to use, of each GPU or, if it
    is one number, of every GPU; None for nearly all that is free.

    Raises UsageError for what is none of these, ResourceError for a GPU that is not there."""
    if device == "cpu":
        if vram is not None:
            raise UsageError("vram is given and device is cpu, which has none; leave vram out or give a GPU")
        return []
    devices = _devices(device)
    if vram is not None and len(vram) not in (1, len(devices)):
        raise UsageError(f"vram has {len(vram)} sizes, expected one, or one for each of {len(devices)} GPUs")
    found = []
    for i, each in enumerate(devices):
        if torch.cuda.get_device_capability(each) < _CAPABILITY:
            raise ResourceError(f"{each} is {torch.cuda.get_device_name(each)}, older than our kernels can use")
        free = int(torch.cuda.mem_get_info(each)[0] * (1 - _KEPT_FREE))
        asked = free if vram is None else vram[i % len(vram)]
        if asked > free:
            raise ResourceError(f"of {each} {_gib(free)} can be used, {_gib(asked)} are asked for; lower --vram")
        found.append(Gpu(each, asked, rate=_memory_rate(each)))
    return found


def _memory_rate(device: torch.device) -> float:
    """Bytes per second by the memory's clock, in kHz, and the width of its bus, in bits; two for each cycle."""
    properties = torch.cuda.get_device_properties(device)
    return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8


def _devices(device: str) -> list[torch.device]:
    names = device.split(",")
    wrong = [name for name in names if name != "cuda" and not (name[:5] == "cuda:" and name[5:].isdecimal())]
    if wrong or ("cuda" in names and len(names) > 1):
        raise UsageError(f"device is {shown(device)}, expected cpu, cuda, cuda:0, or several such as cuda:0,cuda:1")
    count = torch.cuda.device_count()
    if not count:
        raise ResourceError(f"device is {device}, but torch {torch.__version__} finds no GPU; see localmoe doctor")
    numbers = list(range(count)) if names == ["cuda"] else [int(name[5:]) for name in names]
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"device is {shown(device)}, which names a GPU twice")
    if max(numbers) >= count:
        raise ResourceError(f"device is {device}, but there are {count} GPUs, counted from 0")
    return [torch.device("cuda", number) for number in numbers]


def free_memory(gpus: Sequence[Gpu]) -> int | None:
    """Bytes free on the fullest of these GPUs; None for none."""
    return min((torch.cuda.mem_get_info(gpu.device)[0] for gpu in gpus), default=None)


def kernels_for(gpus: Sequence[Gpu], kernels: KernelChoice) -> tuple[DeviceOps | None, Accelerate | None]:
    """What computes on GPUs, None for torch, and what caches experts there. strict: products in float32; auto: of nf4
    matrices by bitsandbytes where it is installed and faster, else by our kernels.

    Raises ResourceError where triton is not installed."""
    if kernels == "reference" or not gpus:
        return None, None
    try:
        from localmoe.experts.accelerator import TritonAccelerator
        from localmoe.kernels.triton.ops import TritonOps
    except ImportError as error:
        raise ResourceError(f"GPUs need triton ({error}); pip install 'localmoe[gpu]', or kernels=reference") from None
    exact = kernels == "strict"
    choice = kernel_choice.installed() if kernels == "auto" else None
    return TritonOps(exact=exact, choice=choice), functools.partial(TritonAccelerator, exact=exact)


def check_graphs(wanted: bool | None, device: str, kernels: KernelChoice, *, quantize_kv: bool = False) -> None:
    """Raises UsageError where graphs are asked for and cannot be, or are refused and there is no GPU to be without.

    wanted: None is neither. device: as of find()."""
    if wanted is not None and device == "cpu":
        raise UsageError("graphs are about GPUs, and none is used; leave them out, or add --device cuda")
    if wanted and kernels == "reference":
        raise UsageError("graphs are of our kernels, and kernels=reference computes in PyTorch; leave one of them out")
    if wanted and quantize_kv:
        raise UsageError("no graph can be made with kv_format=fp8; leave it or graphs out")


def recorder(gpus: Sequence[Gpu], wanted: bool | None) -> Recorder | None:
    """What makes graphs of decode steps, unless they are refused; None for none."""
    return CudaRecorder() if gpus and wanted is not False else None


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
