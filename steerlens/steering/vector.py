"""The steering vector: directions with operator, scale, calibration and origin."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.directions.directions import UNIT_TOLERANCE, Directions, Frozen
from steerlens.errors import HookError, InputError, told
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import HookFunction, Layers, hook_layer, resolve_hooks
from steerlens.models.identity import provenance
from steerlens.models.weight_processing import UNKNOWN, check_processing, check_same, processing_of
from steerlens.steering.apply import step_hooks, steps
from steerlens.steering.coefficients import Calibration, Coefficient
from steerlens.steering.conditions import Condition
from steerlens.steering.operators import Add, Operator, is_finite
from steerlens.steering.origin import Origin
from steerlens.steering.vector_file import decode, encode, fields_of, record_of, write_named
from steerlens.tables import MAX_LINE, fragment, hook_label, shortened
from steerlens.validation import checked


@checked
@dataclass(frozen=True, eq=False)
class SteeringVector(Frozen, Mapping[str, Tensor]):
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
        sizes = {len(self.hook_names), len(self.directions), len(self.scale)}
        if (
            len(sizes) > 1
            or not self.hook_names
            or len(set(self.hook_names)) < len(self.hook_names)
        ):
            raise InputError(
                f"expected one direction and scale for each of some different hooks, got "
                f"{len(self.hook_names)} names, {len(self.directions)} directions and "
                f"{len(self.scale)} scales"
            )
        for name, norm in zip(self.hook_names, self.directions.norm(dim=-1).tolist(), strict=True):
            if not abs(norm - 1) < UNIT_TOLERANCE:
                raise InputError(f"the direction at {name} has norm {norm:.6g}; expected 1")
            try:
                hook_layer(name)
            except HookError as error:
                raise InputError(f"a vector acts inside blocks: {error}") from error
        if not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            raise InputError(f"scales must be finite and above 0, got {self.scale.tolist()}")
        if {len(self.hook_names)} != self.calibration.lengths:
            raise InputError(
                f"expected a calibration of {len(self.hook_names)} hooks, got one of "
                f"{sorted(self.calibration.lengths)}"
            )
        if self.condition is not None and len(self.condition.direction) != self.d_model:
            raise InputError(
                f"the condition's direction has {len(self.condition.direction)} numbers, the "
                f"vector's {self.d_model}"
            )

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

        Raises:
            InputError: a vector is zero, not finite, or not one row of numbers.

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
    def _from_rows(
        cls,
        hook_names: tuple[str, ...],
        rows: Tensor,
        origin: Origin,
        calibration: Calibration,
        condition: Condition | None = None,
    ) -> "SteeringVector":
        scale = rows.double().norm(dim=-1)
        for name, size in zip(hook_names, scale.tolist(), strict=True):
            if not (math.isfinite(size) and size > 0):
                raise InputError(
                    f"the vector at {name} has norm {size:.6g}, so it has no direction"
                )
        unit = (rows.double() / scale[:, None]).float()
        return cls(hook_names, unit, scale.float(), calibration, condition=condition, origin=origin)

    # A mapping of the directions

    def __getitem__(self, hook_name: str) -> Float[Tensor, " d_model"]:
        if hook_name not in self.hook_names:
            raise KeyError(hook_name)
        return self.directions[self.hook_names.index(hook_name)]

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
        origin = f"{shortened(self.origin.method)} on {shortened(self.origin.dataset)}"
        line = f"{self.operator.name}, {origin}, {hooks}, d_model {self.d_model}{condition}"
        return shortened(f"SteeringVector({line})", MAX_LINE)

    def _repr_html_(self) -> str:
        known = self.calibration
        columns = {
            "layer": [hook_label(name) for name in self.hook_names],
            "scale": self.scale.tolist(),
            "resid norm": known.resid_norm.tolist(),
            "boundary -": known.boundary_neg.tolist(),
            "boundary +": known.boundary_pos.tolist(),
        }
        about = [repr(self), f"model {shortened(self.origin.model)}"]
        about += [f"boundary of {shortened(known.budget)} on {shortened(known.text)} text"]
        about += ["all hooks pushed at once"] if known.is_joint else []
        return fragment(about, pd.DataFrame(columns), note="residual units")

    @property
    def weight_processing(self) -> str:
        """What was done to the weights of the model it was made on (see `Provenance`)."""
        return self.origin.weight_processing

    @property
    def d_model(self) -> int:
        """The length of each direction."""
        return int(self.directions.shape[1])

    @property
    def rows(self) -> Float[Tensor, "hook d_model"]:
        """`scale * direction` of every hook: what coefficient 1 adds."""
        return self.scale[:, None] * self.directions

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides what it does: not of calibration and origin."""
        unknown = Calibration.unknown(len(self))
        bare = replace(self, calibration=unknown, origin=Origin())
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

        Raises:
            InputError: the table is another vector's, or the vector does not add.
        """
        self._check_add("a share of the boundary", self)
        measured = Calibration.of_vector(self.fingerprint, self.scale, layer_table)
        return replace(self, calibration=measured)

    def at(self, *hooks: str | int) -> "SteeringVector":
        """The part at some hooks, given by name or by block. Raises `InputError` on others."""
        kept: list[int] = []
        for hook in hooks:
            rows = [
                row
                for row, name in enumerate(self.hook_names)
                if hook == name or (isinstance(hook, int) and hook_layer(name) == hook)
            ]
            if not rows:
                raise InputError(
                    f"the vector has no hook {told(hook)}; it has {', '.join(self.hook_names)}"
                )
            kept += [row for row in rows if row not in kept]
        if not kept:
            raise InputError("give at least one hook name or block")
        return replace(
            self,
            hook_names=tuple(self.hook_names[row] for row in kept),
            directions=self.directions[kept],
            scale=self.scale[kept],
            calibration=self.calibration.take(kept),
        )

    # Applying

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

    # Combining

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
        self._check_add("scaling", self)
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

        def left(mine: Tensor, theirs: Tensor) -> Tensor:
            unit = theirs / theirs.norm(dim=-1, keepdim=True)
            rest = mine - (mine * unit).sum(dim=-1, keepdim=True) * unit
            # Of parallel vectors only rounding errors are left: not a direction.
            is_noise = rest.norm(dim=-1) <= 1e-6 * mine.norm(dim=-1)
            return torch.where(is_noise[:, None], 0.0, rest)

        return self._combined(other, left, "({} without {})")

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
        self._check_match(other)
        mine, theirs = self.origin, other.origin

        def both(field: str) -> str:
            values = getattr(mine, field), getattr(theirs, field)
            return values[0] if values[0] == values[1] else how.format(*values)

        hashes = tuple(dict.fromkeys(mine.pair_hashes + theirs.pair_hashes))
        fields = {f: both(f) for f in ("method", "dataset", "pairs", "position", "seed")}
        return self._from_rows(
            self.hook_names,
            combine(self.rows, other.rows),
            replace(mine, pair_hashes=hashes, **fields),
            self.calibration.without_boundary(),
            self.condition,
        )

    def _check_match(self, other: "SteeringVector") -> None:
        if self.hook_names != other.hook_names:
            mine, theirs = set(self.hook_names), set(other.hook_names)
            if mine == theirs:
                raise InputError("the vectors have the same hooks in another order: use .at(...)")
            raise InputError(
                "the vectors have other hooks: only the first has "
                f"{', '.join(sorted(mine - theirs)) or 'none'}, only the second "
                f"{', '.join(sorted(theirs - mine)) or 'none'}; take the same part of both with "
                ".at(...), in the same order"
            )
        self._check_add("combining", other)
        if self.d_model != other.d_model:
            raise InputError(f"the vectors have d_model {self.d_model} and {other.d_model}")
        check_same(
            "the first vector was fitted on a model",
            self.weight_processing,
            "that of the second",
            other.weight_processing,
        )
        differences = self.origin.differences(other.origin)
        if differences:
            raise InputError(f"the vectors are of different models: other {'; '.join(differences)}")
        if self.condition != other.condition:
            raise InputError(
                f"the vectors have other conditions: {self.condition} and {other.condition}"
            )

    def _check_add(self, doing: str, other: "SteeringVector") -> None:
        names = {self.operator.name, other.operator.name}
        if names != {Add.name}:
            raise InputError(
                f"{doing} is for vectors that are added, not for {', '.join(sorted(names))}"
            )

    # Files

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the metadata inside.

        Raises:
            InputError: the name does not end in .safetensors, or cannot be written.
        """
        write_named(path, ".safetensors", lambda whole: whole.write_bytes(self.to_bytes()))

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        tensors, record = self.to_record()
        return encode(tensors, record)

    def to_record(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and everything else as plain values."""
        return record_of(self)

    @classmethod
    def from_record(
        cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> "SteeringVector":
        """The inverse of `to_record`.

        Raises:
            InputError: what does not fit.
        """
        try:
            return cls(**fields_of(tensors, record))
        except InputError:
            raise
        except (
            *(KeyError, TypeError, ValueError, RuntimeError, AttributeError),
            OverflowError,
        ) as error:
            raise InputError(
                f"the record of the steering vector does not fit: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path, *, model: HookedModel | None = None) -> "SteeringVector":
        """Read a file written by `save`.

        Args:
            path: of the file.
            model: see that the vector fits it (`check_model`); by default that is not checked.

        Raises:
            InputError: the file cannot be read whole, was changed, or is a pickle.
        """
        path = Path(path)
        try:
            vector = cls.from_record(*decode(path))
        except InputError as error:
            raise InputError(f"cannot load {str(path)!r}: {error}") from error
        if model is not None:
            vector.check_model(model)
        return vector

    def check_model(self, model: HookedModel) -> None:
        """See that the vector fits `model`; warns when weights, tokenizer or template are others.

        Raises:
            InputError: d_model differs, a hook does not exist there, or the model's weights were
                processed in another way.
        """
        if int(model.cfg.d_model) != self.d_model:
            raise InputError(
                f"the vector has d_model {self.d_model}, the model {model.cfg.d_model}; it was "
                f"made on {self.origin.model!r}"
            )
        missing = [name for name in self.touched if name not in model.hook_dict]
        if missing:
            raise InputError(
                f"the model has no hook {', '.join(missing)} (it has {model.cfg.n_layers} layers); "
                f"the vector was made on {self.origin.model!r}"
            )
        check_processing(model, self)
        here = provenance(model, fingerprints=True)
        for difference in self.origin.provenance.differences(here):
            warnings.warn(
                f"the vector was made elsewhere: other {difference}; its effect may be another",
                UserWarning,
                stacklevel=2,
            )

    def describe(self) -> dict[str, str]:
        """Operator, condition, what the boundary was measured with, and the known origin.

        Without the pairs' hashes.
        """
        hidden = (UNKNOWN, self.origin.pair_hashes)
        origin = {n: v for n, v in self.origin.to_dict().items() if v not in hidden}
        together = ", all hooks pushed at once" if self.calibration.is_joint else ""
        return {
            "operator": str(self.operator),
            "condition": str(self.condition),
            "boundary": f"{self.calibration.budget}, on {self.calibration.text} text{together}",
            **origin,
        }
