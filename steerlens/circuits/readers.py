"""Who reads the direction: which later components turn the steering into another answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.attribution import Estimates, estimate
from steerlens.circuits.claims import Claims
from steerlens.circuits.components import (
    Component,
    by_hook,
    check_additive,
    component_rows,
    components,
    mean_intervals,
)
from steerlens.circuits.interventions import Intervention, capture, replacing
from steerlens.circuits.prompts import Prompts, choosing_half, counting, half_record
from steerlens.circuits.tasks import Task
from steerlens.engine.checkpoint import Checkpoint, Tensors
from steerlens.errors import InputError
from steerlens.models import HookedModel, hook_layer, provenance, resid_post
from steerlens.progress import Progress
from steerlens.stats import N_BOOTSTRAP
from steerlens.steering import Coefficient, SteeringVector
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, Draws, Whole, checked


@dataclass(frozen=True, eq=False)
class Readers:
    """`table` has a row a component behind the steered hook (columns `readers`), largest effect
    first; `claims` the tests of what carries it (columns `claims`).

    `table.attrs` holds `metric_unsteered` and `metric_steered` (mean answer logit difference),
    `vector_direct` (what the vector itself adds to it through the residual stream), `norm` (what is
    left: the final norm's other scale), and `correlation`: Pearson's r of estimate and exact
    patching over the patched components, by kind (None below three).
    """

    table: pd.DataFrame
    claims: pd.DataFrame

    def __repr__(self) -> str:
        return f"Readers({self.table.attrs['hook_name']}, {len(self.table)} components)"


@checked
def find_readers(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    vector: SteeringVector,
    coefficient: Coefficient,
    *,
    top: Whole = 20,
    ig_steps: Count = 1,
    n_claimed: Whole = 10,
    n_draws: Whole = 20,
    n_bootstrap: Draws = N_BOOTSTRAP,
    seed: Whole = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Readers:
    """What carries a vector's effect on the answer logit difference, component by component.

    `effect`, `sum (a_steered - a_unsteered) . gradient` (attribution patching, Nanda 2023), is what
    `exact` runs: this component's output alone replaced by its steered one in the unsteered model.
    `direct` is what its own write adds, `mediated` the rest. Means in logits, with 95% intervals.
    `claims` says what remains of the change with parts of the steered model held as unsteered.
    Every number is in docs/maths.md, "Who reads it".

    Args:
        model: The model, unsteered.
        prompts: What it is asked, as `make_prompts` makes them.
        answers: The answers to these prompts.
        vector: A vector at one block output before the last.
        coefficient: As `steer` takes it; not 0.
        top: How many components, by estimate, are patched exactly.
        ig_steps: 1: the gradient at the unsteered run. More: its mean over so many runs between
            the unsteered and the steered one (integrated gradients, Hanna et al. 2024).
        n_claimed: How many components, by estimate, the claims hold; 0: no claims, else 4 groups of
            prompts or more are needed.
        n_draws: Random sets; 19 of them can show p = 0.05.
        n_bootstrap: Resamples, 2 or more.
        seed: Of halves, resamples and random sets.
        progress: Told of prompts, passes and runs.
        checkpoint: Given what is finished (see `Checkpoint`). Default: nothing is kept.

    Raises:
        InputError: The vector acts elsewhere or not at all, heads and MLPs do not add up to the
            residual stream, the metric is not linear behind the final norm (soft-capped logits),
            the answers do not fit the prompts, or a count is too small; and as `steer`.

    Examples:
        >>> from steerlens.circuits import contrast_answers, find_readers, make_prompts
        >>> prompts = make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)
        >>> answers = contrast_answers(model, pairs, n_tokens=3)
        >>> readers = find_readers(model, prompts, answers, vector, 4, top=2, n_claimed=2)
        >>> readers
        Readers(blocks.2.hook_resid_post, 10 components)
        >>> np.allclose(readers.table.effect, readers.table.direct + readers.table.mediated)
        True
    """
    drawing = {"n_bootstrap": n_bootstrap, "seed": seed}
    check_additive(model)
    steered, hook_name = _steered(model, vector, coefficient)
    task = Task(model, prompts, answers, checkpoint)
    is_choosing = torch.zeros(len(prompts), dtype=torch.bool)
    if n_claimed:
        is_choosing = choosing_half(prompts.groups, seed)
    task.check_unsteered()
    later = [part for part in components(model) if part.layer > hook_layer(hook_name)]
    estimates = estimate(task, steered, ig_steps=ig_steps, progress=progress)
    means = estimates.effect.mean(dim=1).abs()
    order = means.argsort(descending=True, stable=True).tolist()
    ranked = [later[i] for i in order]
    metrics = _patched(task, steered, ranked[:top], progress)
    rows = _rows(later, estimates, metrics, groups=prompts.groups, **drawing)
    vector_direct = float(estimates.vector_direct.mean())
    rest = float(estimates.change.mean()) - vector_direct
    attrs = {
        "hook_name": hook_name,
        "coefficient": coefficient,
        "n_prompts": len(prompts),
        "metric_unsteered": float(estimates.unsteered.mean()),
        "metric_steered": float(estimates.steered.mean()),
        "vector_direct": vector_direct,
        "norm": rest - float(estimates.direct.sum(dim=0).mean()),
        "correlation": _correlations(rows),
        "ig_steps": ig_steps,
        "answers": answers.words(model),
        **drawing,
        "provenance": provenance(model).to_dict(),
    }
    sizes = estimates.effect[:, is_choosing].mean(dim=1).abs()
    named = [later[i] for i in sizes.argsort(descending=True, stable=True)[:n_claimed].tolist()]
    tested = task.part((~is_choosing).nonzero().flatten().tolist())
    changes = (estimates.unsteered[~is_choosing], estimates.change[~is_choosing])
    claims = Claims(tested, steered, *changes, n_bootstrap, seed).test(
        named, later, n_draws=n_draws, progress=progress
    )
    claims.attrs |= {
        "chosen_on": half_record(prompts.groups, is_choosing),
        "tested_on": half_record(prompts.groups, ~is_choosing),
        "named": [str(part) for part in named],
    }
    return Readers(to_frame([rows[i] for i in order], "readers", attrs), claims)


def _steered(
    model: HookedModel, vector: SteeringVector, coefficient: Coefficient
) -> tuple[Intervention, str]:
    """The intervention, and the one hook that it acts at."""
    steered = Intervention(vector, coefficient)
    names = [step.hook_name for step in steered.steps]
    if len(names) != 1:
        raise InputError(
            "expected a vector at one block output and a coefficient that is not 0, got "
            f"{', '.join(names) or 'no hook (coefficient 0)'}; take one hook with .at(...)"
        )
    check_steered(model, names[0], 1)
    return steered, names[0]


@checked
def check_steered(model: HookedModel, hook_name: str, coefficient: float | int) -> None:
    """See that steering there has readers: what `find_readers` would refuse, before it is run.

    Args:
        model: The model.
        hook_name: The hook that is steered.
        coefficient: Residual units.

    Raises:
        InputError: The hook is not a block output that something reads, or the coefficient is 0.

    Examples:
        >>> from steerlens.circuits import check_steered
        >>> check_steered(model, "blocks.2.hook_resid_post", 4)
    """
    last = int(model.cfg.n_layers) - 1
    if coefficient == 0:
        raise InputError("with coefficient 0 nothing is steered; give another one")
    if hook_name != resid_post(hook_layer(hook_name)):
        raise InputError(f"expected a vector at one block output, got one at {hook_name}")
    if hook_layer(hook_name) >= last:
        raise InputError(f"nothing reads the output of block {last}, the last one")


def _patched(
    task: Task, steered: Intervention, parts: Sequence[Component], progress: Progress | None
) -> dict[Component, Float[Tensor, " prompt"]]:
    """The unsteered model's metric with the steered output of one component at a time."""
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
    ((name, heads),) = by_hook([part]).items()
    return {"metric": batch.measure(fwd_hooks=[replacing(name, clean[name], heads)]).cpu()}


