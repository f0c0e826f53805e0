"""Fuzz one reader with atheris: `python tests/fuzz/readers.py KIND FOLDER [-runs=200000]`.

KIND is a name in `KINDS`. Into FOLDER go the corpus, to which what reaches new code is added, and
outcome.json. The run stops where a reader raises anything but a SteerlensError that names the file,
where what it read is not what the file says (tests/sound.py), and where an input takes longer than
-timeout or more memory than -rss_limit_mb.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import atheris

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

with atheris.instrument_imports(include=["steerlens", "gguf", "json"]):
    import hostile
    import sound
    from run_folders import seal, write_circuits
    from safetensors.torch import save

    import steerlens as sl
    from steerlens.steering.vector_file import KEY, encode

EVERY = 1000


@dataclass(frozen=True)
class Kind:
    """Where the bytes are written, what reads them, a sound file, and what the bytes become."""

    name: str
    read: Callable[[Path], Any]
    good: bytes
    check: str
    whole: Callable[[bytes], bytes] = bytes


def with_checksum(content: bytes) -> bytes:
    """A vector whose record is `content`, with the checksum it should have."""
    tensors, _ = hostile.vector().to_record()
    text = content.decode("utf-8", "replace")
    try:
        record = json.loads(text)
        return encode(tensors, record) if isinstance(record, dict) else b""
    except (ValueError, RecursionError):
        return bytes(save(tensors, {KEY: text}))


def run_folder(folder: Path) -> dict[str, bytes]:
    """A run of circuits cut down to the tables that it must have and one page; files by name."""
    write_circuits(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    names = ("writers", "readers", "claims")
    record["tables"] = {name: record["tables"][name] for name in names}
    record["files"] = {name: {} for name in (*(f"{n}.csv" for n in names), "attention.html")}
    view = {"view": "AttentionHeads", "title": "a", "props": {"tokens": ["a"]}}
    page = f'<script type="x" class="circuitsvis-data">{json.dumps(view)}</script>'
    (folder / "attention.html").write_text(page, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    seal(folder)
    return {name: (folder / name).read_bytes() for name in (*record["files"], "run.json")}


def sealed(folder: Path) -> sl.runs.Run:
    """A run whose record fits its files: what stands behind the sha256 is fuzzed."""
    seal(folder)
    return sl.read_run(folder)


def _of_its_folder(read: Callable[[Path], sl.runs.Run], path: Path) -> sl.runs.Run:
    return read(path.parent)


def kinds(folder: Path) -> dict[str, Kind]:
    """What can be fuzzed, with files in `folder`."""
    record = json.dumps(hostile.vector().to_record()[1]).encode()
    made: dict[str, Kind] = {
        "pairs": Kind(
            "f.jsonl",
            sl.ContrastivePairs.load,
            hostile.lines(hostile.PAIR, hostile.PAIR),
            "pairs",
        ),
        "items": Kind(
            "f.jsonl",
            sl.PreferenceItems.load,
            hostile.lines(hostile.ITEM, hostile.ITEM),
            "items",
        ),
        "vectors": Kind(
            "f.safetensors", sl.SteeringVector.load, hostile.vector().to_bytes(), "vectors"
        ),
        "vector_records": Kind(
            "f.safetensors", sl.SteeringVector.load, record, "vectors", with_checksum
        ),
        "ggufs": Kind("f.gguf", sl.export.from_gguf, hostile.gguf(), "ggufs"),
    }
    inside = {"records": "run.json", "csvs": "writers.csv", "pages": "attention.html"}
    for kind, name in inside.items():
        run = folder / kind
        good = run_folder(run)[name]
        check = "tables" if kind == "csvs" else kind
        read = partial(_of_its_folder, sl.read_run if kind == "records" else sealed)
        made[kind] = Kind(f"{kind}/{name}", read, good, check)
    return made


def is_read(kind: Kind, path: Path, content: bytes) -> bool:
    """Whether the file is read, then as it is; else it is refused and named."""
    path.write_bytes(content)
    try:
        found = kind.read(path)
    except sl.SteerlensError as error:
        # When the record was changed, another file of the folder may be at fault.
        if path.name not in str(error) and path.name != "run.json":
            raise RuntimeError(f"the file is not named: {error}") from error
        return False
    sound.CHECKS[kind.check](content, found)
    return True


def main() -> None:
    """Read argv, and run until a failure or the number of runs."""
    name, given, *options = sys.argv[1:]
    folder = Path(given)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "files", ignore_errors=True)
    kind = kinds(folder / "files")[name]
    (corpus / "good").write_bytes(kind.good)
    path = folder / "files" / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()

    def one(content: bytes) -> None:
        counts["read" if is_read(kind, path, kind.whole(content)) else "refused"] += 1
        if counts.total() % EVERY == 0:
            outcome = {"kind": name, "inputs": counts.total(), **counts}
            text = json.dumps(outcome | {"date": date.today().isoformat()})
            (folder / "outcome.json").write_text(text, encoding="utf-8")

    seeds = TESTS / "files" / "hostile" / name
    atheris.Setup(
        [sys.argv[0], *options, str(corpus), *([str(seeds)] if seeds.is_dir() else [])], one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
