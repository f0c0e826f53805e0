"""Token by token: which tokens lose logprob under a push, and what a steered model writes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Prompt, unicode_text
from steerlens.directions.directions import Directions
from steerlens.engine.batches import Batch, make_batches
from steerlens.engine.capture import by_halves
from steerlens.engine.labels import labelled_pairs
from steerlens.engine.positions import Position, as_position
from steerlens.engine.tokenization import (
    SteeredPositions,
    TokenizedPairs,
    TokenizedPrompt,
    check_steered_positions,
    fingerprint,
    raw_tokens,
    token_texts,
    tokenize_prompt,
)
from steerlens.errors import InputError
from steerlens.loss import label_kl, label_logprobs
from steerlens.measure.preparation import check_directions, check_width
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.models.hooks import (
    HookFunction,
    Layers,
    hook_layer,
    hooked,
    keeping,
    readout_hook,
    resolve_hooks,
)
from steerlens.models.identity import check_fitted_on, provenance
from steerlens.models.loading import inference
from steerlens.progress import Progress, by_default, part_of
from steerlens.steering import (
    Coefficient,
    Generated,
    Steerable,
    SteeringVector,
    decoded,
    generate_texts,
    steer,
    steps,
)
from steerlens.steering.apply import Step, step_hooks
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, Whole, checked

SIDES = {"positive": 1, "negative": -1}
"""Each side of a pair, and the sign of the coefficient that it runs with."""


@dataclass(frozen=True)
class OneHook:
    """What is added at one hook, and where and along what its effect is read.

    `position` is the token that the direction was fitted at, None where it is not one or not known.
    """

    hook_name: str
    vector: Steerable | Mapping[str, Tensor]
    readout: str
    direction: Float[Tensor, " d_model"]
    position: int | None

    def steps(self, coefficient: Coefficient, sign: int) -> tuple[Step, ...]:
        """What is done at `sign` times the coefficient. Raises `InputError` as `steps`."""
        acts = tuple(replace(s, amount=sign * s.amount) for s in steps(self.vector, coefficient))
        for act in acts:
            act.operator.check(act.amount)
        return acts

    def amount(self, coefficient: Coefficient) -> float:
        """The coefficient as the tables have it: in residual units with `Add`."""
        acts = self.steps(coefficient, 1)
        return acts[0].amount if acts else 0.0


def one_hook(
    model: HookedModel, along: Directions | SteeringVector, layer: Layers | None
) -> OneHook:
    """The part of directions or a vector at the one hook that `layer` names (all by default).

    Directions are read at `readout_hook`, along its own direction, as in a sweep. A vector has no
    direction there, so it is read at its own hook, behind the addition.

    Raises:
        InputError: More than one hook, or one without a direction or of another width than the
            model; what is given was fitted on a model with other weight processing.
        HookError: As `resolve_hooks`.
    """
    names = along.hook_names if layer is None else resolve_hooks(model, layer)
    if len(names) != 1:
        raise InputError(f"expected one hook, got {len(names)}; name one with layer=")
    check_fitted_on(model, along)
    (name,) = names
    if isinstance(along, SteeringVector):
        vector: Steerable | Mapping[str, Tensor] = along.at(name)
        readout, told = name, along.origin.position
        position: Position | None = None
        with suppress(InputError):  # "unknown", or another tool's word
            position = as_position(told)
    else:
        readout = readout_hook(name, int(model.cfg.n_layers))
        check_directions(along, [name, readout])
        vector, position = {name: along[name]}, along.position
    check_width(model, along, readout)
    at = position if isinstance(position, int) else None
    return OneHook(name, vector, readout, along[readout], at)


@checked
def token_damage(
    model: HookedModel,
    prompts: ContrastivePairs | Sequence[Prompt | TokenizedPrompt],
    along: Directions | SteeringVector,
    *,
    layer: Layers | None = None,
    coefficients: Sequence[Coefficient],
    steered_positions: SteeredPositions = "all",
    ids: Sequence[str] | None = None,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Every token's logprob and projection, unsteered and steered (columns `tokens`).

    `damage_nats = logprob - steered logprob` of a token after those before it, in nats: over the
    label tokens of a positive prompt its mean is that prompt's share of a sweep's degradation.
    Pairs have their default labels; for others give `study.tokens.positive`. It and the KL
    divergence are NaN at the first token, which nothing predicts, and where the steered model
    overflows. Projections are `h . direction`, in residual units, at the readout hook and along its
    frozen direction (see `readout_hook`), a vector's at its own hook: of the pairs, positive minus
    negative at the token that is read, their mean is a sweep's `projection`.

    Args:
        model: The model.
        prompts: Pairs, whose positive prompts run with `+coefficient` and negative ones with
            `-coefficient`; or any prompts, which run with `+coefficient`.
        along: What is added: directions, or a vector without a condition.
        layer: The one hook at which it is (see `resolve_hooks`). Default: the only one.
        coefficients: As `steer` takes them.
        steered_positions: As of `Study`.
        ids: Names of the prompts. Default: those of the pairs, or numbers from 1.
        batch_size: Prompts a forward pass. Default: what the device can use.
        progress: Told of the prompts. Default: bars in a terminal or a notebook.

    Raises:
        InputError: More than one hook, or one without a direction; no prompts or coefficients, or a
            coefficient without a meaning; names that are not one a prompt; prompts without tokens;
            steered positions that reach no label; a prompt without the token that is read; another
            width or weight processing than the model's; a condition.
        HookError: `layer` names no hook of the model.
        ModelError: The model has no tokenizer that goes with it.

    Examples:
        >>> table = sl.token_damage(model, ["the river was"], vector, coefficients=[4])
        >>> table.token.tolist()
        ['<s>', 'the', 'river', 'was']
        >>> table.damage_nats.isna().tolist()  # nothing predicts the first
        [True, False, False, False]
    """
    at = one_hook(model, along, layer)
    if getattr(at.vector, "condition", None) is not None:
        raise InputError(
            "which tokens a vector with a condition steers is decided as it runs; leave out the "
            "prompts that it would not steer, and give it without its condition"
        )
    strengths = strengths_at(at, coefficients)
    fitted_on = {}
    if isinstance(prompts, ContrastivePairs):
        hashes = (along.origin if isinstance(along, SteeringVector) else along).pair_hashes
        fitted_on["n_pairs_fitted_on"] = prompts.warn_of_fitted(hashes)
        tokenized = labelled_pairs(model, prompts)
        names, _ = named_prompts(model, tokenized.positive, ids or [pair.id for pair in prompts])
        sides = {"positive": tokenized.positive, "negative": tokenized.negative}
    else:
        names, alone = named_prompts(model, prompts, ids)
        sides = {"positive": tuple(alone)}
    first = next(iter(sides.values()))
    check_steered_positions(steered_positions, TokenizedPairs(tuple(first), ()))
    rows: dict[tuple[str, int], list[Row]] = {}
    for i, (side, of_side) in enumerate(sides.items()):
        before, total = i * len(names), len(sides) * len(names)
        tell = part_of(by_default(progress), "tokens: prompts", before=before, total=total)
        acts = [(amount, at.steps(c, SIDES[side])) for c, amount in strengths.items()]

        def run(batch: Batch, acts: Any = acts) -> list[list[Row]]:
            return _rows(model, batch, at, acts, steered_positions)

        with inference(model):
            batches = [(batch,) for batch in make_batches(model, of_side, batch_size)]
            for (batch,), found in by_halves(batches, run, progress=tell):
                for row, of_prompt in zip(batch.rows, found, strict=True):
                    named = {
                        "prompt": names[row],
                        "side": side,
                        "hook_name": at.hook_name,
                        "layer": hook_layer(at.hook_name),
                        "readout_hook": at.readout,
                    }
                    rows[side, row] = [{**named, **of} for of in of_prompt]
    attrs = {
        **fitted_on,
        "settings": {"steered_positions": steered_positions, "position": at.position},
        "text": {side: fingerprint(of_side) for side, of_side in sides.items()},
        "model": provenance(model).to_dict(),
    }
    ordered = (rows[side, i] for i in range(len(names)) for side in sides)
    return to_frame([row for of in ordered for row in of], "tokens", attrs)


