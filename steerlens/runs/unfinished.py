"""A run that is not finished: its parts on disk, and who may write them.

In `parts/` of the run folder: `_request.json`, what was asked for, written first;
`_directions.safetensors`; of a sweep a Parquet file a hook, of other commands a safetensors file
for everything that is finished, each written whole and once; and `_lock`.
"""

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import UNSTEERED, Kept, Tensors, digest
from steerlens.errors import FileError, SteerlensError
from steerlens.files import cannot_write, write_json, write_whole
from steerlens.runs.record import (
    PARTS,
    RECORD,
    RUN_FILES,
    STARTED,
    check_run_folder,
    differences,
    now,
    read_directions,
    read_objects,
    versions,
    write_directions,
)
from steerlens.tables import SWEEP_COLUMNS, to_frame, write_parquet

DIRECTIONS = "_directions.safetensors"
LOCK = "_lock"
# Its own files alone are removed; of one that was being written when the program was killed, a
# folder is left that `write_whole` made.
_TENSORS = rf"(?:{UNSTEERED})?[0-9a-f]{{64}}\.safetensors"
_PART = rf"{re.escape(STARTED)}|{re.escape(DIRECTIONS)}|[0-9]{{4,}}\.parquet|{_TENSORS}"
_IN_PARTS = re.compile(rf"{_PART}|\.(?:{_PART})-\w+")
_LEFT_BESIDE = re.compile(rf"\.(?:{'|'.join(map(re.escape, RUN_FILES))})-\w+")


@dataclass(frozen=True)
class Started:
    """What an unfinished run was asked for, and what of it has a part.

    `has_part` names the hooks of a sweep that have one; `n_parts` counts those of other commands.
    """

    request: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    has_part: tuple[str, ...]
    n_parts: int

    @property
    def resume(self) -> str:
        """The command that goes on with it, but for its folder."""
        return resume_command(self.request)

    @property
    def finished(self) -> str:
        """How much is finished."""
        if self.request.get("command") == "sweep":
            return f"{len(self.has_part)} of {len(self.hook_names)} hooks"
        return f"{self.n_parts} parts"

    @property
    def hook_names(self) -> tuple[str, ...]:
        """All hooks of the run."""
        return tuple(self.request["hook_names"])


def resume_command(request: Mapping[str, Any]) -> str:
    """What goes on with a run, but for its folder."""
    return f"steerlens {request.get('command', 'sweep')} --resume"


