"""The `steerlens` command: parse, call, write. The only room that prints."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import typer

from steerlens.cli.boundary_commands import Boundary, Geometry
from steerlens.cli.circuits_command import Circuits
from steerlens.cli.command import Command, for_typer
from steerlens.cli.comparison_commands import Compare, Reliability
from steerlens.cli.layers_command import Layers
from steerlens.cli.listing_commands import Datasets, Methods, Models
from steerlens.cli.options import DEBUG
from steerlens.cli.pairs_command import Pairs
from steerlens.cli.printing import LINES, escaped_streams, note
from steerlens.cli.report_command import Report
from steerlens.cli.run_warnings import keeping_warnings
from steerlens.cli.sweep_command import Sweep
from steerlens.cli.vector_commands import Bake, CompareVectors, Export, Extract, Generate, Show
from steerlens.errors import SteerlensError

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Where a model separates two concepts, along which direction, and how far it goes.",
)
vectors = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Look into steering vectors, compare them."
)
COMMANDS: tuple[type[Command], ...] = (
    *(Layers, Methods, Models, Sweep, Boundary, Geometry, Compare, Reliability, Circuits),
    *(Report, Extract, Generate, Export, Bake, Datasets, Pairs),
)
for command_type in COMMANDS:
    app.command(command_type.__name__.lower())(for_typer(command_type))
vectors.command("show")(for_typer(Show))
vectors.command("compare")(for_typer(CompareVectors))
app.add_typer(vectors, name="vectors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit code 2 and one line on stderr for an error, or its traceback.

    What no terminal or file of this encoding can show is escaped. Where nobody reads the output any
    longer, as after `| head -1`, the exit code is 141, with nothing on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for descriptor in range(3):
        _open_if_closed(descriptor)
    for name in ("stdout", "stderr"):
        _open_stream(name)
    try:
        with escaped_streams(), keeping_warnings():
            code = app(args=words, standalone_mode=False, prog_name="steerlens")
    except Exception as error:
        if DEBUG in words:
            note(traceback.format_exc(), soft_wrap=True, keep=LINES)
        else:
            note(f"steerlens: {_one_line(error)}", soft_wrap=True)
        sys.exit(2)
    finally:
        _drop_unwritten(sys.stdout)
        _drop_unwritten(sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _open_if_closed(descriptor: int) -> None:
    """Else a file that is opened next would be taken for stdout, and written into."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _open_stream(name: str) -> None:
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _drop_unwritten(stream: Any) -> None:
    """Drop what cannot be written: Python would try again at its end, and complain."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: Exception) -> str:
    # A usage error of typer's formats itself; its base class differs between typer versions.
    format_message: Callable[[], str] | None = getattr(error, "format_message", None)
    text = format_message() if format_message is not None else str(error)
    if not isinstance(error, SteerlensError) and format_message is None:
        text = f"unexpected {type(error).__name__}: {text} ({DEBUG} shows the traceback)"
    return " ".join(text.split())
