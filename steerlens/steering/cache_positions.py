"""Which tokens of a forward pass are the prompt's, also while decoding with a KV cache."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import isgeneratorfunction
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models.loading import HookedModel

Positions = Literal["all", "prompt", "generated", "last"] | Bool[Tensor, "prompt prompt_token"]
"""Which tokens an intervention touches: all, the prompt's, the generated ones, the last real token
of the prompt, or those of a mask over the prompt's tokens (padding included). A name means the same
tokens with and without a KV cache."""

_NOTHING = object()
_GENERATE = ("generate", "hf_generate", "generate_stream")


@dataclass(frozen=True)
class Pass:
    """One forward pass over columns `n_before` and later; the prompt has the first `n_prompt`.

    `real` is False at padding, over all columns up to the end of this pass. `memory` is what was
    decided on this prompt, kept from pass to pass.
    """

    n_before: int
    n_prompt: int
    real: Bool[Tensor, "prompt column"]
    memory: dict[str, Any] = field(default_factory=dict)

    def mask(self, positions: Positions) -> Bool[Tensor, "prompt token"]:
        """True at the tokens of this pass that `positions` names.

        Raises `InputError` when a mask does not have the prompt's shape.
        """
        columns = torch.arange(self.real.shape[1])
        in_prompt = (columns < self.n_prompt).expand_as(self.real)
        if isinstance(positions, Tensor):
            expected = (len(self.real), self.n_prompt)
            if tuple(positions.shape) != expected:
                raise InputError(
                    f"the mask has shape {tuple(positions.shape)}, but the prompts of this pass "
                    f"are {expected} (prompts, tokens)"
                )
            chosen = torch.zeros_like(self.real)
            chosen[:, : self.n_prompt] = positions.cpu()
        elif positions == "last":
            last = (columns * (self.real & in_prompt)).argmax(dim=1, keepdim=True)
            # A prompt that comes in chunks has its last token in the last chunk.
            chosen = (columns == last) & (len(columns) >= self.n_prompt)
        else:
            chosen = {
                "all": torch.ones_like(in_prompt),
                "prompt": in_prompt,
                "generated": ~in_prompt,
            }[positions]
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
    known: dict[int, "tuple[weakref.ref[Any], int, dict[str, Any]]"] = field(default_factory=dict)

    def note(self, rows: int, width: int, mask: Any, n_before: int, cache: Any) -> None:
        """A pass over `width` new columns begins, after `n_before` that are in the KV cache.

        `mask` is the attention mask over all of them, if there is one. Raises `InputError` when
        a cache holds a prompt that was not run inside the block, or the mask cannot be read.
        """
        memory: dict[str, Any] = {} if self.current is None else self.current.memory
        reference, n_prompt, kept = self.known.get(id(cache), (None, 0, {}))
        # By identity: not every cache can be hashed, and an id may be used again.
        if n_before and reference is not None and reference() is cache:
            self.n_prompt, memory = n_prompt, kept
        elif n_before and not (self.is_generating and self.n_prompt is not None):
            raise InputError(
                "this pass has a KV cache of a prompt that was not run inside the block, so it is "
                "not known where the prompt ends; run the whole prompt inside the block, or steer "
                "all positions"
            )
        elif n_before == 0:
            memory = {}
            if not self.is_generating or self.n_prompt is None:
                self.n_prompt = width
        assert self.n_prompt is not None
        columns = n_before + width
        real = torch.ones((rows, columns), dtype=torch.bool)
        if mask is not None:
            if tuple(mask.shape) != (rows, columns):
                raise InputError(
                    f"expected an attention mask of shape {(rows, columns)} (prompts, tokens), got "
                    f"{tuple(mask.shape)}; steer all positions under such a mask"
                )
            real = mask.bool().cpu()
        self.current = Pass(n_before, self.n_prompt, real, memory)
        if cache is not None:
            self.remember(cache)

    def remember(self, cache: Any) -> None:
        """The KV cache that the pass wrote to is this prompt's."""
        if self.current is not None:
            of = (weakref.ref(cache), self.current.n_prompt, self.current.memory)
            self.known[id(cache)] = of

    def now(self, activation: Any, hook: Any) -> Pass:
        """The pass that `activation` belongs to. Raises `InputError` when it is none noted."""
        found = self.current
        shape = None if found is None else (len(found.real), found.real.shape[1] - found.n_before)
        if found is None or activation.ndim != 3 or shape != tuple(activation.shape[:2]):
            raise InputError(
                f"the activation at {getattr(hook, 'name', 'a hook')} is {tuple(activation.shape)},"
                f" but this pass has {shape} (prompts, tokens): steer block outputs and other hooks"
                " with a row a token"
            )
        return found


