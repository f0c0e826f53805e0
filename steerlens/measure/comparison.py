"""Methods against each other at equal damage, on held-out items, ranked among nulls."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import AnyPairs, ContrastivePairs, as_pairs
from steerlens.directions.differences import Differences, collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.fitting import fit_methods
from steerlens.directions.methods import Evidence, method_of, null_directions, null_vectors
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.engine import Engine
from steerlens.engine.labels import OWN_TOKENS
from steerlens.engine.positions import Position, as_position
from steerlens.engine.tokenization import tokenize_items
from steerlens.loss import Budget
from steerlens.measure.boundary import check_search
from steerlens.measure.comparison_inputs import (
    ItemSets,
    Texts,
    check_compared,
    split_texts,
    with_persona,
    with_shared,
)
from steerlens.measure.effects import Damage, damage_columns, mean_distinct_3, of_one_length
from steerlens.measure.equal_damage import (
    CompareSettings,
    Measured,
    Runner,
    Subject,
    make_subjects,
    mean_norms,
)
from steerlens.measure.nulls import N_SCREENED, Screen
from steerlens.measure.prediction import linearise
from steerlens.measure.settings import SEARCH_RANGE
from steerlens.measure.verdicts import (
    PROMPT,
    Inference,
    effect_columns,
    methods_table,
    prompt_row,
    summarise,
    with_verdicts,
)
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, hook_layer
from steerlens.models.identity import provenance
from steerlens.plots.figure import Figure
from steerlens.plots.methods import comparison as draw_comparison
from steerlens.progress import Progress, by_default, part_of, under
from steerlens.stats import N_BOOTSTRAP
from steerlens.tables import Row, fragment, hook_label, measured, shortened, to_frame
from steerlens.validation import Count, Draws, NotNegative, Whole, checked

N_GENERATED = 4
"""Most items whose prompts, of one length, are continued greedily for `distinct_3`."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """`table` has one row a method and layer (columns `comparison`), `summary` one a method.

    `summary` (columns `summary`) holds each method at the layer chosen on training items, best
    first; it is empty when there are none. `methods` (columns `methods`) compares every method with
    `mean_diff` on the same items, at the chosen layers or layer by layer. `effects` are the effects
    item by item, one row an item and one column a row of `table` ("method @ hook name"). The tables
    carry settings, model provenance, fingerprints and `forward_equivalents` (of the held-out items
    with both continuations; fitting and generation are not counted) in their attrs.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    methods: pd.DataFrame
    effects: pd.DataFrame = field(repr=False)
    directions: Mapping[str, Directions] = field(repr=False)
    settings: CompareSettings

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.settings.methods)} methods, {len(self.table)} rows, "
            f"{len(self.effects)} items, {shortened(self.settings.budget)})"
        )

    def plot(self) -> Figure:
        """`plots.comparison` of it."""
        return draw_comparison(self)

    def _repr_html_(self) -> str:
        rows = self.table if self.summary.empty else self.summary
        names = ["coefficient", "effect", "effect_ci_low", "effect_ci_high"]
        names += ["rank"] if "rank" in rows else ["null_low", "null_high", "p_layers"]
        labels = [hook_label(name) for name in rows.hook_name]
        where = "hook" if any("." in label for label in labels) else "layer"
        table = rows.assign(**{where: labels})[["method", where, "verdict", *names]]
        return fragment(
            [repr(self), *measured(self.table.attrs)],
            table.rename(columns=lambda name: name.replace("_", " ")),
            n_labels=3,
            note="effects in nats per token, at equal damage",
        )


