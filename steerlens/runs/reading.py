"""A run folder read back: its record, its tables, the views on its pages."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.errors import FileError, InputError
from steerlens.files import read_whole, strict_json
from steerlens.runs.contents import COMMANDS, NEEDED, PAGES, TABLES, Kind
from steerlens.runs.record import FORMAT, PARTS, RECORD, SEAL, is_sealed
from steerlens.runs.unfinished import read_started
from steerlens.steering import parse_coefficient
from steerlens.tables import read_csv

MAX_NUMBER = 1e18
_KINDS: Mapping[str, Kind] = {
    "request": dict,
    "finished": str,
    "seconds": (int, float),
    "forward_equivalents": (int, float, type(None)),
    "warnings": list,
    "versions": dict,
    "machine": dict,
    "tables": dict,
    "files": dict,
}
LINES = "generations.jsonl"
_LINE: Mapping[str, Kind] = {
    **dict.fromkeys(("prompt", "subject", "hook_name", "strength", "text", "end"), str),
    **dict.fromkeys(("prompt_number", "sample"), int),
    "coefficient": (int, float, type(None)),
    "scores": dict,
}
_PAGES = tuple(f"{page}.html" for page in PAGES)
# What circuitsvis draws from stands in scripts, as JSON in which no `<` does.
_VIEW = re.compile(r'<script[^>]* class="circuitsvis-data"[^>]*>([^<]*)</script>')


@dataclass(frozen=True)
class View:
    """A view on one of a run's pages, and what circuitsvis draws it from."""

    page: str
    title: str
    props: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """What a command wrote into a folder: `record` is its run.json, `tables` by file name.

    Each table has the attrs it was written with; `views` are those on its pages of attention and
    tokens, `texts` the lines of `generations.jsonl`.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    views: tuple[View, ...] = ()
    texts: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.command}, {', '.join(self.tables)})"

    @property
    def command(self) -> str:
        """The command that wrote it."""
        return str(self.request["command"])

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked for."""
        request: Mapping[str, Any] = self.record["request"]
        return request


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run, all of whose files must be as the run wrote them.

    Args:
        folder: the `--out` folder of a command.

    Returns:
        Its record, its tables with the attrs that they were written with, and its views.

    Raises:
        FileError: there is no run.json, or it is damaged or of another version; the run is
            unfinished (the message names the hooks that are finished); or a file of the run is
            missing, cut off or changed (it is named, with what to do).

    Examples:
        >>> run = sl.read_run(run_folder)
        >>> run
        Run('run', sweep, sweep, layers, points, generations, tokens)
        >>> len(run.tables["layers"])
        30
    """
    try:
        folder = Path(folder)
    except TypeError as error:
        raise FileError(f"expected the folder of a run, got {folder!r:.80}") from error
    record = _read_record(folder)
    again = _again(folder, record)
    views: list[View] = []
    texts: list[Mapping[str, Any]] = []
    for name, sums in record["files"].items():
        content = _read(folder / name, sums, again)
        if name in _PAGES:
            views += _views(folder / name, content, again)
        elif name == LINES:
            texts = _texts(folder / name, content, again)
    tables = {
        name: _read_table(folder / f"{name}.csv", entry, again)
        for name, entry in record["tables"].items()
    }
    return Run(folder.resolve().name, record, tables, tuple(views), tuple(texts))


# The record


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not _exists(folder):
        raise _no_run(folder, "no such folder")
    started = read_started(folder)
    if started is not None:
        cells = f"pandas.read_parquet({str(folder / PARTS)!r}) has the cells of "
        raise FileError(
            f"{str(folder)!r} is an unfinished run, with {started.finished} finished; "
            f"`{started.resume} {folder}` goes on with it"
            + (f"; {cells}{', '.join(started.has_part)}" if started.has_part else "")
        )
    if not _exists(path):
        raise _no_run(folder, f"it holds no {RECORD}")
    again = "run the command once more, into a new --out"
    content = read_whole(path, FileError)
    try:
        record = strict_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise FileError(f"{str(path)!r} is not a run record ({error}); {again}") from error
    if not isinstance(record, dict) or not _is(record.get("request"), dict):
        raise FileError(f"{str(path)!r} is not a run record: 'request' is missing; {again}")
    _check_format(path, record)
    if fault := _fault(record):
        raise FileError(f"{str(path)!r} is not a whole run record: {fault}; {again}")
    if not is_sealed(record):
        raise FileError(
            f"{str(path)!r} was changed since the run wrote it (its {SEAL!r} is of other settings "
            f"or numbers); put it back as it was, or {again}"
        )
    return record


def _no_run(folder: Path, reason: str) -> FileError:
    return FileError(
        f"{str(folder)!r} is not the folder of a run: {reason}; give the --out folder of "
        f"{', '.join(COMMANDS)}"
    )


def _check_format(path: Path, record: Mapping[str, Any]) -> None:
    """Raise `FileError` on a record of an older or newer steerlens."""
    if record.get("format") == FORMAT:
        return
    again = _again(path.parent, record)
    if "format" in record:
        raise FileError(
            f"{str(path)!r} has format {record['format']!r:.80}, expected {FORMAT}: it may be of a "
            f"newer steerlens; read it with that, or {again}"
        )
    raise FileError(
        f"{str(path)!r} is of steerlens 0.1.0, which did not record the sha256 of its files, so "
        f"nothing tells whether they are as they were written; {again}"
    )


def _again(folder: Path, record: Mapping[str, Any]) -> str:
    """How the run of a record is made again."""
    command = record["request"].get("command")
    if command == "sweep" and "options" in record:
        return f"run it once more: `steerlens sweep --from {folder / RECORD} --out NEW`"
    named = f"`steerlens {command}`" if command in COMMANDS else "the command"
    return f"run {named} once more, into a new --out (`request` in {RECORD} has its settings)"


def _fault(record: Mapping[str, Any]) -> str:
    """What a report needs and the record lacks, in words; "" where it is whole."""
    for name, kind in _KINDS.items():
        if not _is(record.get(name), kind) or name not in record:
            return f"expected {', '.join(_KINDS)}, and {name!r} is missing or of another kind"
    if not all(isinstance(text, str) for text in record["warnings"]):
        return "warnings are texts"
    numbers = (record["seconds"], record["forward_equivalents"] or 0)
    if not all(0 <= number < MAX_NUMBER for number in numbers):
        return f"seconds and forward_equivalents are numbers from 0 to {MAX_NUMBER:g}"
    for name, sums in record["files"].items():
        is_plain = re.fullmatch(r"[\w-][\w.-]*", name) is not None
        if not is_plain or not _is(sums, dict) or {*sums} != {"bytes", "sha256"}:
            return f"{name!r} in its files is no plain file name with bytes and sha256"
    for name, entry in record["tables"].items():
        is_whole = _is(entry, dict) and _is(entry.get("rows"), int)
        if name not in TABLES or not is_whole or not _is(entry.get("attrs"), dict):
            return f"this steerlens does not know its table {name!r}, or it has no rows and attrs"
        if f"{name}.csv" not in record["files"]:
            return f"its files lack that of the table {name!r}"
    return _fault_of_command(record["request"], record["tables"])


def _fault_of_command(request: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """What the summary of its command needs and a run lacks, in words."""
    command = request.get("command")
    if command not in COMMANDS:
        return (
            f"it is of {command!r}, expected one of {', '.join(COMMANDS)} (is it of a newer one?)"
        )
    needed, kinds = NEEDED[command]
    missing = [f"the table {name!r}" for name in needed if name not in tables]
    missing += [f"{n!r} in its request" for n in kinds if not _is(request.get(n), kinds[n])]
    for name in ("fitted_on", "chosen_on", "measured_on"):
        size = "n_items" if command == "compare" and name != "fitted_on" else "n_pairs"
        data = request.get(name)
        if isinstance(data, dict) and not {"name", size} <= {*data}:
            missing.append(f"name and {size} in its {name!r}")
    return f"a {command} has {missing[0]}, which is missing or of another kind" if missing else ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or with a null character
        return False


def _is(value: Any, kind: Kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# Its files


def _read(path: Path, sums: Mapping[str, Any], again: str) -> bytes:
    """The bytes of a file of a run. Raises `FileError` where they are not those it wrote."""
    if not _exists(path):
        raise FileError(f"{str(path)!r} is missing, and the run wrote it; put it back, or {again}")
    content = read_whole(path, FileError)
    if hashlib.sha256(content).hexdigest() == sums["sha256"]:
        return content
    is_shorter = isinstance(sums["bytes"], int) and len(content) < sums["bytes"]
    fault = f"has {len(content)} of {sums['bytes']} bytes: cut off or" if is_shorter else "was"
    raise FileError(
        f"{str(path)!r} {fault} changed since the run wrote it ({RECORD} has its sha256); put back "
        f"the file as it was and edit a copy elsewhere, or {again}"
    )


def _read_table(path: Path, entry: Mapping[str, Any], again: str) -> pd.DataFrame:
    try:
        names = [str(name) for name in pd.read_csv(path, nrows=0).columns]
        columns = TABLES[path.stem].columns_of(names)
        table = read_csv(path, columns)
        if len(table) != entry["rows"]:
            raise ValueError(f"{len(table)} rows, and {RECORD} says {entry['rows']}")
    except (ValueError, OverflowError) as error:
        raise FileError(f"{str(path)!r} cannot be read as CSV ({error}); {again}") from error
    expected = [column.name for column in columns]
    if names != expected:
        missing = ", ".join(name for name in expected if name not in names)
        unknown = ", ".join(name for name in names if name not in expected)
        raise FileError(
            f"{str(path)!r} is of another steerlens: its columns lack {missing or 'none'} and have "
            f"{unknown or 'none'} besides, or are in another order than {', '.join(expected)}; "
            f"{again}"
        )
    table.attrs.update(entry["attrs"])
    return table


def _views(path: Path, content: bytes, again: str) -> list[View]:
    """The views of a page. Raises `FileError` where it has none, or others than it should."""
    try:
        records = [strict_json(text) for text in _VIEW.findall(content.decode())]
        if any(record["view"] != PAGES[path.stem].view for record in records) or not records:
            raise ValueError(f"it has no views, or not only {PAGES[path.stem].view}")
        views = [View(path.stem, record["title"], record["props"]) for record in records]
        if not all(isinstance(v.title, str) and isinstance(v.props, dict) for v in views):
            raise TypeError("a view's title is text and its props an object")
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{str(path)!r} is not a page of steerlens ({error}); {again}") from error
    return views


def _texts(path: Path, content: bytes, again: str) -> list[Mapping[str, Any]]:
    """The lines of a file of texts. Raises `FileError` on what is none of `behave`."""
    try:
        lines = [strict_json(line) for line in content.decode().split("\n") if line]
        for line in lines:
            if not all(_is(line[name], kind) for name, kind in _LINE.items()):
                raise ValueError(f"expected {', '.join(_LINE)}")
            parse_coefficient(line["strength"])
            json.dumps(line, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (InputError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{str(path)!r} has no texts of behave ({error}); {again}") from error
    return lines
