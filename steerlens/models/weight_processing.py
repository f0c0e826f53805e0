"""What was done to a model's weights; numbers of differently processed models never meet.

TransformerLens can fold the weights of norms into what reads them, and centre what is written to
the residual stream. A model predicts the same after both, but centring changes the activations and
their norms. (Folding leaves those alone; it is kept apart all the same, as one rule is safer.)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models.hooked_model import hugging_face_model
from steerlens.models.tolerance import allowed_gap

UNKNOWN = "unknown"
FOLDED = "folded norms"
CENTRED = "centred writing weights"


def weight_processing(model: Any) -> str:
    """ "none", "folded norms", "centred writing weights", both with a comma between, or "unknown".

    Norms are folded where the model's config says so (`normalization_type` ends in "Pre") or, on a
    `TransformerBridge` whose weights were processed, where no norm has weights left. Writing
    weights are centred where every row of every `W_O` has the mean 0 over d_model, within rounding
    (TransformerLens keeps no record of it). Other kinds of processing leave the residual stream as
    it was. "unknown" is for models of other classes.
    """
    if hugging_face_model(model) is not None:
        if not getattr(model, "_weights_processed", getattr(model, "compatibility_mode", False)):
            return "none"
        is_folded = all(bool((w == w.flatten()[0]).all()) for w in _norm_weights(model))
    elif hasattr(model, "load_and_process_state_dict"):
        is_folded = str(model.cfg.normalization_type).endswith("Pre")
    else:
        return UNKNOWN
    writing = [getattr(getattr(block, "attn", None), "W_O", None) for block in model.blocks]
    weights = [w for w in writing if isinstance(w, Tensor) and w.is_floating_point()]
    if len(weights) < len(writing):
        return UNKNOWN
    is_centred = any(bool(w.any()) for w in weights) and all(map(_is_centred, weights))
    done = [name for name, is_on in ((FOLDED, is_folded), (CENTRED, is_centred)) if is_on]
    return ", ".join(done) or "none"


def check_processing(model: Any, *fitted: Any) -> None:
    """See that what was fitted (directions, vectors: anything that tells its `weight_processing`)
    comes from a model processed like `model`; what does not tell, or not know, passes.

    Raises `InputError` otherwise.
    """
    known = {_processing(thing) for thing in fitted} - {UNKNOWN}
    here = weight_processing(model) if known else UNKNOWN
    for there in sorted(known):
        check_same("the directions were fitted on a model", there, "this model", here)


def check_one(fitted: Mapping[str, Any]) -> None:
    """See that named directions or vectors come from models that are all processed alike.

    Raises `InputError` otherwise.
    """
    known = {name: _processing(thing) for name, thing in fitted.items()}
    known = {name: processing for name, processing in known.items() if processing != UNKNOWN}
    for name, processing in list(known.items())[1:]:
        first = next(iter(known))
        check_same(f"{first} was fitted on a model", known[first], f"that of {name}", processing)


def check_same(mine: str, processing: str, theirs: str, other: str) -> None:
    """Raise `InputError` unless two kinds of weight processing are the same or one is unknown.

    `mine` and `theirs` say in words what has the one and what the other.
    """
    if UNKNOWN not in (processing, other) and processing != other:
        raise InputError(
            f"{mine} with {_told(processing)}, but {theirs} has {_told(other)}, so their residual "
            "streams are not the same; use models that are loaded alike (load_model processes no "
            "weights, HookedTransformer.from_pretrained does)"
        )


def processing_of(attrs: Mapping[Any, Any]) -> str:
    """The weight processing that a table's attrs tell; "unknown" where they do not."""
    return str(attrs.get("model", {}).get("weight_processing", UNKNOWN))


def _processing(fitted: Any) -> str:
    return str(getattr(fitted, "weight_processing", UNKNOWN))


def _told(processing: str) -> str:
    return "no weight processing" if processing == "none" else processing


def _norm_weights(model: Any) -> Iterator[Tensor]:
    for block in model.blocks:
        for name in ("ln1", "ln2"):
            weight = getattr(getattr(block, name, None), "weight", None)
            if isinstance(weight, Tensor):
                yield weight


def _is_centred(weight: Float[Tensor, "... d_model"]) -> bool:
    """Whether the means of the rows are 0, beside those of random rows of the same size."""
    tolerance = allowed_gap(weight.dtype, roundings=2)
    values = weight.detach().float()
    means = values.mean(dim=-1).square().mean() * values.shape[-1]
    return bool(means <= tolerance**2 * values.square().mean())
