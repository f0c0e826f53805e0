"""Scorers of generated text: each formula by hand, what is undefined, what must not matter."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import mean_logprob
from conftest import bridge, build_llama, build_tokenizer, needs_bridge
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import bridged

import steerlens as sl
from steerlens.engine import logprobs
from steerlens.engine.engine import Engine
from steerlens.engine.logprobs import continuation_logprobs
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.measure.scorers import (
    Choice,
    Concept,
    Description,
    Distinct,
    Logprob,
    Repeated,
    Scorer,
    Words,
    Written,
    ended,
    length,
    likelihood,
    scorer_name,
    script,
)


def said(text: str, ids: Sequence[int] = (), prompt: str = "the", *, end: bool = True) -> Written:
    """A text of the tokens, whatever its words."""
    return Written(prompt, text, (1, 4), tuple(ids), ended=end)


def wrote(model: Any, prompt: str, text: str) -> Written:
    """A text with the model's own tokens."""
    tokenized = tokenize_prompt(model, prompt, f" {text}")
    return Written(prompt, text, tokenized.prompt, tokenized.continuation, ended=True)


def by_hand(model: Any, before: Sequence[int], after: Sequence[int]) -> float:
    """Mean log-probability of the ids after others."""
    ids = (*before, *after)
    return mean_logprob(model, ids, range(len(before), len(ids)))


def some_texts(model: Any) -> list[Written]:
    words = ["warm and good", "so cold", "very bad soup and rain", "rain"]
    return [wrote(model, "the river was", text) for text in words]


@pytest.fixture(scope="module")
def texts(llama: Any) -> list[Written]:
    return some_texts(llama)


# Without a model


@pytest.mark.parametrize(
    ("scorer", "text", "value"),
    [
        (length, said("a b c", (5, 6, 7)), 3),
        (length, said(""), 0),
        (ended, said("a"), 1),
        (ended, said("a", end=False), 0),
        (Distinct(1), said("", (5, 6, 5, 5)), 2 / 4),
        (Distinct(2), said("", (5, 6, 5, 6, 7)), 3 / 4),
        (Distinct(2), said("", (5,)), math.nan),
        (Repeated(2), said("", (5, 6, 7, 5, 6)), 4 / 5),
        (Repeated(4), said("", (5, 6, 7, 5, 6)), 0),
        (Repeated(4), said("", (5, 6) * 4), 1),
        (Repeated(4), said("", (5, 6, 7)), math.nan),
        (Words(("Warm", "kind")), said("So WARM, so kind; kindly."), 2 / 5),
        (Words(("don't",)), said("I don't. Don't!"), 2 / 3),
        (Words(("straße",)), said("STRASSE"), 1),
        (Words(("warm",)), said("... 。"), math.nan),
        (script, said("cold день", prompt="the river"), 4 / 8),
        (script, said("\uff43old", prompt="the river"), 1),
        (script, said("今日は、カレー", prompt="天気は"), 1),
        (script, said("cold", prompt="天気は"), 0),
        (script, said("1, 2", prompt="the"), math.nan),
        (script, said("cold", prompt="1 + 1 ="), math.nan),
    ],
)
def test_what_is_counted(scorer: Scorer, text: Written, value: float) -> None:
    assert list(scorer([text])) == pytest.approx([value], nan_ok=True)


def test_words_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "glad.txt"
    path.write_text("glad\n\n merry \n")
    words = Words.read(path)
    assert scorer_name(words) == "words_glad"
    assert words([said("merry and glad")]) == [2 / 3]
    for wrong in ((), ("of course",), ("glad!",)):
        with pytest.raises(InputError, match="one word a line"):
            Words(wrong)


def test_a_name_is_the_scorer_s_own_or_the_function_s() -> None:
    def loud(texts: Sequence[Written]) -> list[float]:
        return [float(text.text.isupper()) for text in texts]

    assert [scorer_name(s) for s in (loud, Distinct(3), Repeated(), script)] == [
        *("loud", "distinct_3", "repeated_4", "script")
    ]
    assert isinstance(loud, Scorer)
    assert not isinstance("loud", Scorer)


IDS = st.lists(st.integers(4, 9), max_size=12)


