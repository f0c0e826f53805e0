"""The coherence boundary: how far one may push along a direction before predictions break."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from steerlens.data.pairs import ContrastivePairs, neutral_texts, read_texts
from steerlens.directions.directions import Directions
from steerlens.engine.batches import make_batches
from steerlens.engine.cells import Job
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import Plan, make_plan, plan_for, run_cells
from steerlens.engine.tokenization import (
    SteeredPositions,
    TokenizedPairs,
    TokenizedPrompt,
    check_steered_positions,
    fingerprint,
    tokenize_pairs,
    tokenize_prompt,
)
from steerlens.engine.workload import Baseline, Cost, Workload, make_workload
from steerlens.errors import InputError, finite, whole, whole_or_none
from steerlens.loss import Budget
from steerlens.measure.coherence import Push, check_rollouts
from steerlens.measure.pushes import Boundary, expect, find_boundaries
from steerlens.measure.rows import N_BOOTSTRAP, check_directions, check_width, layer_row, record
from steerlens.models.hooks import Layers, readout_hook, resolve_hooks
from steerlens.models.loading import HookedModel
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, part_of, silent
from steerlens.tables import (
    BOUNDARY_COLUMNS,
    LAYER_COLUMNS,
    Row,
    fragment,
    hook_label,
    measured,
    shortened,
    to_frame,
)

On = Literal["positive", "negative", "neutral"] | Path | Sequence[str]
"""The text a boundary is measured on: a side of the pairs, the shipped neutral lines, the lines of
a file, or texts of one's own."""


@dataclass(frozen=True)
class BoundarySettings:
    """Everything besides model, pairs and directions that decides a boundary's numbers."""

    hook_names: tuple[str, ...]
    on: str
    budget: str
    position: int
    steered_positions: SteeredPositions
    search_range: float
    n_bootstrap: int
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class BoundaryResult:
    """`layers` has one row a hook (`LAYER_COLUMNS`), `curves` one an evaluation of the search.

    The columns of `curves` are `BOUNDARY_COLUMNS`. Both tables carry in their `attrs` the settings,
    provenance, fingerprints (`text` is that of the token ids measured on), how far each hook was
    searched (`searched`), and the `forward_equivalents` spent.
    """

    layers: pd.DataFrame
    curves: pd.DataFrame
    directions: Directions
    settings: BoundarySettings

    def __repr__(self) -> str:
        return f"BoundaryResult({len(self.layers)} hooks, {shortened(self.settings.budget)})"

    def _repr_html_(self) -> str:
        layers = self.layers.reset_index(drop=True)
        table = pd.DataFrame({"layer": [hook_label(name) for name in layers.hook_name]})
        for sign in ("neg", "pos"):
            name = f"boundary_{sign}"
            table[f"boundary {sign}"] = layers[name]
            low, high = layers[f"{name}_ci_low"], layers[f"{name}_ci_high"]
            table[f"{sign} 95%"] = [f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True)]
            table[f"{sign} predicted"] = layers[f"predicted_{name}"]
        table["resid norm"] = layers.resid_norm
        table["projection there"] = layers.projection_at_boundary
        return fragment(
            [repr(self), *measured(layers.attrs)], table, note="residual units; inf is not reached"
        )


