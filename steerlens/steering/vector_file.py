"""What a steering vector is outside a program: bytes of a file, words, a table of a notebook."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import (
    number,
    read_whole,
    refuse_pickle,
    refuse_pickle_name,
    strict_json,
    without_nan,
    write_whole,
)
from steerlens.models.weight_processing import UNKNOWN
from steerlens.steering.coefficients import MEASURES, Calibration
from steerlens.steering.conditions import Condition
from steerlens.steering.operators import operator_of, operator_record
from steerlens.steering.origin import Origin
from steerlens.tables import fragment, hook_label, shortened

FORMAT = "steerlens steering vector"
FORMAT_VERSION = 1
KEY = "steerlens"
_CONDITION = "condition."
MEANING = {
    "hook": "TransformerLens hook names; blocks.N.hook_resid_post is the output of block N, "
    "counted from 0, before any final norm",
    "normalisation": "each tensor named after a hook is a direction of norm 1; with the operator "
    "add, a plain coefficient c moves the activation by c * scale along it, in residual units",
}


def record_of(vector: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A vector's tensors by name, and everything else as plain values."""
    tensors = dict(zip(vector.hook_names, vector.directions, strict=True))
    known, condition = vector.calibration, vector.condition
    record: dict[str, Any] = {
        "hooks": list(vector.hook_names),
        "scale": vector.scale.tolist(),
        "operator": operator_record(vector.operator),
        **{name: getattr(known, name).tolist() for name in MEASURES},
        "boundary_budget": known.budget,
        "boundary_text": known.text,
        **({"boundary_is_joint": True} if known.is_joint else {}),
        "origin": vector.origin.to_dict(),
        "condition": None,
    }
    if condition is not None:
        tensors[_CONDITION + condition.hook_name] = condition.direction
        record["condition"] = {
            "hook": condition.hook_name,
            "threshold": condition.threshold,
            "above": condition.above,
            "scope": condition.scope,
        }
    return tensors, record


def fields_of(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `SteeringVector`; raises whatever a record of the wrong form raises."""
    names, origin = tuple(record["hooks"]), record["origin"]
    condition = record["condition"]
    if condition is not None:
        direction = _real(tensors[_CONDITION + condition["hook"]])
        rest = number(condition["threshold"]), condition["above"], condition["scope"]
        condition = Condition(condition["hook"], direction, *rest)
    numbers = {
        field: torch.tensor([number(value) for value in record[field]])
        for field in ("scale", *MEASURES)
    }
    return {
        "hook_names": names,
        "directions": torch.stack([_real(tensors[name]) for name in names]),
        "scale": numbers.pop("scale"),
        "calibration": Calibration(
            **numbers,
            budget=record["boundary_budget"],
            text=record["boundary_text"],
            is_joint=record.get("boundary_is_joint", False),
        ),
        "operator": operator_of(**record["operator"]),
        "condition": condition,
        "origin": Origin(**{**origin, "pair_hashes": tuple(origin.get("pair_hashes", ()))}),
    }


def _real(tensor: Tensor) -> Tensor:
    """In float32. Raises `TypeError` on whole, complex and other numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"expected float tensors, got {tensor.dtype}")
    return tensor.float()


def write_named(path: str | Path, suffix: str, write: Callable[[Path], object]) -> None:
    """As `write_whole`. Raises `InputError` on another suffix and where nothing can be written."""
    path = Path(path)
    if path.suffix != suffix:
        raise InputError(f"expected a file name that ends in {suffix}, got {path.name!r}")
    try:
        write_whole(path, write)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def encode(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """The bytes of a file: `tensors` in float32 and `record`, a checksum of both with them.

    The same values give the same bytes.
    """
    from safetensors.torch import save

    plain = {name: t.detach().cpu().float().contiguous().clone() for name, t in tensors.items()}
    header = {"format": FORMAT, "version": FORMAT_VERSION, "meaning": MEANING, **record}
    header = without_nan(header)
    header["sha256"] = checksum(plain, header)
    # One key: safetensors writes several in an order of its own, and the bytes would change.
    return bytes(save(plain, {KEY: json.dumps(header)}))


def decode(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file.

    Raises `InputError` when there is no such file, it is a pickle, not safetensors, truncated,
    changed after it was written, not a steering vector, or of a version from the future.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    refuse_pickle_name(path)
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
    if header.pop("sha256", None) != checksum(tensors, header):
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


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """The sha256 (hex) of a header and of tensors: names, shapes, types and numbers."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def described(vector: Any) -> dict[str, str]:
    """`SteeringVector.describe`."""
    origin, known = vector.origin, vector.calibration
    hidden = (UNKNOWN, origin.pair_hashes)
    together = ", all hooks pushed at once" if known.is_joint else ""
    return {
        "operator": str(vector.operator),
        "condition": str(vector.condition),
        "boundary": f"{known.budget}, on {known.text} text{together}",
        **{name: text for name, text in origin.to_dict().items() if text not in hidden},
    }


def shown(vector: Any) -> str:
    """A vector as a notebook shows it."""
    origin, known = vector.origin, vector.calibration
    columns = {
        "layer": [hook_label(name) for name in vector.hook_names],
        "scale": vector.scale.tolist(),
        "resid norm": known.resid_norm.tolist(),
        "boundary -": known.boundary_neg.tolist(),
        "boundary +": known.boundary_pos.tolist(),
    }
    about = [repr(vector), f"model {shortened(origin.model)}"]
    about += [f"boundary of {shortened(known.budget)} on {shortened(known.text)} text"]
    about += ["all hooks pushed at once"] if known.is_joint else []
    return fragment(about, pd.DataFrame(columns), note="residual units")
