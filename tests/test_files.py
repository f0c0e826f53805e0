"""Files are written whole, as the user's own, and read without double meanings."""

import errno
import math
import os
from pathlib import Path

import pytest

from steerlens.errors import FileError
from steerlens.files import (
    check_out_file,
    locked,
    number,
    strict_json,
    without_nan,
    write_json,
    write_whole,
    write_whole_folder,
)


@pytest.mark.skipif(os.name != "posix", reason="permissions are of Unix")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_written_file_has_the_permissions_of_the_users_umask(
    umask: int, mode: int, tmp_path: Path
) -> None:
    def write_private(path: Path) -> None:
        """As writers do that make a temporary file of their own."""
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "private", write_private)
        write_whole(tmp_path / "plain", lambda path: path.write_bytes(b"x"))
        write_whole_folder(tmp_path / "folder", lambda folder: write_private(folder / "private"))
        (tmp_path / "other").write_bytes(b"x")
    finally:
        os.umask(before)
    for name in ("private", "plain", "folder/private", "other"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    assert (tmp_path / "folder").stat().st_mode & 0o666 == mode


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for there in (False, True):
        if there:
            (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="No space"):
            write_whole_folder(tmp_path / "folder", fail)
        assert [path.name for path in tmp_path.rglob("*")] == ["folder"] * there
    write_whole_folder(tmp_path / "folder", lambda folder: (folder / "a").write_bytes(b"a"))
    with pytest.raises(OSError, match="not empty"):
        write_whole_folder(tmp_path / "folder", lambda folder: (folder / "b").write_bytes(b"b"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="as Linux says that there are no locks")
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with locked(tmp_path, is_folder=True):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(RuntimeWarning, match=r"no locks \(No locks available\): let no other run"),
        locked(tmp_path, is_folder=True),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plant", ["text", "folder", "link"])
def test_a_lock_is_never_a_file_of_the_user(plant: str, tmp_path: Path) -> None:
    lock = tmp_path / ".steerlens.lock"
    if plant == "link":
        (tmp_path / "mine").write_bytes(b"")
        lock.symlink_to(tmp_path / "mine")
    elif plant == "folder":
        lock.mkdir()
    else:
        lock.write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match="cannot lock"), locked(tmp_path, is_folder=True):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_record_survives_json_without_nan(tmp_path: Path) -> None:
    record = {"nan": math.nan, "numbers": (math.inf, -math.inf, 1.5), "inner": {"text": "é"}}
    write_json(record, tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert "é" in text
    read = strict_json(text)
    assert read == {"nan": None, "numbers": ["inf", "-inf", 1.5], "inner": {"text": "é"}}
    assert without_nan(record) == read
    assert [number(value) for value in read["numbers"]] == [math.inf, -math.inf, 1.5]
    assert math.isnan(number(read["nan"]))
    for value in (True, "1", [1.0]):
        with pytest.raises(TypeError, match="expected a number"):
            number(value)


def test_where_a_file_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    check_out_file(tmp_path / "new" / "folder" / "table.csv")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(FileError, match="it is a folder; expected a file's name"):
        check_out_file(tmp_path / "new")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="cannot write to"):
        check_out_file(tmp_path / "file" / "table.csv")
