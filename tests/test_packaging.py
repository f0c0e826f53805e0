"""The wheel holds the shipped data, and README's example runs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from steerlens.tables import (
    BOUNDARY_COLUMNS,
    CIRCUIT_COLUMNS,
    CLAIM_COLUMNS,
    COMPARISON_COLUMNS,
    CONTOUR_COLUMNS,
    COSINE_COLUMNS,
    EDGE_COLUMNS,
    FAITHFULNESS_COLUMNS,
    GENERATION_COLUMNS,
    GEOMETRY_COLUMNS,
    GRADIENT_COLUMNS,
    LAYER_COLUMNS,
    POINT_COLUMNS,
    READER_COLUMNS,
    RELIABILITY_COLUMNS,
    SHAPE_COLUMNS,
    SUMMARY_COLUMNS,
    SWEEP_COLUMNS,
    TOKEN_COLUMNS,
    WRITER_COLUMNS,
    WRITER_POSITION_COLUMNS,
    Column,
)

ROOT = Path(__file__).resolve().parent.parent


def test_data_is_found_after_a_plain_wheel_install(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import steerlens; from steerlens.data import shipped_folder\n"
        "print(shipped_folder(), *steerlens.dataset_names(), len(steerlens.neutral_texts()),"
        " len(steerlens.ContrastivePairs.load('honesty', split='test')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
    ).stdout.split()
    assert found[0] == str(site / "steerlens" / "shipped")
    assert found[1:] == ["formality", "honesty", "sentiment", "200", "100"]
    assert (site / "steerlens" / "py.typed").is_file()
    for name in ("report/page.css", "report/page.js", "plots/vega.js", "plots/loader.js"):
        assert (site / "steerlens" / name).read_bytes() == (ROOT / "steerlens" / name).read_bytes()


@pytest.mark.parametrize(
    "column",
    [
        *(SWEEP_COLUMNS + LAYER_COLUMNS + BOUNDARY_COLUMNS + SHAPE_COLUMNS),
        *(COMPARISON_COLUMNS + SUMMARY_COLUMNS + RELIABILITY_COLUMNS + GRADIENT_COLUMNS),
        *(COSINE_COLUMNS + WRITER_COLUMNS + WRITER_POSITION_COLUMNS + READER_COLUMNS),
        *(CLAIM_COLUMNS + CIRCUIT_COLUMNS + FAITHFULNESS_COLUMNS),
        *(POINT_COLUMNS + GEOMETRY_COLUMNS + CONTOUR_COLUMNS + EDGE_COLUMNS),
        *(TOKEN_COLUMNS + GENERATION_COLUMNS),
    ],
    ids=lambda c: c.name,
)
def test_every_column_is_explained_in_the_docs(column: Column) -> None:
    meaning = column.meaning.replace("|", "&#124;")
    row = f"| `{column.name}` | {column.unit} | {meaning} |"
    assert row in (ROOT / "docs" / "columns.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.real
def test_the_readmes_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "degradation_nats" in shown
    assert shown.count("How was your day? It was") == 2
    assert "packed-vega" in (tmp_path / "tradeoff.html").read_text(encoding="utf-8")
