"""Writers and readers on the real model: sums that close, estimates beside exact patching."""

from typing import Any

import pytest

import steerlens as sl
from steerlens.circuits import contrast_answers, find_readers, find_writers, make_prompts

pytestmark = pytest.mark.real


def test_writers_and_readers_of_sentiment(real_model: Any) -> None:
    train = sl.ContrastivePairs.load("sentiment")[:40]
    test = sl.ContrastivePairs.load("sentiment", split="test")[:4]
    directions = sl.fit_directions(sl.collect_differences(real_model, train, layers=[12]))
    writers = find_writers(real_model, test, directions, layer=12)
    assert writers.table.attrs["residual"] < 1e-3
    assert len(writers.table) == 1 + 13 * 10
    vector = sl.SteeringVector.from_directions(real_model, directions)
    prompts = make_prompts(real_model, sl.engine.tokenize_pairs(real_model, test).positive)
    answers = contrast_answers(real_model, train)
    found = find_readers(real_model, prompts, answers, vector, 20, top=14, n_draws=3)
    # What carries a push of this size is close to linear in it.
    for kind, r in found.table.attrs["correlation"].items():
        assert r is not None, kind
        assert r > 0.95, kind
    claims = found.claims.set_index("test").remaining
    assert claims["named components"] < claims["random components"]
    assert claims["attention values"] < 0.3 < claims["attention patterns"]
