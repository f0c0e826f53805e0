"""How far a mean over pairs or groups can be trusted: intervals, ranks among nulls, sign flips."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from steerlens.errors import InputError, told

__all__ = [
    "effective_groups",
    "flip_p",
    "interval",
    "intervals",
    "least_max_rank_p",
    "max_rank_p",
    "percentile_interval",
    "rank_p",
    "ratio_interval",
    "refit_spread",
    "resampled_counts",
    "smallest_effect",
]

CONFIDENCE = 0.95
N_BOOTSTRAP = 2000
"""Resamples of an interval where nobody says how many."""
TAIL = (1 - CONFIDENCE) / 2
POWER = 0.8
"""The share of repeats in which the smallest effect is shown."""
DEGENERATE = 1e-3
"""The share of draws without spread above which an interval is by Student's t."""
UNEVEN = 0.5
"""The share of groups that they are at least as good as: below, it is by Student's t, too."""
ROWS = 200
"""Intervals that are made at a time."""


def interval(
    values: Iterable[Any],
    *,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, resampled by group: a bootstrap-t interval.

    Whole groups are drawn with replacement, so that what they share counts as one observation. Of
    each draw the mean is studentised, `t* = (mean* - mean) / se*`, and the ends are `mean - q se`
    with the 97.5% and 2.5% quantiles q of t*: that keeps its coverage with few groups and skewed
    values, where percentiles of the means are too narrow. `se` is the standard error of a ratio of
    sums over groups, `sqrt(sum_g (sum_g - mean size_g)^2 / (1 - share_g)) / sum_g size_g`, share_g
    the group's share of all values; that of a draw has `(n - 1) / n`, n its groups, in place of
    each `1 - share_g`. Where more than one draw in 1000 has no spread (five groups and fewer, or
    nearly all values alike), or the groups are so uneven that they are as good as fewer than half
    as many (`effective_groups`), q is that of Student's t with the degrees of freedom that se has
    where values are independent, `1 / (sum_g share_g^2 + (sum_g u_g)^2 - sum_g u_g^2)` with
    `u_g = share_g^2 / (1 - share_g)`: n - 1 where groups have one size.

    Args:
        values: One value a pair (prompt, item), in any unit; also the unit of the ends.
        groups: The group of each value; None takes every value, or this one, for one of its own.
        seed: Of the draws; the same seed draws the same groups for every cell.
        n_bootstrap: Number of draws.

    Returns:
        Low and high end; (NaN, NaN) for one group or values that are not finite.

    Raises:
        InputError: The values are no list of numbers, or the groups not as many.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5; Bell and
    McCaffrey, Bias Reduction in Standard Errors for Linear Regression (2002).

    Examples:
        >>> interval(np.array([1.0, 3.0]))  # t(0.975, 1) = 12.71 and se = 1
        (-10.71, 14.71)
        >>> interval(np.array([1.0, 1.0, 3.0, 3.0]), groups=["a", "a", "b", "b"])
        (-10.71, 14.71)
    """
    low, high = intervals(_numbers(values)[None], groups=groups, seed=seed, n_bootstrap=n_bootstrap)
    return float(low[0]), float(high[0])


def _numbers(values: Iterable[Any]) -> Float[np.ndarray, " value"]:
    """As float64."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected a list of numbers, got {told(values)}") from error
    if numbers.ndim != 1:
        raise InputError(f"expected a list of numbers, got an array of shape {numbers.shape}")
    return numbers


