"""The cells of one hook, resumed after it: what the engine spends its time on.

The unsteered residual of all rows is carried along from hook to hook; a cell runs the blocks after
its hook only, on several coefficients at once; only label positions reach the unembedding.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.activations import reading_hook
from steerlens.hooks import HookFunction, hook_layer, resid_post
from steerlens.loss import mean_by_prompt
from steerlens.models import HookedModel, inference
from steerlens.passes import Residual, advance, labels_logprob, run_from
from steerlens.plain import CellOutput, Workload
from steerlens.tokens import Batch, pair_order


@dataclass
class Cost:
    """What was run, in block-evaluations: one token through one block."""

    blocks: int = 0

    def add(self, tokens: Int[Tensor, "row token"], n_blocks: int) -> None:
        """Count `tokens` (padding too) through `n_blocks` blocks."""
        self.blocks += tokens.numel() * n_blocks


@dataclass(frozen=True)
class Job:
    """The cells of one hook: its direction, the coefficients, and where the effect is read."""

    hook_name: str
    direction: Float[Tensor, " d_model"]
    coefficients: tuple[float, ...]
    readout: str

    @property
    def starts_after(self) -> bool:
        """Whether the hook is a block's output, so that the block need not run again."""
        return self.hook_name == resid_post(hook_layer(self.hook_name))

    @property
    def first_block(self) -> int:
        """The first block that has to run."""
        return hook_layer(self.hook_name) + int(self.starts_after)


def forward_equivalents(cost: Cost, model: HookedModel, workload: Workload) -> float:
    """`cost` in full forward passes of the positive prompts."""
    one = sum(batch.tokens.numel() for batch in workload.positive) * int(model.cfg.n_layers)
    return cost.blocks / one


@dataclass(frozen=True)
class Carried:
    """The unsteered residual of every batch, where the last job stood."""

    positive: tuple[Residual | None, ...]
    negative: tuple[Residual | None, ...]

    @classmethod
    def at_start(cls, workload: Workload) -> "Carried":
        """Nothing computed yet."""
        return cls((None,) * len(workload.positive), (None,) * len(workload.negative))


def fast_cells(
    model: HookedModel,
    workload: Workload,
    job: Job,
    carried: Carried,
    rows_per_pass: int,
    cost: Cost,
) -> tuple[list[CellOutput], Carried]:
    """The cells of `job` in the order of its coefficients, and the residuals for the job after it.

    Nothing is checked here: see `engine.run_cells`. `cost` is added to.
    """
    with inference(model):
        positive = _carry(model, workload.positive, carried.positive, job, cost)
        negative = _carry(model, workload.negative, carried.negative, job, cost)
        run = _Run(model, workload, job, rows_per_pass, cost)
        up = [run.positive(b, r) for b, r in zip(workload.positive, positive, strict=True)]
        down = [run.negative(b, r) for b, r in zip(workload.negative, negative, strict=True)]
    up_order, down_order = pair_order(workload.positive), pair_order(workload.negative)
    readouts_pos = torch.cat([readout for readout, _ in up], dim=1)[:, up_order]
    logprobs = torch.cat([logprob for _, logprob in up], dim=1)[:, up_order]
    readouts_neg = torch.cat(down, dim=1)[:, down_order]
    cells = [
        CellOutput(coefficient, readouts_pos[i], readouts_neg[i], logprobs[i])
        for i, coefficient in enumerate(job.coefficients)
    ]
    return cells, Carried(positive, negative)


def _carry(
    model: HookedModel,
    batches: Sequence[Batch],
    residuals: Sequence[Residual | None],
    job: Job,
    cost: Cost,
) -> tuple[Residual | None, ...]:
    """The unsteered residuals entering the job's first block, from those of the job before."""
    carried: list[Residual | None] = []
    for batch, known in zip(batches, residuals, strict=True):
        start = known if known is not None and known.block <= job.first_block else None
        if job.first_block == 0:
            carried.append(None)
            continue
        cost.add(batch.tokens, job.first_block - (0 if start is None else start.block))
        carried.append(
            advance(model, batch.tokens, batch.attention_mask, start=start, block=job.first_block)
        )
    return tuple(carried)


