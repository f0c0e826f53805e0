"""Run pairs through a model, keep only the asked-for positions, and take differences."""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import Batch, Places, in_pair_order, make_batches
from steerlens.engine.beginnings import make_beginnings
from steerlens.engine.memory import is_out_of_memory, warn_of_memory
from steerlens.engine.positions import Position
from steerlens.engine.resume import Prefix, Stop, run_prefix
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.transfer import PINNED, Arriving, to_device, to_host
from steerlens.errors import InputError, ModelError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import (
    HookFunction,
    check_one_width,
    hook_layer,
    hook_width,
    hooked,
    is_head,
    keeping,
    resid_post,
)
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap, relative_gap
from steerlens.progress import Progress, by_default, part_of, silent
from steerlens.validation import Count, checked

T = TypeVar("T")

_run_whole: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Models that were seen to differ after kept keys and values."""


@checked
def collect_activations(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    hook_names: Sequence[str],
    *,
    position: Position = -1,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "hook prompt d_model"]:
    """Activations at a position of every prompt, in the prompts' order, on the CPU.

    The model runs in length-sorted batches and stops after the last hook, so the unembedding is
    never computed and the peak memory does not grow with the number of prompts but for the result;
    out of memory halves a batch. On a CPU, what many prompts begin with is run once; where that
    gives anything else, prompts are run whole, with a warning.
    Raises `InputError` without prompts or hooks, `HookError` where heads and other hooks are
    mixed, and as `collect_differences`.

    Examples:
        >>> prompts = sl.engine.tokenize_pairs(model, pairs).positive
        >>> sl.engine.collect_activations(model, prompts, ["blocks.2.hook_resid_post"]).shape
        torch.Size([1, 8, 32])
    """
    if not prompts or not hook_names:
        raise InputError(
            f"expected prompts and hook names, got {len(prompts)} and {len(hook_names)}"
        )

    check_one_width(hook_names)
    tell = part_of(by_default(progress), "activations: prompts", total=len(prompts))
    reading = _Reading(model, hook_names, position, batch_size)
    activations = reading.after_beginnings(prompts, tell)
    if activations is None:
        activations = reading.by_whole_passes(prompts, tell)
    check_finite(activations, hook_names)
    return activations


@dataclass(frozen=True)
class _Reading:
    """What is read of prompts, and in batches of how many."""

    model: HookedModel
    hook_names: Sequence[str]
    position: Position
    batch_size: int | None

    def by_whole_passes(
        self, prompts: Sequence[TokenizedPrompt], progress: Progress
    ) -> Float[Tensor, "hook prompt d_model"]:
        runner = for_hooks(self.model, self.hook_names)
        n_values = len(prompts) * len(self.hook_names) * hook_width(self.model, self.hook_names[0])
        pins = n_values <= PINNED

        def run(batch: Batch) -> Arriving:
            found = run_to_hooks(runner, batch, self.hook_names, places=batch.places(self.position))
            return to_host(found, pins=pins)

        with inference(runner):
            batches = [(batch,) for batch in make_batches(self.model, prompts, self.batch_size)]
            done = by_halves(batches, run, progress=progress)
        return in_pair_order([batch for (batch,), _ in done], [of.arrived() for _, of in done])

    def after_beginnings(
        self, prompts: Sequence[TokenizedPrompt], progress: Progress
    ) -> Float[Tensor, "hook prompt d_model"] | None:
        """As `by_whole_passes`, what many prompts begin with run once, by the bare model.

        None where that saves little or cannot be done; and, with a warning, where whole passes give
        something else of the prompts that were padded the most and the least, once a model.
        """
        model, outputs = self.model, map(resid_post, range(int(self.model.cfg.n_layers)))
        groups = []
        if {*self.hook_names} <= {*outputs} and model not in _run_whole:
            groups = make_beginnings(model, prompts, self.position, self.batch_size)
        runner = for_hooks(model, self.hook_names, on_cpu=True) if groups else model
        if not isinstance(runner, BareModel):
            return None
        last = max(self.hook_names, key=hook_layer)
        batches: list[Batch] = []
        values: list[Float[Tensor, "hook row d_model"]] = []
        padding: dict[int, int] = {}
        with inference(runner):
            for group in groups:
                try:
                    prefix = None
                    if group.head is not None:
                        prefix = run_prefix(runner, group.head, last_hook=last)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    return None  # whole passes take less at once, and may be halved
                width = 0 if prefix is None else prefix.attention_mask.shape[1]

                def run(batch: Batch, group: Any = group, prefix: Prefix | None = prefix) -> Tensor:
                    of = None if prefix is None else prefix.at(group.rows(batch), 0)
                    places = batch.places(self.position)
                    return run_to_hooks(runner, batch, self.hook_names, places=places, prefix=of)

                before = len(padding)
                tell = part_of(progress, "", before=before, total=len(prompts))
                for (batch,), found in by_halves(
                    [(tail,) for tail in group.tails], run, progress=tell
                ):
                    batches.append(batch)
                    values.append(found)
                    whole = width + batch.tokens.shape[1]
                    padding |= {row: whole - len(prompts[row]) for row in batch.rows}
        activations = in_pair_order(batches, values)
        rows = sorted(
            {min(padding, key=padding.__getitem__), max(padding, key=padding.__getitem__)}
        )
        some = [prompts[row] for row in rows]
        expected = self.by_whole_passes(some, silent)
        gap = float(relative_gap(activations[:, rows], expected).max())
        if gap <= allowed_gap(model.cfg.dtype):
            return activations
        _run_whole.add(model)
        warnings.warn(
            "the model has other activations after the kept keys and values of what prompts begin "
            f"with than in whole passes (by {gap:.2g} of their size); prompts are run whole, which "
            "is slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


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
    """Raise `ModelError` that names the hooks with NaN or inf."""
    finite = are_finite(activations)
    if not finite.all():
        bad = [name for name, ok in zip(hook_names, finite.tolist(), strict=True) if not ok]
        raise ModelError(
            f"NaN or inf in the activations at {', '.join(bad)}; try dtype float32 or bfloat16 "
            "(float16 overflows beyond 65504) and check the model's weights"
        )


def reading_hook(
    into: dict[str, Tensor], hook_name: str, places: Places
) -> tuple[str, HookFunction]:
    """A forward hook that stores what is read at the places of each row as `into[hook_name]`.

    The stored tensor is `Float["prompt d_model"]` in float32 at least. The hook raises
    `InputError` when the activation is not `[prompt, token, d_model]`.
    """

    def read(activation: Tensor) -> Tensor:
        check_residual(activation, hook_name)
        return at_position(activation, places)

    return keeping(into, [hook_name], read)[0]


def check_residual(activation: Float[Tensor, "..."], hook_name: str) -> None:
    """Raise `InputError` unless the hook's activation is `[prompt, token, d_model]`."""
    if activation.ndim != 3:
        advice = "choose a hook on the residual stream or its writers"
        if hook_name.endswith("hook_z"):
            advice = f"name one head, such as {hook_name}[0], or all of them: {hook_name}[*]"
        raise InputError(
            f"hook {hook_name} holds a tensor of shape {tuple(activation.shape)}; expected "
            f"[prompt, token, d_model], so {advice}"
        )


