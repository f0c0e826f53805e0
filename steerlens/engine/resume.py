"""Forward passes of a part of the model: from one block on, up to one hook, at label positions.

The model's own forward runs every time, with the blocks that are not wanted standing aside: so its
masks, rotary angles, caches and logit soft-capping come along, whatever the architecture.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from steerlens.engine.backend import BareModel, no_prefix
from steerlens.engine.batches import Batch, Mask, before_labels, mask_kwargs
from steerlens.engine.branches import branch_kwargs
from steerlens.engine.memory import LOGITS_PER_PASS
from steerlens.engine.transfer import to_device
from steerlens.loss.labels import divergence
from steerlens.models.hooked_model import HookedModel, hugging_face_model
from steerlens.models.hooks import HookFunction, hook_layer, hooked, keeping, resid_post

TIMES_ON_CUDA = 16
"""How many times as many logits exist at once on a GPU, which is idle while a pass is prepared."""


@dataclass(frozen=True)
class Residual:
    """The residual stream entering block `block` on every token of some rows."""

    block: int
    values: Float[Tensor, "row token d_model"]


@dataclass(frozen=True)
class Prefix:
    """The unsteered keys and values, in every block, of the tokens before those that are run.

    `cache` is Hugging Face's, as the model filled it; it is never changed, only copied.
    """

    cache: Any
    attention_mask: Bool[Tensor, "row token"]

    def at(self, rows: Int[Tensor, " row"], block: int) -> "Prefix":
        """A copy for some rows, in that order, to which a pass from `block` on may add tokens."""
        copied = copy.copy(self.cache)
        copied.layers = [copy.copy(layer) for layer in self.cache.layers]
        # Of the blocks before it only the length is looked at.
        for layer in copied.layers[block:]:
            if layer.keys is not None:  # as it is after the last block that was run
                layer.batch_select_indices(rows.to(layer.keys.device))
        return Prefix(copied, self.attention_mask[rows])

    def kwargs(self, attention_mask: Bool[Tensor, "row token"]) -> dict[str, Any]:
        """Of a pass of the tokens after it, with their mask; its cache is added to."""
        # The mask spans the prefix too; the model takes the tokens' positions from it.
        joined = torch.cat([self.attention_mask, attention_mask], dim=1)
        return {"attention_mask": joined.long(), "past_key_values": self.cache}


def run_prefix(model: Any, batch: Batch, *, last_hook: str | None = None) -> Prefix:
    """Run the unsteered tokens of `batch`, those of one prompt once; keep their keys and values.

    Those of the blocks up to `last_hook`, of all without one. The model has to take
    `past_key_values` (see `takes_cache`).
    """
    from transformers import DynamicCache

    first, which = distinct_rows(batch)
    mask = batch.attention_mask[first]
    cache = DynamicCache(config=hugging_face_model(model).config)
    run_from(
        *(model, batch.tokens[first], mask),
        prefix=Prefix(cache, mask[:, :0]),
        last_hook=last_hook or resid_post(int(model.cfg.n_layers) - 1),
    )
    prefix = Prefix(cache, mask)
    return prefix if len(first) == len(which) else prefix.at(torch.tensor(which), 0)


def distinct_rows(batch: Batch) -> tuple[list[int], list[int]]:
    """The first row of each prompt of a batch, and for every row which of these has its prompt."""
    first: dict[tuple[int, ...], int] = {}
    for row, prompt in enumerate(batch.prompts):
        first.setdefault(prompt.prompt, row)
    places = {prompt: place for place, prompt in enumerate(first)}
    return [*first.values()], [places[prompt.prompt] for prompt in batch.prompts]


def run_from(
    model: HookedModel,
    tokens: Int[Tensor, "row token"],
    attention_mask: Mask,
    *,
    start: Residual | None = None,
    prefix: Prefix | None = None,
    fwd_hooks: Sequence[tuple[str, HookFunction]] = (),
    last_hook: str,
    is_padded: bool | None = None,
) -> Float[Tensor, "row token d_model"]:
    """Run blocks `start.block` and later (all of them without `start`), up to `last_hook`.

    What is there is returned; nothing after it is computed. With `prefix`, the tokens follow those
    of the prefix, whose cache is added to. `is_padded` says whether the mask hides anything, which
    is looked up unless given. Raises `HookError` when a hook did not fire.
    """
    last: dict[str, Tensor] = {}

    def stop(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 (TransformerLens's signature)
        raise Stop

    hooks = [*fwd_hooks, *keeping(last, [last_hook]), (last_hook, stop)]
    with blocks_skipped(model, start), hooked(model, hooks), suppress(Stop):
        kwargs = _pass_kwargs(attention_mask, prefix, is_padded, model.cfg.dtype)
        if isinstance(model, BareModel) and start is not None and not kwargs:
            # It ends at `last_hook` too, unless it cannot be done.
            model.resume(start.values, start.block, hook_layer(last_hook))
        model(tokens, return_type=None, **kwargs)
    return last[last_hook]


def _pass_kwargs(
    attention_mask: Mask, prefix: Prefix | None, is_padded: bool | None, dtype: torch.dtype
) -> dict[str, Any]:
    if attention_mask.dtype != torch.bool:
        return branch_kwargs(attention_mask, dtype)
    if prefix is None:
        return {} if is_padded is False else mask_kwargs(attention_mask)
    return prefix.kwargs(attention_mask)


def advance(
    model: HookedModel,
    tokens: Int[Tensor, "row token"],
    attention_mask: Mask,
    *,
    start: Residual | None,
    prefix: Prefix | None = None,
    block: int,
    is_padded: bool | None = None,
) -> Residual:
    """The unsteered residual entering `block`, which is 1 or more, computed on from `start`."""
    if start is not None and start.block == block:
        return start
    values = run_from(
        *(model, tokens, attention_mask),
        start=start,
        prefix=prefix,
        last_hook=resid_post(block - 1),
        is_padded=is_padded,
    )
    return Residual(block, values)


def labels_logprob(
    model: HookedModel,
    final: Float[Tensor, "label d_model"],
    labels: Int[Tensor, " label"],
) -> Float[Tensor, " label"]:
    """Log-probability (nats) of each label, from the last block's output at the token before it."""
    logprobs = [
        _log_softmax(logits).gather(1, wanted[:, None])[:, 0]
        for logits, (wanted,) in _logits(model, final, labels)
    ]
    return torch.cat(logprobs)


