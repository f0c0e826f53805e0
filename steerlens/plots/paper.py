"""Figures for a paper: at the width of a column or page, in small type; a choice of layers."""

import json
import re
from collections.abc import Sequence
from typing import Any

from steerlens.errors import InputError
from steerlens.files import packaged
from steerlens.plots.style import Spec

WIDTHS = {"column": 238.0, "page": 490.0}
"""Points: of a column (3.3 inches) and of both (6.8)."""
DPI = 300
LEAST = 60.0
"""Points that a panel is wide at least."""
_CONFIG: Spec = json.loads(packaged("plots", "paper.json"))
_THINNER = {"size": 0.4, "strokeWidth": 0.6}
"""Of a mark on paper, as a share of what it is on a screen."""


def on_paper(spec: Spec, width: str) -> Spec:
    """The chart at the width of a paper, in points, without its title. Raises `InputError`."""
    if width not in WIDTHS:
        raise InputError(f"expected the width {' or '.join(WIDTHS)}, got {width!r}")
    panels = spec.get("concat", [spec])
    columns = 1 if width == "column" else min(spec.get("columns", 1), len(panels))
    wide = WIDTHS[width] / columns - 45
    for _ in range(3):  # what stands beside the panels hangs on their ticks, so on their width
        made = _resized(spec, columns, wide)
        wide = max(LEAST, wide + (WIDTHS[width] - _width_of(made)) / columns)
    return _resized(spec, columns, wide)


def _resized(spec: Spec, columns: int, wide: float) -> Spec:
    """The chart with panels so wide; their shape is kept, but rows stay high enough to read."""
    config = {**spec["config"]}
    for part, options in _CONFIG.items():
        config[part] = {**config.get(part, {}), **options} if isinstance(options, dict) else options
    panels = [
        {**panel, "layer": [{**mark, "mark": _thinner(mark["mark"])} for mark in panel["layer"]]}
        | {"width": wide, "height": max(panel["height"] * wide / panel["width"], least)}
        for panel in spec.get("concat", [spec])
        for least in [0.4 * panel["height"]]
    ]
    whole = {key: of for key, of in spec.items() if key != "title"} | {"config": config}
    if "concat" not in spec:
        return whole | {key: panels[0][key] for key in ("layer", "width", "height")}
    return whole | {"concat": panels, "columns": columns}


def _thinner(mark: Any) -> Any:
    if not isinstance(mark, dict):
        return mark
    return {
        key: of * _THINNER[key] if key in _THINNER else _thinner(of) for key, of in mark.items()
    }


def _width_of(spec: Spec) -> float:
    import vl_convert

    (width,) = re.findall(r'^<svg [^>]*?\bwidth="([\d.]+)"', vl_convert.vegalite_to_svg(spec))
    return float(width)


def layers_of(spec: Spec) -> dict[str, None]:
    """The layers that a chart has rows of, in their order."""
    return {
        str(row["layer"]): None
        for rows in spec["datasets"].values()
        for row in rows
        if "layer" in row
    }


def with_layers(spec: Spec, labels: Sequence[str]) -> Spec:
    """The chart with these layers alone, which all stand out; `InputError` without one of them."""
    tables: dict[str, list[dict[str, Any]]] = spec["datasets"]
    known = layers_of(spec)
    if missing := [label for label in labels if label not in known]:
        shown = ", ".join(known) or "none"
        raise InputError(f"the figure has no layer {', '.join(missing)}; it has {shown}")
    kept = {
        name: [
            row | ({"stands_out": True} if "stands_out" in row else {})
            for row in rows
            if str(row.get("layer", labels[0])) in labels
        ]
        for name, rows in tables.items()
    }
    numbers = sorted({row["number"] for rows in kept.values() for row in rows if "number" in row})
    without_rows = {key: of for key, of in spec.items() if key != "datasets"}
    return {**_narrowed(without_rows, {*known}, labels, numbers), "datasets": kept}


def _narrowed(piece: Any, known: set[str], labels: Sequence[str], numbers: Sequence[int]) -> Any:
    """The specification with axes, the bar of colours and the list of these layers alone."""
    if isinstance(piece, list):
        return [_narrowed(part, known, labels, numbers) for part in piece]
    if not isinstance(piece, dict):
        return piece
    made = {key: _narrowed(of, known, labels, numbers) for key, of in piece.items()}
    match piece:
        case {"domain": [str(), *_] as domain} if {*domain} <= known:
            made["domain"] = [label for label in domain if label in labels]
        case {"title": "layer", "values": [*_]}:
            made["values"] = numbers
        case {"name": "picked", "bind": {"options": options} as bind}:
            names = [label for label in options if label in labels]
            made["bind"] = bind | {"options": [None, *names], "labels": ["all", *names]}
            if len(names) == 1:
                made["value"] = [{"layer": names[0]}]
    return made
