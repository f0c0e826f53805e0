"""The corpus of bad files: `python tests/hostile.py` writes tests/files/hostile/."""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

import steerlens as sl
from steerlens.runs.record import sealed
from steerlens.steering.vector_file import KEY, encode

FOLDER = Path(__file__).resolve().parent / "files" / "hostile"
HOOK = "blocks.1.hook_resid_post"
PAIR = b'{"positive": "a", "negative": "b"}'
ITEM = b'{"prompt": "p", "positive": "a", "negative": "b"}'
DEEP = b"[" * 20_000 + b"]" * 20_000
LESS_DEEP = b"[" * 100 + b"]" * 100


class Bad(NamedTuple):
    """A file, and what the error says besides the file's name."""

    content: bytes
    told: tuple[str, ...]


def lines(good: bytes, second: bytes, end: bytes = b"\n") -> bytes:
    return end.join([good, second, good, b""])


def jsonl(good: bytes) -> dict[str, Bad]:
    """Bad JSONL files, the second line of three most often."""

    def put(key: bytes, value: bytes) -> bytes:
        record = json.loads(good)
        record.pop(key.decode(), None)
        rest = json.dumps(record)[1:-1].encode()
        return b"{" + rest + b', "' + key + b'": ' + value + b"}"

    return {
        "empty": Bad(b"", ("at least 2",)),
        "blank": Bad(b"\n \r\n\t\n", ("at least 2",)),
        "bom_alone": Bad(b"\xef\xbb\xbf", ("at least 2",)),
        "not_utf8": Bad(lines(good, put(b"positive", b'"\xff\xfe"')), (":2", "UTF-8")),
        "utf16": Bad(lines(good, good).decode().encode("utf-16"), (":1", "UTF-8")),
        "truncated": Bad(good + b"\n" + good[:-5], (":2", "JSON")),
        "nul": Bad(lines(good, b"\x00" * 16), (":2", "JSON")),
        "a_list": Bad(lines(good, b"[1, 2]"), (":2", "object")),
        "a_number": Bad(lines(good, b"1e999"), (":2", "object")),
        "null": Bad(lines(good, b"null"), (":2", "object")),
        "text": Bad(lines(good, b'"positive"'), (":2", "object")),
        "two_objects": Bad(lines(good, good + good), (":2", "JSON")),
        "key_twice": Bad(lines(good, put(b"x", b"1")[:-1] + b', "x": 2}'), (":2", "'x'", "twice")),
        "inner_key_twice": Bad(lines(good, put(b"x", b'[{"y": 1, "y": 1}]')), (":2", "'y'")),
        "missing": Bad(lines(good, b'{"positive": "a"}'), (":2", "negative")),
        "wrong_number": Bad(lines(good, put(b"positive", b"3")), (":2", "positive", "int")),
        "wrong_null": Bad(lines(good, put(b"negative", b"null")), (":2", "negative")),
        "wrong_bool": Bad(lines(good, put(b"negative", b"true")), (":2", "negative", "bool")),
        "wrong_object": Bad(lines(good, put(b"positive", b'{"role": "a"}')), (":2", "positive")),
        "empty_text": Bad(lines(good, put(b"positive", b'""')), (":2", "positive", "empty")),
        "surrogate": Bad(lines(good, put(b"positive", b'"\\ud800"')), (":2", "surrogate")),
        "equal": Bad(lines(good, put(b"negative", b'"a"')), (":2", "equal")),
        "id_list": Bad(lines(good, put(b"id", b"[1]")), (":2", "id", "list")),
        "id_float": Bad(lines(good, put(b"id", b"1.5")), (":2", "id", "float")),
        "id_bool": Bad(lines(good, put(b"id", b"true")), (":2", "id", "bool")),
        "id_taken": Bad(lines(good, put(b"id", b"1")), ("'1'", "twice")),
        "huge_number": Bad(lines(good, put(b"id", b"9" * 5000)), (":2", "JSON")),
        "deep": Bad(lines(good, DEEP), (":2", "nested")),
        "deep_inside": Bad(lines(good, put(b"positive", LESS_DEEP)), (":2", "nested")),
    }


