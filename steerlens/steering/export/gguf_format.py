"""The bytes of a GGUF file as texts and rows of floats, every size held against what is there."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerlens.errors import InputError

VERSIONS = (2, 3)
_FORMS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1"}
_FORMS |= {10: "u8", 11: "i8", 12: "f8"}
"""Type of a value -> how NumPy calls it."""
_STRING, _ARRAY = 8, 9
_ROWS = {0: "f4", 1: "f2"}
"""Type of a tensor, F32 or F16 -> how NumPy calls it."""
MAX_DIMENSIONS = 4


@dataclass
class _Cursor:
    """A place in the bytes of a file, and the order of the bytes of a number."""

    content: bytes
    place: int = 0
    order: str = "<"

    def take(self, size: int) -> bytes:
        left = len(self.content) - self.place
        if size > left:
            raise ValueError(f"it claims {size} bytes where {left} are left")
        self.place += size
        return self.content[self.place - size : self.place]

    def number(self, form: str) -> Any:
        kind = np.dtype(self.order + form)
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def text(self) -> str:
        return self.take(self.number("u8")).decode("utf-8")

    def align(self, alignment: int) -> None:
        self.place += -self.place % alignment


def read_gguf(content: bytes, architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a GGUF file by key, and its tensors by name, rows of numbers in float32.

    An array's field is None. Tensors have to lie as llama.cpp wants them: in the order of their
    names, each at the first aligned place behind the one before.

    Raises:
        InputError: it is of another architecture, or a tensor is no row of F32 or F16.
        ValueError: the file is not whole, or no GGUF file of the versions that are known.
    """
    file = _Cursor(content)
    if file.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = file.number("u4")
    if version & 0xFFFF == 0:  # written on a machine with the other order
        file.order, version = ">", int.from_bytes(content[4:8], "big")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, expected 2 or 3")
    n_tensors, n_fields = file.number("u8"), file.number("u8")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = file.text()
        if key in fields:
            raise ValueError(f"its key {key!r} occurs twice")
        fields[key] = _value(file, file.number("u4"))
    if (found := fields.get("general.architecture")) != architecture:
        raise InputError(f"it has the architecture {found!r}; expected {architecture!r}")
    infos = [_tensor_info(file) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, expected a power of 2")
    file.align(alignment)
    start, tensors = file.place, {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise ValueError(f"its tensor {name!r} occurs twice")
        if kind not in _ROWS:
            raise _no_row(name, kind, shape)
        file.align(alignment)
        if offset != file.place - start:
            raise ValueError(
                f"its tensor {name!r} begins at {offset}, expected {file.place - start}"
            )
        form = np.dtype(file.order + _ROWS[kind])
        data = file.take(form.itemsize * math.prod(shape))
        if len(shape) != 1:
            raise _no_row(name, kind, shape)
        tensors[name] = np.frombuffer(data, form).astype(np.float32)
    return fields, tensors


def _value(file: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return file.text()
    if kind in _FORMS:
        return file.number(_FORMS[kind])
    if kind != _ARRAY:
        raise ValueError(f"it has a value of an unknown type, {kind}")
    kind, count = file.number("u4"), file.number("u8")
    if kind in _FORMS:
        file.take(np.dtype(_FORMS[kind]).itemsize * count)
    elif kind == _STRING:
        for _ in range(count):
            file.text()
    else:
        raise ValueError(f"it has an array of the type {kind}")
    return None


def _tensor_info(file: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor; in the file the last dimension comes first."""
    name, n_dimensions = file.text(), file.number("u4")
    if n_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"its tensor {name!r} has {n_dimensions} dimensions")
    shape = tuple(file.number("u8") for _ in range(n_dimensions))[::-1]
    return name, shape, file.number("u4"), file.number("u8")


def _no_row(name: str, kind: int, shape: tuple[int, ...]) -> InputError:
    from gguf import GGMLQuantizationType

    called = GGMLQuantizationType(kind).name  # ValueError where nobody knows it
    return InputError(f"{name} is {called} of shape {shape}; expected a row of F32 or F16")
