"""Same circuit or another: circuits of one behaviour in several models, steered and not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import TypeVar

import pandas as pd
import torch

from steerlens.circuits.answers import Answers
from steerlens.circuits.components import check_additive
from steerlens.circuits.faithfulness import Bench, faithfulness_rows, ranked_faithfulness
from steerlens.circuits.graphs import (
    Contrast,
    Graph,
    Scores,
    attribute,
    check_sum,
    make_contrast,
    make_graph,
)
from steerlens.circuits.interventions import Intervention
from steerlens.circuits.overlap import (
    SELECTIONS,
    Drawn,
    Halves,
    Sizes,
    overlap_rows,
    ranked_overlaps,
)
from steerlens.circuits.prompts import choosing_half, counting, half_record
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.checkpoint import Checkpoint, Tensors
from steerlens.errors import InputError
from steerlens.models import HookedModel, provenance
from steerlens.progress import Progress
from steerlens.steering import Add
from steerlens.tables import to_frame
from steerlens.validation import Whole, checked

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
UNSTEERED = "unsteered"
LEVELS = ("node", "edge")
MEAN = "mean of "
N = TypeVar("N")
T = TypeVar("T")
Nulls = Mapping[str, Mapping[str, Sequence[Intervention]]]


@dataclass(frozen=True, eq=False)
class Circuits:
    """`table` has a row a pair of models, level, selection and size (columns `circuits`), of
    circuits that are chosen on one half of the pairs; `faithfulness` one a circuit, model and size
    (columns `faithfulness`), of these circuits run on the other half. `scores` are the attributions
    of each model on all pairs. `attrs["chosen_on"]` and `["tested_on"]` say which half is which.
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
    nulls: Nulls | None = None,
    shares: Sequence[float | int] = SHARES,
    levels: Sequence[str] = LEVELS,
    null_shares: Sequence[float | int] | None = None,
    n_splits: Whole = 20,
    seed: Whole = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Circuits:
    """The circuits of the pairs' contrast in the unsteered model and under each intervention.

    In each model nodes (heads and MLPs) and edges are scored by attribution on a random half of the
    groups of pairs. The circuits of the largest scores are compared by overlap, by rank, and by
    running each, on the other half, in the other's model, all else at its mean:
    `faithfulness = (m(circuit) - m(nothing)) / (m(all) - m(nothing))`. Overlap alone is no
    evidence: see docs/maths.md, "Same circuit or another", on ceilings and nulls.

    Args:
        model: The model, unsteered.
        pairs: Prompts that begin with the same token, which is left as it is, of 4 groups or more.
        answers: One row, one a pair, or one a prompt, positive ones first.
        interventions: By name; edges need vectors that are added, without a condition.
        nulls: What `null_interventions` gives for some of the interventions, by their name.
            Default: none, and no p-values.
        shares: Sizes of circuits, as shares of all nodes or edges, between 0 and 1.
        levels: "node", "edge" or both.
        null_shares: Those of `shares` at which node circuits (not edge circuits) are run under
            nulls too: for every null two runs, and two a share. Default: the largest.
        n_splits: Random halves of the groups of pairs; 0: no ceilings.
        seed: Of the half, the splits and the draws.
        progress: Told of the models scored and of the circuits run.
        checkpoint: As of `find_readers`.

    Raises:
        InputError: An argument is not as above, the answers do not fit, the model's stream is not
            the sum of heads and MLPs, or all nodes or edges change nothing; as `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import Intervention, compare_circuits, contrast_answers
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> circuits = compare_circuits(
        ...     model, pairs, answers, pushed, shares=[0.2], levels=["node"], n_splits=2
        ... )
        >>> circuits.table[["selection", "a", "b", "size"]].to_dict("list")
        {'selection': ['absolute', 'signed'], 'a': ['unsteered', 'unsteered'], \
'b': ['cheerful', 'cheerful'], 'size': [5, 5]}
    """
    shares, levels = sorted(set(shares)), tuple(dict.fromkeys(levels))
    null_shares = shares[-1:] if null_shares is None else sorted(set(null_shares))
    nulls = {} if nulls is None else nulls
    _check(shares, levels, null_shares, interventions, nulls)
    is_chosen_on = choosing_half(pairs.groups, seed)
    check_additive(model)
    pairs.warn_of_groups()
    contrast = replace(make_contrast(model, pairs, answers), checkpoint=checkpoint)
    check_sum(contrast)
    contrast.check_unsteered()
    chosen_on = contrast.of_pairs(is_chosen_on)
    models = {UNSTEERED: Intervention(), **interventions}
    n_drawn = len(_all(nulls))
    count = counting(progress, "circuits: models", len(models) + n_drawn)
    score = partial(_scored, chosen_on, with_edges="edge" in levels, count=count)
    compared = _Compared(
        {name: score(contrast, steered) for name, steered in models.items()},
        _each(nulls, partial(score, chosen_on)),
        contrast.of_pairs(~is_chosen_on),
        Halves(is_chosen_on, pairs.groups, n_splits, seed),
    )
    n_runs = len(levels) * len(models) * (2 + len(SELECTIONS) * len(models) * len(shares))
    n_runs += ("node" in levels) * n_drawn * (2 + len(SELECTIONS) * len(null_shares))
    ran = counting(progress, "circuits on their own: runs", n_runs)
    found = [compared.at(level, tuple(shares), tuple(null_shares), ran) for level in levels]
    rows, curve_rows = (list(chain(*of_table)) for of_table in zip(*found, strict=True))
    scores = {name: of_model.scores for name, of_model in compared.models.items()}
    attrs = {
        "n_pairs": len(pairs),
        "n_groups": len(set(pairs.groups)),
        "chosen_on": half_record(pairs.groups, is_chosen_on),
        "tested_on": half_record(pairs.groups, ~is_chosen_on),
        "fingerprint": pairs.fingerprint,
        "answers": answers.words(model),
        "metric": {name: of_model.metric for name, of_model in scores.items()},
        "coefficients": {name: steered.coefficient for name, steered in interventions.items()},
        "null_coefficients": _each(nulls, lambda null: null.coefficient),
        "n_splits": n_splits,
        "seed": seed,
        "provenance": provenance(model).to_dict(),
    }
    table = to_frame(ranked_overlaps(rows), "circuits", attrs)
    curves = to_frame(ranked_faithfulness(curve_rows), "faithfulness", attrs)
    return Circuits(table, curves, scores)


