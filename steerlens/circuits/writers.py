"""Who writes the direction: the difference at a hook, taken apart into its writers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.circuits.components import (
    Component,
    Prompts,
    check_additive,
    check_complete,
    components,
    contract,
    cotangents,
    make_prompts,
    writer_hooks,
)
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import InputError, whole
from steerlens.models.hooks import (
    HookFunction,
    Layers,
    hook_layer,
    hooked,
    resid_post,
    resolve_hooks,
)
from steerlens.models.loading import HookedModel, inference, provenance
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, part_of, silent
from steerlens.stats import bootstrap_intervals
from steerlens.tables import WRITER_COLUMNS, WRITER_POSITION_COLUMNS, Row, to_frame

ROWS = 16
"""Prompts in one pass: their writes at every layer are held at once."""


@dataclass(frozen=True)
class Writers:
    """`table` has a row a component (`WRITER_COLUMNS`), `positions` one a component and token.

    `table.attrs` holds the hook, the `projection` that the contributions add up to, and the
    `residual` they leave, as a share of it.
    """

    table: pd.DataFrame
    positions: pd.DataFrame

    def __repr__(self) -> str:
        return f"Writers({self.table.attrs['hook_name']}, {len(self.table)} components)"


def find_writers(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layer: Layers,
    n_positions: int = 8,
    n_bootstrap: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Writers:
    """What each component wrote of the pairs' difference along the frozen direction at one hook.

    The difference `h_pos - h_neg` at the output of block L, at the position the direction was
    fitted at, is the sum of what the embedding, every head (through its `W_O`) and every MLP up to
    L wrote there, so its projection on the direction is the sum of theirs (residual units; mean
    over pairs, with 95% bootstrap intervals over pairs). `positions` has the same at the last
    `n_positions` tokens, counted from the end of each prompt. Attention and other biases are the
    same on both sides and cancel.

    Raises `InputError` when the components do not add up to the projection within 1e-3 of the
    sum of their sizes (blocks that norm or scale what they add; in 16-bit dtypes 4 epsilon), the
    hook is not a block output, or `n_positions` is below 1;
    `InputError` when the hook has no direction; `InputError` when it was fitted on a model
    with other weight processing; `InputError` on `n_bootstrap` below 2 or a negative seed; and as
    `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import find_writers
        >>> writers = find_writers(model, pairs, directions, layer=2)
        >>> writers
        Writers(blocks.2.hook_resid_post, 16 components)
        >>> float(writers.table.share.sum())
        1.00
    """
    if n_positions < 1:
        raise InputError(f"n_positions must be at least 1, got {n_positions}")
    n_bootstrap, seed = whole("n_bootstrap", n_bootstrap, 2), whole("seed", seed, 0)
    check_additive(model)
    name = _block_output(model, layer)
    if name not in directions:
        raise InputError(f"there is no direction at {name}; fit one there")
    check_processing(model, directions)
    tokenized = tokenize_pairs(model, pairs)
    n_layers = hook_layer(name) + 1
    parts = components(model, n_layers=n_layers)
    shortest = min(len(p.prompt) for p in (*tokenized.positive, *tokenized.negative))
    offsets = list(range(-min(n_positions, shortest), 0))
    tell, n = progress or silent, len(pairs)
    sides = [
        _side(
            *(model, side, directions[name], offsets, directions.position, n_layers),
            part_of(tell, "writers: prompts", before=before, total=2 * n),
        )
        for before, side in ((0, tokenized.positive), (n, tokenized.negative))
    ]
    written = sides[0][0] - sides[1][0]
    total = float((sides[0][1] - sides[1][1]).mean())
    by_pair = written[:, :, -1]
    mean = by_pair.mean(dim=1)
    scale = float(mean.abs().sum())
    what = f"the projection at {name}"
    check_complete(float(mean.sum()), total, scale, what, model.cfg.dtype)
    attrs = {
        "hook_name": name,
        "position": directions.position,
        "n_pairs": len(pairs),
        "projection": total,
        "residual": abs(float(mean.sum()) - total) / abs(total) if total else float("nan"),
        "provenance": provenance(model).to_dict(),
        "seed": seed,
        "n_bootstrap": n_bootstrap,
    }
    return Writers(
        _table(parts, by_pair, total, attrs, n_bootstrap=n_bootstrap, seed=seed),
        _positions(parts, written[:, :, :-1], offsets, attrs),
    )


def component_fields(component: Component) -> dict[str, Any]:
    """The columns that say which component a row is about."""
    return {"component": component.kind, "layer": component.layer, "head": component.head}


def _block_output(model: HookedModel, layer: Layers) -> str:
    names = resolve_hooks(model, layer)
    if len(names) != 1 or names[0] != resid_post(hook_layer(names[0])):
        raise InputError(f"give one block output, as in layer=12; got {', '.join(names)}")
    return names[0]


def _side(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    direction: Float[Tensor, " d_model"],
    offsets: Sequence[int],
    position: int,
    n_layers: int,
    progress: Progress,
) -> tuple[Float[Tensor, "component pair offset"], Float[Tensor, " pair"]]:
    """Projected writes at each offset from the end, then at `position`; and the total there."""
    written, wholes = [], []
    progress("prompts", 0, len(prompts))
    for start in range(0, len(prompts), ROWS):
        some = list(prompts[start : start + ROWS])
        batch = make_prompts(model, some)
        at = torch.tensor([prompt.index(position) for prompt in some], device=batch.last.device)
        columns = batch.last[:, None] + 1 + torch.tensor([offsets], device=batch.last.device)
        columns = torch.cat([columns, at[:, None]], dim=1)
        parts, total = _projected_writes(model, batch, direction, columns, n_layers)
        written.append(parts)
        wholes.append(total[:, -1])
        progress("prompts", min(start + ROWS, len(prompts)), len(prompts))
    return torch.cat(written, dim=1), torch.cat(wholes)


def _projected_writes(
    model: HookedModel,
    batch: Prompts,
    direction: Float[Tensor, " d_model"],
    columns: Int[Tensor, "prompt offset"],
    n_layers: int,
) -> tuple[Float[Tensor, "component prompt offset"], Float[Tensor, "prompt offset"]]:
    kept: dict[str, Tensor] = {}
    rows = torch.arange(len(batch), device=columns.device)[:, None]

    def keeping(name: str) -> tuple[str, HookFunction]:
        def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept[name] = activation[rows, columns].float()

        return name, keep

    names = writer_hooks(model, n_layers=n_layers)
    last = resid_post(n_layers - 1)
    with inference(model), hooked(model, [keeping(name) for name in (*names, last)]):
        model(batch.tokens, stop_at_layer=n_layers, return_type=None)
    unit = direction.to(batch.tokens.device).float()
    against = cotangents(model, unit[None], n_layers=n_layers)
    written = {name: kept[name] for name in names}
    return contract(written, against).cpu(), (kept[last] @ unit).cpu()


def _table(
    parts: Sequence[Component],
    by_pair: Float[Tensor, "component pair"],
    total: float,
    attrs: dict[str, Any],
    *,
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    low, high = bootstrap_intervals(by_pair.double().numpy(), n_resamples=n_bootstrap, seed=seed)
    rows: list[Row] = [
        {
            **component_fields(component),
            "contribution": mean,
            "share": mean / total if total else float("nan"),
            "ci_low": float(low[i]),
            "ci_high": float(high[i]),
        }
        for i, (component, mean) in enumerate(
            zip(parts, by_pair.double().mean(dim=1).tolist(), strict=True)
        )
    ]
    return to_frame(rows, WRITER_COLUMNS, attrs)


def _positions(
    parts: Sequence[Component],
    written: Float[Tensor, "component pair offset"],
    offsets: Sequence[int],
    attrs: dict[str, Any],
) -> pd.DataFrame:
    mean = written.double().mean(dim=1)
    rows: list[Row] = [
        {
            **component_fields(component),
            "position": offset,
            "contribution": float(mean[i, j]),
        }
        for i, component in enumerate(parts)
        for j, offset in enumerate(offsets)
    ]
    return to_frame(rows, WRITER_POSITION_COLUMNS, attrs)
