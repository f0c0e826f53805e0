"""The options of the commands, and what their values name."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from steerlens.cli.printing import notes
from steerlens.cli.warned import warn
from steerlens.data.pairs import ContrastivePairs, dataset_names, read_texts
from steerlens.errors import InputError
from steerlens.measure.rows import checked_coefficients
from steerlens.measure.texts import On
from steerlens.steering import parse_coefficient

DEBUG = "--debug"
IN_SAMPLE = (
    "note: measured on the pairs the directions are fitted on; give --test-pairs to hold some out"
)
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
MethodOption = Annotated[
    str, typer.Option("--method", help="How to fit the direction: `steerlens methods` lists them.")
]
PositionOption = Annotated[
    int | None,
    typer.Option(
        "--position",
        help="Token of the prompt to read; negative from its end. Default -1; -2 for methods "
        "fitted from gradients where pairs have no continuation.",
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Prompts a forward pass. Default: what the device can use."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", min=0, help="Seed of `random`, the bootstrap, the probes and the labels drawn."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Errors only; no tables of a sweep.")]
DebugOption = Annotated[bool, typer.Option(DEBUG, help="Show a traceback on an error.")]


def strengths_of(text: str) -> list[str]:
    """Coefficients with their units, joined by commas: "-80%,0,0.1 norm".

    Raises `InputError` on anything else, and when there is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        parse_coefficient(part)
    if not parts:
        raise InputError("expected coefficients joined by commas, got none")
    return parts


def numbers_of(text: str) -> list[float]:
    """Coefficients joined by commas. Raises `InputError` on anything else."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"expected numbers joined by commas, got {text!r}") from error
    return list(checked_coefficients(numbers))


def pairs_of(
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
        shipped = ", ".join(dataset_names())
        raise InputError(f"{source!r} is neither a file nor a shipped dataset ({shipped})")
    return ContrastivePairs.from_jsonl(source)


def text_of(on: str) -> On:
    """What `--on` names. Raises `InputError` when it is a file that holds no text."""
    if on == "positive":
        return "positive"
    if on == "negative":
        return "negative"
    if on == "neutral":
        return "neutral"
    if not Path(on).exists():
        raise InputError(f"--on {on!r} is neither positive, negative, neutral nor a file")
    read_texts(Path(on))
    return Path(on)


def _is_shipped(source: str) -> bool:
    return source in dataset_names()


def pairs_record(pairs: ContrastivePairs) -> dict[str, Any]:
    """What a run's record says of its pairs."""
    return {"name": pairs.name, "n_pairs": len(pairs), "fingerprint": pairs.fingerprint}


def note_fit(method: str, pairs: ContrastivePairs, *, is_held_out: bool, quiet: bool) -> None:
    """Say what is fitted, on which pairs, and whether they are measured on too; unless `quiet`.

    That they are is kept for the record, quiet or not.
    """
    if not is_held_out:
        warn(IN_SAMPLE, quiet=quiet)
    if not quiet:
        notes.print(Text(f"Fitting {method} on {len(pairs)} pairs of {pairs.name}"))