@settings(max_examples=30, deadline=None)
@given(ids=IDS, n=st.integers(1, 4))
def test_shares_are_shares_and_a_relabelling_changes_nothing(ids: list[int], n: int) -> None:
    for scorer in (Distinct(n), Repeated(n)):
        [value], [other] = (scorer([said("", of)]) for of in (ids, [100 - i for i in ids]))
        assert (len(ids) < n) == math.isnan(value)
        assert math.isnan(value) or 0 <= value == other <= 1
        [doubled] = scorer([said("", ids + ids)])
        assert len(ids) < n or (doubled == 1 if scorer == Repeated(n) else doubled <= value)


# The unsteered model's likelihood


def test_logprob_by_hand(llama: Any, texts: list[Written]) -> None:
    expected = [by_hand(llama, text.prompt_ids, text.ids) for text in texts]
    assert Logprob(llama)(texts) == pytest.approx(expected, abs=1e-5)
    # And it is of the text alone, not of its prompt.
    assert Logprob(llama)(texts) != pytest.approx(
        [by_hand(llama, t.prompt_ids[:1], (*t.prompt_ids[1:], *t.ids)) for t in texts], abs=1e-2
    )


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call by whole passes had."""
    calls: list[int] = []

    def counted(engine: Engine, workload: Any, hook_names: Any) -> Any:
        calls.append(sum(len(batch.rows) for batch in workload.positive))
        return run_baseline(engine, workload, hook_names)

    monkeypatch.setattr(logprobs, "run_baseline", counted)
    return calls


def after_each(model: Any) -> list[TokenizedPrompt]:
    """Four texts, of which two are the same, after each of three prompts of other lengths."""
    prompts = ["the river was", "you are kind and the sun is warm today", "I said"]
    ends = ["warm and good", "so cold", "so cold", "very bad soup and rain and bread"]
    return [tokenize_prompt(model, prompt, f" {end}") for end in ends for prompt in prompts]


@needs_bridge
@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "BLOOM", "OPT", "Mistral", "Gemma 3", "LFM2"])
def test_a_prompt_is_run_once_for_all_texts_after_it(
    kind: str, whole: list[int], much_padding: None
) -> None:
    model = bridged(kind)
    asked, engine = after_each(model), Engine(model)
    expected = [by_hand(model, prompt.prompt, prompt.continuation) for prompt in asked]
    assert continuation_logprobs(engine, asked).tolist() == pytest.approx(expected, abs=1e-5)
    if kind == "LFM2":  # which keeps more than keys and values
        assert whole == [9]
        return
    assert whole == [2]
    # Three prompts but for their last tokens; these and all but the last of nine texts. The look at
    # two rows, which is taken once a model, is not counted.
    longest = max(len(prompt.prompt) for prompt in asked)
    assert engine.cost.blocks == 3 * (3 * (longest - 1) + 9 * 7)
    again = continuation_logprobs(Engine(model, 2), asked[::-1])
    assert again.tolist() == pytest.approx(expected[::-1], abs=1e-5)


@needs_bridge
def test_texts_that_are_otherwise_likely_after_kept_keys_are_run_whole(
    whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge(build_llama(seed=4))
    right = logprobs.labels_logprob
    monkeypatch.setattr(logprobs, "labels_logprob", lambda *given: right(*given) - 0.1)
    asked = after_each(model)
    expected = [by_hand(model, prompt.prompt, prompt.continuation) for prompt in asked]
    with pytest.warns(RuntimeWarning, match=r"by 0\.1 nats per token.*run anew"):
        found = continuation_logprobs(Engine(model), asked)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert continuation_logprobs(Engine(model), asked).tolist() == found.tolist()
    assert whole[-2:] == [9, 9]


def gaps_by_hand(model: Any, pairs: sl.ContrastivePairs, text: Written) -> list[float]:
    """How much likelier a text is after each pair's positive prompt than after its negative one."""
    sides = [
        [tokenize_prompt(model, prompt).prompt for prompt in (pair.positive, pair.negative)]
        for pair in pairs
    ]
    return [by_hand(model, pos, text.ids) - by_hand(model, neg, text.ids) for pos, neg in sides]


def test_concept_by_hand(llama: Any, pairs: sl.ContrastivePairs, texts: list[Written]) -> None:
    expected = [sum(gaps_by_hand(llama, pairs, text)) / 8 for text in texts]
    assert Concept(llama, pairs, n_pairs=8)(texts) == pytest.approx(expected, abs=1e-5)
    assert Concept(llama, pairs, n_pairs=9)(texts) == pytest.approx(expected, abs=1e-5)


