"""What every measurement on some pairs needs, computed once: tokens, unsteered model, plan."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from steerlens.data.pairs import AnyPairs, as_pairs
from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.engine import Engine
from steerlens.engine.labels import (
    OWN,
    OWN_TOKENS,
    LabelKind,
    default_labels,
    kind_of_labels,
    labelled_pairs,
    with_labels,
)
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import Plan, make_plan
from steerlens.engine.tokenization import SteeredPositions, TokenizedPairs, TokenizedPrompt
from steerlens.engine.workload import Baseline, Workload
from steerlens.errors import InputError
from steerlens.loss import MARGIN, WEIGHT, Budget
from steerlens.measure.interventions import (
    UnitIntervention,
    of_vector,
    position_of,
    readout_of,
    resid_norm,
)
from steerlens.measure.rows import layer_row
from steerlens.measure.settings import StudySettings
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import (
    Layers,
    hook_layer,
    hook_width,
    readout_hook,
    resolve_hooks,
    width_name,
)
from steerlens.models.identity import check_fitted_on, provenance
from steerlens.progress import Progress, by_default
from steerlens.stats import N_BOOTSTRAP
from steerlens.steering import SteeringVector
from steerlens.steering.operators import operator_record
from steerlens.tables import Row
from steerlens.validation import Count, Draws, NotNegative, Whole, checked


class AskedLabels(NamedTuple):
    """The labels of every text: those asked for, or the own text that is read; None: its default.

    `own_tokens` are the most tokens of own text.
    """

    kind: LabelKind | None
    own_tokens: int


@checked
class Preparation:
    """Model, pairs and directions, checked; what all measurements share is computed when asked for.

    `Study` adds the measurements.
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: AnyPairs,
        directions: Directions | SteeringVector,
        *,
        readout: Mapping[str, Tensor] | None = None,
        layers: Layers | None = None,
        labels: LabelKind | None = None,
        own_tokens: Count = OWN_TOKENS,
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
        if isinstance(directions, SteeringVector):
            interventions = _of_vector(model, directions, readout, layers)
            self.read_along: Mapping[str, Tensor] = dict([readout_of(model, directions, readout)])
        else:
            interventions = _of_directions(model, directions, readout, layers)
            self.read_along = directions
        self.interventions = {of.name: of for of in interventions}
        pairs = as_pairs(pairs, split="test")
        pairs.warn_of_groups()
        position = position_of(directions, readout)
        kind = kind_of_labels(pairs, labels, position)
        source = directions.origin if isinstance(directions, SteeringVector) else directions
        self._n_fitted_on = pairs.warn_of_fitted(source.pair_hashes)
        self.pairs = pairs
        self.asked_labels = AskedLabels(labels or (kind if kind in OWN else None), own_tokens)
        self.directions = directions
        self.settings = StudySettings(
            hook_names=tuple(self.interventions),
            position=position,
            steered_positions=steered_positions,
            labels=kind,
            own_tokens=own_tokens if kind in OWN else None,
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
            by_default(progress),
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
    def fitted(self) -> Directions:
        """The directions. Raises `InputError` in a study of a vector."""
        if not isinstance(self.directions, Directions):
            raise InputError(
                "expected a study of fitted Directions, got one of a SteeringVector, whose scale "
                "and operator have no plane (of two hooks joint_boundary gives the curve)"
            )
        return self.directions

    @property
    def method(self) -> str:
        """How the directions were fitted."""
        if isinstance(self.directions, Directions):
            return self.directions.method
        return self.directions.origin.method

    @property
    def budget(self) -> Budget:
        """What counts as coherent."""
        return Budget.parse(self.settings.budget)

    @cached_property
    def readouts(self) -> Mapping[str, str]:
        """Hook name -> the hook at which the effect of a push there is read."""
        return {name: of.readout for name, of in self.interventions.items()}

    @cached_property
    def tokens(self) -> TokenizedPairs:
        """The pairs as token ids, the positive prompts with their labels."""
        labels, own_tokens = self.asked_labels
        return labelled_pairs(
            self.model,
            self.pairs,
            labels,
            position=self.settings.position,
            steered_positions=self.settings.steered_positions,
            own_tokens=own_tokens,
            seed=self.settings.seed,
        )

    def labelled(
        self, prompts: Sequence[TokenizedPrompt]
    ) -> tuple[tuple[TokenizedPrompt, ...], LabelKind]:
        """Prompts with the labels that were asked for, or else their default; and the kind."""
        labels, own_tokens = self.asked_labels
        kind = labels or default_labels(
            [prompt.source for prompt in prompts], [bool(p.continuation) for p in prompts]
        )
        seed = self.settings.seed
        return with_labels(self.model, prompts, kind, own_tokens=own_tokens, seed=seed), kind

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
        acted_at = [name for of in self.interventions.values() for name in of.hook_names]
        needed = tuple(dict.fromkeys([*acted_at, *self.readouts.values()]))
        return run_baseline(self.engine, self.workload, needed)

    @cached_property
    def plan(self) -> Plan:
        """The pairs ready for cells, every hook checked with a push of one residual unit."""
        jobs = [of.job((1.0,)) for of in self.interventions.values()]
        return make_plan(self.engine, self.workload, self.baseline, jobs)

    @cached_property
    def layer_rows(self) -> Mapping[str, Row]:
        """Hook name -> the numbers of the unsteered model there (columns `layers`)."""
        settings, groups = self.settings, self.pairs.groups
        return {
            name: {
                **layer_row(of.hook_name, self.baseline, of.direction, settings, groups),
                "hook_name": name,
                "layer": hook_layer(name),
            }
            for name, of in self.interventions.items()
        }

    def check_readouts(self) -> None:
        """Raise `InputError` when a readout hook has no direction."""
        check_directions(self.read_along, self.readouts.values())

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
            **self._origin(),
            "measured_on": self.pairs.fingerprint,
            "pairs": self.pairs.name,
            "n_pairs_fitted_on": self._n_fitted_on,
            "n_groups": len(set(self.pairs.groups)),
            "model": provenance(self.model).to_dict(),
            "forward_equivalents": round(cost, 3),
        }

    def _origin(self) -> dict[str, Any]:
        """How the directions were made; of a vector also what it is."""
        if isinstance(self.directions, Directions):
            return {
                "method": self.method,
                "directions_seed": self.directions.seed,
                "fitted_on": self.directions.fingerprint,
            }
        vector = self.directions
        return {
            "method": self.method,
            "directions_seed": vector.origin.seed,
            "fitted_on": vector.origin.pairs,
            "vector": {
                "fingerprint": vector.fingerprint,
                "hook_names": vector.hook_names,
                "operator": operator_record(vector.operator),
                "scale": vector.scale.tolist(),
                "resid_norm": [resid_norm(self.baseline, name) for name in vector.hook_names],
            },
        }


