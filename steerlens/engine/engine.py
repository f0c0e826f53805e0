"""The one object that everything below a study is run with."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from steerlens.engine.batches import Batch, block_rows, make_batches
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.positions import Position
from steerlens.engine.tokenization import (
    SteeredPositions,
    TokenizedPairs,
    TokenizedPrompt,
    check_steered_positions,
)
from steerlens.engine.workload import Cost, Workload
from steerlens.models.hooked_model import HookedModel
from steerlens.progress import Progress, part_of, silent, under


@dataclass(frozen=True)
class Engine:
    """A model, how many rows it runs at once, who runs its cells, what that cost, who is told.

    Without a `batch_size` a pass holds what the device can use; without an `executor` cells run
    here. `cost` is added to by all that is run, and shared by the engines made from this one; so is
    the `checkpoint`, which is given what is finished.
    """

    model: HookedModel
    batch_size: int | None = None
    executor: Executor | None = None
    progress: Progress = silent
    cost: Cost = field(default_factory=Cost)
    checkpoint: Checkpoint | None = None

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return int(self.model.cfg.n_layers)

    def on(self, model: HookedModel) -> "Engine":
        """This engine with another model: the one under a Bridge, say."""
        return replace(self, model=model)

    def stage(self, what: str, *, before: int = 0, total: int | None = None) -> "Engine":
        """This engine, telling of its steps as a stage called `what` (see `progress.part_of`)."""
        return replace(self, progress=part_of(self.progress, what, before=before, total=total))

    def under(self, heading: str) -> "Engine":
        """This engine, with a heading before what it tells."""
        return replace(self, progress=under(self.progress, heading))

    def batches(self, prompts: Sequence[TokenizedPrompt]) -> tuple[Batch, ...]:
        """Length-sorted batches of the prompts (see `make_batches`)."""
        return make_batches(self.model, prompts, self.batch_size)

    def workload(
        self, pairs: TokenizedPairs, *, position: Position, steered_positions: SteeredPositions
    ) -> Workload:
        """Batches of both sides. Raises `InputError` when steering there cannot reach a label."""
        check_steered_positions(steered_positions, pairs)
        blocks = block_rows(self.model, pairs, self.batch_size)
        positive, negative = (
            tuple(batch for rows in blocks if side for batch in self._batches_of(side, rows))
            for side in (pairs.positive, pairs.negative)
        )
        return Workload(positive, negative, position, steered_positions, blocks=blocks)

    def _batches_of(
        self, prompts: Sequence[TokenizedPrompt], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """Batches of the prompts in some rows."""
        for batch in self.batches([prompts[row] for row in rows]):
            yield replace(batch, rows=tuple(rows[place] for place in batch.rows))

    def forward_equivalents(self, workload: Workload, *, since: int = 0) -> float:
        """What was run, in full forward passes of the workload's positive prompts.

        Of the cost, `since` block-evaluations do not count: those before this measurement.
        """
        one = sum(batch.tokens.numel() for batch in workload.positive) * self.n_layers
        return (self.cost.blocks - since) / one
