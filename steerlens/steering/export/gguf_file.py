"""GGUF control vectors, which llama.cpp and repeng read: both ways, through the `gguf` package."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import read_whole, refuse_pickle, strict_json, without_nan
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.models.weight_processing import UNKNOWN
from steerlens.steering import Add, Origin, SteeringVector
from steerlens.steering.export.gguf_format import read_gguf
from steerlens.steering.vector_file import checksum, write_named
from steerlens.validation import checked

ARCHITECTURE = "controlvector"
HINT = f"{ARCHITECTURE}.model_hint"
RECORD = "steerlens.vector"
SHA256 = "steerlens.sha256"
_NAME = re.compile(r"direction\.([0-9]{1,6})")


def block_rows(vector: SteeringVector, target: str) -> dict[int, Tensor]:
    """Block -> `scale * direction`, for targets that add to block outputs, unconditionally.

    Raises `InputError` when the vector does something else or acts elsewhere.
    """
    if not isinstance(vector.operator, Add) or vector.condition is not None:
        kind = vector.operator.name if vector.condition is None else "a conditional vector"
        raise InputError(f"{target} can only add a vector everywhere, it cannot carry {kind}")
    for name in vector.hook_names:
        if name != resid_post(hook_layer(name)):
            raise InputError(
                f"{target} adds to block outputs (blocks.N.hook_resid_post), not at {name}"
            )
    return dict(zip(map(hook_layer, vector.hook_names), vector.rows, strict=True))


@checked
def to_gguf(vector: SteeringVector, path: str | Path) -> None:
    """Write a llama.cpp control vector: `direction.N` is added to the output of block N.

    The tensors are `scale * direction` in float32, so that strength c there is coefficient c here;
    scale, calibration and origin travel in the metadata, with a sha256 over them and the tensors.
    Blocks are counted from 0 on both sides, but llama.cpp has no slot for block 0.

    Args:
        vector: added everywhere, at block outputs from block 1 on.
        path: ends in .gguf.

    Raises:
        InputError: the vector is another one, or the file cannot be written.

    Examples:
        >>> sl.export.to_gguf(vector, folder / "cheerful.gguf")
    """
    import gguf

    rows = block_rows(vector, "a llama.cpp control vector")
    if 0 in rows:
        raise InputError(
            "llama.cpp has no slot for the output of block 0 (its direction.N begins at 1), and "
            "shifting the layer would change the vector; leave block 0 out with .at(...)"
        )
    tensors = {
        f"direction.{block}": row.float().contiguous() for block, row in sorted(rows.items())
    }
    _, record = vector.to_record()
    texts = {HINT: vector.origin.architecture, RECORD: json.dumps(without_nan(record))}

    def fill(temporary: Path) -> None:
        writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(SHA256, _checksum(tensors, texts))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
        for name, text in texts.items():
            writer.add_string(name, text)
        for name, row in tensors.items():
            writer.add_tensor(name, row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_named(path, ".gguf", fill)


@checked
def from_gguf(path: str | Path) -> SteeringVector:
    """Read a GGUF control vector of llama.cpp, repeng or `to_gguf`.

    `direction.N` becomes the vector at `blocks.N.hook_resid_post`; its norm the scale. What
    `to_gguf` wrote besides comes back too; otherwise the origin is unknown but for the
    architecture.

    Raises:
        InputError: the file cannot be read whole, is not a control vector, holds tensors that
            are not float rows of one length, or was changed since `to_gguf` wrote it.

    Examples:
        >>> sl.export.to_gguf(vector, folder / "cheerful.gguf")
        >>> sl.export.from_gguf(folder / "cheerful.gguf").hook_names
        ('blocks.2.hook_resid_post',)
    """
    path = Path(path)
    try:
        refuse_pickle(path)
        if not path.exists():
            raise InputError(f"no GGUF file at {str(path)!r}")
        fields, tensors = read_gguf(read_whole(path, InputError), ARCHITECTURE)
        rows = _rows(tensors)
        by_name = {name: torch.from_numpy(row) for name, row in tensors.items()}
        if SHA256 in fields and fields[SHA256] != _checksum(by_name, fields):
            raise InputError("it was changed after it was written: its checksum does not match")
        named = {resid_post(block): row for block, row in rows.items()}
        origin = Origin(architecture=str(fields.get(HINT, UNKNOWN)))
        vector = SteeringVector.from_vectors(named, origin=origin)
        return _with_record(vector, fields.get(RECORD))
    except InputError as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is not a whole GGUF file ({error}); it may be truncated"
        ) from error


def read_vector(path: str | Path) -> SteeringVector:
    """The vector of a .safetensors or .gguf file."""
    return from_gguf(path) if Path(path).suffix == ".gguf" else SteeringVector.load(path)


def _rows(tensors: Mapping[str, Any]) -> dict[int, Tensor]:
    """Rows by block, sorted. Raises `InputError` where a name is no direction.N, or a repeat."""
    rows: dict[int, Tensor] = {}
    for name, row in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) in rows:
            raise InputError(f"it has a tensor {name!r}; expected direction.N, once")
        rows[int(match[1])] = torch.from_numpy(row)
    if not rows:
        raise InputError("it holds no direction.N")
    return dict(sorted(rows.items()))


def _checksum(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str:
    """Of the tensors and of the texts that are read; other tools may add fields of their own."""
    return checksum(tensors, {name: fields.get(name) for name in (HINT, RECORD)})


def _with_record(vector: SteeringVector, text: Any) -> SteeringVector:
    """With the scale, calibration and origin of a record, where there is one that fits."""
    if text is None:
        return vector
    try:
        record = strict_json(text)
        written = SteeringVector.from_record(dict(vector), record)
    except (ValueError, TypeError) as error:  # InputError is a ValueError
        raise InputError(f"its {RECORD} does not fit its tensors: {error}") from error
    if not isinstance(written.operator, Add):
        raise InputError(f"its {RECORD} names an operator that a control vector cannot carry")
    # The tensors are what llama.cpp adds, so they decide; they are sorted, the record need not be.
    if set(written.hook_names) != set(vector.hook_names):
        raise InputError(f"its {RECORD} does not fit its tensors: other hooks")
    rows = vector.at(*written.hook_names).rows
    if not torch.allclose(written.rows, rows, rtol=1e-4):
        raise InputError(f"its {RECORD} does not fit its tensors: other rows")
    return replace(
        vector,
        hook_names=written.hook_names,
        directions=rows / written.scale[:, None],
        scale=written.scale,
        calibration=written.calibration,
        origin=written.origin,
    )
