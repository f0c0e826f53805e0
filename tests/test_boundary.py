"""The coherence boundary against brute force on tiny models."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bounded, sampled

import steerlens as sl
from steerlens.data.reading import read_texts
from steerlens.directions.directions import Directions
from steerlens.engine.batches import make_batches
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells, run_baseline
from steerlens.engine.tokenization import (
    TokenizedPrompt,
    fingerprint,
    tokenize_pairs,
    tokenize_prompt,
)
from steerlens.engine.workload import Job, Workload
from steerlens.errors import HookError, InputError
from steerlens.loss import Budget
from steerlens.measure import coherence
from steerlens.measure.coherence import ROLLOUT_TOKENS, check_rollouts, weighted_quantile
from steerlens.tables import COLUMNS


def assert_first_crossing(
    boundary: float,
    model: Any,
    prompts: tuple[TokenizedPrompt, ...],
    direction: torch.Tensor,
    hook_name: str,
    limit: float,
    budget: str,
) -> None:
    """By the plain loop: within the budget up to 5% below the boundary, beyond it 5% above."""
    sign = math.copysign(1, boundary)
    grid = np.geomspace(limit * 2e-3, limit, 12)
    if math.isfinite(boundary):
        bracket = [0.95 * abs(boundary), 1.05 * abs(boundary)]
        grid = np.array([*grid[grid < bracket[0]], *bracket])
    parsed = Budget.parse(budget)
    workload = Workload(make_batches(model, prompts, 16), (), -1, "all", parsed.is_divergence)
    engine = Engine(model)
    baseline = run_baseline(engine, workload, (hook_name,)).logprob.double().mean()
    job = Job(hook_name, direction, tuple(float(sign * c) for c in grid), hook_name)
    losses = []
    for cell in plain_cells(engine, workload, job):
        loss = float(baseline - cell.logprob.double().mean())
        if parsed.kind == "kl":
            loss = float(cell.kl.double().nanmean(dim=1).mean())
        if parsed.kind == "kl_p95":
            tokens = cell.kl.double().numpy()
            loss = float(weighted_quantile(tokens, np.ones((1, len(tokens))), 0.95)[0])
        losses.append(loss)
    is_beyond = [loss > parsed.allowance(float(baseline)) for loss in losses]
    assert is_beyond == [False] * (len(grid) - 1) + [math.isfinite(boundary)]


@pytest.mark.parametrize("budget", ["relative=0.02", "nats=0.1", "kl=0.05", "kl_p95=0.2"])
def test_boundaries_equal_brute_force_on_a_grid(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, budget: str, bounded: Bounded
) -> None:
    # Every layer at one budget, and every budget at two layers.
    options: dict[str, Any] = {"n_bootstrap": 100}
    if budget != "nats=0.1":
        options["layers"] = [1, 3]
    found = bounded(budget=budget, **options)
    assert list(found.layers.columns) == [column.name for column in COLUMNS["layers"]]
    assert list(found.curves.columns) == [column.name for column in COLUMNS["boundary"]]
    prompts = tokenize_pairs(llama, many).positive
    searched = found.layers.attrs["searched"]
    n_finite = 0
    for row in found.layers.to_dict("records"):
        name = row["hook_name"]
        assert searched[name] == pytest.approx(4 * row["resid_norm"])
        for side, sign in (("pos", 1), ("neg", -1)):
            boundary = row[f"boundary_{side}"]
            assert sign * boundary > 0
            assert_first_crossing(
                boundary, llama, prompts, directions[name], name, searched[name], budget
            )
            if math.isfinite(boundary):
                n_finite += 1
                low, high = row[f"boundary_{side}_ci_low"], row[f"boundary_{side}_ci_high"]
                # A percentile moves in steps, so its interval may end at the boundary itself.
                assert low < boundary * (1 + sign * 1e-4)
                assert boundary * (1 - sign * 1e-4) < high
                # Twenty prompts that begin alike share a percentile; their means differ.
                assert budget.startswith("kl_p95") or high - low > 0.01 * abs(boundary)
    assert n_finite >= (6 if budget == "nats=0.1" else 3)
    # Control: half the budget is reached earlier, at every layer and sign.
    kind, value = budget.split("=")
    tighter = bounded(budget=f"{kind}={float(value) / 2}", **options).layers
    assert (tighter.boundary_pos.abs() < found.layers.boundary_pos.abs()).all()
    assert (tighter.boundary_neg.abs() < found.layers.boundary_neg.abs()).all()


def test_other_texts_have_other_boundaries(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, bounded: Bounded
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
        layers = bounded(layers=[2], on=on, budget="nats=0.1", n_bootstrap=50).layers
        row = layers.to_dict("records")[0]
        limit = layers.attrs["searched"][name]
        assert layers.attrs["text"] == fingerprint(prompts)
        for side, sign in (("pos", 1), ("neg", -1)):
            boundary = row[f"boundary_{side}"]
            assert sign * boundary > 0
            assert_first_crossing(
                boundary, llama, prompts, directions[name], name, limit, "nats=0.1"
            )
        found[row["boundary_on"]] = row["boundary_pos"]
    assert sorted(found) == ["negative", "positive", "texts"]
    assert len({round(value, 3) for value in found.values()}) == 3
    assert fingerprint(tokenized.positive) != fingerprint(tokenized.negative)


def test_the_projection_at_the_boundary_is_that_of_its_cell(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, bounded: Bounded
) -> None:
    layers = bounded(budget="nats=0.1", n_bootstrap=50, with_projection=True).layers
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


def test_a_boundary_beyond_the_range_is_infinite(bounded: Bounded) -> None:
    options: dict[str, Any] = {"layers": [0], "budget": "nats=0.1", "n_bootstrap": 50}
    near = bounded(search_range=1e-3, **options).layers.iloc[0]
    assert near.boundary_pos == math.inf
    assert near.boundary_neg == -math.inf
    assert near.boundary_pos_ci_high == math.inf
    assert near.boundary_neg_ci_low == -math.inf
    assert math.isnan(near.projection_at_boundary)
    assert not near.prediction_trusted
    far = bounded(**options).layers.iloc[0]
    assert math.isfinite(far.boundary_pos)
    assert far.boundary_neg < 0 < far.boundary_pos


def test_at_the_ends_of_an_interval_the_loss_is_just_within_or_just_beyond(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, bounded: Bounded
) -> None:
    """Measured there, the upper end of the loss is the allowance at low, the lower end at high.

    An end that lies far from all that was measured is drawn on, and may miss by more.
    """
    table = bounded(budget="nats=0.1").layers
    misses = []
    for row in table.to_dict("records"):
        far, near, low, high = (
            row[f"boundary_{end}"]
            for end in ("neg_ci_low", "neg_ci_high", "pos_ci_low", "pos_ci_high")
        )
        assert far < row["boundary_neg"] < near < 0 < low < row["boundary_pos"] < high < math.inf
        ends = [far, near, low, high]
        cells = sl.sweep(llama, many, directions, layers=[row["layer"]], coefficients=ends).table
        misses += [*cells.degradation_ci_high[[1, 2]], *cells.degradation_ci_low[[0, 3]]]
    misses = np.abs(np.array(misses) / 0.1 - 1)
    assert len(misses) == 20
    assert np.median(misses) < 0.05
    assert (misses < 0.1).mean() >= 0.7


def test_the_interval_is_wider_where_pairs_repeat_or_share_a_group(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, bounded: Bounded
) -> None:
    """Every positive prompt twice; where the negative ones differ, groups may tell them apart."""
    options: dict[str, Any] = {"layers": [4], "budget": "nats=0.1"}

    def width(n_groups: int, more: str = "") -> float:
        twice = sl.ContrastivePairs(
            tuple(
                replace(pair, id=str(i), group=str(i % n_groups), negative=pair.negative + end)
                for i, (pair, end) in enumerate((p, e) for e in ("", more) for p in many)
            )
        )
        row = sl.find_boundary(llama, twice, directions, **options).layers.iloc[0]
        return math.log(row.boundary_pos_ci_high / row.boundary_pos_ci_low)

    once = bounded(**options).layers.iloc[0]
    expected = math.log(once.boundary_pos_ci_high / once.boundary_pos_ci_low)
    for wide in (width(20, " so"), width(40)):
        assert wide == pytest.approx(expected, rel=0.1)
        assert wide > 1.2 * width(40, " so")


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
    with pytest.raises(InputError, match="all positions"):
        sl.find_boundary(
            llama, few, directions, budget="rollout_kl_p95=1", steered_positions="prompt"
        )
    # The context is 64 tokens: 40 and a rollout of 24 fit, one more does not.
    fits, too_long = (
        tuple(tokenize_prompt(llama, "the " * n + "sun") for n in (3, 39 + extra - 1))
        for extra in (0, 1)
    )
    assert max(map(len, fits)) == 40
    check_rollouts(llama, fits, Budget("rollout_kl_p95", 1.0))
    check_rollouts(llama, too_long, Budget("kl_p95", 1.0))
    with pytest.raises(InputError, match="24 tokens, and the longest prompt has 41"):
        check_rollouts(llama, too_long, Budget("rollout_kl_p95", 1.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "nats=0"}, InputError, "leaves no room"),
        ({"budget": "kl=-1"}, InputError, "expected a budget"),
        ({"search_range": 0}, InputError, "search_range"),
        ({"search_range": math.inf}, InputError, "search_range"),
        ({"n_bootstrap": 1}, InputError, "n_bootstrap"),
        ({"seed": -1}, InputError, "seed"),
        ({"on": "sideways"}, InputError, "'sideways'"),
        ({"on": ()}, InputError, "no texts"),
        ({"on": ("the", "")}, InputError, "no tokens"),
        ({"layers": [9]}, HookError, "layer 9"),
        ({"steered_positions": "last"}, InputError, "continuation"),
    ],
)
def test_what_has_no_meaning_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, bounded: Bounded
) -> None:
    with pytest.raises(error, match=message):
        bounded(**options)


def test_an_overflow_is_beyond_the_boundary(
    monkeypatch: pytest.MonkeyPatch, bounded: Bounded
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
    row = bounded(layers=[4], budget="nats=50", n_bootstrap=50).layers.iloc[0]
    assert row.boundary_pos == pytest.approx(2, rel=0.3)


def test_a_budget_below_rounding_is_warned_of(bounded: Bounded) -> None:
    options: dict[str, Any] = {"layers": [2], "n_bootstrap": 10}
    with pytest.warns(RuntimeWarning, match="less than the rounding of a float32 model"):
        bounded(budget="kl=1e-8", **options)
    bounded(budget="kl=1e-5", **options)


def test_a_text_without_continuations_is_not_steered_there(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    ended = sl.ContrastivePairs(
        tuple(replace(pair, continuation=" the sun") for pair in many), "ended"
    )
    options: dict[str, Any] = {"layers": [2], "n_bootstrap": 10, "budget": "nats=0.1"}
    with pytest.raises(InputError, match="'negative' has no continuations"):
        sl.find_boundary(
            llama, ended, directions, on="negative", steered_positions="last", **options
        )
    sl.find_boundary(llama, ended, directions, steered_positions="last", **options)


def test_a_marked_file_is_the_same_text(tmp_path: Path) -> None:
    """A byte order mark, the line ends of another system, and a line with a form feed in it."""
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(b"the river\nwas so\x0cgood\n")
    marked.write_bytes(b"\xef\xbb\xbfthe river\r\nwas so\x0cgood\r\n")
    assert read_texts(plain) == read_texts(marked) == ("the river", "was so\x0cgood")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        *((f"{kind}=1e-300", "expected") for kind in ("relative", "nats", "kl")),
        *((f"{kind}=0", "budget") for kind in ("relative", "nats", "kl")),
        *(
            (f"{kind}={value}", "expected a budget")
            for kind in ("nats", "kl")
            for value in ("1e300", "inf", "nan", "-1")
        ),
    ],
)
def test_a_budget_that_no_search_can_meet_is_refused(
    llama: Any, many: sl.ContrastivePairs, directions: Directions, budget: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sl.find_boundary(llama, many, directions, layers=[2], budget=budget, n_bootstrap=20)
