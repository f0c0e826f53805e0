"""Columns as data, with unit and meaning; rows to pandas; tables to files."""

import csv
import html
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd

from steerlens.progress import printable

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A table column: its name, pandas dtype, unit and meaning."""

    name: str
    dtype: Literal["str", "int64", "float64", "bool"]
    unit: str
    meaning: str


def _interval(name: str, unit: str, over: str = "pairs") -> tuple[Column, Column]:
    meaning = f"95% bootstrap interval over {over}"
    low, high = (Column(f"{name}_ci_{end}", "float64", unit, meaning) for end in ("low", "high"))
    return low, high


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
    Column(
        "null_low",
        "float64",
        "residual units",
        "95% band of the projection under null vectors at the same coefficient; NaN without nulls",
    ),
    Column("null_high", "float64", "residual units", "the same band's upper end"),
    Column("p_value", "float64", "", "two-sided, of the projection under the null vectors"),
    Column("q_value", "float64", "", "p-value corrected for false discovery over all cells"),
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
    *_interval("separation", "residual units"),
    *_interval("projection", "residual units"),
    *_interval("agreement", "cosine"),
    *_interval("explained_variance", "share"),
    *_interval("resid_norm", "residual units"),
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

COMPARISON_COLUMNS: tuple[Column, ...] = (
    Column("method", "str", "", "how the direction was fitted; prompt: the persona written out"),
    Column("hook_name", "str", "", "where it is added; none for prompt"),
    Column("layer", "int64", "", "block of the hook; -1 for prompt"),
    Column(
        "coefficient",
        "float64",
        "residual units",
        "that spends the budget; inf where nothing searched does, NaN where the search failed",
    ),
    Column("n_items", "int64", "items", "held-out items measured"),
    Column("n_null", "int64", "vectors", "null vectors that reached the budget, of both kinds"),
    Column(
        "effect",
        "float64",
        "nats per token",
        "mean change of logprob(positive continuation) - logprob(negative one)",
    ),
    Column("effect_ci_low", "float64", "nats per token", "95% bootstrap interval over items"),
    Column("effect_ci_high", "float64", "nats per token", "95% bootstrap interval over items"),
    Column("null_low", "float64", "nats per token", "95% band of null vectors at the same budget"),
    Column("null_high", "float64", "nats per token", "the same band's upper end"),
    Column("p_value", "float64", "", "two-sided, of the effect under the null vectors"),
    Column("p_holm", "float64", "", "Holm-corrected over the layers of the method"),
    Column("q_value", "float64", "", "corrected for false discovery over all rows"),
    Column(
        "slope",
        "float64",
        "nats per token and residual unit",
        "mean over items of the slope of the gap against the coefficient",
    ),
    Column("anti_steerable", "float64", "share", "items whose slope is below 0"),
    Column(
        "spearman",
        "float64",
        "correlation",
        "mean over items whose gap changes, of the gap with the coefficient",
    ),
    Column("monotone", "float64", "share", "items whose gap rises at every step"),
    Column(
        "kl_nats",
        "float64",
        "nats per token",
        "mean KL(unsteered || steered) over all tokens of neutral texts the budget is not set on",
    ),
    Column("kl_p95_nats", "float64", "nats per token", "95th percentile of it over those tokens"),
    Column(
        "degradation_nats",
        "float64",
        "nats per token",
        "loss of logprob on the same texts, mean over texts",
    ),
    Column(
        "off_target",
        "float64",
        "nats per token",
        "mean over other datasets of the absolute effect there",
    ),
    Column(
        "distinct_3",
        "float64",
        "share",
        "distinct trigrams over all, of greedy continuations (40 tokens) of up to 4 items' prompts",
    ),
    Column(
        "train_effect",
        "float64",
        "nats per token",
        "the effect on training items, to choose by; in-sample for methods trained on them",
    ),
    Column("is_chosen", "bool", "", "the method's layer with the largest effect on training items"),
    Column(
        "verdict",
        "str",
        "",
        "effect, reversed, no effect shown; or why there is none: budget not reached, search "
        "failed, undefined (overflow), no null band, baseline",
    ),
)
"""One row a method and layer, at equal damage."""

SUMMARY_COLUMNS: tuple[Column, ...] = (
    Column("method", "str", "", "method"),
    Column("layer", "int64", "", "its layer, chosen on training items"),
    Column("coefficient", "float64", "residual units", "that spends the budget"),
    Column("effect", "float64", "nats per token", "as in the comparison"),
    Column("effect_ci_low", "float64", "nats per token", "95% bootstrap interval over items"),
    Column("effect_ci_high", "float64", "nats per token", "95% bootstrap interval over items"),
    Column("rank", "int64", "", "by effect, 1 the largest"),
    Column("rank_low", "int64", "", "95% bootstrap interval of the rank over items"),
    Column("rank_high", "int64", "", "95% bootstrap interval of the rank over items"),
    Column("verdict", "str", "", "as in the comparison"),
)
"""One row a method, at its chosen layer, best first."""

RELIABILITY_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("n_pairs", "int64", "pairs", "pairs used"),
    Column("agreement", "float64", "cosine", "mean cosine of the differences with their mean"),
    Column(
        "class_separation",
        "float64",
        "standard deviations",
        "d' along the direction, fitted and measured on different halves",
    ),
    Column(
        "split_half_cosine", "float64", "cosine", "mean between directions of two random halves"
    ),
    Column(
        "split_half_cosine_low", "float64", "cosine", "2.5th percentile of it over random halves"
    ),
    Column("cosine_quarter", "float64", "cosine", "of a quarter of the pairs with all, mean"),
    Column("cosine_half", "float64", "cosine", "of half the pairs with all, mean"),
    Column(
        "pca_cosine", "float64", "cosine", "absolute, of uncentred PCA with the mean difference"
    ),
)
"""One row a hook: how far its direction can be trusted before anything is steered."""

COSINE_COLUMNS: tuple[Column, ...] = (
    Column("vector_a", "str", "", "name of the first vector"),
    Column("hook_a", "str", "", "hook of its direction"),
    Column("layer_a", "int64", "", "block index of that hook"),
    Column("vector_b", "str", "", "name of the second vector"),
    Column("hook_b", "str", "", "hook of its direction"),
    Column("layer_b", "int64", "", "block index of that hook"),
    Column("cosine", "float64", "cosine", "between the two directions"),
    Column("random_sd", "float64", "cosine", "standard deviation between random directions"),
)
"""One row a pair of directions."""

_COMPONENT = (
    Column("component", "str", "", "embed, head or mlp"),
    Column("layer", "int64", "", "block index; -1 for embed"),
    Column("head", "int64", "", "head index; -1 for embed and mlp"),
)

WRITER_COLUMNS: tuple[Column, ...] = (
    *_COMPONENT,
    Column(
        "contribution",
        "float64",
        "residual units",
        "mean over pairs of what it wrote of the difference, projected on the direction",
    ),
    Column("share", "float64", "share", "of the projection of the whole difference"),
    Column("ci_low", "float64", "residual units", "95% bootstrap interval over pairs"),
    Column("ci_high", "float64", "residual units", "95% bootstrap interval over pairs"),
)
"""One row a component that can have written the direction."""

WRITER_POSITION_COLUMNS: tuple[Column, ...] = (
    *_COMPONENT,
    Column("position", "int64", "tokens", "token, counted from the prompt's end: -1 the last"),
    Column("contribution", "float64", "residual units", "what it wrote there, as above"),
)
"""One row a component and token position."""

READER_COLUMNS: tuple[Column, ...] = (
    *_COMPONENT,
    Column(
        "effect",
        "float64",
        "logits",
        "estimated change of the answer logit difference by its change alone, mean over prompts",
    ),
    Column("effect_ci_low", "float64", "logits", "95% bootstrap interval over prompts"),
    Column("effect_ci_high", "float64", "logits", "95% bootstrap interval over prompts"),
    Column("share", "float64", "share", "effect over the whole change by the vector"),
    Column(
        "direct",
        "float64",
        "logits",
        "change of its own write into the answer logit difference, final norm frozen",
    ),
    Column("mediated", "float64", "logits", "effect - direct: through later components"),
    Column("exact", "float64", "logits", "by patching its steered output in; NaN where not run"),
    Column("exact_ci_low", "float64", "logits", "95% bootstrap interval over prompts"),
    Column("exact_ci_high", "float64", "logits", "95% bootstrap interval over prompts"),
)
"""One row a component behind the steered hook."""

CLAIM_COLUMNS: tuple[Column, ...] = (
    Column("test", "str", "", "what was held at its unsteered value in the steered model"),
    Column("n_components", "int64", "components", "heads and MLPs held; 0 where none are named"),
    Column(
        "n_draws",
        "int64",
        "draws",
        "random sets averaged over, else 1; 0 where the test cannot be run",
    ),
    Column("change", "float64", "logits", "steered - unsteered answer logit difference, mean"),
    Column("remaining", "float64", "share", "change over that of the steered model, nothing held"),
    Column("ci_low", "float64", "share", "95% bootstrap interval over prompts; random: over draws"),
    Column(
        "ci_high", "float64", "share", "95% bootstrap interval over prompts; random: over draws"
    ),
)
"""One row a test of what carries the effect."""

_LEVEL = Column("level", "str", "", "node (heads and MLPs) or edge (writer to reader)")

CIRCUIT_COLUMNS: tuple[Column, ...] = (
    _LEVEL,
    Column("a", "str", "", "first model: unsteered, or a vector's name"),
    Column("b", "str", "", "second model"),
    Column("share", "float64", "share", "asked-for size over all nodes or edges"),
    Column("size", "int64", "nodes or edges", "the largest by absolute score; at least 1"),
    Column("iou", "float64", "share", "intersection over union of the two circuits"),
    Column(
        "iou_ceiling", "float64", "share", "of circuits from two halves of the pairs, one model"
    ),
    Column("iou_floor", "float64", "share", "of unsteered and pushed by a random vector, equal KL"),
    Column("rank", "float64", "correlation", "Spearman's, of absolute scores, all nodes or edges"),
    Column("rank_ceiling", "float64", "correlation", "the same between two halves of the pairs"),
    Column("rank_floor", "float64", "correlation", "the same of unsteered and random vector"),
    Column("a_in_a", "float64", "share", "faithfulness of a's circuit in a"),
    Column("a_in_b", "float64", "share", "faithfulness of a's circuit in b"),
    Column("b_in_a", "float64", "share", "faithfulness of b's circuit in a"),
    Column("b_in_b", "float64", "share", "faithfulness of b's circuit in b"),
)
"""One row a pair of models, level and circuit size."""

FAITHFULNESS_COLUMNS: tuple[Column, ...] = (
    _LEVEL,
    Column("circuit_of", "str", "", "model that the circuit was found in"),
    Column("run_in", "str", "", "model that it is run in, all else at its mean"),
    Column("share", "float64", "share", "asked-for size over all nodes or edges"),
    Column("size", "int64", "nodes or edges", "circuit size; at least 1"),
    Column("faithfulness", "float64", "share", "behaviour kept; 0 the empty circuit, 1 the model"),
    Column("cpr", "float64", "share", "area under faithfulness against share, of the whole curve"),
    Column("cmd", "float64", "share", "area between faithfulness and 1, of the whole curve"),
)
"""One row a circuit, the model it is run in, and its size."""

EDGE_COLUMNS: tuple[Column, ...] = (
    Column("model", "str", "", "unsteered, or a vector's name"),
    Column("writer", "str", "", "component that writes, by name"),
    Column("writer_layer", "int64", "", "its block; -1 for embed"),
    Column("writer_head", "int64", "", "its head; -1 for embed and mlp"),
    Column("reader", "str", "", "what reads it: attnL, mlpL or logits"),
    Column("reader_layer", "int64", "", "its block; the number of blocks for logits"),
    Column("score", "float64", "logits", "mean attribution over pairs; positive supports"),
)
"""One row an edge, the largest of each model."""

GRADIENT_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("loss_hook", "str", "", "hook at which the separation is taken"),
    Column("n_pairs", "int64", "pairs", "rows in each mean"),
    Column("separation_norm", "float64", "", "mean norm of the separation's gradient rows"),
    Column(
        "coherence_norm",
        "float64",
        "weight * nats^2 / residual unit",
        "mean norm of the weighted penalty's rows",
    ),
    Column("coherence_share", "float64", "share", "coherence_norm over the sum of both norms"),
    Column("cosine", "float64", "cosine", "mean cosine of the two rows of each pair"),
    Column("weight", "float64", "residual units / nats^2", "weight of the coherence penalty"),
    Column(
        "balanced_weight",
        "float64",
        "residual units / nats^2",
        "weight at which both mean norms are equal",
    ),
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

TOKEN_COLUMNS: tuple[Column, ...] = (
    Column("prompt", "str", "", "id of the pair, or number of the prompt"),
    Column(
        "side",
        "str",
        "",
        "positive (runs with +coefficient) or negative (-coefficient); positive without a pair",
    ),
    *_HOOK,
    Column(
        "coefficient",
        "float64",
        "residual units",
        "what multiplies the unit direction; of other operators their strength or angle",
    ),
    Column("readout_hook", "str", "", "hook at which the token is projected"),
    Column("position", "int64", "tokens", "place in the prompt; 0 the first token, BOS included"),
    Column("token_id", "int64", "", "id in the tokenizer's vocabulary"),
    Column("token", "str", "", "the token decoded on its own; U+FFFD for a part of a character"),
    Column("raw_token", "str", "", "the same as the vocabulary spells it"),
    Column("is_read", "bool", "", "the direction was fitted on the activation at this token"),
    Column("is_steered", "bool", "", "the direction is added at this token"),
    Column(
        "is_label",
        "bool",
        "",
        "counts in the prompt's mean logprob: the continuation, or all tokens but the first",
    ),
    Column("projection", "float64", "residual units", "h . direction at the readout, unsteered"),
    Column("steered_projection", "float64", "residual units", "the same, steered"),
    Column(
        "logprob_nats",
        "float64",
        "nats",
        "log-probability of the token after those before it, unsteered; NaN at the first",
    ),
    Column("steered_logprob_nats", "float64", "nats", "the same, steered"),
    Column(
        "damage_nats", "float64", "nats", "logprob - steered logprob; positive is worse, NaN first"
    ),
    Column(
        "kl_nats",
        "float64",
        "nats",
        "KL(unsteered || steered) of the distributions that predict the token; NaN at the first",
    ),
)
"""One row a token of a prompt, at one hook and coefficient."""

GENERATION_COLUMNS: tuple[Column, ...] = (
    Column("prompt", "str", "", "id of the pair, or number of the prompt"),
    *_HOOK,
    Column(
        "coefficient",
        "float64",
        "residual units",
        "what multiplies the unit direction; of other operators their strength or angle",
    ),
    Column("text", "str", "", "greedy continuation of the prompt, without special tokens"),
    Column("n_tokens", "int64", "tokens", "tokens of the text"),
    Column(
        "end",
        "str",
        "",
        "how it ends: stop (end-of-text token), length (as many tokens as asked for), context (the "
        "model's context is full), overflow (not finite: no text)",
    ),
)
"""One row a prompt and coefficient: what the steered model writes."""


POINT_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("pair", "str", "", "id of the contrastive pair"),
    Column("along", "float64", "residual units", "its difference . direction, unsteered"),
    Column(
        "across",
        "float64",
        "residual units",
        "its difference . the main direction orthogonal to that; NaN where there is none",
    ),
    Column("separation", "float64", "residual units", "L2 norm of its difference"),
)
"""One row a hook and pair: the unsteered differences in the plane that shows most of them."""

_PER_UNIT = "nats^2 * weight / residual unit"

GEOMETRY_COLUMNS: tuple[Column, ...] = (
    *POINT_COLUMNS,
    Column("separation_along", "float64", "", "minus the separation's gradient, along"),
    Column("separation_across", "float64", "", "the same, across"),
    Column(
        "coherence_along",
        "float64",
        _PER_UNIT,
        "minus the gradient of the pair's coherence penalty, every token pushed, along",
    ),
    Column("coherence_across", "float64", _PER_UNIT, "the same, across"),
)
"""One row a hook and pair: its difference, and which way each term of the noref loss pushes it."""

CONTOUR_COLUMNS: tuple[Column, ...] = (
    *_HOOK,
    Column("angle", "float64", "degrees", "of the push, from the direction to the orthogonal one"),
    Column("coefficient", "float64", "residual units", "length of the push"),
    Column("boundary", "float64", "residual units", "coherence boundary at this angle"),
    Column("along", "float64", "residual units", "mean difference . direction, pushed"),
    Column("across", "float64", "residual units", "mean difference . the orthogonal one, pushed"),
    Column("degradation_nats", "float64", "nats per token", "loss of the labels' logprob"),
    Column(
        "coherence_penalty",
        "float64",
        "weight * nats^2",
        "weight * mean of relu(margin * baseline - logprob)^2 over pairs",
    ),
    Column("loss", "float64", "", "-along + coherence_penalty (the reference form, at the hook)"),
)
"""One row a push in the plane of a hook: the loss there."""


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
    """Write a table as CSV: full float precision, NaN as an empty field, LF line ends.

    Text is quoted where it must be; all of it in a table with a carriage return in some text.
    """
    # Before Python 3.13 the csv module leaves a lone carriage return unquoted, and readers end the
    # row there.
    texts = [frame[name] for name in frame if pd.api.types.is_string_dtype(frame[name].dtype)]
    has_return = any(text.astype("str").str.contains("\r", regex=False).any() for text in texts)
    frame.to_csv(
        path,
        index=False,
        lineterminator="\n",
        quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL,
    )


def read_csv(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    """Read a table that `write_csv` wrote, with the types of `columns`; no text becomes NaN.

    A plain `pandas.read_csv` reads a token such as "NA" or "null", and an empty text, as NaN.
    """
    numbers = {column.name: [""] for column in columns if column.dtype == "float64"}
    return pd.read_csv(
        path,
        dtype={column.name: column.dtype for column in columns},
        keep_default_na=False,
        na_values=numbers,
        float_precision="round_trip",
    )


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet; its attrs travel in the file's metadata."""
    frame.to_parquet(path, index=False, engine="pyarrow")


