"""From measured effects to rows: intervals, p-values, verdicts, methods against each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.measure.equal_damage import CompareSettings, Measured
from steerlens.stats import (
    TAIL,
    effective_groups,
    flip_p,
    interval,
    percentile_interval,
    refit_spread,
    resampled_counts,
    smallest_effect,
)
from steerlens.tables import COLUMNS, Row, to_frame

LEVEL = 0.05
"""A claim's p-value is below it."""
PROMPT = "prompt"
"""The method's name of the baseline: the positive persona written into the prompt."""
REFERENCE = "mean_diff"
"""The method that the others are compared with, item by item."""
CHOSEN = "chosen"
ENDS = ("_ci_low", "_ci_high")
Refits = Float[np.ndarray, " refit"]
"""Mean effects of a direction that is fitted again on resampled groups of pairs."""


@dataclass(frozen=True)
class Inference:
    """What intervals and verdicts of a comparison need besides the effects.

    `groups` are those of the held-out items, `fitted_groups` those of the pairs that the directions
    are fitted on, `margin` the effect (nats per token) that is too small to matter.
    """

    settings: CompareSettings
    groups: tuple[int, ...]
    fitted_groups: tuple[int, ...]
    margin: float

    @property
    def n_fitted(self) -> float:
        """As how many groups of one size those of the pairs are."""
        return effective_groups(self.fitted_groups)

    def interval(
        self, changes: Float[np.ndarray, " item"], refits: Refits | None = None
    ) -> tuple[float, float]:
        """The 95% interval of the mean change, with what refits on resampled pairs move it by.

        The two are independent, so their halves add as the roots of sums of squares do; that of the
        refits is their standard deviation times Student's t (`refit_spread`).
        """
        from scipy.stats import t

        settings, mean = self.settings, float(changes.mean())
        low, high = interval(
            changes, groups=self.groups, seed=settings.seed, n_bootstrap=settings.n_bootstrap
        )
        if refits is None:
            return low, high
        (spread,), df = refit_spread(refits[None], self.n_fitted)
        half = float(t.ppf(1 - TAIL, df) * spread)
        return mean - math.hypot(mean - low, half), mean + math.hypot(high - mean, half)


def effect_columns(measured: Measured, inference: Inference, refits: Refits | None = None) -> Row:
    """Effect, its interval and what it could have shown, dose-response, of one method at one hook.

    NaN where the logprob of some item overflows at some dose.
    """
    if not np.isfinite(measured.changes).all():
        return {"effect": math.nan}
    effect = float(measured.at_full.mean())
    low, high = inference.interval(measured.at_full, refits)
    n_groups = len(set(inference.groups))
    smallest = smallest_effect(low, high, n_groups)
    over_items = smallest_effect(*inference.interval(measured.at_full), n_groups)
    # What more items cannot make smaller is that of the pairs.
    left = effect**2 - (smallest**2 - over_items**2)
    doses = np.append(measured.coefficients, 0.0)
    order = doses.argsort()
    curves = np.vstack([measured.changes, np.zeros_like(measured.changes[:1])])[order]
    doses = doses[order]
    centred = doses - doses.mean()
    slopes = centred @ curves / (centred @ centred)
    return {
        "effect": effect,
        "effect_ci_low": low,
        "effect_ci_high": high,
        "interval_over": _interval_over(refits),
        "smallest_effect": smallest,
        "groups_needed": math.ceil(n_groups * over_items**2 / left) if left > 0 else math.nan,
        "slope": float(slopes.mean()),
        "anti_steerable": float((slopes < 0).mean()),
        "spearman": _mean_spearman(doses, curves),
        "monotone": float((np.diff(curves, axis=0) > 0).all(axis=0).mean()),
    }


def prompt_row(change: Float[np.ndarray, " item"], inference: Inference) -> Row:
    """The row of the baseline that writes the persona into the prompt."""
    low, high = inference.interval(change)
    return {
        "method": PROMPT,
        "hook_name": "none",
        "layer": -1,
        "n_items": len(change),
        "n_groups": len(set(inference.groups)),
        "n_null": 0,
        "null_by": "none",
        "effect": float(change.mean()),
        "effect_ci_low": low,
        "effect_ci_high": high,
        "interval_over": "items",
        "is_chosen": False,
        "layer_choice": "none",
        "verdict": "baseline",
    }