@checked
def compare(
    model: HookedModel,
    pairs: AnyPairs,
    items: PreferenceItems,
    *,
    methods: str | Sequence[str],
    layers: Layers,
    train_items: PreferenceItems | None = None,
    off_target: Mapping[str, PreferenceItems] | None = None,
    budget: str = "kl=0.1",
    on: str = "own",
    own_tokens: Count = OWN_TOKENS,
    neutral: Sequence[str] | None = None,
    n_null: Draws = 20,
    margin: NotNegative | None = None,
    position: Position | Sequence[int] | None = None,
    search_range: float | int = SEARCH_RANGE,
    n_bootstrap: Draws = N_BOOTSTRAP,
    seed: Whole = 0,
    batch_size: Count | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Comparison:
    """Compare methods at equal damage: fitted on `pairs`, measured on held-out `items`.

    Every direction's coefficient (residual units, positive) is its coherence boundary on the text
    that the budget is spent on. The effect is the mean change of `logprob(positive continuation) -
    logprob(negative one)` there (nats per token), ranked among vectors that cannot know the labels:
    docs/maths.md, "A comparison". What a verdict means: `measure.verdicts.verdict`.

    Args:
        pairs: Or what `ContrastivePairs.load` reads.
        methods: What to fit with (see `METHODS`).
        layers: Where (see `resolve_hooks`).
        train_items: The layer is chosen by the effect on these, never on `items`; its choice is "in
            sample" for methods trained on continuations, which are trained on these too, and for
            all where some share a prompt or persona with the pairs. Default: no layer is chosen.
        off_target: Items of other concepts, by name. Default: none.
        budget: See `Budget`.
        on: What the budget is spent on: "own", the first half of what the unsteered model writes
            after up to 32 prompts of `train_items`, or else the pairs' positive ones; "neutral",
            the first half of the neutral texts; "positive", the pairs' positive prompts. Damage is
            measured on the second halves of own and neutral text.
        own_tokens: The most tokens that the model writes after each (32).
        neutral: At least 4 texts. Default: the shipped lines.
        n_null: Random and as many shuffled vectors at every hook that are run.
        margin: The effect (nats per token) below which it does not matter, for "equivalent to no
            effect". Default: a tenth of the standard deviation over items of the unsteered gap.
        position: Tokens that are read (see `Position`). Default: that of each method.
        search_range: How far to look for the boundary, as of `Study.boundary`.
        n_bootstrap: As of `Study`, and so are `seed`, `batch_size` and `progress`.
        executor: Its workers run the cells, as of `Study`; directions are fitted here.
        checkpoint: As of `Study`; given the directions of a method, and what is measured of every
            vector at each step.

    Raises:
        InputError: An unknown method, a budget, number or set of texts that cannot be used,
            training and held-out items that share a prompt.
        SteerlensError: As `collect_differences`, `loss_gradients` and `Study`.

    Examples:
        >>> comparison = sl.compare(
        ...     model,
        ...     pairs,
        ...     items,
        ...     methods=["mean_diff", "pca"],
        ...     layers=[1],
        ...     neutral=["the river was so cold", "it was warm", "I felt the rain", "what a night"],
        ...     n_null=2,
        ...     n_bootstrap=50,
        ... )
        >>> comparison.table[["method", "layer"]].to_dict("list")
        {'method': ['mean_diff', 'pca'], 'layer': [1, 1]}
    """
    pairs = as_pairs(pairs)
    settings = CompareSettings(
        methods=tuple(dict.fromkeys([methods] if isinstance(methods, str) else methods)),
        budget=str(check_search(budget=budget, search_range=search_range)),
        on=on,
        own_tokens=own_tokens,
        n_null=n_null,
        margin=None if margin is None else float(margin),
        search_range=float(search_range),
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    sets = ItemSets(items, train_items, off_target or {}, with_persona(pairs, items))
    check_compared(model, settings, sets)
    sets = with_shared(sets, pairs)
    texts = split_texts(model, pairs, sets, settings, neutral)
    pairs.warn_of_groups()
    items.warn_of_groups()
    # Fitting, coefficients, gradients, effects, damage and texts; then what was given beside them.
    n_steps, tell = 5 + len(sets.all()), by_default(progress)
    steps = (under(tell, f"step {i} of {n_steps}") for i in range(1, n_steps + 1))
    engine = Engine(model, settings.batch_size, executor, next(steps), checkpoint=checkpoint)
    position = None if position is None else as_position(position)
    return _compared(engine, settings, pairs, sets, texts, steps, layers, position)


def _compared(
    engine: Engine,
    settings: CompareSettings,
    pairs: ContrastivePairs,
    sets: ItemSets,
    texts: Texts,
    steps: Iterator[Progress],
    layers: Layers,
    position: Position | None,
) -> Comparison:
    """Everything fitted and measured, as tables."""
    shared: dict[str, Any] = {
        "layers": layers,
        "batch_size": engine.batch_size,
        "progress": engine.progress,
    }
    differences = collect_differences(
        engine.model, pairs, position=-1 if position is None else position, **shared
    )
    directions, evidence = fit_methods(
        *(engine.model, pairs, settings.methods),
        differences=differences,
        position=position,
        items=sets.train,
        seed=settings.seed,
        checkpoint=engine.checkpoint,
        **shared,
    )
    nulls = null_directions(differences, n=settings.n_null, seed=settings.seed)
    subjects = make_subjects(differences.hook_names, directions, nulls)
    run = Runner(engine, settings, subjects, mean_norms(differences))
    items, found = sets.held_out, _measure(run, differences, sets, texts, steps)
    spread = float(np.std(found.unsteered, ddof=1))
    inference = Inference(
        settings,
        items.groups,
        fitted_groups=pairs.groups,
        margin=0.1 * spread if settings.margin is None else settings.margin,
    )
    rows, by_item, refits = _rows(run, found, evidence, sets, inference, next(steps))
    if sets.persona is not None:
        progress, n, what = next(steps), 2 * len(items), "persona in the prompt: prompts"
        told, alone = (
            run.gap(of, part_of(progress, what, before=before, total=2 * n))
            for of, before in ((sets.persona, 0), (items, n))
        )
        by_item[PROMPT] = told - alone
        rows.append(prompt_row(by_item[PROMPT], inference))
    attrs = {
        "settings": asdict(settings),
        "positions": {name: fitted.position for name, fitted in directions.items()},
        "fitted_on": pairs.fingerprint,
        "pairs": pairs.name,
        **sets.record(),
        **texts.record(),
        "model": provenance(run.engine.model).to_dict(),
        "margin_nats": inference.margin,
        "null_correlation": found.screen.correlation,
        "forward_equivalents": run.forward_equivalents(items),
    }
    effects = pd.DataFrame({"id": [item.id for item in items], **by_item})
    effects.attrs.update(attrs)
    table = to_frame(rows, "comparison", attrs)
    summary = summarise(table, effects, inference, refits)
    methods = methods_table(table, effects, inference, refits)
    return Comparison(table, summary, methods, effects, directions, settings)


def _measure(
    run: Runner,
    differences: Differences,
    sets: ItemSets,
    texts: Texts,
    steps: Iterator[Progress],
) -> "_Measurements":
    settings = run.settings
    reached, allowance = run.calibrate(texts.calibration, next(steps))
    linear = linearise(
        replace(run.engine, progress=next(steps)),
        sets.held_out,
        texts.calibration,
        differences.hook_names,
        budget=Budget.parse(settings.budget),
        allowance=allowance,
        seed=settings.seed,
    )
    unsteered, effects = run.effects(sets.held_out, reached, next(steps))
    damage = run.damages(texts.damaged, reached, next(steps))
    on_train: Mapping[Subject, float] = {}
    if sets.train is not None:
        on_train = run.mean_effects(sets.train, reached, next(steps))
    elsewhere = [run.mean_effects(s, reached, next(steps)) for s in sets.off_target.values()]
    screen = Screen(
        linear,
        run.of_nulls(effects, differences.hook_names),
        null_vectors(differences, n=max(N_SCREENED, settings.n_null), seed=settings.seed),
    )
    return _Measurements(reached, unsteered, effects, screen, damage, on_train, elsewhere)


@dataclass(frozen=True)
class _Measurements:
    """What was measured of every subject; `elsewhere` on the off-target items."""

    reached: Mapping[Subject, float]
    unsteered: Float[np.ndarray, " item"]
    effects: Mapping[Subject, Measured]
    screen: Screen
    damage: Mapping[Subject, Mapping[str, Sequence[Damage]]]
    on_train: Mapping[Subject, float]
    elsewhere: Sequence[Mapping[Subject, float]]


def _rows(
    run: Runner,
    found: _Measurements,
    evidence: Mapping[str, Evidence],
    sets: ItemSets,
    inference: Inference,
    progress: Progress,
) -> tuple[list[Row], dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """The rows of all methods and hooks with verdicts; effects item by item, and of refits."""
    rows: list[Row] = []
    linear = found.screen.linear
    of_budget = "neutral" if run.settings.on == "neutral" else "own"
    by_item: dict[str, NDArray[np.float64]] = {}
    refits: dict[str, NDArray[np.float64]] = {}
    items = sets.held_out
    distinct = _distinct_3(run, found, items, part_of(progress, "texts: tokens"))
    is_shared = bool(sets.shared.get("n_choosing_items_fitted_on"))
    for name in run.settings.methods:
        in_sample = is_shared or method_of(name).objective in ("promotion", "preference")
        layer_choice = ("in sample" if in_sample else "held out") if found.on_train else "none"
        subjects = [subject for subject in run.methods if subject.name == name]
        measured = {s.hook_name: found.effects[s] for s in subjects if s in found.effects}
        exact = {
            hook_name: float(of_hook.at_full.mean())
            for hook_name, of_hook in measured.items()
            if np.isfinite(of_hook.changes).all()
        }
        among_nulls = found.screen.columns({s.hook_name: s.direction for s in subjects}, exact)
        of_method = found.screen.refits(
            evidence.get(name), name, groups=inference.fitted_groups, seed=run.settings.seed
        )
        refits |= {f"{name} @ {hook_name}": values for hook_name, values in of_method.items()}
        for subject in subjects:
            hook_name, reached = subject.hook_name, found.reached[subject]
            row: dict[str, Any] = {
                "method": name,
                "hook_name": hook_name,
                "layer": hook_layer(hook_name),
                "coefficient": reached,
                "n_items": len(items),
                "n_groups": len(set(inference.groups)),
                "n_null": 0,
                "null_by": "none",
                "interval_over": "none",
                "train_effect": found.on_train.get(subject, math.nan),
                "is_chosen": False,
                "layer_choice": layer_choice,
                "verdict": "search failed" if math.isnan(reached) else "budget not reached",
            }
            if hook_name in measured:
                damage = found.damage[subject]
                elsewhere = [abs(effects[subject]) for effects in found.elsewhere]
                by_item[f"{name} @ {hook_name}"] = measured[hook_name].at_full
                row |= effect_columns(measured[hook_name], inference, of_method.get(hook_name))
                row |= among_nulls.get(hook_name, {})
                row |= damage_columns(damage)
                row |= {
                    "spent_neg": damage[of_budget][1].spent(linear.budget, linear.allowance),
                    "off_target": float(np.mean(elsewhere)) if elsewhere else math.nan,
                    "distinct_3": distinct[subject],
                }
            rows.append(row)
    return with_verdicts(rows, inference), by_item, refits


def _distinct_3(
    run: Runner, found: _Measurements, items: PreferenceItems, progress: Progress
) -> dict[Subject, float]:
    """`mean_distinct_3` of every method that has an effect."""
    prompts = of_one_length(tokenize_items(run.engine.model, items)[0], N_GENERATED)
    subjects = [subject for subject in run.methods if subject in found.effects]
    steered = [({s.hook_name: s.direction}, found.reached[s]) for s in subjects]
    engine = replace(run.engine, progress=progress)
    return dict(zip(subjects, mean_distinct_3(engine, prompts, steered), strict=True))
