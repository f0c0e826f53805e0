"""What a comparison runs: coefficients that spend the budget, effects and damage there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_items
from steerlens.engine.workload import Job, Workload
from steerlens.measure.boundary import check_search
from steerlens.measure.boundary_search import find_boundaries
from steerlens.measure.coherence import Push, check_rollouts
from steerlens.measure.effects import Damage, damages, preference_gaps, unsteered_gaps
from steerlens.models.hooks import readout_hook
from steerlens.progress import Progress, part_of

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
class Subjects:
    """What is compared: methods by name, and nulls by kind, each with a direction at every hook."""

    hook_names: tuple[str, ...]
    methods: Mapping[str, Directions]
    nulls: Mapping[str, Sequence[Directions]]

    def of_methods(self) -> list[Index]:
        """Every method at every hook, method by method."""
        return [(i, hook) for i in range(len(self.methods)) for hook in self.hook_names]

    def of_nulls(self, hook_name: str) -> list[list[Index]]:
        """Every null at a hook, kind by kind."""
        kinds, start = [], len(self.methods)
        for some in self.nulls.values():
            kinds.append([(i, hook_name) for i in range(start, start + len(some))])
            start += len(some)
        return kinds

    def all(self) -> list[Index]:
        """Methods and nulls, hook by hook."""
        n = len(self.methods) + sum(map(len, self.nulls.values()))
        return [(i, hook) for hook in self.hook_names for i in range(n)]

    def name(self, index: Index) -> str:
        """The method's name."""
        return list(self.methods)[index[0]]

    def direction(self, index: Index) -> Float[Tensor, " d_model"]:
        """The direction at the hook."""
        every = [*self.methods.values(), *(one for some in self.nulls.values() for one in some)]
        return every[index[0]][index[1]]


@dataclass(frozen=True)
class Runner:
    """What every measurement of a comparison shares."""

    engine: Engine
    settings: CompareSettings

    def calibrate(
        self,
        prompts: Sequence[TokenizedPrompt],
        subjects: Subjects,
        norms: Mapping[str, float],
        progress: Progress,
    ) -> dict[Index, float]:
        """The coefficient of every subject that spends the budget on `prompts`.

        Searched up to `search_range` times the hook's mean residual norm; inf where it lies beyond.
        """
        engine, settings = replace(self.engine, progress=progress), self.settings
        budget = check_search(budget=settings.budget, search_range=settings.search_range)
        check_rollouts(engine.model, prompts, budget)
        index = subjects.all()
        pushes = [Push(key[1], subjects.direction(key), 1, self._readout(key[1])) for key in index]
        workload = Workload(engine.batches(prompts), (), -1, "all")
        readouts = tuple(dict.fromkeys(push.readout for push in pushes))
        unsteered = run_baseline(engine, workload, readouts)
        checks = [Job(push.hook_name, push.direction, (1.0,), push.readout) for push in pushes]
        boundaries = find_boundaries(
            make_plan(engine, workload, unsteered, checks),
            prompts,
            pushes,
            [settings.search_range * norms[name] for _, name in index],
            budget=budget,
            n_bootstrap=2,  # its intervals are not looked at
            seed=settings.seed,
        )
        return {key: boundary.at for key, boundary in zip(index, boundaries, strict=True)}

    def effects(
        self,
        items: PreferenceItems,
        subjects: Subjects,
        reached: Mapping[Index, float],
        progress: Progress,
    ) -> dict[Index, Measured | None]:
        """Every method at all doses, every null at its coefficient; None without a coefficient."""
        n_methods = len(subjects.methods)
        usable = _usable(subjects.all(), reached)
        doses = {key: DOSES if key[0] < n_methods else (1.0,) for key in usable}
        jobs = [self._job(subjects, k, tuple(d * reached[k] for d in doses[k])) for k in usable]
        measured: dict[Index, Measured | None] = dict.fromkeys(subjects.all())
        if jobs:
            engine = replace(self.engine, progress=part_of(progress, "effects: cells"))
            unsteered, gaps = preference_gaps(engine, items, jobs)
            for key, job, steered in zip(usable, jobs, gaps, strict=True):
                measured[key] = Measured(np.array(job.coefficients), steered - unsteered)
        return measured

    def damages(
        self,
        texts: Sequence[TokenizedPrompt],
        subjects: Subjects,
        reached: Mapping[Index, float],
        progress: Progress,
    ) -> dict[Index, Damage]:
        """What every method costs on neutral text at its coefficient."""
        usable = _usable(subjects.of_methods(), reached)
        jobs = [self._job(subjects, key, (reached[key],)) for key in usable]
        if not jobs:
            return {}
        engine = replace(self.engine, progress=part_of(progress, "damage: cells"))
        by_job = damages(engine, texts, jobs)
        return {key: of_job[0] for key, of_job in zip(usable, by_job, strict=True)}

    def mean_effects(
        self,
        items: PreferenceItems,
        subjects: Subjects,
        reached: Mapping[Index, float],
        progress: Progress,
    ) -> dict[Index, float]:
        """Every method's mean effect on other items, at its coefficient."""
        usable = _usable(subjects.of_methods(), reached)
        jobs = [self._job(subjects, key, (reached[key],)) for key in usable]
        if not jobs:
            return {}
        tell = part_of(progress, f"effects on {items.name}: cells")
        unsteered, gaps = preference_gaps(replace(self.engine, progress=tell), items, jobs)
        return {
            key: float((steered[0] - unsteered).mean())
            for key, steered in zip(usable, gaps, strict=True)
        }

    def gap(self, items: PreferenceItems, progress: Progress) -> Float[np.ndarray, " item"]:
        """The unsteered preference gap of every item."""
        return unsteered_gaps(replace(self.engine, progress=progress), items)

    def forward_equivalents(self, items: PreferenceItems) -> float:
        """What was run, in forward passes of the items with both continuations."""
        both = [prompt for side in tokenize_items(self.engine.model, items) for prompt in side]
        one = sum(map(len, both)) * self.engine.n_layers
        return round(self.engine.cost.blocks / one, 3)

    def _job(self, subjects: Subjects, index: Index, coefficients: tuple[float, ...]) -> Job:
        hook_name = index[1]
        return Job(hook_name, subjects.direction(index), coefficients, self._readout(hook_name))

    def _readout(self, hook_name: str) -> str:
        return readout_hook(hook_name, self.engine.n_layers)


def _usable(index: Sequence[Index], reached: Mapping[Index, float]) -> list[Index]:
    return [key for key in index if math.isfinite(reached[key])]


def mean_norms(differences: Differences) -> dict[str, float]:
    """The mean norm of both sides' activations at every hook, residual units."""
    both = torch.cat([differences.positive, differences.negative], dim=1)
    norms = both.norm(dim=-1).mean(dim=-1).tolist()
    return dict(zip(differences.all_hook_names, norms, strict=True))
