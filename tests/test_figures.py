"""Figures as they are drawn: files, pages, charts of Altair, notebooks."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

import base64
import io
import json
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import altair as alt
import pandas as pd
import pytest
from test_plots import (
    HOSTILE,
    comparison,
    edges,
    figures,
    geometry,
    history,
    layers,
    parts,
    points,
    rows,
    sweep,
)

from steerlens import plots
from steerlens.errors import FileError, InputError

# How it is drawn


def test_every_figure_is_drawn(figures: dict[str, plots.Figure]) -> None:
    for name, figure in figures.items():
        png = figure.to_bytes("png")
        assert png[:8] == b"\x89PNG\r\n\x1a\n", name
        width, height = struct.unpack(">II", png[16:24])
        assert width > 600, name
        assert height > 200, name
        assert ET.fromstring(figure.to_bytes("svg")).tag.endswith("svg"), name
        assert figure.to_bytes("pdf").startswith(b"%PDF"), name
        assert len(figure.to_html()) < 1_000_000, name
        params = {param["name"]: param for param in figure.spec.get("params", [])}
        has_slider = "bind" in params.get("frame", {})
        assert has_slider == (len(figure.frames) > 1), name
        assert figure.caption.endswith("."), name
        assert "\n" not in repr(figure), name


def test_a_slider_shows_one_frame_at_a_time(points: pd.DataFrame) -> None:
    spec = plots.differences(points).spec
    (frame,) = (param for param in spec["params"] if param["name"] == "frame")
    assert frame["bind"]["options"] == ["0", "blocks.1.hook_mlp_out"]
    assert frame["value"] == "0"
    for layer in spec["layer"]:
        assert {"filter": "datum.frame === frame"} in layer["transform"]


def test_charts_are_altairs_own(figures: dict[str, plots.Figure]) -> None:
    """Altair checks them against the schema of Vega-Lite, and draws them."""
    for name, figure in figures.items():
        out = io.StringIO()
        figure.chart.save(out, format="svg")
        assert figure.title in list(ET.fromstring(out.getvalue()).itertext()), name


def test_charts_are_restyled_and_combined(points: pd.DataFrame, sweep: pd.DataFrame) -> None:
    chart = plots.tradeoff(sweep).chart
    both = alt.hconcat(chart, plots.differences(points).chart).configure_axis(grid=False)
    with io.BytesIO() as out:
        both.save(out, format="png")
        assert out.getvalue()[:4] == b"\x89PNG"
    title = chart.properties(title="Mine").to_dict()["title"]
    assert title == "Mine" != plots.tradeoff(sweep).spec["title"]


def test_the_same_tables_give_the_same_bytes(sweep: pd.DataFrame) -> None:
    for kind in ("png", "svg"):
        first = plots.heat_maps(sweep).to_bytes(kind)
        plots.tradeoff(sweep).to_bytes(kind)
        assert plots.heat_maps(sweep).to_bytes(kind) == first
    assert plots.tradeoff(sweep).to_html() == plots.tradeoff(sweep).to_html()


def test_text_of_prompts_stays_text(points: pd.DataFrame) -> None:
    figure = plots.differences(points.assign(pair=HOSTILE))
    assert rows(figure, "places").pair[0] == HOSTILE  # the control
    page = figure.to_html()
    assert "onerror=alert(1)" in page
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script ")
    titled = replace(figure, title=HOSTILE, spec={**figure.spec, "title": HOSTILE})
    assert "<img" not in titled.to_html()
    assert HOSTILE in list(ET.fromstring(titled.to_bytes("svg")).itertext())


def test_frames_and_files(points: pd.DataFrame, tmp_path: Path) -> None:
    figure = plots.differences(points)
    last = figure.at("blocks.1.hook_mlp_out")
    assert figure.at(0) == figure.at("0") != last
    assert last.frames == ("blocks.1.hook_mlp_out",)
    assert rows(last, "places").frame.unique().tolist() == ["blocks.1.hook_mlp_out"]
    assert last.to_bytes("svg")
    with pytest.raises(InputError, match="no frame '7'"):
        figure.at("7")
    for name in ("a.png", "a.svg", "a.pdf", "a.html"):
        figure.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf, \.html"):
        figure.save(tmp_path / "a.gif")
    with pytest.raises(InputError, match="expected the kind png"):
        figure.to_bytes("html")
    with pytest.raises(FileError, match="cannot write"):
        figure.save(tmp_path / "none" / "a.png")


def test_a_notebook_gets_a_chart_and_a_picture(sweep: pd.DataFrame) -> None:
    shown = plots.tradeoff(sweep)._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"])[:4] == b"\x89PNG"
    assert json.loads(json.dumps(shown["application/vnd.vegalite.v6+json"]))["datasets"]
    assert len(json.dumps(shown)) < 200_000
    assert shown["text/plain"] == "Figure('Projection against degradation', 1 panels)"
