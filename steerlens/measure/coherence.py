"""What a push along a direction costs on a text, prompt by prompt: the loss a budget bounds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.engine.checkpoint import Tensors, once
from steerlens.engine.continuations import continue_prompts
from steerlens.engine.engine import Engine
from steerlens.engine.plan import Plan, run_cells
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import CellOutput, Job
from steerlens.errors import InputError
from steerlens.loss import Budget, label_kl
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.models.loading import inference
from steerlens.steering import Add, SteeringVector, steer

ROLLOUT_TOKENS = 24
"""Tokens of a greedy continuation that a rollout budget looks at."""
P95 = 0.95


@dataclass(frozen=True)
class Push:
    """A direction at a hook, the sign of the coefficient, and where the effect is read.

    A `vector` is applied instead, and hook and direction then only name it. The effect is looked
    at `along` a direction at the readout; without one it is not.
    """

    hook_name: str
    direction: Float[Tensor, " d_model"]
    sign: int
    readout: str
    vector: SteeringVector | None = None
    along: Float[Tensor, " d_readout"] | None = None

    @property
    def additions(self) -> tuple[tuple[str, Float[Tensor, " d_model"]], ...]:
        """What coefficient 1 adds, hook by hook; nothing where it does something else."""
        if self.vector is None:
            return ((self.hook_name, self.direction),)
        if isinstance(self.vector.operator, Add) and self.vector.condition is None:
            return tuple(zip(self.vector.hook_names, self.vector.rows, strict=True))
        return ()


@dataclass(frozen=True)
class Reading:
    """One push at one coefficient, prompt by prompt.

    `values` are degradations (nats per token), mean divergences (nats per token), or the divergence
    at every token (NaN-padded), as the budget needs; `projections` of the activations at the
    readout hook (residual units, float64), None where nothing reads them.
    """

    values: Float[np.ndarray, "prompt *token"]
    projections: Float[Tensor, " prompt"] | None = None

    @property
    def loss(self) -> float:
        """The loss that the budget bounds."""
        return float(bounded_loss(self.values, np.ones((1, len(self.values))))[0])


@dataclass(frozen=True)
class MeasuredText:
    """A text, ready to be measured under many pushes: the positive prompts of `plan`."""

    prompts: tuple[TokenizedPrompt, ...]
    budget: Budget
    plan: Plan

    @property
    def logprob(self) -> Float[np.ndarray, " prompt"]:
        """Of every prompt's labels, unsteered."""
        return self.plan.unsteered.logprob.double().numpy()

    @property
    def is_of_tokens(self) -> bool:
        """Whether the budget bounds a percentile over tokens, not a mean over prompts."""
        return self.budget.kind.endswith("_p95")

    def measure(self, pushes: Sequence[tuple[Push, float]]) -> list[Reading]:
        """A reading for every (push, coefficient >= 0), in one run unless they are rollouts."""
        if self.budget.kind == "rollout_kl_p95":
            return [self._rollouts(push, c) for push, c in pushes]
        readings: dict[int, Reading] = {}
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (push, _) in enumerate(pushes):
            groups.setdefault((push.hook_name, id(push.direction)), []).append(i)
        jobs = []
        for members in groups.values():
            push = pushes[members[0]][0]
            coefficients = tuple(pushes[i][0].sign * pushes[i][1] for i in members)
            what = (push.readout, push.vector, push.along)
            jobs.append((Job(push.hook_name, push.direction, coefficients, *what), members))
        # Each job starts from where the last one stood, so none may begin before it.
        jobs.sort(key=lambda item: item[0].first_block)
        logprob = self.logprob
        by_job = run_cells(self.plan, [job for job, _ in jobs], projected)
        for (_, members), cells in zip(jobs, by_job, strict=True):
            for i, cell in zip(members, cells, strict=True):
                values = logprob - cell.logprob.double().numpy()
                if cell.kl is not None:
                    by_token = cell.kl.double().numpy()
                    values = by_token if self.budget.kind == "kl_p95" else np.nanmean(by_token, 1)
                readings[i] = Reading(
                    values, cell.positive[:, 0] if cell.positive.numel() else None
                )
        return [readings[i] for i in range(len(pushes))]

    def _rollouts(self, push: Push, coefficient: float) -> Reading:
        plan, signed = self.plan, push.sign * coefficient

        def run() -> Tensors:
            values = np.full((len(self.prompts), ROLLOUT_TOKENS), np.nan)
            for row, prompt in zip(values, self.prompts, strict=True):
                divergences = _rollout_kl(plan.engine, prompt, push, coefficient)
                row[: len(divergences)] = divergences
            return {"values": torch.from_numpy(values)}

        what = push.direction if push.vector is None else push.vector.fingerprint
        decided = (plan.digest, "rollouts", push.hook_name, signed, what)
        kept = once(plan.engine.checkpoint, decided, run, plan.engine.cost)
        return Reading(kept["values"].numpy())


