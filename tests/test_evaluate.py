"""The comparison: its numbers by bare hooks, its nulls, its intervals, its verdicts."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import sampled

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.prompts import Message
from steerlens.directions.gradient_rows import LossGradients
from steerlens.directions.methods import null_directions, null_vectors
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import (
    TokenizedPrompt,
    tokenize_items,
    tokenize_pairs,
    tokenize_prompt,
)
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import Budget, label_logprob
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.comparison_inputs import ItemSets, split_texts
from steerlens.measure.effects import Damage, damages, distinct_3, mean_distinct_3, preference_gaps
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
            PreferenceItem(f"{start} {word}", " warm and good", " so cold", word)
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
    texts = (" warm and good", " so cold")
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


def damage_of_bare_hooks(
    model: Any, texts: Sequence[TokenizedPrompt], vector: torch.Tensor, c: float
) -> list[float]:
    """Mean and 95th percentile of KL(unsteered || steered) over labels, and their degradation."""
    divergences, lost = [], []
    for text in texts:
        ids, labels = torch.tensor([text.ids]), torch.tensor(text.label_tokens)
        with inference(model):
            plain = model(ids)[0, labels - 1].log_softmax(-1)
            with sl.steer(model, {HOOK: vector}, c):
                steered = model(ids)[0, labels - 1].log_softmax(-1)
        divergences += (plain.exp() * (plain - steered)).sum(-1).tolist()
        taken = ids[0, labels, None]
        lost.append(float((plain.gather(1, taken) - steered.gather(1, taken)).mean()))
    p95 = float(np.percentile(divergences, 95))
    return [float(np.mean(divergences)), p95, float(np.mean(lost))]


def test_damage_by_bare_hooks(llama: Any, directions: sl.Directions, neutral: list[str]) -> None:
    texts = [tokenize_prompt(llama, text) for text in neutral[:4]]
    job = Job(HOOK, directions[HOOK], (4.0,), resid_post(2))
    ((found,),) = damages(Engine(llama), texts, [job])
    expected = damage_of_bare_hooks(llama, texts, directions[HOOK], 4.0)
    assert [found.kl, found.kl_p95, found.degradation] == pytest.approx(expected, rel=1e-4)


def written_by(model: Any, prompt: str, n_tokens: int) -> TokenizedPrompt:
    """The prompt with the likeliest tokens after it, one by one."""
    tokenized = tokenize_prompt(model, prompt)
    ids = list(tokenized.prompt)
    with inference(model):
        while len(ids) < len(tokenized) + n_tokens and ids[-1] != model.tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return replace(tokenized, continuation=tuple(ids[len(tokenized) :]))


def test_damage_is_that_of_both_texts_and_signs(
    llama: Any, compared: Comparison, neutral: list[str]
) -> None:
    """On the second half of neutral texts, and of what the model writes after training items."""
    row = compared.table.iloc[0]
    texts = {
        "": [tokenize_prompt(llama, text) for text in neutral[8:]],
        "own_": [written_by(llama, f"you said {word}", 32) for word in WORDS[5:]],
    }
    for (name, prompts), (sign, c) in product(texts.items(), (("", 1), ("neg_", -1))):
        steered = compared.directions["mean_diff"][HOOK], c * row.coefficient
        kl, _, degradation = damage_of_bare_hooks(llama, prompts, *steered)
        assert row[f"{name}kl_{sign}nats"] == pytest.approx(kl, rel=1e-3)
        assert row[f"{name}degradation_{sign}nats"] == pytest.approx(degradation, abs=1e-5)
    assert row.kl_nats != pytest.approx(row.kl_neg_nats, rel=0.01)
    assert row.own_kl_nats != pytest.approx(row.kl_nats, rel=0.01)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("kl=2", 1.5), ("kl_p95=2", 2.5), ("nats=2", 0.5), ("nats=0", math.nan)],
)
def test_the_share_spent_is_that_of_what_the_budget_bounds(budget: str, expected: float) -> None:
    spent = Damage(kl=3.0, kl_p95=5.0, degradation=1.0).spent
    parsed = Budget.parse(budget)
    assert spent(parsed, parsed.allowance(-3.0)) == pytest.approx(expected, nan_ok=True)


def test_the_texts_that_the_model_writes(
    llama: Any, many: sl.ContrastivePairs, neutral: list[str]
) -> None:
    """Of different prompts, one of each group in turn, the budget gets half, none of a held-out."""
    train = PreferenceItems(
        tuple(
            PreferenceItem(f"{group} {word}", " warm and good", " so cold", f"{group} {i}", group)
            for group in WORDS[:8]
            for i, word in enumerate((WORDS[0], *WORDS[:5]))
        )
    )
    held_out = train[:2]  # one prompt
    sets = ItemSets(held_out, train[2:], {}, None)
    texts = split_texts(llama, many, sets, assumed(2).settings, neutral)
    first, second = texts.halves["own"]
    assert texts.calibration == first
    assert texts.damaged["own"] == second
    prompts = {text.prompt for text in (*first, *second)}
    assert len(first) == len(second) == 16
    assert len(prompts) == 32
    assert tokenize_items(llama, held_out)[0][0].prompt not in prompts
    assert all(0 < len(text.continuation) <= 32 for text in (*first, *second))
    words = [{str(text.source).split()[0] for text in half} for half in (first, second)]
    assert [len(of_half) for of_half in words] == [4, 4]
    assert not words[0] & words[1]
    # Without training items after the pairs' positive prompts.
    first, second = split_texts(
        llama, many, replace(sets, train=None), assumed(2).settings, neutral
    ).halves["own"]
    positive = tokenize_pairs(llama, many).positive
    assert [text.prompt for text in (*first, *second)] == [text.prompt for text in positive]
    with pytest.raises(InputError, match="2 different prompts, got 1 of the training items"):
        split_texts(llama, many, replace(sets, train=train[1:3]), assumed(2).settings, neutral)


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
    # Set on one half of the texts that the model wrote, measured on the other.
    assert table.own_kl_nats.between(0.06, 0.16).all()
    assert table.spent_neg.tolist() == pytest.approx((table.own_kl_neg_nats / 0.1).tolist())
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


@pytest.mark.parametrize(
    ("on", "budget"), [("own", "kl=0.1"), ("neutral", "kl=0.1"), ("positive", "relative=0.02")]
)
def test_the_coherence_boundary_as_a_budget(
    on: str,
    budget: str,
    llama: Any,
    many: sl.ContrastivePairs,
    small: Callable[..., Comparison],
    neutral: list[str],
) -> None:
    """On the first half of own or neutral text, or on all positive prompts."""
    options: dict[str, Any] = {"layers": [1], "budget": budget, "n_bootstrap": 10}
    found = small(on=on, **options)
    measured_on = many[: len(many) // 2] if on == "own" else many
    options |= {"own": {"labels": "own"}, "neutral": {"on": neutral[:8]}}.get(on, {})
    boundary = sl.find_boundary(llama, measured_on, found.directions["mean_diff"], **options).layers
    # Two searches from other evaluations, each right to a few per cent.
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


@pytest.mark.parametrize(
    ("prompt", "shared", "choice"),
    [
        (None, (0, 0, 0), "held out"),
        ("pair", (0, 0, 1), "in sample"),
        ("item", (2, 0, 0), "held out"),
    ],
)
def test_items_that_share_a_prompt_with_pairs_are_told(
    small: Callable[..., Comparison],
    many: sl.ContrastivePairs,
    prompt: str | None,
    shared: tuple[int, int, int],
    choice: str,
) -> None:
    """By the prompt, though items and pairs have groups of the same names."""
    items, train = make_items("the river was"), make_items("you said")
    if prompt == "pair":
        train = PreferenceItems((replace(train[0], prompt=many[0].positive), *train.items[1:]))
    if prompt == "item":
        seen = [replace(items[i], prompt=many[i].negative) for i in (0, 1)]
        items = PreferenceItems((*seen, *items.items[2:]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = small(many, items, train_items=train)
    told = [str(w.message) for w in caught if "share a prompt or persona" in str(w.message)]
    assert len(told) == any(shared)
    assert all("1 of 10 items" in text or "2 of 10 items" in text for text in told)
    names = ("n_items_fitted_on", "n_items_chosen_on", "n_choosing_items_fitted_on")
    for table in (found.table, found.summary):
        assert tuple(table.attrs[name] for name in names) == shared
        assert table.layer_choice.tolist() == [choice]


# Arithmetic


def assumed(n_items: int, *, n_fitted: int = 40, margin: float = 0.1) -> Inference:
    settings = CompareSettings(("mean_diff",), "kl=0.1", "own", 32, 20, None, 4.0, 200, 0, None)
    return Inference(settings, tuple(range(n_items)), tuple(range(n_fitted)), margin)


UNIT_SPREAD = np.tile([-1.0, 1.0], 25) * math.sqrt(49 / 50 * 39 / 40)
"""Fifty refits on 40 groups that vary with a standard deviation of 1."""


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
    table = to_frame(rows, COMPARISON_COLUMNS, {})
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
    of_each = {"groups": differences.pair_groups, "seed": 0}
    spread = given.refits(differences, "mean_diff", **of_each)[HOOK].std(ddof=1)
    assert spread > 0
    # On pairs that are nearly alike PCA is the mean; the groups drawn are the same for both.
    mean = (differences.positive - differences.negative).mean(dim=1, keepdim=True)
    alike = replace(differences, positive=differences.positive + 50 * mean)
    of_mean, of_pca, other = (
        given.refits(alike, method, groups=alike.pair_groups, seed=seed)[HOOK]
        for method, seed in (("mean_diff", 0), ("pca", 0), ("pca", 1))
    )
    assert np.corrcoef(of_mean, of_pca)[0, 1] > 0.9 > np.corrcoef(of_mean, other)[0, 1]
    # One group has nothing to resample, and pairs that come in fours have fewer.
    alone, fours = ((0,) * len(many), tuple(i // 4 for i in range(len(many))))
    assert given.refits(differences, "mean_diff", groups=alone, seed=0) == {}
    in_fours = given.refits(differences, "mean_diff", groups=fours, seed=0)[HOOK].std(ddof=1)
    assert in_fours != pytest.approx(spread, rel=0.01)
    for method, evidence in (("random", differences), ("optimised", None)):
        assert given.refits(evidence, method, **of_each) == {}
    assert screen(linear, many, double, 1.0).refits(differences, "mean_diff", **of_each) == {}


@pytest.mark.parametrize(
    "method", ["gradient_mean", "gradient_fisher+pooled", "fisher_pullback", "gradient_mean+on_pca"]
)
def test_gradients_are_refitted_without_a_pass(
    double: Any, many: sl.ContrastivePairs, linear: Linearised, method: str
) -> None:
    """Their rows are those of the pairs that were drawn; an axis is itself fitted on the pairs."""
    given = screen(linear, many, double, 0.0)
    n, scores = len(many), 2 * (method == "fisher_pullback")
    axis = "pca" if method.endswith("pca") else None

    def gradients(pairs: sl.ContrastivePairs) -> LossGradients:
        return sl.loss_gradients(double, pairs, layers=[1], axis=axis, n_scores=scores)

    groups = tuple(i // 2 for i in range(n))
    evidence = gradients(many)
    found = given.refits(evidence, method, groups=groups, seed=0)
    if axis:
        assert found == {}
        return
    drawn = np.random.default_rng(0).integers(0, n // 2, n // 2).tolist()
    rows = [i for g in drawn for i in (2 * g, 2 * g + 1)]
    again = gradients(
        sl.ContrastivePairs(tuple(replace(many[r], id=str(i)) for i, r in enumerate(rows)))
    )
    if scores:  # drawn once a pair, sample by sample
        both = [evidence.scores[:, sample * n :][:, rows] for sample in range(scores)]
        again = replace(again, scores=torch.cat(both, dim=1))
    expected = given.effects(HOOK, sl.fit_directions(again, method=method)[HOOK][None])[0]
    assert found[HOOK][0] == pytest.approx(expected, rel=1e-6)
    assert found[HOOK].std() > 1e-3 * abs(expected)


def test_nulls_that_are_run_and_linearised_ones_are_one_family() -> None:
    """999 at the first hook, 19 of them at the second: no null there can be below 1 in 20."""
    first, few = np.linspace(-1, 1, 999), np.full(999, math.nan)
    few[:19] = np.linspace(-1, 1, 19)
    draws = {"a": np.stack([first, few], axis=1)}

    def columns(*seen: float) -> list[dict[str, Any]]:
        hows, names = ("linearised", "exact"), (HOOK, resid_post(2))
        return [*NullEffects(hows, names, np.array(seen), draws).columns().values()]

    far = columns(2.0, 2.0)
    assert [row["null_by"] for row in far] == ["linearised", "exact"]
    assert [row["n_null"] for row in far] == [999, 19]
    assert [row["p_value"] for row in far] == pytest.approx([1 / 1000, 1 / 20])
    assert [row["p_layers"] for row in far] == pytest.approx([1 / 1000, 1 / 20 + 50 / 1000])
    assert [row["least_p"] for row in far] == [row["p_layers"] for row in far]
    near = columns(0.9, 0.0)[0]
    assert near["p_layers"] == pytest.approx(near["p_value"] + 2 / 20)
    assert near["least_p"] == pytest.approx(1 / 1000)


def test_the_harder_kind_of_null_decides() -> None:
    near, far = np.linspace(-1, 1, 41)[:, None], np.linspace(-3, 3, 41)[:, None]
    row = NullEffects(("exact",), (HOOK,), np.array([2.0]), {"a": near, "b": far}).columns()[HOOK]
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
        (
            PreferenceItem("the sun", " zzz", " qqq", "1"),
            PreferenceItem("the day", " so", " it", "2"),
        )
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
        row = NullEffects(("exact",), (HOOK,), np.array([2.0]), draws).columns()[HOOK]
        assert row["n_null"] == 0
        for name in ("p_value", "p_layers", "null_low", "null_high"):
            assert math.isnan(row[name]), name
