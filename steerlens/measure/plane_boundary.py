"""The shape of the coherence boundary in a plane: one boundary an angle."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.engine.plan import make_plan
from steerlens.engine.tokenization import SteeredPositions, fingerprint, tokenize_pairs
from steerlens.engine.workload import Cost, make_workload
from steerlens.errors import InputError, whole
from steerlens.loss import Budget
from steerlens.measure.boundary import (
    On,
    check_jobs,
    check_text_positions,
    checked_settings,
    text_name,
    text_prompts,
    text_workload,
)
from steerlens.measure.coherence import Push, check_rollouts
from steerlens.measure.pushes import Boundary, find_boundaries
from steerlens.measure.rows import check_width, main_orthogonal, record
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resolve_hooks
from steerlens.models.loading import HookedModel
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress
from steerlens.tables import SHAPE_COLUMNS, Row, fragment, hook_label, measured, to_frame


@dataclass(frozen=True)
class BoundaryShape:
    """`table` has one row an angle (`SHAPE_COLUMNS`) in the plane of two unit vectors.

    `direction` is the frozen direction (0 degrees), `orthogonal` the main direction of what is left
    of the pairs' differences without it (90 degrees). `attrs["radius_ratio"]` is the largest
    boundary over the smallest: 1 for a circle, inf when an angle's is beyond the searched range,
    NaN when all are or one is undefined.
    """

    table: pd.DataFrame
    direction: Float[Tensor, " d_model"]
    orthogonal: Float[Tensor, " d_model"]

    @property
    def hook_name(self) -> str:
        """The hook of the plane."""
        return str(self.table.hook_name.iloc[0])

    @property
    def axes(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """`direction` and `orthogonal`."""
        return self.direction, self.orthogonal

    def at(self, angle: float) -> Float[Tensor, " d_model"]:
        """The unit vector `cos(angle) * direction + sin(angle) * orthogonal`; angle in degrees."""
        return turned(self.direction, self.orthogonal, angle)

    def __repr__(self) -> str:
        ratio = self.table.attrs["radius_ratio"]
        return f"BoundaryShape({len(self.table)} angles, radius ratio {ratio:.3g})"

    def _repr_html_(self) -> str:
        names = ["angle", "boundary", "boundary_ci_low", "boundary_ci_high", "predicted_boundary"]
        table = self.table[names].rename(columns=lambda name: name.replace("_", " "))
        about = [repr(self), f"layer {hook_label(self.hook_name)}", *measured(self.table.attrs)]
        return fragment(about, table, note="residual units; inf is not reached")


def boundary_shape(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layer: Layers,
    n_angles: int = 16,
    on: On = "positive",
    budget: str = "relative=0.01",
    steered_positions: SteeredPositions = "all",
    search_range: float | int = 4.0,
    n_bootstrap: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> BoundaryShape:
    """The boundary at one hook, along `n_angles` directions spread evenly over a plane.

    The plane is spanned by the frozen direction and the first principal axis (uncentred) of the
    pairs' differences at that hook once their part along the direction is taken off. At angle a the
    text runs with `c * (cos(a) * direction + sin(a) * orthogonal)` added, c > 0, in residual units.
    Search, intervals and `on` as in `find_boundary`, whose `boundary_pos` is the row at 0 degrees
    and `-boundary_neg` that at 180 (estimated again, with other probes). Raises as `find_boundary`,
    `InputError` when `layer` names more than one hook or there are fewer than 3 angles, and
    `InputError` when nothing is left of the differences.

    Examples:
        >>> shape = sl.boundary_shape(
        ...     model, pairs, directions, layer=1, n_angles=4, budget="kl=0.1"
        ... )
        >>> shape.table.angle.tolist()
        [0.0, 90.0, 180.0, 270.0]
    """
    hook_names = resolve_hooks(model, layer)
    check_plane(hook_names, n_angles)
    (hook_name,) = hook_names
    if hook_name not in directions:
        raise InputError(f"no direction was fitted at {hook_name}; fit one there")
    check_processing(model, directions)
    settings = checked_settings(
        hook_names=hook_names,
        on=text_name(on),
        budget=budget,
        position=directions.position,
        steered_positions=steered_positions,
        search_range=search_range,
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    wide = directions[hook_name].dtype
    direction = directions[hook_name].double()
    if len(direction) != int(model.cfg.d_model):
        raise InputError(
            f"the direction has d_model {len(direction)}, this model {int(model.cfg.d_model)}; fit "
            "it on this model"
        )
    differences = collect_differences(
        model,
        pairs,
        layers=[hook_name],
        position=directions.position,
        batch_size=batch_size,
        progress=progress,
    )
    orthogonal = main_orthogonal(differences[hook_name].double(), direction)
    limit = settings.search_range * float(
        torch.cat([differences.positive[0], differences.negative[0]]).norm(dim=-1).mean()
    )
    readout = readout_hook(hook_name, int(model.cfg.n_layers))
    angles = [360 * i / n_angles for i in range(n_angles)]
    pushes = [
        Push(hook_name, turned(direction, orthogonal, angle).to(wide), 1, readout)
        for angle in angles
    ]
    tokenized = tokenize_pairs(model, pairs)
    prompts = text_prompts(model, on, tokenized)
    check_text_positions(steered_positions, on, prompts)
    check_rollouts(model, prompts, Budget.parse(budget))
    cost = Cost()
    for prompt in (*tokenized.positive, *tokenized.negative):
        cost.blocks += len(prompt.prompt) * int(model.cfg.n_layers)  # the differences
    workload = make_workload(
        model, tokenized, position=-1, steered_positions=steered_positions, batch_size=batch_size
    )
    text, unsteered = text_workload(
        model, prompts, workload, (readout,), batch_size=batch_size, cost=cost, progress=progress
    )
    check_width(directions, unsteered)
    plan = make_plan(
        *(model, text, unsteered, check_jobs(pushes)),
        batch_size=batch_size,
        cost=cost,
        progress=progress,
    )
    found = find_boundaries(
        plan,
        prompts,
        pushes,
        [limit] * n_angles,
        budget=Budget.parse(settings.budget),
        n_bootstrap=n_bootstrap,
        seed=seed,
        cost=cost,
        progress=progress,
    )
    reach = [boundary.at for boundary in found]
    attrs = {
        **record(model, pairs, directions, asdict(settings), workload=workload, cost=cost),
        "searched": limit,
        "text": fingerprint(prompts),
        "radius_ratio": _ratio(reach),
    }
    rows = [_row(hook_name, angle, of) for angle, of in zip(angles, found, strict=True)]
    return BoundaryShape(
        to_frame(rows, SHAPE_COLUMNS, attrs), direction.to(wide), orthogonal.to(wide)
    )


def _ratio(reach: Sequence[float]) -> float:
    """The largest over the smallest; NaN when all are infinite or one is undefined."""
    if math.isinf(min(reach)) or any(math.isnan(r) for r in reach):
        return math.nan
    return max(reach) / min(reach)


def check_plane(hook_names: Sequence[str], n_angles: Any) -> None:
    """Raise `InputError` when there is not one hook, or too few angles for a shape."""
    if len(hook_names) != 1:
        raise InputError(f"a shape is that of one hook, not of {len(hook_names)}; name one layer")
    whole("n_angles", n_angles, 3)


def turned(
    direction: Float[Tensor, " d_model"], orthogonal: Float[Tensor, " d_model"], angle: float
) -> Float[Tensor, " d_model"]:
    """The direction turned by an angle (degrees) towards the orthogonal one: a unit vector.

    Computed in float64, of the direction's dtype.
    """
    turn = math.radians(angle)
    vector: Tensor = math.cos(turn) * direction.double() + math.sin(turn) * orthogonal.double()
    return vector.to(direction.dtype)


def _row(hook_name: str, angle: float, boundary: Boundary) -> Row:
    along, across = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return {
        "hook_name": hook_name,
        "layer": hook_layer(hook_name),
        "angle": angle,
        "boundary": boundary.at,
        "boundary_ci_low": boundary.low,
        "boundary_ci_high": boundary.high,
        "x": boundary.at * along if math.isfinite(boundary.at) else math.nan,
        "y": boundary.at * across if math.isfinite(boundary.at) else math.nan,
        "predicted_boundary": boundary.predicted,
    }