def projected(
    job: Job,
    cell: CellOutput,
    unsteered: CellOutput,  # noqa: ARG001 (`plan.Read`)
) -> CellOutput:
    """The cell with projections along the job's direction at the readout; none without one."""
    if job.along is None:
        return replace(cell, positive=cell.positive[:, :0], negative=cell.negative[:, :0])
    unit = job.along.double().cpu()[:, None]
    positive, negative = (side.double() @ unit for side in (cell.positive, cell.negative))
    return replace(cell, positive=positive, negative=negative)


def check_rollouts(model: HookedModel, prompts: Sequence[TokenizedPrompt], budget: Budget) -> None:
    """Raise `InputError` when the continuations of a rollout budget would not fit the context."""
    n_ctx, longest = context_length(model), max(len(p.prompt) for p in prompts)
    is_long = n_ctx is not None and longest + ROLLOUT_TOKENS > n_ctx
    if budget.kind == "rollout_kl_p95" and is_long:
        raise InputError(
            f"a rollout adds {ROLLOUT_TOKENS} tokens, and the longest prompt has {longest} of the "
            f"model's {n_ctx}; shorten it or take another budget"
        )


def bounded_loss(
    values: Float[np.ndarray, "prompt *token"], counts: Float[np.ndarray, "resample prompt"]
) -> Float[np.ndarray, " resample"]:
    """The loss that a budget bounds, each prompt counted `counts` times; inf if undefined.

    The mean of one value a prompt; of values at every token (NaN-padded) the 95th percentile.
    """
    if values.ndim == 2:
        is_undefined = np.isnan(values).all(axis=1).any() or np.isinf(values).any()
        return (
            np.full(len(counts), np.inf) if is_undefined else weighted_quantile(values, counts, P95)
        )
    if not np.isfinite(values).all():
        return np.full(len(counts), np.inf)
    means: NDArray[np.float64] = counts @ values / counts.sum(axis=1)
    return means


def allowances(
    budget: Budget,
    logprob: Float[np.ndarray, " prompt"],
    counts: Float[np.ndarray, "resample prompt"],
) -> Float[np.ndarray, " resample"]:
    """The largest loss within the budget; a relative one depends on the prompts drawn."""
    baselines = counts @ logprob / counts.sum(axis=1)
    return np.array([budget.allowance(float(baseline)) for baseline in baselines])


def measured_text(plan: Plan, prompts: Sequence[TokenizedPrompt], budget: Budget) -> MeasuredText:
    """Prepare the text of `plan`, its positive prompts, for what the budget reads of it."""
    if budget.is_divergence:
        plan = plan.on(replace(plan.workload, with_kl=True), plan.unsteered)
    return MeasuredText(tuple(prompts), budget, plan)


def _rollout_kl(
    engine: Engine, prompt: TokenizedPrompt, push: Push, coefficient: float
) -> Float[np.ndarray, " token"]:
    """KL(unsteered || steered), nats, at each token of the steered model's greedy continuation."""
    model = engine.model
    steered = {push.hook_name: push.direction} if push.vector is None else push.vector
    signed = push.sign * coefficient
    n_prompt = len(prompt.prompt)
    with inference(model):
        with steer(model, steered, signed):
            (written,) = continue_prompts(model, [prompt], max_new_tokens=ROLLOUT_TOKENS)
            generated = torch.tensor([[*prompt.prompt, *written]], device=model.cfg.device)
            logits = model(generated, return_type="logits")
        unsteered = model(generated, return_type="logits")
    engine.cost.add(generated, 3 * engine.n_layers)
    labels = torch.zeros_like(generated, dtype=torch.bool)
    labels[:, n_prompt:] = True
    divergences = label_kl(logits, unsteered, labels).double().cpu().numpy()
    return np.where(np.isfinite(divergences), divergences, np.inf)


def weighted_quantile(
    values: Float[np.ndarray, "pair token"],
    counts: Float[np.ndarray, "resample pair"],
    quantile: float,
) -> Float[np.ndarray, " resample"]:
    """The `quantile` (0 to 1) of all values that are not NaN, each pair's counted `counts` times.

    The smallest value whose share of counted values at or below it reaches `quantile`.

    Examples:
        >>> values = np.array([[1.0, 2.0], [3.0, np.nan]])
        >>> weighted_quantile(values, np.array([[1.0, 1.0], [1.0, 3.0]]), 0.5)
        array([2., 3.])
    """
    is_given = ~np.isnan(values)
    flat, owner = values[is_given], np.nonzero(is_given)[0]
    order = flat.argsort()
    quantiles = []
    for part in np.array_split(counts, max(1, len(counts) * len(flat) // 2**24)):
        cumulative = part[:, owner[order]].cumsum(axis=1)
        reached = cumulative >= quantile * cumulative[:, -1:] - 1e-9
        quantiles.append(flat[order][reached.argmax(axis=1)])
    joined: NDArray[np.float64] = np.concatenate(quantiles)
    return joined
