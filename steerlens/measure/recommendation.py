"""Which layer and coefficient, or none: fitted, chosen and confirmed on separate groups."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Prompt
from steerlens.data.sequence import one_of_each_in_turn
from steerlens.data.shipped import dataset_names
from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.methods import fit_directions
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.engine import Engine
from steerlens.engine.labels import OWN_TOKENS, with_labels
from steerlens.engine.tokenization import fingerprint
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.boundary import check_search
from steerlens.measure.choosing import (
    OwnText,
    Parts,
    Prompts,
    choose_coefficients,
    few_groups,
    open_prompts,
    separation,
)
from steerlens.measure.effects import damages
from steerlens.measure.equal_damage import mean_norms
from steerlens.measure.label_flips import LabelFlips, rank_among_flips
from steerlens.measure.outcomes import Behaviour, Preference
from steerlens.measure.prediction import gap_gradients, linearise
from steerlens.measure.scorers import Concept
from steerlens.measure.settings import SEARCH_RANGE
from steerlens.measure.sign_results import SIGNS, SignResult, effect_of, verdict_of
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer, readout_hook, resolve_hooks
from steerlens.models.identity import provenance
from steerlens.progress import Progress, by_default, silent
from steerlens.steering import SteeringVector
from steerlens.steering.coefficients import Calibration
from steerlens.steering.generation import decoded, generate_texts
from steerlens.tables import Row, fragment, to_frame
from steerlens.validation import Count, Whole, checked

BEYOND = 1.5
"""Boundaries at which a text shows what too much does."""
N_CHECKED = 16
"""Held-out items on which linearised effects are compared with exact ones."""
N_SHOWN = 2
NEW_TOKENS = 40
MARGIN = 0.1
"""Of the standard deviation of what is steered, unsteered: a smaller effect does not matter."""


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Whether to steer, and for each sign where and how strongly.

    `signs` has "positive" and "negative": a `SignResult`, or None where it should not be steered;
    `reasons` has a sentence for each condition that failed. `vector`, with its boundaries, is None
    where neither sign should be. Tables: `table` (columns `recommendation`), one row a sign, with
    the numbers of a refused one too; `candidates` (columns `candidates`), one a layer; `texts`
    (columns `generations`), what the model writes at some coefficients.
    """

    signs: Mapping[str, SignResult | None]
    reasons: tuple[str, ...]
    vector: SteeringVector | None = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    candidates: pd.DataFrame = field(repr=False)
    texts: pd.DataFrame = field(repr=False)
    unit: str = "items"

    @property
    def steer(self) -> bool:
        """Whether one sign at least should be steered."""
        return any(self.signs.values())

    def to_dict(self) -> dict[str, Any]:
        """`steer`, `signs` and `reasons` as JSON can say them: None for what is not defined."""
        signs = {sign: found and found.to_dict() for sign, found in self.signs.items()}
        return {"steer": self.steer, "signs": signs, "reasons": list(self.reasons)}

    def __str__(self) -> str:
        said = [found.sentence(self.unit) for found in self.signs.values() if found]
        return "\n".join([*(said or ["do not steer"]), *self.reasons])

    def _repr_html_(self) -> str:
        names = ["coefficient", "share_of_boundary", "effect", "effect_ci_low", "effect_ci_high"]
        names += ["p_value", "degradation_nats"]
        table = self.table[["sign", "layer", "verdict", *names]]
        return fragment(
            ["steer" if self.steer else "do not steer"],
            table.rename(columns=lambda name: name.replace("_", " ")),
            n_labels=3,
            note="; ".join([*self.reasons, "coefficients in residual units"]),
        )


