"""The published forms: each is recognised, and gives the pairs and items that it says."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from forms import (
    PARTS,
    PERSONAS,
    SAID,
    TOPICS,
    TRAITS,
    WORDS,
    as_jsonl,
    chat,
    letters,
    put,
    rows,
)

from steerlens.cli.options import pairs_of
from steerlens.data import FORMS, ContrastivePairs, Message, PreferenceItems
from steerlens.errors import InputError


class Case(NamedTuple):
    """What a file holds, and what is made of it: the first pair, and the first item if any."""

    form: str
    content: Any
    positive: Any
    negative: Any
    item: Any = None
    group: str | None = None
    n_pairs: int = 6
    n_items: int = 6


def answered(form: str, content: Any, prompt: Any, yes: str, no: str, **more: Any) -> Case:
    """A case whose sides are two answers after a prompt."""
    positive, negative = (
        prompt + answer if isinstance(prompt, str) else (*prompt, Message("assistant", answer))
        for answer in (yes, no)
    )
    return Case(form, content, positive, negative, (prompt, yes, no), **more)


def said(*texts: str) -> list[dict[str, str]]:
    """`chat` as a file has it."""
    return [message._asdict() for message in chat(*texts)]


def pair(first: str, second: str, **more: str) -> dict[str, str]:
    """A row of two answers of preferences."""
    return {**more, "chosen": first, "rejected": second}


SYSTEM = Message("system", "kind")
LETTERED = letters("yes", "no")
MATCHING, NOT_MATCHING = "answer_matching_behavior", "answer_not_matching_behavior"
CHOICES: dict[str, dict[str, Any]] = {
    "and labels": {
        "mc1_targets": {"choices": ["No.", "Yes.", "Never."], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": ["Sure.", "Yes.", "No."], "labels": [1, 1, 0]},
    },
    "with labels": {"mc1_targets": {"Yes.": 1, "No.": 0, "Never.": 0}},
    "by number": {"choices": ["No.", "Yes.", "Never."], "answer": 1},
    "by letter": {"options": ["No.", "Yes."], "answer": "B"},
    "by name": {"choices": {"text": ["No.", "Yes."], "label": ["1", "2"]}, "answerKey": "2"},
    "by the name of each": {"options": {"A": "No.", "B": "Yes."}, "answer_idx": "B"},
    "by text": {"options": ["No.", "Yes."], "answer": "Yes."},
    "of a column each": {"ans0": "No.", "ans1": "Never.", "ans2": "Yes.", "label": 2},
    "of lettered columns": {"A": "No.", "B": "Yes.", "answer": "B"},
    "of options from 1": {"option1": "No.", "option2": "Yes.", "answer": "2"},
    "of objects": {"choices": [{"text": "No.", "label": 0}, {"text": "Yes.", "label": 1}]},
}
TRUTHFUL = {
    "": {"Best Answer": "Yes."},
    ", best ones": {"Best Answer": "Yes.", "Best Incorrect Answer": "No."},
    ", lists": {"Correct Answers": "Yes.; Sure."},
}
SENTENCES: dict[str, Any] = {
    "words": [
        {"sentence": "it is fish", "gold_label": "unrelated", "labels": []},
        {"sentence": "it is strong", "gold_label": "anti-stereotype", "labels": []},
        {"sentence": "it is weak", "gold_label": "stereotype", "labels": []},
    ],
    "numbers": {"sentence": ["it is fish", "it is strong", "it is weak"], "gold_label": [2, 0, 1]},
}
FEW: dict[str, list[Any]] = {
    "": [["a lie", "a truth"], ["b", "c"], ["d", "e"]],
    " in a row": ["a lie", "a truth", "b", "c", "d", "e"],
}
PLACES = [("New York", w) for w in WORDS[::-1]] + [("Oslo", w) for w in WORDS]
CASES: dict[str, Case] = {
    "letters": answered(
        "questions", LETTERED, chat(LETTERED[0]["question"]), "(A)", "(B)", n_items=12
    ),
    "yes and no": answered(
        "questions",
        rows(
            question="Do you like WORD?",
            statement="x",
            label_confidence=0.9,
            **{MATCHING: " Yes", NOT_MATCHING: " No"},
        ),
        *(chat("Do you like soup?"), "Yes", "No"),
    ),
    "several wrong answers": answered(
        "questions",
        rows(question="WORD? (A) a (B) b", **{MATCHING: " (A)", NOT_MATCHING: [" (B)", " (C)"]}),
        *(chat("soup? (A) a (B) b"), "(A)", "(B)"),
        n_items=12,
    ),
    "truthful answers": answered(
        "questions",
        rows(
            question="WORD?",
            best_answer="Yes.",
            correct_answers=["Yes."],
            incorrect_answers=["No.", "Never."],
        ),
        *(chat("soup?"), "Yes.", "No."),
    ),
    **{
        f"truthful answers in a table{how}": answered(
            "questions",
            rows(**{"Question": "WORD", **answers, "Incorrect Answers": "No.; Never."}),
            *(chat("soup"), "Yes.", "No."),
        )
        for how, answers in TRUTHFUL.items()
    },
    "answers of texts": answered(
        "preferences",
        rows(**pair("Yes!", "No.", prompt="Say WORD."), score=1),
        *(chat("Say soup."), "Yes!", "No."),
    ),
    "answers after a space": answered(
        "preferences",
        rows(**pair(" good", " bad", prompt="The WORD is")),
        *("The soup is", " good", " bad"),
    ),
    "whole chats": answered(
        "preferences",
        rows(prompt="WORD", chosen=said("WORD", "up"), rejected=said("WORD", "down")),
        *(chat("soup"), "up", "down"),
    ),
    "question and system": answered(
        "preferences",
        rows(**pair("Yes", "No", system="kind", question="WORD")),
        *((SYSTEM, *chat("soup")), "Yes", "No"),
    ),
    "dialogues as text": answered(
        "preferences",
        rows(**pair(*(f"\n\nHuman: WORD?\n\nAssistant: {of}" for of in ("Yes", "No")))),
        *("\n\nHuman: soup?\n\nAssistant:", " Yes", " No"),
    ),
    "sharegpt": answered(
        "preferences",
        rows(
            conversations=SAID,
            chosen={"from": "gpt", "value": "Yes, WORD"},
            rejected={"from": "gpt", "value": "No"},
        ),
        *((SYSTEM, *chat("how")), "Yes, soup", "No"),
    ),
    "instruction and input": answered(
        "preferences",
        rows(**pair("Yes", "No", instruction="Sum up:", input="WORD")),
        *(chat("Sum up:\nsoup"), "Yes", "No"),
    ),
    "input alone": answered(
        "preferences", rows(**pair("Yes", "No", input="WORD")), chat("soup"), "Yes", "No"
    ),
    "preferred output": answered(
        "preferences",
        rows(
            input={"messages": said("WORD"), "tools": []},
            preferred_output=said("WORD", "up")[1:],
            non_preferred_output=said("WORD", "down")[1:],
        ),
        *(chat("soup"), "up", "down"),
    ),
    **{
        f"choices {how}": answered(
            "choices", rows(question="WORD?", **answers), chat("soup?"), "Yes.", "No."
        )
        for how, answers in CHOICES.items()
    },
    "a question on a text": answered(
        "choices",
        rows(
            context="On WORD.",
            question="Who?",
            references=["No", "Yes"],
            gold_index=1,
            category="age",
        ),
        *(chat("On soup.\nWho?"), "Yes", "No"),
    ),
    "two chats and the winner": answered(
        "choices",
        rows(
            conversation_a=said("WORD", "No"),
            conversation_b=said("WORD", "Yes"),
            winner="model_b",
        ),
        *(chat("soup"), "Yes", "No"),
    ),
    **{
        f"stereotypes, {how}": Case(
            "choices",
            rows(id="WORD", context="WORD is BLANK", sentences=sentences),
            *("it is weak", "it is strong"),
        )
        for how, sentences in SENTENCES.items()
    },
    "a few sentences a row": Case(
        "choices",
        [
            {"sentence": [f"{w} is bad", f"{w} is good"][:: 1 - 2 * (i % 2)]}
            | {"label": [False, True][:: 1 - 2 * (i % 2)]}
            for i, w in enumerate(WORDS)
        ],
        *("soup is good", "soup is bad"),
    ),
    **{
        f"labelled few{how}": Case(
            "choices",
            {"data": data, "labels": [[False, True], [True, False], [True, False]]},
            *("a truth", "a lie"),
            n_pairs=3,
        )
        for how, data in FEW.items()
    },
    "more and less": Case(
        "pairs",
        [
            row | {"stereo_antistereo": ("stereo", "antistereo")[i % 2]}
            for i, row in enumerate(rows(sent_more="WORD is bad", sent_less="WORD is good"))
        ],
        *("soup is bad", "soup is good"),
    ),
    "a true and a false target": answered(
        "pairs",
        rows(prompt="WORD", target_true=" a", target_false=" b", relation="x"),
        *("soup", " a", " b"),
    ),
    "items as columns": answered(
        "pairs",
        {"prompt": WORDS, "positive": [" good"] * 6, "negative": [" bad"] * 6},
        *("soup", " good", " bad"),
    ),
    "items": answered(
        "pairs",
        rows(prompt="The WORD is", positive=" good", negative=" bad"),
        *("The soup is", " good", " bad"),
    ),
    "acceptable": Case(
        "pairs",
        rows(sentence_good="WORD", sentence_bad="WORDs", UID="agreement"),
        *("soup", "soups"),
    ),
    "parts of content": Case(
        "pairs", rows(positive=PARTS, negative=said("WORD")), chat("how"), chat("soup")
    ),
    "by topic": Case("labelled", TOPICS, "soup is cold", "soup is hot", group="soup"),
    "labels as columns": Case(
        "labelled",
        {key: [row[key] for row in TOPICS] for key in ("statement", "label", "topic")},
        *("soup is cold", "soup is hot"),
        group="soup",
    ),
    "words as labels": Case(
        "labelled",
        [{"text": r["statement"], "label": bool(r["label"]), "topic": r["topic"]} for r in TOPICS],
        *("soup is cold", "soup is hot"),
        group="soup",
    ),
    "another label is no topic": Case(
        "labelled",
        [{**r, "topic": "x", "has_a": bool(i % 2)} for i, r in enumerate(TOPICS)],
        *("soup is cold", "soup is hot"),
    ),
    "labelled answers": answered(
        "labelled",
        [
            {"prompt": w, "completion": answer, "label": answer == "Yes"}
            for answer in ("No", "Yes")
            for w in WORDS
        ],
        *(chat("soup"), "Yes", "No"),
        group="soup",
    ),
    "by template": Case(
        "labelled",
        [{"statement": f"the {w} is in {at}", "label": int(at != "Oslo")} for at, w in PLACES],
        *("the river is in New York", "the river is in Oslo"),
    ),
    "lists": Case("lists", {"positive": WORDS, "negative": ["rain"] * 6}, "soup", "rain"),
    "personas": Case(
        "personas",
        PERSONAS,
        *(chat("Be glad.", "I think"), chat("Be sad.", "I think")),
        group="glad / sad",
        n_pairs=4,
    ),
    "personas in a chat": Case(
        "personas",
        {
            "suffixes": ["I think", "Well"],
            "positive_personas": ["glad"],
            "negative_personas": ["sad"],
            "template": [
                {"role": "system", "content": "{persona}"},
                {"role": "assistant", "content": "{suffix}..."},
            ],
        },
        (Message("system", "glad"), Message("assistant", "I think...")),
        (Message("system", "sad"), Message("assistant", "I think...")),
        group="glad / sad",
        n_pairs=2,
    ),
    "traits": Case(
        "traits",
        TRAITS,
        (Message("system", "Be glad."), *chat("how?")),
        (Message("system", "Be sad."), *chat("how?")),
        group="instruction 1",
    ),
}


def test_a_form_that_is_named_is_the_one_that_is_read() -> None:
    row = {"prompt": "Which?", "chosen": "good", "rejected": "bad", "response_a": "ra"}
    rows = [{**row, "prompt": p, "response_b": "rb", "winner": "a"} for p in ("Which?", "And?")]
    found = {form: PreferenceItems.load(rows, form=form)[0] for form in ("preferences", "choices")}
    assert [item.positive.strip() for item in found.values()] == ["good", "ra"]


@pytest.mark.parametrize("name", CASES)
def test_a_published_form_is_recognised(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = put(tmp_path, "a.json", json.dumps(case.content, indent=1))
    made, _ = pairs_of(str(path))
    assert made.card is not None
    assert (made.card.form, len(made), made.card.left_out) == (case.form, case.n_pairs, {})
    first = made[0]
    assert (first.positive, first.negative, first.group) == (
        case.positive,
        case.negative,
        case.group,
    )
    assert ContrastivePairs.load(case.content).pairs == made.pairs
    assert ContrastivePairs.load(path, form=case.form).pairs == made.pairs
    if isinstance(case.content, list):
        lines = put(tmp_path, "a.jsonl", as_jsonl(case.content))
        assert ContrastivePairs.load(lines).pairs == made.pairs
        assert ContrastivePairs.load(pd.DataFrame(case.content)).pairs == made.pairs
    if case.item is None:
        with pytest.raises(InputError, match="prompt, positive, negative"):
            PreferenceItems.load(path)
    else:
        items = PreferenceItems.load(path)
        assert (items[0].prompt, items[0].positive, items[0].negative) == case.item
        assert len(items) == case.n_items


def test_every_form_has_a_case() -> None:
    assert {case.form for case in CASES.values()} == set(FORMS)


@pytest.mark.filterwarnings("ignore:.*1 left out. no right or no wrong choice")
@pytest.mark.parametrize(
    ("answers", "way"),
    [
        ([0, 1, 2], "number from 0"),
        ([1, 2, 3], "number from 1"),
        (["1", "2", "3"], "number from 1"),
        ([2.0, 1.0, None], "number from 0"),
        (["C", "A", "B"], "name"),
        (["model_c", "model_b", "tie"], "name"),
        (["three", "one", "two"], "text"),
    ],
)
def test_what_tells_the_right_choice_is_decided_by_all_rows(answers: list[Any], way: str) -> None:
    texts = ["one", "two", "three"]
    rows = [{"question": "?", "choices": texts, "answer": answer} for answer in answers]
    made = ContrastivePairs.load(rows)
    first = {"name": 2, "text": 2, "number from 0": answers[0], "number from 1": 0}[way]
    assert made[0].positive == chat("?", texts[int(first)])
    assert made.card is not None
    assert made.card.how.endswith(f"; the right choice by its {way}")
    assert made.card.n_used == len(made) == sum(a not in (None, "tie") for a in answers)


def test_texts_whose_speakers_differ_before_the_last_turn_are_no_items() -> None:
    """Else what the user says next would count as the assistant's answer."""
    rows = [
        {side: f"\n\nHuman: {w}\n\nAssistant: {said}\n\nHuman: so?\n\nAssistant: {said}"}
        for side, said in (("chosen", "Yes"), ("rejected", "No"))
        for w in WORDS
    ]
    both = [{**chosen, **rejected} for chosen, rejected in zip(rows[:6], rows[6:], strict=True)]
    assert len(ContrastivePairs.load(both)) == 6
    with pytest.raises(InputError, match="no answers after a prompt that both sides share"):
        PreferenceItems.load(both)


