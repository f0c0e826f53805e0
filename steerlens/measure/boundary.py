"""The coherence boundary: how far one may push along a direction before predictions break."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from steerlens.directions.directions import Directions
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import Plan, run_cells
from steerlens.engine.tokenization import TokenizedPairs, TokenizedPrompt, fingerprint
from steerlens.engine.workload import Baseline, Workload
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.boundary_search import Boundary, all_round, find_boundaries
from steerlens.measure.coherence import Push, check_rollouts, projected
from steerlens.measure.interventions import in_order, of_vector
from steerlens.measure.prediction import Prediction, predict
from steerlens.measure.preparation import Preparation
from steerlens.measure.settings import (
    SEARCH_RANGE,
    BoundarySettings,
    StudySettings,
    TextSettings,
)
from steerlens.measure.texts import On, check_text_positions, text_name, text_prompts
from steerlens.plots.figure import Figure
from steerlens.plots.layers import boundary as draw_boundary
from steerlens.steering import Add, SteeringVector
from steerlens.tables import Row, fragment, hook_label, measured, shortened, to_frame
from steerlens.validation import Angles, checked


@dataclass(frozen=True, eq=False)
class BoundaryResult:
    """`layers` has one row a hook (columns `layers`), `curves` one an evaluation of the search.

    The columns of `curves` are `boundary`. Both tables carry in their `attrs` the settings,
    provenance, fingerprints (`text` is that of the token ids measured on), how far each hook was
    searched (`searched`), and the `forward_equivalents` spent.
    """

    layers: pd.DataFrame
    curves: pd.DataFrame
    directions: Directions | SteeringVector
    settings: BoundarySettings

    def __repr__(self) -> str:
        return f"BoundaryResult({len(self.layers)} hooks, {shortened(self.settings.budget)})"

    def plot(self) -> Figure:
        """`plots.boundary` of it."""
        return draw_boundary(self)

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
        if layers.projection_at_boundary.notna().any():
            table["projection there"] = layers.projection_at_boundary
        return fragment(
            [repr(self), *measured(layers.attrs)], table, note="residual units; inf is not reached"
        )


def run_boundary(
    study: Preparation,
    *,
    on: On,
    search_range: float | int,
    with_projection: bool,
) -> BoundaryResult:
    """`Study.boundary`."""
    before = study.spent
    study.check_readouts()
    text = Text.of(study, on)
    settings = boundary_settings(study, text, search_range)
    interventions = study.interventions.values()
    is_read = with_projection and on == "positive"
    along = study.read_along if is_read else dict[str, Tensor]()
    pushes = [
        replace(of.push(sign), along=along.get(of.readout))
        for of in interventions
        for sign in of.signs
    ]
    searched = {of.name: of.limit(study.baseline, settings.search_range) for of in interventions}
    rows = study.layer_rows
    limits = [searched[push.hook_name] for push in pushes]
    boundaries = text.search(study, study.plan.on(*text.unsteered(study)), pushes, limits)
    outward, inward = (
        {found.push.hook_name: found for found in boundaries if found.push.sign == sign}
        for sign in (1, -1)
    )
    projections: Sequence[Row] = [{}] * len(outward)
    if with_projection:
        projections = _projections(study, [*outward.values()])
    table = [
        {**rows[name], **_columns(up, inward.get(name)), **there, "boundary_on": settings.on}
        for (name, up), there in zip(outward.items(), projections, strict=True)
    ]
    attrs = text.record(study, settings, since=before) | {"searched": searched}
    curves = [row for boundary in boundaries for row in boundary.rows()]
    return BoundaryResult(
        layers=to_frame(table, "layers", attrs),
        curves=to_frame(curves, "boundary", attrs),
        directions=study.directions,
        settings=settings,
    )


def run_prediction(study: Preparation, *, on: On) -> pd.DataFrame:
    """`Study.predicted_boundary`."""
    before = study.spent
    text = Text.of(study, on)
    settings = text_settings(study, text)
    _, unsteered = text.unsteered(study)
    pushes = [of.push(sign) for of in study.interventions.values() for sign in (1, -1)]
    if not all(push.additions for push in pushes):
        raise InputError(
            "a boundary is predicted of what is added; measure that of another operator, or of a "
            "vector with a condition: study.boundary()"
        )
    predictions = predict(
        study.engine,
        text.prompts,
        pushes,
        budget=study.budget,
        allowance=study.budget.allowance(float(unsteered.logprob.double().mean())),
        steered_positions=settings.steered_positions,
        seed=settings.seed,
    )
    table = [
        {**study.layer_rows[name], **_predicted_columns(up, down), "boundary_on": settings.on}
        for name, up, down in zip(
            study.hook_names, predictions[::2], predictions[1::2], strict=True
        )
    ]
    attrs = text.record(study, settings, since=before)
    return to_frame(table, "layers", attrs)


@dataclass(frozen=True)
class Text:
    """What a boundary is measured on; the pairs' positive prompts need not be run again."""

    on: On
    prompts: tuple[TokenizedPrompt, ...]
    labels: str
    groups: tuple[int, ...] | None
    """Those of the pairs; None for texts of their own."""

    @classmethod
    def of(cls, study: Preparation, on: On) -> "Text":
        """The text, checked: it has labels, and steering and rollouts can reach them."""
        prompts, labels = text_prompts(study.model, on, study.tokens), study.settings.labels
        if on != "positive":
            prompts, labels = study.labelled(prompts)
        check_text_positions(study.settings.steered_positions, on, prompts)
        check_rollouts(study.model, prompts, study.budget)
        is_of_pairs = on in ("positive", "negative")
        return cls(on, prompts, labels, study.pairs.groups if is_of_pairs else None)

    def unsteered(self, study: Preparation) -> tuple[Workload, Baseline]:
        """The text as positive prompts, read as the pairs or at their end; and unsteered."""
        if self.on == "positive":
            return replace(study.workload, negative=()), study.baseline.of_positive
        workload = study.engine.workload(
            TokenizedPairs(self.prompts, ()),
            position=-1,
            steered_positions=study.settings.steered_positions,
        )
        return workload, run_baseline(study.engine, workload, study.baseline.hook_names)

    def search(
        self, study: Preparation, plan: Plan, pushes: Sequence[Push], limits: Sequence[float]
    ) -> list[Boundary]:
        """The boundary along every push, up to its limit, as the study's settings say."""
        return find_boundaries(
            plan,
            self.prompts,
            pushes,
            limits,
            budget=study.budget,
            n_bootstrap=study.settings.n_bootstrap,
            seed=study.settings.seed,
            groups=self.groups,
        )

    def record(self, study: Preparation, settings: StudySettings, *, since: int) -> dict[str, Any]:
        """`Preparation.record` with the text."""
        return {**study.record(settings, since=since), "text": fingerprint(self.prompts)}


