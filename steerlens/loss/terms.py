"""The contrastive steering loss and its terms, and other losses that vectors are trained by."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.errors import InputError
from steerlens.loss.labels import predictions
from steerlens.validation import NotNegative, checked

MARGIN = 0.99
WEIGHT = 1e4


class SteeringLoss(NamedTuple):
    """`loss = separation + coherence_penalty`, each a scalar; lower is better.

    `separation` is minus the mean separation (or projection), in residual units;
    `coherence_penalty` is at least 0, in nats^2 times the weight.

    Examples:
        >>> hs_pos, hs_neg = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> terms = sl.loss.contrastive_steering_loss_noref(hs_pos, hs_neg, torch.tensor([-2.0]))
        >>> float(terms.separation), float(terms.coherence_penalty), float(terms.loss)
        (-5.00, 4.00, -1.00)
    """

    loss: Float[Tensor, ""]
    separation: Float[Tensor, ""]
    coherence_penalty: Float[Tensor, ""]


@checked
def contrastive_steering_loss_noref(
    hs_pos: Float[Tensor, "pair d_model"],
    hs_neg: Float[Tensor, "pair d_model"],
    logp_avg_pos_label: Float[Tensor, " pair"],
    *,
    direction: Float[Tensor, " d_model"] | None = None,
    mask: Bool[Tensor, " pair"] | None = None,
    margin: float | int = MARGIN,
    weight: NotNegative = WEIGHT,
) -> SteeringLoss:
    """The steering loss without a reference model: the baseline is this very forward pass.

        separation = -mean_i ||hs_pos_i - hs_neg_i||_2              without a direction
                   = -mean_i (hs_pos_i - hs_neg_i) . direction      with one
        baseline = stop_gradient(logp_avg_pos_label)
        coherence_penalty = weight * mean_i relu(margin * baseline_i - logp_i)^2

    As logprobs are negative, `0.99 * baseline` lies above the baseline and the penalty is active at
    every pair: with the defaults pair i's penalty is exactly `logp_i^2` and its derivative with
    respect to `logp_i` is `200 * logp_i` (both before the mean over pairs), so that one backward
    pass gives the gradient of both terms. With `margin >= 1` the gradient vanishes. A hidden state
    influences later labels only, so read gradients at a position with a label after it: at the last
    token of a prompt without continuation the coherence gradient is zero.

    Args:
        hs_pos: Hidden states of the positive prompts, residual units.
        hs_neg: Those of the negative prompts.
        logp_avg_pos_label: Mean logprob of the positive prompts' labels, nats per token (negative).
        direction: A frozen unit vector, on which the separation is then measured (see
            `contrastive_steering_loss`); no gradient flows through it. By default the norm.
        mask: Pairs whose logprob counts; all by default. The separation takes every pair.
        margin: Of the baseline, at which the penalty begins; below 1.
        weight: Of the penalty, residual units / nats^2.

    Returns:
        The loss and its two terms; the penalty is NaN where `mask` keeps no pair.

    Examples:
        >>> hs_pos, hs_neg = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> logp = torch.tensor([-2.0], requires_grad=True)
        >>> terms = sl.loss.contrastive_steering_loss_noref(hs_pos, hs_neg, logp)
        >>> terms.separation.item(), terms.coherence_penalty.item()  # -|(3, 4)| and logp^2
        (-5.00, 4.00)
        >>> torch.autograd.grad(terms.loss, logp)[0].item()  # 200 * logp
        -400.0
    """
    logp, how = logp_avg_pos_label, {"mask": mask, "margin": margin, "weight": weight}
    return _loss(hs_pos - hs_neg, direction, logp, logp.detach(), **how)


@checked
def contrastive_steering_loss(
    hs_pos: Float[Tensor, "pair d_model"],
    hs_neg: Float[Tensor, "pair d_model"],
    logp_avg_pos_label: Float[Tensor, " pair"],
    direction: Float[Tensor, " d_model"] | None,
    baseline_logp_avg_pos_label: Float[Tensor, " pair"],
    *,
    mask: Bool[Tensor, " pair"] | None = None,
    margin: float | int = MARGIN,
    tolerance: float | int | None = None,
    weight: NotNegative = WEIGHT,
) -> SteeringLoss:
    """The steering loss against the unsteered model, along a frozen direction.

        separation = -mean_i (hs_pos_i - hs_neg_i) . direction
        coherence_penalty = weight * mean_i relu(margin * baseline_i - logp_i)^2

    What an intervention adds to the difference across the direction counts for nothing, so it
    cannot win by rotating the difference. Of the norm, `-mean_i ||hs_pos_i - hs_neg_i||_2`, which
    is taken where the direction is None, it can: a step r across a difference d makes it longer,
    `sqrt(|d|^2 + r^2)`. With `margin=0.99` the penalty is zero
    only where the steered logprob is at least 1% better (closer to 0) than the baseline: it demands
    an improvement, so unsteered it is `(0.01 * logp_i)^2 * weight`, not 0. Units, `mask` and what
    is returned as in `contrastive_steering_loss_noref`.

    Args:
        direction: The unit vector fitted on the unsteered model, pointing to the positive side; no
            gradient flows through it. None: the norm.
        baseline_logp_avg_pos_label: The unsteered logprob, nats per token; no gradient either.
        tolerance: From 0 up to 1, replaces the margin by `1 / (1 - tolerance)`, which permits a
            loss: with 0.01 the penalty is 0 down to `baseline / 0.99`, the default of `coherent`,
            and 0 unsteered. None by default: the margin counts.

    Raises:
        InputError: The tolerance is outside its range.

    Examples:
        >>> hs_pos, hs_neg = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> logp, baseline = torch.tensor([-2.1]), torch.tensor([-2.0])
        >>> direction = torch.tensor([1.0, 0.0])
        >>> terms = sl.loss.contrastive_steering_loss(hs_pos, hs_neg, logp, direction, baseline)
        >>> float(terms.separation), float(terms.coherence_penalty)  # -3 and 10000 * 0.12^2
        (-3.00, 144.0)
        >>> turned = torch.tensor([[0.0, 6.0]])  # longer, and across the direction
        >>> for along in (None, direction):
        ...     terms = sl.loss.contrastive_steering_loss(turned, hs_neg, logp, along, baseline)
        ...     float(terms.separation)
        -6.0
        -0.0
    """
    if tolerance is not None:
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance must be from 0 up to 1, got {tolerance}")
        margin = 1 / (1 - tolerance)
    logp, baseline = logp_avg_pos_label, baseline_logp_avg_pos_label.detach()
    how = {"mask": mask, "margin": margin, "weight": weight}
    return _loss(hs_pos - hs_neg, direction, logp, baseline, **how)


def _loss(
    differences: Float[Tensor, "pair d_model"],
    direction: Float[Tensor, " d_model"] | None,
    logp: Float[Tensor, " pair"],
    baseline: Float[Tensor, " pair"],
    **how: Any,
) -> SteeringLoss:
    """Minus the mean projection on the direction, or the mean norm without one; the penalty."""
    along = differences.norm(dim=-1) if direction is None else differences @ direction.detach()
    separation, penalty = -along.mean(), coherence_penalty(logp, baseline, **how)
    return SteeringLoss(separation + penalty, separation, penalty)


@checked
def coherence_penalty(
    logp: Float[Tensor, " pair"],
    baseline: Float[Tensor, " pair"],
    *,
    mask: Bool[Tensor, " pair"] | None = None,
    margin: float | int = MARGIN,
    weight: NotNegative = WEIGHT,
) -> Float[Tensor, ""]:
    """`weight * mean_i relu(margin * baseline_i - logp_i)^2` over the pairs that `mask` keeps.

    Both logprobs in nats per token. A mask that keeps no pair gives NaN: nothing was measured.
    """
    excess = torch.relu(margin * baseline - logp)
    if mask is not None:
        excess = excess[mask]
    return weight * excess.square().mean()


@checked
def coherence_hinge(
    logp: Float[Tensor, " pair"],
    baseline: Float[Tensor, " pair"],
    *,
    threshold: float | int = 0.05,
    exponent: float | int = 2,
    weight: NotNegative = WEIGHT,
) -> Float[Tensor, ""]:
    """`weight * mean_i relu(baseline_i - logp_i - threshold)^exponent`: on the nats that are lost.

    At least 0; 0 unsteered, with gradient 0.

    Args:
        logp: Steered logprobs, nats per token.
        baseline: Unsteered ones; no gradient flows through them.
        threshold: Nats per token of degradation that are free, whatever the baseline.
        exponent: With which the penalty rises beyond that; 1 or more.
        weight: Of the whole.

    Raises:
        InputError: The threshold is negative or the exponent below 1.

    Examples:
        >>> logp, baseline = torch.tensor([-2.15]), torch.tensor([-2.0])
        >>> float(sl.loss.coherence_hinge(logp, baseline))  # 10000 * (0.15 - 0.05)^2
        100.0
    """
    if not (threshold >= 0 and exponent >= 1):
        raise InputError(
            f"expected a threshold of 0 nats or more and an exponent of 1 or more, got {threshold} "
            f"and {exponent}"
        )
    excess = torch.relu(baseline.detach() - logp - threshold)
    return weight * excess.pow(exponent).mean()


@checked
def total_variation_barrier(
    logits: Float[Tensor, "prompt token vocab"],
    unsteered: Float[Tensor, "prompt token vocab"],
    label_mask: Bool[Tensor, "prompt token"],
    *,
    limit: float | int = 0.5,
    weight: NotNegative = 1.0,
) -> Float[Tensor, ""]:
    """`-weight * mean_t log(1 - TV_t / limit)`: a wall that the next-token distributions meet.

    `TV_t = 1/2 sum_v |p_t(v) - q_t(v)|`, from 0 to 1, between the steered model's distribution and
    the unsteered one's where label t is predicted; the mean is over the labels of all prompts. At
    least 0, and inf as soon as one label's distance reaches `limit`; 0 unsteered. There the
    distance has a kink: autograd gives the gradient 0, though a step in any direction raises it. At
    or beyond `limit` the gradient is NaN.

    Args:
        logits: The steered model's.
        unsteered: The unsteered model's; no gradient flows through them.
        label_mask: The label tokens, as in `label_logprob`.
        limit: Distance at which the wall stands, above 0 and at most 1.
        weight: Of the whole.

    Raises:
        InputError: The limit is outside its range.

    Examples:
        >>> steered = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
        >>> unsteered = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
        >>> is_label = torch.tensor([[False, True]])
        >>> barrier = sl.loss.total_variation_barrier(steered, unsteered, is_label)
        >>> float(barrier)  # -log(1 - 0.25 / 0.5)
        0.693
    """
    if not 0 < limit <= 1:
        raise InputError(f"limit must be above 0 and at most 1, got {limit}")
    steered = predictions(logits, label_mask).softmax(-1)
    reference = predictions(unsteered.detach(), label_mask).softmax(-1)
    distance = (steered - reference).abs().sum(-1) / 2
    return -weight * torch.log(torch.relu(1 - distance / limit)).mean()


@checked
def ordering_penalty(
    gap_down: Float[Tensor, " item"],
    gap_none: Float[Tensor, " item"],
    gap_up: Float[Tensor, " item"],
    *,
    margin: float | int = 0.0,
    rising: bool = True,
) -> Float[Tensor, ""]:
    """The preference gap must rise (or fall) from c = -1 over 0 to +1: by how much it does not.

        mean_i relu(margin - (gap_none_i - gap_down_i)) + relu(margin - (gap_up_i - gap_none_i))

    In nats per token, at least 0; unsteered, with all gaps equal, `2 * margin`.

    Args:
        gap_down: logprob(preferred continuation) - logprob(other one) at c = -1, nats per token.
        gap_none: The same at c = 0.
        gap_up: The same at c = +1.
        margin: What each step should gain, nats per token.
        rising: False: the steps are taken downwards.

    Examples:
        >>> down, none, up = torch.tensor([0.5]), torch.tensor([0.2]), torch.tensor([0.6])
        >>> float(sl.loss.ordering_penalty(down, none, up))  # the first step falls by 0.3
        0.30
    """
    sign = 1 if rising else -1
    steps = (gap_none - gap_down, gap_up - gap_none)
    first, second = (torch.relu(margin - sign * step).mean() for step in steps)
    return first + second


@checked
def promotion_loss(
    logp_promoted: Float[Tensor, " item"], logp_suppressed: Float[Tensor, " item"]
) -> Float[Tensor, ""]:
    """`mean_i -logp_promoted_i - log(1 - exp(logp_suppressed_i))`, in nats per token.

    Both are mean log-probabilities of a continuation, so `exp` gives its per-token probability
    (geometric mean). At least 0, so that training cannot run away. In the spirit of the promotion
    and suppression losses of Dunefsky and Cohan 2025 (arXiv:2502.18862). Beyond a probability of
    `1 - 1e-6` the suppressed one has no gradient.
    """
    suppressed = torch.log1p(-logp_suppressed.exp().clamp(max=1 - 1e-6))
    return (-logp_promoted - suppressed).mean()


@checked
def preference_loss(
    gap_up: Float[Tensor, " item"],
    gap_none: Float[Tensor, " item"],
    gap_down: Float[Tensor, " item"],
    *,
    beta: float | int = 1.0,
) -> Float[Tensor, ""]:
    """The bidirectional preference loss: a vector must work at c = +1, and against itself at -1.

        mean_i -log sigmoid(beta (gap_up_i - gap_none_i))
               - log sigmoid(beta (gap_none_i - gap_down_i))

    Gaps as in `ordering_penalty`. Above 0; unsteered `2 log 2`. After Cao et al. 2024
    (arXiv:2406.00045), which sums over tokens and draws the sign at random; here both signs count
    and gaps are per token.
    """
    logsigmoid = torch.nn.functional.logsigmoid
    both = logsigmoid(beta * (gap_up - gap_none)) + logsigmoid(beta * (gap_none - gap_down))
    return -both.mean()
