"""Choices as they are published: nested, scored, ranked, or two answers and which was preferred."""

from typing import Any

import pandas as pd
import pytest
from forms import WORDS, as_jsonl, chat, put, rows

from steerlens.data import ContrastivePairs, PreferenceItems
from steerlens.errors import InputError

ASKED = {"question": "Which WORD?"}
BOTH = {"response_a": "No", "response_b": "Yes"}
NAMED = [{"text": "No", "label": "A"}, {"text": "Yes", "label": "B"}]
RANKED = [
    {"answer": text, "model": "x", "rank": rank}
    for text, rank in (("Maybe", 2.0), ("No", 3.0), ("Yes", 1.0))
]
NESTED = {
    "ARC": rows(**ASKED, choices={"text": ["No", "Yes"], "label": ["A", "B"]}, answerKey="B"),
    "ARC's own file": rows(question={"stem": "Which?", "choices": NAMED}, answerKey="B", idx=1),
    "CommonsenseQA": rows(
        **ASKED,
        question_concept="x",
        choices={"label": ["A", "B", "C"], "text": ["No", "Yes", "Maybe"]},
        answerKey="B",
    ),
    "OpenBookQA": rows(question_stem="Which WORD?", choices=NAMED, answerKey="B"),
    "other names": rows(
        **ASKED, options=[{"key": "A", "option": "No"}, {"key": "B", "option": "Yes"}], answer="B"
    ),
    "a label each": rows(
        **ASKED,
        answers=[{"answer": "No", "is_correct": False}, {"answer": "Yes", "is_correct": True}],
    ),
    "ranked": rows(**ASKED, answers=RANKED, source=["x"], turns=1),
    "scored": rows(
        **ASKED, answers=[{"text": "No", "pm_score": 1}, {"text": "Yes", "pm_score": 4}]
    ),
    "scores in a list": rows(**ASKED, generations=["Maybe", "No", "Yes"], ratings=[3, 1.0, 5]),
    "two answers, scored": rows(**ASKED, **BOTH, score_a=340, score_b=1166),
    "two answers, scored in another order": rows(**ASKED, score_b=2, score_a=1, **BOTH),
    "two answers, ranked": rows(**ASKED, **BOTH, rank_a=2, rank_b=1),
    "two answers, scored by their ranking": rows(**ASKED, **BOTH, rank_score_a=1, rank_score_b=2),
    "a label each, beside a label of the row": rows(
        **ASKED,
        options=[{"text": "No", "is_correct": 0}, {"text": "Yes", "is_correct": 1}],
        label=0,
    ),
    "two answers, a label each": rows(
        **ASKED, **BOTH, winner_model_a=0, winner_model_b=1, winner_tie=0
    ),
    "two answers, and a text in an object": rows(
        question={"id": "1", "full_text": "Which?"},
        **{"answer_0": "No", "answer_1": "Yes", "tokens_0": [1], "tokens_1": [2]},
        **{"score_0": -0.5, "score_1": 0.5},
    ),
    "SHP": rows(
        history="Which WORD?",
        **{"human_ref_A": "No", "human_ref_B": "Yes", "c_root_id_A": "a", "c_root_id_B": "b"},
        **{"created_at_utc_A": 1.0, "created_at_utc_B": 2.0, "score_A": 3, "score_B": 4},
        **{"labels": 0, "score_ratio": 1.3},
    ),
    "a right answer and wrong ones": rows(
        **ASKED, distractor1="No", distractor2="Never", correct_answer="Yes", support="x"
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_right_or_best_choice_is_found(name: str, tmp_path: Any) -> None:
    source = NESTED[name]
    made = ContrastivePairs.load(source)
    assert made.card is not None
    assert (len(made), made.card.left_out) == (6, {})
    assert made.card.form == ("questions" if "right" in name else "choices")
    assert [made[0].positive[-1].content, made[0].negative[-1].content] == ["Yes", "No"]
    assert made[0].positive[0].content.startswith("Which")
    assert ContrastivePairs.load(source, form=made.card.form).pairs == made.pairs
    assert ContrastivePairs.load(put(tmp_path, "a.jsonl", as_jsonl(source))).pairs == made.pairs
    assert ContrastivePairs.load(pd.DataFrame(source)).pairs == made.pairs
    pd.DataFrame(source).to_parquet(tmp_path / "a.parquet")
    for same in (tmp_path / "a.parquet", pd.read_parquet(tmp_path / "a.parquet")):
        assert ContrastivePairs.load(same).pairs == made.pairs
    items = PreferenceItems.load(source)
    assert (items[0].positive, items[0].negative) == ("Yes", "No")


def test_scores_of_a_table_of_text_are_numbers(tmp_path: Any) -> None:
    """As text "9" would be higher than "10"."""
    frame = pd.DataFrame(rows(**ASKED, **BOTH, score_a=9, score_b=10))
    made = ContrastivePairs.load(put(tmp_path, "a.csv", frame.to_csv(index=False)))
    assert made[0].positive == chat("Which soup?", "Yes")
    safe = pd.DataFrame(rows(**ASKED, **BOTH, is_response_a_safe=False, is_response_b_safe=True))
    path = put(tmp_path, "b.csv", safe.to_csv(index=False))
    columns = {"label": "is_response_a_safe"}
    assert ContrastivePairs.load(path, columns=columns)[0].positive == chat("Which soup?", "Yes")
    bad = put(tmp_path, "c.csv", frame.assign(score_b="high").to_csv(index=False))
    with pytest.raises(InputError, match=r"c.csv:2: score: expected numbers, got \['9', 'high'\]"):
        ContrastivePairs.load(bad)


def test_rows_of_one_score_are_left_out() -> None:
    source = rows(**ASKED, **BOTH, score_a=1, score_b=2)
    source[0]["score_a"], source[1]["score_b"] = 2, None
    with pytest.warns(UserWarning, match="2 left out: no right or no wrong choice"):
        made = ContrastivePairs.load(source)
    assert [pair.id for pair in made] == ["3", "4", "5", "6"]
    assert "the best choice and the worst by score" in str(made.card)


@pytest.mark.parametrize(
    ("source", "told", "columns"),
    [
        # what may be read in two ways; what the error asks for; the columns that settle it
        (
            [
                {**row, "labels": label}
                for row, label in zip(rows(**ASKED, **BOTH), [1, 0] * 3, strict=True)
            ],
            "of two choices labels is 0, 1, which may mean either.*--columns label=labels=1",
            {"label": "labels=0"},
        ),
        (
            [
                {**row, "preference": by}
                for row, by in zip(rows(**ASKED, **BOTH), [-1, 1] * 3, strict=True)
            ],
            "of two choices preference is -1, 1, which may mean either",
            {"label": "preference=1"},
        ),
        (
            rows(**ASKED, **BOTH, score_a=1, score_b=2, rating_a=2, rating_b=1),
            "choices may be ranked by score_a or rating_a; name one: --columns label=score_a",
            {"label": "score_b"},
        ),
        (
            rows(
                **ASKED,
                completions=[
                    {"response": "No", "overall_score": 3, "fine_grained_score": 2},
                    {"response": "Yes", "overall_score": 8, "fine_grained_score": 1},
                ],
            ),
            "ranked by overall_score or fine_grained_score; name one: --columns label=overall",
            {"label": "overall_score"},
        ),
        (
            rows(**ASKED, **BOTH, score_a=2, score_b=1, winner="model_b"),
            "winner does not tell the choice that is scored highest.*--columns label=winner",
            {"label": "winner"},
        ),
        (
            rows(**ASKED, response_1="No", response_2="Yes", score_1=1, score_2=2, label=1),
            "label does not tell the choice that is scored highest",
            {"label": "label"},
        ),
        (
            [
                {**row, "score_a": by, "score_b": 2}
                for row, by in zip(rows(**ASKED, **BOTH, label=1), [1, 3] * 3, strict=True)
            ],
            "label does not tell the choice that is scored highest",
            {"label": "score_a"},
        ),
        (
            rows(told="Which of all WORD?", choices=["No", "Yes"], answer=1),
            "the form choices: name what is asked: --columns question=told",
            {"question": "told"},
        ),
        (
            rows(info={"post": "Which of all WORD?"}, summaries=["No", "Yes"], choice=1),
            "the form choices: name what is asked: --columns question=info",
            {"question": "info"},
        ),
        (
            rows(**ASKED, **BOTH, safer_id=1),
            "it looks like choices: name what tells the right one: --columns label=COLUMN",
            {"label": "safer_id=0"},
        ),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(source: Any, told: str, columns: Any) -> None:
    with pytest.raises(InputError, match=told):
        ContrastivePairs.load(source)
    if columns != {"label": "safer_id=0"}:  # one value alone says nothing of the other
        asked = ContrastivePairs.load(source, columns=columns)
        assert {asked[0].positive[-1].content, asked[0].negative[-1].content} == {"No", "Yes"}


def test_the_named_label_of_the_first_choice_turns_the_sides() -> None:
    source = [{**row, "by": i % 2} for i, row in enumerate(rows(**ASKED, **BOTH))]
    for first, answers in (("0", ["No", "Yes"]), ("1", ["Yes", "No"])):
        made = ContrastivePairs.load(source, columns={"label": f"by={first}"})
        assert [pair.positive[-1].content for pair in made] == answers * 3


def test_the_named_value_of_the_first_choice_alone_decides() -> None:
    for both in (BOTH, {"choices": ["No", "Yes"]}):
        alike = rows(**ASKED, **both, by=1)
        made = ContrastivePairs.load(alike, columns={"label": "by=1"})
        assert {pair.positive[-1].content for pair in made} == {"No"}
        with pytest.raises(InputError, match=r"label=by=7 names the first of two.*; got 1$"):
            ContrastivePairs.load(alike, columns={"label": "by=7"})
    graded = [{**row, "by": i - 2} for i, row in enumerate(rows(**ASKED, **BOTH))]
    with pytest.raises(InputError, match="by one of two values; got -1, -2, 0, 1, 2"):
        ContrastivePairs.load(graded, columns={"label": "by=2"})
    three = rows(**ASKED, choices=["No", "Yes", "Maybe"], by="b")
    assert ContrastivePairs.load(three, columns={"label": "by"})[0].positive[-1].content == "Yes"
    with pytest.raises(InputError, match="names the first of two choices"):
        ContrastivePairs.load(three, columns={"label": "by=b"})


def test_a_score_of_the_row_names_no_choice() -> None:
    source = rows(**ASKED, choices=["No", "Yes"], score=1)
    with pytest.raises(InputError, match=r"needs a label for each choice.*label=COLUMN"):
        ContrastivePairs.load(source)
    named = [{**row, "answer": row["score"]} for row in source]
    assert ContrastivePairs.load(named)[0].positive[-1].content == "Yes"


def test_two_texts_that_are_compared_are_no_choices() -> None:
    """Their label says whether they mean the same."""
    source = [
        {"text1": f"{word} is", "text2": f"{word} was", "label": i % 2}
        for i, word in enumerate(WORDS)
    ]
    with pytest.raises(InputError, match="of no known form"):
        ContrastivePairs.load(source)
    answers = [{"answer1": r["text1"], "answer2": r["text2"], "label": r["label"]} for r in source]
    assert ContrastivePairs.load(answers)[0].positive == "soup is"


def test_numbers_of_numbered_choices_are_not_refused() -> None:
    """What two columns are numbered by, or a list, is no letter."""
    for both in ({"sol1": "No", "sol2": "Yes"}, {"choices": ["No", "Yes"]}):
        source = [{**row, "label": i % 2} for i, row in enumerate(rows(goal="do WORD", **both))]
        made = ContrastivePairs.load(source)
        assert [pair.positive[-1].content for pair in made] == ["No", "Yes"] * 3


def rewrite(prompt: str, true: str = "French", new: str = "English") -> list[dict[str, Any]]:
    return [
        {
            "case_id": i,
            "requested_rewrite": {
                **{"prompt": prompt, "relation_id": "P103", "subject": word},
                **{"target_new": {"str": new, "id": "a"}, "target_true": {"str": true, "id": "b"}},
            },
            "paraphrase_prompts": ["x"],
        }
        for i, word in enumerate(WORDS)
    ]


def test_a_rewrite_is_of_its_subject() -> None:
    source = rewrite("The mother tongue of {} is")
    made = ContrastivePairs.load(source)
    assert made[0].positive == "The mother tongue of soup is French"
    assert made[0].negative == "The mother tongue of soup is English"
    assert "{} in a prompt is its subject" in str(made.card)
    assert ContrastivePairs.load(source, form="pairs").pairs == made.pairs
    item = PreferenceItems.load(source)[0]
    assert (item.prompt, item.positive) == ("The mother tongue of soup is", " French")
    spaced = ContrastivePairs.load(rewrite("{} is", " French", " English"))
    assert spaced[0].positive == "soup is French"
    plain = ContrastivePairs.load(
        [{"prompt": f"{w}: {{}}", "positive": "a", "negative": "b"} for w in WORDS]
    )
    assert plain[0].positive == "soup: {}a"
    code = [
        {"prompt": f"print({of})", "subject": "code", "positive": "a", "negative": "b"}
        for of in ("'soup'", "{}")
    ]
    assert ContrastivePairs.load(code)[1].positive == "print({})a"


def test_objects_are_opened_where_they_have_all_that_a_form_needs() -> None:
    inside = [{"data": {"prompt": w, "chosen": "Yes", "rejected": "No"}, "id": w} for w in WORDS]
    made = ContrastivePairs.load(inside)
    assert (made[0].positive, made[0].id) == (chat("soup", "Yes"), "soup")
    labels = [{"text": w, "meta": {"label": i % 2}} for i, w in enumerate(WORDS)]
    with pytest.raises(InputError, match="texts of one side"):
        ContrastivePairs.load(labels)
    two = [{"one": row["data"], "two": row["data"]} for row in inside]
    with pytest.raises(InputError, match="of no known form"):
        ContrastivePairs.load(two)


def test_what_is_empty_or_by_chance_alike_is_told_or_taken() -> None:
    personas = {"suffixes": ["I"], "positive_personas": ["a"], "negative_personas": ["b"]}
    with pytest.raises(InputError, match="the form personas: template is empty; fill it"):
        ContrastivePairs.load({**personas, "template": None})
    with pytest.raises(InputError, match="needs a label for each choice"):
        ContrastivePairs.load([{"question": "?", "choices": {}, "label": 1}] * 2)
    with pytest.raises(InputError, match="got 0 of 1, 0 of 0"):
        ContrastivePairs.load([], form="labelled")
    # Two lists without pairs, whose prompts are nearly all in one order.
    answers = [
        {"prompt": word, "completion": answer, "label": answer == "Yes"}
        for answer in ("No", "Yes")
        for word in WORDS
    ]
    del answers[-1]["prompt"]
    with pytest.warns(UserWarning, match="1 left out: no prompt"):
        items = PreferenceItems.load(answers)
    assert [item.prompt for item in items] == [chat(word) for word in WORDS[:5]]
    with pytest.warns(UserWarning, match="1 left out: no prompt"):
        assert ContrastivePairs.load(answers).unpaired is not None


def test_ranked_answers_follow_a_dialogue_as_text() -> None:
    made = ContrastivePairs.load(rows(prompt="\n\nHuman: WORD?\n\nAssistant: ", answers=RANKED))
    assert made[0].positive == "\n\nHuman: soup?\n\nAssistant: Yes"
    assert made[0].negative == "\n\nHuman: soup?\n\nAssistant: No"
    assert "answers follow the dialogue as text; the best choice and the worst by rank" in str(
        made.card
    )


def test_a_chat_before_choices_is_what_is_asked() -> None:
    context = [message._asdict() for message in chat("Which?", "What?", "That.")]
    made = ContrastivePairs.load(rows(context=context, **BOTH, score_a=1, score_b=2))
    assert made[0].positive == chat("Which?", "What?", "That.", "Yes")