def strengths_at(at: OneHook, coefficients: Iterable[Coefficient]) -> dict[Coefficient, float]:
    """Each coefficient, and as the tables have it (see `OneHook.amount`); without repeats.

    Raises `InputError` when there is none, and on one without a meaning here.
    """
    strengths = {c: at.amount(c) for c in coefficients}
    if not strengths:
        raise InputError("expected at least one coefficient, got none")
    return strengths


def named_prompts(
    model: HookedModel,
    prompts: Sequence[Prompt | TokenizedPrompt],
    ids: Sequence[str] | None,
) -> tuple[list[str], list[TokenizedPrompt]]:
    """A name for each prompt, its number from 1 unless `ids` has one, and its tokens.

    Raises `InputError` when there are none, `ids` are not one a prompt, or an id is not Unicode
    text.
    """
    if not prompts:
        raise InputError(f"expected a list of prompts, got {prompts!r:.80}")
    given = [str(i) for i in range(1, len(prompts) + 1)] if ids is None else list(ids)
    names = [unicode_text(name, where="ids") for name in given]
    if len(set(names)) != len(prompts):
        raise InputError(f"expected {len(prompts)} different ids, one a prompt, got {names}")
    tokenized = [
        prompt
        if isinstance(prompt, TokenizedPrompt)
        else tokenize_prompt(model, prompt, where=f"prompt {name!r}")
        for name, prompt in zip(names, prompts, strict=True)
    ]
    return names, tokenized


