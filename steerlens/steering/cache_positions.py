"""Which tokens of a forward pass are the prompt's, also while decoding with a KV cache."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from inspect import isgeneratorfunction
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from steerlens.engine.positions import AFTER, Markers, Term, parse_steered, phases
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel, weight_module

Positions: TypeAlias = str | Bool[Tensor, "prompt prompt_token"]
"""Which tokens an intervention touches: `all`, those of the `prompt`, the `generated` ones (or a
window of steps, "generated[0:10]"; `continuation` and `own` are other words for them), the `last`
real token of the prompt, a thinking model's tokens inside (`think`) and after (`answer`) its
thinking, by its markers (see `set_rendering`); several joined by +, "last+generated"; or a mask
over the prompt's tokens (padding included). A name means the same tokens with and without a KV
cache."""

POSITION_NAMES = ("all", "prompt", "generated", "last", "continuation", "own", "think", "answer")

_NOTHING = object()
_GENERATE = ("generate", "hf_generate", "generate_stream")


@dataclass(frozen=True)
class Pass:
    """One forward pass over columns `n_before` and later; the prompt has the first `n_prompt`.

    `real` is False at padding, over all columns up to the end of this pass. `memory` is what was
    decided on this prompt, kept from pass to pass; its "ids" are the tokens of all these
    columns, or None where they are not known.
    """

    n_before: int
    n_prompt: int
    real: Bool[Tensor, "prompt column"]
    memory: dict[str, Any] = field(default_factory=dict)

    def mask(
        self, positions: Positions, markers: Markers | None = None
    ) -> Bool[Tensor, "prompt token"]:
        """True at the tokens of this pass that `positions` names; `markers` are those of thinking.

        Raises `InputError` when a mask does not have the prompt's shape, or thinking cannot be
        followed.
        """
        if isinstance(positions, Tensor):
            expected = (len(self.real), self.n_prompt)
            if tuple(positions.shape) != expected:
                raise InputError(
                    f"the mask has shape {tuple(positions.shape)}, but the prompts of this pass "
                    f"are {expected} (prompts, tokens)"
                )
            chosen = torch.zeros_like(self.real)
            chosen[:, : self.n_prompt] = positions.cpu()
        else:
            named = [
                self._named(term, markers) for term in parse_steered(positions, POSITION_NAMES)
            ]
            chosen = torch.stack(named).any(dim=0)
        return chosen[:, self.n_before :]

    def _named(self, term: Term, markers: Markers | None) -> Bool[Tensor, "prompt column"]:
        """True at the tokens of that name, from the first column on."""
        columns = torch.arange(self.real.shape[1])
        in_prompt = (columns < self.n_prompt).expand_as(self.real)
        if term.name in AFTER:
            is_chosen = torch.zeros(self.real.shape[1], dtype=torch.bool)
            is_chosen[self.n_prompt :][term.window or slice(None)] = True
            return is_chosen.expand_as(self.real)
        if term.name == "last":
            last = (columns * (self.real & in_prompt)).argmax(dim=1, keepdim=True)
            # A prompt that comes in chunks has its last token in the last chunk.
            return (columns == last) & (len(columns) >= self.n_prompt)
        if term.name in ("think", "answer"):
            if markers is None or self.memory.get("ids") is None:
                raise InputError(
                    f"the tokens {term.name!r} are found by their ids, and this pass does not show "
                    "those of all its tokens: run token ids, the whole prompt inside the block"
                )
            return phases(self.memory["ids"], markers, self.n_prompt)[term.name] & self.real
        return in_prompt if term.name == "prompt" else torch.ones_like(in_prompt)

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

    def note(
        self, shown: Shaped[Tensor, "prompt token *d"], mask: Any, n_before: int, cache: Any
    ) -> None:
        """A pass over the columns `shown` begins, after `n_before` that are in the KV cache.

        `mask` is the attention mask over all of them, if there is one. Raises `InputError` when
        a cache holds a prompt that was not run inside the block, or the mask cannot be read.
        """
        rows, width = shown.shape[:2]
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
        memory["ids"] = _with_ids(memory.get("ids"), shown, n_before)
        self.current = Pass(n_before, self.n_prompt, real, memory)
        if cache is not None:
            self.remember(cache)

    def remember(self, cache: Any) -> None:
        """The KV cache that the pass wrote to is this prompt's."""
        if self.current is not None:
            prompt = (self.current.n_prompt, self.current.memory)
            self.known[id(cache)] = (weakref.ref(cache), *prompt)

    def swap(self, state: tuple[bool, int | None, Pass | None]) -> Any:
        """Put another state in place of this one, which is returned."""
        before = (self.is_generating, self.n_prompt, self.current)
        self.is_generating, self.n_prompt, self.current = state
        return before

    def now(self, activation: Any, hook: Any) -> Pass:
        """The pass that `activation` belongs to. Raises `InputError` when it is none noted."""
        current, shape = self.current, None
        if current is not None:
            shape = (len(current.real), current.real.shape[1] - current.n_before)
        if current is None or activation.ndim != 3 or shape != tuple(activation.shape[:2]):
            raise InputError(
                f"the activation at {getattr(hook, 'name', 'a hook')} is {tuple(activation.shape)},"
                f" but this pass has {shape} (prompts, tokens): steer block outputs and other hooks"
                " with a row a token"
            )
        return current


def check_positions(positions: Positions) -> None:
    """Raise `InputError` when positions are neither known names nor a bool mask."""
    if isinstance(positions, str):
        parse_steered(positions, POSITION_NAMES)
    elif not (isinstance(positions, Tensor) and positions.dtype == torch.bool):
        raise InputError(
            f"positions are {', '.join(POSITION_NAMES)} or a mask (a bool tensor), not "
            f"{positions!r}"
        )


