"""The parts of a recommendation: who fits, who chooses, who confirms; and the choice itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Message, Prompt
from steerlens.data.questions import open_questions
from steerlens.data.sequence import EntrySequence
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.engine.workload import Baseline, Job, Workload
from steerlens.errors import InputError
from steerlens.loss import Budget
from steerlens.measure.boundary_search import find_boundaries
from steerlens.measure.coherence import Push
from steerlens.measure.outcomes import Preference
from steerlens.measure.sign_results import SIGNS
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import resid_post
from steerlens.stats import interval

SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the boundary, from which the coefficient is chosen: the rest is room for its uncertainty."""
N_PROMPTS = 10
"""Most prompts of a part after which the model writes."""
GROUPS = {
    "pairs": {"to fit on": 8, "to choose on": 4, "to confirm on": 4},
    "items": {"to choose on": 4, "to confirm on": 4},
}
"""The fewest groups: 1 in 128 flips of 8 is that of all or of none, so that p can be below 0.05."""
Prompts = list[TokenizedPrompt]


def few_groups(entries: EntrySequence[Any], noun: str) -> str:
    """What to say where there are fewer groups than the parts need; else nothing."""
    n, needed = len(set(entries.groups)), GROUPS[noun]
    least = sum(needed.values())
    if n >= least:
        return ""
    parts = ", ".join(f"{k} {what}" for what, k in needed.items())
    return f"too few groups of {noun}: {n}, and {least} are needed ({parts}): give {least - n} more"


@dataclass(frozen=True)
class Parts:
    """Pairs, and items where there are some, of which no group is in two parts."""

    fit: ContrastivePairs
    choose: ContrastivePairs
    confirm: ContrastivePairs
    items: tuple[PreferenceItems, PreferenceItems] | None

    @classmethod
    def of(cls, pairs: ContrastivePairs, items: PreferenceItems | None, seed: int) -> "Parts":
        """Half of the pairs' groups, and a quarter twice; the halves of the items' groups."""
        fit, rest = pairs.split(0.5, seed)
        choose, confirm = rest.split(0.5, seed)
        return cls(fit, choose, confirm, None if items is None else items.split(0.5, seed))


def open_prompts(model: HookedModel, prompts: Sequence[Prompt] | None) -> tuple[Prompts, Prompts]:
    """The prompts after which the model writes, to choose and to confirm."""
    if prompts is None:
        is_chat = getattr(model.tokenizer, "chat_template", None) is not None
        texts = [*open_questions("choice")[:N_PROMPTS], *open_questions("confirmation")[:N_PROMPTS]]
        prompts = [(Message("user", text),) if is_chat else text for text in texts]
    if isinstance(prompts, str) or len(prompts) < 4:
        raise InputError(f"prompts are a list of at least 4, got {prompts!r:.80}")
    names = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]
    found = [tokenize_prompt(model, p, where=n) for p, n in zip(prompts, names, strict=True)]
    half = len(found) // 2
    return found[:half][:N_PROMPTS], found[half:][:N_PROMPTS]


@dataclass(frozen=True)
class OwnText:
    """What the model writes itself, on which the budget is spent; run unsteered once."""

    engine: Engine
    prompts: Sequence[TokenizedPrompt]
    budget: Budget
    seed: int

    @cached_property
    def _unsteered(self) -> tuple[Workload, Baseline]:
        workload = Workload(self.engine.batches(self.prompts), (), -1, "all", with_readouts=False)
        hook_names = tuple(map(resid_post, range(self.engine.n_layers)))
        return workload, run_baseline(self.engine, workload, hook_names)

    @property
    def allowance(self) -> float:
        """What the budget allows, nats per token."""
        return self.budget.allowance(float(self._unsteered[1].logprob.double().mean()))

    def boundaries(self, engine: Engine, job: Job, limit: float) -> dict[str, float]:
        """The distance of the boundary of each sign, the limit where it lies beyond."""
        workload, unsteered = self._unsteered
        plan = make_plan(engine, workload, unsteered, [replace(job, coefficients=(1.0,))])
        found = find_boundaries(
            plan,
            self.prompts,
            [Push(job.hook_name, job.direction, sign, job.readout) for sign in SIGNS.values()],
            [limit] * 2,
            budget=self.budget,
            n_bootstrap=0,  # the shares leave room instead
            seed=self.seed,
        )
        return {sign: min(b.at, limit) for sign, b in zip(SIGNS, found, strict=True)}


def choose_coefficients(
    engine: Engine, choosing: Preference, job: Job, boundaries: Mapping[str, float]
) -> dict[str, float]:
    """Of each sign the coefficient, among `SHARES` of its boundary, with the largest effect."""
    signed = [SIGNS[sign] * share * boundaries[sign] for sign in SIGNS for share in SHARES]
    _, (changes,) = choosing.changes(engine, [replace(job, coefficients=tuple(signed))])
    effects = dict(zip(signed, changes.mean(axis=1).tolist(), strict=True))
    return {
        sign: max(
            (c for c in signed if c * direction > 0),
            key=lambda c, d=direction: d * effects[c],  # type: ignore[misc]
        )
        for sign, direction in SIGNS.items()
    }


def separation(
    engine: Engine, pairs: ContrastivePairs, directions: Directions, hook_name: str, seed: int
) -> dict[str, float]:
    """How far the sides of held-out pairs are apart along the direction, residual units."""
    found = collect_differences(
        engine.model,
        pairs,
        layers=[hook_name],
        batch_size=engine.batch_size,
        progress=engine.progress,
    )
    values = (found[hook_name].double().cpu() @ directions[hook_name].double().cpu()).numpy()
    low, high = interval(values, groups=pairs.groups, seed=seed)
    ends = {"separation_ci_low": low, "separation_ci_high": high}
    return {"separation": float(values.mean()), **ends}
