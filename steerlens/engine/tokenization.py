"""Prompts as token ids: BOS, continuations, positions, and length-sorted padded batches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Prompt, render, unicode_text
from steerlens.errors import InputError, ModelError, told
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class TokenizedPrompt:
    """The ids of a prompt and of the continuation after it (empty when there is none).

    `where` is what errors call it, `source` what it was made from, where that is known. `labels`
    are the indices of the tokens whose logprob is measured, in the prompt with its continuation; of
    none given, those of the continuation, or every token but the first.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    where: str
    source: Prompt | None = field(default=None, compare=False, repr=False)
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.continuation)

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's ids with those of its continuation."""
        return self.prompt + self.continuation

    @property
    def label_tokens(self) -> tuple[int, ...]:
        """The indices of its labels in `ids`."""
        return self.labels or tuple(range(len(self.prompt) if self.continuation else 1, len(self)))

    def index(self, position: int) -> int:
        """The token index of `position`, counted in the prompt; negative ones from its end.

        Raises `InputError` when the prompt is too short.
        """
        if not -len(self.prompt) <= position < len(self.prompt):
            raise InputError(
                f"position {told(position)} is outside the {self.where}, which has "
                f"{len(self.prompt)} tokens"
            )
        return position % len(self.prompt)


@checked
@dataclass(frozen=True)
class TokenizedPairs:
    """Positive and negative prompts in pair order; continuations follow the positive ones only."""

    positive: tuple[TokenizedPrompt, ...]
    negative: tuple[TokenizedPrompt, ...]


def token_texts(model: HookedModel, ids: Sequence[int]) -> list[str]:
    """Each token decoded on its own; a part of a character comes out as U+FFFD."""
    decode = model.tokenizer.decode
    return [str(decode([token], clean_up_tokenization_spaces=False)) for token in ids]


def raw_tokens(model: HookedModel, ids: Sequence[int]) -> list[str]:
    """Each token as the tokenizer's vocabulary spells it, which tells all of them apart."""
    return [str(token) for token in model.tokenizer.convert_ids_to_tokens(list(ids))]


