"""Activations of more pairs than memory should hold: on disk, read a hook or a block at a time."""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.errors import FileError


class OnDisk:
    """A `Float[Tensor, "hook pair d_model"]` whose pairs come in blocks, in a temporary file.

    The file has no name, so that it is gone when this is, or the process. Of the indices of a
    tensor it knows those of a hook, `[i]`, and of the pairs of a block, `[:, rows]`. Raises
    `FileError` where no folder for temporary files can be used.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this is)
        except OSError as error:
            raise FileError(
                "expected a folder for temporary files, to keep the unsteered activations of many "
                f"pairs in, got none: {error.strerror or error}; name one as TMPDIR"
            ) from error
        self._blocks: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        self._dtype: Any = None

    def add(self, rows: Sequence[int], values: Float[Tensor, "hook pair d_model"]) -> None:
        """Write the activations of a block of pairs. Raises `FileError` where there is no room."""
        array = values.contiguous().numpy()
        self._dtype = array.dtype
        try:
            self._blocks[tuple(rows)] = self._file.seek(0, 2), array.shape
            self._file.write(array.data)
            self._file.flush()
        except OSError as error:
            raise FileError(
                f"cannot write the unsteered activations of {array.shape[1]} pairs to "
                f"{tempfile.gettempdir()!r}: {error.strerror or error}; make room there, or name "
                "another folder as TMPDIR"
            ) from error

    @property
    def shape(self) -> tuple[int, int, int]:
        """Hooks, pairs, width."""
        shapes = [shape for _, shape in self._blocks.values()]
        return shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | tuple[slice, Sequence[int]]) -> Float[Tensor, "... d_model"]:
        if isinstance(key, tuple):
            place, shape = self._blocks[tuple(key[1])]
            return torch.from_numpy(self._read(place, shape))
        values = np.empty(self.shape[1:], self._dtype)
        for rows, (place, shape) in self._blocks.items():
            values[list(rows)] = self._read(place, shape[1:], key)
        return torch.from_numpy(values)

    def _read(self, place: int, shape: tuple[int, ...], index: int = 0) -> NDArray[Any]:
        """The array at that place of the file, or the one of that number from there on."""
        array = np.empty(shape, self._dtype)
        self._file.seek(place + index * array.nbytes)
        self._file.readinto(array.data)
        return array
