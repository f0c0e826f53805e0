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
from pathlib import Path
from typing import Any

import atheris

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

with atheris.instrument_imports(include=["steerlens", "gguf", "json"]):
    import hostile
    import sound
    from run_folders import write_circuits
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
    """A run of circuits cut down to one table and one page; its files by name."""
    write_circuits(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["tables"] = {"writers": record["tables"]["writers"]}
    view = {"view": "AttentionHeads", "title": "a", "props": {"tokens": ["a"]}}
    files = {
        "run.json": json.dumps(record | {"pages": []}).encode(),
        "writers.csv": (folder / "writers.csv").read_bytes(),
        "attention.html": (
            f'<script class="circuitsvis-data">{json.dumps(view)}</script>'.encode()
        ),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def kinds(folder: Path) -> dict[str, Kind]:
    """What can be fuzzed, with files in `folder`."""
    record = json.dumps(hostile.vector().to_record()[1]).encode()
    made: dict[str, Kind] = {
        "pairs": Kind(
            "f.jsonl",
            sl.ContrastivePairs.from_jsonl,
            hostile.lines(hostile.PAIR, hostile.PAIR),
            "pairs",
        ),
        "items": Kind(
            "f.jsonl",
            sl.PreferenceItems.from_jsonl,
            hostile.lines(hostile.ITEM, hostile.ITEM),
            "items",
        ),
        "vectors": Kind(
            "f.safetensors", sl.SteeringVector.load, hostile.vector().to_bytes(), "vectors"
        ),
        "vector_records": Kind(
            "f.safetensors", sl.SteeringVector.load, record, "vectors", with_checksum
        ),
        "ggufs": Kind("f.gguf", sl.from_gguf, hostile.gguf(), "ggufs"),
    }
    for kind, name in (("records", "run.json"), ("csvs", "writers.csv")):
        run = folder / kind
        good = run_folder(run)[name]
        made[kind] = Kind(f"{kind}/{name}", lambda _, run=run: sl.read_run(run), good, kind)
    run = folder / "pages"
    good = run_folder(run)["attention.html"]
    whole = json.loads((run / "run.json").read_text(encoding="utf-8"))
    paged = json.dumps(whole | {"tables": {}, "pages": ["attention"]})
    (run / "run.json").write_text(paged, encoding="utf-8")
    made["pages"] = Kind("pages/attention.html", lambda _: sl.read_run(run), good, "pages")
    return made


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
        content = kind.whole(content)
        path.write_bytes(content)
        try:
            found = kind.read(path)
        except sl.SteerlensError as error:
            counts["refused"] += 1
            if Path(kind.name).name not in str(error) and name != "records":
                raise RuntimeError(f"the file is not named: {error}") from error
        else:
            counts["read"] += 1
            sound.CHECKS[kind.check](content, found)
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
