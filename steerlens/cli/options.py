"""The options of all commands, from a data file, and what their values name."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import typer

import steerlens as sl
from steerlens.errors import InputError
from steerlens.files import packaged_rows

DEBUG = "--debug"
DTYPES = ("float32", "bfloat16", "float16", "float64")
OWN_TOKENS = 32
"""As in `engine.labels`, which imports PyTorch; a help page does not."""


_OPTIONS = {
    (command, line["option"]): line
    for line in packaged_rows("cli", "options.csv")
    for command in line["commands"].split() or [""]
}
"""Command ("": any) and field -> what its help says and how it is given."""
_EXAMPLES = {line.pop("command"): line for line in packaged_rows("cli", "examples.csv")}


def kind_of(command: str, field: str) -> str:
    """An "argument", which has no name, or "needed": it has no default, but a record has it."""
    return _line_of(command, field).get("kind", "")


def declaration_of(command: str, field: str) -> Any:
    """What typer is told of a command's field; None of what is no option, as its context."""
    line, kind = _line_of(command, field), kind_of(command, field)
    if not line:
        return None
    needed = " Needed, unless an earlier run is gone on with or repeated."
    return (typer.Argument if kind == "argument" else typer.Option)(
        *line["names"].split(),
        min=int(line["least"]) if line["least"] else None,
        metavar=line["metavar"] or None,
        help=line["help"] + (needed if kind == "needed" else ""),
    )


def _line_of(command: str, field: str) -> dict[str, str]:
    return _OPTIONS.get((command, field), _OPTIONS.get(("", field), {}))


def examples_of(command: str) -> str:
    """The end of its help: two ways to call it, in lines that typer leaves as they are."""
    lines = (f"  steerlens {text}" for text in _EXAMPLES[command].values())
    return "\n".join(("\b", "Examples:", *lines))


def labels_of(command: Any) -> dict[str, Any]:
    """`--labels` and `--own-tokens`, as `Study` takes them. Raises `InputError` on no kind."""
    from steerlens.engine.labels import LabelKind

    kinds = get_args(LabelKind)
    if command.labels is not None and command.labels not in kinds:
        raise InputError(f"labels are {', '.join(kinds)}, not {command.labels!r}")
    return {"labels": command.labels, "own_tokens": command.own_tokens}


def template_args_of(text: str | None) -> dict[str, Any]:
    """What `--template-args` says: "name=value, ...", or a JSON object; else an `InputError`."""
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"--template-args is no JSON: {error}") from error
        return dict(found)
    found = {}
    for name, is_given, value in (part.partition("=") for part in text.split(",")):
        if not (name.strip() and is_given):
            raise InputError(f"--template-args are name=value, joined by commas, not {text!r}")
        found[name.strip()] = value.strip()
        with suppress(ValueError):  # else it is text
            found[name.strip()] = json.loads(value)
    return found


def device_of(name: str | None) -> str | None:
    """The device, if it names one. Raises `InputError` where PyTorch knows none of that name."""
    import torch

    try:
        return None if name is None else str(torch.device(name))
    except RuntimeError as error:
        raise InputError(f"--device is cpu, cuda, cuda:1 or mps, not {name!r}") from error


def dtype_of(name: str) -> Any:
    """The dtype of PyTorch. Raises `InputError` on another name."""
    import torch

    if name not in DTYPES:
        raise InputError(f"--dtype is {', '.join(DTYPES)}, not {name!r}")
    return getattr(torch, name)


def vector_record(path: Path) -> dict[str, str]:
    """What a run's record says of the file of a vector."""
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def strengths_of(text: str) -> list[str]:
    """Coefficients joined by commas: "-80%,0,0.1 norm". Raises `InputError` on anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        sl.steering.parse_coefficient(part)
    if not parts:
        raise InputError("expected coefficients joined by commas, got none")
    return parts


def strength_of(text: str | None) -> str:
    """One coefficient with its unit, not 0. Raises `InputError` on anything else."""
    strengths = strengths_of(text or "")
    if len(strengths) != 1 or sl.steering.parse_coefficient(strengths[0]).number == 0:
        raise InputError(f"expected one --coefficient, not 0, got {text!r}")
    return strengths[0]


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
    max_train_pairs: int | None = None,
    *,
    group: str = "group",
    columns: str | None = None,
    form: str | None = None,
) -> tuple[Any, Any]:
    """The pairs to fit on and the pairs to measure on."""
    how: dict[str, Any] = {"group": group, "columns": columns_of(columns), "form": form}
    fit_on = measure_on = _read_pairs(pairs, "train", how)
    if test_pairs is None and pairs in sl.data.dataset_names():
        test_pairs = pairs
    if test_pairs is not None:
        measure_on = _read_pairs(test_pairs, "test", how)
    return _first(fit_on, max_train_pairs), _first(measure_on, max_pairs)


def _first(pairs: Any, n: int | None) -> Any:
    return pairs if n is None else replace(pairs[: max(n, 0)], card=pairs.card)


def _read_pairs(source: str, split: str, how: dict[str, Any]) -> Any:
    if source in sl.data.dataset_names():
        how = {"group": how["group"]}
    return sl.ContrastivePairs.load(source, split=split, **how)


def text_of(on: str) -> tuple[Any, list[str] | None]:
    """What `--on` names, and the texts of a file. Raises `InputError` where that holds none."""
    if on in ("positive", "negative", "neutral"):
        return on, None
    if not Path(on).exists():
        raise InputError(f"--on {on!r} is neither positive, negative, neutral nor a file")
    return Path(on), list(sl.data.reading.read_texts(Path(on)))


def pairs_record(pairs: Any) -> dict[str, Any]:
    """What a run's record says of its pairs."""
    return {
        "name": pairs.name,
        "n_pairs": len(pairs),
        "n_groups": len(set(pairs.groups)),
        "fingerprint": pairs.fingerprint,
        **({} if pairs.card is None else {"read": asdict(pairs.card)}),
    }


def items_record(items: Any) -> dict[str, Any]:
    """What a run's record says of its items."""
    return {"name": items.name, "n_items": len(items), "fingerprint": items.fingerprint}
