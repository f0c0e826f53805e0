"""How far a mean over pairs can be trusted."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

CONFIDENCE = 0.95


def bootstrap_interval(
    values: Float[np.ndarray, " pair"], *, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of the mean of `values` over pairs, in their unit.

    Pairs are resampled with replacement (`scipy.stats.bootstrap`, percentile method, so that equal
    values give an interval of width 0). The same seed draws the same pairs for every cell. NaN
    among the values gives (NaN, NaN). With few pairs the interval is too narrow.
    """
    if not np.isfinite(values).all():
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    result = bootstrap(
        (values,),
        _mean,
        n_resamples=n_resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


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
    """
    is_given = ~np.isnan(values)
    flat, owner = values[is_given], np.nonzero(is_given)[0]
    order = flat.argsort()
    quantiles = []
    for some in np.array_split(counts, max(1, len(counts) * len(flat) // 2**24)):
        cumulative = some[:, owner[order]].cumsum(axis=1)
        reached = cumulative >= quantile * cumulative[:, -1:] - 1e-9
        quantiles.append(flat[order][reached.argmax(axis=1)])
    joined: NDArray[np.float64] = np.concatenate(quantiles)
    return joined


def percentile_interval(estimates: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap estimates, which may be infinite."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _mean(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.mean(values, axis=axis)
    return mean
