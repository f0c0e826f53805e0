"""GGUF control vectors, which llama.cpp and repeng read: both ways, through the `gguf` package."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import read_whole, refuse_pickle, strict_json, without_nan
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.steering import Add, Origin, SteeringVector
from steerlens.steering.vector_file import write_named

ARCHITECTURE = "controlvector"
RECORD = "steerlens.vector"
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


def to_gguf(vector: SteeringVector, path: str | Path) -> None:
    """Write a llama.cpp control vector: `direction.N` is added to the output of block N.

    The tensors are `scale * direction` in float32, so that strength c there is coefficient c here;
    scale, calibration and origin travel in the metadata. Blocks are counted from 0 on both sides,
    but llama.cpp has no slot for block 0.

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
    _, record = vector.to_record()

    def fill(temporary: Path) -> None:
        writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.origin.architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
        writer.add_string(RECORD, json.dumps(without_nan(record)))
        for block, row in sorted(rows.items()):
            writer.add_tensor(f"direction.{block}", row.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_named(path, ".gguf", fill)


def from_gguf(path: str | Path) -> SteeringVector:
    """Read a GGUF control vector of llama.cpp, repeng or `to_gguf`.

    `direction.N` becomes the vector at `blocks.N.hook_resid_post`; its norm the scale. What
    `to_gguf` wrote besides comes back too; otherwise the origin is unknown but for the
    architecture.

    Raises:
        InputError: the file cannot be read whole, is not a control vector, or holds tensors that
            are not float rows of one length.

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
        read_whole(path, InputError)  # no pipe or device, and not too large
        fields, rows = _read(path)
        architecture = fields.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise InputError(
                f"{str(path)!r} has the architecture {architecture!r}; expected {ARCHITECTURE!r}"
            )
        hint = str(fields.get(f"{ARCHITECTURE}.model_hint", "unknown"))
        named = {resid_post(block): row for block, row in sorted(rows.items())}
        vector = SteeringVector.from_vectors(named, origin=Origin(architecture=hint))
        return _with_record(vector, fields.get(RECORD))
    except InputError as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """The string fields and the rows by block of a GGUF file."""
    import gguf

    class Bounded(gguf.GGUFReader):  # type: ignore[misc, unused-ignore]
        """The package's reader takes what lies beyond the end as empty, and loops over it: for
        ever, where a header claims 2^60 numbers."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
            size = np.dtype(dtype).itemsize * int(count)
            left = max(len(self.data) - int(offset), 0)
            if size > left:
                raise ValueError(f"it claims {size} bytes where {left} are left")
            return super()._get(int(offset), dtype, count, *args, **kwargs)

        def _push_field(self, field: Any, *args: Any, **kwargs: Any) -> Any:
            if field.name in self.fields:
                raise ValueError(f"its key {field.name!r} occurs twice")
            return super()._push_field(field, *args, **kwargs)

    try:
        reader = Bounded(str(path))
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[:1] == [gguf.GGUFValueType.STRING]
        }
        tensors = {
            tensor.name: (tensor.tensor_type.name, np.array(tensor.data))
            for tensor in reader.tensors
        }
    except Exception as error:  # gguf raises many types on a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{str(path)!r} is not a whole GGUF file ({reason[0]}); it may be truncated"
        ) from error
    rows = {}
    for name, (kind, data) in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) in rows:
            raise InputError(f"{str(path)!r} has a tensor {name!r}; expected direction.N, once")
        if kind not in ("F32", "F16") or data.ndim != 1:
            raise InputError(
                f"{name} in {str(path)!r} is {kind} of shape {data.shape}; expected a row of "
                "F32 or F16"
            )
        rows[int(match[1])] = torch.from_numpy(data.astype(np.float32))
    if not rows:
        raise InputError(f"{str(path)!r} holds no direction.N")
    return fields, rows


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
