"""The published forms: each is recognised, and gives the pairs and items that it says."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from forms import PARTS, PERSONAS, SAID, TOPICS, TRAITS, WORDS, as_jsonl, chat, letters, put

from steerlens.cli.options import pairs_of
from steerlens.data import FORMS, ContrastivePairs, Message, PreferenceItems
from steerlens.errors import InputError


def said(*texts: str) -> list[dict[str, str]]:
    """`chat` as a file has it."""
    return [message._asdict() for message in chat(*texts)]


CASES: dict[str, tuple[str, Any, Any, int, Any, int]] = {
    # what -> form, content, the first pair's sides and group, pairs, the first item, items
    "letters": (
        *("questions", letters("yes", "no")),
        (chat(f"{letters('yes', 'no')[0]['question']}", "(A)"), None, None),
        *(6, (chat(letters("yes", "no")[0]["question"]), "(A)", "(B)"), 12),
    ),
    "yes and no": (
        "questions",
        [
            {"question": f"Do you like {w}?", "statement": "x", "label_confidence": 0.9}
            | {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
            for w in WORDS
        ],
        (chat("Do you like soup?", "Yes"), chat("Do you like soup?", "No"), None),
        *(6, (chat("Do you like soup?"), "Yes", "No"), 6),
    ),
    "answers of texts": (
        "preferences",
        [{"prompt": f"Say {w}.", "chosen": "Yes!", "rejected": "No.", "score": 1} for w in WORDS],
        (chat("Say soup.", "Yes!"), chat("Say soup.", "No."), None),
        *(6, (chat("Say soup."), "Yes!", "No."), 6),
    ),
    "answers after a space": (
        "preferences",
        [{"prompt": f"The {w} is", "chosen": " good", "rejected": " bad"} for w in WORDS],
        ("The soup is good", "The soup is bad", None),
        *(6, ("The soup is", " good", " bad"), 6),
    ),
    "whole chats": (
        "preferences",
        [
            {
                "prompt": w,
                **{
                    side: [{"role": "user", "content": w}, {"role": "assistant", "content": side}]
                    for side in ("chosen", "rejected")
                },
            }
            for w in WORDS
        ],
        (chat("soup", "chosen"), chat("soup", "rejected"), None),
        *(6, (chat("soup"), "chosen", "rejected"), 6),
    ),
    "question and system": (
        "preferences",
        [{"system": "kind", "question": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        ((Message("system", "kind"), *chat("soup", "Yes")), None, None),
        *(6, ((Message("system", "kind"), *chat("soup")), "Yes", "No"), 6),
    ),
    "dialogues as text": (
        "preferences",
        [
            {
                "chosen": f"\n\nHuman: {w}?\n\nAssistant: Yes",
                "rejected": f"\n\nHuman: {w}?\n\nAssistant: No",
            }
            for w in WORDS
        ],
        ("\n\nHuman: soup?\n\nAssistant: Yes", None, None),
        *(6, ("\n\nHuman: soup?\n\nAssistant:", " Yes", " No"), 6),
    ),
    "sharegpt": (
        "preferences",
        [
            {
                "conversations": SAID,
                "chosen": {"from": "gpt", "value": f"Yes, {w}"},
                "rejected": {"from": "gpt", "value": "No"},
            }
            for w in WORDS
        ],
        ((Message("system", "kind"), *chat("how", "Yes, soup")), None, None),
        *(6, ((Message("system", "kind"), *chat("how")), "Yes, soup", "No"), 6),
    ),
    "several wrong answers": (
        "questions",
        [
            {"question": f"{w}? (A) a (B) b", "answer_matching_behavior": " (A)"}
            | {"answer_not_matching_behavior": [" (B)", " (C)"]}
            for w in WORDS
        ],
        (chat("soup? (A) a (B) b", "(A)"), chat("soup? (A) a (B) b", "(B)"), None),
        *(6, (chat("soup? (A) a (B) b"), "(A)", "(B)"), 12),
    ),
    "truthful answers": (
        "questions",
        [
            {"question": f"{w}?", "best_answer": "Yes.", "correct_answers": ["Yes."]}
            | {"incorrect_answers": ["No.", "Never."]}
            for w in WORDS
        ],
        *(
            (chat("soup?", "Yes."), chat("soup?", "No."), None),
            6,
            (chat("soup?"), "Yes.", "No."),
            6,
        ),
    ),
    **{
        f"truthful answers in a table{how}": (
            "questions",
            [{"Question": w, **answers, "Incorrect Answers": "No.; Never."} for w in WORDS],
            (chat("soup", "Yes."), chat("soup", "No."), None),
            *(6, (chat("soup"), "Yes.", "No."), 6),
        )
        for how, answers in {
            "": {"Best Answer": "Yes."},
            ", best ones": {"Best Answer": "Yes.", "Best Incorrect Answer": "No."},
            ", lists": {"Correct Answers": "Yes.; Sure."},
        }.items()
    },
    **{
        f"choices {how}": (
            "choices",
            [{"question": f"{w}?", **answers} for w in WORDS],
            (chat("soup?", "Yes."), chat("soup?", "No."), None),
            *(6, (chat("soup?"), "Yes.", "No."), 6),
        )
        for how, answers in {
            "and labels": {
                "mc1_targets": {"choices": ["No.", "Yes.", "Never."], "labels": [0, 1, 0]},
                "mc2_targets": {"choices": ["Sure.", "Yes.", "No."], "labels": [1, 1, 0]},
            },
            "with labels": {"mc1_targets": {"Yes.": 1, "No.": 0, "Never.": 0}},
            "by number": {"choices": ["No.", "Yes.", "Never."], "answer": 1},
            "by letter": {"options": ["No.", "Yes."], "answer": "B"},
            "by name": {
                "choices": {"text": ["No.", "Yes."], "label": ["1", "2"]},
                "answerKey": "2",
            },
            "by the name of each": {"options": {"A": "No.", "B": "Yes."}, "answer_idx": "B"},
            "by text": {"options": ["No.", "Yes."], "answer": "Yes."},
            "of a column each": {"ans0": "No.", "ans1": "Never.", "ans2": "Yes.", "label": 2},
            "of lettered columns": {"A": "No.", "B": "Yes.", "answer": "B"},
            "of options from 1": {"option1": "No.", "option2": "Yes.", "answer": "2"},
            "of objects": {
                "choices": [{"text": "No.", "label": 0}, {"text": "Yes.", "label": 1}],
            },
        }.items()
    },
    "a question on a text": (
        "choices",
        [
            {"context": f"On {w}.", "question": "Who?", "references": ["No", "Yes"]}
            | {"gold_index": 1, "category": "age"}
            for w in WORDS
        ],
        (chat("On soup.\nWho?", "Yes"), chat("On soup.\nWho?", "No"), None),
        *(6, (chat("On soup.\nWho?"), "Yes", "No"), 6),
    ),
    "two chats and the winner": (
        "choices",
        [
            {"conversation_a": said(w, "No"), "conversation_b": said(w, "Yes"), "winner": "model_b"}
            for w in WORDS
        ],
        (chat("soup", "Yes"), chat("soup", "No"), None),
        *(6, (chat("soup"), "Yes", "No"), 6),
    ),
    **{
        f"stereotypes, {how}": (
            "choices",
            [{"id": w, "context": f"{w} is BLANK", "sentences": sentences} for w in WORDS],
            *(("it is weak", "it is strong", None), 6, None, 0),
        )
        for how, sentences in {
            "words": [
                {"sentence": f"it is {of}", "gold_label": label, "labels": []}
                for of, label in (
                    *(("fish", "unrelated"), ("strong", "anti-stereotype")),
                    ("weak", "stereotype"),
                )
            ],
            "numbers": {
                "sentence": ["it is fish", "it is strong", "it is weak"],
                "gold_label": [2, 0, 1],
            },
        }.items()
    },
    "a few sentences a row": (
        "choices",
        [
            {"sentence": [f"{w} is bad", f"{w} is good"][:: 1 - 2 * (i % 2)]}
            | {"label": [False, True][:: 1 - 2 * (i % 2)]}
            for i, w in enumerate(WORDS)
        ],
        *(("soup is good", "soup is bad", None), 6, None, 0),
    ),
    "more and less": (
        "pairs",
        [
            {"sent_more": f"{w} is bad", "sent_less": f"{w} is good", "bias_type": "age"}
            | {"stereo_antistereo": ("stereo", "antistereo")[i % 2]}
            for i, w in enumerate(WORDS)
        ],
        *(("soup is bad", "soup is good", None), 6, None, 0),
    ),
    "a true and a false target": (
        "pairs",
        [{"prompt": w, "target_true": " a", "target_false": " b", "relation": "x"} for w in WORDS],
        *(("soup a", "soup b", None), 6, ("soup", " a", " b"), 6),
    ),
    **{
        f"labelled few{how}": (
            "choices",
            {"data": data, "labels": [[False, True], [True, False], [True, False]]},
            *(("a truth", "a lie", None), 3, None, 0),
        )
        for how, data in {
            "": [["a lie", "a truth"], ["b", "c"], ["d", "e"]],
            " in a row": ["a lie", "a truth", "b", "c", "d", "e"],
        }.items()
    },
    "instruction and input": (
        "preferences",
        [{"instruction": "Sum up:", "input": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        *((chat("Sum up:\nsoup", "Yes"), None, None), 6, (chat("Sum up:\nsoup"), "Yes", "No"), 6),
    ),
    "input alone": (
        "preferences",
        [{"input": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        *((chat("soup", "Yes"), None, None), 6, (chat("soup"), "Yes", "No"), 6),
    ),
    "preferred output": (
        "preferences",
        [
            {"input": {"messages": [{"role": "user", "content": w}], "tools": []}}
            | {
                f"{kind}_output": [{"role": "assistant", "content": kind}]
                for kind in ("preferred", "non_preferred")
            }
            for w in WORDS
        ],
        (chat("soup", "preferred"), chat("soup", "non_preferred"), None),
        *(6, (chat("soup"), "preferred", "non_preferred"), 6),
    ),
    "labels as columns": (
        "labelled",
        {key: [row[key] for row in TOPICS] for key in ("statement", "label", "topic")},
        *(("soup is cold", "soup is hot", "soup"), 6, None, 0),
    ),
    "items as columns": (
        "pairs",
        {"prompt": WORDS, "positive": [" good"] * 6, "negative": [" bad"] * 6},
        *(("soup good", "soup bad", None), 6, ("soup", " good", " bad"), 6),
    ),
    "labelled answers": (
        "labelled",
        [
            {"prompt": w, "completion": answer, "label": answer == "Yes"}
            for answer in ("No", "Yes")
            for w in WORDS
        ],
        *((chat("soup", "Yes"), chat("soup", "No"), "soup"), 6, (chat("soup"), "Yes", "No"), 6),
    ),
    "another label is no topic": (
        "labelled",
        [{**r, "topic": "x", "has_a": bool(i % 2)} for i, r in enumerate(TOPICS)],
        *(("soup is cold", "soup is hot", None), 6, None, 0),
    ),
    "acceptable": (
        "pairs",
        [{"sentence_good": w, "sentence_bad": f"{w}s", "UID": "agreement"} for w in WORDS],
        *(("soup", "soups", None), 6, None, 0),
    ),
    "parts of content": (
        "pairs",
        [{"positive": PARTS, "negative": [{"role": "user", "content": w}]} for w in WORDS],
        (chat("how"), chat("soup"), None),
        *(6, None, 0),
    ),
    "items": (
        "pairs",
        [{"prompt": f"The {w} is", "positive": " good", "negative": " bad"} for w in WORDS],
        ("The soup is good", "The soup is bad", None),
        *(6, ("The soup is", " good", " bad"), 6),
    ),
    "by topic": ("labelled", TOPICS, ("soup is cold", "soup is hot", "soup"), 6, None, 0),
    "words as labels": (
        "labelled",
        [{"text": r["statement"], "label": bool(r["label"]), "topic": r["topic"]} for r in TOPICS],
        *(("soup is cold", "soup is hot", "soup"), 6, None, 0),
    ),
    "by template": (
        "labelled",
        [
            {"statement": f"the {w} is in {where}", "label": int(where == "New York")}
            for where in ("New York", "Oslo")
            for w in (WORDS if where == "Oslo" else WORDS[::-1])
        ],
        *(("the river is in New York", "the river is in Oslo", None), 6, None, 0),
    ),
    "lists": (
        "lists",
        {"positive": WORDS, "negative": ["rain"] * 6},
        *(("soup", "rain", None), 6, None, 0),
    ),
    "personas": (
        "personas",
        PERSONAS,
        *((chat("Be glad.", "I think"), chat("Be sad.", "I think"), "glad / sad"), 4, None, 0),
    ),
    "personas in a chat": (
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
        (
            (Message("system", "glad"), Message("assistant", "I think...")),
            *((Message("system", "sad"), Message("assistant", "I think...")), "glad / sad"),
        ),
        *(2, None, 0),
    ),
    "traits": (
        "traits",
        TRAITS,
        (
            (Message("system", "Be glad."), Message("user", "how?")),
            *((Message("system", "Be sad."), Message("user", "how?")), "instruction 1"),
        ),
        *(6, None, 0),
    ),
}


def test_a_form_that_is_named_is_the_one_that_is_read() -> None:
    row = {"prompt": "Which?", "chosen": "good", "rejected": "bad", "response_a": "ra"}
    rows = [{**row, "prompt": p, "response_b": "rb", "winner": "a"} for p in ("Which?", "And?")]
    found = {form: PreferenceItems.load(rows, form=form)[0] for form in ("preferences", "choices")}
    assert [item.positive.strip() for item in found.values()] == ["good", "ra"]


@pytest.mark.parametrize("name", CASES)
def test_a_published_form_is_recognised(name: str, tmp_path: Path) -> None:
    form, content, (positive, negative, group), n_pairs, item, n_items = CASES[name]
    path = put(tmp_path, "a.json", json.dumps(content, indent=1))
    made, _ = pairs_of(str(path))
    assert made.card is not None
    assert (made.card.form, len(made), made.card.left_out) == (form, n_pairs, {})
    assert (made[0].positive, made[0].group) == (positive, group)
    assert negative is None or made[0].negative == negative
    assert ContrastivePairs.load(content).pairs == made.pairs
    assert ContrastivePairs.load(path, form=form).pairs == made.pairs
    if isinstance(content, list):
        lines = put(tmp_path, "a.jsonl", as_jsonl(content))
        assert ContrastivePairs.load(lines).pairs == made.pairs
        assert ContrastivePairs.load(pd.DataFrame(content)).pairs == made.pairs
    if item is None:
        with pytest.raises(InputError, match="prompt, positive, negative"):
            PreferenceItems.load(path)
    else:
        items = PreferenceItems.load(path)
        assert (items[0].prompt, items[0].positive, items[0].negative) == item
        assert len(items) == n_items


def test_every_form_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == set(FORMS)


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
