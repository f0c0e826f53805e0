"""How much two circuits have in common, from the scores of their nodes or edges alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from steerlens.circuits.prompts import first_half
from steerlens.measure.nulls import null_columns
from steerlens.stats import TAIL, resampled_counts
from steerlens.tables import Row

SELECTIONS = ("absolute", "signed")
N_RESAMPLED = 200
"""Draws of the groups from which the spread of an overlap is taken."""
Scored = Float[Tensor, "item *draw"]


@dataclass(frozen=True)
class Sizes:
    """Circuits of one level: the largest nodes or edges by score, in sizes from small to large."""

    level: str
    selection: str
    shares: tuple[float, ...]
    n_items: int

    @property
    def sizes(self) -> list[int]:
        """Nodes or edges."""
        return [max(1, round(share * self.n_items)) for share in self.shares]

    def ranked(self, scores: Scored) -> Scored:
        """What the largest of are in a circuit."""
        return scores.abs() if self.selection == "absolute" else scores

    def circuits(self, scores: Float[Tensor, " item"]) -> list[Bool[Tensor, " item"]]:
        """The circuit of each size by mean scores."""
        at = places(self.ranked(scores))
        return [at < size for size in self.sizes]

    def overlaps(self, a: Scored, b: Scored) -> Float[np.ndarray, "number *draw"]:
        """Intersection over union of two models' circuits, size by size; then Spearman's rank
        correlation of all their scores, draw by draw."""
        from scipy.stats import rankdata

        a, b = self.ranked(a), self.ranked(b)
        later = torch.maximum(places(a), places(b))
        shared = torch.stack([(later < size).sum(dim=0) for size in self.sizes]).double().numpy()
        union = 2 * np.array(self.sizes).reshape(-1, *[1] * (shared.ndim - 1)) - shared
        ranks = [rankdata(scores.numpy(), axis=0) for scores in (a, b)]
        ranks = [rank - rank.mean(axis=0) for rank in ranks]
        norms = [np.sqrt((rank**2).sum(axis=0)) for rank in ranks]
        with np.errstate(divide="ignore", invalid="ignore"):
            rank = (ranks[0] * ranks[1]).sum(axis=0) / (norms[0] * norms[1])
        return np.concatenate([shared / union, rank[None]])


@dataclass(frozen=True)
class Halves:
    """Which pairs circuits are chosen on, the group of each, and how often they are split anew."""

    is_chosen_on: Bool[Tensor, " pair"]
    groups: Sequence[int]
    n_splits: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A table's row, its change, and that under nulls by kind; a `family` is tested together."""

    row: Row
    family: str
    change: float
    nulls: Mapping[str, Float[np.ndarray, " draw"]]


def places(ranked: Scored) -> Int[Tensor, "item *draw"]:
    """Each item's place among all, 0 the largest; of equal ones the first comes first."""
    order = ranked.argsort(dim=0, descending=True, stable=True)
    counted = torch.arange(len(ranked)).reshape(-1, *[1] * (ranked.ndim - 1)).expand_as(order)
    return torch.empty_like(order).scatter_(0, order, counted)


def overlap_rows(
    sizes: Sizes,
    scores: Mapping[str, Float[Tensor, "item pair"]],
    pair: tuple[str, str],
    nulls: Mapping[str, Sequence[Float[Tensor, " item"]]],
    halves: Halves,
) -> list[Drawn]:
    """Rows that compare two models, from every pair's scores, without those of `ranked_overlaps`.

    `nulls` holds, by kind, the mean scores of models in the place of the second one.
    """
    a, b = (scores[name] for name in pair)
    own_a, own_b = a[:, halves.is_chosen_on], b[:, halves.is_chosen_on]
    own_groups = np.array(halves.groups)[halves.is_chosen_on.numpy()].tolist()
    first = own_a.mean(dim=1)
    seen = sizes.overlaps(first, own_b.mean(dim=1))
    half = _half_width(sizes, own_a, own_b, own_groups, halves.seed)
    low, high = np.clip(seen - half, -1, 1), np.clip(seen + half, -1, 1)
    across, ceiling = _over_halves(sizes, a, b, halves)
    lost = {
        kind: np.array([1 - sizes.overlaps(first, means) for means in some])
        for kind, some in nulls.items()
    }
    of_rank = Drawn({}, "", 1 - seen[-1], {kind: draws[:, -1] for kind, draws in lost.items()})
    ((_, rank),) = with_null_columns([of_rank])
    same = {
        **{"level": sizes.level, "selection": sizes.selection, "a": pair[0], "b": pair[1]},
        **{"n_groups": len(set(own_groups)), "rank": seen[-1]},
        **{"rank_ci_low": low[-1], "rank_ci_high": high[-1]},
        **{"rank_across": across[-1], "rank_ceiling": ceiling[-1]},
        **{"rank_null_low": 1 - rank["null_high"], "rank_null_high": 1 - rank["null_low"]},
        "rank_p": rank["p_value"],
    }
    return [
        Drawn(
            {
                **same,
                **{"share": sizes.shares[i], "size": size, "iou": seen[i]},
                **{"iou_ci_low": max(low[i], 0.0), "iou_ci_high": high[i]},
                **{"iou_across": across[i], "iou_ceiling": ceiling[i]},
            },
            family=" ".join(pair),
            change=1 - seen[i],
            nulls={kind: draws[:, i] for kind, draws in lost.items()},
        )
        for i, size in enumerate(sizes.sizes)
    ]