def test_prompts_take_turns_at_the_pairs(llama: Any, pairs: sl.ContrastivePairs) -> None:
    prompts = ["the river was", "rain", "you felt", "I said so", "a warm day"]
    texts = [wrote(llama, prompt, text) for prompt in prompts for text in ("so cold", "good")]
    values, firsts = Concept(llama, pairs, n_pairs=3)(texts), []
    for text, value in zip(texts, values, strict=True):
        gaps = gaps_by_hand(llama, pairs, text)
        means = [sum(gaps[(first + i) % 8] for i in range(3)) / 3 for first in range(8)]
        (first,) = [i for i in range(8) if means[i] == pytest.approx(value, abs=1e-5)]
        firsts.append(first)
    assert firsts[::2] == firsts[1::2]
    assert len(set(firsts)) > 2


def test_concept_is_antisymmetric(
    llama: Any, pairs: sl.ContrastivePairs, texts: list[Written]
) -> None:
    swapped = sl.ContrastivePairs.from_lists(
        [pair.negative for pair in pairs], [pair.positive for pair in pairs]
    )
    values, negated = (Concept(llama, of)(texts) for of in (pairs, swapped))
    assert negated == [-value for value in values]
    assert 0 not in values


def test_concept_tells_the_sides_words_apart_where_the_model_does() -> None:
    """A model that was taught to go on as its persona does."""
    ways = {"cheerful": "warm and good", "gloomy": "cold and bad"}
    openings = ["the river was", "the soup was", "you said", "the day"]
    model, tokenizer = build_llama(n_layers=2), build_tokenizer()
    taught = [f"<s> you are {mood} {o} {ways[mood]}" for mood in ways for o in openings]
    ids = tokenizer(taught, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(**ids, labels=labels).loss.backward()
        optimizer.step()
    planted = bridge(model.eval(), tokenizer)
    pairs = sl.ContrastivePairs.from_lists(
        *([f"you are {mood} {o}" for o in openings[:2]] for mood in ways)
    )
    texts = [wrote(planted, openings[2], words) for words in ways.values()]
    warm, cold = Concept(planted, pairs)(texts)
    assert warm > 0.5
    assert cold < -0.5


def chats(answers: Sequence[str], group: str | None = None) -> sl.ContrastivePairs:
    """Chats of two personas, whose assistant has begun to answer."""
    sides = [
        [
            [
                {"role": "system", "content": f"you are {mood}"},
                {"role": "user", "content": f"how was the day {i}"},
                {"role": "assistant", "content": answer},
            ]
            for i, answer in enumerate(answers)
        ]
        for mood in ("cheerful", "gloomy")
    ]
    groups = [group or str(i // 2) for i in range(len(answers))]
    return sl.ContrastivePairs.from_lists(*sides, group=groups)


def test_the_text_takes_the_place_of_the_assistant_s_last_turn(
    llama: Any, texts: list[Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Concept(llama, chats([word] * 4))(texts) for word in ("rain", "bread"))
    assert one == other
    monkeypatch.setattr(likelihood, "N_TURNS", 1)
    pair = chats(["rain"] * 4)[0]
    ids = [tokenize_prompt(llama, side[:-1]).prompt for side in (pair.positive, pair.negative)]
    gap = by_hand(llama, ids[0], texts[0].ids) - by_hand(llama, ids[1], texts[0].ids)
    [value] = Concept(llama, chats(["rain"] * 4), n_pairs=1)(texts[:1])
    assert value == pytest.approx(gap, abs=1e-5)


def test_pairs_are_chosen_evenly_over_groups(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "N_TURNS", 1)
    of_two = Concept(llama, chats(["rain"] * 6), n_pairs=3)
    named = [prompt.where for prompt in of_two._sides[0]]
    assert named == [f"positive prompt of pair '{i}'" for i in (1, 3, 5)]


def test_pairs_that_differ_in_the_last_turn_alone_are_refused(llama: Any) -> None:
    question = {"role": "user", "content": "how was the day"}
    sides = [
        [[question, {"role": "assistant", "content": f"{word} {i}"}] for i in range(2)]
        for word in ("good", "bad")
    ]
    with pytest.raises(InputError, match="what the assistant says last"):
        Concept(llama, sl.ContrastivePairs.from_lists(*sides))


def test_a_text_that_the_context_has_no_room_for_is_refused(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    long = said("", [4] * 62)
    assert math.isfinite(Logprob(llama)([long])[0])
    with pytest.raises(InputError, match=r"pair '\d' has .* tokens .* context is 64"):
        Concept(llama, pairs)([long])


def test_description_by_hand(llama: Any, texts: list[Written]) -> None:
    asked = "Here is a text.\n\nso cold\n\nDescribe its tone in a few words."
    prompt = tokenize_prompt(llama, (sl.Message("user", asked),)).prompt
    answers = [
        tokenize_prompt(llama, "the", f" {words}").continuation for words in ("kind", "very rude")
    ]
    gap = by_hand(llama, prompt, answers[0]) - by_hand(llama, prompt, answers[1])
    values = Description(llama, "kind", "very rude")(texts)
    assert values[1] == pytest.approx(gap, abs=1e-5)
    assert Description(llama, "very rude", "kind")(texts) == pytest.approx([-v for v in values])


@pytest.mark.parametrize("letters", [False, True])
def test_choice_by_hand(llama: Any, texts: list[Written], letters: bool) -> None:
    gaps = []
    for first, second in (("kind", "rude"), ("rude", "kind")):
        end = f"\nA. {first}\nB. {second}\nAnswer A or B."
        end = end if letters else f" Answer {first} or {second}."
        asked = f"Here is a text.\n\nso cold\n\nwhat was it ?{end}"
        prompt = tokenize_prompt(llama, (sl.Message("user", asked),)).prompt
        logits = llama(torch.tensor([prompt]), return_type="logits")[0, -1].detach()
        kind = {"kind": "A", "rude": "B"}[first] if letters else "kind"
        rude = {"kind": "B", "rude": "A"}[first] if letters else "rude"
        ids = llama.tokenizer.convert_tokens_to_ids([kind, rude])
        gaps.append(float(logits[ids[0]] - logits[ids[1]]))
    scorer = Choice(llama, "what was it ?", ("kind", "rude"), letters=letters)
    assert scorer(texts)[1] == pytest.approx(sum(gaps) / 2, abs=1e-4)
    assert gaps[0] != pytest.approx(gaps[1], abs=1e-3)
    # Options exchanged: the same two questions, and the other sign.
    swapped = replace(scorer, options=("rude", "kind"))(texts)
    assert swapped == pytest.approx([-value for value in scorer(texts)], abs=1e-5)


def test_answers_that_are_the_same_to_the_model_are_refused(
    llama: Any, texts: list[Written]
) -> None:
    """The tokenizer knows neither word."""
    for scorer in (Choice(llama, "was it ?"), Description(llama, "yes", "no")):
        with pytest.raises(InputError, match=r"\('yes', 'no'\) tokenise to the same ids"):
            scorer(texts)


def model_scorers(model: Any, pairs: sl.ContrastivePairs) -> list[Scorer]:
    return [
        Logprob(model),
        Concept(model, pairs, n_pairs=2),
        Description(model, "kind", "rude"),
        Choice(model, "how was it ?", ("good", "bad")),
    ]


def test_an_empty_text_is_undefined(
    llama: Any, pairs: sl.ContrastivePairs, texts: list[Written]
) -> None:
    nothing = said("")
    for scorer in [*model_scorers(llama, pairs), Distinct(), Repeated(2), script, Words(("a",))]:
        first, middle, last = scorer([texts[0], nothing, texts[2]])
        assert math.isnan(middle), scorer_name(scorer)
        assert [first, last] == pytest.approx(list(scorer([texts[0], texts[2]])), abs=1e-5)
        assert math.isfinite(first), scorer_name(scorer)
        assert math.isnan(*scorer([nothing]))


def test_order_and_batches_do_not_matter(
    llama: Any, pairs: sl.ContrastivePairs, texts: list[Written]
) -> None:
    scorers = model_scorers(llama, pairs)
    values = [list(scorer(texts)) for scorer in scorers]
    for of in values:
        assert max(of) - min(of) > 1e-3  # so that another order would show

    @settings(max_examples=5, deadline=None, database=None)
    @given(order=st.permutations(range(4)), batch_size=st.sampled_from([None, 1, 3]))
    def check(order: list[int], batch_size: int | None) -> None:
        for scorer, expected in zip(scorers, values, strict=True):
            again = replace(scorer, batch_size=batch_size)([texts[i] for i in order])  # type: ignore[type-var]
            assert again == pytest.approx([expected[i] for i in order], abs=1e-5)

    check()