@dataclass(frozen=True, eq=False)
class _Scored:
    """A model: its graph, with the means of the half that circuits are chosen on, and scores."""

    graph: Graph
    scores: Scores


@dataclass(frozen=True, eq=False)
class _Compared:
    """Models, the nulls in their place by name and kind, and which pairs are for what."""

    models: Mapping[str, _Scored]
    nulls: Mapping[str, Mapping[str, Sequence[_Scored]]]
    tested_on: Contrast
    halves: Halves

    def at(
        self,
        level: str,
        shares: tuple[float, ...],
        null_shares: tuple[float, ...],
        count: Callable[[int], None],
    ) -> tuple[list[Drawn], list[Drawn]]:
        """Rows of both tables at one level; `count` is told of the runs."""
        items = {name: of_model.scores.items(level) for name, of_model in self.models.items()}
        n_items = len(items[UNSTEERED])
        null_items = _each(self.nulls, lambda of: of.scores.items(level).mean(dim=1))

        def bench(of_model: _Scored) -> Bench:
            graph = replace(of_model.graph, contrast=self.tested_on)
            return Bench.of(graph, level, n_items, count)

        benches = {name: bench(of_model) for name, of_model in self.models.items()}
        for of_model in benches.values():
            of_model.check()
        null_benches = _each(self.nulls, bench) if level == "node" else {}
        rows: list[Drawn] = []
        curve_rows: list[Drawn] = []
        is_chosen_on = self.halves.is_chosen_on
        for selection in SELECTIONS:
            sizes = Sizes(level, selection, shares, n_items)
            circuits = {
                name: sizes.circuits(scores[:, is_chosen_on].mean(dim=1))
                for name, scores in items.items()
            }
            curve_rows += faithfulness_rows(
                *(sizes, circuits, benches, null_benches),
                null_shares=null_shares,
                seed=self.halves.seed,
                count=count,
            )
            for a, b in combinations(items, 2):
                of_null = null_items.get(b, {}) if a == UNSTEERED else {}
                rows += overlap_rows(sizes, items, (a, b), of_null, self.halves)
        return rows, curve_rows


