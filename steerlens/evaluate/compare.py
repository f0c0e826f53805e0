"""Methods against each other at equal damage, on held-out items, with a null band."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.boundary import check_search
from steerlens.data import ContrastivePairs, Message, neutral_texts
from steerlens.directions import Directions
from steerlens.errors import PairError, SweepError
from steerlens.evaluate.effects import Damage, mean_distinct_3, of_one_length, tokenize_items
from steerlens.evaluate.runner import CompareSettings, Measured, Progress, Runner
from steerlens.hooks import Layers, hook_layer
from steerlens.items import PreferenceItem, PreferenceItems
from steerlens.measures import whole, whole_or_none
from steerlens.methods import fit_methods, method_of, null_directions
from steerlens.models import HookedModel, provenance
from steerlens.plain import Cost
from steerlens.tables import COMPARISON_COLUMNS, SUMMARY_COLUMNS, Row, to_frame
from steerlens.tokens import SteeredPositions, fingerprint, tokenize_pairs, tokenize_prompt
from steerlens.uncertainty import (
    bootstrap_interval,
    false_discovery,
    holm,
    null_band,
    percentile_interval,
    resampled_counts,
)

LEVEL = 0.05
"""A claim's largest corrected p-value."""
N_GENERATED = 4
"""Most items whose prompts, of one length, are continued greedily for `distinct_3`."""
PROMPT = "prompt"
"""The method's name of the baseline: the positive persona written into the prompt."""


