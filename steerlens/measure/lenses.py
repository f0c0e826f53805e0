"""What a direction says: the tokens that it promotes, the texts on which it reads high and low."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.prompts import Prompt
from steerlens.engine.batches import Batch, make_batches
from steerlens.engine.capture import by_halves, check_residual
from steerlens.engine.tokenization import TokenizedPrompt, fingerprint, raw_tokens, token_texts
from steerlens.errors import InputError, ModelError
from steerlens.measure.tokens import named_prompts
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import hook_layer, hooked, keeping, resid_post
from steerlens.models.identity import provenance
from steerlens.models.loading import inference
from steerlens.models.weight_processing import check_processing
from steerlens.progress import Progress, by_default, part_of
from steerlens.stats import max_rank_p, rank_p
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, Draws, Whole, checked

ROWS = 16
"""Directions whose logits are held at once."""
SIDES = {"promoted": 1, "suppressed": -1}


@checked
def vocabulary(
    model: HookedModel,
    vector: Mapping[str, Tensor],
    *,
    jacobian: Any = None,
    n_tokens: Count = 10,
    n_random: Draws = 199,
    seed: Whole = 0,
) -> pd.DataFrame:
    """The tokens that each direction promotes and suppresses most (columns `vocabulary`).

    A logit lens, or a Jacobian one, on directions.

    By TransformerLens's `logit_readout`, the model's final norm and unembedding, of the direction
    alone: half of what it gives for d less what it gives for -d, so that biases cancel, and less
    its mean over the vocabulary, which no prediction depends on. By a Jacobian lens the direction
    is first taken to the last block's output. A direction may steer and say nothing here. So the
    largest logit is ranked among those of random directions, alone (`p_value`) and as the best of
    all hooks (`p_layers`). Tokens beyond the tokenizer's vocabulary are left out.

    Args:
        model: A `TransformerBridge` of TransformerLens 4.3 or later.
        vector: A steering vector, directions, or hook name -> `d_model` numbers of any norm.
        jacobian: A `JacobianLens` of this model (`transformer_lens.tools.analysis`), or the file,
            model name or hub repository that its `from_pretrained` takes; None for the logit lens
            alone. It knows block outputs alone.
        n_tokens: Rows of each side.
        n_random: Random directions, the same at every hook.
        seed: Of these.

    Raises:
        InputError: TransformerLens is older; a direction is not `d_model` numbers other than 0,
            was fitted on a model with other weight processing, or is where the lens has no matrix;
            the lens cannot be read, or is another model's.
        ModelError: The model has no final norm and unembedding that the lens could go through.

    Examples:
        >>> table = sl.measure.vocabulary(model, vector, n_tokens=3, n_random=19)
        >>> table.groupby(["lens", "side"]).token.count().to_dict()
        {('logit', 'promoted'): 3, ('logit', 'suppressed'): 3}
    """
    check_processing(model, vector)
    units = _unit_rows(model, vector)
    lens = None if jacobian is None else _jacobian_lens(model, jacobian)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_random, int(model.cfg.d_model), generator=generator)
    rows: list[Row] = []
    for name in ["logit"] if lens is None else ["logit", "jacobian"]:
        takes = [_transport(lens if name == "jacobian" else None, h, model) for h in units]
        logits = [
            _logits(model, take(unit[None]))[0]
            for take, unit in zip(takes, units.values(), strict=True)
        ]
        drawn = np.stack([_at_random(model, take(random)) for take in takes], axis=1)
        for i, (side, sign) in enumerate(SIDES.items()):
            sizes = [(sign * of_hook).topk(min(n_tokens, len(of_hook))) for of_hook in logits]
            largest = [float(values[0]) for values, _ in sizes]
            p_layers = max_rank_p(np.array(largest), drawn[..., i])
            for k, hook in enumerate(units):
                of_hook = {
                    "hook_name": hook,
                    "layer": hook_layer(hook),
                    "lens": name,
                    "side": side,
                    "random_logit": sign * float(drawn[:, k, i].mean()),
                    "p_value": rank_p(largest[k], drawn[:, k, i]),
                    "p_layers": float(p_layers[k]),
                }
                rows += [
                    {**of_hook, "rank": rank, **token, "logit": sign * value}
                    for rank, (token, value) in enumerate(
                        zip(
                            _tokens(model, sizes[k].indices.tolist()),
                            sizes[k].values.tolist(),
                            strict=True,
                        ),
                        start=1,
                    )
                ]
    settings = {"n_random": n_random, "seed": seed, "jacobian": None if lens is None else str(lens)}
    attrs = {"settings": settings, "model": provenance(model).to_dict()}
    return to_frame(rows, "vocabulary", attrs)


def _unit_rows(
    model: HookedModel, vector: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, " d_model"]]:
    """The directions by hook, of norm 1."""
    width = int(model.cfg.d_model)
    rows = {name: row.detach().double().cpu() for name, row in vector.items()}
    for name, row in rows.items():
        if row.shape != (width,) or not 0 < float(row.norm()) < float("inf"):
            raise InputError(
                f"expected {width} numbers at {name}, finite and not all 0, as the residual "
                f"stream has; got shape {tuple(row.shape)} and norm {float(row.norm()):.4g}"
            )
    if not rows:
        raise InputError("expected at least one direction, got none")
    return {name: (row / row.norm()).float() for name, row in rows.items()}


def _tools() -> Any:
    """TransformerLens's analysis tools, where they have both lenses."""
    try:
        from transformer_lens.tools import analysis

        _ = analysis.logit_readout, analysis.JacobianLens
    except (ImportError, AttributeError) as error:
        raise InputError(
            "the logit lens and the Jacobian lens are those of TransformerLens 4.3; this is older "
            "and has none, so update it to read a direction"
        ) from error
    return analysis


