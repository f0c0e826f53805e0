"""What was run: model, data, settings, versions, machine and cost, as lists of facts."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerlens.errors import HookError
from steerlens.files import without_nan
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.runs.html_report.markup import Html, element, joined
from steerlens.runs.html_report.numbers import short, signed
from steerlens.runs.reading import Run

_DATA = (
    *("pairs", "items", "fitted_on", "chosen_on", "measured_on", "off_target"),
    "n_pairs_fitted_on",
)
_ELSEWHERE = ("command", "model", "hook_names", "texts", "prompts", *_DATA)


def facts(run: Run) -> Html:
    """A list of what was run, as run.json has it."""
    request = run.request
    rows: list[tuple[str, str]] = [
        ("command", element("code", f"steerlens {run.command}")),
        ("model", _model(request.get("model"))),
        ("hooks", _hooks(request.get("hook_names"))),
        *((name.replace("_", " "), _data(request[name])) for name in _DATA if request.get(name)),
        ("settings", _pairs((k, v) for k, v in request.items() if k not in _ELSEWHERE)),
        ("cost", _cost(run)),
        ("finished", str(run.record["finished"]).replace("T", " ").replace("+00:00", " UTC")),
        ("machine", _pairs(run.record["machine"].items())),
        ("files", joined(*(element("code", name) for name in run.record["files"]), by=", ")),
        ("versions", _pairs(run.record["versions"].items())),
    ]
    listed = (joined(element("dt", name), element("dd", value)) for name, value in rows)
    return joined(element("dl", *listed, class_="facts"), _attrs(run))


def _model(model: Any) -> Html:
    if not isinstance(model, Mapping):
        return Html("")
    # Versions have a line of their own.
    left_out = ("name", "transformer_lens", "transformers", "torch")
    rest = _pairs(
        (name, _short(str(value)) if name == "file_hash" else value)
        for name, value in model.items()
        if name not in left_out
    )
    return joined(element("b", str(model.get("name"))), "; ", rest)


def _hooks(names: Any) -> str:
    """Hook names in a line: layers where all of them are block outputs."""
    if not isinstance(names, Sequence) or isinstance(names, str):
        return _text(names)
    listed = ", ".join(map(str, names))
    try:
        layers = [hook_layer(str(name)) for name in names]
    except HookError:
        return listed
    if len(names) < 3 or list(names) != [resid_post(layer) for layer in layers]:
        return listed
    return f"block outputs (hook_resid_post) of layers {_ranges(layers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers with runs of three or more written as ranges: 0-4, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [
        f"{run[0]}\N{EN DASH}{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))
        for run in runs
    ]
    return ", ".join(parts)


def _data(data: Any) -> str:
    if not isinstance(data, Mapping):
        return _text(data)
    if "name" not in data:
        return "; ".join(_data(value) for value in data.values())
    size = next((f"{v} {k.removeprefix('n_')}" for k, v in data.items() if k[:2] == "n_"), "")
    return f"{data['name']}, {size}, fingerprint {_short(str(data.get('fingerprint')))}"


def _short(text: str) -> str:
    """A hash by its first digits; the whole of it is in what the tables carry."""
    is_hash = re.fullmatch(r"[0-9a-f]{20,}", text)
    return f"{text[:12]}\N{HORIZONTAL ELLIPSIS}" if is_hash else text


def _cost(run: Run) -> str:
    seconds = float(run.record["seconds"])
    spent = run.record["forward_equivalents"]
    time = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return time if spent is None else f"{time}, {short(float(spent))} forward-equivalents"


def _pairs(items: Iterable[tuple[str, Any]]) -> Html:
    pairs = (
        joined(f"{name.replace('_', ' ')} ", element("code", _text(v)))
        for name, v in items
        if v is not None
    )
    return joined(*pairs, by="; ")


def _text(value: Any) -> str:
    """A setting in words: lists by commas, objects by name and value."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return short(value)
        case int():
            return signed(str(value))
        case Mapping():
            named = ((str(name).replace("_", " "), _text(of)) for name, of in value.items())
            return ", ".join(f"{name} {_short(of)}" for name, of in named)
        case [*_]:
            return ", ".join(map(_text, value))
    return str(value)


def _attrs(run: Run) -> Html:
    """The attrs of the tables, one record for tables that share it."""
    records: dict[str, list[str]] = {}
    for name, table in run.tables.items():
        text = json.dumps(without_nan(table.attrs), indent=1, ensure_ascii=False)
        records.setdefault(text, []).append(f"{name}.csv")
    shown = [
        joined(element("p", f"{', '.join(names)}:"), element("pre", text))
        for text, names in records.items()
    ]
    return element(
        "details",
        element("summary", "What the tables carry: settings, searched ranges, fingerprints"),
        *shown,
    )