@dataclass(frozen=True)
class Comparison:
    """`table` has one row a method and layer (`COMPARISON_COLUMNS`), `summary` one a method.

    `summary` (`SUMMARY_COLUMNS`) holds each method at the layer chosen on training items, best
    first; it is empty when there are none. `effects` are the effects item by item, one row an item
    and one column a row of `table` ("method @ hook name"). The tables carry settings, model
    provenance, fingerprints and `forward_equivalents` (of the held-out items, both continuations)
    in their attrs.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    effects: pd.DataFrame = field(repr=False)
    directions: Mapping[str, Directions] = field(repr=False)
    settings: CompareSettings


def compare(
    model: HookedModel,
    pairs: ContrastivePairs,
    items: PreferenceItems,
    *,
    methods: Sequence[str],
    layers: Layers,
    train_items: PreferenceItems | None = None,
    off_target: Mapping[str, PreferenceItems] | None = None,
    budget: str = "kl=0.1",
    on: str = "neutral",
    neutral: Sequence[str] | None = None,
    n_null: int = 20,
    steered_positions: SteeredPositions = "all",
    position: int | None = None,
    search_range: float | int = 4.0,
    n_bootstrap: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare methods at equal damage: fitted on `pairs`, measured on held-out `items`.

    Every direction's coefficient (residual units, positive) is the one at which the `budget` (see
    `Budget`) is spent on the first half of the `neutral` texts (shipped lines by default), or, with
    `on="positive"`, on the pairs' positive prompts: its coherence boundary there. The effect is the
    mean change of the preference gap, `logprob(positive continuation) - logprob(negative one)`
    (nats per token), with a 95% bootstrap interval over items; damage is measured on the second
    half of the neutral texts. The gap is also measured at -1, -1/2, 0 and 1/2 times the
    coefficient, for slope, Spearman correlation and monotone share of every item.

    `n_null` random and as many shuffled vectors at every hook, each at its own coefficient for the
    same budget, give the null band and p-value (`null_band`); `p_holm` corrects over the layers of
    a method, `q_value` over all rows. A row is an "effect" ("reversed" when negative) only outside
    the band and with `p_holm` below 0.05. The layer is chosen by the effect on `train_items`, never
    on `items`. `off_target` are items of other concepts. The baseline "prompt" writes the pairs'
    positive system messages into the items' prompts, where both are chats.

    Raises `DirectionError` on an unknown method, `SweepError` on a budget, number or set of texts
    that cannot be used, `PairError` when training and held-out items share a prompt, and as
    `collect_differences`, `loss_gradients` and `fit_directions` do.
    """
    settings = CompareSettings(
        methods=tuple(dict.fromkeys(methods)),
        budget=str(check_search(budget=budget, search_range=search_range)),
        on=on,
        n_null=whole("n_null", n_null, 2),
        steered_positions=steered_positions,
        search_range=float(search_range),
        n_bootstrap=whole("n_bootstrap", n_bootstrap, 2),
        seed=whole("seed", seed, 0),
        batch_size=whole_or_none("batch_size", batch_size, 1),
    )
    _check(settings, items, train_items)
    texts = tuple(
        tokenize_prompt(model, text, where=f"neutral text {i}")
        for i, text in enumerate(neutral_texts() if neutral is None else neutral, start=1)
    )
    if len(texts) < 4:
        raise SweepError(f"expected at least 4 neutral texts, got {len(texts)}")
    half = len(texts) // 2

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    say(f"fitting {len(settings.methods)} methods")
    fitted, differences = fit_methods(
        model,
        pairs,
        settings.methods,
        layers=layers,
        position=position,
        items=train_items,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    nulls = null_directions(differences, n=n_null, seed=seed)
    hook_names = differences.hook_names
    subjects = [
        *((name, of) for name, of in fitted.items()),
        *((kind, of) for kind, some in nulls.items() for of in some),
    ]
    run = Runner(model, settings, Cost())
    calibration = tokenize_pairs(model, pairs).positive if on == "positive" else texts[:half]
    reached = run.calibrate(calibration, hook_names, subjects, differences, say)
    n_methods = len(fitted)
    say(f"effects on {len(items)} items")
    effects = run.effects(items, hook_names, subjects, reached, n_methods)
    say("damage on neutral text")
    spent = run.damages(texts[half:], hook_names, subjects[:n_methods], reached)
    rows: list[Row] = []
    by_item: dict[str, NDArray[np.float64]] = {}
    on_train, *elsewhere = [
        {}
        if others is None
        else run.mean_effects(others, hook_names, subjects[:n_methods], reached)
        for others in (train_items, *(off_target or {}).values())
    ]
    prompts = of_one_length(tokenize_items(model, items)[0], N_GENERATED)
    for name, hook_name in ((name, hook) for name in fitted for hook in hook_names):
        index = list(fitted).index(name), hook_name
        measured = effects[index]
        row: dict[str, Any] = {
            "method": name,
            "hook_name": hook_name,
            "layer": hook_layer(hook_name),
            "coefficient": reached[index],
            "n_items": len(items),
            "train_effect": on_train.get(index, math.nan),
            "is_chosen": False,
            "verdict": "budget not reached",
        }
        if measured is not None:
            say(f"{name} at {hook_name}")
            null = [
                np.array(
                    [
                        float(found.at_full.mean())
                        for i in range(n_methods, len(subjects))
                        if subjects[i][0] == kind and (found := effects[i, hook_name]) is not None
                    ]
                )
                for kind in nulls
            ]
            by_item[f"{name} @ {hook_name}"] = measured.at_full
            directions = {hook_name: fitted[name][hook_name]}
            row |= effect_columns(measured, null, settings)
            row |= _damage_columns(spent[index])
            row["off_target"] = _mean_abs([some.get(index, math.nan) for some in elsewhere])
            row["distinct_3"] = mean_distinct_3(model, prompts, directions, reached[index])
        rows.append(row)
    rows = with_verdicts(rows)
    told = _with_persona(pairs, items)
    if told is not None:
        say("the persona written into the prompt")
        change = run.gap(told) - run.gap(items)
        by_item[PROMPT] = change
        rows.append(_prompt_row(change, settings))
    one = sum(map(len, (*tokenize_items(model, items)[0], *tokenize_items(model, items)[1])))
    attrs = {
        "settings": asdict(settings),
        "positions": {name: of.position for name, of in fitted.items()},
        "fitted_on": pairs.fingerprint,
        "measured_on": items.fingerprint,
        "chosen_on": None if train_items is None else train_items.fingerprint,
        "off_target": {name: of.fingerprint for name, of in (off_target or {}).items()},
        "neutral": fingerprint(texts),
        "model": provenance(model).to_dict(),
        "forward_equivalents": round(run.cost.blocks / (one * int(model.cfg.n_layers)), 3),
    }
    effects_by_item = pd.DataFrame({"id": [item.id for item in items], **by_item})
    effects_by_item.attrs.update(attrs)
    table = to_frame(rows, COMPARISON_COLUMNS, attrs)
    return Comparison(
        table, summarise(table, effects_by_item, settings), effects_by_item, fitted, settings
    )


def summarise(
    table: pd.DataFrame, effects: pd.DataFrame, settings: CompareSettings
) -> pd.DataFrame:
    """Every method at its chosen layer, and the prompt baseline, best first (`SUMMARY_COLUMNS`).

    Ranks are resampled over items, all methods on the same ones.
    """
    attrs = {str(name): value for name, value in table.attrs.items()}
    chosen = table[table.is_chosen | (table.method == PROMPT)]
    if not table.is_chosen.any():
        return to_frame([], SUMMARY_COLUMNS, attrs)
    rows = chosen.sort_values("effect", ascending=False, kind="stable").to_dict("records")
    names = [PROMPT if r["method"] == PROMPT else f"{r['method']} @ {r['hook_name']}" for r in rows]
    values = np.stack([effects[name].to_numpy(dtype=np.float64) for name in names], axis=1)
    counts = resampled_counts(len(values), n_resamples=settings.n_bootstrap, seed=settings.seed)
    means = counts @ values / counts.sum(axis=1, keepdims=True)
    ranks = (-means).argsort(axis=1, kind="stable").argsort(axis=1) + 1
    kept = (
        "method",
        "layer",
        "coefficient",
        "effect",
        "effect_ci_low",
        "effect_ci_high",
        "verdict",
    )
    summary = []
    for i, row in enumerate(rows):
        low, high = percentile_interval(ranks[:, i].astype(np.float64))
        summary.append(
            {
                **{name: row[name] for name in kept},
                "rank": i + 1,
                "rank_low": int(low),
                "rank_high": int(high),
            }
        )
    return to_frame(summary, SUMMARY_COLUMNS, attrs)


def _check(
    settings: CompareSettings, items: PreferenceItems, train_items: PreferenceItems | None
) -> None:
    if not settings.methods:
        raise SweepError("expected at least one method, got none")
    for name in settings.methods:
        method_of(name)
    if settings.on not in ("neutral", "positive"):
        raise SweepError(f"on is neutral or positive, not {settings.on!r}")
    if settings.steered_positions not in get_args(SteeredPositions):
        raise SweepError(
            f"steered positions are {get_args(SteeredPositions)}, "
            f"not {settings.steered_positions!r}"
        )
    shared = {item.prompt for item in items} & {item.prompt for item in train_items or ()}
    if shared:
        raise PairError(
            f"{len(shared)} prompts are both in the training and in the held-out items, so the "
            "layer would be chosen on the test data; take them out of one"
        )


def effect_columns(
    measured: Measured, nulls: Sequence[Float[np.ndarray, " null"]], settings: CompareSettings
) -> Row:
    """Effect, its interval and null band, and the dose-response, of one method at one hook."""
    effect = float(measured.at_full.mean())
    low, high = bootstrap_interval(
        measured.at_full, n_resamples=settings.n_bootstrap, seed=settings.seed
    )
    band = null_band(effect, nulls)
    doses = np.append(measured.coefficients, 0.0)
    order = doses.argsort()
    curves = np.vstack([measured.changes, np.zeros_like(measured.changes[:1])])[order]
    doses = doses[order]
    centred = doses - doses.mean()
    slopes = centred @ curves / (centred @ centred)
    return {
        "effect": effect,
        "effect_ci_low": low,
        "effect_ci_high": high,
        "null_low": band.low,
        "null_high": band.high,
        "p_value": band.p_value,
        "slope": float(slopes.mean()),
        "anti_steerable": float((slopes < 0).mean()),
        "spearman": float(np.mean([_spearman(doses, curve) for curve in curves.T])),
        "monotone": float((np.diff(curves, axis=0) > 0).all(axis=0).mean()),
    }


def _spearman(doses: NDArray[np.float64], curve: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    if np.ptp(curve) == 0:
        return math.nan
    return float(spearmanr(doses, curve).statistic)


def _damage_columns(spent: Damage) -> Row:
    return {
        "kl_nats": spent.kl,
        "kl_p95_nats": spent.kl_p95,
        "degradation_nats": spent.degradation,
    }


def _mean_abs(values: Sequence[float]) -> float:
    return float(np.mean(np.abs(values))) if values else math.nan


def with_verdicts(rows: Sequence[Row]) -> list[Row]:
    """The rows with corrected p-values, the chosen layer of each method, and a verdict."""
    p_values = np.array([float(row.get("p_value", math.nan)) for row in rows])
    q_values, corrected = false_discovery(p_values), np.full_like(p_values, math.nan)
    is_chosen = np.zeros(len(rows), dtype=bool)
    for method in dict.fromkeys(row["method"] for row in rows):
        of = np.array([i for i, row in enumerate(rows) if row["method"] == method])
        corrected[of] = holm(p_values[of])
        on_train = np.array([float(rows[i]["train_effect"]) for i in of])
        if not np.isnan(on_train).all():
            is_chosen[of[int(np.nanargmax(on_train))]] = True
    found: list[Row] = []
    for i, row in enumerate(rows):
        done = {
            **row,
            "p_holm": float(corrected[i]),
            "q_value": float(q_values[i]),
            "is_chosen": bool(is_chosen[i]),
        }
        found.append({**done, "verdict": _verdict(done)})
    return found


def _verdict(row: Row) -> str:
    if "effect" not in row:
        return str(row["verdict"])
    is_inside = row["null_low"] <= row["effect"] <= row["null_high"]
    if is_inside or not row["p_holm"] < LEVEL:
        return "no effect shown"
    return "effect" if row["effect"] > 0 else "reversed"


def _with_persona(pairs: ContrastivePairs, items: PreferenceItems) -> PreferenceItems | None:
    """The items with the positive personas in turn as system messages; None without any."""
    firsts = [pair.positive[0] for pair in pairs if not isinstance(pair.positive, str)]
    personas = list(dict.fromkeys(first.content for first in firsts if first.role == "system"))
    if not personas:
        return None
    told: list[PreferenceItem] = []
    for i, item in enumerate(items):
        if isinstance(item.prompt, str) or item.prompt[0].role == "system":
            return None
        persona = Message("system", personas[i % len(personas)])
        told.append(replace(item, prompt=(persona, *item.prompt)))
    return PreferenceItems(tuple(told), f"{items.name}, told")


def _prompt_row(change: NDArray[np.float64], settings: CompareSettings) -> Row:
    low, high = bootstrap_interval(change, n_resamples=settings.n_bootstrap, seed=settings.seed)
    return {
        "method": PROMPT,
        "hook_name": "none",
        "layer": -1,
        "n_items": len(change),
        "effect": float(change.mean()),
        "effect_ci_low": low,
        "effect_ci_high": high,
        "is_chosen": False,
        "verdict": "baseline",
    }
