"""The `steerlens` command: parse, call, write. The only room that prints."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

import steerlens as sl
from steerlens.cli.behave_command import Behave
from steerlens.cli.boundary_commands import Boundary, Geometry, Layers
from steerlens.cli.circuits_command import Circuits
from steerlens.cli.command import Command, for_typer, rarely_collected
from steerlens.cli.comparison_commands import Compare, Reliability
from steerlens.cli.listing_commands import Datasets, Methods, Models, Report
from steerlens.cli.options import DEBUG, examples_of
from steerlens.cli.pairs_command import Pairs
from steerlens.cli.printing import LINES, escaped_streams, keeping_warnings, note, say
from steerlens.cli.read_command import Read
from steerlens.cli.recommend_command import Recommend
from steerlens.cli.sweep_command import Sweep
from steerlens.cli.vector_commands import Bake, CompareVectors, Export, Extract, Generate, Show
from steerlens.errors import SteerlensError

SHARED: dict[str, Any] = {
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    **SHARED,
    pretty_exceptions_enable=False,
)
vectors = typer.Typer(
    **SHARED, no_args_is_help=True, help="Look into steering vectors, compare them."
)
COMMANDS: tuple[type[Command], ...] = (
    *(Recommend, Layers, Methods, Models, Sweep, Boundary, Geometry, Compare, Reliability),
    *(Circuits, Behave, Report, Extract, Read, Generate, Export, Bake, Datasets, Pairs),
)
for command_type in COMMANDS:
    name = command_type.__name__.lower()
    app.command(name, epilog=examples_of(name))(for_typer(command_type))
vectors.command("show", epilog=examples_of("show"))(for_typer(Show))
vectors.command("compare", epilog=examples_of("comparevectors"))(for_typer(CompareVectors))
app.add_typer(vectors, name="vectors")


def _show_version(is_asked: bool | None) -> None:
    if is_asked:
        say(f"steerlens {sl.__version__}")
        raise typer.Exit


@app.callback()
def shared(
    _version: Annotated[
        bool | None,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = None,
) -> None:
    """Where a model separates two concepts, along which direction, and how far it goes."""


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
        with rarely_collected(), escaped_streams(), keeping_warnings():
            code = app(args=words, standalone_mode=False, prog_name="steerlens")
    except Exception as error:
        if DEBUG in words:
            note(traceback.format_exc(), keep=LINES)
        else:
            note(f"steerlens: {_one_line(error)}")
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
