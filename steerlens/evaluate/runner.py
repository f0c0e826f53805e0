"""What a comparison runs: coefficients that spend the budget, effects and damage there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.activations import Differences
from steerlens.boundary import check_jobs, check_search
from steerlens.cells import Job
from steerlens.coherence import Push, check_rollouts
from steerlens.directions import Directions
from steerlens.engine import make_plan
from steerlens.evaluate.effects import Damage, damages, preference_gaps, tokenize_items
from steerlens.hooks import readout_hook, resid_post
from steerlens.items import PreferenceItems
from steerlens.models import HookedModel
from steerlens.plain import Cost, Workload, run_baseline
from steerlens.pushes import find_boundaries
from steerlens.tokens import SteeredPositions, TokenizedPrompt, make_batches

Progress = Callable[[str], None]
"""Called with a line of text at every step."""

DOSES = (-1.0, -0.5, 0.5, 1.0)
"""Shares of the coefficient at which the dose-response is measured, beside 0."""

Index = tuple[int, str]
"""Which subject (a method, then the nulls), at which hook."""


@dataclass(frozen=True)
class CompareSettings:
    """Everything besides model, pairs and items that decides a comparison's numbers."""

    methods: tuple[str, ...]
    budget: str
    on: str
    n_null: int
    steered_positions: SteeredPositions
    search_range: float
    n_bootstrap: int
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class Measured:
    """The change of every item's preference gap, at the doses and at the full coefficient."""

    coefficients: Float[np.ndarray, " dose"]
    changes: Float[np.ndarray, "dose item"]

    @property
    def at_full(self) -> Float[np.ndarray, " item"]:
        """At the coefficient itself, the largest."""
        full: NDArray[np.float64] = self.changes[-1]
        return full


@dataclass(frozen=True)
class Runner:
    """What every measurement of a comparison shares."""

    model: HookedModel
    settings: CompareSettings
    cost: Cost

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "steered_positions": self.settings.steered_positions,
            "batch_size": self.settings.batch_size,
            "cost": self.cost,
        }

    def calibrate(
        self,
        prompts: Sequence[TokenizedPrompt],
        hook_names: Sequence[str],
        subjects: Sequence[tuple[str, Directions]],
        differences: Differences,
        progress: Progress,
    ) -> dict[Index, float]:
        """The coefficient of every subject at every hook that spends the budget on `prompts`."""
        model, settings = self.model, self.settings
        budget = check_search(budget=settings.budget, search_range=settings.search_range)
        check_rollouts(model, prompts, budget)
        index = [(i, name) for name in hook_names for i in range(len(subjects))]
        n_layers = int(model.cfg.n_layers)
        pushes = [
            Push(name, subjects[i][1][name], 1, readout_hook(name, n_layers)) for i, name in index
        ]
        norms = mean_norms(differences)
        workload = Workload(
            make_batches(model, prompts, settings.batch_size), (), -1, settings.steered_positions
        )
        readouts = tuple(dict.fromkeys(push.readout for push in pushes))
        unsteered = run_baseline(model, workload, readouts, cost=self.cost)
        plan = make_plan(
            model,
            workload,
            unsteered,
            check_jobs(pushes),
            batch_size=settings.batch_size,
            cost=self.cost,
        )
        found = find_boundaries(
            plan,
            prompts,
            pushes,
            [settings.search_range * norms[name] for _, name in index],
            budget=budget,
            n_bootstrap=2,  # its intervals are not looked at
            seed=settings.seed,
            cost=self.cost,
            progress=progress,
        )
        return {key: boundary.at for key, boundary in zip(index, found, strict=True)}

    def effects(
        self,
        items: PreferenceItems,
        hook_names: Sequence[str],
        subjects: Sequence[tuple[str, Directions]],
        reached: Mapping[Index, float],
        n_methods: int,
    ) -> dict[Index, Measured | None]:
        """Every method at all doses, every null at its coefficient; None without a coefficient."""
        index = [(i, name) for name in hook_names for i in range(len(subjects))]
        usable = [key for key in index if math.isfinite(reached[key])]
        doses = {key: DOSES if key[0] < n_methods else (1.0,) for key in usable}
        jobs = [
            self._job(subjects, key, tuple(d * reached[key] for d in doses[key])) for key in usable
        ]
        if not jobs:
            return dict.fromkeys(index)
        unsteered, gaps = preference_gaps(self.model, items, jobs, **self._options)
        measured: dict[Index, Measured | None] = dict.fromkeys(index)
        for key, job, found in zip(usable, jobs, gaps, strict=True):
            measured[key] = Measured(np.array(job.coefficients), found - unsteered)
        return measured

    def damages(
        self,
        texts: Sequence[TokenizedPrompt],
        hook_names: Sequence[str],
        subjects: Sequence[tuple[str, Directions]],
        reached: Mapping[Index, float],
    ) -> dict[Index, Damage]:
        """What every method costs on neutral text at its coefficient."""
        usable = self._usable(hook_names, subjects, reached)
        jobs = [self._job(subjects, key, (reached[key],)) for key in usable]
        found = damages(self.model, texts, jobs, **self._options) if jobs else []
        return {key: of_job[0] for key, of_job in zip(usable, found, strict=True)}

    def mean_effects(
        self,
        items: PreferenceItems,
        hook_names: Sequence[str],
        subjects: Sequence[tuple[str, Directions]],
        reached: Mapping[Index, float],
    ) -> dict[Index, float]:
        """Every method's mean effect on other items, at its coefficient."""
        usable = self._usable(hook_names, subjects, reached)
        jobs = [self._job(subjects, key, (reached[key],)) for key in usable]
        if not jobs:
            return {}
        unsteered, gaps = preference_gaps(self.model, items, jobs, **self._options)
        return {
            key: float((found[0] - unsteered).mean())
            for key, found in zip(usable, gaps, strict=True)
        }

    def gap(self, items: PreferenceItems) -> Float[np.ndarray, " item"]:
        """The unsteered preference gap of every item."""
        positive, negative = tokenize_items(self.model, items)
        both = (*positive, *negative)
        workload = Workload(make_batches(self.model, both, self.settings.batch_size), (), -1, "all")
        last = resid_post(int(self.model.cfg.n_layers) - 1)
        logprob = run_baseline(self.model, workload, (last,), cost=self.cost).logprob
        values: NDArray[np.float64] = logprob.double().numpy()
        return values[: len(items)] - values[len(items) :]

    def _usable(
        self,
        hook_names: Sequence[str],
        subjects: Sequence[tuple[str, Directions]],
        reached: Mapping[Index, float],
    ) -> list[Index]:
        index = [(i, name) for name in hook_names for i in range(len(subjects))]
        return [key for key in index if math.isfinite(reached[key])]

    def _job(
        self,
        subjects: Sequence[tuple[str, Directions]],
        key: Index,
        coefficients: tuple[float, ...],
    ) -> Job:
        i, name = key
        readout = readout_hook(name, int(self.model.cfg.n_layers))
        return Job(name, subjects[i][1][name], coefficients, readout)


def mean_norms(differences: Differences) -> dict[str, float]:
    """The mean norm of both sides' activations at every hook, residual units."""
    both = torch.cat([differences.positive, differences.negative], dim=1)
    norms = both.norm(dim=-1).mean(dim=-1).tolist()
    return dict(zip(differences.all_hook_names, norms, strict=True))