def run_joint(
    study: Preparation, *, n_angles: int, on: On, search_range: float | int
) -> pd.DataFrame:
    """`Study.joint_boundary`."""
    before, vector = study.spent, check_joint(study.directions, n_angles)
    text = Text.of(study, on)
    settings = boundary_settings(study, text, search_range)
    (readout,) = study.readouts.values()
    turns = all_round(n_angles, lambda angle: of_vector(_turned(vector, angle), readout))
    limits = [of.limit(study.baseline, settings.search_range) for _, of, _ in turns]
    plan = study.plan.on(*text.unsteered(study))
    boundaries = text.search(study, plan, [of.push(sign) for _, of, sign in turns], limits)
    first, second = in_order(vector)
    rows = [
        {
            "hook_a": first,
            "hook_b": second,
            "angle": angle,
            **found.row(),
            **{
                f"coefficient_{which}": found.at * share if share else 0.0
                for which, share in zip("ab", _shares(angle), strict=True)
            },
        }
        for (angle, _, _), found in zip(turns, boundaries, strict=True)
    ]
    attrs = text.record(study, settings, since=before) | {"searched": limits}
    return to_frame(rows, "joint", attrs)


@checked
def check_joint(
    vector: Directions | SteeringVector,
    n_angles: Angles,  # noqa: ARG001 (a range)
) -> SteeringVector:
    """The vector. Raises `InputError` unless it adds at two hooks, or with too few angles."""
    if (
        not isinstance(vector, SteeringVector)
        or len(vector) != 2
        or not isinstance(vector.operator, Add)
    ):
        raise InputError(
            "a joint boundary is that of a study of a SteeringVector that adds at two hooks, got "
            f"{vector!r}"
        )
    return vector


def _shares(angle: float) -> tuple[float, float]:
    """Cosine and sine of an angle in degrees; exactly 0 where a hook is not pushed."""
    radians = math.radians(angle)
    along, across = (
        0.0 if abs(share) < 1e-12 else share for share in (math.cos(radians), math.sin(radians))
    )
    return along, across


