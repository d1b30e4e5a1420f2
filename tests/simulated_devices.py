"""Devices that are not there: tensors that say they are on one, hold their numbers in RAM, and refuse to meet others.

`with simulated():` lets tensors be made on, and moved to, SIMULATED[i]. An operation on tensors of two devices, or of
a device and the CPU, is an error, as on a real one (indices from the CPU too, which a real one would wait for); single
numbers may come from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

SIMULATED = [torch.device("privateuseone", i) for i in range(3)]
# Move numbers from one to another.
_MOVING = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to}


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
    with _Mode():
        yield


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
    result = func(*inner[0], **inner[1])

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
