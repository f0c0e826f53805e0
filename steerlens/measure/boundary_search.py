"""The coherence boundary along each of many pushes on one text, searched side by side."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.engine.engine import Engine
from steerlens.engine.plan import Plan
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.coherence import (
    Coherence,
    Push,
    Reading,
    allowances,
    make_coherence,
    mean_loss,
)
from steerlens.measure.prediction import Prediction, predict
from steerlens.measure.search import (
    UNDEFINED,
    Curve,
    Line,
    crossing_interval,
    first_crossings,
    loss_of,
    search,
)
from steerlens.models.hooks import hook_layer
from steerlens.progress import silent
from steerlens.stats import percentile_interval, resampled_counts
from steerlens.tables import Row

MIN_PROBES = 8
TRUSTED = 0.4
"""A prediction is trusted when it lies within this share of the measured boundary."""


@dataclass(frozen=True)
class Boundary:
    """The boundary along one push; distances from 0, without the push's sign.

    `at` is the boundary, inf beyond the searched range; `low` and `high` its interval; `prediction`
    what slope and curvature at 0 say; `reentry` a distance beyond `at` that was
    seen to be within the budget (NaN when none was); `readings` those on all prompts, by distance;
    `evaluations` every (distance, prompts, loss).
    """

    push: Push
    at: float
    low: float
    high: float
    prediction: Prediction
    reentry: float
    allowance: float
    readings: Mapping[float, Reading]
    evaluations: tuple[tuple[float, int, float], ...]

    @property
    def nearest(self) -> float:
        """The distance nearest to a finite boundary that was measured on all prompts."""
        return min(self.readings, key=lambda c: abs(math.log(c / self.at)))

    @property
    def read_at_nearest(self) -> Float[Tensor, "prompt d_model"]:
        """The readout of every prompt there; of width 0 under a rollout budget."""
        return self.readings[self.nearest].readout

    @property
    def is_trusted(self) -> bool:
        """Whether the prediction lies within 40% of the measured boundary."""
        return math.isfinite(self.at) and abs(self.prediction.boundary / self.at - 1) <= TRUSTED

    def rows(self) -> list[Row]:
        """The evaluations as table rows (`BOUNDARY_COLUMNS`), outward."""
        return [
            {
                "hook_name": self.push.hook_name,
                "layer": hook_layer(self.push.hook_name),
                "coefficient": self.push.sign * distance,
                "n_prompts": n_prompts,
                "loss_nats": loss,
                "allowance_nats": self.allowance,
            }
            for distance, n_prompts, loss in sorted(self.evaluations)
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
    `groups` (each its own by default). Its engine is told of the prompts
    whose slopes are taken, the pushes that have settled on the probes, those measured on all
    prompts (which moves some, to be measured again), and the intervals.
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
    probes = choose_probes(np.stack([prediction.slopes for prediction in predictions]), seed)
    coherence = make_coherence(plan, prompts, budget=budget, probes=probes)
    lines = [
        Line(
            Curve(float(prediction.drops.mean())),
            float(prediction.drops[list(probes)].mean()),
            allowance,
            limit,
            prediction.start(limit),
        )
        for prediction, limit in zip(predictions, limits, strict=True)
    ]
    measured = _Measured(coherence, pushes, [{} for _ in pushes], [[] for _ in pushes])
    settled = engine.stage("boundary on probes: pushes settled").progress
    lines = search(lines, measured.evaluate, progress=settled)
    group = np.arange(len(prompts)) if groups is None else np.array(groups)
    allowed = allowances(budget, logprob, np.eye(len(logprob)))
    counts = resampled_counts(int(group.max()) + 1, n_resamples=n_bootstrap, seed=seed)[:, group]
    boundaries = []
    engine.progress("intervals: pushes", 0, len(pushes))
    for k, (line, prediction) in enumerate(zip(lines, predictions, strict=True)):
        if math.isnan(line.at):
            warnings.warn(
                f"the search at {pushes[k].hook_name} (sign {pushes[k].sign:+d}) did not settle: "
                "that boundary is undefined; try another budget or seed",
                RuntimeWarning,
                stacklevel=3,
            )
        readings = measured.readings[k]
        if math.isnan(line.at):
            low = high = math.nan
        elif coherence.is_of_tokens:
            low, high = _percentiles(coherence, line, prediction.drops, readings, counts)
        else:
            low, high = crossing_interval(
                line,
                prediction.drops,
                np.stack([readings[c].values for c, _ in line.curve.full], axis=1),
                allowed,
                groups=group.tolist(),
                seed=seed,
                n_bootstrap=n_bootstrap,
            )
        boundaries.append(
            Boundary(
                push=pushes[k],
                at=line.at,
                low=low,
                high=high,
                prediction=prediction,
                reentry=line.reentry(),
                allowance=allowance,
                readings=readings,
                evaluations=tuple(measured.evaluations[k]),
            )
        )
        engine.progress("intervals: pushes", len(boundaries), len(pushes))
    return boundaries


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
    """What a search has measured of every push: readings on all prompts, and every loss."""

    coherence: Coherence
    pushes: Sequence[Push]
    readings: list[dict[float, Reading]]
    evaluations: list[list[tuple[float, int, float]]]

    def evaluate(
        self, points: Sequence[tuple[int, float]], on_all: bool
    ) -> list[tuple[float, float]]:
        """The loss on the probes and, with `on_all`, on all prompts at each (push, distance)."""
        coherence, probes = self.coherence, list(self.coherence.probes)
        engine = coherence.on_all.engine
        tell = engine.stage("boundary on all prompts: pushes").progress if on_all else silent
        readings = coherence.measure(
            [(self.pushes[k], c) for k, c in points], on_all=on_all, progress=tell
        )
        losses = []
        for (k, c), reading in zip(points, readings, strict=True):
            of_probes = reading.values[probes] if on_all else reading.values
            on_few = float(mean_loss(of_probes, np.ones((1, len(probes))))[0])
            on_every = math.nan
            if on_all:
                everyone = np.ones((1, len(reading.values)))
                on_every = float(mean_loss(reading.values, everyone)[0])
                self.readings[k][c] = reading
            losses.append((on_few, on_every))
            loss = on_every if on_all else on_few
            self.evaluations[k].append((c, len(reading.values), loss))
        return losses


def choose_probes(slopes: Float[np.ndarray, "push prompt"], seed: int) -> tuple[int, ...]:
    """A quarter of the prompts, 8 at least, whose mean slopes are nearest to those of all prompts.

    The best of 500 random draws, slopes scaled to their spread over prompts.
    """
    n_prompts = slopes.shape[1]
    size = max(MIN_PROBES, math.ceil(n_prompts / 4))
    if size >= n_prompts:
        return tuple(range(n_prompts))
    spread = slopes.std(axis=1, keepdims=True)
    scaled = np.divide(slopes, spread, out=np.zeros_like(slopes), where=spread > 0)
    target = scaled.mean(axis=1)
    generator = np.random.default_rng(seed)
    draws = [np.sort(generator.permutation(n_prompts)[:size]) for _ in range(500)]
    misses = [float(np.square(scaled[:, rows].mean(axis=1) - target).sum()) for rows in draws]
    return tuple(int(row) for row in draws[int(np.argmin(misses))])


def _percentiles(
    coherence: Coherence,
    line: Line,
    drop: NDArray[np.float64],
    readings: Mapping[float, Reading],
    counts: NDArray[np.float64],
) -> tuple[float, float]:
    """Interval of a boundary that bounds a percentile of tokens: those of resampled prompts.

    Between and beyond the coefficients measured on all prompts every resample's curve bends as the
    search's own.
    """
    # From 0 on: a resample may cross before any of the points between which the others are.
    grid = np.append(0.0, np.geomspace(min(line.at, line.limit) / 200, line.limit, 1200))
    distances = np.array([c for c, _ in line.curve.full])
    slopes = counts @ drop / counts.sum(axis=1)
    allowed = allowances(coherence.budget, coherence.logprob, counts)
    losses = np.stack([mean_loss(readings[c].values, counts) for c in distances], axis=1)
    losses = np.minimum(losses, UNDEFINED * allowed[:, None])
    bends = (losses - slopes[:, None] * distances) / distances**2
    weights = np.stack([np.interp(grid, distances, unit) for unit in np.eye(len(distances))])
    curves = line.curve.bend(grid) + (bends - line.curve.bend(distances)) @ weights
    losses = loss_of(slopes[:, None], curves, grid, line.curve.probes[-1][0])
    boundaries = first_crossings(grid, losses, allowed)
    return percentile_interval(boundaries)
