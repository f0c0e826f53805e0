"""The file of a steering vector: safetensors, with everything else as JSON in its metadata."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import _refuse_pickle_name, read_whole, refuse_pickle, strict_json, without_nan

FORMAT = "steerlens steering vector"
FORMAT_VERSION = 1
KEY = "steerlens"
MEANING = {
    "hook": "TransformerLens hook names; blocks.N.hook_resid_post is the output of block N, "
    "counted from 0, before any final norm",
    "normalisation": "each tensor named after a hook is a direction of norm 1; with the operator "
    "add, a plain coefficient c moves the activation by c * scale along it, in residual units",
}


def encode(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """The bytes of a file: `tensors` in float32 and `record`, a checksum of both with them.

    The same values give the same bytes.
    """
    from safetensors.torch import save

    plain = {name: t.detach().cpu().float().contiguous().clone() for name, t in tensors.items()}
    header = {"format": FORMAT, "version": FORMAT_VERSION, "meaning": MEANING, **record}
    header = without_nan(header)
    header["sha256"] = _checksum(plain, header)
    # One key: safetensors writes several in an order of its own, and the bytes would change.
    return bytes(save(plain, {KEY: json.dumps(header)}))


def decode(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file.

    Raises `InputError` when there is no such file, it is a pickle, not safetensors, truncated,
    changed after it was written, not a steering vector, or of a version from the future.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    _refuse_pickle_name(path)
    content = read_whole(path, InputError)
    try:
        tensors = load(content)
        header = _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Only now: the length that a safetensors file begins with may look like a pickle.
        refuse_pickle(path)
        raise InputError(
            f"{str(path)!r} is not a whole safetensors file ({error}); it may be truncated"
        ) from error
    if header.get("format") != FORMAT:
        raise InputError(
            f"{str(path)!r} holds no steering vector of steerlens (its metadata has no "
            f"{FORMAT!r}); write one with SteeringVector.save or `steerlens extract`"
        )
    version = header.get("version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{str(path)!r} has format version {version!r}; this steerlens reads 1 to "
            f"{FORMAT_VERSION}, so a newer one is needed"
        )
    given = header.pop("sha256", None)
    if given != _checksum(tensors, header):
        raise InputError(
            f"{str(path)!r} was changed after it was written: its checksum does not match"
        )
    return tensors, header


def _metadata(content: bytes) -> dict[str, Any]:
    """The record in a file that safetensors has read, so that its header is sound."""
    length = int.from_bytes(content[:8], "little")
    whole = strict_json(content[8 : 8 + length].decode("utf-8"))
    header = strict_json((whole.get("__metadata__") or {}).get(KEY, "{}"))
    if not isinstance(header, dict):
        raise ValueError(f"the metadata {KEY!r} is not an object")
    return header


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
