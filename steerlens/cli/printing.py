"""What the commands print: tables on stdout, progress, notes and warnings on stderr.

Nothing that a terminal would obey leaves here: texts are made `visible` before they are laid out,
and what libraries write is made so by `escaped_streams`.
"""

import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steerlens as sl
from steerlens.files import packaged_rows
from steerlens.progress import Progress, show_progress, silent, visible

BEYOND = "beyond"
"""What stands for an infinite boundary."""
ROUNDING = 1e-9
"""Numbers nearer to 0 are what rounding leaves of it."""
LEAST_WIDTH = 24
"""Characters that a text needs to stand beside others."""
SIGPIPE = 128 + 13
"""The exit code of a program whose reader went away, as a shell says it."""
_warned: ContextVar[tuple[str, ...]] = ContextVar("warned", default=())
_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)
PRINTED = {line["name"]: line for line in packaged_rows("cli", "printed.csv")}
"""Table -> its title, and its columns that are shown."""
_COHERENT = {"yes": " ", "no": "!", "undecided": "?"}


class _Console(Console):
    def print(self, *shown: Any, **options: Any) -> None:
        """As rich does, unless `quiet`: of the run of this thread, not of others."""
        if not _is_quiet.get():
            super().print(*shown, **options)

    def on_broken_pipe(self) -> None:
        """End as other tools do; rich would say 1, as after an error."""
        raise SystemExit(SIGPIPE)


_output = _Console(highlight=False)
_notes = _Console(stderr=True, highlight=False)
LINES = "\n\t"
"""What text of several lines is made of besides."""
PROSE = LINES + "\xa0\u200c\u200d\u3000"
"""What text that people read may hold besides: spaces and joiners of many scripts."""


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Inside the block nothing is printed, where `is_quiet`; what is raised is told outside."""
    before = _is_quiet.set(is_quiet)
    try:
        yield
    finally:
        _is_quiet.reset(before)


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


def progress_of() -> AbstractContextManager[Progress]:
    """`show_progress`; or `silent`, when `quiet`. Print no notes inside the block."""
    return nullcontext(silent) if _is_quiet.get() else show_progress()


def note(text: str, *, keep: str = "") -> None:
    """Print a line on stderr."""
    _print(_notes, visible(text, keep))


def say(text: str) -> None:
    """Print a line on stdout."""
    _print(_output, visible(text))


@contextmanager
def keeping_warnings() -> Iterator[None]:
    """Inside the block `warned` has the warnings given so far; they are shown all the same."""
    before = _warned.set(())
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep_and_show(message: Warning | str, *args: Any, **options: Any) -> None:
            keep_warning(str(message))
            show(visible(str(message), LINES), *args, **options)

        warnings.showwarning = keep_and_show
        try:
            yield
        finally:
            _warned.reset(before)


def warned() -> tuple[str, ...]:
    """The texts of the warnings and of `warn`, each once, in the order in which they came."""
    return _warned.get()


def warn(text: str) -> None:
    """Print a note on stderr, and keep it for the record."""
    keep_warning(text)
    note(text)


def keep_warning(text: str) -> None:
    """Keep a warning for the record that was shown already."""
    _warned.set(tuple(dict.fromkeys((*_warned.get(), text))))


def _print(console: Console, text: str) -> None:
    """A terminal would break a long line inside a word; a pipe or a file gets it whole."""
    if console.is_terminal:
        width = max(console.width, 1)
        text = "\n".join(
            textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
    console.print(Text(text), soft_wrap=True)


def print_table(
    title: str | None,
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = ("hook",),
) -> None:
    """Rows of texts under the names of their columns; numbers to the right.

    Columns without room beside the others follow in a table of their own, so that nothing is cut.
    """
    cells = [[visible(cell) for cell in row] for row in rows]
    columns = [_Column(visible(name), [row[i] for row in cells]) for i, name in enumerate(names)]
    parts = [columns[:1]]
    for column in columns[1:]:
        if len(parts[-1]) > 1 and _room_beside([*parts[-1], column]) < 0:
            parts.append(columns[:1])
        parts[-1] = [*parts[-1], column]
    for part in parts:
        shown = Table(title=title and Text(visible(title)))
        room = max(_room_beside(part), 0)
        for column in part:
            more = min(room, column.widest - column.least)
            room -= more
            justify: Any = "left" if column.name in left else "right"
            shown.add_column(Text(column.name), justify=justify, width=column.least + more)
        for number in range(len(cells)):
            shown.add_row(*(Text(column.cells[number]) for column in part))
        _output.print(shown)
        title = None


@dataclass(frozen=True)
class _Column:
    """A heading and what stands under it."""

    name: str
    cells: list[str]

    @property
    def widest(self) -> int:
        """With every text on a line."""
        return max(cell_len(text) for text in (self.name, *self.cells))

    @property
    def least(self) -> int:
        """With texts broken between words, and numbers and intervals whole."""
        words = [word for text in (self.name, *self.cells) for word in text.split()]
        whole = [cell for cell in self.cells if not cell[:1].isalpha() and len(cell) < 30]
        return max(cell_len(text) for text in ("-", *words, *whole))


def _room_beside(columns: Sequence[_Column]) -> int:
    """What these columns leave of the console's width, with a line and spaces round each."""
    return _output.width - 1 - sum(column.least + 3 for column in columns)


