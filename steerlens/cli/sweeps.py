"""`steerlens sweep`: run it, go on with it after an interrupt, repeat it from its record."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from steerlens.cli.examples import example_tables
from steerlens.cli.options import (
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
from steerlens.cli.pools import DaskOption, WorkersOption, executor_of
from steerlens.cli.printing import notes, print_cells, print_layers, progress_of
from steerlens.cli.warned import keep_warning, warn, warned
from steerlens.directions.differences import collect_differences
from steerlens.directions.fitting import default_position, fit
from steerlens.directions.methods import method_of, null_directions
from steerlens.errors import FileError
from steerlens.loss import Budget
from steerlens.measure.study import sweep as run_sweep
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import load_model, provenance
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.runs.record import RECORD, differences, versions, write_run
from steerlens.runs.unfinished import clear_finished, open_parts, read_record, read_started

if TYPE_CHECKING:
    _Context = typer.Context
else:
    # What typer passes is the base class, whose module differs between its versions.
    _Context = typer.Context.__base__

INTERRUPTED = 130
_TEXT, _WHOLE = (str,), (int,)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "model": _TEXT,
    "pairs": _TEXT,
    "test_pairs": (str, type(None)),
    "max_pairs": (int, type(None)),
    "layers": _TEXT,
    "coefficients": _TEXT,
    "method": _TEXT,
    "position": (int, type(None)),
    "budget": _TEXT,
    "null": (int, type(None)),
    "examples": _WHOLE,
    "batch_size": (int, type(None)),
    "seed": _WHOLE,
}
"""The options that decide what is run, as a record keeps them."""


def sweep(
    context: _Context,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the tables and the record.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Go on with the unfinished run in this folder, as it was begun."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help=f"Repeat the run of this {RECORD}, and say what differs from it."
        ),
    ] = None,
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
    workers: WorkersOption = None,
    dask: DaskOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Measure projection against logprob degradation at every layer and coefficient."""
    given: dict[str, Any] = {
        "model": model,
        "pairs": pairs,
        "test_pairs": test_pairs,
        "max_pairs": max_pairs,
        "layers": layers,
        "coefficients": coefficients,
        "method": method,
        "position": position,
        "budget": budget,
        "null": null,
        "examples": examples,
        "batch_size": batch_size,
        "seed": seed,
    }
    if resume is not None and (out is not None or source is not None):
        raise FileError("--resume goes on in its own folder: leave out --out and --from")
    if resume is None and out is None:
        raise FileError("expected --out with a folder to write to, or --resume with one to go on")
    asked = {name: value for name, value in given.items() if _is_asked(context, name)}
    with executor_of(workers=workers, dask=dask) as executor:
        if resume is not None:
            started = read_started(resume)
            if started is None and (resume / RECORD).exists():
                clear_finished(resume)
                if not quiet:
                    notes.print(Text(f"{resume} is finished: nothing to do"))
                return
            if started is None:
                raise FileError(f"{str(resume)!r} holds no unfinished run; start one with --out")
            _note_resumed(resume, len(started.has_part), len(started.hook_names), quiet=quiet)
            options = _options_of(started.options, resume) | asked
            _run(options, resume, resume=True, recorded=None, executor=executor, quiet=quiet)
        elif source is not None and out is not None:
            recorded = read_record(source)
            options = _options_of(recorded["options"], source) | asked
            _run(options, out, resume=False, recorded=recorded, executor=executor, quiet=quiet)
        elif out is not None:
            _run(given, out, resume=False, recorded=None, executor=executor, quiet=quiet)


