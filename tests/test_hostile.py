"""Bad files: each gives one error that names the file and the reason, never anything else."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import hostile
import pytest
from hostile import FOLDER, HOOK, ITEM, PAIR, SUFFIXES, corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import seal, write_circuits
from sound import CHECKS

import steerlens as sl
from steerlens import files as inputs
from steerlens.data.reading import read_texts
from steerlens.errors import InputError

Reader = Callable[[Path], Any]
READERS: dict[str, Reader] = {
    "pairs": sl.ContrastivePairs.load,
    "items": sl.PreferenceItems.load,
    "vectors": sl.SteeringVector.load,
    "ggufs": sl.export.from_gguf,
}
# Files of a run folder, which are read with all of it.
INSIDE = {"records": "run.json", "csvs": "writers.csv", "pages": "attention.html"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_circuits(tmp_path_factory.mktemp("runs") / "run")


def names() -> list[str]:
    return [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.rglob("*.*"))]


def read(kind: str, path: Path, run: Path, *, sealed: bool = False) -> Any:
    """What the reader of that kind makes of a file; `sealed` with the sha256 that it has."""
    if kind in READERS:
        return READERS[kind](path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        (copy / INSIDE[kind]).write_bytes(path.read_bytes())
        if sealed:
            seal(copy)
        return sl.read_run(copy)


@pytest.mark.parametrize("name", names())
def test_a_bad_file_is_named_with_its_reason(name: str, run: Path) -> None:
    kind, path = name.split("/")[0], FOLDER / name
    bad = corpus(run)[kind][path.stem]
    assert path.read_bytes() == bad.content or kind in INSIDE  # a run has times and versions
    with pytest.raises(sl.SteerlensError) as caught:
        read(kind, path, run, sealed=kind == "pages")
    message = str(caught.value)
    for told in (INSIDE.get(kind, path.name), *bad.told):
        assert told in message
    assert len(message) < 2000


def test_the_corpus_is_that_of_the_script(run: Path) -> None:
    expected = {
        f"{kind}/{name}.{SUFFIXES[kind]}" for kind, files in corpus(run).items() for name in files
    }
    assert set(names()) == expected


def test_sound_files_are_read(run: Path, tmp_path: Path) -> None:
    vector = hostile.vector()
    good = GOOD | {kind: (run / name).read_bytes() for kind, name in INSIDE.items()}
    for kind, content in good.items():
        path = tmp_path / f"good.{SUFFIXES[kind]}"
        path.write_bytes(content)
        found = read(kind, path, run)
        if kind in ("vectors", "ggufs"):
            assert found.hook_names == (HOOK,)
            assert found.rows.tolist() == vector.rows.tolist()


@pytest.mark.parametrize("kind", ["pairs", "items"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_marks(
    kind: str, end: bytes, start: bytes, last: bool, tmp_path: Path
) -> None:
    """Blank lines are counted whatever the line ends are, so the ids are the same."""
    good = {"pairs": PAIR, "items": ITEM}[kind]
    plain, other = tmp_path / "plain.jsonl", tmp_path / "other.jsonl"
    plain.write_bytes(hostile.lines(good, b"") + good)
    content = start + hostile.lines(good, b"", end) + good
    other.write_bytes(content + end if last else content)
    assert READERS[kind](other).fingerprint == READERS[kind](plain).fingerprint


def test_run_files_with_windows_line_ends(run: Path, tmp_path: Path) -> None:
    """Of the record they are read; a table with others is not the one that was written."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = sl.read_run(run)
    for name in ("run.json", "writers.csv"):
        assert sl.read_run(copy).tables["writers"].equals(before.tables["writers"])
        (copy / name).write_bytes((copy / name).read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(sl.SteerlensError, match=r"writers\.csv' was changed"):
        sl.read_run(copy)


# What no file can hold: pipes, links, sizes, names

OPENERS: dict[str, Reader] = {**READERS, "texts": read_texts, "runs": sl.read_run}


@pytest.mark.parametrize("kind", OPENERS)
def test_names_that_are_no_files(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder, tmp_path / "none", tmp_path / ("x" * 5000), Path("a\0b")):
        with pytest.raises(sl.SteerlensError):
            OPENERS[kind](path)


@pytest.mark.parametrize("kind", ["vectors", "ggufs", "runs"])
def test_a_pipe_is_not_waited_for(kind: str, tmp_path: Path, run: Path) -> None:
    pipe = tmp_path / "pipe"
    if kind == "runs":
        pipe = tmp_path / "run" / "writers.csv"
        shutil.copytree(run, pipe.parent)
        pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(sl.SteerlensError, match="not a file"):
        OPENERS[kind](pipe.parent if kind == "runs" else pipe)


@pytest.mark.parametrize("kind", ["pairs", "items", "texts"])
def test_lines_come_from_a_pipe_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from /dev/stdin; what never ends is not read for ever."""
    content = hostile.lines(ITEM, ITEM) if kind == "items" else hostile.lines(PAIR, PAIR)
    ends = os.pipe()
    try:
        os.write(ends[1], content)
        os.close(ends[1])
        assert len(OPENERS[kind](Path(f"/dev/fd/{ends[0]}"))) == 3
    finally:
        os.close(ends[0])
    monkeypatch.setattr(inputs, "MAX_BYTES", 1 << 20)
    with pytest.raises(sl.SteerlensError, match=r"'/dev/zero' does not end.* 1048576 bytes"):
        OPENERS[kind](Path("/dev/zero"))


@pytest.mark.parametrize("kind", READERS)
def test_a_file_of_any_size_is_refused_before_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(sl.SteerlensError, match=f"{1 << 40} bytes"):
        READERS[kind](large)
    small = tmp_path / "small.jsonl"
    small.write_bytes(hostile.lines(PAIR, PAIR))
    monkeypatch.setattr(inputs, "MAX_BYTES", small.stat().st_size)
    assert len(sl.ContrastivePairs.load(small)) == 3
    monkeypatch.setattr(inputs, "MAX_BYTES", small.stat().st_size - 1)
    with pytest.raises(sl.SteerlensError, match="small"):
        sl.ContrastivePairs.load(small)


def test_many_keys_are_told_apart_at_once(tmp_path: Path) -> None:
    """With a search for the repeated key that looks at every pair of keys it would not end."""
    keys = ", ".join(f'"{i}": 0' for i in range(100_000))
    path = tmp_path / "many.jsonl"
    path.write_text("{" + keys + ', "99999": 0}')
    with pytest.raises(sl.SteerlensError, match=r"many\.jsonl:1.*'99999' occurs twice"):
        sl.ContrastivePairs.load(path)


def test_depth_is_counted() -> None:
    deepest = "[" * inputs.MAX_DEPTH + "]" * inputs.MAX_DEPTH
    assert inputs.strict_json(deepest) is not None
    with pytest.raises(ValueError, match="nested deeper than 64"):
        inputs.strict_json(f"[{deepest}]")
    with pytest.raises(ValueError, match="nested deeper than 64"):
        inputs.strict_json(f'{{"a": {deepest}}}')


def test_an_output_that_is_a_link_is_neither_followed_nor_replaced(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "v.safetensors"
    precious.write_text("mine")
    for path, write in (
        (link, hostile.vector().save),
        (tmp_path / "v.gguf", lambda p: sl.export.to_gguf(hostile.vector(), p)),
    ):
        path.symlink_to(precious)
        with pytest.raises(InputError, match="it is a link"):
            write(path)
        assert path.readlink() == precious
        assert precious.read_text() == "mine"
        path.unlink()
        write(path)
        assert path.stat().st_size > 4


# Random bytes, and sound files with some bytes changed

EXAMPLES = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with pieces cut out, put in, or doubled."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        until = draw(st.integers(at, min(len(content), at + 16)))
        content[at:until] = draw(st.one_of(st.binary(max_size=16), st.just(content[at:until] * 2)))
    return bytes(content)


def refused_or_sound(read: Reader, path: Path, content: bytes, kind: str) -> None:
    """A SteerlensError that names the file, or what the file says."""
    path.write_bytes(content)
    try:
        found = read(path)
    except sl.SteerlensError as error:
        message = str(error)
    else:
        CHECKS[kind](content, found)
        return
    assert path.name in message


GOOD = {
    "pairs": hostile.lines(PAIR, PAIR),
    "items": hostile.lines(ITEM, ITEM),
    "vectors": hostile.vector().to_bytes(),
    "ggufs": hostile.gguf(),
}


@pytest.mark.parametrize("kind", GOOD)
@given(data=st.data())
@EXAMPLES
def test_any_bytes_as_a_file(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(GOOD[kind])))
    refused_or_sound(READERS[kind], tmp_path / f"f.{SUFFIXES[kind]}", content, kind)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(data=st.data())
@EXAMPLES
def test_any_bytes_in_a_run(data: st.DataObject, run: Path) -> None:
    kind = data.draw(st.sampled_from(list(INSIDE)))
    path, good = run / INSIDE[kind], (run / INSIDE[kind]).read_bytes()
    record_before = (run / "run.json").read_bytes()
    is_sealed = kind != "records" and data.draw(st.booleans())
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(good)))
    if kind == "records" and data.draw(st.booleans()):
        record = json.loads(good)
        record[data.draw(st.sampled_from(list(record)))] = data.draw(JSON)
        content = json.dumps(record).encode()
    # When the record was changed, another file of the folder may be at fault.
    named = run if kind == "records" else path
    path.write_bytes(content)
    if is_sealed:
        seal(run)
    try:
        found = sl.read_run(run)
    except sl.SteerlensError as error:
        message = str(error)
    else:
        CHECKS["tables" if is_sealed and kind == "csvs" else kind](content, found)
        message = named.name
        assert kind == "records" or is_sealed or content == good
    finally:
        path.write_bytes(good)
        (run / "run.json").write_bytes(record_before)
    assert named.name in message


def test_the_fuzzers_take_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind that `make fuzz` has: its good file is read and sound, bad ones are refused."""
    stub = ModuleType("atheris")
    monkeypatch.setattr(stub, "instrument_imports", lambda include: nullcontext(), raising=False)
    monkeypatch.setitem(sys.modules, "atheris", stub)
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "fuzz"))
    readers = importlib.import_module("readers")
    monkeypatch.delitem(sys.modules, "readers")
    makefile = (FOLDER.parents[2] / "Makefile").read_text(encoding="utf-8")
    kinds = readers.kinds(tmp_path)
    assert f"FUZZ_KINDS := {' '.join(kinds)}\n" in makefile
    for name, kind in kinds.items():
        assert readers.is_read(kind, tmp_path / kind.name, kind.whole(kind.good)), name
        seeds = sorted((FOLDER / name).glob("*")) if (FOLDER / name).is_dir() else []
        read = [s for s in seeds if readers.is_read(kind, tmp_path / kind.name, s.read_bytes())]
        # Behind a checksum that is made to fit, a table may have other cells.
        assert len(read) == (2 if name == "csvs" else 0), read
        assert len(seeds) > 10 or name == "vector_records"
    vector = hostile.vector()
    CHECKS["ggufs"](hostile.gguf(), vector)
    with pytest.raises(AssertionError):
        CHECKS["ggufs"](hostile.gguf(), 2 * vector)