def find_boundary(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers | None = None,
    on: On = "positive",
    budget: str = "relative=0.01",
    steered_positions: SteeredPositions = "all",
    search_range: float | int = 4.0,
    n_bootstrap: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> BoundaryResult:
    """The first coefficient of each sign beyond which the model exceeds its budget, at every hook.

    The boundary is where the loss first exceeds the `budget` (see `Budget`), outward from 0, in
    residual units, when `coefficient * direction` is added to the text `on` (see `On`). It is
    searched up to `search_range` times the mean norm of the pairs' activations there; beyond that
    it is inf (-inf for the negative sign). A later coefficient that was seen to be within the
    budget again is in `reentry_*`.

    One forward and two backward passes predict all boundaries; the search starts there, evaluates
    all hooks and both signs in batched runs, mostly on the quarter of the prompts whose slopes at 0
    are most like those of all (the probes), and in the end on all prompts within 15% of the
    boundary. Intervals are 95% percentile bootstrap intervals over prompts of the same estimate,
    the baseline and the slope resampled too; as a resample is not searched again, their ends are
    right to about a fifth. `projection_at_boundary` is the projection of the cell at
    `boundary_pos`, on a line through c = 0 and the coefficient measured nearest to the boundary.
    An `executor` runs the evaluations as in `sweep`, but for those of a rollout budget.

    Raises `InputError` on a bad budget, range or number of resamples, on a text of a single token,
    and where a rollout budget meets steered positions other than "all"; `InputError` when a
    hook or its readout has no direction; `InputError` when they were fitted on a model with
    other weight processing; and as `tokenize_pairs`, `run_baseline` and, for rollouts,
    `check_rollouts` do.

    Examples:
        >>> found = sl.find_boundary(model, pairs, directions, layers=[1, 2], budget="kl=0.1")
        >>> found
        BoundaryResult(2 hooks, kl=0.1)
        >>> bool((found.layers.boundary_neg < 0).all() and (found.layers.boundary_pos > 0).all())
        True
    """
    hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
    readouts = {name: readout_hook(name, int(model.cfg.n_layers)) for name in hook_names}
    check_directions(directions, [*hook_names, *readouts.values()])
    check_processing(model, directions)
    settings = checked_settings(
        hook_names=hook_names,
        on=text_name(on),
        budget=budget,
        position=directions.position,
        steered_positions=steered_positions,
        search_range=search_range,
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    tokenized = tokenize_pairs(model, pairs)
    prompts = text_prompts(model, on, tokenized)
    check_text_positions(steered_positions, on, prompts)
    check_rollouts(model, prompts, Budget.parse(budget))
    # One tensor for both signs: they are then run together.
    along = {name: directions[name] for name in hook_names}
    pushes = [
        Push(name, direction, sign, readouts[name])
        for name, direction in along.items()
        for sign in (1, -1)
    ]
    cost = Cost()
    tell = progress or silent
    plan = _plan_pairs(model, tokenized, pushes, directions, settings, cost, tell, executor)
    baseline, workload = plan.prepared.unsteered, plan.prepared.workload
    draws = {"n_bootstrap": settings.n_bootstrap, "seed": settings.seed}
    rows = {name: layer_row(name, baseline, directions[name], **draws) for name in hook_names}
    limits = [settings.search_range * rows[push.hook_name]["resid_norm"] for push in pushes]
    text, unsteered = replace(workload, negative=()), baseline
    if on != "positive":
        text, unsteered = text_workload(
            model,
            prompts,
            workload,
            baseline.hook_names,
            batch_size=batch_size,
            cost=cost,
            progress=tell,
        )
    found = find_boundaries(
        plan_for(plan, text, replace(unsteered, negative=unsteered.negative[:, :0]), cost=cost),
        prompts,
        pushes,
        limits,
        budget=Budget.parse(settings.budget),
        n_bootstrap=settings.n_bootstrap,
        seed=settings.seed,
        cost=cost,
        progress=progress,
    )
    is_positive = isinstance(on, str) and on == "positive"
    projections = _projections(
        plan, directions, found[::2], cost, reads_positive=is_positive, progress=tell
    )
    table = [
        {**rows[up.push.hook_name], **_columns(up, down), **there, "boundary_on": settings.on}
        for up, down, there in zip(found[::2], found[1::2], projections, strict=True)
    ]
    attrs = {
        **record(model, pairs, directions, asdict(settings), workload=workload, cost=cost),
        "searched": {push.hook_name: limit for push, limit in zip(pushes, limits, strict=True)},
        "text": fingerprint(prompts),
    }
    return BoundaryResult(
        layers=to_frame(table, LAYER_COLUMNS, attrs),
        curves=to_frame([row for line in found for row in line.rows()], BOUNDARY_COLUMNS, attrs),
        directions=directions,
        settings=settings,
    )


def predict_boundary(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layers: Layers | None = None,
    on: On = "positive",
    budget: str = "relative=0.01",
    steered_positions: SteeredPositions = "all",
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The per-layer table with the predicted boundaries alone, from two backward passes.

    The predictions of `find_boundary`, without its search: nothing is steered, and the measured
    columns stay NaN. Expect them to be too small in the first layers. Raises `InputError` on a bad
    budget or text, and otherwise as `find_boundary`.

    Examples:
        >>> table = sl.predict_boundary(model, pairs, directions, budget="kl=0.1")
        >>> bool((table.predicted_boundary_pos == -table.predicted_boundary_neg).all())  # no slope
        True
    """
    hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
    check_directions(directions, hook_names)
    check_processing(model, directions)
    parsed = check_search(budget=budget, search_range=1.0)
    seed, batch_size = whole("seed", seed, 0), whole_or_none("batch_size", batch_size, 1)
    tokenized = tokenize_pairs(model, pairs)
    prompts = text_prompts(model, on, tokenized)
    check_text_positions(steered_positions, on, prompts)
    workload = make_workload(
        model,
        tokenized,
        position=directions.position,
        steered_positions=steered_positions,
        batch_size=batch_size,
    )
    cost = Cost()
    baseline = run_baseline(model, workload, hook_names, cost=cost, progress=progress)
    check_width(directions, baseline)
    logprob = baseline.logprob
    if on != "positive":
        _, unsteered = text_workload(
            model,
            prompts,
            workload,
            hook_names,
            batch_size=batch_size,
            cost=cost,
            progress=progress,
        )
        logprob = unsteered.logprob
    along = {name: directions[name] for name in hook_names}
    pushes = [Push(name, along[name], sign, name) for name in hook_names for sign in (1, -1)]
    expected = expect(
        model,
        prompts,
        pushes,
        budget=parsed,
        allowance=parsed.allowance(float(logprob.double().mean())),
        steered_positions=steered_positions,
        batch_size=batch_size,
        seed=seed,
        cost=cost,
        progress=progress,
    )
    table = [
        {
            **layer_row(name, baseline, directions[name], n_bootstrap=N_BOOTSTRAP, seed=seed),
            "predicted_boundary_pos": up.predicted,
            "predicted_boundary_neg": -down.predicted,
            "predicted_first_order_pos": up.first_order,
            "predicted_first_order_neg": -down.first_order,
            "boundary_on": text_name(on),
        }
        for name, up, down in zip(hook_names, expected[::2], expected[1::2], strict=True)
    ]
    settings = {
        "hook_names": hook_names,
        "on": text_name(on),
        "budget": str(parsed),
        "steered_positions": steered_positions,
        "seed": seed,
        "batch_size": batch_size,
    }
    attrs = record(model, pairs, directions, settings, workload=workload, cost=cost)
    return to_frame(table, LAYER_COLUMNS, {**attrs, "text": fingerprint(prompts)})


def _plan_pairs(
    model: HookedModel,
    pairs: TokenizedPairs,
    pushes: Sequence[Push],
    directions: Directions,
    settings: BoundarySettings,
    cost: Cost,
    progress: Progress,
    executor: Executor | None,
) -> Plan:
    """The pairs unsteered, at every hook and readout, and the hooks checked."""
    workload = make_workload(
        model,
        pairs,
        position=settings.position,
        steered_positions=settings.steered_positions,
        batch_size=settings.batch_size,
    )
    needed = dict.fromkeys([*settings.hook_names, *(push.readout for push in pushes)])
    baseline = run_baseline(model, workload, tuple(needed), cost=cost, progress=progress)
    check_width(directions, baseline)
    return make_plan(
        model,
        workload,
        baseline,
        check_jobs(pushes),
        batch_size=settings.batch_size,
        cost=cost,
        progress=progress,
        executor=executor,
    )


def check_jobs(pushes: Sequence[Push]) -> list[Job]:
    """A job for every push, to check its hook with: at one residual unit."""
    return [Job(push.hook_name, push.direction, (1.0,), push.readout) for push in pushes]


def text_workload(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    pairs: Workload,
    hook_names: Sequence[str],
    *,
    batch_size: int | None,
    cost: Cost,
    progress: Progress | None = None,
) -> tuple[Workload, Baseline]:
    """Texts as a workload like that of the pairs, read at their last token; and unsteered."""
    text = replace(
        pairs, positive=make_batches(model, prompts, batch_size), negative=(), position=-1
    )
    return text, run_baseline(model, text, hook_names, cost=cost, progress=progress)


def check_search(*, budget: str, search_range: float | int) -> Budget:
    """The budget; or a `InputError` when it leaves no room, or the range is none to search in."""
    parsed = Budget.parse(budget)
    if parsed.value == 0:
        raise InputError(
            f"the budget {parsed} leaves no room: no coefficient is within it; give one above 0"
        )
    if not 1e-6 <= finite("search_range", search_range) <= 1e6:
        raise InputError(
            f"search_range must be from 1e-6 to 1e6 mean residual norms, got {search_range}"
        )
    return parsed


def checked_settings(**given: Any) -> BoundarySettings:
    """The settings, or a `InputError` that says which of them has no meaning."""
    budget = check_search(budget=given["budget"], search_range=given["search_range"])
    numbers = {
        "n_bootstrap": whole("n_bootstrap", given["n_bootstrap"], 2),
        "seed": whole("seed", given["seed"], 0),
        "batch_size": whole_or_none("batch_size", given["batch_size"], 1),
    }
    if budget.kind == "rollout_kl_p95" and given["steered_positions"] != "all":
        raise InputError("rollouts are steered at all positions, so steered_positions must be all")
    return BoundarySettings(
        **{
            **given,
            **numbers,
            "budget": str(budget),
            "search_range": float(given["search_range"]),
        }
    )


def text_name(on: On) -> str:
    """What the tables call the text."""
    if isinstance(on, Path):
        return str(on)
    return on if isinstance(on, str) else "texts"


def check_text_positions(
    positions: SteeredPositions, on: On, prompts: Sequence[TokenizedPrompt]
) -> None:
    """Raise `InputError` where steering there cannot reach a label of the text.

    And as `check_steered_positions` on the positive prompts.
    """
    if on != "positive" and positions in ("continuation", "last"):
        raise InputError(
            f"the text {text_name(on)!r} has no continuations, so steered_positions must be all or "
            f"prompt there, not {positions!r}"
        )
    check_steered_positions(positions, TokenizedPairs(tuple(prompts), ()))


def text_prompts(model: HookedModel, on: On, pairs: TokenizedPairs) -> tuple[TokenizedPrompt, ...]:
    """The prompts that `on` names. Raises `InputError` where there is none, or none with labels."""
    if on == "positive":
        return pairs.positive
    if on == "negative":
        prompts = pairs.negative
    else:
        prompts = tuple(
            tokenize_prompt(model, text, where=f"text {i} of {text_name(on)!r}")
            for i, text in enumerate(_texts(on), start=1)
        )
    short = [prompt for prompt in prompts if len(prompt) < 2]
    if short:
        raise InputError(
            f"{len(short)} texts are a single token, so there is no label whose logprob could be "
            "measured; make them longer"
        )
    return prompts


def _texts(on: On) -> Sequence[str]:
    if on == "neutral":
        return neutral_texts()
    if isinstance(on, Path):
        return read_texts(on)
    if isinstance(on, str):
        raise InputError(
            f"on is 'positive', 'negative', 'neutral', a Path or a list of texts, not {on!r}"
        )
    if not on:
        raise InputError("on holds no texts; give some, or 'positive' or 'negative'")
    return on


def _columns(up: Boundary, down: Boundary) -> Row:
    return {
        "boundary_pos": up.at,
        "boundary_pos_ci_low": up.low,
        "boundary_pos_ci_high": up.high,
        "boundary_neg": -down.at,
        "boundary_neg_ci_low": -down.high,
        "boundary_neg_ci_high": -down.low,
        "predicted_boundary_pos": up.predicted,
        "predicted_boundary_neg": -down.predicted,
        "predicted_first_order_pos": up.first_order,
        "predicted_first_order_neg": -down.first_order,
        "prediction_trusted": up.is_trusted and down.is_trusted,
        "reentry_pos": up.reentry,
        "reentry_neg": -down.reentry,
    }


def _projections(
    plan: Plan,
    directions: Directions,
    outward: Sequence[Boundary],
    cost: Cost,
    *,
    reads_positive: bool,
    progress: Progress,
) -> list[Row]:
    """`projection_at_boundary` of every hook; NaN where the boundary is beyond the range.

    Where the search read the positive prompts, they are not run again.
    """
    workload, baseline = plan.prepared.workload, plan.prepared.unsteered
    finite = {found.push.hook_name: found for found in outward if math.isfinite(found.at)}
    jobs = [
        Job(name, found.push.direction, (found.nearest,), found.push.readout)
        for name, found in finite.items()
    ]
    is_read = reads_positive and all(f.read_at_nearest.numel() for f in finite.values())
    if is_read:
        plan = plan_for(plan, replace(workload, positive=()), baseline, cost=cost)
    rows: dict[str, Row] = {}
    tell = part_of(progress, "projections there: hooks")
    tell("hooks", 0, len(jobs))
    for job, (cell,) in zip(jobs, run_cells(plan, jobs, cost=cost), strict=True):
        found = finite[job.hook_name]
        positive = found.read_at_nearest if is_read else cell.positive
        unsteered = baseline.cell(job.readout)
        unit = directions[job.readout].double()
        before = float(((unsteered.positive - unsteered.negative).double() @ unit).mean())
        after = float(((positive - cell.negative).double() @ unit).mean())
        share = found.at / found.nearest
        rows[job.hook_name] = {"projection_at_boundary": before + share * (after - before)}
        tell("hooks", len(rows), len(jobs))
    return [rows.get(found.push.hook_name, {}) for found in outward]
