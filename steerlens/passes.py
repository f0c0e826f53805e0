"""Forward passes of a part of the model: from one block on, up to one hook, at label positions.

The model's own forward runs every time, with the blocks that are not wanted standing aside: so its
masks, rotary angles, caches and logit soft-capping come along, whatever the architecture.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.hooks import HookFunction, hooked, resid_post
from steerlens.models import HookedModel
from steerlens.tokens import mask_kwargs

LABELS_PER_PASS = 256


@dataclass(frozen=True)
class Residual:
    """The residual stream entering block `block` on every token of some rows."""

    block: int
    values: Float[Tensor, "row token d_model"]


def run_from(
    model: HookedModel,
    tokens: Int[Tensor, "row token"],
    attention_mask: Bool[Tensor, "row token"],
    *,
    start: Residual | None = None,
    fwd_hooks: Sequence[tuple[str, HookFunction]],
    last_hook: str,
) -> None:
    """Run blocks `start.block` and later (all of them without `start`), up to `last_hook`.

    What is wanted of the pass is kept by `fwd_hooks`; nothing after `last_hook` is computed.
    Raises `HookError` when a hook did not fire.
    """

    def stop(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 (TransformerLens's signature)
        raise _Stop

    with (
        _blocks_skipped(model, start),
        hooked(model, [*fwd_hooks, (last_hook, stop)]),
        suppress(_Stop),
    ):
        model(tokens, return_type=None, **mask_kwargs(attention_mask))


def advance(
    model: HookedModel,
    tokens: Int[Tensor, "row token"],
    attention_mask: Bool[Tensor, "row token"],
    *,
    start: Residual | None,
    block: int,
) -> Residual:
    """The unsteered residual entering `block`, which is 1 or more, computed on from `start`."""
    if start is not None and start.block == block:
        return start
    kept: list[Tensor] = []
    hook_name = resid_post(block - 1)
    run_from(
        model,
        tokens,
        attention_mask,
        start=start,
        fwd_hooks=[(hook_name, _keeping(kept))],
        last_hook=hook_name,
    )
    return Residual(block, kept[0])


def labels_logprob(
    model: HookedModel,
    final: Float[Tensor, "label d_model"],
    labels: Int[Tensor, " label"],
) -> Float[Tensor, " label"]:
    """Log-probability (nats) of each label, from the last block's output at the token before it.

    The final norm and the unembedding run on these rows alone, `LABELS_PER_PASS` at a time, so the
    logits of all positions never exist. The log-softmax is in float32 at least.
    """
    n_layers = int(model.cfg.n_layers)
    logprobs = []
    for rows, wanted in zip(
        torch.split(final, LABELS_PER_PASS), torch.split(labels, LABELS_PER_PASS), strict=True
    ):
        with _blocks_skipped(model, Residual(n_layers, rows[:, None])):
            # The ids are not looked at: every block stands aside for the rows.
            logits = model(torch.zeros_like(wanted)[:, None], return_type="logits")[:, 0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs.append(-torch.nn.functional.cross_entropy(wide, wanted, reduction="none"))
    return torch.cat(logprobs)


def n_skippable(model: HookedModel) -> int:
    """How many blocks the model has in `model.blocks`, 0 when there is no such list."""
    return len(getattr(model, "blocks", ()))


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside the forward pass to end it after the last hook that is wanted."""


def _keeping(kept: list[Tensor]) -> HookFunction:
    def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept.append(activation)

    return keep


@contextmanager
def _blocks_skipped(model: Any, start: Residual | None) -> Iterator[None]:
    """Blocks before `start.block` stand aside; the last of them gives `start.values`."""
    skipped = [] if start is None else list(model.blocks)[: start.block]
    lengths = _tuple_lengths(model) if skipped else ()
    before = [block.__dict__.get("forward") for block in skipped]
    for i, block in enumerate(skipped):
        values = start.values if start is not None and i == len(skipped) - 1 else None
        block.__dict__["forward"] = _standing_aside(values, lengths[i])
    try:
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _standing_aside(values: Tensor | None, tuple_length: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        output = given if values is None else values
        return (output, *[None] * (tuple_length - 1)) if tuple_length else output

    return forward


_known_lengths: "weakref.WeakKeyDictionary[Any, tuple[int, ...]]" = weakref.WeakKeyDictionary()


def _tuple_lengths(model: Any) -> tuple[int, ...]:
    """Items in the tuple that each block returns, 0 for a block that returns a tensor."""
    if model not in _known_lengths:
        lengths: list[int] = []
        handles = [
            block.register_forward_hook(
                lambda module, args, output: lengths.append(  # noqa: ARG005
                    len(output) if isinstance(output, tuple) else 0
                )
            )
            for block in model.blocks
        ]
        try:
            with torch.no_grad():
                model(torch.zeros((1, 1), dtype=torch.long, device=model.cfg.device))
        finally:
            for handle in handles:
                handle.remove()
        _known_lengths[model] = tuple(lengths)
    return _known_lengths[model]
