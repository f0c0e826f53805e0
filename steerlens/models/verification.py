"""See that a Bridge computes what Hugging Face computes from the same weights.

TransformerLens rewrites parts of a model to hook them. Where that gives other logits, every number
measured on it would be about another model.
"""

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.errors import ModelError, told
from steerlens.models.hooked_model import (
    checkpoint_name,
    context_length,
    hugging_face_model,
    named_weights,
)
from steerlens.models.linear import OneDnnLinear, use_one_dnn

TOLERANCE = 1e-3
"""The largest difference, root mean square over that of the centred logits. Rounding in float32
stays a hundred times below it; in half precision `ROUNDINGS` times what rounding does there."""

ROUNDINGS = 2

N_TOKENS, N_PADDED = 16, 5

_OFFLOADED = (
    "{} is offloaded, so its weights are not there to be read; put every layer on a device, such "
    "as 'cpu' or 'cuda:0', or load the model in a smaller dtype"
)

_checked: "weakref.WeakSet[Any]" = weakref.WeakSet()


def check_device_map(device_map: str | Mapping[str, str | int] | None) -> None:
    """Raise `ModelError` on what is no device map, or sends layers to the disk or to "meta"."""
    if device_map is None or (isinstance(device_map, str) and device_map):
        return
    if not isinstance(device_map, Mapping) or not device_map:  # what the annotation promises
        raise ModelError(
            "expected a device_map such as 'balanced', or module name -> device such as "
            f"{{'': 'cuda:0'}}, got {told(device_map)}"
        )
    away = [part or "the model" for part, place in device_map.items() if place in ("disk", "meta")]
    if away:
        raise ModelError(_OFFLOADED.format(", ".join(away)))


def check_placed(model: Any, device_map: str | Mapping[str, str | int] | None) -> None:
    """Raise `ModelError` where a device map names what is no module or weight of the model."""
    if not isinstance(device_map, Mapping):
        return
    wrapped = hugging_face_model(model)
    named = [*wrapped.named_modules(), *wrapped.named_parameters(), *wrapped.named_buffers()]
    known = {checkpoint_name(name) for name, _ in named}
    unknown = [name for name in device_map if name not in known]
    if unknown:
        raise ModelError(
            f"device_map names {', '.join(map(repr, unknown))}, and the model has no such module; "
            f"it has {', '.join(name for name, _ in wrapped.named_children())}"
        )


def check_model(model: Any) -> None:
    """See that the model's logits are those of Hugging Face's own code, from the same weights.

    On two rows of up to 16 tokens spread over the vocabulary, the second of them padded on the
    tokenizer's side, against the rows run alone with the attention that Hugging Face chooses by
    itself. The weights are shared, so it takes three short forward passes (five in half precision)
    and next to no memory. Done once a model: by `load_model`, and for a Bridge made elsewhere when
    it first runs without hooks of others. Not for what is not the checkpoint's model any more, or
    cannot be built twice: a `HookedTransformer`, compatibility mode, quantized weights, PyTorch
    hooks on parts, a dtype in which Hugging Face's own logits overflow. Warns where Hugging Face's
    model cannot be built or run.

    Args:
        model: A model of TransformerLens.

    Raises:
        ModelError: It is none; weights are offloaded (on the device "meta"); or the root mean
            square of the difference is more than 0.001 of that of the centred logits, or NaN. In
            half precision twice as much is allowed as one more rounding of what every innermost
            module puts out changes, so a small fault goes unseen there.

    Examples:
        >>> sl.check_model(model)
    """
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise ModelError(
            "expected a model of TransformerLens, as load_model returns, got "
            f"{type(model).__name__}"
        )
    if model in _checked:
        return
    if hugging_face_model(model) is not None:
        for name, weight in named_weights(model):
            if weight.device.type == "meta":
                raise ModelError(_OFFLOADED.format(name))
    if not _is_plain(model):
        _checked.add(model)
    elif not _is_hooked(model):
        _compare(model)
        _checked.add(model)


