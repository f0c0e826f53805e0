"""A step of training: both sides of some examples pushed, the objective, and its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.backward import adding, differentiable
from steerlens.engine.batches import Batch
from steerlens.engine.branches import Branches, can_branch, in_equal_rows, join_branches
from steerlens.engine.capture import reading_hook
from steerlens.engine.memory import is_out_of_memory
from steerlens.engine.resume import Labels, Residual, advance, labels_logprob, run_from
from steerlens.errors import SteerlensError
from steerlens.loss import contrastive_steering_loss, preference_loss, promotion_loss
from steerlens.loss.labels import mean_by_prompt
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_layer, resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap

SIGNS = (1.0, -1.0)
"""The coefficients a vector is trained at."""
TOLERANCE = 0.01
"""The loss of logprob that the reference objective permits."""


@dataclass(frozen=True)
class Side:
    """One side of an example: its prompts twice, to be pushed by `signs` times the vector.

    The first half is at c = +1, the other at -1. `residual` enters the hook's block, each prompt
    once (None: from the tokens on). `labels` is None where they do not matter, and the side is then
    run to the readout only. `unsteered` is the labels' logprob at 0 (nats per token; NaN without).
    Of `Branches` it is both sides at once.
    """

    batch: Batch
    signs: Float[Tensor, "pushed_row 1 1"]
    residual: Residual | None
    labels: Labels | None
    unsteered: Float[Tensor, " row"]


class Pushed(NamedTuple):
    """What an objective is given of a side: readout (residual units) and logprob (nats per token).

    Both at c = +1 and -1 (`sign`); `unsteered` is the logprob at 0. Logprobs of a side without
    labels are NaN. Of `Branches` there is one readout a row, and one logprob a text.
    """

    readout: Float[Tensor, "sign row d_model"]
    logprob: Float[Tensor, "sign row"]
    unsteered: Float[Tensor, " row"]


Objective = Callable[[Pushed, Pushed], Float[Tensor, ""]]
"""The loss of the positive and the negative side."""


class Push(NamedTuple):
    """The objective under `+vector` and `-vector`, its gradient there, and what it was given."""

    loss: float
    gradient: Float[Tensor, " d_model"]
    positive: Pushed
    negative: Pushed

    def measures(self, axis: Float[Tensor, " d_model"] | None) -> dict[str, float]:
        """Means over the examples at c = +1; without an axis what a difference has is NaN."""
        differences = (self.positive.readout[0] - self.negative.readout[0]).double()
        norms, along = differences.norm(dim=-1), torch.full((len(differences),), torch.nan)
        if axis is None:
            norms = along
        else:
            along = differences @ axis.to(differences)
        values = {
            "separation": norms,
            "projection": along,
            "angle_deg": torch.rad2deg((along / norms).clamp(-1, 1).acos()),
            "degradation_nats": self.positive.unsteered - self.positive.logprob[0],
        }
        return {"loss": self.loss, **{name: float(v.mean()) for name, v in values.items()}}


def make_side(
    model: HookedModel, batch: Batch, hook_name: str, *, sign: int, with_labels: bool = True
) -> Side:
    """A side pushed by `sign` times the vector at c = +1, with what is known unsteered."""
    tokens, mask, block = batch.tokens, batch.attention_mask, hook_layer(hook_name)
    logprob = torch.full((len(batch.prompts),), torch.nan, device=tokens.device)
    residual = None
    with inference(model):
        if block > 0:
            residual = advance(model, tokens, mask, start=None, block=block)
        if with_labels:
            final = advance(model, tokens, mask, start=residual, block=int(model.cfg.n_layers))
            labels = Labels.of(batch)
            logprob = mean_by_prompt(
                labels_logprob(model, labels.outputs(final.values), labels.ids),
                batch.labels_by_row()[:, 1:],
            )
    n = len(SIGNS)
    pushed = type(batch)(batch.rows * n, batch.prompts * n, tokens.repeat(n, 1), mask.repeat(n, 1))
    signs = sign * torch.tensor(SIGNS, device=tokens.device).repeat_interleave(len(batch.prompts))
    labels_twice = Labels.of(pushed) if with_labels else None
    return Side(pushed, signs[:, None, None], residual, labels_twice, logprob)


def item_sides(
    model: HookedModel, batches: Sequence[tuple[Batch, Batch]], hook_name: str
) -> list[tuple[Side, ...]]:
    """Sides of items: each prompt run once for both continuations, or each side by itself.

    By itself where a model cannot (see `can_branch`), or where the batches of the shortest and of
    the longest items have another logprob.
    """
    side = partial(make_side, model, hook_name=hook_name, sign=1)
    whole = [(*up.prompts, *down.prompts) for up, down in batches]
    twins = [[(i, i + len(of) // 2) for i in range(len(of) // 2)] for of in whole]
    have_one = (
        of[i].prompt == of[j].prompt for of, two in zip(whole, twins, strict=True) for i, j in two
    )
    if all(have_one) and can_branch(model, [prompt for of in whole for prompt in of]):
        try:
            joined = [
                side(join_branches(model, of, in_equal_rows(model, of, two)))
                for of, two in zip(whole, twins, strict=True)
            ]
        except Exception as error:  # whatever a model's own code raises at such a mask
            if isinstance(error, SteerlensError) or is_out_of_memory(error):
                raise
        else:
            ends = ((joined[i], [side(of) for of in batches[i]]) for i in (0, -1))
            if all(_have_one_logprob(model, *of) for of in ends):
                return [(both,) for both in joined]
    return [(side(up), side(down)) for up, down in batches]


def _have_one_logprob(model: HookedModel, joined: Side, alone: Sequence[Side]) -> bool:
    expected = torch.stack([side.unsteered for side in alone], dim=1).flatten()
    gaps = (joined.unsteered - expected).abs() / expected.abs().clamp(min=1)
    return bool((gaps <= allowed_gap(model.cfg.dtype)).all())


def push_sides(
    model: HookedModel,
    sides: tuple[Side, ...],
    vector: Float[Tensor, " d_model"],
    objective: Objective,
    *,
    hook_name: str,
    readout: str,
    position: int,
    with_gradient: bool = True,
) -> Push:
    """The objective under `+vector` and `-vector` at a hook, and its gradient there.

    `sides` are the positive and the negative one, or both at once. Readouts are at `position`.
    Without `with_gradient` the gradient is zero and not computed.
    """

    def push(side: Side) -> list[Pushed]:
        batch, start, labels = side.batch, side.residual, side.labels
        if start is not None:
            start = replace(start, values=start.values.repeat(len(SIGNS), 1, 1))
        states: dict[str, Tensor] = {}
        final = run_from(
            *(model, batch.tokens, batch.attention_mask),
            start=start,
            fwd_hooks=[
                (hook_name, adding(side.signs * vector, batch.steered_mask("all"))),
                reading_hook(states, readout, batch.places(position)),
            ],
            last_hook=readout if labels is None else resid_post(int(model.cfg.n_layers) - 1),
        )
        # Of several prompts in a row, where nothing is asked of readouts, each row is read once.
        unsteered = side.unsteered.reshape(-1, 1 + isinstance(batch, Branches))
        shape = len(SIGNS), *unsteered.shape
        state = states[readout].reshape(len(SIGNS), len(batch.prompts) // len(SIGNS), -1)
        logprob = state.detach().new_full(shape, torch.nan)
        if labels is not None:
            by_label = labels.read(model, final).logprob
            logprob = mean_by_prompt(by_label, batch.labels_by_row()[:, 1:]).reshape(shape)
        each = zip(logprob.unbind(-1), unsteered.unbind(-1), strict=True)
        return [Pushed(state, *of_side) for of_side in each]

    with differentiable(model, with_gradient=with_gradient):
        up, down = (pushed for side in sides for pushed in push(side))
        loss, gradient = objective(up, down), torch.zeros_like(vector)
        if with_gradient:
            (gradient,) = torch.autograd.grad(loss, vector, materialize_grads=True)
    positive, negative = (Pushed(*(part.detach() for part in side)) for side in (up, down))
    return Push(float(loss.detach()), gradient, positive, negative)


def objective_of(name: str, axis: Float[Tensor, " d_model"] | None) -> Objective:
    """The objective of that name; `axis` is the readout's frozen one, None for the norm."""

    def reference(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up, down = (
            contrastive_steering_loss(
                positive.readout[c],
                negative.readout[c],
                positive.logprob[c],
                None if axis is None else axis.to(positive.readout) * sign,
                positive.unsteered,
                tolerance=TOLERANCE,
            )
            for c, sign in enumerate(SIGNS)
        )
        # A norm has no other way to go at c = -1.
        return up.loss + (down.coherence_penalty if axis is None else down.loss)

    def promotion(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up = promotion_loss(positive.logprob[0], negative.logprob[0])
        return up + promotion_loss(negative.logprob[1], positive.logprob[1])

    def preference(positive: Pushed, negative: Pushed) -> Float[Tensor, ""]:
        up, down = positive.logprob - negative.logprob
        return preference_loss(up, positive.unsteered - negative.unsteered, down)

    return {"reference": reference, "promotion": promotion, "preference": preference}[name]
