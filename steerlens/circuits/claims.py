"""What carries the effect, put to the test: parts of the steered model held as unsteered."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers, measure, row_slices
from steerlens.circuits.components import Component, Prompts, head_hook, hook_of
from steerlens.circuits.interventions import Intervention, trace
from steerlens.models.hooks import HookFunction, hook_layer, hooked
from steerlens.models.loading import HookedModel, inference
from steerlens.progress import Progress, silent
from steerlens.stats import ratio_interval
from steerlens.tables import CLAIM_COLUMNS, Row, to_frame


def run_claims(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    steered: Intervention,
    named: Sequence[Component],
    others: Sequence[Component],
    metric: tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]],
    after: int,
    *,
    n_draws: int,
    n_bootstrap: int,
    seed: int,
    progress: Progress = silent,
) -> pd.DataFrame:
    """The steered model with something held at its unsteered value (`CLAIM_COLUMNS`).

    Attention patterns, values, the `named` components, and `n_draws` times as many random `others`;
    `metric` is the answer logit difference unsteered and steered, prompt by prompt, `after` the
    first block behind the vector. `progress` is told of the runs. See `find_readers`.
    """
    before, behind = metric
    change = float((behind - before).mean())
    layers = range(after, int(model.cfg.n_layers))

    whole = (behind - before).double()

    def row(test: str, n: int, changes: list[Float[Tensor, " prompt"]], *, drawn: bool) -> Row:
        means = torch.stack([c.double().mean() for c in changes]) if changes else torch.zeros(0)
        low = high = float("nan")
        if drawn and len(changes) > 1 and change:
            ends = (means / change).quantile(torch.tensor([0.025, 0.975]).double())
            low, high = ends.tolist()
        elif not drawn and changes:
            low, high = ratio_interval(
                changes[0].double().numpy(), whole.numpy(), n_resamples=n_bootstrap, seed=seed
            )
        mean = float(means.mean())
        return {
            "test": test,
            "n_components": n,
            "n_draws": len(changes),
            "change": mean,
            "remaining": mean / change if change else float("nan"),
            "ci_low": low,
            "ci_high": high,
        }

    def held(names: Sequence[str], parts: Sequence[Component] | None) -> Float[Tensor, " prompt"]:
        return _held(model, prompts, answers, steered, names, parts) - before

    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    values = [f"blocks.{layer}.attn.hook_v" for layer in layers]
    rows = [row("nothing", 0, [behind - before], drawn=False)]
    if not named:
        return to_frame(rows, CLAIM_COLUMNS, {})
    n_runs = 3 + n_draws
    progress("runs", 0, n_runs)
    for test, hooks in (("attention patterns", patterns), ("attention values", values)):
        changes = [held(hooks, None)] if _is_live(model, prompts, hooks[0]) else []
        rows.append(row(test, 0, changes, drawn=False))
        progress("runs", len(rows) - 1, n_runs)
    rows.append(row("named components", len(named), [held((), named)], drawn=False))
    progress("runs", 3, n_runs)
    generator = np.random.default_rng(seed)
    draws = []
    for i in range(n_draws):
        drawn = _as_many(named, others, generator)
        if drawn is not None:
            draws.append(held((), drawn))
        progress("runs", 4 + i, n_runs)
    if n_draws:
        rows.append(row("random components", len(named), draws, drawn=True))
    return to_frame(rows, CLAIM_COLUMNS, {})


def _is_live(model: HookedModel, prompts: Prompts, name: str) -> bool:
    """Whether what a hook returns is used: on some models that of attention patterns is not."""
    heads = head_hook(hook_layer(name))
    some = prompts.part(slice(0, 1))
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept.append(activation)

    def drop(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.zeros_like(activation)

    with inference(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TransformerLens says so too; it is NaN here
        for fwd_hooks in ([(heads, keep)], [(name, drop), (heads, keep)]):
            with hooked(model, fwd_hooks):
                model(some.tokens, return_type=None)
    return not torch.equal(kept[0], kept[1])


def _as_many(
    named: Sequence[Component], others: Sequence[Component], generator: np.random.Generator
) -> list[Component] | None:
    """As many heads and MLPs as are named, of the others; None where there are too few."""
    drawn: list[Component] = []
    for kind in ("head", "mlp"):
        n = sum(part.kind == kind for part in named)
        pool = [part for part in others if part.kind == kind]
        if len(pool) < n:
            return None
        drawn += [pool[i] for i in generator.choice(len(pool), n, replace=False)]
    return drawn


def _held(
    model: HookedModel,
    prompts: Prompts,
    answers: Answers,
    steered: Intervention,
    hook_names: Sequence[str],
    parts: Sequence[Component] | None,
) -> Float[Tensor, " prompt"]:
    """The steered model's metric with whole hooks, or some components, at unsteered values."""
    heads: dict[str, list[int]] = {}
    names = list(hook_names)
    for part in parts or ():
        if part.kind == "head":
            heads.setdefault(hook_of(part), []).append(part.head)
        else:
            names.append(hook_of(part))
    found = []
    for rows in row_slices(len(prompts)):
        some, its = prompts.part(rows), answers.part(rows)
        kept = trace(model, some, its, [*names, *heads]).activations
        fwd_hooks = [
            *(_replacing(name, kept[name], None) for name in names),
            *(_replacing(name, kept[name], which) for name, which in heads.items()),
        ]
        with steered.on(model), hooked(model, fwd_hooks):
            found.append(measure(model, some, its))
    return torch.cat(found)


def _replacing(name: str, value: Tensor, heads: list[int] | None) -> tuple[str, HookFunction]:
    """A hook that puts `value` in the activation's place, or that of some heads."""

    def replace_it(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if heads is None:
            return value.to(activation)
        changed = activation.clone()
        changed[:, :, heads] = value.to(activation)[:, :, heads]
        return changed

    return name, replace_it
