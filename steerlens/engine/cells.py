"""The cells of one hook, resumed after it: what the engine spends its time on.

The unsteered residual of all rows is carried along from hook to hook; a cell runs the blocks after
its hook only, on several coefficients at once; only label positions reach the unembedding.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch, before_labels, in_pair_order, rows_per_pass
from steerlens.engine.capture import at_position, reading_hook
from steerlens.engine.engine import Engine
from steerlens.engine.memory import in_slices
from steerlens.engine.plain_loop import by_token, plain_cells
from steerlens.engine.prefixes import Part, Prepared, advance_part
from steerlens.engine.resume import Residual, labels_kl, labels_logprob, run_from
from steerlens.engine.transfer import Arriving, to_device, to_host
from steerlens.engine.workload import LARGEST_PUSH, CellOutput, Cost, Finished, Job, Workload
from steerlens.loss.labels import mean_by_prompt
from steerlens.models.hooks import HookFunction, hook_layer, resid_post
from steerlens.models.loading import inference


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
    engine: Engine, prepared: Prepared, job: Job, carried: Carried
) -> tuple[list[CellOutput], Carried]:
    """The cells of `job` in the order of its coefficients, and the residuals for the job after it.

    Nothing is checked here: see `plan.make_plan`.
    """
    finish, carried = start_cells(engine, prepared, job, carried)
    return finish(), carried


def start_cells(
    engine: Engine, prepared: Prepared, job: Job, carried: Carried
) -> tuple[Callable[[], list[CellOutput]], Carried]:
    """`fast_cells` with its cells still to be waited for: a GPU is given the next job meanwhile."""
    run = _Run(engine, prepared.workload, job)
    with inference(engine.model):
        carried = carry(engine, prepared, job, carried)
        up = [run.positive(p, r) for p, r in zip(prepared.positive, carried.positive, strict=True)]
        down = [
            run.negative(p, r) for p, r in zip(prepared.negative, carried.negative, strict=True)
        ]
    return partial(_finished, prepared, job, up, down), carried


def _finished(
    prepared: Prepared,
    job: Job,
    up: Sequence["_Slices"],
    down: Sequence["_Slices"],
) -> list[CellOutput]:
    """The cells of a job from the outputs of its parts."""
    n = len(job.coefficients)
    nothing = torch.zeros((n, 0, prepared.unsteered.cell(job.readout).positive.shape[-1]))
    readouts_pos, logprob, readouts_neg = nothing, torch.zeros((n, 0)), nothing
    at_labels: Sequence[Sequence[Tensor | None]] = [(None, None)] * n
    if up:
        batches = [part.batch for part in prepared.positive]
        readouts, by_prompt, *by_label = zip(*(_joined(of, n) for of in up), strict=True)
        readouts_pos, logprob = (in_pair_order(batches, v) for v in (readouts, by_prompt))
        readouts_neg = readouts_pos[:, :0]
        if by_label:
            kl, logprobs = (by_token(batches, values) for values in by_label)
            at_labels = list(zip(kl, logprobs, strict=True))
    if prepared.workload.reads_unsteered:
        # It is read before every steered token, so it is the unsteered one to the bit.
        unsteered = prepared.unsteered.cell(job.readout)
        readouts_pos = unsteered.positive.expand(n, -1, -1)
        readouts_neg = unsteered.negative.expand(n, -1, -1)
    elif down:
        batches = [part.batch for part in prepared.negative]
        readouts_neg = in_pair_order(batches, [_joined(of, n)[0] for of in down])
    values = zip(job.coefficients, readouts_pos, readouts_neg, logprob, at_labels, strict=True)
    return [CellOutput(*of, *by_label) for *of, by_label in values]


def carry_past(engine: Engine, prepared: Prepared, job: Job, carried: Carried) -> Carried:
    """The residuals for the job after `job`, whose own cells are not run; not counted."""
    with inference(engine.model):
        return carry(replace(engine, cost=Cost()), prepared, job, carried)


def cells_in_turn(
    engine: Engine,
    prepared: Prepared,
    jobs: Sequence[Job],
    exact: Collection[str],
    *,
    known: Collection[Job] = (),
) -> Iterator[Finished]:
    """The cells of every job, one after another: resumed after the `exact` hooks, plain elsewhere.

    `known` jobs are passed without being counted. On a GPU a job is begun before the one
    before it is waited for.
    """
    carried = Carried.at_start(prepared)
    overlaps = torch.device(engine.model.cfg.device or "cpu").type == "cuda"
    begun: Callable[[], Finished] | None = None
    for job in jobs:
        before = engine.cost.blocks
        if job in known:
            if job.resumes(exact):
                carried = carry_past(engine, prepared, job, carried)
            continue
        if job.resumes(exact):
            finish, carried = start_cells(engine, prepared, job, carried)
        else:
            finish = partial(list, plain_cells(engine, prepared.workload, job))
        this = partial(_as_finished, job, finish, engine.cost.blocks - before)
        if begun is not None:
            yield begun()
        begun = this
        if not overlaps:
            yield begun()
            begun = None
    if begun is not None:
        yield begun()


def _as_finished(job: Job, finish: Callable[[], list[CellOutput]], blocks: int) -> Finished:
    return Finished(job, finish(), blocks)


def carry(engine: Engine, prepared: Prepared, job: Job, carried: Carried) -> Carried:
    """The unsteered residuals entering the job's first block, from those of the job before it."""

    def side(
        parts: Sequence[Part], residuals: Sequence[Residual | None]
    ) -> tuple[Residual | None, ...]:
        if job.first_block == 0:
            return (None,) * len(parts)
        advanced = []
        for part, known in zip(parts, residuals, strict=True):
            start = known if known is not None and known.block <= job.first_block else None
            n_blocks = job.first_block - (0 if start is None else start.block)
            engine.cost.add(part.batch.tokens, n_blocks)
            advanced.append(advance_part(engine.model, part, start, job.first_block))
        return tuple(advanced)

    return Carried(
        side(prepared.positive, carried.positive), side(prepared.negative, carried.negative)
    )


