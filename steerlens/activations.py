"""Run pairs through a model, keep only the asked-for positions, and take differences."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.bare import for_hooks
from steerlens.data import ContrastivePairs
from steerlens.display import fragment, hook_label
from steerlens.errors import ActivationError
from steerlens.hooks import HookFunction, Layers, hooked, readout_hook, resolve_hooks
from steerlens.memory import is_out_of_memory, warn_of_memory
from steerlens.models import HookedModel, inference
from steerlens.processing import UNKNOWN, weight_processing
from steerlens.progress import Progress, part_of, silent
from steerlens.tokens import Batch, TokenizedPrompt, in_pair_order, make_batches, tokenize_pairs
from steerlens.transfers import PINNED, Arriving, to_device, to_host

T = TypeVar("T")


@dataclass(frozen=True)
class Differences:
    """Activations of the positive and the negative prompts at some hooks and one position.

    `positive` and `negative` hold `hook_names` first, then `readout_names`: further hooks at which
    a sweep over `hook_names` reads its effect, carried along so that one pass is enough. In
    residual units; float32, or float64 where the model is. `fingerprint` is that of the pairs,
    `weight_processing` that of the model's weights.

    Examples:
        >>> differences
        Differences(5 hooks, 8 pairs, d_model 32)
        >>> differences.values.shape
        torch.Size([5, 8, 32])
        >>> differences["blocks.2.hook_resid_post"].shape
        torch.Size([8, 32])
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    positive: Float[Tensor, "all_hook pair d_model"]
    negative: Float[Tensor, "all_hook pair d_model"]
    position: int
    fingerprint: str
    weight_processing: str = UNKNOWN

    @property
    def all_hook_names(self) -> tuple[str, ...]:
        """`hook_names`, then `readout_names`."""
        return self.hook_names + self.readout_names

    @property
    def values(self) -> Float[Tensor, "hook pair d_model"]:
        """`positive - negative` at `hook_names`, without the readouts."""
        n_hooks = len(self.hook_names)
        return self.positive[:n_hooks] - self.negative[:n_hooks]

    def __getitem__(self, hook_name: str) -> Float[Tensor, "pair d_model"]:
        """`positive - negative` at one hook. Raises `KeyError` when it was not collected."""
        if hook_name not in self.all_hook_names:
            raise KeyError(hook_name)
        index = self.all_hook_names.index(hook_name)
        return self.positive[index] - self.negative[index]

    def __repr__(self) -> str:
        _, n_pairs, d_model = self.positive.shape
        return f"Differences({len(self.hook_names)} hooks, {n_pairs} pairs, d_model {d_model})"

    def _repr_html_(self) -> str:
        n_hooks = len(self.hook_names)
        norms = torch.cat([self.positive, self.negative], dim=1)[:n_hooks].norm(dim=-1).mean(dim=1)
        table = pd.DataFrame(
            {
                "layer": [hook_label(name) for name in self.hook_names],
                "separation": self.values.norm(dim=-1).mean(dim=1).tolist(),
                "resid norm": norms.tolist(),
            }
        )
        about = [repr(self), f"position {self.position}", f"pairs {self.fingerprint[:12]}"]
        return fragment(about, table, note="means over pairs, residual units")


