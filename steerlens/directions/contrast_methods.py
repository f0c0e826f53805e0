"""Methods that look at the activations of both sides alone: one forward pass of the pairs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.errors import InputError


@dataclass(frozen=True)
class Activations:
    """Both sides' activations at one hook (float64, residual units), and what controls draw from.

    `generator` is seeded for the hook; `flips` are +1 or -1 a pair, the same at every hook.
    """

    positive: Float[Tensor, "pair d_model"]
    negative: Float[Tensor, "pair d_model"]
    generator: torch.Generator
    flips: Float[Tensor, " pair"]

    @property
    def differences(self) -> Float[Tensor, "pair d_model"]:
        """`positive - negative`."""
        return self.positive - self.negative


def mean_diff(sides: Activations) -> Float[Tensor, " d_model"]:
    """The mean of the differences: `mean_i d_i`, to be normalised.

    Source: Turner et al. 2023 (arXiv:2308.10248) for one pair, Rimsky et al. 2023
    (arXiv:2312.06681) for many. Cost: one sum. Fails when the differences cancel or are all zero (a
    position at which both prompts have seen the same tokens).
    """
    return sides.differences.mean(dim=0)


def pca(sides: Activations) -> Float[Tensor, " d_model"]:
    """The first right singular vector of the differences, uncentred: `argmax_u sum_i (d_i . u)^2`.

    Centring would subtract the mean difference, the very thing looked for (see `pca_centred`).
    Source: Zou et al. 2023 (arXiv:2310.01405), who centre. Cost: one thin SVD. Fails when one
    pair's difference is much longer than the rest: it then decides alone.
    """
    return first_axis(sides.differences)


def pca_centred(sides: Activations) -> Float[Tensor, " d_model"]:
    """PCA of the differences after subtracting their mean: `pca` of `d_i - mean_j d_j`.

    This removes the mean difference, the thing most users look for, and keeps the direction in
    which the pairs differ from one another. It is here because other tools do it, and for
    comparison. Cost: one thin SVD. Fails when all differences are equal: nothing is left.
    """
    return first_axis(sides.differences - sides.differences.mean(dim=0))


def pca_pooled(sides: Activations) -> Float[Tensor, " d_model"]:
    """PCA of both sides' activations, centred together on their common mean.

    `argmax_u sum_i ((a_i - mean a) . u)^2` over all prompts. Cost: one thin SVD of twice as many
    rows. Fails when the prompts vary more in something else (topic, length) than between the sides:
    it finds that instead.
    """
    both = torch.cat([sides.positive, sides.negative])
    return first_axis(both - both.mean(dim=0))


def lda(sides: Activations) -> Float[Tensor, " d_model"]:
    """Linear discriminant: `Sigma_w^-1 (mean_pos - mean_neg)`, shrunk within-class covariance.

    `Sigma_w = (1 - s) X^T X / N + s tr(X^T X) / (N d) I`, X the activations of both sides less
    their own side's mean, s Ledoit and Wolf's shrinkage (2004, scikit-learn). Cost: one solve in
    the smaller of prompts and d_model. Better than `mean_diff` where the noise is strong along a
    few axes. Fails when there are few pairs: the shrinkage is then near 1, and it is `mean_diff`.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    both = (sides.positive, sides.negative)
    within = torch.cat([side - side.mean(dim=0) for side in both])
    variance = float(within.square().mean())
    if variance == 0:
        raise InputError(
            "the activations of each side are all equal, so there is no within-class covariance; "
            "use mean_diff"
        )
    shrinkage = float(ledoit_wolf_shrinkage(within.numpy(), assume_centered=True))
    rows = within * ((1 - shrinkage) / len(within)) ** 0.5
    # In units of the variance, so that the result is as long as a difference.
    return variance * ridge_solve(rows, max(shrinkage, 1e-9) * variance, mean_diff(sides))


def probe(sides: Activations) -> Float[Tensor, " d_model"]:
    """The weights of a logistic regression that tells the two sides apart (scikit-learn, L2, C=1).

    `argmin_w |w|^2 / 2 + sum_j log(1 + exp(-y_j (w . x_j + b)))`, x the activations centred on
    their mean and divided by the root mean square of their entries. Cost: seconds where pairs and
    d_model are in the thousands. Fails as a steering direction where the classes are told apart by
    something small: it weighs what separates, not what differs most.
    """
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([sides.positive, sides.negative])
    centred = both - both.mean(dim=0)
    scale = centred.square().mean().sqrt()
    n_pairs = len(sides.positive)
    labels = [1] * n_pairs + [0] * n_pairs
    fitted = LogisticRegression(C=1.0, max_iter=5000).fit((centred / scale).numpy(), labels)
    weights = torch.from_numpy(fitted.coef_[0]).to(both)
    return scale * weights


def random(sides: Activations) -> Float[Tensor, " d_model"]:
    """A uniformly random direction, the control that any claim has to beat.

    Drawn from the seed and the hook name, so it does not depend on which other hooks are fitted.
    Its sign is not fixed on the differences: that would tell it which side is which. Cost: none.
    """
    return torch.randn(
        sides.positive.shape[-1], generator=sides.generator, dtype=sides.positive.dtype
    )


def shuffled(sides: Activations) -> Float[Tensor, " d_model"]:
    """`mean_diff` with the labels of groups of pairs exchanged by coin: `mean_i s_g(i) d_i`.

    The harder control: it lies where the pairs differ, and cannot know which side is which. Each
    group's sign is an independent fair coin, drawn from the seed and the same at every hook, so
    that the labels as they are could have been drawn too; its own sign is not fixed on the
    differences. Cost: one sum.
    """
    return (sides.flips[:, None] * sides.differences).mean(dim=0)


def coin_flips(groups: Sequence[int], seed: int) -> Float[Tensor, " pair"]:
    """A sign a pair, +1 or -1 with equal chances, one for each of the groups (numbered from 0).

    Examples:
        >>> signs = coin_flips((0, 0, 1, 1), seed=3)
        >>> bool(signs[0] == signs[1] and signs[2] == signs[3])
        True
    """
    digest = hashlib.sha256(f"{seed}:flips".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    signs = 2.0 * torch.randint(0, 2, (max(groups) + 1,), generator=generator).double() - 1.0
    flips: Tensor = signs[torch.tensor(groups)]
    return flips


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
