"""Read files that others made, whole and without double meanings; write files whole, alone."""

import csv
import errno
import json
import math
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any

from steerlens.errors import FileError, InputError, SteerlensError

MAX_BYTES = 1 << 30
"""Largest file that is read into memory: 1 GiB."""
MAX_DEPTH = 64
"""How deep arrays and objects may stand in each other."""


def read_whole(path: Path, error: type[SteerlensError], *, pipes: bool = False) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`, else an `error` that names it.

    With `pipes` a pipe or device too, as /dev/stdin is; one that never ends is refused.
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


def packaged(folder: str, name: str) -> str:
    """The text of a file that ships in a folder of the package: a table, a style, a script."""
    return resources.files(f"steerlens.{folder}").joinpath(name).read_text(encoding="utf-8")


def packaged_rows(folder: str, name: str) -> list[dict[str, str]]:
    """The rows of a CSV file that ships in a folder of the package, column -> cell."""
    return list(csv.DictReader(packaged(folder, name).splitlines(), restval=""))


def strict_json(text: str) -> Any:
    """The value of a JSON text; a `ValueError` on repeated keys and deep nesting too."""
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
    """Make `folder`; `FileError` where files may not be written there, and where it is a link."""
    try:
        if folder.is_symlink():
            raise FileError(
                f"cannot write to {str(folder)!r}: it is a link; give --out the folder that it "
                f"leads to, {str(folder.resolve())!r}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _new_file(folder / PROBE).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> FileError:
    """What says that nothing can be written into a folder, and why."""
    reason = error.strerror or error
    return FileError(f"cannot write to {str(folder)!r}: {reason}; choose another --out")


def check_out_file(path: Path) -> None:
    """As `check_out_folder`, of a file to be written, which may be no folder, link or device."""
    try:
        _refuse_other_kinds(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    check_out_folder(path.parent.resolve())


TEMPORARY = re.compile(r"\.steerlens-[0-9a-f]{8}-(?P<name>.+)", re.DOTALL)
"""The name of a file that is being written: a kill leaves it behind."""
PROBE = "probe"
"""The name of an empty file that is written to see whether files may be."""


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other file has."""
    return path.with_name(f".steerlens-{uuid.uuid4().hex[:8]}-{path.name}")


def _new_file(path: Path) -> Path:
    """An empty file beside `path`, with the permissions of any new one."""
    temporary = temporary_name(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _refuse_other_kinds(path: Path) -> None:
    """Raise `OSError` for what a new file must not replace: a folder, a link, a device."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            kind = "a folder" if path.is_dir() else "a device or pipe"
            kind = "a link" if path.is_symlink() else kind
            raise OSError(errno.EEXIST, f"it is {kind}; expected a file's name")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: it is whole or absent.

    It is on the disk when this returns. Raises `OSError` where it cannot be written, and where
    `path` is a folder, a link or a device.
    """
    _refuse_other_kinds(path)
    temporary = _new_file(path)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        _finish(temporary, mode)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    _to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_whole`, of bytes. Raises `FileError` where they cannot be written."""
    try:
        write_whole(path, lambda part: part.write_bytes(content))
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from error


def write_out(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, of what `--out` names. Raises `FileError` where it cannot be written."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_whole_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """As `write_whole`, of a folder that is new or empty and the files that `fill` puts there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    temporary.mkdir()
    try:
        fill(temporary)
        probe = _new_file(temporary / "probe")
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for path in temporary.rglob("*"):
            if path.is_file():
                _finish(path, mode)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        try:
            _to_disk(folder.parent)
        except OSError:  # a folder that is there would be refused the next time
            folder.rename(temporary)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(path: Path, mode: int) -> None:
    """Libraries write by temporary files of their own, which are private, and no disk is asked."""
    path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _to_disk(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# One process at a time

LOCK = ".steerlens.lock"
_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())


@contextmanager
def locked(path: Path, *, is_folder: bool) -> Iterator[None]:
    """Keep other runs from writing to a file or folder inside the block.

    The lock is on an empty file in the folder or beside the file, and the system drops it with the
    process that holds it. A block inside another of the same path holds the outer one's. Raises
    `FileError` when another run holds it, or no lock can be had there.
    """
    target = path.absolute() if path.is_symlink() else path.resolve()
    if target in _held.get():
        yield
        return
    lock = target / LOCK if is_folder else target.with_name(f".{target.name}{LOCK}")
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    check_out_folder(lock.parent)
    try:
        descriptor = _acquired(lock)
    except OSError as error:
        raise FileError(
            f"cannot lock {str(path)!r}: {error.strerror or error}; choose another --out"
        ) from error
    if descriptor is None:
        raise FileError(
            f"another run is writing to {str(path)!r}; wait for it, or choose another --out"
        )
    before = _held.set(_held.get() | {target})
    try:
        yield
    finally:
        _held.reset(before)
        _release(lock, descriptor)
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquired(lock: Path) -> int | None:
    """The open lock file, locked; None where another process has it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(lock, flags, 0o666)
        try:
            if os.fstat(descriptor).st_size:
                raise OSError(errno.EEXIST, f"{lock.name} in it is no lock of steerlens")
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            # Who held it may have removed it since: then this is no longer the file of that name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def _lock(descriptor: int) -> bool:
    """Whether a file could be locked; with a warning, where the file system has no locks."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = f"this file system has no locks ({error.strerror}): let no other run write there"
        warnings.warn(text, RuntimeWarning, stacklevel=6)
    return True


def _release(lock: Path, descriptor: int) -> None:
    """Let go, and remove the lock file: while it is held, or nobody knows whose it is by then."""
    with suppress(OSError):  # Windows keeps a file that is open, also where another has it open
        if os.name == "posix":
            lock.unlink()
        os.close(descriptor)
        if os.name != "posix":
            lock.unlink()


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, as `without_nan` makes it."""
    path.write_text(json_text(record), encoding="utf-8")


def json_text(record: Mapping[str, Any]) -> str:
    """A record as the text of a JSON file."""
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def jsonl_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Records as the text of a JSONL file."""
    return "".join(json.dumps(without_nan(row), ensure_ascii=False) + "\n" for row in rows)


def number(value: Any) -> float:
    """A number of a record, as `without_nan` writes it. Raises `TypeError` on anything else."""
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
