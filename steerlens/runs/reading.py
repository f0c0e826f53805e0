"""A run folder read back: its record, its tables, the views on its pages."""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.errors import FileError
from steerlens.files import read_whole, strict_json
from steerlens.runs.html_report.contents import COMMANDS, NEEDED, PAGES, TABLES, TableContent
from steerlens.runs.record import PARTS, RECORD, RUN_FILES
from steerlens.runs.unfinished import read_started
from steerlens.tables import Column

MAX_NUMBER = 1e18
_PARTS: dict[str, type | tuple[type, ...]] = {
    "request": dict,
    "finished": str,
    "seconds": (int, float),
    "forward_equivalents": (int, float, type(None)),
    "warnings": list,
    "versions": dict,
    "machine": dict,
    "tables": dict,
    "pages": list,
}


@dataclass(frozen=True)
class View:
    """A view on one of a run's pages, and what circuitsvis draws it from."""

    page: str
    title: str
    props: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a command wrote into a folder: `record` is its run.json, `tables` by file name.

    Each table has the attrs it was written with; `views` are those on the pages in `PAGES`.
    """

    name: str
    record: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    views: tuple[View, ...] = ()

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.command}, {', '.join(self.tables)})"

    @property
    def command(self) -> str:
        """The command that wrote it."""
        return str(self.request["command"])

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked for."""
        asked: Mapping[str, Any] = self.record["request"]
        return asked


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run: run.json, the tables that it names, the views on its pages.

    Raises `FileError` when the folder has no run.json, or is that of an unfinished run (naming
    the hooks that are finished), the record is damaged or of an unknown command, a table, or a page
    whose views are shown, is missing or cut off, or a table's columns or cells are not those
    expected; the message names the file, what was expected, and what to do.

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
    command = record["request"]["command"]
    tables = {
        name: _read_table(folder / f"{name}.csv", TABLES[name], kept, command)
        for name, kept in record["tables"].items()
    }
    views = [
        view
        for page in record["pages"]
        if page in PAGES
        for view in _read_views(folder / f"{page}.html", page, command)
    ]
    return Run(folder.resolve().name, record, tables, tuple(views))


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    started = read_started(folder) if _exists(folder) else None
    if started is not None:
        done, n_hooks = started.has_part, len(started.hook_names)
        raise FileError(
            f"{str(folder)!r} is an unfinished run, with {len(done)} of {n_hooks} hooks finished "
            f"({', '.join(done) or 'none'}); `steerlens sweep --resume {folder}` goes on with it, "
            f"pandas.read_parquet({str(folder / PARTS)!r}) has the cells of those"
        )
    if not _exists(path):
        what = "no such folder" if not _exists(folder) else f"it holds no {RECORD}"
        raise FileError(
            f"{str(folder)!r} is not the folder of a run: {what}; give the --out folder of "
            f"{', '.join(COMMANDS)}"
        )
    again = "run the command once more, into a new --out"
    try:
        record = strict_json(read_whole(path, FileError).decode("utf-8-sig"))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{str(path)!r} is not a run record ({error}); {again}") from error
    for name, kind in _PARTS.items():
        if not isinstance(record, dict) or name not in record or not _is(record[name], kind):
            raise FileError(
                f"{str(path)!r} is not a whole run record: expected {', '.join(_PARTS)}, and "
                f"{name!r} is missing or of another kind; it may be of an older steerlens: {again}"
            )
    strings = (*record["pages"], *record["warnings"])
    numbers = (record["seconds"], record["forward_equivalents"] or 0)
    if not all(isinstance(s, str) for s in strings) or not all(
        0 <= n < MAX_NUMBER for n in numbers
    ):
        raise FileError(
            f"{str(path)!r} is not a whole run record: pages and warnings are texts, seconds and "
            f"forward_equivalents numbers from 0 to {MAX_NUMBER:g}; {again}"
        )
    unknown = [page for page in record["pages"] if f"{page}.html" not in RUN_FILES]
    if unknown:
        raise FileError(
            f"{str(path)!r} names a page {unknown[0]!r} that this steerlens does not know; {again}"
        )
    command = record["request"].get("command")
    if command not in COMMANDS:
        raise FileError(
            f"{str(path)!r} is the record of {command!r}; expected one of {', '.join(COMMANDS)}: "
            "it may be of a newer steerlens"
        )
    for name, kept in record["tables"].items():
        is_whole = isinstance(kept, dict) and _is(kept.get("rows"), int)
        if name not in TABLES or not is_whole or not isinstance(kept.get("attrs"), dict):
            raise FileError(
                f"{str(path)!r} names a table {name!r} that this steerlens does not know, or not "
                f"its rows and attrs; expected some of {', '.join(TABLES)}: {again}"
            )
    missing = _missing(record)
    if missing:
        raise FileError(
            f"{str(path)!r} is not a whole run record: a {command} has {missing}, which is missing "
            f"or of another kind; it may be of an older steerlens: {again}"
        )
    return dict(record)