def print_texts(title: str, names: Sequence[str], texts: Sequence[str]) -> None:
    """Texts of several lines side by side under their names; where that is too narrow, in rows."""
    # Without a terminal there is no width to fit: a long line of tokens stays in one piece.
    width = _output.width if _output.is_terminal else 160
    shown = Table(title=Text(visible(title, PROSE)), show_lines=True)
    headings = [Text(visible(name)) for name in names]
    cells = [Text(visible(text, PROSE)) for text in texts]
    if width // len(names) < LEAST_WIDTH:
        shown.show_header = False
        for row in zip(headings, cells, strict=True):
            shown.add_row(*row)
    else:
        for heading in headings:
            shown.add_column(heading, ratio=1)
        shown.add_row(*cells)
    _output.print(shown, width=width)


def short(value: Any) -> str:
    """A number to four digits, anything else as it is; what is undefined as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return "-" if value is None or value in ("none", -1) else str(value)
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return BEYOND
    return "0" if abs(value) < ROUNDING else f"{value:.4g}"


def between(low: float, high: float, form: Callable[[float], str] = short) -> str:
    """An interval; a dash where it is undefined."""
    ends = [form(end) if math.isfinite(end) else short(end) for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def print_rows(table: Any, name: str, *words: object) -> None:
    """What `printed.csv` names of a table, a row a line; the words are put into its title."""
    title, columns = PRINTED[name]["title"].format(*words), PRINTED[name]["columns"].split()
    names = ["hook" if name == "hook_name" else name.replace("_", " ") for name in columns]
    shown: dict[str, Any] = {"hook_name": sl.tables.hook_label}
    rows = [
        [shown.get(name, short)(row[name]) for name in columns] for row in table.to_dict("records")
    ]
    print_table(
        title, names, rows, left=("hook", "method", "verdict", "component", "test", "level")
    )
    _tell_of_beyond(rows)


def _tell_of_beyond(rows: Iterable[Sequence[str]]) -> None:
    if any(BEYOND in cell for row in rows for cell in row):
        say(f"{BEYOND}: not reached within the range that was searched")


def signed(value: float) -> str:
    """A change to three decimals, with its sign; a dash where it is undefined."""
    return f"{value:+.3f}" if math.isfinite(value) else short(value)


def print_summary(table: Any) -> None:
    """The comparison's summary: each method at its chosen layer, best first."""
    rows = [
        [
            f"{row['rank']} ({row['rank_low']}-{row['rank_high']})",
            row["method"],
            sl.tables.hook_label(row["hook_name"]) if row["layer"] >= 0 else "",
            short(row["coefficient"]) if row["layer"] >= 0 else "",
            signed(row["effect"]),
            between(row["effect_ci_low"], row["effect_ci_high"], signed),
            row["verdict"],
        ]
        for row in table.to_dict("records")
    ]
    print_table(
        "Effect at equal damage, at the layer chosen on training items",
        ["rank", "method", "hook", "coefficient", "effect", "95% interval", "verdict"],
        rows,
        left=("method", "hook", "verdict"),
    )


