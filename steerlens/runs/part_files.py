"""The files of an unfinished run's parts: which are this program's, and what is in them."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.engine.checkpoint import UNSTEERED, Kept, Tensors, digest
from steerlens.files import TEMPORARY
from steerlens.runs.record import PARTS, STARTED, read_record

DIRECTIONS = "_directions.safetensors"
TENSORS = re.compile(rf"(?:{UNSTEERED})?[0-9a-f]{{64}}\.safetensors")
_PART = re.compile(
    rf"{re.escape(STARTED)}|{re.escape(DIRECTIONS)}|[0-9]{{4,}}\.parquet|{TENSORS.pattern}"
)


def others_in(inside: Path) -> list[str]:
    """What in a folder of parts is not of this program; the folder itself where it is a link."""
    if inside.is_symlink() or not inside.is_dir():
        return [inside.name]
    return sorted(path.name for path in inside.iterdir() if not is_own(path))


def is_own(path: Path) -> bool:
    """Whether a file among the parts is this program's: by its name and by what is in it."""
    left = TEMPORARY.fullmatch(path.name)
    name = left["name"] if left else path.name
    if path.parent.is_symlink() or not is_file(path) or not _PART.fullmatch(name):
        return False
    if left:  # it may be cut off anywhere
        return True
    if name == STARTED:
        with suppress(ValueError):
            return bool(read_record(path))
        return False
    if name == DIRECTIONS:
        return _has_directions(path)
    return (read_tensors if TENSORS.fullmatch(name) else read_rows)(path) is not None


def is_file(path: Path) -> bool:
    """Whether it is a file, no link."""
    return path.is_file() and not path.is_symlink()


def _has_directions(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "steerlens" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def part_file(folder: Path, index: int) -> Path:
    """Where a sweep keeps the rows of the hook of that number."""
    return folder / PARTS / f"{index:04d}.parquet"


def read_rows(path: Path, hook_name: str = "") -> tuple[Kept, dict[str, Any]] | None:
    """A part that is a table (at that hook), and its attrs; None if it is not what was written."""
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
        written = frame.attrs.pop("sha256")
        is_whole = written == checksum(frame) and hook_name in ("", frame.attrs["hook_name"])
    # Whatever pyarrow makes of damaged bytes: its errors share no base class.
    except Exception:
        return None
    rows: Any = frame.to_dict("records")
    attrs: Any = frame.attrs
    return (Kept(rows=tuple(rows), blocks=attrs["blocks"]), attrs) if is_whole else None


def read_tensors(path: Path, name: str = "") -> tuple[Kept, dict[str, Any]] | None:
    """A part that is tensors, and its attrs; None when they are not what was written."""
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + size])["__metadata__"]
        attrs, tensors = json.loads(said["attrs"]), load(content)
        is_whole = said["sha256"] == digest(attrs, sorted(tensors.items()))
        kept = Kept(tensors=tensors, record=attrs["record"], blocks=attrs["blocks"])
    # Whatever safetensors makes of damaged bytes.
    except Exception:
        return None
    return (kept, attrs) if is_whole and name in ("", attrs["hook_name"]) else None


def write_tensors(tensors: Tensors, attrs: Mapping[str, Any], path: Path) -> None:
    """A part that is tensors; the inverse of `read_tensors`."""
    from safetensors.torch import save

    # Views of one tensor are written each for itself.
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    plain = json.loads(json.dumps(attrs))
    metadata = {"attrs": json.dumps(plain), "sha256": digest(plain, sorted(apart.items()))}
    path.write_bytes(save(apart, metadata))


def checksum(frame: pd.DataFrame) -> str:
    """The sha256 of a table with its attrs."""
    text = frame.to_csv(index=False) + json.dumps(frame.attrs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
