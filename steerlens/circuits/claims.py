"""What carries the effect, put to the test: parts of the steered model held as unsteered."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.circuits.components import Component, by_hook, head_hook
from steerlens.circuits.interventions import Intervention, capture, replacing
from steerlens.circuits.prompts import counting
from steerlens.circuits.tasks import Task
from steerlens.engine.checkpoint import Tensors
from steerlens.models.hooks import hook_layer, hooked
from steerlens.progress import Progress
from steerlens.stats import TAIL, rank_p, ratio_interval
from steerlens.tables import to_frame

Places = Mapping[str, list[int] | None]
"""Hook -> the heads that are held there; None: all that is there."""
Numbers = dict[str, int | float]
"""Some columns of a row: runs, the change that they leave on average, and its interval."""


@dataclass(frozen=True)
class Claims:
    """Tests of what carries an intervention's `change` of the metric, prompt by prompt."""

    task: Task
    steered: Intervention
    unsteered: Float[Tensor, " prompt"]
    change: Float[Tensor, " prompt"]
    n_bootstrap: int
    seed: int

    def test(
        self,
        named: Sequence[Component],
        behind: Sequence[Component],
        *,
        n_draws: int,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Run the steered model with something held at its unsteered value (columns `claims`).

        `named` are components that were chosen on other prompts; the random ones are of `behind`.
        """
        rows = {"nothing": self._of_prompts(self.change)}
        if not named:
            return self._table(rows)
        count = counting(progress, "claims: runs", 3 + n_draws)
        first = min(part.layer for part in behind)
        attention = [f"blocks.{i}.attn" for i in range(first, int(self.task.model.cfg.n_layers))]
        for kind, hook in (("patterns", "hook_pattern"), ("values", "hook_v")):
            names = [f"{module}.{hook}" for module in attention]
            is_live = _is_live(self.task.part(slice(0, 1)), names[0])
            held = self._of_prompts(self._held(dict.fromkeys(names))) if is_live else {}
            rows[f"attention {kind}"] = held
            count(1)
        left = self._of_prompts(self._held(by_hook(named)))
        rows["named components"] = left | {"n_components": len(named)}
        count(1)
        generator = np.random.default_rng(self.seed)
        draws: list[float] = []
        for _ in range(n_draws):
            drawn = _as_many(named, behind, generator)
            draws.append(float(self._held(by_hook(drawn)).double().mean()))
            count(1)
        if draws:
            taken = [self._whole - change for change in (left["change"], *draws)]
            rows["named components"]["p_value"] = rank_p(taken[0], taken[1:])
            of_draws = self._of_draws(np.array(draws))
            rows["random components"] = of_draws | {"n_components": len(named)}
        return self._table(rows)

    def _held(self, places: Places) -> Float[Tensor, " prompt"]:
        """What is left of the change with some places at unsteered values."""

        def run() -> Tensors:
            metrics = []
            for batch in self.task.passes():
                unsteered = capture(batch.model, batch.prompts.tokens, list(places))
                holding = [replacing(n, unsteered[n], heads) for n, heads in places.items()]
                metrics.append(batch.measure(self.steered, holding))
            return {"metric": torch.cat(metrics)}

        decided = ("held", self.steered.decided, sorted(places.items()))
        return self.task.once(decided, run)["metric"] - self.unsteered

    def _of_prompts(self, left: Float[Tensor, " prompt"]) -> Numbers:
        """Of one run, with its interval over prompts."""
        changes = [values.double().numpy() for values in (left, self.change)]
        how: dict[str, Any] = {"seed": self.seed, "n_bootstrap": self.n_bootstrap}
        low, high = ratio_interval(*changes, groups=self.task.prompts.groups, **how)
        change = float(left.double().mean())
        return {"n_draws": 1, "change": change, "ci_low": low, "ci_high": high}

    def _of_draws(self, changes: Float[np.ndarray, " draw"]) -> Numbers:
        """Of all random sets, with where 95% of them lie."""
        of_draws: Numbers = {"n_draws": len(changes), "change": float(changes.mean())}
        if len(changes) > 1 and self._whole:
            ends = np.quantile(changes / self._whole, [TAIL, 1 - TAIL]).tolist()
            of_draws |= dict(zip(("ci_low", "ci_high"), ends, strict=True))
        return of_draws

    @property
    def _whole(self) -> float:
        return float(self.change.double().mean())

    def _table(self, rows: Mapping[str, Numbers]) -> pd.DataFrame:
        none = {"n_components": 0, "n_draws": 0, "n_groups": len(set(self.task.prompts.groups))}
        whole = self._whole or math.nan
        records = [
            {"test": test, **none, **row, "remaining": row.get("change", math.nan) / whole}
            for test, row in rows.items()
        ]
        return to_frame(records, "claims", {})


def _is_live(task: Task, hook_name: str) -> bool:
    """Whether what a hook returns is used: on some models that of attention patterns is not."""
    heads = head_hook(hook_layer(hook_name))

    def drop(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.zeros_like(activation)

    def read() -> Tensor:
        return capture(task.model, task.prompts.tokens, [heads])[heads]

    plain = read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TransformerLens says so too; it is NaN here
        with hooked(task.model, [(hook_name, drop)]):
            return not torch.equal(plain, read())


def _as_many(
    named: Sequence[Component], behind: Sequence[Component], generator: np.random.Generator
) -> list[Component]:
    """As many heads and MLPs as are named, of all behind the vector, the named ones among them."""
    drawn: list[Component] = []
    for kind in ("head", "mlp"):
        pool = [part for part in behind if part.kind == kind]
        n_named = sum(part.kind == kind for part in named)
        drawn += [pool[i] for i in sorted(generator.choice(len(pool), n_named, replace=False))]
    return drawn
