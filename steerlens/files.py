"""Read files that others made: whole, of a size that fits, and JSON without double meanings."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steerlens.errors import InputError, SteerlensError

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


_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def refuse_pickle(path: Path) -> None:
    """Raise `InputError` for a file whose name or first bytes say that it is a pickle."""
    _refuse_pickle_name(path)
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    # A pickle of protocol 2 or later; torch.save writes one inside a zip.
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start == b"PK\x03\x04":
        raise _pickle_error(path)


def _refuse_pickle_name(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise _pickle_error(path)


def _pickle_error(path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} is a pickle: loading one can run any code, so it is refused; save the "
        "tensors as safetensors or GGUF with the tool that made it"
    )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: it is whole or absent.

    It is on the disk when this returns, so that a power cut takes nothing of it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        temporary = Path(beside) / path.name
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def number(value: Any) -> float:
    """A number of a record, where None stands for NaN and "inf" and "-inf" for themselves.

    Raises `TypeError` on anything else.
    """
    if value is None:
        return math.nan
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def without_nan(value: Any) -> Any:
    """Plain values with None for NaN and "inf" for inf, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
