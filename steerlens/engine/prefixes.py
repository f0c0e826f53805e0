"""What the cells of one workload share, computed once: prefixes and unsteered residuals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.engine.batches import Batch, make_split_batches
from steerlens.engine.capture import by_halves
from steerlens.engine.memory import in_slices
from steerlens.engine.resume import Prefix, Residual, advance, run_prefix, takes_cache
from steerlens.engine.workload import Baseline, Cost, Workload
from steerlens.models.loading import HookedModel, inference


@dataclass(frozen=True)
class Part:
    """The tokens of a batch that its cells have to run, and what is known of the others.

    `prefix` holds the keys and values of the tokens before those of `batch`, `final` the unsteered
    output of the last block where a label is predicted; both where needed only.
    """

    batch: Batch
    prefix: Prefix | None = None
    final: Float[Tensor, "label d_model"] | None = None


@dataclass(frozen=True)
class Prepared:
    """A workload ready for its cells (see `prepare`), and its baseline at every readout."""

    workload: Workload
    unsteered: Baseline
    positive: tuple[Part, ...]
    negative: tuple[Part, ...]
    batch_size: int | None


def prepare(
    model: HookedModel,
    workload: Workload,
    unsteered: Baseline,
    *,
    batch_size: int | None,
    reuse_prefix: bool,
    cost: Cost,
) -> Prepared:
    """Run once what all cells share: keys and values before the first steered token.

    They are kept with `reuse_prefix` where the last prompt token or the continuation is steered,
    and take two vectors a token, head and block. `cost` is added to.
    """
    with inference(model):
        positive = _parts(model, workload, workload.positive, batch_size, reuse_prefix, cost)
        if workload.with_kl:
            positive = tuple(_with_final(model, part, cost) for part in positive)
        negative: tuple[Part, ...] = ()
        # Negative prompts have no continuation, so there is nothing to steer on them.
        if workload.steered_positions != "continuation":
            negative = _parts(model, workload, workload.negative, batch_size, reuse_prefix, cost)
    return Prepared(workload, unsteered, positive, negative, batch_size)


def _parts(
    model: HookedModel,
    workload: Workload,
    batches: Sequence[Batch],
    batch_size: int | None,
    reuse_prefix: bool,
    cost: Cost,
) -> tuple[Part, ...]:
    prompts = {row: p for b in batches for row, p in zip(b.rows, b.prompts, strict=True)}
    is_split = (
        reuse_prefix
        and workload.steered_positions in ("continuation", "last")
        and takes_cache(model)
        and all(len(p.prompt) > 1 for p in prompts.values())
        and all(p.index(workload.position) == len(p.prompt) - 1 for p in prompts.values())
    )
    if not is_split:
        return tuple(Part(batch) for batch in batches)
    in_order = [prompts[row] for row in sorted(prompts)]
    found = by_halves(
        make_split_batches(model, in_order, batch_size),
        lambda head, tail: run_prefix(model, head),  # noqa: ARG005
    )
    for (head, _), _ in found:
        cost.add(head.tokens, int(model.cfg.n_layers))
    return tuple(Part(tail, prefix) for (_, tail), prefix in found)


def _with_final(model: HookedModel, part: Part, cost: Cost) -> Part:
    n_layers = int(model.cfg.n_layers)
    cost.add(part.batch.tokens, n_layers)
    final = advance_part(model, part, None, n_layers).values
    is_label = part.batch.label_mask()[:, 1:].to(final.device)
    return replace(part, final=final[:, :-1][is_label])


def advance_part(model: HookedModel, part: Part, start: Residual | None, block: int) -> Residual:
    """The unsteered residual of a part entering `block`, computed on from `start`.

    Out of memory halves the rows of a pass.
    """
    batch, prefix = part.batch, part.prefix
    if start is not None and start.block == block:
        return start

    def run(of: slice) -> Tensor:
        rows = torch.arange(of.start, of.stop, device=batch.tokens.device)
        residual = advance(
            model,
            batch.tokens[of],
            batch.attention_mask[of],
            start=None if start is None else replace(start, values=start.values[of]),
            prefix=None if prefix is None else prefix.at(rows, start.block if start else 0),
            block=block,
            is_padded=not bool(batch.is_whole[of].all()),
        )
        return residual.values

    found = in_slices(len(batch.prompts), len(batch.prompts), run)
    return Residual(block, found[0] if len(found) == 1 else torch.cat(found))