def _jacobian_lens(model: HookedModel, given: Any) -> Any:
    """A lens of this model, given or to be read."""
    kind = _tools().JacobianLens
    try:
        if isinstance(given, kind):
            return given.validate_model(model)
        return kind.from_pretrained(str(given), model=model)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"expected a JacobianLens of this model, or a file or name of one, got {given!r:.80}: "
            f"{error}"
        ) from error


def _transport(lens: Any, hook: str, model: HookedModel) -> Callable[[Tensor], Tensor]:
    """What takes directions from a hook to the last block's output; nothing without a lens."""
    layer, last = hook_layer(hook), int(model.cfg.n_layers) - 1
    if lens is None:
        return lambda rows: rows
    if hook != resid_post(layer) or (layer != last and layer not in lens.jacobians):
        known = ", ".join(map(str, [*lens.source_layers, last]))
        raise InputError(
            f"the Jacobian lens knows the outputs of blocks {known}, not {hook}; leave that hook "
            "out with .at(...), or give no Jacobian lens"
        )
    if layer == last:
        return lambda rows: rows
    return partial(lens.transport, layer=layer)


def _logits(model: HookedModel, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row token"]:
    """What each direction alone adds to the logits, their mean over the vocabulary taken off."""
    # At the size at which a norm's epsilon does not count.
    sized = rows / rows.norm(dim=-1, keepdim=True) * rows.shape[-1] ** 0.5
    readout = _tools().logit_readout
    try:
        with inference(model):
            read = readout(model, torch.cat([sized, -sized]), chunk_size=2 * ROWS)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"TransformerLens cannot read directions of this model: {error}"
        ) from error
    above, below = read.values.float().cpu()[:, : len(model.tokenizer)].chunk(2)
    added: Tensor = (above - below) / 2
    return added - added.mean(dim=-1, keepdim=True)


def _at_random(
    model: HookedModel, rows: Float[Tensor, "draw d_model"]
) -> Float[np.ndarray, "draw side"]:
    """The largest logit up and down of each row, both as sizes."""
    logits = (_logits(model, part) for part in torch.split(rows, ROWS))
    ends = [torch.stack([part.amax(dim=-1), -part.amin(dim=-1)], dim=-1) for part in logits]
    return torch.cat(ends).double().numpy()