def _with_ids(before: Tensor | None, shown: Tensor, n_before: int) -> Tensor | None:
    """The ids of all columns, where those in the cache are known and those shown are ids."""
    if shown.ndim != 2 or shown.is_floating_point():
        return None
    ids = shown.detach().cpu()
    if n_before == 0:
        return ids
    if before is None or len(before) != len(ids) or before.shape[1] < n_before:
        return None
    return torch.cat([before[:, :n_before], ids], dim=1)


@contextmanager
def watch(model: HookedModel) -> Iterator[Watch]:
    """Note every forward pass inside the block: where the prompt ends and what is padding.

    Inside `generate` the first pass is the prompt and what follows is generated. A pass outside it
    is all prompt, or, on top of a KV cache, generated. Padding is what the attention mask says (one
    row a prompt); without a mask, and with several prompts, the padding tokens on the side that the
    tokenizer pads.
    """
    passes = Watch()
    inner: Any = weight_module(model)  # the Hugging Face model inside a Bridge
    noting = _noting(model, inner.forward, passes)
    with _all_generate(model, partial(_generating, passes)), replaced(inner, "forward", noting):
        yield passes


@contextmanager
def _all_generate(
    model: HookedModel, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Every way to generate of the model, and of the one inside it, `wrapped` inside the block."""
    with ExitStack() as stack:
        for owner in dict.fromkeys((model, weight_module(model))):
            for name in _GENERATE:
                if hasattr(owner, name):
                    method = wrapped(getattr(owner, name))
                    stack.enter_context(replaced(owner, name, method))
        yield


def _noting(model: HookedModel, forward: Callable[..., Any], passes: Watch) -> Callable[..., Any]:
    """`forward`, of which `passes` is told before and, of the cache that it gives, afterwards."""

    @wraps(forward, updated=())  # Hugging Face's generate looks at its parameters
    def noting(*args: Any, **kwargs: Any) -> Any:
        names = ("input", "input_ids", "inputs_embeds")
        inputs = (*args[:1], *(kwargs.get(name) for name in names))
        shown = next((tokens for tokens in inputs if tokens is not None), None)
        if not isinstance(shown, Tensor):
            raise InputError(
                "cannot see the tokens of this pass: give tokens, model.to_tokens(text), where "
                "only some positions are steered, or steer all positions"
            )
        shown = shown if shown.ndim > 1 else shown[None]
        hugging_face, own = kwargs.get("past_key_values"), kwargs.get("past_kv_cache")
        n_before, mask = _cached(hugging_face, own), kwargs.get("attention_mask")
        if mask is None and n_before == 0 and shown.ndim < 3 and not shown.is_floating_point():
            mask = _unpadded(model, shown)
        passes.note(shown, mask, n_before, own if hugging_face is None else hugging_face)
        out = forward(*args, **kwargs)
        cache = getattr(out, "past_key_values", None)
        if cache is not None:
            passes.remember(cache)
        return out

    return noting


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


@contextmanager
def warning_of_padding(model: HookedModel) -> Iterator[None]:
    """Warn where right-padded prompts are given to `generate` inside the block.

    It goes on behind the padding, which is no text of any prompt.
    """
    pad = getattr(model.tokenizer, "pad_token_id", None)
    outer: list[Callable[..., Any]] = []

    def checking(method: Callable[..., Any]) -> Callable[..., Any]:
        def check(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not outer and _ends_in_padding(_prompt(args, kwargs), kwargs, pad):
                warnings.warn(
                    "the prompts given to generate are padded on the right, and a model writes on "
                    "behind the padding; pad them on the left, with their attention mask",
                    UserWarning,
                    stacklevel=3,
                )

        def generate(*args: Any, **kwargs: Any) -> Any:
            check(args, kwargs)
            outer.append(method)  # one way to generate may call another
            try:
                return method(*args, **kwargs)
            finally:
                outer.pop()

        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            check(args, kwargs)
            yield from method(*args, **kwargs)

        return stream if isgeneratorfunction(method) else generate

    with _all_generate(model, checking):
        yield


def _ends_in_padding(prompt: Any, kwargs: Mapping[str, Any], pad: int | None) -> bool:
    """Whether a prompt ends in padding by the mask; without one, whether some of several do."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return not bool(mask[:, -1].all())
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or pad is None:
        return False
    is_padding = prompt[:, -1] == pad
    return bool(is_padding.any()) and not bool(is_padding.all())


def _generating(passes: Watch, method: Callable[..., Any]) -> Callable[..., Any]:
    """A way to generate, inside which the first pass is the prompt."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        if passes.is_generating:  # one way to generate that calls another
            return method(*args, **kwargs)
        outside = passes.n_prompt
        passes.is_generating, passes.n_prompt = True, _width(args, kwargs)
        try:
            return method(*args, **kwargs)
        finally:
            passes.is_generating, passes.n_prompt = False, outside

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        # Between two items the caller may run anything: what is known of this prompt is taken away.
        items = method(*args, **kwargs)
        inside = (True, _width(args, kwargs), passes.current)
        while True:
            outside = passes.swap(inside)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                inside = passes.swap(outside)
            yield item

    return stream if isgeneratorfunction(method) else generate


def _width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many tokens the prompts have that are given to `generate`, where they are tensors."""
    prompt = _prompt(args, kwargs)
    return int(prompt.shape[1]) if isinstance(prompt, Tensor) and prompt.ndim > 1 else None


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What is given to `generate`."""
    names = ("input", "inputs", "input_ids")
    return args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)


@contextmanager
def replaced(model: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one model inside the block; blocks may end in any order."""
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
