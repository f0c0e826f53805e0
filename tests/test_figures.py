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
from run_folders import write_sweep
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

import steerlens as sl
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
    """Altair checks them against the schema of Vega-Lite; what it draws is in the next test."""
    for name, figure in figures.items():
        assert figure.chart.to_dict()["title"]["text"] == figure.title, name


def test_charts_are_restyled_and_combined(points: pd.DataFrame, sweep: pd.DataFrame) -> None:
    chart = plots.tradeoff(sweep).chart
    both = alt.hconcat(chart, plots.differences(points).chart).configure_axis(grid=False)
    with io.BytesIO() as out:
        both.save(out, format="png")
        assert out.getvalue()[:4] == b"\x89PNG"
    with io.StringIO() as svg:
        chart.save(svg, format="svg")
        assert plots.tradeoff(sweep).title in list(ET.fromstring(svg.getvalue()).itertext())
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


def test_figures_of_a_paper_have_its_width(
    figures: dict[str, plots.Figure], tmp_path: Path
) -> None:
    for figure in figures.values():
        figure.save(tmp_path / "a.svg", width="column")
        drawn = ET.parse(tmp_path / "a.svg").getroot()
        assert drawn.attrib["width"].endswith("pt")
        assert float(drawn.attrib["width"][:-2]) == pytest.approx(238, abs=2), figure
        assert figure.title not in list(drawn.itertext())
    figure.save(tmp_path / "a.png", width="page", dpi=100)
    (pixels,) = struct.unpack(">I", (tmp_path / "a.png").read_bytes()[16:20])
    assert pixels / 100 == pytest.approx(490 / 72, abs=0.03)
    with pytest.raises(InputError, match="column or page"):
        figure.save(tmp_path / "a.pdf", width="wide")
    with pytest.raises(InputError, match="fits its window"):
        figure.save(tmp_path / "a.html", width="page")


def test_layers_of_a_figure(sweep: pd.DataFrame, points: pd.DataFrame) -> None:
    other = "blocks.1.hook_mlp_out"
    for draw in (plots.tradeoff, plots.heat_maps, plots.dose_response):
        figure = draw(sweep).layers([other])
        assert set(rows(figure, "cells").layer) == {other}
        (picked,) = (p for p in figure.spec["params"] if p["name"] == "picked")
        assert picked["value"] == [{"layer": other}]
        assert picked["bind"]["options"] == [None, other]
        assert figure.to_bytes("svg", width="page")
    (maps, *_) = plots.heat_maps(sweep).layers([0]).spec["concat"]
    assert maps["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["0"]
    with pytest.raises(InputError, match="no layer 7; it has 0, blocks"):
        plots.tradeoff(sweep).layers([7])
    started = plots.differences(points).starting_at(other)
    assert started.frames == ("0", other)
    assert [p["value"] for p in started.spec["params"] if p["name"] == "frame"] == [other]


def test_the_figures_of_a_run_are_saved_at_once(tmp_path: Path) -> None:
    run = write_sweep(tmp_path / "run")
    saved = sl.runs.save_figures(run, tmp_path / "all", kind="svg")
    assert [path.stem for path in saved] == [
        *("projection-against-degradation", "every-cell", "dose-and-response"),
        *("layer-by-layer-unsteered", "differences-of-the-pairs"),
    ]
    assert all(path.stat().st_size > 1000 for path in saved)
    # Layer 12 is pushed furthest, so it is what a slider starts at.
    assert (
        "12"
        in sl.runs.html_report.figures.figures_of(sl.read_run(run))[4].spec["params"][-1]["value"]
    )
    few = sl.runs.save_figures(run, tmp_path / "few", kind="svg", layers=[5, 15])
    assert [path.stem for path in few[-2:]] == [
        f"differences-of-the-pairs-{layer}" for layer in (5, 15)
    ]
    with pytest.raises(InputError, match=r"no figure of .* has the layers 99"):
        sl.runs.save_figures(run, tmp_path / "none", layers=[99])


def test_a_notebook_gets_a_chart_and_a_picture(sweep: pd.DataFrame) -> None:
    shown = plots.tradeoff(sweep)._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"])[:4] == b"\x89PNG"
    assert json.loads(json.dumps(shown["application/vnd.vegalite.v6+json"]))["datasets"]
    assert len(json.dumps(shown)) < 200_000
    assert shown["text/plain"] == "Figure('Projection against degradation', 1 panels)"
