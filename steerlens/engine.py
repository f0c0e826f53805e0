"""Run cells: every hook at many coefficients, for about what the arithmetic costs.

The unsteered residual of all rows is carried along from hook to hook; a cell runs the blocks after
its hook only, on several coefficients at once; only label positions reach the unembedding. Where
this does not give a model's own numbers, the plain loop is used, with a warning.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens import plain
from steerlens.activations import reading_hook
from steerlens.errors import SteerlensError
from steerlens.hooks import HookFunction, hook_layer, resid_post
from steerlens.loss import mean_by_prompt
from steerlens.models import HookedModel, inference
from steerlens.passes import Residual, advance, labels_logprob, n_skippable, run_from
from steerlens.plain import Baseline, CellOutput, Workload
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


def run_cells(
    model: HookedModel,
    workload: Workload,
    jobs: Sequence[Job],
    *,
    rows_per_pass: int,
    cost: Cost,
) -> Iterator[list[CellOutput]]:
    """The cells of every job, job by job and in the order of its coefficients.

    `rows_per_pass` prompts go through the model at once; out of memory halves that for the rest of
    the batch. `cost` is added to. Jobs should come in layer order, as each one starts from where
    the last one stood. Every job is checked on two prompts a side, the shortest and the longest:
    resumed at coefficient 0 it has to give the unsteered model, and the first job at its smallest
    coefficient what the plain loop gives. A job that differs by more than 1e-4 (of a readout's
    norm, or nats; 4 times the rounding of a half-precision dtype) runs by the plain loop, with a
    warning.
    """
    check = _Check.of(model, workload, jobs)
    carried, is_warned = _Carried.at_start(workload), False
    for i, job in enumerate(jobs):
        check, reason = check.run(job, at_coefficient=i == 0)
        if reason is None:
            cells, carried = _fast_cells(model, workload, job, carried, rows_per_pass, cost)
            yield cells
            continue
        if not is_warned:
            warnings.warn(
                f"resuming after {job.hook_name} does not reproduce this model ({reason}); such "
                "cells run as whole forward passes, which is slower",
                RuntimeWarning,
                stacklevel=2,
            )
            is_warned = True
        yield _plain_cells(model, workload, job, cost)


@dataclass(frozen=True)
class _Carried:
    """The unsteered residual of every batch, where the last job stood."""

    positive: tuple[Residual | None, ...]
    negative: tuple[Residual | None, ...]

    @classmethod
    def at_start(cls, workload: Workload) -> "_Carried":
        return cls((None,) * len(workload.positive), (None,) * len(workload.negative))


def _fast_cells(
    model: HookedModel,
    workload: Workload,
    job: Job,
    carried: _Carried,
    rows_per_pass: int,
    cost: Cost,
) -> tuple[list[CellOutput], _Carried]:
    """The cells of `job`, and the residuals for the job after it."""
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
    return cells, _Carried(positive, negative)


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


@dataclass(frozen=True)
class _Check:
    """Two prompts a side, the shortest and the longest, by the plain loop and by the engine."""

    model: HookedModel
    workload: Workload
    unsteered: Baseline
    carried: _Carried

    @classmethod
    def of(cls, model: HookedModel, workload: Workload, jobs: Sequence[Job]) -> "_Check":
        small = replace(
            workload, positive=_ends(workload.positive), negative=_ends(workload.negative)
        )
        readouts = tuple(dict.fromkeys(job.readout for job in jobs))
        return cls(
            model, small, plain.run_baseline(model, small, readouts), _Carried.at_start(small)
        )

    def run(self, job: Job, *, at_coefficient: bool) -> tuple["_Check", str | None]:
        """Why `job` cannot be resumed (None if it can), and the check for the job after it.

        The resumed pass at coefficient 0 has to give the unsteered model; `at_coefficient` also
        compares the smallest coefficient with the plain loop.
        """
        if n_skippable(self.model) != int(self.model.cfg.n_layers):
            return self, "its blocks are not one list"
        expected = [self.unsteered.cell(job.readout)]
        if at_coefficient:
            smallest = replace(job, coefficients=(min(job.coefficients, key=abs),))
            expected += _plain_cells(self.model, self.workload, smallest, Cost())
        coefficients = tuple(cell.coefficient for cell in expected)
        try:
            found, carried = _fast_cells(
                self.model,
                self.workload,
                replace(job, coefficients=coefficients),
                self.carried,
                len(coefficients) * 2,
                Cost(),
            )
        except SteerlensError:
            raise
        except Exception as error:  # whatever a model's own code raises when its blocks are skipped
            return self, f"{type(error).__name__}: {error}"
        # Four times the rounding of a half-precision dtype; rounding of float32 never comes near.
        tolerance = max(1e-4, 4 * torch.finfo(self.model.cfg.dtype).eps)
        reasons = (_difference(f, e, tolerance) for f, e in zip(found, expected, strict=True))
        return replace(self, carried=carried), next((r for r in reasons if r is not None), None)


def _difference(found: CellOutput, expected: CellOutput, tolerance: float) -> str | None:
    """What differs by more than `tolerance`: of a readout's norm, or of a logprob in nats."""
    for name in ("positive", "negative", "logprob"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        scale = theirs.norm(dim=-1).clamp(min=1e-6) if theirs.ndim == 2 else torch.tensor(1.0)
        gap = (ours - theirs).norm(dim=-1) if theirs.ndim == 2 else (ours - theirs).abs()
        off = gap / scale
        is_undefined = ~theirs.isfinite().all(dim=-1) if theirs.ndim == 2 else ~theirs.isfinite()
        # Not `off > tolerance`: that is false for NaN, which is a difference where none belongs.
        if not bool((is_undefined | (off <= tolerance)).all()):
            return f"{name} differs by {float(off.nan_to_num(torch.inf).max()):.2g}"
    return None


def _ends(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The shortest and the longest prompt of length-sorted batches, each on its own."""
    first, last = batches[0], batches[-1]
    shortest = _one_row(first, 0)
    is_one = first is last and len(first.prompts) == 1
    return (shortest,) if is_one else (shortest, _one_row(last, len(last.prompts) - 1))


def _one_row(batch: Batch, row: int) -> Batch:
    keep = slice(row, row + 1)
    return Batch(
        batch.rows[keep], batch.prompts[keep], batch.tokens[keep], batch.attention_mask[keep]
    )


def _plain_cells(model: HookedModel, workload: Workload, job: Job, cost: Cost) -> list[CellOutput]:
    n_layers = int(model.cfg.n_layers)
    for batch in workload.positive:
        cost.add(batch.tokens, n_layers * len(job.coefficients))
    for batch in workload.negative:
        cost.add(batch.tokens, (hook_layer(job.readout) + 1) * len(job.coefficients))
    return list(
        plain.run_cells(
            model,
            workload,
            hook_name=job.hook_name,
            direction=job.direction,
            coefficients=job.coefficients,
            readout=job.readout,
        )
    )
