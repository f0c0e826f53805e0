"""Read files that others made: whole, of a size that fits, and JSON without double meanings."""

import json
from pathlib import Path
from typing import Any

from steerlens.errors import SteerlensError

MAX_BYTES = 1 << 30
"""Largest file that is read into memory: 1 GiB."""
MAX_DEPTH = 64
"""How deep arrays and objects may stand in each other."""


def read_whole(path: Path, error: type[SteerlensError], *, pipes: bool = False) -> bytes:
    """The bytes of a file; where `pipes`, also of a pipe or device, as /dev/stdin is.

    Raises `error` that names the file when it cannot be read, holds more than `MAX_BYTES` (which a
    device that never ends does too), or is no regular file and `pipes` is False.
    """
    try:
        is_file = path.is_file()
        if path.exists() and not is_file and (path.is_dir() or not pipes):
            raise error(f"{str(path)!r} cannot be read: it is not a file; give a file's name")
        size = path.stat().st_size if is_file else 0
        content = b""
        if size <= MAX_BYTES:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except error:
        raise
    except (OSError, ValueError) as failure:  # ValueError: a name with a null character
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{str(path)!r} cannot be read: {reason}") from failure
    if max(size, len(content)) > MAX_BYTES:
        told = f"has {size} bytes" if size else "does not end"
        raise error(
            f"{str(path)!r} {told}, and at most {MAX_BYTES} bytes are read; split it, or see "
            "whether it is what its name says"
        )
    return content


def strict_json(text: str) -> Any:
    """The value of a JSON text.

    Raises `ValueError` when it is not JSON, a key occurs twice in an object, a number is too long,
    or arrays and objects are nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    _check_depth(value)
    return value


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in items:
        if key in record:
            raise ValueError(f"key {key[:80]!r} occurs twice")
        record[key] = value
    return record


def _check_depth(value: Any) -> None:
    # What is parsed is written and shown again, by functions that recurse.
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level if type(v) in (dict, list)]
        if not inner:
            return
        level = [item for items in inner for item in items]
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
