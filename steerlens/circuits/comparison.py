"""Same circuit or another: circuits of one behaviour in several models, steered and not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.components import check_additive, make_prompts
from steerlens.circuits.graphs import (
    Contrast,
    Means,
    Scores,
    attribute,
    check_sum,
    largest,
    mean_writes,
    run_edges,
    run_nodes,
)
from steerlens.circuits.interventions import Intervention
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError, whole
from steerlens.models.loading import HookedModel, provenance
from steerlens.progress import Progress, part_of, silent
from steerlens.steering import Add
from steerlens.tables import CIRCUIT_COLUMNS, FAITHFULNESS_COLUMNS, Row, to_frame

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
UNSTEERED = "unsteered"
LEVELS = ("node", "edge")


@dataclass(frozen=True)
class Circuits:
    """`table` has a row a pair of models, level and size (`CIRCUIT_COLUMNS`), `faithfulness` one a
    circuit, model and size (`FAITHFULNESS_COLUMNS`); `scores` the attributions of each model.
    """

    table: pd.DataFrame
    faithfulness: pd.DataFrame
    scores: Mapping[str, Scores]

    def __repr__(self) -> str:
        return f"Circuits({', '.join(self.scores)})"


def compare_circuits(
    model: HookedModel,
    pairs: ContrastivePairs,
    answers: Answers,
    interventions: Mapping[str, Intervention],
    *,
    floor: Intervention | None = None,
    shares: Sequence[float] = SHARES,
    levels: Sequence[str] = LEVELS,
    n_splits: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Circuits:
    """The circuits of the pairs' contrast in the unsteered model and under each intervention.

    The behaviour is the mean difference of the answer logit difference between the two prompts of
    a pair. In each model nodes (heads and MLPs) and edges are scored by attribution against their
    means there; the circuit of a size is the largest by absolute score. Two circuits are compared
    by overlap (`iou`), by Spearman's correlation of all absolute scores (`rank`), and by running
    each in the other's model, everything else at its mean there:
    `faithfulness = (m(circuit) - m(nothing)) / (m(all) - m(nothing))`.

    Overlap alone is no evidence. Its ceiling is the overlap of circuits from random halves of the
    pairs (mean over `n_splits` and both models; each half has half the pairs, so an overlap on all
    of them may exceed it), its floor that of the unsteered model with the one under `floor`, best a
    random vector at equal KL (`random_intervention`; NaN without one). `cpr`
    and `cmd` are the areas under faithfulness, and between it and 1, against the share of nodes or
    edges that the circuit has, from 0 to 1 (Mueller et al. 2025, arXiv:2504.13151).

    Raises `InputError` on a share that is not between 0 and 1, an unknown level, an intervention
    called "unsteered", edges with another operator than `Add` or a condition, prompts that begin
    with different tokens, answers that do not fit, a model whose heads and MLPs do not add up to
    its stream, when nothing is left of the behaviour to explain, and as `attribute` does;
    `InputError` on a negative seed or number of splits; and as `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import Intervention, compare_circuits, contrast_answers
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> found = compare_circuits(
        ...     model,
        ...     pairs,
        ...     answers,
        ...     {"cheerful": Intervention(vector, 4)},
        ...     shares=[0.2],
        ...     levels=["node"],
        ...     n_splits=2,
        ... )
        >>> found.table[["a", "b", "size"]].to_dict("list")
        {'a': ['unsteered'], 'b': ['cheerful'], 'size': [5]}
    """
    shares, levels = sorted(set(shares)), tuple(dict.fromkeys(levels))
    _check(shares, levels, interventions, floor)
    n_splits, seed = whole("n_splits", n_splits, 0), whole("seed", seed, 0)
    check_additive(model)
    contrast = make_contrast(model, pairs, answers)
    check_sum(model, contrast)
    with_edges = "edge" in levels
    models = {UNSTEERED: Intervention(), **interventions}
    tell, means, scores, bottom = progress or silent, {}, {}, None
    n_models = len(models) + (floor is not None)
    tell("circuits: models", 0, n_models)
    for name, of in models.items():
        means[name] = mean_writes(model, contrast, of)
        scores[name] = attribute(model, contrast, of, means[name], with_edges=with_edges)
        tell("circuits: models", len(scores), n_models)
    if floor is not None:
        bottom = attribute(
            model, contrast, floor, mean_writes(model, contrast, floor), with_edges=with_edges
        )
        tell("circuits: models", n_models, n_models)
    attrs = {
        "n_pairs": len(pairs),
        "fingerprint": pairs.fingerprint,
        "answers": answers.words(model),
        "metric": {name: of.metric for name, of in scores.items()},
        "coefficients": {name: of.coefficient for name, of in interventions.items()},
        "n_splits": n_splits,
        "seed": seed,
        "provenance": provenance(model).to_dict(),
    }
    curves: dict[tuple[str, str, str], list[float]] = {}
    per_model = 2 + len(models) * len(shares)
    n_runs = len(levels) * len(models) * per_model
    for i, (level, run_in) in enumerate(product(levels, models)):
        chosen = {of: [_circuit(scores[of], level, share) for share in shares] for of in models}
        part = part_of(tell, "circuits on their own: runs", before=i * per_model, total=n_runs)
        found = _faithfulness(model, contrast, models[run_in], means[run_in], chosen, level, part)
        curves |= {(level, of, run_in): curve for of, curve in found.items()}
    rows: list[Row] = []
    for level, (a, b) in product(levels, combinations(models, 2)):
        rows += _rows(scores, bottom, curves, shares, level, a, b, n_splits=n_splits, seed=seed)
    return Circuits(
        to_frame(rows, CIRCUIT_COLUMNS, attrs),
        to_frame(_curve_rows(curves, scores, shares), FAITHFULNESS_COLUMNS, attrs),
        scores,
    )


def make_contrast(model: HookedModel, pairs: ContrastivePairs, answers: Answers) -> Contrast:
    """Both sides of the pairs as one batch, positive prompts first; answers one a pair or prompt.

    Raises `InputError` when prompts begin with different tokens (the first is never ablated), or
    the answers do not fit.
    """
    tokenized = tokenize_pairs(model, pairs)
    prompts = make_prompts(model, [*tokenized.positive, *tokenized.negative])
    if len(prompts.tokens[:, 0].unique()) > 1:  # type: ignore[no-untyped-call]
        raise InputError(
            "the prompts begin with different tokens; circuits are compared on prompts that begin "
            "with the same one, such as BOS, because it is left as it is"
        )
    if len(answers.positive) == len(pairs) > 1:
        answers = Answers(answers.positive.repeat(2, 1), answers.negative.repeat(2, 1))
    answers.check(model, len(prompts))
    return Contrast(prompts, answers)


def _check(
    shares: Sequence[float],
    levels: Sequence[str],
    interventions: Mapping[str, Intervention],
    floor: Intervention | None,
) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise InputError(f"shares are between 0 and 1, got {list(shares)}")
    if not levels or set(levels) - set(LEVELS):
        raise InputError(f"levels are {', '.join(LEVELS)}, got {list(levels)}")
    if not interventions or UNSTEERED in interventions:
        raise InputError(
            f"give one or more interventions, none called {UNSTEERED!r}; got {list(interventions)}"
        )
    for of in (*interventions.values(), *(() if floor is None else (floor,))):
        if not isinstance(of, Intervention):
            raise InputError(f"expected Intervention(vector, coefficient), got {of!r}")
        if of.vector is None or "edge" not in levels:
            continue
        if not isinstance(of.vector.operator, Add) or of.vector.condition is not None:
            raise InputError(
                "edges are cut by subtraction from the stream, so vectors must be added, without "
                'a condition; compare nodes alone, levels=("node",)'
            )


def _values(scores: Scores, level: str) -> tuple[Tensor, Tensor]:
    """Scores pair by pair, and which of them exist."""
    if level == "node":
        return scores.nodes, torch.ones(len(scores.nodes), dtype=torch.bool)
    return scores.edges, scores.is_edge


def _size(scores: Scores, level: str, share: float) -> int:
    _, exists = _values(scores, level)
    return max(1, round(share * int(exists.sum())))


def _circuit(scores: Scores, level: str, share: float) -> Tensor:
    values, exists = _values(scores, level)
    return largest(values.mean(dim=-1), _size(scores, level, share), exists)


def _faithfulness(
    model: HookedModel,
    contrast: Contrast,
    intervention: Intervention,
    means: Means,
    circuits: Mapping[str, Sequence[Tensor]],
    level: str,
    progress: Progress,
) -> dict[str, list[float]]:
    """Faithfulness in one model of the circuits of several, size by size."""
    run_part: Any = run_nodes if level == "node" else run_edges
    done, n_runs = 0, 2 + sum(map(len, circuits.values()))
    progress("runs", done, n_runs)

    def run(kept: Tensor) -> float:
        nonlocal done
        metric: float = run_part(model, contrast, intervention, means, kept)
        done += 1
        progress("runs", done, n_runs)
        return metric

    (like, *_), *_ = circuits.values()
    whole, empty = run(torch.ones_like(like)), run(torch.zeros_like(like))
    if not abs(whole - empty) > 1e-6 * max(abs(whole), abs(empty)):
        raise InputError(
            f"the behaviour is {whole:.3g} logits with and without all {level}s, so there is "
            "nothing that a circuit could explain; choose answers that the pairs' sides differ in"
        )
    return {
        of: [(run(kept) - empty) / (whole - empty) for kept in sizes]
        for of, sizes in circuits.items()
    }


def _areas(shares: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD: trapezoids from the empty circuit (0) to the whole model (1); shares rise."""
    from scipy.integrate import trapezoid

    x = np.array([0.0, *shares, 1.0])
    f = np.array([0.0, *faithfulness, 1.0])
    return float(trapezoid(f, x)), float(trapezoid(np.abs(1 - f), x))


def _curve_rows(
    curves: Mapping[tuple[str, str, str], Sequence[float]],
    scores: Mapping[str, Scores],
    shares: Sequence[float],
) -> list[Row]:
    rows: list[Row] = []
    for (level, circuit_of, run_in), curve in curves.items():
        of = scores[circuit_of]
        total = int(_values(of, level)[1].sum())
        cpr, cmd = _areas([_size(of, level, share) / total for share in shares], curve)
        for share, faithfulness in zip(shares, curve, strict=True):
            rows.append(
                {
                    "level": level,
                    "circuit_of": circuit_of,
                    "run_in": run_in,
                    "share": share,
                    "size": _size(scores[circuit_of], level, share),
                    "faithfulness": faithfulness,
                    "cpr": cpr,
                    "cmd": cmd,
                }
            )
    return rows


def _rows(
    scores: Mapping[str, Scores],
    bottom: Scores | None,
    curves: Mapping[tuple[str, str, str], Sequence[float]],
    shares: Sequence[float],
    level: str,
    a: str,
    b: str,
    *,
    n_splits: int,
    seed: int,
) -> list[Row]:
    rows: list[Row] = []
    rank = _rank(*(_mean(scores[name], level) for name in (a, b)))
    rank_floor = float("nan")
    if bottom is not None:
        rank_floor = _rank(_mean(scores[UNSTEERED], level), _mean(bottom, level))
    halves = [
        _halves(scores[name], level, seed=seed + split)
        for name in (a, b)
        for split in range(n_splits)
    ]
    rank_ceiling = _average([_rank(*pair) for pair in halves])
    for i, share in enumerate(shares):
        size = _size(scores[a], level, share)
        overlap = float("nan")
        if bottom is not None:
            overlap = _iou(
                _circuit(scores[UNSTEERED], level, share), _circuit(bottom, level, share)
            )
        rows.append(
            {
                "level": level,
                "a": a,
                "b": b,
                "share": share,
                "size": size,
                "iou": _iou(_circuit(scores[a], level, share), _circuit(scores[b], level, share)),
                "iou_ceiling": _average(
                    [_iou(largest(one, size), largest(other, size)) for one, other in halves]
                ),
                "iou_floor": overlap,
                "rank": rank,
                "rank_ceiling": rank_ceiling,
                "rank_floor": rank_floor,
                "a_in_a": curves[level, a, a][i],
                "a_in_b": curves[level, a, b][i],
                "b_in_a": curves[level, b, a][i],
                "b_in_b": curves[level, b, b][i],
            }
        )
    return rows


def _mean(scores: Scores, level: str) -> Float[Tensor, " item"]:
    values, exists = _values(scores, level)
    return values[exists].mean(dim=-1)


def _halves(
    scores: Scores, level: str, *, seed: int
) -> tuple[Float[Tensor, " item"], Float[Tensor, " item"]]:
    """Mean scores over two random halves of the pairs."""
    values, exists = _values(scores, level)
    order = torch.randperm(values.shape[-1], generator=torch.Generator().manual_seed(seed))
    one, other = order.chunk(2)
    return values[exists][:, one].mean(dim=-1), values[exists][:, other].mean(dim=-1)


def _rank(one: Float[Tensor, " item"], other: Float[Tensor, " item"]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one.abs().numpy(), other.abs().numpy()).statistic)


def _iou(one: Bool[Tensor, "*shape"], other: Bool[Tensor, "*shape"]) -> float:
    return float((one & other).sum()) / float((one | other).sum())


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
