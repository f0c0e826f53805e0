"""Methods that look at the gradients of the loss: one forward and backward pass of the pairs.

They take the rows as a form gives them. `paired`: `r_i = g_neg_i - g_pos_i`, g the gradient of each
pair's noref loss (see `LossGradients`): how it falls when the sides are pushed apart. `pooled`:
minus the rows of both sides, how it falls when both are pushed alike; the separation's rows point
opposite ways there and nearly cancel, so what is left is the coherence term's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.directions.contrast_methods import first_axis, ridge_solve
from steerlens.errors import InputError

Form = Literal["paired", "pooled"]
FisherKind = Literal["empirical", "centred", "norm_weighted"]

RIDGE = 1.0
"""Regularisation of a Fisher matrix, in multiples of its mean eigenvalue, trace / d_model."""


@dataclass(frozen=True)
class Gradients:
    """Rows r_i of the loss's gradient at one hook (float64), and the scores, which may be none."""

    rows: Float[Tensor, "row d_model"]
    scores: Float[Tensor, "score d_model"]

    @classmethod
    def of(
        cls,
        positive: Float[Tensor, "pair d_model"],
        negative: Float[Tensor, "pair d_model"],
        scores: Float[Tensor, "score d_model"],
        *,
        form: Form = "paired",
    ) -> "Gradients":
        """From the gradients at the positive and the negative prompts."""
        rows = negative - positive if form == "paired" else -torch.cat([positive, negative])
        return cls(rows, scores)


def gradient_mean(gradients: Gradients) -> Float[Tensor, " d_model"]:
    """The mean descent direction of the loss: `mean_i r_i`.

    A small push of +v on the positive and -v on the negative prompts (`pooled`: of +v on both)
    lowers the loss fastest along it. Cost: a mean. Fails when one term's weight drowns the other
    (see `gradient_terms`), or the gradients of the pairs disagree.
    """
    return gradients.rows.mean(dim=0)


def gradient_svd(gradients: Gradients) -> Float[Tensor, " d_model"]:
    """The first right singular vector of the rows, uncentred: `argmax_u sum_i (r_i . u)^2`.

    Its sign is that of descent on average. Cost: one thin SVD. Fails when one pair's gradient is
    much longer than the rest: it then decides alone.
    """
    return first_axis(gradients.rows)


def gradient_fisher(
    gradients: Gradients, kind: FisherKind = "empirical"
) -> Float[Tensor, " d_model"]:
    """The mean descent direction, preconditioned by the second moments of the rows.

    `(F + ridge tr(F)/d I)^-1 mean_i r_i`. `empirical`:
    `F = mean_i r_i r_i^T`; `centred`: the covariance, of `r_i - mean r`; `norm_weighted`:
    `sum_i w_i r_i r_i^T` with `w_i = |r_i| / sum_j |r_j|`, which turns further away from what the
    longest rows share. The ridge is relative to the trace (1 by default), so the result does not
    depend on the scale of the loss. Source: the empirical Fisher of natural gradient descent (Amari
    1998); Kunstner et al. 2019 (arXiv:1905.12558) on why it is not the Fisher information. Cost:
    one solve in the smaller of rows and d_model. Fails when rows agree: their own direction is
    then the one most shrunk.
    """
    rows, n = gradients.rows, len(gradients.rows)
    weights = torch.full((n,), 1 / n, dtype=rows.dtype)
    moments = rows
    if kind == "centred":
        moments = rows - rows.mean(dim=0)
    if kind == "norm_weighted":
        norms = rows.norm(dim=-1)
        weights = norms / norms.sum()
    return _preconditioned(moments * weights.sqrt()[:, None], rows.mean(dim=0))


def fisher_pullback(gradients: Gradients) -> Float[Tensor, " d_model"]:
    """The mean descent direction in the metric of the model's own next-token distributions.

    `(F + ridge tr(F)/d I)^-1 mean_i r_i` with `F = mean_j s_j s_j^T`, s_j the
    gradient at the hook of the log-probability of labels drawn from the model, over the root of
    their number: the Fisher information pulled back to the hook, of which `v^T F v` is the
    curvature of the mean KL per token along v, for a push at the position that was read. So the
    push there that gains most for the KL it costs.
    Source: natural gradient, Amari 1998. Cost: one more backward pass of the positive prompts for
    each score, one solve. Fails with few scores: F is then known in few directions, and the ridge
    decides elsewhere.
    """
    scores = gradients.scores
    if len(scores) == 0:
        raise InputError("the gradients hold no scores; ask loss_gradients for some (n_scores)")
    if not scores.any():
        raise InputError(
            "the model's predictions do not depend on this hook and position, so there is no "
            "metric; take an earlier position"
        )
    return _preconditioned(scores / len(scores) ** 0.5, gradients.rows.mean(dim=0))


def _preconditioned(
    rows: Float[Tensor, "row d_model"], target: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    ridge = RIDGE * float(rows.square().sum()) / rows.shape[-1]
    if ridge == 0:
        raise InputError(
            "the second moments of the gradient rows are zero: they are all equal, or all zero; "
            "use gradient_mean"
        )
    # In units of the ridge, so that the result is about as long as the mean row.
    return ridge * ridge_solve(rows, ridge, target)
