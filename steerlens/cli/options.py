"""The options that several commands share, each declared once, and what their values name."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from steerlens.data.pairs import ContrastivePairs
from steerlens.data.reading import read_texts
from steerlens.data.shipped import dataset_names
from steerlens.engine.labels import LabelKind
from steerlens.errors import InputError
from steerlens.measure.rows import checked_coefficients
from steerlens.measure.texts import On
from steerlens.steering import parse_coefficient

DEBUG = "--debug"

OutFolder = Annotated[Path, "Folder for the tables and the record."]
Model = Annotated[str, "Packaged model, local folder, GGUF file or hub id."]
Pairs = Annotated[str, "JSONL file of contrastive pairs, or a shipped dataset."]
Group = Annotated[
    str,
    "Key that names the group of a pair (persona, template), by which intervals and nulls go; "
    "auto: pairs whose sides differ in the same text.",
]
TestPairs = Annotated[
    str | None, "Pairs to measure on. Default: a shipped dataset's test part; a file's own pairs."
]
MaxPairs = Annotated[int | None, "Measure on the first N pairs only."]
Layers = Annotated[str, "all, 0,5,10, 10:20:2, or globs over hook names."]
Method = Annotated[str, "How to fit the direction: `steerlens methods` lists them."]
Position = Annotated[
    int | None,
    "Token of the prompt to read; negative from its end. Default -1; -2 for methods "
    "fitted from gradients where pairs have no continuation.",
]

Labels = Annotated[
    str | None,
    "Tokens whose logprob counts: continuation, assistant, own, own_sampled or all. Default: "
    "continuation where pairs have one, else assistant of a chat, else all.",
]
OwnTokens = Annotated[
    int, typer.Option(min=1, help="Most tokens of a text that the model itself writes.")
]


def labels_of(command: Any) -> dict[str, Any]:
    """What `--labels` and `--own-tokens` say, as `Study` takes it.

    Raises `InputError` on no kind of labels.
    """
    if command.labels is not None and command.labels not in get_args(LabelKind):
        raise InputError(f"labels are {', '.join(get_args(LabelKind))}, not {command.labels!r}")
    return {"labels": command.labels, "own_tokens": command.own_tokens}


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
    pairs: str,
    test_pairs: str | None = None,
    max_pairs: int | None = None,
    *,
    group: str = "group",
) -> tuple[ContrastivePairs, ContrastivePairs]:
    """The pairs to fit on and the pairs to measure on."""
    fit_on = _read_pairs(pairs, "train", group)
    if test_pairs is not None:
        measure_on = _read_pairs(test_pairs, "test", group)
    elif pairs in dataset_names():
        measure_on = _read_pairs(pairs, "test", group)
    else:
        measure_on = fit_on
    if max_pairs is not None:
        measure_on = measure_on[: max(max_pairs, 0)]
    return fit_on, measure_on


def _read_pairs(source: str, split: str, group: str) -> ContrastivePairs:
    if source in dataset_names():
        return ContrastivePairs.load(source, split=split, group=group)
    check_source(source)
    return ContrastivePairs.from_jsonl(source, group=group)


def check_source(source: str) -> None:
    """Raise `InputError` unless there is a file of that name, which is no shipped dataset's."""
    if not Path(source).exists():
        shipped = ", ".join(dataset_names())
        raise InputError(f"{source!r} is neither a file nor a shipped dataset ({shipped})")


def text_of(on: str) -> On:
    """What `--on` names. Raises `InputError` when it is a file that holds no text."""
    if on == "positive" or on == "negative" or on == "neutral":
        return on
    if not Path(on).exists():
        raise InputError(f"--on {on!r} is neither positive, negative, neutral nor a file")
    read_texts(Path(on))
    return Path(on)


def pairs_record(pairs: ContrastivePairs) -> dict[str, Any]:
    """What a run's record says of its pairs."""
    return {
        "name": pairs.name,
        "n_pairs": len(pairs),
        "n_groups": len(set(pairs.groups)),
        "fingerprint": pairs.fingerprint,
    }