@dataclass(frozen=True)
class _Run:
    """One job on one workload: what every one of its passes shares."""

    engine: Engine
    workload: Workload
    job: Job

    def positive(self, part: Part, start: Residual | None) -> "_Slices":
        """Readouts and mean label logprobs at `+coefficient`.

        And, where they are asked for, the divergence and logprob at every label, prompt after
        prompt.
        """
        batch = part.batch
        on_cpu, n_texts = batch.labels_on_cpu(), len(batch.rows) // len(batch.prompts)
        n_labels = on_cpu[:, 1:].sum(dim=1).tolist()

        def run(chosen: _Rows) -> tuple[Tensor, ...]:
            readout, residual = self._pass(part, start, chosen, self.engine.n_layers - 1)
            before = before_labels(on_cpu[chosen.on_cpu], batch.tokens.device)
            predictions = residual.flatten(0, 1)[before.to(residual.device)]
            wanted = batch.tokens[chosen.rows].flatten()[before + 1]
            labels = batch.labels_by_row(chosen.rows)[:, 1:]
            if part.final is None:
                logprob = labels_logprob(self.engine.model, predictions, wanted)
                each = readout.repeat_interleave(n_texts, dim=0)
                if not self.workload.with_readouts:
                    each = each[:, :0]
                return each, mean_by_prompt(logprob, labels)
            by_row = torch.split(torch.arange(len(part.final)), n_labels)
            known = torch.cat([by_row[row] for row in chosen.on_cpu.tolist()])
            kl, logprob = labels_kl(
                *(self.engine.model, predictions, wanted),
                lambda at: part.unsteered(self.engine.model, known[at]),
            )
            return readout, mean_by_prompt(logprob, labels), kl, logprob

        return self._in_slices(batch, run, sign=1.0)

    def negative(self, part: Part, start: Residual | None) -> "_Slices":
        """Readouts under `-coefficient`."""
        last_block = hook_layer(self.job.readout)

        def run(chosen: _Rows) -> tuple[Tensor, ...]:
            return self._pass(part, start, chosen, last_block)[:1]

        return self._in_slices(part.batch, run, sign=-1.0)

    def _pass(
        self, part: Part, start: Residual | None, chosen: "_Rows", last_block: int
    ) -> tuple[Float[Tensor, "row d_readout"], Float[Tensor, "row token d_model"]]:
        """Some rows steered: what the readout holds, and the residual after `last_block`."""
        job, batch, rows = self.job, part.batch, chosen.rows
        tokens = batch.tokens[rows]
        mask = batch.steered_mask(self.workload.steered_positions)[rows]
        places = to_device(batch.places(self.workload.position)[chosen.on_cpu], batch.tokens.device)
        add = _addition_by_row(chosen.direction, chosen.coefficients, mask)
        hooks: list[tuple[str, HookFunction]] = []
        if start is not None:
            start = replace(start, values=start.values[rows.to(start.values.device)])
        if not job.starts_after or start is None:
            hooks.append((job.hook_name, add))
        else:
            start = replace(start, values=add(start.values))
        found: dict[str, Tensor] = {}
        if start is not None and job.readout == resid_post(start.block - 1):
            found[job.readout] = at_position(start.values, places)
        else:
            hooks.append(reading_hook(found, job.readout, places))
        if start is not None and start.block == last_block + 1:
            return found[job.readout], start.values
        first_block = 0 if start is None else start.block
        self.engine.cost.add(tokens, last_block + 1 - first_block)
        residual = run_from(
            self.engine.model,
            tokens,
            batch.attention_mask[rows],
            start=start,
            prefix=None if part.prefix is None else part.prefix.at(rows, first_block),
            fwd_hooks=hooks,
            last_hook=resid_post(last_block),
            is_padded=not bool(batch.is_whole[chosen.on_cpu].all()),
        )
        return found[job.readout], residual

    def _in_slices(
        self, batch: Batch, run: Callable[["_Rows"], tuple[Tensor, ...]], *, sign: float
    ) -> "_Slices":
        """`run` over all (coefficient, prompt), some at a time, in that order."""
        n_prompts, coefficients = len(batch.prompts), self.job.coefficients
        device = batch.tokens.device
        on_cpu = torch.arange(n_prompts).repeat(len(coefficients))
        rows = to_device(on_cpu, device)
        # A half-precision direction must not round the coefficients.
        wide = torch.promote_types(self.job.direction.dtype, torch.float32)
        exact = torch.tensor(coefficients, dtype=wide)
        signed = to_device((sign * exact).repeat_interleave(n_prompts), device)
        direction = to_device(self.job.direction, device)
        size = self.engine.batch_size or rows_per_pass(self.engine.model, batch.tokens.shape[1])

        def begin(part: slice) -> tuple[Arriving, ...]:
            found = run(_Rows(on_cpu[part], rows[part], signed[part], direction))
            return tuple(to_host(values) for values in found)

        return in_slices(len(rows), size, begin)