def _correlations(rows: Sequence[Row]) -> dict[str, float | None]:
    """Pearson's r of estimated and exact mean effects by kind; None below three."""
    correlations: dict[str, float | None] = {}
    for kind in ("head", "mlp"):
        patched = [row for row in rows if row["component"] == kind and "exact" in row]
        columns = [np.array([row[name] for row in patched]) for name in ("effect", "exact")]
        enough = len(patched) > 2 and all(column.std() > 0 for column in columns)
        correlations[kind] = float(np.corrcoef(columns)[0, 1]) if enough else None
    return correlations


def _rows(
    later: Sequence[Component],
    estimates: Estimates,
    patched: Mapping[Component, Float[Tensor, " prompt"]],
    **drawing: Any,
) -> list[Row]:
    """A row a component, in the order of `later`."""
    change = float(estimates.change.mean()) or math.nan
    effect, low, high = mean_intervals(estimates.effect, **drawing)
    direct = estimates.direct.double().mean(dim=1).numpy()
    rows = component_rows(
        later,
        effect=effect,
        effect_ci_low=low,
        effect_ci_high=high,
        share=effect / change,
        direct=direct,
        mediated=effect - direct,
    )
    names = ("exact", "exact_ci_low", "exact_ci_high")
    for i, part in enumerate(later):
        if part in patched:
            exact = patched[part] - estimates.unsteered
            numbers = (float(x[0]) for x in mean_intervals(exact[None], **drawing))
            rows[i] = {**rows[i], **dict(zip(names, numbers, strict=True))}
    return rows