def _turned(vector: SteeringVector, angle: float) -> SteeringVector:
    """The vector with its first hook's part times the cosine, the other times the sine."""
    shares = dict(zip(in_order(vector), _shares(angle), strict=True))
    part = vector.at(*(name for name, share in shares.items() if share))
    factors = torch.tensor([shares[name] for name in part])
    return replace(
        part, directions=part.directions * factors.sign()[:, None], scale=part.scale * factors.abs()
    )


def boundary_settings(
    study: Preparation, text: Text, search_range: float | int
) -> BoundarySettings:
    """The settings. Raises `InputError` where one of them has no meaning."""
    check_search(budget=study.settings.budget, search_range=search_range)
    return BoundarySettings(**vars(text_settings(study, text)), search_range=float(search_range))


def text_settings(study: Preparation, text: Text) -> TextSettings:
    """The settings without a range. Raises `InputError` where one of them has no meaning."""
    check_search(budget=study.settings.budget)
    labels = {"labels": text.labels, "on": text_name(text.on)}
    settings = TextSettings(**(vars(study.settings) | labels))
    if study.budget.kind == "rollout_kl_p95" and settings.steered_positions != "all":
        raise InputError("rollouts are steered at all positions, so steered_positions must be all")
    return settings


def check_search(*, budget: str, search_range: float | int = SEARCH_RANGE) -> Budget:
    """The budget. Raises `InputError` when it leaves no room, or the range is none to search in."""
    parsed = Budget.parse(budget)
    if parsed.value == 0:
        raise InputError(
            f"the budget {parsed} leaves no room: no coefficient is within it; give one above 0"
        )
    if not 1e-6 <= search_range <= 1e6:
        raise InputError(
            f"search_range must be from 1e-6 to 1e6 mean residual norms, got {search_range}"
        )
    return parsed


def _columns(up: Boundary, down: Boundary | None) -> Row:
    outward = {
        "boundary_pos": up.at,
        "boundary_pos_ci_low": up.low,
        "boundary_pos_ci_high": up.high,
        "prediction_trusted": up.is_trusted,
        "reentry_pos": up.reentry,
    }
    if down is None:
        return outward
    return outward | {
        "boundary_neg": -down.at,
        "boundary_neg_ci_low": -down.high,
        "boundary_neg_ci_high": -down.low,
        **_predicted_columns(up.prediction, down.prediction),
        "prediction_trusted": up.is_trusted and down.is_trusted,
        "reentry_neg": -down.reentry,
    }


def _predicted_columns(up: Prediction, down: Prediction) -> Row:
    return {
        "predicted_boundary_pos": up.boundary,
        "predicted_boundary_neg": -down.boundary,
        "predicted_first_order_pos": up.first_order,
        "predicted_first_order_neg": -down.first_order,
    }


def _projections(study: Preparation, outward: Sequence[Boundary]) -> list[Row]:
    """`projection_at_boundary` of every hook; NaN where the boundary is beyond the range."""
    plan, baseline = study.plan, study.baseline
    reached = {b.push.hook_name: b for b in outward if math.isfinite(b.at)}
    jobs = [study.interventions[name].job((b.nearest,)) for name, b in reached.items()]
    jobs = [replace(job, along=study.read_along[job.readout]) for job in jobs]
    # None of another text, or under a rollout budget.
    found = {name: b.readings[b.nearest].projections for name, b in reached.items()}
    read = {name: of for name, of in found.items() if of is not None}
    if read:
        plan = plan.on(replace(study.workload, positive=()), baseline)
    rows: dict[str, Row] = {}
    tell = study.engine.stage("projections there: hooks").progress
    tell("hooks", 0, len(jobs))
    for job, (cell,) in zip(jobs, run_cells(plan, jobs, projected), strict=True):
        boundary = reached[job.hook_name]
        positive = read.get(job.hook_name, cell.positive)
        unsteered = baseline.cell(job.readout)
        unit = study.read_along[job.readout].double()
        before = float(((unsteered.positive - unsteered.negative).double() @ unit).mean())
        after = float(positive.mean() - cell.negative.mean())
        share = boundary.at / boundary.nearest
        rows[job.hook_name] = {"projection_at_boundary": before + share * (after - before)}
        tell("hooks", len(rows), len(jobs))
    return [rows.get(boundary.push.hook_name, {}) for boundary in outward]
