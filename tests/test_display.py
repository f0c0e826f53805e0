"""Results as a line and as a table in a notebook: what is in it, and that text stays text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlens as sl
from steerlens.measure.comparison import Comparison
from steerlens.measure.equal_damage import CompareSettings
from steerlens.models.hooks import resid_post
from steerlens.steering.coefficients import Calibration
from steerlens.steering.origin import Origin
from steerlens.tables import (
    MAX_COLUMNS,
    MAX_LINE,
    MAX_ROWS,
    fragment,
    hook_label,
    measured,
    shortened,
    to_frame,
)

HOSTILE = "<script>go()</script> harmless <img src=x onerror=go()>"
TAGS = {"div", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """The tags, styles and rows of text of an HTML fragment."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles = ""
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += "".join(f"{value};" for _, value in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data


def shown(result: Any) -> Page:
    """The page of a result, seen to be small, static and without colours of its own."""
    page = Page(result._repr_html_())
    assert page.tags <= TAGS
    assert page.attributes <= {"style"}
    assert "background" not in page.styles
    assert set(re.findall(r"(?<![-\w])color:(\w+)", page.styles)) == {"inherit"}
    assert len(result._repr_html_()) < 20_000
    line = repr(result)
    assert len(line) <= MAX_LINE
    assert line.isprintable()
    assert "tensor" not in line
    assert line in page.text
    return page


# The helper


def test_a_fragment_by_hand() -> None:
    table = pd.DataFrame({"layer": ["3"], "a < b": [1.23456], "n": [7]})
    assert fragment(["x", "model <m>"], table, note="units") == (
        '<div style="color:inherit"><div>x, model &lt;m&gt;</div>'
        '<table style="color:inherit;border-collapse:collapse;text-align:right">'
        '<thead style="border-bottom:1px solid currentColor"><tr>'
        '<th style="text-align:left">layer</th><th style="text-align:right">a &lt; b</th>'
        '<th style="text-align:right">n</th></tr></thead>'
        '<tbody><tr><td style="text-align:left">3</td><td>1.235</td><td>7</td></tr></tbody></table>'
        "<div>units</div></div>"
    )


def test_long_tables_are_thinned_evenly_with_both_ends() -> None:
    table = pd.DataFrame({"layer": [str(i) for i in range(59)]} | {f"c{i}": 0 for i in range(28)})
    page = Page(fragment(["x"], table))
    assert [row[0] for row in page.rows[1:]] == [str(i) for i in range(0, 59, 2)]
    assert page.rows[0] == ["layer", *(f"c{3 * i}" for i in range(10))]
    assert page.text.endswith("30 of 59 rows; 10 of 28 columns")
    small = Page(fragment(["x"], table.iloc[:MAX_ROWS, : MAX_COLUMNS + 1], note="all"))
    assert (len(small.rows), len(small.rows[0])) == (MAX_ROWS + 1, MAX_COLUMNS + 1)
    assert small.text.endswith("all")


@settings(deadline=None)
@given(st.text(), st.integers(2, 60))
def test_shortened_text_is_one_printable_line(text: str, size: int) -> None:
    line = shortened(text, size)
    assert len(line) <= size
    assert line.isprintable()


def test_shortened_text_by_hand() -> None:
    assert shortened("a\n b\x1b[0m", 20) == r"a b\x1b[0m"
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcdefg…"


PARTS = ["<b>", "<img src=x onerror=y>", "</td>", "<!--", "]]>", "&lt;", '"', "'", "a", " "]
TEXT = st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8")).map("".join)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_no_text_becomes_a_tag(caption: list[str], text: str) -> None:
    page = Page(fragment(caption, pd.DataFrame({text: [text]}), note=text))
    assert page.tags == TAGS
    assert page.rows == [[shortened(text)], [shortened(text)]]


def test_a_blocks_output_is_its_layer() -> None:
    assert hook_label("blocks.12.hook_resid_post") == "12"
    assert hook_label("blocks.12.hook_resid_mid") == "blocks.12.hook_resid_mid"
    assert hook_label("blocks.1.hook_resid_post\n") == "blocks.1.hook_resid_post\n"


def test_a_caption_says_what_is_known() -> None:
    attrs = {
        "model": {"name": "tiny"},
        "method": "pca",
        "pairs": "sentiment/test",
        "settings": {"budget": "kl=0.1", "on": "neutral"},
    }
    assert measured(attrs) == [
        *("model tiny", "method pca", "pairs sentiment/test", "text neutral", "budget kl=0.1")
    ]
    assert measured({}) == []


# Results


@pytest.fixture(scope="module")
def swept(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> sl.measure.SweepResult:
    options: dict[str, Any] = {"coefficients": [-500.0, 0.0, 1.0], "budget": "nats=0.0001"}
    return sl.sweep(llama, many, directions, layers="0:3", **options)


def test_a_sweep_is_layers_by_coefficients(swept: sl.measure.SweepResult) -> None:
    page = shown(swept)
    assert page.rows[0] == ["layer", "c = -500", "c = 0", "c = 1"]
    assert [row[0] for row in page.rows[1:]] == ["0", "1", "2"]
    cells = [text for row in page.rows[1:] for text in row[1:]]
    marks = {"yes": "", "no": " !", "undecided": " ?"}
    assert cells[:3] == [
        f"{cell.projection:.4g} ({cell.degradation_nats:+.3f}){marks[cell.coherent]}"
        for cell in swept.table.iloc[:3].itertuples()
    ]
    assert set(swept.table.coherent) == set(marks)
    assert "! beyond the budget, ? undecided" in page.text
    for part in ("3 hooks x 3 coefficients, mean_diff", "model tiny", "pairs", "nats=0.0001"):
        assert part in page.text


def test_a_boundary_has_a_row_a_layer(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    result = sl.find_boundary(llama, many, directions, layers=[1, 3], n_bootstrap=50)
    page = shown(result)
    assert [row[0] for row in page.rows[1:]] == ["1", "3"]
    first = result.layers.iloc[0]
    at = page.rows[0].index("boundary pos")
    assert page.rows[1][at] == f"{first.boundary_pos:.4g}"
    interval = f"{first.boundary_pos_ci_low:.4g} to {first.boundary_pos_ci_high:.4g}"
    assert page.rows[1][at + 1] == interval
    assert "text positive, budget relative=0.01" in page.text
    plane = sl.Study(llama, many, directions, n_bootstrap=50, layers=1).boundary_shape(
        1, n_angles=4
    )
    page = shown(plane)
    assert [row[0] for row in page.rows[1:]] == ["0", "90", "180", "270"]
    assert page.rows[2][1] == f"{plane.table.boundary[1]:.4g}"
    assert "layer 1" in page.text


def test_the_geometry_has_a_row_a_layer(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    result = sl.loss_geometry(llama, many, directions, layers=[1, 3], n_angles=3, n_bootstrap=2)
    page = shown(result)
    assert [row[0] for row in page.rows[1:]] == ["1", "3"]
    first = result.shape[result.shape.layer == 1].boundary
    assert page.rows[1][-2:] == [f"{first.min():.4g}", f"{first.max():.4g}"]


def test_what_is_collected_shows_norms(llama: Any, pairs: sl.ContrastivePairs) -> None:
    differences = sl.collect_differences(llama, pairs, layers=[0, 1])
    page = shown(differences)
    assert page.rows[0] == ["layer", "separation", "resid norm"]
    expected = float(differences[resid_post(1)].norm(dim=-1).mean())
    assert page.rows[2][:2] == ["1", f"{expected:.4g}"]
    assert len(page.rows) == 3  # without the readouts
    gradients = sl.loss_gradients(llama, pairs, layers=[0, 1])
    page = shown(gradients)
    terms = sl.directions.gradient_terms(gradients)
    assert page.rows[0][:3] == ["layer", "loss at", "separation norm"]
    assert page.rows[1][:3] == ["0", "2", f"{terms.separation_norm[0]:.4g}"]


def test_directions_show_their_hooks(llama: Any, pairs: sl.ContrastivePairs) -> None:
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[0, 1]))
    page = shown(fitted)
    assert page.rows[1:] == [["0", "steered"], ["1", "steered"], ["2", "readout"]]
    assert "mean_diff" in page.text
    assert "position -1" in page.text


def comparison(method: str, *, chosen: bool, hook_name: str = resid_post(1)) -> Comparison:
    row = {"method": method, "layer": 1, "verdict": "effect", "effect": 0.5}
    row |= {"layer_choice": "none", "hook_name": hook_name}
    counts: dict[str, Any] = {"n_items": 2, "n_null": 4, "is_chosen": chosen}
    counts |= {"n_groups": 2, "null_by": "exact", "interval_over": "items", "p_layers": 0.01}
    table = to_frame([{**row, **counts}], "comparison", {"pairs": "p"})
    rank = {"rank": 1, "rank_low": 1, "rank_high": 1}
    summary = to_frame([{**row, **rank}] if chosen else [], "summary", {})
    settings = CompareSettings((method,), "kl=0.1", "own", 32, 2, None, 4.0, 2, 0, None)
    methods = to_frame([], "methods", {})
    return Comparison(table, summary, methods, pd.DataFrame({"id": ["a", "b"]}), {}, settings)


def test_a_comparison_shows_the_summary_or_every_row() -> None:
    page = shown(comparison("pca", chosen=True))
    assert repr(comparison("pca", chosen=True)) == "Comparison(1 methods, 1 rows, 2 items, kl=0.1)"
    assert page.rows[0][:3] == ["method", "layer", "verdict"]
    assert dict(zip(*page.rows, strict=True))["rank"] == "1"
    page = shown(comparison("pca", chosen=False))
    assert dict(zip(*page.rows, strict=True))["p layers"] == "0.01"
    head = "blocks.1.attn.hook_z[2]"
    for chosen in (True, False):
        page = shown(comparison("pca", chosen=chosen, hook_name=head))
        assert [row[1] for row in page.rows] == ["hook", head]


# Hostile text


def hostile_vector(directions: sl.Directions) -> sl.SteeringVector:
    vector = sl.SteeringVector.from_vectors({HOOK: torch.ones(4)})
    origin = Origin(model=HOSTILE, dataset=HOSTILE, method=HOSTILE)
    calibration = Calibration(*[torch.ones(1)] * 3, budget=HOSTILE, text=HOSTILE)
    return replace(vector, origin=origin, calibration=calibration)


HOOK = f"blocks.1.{HOSTILE}"


def with_attrs(result: Any, name: str) -> Any:
    table = getattr(result, name).copy()
    table.attrs |= {"model": {"name": HOSTILE}, "pairs": HOSTILE, "method": HOSTILE}
    table["hook_name"] = HOOK
    return replace(result, **{name: table})


def test_hostile_names_stay_text(
    swept: sl.measure.SweepResult, llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    boundary = sl.find_boundary(llama, many, directions, layers=[1], n_bootstrap=2)
    shape = sl.Study(llama, many, directions, n_bootstrap=2, layers=1).boundary_shape(1, n_angles=3)
    differences = sl.collect_differences(llama, many, layers=[1])
    gradients = sl.loss_gradients(llama, many, layers=[1])
    one = directions.vectors[:1]
    results = [
        with_attrs(swept, "table"),
        with_attrs(boundary, "layers"),
        with_attrs(shape, "table"),
        comparison(HOSTILE, chosen=True),
        hostile_vector(directions),
        sl.Directions((HOOK,), (), one, HOSTILE, -1, 0, HOSTILE),
        replace(differences, hook_names=(HOOK,), fingerprint=HOSTILE),
        replace(gradients, hook_names=(HOOK,), loss_hooks=(HOOK,) * 2, fingerprint=HOSTILE),
    ]
    for result in results:
        assert "<script>" in shown(result).text, type(result)  # no tag but those of a table
        source = result._repr_html_()
        assert "<script" not in source
        assert "<img" not in source
        # Of what is too long for a table the beginning is there.
        assert "&lt;script&gt;go()&lt;/script&gt; harmless" in source, type(result)


def test_long_names_leave_a_short_line() -> None:
    long = "a\n" * 300
    vector = sl.SteeringVector.from_vectors(
        {f"blocks.{i}.{long}": torch.ones(4) for i in range(1)},
        origin=Origin(method=long, dataset=long),
    )
    shown(vector)
    shown(sl.Directions(("x",), (), torch.eye(1, 4), long, -1, 0, ""))
    assert "…" in repr(vector)
