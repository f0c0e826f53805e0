"""The `steerlens` command: parse, call, write. The only room that prints."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from steerlens import data
from steerlens.activations import collect_differences
from steerlens.boundary import check_search, find_boundary
from steerlens.data import ContrastivePairs, Message, Prompt
from steerlens.directions import METHODS, fit_directions
from steerlens.errors import PairError, SteerlensError, SweepError
from steerlens.hooks import resid_post, resolve_hooks
from steerlens.loss import Budget
from steerlens.models import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder, load_model, provenance
from steerlens.runs import check_out_file, check_run_folder, write_run, write_whole
from steerlens.shape import boundary_shape, check_plane
from steerlens.steering import generate as generate_text
from steerlens.sweep import SweepResult, checked_coefficients, measure_layers
from steerlens.sweep import sweep as run_sweep
from steerlens.tables import write_csv
from steerlens.tokens import tokenize_prompt

DEBUG = "--debug"
IN_SAMPLE = (
    "note: measured on the pairs the directions are fitted on; give --test-pairs to hold some out"
)

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Where a model separates two concepts, along which direction, and how far it goes.",
)
# Without a terminal there is no width to fit: wide enough that nothing is cut off.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", help="Packaged model, local folder, GGUF file or hub id.")
]
PairsOption = Annotated[
    str, typer.Option("--pairs", help="JSONL file of contrastive pairs, or a shipped dataset.")
]
TestPairsOption = Annotated[
    str | None,
    typer.Option(
        "--test-pairs",
        help="Pairs to measure on. Default: a shipped dataset's test part; a file's own pairs.",
    ),
]
MaxPairsOption = Annotated[
    int | None, typer.Option("--max-pairs", help="Measure on the first N pairs only.")
]
LayersOption = Annotated[
    str, typer.Option("--layers", help="all, 0,5,10, 10:20:2, or globs over hook names.")
]
MethodOption = Annotated[str, typer.Option("--method", help=f"One of {', '.join(METHODS)}.")]
PositionOption = Annotated[
    int, typer.Option("--position", help="Token of the prompt to read; negative from its end.")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Prompts a forward pass. Default: what the device can use."),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of `random` and of the bootstrap.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Errors only; no tables of a sweep.")]
DebugOption = Annotated[bool, typer.Option(DEBUG, help="Show a traceback on an error.")]


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
    position: PositionOption = -1,
    budget: Annotated[
        str, typer.Option("--budget", help="What counts as coherent: relative=0.01 or nats=0.05")
    ] = "relative=0.01",
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Measure projection against logprob degradation at every layer and coefficient."""
    numbers = _numbers(coefficients)
    Budget.parse(budget)
    _check_method(method)
    fit_on, measure_on, is_held_out = _pairs(pairs, test_pairs, max_pairs)
    loaded = load_model(model, progress=not quiet)
    request = {
        "command": "sweep",
        "model": provenance(loaded).to_dict(),
        "fitted_on": _pairs_record(fit_on),
        "measured_on": _pairs_record(measure_on),
        "hook_names": resolve_hooks(loaded, layers),
        "coefficients": numbers,
        "method": method,
        "position": position,
        "budget": budget,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    if not (is_held_out or quiet):
        notes.print(IN_SAMPLE)
    started = time.perf_counter()
    directions = _fit(loaded, fit_on, layers, position, batch_size, method, seed, quiet=quiet)
    with _cells_bar(quiet=quiet) as progress:
        result = run_sweep(
            loaded,
            measure_on,
            directions,
            layers=layers,
            coefficients=numbers,
            budget=budget,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    tables = {"sweep": result.table, "layers": result.layers}
    write_run(out, tables, directions, request, seconds=seconds)
    if not quiet:
        _print_layers(result.layers)
        _print_cells(result)
        spent = result.table.attrs["forward_equivalents"]
        notes.print(
            Text(
                f"{len(result.table)} cells in {seconds:.0f} s ({spent:.0f} forward-equivalents); "
                f"written to {out}"
            )
        )


@app.command()
def boundary(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and the record.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    layers: LayersOption = "all",
    method: MethodOption = "mean_diff",
    position: PositionOption = -1,
    on: Annotated[
        str,
        typer.Option("--on", help="positive, negative, neutral (shipped text), or a text file."),
    ] = "positive",
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            help="relative=0.01, nats=0.05, kl=0.1, kl_p95=1 or rollout_kl_p95=1",
        ),
    ] = "relative=0.01",
    search_range: Annotated[
        float,
        typer.Option("--search-range", help="How far to look, in mean residual norms of a layer."),
    ] = 4.0,
    shape: Annotated[
        int | None,
        typer.Option("--shape", help="Of one layer: boundaries at so many angles in a plane."),
    ] = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """The largest coefficient of each sign at which the model is still coherent, at every layer."""
    _check_method(method)
    texts = _texts(on)
    check_search(budget=budget, search_range=search_range)
    fit_on, measure_on, is_held_out = _pairs(pairs, test_pairs, max_pairs)
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layers)
    if shape is not None:
        check_plane(hook_names, shape)
    request = {
        "command": "boundary",
        "model": provenance(loaded).to_dict(),
        "fitted_on": _pairs_record(fit_on),
        "measured_on": _pairs_record(measure_on),
        "on": on if isinstance(texts, str) else {"name": on, "texts": list(texts)},
        "hook_names": hook_names,
        "method": method,
        "position": position,
        "budget": budget,
        "search_range": search_range,
        "shape": shape,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    if not (is_held_out or quiet):
        notes.print(IN_SAMPLE)
    started = time.perf_counter()
    directions = _fit(loaded, fit_on, layers, position, batch_size, method, seed, quiet=quiet)
    options: dict[str, Any] = {
        "on": texts,
        "budget": budget,
        "search_range": search_range,
        "batch_size": batch_size,
        "seed": seed,
        "progress": None if quiet else lambda text: notes.print(Text(text)),
    }
    result = find_boundary(loaded, measure_on, directions, layers=layers, **options)
    tables = {"boundary": result.curves, "layers": result.layers}
    if shape is not None:
        plane = boundary_shape(
            loaded, measure_on, directions, layer=layers, n_angles=shape, **options
        )
        tables["shape"] = plane.table
    seconds = time.perf_counter() - started
    write_run(out, tables, directions, request, seconds=seconds)
    if not quiet:
        _print_boundary(result.layers)
        spent = result.layers.attrs["forward_equivalents"]
        notes.print(
            Text(
                f"{2 * len(result.layers)} boundaries in {seconds:.0f} s ({spent:.0f} "
                f"forward-equivalents); written to {out}"
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
    position: PositionOption = -1,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file to write.")] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """The per-layer table of the unsteered model, without a sweep."""
    fit_on, measure_on, is_held_out = _pairs(pairs, test_pairs, max_pairs)
    _check_method(method)
    if out is not None:
        check_out_file(out)
    loaded = load_model(model, progress=not quiet)
    directions = _fit(loaded, fit_on, layers, position, batch_size, method, seed, quiet=quiet)
    if not (is_held_out or quiet):
        notes.print(IN_SAMPLE)
    table = measure_layers(loaded, measure_on, directions, layers=layers, batch_size=batch_size)
    if out is not None:
        write_whole(out, lambda path: write_csv(table, path))
        if not quiet:
            notes.print(Text(f"written to {out}"))
    if not quiet:
        _print_layers(table)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What the user says.")],
    layer: Annotated[str, typer.Option("--layer", help="Layer or hook name to steer.")],
    coefficients: Annotated[
        str, typer.Option("--coefficients", help="Residual units, e.g. --coefficients=-8,0,8")
    ] = "-8,0,8",
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    method: MethodOption = "mean_diff",
    position: PositionOption = -1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 40,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template round the prompt.")] = False,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Greedy continuations of one prompt at several coefficients, side by side."""
    numbers = _numbers(coefficients)
    _check_method(method)
    fit_on, _, _ = _pairs(pairs, None, None)
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layer)
    chat: Prompt = prompt if raw else (Message("user", prompt),)
    tokenized = tokenize_prompt(loaded, chat)
    directions = _fit(loaded, fit_on, layer, position, batch_size, method, seed, quiet=quiet)
    steered = {name: directions[name] for name in hook_names}
    table = Table(title=Text(prompt), show_lines=True)
    for number in numbers:
        table.add_column(f"{number:g}", ratio=1)
    table.add_row(
        *(
            Text(generate_text(loaded, tokenized, steered, n, max_new_tokens=max_new_tokens))
            for n in numbers
        )
    )
    output.print(table)


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


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise SweepError(f"no method {method!r}; there are {', '.join(METHODS)}")


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SweepError(f"expected numbers joined by commas, got {text!r}") from error
    return list(checked_coefficients(numbers))


def _pairs(
    pairs: str, test_pairs: str | None, max_pairs: int | None
) -> tuple[ContrastivePairs, ContrastivePairs, bool]:
    """The pairs to fit on, the pairs to measure on, and whether those are other pairs."""
    fit_on = _read_pairs(pairs, "train")
    if test_pairs is not None:
        measure_on = _read_pairs(test_pairs, "test")
    elif _is_shipped(pairs):
        measure_on = _read_pairs(pairs, "test")
    else:
        measure_on = fit_on
    is_held_out = measure_on.fingerprint != fit_on.fingerprint
    if max_pairs is not None:
        measure_on = measure_on[: max(max_pairs, 0)]
    return fit_on, measure_on, is_held_out


def _read_pairs(source: str, split: str) -> ContrastivePairs:
    if _is_shipped(source):
        return ContrastivePairs.load(source, split=split)
    if not Path(source).exists():
        shipped = ", ".join(data.dataset_names())
        raise PairError(f"{source!r} is neither a file nor a shipped dataset ({shipped})")
    return ContrastivePairs.from_jsonl(source)


def _texts(on: str) -> Literal["positive", "negative"] | tuple[str, ...]:
    """What `--on` names: a side of the pairs, the shipped neutral text, or a file's lines."""
    if on == "positive":
        return "positive"
    if on == "negative":
        return "negative"
    if on == "neutral":
        return data.neutral_texts()
    try:
        lines = Path(on).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(
            f"--on {on!r} is neither positive, negative, neutral nor a text file: {error}"
        ) from error
    texts = tuple(line for line in lines if line.strip())
    if not texts:
        raise PairError(f"--on {on!r} holds no text; give one text a line")
    return texts


def _is_shipped(source: str) -> bool:
    return source in data.dataset_names()


def _pairs_record(pairs: ContrastivePairs) -> dict[str, Any]:
    return {"name": pairs.name, "n_pairs": len(pairs), "fingerprint": pairs.fingerprint}


def _fit(
    model: Any,
    pairs: ContrastivePairs,
    layers: str,
    position: int,
    batch_size: int | None,
    method: str,
    seed: int,
    *,
    quiet: bool,
) -> Any:
    if not quiet:
        notes.print(Text(f"Fitting {method} on {len(pairs)} pairs of {pairs.name}"))
    differences = collect_differences(
        model, pairs, layers=layers, position=position, batch_size=batch_size
    )
    return fit_directions(differences, method=method, seed=seed)


@contextmanager
def _cells_bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    if quiet:
        yield None
        return
    columns = (
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes) as bar:
        task = bar.add_task("cells", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_layers(table: Any) -> None:
    """The per-layer table without what is the same on every row, or undefined."""
    shown = Table(title="Per layer, unsteered")
    names = ["separation", "projection", "projection_std", "agreement", "explained_variance"]
    names += ["resid_norm"]
    shown.add_column("hook")
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in table.to_dict("records"):
        shown.add_row(_hook_label(row), *(f"{row[name]:.4g}" for name in names))
    output.print(shown)
    output.print(f"baseline logprob {table.logprob_nats.iloc[0]:.4f} nats per token")


def _print_boundary(table: Any) -> None:
    """Boundaries with their intervals, what was predicted, and the projection there."""
    settings = table.attrs["settings"]
    shown = Table(title=f"Coherence boundary on {settings['on']} text, {settings['budget']}")
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
            _hook_label(row),
            *cells,
            f"{row['resid_norm']:.4g}",
            f"{row['projection_at_boundary']:.4g}",
        )
    output.print(shown)
    if table[["reentry_pos", "reentry_neg"]].notna().any(axis=None):
        output.print("* within the budget again further out: see reentry_pos and reentry_neg")


def _print_cells(result: SweepResult) -> None:
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
        shown.add_row(_hook_label(records[0]), *cells)
    output.print(shown)


def _hook_label(row: Any) -> str:
    """The layer's number for a block output, the hook's whole name otherwise."""
    is_block_output = row["hook_name"] == resid_post(row["layer"])
    return str(row["layer"]) if is_block_output else str(row["hook_name"])