def collect_differences(
    model: HookedModel,
    pairs: ContrastivePairs,
    *,
    layers: Layers = "all",
    position: int = -1,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Differences:
    """Activations of both sides of every pair and their differences.

    `layers` as in `resolve_hooks`; `position` counts in each prompt, negative from its end, and
    never touches padding or a continuation. States at `hook_resid_post` are block outputs, at the
    last layer too (before the final norm). Raises `ActivationError` on NaN or inf (naming the
    hook) and on a position outside a prompt (naming the pair), `HookError` on an unknown hook.

    Examples:
        >>> sl.collect_differences(model, pairs, layers=[0, 2], position=-1)
        Differences(2 hooks, 8 pairs, d_model 32)
    """
    hook_names = resolve_hooks(model, layers)
    readout_names = missing_readouts(hook_names, int(model.cfg.n_layers))
    tokenized = tokenize_pairs(model, pairs)
    # Both sides at once: a GPU is not left idle between them.
    both = collect_activations(
        model,
        tokenized.positive + tokenized.negative,
        hook_names + readout_names,
        position=position,
        batch_size=batch_size,
        progress=progress,
    )
    # Each a tensor of its own, which can be kept and written without the other.
    positive, negative = (
        side.clone(memory_format=torch.contiguous_format) for side in both.chunk(2, dim=1)
    )
    return Differences(
        *(hook_names, readout_names, positive, negative, position, pairs.fingerprint),
        weight_processing=weight_processing(model),
    )


def missing_readouts(hook_names: Sequence[str], n_layers: int) -> tuple[str, ...]:
    """The readout hooks of `hook_names` that are not among them, in layer order."""
    readouts = dict.fromkeys(readout_hook(name, n_layers) for name in hook_names)
    return tuple(name for name in readouts if name not in hook_names)


def collect_activations(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    hook_names: Sequence[str],
    *,
    position: int = -1,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "hook prompt d_model"]:
    """Activations at one position of every prompt, in the prompts' order, on the CPU.

    The model runs in length-sorted batches and stops after the last hook, so the unembedding is
    never computed and the peak memory does not grow with the number of prompts but for the result;
    out of memory halves a batch.
    Raises `ActivationError` without prompts or hooks, and as `collect_differences`.

    Examples:
        >>> prompts = sl.tokenize_pairs(model, pairs).positive
        >>> sl.collect_activations(model, prompts, ["blocks.2.hook_resid_post"]).shape
        torch.Size([1, 8, 32])
    """
    if not prompts or not hook_names:
        raise ActivationError(
            f"expected prompts and hook names, got {len(prompts)} and {len(hook_names)}"
        )

    runner = for_hooks(model, hook_names)
    n_values = len(prompts) * len(hook_names) * int(model.cfg.d_model)
    pins = n_values <= PINNED

    def run(batch: Batch) -> Arriving:
        found = run_to_hooks(runner, batch, hook_names, indices=batch.indices(position))
        return to_host(found, pins=pins)

    with inference(runner):
        batches = [(batch,) for batch in make_batches(model, prompts, batch_size)]
        done = by_halves(batches, run, progress=part_of(progress or silent, "activations: prompts"))
    activations = in_pair_order(
        [batch for (batch,), _ in done], [values.arrived() for _, values in done]
    )
    check_finite(activations, hook_names)
    return activations


def are_finite(values: Float[Tensor, "hook ..."]) -> Bool[Tensor, " hook"]:
    """Whether everything at a hook is finite; contiguous values are not copied."""
    rows = values.flatten(start_dim=1)
    if rows.shape[1] == 0:
        return torch.ones(len(rows), dtype=torch.bool)
    largest: Tensor = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    return largest.isfinite()


def check_finite(
    activations: Float[Tensor, "hook prompt d_model"], hook_names: Sequence[str]
) -> None:
    """Raise `ActivationError` that names the hooks with NaN or inf."""
    finite = are_finite(activations)
    if not finite.all():
        bad = [name for name, ok in zip(hook_names, finite.tolist(), strict=True) if not ok]
        raise ActivationError(
            f"NaN or inf in the activations at {', '.join(bad)}; try dtype float32 or bfloat16 "
            "(float16 overflows beyond 65504) and check the model's weights"
        )


def reading_hook(
    into: dict[str, Tensor], hook_name: str, indices: Int[Tensor, " prompt"]
) -> tuple[str, HookFunction]:
    """A forward hook that stores `activation[row, indices[row]]` as `into[hook_name]`.

    The stored tensor is `Float["prompt d_model"]` in float32 at least. The hook raises
    `ActivationError` when the activation is not `[prompt, token, d_model]`.
    """

    def read(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 (TransformerLens's signature)
        check_residual(activation, hook_name)
        into[hook_name] = at_position(activation, indices)

    return hook_name, read


def check_residual(activation: Float[Tensor, "..."], hook_name: str) -> None:
    """Raise `ActivationError` unless the hook's activation is `[prompt, token, d_model]`."""
    if activation.ndim != 3:
        raise ActivationError(
            f"hook {hook_name} holds a tensor of shape {tuple(activation.shape)}; expected "
            "[prompt, token, d_model], so choose a hook on the residual stream or its writers"
        )


def at_position(
    values: Float[Tensor, "row token d_model"], indices: Int[Tensor, " row"]
) -> Float[Tensor, "row d_model"]:
    """Each row's values at its own token, in float32 at least."""
    row = torch.arange(len(values), device=values.device)
    chosen = values[row, indices.to(values.device)]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def run_to_hooks(
    model: HookedModel,
    batch: Batch,
    hook_names: Sequence[str],
    *,
    indices: Int[Tensor, " prompt"],
    fwd_hooks: Sequence[tuple[str, HookFunction]] = (),
) -> Float[Tensor, "hook prompt d_model"]:
    """Run a batch until every hook has been read once, and stop there.

    `indices` are the columns to read; `fwd_hooks` (an intervention) act before the reading at the
    same hook. Raises `HookError` when a hook does not fire.
    """
    found: dict[str, Tensor] = {}
    indices = to_device(indices, batch.tokens.device)
    readers = [reading_hook(found, name, indices) for name in hook_names]
    stopping = [
        (name, _then_stop(read, lambda: len(found) == len(hook_names))) for name, read in readers
    ]
    with hooked(model, [*fwd_hooks, *stopping]), suppress(_AllRead):
        model(batch.tokens, return_type=None, **batch.forward_kwargs)
    shapes = {tuple(found[name].shape) for name in hook_names}
    if len(shapes) > 1:
        raise ActivationError(
            f"the hooks have activations of different shapes {sorted(shapes)}; run them apart"
        )
    return torch.stack([found[name].to(found[hook_names[0]].device) for name in hook_names])


def by_halves(
    batches: Sequence[tuple[Batch, ...]], run: Callable[..., T], *, progress: Progress = silent
) -> list[tuple[tuple[Batch, ...], T]]:
    """`run(*batches)` of every group of batches with the same rows, beside the group that was run.

    Where memory is out, of the halves of a group, with a warning. `progress` is told of the rows.
    """
    total, done = sum(len(group[0].rows) for group in batches), 0
    found: list[tuple[tuple[Batch, ...], T]] = []
    progress("rows", done, total)
    for group in batches:
        found += _whole_or_halves(group, run)
        done += len(group[0].rows)
        progress("rows", done, total)
    return found


def _whole_or_halves(
    group: tuple[Batch, ...], run: Callable[..., T]
) -> list[tuple[tuple[Batch, ...], T]]:
    try:
        return [(group, run(*group))]
    except (RuntimeError, MemoryError) as error:
        if len(group[0].rows) == 1 or not is_out_of_memory(error):
            raise
    warn_of_memory(len(group[0].rows) // 2)
    return by_halves(list(zip(*(batch.halves() for batch in group), strict=True)), run)


class _AllRead(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside the forward pass to end it once nothing is left to read."""


def _then_stop(read: HookFunction, is_done: Callable[[], bool]) -> HookFunction:
    def read_then_stop(activation: Tensor, hook: Any) -> None:
        read(activation, hook)
        if is_done():
            raise _AllRead

    return read_then_stop