@dataclass(frozen=True)
class _Rows:
    """Rows of a part, on the CPU and on the model's device; what is added to each of them there."""

    on_cpu: Int[Tensor, " row"]
    rows: Int[Tensor, " row"]
    coefficients: Float[Tensor, " row"]
    direction: Float[Tensor, " d_model"]


_Slices: TypeAlias = list[tuple[Arriving, ...]]
"""What each pass of a part gave, on its way to the CPU."""


def _joined(slices: _Slices, n: int) -> list[Tensor]:
    """The passes' outputs, waited for: each of them in a row for each of `n` coefficients."""
    arrived = [[one.arrived() for one in of] for of in slices]
    joined = (torch.cat(parts) for parts in zip(*arrived, strict=True))
    return [values.reshape(n, len(values) // n, *values.shape[1:]) for values in joined]


def _addition_by_row(
    direction: Float[Tensor, " d_model"],
    coefficients: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
) -> HookFunction:
    """Adds `coefficients[row] * direction` at the masked tokens of each row, out of place."""

    def add(activation: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        sizes = coefficients.masked_fill(coefficients.abs() > LARGEST_PUSH, torch.nan)
        step = (sizes[:, None] * direction.to(sizes)).to(activation)
        return activation + mask.to(activation)[..., None] * step[:, None]

    return add
