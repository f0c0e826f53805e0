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

from steerlens.engine.batches import make_batches, rows_per_pass
from steerlens.engine.plan import Plan
from steerlens.engine.slopes import label_slopes
from steerlens.engine.tokenization import SteeredPositions, TokenizedPrompt
from steerlens.engine.workload import Cost
from steerlens.errors import ModelError
from steerlens.loss import Budget
from steerlens.measure.coherence import (
    Coherence,
    Push,
    Reading,
    allowances,
    make_coherence,
    mean_loss,
)
from steerlens.measure.search import (
    FIRST_STEP,
    UNDEFINED,
    Curve,
    Line,
    first_crossings,
    loss_of,
    search,
)
from steerlens.models.hooks import hook_layer
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress, part_of, silent
from steerlens.stats import percentile_interval, resampled_counts
from steerlens.tables import Row

MIN_PROBES = 8
TRUSTED = 0.4
"""A prediction is trusted when it lies within this share of the measured boundary."""


@dataclass(frozen=True)
class Boundary:
    """The boundary along one push; distances from 0, without the push's sign.

    `at` is the boundary, inf beyond the searched range; `low` and `high` its interval; `predicted`
    and `first_order` what slope and curvature at 0 say; `reentry` a distance beyond `at` that was
    seen to be within the budget (NaN when none was); `readings` those on all prompts, by distance;
    `evaluations` every (distance, prompts, loss).
    """

    push: Push
    at: float
    low: float
    high: float
    predicted: float
    first_order: float
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
        return math.isfinite(self.at) and abs(self.predicted / self.at - 1) <= TRUSTED

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
    cost: Cost,
    progress: Progress | None = None,
) -> list[Boundary]:
    """The boundary along every push on one text, each searched up to its limit (residual units).

    `find_boundary` without the pairs: any directions, several at one hook too. `plan` is that of
    the text as positive prompts, with the pushes' hooks checked. `cost` is added to. `progress` is
    told of the prompts whose slopes are taken, the pushes that have settled on the probes, those
    measured on all prompts (which moves some, to be measured again), and the intervals.
    """
    tell = progress or silent
    workload, logprob = plan.prepared.workload, plan.prepared.unsteered.logprob
    allowance = float(allowances(budget, logprob.double().numpy(), np.ones((1, len(prompts))))[0])
    rounding = torch.finfo(plan.model.cfg.dtype).eps
    if allowance < rounding:
        warnings.warn(
            f"the budget {budget} allows {allowance:.2g} nats per token, less than the rounding of "
            f"a {str(plan.model.cfg.dtype).removeprefix('torch.')} model ({rounding:.2g}): the "
            "boundaries are noise; take a larger budget or load the model in float32",
            RuntimeWarning,
            stacklevel=3,
        )
    expected = expect(
        plan.model,
        prompts,
        pushes,
        budget=budget,
        allowance=allowance,
        steered_positions=workload.steered_positions,
        batch_size=plan.prepared.batch_size,
        seed=seed,
        cost=cost,
        progress=tell,
    )
    probes = choose_probes(np.stack([of.slopes for of in expected]), seed)
    coherence = make_coherence(plan, prompts, budget=budget, probes=probes, cost=cost)
    lines = [
        Line(
            Curve(float(of.drops.mean())),
            float(of.drops[list(probes)].mean()),
            allowance,
            limit,
            min(FIRST_STEP * of.predicted, limit),
        )
        for of, limit in zip(expected, limits, strict=True)
    ]
    everyone = np.ones((1, len(prompts)))
    readings: list[dict[float, Reading]] = [{} for _ in pushes]
    evaluations: list[list[tuple[float, int, float]]] = [[] for _ in pushes]

    def evaluate(points: Sequence[tuple[int, float]], on_all: bool) -> list[tuple[float, float]]:
        found = coherence.measure(
            [(pushes[k], c) for k, c in points],
            on_all=on_all,
            cost=cost,
            progress=part_of(tell, "boundary on all prompts: pushes") if on_all else silent,
        )
        losses = []
        for (k, c), reading in zip(points, found, strict=True):
            of_probes = reading.values[list(probes)] if on_all else reading.values
            on_few = float(mean_loss(of_probes, np.ones((1, len(probes))))[0])
            on_every = math.nan
            if on_all:
                on_every = float(mean_loss(reading.values, everyone)[0])
                readings[k][c] = reading
            losses.append((on_few, on_every))
            evaluations[k].append((c, len(reading.values), on_every if on_all else on_few))
        return losses

    settled = part_of(tell, "boundary on probes: pushes settled")
    found = search(lines, evaluate, progress=settled)
    counts = resampled_counts(len(prompts), n_resamples=n_bootstrap, seed=seed)
    boundaries = []
    tell("intervals: pushes", 0, len(pushes))
    for k, (line, of) in enumerate(zip(found, expected, strict=True)):
        if math.isnan(line.at):
            warnings.warn(
                f"the search at {pushes[k].hook_name} (sign {pushes[k].sign:+d}) did not settle: "
                "that boundary is undefined; try another budget or seed",
                RuntimeWarning,
                stacklevel=3,
            )
        low, high = _interval(coherence, line, of.drops, readings[k], counts)
        boundaries.append(
            Boundary(
                push=pushes[k],
                at=line.at,
                low=low,
                high=high,
                predicted=of.predicted,
                first_order=of.first_order,
                reentry=line.reentry(),
                allowance=allowance,
                readings=readings[k],
                evaluations=tuple(evaluations[k]),
            )
        )
        tell("intervals: pushes", len(boundaries), len(pushes))
    return boundaries


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


