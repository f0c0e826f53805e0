"""Cosines between vectors."""

import pytest
import torch

import steerlens as sl
from steerlens.errors import InputError
from steerlens.models.hooks import resid_post
from steerlens.tables import COLUMNS


def test_cosines_by_hand() -> None:
    a = {resid_post(0): torch.tensor([1.0, 0.0]), resid_post(3): torch.tensor([0.0, 2.0])}
    b = sl.SteeringVector.from_vectors({resid_post(0): torch.tensor([3.0, 4.0])})
    table = sl.measure.cosine_table({"a": a, "b": b})
    assert list(table.columns) == [column.name for column in COLUMNS["cosines"]]
    assert table[["vector_a", "layer_a", "vector_b", "layer_b"]].values.tolist() == [
        ["a", 0, "a", 3],
        ["a", 0, "b", 0],
        ["a", 3, "b", 0],
    ]
    assert table.cosine.tolist() == pytest.approx([0.0, 0.6, 0.8])
    listed = sl.cosine_table([a, b])
    assert listed.cosine.tolist() == table.cosine.tolist()
    assert listed.vector_b.tolist() == ["1", "2", "2"]
    assert table.random_sd.tolist() == pytest.approx([2**-0.5] * 3)


def test_what_has_no_cosine() -> None:
    one = {resid_post(0): torch.ones(2)}
    with pytest.raises(InputError, match="got 1 of 2 numbers"):
        sl.measure.cosine_table({"a": one})
    with pytest.raises(InputError, match="2 and 3 numbers"):
        sl.measure.cosine_table({"a": one, "b": {resid_post(0): torch.ones(3)}})
    for bad in (torch.zeros(2), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(InputError, match="zero or not finite"):
            sl.measure.cosine_table({"a": one, "b": {resid_post(0): bad}})
    huge = {resid_post(0): torch.tensor([1e30, 1e30])}
    assert sl.measure.cosine_table({"a": one, "b": huge}).cosine.item() == pytest.approx(1)
    with pytest.raises(InputError, match="got 0 of no numbers"):
        sl.measure.cosine_table({})
