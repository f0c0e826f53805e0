"""How much of the behaviour a circuit keeps alone, run on pairs that it was not chosen on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.circuits.components import rows_of
from steerlens.circuits.graphs import Graph, run_circuit
from steerlens.circuits.overlap import Drawn, Sizes, with_null_columns
from steerlens.engine.checkpoint import Tensors
from steerlens.errors import InputError
from steerlens.stats import ratio_interval
from steerlens.tables import Row

Circuits = Mapping[str, Sequence[Bool[Tensor, " item"]]]
"""The circuits of each model, size by size."""


@dataclass(frozen=True)
class Bench:
    """A model in which circuits are run, and its behaviour (logits) beyond the empty circuit's."""

    graph: Graph
    level: str
    whole: Float[np.ndarray, " pair"]
    empty: Float[np.ndarray, " pair"]

    @classmethod
    def of(cls, graph: Graph, level: str, n_items: int, count: Callable[[int], None]) -> "Bench":
        """After two runs, of which `count` is told."""
        everything = torch.ones(n_items, dtype=torch.bool)
        whole, empty = (_run(graph, level, kept, count) for kept in (everything, ~everything))
        return cls(graph, level, whole - empty, empty)

    def check(self) -> None:
        """Raise `InputError` when nothing is left of the behaviour to explain."""
        kept, empty = float(self.whole.mean()), float(self.empty.mean())
        if not abs(kept) > 1e-6 * max(abs(kept + empty), abs(empty)):
            raise InputError(
                f"the behaviour is {empty:.3g} logits with and without all {self.level}s, so there "
                "is nothing that a circuit could explain; choose answers that the pairs' sides "
                "differ in"
            )

    def run(
        self, circuits: Sequence[Bool[Tensor, " item"]], count: Callable[[int], None]
    ) -> Float[np.ndarray, "size pair"]:
        """What each circuit keeps of the behaviour, pair by pair (logits)."""
        return np.stack([_run(self.graph, self.level, c, count) - self.empty for c in circuits])

    def share(self, kept: Float[np.ndarray, "*size pair"]) -> Float[np.ndarray, "*size"]:
        """Faithfulness: the mean that is kept, of the whole."""
        with np.errstate(divide="ignore", invalid="ignore"):
            shares: NDArray[np.float64] = kept.mean(axis=-1) / self.whole.mean()
        return shares


def faithfulness_rows(
    sizes: Sizes,
    circuits: Circuits,
    benches: Mapping[str, Bench],
    nulls: Mapping[str, Mapping[str, Sequence[Bench]]],
    *,
    null_shares: Sequence[float],
    seed: int,
    count: Callable[[int], None],
) -> list[Drawn]:
    """Every model's circuits in every model, without the columns of `ranked_faithfulness`.

    `nulls` holds, by model and kind, those that stand in its place; the circuits of the first model
    at `null_shares` are run in each of them.
    """
    rows: list[Drawn] = []
    first = next(iter(circuits))
    at = [sizes.shares.index(share) for share in null_shares]
    chosen = [circuits[first][i] for i in at]
    unchanged = np.zeros(0)
    for run_in, bench in benches.items():
        kept = {name: bench.run(of_model, count) for name, of_model in circuits.items()}
        if run_in == first:
            unchanged = bench.share(kept[first])
        changes = {
            kind: np.array([null.share(null.run(chosen, count)) for null in some]) - unchanged[at]
            for kind, some in nulls.get(run_in, {}).items()
        }
        for circuit_of in circuits:
            same = {"level": sizes.level, "selection": sizes.selection}
            columns = _curve(sizes, bench, kept[circuit_of], kept[run_in], seed=seed)
            of_curve = rows_of(**same, circuit_of=circuit_of, run_in=run_in, **columns)
            for i, row in enumerate(of_curve):
                drawn = {}
                if circuit_of == first and i in at:
                    drawn = {kind: of_kind[:, at.index(i)] for kind, of_kind in changes.items()}
                rows.append(Drawn(row, run_in, row["faithfulness"] - unchanged[i], drawn))
    return rows


def ranked_faithfulness(drawn: Sequence[Drawn]) -> list[Row]:
    """Whole rows: the change of faithfulness ranked among nulls, alone and in all rows that are."""
    return [
        {
            **one.row,
            "n_null": found["n_null"],
            "null_low": one.row["faithfulness"] - one.change + found["null_low"],
            "null_high": one.row["faithfulness"] - one.change + found["null_high"],
            "p_value": found["p_value"],
            "p_family": found["p_layers"],
        }
        for one, found in with_null_columns(drawn)
    ]


def _curve(
    sizes: Sizes,
    bench: Bench,
    kept: Float[np.ndarray, "size pair"],
    own: Float[np.ndarray, "size pair"],
    *,
    seed: int,
) -> dict[str, Any]:
    """Columns of one circuit in one model; `own` is what that model's own circuits keep there."""
    from scipy.integrate import trapezoid

    groups = bench.graph.contrast.prompts.groups[: len(bench.whole)]

    def ends(values: Float[np.ndarray, " pair"]) -> tuple[float, float]:
        return ratio_interval(values, bench.whole, groups=groups, seed=seed)

    shares = bench.share(kept)
    low, high = np.array([ends(values) for values in kept]).T
    short_low, short_high = np.array([ends(values) for values in own - kept]).T
    x = np.array([0.0, *(size / sizes.n_items for size in sizes.sizes), 1.0])
    by_pair = trapezoid(np.vstack([0 * bench.whole, kept, bench.whole]), x, axis=0)
    area_low, area_high = ends(by_pair)
    return {
        **{"share": list(sizes.shares), "size": sizes.sizes, "n_groups": len(set(groups))},
        **{"faithfulness": shares, "ci_low": low, "ci_high": high},
        **{"shortfall": bench.share(own) - shares},
        **{"shortfall_ci_low": short_low, "shortfall_ci_high": short_high},
        "area_under_faithfulness": float(bench.share(by_pair[None])[0]),
        **{"area_ci_low": area_low, "area_ci_high": area_high},
        "area_from_one": float(trapezoid(np.abs(1 - np.array([0.0, *shares, 1.0])), x)),
    }


def _run(
    graph: Graph, level: str, kept: Bool[Tensor, " item"], count: Callable[[int], None]
) -> Float[np.ndarray, " pair"]:
    def compute() -> Tensors:
        return {"metric": run_circuit(graph, level, kept)}

    decided = ("circuit", graph.intervention.decided, [*graph.means.values()], level, kept)
    metric: NDArray[np.float64] = graph.contrast.once(decided, compute)["metric"].numpy()
    count(1)
    return metric