@checked
def recommend(
    model: HookedModel,
    pairs: Any,
    *,
    items: Any = None,
    group: str = "group",
    layers: Layers = "all",
    budget: str = "kl=0.1",
    prompts: Sequence[Prompt] | None = None,
    seed: Whole = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Recommendation:
    """Which layer and which coefficient of each sign, or "do not steer", and why.

    The groups of the pairs are parted: the mean difference of every layer is fitted on a half, the
    layer and coefficient are chosen on a quarter, and the last quarter, with held-out items,
    confirms them. The layer is that of the largest effect, to first order, at the damage that the
    budget allows, times how far the groups agree (`measure.label_flips`). The coefficient is the
    one with the largest effect among 20, 40, 60 and 80% of the boundary on the model's own text. A
    sign is to be steered where the sides are apart on held-out pairs, the 95% interval of its
    effect over groups is off 0, fewer than 1 in 20 directions with the labels of groups flipped do
    as much, and the effect is large enough to matter: a tenth of the standard deviation of what is
    steered, unsteered.

    Args:
        pairs: ContrastivePairs, or what their `load` takes: a file, a frame, a list of tuples.
        items: PreferenceItems, or what their `load` takes; half of the groups choose, half confirm.
            The effect is then that on the preference gap. Default: what the model writes decides,
            by how much likelier it is after the pairs' positive prompts than after their negative
            ones (nats per token, the unsteered model); directions of flipped labels are run. Of a
            shipped dataset given by name its own items.
        group: As of `ContrastivePairs.load`, where it is called.
        layers: Where to look (see `resolve_hooks`).
        budget: The damage that is allowed (see `Budget`), but for rollouts.
        prompts: At least 4, after which the model writes: the first half to choose, the second
            to confirm, the first 10 of each. Default: 10 of the shipped open questions each.
        seed: Of the parts, flips and resamples (0).
        batch_size: Prompts a forward pass. Default: what the device can use.
        progress: Told of the steps. Default: bars in a terminal or a notebook.
        checkpoint: As of `Study`.

    Raises:
        InputError: Two lists without pairs, a rollout budget, fewer than 4 prompts; without items,
            pairs that do not change what the model writes. Too few groups are a reason, no error.
        HookError: `layers` names no hook of the model.

    Examples:
        >>> recommended = sl.measure.recommend(model, pairs)
        >>> recommended.steer, recommended.reasons[0][:50]
        (False, 'too few groups of pairs: 8, and 16 are needed (8 t')
    """
    if items is None and isinstance(pairs, str) and pairs in dataset_names():
        items = pairs
    if not isinstance(pairs, ContrastivePairs):
        pairs = ContrastivePairs.load(pairs, group=group)
    if items is not None and not isinstance(items, PreferenceItems):
        items = PreferenceItems.load(items)
    pairs.check_paired("a recommendation is")
    allowed = check_search(budget=budget)
    if allowed.kind.startswith("rollout"):
        raise InputError(f"the budget {allowed} cannot be predicted; take kl=0.1 or another")
    data = {"pairs": pairs} | ({} if items is None else {"items": items})
    reasons = tuple(filter(None, (few_groups(of, noun) for noun, of in data.items())))
    about = {
        "settings": {"budget": str(allowed), "on": "own", "seed": seed, "own_tokens": OWN_TOKENS},
        "pairs": pairs.name,
        "items": None if items is None else items.name,
        "model": provenance(model).to_dict(),
    }
    if reasons:
        return _refused(reasons, about)
    engine = Engine(model, batch_size, progress=by_default(progress), checkpoint=checkpoint)
    parts, written = Parts.of(pairs, items, seed), open_prompts(model, prompts)
    hook_names = resolve_hooks(model, layers)
    return _recommended(engine, parts, written, hook_names, allowed, seed, about)


def _recommended(
    engine: Engine,
    parts: Parts,
    prompts: tuple[Prompts, Prompts],
    hook_names: Sequence[str],
    budget: Budget,
    seed: int,
    about: Mapping[str, Any],
) -> Recommendation:
    """Fit, choose, confirm; nothing but the last is done with what confirms."""
    steps = (engine.under(f"step {i} of 8") for i in range(1, 9))
    differences = collect_differences(
        *(engine.model, parts.fit),
        layers=list(hook_names),
        batch_size=engine.batch_size,
        progress=next(steps).progress,
    )
    directions = fit_directions(differences, seed=seed)
    choosing, confirming = _outcomes(engine, parts, prompts)
    own, own_confirming = (
        with_labels(engine.model, some, "own", own_tokens=OWN_TOKENS) for some in prompts
    )
    text = OwnText(replace(engine, progress=silent), own, budget, seed)
    linear = linearise(
        *(next(steps), choosing.sides, own, hook_names),
        budget=budget,
        allowance=text.allowance,
        seed=seed,
    )
    flips = LabelFlips(differences, linear, seed)
    name = flips.hook_name
    job = Job(name, directions[name], (), readout_hook(name, engine.n_layers))
    norm = mean_norms(differences)[name]
    boundaries = text.boundaries(next(steps), job, SEARCH_RANGE * norm)
    about = {
        **about,
        "text": fingerprint(own),
        "fitted_on": parts.fit.fingerprint,
        "chosen_on": parts.choose.fingerprint,
        "measured_on": parts.confirm.fingerprint,
        "n_pairs": [len(pairs) for pairs in (parts.fit, parts.choose, parts.confirm)],
        "unit": confirming.unit,
    }
    candidates = _candidates(flips, differences, about)
    if not candidates.weighted_effect.max() > 0:
        reason = "no layer has an effect on what chooses, to first order, within the budget"
        return _refused((reason,), about, candidates)
    if any(map(math.isnan, boundaries.values())):
        reason = f"the search for the boundary at layer {hook_layer(name)} did not settle"
        return _refused((f"{reason}; try another budget or seed",), about, candidates)
    coefficients = choose_coefficients(next(steps), choosing, job, boundaries)
    job = replace(job, coefficients=tuple(coefficients.values()))
    step = next(steps)
    unsteered, (changes,) = confirming.changes(step, [job])
    (costs,) = damages(step, own_confirming, [job])
    p_values, ranked = _ranked(next(steps), flips, confirming, seed)
    separated: dict[str, Any] = separation(next(steps), parts.confirm, directions, name, seed)
    results = {
        sign: SignResult(
            sign=sign,
            hook_name=name,
            layer=hook_layer(name),
            boundary=direction * boundaries[sign],
            coefficient=coefficients[sign],
            share_of_boundary=abs(coefficients[sign]) / boundaries[sign],
            share_of_norm=abs(coefficients[sign]) / norm,
            **effect_of(changes[i], confirming.groups, seed),
            needed_effect=MARGIN * float(np.nanstd(unsteered, ddof=1)),
            p_value=p_values[sign],
            **ranked,
            **separated,
            degradation_nats=costs[i].degradation,
            kl_nats=costs[i].kl,
        )
        for i, (sign, direction) in enumerate(SIGNS.items())
    }
    vector = SteeringVector.from_directions(
        engine.model, directions, layers=[name], dataset=parts.fit.name
    )
    positive, negative = (torch.tensor([results[sign].boundary]) for sign in SIGNS)
    known = Calibration(torch.tensor([norm]), negative, positive, str(budget), "own text")
    refused = {sign: found.reasons(confirming.unit, str(budget)) for sign, found in results.items()}
    rows = [{**asdict(of), "verdict": verdict_of(refused[sign])} for sign, of in results.items()]
    shown = [(of.coefficient / 2, of.coefficient, BEYOND * of.boundary) for of in results.values()]
    texts = _texts(next(steps), prompts[1][:N_SHOWN], job, sorted({0.0, *chain(*shown)}))
    # What was run but for fitting and writing, in forward passes of what confirms.
    one = engine.n_layers * sum(map(len, confirming.prompts))
    about |= {"forward_equivalents": round(engine.cost.blocks / one, 3)}
    told = {sign: told_of(refused[sign], results[sign].sentence(confirming.unit)) for sign in SIGNS}
    return Recommendation(
        signs={sign: None if refused[sign] else found for sign, found in results.items()},
        reasons=tuple(chain(*refused.values())),
        vector=None if all(refused.values()) else replace(vector, calibration=known),
        table=to_frame(rows, "recommendation", {**about, "told": told}),
        candidates=candidates,
        texts=to_frame(texts, "generations", about),
        unit=confirming.unit,
    )


def told_of(reasons: Sequence[str], sentence: str = "") -> dict[str, Any]:
    """What a report says of a sign: why not, or what to do."""
    return {"steer": not reasons, "sentences": list(reasons) or [sentence]}


def _outcomes(
    engine: Engine, parts: Parts, prompts: tuple[Prompts, Prompts]
) -> tuple[Preference, Preference | Behaviour]:
    """What chooses, and what confirms."""
    if parts.items is not None:
        choose, confirm = parts.items
        return Preference.of_items(engine, choose), Preference.of_items(engine, confirm)
    choosing = Preference.of_own(engine, parts.choose, prompts[0])
    scorer = Concept(engine.model, parts.confirm, batch_size=engine.batch_size)
    return choosing, Behaviour(prompts[1], scorer)


def _ranked(
    engine: Engine, flips: LabelFlips, confirming: Preference | Behaviour, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """p-values: of items to first order where that is right, else of flips that are run."""
    if isinstance(confirming, Behaviour):
        return rank_among_flips(flips, lambda jobs: confirming.changes(engine, jobs)[1], engine)
    gaps = gap_gradients(engine, confirming.sides, flips.choosing.hook_names, seed=seed)
    linear = replace(flips.choosing, gaps=gaps)
    rows = one_of_each_in_turn(confirming.groups, N_CHECKED)
    some = confirming.at(rows)
    return rank_among_flips(
        flips,
        lambda jobs: some.changes(engine, jobs)[1],
        engine,
        linear=linear,
        checked=replace(linear, gaps=gaps[:, rows]),
    )


def _candidates(
    flips: LabelFlips, differences: Differences, about: Mapping[str, Any]
) -> pd.DataFrame:
    """What the choice of a layer saw (columns `candidates`)."""
    norms, linear = mean_norms(differences), flips.choosing
    at_hooks = ((name, *flips.at(name)) for name in flips.choosing.hook_names)  # one after another
    rows = [
        {
            "hook_name": name,
            "layer": hook_layer(name),
            "resid_norm": norms[name],
            "predicted_boundary": float(linear.coefficients(name, units[:1])[0]),
            "predicted_effect": float(linear.effects(name, units[:1]).mean()),
            "agreement": float(agreement[0]),
            "weighted_effect": weighted_effect,
            "is_chosen": name == flips.hook_name,
        }
        for (name, units, agreement), weighted_effect in zip(
            at_hooks, flips.weighted(linear)[:, 0].tolist(), strict=True
        )
    ]
    return to_frame(rows, "candidates", about)


def _texts(engine: Engine, prompts: Prompts, job: Job, coefficients: Sequence[float]) -> list[Row]:
    """What is written after each of the prompts at each coefficient."""
    texts = generate_texts(
        engine.model,
        prompts,
        {job.hook_name: job.direction},
        coefficients,
        max_new_tokens=NEW_TOKENS,
        batch_size=engine.batch_size,
        progress=engine.progress,
    )
    return [
        {
            "prompt": prompts[text.prompt].where,
            "hook_name": job.hook_name,
            "layer": hook_layer(job.hook_name),
            "coefficient": float(text.coefficient),
            "text": decoded(engine.model, text.ids),
            "n_tokens": len(text.ids),
            "end": "stop" if text.ended else "length",
        }
        for text in texts
    ]


def _refused(
    reasons: tuple[str, ...], about: Mapping[str, Any], candidates: pd.DataFrame | None = None
) -> Recommendation:
    """Before anything was measured of a sign."""
    about = {**about, "told": {sign: told_of(reasons) for sign in SIGNS}}
    return Recommendation(
        signs=dict.fromkeys(SIGNS),
        reasons=reasons,
        vector=None,
        table=to_frame([], "recommendation", about),
        candidates=to_frame([], "candidates", about) if candidates is None else candidates,
        texts=to_frame([], "generations", about),
    )