def check_positions(positions: Positions) -> None:
    """Raise `InputError` when positions are neither a known name nor a bool mask."""
    names = get_args(get_args(Positions)[0])
    is_mask = isinstance(positions, Tensor) and positions.dtype == torch.bool
    if not is_mask and not (isinstance(positions, str) and positions in names):
        raise InputError(
            f"positions are {', '.join(names)} or a mask (a bool tensor), not {positions!r}"
        )


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

            def after(module: Any, given: Any, out: Any) -> None:  # noqa: ARG001
                cache = getattr(out, "past_key_values", None)
                if cache is not None:
                    noted.remember(cache)

            before_handle = wrapped.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(before_handle.remove)
            after_handle = wrapped.register_forward_hook(after)
            stack.callback(after_handle.remove)
            if hasattr(wrapped, "generate"):
                stack.enter_context(
                    _replaced(wrapped, "generate", _generating(wrapped, "generate", noted))
                )
        else:
            forward = getattr(model, "forward")  # noqa: B009 (not in the protocol)

            def noting(given: Any = None, *rest: Any, **named: Any) -> Any:
                if isinstance(given, (str, list)):
                    raise InputError(
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
        raise InputError("cannot see the tokens of this pass; steer all positions instead")
    if shown.ndim == 1:
        shown = shown[None]
    hugging_face, own = named.get("past_key_values"), named.get("past_kv_cache")
    n_before = _cached(hugging_face, own)
    mask = named.get("attention_mask")
    if mask is None and n_before == 0 and shown.ndim == 2 and not shown.is_floating_point():
        mask = _unpadded(model, shown)
    cache = own if hugging_face is None else hugging_face
    noted.note(shown.shape[0], shown.shape[1], mask, n_before, cache)


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


def _generating(model: Any, name: str, noted: Watch) -> Callable[..., Any]:
    method = getattr(model, name)

    def generate(*given: Any, **named: Any) -> Any:
        if noted.is_generating:  # one way to generate that calls another
            return method(*given, **named)
        outside = noted.n_prompt
        noted.is_generating, noted.n_prompt = True, _width(given, named)
        try:
            return method(*given, **named)
        finally:
            noted.is_generating, noted.n_prompt = False, outside

    def stream(*given: Any, **named: Any) -> Iterator[Any]:
        # Between two items the caller may run anything: what is known of this prompt is taken away.
        items = method(*given, **named)
        inside = (True, _width(given, named), noted.current)
        while True:
            outside = (noted.is_generating, noted.n_prompt, noted.current)
            noted.is_generating, noted.n_prompt, noted.current = inside
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                inside = (noted.is_generating, noted.n_prompt, noted.current)
                noted.is_generating, noted.n_prompt, noted.current = outside
            yield item

    return stream if isgeneratorfunction(method) else generate


def _width(given: tuple[Any, ...], named: dict[str, Any]) -> int | None:
    """How many tokens the prompts have that are given to `generate`, where they are tensors."""
    names = ("input", "inputs", "input_ids")
    prompt = given[0] if given else next((named[n] for n in names if n in named), None)
    return int(prompt.shape[1]) if isinstance(prompt, Tensor) and prompt.ndim > 1 else None


@contextmanager
def _replaced(model: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one model, in front of its class's, inside the block.

    Blocks may end in another order than they began: one that ended is passed through until all
    behind it have.
    """
    value.steerlens_before = vars(model).get(name, _NOTHING)
    object.__setattr__(model, name, value)
    try:
        yield
    finally:
        value.steerlens_ended = True
        while getattr(vars(model).get(name), "steerlens_ended", False):
            before = vars(model)[name].steerlens_before
            if before is _NOTHING:
                object.__delattr__(model, name)
            else:
                object.__setattr__(model, name, before)