def _of_directions(
    model: HookedModel, directions: Directions, readout: object, layers: Layers | None
) -> list[UnitIntervention]:
    if readout is not None:
        raise InputError("readout= is for a SteeringVector; Directions are read along their own")
    hook_names = resolve_hooks(model, directions.hook_names if layers is None else layers)
    check_directions(directions, hook_names)
    check_fitted_on(model, directions)
    check_width(model, directions, hook_names[0])
    n_layers = int(model.cfg.n_layers)
    return [
        UnitIntervention(name, name, unit, unit, readout_hook(name, n_layers))
        for name, unit in ((name, directions[name]) for name in hook_names)
    ]


def _of_vector(
    model: HookedModel,
    vector: SteeringVector,
    readout: Mapping[str, Tensor] | None,
    layers: Layers | None,
) -> list[UnitIntervention]:
    if layers is not None:
        raise InputError("a vector is measured as a whole; give vector.at(...) instead of layers=")
    if vector.condition is not None and vector.condition.scope == "prompt":
        raise InputError(
            "a study does not follow a condition on the prompt, as only `steer` knows where that "
            "ends; measure the vector with a condition on each token, or without one"
        )
    vector.check_model(model)
    return [of_vector(vector, readout_of(model, vector, readout)[0])]


def check_directions(directions: Mapping[str, Tensor], hook_names: Iterable[str]) -> None:
    """Raise `InputError` when a hook has no direction."""
    missing = [name for name in dict.fromkeys(hook_names) if name not in directions]
    if missing:
        raise InputError(
            f"no direction was fitted at {', '.join(missing)}; pass the same layers to "
            "collect_differences, which adds the readout hooks by itself (of heads: to fit)"
        )


def check_width(model: HookedModel, along: Mapping[str, Tensor], hook_name: str) -> None:
    """Raise `InputError` when the direction at a hook has another width than the model there."""
    width, expected = len(along[hook_name]), hook_width(model, hook_name)
    if width != expected:
        raise InputError(
            f"the direction has {width_name([hook_name])} {width}, this model {expected}; fit it "
            "on this model"
        )
