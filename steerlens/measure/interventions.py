"""What is done in a row of a table: a direction added at a hook, or a whole steering vector."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.directions import Directions
from steerlens.engine.positions import Position, as_position
from steerlens.engine.workload import Baseline, Job
from steerlens.errors import InputError
from steerlens.measure.coherence import Push
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_layer, hook_width, readout_hook
from steerlens.steering import Add, SteeringVector
from steerlens.steering.apply import steps

IN_A_BLOCK = (
    *("hook_resid_pre", "hook_in", "hook_attn_in", "ln1.", "attn.", "ln1_post.", "hook_attn_out"),
    *("hook_resid_mid", "hook_mlp_in", "ln2.", "mlp.", "ln2_post.", "hook_mlp_out"),
    *("hook_resid_post", "hook_out"),
)
"""What a forward pass comes to within a block, first to last: how names of hooks begin."""


@dataclass(frozen=True, eq=False)
class UnitIntervention:
    """What coefficient 1 does, and where the effect is read.

    `name` is that of the hook, of several hooks all of theirs joined by " + ". The pairs are looked
    at unsteered at `hook_name`, of a vector its last, along the unit `direction`. `step` is what is
    added there, `scale` times that unit; a `vector` is applied instead.
    """

    name: str
    hook_name: str
    direction: Float[Tensor, " d_model"]
    step: Float[Tensor, " d_model"]
    readout: str
    scale: float = 1.0
    vector: SteeringVector | None = None

    def job(self, coefficients: Sequence[float]) -> Job:
        """Its cells. Raises `InputError` where the operator takes no such coefficient."""
        if self.vector is not None:
            for coefficient in coefficients:
                steps(self.vector, coefficient)
        return Job(self.name, self.step, tuple(coefficients), self.readout, self.vector)

    def push(self, sign: int = 1) -> Push:
        """It as what a boundary is searched along."""
        return Push(self.name, self.step, sign, self.readout, self.vector)

    def resid_norm(self, baseline: Baseline) -> float:
        """The coefficient that moves its hook by the mean residual norm there.

        Raises `InputError` of a vector that is not one addition.
        """
        if self.vector is not None:
            raise InputError(
                f"norms are those of one hook that is added to, and {self.name} is a vector of "
                "several hooks, a condition or another operator; give numbers, or shares of its "
                "boundary such as '80%'"
            )
        return resid_norm(baseline, self.hook_name) / self.scale

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Where it acts."""
        return (self.hook_name,) if self.vector is None else self.vector.hook_names

    @property
    def decided(self) -> list[Any]:
        """What `digest` needs of it."""
        vector = None if self.vector is None else self.vector.fingerprint
        return [self.name, self.hook_name, self.direction, self.step, self.readout, vector]

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs that its coefficients may have."""
        return (1, -1) if self.vector is None or self.vector.is_signed else (1,)

    def limit(self, baseline: Baseline, search_range: float) -> float:
        """The largest coefficient that moves no hook by more than so many mean residual norms.

        Of an operator that does not add, the largest that it takes.
        """
        if self.vector is None:
            return search_range * resid_norm(baseline, self.hook_name) / self.scale
        if not isinstance(self.vector.operator, Add):
            return float(self.vector.operator.most)
        sizes = zip(self.vector.hook_names, self.vector.scale.tolist(), strict=True)
        return search_range * min(resid_norm(baseline, name) / float(size) for name, size in sizes)


def of_vector(vector: SteeringVector, readout: str) -> UnitIntervention:
    """A vector as what is done. One hook with addition at all tokens runs as a direction does."""
    last = in_order(vector)[-1]
    is_direction = len(vector) == 1 and isinstance(vector.operator, Add) and not vector.condition
    direction, scale = vector[last], float(vector.scale[0]) if is_direction else 1.0
    applied = None if is_direction else vector
    return UnitIntervention(
        joined_hooks(vector), last, direction, scale * direction, readout, scale, applied
    )


def joined_hooks(vector: SteeringVector) -> str:
    """What its rows of a table say in place of one hook's name."""
    return " + ".join(in_order(vector))


def in_order(vector: SteeringVector) -> tuple[str, ...]:
    """Its hooks in the order of a forward pass; in a block those of unknown place come last."""

    def place(name: str) -> tuple[int, int]:
        within = name.partition(f"blocks.{hook_layer(name)}.")[2]
        first = [i for i, part in enumerate(IN_A_BLOCK) if within.startswith(part)]
        return hook_layer(name), first[0] if first else len(IN_A_BLOCK)

    return tuple(sorted(vector, key=place))


def readout_of(
    model: HookedModel, vector: SteeringVector, readout: Mapping[str, Tensor] | None
) -> tuple[str, Float[Tensor, " d_model"]]:
    """The hook at which a vector's effect is read, and the unit direction there.

    Without a `readout` its last hook, along its own direction. Raises `InputError` where `readout`
    is of no use.
    """
    last = in_order(vector)[-1]
    if readout is None:
        return last, vector[last]
    usual = readout_hook(last, int(model.cfg.n_layers))
    name = usual if usual in readout or len(readout) != 1 else next(iter(readout))
    if name not in readout:
        raise InputError(
            f"the effect of a vector that acts last at {last} is read at {usual}, and the readout "
            f"has {', '.join(readout) or 'no hook'}; give a direction there, or of one hook alone"
        )
    layer = hook_layer(name)
    if layer < hook_layer(last) or (layer == hook_layer(last) and name not in (last, usual)):
        raise InputError(f"the readout {name} does not come after {last}, the vector's last hook")
    row, width = readout[name].detach().cpu(), hook_width(model, name)
    norm = float(row.norm())
    if row.shape != (width,) or not (math.isfinite(norm) and norm > 0):
        raise InputError(
            f"expected a readout of {width} finite numbers, not all 0, got shape "
            f"{tuple(row.shape)} and norm {norm:.4g}"
        )
    # Directions are unit vectors, whose bits a division would change.
    return name, row if isinstance(readout, Directions) else row.float() / norm


def position_of(directions: Directions | SteeringVector, readout: object) -> Position:
    """The position that differences are read at: a vector's own, else its readout's, else -1."""
    if isinstance(directions, Directions):
        return directions.position
    with suppress(InputError):  # "unknown", or another tool's word
        return as_position(directions.origin.position)
    return readout.position if isinstance(readout, Directions) else -1


def resid_norm(baseline: Baseline, hook_name: str) -> float:
    """The mean norm of both sides' unsteered activations at a hook."""
    cell = baseline.cell(hook_name)
    return float(torch.cat([cell.positive, cell.negative]).double().norm(dim=-1).mean())