def test_the_outcomes_of_shards_are_added_up(tmp_path: Path) -> None:
    for kind, shard in (("a", "1"), ("a", "2"), ("b", "1")):
        (tmp_path / kind / shard).mkdir(parents=True)
        outcome = {"kind": kind, "inputs": 3, "read": int(shard), "date": "2026-11-28"}
        (tmp_path / kind / shard / "outcome.json").write_text(json.dumps(outcome))
    script = FOLDER.parents[1] / "fuzz" / "outcomes.py"
    folders = [tmp_path / name for name in ("a/1", "a/2", "b/1")]
    found = subprocess.run([sys.executable, script, *folders], capture_output=True, check=True)
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        {"kind": "a", "inputs": 6, "read": 3},
        {"kind": "b", "inputs": 3, "read": 1},
    ]


def test_the_checks_see_what_a_file_does_not_say(run: Path, tmp_path: Path) -> None:
    good = hostile.lines(PAIR, PAIR)
    path = tmp_path / "f.jsonl"
    path.write_bytes(good)
    found = sl.ContrastivePairs.load(path)
    CHECKS["pairs"](good, found)
    for other in (good + PAIR, good.replace(b"a", b"c", 1), good.replace(b"{", b'{"x":1,"x":1,')):
        with pytest.raises(AssertionError):
            CHECKS["pairs"](other, found)
    text, again = (run / "writers.csv").read_bytes(), sl.read_run(run)
    CHECKS["csvs"](text, again)
    with pytest.raises(AssertionError):
        CHECKS["csvs"](text.replace(b"1", b"2", 1), again)
    vector = hostile.vector()
    CHECKS["vectors"](vector.to_bytes(), vector)
    with pytest.raises(AssertionError):
        CHECKS["vectors"](vector.to_bytes(), vector * 2)
