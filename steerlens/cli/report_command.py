"""`steerlens report`: the folders of some runs as one HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import steerlens as sl
from steerlens.cli.command import QuietCommand, quoted
from steerlens.cli.printing import note
from steerlens.files import write_out

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report(QuietCommand):
    """One HTML file of one run or several; it needs no network."""

    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="--out folders of other commands.")
    ]
    out: Annotated[Path | None, f"HTML file to write. Default: {REPORT} in the first folder."] = (
        None
    )

    EXAMPLES = (
        "report runs/sweep",
        "report runs/sweep runs/boundary --out report.html",
    )

    @property
    def next(self) -> str:
        """A look at it."""
        return f"python -m webbrowser {quoted(self.written)}"

    @property
    def written(self) -> Path:
        """The page."""
        return self.runs[0] / REPORT if self.out is None else self.out

    def run(self) -> None:
        """What the command does."""
        runs = [sl.read_run(folder) for folder in self.runs]
        out = self.written
        page = sl.report(runs).encode()
        write_out(out, lambda path: path.write_bytes(page))
        note(f"written to {out} ({len(page) / 1e6:.1f} MB)")
