"""Same circuit or another: circuits of one behaviour in several models, steered and not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.components import check_additive, rows_of
from steerlens.circuits.graphs import (
    Contrast,
    Graph,
    Scores,
    attribute,
    check_sum,
    largest,
    make_contrast,
    make_graph,
    run_circuit,
)
from steerlens.circuits.interventions import Intervention
from steerlens.circuits.prompts import counting
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.checkpoint import Checkpoint, Tensors
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import provenance
from steerlens.progress import Progress
from steerlens.steering import Add
from steerlens.tables import CIRCUIT_COLUMNS, FAITHFULNESS_COLUMNS, Row, to_frame
from steerlens.validation import Whole, checked

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
UNSTEERED = "unsteered"
LEVELS = ("node", "edge")


@dataclass(frozen=True, eq=False)
class Circuits:
    """`table` has a row a pair of models, level and size (`CIRCUIT_COLUMNS`), `faithfulness` one a
    circuit, model and size (`FAITHFULNESS_COLUMNS`); `scores` the attributions of each model.
    """

    table: pd.DataFrame
    faithfulness: pd.DataFrame
    scores: Mapping[str, Scores]

    def __repr__(self) -> str:
        return f"Circuits({', '.join(self.scores)})"


@checked
def compare_circuits(
    model: HookedModel,
    pairs: ContrastivePairs,
    answers: Answers,
    interventions: Mapping[str, Intervention],
    *,
    floor: Intervention | None = None,
    shares: Sequence[float | int] = SHARES,
    levels: Sequence[str] = LEVELS,
    n_splits: Whole = 20,
    seed: Whole = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Circuits:
    """The circuits of the pairs' contrast in the unsteered model and under each intervention.

    The behaviour is the mean difference of the answer logit difference between the two prompts of
    a pair. In each model nodes (heads and MLPs) and edges are scored by attribution against their
    means there; the circuit of a size is the largest by absolute score. Two circuits are compared
    by overlap (`iou`), by Spearman's correlation of all absolute scores (`rank`), and by running
    each in the other's model, everything else at its mean there:
    `faithfulness = (m(circuit) - m(nothing)) / (m(all) - m(nothing))`. Overlap alone is no
    evidence. Its ceiling is the overlap of circuits from random halves of the groups (mean over
    splits and both models; each half has half the groups, so an overlap on all of them may exceed
    it), its floor that of the unsteered model with the one under `floor`. `cpr` and `cmd` are the
    areas under faithfulness, and between it and 1, against the share of nodes or edges that the
    circuit has, from 0 to 1 (Mueller et al. 2025, arXiv:2504.13151).

    Args:
        model: The model, unsteered.
        pairs: Prompts that begin with the same token, which is left as it is.
        answers: One row, one a pair, or one a prompt, positive ones first.
        interventions: By name; edges need vectors that are added, without a condition.
        floor: Best a random vector at equal KL (`random_intervention`); None: NaN.
        shares: Sizes of circuits, as shares of all nodes or edges, between 0 and 1.
        levels: "node", "edge" or both.
        n_splits: Random halves of the groups of pairs; 0: no ceilings.
        seed: Of the splits.
        progress: Told of the models scored and of the circuits run.
        checkpoint: As of `find_readers`.

    Raises:
        InputError: An argument is not as above, the answers do not fit, heads and MLPs do not add
            up to the model's stream, or nothing is left of the behaviour to explain; and as
            `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import Intervention, compare_circuits, contrast_answers
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> circuits = compare_circuits(
        ...     model, pairs, answers, pushed, shares=[0.2], levels=["node"], n_splits=2
        ... )
        >>> circuits.table[["a", "b", "size"]].to_dict("list")
        {'a': ['unsteered'], 'b': ['cheerful'], 'size': [5]}
    """
    shares, levels = sorted(set(shares)), tuple(dict.fromkeys(levels))
    _check(shares, levels, interventions, floor)
    check_additive(model)
    contrast = replace(make_contrast(model, pairs, answers), checkpoint=checkpoint)
    check_sum(contrast)
    contrast.check_unsteered()
    names = [UNSTEERED, *interventions]
    models = [Intervention(), *interventions.values(), *([] if floor is None else [floor])]
    graphs, every = _scored(contrast, models, with_edges="edge" in levels, progress=progress)
    scores = dict(zip(names, every, strict=False))
    n_runs = len(levels) * len(names) * (2 + len(names) * len(shares))
    count = counting(progress, "circuits on their own: runs", n_runs)
    rows: list[Row] = []
    curve_rows: list[Row] = []
    for name in levels:
        level = _Level(
            *(name, shares, scores, None if floor is None else every[-1]),
            *(n_splits, seed, pairs.groups),
        )
        curves: Curves = {}
        for run_in, graph in zip(names, graphs, strict=False):
            curves |= level.faithfulness(run_in, graph, count)
        curve_rows += level.curve_rows(curves)
        for a, b in combinations(names, 2):
            rows += level.rows(a, b, curves)
    attrs = {
        "n_pairs": len(pairs),
        "n_groups": len(set(pairs.groups)),
        "fingerprint": pairs.fingerprint,
        "answers": answers.words(model),
        "metric": {name: of_model.metric for name, of_model in scores.items()},
        "coefficients": {name: steered.coefficient for name, steered in interventions.items()},
        "n_splits": n_splits,
        "seed": seed,
        "provenance": provenance(model).to_dict(),
    }
    table, faithfulness = (
        to_frame(*columns, attrs)
        for columns in ((rows, CIRCUIT_COLUMNS), (curve_rows, FAITHFULNESS_COLUMNS))
    )
    return Circuits(table, faithfulness, scores)


def _scored(
    contrast: Contrast,
    models: Sequence[Intervention],
    *,
    with_edges: bool,
    progress: Progress | None,
) -> tuple[list[Graph], list[Scores]]:
    """The graph and the scores of the model under each intervention."""
    graphs: list[Graph] = []
    scores: list[Scores] = []
    count = counting(progress, "circuits: models", len(models))
    for intervention in models:
        graphs.append(make_graph(contrast, intervention))
        decided = ("scores", intervention.decided, with_edges)
        kept = contrast.once(decided, partial(_scores, graphs[-1], with_edges=with_edges))
        metric = float(kept["metric"])
        scores.append(Scores(kept["nodes"], kept["edges"], kept["is_edge"], metric))
        count(1)
    return graphs, scores


def _scores(graph: Graph, *, with_edges: bool) -> Tensors:
    scores = attribute(graph, with_edges=with_edges)
    return {**vars(scores), "metric": torch.tensor(scores.metric, dtype=torch.float64)}


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
    for steered in (*interventions.values(), *(() if floor is None else (floor,))):
        if steered.vector is None or "edge" not in levels:
            continue
        if not isinstance(steered.vector.operator, Add) or steered.vector.condition is not None:
            raise InputError(
                "edges are cut by subtraction from the stream, so vectors must be added, without "
                'a condition; compare nodes alone, levels=("node",)'
            )


Curves = dict[tuple[str, str], list[float]]
"""Faithfulness, size by size: whose circuit, and the model that it is run in."""


@dataclass(frozen=True)
class _Level:
    """Circuits of nodes, or of edges, in sizes from small to large."""

    level: str
    shares: Sequence[float]
    scores: Mapping[str, Scores]
    floor: Scores | None
    n_splits: int
    seed: int
    groups: tuple[int, ...]

    @cached_property
    def n_items(self) -> int:
        """How many nodes or edges there are."""
        return len(self.scores[UNSTEERED].items(self.level))

    @cached_property
    def sizes(self) -> list[int]:
        return [max(1, round(share * self.n_items)) for share in self.shares]

    def mean(self, scores: Scores) -> Float[Tensor, " item"]:
        return scores.items(self.level).mean(dim=-1)

    def circuits(self, name: str) -> list[Bool[Tensor, " item"]]:
        """Those of a model, size by size."""
        mean = self.mean(self.scores[name])
        return [largest(mean, size) for size in self.sizes]

    def faithfulness(self, run_in: str, graph: Graph, count: Callable[[int], None]) -> Curves:
        """Of every model's circuits in one model; `count` is told of the runs."""

        def run(kept: Bool[Tensor, " item"]) -> float:
            metric = graph.contrast.once(
                ("circuit", graph.intervention.decided, self.level, kept),
                lambda: {"metric": torch.tensor([run_circuit(graph, self.level, kept)]).double()},
            )
            count(1)
            return float(metric["metric"])

        everything = torch.ones(self.n_items, dtype=torch.bool)
        total, empty = run(everything), run(~everything)
        if not abs(total - empty) > 1e-6 * max(abs(total), abs(empty)):
            raise InputError(
                f"the behaviour is {total:.3g} logits with and without all {self.level}s, so there "
                "is nothing that a circuit could explain; choose answers that the pairs' sides "
                "differ in"
            )
        return {
            (name, run_in): [(run(kept) - empty) / (total - empty) for kept in self.circuits(name)]
            for name in self.scores
        }

    def curve_rows(self, curves: Curves) -> list[Row]:
        """Rows of `FAITHFULNESS_COLUMNS`, a model that is run in after another."""
        rows: list[Row] = []
        for (circuit_of, run_in), curve in curves.items():
            cpr, cmd = _areas([size / self.n_items for size in self.sizes], curve)
            columns = {"share": self.shares, "size": self.sizes, "faithfulness": curve}
            same = {"level": self.level, "circuit_of": circuit_of, "run_in": run_in}
            rows += rows_of(**columns, **same, cpr=cpr, cmd=cmd)
        return rows

    def rows(self, a: str, b: str, curves: Curves) -> list[Row]:
        """Rows of `CIRCUIT_COLUMNS` that compare two models."""
        means = {name: self.mean(scores) for name, scores in self.scores.items()}
        halves = [
            _halves(self.scores[name].items(self.level), self.groups, seed=self.seed + split)
            for name, split in product((a, b), range(self.n_splits))
        ]
        apart = [] if self.floor is None else [(means[UNSTEERED], self.mean(self.floor))]
        columns: dict[str, Any] = {"level": self.level, "a": a, "b": b}
        columns |= {"share": self.shares, "size": self.sizes}
        compared = {"": [(means[a], means[b])], "_ceiling": halves, "_floor": apart}
        for suffix, sides in compared.items():
            columns[f"rank{suffix}"] = _average([_rank(*pair) for pair in sides])
            columns[f"iou{suffix}"] = [
                _average([_iou(*pair, size) for pair in sides]) for size in self.sizes
            ]
        for circuit_of, run_in in product((("a", a), ("b", b)), repeat=2):
            columns[f"{circuit_of[0]}_in_{run_in[0]}"] = curves[circuit_of[1], run_in[1]]
        return rows_of(**columns)


def _areas(shares: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD: trapezoids from the empty circuit (0) to the whole model (1); shares rise."""
    from scipy.integrate import trapezoid

    x = np.array([0.0, *shares, 1.0])
    f = np.array([0.0, *faithfulness, 1.0])
    return float(trapezoid(f, x)), float(trapezoid(np.abs(1 - f), x))


def _halves(
    scores: Float[Tensor, "item pair"], groups: Sequence[int], *, seed: int
) -> tuple[Float[Tensor, " item"], Float[Tensor, " item"]]:
    """Mean scores over the pairs of two random halves of the groups."""
    n_groups = max(groups) + 1
    rank = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
    is_first = rank[torch.tensor(groups)] < (n_groups + 1) // 2
    return scores[:, is_first].mean(dim=-1), scores[:, ~is_first].mean(dim=-1)


def _rank(a: Float[Tensor, " item"], b: Float[Tensor, " item"]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.abs().numpy(), b.abs().numpy()).statistic)


def _iou(a: Float[Tensor, " item"], b: Float[Tensor, " item"], size: int) -> float:
    """Of the circuits of a size."""
    in_a, in_b = largest(a, size), largest(b, size)
    return float((in_a & in_b).sum()) / float((in_a | in_b).sum())


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