def _each(
    nulls: Mapping[str, Mapping[str, Sequence[N]]], make: Callable[[N], T]
) -> dict[str, dict[str, list[T]]]:
    """What `make` gives of every null, by name and kind as they are."""
    return {
        name: {kind: [make(null) for null in some] for kind, some in kinds.items()}
        for name, kinds in nulls.items()
    }


def _all(nulls: Nulls) -> list[Intervention]:
    return [null for kinds in nulls.values() for some in kinds.values() for null in some]


def _scored(
    chosen_on: Contrast,
    contrast: Contrast,
    steered: Intervention,
    *,
    with_edges: bool,
    count: Callable[[int], None],
) -> _Scored:
    """A model with the means of `chosen_on`, and `contrast`'s scores against them, by pair."""

    def compute() -> Tensors:
        graph = make_graph(chosen_on, steered)
        scores = attribute(replace(graph, contrast=contrast), with_edges=with_edges)
        if contrast is chosen_on:  # a null: of all of them the means alone are kept
            nodes, edges = (v.mean(dim=-1, keepdim=True) for v in (scores.nodes, scores.edges))
            scores = replace(scores, nodes=nodes, edges=edges)
        metric = torch.tensor(scores.metric, dtype=torch.float64)
        means = {f"{MEAN}{name}": mean.cpu() for name, mean in graph.means.items()}
        return {**vars(scores), "metric": metric, **means}

    kept = contrast.once(("scores", steered.decided, chosen_on.decided, with_edges), compute)
    device = contrast.model.cfg.device
    means = {n.removeprefix(MEAN): v.to(device) for n, v in kept.items() if n.startswith(MEAN)}
    scores = Scores(kept["nodes"], kept["edges"], kept["is_edge"], float(kept["metric"]))
    count(1)
    return _Scored(Graph(chosen_on, steered, means), scores)


def _check(
    shares: Sequence[float],
    levels: Sequence[str],
    null_shares: Sequence[float],
    interventions: Mapping[str, Intervention],
    nulls: Nulls,
) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise InputError(f"shares are between 0 and 1, got {list(shares)}")
    if not null_shares or set(null_shares) - set(shares):
        raise InputError(f"null_shares are some of shares, {shares}; got {list(null_shares)}")
    if not levels or set(levels) - set(LEVELS):
        raise InputError(f"levels are {', '.join(LEVELS)}, got {list(levels)}")
    if not interventions or UNSTEERED in interventions:
        raise InputError(
            f"give one or more interventions, none called {UNSTEERED!r}; got {list(interventions)}"
        )
    if not_there := set(nulls) - set(interventions):
        raise InputError(f"nulls are of interventions, none is called {sorted(not_there)}")
    if not all(some for kinds in nulls.values() for some in (kinds, *kinds.values())):
        raise InputError("nulls hold no vector of some kind; make them with null_interventions")
    for steered in (*interventions.values(), *_all(nulls)):
        if steered.vector is None or "edge" not in levels:
            continue
        if not isinstance(steered.vector.operator, Add) or steered.vector.condition is not None:
            raise InputError(
                "edges are cut by subtraction from the stream, so vectors must be added, without "
                'a condition; compare nodes alone, levels=("node",)'
            )
