"""How far a direction can be trusted before anything is steered: from the differences alone."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.directions.differences import Differences
from steerlens.errors import InputError
from steerlens.models.hooks import hook_layer
from steerlens.tables import Row, to_frame
from steerlens.validation import Draws, Whole, checked

MIN_PAIRS = 8


@checked
def reliability(differences: Differences, *, n_splits: Draws = 50, seed: Whole = 0) -> pd.DataFrame:
    """Reliability of the mean-difference direction, one row a hook (columns `reliability`).

    Over `n_splits` random halves of the pairs' groups: the cosine between the two halves'
    directions; d' of the projections on one half's direction of the other half's activations,
    `(mean_pos - mean_neg) / sqrt((var_pos + var_neg) / 2)`; and the cosine with the direction of
    all pairs of that of a quarter and of half of the groups. A cosine near 0 between halves means
    that there is no one direction to find at that hook. Raises `InputError` for fewer than 8 pairs
    in 2 groups, fewer than 2 splits, or two lists without pairs.

    Examples:
        >>> table = sl.measure.reliability(differences, n_splits=4)
        >>> bool((table.split_half_cosine <= 1).all())
        True
    """
    differences.check_paired("reliability is")
    n_pairs = differences.positive.shape[1]
    groups = np.array(differences.pair_groups)
    n_groups = int(groups.max()) + 1
    if n_pairs < MIN_PAIRS or n_groups < 2:
        raise InputError(
            f"reliability takes at least {MIN_PAIRS} pairs in 2 groups, got {n_pairs} in {n_groups}"
        )
    generator = np.random.default_rng(seed)
    ranks = [generator.permutation(n_groups)[groups] / n_groups for _ in range(n_splits)]
    # One hook of two sides at a time in float64; both may hold hooks after these, for readouts.
    at_hooks = zip(differences.hook_names, differences.positive, differences.negative, strict=False)
    rows: list[Row] = [
        {
            "hook_name": name,
            "layer": hook_layer(name),
            "n_pairs": n_pairs,
            "n_groups": n_groups,
            **_at_hook(up.double().cpu().numpy(), down.double().cpu().numpy(), ranks),
        }
        for name, up, down in at_hooks
    ]
    attrs = {
        "n_splits": n_splits,
        "seed": seed,
        "position": differences.position,
        "measured_on": differences.fingerprint,
        "weight_processing": differences.weight_processing,
    }
    return to_frame(rows, "reliability", attrs)


def _at_hook(
    positive: NDArray[np.float64],
    negative: NDArray[np.float64],
    ranks: list[NDArray[np.float64]],
) -> dict[str, float]:
    """`ranks`, from 0 to 1, are those of the pairs' groups, so that a part holds whole groups."""
    values = positive - negative
    mean = values.mean(axis=0)
    halves, separations, quarters, half_to_all = [], [], [], []
    for rank in ranks:
        second, quarter = rank >= 0.5, (rank < 0.25) | (rank == 0)
        first = ~second
        one, other = values[first].mean(axis=0), values[second].mean(axis=0)
        halves.append(cosine(one, other))
        half_to_all.append(cosine(one, mean))
        quarters.append(cosine(values[quarter].mean(axis=0), mean))
        separations.append(d_prime(positive[second] @ one, negative[second] @ one))
    axis = np.linalg.svd(values, full_matrices=False)[2][0]
    return {
        "agreement": float(np.mean([cosine(value, mean) for value in values])),
        "class_separation": float(np.mean(separations)),
        "split_half_cosine": float(np.mean(halves)),
        "split_half_cosine_low": float(np.quantile(halves, 0.025)),
        "cosine_quarter": float(np.mean(quarters)),
        "cosine_half": float(np.mean(half_to_all)),
        "pca_cosine": abs(cosine(axis, mean)),
    }


def cosine(one: Float[np.ndarray, " d_model"], other: Float[np.ndarray, " d_model"]) -> float:
    """The cosine of two vectors; NaN where one of them is zero."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms > 0 else float("nan")


def d_prime(positive: Float[np.ndarray, " pair"], negative: Float[np.ndarray, " pair"]) -> float:
    """`(mean_pos - mean_neg) / sqrt((var_pos + var_neg) / 2)`, variances with n - 1.

    NaN without spread.

    Examples:
        >>> d_prime(np.array([3.0, 5.0]), np.array([0.0, 2.0]))  # (4 - 1) / sqrt(2)
        2.12
    """
    spread = float(np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2))
    return float(positive.mean() - negative.mean()) / spread if spread > 0 else float("nan")
