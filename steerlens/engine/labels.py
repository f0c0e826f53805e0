"""Which tokens are labels: those whose logprob is measured, and what each token is part of."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

import torch

from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Prompt, message_spans, render
from steerlens.engine.continuations import own_texts
from steerlens.engine.positions import (
    STEERED,
    Position,
    markers_of,
    parse_position,
    parse_steered,
    phases,
)
from steerlens.engine.tokenization import TokenizedPairs, TokenizedPrompt, tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.validation import Count, Whole, checked

LabelKind = Literal["continuation", "assistant", "own", "own_sampled", "all"]
"""The tokens whose logprob is measured. `continuation`: the text given after a prompt. `assistant`:
what the assistant says in a chat, without what the template writes around it. `own`: what the
unsteered model itself writes after the prompt, greedily; `own_sampled`: drawn from its own
distribution with the seed. `all`: every token but the first."""

OWN: tuple[LabelKind, ...] = ("own", "own_sampled")
"""The kinds that the model writes itself."""

OWN_TOKENS = 32
"""Tokens that the model writes where nobody says how many."""

Segments = tuple[str, ...]
"""What each token of a prompt with its continuation is part of: a message's role, "template" (what
the chat template writes around messages), "text" (a prompt that is no chat), "continuation"."""


@checked
def with_labels(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    labels: LabelKind | None = None,
    *,
    own_tokens: Count = OWN_TOKENS,
    seed: Whole = 0,
) -> tuple[TokenizedPrompt, ...]:
    """The prompts with the labels that are asked for; of `own` with that text as continuation.

    Args:
        model: Writes the text of `own`.
        prompts: As from `tokenize_pairs`.
        labels: See `LabelKind`. Default: `default_labels` of the prompts.
        own_tokens: The most tokens of `own` (32); a text may end sooner, with its end-of-text
            token.
        seed: Of `own_sampled`.

    Raises:
        InputError: A prompt has none of these labels, or the model's context has no room for
            `own_tokens`.
    """
    kind = labels or default_labels(
        [prompt.source for prompt in prompts], [bool(prompt.continuation) for prompt in prompts]
    )
    if kind in OWN:
        seeded = seed if kind == "own_sampled" else None
        texts = own_texts(model, prompts, n_tokens=own_tokens, seed=seeded)
        return tuple(
            replace(prompt, continuation=text, labels=())
            for prompt, text in zip(prompts, texts, strict=True)
        )
    if kind == "continuation":
        labelled = [replace(p, labels=()) if p.continuation else None for p in prompts]
    elif kind == "all":
        labelled = [
            replace(p, labels=tuple(range(1, len(p))) if p.continuation else ())
            if len(p) > 1
            else None
            for p in prompts
        ]
    else:
        labelled = []
        for prompt, parts in zip(prompts, segments(model, prompts), strict=True):
            said = tuple(i for i, part in enumerate(parts) if part == "assistant" and i)
            labelled.append(replace(prompt, labels=said) if said else None)
    found = tuple(prompt for prompt in labelled if prompt is not None)
    if len(found) < len(prompts):
        first = prompts[labelled.index(None)]
        raise InputError(
            f"{len(prompts) - len(found)} of {len(prompts)} prompts have no label of the kind "
            f"{kind!r}, such as the {first.where}; take the labels 'own' or 'all', or pairs that "
            "all have them"
        )
    return found


@checked
def labelled_pairs(
    model: HookedModel,
    pairs: ContrastivePairs,
    labels: LabelKind | None = None,
    *,
    position: Position = -1,
    steered_positions: str = "all",
    own_tokens: Count = OWN_TOKENS,
    seed: Whole = 0,
) -> TokenizedPairs:
    """`pairs_to_read`, the positive prompts `with_labels`; with what is steered. Raises as these.

    And `InputError` where the labels are of another text after the prompts than what is read.
    """
    kind = kind_of_labels(pairs, labels, position)
    how: dict[str, Any] = {"own_tokens": own_tokens, "seed": seed}
    tokenized = pairs_to_read(model, pairs, position, own=kind, **how)
    positive, negative = tokenized.positive, tokenized.negative
    if _read_text(pairs, position) != "own":  # which are labels already
        positive = with_labels(model, positive, kind, **how)
    names = {term.name for term in parse_steered(steered_positions, STEERED)}
    return TokenizedPairs(*(with_spans(model, side, names) for side in (positive, negative)))


def kind_of_labels(
    pairs: ContrastivePairs, labels: LabelKind | None, position: Position
) -> LabelKind:
    """The labels that are asked for, else those of what is read, else the pairs' default.

    Raises `InputError` as `default_labels`, and where labels and reading are of two texts.
    """
    text = _read_text(pairs, position)
    kind = labels or ("own" if text == "own" else _default_of(pairs))
    if (text == "own") != (kind in OWN) and (text == "own" or text == "continuation"):
        raise InputError(
            f"at {position!r} the text {text!r} is read after each prompt, and the labels "
            f"{kind!r} are not of that text; take the labels {text!r}, or another position"
        )
    return kind


@checked
def pairs_to_read(
    model: HookedModel,
    pairs: ContrastivePairs,
    position: Position = -1,
    *,
    own: LabelKind = "own",
    own_tokens: Count = OWN_TOKENS,
    seed: Whole = 0,
) -> TokenizedPairs:
    """`tokenize_pairs`, with what is read at `position` on both sides (see `Span`).

    The model's own text is of the kind `own`. Raises as `tokenize_pairs`, and `InputError` where
    the context has no room for `own_tokens`.
    """
    span, text = parse_position(position).span, _read_text(pairs, position)
    tokenized = tokenize_pairs(model, pairs, continues_both=text == "continuation")
    sides = [tokenized.positive, tokenized.negative]
    if text == "own":
        how: dict[str, Any] = {"own_tokens": own_tokens, "seed": seed}
        sides = [with_labels(model, side, own, **how) for side in sides]
    if span == "pair":
        pairs.check_positions()
        sides = [_at_positions(side, pairs) for side in sides]
    return TokenizedPairs(*(with_spans(model, side, [span] if span else []) for side in sides))


def _at_positions(
    prompts: Sequence[TokenizedPrompt], pairs: ContrastivePairs
) -> tuple[TokenizedPrompt, ...]:
    """The prompts with the place of each pair's own position."""
    places = [
        (prompt.index(int(pair.position or 0)),)
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    return tuple(
        replace(prompt, spans={**prompt.spans, "pair": place})
        for prompt, place in zip(prompts, places, strict=True)
    )


def _read_text(pairs: ContrastivePairs, position: Position) -> str | None:
    """Of which text after both prompts something is read: "continuation", "own", or None."""
    span = parse_position(position).span
    if span in ("think", "answer"):
        kind = _default_of(pairs)
        return {"all": "own", "assistant": None}.get(kind, kind)
    return span if span in ("continuation", "own") else None


def _default_of(pairs: ContrastivePairs) -> LabelKind:
    return default_labels(
        [pair.positive for pair in pairs], [pair.continuation is not None for pair in pairs]
    )


def with_spans(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], names: Collection[str]
) -> tuple[TokenizedPrompt, ...]:
    """The prompts with the places of those of the names that a model's tokenizer has to tell."""
    spans: list[dict[str, tuple[int, ...]]] = [{} for _ in prompts]
    if "assistant" in names:
        for of, parts in zip(spans, segments(model, prompts), strict=True):
            of["assistant"] = tuple(i for i, part in enumerate(parts) if part == "assistant")
    if not {"think", "answer"}.isdisjoint(names):
        markers = markers_of(model.tokenizer)
        for of, prompt in zip(spans, prompts, strict=True):
            found = phases(torch.tensor([prompt.ids]), markers, len(prompt.prompt))
            of |= {name: tuple(mask[0].nonzero()[:, 0].tolist()) for name, mask in found.items()}
    return tuple(
        replace(prompt, spans={**prompt.spans, **of})
        for prompt, of in zip(prompts, spans, strict=True)
    )


