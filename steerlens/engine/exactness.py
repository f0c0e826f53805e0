"""See that cells may be resumed after a hook: that it gives what whole passes give."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch, in_pair_order
from steerlens.engine.branches import with_one_prompt
from steerlens.engine.capture import at_position, run_to_hooks
from steerlens.engine.cells import Carried, carry, fast_cells
from steerlens.engine.engine import Engine
from steerlens.engine.memory import is_out_of_memory
from steerlens.engine.plain_loop import baseline_of, plain_cells
from steerlens.engine.positions import steers_late
from steerlens.engine.prefixes import Prepared, prepare
from steerlens.engine.resume import n_skippable
from steerlens.engine.workload import Baseline, CellOutput, Job, Workload
from steerlens.errors import SteerlensError
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap, relative_gap
from steerlens.progress import silent


def not_exact(
    runner: Engine, workload: Workload, jobs: Sequence[Job]
) -> tuple[bool, dict[str, str]]:
    """Whether prefixes and prompts can be shared, and hook name -> why it cannot be resumed after.

    On two prompts a side, the shortest and the longest. Resumed at coefficient 0 a hook has to give
    the unsteered model, and the first one at its smallest coefficient what the plain loop gives, to
    1e-4 (of a readout's norm, or nats; 8 times the rounding of a half-precision dtype). Where all
    hooks are block outputs, only the first is resumed to the end, and after each of them the blocks
    up to the next, with all before them standing aside, have to give what is there in a whole pass.
    Where they do not, where a hook is inside a block, and where two continuations are in one row,
    every hook is resumed to the end.
    """
    if not jobs:
        return False, {}
    shares = bool(with_one_prompt(runner.model, workload, workload.positive))
    few = replace(
        workload,
        positive=_twins_at_ends(workload.positive) if shares else _ends(workload.positive),
        negative=_ends(workload.negative),
        with_kl=False,
    )
    readouts = tuple(dict.fromkeys(job.readout for job in jobs))
    baseline = baseline_of(replace(runner, progress=silent), few, readouts)
    checking = replace(runner.stage("checks: hooks"), batch_size=None)
    how = checking, few, baseline, sorted(jobs, key=lambda job: job.first_block)
    may_reuse = shares or steers_late(workload.steered_positions)
    for reuse_prefix in [True, False] if may_reuse else [False]:
        # The steps look at whole prompts, row by row.
        is_branched = shares and reuse_prefix
        is_exact = not is_branched and _steps_agree(*how, reuse_prefix=reuse_prefix)
        reasons = {} if is_exact else _reasons(*how, reuse_prefix=reuse_prefix)
        if not reasons:
            break
    checking.progress("hooks", len(jobs), len(jobs))
    return reuse_prefix, reasons


def _steps_agree(
    engine: Engine,
    workload: Workload,
    unsteered: Baseline,
    jobs: Sequence[Job],
    *,
    reuse_prefix: bool,
) -> bool:
    """Whether the first hook can be resumed after, and every step from hook to hook is right.

    `jobs` are in the order of layers. Hooks inside blocks are none of these steps.
    """
    if not all(job.starts_after for job in jobs):
        return False
    alone = replace(engine, progress=silent)
    if _reasons(alone, workload, unsteered, jobs[:1], reuse_prefix=reuse_prefix):
        return False
    end = replace(jobs[-1], hook_name=resid_post(engine.n_layers - 1))
    steps = list({job.hook_name: job for job in (*jobs, end)}.values())
    names = [job.hook_name for job in steps]
    prepared = prepare(engine, workload, unsteered, reuse_prefix=reuse_prefix)
    carried = Carried.at_start(prepared)
    sides = [
        (parts, _at_last_tokens(engine, batches, names) if parts else None)
        for parts, batches in (
            (prepared.positive, workload.positive),
            (prepared.negative, workload.negative),
        )
    ]
    tolerance = allowed_gap(engine.model.cfg.dtype)
    for i, job in enumerate(steps):
        engine.progress("hooks", min(i, len(jobs) - 1), len(jobs))
        try:
            with inference(engine.model):
                carried = carry(engine, prepared, job, carried)
        except Exception as error:  # whatever a model's own code raises when its blocks are skipped
            if isinstance(error, SteerlensError) or is_out_of_memory(error):
                raise
            return False
        residuals_by_side = (carried.positive, carried.negative)
        for (parts, expected), residuals in zip(sides, residuals_by_side, strict=True):
            if expected is None:
                continue
            batches = [part.batch for part in parts]
            found = [
                at_position(residual.values, _last_columns(batch)).cpu()[None]
                for batch, residual in zip(batches, residuals, strict=True)
                if residual is not None  # as it never is after a block
            ]
            theirs = expected[i]
            off = relative_gap(in_pair_order(batches, found)[0], theirs)
            if not bool((~theirs.isfinite().all(dim=-1) | (off <= tolerance)).all()):
                return False
    return True


def _at_last_tokens(
    engine: Engine, batches: Sequence[Batch], hook_names: Sequence[str]
) -> Float[Tensor, "hook prompt d_model"]:
    """What whole passes have at the last token of each prompt."""
    with inference(engine.model):
        found = [
            run_to_hooks(engine.model, batch, hook_names, places=_last_columns(batch)).cpu()
            for batch in batches
        ]
    for batch in batches:
        engine.cost.add(batch.tokens, engine.n_layers)
    return in_pair_order(batches, found)


def _last_columns(batch: Batch) -> Int[Tensor, " prompt"]:
    """The column of each prompt's last token."""
    mask = batch.attention_mask
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)