def _missing(record: Mapping[str, Any]) -> str:
    """What a report needs of this command and the record lacks, in words; "" where it is whole."""
    request = record["request"]
    needed = NEEDED[request["command"]]
    for name in needed.tables:
        if name not in record["tables"]:
            return f"the table {name!r}"
    for name, kind in needed.request.items():
        if not _is(request.get(name), kind):
            return f"{name!r} in its request"
    for name in ("fitted_on", "chosen_on", "measured_on"):
        of_items = request["command"] == "compare" and name != "fitted_on"
        size, given = "n_items" if of_items else "n_pairs", request.get(name)
        if isinstance(given, dict) and not {"name", size} <= {*given}:
            return f"name and {size} in its {name!r}"
    return ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _read_table(
    path: Path, content: TableContent, kept: Mapping[str, Any], command: str
) -> pd.DataFrame:
    again = f"run `steerlens {command}` once more, into a new --out"
    try:
        text = _read_text(path, again)
        names, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except FileError:
        raise
    except (ValueError, csv.Error) as error:
        raise FileError(f"{str(path)!r} cannot be read as CSV ({error}); {again}") from error
    columns = _columns_of(path, names, content, again)
    if len(rows) != kept["rows"]:
        raise FileError(
            f"{str(path)!r} has {len(rows)} rows, and {RECORD} says {kept['rows']}: it was cut off "
            f"or changed; {again}"
        )
    for line, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise FileError(
                f"{str(path)!r}, row {line - 1}: expected {len(names)} cells, got {len(row)}; "
                f"{again}"
            )
    frame = pd.DataFrame(
        {
            column.name: pd.Series(
                _cells(path, column, [row[i] for row in rows], again), dtype=column.dtype
            )
            for i, column in enumerate(columns)
        }
    )
    frame.attrs.update(kept["attrs"])
    return frame


def _read_text(path: Path, again: str) -> str:
    """Of a file that the record names."""
    if not _exists(path):
        raise FileError(
            f"{str(path)!r} is missing, and {RECORD} says that the run wrote it; put it back or "
            f"{again}"
        )
    return read_whole(path, FileError).decode("utf-8-sig")


def _columns_of(
    path: Path, names: Sequence[str], content: TableContent, again: str
) -> tuple[Column, ...]:
    columns = content.columns_of(names)
    expected = [column.name for column in columns]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise FileError(f"{str(path)!r} has the column {twice!r} twice; {again}")
    if list(names) != expected:
        missing = [name for name in expected if name not in names]
        unknown = [name for name in names if name not in expected]
        differs = [
            *([f"lacks {', '.join(missing)}"] if missing else []),
            *([f"has {', '.join(unknown)} besides"] if unknown else []),
        ]
        raise FileError(
            f"{str(path)!r} {' and '.join(differs) or 'has its columns in another order'}; "
            f"expected the columns {', '.join(expected)}: it may be of another steerlens; {again}"
        )
    return columns


def _cells(path: Path, column: Column, texts: Sequence[str], again: str) -> list[Any]:
    expected, read = _KINDS[column.dtype]
    made: list[Any] = []
    try:
        for text in texts:
            made.append(read(text))  # noqa: PERF401 (the length says which row failed)
    except (ValueError, KeyError, OverflowError) as error:
        raise FileError(
            f"{str(path)!r}, row {len(made) + 1}, column {column.name}: expected {expected}, got "
            f"{texts[len(made)][:80]!r}; {again}"
        ) from error
    return made


def _number(text: str) -> float:
    if not _PLAIN.fullmatch(text):  # float and int take 1_000 and other digits too
        raise ValueError(text)
    return float(text)


def _whole_number(text: str) -> int:
    if not _PLAIN.fullmatch(text) or abs(int(text)) >= 1 << 63:
        raise ValueError(text)
    return int(text)


_PLAIN = re.compile(r"[-+]?(?:[0-9.]+(?:[eE][-+]?[0-9]+)?|inf|nan)?")
_KINDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "float64": ("a number or nothing", lambda text: _number(text) if text else math.nan),
    "int64": ("a whole number", _whole_number),
    "bool": ("True or False", {"True": True, "False": False}.__getitem__),
    "str": ("text", str),
}


class _ViewData(HTMLParser):
    """The JSON of each view of circuitsvis on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_inside = tag == "script" and ("class", "circuitsvis-data") in attrs
        if self._is_inside:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self.found[-1] += data

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 (HTMLParser's signature)
        self._is_inside = False


def _read_views(path: Path, page: str, command: str) -> list[View]:
    again = f"run `steerlens {command}` once more, into a new --out"
    try:
        given = [strict_json(text) for text in _ViewData(_read_text(path, again)).found]
        views = [View(page, of["title"], of["props"]) for of in given]
        known = all(of["view"] == PAGES[page].view for of in given)
        if not all(isinstance(v.title, str) and isinstance(v.props, dict) for v in views):
            raise TypeError("a view's title is text and its props an object")
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        # AssertionError: what HTMLParser raises on a declaration that is none.
        raise FileError(f"{str(path)!r} is not a page of steerlens ({error}); {again}") from error
    if not views or not known:
        raise FileError(
            f"{str(path)!r} has no views, or not only {PAGES[page].view}: it may be of another "
            f"steerlens; {again}"
        )
    return views