def labels_kl(
    model: HookedModel,
    final: Float[Tensor, "label d_model"],
    labels: Int[Tensor, " label"],
    unsteered: Callable[[Int[Tensor, " part"]], Float[Tensor, "part vocab"]],
) -> tuple[Float[Tensor, " label"], Float[Tensor, " label"]]:
    """KL(unsteered || steered), nats, of the next-token distributions, and `labels_logprob`.

    `final` are outputs of the last block; `unsteered` gives `vocabulary_logprobs` of the labels at
    some places among them.
    """
    divergences, logprobs = [], []
    places = torch.arange(len(final))
    for logits, (at, wanted) in _logits(model, final, places, labels):
        steered = _log_softmax(logits)
        divergences.append(divergence(steered, unsteered(at.cpu()).to(steered.device)))
        logprobs.append(steered.gather(1, wanted[:, None])[:, 0])
    return torch.cat(divergences), torch.cat(logprobs)


def vocabulary_logprobs(
    model: HookedModel, final: Float[Tensor, "label d_model"]
) -> Float[Tensor, "label vocab"]:
    """Log-probabilities (nats) of all tokens, from the last block's output at the token before."""
    return torch.cat([_log_softmax(logits) for logits, _ in _logits(model, final)])


class LabelOutputs(NamedTuple):
    """The last block's output before every label, and what it says of the label.

    `outputs` and `logprob` (nats) can be differentiated; `of_samples` are the gradients, at
    `outputs`, of the logprob of labels sampled there.
    """

    outputs: Float[Tensor, "label d_model"]
    logprob: Float[Tensor, " label"]
    of_samples: Float[Tensor, "sample label d_model"]


