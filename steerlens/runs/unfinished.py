"""A run that is not finished: its parts on disk, and who may write them.

In `parts/` of the run folder: `_request.json`, what was asked for, with which the folder is made;
`_directions.safetensors`; of a sweep a Parquet file a hook; and a safetensors file for everything
else that is finished, a hook's cells on a block of many pairs too, each written whole and once.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import UNSTEERED, Kept
from steerlens.errors import FileError, SteerlensError
from steerlens.files import (
    PROBE,
    TEMPORARY,
    cannot_write,
    locked,
    temporary_name,
    write_json,
    write_whole,
)
from steerlens.runs.part_files import (
    DIRECTIONS,
    TENSORS,
    checksum,
    is_file,
    is_own,
    others_in,
    part_file,
    read_rows,
    read_tensors,
    write_tensors,
)
from steerlens.runs.record import (
    PARTS,
    RECORD,
    REPORT,
    STARTED,
    check_run_folder,
    differences,
    is_run_file,
    now,
    read_directions,
    read_record,
    sealed,
    versions,
    write_directions,
)
from steerlens.tables import to_frame, write_parquet


@dataclass(frozen=True)
class Started:
    """What an unfinished run was asked for, and what it has: hooks of a sweep, other parts."""

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
            hooks = f"{len(self.has_part)} of {len(self.request['hook_names'])} hooks"
            return f"{hooks} and {self.n_parts} parts of others" if self.n_parts else hooks
        return f"{self.n_parts} parts"


def resume_command(request: Mapping[str, Any]) -> str:
    """What goes on with a run, but for its folder."""
    return f"steerlens {request.get('command', 'sweep')} --resume"


def read_started(folder: Path) -> Started | None:
    """What the unfinished run in a folder is; None when there is none, or it is finished.

    Raises `FileError` when the record is damaged, and where `parts` is a link.
    """
    inside = folder / PARTS
    path = inside / STARTED
    if (folder / RECORD).exists() or not path.exists():
        return None
    try:
        if path.parent.is_symlink():
            raise ValueError(f"{PARTS} is a link")
        record = read_record(path, "options")
        names = [str(name) for name in record["request"]["hook_names"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{str(path)!r} is not the record of an unfinished run ({error}); choose another --out "
            "or move it away"
        ) from error
    has_part = tuple(name for i, name in enumerate(names) if part_file(folder, i).exists())
    n_parts = sum(
        TENSORS.fullmatch(path.name) is not None and not path.name.startswith(UNSTEERED)
        for path in inside.iterdir()
    )
    return Started(record["request"], record["options"], record["versions"], has_part, n_parts)


def read_finished(path: Path) -> dict[str, Any]:
    """The record of a finished run, by its run.json or folder. Raises `FileError` if it is none."""
    path = path / RECORD if path.is_dir() else path
    try:
        return read_record(path, "options")
    except ValueError as error:
        raise FileError(
            f"{str(path)!r} is not the record of a run that can be repeated ({error}); expected "
            f"the {RECORD} of a finished run, written by this steerlens or a newer one"
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
        """Those kept, at `hook_names` (None: the request's); else those of `fit`, then kept."""
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
        """What is kept under a name; None where nothing is, with a warning where it is damaged.

        Raises `FileError` when it is of another measurement than the one that `of` names.
        """
        path = self._path(name)
        if not path.exists():
            return None
        read = read_rows if path.suffix == ".parquet" else read_tensors
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
        """Write a part, which is then on the disk. Raises `FileError` when it cannot be written."""
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
            frame = to_frame(kept.rows, "sweep", attrs)
            frame.attrs["sha256"] = checksum(frame)
            self._write(path, partial(write_parquet, frame))
        else:
            self._write(path, partial(write_tensors, kept.tensors, attrs))

    def _path(self, name: str) -> Path:
        """A table where the name is that of a hook."""
        if name in self._hook_names:
            return part_file(self._folder, self._hook_names.index(name))
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
    warnings so far. Raises `FileError` as `check_run_folder` does, where another run is at work
    there or left parts, and with `resume` without an unfinished run of this request and versions.

    Examples:
        >>> from steerlens.runs.unfinished import open_parts, read_started
        >>> request = {"hook_names": directions.hook_names, "seed": 0}
        >>> with open_parts(folder, request, options={}) as parts:
        ...     _ = sl.sweep(model, pairs, directions, coefficients=[0, 4], checkpoint=parts)
        ...     len(read_started(folder).has_part)
        5
    """
    with locked(folder, is_folder=True):
        if resume:
            _check_same(folder, request)
        else:
            _check_new(folder, request)
            _remove_parts(folder)
            _start(folder, request, options)
        try:
            yield Parts(folder, request, warned)
        except BaseException as error:
            if not _is_worth_keeping(folder, error):
                _remove_parts(folder)
            raise
        _clear(folder)


def clear_finished(folder: Path) -> None:
    """Remove what a kill left beside a finished run. Raises `FileError` if its record is none."""
    with locked(folder, is_folder=True):
        try:
            if (folder / RECORD).exists():
                read_record(folder / RECORD)
        except ValueError as error:
            raise FileError(
                f"{str(folder / RECORD)!r} is not the record of a run ({error}); start one with "
                "another --out"
            ) from error
        _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the parts, and what a kill half way through a file left beside it."""
    _remove_parts(folder)
    for path in folder.iterdir():
        left = TEMPORARY.fullmatch(path.name)
        if left and left["name"] == PARTS:
            _remove_folder(path)
        # A report is written by another command, which may be at it.
        elif left and _is_left(left["name"]) and is_file(path):
            with suppress(OSError):
                path.unlink()


def _is_left(name: str) -> bool:
    return name == PROBE or (is_run_file(name) and name != REPORT)


def _remove_parts(folder: Path) -> None:
    """Remove the parts, if they are of a run; what else lies among them stays."""
    inside = folder / PARTS
    with suppress(OSError):
        if is_own(inside / STARTED) and not others_in(inside):
            gone = temporary_name(inside)  # so that a kill leaves no half of them under their name
            inside = inside.rename(gone)
    if is_own(inside / STARTED):
        _remove_folder(inside)


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):
        if not folder.is_symlink():
            for path in [path for path in folder.iterdir() if is_own(path)]:
                path.unlink()
            folder.rmdir()


