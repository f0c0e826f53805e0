"""What every measurement on some pairs needs, computed once: tokens, unsteered model, plan."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from functools import cached_property
from typing import Any

from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import Plan, make_plan
from steerlens.engine.tokenization import SteeredPositions, TokenizedPairs, tokenize_pairs
from steerlens.engine.workload import Baseline, Job, Workload
from steerlens.errors import InputError
from steerlens.loss import MARGIN, WEIGHT, Budget
from steerlens.measure.rows import layer_row
from steerlens.measure.settings import N_BOOTSTRAP, StudySettings
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, readout_hook, resolve_hooks
from steerlens.models.identity import check_fitted_on, provenance
from steerlens.progress import Progress, silent
from steerlens.tables import Row
from steerlens.validation import Count, Draws, NotNegative, Whole, checked


@checked
class Preparation:
    """Model, pairs and directions, checked; what all measurements share is computed when asked for.

    `Study` adds the measurements.
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: ContrastivePairs,
        directions: Directions,
        *,
        layers: Layers | None = None,
        budget: str = "relative=0.01",
        steered_positions: SteeredPositions = "all",
        margin: float | int = MARGIN,
        weight: NotNegative = WEIGHT,
        n_bootstrap: Draws = N_BOOTSTRAP,
        seed: Whole = 0,
        batch_size: Count | None = None,
        executor: Executor | None = None,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
        check_directions(directions, hook_names)
        check_fitted_on(model, directions)
        check_width(directions, model)
        pairs.warn_of_groups()
        self.pairs = pairs
        self.directions = directions
        self.settings = StudySettings(
            hook_names=hook_names,
            position=directions.position,
            steered_positions=steered_positions,
            budget=str(Budget.parse(budget)),
            margin=float(margin),
            weight=float(weight),
            n_bootstrap=n_bootstrap,
            seed=seed,
            batch_size=batch_size,
        )
        self.engine = Engine(
            model,
            self.settings.batch_size,
            executor,
            progress or silent,
            checkpoint=checkpoint,
        )

    @property
    def model(self) -> HookedModel:
        """The model that is measured."""
        return self.engine.model

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks at which a direction is pushed along."""
        return self.settings.hook_names

    @property
    def budget(self) -> Budget:
        """What counts as coherent."""
        return Budget.parse(self.settings.budget)

    @cached_property
    def readouts(self) -> Mapping[str, str]:
        """Hook name -> the hook at which the effect of a push there is read."""
        return {name: readout_hook(name, self.engine.n_layers) for name in self.hook_names}

    @cached_property
    def tokens(self) -> TokenizedPairs:
        """The pairs as token ids."""
        return tokenize_pairs(self.model, self.pairs)

    @cached_property
    def workload(self) -> Workload:
        """The pairs in batches."""
        return self.engine.workload(
            self.tokens,
            position=self.settings.position,
            steered_positions=self.settings.steered_positions,
        )

    @cached_property
    def baseline(self) -> Baseline:
        """The unsteered model, at every hook and readout."""
        needed = tuple(dict.fromkeys([*self.hook_names, *self.readouts.values()]))
        return run_baseline(self.engine, self.workload, needed)

    @cached_property
    def plan(self) -> Plan:
        """The pairs ready for cells, every hook checked with a push of one residual unit."""
        jobs = [
            Job(name, self.directions[name], (1.0,), self.readouts[name])
            for name in self.hook_names
        ]
        return make_plan(self.engine, self.workload, self.baseline, jobs)

    @cached_property
    def layer_rows(self) -> Mapping[str, Row]:
        """Hook name -> the numbers of the unsteered model there (`LAYER_COLUMNS`)."""
        return {
            name: layer_row(
                name, self.baseline, self.directions[name], self.settings, self.pairs.groups
            )
            for name in self.hook_names
        }

    def check_readouts(self) -> None:
        """Raise `InputError` when a readout hook has no direction."""
        check_directions(self.directions, self.readouts.values())

    @property
    def spent(self) -> int:
        """Block-evaluations run so far; `record` takes those before a measurement."""
        return self.engine.cost.blocks

    def record(self, settings: StudySettings, *, since: int) -> dict[str, Any]:
        """What a table carries in its attrs: settings, where its numbers come from, the cost.

        The cost is what was run `since` then, in forward-equivalents: of two measurements the
        second does not pay for what the first made ready.
        """
        cost = self.engine.forward_equivalents(self.workload, since=since)
        return {
            "settings": asdict(settings),
            "method": self.directions.method,
            "directions_seed": self.directions.seed,
            "fitted_on": self.directions.fingerprint,
            "measured_on": self.pairs.fingerprint,
            "pairs": self.pairs.name,
            "n_groups": len(set(self.pairs.groups)),
            "model": provenance(self.model).to_dict(),
            "forward_equivalents": round(cost, 3),
        }


def check_directions(directions: Directions, hook_names: Iterable[str]) -> None:
    """Raise `InputError` when a hook has no direction."""
    missing = [name for name in dict.fromkeys(hook_names) if name not in directions]
    if missing:
        raise InputError(
            f"no direction was fitted at {', '.join(missing)}; pass the same layers to "
            "collect_differences, which adds the readout hooks by itself"
        )


def check_width(directions: Directions, model: HookedModel) -> None:
    """Raise `InputError` when the directions are another width than the residual stream."""
    width, expected = directions.vectors.shape[-1], int(model.cfg.d_model)
    if width != expected:
        raise InputError(
            f"the directions have d_model {width}, this model {expected}; fit them on this model"
        )
