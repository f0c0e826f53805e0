"""Run folders: refuse to lose what is there, write whole files, record what was run."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from steerlens.directions.directions import Directions
from steerlens.errors import FileError
from steerlens.files import check_out_folder, strict_json, without_nan, write_json, write_whole
from steerlens.models.hooks import is_head
from steerlens.models.weight_processing import UNKNOWN
from steerlens.runs.contents import PAGES, TABLES
from steerlens.steering import SteeringVector
from steerlens.tables import write_csv, write_parquet

RECORD = "run.json"
PARTS = "parts"
SEAL = "sha256"
"""In a record: of all else in it."""
STARTED = "_request.json"
"""In the folder of parts: what was asked for. Readers of Parquet pass over a name like that."""
REPORT = "report.html"
FORMAT = 2
"""Of `run.json`: 1 (steerlens 0.1.0, which did not write it) had no `files`."""
RUN_FILES = (
    *(f"{name}.csv" for name in TABLES),
    "sweep.parquet",
    "generations.jsonl",
    *(f"{page}.html" for page in ("components", "graph", *PAGES)),
    REPORT,
    "recommendation.json",
    "directions.safetensors",
    "vector.safetensors",
    RECORD,
)
"""Every file that some command writes into a run folder, but for those of several directions."""
_FITTED = {
    **{name: name for name in ("method", "position", "seed")},
    "fitted_on": "fingerprint",
    **{name: name for name in ("weight_processing", "weights_fingerprint", "pair_hashes")},
    "readout_hooks": "readout_names",
}
"""What a file of directions says of how they were fitted -> the field of `Directions`."""


def is_run_file(name: str) -> bool:
    """Whether some command writes a file of that name into a run folder."""
    return name in RUN_FILES or re.fullmatch(r"directions-\w+\.safetensors", name) is not None


def check_run_folder(folder: Path, request: Mapping[str, Any], *, is_begun: bool = False) -> None:
    """Make `folder` and see that a run of `request` may be written there, before any work.

    A run of the same request may be written again, and one that `is_begun` there. Raises
    `FileError` when it may not, naming what differs from a run that is there, with both values.
    """
    check_out_folder(folder)
    there = sorted(path for path in folder.iterdir() if is_run_file(path.name))
    for path in there:
        if path.is_symlink() or not path.is_file():
            raise FileError(
                f"{str(folder)!r} holds {path.name}, which is a link or no file; choose another "
                "--out or move it away"
            )
    record = folder / RECORD
    if record not in there:
        if there and not is_begun:
            raise FileError(
                f"{str(folder)!r} holds {', '.join(path.name for path in there)} but no {RECORD}, "
                "so they may belong to another run; choose another --out or move them away"
            )
        return
    try:
        earlier = read_record(record)["request"]
    except ValueError as error:
        raise FileError(
            f"{str(record)!r} is not a run record ({error}); choose another --out"
        ) from error
    if changed := differences(earlier, request):
        raise FileError(
            f"{str(folder)!r} already holds a run with other {', '.join(changed)}; choose another "
            "--out or delete it"
        )


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own sha256, which shows accidents and edits; it is no signature."""
    plain = without_nan({name: value for name, value in record.items() if name != SEAL})
    text = json.dumps(plain, sort_keys=True)
    return {**plain, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record is as it was written."""
    return bool(record.get(SEAL) == sealed(record)[SEAL])


def read_record(path: Path, *objects: str) -> dict[str, Any]:
    """A record with `request`, `versions` and more `objects`; `ValueError` where it is none."""
    try:
        record = strict_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error) from error
    for name in ("request", "versions", *objects):
        if not isinstance(record, dict) or not isinstance(record.get(name), dict):
            raise ValueError(f"it has no {name!r}")
    if not is_sealed(record):
        raise ValueError(f"its {SEAL!r} does not fit: it was changed, or is of another program")
    return dict(record)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two records say otherwise: a text for each key, inside objects too, with both values.

    Examples:
        >>> from steerlens.runs.record import differences
        >>> earlier = {"seed": 0, "model": {"dtype": "float32"}}
        >>> differences(earlier, {"seed": 0, "model": {"dtype": "float16"}, "null": 2})
        ["model.dtype ('float32', now 'float16')", 'null (nothing, now 2)']
    """
    there, here = _flat(earlier), _flat(json.loads(json.dumps(without_nan(now))))
    return [
        f"{key} ({_shown(there, key)}, now {_shown(here, key)})"
        for key in sorted({*there, *here})
        if (key in there, there.get(key)) != (key in here, here.get(key))
    ]


def _flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _shown(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        return "nothing"
    text = repr(record[key])
    return text if len(text) <= 80 else f"{text[:60]}... of {len(text)} characters"


def write_run(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    directions: Directions | SteeringVector | Mapping[str, Directions],
    request: Mapping[str, Any],
    *,
    seconds: float,
    forward_equivalents: float | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
    warnings: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a run; each appears whole, the record last.

    Each of `tables` as `NAME.csv`, a sweep as Parquet too; directions, or the vector that was
    measured, as safetensors; `texts` by the names of their files. `run.json` has the sha256 and
    size of each of those files and, in `options`, what the command can be run again from.

    Raises `FileError` when a file cannot be written.
    """
    writers: dict[str, Callable[[Path], object]] = {
        f"{name}.csv": partial(write_csv, table) for name, table in tables.items()
    }
    if "sweep" in tables:
        writers["sweep.parquet"] = partial(write_parquet, tables["sweep"])
    if isinstance(directions, SteeringVector):
        writers["vector.safetensors"] = partial(Path.write_bytes, data=directions.to_bytes())
    elif isinstance(directions, Directions):
        writers["directions.safetensors"] = partial(write_directions, directions)
    else:
        for name, fitted in directions.items():
            writers[f"directions-{name}.safetensors"] = partial(write_directions, fitted)
    for name, text in texts.items():
        writers[name] = partial(Path.write_text, data=text, encoding="utf-8")
    try:
        files = {name: _write_summed(folder / name, write) for name, write in writers.items()}
        record = {
            "format": FORMAT,
            "request": dict(request),
            "finished": now(),
            "seconds": round(seconds, 3),
            "forward_equivalents": forward_equivalents,
            "warnings": list(warnings),
            "versions": versions(),
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "cores": os.cpu_count(),
            },
            "tables": {
                name: {"rows": len(table), "attrs": dict(table.attrs)}
                for name, table in tables.items()
            },
            "files": files,
            **({} if options is None else {"options": dict(options)}),
        }
        write_whole(folder / RECORD, partial(write_json, sealed(record)))
    except OSError as error:
        raise FileError(f"cannot write to {str(folder)!r}: {error}") from error


def _write_summed(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    """Write a file whole; its size and sha256, of the bytes that others will find there."""
    sums: dict[str, Any] = {}

    def write_and_sum(temporary: Path) -> None:
        write(temporary)
        content = temporary.read_bytes()
        sums.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    write_whole(path, write_and_sum)
    return sums


def now() -> str:
    """The time as a record says it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions that a record tells."""
    names = ("steerlens", "torch", "transformers", "pandas", "transformer-lens")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_directions(directions: Directions, path: Path) -> None:
    """Write directions as safetensors: hook names as keys, how they were fitted as metadata."""
    from safetensors.torch import save

    fitted = {key: getattr(directions, name) for key, name in _FITTED.items()}
    names = (*directions.hook_names, *directions.readout_names)
    tensors = {name: directions[name].contiguous() for name in names}
    # One key: safetensors writes several in an order of its own, and the bytes would change.
    path.write_bytes(save(tensors, {"steerlens": json.dumps(fitted)}))


def read_directions(path: Path, hook_names: Sequence[str]) -> Directions:
    """Directions of `write_directions` at these hooks and their readouts. Raises `FileError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["steerlens"])
            # Older files lack some.
            said = {"weights_fingerprint": UNKNOWN, "pair_hashes": ()} | said
            names = (*hook_names, *said["readout_hooks"])
            if set(names) != set(file.keys()):
                raise ValueError("it has other hooks")
            rows = [file.get_tensor(name) for name in names]
        # The readouts of heads have another width.
        n_alike = len(hook_names) if is_head(names[0]) else len(rows)
        fitted = {name: said[key] for key, name in _FITTED.items()}
        fitted |= {name: tuple(fitted[name]) for name in ("readout_names", "pair_hashes")}
        return Directions(
            hook_names=tuple(hook_names),
            vectors=torch.stack(rows[:n_alike]),
            readout_vectors=torch.stack(rows[n_alike:]) if rows[n_alike:] else None,
            **fitted,
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{str(path)!r} holds no directions of this run ({error})") from error
