"""Where a steering vector comes from, and whether a model is the one it was made on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from steerlens.directions.directions import Directions
from steerlens.errors import InputError
from steerlens.models.loading import HookedModel, provenance
from steerlens.models.weight_processing import UNKNOWN, check_processing

LAYOUT = "HookedTransformer "
"""What the fingerprint of a `HookedTransformer`'s weights begins with."""

_SAMPLED = 1024


@dataclass(frozen=True)
class Origin:
    """The model, tokenizer, data and method of a steering vector; "unknown" where not recorded.

    `model` is its name, `revision` and `file_hash` as in `Provenance`; `weights`, `tokenizer` and
    `chat_template` are fingerprints (sha256, hex; "none" without a template), the first as
    `weights_fingerprint` says. `pairs` is the fingerprint of the pairs' content. `versions` are
    those of the packages. Raises `InputError` when a field is not text.
    """

    model: str = UNKNOWN
    revision: str = UNKNOWN
    file_hash: str = UNKNOWN
    weights: str = UNKNOWN
    weight_processing: str = UNKNOWN
    dtype: str = UNKNOWN
    architecture: str = UNKNOWN
    tokenizer: str = UNKNOWN
    chat_template: str = UNKNOWN
    dataset: str = UNKNOWN
    pairs: str = UNKNOWN
    method: str = UNKNOWN
    position: str = UNKNOWN
    seed: str = UNKNOWN
    versions: str = UNKNOWN

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            # A lone surrogate is text that cannot be written anywhere.
            if not isinstance(value, str) or value != value.encode("utf-8", "ignore").decode():
                raise InputError(f"the origin's {name} is text, not {value!r}")

    @classmethod
    def of(cls, model: HookedModel, directions: Directions, *, dataset: str = UNKNOWN) -> "Origin":
        """The origin of directions fitted on `model`; `dataset` is the name of their pairs.

        Raises `InputError` when they were fitted on a model with other weight processing.
        """
        check_processing(model, directions)
        record = provenance(model)
        versions = {
            "steerlens": version("steerlens"),
            "transformer-lens": record.transformer_lens,
            "transformers": record.transformers,
            "torch": record.torch,
        }
        told = ", ".join(f"{name} {number}" for name, number in versions.items())
        return replace(
            cls.of_model(model),
            dataset=dataset,
            pairs=directions.fingerprint,
            method=directions.method,
            position=str(directions.position),
            seed=str(directions.seed),
            versions=told,
        )

    @classmethod
    def of_model(cls, model: HookedModel) -> "Origin":
        """The fields that a model alone gives."""
        record = provenance(model)
        tokenizer, template = tokenizer_fingerprints(model.tokenizer)
        return cls(
            model=record.name,
            revision=record.revision,
            file_hash=record.file_hash,
            weights=weights_fingerprint(model),
            weight_processing=record.weight_processing,
            dtype=record.dtype,
            architecture=architecture(model),
            tokenizer=tokenizer,
            chat_template=template,
        )

    def to_dict(self) -> dict[str, str]:
        """The fields as a plain dict."""
        return asdict(self)

    def differences(self, other: "Origin") -> list[str]:
        """What tells the models of two origins apart, in words; what is not known differs not."""
        names = {
            "weights": "weights (or their dtype)",
            "tokenizer": "tokenizer",
            "chat_template": "chat template",
        }
        return [
            f"{what} of {self.model!r} and of {other.model!r}"
            for field, what in names.items()
            if UNKNOWN not in (getattr(self, field), getattr(other, field))
            and getattr(self, field) != getattr(other, field)
            and not (field == "weights" and self._other_layout(other))
        ]

    def _other_layout(self, other: "Origin") -> bool:
        """Whether the fingerprints of the same weights would differ.

        The files' hashes decide where both are known.
        """
        has_mark = {one.weights.startswith(LAYOUT) for one in (self, other)}
        same_file = self.file_hash == other.file_hash and self.dtype == other.dtype
        is_known = UNKNOWN not in (self.file_hash, other.file_hash)
        return len(has_mark) > 1 and (same_file or not is_known)


def architecture(model: HookedModel) -> str:
    """The Hugging Face model type, such as "llama"; "unknown" for a `HookedTransformer`."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return str(getattr(config, "model_type", UNKNOWN))


def weights_fingerprint(model: HookedModel) -> str:
    """sha256 (hex) of names, shapes, dtypes and 1024 evenly spaced values of each weight.

    Fast on any model, and other weights, another dtype or processed weights give another one. A
    change that misses every sampled value is not seen. A `HookedTransformer` names its weights in
    its own way, so its fingerprint is marked, and is not compared with one of a Bridge.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_parameters(model)):
        flat = weight.detach().reshape(-1)
        rows = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64)
        values = flat[rows.round().long().to(flat.device)].float().cpu()
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(values.numpy().tobytes())
    layout = "" if hasattr(model, "original_model") else LAYOUT
    return layout + digest.hexdigest()


def tokenizer_fingerprints(tokenizer: Any) -> tuple[str, str]:
    """sha256 (hex) of a tokenizer's vocabulary with its special tokens, and of its chat template.

    "unknown" without a tokenizer, "none" where it has no template.
    """
    if tokenizer is None:
        return UNKNOWN, UNKNOWN
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    words = json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True)
    template = getattr(tokenizer, "chat_template", None)
    return _sha256(words), "none" if template is None else _sha256(json.dumps(template))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parameters(model: HookedModel) -> Iterator[tuple[str, Any]]:
    module: Any = getattr(model, "original_model", model)
    for name, weight in module.named_parameters():
        yield name.replace("._original_component", ""), weight
