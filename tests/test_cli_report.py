"""`steerlens report`, and what a run's record says of the warnings given."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import HELD_OUT, OPENINGS, Main, assert_error, content, record, table, write_pairs
from run_folders import write_boundary, write_sweep

from steerlens.cli.printing import keeping_warnings, quiet, warn, warned

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
    """Its warnings are in the record and the report, quiet or not; CSV files stay the same."""
    for name, more in (("loud", []), ("quiet", ["--quiet"])):
        with pytest.warns(UserWarning, match="4 of 4 measured pairs were fitted on"):
            assert sweep("--layers", "1", "--out", tmp_path / name, *more).code == 0
        assert any("4 of 4" in text for text in record(tmp_path / name)["warnings"])
    loud, quiet = content(tmp_path / "loud"), content(tmp_path / "quiet")
    assert [n for n in loud if loud[n] != quiet[n]] == ["run.json"]
    assert run("report", tmp_path / "loud").code == 0
    page = (tmp_path / "loud" / "report.html").read_text(encoding="utf-8")
    assert "4 of 4 measured pairs were fitted on" in page
    assert "the directions are fitted on 4 of these too" in page


@pytest.mark.parametrize(
    ("openings", "more", "n", "n_measured"),
    [
        (HELD_OUT, [], 0, 3),
        ([*HELD_OUT, *OPENINGS[:2]], [], 2, 5),
        (OPENINGS, ["--max-pairs", "3"], 3, 3),
    ],
)
def test_pairs_that_were_fitted_on_are_counted_whatever_file_they_are_in(
    sweep: Main, tmp_path: Path, openings: list[str], more: list[str], n: int, n_measured: int
) -> None:
    other = write_pairs(tmp_path / "other.jsonl", openings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = sweep("--layers", "1", "--out", tmp_path / "run", "--test-pairs", other, *more)
    assert ended.code == 0
    told = [str(w.message) for w in caught if "were fitted on" in str(w.message)]
    assert len(told) == (n > 0)
    assert all(f"{n} of {n_measured} measured pairs were fitted on" in text for text in told)
    written = record(tmp_path / "run")
    assert [text for text in written["warnings"] if "were fitted on" in text] == told
    assert written["request"]["n_pairs_fitted_on"] == n
    for name in ("sweep", "layers"):
        assert written["tables"][name]["attrs"]["n_pairs_fitted_on"] == n


# Warnings


def test_warnings_are_kept_and_shown(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with keeping_warnings():
        warnings.simplefilter("always")
        warnings.warn("first", RuntimeWarning, stacklevel=1)
        with quiet(True):
            warn("second")
        warn("third")
        warnings.warn("first", RuntimeWarning, stacklevel=1)
        assert warned() == ("first", "second", "third")
    assert warned() == ()
    assert capsys.readouterr().err == "third\n"
    # pytest takes the place of what would print them.
    assert [str(warning.message) for warning in recwarn] == ["first", "first"]


def test_every_run_has_its_own_warnings() -> None:
    def fail() -> None:
        with keeping_warnings():
            warn("first")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with keeping_warnings():
        assert warned() == ()
        with keeping_warnings():
            warn("inner")
        assert warned() == ()


def test_a_warning_of_the_run_is_in_its_record(sweep: Main, tmp_path: Path) -> None:
    """A coefficient that overflows leaves its cell undefined, with a warning."""
    with pytest.warns(RuntimeWarning, match="NaN or inf at coefficient 1e\\+39"):
        assert sweep("--out", tmp_path, "--coefficients=0,1e39", "--layers", "0").code == 0
    cells = table(tmp_path)
    assert cells.projection.isna().to_list() == [False, True]
    assert cells.coherent.to_list() == ["yes", "no"]
    assert (
        record(tmp_path)["warnings"][-1]
        == "NaN or inf at coefficient 1e+39: the cell is left undefined"
    )
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
