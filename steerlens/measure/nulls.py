"""What vectors that cannot know the labels do at equal damage, and a method's rank among them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.directions.methods import Evidence, fit_directions, method_of
from steerlens.errors import InputError
from steerlens.measure.prediction import Linearised
from steerlens.stats import TAIL, least_max_rank_p, max_rank_p, rank_p
from steerlens.tables import Row

N_SCREENED = 999
"""Nulls of each kind whose effects are taken from the gradients."""
MIN_CORRELATION = 0.95
MIN_EXACT = 20
"""Vectors of which exact and linearised effects are compared, at least."""
N_REFITS = 50


def null_columns(
    how: Sequence[str],
    hook_names: Sequence[str],
    seen: Float[np.ndarray, " hook"],
    draws: Mapping[str, Float[np.ndarray, "draw hook"]],
) -> dict[str, Row]:
    """Hook name -> p-values and the nulls' range there; the kind that is harder decides.

    `least_p` is the smallest `p_layers` that so many nulls could give. NaN where no null of one
    kind reaches the budget.

    Args:
        how: Whether what was seen and its nulls are "linearised" or "exact", hook by hook.
        hook_names: Those of one method.
        seen: What was seen there.
        draws: The same of nulls by kind (random, shuffled), NaN where one does not reach the budget
            or is not run.
    """
    over_hooks, least = (
        np.max([ranked(seen, of_kind) for of_kind in draws.values()], axis=0)
        for ranked in (max_rank_p, least_max_rank_p)
    )
    rows: dict[str, Row] = {}
    for i, name in enumerate(hook_names):
        kinds = [of_kind[:, i] for of_kind in draws.values()]
        kinds = [of_kind[~np.isnan(of_kind)] for of_kind in kinds]
        ends = [np.quantile(k, [TAIL, 1 - TAIL]) if len(k) else [math.nan] * 2 for k in kinds]
        rows[name] = {
            "null_by": how[i],
            "n_null": min(map(len, kinds)),
            "null_low": float(np.min([low for low, _ in ends])),
            "null_high": float(np.max([high for _, high in ends])),
            "p_value": float(np.max([rank_p(float(seen[i]), kind) for kind in kinds])),
            "p_layers": float(over_hooks[i]),
            "least_p": float(least[i]),
        }
    return rows


@dataclass(frozen=True, eq=False)
class Screen:
    """Nulls run exactly, and many more of which the effects are taken from the gradients.

    `exact` are the mean effects of the nulls that were run, by kind, NaN where one did not reach
    the budget; `vectors` all that are drawn, by kind, the ones that were run first.
    """

    linear: Linearised
    exact: Mapping[str, Float[np.ndarray, "run hook"]]
    vectors: Mapping[str, Float[Tensor, "draw hook d_model"]]

    @cached_property
    def screened(self) -> Mapping[str, Float[np.ndarray, "draw hook"]]:
        """The linearised mean effects of all nulls, by kind."""
        at_hooks = [*enumerate(self.linear.hook_names)]
        return {
            kind: np.stack([self.effects(name, rows[:, i]) for i, name in at_hooks], axis=1)
            for kind, rows in self.vectors.items()
        }

    def effects(
        self, hook_name: str, vectors: Float[Tensor, "vector d_model"]
    ) -> Float[np.ndarray, " vector"]:
        """The linearised mean effects of unit vectors."""
        mean: NDArray[np.float64] = self.linear.effects(hook_name, vectors).mean(axis=1)
        return mean

    @cached_property
    def correlation(self) -> dict[str, float]:
        """Hook name -> Pearson's r of exact and linearised effects of the nulls that were run.

        NaN where fewer than 20 of them reached the budget.
        """
        found = {}
        for i, name in enumerate(self.linear.hook_names):
            exact = np.concatenate([rows[:, i] for rows in self.exact.values()])
            linear = np.concatenate(
                [rows[: len(self.exact[kind]), i] for kind, rows in self.screened.items()]
            )
            known = np.isfinite(exact) & np.isfinite(linear)
            exact, linear = exact[known], linear[known]
            enough = len(exact) >= MIN_EXACT and exact.std() > 0 and linear.std() > 0
            found[name] = float(np.corrcoef(exact, linear)[0, 1]) if enough else math.nan
        return found

    def is_linear(self, hook_name: str) -> bool:
        """Whether linearised effects may stand for exact ones at a hook."""
        return self.correlation[hook_name] > MIN_CORRELATION

    def columns(
        self, directions: Mapping[str, Tensor], exact: Mapping[str, float]
    ) -> dict[str, Row]:
        """Hook name -> how one method ranks among the nulls there (`null_columns`).

        Where linearised effects stand for exact ones, the method's own is linearised too. The
        maximum over layers is over all hooks that have an effect.
        """
        names = tuple(exact)
        if not names:
            return {}
        is_linear = [self.is_linear(name) for name in names]
        seen = [
            float(self.effects(name, directions[name][None])[0]) if linear else exact[name]
            for name, linear in zip(names, is_linear, strict=True)
        ]
        at = [self.linear.hook_names.index(name) for name in names]
        draws = {}
        for kind, screened in self.screened.items():
            run = np.full_like(screened, math.nan)
            run[: len(self.exact[kind])] = self.exact[kind]
            draws[kind] = np.where(is_linear, screened[:, at], run[:, at])
        how = ["linearised" if linear else "exact" for linear in is_linear]
        return null_columns(how, names, np.array(seen), draws)

    def refits(
        self,
        evidence: Evidence | None,
        method: str,
        *,
        groups: Sequence[int],
        seed: int,
    ) -> dict[str, Float[np.ndarray, " refit"]]:
        """Hook name -> the mean effect of every refit of a method, linearised.

        Each refit has as many groups of pairs, drawn with replacement, the same for every method.
        Only hooks where linearised effects may stand for exact ones, and methods that are fitted
        from the pairs' rows alone: not controls, not trained ones, not gradients on an axis, which
        is itself fitted on the pairs. Empty where a refit fails or all pairs are of one group, and
        without the hooks at which a refit spends no budget.
        """
        chosen = method_of(method)
        names = [name for name in self.linear.hook_names if self.is_linear(name)]
        number = np.array(groups)
        members = [np.flatnonzero(number == g) for g in range(int(number.max()) + 1)]
        is_held = chosen.is_control or chosen.axis is not None
        if evidence is None or is_held or not names or len(members) < 2:
            return {}
        generator = np.random.default_rng(seed)
        refitted: dict[str, list[Tensor]] = {name: [] for name in names}
        for _ in range(N_REFITS):
            drawn = generator.integers(0, len(members), len(members))
            rows = torch.from_numpy(np.concatenate([members[g] for g in drawn]))
            try:
                directions = fit_directions(evidence.part(names, rows), method=method)
            except InputError:  # nothing is left of these pairs
                return {}
            for name in names:
                refitted[name].append(directions[name])
        effects = {name: self.effects(name, torch.stack(rows)) for name, rows in refitted.items()}
        return {name: values for name, values in effects.items() if np.isfinite(values).all()}