def at_position(
    values: Float[Tensor, "row token d_model"], places: Places
) -> Float[Tensor, "row d_model"]:
    """Each row's values at its own places, in float32 at least."""
    places, wide = places.to(values.device), torch.promote_types(values.dtype, torch.float32)
    if places.ndim == 1:
        row = torch.arange(len(values), device=values.device)
        return values[row, places].to(wide)
    if places.dtype == torch.bool:
        return values.masked_fill(~places[..., None], -torch.inf).amax(dim=1).to(wide)
    # What padding holds is not looked at, be it NaN.
    read = values.to(wide).masked_fill((places == 0)[..., None], 0)
    return torch.einsum("rt,rtd->rd", places.to(wide), read)


def run_to_hooks(
    model: HookedModel,
    batch: Batch,
    hook_names: Sequence[str],
    *,
    places: Places,
    fwd_hooks: Sequence[tuple[str, HookFunction]] = (),
    prefix: Prefix | None = None,
) -> Float[Tensor, "hook prompt d_model"]:
    """Run a batch until every hook has been read once, and stop there.

    `places` are where each row is read; `fwd_hooks` (an intervention) act before the reading at the
    same hook. With `prefix`, the tokens follow those of it, whose cache is added to. Rows of a
    head are zero from d_head on where other hooks are wider. Raises `HookError` when a hook does
    not fire.
    """
    found: dict[str, Tensor] = {}
    places = to_device(places, batch.tokens.device)
    readers = [reading_hook(found, name, places) for name in hook_names]

    def stop(activation: Tensor, hook: Any) -> None:  # noqa: ARG001 (TransformerLens's signature)
        if len(found) == len(hook_names):
            raise Stop

    stopping = [(name, stop) for name in hook_names]
    with hooked(model, [*fwd_hooks, *readers, *stopping]), suppress(Stop):
        kwargs = batch.forward_kwargs if prefix is None else prefix.kwargs(batch.attention_mask)
        model(batch.tokens, return_type=None, **kwargs)
    return stacked(found, hook_names)


def stacked(
    found: Mapping[str, Float[Tensor, "prompt _"]], hook_names: Sequence[str]
) -> Float[Tensor, "hook prompt width"]:
    """What was read at some hooks, one upon another; of heads with zeros to the common width.

    Raises `InputError` where other hooks differ in width.
    """
    shapes = {tuple(found[name].shape) for name in hook_names if not is_head(name)}
    if len(shapes) > 1:
        raise InputError(
            f"the hooks have activations of different shapes {sorted(shapes)}; run them apart"
        )
    rows, width = [found[name] for name in hook_names], max(found[n].shape[1] for n in hook_names)
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (0, width - row.shape[1])).to(rows[0].device) for row in rows])


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