def _mean_spearman(doses: NDArray[np.float64], curves: NDArray[np.float64]) -> float:
    """The mean over items whose gap changes at all; NaN where none does."""
    from scipy.stats import spearmanr

    changing = [curve for curve in curves.T if np.ptp(curve) > 0]
    found = [float(spearmanr(doses, curve).statistic) for curve in changing]
    return float(np.mean(found)) if found else math.nan


def with_verdicts(rows: Sequence[Row], inference: Inference) -> list[Row]:
    """The rows with the chosen layer of each method, and a verdict in place of `least_p`."""
    is_chosen = np.zeros(len(rows), dtype=bool)
    for method in dict.fromkeys(row["method"] for row in rows):
        of = np.array([i for i, row in enumerate(rows) if row["method"] == method])
        on_train = np.array([float(rows[i]["train_effect"]) for i in of])
        if not np.isnan(on_train).all():
            is_chosen[of[int(np.nanargmax(on_train))]] = True
    return [
        {
            **{name: value for name, value in row.items() if name != "least_p"},
            "is_chosen": bool(chosen),
            "verdict": verdict(row, inference),
        }
        for row, chosen in zip(rows, is_chosen, strict=True)
    ]


def verdict(row: Row, inference: Inference) -> str:
    """What can be said of a row's effect.

    "equivalent to no effect": the whole interval is within the margin. "effect", "reversed": it is
    off 0, and fewer than 1 in 20 nulls move as much at the best of their layers. "no more than a
    null": it is off 0, and nulls move as much. "too few groups": it is off 0, and flips of so few
    groups of pairs could show nothing, whatever the method; or all items are of one group, so that
    there is no interval. "too few nulls": it is off 0, and so few nulls could show nothing. "no
    nulls": it is off 0, and of one kind no null reaches the budget. "undefined": the logprob of an
    item overflows. "undecided": none of these. A row without an effect has its verdict already:
    "budget not reached", "search failed"; and so has the "baseline".
    """
    if "effect" not in row:
        return str(row["verdict"])
    effect, low, high = (float(row.get(f"effect{end}", math.nan)) for end in ("", *ENDS))
    if len(set(inference.groups)) < 2:
        return "too few groups"
    if math.isnan(effect) or math.isnan(low):
        return "undefined"
    if -inference.margin <= low and high <= inference.margin:
        return "equivalent to no effect"
    if low <= 0 <= high:
        return "undecided"
    # A flip of all groups gives the same vector turned round: twice the smallest share.
    if 2.0 ** (1 - len(set(inference.fitted_groups))) >= LEVEL:
        return "too few groups"
    p = float(row.get("p_layers", math.nan))
    if math.isnan(p):
        return "no nulls"
    if p < LEVEL:
        return "effect" if effect > 0 else "reversed"
    return "no more than a null" if float(row.get("least_p", 0.0)) < LEVEL else "too few nulls"


