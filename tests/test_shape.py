"""The shape of the boundary in a plane."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import steerlens as sl
from steerlens.directions.directions import Directions
from steerlens.errors import InputError
from steerlens.measure.rows import main_orthogonal
from steerlens.tables import SHAPE_COLUMNS


def test_the_shape_has_the_two_boundaries_of_the_direction(
    llama: Any, many: sl.ContrastivePairs, directions: Directions
) -> None:
    options: dict[str, Any] = {"budget": "nats=0.1", "n_bootstrap": 50}
    shape = sl.Study(llama, many, directions, **options).boundary_shape(2, n_angles=8)
    table = shape.table
    assert list(table.columns) == [column.name for column in SHAPE_COLUMNS]
    assert table.angle.tolist() == [45.0 * i for i in range(8)]
    row = sl.find_boundary(llama, many, directions, layers=[2], **options).layers.iloc[0]
    assert table.boundary[0] == pytest.approx(row.boundary_pos, rel=0.03)
    assert table.boundary[4] == pytest.approx(-row.boundary_neg, rel=0.03)
    np.testing.assert_allclose(np.hypot(table.x, table.y), table.boundary)
    assert table.y[2] == pytest.approx(table.boundary[2])
    assert table.attrs["radius_ratio"] == pytest.approx(table.boundary.max() / table.boundary.min())
    assert table.attrs["radius_ratio"] > 1.05
    assert float(shape.direction @ shape.orthogonal) == pytest.approx(0, abs=1e-6)
    turned = replace(
        directions,
        vectors=torch.stack(
            [
                shape.orthogonal if name == "blocks.2.hook_resid_post" else directions[name]
                for name in directions.hook_names
            ]
        ),
    )
    across = sl.find_boundary(llama, many, turned, layers=[2], **options).layers.iloc[0]
    assert table.boundary[2] == pytest.approx(across.boundary_pos, rel=0.03)


def test_the_main_orthogonal_direction_by_hand() -> None:
    """Without their first component the differences are (0, 1, 0), (0, 2, 0) and (0, 0, 1)."""
    differences = torch.tensor([[5.0, 1, 0], [7, 2, 0], [3, 0, 1]], dtype=torch.float64)
    direction = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    found = main_orthogonal(differences, direction)
    torch.testing.assert_close(found, torch.tensor([0.0, 1, 0], dtype=torch.float64))
    with pytest.raises(InputError, match="no plane is left"):
        main_orthogonal(torch.outer(torch.tensor([1.0, 2.0]).double(), direction), direction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "0,1"}, "one hook"),
        ({"layer": 2, "n_angles": 2}, "n_angles"),
        ({"layer": 2, "search_range": -1}, "search_range"),
    ],
)
def test_a_shape_without_meaning_is_refused(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: Directions,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        sl.Study(llama, many, directions).boundary_shape(**options)
