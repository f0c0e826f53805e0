"""From measured effects to rows: null band, dose-response, corrected p-values, verdicts, ranks."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.measure.equal_damage import CompareSettings, Measured
from steerlens.stats import (
    bootstrap_interval,
    false_discovery,
    holm,
    null_band,
    percentile_interval,
    resampled_counts,
)
from steerlens.tables import SUMMARY_COLUMNS, Row, to_frame

LEVEL = 0.05
"""A claim's largest corrected p-value."""
PROMPT = "prompt"
"""The method's name of the baseline: the positive persona written into the prompt."""


def effect_columns(
    measured: Measured, nulls: Sequence[Float[np.ndarray, " null"]], settings: CompareSettings
) -> Row:
    """Effect, its interval and null band, and the dose-response, of one method at one hook.

    NaN where the logprob of some item overflows at some dose.
    """
    if not np.isfinite(measured.changes).all():
        return {"effect": math.nan}
    effect = float(measured.at_full.mean())
    low, high = bootstrap_interval(
        measured.at_full, n_resamples=settings.n_bootstrap, seed=settings.seed
    )
    band = null_band(effect, nulls)
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
        "null_low": band.low,
        "null_high": band.high,
        "p_value": band.p_value,
        "slope": float(slopes.mean()),
        "anti_steerable": float((slopes < 0).mean()),
        "spearman": _mean_spearman(doses, curves),
        "monotone": float((np.diff(curves, axis=0) > 0).all(axis=0).mean()),
    }


def _mean_spearman(doses: NDArray[np.float64], curves: NDArray[np.float64]) -> float:
    """The mean over items whose gap changes at all; NaN where none does."""
    from scipy.stats import spearmanr

    changing = [curve for curve in curves.T if np.ptp(curve) > 0]
    found = [float(spearmanr(doses, curve).statistic) for curve in changing]
    return float(np.mean(found)) if found else math.nan


def mean_abs(values: Sequence[float]) -> float:
    """The mean of the absolute values; NaN of none."""
    return float(np.mean(np.abs(values))) if values else math.nan


def with_verdicts(rows: Sequence[Row]) -> list[Row]:
    """The rows with corrected p-values, the chosen layer of each method, and a verdict."""
    p_values = np.array([float(row.get("p_value", math.nan)) for row in rows])
    q_values, corrected = false_discovery(p_values), np.full_like(p_values, math.nan)
    is_chosen = np.zeros(len(rows), dtype=bool)
    for method in dict.fromkeys(row["method"] for row in rows):
        of = np.array([i for i, row in enumerate(rows) if row["method"] == method])
        corrected[of] = holm(p_values[of])
        on_train = np.array([float(rows[i]["train_effect"]) for i in of])
        if not np.isnan(on_train).all():
            is_chosen[of[int(np.nanargmax(on_train))]] = True
    found: list[Row] = []
    for i, row in enumerate(rows):
        done = {
            **row,
            "p_holm": float(corrected[i]),
            "q_value": float(q_values[i]),
            "is_chosen": bool(is_chosen[i]),
        }
        found.append({**done, "verdict": _verdict(done)})
    return found


def _verdict(row: Row) -> str:
    if "effect" not in row:
        return str(row["verdict"])
    if math.isnan(row["effect"]):
        return "undefined"
    if math.isnan(row["p_holm"]):
        return "no null band"
    is_inside = row["null_low"] <= row["effect"] <= row["null_high"]
    if is_inside or not row["p_holm"] < LEVEL:
        return "no effect shown"
    return "effect" if row["effect"] > 0 else "reversed"


def summarise(
    table: pd.DataFrame, effects: pd.DataFrame, settings: CompareSettings
) -> pd.DataFrame:
    """Every method at its chosen layer, and the prompt baseline, best first (`SUMMARY_COLUMNS`).

    Ranks are resampled over items, all methods on the same ones.
    """
    attrs = {str(name): value for name, value in table.attrs.items()}
    chosen = table[table.is_chosen | (table.method == PROMPT)]
    if not table.is_chosen.any():
        return to_frame([], SUMMARY_COLUMNS, attrs)
    rows = chosen.sort_values("effect", ascending=False, kind="stable").to_dict("records")
    names = [PROMPT if r["method"] == PROMPT else f"{r['method']} @ {r['hook_name']}" for r in rows]
    values = np.stack([effects[name].to_numpy(dtype=np.float64) for name in names], axis=1)
    counts = resampled_counts(len(values), n_resamples=settings.n_bootstrap, seed=settings.seed)
    means = counts @ values / counts.sum(axis=1, keepdims=True)
    ranks = (-means).argsort(axis=1, kind="stable").argsort(axis=1) + 1
    kept = (
        "method",
        "layer",
        "coefficient",
        "effect",
        "effect_ci_low",
        "effect_ci_high",
        "verdict",
    )
    summary = []
    for i, row in enumerate(rows):
        low, high = percentile_interval(ranks[:, i].astype(np.float64))
        summary.append(
            {
                **{name: row[name] for name in kept},
                "rank": i + 1,
                "rank_low": int(low),
                "rank_high": int(high),
            }
        )
    return to_frame(summary, SUMMARY_COLUMNS, attrs)
