"""Frozen unit directions, one a hook: what every later step is given."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.positions import Position
from steerlens.errors import InputError, told
from steerlens.models.hooks import check_one_width, hook_layer, width_name
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
    sweep (`readout_names`) are found by `directions[name]` too, but are not steered. Where one hook
    alone is of a layer, `directions[15]` is its direction; `at` keeps some of the hooks. `vectors`
    holds both, in that order; of heads (`blocks.5.attn.hook_z[3]`, rows of d_head) it holds them
    alone, and `readout_vectors` the readouts, which are as wide as the residual stream.
    What is taken is a copy, so that nothing changes them. The sign is
    fixed by the method, most often so that positive prompts project higher on average.
    `fingerprint` is that of the pairs it was fitted on, `pair_hashes` their `prompt_hashes` (none
    where that is not known). A model with another `weight_processing`
    may not use them; one with another `weights_fingerprint` may, with a warning. Raises
    `InputError` when a vector does not have norm 1, `HookError` where heads and other hooks are
    mixed.

    Examples:
        >>> directions
        Directions(mean_diff, 5 hooks, d_model 32, position -1)
        >>> unit = directions["blocks.2.hook_resid_post"]  # or directions[2]
        >>> float(unit.norm())
        1.00
        >>> directions.at(1, 2).hook_names
        ('blocks.1.hook_resid_post', 'blocks.2.hook_resid_post')
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
    readout_vectors: Float[Tensor, "readout d_readout"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_width(self._names if self.readout_vectors is None else self.hook_names)
        norms = [norm for rows in self._blocks for norm in rows.norm(dim=-1).tolist()]
        for name, norm in zip(self._names, norms, strict=True):
            if not abs(norm - 1) < UNIT_TOLERANCE:
                raise InputError(f"the direction at {name} has norm {norm:.6g}; expected 1")

    def __getitem__(self, hook: str | int) -> Float[Tensor, " d_model"]:
        rows: list[Tensor] = [row for block in self._blocks for row in block]
        return rows[row_at(self._names, hook)]

    def __eq__(self, other: object) -> bool:
        """Whether the other are directions of the same values, fitted in the same way."""
        if not isinstance(other, Directions):
            return NotImplemented
        rows = {"vectors": None, "readout_vectors": None}
        mine, theirs = ({**vars(one), **rows} for one in (self, other))
        blocks = self._blocks, other._blocks
        return (
            mine == theirs
            and len(blocks[0]) == len(blocks[1])
            and all(torch.equal(ours, of) for ours, of in zip(*blocks, strict=True))
        )

    def __hash__(self) -> int:
        return hash((self._names, self.method, self.seed, self.fingerprint))

    def __contains__(self, hook: object) -> bool:
        return bool(rows_at(self._names, hook))

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_names)

    def __len__(self) -> int:
        return len(self.hook_names)

    def __repr__(self) -> str:
        return (
            f"Directions({shortened(self.method)}, {len(self.hook_names)} hooks, "
            f"{width_name(self.hook_names)} {self.vectors.shape[-1]}, position {self.position})"
        )

    def _repr_html_(self) -> str:
        uses = ["steered"] * len(self.hook_names) + ["readout"] * len(self.readout_names)
        table = pd.DataFrame({"layer": [hook_label(name) for name in self._names], "use": uses})
        about = [repr(self), f"seed {self.seed}", f"pairs {self.fingerprint[:12]}"]
        return fragment(about, table, n_labels=2)

    def at(self, *hooks: str | int) -> "Directions":
        """The part at some hooks, by name or by layer; the others of its width become readouts.

        Raises `InputError` where there is none.
        """
        kept = some_rows(self.hook_names, hooks)
        names = tuple(self._names[row] for row in kept)
        if self.readout_vectors is not None:
            return replace(self, hook_names=names, vectors=self.vectors[kept])
        others = [row for row in range(len(self._names)) if row not in kept]
        return replace(
            self,
            hook_names=names,
            readout_names=tuple(self._names[row] for row in others),
            vectors=self.vectors[[*kept, *others]],
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return self.hook_names + self.readout_names

    @property
    def _blocks(self) -> list[Tensor]:
        """The rows of `_names`, those of one width together."""
        return [self.vectors, *([] if self.readout_vectors is None else [self.readout_vectors])]

    def read_along(self, readouts: "Directions", hook_names: Iterable[str]) -> "Directions":
        """Directions at heads, with those of wider hooks at which their effect is read."""
        names = tuple(dict.fromkeys(hook_names))
        rows = torch.stack([readouts[name] for name in names])
        return replace(self, readout_names=names, readout_vectors=rows)


def rows_at(hook_names: Sequence[str], hook: object) -> list[int]:
    """The rows of a hook, by its name, or of all hooks of a layer, by its number."""
    is_layer = isinstance(hook, int) and not isinstance(hook, bool)
    return [
        row
        for row, name in enumerate(hook_names)
        if name == hook or (is_layer and hook_layer(name) == hook)
    ]


def row_at(hook_names: Sequence[str], hook: str | int) -> int:
    """The row of a hook, or of the only one of a layer. Raises `KeyError` where there is none.

    Raises `InputError` where a layer has several.
    """
    rows = rows_at(hook_names, hook)
    if not rows:
        raise KeyError(hook)
    if len(rows) > 1:
        names = ", ".join(hook_names[row] for row in rows)
        raise InputError(f"layer {hook} has {len(rows)} directions: name one of {names}")
    return rows[0]


def some_rows(hook_names: Sequence[str], hooks: Sequence[str | int]) -> list[int]:
    """The rows of some hooks, each once. Raises `InputError` where one is not there, or none."""
    missing = [hook for hook in hooks if not rows_at(hook_names, hook)]
    if missing or not hooks:
        wanted = ", ".join(map(told, missing)) or "asked for: give a hook name or a layer"
        raise InputError(f"there is no direction {wanted}; there are {', '.join(hook_names)}")
    return list(dict.fromkeys(row for hook in hooks for row in rows_at(hook_names, hook)))
