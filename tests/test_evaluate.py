"""The comparison: its numbers by bare hooks, its nulls, its intervals, its verdicts."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sampled

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.prompts import Message
from steerlens.directions.methods import null_directions
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import tokenize_items, tokenize_prompt
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import label_logprob
from steerlens.measure.comparison import Comparison, compare
from steerlens.measure.effects import damages, distinct_3, mean_distinct_3, preference_gaps
from steerlens.measure.equal_damage import CompareSettings, Measured
from steerlens.measure.split_half import cosine, d_prime, reliability
from steerlens.measure.verdicts import effect_columns, with_verdicts
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.tables import COMPARISON_COLUMNS, RELIABILITY_COLUMNS, SUMMARY_COLUMNS

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


def logprob(model: Any, prompt: str, text: str, vector: torch.Tensor, c: float) -> float:
    tokenized = tokenize_prompt(model, prompt, text)
    ids = torch.tensor([tokenized.prompt + tokenized.continuation])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(tokenized.prompt) :] = True
    with inference(model), sl.steer(model, {HOOK: vector}, c):
        return float(label_logprob(model(ids, return_type="logits"), ids, mask)[0])


def test_gaps_are_those_of_bare_hooks(
    llama: Any, directions: sl.Directions, items: PreferenceItems
) -> None:
    job = Job(HOOK, directions[HOOK], (2.0, -1.0), resid_post(2))
    first = Job(resid_post(0), directions[resid_post(0)], (1.0,), resid_post(2))
    unsteered, found = preference_gaps(Engine(llama, 3), items, [job, first])
    vector = directions[HOOK]
    for i, item in enumerate(items):
        for c, value in ((0.0, unsteered[i]), (2.0, found[0][0, i]), (-1.0, found[0][1, i])):
            up, down = (
                logprob(llama, item.prompt, text, vector, c)
                for text in (item.positive, item.negative)
            )
            assert value == pytest.approx(up - down, abs=1e-5)
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
    assert table.n_null.eq(8).all()
    assert not table.drop(columns=["p_holm"]).isna().any(axis=None)
    assert table.attrs["forward_equivalents"] > 10


def test_the_effect_is_the_change_of_the_gap_at_the_coefficient(
    llama: Any, compared: Comparison, items: PreferenceItems
) -> None:
    row = compared.table.iloc[0]
    direction = compared.directions["mean_diff"][HOOK]
    changes = []
    for item in items:
        gaps = [
            logprob(llama, item.prompt, item.positive, direction, c)
            - logprob(llama, item.prompt, item.negative, direction, c)
            for c in (0.0, row.coefficient)
        ]
        changes.append(gaps[1] - gaps[0])
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


def test_the_same_seed_gives_the_same_table(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> None:
    options: dict[str, Any] = {
        "methods": ["mean_diff", "shuffled"],
        "layers": [1],
        "neutral": neutral,
        "n_null": 2,
    }
    one, again, other = (
        compare(llama, many, items, n_bootstrap=50, seed=seed, **options).table
        for seed in (0, 0, 1)
    )
    assert one.to_csv() == again.to_csv()
    assert one.to_csv() != other.to_csv()
    # Without training items no layer is chosen.
    assert not one.is_chosen.any()
    assert one.train_effect.isna().all()


def test_a_budget_that_is_not_reached_is_said(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> None:
    found = compare(
        llama,
        many,
        items,
        methods=["mean_diff"],
        layers=[1],
        neutral=neutral,
        n_null=2,
        budget="nats=50",
        n_bootstrap=10,
    ).table.iloc[0]
    assert found.coefficient == math.inf
    assert math.isnan(found.effect)
    assert found.verdict == "budget not reached"


def test_the_coherence_boundary_as_a_budget(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> None:
    options: dict[str, Any] = {"layers": [1], "budget": "relative=0.02", "n_bootstrap": 10}
    found = compare(
        llama,
        many,
        items,
        methods=["mean_diff"],
        on="positive",
        neutral=neutral,
        n_null=2,
        **options,
    )
    boundary = sl.find_boundary(llama, many, found.directions["mean_diff"], **options).layers
    # Two searches with other probes, each right to a few per cent.
    assert found.table.coefficient[0] == pytest.approx(boundary.boundary_pos[0], rel=0.05)


def test_the_persona_in_the_prompt_is_a_baseline(llama: Any, neutral: list[str]) -> None:
    def chat(system: str, user: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    pairs = sl.ContrastivePairs.from_lists(
        [chat("you are cheerful", f"the {word}") for word in WORDS],
        [chat("you are gloomy", f"the {word}") for word in WORDS],
    )
    chats = PreferenceItems(
        tuple(
            PreferenceItem((Message("user", f"said {word}"),), "warm and good", "so cold", word)
            for word in WORDS
        )
    )
    found = compare(
        llama,
        pairs,
        chats,
        methods=["mean_diff"],
        layers=[1],
        neutral=neutral,
        n_null=2,
        train_items=make_items("you said"),
        n_bootstrap=50,
    )
    row = found.table.iloc[-1]
    assert (row.method, row.layer, row.verdict) == ("prompt", -1, "baseline")

    def gap(messages: tuple[Message, ...]) -> float:
        both = []
        for text in ("warm and good", "so cold"):
            tokenized = tokenize_prompt(llama, messages, text)
            ids = torch.tensor([tokenized.prompt + tokenized.continuation])
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, len(tokenized.prompt) :] = True
            with inference(llama):
                both.append(float(label_logprob(llama(ids), ids, mask)[0]))
        return both[0] - both[1]

    persona = Message("system", "you are cheerful")
    expected = [gap((persona, *item.prompt)) - gap(item.prompt) for item in chats]
    assert row.effect == pytest.approx(float(np.mean(expected)), abs=1e-5)
    assert "prompt" in found.summary.method.tolist()
    assert set(found.effects.columns) == {"id", f"mean_diff @ {HOOK}", "prompt"}


# Arithmetic


def settings(**changes: Any) -> CompareSettings:
    base = CompareSettings(("mean_diff",), "kl=0.1", "neutral", 20, 4.0, 200, 0, None)
    return replace(base, **changes)


def test_the_dose_response_by_hand() -> None:
    """Changes 2c for the first item, -c for the second, and up but not at every step."""
    doses = np.array([-1.0, -0.5, 0.5, 1.0])
    changes = np.stack([2 * doses, -doses, np.array([-1.0, -2.0, 1.0, 3.0])], axis=1)
    nulls = [np.array([-0.1, 0.1, 0.0]), np.array([0.0, 0.2, -0.3])]
    row = effect_columns(Measured(doses, changes), nulls, settings())
    assert row["effect"] == pytest.approx((2 - 1 + 3) / 3)
    # sum of dose^2 = 2.5, of dose * change = 5, -2.5 and 1 + 1 + 0.5 + 3.
    assert row["slope"] == pytest.approx((2 - 1 + 5.5 / 2.5) / 3)
    assert row["anti_steerable"] == pytest.approx(1 / 3)
    assert row["monotone"] == pytest.approx(1 / 3)
    assert row["spearman"] == pytest.approx((1 - 1 + 0.9) / 3)
    # An item that nothing moves has no correlation, and the others keep theirs.
    still = np.append(changes, np.zeros((4, 1)), axis=1)
    row = effect_columns(Measured(doses, still), nulls, settings())
    assert row["spearman"] == pytest.approx((1 - 1 + 0.9) / 3)


def test_verdicts_take_the_band_and_the_corrected_p_value() -> None:
    def row(method: str, layer: int, effect: float, p: float, train: float) -> dict[str, Any]:
        return {
            "method": method,
            "layer": layer,
            "effect": effect,
            "p_value": p,
            "null_low": -1.0,
            "null_high": 1.0,
            "train_effect": train,
            "verdict": "",
        }

    rows = with_verdicts(
        [
            row("a", 1, 2.0, 0.01, 0.1),
            row("a", 2, 2.0, 0.03, 0.5),
            row("a", 3, 2.0, 0.2, 0.2),
            row("b", 1, -2.0, 0.01, math.nan),
            row("c", 1, 0.5, 0.01, 0.3),
        ]
    )
    # Holm over the three layers of a: 0.03, 0.06, 0.2.
    assert [r["p_holm"] for r in rows] == pytest.approx([0.03, 0.06, 0.2, 0.01, 0.01])
    verdicts = [r["verdict"] for r in rows]
    assert verdicts == [
        "effect",
        "no effect shown",
        "no effect shown",
        "reversed",
        "no effect shown",
    ]
    assert [r["is_chosen"] for r in rows] == [False, True, False, False, True]
    # Benjamini and Hochberg over five: 0.01 three times, then 0.03 and 0.2.
    assert [r["q_value"] for r in rows] == pytest.approx([1 / 60, 0.0375, 0.2, 1 / 60, 1 / 60])


def test_null_methods_land_in_the_null_band(
    llama: Any, many: sl.ContrastivePairs, items: PreferenceItems, neutral: list[str]
) -> None:
    """Fresh random and shuffled vectors as methods: at most one in ten is called an effect."""
    differences = sl.collect_differences(llama, many, layers=[1])
    fresh = null_directions(differences, n=30, seed=7)
    jobs = [Job(HOOK, of[HOOK], (3.0,), resid_post(2)) for some in fresh.values() for of in some]
    null = null_directions(differences, n=20, seed=0)
    jobs += [Job(HOOK, of[HOOK], (3.0,), resid_post(2)) for some in null.values() for of in some]
    unsteered, gaps = preference_gaps(Engine(llama), items, jobs)
    effects = np.array([float((gap[0] - unsteered).mean()) for gap in gaps])
    kinds = [effects[60:80], effects[80:100]]
    outside = [
        (row := effect_columns(Measured(np.array([1.0]), np.array([[e, e]])), kinds, settings()))
        and not row["null_low"] <= row["effect"] <= row["null_high"]
        for e in effects[:60]
    ]
    assert np.mean(outside) <= 0.1
    # Control: ten times the largest of them is outside.
    far = effect_columns(
        Measured(np.array([1.0]), np.full((1, 2), 10 * np.abs(effects).max())), kinds, settings()
    )
    assert far["p_value"] < 1e-3


def test_intervals_cover_the_truth_in_nine_of_ten_datasets() -> None:
    """200 simulated sets of 100 items with a mean effect of 0.3."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = 0.3 + generator.gamma(2.0, 0.5, size=100) - 1.0
        measured = Measured(np.array([1.0]), values[None])
        row = effect_columns(measured, [np.array([0.0, 0.1])], settings())
        covered += row["effect_ci_low"] <= 0.3 <= row["effect_ci_high"]
    assert 0.9 <= covered / 200 < 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": []}, InputError, "at least one method"),
        ({"methods": ["best"]}, InputError, "there are mean_diff"),
        ({"n_null": 1}, InputError, "n_null"),
        ({"budget": "loss=1"}, InputError, "budget"),
        ({"neutral": ["the sun", "a river"]}, InputError, "4 neutral texts"),
        ({"neutral": ["the sun", "a river", "so", "it is", ""]}, InputError, "text 5"),
        ({"train_items": make_items("the river was")}, InputError, "both in the training"),
        ({"layers": [1], "methods": ["optimised_promotion"]}, InputError, "give items"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    llama: Any,
    many: sl.ContrastivePairs,
    items: PreferenceItems,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given: dict[str, Any] = {"methods": ["mean_diff"], "layers": [1], **options}
    with pytest.raises(error, match=message):
        compare(llama, many, items, **given)


# Reliability


def test_reliability_of_a_planted_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    base, noise = torch.randn((2, 2, 60, 32), generator=generator)
    strength = torch.tensor([4.0, 0.0])[:, None, None]
    given = sl.Differences(
        (resid_post(0), resid_post(1)), (), base + strength * planted + noise, base, -1, "f"
    )
    table = reliability(given, n_splits=20)
    assert list(table.columns) == [column.name for column in RELIABILITY_COLUMNS]
    found, nothing = table.iloc[0], table.iloc[1]
    assert found.split_half_cosine > 0.9 > 0.3 > abs(nothing.split_half_cosine)
    assert found.class_separation > 1 > abs(nothing.class_separation)
    assert found.cosine_half > found.cosine_quarter > 0.8
    assert found.pca_cosine > 0.95 > nothing.pca_cosine
    assert found.agreement > 0.4 > 0.3 > nothing.agreement
    assert reliability(given, n_splits=20).equals(table)
    with pytest.raises(InputError, match="at least 8 pairs"):
        reliability(replace(given, positive=given.positive[:, :5], negative=given.negative[:, :5]))


def test_d_prime_and_cosine_by_hand() -> None:
    """Means 3 and 0, variances 2 and 2: 3 / sqrt(2)."""
    assert d_prime(np.array([2.0, 4.0]), np.array([-1.0, 1.0])) == pytest.approx(3 / 2**0.5)
    assert math.isnan(d_prime(np.ones(3), np.zeros(3)))
    assert cosine(np.array([3.0, 4.0]), np.array([1.0, 0.0])) == pytest.approx(0.6)
    assert math.isnan(cosine(np.zeros(2), np.ones(2)))


def test_items_that_tokenise_alike_are_refused(llama: Any) -> None:
    alike = PreferenceItems(
        (PreferenceItem("the sun", "zzz", "qqq", "1"), PreferenceItem("the day", "so", "it", "2"))
    )
    with pytest.raises(InputError, match="item '1' tokenise to the same ids"):
        tokenize_items(llama, alike)


def test_overflow_is_undefined_and_not_no_effect() -> None:
    changes = np.array([[1.0, 2.0], [math.nan, 1.0]])
    row = effect_columns(Measured(np.array([-1.0, 1.0]), changes), [np.arange(3.0)], settings())
    assert list(row) == ["effect"]
    rows = with_verdicts(
        [
            {**row, "method": "a", "train_effect": 0.1, "verdict": ""},
            {
                "method": "b",
                "effect": 1.0,
                "train_effect": 0.1,
                "verdict": "",
                "p_value": math.nan,
                "null_low": math.nan,
                "null_high": math.nan,
            },
        ]
    )
    assert [r["verdict"] for r in rows] == ["undefined", "no null band"]


def test_continuations_stay_within_the_context(gpt2: Any) -> None:
    """60 of 64 tokens are the prompt's: four are left, then two, which are no trigram."""
    vector = {resid_post(1): torch.zeros(32)}
    for n_words, expected in ((58, True), (60, False)):
        prompt = tokenize_prompt(gpt2, "the " * n_words + "sun")
        found = mean_distinct_3(Engine(gpt2), [prompt], vector, 1.0)
        assert math.isfinite(found) == expected


def test_few_pairs_have_few_shuffles(llama: Any, pairs: sl.ContrastivePairs) -> None:
    differences = sl.collect_differences(llama, pairs[:4], layers=[1])
    with pytest.raises(InputError, match="in 6 ways only, and 20"):
        null_directions(differences, n=20, seed=0)
    assert len(null_directions(differences, n=6, seed=0)["shuffled"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neutral": []}, "list of at least 4 texts"),
    ],
)
def test_texts_are_a_list(
    llama: Any,
    many: sl.ContrastivePairs,
    items: PreferenceItems,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        compare(llama, many, items, methods=["mean_diff"], layers=[1], **options)
