"""Cosines between vectors: across layers, methods and datasets."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.models.hooks import hook_layer
from steerlens.models.weight_processing import check_one
from steerlens.tables import Row, to_frame
from steerlens.validation import checked


@checked
def cosine_table(
    vectors: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
) -> pd.DataFrame:
    """Cosine of every two directions of some named vectors, one row a pair (columns `cosines`).

    `vectors` is name -> steering vector or directions, or a list of them, called "1", "2" and so
    on; of each, all hooks take part, so one vector is compared across its layers too. `random_sd`
    is the standard deviation of the cosine of two random directions, `1 / sqrt(d_model)`;
    directions in a real residual stream are not that random, so a cosine beyond it is not yet a
    shared concept. Raises `InputError` when there are fewer than two directions, their lengths
    differ, one is zero or not finite, or they were fitted on models with other weight processing.

    Examples:
        >>> table = sl.cosine_table({"a": vector, "minus a": -1 * vector})
        >>> table.cosine.tolist()
        [-1.0]
        >>> sl.cosine_table([vector, -1 * vector]).vector_b.tolist()
        ['2']
    """
    if not isinstance(vectors, Mapping):
        vectors = {str(number): vector for number, vector in enumerate(vectors, 1)}
    check_one(vectors)
    entries = [
        (name, hook, vector[hook].detach().double().clone())
        for name, vector in vectors.items()
        for hook in vector
    ]
    widths = sorted({len(direction) for _, _, direction in entries})
    if len(entries) < 2 or len(widths) > 1 or widths == [0]:
        raise InputError(
            f"expected two or more directions of one length, got {len(entries)} of "
            f"{' and '.join(map(str, widths)) or 'no'} numbers"
        )
    for name, hook, direction in entries:
        size = float(direction.abs().max())
        if not 0 < size < float("inf"):
            raise InputError(f"{name} has no direction at {hook}: it is zero or not finite")
        direction /= size  # so that squares neither overflow nor vanish
    rows: list[Row] = [
        {
            "vector_a": name_a,
            "hook_a": hook_a,
            "layer_a": hook_layer(hook_a),
            "vector_b": name_b,
            "hook_b": hook_b,
            "layer_b": hook_layer(hook_b),
            "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
            "random_sd": widths[0] ** -0.5,
        }
        for (name_a, hook_a, a), (name_b, hook_b, b) in combinations(entries, 2)
    ]
    return to_frame(rows, "cosines", {})
