"""The numbers of one cell and of one layer, and the checks that come before them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.workload import Baseline, CellOutput
from steerlens.errors import InputError
from steerlens.loss import Budget, coherence_penalty, contrastive_steering_loss_noref
from steerlens.measure.settings import StudySettings
from steerlens.models.hooks import hook_layer
from steerlens.stats import intervals, ratio_interval
from steerlens.steering.coefficients import Coefficient, parse_coefficient
from steerlens.tables import Row
from steerlens.validation import checked


def by_pair(
    cell: CellOutput, unsteered: CellOutput, direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "4 pair"]:
    """What a cell's numbers are made of: projection, its shift, separation, logprob; float64.

    `direction` is the readout hook's unit direction.
    """
    unit = direction.double().cpu()
    positive, difference = cell.positive.double(), cell.positive.double() - cell.negative.double()
    shift = (positive - unsteered.positive.double()) @ unit
    norm = difference.norm(dim=-1)
    return torch.stack([difference @ unit, shift, norm, cell.logprob.double()])


def measure(
    coefficient: float,
    values: Float[Tensor, "4 pair"],
    baseline: Float[Tensor, " pair"],
    settings: StudySettings,
    groups: Sequence[int],
) -> Row:
    """The numbers of one cell (columns `sweep` without the hook's own), from those `by_pair`.

    `baseline` is the unsteered logprob, `groups` the pairs' groups, by which intervals go. Means
    and the loss are over pairs, in float64.
    """
    baseline = baseline.double()
    mean_baseline = float(baseline.mean())
    row: dict[str, Any] = {
        "coefficient": coefficient,
        "n_pairs": len(baseline),
        "n_groups": len(set(groups)),
        "baseline_logprob_nats": mean_baseline,
        "coherent": "no",
    }
    if not bool(values.isfinite().all()):
        warnings.warn(
            f"NaN or inf at coefficient {coefficient:g}: the cell is left undefined",
            RuntimeWarning,
            stacklevel=2,
        )
        return row
    projection, shift, separation, logprob = values
    degradation = baseline - logprob
    penalty = coherence_penalty(logprob, baseline, margin=settings.margin, weight=settings.weight)
    ends = _intervals({"projection": projection, "degradation": degradation}, settings, groups)
    allowance = Budget.parse(settings.budget).allowance(mean_baseline)
    return row | {
        **ends,
        "projection": float(projection.mean()),
        "projection_shift": float(shift.mean()),
        "separation": float(separation.mean()),
        "logprob_nats": float(logprob.mean()),
        "degradation_nats": float(degradation.mean()),
        "coherence_penalty": float(penalty),
        "loss": float(penalty - projection.mean()),
        "coherent": is_within(
            ends["degradation_ci_low"], ends["degradation_ci_high"], allowance=allowance
        ),
    }


def is_within(low: float, high: float, *, allowance: float) -> str:
    """Whether a loss with that interval is within its allowance: yes, no, or undecided.

    Examples:
        >>> [is_within(*ends, allowance=1.0) for ends in [(0.2, 0.9), (1.1, 2.0), (0.9, 1.1)]]
        ['yes', 'no', 'undecided']
    """
    if high <= allowance:
        return "yes"
    return "no" if low > allowance else "undecided"


def layer_row(
    hook_name: str,
    baseline: Baseline,
    direction: Float[Tensor, " d_model"],
    settings: StudySettings,
    groups: Sequence[int],
) -> Row:
    """The per-layer numbers of the unsteered model at one hook (columns `layers`).

    Intervals go by the pairs' `groups`, the same groups drawn for every number.
    """
    cell = baseline.cell(hook_name)
    positive, negative = cell.positive.double(), cell.negative.double()
    differences = positive - negative
    norms = differences.norm(dim=-1)
    projection = differences @ direction.double().cpu()
    loss = contrastive_steering_loss_noref(
        positive,
        negative,
        cell.logprob.double(),
        margin=settings.margin,
        weight=settings.weight,
    )
    by_pair = {
        "separation": norms,
        "projection": projection,
        "agreement": projection / norms,
        "resid_norm": (positive.norm(dim=-1) + negative.norm(dim=-1)) / 2,
    }
    low, high = ratio_interval(
        projection.square().numpy(),
        norms.square().numpy(),
        groups=groups,
        seed=settings.seed,
        n_bootstrap=settings.n_bootstrap,
    )
    return {
        **_intervals(by_pair, settings, groups),
        "explained_variance_ci_low": low,
        "explained_variance_ci_high": high,
        "hook_name": hook_name,
        "layer": hook_layer(hook_name),
        "separation": float(norms.mean()),
        "projection": float(projection.mean()),
        "projection_std": float(projection.std()),
        "agreement": float((projection / norms).mean()),
        "explained_variance": float(projection.square().sum() / norms.square().sum()),
        "resid_norm": float(torch.cat([positive, negative]).norm(dim=-1).mean()),
        "logprob_nats": float(cell.logprob.double().mean()),
        "coherence_penalty": float(loss.coherence_penalty),
        "loss": float(loss.loss),
        "prediction_trusted": False,
        "boundary_on": "none",
    }


def point_rows(
    hook_name: str,
    baseline: Baseline,
    direction: Float[Tensor, " d_model"],
    ids: Sequence[str],
) -> list[Row]:
    """The unsteered differences of the pairs `ids` in a plane (columns `points`), one row a pair.

    The plane is spanned by the direction and `main_orthogonal` of these differences; where nothing
    is left for that, `across` is NaN.
    """
    cell = baseline.cell(hook_name)
    differences = cell.positive.double() - cell.negative.double()
    unit = direction.double().cpu()
    try:
        across = (differences @ main_orthogonal(differences, unit)).tolist()
    except InputError:
        across = [math.nan] * len(ids)
    along, norms = (differences @ unit).tolist(), differences.norm(dim=-1).tolist()
    place = {"hook_name": hook_name, "layer": hook_layer(hook_name)}
    return [
        {**place, "pair": name, "along": x, "across": y, "separation": norm}
        for name, x, y, norm in zip(ids, along, across, norms, strict=True)
    ]


def main_orthogonal(
    differences: Float[Tensor, "pair d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """The unit vector, orthogonal to `direction`, with the largest sum of squared projections.

    `argmax_v sum_i (r_i . v)^2` with `r_i = d_i - (d_i . direction) direction`. The mean projection
    on it is positive; where that is 0, the component that is largest. Raises `InputError` when
    nothing is left of the differences.
    """
    rest = differences - (differences @ direction)[:, None] * direction
    if rest.norm() <= 1e-6 * differences.norm():
        raise InputError(
            "the differences lie along the direction alone, so no plane is left; use other pairs"
        )
    axis: Tensor = torch.linalg.svd(rest, full_matrices=False)[2][0]
    axis = axis - (axis @ direction) * direction
    along = rest @ axis
    # A mean-difference direction fitted on these very pairs leaves a mean of 0 but for rounding.
    leaning = (
        along.mean() if along.mean().abs() > 1e-6 * along.norm() else axis[axis.abs().argmax()]
    )
    sign = -1.0 if float(leaning) < 0 else 1.0
    unit: Tensor = sign * axis / axis.norm()
    return unit


def check_logprob_budget(text: str) -> None:
    """Raise `InputError` for what is no budget of a sweep: one of a KL divergence, too."""
    budget = Budget.parse(text)
    if budget.is_divergence:
        raise InputError(
            f"a sweep measures logprob, so its budget is relative= or nats=, not {budget.kind}=; "
            "find_boundary takes the others"
        )


@checked
def checked_coefficients(coefficients: Sequence[Coefficient]) -> tuple[float | str, ...]:
    """The coefficients, distinct and in order: those in residual units as floats.

    Raises `InputError` when there is none, or one cannot be read.
    """
    distinct = tuple(dict.fromkeys(map(_as_read, coefficients)))
    if not distinct:
        raise InputError("expected at least one coefficient, got none")
    return distinct


def _as_read(coefficient: Coefficient) -> float | str:
    parsed = parse_coefficient(coefficient)
    if parsed.unit == "residual" or parsed.number == 0:
        # Adding 0.0 turns -0.0 into 0.0, so that the unsteered cell is recognised and listed once.
        return parsed.number + 0.0
    is_share = parsed.unit == "boundary"
    return f"{100 * parsed.number:.12g}%" if is_share else f"{parsed.number:.12g} norm"


def as_asked(coefficient: float | str) -> str:
    """It as text: a number with six digits, or with all of them where six do not tell it."""
    if isinstance(coefficient, str):
        return coefficient
    short = f"{coefficient:g}"
    return short if float(short) == coefficient else repr(coefficient)


def _intervals(
    by_pair: Mapping[str, Float[Tensor, " pair"]], settings: StudySettings, groups: Sequence[int]
) -> dict[str, float]:
    """The ends of every mean's interval, by the names of their columns."""
    values = torch.stack([*by_pair.values()]).double().numpy()
    lows, highs = intervals(
        values, groups=groups, seed=settings.seed, n_bootstrap=settings.n_bootstrap
    )
    ends: dict[str, float] = {}
    for name, low, high in zip(by_pair, lows.tolist(), highs.tolist(), strict=True):
        ends |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
    return ends
