"""What several methods solve: a ridge system and a first principal axis."""

import torch
from jaxtyping import Float
from torch import Tensor


def ridge_solve(
    rows: Float[Tensor, "row d_model"], ridge: float, target: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """`(sum_i r_i r_i^T + ridge I)^-1 target`, in the space of the smaller dimension.

    With fewer rows than dimensions by Woodbury's identity, so no d_model x d_model matrix is made.
    """
    n, d_model = rows.shape
    eye = torch.eye(min(n, d_model), dtype=rows.dtype)
    if n < d_model:
        inner: Tensor = torch.linalg.solve(rows @ rows.T + ridge * eye, rows @ target)
        return (target - rows.T @ inner) / ridge
    solved: Tensor = torch.linalg.solve(rows.T @ rows + ridge * eye, target)
    return solved


def first_axis(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " d_model"]:
    """The first right singular vector of the rows, as long as their root mean square along it.

    So rows that are next to nothing give next to nothing.
    """
    _, singular_values, axes = torch.linalg.svd(rows, full_matrices=False)
    scaled: Tensor = axes[0] * singular_values[0] / len(rows) ** 0.5
    return scaled
