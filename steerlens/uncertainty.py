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


def _mean(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.mean(values, axis=axis)
    return mean
