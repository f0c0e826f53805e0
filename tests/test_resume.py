"""A sweep that is stopped: what stays, who may go on with it, and that the bytes are the same."""

import errno
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import N_LAYERS, OPENINGS, Main, assert_error, content, finish, record, write_pairs
from conftest import build_llama, build_tokenizer

import steerlens as sl
from steerlens.engine.checkpoint import Kept
from steerlens.errors import FileError
from steerlens.runs import record as runs
from steerlens.runs import unfinished
from steerlens.runs.record import sealed
from steerlens.runs.unfinished import Parts, open_parts

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


pytestmark = [
    pytest.mark.usefixtures("loaded_once", "few_texts"),
    # Every run here has a warning for its record.
    pytest.mark.filterwarnings("always:.*measured pairs were fitted on:UserWarning"),
]


@pytest.fixture(scope="module")
def whole(sweep_words: tuple[str, ...], tmp_path_factory: Any) -> dict[str, bytes]:
    """The files of a run that was not stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(*sweep_words, "--quiet", "--out", out)
    return content(out)


LONG = {
    "boundary": ("--layers", "1", "--budget", "kl=0.05"),
    "compare": ("--layers", "1", "--methods", "mean_diff,gradient_mean", "--null", "2"),
    "circuits": ("--layer", "1", "--coefficient", "5", "--top", "4", "--null", "2"),
    "geometry": ("--layers", "1", "--angles", "4", "--budget", "nats=0.1"),
    "extract": ("--layers", "all", "--method", "gradient_mean", "--budget", "kl=0.05"),
}
"""Commands that keep what they finish, beside `sweep`, and options that make them short."""


@pytest.fixture(scope="module")
def long_command(sweep_words: tuple[str, ...], tmp_path_factory: Any) -> Any:
    """`sweep`, or a command of `LONG` on the small model, without its folder."""
    items = tmp_path_factory.mktemp("items") / "items.jsonl"
    items.write_text(
        "\n".join(
            json.dumps(
                {"prompt": f"the {word} was", "positive": " good day", "negative": " so bad"}
            )
            for word in "walk sun rain soup bread night day kind".split()
        )
    )

    def command(name: str) -> list[str | Path]:
        if name == "sweep":
            return [*sweep_words]
        more = ["--items", items, "--off-target", "none"] if name == "compare" else []
        return [name, *sweep_words[1:5], *LONG[name], *more]

    return command


def assert_same_run(folder: Path, whole: dict[str, bytes]) -> None:
    """The same bytes in every file, and the same record but for the time."""
    assert_finished(folder, whole)
    if "run.json" not in whole:
        return
    now, then = record(folder), json.loads(whole["run.json"])
    for name in ("finished", "seconds", "sha256"):  # the last one is of all else in it
        now.pop(name)
        then.pop(name)
    assert now == then


def assert_finished(folder: Path, whole: dict[str, bytes]) -> None:
    found = content(folder)
    assert found.keys() == whole.keys()
    changed = [name for name in found if found[name] != whole[name]]
    assert changed == [name for name in found if name == "run.json"]  # seconds and the date


@contextmanager
def stopping(at: int, error: BaseException) -> Iterator[None]:
    """A run is stopped by the error when it is about to write the part of that number."""
    write, written = unfinished.write_parquet, []

    def fail(frame: pd.DataFrame, path: Path) -> None:
        written.append(path)
        if len(written) > at:
            path.write_bytes(b"half")
            raise error
        write(frame, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "write_parquet", fail)
        yield


@pytest.fixture(scope="module")
def half(sweep_words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted when two hooks were finished."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with stopping(2, KeyboardInterrupt()):
        finish(*sweep_words, "--quiet", "--out", folder, code=130)
    return folder


@pytest.fixture
def interrupted(half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(half, tmp_path / "run")


def test_resumed_to_the_same_bytes_without_running_a_finished_hook(
    run: Main, interrupted: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    fits: list[str] = []
    measured: list[float] = []
    keep, module = Parts.keep, sys.modules["steerlens.measure.sweeps"]
    measure, fit = module.measure, sl.fit
    engine = sys.modules["steerlens.engine.plan"]
    finished_cells = engine.finished_cells
    yielded: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        for finished in finished_cells(*args, **options):
            yielded.append(len(finished.cells))
            yield finished

    with monkeypatch.context() as patch:
        patch.setattr(
            Parts, "keep", lambda parts, name, *of: (kept.append(name), keep(parts, name, *of))[1]
        )
        patch.setattr(engine, "finished_cells", counted)
        patch.setattr(
            module, "measure", lambda cell, *rest: (measured.append(0), measure(cell, *rest))[1]
        )
        patch.setattr(sl, "fit", lambda *args, **options: fits.append("fit"))
        assert run("sweep", "--resume", interrupted, "--quiet").code == 0
    assert sl.fit is fit
    assert kept == HOOKS[2:]
    assert len(measured) == 2 * 3  # hooks left, coefficients
    assert yielded == [2] * 2  # hooks left
    assert fits == []  # directions are read back
    assert_finished(interrupted, whole)
    assert record(interrupted)["warnings"] == json.loads(whole["run.json"])["warnings"] != []


def test_a_full_disk_while_the_tables_are_written(
    run: Main, sweep: Main, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(frame: pd.DataFrame, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_csv", fail)
        outcome = sweep("--quiet", "--out", tmp_path / "run")
    assert_error(outcome, "cannot write", "No space left", "--resume")
    assert not (tmp_path / "run" / "sweep.csv").exists()
    with monkeypatch.context() as patch:
        # No cell is measured again.
        patch.setattr(sys.modules["steerlens.measure.sweeps"], "measure", None)
        assert_finished_after_resume(run, tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["boundary", "extract"])  # into a folder, and into a file
def test_a_full_disk_in_a_long_command(
    name: str, run: Main, long_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part was damaged since, or the settings are others."""
    command = (*long_command(name), "--quiet", "--out")
    ending = "/v.safetensors" if name == "extract" else ""
    assert run(*command, f"{tmp_path}/whole{ending}").code == 0
    whole, folder = content(tmp_path / "whole"), tmp_path / "run"
    unfinished_in = Path(f"{folder}{ending}.unfinished") if ending else folder
    write, written = unfinished.write_tensors, []

    def fail(tensors: Any, attrs: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 5:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, attrs, path)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_tensors", fail)
        outcome = run(*command, f"{folder}{ending}")
    assert_error(outcome, "cannot write", "No space left", f"{name} --resume {unfinished_in}")
    assert_error(run(*command, f"{folder}{ending}"), "unfinished run", f"--resume {unfinished_in}")
    resume = (name, "--quiet", "--resume", unfinished_in)
    assert_error(run(*resume, "--seed", "1"), "seed (0, now 1)")
    other = run("sweep", "--quiet", "--resume", unfinished_in)
    assert_error(other, f"of {name}", "options of sweep")
    with pytest.raises(FileError, match=f"unfinished.*{name} --resume"):
        sl.read_run(unfinished_in)
    damaged = next(unfinished_in.glob("parts/[0-9a-f]*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="is damaged; what it held is run again"):
        assert run(*resume).code == 0
    assert_finished(folder, whole)
    assert run(*resume).code == 0  # there is nothing to do
    assert_finished(folder, whole)


def assert_finished_after_resume(run: Main, folder: Path, whole: dict[str, bytes]) -> None:
    outcome = run("sweep", "--resume", folder, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert_finished(folder, whole)


def test_an_unfinished_run_says_what_it_is(run: Main, sweep: Main, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with stopping(2, KeyboardInterrupt()):
        outcome = sweep("--quiet", "--out", folder)
    assert (outcome.code, outcome.err.count("\n")) == (130, 1)
    assert f"2 of {N_LAYERS} hooks" in outcome.words
    assert f"--resume {folder}" in outcome.words
    for word in ("unfinished", f"2 of {N_LAYERS}", HOOKS[1], f"--resume {folder}", "read_parquet"):
        with pytest.raises(FileError, match=word.replace(".", r"\.")):
            sl.read_run(folder)
        assert_error(run("report", folder), word)
    cells = pd.read_parquet(folder / "parts")
    assert cells.hook_name.drop_duplicates().to_list() == HOOKS[:2]
    assert_error(sweep("--quiet", "--out", folder), "unfinished", "--resume")
    with (
        pytest.raises(FileError, match="unfinished run; `steerlens sweep --resume"),
        open_parts(folder, REQUEST, options={}),
    ):
        pass


def test_the_cells_can_be_read_while_it_runs(
    sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    """Also where a kill left half a part beside the whole ones."""
    folder, seen, keep = tmp_path / "run", [], Parts.keep

    def keep_and_read(parts: Parts, name: str, of: str, kept: Kept) -> None:
        keep(parts, name, of, kept)
        if name not in HOOKS:
            return
        (folder / "parts" / ".steerlens-0123abcd-0003.parquet").write_bytes(b"half")
        cells = pd.read_parquet(folder / "parts")
        seen.append(cells.hook_name.drop_duplicates().to_list())

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", keep_and_read)
        assert sweep("--quiet", "--out", folder).code == 0
    assert seen == [HOOKS[: i + 1] for i in range(N_LAYERS)]
    assert_finished(folder, whole)


def test_another_request_or_version_is_refused_with_both_values(
    run: Main,
    interrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes],
) -> None:
    folder = interrupted
    resume = ("sweep", "--quiet", "--resume", folder)
    assert_error(run(*resume, "--seed", "1"), "seed (0, now 1)")
    others = write_pairs(tmp_path / "other.jsonl", OPENINGS[:3])
    assert_error(run(*resume, "--pairs", others), "fitted_on.n_pairs (4, now 3)", "fingerprint (")
    build_llama(n_layers=N_LAYERS, seed=1).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    assert_error(run(*resume, "--model", tmp_path / "model"), "model.file_hash (", "model.name (")
    assert_error(run(*resume, "--out", tmp_path / "b"), "leave out --out")
    with monkeypatch.context() as patch:
        now = unfinished.versions()
        patch.setattr(unfinished, "versions", lambda: now | {"torch": "0.1"})
        assert_error(run(*resume), f"version of torch ({now['torch']!r}, now '0.1')")
    assert_error(run("sweep", "--quiet", "--resume", tmp_path), "holds no unfinished run")
    assert_error(run("sweep", "--quiet"), "--out")
    assert_finished_after_resume(run, folder, whole)
    # As a kill leaves it between the record and the removal of the parts.
    kept_part(tmp_path / "killed")
    (tmp_path / "killed" / "parts").rename(folder / "parts")
    again = run(*resume[:1], "--resume", folder)
    assert (again.code, "nothing to do" in again.words) == (0, True)
    assert_finished(folder, whole)


def test_an_error_before_the_first_cell_leaves_nothing(sweep: Main, tmp_path: Path) -> None:
    assert_error(sweep("--quiet", "--position", "99", "--out", tmp_path / "run"), "99")
    assert content(tmp_path / "run") == {}


# Parts, of which test_parts.py has more


def part(folder: Path) -> Path:
    return folder / "parts" / "0000.parquet"


def test_a_truncated_part_is_run_again(
    run: Main, interrupted: Path, whole: dict[str, bytes]
) -> None:
    part(interrupted).write_bytes(part(interrupted).read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"0000\.parquet' is damaged"):
        assert run("sweep", "--resume", interrupted, "--quiet").code == 0
    assert_finished(interrupted, whole)
    assert "is damaged" in str(record(interrupted)["warnings"])


REQUEST = {"command": "sweep", "hook_names": HOOKS}
ROW = {
    "hook_name": HOOKS[0],
    "layer": 0,
    "readout_hook": HOOKS[2],
    "coefficient": 0.1,
    "asked": "0.1",
    "n_pairs": 3,
    "n_groups": 3,
    "coherent": "yes",
    "exact": True,
    "projection": 1 / 3,
}


NAME = "0f" * 32
TENSORS = {
    "odd": torch.tensor([[math.nan, math.inf, -0.0], [1 / 3, -math.inf, 5e-324]]).double().T,
    "half": torch.arange(6, dtype=torch.bfloat16)[::2],
    "nothing": torch.zeros((2, 0)),
    "one": torch.tensor(True),
}


def kept_part(folder: Path) -> None:
    with suppress(KeyboardInterrupt), open_parts(folder, REQUEST, options={}) as parts:
        assert parts.load(HOOKS[0], "of") is parts.load(NAME, "of") is None
        parts.keep(HOOKS[0], "of", Kept(rows=(ROW,), blocks=7))
        parts.keep(NAME, "of", Kept(tensors=TENSORS, record={"seed": 3}, blocks=5))
        raise KeyboardInterrupt


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder in a folder, links not followed."""
    return {
        str(path.relative_to(folder)): (
            str(path.readlink()).encode()
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else b"folder"
        )
        for path in folder.rglob("*")
    }


# --from


def test_a_run_is_repeated_from_its_record(
    run: Main, sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, first = write_pairs(tmp_path / "pairs.jsonl", OPENINGS), tmp_path / "a"
    assert sweep("--pairs", pairs, "--seed", "5", "--out", first).code == 0
    source = first / "run.json"
    outcome = run("sweep", "--from", source, "--out", tmp_path / "b")
    assert (outcome.code, "not as recorded" in outcome.words) == (0, False)
    before, after = content(first), content(tmp_path / "b")
    assert [name for name in before if before[name] != after[name]] == ["run.json"]
    write_pairs(pairs, OPENINGS, negative="rude")
    old = json.loads(source.read_text(encoding="utf-8"))
    old["versions"]["torch"] = "0.1"
    old["request"]["model"]["file_hash"] = "abc"
    source.write_text(json.dumps(old), encoding="utf-8")
    outcome = run("sweep", "--from", first, "--out", tmp_path / "c")
    assert_error(outcome, "it was changed")
    source.write_text(json.dumps(sealed(old)), encoding="utf-8")
    outcome = run("sweep", "--from", first, "--seed", "6", "--out", tmp_path / "c")
    assert outcome.code == 0
    said = " ".join(record(tmp_path / "c")["warnings"])
    for word in (
        "seed (5, now 6)",
        "model.file_hash ('abc', now",
        "fitted_on.fingerprint (",
        "version of torch ('0.1', now",
    ):
        assert word in said
    assert "method" not in said
    assert content(tmp_path / "c")["sweep.csv"] != before["sweep.csv"]
    # Another's record does not choose what is fetched.
    old["options"]["model"] = "some/one"
    source.write_text(json.dumps(sealed(old)), encoding="utf-8")
    monkeypatch.setattr("steerlens.load_model", lambda name, **options: 1 / 0)
    again = ("sweep", "--from", first, "--out", tmp_path / "d")
    assert_error(run(*again), "the record", "--model some/one")
    assert_error(run(*again, "--model", "some/one"), "ZeroDivisionError")


@pytest.mark.parametrize(
    ("options", "named"),
    [(None, "options"), ({"seed": 0}, "model"), ([1], "cannot"), (3, "repeat")],
)
def test_a_record_that_cannot_be_repeated(
    options: Any, named: str, run: Main, tmp_path: Path
) -> None:
    said = {"request": {}, "versions": {}} | ({} if options is None else {"options": options})
    (tmp_path / "run.json").write_text(json.dumps(sealed(said)), encoding="utf-8")
    outcome = run("sweep", "--from", tmp_path, "--out", tmp_path / "b", "--quiet")
    assert_error(outcome, "record", named)
    assert not (tmp_path / "b").exists()
