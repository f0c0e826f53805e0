"""How far a mean over pairs or groups can be trusted, and when numbers that should be equal are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steerlens.errors import InputError

__all__ = [
    "allowed_gap",
    "flip_p",
    "interval",
    "intervals",
    "max_rank_p",
    "percentile_interval",
    "rank_p",
    "ratio_interval",
    "relative_gap",
    "resampled_counts",
    "smallest_effect",
    "weighted_quantile",
]

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
POWER = 0.8
"""The share of repeats in which the smallest effect is shown."""
DEGENERATE = 1e-3
"""The share of draws without spread above which an interval is by Student's t."""
ROWS = 200
"""Intervals that are made at a time."""


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


def interval(
    values: Float[np.ndarray, " pair"] | Sequence[float],
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = 2000,
) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, resampled by group: a bootstrap-t interval.

    Whole groups are drawn with replacement, so that what they share counts as one observation. Of
    each draw the mean is studentised, `t* = (mean* - mean) / se*`, and the ends are `mean - q se`
    with the 97.5% and 2.5% quantiles q of t*: that keeps its coverage with few groups and skewed
    values, where percentiles of the means are too narrow. `se` is the standard error of a ratio of
    sums over groups, `sqrt(n / (n - 1) sum_g (sum_g - mean size_g)^2) / sum_g size_g`. Where more
    than one draw in 1000 has no spread (five groups and fewer, or nearly all values alike), q is
    that of Student's t with n - 1 degrees of freedom.

    Args:
        values: One value a pair (prompt, item), in any unit; also the unit of the ends.
        groups: The group of each value; None takes every value for a group of its own.
        seed: Of the draws; the same seed draws the same groups for every cell.
        n_bootstrap: Number of draws.

    Returns:
        Low and high end; (NaN, NaN) for one group or values that are not finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5.

    Examples:
        >>> interval(np.array([1.0, 3.0]))  # t(0.975, 1) = 12.71 and se = 1
        (-10.71, 14.71)
        >>> interval(np.array([1.0, 1.0, 3.0, 3.0]), groups=["a", "a", "b", "b"])
        (-10.71, 14.71)
    """
    row = np.asarray(values, dtype=np.float64)[None]
    low, high = intervals(row, groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    return float(low[0]), float(high[0])


def intervals(
    values: Float[np.ndarray, "row pair"],
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = 2000,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """`interval` of every row, the same groups drawn for all of them."""
    return _bootstrap_t(values, np.ones_like(values), groups, seed, n_bootstrap)


def ratio_interval(
    values: Float[np.ndarray, " pair"],
    divisors: Float[np.ndarray, " pair"],
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = 2000,
) -> tuple[float, float]:
    """`interval` of `mean(values) / mean(divisors)`: the divisors take the place of the sizes.

    Examples:
        >>> values = np.array([1.0, 2.0, 3.0])
        >>> ratio_interval(values, 2 * values)
        (0.5, 0.5)
    """
    low, high = _bootstrap_t(values[None], divisors[None], groups, seed, n_bootstrap)
    return float(low[0]), float(high[0])


def _bootstrap_t(
    values: Float[np.ndarray, "row pair"],
    divisors: Float[np.ndarray, "row pair"],
    groups: Sequence[Any] | None,
    seed: int,
    n_bootstrap: int,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """The ends of the ratio of sums of every row."""
    group = _group_numbers(groups, values.shape[1])
    low, high = np.full((2, len(values)), math.nan)
    n = int(group.max(initial=-1)) + 1
    is_finite = np.isfinite(values).all(axis=1) & np.isfinite(divisors).all(axis=1)
    if n < 2 or not is_finite.any():
        return low, high
    counts = resampled_counts(n, n_resamples=n_bootstrap, seed=seed)
    for rows in np.array_split(np.flatnonzero(is_finite), math.ceil(is_finite.sum() / ROWS)):
        sums, sizes = (
            np.stack([np.bincount(group, of_pairs[row]) for row in rows])
            for of_pairs in (values, divisors)
        )
        low[rows], high[rows] = _ends(sums, sizes, counts)
    return low, high


def _ends(
    sums: Float[np.ndarray, "row group"],
    sizes: Float[np.ndarray, "row group"],
    counts: Float[np.ndarray, "resample group"],
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    from scipy.stats import t

    n, total = sums.shape[1], sizes.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums.sum(axis=1) / total
        # About the ratio seen, so that a large mean does not swallow a small spread.
        rest = sums - ratio[:, None] * sizes
        rest[np.abs(rest) <= 1e-12 * np.abs(sums).max(axis=1, keepdims=True)] = 0.0
        error = np.sqrt(n / (n - 1) * (rest**2).sum(axis=1)) / np.abs(total)
        totals = counts @ sizes.T
        shift = (counts @ rest.T) / totals
        spread = counts @ (rest**2).T - 2 * shift * (counts @ (rest * sizes).T)
        spread += shift**2 * (counts @ (sizes**2).T)
        errors = np.sqrt(n / (n - 1) * spread.clip(min=0)) / np.abs(totals)
        has_spread = errors > 1e-6 * error
        studentised = np.where(has_spread, shift / errors, np.inf * np.sign(shift))
    drawn = np.quantile(np.nan_to_num(studentised), [TAIL, 1 - TAIL], axis=0)
    students = t.ppf([TAIL, 1 - TAIL], n - 1)[:, None]
    lower, upper = np.where((~has_spread).mean(axis=0) > DEGENERATE, students, drawn)
    return ratio - upper * error, ratio - lower * error


def _group_numbers(groups: Sequence[Any] | None, n: int) -> Int[np.ndarray, " pair"]:
    """The number of each value's group, in the order in which groups are met."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise InputError(f"expected a group for each of {n} values, got {len(groups)} groups")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[name] for name in groups])


