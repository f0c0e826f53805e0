"""Who writes the direction: the difference at a hook, taken apart into its writers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.circuits.components import (
    check_additive,
    check_complete,
    component_rows,
    components,
    contract,
    cotangents,
    mean_intervals,
    writer_hooks,
)
from steerlens.circuits.interventions import capture
from steerlens.circuits.prompts import counting, make_prompts, row_slices
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions.directions import Directions
from steerlens.engine.positions import one_token
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import InputError
from steerlens.models import HookedModel, Layers, hook_layer, provenance, resid_post, resolve_hooks
from steerlens.models.identity import check_fitted_on
from steerlens.progress import Progress
from steerlens.stats import N_BOOTSTRAP
from steerlens.tables import to_frame
from steerlens.validation import Count, Draws, Whole, checked


@dataclass(frozen=True, eq=False)
class Writers:
    """`table` has a row a component (columns `writers`), `positions` one a component and token.

    `table.attrs` holds the hook, the `projection` that the contributions add up to, and the
    `residual` they leave, as a share of it.
    """

    table: pd.DataFrame
    positions: pd.DataFrame

    def __repr__(self) -> str:
        return f"Writers({self.table.attrs['hook_name']}, {len(self.table)} components)"


@checked
def find_writers(
    model: HookedModel,
    pairs: ContrastivePairs,
    directions: Directions,
    *,
    layer: Layers,
    n_positions: Count = 8,
    n_bootstrap: Draws = N_BOOTSTRAP,
    seed: Whole = 0,
    progress: Progress | None = None,
) -> Writers:
    """What each component wrote of the pairs' difference along the frozen direction at one hook.

    The difference `h_pos - h_neg` at the output of block L, at the position the direction was
    fitted at, is the sum of what the embedding, every head (through its `W_O`) and every MLP up to
    L wrote there, so its projection on the direction is the sum of theirs (residual units; mean
    over pairs, with 95% intervals over their groups). Attention and other biases are the same on
    both sides and cancel.

    Args:
        model: The model, unsteered.
        pairs: What is taken apart.
        directions: Fitted on a model with the same weight processing.
        layer: One block output, as in `layer=12`.
        n_positions: The last so many tokens of each prompt are in `positions`.
        n_bootstrap: Resamples, 2 or more.
        seed: Of the resamples.
        progress: Told of the prompts.

    Raises:
        InputError: The components do not add up to the projection within 1e-3 of the sum of their
            sizes (blocks that norm or scale what they add; in 16-bit dtypes 4 epsilon), the hook is
            no block output or has no direction, the direction was fitted on several tokens, or a
            count is too small; and as `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import find_writers
        >>> writers = find_writers(model, pairs, directions, layer=2)
        >>> writers
        Writers(blocks.2.hook_resid_post, 16 components)
        >>> float(writers.table.share.sum())
        1.00
    """
    drawing = {"seed": seed, "n_bootstrap": n_bootstrap}
    check_additive(model)
    position = one_token(directions.position, "writes")
    name = _block_output(model, layer)
    if name not in directions:
        raise InputError(f"there is no direction at {name}; fit one there")
    check_fitted_on(model, directions)
    n_fitted_on = pairs.warn_of_fitted(directions.pair_hashes)
    tokenized = tokenize_pairs(model, pairs)
    shortest = min(len(p.prompt) for p in (*tokenized.positive, *tokenized.negative))
    n_read = min(n_positions, shortest)
    count = counting(progress, "writers: prompts", 2 * len(pairs))
    (written, whole), (subtracted, whole_negative) = (
        _projected_writes(model, side, name, directions[name], position, n_read, count)
        for side in (tokenized.positive, tokenized.negative)
    )
    written = written - subtracted
    parts = components(model, n_layers=hook_layer(name) + 1)
    total, by_pair = float((whole - whole_negative).mean()), written[:, :, -1]
    means = by_pair.mean(dim=1)
    explained, scale = float(means.sum()), float(means.abs().sum())
    check_complete(explained, total, scale, f"the projection at {name}", model.cfg.dtype)
    attrs = {
        "hook_name": name,
        "position": directions.position,
        "n_pairs": len(pairs),
        "n_pairs_fitted_on": n_fitted_on,
        "n_groups": len(set(pairs.groups)),
        "projection": total,
        "residual": abs(explained - total) / abs(total) if total else float("nan"),
        "provenance": provenance(model).to_dict(),
        **drawing,
    }
    contribution, low, high = mean_intervals(by_pair, groups=pairs.groups, **drawing)
    share = contribution / (total or math.nan)
    rows = component_rows(parts, contribution=contribution, share=share, ci_low=low, ci_high=high)
    positions = component_rows(
        [part for part in parts for _ in range(n_read)],
        position=[*range(-n_read, 0)] * len(parts),
        contribution=written[:, :, :-1].double().mean(dim=1).flatten(),
    )
    return Writers(to_frame(rows, "writers", attrs), to_frame(positions, "positions", attrs))


def _block_output(model: HookedModel, layer: Layers) -> str:
    names = resolve_hooks(model, layer)
    if len(names) != 1 or names[0] != resid_post(hook_layer(names[0])):
        raise InputError(f"give one block output, as in layer=12; got {', '.join(names)}")
    return names[0]


def _projected_writes(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    hook_name: str,
    direction: Float[Tensor, " d_model"],
    position: int,
    n_positions: int,
    count: Callable[[int], None],
) -> tuple[Float[Tensor, "component pair offset"], Float[Tensor, " pair"]]:
    """Writes at the last `n_positions` tokens, then at `position`; the sum there."""
    n_layers = hook_layer(hook_name) + 1
    names = [*writer_hooks(model, n_layers=n_layers), hook_name]
    unit = direction.to(model.cfg.device).float()
    against = cotangents(model, unit[None], n_layers=n_layers)
    written, totals = [], []
    for rows in row_slices(len(prompts)):
        batch = make_prompts(model, prompts[rows])
        fitted = torch.tensor([[prompt.index(position)] for prompt in prompts[rows]])
        from_end = torch.arange(1 - n_positions, 1).to(batch.last)
        columns = torch.cat([batch.last[:, None] + from_end, fitted.to(batch.last)], dim=1)
        read = partial(_at_columns, columns)
        values = capture(model, batch.tokens, names, read=read, n_layers=n_layers)
        totals.append((values.pop(hook_name)[:, -1] @ unit).cpu())
        written.append(contract(values, against).cpu())
        count(len(batch))
    return torch.cat(written, dim=1), torch.cat(totals)


def _at_columns(
    columns: Int[Tensor, "prompt column"], values: Float[Tensor, "prompt token *rest"]
) -> Float[Tensor, "prompt column *rest"]:
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return values[rows, columns].float()