def print_behaviour(table: Any) -> None:
    """Every scorer's mean, with its interval, by hook and coefficient."""
    names = list(dict.fromkeys(table.scorer))
    keys = ["subject", "hook_name", "strength"]
    rows = []
    for (subject, hook_name, strength), cell in table.groupby(keys, sort=False):
        by_name = cell.set_index("scorer")
        steered = [sl.tables.hook_label(hook_name), strength] if hook_name else [subject, ""]
        rows.append([*steered, *(_with_ends(by_name.loc[name]) for name in names)])
    print_table("What is written: mean (95% interval)", ["hook", "coefficient", *names], rows)


def _with_ends(row: Any) -> str:
    ends = "" if math.isnan(row.ci_low) else f" ({between(row.ci_low, row.ci_high)})"
    return f"{short(float(row['mean']))}{ends}"


def print_layers(table: Any) -> None:
    """The per-layer table without what is the same on every row, or undefined."""
    print_rows(table, "layers")
    say(f"baseline logprob {table.logprob_nats.iloc[0]:.4f} nats per token")


def print_boundary(table: Any) -> None:
    """Boundaries with their intervals, what was predicted, and the projection there."""
    settings = table.attrs["settings"]
    title = f"Coherence boundary on {settings['on']} text, {settings['budget']}"
    names = ["hook", "sign", "boundary", "95% interval", "predicted", "resid norm"]
    names += ["projection there"]
    rows = []
    for row in table.to_dict("records"):
        for sign in ("neg", "pos"):
            name = f"boundary_{sign}"
            has_reentry = row[f"reentry_{sign}"] == row[f"reentry_{sign}"]  # not NaN
            rows.append(
                [
                    sl.tables.hook_label(row["hook_name"]),
                    {"neg": "c < 0", "pos": "c > 0"}[sign],
                    short(row[name]) + ("*" if has_reentry else ""),
                    between(row[f"{name}_ci_low"], row[f"{name}_ci_high"]),
                    short(row[f"predicted_{name}"]),
                    short(row["resid_norm"]),
                    short(row["projection_at_boundary"]) if sign == "pos" else "",
                ]
            )
    print_table(title, names, rows, left=("hook", "sign"))
    _tell_of_beyond(rows)
    if table[["reentry_pos", "reentry_neg"]].notna().any(axis=None):
        say("* within the budget again further out: see reentry_pos and reentry_neg")


def print_cells(result: Any) -> None:
    """Projection and degradation, a row a hook, a column a coefficient; no interpolated ones."""
    is_run = result.table.groupby("asked").exact.transform("all")
    table, rows = result.table[is_run], []
    for hook_name, cells in table.groupby("hook_name", sort=False):
        texts = [
            "-"
            if math.isnan(row["projection"])
            else f"{row['projection']:.1f} ({signed(row['degradation_nats'])})"
            + _COHERENT[row["coherent"]]
            for row in cells.to_dict("records")
        ]
        rows.append([sl.tables.hook_label(str(hook_name)), *texts])
    print_table(
        "Projection (degradation, nats per token; ! beyond the budget, ? undecided)",
        ["hook", *(f"c = {asked}" for asked in table.asked.unique())],
        rows,
    )
