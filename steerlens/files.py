"""Read files that others made, whole and without double meanings; write files whole."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steerlens.errors import FileError, InputError, SteerlensError

MAX_BYTES = 1 << 30
"""Largest file that is read into memory: 1 GiB."""
MAX_DEPTH = 64
"""How deep arrays and objects may stand in each other."""


def read_whole(path: Path, error: type[SteerlensError], *, pipes: bool = False) -> bytes:
    """The bytes of a file.

    Args:
        path: A regular file of at most `MAX_BYTES`.
        error: What is raised, naming the file, when it is not, or cannot be read.
        pipes: Take a pipe or device too, as /dev/stdin is; one that never ends is refused.
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
        length = f"has {size} bytes" if size else "does not end"
        raise error(
            f"{str(path)!r} {length}, and at most {MAX_BYTES} bytes are read; split it, or see "
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
# A pickle of protocol 2 or later; torch.save writes one inside a zip.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def refuse_pickle(path: Path) -> None:
    """Raise `InputError` for a file whose name or first bytes say that it is a pickle."""
    refuse_pickle_name(path)
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if start.startswith(_PICKLE_STARTS):
        raise _pickle_error(path)


def refuse_pickle_name(path: Path) -> None:
    """Raise `InputError` for a file whose name says that it is a pickle."""
    if path.suffix.lower() in _PICKLES:
        raise _pickle_error(path)


def _pickle_error(path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} is a pickle: loading one can run any code, so it is refused; save the "
        "tensors as safetensors or GGUF with the tool that made it"
    )


def check_out_folder(folder: Path) -> None:
    """Make `folder` and see that files may be written there. Raises `FileError` when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> FileError:
    """What says that nothing can be written into a folder, and why."""
    reason = error.strerror or error
    return FileError(f"cannot write to {str(folder)!r}: {reason}; choose another --out")


def check_out_file(path: Path) -> None:
    """Make the folder of `path` and see that a file may be written there, before any work.

    Raises `FileError` when it may not, or when `path` is a folder.
    """
    if path.is_dir():
        raise FileError(f"--out {str(path)!r} is a folder; expected a file name")
    check_out_folder(path.parent)


def new_file_mode(folder: Path) -> int:
    """The permissions of a new file in `folder`: 0666 without the bits of the user's umask.

    Files that a library wrote by a temporary one of its own are private until they are given these.
    """
    probe = folder / ".permissions"  # asking for the umask would change it for other threads
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: it is whole or absent.

    It has the permissions of any new file, however `write` made it, and is on the disk when this
    returns: a power cut takes nothing of it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        temporary = Path(beside) / path.name
        write(temporary)
        temporary.chmod(new_file_mode(temporary.parent))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, as `without_nan` makes it."""
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


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
