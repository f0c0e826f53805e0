"""What the commands print: tables on stdout, progress and notes on stderr."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlens.measure.sweeps import SweepResult
from steerlens.progress import Progress, show_progress
from steerlens.tables import hook_label

# Without a terminal there is no width to fit: wide enough that nothing is cut off.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True, highlight=False)


def progress_of(*, quiet: bool) -> AbstractContextManager[Progress | None]:
    """`show_progress`; or nothing to tell, when `quiet`. Print no notes inside the block."""
    return nullcontext() if quiet else show_progress()


def print_summary(table: Any) -> None:
    """The comparison's summary: each method at its chosen layer, best first."""
    shown = Table(title="Effect at equal damage, at the layer chosen on training items")
    for name in ("rank", "method", "layer", "coefficient", "effect", "95% interval", "verdict"):
        shown.add_column(name, justify="left" if name in ("method", "verdict") else "right")
    for row in table.to_dict("records"):
        is_layer = row["layer"] >= 0
        shown.add_row(
            f"{row['rank']} ({row['rank_low']}-{row['rank_high']})",
            Text(row["method"]),
            str(row["layer"]) if is_layer else "",
            f"{row['coefficient']:.4g}" if is_layer else "",
            f"{row['effect']:+.3f}",
            f"{row['effect_ci_low']:+.3f} to {row['effect_ci_high']:+.3f}",
            Text(row["verdict"]),
        )
    output.print(shown)


def print_rows(table: Any, title: str, names: list[str]) -> None:
    """Some columns of a table, a row a line."""
    shown = Table(title=title)
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in table.to_dict("records"):
        values = (row[name] for name in names)
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    output.print(shown)


def print_layers(table: Any) -> None:
    """The per-layer table without what is the same on every row, or undefined."""
    shown = Table(title="Per layer, unsteered")
    names = ["separation", "projection", "projection_std", "agreement", "explained_variance"]
    names += ["resid_norm"]
    shown.add_column("hook")
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in table.to_dict("records"):
        shown.add_row(hook_label(row["hook_name"]), *(f"{row[name]:.4g}" for name in names))
    output.print(shown)
    output.print(f"baseline logprob {table.logprob_nats.iloc[0]:.4f} nats per token")


def print_boundary(table: Any) -> None:
    """Boundaries with their intervals, what was predicted, and the projection there."""
    settings = table.attrs["settings"]
    shown = Table(title=Text(f"Coherence boundary on {settings['on']} text, {settings['budget']}"))
    shown.add_column("hook")
    for name in ("negative", "95%", "predicted", "positive", "95%", "predicted", "resid norm"):
        shown.add_column(name, justify="right")
    shown.add_column("projection there", justify="right")
    for row in table.to_dict("records"):
        cells = []
        for sign in ("neg", "pos"):
            name = f"boundary_{sign}"
            cells += [
                f"{row[name]:.4g}{'*' if row[f'reentry_{sign}'] == row[f'reentry_{sign}'] else ''}",
                f"{row[f'{name}_ci_low']:.4g} to {row[f'{name}_ci_high']:.4g}",
                f"{row[f'predicted_{name}']:.4g}",
            ]
        shown.add_row(
            hook_label(row["hook_name"]),
            *cells,
            f"{row['resid_norm']:.4g}",
            f"{row['projection_at_boundary']:.4g}",
        )
    output.print(shown)
    if table[["reentry_pos", "reentry_neg"]].notna().any(axis=None):
        output.print("* within the budget again further out: see reentry_pos and reentry_neg")


def print_cells(result: SweepResult) -> None:
    """Projection and degradation of every cell: a row a hook, a column a coefficient."""
    shown = Table(title="Projection (degradation, nats per token; ! beyond the budget)")
    shown.add_column("hook")
    for coefficient in result.settings.coefficients:
        shown.add_column(f"c = {coefficient:g}", justify="right", no_wrap=True)
    for _, rows in result.table.groupby("hook_name", sort=False):
        records = rows.to_dict("records")
        cells = [
            f"{row['projection']:.1f} ({row['degradation_nats']:+.3f})"
            f"{' ' if row['coherent'] else '!'}"
            for row in records
        ]
        shown.add_row(hook_label(records[0]["hook_name"]), *cells)
    output.print(shown)
