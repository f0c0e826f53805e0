"""What a comparison concludes, by hand: doses, intervals, verdicts, methods against each other."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from comparing import HOOK, UNIT_SPREAD, assumed

from steerlens.measure.equal_damage import Measured
from steerlens.measure.verdicts import (
    effect_columns,
    methods_table,
    verdict,
    with_verdicts,
)
from steerlens.tables import to_frame


def test_the_dose_response_by_hand() -> None:
    """Changes 2c for the first item, -c for the second, and up but not at every step."""
    doses = np.array([-1.0, -0.5, 0.5, 1.0])
    changes = np.stack([2 * doses, -doses, np.array([-1.0, -2.0, 1.0, 3.0])], axis=1)
    row = effect_columns(Measured(doses, changes), assumed(3))
    assert row["effect"] == pytest.approx((2 - 1 + 3) / 3)
    # sum of dose^2 = 2.5, of dose * change = 5, -2.5 and 1 + 1 + 0.5 + 3.
    assert row["slope"] == pytest.approx((2 - 1 + 5.5 / 2.5) / 3)
    assert row["anti_steerable"] == pytest.approx(1 / 3)
    assert row["monotone"] == pytest.approx(1 / 3)
    assert row["spearman"] == pytest.approx((1 - 1 + 0.9) / 3)
    # An item that nothing moves has no correlation, and the others keep theirs.
    still = np.append(changes, np.zeros((4, 1)), axis=1)
    row = effect_columns(Measured(doses, still), assumed(4))
    assert row["spearman"] == pytest.approx((1 - 1 + 0.9) / 3)


def test_the_interval_holds_the_extraction() -> None:
    """The halves add as the roots of sums of squares do; t(0.975, 21.72) is 2.0754."""
    values = np.array([1.0, 2.0, 4.0, 5.0, 3.0, 3.0, 2.0, 4.0, 1.0, 5.0])
    measured = Measured(np.array([1.0]), values[None])
    alone, wide = (
        effect_columns(measured, assumed(10), refits) for refits in (None, 2 * UNIT_SPREAD)
    )
    assert (alone["interval_over"], wide["interval_over"]) == ("items", "items and pairs")
    for end, sign in (("low", -1), ("high", 1)):
        half = abs(alone[f"effect_ci_{end}"] - 3)
        expected = 3 + sign * math.hypot(half, 2.0754 * 2)
        assert wide[f"effect_ci_{end}"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(("share", "expected"), [(1.001, 10), (0.2501, 40), (-0.01, math.nan)])
def test_the_groups_of_items_needed_are_those_given_the_pairs(
    spread: float, share: float, expected: float
) -> None:
    """`share` of the squared smallest effect of the items is left beyond that of the pairs."""
    values = np.array([-2.0, -1.0, 1.0, 2.0, 0.0, 0.0, -1.0, 1.0, -2.0, 2.0])
    refits = spread * UNIT_SPREAD

    def columns(values: np.ndarray, *refits: np.ndarray) -> dict[str, Any]:
        return dict(effect_columns(Measured(np.array([1.0]), values[None]), assumed(10), *refits))

    of_items, of_both = (columns(values, *r)["smallest_effect"] for r in ((), (refits,)))
    effect = math.sqrt(max(0.0, of_both**2 - of_items**2 + share * of_items**2))
    needed = columns(values + effect, refits)["groups_needed"]
    assert needed == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("low", "high", "p", "n_fitted", "expected"),
    [
        (0.2, 1.0, 0.01, 40, "effect"),
        (-1.0, -0.2, 0.01, 40, "reversed"),
        (0.2, 1.0, 0.2, 40, "no more than a null"),
        (0.2, 1.0, 0.2, 5, "too few groups"),
        (0.2, 1.0, 0.01, 5, "too few groups"),
        (0.2, 1.0, math.nan, 40, "no nulls"),
        (-0.2, 1.0, 0.01, 40, "undecided"),
        (-0.05, 0.09, 0.5, 40, "equivalent to no effect"),
        (0.02, 0.09, 0.01, 40, "equivalent to no effect"),
        (math.nan, math.nan, 0.01, 40, "undefined"),
    ],
)
def test_verdicts(low: float, high: float, p: float, n_fitted: int, expected: str) -> None:
    row = {"effect": (low + high) / 2, "effect_ci_low": low, "effect_ci_high": high, "p_layers": p}
    assert verdict(row, assumed(20, n_fitted=n_fitted)) == expected
    one_group = replace(assumed(20), groups=(0,) * 20)
    assert verdict(row, one_group) == "too few groups"
    few = {"no more than a null": "too few nulls"}.get(expected, expected)
    assert verdict({**row, "least_p": 0.05}, assumed(20, n_fitted=n_fitted)) == few


def test_a_layer_is_chosen_by_the_training_items_alone() -> None:
    given = [("a", 0.1), ("a", 0.5), ("a", 0.2), ("b", math.nan), ("c", 0.3)]
    rows = [
        {"method": name, "effect": 1.0, "effect_ci_low": 0.5, "effect_ci_high": 1.5}
        | {"train_effect": train, "verdict": ""}
        for name, train in given
    ]
    found = with_verdicts(rows, assumed(20))
    assert [row["is_chosen"] for row in found] == [False, True, False, False, True]


def test_methods_are_compared_on_the_same_items() -> None:
    """Ten items: better by 1 on all, by 0.01 on all, and by noise about 0."""
    noise = np.array([1.0, -1.0] * 5)
    reference = np.linspace(0, 5, 10)
    by_method = {"mean_diff": reference, "far": reference + 1 + 0.1 * noise, "near": reference}
    by_method |= {"same": reference + 0.01, "unsure": reference + noise}
    rows = [
        {"method": name, "hook_name": HOOK, "layer": 1, "n_items": 10, "n_groups": 10}
        | {"n_null": 0, "null_by": "none", "interval_over": "items", "effect": 1.0}
        | {"is_chosen": False, "layer_choice": "none", "verdict": "effect"}
        for name in by_method
    ]
    table = to_frame(rows, "comparison", {})
    effects = pd.DataFrame({f"{name} @ {HOOK}": values for name, values in by_method.items()})
    found = methods_table(table, effects, assumed(10), {}).set_index("method")
    assert found.verdict.to_dict() == {
        "far": "better",
        "near": "equivalent",
        "same": "equivalent",
        "unsure": "undecided",
    }
    assert found.difference.tolist() == pytest.approx([1, 0, 0.01, 0])
    assert (found.p_family >= found.p_value)[["far", "same"]].all()
    # 2 of 1024 flips are as far; drawn 1999 times.
    assert found.p_value["far"] < 0.01
    # Without the reference there is nothing to compare with.
    assert methods_table(table[1:], effects, assumed(10), {}).empty
    # Refits of both on the same pairs widen an interval by how their difference varies.
    draws = np.random.default_rng(0).normal(size=50)
    refits = {f"mean_diff @ {HOOK}": draws, f"near @ {HOOK}": draws}
    for name in ("unsure", "far"):
        refits[f"{name} @ {HOOK}"] = draws + 2 * UNIT_SPREAD
    nested = methods_table(table, effects, assumed(10), refits).set_index("method")
    over = {"far": "items and pairs", "near": "items and pairs", "same": "items"}
    assert nested.interval_over.to_dict() == over | {"unsure": "items and pairs"}
    assert found.interval_over.eq("items").all()
    ends = ["difference_ci_low", "difference_ci_high"]
    alike = ["near", "same"]
    pd.testing.assert_frame_equal(nested[ends].loc[alike], found[ends].loc[alike])
    for end in ends:
        half = math.hypot(found[end]["unsure"], 2.0754 * 2)
        assert abs(nested[end]["unsure"]) == pytest.approx(half, abs=1e-3)
    # The p-value has in it what the interval has: 1 is half a standard deviation of the refits.
    assert nested.p_value["far"] == pytest.approx(0.62, abs=0.05)
    assert nested.verdict["far"] == "undecided"


def test_overflow_is_undefined_and_not_no_effect() -> None:
    changes = np.array([[1.0, 2.0], [math.nan, 1.0]])
    row = effect_columns(Measured(np.array([-1.0, 1.0]), changes), assumed(2))
    assert list(row) == ["effect"]
    assert verdict(row, assumed(2)) == "undefined"
