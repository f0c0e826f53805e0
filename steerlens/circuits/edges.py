"""The largest edges of circuits, as a table."""

from collections.abc import Mapping

import pandas as pd

from steerlens.circuits.components import components
from steerlens.circuits.graphs import Scores, largest, readers
from steerlens.models.loading import HookedModel
from steerlens.tables import EDGE_COLUMNS, Row, to_frame


def edge_table(
    model: HookedModel, scores: Mapping[str, Scores], *, n_edges: int = 40
) -> pd.DataFrame:
    """The edges of each model with the largest absolute score, as a table (`EDGE_COLUMNS`).

    `scores` are those of `compare_circuits`, a model's name each. Raises `InputError` as
    `readers` does.

    Examples:
        >>> from steerlens.circuits import Intervention, compare_circuits, contrast_answers
        >>> from steerlens.circuits.edges import edge_table
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> pushed = {"cheerful": Intervention(vector, 4)}
        >>> found = compare_circuits(model, pairs, answers, pushed, shares=[0.2], n_splits=2)
        >>> edges = edge_table(model, found.scores, n_edges=5)
        >>> edges.groupby("model").size().to_dict()
        {'cheerful': 5, 'unsteered': 5}
    """
    parts, ends = components(model), readers(model)
    rows: list[Row] = []
    for name, of in scores.items():
        mean = of.edges.mean(dim=-1)
        rows += [
            {
                "model": name,
                "writer": str(parts[i]),
                "writer_layer": parts[i].layer,
                "writer_head": parts[i].head,
                "reader": str(ends[j]),
                "reader_layer": ends[j].layer,
                "score": float(mean[i, j]),
            }
            for i, j in largest(mean, n_edges, of.is_edge).nonzero().tolist()
        ]
    return to_frame(rows, EDGE_COLUMNS, {"n_edges": n_edges})
