"""The plain loop: one hooked forward pass of every batch for every cell.

Slow and simple. It measures the unsteered model, and is what the engine is checked against.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.engine.backend import for_hooks
from steerlens.engine.batches import Batch, in_pair_order
from steerlens.engine.capture import by_halves, check_finite, reading_hook, run_to_hooks, stacked
from steerlens.engine.checkpoint import check_unsteered, digest_of
from steerlens.engine.engine import Engine
from steerlens.engine.memory import check_memory
from steerlens.engine.on_disk import OnDisk
from steerlens.engine.tokenization import fingerprint
from steerlens.engine.transfer import to_device
from steerlens.engine.workload import LARGEST_PUSH, Baseline, CellOutput, Job, Workload
from steerlens.errors import ModelError
from steerlens.loss import label_kl, label_logprob, label_logprobs
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import HookFunction, hook_layer, hook_width, hooked, is_head
from steerlens.models.loading import inference
from steerlens.progress import Progress, part_of, silent

_Steering: TypeAlias = Callable[[Batch], list[tuple[str, HookFunction]]]
"""The hooks that steer a batch."""
_UNSTEERED = "unsteered model: prompts"


def run_baseline(engine: Engine, workload: Workload, hook_names: Sequence[str]) -> Baseline:
    """The unsteered model: activations at `hook_names` on both sides, and the labels' logprob.

    Run by the bare model where `hook_names` allow it (see `backend.for_hooks`), as the cells are.
    Costs all blocks on both sides. Pairs in several blocks run one block after another, and their
    activations are kept on disk. The engine's progress is told of the prompts. Raises `ModelError`
    that names the hooks with NaN or inf, or the prompt whose labels have no finite logprob, and as
    `check_memory`, `OnDisk.add` and `check_unsteered`.
    """
    check_memory(engine.model, workload.positive)
    runner = engine.on(for_hooks(engine.model, hook_names, on_cpu=not workload.with_readouts))
    run = _in_blocks if len(workload.blocks) > 1 else baseline_of
    baseline = run(runner, workload, hook_names)
    if engine.checkpoint is not None:
        sides = [
            [fingerprint(batch.prompts) for batch in side]
            for side in (workload.positive, workload.negative)
        ]
        decided = (sides, workload.position, hook_names)
        check_unsteered(engine.checkpoint, decided, [digest_of(baseline)])
    return baseline


def _in_blocks(engine: Engine, workload: Workload, hook_names: Sequence[str]) -> Baseline:
    sides: dict[str, Any] = {n: OnDisk() for n in ("positive", "negative") if getattr(workload, n)}
    total = sum(len(batch.rows) for batch in (*workload.positive, *workload.negative))
    found, logprobs, done = None, list[Tensor](), 0
    for rows in workload.blocks:
        staged = engine.stage(_UNSTEERED, before=done, total=total)
        found = baseline_of(staged, workload.block(rows), hook_names)
        for name, side in sides.items():
            side.add(rows, getattr(found, name))
        logprobs.append(found.logprob)
        done += len(rows) * len(sides)
    assert found is not None
    order = torch.tensor([row for rows in workload.blocks for row in rows]).argsort()
    return replace(found, **sides, logprob=torch.cat(logprobs)[order])


def baseline_of(engine: Engine, workload: Workload, hook_names: Sequence[str]) -> Baseline:
    """`run_baseline` by the very model that is given."""
    model = engine.model
    for batch in (*workload.positive, *workload.negative):
        engine.cost.add(batch.tokens, engine.n_layers)
    n_positive, n_negative = (
        sum(len(batch.rows) for batch in side) for side in (workload.positive, workload.negative)
    )
    total = n_positive + n_negative
    of_positive = part_of(engine.progress, _UNSTEERED, total=total)
    of_negative = part_of(engine.progress, _UNSTEERED, before=n_positive, total=total)
    with inference(model):
        positive, logprob, _ = _run_positive(model, workload, hook_names, _unsteered, of_positive)
        negative = _run_negative(model, workload, hook_names, _unsteered, of_negative)
    check_finite(positive, hook_names)
    check_finite(negative, hook_names)
    check_labels(workload.positive, logprob)
    widths = tuple(hook_width(model, name) if is_head(name) else None for name in hook_names)
    return Baseline(tuple(hook_names), positive, negative, logprob, widths)


def plain_cells(engine: Engine, workload: Workload, job: Job) -> list[CellOutput]:
    """The cells of a job by whole forward passes, one for each coefficient, in order.

    Positive prompts run with `+coefficient * direction` added at the hook, negative prompts with
    `-coefficient * direction`, both read at the readout. A vector whose coefficient has no opposite
    is applied to both with the same.
    """
    model, readouts = engine.model, [job.readout]
    for batch in workload.positive:
        # A divergence takes the unsteered model's logits too.
        n_passes = len(job.coefficients) * (1 + workload.with_kl)
        engine.cost.add(batch.tokens, engine.n_layers * n_passes)
    for batch in workload.negative:
        engine.cost.add(batch.tokens, (hook_layer(job.readout) + 1) * len(job.coefficients))
    cells = []
    sign = -1 if job.vector is None or job.vector.is_signed else 1
    for coefficient in job.coefficients:
        up, down = (_steering(job, workload, c) for c in (coefficient, sign * coefficient))
        with inference(model):
            positive, logprob, at_labels = _run_positive(model, workload, readouts, up)
            negative = _run_negative(model, workload, readouts, down)
        cells.append(CellOutput(coefficient, positive[0], negative[0], logprob, *at_labels))
    return cells


def by_token(
    batches: Sequence[Batch], values: Sequence[Float[Tensor, "n _"]]
) -> Float[Tensor, "n pair token"]:
    """Values at the labels of one batch after another, as rows of tokens: NaN where no label is."""
    width = max(batch.tokens.shape[1] for batch in batches)
    spread = []
    for batch, given in zip(batches, values, strict=True):
        rows = torch.full((len(given), len(batch.prompts), width), torch.nan, dtype=given.dtype)
        labels = torch.zeros((len(batch.prompts), width), dtype=torch.bool)
        labels[:, : batch.tokens.shape[1]] = batch.label_mask().cpu()
        # An undefined divergence is no padding: it must not be left out of a mean.
        rows[:, labels] = torch.where(given.isnan(), torch.inf, given)
        spread.append(rows)
    return in_pair_order(batches, spread)


def check_labels(batches: Sequence[Batch], logprob: Float[Tensor, " pair"]) -> None:
    """Raise `ModelError` that names a prompt whose labels have no finite logprob."""
    undefined = (~logprob.isfinite()).nonzero().flatten().tolist()
    if undefined:
        prompts = {row: p for b in batches for row, p in zip(b.rows, b.prompts, strict=True)}
        raise ModelError(
            f"the labels of the {prompts[undefined[0]].where} have logprob "
            f"{float(logprob[undefined[0]])} without steering ({len(undefined)} such prompts); "
            "leave out texts that the model rules out, or load it in float32"
        )


def _run_positive(
    model: HookedModel,
    workload: Workload,
    hook_names: Sequence[str],
    steering: _Steering,
    progress: Progress = silent,
) -> tuple[
    Float[Tensor, "hook pair d_model"], Float[Tensor, " pair"], list[Float[Tensor, "pair token"]]
]:
    """Readouts, logprobs, and, of a workload with KL, divergence and logprob at every label."""
    if not workload.positive:
        return _nothing(model, hook_names), torch.zeros(0), []

    def run(batch: Batch) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        places = to_device(batch.places(workload.position), batch.tokens.device)
        readers = [reading_hook(found, name, places) for name in hook_names]
        labels = batch.label_mask()
        with hooked(model, [*steering(batch), *readers]):
            logits = model(batch.tokens, return_type="logits", **batch.forward_kwargs)
        logprob = label_logprob(logits, batch.tokens, labels)
        means = stacked(found, hook_names).cpu(), logprob.cpu()
        if not workload.with_kl:
            return means
        unsteered = model(batch.tokens, return_type="logits", **batch.forward_kwargs)
        by_label = label_logprobs(logits, batch.tokens, labels)
        return *means, label_kl(logits, unsteered, labels).cpu(), by_label.cpu()

    done = by_halves([(batch,) for batch in workload.positive], run, progress=progress)
    batches = [batch for (batch,), _ in done]
    activations, logprob, *at_labels = zip(*(values for _, values in done), strict=True)
    return (
        in_pair_order(batches, activations),
        in_pair_order(batches, [of[None] for of in logprob])[0],
        [by_token(batches, [of[None] for of in values])[0] for values in at_labels],
    )


def _run_negative(
    model: HookedModel,
    workload: Workload,
    hook_names: Sequence[str],
    steering: _Steering,
    progress: Progress = silent,
) -> Float[Tensor, "hook pair d_model"]:
    if not workload.negative:
        return _nothing(model, hook_names)

    def run(batch: Batch) -> Tensor:
        return run_to_hooks(
            model,
            batch,
            hook_names,
            places=batch.places(workload.position),
            fwd_hooks=steering(batch),
        ).cpu()

    done = by_halves([(batch,) for batch in workload.negative], run, progress=progress)
    return in_pair_order([batch for (batch,), _ in done], [values for _, values in done])


def _nothing(model: HookedModel, hook_names: Sequence[str]) -> Float[Tensor, "hook 0 width"]:
    """The activations of no pairs, stacked as those of some are."""
    return torch.zeros((len(hook_names), 0, max(hook_width(model, name) for name in hook_names)))


def _unsteered(batch: Batch) -> list[tuple[str, HookFunction]]:  # noqa: ARG001
    return []


def _steering(job: Job, workload: Workload, coefficient: float) -> _Steering:
    """The hooks of a job at one coefficient."""

    def hooks(batch: Batch) -> list[tuple[str, HookFunction]]:
        mask = batch.steered_mask(workload.steered_positions)
        if job.vector is not None:
            return job.vector.fwd_hooks(coefficient, mask=mask)
        return [(job.hook_name, _addition(job.direction, coefficient, mask))]

    return hooks if coefficient else _unsteered


def _addition(
    direction: Float[Tensor, " d_model"], coefficient: float, mask: Bool[Tensor, "row token"]
) -> HookFunction:
    """Adds `coefficient * direction` at the masked tokens, out of place."""

    def add(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (TransformerLens's signature)
        dtype = torch.promote_types(direction.dtype, activation.dtype)
        wide = direction.to(activation.device, torch.promote_types(dtype, torch.float32))
        size = coefficient if abs(coefficient) <= LARGEST_PUSH else torch.nan
        moved = activation + (size * wide).to(activation)
        return torch.where(mask.to(activation.device)[..., None], moved, activation)

    return add
