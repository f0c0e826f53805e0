"""Columns as data, with unit and meaning; rows to pandas; tables to files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A table column: its name, pandas dtype, unit and meaning."""

    name: str
    dtype: Literal["str", "int64", "float64", "bool"]
    unit: str
    meaning: str


_HOOK = (
    Column("hook_name", "str", "", "hook of the direction (where a cell adds it)"),
    Column("layer", "int64", "", "block index of the hook"),
)

SWEEP_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("coefficient", "float64", "residual units", "what multiplies the unit direction"),
    Column("readout_hook", "str", "", "hook at which the difference is measured"),
    Column("n_pairs", "int64", "pairs", "contrastive pairs measured"),
    Column(
        "projection",
        "float64",
        "residual units",
        "mean of (h_pos(+c) - h_neg(-c)) . direction at the readout hook",
    ),
    Column("projection_ci_low", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column("projection_ci_high", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column(
        "projection_shift",
        "float64",
        "residual units",
        "mean of (h_pos(+c) - h_pos(0)) . direction at the readout hook",
    ),
    Column(
        "separation",
        "float64",
        "residual units",
        "mean L2 norm of h_pos(+c) - h_neg(-c) at the readout hook",
    ),
    Column(
        "logprob_nats",
        "float64",
        "nats per token",
        "mean log-probability of the positive prompts' labels under +c",
    ),
    Column("baseline_logprob_nats", "float64", "nats per token", "the same, unsteered"),
    Column(
        "degradation_nats",
        "float64",
        "nats per token",
        "baseline logprob - steered logprob; positive is worse",
    ),
    Column("degradation_ci_low", "float64", "nats per token", "95% bootstrap interval over pairs"),
    Column("degradation_ci_high", "float64", "nats per token", "95% bootstrap interval over pairs"),
    Column(
        "coherence_penalty",
        "float64",
        "weight * nats^2",
        "weight * mean of relu(margin * baseline - logprob)^2 over pairs",
    ),
    Column("loss", "float64", "", "-projection + coherence_penalty (the reference form)"),
    Column(
        "coherent",
        "bool",
        "",
        "mean logprob within the budget; false where undefined",
    ),
)
"""One row a cell: one hook and one coefficient."""

LAYER_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("separation", "float64", "residual units", "mean L2 norm of the differences"),
    Column("projection", "float64", "residual units", "mean of difference . direction"),
    Column(
        "projection_std", "float64", "residual units", "standard deviation of it over pairs (n - 1)"
    ),
    Column("agreement", "float64", "cosine", "mean cosine of the differences with the direction"),
    Column(
        "explained_variance",
        "float64",
        "share",
        "sum of (difference . direction)^2 / sum of |difference|^2 over pairs, uncentred",
    ),
    Column("resid_norm", "float64", "residual units", "mean norm of the activations of both sides"),
    Column(
        "logprob_nats", "float64", "nats per token", "mean logprob of the positive prompts' labels"
    ),
    Column(
        "coherence_penalty",
        "float64",
        "weight * nats^2",
        "penalty of the noref loss: mean logprob^2 with the default margin and weight",
    ),
    Column("loss", "float64", "", "-separation + coherence_penalty (the noref form)"),
    Column(
        "boundary_pos",
        "float64",
        "residual units",
        "coherence boundary for c > 0; inf beyond the searched range, NaN where the search failed",
    ),
    Column("boundary_neg", "float64", "residual units", "the same for c < 0: below 0, or -inf"),
    Column(
        "predicted_boundary_pos",
        "float64",
        "residual units",
        "boundary_pos from slope and curvature at c = 0 alone",
    ),
    Column("predicted_boundary_neg", "float64", "residual units", "boundary_neg likewise"),
    Column(
        "projection_at_boundary",
        "float64",
        "residual units",
        "projection of the cell at boundary_pos, at the readout hook",
    ),
    Column("boundary_pos_ci_low", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column(
        "boundary_pos_ci_high", "float64", "residual units", "95% bootstrap interval over pairs"
    ),
    Column("boundary_neg_ci_low", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column(
        "boundary_neg_ci_high", "float64", "residual units", "95% bootstrap interval over pairs"
    ),
    Column(
        "predicted_first_order_pos",
        "float64",
        "residual units",
        "boundary_pos from the slope at c = 0 alone; inf where the logprob rises, NaN for KL",
    ),
    Column("predicted_first_order_neg", "float64", "residual units", "boundary_neg likewise"),
    Column(
        "prediction_trusted",
        "bool",
        "",
        "both predicted boundaries within 40% of finite measured ones; else false",
    ),
    Column(
        "reentry_pos",
        "float64",
        "residual units",
        "a coefficient beyond boundary_pos that was seen to be within the budget again",
    ),
    Column("reentry_neg", "float64", "residual units", "the same for boundary_neg"),
    Column(
        "boundary_on",
        "str",
        "",
        "text of the boundary columns; none where they are empty",
    ),
)
"""One row a hook, of the unsteered model; boundaries are NaN until they are measured."""


BOUNDARY_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("coefficient", "float64", "residual units", "what multiplies the unit direction"),
    Column("n_prompts", "int64", "prompts", "prompts it was evaluated on"),
    Column(
        "loss_nats",
        "float64",
        "nats per token",
        "degradation, or KL(unsteered || steered) reduced as the budget says",
    ),
    Column("allowance_nats", "float64", "nats per token", "the largest loss within the budget"),
)
"""One row an evaluation of the boundary search."""

GRADIENT_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("loss_hook", "str", "", "hook at which the separation is taken"),
    Column("n_pairs", "int64", "pairs", "rows in each mean"),
    Column("separation_norm", "float64", "", "mean norm of the separation's gradient rows"),
    Column(
        "coherence_norm", "float64", "1 / residual unit", "mean norm of the weighted penalty's rows"
    ),
    Column("coherence_share", "float64", "share", "coherence_norm over the sum of both norms"),
    Column("cosine", "float64", "cosine", "mean cosine of the two rows of each pair"),
    Column("weight", "float64", "", "weight of the coherence penalty"),
    Column("balanced_weight", "float64", "", "weight at which both mean norms are equal"),
)
"""One row a hook: the two terms of the loss's gradient, of the positive prompts."""

