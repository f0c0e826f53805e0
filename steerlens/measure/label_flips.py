"""Mean differences with the labels of groups flipped: where they would steer, and how far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steerlens.directions.contrast_methods import coin_flips
from steerlens.directions.differences import Differences
from steerlens.engine.engine import Engine
from steerlens.engine.workload import Job
from steerlens.measure.nulls import MIN_CORRELATION
from steerlens.measure.prediction import Linearised
from steerlens.measure.sign_results import SIGNS
from steerlens.models.hooks import readout_hook
from steerlens.stats import rank_p

N_FLIPS = 999
"""Flips whose effects are taken from the gradients."""
N_EXACT = 20
"""Flips that are run: as few as can show a p-value below 0.05."""


@dataclass(frozen=True, eq=False)
class LabelFlips:
    """The mean difference as it is labelled (draw 0), and with whole groups flipped by a coin each.

    What is looked at of a draw is its **weighted effect**: the agreement of its groups times the
    effect at equal damage. The agreement is the length of the mean over that of the groups'
    differences, from 0 to 1; where labels mean nothing it is small, so that a flip that happens to
    hold the concept, though it is as good a unit vector, does not count as one that was fitted.
    Every draw has the layer at which its weighted effect on the choosing items is largest, so that
    choosing among layers is part of what is ranked.
    """

    differences: Differences
    choosing: Linearised
    seed: int

    def at(
        self, hook_name: str
    ) -> tuple[Float[Tensor, "draw d_model"], Float[np.ndarray, " draw"]]:
        """Unit vectors and agreements of all draws at a hook; a draw that cancels is 0."""
        groups = torch.tensor(self.differences.pair_groups)
        rows = self.differences[hook_name].double().cpu()
        sums = torch.zeros(int(groups.max()) + 1, rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, groups, rows)
        means = self._signs @ sums
        agreement: NDArray[np.float64] = (means.norm(dim=1) / sums.norm(dim=1).sum()).numpy()
        return torch.nn.functional.normalize(means, dim=1), np.nan_to_num(agreement)

    @cached_property
    def _signs(self) -> Float[Tensor, "draw group"]:
        n_groups = len(set(self.differences.pair_groups))
        seeds = range(1000 * (self.seed + 1), 1000 * (self.seed + 1) + N_FLIPS)
        drawn = [coin_flips(range(n_groups), seed) for seed in seeds]
        return torch.stack([torch.ones(n_groups, dtype=torch.float64), *drawn])

    def weighted(self, linear: Linearised) -> Float[np.ndarray, "hook draw"]:
        """The weighted effect of every draw on some items, linearised; 0 without a coefficient."""
        # One hook's draws at a time: all of a large model's take gigabytes.
        at_hooks = ((name, *self.at(name)) for name in self.choosing.hook_names)
        return np.stack(
            [
                np.nan_to_num(agreement * linear.effects(name, units).mean(axis=1))
                for name, units, agreement in at_hooks
            ]
        )

    @cached_property
    def chosen(self) -> Int[np.ndarray, " draw"]:
        """The place of every draw's layer among those that it is chosen from."""
        places: NDArray[np.int64] = self.weighted(self.choosing).argmax(axis=0)
        return places

    @property
    def hook_name(self) -> str:
        """The layer of the labels as they are."""
        return self.choosing.hook_names[int(self.chosen[0])]

    def linearised(self, linear: Linearised) -> Float[np.ndarray, " draw"]:
        """The weighted effect of every draw at its own layer, on items that did not choose it."""
        at_own: NDArray[np.float64] = self.weighted(linear)[self.chosen, np.arange(N_FLIPS + 1)]
        return at_own

    def jobs(self, n_layers: int, sign: int) -> list[Job]:
        """The labels as they are and `N_EXACT` flips, each at its layer, at what adds its weighted
        effect with that sign."""
        found = []
        for draw in range(N_EXACT + 1):
            name = self.choosing.hook_names[self.chosen[draw]]
            units, agreement = self.at(name)
            unit = units[draw]
            reached = float(self.choosing.coefficients(name, unit[None])[0] * agreement[draw])
            reached = reached if math.isfinite(reached) else 0.0
            readout = readout_hook(name, n_layers)
            found.append(Job(name, unit.float(), (sign * reached,), readout))
        return found


def rank_among_flips(
    flips: LabelFlips,
    measure: Callable[[Sequence[Job]], Sequence[Float[np.ndarray, "coefficient unit"]]],
    engine: Engine,
    *,
    linear: Linearised | None = None,
    checked: Linearised | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Sign -> the rank of the labels as they are among flips (`rank_p`), each at its own layer.

    And what the nulls were, as columns.

    Flips that were run decide, unless `linear` effects, on the held-out items, correlate with them
    above 0.95 on those of `checked`, which `measure` runs.
    """

    def exact(sign: int) -> Float[np.ndarray, " draw"]:
        by_unit = measure(flips.jobs(engine.n_layers, sign))
        return np.array([float(np.nanmean(of_draw)) for of_draw in by_unit])

    up, correlation = exact(1), math.nan
    if linear is not None and checked is not None:
        # Without the labels as they are, which are no flip and lie far from all others.
        run, seen = up[1:], flips.linearised(checked)[1 : len(up)]
        if run.std() > 0 and seen.std() > 0:
            correlation = float(np.corrcoef(run, seen)[0, 1])
        if correlation > MIN_CORRELATION:
            every = flips.linearised(linear)
            nulls = {"null_by": "linearised", "n_null": N_FLIPS, "null_correlation": correlation}
            return dict.fromkeys(SIGNS, rank_p(float(every[0]), every[1:])), nulls
    # A flip under which nothing is written may have done any harm: it counts as at least as far.
    p_values = {
        sign: rank_p(float(of[0]), np.nan_to_num(of[1:], nan=np.inf))
        for sign, of in zip(SIGNS, (up, exact(-1)), strict=True)
    }
    return p_values, {"null_by": "exact", "n_null": N_EXACT, "null_correlation": correlation}
