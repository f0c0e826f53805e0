"""The coherence boundary against brute force on tiny models."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerlens as sl
from steerlens import coherence, plain
from steerlens.coherence import ROLLOUT_TOKENS, allowances, mean_loss
from steerlens.directions import Directions
from steerlens.errors import DirectionError, HookError, PairError, SweepError
from steerlens.gradients import label_slopes
from steerlens.loss import Budget
from steerlens.parts import Cost
from steerlens.plain import Workload
from steerlens.pushes import choose_probes, first_root
from steerlens.shape import main_orthogonal
from steerlens.tables import BOUNDARY_COLUMNS, LAYER_COLUMNS, SHAPE_COLUMNS
from steerlens.tokens import TokenizedPrompt, make_batches, tokenize_pairs, tokenize_prompt
from steerlens.uncertainty import weighted_quantile


def sampled(model: Any, start: str, n_tokens: int, seed: int) -> str:
    """Text drawn from the model itself, as a trained model's prompts are text that it expects."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(tokenize_prompt(model, start).prompt)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logits[:4] = logits[len(model.tokenizer) :] = -math.inf  # words only
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return " ".join(model.tokenizer.convert_ids_to_tokens(ids[1:]))


@pytest.fixture(scope="module")
def many(llama: Any) -> sl.ContrastivePairs:
    """Twenty pairs: more than the probes, so that both kinds of evaluation are made."""
    positive = [sampled(llama, "you are cheerful", 8 + i % 5, seed=i) for i in range(20)]
    return sl.ContrastivePairs.from_lists(
        positive, [text.replace("cheerful", "very gloomy", 1) for text in positive]
    )


@pytest.fixture(scope="module")
def directions(llama: Any, many: sl.ContrastivePairs) -> Directions:
    return sl.fit_directions(sl.collect_differences(llama, many))


def brute_force(
    model: Any,
    prompts: tuple[TokenizedPrompt, ...],
    direction: torch.Tensor,
    hook_name: str,
    sign: int,
    limit: float,
    budget: str,
) -> float:
    """The first crossing on 60 points, by the plain loop."""
    parsed = Budget.parse(budget)
    workload = Workload(make_batches(model, prompts, 16), (), -1, "all", parsed.is_divergence)
    baseline = plain.run_baseline(model, workload, (hook_name,)).logprob.double().mean()
    grid = np.geomspace(limit * 2e-3, limit, 60)
    cells = plain.run_cells(
        model,
        workload,
        hook_name=hook_name,
        direction=direction,
        coefficients=[float(sign * c) for c in grid],
        readout=hook_name,
    )
    allowance = parsed.allowance(float(baseline))
    before = (0.0, 0.0)
    for c, cell in zip(grid, cells, strict=True):
        loss = float(baseline - cell.logprob.double().mean())
        if parsed.kind == "kl":
            loss = float(cell.kl.double().nanmean(dim=1).mean())
        if parsed.kind == "kl_p95":
            tokens = cell.kl.double().numpy()
            loss = float(weighted_quantile(tokens, np.ones((1, len(tokens))), 0.95)[0])
        if loss > allowance:
            share = (allowance - before[1]) / (loss - before[1])
            return float(before[0] + share * (c - before[0]))
        before = (float(c), loss)
    return math.inf


@pytest.mark.parametrize("budget", ["relative=0.02", "nats=0.1", "kl=0.05", "kl_p95=0.2"])
def test_boundaries_equal_brute_force_on_a_grid(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, budget: str
) -> None:
    found = sl.find_boundary(llama, many, directions, budget=budget, n_bootstrap=100)
    assert list(found.layers.columns) == [column.name for column in LAYER_COLUMNS]
    assert list(found.curves.columns) == [column.name for column in BOUNDARY_COLUMNS]
    prompts = tokenize_pairs(llama, many).positive
    searched = found.layers.attrs["searched"]
    n_finite = 0
    for row in found.layers.to_dict("records"):
        name = row["hook_name"]
        assert searched[name] == pytest.approx(4 * row["resid_norm"])
        for side, sign in (("pos", 1), ("neg", -1)):
            expected = brute_force(
                llama, prompts, directions[name], name, sign, searched[name], budget
            )
            boundary = row[f"boundary_{side}"]
            assert sign * boundary == pytest.approx(expected, rel=0.05)
            if math.isfinite(expected):
                n_finite += 1
                low, high = row[f"boundary_{side}_ci_low"], row[f"boundary_{side}_ci_high"]
                # A percentile moves in steps, so its interval may end at the boundary itself.
                assert low < boundary * (1 + sign * 1e-4)
                assert boundary * (1 - sign * 1e-4) < high
                # Twenty prompts that begin alike share a percentile; their means differ.
                assert budget.startswith("kl_p95") or high - low > 0.01 * abs(boundary)
    assert n_finite >= 6
    # Control: half the budget is reached earlier, at every layer and sign.
    kind, value = budget.split("=")
    tighter = sl.find_boundary(
        llama, many, directions, budget=f"{kind}={float(value) / 2}", n_bootstrap=100
    ).layers
    assert (tighter.boundary_pos.abs() < found.layers.boundary_pos.abs()).all()
    assert (tighter.boundary_neg.abs() < found.layers.boundary_neg.abs()).all()