def _tokens(model: HookedModel, ids: Sequence[int]) -> list[Row]:
    """What tables say of tokens."""
    words = zip(ids, token_texts(model, ids), raw_tokens(model, ids), strict=True)
    return [{"token_id": token, "token": text, "raw_token": raw} for token, text, raw in words]


@checked
def readings(
    model: HookedModel,
    vector: Mapping[str, Tensor],
    prompts: Sequence[Prompt | TokenizedPrompt],
    *,
    n_prompts: Count = 3,
    ids: Sequence[str] | None = None,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The prompts on which each direction reads highest and lowest, by token (columns `readings`).

    A token reads `h . direction`, in residual units, unsteered at the direction's own hook; a
    prompt the mean of its tokens but the first, whose state is the same in every prompt.

    Args:
        model: The model that the directions are of.
        vector: A steering vector, directions, or hook name -> `d_model` numbers of any norm.
        prompts: Two tokens or more each.
        n_prompts: How many of either end; all prompts once where there are fewer than twice that.
        ids: Their names, numbers from 1 by default.
        batch_size: Prompts in one pass, what the device can use by default.
        progress: Told of the prompts.

    Raises:
        InputError: As `vocabulary` of the directions; there are no prompts, or one has one token.

    Examples:
        >>> table = sl.measure.readings(model, vector, ["the river", "I was cold"], n_prompts=1)
        >>> table.groupby("side", sort=False).prompt.first().size
        2
    """
    check_processing(model, vector)
    units = _unit_rows(model, vector)
    names, tokenized = named_prompts(model, prompts, ids)
    if short := [name for name, one in zip(names, tokenized, strict=True) if len(one) < 2]:
        raise InputError(f"prompt {short[0]!r} has one token, whose state says nothing of it")

    def run(batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with hooked(model, keeping(found, units, lambda values: values)):
            model(batch.tokens, return_type=None, **batch.forward_kwargs)
        for hook, values in found.items():
            check_residual(values, hook)
        return {hook: values.float().cpu() @ units[hook] for hook, values in found.items()}

    read: dict[str, dict[int, Tensor]] = {hook: {} for hook in units}
    tell = part_of(by_default(progress), "readings: prompts")
    with inference(model):
        batches = [(batch,) for batch in make_batches(model, tokenized, batch_size)]
        for (batch,), found in by_halves(batches, run, progress=tell):
            for hook, values in found.items():
                for i, row in enumerate(batch.rows):
                    read[hook][row] = values[i][batch.attention_mask[i].cpu()]
    rows: list[Row] = []
    for hook, of_prompts in read.items():
        means = {row: float(values[1:].mean()) for row, values in of_prompts.items()}
        if not all(map(math.isfinite, means.values())):
            raise ModelError(f"NaN or inf in the activations at {hook}; try dtype float32")
        order = sorted(means, key=lambda row: (-means[row], row))
        n = len(order)
        ends = {"highest": order[: min(n_prompts, n - n // 2)]}
        ends["lowest"] = order[::-1][: min(n_prompts, n // 2)]
        for side, picked in ends.items():
            for rank, row in enumerate(picked, start=1):
                tokens = tokenized[row].ids
                of_prompt = {
                    "hook_name": hook,
                    "layer": hook_layer(hook),
                    "side": side,
                    "rank": rank,
                    "prompt": names[row],
                    "mean_projection": means[row],
                }
                numbers = of_prompts[row].tolist()
                rows += [
                    {**of_prompt, "position": i, **token, "projection": value}
                    for i, (token, value) in enumerate(
                        zip(_tokens(model, tokens), numbers, strict=True)
                    )
                ]
    attrs = {"text": fingerprint(tokenized), "model": provenance(model).to_dict()}
    attrs["settings"] = {"n_prompts": n_prompts, "n_read": len(names)}
    return to_frame(rows, "readings", attrs)