@dataclass(frozen=True)
class Expected:
    """What gradients at 0 say of one push, outward.

    `slopes` are those of each prompt's logprob, `drops` those of its loss (0 for a divergence,
    which is flat at 0); `predicted` is the boundary of second order, `first_order` that of the
    slope alone (NaN for a divergence).
    """

    slopes: Float[np.ndarray, " prompt"]
    drops: Float[np.ndarray, " prompt"]
    predicted: float
    first_order: float


def expect(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    pushes: Sequence[Push],
    *,
    budget: Budget,
    allowance: float,
    steered_positions: SteeredPositions,
    batch_size: int | None,
    seed: int,
    cost: Cost,
    progress: Progress | None = None,
) -> list[Expected]:
    """Slopes and predicted boundary of every push, from one forward and two backward passes.

    Second order: `drop * c + curvature * c^2 / 2` reaches the allowance. For a 95th percentile the
    divergence of a token is taken to be its mean times a chi-square variable with one degree of
    freedom, whose 95th percentile is 3.84. `cost` is added to. Raises `ModelError` where a
    gradient is not finite.
    """
    along = {(push.hook_name, id(push.direction)): push.direction for push in pushes}
    # A backward pass keeps every block's activations: half as many prompts as a forward pass.
    width = max(len(prompt) for prompt in prompts)
    size = max(1, (batch_size or rows_per_pass(model, width)) // 2)
    found = label_slopes(
        model,
        make_batches(model, prompts, size),
        [(name, direction) for (name, _), direction in along.items()],
        steered_positions=steered_positions,
        seed=seed,
        cost=cost,
        progress=progress,
    )
    index = {key: i for i, key in enumerate(along)}
    expected = []
    for push in pushes:
        row = index[push.hook_name, id(push.direction)]
        if not bool((found.logprob[row] + found.curvature[row]).isfinite().all()):
            raise ModelError(
                f"the gradients at {push.hook_name} are not finite; load the model in float32 or "
                "bfloat16"
            )
        slopes = push.sign * found.logprob[row].double().numpy()
        drops = np.zeros_like(slopes) if budget.is_divergence else -slopes
        bend = float(found.curvature[row].double().mean()) / 2
        if budget.kind in ("kl_p95", "rollout_kl_p95"):
            from scipy.stats import chi2

            bend *= float(chi2.ppf(0.95, 1))
        slope = float(drops.mean())
        first_order = math.nan if budget.is_divergence else first_root(0.0, slope, allowance)
        expected.append(Expected(slopes, drops, first_root(bend, slope, allowance), first_order))
    return expected


def first_root(bend: float, slope: float, allowance: float) -> float:
    """The smallest c > 0 with `slope * c + bend * c^2 = allowance` (bend >= 0), inf if none.

    Examples:
        >>> first_root(bend=0.5, slope=0.0, allowance=0.08)  # sqrt(0.08 / 0.5)
        0.40
        >>> first_root(bend=0.0, slope=-1.0, allowance=0.08)
        inf
    """
    if bend == 0:
        return allowance / slope if slope > 0 else math.inf
    return (math.sqrt(slope**2 + 4 * bend * allowance) - slope) / (2 * bend)


def _interval(
    coherence: Coherence,
    line: Line,
    drop: NDArray[np.float64],
    readings: Mapping[float, Reading],
    counts: NDArray[np.float64],
) -> tuple[float, float]:
    """Bootstrap interval of a boundary: slope, baseline and measured losses of resampled prompts.

    Between and beyond the coefficients measured on all prompts every resample's curve bends as the
    search's own.
    """
    if math.isnan(line.at):
        return math.nan, math.nan
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