def test_items_of_letters_have_both_orders() -> None:
    """Else a vector that prefers a letter would look like one that prefers an answer."""
    pairs = [
        {
            side: [
                {"role": "user", "content": f"{word}? (A) yes (B) no\nAnswer:"},
                {"role": "assistant", "content": letter},
            ]
            for side, letter in (("positive", "B"), ("negative", "A"))
        }
        for word in WORDS
    ]
    for source, second in (
        (letters("yes", "no (B-side)"), "Is soup good?\n\nChoices:\n (A) no (B-side)\n (B) yes"),
        (pairs, "soup? (A) no (B) yes\nAnswer:"),
    ):
        items = PreferenceItems.load(source)
        assert [item.id for item in items[:3]] == ["1", "1-exchanged", "2"]
        assert items[1].prompt == chat(second)
        assert (items[1].positive, items[1].negative) == (items[0].negative, items[0].positive)
        assert items.groups == tuple(i // 2 for i in range(12))


def test_speakers_have_their_usual_roles_under_either_key() -> None:
    rows = [
        {
            side: [{"role": "human", "content": w}, {"role": "gpt", "content": side}]
            for side in ("chosen", "rejected")
        }
        for w in WORDS
    ]
    assert ContrastivePairs.load(rows)[0].positive == chat("soup", "chosen")
