"""The boundary of a vector at two hooks as a curve: what one push leaves room for of the other."""

import math
from dataclasses import replace

import pandas as pd
import torch

from steerlens.directions.directions import Directions
from steerlens.errors import InputError
from steerlens.measure.boundary import Text, boundary_settings
from steerlens.measure.boundary_search import all_round
from steerlens.measure.interventions import in_order, of_vector
from steerlens.measure.preparation import Preparation
from steerlens.measure.texts import On
from steerlens.steering import Add, SteeringVector
from steerlens.tables import JOINT_COLUMNS, to_frame
from steerlens.validation import Angles, checked


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
    workload, unsteered = text.unsteered(study)
    plan = study.plan.on(replace(workload, with_readouts=False), unsteered)
    boundaries = text.search(study, plan, [of.push(sign) for _, of, sign in turns], limits)
    first, second = in_order(vector)
    rows = []
    for (angle, _, _), found in zip(turns, boundaries, strict=True):
        shares = _shares(angle)
        rows.append(
            {
                "hook_a": first,
                "hook_b": second,
                "angle": angle,
                "boundary": found.at,
                "boundary_ci_low": found.low,
                "boundary_ci_high": found.high,
                **{
                    f"coefficient_{which}": found.at * share if share else 0.0
                    for which, share in zip("ab", shares, strict=True)
                },
                "predicted_boundary": found.prediction.boundary,
            }
        )
    attrs = text.record(study, settings, since=before) | {"searched": limits}
    return to_frame(rows, JOINT_COLUMNS, attrs)


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
