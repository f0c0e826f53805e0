"""The commands that make, use and carry steering vectors."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

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
    pairs_of,
    strengths_of,
    text_of,
)
from steerlens.cli.printing import notes, output, print_rows, progress_of
from steerlens.data.pairs import Message, Prompt
from steerlens.directions.fitting import default_position, fit
from steerlens.directions.methods import method_of
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.errors import InputError
from steerlens.measure.boundary import check_search
from steerlens.measure.cosines import cosine_table
from steerlens.measure.study import find_boundary, measure_layers
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import load_model
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.progress import silent
from steerlens.runs.record import check_out_file
from steerlens.steering import SteeringVector, operator_of, parse_coefficient
from steerlens.steering import generate as generate_text
from steerlens.steering.export import bake as bake_checkpoint
from steerlens.steering.export import from_gguf, to_gguf
from steerlens.steering.export.huggingface import check_is_new

VectorArgument = Annotated[Path, typer.Argument(help="A .safetensors or .gguf vector.")]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", help="As elsewhere. Default: the vector's own, or the packaged one."),
]

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Look into steering vectors, compare them."
)


def extract(
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    layers: LayersOption,
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    operator: Annotated[
        str, typer.Option("--operator", help="add, ablate, clamp (with --value) or rotate.")
    ] = "add",
    value: Annotated[
        float | None, typer.Option("--value", help="What clamp sets the component to.")
    ] = None,
    boundary: Annotated[
        bool,
        typer.Option(
            help="Measure the coherence boundary too, so that coefficients like 80% work."
        ),
    ] = True,
    on: Annotated[
        str,
        typer.Option("--on", help="Text of the boundary: positive, negative, neutral or a file."),
    ] = "positive",
    budget: Annotated[
        str, typer.Option("--budget", help="Of the boundary, as in `steerlens boundary`.")
    ] = "relative=0.01",
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Fit a direction and write it as a steering vector, its boundary with it."""
    method_of(method)
    act = operator_of(operator, value=value)
    text = text_of(on)
    check_search(budget=budget, search_range=4.0)
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    if out.suffix != ".safetensors":
        raise InputError(f"--out {str(out)!r}: expected a name that ends in .safetensors")
    check_out_file(out)
    loaded = load_model(model, progress=not quiet)
    resolve_hooks(loaded, layers)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "progress": progress}
        directions = fit(loaded, fit_on, method=method, position=position, seed=seed, **shared)
        if boundary:
            table = find_boundary(
                loaded, measure_on, directions, on=text, budget=budget, seed=seed, **shared
            ).layers
        else:
            table = measure_layers(loaded, measure_on, directions, **shared)
    vector = SteeringVector.from_directions(
        loaded, directions, layers=layers, operator=act, layer_table=table, dataset=fit_on.name
    )
    vector.save(out)
    if not quiet:
        _print_vector(vector)
        notes.print(Text(f"written to {out}"))


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What the user says.")],
    vector: Annotated[
        Path | None, typer.Option("--vector", help="A .safetensors or .gguf vector.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", help="Layer or hook name: of the vector, or to fit a direction at."
        ),
    ] = None,
    coefficients: Annotated[
        str,
        typer.Option(
            "--coefficients",
            "--coefficient",
            help="Residual units, 0.1norm (residual norms) or 80% (of the boundary), by commas.",
        ),
    ] = "-8,0,8",
    positions: Annotated[
        str, typer.Option("--positions", help="Tokens to steer: all, prompt, generated or last.")
    ] = "all",
    model: OptionalModel = None,
    pairs: PairsOption = "sentiment",
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 40,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template round the prompt.")] = False,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Greedy continuations of one prompt at several coefficients, side by side."""
    strengths = strengths_of(coefficients)
    known = ("all", "prompt", "generated", "last")
    if positions not in known:
        raise InputError(f"--positions are {', '.join(known)}, not {positions!r}")
    if vector is None and layer is None:
        raise InputError("give --vector FILE, or --layer to fit a direction there")
    if vector is None and any(parse_coefficient(s).unit != "residual" for s in strengths):
        raise InputError(
            "norms and shares of the boundary are those of a --vector (see `steerlens extract`); "
            "give --coefficients in residual units"
        )
    chat: Prompt = prompt if raw else (Message("user", prompt),)
    steered: Any
    if vector is not None:
        steered = read_vector(vector)
        loaded = load_model(model or _model_of(steered), progress=not quiet)
        check_model(steered, loaded)
        steered = steered if layer is None else steered.at(*resolve_hooks(loaded, layer))
        tokenized = tokenize_prompt(loaded, chat)
    else:
        method_of(method)
        fit_on, _, _ = pairs_of(pairs, None, None)
        at = default_position(method, fit_on) if position is None else position
        loaded = load_model(model or DEFAULT_MODEL, progress=not quiet)
        hooks = resolve_hooks(loaded, layer or "")
        tokenized = tokenize_prompt(loaded, chat)
        note_fit(method, fit_on, is_held_out=True, quiet=quiet)
        with progress_of(quiet=quiet) as progress:
            directions = fit(
                loaded,
                fit_on,
                method=method,
                layers=layer or "",
                position=at,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
        steered = {name: directions[name] for name in hooks}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "positions": positions}
    texts: list[Text] = []
    with progress_of(quiet=quiet) as progress:
        tell = progress or silent
        tell("continuations", 0, len(strengths))
        for strength in strengths:
            texts.append(Text(generate_text(loaded, tokenized, steered, strength, **options)))
            tell("continuations", len(texts), len(strengths))
    table = Table(title=Text(prompt), show_lines=True)
    for strength in strengths:
        table.add_column(Text(strength), ratio=1)
    table.add_row(*texts)
    output.print(table)


