"""What people have, as rows: files of lines or tables, frames, datasets, lists."""

import ast
import csv
import gzip
import io
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from steerlens import files
from steerlens.data.shipped import dataset_names
from steerlens.errors import InputError, in_one_line, told
from steerlens.files import read_whole, strict_json

DELIMITERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
"""What may separate the cells of a file of that name."""
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")
_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(_|$)")
_WHOLE_FLOAT = re.compile(r"-?\d+\.0+")
_LINE_END = re.compile(r"\r\n|\r|\n")


class Row(NamedTuple):
    """A record (or text, or list), what errors call its place, and its id where it has none."""

    where: str
    id: str
    record: Any


@dataclass(frozen=True)
class Rows:
    """All rows of one source. Of a table every row has all columns; empty cells are None."""

    name: str
    rows: tuple[Row, ...]
    is_table: bool = False


def read_rows(source: Any, *, split: str, name: str) -> Rows:
    """The rows of a file, a folder or the name of a Hugging Face dataset, a frame, or a list.

    Args:
        source: A path, `OWNER/NAME` or `OWNER/NAME:SPLIT` of the Hub, a frame of pandas or polars
            (a lazy one is collected), a table of pyarrow, a `datasets.Dataset`, or an iterable of
            records.
        split: That of a dataset which has several.
        name: What errors call a source that has no name.

    Raises:
        InputError: Says which line or row cannot be read, and why.
    """
    if isinstance(source, str | os.PathLike):
        return _of_split(_of_path(source, split), split)
    if isinstance(source, Mapping) and source and all(map(is_table, source.values())):
        source = source[_split_of(list(source), split, name)]
    if hasattr(source, "collect_schema") and hasattr(source, "collect"):  # polars, lazy
        source = source.collect()
    has_columns = is_table(source)
    records: Iterable[Any]
    if hasattr(source, "to_dicts"):  # polars
        records = source.to_dicts()
    elif isinstance(source, pd.DataFrame):
        records = source.to_dict("records")
    elif hasattr(source, "to_pylist"):  # pyarrow
        records = source.to_pylist()
    elif isinstance(source, Mapping):
        records = [source]
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        records = source
    else:
        raise InputError(
            f"{name}: expected a file, a frame, a dataset or a list of records, got {told(source)} "
            f"({type(source).__name__})"
        )
    return _of_split(Rows(name, _numbered(f"{name}: record {{}}", records), has_columns), split)


def _of_split(rows: Rows, split: str) -> Rows:
    """The rows of one split, where one object has them by split."""
    record = rows.rows[0].record if len(rows.rows) == 1 else None
    if not isinstance(record, dict) or not record or rows.is_table:
        return rows
    if not all(
        isinstance(part, list | dict) and _SPLIT.match(str(key)) for key, part in record.items()
    ):
        return rows
    name = _split_of(list(record), split, rows.name)
    part = record[name] if isinstance(record[name], list) else [record[name]]
    return Rows(rows.name, _numbered(f"{rows.name}: {name} {{}}", part))


def is_table(source: Any) -> bool:
    """Whether it is a frame, a table or a dataset."""
    return any(hasattr(source, of) for of in ("to_dicts", "to_pylist", "features")) or isinstance(
        source, pd.DataFrame
    )


def _numbered(where: str, records: Iterable[Any]) -> tuple[Row, ...]:
    return tuple(
        Row(where.format(i), str(i), plain(record)) for i, record in enumerate(records, start=1)
    )