def rank_p(value: float, nulls: Float[np.ndarray, " null"] | Sequence[float]) -> float:
    """Two-sided rank p-value: `(1 + nulls at least as far from 0) / (1 + nulls)`.

    Exact at any level when value and nulls could have been drawn in any order, which holds for
    labels that an independent coin flips, the labels as they are included. A null that equals the
    value but for rounding (1e-9 of it) counts as at least as far.

    Args:
        value: What was seen, in any unit.
        nulls: The same of vectors that cannot know the labels; 19 of them can show 0.05.

    Returns:
        Between `1 / (1 + nulls)` and 1; NaN where value or a null is NaN, or there is no null.

    Source: Phipson and Smyth, Permutation P-values Should Never Be Zero (2010).

    Examples:
        >>> rank_p(3.0, np.array([-1.0, 0.0, 1.0]))  # none of 3 is as far
        0.25
        >>> rank_p(3.0, np.array([-3.0, 0.0, 1.0]))
        0.5
    """
    distances = np.abs(np.asarray(nulls, dtype=np.float64))
    if not len(distances) or math.isnan(value) or np.isnan(distances).any():
        return math.nan
    n_as_far = int((distances >= abs(value) * (1 - 1e-9)).sum())
    return (1 + n_as_far) / (1 + len(distances))


def max_rank_p(
    values: Float[np.ndarray, " hook"], nulls: Float[np.ndarray, "draw hook"]
) -> Float[np.ndarray, " hook"]:
    """Rank p-values against the largest null over all hooks (Westfall and Young's maximum).

    Each hook's values are divided by their root mean square over the draws and the value seen, so
    that no hook decides by its unit; a draw counts where its largest is at least as far from 0.
    With one hook, `rank_p`.

    Args:
        values: What was seen at each hook.
        nulls: The same of draws that cannot know the labels, each with the same labels everywhere;
            NaN where a draw has no value.

    Returns:
        p-values that hold for the best of all hooks; NaN where there is no value, or no draw.

    Source: Westfall and Young, Resampling-Based Multiple Testing (1993).

    Examples:
        >>> max_rank_p(np.array([3.0, 1.0]), np.array([[0.0, 1.0], [1.0, -1.0], [0.0, 0.0]]))
        array([0.25, 0.75])
    """
    sizes, draws = np.abs(values), np.abs(nulls)
    draws = draws[~np.isnan(draws).all(axis=1)]
    if not len(draws):
        return np.full(len(values), math.nan)
    scale = np.sqrt(np.nanmean(np.vstack([draws, sizes]) ** 2, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        seen, largest = sizes / scale, np.nanmax(np.nan_to_num(draws / scale), axis=1)
    n_as_far = (largest[:, None] >= seen * (1 - 1e-9)).sum(axis=0)
    return np.where(np.isnan(sizes), math.nan, (1 + n_as_far) / (1 + len(draws)))


def flip_p(
    values: Float[np.ndarray, "row pair"],
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    n_flips: int = 1999,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Sign-flip p-values of every row's mean being 0, alone and over the family of all rows.

    The statistic is `|sum_g s_g| / sqrt(sum_g s_g^2)` of the groups' sums s_g; each draw flips the
    signs of whole groups by coin, the same for all rows, and the family's p-value compares with the
    largest of all rows. It takes the differences of a group to be as likely of either sign where
    there is no effect. NaN for a row that is not finite or all zero.

    Examples:
        >>> alone, family = flip_p(np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]))  # 2 in 64 as far
        >>> alone.round(2), bool(alone == family)
        (array([0.03]), True)
    """
    group = _group_numbers(groups, values.shape[1])
    n = int(group.max()) + 1
    known = np.isfinite(values).all(axis=1) & (values != 0).any(axis=1)
    sums = np.zeros((len(values), n))
    for i in np.flatnonzero(known):
        sums[i] = np.bincount(group, values[i])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_flips, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt((sums**2).sum(axis=1))
        seen, drawn = np.abs(sums.sum(axis=1)) / scale, np.abs(signs @ sums.T) / scale
    least = seen * (1 - 1e-9)
    largest = np.nan_to_num(drawn).max(axis=1, initial=0.0)
    alone = (1 + (drawn >= least).sum(axis=0)) / (1 + n_flips)
    family = (1 + (largest[:, None] >= least).sum(axis=0)) / (1 + n_flips)
    return np.where(known, alone, math.nan), np.where(known, family, math.nan)


def smallest_effect(low: float, high: float, n_groups: int) -> float:
    """The mean that data like these would show in 4 of 5 repeats, with a 95% interval off 0.

    `(t(0.975) + t(0.80)) * half-width / t(0.975)` with n_groups - 1 degrees of freedom.

    Examples:
        >>> smallest_effect(-1.96, 1.96, n_groups=10**6)
        2.80
    """
    from scipy.stats import t

    if n_groups < 2:
        return math.nan
    reach = float(t.ppf(1 - TAIL, n_groups - 1))
    return (high - low) / 2 * (reach + float(t.ppf(POWER, n_groups - 1))) / reach


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
    low, high = np.quantile(estimates, [TAIL, 1 - TAIL], method="inverted_cdf")
    return float(low), float(high)


def one_of_each_in_turn(groups: Sequence[int], most: int) -> list[int]:
    """At most so many rows, in their order: the first of each group, then the second, and so on.

    Examples:
        >>> one_of_each_in_turn([0, 0, 0, 1, 1, 2], 4)
        [0, 1, 3, 5]
    """
    turns = [list(groups[:row]).count(group) for row, group in enumerate(groups)]
    in_turn = sorted(range(len(groups)), key=lambda row: (turns[row], groups[row]))
    return sorted(in_turn[:most])
