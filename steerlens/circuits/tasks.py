"""A task: prompts, and answers whose logit difference is the model's metric on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.answers import Answers
from steerlens.circuits.interventions import UNSTEERED, Intervention
from steerlens.circuits.prompts import Prompts, Rows, row_slices
from steerlens.engine.checkpoint import Checkpoint, Tensors, check_unsteered, once
from steerlens.errors import InputError
from steerlens.models import HookedModel, hooked, inference, provenance
from steerlens.models.hooks import HookFunction

Self = TypeVar("Self", bound="Task")


@dataclass(frozen=True)
class Traced:
    """One run: activations and, where asked for, gradients of each prompt's `metric`, by hook."""

    activations: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    metric: Float[Tensor, " prompt"]


@dataclass(frozen=True, eq=False)
class Task:
    """A model, prompts, and answers that fit them; the `checkpoint` is given what is finished."""

    model: HookedModel
    prompts: Prompts
    answers: Answers
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        self.answers.check(self.model, len(self.prompts))

    def passes(self: Self) -> list[Self]:
        """The same in parts that run in one pass each."""
        return [self.part(rows) for rows in row_slices(len(self.prompts))]

    def part(self: Self, rows: Rows) -> Self:
        """Some of the prompts."""
        return replace(self, prompts=self.prompts.part(rows), answers=self.answers.part(rows))

    @property
    def decided(self) -> list[Any]:
        """All that decides what the unsteered model gives, for `engine.checkpoint.digest`."""
        prompts, answers = self.prompts, self.answers
        inputs = [prompts.tokens, prompts.last, answers.positive, answers.negative]
        return [provenance(self.model).to_dict(), inputs]

    def once(self, decided: Sequence[Any], compute: Callable[[], Tensors]) -> Tensors:
        """As `engine.checkpoint.once`, of what is `decided` by the task too."""
        return once(self.checkpoint, (*decided, self.decided), compute)

    def check_unsteered(self) -> None:
        """As `engine.checkpoint.check_unsteered`, of the metric; a pass over all prompts."""
        if self.checkpoint is not None:
            metrics = [batch.measure() for batch in self.passes()]
            check_unsteered(self.checkpoint, self.decided, metrics)

    def metric(self, logits: Float[Tensor, "prompt token vocab"]) -> Float[Tensor, " prompt"]:
        """Each prompt's answer logit difference after its last token."""
        return self.answers.logit_difference(self.prompts.at_last(logits).float())

    def measure(
        self,
        intervention: Intervention = UNSTEERED,
        fwd_hooks: Sequence[tuple[str, HookFunction]] = (),
    ) -> Float[Tensor, " prompt"]:
        """The metric of one pass, on the CPU; `fwd_hooks` act after the intervention."""
        with inference(self.model), intervention.on(self.model), hooked(self.model, fwd_hooks):
            return self.metric(self.model(self.prompts.tokens)).cpu()

    def trace(
        self,
        hook_names: Sequence[str],
        intervention: Intervention = UNSTEERED,
        *,
        with_gradients: bool = False,
    ) -> Traced:
        """Run all prompts in one pass, and back where gradients are asked for.

        Raises `InputError` without TransformerLens 4, and inside `torch.inference_mode()`.
        """
        try:
            from transformer_lens.tools.analysis import attribution_patching
        except ImportError as error:
            raise InputError(
                "circuits are found with the analysis tools of TransformerLens 4; this is older"
            ) from error
        if with_gradients and torch.is_inference_mode_enabled():
            raise InputError("gradients are needed; leave torch.inference_mode() first")
        metrics: list[Tensor] = []

        def total(logits: Tensor) -> Tensor:
            values = self.metric(logits)
            metrics.append(values.detach())
            return values.sum()

        def begin(activation: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            # With frozen parameters nothing would have a gradient.
            needs = with_gradients and not activation.requires_grad
            return activation.detach().requires_grad_() if needs else None

        # `inference` for evaluation mode alone: gradients are switched on again inside it.
        with (
            inference(self.model),
            torch.set_grad_enabled(with_gradients),
            hooked(self.model, [("hook_embed", begin)]),
            intervention.on(self.model),
        ):
            cache = attribution_patching.cache_activation_and_gradient(
                self.model,
                self.prompts.tokens,
                total,
                names_filter=list(hook_names),
                compute_gradient=with_gradients,
            )
        gradients = {name: g for name, g in cache.gradients.items() if g is not None}
        missing = [name for name in hook_names if with_gradients and name not in gradients]
        if missing:
            raise InputError(f"the metric has no gradient at {', '.join(missing)}")
        activations = {name: cache.activations[name] for name in hook_names}
        return Traced(activations, gradients, metrics[-1])