def test_other_texts_have_other_boundaries(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    tokenized = tokenize_pairs(llama, many)
    texts = tuple(sampled(llama, "the river", 9, seed=100 + i) for i in range(10))
    own = tuple(tokenize_prompt(llama, text) for text in texts)
    name = "blocks.2.hook_resid_post"
    found = {}
    for on, prompts in (
        ("positive", tokenized.positive),
        ("negative", tokenized.negative),
        (texts, own),
    ):
        layers = sl.find_boundary(
            llama, many, directions, layers=[2], on=on, budget="nats=0.1", n_bootstrap=50
        ).layers
        row = layers.to_dict("records")[0]
        limit = layers.attrs["searched"][name]
        for side, sign in (("pos", 1), ("neg", -1)):
            expected = brute_force(llama, prompts, directions[name], name, sign, limit, "nats=0.1")
            assert sign * row[f"boundary_{side}"] == pytest.approx(expected, rel=0.05)
        found[row["boundary_on"]] = row["boundary_pos"]
    assert sorted(found) == ["negative", "positive", "texts"]
    assert len({round(value, 3) for value in found.values()}) == 3


def test_the_projection_at_the_boundary_is_that_of_its_cell(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    layers = sl.find_boundary(llama, many, directions, budget="nats=0.1", n_bootstrap=50).layers
    for row in layers.to_dict("records"):
        if math.isinf(row["boundary_pos"]):
            assert math.isnan(row["projection_at_boundary"])
            continue
        cell = sl.sweep(
            llama,
            many,
            directions,
            layers=[row["layer"]],
            coefficients=[row["boundary_pos"]],
            budget="nats=0.1",
            n_bootstrap=2,
        ).table.iloc[0]
        moved = cell.projection - row["projection"]
        assert row["projection_at_boundary"] == pytest.approx(cell.projection, abs=0.1 * abs(moved))
        assert cell.degradation_nats == pytest.approx(0.1, rel=0.1)


def test_a_boundary_beyond_the_range_is_infinite(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    options: dict[str, Any] = {"layers": [0], "budget": "nats=0.1", "n_bootstrap": 50}
    near = sl.find_boundary(llama, many, directions, search_range=1e-3, **options).layers.iloc[0]
    assert near.boundary_pos == math.inf
    assert near.boundary_neg == -math.inf
    assert near.boundary_pos_ci_high == math.inf
    assert near.boundary_neg_ci_low == -math.inf
    assert math.isnan(near.projection_at_boundary)
    assert not near.prediction_trusted
    far = sl.find_boundary(llama, many, directions, **options).layers.iloc[0]
    assert math.isfinite(far.boundary_pos)
    assert far.boundary_neg < 0 < far.boundary_pos


def test_the_interval_is_that_of_searches_on_resampled_pairs(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    """Resampling the pairs and searching again, 40 times, gives an interval of like width."""
    options: dict[str, Any] = {"layers": [2], "budget": "nats=0.1"}
    row = sl.find_boundary(llama, many, directions, **options).layers.iloc[0]
    generator, again = np.random.default_rng(0), []
    for _ in range(40):
        drawn = generator.integers(0, len(many), len(many))
        resampled = sl.ContrastivePairs.from_lists(
            [many[int(i)].positive for i in drawn], [many[int(i)].negative for i in drawn]
        )
        found = sl.find_boundary(llama, resampled, directions, n_bootstrap=2, **options).layers
        again.append(found.boundary_pos[0])
    low, high = np.quantile(again, [0.025, 0.975])
    width = row.boundary_pos_ci_high - row.boundary_pos_ci_low
    assert width == pytest.approx(high - low, rel=0.4)
    # What `find_boundary` says of its intervals: the ends are right to about a fifth.
    assert row.boundary_pos_ci_low == pytest.approx(low, rel=0.2)
    assert row.boundary_pos_ci_high == pytest.approx(high, rel=0.2)


def test_first_roots_by_hand() -> None:
    """c^2 + c = 2 at 1, c^2 - c = 2 at 2, and 0.5 c = 2 at 4."""
    assert first_root(1.0, 1.0, 2.0) == pytest.approx(1)
    assert first_root(1.0, -1.0, 2.0) == pytest.approx(2)
    assert first_root(0.0, 0.5, 2.0) == 4
    assert first_root(0.0, -0.5, 2.0) == math.inf


def test_predictions_are_of_the_slope_and_the_curvature(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    prompts = tokenize_pairs(llama, many).positive
    slopes = label_slopes(
        llama,
        make_batches(llama, prompts, None),
        [(name, directions[name]) for name in directions.hook_names],
        steered_positions="all",
        seed=0,
        cost=Cost(),
    )
    slope, bend = slopes.logprob.mean(dim=1).tolist(), (slopes.curvature.mean(dim=1) / 2).tolist()
    options: dict[str, Any] = {"n_bootstrap": 2, "search_range": 1e-6}
    of_nats = sl.find_boundary(llama, many, directions, budget="nats=0.001", **options).layers
    of_kl = sl.find_boundary(llama, many, directions, budget="kl=0.1", **options).layers
    of_p95 = sl.find_boundary(llama, many, directions, budget="kl_p95=0.1", **options).layers
    for i in range(5):
        for side, sign in (("pos", 1), ("neg", -1)):
            found = sign * of_nats[f"predicted_first_order_{side}"][i]
            assert found == pytest.approx(first_root(0.0, -sign * slope[i], 0.001))
            # Other batches draw other labels for the curvature.
            found = sign * of_nats[f"predicted_boundary_{side}"][i]
            assert found == pytest.approx(first_root(bend[i], -sign * slope[i], 0.001), rel=0.3)
            found = sign * of_kl[f"predicted_boundary_{side}"][i]
            assert found == pytest.approx(math.sqrt(0.1 / bend[i]), rel=0.3)
            percentile = sign * of_p95[f"predicted_boundary_{side}"][i]
            assert percentile == pytest.approx(found / math.sqrt(3.8415), rel=1e-4)
    assert of_kl.predicted_first_order_pos.isna().all()


@pytest.mark.parametrize("on", ["positive", "negative"])
def test_predictions_alone_are_those_of_the_search(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, on: Any
) -> None:
    options: dict[str, Any] = {"on": on, "budget": "nats=0.1", "layers": [1, 3]}
    alone = sl.predict_boundary(llama, many, directions, **options)
    found = sl.find_boundary(llama, many, directions, n_bootstrap=2, **options).layers
    assert list(alone.columns) == [column.name for column in LAYER_COLUMNS]
    predicted = [name for name in alone.columns if name.startswith("predicted_")]
    assert len(predicted) == 4
    measured = ["separation", "projection", "resid_norm", "logprob_nats", "boundary_on"]
    pd.testing.assert_frame_equal(alone[predicted + measured], found[predicted + measured])
    assert alone.boundary_pos.isna().all()
    assert found.boundary_pos.notna().all()
    assert alone.attrs["forward_equivalents"] < 9 < found.attrs["forward_equivalents"]


def test_a_small_budget_is_reached_where_it_was_predicted(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    layers = sl.find_boundary(llama, many, directions, budget="nats=0.0002", n_bootstrap=2).layers
    for row in layers.to_dict("records"):
        for side in ("pos", "neg"):
            first = row[f"predicted_first_order_{side}"]
            if math.isfinite(first):
                assert row[f"boundary_{side}"] == pytest.approx(first, rel=0.1)
                near = row[f"predicted_boundary_{side}"]
                assert row[f"boundary_{side}"] == pytest.approx(near, rel=0.1)
    is_near = (layers.predicted_boundary_neg / layers.boundary_neg - 1).abs() <= 0.4
    is_near &= (layers.predicted_boundary_pos / layers.boundary_pos - 1).abs() <= 0.4
    assert layers.prediction_trusted.tolist() == is_near.tolist()
    assert layers.prediction_trusted.any()


def test_rollouts_are_measured_on_the_steered_models_own_text(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    few, name = many[:3], "blocks.2.hook_resid_post"
    found = sl.find_boundary(
        llama, few, directions, layers=[2], budget="rollout_kl_p95=0.5", n_bootstrap=50
    )
    curve = found.curves[found.curves.coefficient > 0].sort_values("coefficient")
    boundary = found.layers.boundary_pos[0]
    assert math.isfinite(boundary)
    # By hand at the evaluation nearest to it: generate, then compare the two models' predictions.
    nearest = curve.iloc[(curve.coefficient / boundary).map(math.log).abs().argsort().iloc[0]]
    divergences = []
    for prompt in tokenize_pairs(llama, few).positive:
        ids = torch.tensor([prompt.prompt])
        with torch.no_grad(), sl.steer(llama, {name: directions[name]}, nearest.coefficient):
            text = llama.generate(
                ids,
                max_new_tokens=ROLLOUT_TOKENS,
                do_sample=False,
                return_type="tokens",
                verbose=False,
            )
            steered = llama(text)[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            unsteered = llama(text)[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        divergences += (unsteered.exp() * (unsteered - steered)).sum(-1).tolist()
    at_rank = sorted(divergences)[math.ceil(0.95 * len(divergences)) - 1]
    assert nearest.loss_nats == pytest.approx(at_rank, rel=1e-3)
    assert nearest.n_prompts == 3
    with pytest.raises(SweepError, match="all positions"):
        sl.find_boundary(
            llama, few, directions, budget="rollout_kl_p95=1", steered_positions="prompt"
        )


def test_the_cost_is_reported(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    one = sl.find_boundary(llama, many, directions, layers=[4], n_bootstrap=2).layers
    all_hooks = sl.find_boundary(llama, many, directions, n_bootstrap=2).layers
    assert 5 < one.attrs["forward_equivalents"] < all_hooks.attrs["forward_equivalents"] < 75


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "nats=0"}, SweepError, "leaves no room"),
        ({"budget": "kl=-1"}, SweepError, "expected a budget"),
        ({"search_range": 0}, SweepError, "search_range"),
        ({"search_range": math.inf}, SweepError, "search_range"),
        ({"n_bootstrap": 1}, SweepError, "n_bootstrap"),
        ({"seed": -1}, SweepError, "seed"),
        ({"on": "sideways"}, SweepError, "'sideways'"),
        ({"on": ()}, SweepError, "no texts"),
        ({"on": ("the", "")}, PairError, "no tokens"),
        ({"layers": [9]}, HookError, "layer 9"),
        ({"steered_positions": "last"}, PairError, "continuation"),
    ],
)
def test_what_has_no_meaning_is_refused(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: Directions,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        sl.find_boundary(llama, many, directions, **options)


def test_a_hook_without_direction_is_refused(llama: Any, many: sl.ContrastivePairs) -> None:
    fitted = sl.fit_directions(sl.collect_differences(llama, many, layers=[1]))
    with pytest.raises(DirectionError, match=r"blocks\.0"):
        sl.find_boundary(llama, many, fitted, layers=[0])


# Probes


def test_probes_are_those_most_like_all_prompts() -> None:
    """Of 40 prompts with one slope far from the rest, the chosen quarter has the mean of all."""
    slopes = np.random.default_rng(0).normal(size=(3, 40))
    probes = choose_probes(slopes, seed=0)
    assert len(probes) == len(set(probes)) == 10
    spread = slopes.std(axis=1)
    miss = np.abs(slopes[:, list(probes)].mean(axis=1) - slopes.mean(axis=1)) / spread
    typical = [
        np.abs(slopes[:, rows].mean(axis=1) - slopes.mean(axis=1)) / spread
        for rows in (np.random.default_rng(i).permutation(40)[:10] for i in range(50))
    ]
    assert miss.max() < 0.15 < np.median(typical, axis=0).min() * 2
    assert choose_probes(slopes[:, :7], seed=0) == tuple(range(7))
    assert choose_probes(np.zeros((2, 40)), seed=0) == choose_probes(np.zeros((2, 40)), seed=0)


# Losses


def test_losses_by_hand() -> None:
    counts = np.array([[1.0, 1.0], [2.0, 0.0]])
    assert mean_loss(np.array([0.2, 0.6]), counts).tolist() == pytest.approx([0.4, 0.2])
    logprob = np.array([-1.0, -3.0])
    assert allowances(Budget("nats", 0.1), logprob, counts).tolist() == pytest.approx([0.1, 0.1])
    # -2 / 0.99 lies 0.0202 below -2; -1 / 0.99 lies 0.0101 below -1.
    relative = allowances(Budget("relative", 0.01), logprob, counts)
    assert relative.tolist() == pytest.approx([2 / 99, 1 / 99])
    tokens = np.array([[*range(1, 11)], [*range(11, 19), math.nan, math.nan]], dtype=float)
    # Of 18 values the 95th percentile is the 18th (0.95 * 18 = 17.1), of the first ten the 10th.
    assert mean_loss(tokens, counts).tolist() == [18.0, 10.0]
    assert mean_loss(np.array([0.2, math.nan]), counts).tolist() == [math.inf, math.inf]
    tokens[0, 0] = math.inf
    assert mean_loss(tokens, counts).tolist() == [math.inf, math.inf]


# The shape in a plane


def test_the_shape_has_the_two_boundaries_of_the_direction(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    options: dict[str, Any] = {"budget": "nats=0.1", "n_bootstrap": 50}
    shape = sl.boundary_shape(llama, many, directions, layer=2, n_angles=8, **options)
    table = shape.table
    assert list(table.columns) == [column.name for column in SHAPE_COLUMNS]
    assert table.angle.tolist() == [45.0 * i for i in range(8)]
    row = sl.find_boundary(llama, many, directions, layers=[2], **options).layers.iloc[0]
    assert table.boundary[0] == pytest.approx(row.boundary_pos, rel=0.03)
    assert table.boundary[4] == pytest.approx(-row.boundary_neg, rel=0.03)
    np.testing.assert_allclose(np.hypot(table.x, table.y), table.boundary)
    assert table.y[2] == pytest.approx(table.boundary[2])
    assert table.attrs["radius_ratio"] == pytest.approx(table.boundary.max() / table.boundary.min())
    assert table.attrs["radius_ratio"] > 1.05
    assert float(shape.direction @ shape.orthogonal) == pytest.approx(0, abs=1e-6)
    turned = replace(
        directions,
        vectors=torch.stack(
            [
                shape.orthogonal if name == "blocks.2.hook_resid_post" else directions[name]
                for name in directions.hook_names
            ]
        ),
    )
    across = sl.find_boundary(llama, many, turned, layers=[2], **options).layers.iloc[0]
    assert table.boundary[2] == pytest.approx(across.boundary_pos, rel=0.03)


def test_the_main_orthogonal_direction_by_hand() -> None:
    """Without their first component the differences are (0, 1, 0), (0, 2, 0) and (0, 0, 1)."""
    differences = torch.tensor([[5.0, 1, 0], [7, 2, 0], [3, 0, 1]], dtype=torch.float64)
    direction = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    found = main_orthogonal(differences, direction)
    torch.testing.assert_close(found, torch.tensor([0.0, 1, 0], dtype=torch.float64))
    with pytest.raises(DirectionError, match="no plane is left"):
        main_orthogonal(torch.outer(torch.tensor([1.0, 2.0]).double(), direction), direction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "0,1"}, "one hook"),
        ({"layer": 2, "n_angles": 2}, "n_angles"),
        ({"layer": 2, "search_range": -1}, "search_range"),
    ],
)
def test_a_shape_without_meaning_is_refused(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: Directions,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SweepError, match=message):
        sl.boundary_shape(llama, many, directions, **options)


def test_an_overflow_is_beyond_the_boundary(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is NaN from some coefficient on bounds the search from above."""
    real = coherence.run_cells

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        for cells in real(*args, **kwargs):
            yield [
                replace(cell, logprob=cell.logprob * math.nan) if cell.coefficient > 2 else cell
                for cell in cells
            ]

    monkeypatch.setattr(coherence, "run_cells", overflowing)
    row = sl.find_boundary(
        llama, many, directions, layers=[4], budget="nats=50", n_bootstrap=50
    ).layers.iloc[0]
    assert row.boundary_pos == pytest.approx(2, rel=0.3)
