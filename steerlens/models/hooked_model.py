"""What is asked of a model, whichever generation of TransformerLens made it.

A `TransformerBridge` (version 4) wraps Hugging Face's own model and has its weights; a
`HookedTransformer` (version 3) has weights of its own. Other rooms ask here, not which one it is.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor

from steerlens.errors import ModelError


@runtime_checkable
class HookedModel(Protocol):
    """What steerlens asks of a model: `TransformerBridge` and `HookedTransformer` both have it.

    Also the attributes `cfg`, `tokenizer`, `blocks` and `hook_dict`. They are not members, as the
    instance would be looked at for them: a Bridge lists its hooks anew each time, and from Python
    3.12 on parts of a torch module are not seen. It is a torch module too: its parts' evaluation
    mode is set and restored.
    """

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...


def hugging_face_model(model: Any) -> Any:
    """Hugging Face's model inside a Bridge; None where there is none."""
    return getattr(model, "original_model", None)


def weight_module(model: Any) -> Any:
    """The module that lists all weights: a Bridge does not list those of the model it wraps."""
    wrapped = hugging_face_model(model)
    return model if wrapped is None else wrapped


def named_weights(model: Any) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    """Name and weight of every parameter, a Bridge's under the names of the checkpoint."""
    for name, weight in weight_module(model).named_parameters():
        yield checkpoint_name(name), weight


def checkpoint_name(name: str) -> str:
    """The checkpoint's name of what the model inside a Bridge calls `name`."""
    return name.replace("._original_component", "")


def context_length(model: Any) -> int | None:
    """The most tokens that a prompt may have; None where the model does not say."""
    n_ctx = getattr(model.cfg, "n_ctx", None)
    return None if n_ctx is None else int(n_ctx)


def length_switches(model: Any) -> tuple[int, ...]:
    """The numbers of tokens above which the model rotates by other angles (longrope).

    It goes by the longest row of a batch, so a shorter one must not be beside it.
    """
    config = getattr(hugging_face_model(model), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    lengths = {
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for part in of_layers
        if part.get("rope_type", part.get("type")) == "longrope"
    }
    return tuple(sorted(int(length) for length in lengths if length is not None))


def side_of_switches(model: Any, n_tokens: int) -> int:
    """How many of `length_switches` a row of so many tokens is longer than."""
    return sum(n_tokens > length for length in length_switches(model))


def is_on_one_side(model: Any, *lengths: int) -> bool:
    """Whether the model rotates texts of these lengths by the same angles."""
    return len({side_of_switches(model, length) for length in lengths}) == 1


def takes_cache(model: Any) -> bool:
    """Whether the model's forward pass takes Hugging Face's cache of keys and values."""
    is_named = "past_key_values" in inspect.signature(model.forward).parameters
    return is_named and hugging_face_model(model) is not None


def key_value_cache(model: Any) -> Any:
    """An empty cache of Hugging Face's, of which every part holds a row's keys and values alone.

    None where the model takes none, or keeps something else of what it has read.
    """
    adapter = getattr(model, "adapter", None)
    if not takes_cache(model) or not getattr(adapter, "supports_kv_cache", True):
        return None
    from transformers import DynamicCache

    empty = DynamicCache(config=hugging_face_model(model).config)
    kinds = {type(layer).__name__ for layer in empty.layers}
    return empty if kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"} else None


def last_logits_only(model: Any) -> dict[str, int]:
    """The keyword of a forward pass for the logits of the last token; none where there is none."""
    wrapped = hugging_face_model(model)
    if wrapped is None or "logits_to_keep" not in inspect.signature(wrapped.forward).parameters:
        return {}
    return {"logits_to_keep": 1}


def takes_mask(model: Any) -> bool:
    """Whether `generate` takes an attention mask, rather than reading padding off the tokens."""
    return hugging_face_model(model) is not None


def padding_id(model: Any) -> int:
    """What padding is written as: 0 where a mask tells it from tokens, else the tokenizer's id.

    Raises `ModelError` where the model would need that id and has no embedding for it.
    """
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None or takes_mask(model):
        return 0
    n_rows = int(model.cfg.d_vocab)
    if pad >= n_rows:
        raise ModelError(
            f"the tokenizer's pad token has the id {pad}, and the model's vocabulary ends at "
            f"{n_rows - 1}; resize its embeddings, or set tokenizer.pad_token to one that it has"
        )
    return int(pad)
