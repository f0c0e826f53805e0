"""What a steered model writes: greedy continuations at several coefficients, as a table."""

from collections.abc import Sequence

import pandas as pd
import torch

from steerlens.arguments import whole
from steerlens.damage import OneHook, named_prompts, one_hook, strengths_at
from steerlens.data import Prompt
from steerlens.directions import Directions
from steerlens.hooks import Layers, hook_layer
from steerlens.models import HookedModel, inference, provenance
from steerlens.progress import Progress, silent
from steerlens.steering import Coefficient, SteeringVector, decoded, generate_tokens, steer
from steerlens.tables import GENERATION_COLUMNS, Row, to_frame
from steerlens.tokens import TokenizedPrompt, fingerprint


def generation_table(
    model: HookedModel,
    prompts: Sequence[Prompt | TokenizedPrompt],
    along: Directions | SteeringVector,
    *,
    layer: Layers | None = None,
    coefficients: Sequence[Coefficient],
    max_new_tokens: int = 40,
    ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The greedy continuation of every prompt at every coefficient (`GENERATION_COLUMNS`).

    As `generate`, with every token steered at one hook, `layer`. A chat goes on after its assistant
    header, or after what its last assistant message opens with; a continuation of the prompt's own
    is left out. Where the context has no room for `max_new_tokens` the text is shorter (`end` is
    "context"), and where the steered model overflows there is none ("overflow"). `ids` name the
    prompts (numbers from 1 by default). Raises as `one_hook` and `tokenize_prompt`, `SweepError`
    without prompts or coefficients, and as `generate`.

    Examples:
        >>> table = sl.generation_table(
        ...     model, ["the river was"], vector, coefficients=[-4, 0, 4], max_new_tokens=5
        ... )
        >>> table.coefficient.tolist()
        [-4.0, 0.0, 4.0]
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
    at = one_hook(model, along, layer)
    strengths = strengths_at(at, coefficients)
    names, tokenized = named_prompts(model, prompts, ids)
    rows: list[Row] = []
    tell, total = progress or silent, len(names) * len(strengths)
    tell("continuations", 0, total)
    for name, prompt in zip(names, tokenized, strict=True):
        for coefficient, amount in strengths.items():
            rows.append(
                {
                    "prompt": name,
                    "hook_name": at.hook_name,
                    "layer": hook_layer(at.hook_name),
                    "coefficient": amount,
                    **_continued(model, prompt, at, coefficient, max_new_tokens),
                }
            )
            tell("continuations", len(rows), total)
    attrs = {
        "settings": {"max_new_tokens": max_new_tokens},
        "text": fingerprint(tokenized),
        "model": provenance(model).to_dict(),
    }
    return to_frame(rows, GENERATION_COLUMNS, attrs)


def _continued(
    model: HookedModel,
    prompt: TokenizedPrompt,
    at: OneHook,
    coefficient: Coefficient,
    max_new_tokens: int,
) -> Row:
    """Text, length and end of one continuation."""
    n_ctx = getattr(model.cfg, "n_ctx", None)
    room = max_new_tokens if n_ctx is None else min(max_new_tokens, n_ctx - len(prompt.prompt))
    if room < 1 <= max_new_tokens:
        return {"text": "", "n_tokens": 0, "end": "context"}
    (ids,) = generate_tokens(model, [prompt], at.vector, coefficient, max_new_tokens=room)
    if not _is_finite(model, [*prompt.prompt, *ids], at, coefficient):
        return {"text": "", "n_tokens": 0, "end": "overflow"}
    is_full = room < max_new_tokens
    end = "stop" if len(ids) < room else "context" if is_full else "length"
    return {"text": decoded(model, ids), "n_tokens": len(ids), "end": end}


def _is_finite(
    model: HookedModel, ids: Sequence[int], at: OneHook, coefficient: Coefficient
) -> bool:
    """Whether the steered model still has a prediction after every token of a text."""
    tokens = torch.tensor([list(ids)], device=model.cfg.device)
    with inference(model), steer(model, at.vector, coefficient):
        logits = model(tokens, return_type="logits")
    # The largest, and so NaN and inf: a model may rule single tokens out with -inf.
    return bool(logits.amax(dim=-1).isfinite().all())
