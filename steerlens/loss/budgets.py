"""The coherence budget: how much a steered model may lose."""

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from steerlens.errors import InputError, told
from steerlens.validation import checked

Divergence = Literal["kl", "kl_p95", "rollout_kl_p95"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
BudgetKind = Literal["relative", "nats"] | Divergence
LARGEST_BUDGET = 1e6
"""Nats per token: no model loses more."""


@checked
@dataclass(frozen=True)
class Budget:
    """How much a steered model may lose and still count as coherent.

    Of the labels' mean logprob: `relative` 0.01: logprob >= baseline / 0.99, that is at most about
    1% further below zero; `nats` 0.05: logprob >= baseline - 0.05 nats per token. Of the next-token
    distribution, KL(unsteered || steered) in nats per token: `kl` its mean over a prompt's labels
    and then over prompts, `kl_p95` its 95th percentile over the labels of all prompts,
    `rollout_kl_p95` that percentile over the tokens of the steered model's own greedy
    continuations.

    Examples:
        >>> budget = Budget.parse("relative=0.01")
        >>> budget.min_logprob(-2.97), budget.allowance(-2.97)
        (-3.00, 0.030)
        >>> Budget.parse("kl=0.1").allowance(-2.97)
        0.1
    """

    kind: BudgetKind
    value: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A budget from "relative=0.01" or "kl=0.1". Raises `InputError` on anything else."""
        if not isinstance(text, str):
            raise InputError(f"expected a budget like relative=0.01 as text, got {text!r}")
        kind, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        is_within = {"relative": 0 <= value < 1, "nats": 0 <= value <= LARGEST_BUDGET}
        is_within |= dict.fromkeys(DIVERGENCES, 0 < value <= LARGEST_BUDGET)
        if not is_within.get(kind, False):
            raise InputError(
                "expected a budget like relative=0.01 (from 0 up to 1), nats=0.05 (0 or more), "
                f"kl=0.1, kl_p95=1 or rollout_kl_p95=1 (above 0), at most {LARGEST_BUDGET:g} nats, "
                f"got {told(text)}"
            )
        return cls(cast(BudgetKind, kind), value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value!r}"

    @property
    def is_divergence(self) -> bool:
        """Whether it bounds a KL divergence, not a logprob."""
        return self.kind in DIVERGENCES

    def min_logprob(self, baseline: float) -> float:
        """The lowest logprob (nats per token) that still counts as coherent.

        Raises `InputError` for a budget of a KL divergence, which has none.
        """
        if self.is_divergence:
            raise InputError(
                f"the budget {self} bounds a KL divergence, and a logprob was asked for; use "
                "relative= or nats="
            )
        if self.kind == "relative":
            return baseline / (1 - self.value)
        return baseline - self.value

    def allowance(self, baseline: float) -> float:
        """The largest loss within the budget, nats per token: of degradation, or of KL."""
        return self.value if self.is_divergence else baseline - self.min_logprob(baseline)
