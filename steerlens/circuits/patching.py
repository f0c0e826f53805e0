"""Exact patching: outputs of one run put into another, one component at a time or several."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.components import Component, by_hook
from steerlens.circuits.interventions import Intervention, capture
from steerlens.circuits.prompts import counting
from steerlens.circuits.tasks import Task
from steerlens.engine.checkpoint import Tensors
from steerlens.models.hooks import HookFunction
from steerlens.progress import Progress


def replacing(
    hook_name: str, value: Float[Tensor, "*shape"], heads: list[int] | None, *, first: int = 0
) -> tuple[str, HookFunction]:
    """A hook that puts `value` in the activation's place, or that of some heads.

    At the tokens from `first` on. `value` is as large as the activation, or lacks its first axes.
    """
    where: Any = (slice(None), slice(first, None), *([] if heads is None else [heads]))

    def replace_it(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        changed = activation.clone()
        changed[where] = value.to(activation).expand_as(activation)[where]
        return changed

    return hook_name, replace_it


def patch_components(
    task: Task,
    steered: Intervention,
    parts: Sequence[Component],
    *,
    progress: Progress | None = None,
) -> dict[Component, Float[Tensor, " prompt"]]:
    """The unsteered model's metric with the steered output of one component at a time.

    `progress` is told of the forward passes: one a component and batch of prompts.
    """
    if not parts:
        return {}
    metrics: dict[Component, list[Tensor]] = {part: [] for part in parts}
    passes = task.passes()
    count = counting(progress, "exact patching: passes", len(passes) * len(parts))
    for batch in passes:
        clean = capture(task.model, batch.prompts.tokens, list(by_hook(parts)), steered)
        for part in parts:
            decided = ("patch", steered.decided, str(part))
            patched = batch.once(decided, partial(_patch, batch, clean, part))
            metrics[part].append(patched["metric"])
            count(1)
    return {part: torch.cat(values) for part, values in metrics.items()}


def _patch(batch: Task, clean: dict[str, Tensor], part: Component) -> Tensors:
    """The metric with the clean output of one component: a forward pass."""
    ((name, heads),) = by_hook([part]).items()
    return {"metric": batch.measure(fwd_hooks=[replacing(name, clean[name], heads)]).cpu()}
