"""What the CPU looks up for a step before its layers are computed, and how it comes to their devices: one copy for each
dtype. Knows tensors and their names; does not know what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.kernels.native import Library
from localmoe.layers.rotary import Rotation
from localmoe.ops import DeviceOps
from localmoe.step import brought

Tables = dict[str, Tensor]
# Numbers: 16 bytes of those that have 4.
_ALIGNED = 4


@dataclass(frozen=True)
class Inputs:
    """hidden: [T, D] of the embedding; tables: whatever layers need besides, by name. All on the CPU."""

    hidden: Tensor
    tables: Tables

    def at(self, device: torch.device) -> Tables:
        """The tables on a device."""
        if device.type == "cpu":
            return self.tables
        return _apart({dtype: brought(flat, device) for dtype, flat in _joined(self.tables).items()}, self.tables)


class Kept:
    """Inputs of steps of the same shape, on devices, where they always lie at the same place."""

    def __init__(self, inputs: Inputs, devices: Iterable[torch.device]) -> None:
        """inputs: the first. devices: hidden is on the first of them, the tables on each."""
        flats, devices = _joined(inputs.tables), list(devices)
        self.hidden = torch.empty_like(inputs.hidden, device=devices[0])
        self._flats = {d: {t: torch.empty_like(flat, device=d) for t, flat in flats.items()} for d in devices}
        self._tables = {device: _apart(there, inputs.tables) for device, there in self._flats.items()}
        self.fill(inputs)

    def at(self, device: torch.device) -> Tables:
        """See Inputs.at."""
        return self._tables[device]

    def fill(self, inputs: Inputs) -> None:
        """Take over another step's."""
        self.hidden.copy_(inputs.hidden, non_blocking=True)
        for dtype, flat in _joined(inputs.tables).items():
            for there in self._flats.values():
                there[dtype].copy_(flat, non_blocking=True)


def named(name: str, turn: Rotation) -> Tables:
    """A rotation as tables."""
    return {f"{name}.cos": turn.cos, f"{name}.sin": turn.sin}


def turn_of(tables: Tables, name: str, library: Library | DeviceOps | None) -> Rotation:
    """A rotation from tables, applied by what computes where they are."""
    return Rotation(tables[f"{name}.cos"], tables[f"{name}.sin"], library)


def _joined(tables: Tables) -> dict[torch.dtype, Tensor]:
    """All of a dtype one after the other, [n]."""
    kinds = dict.fromkeys(table.dtype for table in tables.values())
    return {kind: torch.cat([_padded(t) for t in tables.values() if t.dtype == kind]) for kind in kinds}


def _padded(table: Tensor) -> Tensor:
    """So that the next begins where Triton's kernels like it best, whatever the number of tokens."""
    return F.pad(table.flatten(), (0, -table.numel() % _ALIGNED))


def _apart(flats: Mapping[torch.dtype, Tensor], shapes: Tables) -> Tables:
    """What _joined() made of tables of these shapes."""
    found, at = Tables(), dict.fromkeys(flats, 0)
    for name, like in shapes.items():
        first, size = at[like.dtype], math.prod(like.shape)
        found[name] = flats[like.dtype][first : first + size].view(like.shape)
        at[like.dtype] += size + -size % _ALIGNED
    return found
