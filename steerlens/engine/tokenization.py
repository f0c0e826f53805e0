"""Prompts as token ids: BOS, continuations, positions, and length-sorted padded batches."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeAlias

from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Prompt, render, rendering_of, template_changes, unicode_text
from steerlens.engine.positions import (
    AFTER,
    STEERED,
    Position,
    parse_position,
    parse_steered,
    steers_late,
)
from steerlens.errors import InputError, ModelError, told
from steerlens.models.hooked_model import HookedModel, context_length
from steerlens.validation import checked


@checked
@dataclass(frozen=True)
class TokenizedPrompt:
    """The ids of a prompt and of the continuation after it (empty when there is none).

    `where` is what errors call it, `source` what it was made from, where that is known. `labels`
    are the indices of the tokens whose logprob is measured, in the prompt with its continuation; of
    none given, those of the continuation, or every token but the first. `spans` are those of the
    names that only a chat or a thinking model has (see `labels.with_spans`).
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    where: str
    source: Prompt | None = field(default=None, compare=False, repr=False)
    labels: tuple[int, ...] = ()
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

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

    def span(self, name: str) -> tuple[int, ...]:
        """The indices in `ids` of a span's tokens. Raises `InputError` where there are none."""
        spans = {
            name: tuple(range(len(self.prompt), len(self))) for name in ("continuation", "own")
        }
        found = {**spans, **self.spans}.get(name, ())
        if not found:
            raise InputError(f"the {self.where} has no tokens of the span {name!r}")
        return found

    def steered(self, positions: str) -> tuple[int, ...]:
        """The indices in `ids` of the tokens that are steered, if there are any.

        Raises `InputError` where a span is not known (see `labels.with_spans`).
        """
        n, indices = len(self.prompt), range(len(self))
        known = {"all": indices, "prompt": indices[:n], "last": indices[n - 1 : n]}
        found: set[int] = set()
        for name, window in parse_steered(positions, STEERED):
            after = indices[n:][window or slice(None)] if name in AFTER else None
            if after is None and name not in known and name not in self.spans:
                raise InputError(f"the tokens {name!r} of the {self.where} are not known")
            found.update(known.get(name) or self.spans[name] if after is None else after)
        return tuple(sorted(found))

    def places(self, position: Position) -> tuple[int, ...]:
        """The indices in `ids` of the tokens that are read. Raises `InputError` where none are."""
        reading = parse_position(position)
        if reading.span is not None:
            indices = self.span(reading.span)
        elif isinstance(reading.tokens, slice):
            indices = tuple(range(len(self.prompt))[reading.tokens])
        else:
            indices = tuple(self.index(int(index)) for index in reading.tokens)
        if not indices:
            raise InputError(
                f"position {told(position)} holds no token of the {self.where}, which has "
                f"{len(self.prompt)} tokens"
            )
        return (max(indices),) if reading.reduction == "last" else indices


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
    """sha256 (hex) of the prompts' token ids, where each continuation begins, labels and places.

    The places are those of each pair's own position.
    """
    ids = [
        [
            *(prompt.prompt, prompt.continuation),
            *([prompt.labels] if prompt.labels else []),
            *([["pair", *prompt.spans["pair"]]] if "pair" in prompt.spans else []),
        ]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def check_steered_positions(positions: str, pairs: TokenizedPairs) -> None:
    """Raise `InputError` when steering at `positions` cannot reach any label token."""
    needs_continuation = steers_late(positions)
    if needs_continuation and not all(prompt.continuation for prompt in pairs.positive):
        raise InputError(
            f"steering at {positions!r} can only change labels after the prompt, but some pairs "
            "have no continuation; give one for every pair, or steer all positions"
        )
    # The logprob of a token is that of the logits at the token before it.
    firsts = [min(prompt.steered(positions), default=len(prompt)) for prompt in pairs.positive]
    if all(at >= p.label_tokens[-1] for at, p in zip(firsts, pairs.positive, strict=True)):
        raise InputError(
            f"steering at {positions!r} can only change labels after the first token there, and no "
            "prompt has one; take the labels 'continuation' or 'own' with two tokens or more, or "
            "steer all positions"
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

    A BOS that the chat template already wrote is not written again. Prompt and continuation are
    tokenised as one text, as the model would read it, and cut where the prompt ends. A token may
    stand on both sides of that place: an error, or with `set_rendering(tokenizer, straddle="back")`
    (`load_model(..., straddle="back")`) the cut is before it, so that it is the first of the
    continuation. `where` is what errors call it. Raises `InputError` when the prompt or the
    continuation has no tokens, both are longer than the model's context, or the continuation cannot
    be cut off; `ModelError` when the model has no tokenizer, or one with ids that it has not.

    Examples:
        >>> tokenized = sl.engine.tokenize_prompt(model, "the river was", " so cold")
        >>> model.tokenizer.decode(tokenized.continuation)
        'so cold'
        >>> tokenized.prompt  # BOS first
        (1, 4, 6, 8)
    """
    return _tokenize(model, [(prompt, continuation, where)])[0]


@checked
def tokenize_pairs(
    model: HookedModel, pairs: ContrastivePairs, *, continues_both: bool = False
) -> TokenizedPairs:
    """Ids of every pair's prompts (see `tokenize_prompt`).

    The continuation follows the positive prompts alone, or with `continues_both` the negative ones
    too.

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
    # Cut before the same continuation, also where nothing of it is run: both sides end alike.
    cuts_back = continues_both or rendering_of(model.tokenizer).straddle == "back"
    negative = [
        prompt if continues_both else replace(prompt, continuation=())
        for prompt in _tokenize(
            model,
            [
                (
                    p.negative,
                    p.continuation if cuts_back else None,
                    f"negative prompt of pair {p.id!r}",
                )
                for p in pairs
            ],
        )
    ]
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
    positive, negative = (
        _tokenize(model, [(i.prompt, getattr(i, side), name) for i, name in named])
        for side in ("positive", "negative")
    )
    # Where one side had to be cut further back, so is the other: both follow the same prompt.
    cuts = [min(len(a.prompt), len(b.prompt)) for a, b in zip(positive, negative, strict=True)]
    positive, negative = (
        [
            replace(prompt, prompt=prompt.ids[:cut], continuation=prompt.ids[cut:])
            for prompt, cut in zip(side, cuts, strict=True)
        ]
        for side in (positive, negative)
    )
    for item, one, other in zip(items, positive, negative, strict=True):
        if one.continuation == other.continuation:
            raise InputError(
                f"the two continuations of item {item.id!r} tokenise to the same ids; remove it or "
                "make them differ"
            )
    return tuple(positive), tuple(negative)


def _tokenize(
    model: HookedModel, given: Sequence[tuple[Prompt, str | None, str]]
) -> list[TokenizedPrompt]:
    """Prompts with their continuations, and what errors call them: all texts at once."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError("the model has no tokenizer; set one with model.set_tokenizer(...)")
    rendered = [unicode_text(render(prompt, tokenizer), where=where) for prompt, _, where in given]
    _warn_of_changes(rendered, given)
    wholes = [
        text + unicode_text(after or "", where=f"the continuation of the {where}")
        for text, (_, after, where) in zip(rendered, given, strict=True)
    ]
    texts = list(dict.fromkeys(rendered + wholes))
    ids_of = dict(zip(texts, _ids(tokenizer, texts), strict=True))
    bos = tokenizer.bos_token_id
    has_bos = getattr(model.cfg, "default_prepend_bos", True) and bos is not None
    n_ctx, n_tokens = context_length(model), int(model.cfg.d_vocab)
    found = []
    for text, whole, (source, continuation, where) in zip(rendered, wholes, given, strict=True):
        ids = ids_of[whole]
        cut = (
            len(ids)
            if continuation is None
            else _cut(model, ids_of[text], ids, (continuation, where))
        )
        ids, after = ids[:cut], ids[cut:]
        if not ids:
            raise InputError(f"the {where} has no tokens; give some text")
        before = [bos, *ids] if has_bos and ids[:1] != [bos] else ids
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


def _warn_of_changes(
    rendered: Sequence[str], given: Sequence[tuple[Prompt, str | None, str]]
) -> None:
    """Warn where a chat template did not write what the turns say, with the first difference."""
    changed = [
        (where, changes[0])
        for text, (prompt, _, where) in zip(rendered, given, strict=True)
        if (changes := template_changes(prompt, text))
    ]
    if changed:
        where, change = changed[0]
        warnings.warn(
            f"the chat template changes {len(changed)} of {len(given)} prompts: of the {where} it "
            f"{change}; write the turns as the template does, or move a system text into the "
            "user's turn",
            UserWarning,
            stacklevel=4,
        )


def _cut(model: HookedModel, prompt: list[int], whole: list[int], names: tuple[str, str]) -> int:
    """How many of the ids of a whole text are those of its prompt."""
    if prompt == whole:
        raise InputError(f"the continuation of the {names[1]} has no tokens; give some text")
    agree = (ours == theirs for ours, theirs in zip(prompt, whole, strict=False))
    cut = sum(1 for _ in takewhile(bool, agree))
    if cut < len(prompt) and rendering_of(model.tokenizer).straddle == "error":
        there, here = ("".join(raw_tokens(model, ids[cut:])) for ids in (prompt, whole))
        [straddling] = raw_tokens(model, whole[cut : cut + 1])
        raise InputError(
            f"the continuation {told(names[0])} cannot be cut off from the {names[1]}: of the end "
            f"of the one and the start of the other the tokenizer makes one token, "
            f"{told(straddling)} ({told(there[-40:])} becomes {told(here[:40])} with it); move the "
            "space or letters between them to the other side, or take that token as the first of "
            'the continuation with straddle="back"'
        )
    return min(cut, len(whole) - 1)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Each text's ids, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


SteeredPositions: TypeAlias = str
"""Which real tokens an intervention touches: "all", "prompt", "last" (of the prompt) or a span by
name (`continuation`, `assistant`, `own`, `think`, `answer`, see `Span`; `generated` and `own` are
other words for `continuation`); several joined by +, as in "last+continuation"; of a continuation
perhaps a window: "continuation[0:10]"."""