def default_labels(prompts: Sequence[Prompt | None], has_continuation: Sequence[bool]) -> LabelKind:
    """The continuation where there is one, else what the assistant of a chat says, else all tokens.

    Raises `InputError` where there are no prompts, and where that is one kind for some of them and
    another for others: their mean would be of two things.
    """
    if not prompts:
        raise InputError("expected prompts, got none")
    kinds: list[LabelKind] = [
        "continuation" if continued else _default_kind(prompt)
        for prompt, continued in zip(prompts, has_continuation, strict=True)
    ]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if len(counts) > 1:
        told = ", ".join(f"{count} of the kind {kind!r}" for kind, count in counts.items())
        raise InputError(
            f"of {len(kinds)} prompts the labels would be {told}, and a mean over both says "
            "nothing of either; measure them apart, or take the labels 'own' or 'all' for all"
        )
    return kinds[0]


def _default_kind(prompt: Prompt | None) -> LabelKind:
    messages = () if prompt is None or isinstance(prompt, str) else prompt
    says = any(message.role == "assistant" and message.content for message in messages)
    return "assistant" if says else "all"


def segments(model: HookedModel, prompts: Sequence[TokenizedPrompt]) -> list[Segments]:
    """What each token of each prompt is part of. Raises `InputError` as `message_spans`.

    A token that stands on both sides of a border belongs to what follows it.
    """
    tokenizer = model.tokenizer
    texts, spans = [], []
    for prompt in prompts:
        messages = () if prompt.source is None or isinstance(prompt.source, str) else prompt.source
        texts.append(render(messages, tokenizer) if messages else "")
        spans.append(message_spans(messages, tokenizer) if messages else ())
    borders = [sorted({end for span in of for end in span[1:]}) for of in spans]
    heads = [text[:end] for text, of in zip(texts, borders, strict=True) for end in of]
    ids = iter(tokenizer(heads, add_special_tokens=False)["input_ids"] if heads else ())
    found: list[Segments] = []
    for prompt, of, ends in zip(prompts, spans, borders, strict=True):
        n_continued = len(prompt.continuation)
        if not ends:
            found.append(("text",) * len(prompt.prompt) + ("continuation",) * n_continued)
            continue
        at = {end: _n_shared(next(ids), prompt.prompt, tokenizer.bos_token_id) for end in ends}
        parts = ["template"] * len(prompt.prompt)
        for span in of:
            parts[at[span.start] : at[span.stop]] = [span.role] * (at[span.stop] - at[span.start])
        found.append((*parts, *("continuation",) * n_continued))
    return found


def _n_shared(head: Sequence[int], ids: Sequence[int], bos: int | None) -> int:
    """How many of the ids a text that the prompt begins with has in common with it, BOS counted."""
    has_bos = len(ids) > 0 and ids[0] == bos and list(head[:1]) != [bos]
    before = [bos, *head] if has_bos else head
    return sum(
        1 for _ in takewhile(lambda both: both[0] == both[1], zip(before, ids, strict=False))
    )
