"""What was measured of one sign of a direction, and which conditions of steering it fails."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from steerlens.measure.verdicts import LEVEL
from steerlens.stats import interval, smallest_effect

SIGNS = {"positive": 1, "negative": -1}
IN_JSON = {
    **{"layer": "layer", "hook_name": "hook_name", "coefficient": "coefficient"},
    **{"boundary": "boundary", "share_of_boundary": "share_of_boundary"},
    **{"share_of_norm": "share_of_norm", "effect": "effect", "ci_low": "effect_ci_low"},
    **{"ci_high": "effect_ci_high", "p": "p_value", "null_by": "null_by", "n_null": "n_null"},
    **{"n_groups": "n_groups", "cost_nats": "degradation_nats", "cost_kl_nats": "kl_nats"},
}
"""What `recommendation.json` says of a sign -> the field."""


@dataclass(frozen=True, kw_only=True)
class SignResult:
    """A layer and coefficient of one sign, and what they do on held-out groups.

    The fields are the columns of `recommendation`; effects are signed, so that those of the
    negative sign are to be below 0.
    """

    sign: str
    hook_name: str
    layer: int
    coefficient: float
    boundary: float
    share_of_boundary: float
    share_of_norm: float
    effect: float
    effect_ci_low: float
    effect_ci_high: float
    needed_effect: float
    groups_needed: float
    n_units: int
    n_groups: int
    p_value: float
    null_by: str
    n_null: int
    null_correlation: float
    separation: float
    separation_ci_low: float
    separation_ci_high: float
    degradation_nats: float
    kl_nats: float

    def reasons(self, unit: str, budget: str) -> list[str]:
        """A sentence for each condition that fails; none where the sign is to be steered."""
        failed = [
            self._apart(),
            self._within(budget),
            self._effect(unit),
            self._more_than_a_null(unit),
        ]
        return [f"{self.sign}: {reason}" for reason in failed if reason]

    def _apart(self) -> str:
        if self.separation_ci_low > 0:
            return ""
        return (
            f"no separation on held-out pairs: at layer {self.layer} the sides are "
            f"{self.separation:.3g} residual units apart along the direction (95% interval "
            f"{self.separation_ci_low:.3g} to {self.separation_ci_high:.3g})"
        )

    def _within(self, budget: str) -> str:
        toward, least = abs(self.effect), self.needed_effect
        if math.isnan(self.effect_ci_low):
            return ""  # too few groups, which is another reason
        if self._is_shown and toward >= least:
            return ""
        if not self._is_shown and self._far_end >= least:
            return ""
        more = ""
        if self._is_shown:
            at = f"{abs(self.coefficient) * least / toward:.3g}"
            more = f", which takes some {at} residual units, and the boundary is at"
            more += f" {abs(self.boundary):.3g}"
        return (
            f"the boundary is smaller than the effect needs: within {budget} the effect is "
            f"{self.effect:+.3g} nats per token ({self.effect_ci_low:+.3g} to "
            f"{self.effect_ci_high:+.3g}), and {least:.3g} is the least that matters{more}"
        )

    def _effect(self, unit: str) -> str:
        said = (
            f"{self.effect:+.3g} nats per token (95% interval {self.effect_ci_low:+.3g} to "
            f"{self.effect_ci_high:+.3g})"
        )
        if self._is_shown:
            return ""
        if self.n_groups < 2 or math.isnan(self.effect_ci_low):
            return f"too few groups of {unit}: {self.n_groups} confirm, so there is no interval"
        is_toward = SIGNS[self.sign] * self.effect > 0
        if not (is_toward and self.effect_ci_low <= 0 <= self.effect_ci_high):
            return f"the effect goes the other way: {said}"
        if self._far_end < self.needed_effect:
            return ""  # what the boundary allows is too small, whatever the groups
        more = max(1, math.ceil(self.groups_needed - self.n_groups))
        return (
            f"too few groups of {unit}: the effect is {said}; {more} more to confirm on would show "
            "one of this size"
        )

    def _more_than_a_null(self, unit: str) -> str:
        if self.p_value < LEVEL:
            return ""
        if math.isnan(self.p_value):
            return f"nothing to rank: nothing known of the held-out {unit} at this coefficient"
        return (
            f"no more than a null: directions fitted with the labels of groups flipped do as much "
            f"to held-out {unit} (p {self.p_value:.2g} among {self.n_null}, {self.null_by})"
        )

    @property
    def _far_end(self) -> float:
        """The end of the interval that is farthest in the direction of the sign."""
        return max(SIGNS[self.sign] * end for end in (self.effect_ci_low, self.effect_ci_high))

    @property
    def _is_shown(self) -> bool:
        """Whether the interval is off 0 in the direction of the sign."""
        return min(SIGNS[self.sign] * e for e in (self.effect_ci_low, self.effect_ci_high)) > 0

    def sentence(self, unit: str) -> str:
        """The answer in a line."""
        return (
            f"{self.sign}: layer {self.layer}, coefficient {self.coefficient:+.3g} residual units "
            f"({self.share_of_boundary:.0%} of the boundary, {self.share_of_norm:.0%} of the "
            f"residual norm): {self.effect:+.3g} nats per token on held-out {unit} (95% interval "
            f"{self.effect_ci_low:+.3g} to {self.effect_ci_high:+.3g}, p {self.p_value:.2g}); it "
            f"costs {self.degradation_nats:.3g} nats per token of the model's own text"
        )

    def to_dict(self) -> dict[str, Any]:
        """What `recommendation.json` says of it; None for what is not finite."""
        found = {name: getattr(self, field) for name, field in IN_JSON.items()}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in found.items()
        }


def verdict_of(reasons: Sequence[str]) -> str:
    """What a table says: to steer, or the conditions that failed, without their numbers."""
    kinds = [reason.partition(": ")[2].partition(":")[0] for reason in reasons]
    return "; ".join(kinds) or "steer"


def effect_of(
    changes: Float[np.ndarray, " unit"], groups: Sequence[int], seed: int
) -> dict[str, Any]:
    """Effect, interval and what it takes to show it, over units whose change is known."""
    known = np.isfinite(changes)
    values, kept = changes[known], np.array(groups)[known].tolist()
    n_groups = len(set(kept))
    low, high = interval(values, groups=kept, seed=seed)
    effect = float(values.mean()) if len(values) else math.nan
    smallest = smallest_effect(low, high, n_groups)
    return {
        "effect": effect,
        "effect_ci_low": low,
        "effect_ci_high": high,
        "groups_needed": n_groups * (smallest / effect) ** 2 if effect else math.nan,
        "n_units": len(values),
        "n_groups": n_groups,
    }
