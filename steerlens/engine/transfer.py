"""Small tensors between the CPU and a GPU, without waiting for what the GPU is at.

On a CPU nothing is copied.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

PINNED = 2**26
"""Values up to which results wait in pinned memory: it is locked, and stays with the process."""


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way to the CPU."""

    values: Shaped[Tensor, "..."]
    event: Any

    def arrived(self) -> Shaped[Tensor, "..."]:
        """The values, waited for."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def to_host(values: Shaped[Tensor, "..."], *, pins: bool = True) -> Arriving:
    """Begin to copy `values` to the CPU; unless it `pins` memory, wait for them."""
    if values.device.type != "cuda" or values.numel() == 0 or not pins:
        return Arriving(values.cpu(), None)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    return Arriving(pinned, torch.cuda.current_stream(values.device).record_event())


def to_device(
    values: Shaped[Tensor, "..."], device: torch.device | str | None
) -> Shaped[Tensor, "..."]:
    """`values` on `device`."""
    is_copied = device is not None and torch.device(device).type == "cuda"
    if not is_copied or values.device.type != "cpu" or values.numel() == 0:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
