"""Hugging Face's own model under a Bridge, for passes that look at block outputs alone.

On a GPU a Bridge's hook points, and the attention that it asks for to hook its weights, take more
time than the arithmetic; where nothing inside a block is hooked they are not needed.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.engine.compiled import CompiledBlocks
from steerlens.models import verification
from steerlens.models.hooked_model import HookedModel, hugging_face_model, weight_module
from steerlens.models.hooks import keeping, resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap, relative_gap

DEVICES = {"cuda"}
"""Where it pays for whole texts: on a CPU a Bridge costs what its arithmetic costs."""

_known: "weakref.WeakKeyDictionary[Any, BareModel | None]" = weakref.WeakKeyDictionary()


class BareModel(torch.nn.Module):
    """Hugging Face's own model, to be run and hooked as a Bridge is (see `HookedModel`).

    Its hooks are the blocks' outputs, `blocks.N.hook_resid_post`. The weights are the Bridge's own,
    not copies.
    """

    def __init__(self, bridge: Any, plain: Any, blocks: Sequence[Any]) -> None:
        super().__init__()
        self.cfg = bridge.cfg
        self.tokenizer = bridge.tokenizer
        self.original_model = plain
        self.blocks = list(blocks)  # a list, so that they are not listed twice
        self.hook_dict = {resid_post(i): block for i, block in enumerate(self.blocks)}
        weights = sum(weight.numel() for block in self.blocks for weight in block.parameters())
        self.block_operations: float = 2 * weights / len(self.blocks)
        """Floating-point operations of a token in a block, two a weight; the mean over blocks.

        More than that of a mixture of experts, of which a token passes through few."""
        self.made_of = _made_of(bridge)
        self.compiled: CompiledBlocks | None = None
        self.can_resume = True
        self._calls: dict[int, dict[int, Callable[..., Any]]] = {}
        self._takes_positions = "position_ids" in inspect.signature(plain.forward).parameters
        self.eval().requires_grad_(False)

    def forward(
        self,
        tokens: Int[Tensor, "row token"],
        *,
        return_type: str | None = "logits",  # noqa: ARG002 (as a Bridge takes it)
        attention_mask: Int[Tensor, "row all_token"] | Float[Tensor, "row 1 _ _"] | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Float[Tensor, "row last_token vocab"]:
        """The logits. Positions are counted from each row's first token that is not masked.

        Unless they are given: `options` are Hugging Face's own."""
        kwargs: dict[str, Any] = {"use_cache": past_key_values is not None, **options}
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
            counts = self._takes_positions and "position_ids" not in options
            if counts and not bool(attention_mask[:, 0].all()):
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
                kwargs["position_ids"] = positions[:, -tokens.shape[1] :]
        is_alone = attention_mask is None and past_key_values is None
        with self._noting_calls(*tokens.shape) if is_alone else nullcontext():
            logits: Tensor = self.original_model(input_ids=tokens, **kwargs).logits
        return logits

    def resume(self, values: Float[Tensor, "row token d_model"], block: int, last: int) -> bool:
        """Run blocks `block` to `last` alone, from the residual entering the first of them.

        They are given what the model's own forward pass gave them at this number of tokens. False,
        and nothing run, where that is not known yet, or is not the same for all rows.
        """
        calls = self._calls.get(values.shape[1], {})
        if not self.can_resume or any(i not in calls for i in range(block, last + 1)):
            return False
        for i in range(block, last + 1):
            output = calls[i](self.blocks[i], values)
            values = output[0] if isinstance(output, tuple) else output
        return True

    @contextmanager
    def _noting_calls(self, n_rows: int, n_tokens: int) -> Iterator[None]:
        """Keep how each block is called, where all beside the residual is the same for all rows."""
        calls = self._calls.setdefault(n_tokens, {})
        # One row does not show it, and an inference tensor could not be differentiated later.
        if n_rows < 2 or len(calls) == len(self.blocks) or torch.is_inference_mode_enabled():
            yield
            return

        def note(i: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001
                beside = args[1:]
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                if not _is_shared((beside, rest), n_rows):
                    return
                if args:
                    calls[i] = lambda block, values: block(values, *beside, **rest)
                else:
                    calls[i] = lambda block, values: block(hidden_states=values, **rest)

            return hook

        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                handle = block.register_forward_pre_hook(note(i), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = ()) -> Iterator[None]:
        """Forward hooks on block outputs inside the block. Raises `KeyError` for other names."""
        with ExitStack() as stack:
            for name, function in fwd_hooks:
                handle = self.hook_dict[name].register_forward_hook(_on_output(function))
                stack.callback(handle.remove)
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's own."""
        return self.original_model.generate(*args, **kwargs)

    def compile_blocks(self) -> None:
        """Compile the blocks, once; the first pass then takes seconds more (see `compiled`).

        Not those of a model on several devices, whose blocks move what they are given first.
        """
        if self.compiled is None and not verification.is_spread(self.original_model):
            self.compiled = CompiledBlocks(self.blocks)


def no_prefix() -> Any:
    """A cache without keys and values. Given it, Hugging Face's code asks the GPU for nothing.

    Without one it looks for packed sequences, and waits for all that the GPU is at.
    """
    from transformers import DynamicCache

    return DynamicCache()


def for_hooks(
    model: HookedModel, hook_names: Sequence[str], *, on_cpu: bool = False
) -> HookedModel:
    """What to run where only `hook_names` are hooked: the `BareModel`, or `model` itself.

    The bare one where all of them are block outputs and the model is a Bridge on CUDA devices
    (with `on_cpu` on a CPU too), is what its checkpoint says, and has no hooks of others. It is
    built once a model and compared with the Bridge: at every block's output, on two rows of tokens,
    one of them padded. Where they differ by more than rounding, it is not used, with a warning.
    """
    if not _is_eligible(model, on_cpu=on_cpu):
        return model
    if not _shares_weights(_known.get(model), model):
        # Built before weights or a forward were replaced, or never.
        _known[model] = None
        _known[model] = _checked_bare(model)
    bare = _known[model]
    if bare is None or not all(name in bare.hook_dict for name in hook_names):
        return model
    return bare


def _is_eligible(model: Any, *, on_cpu: bool) -> bool:
    device = getattr(model.cfg, "device", None)
    if isinstance(model, BareModel) or device is None:
        return False
    if torch.device(device).type not in DEVICES and not on_cpu:
        return False
    return verification.is_untouched(model)


def _shares_weights(bare: BareModel | None, model: Any) -> bool:
    """Whether weights and parts are the same still; a model without a bare one stays so."""
    # Moving a model, or changing its dtype, gives it others.
    if bare is None:
        return model in _known
    if bare.made_of != _made_of(model):
        return False
    theirs = {weight.data_ptr() for weight in weight_module(model).parameters()}
    return all(weight.data_ptr() in theirs for weight in weight_module(bare).parameters())


def _made_of(model: Any) -> list[tuple[type, Any]]:
    """What runs in a Bridge, its weights apart: each part's class, and a forward of its own."""
    return [
        (type(part), part.__dict__.get("forward")) for part in hugging_face_model(model).modules()
    ]


def _checked_bare(model: Any) -> BareModel | None:
    try:
        plain = verification.own_model(model)
        blocks = None if plain is None else _blocks(model, plain)
        if blocks is None:
            return None
        if next(plain.parameters()).is_cuda:
            fuse_norms(plain)
        bare = BareModel(model, plain, blocks)
        verification.mark_checked(bare)
        reason = _difference(model, bare)
    except Exception as error:  # whatever a model's own code raises where it is built alone
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return bare
    warnings.warn(
        f"Hugging Face's own blocks do not stand in for the Bridge's ({reason}); passes run "
        "through the Bridge, which is slower",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> int:
    """Have RMS norms run as one kernel each, where that gives the same; how many of them now do.

    Hugging Face writes each as some eight kernels, which on a GPU is a tenth to a third of a pass.
    In half precision the weight is then multiplied before the one rounding, not between two. Norms
    that move what they are given to another device first stay as they are.
    """
    generator, n_fused = torch.Generator().manual_seed(0), 0
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            continue
        if "forward" in module.__dict__:  # accelerate's
            continue
        # Some take a gate too, for which they may have to be asked.
        n_inputs = len(inspect.signature(module.forward).parameters)
        if "RMSNorm" not in type(module).__name__ or n_inputs != 1:
            continue
        fused = partial(_rms_norm, module)
        sizes = torch.tensor([1.0, 1.0, eps**0.5, eps**0.5])  # at the last two eps counts
        probe = (sizes[:, None] * torch.randn(4, len(weight), generator=generator)).to(weight)
        gaps = relative_gap(fused(probe), module(probe))
        if bool((gaps <= allowed_gap(weight.dtype, least=1e-6, roundings=2)).all()):
            module.__dict__["forward"] = fused
            n_fused += 1
    return n_fused


def _rms_norm(
    module: Any, hidden_states: Float[Tensor, "*row d_model"]
) -> Float[Tensor, "*row d_model"]:
    shape, eps = module.weight.shape, module.variance_epsilon
    return torch.nn.functional.rms_norm(hidden_states, shape, module.weight, eps)


def _blocks(model: Any, plain: Any) -> list[Any] | None:
    """The plain model's blocks, by the names that the Bridge's have in the model it wraps."""
    names = {id(module): name for name, module in hugging_face_model(model).named_modules()}
    found = [names.get(id(block)) for block in model.blocks]
    if not found or None in found:
        return None
    return [plain.get_submodule(name) for name in found]


def _difference(model: Any, bare: BareModel) -> str | None:
    """Where block outputs or logits differ by more than rounding, and by how much; or None."""
    tokens, mask = verification.probe(model)
    ours, theirs = _outputs(bare, tokens, mask), _outputs(model, tokens, mask)
    # The two attentions round differently in every block; a wrong block is off by far more.
    allowed = allowed_gap(model.cfg.dtype, least=verification.TOLERANCE)
    for name, expected in theirs.items():
        of_device = mask.to(expected.device)
        gap = _relative(ours[name][of_device], expected[of_device])
        if not gap <= allowed:
            return f"{name} differs by {gap:.2g} of its size"
    bare.can_resume = _resumes(bare, tokens, allowed)
    return None


def _resumes(bare: BareModel, tokens: Int[Tensor, "row token"], allowed: float) -> bool:
    """Whether blocks run alone give what they gave, for rows in another order too."""
    first, last = resid_post(0), resid_post(len(bare.blocks) - 1)
    whole, alone = _outputs(bare, tokens, None), dict[str, Tensor]()
    with torch.no_grad(), bare.hooks(keeping(alone, [last])):
        if not bare.resume(whole[first].flip(0), 1, len(bare.blocks) - 1):
            return False
    found, expected = alone.get(last, whole[first]).flip(0), whole[last]
    return _relative(found.flatten(0, 1), expected.flatten(0, 1)) <= allowed


def _outputs(
    model: Any, tokens: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"] | None
) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    names = [resid_post(i) for i in range(len(model.blocks))]
    kwargs = {} if mask is None else {"attention_mask": mask.long()}
    with inference(model), model.hooks(fwd_hooks=keeping(found, names, torch.clone)):
        found["logits"] = model(tokens, return_type="logits", **kwargs)
    return found


def _relative(found: Float[Tensor, "token d"], expected: Float[Tensor, "token d"]) -> float:
    """The median over tokens of the difference's norm over the expected norm."""
    gaps = relative_gap(found, expected)
    return float(gaps.median()) if bool(gaps.isfinite().all()) else float("nan")


def _is_shared(value: Any, n_rows: int) -> bool:
    """Whether an argument is the same for every row of a batch."""
    if isinstance(value, Tensor):
        # One dimension may be that of the tokens.
        return value.ndim == 0 or value.shape[0] == 1 or (value.ndim == 1 and len(value) != n_rows)
    if isinstance(value, Mapping):
        return all(_is_shared(one, n_rows) for one in value.values())
    if isinstance(value, tuple | list):
        return all(_is_shared(one, n_rows) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _on_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook of PyTorch that gives `function` the block's output, first in a tuple."""

    def fire(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
        is_tuple = isinstance(output, tuple)
        changed = function(output[0] if is_tuple else output, hook=module)
        if changed is None:
            return None
        return (changed, *output[1:]) if is_tuple else changed

    return fire
