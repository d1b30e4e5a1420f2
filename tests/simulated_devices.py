"""Devices that are not there: tensors that say they are on one, hold their numbers in RAM, and refuse to meet others.

`with simulated():` lets tensors be made on, and moved to, SIMULATED[i]. An operation on tensors of two devices, or of
a device and the CPU, is an error, as on a real one (indices from the CPU too, which a real one would wait for); single
numbers may come from the CPU. `with watched() as seen:` lists what is launched there, and what waits for a device;
Triton's kernels are interpreted there too, where the interpreter is chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

SIMULATED = [torch.device("privateuseone", i) for i in range(3)]
# Move numbers from one to another.
_MOVING = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to}
# Whose results have a shape that only the device knows, or are known to the CPU at once.
_WAITING = {
    "nonzero", "masked_select", "bincount", "unique_consecutive", "_unique2", "_local_scalar_dense", "item",
    "is_nonzero", "equal", "repeat_interleave", "allclose",
}  # fmt: skip
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


@dataclass
class Seen:
    """Names of what was launched on devices, in order: torch's operations (each may be several launches), copies to a
    device ("to device"), and kernels of Triton. waits: what the CPU waited for."""

    launches: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def triton(self) -> list[str]:
        return [name for name in self.launches if name.startswith("triton ")]


_WATCHING: list[Seen] = []
# Who is given what devices are told, instead: see simulated_graphs.py.
RECORDING: list[Any] = []


@dataclass(frozen=True)
class Told:
    """do: does it. given: its tensors, as numbers. writes: to some of these; empty: makes memory without numbers;
    arrives: brings numbers from the CPU."""

    name: str
    device: torch.device
    do: Callable[[], Any]
    given: Any
    writes: bool
    waits: bool = False
    empty: bool = False
    arrives: bool = False


def _do(what: Told) -> Any:
    return RECORDING[0].told(what) if RECORDING else what.do()


@contextmanager
def watched() -> Iterator[Seen]:
    seen = Seen()
    _WATCHING.append(seen)
    try:
        yield seen
    finally:
        _WATCHING.remove(seen)


class Simulated(Tensor):
    """A tensor on a device that is not there; `inner` has its numbers."""

    inner: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Simulated:
        # For torch's own code it is on "meta", which needs no driver; whoever asks is told `where`.
        # Not one of inference mode, whose views torch cannot make of subclasses.
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device="meta", dispatch_device=True,
            )  # fmt: skip
        made.inner, made.where = inner, device
        return made  # type: ignore[no-any-return]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Simulated({self.inner}, {self.where})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def simulated() -> Iterator[None]:
    if not hasattr(torch, "privateuseone"):
        _setup_privateuseone_for_python_backend()
    with _interpreted(), _Mode():
        yield


@contextmanager
def _interpreted() -> Iterator[None]:
    """Kernels that are interpreted take the numbers of tensors that say they are on a device."""
    if "triton" not in sys.modules:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def unwrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        on = {arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)}
        if len(on) > 1:
            raise RuntimeError(f"{self.fn.__name__}: expected all tensors on one device, found {on}")
        if any(device.type != "cpu" for device in on):
            for seen in _WATCHING:
                seen.launches.append(f"triton {self.fn.__name__}")
        given = [_inner(arg) for arg in args], tree_map(_inner, kwargs)

        def do() -> None:
            with _disable_current_modes():
                call(self, *given[0], **given[1])

        _do(Told(self.fn.__name__, next(iter(on), torch.device("cpu")), do, given, writes=True))

    GridExecutor.__call__ = unwrapped
    try:
        yield
    finally:
        GridExecutor.__call__ = call


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> tuple[bool, bool]:
    """Whether the CPU waits for an operation on devices, and whether it brings numbers to one."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    name = func.overloadpacket.__name__
    here = [t for t in tensors if isinstance(t, Simulated)]
    leaves = device.type == "cpu" and bool(here) and func.overloadpacket in _MOVING
    # A mask is turned into indices, of which the CPU must know how many there are.
    masked = name in ("index", "index_put_", "index_put") and any(
        t.dtype in (torch.bool, torch.uint8) for t in here[1:]
    )
    arrives = func.overloadpacket in _MOVING and device.type != "cpu" and not isinstance(tensors[-1], Simulated)
    blocks = arrives and kwargs.get("non_blocking") is not True and not any(arg is True for arg in args)
    return leaves or masked or blocks or (bool(here) and name in _WAITING), arrives


def _note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, device: torch.device) -> None:
    """Tell watchers of an operation on devices. result: the numbers that it gave."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    name = func.overloadpacket.__name__
    waits, arrives = _waits(func, args, kwargs, device)
    results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    held = {(t.inner if isinstance(t, Simulated) else t).untyped_storage().data_ptr() for t in tensors}
    shares = bool(results) and all(r.untyped_storage().data_ptr() in held for r in results)
    writes = func._schema.is_mutable
    launches = device.type != "cpu" and (writes or not shares) and name not in _EMPTY
    if launches and not any(r.numel() for r in results):
        launches = False
    for seen in _WATCHING:
        if waits:
            seen.waits.append(name)
        if launches:
            seen.launches.append("to device" if arrives else name)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return args[0].where
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    # In inference mode torch gives `to` as it was called, with the device at any place.
    asked = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.device)), None)
    on = {t.device for t in tensors if isinstance(t, Simulated)}
    if func.overloadpacket in _MOVING:
        device = asked if asked is not None else tensors[0].device
    else:
        apart = [t for t in tensors if not isinstance(t, Simulated) and t.dim() > 0]
        if len(on) > 1 or (on and apart):
            found = ", ".join(sorted(str(t.device) for t in tensors))
            raise RuntimeError(f"{func}: expected all tensors on one device, found {found}")
        device = asked if asked is not None else next(iter(on), torch.device("cpu"))
    same: dict[int, Tensor] = {id(t.inner): t for t in tensors if isinstance(t, Simulated)}
    inner = tree_map(_inner, (args, kwargs))

    def do() -> Any:
        return func(*inner[0], **inner[1])

    if RECORDING:
        waits, arrives = _waits(func, args, kwargs, device)
        empty = func.overloadpacket.__name__ in _EMPTY
        writes = func._schema.is_mutable
        result = _do(Told(str(func), device, do, inner, writes, waits, empty, arrives))
    else:
        result = do()
    if _WATCHING:
        _note(func, args, kwargs, result, device)

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # What is written in place, or is there already, stays the same tensor.
        if id(value) in same and same[id(value)].device == device:
            return same[id(value)]
        moved = func.overloadpacket in _MOVING and any(
            value is t for t in (*tensors, *(t.inner for t in same.values()))
        )
        value = value.clone() if moved and device != tensors[0].device else value
        return value if device.type == "cpu" else Simulated(value, device)

    return tree_map(outer, result)


def _inner(value: Any) -> Any:
    if isinstance(value, Simulated):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value
