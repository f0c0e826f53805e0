"""Files are written whole, as the user's own, and read without double meanings."""

import math
import os
from pathlib import Path

import pytest

from steerlens.errors import FileError
from steerlens.files import (
    check_out_file,
    number,
    strict_json,
    without_nan,
    write_json,
    write_whole,
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
        (tmp_path / "other").write_bytes(b"x")
    finally:
        os.umask(before)
    for name in ("private", "plain", "other"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name


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
