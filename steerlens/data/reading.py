"""Lines of a file: JSON objects, or texts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steerlens.errors import InputError
from steerlens.files import read_whole, strict_json


def read_jsonl(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line number, where it is, and the value of every line of a UTF-8 JSONL file but blank ones.

    Raises `InputError` with file and line.
    """
    raw = read_whole(path, InputError, pipes=True)
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = strict_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text ({error.reason})") from error
        except ValueError as error:
            raise InputError(f"{where}: not a JSON object on one line ({error})") from error
        yield number, where, value


def read_texts(path: Path) -> tuple[str, ...]:
    """The lines of a text file, without empty ones.

    Raises `InputError` when the file cannot be read as UTF-8 text, or holds no text.
    """
    try:
        # Cut at line ends alone: splitlines knows others, which a line of text may hold.
        text = read_whole(path, InputError, pipes=True).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read texts from {str(path)!r}: {error}") from error
    texts = tuple(line for line in text.replace("\r\n", "\n").split("\n") if line.strip())
    if not texts:
        raise InputError(f"{str(path)!r} holds no text; give one text a line")
    return texts


def printable(path: Path) -> str:
    """A file's name as text: it may hold bytes that are none."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
