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
from steerlens.loss import Budget
from steerlens.measure.boundary_search import find_boundaries
from steerlens.measure.coherence import Push, check_rollouts
from steerlens.measure.effects import Damage, damages, preference_gaps, unsteered_gaps
from steerlens.models.hooks import readout_hook
from steerlens.progress import Progress, part_of, silent

DOSES = (-1.0, -0.5, 0.5, 1.0)
"""Shares of the coefficient at which the dose-response is measured, beside 0."""


@dataclass(frozen=True)
class CompareSettings:
    """Everything besides model, pairs and items that decides a comparison's numbers."""

    methods: tuple[str, ...]
    budget: str
    on: str
    own_tokens: int
    n_null: int
    margin: float | None
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


@dataclass(frozen=True, eq=False)
class Subject:
    """One direction at one hook: that of a method, or a null of some kind."""

    name: str
    hook_name: str
    direction: Float[Tensor, " d_model"]
    is_null: bool


@dataclass(frozen=True)
class Runner:
    """What every measurement of a comparison shares; methods and nulls come hook by hook.

    `norms` are the hooks' mean residual norms.
    """

    engine: Engine
    settings: CompareSettings
    subjects: tuple[Subject, ...]
    norms: Mapping[str, float]

    @property
    def methods(self) -> tuple[Subject, ...]:
        """The subjects that are no nulls."""
        return tuple(subject for subject in self.subjects if not subject.is_null)

    def calibrate(
        self, prompts: Sequence[TokenizedPrompt], progress: Progress
    ) -> tuple[dict[Subject, float], float]:
        """The coefficient of every subject that spends the budget on `prompts`; what it allows.

        Searched up to `search_range` times the hook's mean residual norm; inf where it lies beyond.
        """
        engine, settings = replace(self.engine, progress=progress), self.settings
        budget = Budget.parse(settings.budget)
        check_rollouts(engine.model, prompts, budget)
        checks = [self._job(subject, (1.0,)) for subject in self.subjects]
        workload = Workload(engine.batches(prompts), (), -1, "all", with_readouts=False)
        readouts = tuple(dict.fromkeys(job.readout for job in checks))
        unsteered = run_baseline(engine, workload, readouts)
        boundaries = find_boundaries(
            make_plan(engine, workload, unsteered, checks),
            prompts,
            [Push(job.hook_name, job.direction, 1, job.readout) for job in checks],
            [settings.search_range * self.norms[subject.hook_name] for subject in self.subjects],
            budget=budget,
            n_bootstrap=0,  # its intervals are not looked at
            seed=settings.seed,
        )
        reached = {
            subject: boundary.at
            for subject, boundary in zip(self.subjects, boundaries, strict=True)
        }
        return reached, boundaries[0].allowance

    def effects(
        self, items: PreferenceItems, reached: Mapping[Subject, float], progress: Progress
    ) -> tuple[Float[np.ndarray, " item"], dict[Subject, Measured]]:
        """The unsteered gaps, and what changes them: every method at all doses, every null once.

        Subjects without a coefficient are left out.
        """
        jobs = {
            subject: self._job(
                subject,
                tuple(dose * reached[subject] for dose in ((1.0,) if subject.is_null else DOSES)),
            )
            for subject in self.subjects
            if math.isfinite(reached[subject])
        }
        unsteered, changes = self._changes(items, jobs, part_of(progress, "effects: cells"))
        return unsteered, {
            subject: Measured(np.array(jobs[subject].coefficients), change)
            for subject, change in changes.items()
        }

    def damages(
        self,
        texts: Mapping[str, Sequence[TokenizedPrompt]],
        reached: Mapping[Subject, float],
        progress: Progress,
    ) -> dict[Subject, dict[str, list[Damage]]]:
        """What every method costs on each text, at its coefficient and at minus it."""
        jobs = self._at_reached(reached, (1.0, -1.0))
        if not jobs:
            return {}
        found: dict[Subject, dict[str, list[Damage]]] = {subject: {} for subject in jobs}
        n_cells = 2 * len(jobs)
        for i, (name, prompts) in enumerate(texts.items()):
            tell = part_of(
                progress, "damage: cells", before=i * n_cells, total=len(texts) * n_cells
            )
            by_job = damages(replace(self.engine, progress=tell), prompts, list(jobs.values()))
            for subject, of_job in zip(jobs, by_job, strict=True):
                found[subject][name] = of_job
        return found

    def mean_effects(
        self, items: PreferenceItems, reached: Mapping[Subject, float], progress: Progress
    ) -> dict[Subject, float]:
        """Every method's mean effect on other items, at its coefficient."""
        tell = part_of(progress, f"effects on {items.name}: cells")
        _, changes = self._changes(items, self._at_reached(reached), tell)
        return {subject: float(change[0].mean()) for subject, change in changes.items()}

    def of_nulls(
        self, effects: Mapping[Subject, Measured], hook_names: Sequence[str]
    ) -> dict[str, Float[np.ndarray, "run hook"]]:
        """The mean effects of the nulls that were run, by kind; NaN without a coefficient."""
        columns: dict[str, dict[str, list[float]]] = {}
        for subject in self.subjects:
            if subject.is_null:
                mean = float(effects[subject].at_full.mean()) if subject in effects else math.nan
                of_kind = columns.setdefault(subject.name, {name: [] for name in hook_names})
                of_kind[subject.hook_name].append(mean)
        return {kind: np.array([*by_hook.values()]).T for kind, by_hook in columns.items()}

    def gap(self, items: PreferenceItems, progress: Progress) -> Float[np.ndarray, " item"]:
        """The unsteered preference gap of every item."""
        return unsteered_gaps(replace(self.engine, progress=progress), items)

    def forward_equivalents(self, items: PreferenceItems) -> float:
        """What was run, in forward passes of the items with both continuations."""
        both = [prompt for side in tokenize_items(self.engine.model, items) for prompt in side]
        one = sum(map(len, both)) * self.engine.n_layers
        return round(self.engine.cost.blocks / one, 3)

    def _changes(
        self, items: PreferenceItems, jobs: Mapping[Subject, Job], progress: Progress
    ) -> tuple[NDArray[np.float64], dict[Subject, NDArray[np.float64]]]:
        """The items' preference gaps, and how every job changes them at each coefficient."""
        if not jobs:
            return self.gap(items, silent), {}
        engine = replace(self.engine, progress=progress)
        unsteered, gaps = preference_gaps(engine, items, list(jobs.values()))
        changes = {job: steered - unsteered for job, steered in zip(jobs, gaps, strict=True)}
        return unsteered, changes

    def _at_reached(
        self, reached: Mapping[Subject, float], doses: Sequence[float] = (1.0,)
    ) -> dict[Subject, Job]:
        return {
            subject: self._job(subject, tuple(dose * reached[subject] for dose in doses))
            for subject in self.methods
            if math.isfinite(reached[subject])
        }

    def _job(self, subject: Subject, coefficients: tuple[float, ...]) -> Job:
        readout = readout_hook(subject.hook_name, self.engine.n_layers)
        return Job(subject.hook_name, subject.direction, coefficients, readout)


def make_subjects(
    hook_names: Sequence[str],
    methods: Mapping[str, Directions],
    nulls: Mapping[str, Sequence[Directions]],
) -> tuple[Subject, ...]:
    """Methods and nulls, hook by hook."""
    every = [(name, directions, False) for name, directions in methods.items()]
    every += [(kind, null, True) for kind, some in nulls.items() for null in some]
    return tuple(
        Subject(name, hook_name, directions[hook_name], is_null)
        for hook_name in hook_names
        for name, directions, is_null in every
    )


def mean_norms(differences: Differences) -> dict[str, float]:
    """The mean norm of both sides' activations at every hook, residual units."""
    both = torch.cat([differences.positive, differences.negative], dim=1)
    norms = both.norm(dim=-1).mean(dim=-1).tolist()
    return dict(zip(differences.all_hook_names, norms, strict=True))