def fingerprint(prompts: Sequence[TokenizedPrompt]) -> str:
    """sha256 (hex) of the prompts' token ids, where each continuation begins, and the labels."""
    ids = [
        [prompt.prompt, prompt.continuation, *([prompt.labels] if prompt.labels else [])]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def check_steered_positions(positions: str, pairs: TokenizedPairs) -> None:
    """Raise `InputError` when steering at `positions` cannot reach any label token."""
    if positions not in get_args(SteeredPositions):
        raise InputError(f"steered positions are {get_args(SteeredPositions)}, not {positions!r}")
    needs_continuation = positions in ("continuation", "last")
    if needs_continuation and not all(prompt.continuation for prompt in pairs.positive):
        raise InputError(
            f"steering at {positions!r} can only change labels after the prompt, but some pairs "
            "have no continuation; give one for every pair, or steer all positions"
        )
    if needs_continuation and any(p.label_tokens[-1] < len(p.prompt) for p in pairs.positive):
        raise InputError(
            f"steering at {positions!r} can only change labels after the prompt, and those that "
            "were asked for are in it; take the labels 'continuation' or 'own', or steer all "
            "positions"
        )


@checked
def tokenize_prompt(
    model: HookedModel,
    prompt: Prompt,
    continuation: str | None = None,
    *,
    where: str = "prompt",
) -> TokenizedPrompt:
    """Ids of a rendered prompt; BOS as the model has it by default, never doubled.

    A BOS that the chat template already wrote is not written again. The continuation is tokenised
    on its own, so that it is the same ids after any prompt; where the tokenizer would begin it with
    a space that it has not (as SentencePiece does), together with its prompt, and cut off. `where`
    is what errors call it. Raises `InputError` when the prompt is empty or longer than the model's
    context, or the continuation cannot be cut off; `ModelError` when the model has no tokenizer.

    Examples:
        >>> tokenized = sl.engine.tokenize_prompt(model, "the river was", "so cold")
        >>> model.tokenizer.decode(tokenized.continuation)
        'so cold'
        >>> tokenized.prompt  # BOS first
        (1, 4, 6, 8)
    """
    return _tokenize(model, [(prompt, continuation, where)])[0]


@checked
def tokenize_pairs(model: HookedModel, pairs: ContrastivePairs) -> TokenizedPairs:
    """Ids of every pair's prompts (see `tokenize_prompt`).

    Raises `InputError` that names the pair when its prompts tokenise to the same ids, when one is
    longer than the model's context, or when the positive one has no label: a single token with
    nothing after it.

    Examples:
        >>> tokenized = sl.engine.tokenize_pairs(model, pairs)
        >>> len(tokenized.positive[0]), len(tokenized.negative[0])
        (7, 8)
    """
    positive = _tokenize(
        model, [(p.positive, p.continuation, f"positive prompt of pair {p.id!r}") for p in pairs]
    )
    negative = _tokenize(
        model, [(p.negative, None, f"negative prompt of pair {p.id!r}") for p in pairs]
    )
    for pair, pos, neg in zip(pairs, positive, negative, strict=True):
        if pos.prompt == neg.prompt:
            raise InputError(
                f"the two prompts of pair {pair.id!r} tokenise to the same ids; their difference "
                "is zero, so remove the pair or make them differ"
            )
        if len(pos) < 2:
            raise InputError(
                f"the positive prompt of pair {pair.id!r} is a single token, so there is no label "
                "whose logprob could be measured; make it longer or give a continuation"
            )
    return TokenizedPairs(tuple(positive), tuple(negative))


@checked
def tokenize_items(
    model: HookedModel, items: PreferenceItems
) -> tuple[tuple[TokenizedPrompt, ...], tuple[TokenizedPrompt, ...]]:
    """Every item's prompt with its positive, and with its negative continuation.

    Raises `InputError` as `tokenize_prompt`, and when both tokenise to the same ids.
    """
    named = [(item, f"prompt of item {item.id!r}") for item in items]
    positive = tuple(_tokenize(model, [(i.prompt, i.positive, name) for i, name in named]))
    negative = tuple(_tokenize(model, [(i.prompt, i.negative, name) for i, name in named]))
    for item, one, other in zip(items, positive, negative, strict=True):
        if one.continuation == other.continuation:
            raise InputError(
                f"the two continuations of item {item.id!r} tokenise to the same ids; remove it or "
                "make them differ"
            )
    return positive, negative


def _tokenize(
    model: HookedModel, given: Sequence[tuple[Prompt, str | None, str]]
) -> list[TokenizedPrompt]:
    """Prompts with their continuations, and what errors call them: all texts at once."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError("the model has no tokenizer; set one with model.set_tokenizer(...)")
    rendered = [unicode_text(render(prompt, tokenizer), where=where) for prompt, _, where in given]
    prompts = _ids(tokenizer, rendered)
    texts = [
        unicode_text(text, where=f"the continuation of the {where}")
        for _, text, where in given
        if text is not None
    ]
    continuations = iter(_ids(tokenizer, texts))
    bos = tokenizer.bos_token_id
    has_bos = getattr(model.cfg, "default_prepend_bos", True) and bos is not None
    n_ctx, n_tokens = context_length(model), int(model.cfg.d_vocab)
    found = []
    for text, ids, (source, continuation, where) in zip(rendered, prompts, given, strict=True):
        if not ids:
            raise InputError(f"the {where} has no tokens; give some text")
        before = [bos, *ids] if has_bos and ids[:1] != [bos] else ids
        after = [] if continuation is None else next(continuations)
        if continuation is not None and not after:
            raise InputError(f"the continuation of the {where} has no tokens; give some text")
        if continuation is not None and _is_begun_with_space(tokenizer, continuation, after):
            [whole] = _ids(tokenizer, [text + continuation])
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise InputError(
                    f"the continuation {told(continuation)} cannot be cut off from the {where}: "
                    "the tokenizer makes one token of the end of the one and the start of the "
                    "other; move the space or letters between them to the other side"
                )
            after = whole[len(ids) :]
        last = max([*before, *after])
        if last >= n_tokens:
            raise ModelError(
                f"the {where} has the token id {last} (as "
                f"{tokenizer.convert_ids_to_tokens([last])[0]!r}), and the model's vocabulary ends "
                f"at {n_tokens - 1}: the tokenizer has tokens that the model has not"
            )
        if n_ctx is not None and len(before) + len(after) > n_ctx:
            raise InputError(
                f"the {where} has {len(before) + len(after)} tokens with its continuation, but the "
                f"model's context is {n_ctx}; shorten it"
            )
        found.append(TokenizedPrompt(tuple(before), tuple(after), where, source))
    return found


def _is_begun_with_space(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether the ids of a text begin with more spaces than the text does."""
    spelled = "".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
    there, here = (len(t) - len(t.lstrip(" \u2581\u0120")) for t in (text, spelled))
    return here > there


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Each text's ids, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


SteeredPositions = Literal["all", "prompt", "continuation", "last"]
"""Which real tokens an intervention touches; "last" is the last prompt token."""
