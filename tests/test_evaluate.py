"""The comparison: its numbers by bare hooks, its nulls, its intervals, its verdicts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import sampled

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.prompts import Message
from steerlens.directions.methods import null_directions, null_vectors
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import tokenize_items, tokenize_prompt
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import Budget, label_logprob
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.effects import damages, distinct_3, mean_distinct_3, preference_gaps
from steerlens.measure.equal_damage import CompareSettings, Measured
from steerlens.measure.linearised import Linearised, linearise
from steerlens.measure.nulls import NullEffects, Screen
from steerlens.measure.verdicts import (
    Inference,
    effect_columns,
    methods_table,
    verdict,
    with_verdicts,
)
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.tables import (
    COMPARISON_COLUMNS,
    SUMMARY_COLUMNS,
    to_frame,
)

HOOK = resid_post(1)
WORDS = "walk sun rain soup bread night day kind rude it".split()


def make_items(start: str, n: int = 10) -> PreferenceItems:
    return PreferenceItems(
        tuple(
            PreferenceItem(f"{start} {word}", "warm and good", "so cold", word)
            for word in WORDS[:n]
        ),
        start,
    )


@pytest.fixture(scope="module")
def items() -> PreferenceItems:
    return make_items("the river was")


@pytest.fixture(scope="module")
def neutral(llama: Any) -> list[str]:
    return [sampled(llama, "the river", 9, seed=100 + i) for i in range(16)]


@pytest.fixture(scope="module")
def compared(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> Comparison:
    return compare(
        llama,
        many,
        items,
        methods=["mean_diff", "gradient_mean", "random"],
        layers=[1, 3],
        train_items=make_items("you said"),
        off_target={"other": make_items("I felt", 4)},
        neutral=neutral,
        n_null=4,
        n_bootstrap=100,
    )


@pytest.fixture(scope="module")
def small(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> Callable[..., Comparison]:
    """A comparison of one method at one layer; what is given overrides that."""
    usual = {"methods": ["mean_diff"], "layers": [1], "neutral": neutral, "n_null": 2}

    def run(
        pairs: sl.ContrastivePairs = many, items: PreferenceItems = items, **options: Any
    ) -> Comparison:
        return compare(llama, pairs, items, **usual | {"n_bootstrap": 10} | options)

    return run


UNSTEERED = torch.zeros(32)


def logprob(
    model: Any, prompt: Any, text: str, vector: torch.Tensor = UNSTEERED, c: float = 0.0
) -> float:
    tokenized = tokenize_prompt(model, prompt, text)
    ids = torch.tensor([tokenized.prompt + tokenized.continuation])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(tokenized.prompt) :] = True
    with inference(model), sl.steer(model, {HOOK: vector}, c):
        return float(label_logprob(model(ids, return_type="logits"), ids, mask)[0])


def gap(model: Any, prompt: Any, *steered: Any) -> float:
    """By how much the positive continuation of `make_items` is likelier, by bare hooks."""
    texts = ("warm and good", "so cold")
    up, down = (logprob(model, prompt, text, *steered) for text in texts)
    return up - down


def test_gaps_are_those_of_bare_hooks(
    llama: Any, directions: sl.Directions, items: PreferenceItems
) -> None:
    job = Job(HOOK, directions[HOOK], (2.0, -1.0), resid_post(2))
    first = Job(resid_post(0), directions[resid_post(0)], (1.0,), resid_post(2))
    unsteered, found = preference_gaps(Engine(llama, 3), items, [job, first])
    for i, item in enumerate(items):
        for c, value in ((0.0, unsteered[i]), (2.0, found[0][0, i]), (-1.0, found[0][1, i])):
            assert value == pytest.approx(gap(llama, item.prompt, directions[HOOK], c), abs=1e-5)
    assert found[1].shape == (1, 10)


def test_damage_by_bare_hooks(llama: Any, directions: sl.Directions, neutral: list[str]) -> None:
    texts = [tokenize_prompt(llama, text) for text in neutral[:4]]
    job = Job(HOOK, directions[HOOK], (4.0,), resid_post(2))
    ((found,),) = damages(Engine(llama), texts, [job])
    divergences, lost = [], []
    for text in texts:
        ids = torch.tensor([text.prompt])
        with inference(llama):
            plain = llama(ids)[0, :-1].log_softmax(-1)
            with sl.steer(llama, {HOOK: directions[HOOK]}, 4.0):
                steered = llama(ids)[0, :-1].log_softmax(-1)
        divergences += (plain.exp() * (plain - steered)).sum(-1).tolist()
        taken = ids[0, 1:, None]
        lost.append(float((plain.gather(1, taken) - steered.gather(1, taken)).mean()))
    assert found.kl == pytest.approx(float(np.mean(divergences)), rel=1e-4)
    assert found.kl_p95 == pytest.approx(float(np.percentile(divergences, 95)), rel=1e-4)
    assert found.degradation == pytest.approx(float(np.mean(lost)), rel=1e-4)


def test_distinct_3_by_hand() -> None:
    assert distinct_3([1, 2, 3, 1, 2, 3]) == pytest.approx(3 / 4)
    assert distinct_3([1, 2, 3, 4]) == 1
    assert math.isnan(distinct_3([1, 2]))


# The table


def test_every_method_spends_the_same_budget(compared: Comparison) -> None:
    table = compared.table
    assert list(table.columns) == [column.name for column in COMPARISON_COLUMNS]
    assert table.method.tolist() == ["mean_diff"] * 2 + ["gradient_mean"] * 2 + ["random"] * 2
    assert (table.coefficient > 0).all()
    # Set on one half of the neutral texts, measured on the other.
    assert table.kl_nats.between(0.06, 0.16).all()
    assert table.n_items.eq(10).all()
    assert table.n_null.isin([4, 999]).all()
    assert (table.n_null == 999).equals(table.null_by == "linearised")
    assert not table.isna().any(axis=None)
    assert table.attrs["forward_equivalents"] > 10


def test_the_effect_is_the_change_of_the_gap_at_the_coefficient(
    llama: Any, compared: Comparison, items: PreferenceItems
) -> None:
    row = compared.table.iloc[0]
    steered = compared.directions["mean_diff"][HOOK], row.coefficient
    changes = [gap(llama, item.prompt, *steered) - gap(llama, item.prompt) for item in items]
    assert row.effect == pytest.approx(float(np.mean(changes)), abs=1e-4)
    assert compared.effects[f"mean_diff @ {HOOK}"].tolist() == pytest.approx(changes, abs=1e-4)
    assert row.effect_ci_low < row.effect < row.effect_ci_high


def test_the_layer_is_chosen_on_the_training_items(compared: Comparison) -> None:
    table = compared.table
    for _, rows in table.groupby("method"):
        assert rows.is_chosen.sum() == 1
        assert rows[rows.is_chosen].train_effect.item() == rows.train_effect.max()
    summary = compared.summary
    assert list(summary.columns) == [column.name for column in SUMMARY_COLUMNS]
    assert summary.effect.is_monotonic_decreasing
    assert summary["rank"].tolist() == [1, 2, 3]
    assert ((summary.rank_low <= summary["rank"]) & (summary["rank"] <= summary.rank_high)).all()


def test_the_same_seed_gives_the_same_table(small: Callable[..., Comparison]) -> None:
    one, again, other = (
        small(methods=["mean_diff", "shuffled"], n_bootstrap=50, seed=seed).table
        for seed in (0, 0, 1)
    )
    assert one.to_csv() == again.to_csv()
    assert one.to_csv() != other.to_csv()
    # Without training items no layer is chosen.
    assert not one.is_chosen.any()
    assert one.train_effect.isna().all()


def test_a_budget_that_is_not_reached_is_said(small: Callable[..., Comparison]) -> None:
    found = small(budget="nats=50").table.iloc[0]
    assert found.coefficient == math.inf
    assert math.isnan(found.effect)
    assert found.verdict == "budget not reached"


def test_the_coherence_boundary_as_a_budget(
    llama: Any, many: sl.ContrastivePairs, small: Callable[..., Comparison]
) -> None:
    options: dict[str, Any] = {"layers": [1], "budget": "relative=0.02", "n_bootstrap": 10}
    found = small(on="positive", **options)
    boundary = sl.find_boundary(llama, many, found.directions["mean_diff"], **options).layers
    # Two searches with other probes, each right to a few per cent.
    assert found.table.coefficient[0] == pytest.approx(boundary.boundary_pos[0], rel=0.05)


def test_the_persona_in_the_prompt_is_a_baseline(
    llama: Any, small: Callable[..., Comparison]
) -> None:
    def chat(system: str, user: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    pairs = sl.ContrastivePairs.from_lists(
        [chat("you are cheerful", f"the {word}") for word in WORDS],
        [chat("you are gloomy", f"the {word}") for word in WORDS],
    )
    plain = make_items("said")
    chats = PreferenceItems(
        tuple(replace(item, prompt=(Message("user", str(item.prompt)),)) for item in plain)
    )
    found = small(pairs, chats, train_items=make_items("you said"), n_bootstrap=50)
    row = found.table.iloc[-1]
    assert (row.method, row.layer, row.verdict) == ("prompt", -1, "baseline")
    persona = Message("system", "you are cheerful")
    changes = [gap(llama, (persona, *i.prompt)) - gap(llama, i.prompt) for i in chats]
    assert row.effect == pytest.approx(float(np.mean(changes)), abs=1e-5)
    assert "prompt" in found.summary.method.tolist()
    assert set(found.effects.columns) == {"id", f"mean_diff @ {HOOK}", "prompt"}


# Arithmetic


def assumed(n_items: int, *, n_fitted: int = 40, margin: float = 0.1) -> Inference:
    settings = CompareSettings(("mean_diff",), "kl=0.1", "neutral", 20, None, 4.0, 200, 0, None)
    return Inference(settings, tuple(range(n_items)), n_fitted, margin)


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
    """The halves add as the roots of sums of squares do; t(0.975, 39) is 2.0227."""
    values = np.array([1.0, 2.0, 4.0, 5.0, 3.0, 3.0, 2.0, 4.0, 1.0, 5.0])
    measured = Measured(np.array([1.0]), values[None])
    alone, wide = (effect_columns(measured, assumed(10), spread) for spread in (math.nan, 2.0))
    assert (alone["interval_over"], wide["interval_over"]) == ("items", "items and pairs")
    for end, sign in (("low", -1), ("high", 1)):
        half = abs(alone[f"effect_ci_{end}"] - 3)
        expected = 3 + sign * math.hypot(half, 2.0227 * 2)
        assert wide[f"effect_ci_{end}"] == pytest.approx(expected, abs=1e-3)
    # Four times the groups needed where the effect is half the smallest that could be shown.
    half_as_large = replace(measured, changes=measured.changes - 3 + alone["smallest_effect"] / 2)
    assert effect_columns(half_as_large, assumed(10))["groups_needed"] in (40, 41)


@pytest.mark.parametrize(
    ("low", "high", "p", "n_fitted", "expected"),
    [
        (0.2, 1.0, 0.01, 40, "effect"),
        (-1.0, -0.2, 0.01, 40, "reversed"),
        (0.2, 1.0, 0.2, 40, "no more than a null"),
        (0.2, 1.0, 0.2, 5, "too few groups"),
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
    table = to_frame(rows, COMPARISON_COLUMNS, {})
    effects = pd.DataFrame({f"{name} @ {HOOK}": values for name, values in by_method.items()})
    found = methods_table(table, effects, assumed(10)).set_index("method")
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
    assert methods_table(table[1:], effects, assumed(10)).empty


# Nulls


@pytest.fixture(scope="module")
def linear(
    double: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> Linearised:
    texts = [tokenize_prompt(double, text) for text in neutral]
    return linearise(
        Engine(double), items, texts, [HOOK], budget=Budget.parse("kl=1e-8"), allowance=1e-8, seed=0
    )


def test_linearised_effects_are_those_of_small_pushes(
    double: Any, many: sl.ContrastivePairs, items: PreferenceItems, linear: Linearised
) -> None:
    """By bare hooks, at the coefficient that the curvature predicts for a divergence of 1e-8."""
    differences = sl.collect_differences(double, many, layers=[1])
    vectors = null_vectors(differences, n=2, seed=0)["shuffled"][:, 0]
    found = linear.effects(HOOK, vectors)
    curvature = (vectors @ linear.text.scores[0].double().T).square().mean(dim=1)
    for vector, effects, bend in zip(vectors, found, curvature.tolist(), strict=True):
        c = math.sqrt(2e-8 / bend)
        exact = [gap(double, item.prompt, vector, c) - gap(double, item.prompt) for item in items]
        assert effects.tolist() == pytest.approx(exact, rel=1e-2, abs=1e-7)
        assert np.abs(effects).max() > 1e-5


def test_the_first_null_vectors_are_the_null_directions(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    differences = sl.collect_differences(llama, many, layers=[1])
    drawn, vectors = (make(differences, n=3, seed=5) for make in (null_directions, null_vectors))
    for kind, some in drawn.items():
        for one, row in zip(some, vectors[kind][:, 0], strict=True):
            torch.testing.assert_close(one[HOOK].double(), row, atol=1e-6, rtol=1e-5)


def screen(linear: Linearised, many: sl.ContrastivePairs, model: Any, noise: float) -> Screen:
    """Nulls whose exact effects are the linearised ones and some noise."""
    differences = sl.collect_differences(model, many, layers=[1])
    vectors = null_vectors(differences, n=40, seed=0)
    generator = np.random.default_rng(0)
    exact = {}
    for kind, rows in vectors.items():
        effects = linear.effects(HOOK, rows[:20, 0]).mean(axis=1, keepdims=True)
        exact[kind] = effects + noise * effects.std() * generator.standard_normal((20, 1))
    return Screen(linear, exact, vectors)


def test_linearised_nulls_are_used_where_they_are_right_only(
    double: Any, many: sl.ContrastivePairs, linear: Linearised
) -> None:
    direction = sl.fit(double, many, layers=[1])
    for noise, how, n_null in ((0.0, "linearised", 40), (1.0, "exact", 20)):
        found = screen(linear, many, double, noise).columns({HOOK: direction[HOOK]}, {HOOK: 1.0})
        assert (found[HOOK]["null_by"], found[HOOK]["n_null"]) == (how, n_null)
    # 1 nat is beyond all twenty nulls of each kind.
    assert found[HOOK]["p_value"] == found[HOOK]["p_layers"] == pytest.approx(1 / 21)


def test_the_spread_of_refits_is_that_of_resampled_groups(
    double: Any, many: sl.ContrastivePairs, linear: Linearised
) -> None:
    given, differences = (
        screen(linear, many, double, 0.0),
        sl.collect_differences(double, many, layers=[1]),
    )
    spread = given.spreads(differences, "mean_diff", seed=0)[HOOK]
    assert spread > 0
    # One group has nothing to resample, and pairs that come in fours have fewer.
    alone = replace(differences, groups=(0,) * len(many))
    assert given.spreads(alone, "mean_diff", seed=0)[HOOK] == pytest.approx(0, abs=1e-12)
    fours = replace(differences, groups=tuple(i // 4 for i in range(len(many))))
    assert given.spreads(fours, "mean_diff", seed=0)[HOOK] != pytest.approx(spread, rel=0.01)
    for method in ("random", "gradient_mean"):
        assert given.spreads(differences, method, seed=0) == {}
    assert screen(linear, many, double, 1.0).spreads(differences, "mean_diff", seed=0) == {}


def test_the_harder_kind_of_null_decides() -> None:
    near, far = np.linspace(-1, 1, 41)[:, None], np.linspace(-3, 3, 41)[:, None]
    row = NullEffects("exact", (HOOK,), np.array([2.0]), {"a": near, "b": far}).columns()[HOOK]
    # Beyond 2 there are 14 of the 41.
    assert row["p_value"] == row["p_layers"] == pytest.approx(15 / 42)
    assert (row["null_low"], row["null_high"]) == pytest.approx((-2.85, 2.85))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, "at least one method"),
        ({"methods": ["best"]}, "there are mean_diff"),
        ({"n_null": 1}, "n_null"),
        ({"budget": "loss=1"}, "budget"),
        ({"neutral": []}, "list of at least 4 texts"),
        ({"neutral": ["the sun", "a river"]}, "4 neutral texts"),
        ({"neutral": ["the sun", "a river", "so", "it is", ""]}, "text 5"),
        ({"train_items": make_items("the river was")}, "both in the training"),
        ({"methods": ["optimised_promotion"]}, "give items"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    small: Callable[..., Comparison], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small(**options)


def test_items_that_tokenise_alike_are_refused(llama: Any) -> None:
    alike = PreferenceItems(
        (PreferenceItem("the sun", "zzz", "qqq", "1"), PreferenceItem("the day", "so", "it", "2"))
    )
    with pytest.raises(InputError, match="item '1' tokenise to the same ids"):
        tokenize_items(llama, alike)


def test_overflow_is_undefined_and_not_no_effect() -> None:
    changes = np.array([[1.0, 2.0], [math.nan, 1.0]])
    row = effect_columns(Measured(np.array([-1.0, 1.0]), changes), assumed(2))
    assert list(row) == ["effect"]
    assert verdict(row, assumed(2)) == "undefined"


def test_continuations_stay_within_the_context(gpt2: Any) -> None:
    """60 of 64 tokens are the prompt's: four are left, then two, which are no trigram."""
    vector = {resid_post(1): torch.zeros(32)}
    for n_words, expected in ((58, True), (60, False)):
        prompt = tokenize_prompt(gpt2, "the " * n_words + "sun")
        found = mean_distinct_3(Engine(gpt2), [prompt], vector, 1.0)
        assert math.isfinite(found) == expected


def test_a_kind_without_nulls_leaves_the_rank_unknown() -> None:
    """`test_the_harder_kind_of_null_decides` is the control."""
    known, unknown = np.linspace(-1, 1, 21)[:, None], np.full((21, 1), math.nan)
    for draws in ({"a": known, "b": unknown}, {"a": unknown, "b": known}):
        row = NullEffects("exact", (HOOK,), np.array([2.0]), draws).columns()[HOOK]
        assert row["n_null"] == 0
        for name in ("p_value", "p_layers", "null_low", "null_high"):
            assert math.isnan(row[name]), name