def _is_asked(context: _Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options_of(recorded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of a record. Raises `FileError` unless they are those of a sweep."""
    wrong = sorted({*_KINDS} ^ {*recorded}) or [
        name
        for name, kind in _KINDS.items()
        if not isinstance(recorded[name], kind) or isinstance(recorded[name], bool)
    ]
    if wrong:
        raise FileError(
            f"the record in {str(path)!r} does not have the options of a sweep "
            f"({', '.join(wrong)}); it may be of another steerlens or another command"
        )
    return dict(recorded)


def _note_resumed(folder: Path, n_known: int, n_hooks: int, *, quiet: bool) -> None:
    if not quiet:
        notes.print(Text(f"Going on in {folder}: {n_known} of {n_hooks} hooks are finished"))


def _run(options: Mapping[str, Any], out: Path, **how: Any) -> None:
    try:
        _run_to_end(options, out, **how)
    except KeyboardInterrupt:
        _note_interrupt(out)
        raise typer.Exit(INTERRUPTED) from None


def _run_to_end(
    options: Mapping[str, Any],
    out: Path,
    *,
    resume: bool,
    recorded: Mapping[str, Any] | None,
    executor: Executor | None,
    quiet: bool,
) -> None:
    numbers = numbers_of(options["coefficients"])
    Budget.parse(options["budget"])
    method, seed, batch_size = (options[name] for name in ("method", "seed", "batch_size"))
    method_of(method)
    fit_on, measure_on, is_held_out = pairs_of(
        options["pairs"], options["test_pairs"], options["max_pairs"]
    )
    position = options["position"]
    position = default_position(method, fit_on) if position is None else position
    loaded = load_model(options["model"], progress=not quiet)
    hook_names = resolve_hooks(loaded, options["layers"])
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
        "budget": options["budget"],
        "null": options["null"],
        "examples": options["examples"],
        "examples_at": "the middle one of hook_names, whatever the numbers: an illustration",
        "batch_size": batch_size,
        "seed": seed,
    }
    if recorded is not None:
        for text in [
            *differences(recorded["request"], request),
            *(f"version of {text}" for text in differences(recorded["versions"], versions())),
        ]:
            warn(f"note: not as recorded: {text}", quiet=quiet)
    with open_parts(out, request, options=options, resume=resume, warned=warned) as parts:
        note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
        started = time.perf_counter()
        with progress_of(quiet=quiet) as progress:
            shared: dict[str, Any] = {
                "layers": options["layers"],
                "batch_size": batch_size,
                "progress": progress,
            }
            directions = parts.directions(
                lambda: fit(loaded, fit_on, method=method, position=position, seed=seed, **shared)
            )
            nulls = None
            if options["null"] is not None:
                differ = collect_differences(loaded, fit_on, position=position, **shared)
                nulls = null_directions(differ, n=options["null"], seed=seed)
            result = run_sweep(
                loaded,
                measure_on,
                directions,
                coefficients=numbers,
                budget=options["budget"],
                seed=seed,
                nulls=nulls,
                checkpoint=parts,
                executor=executor,
                **shared,
            )
        for text in parts.warned:
            keep_warning(text)
        tables = {"sweep": result.table, "layers": result.layers, "points": result.points}
        if options["examples"]:
            tables |= example_tables(
                loaded,
                measure_on,
                directions,
                hook_name=hook_names[len(hook_names) // 2],
                coefficients=numbers,
                n_prompts=options["examples"],
                batch_size=batch_size,
                quiet=quiet,
            )
        spent = result.table.attrs["forward_equivalents"]
        seconds = parts.seconds + time.perf_counter() - started
        with _saying_how_to_resume(out):
            write_run(
                out,
                tables,
                directions,
                request,
                seconds=seconds,
                forward_equivalents=spent,
                warnings=warned(),
                options=options,
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


@contextmanager
def _saying_how_to_resume(out: Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(
            f"{error}; all cells are kept: make room, then `steerlens sweep --resume {out}`"
        ) from error


def _note_interrupt(out: Path) -> None:
    started = read_started(out)
    if started is not None:
        text = (
            f"with {len(started.has_part)} of {len(started.hook_names)} hooks finished; "
            f"`steerlens sweep --resume {out}` goes on"
        )
    elif (out / RECORD).exists():
        text = f"(the tables in {out} are whole)"
    else:
        text = "before a hook was finished"
    notes.print(Text(f"steerlens: interrupted {text}"), soft_wrap=True)