def read_started(folder: Path) -> Started | None:
    """What the unfinished run in a folder is; None when there is none.

    A folder with a run.json is finished. Raises `FileError` when the record is damaged.
    """
    inside = folder / PARTS
    path = inside / STARTED
    if (folder / RECORD).exists() or not path.exists():
        return None
    try:
        request, options, made_by = read_objects(path, "request", "options", "versions")
        names = [str(name) for name in request["hook_names"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{str(path)!r} is not the record of an unfinished run ({error}); delete the folder "
            "and run the command once more"
        ) from error
    has_part = tuple(name for i, name in enumerate(names) if _part(folder, i).exists())
    n_parts = sum(re.fullmatch(_TENSORS, path.name) is not None for path in inside.iterdir())
    return Started(request, options, made_by, has_part, n_parts)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished run, from its run.json or its folder: to run it again.

    Raises `FileError` when it is not one, or says no options.
    """
    path = path / RECORD if path.is_dir() else path
    names = ("request", "options", "versions")
    try:
        return dict(zip(names, read_objects(path, *names), strict=True))
    except ValueError as error:
        raise FileError(
            f"{str(path)!r} is not the record of a run that can be repeated ({error}); expected "
            f"the {RECORD} of a sweep, written by this steerlens or a newer one"
        ) from error


class Parts:
    """The parts of a run that this process may write: a `Checkpoint` (see `open_parts`).

    `seconds` and `warned` are of what was finished before and has been loaded.
    """

    def __init__(
        self, folder: Path, request: Mapping[str, Any], warned: Callable[[], Sequence[str]]
    ) -> None:
        self._folder, self._hook_names, self._warned = folder, tuple(request["hook_names"]), warned
        self.go_on = f"make room, then `{resume_command(request)} {folder}`"
        self._since = time.perf_counter()
        self.seconds = 0.0
        self.warned: tuple[str, ...] = ()

    def directions(
        self, fit: Callable[[], Directions], hook_names: Sequence[str] | None = None
    ) -> Directions:
        """The directions that were fitted before; else those of `fit`, which are kept.

        They are at `hook_names`: those of the request, unless others are given.
        """
        path = self._folder / PARTS / DIRECTIONS
        if path.exists():
            try:
                return read_directions(path, hook_names or self._hook_names)
            except FileError as error:
                warnings.warn(f"{error}; fitted again", RuntimeWarning, stacklevel=2)
        directions = fit()
        self._write(path, partial(write_directions, directions))
        return directions

    def load(self, name: str, of: str) -> Kept | None:
        """What is kept under a name; None where nothing is, and with a warning where it is damaged.

        Raises `FileError` when it is of another measurement than the one that `of` names.
        """
        path = self._path(name)
        if not path.exists():
            return None
        read = _read_rows if path.suffix == ".parquet" else _read_tensors
        found = read(path, name)
        if found is None:
            message = f"{str(path)!r} is damaged; what it held is run again"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return None
        kept, attrs = found
        if attrs["of"] != of:
            raise FileError(
                f"{str(path)!r} was measured with other settings, directions or unsteered "
                "activations, to the bit: on another device, number of threads or machine? Go "
                "on as it was begun, or start again in another --out"
            )
        self.seconds += attrs["seconds"]
        self.warned = tuple(dict.fromkeys((*self.warned, *attrs["warnings"])))
        return kept

    def keep(self, name: str, of: str, kept: Kept) -> None:
        """Write a part; it is on the disk when this returns.

        Raises `FileError` when it cannot be written.
        """
        moment = time.perf_counter()
        attrs = {
            "of": of,
            "hook_name": name,
            "blocks": kept.blocks,
            "record": dict(kept.record),
            "seconds": moment - self._since,
            "warnings": list(self._warned()),
        }
        self._since = moment
        path = self._path(name)
        if path.suffix == ".parquet":
            frame = to_frame(kept.rows, SWEEP_COLUMNS, attrs)
            frame.attrs["sha256"] = _checksum(frame)
            self._write(path, partial(write_parquet, frame))
        else:
            self._write(path, partial(_write_tensors, kept.tensors, attrs))

    def _path(self, name: str) -> Path:
        """A table where the name is that of a hook."""
        if name in self._hook_names:
            return _part(self._folder, self._hook_names.index(name))
        return self._folder / PARTS / f"{name}.safetensors"

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            write_whole(path, write)
        except OSError as error:
            raise FileError(
                f"cannot write {str(path)!r}: {error.strerror or error}; what is finished is kept: "
                f"{self.go_on}"
            ) from error


@contextmanager
def open_parts(
    folder: Path,
    request: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
    resume: bool = False,
    warned: Callable[[], Sequence[str]] = tuple,
) -> Iterator[Parts]:
    """The parts of a run of `request`, for this process alone; removed when the block ends well.

    After an error, an interrupt or a kill they stay, if there are any, and `resume` goes on with
    them. `request` has the `hook_names`, `options` what the command was given, `warned` the
    warnings so far. Raises `FileError` as `check_run_folder` does, when another process has the
    folder, and with `resume` when there is no unfinished run, or one of another request or other
    versions (naming both values).

    Examples:
        >>> from steerlens.runs.unfinished import open_parts, read_started
        >>> request = {"hook_names": directions.hook_names, "seed": 0}
        >>> with open_parts(folder, request, options={}) as parts:
        ...     _ = sl.sweep(model, pairs, directions, coefficients=[0, 4], checkpoint=parts)
        ...     len(read_started(folder).has_part)
        5
    """
    inside = folder / PARTS
    if not resume:
        try:
            inside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
    with _locked(folder):
        try:
            if resume:
                _check_same(folder, request)
            else:
                check_run_folder(folder, request)
                _start(folder, request, options)
        except BaseException:
            # What was refused leaves nothing behind, but for the unfinished run of another request.
            if not (inside / STARTED).exists():
                _remove_parts(folder)
            raise
        try:
            yield Parts(folder, request, warned)
        except BaseException as error:
            if not _is_worth_keeping(inside, error):
                _remove_parts(folder)
            raise
        _clear(folder)


def clear_finished(folder: Path) -> None:
    """Remove what a kill left beside the files of a run that is finished, unless it is at work."""
    if (folder / PARTS).exists():
        with suppress(FileError), _locked(folder):
            _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the parts, and what a kill half way through a table left beside it."""
    with suppress(OSError):
        _remove(folder, _LEFT_BESIDE)
    _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    """Remove the parts and, where nothing of another program is in it, their folder."""
    with suppress(OSError):
        _remove(folder / PARTS, _IN_PARTS)
        (folder / PARTS / LOCK).unlink()
        (folder / PARTS).rmdir()


def _remove(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what this program wrote into a folder, by its name, and nothing else."""
    for path in folder.iterdir():
        if names.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_worth_keeping(inside: Path, error: BaseException) -> bool:
    """Whether there is something to go on with: no request that failed before its first part."""
    kept = (*inside.glob("*.parquet"), *inside.glob("[0-9a-f]*.safetensors"))
    if kept or isinstance(error, FileError):
        return True
    return (inside / DIRECTIONS).exists() and not isinstance(error, SteerlensError)


def _start(folder: Path, request: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    record = {
        "request": dict(request),
        "options": dict(options),
        "versions": versions(),
        "started": now(),
    }
    try:
        # Of a run that was finished, or killed before its record was written.
        _remove(folder / PARTS, _IN_PARTS)
        write_whole(folder / PARTS / STARTED, partial(write_json, record))
    except OSError as error:
        raise cannot_write(folder, error) from error


def _check_same(folder: Path, request: Mapping[str, Any]) -> None:
    started = read_started(folder)
    if started is None:
        raise FileError(f"{str(folder)!r} holds no unfinished run; start one with --out")
    changed = [
        *differences(started.request, request),
        *(f"version of {text}" for text in differences(started.versions, versions())),
    ]
    if changed:
        raise FileError(
            f"the unfinished run in {str(folder)!r} was begun with other {', '.join(changed)}; go "
            "on as it was begun, or start again in another --out"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops with the process that holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / PARTS / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileError(
            f"another process is at work in {str(folder)!r}; wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise FileError(
            f"cannot lock {str(folder)!r}: {error.strerror or error}; choose another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _part(folder: Path, index: int) -> Path:
    return folder / PARTS / f"{index:04d}.parquet"


def _read_rows(path: Path, hook_name: str) -> tuple[Kept, dict[str, Any]] | None:
    """A part that is a table, and its attrs; None when they are not what was written."""
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
        written = frame.attrs.pop("sha256")
        is_whole = written == _checksum(frame) and frame.attrs["hook_name"] == hook_name
    # Whatever pyarrow makes of damaged bytes: its errors share no base class.
    except Exception:
        return None
    rows: Any = frame.to_dict("records")
    kept = Kept(rows=tuple(rows), blocks=frame.attrs.get("blocks", 0))
    return (kept, dict(frame.attrs)) if is_whole else None


def _read_tensors(path: Path, name: str) -> tuple[Kept, dict[str, Any]] | None:
    """A part that is tensors, and its attrs; None when they are not what was written."""
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + size])["__metadata__"]
        attrs, tensors = json.loads(said["attrs"]), load(content)
        is_whole = said["sha256"] == digest(attrs, sorted(tensors.items()))
        kept = Kept(tensors=tensors, record=attrs["record"], blocks=attrs["blocks"])
    # Whatever safetensors makes of damaged bytes.
    except Exception:
        return None
    return (kept, attrs) if is_whole and attrs["hook_name"] == name else None


def _write_tensors(tensors: Tensors, attrs: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save

    # Views of one tensor are written each for itself.
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    plain = json.loads(json.dumps(attrs))
    metadata = {"attrs": json.dumps(plain), "sha256": digest(plain, sorted(apart.items()))}
    path.write_bytes(save(apart, metadata))


def _checksum(frame: pd.DataFrame) -> str:
    text = frame.to_csv(index=False) + json.dumps(frame.attrs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
