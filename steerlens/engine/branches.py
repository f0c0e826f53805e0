"""Texts that begin alike in one row, so that a cell runs what they share once for all of them.

Two continuations of a prompt always; and of several prompts, what all of them begin with.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerlens.engine.backend import BareModel
from steerlens.engine.batches import Batch, in_row_order, length_groups, padded
from steerlens.engine.positions import parse_position
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import Workload
from steerlens.models.hooked_model import (
    HookedModel,
    context_length,
    hugging_face_model,
    is_on_one_side,
    key_value_cache,
)

LONGEST_ROW = 256
"""Tokens that several prompts take in one row at the most: attention to a longer row takes the time
that a shared beginning saves."""
LEAST_SHARED = 8
"""Tokens of a beginning that is run once for several prompts, at the least."""


@dataclass(frozen=True)
class Branches(Batch):
    """Prompts in rows of one or several, each with two continuations, which are two of `rows`.

    Continuations do not see each other. Both begin with the prompt's last token, at which the first
    of their own is predicted. The mask is 0 at padding, 1 at what all of the row begin with, and
    from there on three numbers a prompt: what both of its texts follow, and the one and the other.
    """

    def labels_by_row(
        self, prompts: Int[Tensor, " prompt"] | slice = slice(None)
    ) -> Bool[Tensor, "row token"]:
        """The labels of the first continuation of each prompt of some rows, and of the other."""
        labels, mask = self.label_mask()[prompts], self.attention_mask[prompts]
        n_prompts = len(self.rows) // len(self.prompts) // 2
        texts = [3 * i + text for i in range(n_prompts) for text in (3, 4)]
        return torch.stack([labels & (mask == text) for text in texts], dim=1).flatten(0, 1)


def branch_kwargs(mask: Int[Tensor, "row token"], dtype: torch.dtype) -> dict[str, Any]:
    """Attention and positions with which a token sees its own text alone (`Branches`).

    Examples:
        >>> kwargs = branch_kwargs(torch.tensor([[1, 2, 3, 3, 4, 5, 6]]), torch.float32)
        >>> (kwargs["attention_mask"][0, 0, [4, 6]] == 0).int().tolist()
        [[1, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 1]]
        >>> kwargs["position_ids"].tolist()
        [[0, 1, 2, 3, 2, 1, 2]]
    """
    key, query = mask[:, None, :], mask[:, :, None]
    sees = ((key == query) | (key == 1) | (key == (query - 2) // 3 * 3 + 2)).tril()
    hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    hidden.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": hidden[:, None], "position_ids": sees.sum(dim=-1) - 1}


def with_one_prompt(
    model: HookedModel, workload: Workload, batches: Sequence[Batch]
) -> list[tuple[int, int]]:
    """Places, in the rows' order, of every two whose prompt a cell may run once.

    None unless all prompts come in twos, every token is steered, and `can_branch`.
    """
    prompts = in_row_order(batches)
    places = defaultdict[tuple[int, ...], list[int]](list)
    for place, prompt in enumerate(prompts):
        places[prompt.prompt].append(place)
    may = (
        workload.steered_positions == "all"
        and not workload.with_kl
        and parse_position(workload.position).span is None
        and all(len(of_prompt) % 2 == 0 for of_prompt in places.values())
        and can_branch(model, prompts)
    )
    return [(of[i], of[i + 1]) for of in places.values() for i in range(0, len(of), 2) if may]


def can_branch(model: HookedModel, prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether the model may take positions and attention as they are given, for all prompts.

    Each needs a continuation without labels of its own, within the model's windows. Not the bare
    model on a GPU, whose blocks are called without a mask.
    """
    is_called_apart = isinstance(model, BareModel) and torch.device(model.cfg.device).type == "cuda"
    cache = None if is_called_apart else key_value_cache(model)
    if cache is None or not is_on_one_side(model, *map(len, prompts)):
        return False
    window = min(
        (getattr(layer, "sliding_window", math.inf) for layer in cache.layers), default=math.inf
    )
    # GPT-Neo's local attention counts the columns of a row, in which both texts stand.
    config = getattr(hugging_face_model(model), "config", None)
    window = min(window, (getattr(config, "window_size", None) or math.inf) / 2)
    return all(
        p.continuation and not p.labels and len(p.prompt) > 1 and len(p) <= window for p in prompts
    )


