"""What the commands print: tables on stdout, progress and notes on stderr.

Nothing that a terminal would obey leaves here: texts are made `visible` before they are laid out,
and what libraries write is made so by `escaped_streams`.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steerlens.measure.sweeps import SweepResult
from steerlens.progress import Progress, show_progress, visible
from steerlens.tables import hook_label

SIGPIPE = 128 + 13
"""The exit code of a program whose reader went away, as a shell says it."""
_COHERENT = {"yes": " ", "no": "!", "undecided": "?"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """End as other tools do; rich would say 1, as after an error."""
        raise SystemExit(SIGPIPE)


_is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by who started us
# Without a terminal there is no width to fit: wide enough that nothing is cut off.
_output = _Console(highlight=False, width=None if _is_terminal else 160)
_notes = _Console(stderr=True, highlight=False)
LINES = "\n\t"
"""What text of several lines is made of besides."""
PROSE = LINES + "\xa0\u200c\u200d\u3000"
"""What text that people read may hold besides: spaces and joiners of many scripts."""


class _Escaped:
    """A stream whose text is `visible`; bars move by carriage returns."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream
        """Rich writes past what has this: its styles are sequences too, its texts have none."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # so that click tells it from a stream of bytes
            raise TypeError(f"expected text to write, got {type(text).__name__}")
        self.rich_proxied_file.write(visible(text, PROSE + "\r"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def escaped_streams() -> Iterator[None]:
    """Inside the block whatever is written to stdout and stderr, by anyone, is `visible`."""
    out: Any = _Escaped(sys.stdout)
    err: Any = _Escaped(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield


def progress_of(*, quiet: bool) -> AbstractContextManager[Progress | None]:
    """`show_progress`; or nothing to tell, when `quiet`. Print no notes inside the block."""
    return nullcontext() if quiet else show_progress()


def note(text: str, *, quiet: bool = False, soft_wrap: bool = False, keep: str = "") -> None:
    """Print a line on stderr, unless `quiet`."""
    if not quiet:
        _notes.print(Text(visible(text, keep)), soft_wrap=soft_wrap)


def say(text: str) -> None:
    """Print a line on stdout."""
    _output.print(Text(visible(text)))


def print_table(
    title: str | None,
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = ("hook",),
    no_wrap: bool = False,
) -> None:
    """Rows of texts under the names of their columns; numbers to the right."""
    shown = Table(title=title and Text(visible(title)))
    for name in names:
        if name in left:
            shown.add_column(Text(visible(name)))
        else:
            shown.add_column(Text(visible(name)), justify="right", no_wrap=no_wrap)
    for row in rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    _output.print(shown)


def print_texts(title: str, names: Sequence[str], texts: Sequence[str]) -> None:
    """Texts of several lines side by side, each under its name."""
    shown = Table(title=Text(visible(title, PROSE)), show_lines=True)
    for name in names:
        shown.add_column(Text(visible(name)), ratio=1)
    shown.add_row(*(Text(visible(text, PROSE)) for text in texts))
    _output.print(shown)


def short(value: Any) -> str:
    """A number to four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_rows(table: Any, title: str, columns: list[str]) -> None:
    """Some columns of a table, a row a line."""
    names = [name.replace("_", " ") for name in columns]
    rows = [[short(row[name]) for name in columns] for row in table.to_dict("records")]
    print_table(title, names, rows, left=())


def print_summary(table: Any) -> None:
    """The comparison's summary: each method at its chosen layer, best first."""
    rows = [
        [
            f"{row['rank']} ({row['rank_low']}-{row['rank_high']})",
            row["method"],
            str(row["layer"]) if row["layer"] >= 0 else "",
            f"{row['coefficient']:.4g}" if row["layer"] >= 0 else "",
            f"{row['effect']:+.3f}",
            f"{row['effect_ci_low']:+.3f} to {row['effect_ci_high']:+.3f}",
            row["verdict"],
        ]
        for row in table.to_dict("records")
    ]
    print_table(
        "Effect at equal damage, at the layer chosen on training items",
        ["rank", "method", "layer", "coefficient", "effect", "95% interval", "verdict"],
        rows,
        left=("method", "verdict"),
    )


def print_layers(table: Any) -> None:
    """The per-layer table without what is the same on every row, or undefined."""
    columns = ["separation", "projection", "projection_std", "agreement", "explained_variance"]
    columns += ["resid_norm"]
    names = ["hook", *(name.replace("_", " ") for name in columns)]
    rows = [
        [hook_label(row["hook_name"]), *(short(row[name]) for name in columns)]
        for row in table.to_dict("records")
    ]
    print_table("Per layer, unsteered", names, rows)
    say(f"baseline logprob {table.logprob_nats.iloc[0]:.4f} nats per token")


def print_boundary(table: Any) -> None:
    """Boundaries with their intervals, what was predicted, and the projection there."""
    settings = table.attrs["settings"]
    title = f"Coherence boundary on {settings['on']} text, {settings['budget']}"
    names = ["hook", "negative", "95%", "predicted", "positive", "95%", "predicted", "resid norm"]
    rows = []
    for row in table.to_dict("records"):
        cells = [hook_label(row["hook_name"])]
        for sign in ("neg", "pos"):
            name = f"boundary_{sign}"
            has_reentry = row[f"reentry_{sign}"] == row[f"reentry_{sign}"]  # not NaN
            cells += [
                f"{row[name]:.4g}{'*' if has_reentry else ''}",
                f"{row[f'{name}_ci_low']:.4g} to {row[f'{name}_ci_high']:.4g}",
                f"{row[f'predicted_{name}']:.4g}",
            ]
        rows.append([*cells, f"{row['resid_norm']:.4g}", f"{row['projection_at_boundary']:.4g}"])
    print_table(title, [*names, "projection there"], rows)
    if table[["reentry_pos", "reentry_neg"]].notna().any(axis=None):
        say("* within the budget again further out: see reentry_pos and reentry_neg")


def print_cells(result: SweepResult) -> None:
    """Projection and degradation of every cell: a row a hook, a column a coefficient."""
    rows = []
    for hook_name, cells in result.table.groupby("hook_name", sort=False):
        texts = [
            f"{row['projection']:.1f} ({row['degradation_nats']:+.3f}){_COHERENT[row['coherent']]}"
            for row in cells.to_dict("records")
        ]
        rows.append([hook_label(str(hook_name)), *texts])
    print_table(
        "Projection (degradation, nats per token; ! beyond the budget, ? undecided)",
        ["hook", *(f"c = {coefficient:g}" for coefficient in result.settings.coefficients)],
        rows,
        no_wrap=True,
    )
