"""`label_slopes` as callers outside the engine still call it."""
# until callers have moved

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.engine import backward
from steerlens.engine.backward import Slopes
from steerlens.engine.batches import Batch
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import SteeredPositions
from steerlens.engine.workload import Cost
from steerlens.models.hooks import HookFunction
from steerlens.models.loading import HookedModel
from steerlens.progress import Progress, silent


def label_slopes(
    model: HookedModel,
    batches: Sequence[Batch],
    along: Sequence[tuple[str, Float[Tensor, " d_model"]]],
    *,
    steered_positions: SteeredPositions,
    seed: int,
    cost: Cost,
    progress: Progress | None = None,
) -> Slopes:
    """See `steerlens.engine.backward.label_slopes`."""
    engine = Engine(model, cost=cost, progress=progress or silent)
    return backward.label_slopes(
        engine, batches, along, steered_positions=steered_positions, seed=seed
    )


def _stepping(
    direction: Float[Tensor, " d_model"],
    step: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
) -> HookFunction:
    return backward.adding(step[:, None, None] * direction.to(step), mask)