def _see(
    model: HookedModel, batch: Batch, at: OneHook, fwd_hooks: Sequence[tuple[str, HookFunction]]
) -> tuple[Float[Tensor, "prompt token vocab"], Float[Tensor, "prompt token"]]:
    """One pass over a batch: the logits, and every token's projection at the readout."""
    found: dict[str, Tensor] = {}

    def read(activation: Tensor) -> Tensor:
        if activation.ndim != 3:
            raise InputError(
                f"hook {at.readout} holds a tensor of shape {tuple(activation.shape)}; expected "
                "[prompt, token, d_model]"
            )
        return activation.double().cpu() @ at.direction.double().cpu()

    with hooked(model, [*fwd_hooks, *keeping(found, [at.readout], read)]):
        logits = model(batch.tokens, return_type="logits", **batch.forward_kwargs)
    return logits, found[at.readout]


def _rows(
    model: HookedModel,
    batch: Batch,
    at: OneHook,
    acts: Sequence[tuple[float, tuple[Step, ...]]],
    positions: SteeredPositions,
) -> list[list[Row]]:
    """The rows of each prompt of a batch: one coefficient after another, token by token."""
    mask, predicted = batch.steered_mask(positions), batch.predicted_mask()
    real, labels = batch.attention_mask.cpu(), batch.labels_on_cpu()
    is_read = torch.zeros_like(real)
    if at.position is not None:
        is_read[torch.arange(len(real)), batch.places(at.position)] = True
    unsteered = _see(model, batch, at, [])
    rows: list[list[Row]] = [[] for _ in batch.prompts]
    for amount, steps_at in acts:
        steered = _see(model, batch, at, step_hooks(steps_at, mask=mask))
        # Prompt by prompt, as a divergence takes as much memory as all logits.
        for i, (prompt, of_prompt) in enumerate(zip(batch.prompts, rows, strict=True)):
            one, tokens = predicted[i : i + 1], batch.tokens[i : i + 1]
            logits, steered_logits = unsteered[0][i : i + 1], steered[0][i : i + 1]
            logprob, steered_logprob, kl = (
                torch.full(real[i].shape, torch.nan, dtype=torch.float64).masked_scatter_(
                    one[0].cpu(), values.double().cpu()
                )
                for values in (
                    label_logprobs(logits, tokens, one),
                    label_logprobs(steered_logits, tokens, one),
                    label_kl(steered_logits, logits, one),
                )
            )
            ids = [*prompt.prompt, *prompt.continuation]
            measured = {
                "is_read": is_read[i],
                "is_steered": mask[i].cpu(),
                "is_label": labels[i],
                "projection": unsteered[1][i],
                "steered_projection": steered[1][i],
                "logprob_nats": logprob,
                "steered_logprob_nats": steered_logprob,
                "damage_nats": logprob - steered_logprob,
                "kl_nats": kl,
            }
            columns = {
                "coefficient": amount,
                "position": range(len(prompt)),
                "token_id": ids,
                "token": token_texts(model, ids),
                "raw_token": raw_tokens(model, ids),
                **{name: values[real[i]].tolist() for name, values in measured.items()},
            }
            of_prompt += cast(list[Row], pd.DataFrame(columns).to_dict("records"))
    return rows


