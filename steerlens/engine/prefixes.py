"""What the cells of one workload share: prefixes, prompts of two continuations, residuals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.engine.batches import Batch, in_row_order, make_split_batches
from steerlens.engine.branches import make_branches, with_one_prompt
from steerlens.engine.capture import by_halves
from steerlens.engine.engine import Engine
from steerlens.engine.memory import in_slices
from steerlens.engine.positions import steers_late
from steerlens.engine.resume import (
    Prefix,
    Residual,
    advance,
    distinct_rows,
    run_prefix,
    vocabulary_logprobs,
)
from steerlens.engine.workload import Baseline, Workload
from steerlens.models.hooked_model import HookedModel, is_on_one_side, takes_cache
from steerlens.models.loading import inference

KEPT_LOGPROBS = 2**25
"""Of so many tokens at all labels of a workload the unsteered logprobs are kept (128 MiB); of more
they are computed again for each cell."""


@dataclass(frozen=True)
class Part:
    """The tokens of a batch that its cells have to run, and what is known of the others.

    `prefix` holds the keys and values of the tokens before those of `batch`, `final` the unsteered
    output of the last block where a label is predicted; both where needed only. `logprobs` are
    those of all tokens there, where they are few enough to be kept (`KEPT_LOGPROBS`).
    """

    batch: Batch
    prefix: Prefix | None = None
    final: Float[Tensor, "label d_model"] | None = None
    logprobs: Float[Tensor, "label vocab"] | None = None

    def unsteered(
        self, model: HookedModel, labels: Int[Tensor, " some"]
    ) -> Float[Tensor, "some vocab"]:
        """Log-probabilities (nats) of all tokens at some of the labels."""
        kept, final = self.logprobs, self.final
        if kept is not None:
            return kept[labels.to(kept.device)]
        assert final is not None
        return vocabulary_logprobs(model, final[labels.to(final.device)])


@dataclass(frozen=True)
class Prepared:
    """A workload ready for its cells (see `prepare`), and its baseline at every readout."""

    workload: Workload
    unsteered: Baseline
    positive: tuple[Part, ...]
    negative: tuple[Part, ...]


def prepare(
    engine: Engine, workload: Workload, unsteered: Baseline, *, reuse_prefix: bool
) -> Prepared:
    """Run once what all cells share: keys and values before the first steered token.

    They are kept with `reuse_prefix` where the last prompt token or the continuation is steered,
    and take two vectors a token, head and block. With it two continuations of one prompt are put
    into one row where every token is steered (see `with_one_prompt`), of several prompts that begin
    alike where nothing is read.
    """
    with inference(engine.model):
        positive = _parts(engine, workload, workload.positive, reuse_prefix)
        if workload.with_kl:
            keeps = sum(int(part.batch.label_mask().sum()) for part in positive)
            keeps *= int(engine.model.cfg.d_vocab)
            positive = tuple(
                _with_final(engine, part, with_logprobs=keeps <= KEPT_LOGPROBS) for part in positive
            )
        negative: tuple[Part, ...] = ()
        # Of these nothing is measured but what is read.
        if not workload.reads_unsteered:
            negative = _parts(engine, workload, workload.negative, reuse_prefix)
    return Prepared(workload, unsteered, positive, negative)


def _parts(
    engine: Engine, workload: Workload, batches: Sequence[Batch], reuse_prefix: bool
) -> tuple[Part, ...]:
    in_order = in_row_order(batches)
    if reuse_prefix and (twins := with_one_prompt(engine.model, workload, batches)):
        # What is read of a row is at its first prompt.
        how = {"may_share": not workload.with_readouts}
        joined = make_branches(engine.model, in_order, twins, engine.batch_size, **how)
        return tuple(Part(batch) for batch in joined)
    is_split = (
        reuse_prefix
        and steers_late(workload.steered_positions)
        and takes_cache(engine.model)
        # Kept keys are rotated as in the whole text.
        and all(is_on_one_side(engine.model, len(p.prompt) - 1, len(p)) for p in in_order)
        and all(len(p.prompt) > 1 for p in in_order)
        and all(p.label_tokens[0] >= len(p.prompt) for p in in_order if p.continuation)
        and all(min(p.places(workload.position)) >= len(p.prompt) - 1 for p in in_order)
    )
    if not is_split:
        return tuple(Part(batch) for batch in batches)
    split = by_halves(
        make_split_batches(engine.model, in_order, engine.batch_size),
        lambda head, tail: run_prefix(engine.model, head),  # noqa: ARG005
    )
    for (head, _), _ in split:
        engine.cost.add(head.tokens[distinct_rows(head)[0]], engine.n_layers)
    return tuple(Part(tail, prefix) for (_, tail), prefix in split)


def _with_final(engine: Engine, part: Part, *, with_logprobs: bool) -> Part:
    engine.cost.add(part.batch.tokens, engine.n_layers)
    final = advance_part(engine.model, part, None, engine.n_layers).values
    is_label = part.batch.label_mask()[:, 1:].to(final.device)
    outputs = final[:, :-1][is_label]
    logprobs = vocabulary_logprobs(engine.model, outputs) if with_logprobs else None
    return replace(part, final=outputs, logprobs=logprobs)


def advance_part(model: HookedModel, part: Part, start: Residual | None, block: int) -> Residual:
    """The unsteered residual of a part entering `block`, computed on from `start`.

    Out of memory halves the rows of a pass.
    """
    batch, prefix = part.batch, part.prefix
    if start is not None and start.block == block:
        return start

    def run(part_rows: slice) -> Tensor:
        rows = torch.arange(part_rows.start, part_rows.stop, device=batch.tokens.device)
        residual = advance(
            model,
            batch.tokens[part_rows],
            batch.attention_mask[part_rows],
            start=None if start is None else replace(start, values=start.values[part_rows]),
            prefix=None if prefix is None else prefix.at(rows, start.block if start else 0),
            block=block,
            is_padded=not bool(batch.is_whole[part_rows].all()),
        )
        return residual.values

    residuals = in_slices(len(batch.prompts), len(batch.prompts), run)
    return Residual(block, residuals[0] if len(residuals) == 1 else torch.cat(residuals))
