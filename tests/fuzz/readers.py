"""Fuzz one reader with atheris: `python tests/fuzz/readers.py KIND FOLDER [-runs=200000]`.

KIND is pairs, items, vectors or ggufs; FOLDER holds the corpus, to which what was found is added.
Whatever a reader raises but a SteerlensError that names the file stops the run.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["steerlens", "gguf", "json"]):
    import steerlens as sl

READERS: dict[str, Callable[[Path], Any]] = {
    "pairs": sl.ContrastivePairs.from_jsonl,
    "items": sl.PreferenceItems.from_jsonl,
    "vectors": sl.SteeringVector.load,
    "ggufs": sl.from_gguf,
}


def main() -> None:
    """Read argv, and run until a failure or the number of runs."""
    kind, folder, *options = sys.argv[1:]
    path = Path(folder) / "input"
    path.parent.mkdir(parents=True, exist_ok=True)

    def one(content: bytes) -> None:
        path.write_bytes(content)
        try:
            READERS[kind](path)
        except sl.SteerlensError as error:
            if path.name not in str(error):
                raise RuntimeError(f"the file is not named: {error}") from error

    corpus = Path(folder) / "corpus"
    corpus.mkdir(exist_ok=True)
    hostile = Path(__file__).resolve().parent.parent / "files" / "hostile" / kind
    atheris.Setup([sys.argv[0], *options, str(corpus), str(hostile)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