@checked
def generation_table(
    model: HookedModel,
    prompts: Sequence[Prompt | TokenizedPrompt],
    along: Directions | SteeringVector,
    *,
    layer: Layers | None = None,
    coefficients: Sequence[Coefficient],
    max_new_tokens: Whole = 40,
    ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The greedy continuation of every prompt at every coefficient (columns `generations`).

    As `generate`, with every token steered at one hook, `layer`. A chat goes on after its assistant
    header, or after what its last assistant message opens with; a continuation of the prompt's own
    is left out. Where the context has no room for `max_new_tokens` the text is shorter (`end` is
    "context"), and where the steered model overflows there is none ("overflow"). `ids` name the
    prompts (numbers from 1 by default). Raises as `token_damage` and `generate`.

    Examples:
        >>> table = sl.measure.generation_table(
        ...     model, ["the river was"], vector, coefficients=[-4, 0, 4], max_new_tokens=5
        ... )
        >>> table.coefficient.tolist()
        [-4.0, 0.0, 4.0]
    """
    at = one_hook(model, along, layer)
    strengths = strengths_at(at, coefficients)
    names, tokenized = named_prompts(model, prompts, ids)
    n_ctx, groups = context_length(model), dict[int, list[int]]()
    for i, prompt in enumerate(tokenized):
        room = max_new_tokens if n_ctx is None else min(max_new_tokens, n_ctx - len(prompt.prompt))
        groups.setdefault(room, []).append(i)
    texts: dict[int, list[Row]] = {}
    tell, done = by_default(progress), 0
    total = len(strengths) * sum(len(places) * max(0, room) for room, places in groups.items())
    for room, places in groups.items():
        if room < 1 <= max_new_tokens:
            nothing = {"text": "", "n_tokens": 0, "end": "context"}
            texts |= {i: [nothing] * len(strengths) for i in places}
            continue
        written = generate_texts(
            *(model, [tokenized[i] for i in places], at.vector, [*strengths]),
            max_new_tokens=room,
            progress=part_of(tell, "continuations: tokens", before=done, total=total),
        )
        done += len(written) * room
        is_full = room < max_new_tokens
        for text in written:
            of_prompt = texts.setdefault(places[text.prompt], [])
            of_prompt.append(_ended(model, tokenized[places[text.prompt]], at, text, room, is_full))
    rows = [
        {
            "prompt": name,
            "hook_name": at.hook_name,
            "layer": hook_layer(at.hook_name),
            "coefficient": amount,
            **text,
        }
        for i, name in enumerate(names)
        for amount, text in zip(strengths.values(), texts[i], strict=True)
    ]
    attrs = {
        "settings": {"max_new_tokens": max_new_tokens},
        "text": fingerprint(tokenized),
        "model": provenance(model).to_dict(),
    }
    return to_frame(rows, "generations", attrs)


def _ended(
    model: HookedModel,
    prompt: TokenizedPrompt,
    at: OneHook,
    text: Generated,
    room: int,
    is_full: bool,
) -> Row:
    """Text, length and end of one continuation; `is_full` where the context had no more room."""
    overflowed = text.overflowed
    if overflowed is None:
        tokens = torch.tensor([[*prompt.prompt, *text.ids]], device=model.cfg.device)
        with inference(model), steer(model, at.vector, text.coefficient):
            logits = model(tokens, return_type="logits")
        # The largest, and so NaN and inf: a model may rule single tokens out with -inf.
        overflowed = not bool(logits.amax(dim=-1).isfinite().all())
    if overflowed:
        return {"text": "", "n_tokens": 0, "end": "overflow"}
    end = "stop" if len(text.ids) < room else "context" if is_full else "length"
    return {"text": decoded(model, text.ids), "n_tokens": len(text.ids), "end": end}
