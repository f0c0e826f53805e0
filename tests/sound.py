"""What a reader took, held against the bytes: a file that is read must be read as it is."""

import csv
import io
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import steerlens as sl
from steerlens.runs.contents import COMMANDS, TABLES
from steerlens.steering.vector_file import KEY


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, whose keys differ."""
    assert len(dict(items)) == len(items)
    return dict(items)


def check_lines(content: bytes, found: Any, keys: tuple[str, ...]) -> None:
    """Every line that is not blank is an item, with the texts it says and an id of its own."""
    lines = re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
    records = [json.loads(line, object_pairs_hook=unique) for line in lines if line.strip()]
    assert len(records) == len(found) >= 2
    assert len({item.id for item in found}) == len(found)
    for record, item in zip(records, found, strict=True):
        record = {key.strip().lower(): value for key, value in record.items()} | record
        for key in keys:
            given, made = record[key], getattr(item, key)
            if not isinstance(made, str):
                made = [(message.role, message.content) for message in made]
                given = [(message["role"], message["content"]) for message in given]
            assert made == given != ""
            json.dumps(made, ensure_ascii=False).encode()


def check_pairs(content: bytes, found: sl.ContrastivePairs) -> None:
    check_lines(content, found, ("positive", "negative"))
    assert all(pair.positive != pair.negative for pair in found)


def check_items(content: bytes, found: sl.PreferenceItems) -> None:
    check_lines(content, found, ("prompt", "positive", "negative"))


def check_rows(found: sl.SteeringVector) -> None:
    """Unit directions and finite scales."""
    assert len(found.hook_names) == len(found.rows) >= 1
    assert torch.isfinite(found.rows).all()
    assert torch.isfinite(found.scale).all()
    norms = torch.linalg.vector_norm(found.directions, dim=-1)
    assert torch.allclose(norms, torch.ones(len(norms)), atol=1e-3)


def check_vector(content: bytes, found: sl.SteeringVector) -> None:
    """The directions are the bytes of the file, and writing and reading it again is the same."""
    check_rows(found)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length], object_pairs_hook=unique)
    record = json.loads(header["__metadata__"][KEY], object_pairs_hook=unique)
    assert tuple(record["hooks"]) == found.hook_names
    assert np.array_equal(np.float32(record["scale"]), found.scale.numpy())
    for name, direction in zip(found.hook_names, found.directions, strict=True):
        start, end = header[name]["data_offsets"]
        row = np.frombuffer(content[8 + length :][start:end], dtype="<f4")
        assert np.array_equal(row, direction.numpy())


def check_gguf(content: bytes, found: sl.SteeringVector) -> None:
    """The rows are those that the gguf package reads."""
    check_rows(found)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        path.write_bytes(content)
        reader = gguf.GGUFReader(str(path))
        rows = {tensor.name: np.float32(tensor.data) for tensor in reader.tensors}
    blocks = {int(name.removeprefix("direction.")): row for name, row in rows.items()}
    assert {f"blocks.{block}.hook_resid_post" for block in blocks} == set(found.hook_names)
    for block, row in blocks.items():
        ours = found.at(block).rows[0].numpy()
        assert np.allclose(ours, row, rtol=0, atol=1e-5 * abs(row).max())


def check_record(content: bytes, found: sl.runs.Run) -> None:
    assert json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique) == found.record
    assert found.command in COMMANDS
    assert 0 <= found.record["seconds"] < math.inf


def check_csv(content: bytes, found: sl.runs.Run) -> None:
    """Every cell of writers.csv is what the file says."""
    text = content.decode("utf-8-sig")
    names, *rows = csv.reader(io.StringIO(text, newline=""))
    frame = found.tables["writers"]
    assert (list(frame), len(frame)) == (names, len(rows))
    for name, given in zip(names, zip(*rows, strict=True), strict=True):
        values = frame[name].tolist()
        if frame[name].dtype == "float64":
            expected: list[Any] = [float(text) if text else math.nan for text in given]
            assert np.array_equal(values, expected, equal_nan=True)
        else:
            assert [str(value) for value in values] == [
                str(int(text)) if frame[name].dtype == "int64" else text for text in given
            ]


def check_table(content: bytes, found: sl.runs.Run) -> None:
    """Of a file that its record fits: the declared columns and types, whatever the cells."""
    frame = found.tables["writers"]
    # Texts are objects in pandas 2.
    found_types = {name: str(t).replace("object", "str") for name, t in frame.dtypes.items()}
    assert found_types == {column.name: column.dtype for column in TABLES["writers"].columns}


def check_page(content: bytes, found: sl.runs.Run) -> None:
    """Every view of attention.html stands in the file."""
    views = [view for view in found.views if view.page == "attention"]
    assert 1 <= len(views) <= content.lower().count(b"<script")
    assert all(isinstance(view.title, str) and isinstance(view.props, dict) for view in views)


CHECKS: dict[str, Callable[[bytes, Any], None]] = {
    "pairs": check_pairs,
    "items": check_items,
    "vectors": check_vector,
    "ggufs": check_gguf,
    "records": check_record,
    "csvs": check_csv,
    "tables": check_table,
    "pages": check_page,
}
