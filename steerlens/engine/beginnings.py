"""Prompts that begin alike: what they begin with is run once, and each goes on from its keys."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.engine.batches import TOKENS_PER_PASS, Batch, length_groups, padded
from steerlens.engine.positions import Position
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.models.hooked_model import (
    HookedModel,
    context_length,
    is_on_one_side,
    key_value_cache,
)

WORTH = 0.2
"""The share of the tokens that has to be saved, and as many of them as a pass holds."""

KEPT = 8
"""How many kept tokens count for one that is run where a batch is made: each row has a copy."""

_MOST_SPLITS = 50
"""How often texts are told apart, as Python would run too deep in long ones."""


@dataclass(frozen=True)
class Beginnings:
    """Beginnings in one batch, and what follows them.

    `which` says of every prompt's number which row of `head` it begins with; of prompts that share
    nothing there is no `head`.
    """

    head: Batch | None
    tails: tuple[Batch, ...]
    which: dict[int, int]

    def rows(self, tail: Batch) -> Int[Tensor, " prompt"]:
        """The rows of `head` that the prompts of a tail, or of a part of it, begin with."""
        return torch.tensor([self.which[row] for row in tail.rows])


def common_beginnings(texts: Sequence[tuple[int, ...]]) -> list[int]:
    """How many tokens of each text are run once for all that begin with them.

    Texts that begin alike are told apart further on as long as that saves more tokens.

    Examples:
        >>> from steerlens.engine.beginnings import common_beginnings
        >>> common_beginnings([(1, 2, 3), (1, 2, 4), (1, 7, 8), (1, 7, 8), (5,)])  # 2 + 3, not 3
        [2, 2, 3, 3, 0]
    """
    lengths = [0] * len(texts)
    if texts:
        _, found = _split(texts, sorted(range(len(texts)), key=lambda row: texts[row]), 0)
        for row, length in found.items():
            lengths[row] = length
    return lengths


def _split(
    texts: Sequence[tuple[int, ...]], rows: Sequence[int], n_splits: int
) -> tuple[int, dict[int, int]]:
    """Tokens saved among sorted rows, and how many each row has in common with others."""
    if len(rows) == 1:
        return 0, {rows[0]: 0}
    # What the first and the last of sorted texts have in common, all have.
    ends = texts[rows[0]], texts[rows[-1]]
    n = next(
        (i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), min(map(len, ends))
    )
    together = n * (len(rows) - 1)
    of_next = groupby(rows, key=lambda row: texts[row][n : n + 1])
    parts = [list(of) for _, of in of_next] if n_splits < _MOST_SPLITS else [rows]
    if len(parts) > 1:
        apart = [_split(texts, part, n_splits + 1) for part in parts]
        saved = sum(of_part for of_part, _ in apart)
        if saved > together:
            return saved, {row: length for _, of in apart for row, length in of.items()}
    return together, dict.fromkeys(rows, n)


def make_beginnings(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    position: Position,
    batch_size: int | None,
) -> list[Beginnings]:
    """Batches of prompts after batches of what they begin with; none where that saves little.

    What is read at `position` comes after the beginnings. None on a GPU either, where a model keeps
    more than keys and values of what it has read, where texts lie on both sides of a length at
    which it changes its arithmetic, and where a padded batch would be longer than its context.
    """
    if torch.device(model.cfg.device or "cpu").type != "cpu" or key_value_cache(model) is None:
        return []
    ids = [prompt.ids for prompt in prompts]
    ends = [min(*prompt.places(position), len(prompt) - 1) for prompt in prompts]
    lengths = common_beginnings([text[:end] for text, end in zip(ids, ends, strict=True)])
    heads: dict[tuple[int, ...], list[int]] = {}
    for row, n in enumerate(lengths):
        heads.setdefault(ids[row][:n], []).append(row)
    n_tokens = sum(map(len, ids))
    saved = sum(lengths) - sum(map(len, heads))
    if saved < max(TOKENS_PER_PASS["cpu"], WORTH * n_tokens):
        return []
    if not is_on_one_side(model, min(filter(None, lengths)), max(map(len, ids))):
        return []
    groups = list(_grouped(model, prompts, heads, batch_size))
    # Padded between beginning and rest, a batch is wider than its longest prompt.
    room = context_length(model) or math.inf
    return groups if max(map(_width, groups)) <= room else []


def _width(group: Beginnings) -> int:
    head = 0 if group.head is None else group.head.tokens.shape[1]
    return head + max(tail.tokens.shape[1] for tail in group.tails)


def _grouped(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    heads: dict[tuple[int, ...], list[int]],
    batch_size: int | None,
) -> Iterator[Beginnings]:
    """Beginnings of like length together, each group with all that follows it."""
    texts, cpu = [text for text in heads if text], torch.device("cpu")
    together = length_groups([(len(text),) for text in texts], model, batch_size)
    groups = [[texts[i] for i in group] for group in together]
    if () in heads:
        groups.append([()])
    for of in groups:
        which = {row: i for i, text in enumerate(of) for row in heads[text]}
        rows = tuple(which)
        cuts = [len(of[which[row]]) for row in rows]
        rest = [prompts[row].ids[cut:] for row, cut in zip(rows, cuts, strict=True)]
        tails = []
        takes = [(len(text) + cut // KEPT,) for text, cut in zip(rest, cuts, strict=True)]
        for places in length_groups(takes, model, batch_size):
            tokens = padded([rest[i] for i in places], "right", device=cpu)
            of_tail = tuple(rows[i] for i in places)
            n_before = tuple(cuts[i] for i in places)
            tails.append(Batch(of_tail, tuple(prompts[r] for r in of_tail), *tokens, n_before))
        head = None
        if any(cuts):
            begun = tuple(TokenizedPrompt(text, (), "beginning") for text in of)
            head = Batch(tuple(range(len(of))), begun, *padded(of, "left", device=cpu))
        yield Beginnings(head, tuple(tails), which)
