"""The wheel holds the shipped data and works elsewhere, and what a code host reads is right."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_tokenizer
from planted import item_records, pair_records, planted_weights

import steerlens as sl

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".css", ".csv", ".js", ".json"}
# Set by `make dist`: the command where nothing but the wheel and what it asks for is installed.
INSTALLED = os.environ.get("STEERLENS_INSTALLED")


def test_data_is_found_after_a_plain_wheel_install(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    sdist = tmp_path / f"steerlens-{sl.__version__}.tar.gz"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(sdist)],
        check=True,
    )
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / f"steerlens-{sl.__version__}-py3-none-any.whl") as archive:
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


@pytest.mark.skipif(INSTALLED is None, reason="`make dist` runs it")
def test_an_installed_wheel_recommends_away_from_the_repository(tmp_path: Path) -> None:
    assert INSTALLED is not None
    planted_weights().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    for name, records in (("pairs", pair_records()), ("items", item_records())):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))

    def run(*words: str) -> str:
        bare = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [INSTALLED, *words], check=True, capture_output=True, text=True, cwd=tmp_path, env=bare
        )
        return done.stdout

    assert run("--version") == f"steerlens {sl.__version__}\n"
    data = ["--pairs", "pairs.jsonl", "--items", "items.jsonl"]
    said = run("recommend", "--model", "model", *data, "--layers", "2,3", "--out", "runs/mine")
    assert "positive: layer 3, coefficient +" in said
    assert (tmp_path / "runs" / "mine" / "vector.safetensors").is_file()


def _loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_workflows_call_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(phony.split()) == targets
    called: set[str] = set()
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    for path in workflows:
        for job in _loaded(path)["jobs"].values():
            named = job["strategy"]["matrix"].get("target", [])
            lines = [step["run"] for step in job["steps"] if "run" in step]
            makes = [line.split()[1] for line in lines if line.startswith("make ")]
            assert makes, path
            called |= {*named, *(name for name in makes if name != "${{")}
    assert {"lint", "types", "unit", "docs", "dist", "test-pythons"} <= called <= targets


def test_issue_forms_have_what_a_form_needs() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) > 1
    for path in forms:
        form = _loaded(path)
        if path.name == "config.yml":
            assert form["blank_issues_enabled"] is True
            continue
        assert min(len(form["name"]), len(form["description"])) > 0
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields) > 0
        assert all(field["attributes"]["label"] for field in form["body"])
        assert {field["type"] for field in form["body"]} <= {"input", "textarea"}


def test_the_version_is_one() -> None:
    cited = _loaded(ROOT / "CITATION.cff")
    assert (cited["version"], cited["license"]) == (sl.__version__, "MIT")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changes, flags=re.MULTILINE)
    assert headings == [f"{sl.__version__} ({cited['date-released']})", "0.1.0 (2026-11-27)"]


@pytest.mark.real
def test_the_readmes_example_prints_what_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```python.*?```\n\n```text\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said == printed
    _, *texts = re.split(r"^(?:-80%|0|80%):", said, flags=re.MULTILINE)
    assert len({*texts}) == 3
