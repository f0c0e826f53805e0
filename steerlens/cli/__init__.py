"""The `steerlens` command: parse, call, write. The only room that prints."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from steerlens.cli import boundaries, circuits, evaluation, report, sweeps, vectors
from steerlens.cli.options import (
    DEBUG,
    BatchOption,
    DebugOption,
    LayersOption,
    MaxPairsOption,
    MethodOption,
    ModelOption,
    PairsOption,
    PositionOption,
    QuietOption,
    SeedOption,
    TestPairsOption,
    note_fit,
    pairs_of,
)
from steerlens.cli.printing import notes, output, print_layers, progress_of
from steerlens.cli.warned import keeping_warnings
from steerlens.data.pairs import (
    SPLITS,
    ContrastivePairs,
    dataset_card,
    dataset_names,
    neutral_texts,
)
from steerlens.directions.fitting import default_position, fit
from steerlens.directions.methods import METHODS
from steerlens.errors import SteerlensError
from steerlens.files import write_whole
from steerlens.measure.study import measure_layers
from steerlens.models.loading import load_model
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.runs.record import check_out_file
from steerlens.tables import write_csv

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Where a model separates two concepts, along which direction, and how far it goes.",
)


@app.command(name="layers")
def show_layers(
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    layers: LayersOption = "all",
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file to write.")] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """The per-layer table of the unsteered model, without a sweep."""
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    if out is not None:
        check_out_file(out)
    loaded = load_model(model, progress=not quiet)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
        directions = fit(loaded, fit_on, method=method, position=position, seed=seed, **shared)
        table = measure_layers(loaded, measure_on, directions, **shared)
    if out is not None:
        write_whole(out, lambda path: write_csv(table, path))
        if not quiet:
            notes.print(Text(f"written to {out}"))
    if not quiet:
        print_layers(table)


@app.command()
def methods(debug: DebugOption = False) -> None:  # noqa: ARG001
    """What --method takes."""
    for name, method in METHODS.items():
        output.print(Text(f"{name} ({method.source}): {method.summary}"))


@app.command()
def models(debug: DebugOption = False) -> None:  # noqa: ARG001
    """Models that steerlens fetches by itself, and what else --model takes."""
    for packaged in PACKAGED_MODELS.values():
        output.print(Text(f"{packaged.name}: {packaged.description} ({packaged.requirement})"))
    output.print(
        Text(
            "--model also takes a local Hugging Face folder, a .gguf file, or a hub id.\n"
            f"Fetched and converted models are kept in {cache_folder()}."
        )
    )


app.command()(sweeps.sweep)
app.command()(boundaries.boundary)
app.command()(boundaries.geometry)
app.command()(evaluation.compare)
app.command()(evaluation.reliability)
app.command()(circuits.circuits)
app.command()(report.report)
app.command()(vectors.extract)
app.command()(vectors.generate)
app.command()(vectors.export)
app.command()(vectors.bake)
app.add_typer(vectors.app, name="vectors")


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="Show this dataset's card.")] = None,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Datasets shipped with steerlens; with a name, its card."""
    if name is not None:
        output.print(Text(dataset_card(name)))
        return
    for dataset in dataset_names():
        sizes = [f"{len(ContrastivePairs.load(dataset, split=split))} {split}" for split in SPLITS]
        output.print(Text(f"{dataset}: {', '.join(sizes)} pairs"))
    output.print(Text(f"neutral: {len(neutral_texts())} lines of neutral text"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit code 2 and one line on stderr for an error."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with keeping_warnings():
            code = app(args=given, standalone_mode=False, prog_name="steerlens")
    except Exception as error:
        if DEBUG in given:
            raise
        notes.print(Text(f"steerlens: {_one_line(error)}"), soft_wrap=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> str:
    # A usage error of typer's formats itself; its base class differs between typer versions.
    format_message: Callable[[], str] | None = getattr(error, "format_message", None)
    text = format_message() if format_message is not None else str(error)
    if not isinstance(error, SteerlensError) and format_message is None:
        text = f"unexpected {type(error).__name__}: {text} ({DEBUG} shows the traceback)"
    return " ".join(text.split())
