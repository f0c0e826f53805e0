"""The boundary of a vector at two hooks as a curve: what one push leaves room for of the other."""

import math
from dataclasses import replace

import pandas as pd
import torch

from steerlens.directions.directions import Directions
from steerlens.engine.tokenization import fingerprint
from steerlens.errors import InputError
from steerlens.measure.boundary import Text, boundary_settings
from steerlens.measure.boundary_search import find_boundaries
from steerlens.measure.interventions import in_order, of_vector
from steerlens.measure.preparation import Preparation
from steerlens.measure.texts import On
from steerlens.steering import Add, SteeringVector
from steerlens.tables import JOINT_COLUMNS, to_frame
from steerlens.validation import Angles, checked


def run_joint(
    study: Preparation, *, n_angles: int, on: On = "positive", search_range: float | int = 4.0
) -> pd.DataFrame:
    """`Study.joint_boundary`."""
    before, vector = study.spent, check_joint(study.directions, n_angles)
    text = Text.of(study, on)
    settings = boundary_settings(study, text, search_range=search_range)
    (readout,) = study.readouts.values()
    angles = [360 * i / n_angles for i in range(n_angles)]
    # What lies opposite is the same push with the other sign: the two are searched together.
    n_lines = n_angles if n_angles % 2 else n_angles // 2
    lines = [of_vector(_turned(vector, angle), readout) for angle in angles[:n_lines]]
    interventions = [lines[i % n_lines] for i in range(n_angles)]
    limits = [of.limit(study.baseline, settings.search_range) for of in interventions]
    workload, unsteered = text.unsteered(study)
    boundaries = find_boundaries(
        study.plan.on(replace(workload, with_readouts=False), unsteered),
        text.prompts,
        [of.push(1 if i < n_lines else -1) for i, of in enumerate(interventions)],
        limits,
        budget=study.budget,
        n_bootstrap=settings.n_bootstrap,
        seed=settings.seed,
        groups=text.groups,
    )
    first, second = in_order(vector)
    rows = []
    for angle, found in zip(angles, boundaries, strict=True):
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
    attrs = {
        **study.record(settings, since=before),
        "searched": limits,
        "text": fingerprint(text.prompts),
    }
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
