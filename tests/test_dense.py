"""A dense sweep: its curve against cells that were run, its price, what it says where it misses."""

import re
from typing import Any

import numpy as np
import pytest
from commands import Main, table

import steerlens as sl
from steerlens.engine.checkpoint import Kept
from steerlens.errors import InputError
from steerlens.measure.dense import MOST, with_dense

CURVES = ["projection", "projection_shift", "separation", "logprob_nats", "degradation_ci_low"]
CURVES += ["degradation_ci_high", "projection_ci_low", "projection_ci_high"]


@pytest.fixture(scope="module")
def study(llama: Any, pairs: sl.ContrastivePairs) -> sl.Study:
    directions = sl.fit_directions(sl.collect_differences(llama, pairs))
    return sl.Study(llama, pairs, directions, n_bootstrap=50)


def test_a_dense_curve_is_that_of_64_cells_for_the_price_of_16(study: sl.Study) -> None:
    study.sweep([0])  # the unsteered model and the plan are there
    dense = study.sweep([-3, 0, 3], dense=64).table
    whole = study.sweep(sorted({*dense.coefficient})).table
    assert len(dense) == len(whole) == 65 * 5
    n_run = []
    for (_, curve), (_, cells) in zip(
        dense.groupby("hook_name"), whole.groupby("hook_name"), strict=True
    ):
        assert (curve.coefficient.to_numpy() == cells.coefficient.to_numpy()).all()
        for name in CURVES:
            gap = np.abs(curve[name].to_numpy() - cells[name].to_numpy())
            assert gap.max() <= 0.01 * np.ptp(cells[name]), name
            assert gap[curve.exact].max() < 1e-4  # rows of a pass are others
        # The error that it tells is that of fewer cells, so no smaller than its own.
        gap = np.abs(curve.logprob_nats.to_numpy() - cells.logprob_nats.to_numpy())
        assert gap.max() <= curve.left_out_error.max() * np.ptp(cells.logprob_nats) + 1e-5
        ends = curve.exact & curve.left_out_error.isna()
        assert list(curve.coefficient[ends]) == [-3, 3]
        assert curve.left_out_error[~curve.exact].isna().all()
        n_run.append(int((curve.exact & (curve.coefficient != 0)).sum()))
    assert {*n_run} == {8, MOST}  # where 8 do not do there are 16
    spent, whole_spent = (t.attrs["forward_equivalents"] for t in (dense, whole))
    assert spent < whole_spent * 16 / 64 + 2
    assert whole.exact.all()
    assert whole.left_out_error.isna().all()


def test_a_curve_that_cells_cannot_follow_is_told(study: sl.Study) -> None:
    with pytest.warns(RuntimeWarning, match=r"dense curves of \d of 5 hooks miss"):
        table = study.sweep([-500, 0, 500], dense=64).table
    first = table[table.layer == 0]
    assert first.left_out_error.max() > 0.01
    assert (first.exact & (first.coefficient != 0)).sum() == MOST


def test_what_was_stopped_ends_in_the_same_table_at_the_same_cost(
    llama: Any, pairs: sl.ContrastivePairs, study: sl.Study
) -> None:
    class Memory(dict[tuple[str, str], Kept]):
        room = 100

        def load(self, name: str, of: str) -> Kept | None:
            return self.get((name, of))

        def keep(self, name: str, of: str, kept: Kept) -> None:
            if kept.rows:
                if not self.room:
                    raise InterruptedError
                self.room -= 1
            self[name, of] = kept

    def swept(memory: Memory) -> Any:
        settings: dict[str, Any] = {"n_bootstrap": 50, "checkpoint": memory}
        return sl.sweep(llama, pairs, study.directions, coefficients=[-3, 3], dense=64, **settings)

    expected = swept(Memory()).table
    counts = expected.groupby("hook_name").exact.sum()
    assert counts.nunique() == 2  # some hooks are gone through twice
    for room in (1, 4):
        memory = Memory()
        memory.room = room
        with pytest.raises(InterruptedError):
            swept(memory)
        memory.room = 100
        found = swept(memory).table
        assert found.equals(expected)
        assert found.attrs == expected.attrs


def test_a_dense_sweep_needs_two_coefficients_of_a_unit() -> None:
    assert with_dense(["-80%", 0.0, "80%"], 5) == ("-80%", "-40%", 0.0, "40%", "80%")
    for coefficients in ([1.0], [-1.0, "0.1 norm"], [0.0, "-0.0"], ["80%", "0.1 norm"]):
        with pytest.raises(InputError, match="of one unit, two at least"):
            with_dense(coefficients, 8)


@pytest.mark.parametrize(
    ("ends", "n"), [((-0.1, 0.7), 17), (("-0.1 norm", "0.7 norm"), 17), ((-1 / 3, 2 / 3), 51)]
)
def test_no_two_coefficients_differ_by_rounding_alone(ends: tuple[Any, Any], n: int) -> None:
    every = [sl.steering.parse_coefficient(c).number for c in with_dense(ends, n)]
    assert len(every) == n
    assert all(c == 0 or abs(c) > 1e-3 for c in every)
    assert np.diff(every).min() > 0.9 * np.ptp(every) / (n - 1)


def test_only_cells_that_were_run_are_points_or_printed(
    study: sl.Study, sweep: Main, tmp_path: Any
) -> None:
    result = study.sweep([-2, 2], dense=9)
    for figure in (result.plot(), sl.plots.dose_response(result)):
        for panel in figure.spec.get("concat", [figure.spec]):
            drawn = [of for of in panel["layer"] if of["mark"]["type"] == "point"]
            assert drawn
            assert all({"filter": "datum.exact"} in of["transform"] for of in drawn)
    out = tmp_path / "run"
    printed = sweep("--dense", "33", "--out", out)
    is_run = table(out).groupby("coefficient").exact.all()
    assert 0 < is_run.mean() < 0.5
    assert {float(c) for c in re.findall(r"c = (\S+)", printed.out)} == {*is_run.index[is_run]}
