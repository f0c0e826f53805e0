"""What the tests of comparisons share: items, neutral texts, and numbers by bare hooks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from bare import mean_logprob
from conftest import sampled

import steerlens as sl
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.engine.tokenization import (
    tokenize_prompt,
)
from steerlens.measure.equal_damage import CompareSettings
from steerlens.measure.verdicts import (
    Inference,
)
from steerlens.models.hooks import resid_post

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


UNSTEERED = torch.zeros(32)


def logprob(
    model: Any, prompt: Any, text: str, vector: torch.Tensor = UNSTEERED, c: float = 0.0
) -> float:
    tokenized = tokenize_prompt(model, prompt, text)
    with sl.steer(model, {HOOK: vector}, c):
        return mean_logprob(model, tokenized.ids, tokenized.label_tokens)


def gap(model: Any, prompt: Any, *steered: Any) -> float:
    """By how much the positive continuation of `make_items` is likelier, by bare hooks."""
    texts = (" warm and good", " so cold")
    up, down = (logprob(model, prompt, text, *steered) for text in texts)
    return up - down


def assumed(n_items: int, *, n_fitted: int = 40, margin: float = 0.1) -> Inference:
    settings = CompareSettings(("mean_diff",), "kl=0.1", "own", 32, 20, None, 4.0, 200, 0, None)
    return Inference(settings, tuple(range(n_items)), tuple(range(n_fitted)), margin)


UNIT_SPREAD = np.tile([-1.0, 1.0], 25) * math.sqrt(49 / 50 * 39 / 40)
"""Fifty refits on 40 groups that vary with a standard deviation of 1."""
