"""Figures with plotly: hover, zoom, a legend to click, a slider over frames."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

from steerlens.plots.marks import (
    Arrows,
    Axis,
    Band,
    Contours,
    Frame,
    HeatMap,
    Layout,
    Line,
    Mark,
    Panel,
    Points,
    Rule,
)

SCALES = {"sequential": "Cividis", "diverging": "RdBu_r"}
SYMBOLS = {
    "circle": "circle",
    "circle-open": "circle-open",
    "x": "x-thin-open",
    "diamond": "diamond",
    "triangle-up": "triangle-up",
    "triangle-down": "triangle-down",
}


def draw(title: str, frames: Sequence[Frame], layout: Layout) -> Any:
    """A plotly figure: every frame's marks as traces, those of the first shown."""
    from plotly.subplots import make_subplots

    n_panels = len(frames[0].panels)
    rows = math.ceil(n_panels / layout.columns)
    height = layout.height * rows + 90 + 70 * (len(frames) > 1)
    width = layout.width * layout.columns
    has_bars = any(
        isinstance(mark, (HeatMap, Contours)) for panel in frames[0].panels for mark in panel.marks
    )
    # Between panels: an axis with its title, and a colour bar with its own, in pixels.
    figure = make_subplots(
        rows=rows,
        cols=layout.columns,
        subplot_titles=[_text(panel.title) or " " for panel in frames[0].panels],
        horizontal_spacing=(150 if has_bars else 80) / width,
        vertical_spacing=100 / height,
    )
    places = [(i // layout.columns + 1, i % layout.columns + 1) for i in range(n_panels)]
    owners: list[int] = []
    for number, frame in enumerate(frames):
        seen: set[str] = set()
        for panel, (row, column) in zip(frame.panels, places, strict=True):
            domain = _domain(figure, row, column)
            for trace in _traces(panel, domain, seen):
                trace.visible = number == 0
                figure.add_trace(trace, row=row, col=column)
                owners.append(number)
    figure.update_layout(
        title={"text": _text(title), "x": 0, "xref": "paper", "font": {"size": 17}},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12},
        height=height,
        width=width,
        margin={"l": 60, "r": 20, "t": 80, "b": 60},
        legend={"itemsizing": "constant", "tracegroupgap": 0},
        hoverlabel={"align": "left"},
        **_panel_layout(frames[0], figure),
    )
    if len(frames) > 1:
        figure.update_layout(sliders=[_slider(frames, owners, layout, figure)])
    return figure


def _slider(frames: Sequence[Frame], owners: list[int], layout: Layout, figure: Any) -> Any:
    steps = [
        {
            "label": _text(frame.label),
            "method": "update",
            "args": [
                {"visible": [owner == number for owner in owners]},
                _flat(_panel_layout(frame, figure)),
            ],
        }
        for number, frame in enumerate(frames)
    ]
    return {
        "active": 0,
        "steps": steps,
        "currentvalue": {"prefix": f"{_text(layout.slider)} "},
        "pad": {"t": 45},
        "len": 0.98,
    }


def _panel_layout(frame: Frame, figure: Any) -> dict[str, Any]:
    """Axes, rules and titles of a frame's panels, as plotly's layout has them."""
    changed: dict[str, Any] = {"shapes": []}
    labels: list[dict[str, Any]] = []
    titles = [dict(one.to_plotly_json()) for one in figure.layout.annotations][: len(frame.panels)]
    for i, panel in enumerate(frame.panels):
        end = "" if i == 0 else str(i + 1)
        changed[f"xaxis{end}"] = _axis(panel.x, panel, "x")
        changed[f"yaxis{end}"] = _axis(panel.y, panel, "y")
        if panel.square:
            changed[f"yaxis{end}"] |= {"scaleanchor": f"x{end}", "scaleratio": 1}
        titles[i]["text"] = _text(panel.title) or " "
        for rule in (mark for mark in panel.marks if isinstance(mark, Rule)):
            changed["shapes"].append(_shape(rule, end))
            if rule.name:
                labels.append(_rule_label(rule, end))
    return {**changed, "annotations": titles + labels}


def _axis(axis: Axis, panel: Panel, which: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "title": {"text": _text(axis.title)},
        "visible": axis.shown,
        "automargin": True,
        "zeroline": True,
    }
    if axis.whole:
        made["tickformat"] = "d"
    if axis.reach is None:
        made["autorange"] = True
    else:
        made |= {"range": _numbers(axis.reach), "autorange": False}
    is_category = any(
        isinstance(mark, HeatMap)
        or (isinstance(mark, Points) and any(isinstance(v, str) for v in getattr(mark, which)))
        for mark in panel.marks
    )
    if is_category:
        made |= {"type": "category", "nticks": 16}
    return made


def _flat(layout: dict[str, Any]) -> dict[str, Any]:
    """Axis settings key by key, so that a slider's step leaves all others (zoom's mode) alone."""
    flat: dict[str, Any] = {}
    for name, value in layout.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                flat[f"{name}.{key}"] = inner
        else:
            flat[name] = value
    return flat


def _shape(rule: Rule, end: str) -> dict[str, Any]:
    line = {"color": rule.color, "dash": rule.dash, "width": 1.2}
    if rule.axis == "x":
        places = {"xref": f"x{end}", "yref": f"y{end} domain", "x0": rule.at, "x1": rule.at}
        return {**places, "type": "line", "y0": 0, "y1": 1, "line": line}
    places = {"yref": f"y{end}", "xref": f"x{end} domain", "y0": rule.at, "y1": rule.at}
    return {**places, "type": "line", "x0": 0, "x1": 1, "line": line}


def _rule_label(rule: Rule, end: str) -> dict[str, Any]:
    made = {
        "text": _text(rule.name),
        "showarrow": False,
        "font": {"size": 10, "color": rule.color},
    }
    if rule.axis == "x":
        place = {"xref": f"x{end}", "yref": f"y{end} domain", "x": rule.at, "y": 1}
        return {**made, **place, "xanchor": "left", "yanchor": "top"}
    place = {"yref": f"y{end}", "xref": f"x{end} domain", "y": rule.at, "x": 1}
    return {**made, **place, "xanchor": "right", "yanchor": "bottom"}


def _domain(figure: Any, row: int, column: int) -> tuple[tuple[float, float], tuple[float, float]]:
    plot = figure.get_subplot(row, column)
    return tuple(plot.xaxis.domain), tuple(plot.yaxis.domain)


def _traces(
    panel: Panel, domain: tuple[tuple[float, float], tuple[float, float]], seen: set[str]
) -> Iterator[Any]:
    for mark in panel.marks:
        name = getattr(mark, "name", "")
        is_new = bool(name) and name not in seen and not isinstance(mark, Band)
        for i, trace in enumerate(_of_mark(mark, domain)):
            if name:
                trace.legendgroup = trace.name = _text(name)
            if "showlegend" in trace:
                trace.showlegend = is_new and i == 0
            yield trace
        seen |= {name} if is_new else set()


def _of_mark(mark: Mark, domain: tuple[tuple[float, float], tuple[float, float]]) -> Iterator[Any]:
    import plotly.graph_objects as go

    if isinstance(mark, Line):
        yield go.Scatter(
            x=_numbers(mark.x),
            y=_numbers(mark.y),
            mode="lines",
            line={"color": mark.color, "dash": mark.dash, "width": mark.width},
            connectgaps=False,
            **_hover(mark.hover),
        )
    elif isinstance(mark, Band):
        for x, low, high in _runs(mark):
            yield go.Scatter(
                x=[*x, *x[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                fillcolor=_faint(mark.color),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
            )
    elif isinstance(mark, Points):
        yield _points(mark)
    elif isinstance(mark, Arrows):
        yield _arrows(mark)
    elif isinstance(mark, HeatMap):
        yield _heat_map(mark, domain)
    elif isinstance(mark, Contours):
        yield _contours(mark, domain)


def _points(mark: Points) -> Any:
    import plotly.graph_objects as go

    given: dict[str, Any] = {}
    if mark.low:
        at = mark.x if mark.interval == "x" else mark.y
        centre = [float(value) for value in at]
        given[f"error_{mark.interval}"] = {
            "type": "data",
            "symmetric": False,
            "array": _numbers([high - c for high, c in zip(mark.high, centre, strict=True)]),
            "arrayminus": _numbers([c - low for low, c in zip(mark.low, centre, strict=True)]),
            "thickness": mark.bar,
            "width": 0 if mark.bar > 2 else 3,
        }
    if mark.labels:
        given |= {"text": [_text(label) for label in mark.labels], "textposition": "top center"}
    else:
        given |= _hover(mark.hover)
    return go.Scatter(
        x=_places(mark.x),
        y=_places(mark.y),
        mode="markers+text" if mark.labels else "markers",
        marker={
            "color": mark.color,
            "size": mark.size,
            "symbol": SYMBOLS[mark.symbol],
            "line": {"color": mark.color, "width": 1.4 if mark.symbol != "circle" else 0},
        },
        **given,
    )


def _arrows(mark: Arrows) -> Any:
    import plotly.graph_objects as go

    x: list[float | None] = []
    y: list[float | None] = []
    for x0, y0, dx, dy in zip(mark.x, mark.y, mark.dx, mark.dy, strict=True):
        x += [*_numbers((x0, x0 + dx)), None]
        y += [*_numbers((y0, y0 + dy)), None]
    hover = [text for text in mark.hover for _ in range(3)]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": mark.color, "width": 1.4},
        marker={
            "symbol": "arrow",
            "angleref": "previous",
            "size": [0, 8, 0] * len(mark.x),
            "color": mark.color,
            "opacity": 1,
        },
        **_hover(tuple(hover)),
    )


def _heat_map(mark: HeatMap, domain: tuple[tuple[float, float], tuple[float, float]]) -> Any:
    import plotly.graph_objects as go

    reach = mark.reach or _reach(mark)
    return go.Heatmap(
        z=[_numbers(row) for row in mark.z],
        x=[_text(label) for label in mark.x],
        y=[_text(label) for label in mark.y],
        colorscale=SCALES[mark.scale],
        zmin=reach[0],
        zmax=reach[1],
        hovertemplate="%{y}, %{x}: %{z:.4g}<extra></extra>",
        **_colorbar(mark.unit, domain),
    )


def _contours(mark: Contours, domain: tuple[tuple[float, float], tuple[float, float]]) -> Any:
    import plotly.graph_objects as go

    levels = _numbers(mark.levels)
    return go.Contour(
        z=[_numbers(row) for row in mark.z],
        x=_numbers(mark.x),
        y=_numbers(mark.y),
        colorscale=SCALES["sequential"],
        reversescale=False,
        zmin=levels[0],
        zmax=levels[-1],
        contours={"start": levels[0], "end": levels[-1], "size": mark.levels[1] - mark.levels[0]},
        line={"width": 0.6, "color": "rgba(255,255,255,0.55)"},
        opacity=0.75,
        hovertemplate="(%{x:.3g}, %{y:.3g}): %{z:.4g}<extra></extra>",
        **_colorbar(mark.unit, domain),
    )


def _colorbar(unit: str, domain: tuple[tuple[float, float], tuple[float, float]]) -> dict[str, Any]:
    (_, right), (bottom, top) = domain
    return {
        "colorbar": {
            "x": right + 0.004,
            "xanchor": "left",
            "y": (bottom + top) / 2,
            "len": (top - bottom) * 0.98,
            "thickness": 10,
            "title": {"text": _text(unit), "side": "right", "font": {"size": 11}},
        }
    }


def _reach(mark: HeatMap) -> tuple[float, float]:
    values = [value for row in mark.z for value in row if math.isfinite(value)] or [0.0]
    if mark.scale == "sequential":
        return min(values), max(values)
    largest = max(abs(value) for value in values)
    return -largest, largest


def _runs(mark: Band) -> Iterator[tuple[list[float], list[float], list[float]]]:
    """The band's pieces between gaps."""
    run: tuple[list[float], list[float], list[float]] = ([], [], [])
    for x, low, high in zip(mark.x, mark.low, mark.high, strict=True):
        if all(map(math.isfinite, (x, low, high))):
            for values, value in zip(run, (x, low, high), strict=True):
                values.append(_short(value))
        elif run[0]:
            yield run
            run = ([], [], [])
    if run[0]:
        yield run


def _hover(texts: Sequence[str]) -> dict[str, Any]:
    # Texts may come from prompts: no template, which would look for %{...} in them.
    return {"text": [_text(text) for text in texts], "hoverinfo": "text"} if texts else {}


def _text(text: str) -> str:
    """Text that plotly shows as it is: it reads tags such as <b> and <a>, and entities."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _places(values: Sequence[float | int] | Sequence[str]) -> list[Any]:
    return [
        _text(v) if isinstance(v, str) else v for v in values if isinstance(v, str)
    ] or _numbers([float(v) for v in values])


def _numbers(values: Sequence[float | int]) -> list[float | None]:
    return [_short(value) if math.isfinite(value) else None for value in values]


def _short(value: float | int) -> float:
    """Five figures: more cannot be seen, and make the page larger."""
    return float(f"{value:.5g}")


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