MAX_ROWS = 30


MAX_COLUMNS = 10
"""Columns of a table beside its labels."""


"""Columns of a table beside its labels."""


MAX_NAME = 40
"""Characters of a name, of a model say."""


"""Characters of a name, of a model say."""


MAX_LINE = 150
"""Characters of a `repr`."""


"""Characters of a `repr`."""


T = TypeVar("T")


def shortened(text: object, size: int = MAX_NAME) -> str:
    """The text on one line of at most `size` characters, control characters as question marks."""
    line = printable(str(text))
    return line if len(line) <= size else line[: size - 1] + "…"


def hook_label(hook_name: str) -> str:
    """The layer's number for a block's output, another hook's whole name."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
    return hook_name if match is None else match[1]


def measured(attrs: Mapping[Hashable, Any]) -> list[str]:
    """What a table's attrs say of where it comes from: model, method, pairs, text and budget."""
    model, settings = attrs.get("model", {}), attrs.get("settings", {})
    named = {
        "model": model.get("name"),
        "method": attrs.get("method"),
        "pairs": attrs.get("pairs"),
        "text": settings.get("on"),
        "budget": settings.get("budget"),
    }
    return [f"{what} {shortened(name)}" for what, name in named.items() if name is not None]


def fragment(
    caption: Sequence[str], table: pd.DataFrame, *, n_labels: int = 1, note: str = ""
) -> str:
    """A table as an HTML fragment: its caption's parts in a line, its columns' names, its rows.

    The first `n_labels` columns are labels, the others numbers, or text that stands for some. Of
    more than 30 rows, or 10 columns beside the labels, as many are shown, evenly spaced, with the
    first and the last; a line below says so, after `note`. Colours are those of the page.
    """
    rows = _evenly(range(len(table)), MAX_ROWS)
    columns = [
        *range(n_labels),
        *_evenly(range(n_labels, table.shape[1]), MAX_COLUMNS),
    ]
    shown = table.iloc[list(rows), columns]
    heads = "".join(_cell("th", name, i < n_labels) for i, name in enumerate(shown.columns))
    body = "".join(
        "<tr>" + "".join(_cell("td", value, i < n_labels) for i, value in enumerate(row)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    notes = [note] if note else []
    if len(rows) < len(table):
        notes.append(f"{len(rows)} of {len(table)} rows")
    if len(columns) < table.shape[1]:
        n_numbers = table.shape[1] - n_labels
        notes.append(f"{len(columns) - n_labels} of {n_numbers} columns")
    return (
        '<div style="color:inherit">'
        f"<div>{html.escape(', '.join(caption))}</div>"
        '<table style="color:inherit;border-collapse:collapse;text-align:right">'
        f'<thead style="border-bottom:1px solid currentColor"><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
        f"<div>{html.escape('; '.join(notes))}</div></div>"
    )


def _cell(tag: str, value: object, is_label: bool) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else shortened(value)
    side = "left" if is_label else "right" if tag == "th" else ""
    style = f' style="text-align:{side}"' if side else ""
    return f"<{tag}{style}>{html.escape(text)}</{tag}>"


def _evenly(places: Sequence[T], n: int) -> list[T]:
    """At most `n` of the places, evenly spaced, with the first and the last."""
    if len(places) <= n:
        return list(places)
    return [places[round(i * (len(places) - 1) / (n - 1))] for i in range(n)]