@dataclass(frozen=True)
class _Run:
    """One job on one workload: what every one of its passes shares."""

    model: HookedModel
    workload: Workload
    job: Job
    rows_per_pass: int
    cost: Cost

    def positive(
        self, batch: Batch, start: Residual | None
    ) -> tuple[Float[Tensor, "coefficient prompt d_model"], Float[Tensor, "coefficient prompt"]]:
        """Readouts and label logprobs of a batch under `+coefficient`."""
        labels = batch.label_mask()

        def run(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
            final: dict[str, Tensor] = {}
            is_label = labels[rows][:, 1:]
            readout = self._pass(
                batch, start, rows, coefficients, into=final, last_block=self._n_layers - 1
            )
            predictions = final["residual"][:, :-1][is_label]
            logprob = labels_logprob(self.model, predictions, batch.tokens[rows][:, 1:][is_label])
            return readout.cpu(), mean_by_prompt(logprob, is_label).cpu()

        readout, logprob = self._in_slices(batch, run, sign=1.0)
        return readout, logprob

    def negative(
        self, batch: Batch, start: Residual | None
    ) -> Float[Tensor, "coefficient prompt d_model"]:
        """Readouts of a batch under `-coefficient`."""
        last_block = hook_layer(self.job.readout)

        def run(rows: Tensor, coefficients: Tensor) -> tuple[Tensor]:
            readout = self._pass(batch, start, rows, coefficients, into={}, last_block=last_block)
            return (readout.cpu(),)

        return self._in_slices(batch, run, sign=-1.0)[0]

    @property
    def _n_layers(self) -> int:
        return int(self.model.cfg.n_layers)

    def _pass(
        self,
        batch: Batch,
        start: Residual | None,
        rows: Int[Tensor, " row"],
        coefficients: Float[Tensor, " row"],
        *,
        into: dict[str, Tensor],
        last_block: int,
    ) -> Float[Tensor, "row d_model"]:
        """Steer `rows` and run them up to the end of `last_block`; the activations at the readout.

        The residual after `last_block` is stored as `into["residual"]`.
        """
        job, tokens = self.job, batch.tokens[rows]
        mask = batch.steered_mask(self.workload.steered_positions)[rows]
        indices = batch.indices(self.workload.position)[rows.cpu()]
        add = _addition_by_row(job.direction, coefficients, mask)
        hooks: list[tuple[str, HookFunction]] = []
        if start is not None:
            start = replace(start, values=start.values[rows])
        if not job.starts_after or start is None:
            hooks.append((job.hook_name, lambda activation, hook: add(activation)))  # noqa: ARG005
        else:
            start = replace(start, values=add(start.values))
        found: dict[str, Tensor] = {}
        if start is not None and start.block == last_block + 1:
            into["residual"] = start.values
        else:
            last = resid_post(last_block)
            hooks.append((last, _storing(into)))
            if not self._reads_at_start(start):
                hooks.append(reading_hook(found, job.readout, indices))
            self.cost.add(tokens, last_block + 1 - (0 if start is None else start.block))
            run_from(
                self.model,
                tokens,
                batch.attention_mask[rows],
                start=start,
                fwd_hooks=hooks,
                last_hook=last,
            )
        if start is not None and self._reads_at_start(start):
            _, read = reading_hook(found, job.readout, indices)
            read(start.values, None)
        return found[job.readout]

    def _reads_at_start(self, start: Residual | None) -> bool:
        """Whether the readout is the residual that the pass starts from."""
        return start is not None and self.job.readout == resid_post(start.block - 1)

    def _in_slices(
        self,
        batch: Batch,
        run: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        *,
        sign: float,
    ) -> tuple[Tensor, ...]:
        """`run` over all (coefficient, prompt), some at a time: `[coefficient, prompt, ...]`."""
        n_prompts, coefficients = len(batch.prompts), self.job.coefficients
        device = batch.tokens.device
        rows = torch.arange(n_prompts, device=device).repeat(len(coefficients))
        signed = (sign * torch.tensor(coefficients, device=device)).repeat_interleave(n_prompts)
        outputs: list[tuple[Tensor, ...]] = []
        done, size = 0, self.rows_per_pass
        while done < len(rows):
            part = slice(done, done + size)
            try:
                outputs.append(run(rows[part], signed[part]))
            except RuntimeError as error:
                if size == 1 or not _is_out_of_memory(error):
                    raise
                size //= 2
                warnings.warn(
                    f"out of memory: going on with {size} prompts a pass",
                    ResourceWarning,
                    stacklevel=2,
                )
                continue
            done += size
        return tuple(
            torch.cat(parts).reshape(len(coefficients), n_prompts, *parts[0].shape[1:])
            for parts in zip(*outputs, strict=True)
        )


def _addition_by_row(
    direction: Float[Tensor, " d_model"],
    coefficients: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
) -> Callable[[Tensor], Tensor]:
    """Adds `coefficients[row] * direction` at the masked tokens of each row, out of place."""

    def add(activation: Tensor) -> Tensor:
        step = (coefficients.to(direction)[:, None] * direction.to(coefficients.device)).to(
            activation
        )
        return activation + mask.to(activation)[..., None] * step[:, None]

    return add


def _storing(into: dict[str, Tensor]) -> HookFunction:
    def store(activation: Tensor, hook: object) -> None:  # noqa: ARG001
        into["residual"] = activation

    return store


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
