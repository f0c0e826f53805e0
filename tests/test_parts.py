"""The parts of an unfinished run: read as they were written, and told from what is the user's."""

# ruff: noqa: F401 (fixtures are imported, and named as parameters)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Main, assert_error, content
from test_resume import HOOKS, NAME, REQUEST, TENSORS, kept_part, part, tree

from steerlens.engine.checkpoint import digest
from steerlens.errors import FileError
from steerlens.runs import unfinished
from steerlens.runs.part_files import read_rows, read_tensors
from steerlens.runs.unfinished import open_parts

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.mark.parametrize(
    ("file", "name", "read", "step"),
    [
        ("0000.parquet", HOOKS[0], read_rows, 211),
        (f"{NAME}.safetensors", NAME, read_tensors, 3),
    ],
)
def test_no_changed_byte_of_a_part_changes_a_number(
    file: str, name: str, read: Callable[..., Any], step: int, tmp_path: Path
) -> None:
    kept_part(tmp_path)
    path = tmp_path / "parts" / file
    good, before = path.read_bytes(), read(path, name)
    assert before is not None
    refused = 0
    for place in range(0, len(good), step):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        found = read(path, name)
        refused += found is None
        assert found is None or _bits(found) == _bits(before)
    assert refused > 0
    for cut in (b"", good[: len(good) // 2], good[:-1]):
        path.write_bytes(cut)
        assert read(path, name) is None
    path.write_bytes(good)
    assert read(path, HOOKS[1]) is None


def _bits(part: Any) -> list[Any]:
    kept, attrs = part
    return [repr(kept.rows), digest(sorted(kept.tensors.items())), kept.record, attrs]


def test_a_part_of_another_sweep_is_refused(tmp_path: Path) -> None:
    kept_part(tmp_path)
    with open_parts(tmp_path, REQUEST, options={}, resume=True) as parts:
        for name in (HOOKS[0], NAME):
            with pytest.raises(FileError, match="number of threads"):
                parts.load(name, "other")
        hook, tensors = parts.load(HOOKS[0], "of"), parts.load(NAME, "of")
    assert hook is not None
    assert (hook.blocks, hook.rows[0]["projection"]) == (7, 1 / 3)
    assert tensors is not None
    assert (tensors.blocks, tensors.record) == (5, {"seed": 3})
    for name, value in TENSORS.items():
        found = tensors.tensors[name]
        assert found.dtype == value.dtype
        assert digest(found) == digest(value)  # NaN too
    assert not (tmp_path / "parts").exists()


LEFT = [".steerlens-0123abcd-sweep.csv", "parts/.steerlens-0123abcd-0003.parquet"]
MINE = [
    *(".sweep.csv-backup/sweep.csv", ".sweep.csv-mybackup/sweep.csv", ".steerlens-mine"),
    *(".steerlens-0123abcd-mine.csv", ".steerlens-0123abcd-report.html", "parts/notes.txt"),
    *("parts/0000.csv", "parts/0007.parquet", "parts/deeper/0000.parquet"),
]


def test_only_what_this_program_wrote_is_removed(tmp_path: Path) -> None:
    kept_part(tmp_path)
    for name in (*LEFT, *MINE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "parts" / "0008.parquet").symlink_to(part(tmp_path))
    (tmp_path / ".steerlens-0123abcd-parts").symlink_to(tmp_path / "parts")
    mine = {name: left for name, left in tree(tmp_path).items() if name not in LEFT}
    with open_parts(tmp_path, REQUEST, options={}, resume=True):
        pass
    wrote = {"parts/_request.json", "parts/0000.parquet", f"parts/{NAME}.safetensors"}
    assert tree(tmp_path) == {name: left for name, left in mine.items() if name not in wrote}
    assert wrote < mine.keys()


def folder_with(*names: str) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).write_bytes(b"mine")

    return plant


def linked_to_parts(path: Path) -> None:
    """To the parts of an unfinished run of the same request."""
    kept_part(path.parent.parent / "other")
    path.symlink_to(path.parent.parent / "other" / "parts")


@pytest.mark.parametrize(
    "plant",
    [
        folder_with(),
        folder_with("notes.txt"),
        folder_with("0000.parquet", "_directions.safetensors"),
        folder_with("_request.json"),
        linked_to_parts,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_bytes(b"mine"),
    ],
)
def test_parts_of_the_user_are_refused_and_left(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with open_parts(folder, REQUEST, options={}):  # as a folder without them is taken
        pass
    plant(folder / "parts")
    before = tree(tmp_path)
    for resume in (False, True):
        with (
            pytest.raises(FileError, match=r"parts|holds no unfinished run"),
            open_parts(folder, REQUEST, options={}, resume=resume),
        ):
            pass
        assert tree(tmp_path) == before
    (folder / "run.json").write_text('{"request": {"command": "sweep"}, "versions": {}}')
    with pytest.raises(FileError, match="is not the record of a run"):
        unfinished.clear_finished(folder)
    (folder / "run.json").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["sweep", "boundary"])
def test_a_command_leaves_the_users_parts(
    command: str, run: Main, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = (command, "--model", model_folder, "--pairs", pairs_file, "--layers", "1", "--quiet")
    folder_with("notes.txt")(out)
    folder_with("data.csv")(out / "parts")
    before = tree(out)
    assert_error(run(*words, "--out", out), "holds parts, not of a run")
    assert_error(run(*words, "--position", "99", "--out", out))
    (out / "run.json").write_text("{}")
    if command == "sweep":
        assert_error(run("sweep", "--resume", out), "is not the record of a run")
    (out / "run.json").unlink()
    assert tree(out) == before
    (out / "parts").rename(out / "mine")
    assert run(*words, "--out", out).code == 0
    assert content(out / "mine") == {"data.csv": b"mine"}
