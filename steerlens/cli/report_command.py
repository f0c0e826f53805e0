"""`steerlens report`: the folders of some runs as one HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from steerlens.cli.command import QuietCommand
from steerlens.cli.printing import note
from steerlens.files import write_out
from steerlens.runs.html_report.page import report as make_report
from steerlens.runs.reading import read_run
from steerlens.runs.record import REPORT


@dataclass(frozen=True, kw_only=True)
class Report(QuietCommand):
    """One HTML file of one run or several: summary, figures, texts and tables; no network."""

    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="--out folders of other commands.")
    ]
    out: Annotated[Path | None, f"HTML file to write. Default: {REPORT} in the first folder."] = (
        None
    )

    @property
    def written(self) -> Path:
        """The page."""
        return self.runs[0] / REPORT if self.out is None else self.out

    def run(self) -> None:
        """What the command does."""
        runs = [read_run(folder) for folder in self.runs]
        out = self.written
        page = make_report(runs).encode()
        write_out(out, lambda path: path.write_bytes(page))
        note(f"written to {out} ({len(page) / 1e6:.1f} MB)", quiet=self.quiet)
