"""Who reads the direction: which later components turn the steering into another answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers, row_slices
from steerlens.circuits.claims import run_claims
from steerlens.circuits.components import (
    Component,
    Prompts,
    check_additive,
    check_complete,
    components,
    contract,
    cotangents,
    writer_hooks,
)
from steerlens.circuits.interventions import Intervention, Traced, trace
from steerlens.circuits.patching import patch_components
from steerlens.circuits.writers import component_fields
from steerlens.errors import InputError, whole
from steerlens.models.hooks import hook_layer, hooked, resid_post
from steerlens.models.loading import HookedModel, inference, provenance
from steerlens.progress import Progress, part_of, silent
from steerlens.stats import bootstrap_intervals
from steerlens.steering import Coefficient, SteeringVector, steps
from steerlens.tables import READER_COLUMNS, Row, to_frame


@dataclass(frozen=True)
class Readers:
    """`table` has a row a component behind the steered hook (`READER_COLUMNS`), largest effect
    first; `claims` the tests of what carries it (`CLAIM_COLUMNS`).

    `table.attrs` holds `metric_unsteered` and `metric_steered` (mean answer logit difference),
    `vector_direct` (what the vector itself adds to it through the residual stream), `norm` (what is
    left: the final norm's other scale), and `correlation`: Pearson's r of estimate and exact
    patching over the patched components, by kind (None below three).
    """

    table: pd.DataFrame
    claims: pd.DataFrame

    def __repr__(self) -> str:
        return f"Readers({self.table.attrs['hook_name']}, {len(self.table)} components)"


def find_readers(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    vector: SteeringVector,
    coefficient: Coefficient,
    *,
    top: int = 20,
    ig_steps: int = 1,
    n_claimed: int = 10,
    n_draws: int = 10,
    n_bootstrap: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Readers:
    """What carries a vector's effect on the answer logit difference, component by component.

    `effect` estimates the change when this component's output alone is replaced by its steered
    one in the unsteered model: `sum (a_steered - a_unsteered) . gradient`, the gradient of the
    metric at the unsteered run, or its mean over `ig_steps` runs at the coefficients
    `(k - 1/2) / ig_steps` of the whole (attribution patching, Nanda 2023; integrated gradients,
    Hanna et al. 2024, arXiv:2403.17806, with the path along the coefficient). One backward pass
    gives all components. `exact` is that replacement run, for the `top` components by estimate
    (TransformerLens's `generic_activation_patch`). `direct` is the change of the component's own
    write into the metric with the final norm frozen at the unsteered run, and `mediated` the rest
    of its effect. All in logits, mean over prompts with 95% bootstrap intervals over prompts.

    `claims` runs the steered model with attention patterns, or values, or the `n_claimed`
    components of largest effect held at what they are unsteered, and with `n_draws` random sets of
    as many other heads and MLPs, and says what share of the change remains (0 claimed: no runs).
    NaN where a model does not use what is put into its patterns (then `n_draws` is 0), and where
    fewer other components are left than were named.

    Raises `InputError` when the vector does not act at one block output before the last, when the
    coefficient is 0, when the heads and MLPs do not add up to the residual stream, where the metric
    is not linear behind the final norm (soft-capped logits), when the answers do not fit the
    prompts, and on negative counts; `InputError` on `n_bootstrap` below 2 or a negative seed;
    `InputError` as `steer`.

    Examples:
        >>> from steerlens.circuits import contrast_answers, find_readers, make_prompts
        >>> prompts = make_prompts(model, list(sl.tokenize_pairs(model, pairs).positive))
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> readers = find_readers(model, prompts, answers, vector, 4, top=2, n_claimed=2)
        >>> readers
        Readers(blocks.2.hook_resid_post, 10 components)
        >>> np.allclose(readers.table.effect, readers.table.direct + readers.table.mediated)
        True
    """
    if min(top, n_claimed, n_draws) < 0 or ig_steps < 1:
        raise InputError(
            "top, n_claimed and n_draws are 0 or more and ig_steps 1 or more, got "
            f"{top}, {n_claimed}, {n_draws} and {ig_steps}"
        )
    n_bootstrap, seed = whole("n_bootstrap", n_bootstrap, 2), whole("seed", seed, 0)
    check_additive(model)
    answers.check(model, len(prompts))
    hook_name = _steered_hook(model, vector, coefficient)
    after = hook_layer(hook_name) + 1
    steered = Intervention(vector, coefficient)
    later = [part for part in components(model) if part.layer >= after]
    tell, found = progress or silent, []
    tell("estimates: prompts", 0, len(prompts))
    for rows in row_slices(len(prompts)):
        its = answers.part(rows)
        found.append(_estimate(model, prompts.part(rows), its, steered, later, ig_steps=ig_steps))
        tell("estimates: prompts", min(rows.stop, len(prompts)), len(prompts))
    effect = torch.cat([part.effect for part in found], dim=1)
    direct = torch.cat([part.direct for part in found], dim=1)
    before, behind = (torch.cat([getattr(part, n) for part in found]) for n in ("before", "behind"))
    change = float((behind - before).mean())
    order = sorted(range(len(later)), key=lambda i: -abs(float(effect[i].mean())))
    exact = patch_components(
        model,
        prompts,
        answers,
        steered,
        [later[i] for i in order[:top]],
        progress=part_of(tell, "exact patching: passes"),
    )
    patched = {part: values - before for part, values in exact.items()}
    vector_direct = float(torch.cat([part.vector_direct for part in found]).mean())
    attrs = {
        "hook_name": hook_name,
        "coefficient": coefficient,
        "n_prompts": len(prompts),
        "metric_unsteered": float(before.mean()),
        "metric_steered": float(behind.mean()),
        "vector_direct": vector_direct,
        "norm": change - vector_direct - float(direct.sum(dim=0).mean()),
        "correlation": _correlations(later, effect, patched),
        "ig_steps": ig_steps,
        "answers": answers.words(model),
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "provenance": provenance(model).to_dict(),
    }
    table = _table(
        later, order, effect, direct, patched, change, attrs, n_bootstrap=n_bootstrap, seed=seed
    )
    named = [later[i] for i in order[:n_claimed]]
    others = [later[i] for i in order[n_claimed:]]
    claims = run_claims(
        model,
        prompts,
        answers,
        steered,
        named,
        others,
        (before, behind),
        after,
        n_draws=n_draws,
        n_bootstrap=n_bootstrap,
        seed=seed,
        progress=part_of(tell, "claims: runs"),
    )
    return Readers(table, claims)


def _steered_hook(model: HookedModel, vector: SteeringVector, coefficient: Coefficient) -> str:
    if not isinstance(vector, SteeringVector):
        raise InputError("expected a SteeringVector; make one with SteeringVector.from_vectors")
    names = [step.hook_name for step in steps(vector, coefficient)]
    if len(names) != 1:
        what = ", ".join(names) or "no hook (coefficient 0)"
        raise InputError(
            f"expected a vector at one block output and a coefficient that is not 0, got {what}; "
            "take one hook with .at(...)"
        )
    check_steered(model, names[0], 1)
    return names[0]


def check_steered(model: HookedModel, hook_name: str, coefficient: float | int) -> None:
    """Raise `InputError` unless the hook is a block output that something reads, c not 0."""
    last = int(model.cfg.n_layers) - 1
    if coefficient == 0:
        raise InputError("with coefficient 0 nothing is steered; give another one")
    if hook_name != resid_post(hook_layer(hook_name)):
        raise InputError(f"expected a vector at one block output, got one at {hook_name}")
    if hook_layer(hook_name) >= last:
        raise InputError(f"nothing reads the output of block {last}, the last one")


@dataclass(frozen=True)
class _Estimate:
    effect: Float[Tensor, "component prompt"]
    direct: Float[Tensor, "component prompt"]
    vector_direct: Float[Tensor, " prompt"]
    before: Float[Tensor, " prompt"]
    behind: Float[Tensor, " prompt"]


def _estimate(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    steered: Intervention,
    later: Sequence[Component],
    *,
    ig_steps: int,
) -> _Estimate:
    """Effects of all later components on some prompts, from passes over all of them at once."""
    n_layers = int(model.cfg.n_layers)
    final = resid_post(n_layers - 1)
    names = (*writer_hooks(model), final)
    plain = trace(model, prompts, answers, names, with_gradients=True)
    pushed = trace(model, prompts, answers, names, intervention=steered)
    gradients = plain.gradients
    if ig_steps > 1:
        gradients = _path_gradients(model, prompts, answers, steered, names, ig_steps)
    delta = {
        name: pushed.activations[name] - plain.activations[name] for name in writer_hooks(model)
    }
    skip = len(components(model)) - len(later)
    effect = contract(delta, {name: gradients[name].float() for name in delta}).sum(dim=2)[skip:]
    readout = frozen_readout(model, prompts, answers, plain, final)
    rows = torch.arange(len(prompts), device=prompts.last.device)

    def at_last(activation: Tensor) -> Tensor:
        return activation[rows, prompts.last][:, None]

    last = {name: at_last(change) for name, change in delta.items()}
    direct = contract(last, cotangents(model, readout))[skip:, :, 0]
    whole = pushed.activations[final] - plain.activations[final]
    stream = (at_last(whole)[:, 0].float() * readout).sum(dim=-1)
    hook = steered.vector.hook_names[0] if steered.vector is not None else final
    added = _added(model, prompts, steered, hook)
    vector_direct = (added * readout).sum(dim=-1)
    explained = float((direct.sum(dim=0) + vector_direct).sum())
    scale = float(direct.abs().sum() + vector_direct.abs().sum())
    what = "the change of the residual stream"
    check_complete(explained, float(stream.sum()), scale, what, model.cfg.dtype)
    return _Estimate(
        effect.cpu(), direct.cpu(), vector_direct.cpu(), plain.metric.cpu(), pushed.metric.cpu()
    )


def frozen_readout(
    model: HookedModel, prompts: Prompts, answers: Answers, plain: Traced, final: str
) -> Float[Tensor, "prompt d_model"]:
    """The row that the final residual is multiplied with to give the metric, the norm frozen.

    Per prompt, at its last token: `l = gradient + x (m - m_0) / (|x|^2 + d_model eps)`, with x the
    residual there (centred where the norm centres), m the metric, m_0 what a zero residual gives
    and eps the norm's: a norm divides by its input's length, so the gradient lacks the part along
    x, and that part is what all of x writes. Raises `InputError` when the metric is not linear in
    the norm's output y: half way from y(0) to y it must be half way from m_0 to m.
    """
    rows = torch.arange(len(prompts), device=prompts.last.device)
    x = plain.activations[final][rows, prompts.last].float()
    gradient = plain.gradients[final][rows, prompts.last].float()
    if str(getattr(model.cfg, "normalization_type", "")).upper().startswith("LN"):
        x = x - x.mean(dim=-1, keepdim=True)
    with inference(model):
        zero = torch.zeros((len(prompts), 1, x.shape[-1]), device=x.device).to(
            plain.activations[final].dtype
        )
        parts: Any = model
        nothing = parts.ln_final(zero)
        whole = parts.ln_final(plain.activations[final][rows, prompts.last][:, None])
        constant, half, full = (
            answers.logit_difference(parts.unembed(y)[:, 0].float()).to(x.device)
            for y in (nothing, (nothing + whole) / 2, whole)
        )
    metric = plain.metric.to(x.device)
    gap = metric - constant
    scale = max(float(gap.abs().max()), 1e-6)
    slack = max(1e-3, 16 * torch.finfo(model.cfg.dtype).eps) * scale
    off = torch.maximum((half - (constant + full) / 2).abs(), (full - metric).abs())
    if not float(off.max()) <= slack:
        raise InputError(
            "the answer logit difference is not linear behind the final norm (soft-capped logits, "
            "or a norm of another kind), so it cannot be split into what each component wrote"
        )
    eps = float(getattr(model.cfg, "eps", 0.0) or 0.0)
    return gradient + x * (gap / ((x * x).sum(dim=-1) + x.shape[-1] * eps))[:, None]


def _added(
    model: HookedModel, prompts: Prompts, steered: Intervention, hook: str
) -> Float[Tensor, "prompt d_model"]:
    """What the vector adds at its hook to each prompt's last token."""
    rows = torch.arange(len(prompts), device=prompts.last.device)
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept.append(activation[rows, prompts.last].float())

    with inference(model):
        for intervention in (steered, Intervention()):
            with intervention.on(model), hooked(model, [(hook, keep)]):
                model(prompts.tokens, stop_at_layer=hook_layer(hook) + 1, return_type=None)
    return kept[0] - kept[1]


def _path_gradients(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    steered: Intervention,
    names: Sequence[str],
    ig_steps: int,
) -> Mapping[str, Tensor]:
    """The mean gradient at coefficients in the middle of each of `ig_steps` equal parts."""
    assert steered.vector is not None
    total: dict[str, Tensor] = {}
    ((_, amount),) = [(s.hook_name, s.amount) for s in steps(steered.vector, steered.coefficient)]
    unscaled = replace(steered.vector, scale=torch.ones(1))
    for k in range(ig_steps):
        part = Intervention(unscaled, amount * (k + 0.5) / ig_steps)
        found = trace(model, prompts, answers, names, intervention=part, with_gradients=True)
        for name, gradient in found.gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: gradient / ig_steps for name, gradient in total.items()}


def _correlations(
    later: Sequence[Component],
    effect: Float[Tensor, "component prompt"],
    patched: Mapping[Component, Float[Tensor, " prompt"]],
) -> dict[str, float | None]:
    """Pearson's r of estimated and exact mean effects by kind; None below three."""
    found: dict[str, float | None] = {}
    for kind in ("head", "mlp"):
        pairs = [
            (float(effect[i].mean()), float(patched[part].mean()))
            for i, part in enumerate(later)
            if part.kind == kind and part in patched
        ]
        enough = len(pairs) > 2 and all(np.std(column) > 0 for column in zip(*pairs, strict=True))
        found[kind] = float(np.corrcoef(np.array(pairs).T)[0, 1]) if enough else None
    return found


def _table(
    later: Sequence[Component],
    order: Sequence[int],
    effect: Float[Tensor, "component prompt"],
    direct: Float[Tensor, "component prompt"],
    patched: Mapping[Component, Float[Tensor, " prompt"]],
    change: float,
    attrs: dict[str, Any],
    *,
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    bounds = bootstrap_intervals(effect.double().numpy(), n_resamples=n_bootstrap, seed=seed)
    rows: list[Row] = []
    for i in order:
        mean, own = float(effect[i].double().mean()), float(direct[i].double().mean())
        row: dict[str, Any] = {
            **component_fields(later[i]),
            "effect": mean,
            "effect_ci_low": float(bounds[0][i]),
            "effect_ci_high": float(bounds[1][i]),
            "share": mean / change if change else float("nan"),
            "direct": own,
            "mediated": mean - own,
        }
        if later[i] in patched:
            exact = patched[later[i]].double().numpy()
            low, high = bootstrap_intervals(exact[None], n_resamples=n_bootstrap, seed=seed)
            row |= {
                "exact": float(exact.mean()),
                "exact_ci_low": float(low[0]),
                "exact_ci_high": float(high[0]),
            }
        rows.append(row)
    return to_frame(rows, READER_COLUMNS, attrs)