def make_branches(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    twins: Sequence[tuple[int, int]],
    batch_size: int | None,
    *,
    may_share: bool = False,
) -> tuple[Branches, ...]:
    """Length-sorted batches of the prompts that every two of `prompts` share, as `make_batches`.

    With `may_share`, and no batch size that counts prompts, several that begin alike are in a row.
    """
    whole = [len(prompts[one]) + len(prompts[other].continuation) for one, other in twins]
    of_row = prompts_per_row(model, prompts, twins) if may_share and batch_size is None else 1
    in_order = sorted(range(len(twins)), key=whole.__getitem__)
    n_full = len(twins) // of_row * of_row
    full = [in_order[i : i + of_row] for i in range(0, n_full, of_row)]
    n_shared = n_in_common(prompts, twins)
    batches: list[Branches] = []
    for rows in (full, [in_order[n_full:]]):  # the last row may hold fewer
        lengths = [(n_shared + sum(whole[i] - n_shared for i in row),) for row in rows if row]
        for group in length_groups(lengths, model, batch_size):
            of_group = [[twins[i] for i in rows[place]] for place in group]
            batches.append(join_branches(model, prompts, of_group))
    return tuple(batches)


def in_equal_rows(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], twins: Sequence[tuple[int, int]]
) -> list[Sequence[tuple[int, int]]]:
    """The twins in rows of as many: the most that `prompts_per_row` allows."""
    most = prompts_per_row(model, prompts, twins)
    n = max(n for n in range(1, most + 1) if len(twins) % n == 0)
    return [twins[i : i + n] for i in range(0, len(twins), n)]


def prompts_per_row(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], twins: Sequence[tuple[int, int]]
) -> int:
    """How many prompts, of every two of `prompts`, may be in a row.

    One where they begin too differently, or where a window counts columns, as GPT-Neo's does.
    """
    n_shared = n_in_common(prompts, twins)
    config = getattr(hugging_face_model(model), "config", None)
    if n_shared < LEAST_SHARED or getattr(config, "window_size", None):
        return 1
    longest = min(LONGEST_ROW, context_length(model) or LONGEST_ROW)
    own = (len(prompts[i]) + len(prompts[j].continuation) + 1 - n_shared for i, j in twins)
    return max(1, (longest - n_shared) // max(own))


def n_in_common(prompts: Sequence[TokenizedPrompt], twins: Sequence[tuple[int, int]]) -> int:
    """Tokens that all the prompts begin with, short of the last of any."""
    columns = zip(*(prompts[one].prompt[:-1] for one, _ in twins), strict=False)
    return len([*takewhile(lambda ids: len({*ids}) == 1, columns)])


def join_branches(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    twins: Sequence[Sequence[tuple[int, int]]],
) -> Branches:
    """One batch, padded on the right, of rows of as many prompts, each that of two of `prompts`."""
    joined, masks = [], []
    for of_row in twins:
        n_shared, start = n_in_common(prompts, of_row), prompts[of_row[0][0]].prompt
        ids, mask, labels = [*start[:n_shared]], [1] * n_shared, list[int]()
        for i, (one, other) in enumerate(of_row):
            ids += prompts[one].prompt[n_shared:-1]
            mask += [3 * i + 2] * (len(ids) - len(mask))
            for text, prompt in ((3, prompts[one]), (4, prompts[other])):
                ids += (prompt.prompt[-1], *prompt.continuation)
                labels += range(len(mask) + 1, len(ids))
                mask += [3 * i + text] * (len(ids) - len(mask))
        rest, where = tuple(ids[len(start) :]), prompts[of_row[0][0]].where
        joined.append(TokenizedPrompt(start, rest, where, labels=tuple(labels)))
        masks.append(torch.tensor(mask))
    device = torch.device(model.cfg.device) if model.cfg.device else None
    tokens, _ = padded([prompt.ids for prompt in joined], "right", device=device)
    in_rows = pad_sequence(masks, batch_first=True).to(tokens.device)
    rows = tuple(chain.from_iterable(chain.from_iterable(twins)))
    return Branches(rows, tuple(joined), tokens, in_rows)
