"""Run folders: refuse to lose what is there, write whole files, record what was run."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from steerlens.directions import Directions
from steerlens.errors import OutputError
from steerlens.steering.files import without_nan, write_whole
from steerlens.tables import write_csv, write_parquet

RECORD = "run.json"
REPORT = "report.html"
RUN_FILES = (
    "sweep.csv",
    "sweep.parquet",
    "boundary.csv",
    "shape.csv",
    "comparison.csv",
    "summary.csv",
    "effects.csv",
    "layers.csv",
    "points.csv",
    "geometry.csv",
    "contours.csv",
    "generations.csv",
    "tokens.csv",
    "writers.csv",
    "positions.csv",
    "readers.csv",
    "claims.csv",
    "circuits.csv",
    "edges.csv",
    "faithfulness.csv",
    "edges.csv",
    "components.html",
    "attention.html",
    "tokens.html",
    "graph.html",
    REPORT,
    "directions.safetensors",
    RECORD,
)
"""Every file that some command writes into a run folder."""


def check_run_folder(folder: Path, request: Mapping[str, Any]) -> None:
    """Make `folder` and see that a run of `request` may be written there, before any work.

    A run of the same request may be written again. Raises `OutputError` when the folder holds a
    run of another request (naming what differs), or results without a record, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(folder)!r}: {error.strerror}; choose another --out"
        ) from error
    record = folder / RECORD
    if not record.exists():
        found = [name for name in RUN_FILES if (folder / name).exists()]
        if found:
            raise OutputError(
                f"{str(folder)!r} holds {', '.join(found)} but no {RECORD}, so they may belong to "
                "another run; choose another --out or move them away"
            )
        return
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))["request"]
        changed = sorted(
            key
            for key in {*earlier, *request}
            if earlier.get(key) != json.loads(json.dumps(without_nan(request))).get(key)
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise OutputError(
            f"{str(record)!r} is not a run record ({error}); choose another --out"
        ) from error
    if changed:
        raise OutputError(
            f"{str(folder)!r} already holds a run with other {', '.join(changed)}; choose another "
            "--out or delete it"
        )


def check_out_file(path: Path) -> None:
    """Make the folder of `path` and see that a file may be written there, before any work.

    Raises `OutputError` when it may not, or when `path` is a folder.
    """
    if path.is_dir():
        raise OutputError(f"--out {str(path)!r} is a folder; expected a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(path.parent)!r}: {error.strerror}; choose another --out"
        ) from error


def write_run(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    directions: Directions | Mapping[str, Directions],
    request: Mapping[str, Any],
    *,
    seconds: float,
    forward_equivalents: float | None = None,
    pages: Mapping[str, str] = MappingProxyType({}),
    warnings: Sequence[str] = (),
) -> None:
    """Write the files of a run; each appears whole, the record last.

    Each of `tables` as `NAME.csv`, a sweep as `sweep.parquet` too; `directions.safetensors`
    (hook name -> direction, the readouts included), or one `directions-NAME.safetensors` for each
    of several; each of `pages` as `NAME.html`; and `run.json`, with the seconds and, where they are
    counted, the forward-equivalents spent, the rows and attrs of each table, and the `warnings`
    given. In the record None stands for NaN, "inf" and "-inf" for themselves, as JSON has neither.
    Raises `OutputError` when a file cannot be written.
    """
    record = {
        "request": dict(request),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "forward_equivalents": forward_equivalents,
        "warnings": list(warnings),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("steerlens", "torch", "transformers", "pandas")},
            "transformer-lens": version("transformer-lens"),
        },
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "tables": {
            name: {"rows": len(table), "attrs": dict(table.attrs)} for name, table in tables.items()
        },
        "pages": list(pages),
    }
    try:
        for name, table in tables.items():
            write_whole(folder / f"{name}.csv", partial(write_csv, table))
            if name == "sweep":
                write_whole(folder / f"{name}.parquet", partial(write_parquet, table))
        several = {"": directions} if isinstance(directions, Directions) else directions
        for name, of in several.items():
            file = f"directions-{name}.safetensors" if name else "directions.safetensors"
            write_whole(folder / file, partial(write_directions, of))
        for name, page in pages.items():
            write_whole(folder / f"{name}.html", partial(_write_text, page))
        write_whole(folder / RECORD, lambda p: _write_json(record, p))
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error}") from error


def write_directions(directions: Directions, path: Path) -> None:
    """Write directions as safetensors: hook names as keys, how they were fitted as metadata."""
    from safetensors.torch import save

    fitted = {
        "method": directions.method,
        "position": directions.position,
        "seed": directions.seed,
        "fitted_on": directions.fingerprint,
        "weight_processing": directions.weight_processing,
        "readout_hooks": directions.readout_names,
    }
    names = (*directions.hook_names, *directions.readout_names)
    tensors = {name: directions[name].contiguous() for name in names}
    # One key: safetensors writes several in an order of its own, and the bytes would change.
    metadata = {"steerlens": json.dumps(fitted)}
    path.write_bytes(save(tensors, metadata))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_json(record: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
