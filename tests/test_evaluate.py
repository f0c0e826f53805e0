"""The comparison: its numbers by bare hooks, its table, what it refuses."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import comparing
import numpy as np
import pytest
import torch
from comparing import HOOK, WORDS, assumed, gap, make_items

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.prompts import Message
from steerlens.engine import prefixes
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import (
    TokenizedPrompt,
    tokenize_items,
    tokenize_pairs,
    tokenize_prompt,
)
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.comparison_inputs import ItemSets, split_texts
from steerlens.measure.effects import Damage, damages, distinct_3, mean_distinct_3, preference_gaps
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.tables import COLUMNS

items, neutral = comparing.items, comparing.neutral


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
    assert list(table.columns) == [column.name for column in COLUMNS["comparison"]]
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
    assert list(summary.columns) == [column.name for column in COLUMNS["summary"]]
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


def test_continuations_stay_within_the_context(gpt2: Any) -> None:
    """60 of 64 tokens are the prompt's: four are left, then two, which are no trigram."""
    vector = {resid_post(1): torch.zeros(32)}
    for n_words, expected in ((58, True), (60, False)):
        prompt = tokenize_prompt(gpt2, "the " * n_words + "sun")
        [found] = mean_distinct_3(Engine(gpt2), [prompt], [(vector, 1.0)])
        assert math.isfinite(found) == expected


def test_damage_is_the_same_where_unsteered_logprobs_are_not_kept(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        tokenize_prompt(llama, "the river was", after)
        for after in (" so cold", " warm and good", " a night")
    ]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    job = Job(resid_post(1), direction, (1.0, -2.0), resid_post(3))
    found = []
    for n_kept in (2**20, 0):
        monkeypatch.setattr(prefixes, "KEPT_LOGPROBS", n_kept)
        [of_job] = damages(Engine(llama), texts, [job])
        found.append([(of.kl, of.kl_p95, of.degradation) for of in of_job])
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert found[0][1][0] > found[0][0][0] > 1e-3
