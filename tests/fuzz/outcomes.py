"""Add up the outcomes of every kind's shards: `python tests/fuzz/outcomes.py FOLDER...`."""

import json
import sys
from collections import Counter
from pathlib import Path


def main() -> None:
    """Print one line a kind: its inputs, and how many were read and refused."""
    totals: dict[str, Counter[str]] = {}
    for folder in sys.argv[1:]:
        outcome = json.loads((Path(folder) / "outcome.json").read_text(encoding="utf-8"))
        counts = {name: n for name, n in outcome.items() if name not in ("kind", "date")}
        totals.setdefault(outcome["kind"], Counter()).update(counts)
    for kind, counted in totals.items():
        print(json.dumps({"kind": kind, **counted}))


if __name__ == "__main__":
    main()
