"""`steerlens report`, and what a run's record says of the warnings given."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import HELD_OUT, Main, assert_error, content, record, table, write_pairs
from run_folders import write_boundary, write_sweep

from steerlens.cli.command import IN_SAMPLE
from steerlens.cli.run_warnings import keeping_warnings, warn, warned

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_a_report_is_written_into_the_first_folder(run: Main, tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / "a"), write_boundary(tmp_path / "b")]
    before = content(folders[0])
    outcome = run("report", *folders)
    assert (outcome.code, outcome.out) == (0, "")
    assert "a/report.html (" in outcome.words
    page = (folders[0] / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "sweep: a" in page
    assert "boundary: b" in page
    assert content(folders[0]) == before | {"report.html": page.encode()}
    assert "report.html" not in content(folders[1])


def test_elsewhere_and_quietly(run: Main, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a")
    out = tmp_path / "new" / "page.html"
    outcome = run("report", folder, "--out", out, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert "sweep: a" in out.read_text(encoding="utf-8")
    assert "report.html" not in content(folder)


def test_what_a_report_refuses(run: Main, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a")
    assert_error(run("report"), "RUN_DIR")
    assert_error(run("report", tmp_path), "holds no run.json")
    assert_error(run("report", folder, tmp_path / "none"), "no such folder")
    assert_error(run("report", folder, "--out", tmp_path), "is a folder")
    (folder / "sweep.csv").unlink()
    assert_error(run("report", folder), "sweep.csv", "is missing")
    assert "report.html" not in content(folder)


def test_no_model_is_loaded(tmp_path: Path) -> None:
    """Not even the packages that load one."""
    folder = write_sweep(tmp_path / "a")
    script = (
        "import sys\nfrom steerlens.cli import main\n"
        "try: main(['report', sys.argv[1], '--quiet'])\n"
        "except SystemExit as stop: print(stop.code, *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    code, *modules = done.stdout.split()
    assert code == "0"
    assert "vl_convert" in modules
    assert not {"transformers", "transformer_lens", "safetensors"} & {*modules}


def test_a_real_run_has_a_report(sweep: Main, run: Main, tmp_path: Path) -> None:
    """The in-sample note is in the record and the report, quiet or not; CSV files stay the same."""
    for name, more in (("loud", []), ("quiet", ["--quiet"])):
        outcome = sweep("--layers", "1", "--out", tmp_path / name, *more)
        assert outcome.code == 0
        assert (IN_SAMPLE in " ".join(outcome.err.split())) == (name == "loud")
        assert record(tmp_path / name)["warnings"] == [IN_SAMPLE]
        assert record(tmp_path / name)["request"]["held_out"] is False
    loud, quiet = content(tmp_path / "loud"), content(tmp_path / "quiet")
    assert [n for n in loud if loud[n] != quiet[n]] == ["run.json"]
    assert run("report", tmp_path / "loud").code == 0
    page = (tmp_path / "loud" / "report.html").read_text(encoding="utf-8")
    assert IN_SAMPLE.removeprefix("note: ") in page


def test_held_out_pairs_give_no_note(sweep: Main, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", HELD_OUT)
    outcome = sweep("--layers", "1", "--out", tmp_path / "run", "--test-pairs", other)
    assert (outcome.code, IN_SAMPLE[:30] in outcome.words) == (0, False)
    fewer = sweep("--layers", "1", "--out", tmp_path / "fewer", "--max-pairs", "3")
    assert (fewer.code, IN_SAMPLE[:30] in fewer.words) == (0, True)
    assert record(tmp_path / "run")["warnings"] == []
    assert record(tmp_path / "run")["request"]["held_out"] is True


# Warnings


def test_warnings_are_kept_and_shown(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with keeping_warnings():
        warnings.simplefilter("always")
        warnings.warn("first", RuntimeWarning, stacklevel=1)
        warn("second", quiet=True)
        warn("third", quiet=False)
        warnings.warn("first", RuntimeWarning, stacklevel=1)
        assert warned() == ("first", "second", "third")
    assert warned() == ()
    assert capsys.readouterr().err == "third\n"
    # pytest takes the place of what would print them.
    assert [str(warning.message) for warning in recwarn] == ["first", "first"]


def test_every_run_has_its_own_warnings() -> None:
    def fail() -> None:
        with keeping_warnings():
            warn("first", quiet=True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with keeping_warnings():
        assert warned() == ()
        with keeping_warnings():
            warn("inner", quiet=True)
        assert warned() == ()


def test_a_warning_of_the_run_is_in_its_record(sweep: Main, tmp_path: Path) -> None:
    """A coefficient that overflows leaves its cell undefined, with a warning."""
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e\\+39"):
        assert sweep("--out", tmp_path, "--coefficients=0,1e39", "--layers", "0").code == 0
    cells = table(tmp_path)
    assert cells.projection.isna().to_list() == [False, True]
    assert cells.coherent.to_list() == ["yes", "no"]
    first, *_, second = record(tmp_path)["warnings"]
    assert first == IN_SAMPLE
    assert second == "NaN or inf at coefficient 1e+39: the cell is left undefined"
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
