"""The coherence boundary along each of many pushes on one text, searched side by side."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from steerlens.engine.engine import Engine
from steerlens.engine.plan import Plan
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.coherence import (
    MeasuredText,
    Push,
    Reading,
    allowances,
    bounded_loss,
    measured_text,
)
from steerlens.measure.prediction import Prediction, predict
from steerlens.measure.search import (
    UNDEFINED,
    Curve,
    Line,
    Place,
    crossing_interval,
    first_crossings,
    interpolated,
    interval_grid,
    loss_of,
    prompt_losses,
    search,
)
from steerlens.models.hooks import hook_layer
from steerlens.stats import percentile_interval, resampled_counts
from steerlens.tables import Row

Line_ = TypeVar("Line_")
_FINE = 1200
_ROUGH = 400
"""Draws that say where an interval ends while the search goes on."""
TRUSTED = 0.4
"""A prediction is trusted when it lies within this share of the measured boundary."""


@dataclass(frozen=True)
class Boundary:
    """The boundary along one push; distances from 0, without the push's sign.

    `at` is the boundary, inf beyond the searched range; `low` and `high` its interval; `prediction`
    what slope and curvature at 0 say; `reentry` a distance beyond `at` that was seen to be within
    the budget (NaN when none was); `readings` by distance; `resampled` gives the boundaries of
    resampled groups, the same for all pushes.
    """

    push: Push
    at: float
    low: float
    high: float
    prediction: Prediction
    reentry: float
    allowance: float
    readings: Mapping[float, Reading]
    resampled: Callable[[], Float[np.ndarray, " resample"]]

    @property
    def nearest(self) -> float:
        """The distance nearest to a finite boundary that was measured."""
        return min(self.readings, key=lambda c: abs(math.log(c / self.at)))

    @property
    def is_trusted(self) -> bool:
        """Whether the prediction lies within 40% of the measured boundary."""
        return math.isfinite(self.at) and abs(self.prediction.boundary / self.at - 1) <= TRUSTED

    def row(self) -> Row:
        """It with its interval and prediction, as tables have them of an angle."""
        return {
            "boundary": self.at,
            "boundary_ci_low": self.low,
            "boundary_ci_high": self.high,
            "predicted_boundary": self.prediction.boundary,
        }

    def rows(self) -> list[Row]:
        """The evaluations as table rows (columns `boundary`), outward."""
        return [
            {
                "hook_name": self.push.hook_name,
                "layer": hook_layer(self.push.hook_name),
                "coefficient": self.push.sign * distance,
                "n_prompts": len(reading.values),
                "loss_nats": reading.loss,
                "allowance_nats": self.allowance,
            }
            for distance, reading in sorted(self.readings.items())
        ]


def find_boundaries(
    plan: Plan,
    prompts: Sequence[TokenizedPrompt],
    pushes: Sequence[Push],
    limits: Sequence[float],
    *,
    budget: Budget,
    n_bootstrap: int,
    seed: int,
    groups: Sequence[int] | None = None,
) -> list[Boundary]:
    """The boundary along every push on one text, each searched up to its limit (residual units).

    `find_boundary` without the pairs: any directions, several at one hook too. `plan` is that of
    the text as positive prompts, with the pushes' hooks checked; intervals go by the prompts'
    `groups` (each its own by default), and are NaN without an `n_bootstrap`. Two pushes along one
    tensor that differ in sign inform each other. Its engine is told of the prompts whose slopes are
    taken, the pushes that have settled, and the intervals.
    """
    engine, logprob = plan.engine, plan.unsteered.logprob.double().numpy()
    allowance = float(allowances(budget, logprob, np.ones((1, len(prompts))))[0])
    _check_rounding(engine, budget, allowance)
    predictions = predict(
        engine,
        prompts,
        pushes,
        budget=budget,
        allowance=allowance,
        steered_positions=plan.workload.steered_positions,
        seed=seed,
    )
    lines = [
        Line(
            Curve(float(prediction.drops.mean())),
            allowance,
            limit,
            prediction.start(limit),
        )
        for prediction, limit in zip(predictions, limits, strict=True)
    ]
    group = np.arange(len(prompts)) if groups is None else np.array(groups)
    measured = _Measured(
        measured_text(plan, prompts, budget),
        pushes,
        predictions,
        opposites(pushes),
        group,
        seed,
        [{} for _ in pushes],
    )
    rough = min(n_bootstrap, _ROUGH)
    lines = search(
        lines,
        measured.evaluate,
        opposite=measured.opposite,
        ends=(lambda k, line: measured.interval(k, line, rough)) if rough else None,
        progress=engine.stage("boundary: pushes settled").progress,
    )
    boundaries = []
    engine.progress("intervals: pushes", 0, len(pushes))
    for k, (line, prediction) in enumerate(zip(lines, predictions, strict=True)):
        low = high = math.nan
        if math.isnan(line.at):
            warnings.warn(
                f"the search at {pushes[k].hook_name} (sign {pushes[k].sign:+d}) did not settle: "
                "that boundary is undefined; try another budget or seed",
                RuntimeWarning,
                stacklevel=3,
            )
        elif n_bootstrap:
            low, high = (end.c for end in measured.interval(k, line, n_bootstrap))
        boundaries.append(
            Boundary(
                push=pushes[k],
                at=line.at,
                low=low,
                high=high,
                prediction=prediction,
                reentry=line.reentry(),
                allowance=allowance,
                readings=measured.readings[k],
                resampled=partial(measured.resampled, k, line, n_bootstrap),
            )
        )
        engine.progress("intervals: pushes", len(boundaries), len(pushes))
    return boundaries


def all_round(n_angles: int, line: Callable[[float], Line_]) -> list[tuple[float, Line_, int]]:
    """Angles spread over the circle (degrees), what `line` makes of each, and the push's sign.

    What lies opposite is the same line with the other sign: the two are searched together.
    """
    angles = [360 * i / n_angles for i in range(n_angles)]
    n_lines = n_angles if n_angles % 2 else n_angles // 2
    lines = [line(angle) for angle in angles[:n_lines]]
    return [(angle, lines[i % n_lines], 1 if i < n_lines else -1) for i, angle in enumerate(angles)]


def opposites(pushes: Sequence[Push]) -> dict[int, int]:
    """Index of a push -> that of the one along the same direction the other way.

    Only of what is added: the slope of another operator is not known, so no curve goes through 0.
    """
    places = {(p.hook_name, id(p.direction), p.sign): k for k, p in enumerate(pushes)}
    found = {
        k: places.get((p.hook_name, id(p.direction), -p.sign))
        for k, p in enumerate(pushes)
        if p.additions
    }
    return {k: other for k, other in found.items() if other is not None}


def _check_rounding(engine: Engine, budget: Budget, allowance: float) -> None:
    dtype = engine.model.cfg.dtype
    rounding = torch.finfo(dtype).eps
    least = torch.finfo(torch.float64).eps
    if allowance < least:
        raise InputError(
            f"the budget {budget} allows {allowance:.2g} nats per token; expected {least:.2g} or "
            "more, as no float tells less apart: take a larger budget"
        )
    if allowance < rounding:
        warnings.warn(
            f"the budget {budget} allows {allowance:.2g} nats per token, less than the rounding of "
            f"a {str(dtype).removeprefix('torch.')} model ({rounding:.2g}): the "
            "boundaries are noise; take a larger budget or load the model in float32",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Measured:
    """What a search has measured of every push."""

    text: MeasuredText
    pushes: Sequence[Push]
    predictions: Sequence[Prediction]
    opposite: Mapping[int, int]
    group: Int[np.ndarray, " prompt"]
    seed: int
    readings: list[dict[float, Reading]]

    def evaluate(self, points: Sequence[tuple[int, float]]) -> list[float]:
        """The loss at each (push, distance)."""
        readings = self.text.measure([(self.pushes[k], c) for k, c in points])
        for (k, c), reading in zip(points, readings, strict=True):
            self.readings[k][c] = reading
        return [reading.loss for reading in readings]

    def interval(self, k: int, line: Line, n_bootstrap: int) -> tuple[Place, Place]:
        """Of a push's boundary; of a percentile over tokens that of resampled prompts."""
        if self.text.is_of_tokens:
            low, high = percentile_interval(self.resampled(k, line, n_bootstrap))
            return Place(low), Place(high)
        return crossing_interval(
            line,
            self.predictions[k].drops,
            np.stack(self._known(k, line), axis=1),
            self._allowed,
            groups=self.group.tolist(),
            seed=self.seed,
            n_bootstrap=n_bootstrap,
        )

    def resampled(self, k: int, line: Line, n_bootstrap: int) -> Float[np.ndarray, " resample"]:
        """The boundaries of resampled groups of prompts, the same groups for every push."""
        if math.isnan(line.at) or not n_bootstrap:
            return np.full(n_bootstrap, math.nan)
        counts = resampled_counts(
            int(self.group.max()) + 1, n_resamples=n_bootstrap, seed=self.seed
        )[:, self.group]
        grid, known, drops = interval_grid(line), self._known(k, line), self.predictions[k].drops
        if not self.text.is_of_tokens:
            every = prompt_losses(line, drops, np.stack(known, axis=1), grid)
            beyond = (every - self._allowed[:, None]).T @ counts.T / counts.sum(axis=1)
            return first_crossings(grid, beyond.T, np.zeros(n_bootstrap))
        # A percentile moves in steps, so that its interval may be narrower than a step of the grid.
        grid = interval_grid(line, _FINE)
        allowed = allowances(self.text.budget, self.text.logprob, counts)
        at = np.array([c for c, _ in line.curve.known])
        losses = np.stack([bounded_loss(values, counts) for values in known])
        bends = np.minimum(losses, UNDEFINED * allowed) / (at**2)[:, None]
        curves = interpolated(grid, at, bends, onward=0.5).T
        return first_crossings(grid, loss_of(0.0, curves, grid, line.curve.ahead[-1][0]), allowed)

    @property
    def _allowed(self) -> Float[np.ndarray, " prompt"]:
        """What each prompt adds to the allowance."""
        logprob = self.text.logprob
        return allowances(self.text.budget, logprob, np.eye(len(logprob)))

    def _known(self, k: int, line: Line) -> list[Float[np.ndarray, "prompt *token"]]:
        """What was read of every prompt at the coefficients that the line's curve knows."""
        ahead, behind = self.readings[k], self.readings[self.opposite.get(k, k)]
        return [ahead[c].values if c > 0 else behind[-c].values for c, _ in line.curve.known]
