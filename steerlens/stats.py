"""How far a mean over pairs can be trusted, and when numbers that should be equal are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "NullBand",
    "allowed_gap",
    "bootstrap_interval",
    "bootstrap_intervals",
    "false_discovery",
    "holm",
    "null_band",
    "percentile_interval",
    "ratio_interval",
    "relative_gap",
    "resampled_counts",
    "weighted_quantile",
]

CONFIDENCE = 0.95


def allowed_gap(dtype: torch.dtype, *, least: float = 1e-4, roundings: int = 8) -> float:
    """How far two ways to compute the same may be apart: `max(least, roundings * eps(dtype))`.

    Relative to their size; `least` decides in float32 and float64, the rounding in 16-bit dtypes.
    Test it as `not gap <= allowed`, which a NaN fails too.

    Examples:
        >>> allowed_gap(torch.float32), allowed_gap(torch.bfloat16)  # 8 / 128
        (0.0001, 0.0625)
    """
    return max(least, roundings * torch.finfo(dtype).eps)


def relative_gap(
    values: Float[Tensor, "*row d"], expected: Float[Tensor, "*row d"], *, floor: float = 1e-30
) -> Float[Tensor, "*row"]:
    """`||values - expected|| / max(||expected||, floor)` of each row, in float64.

    Examples:
        >>> relative_gap(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))  # 0.5 / 5
        tensor([0.100], dtype=torch.float64)
    """
    wide = expected.double()
    gaps: Tensor = (values.double() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp(min=floor)
    return gaps


def bootstrap_interval(
    values: Float[np.ndarray, " pair"], *, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of the mean of `values` over pairs, in their unit.

    Pairs are resampled with replacement (`scipy.stats.bootstrap`, percentile method, so that equal
    values give an interval of width 0). The same seed draws the same pairs for every cell. NaN
    among the values gives (NaN, NaN). With few pairs the interval is too narrow.

    Examples:
        >>> bootstrap_interval(np.array([2.0, 2.0, 2.0]), n_resamples=100, seed=0)
        (2.0, 2.0)
    """
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = _bootstrap(values, n_resamples=n_resamples, seed=seed, batch=None)
    return float(low), float(high)


