"""What the engine takes and gives back: pairs in batches, cells, the baseline, the cost."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch, make_batches
from steerlens.engine.tokenization import SteeredPositions, TokenizedPairs, check_steered_positions
from steerlens.models.loading import HookedModel


@dataclass(frozen=True)
class Workload:
    """The pairs in batches, where to read them, and which tokens to steer.

    Either side may be without batches: it is then not run, and its activations have 0 pairs.
    `with_kl` asks for the KL divergence at every label too.
    """

    positive: tuple[Batch, ...]
    negative: tuple[Batch, ...]
    position: int
    steered_positions: SteeredPositions
    with_kl: bool = False


@dataclass
class Cost:
    """What was run, in block-evaluations: one token through one block."""

    blocks: int = 0

    def add(self, tokens: Int[Tensor, "row token"], n_blocks: int) -> None:
        """Count `tokens` (padding too) through `n_blocks` blocks."""
        self.blocks += tokens.numel() * n_blocks


def forward_equivalents(cost: Cost, model: HookedModel, workload: Workload) -> float:
    """`cost` in full forward passes of the positive prompts."""
    one = sum(batch.tokens.numel() for batch in workload.positive) * int(model.cfg.n_layers)
    return cost.blocks / one


@dataclass(frozen=True)
class CellOutput:
    """What one cell measures, pair by pair, on the CPU.

    `positive` are the positive prompts' activations at the readout hook under `+coefficient`,
    `negative` the negative prompts' under `-coefficient` (residual units); `logprob` is the mean
    log-probability of the positive prompts' labels under `+coefficient` (nats per token); `kl` is
    KL(unsteered || steered) where each label is predicted (nats; NaN at the other tokens).
    """

    coefficient: float
    positive: Float[Tensor, "pair d_model"]
    negative: Float[Tensor, "negative_pair d_model"]
    logprob: Float[Tensor, " pair"]
    kl: Float[Tensor, "pair token"] | None = None


@dataclass(frozen=True)
class Baseline:
    """The unsteered model on the same pairs: what every cell is compared with."""

    hook_names: tuple[str, ...]
    positive: Float[Tensor, "hook pair d_model"]
    negative: Float[Tensor, "hook negative_pair d_model"]
    logprob: Float[Tensor, " pair"]

    def cell(self, readout: str) -> CellOutput:
        """The cell at coefficient 0, read at `readout`."""
        index = self.hook_names.index(readout)
        return CellOutput(0.0, self.positive[index], self.negative[index], self.logprob)


def make_workload(
    model: HookedModel,
    pairs: TokenizedPairs,
    *,
    position: int,
    steered_positions: SteeredPositions,
    batch_size: int | None = None,
) -> Workload:
    """Batches of both sides. Raises `InputError` when steering there cannot reach a label."""
    check_steered_positions(steered_positions, pairs)
    return Workload(
        positive=make_batches(model, pairs.positive, batch_size),
        negative=make_batches(model, pairs.negative, batch_size),
        position=position,
        steered_positions=steered_positions,
    )