def _compare(model: Any) -> None:
    """Raise `ModelError` where a plain Bridge's logits are not Hugging Face's."""
    name = repr(str(getattr(model.cfg, "model_name", "the model")))
    tokens, mask = probe(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            plain = _plain_model(model.original_model)
            expected = _run_alone(plain, tokens, mask)
            allowed = max(TOLERANCE, ROUNDINGS * _rounding(plain, tokens, mask, expected))
        except Exception as error:  # whatever a model's own code raises where it is built alone
            _checked.add(model)
            warnings.warn(
                f"{name}: not checked against Hugging Face, whose own model could not be built or "
                f"run ({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        if not all(bool(row.isfinite().all()) for row in expected):
            # An overflow of the dtype is no fault of the Bridge; reading such activations raises.
            return
        logits = model(tokens, return_type="logits", attention_mask=mask.long())
    for where, row in (("", 0), (" where a batch is padded", 1)):
        gap = logits_gap(logits[row][mask[row]], expected[row])
        if not gap <= allowed:
            raise ModelError(
                f"{name}: TransformerLens does not reproduce this model{where}: its logits "
                f"differ from Hugging Face's by {gap:.2g} of their size (expected at most "
                f"{allowed:.2g}); use another model, or another version of TransformerLens"
            )


def own_model(model: Any) -> Any:
    """Hugging Face's own model with the weights of a Bridge; None where it would be another one.

    That is where the Bridge is not what the checkpoint says (see `check_model`), or has hooks of
    others on it.
    """
    if not is_untouched(model):
        return None
    plain = _plain_model(model.original_model)
    if any(isinstance(part, OneDnnLinear) for part in model.original_model.modules()):
        use_one_dnn(plain)
    return plain


def is_spread(wrapped: Any) -> bool:
    """Whether a model of Hugging Face's has its parts on several devices."""
    return len(set(getattr(wrapped, "hf_device_map", {}).values())) > 1


def is_untouched(model: Any) -> bool:
    """Whether a Bridge is what the checkpoint says, without hooks of others."""
    return _is_plain(model) and not _is_hooked(model)


def mark_checked(model: Any) -> None:
    """Spare `model` the check of `check_model`."""
    _checked.add(model)


def _is_hooked(model: Any) -> bool:
    """Whether hooks are on the model that TransformerLens did not put there itself."""
    hooks = [handle.user_hook for point in model.hook_dict.values() for handle in point.fwd_hooks]
    return not all(str(hook.__module__).startswith("transformer_lens") for hook in hooks)


def _is_plain(model: Any) -> bool:
    """Whether the model should be what its weights say, in Hugging Face's code."""
    from transformer_lens.hook_points import HookPoint

    wrapped = hugging_face_model(model)
    if wrapped is None or getattr(model, "compatibility_mode", False):
        return False
    if getattr(wrapped.config, "quantization_config", None) is not None:
        return False
    hooks = (
        hook
        for part in wrapped.modules()
        if not isinstance(part, HookPoint)
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
    # Both libraries read activations by hooks of their own, and leave them where they are.
    libraries = ("transformers.", "transformer_lens.")
    return all(str(getattr(hook, "__module__", "")).startswith(libraries) for hook in hooks)


def probe(
    model: Any,
) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Two rows of token ids, the same ones every time, and which of them are real."""
    n = min(N_TOKENS, context_length(model) or N_TOKENS)
    ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, 2 * n).long()
    tokens = torch.stack([ids[::2], ids[1::2]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    padded = max(0, min(N_PADDED, n - 2))
    is_left = getattr(model.tokenizer, "padding_side", "right") == "left"
    mask[1, slice(0, padded) if is_left else slice(n - padded, n)] = False
    return tokens.to(model.cfg.device), mask.to(model.cfg.device)


def _run_alone(
    plain: Any, tokens: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]
) -> list[Float[Tensor, "_ vocab"]]:
    """Logits of Hugging Face's own model at the real tokens of each row."""
    logits = (
        plain(ids[real][None], use_cache=False).logits[0]
        for ids, real in zip(tokens, mask, strict=True)
    )
    return [row.to(tokens.device) for row in logits]


def _rounding(
    plain: Any,
    tokens: Int[Tensor, "row token"],
    mask: Bool[Tensor, "row token"],
    expected: list[Float[Tensor, "_ vocab"]],
) -> float:
    """`logits_gap` when every innermost module's output is rounded again; 0 from float32 on."""
    if torch.finfo(expected[0].dtype).eps < TOLERANCE / ROUNDINGS:
        return 0.0
    generator = torch.Generator().manual_seed(0)

    def round_again(part: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) - 0.5
        wide = output.float()
        return (wide + wide * signs * torch.finfo(output.dtype).eps).to(output.dtype)

    handles = [
        part.register_forward_hook(round_again)
        for part in plain.modules()
        if not any(True for _ in part.children())
    ]
    try:
        moved = _run_alone(plain, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()
    return logits_gap(torch.cat(moved), torch.cat(expected))


def _plain_model(wrapped: Any) -> Any:
    """Hugging Face's own model with the very weights of the wrapped one, not a copy of them."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(wrapped.config)
    # What the Bridge asks for, to hook attention; Hugging Face chooses by itself.
    config.output_attentions = False
    config._attn_implementation = None
    with init_empty_weights(include_buffers=False):
        plain = type(wrapped)._from_config(config).eval()
    weights = {checkpoint_name(name): weight for name, weight in wrapped.state_dict().items()}
    plain.load_state_dict(
        {name: weights[name] for name in plain.state_dict()}, strict=True, assign=True
    )
    if is_spread(wrapped):
        return _spread(plain, wrapped.hf_device_map)
    return plain.to(next(wrapped.parameters()).device)


def _spread(plain: Any, device_map: Mapping[str, Any]) -> Any:
    """The model with each part of the map moving what it is given to its own device.

    accelerate's `dispatch_model` has every layer inside a part do so, which takes longer than the
    layers do.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    parts = dict(plain.named_modules())
    skipped = getattr(
        plain, "_skip_keys_device_placement", None
    )  # caches, which stay where they are
    for name in device_map.keys() & parts.keys():
        hook = AlignDevicesHook(device_map[name], place_submodules=True, skip_keys=skipped)
        add_hook_to_module(parts[name], hook)
    add_hook_to_module(plain, AlignDevicesHook(io_same_device=True, skip_keys=skipped))
    plain.hf_device_map = dict(device_map)
    return plain


def logits_gap(
    logits: Float[Tensor, "token vocab"], expected: Float[Tensor, "token vocab"]
) -> float:
    """Root mean square of the difference, over that of the centred expected logits.

    0 where both are the same, also where all tokens are as likely and so the logits have no size.
    """
    ours, theirs = logits.double(), expected.double()
    size = (theirs - theirs.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    apart = (ours - theirs).square().mean().sqrt()
    return float(apart / size) if apart != 0 else 0.0
