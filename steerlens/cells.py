"""The cells of one hook, resumed after it: what the engine spends its time on.

The unsteered residual of all rows is carried along from hook to hook; a cell runs the blocks after
its hook only, on several coefficients at once; only label positions reach the unembedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.activations import is_out_of_memory, reading_hook, warn_of_memory
from steerlens.hooks import HookFunction, hook_layer, resid_post
from steerlens.loss import mean_by_prompt
from steerlens.models import HookedModel, inference
from steerlens.parts import Part, Prepared, advance_part
from steerlens.passes import Residual, labels_kl, labels_logprob, run_from
from steerlens.plain import (
    CellOutput,
    Cost,
    Workload,
    by_token,
    in_pair_order,
)
from steerlens.tokens import Batch, rows_per_pass


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


@dataclass(frozen=True)
class Carried:
    """The unsteered residual of every part, where the last job stood."""

    positive: tuple[Residual | None, ...]
    negative: tuple[Residual | None, ...]

    @classmethod
    def at_start(cls, prepared: Prepared) -> "Carried":
        """Nothing computed yet."""
        return cls((None,) * len(prepared.positive), (None,) * len(prepared.negative))


def fast_cells(
    model: HookedModel, prepared: Prepared, job: Job, carried: Carried, cost: Cost
) -> tuple[list[CellOutput], Carried]:
    """The cells of `job` in the order of its coefficients, and the residuals for the job after it.

    Nothing is checked here: see `engine.run_cells`. `cost` is added to.
    """
    run = _Run(model, prepared.workload, job, prepared.batch_size, cost)
    with inference(model):
        positive = _carry(model, prepared.positive, carried.positive, job, cost)
        negative = _carry(model, prepared.negative, carried.negative, job, cost)
        up = [run.positive(p, r) for p, r in zip(prepared.positive, positive, strict=True)]
        down = [run.negative(p, r) for p, r in zip(prepared.negative, negative, strict=True)]
    n = len(job.coefficients)
    nothing = torch.zeros((n, 0, len(job.direction)))
    readouts_pos, logprobs, kl, readouts_neg = nothing, torch.zeros((n, 0)), None, nothing
    if up:
        batches = [part.batch for part in prepared.positive]
        readouts_pos = in_pair_order(batches, [readout for readout, _, _ in up])
        logprobs = in_pair_order(batches, [logprob for _, logprob, _ in up])
        if prepared.workload.with_kl:
            kl = by_token(batches, [divergence for _, _, divergence in up])
    if prepared.workload.steered_positions == "continuation":
        # What is read lies before every steered token, so it is the unsteered model's to the bit.
        unsteered = prepared.unsteered.cell(job.readout)
        readouts_pos = unsteered.positive.expand(n, -1, -1)
        readouts_neg = unsteered.negative.expand(n, -1, -1)
    elif down:
        readouts_neg = in_pair_order([part.batch for part in prepared.negative], down)
    cells = [
        CellOutput(
            coefficient,
            readouts_pos[i],
            readouts_neg[i],
            logprobs[i],
            None if kl is None else kl[i],
        )
        for i, coefficient in enumerate(job.coefficients)
    ]
    return cells, Carried(positive, negative)


def _carry(
    model: HookedModel,
    parts: Sequence[Part],
    residuals: Sequence[Residual | None],
    job: Job,
    cost: Cost,
) -> tuple[Residual | None, ...]:
    """The unsteered residuals entering the job's first block, from those of the job before."""
    if job.first_block == 0:
        return (None,) * len(parts)
    carried = []
    for part, known in zip(parts, residuals, strict=True):
        start = known if known is not None and known.block <= job.first_block else None
        cost.add(part.batch.tokens, job.first_block - (0 if start is None else start.block))
        carried.append(advance_part(model, part, start, job.first_block))
    return tuple(carried)


