"""The loss and its terms, the log-probability of labels, the coherence budget."""

from steerlens.loss.budgets import Budget
from steerlens.loss.labels import label_kl, label_logprob, label_logprobs
from steerlens.loss.terms import (
    MARGIN,
    WEIGHT,
    SteeringLoss,
    coherence_hinge,
    coherence_penalty,
    contrastive_steering_loss,
    contrastive_steering_loss_noref,
    ordering_penalty,
    preference_loss,
    promotion_loss,
    total_variation_barrier,
)

__all__ = [
    "MARGIN",
    "WEIGHT",
    "Budget",
    "SteeringLoss",
    "coherence_hinge",
    "coherence_penalty",
    "contrastive_steering_loss",
    "contrastive_steering_loss_noref",
    "label_kl",
    "label_logprob",
    "label_logprobs",
    "ordering_penalty",
    "preference_loss",
    "promotion_loss",
    "total_variation_barrier",
]