def _has_parts(inside: Path) -> bool:
    return any(inside.glob("*.parquet")) or any(inside.glob("[0-9a-f]*.safetensors"))


def _is_worth_keeping(folder: Path, error: BaseException) -> bool:
    """Whether there is something to go on with, or tables that only the request makes known."""
    inside = folder / PARTS
    if _has_parts(inside) or isinstance(error, FileError):
        return True
    if not (folder / RECORD).exists() and any(is_run_file(path.name) for path in folder.iterdir()):
        return True
    return (inside / DIRECTIONS).exists() and not isinstance(error, SteerlensError)


def _check_new(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise `FileError` unless a run of `request` may begin in a folder."""
    inside = folder / PARTS
    started = read_started(folder)
    if started is not None and (_has_parts(inside) or (inside / DIRECTIONS).exists()):
        raise FileError(
            f"{str(folder)!r} holds an unfinished run; `{started.resume} {folder}` goes on with "
            "it; or choose another --out or delete it"
        )
    is_begun = started is not None and not differences(started.request, request)
    check_run_folder(folder, request, is_begun=is_begun)
    if os.path.lexists(inside):
        others = others_in(inside) if (inside / STARTED).exists() else [PARTS]
        if others:
            raise FileError(
                f"{str(folder)!r} holds {', '.join(others)}, not of a run, where the parts of this "
                f"one would be written ({PARTS}); choose another --out or move it away"
            )


def _start(folder: Path, request: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    record = {
        "request": dict(request),
        "options": dict(options),
        "versions": versions(),
        "started": now(),
    }
    made = temporary_name(folder / PARTS)  # a folder of parts is never without its record
    try:
        made.mkdir()
        write_whole(made / STARTED, partial(write_json, sealed(record)))
        made.rename(folder / PARTS)
    except OSError as error:
        _remove_folder(made)
        raise cannot_write(folder, error) from error


def changes(earlier: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """What an earlier record says otherwise than `request` and the versions that are here."""
    of_versions = differences(earlier["versions"], versions())
    named = (f"version of {text}" for text in of_versions)
    return [*differences(earlier["request"], request), *named]


def _check_same(folder: Path, request: Mapping[str, Any]) -> None:
    started = read_started(folder)
    if started is None:
        raise FileError(f"{str(folder)!r} holds no unfinished run; start one with --out")
    if changed := changes(vars(started), request):
        raise FileError(
            f"the unfinished run in {str(folder)!r} was begun with other {', '.join(changed)}; go "
            "on as it was begun, or start again in another --out"
        )
