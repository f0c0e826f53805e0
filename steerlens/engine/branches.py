"""Two continuations of one prompt in one row, so that a cell runs the prompt once for both."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
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
    hugging_face_model,
    is_on_one_side,
    key_value_cache,
)


@dataclass(frozen=True)
class Branches(Batch):
    """Prompts, each with two continuations that do not see each other: two `rows` a prompt.

    Both begin with the prompt's last token, at which the first of their own is predicted. The mask
    is 0 at padding, 1 at what both follow, 2 and 3 at the one and the other.
    """

    def labels_by_row(
        self, prompts: Int[Tensor, " prompt"] | slice = slice(None)
    ) -> Bool[Tensor, "row token"]:
        """The labels of the first continuation of each of the prompts, and of the other."""
        labels, mask = self.label_mask()[prompts], self.attention_mask[prompts]
        return torch.stack([labels & (mask == branch) for branch in (2, 3)], dim=1).flatten(0, 1)


def branch_kwargs(mask: Int[Tensor, "row token"], dtype: torch.dtype) -> dict[str, Any]:
    """Attention and positions with which a token sees its own continuation and the prompt alone.

    Examples:
        >>> kwargs = branch_kwargs(torch.tensor([[1, 2, 2, 3]]), torch.float32)
        >>> (kwargs["attention_mask"][0, 0, 3] == 0).tolist(), kwargs["position_ids"].tolist()
        ([True, False, False, True], [[0, 1, 2, 1]])
    """
    sees = ((mask[:, :, None] == mask[:, None, :]) | (mask == 1)[:, None, :]).tril()
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
    cache = None if isinstance(model, BareModel) else key_value_cache(model)
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
) -> tuple[Branches, ...]:
    """Length-sorted batches of the prompts that every two of `prompts` share, as `make_batches`."""
    lengths = [(len(prompts[one]) + len(prompts[other].continuation),) for one, other in twins]
    groups = length_groups(lengths, model, batch_size)
    return tuple(join_branches(model, prompts, [twins[i] for i in of]) for of in groups)


def join_branches(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], twins: Sequence[tuple[int, int]]
) -> Branches:
    """One batch of the prompts that every two of `prompts` share, padded on the right."""
    joined, masks = [], []
    for first, second in ((prompts[one], prompts[other]) for one, other in twins):
        shared, n = first.prompt, len(first)
        ids = (*first.continuation, shared[-1], *second.continuation)
        labels = (*range(len(shared), n), *range(n + 1, len(shared) + len(ids)))
        joined.append(TokenizedPrompt(shared, ids, first.where, labels=labels))
        sizes = torch.tensor([len(shared) - 1, n - len(shared) + 1, len(second.continuation) + 1])
        masks.append(torch.arange(1, 4).repeat_interleave(sizes))
    device = torch.device(model.cfg.device) if model.cfg.device else None
    tokens, _ = padded([prompt.ids for prompt in joined], "right", device=device)
    mask = pad_sequence(masks, batch_first=True).to(tokens.device)
    return Branches(tuple(chain.from_iterable(twins)), tuple(joined), tokens, mask)
