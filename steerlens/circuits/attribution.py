"""Attribution patching: an estimate of what every component carries, from one backward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.components import (
    check_complete,
    components,
    contract,
    cotangents,
    writer_hooks,
)
from steerlens.circuits.interventions import Intervention
from steerlens.circuits.prompts import counting
from steerlens.circuits.tasks import Task, Traced
from steerlens.engine.checkpoint import Tensors
from steerlens.errors import InputError
from steerlens.models import HookedModel, hook_layer, inference, resid_post
from steerlens.models.tolerance import allowed_gap
from steerlens.progress import Progress


@dataclass(frozen=True)
class Estimates:
    """Of the components behind a steered hook, in their order; logits, on the CPU.

    `effect` and `direct` are as in `find_readers`, `vector_direct` is what the vector's own write
    adds to the metric; `unsteered` and `steered` are the metric itself.
    """

    effect: Float[Tensor, "component prompt"]
    direct: Float[Tensor, "component prompt"]
    vector_direct: Float[Tensor, " prompt"]
    unsteered: Float[Tensor, " prompt"]
    steered: Float[Tensor, " prompt"]

    @property
    def change(self) -> Float[Tensor, " prompt"]:
        """Of the metric."""
        return self.steered - self.unsteered


def estimate(
    task: Task, steered: Intervention, *, ig_steps: int = 1, progress: Progress | None = None
) -> Estimates:
    """Effects of all components behind an intervention's one hook; `ig_steps` as `find_readers`."""
    count = counting(progress, "estimates: prompts", len(task.prompts))
    parts: list[Estimates] = []
    for batch in task.passes():
        decided = ("estimates", steered.decided, ig_steps)
        kept = batch.once(decided, partial(_estimate_pass, batch, steered, ig_steps))
        parts.append(Estimates(**kept))
        count(len(batch.prompts))
    every = ([getattr(part, field.name) for part in parts] for field in fields(Estimates))
    return Estimates(*(torch.cat(values, dim=-1) for values in every))


def _estimate_pass(task: Task, steered: Intervention, ig_steps: int) -> Tensors:
    """The fields of `Estimates`."""
    model, at_last = task.model, task.prompts.at_last
    (hook_name,) = (step.hook_name for step in steered.steps)
    writers, final = writer_hooks(model), _final(model)
    plain = task.trace((*writers, hook_name, final), with_gradients=True)
    pushed = task.trace((*writers, hook_name, final), steered)
    gradients = plain.gradients
    if ig_steps > 1:
        gradients = _path_gradients(task, steered, writers, ig_steps)
    change = {name: pushed.activations[name] - plain.activations[name] for name in writers}
    n_before = len(components(model, n_layers=hook_layer(hook_name) + 1))
    effect = contract(change, {name: gradients[name].float() for name in writers}).sum(dim=2)
    readout = frozen_readout(task, plain)
    last = {name: at_last(activation)[:, None] for name, activation in change.items()}
    direct = contract(last, cotangents(model, readout))[n_before:, :, 0]
    before, behind = (at_last(run.activations[hook_name]).float() for run in (plain, pushed))
    vector_direct = ((behind - before) * readout).sum(dim=-1)
    stream = at_last(pushed.activations[final] - plain.activations[final]).float() * readout
    check_complete(
        float((direct.sum(dim=0) + vector_direct).sum()),
        float(stream.sum()),
        float(direct.abs().sum() + vector_direct.abs().sum()),
        "the change of the residual stream",
        model.cfg.dtype,
    )
    estimates = (effect[n_before:], direct, vector_direct, plain.metric, pushed.metric)
    return vars(Estimates(*(values.cpu() for values in estimates)))


def frozen_readout(task: Task, plain: Traced) -> Float[Tensor, "prompt d_model"]:
    """The row that the final residual is multiplied with to give the metric, the norm frozen.

    Per prompt, at its last token: `l = gradient + x (m - m_0) / (|x|^2 + d_model eps)`, with x the
    residual there (centred where the norm centres), m the metric, m_0 what a zero residual gives
    and eps the norm's: a norm divides by its input's length, so the gradient lacks the part along
    x, and that part is what all of x writes. `plain` is the unsteered run, with the gradient at the
    last block's output. Raises `InputError` when the metric is not linear in the norm's output y:
    half way from y(0) to y it must be half way from m_0 to m.
    """
    model, final = task.model, _final(task.model)
    stream = task.prompts.at_last(plain.activations[final])
    gradient = task.prompts.at_last(plain.gradients[final]).float()
    x = stream.float()
    if str(getattr(model.cfg, "normalization_type", "")).upper().startswith("LN"):
        x = x - x.mean(dim=-1, keepdim=True)
    modules: Any = model
    with inference(model):
        nothing = modules.ln_final(torch.zeros_like(stream)[:, None])
        whole = modules.ln_final(stream[:, None])
        constant, half, full = (
            task.answers.logit_difference(modules.unembed(y)[:, 0].float()).to(x.device)
            for y in (nothing, (nothing + whole) / 2, whole)
        )
    metric = plain.metric.to(x.device)
    gap = metric - constant
    slack = allowed_gap(model.cfg.dtype, least=1e-3, roundings=16)
    slack *= max(float(gap.abs().max()), 1e-6)
    off = torch.maximum((half - (constant + full) / 2).abs(), (full - metric).abs())
    if not float(off.max()) <= slack:
        raise InputError(
            "the answer logit difference is not linear behind the final norm (soft-capped logits, "
            "or a norm of another kind), so it cannot be split into what each component wrote"
        )
    eps = float(getattr(model.cfg, "eps", 0.0) or 0.0)
    return gradient + x * (gap / ((x * x).sum(dim=-1) + x.shape[-1] * eps))[:, None]


def _final(model: HookedModel) -> str:
    return resid_post(int(model.cfg.n_layers) - 1)


def _path_gradients(
    task: Task, steered: Intervention, hook_names: Sequence[str], ig_steps: int
) -> Mapping[str, Tensor]:
    """The mean gradient at coefficients in the middle of each of `ig_steps` equal parts."""
    total: dict[str, Tensor] = {}
    for k in range(ig_steps):
        part = steered.share((k + 0.5) / ig_steps)
        for name, gradient in task.trace(hook_names, part, with_gradients=True).gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: gradient / ig_steps for name, gradient in total.items()}