def methods_table(
    table: pd.DataFrame,
    effects: pd.DataFrame,
    inference: Inference,
    refits: Mapping[str, Refits],
) -> pd.DataFrame:
    """Every method against `REFERENCE` on the same items (columns `methods`).

    At the layers chosen on training items where there are some, else layer by layer. The p-value of
    the family is that of the largest statistic of all rows. Intervals and p-values are over items,
    and over `refits` (column of `effects` -> mean effects) on the same groups of pairs where both
    have them.
    """
    attrs = {str(name): value for name, value in table.attrs.items()}
    is_chosen = bool(table.is_chosen.any())
    measured = table[table.is_chosen] if is_chosen else table[table.layer >= 0]
    rows = measured[measured.effect.notna()].to_dict("records")
    places = [CHOSEN if is_chosen else row["hook_name"] for row in rows]
    placed = list(zip(rows, places, strict=True))
    references = {place: row for row, place in placed if row["method"] == REFERENCE}
    compared = [
        (row, references[place])
        for row, place in placed
        if place in references and row["method"] != REFERENCE
    ]
    if not compared:
        return to_frame([], "methods", attrs)
    differences = np.stack([_by_item(effects, a) - _by_item(effects, b) for a, b in compared])
    refitted = [
        refits[one] - refits[other] if {one, other} <= refits.keys() else None
        for one, other in ((_column(row), _column(reference)) for row, reference in compared)
    ]
    none = np.full(max((len(r) for r in refitted if r is not None), default=0), math.nan)
    alone, family = flip_p(
        differences,
        groups=inference.groups,
        refits=np.stack([none if r is None else r for r in refitted]),
        n_fitted=inference.n_fitted,
        seed=inference.settings.seed,
    )
    found: list[Row] = []
    for i, (row, reference) in enumerate(compared):
        low, high = inference.interval(differences[i], refitted[i])
        found.append(
            {
                "method": row["method"],
                "hook_name": row["hook_name"],
                "layer": row["layer"],
                "reference": reference["method"],
                "reference_hook_name": reference["hook_name"],
                "reference_layer": reference["layer"],
                "difference": float(differences[i].mean()),
                "difference_ci_low": low,
                "difference_ci_high": high,
                "interval_over": _interval_over(refitted[i]),
                "p_value": float(alone[i]),
                "p_family": float(family[i]),
                "verdict": _against(low, high, float(family[i]), inference.margin),
            }
        )
    return to_frame(found, "methods", attrs)


def _column(row: Any) -> str:
    """The column of the effects that a row of the comparison has."""
    return PROMPT if row["method"] == PROMPT else f"{row['method']} @ {row['hook_name']}"


def _by_item(effects: pd.DataFrame, row: Any) -> NDArray[np.float64]:
    """The effects of a row of the comparison, item by item."""
    values: NDArray[np.float64] = effects[_column(row)].to_numpy(dtype=np.float64)
    return values


def _interval_over(refits: Refits | None) -> str:
    return "items" if refits is None else "items and pairs"


def _against(low: float, high: float, p: float, margin: float) -> str:
    if math.isnan(low):
        return "undefined"
    if -margin <= low and high <= margin:
        return "equivalent"
    if p < LEVEL and not low <= 0 <= high:
        return "better" if low > 0 else "worse"
    return "undecided"


def summarise(
    table: pd.DataFrame,
    effects: pd.DataFrame,
    inference: Inference,
    refits: Mapping[str, Refits],
) -> pd.DataFrame:
    """Every method at its chosen layer, and the prompt baseline, best first (columns `summary`).

    Ranks are resampled over groups of items, all methods on the same ones, each moved by one of its
    `refits` (as of `methods_table`), if any, on the same groups of pairs.
    """
    attrs = {str(name): value for name, value in table.attrs.items()}
    settings, group = inference.settings, np.array(inference.groups)
    chosen = table[table.is_chosen | (table.method == PROMPT)]
    if not table.is_chosen.any():
        return to_frame([], "summary", attrs)
    rows = chosen.sort_values("effect", ascending=False, kind="stable").to_dict("records")
    values = np.stack([_by_item(effects, row) for row in rows], axis=1)
    drawn = resampled_counts(
        int(group.max()) + 1, n_resamples=settings.n_bootstrap, seed=settings.seed
    )
    counts = drawn[:, group]
    means = counts @ values / counts.sum(axis=1, keepdims=True)
    shares = np.random.default_rng((settings.seed, 1)).random(len(means))
    for i, moved in enumerate(refits.get(_column(row)) for row in rows):
        if moved is not None:
            means[:, i] += (moved - moved.mean())[(shares * len(moved)).astype(int)]
    ranks = (-means).argsort(axis=1, kind="stable").argsort(axis=1) + 1
    kept = [c.name for c in COLUMNS["summary"] if not c.name.startswith("rank")]
    summary = []
    for i, row in enumerate(rows):
        low, high = percentile_interval(ranks[:, i].astype(np.float64))
        ranked = {"rank": i + 1, "rank_low": int(low), "rank_high": int(high)}
        summary.append({**{name: row[name] for name in kept}, **ranked})
    return to_frame(summary, "summary", attrs)
