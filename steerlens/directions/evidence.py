"""What a method is given at one hook, and what it says when that is not enough."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Both sides' activations at one hook (float64, residual units), and a seeded generator."""

    positive: Float[Tensor, "pair d_model"]
    negative: Float[Tensor, "pair d_model"]
    generator: torch.Generator

    @property
    def differences(self) -> Float[Tensor, "pair d_model"]:
        """`positive - negative`."""
        return self.positive - self.negative


@dataclass(frozen=True)
class Gradients:
    """Rows of the loss's gradient at one hook (float64) and the scores, which may be none.

    See `LossGradients`.
    """

    positive: Float[Tensor, "pair d_model"]
    negative: Float[Tensor, "pair d_model"]
    scores: Float[Tensor, "score d_model"]

    @property
    def paired(self) -> Float[Tensor, "pair d_model"]:
        """`negative - positive`: how the loss falls when both sides are pushed apart."""
        return self.negative - self.positive

    @property
    def pooled(self) -> Float[Tensor, "row d_model"]:
        """Minus the rows of both sides: how the loss falls when both are pushed alike."""
        return -torch.cat([self.positive, self.negative])


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