def _reasons(
    engine: Engine,
    workload: Workload,
    unsteered: Baseline,
    jobs: Sequence[Job],
    *,
    reuse_prefix: bool,
) -> dict[str, str]:
    """Hook name -> why it cannot be resumed after; empty when all can."""
    if n_skippable(engine.model) != engine.n_layers:
        return {job.hook_name: "its blocks are not one list" for job in jobs}
    # Eight times the rounding of a half-precision dtype; rounding of float32 never comes near.
    tolerance = allowed_gap(engine.model.cfg.dtype)
    reasons: dict[str, str] = {}
    prepared: Prepared | None = None
    carried: Carried | None = None
    for i, job in enumerate(jobs):
        engine.progress("hooks", i, len(jobs))
        expected = [unsteered.cell(job.readout)]
        if i == 0:
            smallest = replace(job, coefficients=(min(job.coefficients, key=abs),))
            expected += plain_cells(engine, workload, smallest)
        probe = replace(job, coefficients=tuple(cell.coefficient for cell in expected))
        try:
            if prepared is None:
                prepared = prepare(engine, workload, unsteered, reuse_prefix=reuse_prefix)
            carried = carried or Carried.at_start(prepared)
            resumed, carried = fast_cells(engine, prepared, probe, carried)
        except SteerlensError:
            raise
        except Exception as error:  # whatever a model's own code raises when its blocks are skipped
            if is_out_of_memory(error):
                raise
            reasons[job.hook_name] = f"{type(error).__name__}: {error}"
            continue
        differences = (
            _difference(ours, theirs, tolerance)
            for ours, theirs in zip(resumed, expected, strict=True)
        )
        reason = next((text for text in differences if text is not None), None)
        if reason is not None:
            reasons[job.hook_name] = reason
    return reasons


def _difference(resumed: CellOutput, expected: CellOutput, tolerance: float) -> str | None:
    """What differs by more than `tolerance`: of a readout's norm, or of a logprob in nats."""
    for name in ("positive", "negative", "logprob"):
        ours, theirs = getattr(resumed, name), getattr(expected, name)
        theirs = theirs[..., : ours.shape[-1]]  # of readouts where nothing is read
        scale = theirs.norm(dim=-1).clamp(min=1e-6) if theirs.ndim == 2 else torch.tensor(1.0)
        gap = (ours - theirs).norm(dim=-1) if theirs.ndim == 2 else (ours - theirs).abs()
        off = gap / scale
        is_undefined = ~theirs.isfinite().all(dim=-1) if theirs.ndim == 2 else ~theirs.isfinite()
        # Not `off > tolerance`: that is false for NaN, which is a difference where none belongs.
        if not bool((is_undefined | (off <= tolerance)).all()):
            return f"{name} differs by {float(off.nan_to_num(torch.inf).max()):.2g}"
    return None


def _ends(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The shortest and the longest prompt of length-sorted batches, as padded as they are."""
    if not batches:
        return ()
    first, last = batches[0], batches[-1]
    return (first.ends(),) if first is last else (first.row(0), last.row(len(last.prompts) - 1))


def _twins_at_ends(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Two rows of the shortest and two of the longest prompt, as padded as they are."""
    rows = [batch.row(i) for batch in batches for i in range(len(batch.prompts))]
    first, last = (
        [i for i, row in enumerate(rows) if row.prompts[0].prompt == end.prompts[0].prompt]
        for end in (rows[0], rows[-1])
    )
    return tuple(rows[i] for i in sorted({*first[:2], *last[-2:]}))
