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
from steerlens.engine.workload import Job
from steerlens.errors import InputError
from steerlens.loss import Budget, label_kl
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.models.loading import inference
from steerlens.progress import Progress, silent
from steerlens.stats import weighted_quantile
from steerlens.steering import Add, SteeringVector, steer

ROLLOUT_TOKENS = 24
"""Tokens of a greedy continuation that a rollout budget looks at."""
P95 = 0.95


@dataclass(frozen=True)
class Push:
    """A direction at a hook, the sign of the coefficient, and where the effect is read.

    A `vector` is applied instead, and hook and direction then only name it.
    """

    hook_name: str
    direction: Float[Tensor, " d_model"]
    sign: int
    readout: str
    vector: SteeringVector | None = None

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
    at every token (NaN-padded), as the budget needs; `readout` the activations at the readout hook,
    of width 0 where nothing reads them.
    """

    values: Float[np.ndarray, "prompt *token"]
    readout: Float[Tensor, "prompt d_model"]


@dataclass(frozen=True)
class Coherence:
    """A text, ready to be measured under many pushes: on all prompts, or on `probes` alone."""

    prompts: tuple[TokenizedPrompt, ...]
    budget: Budget
    logprob: Float[np.ndarray, " prompt"]
    probes: tuple[int, ...]
    on_all: Plan
    on_probes: Plan

    @property
    def is_of_tokens(self) -> bool:
        """Whether the budget bounds a percentile over tokens, not a mean over prompts."""
        return self.budget.kind.endswith("_p95")

    def measure(
        self,
        pushes: Sequence[tuple[Push, float]],
        *,
        on_all: bool,
        progress: Progress = silent,
    ) -> list[Reading]:
        """A reading for every (push, coefficient >= 0), in one run unless they are rollouts.

        `progress` is told of the pushes measured.
        """
        readings: dict[int, Reading] = {}
        progress("pushes", 0, len(pushes))
        if self.budget.kind == "rollout_kl_p95":
            for i, (push, c) in enumerate(pushes):
                readings[i] = self._rollouts(push, c, on_all=on_all)
                progress("pushes", len(readings), len(pushes))
            return list(readings.values())
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (push, _) in enumerate(pushes):
            groups.setdefault((push.hook_name, id(push.direction)), []).append(i)
        jobs = []
        for members in groups.values():
            push = pushes[members[0]][0]
            coefficients = tuple(pushes[i][0].sign * pushes[i][1] for i in members)
            job = Job(push.hook_name, push.direction, coefficients, push.readout, push.vector)
            jobs.append((job, members))
        # Each job starts from where the last one stood, so none may begin before it.
        jobs.sort(key=lambda item: item[0].first_block)
        rows = np.arange(len(self.prompts)) if on_all else np.array(self.probes)
        plan = self.on_all if on_all else self.on_probes
        by_job = run_cells(plan, [job for job, _ in jobs])
        for (_, members), cells in zip(jobs, by_job, strict=True):
            for i, cell in zip(members, cells, strict=True):
                values = self.logprob[rows] - cell.logprob.double().numpy()
                if cell.kl is not None:
                    by_token = cell.kl.double().numpy()
                    values = by_token if self.budget.kind == "kl_p95" else np.nanmean(by_token, 1)
                readings[i] = Reading(values, cell.positive)
            progress("pushes", len(readings), len(pushes))
        return [readings[i] for i in range(len(pushes))]

    def _rollouts(self, push: Push, coefficient: float, *, on_all: bool) -> Reading:
        rows = range(len(self.prompts)) if on_all else self.probes
        plan, signed = self.on_all, push.sign * coefficient

        def run() -> Tensors:
            values = np.full((len(rows), ROLLOUT_TOKENS), np.nan)
            for i, row in enumerate(rows):
                divergences = _rollout_kl(plan.engine, self.prompts[row], push, coefficient)
                values[i, : len(divergences)] = divergences
            return {"values": torch.from_numpy(values)}

        what = push.direction if push.vector is None else push.vector.fingerprint
        decided = (plan.digest, "rollouts", [*rows], push.hook_name, signed, what)
        kept = once(plan.engine.checkpoint, decided, run, plan.engine.cost)
        return Reading(kept["values"].numpy(), torch.zeros((len(rows), 0)))


def check_rollouts(model: HookedModel, prompts: Sequence[TokenizedPrompt], budget: Budget) -> None:
    """Raise `InputError` when the continuations of a rollout budget would not fit the context."""
    n_ctx, longest = context_length(model), max(len(p.prompt) for p in prompts)
    is_long = n_ctx is not None and longest + ROLLOUT_TOKENS > n_ctx
    if budget.kind == "rollout_kl_p95" and is_long:
        raise InputError(
            f"a rollout adds {ROLLOUT_TOKENS} tokens, and the longest prompt has {longest} of the "
            f"model's {n_ctx}; shorten it or take another budget"
        )


def mean_loss(
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


def make_coherence(
    plan: Plan, prompts: Sequence[TokenizedPrompt], *, budget: Budget, probes: Sequence[int]
) -> Coherence:
    """Prepare the text of `plan`, its positive prompts, as a whole and its probes alone."""
    unsteered = plan.unsteered
    workload = replace(plan.workload, with_kl=budget.is_divergence)
    few = replace(
        workload,
        positive=plan.engine.batches([prompts[row] for row in probes]),
        with_readouts=False,
    )
    rows = torch.tensor(list(probes))
    of_few = replace(
        unsteered, positive=unsteered.positive[:, rows], logprob=unsteered.logprob[rows]
    )
    return Coherence(
        prompts=tuple(prompts),
        budget=budget,
        logprob=unsteered.logprob.double().numpy(),
        probes=tuple(probes),
        on_all=plan.on(workload, unsteered) if workload.with_kl else plan,
        on_probes=plan.on(few, of_few),
    )


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
