"""The steering vector: directions with operator, scale, calibration and origin."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.directions.directions import Directions, Frozen, row_at, rows_at, some_rows
from steerlens.errors import InputError, told
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import (
    HookFunction,
    Layers,
    check_one_width,
    hook_width,
    resid_post,
    resolve_hooks,
    width_name,
)
from steerlens.models.weight_processing import UNKNOWN, check_same, processing_of
from steerlens.steering import vector_checks, vector_file
from steerlens.steering.apply import step_hooks, steps
from steerlens.steering.coefficients import Calibration, Coefficient
from steerlens.steering.conditions import Condition
from steerlens.steering.hub import OnTheHub
from steerlens.steering.operators import Add, Operator, is_finite
from steerlens.steering.origin import Origin
from steerlens.tables import MAX_LINE, shortened
from steerlens.validation import checked


@checked
@dataclass(frozen=True, eq=False)
class SteeringVector(Frozen, OnTheHub, Mapping[str, Tensor]):
    """Hook name -> unit direction, with what is done along it, how far, and where it comes from.

    A coefficient is a separate argument everywhere; 0 is the identity with every operator.
    Combining: `a + b`, `a - b`, `2 * a`, `-a`, `a.orthogonal_to(b)`, `a.interpolate(b, share)`, all
    on `scale * direction`.

    Args:
        hook_names: where it acts, inside blocks.
        directions: rows of norm 1, in that order.
        scale: with the operator `Add`, coefficient c moves an activation by `c * scale` along the
            direction, in residual units; the other operators have no use for it.
        calibration: what gives coefficients such as "80%" a meaning.
        operator: what is done to the activation, by default `Add`.
        condition: where it is done; None is everywhere.
        origin: model, data and method, by default unknown.

    Raises:
        InputError: a direction does not have norm 1, a scale is not finite and above 0, a hook is
            not inside a block, or the lengths do not agree.

    Examples:
        >>> vector
        SteeringVector(add, mean_diff on moods, blocks.2.hook_resid_post, d_model 32)
        >>> (-2 * vector).scale
        tensor([2.])
        >>> vector.save(folder / "cheerful.safetensors")
        >>> sl.SteeringVector.load(folder / "cheerful.safetensors", model=model) == vector
        True
    """

    hook_names: tuple[str, ...]
    directions: Float[Tensor, "hook d_model"]
    scale: Float[Tensor, " hook"]
    calibration: Calibration
    operator: Operator = field(default_factory=Add)
    condition: Condition | None = None
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        super().__post_init__()
        vector_checks.check_parts(self)

    @classmethod
    def from_directions(
        cls,
        model: HookedModel,
        directions: Directions,
        *,
        layers: Layers | None = None,
        operator: Operator | None = None,
        condition: Condition | None = None,
        layer_table: pd.DataFrame | None = None,
        dataset: str = UNKNOWN,
    ) -> "SteeringVector":
        """A steering vector of the directions fitted on `model`.

        Args:
            model: the model they were fitted on.
            directions: as from `fit`.
            layers: which of their hooks (see `resolve_hooks`), by default all.
            operator: what is done to the activation, by default `Add`.
            condition: where it is done, by default everywhere.
            layer_table: gives coefficients such as "0.1 norm" and "80%" a meaning: that of
                `find_boundary`, or, for norms alone, of `sweep` or `measure_layers`.
            dataset: the pairs' name, for the origin.

        Raises:
            InputError: a hook has no direction or is not in the table, or model, directions and
                table differ in weight processing.

        Examples:
            >>> table = sl.Study(model, pairs, directions, layers=[2]).layers
            >>> vector = sl.SteeringVector.from_directions(
            ...     model, directions, layers=[2], layer_table=table
            ... )
            >>> len(vector.fwd_hooks("0.1 norm"))
            1
        """
        names = directions.hook_names if layers is None else resolve_hooks(model, layers)
        missing = [name for name in names if name not in directions]
        if missing:
            raise InputError(f"there is no direction at {', '.join(missing)}; fit one there")
        check_one_width(names)
        origin = Origin.of(model, directions, dataset=dataset)
        if layer_table is not None:
            check_same(
                "the layer table is of a model",
                processing_of(layer_table.attrs),
                "this model",
                origin.weight_processing,
            )
        return cls(
            hook_names=names,
            directions=torch.stack([directions[name].float().cpu() for name in names]),
            scale=torch.ones(len(names)),
            calibration=Calibration.of_table(names, layer_table),
            operator=operator or Add(),
            condition=condition,
            origin=origin,
        )

    @classmethod
    def from_vectors(
        cls, vectors: Mapping[str, Tensor], *, origin: Origin | None = None
    ) -> "SteeringVector":
        """A steering vector of any tensors, made elsewhere.

        Args:
            vectors: hook name -> one row of numbers; its norm becomes the scale.
            origin: where they come from, by default unknown.

        Raises `InputError` of a vector that is zero, not finite, or not one row of numbers.

        Examples:
            >>> rows = {"blocks.2.hook_resid_post": torch.tensor([3.0, 4.0])}
            >>> made = sl.SteeringVector.from_vectors(rows)
            >>> made.scale, made["blocks.2.hook_resid_post"]
            (tensor([5.]), tensor([0.6, 0.8]))
        """
        rows = [torch.as_tensor(row).detach().float().cpu() for row in vectors.values()]
        shapes = {tuple(row.shape) for row in rows}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise InputError(f"expected vectors of one length, got shapes {sorted(shapes)}")
        unknown = Calibration.unknown(len(rows))
        return cls._from_rows(tuple(vectors), torch.stack(rows), origin or Origin(), unknown)

    @classmethod
    def from_tensor(
        cls,
        tensor: Float[Tensor, " d_model"],
        *,
        layer: int | str,
        model: HookedModel | None = None,
    ) -> "SteeringVector":
        """A steering vector of one tensor, its norm the scale.

        Args:
            tensor: one row of numbers.
            layer: the block after which it acts, or the name of a hook.
            model: the model it is for, which the vector then records, and to which a layer below 0
                and the width belong. Default: not known.

        Raises:
            InputError: as `from_vectors`; a tensor of another width than the hook's, several hooks.
            HookError: the model has no such hook.

        Examples:
            >>> sl.SteeringVector.from_tensor(directions[2], layer=2, model=model)
            SteeringVector(add, unknown on unknown, blocks.2.hook_resid_post, d_model 32)
        """
        name = resid_post(layer) if isinstance(layer, int) else layer
        if model is None:
            return cls.from_vectors({name: tensor})
        names = resolve_hooks(model, [layer] if isinstance(layer, int) else layer)
        if len(names) != 1:
            raise InputError(f"expected one hook, got {len(names)}; name one with layer=")
        width = hook_width(model, names[0])
        if len(tensor) != width:
            raise InputError(
                f"the tensor has {len(tensor)} numbers, this model {width_name(names)} {width}"
            )
        return cls.from_vectors({names[0]: tensor}, origin=Origin.of_model(model))

    @classmethod
    def _from_rows(
        cls,
        hook_names: tuple[str, ...],
        rows: Tensor,
        origin: Origin,
        calibration: Calibration,
        condition: Condition | None = None,
    ) -> "SteeringVector":
        unit, scale = vector_checks.unit_rows(hook_names, rows)
        return cls(hook_names, unit, scale, calibration, condition=condition, origin=origin)

    def __getitem__(self, hook: str | int) -> Float[Tensor, " d_model"]:
        return self.directions[row_at(self.hook_names, hook)]

    def __contains__(self, hook: object) -> bool:
        return bool(rows_at(self.hook_names, hook))

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_names)

    def __len__(self) -> int:
        return len(self.hook_names)

    def __eq__(self, other: object) -> bool:
        """Whether the other is a steering vector that would be saved as the same bytes."""
        return isinstance(other, SteeringVector) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash((self.hook_names, self.operator, self.origin))

    def __repr__(self) -> str:
        hooks = self.hook_names[0] if len(self) == 1 else f"{len(self)} hooks"
        condition = "" if self.condition is None else f", {self.condition!r}"
        width = width_name(self.hook_names)
        origin = f"{shortened(self.origin.method)} on {shortened(self.origin.dataset)}"
        line = f"{self.operator.name}, {origin}, {hooks}, {width} {self.d_model}{condition}"
        return shortened(f"SteeringVector({line})", MAX_LINE)

    def _repr_html_(self) -> str:
        return vector_file.shown(self)

    @property
    def weight_processing(self) -> str:
        """What was done to the weights of the model it was made on (see `Provenance`)."""
        return self.origin.weight_processing

    @property
    def d_model(self) -> int:
        """The length of each direction; at heads that is d_head."""
        return int(self.directions.shape[1])

    @property
    def rows(self) -> Float[Tensor, "hook d_model"]:
        """`scale * direction` of every hook: what coefficient 1 adds."""
        return self.scale[:, None] * self.directions

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides what it does: not of calibration and origin."""
        bare = replace(self, calibration=Calibration.unknown(len(self)), origin=Origin())
        return hashlib.sha256(bare.to_bytes()).hexdigest()

    @property
    def touched(self) -> tuple[str, ...]:
        """The hooks that it acts at, and that of its condition."""
        condition = () if self.condition is None else (self.condition.hook_name,)
        return (*self.hook_names, *condition)

    @property
    def is_signed(self) -> bool:
        """Whether its operator takes coefficients below 0."""
        return self.operator.is_signed

    def calibrated(self, layer_table: pd.DataFrame) -> "SteeringVector":
        """The vector with the boundary that was measured of it: then "80%" is a share of that.

        Args:
            layer_table: `layers` of `Study(model, pairs, vector).boundary()`. Several hooks were
                pushed at once, and "80%" moves each by 80% of what it was pushed by then.

        Raises `InputError` where the table is another vector's, or the vector does not add.
        """
        vector_checks.check_added("a share of the boundary", self)
        measured = Calibration.of_vector(self.fingerprint, self.scale, layer_table)
        return replace(self, calibration=measured)

    def at(self, *hooks: str | int) -> "SteeringVector":
        """The part at some hooks, given by name or by block. Raises `InputError` on others."""
        kept = some_rows(self.hook_names, hooks)
        return replace(
            self,
            hook_names=tuple(self.hook_names[row] for row in kept),
            directions=self.directions[kept],
            scale=self.scale[kept],
            calibration=self.calibration.take(kept),
        )

    def fwd_hooks(
        self, coefficient: Coefficient, *, mask: Bool[Tensor, "prompt token"] | None = None
    ) -> list[tuple[str, HookFunction]]:
        """`(hook name, function)` for `model.run_with_hooks` and `model.hooks`; none at 0.

        Args:
            coefficient: how strongly, as in `Coefficient`.
            mask: the tokens to steer in a pass of just that shape; by default all, also while
                generating. `steer` follows the KV cache, for the prompt or what is generated alone.

        Raises:
            InputError: the coefficient has no meaning here, or there is a condition with scope
                "prompt", which needs `steer`.

        Examples:
            >>> logits = model.run_with_hooks("the river was", fwd_hooks=vector.fwd_hooks(4))
            >>> vector.fwd_hooks(0)
            []
        """
        return step_hooks(steps(self, coefficient), self.condition, mask=mask)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """The sum at every hook, its boundary unknown.

        Raises `InputError` when hooks, d_model, known models, their weight processing, conditions
        or operators (other than `Add`) differ, and when nothing is left at a hook.
        """
        return self._combined(other, lambda a, b: a + b, "({} + {})")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self._combined(other, lambda a, b: a - b, "({} - {})")

    def __mul__(self, factor: float | int) -> "SteeringVector":
        if not is_finite(factor) or factor == 0:
            raise InputError(
                f"a vector is scaled by a finite number that is not 0, not {told(factor)}"
            )
        vector_checks.check_added("scaling", self)
        sign = 1 if factor > 0 else -1
        return replace(
            self,
            directions=self.directions * sign,
            scale=self.scale * abs(float(factor)),
            calibration=self.calibration if sign > 0 else self.calibration.flipped(),
        )

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1

    def orthogonal_to(self, other: "SteeringVector") -> "SteeringVector":
        """What is left of `scale * direction` without its component along the other's direction.

        Raises `InputError` when nothing is left, and when a sum would.
        """
        return self._combined(other, vector_checks.rest_of, "({} without {})")

    def interpolate(self, other: "SteeringVector", share: float | int) -> "SteeringVector":
        """`(1 - share) * self + share * other`, on `scale * direction`.

        Raises `InputError` on a share that is not finite, when the result is zero, and when a
        sum would.
        """
        if not is_finite(share):
            raise InputError(f"a share is a finite number, not {told(share)}")
        part, how = float(share), f"({{}} to {{}} by {share:g})"
        return self._combined(other, lambda a, b: (1 - part) * a + part * b, how)

    def _combined(
        self, other: "SteeringVector", combine: Callable[[Tensor, Tensor], Tensor], how: str
    ) -> "SteeringVector":
        vector_checks.check_alike(self, other)
        return self._from_rows(
            self.hook_names,
            combine(self.rows, other.rows),
            self.origin.combined(other.origin, how),
            self.calibration.without_boundary(),
            self.condition,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the metadata inside.

        Raises `InputError` where the name does not end in .safetensors, or cannot be written.
        """
        vector_file.write_named(
            path, ".safetensors", lambda whole: whole.write_bytes(self.to_bytes())
        )

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        return vector_file.encode(*self.to_record())

    def to_record(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and everything else as plain values."""
        return vector_file.record_of(self)

    @classmethod
    def from_record(
        cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> "SteeringVector":
        """The inverse of `to_record`. Raises `InputError` of what does not fit."""
        try:
            return cls(**vector_file.fields_of(tensors, record))
        except InputError:
            raise
        except Exception as error:  # a record may hold anything in any place
            raise InputError(
                f"the record of the steering vector does not fit: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path, *, model: HookedModel | None = None) -> "SteeringVector":
        """Read a file written by `save`.

        Args:
            path: of the file.
            model: see that the vector fits it (`check_model`); by default that is not checked.

        Raises `InputError` where the file cannot be read whole, was changed, or is a pickle.
        """
        path = Path(path)
        try:
            vector = cls.from_record(*vector_file.decode(path))
        except InputError as error:
            raise InputError(f"cannot load {str(path)!r}: {error}") from error
        if model is not None:
            vector.check_model(model)
        return vector

    def check_model(self, model: HookedModel) -> None:
        """See that the vector fits `model`; warns when weights, tokenizer or template are others.

        Raises `InputError` where d_model differs, a hook does not exist there, or the model's
        weights were processed in another way.
        """
        vector_checks.check_fits(self, model)

    def describe(self) -> dict[str, str]:
        """Operator, condition, what the boundary was measured with, and the known origin.

        Without the pairs' hashes.
        """
        return vector_file.described(self)
