"""Frozen unit directions, one a hook: what every later step is given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.positions import Position
from steerlens.errors import InputError
from steerlens.models.weight_processing import UNKNOWN
from steerlens.tables import fragment, hook_label, shortened
from steerlens.validation import Whole, checked

UNIT_TOLERANCE = 1e-3
"""How far from 1 the norm of a unit direction may be."""


class Frozen:
    """Base of frozen dataclasses whose tensors are copied when given and when taken."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(self, name, value.detach().clone())

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return value.clone() if isinstance(value, Tensor) else value


@checked
@dataclass(frozen=True, eq=False)
class Directions(Frozen, Mapping[str, Tensor]):
    """Hook name -> unit direction, fitted on the unsteered model and then frozen.

    Iterating gives `hook_names`, the hooks that were asked for; the readouts carried along for a
    sweep (`readout_names`) are found by `directions[name]` too, but are not steered. `vectors`
    holds both, in that order; what is taken is a copy, so that nothing changes them. The sign is
    fixed by the method, most often so that positive prompts project higher on average.
    `fingerprint` is that of the pairs it was fitted on, `pair_hashes` their `prompt_hashes` (none
    where that is not known). A model with another `weight_processing`
    may not use them; one with another `weights_fingerprint` may, with a warning. Raises
    `InputError` when a vector does not have norm 1.

    Examples:
        >>> directions
        Directions(mean_diff, 5 hooks, d_model 32, position -1)
        >>> unit = directions["blocks.2.hook_resid_post"]
        >>> float(unit.norm())
        1.00
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    vectors: Float[Tensor, "all_hook d_model"]
    method: str
    position: Position
    seed: Whole
    fingerprint: str
    weight_processing: str = UNKNOWN
    weights_fingerprint: str = UNKNOWN
    pair_hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        norms = self.vectors.norm(dim=-1)
        for name, norm in zip((*self.hook_names, *self.readout_names), norms.tolist(), strict=True):
            if not abs(norm - 1) < UNIT_TOLERANCE:
                raise InputError(f"the direction at {name} has norm {norm:.6g}; expected 1")

    def __getitem__(self, hook_name: str) -> Float[Tensor, " d_model"]:
        if hook_name not in self._names:
            raise KeyError(hook_name)
        return self.vectors[self._names.index(hook_name)]

    def __eq__(self, other: object) -> bool:
        """Whether the other are directions of the same values, fitted in the same way."""
        if not isinstance(other, Directions):
            return NotImplemented
        mine, theirs = ({**vars(one), "vectors": None} for one in (self, other))
        return mine == theirs and torch.equal(self.vectors, other.vectors)

    def __hash__(self) -> int:
        return hash((self._names, self.method, self.seed, self.fingerprint))

    def __contains__(self, hook_name: object) -> bool:
        return hook_name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_names)

    def __len__(self) -> int:
        return len(self.hook_names)

    def __repr__(self) -> str:
        return (
            f"Directions({shortened(self.method)}, {len(self.hook_names)} hooks, "
            f"d_model {self.vectors.shape[-1]}, position {self.position})"
        )

    def _repr_html_(self) -> str:
        uses = ["steered"] * len(self.hook_names) + ["readout"] * len(self.readout_names)
        table = pd.DataFrame({"layer": [hook_label(name) for name in self._names], "use": uses})
        about = [repr(self), f"seed {self.seed}", f"pairs {self.fingerprint[:12]}"]
        return fragment(about, table, n_labels=2)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.hook_names + self.readout_names