def effective_groups(groups: Iterable[Any]) -> float:
    """How many groups of one size are as good as these: `(sum_g size_g)^2 / sum_g size_g^2`.

    Examples:
        >>> effective_groups("aabb"), effective_groups("aaab")
        (2.0, 1.6)
    """
    sizes = np.bincount(_group_numbers(groups))
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def intervals(
    values: Float[np.ndarray, "row pair"],
    *,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """`interval` of every row, the same groups drawn for all of them."""
    return _bootstrap_t(values, np.ones_like(values), groups, seed, n_bootstrap)


def ratio_interval(
    values: Float[np.ndarray, " pair"],
    divisors: Float[np.ndarray, " pair"],
    *,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
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
    groups: Iterable[Any] | None,
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
    from scipy.special import stdtrit  # scipy.stats, whose t it is, takes long to import

    n, total = sums.shape[1], sizes.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums.sum(axis=1) / total
        # About the ratio seen, so that a large mean does not swallow a small spread.
        rest = sums - ratio[:, None] * sizes
        rest[np.abs(rest) <= 1e-12 * np.abs(sums).max(axis=1, keepdims=True)] = 0.0
        shares = np.abs(sizes) / np.abs(sizes).sum(axis=1, keepdims=True)
        error = np.sqrt((rest**2 / (1 - shares)).sum(axis=1)) / np.abs(total)
        totals = counts @ sizes.T
        shift = (counts @ rest.T) / totals
        spread = counts @ (rest**2).T - 2 * shift * (counts @ (rest * sizes).T)
        spread += shift**2 * (counts @ (sizes**2).T)
        errors = np.sqrt(n / (n - 1) * spread.clip(min=0)) / np.abs(totals)
        has_spread = errors > 1e-6 * error
        studentised = np.where(has_spread, shift / errors, np.inf * np.sign(shift))
        squares, u = (shares**2).sum(axis=1), shares**2 / (1 - shares)
        freedom = 1 / (squares + u.sum(axis=1) ** 2 - (u**2).sum(axis=1))
    drawn = np.quantile(np.nan_to_num(studentised), [TAIL, 1 - TAIL], axis=0)
    is_rough = ((~has_spread).mean(axis=0) > DEGENERATE) | (UNEVEN * n * squares > 1)
    students = stdtrit(freedom, np.array([[TAIL], [1 - TAIL]]))
    lower, upper = np.where(is_rough, students, drawn)
    return ratio - upper * error, ratio - lower * error


def _group_numbers(groups: Iterable[Any] | None, n: int | None = None) -> Int[np.ndarray, " pair"]:
    """The number of each value's group, in the order in which groups are met."""
    groups = range(n or 0) if groups is None else groups
    names = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if n not in (None, len(names)):
        raise InputError(f"expected a group for each of {n} values, got {len(names)} groups")
    names = [object() if name is None else name for name in names]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def rank_p(value: float | int, nulls: Iterable[Any]) -> float:
    """Two-sided rank p-value: `(1 + nulls at least as far from 0) / (1 + nulls)`.

    Exact at any level when value and nulls could have been drawn in any order, which holds for
    labels that an independent coin flips, the labels as they are included. A null that equals the
    value but for rounding (1e-9 of it) counts as at least as far.

    Args:
        value: What was seen, in any unit.
        nulls: The same of vectors that cannot know the labels; it takes 20 to show p below 0.05.

    Returns:
        Between `1 / (1 + nulls)` and 1; NaN where value or a null is NaN, or there is no null.

    Source: Phipson and Smyth, Permutation P-values Should Never Be Zero (2010).

    Examples:
        >>> rank_p(3.0, np.array([-1.0, 0.0, 1.0]))  # none of 3 is as far
        0.25
        >>> rank_p(3.0, np.array([-3.0, 0.0, 1.0]))
        0.5
    """
    distances = np.abs(_numbers(nulls))
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
    With one hook, `rank_p`. Hooks at which other draws have a value (nulls that were run, beside
    more of which only first-order effects are known) are families of their own, whose p-values are
    added up: to that of a hook's own family the largest that each other family could have had and
    that is no larger (Bonferroni; Tarone, as 20 nulls have none below 1/21).

    Args:
        values: What was seen at each hook.
        nulls: The same of draws that cannot know the labels, each with the same labels everywhere;
            NaN where a draw has no value.

    Returns:
        p-values that hold for the best of all hooks; NaN where there is no value, or no draw.

    Source: Westfall and Young, Resampling-Based Multiple Testing (1993); Tarone (1990).

    Examples:
        >>> max_rank_p(np.array([3.0, 1.0]), np.array([[0.0, 1.0], [1.0, -1.0], [0.0, 0.0]]))
        array([0.25, 0.75])
    """
    known, family = _families(values, nulls)
    p_values = np.full(len(values), math.nan)
    for k, is_drawn in enumerate(known):
        sizes, draws = np.abs(values[family == k]), np.abs(nulls[is_drawn][:, family == k])
        scale = np.sqrt((np.vstack([draws, sizes]) ** 2).mean(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            seen, largest = sizes / scale, np.nan_to_num(draws / scale).max(axis=1)
        n_as_far = (largest[:, None] >= seen * (1 - 1e-9)).sum(axis=0)
        p_values[family == k] = (1 + n_as_far) / (1 + len(draws))
    return _over_families(p_values, known)


def least_max_rank_p(
    values: Float[np.ndarray, " hook"], nulls: Float[np.ndarray, "draw hook"]
) -> Float[np.ndarray, " hook"]:
    """The smallest p-values that `max_rank_p` could give with so many nulls.

    Examples:
        >>> least_max_rank_p(np.array([3.0, 1.0]), np.array([[0.0, 1.0], [1.0, np.nan]]))
        array([0.333, 0.833])
    """
    known, family = _families(values, nulls)
    p_values = np.array([1 / (1 + known[k].sum()) if k >= 0 else math.nan for k in family])
    return _over_families(p_values, known)


def _families(
    values: Float[np.ndarray, " hook"], nulls: Float[np.ndarray, "draw hook"]
) -> tuple[list[Bool[np.ndarray, " draw"]], Int[np.ndarray, " hook"]]:
    """Which draws have a value, for each set of hooks where these are the same, and each's set."""
    is_known = ~np.isnan(nulls) & ~np.isnan(values)
    kinds = [tuple(column) for column in is_known.T]
    families = list(dict.fromkeys(kind for kind in kinds if any(kind)))
    known = [np.array(kind) for kind in families]
    return known, np.array([families.index(k) if any(k) else -1 for k in kinds])


def _over_families(
    p_values: Float[np.ndarray, " hook"], known: Sequence[Bool[np.ndarray, " draw"]]
) -> Float[np.ndarray, " hook"]:
    """With the p-values that other families could have had and that are no larger; 1 at most."""
    totals = 1 + np.array([is_drawn.sum() for is_drawn in known])
    total: NDArray[np.float64] = (np.floor(p_values[:, None] * totals + 1e-9) / totals).sum(axis=1)
    return np.where(np.isnan(p_values), math.nan, total.clip(max=1.0))


def flip_p(
    values: Float[np.ndarray, "row pair"],
    *,
    groups: Iterable[Any] | None = None,
    refits: Float[np.ndarray, "row refit"] | None = None,
    n_fitted: float | int = 0,
    seed: int = 0,
    n_flips: int = 1999,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Sign-flip p-values of every row's mean being 0, alone and over the family of all rows.

    The statistic is `|sum_g s_g| / sqrt(sum_g s_g^2)` of the groups' sums s_g over the number of
    values; each draw flips the signs of whole groups by coin, the same for all rows, and the
    family's p-value compares with the largest of all rows. It takes the differences of a group to
    be as likely of either sign where there is no effect. NaN for a row that is not finite or all
    zero.

    Args:
        values: One row a comparison, in any unit.
        groups: The group of each value; None takes every value for a group of its own.
        refits: The mean of every row when what was fitted is fitted again on resampled groups, the
            same for all rows; NaN for a row without, None for all. With them the root is of
            `n / (n - 1) sum_g (s_g - mean share_g)^2` plus the square of `refit_spread`, and a draw
            is what an interval holds: flips of the groups' sums about the mean, and the refits'
            deviations with normal weights, each over the root of a chi-square over its degrees of
            freedom (n - 1, and those of `refit_spread`).
        n_fitted: Groups that were resampled for the refits (`effective_groups`).
        seed: Of the draws.
        n_flips: Number of draws.

    Examples:
        >>> alone, family = flip_p(np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]))  # 2 in 64 as far
        >>> alone.round(2), bool(alone == family)
        (array([0.03]), True)
    """
    group = _group_numbers(groups, values.shape[1])
    sizes = np.bincount(group) / len(group)
    n, known = len(sizes), np.isfinite(values).all(axis=1) & (values != 0).any(axis=1)
    sums = np.zeros((len(values), n))
    for i in np.flatnonzero(known):
        sums[i] = np.bincount(group, values[i]) / len(group)
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], size=(n_flips, n))
    means, variances, drawn = sums.sum(axis=1), (sums**2).sum(axis=1), signs @ sums.T
    if refits is not None and min(n, n_fitted, refits.shape[1]) > 1:
        rest = (sums - means[:, None] * sizes) * math.sqrt(n / (n - 1))
        spread, df = refit_spread(refits, n_fitted)
        moves = refits - refits.mean(axis=1, keepdims=True)
        moves *= (spread / np.sqrt((moves**2).sum(axis=1)).clip(min=1e-300))[:, None]
        both, weights = 0.0, generator.standard_normal((n_flips, refits.shape[1]))
        for draws, parts, of in ((signs, rest, n - 1), (weights, moves, df)):
            both += draws / np.sqrt(generator.chisquare(of, (n_flips, 1)) / of) @ parts.T
        is_refitted = np.isfinite(spread)
        drawn = np.where(is_refitted, both, drawn)
        variances = np.where(is_refitted, (rest**2).sum(axis=1) + spread**2, variances)
    with np.errstate(divide="ignore", invalid="ignore"):
        seen, drawn = np.abs(means) / variances**0.5, np.abs(drawn) / variances**0.5
    least = seen * (1 - 1e-9)
    largest = np.nan_to_num(drawn).max(axis=1, initial=0.0)
    alone = (1 + (drawn >= least).sum(axis=0)) / (1 + n_flips)
    family = (1 + (largest[:, None] >= least).sum(axis=0)) / (1 + n_flips)
    return np.where(known, alone, math.nan), np.where(known, family, math.nan)


def refit_spread(
    refits: Float[np.ndarray, "row refit"], n_groups: float | int
) -> tuple[Float[np.ndarray, " row"], float]:
    """The standard deviation of what was fitted over draws of its groups; degrees of freedom.

    That of refits on groups drawn with replacement times `sqrt(n / (n - 1))`, as these spread too
    little; `1 / df = 1 / (n - 1) + 1 / (refits - 1)`; n are the `effective_groups`, 2 at least.

    Examples:
        >>> refit_spread(np.array([[1.0, 3.0]]), n_groups=9)  # 1.414 sqrt(9 / 8)
        (array([1.5]), 0.889)
    """
    n = max(n_groups, 2.0)
    df = 1 / (1 / (n - 1) + 1 / (refits.shape[1] - 1))
    return refits.std(axis=1, ddof=1) * math.sqrt(n / (n - 1)), df


def smallest_effect(low: float, high: float, n_groups: int) -> float:
    """The mean that data like these would show in 4 of 5 repeats, with a 95% interval off 0.

    `(t(0.975) + t(0.80)) * half-width / t(0.975)` with n_groups - 1 degrees of freedom.

    Examples:
        >>> smallest_effect(-1.96, 1.96, n_groups=10**6)
        2.80
    """
    from scipy.special import stdtrit

    if n_groups < 2:
        return math.nan
    reach, power = (float(stdtrit(n_groups - 1, share)) for share in (1 - TAIL, POWER))
    return (high - low) / 2 * (reach + power) / reach


@lru_cache(maxsize=2)
def resampled_counts(
    n_groups: int, *, n_resamples: int, seed: int
) -> Float[np.ndarray, "resample group"]:
    """How often each group is drawn in each bootstrap resample; the same seed, the same draws.

    Kept, since a table's rows ask for the same ones, and so read-only.
    """
    drawn = np.random.default_rng(seed).multinomial(
        n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples
    )
    counts = drawn.astype(np.float64)
    counts.flags.writeable = False
    return counts


def percentile_interval(estimates: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap estimates, which may be infinite."""
    low, high = np.quantile(estimates, [TAIL, 1 - TAIL], method="inverted_cdf")
    return float(low), float(high)
