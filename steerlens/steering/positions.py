"""Which tokens of a forward pass are the prompt's, also while decoding with a KV cache."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import isgeneratorfunction
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steerlens.errors import SteeringError
from steerlens.models import HookedModel

Positions = Literal["all", "prompt", "generated", "last"] | Bool[Tensor, "prompt prompt_token"]
"""Which tokens an intervention touches: all, the prompt's, the generated ones, the last real token
of the prompt, or those of a mask over the prompt's tokens (padding included). A name means the same
tokens with and without a KV cache."""

_GENERATE = ("generate", "hf_generate", "generate_stream")


@dataclass(frozen=True)
class Pass:
    """One forward pass over columns `n_before` and later; the prompt has the first `n_prompt`.

    `real` is False at padding, over all columns up to the end of this pass.
    """

    n_before: int
    n_prompt: int
    real: Bool[Tensor, "prompt column"]

    def mask(self, positions: Positions) -> Bool[Tensor, "prompt token"]:
        """True at the tokens of this pass that `positions` names.

        Raises `SteeringError` when a mask does not have the prompt's shape.
        """
        columns = torch.arange(self.real.shape[1])
        in_prompt = (columns < self.n_prompt).expand_as(self.real)
        if isinstance(positions, Tensor):
            expected = (len(self.real), self.n_prompt)
            if tuple(positions.shape) != expected:
                raise SteeringError(
                    f"the mask has shape {tuple(positions.shape)}, but the prompts of this pass "
                    f"are {expected} (prompts, tokens)"
                )
            chosen = torch.zeros_like(self.real)
            chosen[:, : self.n_prompt] = positions.cpu()
        elif positions == "last":
            last = (columns * (self.real & in_prompt)).argmax(dim=1, keepdim=True)
            chosen = columns == last
        else:
            chosen = {"all": torch.ones_like(in_prompt), "prompt": in_prompt}.get(
                positions, ~in_prompt
            )
        return chosen[:, self.n_before :]

    def prompt_tokens(self) -> Bool[Tensor, "prompt token"]:
        """True at the real prompt tokens of this pass."""
        return self.mask("prompt") & self.real[:, self.n_before :]


@dataclass
class Watch:
    """The forward pass that the model is in, as `watch` notes it."""

    current: Pass | None = None
    n_prompt: int | None = None
    is_generating: bool = False

    def note(self, rows: int, width: int, mask: Any, n_before: int) -> None:
        """A pass over `width` new columns begins, after `n_before` that are in the cache.

        `mask` is the attention mask over all of them, if there is one.
        """
        is_first = n_before == 0 and not (self.is_generating and self.n_prompt is not None)
        if is_first:
            self.n_prompt = width
        if self.n_prompt is None:
            raise SteeringError(
                "the first pass inside the block already has a KV cache, so it is not known where "
                "the prompt ends; run the whole prompt inside the block, or steer all positions"
            )
        columns = n_before + width
        real = torch.ones((rows, columns), dtype=torch.bool)
        if mask is not None and mask.ndim == 2 and mask.shape[1] == columns:
            real = mask.bool().cpu()
        self.current = Pass(n_before, self.n_prompt, real)

    def now(self, activation: Any, hook: Any) -> Pass:
        """The pass that `activation` belongs to. Raises `SteeringError` when it is none noted."""
        found = self.current
        shape = None if found is None else (len(found.real), found.real.shape[1] - found.n_before)
        if found is None or shape != tuple(activation.shape[:2]):
            raise SteeringError(
                f"the activation at {getattr(hook, 'name', 'a hook')} is {tuple(activation.shape)},"
                f" but this pass has {shape} (prompts, tokens): steer block outputs and other hooks"
                " with a row a token"
            )
        return found


def check_positions(positions: Positions) -> None:
    """Raise `SteeringError` when a name of positions is unknown."""
    names = get_args(get_args(Positions)[0])
    if isinstance(positions, str) and positions not in names:
        raise SteeringError(f"positions are {', '.join(names)} or a mask, not {positions!r}")


@contextmanager
def watch(model: HookedModel) -> Iterator[Watch]:
    """Note every forward pass inside the block: where the prompt ends and what is padding.

    Inside `generate` the first pass is the prompt and what follows is generated. A pass outside it
    is all prompt, or, on top of a KV cache, generated. Padding is what the attention mask says (one
    row a prompt); without a mask, and with several prompts, the padding tokens on the side that the
    tokenizer pads.
    """
    noted = Watch()
    wrapped: Any = getattr(model, "original_model", None)
    with ExitStack() as stack:
        for name in _GENERATE:
            if hasattr(model, name):
                stack.enter_context(_replaced(model, name, _generating(model, name, noted)))
        if wrapped is not None:

            def before(module: Any, given: Any, named: Any) -> None:  # noqa: ARG001
                _note(noted, model, given[0] if given else None, named)

            handle = wrapped.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        else:
            forward = getattr(model, "forward")  # noqa: B009 (not in the protocol)

            def noting(given: Any = None, *rest: Any, **named: Any) -> Any:
                if isinstance(given, (str, list)):
                    raise SteeringError(
                        "give tokens, model.to_tokens(text), where only some positions are steered"
                    )
                _note(noted, model, given, named)
                return forward(given, *rest, **named)

            stack.enter_context(_replaced(model, "forward", noting))
        yield noted


def _note(noted: Watch, model: HookedModel, given: Any, named: Any) -> None:
    given = named.get("input") if given is None else given
    ids = named.get("input_ids") if given is None else given
    shown = named.get("inputs_embeds") if ids is None else ids
    if shown is None:
        raise SteeringError("cannot see the tokens of this pass; steer all positions instead")
    if shown.ndim == 1:
        shown = shown[None]
    n_before = _cached(named.get("past_key_values"), named.get("past_kv_cache"))
    mask = named.get("attention_mask")
    if mask is None and n_before == 0 and shown.ndim == 2 and not shown.is_floating_point():
        mask = _unpadded(model, shown)
    noted.note(shown.shape[0], shown.shape[1], mask, n_before)


def _cached(hugging_face: Any, transformer_lens: Any) -> int:
    """How many columns a KV cache of either library holds."""
    if hugging_face is not None:
        return int(hugging_face.get_seq_length())
    if transformer_lens is not None:
        return int(transformer_lens[0].past_keys.shape[1])
    return 0


def _unpadded(
    model: HookedModel, tokens: Int[Tensor, "prompt token"]
) -> Bool[Tensor, "prompt token"] | None:
    """False at padding tokens on the side the tokenizer pads; None for one prompt: all are real."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None or len(tokens) == 1:
        return None
    from transformer_lens.utilities.tokenize_utils import get_attention_mask

    prepends = bool(getattr(model.cfg, "default_prepend_bos", True))
    mask = get_attention_mask(model.tokenizer, tokens, prepends)
    return torch.as_tensor(mask).bool()


def _generating(model: HookedModel, name: str, noted: Watch) -> Callable[..., Any]:
    method = getattr(model, name)

    @contextmanager
    def generating() -> Iterator[None]:
        if noted.is_generating:  # one way to generate that calls another
            yield
            return
        noted.is_generating, noted.n_prompt = True, None
        try:
            yield
        finally:
            noted.is_generating = False

    def generate(*given: Any, **named: Any) -> Any:
        with generating():
            return method(*given, **named)

    def stream(*given: Any, **named: Any) -> Iterator[Any]:
        with generating():
            yield from method(*given, **named)

    return stream if isgeneratorfunction(method) else generate


@contextmanager
def _replaced(model: HookedModel, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one model, in front of its class's, inside the block."""
    had, before = name in vars(model), vars(model).get(name)
    object.__setattr__(model, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(model, name, before)
        else:
            object.__delattr__(model, name)