SHAPE_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("angle", "float64", "degrees", "from the frozen direction towards the orthogonal one"),
    Column("boundary", "float64", "residual units", "coherence boundary in that direction"),
    Column("boundary_ci_low", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column("boundary_ci_high", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column("x", "float64", "residual units", "boundary * cos(angle): along the direction"),
    Column("y", "float64", "residual units", "boundary * sin(angle): along the orthogonal one"),
    Column("predicted_boundary", "float64", "residual units", "from slope and curvature at 0"),
)
"""One row an angle of a boundary's shape."""


def to_frame(
    rows: Sequence[Row], columns: Sequence[Column], attrs: Mapping[str, Any]
) -> pd.DataFrame:
    """Rows as a DataFrame with exactly `columns`, typed; a measure that a row does not give is NaN.

    `attrs` become `DataFrame.attrs` (they must be JSON-serialisable). Raises `KeyError` when a row
    holds a key that is not a column, or lacks one whose type has no NaN.
    """
    names = [column.name for column in columns]
    required = {column.name for column in columns if column.dtype != "float64"}
    for row in rows:
        if unknown := row.keys() - set(names):
            raise KeyError(f"row keys {sorted(unknown)} are not columns")
        if missing := required - row.keys():
            raise KeyError(f"the row lacks {sorted(missing)}")
    frame = pd.DataFrame.from_records([dict(row) for row in rows], columns=names).astype(
        {column.name: column.dtype for column in columns}
    )
    frame.attrs.update(json.loads(json.dumps(dict(attrs))))
    return frame


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV: full float precision, NaN as an empty field, LF line ends."""
    frame.to_csv(path, index=False, lineterminator="\n")


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet; its attrs travel in the file's metadata."""
    frame.to_parquet(path, index=False, engine="pyarrow")
