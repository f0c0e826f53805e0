"""The options that several commands share, each declared once, and what their values name."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from steerlens.data.forms import FORMS
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.reading import read_texts
from steerlens.data.shipped import dataset_names
from steerlens.engine.labels import LabelKind
from steerlens.errors import InputError
from steerlens.measure.rows import checked_coefficients
from steerlens.measure.texts import On
from steerlens.steering import SteeringVector, parse_coefficient
from steerlens.steering.export import from_gguf

DEBUG = "--debug"

OutFolder = Annotated[Path, "Folder for the tables and the record."]
Model = Annotated[str, "Packaged model, local folder, GGUF file or hub id."]
Pairs = Annotated[
    str,
    "Contrastive pairs: a shipped dataset; a file (JSONL, JSON, CSV, TSV, Parquet, text); a folder "
    "or OWNER/NAME of a Hugging Face dataset; or two of them, POSITIVE,NEGATIVE.",
]
Columns = Annotated[
    str | None, "What columns are for, e.g. positive=chosen,negative=rejected,group=persona."
]
Form = Annotated[
    str | None, f"How a file is to be read: {', '.join(FORMS)}. Default: by its columns."
]
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
    str | None,
    "Tokens to read: -1, a slice -4:, or last, continuation, assistant, own, think, answer; of "
    "several the mean, or the :last or :max. Default -1; -2 for methods fitted from gradients "
    "where pairs have no continuation.",
]

Vector = Annotated[
    str | None,
    "A .safetensors or .gguf steering vector, measured as a whole in place of directions that are "
    "fitted; it says where and how it acts.",
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


def template_args_of(text: str | None) -> dict[str, Any]:
    """What `--template-args` says: "name=value, ..." with values of JSON or text, or an object.

    Raises `InputError` on anything else.
    """
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"--template-args is no JSON: {error}") from error
        return dict(found)
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and is_given for name, is_given, _ in parts):
        raise InputError(f"--template-args are name=value, joined by commas, not {text!r}")
    return {name.strip(): _json_or_text(value.strip()) for name, _, value in parts}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def read_vector(path: Path) -> SteeringVector:
    """The vector of a .safetensors or .gguf file."""
    return from_gguf(path) if path.suffix == ".gguf" else SteeringVector.load(path)


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


def columns_of(text: str | None) -> dict[str, str]:
    """What `--columns` says: part -> column. Raises `InputError` on anything else."""
    parts = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if not all(role.strip() and column.strip() for role, _, column in parts):
        raise InputError(f"expected --columns PART=COLUMN, joined by commas, got {text!r}")
    return {role.strip(): column.strip() for role, _, column in parts}


def pairs_of(
    pairs: str,
    test_pairs: str | None = None,
    max_pairs: int | None = None,
    *,
    group: str = "group",
    columns: str | None = None,
    form: str | None = None,
) -> tuple[ContrastivePairs, ContrastivePairs]:
    """The pairs to fit on and the pairs to measure on."""
    how: dict[str, Any] = {"group": group, "columns": columns_of(columns), "form": form}
    fit_on = _read_pairs(pairs, "train", how)
    if test_pairs is not None:
        measure_on = _read_pairs(test_pairs, "test", how)
    elif pairs in dataset_names():
        measure_on = _read_pairs(pairs, "test", how)
    else:
        measure_on = fit_on
    if max_pairs is not None:
        measure_on = replace(measure_on[: max(max_pairs, 0)], card=measure_on.card)
    return fit_on, measure_on


def _read_pairs(source: str, split: str, how: dict[str, Any]) -> ContrastivePairs:
    if source in dataset_names():
        return ContrastivePairs.load(source, split=split, group=how["group"])
    return ContrastivePairs.load(source, split=split, **how)


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
        **({} if pairs.card is None else {"read": asdict(pairs.card)}),
    }
