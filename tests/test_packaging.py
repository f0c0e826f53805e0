"""The wheel holds the shipped data, and README's example runs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".css", ".csv", ".js"}


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
        "import steerlens; from steerlens.data.shipped import shipped_folder\n"
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
    assert found[1:] == ["formality", "honesty", "sentiment", "200", "160"]
    assert (site / "steerlens" / "py.typed").is_file()
    others = {path for path in (ROOT / "steerlens").rglob("*.*") if path.suffix in SUFFIXES}
    assert {path.suffix for path in others} == SUFFIXES
    for path in others:
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


@pytest.mark.real
def test_the_readmes_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "degradation_nats" in shown
    table, texts = shown.splitlines()[:6], shown.splitlines()[6:]
    assert [line.split()[1] for line in table[1:]] == ["15"] * 5
    # What the page says it prints: its table's first and last column, and both texts.
    (printed,) = re.findall(r"```text\n( +layer.*?)```", page, re.DOTALL)
    said = printed.splitlines()
    assert [line.split()[-1] for line in table] == [line.split()[-1] for line in said[:6]]
    assert texts == said[6:]
    assert "vega" in (tmp_path / "tradeoff.html").read_text(encoding="utf-8")
