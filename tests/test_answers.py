"""Answers of circuits: token ids, those that the sides make likelier, those of items."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

from typing import Any

import pytest
import torch
from hand_built import (
    PAIRS,
)
from test_circuits import hand

import steerlens as sl
from steerlens.circuits import (
    Answers,
    contrast_answers,
    item_answers,
)
from steerlens.errors import InputError

# Answers


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (torch.tensor([1, 2]), torch.tensor([3, 4])),
        (torch.tensor([[1.0]]), torch.tensor([[2.0]])),
        (torch.tensor([[1], [2]]), torch.tensor([[2]])),
        (torch.zeros((1, 0), dtype=torch.long), torch.tensor([[2]])),
    ],
)
def test_what_is_no_answer(positive: torch.Tensor, negative: torch.Tensor) -> None:
    unchecked = object.__new__(Answers)
    object.__setattr__(unchecked, "positive", positive)
    object.__setattr__(unchecked, "negative", negative)
    with pytest.raises(InputError, match="token ids, a row a prompt"):
        unchecked.__post_init__()


def test_answers_by_hand() -> None:
    answers = Answers(torch.tensor([[0, 1]]), torch.tensor([[2]]))
    logits = torch.tensor([[1.0, 3.0, 5.0, 9.0], [0.0, 4.0, 1.0, 9.0]])
    assert answers.logit_difference(logits).tolist() == [-3.0, 1.0]
    own = Answers(torch.tensor([[0], [1]]), torch.tensor([[2], [2]]))
    assert own.logit_difference(logits).tolist() == [-4.0, 3.0]
    assert own.part(slice(1, 2)).logit_difference(logits[1:]).tolist() == [3.0]


def test_contrast_answers_are_what_the_sides_make_likelier(hand: Any) -> None:
    words = contrast_answers(hand, PAIRS, n_tokens=1).words(hand)
    assert words == {"positive": ["good"], "negative": ["bad"]}
    for n, message in ((0, "1 or more, got 0"), (81, "half the vocabulary")):
        with pytest.raises(InputError, match=message):
            contrast_answers(hand, PAIRS, n_tokens=n)


def test_answers_of_items(hand: Any) -> None:
    def items(negative: str) -> sl.PreferenceItems:
        return sl.PreferenceItems(
            (
                sl.PreferenceItem("the day was", " good day", negative, "a"),
                sl.PreferenceItem("it went", " warm", " cold", "b"),
            ),
            "items",
        )

    prompts, answers = item_answers(hand, items(" bad day"))
    assert answers.words(hand) == {"positive": ["good"], "negative": ["bad"]}
    assert prompts.last.tolist() == [3, 2]
    assert prompts.real.sum(dim=1).tolist() == [4, 3]
    with pytest.raises(InputError, match="item 'a' begin with the same token"):
        item_answers(hand, items(" good night"))