@dataclass(frozen=True)
class _Run:
    """One job on one workload: what every one of its passes shares."""

    model: HookedModel
    workload: Workload
    job: Job
    batch_size: int | None
    cost: Cost

    def positive(
        self, part: Part, start: Residual | None
    ) -> tuple[
        Float[Tensor, "coefficient prompt d_model"],
        Float[Tensor, "coefficient prompt"],
        Float[Tensor, "coefficient label"],
    ]:
        """Readouts, label logprobs and divergences (0 labels unless asked for) at `+coefficient`.

        The divergences come prompt after prompt.
        """
        batch = part.batch
        labels = batch.label_mask()[:, 1:]
        n_labels = labels.sum(dim=1).tolist()

        def run(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
            final: dict[str, Tensor] = {}
            is_label = labels[rows]
            readout = self._pass(
                part, start, rows, coefficients, into=final, last_block=self._n_layers - 1
            )
            residual = final["residual"]
            predictions = residual[:, :-1][is_label.to(residual.device)]
            logprob = labels_logprob(self.model, predictions, batch.tokens[rows][:, 1:][is_label])
            kl = logprob.new_zeros(0)
            if part.final is not None:
                by_row = torch.split(part.final, n_labels)
                unsteered = torch.cat([by_row[row] for row in rows.tolist()])
                kl = labels_kl(self.model, predictions, unsteered)
            return readout.cpu(), mean_by_prompt(logprob, is_label).cpu(), kl.cpu()

        readout, logprob, kl = self._in_slices(batch, run, sign=1.0)
        shape = len(self.job.coefficients), len(batch.prompts)
        return (
            readout.reshape(*shape, -1),
            logprob.reshape(shape),
            kl.reshape(shape[0], len(kl) // shape[0]),
        )

    def negative(
        self, part: Part, start: Residual | None
    ) -> Float[Tensor, "coefficient prompt d_model"]:
        """Readouts under `-coefficient`."""
        last_block = hook_layer(self.job.readout)

        def run(rows: Tensor, coefficients: Tensor) -> tuple[Tensor]:
            readout = self._pass(part, start, rows, coefficients, into={}, last_block=last_block)
            return (readout.cpu(),)

        (readout,) = self._in_slices(part.batch, run, sign=-1.0)
        return readout.reshape(len(self.job.coefficients), len(part.batch.prompts), -1)

    @property
    def _n_layers(self) -> int:
        return int(self.model.cfg.n_layers)

    def _pass(
        self,
        part: Part,
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
        job, batch = self.job, part.batch
        tokens = batch.tokens[rows]
        mask = batch.steered_mask(self.workload.steered_positions)[rows]
        indices = batch.indices(self.workload.position)[rows.cpu()]
        add = _addition_by_row(job.direction, coefficients, mask)
        hooks: list[tuple[str, HookFunction]] = []
        if start is not None:
            start = replace(start, values=start.values[rows.to(start.values.device)])
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
            first_block = 0 if start is None else start.block
            self.cost.add(tokens, last_block + 1 - first_block)
            run_from(
                self.model,
                tokens,
                batch.attention_mask[rows],
                start=start,
                prefix=None if part.prefix is None else part.prefix.at(rows, first_block),
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
        """`run` over all (coefficient, prompt), some at a time, joined in that order."""
        n_prompts, coefficients = len(batch.prompts), self.job.coefficients
        device = batch.tokens.device
        rows = torch.arange(n_prompts, device=device).repeat(len(coefficients))
        # A half-precision direction must not round the coefficients.
        wide = torch.promote_types(self.job.direction.dtype, torch.float32)
        exact = torch.tensor(coefficients, dtype=wide, device=device)
        signed = (sign * exact).repeat_interleave(n_prompts)
        outputs: list[tuple[Tensor, ...]] = []
        done, size = 0, self.batch_size or rows_per_pass(self.model, batch.tokens.shape[1])
        while done < len(rows):
            part = slice(done, done + size)
            try:
                outputs.append(run(rows[part], signed[part]))
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size //= 2
                warn_of_memory(size)
                continue
            done += size
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def _addition_by_row(
    direction: Float[Tensor, " d_model"],
    coefficients: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
) -> Callable[[Tensor], Tensor]:
    """Adds `coefficients[row] * direction` at the masked tokens of each row, out of place."""

    def add(activation: Tensor) -> Tensor:
        step = (coefficients[:, None] * direction.to(coefficients)).to(activation)
        return activation + mask.to(activation)[..., None] * step[:, None]

    return add


def _storing(into: dict[str, Tensor]) -> HookFunction:
    def store(activation: Tensor, hook: object) -> None:  # noqa: ARG001
        into["residual"] = activation

    return store
