"""`steerlens report`: the folders of some runs as one HTML page."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from steerlens.cli.options import DebugOption, QuietOption
from steerlens.cli.printing import notes
from steerlens.files import write_whole
from steerlens.runs.html_report.page import report as make_report
from steerlens.runs.reading import read_run
from steerlens.runs.record import REPORT, check_out_file


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="--out folders of other commands.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"HTML file to write. Default: {REPORT} in the first folder."),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """One HTML file of one run or several: summary, figures, texts and tables; no network."""
    found = [read_run(folder) for folder in runs]
    out = runs[0] / REPORT if out is None else out
    check_out_file(out)
    page = make_report(found).encode()
    write_whole(out, partial(_write, page))
    if not quiet:
        notes.print(Text(f"written to {out} ({len(page) / 1e6:.1f} MB)"))


def _write(page: bytes, path: Path) -> None:
    path.write_bytes(page)