def export(
    source: VectorArgument,
    target: Annotated[Path, typer.Argument(help="File to write: .gguf or .safetensors.")],
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Between steerlens's safetensors and llama.cpp's control vectors (.gguf), both ways."""
    vector = read_vector(source)
    check_out_file(target)
    if target.suffix == ".gguf":
        to_gguf(vector, target)
    elif target.suffix == ".safetensors":
        vector.save(target)
    else:
        raise InputError(f"expected a target .gguf or .safetensors, got {target.name!r}")
    if not quiet:
        notes.print(Text(f"{vector!r} written to {target}"))


def bake(
    vector: VectorArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint, new or empty.")],
    coefficient: Annotated[
        str, typer.Option("--coefficient", help="Residual units, 0.1norm, or 80% of the boundary.")
    ],
    model: OptionalModel = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Write a Hugging Face checkpoint that is steered by itself, for plain transformers."""
    strengths = strengths_of(coefficient)
    if len(strengths) != 1:
        raise InputError(f"expected one --coefficient, got {coefficient!r}")
    check_is_new(out)
    steered = read_vector(vector)
    loaded = load_model(model or _model_of(steered), progress=not quiet)
    check_model(steered, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # noted by check_model
        bake_checkpoint(loaded, steered, strengths[0], out)
    if not quiet:
        notes.print(Text(f"{steered!r} at {coefficient} written to {out}"))


@app.command()
def show(vector: VectorArgument, debug: DebugOption = False) -> None:  # noqa: ARG001
    """What a vector's file says: where it acts, how strongly, and where it comes from."""
    _print_vector(read_vector(vector))


@app.command()
def compare(
    vectors: Annotated[list[Path], typer.Argument(help="Two or more vectors, or one of layers.")],
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Cosines between the directions of some vectors, and across the layers of each."""
    names = [path.name for path in vectors]
    labels = names if len(set(names)) == len(names) else [str(path) for path in vectors]
    found = {label: read_vector(path) for label, path in zip(labels, vectors, strict=True)}
    if len(found) < len(vectors):
        raise InputError("the same file is given twice")
    table = cosine_table(found)
    columns = ["vector_a", "hook_a", "vector_b", "hook_b", "cosine", "random_sd"]
    print_rows(table, "Cosines", columns)


def read_vector(path: Path) -> SteeringVector:
    """A vector of a .gguf or .safetensors file. Raises `InputError`."""
    return from_gguf(path) if path.suffix == ".gguf" else SteeringVector.load(path)


def check_model(vector: SteeringVector, model: Any) -> None:
    """As `SteeringVector.check_model`, with its warnings as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vector.check_model(model)
    for warning in caught:
        notes.print(Text(f"note: {warning.message}"))


def _model_of(vector: SteeringVector) -> str:
    if vector.origin.model == "unknown":
        raise InputError("the vector does not say which model it was made on; give --model")
    return vector.origin.model


def _print_vector(vector: SteeringVector) -> None:
    output.print(Text(repr(vector)))
    for name, value in vector.describe().items():
        output.print(Text(f"  {name}: {value}"))
    shown = Table()
    shown.add_column("hook")
    for name in ("scale", "resid norm", "boundary -", "boundary +"):
        shown.add_column(name, justify="right")
    of = vector.calibration
    columns = (vector.scale, of.resid_norm, of.boundary_neg, of.boundary_pos)
    for name, *values in zip(vector.hook_names, *(c.tolist() for c in columns), strict=True):
        shown.add_row(Text(name), *(f"{number:.4g}" for number in values))
    output.print(shown)
