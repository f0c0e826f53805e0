"""What steering does to held-out items and to other text: effect and damage, cell by cell."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.items import PreferenceItems
from steerlens.engine.checkpoint import Tensors, once
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.tokenization import TokenizedPrompt, fingerprint, tokenize_items
from steerlens.engine.workload import CellOutput, Job, Workload
from steerlens.loss import Budget
from steerlens.measure.coherence import P95
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.models.hooks import resid_post
from steerlens.models.identity import provenance
from steerlens.progress import silent
from steerlens.steering.generation import texts_of_each
from steerlens.tables import Row

NEW_TOKENS = 40
"""Length of the greedy continuations that `distinct_3` looks at."""
Sides: TypeAlias = tuple[Sequence[TokenizedPrompt], Sequence[TokenizedPrompt]]
"""Prompts with the positive continuations, and the same with the negative ones."""


@dataclass(frozen=True)
class Damage:
    """What a push costs on a text, in nats per token.

    `kl` and `kl_p95` are the mean and the 95th percentile of KL(unsteered || steered) over all
    labels, `degradation` the mean loss of their logprob.
    """

    kl: float
    kl_p95: float
    degradation: float

    def spent(self, budget: Budget, allowance: float) -> float:
        """The loss that the budget bounds over what it allows; NaN where that is nothing.

        Of a rollout budget the percentile on this text.
        """
        if not allowance:
            return math.nan
        loss = self.kl if budget.kind == "kl" else self.kl_p95
        return (loss if budget.is_divergence else self.degradation) / allowance


def preference_gaps(
    engine: Engine, items: PreferenceItems | Sides, jobs: Sequence[Job]
) -> tuple[Float[np.ndarray, " item"], list[Float[np.ndarray, "coefficient item"]]]:
    """Preference gaps, unsteered and for every job at its coefficients, item by item.

    gap = logprob(positive continuation) - logprob(negative continuation), each the mean over its
    own tokens after the same prompt (nats per token), both steered alike at every
    token. The engine is told of the cells.
    """
    baseline, cells = _cells(engine, both_sides(engine.model, items), jobs)
    return _gap(baseline), [np.stack([_gap(cell.logprob) for cell in of_job]) for of_job in cells]


def both_sides(model: HookedModel, items: PreferenceItems | Sides) -> tuple[TokenizedPrompt, ...]:
    """Every prompt with its positive continuation, then with the negative ones."""
    sides = tokenize_items(model, items) if isinstance(items, PreferenceItems) else items
    return (*sides[0], *sides[1])


def unsteered_gaps(engine: Engine, items: PreferenceItems | Sides) -> Float[np.ndarray, " item"]:
    """The preference gaps of the model as it is. The engine is told of the prompts."""
    batches, last = engine.batches(both_sides(engine.model, items)), resid_post(engine.n_layers - 1)
    workload = Workload(batches, (), -1, "all", with_readouts=False)
    return _gap(run_baseline(engine, workload, (last,)).logprob)


def _gap(logprob: Float[Tensor, " prompt"]) -> NDArray[np.float64]:
    """Of prompts with the positive continuations, then with the negative ones."""
    values: NDArray[np.float64] = logprob.double().numpy()
    n_items = len(values) // 2
    return values[:n_items] - values[n_items:]


def damages(
    engine: Engine, texts: Sequence[TokenizedPrompt], jobs: Sequence[Job]
) -> list[list[Damage]]:
    """The damage on `texts` of every job at each of its coefficients. Tells of the cells."""
    baseline, cells = _cells(engine, texts, jobs, with_kl=True)

    def damage(cell: CellOutput) -> Damage:
        if cell.kl is None:
            raise AssertionError("the workload asks for divergences")
        kl = cell.kl.double().numpy()
        kl = kl[~np.isnan(kl)]
        lost = float((baseline - cell.logprob).double().mean())
        p95 = float(np.quantile(kl, P95)) if np.isfinite(kl).all() else float("nan")
        return Damage(float(kl.mean()), p95, lost)

    return [[damage(cell) for cell in of_job] for of_job in cells]


def damage_columns(damage: Mapping[str, Sequence[Damage]]) -> Row:
    """The damage on "own" and on "neutral" text, at the coefficient and at minus it."""
    row = {"kl_p95_nats": damage["neutral"][0].kl_p95}
    for name, prefix in (("neutral", ""), ("own", "own_")):
        for of_sign, sign in zip(damage[name], ("", "neg_"), strict=True):
            row[f"{prefix}kl_{sign}nats"] = of_sign.kl
            row[f"{prefix}degradation_{sign}nats"] = of_sign.degradation
    return row


def mean_distinct_3(
    engine: Engine,
    prompts: Sequence[TokenizedPrompt],
    steered: Sequence[tuple[Mapping[str, Tensor], float]],
) -> list[float]:
    """The mean of `distinct_3` over greedy continuations (40 tokens) of the prompts, each steered.

    Of every vector at its coefficient, all written together; the prompts have one length. Where the
    context leaves less room, the continuations are shorter. Those of fewer than three tokens do not
    count, and NaN is returned when there are no others.
    """
    model = engine.model
    n_ctx = context_length(model)
    room = NEW_TOKENS if n_ctx is None else min(NEW_TOKENS, n_ctx - len(prompts[0].prompt))
    if room < 3 or not steered:
        return [math.nan] * len(steered)

    def measure() -> Tensors:
        written = texts_of_each(
            *(model, prompts, steered),
            max_new_tokens=room,
            batch_size=engine.batch_size,
            progress=engine.progress,
        )
        shares = torch.tensor([distinct_3(text.ids) for text in written]).double()
        return {"shares": shares.reshape(len(prompts), -1).T}

    decided = ("texts", provenance(model).to_dict(), fingerprint(prompts), room)
    vectors = tuple((coefficient, *vector.items()) for vector, coefficient in steered)
    shares = once(engine.checkpoint, (*decided, vectors), measure)["shares"].numpy()
    return [float(np.nanmean(of)) if not np.isnan(of).all() else math.nan for of in shares]


def of_one_length(prompts: Sequence[TokenizedPrompt], n: int) -> tuple[TokenizedPrompt, ...]:
    """The first `n` prompts of the commonest length, so that they can be continued together."""
    lengths = Counter(len(prompt.prompt) for prompt in prompts)
    commonest = max(lengths, key=lambda length: (lengths[length], -length))
    return tuple(prompt for prompt in prompts if len(prompt.prompt) == commonest)[:n]


def distinct_3(tokens: Sequence[int]) -> float:
    """Distinct trigrams over all trigrams of a text's tokens: 1 without repetition.

    NaN for fewer than three tokens.

    Examples:
        >>> distinct_3([1, 2, 3, 1, 2, 3])  # 123, 231, 312, 123
        0.75
    """
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else float("nan")


def _cells(
    engine: Engine,
    prompts: Sequence[TokenizedPrompt],
    jobs: Sequence[Job],
    *,
    with_kl: bool = False,
) -> tuple[Float[Tensor, " prompt"], list[list[CellOutput]]]:
    """Unsteered logprobs, and the cells of every job, which may come in any order."""
    quiet = replace(engine, progress=silent)
    workload = Workload(engine.batches(prompts), (), -1, "all", with_kl, with_readouts=False)
    readouts = tuple(dict.fromkeys(job.readout for job in jobs))
    baseline = run_baseline(quiet, workload, readouts)
    in_order = sorted(jobs, key=lambda job: job.first_block)
    plan = make_plan(quiet, workload, baseline, in_order)
    by_job: dict[Job, list[CellOutput]] = {}
    done, n_cells = 0, sum(len(job.coefficients) for job in jobs)
    engine.progress("cells", done, n_cells)
    for job, cells in zip(in_order, run_cells(plan, in_order), strict=True):
        by_job[job] = cells
        done += len(cells)
        engine.progress("cells", done, n_cells)
    return baseline.logprob, [by_job[job] for job in jobs]
