"""Exact patching: one component's steered output in the unsteered model, by TransformerLens."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers, row_slices
from steerlens.circuits.components import Component, Prompts, hook_of
from steerlens.circuits.interventions import Intervention, trace
from steerlens.models.loading import HookedModel, inference
from steerlens.progress import Progress, silent


def patch_components(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    steered: Intervention,
    parts: Sequence[Component],
    *,
    progress: Progress = silent,
) -> dict[Component, Float[Tensor, " prompt"]]:
    """The unsteered model's metric with the steered output of one component at a time.

    `progress` is told of the forward passes: one a component and batch of prompts.
    """
    if not parts:
        return {}
    found: dict[Component, list[Tensor]] = {part: [] for part in parts}
    done, slices = 0, row_slices(len(prompts))
    progress("passes", done, len(slices) * len(parts))
    for rows in slices:
        some, its = prompts.part(rows), answers.part(rows)
        names = dict.fromkeys(hook_of(part) for part in parts)
        clean = trace(model, some, its, list(names), intervention=steered).activations
        for part in parts:
            found[part].append(_patch(model, some, its, clean, part))
            done += 1
            progress("passes", done, len(slices) * len(parts))
    return {part: torch.cat(values) for part, values in found.items()}


def _patch(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    clean: Mapping[str, Tensor],
    part: Component,
) -> Float[Tensor, " prompt"]:
    """TransformerLens's activation patching of one component: a forward pass."""
    from transformer_lens.patching import generic_activation_patch, layer_head_vector_patch_setter

    is_head = part.kind == "head"
    index = {"layer": [part.layer]}
    setter: Callable[..., Tensor] = lambda corrupted, index, clean: clean  # noqa: ARG005, E731
    if is_head:
        index["head"] = [part.head]
        setter = layer_head_vector_patch_setter

    def metric(logits: Tensor) -> Tensor:
        at = torch.arange(len(prompts), device=logits.device)
        return answers.logit_difference(logits[at, prompts.last.to(logits.device)].float())

    # It shows a progress bar of its own that no setting turns off.
    with inference(model), redirect_stderr(io.StringIO()):
        result = generic_activation_patch(
            model,
            prompts.tokens,
            clean,
            metric,
            setter,
            "z" if is_head else "mlp_out",
            index_df=pd.DataFrame(index),
            reduce="none",
        )
    values: Tensor = result.values[0].float().cpu()
    return values