def bootstrap_intervals(
    values: Float[np.ndarray, "row pair"], *, n_resamples: int, seed: int
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """`bootstrap_interval` of every row at once, the same pairs drawn for all of them.

    One value a row has no interval: NaN.
    """
    nan = np.full(len(values), math.nan)
    if values.shape[1] < 2:
        return nan, nan
    low, high = _bootstrap(values, n_resamples=n_resamples, seed=seed, batch=100)
    is_finite = np.isfinite(values).all(axis=-1)
    return np.where(is_finite, low, nan), np.where(is_finite, high, nan)


def _bootstrap(
    values: Float[np.ndarray, "*row pair"], *, n_resamples: int, seed: int, batch: int | None
) -> tuple[Any, Any]:
    from scipy.stats import bootstrap

    interval = bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=n_resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=batch,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return interval.low, interval.high


def ratio_interval(
    values: Float[np.ndarray, " pair"],
    divisors: Float[np.ndarray, " pair"],
    *,
    n_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of `mean(values) / mean(divisors)`, pairs drawn together.

    NaN below two pairs and where either is not finite.

    Examples:
        >>> values = np.array([1.0, 2.0, 3.0])
        >>> ratio_interval(values, 2 * values, n_resamples=100, seed=0)
        (0.5, 0.5)
    """
    if len(values) < 2 or not (np.isfinite(values).all() and np.isfinite(divisors).all()):
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, len(values), (n_resamples, len(values)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values[draws].mean(axis=1) / divisors[draws].mean(axis=1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class NullBand:
    """Where a value of the null lies with 95% probability, and how unlikely the value seen is."""

    low: float
    high: float
    p_value: float


def null_band(value: float, nulls: Sequence[Float[np.ndarray, " null"]]) -> NullBand:
    """A value against the values of null vectors, given kind by kind (random, shuffled).

    Of each kind the prediction interval for one more of it, `mean +- t sd sqrt(1 + 1/n)`, and the
    two-sided p-value of Student's t with n - 1 degrees of freedom; then the widest band and the
    largest p-value, so that the harder kind decides. It takes the nulls of a kind to be normal,
    which lets 20 of them say more than that the value beats them all (p = 1/21). NaN where a kind
    has fewer than two values, one that is not finite, or no spread.

    Examples:
        >>> band = null_band(3.0, [np.array([-1.0, 0.0, 1.0])])  # mean 0, sd 1, t(2) = 4.30
        >>> band.low, band.high  # -+ 4.30 sqrt(1 + 1/3)
        (-4.97, 4.97)
        >>> band.p_value
        0.122
    """
    from scipy.stats import t

    lows, highs, p_values = [], [], []
    for kind in nulls:
        n = len(kind)
        spread = float(np.std(kind, ddof=1)) if n > 1 and np.isfinite(kind).all() else math.nan
        if not (spread > 0 and math.isfinite(value)):
            return NullBand(math.nan, math.nan, math.nan)
        mean, scale = float(np.mean(kind)), spread * math.sqrt(1 + 1 / n)
        reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * scale
        lows.append(mean - reach)
        highs.append(mean + reach)
        p_values.append(2 * float(t.sf(abs(value - mean) / scale, n - 1)))
    return NullBand(min(lows), max(highs), max(p_values))


def false_discovery(p_values: Float[np.ndarray, " claim"]) -> Float[np.ndarray, " claim"]:
    """Benjamini and Hochberg's adjusted p-values (q-values) of a family of claims.

    Those that are NaN stay NaN and do not count (`scipy.stats.false_discovery_control`).

    Examples:
        >>> false_discovery(np.array([0.01, 0.02, 0.9]))  # 3/1 0.01, 3/2 0.02, 3/3 0.9
        array([0.03, 0.03, 0.9 ])
    """
    from scipy.stats import false_discovery_control

    adjusted = np.full_like(p_values, math.nan)
    is_given = ~np.isnan(p_values)
    if is_given.any():
        adjusted[is_given] = false_discovery_control(p_values[is_given])
    return adjusted


def holm(p_values: Float[np.ndarray, " claim"]) -> Float[np.ndarray, " claim"]:
    """Holm's adjusted p-values: the r-th smallest of n times n - r + 1, never falling, at most 1.

    Those that are NaN stay NaN and do not count.

    Examples:
        >>> holm(np.array([0.01, 0.02, 0.9]))  # 3 times 0.01, 2 times 0.02, once 0.9
        array([0.03, 0.04, 0.9 ])
    """
    adjusted = np.full_like(p_values, math.nan)
    order = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * float(p_values[i])))
        adjusted[i] = largest
    return adjusted


def resampled_counts(
    n_pairs: int, *, n_resamples: int, seed: int
) -> Float[np.ndarray, "resample pair"]:
    """How often each pair is drawn in each bootstrap resample; the same seed, the same draws."""
    drawn = np.random.default_rng(seed).multinomial(
        n_pairs, np.full(n_pairs, 1 / n_pairs), size=n_resamples
    )
    return drawn.astype(np.float64)


def weighted_quantile(
    values: Float[np.ndarray, "pair token"],
    counts: Float[np.ndarray, "resample pair"],
    quantile: float,
) -> Float[np.ndarray, " resample"]:
    """The `quantile` (0 to 1) of all values that are not NaN, each pair's counted `counts` times.

    The smallest value whose share of counted values at or below it reaches `quantile`.

    Examples:
        >>> values = np.array([[1.0, 2.0], [3.0, np.nan]])
        >>> weighted_quantile(values, np.array([[1.0, 1.0], [1.0, 3.0]]), 0.5)
        array([2., 3.])
    """
    is_given = ~np.isnan(values)
    flat, owner = values[is_given], np.nonzero(is_given)[0]
    order = flat.argsort()
    quantiles = []
    for part in np.array_split(counts, max(1, len(counts) * len(flat) // 2**24)):
        cumulative = part[:, owner[order]].cumsum(axis=1)
        reached = cumulative >= quantile * cumulative[:, -1:] - 1e-9
        quantiles.append(flat[order][reached.argmax(axis=1)])
    joined: NDArray[np.float64] = np.concatenate(quantiles)
    return joined


def percentile_interval(estimates: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap estimates, which may be infinite."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
