"""What the engine takes and gives back: pairs in batches, cells, the baseline, the cost."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch
from steerlens.engine.on_disk import OnDisk
from steerlens.engine.positions import Position
from steerlens.engine.tokenization import SteeredPositions
from steerlens.models.hooks import HookFunction, hook_layer, resid_post

LARGEST_PUSH = 2.0**63
"""Residual units: a state pushed further has no square in float32, which the next norm takes of it,
so that what the model then says is made of nothing. Such a push is NaN instead."""


@dataclass(frozen=True)
class Workload:
    """The pairs in batches, where to read them, and which tokens to steer.

    Either side may be without batches: it is then not run, and its activations have 0 pairs.
    `with_kl` asks for KL divergence and log-probability at every label too; without `with_readouts`
    cells have activations of width 0, so that none are kept where nothing reads them. `blocks` are
    the pairs that share batches on both sides, one block after another: of each the states can be
    held alone. Without them it is all one block.
    """

    positive: tuple[Batch, ...]
    negative: tuple[Batch, ...]
    position: Position
    steered_positions: SteeredPositions
    with_kl: bool = False
    with_readouts: bool = True
    blocks: tuple[tuple[int, ...], ...] = ()

    def block(self, rows: Sequence[int]) -> "Workload":
        """One of its blocks alone, whose rows count from 0 in the pairs' order."""
        places = {row: place for place, row in enumerate(rows)}
        positive, negative = (
            tuple(
                replace(batch, rows=tuple(places[row] for row in batch.rows))
                for batch in side
                if batch.rows[0] in places
            )
            for side in (self.positive, self.negative)
        )
        return replace(self, positive=positive, negative=negative, blocks=())

    @cached_property
    def reads_unsteered(self) -> bool:
        """Whether what is read lies before every steered token of both sides."""
        prompts = chain.from_iterable(b.prompts for b in (*self.positive, *self.negative))
        return all(
            max(prompt.places(self.position))
            < min(prompt.steered(self.steered_positions), default=len(prompt))
            for prompt in prompts
        )


@dataclass
class Cost:
    """What was run, in block-evaluations: one token through one block."""

    blocks: int = 0

    def add(self, tokens: Int[Tensor, "row token"], n_blocks: int) -> None:
        """Count `tokens` (padding too) through `n_blocks` blocks."""
        self.blocks += tokens.numel() * n_blocks


@dataclass(frozen=True)
class CellOutput:
    """What one cell measures, pair by pair, on the CPU.

    `positive` are the positive prompts' activations at the readout hook under `+coefficient`,
    `negative` the negative prompts' under `-coefficient` (residual units); `logprob` is the mean
    log-probability of the positive prompts' labels under `+coefficient` (nats per token); `kl` is
    KL(unsteered || steered) where each label is predicted (nats; NaN at the other tokens), and
    `logprobs` the log-probability of each label (nats; NaN likewise). Of a cell that was read (see
    `plan.Read`) activations are what was made of them, pair by pair.
    """

    coefficient: float
    positive: Float[Tensor, "pair d_model"]
    negative: Float[Tensor, "negative_pair d_model"]
    logprob: Float[Tensor, " pair"]
    kl: Float[Tensor, "pair token"] | None = None
    logprobs: Float[Tensor, "pair token"] | None = None


@dataclass(frozen=True)
class Baseline:
    """The unsteered model on the same pairs: what every cell is compared with.

    Heads beside wider hooks are filled up with zeros: `widths` are those of heads, None elsewhere.
    Activations are on disk where the pairs are more than one block.
    """

    hook_names: tuple[str, ...]
    positive: Float[Tensor, "hook pair d_model"] | OnDisk
    negative: Float[Tensor, "hook negative_pair d_model"] | OnDisk
    logprob: Float[Tensor, " pair"]
    widths: tuple[int | None, ...] = ()

    def block(self, rows: Sequence[int]) -> "Baseline":
        """That of one of its blocks of pairs, in memory."""
        of = list(rows)
        # A side that is not run has no rows.
        positive, negative = (
            side[:, of] if side.shape[1] else side for side in (self.positive, self.negative)
        )
        return replace(self, positive=positive, negative=negative, logprob=self.logprob[of])

    @property
    def of_positive(self) -> "Baseline":
        """That without negative prompts."""
        n_hooks, _, width = self.negative.shape
        return replace(self, negative=torch.zeros((n_hooks, 0, width)))

    def cell(self, readout: str) -> CellOutput:
        """The cell at coefficient 0, read at `readout`."""
        index = self.hook_names.index(readout)
        width = self.widths[index] if self.widths else None
        positive, negative = (side[index][:, :width] for side in (self.positive, self.negative))
        return CellOutput(0.0, positive, negative, self.logprob)


@runtime_checkable
class Vector(Protocol):
    """What a job asks of a steering vector, which it applies by the vector's own hooks."""

    def fwd_hooks(
        self, coefficient: float, *, mask: Bool[Tensor, "prompt token"]
    ) -> list[tuple[str, HookFunction]]:
        """The hooks at one coefficient, on the tokens of a mask."""
        ...

    @property
    def touched(self) -> tuple[str, ...]:
        """The hooks that it acts at or reads."""
        ...

    @property
    def is_signed(self) -> bool:
        """Whether a coefficient has an opposite."""
        ...

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides what it does."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """The cells of one hook: its direction, the coefficients, and where the effect is read.

    With a `vector` that is applied instead, and `hook_name` only names it: it runs as whole forward
    passes. `along` is a direction at the readout for what reads the cells there.
    """

    hook_name: str
    direction: Float[Tensor, " d_model"]
    coefficients: tuple[float, ...]
    readout: str
    vector: Vector | None = None
    along: Float[Tensor, " d_readout"] | None = None

    def resumes(self, exact: Collection[str]) -> bool:
        """Whether its cells may start after its hook, where that is so for the `exact` hooks."""
        return self.vector is None and self.hook_name in exact

    @property
    def touched(self) -> tuple[str, ...]:
        """Every hook that it needs."""
        return (*((self.hook_name,) if self.vector is None else self.vector.touched), self.readout)

    @property
    def starts_after(self) -> bool:
        """Whether the hook is a block's output, so that the block need not run again."""
        return self.hook_name == resid_post(hook_layer(self.hook_name))

    @property
    def first_block(self) -> int:
        """The first block that has to run."""
        return hook_layer(self.hook_name) + int(self.starts_after)


@dataclass(frozen=True)
class Finished:
    """A job, its cells in the order of its coefficients, and the block-evaluations they took."""

    job: Job
    cells: list[CellOutput]
    blocks: int
