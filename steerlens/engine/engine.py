"""The one object that everything below a study is run with."""

from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from steerlens.engine.workload import Cost, Workload
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress, part_of, silent, under


@dataclass(frozen=True)
class Engine:
    """A model, how many rows it runs at once, who runs its cells, what that cost, who is told.

    Without a `batch_size` a pass holds what the device can use; without an `executor` cells run
    here. `cost` is added to by everything that is run, and shared by the engines made from this one.
    """

    model: HookedModel
    batch_size: int | None = None
    executor: Executor | None = None
    progress: Progress = silent
    cost: Cost = field(default_factory=Cost)

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return int(self.model.cfg.n_layers)

    def stage(self, what: str, *, before: int = 0, total: int | None = None) -> "Engine":
        """This engine, telling of its steps as a stage called `what` (see `progress.part_of`)."""
        return replace(self, progress=part_of(self.progress, what, before=before, total=total))

    def under(self, heading: str) -> "Engine":
        """This engine, with a heading before what it tells."""
        return replace(self, progress=under(self.progress, heading))

    def forward_equivalents(self, workload: Workload) -> float:
        """What has been run, in full forward passes of the workload's positive prompts."""
        one = sum(batch.tokens.numel() for batch in workload.positive) * self.n_layers
        return self.cost.blocks / one