def plain(value: Any) -> Any:
    """A record of Python's own values: None for NaN, lists for arrays, a dict for a dataclass."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(cell) for key, cell in value.items()}
    if isinstance(value, np.ndarray | list):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    is_nan = isinstance(value, float) and value != value
    return None if is_nan or value is pd.NA else value


def _of_path(source: str | os.PathLike[str], split: str) -> Rows:
    path = Path(source)
    name = printable(path)
    if os.path.isdir(source):
        return _of_dataset(str(path), split, is_folder=True)
    if isinstance(source, str) and not os.path.exists(source):
        named = _HUB_NAME.fullmatch(source)
        if named and path.suffix.lower() not in (*DELIMITERS, *_SUFFIXES):
            return _of_dataset(named[1], named[2] or split)
        shipped = ", ".join(dataset_names())
        raise InputError(
            f"{source!r} is neither a file nor a shipped dataset ({shipped}) nor OWNER/NAME of a "
            "Hugging Face dataset"
        )
    raw = read_whole(path, InputError, pipes=True)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        raw, suffix = _unpacked(raw, name), Path(path.stem).suffix.lower()
    if suffix in (".parquet", ".pq") or raw.startswith(b"PAR1"):
        return Rows(name, _of_parquet(raw, name), is_table=True)
    if suffix in DELIMITERS:
        return Rows(name, tuple(_of_table(_decoded(raw, name), DELIMITERS[suffix], name)), True)
    if suffix == ".txt":
        return Rows(name, _numbered(f"{name}: text {{}}", _lines(_decoded(raw, name))))
    try:
        return Rows(name, _of_json(raw, name, is_whole=suffix == ".json"))
    except InputError as error:
        if suffix in _SUFFIXES:
            raise
        raise InputError(f"{error}; texts, one a line, are in a file named .txt") from error


def _unpacked(raw: bytes, name: str) -> bytes:
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            content = file.read(files.MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: not a whole gzip file ({in_one_line(error)})") from error
    if len(content) > files.MAX_BYTES:
        raise InputError(f"{name}: unpacks to more than {files.MAX_BYTES} bytes; split it")
    return content


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_LINE_END.split(raw[: error.start].decode("utf-8", "replace")))
        raise InputError(
            f"{name}:{line}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def _of_parquet(raw: bytes, name: str) -> tuple[Row, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(io.BytesIO(raw)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{name}: not a Parquet file ({in_one_line(error)})") from error
    return _numbered(f"{name}: row {{}}", records)


def _of_table(text: str, delimiters: str, name: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file; an empty cell is None, "1.0" in a column of such is "1"."""
    header = next(iter(_LINE_END.split(text)))
    cells = {d: len(next(csv.reader([header], delimiter=d), [])) for d in delimiters}
    # A comma by its name; another one where no comma is there.
    delimiter = next((d for d, n in cells.items() if n > 1), delimiters[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text, newline=""),
                sep=delimiter,
                dtype=str,
                keep_default_na=False,
                na_values=[""],
                index_col=False,
                skip_blank_lines=False,
            )
    except pd.errors.EmptyDataError:
        return
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InputError(
            f"{name}: not a table with the columns of its first line ({in_one_line(error)}); put "
            "cells that hold the separator in quotes"
        ) from error
    columns = {str(column).strip(): list(map(plain, frame[column])) for column in frame}
    for column, values in columns.items():
        if any(values) and all(value is None or _WHOLE_FLOAT.fullmatch(value) for value in values):
            columns[column] = [value and value.partition(".")[0] for value in values]
    line = 2 + sum(len(_LINE_END.findall(column)) for column in columns)
    for number, cells_ in enumerate(zip(*columns.values(), strict=True), start=1):
        record = {c: value and _chat(value) for c, value in zip(columns, cells_, strict=True)}
        if any(value is not None for value in cells_):
            yield Row(f"{name}:{line}", str(number), record)
        line += 1 + sum(len(_LINE_END.findall(value)) for value in cells_ if value is not None)


def _chat(cell: str) -> Any:
    """The messages that a cell of a table holds as JSON or as Python writes them, or its text."""
    if not cell.startswith(("[{", "{")):
        return cell
    for parse in (strict_json, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(cell)
            messages = value if isinstance(value, list) else [value]
            if all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in messages):
                return value
    return cell


def _of_json(raw: bytes, name: str, *, is_whole: bool) -> tuple[Row, ...]:
    """Rows of JSONL, blank lines skipped; or of one JSON value over several lines."""
    try:
        rows = tuple(_of_lines(raw, name))
    except InputError as of_line:
        try:
            value = strict_json(raw.decode("utf-8-sig"))
        except ValueError as error:
            if is_whole and not isinstance(error, UnicodeDecodeError):
                raise InputError(f"{name}: neither JSON ({error}) nor JSONL ({of_line})") from error
            raise of_line from error
    else:
        if len(rows) != 1 or not isinstance(rows[0].record, list):
            return rows
        value = rows[0].record
    if isinstance(value, list):
        return _numbered(f"{name}: record {{}}", value)
    return (Row(name, "1", plain(value)),)


def _of_lines(raw: bytes, name: str) -> Iterator[Row]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = strict_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text ({error.reason})") from error
        except ValueError as error:
            raise InputError(f"{where}: not a JSON object on one line ({error})") from error
        yield Row(where, str(number), plain(value))


def _of_dataset(name: str, split: str, *, is_folder: bool = False) -> Rows:
    """A Hugging Face dataset by its own loading code: a folder, or a name of the Hub."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name!r} cannot be read: a Hugging Face dataset needs the package datasets; "
            "pip install 'steerlens[datasets]'"
        ) from error
    saved = ("dataset_info.json", "dataset_dict.json")
    is_saved = is_folder and any(os.path.isfile(os.path.join(name, file)) for file in saved)
    try:
        loaded = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
    except Exception as error:  # it raises what its many readers do
        no_file = "" if is_folder else "there is no such file, and "
        raise InputError(
            f"{name!r} cannot be read: {no_file}datasets says: {in_one_line(error)[:300]}; "
            "or load it yourself and give load the dataset"
        ) from error
    return read_rows(loaded, split=split, name=name)


def _split_of(names: Sequence[str], wanted: str, name: str) -> str:
    """The split of that name, or whose name begins so, or the only one."""
    fitting = [split for split in names if split == wanted] or [
        split for split in names if split.startswith(wanted) or len(names) == 1
    ]
    if len(fitting) != 1:
        raise InputError(
            f"{name!r} has the splits {', '.join(names)}, not {wanted!r}; name one by "
            "split=, or as OWNER/NAME:SPLIT"
        )
    return fitting[0]


def read_texts(path: Path) -> tuple[str, ...]:
    """The lines of a text file, without empty ones.

    Raises `InputError` when the file cannot be read as UTF-8 text, or holds no text.
    """
    texts = tuple(_lines(_decoded(read_whole(path, InputError, pipes=True), str(path))))
    if not texts:
        raise InputError(f"{str(path)!r} holds no text; give one text a line")
    return texts


def _lines(text: str) -> list[str]:
    # Cut at line ends alone: splitlines knows others, which a line of text may hold.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def printable(path: Path) -> str:
    """A file's name as text: it may hold bytes that are none."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no file has such a name
        return str(path).encode("utf-8", "backslashreplace").decode()
