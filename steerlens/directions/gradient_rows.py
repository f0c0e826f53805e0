"""Gradients of the loss at every hook, pair by pair: both terms apart, and how they balance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.errors import InputError, told
from steerlens.models.hooks import hook_layer, width_name
from steerlens.models.weight_processing import UNKNOWN
from steerlens.tables import Row, fragment, hook_label, shortened, to_frame
from steerlens.validation import checked

Weight = float | int | Literal["balanced"]


@checked
@dataclass(frozen=True, eq=False)
class LossGradients:
    """Gradients of each pair's noref loss at every hook and one position; no mean over pairs.

    Row i of the separation is the gradient of `-||hs_pos_i - hs_neg_i||_2` at the hook's loss hook,
    or of `-(hs_pos_i - hs_neg_i) . axis` where `axis` names the method of a frozen one, with
    respect to the activation of the positive and of the negative prompt (no unit). Row i of
    `coherence` is that of `relu(margin * baseline_i - logp_i)^2` (nats^2 per residual unit) with
    respect to the positive one: the labels are the positive prompt's, so the negative prompt has no
    such gradient. `weights` multiply it, one a hook. The readouts come after `hook_names`, as in
    `Differences`. `scores` (none unless asked for) are gradients of the log-probability of label
    sequences drawn from the model, over the root of their length (nats per residual unit).

    Examples:
        >>> gradients = sl.loss_gradients(model, pairs, layers=[1, 2])
        >>> gradients.positive.shape  # both hooks and the readout, 8 pairs
        torch.Size([2, 8, 32])
        >>> balanced = gradients.with_weight("balanced")
        >>> bool((balanced.weights > 0).all())
        True
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    loss_hooks: tuple[str, ...]
    separation_positive: Float[Tensor, "all_hook pair d_model"]
    separation_negative: Float[Tensor, "all_hook pair d_model"]
    coherence: Float[Tensor, "all_hook pair d_model"]
    weights: Float[Tensor, " all_hook"]
    logprob: Float[Tensor, " pair"]
    scores: Float[Tensor, "all_hook score d_model"] = field(repr=False)
    margin: float
    position: int
    fingerprint: str
    forward_equivalents: float
    axis: str | None = None
    weight_processing: str = UNKNOWN
    weights_fingerprint: str = UNKNOWN
    pair_hashes: tuple[str, ...] = ()

    @property
    def all_hook_names(self) -> tuple[str, ...]:
        """`hook_names`, then `readout_names`."""
        return self.hook_names + self.readout_names

    @property
    def positive(self) -> Float[Tensor, "all_hook pair d_model"]:
        """The gradient of the whole loss with respect to the positive prompts' activations."""
        return self.separation_positive + self.weights[:, None, None] * self.coherence

    @property
    def negative(self) -> Float[Tensor, "all_hook pair d_model"]:
        """The same for the negative prompts: of the separation alone."""
        return self.separation_negative

    def __repr__(self) -> str:
        _, n_pairs, width = self.coherence.shape
        name = width_name(self.hook_names)
        return f"LossGradients({len(self.hook_names)} hooks, {n_pairs} pairs, {name} {width})"

    def _repr_html_(self) -> str:
        terms = gradient_terms(self)
        names = ["separation_norm", "coherence_norm", "coherence_share", "cosine", "weight"]
        table = terms[names].rename(columns=lambda name: name.replace("_", " "))
        for column in ("loss_hook", "hook_name"):
            heading = "layer" if column == "hook_name" else "loss at"
            table.insert(0, heading, [hook_label(name) for name in terms[column]])
        about = [repr(self), f"position {self.position}", f"margin {self.margin:g}"]
        about.append("norm" if self.axis is None else f"axis {shortened(self.axis)}")
        return fragment([*about, f"pairs {self.fingerprint[:12]}"], table, n_labels=2)

    def part(self, hook_names: Sequence[str], pairs: Int[Tensor, " row"]) -> "LossGradients":
        """Some hooks, and the rows of some pairs, which may be there more than once."""
        hooks, n_pairs = [self.all_hook_names.index(n) for n in hook_names], len(self.logprob)
        drawn = torch.arange(self.scores.shape[1] // n_pairs)[:, None] * n_pairs + pairs
        return replace(
            self,
            hook_names=tuple(hook_names),
            readout_names=(),
            loss_hooks=tuple(self.loss_hooks[hook] for hook in hooks),
            separation_positive=self.separation_positive[hooks][:, pairs],
            separation_negative=self.separation_negative[hooks][:, pairs],
            coherence=self.coherence[hooks][:, pairs],
            weights=self.weights[hooks],
            logprob=self.logprob[pairs],
            scores=self.scores[hooks][:, drawn.flatten()],
        )

    def with_weight(self, weight: Weight) -> "LossGradients":
        """The same gradients with another weight of the coherence term.

        Args:
            weight: From 0 on, or "balanced": at every hook the weight at which both terms have the
                same mean norm over the positive rows.

        Raises:
            InputError: The weight is negative or not finite, or nothing balances the terms, as one
                of them is zero at a hook.
        """
        check_weight(weight)
        if weight != "balanced":
            return replace(self, weights=torch.full_like(self.weights, float(weight)))
        weights = _balanced(self.separation_positive, self.coherence)
        if not bool((weights.isfinite() & (weights > 0)).all()):
            names = [
                name
                for name, weight in zip(self.all_hook_names, weights.tolist(), strict=True)
                if not (math.isfinite(weight) and weight > 0)
            ]
            raise InputError(
                f"one of the two gradients is zero at {', '.join(names)}, so no weight balances "
                "them; take a margin below 1, a loss hook further on, or a weight of your own"
            )
        return replace(self, weights=weights)


@checked
def gradient_terms(gradients: LossGradients) -> pd.DataFrame:
    """Which term dominates where: norms and cosine of the two, one row a hook.

    Norms and cosines are means over the positive rows. The default weight of 10000 is a balance for
    one model and one layer: `balanced_weight` says which would make the two equal here.

    Args:
        gradients: What `loss_gradients` gives.

    Returns:
        Columns `gradients`; the cosine is NaN where a row of either term is zero.

    Examples:
        >>> terms = sl.directions.gradient_terms(sl.loss_gradients(model, pairs, layers=[1, 2]))
        >>> bool(terms.coherence_share.between(0, 1).all())
        True
    """
    rows: list[Row] = []
    balanced = _balanced(gradients.separation_positive, gradients.coherence)
    for i, name in enumerate(gradients.hook_names):
        separation, coherence = gradients.separation_positive[i], gradients.coherence[i]
        norms = separation.norm(dim=-1) * coherence.norm(dim=-1)
        separation_norm = float(separation.norm(dim=-1).mean())
        coherence_norm = float(gradients.weights[i] * coherence.norm(dim=-1).mean())
        rows.append(
            {
                "hook_name": name,
                "layer": hook_layer(name),
                "loss_hook": gradients.loss_hooks[i],
                "n_pairs": len(separation),
                "separation_norm": separation_norm,
                "coherence_norm": coherence_norm,
                "coherence_share": coherence_norm / (separation_norm + coherence_norm),
                "cosine": float(((separation * coherence).sum(-1) / norms).mean()),
                "weight": float(gradients.weights[i]),
                "balanced_weight": float(balanced[i]),
            }
        )
    attrs = {
        "margin": gradients.margin,
        "axis": gradients.axis,
        "position": gradients.position,
        "measured_on": gradients.fingerprint,
        "weight_processing": gradients.weight_processing,
        "forward_equivalents": gradients.forward_equivalents,
    }
    return to_frame(rows, "gradients", attrs)


def check_weight(weight: Any) -> None:
    """Raise `InputError` unless it is "balanced" or a float32 from 0 on."""
    number: Any = weight if isinstance(weight, Real) else math.nan
    is_number = bool(0 <= number <= torch.finfo(torch.float32).max)
    if not (isinstance(weight, str) and weight == "balanced") and not is_number:
        raise InputError(f'weight is "balanced" or a float32 of 0 or more, got {told(weight)}')


def _balanced(
    separation: Float[Tensor, "all_hook pair d_model"],
    coherence: Float[Tensor, "all_hook pair d_model"],
) -> Float[Tensor, " all_hook"]:
    """The weight of the coherence term at which both have the same mean row norm; may be inf."""
    weights: Tensor = separation.norm(dim=-1).mean(dim=-1) / coherence.norm(dim=-1).mean(dim=-1)
    return weights