@dataclass(frozen=True)
class Labels:
    """A batch's labels: where they are predicted, looked up before the device is kept busy.

    `before` are places in the rows end to end; `n_labels`, on the CPU, their number in each row;
    `shares` one over that, for every label.
    """

    before: Int[Tensor, " label"]
    ids: Int[Tensor, " label"]
    n_labels: Int[Tensor, " row"]
    shares: Float[Tensor, " label"]

    @classmethod
    def of(cls, batch: Batch) -> "Labels":
        """The labels of a batch."""
        on_cpu, device = batch.labels_on_cpu(), batch.tokens.device
        before = before_labels(on_cpu, device)
        n_labels = on_cpu[:, 1:].sum(dim=1)
        shares = to_device((1 / n_labels).repeat_interleave(n_labels), device)
        return cls(before, batch.tokens.flatten()[before + 1], n_labels, shares)

    def outputs(self, final: Float[Tensor, "row token d_model"]) -> Float[Tensor, "label d_model"]:
        """The last block's output before every label."""
        return final.flatten(0, 1)[self.before.to(final.device)]

    def read(
        self,
        model: HookedModel,
        final: Float[Tensor, "row token d_model"],
        *,
        n_samples: int = 0,
        generator: torch.Generator | None = None,
    ) -> LabelOutputs:
        """Read the labels, and labels sampled there, off the last block's output.

        The logits of all labels never exist at once, as each label's own gradient is known. Samples
        are from the model's own distribution, drawn on the CPU so that the device does not change
        them.
        """
        outputs = self.outputs(final)
        values: list[Tensor] = []
        gradients = outputs.detach().new_zeros((1 + n_samples, *outputs.shape))
        with torch.enable_grad():
            rows = outputs.detach().requires_grad_()
            for logits, (wanted,) in _logits(model, rows, self.ids):
                logprobs = _log_softmax(logits)
                ids = [wanted[:, None]]
                if n_samples:
                    likely = logprobs.detach().exp().cpu()
                    sampled = torch.multinomial(likely, n_samples, True, generator=generator)
                    ids += list(sampled.to(logprobs.device).T[..., None])
                chosen = [logprobs.gather(1, column) for column in ids]
                values.append(chosen[0][:, 0].detach())
                for total, column in zip(gradients, chosen, strict=True):
                    total += torch.autograd.grad(column.sum(), rows, retain_graph=True)[0]
        logprob = torch.cat(values)
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        # 0, and the gradient that is known.
        moved = ((wide - wide.detach()) * gradients[0]).sum(dim=-1)
        return LabelOutputs(outputs, logprob + moved.to(logprob.device), gradients[1:])


def _logits(
    model: HookedModel, final: Float[Tensor, "label d_model"], *beside: Shaped[Tensor, "label ..."]
) -> Iterator[tuple[Float[Tensor, "part vocab"], tuple[Tensor, ...]]]:
    """Logits of these rows alone, a part at a time, and the rows of `beside`."""
    n_layers, n_logits = int(model.cfg.n_layers), LOGITS_PER_PASS
    if final.device.type == "cuda":
        n_logits *= TIMES_ON_CUDA
    n_rows = max(1, n_logits // int(model.cfg.d_vocab))
    kwargs = {"past_key_values": no_prefix()} if isinstance(model, BareModel) else {}
    for rows, *others in zip(*(torch.split(t, n_rows) for t in (final, *beside)), strict=True):
        ids = torch.zeros((len(rows), 1), dtype=torch.long, device=model.cfg.device)
        with blocks_skipped(model, Residual(n_layers, rows[:, None])):
            # The ids are not looked at: every block stands aside for the rows.
            logits = model(ids, return_type="logits", **kwargs)[:, 0]
        # On a model that is spread over devices, labels lie where the tokens are.
        yield logits, tuple(other.to(logits.device) for other in others)


def _log_softmax(logits: Float[Tensor, "label vocab"]) -> Float[Tensor, "label vocab"]:
    """In float32 at least, without a copy of the logits in it."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def n_skippable(model: HookedModel) -> int:
    """How many blocks the model has in `model.blocks`, 0 when there is no such list."""
    return len(getattr(model, "blocks", ()))


class Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside the forward pass to end it after the last hook that is wanted."""


@contextmanager
def blocks_skipped(model: Any, start: Residual | None) -> Iterator[None]:
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