def pairs() -> dict[str, Bad]:
    def messages(value: bytes) -> bytes:
        return lines(PAIR, b'{"positive": ' + value + b', "negative": "b"}')

    return {
        **jsonl(PAIR),
        "no_messages": Bad(messages(b"[]"), (":2", "positive", "empty")),
        "message_text": Bad(messages(b'["a"]'), (":2", "message 1", "role")),
        "role_number": Bad(messages(b'[{"role": 1, "content": "a"}]'), (":2", "role")),
        "content_list": Bad(messages(b'[{"role": "user", "content": ["a"]}]'), (":2", "content")),
        "misspelt": Bad(
            lines(PAIR, b'{"positive": "a", "negatve": "b"}'),
            (":2", "did you mean 'negatve'", "--columns negative=negatve"),
        ),
    }


def items() -> dict[str, Bad]:
    prompt = b'{"prompt": [[]], "positive": "a", "negative": "b"}'
    return {**jsonl(ITEM), "prompt_list": Bad(lines(ITEM, prompt), (":2", "prompt"))}


# Vectors


def _header(content: bytes, *, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def _entry(shape: Any, offsets: Any, dtype: Any = "F32") -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({HOOK: entry}).encode()


def vector() -> sl.SteeringVector:
    """What the good files hold."""
    return sl.SteeringVector.from_vectors({HOOK: torch.tensor([3.0, 4.0, 0.0, 0.0])})


def _made(row: torch.Tensor | None = None, **changes: Any) -> bytes:
    """A file whose checksum is right, of a vector that is not."""
    tensors, record = vector().to_record()
    if row is not None:
        tensors = {HOOK: row}
    return encode(tensors, record | changes)


def vectors() -> dict[str, Bad]:
    good = vector().to_bytes()
    row = torch.tensor([0.6, 0.8, 0, 0])
    metadata = {KEY: json.dumps({"format": "other"})}
    nested = json.dumps({"__metadata__": {KEY: "[" * 500 + "]" * 500}}).encode()
    twice = b'{"__metadata__": {"a": "1"}, "__metadata__": {"a": "2"}}'
    origin = vector().origin.to_dict()
    not_whole = ("safetensors",)
    return {
        "empty": Bad(b"", not_whole),
        "short": Bad(b"\x01\x02", not_whole),
        "truncated": Bad(good[:-3], not_whole),
        "longer": Bad(good + b"\x00" * 8, not_whole),
        "header_bomb": Bad(_header(b"{}", length=(1 << 63) - 1), not_whole),
        "header_100_gb": Bad(_header(b"{}", length=100 << 30), not_whole),
        "not_json": Bad(_header(b"{nothing}"), not_whole),
        "not_utf8": Bad(_header(b'{"\xff": 1}'), not_whole),
        "shape_bomb": Bad(_header(_entry([1 << 40, 1 << 40], [0, 8]), data=b"8" * 8), not_whole),
        "shape_negative": Bad(_header(_entry([-1], [0, 4]), data=b"4" * 4), not_whole),
        "offsets_bomb": Bad(_header(_entry([1], [0, 1 << 62])), not_whole),
        "offsets_backwards": Bad(_header(_entry([1], [4, 0]), data=b"4" * 4), not_whole),
        "dtype_unknown": Bad(_header(_entry([1], [0, 4], "F99"), data=b"4" * 4), not_whole),
        "dtype_number": Bad(_header(_entry([1], [0, 4], 1), data=b"4" * 4), not_whole),
        "nested": Bad(_header(nested), ("nested",)),
        "key_twice": Bad(_header(twice), ("safetensors",)),
        "no_metadata": Bad(save({HOOK: row}), ("no steering vector",)),
        "other_metadata": Bad(save({HOOK: row}, metadata), ("no steering vector",)),
        "changed": Bad(good[:-1] + b"\x01", ("checksum",)),
        "from_the_future": Bad(_made(version=99), ("version 99",)),
        "version_text": Bad(_made(version="1"), ("version '1'",)),
        "nan": Bad(_made(torch.full((4,), math.nan)), ("norm nan",)),
        "inf": Bad(_made(torch.full((4,), math.inf)), ("norm",)),
        "zero": Bad(_made(torch.zeros(4)), ("norm 0",)),
        "no_numbers": Bad(_made(torch.zeros(0)), ()),
        "two_rows": Bad(_made(torch.eye(4)), ()),
        "scalar": Bad(_made(torch.tensor(1.0)), ()),
        "hooks_text": Bad(_made(hooks=HOOK), ("does not fit",)),
        "hooks_numbers": Bad(_made(hooks=[1]), ("does not fit",)),
        "hooks_lists": Bad(_made(hooks=[[HOOK]]), ("does not fit",)),
        "hooks_none": Bad(_made(hooks=[]), ("hook",)),
        "hook_twice": Bad(_made(hooks=[HOOK, HOOK], scale=[1.0, 1.0]), ("different hooks",)),
        "hook_missing": Bad(_made(hooks=["../../etc/passwd"]), ("../../etc/passwd",)),
        "scale_nan": Bad(_made(scale=[math.nan]), ("scale",)),
        "scale_huge": Bad(_made(scale=[10**400]), ("does not fit",)),
        "scale_text": Bad(_made(scale=["1"]), ("does not fit",)),
        "scale_two": Bad(_made(scale=[1.0, 1.0]), ("scale",)),
        "operator_unknown": Bad(_made(operator={"name": "__class__"}), ("__class__",)),
        "operator_text": Bad(_made(operator="add"), ("does not fit",)),
        "condition_text": Bad(_made(condition="a"), ("does not fit",)),
        "origin_number": Bad(_made(origin=origin | {"model": 1}), ("model",)),
        "origin_more": Bad(_made(origin=origin | {"other": "1"}), ("does not fit",)),
        "pickle": Bad(b"\x80\x04]\x94.", ("pickle",)),
        "zip": Bad(b"PK\x03\x04" + b"\x00" * 64, ("pickle",)),
    }


# GGUF


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _string(key: bytes, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", 8) + _text(value)


def gguf(
    *,
    keys: tuple[bytes, ...] = (_string(b"general.architecture", b"controlvector"),),
    rows: dict[str, tuple[Any, ...]] | None = None,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    kind: int = 0,
    dimensions: tuple[int, ...] | None = None,
    offset: int | None = None,
) -> bytes:
    """A GGUF file of version 3, with counts, types and sizes as they are told."""
    rows = {"direction.1": (3.0, 4.0, 0.0, 0.0)} if rows is None else rows
    head = b"GGUF" + struct.pack(
        "<IQQ",
        3,
        len(rows) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head += b"".join(keys)
    data = b""
    for name, row in rows.items():
        sizes = (len(row),) if dimensions is None else dimensions
        head += _text(name.encode()) + struct.pack("<I", len(sizes))
        head += b"".join(struct.pack("<Q", size) for size in sizes)
        head += struct.pack("<IQ", kind, len(data) if offset is None else offset)
        packed = struct.pack(f"<{len(row)}f", *row)
        data += packed + b"\x00" * (-len(packed) % 32)
    return head + b"\x00" * (-len(head) % 32) + data


def ggufs() -> dict[str, Bad]:
    named = _string(b"general.architecture", b"controlvector")
    array = _text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60)
    nested = _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50
    not_whole = ("not a whole GGUF file",)
    record = _string(b"steerlens.vector", b"[" * 500 + b"]" * 500)
    return {
        "empty": Bad(b"", not_whole),
        "magic": Bad(b"GGUF", not_whole),
        "other_magic": Bad(b"GGML" + gguf()[4:], not_whole),
        "version_0": Bad(gguf()[:4] + struct.pack("<I", 0) + gguf()[8:], not_whole),
        "truncated": Bad(gguf()[:-40], not_whole),
        "keys_bomb": Bad(gguf(n_keys=1 << 60), not_whole),
        "tensors_bomb": Bad(gguf(n_tensors=1 << 60), not_whole),
        "array_bomb": Bad(gguf(keys=(named, array)), not_whole),
        "nested": Bad(gguf(keys=(named, nested)), not_whole),
        "key_twice": Bad(gguf(keys=(named, named)), ("general.architecture", "twice")),
        "key_not_utf8": Bad(gguf(keys=(named, _string(b"\xff", b"a"))), not_whole),
        "value_not_utf8": Bad(gguf(keys=(named, _string(b"a", b"\xff"))), not_whole),
        "dimensions_bomb": Bad(gguf(dimensions=(1 << 40,)), not_whole),
        "dimensions_wrap": Bad(gguf(dimensions=(1 << 63, 2)), not_whole),
        "dimensions_none": Bad(gguf(dimensions=()), ()),
        "offset_bomb": Bad(gguf(offset=1 << 60), not_whole),
        "kind_unknown": Bad(gguf(kind=999), not_whole),
        "kind_int": Bad(gguf(kind=26), ("direction.1", "I32")),
        "no_architecture": Bad(gguf(keys=()), ("architecture",)),
        "other_architecture": Bad(
            gguf(keys=(_string(b"general.architecture", b"llama"),)), ("llama",)
        ),
        "no_rows": Bad(gguf(rows={}), ("no direction",)),
        "traversal": Bad(gguf(rows={"direction.../../1": (1.0,)}), ("direction.../../1",)),
        "other_name": Bad(gguf(rows={"weight": (1.0,)}), ("weight",)),
        "one_block_twice": Bad(
            gguf(rows={"direction.1": (1.0,), "direction.01": (1.0,)}), ("direction.01",)
        ),
        "huge_block": Bad(gguf(rows={"direction.9999999999": (1.0,)}), ("direction.9999999999",)),
        "nan": Bad(gguf(rows={"direction.1": (math.nan, 1.0)}), ()),
        "inf": Bad(gguf(rows={"direction.1": (math.inf, 1.0)}), ()),
        "zero": Bad(gguf(rows={"direction.1": (0.0, 0.0)}), ()),
        "lengths_differ": Bad(gguf(rows={"direction.1": (1.0,), "direction.2": (1.0, 1.0)}), ()),
        "record_nested": Bad(gguf(keys=(named, record)), ("steerlens.vector", "nested")),
        "record_list": Bad(
            gguf(keys=(named, _string(b"steerlens.vector", b"[]"))), ("steerlens.vector",)
        ),
    }


# Files in a run folder: which one, and its content


def records(good: dict[str, Any]) -> dict[str, Bad]:
    """Bad run.json files, from that of a circuits run."""

    def put(**changes: Any) -> bytes:
        return json.dumps(good | changes).encode()

    tables, files = good["tables"], good["files"]
    sums = files["writers.csv"]
    whole = json.dumps(good).encode()
    return {
        "empty": Bad(b"", ("not a run record",)),
        "truncated": Bad(whole[:-9], ("not a run record",)),
        "not_utf8": Bad(b'{"\xff": 1}', ("not a run record",)),
        "nested": Bad(DEEP, ("nested",)),
        "key_twice": Bad(b'{"seconds": 1, ' + whole[1:], ("'seconds'", "twice")),
        "huge_number": Bad(put(seconds=0)[:-1] + b', "x": ' + b"9" * 5000 + b"}", ("run record",)),
        "a_list": Bad(b"[]", ("request",)),
        "request_list": Bad(put(request=[]), ("request",)),
        "command_list": Bad(put(request={"command": ["sweep"]}), ("sweep",)),
        "seconds_huge": Bad(put(seconds=10**400), ("seconds",)),
        "seconds_nan": Bad(put(seconds=math.nan), ("seconds",)),
        "seconds_bool": Bad(put(seconds=True), ("seconds",)),
        "seconds_negative": Bad(put(seconds=-1), ("seconds",)),
        "format_newer": Bad(put(format=3), ("format 3", "newer")),
        "format_text": Bad(put(format="2"), ("format '2'",)),
        "file_list": Bad(put(files=["attention.html"]), ("files",)),
        "file_sums_list": Bad(put(files=files | {"writers.csv": []}), ("writers.csv", "sha256")),
        "file_sha_number": Bad(
            put(**sealed(good | {"files": files | {"writers.csv": {"bytes": 1, "sha256": 1}}})),
            ("writers.csv",),
        ),
        "file_lacking": Bad(put(files={}), ("lack that of the table 'writers'",)),
        "file_traversal": Bad(put(files=files | {"../attention.html": sums}), ("../attention",)),
        "file_absolute": Bad(put(files=files | {"/etc/passwd": sums}), ("/etc/passwd",)),
        "warning_number": Bad(put(warnings=[1]), ("warnings",)),
        "table_traversal": Bad(
            put(tables={"../writers": tables["writers"]}), ("../writers", "does not know")
        ),
        "table_list": Bad(put(tables={"writers": []}), ("writers",)),
        "rows_huge": Bad(
            put(**sealed(good | {"tables": tables | {"writers": {"rows": 10**30, "attrs": {}}}})),
            ("writers.csv",),
        ),
        "seed_edited": Bad(
            put(request=good["request"] | {"seed": 1}), ("run.json", "was changed since")
        ),
        "rows_text": Bad(put(tables={"writers": {"rows": "2", "attrs": {}}}), ("writers",)),
        "attrs_list": Bad(put(tables={"writers": {"rows": 2, "attrs": []}}), ("writers",)),
    }


def csvs(good: str) -> dict[str, Bad]:
    """Bad writers.csv files."""
    head, first, *rest = good.splitlines()
    names, cells = head.split(","), first.split(",")

    def cell(name: str, value: str) -> bytes:
        changed = [value if n == name else c for n, c in zip(names, cells, strict=True)]
        return "\n".join([head, ",".join(changed), *rest, ""]).encode()

    changed, cut_off = ("changed since the run wrote it",), ("bytes: cut off or changed",)
    return {
        "empty": Bad(b"", cut_off),
        "not_utf8": Bad(b"\xff" + good.encode(), changed),
        "truncated": Bad(good[:-30].encode(), cut_off),
        "one_row_less": Bad("\n".join([head, first, ""]).encode(), cut_off),
        "one_cell_less": Bad("\n".join([head, first, "1", ""]).encode(), cut_off),
        "open_quote": Bad(cell("layer", '"1'), changed),
        "nul": Bad(cell("layer", "\0"), changed),
        "column_twice": Bad(f"{names[0]},{good}".encode(), changed),
        "layer_huge": Bad(cell("layer", "9" * 30), changed),
        "layer_longer": Bad(cell("layer", "9" * 5000), changed),
        "layer_text": Bad(cell("layer", "one"), changed),
        "layer_float": Bad(cell("layer", "1.0"), changed),
        "layer_grouped": Bad(cell("layer", "1_0"), changed),
        "layer_other_digits": Bad(cell("layer", "\u0663"), changed),
        "share_text": Bad(cell("share", "much"), changed),
        "share_grouped": Bad(cell("share", "1_0.5"), changed),
    }


def pages() -> dict[str, Bad]:
    """Bad attention.html files."""

    def view(content: str) -> bytes:
        return f'<script type="x" class="circuitsvis-data">{content}</script>'.encode()

    good = {"view": "AttentionHeads", "title": "a", "props": {}}
    return {
        "empty": Bad(b"", ("no views",)),
        "not_utf8": Bad(b"\xff", ("not a page",)),
        "declaration": Bad(b"<![no[such", ("no views",)),
        "entities": Bad(b"&#99999999999;<!DOCTYPE x [", ("no views",)),
        "not_json": Bad(view("{"), ("not a page",)),
        "nested": Bad(view("[" * 9000), ("not a page",)),
        "a_list": Bad(view("[]"), ("not a page",)),
        "title_number": Bad(view(json.dumps(good | {"title": 1})), ("title",)),
        "props_list": Bad(view(json.dumps(good | {"props": []})), ("props",)),
        "other_view": Bad(view(json.dumps(good | {"view": "Other"})), ("AttentionHeads",)),
        "key_twice": Bad(view(json.dumps(good)[:-1] + ', "view": "Other"}'), ("'view'", "twice")),
    }


SUFFIXES = {
    "pairs": "jsonl",
    "items": "jsonl",
    "vectors": "safetensors",
    "ggufs": "gguf",
    "records": "json",
    "csvs": "csv",
    "pages": "html",
}


def corpus(run: Path) -> dict[str, dict[str, Bad]]:
    """Every bad file by kind and name; `run` is the folder of a sound circuits run."""
    record = json.loads((run / "run.json").read_text())
    fixed = {"finished": "2025-01-01T00:00:00+00:00", "versions": {}, "machine": {}}
    return {
        "pairs": pairs(),
        "items": items(),
        "vectors": vectors(),
        "ggufs": ggufs(),
        "records": records(sealed(record | fixed)),
        "csvs": csvs((run / "writers.csv").read_text()),
        "pages": pages(),
    }


def main() -> None:
    """Write the corpus anew."""
    import shutil
    import tempfile

    from run_folders import write_circuits

    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind, files in corpus(write_circuits(Path(folder) / "run")).items():
            (FOLDER / kind).mkdir(parents=True)
            for name, bad in files.items():
                (FOLDER / kind / f"{name}.{SUFFIXES[kind]}").write_bytes(bad.content)


if __name__ == "__main__":
    main()