def ranked_overlaps(drawn: Sequence[Drawn]) -> list[Row]:
    """Whole rows: each overlap's loss ranked among nulls, alone and in all rows of two models."""
    return [
        {
            **one.row,
            "n_null": found["n_null"],
            "iou_null_low": 1 - found["null_high"],
            "iou_null_high": 1 - found["null_low"],
            "iou_p": found["p_value"],
            "iou_p_family": found["p_layers"],
        }
        for one, found in with_null_columns(drawn)
    ]


def with_null_columns(drawn: Sequence[Drawn]) -> Iterator[tuple[Drawn, dict[str, float]]]:
    """Each with its `null_columns`, over a family's rows in place of hooks; NaN without nulls."""
    names = ("n_null", "null_low", "null_high", "p_value", "p_layers")
    columns: dict[int, dict[str, float]] = {}
    for family in dict.fromkeys(one.family for one in drawn):
        members = [i for i, one in enumerate(drawn) if one.family == family and one.nulls]
        if not members:
            continue
        found_at = null_columns(
            ["exact"] * len(members),
            [*map(str, members)],
            np.array([drawn[i].change for i in members]),
            {
                kind: np.stack([drawn[i].nulls[kind] for i in members], axis=1)
                for kind in drawn[members[0]].nulls
            },
        )
        for place, found in found_at.items():
            columns[int(place)] = {name: found[name] for name in names}
    without = {**dict.fromkeys(names, math.nan), "n_null": 0}
    for i, one in enumerate(drawn):
        yield one, columns.get(i, without)


def _half_width(
    sizes: Sizes,
    a: Float[Tensor, "item pair"],
    b: Float[Tensor, "item pair"],
    groups: Sequence[int],
    seed: int,
) -> Float[np.ndarray, " number"]:
    """Half of the 95% interval: Student's t times the spread over resampled groups."""
    from scipy.stats import t

    names, number = np.unique(groups, return_inverse=True)
    n = len(names)
    counts = resampled_counts(n, n_resamples=N_RESAMPLED, seed=seed)[:, number].T
    weights = torch.from_numpy(counts / counts.sum(axis=0))
    drawn = sizes.overlaps(a.double() @ weights, b.double() @ weights)
    spread: NDArray[np.float64] = drawn.std(axis=1, ddof=1) * math.sqrt(n / (n - 1))
    return float(t.ppf(1 - TAIL, n - 1)) * spread


def _over_halves(
    sizes: Sizes, a: Float[Tensor, "item pair"], b: Float[Tensor, "item pair"], halves: Halves
) -> tuple[Float[np.ndarray, " number"], Float[np.ndarray, " number"]]:
    """Mean overlap of circuits from random halves of the groups: across two models, within one."""
    across, within = [], []
    for split in range(halves.n_splits):
        is_first = first_half(halves.groups, halves.seed + split)
        means = [
            [scores[:, mask].mean(dim=1) for mask in (is_first, ~is_first)] for scores in (a, b)
        ]
        within += [sizes.overlaps(*of_model) for of_model in means]
        across += [sizes.overlaps(one[0], other[1]) for one, other in permutations(means)]
    if not halves.n_splits:
        across = within = [np.full(len(sizes.sizes) + 1, math.nan)]
    return np.mean(across, axis=0), np.mean(within, axis=0)
